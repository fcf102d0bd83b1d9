"""A recipe written as a plain checkpoint computes what the recipe computes, or there is no checkpoint."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoTokenizer,
    Gemma3Config,
)

import families
import impasto as im
from impasto import checkpoint
from impasto.anatomy import text_config
from impasto.checkpoint import nbytes, obstacle, plain, write
from impasto.errors import NotationError, StoreError, UnsupportedModel, UsageError
from impasto.models import LoadedModel, adopt
from impasto.recipe import Recipe
from tiny import tiny_model, tiny_tokenizer

CLOSE = 1e-5
MOVED = "5 0 3 3 1"  # last layer first, one twice, two left out
EDIT = "3.*@0.5"  # of the layer that runs twice
KIND = "the config does not say which layer is of which kind"
EMBEDDED = (
    "model.embed_tokens_per_layer.weight has another shape (200 x 40) than model.embed_tokens_per_layer.weight "
    "(200 x 48): its size depends on the number of layers"
)
REFUSED = {  # what a config cannot say of MOVED
    "deepseek_v3": f"model.layers.0.mlp.gate_proj.weight has no counterpart: {KIND}",
    "modernbert": f"model.layers.1.attn_norm.weight has no counterpart: {KIND}",
    "gemma3n_text": EMBEDDED,
    "gemma4_text": EMBEDDED,
}


@functools.cache
def loaded(family: str) -> LoadedModel:
    return adopt(families.shared(family), None, name=family)


@functools.cache
def tiny() -> LoadedModel:
    return adopt(tiny_model(), tiny_tokenizer(), name="tiny")


def of(text: str | None, *edits: str, layers: int = families.DEPTH) -> Recipe:
    return Recipe.of("m", text, edits, layers=layers)


def reloaded(family: str, folder: Path) -> Any:
    """The checkpoint as anybody would load it."""
    auto = AutoModelForCausalLM
    if family in families.ENCODERS:
        auto = AutoModelForMaskedLM
    elif family in families.VISION:
        auto = AutoModelForImageClassification
    return auto.from_pretrained(folder).eval()


def logits(model: Any, family: str) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**families.inputs(family)).logits
    return found


def nothing_in(folder: Path) -> bool:
    return not any(folder.iterdir())


# ── the law ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_checkpoint_computes_what_its_recipe_computes(family: str, tmp_path: Path) -> None:
    model, recipe, folder = loaded(family), of(MOVED, EDIT), tmp_path / "moved"
    before = logits(model.model, family)
    if family in REFUSED:
        assert obstacle(model, recipe) == REFUSED[family]
        with pytest.raises(UnsupportedModel) as error:
            write(model, recipe, folder)
        assert str(error.value) == f"{recipe} cannot be a plain checkpoint: {REFUSED[family]}"
        assert nothing_in(tmp_path)
    else:
        assert write(model, recipe, folder) == folder
        made = reloaded(family, folder)
        assert type(made) is type(model.model) and text_config(made).num_hidden_layers == 5
        with im.applied(model, recipe.schedule, recipe.edits) as changed:
            expected = logits(changed, family)
        assert torch.allclose(logits(made, family), expected, rtol=0, atol=CLOSE * max(1.0, expected.abs().max()))
        assert not torch.allclose(expected, before, atol=1e-3)
    assert torch.equal(logits(model.model, family), before)


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers=st.lists(st.integers(0, families.DEPTH - 1), min_size=1, max_size=9))
def test_any_series_is_a_checkpoint(layers: list[int], tmp_path: Path) -> None:
    """Also of layers that differ in their window, and in whether they turn by position."""
    for family in ("gemma3_text", "smollm3"):
        model, recipe, folder = loaded(family), of(" ".join(map(str, layers))), tmp_path / "any"
        write(model, recipe, folder)
        with im.applied(model, recipe.schedule) as changed:
            expected = logits(changed, family)
        assert torch.allclose(logits(reloaded(family, folder), family), expected, rtol=0, atol=1e-4)
        sizes = 0
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                sizes += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
        assert sizes == nbytes(model, recipe.schedule)
        shutil.rmtree(folder)


def test_a_checkpoint_writes_the_texts_of_its_recipe(tmp_path: Path) -> None:
    from impasto.generation import generate

    recipe = of("0 2 1 1 3", "1.mlp.*@r4", layers=4)
    (tmp_path / "empty").mkdir()
    folder = write(tiny(), recipe, str(tmp_path / "empty"))
    ids = [[5, 9, 12, 3, 200, 77]]
    with im.applied(tiny(), None, recipe.edits) as changed:
        (expected,) = generate(changed, tiny().tokenizer, recipe.schedule, ids, max_new_tokens=8)
    made = AutoModelForCausalLM.from_pretrained(folder)
    got = made.generate(torch.tensor(ids), do_sample=False, max_new_tokens=8, pad_token_id=0)[0, len(ids[0]) :]
    assert tuple(got.tolist())[: expected.tokens] == expected.new_token_ids
    assert AutoTokenizer.from_pretrained(folder)("abc").input_ids == tiny().tokenizer("abc").input_ids
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_settings_for_texts_are_written_even_if_transformers_would_not_save_them(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.temperature = (
        0.6  # and no sampling: a warning where it runs, and an error where it is saved
    )
    folder = write(adopt(model, None, name="x"), of("0:2", layers=4), tmp_path / "x")
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.temperature == 0.6


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied(tied: bool, tmp_path: Path) -> None:
    model = adopt(families.build("llama", tie_word_embeddings=tied), None, name="tied")
    folder = write(model, of("0 0 5"), tmp_path / "x")
    made = reloaded("llama", folder)
    assert (made.lm_head.weight is made.model.embed_tokens.weight) == tied
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert ("lm_head.weight" in tensors.keys()) != tied  # noqa: SIM118


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_stay_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    families.build("gemma3_text").save_pretrained(tmp_path / "own")
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "own", dtype=dtype)
    folder = write(adopt(own, None, name="x"), of(MOVED), tmp_path / "x")
    assert AutoModelForCausalLM.from_pretrained(folder).dtype is dtype


def test_only_layers_that_repeat_are_copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny().model
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    saved: dict[str, int] = {}
    save = type(model).save_pretrained

    def spying(self: Any, folder: Any) -> None:
        saved.update({name: tensor.data_ptr() for name, tensor in self.state_dict().items()})
        save(self, folder)

    monkeypatch.setattr(type(model), "save_pretrained", spying)
    write(tiny(), of("2 0 2", layers=4), tmp_path / "x")
    back = {"0": "2", "1": "0"}
    for name, place in saved.items():
        parts = name.split(".")
        if parts[1] != "layers":
            assert place == places[name]
        elif parts[2] in back:
            assert place == places[".".join(["model.layers", back[parts[2]], *parts[3:]])]
        else:
            assert place not in places.values()


# ── what configs say of single layers ────────────────────────────────────────────────────────────────────────────


def test_numbers_of_layers_become_their_new_numbers(tmp_path: Path) -> None:
    model = adopt(families.build("qwen3_moe", mlp_only_layers=[1, 4]), None, name="x")
    folder = write(model, of("4 0 1 1 5"), tmp_path / "x")
    assert reloaded("qwen3_moe", folder).config.mlp_only_layers == [0, 2, 3]


def test_what_a_config_says_is_reordered_in_every_form() -> None:
    def reordered(name: str, value: Any) -> Any:
        return checkpoint._reordered(name, value, 4, (3, 0, 0))

    assert reordered("layer_types", ["a", "b", "c", "d"]) == ["d", "a", "a"]
    assert reordered("intermediate_size", (1, 2, 3, 4)) == (4, 1, 1)
    assert reordered("no_rope_layers", [1, 0, 1, 0]) == [0, 1, 1]
    assert reordered("mlp_only_layers", [0, 2]) == [1, 2] and reordered("moe_layers", [0, 1, 2, 3]) == [0, 1, 2]
    assert reordered("per_layer_config", {"3": "x", "1": "y"}) == {0: "x"}
    for name, value in (
        ("eos_token_id", [1, 2, 3, 4]),
        ("rope_sections", [1, 2]),
        ("mlp_only_layers", []),
        ("layer_norm_eps", 1e-5),
        ("id2label", {0: "a"}),
        ("layer_map", {}),
    ):
        assert reordered(name, value) == value


def test_a_layer_that_was_told_something_else_is_another_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The window of a layer may be longer than any probe: what modules were told is compared as well."""
    model = loaded("gemma3_text")
    monkeypatch.setattr(checkpoint, "_reordered", lambda name, value, depth, order: value)
    reason = obstacle(model, of("1 0 2:6"))
    assert reason is not None and reason.startswith("layer 0 would not be like layer 1: self_attn.")


def test_a_layer_may_know_its_number_but_flags_are_no_numbers() -> None:
    def layer(**told: Any) -> torch.nn.Module:
        module = torch.nn.Linear(1, 1)
        vars(module).update(told)
        return module

    assert checkpoint._unlike(layer(layer_idx=0, turns=True), 0, layer(layer_idx=1, turns=True), 1) is None
    assert checkpoint._unlike(layer(turns=False), 0, layer(turns=True), 1) == "turns is False and not True"
    assert checkpoint._unlike(layer(share=0.0), 0, layer(share=1.0), 1) == "share is 0.0 and not 1.0"
    assert checkpoint._unlike(layer(kind="a"), 0, layer(kind="a", more=2), 1) == "more is None and not 2"


def test_what_a_layer_made_of_its_place_is_seen(tmp_path: Path) -> None:
    model = adopt(families.build("gpt2", scale_attn_by_inverse_layer_idx=True), None, name="x")
    reason = obstacle(model, of(MOVED))
    assert reason == "layer 0 would not be like layer 5: attn.scaling is 0.25 and not 0.041666666666666664"
    write(model, of("0:4"), tmp_path / "x")


def test_a_place_that_only_the_code_knows_is_found_by_running(tmp_path: Path) -> None:
    """A table with columns for each layer has the right shape if there are as many, and the wrong columns."""
    model, recipe = loaded("gemma3n_text"), of("5 4 3 2 1 0")
    assert obstacle(model, recipe) is None
    with pytest.raises(UnsupportedModel) as error:
        write(model, recipe, tmp_path / "x")
    begin = (
        f"{recipe} cannot be a plain checkpoint of {type(model.model).__name__}: as one, its logits are off by up to "
    )
    assert str(error.value).startswith(begin)
    assert str(error.value).endswith("since layers know more of their place than the config says")
    assert nothing_in(tmp_path)


@functools.cache
def sighted() -> LoadedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    config = Gemma3Config(
        text_config=families.config("gemma3_text").to_dict(),
        vision_config={"num_hidden_layers": families.DEPTH, **sizes},
        mm_tokens_per_image=4,
        **dict.fromkeys(("image_token_index", "boi_token_index", "eoi_token_index"), families.VOCABULARY - 1),
    )
    torch.manual_seed(0)
    return adopt(AutoModelForImageTextToText.from_config(config).eval(), None, name="x")


def test_of_a_model_with_eyes_the_text_part_alone_changes(tmp_path: Path) -> None:
    folder = write(sighted(), of(MOVED), tmp_path / "x")
    made = AutoModelForImageTextToText.from_pretrained(folder).config
    assert (made.text_config.num_hidden_layers, made.vision_config.num_hidden_layers) == (5, families.DEPTH)
    own = sighted().model.config.text_config.layer_types
    assert made.text_config.layer_types == [own[i] for i in (5, 0, 3, 3, 1)] and len(set(own)) == 2


def test_weights_that_the_probe_does_not_touch_are_not_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The logits of a text say nothing of what only images pass through."""
    kind = type(sighted().model)
    save = kind.save_pretrained

    def forgetful(self: Any, folder: Path) -> None:
        save(self, folder, state_dict={k: v for k, v in self.state_dict().items() if "post_layernorm" not in k})

    monkeypatch.setattr(kind, "save_pretrained", forgetful)
    with pytest.raises(UnsupportedModel) as error:
        write(sighted(), of("0:2"), tmp_path / "x")
    assert "post_layernorm.bias in what it saved of Gemma3ForConditionalGeneration" in str(error.value)
    assert str(error.value).startswith("transformers does not find ") and nothing_in(tmp_path)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0 {1,2} 3", "it runs layers in parallel, and a plain checkpoint has one after the other"),
        ("0 {1 2,3}x2", "it runs layers in parallel, and a plain checkpoint has one after the other"),
        ("0 1.attn 2:4", "it runs halves of layers, and a plain checkpoint has whole ones"),
        ("0 (1 2)x3 3", None),
        ("3:0", None),
    ],
)
def test_what_a_plain_checkpoint_cannot_be(text: str, reason: str | None, tmp_path: Path) -> None:
    recipe = of(text, layers=4)
    assert plain(recipe) == obstacle(tiny(), recipe) == reason
    if reason is not None:
        with pytest.raises(UsageError) as error:
            write(tiny(), recipe, tmp_path / "x")
        assert str(error.value) == f"{recipe} cannot be a plain checkpoint: {reason}"
        assert nothing_in(tmp_path)


def test_folders_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = of("0:2", layers=4)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for folder in (full, tmp_path / "file"):
        with pytest.raises(UsageError) as error:
            write(tiny(), recipe, folder)
        assert str(error.value) == f"there is something in {folder} already: a checkpoint needs a folder of its own"
    with pytest.raises(StoreError, match="cannot write .*deeper"):
        write(tiny(), recipe, tmp_path / "file" / "deeper")
    with pytest.raises(NotationError):
        write(tiny(), Recipe.of("m", "0:9"), tmp_path / "x")
    usage = type(shutil.disk_usage(tmp_path))(1000, 900, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match="needs 0 MB, and 0 MB are free: give another folder"):
        write(tiny(), recipe, tmp_path / "x")
    assert (full / "mine").read_text() == "x" and not (tmp_path / "x").exists()


def test_folders_that_are_there_are_filled_where_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    before = real.stat().st_ino
    assert write(tiny(), of("0:2", layers=4), link) == link and link.is_symlink()
    assert AutoModelForCausalLM.from_pretrained(real).config.num_hidden_layers == 2
    assert real.stat().st_ino == before and not any(path.name.startswith(".") for path in real.iterdir())
    link.unlink()
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="cannot write .*link: File exists"):
        write(tiny(), of("0:2", layers=4), link)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(tiny(), of("0:2", layers=4), ".")
    assert Path("config.json").is_file()


def test_a_write_that_is_interrupted_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_verify", interrupted)
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        with pytest.raises(KeyboardInterrupt):
            write(tiny(), of("0:2", EDIT, layers=4), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"] and nothing_in(tmp_path / "empty")


def test_weights_that_are_no_plain_numbers_are_refused(tmp_path: Path) -> None:
    recipe = of("0:2", layers=4)
    name = "model.layers.3.mlp.up_proj.weight"
    for tensor, text in (
        (
            torch.empty(64, 32, device="meta"),
            "is not in memory (its weights are offloaded): load the model on one device",
        ),
        (torch.zeros(64, 32, dtype=torch.float8_e4m3fn), "is stored packed or quantised: load the model unquantised"),
    ):
        model = tiny_model()
        im.anatomy.anatomy(model)
        model.model.layers[3].mlp.up_proj.weight = torch.nn.Parameter(tensor, requires_grad=False)
        held = LoadedModel("x", model, None, tiny().setting, 4, "here")
        assert obstacle(held, recipe) == f"{name} {text}"
    model = tiny_model()
    model.config.quantization_config = {"bits": 4}
    held = LoadedModel("x", model, None, tiny().setting, 4, "here")
    assert obstacle(held, recipe) == "LlamaForCausalLM is quantised: load the model unquantised"


def test_a_failed_write_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tiny().model), "save_pretrained", failing)
    before = {name: value.clone() for name, value in tiny().model.state_dict().items()}
    with pytest.raises(StoreError) as error:
        write(tiny(), of("0:2", EDIT, layers=4), tmp_path / "x")
    assert str(error.value) == f"cannot write {tmp_path / 'x'}: No space left on device"
    assert nothing_in(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in tiny().model.state_dict().items())

"""Laws of models.py, on tiny models made on the spot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from impasto import fetch, models
from impasto.errors import FetchError, OutOfMemory, UnknownModel, UnsupportedModel, UsageError
from tiny import SPECIAL, tiny_folder, tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPASTO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def write_gguf(file: Path, model: Any, *, quantised: bool = True) -> Path:
    """`model` (a tiny one with the tiny tokenizer) as a GGUF file with 8-bit blocks."""
    import gguf
    from gguf.quants import quantize

    config = model.config
    tokens = tiny_tokenizer().convert_ids_to_tokens(range(config.vocab_size))
    tokens[-1] = "zz"  # the format wants at least one merge
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(["z z"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        stem, ending = name.rsplit(".", 1)
        data = tensor.float()
        for part, count in heads.items():
            if part in name:  # the file format keeps the halves of the rotary pairs interleaved
                data = data.view(count, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        array, target = data.numpy(), f"{names.get_name(stem)}.{ending}"
        if quantised and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(target, quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def test_a_folder_loads_as_it_was_saved(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    loaded = models.load(folder, device="cpu")
    assert (loaded.name, loaded.layers, loaded.window) == (str(folder), 4, 256)
    assert (loaded.setting.dtype, loaded.setting.device, loaded.setting.attention) == ("float32", "cpu", "sdpa")
    assert not loaded.model.training
    assert loaded.tokenizer.encode("ab") == tiny_tokenizer().encode("ab")
    tokens = torch.arange(3, 20)[None]
    assert torch.equal(logits(loaded.model, tokens), logits(tiny_model(), tokens))


def test_the_window_is_the_harness_models() -> None:
    from lm_eval.models.huggingface import HFLM

    for options in ({}, {"max_position_embeddings": 77}):
        loaded = models.adopt(tiny_model(**options), tiny_tokenizer())
        assert loaded.window == HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer).max_length


@pytest.mark.parametrize(("name", "expected"), [("bf16", "bfloat16"), ("float16", "float16"), ("auto", "float32")])
def test_dtype(tmp_path: Path, name: str, expected: str) -> None:
    loaded = models.load(tiny_folder(tmp_path / "model", layers=1), dtype=name, device="cpu")
    assert loaded.setting.dtype == expected
    assert {str(tensor.dtype) for tensor in loaded.model.parameters()} == {f"torch.{expected}"}


def test_half_precision_runs_in_it_only_where_the_cpu_is_fast_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda fast=fast: fast, raising=False)
        assert models._cpu_dtype(torch.bfloat16) is expected
        assert models._cpu_dtype(torch.float16) is expected
        assert models._cpu_dtype(torch.float32) is torch.float32


def test_weights_hash_tells_weights_and_configuration_apart_but_not_names(tmp_path: Path) -> None:
    def weights(folder: Path) -> str:
        return models.load(folder, device="cpu").setting.weights

    one = weights(tiny_folder(tmp_path / "one", layers=1))
    assert weights(tiny_folder(tmp_path / "same", layers=1)) == one
    assert weights(tiny_folder(tmp_path / "other", layers=1, seed=1)) != one
    changed = tiny_folder(tmp_path / "changed", layers=1)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert weights(changed) != one


def test_a_file_is_hashed_again_only_when_it_changed(tmp_path: Path) -> None:
    file, seen = tmp_path / "file", list[str]()
    file.write_bytes(b"one")
    first = models._file_hash(file, lambda what, done, total: seen.append(what))
    assert models._file_hash(file, lambda what, done, total: seen.append(what)) == first
    assert seen == ["hashing file"]
    file.write_bytes(b"three")
    assert models._file_hash(file, None) == fetch.file_sha256(file) != first


def test_adopting_hashes_the_tensors() -> None:
    assert models.adopt(tiny_model()).setting == models.adopt(tiny_model()).setting
    assert models.adopt(tiny_model()).setting.weights != models.adopt(tiny_model(seed=1)).setting.weights


def test_gguf_becomes_safetensors_once(tmp_path: Path) -> None:
    model = tiny_model(layers=2)
    file = write_gguf(tmp_path / "tiny.gguf", model)
    loaded = models.load(file, device="cpu", dtype="float32")
    assert (loaded.layers, loaded.source) == (2, "GGUF file tiny.gguf")
    assert loaded.setting.weights == fetch.file_sha256(file)
    assert loaded.tokenizer.encode("hi", add_special_tokens=False) == tiny_tokenizer(bos=False).encode("hi")
    for name, tensor in loaded.model.state_dict().items():  # half a step of 8 bits, and a half-precision scale
        expected = model.state_dict()[name]
        assert (tensor - expected).abs().max() <= expected.abs().max() * (1 / 254 + 2**-11)
    (folder,) = (path for path in (tmp_path / "cache" / "dequantised").iterdir() if path.is_dir())
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    moved = tmp_path / "elsewhere" / "other.gguf"
    moved.parent.mkdir()
    shutil.copy(file, moved)
    again = models.load(moved, device="cpu", dtype="float32")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert again.setting.fingerprint == loaded.setting.fingerprint
    tokens = torch.arange(3, 20)[None]
    assert torch.equal(logits(again.model, tokens), logits(loaded.model, tokens))


def test_a_folder_with_one_gguf_is_that_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "only.gguf", tiny_model(layers=1))
    assert models._find(str(tmp_path), None, None) == tmp_path / "only.gguf"


def test_a_half_written_conversion_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model(layers=1))
    real = models._dequantise

    def killed(source: Path, folder: Path) -> None:
        real(source, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_dequantise", killed)
    with pytest.raises(KeyboardInterrupt):
        models.load(file, device="cpu")
    assert not any(path.is_dir() for path in (tmp_path / "cache" / "dequantised").iterdir())
    monkeypatch.setattr(models, "_dequantise", real)
    assert models.load(file, device="cpu").layers == 1


def test_the_demo_model_is_the_fetched_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "fetched.gguf", tiny_model(layers=1))
    monkeypatch.setattr(fetch, "ensure", lambda name, progress=None, notice=None: tmp_path)
    loaded = models.load("demo", device="cpu")
    assert (loaded.name, loaded.source) == ("demo", "GGUF file fetched.gguf")


@pytest.mark.parametrize(
    ("family", "expected"),
    [("bert", "BertForMaskedLM"), ("gpt2", "GPT2LMHeadModel"), ("vit", "ViTForImageClassification")],
)
def test_the_saved_architecture_is_built(tmp_path: Path, family: str, expected: str) -> None:
    import transformers

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    if family == "gpt2":
        small = {"n_embd": 16, "n_layer": 2, "n_head": 2}
    config = transformers.AutoConfig.for_model(family, **small)
    getattr(transformers, expected)(config).save_pretrained(tmp_path / "model")
    loaded = models.load(tmp_path / "model", device="cpu")
    assert (type(loaded.model).__name__, loaded.layers, loaded.tokenizer) == (expected, 2, None)


def test_a_bare_encoder_stays_bare(tmp_path: Path) -> None:
    import transformers

    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "model")
    assert type(models.load(tmp_path / "model", device="cpu").model).__name__ == "BertModel"


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", layers=1)
    torch.save(tiny_model(layers=1).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match="has no safetensors weights; pickled ones are never read"):
        models.load(folder, device="cpu")


def test_names_that_mean_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("text")
    for ref, text in (
        (tmp_path / "empty", "has neither config.json nor a .gguf file"),
        (tmp_path / "file.txt", "is a file but not a GGUF: give a .gguf file or the folder of a safetensors model"),
        (tmp_path / "nothing.gguf", "no such file or folder, and not a hub id; `demo` always works"),
        ("what is this?", "no such file or folder, and not a hub id; `demo` always works"),
    ):
        with pytest.raises(UnknownModel, match=text):
            models.load(ref, device="cpu")


def test_no_hub_says_what_to_do() -> None:
    with pytest.raises(FetchError) as problem:
        models.load("nobody/nothing-of-that-name", device="cpu")
    assert str(problem.value) == (
        "cannot reach the hub for 'nobody/nothing-of-that-name', and it is not in the hub's cache here: "
        "give a local folder, a .gguf file or `demo`"
    )


def test_bad_dtype_and_device(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", layers=1)
    with pytest.raises(UsageError, match=r"^unknown dtype 'int3': one of auto, float32, bfloat16, float16$"):
        models.load(folder, dtype="int3")
    with pytest.raises(UsageError, match=r"^no device 'toaster': one of auto, cpu, cuda, cuda:1, mps$"):
        models.load(folder, device="toaster")
    with pytest.raises(UsageError, match=r"^no device 'cuda:99': torch sees \d+ CUDA devices here$"):
        models.load(folder, device="cuda:99")


def test_too_little_memory_is_seen_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "model", layers=1)
    monkeypatch.setattr(models, "_free_memory", lambda device: 100)
    with pytest.raises(OutOfMemory, match=r"needs 0 MB for its weights in float32 and cpu has 0 MB free: try"):
        models.load(folder, device="cpu")


def test_loading_is_silent_and_leaves_logging_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    models.load(write_gguf(tmp_path / "tiny.gguf", tiny_model(layers=1)), device="cpu")
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)


class Speller:
    """A tokenizer that gives back all it reads, letter by letter, though it knows words, as transformers 5.17 makes one."""

    def __len__(self) -> int:
        return 262_144

    def encode(self, text: str, **options: object) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int], **options: object) -> str:
        return "".join(map(chr, ids))


class Lossy(Speller):
    """One that also drops capitals."""

    def encode(self, text: str, **options: object) -> list[int]:
        return [ord(c) for c in text if not c.isupper()][:15]


@pytest.mark.parametrize(("broken", "how"), [(Lossy(), "as ' uick"), (Speller(), "in 22 pieces")])
def test_a_tokenizer_that_loses_text_or_spells_it_is_refused(broken: Speller, how: str) -> None:
    with pytest.raises(
        UnsupportedModel, match=rf"transformers .* makes a broken tokenizer of x\.gguf .* {how}.* upgrade"
    ):
        models._check_round_trip(broken, "x.gguf")
    models._check_round_trip(tiny_tokenizer(), "x.gguf")


def test_a_broken_tokenizer_that_was_kept_is_refused_and_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMPASTO_CACHE", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model(layers=1))
    models.load(file, device="cpu")
    [kept] = [path for path in (tmp_path / "cache" / "dequantised").iterdir() if path.is_dir()]
    with monkeypatch.context() as patch:
        patch.setattr(models, "_tokenizer", lambda *_, **__: Speller())
        with pytest.raises(UnsupportedModel, match="makes a broken tokenizer of tiny.gguf"):
            models.load(file, device="cpu")
    assert not kept.exists()
    assert models.load(file, device="cpu").tokenizer is not None and kept.exists()

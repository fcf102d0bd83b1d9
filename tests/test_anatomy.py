"""What is found in a loaded model, and what is refused, by structure."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from families import DECODERS, DEPTH, FAMILIES, SIZES, VISION, build, inputs, shared
from impasto.anatomy import Heads, Matrix, anatomy, heads
from impasto.errors import UnsupportedModel
from impasto.runtime import scheduled

torch.set_num_threads(1)

TWO = ["sliding_attention", "full_attention"] * (DEPTH // 2)
SMALL: dict[str, Any] = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
VISION_TOWER: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": DEPTH, "num_attention_heads": 4,
                                "intermediate_size": 64, "image_size": 32, "patch_size": 8}  # fmt: skip


def make(family: str, auto: Any = hf.AutoModelForCausalLM, **changes: Any) -> Any:
    return auto.from_config(CONFIG_MAPPING[family](**changes)).eval()


def t5(kind: Any) -> Any:
    return kind(hf.T5Config(vocab_size=200, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4)).eval()


STATE = "carries a state of its own from token to token ({}); a slot per call is defined for keys and values only"
RECURRENT = (
    "carries a recurrent state from token to token in layers {}; a slot per call is defined for keys and values only"
)
SILENT = (
    "write no keys and values of their own: they read those of another layer, or keep a state of another form, so they "
    "cannot run in any order"
)

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "two stacks": (
        lambda: t5(hf.T5ForConditionalGeneration),
        "T5ForConditionalGeneration has two stacks of layers (an encoder and a decoder); a schedule describes one",
    ),
    "a bias that only layer 0 has": (
        lambda: t5(hf.T5EncoderModel),
        "T5EncoderModel hands more than the hidden state from layer to layer, so its layers cannot run in another order",
    ),
    "a state of its own": (
        lambda: make("mamba", vocab_size=200, hidden_size=64, num_hidden_layers=4),
        "MambaForCausalLM " + STATE.format("cache_params"),
    ),
    "a state under another name": (
        lambda: make("rwkv", vocab_size=200, hidden_size=64, num_hidden_layers=4, attention_hidden_size=64),
        "RwkvForCausalLM " + STATE.format("state"),
    ),
    "memories": (
        lambda: make("xlnet", vocab_size=200, d_model=64, n_layer=4, n_head=4, d_inner=64),
        "XLNetLMHeadModel " + STATE.format("mems"),
    ),
    "recurrent layers among others": (
        lambda: build("jamba", attn_layer_period=2, attn_layer_offset=1),
        "JambaForCausalLM " + RECURRENT.format([0, 2, 4]),
    ),
    "a linear attention's state": (
        lambda: build("qwen3_next", linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
                      linear_value_head_dim=16, shared_expert_intermediate_size=32),
        "Qwen3NextForCausalLM " + RECURRENT.format([0, 1, 2, 4, 5]),
    ),
    "a state beside the attention in every layer": (
        lambda: build("falcon_h1", mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16, mamba_d_ssm=128),
        "FalconH1ForCausalLM " + RECURRENT.format(list(range(DEPTH))),
    ),
    "a cache of another kind": (lambda: build("minimax"), f"layers [1, 3, 5] of MiniMaxForCausalLM {SILENT}"),
    "states inside the layers": (
        lambda: build("recurrent_gemma", lru_width=64, attention_window_size=8),
        f"layers [0, 1, 3, 4] of RecurrentGemmaForCausalLM {SILENT}",
    ),
    "shared keys and values": (
        lambda: build("gemma4_text", num_kv_shared_layers=2, layer_types=TWO),
        f"layers [4, 5] of Gemma4ForCausalLM {SILENT}",
    ),
    "shared keys and values, another family": (
        lambda: build("gemma3n_text", num_kv_shared_layers=2),
        f"layers [4, 5] of Gemma3nForCausalLM {SILENT}",
    ),
    "one block at all depths": (
        lambda: make("albert", hf.AutoModelForMaskedLM, **SMALL, embedding_size=32, intermediate_size=64),
        "AlbertForMaskedLM has no list of 4 layers: its blocks may be shared between depths or held in another form",
    ),
    "work between layers": (
        lambda: build("deberta-v2", conv_kernel_size=3, conv_act="gelu"),
        "DebertaV2ForMaskedLM changes the hidden state between layers 0 and 1, outside of any layer; a schedule would "
        "lose that change",
    ),
    "no config": (
        lambda: nn.Sequential(nn.Linear(3, 3)),
        "Sequential has no config: impasto schedules Hugging Face models",
    ),
    "sound": (
        lambda: make("wav2vec2", hf.AutoModelForCTC, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                     intermediate_size=64, vocab_size=40),
        "Wav2Vec2ForCTC takes 'input_values'; impasto can probe token ids and pixels only",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_a_schedule_cannot_express_is_refused(what: str) -> None:
    try:
        model = REFUSED[what][0]()
    except (KeyError, ImportError) as missing:
        pytest.skip(f"this transformers does not have it: {missing}")
    modes = [type(m) for m in model.modules()]
    with pytest.raises(UnsupportedModel, match=f"^{re.escape(REFUSED[what][1])}$"):
        anatomy(model)
    assert [type(m) for m in model.modules()] == modes


def loops(change: Callable[[Any], None]) -> Any:
    model = build("llama")
    change(model)
    return model


def test_one_block_that_stands_at_several_depths() -> None:
    def tie(model: Any) -> None:
        model.model.layers[3] = model.model.layers[2]

    message = "LlamaForCausalLM uses one and the same block at several depths; such layers have no number"
    with pytest.raises(UnsupportedModel, match=f"^{message}$"):
        anatomy(loops(tie))


def test_layers_out_of_order_or_left_out_by_the_model_itself() -> None:
    class Backwards(nn.ModuleList):
        def __getitem__(self, index: Any) -> Any:
            found = super().__getitem__(index)
            return list(self)[::-1][index] if isinstance(index, slice) else found

    def flip(model: Any) -> None:
        model.model.layers = Backwards(model.model.layers)

    with pytest.raises(
        UnsupportedModel, match=r"does not call each of its 6 layers once and in order \(called: \[5, 4"
    ):
        anatomy(loops(flip))


def test_a_model_that_cannot_run_on_the_probe() -> None:
    def break_it(model: Any) -> None:
        model.model.layers[4].mlp.down_proj = nn.Linear(3, 3)

    with pytest.raises(
        UnsupportedModel, match="^LlamaForCausalLM does not run on a few input_ids alone: RuntimeError: "
    ):
        anatomy(loops(break_it))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_found(family: str) -> None:
    model = shared(family)
    body = anatomy(model)
    assert body is anatomy(model)
    assert body.depth == DEPTH
    assert tuple(model.get_submodule(body.path)) == body.layers
    assert body.cached is (family in DECODERS)
    assert body.stateful is (family == "lfm2")
    assert (model.main_input_name == "pixel_values") is (family in VISION)
    for layer in range(DEPTH):
        matrices = body.matrices(layer)
        assert len({m.name for m in matrices}) == len(matrices) >= 4
        for matrix in matrices:
            owner, _, last = matrix.name.rpartition(".")
            weight = (
                getattr(body.layers[layer].get_submodule(matrix.name), "weight", None)
                if _is_module(body.layers[layer], matrix.name)
                else getattr(body.layers[layer].get_submodule(owner), last)
            )
            assert tuple(weight.shape) == matrix.shape
        assert sum(m.parameters for m in matrices) <= body.parameters(layer)


def _is_module(block: nn.Module, name: str) -> bool:
    return name in dict(block.named_modules())


def test_matrix_counts_its_numbers() -> None:
    assert Matrix("experts.down_proj", (4, 3, 2)).parameters == 24


def test_the_anatomy_is_found_anew_when_the_layers_change() -> None:
    model = build("llama")
    first = anatomy(model)
    model.model.layers = nn.ModuleList(list(model.model.layers)[:4])
    model.config.num_hidden_layers = 4
    assert anatomy(model).depth == 4
    model.model.layers[1] = build("llama").model.layers[1]
    assert anatomy(model).layers[1] is model.model.layers[1] is not first.layers[1]


def test_looking_leaves_the_model_alone_and_keeps_none_alive() -> None:
    model = build("gpt2").train()
    modes = [(type(m), m.training, list(vars(m))) for m in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    anatomy(model)
    assert torch.equal(torch.rand(1), expected)
    assert [(type(m), m.training, list(vars(m))) for m in model.modules()] == modes
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


TEXT: dict[str, Any] = {k: SIZES[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                              "num_key_value_heads", "intermediate_size", "pad_token_id")}  # fmt: skip
MANY = {
    "gemma3": lambda: hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=TEXT | {"head_dim": 16, "sliding_window": 8}, vision_config=VISION_TOWER,
                        mm_tokens_per_image=4, image_token_index=199, boi_token_index=197, eoi_token_index=198)),
    "llava": lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(text_config=TEXT | {"model_type": "llama"}, image_token_index=199,
                       vision_config=VISION_TOWER | {"model_type": "clip_vision_model"})),
}  # fmt: skip


@pytest.mark.parametrize("name", list(MANY))
def test_a_text_model_with_a_vision_tower_as_deep(name: str) -> None:
    torch.manual_seed(0)
    model = MANY[name]().eval()
    ids = inputs("llama")["input_ids"].clamp(max=190)
    assert anatomy(model).path == "model.language_model.layers"
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with scheduled(model, "0:6"):
            assert torch.equal(model(input_ids=ids).logits, expected)
        with scheduled(model, "0 {1 2, 3} 3x2 5"):
            full = model(input_ids=ids, use_cache=False).logits
            assert not torch.equal(full, expected)
            out = model(input_ids=ids[:, :20], use_cache=True)
            rest = model(input_ids=ids[:, 20:], past_key_values=out.past_key_values).logits
            assert (torch.cat([out.logits, rest], 1) - full).abs().max() < 1e-4
            new = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        assert new.shape[1] == 27


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 896}, (14, 2, 64)),
        ({"num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 640, "head_dim": 256}, (4, 1, 256)),
        ({"num_attention_heads": 12, "hidden_size": 768}, (12, 12, 64)),
        ({"num_attention_heads": [4, 8], "hidden_size": 64}, "number of heads"),
        ({"hidden_size": 64}, "number of heads"),
        ({"num_attention_heads": 4}, "width of heads"),
    ],
)
def test_heads_by_the_config(config: dict[str, Any], found: tuple[int, int, int] | str) -> None:
    model = torch.nn.Linear(2, 2)
    model.config = SimpleNamespace(**config)  # type: ignore[assignment]
    if isinstance(found, str):
        with pytest.raises(UnsupportedModel, match=f"the config of Linear has no one {found} for all layers"):
            heads(model)
    else:
        assert heads(model) == Heads(*found)

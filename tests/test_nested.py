"""A layer with one matrix at several ranks: the same as with each edit alone, and what they share is run once."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import impasto.nested as nested
from families import DECODERS, build, shared
from impasto.anatomy import anatomy, quietly
from impasto.edit import Edit
from impasto.forest import grow, lay_out
from impasto.levels import Level, call_layer, prepare
from impasto.matrices import sites
from impasto.nested import Nested
from impasto.surgery import edited

torch.set_num_threads(1)
LAYER = 2
RULES = ("0.5", "r1", "0", "0.9", "r5", "1", "0.5")  # neither rising nor distinct
THOROUGHLY = ("llama", "falcon", "llama4_text", "gpt2")  # the second and third change tensors in place


def some_levels(model: Any, count: int = 2) -> tuple[Level, ...]:
    """Token sequences, most of which begin alike, so that there are two levels; or one."""
    rows = [(3, 4, 5, 6, 7, 8, 9, 10, *tail) for tail in ((11,), (12, 13, 14), (15, 16))] + [(20, 21), (30,)]
    body = anatomy(model)
    trees = grow(rows, share=count == 2 and not body.stateful)
    with quietly(model):
        return prepare(model, body, lay_out(trees), torch.device("cpu"))


def alone(model: Any, levels: tuple[Level, ...], texts: list[str]) -> list[list[Tensor]]:
    """The oracle: each edit by itself."""
    found = []
    with torch.no_grad():
        for text in texts:
            with edited(model, [text]):
                found.append(call_layer(anatomy(model), LAYER, levels, [level.hidden for level in levels]))
    return found


def together(model: Any, levels: tuple[Level, ...], texts: list[str], **options: Any) -> list[list[Tensor]] | None:
    one = Nested(model, anatomy(model), **options)
    with torch.no_grad():
        return one.call(LAYER, list(map(Edit.parse, texts)), levels, [level.hidden for level in levels])


def assert_close(found: list[list[Tensor]] | None, expected: list[list[Tensor]], tolerance: float = 1e-4) -> None:
    assert found is not None and len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for state, wanted in zip(one, other, strict=True):
            assert (state - wanted).abs().max() <= tolerance * max(1, float(wanted.abs().max()))


@pytest.mark.parametrize("family", DECODERS)
def test_any_matrix_of_any_family_at_several_ranks_is_as_with_each_edit_alone(family: str) -> None:
    model = shared(family)
    levels = some_levels(model)
    before = {name: (value, value.clone()) for name, value in model.state_dict().items()}
    attributes = [{k: id(v) for k, v in vars(m).items()} for m in model.modules()]
    block = anatomy(model).layers[LAYER]
    large = [site for site in sites(block, LAYER) if min(block.get_parameter(site.parameter).shape[-2:]) >= 5]
    alike = {site.parameter.rpartition(".experts.")[0]: site for site in large if site.expert is not None}
    plain = [site for site in large if site.expert is None]
    done = 0
    for site in [*(plain if family in THOROUGHLY else Random(family).sample(plain, 3)), *alike.values()]:
        texts = [f"{LAYER}.{site.name}@{rule}" for rule in RULES]
        found = together(model, levels, texts)
        assert (found is None) == (site.expert is not None), site
        if found is not None:
            assert_close(found, alone(model, levels, texts))
            done += 1
    assert done >= 3 or family in THOROUGHLY
    assert [{k: id(v) for k, v in vars(m).items()} for m in model.modules()] == attributes
    for name, value in model.state_dict().items():
        assert value.data_ptr() == before[name][0].data_ptr() and torch.equal(value, before[name][1])


def test_in_narrow_types_the_outputs_are_those_of_the_dense_matrices_bit_for_bit() -> None:
    for family in ("llama", "gpt2", "gemma3_text"):
        model = build(family, torch.bfloat16)
        levels = some_levels(model)
        for site in sites(anatomy(model).layers[LAYER], LAYER):
            texts = [f"{LAYER}.{site.name}@{rule}" for rule in RULES]
            found, expected = together(model, levels, texts), alone(model, levels, texts)
            assert found is not None
            for one, other in zip(found, expected, strict=True):
                assert all(map(torch.equal, one, other)), site


def runs(model: nn.Module, names: list[str], work: Any) -> list[int]:
    """How often some modules of the layer run while work is done."""
    block, counts = anatomy(model).layers[LAYER], dict.fromkeys(names, 0)

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            counts[name] += 1

        return hook

    handles = [block.get_submodule(name).register_forward_hook(count(name)) for name in names]
    try:
        work()
    finally:
        for handle in handles:
            handle.remove()
    return list(counts.values())


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [  # calls on one level for 5 ranks and the proof: norm, q, v, o, second norm, gate, down
        ("mlp.down_proj", [2, 2, 2, 2, 2, 2, 6]),
        ("mlp.gate_proj", [2, 2, 2, 2, 2, 6, 6]),
        ("mlp.up_proj", [2, 2, 2, 2, 2, 2, 6]),
        ("self_attn.o_proj", [2, 2, 2, 6, 6, 6, 6]),
        ("self_attn.k_proj", [2, 2, 2, 6, 6, 6, 6]),
    ],
)
def test_what_comes_before_the_matrix_or_beside_it_runs_once(matrix: str, expected: list[int]) -> None:
    model = build("llama", torch.bfloat16)
    levels = some_levels(model, 1)
    names = ["input_layernorm", "self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "post_attention_layernorm"]
    names += ["mlp.gate_proj", "mlp.down_proj"]
    texts = [f"{LAYER}.{matrix}@r{rank}" for rank in (1, 2, 3, 4, 5)]
    assert runs(model, names, lambda: together(model, levels, texts)) == expected
    one = Nested(model, anatomy(model))
    edits, states = list(map(Edit.parse, texts)), [level.hidden for level in levels]
    with torch.no_grad():
        one.call(LAYER, edits, levels, states)
        again = runs(model, names, lambda: one.call(LAYER, edits, levels, states))
    assert again == [count - 1 for count in expected]  # what is proved is proved


def test_the_inputs_are_projected_once_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, projected = shared("llama"), []
    real = nested.F.linear

    def linear(inputs: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        if len(weight) in (20, 64) and inputs.shape[-1] in (20, 128, 2, 8, 10):
            projected.append((inputs.shape[-1], len(weight)))
        return real(inputs, weight, *rest)

    monkeypatch.setattr(nested, "F", type("F", (), {"linear": staticmethod(linear)}))
    levels = some_levels(model, 1)
    assert together(model, levels, [f"{LAYER}.mlp.down_proj@r{rank}" for rank in (10, 2, 20)]) is not None
    assert projected == [(128, 20), (2, 64), (8, 64), (10, 64)]


def test_a_matrix_is_decomposed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = shared("llama"), []
    real = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: made.append(1) or real(*args, **kwargs))
    levels, texts = some_levels(model), [f"{LAYER}.mlp.down_proj@{rule}" for rule in RULES]
    one = Nested(model, anatomy(model), tmp_path)
    edits, states = list(map(Edit.parse, texts)), [level.hidden for level in levels]
    with torch.no_grad():
        first = one.call(LAYER, edits, levels, states)
        again = one.call(LAYER, edits, levels, states)
        other = Nested(model, anatomy(model), tmp_path).call(LAYER, edits, levels, states)
    assert made == [1]
    for found in (again, other):
        assert first is not None and found is not None
        assert all(torch.equal(a, b) for x, y in zip(first, found, strict=True) for a, b in zip(x, y, strict=True))


def test_components_that_are_not_used_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared("llama")
    monkeypatch.setattr(nested, "MEMORY", {"cpu": 1, "cuda": 1})
    one, levels = Nested(model, anatomy(model)), some_levels(model)
    with torch.no_grad():
        for matrix in ("mlp.down_proj", "mlp.up_proj"):
            edits = [Edit.parse(f"{LAYER}.{matrix}@{rule}") for rule in RULES]
            assert one.call(LAYER, edits, levels, [level.hidden for level in levels]) is not None
    assert list(one._components) == [anatomy(model).layers[LAYER].mlp.up_proj.weight]


def test_components_can_be_let_go() -> None:
    model = shared("llama")
    one, levels = Nested(model, anatomy(model)), some_levels(model)
    for matrix in ("mlp.down_proj", "mlp.up_proj"):
        with torch.no_grad():
            edits = [Edit.parse(f"{LAYER}.{matrix}@{rule}") for rule in RULES]
            assert one.call(LAYER, edits, levels, [level.hidden for level in levels]) is not None
        one.forget()
        assert not one._components


def test_hooks_on_the_matrix_are_heard_for_every_rank() -> None:
    model, heard = build("llama"), []
    owner = anatomy(model).layers[LAYER].mlp.down_proj
    handle = owner.register_forward_hook(lambda module, args, output: heard.append(1) or output + 1)
    levels, texts = some_levels(model, 1), [f"{LAYER}.mlp.down_proj@r{rank}" for rank in (1, 2, 3)]
    assert_close(together(model, levels, texts), alone(model, levels, texts))
    handle.remove()
    assert len(heard) == 3 + 1 + 3


def hasty(self: Any, hidden: Tensor) -> Tensor:
    """An MLP that changes in place what its parts return, and what it is given."""
    up = self.up_proj(hidden.mul_(1.5))
    return self.down_proj(up.mul_(self.act_fn(self.gate_proj(hidden)))).add_(0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_that_a_layer_changes_in_place_are_made_anew(dtype: torch.dtype) -> None:
    model = build("llama", dtype)
    mlp = anatomy(model).layers[LAYER].mlp
    mlp.__class__ = type("Hasty", (type(mlp),), {"forward": hasty})
    levels = some_levels(model)
    for matrix in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj"):
        texts = [f"{LAYER}.{matrix}@{rule}" for rule in RULES]
        assert_close(together(model, levels, texts), alone(model, levels, texts))


def test_a_layer_that_is_not_the_same_twice_is_found_out() -> None:
    model = build("llama")
    block, calls = anatomy(model).layers[LAYER], []

    def forward(hidden: Tensor) -> Tensor:
        calls.append(1)
        return hidden * len(calls)

    vars(block.post_attention_layernorm)["forward"] = forward
    levels = some_levels(model)
    texts = [f"{LAYER}.mlp.down_proj@r{rank}" for rank in (1, 2, 3)]
    assert together(model, levels, texts) is None


def test_in_inference_mode_too() -> None:
    for family in ("llama", "falcon"):
        model = shared(family)
        with torch.inference_mode():
            levels = some_levels(model)
            for site in sites(anatomy(model).layers[LAYER], LAYER):
                texts = [f"{LAYER}.{site.name}@{rule}" for rule in RULES]
                found = together(model, levels, texts)
                if found is not None:
                    assert_close(found, alone(model, levels, texts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits_worn_from_components_at_hand_are_those_of_surgery_bit_for_bit(dtype: torch.dtype) -> None:
    model = build("llama", dtype)
    one, block = Nested(model, anatomy(model)), anatomy(model).layers[LAYER]
    weights = {name: (p.data, p.data.clone()) for name, p in block.named_parameters()}
    for texts in (["mlp.down_proj@0.3"], ["mlp.up_proj@r9", "self_attn.q_proj@0"], ["mlp.up_proj@1"]):
        edits = [Edit.parse(f"{LAYER}.{text}") for text in texts]
        with edited(model, edits):
            expected = {name: p.data.clone() for name, p in block.named_parameters()}
        worn = one.wearing(LAYER, edits)
        assert worn is not None
        with worn:
            assert all(torch.equal(p.data, expected[name]) for name, p in block.named_parameters())
        for name, p in block.named_parameters():
            assert p.data.data_ptr() == weights[name][0].data_ptr() and torch.equal(p.data, weights[name][1])
    for texts in (["mlp.*@0.1"], ["mlp.up_proj@r65"], ["mlp.up_proj@0.5", "mlp.up*@0.2"], ["mlp.up_proj@prune0.1"]):
        assert one.wearing(LAYER, [Edit.parse(f"{LAYER}.{text}") for text in texts]) is None


def test_what_cannot_be_shared_is_left_to_others() -> None:
    model = build("llama")
    levels = some_levels(model)

    def nothing(*texts: str, of: Any = model) -> bool:
        return together(of, levels, list(texts)) is None

    assert nothing("2.mlp.down_proj@0.1")
    assert nothing("2.mlp.down_proj@0.1", "2.mlp.down_proj@tail0.1")
    assert nothing("2.mlp.down_proj@0.1", "2.mlp.down_proj@prune0.1")
    assert nothing("2.mlp.down_proj@r3", "2.mlp.down_proj@r65")  # `edited` says that there are 64
    assert nothing("2.mlp.*@0.1", "2.mlp.*@0.2")
    assert nothing("2.mlp.nothing@0.1", "2.mlp.nothing@0.2")
    assert not nothing("2.mlp.d*@0.1", "2.mlp.d*@0.2")
    model.model.layers[3].mlp.down_proj.weight = model.model.layers[2].mlp.down_proj.weight
    assert nothing("2.mlp.down_proj@0.1", "2.mlp.down_proj@0.2")
    with edited(model, ["2.mlp.up_proj@0.1"], form="factored"):
        assert nothing("2.mlp.up_proj@0.1", "2.mlp.up_proj@0.2")


def test_the_layer_is_as_before_after_an_error() -> None:
    model = build("llama", torch.bfloat16)
    block = anatomy(model).layers[LAYER]
    levels, weight = some_levels(model), block.mlp.up_proj.weight.data_ptr()
    handle = block.mlp.down_proj.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    kinds = [type(module) for module in block.modules()]
    with pytest.raises(KeyboardInterrupt):
        together(model, levels, ["2.mlp.up_proj@0.1", "2.mlp.up_proj@0.2"])
    assert block.mlp.up_proj.weight.data_ptr() == weight
    assert [type(module) for module in block.modules()] == kinds
    assert not block._forward_pre_hooks
    handle.remove()

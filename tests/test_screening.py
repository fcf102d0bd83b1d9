"""What is foretold of edits: against finite differences, for every rule, family and layout; and nothing is left behind."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import impasto.screening as screening
from families import build
from impasto.anatomy import anatomy
from impasto.calibration import calibrate
from impasto.edit import Edit
from impasto.errors import ImpastoError, NotationError, OutOfMemory, UnsupportedModel, UsageError
from impasto.matrices import matched
from impasto.models import LoadedModel
from impasto.result import Request, Setting
from impasto.scoring import Scorer
from impasto.screening import screen
from impasto.surgery import edited
from tiny import tiny_model, tiny_tokenizer

torch.set_num_threads(1)
REQUESTS = [
    Request("loglikelihood", "The river is", " long"),
    Request("loglikelihood", "The river is", " a grey one"),
    Request("loglikelihood", "The sea", " b"),
    Request("loglikelihood", "", "alone"),
    Request("rolling", "", "a text that is read from its start"),
]


def loaded(model: Any) -> Any:
    setting = Setting("tiny", "weights", "float32", "cpu")
    return LoadedModel("tiny", model, tiny_tokenizer(), setting, anatomy(model).depth, "made here")


def wide(family: str, dtype: torch.dtype = torch.float64) -> Any:
    layered = {"vocab_size_per_layer_input": 259} if family in ("gemma3n_text", "gemma4_text") else {}
    model = build(family, dtype, vocab_size=259, **layered)
    if family == "mixtral":  # in float64 there is no other way
        model.set_experts_implementation("eager")
    return model


def mean_loss(model: Any, requests: list[Request] = REQUESTS) -> float:
    """The oracle: one sequence at a time, all logits."""
    pieces = Scorer(model, tiny_tokenizer()).encoder.pieces(requests)
    spent, words = np.zeros(len(requests)), np.zeros(len(requests))
    with torch.no_grad():
        for piece in pieces:
            logits = model(torch.tensor([piece.tokens]), use_cache=False).logits[0, -len(piece.targets) :].double()
            spent[piece.request] -= logits.log_softmax(-1).gather(1, torch.tensor(piece.targets)[:, None]).sum().item()
            words[piece.request] += len(piece.targets)
    return float((spent / words).mean())


def slope(model: Any, text: str, requests: list[Request] = REQUESTS, **options: Any) -> float:
    """d loss / d t at t = 0 of W + t (W' - W) for all matrices of an edit, by central differences."""
    body, step = anatomy(model), 1e-2  # not smaller: models compute norms in float32
    edit = Edit.parse(text, body.depth)
    names = {body.layers[site.layer].get_parameter(site.parameter) for site in matched(model, body, edit)}
    before = {p: p.data.clone() for p in names}
    with edited(model, [edit], **options):
        change = {p: p.data - old for p, old in before.items()}
    losses = []
    for sign in (1, -1):
        for p, old in before.items():
            p.data.copy_(old + sign * step * change[p])
        losses.append(mean_loss(model, requests))
    for p, old in before.items():
        p.data.copy_(old)
    return (losses[0] - losses[1]) / (2 * step)


MLP = {
    "llama": ["4.mlp.down_proj", "1.mlp.gate_proj", "2.self_attn.v_proj"],
    "gpt2": ["4.mlp.c_proj", "1.attn.c_attn", "2.attn.c_attn.v", "3.attn.c_attn.*"],
    "gptj": ["4.mlp.fc_out", "1.attn.q_proj"],
    "gpt_neox": ["4.mlp.dense_4h_to_h", "2.attention.query_key_value.k"],
    "phi3": ["4.mlp.gate_up_proj", "2.self_attn.qkv_proj.q"],
    "gemma3_text": ["4.mlp.up_proj", "0.self_attn.o_proj"],
    "gemma3n_text": ["4.mlp.up_proj", "1.self_attn.o_proj"],
    "mixtral": ["4.mlp.experts.down_proj", "3.mlp.experts.gate_up_proj.2"],
    "lfm2": ["4.feed_forward.w2", "1.self_attn.v_proj"],
}


@pytest.mark.parametrize("family", MLP)
def test_changes_are_the_slopes_of_finite_differences(family: str, tmp_path: Path) -> None:
    """In float64: an edit's change is the derivative of the loss on the way from W to W'."""
    model = wide(family)
    edits = [f"{matrix}@{rule}" for matrix in MLP[family] for rule in ("0.5", "r1")]
    found = screen(loaded(model), REQUESTS, edits, folder=tmp_path, batch_tokens=60)
    assert [str(one.edit) for one in found] == edits
    expected = [slope(model, text) for text in edits]
    np.testing.assert_allclose([one.change for one in found], expected, rtol=2e-3, atol=3e-5)
    assert max(map(abs, expected)) > 1e-4


def test_every_rule_is_foretold(tmp_path: Path) -> None:
    model = wide("llama")
    rules = ("0.3", "r5", "0.001", "1", "tail0.25", "tail1", "prune0.4", "0", "mp", "mpl", "0.3w", "r5w")
    edits = [f"3.mlp.down_proj@{rule}" for rule in rules]
    calibration = calibrate(model, edits, [{"input_ids": torch.arange(3, 60)[None]}])
    options = {"folder": tmp_path, "calibration": calibration}
    found = screen(loaded(model), REQUESTS, edits, **options)
    expected = [slope(model, text, **options) for text in edits]
    np.testing.assert_allclose([one.change for one in found], expected, rtol=2e-3, atol=3e-5)
    ranks = []
    for text in edits:
        with edited(model, [text], **options) as report:
            ranks.append(report.touched[0].rank)
    assert [one.rank for one in found] == ranks
    assert ranks[:8] == [19, 5, 0, 64, 16, 64, None, 0]
    nothing = {text: one.change for text, one in zip(rules, found, strict=True)}
    assert nothing["1"] == nothing["tail1"] == 0
    # components are kept in float32, and what 64 of them change differs in sign
    assert nothing["0.001"] == pytest.approx(nothing["0"], rel=1e-4)
    assert nothing["r5"] != nothing["r5w"]


def test_an_edit_of_several_matrices_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    model = wide("llama", torch.float32)
    texts = ["2:4.mlp.*@0.5", *(f"{layer}.mlp.{name}@0.5" for layer in (2, 3) for name in ("gate_proj", "up_proj"))]
    texts += ["2.mlp.down_proj@0.5", "3.mlp.down_proj@0.5"]
    whole, *each = screen(loaded(model), REQUESTS, texts, folder=tmp_path)
    assert whole.change == pytest.approx(sum(one.change for one in each), abs=1e-6)
    assert whole.rank == sum(one.rank for one in each) == 6 * 32


def test_a_weight_that_two_layers_share_is_changed_once(tmp_path: Path) -> None:
    model = wide("llama")
    layers = anatomy(model).layers
    layers[4].mlp.down_proj.weight = layers[2].mlp.down_proj.weight
    both, one = screen(loaded(model), REQUESTS, ["2,4.mlp.down_proj@0.2", "4.mlp.down_proj@0.2"], folder=tmp_path)
    assert both.change == one.change == pytest.approx(slope(model, "4.mlp.down_proj@0.2"), rel=2e-3)
    assert both.rank == one.rank == 12


def test_small_edits_change_the_loss_as_foretold_and_curvature_does_not_spoil_it(tmp_path: Path) -> None:
    model = wide("llama")
    edits = [f"{layer}.mlp.down_proj@r{rank}" for layer in range(6) for rank in (61, 63)]
    plain = mean_loss(model)
    found = screen(loaded(model), REQUESTS, edits, folder=tmp_path, curvature=True)
    real = []
    for text in edits:
        with edited(model, [text]):
            real.append(mean_loss(model) - plain)
    np.testing.assert_allclose([one.change for one in found], real, atol=0.1 * np.abs(real).max())
    assert np.corrcoef([one.expected for one in found], real)[0, 1] > 0.9
    assert all(one.curvature is not None and one.curvature >= 0 for one in found)


@pytest.mark.parametrize("batch_tokens", [None, 30])
def test_curvature_is_half_the_mean_square_of_each_requests_change(batch_tokens: int | None, tmp_path: Path) -> None:
    """Exact where every batch is one request, as it is with few requests that begin differently."""
    model = wide("gpt2")
    edits = ["3.mlp.c_proj@0.5", "2.attn.c_attn.v@0", "1:3.mlp.*@0.9", "1.mlp.c_fc@prune0.5"]
    asked = [Request("loglikelihood", f"{start}{start} is", " one") for start in "abcdefgh"]
    alone = [[one.change for one in screen(loaded(model), [r], edits, folder=tmp_path)] for r in asked]
    found = screen(loaded(model), asked, edits, folder=tmp_path, curvature=True, batch_tokens=batch_tokens)
    np.testing.assert_allclose([one.change for one in found], np.mean(alone, 0), rtol=1e-5)
    np.testing.assert_allclose([one.curvature for one in found], np.mean(np.square(alone), 0) / 2, rtol=1e-4)
    plain = screen(loaded(model), asked, edits, folder=tmp_path)
    assert [one.curvature for one in plain] == [None] * 4
    assert [one.expected for one in plain] == [one.change for one in plain]
    assert [one.rank for one in plain] == [one.rank for one in found] == [32, 0, 4 * 57, None]


def test_batches_and_what_requests_share_make_no_difference(tmp_path: Path) -> None:
    model = wide("qwen3")
    edits = ["*.mlp.*@0.5", "0.self_attn.q_proj@0.1", "5.mlp.up_proj@r9"]
    rows = [
        [one.change for one in screen(loaded(model), REQUESTS, edits, folder=tmp_path, batch_tokens=tokens)]
        for tokens in (None, 1, 25, 10_000)
    ]
    np.testing.assert_allclose(rows, [rows[0]] * 4, rtol=1e-6)


def test_the_head_may_run_a_few_positions_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("gemma2", "llama"):  # the first caps its logits
        model = wide(family)
        expected = screen(loaded(model), REQUESTS, ["3.mlp.up_proj@0.5"], folder=tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(screening, "LOGITS", {"cpu": 600, "cuda": 600})
            found = screen(loaded(model), REQUESTS, ["3.mlp.up_proj@0.5"], folder=tmp_path)
        assert found[0].change == pytest.approx(expected[0].change, rel=1e-6)


def test_nothing_is_left_behind_also_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide("llama", torch.float32).train()
    parameters = dict(model.named_parameters())
    for i, parameter in enumerate(parameters.values()):
        parameter.requires_grad_(i % 3 != 0)
        parameter.grad = torch.full_like(parameter, 0.5) if i % 4 == 0 else None
    kept = {
        name: (id(p.grad), p.data_ptr(), p.requires_grad, copy.deepcopy(p.data), copy.deepcopy(p.grad))
        for name, p in parameters.items()
    }

    def unchanged() -> None:
        assert all(module.training for module in model.modules())
        assert torch.is_grad_enabled()
        for name, p in model.named_parameters():
            grad, address, flag, data, old = kept[name]
            assert (id(p.grad), p.data_ptr(), p.requires_grad) == (grad, address, flag), name
            assert torch.equal(p.data, data) and (old is None or torch.equal(p.grad, old)), name

    screen(loaded(model), REQUESTS, ["*.mlp.*@0.5"], folder=tmp_path)
    unchanged()
    monkeypatch.setattr(screening, "call_layer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        screen(loaded(model), REQUESTS, ["*.mlp.*@0.5"], folder=tmp_path)
    unchanged()


def test_no_gradient_is_made_where_none_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers below the lowest matrix leave no graph behind, and autograd is asked for the wanted weights alone."""
    model, graphs, asked = wide("llama", torch.float32), [], []
    real_call, real_grad = screening.call_layer, torch.autograd.grad

    def call(body: Any, layer: int, *rest: Any) -> Any:
        states = real_call(body, layer, *rest)
        graphs.append(states[0].requires_grad)
        return states

    def grad(outputs: Any, wanted: Any, *rest: Any, **options: Any) -> Any:
        asked.append(wanted)
        return real_grad(outputs, wanted, *rest, **options)

    monkeypatch.setattr(screening, "call_layer", call)
    monkeypatch.setattr(torch.autograd, "grad", grad)
    screen(loaded(model), REQUESTS[:3], ["3.mlp.down_proj@0.5"], folder=tmp_path, batch_tokens=1000)
    assert graphs == [False, False, False, True, True, True]
    assert asked[-1] == [model.model.layers[3].mlp.down_proj.weight]


def test_it_works_inside_of_no_grad_and_inference_mode(tmp_path: Path) -> None:
    model = wide("llama")
    expected = screen(loaded(model), REQUESTS, ["3.mlp.up_proj@0.5"], folder=tmp_path)
    with torch.no_grad():
        assert screen(loaded(model), REQUESTS, ["3.mlp.up_proj@0.5"], folder=tmp_path) == expected
    with torch.inference_mode():
        assert screen(loaded(model), REQUESTS, ["3.mlp.up_proj@0.5"], folder=tmp_path) == expected


def test_bfloat16_agrees_within_its_precision(tmp_path: Path) -> None:
    narrow = wide("llama", torch.bfloat16)
    same = copy.deepcopy(narrow).float()
    edits = [f"{layer}.mlp.*@0.5" for layer in range(6)]
    few, many = ([one.change for one in screen(loaded(m), REQUESTS, edits, folder=tmp_path)] for m in (narrow, same))
    np.testing.assert_allclose(few, many, atol=0.05 * np.abs(many).max())


def test_memory_that_runs_out_halves_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, edits = wide("llama"), ["3.mlp.up_proj@0.5", "1.mlp.down_proj@0.2"]
    expected = [one.change for one in screen(loaded(model), REQUESTS, edits, folder=tmp_path)]
    real, notes, shares = screening.call_layer, [], []

    def tight(body: Any, layer: int, levels: Any, states: Any) -> Any:
        if sum(state.shape[0] * state.shape[1] for state in states) > 45:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(body, layer, levels, states)

    monkeypatch.setattr(screening, "call_layer", tight)
    found = screen(
        loaded(model), REQUESTS, edits, folder=tmp_path, batch_tokens=400, note=notes.append, progress=shares.append
    )
    np.testing.assert_allclose([one.change for one in found], expected, rtol=1e-6)
    assert notes[0].startswith("out of memory: token budget of the backward pass halved to ")
    assert shares == sorted(shares) and shares[-1] == 1

    def never(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(screening, "call_layer", never)
    with pytest.raises(OutOfMemory, match="a backward pass over one sequence does not fit into the memory of cpu"):
        screen(loaded(model), REQUESTS, edits, folder=tmp_path)


def test_components_are_looked_up_where_they_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, edits = wide("llama", torch.float32), ["3.mlp.up_proj@0.5", "3.mlp.up_proj@0.1"]
    first = screen(loaded(model), REQUESTS, edits, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("decomposed again"))
    assert screen(loaded(model), REQUESTS, edits, folder=tmp_path) == first
    monkeypatch.setenv("IMPASTO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    for file in tmp_path.glob("*.safetensors"):
        (tmp_path / "cache" / "svd").mkdir(exist_ok=True)
        file.rename(tmp_path / "cache" / "svd" / file.name)
    assert screen(loaded(model), REQUESTS, edits) == first


def test_what_cannot_be_screened_is_said(tmp_path: Path) -> None:
    one = loaded(tiny_model())

    def attempt(*edits: Edit | str, requests: list[Request] = REQUESTS, of: Any = one) -> Any:
        return screen(of, requests, edits, folder=tmp_path)

    assert attempt() == []
    with pytest.raises(UsageError, match="screening needs at least one request: the right answers of a task"):
        attempt("3.mlp.up_proj@0.5", requests=[])
    with pytest.raises(UsageError, match="not requests that are answered with text"):
        attempt("3.mlp.up_proj@0.5", requests=[Request("generate", "a")])
    with pytest.raises(UsageError, match="3.mlp.nothing@0.5 matches no matrix of layer 3"):
        attempt("3.mlp.nothing@0.5")
    with pytest.raises(NotationError, match="layer"):
        attempt("9.mlp.up_proj@0.5")
    with pytest.raises(NotationError, match="layer"):
        attempt(replace(Edit.parse("3.mlp.up_proj@0.5"), layers=(4,)))
    with pytest.raises(UsageError, match=r"the rule 0.5w needs the matrix's inputs: make them with"):
        attempt("3.mlp.up_proj@0.5w")
    with pytest.raises(UnsupportedModel, match="^tiny was loaded as BertModel, which has no head that predicts tokens"):
        attempt("3.intermediate.dense@0.5", of=loaded(build("bert").bert))
    broken = tiny_model()
    with torch.no_grad():
        broken.model.layers[2].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(ImpastoError, match="the gradient of mlp.up_proj of layer 3 is not finite"):
        attempt("3.mlp.up_proj@0.5", of=loaded(broken))


@pytest.mark.parametrize("rule", ["r0", "r0w", "r33", "r999", "r33w"])
def test_ranks_that_cannot_be_are_refused_as_by_the_edit_itself(rule: str, tmp_path: Path) -> None:
    model, text = tiny_model(), f"1:3.mlp.up_proj@{rule}"  # 64 x 32
    calibration = calibrate(model, ["1:3.mlp.up_proj@1w"], [{"input_ids": torch.arange(3, 60)[None]}])
    said = []
    for attempt in (
        lambda: edited(model, [text], calibration=calibration).__enter__(),
        lambda: screen(loaded(model), REQUESTS, [text], calibration=calibration, folder=tmp_path),
    ):
        with pytest.raises(ImpastoError) as problem:
            attempt()
        said.append((type(problem.value), str(problem.value)))
    assert said[0] == said[1]
    assert "rank 0 is spelled @0" in said[0][1] or "; @1 keeps all of them" in said[0][1]


def test_a_rank_that_only_some_matrices_have_is_all_that_the_others_have(tmp_path: Path) -> None:
    model, text = build("llama", torch.float64, vocab_size=259, num_key_value_heads=2), "2.self_attn.*@r50"
    (found,) = screen(loaded(model), REQUESTS, [text], folder=tmp_path)
    with edited(model, [text]) as report:
        assert found.rank == sum(one.rank or 0 for one in report.touched) == 50 + 32 + 32 + 50

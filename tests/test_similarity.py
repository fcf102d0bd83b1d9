"""Similarity of states: the streaming measures against plain ones that keep everything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families import build, inputs
from impasto.anatomy import anatomy
from impasto.errors import UsageError
from impasto.runtime import Event, scheduled
from impasto.similarity import MEASURES, Similarity, _hsic, _normalised, _per_token, groups, padded, similarity

SCHEDULE = "0 1 {2, 3 4}x2 5 5"
STATES = ("embeddings", "0", "1", "{2, 3 4}", "{2, 3 4}", "5", "5")
TEXTS = [
    [int(t) for t in torch.randint(3, 200, (n,), generator=torch.Generator().manual_seed(n))]
    for n in (12, 3, 9, 7, 20, 5, 9, 1)
]


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


def outer(schedule: str = SCHEDULE) -> list[int]:
    """The events that end a step of the whole schedule, found by hand."""
    return {SCHEDULE: [0, 1, 2, 6, 10, 11, 12], "0:6": list(range(7))}[schedule]


def kept(model: Any, schedule: str, batch: dict[str, torch.Tensor], masked: bool) -> torch.Tensor:
    """All states of a batch, kept: (states, texts, positions, width), float64."""
    states: list[torch.Tensor] = []

    def keep(event: Event) -> None:
        states.append(event.hidden.double())

    given = {k: v for k, v in batch.items() if masked or k != "attention_mask"}
    with scheduled(model, schedule, probe=keep), torch.no_grad():
        model(**given)
    return torch.stack([states[i] for i in outer(schedule)])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def plain_hsic(x: torch.Tensor, y: torch.Tensor) -> float:
    """The estimator as it is written down, for tokens x width matrices."""
    n = len(x)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    k, l = k - torch.diag(k.diag()), l - torch.diag(l.diag())  # noqa: E741
    one = torch.ones(n, dtype=x.dtype)
    value = (
        torch.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    )
    return float(value / (n * (n - 3)))


@pytest.mark.parametrize(("family", "masked", "schedule"), [
    ("llama", False, SCHEDULE), ("llama", True, SCHEDULE), ("gemma3_text", False, "0:6"), ("bloom", True, SCHEDULE),
    ("bert", True, SCHEDULE),
])  # fmt: skip
def test_streaming_equals_keeping_everything(family: str, masked: bool, schedule: str) -> None:
    model = build(family)
    batches = padded(TEXTS, batch_size=3)
    found = similarity(model, schedule, batches, masked=masked)
    all_states = [kept(model, schedule, batch, masked) for batch in batches]
    size = len(all_states[0])
    tokens: list[list[torch.Tensor]] = [[] for _ in range(size)]
    per_batch: list[list[list[torch.Tensor]]] = []
    for states, batch in zip(all_states, batches, strict=True):
        chosen = [(t, p) for t, row in enumerate(batch["attention_mask"]) for p in range(1, int(row.sum()))]
        per_batch.append([[states[s, t, p] for t, p in chosen] for s in range(size)])
        for s in range(size):
            tokens[s] += per_batch[-1][s]
    means = [torch.stack(t).mean(0) for t in tokens]
    for i in range(size):
        for j in range(size):
            paper = [
                np.mean([cosine(states[i, t].flatten(), states[j, t].flatten()) for t in range(states.shape[1])])
                for states in all_states
            ]
            assert found.paper[i, j] == pytest.approx(np.mean(paper), abs=1e-5)
            plain = [cosine(a, b) for a, b in zip(tokens[i], tokens[j], strict=True)]
            assert found.tokens[i, j] == pytest.approx(np.mean(plain), abs=1e-5)
            off = [cosine(a - means[i], b - means[j]) for a, b in zip(tokens[i], tokens[j], strict=True)]
            assert found.centred[i, j] == pytest.approx(np.mean(off), abs=1e-5)
            usable = [b for b in per_batch if len(b[0]) >= 4]
            hsic = [
                sum(plain_hsic(torch.stack(b[x]), torch.stack(b[y])) for b in usable)
                for x, y in ((i, j), (i, i), (j, j))
            ]
            assert found.cka[i, j] == pytest.approx(hsic[0] / np.sqrt(hsic[1] * hsic[2]), abs=1e-4)
        entries = torch.cat([
            states[i][batch["attention_mask"].bool()].flatten()
            for states, batch in zip(all_states, batches, strict=True)
        ])  # fmt: skip
        assert found.variance[i] == pytest.approx(float(entries.var(unbiased=False)), rel=1e-4)
        assert found.norm[i] == pytest.approx(float(torch.stack(tokens[i]).norm(dim=1).mean()), rel=1e-4)
        first = torch.cat([states[i, :, 0] for states in all_states])
        share = first.square().max(1).values / first.square().sum(1)
        np.testing.assert_allclose(found.first_share[:, i], share, rtol=1e-4)
        np.testing.assert_allclose(found.first_norm[:, i], first.norm(dim=1), rtol=1e-4)


def test_states_of_groups_and_of_their_members(model: Any) -> None:
    found = similarity(model, SCHEDULE, padded(TEXTS))
    assert found.labels == STATES
    every = similarity(model, SCHEDULE, padded(TEXTS), members=True)
    inside = ("2", "3", "4")
    assert every.labels == ("embeddings", "0", "1", *inside, "{2, 3 4}", *inside, "{2, 3 4}", "5", "5")
    steps = [i for i, label in enumerate(every.labels) if i in outer()]
    np.testing.assert_allclose(every.paper[np.ix_(steps, steps)], found.paper, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_but_the_paper_measure(family: str, side: str) -> None:
    model = build(family)
    lone = padded(TEXTS, batch_size=1)
    batch = padded(TEXTS, batch_size=len(TEXTS))[0]
    if side == "left":
        width = batch["attention_mask"].shape[1]
        shift = [width - int(n) for n in batch["attention_mask"].sum(1)]
        batch = {k: torch.stack([row.roll(n) for row, n in zip(v, shift, strict=True)]) for k, v in batch.items()}
        if family in ("gpt2", "bert"):
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    one, many = similarity(model, "0:6", lone), similarity(model, "0:6", [batch])
    for measure in ("tokens", "centred"):
        np.testing.assert_allclose(one.matrix(measure), many.matrix(measure), atol=1e-5)
    np.testing.assert_allclose(one.variance, many.variance, rtol=1e-4)
    np.testing.assert_allclose(one.norm, many.norm, rtol=1e-4)
    np.testing.assert_allclose(one.first_share, many.first_share, rtol=1e-3)
    assert np.abs(one.paper - many.paper).max() > 1e-3


@pytest.mark.parametrize(("family", "masked"), [("llama", None), ("bert", None), ("vit", None)])
def test_all_kinds_of_models(family: str, masked: bool | None) -> None:
    model = build(family)
    given = inputs(family, batch=3, length=10)
    found = similarity(model, "0:6", [given, given])
    for measure in MEASURES:
        matrix = found.matrix(measure)
        assert matrix.shape == (7, 7)
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)
        np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-5)
        assert np.abs(matrix).max() < 1.0001 or measure == "cka"


def test_a_massive_activation_fools_the_paper_measure_only(model: Any) -> None:
    """One huge number at the first token of every state makes them all look the same."""
    generator = torch.Generator().manual_seed(3)
    moved = build("llama")
    with torch.no_grad():
        moved.model.embed_tokens.weight[5] = 0.01 * torch.randn(64, generator=generator)
        moved.model.embed_tokens.weight[5, 7] = 3e4
    texts = padded([[5, *text] for text in TEXTS if len(text) > 2])
    calm = padded([[6, *text] for text in TEXTS if len(text) > 2])
    before, after = similarity(model, "0:6", calm), similarity(moved, "0:6", texts)
    assert before.paper[0, 6] < 0.9
    assert after.paper.min() > 0.999
    assert after.first_share.min() > 0.999 > before.first_share.max()
    for measure in ("tokens", "centred", "cka"):
        assert after.matrix(measure)[0, 6] < 0.9
        assert before.matrix(measure)[0, 6] == pytest.approx(after.matrix(measure)[0, 6], abs=0.2)
    unguarded = similarity(moved, "0:6", texts, skip_first=False)
    assert unguarded.norm.min() > 10 * after.norm.max()


def test_a_common_direction_fools_the_cosine_but_not_the_centred_one() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 4, 20, 16, generator=generator)
    states[..., 3] += 50
    chosen = torch.ones(4, 20, dtype=torch.bool)
    assert _per_token(states, chosen).min() > 0.95
    centred = _per_token(states - states.mean((1, 2), keepdim=True), chosen).mean(0)
    assert abs(centred[0, 1]) < 0.1


def test_cka_does_not_see_rotations_and_scales() -> None:
    """Against identities: the same tokens, turned and stretched."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 20, 16, generator=generator)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    states = torch.stack([x, 3 * x @ turn, torch.randn(2, 20, 16, generator=generator)])
    chosen = torch.ones(2, 20, dtype=torch.bool)
    cka = _normalised(_hsic(states, chosen, 512, np.random.default_rng(0)), "cka")
    assert cka[0, 1] == pytest.approx(1, abs=1e-5)
    assert abs(cka[0, 2]) < 0.15


def test_intervals_hold_the_value_and_need_several_texts(model: Any) -> None:
    found = similarity(model, "0:6", padded(TEXTS * 3, batch_size=4))
    for measure in MEASURES:
        low, high = found.interval(measure, draws=300)
        value = found.matrix(measure)
        assert (low <= value + 1e-6).mean() > 0.9 and (value <= high + 1e-6).mean() > 0.9
        again = found.interval(measure, draws=300)
        np.testing.assert_array_equal(low, again[0])


def test_json_is_plain(model: Any) -> None:
    found = similarity(model, "0 5", padded(TEXTS))
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["labels"] == ["embeddings", "0", "5"]
    assert told["texts"] == len(TEXTS) and told["tokens"] == sum(len(t) - 1 for t in TEXTS)
    np.testing.assert_allclose(told["measures"]["tokens"]["value"], found.tokens)
    assert set(told["measures"]) == set(MEASURES)
    assert {k: len(v) for k, v in told["states"].items()} == dict.fromkeys(told["states"], 3)


def test_what_is_not_finite_stays_visible() -> None:
    broken = build("llama")
    anatomy(broken)
    with torch.no_grad():
        broken.model.layers[3].mlp.down_proj.weight.fill_(float("nan"))
    found = similarity(broken, "0:6", padded(TEXTS))
    for measure in MEASURES:
        matrix = found.matrix(measure)
        assert np.isfinite(matrix[:4, :4]).all()
        assert np.isnan(matrix[4:, :]).all()
        low, high = found.interval(measure, draws=50)
        assert np.isnan(low[4:]).all() and np.isfinite(high[:4, :4]).all()
    assert found.to_json()["measures"]["paper"]["value"][0][6] is None


def test_one_run_where_centring_is_not_wanted(model: Any) -> None:
    told: list[tuple[int, int]] = []
    found = similarity(
        model, "0:6", iter(padded(TEXTS, batch_size=4)), centre=False, progress=lambda *done: told.append(done)
    )
    assert told == [(1, 2), (2, 2)]
    assert set(found.to_json()["measures"]) == {"paper", "tokens", "cka"}
    with pytest.raises(UsageError, match="leave centre=True"):
        _ = found.centred


def test_few_tokens_for_cka(model: Any) -> None:
    whole = similarity(model, "0:6", padded(TEXTS))
    part = similarity(model, "0:6", padded(TEXTS), cka_tokens=30)
    assert np.abs(whole.cka - part.cka).max() < 0.5
    np.testing.assert_array_equal(part.cka, similarity(model, "0:6", padded(TEXTS), cka_tokens=30).cka)
    short = similarity(model, "0:6", padded([[3, 4], [5]]))
    assert np.isnan(short.cka).all() and np.isfinite(short.tokens).all()


def test_bad_input(model: Any) -> None:
    with pytest.raises(UsageError, match="at least one batch"):
        similarity(model, "0:6", [])
    with pytest.raises(UsageError, match="without tokens"):
        padded([[1], []])
    with pytest.raises(UsageError, match="a measure is one of paper, tokens, centred, cka, not 'x'"):
        similarity(model, "0:6", padded(TEXTS)).matrix("x")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="is square"):
        groups(np.zeros((2, 3)))


def published() -> np.ndarray:
    """The matrix of Llama2-7B, read off the picture in the authors' notebook: facts, two decimals."""
    lines = (Path(__file__).parent / "data" / "painters_similarity.txt").read_text().splitlines()
    upper = [[float(x) for x in line.split(":")[1].split()] for line in lines]
    matrix = np.zeros((len(upper), len(upper)))
    for i, row in enumerate(upper):
        matrix[i, i:] = matrix[i:, i] = row
    return matrix


def test_groups_of_the_published_matrix() -> None:
    found = groups(published())
    assert str(found) == "{0} {1} {2..30} {31} {32}"
    assert (found.beginning, found.middle, found.end) == ((0, 1), tuple(range(2, 31)), (31, 32))
    assert found.separation == pytest.approx(0.98 - 0.07, abs=0.05)
    assert found.threshold == pytest.approx(0.77, abs=0.02)
    assert "similarity minus 0.7" in found.rule


def test_groups_where_there_are_none() -> None:
    alone = groups(np.eye(5))
    assert str(alone) == "{0} {1} {2} {3} {4}" and alone.middle == ()
    assert alone.beginning == (0, 1, 2, 3, 4) and alone.end == () and np.isnan(alone.separation)
    whole = groups(np.ones((4, 4)))
    assert whole.middle == (0, 1, 2, 3) and whole.beginning == whole.end == () and np.isnan(whole.separation)
    gap = np.ones((5, 5))
    gap[2] = gap[:, 2] = np.nan
    assert str(groups(gap)) == "{0..1} {2} {3..4}"


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("sizes", [(1, 5, 13), (1, 2, 9, 1), (4, 8), (1, 3, 20, 2)])
def test_groups_find_planted_blocks(sizes: tuple[int, ...], noise: float) -> None:
    block = np.repeat(np.arange(len(sizes)), sizes)
    half = np.random.default_rng(0).uniform(-noise, noise, (len(block), len(block)))
    matrix = np.where(block[:, None] == block[None], 0.85, 0.1) + half + half.T
    np.fill_diagonal(matrix, 1)
    found = groups(matrix)
    assert [len(b) for b in found.blocks] == list(sizes)
    assert len(found.middle) == max(sizes)
    assert found.separation == pytest.approx(0.75, abs=0.1)


def test_noise_is_no_group() -> None:
    half = np.random.default_rng(1).uniform(0, 0.3, (20, 20))
    assert groups(np.where(np.eye(20) > 0, 1.0, np.maximum(half, half.T))).middle == ()


@given(st.integers(1, 12), st.none() | st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_groups_always_divide_all_states(size: int, threshold: float | None, seed: int) -> None:
    half = np.random.default_rng(seed).uniform(-0.2, 1, (size, size))
    matrix = np.maximum(half, half.T)
    np.fill_diagonal(matrix, 1)
    found = groups(matrix, threshold)
    assert [s for block in found.blocks for s in block] == list(range(size))
    assert found.beginning + found.middle + found.end == tuple(range(size))
    assert not found.middle or found.middle in found.blocks
    above = np.triu(matrix - found.threshold, 1)
    sums = [above[np.ix_(block, block)].sum() for block in found.blocks]
    assert all(total > 0 for total, block in zip(sums, found.blocks, strict=True) if len(block) > 1)
    runs = [above[a:b, a:b].sum() for a in range(size) for b in range(a + 1, size + 1)]
    assert max(sums) == pytest.approx(max(runs), abs=1e-6)


def test_the_value_is_a_value() -> None:
    assert Similarity.__dataclass_params__.frozen  # type: ignore[attr-defined]

"""Laws of what a compiler is given of a step: the same results and slots as the traced graph, on every family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import families
from impasto import lowering, pieces, regions, rows
from impasto.fast import fast

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text", "gpt2", "bloom", "mixtral")  # that differ in what passes find


def everything(*matrices: Tensor) -> bool:
    return True


def ours(graph: fx.GraphModule) -> Counter[str]:
    """How many operations of ours a graph has, those that norm or add told apart."""
    found: Counter[str] = Counter()
    for node in graph.graph.nodes:
        if node.op == "call_function" and "impasto" in str(node.target):
            name = str(node.target).split(".")[1]
            normed = lowering._has_norm(node)
            added = name == "multiply" and len(node.args) > 3
            found[name + " normed" * normed + " added" * added] += 1
    return found


def same(graph: fx.GraphModule, made: fx.GraphModule, tensors: list[Tensor]) -> None:
    """Both graphs give the same, and leave the same in every tensor that they are given."""
    given, taken = ([x.clone() for x in tensors] for _ in range(2))
    with torch.no_grad():
        wanted, got = graph(*given), made(*taken)
    for x, y in zip([*got[: len(wanted)], *taken], [*wanted, *given], strict=True):  # behind are rows that are kept
        torch.testing.assert_close(x, y, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lowered_step_is_the_traced_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[regions.Region, list[Tensor]]] = []

    def kept(region: regions.Region, inputs: list[Tensor], options: dict[str, Any]) -> regions.Compiled:
        seen.append((region, [x.clone() for x in inputs]))
        return regions.interpret_region(region, inputs, options)  # type: ignore[arg-type]

    monkeypatch.setattr(pieces, "interpret_region", kept)
    with fast(families.shared(family), "0:2 {2 3} {2 4, 3 5}", context=40, compile="traced"):
        pass
    assert seen
    for region, inputs in seen:
        same(region.graph, lowering.lowered(region.graph, everything), [*region.constants, *inputs])
    if family in ("llama", "qwen2"):
        layer, group, branches = ([*map(ours, [lowering.lowered(region.graph, everything) for region, _ in seen])])[1:4]
        once = {
            "multiply_turned normed": 1,
            "attend": 1,
            "multiply added": 1,
            "multiply_gated normed": 1,
            "multiply": 1,
        }
        assert layer == {**{name: 1 for name in once if name != "multiply"}, "multiply added": 2}
        assert group == once  # whose last sums are averaged
        assert branches == {**{name: 2 * count for name, count in once.items()}, "multiply added": 3, "multiply": 1}


class Attention(torch.nn.Module):
    """A layer's attention, with a norm before it and the row added behind it."""

    def __init__(self, case: str = "") -> None:
        super().__init__()
        self.norm = torch.nn.Parameter(torch.rand(32) + 0.5)
        self.linears = torch.nn.ModuleList(torch.nn.Linear(32, size) for size in (32, 16, 16, 32))
        self.after = torch.nn.ModuleList(torch.nn.Linear(32, 24) for _ in range(2))
        self.case = case

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x[..., :4], x[..., 4:]
        if self.case == "other halves":
            return x * cos + torch.cat([-first, second], -1) * sin
        if self.case == "nothing negated":
            return x * cos + torch.cat([second, first], -1) * sin
        if self.case == "a part is turned":
            return torch.cat([first * cos[..., :4] + torch.cat([-first[..., 2:], first[..., :2]], -1), second], -1)
        return torch.cat([-second, first], -1) * sin + cos * x

    def normed(self, x: Tensor, epsilon: float = 1e-6) -> Tensor:
        power = 3 if self.case == "another power" else 2
        size = x.pow(power).mean(-1 if self.case != "another mean" else 0, keepdim=True)
        return self.norm * (x * torch.rsqrt(size + epsilon))

    def forward(
        self, hidden: Tensor, keys: Tensor, values: Tensor, position: Tensor, cos: Tensor, sin: Tensor
    ) -> list[Tensor]:
        first, second, third, last = self.linears
        row = self.normed(hidden)
        query, key, value = (part(row).view(1, 1, -1, 8).transpose(1, 2) for part in (first, second, third))
        others = {"the query is read again": query, "the value is read again": value, "the norm is read again": row}
        query = self.turned(query, cos, sin)
        key = self.turned(key, sin if self.case == "other angles" else cos, sin)
        keys.index_copy_(2, position, key)
        values.index_copy_(2, position + 1 if self.case == "another column" else position, value)
        if self.case == "the slot is read again":
            others[self.case] = keys.sum()
        if self.case == "written between":
            keys.mul_(2)
        mixed = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        out = hidden + last(mixed.transpose(1, 2).reshape(1, 1, 32))
        gate, up = self.after
        row = self.normed(out, 1e-5)
        return [F.silu(gate(row)) * up(row) + 1, *[x for name, x in others.items() if name == self.case]]


def traced(case: str) -> tuple[fx.GraphModule, list[Tensor]]:
    torch.manual_seed(0)
    slots = [torch.randn(1, 2, 10, 8) for _ in range(2)]
    inputs = [torch.randn(1, 1, 32), *slots, torch.tensor([6]), torch.rand(1, 1, 8), torch.rand(1, 1, 8)]
    with torch.no_grad():
        region = regions.trace(Attention(case), [x.clone() for x in inputs])
    return region.graph, [*region.constants, *inputs]


@pytest.mark.parametrize(
    ("case", "turned"),
    [
        ("", True),
        ("the norm is read again", True),
        *[
            (case, False)
            for case in (
                "other halves",
                "nothing negated",
                "a part is turned",
                "other angles",
                "another column",
                "the query is read again",
                "the value is read again",
                "the slot is read again",
                "written between",
            )
        ],
    ],
)
def test_query_key_and_value_become_one_operation_if_that_is_all_they_are_for(case: str, turned: bool) -> None:
    graph, tensors = traced(case)
    made = lowering.lowered(graph, everything)
    same(graph, made, tensors)
    found = ours(made)
    assert found["multiply_turned"] + found["multiply_turned normed"] == turned
    assert any("index_put" in str(node.target) for node in made.graph.nodes) != turned


@pytest.mark.parametrize(
    ("case", "normed"),
    [("", 2), ("the norm is read again", 1), ("another power", 0), ("another mean", 0)],
)
def test_a_norm_goes_into_the_products_that_alone_read_it(case: str, normed: int) -> None:
    graph, tensors = traced(case)
    made = lowering.lowered(graph, everything)
    same(graph, made, tensors)
    found = ours(made)
    assert sum(count for name, count in found.items() if "normed" in name) == normed
    assert found["multiply added"] == (normed > 0)


def apart(function: Callable[..., list[Tensor]], *inputs: Tensor) -> Counter[str]:
    """What operations of ours a function is lowered to, which computes the same."""
    with torch.no_grad():
        region = regions.trace(function, [x.clone() for x in inputs])
    made = lowering.lowered(region.graph, everything)
    same(region.graph, made, [*region.constants, *inputs])
    return ours(made)


def test_a_row_that_changes_before_its_squares_are_taken_is_not_read_later() -> None:
    linears = [torch.nn.Linear(16, 8).bfloat16() for _ in range(2)]
    scales = torch.nn.Parameter(torch.rand(16).bfloat16())

    def changed(x: Tensor) -> list[Tensor]:
        wide = x.float()
        x.mul_(3).add_(1)
        row = scales * (wide * torch.rsqrt(wide.pow(2).mean(-1, True) + 1e-6)).bfloat16()
        return [linear(row) for linear in linears]

    assert apart(changed, torch.randn(1, 16).bfloat16()) == {"multiply_several": 1}


@pytest.mark.parametrize("case", ["turned by a number", "a position of another type", "the last column"])
def test_positions_that_are_written_otherwise(case: str) -> None:
    linears = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(3))

    def attended(x: Tensor, keys: Tensor, values: Tensor, position: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        query, key, value = (linear(x).view(1, 1, 2, 8).transpose(1, 2) for linear in linears)

        def turned(y: Tensor) -> Tensor:
            crossed = torch.cat([-y[..., 4:], y[..., :4]], -1)
            return y * cos + (sin * 2.0 if case == "turned by a number" else crossed * sin)

        keys[:, :, position] = turned(key)
        values[:, :, position] = value
        return [F.scaled_dot_product_attention(turned(query), keys, values)]

    position = torch.tensor([-1]) if case == "the last column" else torch.tensor([3])
    position = position.int() if case == "a position of another type" else position
    slots = [torch.randn(1, 2, 10, 8) for _ in range(2)]
    found = apart(attended, torch.randn(1, 1, 16), *slots, position, torch.rand(1, 1, 8), torch.rand(1, 1, 8))
    assert found["multiply_turned"] == (case == "the last column")


def test_small_matrices_stay_sums() -> None:
    graph, tensors = traced("")
    made = lowering.lowered(graph)
    same(graph, made, tensors)
    assert set(ours(made)) == {"attend"}


def test_wide_rows_are_normed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "NORMED", 16)
    graph, tensors = traced("")
    made = lowering.lowered(graph, everything)
    same(graph, made, tensors)
    assert not any("normed" in name for name in ours(made))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [100, 896, 4096])
@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [2, 20])
def test_kernels_that_norm_add_and_turn(heads: int, columns: int, one: bool, bias: bool, dtype: torch.dtype) -> None:
    from impasto import streaming

    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").to(dtype)

    def close(got: Tensor, wanted: Tensor) -> None:
        assert float((got.double() - wanted).norm() / wanted.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)

    lanes, sizes = 1 if one else 3, [32 * heads, 16 * heads, 16 * heads]
    row, scales, added = random(lanes, columns), random(lanes, columns), random(lanes, sizes[0])
    other_row = random(3, 2 * columns)[:, ::2]
    matrices = [random(3, outputs, columns) / columns**0.5 for outputs in sizes]
    biases = [random(3, outputs) for outputs in sizes] if bias else []
    cos, sin, position = random(16), random(16), torch.tensor([7], device="cuda")
    doubles: Callable[..., Any] = lambda some: [x.double() for x in some]  # noqa: E731
    wide = (row.double(), doubles(matrices), doubles(biases), scales.double(), 1e-5)
    products = rows.multiply_several(*wide)
    for got, wanted in zip(
        streaming.multiply(row, matrices, biases, scales=scales, epsilon=1e-5), products, strict=True
    ):
        close(got, wanted)
    (got,) = streaming.multiply(row, matrices[:1], biases[:1], added=added)
    close(got, rows.multiply_several(wide[0], wide[1][:1], wide[2][:1])[0] + added.double())
    pair = (matrices[1], matrices[2], *(biases[1:] or (None, None)))
    double = [x if x is None else x.double() for x in pair]
    wanted = rows.multiply_gated(wide[0], *double, "silu", others=wide[3])
    (got,) = streaming.multiply(row, matrices[1:], biases[1:], "silu", others=scales)
    close(got, wanted)
    for first, other in ((row[:1], other_row), (row, other_row[:1])):
        wanted = rows.multiply_gated(first.double(), *double, "silu", wide[3], 1e-5, other.double())
        (got,) = streaming.multiply(first, matrices[1:], biases[1:], "silu", scales, 1e-5, others=other)
        close(got, wanted)
    keys, values = random(3, 1, heads, 20, 16), random(3, 1, heads, 20, 16)
    slots = doubles((keys, values))
    wanted = rows.multiply_turned(*wide, cos.double(), sin.double(), *slots, position)
    turned = (cos, sin, keys, values, position)
    (got, *_) = streaming.multiply(row, matrices, biases, scales=scales, epsilon=1e-5, turned=turned)
    for x, y in ((got, wanted), (keys, slots[0]), (values, slots[1])):
        close(x, y)

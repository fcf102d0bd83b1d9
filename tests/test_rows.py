"""Operations of a decoding step: attention of one query, products of one row, the place of the largest entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from impasto import lowering, regions, rows

SHAPES = [  # batch, heads, key heads, columns, width, width of a value
    (1, 14, 2, 100, 64, 64),
    (3, 4, 4, 33, 80, 48),
    (4, 8, 2, 1500, 16, 16),
]


def example(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    batch, heads, keys, columns, width, values = shape
    torch.manual_seed(0)
    sizes = [(batch, heads, 1, width), (batch, keys, columns, width), (batch, keys, columns, values)]
    return [torch.randn(size, device=device).to(dtype) for size in sizes]


def masks(shape: tuple[int, ...], device: str = "cpu") -> dict[str, Tensor | None]:
    batch, heads, _, columns, *_ = shape
    seen = torch.rand(batch, 1, 1, columns, device=device) > 0.4
    seen[..., 0] = True
    return {
        "none": None,
        "seen": seen,
        "few": torch.arange(columns, device=device)[None, None, None] < 3,
        "by head": torch.randn(1, heads, 1, columns, device=device),
        "expanded": seen.expand(batch, heads, 1, columns),
    }


def expected(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as torch has it, in double precision."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    return F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=mask, scale=0.3, enable_gqa=True
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mask", ["none", "seen", "few", "by head", "expanded"])
def test_attention_is_attention(shape: tuple[int, ...], mask: str) -> None:
    inputs, hidden = example(shape), masks(shape)[mask]
    got = rows.attention(*inputs, attn_mask=hidden, scale=0.3)
    torch.testing.assert_close(got, expected(*inputs, hidden).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", ["none", "seen", "by head", "by query"])
def test_attention_of_several_queries(mask: str) -> None:
    shape = (2, 4, 2, 20, 16, 16)
    query, key, value = example(shape)
    query = query.repeat(1, 1, 3, 1) * torch.arange(3)[:, None]
    hidden = torch.randn(2, 1, 3, 20) if mask == "by query" else masks(shape)[mask]
    got = rows.attention(query, key, value, hidden, scale=0.3)
    torch.testing.assert_close(got, expected(query, key, value, hidden).float(), rtol=1e-4, atol=1e-5)
    graph = make_fx(lambda *x: rows.attention(*x, hidden, scale=0.3))(query, key, value)
    assert ("impasto.attend.default" in places(graph)) == (mask in ("none", "seen"))


@pytest.mark.parametrize("wrong", [{"dropout_p": 0.1}, {"is_causal": True}])
def test_no_dropout_and_no_order_among_queries(wrong: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="neither dropout nor queries that must not see one another"):
        rows.attention(*example((2, 4, 2, 20, 16, 16)), **wrong)


@pytest.mark.parametrize("times", [1, 2, 7])
def test_keys_that_heads_share_are_not_copied_for_each(times: int) -> None:
    query, key, value = example((1, 2 * times, 2, 20, 16, 16))

    def repeated(x: Tensor) -> Tensor:
        return x[:, :, None].expand(1, 2, times, 20, 16).reshape(1, 2 * times, 20, 16)

    region = regions.trace(
        lambda q, k, v: [F.scaled_dot_product_attention(q, repeated(k), repeated(v))], [query, key, value]
    )
    assert not {"aten.expand.default", "aten.clone.default"} & set(places(region.graph))
    torch.testing.assert_close(
        region.graph(query, key, value)[0], F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    )


def test_other_repetitions_are_not_taken_for_shared_keys() -> None:
    query, key, value = example((1, 4, 2, 20, 16, 16))
    tiled = [lambda x: x.repeat(1, 2, 1, 1), lambda x: x[:, None].expand(1, 2, 2, 20, 16).reshape(1, 4, 20, 16)]
    for repeated in tiled:
        region = regions.trace(
            lambda q, k, v: [F.scaled_dot_product_attention(q, repeated(k), repeated(v))],  # noqa: B023
            [query, key, value],
        )
        wanted = F.scaled_dot_product_attention(query, key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1))
        torch.testing.assert_close(region.graph(query, key, value)[0], wanted)


@pytest.mark.parametrize("mask", ["none", "seen", "by head", "mapped"])
def test_mapped_attention_is_attention_of_each(mask: str) -> None:
    lanes, shape = 3, (2, 4, 2, 20, 16, 16)
    inputs = [torch.stack([x, 2 * x, -x]) for x in example(shape)]
    hidden = masks(shape)["seen" if mask == "mapped" else mask]
    given: list[Tensor | None] = [hidden] * lanes
    if mask == "mapped":
        given = [hidden, hidden.flip(-1), hidden]
    together = torch.vmap(
        lambda q, k, v, m: rows.attend(q, k, v, m, 0.3), in_dims=(0, 0, 0, 0 if mask == "mapped" else None)
    )(*inputs, torch.stack(given) if mask == "mapped" else hidden)
    each = [rows.attend(*(x[i] for x in inputs), given[i], 0.3) for i in range(lanes)]
    torch.testing.assert_close(together, torch.stack(each))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_products_and_mapped_products(bias: bool, shared: bool) -> None:
    torch.manual_seed(0)
    row, matrices, biases = torch.randn(3, 1, 10), torch.randn(3, 1, 7, 10), torch.randn(3, 1, 7) if bias else None
    if shared:
        row = row[:1].expand(3, 1, 10)
    each = [rows.multiply(row[i], matrices[i], None if biases is None else biases[i]) for i in range(3)]
    for i, product in enumerate(each):
        wanted = F.linear(row[i], matrices[i, 0], None if biases is None else biases[i, 0])
        torch.testing.assert_close(product, wanted)
    together = torch.vmap(rows.multiply, in_dims=(None if shared else 0, 0, 0 if bias else None))(
        row[0] if shared else row, matrices, biases
    )
    torch.testing.assert_close(together, torch.stack(each))


def test_a_mapped_mask_of_fewer_rows_than_the_batch() -> None:
    lanes = 3
    inputs = [torch.stack([x, 2 * x, -x]) for x in example((2, 4, 2, 20, 16, 16))]
    mask = torch.rand(lanes, 1, 1, 1, 20) > 0.5
    together = torch.vmap(lambda q, k, v, m: rows.attend(q, k, v, m, 0.3))(*inputs, mask)
    each = [rows.attend(*(x[i] for x in inputs), mask[i], 0.3) for i in range(lanes)]
    torch.testing.assert_close(together, torch.stack(each))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_who_sees_nothing_gets_nothing_and_hidden_columns_may_hold_anything(device: str) -> None:
    query, key, value = example((2, 4, 2, 70, 16, 16), device=device)
    mask = torch.ones(2, 1, 1, 70, dtype=torch.bool, device=device)
    mask[0] = False
    mask[1, ..., 5:9] = False
    wanted = rows.attention(query, key, value, mask)
    torch.testing.assert_close(wanted, F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True))
    key[1, :, 5:9] = value[1, :, 5:9] = torch.nan
    value[0] = torch.inf
    assert torch.equal(rows.attention(query, key, value, mask), wanted)
    assert bool(rows.attention(query, key, value)[1].isnan().all())


@pytest.mark.parametrize("change", ["keys of another batch", "values of other columns", "heads that do not share"])
def test_keys_that_do_not_fit(change: str) -> None:
    query, key, value = example((2, 6, 2, 20, 16, 16))
    if change == "keys of another batch":
        key, value = key[:1], value[:1]
    elif change == "values of other columns":
        value = value[:, :, 1:]
    else:
        key, value = (x.repeat(1, 2, 1, 1) for x in (key, value))
    with pytest.raises(RuntimeError, match=r"6 heads of 2 texts cannot share keys \("):
        rows.attention(query, key, value)


def test_operations_are_what_they_say() -> None:
    query, key, value = example((2, 4, 2, 20, 16, 24))
    mask = masks((2, 4, 2, 20, 16, 24))["seen"]
    row, matrix = torch.randn(3, 16), torch.randn(3, 7, 32)[..., ::2]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(rows.attend, (query, key.mT.contiguous().mT, value, mask, 0.3), test_utils=checks)
    torch.library.opcheck(rows.multiply, (row, matrix, torch.randn(3, 7)), test_utils=checks)
    torch.library.opcheck(rows.multiply_several, (row, [matrix, matrix[:, :2]], []), test_utils=checks)
    torch.library.opcheck(rows.multiply_gated, (row, matrix, matrix + 1, None, None, "silu"), test_utils=checks)
    torch.library.opcheck(rows.multiply, (row[:1], matrix, None, torch.randn(1, 7)), test_utils=checks)
    normed = (torch.randn(1, 16), 1e-5)
    torch.library.opcheck(rows.multiply_several, (row, [matrix, matrix], [], *normed), test_utils=checks)
    torch.library.opcheck(rows.multiply_gated, (row, matrix, matrix, None, None, "silu", *normed), test_utils=checks)
    apart = (row, matrix, matrix, None, None, "silu", None, 0.0, row[:1])
    torch.library.opcheck(rows.multiply_gated, apart, test_utils=checks)
    parts, slots = [torch.randn(3, size, 16) for size in (16, 8, 8)], [torch.randn(3, 1, 2, 9, 4) for _ in range(2)]
    given = (row, parts, [], *normed, torch.randn(4), torch.randn(4), *slots, torch.tensor([5]))
    torch.library.opcheck(rows.multiply_turned, given, test_utils=checks)


def test_one_row_for_all_lanes_of_each_branch() -> None:
    row, matrices, added = torch.randn(2, 1, 5), torch.randn(2, 3, 4, 5), torch.randn(2, 1, 4)
    made = torch.vmap(rows.multiply, in_dims=(0, 0, None, 0))(row, matrices, None, added)
    torch.testing.assert_close(made, (matrices * row[:, :, None]).sum(-1) + added)
    shared = torch.vmap(rows.multiply, in_dims=(None, 0, None))(row[0], matrices, None)
    torch.testing.assert_close(shared, (matrices * row[0]).sum(-1))


def test_slots_that_are_written_must_be_contiguous() -> None:
    matrices, keys = [torch.randn(1, 8, 4)] * 3, torch.randn(1, 2, 4, 9).mT
    with pytest.raises(RuntimeError, match="must be contiguous"):
        rows.multiply_turned(
            torch.randn(1, 4), matrices, [], None, 0.0, torch.ones(4), torch.ones(4), keys, keys, torch.tensor([1])
        )


def test_in_double_precision() -> None:
    query, key, value = (x.double() for x in example((2, 4, 2, 20, 16, 16)))
    torch.testing.assert_close(rows.attention(query, key, value, scale=0.3), expected(query, key, value, None))
    linear = torch.nn.Linear(16, 24).double()
    row = torch.randn(1, 16, dtype=torch.float64)
    with torch.no_grad():
        region = regions.trace(lambda x: [linear(x)], [row])
        for graph in (region.graph, lowering.lowered(region.graph)):
            torch.testing.assert_close(graph(*region.constants, row)[0], linear(row))


def places(graph: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_the_largest_in_two_stages(batch: int, seed: int, ties: bool, broken: bool) -> None:
    torch.manual_seed(seed)
    entries = torch.randn(batch, lowering.WIDE + 100)
    entries = entries.mul(2).round() if ties else entries
    if broken:
        entries[-1, seed % 4000] = torch.nan
    graph = make_fx(lambda x: list(x.max(-1)))(entries)
    made = lowering.lowered(graph)
    assert "aten.max.dim" in places(graph) and "aten.max.dim" not in places(made)
    values, at = made(entries)
    torch.testing.assert_close(values, entries.max(-1).values, equal_nan=True)
    whole = batch - broken
    assert torch.equal(at[:whole], entries[:whole].argmax(-1))
    assert 0 <= int(at[-1]) < entries.shape[1]


def test_small_maxima_and_those_of_other_dimensions_stay() -> None:
    for entries, dim in ((torch.randn(2, 50), -1), (torch.randn(5000, 2), 0)):
        made = lowering.lowered(make_fx(lambda x: list(x.max(dim)))(entries))  # noqa: B023
        assert "aten.max.dim" in places(made)


@pytest.mark.parametrize("bias", [False, True])
def test_traced_products_of_one_row_stay_whole_until_they_are_compiled(bias: bool) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 24, bias=bias)
    row = torch.randn(1, 1, 16)
    with torch.no_grad():
        region = regions.trace(lambda x: [linear(x).relu()], [row])
        assert "impasto.multiply.default" in places(region.graph)
        made = lowering.lowered(region.graph)
        assert "impasto.multiply.default" not in places(made)
        for graph in (region.graph, made):
            torch.testing.assert_close(graph(*region.constants, row)[0], linear(row).relu())
        several = regions.trace(lambda x: [linear(x)], [row.repeat(1, 3, 1)])
        assert "impasto.multiply.default" not in places(several.graph)


def test_a_lowered_graph_holds_no_weights() -> None:
    linear = torch.nn.Linear(16, 24)
    with torch.no_grad():
        region = regions.trace(lambda x: [linear(x)], [torch.randn(1, 16)])
    held = [x for x in vars(lowering.lowered(region.graph)).values() if isinstance(x, Tensor)]
    assert not held and not list(lowering.lowered(region.graph).parameters())


@pytest.mark.parametrize("turn", [lambda w: w.permute(0, 1), lambda w: w.transpose(0, 0), lambda w: w.transpose(-2, 0)])
def test_what_turns_nothing_is_no_transposition(turn: Callable[[Tensor], Tensor]) -> None:
    row, matrix = torch.randn(1, 16), torch.randn(16, 16)
    region = regions.trace(lambda x, w: [x @ turn(w)], [row, matrix])
    torch.testing.assert_close(region.graph(row, matrix)[0], row @ matrix)


def test_nothing_is_read_across_a_change_in_place() -> None:
    first, second = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def changed(x: Tensor) -> list[Tensor]:
        row = x.view(1, 16)
        before = first(row)
        x.mul_(2)
        return [before, second(row)]

    def written(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        keys = key[:, :, None].expand(1, 2, 2, 20, 16).reshape(1, 4, 20, 16)
        values = value[:, :, None].expand(1, 2, 2, 20, 16).reshape(1, 4, 20, 16)
        key.zero_()
        return [F.scaled_dot_product_attention(query, keys, values)]

    for function, inputs in ((changed, [torch.randn(16)]), (written, example((1, 4, 2, 20, 16, 16)))):
        with torch.no_grad():
            region = regions.trace(function, [x.clone() for x in inputs])
            made = lowering.lowered(region.graph, lambda *matrices: True)
            wanted = function(*[x.clone() for x in inputs])
            got = made(*region.constants, *[x.clone() for x in inputs])
        for x, y in zip(got, wanted, strict=False):
            torch.testing.assert_close(x, y)


class Several(torch.nn.Module):
    """Products of one row, of another, and of what comes of them."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        sizes = [(16, 24), (16, 8), (16, 8), (16, 40), (24, 16)]
        self.linears = torch.nn.ModuleList(torch.nn.Linear(*size, bias=bias) for size in sizes)

    def forward(self, x: Tensor) -> list[Tensor]:
        first, second, third, fourth, fifth = self.linears
        return [second(x) * third(x.relu()), fourth(x).sum(-1), fifth(first(x).sigmoid()) + x]


def traced(
    parts: Sequence[torch.nn.Module], rows_in: Tensor, mapped: bool
) -> tuple[regions.Region, tuple[Tensor, ...]]:
    """The region of modules of one structure, mapped over all or of the first alone, and its weights."""
    each = [regions.trace(part, [rows_in[0]]) for part in parts]
    if not mapped:
        return each[0], each[0].constants
    constants = tuple(torch.stack(column) for column in zip(*[one.constants for one in each], strict=True))
    return regions.trace(lambda *all: list(torch.vmap(each[0].graph)(*all)), [*constants, rows_in]), constants


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("least", [0, 16 * 24 * 4, 2**30])
def test_products_of_one_row_become_one_operation_where_a_matrix_is_large(bias: bool, mapped: bool, least: int) -> None:
    torch.manual_seed(0)
    lanes, parts = (3, [Several(bias) for _ in range(3)]) if mapped else (1, [Several(bias)])
    rows_in = torch.randn(lanes, 1, 1, 16)
    with torch.no_grad():
        region, constants = traced(parts, rows_in, mapped)
        made = lowering.lowered(region.graph, lambda *matrices: max(x.numel() for x in matrices) * 4 >= lanes * least)
        got = made(*constants, rows_in if mapped else rows_in[0])
        for lane, part in enumerate(parts):
            for x, y in zip(got, part(rows_in[lane]), strict=False):
                torch.testing.assert_close(x[lane] if mapped else x, y)
    names = places(made)
    # The row enters three matrices, of which the first and the last have at least 24 outputs; others see one row each.
    assert names.count("impasto.multiply_several.default") == (least < 2**30)
    assert names.count("impasto.multiply.default") == {0: 2, 16 * 24 * 4: 1}.get(least, 0)
    assert places(region.graph).count("impasto.multiply.default") == 5


class Gate(torch.nn.Module):
    """Two products of a row, one of which gates the other."""

    def __init__(self, activation: Callable[[Tensor], Tensor], bias: bool = False, case: str = "") -> None:
        super().__init__()
        self.gate, self.up = (torch.nn.Linear(16, 24, bias=bias) for _ in range(2))
        self.down = torch.nn.Linear(24, 16, bias=bias)
        self.activation, self.case = activation, case

    def forward(self, x: Tensor) -> list[Tensor]:
        gate, up = self.gate(x), self.up(x)
        active = self.activation(gate)
        others = {"the gate is read again": gate, "what is active is read again": active, "the product is": up}
        hidden = up * active if self.case == "the other way round" else active * up
        if self.case == "one for all":
            hidden = active * up[..., :1]
        return [self.down(hidden) + x, *[x for name, x in others.items() if name == self.case]]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("activation", rows.ACTIVATIONS)
def test_a_gate_its_activation_and_what_it_gates_become_one_operation(
    activation: str, mapped: bool, bias: bool
) -> None:
    torch.manual_seed(0)
    parts = [Gate(rows.ACTIVATIONS[activation], bias) for _ in range(3 if mapped else 1)]
    rows_in = torch.randn(len(parts), 1, 1, 16)
    with torch.no_grad():
        region, constants = traced(parts, rows_in, mapped)
        made = lowering.lowered(region.graph, lambda *matrices: True)
        got = made(*constants, rows_in if mapped else rows_in[0])[0]
        for lane, part in enumerate(parts):
            torch.testing.assert_close(got[lane] if mapped else got, part(rows_in[lane])[0])
    (node,) = (node for node in made.graph.nodes if str(node.target) == "impasto.multiply_gated.default")
    assert node.args[-1] == activation
    assert "impasto.multiply_several.default" not in places(made)
    assert "impasto.multiply_gated.default" not in places(lowering.lowered(region.graph))  # small matrices stay sums


@pytest.mark.parametrize(
    ("case", "one"),
    [
        ("the other way round", True),
        ("the gate is read again", False),
        ("what is active is read again", False),
        ("the product is", False),
        ("one for all", False),
    ],
)
def test_a_gate_of_which_something_else_is_made_stays(case: str, one: bool) -> None:
    part, row = Gate(F.silu, case=case), torch.randn(1, 1, 16)
    with torch.no_grad():
        region = regions.trace(part, [row])
        made = lowering.lowered(region.graph, lambda *matrices: True)
        for x, y in zip(made(*region.constants, row), part(row), strict=True):
            torch.testing.assert_close(x, y)
    assert ("impasto.multiply_gated.default" in places(made)) == one


BETWEEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the gate is written": lambda gate, up: F.silu(gate.mul_(2)) * up,
    "what is active is written": lambda gate, up: F.silu(gate).add_(1) * up,
    "it is written behind": lambda gate, up: F.silu(gate) * up + gate.zero_(),
    "a part of it is written": lambda gate, up: (active := F.silu(gate), active[..., :1].zero_())[0] * up,
    "the product is written": lambda gate, up: (up.view(24).add_(1), F.silu(gate) * up)[1],
    "another type": lambda gate, up: F.silu(gate.double()).float() * up,
    "another order": lambda gate, up: F.silu(gate.view(4, 6).T.reshape(1, 1, 24)) * up,
    "by itself": lambda gate, up: F.relu(gate) * F.relu(gate) + up,
    "by a number": lambda gate, up: F.silu(gate) * 2 + up,
    "ungated": lambda gate, up: F.silu(gate) * F.silu(up),
}


@pytest.mark.parametrize(
    ("case", "one"),
    [
        ("", True),
        ("the other way round", True),
        ("first what is gated", True),
        ("a row is written between", False),
        ("one has a bias", False),
        ("shapes differ", False),
        ("another type", False),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_a_gate_and_what_it_gates_may_have_rows_of_their_own(case: str, one: bool, bias: bool) -> None:
    torch.manual_seed(0)
    columns = 20 if case == "shapes differ" else 16
    rows_in = [torch.randn(1, 1, 16), torch.randn(1, 1, columns)]
    weights = [torch.nn.Parameter(torch.randn(24, size)) for size in (16, columns)]
    biases = [torch.nn.Parameter(torch.randn(24)) if bias else None for _ in range(2)]
    if case == "another type":
        rows_in[1], weights[1] = rows_in[1].double(), torch.nn.Parameter(weights[1].double())
        biases[1] = torch.nn.Parameter(torch.randn(24).double()) if bias else None
    if case == "one has a bias":
        biases[0] = None if bias else torch.nn.Parameter(torch.randn(24))

    def gated(first: Tensor, second: Tensor) -> list[Tensor]:
        ordered = list(zip((first * 1, second * 1), weights, biases, strict=True))
        if case == "first what is gated":
            up, gate = F.linear(*ordered[1]), F.linear(*ordered[0])
        else:
            gate = F.linear(*ordered[0])
            if case == "a row is written between":
                ordered[1][0].add_(1)
            up = F.linear(*ordered[1])
        return [up * F.gelu(gate) if case == "the other way round" else F.gelu(gate) * up]

    with torch.no_grad():
        region = regions.trace(gated, rows_in)
        made = lowering.lowered(region.graph, lambda *matrices: True)
        torch.testing.assert_close(made(*region.constants, *rows_in)[0], gated(*rows_in)[0], rtol=1e-5, atol=1e-5)
        apart = lowering.lowered(region.graph)
        torch.testing.assert_close(apart(*region.constants, *rows_in)[0], gated(*rows_in)[0], rtol=1e-5, atol=1e-5)
    assert ("impasto.multiply_gated.default" in places(made)) == one
    assert "impasto.multiply_gated.default" not in places(apart)  # small matrices stay sums


@pytest.mark.parametrize("between", BETWEEN)
def test_a_gate_with_anything_else_on_its_way_stays(between: str) -> None:
    first, second, row = torch.nn.Linear(16, 24), torch.nn.Linear(16, 24), torch.randn(1, 1, 16)
    with torch.no_grad():
        region = regions.trace(lambda x: [BETWEEN[between](first(x), second(x))], [row])
        made = lowering.lowered(region.graph, lambda *matrices: True)
        torch.testing.assert_close(made(*region.constants, row)[0], BETWEEN[between](first(row), second(row)))
    assert "impasto.multiply_several.default" in places(made)
    assert "impasto.multiply_gated.default" not in places(made)


def test_products_behind_products_in_shapes_that_are_turned() -> None:
    first, second, factor = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16), torch.tensor(2.0)

    def twice(row: Tensor, factor: Tensor) -> list[Tensor]:
        return [second(first(row).transpose(0, 1).reshape(1, 16)) * factor.transpose(0, 0)]

    with torch.no_grad():
        region = regions.trace(twice, [row := torch.randn(1, 16), factor])
        for made in (lowering.lowered(region.graph, lambda *matrices: True), lowering.lowered(region.graph)):
            torch.testing.assert_close(made(*region.constants, row, factor)[0], twice(row, factor)[0])


@pytest.mark.parametrize("which", [0, 1])
def test_a_gate_and_what_it_gates_have_biases_both_or_neither(which: int) -> None:
    row, matrix, bias = torch.randn(3, 16), torch.randn(3, 7, 16), torch.randn(3, 7)
    with pytest.raises(RuntimeError, match="biases both, or neither has"):
        rows.multiply_gated(row, matrix, matrix, *((bias, None), (None, bias))[which], "silu")


def test_an_activation_that_no_kernel_knows_stays() -> None:
    part, row = Gate(torch.tanh), torch.randn(1, 1, 16)
    with torch.no_grad():
        region = regions.trace(part, [row])
        made = lowering.lowered(region.graph, lambda *matrices: True)
        torch.testing.assert_close(made(*region.constants, row)[0], part(row)[0])
    assert "impasto.multiply_several.default" in places(made)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [*SHAPES, (24, 14, 2, 1024, 64, 64), (1, 32, 32, 4097, 128, 128), (1, 8, 1, 9000, 512, 512)]
)
def test_kernels_of_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = example(shape, dtype, "cuda")
    for name, mask in masks(shape, "cuda").items():
        got = rows.attend(*inputs, mask, 0.3).double()
        wanted = expected(*inputs, mask)
        error = float((got - wanted).norm() / wanted.norm())
        assert error < (1e-5 if dtype == torch.float32 else 1e-2), (name, error)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [100, 896, 4864])
@pytest.mark.parametrize("outputs", [(37,), (5003,), (37, 5), (896, 128, 128), (4864, 1)])
def test_kernels_of_products(outputs: tuple[int, ...], columns: int, bias: bool, dtype: torch.dtype) -> None:
    from impasto import streaming

    torch.manual_seed(0)
    row = torch.randn(12, columns, device="cuda").to(dtype)
    matrices = [torch.randn(12, n, columns, device="cuda").to(dtype) for n in outputs]
    biases = [torch.randn(12, n, device="cuda").to(dtype) for n in outputs] if bias else []
    for i, product in enumerate(streaming.multiply(row, matrices, biases)):
        wanted = (row[:, None].double() * matrices[i].double()).sum(-1) + (biases[i].double() if bias else 0)
        assert float((product.double() - wanted).norm() / wanted.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "bias"), [((12, 37, 100), True), ((3, 4864, 896), False), ((2, 1000, 4096), True)])
@pytest.mark.parametrize("activation", rows.ACTIVATIONS)
def test_kernels_of_gates(activation: str, shape: tuple[int, int, int], bias: bool, dtype: torch.dtype) -> None:
    from impasto import streaming

    torch.manual_seed(0)
    row = torch.randn(shape[0], shape[2], device="cuda").to(dtype)
    matrices = [torch.randn(shape, device="cuda").div(shape[2] ** 0.5).to(dtype) for _ in range(2)]
    biases = [torch.randn(shape[:2], device="cuda").to(dtype) for _ in range(2)] if bias else []
    (got,) = streaming.multiply(row, matrices, biases, activation)
    gate, other = (
        (row[:, None].double() * matrices[i].double()).sum(-1) + (biases[i].double() if bias else 0) for i in range(2)
    )
    wanted = rows.ACTIVATIONS[activation](gate) * other
    assert float((got.double() - wanted).norm() / wanted.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", rows.ACTIVATIONS)
def test_what_is_no_number_passes_through_kernels_of_gates(activation: str, dtype: torch.dtype) -> None:
    from impasto import streaming

    gates = torch.tensor([torch.nan, torch.inf, -20.0, 0.0, 20.0], device="cuda", dtype=dtype)[None, :, None]
    row = torch.ones(1, 1, device="cuda", dtype=dtype)
    (got,) = streaming.multiply(row, [gates, torch.ones_like(gates)], [], activation)
    torch.testing.assert_close(got[0], rows.ACTIVATIONS[activation](gates[0, :, 0]), equal_nan=True)

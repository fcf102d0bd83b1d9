"""Linear layers: which product a module computes with its weight, and how to run it as two thin ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Product = Literal["out_in", "in_out"]
_MARK = "_impasto_thin"


def product(owner: nn.Module, parameter: str) -> Product | None:
    """Which plain product a module computes with its weight, if that is all it does; found by trying it.

    Args:
        owner: the module that holds the weight.
        parameter: the weight's name, whose last part is its name in `owner`.

    Returns:
        "out_in" for `hidden @ weight.T + bias`, "in_out" for `hidden @ weight + bias`, None for anything else.
    """
    weight, bias = getattr(owner, "weight", None), getattr(owner, "bias", None)
    if not parameter.endswith("weight") or not isinstance(weight, Tensor) or any(True for _ in owner.children()):
        return None
    with torch.no_grad(), contextlib.suppress(AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        for form, matrix in (("out_in", weight), ("in_out", weight.mT)):
            hidden = torch.linspace(-1, 1, matrix.shape[1], device=weight.device, dtype=weight.dtype)[None]
            with contextlib.suppress(RuntimeError):  # of the wrong width
                output = type(owner).forward(owner, hidden)
                expected = F.linear(hidden, matrix, bias)
                scale = 64 * torch.finfo(weight.dtype).eps * float(expected.abs().max())
                if output.shape == expected.shape and bool((output - expected).abs().max() <= scale):
                    return "out_in" if form == "out_in" else "in_out"
    return None


@contextlib.contextmanager
def thin(owner: nn.Module, left: Tensor, right: Tensor, form: Product) -> Iterator[None]:
    """Run a linear layer with the weight `left @ right` as two products; its hooks run as always.

    Args:
        owner: a module for which `product` found a form.
        left: (rows, rank) of the weight as stored.
        right: (rank, columns).
        form: what `product` found.
    """
    first, second = (right, left) if form == "out_in" else (left.mT, right.mT)
    spare = -first.shape[0] % 16 if first.is_cuda else 0  # rows then begin where kernels can read them whole
    first = F.pad(first, (0, 0, 0, spare)).contiguous()
    second = F.pad(second, (0, spare)).contiguous()
    bias = getattr(owner, "bias", None)

    def forward(hidden: Tensor) -> Tensor:
        return F.linear(F.linear(hidden, first), second, bias)

    vars(forward)[_MARK] = True
    before: dict[str, Any] = {k: v for k, v in vars(owner).items() if k == "forward"}
    vars(owner)["forward"] = forward
    try:
        yield
    finally:
        vars(owner).pop("forward", None)
        vars(owner).update(before)


@contextlib.contextmanager
def by_weight(owner: nn.Module) -> Iterator[None]:
    """Run a layer that runs as two thin products by its own weight again, for the length of a `with` block."""
    forward = vars(owner).get("forward")
    if not getattr(forward, _MARK, False):
        yield
        return
    del vars(owner)["forward"]
    try:
        yield
    finally:
        vars(owner)["forward"] = forward

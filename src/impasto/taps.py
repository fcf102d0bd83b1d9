"""Listening to how a model calls its layers, with nothing of the model replaced.

A *tap* makes one layer's `__call__` go to a handler. The layer keeps its place, its parameters, its hooks and its
name in the state dict: only its class is swapped for a subclass of itself, and swapped back on leaving.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from impasto.errors import UnsupportedModel


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    # Not a function inside of `map`: one that calls itself is a cycle, which would keep what `change` holds (keys and
    # values of a whole batch) until the garbage collector comes by.
    if type(value) in (tuple, list):
        return type(value)(_mapped(member, change) for member in value)
    return change(value)


@dataclass(frozen=True, slots=True)
class Context:
    """How the model called one layer: everything but the hidden state, which can be put back in its place."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    name: str | None  # keyword of the hidden state, or None where it is the first positional argument

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Context]:
        """Take the hidden state out of a call; returns it and the rest."""
        if args and isinstance(args[0], Tensor):
            return args[0], cls(args[1:], kwargs, None)
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and value.dim() >= 2:
                return value, cls(args, {k: v for k, v in kwargs.items() if k != name}, name)
        raise UnsupportedModel("a layer is called without a tensor: no hidden state to schedule was found")

    def join(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments of the same call with `hidden` as its hidden state."""
        if self.name is None:
            return (hidden, *self.args), dict(self.kwargs)
        return self.args, {self.name: hidden, **self.kwargs}

    def map(self, change: Callable[[Any], Any]) -> Context:
        """The same context with `change` applied to every argument (and inside tuples and lists)."""
        kwargs = {name: _mapped(value, change) for name, value in self.kwargs.items()}
        return Context(tuple(_mapped(value, change) for value in self.args), kwargs, self.name)

    def values(self) -> Iterator[Any]:
        """Every argument, one after another."""
        yield from self.args
        yield from self.kwargs.values()


class Enough(Exception):
    """Ends a forward pass when everything that was wanted has been heard."""


Handler = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]


def hidden_of(output: Any) -> Tensor:
    """The hidden state in what a layer returns: the tensor itself, or the first member of a tuple."""
    hidden = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(hidden, Tensor):
        raise UnsupportedModel(f"a layer returns {type(hidden).__name__} where a hidden state was expected")
    return hidden


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two hidden states are one, or equal bit for bit (a model may copy or move them between layers)."""
    return one is other or (one.shape == other.shape and torch.equal(one, other.to(one.device)))


def real_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module as if it were not tapped: its hooks, checkpointing and device alignment run as always."""
    base = getattr(type(module), "_impasto_base", type(module))
    return base.__call__(module, *args, **kwargs)


@cache
def _tapped_class(base: type[nn.Module]) -> type[nn.Module]:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        handler, index = self.__dict__["_impasto_tap"]
        return handler(index, args, kwargs)

    return type(
        base.__name__,
        (base,),
        {
            "__call__": __call__,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "_impasto_base": base,
        },
    )


def handler_of(module: nn.Module) -> Handler | None:
    """What calls of a module are sent to now; None where it is not tapped."""
    tap: tuple[Handler, int] | None = module.__dict__.get("_impasto_tap")
    return tap and tap[0]


@contextlib.contextmanager
def tapped(modules: Sequence[nn.Module], handler: Handler) -> Iterator[None]:
    """Send every call of `modules[i]` to `handler(i, args, kwargs)` for the length of a `with` block.

    Taps nest: a module that is tapped already gets the inner handler, and the outer one back afterwards.

    Args:
        modules: distinct modules.
        handler: returns what the call shall return; `real_call` runs the module itself.
    """
    before: list[tuple[nn.Module, type, Any]] = []
    try:
        for index, module in enumerate(modules):
            before.append((module, type(module), module.__dict__.get("_impasto_tap")))
            base: Any = getattr(type(module), "_impasto_base", type(module))
            module.__dict__["_impasto_tap"] = (handler, index)
            module.__class__ = _tapped_class(base)
        yield
    finally:
        for module, kind, tap in reversed(before):
            module.__class__ = kind
            if tap is None:
                module.__dict__.pop("_impasto_tap", None)
            else:
                module.__dict__["_impasto_tap"] = tap

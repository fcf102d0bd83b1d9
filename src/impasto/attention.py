"""Attention of a decoding step by `impasto.rows`, for modules that ask transformers for torch's.

A recorded step attends over static slots and so has a mask, and with a mask transformers copies keys and values once
for every head that shares them, in every layer and step (its later versions do so for several queries only). Layers
look their attention up by a name in their config, and under a name of our own they find one that copies nothing.
Masks are made by transformers' function for torch's attention, so that they mean the same.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Sequence
from types import CodeType
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from impasto import rows

OURS, THEIRS = "impasto", "sdpa"
_KNOWN = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs"}
_OTHER = {"softcap", *inspect.signature(sdpa_attention_forward).parameters} - _KNOWN  # what rows.attention has not


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' `sdpa_attention_forward` computes, which is called for all but a single query per row.

    It is called, too, where no kernel of ours runs, and for what `impasto.rows.attention` does not know: dropout,
    gradients, and the arguments that `sdpa_attention_forward` has beside these. Others, such as sinks, are unknown to
    both.

    Args:
        module: asks.
        query: (batch, heads, queries, width).
        key: (batch, key heads, columns, width), where heads is a multiple of key heads.
        value: (batch, key heads, columns, width of a value).
        attention_mask: True where a query sees a column, or what is added to its score.
        dropout: share of weights that are left out.
        scaling: what scores are multiplied with; 1 / sqrt(width) where it is None.
        kwargs: whatever else a module says.

    Returns:
        (batch, queries, heads, width of a value), and no weights.
    """
    known = not dropout and not query.requires_grad and all(kwargs.get(name) is None for name in _OTHER)
    if query.shape[2] == 1 and known and rows.attended(query):
        mixed = rows.attention(query, key, value, attention_mask, scale=scaling)
        return mixed.transpose(1, 2).contiguous(), None
    given = {"dropout": dropout, "scaling": scaling, **kwargs}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **given)  # type: ignore[no-any-return]


AttentionInterface.register(OURS, attention)
AttentionMaskInterface.register(OURS, sdpa_mask)


def configs(model: nn.Module) -> tuple[Any, ...]:
    """The configs by which modules of a model take torch's attention from transformers' interface, each once.

    There are none where some code of the model names torch's attention itself. It would do something else under
    another name: there are layers that hide columns only from implementations they know of.
    """
    kinds = {type(module) for module in model.modules()}
    own = {base for kind in kinds for base in kind.__mro__} - set(PreTrainedModel.__mro__)
    if any(map(_names, own)):
        return ()
    asking = {kind for kind in kinds if _asks(kind)}
    found = [getattr(module, "config", None) for module in model.modules() if type(module) in asking]
    chosen = {id(one): one for one in found if getattr(one, "_attn_implementation", None) == THEIRS}
    return tuple(chosen.values())


def shares(model: nn.Module) -> bool:
    """Whether decoding steps of a model read keys by a kernel of ours, which needs no copy for each head."""
    return rows.attended(next(model.parameters())) and len(configs(model)) > 0


@contextlib.contextmanager
def shared(configs: Sequence[Any]) -> Iterator[None]:
    """Let modules with these configs take `attention` instead of torch's for the length of a `with` block.

    Configs that name another attention than torch's by now keep it.
    """
    chosen = [config for config in configs if config._attn_implementation == THEIRS]
    try:
        for config in chosen:  # not by the property, which changes configs inside this one as well
            config._attn_implementation_internal = OURS
        yield
    finally:
        for config in chosen:
            config._attn_implementation_internal = THEIRS


def _asks(kind: type) -> bool:
    """Whether modules of a class look their attention up in an interface in which torch's is transformers' own."""
    forward = inspect.unwrap(getattr(kind, "forward", None) or _asks)
    if not inspect.isfunction(forward):
        return False
    named = (forward.__globals__.get(name) for name in forward.__code__.co_names)
    return any(isinstance(x, AttentionInterface) and x.get(THEIRS) is sdpa_attention_forward for x in named)


def _names(kind: type) -> bool:
    """Whether the name of torch's attention stands in a class or beside it in the same file: in code, or in a list."""
    beside = vars(sys.modules[kind.__module__]) if kind.__module__ in sys.modules else {}
    return any(map(_says, (*vars(kind).values(), *beside.values())))


def _says(value: Any) -> bool:
    """Whether the name of torch's attention stands in a function, a method, a property or a collection."""
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, classmethod | staticmethod):
        value = value.__func__
    if inspect.isfunction(value):
        return THEIRS in _constants(inspect.unwrap(value).__code__)
    return isinstance(value, dict | list | set | tuple | frozenset) and any(
        isinstance(one, str) and one == THEIRS for one in value
    )


def _constants(code: CodeType) -> Iterator[Any]:
    """All constants in some code, those of functions inside it and members of tuples and sets included."""
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from _constants(value)
        elif isinstance(value, tuple | frozenset):
            yield from value
        else:
            yield value

"""Which rows of a fused projection make queries, keys and values; found by what they do, whatever their order.

Softmax attention gives each of the three away. With one token there is one weight, which is 1 whatever query and key
are: only values matter. With several, what one position adds reaches the later ones through its key and its value,
never through its query. So two backward passes through a block, from outputs that stand in for the projection's own,
tell every row's role. Then the roles are proved on outputs of the block, which must stay equal bit for bit.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from impasto.anatomy import Anatomy, probe_inputs, quietly
from impasto.errors import UnsupportedModel
from impasto.linear import product
from impasto.taps import Context, handler_of, hidden_of, real_call, tapped

Part = Literal["q", "k", "v"]
PARTS: tuple[Part, ...] = get_args(Part)
_POSITIONS = 5


@dataclass(frozen=True, eq=False)
class Fused:
    """A projection that makes queries, keys and values at once (or two of them).

    Attributes:
        axis: the side of the weight that its outputs lie along: 0 for (out, in), 1 for (in, out).
        outputs: for each part that is there, the indices of its outputs, rising.
    """

    axis: int
    outputs: Mapping[Part, Tensor]

    def take(self, weight: Tensor, part: Part) -> Tensor:
        """A copy of the part of a weight that makes queries, keys or values."""
        return weight.index_select(self.axis, self.outputs[part])

    def put(self, weight: Tensor, part: Part, values: Tensor) -> None:
        """Write a part back into the weight."""
        weight.index_copy_(self.axis, self.outputs[part], values)


_KNOWN: weakref.WeakKeyDictionary[nn.Module, Fused] = weakref.WeakKeyDictionary()


def fused(model: nn.Module, body: Anatomy, layer: int, parameter: str) -> Fused:
    """The parts of a fused projection; found once for each module.

    Args:
        model: the loaded model.
        body: its anatomy.
        layer: the layer that holds the projection.
        parameter: the weight's name inside the layer.

    Raises:
        UnsupportedModel: queries, keys and values cannot be told apart in this weight; says what was found.
    """
    owner = body.layers[layer].get_submodule(parameter.rpartition(".")[0])
    known = _KNOWN.get(owner)
    if known is None:
        known = _examine(model, body, layer, owner, parameter)
        _KNOWN[owner] = known
    return known


@contextlib.contextmanager
def unscheduled(
    model: nn.Module, body: Anatomy, listen: Callable[[int, Context, Tensor], None] = lambda *_: None
) -> Iterator[None]:
    """The layers in the model's own order for the length of a `with` block, whatever schedule is applied to it.

    Args:
        model: the loaded model.
        body: its anatomy.
        listen: told how each layer is called: its number, the call, the hidden state.
    """

    def call(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, context = Context.split(args, kwargs)
        listen(index, context, hidden)
        return real_call(body.layers[index], args, kwargs)

    owner = body.owner(model)
    hooks = {name: getattr(owner, name) for name in ("_forward_hooks", "_forward_pre_hooks")}
    scheduled = any(map(handler_of, body.layers))
    try:
        for name in hooks if scheduled else ():  # the schedule's own, which would miss its taps
            setattr(owner, name, OrderedDict())
        with tapped(body.layers, call):
            yield
    finally:
        vars(owner).update(hooks)


def _examine(model: nn.Module, body: Anatomy, layer: int, owner: nn.Module, parameter: str) -> Fused:
    where = f"{parameter.removesuffix('.weight')} of layer {layer}"
    form = product(owner, parameter)
    if form is None:
        raise UnsupportedModel(f"{where} is not a plain linear layer, so it has no parts q, k and v: edit it whole")
    axis = 0 if form == "out_in" else 1
    width = owner.get_parameter("weight").shape[axis]
    with torch.inference_mode(False), quietly(model), sdpa_kernel(SDPBackend.MATH):
        alone, along = (_Stage(model, body, layer, owner, width, length) for length in (1, _POSITIONS))
        single, reach = alone.influence(), along.influence()
        matters_alone, matters_later, matters_here = single[-1] != 0, (reach[:-1] != 0).any(0), reach[-1] != 0
        roles: dict[Part, Tensor] = {
            "q": matters_here & ~matters_later & ~matters_alone,
            "k": matters_later & ~matters_alone,
            "v": matters_later & matters_alone,
        }
        q, k, v = (int(roles[part].sum()) for part in PARTS)
        found = f"of its {width} outputs {q} act as queries, {k} as keys and {v} as values"
        if not (k == v > 0 and q % k == 0):
            raise UnsupportedModel(f"{where} has no parts q, k and v that can be told apart ({found}): edit it whole")
        scores = roles["q"] | roles["k"]
        proved = torch.equal(alone.last(), alone.last(scores)) and torch.equal(along.last(), along.last(roles["q"]))
        if not proved:
            raise UnsupportedModel(f"{where} does not treat its parts as attention does ({found}): edit it whole")
    return Fused(axis, MappingProxyType({part: role.nonzero()[:, 0] for part, role in roles.items() if role.any()}))


class _Stage:
    """One block, called as the model calls it for so many tokens, with outputs of our own for one projection."""

    def __init__(self, model: nn.Module, body: Anatomy, layer: int, owner: nn.Module, width: int, length: int) -> None:
        heard: list[tuple[Context, Tensor]] = []

        def listen(index: int, context: Context, hidden: Tensor) -> None:
            if index == layer:
                heard.append((context, hidden))

        options = {"use_cache": False} if "use_cache" in body.arguments else {}
        with unscheduled(model, body, listen):
            model(**probe_inputs(model, length), **options)
        self.context, hidden = heard[0]
        self.hidden = hidden[..., :length, :]
        self.block, self.owner = body.layers[layer], owner
        self.random = torch.Generator().manual_seed(length)
        self.values = self._draw(length, width)
        self.others = self._draw(length, width)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random).to(self.hidden)

    def _run(self, values: Tensor) -> Tensor:
        """The block's last position where the projection gives `values`."""

        def instead(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            mine = output.numel() == values.numel()  # else it is called with something that is not the tokens
            return values.reshape(output.shape).clone() if mine else output

        handle = self.owner.register_forward_hook(instead)
        try:
            args, kwargs = self.context.join(self.hidden)
            return hidden_of(real_call(self.block, args, kwargs))[..., -1, :]
        finally:
            handle.remove()

    def influence(self) -> Tensor:
        """How much each position and output of the projection moves the block's last position: (length, width)."""
        with torch.enable_grad():
            values = self.values.clone().requires_grad_()
            last = self._run(values)
            [slope] = torch.autograd.grad((last * self._draw(*last.shape)).sum(), values, materialize_grads=True)
        return slope

    def last(self, changed: Tensor | None = None) -> Tensor:
        """The block's last position; with other values of the outputs `changed` everywhere before it.

        A single position is the last one and changes itself.
        """
        values = self.values.clone()
        if changed is not None:
            values[: max(len(values) - 1, 1), changed] = self.others[: max(len(values) - 1, 1), changed]
        return self._run(values)

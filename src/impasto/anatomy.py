"""Where the layers of a loaded model are and how it calls them, found by structure and by listening once.

No model family is named here. The list of blocks is the `ModuleList` as long as the config says; one tiny forward
pass then tells what each layer returns, whether anything happens between layers, which of them use a KV cache, and
whether the model keeps state that a schedule of layers cannot express.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from impasto.errors import UnsupportedModel
from impasto.slots import SlotView
from impasto.taps import Context, hidden_of, real_call, same, tapped


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight matrix inside a block, by the name the model itself gives it there."""

    name: str  # e.g. "mlp.down_proj"
    shape: tuple[int, ...]  # as stored; 3 numbers for stacked experts

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True, eq=False)
class Anatomy:
    """What impasto knows of one loaded model's layers.

    Attributes:
        path: name of the list of blocks inside the model, e.g. "model.layers".
        layers: the blocks themselves, in the model's own order.
        returns: per layer, 0 where it returns the hidden state alone, else the length of the tuple it returns.
        cached: the model takes a KV cache.
        stateful: layers keep more than keys and values (a convolution's past, say) in the cache.
        arguments: names of the parameters of the model's `forward`.
    """

    path: str
    layers: tuple[nn.Module, ...]
    returns: tuple[int, ...]
    cached: bool
    stateful: bool
    arguments: frozenset[str]

    @property
    def depth(self) -> int:
        """How many layers the model has."""
        return len(self.layers)

    def owner(self, model: nn.Module) -> nn.Module:
        """The module whose forward walks the list of layers."""
        return model.get_submodule(self.path.rpartition(".")[0])

    def wrap(self, layer: int, hidden: Tensor) -> Any:
        """A hidden state in the form in which the model expects layer `layer` to return it."""
        length = self.returns[layer]
        return (hidden, *[None] * (length - 1)) if length else hidden

    def matrices(self, layer: int) -> tuple[Matrix, ...]:
        """The weight matrices of one layer, largest structures as the model stores them (experts stacked)."""
        return tuple(
            Matrix(name.removesuffix(".weight"), tuple(p.shape))
            for name, p in self.layers[layer].named_parameters()
            if p.dim() >= 2
        )

    def parameters(self, layer: int) -> int:
        """How many parameters one layer has."""
        return sum(p.numel() for p in self.layers[layer].parameters())


_STATES = frozenset({"cache_params", "mems", "state"})  # arguments by which models take what is not a KV cache
_KNOWN: weakref.WeakKeyDictionary[nn.Module, Anatomy] = weakref.WeakKeyDictionary()


def anatomy(model: nn.Module) -> Anatomy:
    """The anatomy of a loaded model; found once per model by one forward pass over a few tokens.

    Raises:
        UnsupportedModel: a schedule of layers cannot express what this model does; says what was found.
    """
    known = _KNOWN.get(model)
    if known is None or not _up_to_date(model, known):
        known = _examine(model)
        _KNOWN[model] = known
    return known


def _up_to_date(model: nn.Module, known: Anatomy) -> bool:
    try:
        layers = tuple(model.get_submodule(known.path).children())
    except AttributeError:
        return False
    return len(layers) == known.depth and all(a is b for a, b in zip(layers, known.layers, strict=True))


def text_config(model: nn.Module) -> Any:
    """The part of the model's config that describes its text stack."""
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedModel(f"{type(model).__name__} has no config: impasto schedules Hugging Face models")
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@dataclass(frozen=True)
class Heads:
    """The heads of a model's attention, the same in every layer.

    Attributes:
        queries: how many there are.
        keys: how many have keys and values of their own; others share them.
        width: numbers in a key.
    """

    queries: int
    keys: int
    width: int


def heads(model: nn.Module) -> Heads:
    """The heads of attention, by the model's config.

    Raises:
        UnsupportedModel: the config does not tell, or not one number for all layers.
    """
    config = text_config(model)
    queries = getattr(config, "num_attention_heads", None)
    keys = getattr(config, "num_key_value_heads", None) or queries
    size = getattr(config, "hidden_size", None)
    if not isinstance(queries, int) or not isinstance(keys, int):
        raise UnsupportedModel(f"the config of {type(model).__name__} has no one number of heads for all layers")
    width = getattr(config, "head_dim", None) or (size and size // queries)
    if not isinstance(width, int):
        raise UnsupportedModel(f"the config of {type(model).__name__} has no one width of heads for all layers")
    return Heads(queries, keys, width)


@contextlib.contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, every module's own mode put back afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def input_device(model: Any) -> torch.device:
    """Where the model wants its inputs, also when accelerate keeps its weights elsewhere."""
    embedding = None
    with contextlib.suppress(AttributeError, NotImplementedError):  # a model of images has none
        embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    places = [getattr(one, "execution_device", None) for one in getattr(hook, "hooks", (hook,))]
    execution = next((place for place in places if place is not None), None)
    if execution is not None:
        return torch.device("cuda", execution) if isinstance(execution, int) else torch.device(execution)
    weight: Tensor = next((model if embedding is None else embedding).parameters())
    return torch.device("cpu") if weight.device.type == "meta" else weight.device


@contextlib.contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """A module's own weights in memory for the length of a `with` block, also where accelerate keeps them elsewhere."""
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def split(tensor: Tensor) -> bool:
    """Whether a tensor is spread over several processes, as transformers' tensor parallelism does."""
    return hasattr(tensor, "device_mesh")


def end_tokens(*settings: Any) -> frozenset[int]:
    """The tokens that end a text, by whatever has an `eos_token_id`: one number, several in any form, or None."""
    known = [getattr(one, "eos_token_id", None) for one in settings]
    return frozenset(int(i) for ids in known if ids is not None for i in torch.as_tensor(ids).flatten().tolist())


def probe_inputs(model: nn.Module, length: int = 5) -> dict[str, Tensor]:
    """A tiny valid input: `length` token ids, or one grey ramp of an image.

    Raises:
        UnsupportedModel: the model takes neither token ids nor pixels.
    """
    name = getattr(model, "main_input_name", "input_ids")
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    config = text_config(model)
    if name == "input_ids":
        ids = 3 + torch.arange(length, device=device) * 7
        return {"input_ids": (ids % config.vocab_size)[None]}
    if name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        pixels = torch.linspace(-1, 1, config.num_channels * height * width, device=device)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        return {name: pixels.reshape(1, config.num_channels, height, width).to(dtype)}
    raise UnsupportedModel(f"{type(model).__name__} takes {name!r}; impasto can probe token ids and pixels only")


class _Spy(SlotView):
    """A cache that notes which of its methods a layer used."""

    def __init__(self, cache: Cache, slot: int, used: set[str]) -> None:
        super().__init__(cache, slot)
        self.__dict__["_used"] = used

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("update"):
            object.__getattribute__(self, "__dict__")["_used"].add(name)
        return super().__getattribute__(name)


def _examine(model: nn.Module) -> Anatomy:
    config = text_config(model)
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{kind} has two stacks of layers (an encoder and a decoder); a schedule describes one")
    depth = getattr(config, "num_hidden_layers", None)
    if not depth:
        raise UnsupportedModel(f"the config of {kind} does not say how many layers there are (num_hidden_layers)")
    lists = {
        name: tuple(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and any(True for _ in module.parameters())
    }
    if not lists:
        raise UnsupportedModel(
            f"{kind} has no list of {depth} layers: its blocks may be shared between depths or held in another form"
        )
    modules = [module for members in lists.values() for module in members]
    if len(set(map(id, modules))) != len(modules):
        raise UnsupportedModel(f"{kind} uses one and the same block at several depths; such layers have no number")
    heard = _Listener(modules)
    arguments = frozenset(inspect.signature(model.forward).parameters)
    if states := sorted(arguments & _STATES):
        raise UnsupportedModel(
            f"{kind} carries a state of its own from token to token ({', '.join(states)}); a slot per call is defined "
            "for keys and values only"
        )
    options: dict[str, Any] = {}
    cached = "past_key_values" in arguments
    if cached and "use_cache" in arguments:
        options["use_cache"] = True
    with quietly(model), tapped(modules, heard):
        _probe(model, options)
    starts = {name: heard.position(members[0]) for name, members in lists.items()}
    called = [name for name in lists if any(heard.position(m) in heard.order for m in lists[name])]
    if len(called) != 1:
        raise UnsupportedModel(
            f"{kind} calls {len(called)} lists of {depth} layers in one forward pass"
            + (f" ({', '.join(called)})" if called else "")
            + "; a schedule describes exactly one"
        )
    path, first = called[0], starts[called[0]]
    layers = lists[path]
    if heard.order != list(range(first, first + depth)):
        raise UnsupportedModel(
            f"{kind} does not call each of its {depth} layers once and in order (called: "
            f"{[i - first for i in heard.order]})"
        )
    heard.check_chain(kind, first)
    stateful = heard.check_state(kind, first, depth)
    body = Anatomy(
        path=path,
        layers=layers,
        returns=tuple(heard.returns[first + i] for i in range(depth)),
        cached=cached and heard.cache is not None,
        stateful=stateful,
        arguments=arguments,
    )
    _check_replay(model, body, heard.ends[-1][1])
    return body


def _probe(model: nn.Module, options: dict[str, Any]) -> None:
    """One forward pass over a few tokens."""
    inputs = probe_inputs(model)
    try:
        model(**inputs, **options)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UnsupportedModel(
            f"{type(model).__name__} does not run on a few {next(iter(inputs))} alone: {type(error).__name__}: {error}"
        ) from error


def _check_replay(model: nn.Module, body: Anatomy, expected: Tensor) -> None:
    """Calling all layers at the end, each as the model called it, must give what the model's own loop gives."""
    contexts: list[Context] = []
    results: list[Tensor] = []

    def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, context = Context.split(args, kwargs)
        contexts.append(context)
        if index == body.depth - 1:
            for layer, own in zip(body.layers, contexts, strict=True):
                args, kwargs = own.join(hidden)
                hidden = hidden_of(real_call(layer, args, kwargs))
            results.append(hidden)
        return body.wrap(index, hidden)

    with quietly(model), tapped(body.layers, record):
        _probe(model, {"use_cache": False} if "use_cache" in body.arguments else {})
    result, scale = results[0].float(), expected.abs().nan_to_num(0.0, 0.0, 0.0).max().item()  # weights may be broken
    tolerance = 64 * torch.finfo(expected.dtype).eps * scale
    if not torch.allclose(result, expected.float(), rtol=0, atol=tolerance, equal_nan=True):
        raise UnsupportedModel(
            f"{type(model).__name__} hands more than the hidden state from layer to layer, so its layers cannot run in "
            "another order"
        )


class _Listener:
    """Calls every layer as the model asks, and remembers what it saw."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.order: list[int] = []
        self.returns: dict[int, int] = {}
        self.used: dict[int, set[str]] = {}
        self.cache: Cache | None = None
        self.ends: list[tuple[Tensor, Tensor]] = []  # (in, out) of each call

    def position(self, module: nn.Module) -> int:
        return next(i for i, m in enumerate(self.modules) if m is module)

    def __call__(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, context = Context.split(args, kwargs)
        used = self.used.setdefault(index, set())

        def spy(value: Any) -> Any:
            if isinstance(value, Cache):
                self.cache = value
                return _Spy(value, len(self.order), used)
            return value

        args, kwargs = context.map(spy).join(hidden)
        output = real_call(self.modules[index], args, kwargs)
        self.order.append(index)
        self.returns[index] = len(output) if isinstance(output, tuple | list) else 0
        self.ends.append((hidden, hidden_of(output)))
        return output

    def check_chain(self, kind: str, first: int) -> None:
        """Each layer must read exactly what the layer before it wrote."""
        for i, ((_, out), (into, _)) in enumerate(zip(self.ends, self.ends[1:], strict=False)):
            if not same(into, out):
                raise UnsupportedModel(
                    f"{kind} changes the hidden state between layers {i} and {i + 1}, outside of any layer; "
                    "a schedule would lose that change"
                )
        if any(into.shape != out.shape for into, out in self.ends):
            raise UnsupportedModel(f"{kind} changes the shape of the hidden state inside a layer")

    def check_state(self, kind: str, first: int, depth: int) -> bool:
        """Refuse what slots cannot express; returns whether layers keep more than keys and values."""
        if self.cache is None:
            return False
        used = [self.used[first + i] for i in range(depth)]
        if any(used) and not all(used):
            silent = [i for i, names in enumerate(used) if not names]
            raise UnsupportedModel(
                f"layers {silent} of {kind} write no keys and values of their own: they read those of another layer, "
                "or keep a state of another form, so they cannot run in any order"
            )
        recurrent = [i for i, names in enumerate(used) if any("recurrent" in n or "ssm" in n for n in names)]
        if recurrent:
            raise UnsupportedModel(
                f"{kind} carries a recurrent state from token to token in layers {recurrent}; a slot per call is "
                "defined for keys and values only"
            )
        return any(names - {"update"} for names in used)

"""A recipe as a plain checkpoint: a folder that transformers, and whatever reads its folders, runs without impasto.

    from impasto.checkpoint import write

    write(loaded, Recipe.of("demo", "0:8 8 12:18", ["-1.mlp.*@0.1"], layers=18), "shorter")
    AutoModelForCausalLM.from_pretrained("shorter")

Such a folder can say "these layers, one after the other", with any numbers in their matrices, and nothing else. No
model family is named here: the config's depth changes, whatever it says layer by layer is put into the new order, and
a model without weights is built from it. That model must be made of the same layers as the original, and what was
written must compute what the recipe computes, or nothing is written.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from impasto.anatomy import Anatomy, anatomy, input_device, probe_inputs, quietly, split, text_config
from impasto.apply import worn
from impasto.errors import StoreError, UnsupportedModel, UsageError
from impasto.fetch import megabytes
from impasto.memory import ran_out
from impasto.models import LoadedModel, quiet
from impasto.recipe import Recipe
from impasto.runtime import scheduled
from impasto.schedule import Schedule
from impasto.steps import Call, Group, leaves

CLOSE = 1e-5  # of the largest logit: how far those of a checkpoint may be from the recipe's, in float32
HALF = 4  # the same in narrower dtypes, in units of their precision
SHORT, LONG = 24, 2_048  # tokens of the probe: as a rule, and at the most where layers differ in their window
_ENDS = 8  # positions whose logits are compared, where a model can be asked for the last ones alone
_LAYER = "layer"  # part of the names of what a config says of layers by their numbers


def plain(recipe: Recipe) -> str | None:
    """Why a recipe cannot be a plain checkpoint, whatever the model; None where it can.

    >>> plain(Recipe.of("demo", "0:4 {4,5} 6:18", layers=18))
    'it runs layers in parallel, and a plain checkpoint has one after the other'
    """
    if any(isinstance(step, Group) for step in recipe.schedule.steps):
        return "it runs layers in parallel, and a plain checkpoint has one after the other"
    if recipe.schedule.halves:
        return "it runs halves of layers, and a plain checkpoint has whole ones"
    return None


def obstacle(loaded: LoadedModel, recipe: Recipe) -> str | None:
    """Why a recipe cannot be a plain checkpoint of this model, as far as is seen without its weights; else None."""
    if (reason := plain(recipe)) is not None:
        return reason
    try:
        _planned(loaded.model, recipe.schedule)
    except UnsupportedModel as problem:
        return str(problem)
    return None


def nbytes(loaded: LoadedModel, schedule: Schedule) -> int:
    """Bytes of the weights of a schedule as a plain checkpoint: a layer counts once for each call."""
    model, layers = loaded.model, anatomy(loaded.model).layers
    sizes = [sum(parameter.nbytes for parameter in layer.parameters()) for layer in layers]
    whole: int = sum(parameter.nbytes for parameter in model.parameters())
    return whole - sum(sizes) + sum(sizes[call.layer] for call in leaves(schedule.steps))


def write(loaded: LoadedModel, recipe: Recipe, folder: str | Path) -> Path:
    """Write a recipe as a plain checkpoint: config, safetensors, and the tokenizer if there is one.

    Edits are carried out, and stand in the checkpoint as whole matrices of lower rank. A layer that runs twice is there
    twice. Weights that the model ties stay tied.

    The folder is filled at the end or not at all, its config last. What was written is loaded again on the model's
    device, so there are two models for a moment, and its logits for a few tokens must be the recipe's; where layers
    differ in their sliding window, for more tokens than that, up to `LONG`. Off by `CLOSE` of the largest logit is
    equal in float32, and by `HALF` times the dtype's precision in narrower ones.

    Args:
        loaded: the model; it is changed while this runs, and then as before.
        recipe: what to write.
        folder: a new folder, or an empty one.

    Returns:
        The folder.

    Raises:
        NotationError: the recipe does not fit the model.
        UsageError: the recipe is no series of whole layers, or there is something in the folder.
        UnsupportedModel: the model's config cannot say it, or its weights are not plain numbers in memory.
        StoreError: the folder cannot be written, or there is no room for it.
    """
    folder = Path(folder)
    recipe.check(loaded.layers)
    if (reason := plain(recipe)) is not None:
        raise UsageError(f"{recipe} cannot be a plain checkpoint: {reason}")
    try:
        plan = _planned(loaded.model, recipe.schedule)
    except UnsupportedModel as problem:
        raise UnsupportedModel(f"{recipe} cannot be a plain checkpoint: {problem}") from problem
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"there is something in {folder} already: a checkpoint needs a folder of its own")
        with _filled(folder) as draft:
            _check_room(folder, nbytes(loaded, recipe.schedule))
            with worn(loaded, recipe.edits) if recipe.edits else contextlib.nullcontext():
                _save(loaded, plan, draft)
                _verify(loaded, recipe, draft)
    except OSError as problem:
        raise StoreError(f"cannot write {folder}: {problem.strerror or problem}") from problem
    except SafetensorError as problem:
        raise StoreError(f"cannot write {folder}: {problem}") from problem
    return folder


# What the checkpoint is like ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """A checkpoint before its weights.

    Attributes:
        bare: the model, without weights.
        path: the list of its layers.
        order: for each of its layers the number in the original.
    """

    bare: Any
    path: str
    order: tuple[int, ...]

    def source(self, name: str) -> str:
        """The original's name of the tensor that the checkpoint calls `name`."""
        inside = f"{self.path}."
        if not name.startswith(inside):
            return name
        number, _, rest = name.removeprefix(inside).partition(".")
        return f"{inside}{self.order[int(number)]}.{rest}"


def _planned(model: Any, schedule: Schedule) -> _Plan:
    """The model that a checkpoint of a series would be.

    Raises:
        UnsupportedModel: there can be none.
    """
    _check_weights(model)
    body = anatomy(model)
    order = tuple(step.layer for step in schedule.steps if isinstance(step, Call))
    kind = type(model).__name__
    try:
        config = _config(model, body.depth, order)
        with torch.device("meta"):
            bare = type(model)(config)
        layers = tuple(bare.get_submodule(body.path))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as problem:
        text = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
        raise UnsupportedModel(f"the config of {kind} cannot say it: {text}") from problem
    if text_config(bare).num_hidden_layers != len(order) or len(layers) != len(order):
        raise UnsupportedModel(f"the config of {kind} does not set how many layers there are")
    plan = _Plan(bare, body.path, order)
    if (difference := _different(model, body, plan, layers)) is not None:
        raise UnsupportedModel(difference)
    return plan


def _check_weights(model: nn.Module) -> None:
    """Make sure that all weights are plain numbers in memory."""
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise UnsupportedModel(f"{name} is not in memory (its weights are offloaded): load the model on one device")
        if split(parameter):
            raise UnsupportedModel(f"{name} is split over several processes: load the model on one device")
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            raise UnsupportedModel(f"{name} is stored packed or quantised: load the model unquantised")
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise UnsupportedModel(f"{type(model).__name__} is quantised: load the model unquantised")


def _config(model: Any, depth: int, order: tuple[int, ...]) -> Any:
    """The model's config with other layers, as one gets it from the file that it is written to."""
    config, text = model.config, text_config(model)
    data = config.to_dict()
    section = data
    if text is not config:
        part = next((name for name, value in vars(config).items() if value is text), None)
        if part is None:
            raise UnsupportedModel(f"the config of {type(model).__name__} has its text part deeper than one level")
        section = data[part]
    for name, value in section.items():
        section[name] = _reordered(name, value, depth, order)
    section[getattr(text, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")] = len(order)
    return type(config).from_dict(data)


def _reordered(name: str, value: Any, depth: int, order: tuple[int, ...]) -> Any:
    """What a config says under one name, for other layers.

    Three forms are known: one entry for each layer; numbers of layers in ascending order; entries by layers' numbers.
    """
    numbers = _LAYER in name
    if isinstance(value, list | tuple):
        if numbers and _ascending(value, depth):
            return type(value)(new for new, old in enumerate(order) if old in value)
        if len(value) == depth and not name.endswith(("_token_id", "_token_ids")):
            return type(value)(value[old] for old in order)
    if isinstance(value, Mapping) and value and numbers and all(str(key).isdecimal() for key in value):
        entries = {int(key): entry for key, entry in value.items()}
        return {new: entries[old] for new, old in enumerate(order) if old in entries}
    return value


def _ascending(values: list[Any] | tuple[Any, ...], depth: int) -> bool:
    """Whether these are numbers of layers, each greater than the one before it."""
    numbers = all(type(value) is int and 0 <= value < depth for value in values)
    return bool(values) and numbers and list(values) == sorted(set(values))


def _different(model: nn.Module, body: Anatomy, made: _Plan, layers: tuple[nn.Module, ...]) -> str | None:
    """In what the bare model is not made of the original's layers: tensors, modules, and what these were told."""
    tensors: Mapping[str, Tensor] = model.state_dict()
    wanted: Mapping[str, Tensor] = made.bare.state_dict()
    inside = f"{made.path}."
    called = tuple(f"{inside}{old}." for old in made.order)
    needed = {name for name in tensors if not name.startswith(inside) or name.startswith(called)}
    lost = needed - set(map(made.source, wanted))
    for name, tensor in wanted.items():
        origin = made.source(name)
        if origin not in tensors:
            return f"{name} has no counterpart: the config does not say which layer is of which kind"
        if tensors[origin].shape != tensor.shape:
            where = "layers differ in size" if name.startswith(inside) else "its size depends on the number of layers"
            return f"{name} has another shape ({_shape(tensor)}) than {origin} ({_shape(tensors[origin])}): {where}"
    if lost:
        return f"{min(lost)} would be lost: the config does not say which layer is of which kind"
    for new, (old, layer) in enumerate(zip(made.order, layers, strict=True)):
        if (difference := _unlike(layer, new, body.layers[old], old)) is not None:
            return f"layer {new} would not be like layer {old}: {difference}"
    return None


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def _unlike(made: nn.Module, new: int, origin: nn.Module, old: int) -> str | None:
    """In what two layers differ beside their weights; that each knows its own number is no difference."""
    ours, theirs = dict(made.named_modules()), dict(origin.named_modules())
    if names := sorted(ours.keys() ^ theirs.keys()):
        return f"only one of them has {names[0]}"
    for name, module in ours.items():
        here, there = _facts(module), _facts(theirs[name])
        for key in sorted(here.keys() | there.keys()):
            mine, its = here.get(key), there.get(key)
            number = type(mine) is type(its) is int and (mine, its) == (new, old)  # False and True are none
            if mine != its and not number:
                return f"{'.'.join(filter(None, (name, key)))} is {mine!r} and not {its!r}"
    return None


def _facts(module: nn.Module) -> dict[str, Any]:
    """What a module was told when it was made: its class, and plain values under public names."""
    told = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and isinstance(value, bool | int | float | str | None)
    }
    return told | {"class": type(module).__name__}


# What is written ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _filled(folder: Path) -> Iterator[Path]:
    """A place for what a folder is to hold: inside of it, so on its disk. What is there at the end is moved up."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as draft:
            yield Path(draft)
            for part in sorted(Path(draft).iterdir(), key=lambda part: part.name == CONFIG_NAME):
                part.replace(folder / part.name)
    except BaseException:
        if new:
            with contextlib.suppress(OSError):  # what went wrong matters more
                folder.rmdir()
        raise


def _check_room(folder: Path, need: int) -> None:
    """Refuse before writing what the disk has no room for."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise StoreError(
            f"a checkpoint in {folder} needs {megabytes(need)}, and {megabytes(free)} are free: give another folder "
            "(for temporary ones, set TMPDIR)"
        )


def _save(loaded: LoadedModel, plan: _Plan, folder: Path) -> None:
    """Fill the bare model and write it. Tensors are the original's own; only those of a repeated layer are copied."""
    model, bare = loaded.model, plan.bare
    tensors: Mapping[str, Tensor] = model.state_dict()
    inside, seen = f"{plan.path}.", set()
    filled = {}
    for name in bare.state_dict():
        origin = plan.source(name)
        again = name.startswith(inside) and origin in seen
        filled[name] = tensors[origin].to("cpu", copy=True) if again else tensors[origin]
        seen.add(origin)
    bare.load_state_dict(filled, assign=True)
    bare.tie_weights()
    settings = getattr(model, "generation_config", None)
    try:
        with quiet():
            bare.save_pretrained(folder)
            if settings is not None:  # as they are: transformers runs some that it refuses to save
                settings.to_json_file(folder / GENERATION_CONFIG_NAME)
            if loaded.tokenizer is not None:
                loaded.tokenizer.save_pretrained(folder)
    except (RuntimeError, ValueError) as problem:
        if ran_out(problem):
            raise
        raise UnsupportedModel(f"transformers does not save {type(model).__name__}: {problem}") from problem
    bare.to("meta")  # the weights are no longer needed, and the plan may live on


def _verify(loaded: LoadedModel, recipe: Recipe, folder: Path) -> None:
    """Load what was written, and compare it with the recipe run by impasto; the edits are worn."""
    model = loaded.model
    arguments = anatomy(model).arguments
    inputs = {**probe_inputs(model, _length(loaded)), **_asked(arguments)}
    with quietly(model), scheduled(model, recipe.schedule):
        expected = _first(model(**inputs))
    dtype = next(model.parameters()).dtype
    attention = getattr(model.config, "_attn_implementation", None)
    with quiet():
        made, report = type(model).from_pretrained(
            folder, dtype=dtype, use_safetensors=True, attn_implementation=attention, output_loading_info=True
        )
    if lost := sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"]))):  # also of what the probe skips
        raise UnsupportedModel(f"transformers does not find {lost[0]} in what it saved of {type(model).__name__}")
    made = made.to(input_device(model)).eval()
    with quietly(made):
        found = _first(made(**inputs))
    scale = max(1.0, expected.abs().nan_to_num(0.0, 0.0, 0.0).max().item())
    share = CLOSE if dtype.itemsize >= 4 else HALF * torch.finfo(dtype).eps
    if not torch.allclose(found, expected, rtol=0, atol=share * scale, equal_nan=True):
        raise UnsupportedModel(
            f"{recipe} cannot be a plain checkpoint of {type(model).__name__}: as one, its logits are off by up to "
            f"{(found - expected).abs().max().item():.2g} (the largest is {scale:.2g}), since layers know more of "
            "their place than the config says"
        )


def _length(loaded: LoadedModel) -> int:
    """Tokens of the probe: so many that it shows which layers have a sliding window, if that is not too many."""
    config = text_config(loaded.model)
    window = getattr(config, "sliding_window", None)
    several = len(set(getattr(config, "layer_types", None) or ())) > 1
    if several and isinstance(window, int) and SHORT < window + _ENDS <= LONG:
        return min(window + _ENDS, loaded.window)
    return min(SHORT, loaded.window)


def _asked(arguments: frozenset[str]) -> dict[str, Any]:
    options: dict[str, Any] = {"use_cache": False, "logits_to_keep": _ENDS}
    return {name: value for name, value in options.items() if name in arguments}


def _first(output: Any) -> Tensor:
    """A model's logits, or the hidden state of one without a head."""
    first: Tensor = output[0]
    return first.float()

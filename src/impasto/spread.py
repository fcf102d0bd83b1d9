"""Weights where they are needed: each process of a team keeps the layers that it calls, or loads no others.

    team = join()
    loaded = load_share("some/model", "0:8 {8:24} 24:32", team)
    with scheduled(loaded.model, "0:8 {8:24} 24:32", team=team) as model:
        model.generate(**inputs)

Run it with `torchrun --nproc-per-node 2 script.py`. Without this module the same works with models that are whole in
every process.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from impasto.anatomy import Anatomy, anatomy, heads
from impasto.errors import UnsupportedModel, UsageError
from impasto.halves import find_halves
from impasto.models import LoadedModel, load
from impasto.schedule import Schedule
from impasto.shares import by_size, plan
from impasto.teams import Processes, Team, is_split, mark_split, planned

_DIMS = {"colwise": 0, "rowwise": 1}  # of a linear layer's weight, by transformers' name for the split
_WHOLE = ("replicate", "replicated_with_grad_allreduce")  # names for what every process keeps
_WHICH = ("revision", "trust_remote_code")  # options of `load` that say which model
_PLACING = ("device", "device_map", "max_memory", "offload_folder", "tp_plan")  # options of `load` that say where


def keep(model: nn.Module, schedule: Schedule | str, team: Team) -> int:
    """Free the weights of all layers that this process does not call under `schedule`.

    From then on the model serves this schedule in this team, and schedules of layers that it has kept. Weights that a
    freed layer has in common with others stay.

    Returns:
        How many bytes were freed.

    Raises:
        NotationError: the schedule does not fit this model.
        UnsupportedModel: the model's layers cannot be scheduled, or a block cannot be halved.
    """
    body = anatomy(model)
    return _free(model, body, _needed(model, body, Schedule.fitting(schedule, body.depth), team))


def split(model: nn.Module, schedule: Schedule | str, team: Team) -> int:
    """Split the weights of the layers that all processes call, as the model's own tensor parallel plan says.

    Each process keeps its rows or columns of every matrix. Such a layer costs two sums over the processes, one behind
    its attention and one behind its MLP, and a share of the reading; the members of groups stay whole. So is the head
    split, unless it is one with the embeddings or cannot be divided; that costs one sum of all logits. From then on
    the model serves schedules in which these layers run in series, in this team.

    Returns:
        How many bytes were freed.

    Raises:
        NotationError: the schedule does not fit this model.
        UsageError: the model was split before.
        UnsupportedModel: the model has no plan, or one of other parts than rows and columns, or sizes that do not
            divide by the number of processes.
    """
    body = anatomy(model)
    schedule = Schedule.fitting(schedule, body.depth)
    _needed(model, body, schedule, team)
    if any(map(is_split, body.layers)):
        raise UsageError("the layers of this model are split already: load it again to split others")
    common = sorted(planned(body, schedule, team.size).common)
    if not common:
        return 0
    freed = 0
    for linear, dim in _parts(model, body, common, team.size):
        freed += _divide(linear, dim, team)
        if dim == 1:
            linear.register_forward_hook(lambda _, given, output: team.sum(output))
    for layer in common:
        mark_split(body.layers[layer])
    head = _own_head(model, team.size)
    if head is None:
        return freed
    freed += _divide(head, 0, team)
    before, after = team.rank * head.out_features, (team.size - 1 - team.rank) * head.out_features
    head.register_forward_hook(lambda _, given, output: team.sum(F.pad(output, (before, after))))
    return freed


def load_share(ref: str | Path, schedule: Schedule | str, team: Processes, **options: Any) -> LoadedModel:
    """A language model without the layers that this process does not call under `schedule`.

    Their weights are read from their files once, one layer at a time, to find out how the model calls its layers; the
    device never holds more than the share and one layer.

    Args:
        ref: a local folder or a hub id.
        schedule: what the team will play.
        team: the processes, as `join` gives them.
        options: of `impasto.models.load`, except those that place the model.

    Raises:
        UsageError: options that place the model.
        UnsupportedModel: the layers cannot be found, or cannot be scheduled.
        UnknownModel, FetchError, OutOfMemory: as `impasto.models.load`.
    """
    from accelerate.hooks import remove_hook_from_submodules

    if given := sorted(set(options) & set(_PLACING)):
        raise UsageError(f"{given[0]} says where weights go, and so does the schedule of a team: leave it out")
    path, sizes, outside = _skeleton(ref, {name: options[name] for name in _WHICH if name in options})
    schedule = Schedule.fitting(schedule, len(sizes))
    own = plan(schedule, team.size, by_size(sizes)).layers(team.rank)
    here: str | int = "cpu" if team.device.type == "cpu" else team.device.index
    places: dict[str, str | int] = dict.fromkeys(outside, here)
    places |= {f"{path}.{layer}": here if layer in own else "disk" for layer in range(len(sizes))}
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(ref, device_map=places, offload_folder=folder, **options)
        body = anatomy(loaded.model)
        needed = _needed(loaded.model, body, schedule, team)
        remove_hook_from_submodules(loaded.model)
    _free(loaded.model, body, needed)
    return loaded


def _needed(model: nn.Module, body: Anatomy, schedule: Schedule, team: Team) -> frozenset[int]:
    """The layers that this process calls, after learning all that only a whole model can tell."""
    mine = planned(body, schedule, team.size)
    find_halves(model, body, mine.steps[team.rank])
    return mine.layers(team.rank)


def _parts(model: nn.Module, body: Anatomy, layers: list[int], size: int) -> list[tuple[nn.Linear, int]]:
    """The products to split in these layers, each with the dimension of its weight."""
    kind, found = type(model).__name__, list[tuple[nn.Linear, int]]()
    prefix = f"{body.path}.*."
    rules = {n.removeprefix(prefix): s for n, s in (getattr(model, "tp_plan", None) or {}).items() if prefix in n}
    if not rules:
        raise UnsupportedModel(f"{kind} has no tensor parallel plan: its layers in series stay whole in every process")
    keys = heads(model).keys
    if keys % size:
        raise UnsupportedModel(f"{keys} heads of keys cannot be split over {size} processes")
    for name, style in rules.items():
        if style in _WHOLE:
            continue
        for layer in layers:
            module = dict(body.layers[layer].named_modules()).get(name)
            dim = _DIMS.get(style)
            if dim is None or (module is not None and not isinstance(module, nn.Linear)):
                raise UnsupportedModel(f"{kind} splits {name} as {style!r}; rows and columns of matrices can be split")
            if isinstance(module, nn.Linear):
                if module.weight.shape[dim] % size:
                    raise UnsupportedModel(f"{name} of layer {layer} cannot be split into {size} equal parts")
                found.append((module, dim))
    return found


def _own_head(model: nn.Module, size: int) -> nn.Linear | None:
    """The head, if it has weights of its own that divide by so many processes."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or head.weight is embeddings.weight or head.out_features % size:
        return None
    return head


def _divide(linear: nn.Linear, dim: int, team: Team) -> int:
    """Leave this process's rows (dim 0) or columns (dim 1) of a product; returns the bytes freed."""
    before = sum(p.nbytes for p in linear.parameters())
    for name, parameter in list(linear.named_parameters()):
        if dim == 0 or name == "weight":
            setattr(linear, name, _part(parameter, dim, team))
        elif team.rank:
            setattr(linear, name, None)  # the first process adds it
    linear.out_features, linear.in_features = linear.weight.shape
    return before - sum(p.nbytes for p in linear.parameters())


def _part(parameter: nn.Parameter, dim: int, team: Team) -> nn.Parameter:
    """This process's rows (dim 0) or columns (dim 1), in memory of their own."""
    width = parameter.shape[dim] // team.size
    own = parameter.detach().narrow(dim, team.rank * width, width).clone()
    return nn.Parameter(own, requires_grad=parameter.requires_grad)


def _free(model: nn.Module, body: Anatomy, needed: frozenset[int]) -> int:
    """Put empty parameters in the place of those that only other layers have; returns their bytes."""
    gone = [layer for number, layer in enumerate(body.layers) if number not in needed]
    inside = [module for layer in gone for module in layer.modules()]
    known = set(map(id, inside))
    used = {id(p) for m in model.modules() if id(m) not in known for p in m.parameters(recurse=False)}
    empty: dict[int, nn.Parameter] = {}
    freed = 0
    for module in inside:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in used or parameter.is_meta:
                continue
            if id(parameter) not in empty:
                freed += parameter.nbytes
                empty[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            setattr(module, name, empty[id(parameter)])
    for layer in gone:
        layer.register_forward_pre_hook(_refuse)
    return freed


def _refuse(layer: nn.Module, given: Any) -> None:
    raise UsageError(
        "the weights of this layer were left to other processes: run the model under the schedule of its team, "
        "`scheduled(model, schedule, team=team)`"
    )


def _skeleton(ref: str | Path, which: dict[str, Any]) -> tuple[str, list[int], list[str]]:
    """Name of the list of layers, the size of each, and the names of all parts outside, without any weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(ref, **which)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as problem:
        raise UnsupportedModel(f"{ref} is no folder or hub name of a language model: {problem}") from problem
    depth = config.get_text_config().num_hidden_layers
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth}
    if len(lists) != 1:
        raise UnsupportedModel(f"{ref} has {len(lists)} lists of {depth} layers: load it whole, then `keep` a share")
    ((path, layers),) = lists.items()
    outside = [n for n, m in model.named_modules() if n and not list(m.children()) and not n.startswith(f"{path}.")]
    return path, [sum(p.numel() for p in layer.parameters()) for layer in layers], outside

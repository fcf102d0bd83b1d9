"""The weight matrices of a model's blocks: what they are called, where they are stored, who else uses them.

A matrix is found by structure and called as the model itself calls it inside its block. Where a block stacks its
experts in one tensor (experts, m, n), each expert is a matrix of its own. A fused projection is a matrix, and so are
the parts of it that make queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from impasto.anatomy import Anatomy, split
from impasto.edit import Edit
from impasto.errors import UnsupportedModel, UsageError
from impasto.fused import PARTS, Fused, Part, fused


@dataclass(frozen=True, slots=True)
class Site:
    """One matrix of a model.

    Attributes:
        layer: the layer it is in.
        parameter: name of the parameter inside the block.
        expert: which one of a stack; None where the parameter is one matrix.
        part: which part of a fused projection; None for all of it.
    """

    layer: int
    parameter: str
    expert: int | None = None
    part: Part | None = None

    @property
    def name(self) -> str:
        """What it is called inside its block."""
        return self.names[0]

    @property
    def names(self) -> tuple[str, ...]:
        """What an edit may call it, its own name first.

        The expert 2 of a stack `mlp.experts.up_proj` is `mlp.experts.up_proj.2`, also `mlp.experts.2.up_proj` as in
        a model that keeps its experts apart; the stack's name means all of them.
        """
        name = self.parameter.removesuffix(".weight")
        if self.part is not None:
            return (f"{name}.{self.part}",)
        if self.expert is None:
            return (name,)
        owner, _, last = name.rpartition(".")
        apart = f"{owner}.{self.expert}.{last}" if owner else f"{self.expert}.{last}"
        return f"{name}.{self.expert}", apart, name

    def __str__(self) -> str:
        return f"{self.name} of layer {self.layer}"


def sites(block: nn.Module, layer: int) -> Iterator[Site]:
    """Every matrix of a block that linear layers multiply with, experts one by one, fused projections whole."""
    for name, parameter in block.named_parameters(remove_duplicate=False):
        owner = block.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding):
            continue
        stacks = {own.shape[0] for own in owner.parameters(recurse=False) if own.dim() == 3}
        if parameter.dim() == 2 and parameter.shape[0] not in stacks:  # else one vector for each expert
            yield Site(layer, name)
        elif parameter.dim() == 3:
            yield from (Site(layer, name, expert) for expert in range(parameter.shape[0]))


def matched(model: nn.Module, body: Anatomy, edit: Edit) -> tuple[Site, ...]:
    """The matrices that an edit names.

    Parts of fused projections are looked for only in layers where the name matches no whole matrix: `self_attn.*`
    means the projection, `self_attn.qkv_proj.*` its three parts.

    Raises:
        NotationError: the edit names a layer that does not exist.
        UsageError: nothing of that name.
        UnsupportedModel: what has that name is packed, or has no such parts.
    """
    edit.check(body.depth)
    found: list[Site] = []
    refusal: UnsupportedModel | None = None
    for layer in edit.layers:
        here = list(sites(body.layers[layer], layer))
        if whole := [site for site in here if any(map(edit.matches, site.names))]:
            found += whole
            continue
        for site in here:
            wanted = [part for part in PARTS if site.expert is None and edit.matches(f"{site.name}.{part}")]
            try:
                outputs = fused(model, body, layer, site.parameter).outputs if wanted else {}
            except UnsupportedModel as problem:
                refusal = refusal or problem
            else:
                found += [replace(site, part=part) for part in wanted if part in outputs]
    if found:
        return tuple(found)
    if refusal is not None:
        raise refusal
    _check_packed(body, edit)
    raise UsageError(_nothing(body, edit))


def parts(model: nn.Module, body: Anatomy, site: Site) -> Fused | None:
    """The parts of the projection that a site is one of; None where the site is a whole matrix."""
    return None if site.part is None else fused(model, body, site.layer, site.parameter)


def shape(model: nn.Module, body: Anatomy, site: Site) -> tuple[int, int]:
    """The two sides of a matrix, as stored."""
    rows, columns = body.layers[site.layer].get_parameter(site.parameter).shape[-2:]
    fused = parts(model, body, site)
    if fused is None or site.part is None:
        return rows, columns
    count = len(fused.outputs[site.part])
    return (count, columns) if fused.axis == 0 else (rows, count)


def check_rank(model: nn.Module, body: Anatomy, edit: Edit, sites: Sequence[Site]) -> None:
    """Make sure that an edit's rank is not above the full rank of every matrix that it names.

    Where only some are smaller, as of all matrices of a layer, these keep all that they have.

    Raises:
        UsageError: it is.
    """
    if edit.rule.kind not in ("rank", "whitened_rank") or edit.rule.value is None:
        return
    shapes = {site: shape(model, body, site) for site in sites}
    largest = max(sites, key=lambda site: min(shapes[site]))
    if edit.rule.value > min(shapes[largest]):
        rows, columns = shapes[largest]
        raise UsageError(
            f"{edit} asks for {edit.rule.value} components, but {largest} ({rows} x {columns}) has "
            f"{min(rows, columns)}; @1 keeps all of them"
        )


def place(parameter: Tensor) -> Hashable:
    """Where a tensor's numbers are: equal for two parameters that are one and the same memory."""
    data = parameter.data
    if type(data) is not Tensor or data.device.type == "meta" or not data.data_ptr():
        return id(parameter)
    return str(data.device), data.data_ptr(), data.dtype, tuple(data.shape), data.stride()


def holders(model: nn.Module) -> dict[Hashable, list[tuple[str, nn.Parameter]]]:
    """All names of each tensor of a model with the parameters they name, by `place`; tied weights have several."""
    found: dict[Hashable, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(place(parameter), []).append((name, parameter))
    return found


def check(parameter: nn.Parameter, site: Site) -> None:
    """Make sure that a weight is plain numbers in memory.

    Raises:
        UnsupportedModel: it is packed, quantised, split over processes or offloaded.
    """
    if parameter.device.type == "meta":
        raise UnsupportedModel(f"{site} is not in memory (its weights are offloaded): load the model on one device")
    if split(parameter):
        raise UnsupportedModel(
            f"{site} is split over several processes (tensor parallel): load the model on one device, or with "
            "device_map, to edit it"
        )
    plain = type(parameter) in (nn.Parameter, Tensor) and type(parameter.data) is Tensor
    if not plain or not _wide(parameter):
        kind = str(parameter.dtype).removeprefix("torch.") if plain else type(parameter).__name__
        raise UnsupportedModel(_packed(str(site), kind))


def _wide(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() >= 2


def _packed(what: str, kind: str) -> str:
    return f"{what} is stored packed or quantised ({kind}): load the model unquantised to edit it"


def _check_packed(body: Anatomy, edit: Edit) -> None:
    """Refuse an edit whose name is that of a module with packed weights, which are no matrices to be found."""
    for layer in edit.layers:
        block = body.layers[layer]
        for name, tensor in (*block.named_parameters(), *block.named_buffers()):
            module = name.rpartition(".")[0]
            packed = not _wide(tensor) and tensor.dtype is not torch.bool and tensor.dim() >= 2
            if packed and any(map(edit.matches, (name, module))):
                raise UnsupportedModel(_packed(f"{module} of layer {layer}", str(tensor.dtype).removeprefix("torch.")))


def _nothing(body: Anatomy, edit: Edit) -> str:
    """That an edit matches nothing, and what it may have meant."""
    names = dict.fromkeys(name for i in edit.layers for site in sites(body.layers[i], i) for name in site.names)
    ends = {name.rpartition(".")[2]: name for name in names}
    near = [name for name in names if name.startswith(f"{edit.matrix}.")] or get_close_matches(
        edit.matrix, names, 3, 0.5
    )
    near += [ends[end] for end in get_close_matches(edit.matrix.rpartition(".")[2], ends, 3, 0.6)]
    listed = list(dict.fromkeys(near)) or [name for name in names if not any(map(str.isdigit, name.split(".")))]
    layers = f"layer {edit.layers[0]}" if len(edit.layers) == 1 else f"layers {edit.layers[0]}..{edit.layers[-1]}"
    return f"{edit} matches no matrix of {layers}; " + (
        f"nearest: {', '.join(listed)}" if listed else "there is none that is stored as plain numbers"
    )

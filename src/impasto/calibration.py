"""What matrices are multiplied with: second moments of their inputs, gathered from a few texts.

    >>> calibration = calibrate(model, ["20:28.mlp.*@0.1w"], tokenizer=tokenizer)      # doctest: +SKIP
    >>> with edited(model, ["27.mlp.down_proj@0.1w"], calibration=calibration): ...    # doctest: +SKIP

The model runs as it is, layers in its own order, and every product of two matrices that PyTorch carries out is looked
at: where one of them is the memory of a weight that is asked for, the other is its input. So it makes no difference
how a module is written: linear layers, transposed ones, experts in a list, in a stack, or in a grouped product.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from impasto.anatomy import Anatomy, anatomy, input_device, quietly
from impasto.edit import Edit
from impasto.errors import UnsupportedModel, UsageError
from impasto.fused import unscheduled
from impasto.matrices import Site, check, matched
from impasto.reduction import Inputs
from impasto.svd import read_tensors, write_tensors

TEXTS: tuple[str, ...] = (
    "The river had been rising since noon. By evening it covered the lower road, and the two brothers carried the "
    "sheep, one after the other, up to the stone barn on the hill. Nobody in the village slept much that night.",
    "Photosynthesis takes place in the chloroplasts of plant cells. Light splits water into oxygen, protons and "
    "electrons; the energy that is won is stored in two molecules, which later drive the making of sugar from carbon "
    "dioxide. About half of it on Earth is done by plankton in the sea.",
    "Question: Which city is the capital of Portugal?\nAnswer: Lisbon\n\nQuestion: Who wrote the play Hamlet?\nAnswer: "
    "William Shakespeare\n\nQuestion: How many legs does a spider have?\nAnswer: eight\n\nQuestion: What is the "
    "chemical symbol of iron?\nAnswer: Fe",
    "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n    if len(ordered) % 2:\n"
    "        return ordered[middle]\n    return (ordered[middle - 1] + ordered[middle]) / 2\n",
    '"Are you coming or not?" asked Maria. "The last train leaves at ten past eight, and I won\'t wait again." He '
    'looked at his watch, then at the half-packed suitcase on the bed. "Five minutes," he said. "Just five."',
    "A shop sells pencils at 3 for 2 dollars. Tom needs 18 pencils. 18 / 3 = 6, so he buys 6 sets. 6 x 2 = 12. He pays "
    "with a 20 dollar note and gets 20 - 12 = 8 dollars back.",
    "The treaty was signed in 1648 after five years of talks in two towns. It ended a war that had drawn in most of "
    "the continent's powers, and it is often said to mark the beginning of the modern system of states, although "
    "historians have long argued about how much of that is true.",
    "Preheat the oven to 200 degrees. Mix 300 g of flour with a teaspoon of salt, rub in the butter, and add cold "
    "water until the dough holds together. Let it rest for half an hour in the fridge. Then roll it out, not too "
    "thin, and line a round tin with it.",
)


@dataclass(frozen=True, eq=False)
class Calibration:
    """The inputs of some matrices of one model, as second moments.

    Attributes:
        inputs: what each matrix was multiplied with; parts of fused projections have those of the whole.
        tokens: how many tokens were read.
        fingerprint: sixteen hexadecimal digits for what was read; edits with w are the same only where it is.
    """

    inputs: Mapping[Site, Inputs]
    tokens: int
    fingerprint: str

    def of(self, site: Site) -> Inputs:
        """The inputs of one matrix.

        Raises:
            UsageError: the calibration was made without it.
        """
        found = self.inputs.get(_whole(site))
        if found is None:
            raise UsageError(f"this calibration was made without {site}: make one with the same edits")
        return found


def calibrate(
    model: nn.Module,
    edits: Iterable[Edit | str],
    texts: Iterable[str | Sequence[int] | Mapping[str, Tensor]] = TEXTS,
    *,
    tokenizer: Any = None,
    length: int = 512,
    folder: Path | None = None,
    weights: str = "",
) -> Calibration:
    """Run texts through a model and gather the inputs of the matrices that edits name.

    Args:
        model: a Hugging Face model; it runs as it is, without any schedule that is applied to it at the moment.
        edits: values or texts; the matrices of those with a whitened rule are listened to.
        texts: texts, token numbers, or what the model takes by name, without padding. The default is eight short
            English texts of different kinds, about 500 tokens; for a task, texts of that kind serve it better.
        tokenizer: for texts.
        length: tokens of one text that are read; the rest is left out.
        folder: where moments are kept between runs. Needs `weights`.
        weights: what names the model's weights, such as `LoadedModel.setting.weights`.

    Raises:
        NotationError: an edit cannot be read, or names a layer that does not exist.
        UsageError: no tokenizer for texts, padded inputs, no texts at all, or a matrix that does not exist.
        UnsupportedModel: a matrix is not in memory, or its inputs were never seen.
    """
    if folder is not None and not weights:
        raise UsageError("to keep a calibration, say which weights it is of: weights=loaded.setting.weights")
    body = anatomy(model)
    batches = [_batch(text, tokenizer, length) for text in texts]
    if not batches:
        raise UsageError("a calibration needs at least one text")
    tokens = sum(next(iter(batch.values())).shape[:2].numel() for batch in batches)
    read = _digest(batches)
    values = [Edit.parse(edit, body.depth) if isinstance(edit, str) else edit for edit in edits]
    asked = [edit for edit in values if edit.rule.kind in ("whitened", "whitened_rank")]
    sites = dict.fromkeys(_whole(site) for edit in asked for site in matched(model, body, edit))
    files = {site: _file(folder, weights, read, site) for site in sites} if folder is not None else {}
    known = {site: inputs for site, path in files.items() if (inputs := _read(path)) is not None}
    lacking = [site for site in sites if site not in known]
    for site, inputs in zip(lacking, _listen(model, body, lacking, batches) if lacking else (), strict=True):
        known[site] = inputs
        if site in files:
            header = torch.tensor([inputs.axis, inputs.count])
            write_tensors(files[site], {"moment": inputs.moment, "axis_count": header})
    return Calibration(MappingProxyType(known), tokens, read[:16])


def _whole(site: Site) -> Site:
    return Site(site.layer, site.parameter, site.expert)


def _batch(text: str | Sequence[int] | Mapping[str, Tensor], tokenizer: Any, length: int) -> dict[str, Tensor]:
    if isinstance(text, Mapping):
        mask = text.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            raise UsageError("inputs of a calibration come without padding, since padding would be counted as input")
        return {name: value for name, value in text.items() if name != "attention_mask"}
    if isinstance(text, str):
        if tokenizer is None:
            raise UsageError("texts of a calibration need the model's tokenizer: calibrate(..., tokenizer=...)")
        text = tokenizer(text)["input_ids"]
    if not len(text):
        raise UsageError("a text of a calibration is empty")
    return {"input_ids": torch.tensor([list(text)[:length]])}


def _digest(batches: Sequence[Mapping[str, Tensor]]) -> str:
    digest = hashlib.sha256(b"inputs 1\n")
    for batch in batches:
        for name, value in sorted(batch.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _file(folder: Path, weights: str, read: str, site: Site) -> Path:
    name = hashlib.sha256(f"{weights}\n{read}\n{site!r}".encode()).hexdigest()[:32]
    return folder / f"{name}-inputs.safetensors"


def _read(path: Path) -> Inputs | None:
    known = read_tensors(path, torch.device("cpu"))
    if known is None or known.keys() != {"moment", "axis_count"}:
        return None
    axis, count = known["axis_count"].tolist()
    return Inputs(known["moment"], axis, count)


def _listen(
    model: nn.Module, body: Anatomy, sites: Sequence[Site], batches: Iterable[Mapping[str, Tensor]]
) -> Iterator[Inputs]:
    """Run the batches, layers in the model's own order, and hear what each of the matrices is multiplied with."""
    ears: list[_Ear] = []
    for site in sites:
        parameter = body.layers[site.layer].get_parameter(site.parameter)
        check(parameter, site)
        ears.append(_Ear(parameter.data if site.expert is None else parameter.data[site.expert]))
    options = {"use_cache": False} if "use_cache" in body.arguments else {}
    device = input_device(model)
    with quietly(model), unscheduled(model, body), _Listening(ears):
        for batch in batches:
            model(**{name: value.to(device) for name, value in batch.items()}, **options)
    heard = {(site.layer, site.parameter) for site, ear in zip(sites, ears, strict=True) if ear.axis is not None}
    for site, ear in zip(sites, ears, strict=True):
        if (site.layer, site.parameter) not in heard:
            raise UnsupportedModel(
                f"{site} was never seen in a product of two matrices, so its inputs are not known: use a rule "
                "without w for it"
            )
        yield ear.heard()


class _Ear:
    """Hears one matrix (rows, columns), which lies in memory row by row."""

    def __init__(self, matrix: Tensor) -> None:
        self.address, self.shape, self.strides = matrix.data_ptr(), tuple(matrix.shape), matrix.stride()
        self.axis: int | None = None
        self.count = 0
        self.moment: Tensor | None = None

    def side(self, view: Tensor, dim: int) -> int | None:
        """Which side of the matrix lies along dimension `dim` of `view`; None if `view` is another matrix."""
        if view.data_ptr() != self.address:
            return None
        for axis in (1, 0):
            sides = (axis, 1 - axis) if dim == 0 else (1 - axis, axis)
            same = all(view.shape[d] == self.shape[s] for d, s in enumerate(sides))
            if same and all(view.shape[d] == 1 or view.stride(d) == self.strides[s] for d, s in enumerate(sides)):
                return axis
        return None

    def add(self, inputs: Tensor, axis: int) -> None:
        """Count inputs (tokens, width) that were multiplied along side `axis`."""
        plain = inputs.detach().float()
        moment = plain.mT @ plain
        wide = moment if moment.device.type == "mps" else moment.double()
        self.moment = wide if self.moment is None else self.moment + wide
        self.axis, self.count = axis, self.count + len(inputs)

    def heard(self) -> Inputs:
        """All of it; for an expert that no token was sent to, nothing."""
        axis = 1 if self.axis is None else self.axis
        moment = torch.zeros(self.shape[axis], self.shape[axis]) if self.moment is None else self.moment
        return Inputs(moment.cpu().float(), axis, self.count)


class _Listening(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, every product of two matrices is looked at for those that somebody has an ear for."""

    def __init__(self, ears: Sequence[_Ear]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ears: dict[int, list[_Ear]] = {}
        for ear in ears:
            self._ears.setdefault(ear.address, []).append(ear)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm", "_grouped_mm", "grouped_mm_fallback"):
            self._product(args[0], args[1], *args[2:3])
        elif name in ("addmm", "baddbmm"):
            self._product(args[1], args[2])
        elif name == "linear":
            self._product(args[0].flatten(0, -2), args[1].mT)
        return function(*args, **(kwargs or {}))

    def _product(self, left: Tensor, right: Tensor, ends: Tensor | None = None) -> None:
        """Look at one product, or at each of a batch of them; `ends` part the rows of `left` among the `right`."""
        if ends is not None and left.dim() == 2 and right.dim() == 3:
            for (start, stop), one in zip(pairwise([0, *ends.tolist()]), right, strict=True):
                self._pair(left[start:stop], one)
        elif left.dim() == right.dim() == 3:
            for one, other in zip(left, right, strict=True):
                self._pair(one, other)
        elif left.dim() == right.dim() == 2:
            self._pair(left, right)

    def _pair(self, left: Tensor, right: Tensor) -> None:
        for ear in self._ears.get(right.data_ptr(), ()):
            if len(left) and (axis := ear.side(right, 0)) is not None:
                ear.add(left, axis)
        for ear in self._ears.get(left.data_ptr(), ()):
            if right.shape[1] and (axis := ear.side(left, 1)) is not None:
                ear.add(right.mT, axis)

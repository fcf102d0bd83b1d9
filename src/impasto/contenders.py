"""What a bench times: a recipe made ready for one case, and run in it again and again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from impasto.anatomy import Anatomy, anatomy, quietly, text_config
from impasto.calibration import calibrate
from impasto.edit import Edit
from impasto.errors import UnsupportedModel, UsageError
from impasto.fast import Decoder, fast
from impasto.fetch import cache_root
from impasto.halves import find_halves, halves
from impasto.hardware import Watch, peak_memory
from impasto.models import LoadedModel
from impasto.pieces import Compile
from impasto.recipe import Recipe
from impasto.runtime import scheduled
from impasto.schedule import Schedule
from impasto.steps import Call, leaves
from impasto.surgery import Touched, edited
from impasto.taps import tapped
from impasto.timings import Case, Demand, How

WORDS = (3, 256)  # range of the tokens that prompts are made of: plain ones in every vocabulary
_CUT = ("keep", "rank")  # rules whose factors have shapes that do not depend on the weights' values


def unread(case: Case, loaded: LoadedModel) -> str | None:
    """Why a model cannot read a case; None where it can."""
    if case.context + case.new_tokens <= loaded.window:
        return None
    return f"{case.context:,} + {case.new_tokens:,} tokens are more than the model's window of {loaded.window:,}"


@dataclass(frozen=True, eq=False)
class Job:
    """A case with its prompts: `ids` (batch, context), on the model's device."""

    case: Case
    ids: Tensor

    @classmethod
    def of(cls, case: Case, loaded: LoadedModel, seed: int = 0) -> Job:
        """Random prompts, the same for every contender and in every run.

        Raises:
            UsageError: the case is longer than what the model can read.
        """
        if (reason := unread(case, loaded)) is not None:
            raise UsageError(reason)
        size = loaded.model.get_input_embeddings().num_embeddings
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(WORDS[0], min(WORDS[1], size), (case.batch, case.context), generator=generator)
        return cls(case, ids.to(loaded.device))


@dataclass(frozen=True, slots=True)
class Ready:
    """What it took to make a contender ready; see `impasto.timings.Timing` for the fields."""

    build: Mapping[str, float] = field(default_factory=dict)
    memory: int | None = None
    demand: Demand | None = None
    notes: tuple[str, ...] = ()


class Contender(Protocol):
    """A recipe and a way to run it. Several of them are ready at a time, on one loaded model."""

    recipe: Recipe
    how: How

    def ready(self, job: Job) -> Ready:
        """Build what is needed for a case, and run it once."""

    def run(self, prefills: int, steps: int) -> tuple[list[float], list[float]]:
        """Read the prompts `prefills` times, then make `steps` tokens after the first; milliseconds of each."""

    def close(self) -> None:
        """Give back what `ready` took."""


class Outfit:
    """The edits of a recipe carried out once, to be put on and taken off in no time.

    Args:
        loaded: the model; inside the constructor it is changed for a moment.
        edits: what to carry out. Cut matrices run as two thin products. Their components come from random
            projection: a product's time depends on its shape alone.

    Attributes:
        touched: the matrices that are changed.
        notes: what is to be said of the edits.
    """

    def __init__(self, loaded: LoadedModel, edits: Sequence[Edit]) -> None:
        self.touched: tuple[Touched, ...] = ()
        self.notes: tuple[str, ...] = ()
        self._data: list[tuple[nn.Parameter, Tensor]] = []
        self._forwards: list[tuple[nn.Module, Any]] = []
        if not edits:
            return
        model = loaded.model
        before = {id(parameter): parameter.data_ptr() for parameter in model.parameters()}
        own = {id(module): vars(module).get("forward") for module in model.modules()}
        with _edited(loaded, edits) as report:
            self.touched, self.notes = report.touched, report.notes
            self._data = [(p, p.data) for p in model.parameters() if p.data_ptr() != before[id(p)]]
            self._forwards = [
                (module, vars(module)["forward"])
                for module in model.modules()
                if vars(module).get("forward") is not own[id(module)]
            ]

    @contextlib.contextmanager
    def worn(self, *, thin: bool = True) -> Iterator[None]:
        """The model with its edits, for the length of a `with` block; its cut matrices whole if not `thin`."""
        with contextlib.ExitStack() as undo:
            for parameter, data in self._data:
                undo.callback(setattr, parameter, "data", parameter.data)
                parameter.data = data
            for module, forward in self._forwards if thin else ():
                undo.callback(_put_back, module, vars(module).get("forward"))
                vars(module)["forward"] = forward
            yield


def _put_back(module: nn.Module, forward: Any) -> None:
    vars(module).pop("forward", None)
    if forward is not None:
        vars(module)["forward"] = forward


def _edited(loaded: LoadedModel, edits: Sequence[Edit]) -> AbstractContextManager[Any]:
    calibration = None
    if any(edit.rule.kind in ("whitened", "whitened_rank") for edit in edits):
        kept, weights = cache_root() / "calibration", loaded.setting.weights
        calibration = calibrate(loaded.model, edits, tokenizer=loaded.tokenizer, folder=kept, weights=weights)
    if all(edit.rule.kind in _CUT for edit in edits):
        return edited(loaded.model, edits, svd="lowrank", niter=1, form="factored")
    return edited(loaded.model, edits, form="factored", calibration=calibration)


class _Own:
    """What impasto's two ways of running a recipe share."""

    how: How

    def __init__(self, loaded: LoadedModel, recipe: Recipe, outfit: Outfit, watch: Watch) -> None:
        self.loaded = loaded
        self.model: Any = loaded.model
        self.recipe = recipe
        self.outfit = outfit
        self.watch = watch
        self.body = written(self.model)
        find_halves(self.model, self.body, recipe.schedule.steps)

    def count(self, case: Case, keys: float) -> Demand:
        """What the case demands; `keys` are the bytes of keys and values that a step reads."""
        return demand(self.model, self.body, self.recipe, self.outfit.touched, case, keys)


def written(model: nn.Module) -> Anatomy:
    """The anatomy of a model that writes text.

    Raises:
        UnsupportedModel: this one does not.
    """
    body = anatomy(model)
    if not body.cached or model.get_output_embeddings() is None:  # type: ignore[operator]
        raise UnsupportedModel(
            f"{type(model).__name__} does not write text: it is no causal language model with a KV cache"
        )
    return body


class Plain(_Own):
    """A recipe as `scheduled` runs it, with a cache that grows; the untouched model runs without a schedule."""

    how: How = "plain"

    def ready(self, job: Job) -> Ready:
        """Run the case once."""
        self.job = job
        began = time.perf_counter()
        with peak_memory(self.loaded.device) as peak:
            cache = self._texts(1, min(job.case.new_tokens - 1, 3))[2]
        keys = sum(
            tensor.nbytes
            for layer in cache.layers
            for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if isinstance(tensor, Tensor)
        )
        need = self.count(job.case, keys)
        memory = None if peak.bytes is None else need.weights + peak.bytes
        return Ready({"warm-up": time.perf_counter() - began}, memory, need, self.outfit.notes)

    def run(self, prefills: int, steps: int) -> tuple[list[float], list[float]]:
        """The case once more."""
        return self._texts(prefills, steps)[:2]

    def close(self) -> None:
        """Nothing is held."""

    def _texts(self, prefills: int, steps: int) -> tuple[list[float], list[float], DynamicCache]:
        watch, ids = self.watch, self.job.ids
        untouched = self.recipe.schedule == Schedule.identity(self.body.depth)
        ttft: list[float] = []
        schedule = nullcontext() if untouched else scheduled(self.model, self.recipe.schedule)
        with quietly(self.model), self.outfit.worn(), schedule:
            for _ in range(prefills):
                cache = DynamicCache(config=text_config(self.model))
                watch.wait()
                before = watch.mark()
                tokens = self._next(ids, cache)
                ttft += watch.between([before, watch.mark()])
            marks = [watch.mark()]
            for _ in range(steps):
                tokens = self._next(tokens, cache)
                tokens.tolist()  # whoever writes a text looks at each token
                marks.append(watch.mark())
        return ttft, watch.between(marks), cache

    def _next(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        asked: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
        if "logits_to_keep" in self.body.arguments:
            asked["logits_to_keep"] = 1
        chosen: Tensor = self.model(**asked).logits[:, -1:].argmax(-1)
        return chosen


class Fast(_Own):
    """A recipe as `fast` compiles it. What was recorded is replayed after others have had the model.

    Args:
        loaded: the model.
        recipe: what to run.
        outfit: its edits.
        watch: the device's time.
        compile: see `impasto.fast.fast`; where a model refuses to be compiled, it is recorded as it is.
    """

    how: How = "fast"

    def __init__(
        self, loaded: LoadedModel, recipe: Recipe, outfit: Outfit, watch: Watch, compile: Compile = "off"
    ) -> None:
        super().__init__(loaded, recipe, outfit, watch)
        self.compile = compile
        self.decoder: Decoder | None = None

    def ready(self, job: Job) -> Ready:
        """Compile, record, and run the case once."""
        self.job = job
        notes = self.outfit.notes
        with peak_memory(self.loaded.device) as peak:
            try:
                report = self._build(self.compile)
            except UnsupportedModel as problem:
                if self.compile == "off":
                    raise
                report = self._build("off")
                notes = (*notes, f"not compiled: {problem}")
        case = job.case
        filled = (case.context + case.new_tokens / 2) / (case.context + case.new_tokens)
        need = self.count(case, report.slot_bytes * filled)
        memory = None if peak.bytes is None else need.weights + peak.bytes
        return Ready(report.seconds, memory, need, (*notes, *report.notes))

    def _build(self, compile: Compile) -> Any:
        case = self.job.case
        context = case.context + case.new_tokens
        with (
            self.outfit.worn(),
            fast(
                self.model, self.recipe.schedule, batch=case.batch, context=context, buckets=[context], compile=compile
            ) as decoder,
        ):
            decoder.prefill(self.job.ids)
            for _ in range(min(case.new_tokens - 1, 3)):
                decoder.step()
            self.watch.wait()
            self.decoder = decoder
            return decoder.report

    def run(self, prefills: int, steps: int) -> tuple[list[float], list[float]]:
        """Replay what was recorded; what was not runs as it did then, on the tapped model."""
        assert self.decoder is not None
        watch, decoder, program = self.watch, self.decoder, self.decoder.program
        ttft: list[float] = []
        with quietly(self.model), self.outfit.worn(), tapped(program.body.layers, program.player):
            for _ in range(prefills):
                watch.wait()
                before = watch.mark()
                decoder.prefill(self.job.ids)
                ttft += watch.between([before, watch.mark()])
            marks = [watch.mark()]
            for _ in range(steps):
                decoder.step()
                marks.append(watch.mark())
            return ttft, watch.between(marks)

    def close(self) -> None:
        """Forget recordings and slots."""
        self.decoder = None


def demand(model: Any, body: Anatomy, recipe: Recipe, touched: Sequence[Touched], case: Case, keys: float) -> Demand:
    """What a recipe makes the device do at the least.

    Weights are read once for every call of their layer, whatever the batch; all experts of a layer count. Attention
    over a prompt is counted with the width of the hidden state for that of all heads.

    Args:
        model: the model.
        body: its anatomy.
        recipe: what runs.
        touched: matrices that are cut; those that run as thin products count with their factors.
        case: rows, prompt, new tokens.
        keys: bytes of keys and values that one step reads.
    """
    size = next(p for p in model.parameters() if p.is_floating_point()).element_size()
    spared: dict[int, int] = {}
    for one in touched:
        if one.form == "factored" and one.rank is not None:
            rows, columns = one.shape
            spared[one.layer] = spared.get(one.layer, 0) + rows * columns - one.rank * (rows + columns)

    def numbers(call: Call) -> int:
        block = body.layers[call.layer]
        if call.half != "whole":
            half = halves(model, body, call.layer)
            block = block.get_submodule((half.attention if call.half == "attn" else half.mlp).name)
            return sum(p.numel() for p in block.parameters())
        return sum(p.numel() for p in block.parameters()) - spared.get(call.layer, 0)

    calls = list(leaves(recipe.schedule.steps))
    called = {call.layer for call in calls}
    layers = sum(map(numbers, calls))
    head = model.get_output_embeddings().weight
    held = sum(p.nbytes for p in model.parameters())
    held -= sum(p.nbytes for i, block in enumerate(body.layers) if i not in called for p in block.parameters())
    held -= size * sum(spared.get(layer, 0) for layer in called)
    read = layers * size + head.nbytes
    tokens = case.batch * case.context
    attention = 2.0 * len(calls) * head.shape[-1] * tokens * case.context
    return Demand(
        weights=held,
        step_bytes=round(read + keys),
        step_flops=2.0 * case.batch * (layers + head.numel()),
        prompt_bytes=round(read + keys),
        prompt_flops=2.0 * (tokens * layers + case.batch * head.numel()) + attention,
    )

"""A recipe compiled for decoding: static slots, one recorded sequence of kernels per step, branches side by side.

    with fast(model, "0:8 {8:16} 16:24", batch=1, context=1024) as decoder:
        decoder.generate([[1, 5, 9]], max_new_tokens=100)

One step is everything from the last token to the next: embedding, masks, rotary tables, every layer call, final norm,
head, the likeliest token, and the bookkeeping for the step after it. It is the model's own code that runs, once, while
its kernels are recorded; replaying them costs the processor nothing. On a device without recording the same step is
called as it is.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from impasto.anatomy import Anatomy, anatomy, end_tokens, heads, input_device, probe_inputs, quietly, split, text_config
from impasto.attention import shares
from impasto.calibration import Calibration
from impasto.edit import Edit
from impasto.errors import UnsupportedModel, UsageError
from impasto.generation import Size
from impasto.graphs import Backend, Cuda, Eager, Work
from impasto.halves import find_halves
from impasto.pieces import Compile, Pieces
from impasto.program import Program
from impasto.runtime import Player
from impasto.schedule import Schedule
from impasto.stacks import Stacks
from impasto.surgery import edited
from impasto.taps import handler_of, tapped
from impasto.teams import Team, absent, own_steps

SMALLEST_BUCKET = 256  # columns
LEAST = 4  # columns: a prompt and three tokens are compared with the plain runtime
PROBE = 12  # tokens of the prompt on which a decoder is compared with the plain runtime
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # relative error of logits; 0.1 for shorter numbers
PROMPT_SIZES = (16, 32, 64, 128, 256, 512)  # longer prompts keep the device busy unrecorded
_PROBLEMS = (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)
Branches = Literal["stacked", "streams", "series"]
# What was measured on one GPU, for layers as the model has them: seconds that a recorded step saves per layer call;
# what recording takes, in all and per layer call; bytes per second of keys and values that are copied for every head.
SAVED, RECORDING, CHECKING, COPIED = 6e-4, 0.5, 5e-3, 7.5e11
POLL = 16  # steps between two looks at whether all rows have ended


@dataclass(frozen=True)
class Report:
    """What it took to compile a decoder.

    Attributes:
        schedule: the schedule that runs.
        batch: rows.
        context: columns of every slot.
        slots: how many layer calls keep keys and values.
        slot_bytes: bytes of all slots.
        streams: how many streams branches run on, beside the main one.
        regions: layer calls, embedding and head that run compiled.
        kernels: how many different compiled graphs serve them.
        seconds: wall-clock seconds of "check", "trace", "compile" and "record", as far as they happened.
        error: largest relative error of logits against the plain runtime, on a prompt of `PROBE` tokens.
        notes: what was asked for and could not be had, and why.
    """

    schedule: str
    batch: int
    context: int
    slots: int = 0
    slot_bytes: int = 0
    streams: int = 0
    regions: int = 0
    kernels: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    error: float = 0.0
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def fast(
    model: Any,
    schedule: Schedule | str | None = None,
    edits: Iterable[Edit | str] = (),
    *,
    batch: int = 1,
    context: int = 1024,
    buckets: Sequence[int] | None = None,
    prompt_sizes: Sequence[int] | None = None,
    capture: bool | None = None,
    branches: Branches = "stacked",
    compile: Compile = "off",
    options: Mapping[str, Any] | None = None,
    team: Team | None = None,
    calibration: Calibration | None = None,
) -> Iterator[Decoder]:
    """Compile `model` under a recipe for greedy decoding, for the length of a `with` block.

    Inside, the model itself must not be called; use the decoder. Edits that leave few components run as two thin
    products. On leaving, the model is as before, bit for bit.

    Args:
        model: a causal language model, or what `load` gave.
        schedule: which layers run; None keeps the model's own order.
        edits: changes of weight matrices.
        batch: rows that are decoded together.
        context: the most tokens a row may hold, prompt and answer together.
        buckets: numbers of columns that attention sees; a step takes the smallest that holds its row. Each is
            recorded when it is first needed. By default 256, 512, ... up to `context`; `context` alone if compiled.
        prompt_sizes: lengths to which prompts are padded on the right, recorded when first needed; longer prompts run
            unrecorded, as they are. None takes 16 to 512 where kernels are recorded, else nothing.
        capture: record CUDA graphs; None does so where the model is on a CUDA device.
        branches: "stacked" runs branches of equal structure as one, on stacked weights, where they are compiled; the
            model's weights are moved for that, not copied. Other branches, and with "streams" all of them, run on
            streams of their own; with "series" one after another.
        compile: "inductor" compiles embedding, layers and head with torch's compiler, layers of equal structure once;
            "traced" runs the same graphs operation by operation (for tests); "off" records the modules as they are.
        options: settings of torch's compiler.
        team: processes that share the members of parallel groups, as `impasto.teams.join` gives them; each has a
            decoder of its own, and all make the same calls at the same time. The sums that end groups are recorded
            with everything else.
        calibration: inputs of the matrices, for edits with w.

    Raises:
        UsageError: sizes and names that cannot be, a device that cannot record, or a team that does not play the same.
        UnsupportedModel: the model keeps more than keys and values, reads values of tensors while it runs, or its
            steps differ from the plain runtime's.
        NotationError: a text that cannot be read, or that does not fit this model.
    """
    live: nn.Module = model if isinstance(model, nn.Module) else model.model
    if batch < 1 or context < LEAST:
        raise UsageError(f"a decoder has at least one row and {LEAST} columns, not {batch} and {context}")
    for name, value, known in (("compile", compile, Compile), ("branches", branches, Branches)):
        if value not in get_args(known):
            raise UsageError(f"{name} is one of {', '.join(map(repr, get_args(known)))}, not {value!r}")
    device = input_device(live)
    if capture is None:
        capture = device.type == "cuda"
    if capture and device.type != "cuda":
        raise UsageError(f"kernels are recorded on CUDA devices only, and this model is on {device}: capture=False")
    backend: Backend = Cuda(device, parallel=branches != "series") if capture else Eager()
    edits = list(edits)
    with contextlib.ExitStack() as stack:
        stack.enter_context(quietly(live))
        body = _supported(live)
        schedule = Schedule.identity(body.depth) if schedule is None else Schedule.fitting(schedule, body.depth)
        if edits:
            find_halves(live, body, own_steps(body, schedule, team))
            stack.enter_context(edited(live, edits, form="factored", calibration=calibration))
        if buckets is None:
            buckets = [context] if compile != "off" else _doubling(SMALLEST_BUCKET, context)
        sizes = tuple(sorted({min(size, context) for size in buckets} | {context}))
        if prompt_sizes is None:
            prompt_sizes = PROMPT_SIZES if capture else ()
        widths = tuple(sorted({min(size, context) for size in prompt_sizes}))
        program = Program(live, body, schedule, device, backend, batch, context, team)
        stack.enter_context(tapped(body.layers, program.player))
        stacks = Stacks(live) if branches == "stacked" else None
        if stacks is not None:
            stack.callback(stacks.close)
        decoder = Decoder(program, backend, sizes, widths, stacks)
        decoder.prepare(compile, dict(options or {}))
        yield decoder


def pays(model: nn.Module, schedule: Schedule | str, size: Size) -> bool:
    """Whether so much work is surely shorter with a recording than without, the recording included.

    Small layers keep a GPU waiting for the host, which recording ends; large ones gain less than is assumed here, but
    with them a step takes so long that recording is short beside it. Answers may end early, so half of the steps count.
    Static slots need a mask, with which models copy keys that heads share, unless attention of ours runs in them: long
    rows in large batches lose by that. A model whose layers are split over processes is not recorded.
    """
    if input_device(model).type != "cuda" or any(map(split, model.parameters())):
        return False
    if isinstance(schedule, str):
        schedule = Schedule.parse(schedule, layers=anatomy(model).depth)
    saved = SAVED - size.rows * size.columns * _copied_bytes(model) / COPIED
    return size.steps / 2 * saved * schedule.calls > RECORDING + CHECKING * schedule.calls


def _copied_bytes(model: nn.Module) -> int:
    """Bytes per token and layer of keys and values that are copied for every head.

    None are where no heads share them, or where attention is ours and reads them as they are.
    """
    try:
        found = heads(model)
    except UnsupportedModel:
        return 0
    if found.queries == found.keys or shares(model):
        return 0
    return 2 * found.queries * found.width * next(model.parameters()).element_size()


def hastened(
    model: nn.Module, schedule: Schedule | str, size: Size
) -> contextlib.AbstractContextManager[Decoder] | None:
    """A decoder for so much work where it pays, else None; what `impasto.generation.generate` takes as `hasten`."""
    if not pays(model, schedule, size):
        return None
    return fast(model, schedule, batch=size.rows, context=max(size.columns, LEAST))


def _supported(model: nn.Module) -> Anatomy:
    """The anatomy of a model that can be decoded with static slots."""
    body = anatomy(model)
    name = type(model).__name__
    if not body.cached or model.get_output_embeddings() is None:  # type: ignore[operator]
        raise UnsupportedModel(f"{name} does not write text: it is no causal language model with a KV cache")
    if body.stateful:
        raise UnsupportedModel(f"layers of {name} keep more than keys and values; static slots hold nothing else")
    if any(map(handler_of, body.layers)):
        raise UsageError("this model already runs under a schedule: leave that `with` block first")
    elsewhere = {p for layer in body.layers if absent(layer) for p in layer.parameters()}  # in other processes
    if len({p.device for p in model.parameters() if p not in elsewhere}) > 1:
        raise UnsupportedModel(f"the weights of {name} are on several devices; one recorded step runs on one")
    return body


def _doubling(first: int, last: int) -> list[int]:
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(sizes[-1] * 2)
    return sizes


class Decoder:
    """A model under one recipe, ready to write. Made by `fast`.

    Args:
        program: the model, its schedule and its slots.
        backend: how steps are recorded.
        buckets: numbers of columns that a step may see, ascending; the last is the context.
        prompt_sizes: lengths to which prompts are padded, ascending.
        stacks: where branches of compiled groups are stacked; None leaves them apart.

    Attributes:
        report: what it took.
    """

    def __init__(
        self,
        program: Program,
        backend: Backend,
        buckets: tuple[int, ...],
        prompt_sizes: tuple[int, ...],
        stacks: Stacks | None,
    ) -> None:
        self.program = program
        self.stacks = stacks
        self.backend = backend
        self.buckets = buckets
        self.prompt_sizes = prompt_sizes
        self.batch = program.ids.shape[0]
        self.context = program.clock.context
        self.filled = 0  # columns in use; the host's copy of the clock's position
        self.begun = 0  # columns of the prompts
        self.report = Report(str(program.player.schedule), self.batch, self.context, slots=len(program.memory.layers))
        self._steps: dict[int, Work] = {}
        self._prompts: dict[int, tuple[Tensor, Work]] = {}
        self._pieces: dict[int, Pieces] = {}
        self._read: list[object] = []  # what recordings read

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Iterable[int] | None = None
    ) -> list[tuple[int, ...]]:
        """The likeliest tokens after every prompt, one after another.

        Args:
            prompts: token ids, at least one per prompt; as many prompts as there are rows at a time.
            max_new_tokens: at most so many tokens per prompt.
            ends: tokens that end a row, and are its last; None takes the model's own.

        Returns:
            The new tokens of each prompt. A row whose logits are not finite ends there.

        Raises:
            UsageError: an empty prompt, or one that leaves no room for so many tokens.
        """
        own = getattr(self.program.model, "generation_config", None)
        stops = end_tokens(own) if ends is None else frozenset(ends)
        answers: list[tuple[int, ...]] = []
        for first in range(0, len(prompts), self.batch):
            rows = [list(prompt) for prompt in prompts[first : first + self.batch]]
            answers += self._answer(rows, max_new_tokens, stops)
        return answers

    def _answer(self, rows: list[list[int]], limit: int, stops: frozenset[int]) -> list[tuple[int, ...]]:
        if limit < 1:
            raise UsageError(f"at least one token must be generated, not {limit}")
        longest = max(map(len, rows))
        if longest + limit > self.context + 1:
            raise UsageError(
                f"a prompt of {longest} tokens and {limit} new ones do not fit into a context of {self.context}: make "
                "the decoder with a larger one"
            )
        self.prefill(rows)
        made = [_until(row, stops) for row in self.new_tokens()[: len(rows)]]
        while self.filled - self.begun + 1 < limit and not all(ended for _, ended in made):
            for _ in range(min(POLL, limit - 1 - (self.filled - self.begun))):
                self.step()
            made = [_until(row, stops) for row in self.new_tokens()[: len(rows)]]
        return [tokens for tokens, _ in made]

    def prefill(self, prompts: Sequence[Sequence[int]] | Tensor) -> Tensor:
        """Read the prompts into empty slots and choose their first new tokens, (batch,).

        Args:
            prompts: at most `batch` rows of token ids. As a tensor (rows, tokens) they are of one length, and nothing
                is copied from the host where it lies on the model's device.

        Raises:
            UsageError: no prompts or too many, an empty one, or one that the context does not hold.
        """
        if isinstance(prompts, Tensor):
            right = prompts.dim() == 2 and 0 < len(prompts) <= self.batch and prompts.shape[1] > 0
        else:
            right = 0 < len(prompts) <= self.batch and all(prompts)
        if not right:
            raise UsageError(f"this decoder reads 1 to {self.batch} prompts at a time, each of at least one token")
        longest = prompts.shape[1] if isinstance(prompts, Tensor) else max(map(len, prompts))
        if longest > self.context:
            raise UsageError(f"a prompt of {longest} tokens is longer than the context of {self.context}")
        width = next((size for size in self.prompt_sizes if size >= longest), None)
        with torch.no_grad():  # which holds for one thread only
            ids = self._placed(prompts, width or longest)
            if width is None:
                self.program.prompt(ids.to(self.program.device))
            else:
                static, work = self._recorded_prompt(width)
                static.copy_(ids)
                work()
        return self.program.ids[:, 0]

    def _placed(self, prompts: Sequence[Sequence[int]] | Tensor, width: int) -> Tensor:
        """The prompts as rows of ids, padded on both sides; tells the program where they begin and end."""
        if isinstance(prompts, Tensor):
            longest = prompts.shape[1]
            self.program.pads.zero_()
            rows = torch.cat([prompts, prompts[:1].expand(self.batch - len(prompts), -1)]).long()
            ids = nn.functional.pad(rows, (0, width - longest))
        else:
            longest = max(map(len, prompts))
            filled = [*prompts, *[prompts[0]] * (self.batch - len(prompts))]
            pads = [longest - len(row) for row in filled]
            self.program.pads.copy_(torch.tensor(pads))
            ids = torch.tensor(
                [[0] * pad + list(row) + [0] * (width - longest) for pad, row in zip(pads, filled, strict=True)]
            )
        self.program.last.fill_(longest - 1)
        self.begun = self.filled = longest
        return ids

    def step(self) -> Tensor:
        """One token more in every row, (batch,). The tensor is the decoder's own and changes with the next step."""
        if not 0 < self.filled < self.context:
            raise UsageError("prefill prompts first" if not self.filled else f"the context of {self.context} is full")
        visible = self._visible()
        with torch.no_grad():  # which holds for one thread only
            if visible not in self._steps:
                self._steps[visible] = self._recorded_step(visible)
            self._steps[visible]()
        self.filled += 1
        return self.program.ids[:, 0]

    def new_tokens(self) -> list[list[int]]:
        """What was chosen since the prompts were read, row by row; -1 where logits were not finite."""
        rows: list[list[int]] = self.program.written[:, self.begun : self.filled + 1].tolist()
        return rows

    # What follows runs while a decoder is made.

    def prepare(self, compile: Compile, options: dict[str, Any]) -> None:
        """Compare with the plain runtime, compile what is to be compiled, and record the first step."""
        program = self.program
        prompts = _probe(program.model, self.batch, min(PROBE, self.context - 3))
        stacks, report = self.stacks, self.report
        # Some models look at values where they are given no mask, so a mask is tried before giving up.
        for attempt in (False, True) if not program.padded else (True,):
            program.padded, self.stacks = attempt, stacks
            self.report = replace(report, seconds=self.report.seconds)
            self._pieces.clear()
            try:
                self._prepare(prompts, compile, options)
                break
            except _PROBLEMS as problem:
                if isinstance(problem, torch.OutOfMemoryError):
                    raise
                if attempt:
                    raise UnsupportedModel(
                        f"{type(program.model).__name__} does not run as one recorded step: "
                        f"{type(problem).__name__}: {problem}"
                    ) from problem
        self.report = replace(
            self.report,
            slot_bytes=program.memory.nbytes,
            regions=sum(len(pieces.regions) for pieces in self._pieces.values()),
            kernels=sum(pieces.kernels for pieces in self._pieces.values()),
        )

    def _prepare(self, prompts: list[list[int]], compile: Compile, options: dict[str, Any]) -> None:
        with self._timed("check"):
            expected = self._plain(prompts)
            self._require(self._error(prompts, expected), "with static slots")
        for visible in self.buckets if compile != "off" else ():
            problem = self._compile(visible, prompts, expected, compile, options)
            if self.stacks is not None and problem is not None:
                self.stacks = None
                self._note(f"stacked branches do not run ({problem}): one stream each")
                problem = self._compile(visible, prompts, expected, compile, options)
            if problem is not None:
                raise problem
        self._live_prefill(prompts)
        self._steps[self._visible()] = self._recorded_step(self._visible())

    def _compile(
        self, visible: int, prompts: list[list[int]], expected: list[Tensor], compile: Compile, options: dict[str, Any]
    ) -> Exception | None:
        """Compile the step that sees so many columns; returns what went wrong, here or in another process."""
        self._live_prefill(prompts)
        problem: Exception | None = None
        try:
            with self._timed("trace"):
                pieces = Pieces(self.program, visible, self.stacks)
            with self._timed("compile"):
                pieces.compile(compile, options)
        except (UnsupportedModel, *_PROBLEMS) as found:
            problem = found
        if not self._agreed(problem is None):
            return problem or UnsupportedModel("another process of the team cannot compile its share")
        self._pieces[visible] = pieces
        try:
            with self._timed("compile"):
                self._require(self._error(prompts, expected), "compiled")
        except (UnsupportedModel, *_PROBLEMS) as found:
            del self._pieces[visible]
            return found
        for note in pieces.notes:
            self._note(note)
        return None

    def _agreed(self, ready: bool) -> bool:
        """Whether all processes of the team are ready."""
        team = self.program.player.team
        return ready if team is None else team.lowest(ready) == 1

    def _note(self, note: str) -> None:
        if note not in self.report.notes:
            self.report = replace(self.report, notes=(*self.report.notes, note))

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.backend.wait()
        seconds = {**self.report.seconds, name: self.report.seconds.get(name, 0.0) + time.perf_counter() - began}
        self.report = replace(self.report, seconds=seconds, streams=self.backend.streams)

    def _require(self, error: float, how: str) -> None:
        model = self.program.model
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        if not error <= TOLERANCE.get(dtype, 0.1):
            raise UnsupportedModel(
                f"{type(model).__name__} {how} gives other logits than the plain runtime (relative error {error:.2g}): "
                "it depends on more than keys, values, masks and positions; use the plain runtime"
            )
        self.report = replace(self.report, error=max(error, self.report.error))

    def _visible(self) -> int:
        return next(size for size in self.buckets if size > self.filled)

    def _error(self, prompts: list[list[int]], expected: list[Tensor]) -> float:
        """Largest relative error of logits after the prompts and the steps that follow, on the expected tokens."""
        self._live_prefill(prompts)
        errors = []
        for number, logits in enumerate(expected):
            if number:
                self.program.ids.copy_(expected[number - 1].max(-1).indices[:, None])
                self._live_step(self._visible())
                self.filled += 1
            assert self.program.logits is not None
            wanted = logits.to(torch.promote_types(logits.dtype, torch.float32))
            error = (self.program.logits.to(wanted.dtype) - wanted).norm() / wanted.norm()
            errors.append(error.item() if error.isfinite() else float("inf"))
        return max(errors)

    def _plain(self, prompts: list[list[int]]) -> list[Tensor]:
        """The plain runtime's logits after the prompts and after two tokens more, each (batch, vocabulary)."""
        program = self.program
        longest = max(map(len, prompts))
        pads = torch.tensor([longest - len(row) for row in prompts], device=program.device)
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts], device=program.device)
        cache, found, before = DynamicCache(config=text_config(program.model)), [], 0
        player = Player(program.model, program.body, program.player.schedule, "exact", team=program.player.team)
        with tapped(program.body.layers, player):
            for _ in range(3):
                columns = torch.arange(before + ids.shape[1], device=program.device)
                asked: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
                if bool(pads.any()):
                    asked["attention_mask"] = (columns >= pads[:, None]).long()
                if "position_ids" in program.body.arguments:
                    asked["position_ids"] = (columns[before:] - pads[:, None]).clamp(min=0)
                found.append(program.model(**asked).logits[:, -1])
                before, ids = before + ids.shape[1], found[-1].max(-1).indices[:, None]
        return found

    def _live_prefill(self, prompts: list[list[int]]) -> None:
        self.program.prompt(self._placed(prompts, max(map(len, prompts))).to(self.program.device))

    def _live_step(self, visible: int) -> None:
        if visible in self._pieces:
            self._pieces[visible].run()
        else:
            self.program.step(visible)

    def _recorded_step(self, visible: int) -> Work:
        saved = [(state, state.clone()) for state in self.program.state]

        def undo() -> None:
            for state, value in saved:
                state.copy_(value)

        return self._recorded(lambda: self._live_step(visible), undo)

    def _recorded_prompt(self, width: int) -> tuple[Tensor, Work]:
        if width not in self._prompts:
            ids = torch.zeros(self.batch, width, dtype=torch.long, device=self.program.device)
            self._prompts[width] = ids, self._recorded(lambda: self.program.prompt(ids), lambda: None)
        return self._prompts[width]

    def _recorded(self, work: Work, undo: Work) -> Work:
        """Record some work, and hold what it reads: weights, buffers, and thin products in the place of weights.

        A replay reads addresses, not the model. Others may give the model's weights new memory later (`Stacks` does),
        or take edits off; what was there then must not be freed, as long as this decoder can be replayed.
        """
        with self._timed("record"):
            recorded = self.backend.record(work, undo)
        model = self.program.model
        self._read += [p.data for p in model.parameters()]
        self._read += model.buffers()
        self._read += [vars(m)["forward"] for m in model.modules() if "forward" in vars(m)]
        return recorded


def _until(row: Sequence[int], stops: frozenset[int]) -> tuple[tuple[int, ...], bool]:
    """A row up to the token that ends it, and whether there is one."""
    for place, token in enumerate(row):
        if token < 0:
            return tuple(row[:place]), True
        if token in stops:
            return tuple(row[: place + 1]), True
    return tuple(row), False


def _probe(model: nn.Module, batch: int, length: int) -> list[list[int]]:
    """Prompts of different lengths, one per row."""
    ids: list[int] = probe_inputs(model, length)["input_ids"][0].tolist()
    return [ids[min(row, length - 2) :] for row in range(batch)]

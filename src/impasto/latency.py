"""How fast recipes are: all of them and the untouched model in turns, on one loaded model, in one process.

    bench = measure(loaded, [Recipe.of(loaded.name, "0:8 12:18", layers=loaded.layers)], batch_sizes=[1, 32])
    for timing in bench.timings:
        print(timing.how, timing.case, timing.tpot, bench.ratio(timing))

For each case (rows, prompt) everything that is compared is made ready first. Then come rounds: in every one each
contender reads its prompts and makes its tokens, in an order that changes from round to round, and the device's clocks
and temperature are written down before. So whatever drifts, drifts for all, and ratios of one round are free of it.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from impasto import checkpoint, memory
from impasto.contenders import Contender, Fast, Job, Outfit, Plain, Ready, unread, written
from impasto.errors import ImpastoError, StoreError, UnsupportedModel, UsageError
from impasto.evaluate import setting_of
from impasto.hardware import Sensor, State, Watch, limits, machine, watch_of
from impasto.models import DTYPES, LoadedModel
from impasto.peers import Shelf, absent, peer
from impasto.pieces import Compile
from impasto.recipe import Recipe
from impasto.schedule import Schedule
from impasto.store import Store
from impasto.timings import Bench, Case, How, Reading, Roofline, Round, Timing, cases, turns

Mode = Literal["auto", "plain", "fast"]
PREFILLS = 3  # how often a prompt is read in a round
LONG = 65_536  # tokens of all prompts together from which once is enough
KIND = "latency"  # of measurements in a store
_SHOWN = 3  # recipes that a note names
_BUILD = 3.0  # what getting ready counts for in the progress, in rounds

Progress = Callable[[str, float], None]
Aside = Callable[[str, str], None]  # what happens now, and a detail of it
Make = Callable[[Recipe, How], Contender]


class Reads(Protocol):
    """What tells the state of the device."""

    def read(self) -> State | None:
        """The state now; None where nothing answers."""


def measure(
    loaded: LoadedModel,
    recipes: Sequence[Recipe],
    *,
    batch_sizes: Sequence[int] = (1,),
    contexts: Sequence[int] = (128,),
    new_tokens: int = 64,
    rounds: int = 5,
    peers: Sequence[How] = (),
    mode: Mode = "auto",
    compile: bool = True,
    seed: int = 0,
    watch: Watch | None = None,
    sensor: Reads | None = None,
    make: Make | None = None,
    progress: Progress | None = None,
    aside: Aside | None = None,
) -> Bench:
    """Time recipes against the untouched model, which is always among them.

    What does not fit into memory beside the others is tried again beside the untouched model alone, and then by itself.
    What cannot run at all stands in the result with its reason, and the rest goes on. Ctrl-C ends the run: what is
    finished by then is returned, with `complete` False.

    Args:
        loaded: a model that writes text.
        recipes: what to time; equal fingerprints once.
        batch_sizes: rows that are decoded together.
        contexts: lengths of the prompts, in tokens.
        new_tokens: tokens that every row makes, the first one included; at least 2.
        rounds: how often each contender has its turn in a case.
        peers: "hf" and "hf-compiled", which run the untouched model, and "vllm", which also runs every recipe that can
            be a plain checkpoint; the others are named in the notes.
        mode: "plain" for the plain runtime, "fast" for `impasto.fast`; "auto" is `fast` on a CUDA device, and the
            plain runtime elsewhere and where `fast` refuses.
        compile: let `fast` compile with torch's compiler on CUDA devices.
        seed: of the prompts.
        watch: the device's time; None takes CUDA events or the host's clock.
        sensor: the device's state; None asks its driver.
        make: makes contenders; None those of this package.
        progress: told what is done and the share of it.
        aside: told what happens now, and a detail of it.

    Raises:
        UsageError: sizes or names that cannot be, or no case that the model can read.
        NotationError: a recipe that does not fit the model.
        UnsupportedModel: the model does not write text.
    """
    if rounds < 1 or not batch_sizes or not contexts:
        raise UsageError("a bench has at least one round, one batch size and one context")
    if mode not in ("auto", "plain", "fast"):
        raise UsageError(f"mode is 'auto', 'plain' or 'fast', not {mode!r}")
    written(loaded.model)
    watch = watch or watch_of(loaded.device)
    untouched = Recipe(loaded.name, Schedule.identity(loaded.layers))
    chosen = tuple({recipe.fingerprint: recipe for recipe in (untouched, *recipes)}.values())
    for recipe in chosen:
        recipe.check(loaded.layers)
    asked = list(cases(batch_sizes, contexts, new_tokens))
    if all(unread(case, loaded) for case in asked):
        raise UsageError(f"nothing can be timed: {unread(asked[0], loaded)}")
    cuda = loaded.device.type == "cuda"
    own: How = "fast" if mode == "fast" or (mode == "auto" and cuda) else "plain"
    entries: list[tuple[Recipe, How]] = [(recipe, own) for recipe in chosen]
    others, refused = _guests(loaded, chosen, tuple(dict.fromkeys(peers)))
    entries += others
    shelf = Shelf(loaded)
    run = _Run(
        bench=Bench(setting_of(loaded), chosen, machine=machine(loaded.device)),
        job=lambda case: Job.of(case, loaded, seed),
        make=make or maker(loaded, watch, "inductor" if compile and cuda else "off", shelf),
        falls_back=mode == "auto",
        sensor=sensor or Sensor(loaded.device),
        rounds=rounds,
        progress=progress or (lambda what, share: None),
        aside=aside or (lambda what, detail: None),
    )
    try:
        run.progress("roofline of the device", 0.0)  # apart, as it says nothing of how long the cases take
        notes = (*_notes(loaded, run.sensor), *refused)
        run.bench = replace(run.bench, roofline=_roofline(loaded, watch), notes=notes)
        run.progress("roofline of the device", 1.0)
        with shelf:
            for number, case in enumerate(asked):
                run.case(case, entries, number / len(asked), (number + 1) / len(asked))
    except KeyboardInterrupt:
        run.bench = replace(run.bench, complete=False)
    return run.bench


def maker(loaded: LoadedModel, watch: Watch, compile: Compile, shelf: Shelf) -> Make:
    """Makes the contenders of this package; edits are carried out once for each recipe, and kept."""
    outfits: dict[str, Outfit] = {}

    def make(recipe: Recipe, how: How) -> Contender:
        if recipe.fingerprint not in outfits:
            outfits[recipe.fingerprint] = Outfit(loaded, recipe.edits)
        outfit = outfits[recipe.fingerprint]
        if how == "fast":
            return Fast(loaded, recipe, outfit, watch, compile)
        if how == "plain":
            return Plain(loaded, recipe, outfit, watch)
        return peer(how, loaded, recipe, watch, partial(shelf.place, recipe, outfit))

    return make


def _roofline(loaded: LoadedModel, watch: Watch) -> Roofline:
    return Roofline(**limits(loaded.device, DTYPES[loaded.setting.dtype], watch))


def _guests(
    loaded: LoadedModel, recipes: Sequence[Recipe], peers: Sequence[How]
) -> tuple[list[tuple[Recipe, How]], list[str]]:
    """What the peers run, and why they do not run the other recipes; the first recipe is the untouched model.

    A peer that cannot run here is asked for the untouched model all the same, so that its reason is told once.
    """
    untouched, *others = recipes
    found: list[tuple[Recipe, How]] = []
    reasons: dict[str, list[str]] = {}
    for name in peers:
        found.append((untouched, name))
        if name != "vllm" or absent(name, loaded) is not None:
            continue
        for recipe in others:
            reason = checkpoint.obstacle(loaded, recipe)
            if reason is None:
                found.append((recipe, name))
            else:
                reasons.setdefault(reason, []).append(str(recipe))
    return found, [f"vLLM does not run {_listed(names)}: {reason}" for reason, names in reasons.items()]


def _listed(names: Sequence[str]) -> str:
    """The first few of several schedules."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return "; ".join(names[:_SHOWN]) + more


def _notes(loaded: LoadedModel, sensor: Reads) -> tuple[str, ...]:
    notes = []
    if sensor.read() is None:
        notes.append("no clocks and temperatures: no driver of an NVIDIA device answers here")
    if loaded.device.type != "cuda":
        notes.append(f"no peak memory: a {loaded.device.type} device keeps no count of it")
    return tuple(notes)


@dataclass(eq=False)
class _Entry:
    """A contender in one case: what is known of it so far."""

    recipe: Recipe
    how: How
    contender: Contender | None = None
    ready: Ready | None = None
    rounds: tuple[Round, ...] = ()
    problem: str | None = None
    notes: tuple[str, ...] = ()
    crowded: bool = False  # memory ran out beside others

    def timing(self, case: Case) -> Timing:
        ready = self.ready or Ready()
        return Timing(
            recipe=self.recipe.fingerprint,
            how=self.how,
            case=case,
            rounds=self.rounds,
            memory=ready.memory,
            build=dict(ready.build),
            demand=ready.demand,
            problem=self.problem,
            notes=(*self.notes, *ready.notes),
        )

    def release(self) -> None:
        """Give back what the contender holds; memory is free once it is collected."""
        contender, self.contender = self.contender, None
        if contender is not None:
            contender.close()


@dataclass(eq=False)
class _Run:
    """A bench while it is measured."""

    bench: Bench
    job: Callable[[Case], Job]
    make: Make
    falls_back: bool
    sensor: Reads
    rounds: int
    progress: Progress
    aside: Aside
    finished: int = 0  # rounds of the present case

    def case(self, case: Case, entries: Sequence[tuple[Recipe, How]], begin: float, end: float) -> None:
        """Everything in one case; its share of the progress runs from `begin` to `end`."""
        found = [_Entry(recipe, how) for recipe, how in entries]
        before, self.finished, done = self.bench.timings, 0, 0.0
        whole = len(found) * (_BUILD + self.rounds)

        def tell(more: float) -> None:
            nonlocal done
            done = min(done + more, whole)
            self.progress("measuring", begin + (end - begin) * done / whole)

        try:
            job = self.job(case)
        except ImpastoError as problem:
            for entry in found:
                entry.problem = str(problem)
            self.bench = replace(self.bench, timings=(*before, *[entry.timing(case) for entry in found]))
            self.progress("measuring", end)
            return
        try:
            for squad in _squads(found):
                try:
                    self.squad(job, squad, tell)
                finally:
                    for entry in squad:
                        entry.release()
                    _collect()
        finally:
            kept = [entry.timing(case) for entry in found if entry.rounds or entry.problem]
            self.bench = replace(self.bench, timings=(*before, *kept))
        self.progress("measuring", end)

    def squad(self, job: Job, squad: Sequence[_Entry], tell: Callable[[float], None]) -> None:
        """Make these ready, and let them run in turns."""
        names = {recipe.fingerprint: str(recipe) for recipe in self.bench.recipes}
        for entry in squad:
            self.aside(str(job.case), f"getting {self.bench.called(entry.timing(job.case), names)} ready")
            self.guarded(entry, squad, partial(self.build, entry, job))
            tell(_BUILD)
        steps = job.case.new_tokens - 1
        prefills = 1 if job.ids.numel() >= LONG else PREFILLS
        for _ in range(self.rounds):
            ready = [entry for entry in squad if entry.contender is not None]
            if not ready:
                return
            number = self.finished
            self.aside(str(job.case), f"round {number + 1}")
            if (state := self.sensor.read()) is not None:
                reading = Reading(job.case.key, number, state.facts, state.throttled)
                self.bench = replace(self.bench, readings=(*self.bench.readings, reading))
            for place in turns(len(ready), number):
                entry = ready[place]
                self.guarded(entry, squad, partial(self.turn, entry, number, prefills, steps))
                tell(1.0)
            self.finished += 1

    def build(self, entry: _Entry, job: Job) -> None:
        """Make one contender ready; where `fast` refuses and may, the plain runtime takes its place."""
        try:
            entry.contender = self.make(entry.recipe, entry.how)
            entry.ready = entry.contender.ready(job)
        except UnsupportedModel as problem:
            if not (self.falls_back and entry.how == "fast"):
                raise
            entry.release()
            entry.how, entry.notes = "plain", (f"fast refuses: {problem}",)
            entry.contender = self.make(entry.recipe, "plain")
            entry.ready = entry.contender.ready(job)

    def turn(self, entry: _Entry, number: int, prefills: int, steps: int) -> None:
        """One round of one contender."""
        assert entry.contender is not None
        ttft, tpot = entry.contender.run(prefills, steps)
        entry.rounds = (*entry.rounds, Round(number, tuple(ttft), tuple(tpot)))

    def guarded(self, entry: _Entry, squad: Sequence[_Entry], work: Callable[[], None]) -> None:
        """Do something for one contender; what goes wrong is written down, and the contender leaves the case."""
        try:
            work()
            return
        except Exception as problem:  # peers are foreign code, and one failure must not cost the others' numbers
            full = memory.ran_out(problem)
            text = "out of memory" if full else _said(problem)
        alone = all(other is entry or other.contender is None for other in squad)
        entry.crowded = full and not alone
        entry.problem = text
        entry.release()
        _collect()


def _collect() -> None:
    """Free what nobody holds any more; what was recorded and compiled holds itself in circles."""
    gc.collect()
    memory.free()


def _squads(entries: Sequence[_Entry]) -> Any:
    """First all together; then, one by one, what did not fit, beside the untouched model and after that by itself."""
    yield entries
    first = entries[0]
    for entry in [one for one in entries if one.crowded]:
        for company in ([first], []):
            if not entry.crowded or (company and (first is entry or first.problem is not None)):
                continue
            entry.crowded, entry.problem = False, None
            yield [*company, entry]


def _said(problem: Exception) -> str:
    text = next(iter(str(problem).strip().splitlines()), "")
    return text if isinstance(problem, ImpastoError) else f"{type(problem).__name__}: {text}"


def keep(bench: Bench, store: Store) -> None:
    """Put every timing into a store, as a measurement of its recipe.

    The kind is "latency", the key says case and way of running; a later measurement of the same replaces it.
    """
    known = {recipe.fingerprint: recipe for recipe in bench.recipes}
    store.put_recipes(bench.recipes)
    machine = {
        "machine": dict(bench.machine),
        "roofline": bench.to_dict()["roofline"],
        "throttled": dict(bench.throttled),
    }
    for timing in bench.timings:
        value = bench.timing_dict(timing) | machine
        store.put_measurement(bench.setting, known[timing.recipe], KIND, f"{timing.case.key}, {timing.how}", value)


def save(bench: Bench, path: Path) -> None:
    """Write a bench as JSON; the file appears whole or not at all.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(bench.to_dict(), file, indent=1)
        Path(draft).replace(path)
    except OSError as problem:
        raise StoreError(f"cannot write {path}: {problem.strerror or problem}") from problem


def load(path: Path) -> Bench:
    """The bench that `save` wrote.

    Raises:
        StoreError: there is no such file.
        UsageError: it is none of ours.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise StoreError(f"cannot read {path}: {problem.strerror or problem}") from problem
    except ValueError as problem:
        raise UsageError(f"{path} is no result of `impasto bench`: {problem}") from problem
    if not isinstance(data, dict):
        raise UsageError(f"{path} is no result of `impasto bench`")
    return Bench.from_dict(data)

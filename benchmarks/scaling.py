"""What the painters paper's whole protocol would take on a model of 70 billion parameters: a plan on paper.

    python benchmarks/scaling.py --output benchmarks/results/scaling-plan.json

No large model is loaded and nothing is timed. Recipes, requests, layer calls, tokens, batches and units are counted
by the engine's own planner (`impasto.trie`, `impasto.forest`, `impasto.units`) on the real benchmarks, read with the
demo model's tokenizer. Seconds follow from floating-point operations and the assumptions in `Machine`; units are
handed to workers one after another, as a driver does, which gives the hours that the whole takes.
"""

from __future__ import annotations

import argparse
import heapq
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from impasto.encoding import Piece
from impasto.forest import Node, batches, lay_out
from impasto.head import SLICE
from impasto.models import load
from impasto.pace import Pace
from impasto.recipe import Recipe
from impasto.result import Request, Response, Setting
from impasto.scoring import BUDGET, OVERHEAD, Scorer, Work
from impasto.store import Store
from impasto.studies.protocol import PROTOCOLS, variants
from impasto.tasks import TaskSet, build
from impasto.trie import Count, count, naive_calls, plant
from impasto.units import PER_WORKER, Shard, shards

GIGA = 1e9
HOUR = 3600
ENOUGH = 8192  # a worker gets so many GPUs that a batch of this many tokens fits
LEAST = 4  # units for each worker; batches are halved until there are so many


@dataclass(frozen=True)
class Model:
    """Sizes of the model that is planned for, in bfloat16; gated MLP, grouped keys and values, head of its own."""

    layers: int = 80
    width: int = 8192
    inner: int = 28672
    keys: int = 1024  # width of the keys, and of the values
    vocabulary: int = 128256
    bytes: int = 2

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        return 2 * self.width * self.width + 2 * self.width * self.keys + 3 * self.width * self.inner

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return self.layers * self.layer + 2 * self.width * self.vocabulary


@dataclass(frozen=True)
class Machine:
    """One GPU and what it is connected to. All of these are assumptions; memory and peak are a data sheet's."""

    memory: float
    peak: float  # dense bfloat16 operations per second
    usable: float = 0.75  # of the memory; the rest is for sums in float32, activations and gaps
    share: float = 0.4  # of the peak that the layers reach
    host: float = 20 * GIGA  # bytes per second from the host's memory, as accelerate copies weights
    bus: float = 200 * GIGA  # bytes per second of an all-reduce between the GPUs of one worker
    disk: float = 2 * GIGA  # bytes per second at which a worker reads the checkpoint


MACHINES = (Machine(80 * GIGA, 989e12), Machine(288 * GIGA, 2250e12))


@dataclass(frozen=True)
class Crew:
    """How a number of GPUs is made into workers.

    Attributes:
        gpus: in all.
        per_worker: GPUs of one worker.
        mode: "one device" has the whole model on one GPU; "offload" keeps on it what fits, and copies the other
            layers in for every call; "device_map" has whole layers on each of several GPUs, one of which works at a
            time; "tensor parallel" splits every layer.
    """

    gpus: int
    per_worker: int
    mode: str

    @property
    def workers(self) -> int:
        """Processes (or groups of them) that run units side by side."""
        return self.gpus // self.per_worker


@dataclass(frozen=True)
class Questions:
    """Requests as the engine sees them."""

    requests: tuple[Request, ...]
    pieces: tuple[Piece, ...]
    trees: tuple[Node, ...]
    positions: int
    packed: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)

    def batched(self, budget: int, overhead: int) -> tuple[int, int]:
        """How many batches of at most `budget` tokens there are, and how many tokens they have with padding."""
        key = budget, overhead
        if key not in self.packed:
            parts = batches(self.trees, budget, overhead)
            self.packed[key] = len(parts), sum(lay_out(batch).padded for batch in parts)
        return self.packed[key]

    @classmethod
    def of(cls, scorer: Scorer, requests: Iterable[Request]) -> Questions:
        """The distinct requests, tokenised."""
        asked = tuple({request.fingerprint: request for request in requests}.values())
        pieces = tuple(scorer.encoder.pieces(asked))
        positions = {hash(p.tokens[: len(p.tokens) - k]) for p in pieces for k in range(len(p.targets))}
        return cls(asked, pieces, tuple(scorer.trees(pieces)), len(positions))


@dataclass(frozen=True)
class Study:
    """Recipes with their layer calls, counted once: those of the shared walk, and those of one recipe after another."""

    recipes: tuple[Recipe, ...]
    counted: Count
    naive: int

    @classmethod
    def of(cls, recipes: Iterable[Recipe]) -> Study:
        """The recipes, counted."""
        known = tuple(recipes)
        return cls(known, count(plant(known)), naive_calls(known))


def work_of(study: Study, asked: Questions, budget: int, overhead: int) -> Work:
    """What `Scorer.plan` says, for a study and questions that many budgets are tried with."""
    packed, padded = asked.batched(budget, overhead)
    return Work(
        recipes=len(study.recipes),
        requests=len(asked.requests),
        layer_calls=study.naive,
        shared_calls=study.counted.calls,
        tokens=sum(len(p.tokens) for p in asked.pieces),
        shared_tokens=padded,
        positions=asked.positions,
        batches=packed,
        alive=study.counted.alive,
    )


def pace_of(model: Model, machine: Machine, crew: Crew) -> Pace:
    """Seconds per token and layer, and per scored position, of one worker."""
    together = crew.per_worker if crew.mode == "tensor parallel" else 1
    speed = machine.peak * machine.share * together
    exchanged = 2 * 2 * (together - 1) / together * model.width * model.bytes  # two all-reduces per layer
    return Pace(
        layer=2 * model.layer / speed + exchanged / machine.bus,
        head=2 * model.width * model.vocabulary / speed,
        state=model.width * model.bytes,
        slice=3 * 4 * SLICE["cuda"],
    )


def fitting(model: Model, machine: Machine, crew: Crew, alive: int) -> int:
    """The largest batch, halved from the engine's own as it does when memory runs out, that fits beside the weights.

    Where layers are copied in for every call, half of the memory is left to the hidden states.
    """
    usable = machine.usable * machine.memory
    weights = usable / 2 if crew.mode == "offload" else model.parameters * model.bytes / crew.per_worker
    pace, blank = pace_of(model, machine, crew), Work(0, 0, 0, 0, 0, 0, 0, 0, alive)
    budget = BUDGET["cuda"]
    while budget and weights + pace.bytes(blank, budget) > usable:
        budget //= 2
    return budget


def crews(model: Model, machine: Machine, alive: int) -> Iterator[Crew]:
    """What 1, 8 and 64 GPUs can be made into, with as few GPUs for each worker as a batch allows."""
    per_worker = 1
    while fitting(model, machine, Crew(64, per_worker, "tensor parallel"), alive) < ENOUGH:
        per_worker *= 2
    modes = ("one device",) if per_worker == 1 else ("device_map", "tensor parallel")
    yield Crew(1, 1, "one device" if per_worker == 1 else "offload")
    for gpus in (8, 64):
        for mode in modes:
            yield Crew(gpus, per_worker, mode)


def makespan(seconds: Sequence[float], workers: int, start: float) -> float:
    """When the last worker is done, if each takes the next unit as soon as it is free."""
    free = [start] * workers
    for unit in seconds:
        heapq.heappush(free, heapq.heappop(free) + unit)
    return max(free)


def resident_layers(model: Model, machine: Machine, crew: Crew, states: float) -> int:
    """Layers that stay on the GPU beside the hidden states and both embeddings."""
    if crew.mode != "offload":
        return model.layers
    room = machine.usable * machine.memory - states - 2 * model.width * model.vocabulary * model.bytes
    return int(room // (model.layer * model.bytes))


def streamed_bytes(model: Model, work: Work, resident: int) -> float:
    """Weights copied to the GPU for the calls of the layers that are not there."""
    return work.batches * work.shared_calls * (1 - resident / model.layers) * model.layer * model.bytes


def planned(model: Model, machine: Machine, crew: Crew, study: Study, asked: Questions) -> dict[str, Any]:
    """One row of the plan: with the batch that costs least of those that fit and that give every worker its units."""
    pace = pace_of(model, machine, crew)

    def cost(budget: int) -> tuple[float, float, Work]:
        work = work_of(study, asked, budget, OVERHEAD["cuda", 2])
        streamed = streamed_bytes(model, work, resident_layers(model, machine, crew, pace.bytes(work, budget)))
        return pace.seconds(work) + streamed / machine.host, streamed, work

    fits = fitting(model, machine, crew, study.counted.alive)
    budgets = [fits >> halved for halved in range(fits.bit_length()) if fits >> halved >= min(fits, ENOUGH)]
    budget = min(budgets, key=lambda size: cost(size)[0])
    owners = [piece.request for piece in asked.pieces]
    while True:  # smaller batches are cheaper than recipes cut apart, and than workers that wait
        wanted = crew.workers * PER_WORKER
        parts: list[Shard] = shards(len(asked.requests), asked.trees, owners, budget=budget, parts=wanted)
        if len(parts) >= crew.workers * LEAST or crew.workers == 1:
            break
        budget //= 2
    total, streamed, work = cost(budget)
    states = pace.bytes(work, budget)
    resident = resident_layers(model, machine, crew, states)
    share = total / sum(part.tokens for part in parts)
    units = [share * part.tokens for part in parts]
    loading = model.parameters * model.bytes / machine.disk
    wall = makespan(units, crew.workers, loading)
    return {
        "gpu_memory": machine.memory,
        **asdict(crew),
        "workers": crew.workers,
        "batch_tokens": budget,
        "batches": work.batches,
        "units": len(units),
        "longest_unit_hours": max(units) / HOUR,
        "longest_batch_hours": total / work.batches / HOUR,
        "gpu_hours": total * crew.per_worker / HOUR,
        "naive_gpu_hours": (pace.naive_seconds(work) + streamed / machine.host * work.layer_calls / work.shared_calls)
        * crew.per_worker
        / HOUR,
        "wall_hours": wall / HOUR,
        "busy": total / (wall * crew.workers),
        "weights_read": crew.workers * model.parameters * model.bytes,
        "weights_streamed": streamed,
        "layers_on_gpu": resident,
        "weights_per_gpu": model.parameters * model.bytes * resident / model.layers / crew.per_worker,
        "states_per_gpu": states,
        "layer_calls": work.layer_calls,
        "shared_calls": work.shared_calls,
        "tokens": work.tokens,
        "shared_tokens": work.shared_tokens,
        "positions": work.positions,
        "states_alive": work.alive,
    }


def traffic(recipes: Sequence[Recipe], asked: Questions, units: int) -> dict[str, float]:
    """Bytes between driver and workers: every request once, the recipes with each unit, two numbers per answer."""
    texts = sum(len((r.context + r.continuation).encode()) for r in asked.requests)
    schedules = sum(len(str(recipe.schedule)) for recipe in recipes)
    return {
        "requests": texts,
        "recipes": units * schedules,
        "results": len(recipes) * len(asked.requests) * (8 + 1),
    }


def stored(recipes: int, asked: Questions, tasks: Sequence[TaskSet]) -> dict[str, float]:
    """Bytes of the run folder: what a row takes is measured on a small store, the number of rows is known."""
    setting = Setting("planned", "weights", "bfloat16", "cuda", "exact", "sdpa")
    few = [Recipe.of("planned", text, layers=80) for text in ("0:80", *(f"0:{n} {n + 1}:80" for n in range(1, 60)))]
    some = asked.requests[:2000]
    with tempfile.TemporaryDirectory() as folder:
        with Store(folder) as store:
            store.put_recipes(few)
            empty = store.path.stat().st_size
            for low in range(0, len(some), 500):
                part = some[low : low + 500]
                shape = (len(few), len(part))
                generator = np.random.default_rng(low)
                store.put_batch(
                    setting,
                    few,
                    part,
                    loglikelihood=generator.normal(size=shape),
                    is_greedy=np.zeros(shape, dtype=bool),
                    tokens=np.full(len(part), 3),
                    truncated=np.zeros(len(part), dtype=bool),
                )
        per_row = (store.path.stat().st_size - empty) / (len(few) * len(some))
    rows = recipes * len(asked.requests)
    guess = {request.fingerprint: Response(-1.0, False, tokens=1) for task in tasks for request in task.requests}
    columns = sum(task.n * len(task.result("planned", guess).scores) for task in tasks)
    return {
        "rows": rows,
        "bytes_per_row": per_row,
        "responses": rows * per_row,
        "scores": recipes * columns * 8,
    }


def checked(scorer: Scorer, recipes: Sequence[Recipe], requests: Sequence[Request]) -> None:
    """Make sure that `work_of` says what the engine's planner says."""
    few, some = recipes[:: max(1, len(recipes) // 20)], Questions.of(scorer, requests[:60])
    overhead = scorer.overhead(Study.of(few).counted.calls)
    assert work_of(Study.of(few), some, scorer.budget or 1, overhead) == scorer.plan(few, some.requests)


def smaller(
    model: Model,
    machine: Machine,
    crew: Crew,
    studies: dict[str, Study],
    examples: dict[str, Questions],
) -> list[dict[str, Any]]:
    """What less would cost: fewer recipes, fewer examples."""
    kept = ("layer_calls", "shared_calls", "shared_tokens", "gpu_hours", "naive_gpu_hours")
    rows = []
    for name, study in studies.items():
        for how_many, asked in examples.items():
            row = planned(model, machine, crew, study, asked)
            sizes = {"recipes": len(study.recipes), "requests": len(asked.requests)}
            rows.append({"study": name, "examples": how_many, **sizes, **{key: row[key] for key in kept}})
    return rows


def table(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows as Markdown; `columns` names each column's format."""
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(format(row[name], how) for name, how in columns.items()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=Model.layers)
    parser.add_argument("--limit", type=int, help="only so many examples of each task, to try the script")
    parser.add_argument("--output", type=Path, default=Path("scaling-plan.json"))
    chosen = parser.parse_args()
    model, protocol = Model(layers=chosen.layers), PROTOCOLS["paper"]
    loaded = load("demo")
    scorer = Scorer(loaded.model, loaded.tokenizer)
    tasks = build(protocol.tasks, limit=chosen.limit)
    asked = Questions.of(scorer, (request for task in tasks for request in task.requests))
    standard = PROTOCOLS["standard"].limit
    few = Questions.of(scorer, (r for task in build(protocol.tasks, limit=standard) for r in task.requests))
    print(f"{len(asked.requests):,} requests of {len(tasks)} tasks", flush=True)

    without = [method for method in protocol.methods if method != "heat_map"]
    studies = {
        name: Study.of(Recipe("planned", v.schedule) for v in variants(model.layers, protocol, methods=methods))
        for name, methods in {"whole protocol": None, "without the heat map": without}.items()
    }
    whole = studies["whole protocol"]
    checked(scorer, whole.recipes, asked.requests)
    print(f"{len(whole.recipes):,} recipes, {whole.counted.calls:,} of {whole.naive:,} layer calls", flush=True)

    rows = [
        planned(model, machine, crew, whole, asked)
        for machine in MACHINES
        for crew in crews(model, machine, whole.counted.alive)
    ]
    report: dict[str, Any] = {
        "model": asdict(model) | {"layer_parameters": model.layer, "parameters": model.parameters},
        "machines": [asdict(machine) for machine in MACHINES],
        "tasks": [{"task": t.name, "examples": t.n, "requests": len(t.requests), "shots": t.shots} for t in tasks],
        "recipes": len(whole.recipes),
        "requests": len(asked.requests),
        "rows": rows,
        "traffic": traffic(whole.recipes, asked, max(row["units"] for row in rows)),
        "store": stored(len(whole.recipes), asked, tasks),
        "smaller": smaller(
            model, MACHINES[-1], Crew(8, 1, "one device"), studies, {"all": asked, f"{standard} per task": few}
        ),
    }
    chosen.output.write_text(json.dumps(report, indent=1))
    sizes = {"gpu_memory": ".0f", "gpus": "", "mode": "", "workers": "", "batch_tokens": ",", "units": ""}
    hours = {"gpu_hours": ",.0f", "naive_gpu_hours": ",.0f", "wall_hours": ",.0f", "longest_unit_hours": ".1f"}
    print(table(rows, sizes | hours | {"longest_batch_hours": ".2f", "busy": ".0%"}))
    less = {"study": "", "examples": "", "recipes": ",", "requests": ",", "shared_tokens": ",", "shared_calls": ","}
    print(table(report["smaller"], less | {"gpu_hours": ",.0f", "naive_gpu_hours": ",.0f"}))
    print(json.dumps({"traffic": report["traffic"], "store": report["store"]}, indent=1))


if __name__ == "__main__":
    main()

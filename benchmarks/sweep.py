"""What a sweep over many recipes costs: impasto's shared engine against lm-evaluation-harness, recipe by recipe.

    python benchmarks/sweep.py MODEL --tasks basic_skills_arithmetic,lambada_openai --limit 40 --output sweep.json

Both sides answer the same requests on the same loaded model in the same process, in turns; their scores are compared
request by request. The parts:

identity  the untouched model: impasto against the harness's own `hf` model;
study     the painters study with all widths and 10 random orders (`--protocol paper`) but no heat map: all recipes
          through impasto, against the harness on the scheduled model, one recipe after another with nothing reloaded;
heat      the same study with its heat map of widths by iterations;
process   one process per recipe, as the paper's authors ran it: start, load, read the tasks, score;
sharing   each kind of sharing switched off in turn, on the recipes that the harness is timed on.

The harness is not timed on every recipe: on `--peers` of them, spread evenly over the study in order of their layer
calls. Its whole is the study's number of layer calls times the mean seconds per layer call of those samples; the spread
is the 95 % bootstrap interval over the samples. The JSON holds machine, versions and every sample.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from impasto.encoding import quiet_harness
from impasto.hardware import machine
from impasto.models import load
from impasto.pace import pace
from impasto.recipe import Recipe
from impasto.result import Request
from impasto.runtime import scheduled
from impasto.schedule import Schedule
from impasto.scoring import Scorer, Sharing
from impasto.studies.protocol import METHODS, PROTOCOLS, variants
from impasto.tasks import build

PARTS = ("identity", "study", "heat", "process", "sharing")


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """How long `work` takes, the device's queue included, and what it returns."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def harness(model: Any, tokenizer: Any, batch: int, schedule: Schedule, requests: Sequence[Request]) -> np.ndarray:
    """The harness's own class on the scheduled model: log-likelihoods in the order of the requests."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    with quiet_harness(), torch.no_grad(), scheduled(model, schedule):
        peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        asked = [
            Instance("loglikelihood", {}, (request.context, request.continuation), i)
            for i, request in enumerate(requests)
        ]
        answers = peer.loglikelihood(asked, disable_tqdm=True)
    return np.array([value for value, _ in answers])


class Sweep:
    """One model, its requests, and what is measured on them."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        self.loaded = load(chosen.model, dtype=chosen.dtype)
        self.sets = build(chosen.tasks.split(","), limit=chosen.limit)
        self.scorer = Scorer(self.loaded.model, self.loaded.tokenizer, note=lambda text: print(f"  {text}", flush=True))
        self.requests = [request for task in self.sets for request in task.requests]
        self.identity = Recipe(chosen.model, Schedule.identity(self.loaded.layers))

    def harness(self, schedule: Schedule, requests: Sequence[Request]) -> np.ndarray:
        """The peer on some requests."""
        return harness(self.loaded.model, self.loaded.tokenizer, self.chosen.harness_batch, schedule, requests)

    def warm(self) -> None:
        """Both sides once on a few requests, outside of every clock."""
        self.scorer.score([self.identity], self.requests[:20])
        self.harness(self.identity.schedule, self.requests[:20])

    def untouched(self) -> list[dict[str, Any]]:
        """The identity schedule, task by task, in turns."""
        rows = []
        for task in self.sets:
            requests, ours, theirs, worst = list(task.requests), [], [], 0.0
            self.scorer.score(
                [self.identity], requests
            )  # both sides once, outside of the clock: allocators, autotuners
            self.harness(self.identity.schedule, requests)
            for _ in range(self.chosen.rounds):
                spent, scores = seconds(lambda asked=requests: self.scorer.score([self.identity], asked))
                ours.append(spent)
                spent, values = seconds(lambda asked=requests: self.harness(self.identity.schedule, asked))
                theirs.append(spent)
                worst = max(worst, float(np.abs(scores.loglikelihood[0] - values).max()))
            ratio = statistics.median(theirs) / statistics.median(ours)
            spread = [
                min(t / o for t, o in zip(theirs, ours, strict=True)),
                max(t / o for t, o in zip(theirs, ours, strict=True)),
            ]
            rows.append(
                {"task": task.name, "requests": len(requests), "impasto": ours, "harness": theirs}
                | {"ratio": ratio, "spread": spread, "largest_difference": worst}
            )
            print(
                f"identity {task.name}: {ratio:.2f} times faster ({spread[0]:.2f} to {spread[1]:.2f}), "
                f"largest difference {worst:.3g} nats",
                flush=True,
            )
        return rows

    def recipes(self, methods: Sequence[str]) -> list[Recipe]:
        """The study's distinct recipes."""
        found = variants(self.loaded.layers, PROTOCOLS[self.chosen.protocol], methods=methods, seeds=self.chosen.seeds)
        return [Recipe(self.chosen.model, variant.schedule) for variant in found]

    def picked(self, recipes: Sequence[Recipe]) -> list[int]:
        """Recipes on which the peer is timed: evenly spread in order of their layer calls."""
        order = sorted(range(len(recipes)), key=lambda i: recipes[i].schedule.calls)
        count = min(self.chosen.peers, len(recipes))
        return [order[int((i + 0.5) * len(recipes) / count)] for i in range(count)]

    def study(self, recipes: Sequence[Recipe]) -> dict[str, Any]:
        """All recipes through impasto, some through the harness."""
        work = self.scorer.plan(recipes, self.requests)
        predicted = pace(self.scorer).seconds(work)
        whole, scores = seconds(lambda: self.scorer.score(recipes, self.requests))
        samples, worst = [], 0.0
        for i in self.picked(recipes):
            schedule = recipes[i].schedule
            spent, values = seconds(lambda schedule=schedule: self.harness(schedule, self.requests))
            worst = max(worst, float(np.abs(scores.loglikelihood[i] - values).max()))
            samples.append({"schedule": str(schedule), "calls": schedule.calls, "seconds": spent})
            print(f"  harness on {schedule.calls} layer calls: {spent:.2f} s", flush=True)
        calls = sum(recipe.schedule.calls for recipe in recipes)
        each = np.array([sample["seconds"] / sample["calls"] for sample in samples])
        drawn = np.random.default_rng(0).choice(each, (10_000, len(each))).mean(1)
        ratio = calls * float(each.mean()) / whole
        spread = [calls * float(q) / whole for q in np.quantile(drawn, (0.025, 0.975))]
        print(
            f"{len(recipes)} recipes: {whole:.1f} s (predicted {predicted:.1f} s), {ratio:.1f} times faster "
            f"({spread[0]:.1f} to {spread[1]:.1f})",
            flush=True,
        )
        return {
            "recipes": len(recipes),
            "work": {name: getattr(work, name) for name in work.__slots__},
            "impasto": whole,
            "predicted": predicted,
            "harness_samples": samples,
            "harness": calls * float(each.mean()),
            "ratio": ratio,
            "spread": spread,
            "largest_difference": worst,
        }

    def processes(self, recipes: Sequence[Recipe], whole: float) -> dict[str, Any]:
        """A process of its own for some recipes, one after another, against impasto's seconds for all of them."""
        samples = []
        places = self.picked(recipes)
        for i in places[:: max(1, len(places) // self.chosen.processes)][: self.chosen.processes]:
            command = [sys.executable, __file__, self.chosen.model, "--alone", str(recipes[i].schedule)]
            for name in ("tasks", "limit", "harness_batch", "dtype"):
                command += [f"--{name.replace('_', '-')}", str(getattr(self.chosen, name))]
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            samples.append({"schedule": str(recipes[i].schedule), "seconds": time.perf_counter() - began})
            print(f"  a process for one recipe: {samples[-1]['seconds']:.1f} s", flush=True)
        # impasto's side pays once for starting, loading and reading the tasks: the least that a process took
        least = min(sample["seconds"] for sample in samples)
        each = [sample["seconds"] for sample in samples]
        ratio = len(recipes) * statistics.mean(each) / (whole + least)
        spread = [len(recipes) * value / (whole + least) for value in (min(each), max(each))]
        print(f"one process per recipe: {ratio:.1f} times faster ({spread[0]:.1f} to {spread[1]:.1f})", flush=True)
        return {"samples": samples, "start_counted_for_impasto": least, "ratio": ratio, "spread": spread}

    def sharing(self, recipes: Sequence[Recipe]) -> dict[str, float]:
        """What each kind of sharing is worth."""
        found = {}
        few = [recipes[i] for i in self.picked(recipes)]
        for name, sharing in {
            "everything": Sharing(),
            "calls off": Sharing(calls=False),
            "contexts off": Sharing(contexts=False),
            "head off": Sharing(head=False),
            "launches off": Sharing(launches=False),
        }.items():
            part = Scorer(self.loaded.model, self.loaded.tokenizer, sharing=sharing)
            part.head  # noqa: B018 - examined before the clock runs
            found[name], _ = seconds(lambda part=part: part.score(few, self.requests))
            print(f"sharing, {name}: {found[name]:.1f} s for {len(few)} recipes", flush=True)
        return found


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument(
        "--tasks", default="basic_skills_arithmetic,basic_skills_logical_reasoning,lambada_openai,hellaswag"
    )
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--parts", default="identity,study,sharing", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds of identity")
    parser.add_argument("--peers", type=int, default=6, help="recipes on which the harness is timed")
    parser.add_argument("--processes", type=int, default=2, help="recipes that get a process of their own")
    parser.add_argument("--harness-batch", type=int, default=16)
    parser.add_argument("--protocol", default="paper", choices=list(PROTOCOLS))
    parser.add_argument("--seeds", type=int, help="random orders per width; else the protocol's")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, default=Path("sweep.json"))
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure the parts that are asked for; the JSON is written after each."""
    chosen = options()
    parts = chosen.parts.split(",")
    sweep = Sweep(chosen)
    if chosen.alone is not None:
        sweep.harness(Schedule.parse(chosen.alone), sweep.requests)
        return
    report: dict[str, Any] = {
        "machine": machine(sweep.loaded.device),
        "setting": vars(sweep.loaded.setting),
        "options": {k: str(v) for k, v in vars(chosen).items()},
    }

    def keep(name: str, value: Any) -> None:
        report[name] = value
        chosen.output.write_text(json.dumps(report, indent=1))

    without = sweep.recipes([name for name in METHODS if name != "heat_map"])
    sweep.warm()
    if "identity" in parts:
        keep("identity", sweep.untouched())
    if "study" in parts or "process" in parts:
        keep("study", sweep.study(without))
    if "process" in parts:
        keep("process", sweep.processes(without, report["study"]["impasto"]))
    if "heat" in parts:
        keep("heat", sweep.study(sweep.recipes(tuple(METHODS))))
    if "sharing" in parts:
        keep("sharing", sweep.sharing(without))


if __name__ == "__main__":
    main()

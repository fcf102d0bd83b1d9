"""What a sweep over many recipes costs: impasto's shared engine against lm-evaluation-harness, recipe by recipe.

    python benchmarks/sweep.py MODEL --tasks basic_skills_arithmetic,lambada_openai --limit 40 --output sweep.json

Both sides answer the same requests on the same loaded model in the same process, in turns:

(a) the untouched model: impasto against the harness's own `hf` model;
(b) the painters study: all its recipes through impasto, against the harness on the scheduled model, one recipe after
    another with nothing reloaded. The harness is timed on some recipes spread over the study (`--peers`), and its whole
    is its mean times their number; the scores of those recipes are compared request by request.

Each kind of sharing is also switched off in turn, on the same recipes that the harness is timed on. The JSON holds
machine, versions and every sample; the last line printed is its summary.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from impasto.encoding import quiet_harness
from impasto.models import load
from impasto.pace import pace
from impasto.recipe import Recipe
from impasto.result import Request
from impasto.runtime import scheduled
from impasto.schedule import Schedule
from impasto.scoring import Scorer, Sharing
from impasto.studies.protocol import PROTOCOLS, variants
from impasto.tasks import build


def seconds(work: Any) -> tuple[float, Any]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def harness(model: Any, tokenizer: Any, batch: int, schedule: Schedule, requests: list[Request]) -> np.ndarray:
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


def machine() -> dict[str, Any]:
    packages = ("impasto", "torch", "transformers", "lm_eval")
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "source tree"
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": found,
        "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument(
        "--tasks", default="basic_skills_arithmetic,basic_skills_logical_reasoning,lambada_openai,hellaswag"
    )
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds of (a)")
    parser.add_argument("--peers", type=int, default=6, help="recipes on which the harness is timed in (b)")
    parser.add_argument("--harness-batch", type=int, default=16)
    parser.add_argument("--protocol", default="quick", choices=list(PROTOCOLS))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, default=Path("sweep.json"))
    chosen = parser.parse_args()

    loaded = load(chosen.model, dtype=chosen.dtype)
    depth = loaded.layers
    sets = build(chosen.tasks.split(","), limit=chosen.limit)
    scorer = Scorer(loaded.model, loaded.tokenizer)
    identity = Recipe(chosen.model, Schedule.identity(depth))
    report: dict[str, Any] = {
        "machine": machine(),
        "setting": vars(loaded.setting),
        "options": {k: str(v) for k, v in vars(chosen).items()},
        "identity": [],
    }
    everything = [request for task in sets for request in task.requests]
    scorer.score([identity], everything[:20])  # warm
    harness(loaded.model, loaded.tokenizer, chosen.harness_batch, identity.schedule, everything[:20])
    for task in sets:
        requests, ours, theirs, worst = list(task.requests), [], [], 0.0
        for _ in range(chosen.rounds):
            spent, scores = seconds(lambda asked=requests: scorer.score([identity], asked))
            ours.append(spent)
            spent, values = seconds(
                lambda asked=requests: harness(
                    loaded.model, loaded.tokenizer, chosen.harness_batch, identity.schedule, asked
                )
            )
            theirs.append(spent)
            worst = max(worst, float(np.abs(scores.loglikelihood[0] - values).max()))
        ratio = statistics.median(theirs) / statistics.median(ours)
        row = {"task": task.name, "requests": len(requests), "impasto": ours, "harness": theirs, "ratio": ratio}
        report["identity"].append(row | {"largest_difference": worst})
        print(f"(a) {task.name}: {ratio:.2f} times faster, largest difference {worst:.3g} nats", flush=True)

    recipes = [Recipe(chosen.model, v.schedule) for v in variants(depth, PROTOCOLS[chosen.protocol])]
    work = scorer.plan(recipes, everything)
    predicted = pace(scorer).seconds(work)
    whole, scores = seconds(lambda: scorer.score(recipes, everything))
    picked = [round(i * (len(recipes) - 1) / max(1, chosen.peers - 1)) for i in range(chosen.peers)]
    samples, worst = [], 0.0
    for i in picked:
        spent, values = seconds(
            lambda i=i: harness(loaded.model, loaded.tokenizer, chosen.harness_batch, recipes[i].schedule, everything)
        )
        samples.append(spent)
        worst = max(worst, float(np.abs(scores.loglikelihood[i] - values).max()))
        print(f"(b) harness on {recipes[i]}: {spent:.1f} s", flush=True)
    theirs = statistics.mean(samples) * len(recipes)
    spread = [min(samples) * len(recipes) / whole, max(samples) * len(recipes) / whole]
    report["study"] = {
        "recipes": len(recipes),
        "work": {name: getattr(work, name) for name in work.__slots__},
        "impasto": whole,
        "predicted": predicted,
        "harness_samples": samples,
        "harness": theirs,
        "ratio": theirs / whole,
        "spread": spread,
        "largest_difference": worst,
    }
    print(
        f"(b) {len(recipes)} recipes: {theirs / whole:.1f} times faster ({spread[0]:.1f} to {spread[1]:.1f})",
        flush=True,
    )

    few = [recipes[i] for i in picked]
    report["sharing"] = {}
    for name, sharing in {
        "everything": Sharing(),
        "calls off": Sharing(calls=False),
        "contexts off": Sharing(contexts=False),
        "head off": Sharing(head=False),
    }.items():
        part = Scorer(loaded.model, loaded.tokenizer, sharing=sharing)
        part.head  # noqa: B018 - examined before the clock runs
        spent, _ = seconds(lambda part=part: part.score(few, everything))
        report["sharing"][name] = spent
        print(f"(sharing) {name}: {spent:.1f} s for {len(few)} recipes", flush=True)
    chosen.output.write_text(json.dumps(report, indent=1))
    print(
        json.dumps(
            {
                "identity": {r["task"]: round(r["ratio"], 2) for r in report["identity"]},
                "study": round(theirs / whole, 2),
            }
        )
    )


if __name__ == "__main__":
    main()

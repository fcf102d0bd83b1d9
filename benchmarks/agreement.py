"""How far ways of scoring the same requests agree: impasto and the harness, in several dtypes and batch sizes.

    python benchmarks/agreement.py MODEL --tasks winogrande --limit 200 --output agreement.json

Every way scores every request with the untouched model. The JSON holds for each pair of ways the largest and the mean
difference of a request's log-likelihood, where the largest one is, and each way's distance to the float32 ones; so it
shows which side a difference comes from, and whether it comes from the batch size, the dtype or the code.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from impasto.hardware import machine
from impasto.models import load
from impasto.recipe import Recipe
from impasto.schedule import Schedule
from impasto.scoring import Scorer, Sharing
from impasto.tasks import build
from sweep import harness


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tasks", default="winogrande")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--attentions", default="sdpa", help="attention implementations of transformers")
    parser.add_argument("--harness-batches", default="1,64")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("agreement.json"))
    return parser.parse_args()


def main() -> None:
    """Score in all ways, compare all pairs."""
    chosen = options()
    requests = [request for task in build(chosen.tasks.split(","), limit=chosen.limit) for request in task.requests]
    ways: dict[str, np.ndarray] = {}
    for dtype, attention in itertools.product(chosen.dtypes.split(","), chosen.attentions.split(",")):
        loaded = load(chosen.model, dtype=dtype, device=chosen.device, attention=attention)
        identity = Schedule.identity(loaded.layers)
        recipe, name = Recipe(chosen.model, identity), f"{dtype} {attention}"
        for label, more in {"": {}, " contexts not shared": {"sharing": Sharing(contexts=False)}}.items():
            scorer = Scorer(loaded.model, loaded.tokenizer, **more)
            ways[f"impasto {name}{label}"] = scorer.score([recipe], requests).loglikelihood[0]
        scorer = Scorer(loaded.model, loaded.tokenizer, budget=1)
        ways[f"impasto {name} one by one"] = scorer.score([recipe], requests).loglikelihood[0]
        for batch in map(int, chosen.harness_batches.split(",")):
            values = harness(loaded.model, loaded.tokenizer, batch, identity, requests)
            ways[f"harness {name} batch {batch}"] = values
        device = loaded.device
        del loaded, scorer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    pairs: list[dict[str, Any]] = []
    for (one, a), (other, b) in itertools.combinations(ways.items(), 2):
        gap = np.abs(a - b)
        worst = int(gap.argmax())
        pairs.append(
            {"ways": [one, other], "largest": float(gap[worst]), "mean": float(gap.mean()), "where": worst}
            | {"values": [float(a[worst]), float(b[worst])]}
        )
        print(f"{gap.max():9.4g} {gap.mean():9.3g}  {one} | {other}", flush=True)
    report = {"machine": machine(device), "options": {k: str(v) for k, v in vars(chosen).items()}}
    report |= {
        "requests": len(requests),
        "pairs": pairs,
        "samples": {name: values.tolist() for name, values in ways.items()},
    }
    chosen.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

"""How cost and memory grow with the number of recipes and with depth, on tiny random models: measured and predicted.

    python benchmarks/curves.py --output benchmarks/results/curves.json --figures docs/figures

(d) seconds for 1 to 1,000 recipes of one study, and for one small study of models of 6 to 80 layers. Beside each run
    stands what the planner said before it: `Scorer.plan` counts, `pace` times one layer and the head. Runs are
    repeated in turns, so that a slow moment of the machine hits all sizes alike.
(e) peak memory for 10 to 1,000 recipes, weights included: on CUDA the allocator's own peak, on a CPU the bytes of all
    tensors alive, followed from their birth to their death.

Every sample is kept in the JSON, with machine and versions; the last line printed is its summary.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from impasto.hardware import machine
from impasto.pace import pace
from impasto.plots import save
from impasto.recipe import Recipe
from impasto.result import Figure, Request
from impasto.scoring import Scorer
from impasto.studies.protocol import PROTOCOLS, Protocol, variants
from sweep import seconds

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import tiny_model, tiny_tokenizer

DEPTH = 16  # of (d) over recipes and of (e)
DEPTHS = (6, 12, 24, 40, 60, 80)
SIZES = (1, 3, 10, 30, 100, 300, 1000)
SEEDS = 160  # random orders per start layer, so that there are more than 1,000 recipes
WIDTHS = 8  # of the small study that is run at every depth
ROWS, LENGTH, BUDGET = 4, 64, 1024  # one batch of the shape that `pace` times
SHORT, SCORED = 4, 28  # tokens read and scored of a text in (e): the head's share is full with ten recipes already


def scorer_of(layers: int, width: int, device: str) -> Scorer:
    """A random model of so many layers."""
    model = tiny_model(layers=layers, hidden_size=width, intermediate_size=2 * width, head_dim=width // 4)
    return Scorer(model.to(device), tiny_tokenizer(bos=False), budget=BUDGET)


def questions(read: int, scored: int) -> list[Request]:
    """Texts of one length with nothing in common; the tokenizer makes one token of each letter."""
    rng = random.Random(0)
    texts = ("".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(read + scored)) for _ in range(ROWS))
    return [Request("loglikelihood", text[:read], text[read:]) for text in texts]


def recipes_of(layers: int, protocol: Protocol, seeds: int) -> list[Recipe]:
    """The recipes of a protocol, the full model first and the others in random order."""
    found = [Recipe("random", variant.schedule) for variant in variants(layers, protocol, seeds=seeds)]
    rest = found[1:]
    random.Random(0).shuffle(rest)
    return [found[0], *rest]


def measured(scorer: Scorer, recipes: Sequence[Recipe], asked: Sequence[Request], row: dict[str, Any]) -> None:
    """One more sample of a row: what was predicted, and what it took."""
    work = scorer.plan(recipes, asked)
    row["predicted"].append(pace(scorer).seconds(work))
    spent, _ = seconds(lambda: scorer.score(recipes, asked))
    row["seconds"].append(spent)
    row["work"] = {name: getattr(work, name) for name in work.__slots__}
    print(
        f"{row['layers']} layers, {row['recipes']} recipes: {row['predicted'][-1]:.2f} s predicted, {spent:.2f} s taken"
    )


def over_recipes(scorer: Scorer, pool: list[Recipe], sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """(d): cost against the number of recipes; the largest study is run in the first round only."""
    rows = [{"layers": DEPTH, "recipes": size, "predicted": [], "seconds": []} for size in sizes]
    for turn in range(rounds):
        for row in rows:
            if turn == 0 or row["recipes"] <= 300:
                measured(scorer, pool[: row["recipes"]], questions(LENGTH, 1), row)
    return rows


def over_depths(width: int, device: str, depths: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """(d): cost of one small study against depth."""
    small = replace(PROTOCOLS["paper"], starts=WIDTHS, methods=("skip", "reverse", "random_order", "parallel"))
    rows: list[dict[str, Any]] = []
    scorers, pools = [], []
    for layers in depths:
        scorers.append(scorer_of(layers, width, device))
        pools.append(recipes_of(layers, small, seeds=1))
        rows.append({"layers": layers, "recipes": len(pools[-1]), "predicted": [], "seconds": []})
    for _ in range(rounds):
        for row, scorer, pool in zip(rows, scorers, pools, strict=True):
            measured(scorer, pool, questions(LENGTH, 1), row)
    return rows


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on, and forgets them when they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor):
                self.note(value.untyped_storage())
        return made

    def note(self, storage: torch.UntypedStorage) -> None:
        """Count a storage once, until it is gone."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, key, size)

    def gone(self, key: int, size: int) -> None:
        """A storage was freed."""
        self.known.discard(key)
        self.now -= size


def peak_bytes(scorer: Scorer, recipes: Sequence[Recipe], asked: Sequence[Request]) -> int:
    """The most bytes at once while scoring, weights included."""
    scorer.head  # noqa: B018 - examined before
    weights = sum(t.numel() * t.element_size() for t in (*scorer.model.parameters(), *scorer.model.buffers()))
    if scorer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(scorer.device)
        scorer.score(recipes, asked)
        return torch.cuda.max_memory_allocated(scorer.device)
    alive = Alive()
    for tensor in (*scorer.model.parameters(), *scorer.model.buffers()):
        alive.known.add(tensor.untyped_storage()._cdata)
    with alive:
        scorer.score(recipes, asked)
    return weights + alive.peak


def over_memory(scorer: Scorer, pool: list[Recipe], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """(e): peak memory against the number of recipes."""
    rows = []
    weights = sum(t.numel() * t.element_size() for t in scorer.model.parameters())
    for size in sizes:
        few, asked = pool[:size], questions(SHORT, SCORED)
        work = scorer.plan(few, asked)
        row = {
            "recipes": size,
            "peak": peak_bytes(scorer, few, asked),
            "weights": weights,
            "states_predicted": pace(scorer).state * work.shared_tokens * (work.alive + 8),
            "alive": work.alive,
        }
        rows.append(row)
        print(f"{size} recipes: {row['peak']:,} bytes at the most, {weights:,} of them weights; {work.alive} states")
    return rows


def figures(report: dict[str, Any]) -> list[Figure]:
    """The three curves as figures."""

    def curve(rows: Sequence[dict[str, Any]], x: str) -> tuple[dict[str, Any], ...]:
        return tuple(
            {
                "x": row[x],
                "y": statistics.median(row[name]),
                "low": min(row[name]),
                "high": max(row[name]),
                "series": series,
            }
            for name, series in (("seconds", "measured"), ("predicted", "predicted before"))
            for row in rows
        )

    spread = "Median of the runs; the band is from the fastest to the slowest."
    memory = tuple(
        {"x": row["recipes"], "y": value / 2**20, "series": series}
        for row in report["memory"]
        for value, series in ((row["peak"], "at the most"), (row["weights"], "weights alone"))
    )
    return [
        Figure(
            "cost-recipes",
            "Cost against the number of recipes",
            f"A random model of {DEPTH} layers. {spread}",
            "layer_curve",
            curve(report["recipes"], "recipes"),
            {"x_title": "recipes", "y_title": "seconds"},
        ),
        Figure(
            "cost-depth",
            "Cost of one small study against depth",
            f"Random models; skip, reverse, random order and parallel at up to {WIDTHS} widths. {spread}",
            "layer_curve",
            curve(report["depths"], "layers"),
            {"x_title": "layers", "y_title": "seconds"},
        ),
        Figure(
            "memory-recipes",
            "Peak memory against the number of recipes",
            f"The same model of {DEPTH} layers, all tensors counted.",
            "layer_curve",
            memory,
            {"x_title": "recipes", "y_title": "MiB", "y_domain": (0, 1.1 * max(row["y"] for row in memory))},
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--memory-width", type=int, default=128, help="wider, so that weights outweigh states as usual")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=int, default=SIZES[-1], help="no more recipes than this, to try the script")
    parser.add_argument("--deepest", type=int, default=DEPTHS[-1], help="no more layers than this, likewise")
    parser.add_argument("--output", type=Path, default=Path("curves.json"))
    parser.add_argument("--figures", type=Path, help="folder for SVG, PNG and CSV")
    chosen = parser.parse_args()

    sizes = [size for size in SIZES if size <= chosen.most]
    depths = [depth for depth in DEPTHS if depth <= chosen.deepest]
    pool = recipes_of(DEPTH, PROTOCOLS["paper"], seeds=SEEDS)
    scorer = scorer_of(DEPTH, chosen.width, chosen.device)
    scorer.score(pool[:3], questions(LENGTH, 1))  # warm
    report: dict[str, Any] = {
        "machine": machine(torch.device(chosen.device)),
        "options": {k: str(v) for k, v in vars(chosen).items()},
        "pool": len(pool),
        "recipes": over_recipes(scorer, pool, sizes, chosen.rounds),
        "depths": over_depths(chosen.width, chosen.device, depths, chosen.rounds),
        "memory": over_memory(
            scorer_of(DEPTH, chosen.memory_width, chosen.device), pool, [size for size in sizes if size >= 10]
        ),
    }
    chosen.output.write_text(json.dumps(report, indent=1))
    if chosen.figures is not None:
        for figure in figures(report):
            save(figure, chosen.figures)
    ratios = [
        t / p
        for row in (*report["recipes"], *report["depths"])
        for t, p in zip(row["seconds"], row["predicted"], strict=True)
    ]
    peaks = [row["peak"] for row in report["memory"]]
    print(
        json.dumps(
            {
                "taken over predicted": [
                    round(min(ratios), 2),
                    round(statistics.median(ratios), 2),
                    round(max(ratios), 2),
                ],
                "memory, most over least": round(max(peaks) / min(peaks), 3),
            }
        )
    )


if __name__ == "__main__":
    main()

# ruff: noqa: B905
"""A page of invented numbers, to look at drawings while changing them: `python synthetic_page.py FOLDER`.

Nothing here was measured.
"""

from __future__ import annotations

import math
import random
import sys
import time

from impasto.report import write
from impasto.result import Answer, Estimate, Figure, Page

LAYERS = 18
TASKS = [
    "arithmetic",
    "logical reasoning",
    "string operations",
    "pattern",
    "common knowledge",
    "LAMBADA",
    "HellaSwag",
    "WinoGrande",
]
METHODS = ["skip", "middle repeat", "reverse", "random", "parallel", "looped parallel k=3"]
HARM = [1.1, 1.9, 0.95, 0.8, 1.0, 0.6]
WIDTHS = list(range(1, LAYERS, 2))


def page() -> Page:
    chance = random.Random(7)

    def noisy(value: float, half: float, **more: object) -> dict[str, object]:
        value += chance.gauss(0, half / 2)
        return {
            **more,
            "y": value,
            "low": value - half * chance.uniform(0.8, 1.3),
            "high": value + half * chance.uniform(0.8, 1.3),
        }

    curve = []
    for task, full in (("arithmetic", 0.65), ("common knowledge", 0.8), ("LAMBADA", 0.55), ("HellaSwag", 0.45)):
        for kind in ("skip one layer", "swap with the next"):
            for layer in range(LAYERS - (kind != "skip one layer")):
                depth = min(1, abs(layer - 10) / 12) ** 2 * 0.8 + (0.25 if kind == "skip one layer" else 0.12)
                curve.append(noisy(full * (1 - min(depth, 0.95)), 0.06, x=layer, series=kind, panel=task))
    curve[5].update(y=None, low=None, high=None)
    curve_rules = [
        {"value": v, "name": "full model", "panel": t}
        for t, v in (("arithmetic", 0.65), ("common knowledge", 0.8), ("LAMBADA", 0.55), ("HellaSwag", 0.45))
    ]
    curve_rules += [
        {"value": v, "name": "chance", "panel": t}
        for t, v in (("arithmetic", 0.1), ("common knowledge", 0.2), ("LAMBADA", 0.0), ("HellaSwag", 0.25))
    ]
    affected, summary = [], []
    for method, harm in zip(METHODS, HARM):
        for width in WIDTHS:
            values = []
            for place, task in enumerate(TASKS):
                steep = harm * (1.5 if place < 4 else 0.7)
                level = 0.0 if width == 1 and method != "skip" else math.exp(-((width / LAYERS * 2 * steep) ** 2))
                level = 1.0 if width == 1 and method not in ("skip", "looped parallel k=3") else level
                row = noisy(level, 0.12, x=width, series=method, panel=task)
                if task == "string operations":
                    row.update(y=None, low=None, high=None)
                else:
                    values.append(row["y"])
                affected.append(row)
            summary.append({**noisy(sorted(values)[3], 0.07, x=width, series=method)})
    names = [[0, 1, "embedding"], [1, 4, "beginning"], [4, 16, "middle"], [16, 19, "end"]]
    matrix = []
    for label, base in (("as in the paper", 0.95), ("per token, centred", 0.6)):
        for i in range(LAYERS + 1):
            for j in range(LAYERS + 1):
                group = [next(k for k, (a, b, _) in enumerate(names) if a <= s < b) for s in (i, j)]
                value = (
                    1.0
                    if i == j
                    else (
                        base ** (1 + abs(i - j) / 6) if group[0] == group[1] else 0.25 * base ** (abs(i - j) / 3) + 0.02
                    )
                )
                matrix.append({"panel": label, "row": i, "column": j, "value": value})
    heat = []
    for width in range(3, 31, 2):
        for k in range(1, 29):
            value = 0.65 * math.exp(-(((k - 0.45 * width - 1) / (0.25 * width + 3)) ** 2)) * (
                1 - width / 50
            ) + chance.gauss(0, 0.015)
            heat.append({"x": width, "y": k, "value": None if (width, k) == (13, 20) else value})
    bars = []
    for kind, tasks in (("order-sensitive tasks", TASKS[:4]), ("order-insensitive tasks", TASKS[4:])):
        for task in tasks:
            for method in METHODS[2:4]:
                value = (
                    (0.25 if "in" not in kind[:8] else 0.7) + chance.gauss(0, 0.08)
                    if task != "string operations"
                    else None
                )
                bars.append(
                    {
                        "label": task,
                        "series": method,
                        "panel": kind,
                        "value": value,
                        "low": value and value - 0.11,
                        "high": value and value + 0.1,
                    }
                )
    states = []
    for method, growth in (("full model", 0.22), ("skip", 0.2), ("middle repeat", 0.42)):
        for call in range(LAYERS + 1):
            states.append(
                {
                    "panel": "variance of the state",
                    "series": method,
                    "x": call,
                    "y": math.exp(growth * call) * (5 if call > 15 else 1),
                }
            )
            states.append(
                {
                    "panel": "cosine to the full model",
                    "series": method,
                    "x": call,
                    "y": 1.0 if method == "full model" or call < 6 else max(0.1, 1 - (growth - 0.1) * (call - 5) / 6),
                }
            )
    scatter = []
    for method, harm in zip(METHODS, HARM):
        for n in range(4):
            x, y = 90 - n * 14 + chance.gauss(0, 3), 0.75 - harm * n * 0.1 + chance.gauss(0, 0.02)
            scatter.append(
                {
                    "x": x,
                    "x_low": x - 2,
                    "x_high": x + 2.5,
                    "y": y,
                    "low": y - 0.03,
                    "high": y + 0.03,
                    "series": method,
                    "frontier": method == METHODS[5],
                    "label": f"M={2 * n + 1}" if method == METHODS[5] else None,
                }
            )
    best, trace = 0.42, []
    for step in range(40):
        y = best + chance.gauss(-0.01, 0.02)
        taken = y > best
        best = max(best, y)
        trace.append({"x": step, "y": y, "low": y - 0.015, "high": y + 0.015, "accepted": taken})
    a = "Layers"
    b = "Methods"
    figures = (
        Figure(
            "skip-swap",
            "One layer skipped or swapped",
            "Accuracy when one layer is left out, or trades places with the next. Bands are 95 % intervals of a paired bootstrap; dashed lines are the full model and chance.",
            "layer_curve",
            tuple(curve),
            {"rules": curve_rules, "y_title": "accuracy", "x_title": "layer", "section": a},
        ),
        Figure(
            "similarity",
            "Similarity of hidden states",
            "Cosine similarity between the states after every layer call: as the paper computed it, and without padding, per token and centred. Boxes: the groups found.",
            "matrix",
            tuple(matrix),
            {"groups": names, "domain": [0, 1], "section": a},
        ),
        Figure(
            "similarity-one",
            "One matrix",
            "A single matrix.",
            "matrix",
            tuple(r for r in matrix if r["panel"] == "as in the paper"),
            {"groups": names, "section": a},
        ),
        Figure(
            "affected",
            "Every method, task by task",
            "Normalised score (0 is chance, 1 the full model) against the number of affected layers. String operations is undefined: the full model is not above chance.",
            "affected_curves",
            tuple(affected),
            {"series": METHODS, "section": b},
        ),
        Figure(
            "summary",
            "All methods together",
            "Median of the normalised scores over tasks.",
            "summary_curves",
            tuple(summary),
            {"series": METHODS, "section": b},
        ),
        Figure(
            "heat",
            "Iterations against width",
            "Median normalised score of looped parallel; red: the best number of iterations of each width; dashed: its fitted line.",
            "heatmap",
            tuple(heat),
            {"fit": (0.45, 1.0), "section": b},
        ),
        Figure(
            "heat-quick",
            "Iterations against width, quick",
            "Few cells.",
            "heatmap",
            tuple({"x": m, "y": k, "value": 1 - abs(k - m / 3) / 9} for m in (3, 7, 11, 15) for k in (1, 2, 3, 5, 8)),
            {"section": b},
        ),
        Figure(
            "order",
            "Order and kind of task",
            "Normalised score with half of the layers in another order.",
            "bars",
            tuple(bars),
            {
                "series": METHODS,
                "rules": [{"value": 0, "name": "chance"}, {"value": 1, "name": "full model"}],
                "section": b,
            },
        ),
        Figure(
            "plain-bars",
            "Plain bars",
            "No series, no panel.",
            "bars",
            tuple(
                {"label": m, "value": 1 - h / 2, "low": 0.9 - h / 2, "high": 1.1 - h / 2} for m, h in zip(METHODS, HARM)
            ),
            {"section": b},
        ),
        Figure(
            "states",
            "Why repeat is worse than skip",
            "Variance of the state and its cosine to the full model's.",
            "states",
            tuple(states),
            {"series": ["full model", *METHODS], "log": ["variance of the state"], "section": b},
        ),
        Figure(
            "latency",
            "Accuracy against latency",
            "Milliseconds a token, batch 1.",
            "scatter",
            tuple(scatter),
            {"series": METHODS, "x_title": "ms per token", "section": "Later studies"},
        ),
        Figure(
            "search",
            "A search",
            "Every trial of the search.",
            "trace",
            tuple(trace),
            {"rules": [{"value": 0.42, "name": "full model"}], "section": "Later studies"},
        ),
        Figure(
            "one-curve",
            "One task, one series",
            "Single panel.",
            "layer_curve",
            tuple(r for r in curve if r["panel"] == "LAMBADA" and r["series"] == "skip one layer"),
            {"section": "Later studies"},
        ),
        Figure(
            "affected-two",
            "Two tasks",
            "Two panels.",
            "affected_curves",
            tuple(r for r in affected if r["panel"] in TASKS[:2]),
            {"series": METHODS, "section": "Later studies"},
        ),
        Figure("empty", "Nothing", "No rows at all.", "bars", (), {"section": "Later studies"}),
    )
    answers = (
        Answer(
            "space",
            "Do the middle layers share one representation space?",
            "yes",
            "States 4 to 15 are more alike than states of different groups, by 0.41 in centred cosine similarity.",
            Estimate(0.41, 0.36, 0.46),
            "difference of cosine",
            "one block of states 2 to 30 with similarity above 0.94 (Llama2-7B).",
            "Yes when the interval of the difference lies above 0.1.",
            "similarity",
        ),
        Answer(
            "all",
            "Are all layers necessary?",
            "unclear",
            "Leaving out one middle layer costs 0.05 of the normalised score in the median; the interval includes zero.",
            Estimate(-0.05, -0.13, 0.02),
            "normalised score",
            "a few middle layers can be dropped with little loss.",
            "Unclear when the interval includes the margin of 0.05.",
            "skip-swap",
        ),
        Answer(
            "same",
            "Do all middle layers do the same?",
            "no",
            "Repeating the centre layer instead of running its neighbours scores 0.62 lower than skipping them.",
            Estimate(-0.62, -0.74, -0.5),
            "normalised score",
            "no: repeating one layer is by far the worst of all methods.",
            "No when the interval lies below zero.",
            "summary",
        ),
        Answer(
            "order",
            "Does the order of the layers matter more for arithmetic and reasoning?",
            "yes",
            "Order-sensitive tasks lose 0.38 more than the others when half of the layers are reversed.",
            Estimate(0.38, 0.25, 0.52),
            "normalised score",
            "ARC and GSM8K fall steepest; WinoGrande and HellaSwag are robust.",
            "Yes when the interval lies above zero.",
            "order",
        ),
        Answer(
            "kv",
            "Does the averaged KV cache of the authors change generated answers?",
            "unclear",
            "Not measured: no generative task in this run.",
            None,
            "",
            "not reported.",
            "Needs a generative task.",
            None,
        ),
    )
    facts = {
        "command": "impasto study painters demo --protocol quick --tasks arithmetic,lambada --seeds 3",
        "model": "synthetic (invented numbers)",
        "weights": "0123456789abcdef" * 2,
        "dtype": "float32",
        "device": "cpu, 2 cores",
        "versions": "torch 2.13, transformers 5.23, lm-eval 0.4.13",
        "time": "9 min 12 s",
    }
    notes = (
        "Every number on this page is invented.",
        "String operations is not usable: the full model scores 0.18 at a chance level of 0.21, so its normalised score is undefined and left out.",
    )
    table = tuple(
        {
            "task": t,
            "full model": chance.random(),
            "chance": 0.25,
            "majority": 0.27,
            "n": 400,
            "usable": t != "string operations",
        }
        for t in TASKS
    )
    return Page(
        "Transformer layers as painters",
        "synthetic model, 18 layers, 8 tasks, protocol quick, 22 November 2025",
        answers,
        figures,
        notes,
        facts,
        (("Tasks", table),),
    )


if __name__ == "__main__":
    start = time.perf_counter()
    target = write(page(), sys.argv[1])
    print(target, f"{target.stat().st_size / 1e6:.2f} MB, {time.perf_counter() - start:.1f} s")

"""What LASER's grid costs: impasto over all candidates at once, against the procedure of the paper's code.

    python benchmarks/laser.py --model demo --task laser_fever_validation --limit 200 --candidates 12

A candidate is one matrix of one layer at one fraction of its rank; the grid is all of them, and the model as it is. On
one loaded model, in one process, in turns, `--rounds` times:

impasto   the whole grid, with an empty folder for components, so that every weight is decomposed in every round;
written   candidate by candidate as the paper's scripts do it: singular value decomposition of the matrix, the product
          written back, then one text at a time: logits of all positions, log_softmax over the vocabulary at each, the
          likeliest words sorted, the answers' log-probabilities read one by one;
batched   the same with impasto's number of tokens in each batch, padded on the right, sorted by length.

The authors take `torch.svd_lowrank` without a seed, which is another matrix each time; here both sides have the exact
one, so that their numbers can be compared. Seconds of the decompositions are kept apart, and `without_svd` are the
ratios with none of them on the peers' side. The peers get their texts as tokens; impasto's seconds hold its own
encoding.

The peers are slow. With `--candidates K` they run on K candidates drawn at random, other ones in each round, and their
seconds for the grid are the mean of these samples times the number of candidates; the JSON says so, and from how many.
Spreads are 95 % bootstrap intervals over the samples. Log-likelihoods of all requests are compared on every candidate
that both sides ran, and so is which of these candidates, and of the model as it is, each side would choose: the most
accurate, of equals the one with the lowest loss. `--screen` adds what one backward pass foretells of the grid.

    python benchmarks/laser.py --svd 4096x11008 --rounds 3 --output svd.json

measures one decomposition and no model: the library's own, impasto's with an empty folder (which hashes the weight and
keeps the components), and impasto's again, which finds them, in turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from impasto import memory
from impasto.composition import Verdict
from impasto.edit import Edit
from impasto.encoding import Piece
from impasto.hardware import machine
from impasto.models import load
from impasto.recipe import Recipe
from impasto.result import Request, Response
from impasto.schedule import Schedule
from impasto.scoring import Scorer
from impasto.screening import screen
from impasto.surgery import edited
from impasto.svd import decompose
from impasto.tasks import build
from sweep import seconds

RHOS = "0.9,0.8,0.6,0.4,0.2,0.1,0.05,0.01"
TOP = 10  # likeliest words that the paper's scripts look at


class Peer:
    """The procedure of the paper's code on one loaded model.

    Args:
        model: the transformers model.
        pieces: the requests as tokens; those of one text, which differ in a last token that is not run, are one text.
        count: how many requests there are.
    """

    def __init__(self, model: Any, pieces: Sequence[Piece], count: int) -> None:
        self.model, self.count = model, count
        self.device = next(model.parameters()).device
        self.texts: dict[tuple[int, ...], list[Piece]] = {}
        for piece in pieces:
            self.texts.setdefault(piece.tokens, []).append(piece)

    def parameter(self, edit: Edit) -> torch.nn.Parameter:
        """The weight that an edit names."""
        [found] = [
            parameter
            for name, parameter in self.model.named_parameters()
            if name.endswith(f".{edit.layers[0]}.{edit.matrix}.weight")
        ]
        return found

    def candidate(self, edit: Edit, tokens: int) -> dict[str, Any]:
        """One candidate from its decomposition to its log-likelihoods.

        Args:
            edit: the candidate.
            tokens: of a batch; 0 is one text at a time.
        """
        parameter = self.parameter(edit)
        before = parameter.detach().clone()
        try:
            svd, _ = seconds(lambda: self.write(parameter, edit))
            scoring, values = seconds(lambda: self.score(tokens))
        finally:
            with torch.no_grad():
                parameter.copy_(before)
        return {"edit": str(edit), "svd": svd, "seconds": svd + scoring, "values": values}

    @torch.no_grad()
    def write(self, parameter: torch.nn.Parameter, edit: Edit) -> None:
        """Decompose a weight and write its approximation back."""
        rank = edit.rule.rank(*parameter.shape) or 0
        left, values, right = torch.linalg.svd(parameter.float(), full_matrices=False)
        parameter[...] = left[:, :rank] @ torch.diag(values[:rank]) @ right[:rank]

    @torch.no_grad()
    def score(self, tokens: int) -> np.ndarray:
        """Log-likelihoods of all requests."""
        values = np.zeros(self.count)
        if not tokens:
            for text, pieces in self.texts.items():
                ids = torch.tensor([text], device=self.device)
                self.read(self.model(ids).logits, [pieces], [len(text)], values)
            return values
        texts = sorted(self.texts, key=len, reverse=True)
        while texts:
            batch = texts[: max(1, tokens // len(texts[0]))]
            ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)
            for row, text in enumerate(batch):
                ids[row, : len(text)] = torch.tensor(text)
            mask = (torch.arange(len(batch[0])) < torch.tensor(list(map(len, batch)))[:, None]).long()
            logits = self.model(ids.to(self.device), attention_mask=mask.to(self.device)).logits
            self.read(logits, [self.texts[text] for text in batch], list(map(len, batch)), values)
            texts = texts[len(batch) :]
        return values

    def read(self, logits: Tensor, pieces: list[list[Piece]], lengths: list[int], values: np.ndarray) -> None:
        """The answers' log-probabilities and the likeliest words, as the scripts read them."""
        chances = torch.nn.functional.log_softmax(logits, dim=-1)
        for row, (asked, length) in enumerate(zip(pieces, lengths, strict=True)):
            likeliest = torch.sort(chances[row, length - 1], descending=True).indices[:TOP]
            likeliest.cpu()
            for piece in asked:
                places = range(length - len(piece.targets), length)
                values[piece.request] = sum(
                    chances[row, place, token].item() for place, token in zip(places, piece.targets, strict=True)
                )


class Benchmark:
    """One model, one task, one grid, and what is measured of them."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        self.loaded = load(chosen.model, dtype=chosen.dtype, device=chosen.device)
        [self.task] = build([chosen.task], limit=chosen.limit)
        self.requests = list(self.task.requests)
        if any(request.kind != "loglikelihood" for request in self.requests):
            raise SystemExit(f"{chosen.task} is not answered by log-likelihoods alone: choose a task that is")
        depth = self.loaded.layers
        layers = Edit.parse(f"{chosen.layers}.any@0.1", depth).layers
        self.edits = [
            Edit.parse(f"{layer}.{matrix}@{rho}", depth)
            for layer in layers
            for matrix in chosen.types.split(",")
            for rho in chosen.rhos.split(",")
        ]
        self.plain = Recipe(chosen.model, Schedule.identity(depth))
        self.recipes = [self.plain, *(replace(self.plain, edits=(edit,)) for edit in self.edits)]
        scorer = self.scorer(None)
        self.batch = chosen.batch_tokens or scorer.budget
        self.tokens = [len(piece.tokens) for piece in scorer.encoder.pieces(self.requests)]
        self.peer = Peer(self.loaded.model, scorer.encoder.pieces(self.requests), len(self.requests))
        self.notes: list[str] = []

    def scorer(self, folder: Path | None) -> Scorer:
        """A scorer that keeps components in a folder."""

        def wear(layer: int, edits: tuple[Edit, ...]) -> AbstractContextManager[object]:
            return edited(self.loaded.model, [replace(edit, layers=(layer,)) for edit in edits], folder=folder)

        return Scorer(
            self.loaded.model, self.loaded.tokenizer, budget=self.chosen.batch_tokens, wear=wear, folder=folder
        )

    def grid(self) -> tuple[float, np.ndarray]:
        """Seconds for the whole grid, and all log-likelihoods [recipe, request]."""
        with tempfile.TemporaryDirectory() as empty:
            scorer = self.scorer(Path(empty))
            scorer.head  # noqa: B018 - examined before the clock runs, as the peers' model is loaded
            spent, scores = seconds(lambda: scorer.score(self.recipes, self.requests))
        return spent, scores.loglikelihood

    def batched(self, work: Callable[[int], Any]) -> Any:
        """Work in batches of so many tokens; of fewer where memory does not suffice for all logits of a batch."""
        while True:
            try:
                return work(self.batch)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not memory.ran_out(error) or self.batch <= max(self.tokens):
                    raise
            memory.free()
            self.batch //= 2
            self.notes.append(f"logits of a batch did not fit: the batched peer runs {self.batch} tokens at a time")

    def verdict(self, values: np.ndarray) -> Verdict:
        """Accuracy and loss of a row of log-likelihoods, by the task's own judge."""
        responses = {
            request.fingerprint: Response(float(value), False, tokens=1)
            for request, value in zip(self.requests, values, strict=True)
        }
        accuracy = self.task.result("", responses).metrics[self.task.metric]
        return Verdict(accuracy, -float(np.mean([values[i] for i in self.right()])))

    def right(self) -> list[int]:
        """The requests that are right answers; all of them for a task without choices."""
        wanted = {Request("loglikelihood", *pair).fingerprint for pair in self.task.questions()}
        return [i for i, request in enumerate(self.requests) if not wanted or request.fingerprint in wanted]

    def best(self, found: dict[str, np.ndarray]) -> str:
        """The candidate that one would choose."""
        verdicts = {name: self.verdict(values) for name, values in found.items()}
        chosen = next(iter(verdicts))
        for name, verdict in verdicts.items():
            if verdict.beats(verdicts[chosen]):
                chosen = name
        return chosen

    def measure(self) -> dict[str, Any]:
        """All rounds."""
        draw = random.Random(self.chosen.seed)
        order = draw.sample(self.edits, len(self.edits))
        count = min(self.chosen.candidates or len(order), len(order))
        ours: list[float] = []
        samples: dict[str, list[dict[str, Any]]] = {"written": [], "batched": []}
        theirs = {
            name: {"plain": self.peer.score(tokens)} for name, tokens in (("written", 0), ("batched", self.batch))
        }
        worst = 0.0
        self.grid()  # once outside of the clock: allocators, autotuners
        for turn in range(self.chosen.rounds):
            spent, values = self.grid()
            ours.append(spent)
            print(f"impasto: {len(self.recipes)} recipes on {len(self.requests)} requests in {spent:.2f} s", flush=True)
            rows = dict(zip(["plain", *map(str, self.edits)], values, strict=True))
            for i in range(count):
                edit = order[(turn * count + i) % len(order)]
                for name in samples:
                    run = functools.partial(self.peer.candidate, edit)
                    sample = run(0) if name == "written" else self.batched(run)
                    theirs[name][str(edit)] = sample.pop("values")
                    worst = max(worst, float(np.abs(theirs[name][str(edit)] - rows[str(edit)]).max()))
                    samples[name].append(sample)
                    print(f"  {name}, {edit}: {sample['seconds']:.2f} s, {sample['svd']:.2f} s of it SVD", flush=True)
        report: dict[str, Any] = {"impasto": {"seconds": ours, "recipes": len(self.recipes)}}
        for name, found in samples.items():
            report[name] = self.against(ours, found) | {"batch_tokens": self.batch if name == "batched" else 0}
        chosen = {name: self.best(found) for name, found in theirs.items()}
        same = {name: self.best({edit: rows[edit] for edit in found}) for name, found in theirs.items()}
        whole = self.best(rows)
        report["equal"] = {
            "largest_difference": worst,
            "candidates_compared": len(theirs["written"]) - 1,
            "chosen_among_them": {"impasto": same["written"], **chosen},
            "same": chosen == same,
            "chosen_of_the_grid": whole,
            "accuracy": {"plain": self.verdict(rows["plain"]).accuracy, whole: self.verdict(rows[whole]).accuracy},
        }
        report["notes"] = self.notes
        print(
            f"largest difference {worst:.3g} nats; chosen {chosen['written']}, by impasto {same['written']}", flush=True
        )
        return report | {"losses": {name: self.verdict(row).loss for name, row in rows.items()}}

    def against(self, ours: Sequence[float], found: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A peer's seconds for the grid, from its samples, and how many times faster impasto is."""
        mean = float(np.mean(ours))
        total = np.array([sample["seconds"] for sample in found]) * len(self.edits)
        bare = total - np.array([sample["svd"] for sample in found]) * len(self.edits)
        random_rows = np.random.default_rng(0).integers(0, len(found), (10_000, len(found)))
        spread = np.quantile(total[random_rows].mean(1), (0.025, 0.975)) / mean
        return {
            "samples": list(found),
            "sampled": len({sample["edit"] for sample in found}),
            "of": len(self.edits),
            "scaled_up": len({sample["edit"] for sample in found}) < len(self.edits),
            "seconds": float(total.mean()),
            "ratio": float(total.mean()) / mean,
            "spread": list(map(float, spread)),
            "without_svd": float(bare.mean()) / mean,
        }

    def screened(self, losses: dict[str, float]) -> dict[str, Any]:
        """What one backward pass foretells, against what was measured."""
        right = [self.requests[i] for i in self.right()]
        report: dict[str, Any] = {}
        real = np.array([losses[str(edit)] for edit in self.edits]) - losses["plain"]
        best = int(np.argmin(real))
        for curvature in (False, True):
            with tempfile.TemporaryDirectory() as empty:
                spent, found = seconds(
                    lambda folder=Path(empty), curvature=curvature: screen(
                        self.loaded, right, self.edits, folder=folder, curvature=curvature
                    )
                )
            expected = np.array([one.expected for one in found])
            ranks = [np.argsort(np.argsort(values)) for values in (expected, real)]
            report["second order" if curvature else "first order"] = {
                "seconds": spent,
                "rank_correlation": float(np.corrcoef(*ranks)[0, 1]),
                "place_of_the_best": int((expected < expected[best]).sum()),
                "of": len(self.edits),
                "expected": list(map(float, expected)),
            }
        print("screening:", {k: {n: v for n, v in r.items() if n != "expected"} for k, r in report.items()}, flush=True)
        return report


def decomposition(chosen: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one decomposition by the library, by impasto, and by impasto again."""
    rows, columns = map(int, chosen.svd.split("x"))
    device = torch.device(
        "cuda" if chosen.device == "auto" and torch.cuda.is_available() else chosen.device.replace("auto", "cpu")
    )
    torch.manual_seed(chosen.seed)
    samples: dict[str, list[float]] = {"library": [], "impasto": [], "again": []}
    for _ in range(chosen.rounds):
        weight = torch.randn(rows, columns, device=device)
        with tempfile.TemporaryDirectory() as empty:
            ours = functools.partial(decompose, weight, folder=Path(empty))
            works = {
                "library": lambda w=weight: torch.linalg.svd(w, full_matrices=False),
                "impasto": ours,
                "again": ours,
            }
            found = {}
            for name, work in works.items():
                spent, found[name] = seconds(work)
                samples[name].append(spent)
                print(f"{name}: {spent:.2f} s", flush=True)
        if not torch.equal(found["impasto"].values, found["again"].values):
            raise SystemExit("the components that were kept are not those that were computed")
    ratios = [ours / theirs for ours, theirs in zip(samples["impasto"], samples["library"], strict=True)]
    return {
        "machine": machine(device),
        "options": {k: str(v) for k, v in vars(chosen).items()},
        "samples": samples,
        "ratio": float(np.median(ratios)),
        "spread": [min(ratios), max(ratios)],
    }


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="anything that impasto loads")
    parser.add_argument("--task", default="laser_fever_validation", help="answered by log-likelihoods alone")
    parser.add_argument("--limit", type=int, help="documents")
    parser.add_argument("--types", default="mlp.up_proj,mlp.down_proj", help="matrices, as the model calls them")
    parser.add_argument("--layers", default="*", help="as in an edit, such as 10:18")
    parser.add_argument("--rhos", default=RHOS, help="fractions kept")
    parser.add_argument("--candidates", type=int, help="how many the peers run in each round; else all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, help="of impasto and of the batched peer; else impasto's choice")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--screen", action="store_true")
    parser.add_argument("--svd", metavar="ROWSxCOLUMNS", help="measure one decomposition of a matrix instead")
    parser.add_argument("--output", type=Path, default=Path("laser.json"))
    return parser.parse_args()


def main() -> None:
    """Measure, compare, and write the JSON."""
    chosen = options()
    if chosen.svd:
        found = decomposition(chosen)
        chosen.output.write_text(json.dumps(found, indent=1))
        print(f"impasto takes {found['ratio']:.3f} times the library's seconds {found['spread']}")
        return
    bench = Benchmark(chosen)
    report: dict[str, Any] = {
        "machine": machine(bench.loaded.device),
        "setting": vars(bench.loaded.setting),
        "options": {k: str(v) for k, v in vars(chosen).items()},
        "grid": {
            "candidates": len(bench.edits),
            "documents": bench.task.n,
            "requests": len(bench.requests),
            "texts": len(bench.peer.texts),
            "tokens": sum(map(len, bench.peer.texts)),
            "longest": max(bench.tokens),
        },
    }
    report |= bench.measure()
    if chosen.screen:
        report["screening"] = bench.screened(report["losses"])
    chosen.output.write_text(json.dumps(report, indent=1))
    for name in ("written", "batched"):
        part = report[name]
        print(
            f"{name}: {part['ratio']:.1f} times slower ({part['spread'][0]:.1f} to {part['spread'][1]:.1f}), without "
            f"its SVDs {part['without_svd']:.1f}"
            + (f"; from {part['sampled']} of {part['of']} candidates" if part["scaled_up"] else "")
        )
    if not math.isfinite(report["equal"]["largest_difference"]):
        raise SystemExit("the numbers of the two sides are not comparable: some are not finite")


if __name__ == "__main__":
    main()

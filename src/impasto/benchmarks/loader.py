"""What the YAML files beside this one name with `!function`: their data and their few-shot examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import datasets
from lm_eval.api.samplers import ContextSampler

from impasto import fetch


def fetched(
    folder: str,
    splits: Mapping[str, str],
    process: Callable[[datasets.Dataset], datasets.Dataset] | None = None,
    **_: object,
) -> dict[str, datasets.Dataset]:
    """Splits of a benchmark that `impasto fetch benchmarks` brought; the harness's further arguments do not matter.

    `process` is the harness's clean-up of a split. Named here it runs once; as a task's `process_docs` it would run
    every time that the harness asks for the documents, three times for each task.
    """
    loaded = _splits(fetch.ensure("benchmarks") / folder, splits)
    return {split: process(data) for split, data in loaded.items()} if process else loaded


def packaged(splits: Mapping[str, str], **_: object) -> dict[str, datasets.Dataset]:
    """Splits of the items that are part of impasto itself."""
    return _splits(Path(__file__).parent / "tiny", splits)


def _splits(folder: Path, splits: Mapping[str, str]) -> dict[str, datasets.Dataset]:
    return {
        split: datasets.Dataset.from_list(
            [json.loads(line) for line in (folder / file).read_text(encoding="utf-8").splitlines()]
        )
        for split, file in splits.items()
    }


class SameShots(ContextSampler):  # type: ignore[misc]
    """Few-shot examples that are the same for every question, the question itself left out.

    The harness's usual sampler draws anew for every question. Equal examples are how the basic-skills sets were
    published (with seed 1234 the prompts are equal to the published ones, character by character), and an engine
    can read the shared part once.
    """

    def set_rnd(self, rnd: int | None) -> SameShots:
        """Remember the seed; every question starts from it."""
        self.seed = rnd
        return self

    def sample(
        self,
        n: int,
        eval_doc: Mapping[str, Any] | None = None,
        df: Sequence[Mapping[str, Any]] | None = None,
        **_: object,
    ) -> Sequence[Mapping[str, Any]]:
        """`n` examples, never `eval_doc`."""
        pool = list(df or self.df)
        drawn = Random(self.seed).sample(pool, min(n + 1, len(pool)))
        return [doc for doc in drawn if doc != eval_doc][:n]

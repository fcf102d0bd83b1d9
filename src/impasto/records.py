"""What a run folder keeps beside responses and results, as values, and JSON that loses no number."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class StoredRecipe:
    """A recipe as the store knows it: texts only, so that reading needs no model."""

    fingerprint: str
    schedule: str
    edits: tuple[str, ...]
    label: Mapping[str, Any]  # what a study calls it, such as {"method": "skip", "n": 3}


@dataclass(frozen=True, slots=True)
class Measurement:
    """Something measured on a recipe that is not a benchmark score: similarities, latencies, cache gaps."""

    recipe: str  # fingerprint
    kind: str  # what was measured, such as "latency"
    key: str  # which one of that kind, such as "decode, batch 1"
    value: Any  # JSON: numbers (also non-finite), texts, lists, mappings


@dataclass(frozen=True, slots=True)
class Run:
    """One start of the program; `finished` stays None while it runs and if it was killed."""

    id: int
    command: tuple[str, ...]
    versions: Mapping[str, str]
    facts: Mapping[str, Any]
    seed: int | None
    started: str  # ISO 8601, UTC
    finished: str | None
    seconds: float | None
    outcome: str | None  # "finished", "interrupted", "failed"


def to_json(value: Any) -> str:
    """Text of a JSON value in which NaN and the infinities survive, as `{"$float": "nan"}`.

    Plain JSON has no word for them, and Python's own `NaN` breaks every other reader, SQLite's included.
    Tuples and numpy arrays become lists, numpy scalars become numbers.

    Raises:
        TypeError: for anything JSON cannot say, such as a mapping whose keys are not texts.
    """
    return json.dumps(_tagged(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def from_json(text: str) -> Any:
    """The value that `to_json` wrote."""
    return json.loads(text, object_hook=_untagged)


def _tagged(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, np.ndarray | np.generic):
        return _tagged(value.tolist())
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value) or value.keys() == {"$float"}:
            raise TypeError(f"the keys of a stored mapping must be texts other than '$float': {value!r}")
        return {key: _tagged(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_tagged(item) for item in value]
    raise TypeError(f"a {type(value).__name__} cannot be stored as JSON: {value!r}")


def _untagged(mapping: dict[str, Any]) -> Any:
    return float(mapping["$float"]) if mapping.keys() == {"$float"} else mapping

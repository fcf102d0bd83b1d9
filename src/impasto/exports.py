"""Results as files for other programs: CSV, Parquet and the JSON of lm-evaluation-harness."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from impasto.errors import StoreError
from impasto.records import Run, StoredRecipe, to_json
from impasto.result import Result, Setting

Table = Literal["results", "scores"]
Measured = tuple[Setting, StoredRecipe, Result]  # a result, and what it is a result of


def write_csv(path: Path, measured: Iterable[Measured], table: Table = "results") -> None:
    """Write results as CSV, one row per result and metric, or one per example (`table="scores"`).

    A missing or non-finite example is an empty field. The file appears complete or not at all.
    """
    with _replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(_columns(table)))
        writer.writeheader()
        writer.writerows(_rows(measured, table))


def write_parquet(path: Path, measured: Iterable[Measured], table: Table = "results") -> None:
    """Write the same table as `write_csv` in Parquet; missing examples are null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    schema = pa.schema([(name, types[kind]) for name, kind in _columns(table).items()])
    rows = _rows(measured, table)
    with _replacing(path) as part, pq.ParquetWriter(part, schema) as writer:
        while chunk := list(islice(rows, 100_000)):
            writer.write_table(pa.Table.from_pylist(chunk, schema))


def write_lm_eval(
    folder: Path, setting: Setting, recipe: StoredRecipe, results: Sequence[Result], run: Run | None
) -> Path:
    """Write the results of one recipe as lm-evaluation-harness writes its own, for tools that read those.

    The keys and their meaning are the harness's; what it has no word for stands under the one added
    top-level key "impasto". As with the harness, the file is `FOLDER/MODEL/results_DATE.json`.
    """
    document = _lm_eval_document(setting, recipe, results, run)
    stamp = datetime.now().isoformat().replace(":", "-")
    path = folder / str(document["model_name_sanitized"]) / f"results_{stamp}.json"
    with _replacing(path) as part:
        part.write_text(json.dumps(document, indent=2, ensure_ascii=False), encoding="utf-8")
    return path


def _rows(measured: Iterable[Measured], table: Table) -> Iterator[dict[str, Any]]:
    for setting, recipe, result in measured:
        row = {
            **dataclasses.asdict(setting),
            "recipe": recipe.fingerprint,
            "schedule": recipe.schedule,
            "edits": " ".join(recipe.edits),
            "label": to_json(recipe.label),
            "task": result.task,
            "protocol": result.protocol,
        }
        if table == "results":
            counts = {"n": result.n, "nonfinite": result.nonfinite, "truncated": result.truncated}
            for metric, value in result.metrics.items():
                yield {**row, "metric": metric, "value": value, **counts}
        else:
            for metric, values in result.scores.items():
                for example, score in enumerate(values):
                    yield {**row, "metric": metric, "example": example, "value": score}


def _columns(table: Table) -> dict[str, type]:
    texts = [field.name for field in dataclasses.fields(Setting)]
    texts += ["recipe", "schedule", "edits", "label", "task", "protocol", "metric"]
    tail: dict[str, type] = {"value": float, "n": int, "nonfinite": int, "truncated": int}
    if table == "scores":
        tail = {"example": int, "value": float}
    return dict.fromkeys(texts, str) | tail


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to beside `path`, which takes its place when all is written."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except OSError as error:
        raise StoreError(f"cannot write {path} ({error.strerror or error}): choose another place") from error
    finally:
        with suppress(OSError):  # it was moved, or could never be made
            part.unlink()


def _lm_eval_document(
    setting: Setting, recipe: StoredRecipe, results: Sequence[Result], run: Run | None
) -> dict[str, Any]:
    info = {result.task: result.info for result in results}
    versions = dict(run.versions) if run else {}
    started = datetime.fromisoformat(run.started).timestamp() if run else time.time()
    return {
        "results": {
            result.task: {
                "name": result.task,
                "alias": info[result.task].get("alias", result.task),
                "sample_len": result.n,
                **result.metrics,
                **_standard_errors(result),
            }
            for result in results
        },
        "group_subtasks": {},
        "configs": {task: _config(task, info[task]) for task in info},
        "versions": {task: info[task].get("version") for task in info},
        "n-shot": {task: info[task].get("shots") or 0 for task in info},
        "higher_is_better": {task: _direction(info[task]) for task in info},
        "n-samples": {
            result.task: {"original": info[result.task].get("original", result.n), "effective": result.n}
            for result in results
        },
        "config": {
            "model": "impasto",
            "model_args": {
                "pretrained": setting.model,
                "dtype": setting.dtype,
                "attn_implementation": setting.attention,
            },
            "model_dtype": setting.dtype,
            "model_sha": setting.weights,
            "batch_size": None,
            "batch_sizes": [],
            "device": setting.device,
            "use_cache": None,
            "limit": None,
            "bootstrap_iters": 0,
            "gen_kwargs": None,
            "random_seed": run.seed if run else None,
            "numpy_seed": run.seed if run else None,
            "torch_seed": run.seed if run else None,
            "fewshot_seed": run.seed if run else None,
        },
        "git_hash": None,
        "date": started,
        "pretty_env_info": "\n".join(f"{key}: {value}" for key, value in (run.facts if run else {}).items()),
        "transformers_version": versions.get("transformers", "N/A"),
        "lm_eval_version": versions.get("lm_eval") or versions.get("lm-eval") or _version("lm_eval"),
        "upper_git_hash": None,
        "task_hashes": {},
        "model_source": "impasto",
        "model_name": setting.model,
        "model_name_sanitized": re.sub(r'["<>:/|\\?*\[\]]+', "__", setting.model),
        "system_instruction": None,
        "system_instruction_sha": None,
        "fewshot_as_multiturn": None,
        "chat_template": None,
        "chat_template_sha": None,
        "total_evaluation_time_seconds": str(run.seconds) if run and run.seconds is not None else None,
        "impasto": {
            "version": _version("impasto"),
            "setting": dataclasses.asdict(setting),
            "recipe": recipe.fingerprint,
            "schedule": recipe.schedule,
            "edits": list(recipe.edits),
            "label": dict(recipe.label),
            "protocols": {result.task: result.protocol for result in results},
            "nonfinite": {result.task: result.nonfinite for result in results},
            "truncated": {result.task: result.truncated for result in results},
            "command": list(run.command) if run else None,
        },
    }


def _config(task: str, info: Mapping[str, Any]) -> dict[str, Any]:
    return {"task": task, "num_fewshot": info.get("shots") or 0, "metadata": {"version": info.get("version")}}


def _direction(info: Mapping[str, Any]) -> dict[str, bool]:
    """Which way the main metric improves, without the name of the filter, as the harness says it."""
    if "metric" not in info or "higher_is_better" not in info:
        return {}
    return {str(info["metric"]).partition(",")[0]: bool(info["higher_is_better"])}


def _standard_errors(result: Result) -> dict[str, float | str]:
    """Standard errors of metrics that are means of their examples, as the harness names them.

    "acc,none" has "acc_stderr,none". Where there is none (a perplexity is no such mean, and the task brought
    none of its own) stands "N/A", as in the harness's files.
    """
    errors: dict[str, float | str] = {}
    for metric, value in result.metrics.items():
        name, _, suffix = metric.partition(",")
        key = f"{name}_stderr" + (f",{suffix}" if suffix else "")
        if name.endswith("_stderr") or key in result.metrics:
            continue
        scores = [score for score in result.scores.get(metric, ()) if score is not None]
        is_mean = len(scores) > 1 and math.isclose(math.fsum(scores) / len(scores), value, abs_tol=1e-12)
        errors[key] = float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if is_mean else "N/A"
    return errors


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "N/A"

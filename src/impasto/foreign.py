"""Layer orders in the words of other tools: mergekit's passthrough YAML and exllamav3's `-layer_map`.

Both are plain series of whole layers, so a schedule with groups or halves cannot be exported to them, and the
error says so. A mergekit `layer_range` is half-open, as slices here are; a range of a layer map is inclusive.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from impasto.errors import NotationError, UsageError
from impasto.schedule import Call, Schedule, calls
from impasto.steps import MAX_CALLS, MAX_LAYER

_MAP_RULE = "a layer map is inclusive ranges with commas between them, as in 0..15,11..31"
_MAP_ITEM = re.compile(r"\s*([0-9]{0,7})\s*(?:(\.\.)\s*([0-9]{0,7}))?\s*")


def from_mergekit(text: str) -> tuple[str, Schedule]:
    """The model and the layer order of a mergekit configuration with `merge_method: passthrough`.

    Args:
        text: the YAML text. Every slice must have one source, and all sources the same model.

    Raises:
        UsageError: the text is no YAML, or says something that a schedule cannot express.
    """
    import yaml

    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"this mergekit configuration is no YAML: {reason}") from None
    if not isinstance(config, dict) or not isinstance(config.get("slices"), list) or not config["slices"]:
        raise UsageError("a mergekit configuration has a list of slices")
    if (method := config.get("merge_method")) != "passthrough":
        raise UsageError(f"only mergekit's merge_method passthrough is a layer order, not {method!r}")
    models: set[str] = set()
    layers: list[int] = []
    for number, piece in enumerate(config["slices"], 1):
        model, first, last = _mergekit_source(piece, number)
        models.add(model)
        layers += range(first, last)
        if len(layers) > MAX_CALLS:
            raise UsageError(f"a schedule holds at most {MAX_CALLS:,} layer calls")
    if len(models) > 1:
        named = ", ".join(sorted(models))
        raise UsageError(f"a schedule runs one model, and this configuration joins {len(models)}: {named}")
    return models.pop(), Schedule(calls(layers))


def to_mergekit(schedule: Schedule, model: str, dtype: str = "bfloat16") -> str:
    """The schedule as mergekit YAML, ready for `mergekit-yaml`; layers that run twice become copies.

    Raises:
        UsageError: the schedule has groups or halves, which mergekit cannot express.
    """
    import yaml

    slices = [
        {"sources": [{"model": model, "layer_range": [first, last + 1]}]}
        for first, last in _rising(schedule, "mergekit")
    ]
    config = {"slices": slices, "merge_method": "passthrough", "dtype": dtype}
    return yaml.safe_dump(config, sort_keys=False)


def from_layer_map(text: str, layers: int | None = None) -> Schedule:
    """The schedule of an exllamav3 `-layer_map`, such as `0..15,11..31`.

    Args:
        text: inclusive ranges with commas between them; `..4` starts at 0.
        layers: the model's depth, needed for ranges that end open, such as `4..`.

    Raises:
        NotationError: the text is no layer map, or names a layer that does not exist.
    """
    named: list[int] = []
    start = 0
    for item in text.split(","):
        end = start + len(item)
        named += _map_range(text, item, start, end, layers)
        if len(named) > MAX_CALLS:
            raise NotationError(f"a schedule holds at most {MAX_CALLS:,} layer calls", text, start, end)
        start = end + 1
    return Schedule(calls(named))


def to_layer_map(schedule: Schedule) -> str:
    """The schedule as an exllamav3 `-layer_map` of inclusive ranges.

    Raises:
        UsageError: the schedule has groups or halves, which a layer map cannot express.
    """
    pieces = _rising(schedule, "a layer map")
    return ",".join(str(first) if first == last else f"{first}..{last}" for first, last in pieces)


def _rising(schedule: Schedule, form: str) -> Iterator[tuple[int, int]]:
    """First and last layer of every stretch that counts up by one."""
    stretch: list[int] = []
    for step in schedule.steps:
        if not isinstance(step, Call) or step.half != "whole":
            what = "halves of layers" if isinstance(step, Call) else "parallel groups"
            raise UsageError(f"{form} cannot express {what}, and the schedule {schedule} has some")
        if stretch and step.layer != stretch[-1] + 1:
            yield stretch[0], stretch[-1]
            stretch = []
        stretch.append(step.layer)
    yield stretch[0], stretch[-1]


def _mergekit_source(piece: Any, number: int) -> tuple[str, int, int]:
    """Model, first layer and one past the last layer of one slice."""
    sources = piece.get("sources") if isinstance(piece, dict) else None
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
        raise UsageError(f"slice {number} of this mergekit configuration does not have exactly one source")
    source = sources[0]
    model, span = source.get("model"), source.get("layer_range")
    if isinstance(model, dict):
        model = model.get("model")
    if isinstance(model, dict):
        model = model.get("path")
    if not isinstance(model, str) or not model:
        raise UsageError(f"slice {number} of this mergekit configuration names no model")
    if not isinstance(span, list) or len(span) != 2 or not all(type(bound) is int for bound in span):
        raise UsageError(f"slice {number} of this mergekit configuration has no layer_range [first, end]")
    first, last = span
    if not 0 <= first < last <= MAX_LAYER + 1:
        raise UsageError(f"slice {number} has the layer_range [{first}, {last}], which names no layers")
    if scaled := source.get("parameters"):
        raise UsageError(f"slice {number} changes weights ({scaled!r}), which a schedule cannot express")
    return model, first, last


def _map_range(text: str, item: str, start: int, end: int, layers: int | None) -> range:
    match = _MAP_ITEM.fullmatch(item)
    if match is None or not (match[1] or match[2]):
        problem = f"{item.strip()!r} is no range of layers" if item.strip() else "a range of layers is missing"
        raise NotationError(problem, text, start, end, rule=_MAP_RULE)
    if match[2] and not match[3] and layers is None:
        raise NotationError("an open end needs the model's depth", text, start, end, rule=_MAP_RULE)
    first = int(match[1] or 0)
    last = int(match[3]) if match[3] else (layers or 0) - 1
    if not match[2]:
        last = first
    if first > last:
        raise NotationError(f"{item.strip()} names no layer", text, start, end, rule=_MAP_RULE)
    if last >= (layers or MAX_LAYER + 1):
        known = "" if layers is None else f": this model has layers 0..{layers - 1}"
        raise NotationError(f"layer {last} does not exist{known}", text, start, end, rule=_MAP_RULE)
    return range(first, last + 1)

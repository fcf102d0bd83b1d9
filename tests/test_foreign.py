"""Other tools' layer orders: import and export are inverse for every plain series, and refused otherwise."""

from __future__ import annotations

from contextlib import suppress

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from impasto.errors import NotationError, UsageError
from impasto.foreign import from_layer_map, from_mergekit, to_layer_map, to_mergekit
from impasto.schedule import Schedule, calls

RUNS = st.builds(lambda first, length: range(first, first + length), st.integers(0, 40), st.integers(1, 12))
SERIES = st.lists(RUNS, min_size=1, max_size=6).map(
    lambda runs: Schedule(calls(layer for run in runs for layer in run))
)


@given(SERIES)
def test_layer_maps_there_and_back(schedule: Schedule) -> None:
    assert from_layer_map(to_layer_map(schedule)) == schedule


@given(SERIES, st.text(min_size=1, max_size=12) | st.sampled_from(["a/b", "true", "1", "null", ": x"]))
def test_mergekit_there_and_back(schedule: Schedule, model: str) -> None:
    assert from_mergekit(to_mergekit(schedule, model)) == (model, schedule)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("0..15,11..31", "0:11 (11:16)x2 16:32"),
        ("..4", "0:5"),
        ("4..", "4:32"),
        ("..", "0:32"),
        ("0 .. 3, 7 ,8..8", "0:4 7 8"),
    ],
)
def test_layer_maps_are_inclusive(text: str, normal: str) -> None:
    assert str(from_layer_map(text, layers=32)) == normal


def test_mergekit_ranges_are_half_open() -> None:
    text = """
    slices:
      - sources: [{model: org/name, layer_range: [0, 16]}]
      - sources: [{model: org/name, layer_range: [11, 32]}]
    merge_method: passthrough
    dtype: float16
    """
    assert from_mergekit(text) == ("org/name", Schedule.parse("0:16 11:32"))


def test_exported_mergekit_text() -> None:
    config = yaml.safe_load(to_mergekit(Schedule.parse("0:3 1:4"), "org/name", dtype="float16"))
    assert config == {
        "slices": [
            {"sources": [{"model": "org/name", "layer_range": [0, 3]}]},
            {"sources": [{"model": "org/name", "layer_range": [1, 4]}]},
        ],
        "merge_method": "passthrough",
        "dtype": "float16",
    }
    assert to_layer_map(Schedule.parse("0:3 1:4 9 5:3")) == "0..2,1..3,9,4,3"


@pytest.mark.parametrize(("text", "what"), [("0:3 {3:6}", "parallel groups"), ("0:3 3.attn", "halves of layers")])
def test_what_others_cannot_express(text: str, what: str) -> None:
    schedule = Schedule.parse(text)
    with pytest.raises(UsageError) as caught:
        to_mergekit(schedule, "m")
    assert str(caught.value) == f"mergekit cannot express {what}, and the schedule {text} has some"
    with pytest.raises(UsageError) as caught:
        to_layer_map(schedule)
    assert str(caught.value) == f"a layer map cannot express {what}, and the schedule {text} has some"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "a range of layers is missing"),
        ("0..3,", "a range of layers is missing"),
        ("0:3", "'0:3' is no range of layers"),
        ("3..0", "3..0 names no layer"),
        ("4..", "an open end needs the model's depth"),
        ("0..9999999", "layer 9999999 does not exist"),
        ("0..999999", "a schedule holds at most 100,000 layer calls"),
    ],
)
def test_bad_layer_maps(text: str, problem: str) -> None:
    with pytest.raises(NotationError) as caught:
        from_layer_map(text)
    assert caught.value.problem == problem


def test_layer_maps_are_checked_against_the_depth() -> None:
    with pytest.raises(NotationError) as caught:
        from_layer_map("0..15,11..32", layers=32)
    assert str(caught.value) == (
        "layer 32 does not exist: this model has layers 0..31\n"
        "  0..15,11..32\n"
        "        ^^^^^^\n"
        "rule: a layer map is inclusive ranges with commas between them, as in 0..15,11..31"
    )


SOURCE = {"model": "m", "layer_range": [0, 4]}


def _config(*slices: object, method: str = "passthrough") -> str:
    return yaml.safe_dump({"slices": list(slices), "merge_method": method})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "no YAML"),
        ("3", "has a list of slices"),
        ("slices: []", "has a list of slices"),
        (_config({"sources": [SOURCE]}, method="slerp"), "not 'slerp'"),
        (_config({"sources": [SOURCE, SOURCE]}), "slice 1 of this .* exactly one source"),
        (_config({"sources": [SOURCE]}, 3), "slice 2 of this .* exactly one source"),
        (_config({"sources": [SOURCE]}, {"sources": [SOURCE | {"model": "n"}]}), "joins 2: m, n"),
        (_config({"sources": [SOURCE | {"model": None}]}), "names no model"),
        (_config({"sources": [SOURCE | {"layer_range": [0]}]}), "no layer_range"),
        (_config({"sources": [SOURCE | {"layer_range": [4, 4]}]}), "names no layers"),
        (_config({"sources": [SOURCE | {"parameters": {"scale": 0}}]}), "changes weights"),
    ],
)
def test_bad_mergekit(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_mergekit(text)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in (from_layer_map, from_mergekit):
        with suppress(UsageError):
            assert read(text)

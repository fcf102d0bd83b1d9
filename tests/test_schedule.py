"""The laws of schedules: one value, one text, one fingerprint; every bad text an error that teaches."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impasto.errors import NotationError, UsageError
from impasto.schedule import Call, Group, Schedule, Step, calls, side_by_side

LAYERS = st.integers(0, 11) | st.integers(0, 999_999)
CALLS = st.builds(Call, LAYERS, st.sampled_from(["whole", "whole", "attn", "mlp"]))
SMALL_CALLS = st.builds(Call, st.integers(0, 3), st.sampled_from(["whole", "whole", "whole", "attn"]))
MERGES = st.sampled_from(["mean", "sum"])


def _series(steps: st.SearchStrategy[Step]) -> st.SearchStrategy[tuple[Step, ...]]:
    runs = st.builds(
        lambda first, length, down, half: calls(range(first, first + length)[:: -1 if down else 1], half),
        st.integers(0, 9),
        st.integers(1, 6),
        st.booleans(),
        st.sampled_from(["whole", "mlp"]),
    )
    loops = st.builds(
        lambda block, times: tuple(block) * times, st.lists(steps, min_size=1, max_size=3), st.integers(1, 4)
    )
    pieces = steps.map(lambda step: (step,)) | runs | loops
    return st.lists(pieces, min_size=1, max_size=4).map(lambda parts: tuple(s for part in parts for s in part))


def _groups(steps: st.SearchStrategy[Step]) -> st.SearchStrategy[Step]:
    branches = st.lists(_series(steps) | steps.map(lambda step: (step,)), min_size=2, max_size=3)
    return st.builds(lambda parts, merge: Group(tuple(parts), merge), branches, MERGES)


STEPS = st.recursive(SMALL_CALLS | CALLS, _groups, max_leaves=5)
SCHEDULES = _series(STEPS).map(Schedule)
SPELLING = st.text("0123456789:.x{}(),- attnmlpsume[]*w", max_size=30)

SAME = [  # spellings of one computation; the first is the normal one
    ("0:28", "(0:28)", "0:14 14:28", "(0:28)x1", "(0:13 13) 14:28"),
    ("12:8", "11 10 9 8", "12:10 10:8"),
    ("0:7 8 7 9:28", "0:7 8 7 9 10:28"),
    ("16x4", "16 16 16 16", "16x2 16x2", "(16 16)x2", "16x2x2", "{16x4}", "0016x4"),
    ("(8:12)x3", "8:12 8:12 8:12", "8 9 10 (11 8 9 10)x2 11"),
    ("0:8 (8:12)x3 12:28", "0:12 8:12 8:28"),
    ("{8:12}", "{8 9 10 11}", "{11 9 8 10}", "{8, 9, 10, 11}", "mean{8:12}", "{12:8}", "{8:10 10:12}", "{{8:12}}"),
    ("{8:12}x3", "{8:12} {8:12} {11 10 9 8}", "({8:12})x3"),
    ("{8 9, 10 11}", "{(8 9) (10 11)}", "{10 11, 8 9}", "{(8 9), (10:12)}", "{ 8 9 ,10 11 }", "{8:10, 10:12}"),
    ("{8 9, 10}", "{(8 9) 10}", "{10 (8:10)}"),
    ("{8x2, 9}", "{8x2 9}", "{9, 8 8}"),
    ("sum{8:12}", "sum{11 10 9 8}", "sum{8, 9, 10, 11}"),
    ("8.attn 8.mlp", "8.attn\t\n8.mlp", "(8).attn (8).mlp"),
    ("8:12.mlp", "(8:12).mlp", "8.mlp 9.mlp 10:12.mlp"),
    ("{8:12.attn}", "{8:12}.attn", "({8:12}).attn", "{8.attn 9:12.attn}"),
    ("(16.attn)x4", "16x4.attn", "16.attnx4", "(16x4).attn"),
    ("{8 8 9}", "{8 9 8}", "{8, 8, 9}"),
    ("8:12 12:8", "8 9 10 11 11 10 9 8"),
    ("8", "{8}", "sum{8}", "8x1", "8:9", "{{8}}", "((8))"),
    ("{8 9 sum{10 11}}", "{sum{11 10} 9 8}"),
]

BAD = {  # text: (problem, suggestion)
    "": ("the schedule is empty", "0:8"),
    " \t": ("the schedule is empty", "0:8"),
    "0..15": ("0..15 is not a slice", "0:16"),
    "0..15,11..31": ("0..15 is not a slice", "0:16 11:32"),
    "8-12": ("8-12 is not a slice", "8:13"),
    "8 - 12": ("8 - 12 is not a slice", "8:13"),
    "15..12": ("15..12 is not a slice", "16:12"),
    ",".join(map(str, range(40))): (
        "a comma separates the branches of a group only",
        " ".join(map(str, range(40))),
    ),
    "8,9": ("a comma separates the branches of a group only", "8 9"),
    "(8, 9)": ("a comma separates the branches of a group only", "{8, 9}"),
    "[8:12]": ("square brackets are not used", "(8:12)"),
    "8*3": ("a repeat is spelled otherwise", "8x3"),
    "8×3": ("a repeat is spelled otherwise", "8x3"),
    "8 X 3": ("a repeat is spelled otherwise", "8x3"),
    "8 x3": ("a repeat is spelled otherwise", "8x3"),
    "(8:12)*3": ("a repeat is spelled otherwise", "(8:12)x3"),
    "8:12x3": ("a repeat of a slice needs brackets", "(8:12)x3"),
    "8:12*3": ("a repeat of a slice needs brackets", "(8:12)x3"),
    "0:4 8:12 x3": ("a repeat of a slice needs brackets", "0:4 (8:12)x3"),
    "8x": ("a repeat needs a number", "8"),
    "8x0": ("a repeat is at least 1", "8"),
    "{8 9": ("{ is never closed", "{8 9}"),
    "(8:12": ("( is never closed", "(8:12)"),
    "(8:12}": ("( is closed by }", "(8:12)"),
    "8)": (") closes nothing", "8"),
    "{}": ("the group holds no layer", "{0:8}"),
    "()": ("the brackets hold no layer", None),
    "{8,}": ("a branch is empty", "{8}"),
    "8.att": ("a layer has no half called 'att'", "8.attn"),
    "8.attention": ("a layer has no half called 'attention'", "8.attn"),
    "8.MLP": ("a layer has no half called 'MLP'", "8.mlp"),
    "8 .mlp": ("a half stands directly behind its layer", "8.mlp"),
    "8.5": ("a layer has no half called '5'", "8"),
    "8.attn.mlp": ("layer 8 is already reduced to its attn half", "8.attn"),
    "{8 9.mlp}.attn": ("layer 9 is already reduced to its mlp half", "{8 9.mlp}"),
    "mean(8:12)": ("mean stands directly before braces", "mean{8:12}"),
    "sum {8:12}": ("sum stands directly before braces", "sum{8:12}"),
    "avg{8:12}": ("'avg' is not part of the notation", "{8:12}"),
    "layers 0:4": ("'layers' is not part of the notation", "0:4"),
    "range(8, 12)": ("'range' is not part of the notation", "8:12"),
    "8 : 12": ("a slice is written without spaces", "8:12"),
    "8: 12": ("a slice is written without spaces", "8:12"),
    "8:8": ("the slice 8:8 names no layer", "8"),
    "0:8:2": ("a slice has no step", "0 2 4 6"),
    "0:8;9": ("; is not part of the notation", "0:8 9"),
    "(8)(9)": ("a space is missing", "(8) (9)"),
    "8:": ("an open end needs the model's depth", None),
    ":8": ("an open start needs the model's depth", "0:8"),
    "-1": ("the negative number -1 needs the model's depth", None),
    "9999999999999:0": ("this layer number is too large", None),
    "0x99999999": ("this repeat is too large", "0"),
    "(0:1000)x101": ("a schedule holds at most 100,000 layer calls, and this makes 101,000", None),
    "0:999999": ("a schedule holds at most 100,000 layer calls", None),
    "(" * 500: ("brackets can be nested 64 deep, not deeper", None),
    "{" * 500: ("groups can be nested 32 deep, not deeper", None),
}


@given(SCHEDULES)
@settings(max_examples=200, deadline=None)
def test_text_and_value_are_inverse(schedule: Schedule) -> None:
    text = str(schedule)
    again = Schedule.parse(text)
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert again.fingerprint == schedule.fingerprint
    assert str(again) == text
    assert Schedule.parse(text, max(schedule.layers_used) + 1) == schedule


@given(st.lists(_series(STEPS), min_size=2, max_size=4), MERGES, st.randoms())
@settings(max_examples=60, deadline=None)
def test_order_of_branches_does_not_matter(branches, merge, random) -> None:
    shuffled = list(branches)
    random.shuffle(shuffled)
    one, other = Schedule((Group(tuple(branches), merge),)), Schedule((Group(tuple(shuffled), merge),))
    assert one == other
    assert one.fingerprint == other.fingerprint
    assert str(one) == str(other)


@given(SCHEDULES, SCHEDULES)
@settings(max_examples=60, deadline=None)
def test_fingerprints_tell_values_apart(one: Schedule, other: Schedule) -> None:
    assert (one == other) == (one.fingerprint == other.fingerprint) == (str(one) == str(other))


@pytest.mark.parametrize("spellings", SAME, ids=lambda spellings: spellings[0])
def test_spellings_of_one_computation(spellings: tuple[str, ...]) -> None:
    first = Schedule.parse(spellings[0])
    assert str(first) == spellings[0]
    for spelling in spellings[1:]:
        assert Schedule.parse(spelling) == first, spelling
    for others in SAME:
        assert (Schedule.parse(others[0]) == first) == (others is spellings)


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:20] or "empty")
def test_bad_text_is_explained(text: str) -> None:
    problem, suggestion = BAD[text]
    with pytest.raises(NotationError) as caught:
        Schedule.parse(text)
    assert (caught.value.problem, caught.value.suggestion) == (problem, suggestion)
    if suggestion is not None:
        Schedule.parse(suggestion)


@pytest.mark.parametrize(
    ("text", "problem", "suggestion"),
    [
        ("30", "layer 30 does not exist: this model has layers 0..27", "27"),
        ("0:30", "layer 29 does not exist: this model has layers 0..27", "0:28"),
        ("40:0", "layer 39 does not exist: this model has layers 0..27", "28:0"),
        ("28:30", "layer 29 does not exist: this model has layers 0..27", "27"),
        ("-29", "layer -29 does not exist: this model has layers 0..27", "0"),
        ("0:8 {30 4} 12:40", "layer 30 does not exist: this model has layers 0..27", "0:8 {27 4} 12:28"),
    ],
)
def test_layers_must_exist(text: str, problem: str, suggestion: str) -> None:
    with pytest.raises(NotationError) as caught:
        Schedule.parse(text, layers=28)
    assert (caught.value.problem, caught.value.suggestion) == (problem, suggestion)


def test_whole_error_text() -> None:
    with pytest.raises(NotationError) as caught:
        Schedule.parse("0:8 12:29", layers=28)
    assert str(caught.value) == (
        "layer 28 does not exist: this model has layers 0..27\n"
        "  0:8 12:29\n"
        "      ^^^^^\n"
        "rule: layers count from 0; negative numbers count from the end, so -1 is the last layer\n"
        "did you mean: 0:8 12:28"
    )


@given(st.text(max_size=40) | SPELLING, st.none() | st.integers(1, 30))
@settings(max_examples=400, deadline=None)
def test_any_text_is_a_schedule_or_a_notation_error(text: str, layers: int | None) -> None:
    try:
        schedule = Schedule.parse(text, layers)
    except NotationError as error:
        assert error.problem
        assert error.suggestion is None or Schedule.parse(error.suggestion, layers)
    else:
        assert Schedule.parse(str(schedule), layers) == schedule


@given(SCHEDULES, st.data())
@settings(max_examples=200, deadline=None)
def test_one_wrong_character_is_explained(schedule: Schedule, data: st.DataObject) -> None:
    text = str(schedule)
    at = data.draw(st.integers(0, len(text)))
    character = data.draw(st.characters(codec="ascii") | st.just(""))
    broken = text[:at] + character + text[at + 1 :]
    try:
        Schedule.parse(broken)
    except NotationError as error:
        assert error.suggestion is None or Schedule.parse(error.suggestion)


def test_python_like_indices_with_a_known_depth() -> None:
    for text, normal in {
        "-1": "27",
        ":": "0:28",
        ":8": "0:8",
        "8:": "8:28",
        "-4:": "24:28",
        ":-4": "0:24",
        "-1:0": "27:0",
        "28:0": "28:0",
        "{-3:}": "{25:28}",
        "0:-20 {8:12} 12:": "0:8 {8:12} 12:28",
    }.items():
        assert str(Schedule.parse(text, layers=28)) == normal


def test_counts() -> None:
    schedule = Schedule.parse("0 {1 2, 3 3 3, sum{4 5}}x2 6.attn")
    assert schedule.calls == 1 + 2 * 7 + 1
    assert schedule.depth == 1 + 2 * 3 + 1
    assert schedule.halves == 1
    assert schedule.layers_used == frozenset(range(7))


@given(SCHEDULES)
@settings(max_examples=60, deadline=None)
def test_counts_agree(schedule: Schedule) -> None:
    assert 1 <= schedule.depth <= schedule.calls
    assert len(schedule.layers_used) <= schedule.calls
    if schedule.is_series:
        assert schedule.depth == schedule.calls and not schedule.halves


def test_description() -> None:
    assert Schedule.parse("0:8 12:28").describe(28) == "0:8 12:28 (24 of 28 layers, 24 layer calls, depth 24)"
    assert Schedule.parse("3").describe(4) == "3 (1 of 4 layers, 1 layer call, depth 1)"
    assert (
        Schedule.parse("0:3 {3:6} 2.mlp").describe(6)
        == "0:3 {3:6} 2.mlp (6 of 6 layers, 7 layer calls (1 of them halves), depth 5)"
    )
    with pytest.raises(NotationError, match=r"layer 27 does not exist: this model has layers 0\.\.17"):
        Schedule.parse("0:8 12:28").describe(18)


def test_identity() -> None:
    assert str(Schedule.identity(28)) == "0:28"
    assert Schedule.identity(1) == Schedule.parse("0")
    assert repr(Schedule.parse("0:8 12:28")) == "Schedule('0:8 12:28')"


def test_golden_fingerprints() -> None:
    """A change of these breaks every stored result: raise the version in the serialisation if it is meant."""
    golden = {
        "0:28": "ea62aa234ecf19e0",
        "0:8 {8:12}x3 12:28": "fb0911e360e8e267",
        "sum{8 9, 10.attn 11}": "8711f557be3d4e0b",
    }
    assert {text: Schedule.parse(text).fingerprint for text in golden} == golden


def test_hash_survives_another_process() -> None:
    code = "import pickle,sys; s=pickle.load(sys.stdin.buffer); print(hash(s), s.fingerprint, s)"
    schedule = Schedule.parse("0:8 {8:12}x3 12.attn")
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(schedule), capture_output=True, check=True)
    assert done.stdout.decode().strip() == f"{hash(schedule)} {schedule.fingerprint} {schedule}"


@pytest.mark.parametrize(
    "text",
    ["(0:80)x25", "(3 5 1 2)x500", "0 2 " * 1000, "{0:40}x50", " ".join(str(i * i % 97) for i in range(2000))],
)
def test_long_schedules_are_quick(text: str) -> None:
    start = time.process_time()
    schedule = Schedule.parse(text)
    assert Schedule.parse(str(schedule)) == schedule
    assert time.process_time() - start < 1


def test_values_are_checked() -> None:
    for wrong in (
        lambda: Call(-1),
        lambda: Call(True),
        lambda: Call(0, "head"),
        lambda: Group(((Call(0),),)),
        lambda: Group(((Call(0),), ())),
        lambda: Group(((Call(0),), (Call(1),)), "max"),
        lambda: Schedule(()),
        lambda: Schedule(calls([0]) * 100_001),
        lambda: Schedule.identity(0),
        lambda: Schedule.parse("0", layers=0),
    ):
        with pytest.raises(UsageError):
            wrong()
    deep: tuple[Step, ...] = calls([0])
    for _ in range(32):
        deep = side_by_side([deep, calls([1])])
    assert Schedule.parse(str(Schedule(deep))) == Schedule(deep)
    with pytest.raises(UsageError, match="32 deep"):
        side_by_side([deep, calls([1])])


def test_values_are_immutable() -> None:
    with pytest.raises(AttributeError):
        Schedule.parse("0").steps = ()  # type: ignore[misc]
    with pytest.raises(AttributeError):
        Call(0).layer = 1  # type: ignore[misc]


def test_examples_of_the_documentation() -> None:
    page = Path(__file__).parents[1] / "docs" / "notation.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)


def test_tables_of_the_documentation() -> None:
    """Every row `text` | `expansion` of the page's tables of forms is true for a model of 28 layers."""
    page = Path(__file__).parents[1] / "docs" / "notation.md"
    rows = re.findall(r"^\| `([^`]+)` \| = `([^`]+)` \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 15
    for text, expansion in rows:
        assert Schedule.parse(text, layers=28) == Schedule.parse(expansion, layers=28), text

"""The laws of edits: text and value are inverse, ranks are exact, every bad text is explained."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impasto.edit import Edit, Kind, Rule, in_order
from impasto.errors import NotationError, UsageError

FRACTIONS = st.integers(1, 10**6).map(lambda part: Decimal(part) / 10**6) | st.just(Decimal("1E-12"))
RULES = (
    st.builds(Rule, st.sampled_from(["keep", "whitened", "tail", "prune"]), FRACTIONS)
    | st.builds(Rule, st.sampled_from(["rank", "whitened_rank"]), st.integers(1, 99_999))
    | st.builds(Rule, st.sampled_from(["zero", "mp", "mpl"]))
)
MATRICES = st.from_regex(r"[a-z_*?0-9]{1,6}(\.[a-z_*?0-9]{1,6}){0,2}", fullmatch=True)
LAYERS = st.lists(st.integers(0, 12) | st.integers(0, 999_999), min_size=1, max_size=9).map(tuple)
EDITS = st.builds(Edit, LAYERS, MATRICES, RULES)

BAD = {
    "": ("the edit is empty", "0.mlp.*@0.1"),
    "27@0.1": ("a dot and the name of a matrix follow layer 27", "27.*@0.1"),
    "27.mlp.up_proj": ("the rule is missing", "27.mlp.up_proj@0.1"),
    "27.mlp.up_proj@": ("the rule is missing", "27.mlp.up_proj@0.1"),
    "27.@0.1": ("the name of the matrix is missing", "27.*@0.1"),
    "mlp.up_proj@0.1": ("the layers are missing", "0.mlp.up_proj@0.1"),
    "3,.x@0.1": ("a layer is missing", "3.x@0.1"),
    "3.x@10%": ("'10%' is no rule", "3.x@0.1"),
    "3.x@2.5%": ("'2.5%' is no rule", "3.x@0.025"),
    "3.x@rank40": ("'rank40' is no rule", "3.x@r40"),
    "3.x@r=40": ("'r=40' is no rule", "3.x@r40"),
    "3.x@R40": ("'R40' is no rule", "3.x@r40"),
    "3.x@r0": ("rank 0 is spelled @0", "3.x@0"),
    "3.x@40": ("the fraction 40 is not between 0 and 1", "3.x@r40"),
    "3.x@1.5": ("the fraction 1.5 is not between 0 and 1", "3.x@1"),
    "3.x@tail2": ("the fraction 2 is not between 0 and 1", "3.x@tail1"),
    "3.x@prune0": ("the fraction 0 is not between 0 and 1", "3.x@prune0.1"),
    "3.x@r0w": ("rank 0 is spelled @0", "3.x@0"),
    "3.x@40w": ("the fraction 40 is not between 0 and 1", "3.x@r40w"),
    "3.x@1.5w": ("the fraction 1.5 is not between 0 and 1", "3.x@1w"),
    "3.x@-0.1": ("the fraction -0.1 is not between 0 and 1", "3.x@0.1"),
    "3.x@-5": ("the fraction -5 is not between 0 and 1", "3.x@0.1"),
    "3.x@tail-0.5": ("the fraction -0.5 is not between 0 and 1", "3.x@tail0.5"),
    "3.x@r-3": ("'r-3' is no rule", "3.x@r3"),
    "3.x@1e-3": ("'1e-3' is no rule", "3.x@0.001"),
    "3.x@0,1": ("'0,1' is no rule", "3.x@0.1"),
    "3.x@MP": ("'MP' is no rule", "3.x@mp"),
    "3.x@tail": ("'tail' is no rule", "3.x@tail0.1"),
    "3.x@pruned0.9": ("'pruned0.9' is no rule", "3.x@prune0.9"),
    "3.x=0.1": ("'=' cannot stand in the name of a matrix", "3.x@0.1"),
    "3 .x @ 0.1": ("a dot and the name of a matrix follow layer 3", "3.x@0.1"),
    "0..3.x@0.1": ("0..3 is not a slice", "0:4.x@0.1"),
    "-1.x@0.1": ("the negative number -1 needs the model's depth", None),
    "*.x@0.1": ("* for all layers needs the model's depth", None),
}


@given(EDITS)
@settings(deadline=None)
def test_text_and_value_are_inverse(edit: Edit) -> None:
    again = Edit.parse(str(edit))
    assert again == edit
    assert hash(again) == hash(edit)
    assert str(again) == str(edit)
    edit.check(edit.layers[-1] + 1)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("27.mlp.down_proj@0.01", "27.mlp.down_proj@0.01"),
        (" 27.mlp.down_proj@0.010 ", "27.mlp.down_proj@0.01"),
        ("3.x@.5", "3.x@0.5"),
        ("3.x@1.00", "3.x@1"),
        ("3.x@0.0", "3.x@0"),
        ("3.x@0.10w", "3.x@0.1w"),
        ("3.x@r040w", "3.x@r40w"),
        ("3.attn.c_attn.q@1w", "3.attn.c_attn.q@1w"),
        ("-1.x@mp", "27.x@mp"),
        ("*.x@mpl", "0:28.x@mpl"),
        ("24:.x@r40", "24:28.x@r40"),
        ("12:8.x@tail0.1", "8:12.x@tail0.1"),
        ("5,3,4,1,3.x@prune0.9", "1,3:6.x@prune0.9"),
        ("0:2.*@0.1", "0,1.*@0.1"),
        ("3.mlp.experts.[0-3].w?@0.1", "3.mlp.experts.[0-3].w?@0.1"),
    ],
)
def test_normal_form(text: str, normal: str) -> None:
    assert str(Edit.parse(text, layers=28)) == normal


@pytest.mark.parametrize("text", BAD, ids=lambda text: text or "empty")
def test_bad_text_is_explained(text: str) -> None:
    problem, suggestion = BAD[text]
    with pytest.raises(NotationError) as caught:
        Edit.parse(text)
    assert (caught.value.problem, caught.value.suggestion) == (problem, suggestion)
    if suggestion is not None:
        Edit.parse(suggestion)


def test_layers_must_exist() -> None:
    edit = Edit.parse("26:30.mlp.*@0.1")
    with pytest.raises(NotationError) as caught:
        edit.check(28)
    assert str(caught.value) == (
        "layer 29 does not exist: this model has layers 0..27\n"
        "  26:30.mlp.*@0.1\n"
        "  ^^^^^\n"
        "rule: layers count from 0; negative numbers count from the end, so -1 is the last layer\n"
        "did you mean: 26:28.mlp.*@0.1"
    )


@given(st.text(max_size=30) | st.text("0123456789.:,@rwmp%*-e tail", max_size=25), st.none() | st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_any_text_is_an_edit_or_a_notation_error(text: str, layers: int | None) -> None:
    try:
        edit = Edit.parse(text, layers)
    except NotationError as error:
        assert error.suggestion is None or Edit.parse(error.suggestion, layers)
    else:
        assert Edit.parse(str(edit), layers) == edit


@given(EDITS, st.data())
@settings(max_examples=200, deadline=None)
def test_one_wrong_character_is_explained(edit: Edit, data: st.DataObject) -> None:
    text = str(edit)
    at = data.draw(st.integers(0, len(text)))
    broken = text[:at] + data.draw(st.characters(codec="ascii") | st.just("")) + text[at + 1 :]
    try:
        Edit.parse(broken)
    except NotationError as error:
        assert error.suggestion is None or Edit.parse(error.suggestion)


@pytest.mark.parametrize(
    ("fraction", "of_768", "of_4096"),
    [
        ("0.9", 691, 3686),
        ("0.8", 614, 3276),
        ("0.6", 460, 2457),
        ("0.4", 307, 1638),
        ("0.2", 153, 819),
        ("0.1", 76, 409),
        ("0.05", 38, 204),
        ("0.01", 7, 40),
        ("0.005", 3, 20),
        ("0.0025", 1, 10),
        ("0.0005", 0, 2),
        ("1", 768, 4096),
    ],
)
def test_ranks_of_the_paper(fraction: str, of_768: int, of_4096: int) -> None:
    rule = Edit.parse(f"0.x@{fraction}").rule
    assert rule.rank(768, 3072) == of_768
    assert rule.rank(16384, 4096) == of_4096


@given(FRACTIONS, st.integers(1, 20_000), st.integers(1, 20_000))
def test_rank_is_the_floor_of_the_exact_product(fraction: Decimal, rows: int, columns: int) -> None:
    exact = Fraction(fraction) * min(rows, columns)
    for kind in ("keep", "whitened", "tail"):
        assert Rule(kind, fraction).rank(rows, columns) == exact.numerator // exact.denominator


def test_ranks_of_other_rules() -> None:
    assert Rule("rank", 40).rank(64, 32) == Rule("whitened_rank", 40).rank(64, 32) == 32
    assert Rule("rank", 40).rank(64, 64) == 40
    assert Rule("zero").rank(64, 64) == 0
    for rule in (Rule("mp"), Rule("mpl"), Rule("prune", Decimal("0.9"))):
        assert rule.rank(64, 64) is None


def test_a_fraction_of_one_is_not_rank_one() -> None:
    assert Edit.parse("0.x@1w") != Edit.parse("0.x@r1w")
    assert Edit.parse("0.x@1") != Edit.parse("0.x@r1")


@given(st.lists(EDITS, max_size=6), st.randoms())
@settings(max_examples=30, deadline=None)
def test_edits_have_one_order(edits: list[Edit], random: Random) -> None:
    kinds = get_args(Kind)
    shuffled = random.sample(edits, len(edits))
    ordered = in_order(shuffled)
    assert ordered == in_order(edits)
    assert sorted(map(str, ordered)) == sorted(map(str, edits))
    assert [kinds.index(edit.rule.kind) for edit in ordered] == sorted(kinds.index(e.rule.kind) for e in edits)


def test_matches() -> None:
    edit = Edit.parse("0.mlp.*@0.1")
    assert edit.matches("mlp.up_proj") and edit.matches("mlp.experts.0.w")
    assert not edit.matches("self_attn.q_proj")
    assert not Edit.parse("0.mlp.up_proj@0.1").matches("mlp.Up_proj")


def test_values_are_checked() -> None:
    for wrong in (
        lambda: Rule("best"),
        lambda: Rule("zero", 1),
        lambda: Rule("rank", 0),
        lambda: Rule("rank", Decimal(3)),
        lambda: Rule("keep", 0.1),
        lambda: Rule("keep", Decimal(0)),
        lambda: Rule("keep", Decimal(2)),
        lambda: Rule("keep", Decimal("NaN")),
        lambda: Rule("keep", Decimal("1E-13")),
        lambda: Rule("keep"),
        lambda: Edit((), "x", Rule("zero")),
        lambda: Edit((-1,), "x", Rule("zero")),
        lambda: Edit((0,), "x y", Rule("zero")),
    ):
        with pytest.raises(UsageError):
            wrong()


def test_table_of_the_documentation() -> None:
    page = Path(__file__).parents[1] / "docs" / "notation.md"
    edits = re.findall(r"^\| `([^`]+@[^`]+)` \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert {Edit.parse(edit).rule.kind for edit in edits} == set(get_args(Kind))
    assert [str(Edit.parse(edit)) for edit in edits] == edits

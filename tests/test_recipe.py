"""The laws of recipes: a normal form, a fingerprint without the model's name, plain data there and back."""

from __future__ import annotations

import json

import pytest

from impasto.edit import Edit
from impasto.errors import NotationError, UsageError
from impasto.recipe import Recipe
from impasto.schedule import Schedule

EDITS = ["-1.mlp.down_proj@0.01", "3.mlp.up_proj@r40"]


def test_text() -> None:
    assert str(Recipe.of("demo", "0:8 12:28", ["27.mlp.down_proj@0.01"])) == "0:8 12:28 + 27.mlp.down_proj@0.01"
    assert str(Recipe.of("demo", "0:8 12:28")) == "0:8 12:28"
    assert str(Recipe.of("demo", layers=28)) == "0:28"


def test_values_and_texts_are_the_same() -> None:
    texts = Recipe.of("demo", "0:8 12:28", EDITS, layers=28)
    values = Recipe("demo", Schedule.parse("0:8 12:28"), tuple(Edit.parse(edit, layers=28) for edit in EDITS))
    assert texts == values == Recipe.of("demo", values.schedule, values.edits)


def test_edits_have_a_normal_form() -> None:
    one = Recipe.of("demo", "0:28", EDITS, layers=28)
    other = Recipe.of("demo", "0:28", [*reversed(EDITS), EDITS[0]], layers=28)
    assert one == other and hash(one) == hash(other)
    assert one.fingerprint == other.fingerprint


def test_fingerprint_is_of_the_work_and_not_of_the_name() -> None:
    recipe = Recipe.of("demo", "0:28", EDITS, layers=28)
    renamed = Recipe.of("./somewhere/else", "0:14 14:28", EDITS, layers=28)
    assert recipe != renamed
    assert recipe.fingerprint == renamed.fingerprint
    others = [
        Recipe.of("demo", "0:28"),
        Recipe.of("demo", "0:27"),
        Recipe.of("demo", "0:28", EDITS[1:]),
        Recipe.of("demo", "0:28", ["3.mlp.up_proj@0.4"]),
    ]
    assert len({recipe.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_golden_fingerprint() -> None:
    """A change breaks every stored result: raise the version in the serialisation if it is meant."""
    assert Recipe.of("demo", "0:8 12:28", ["27.mlp.down_proj@0.01"]).fingerprint == "80a04d7d5a255eb8"


def test_plain_data_there_and_back() -> None:
    recipe = Recipe.of("demo", "0:8 {8:12}x3 12:28", EDITS, layers=28)
    data = recipe.to_dict()
    assert data == {
        "schema_version": 1,
        "model": "demo",
        "schedule": "0:8 {8:12}x3 12:28",
        "edits": ["27.mlp.down_proj@0.01", "3.mlp.up_proj@r40"],
    }
    assert Recipe.from_dict(json.loads(json.dumps(data))) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "this recipe has schema version 2; this impasto reads 1"),
        ({"schema_version": None}, "a recipe has schema_version 1, a model and a schedule"),
        ({"schema_version": "1"}, "a recipe has schema_version 1, a model and a schedule"),
        ({"model": 3}, "a recipe has schema_version 1, a model and a schedule"),
        ({"schedule": None}, "a recipe has schema_version 1, a model and a schedule"),
        ({"edits": "x"}, "the edits of a recipe are a list of texts"),
        ({"edits": [1]}, "the edits of a recipe are a list of texts"),
    ],
)
def test_bad_data(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.from_dict(Recipe.of("demo", "0:28").to_dict() | change)
    assert str(caught.value) == message


def test_layers_are_checked() -> None:
    with pytest.raises(NotationError, match="layer 27 does not exist"):
        Recipe.of("demo", "0:28", layers=18)
    with pytest.raises(NotationError, match="layer 20 does not exist"):
        Recipe.of("demo", "0:18", ["20.x@0"], layers=18)
    with pytest.raises(NotationError, match="layer 20 does not exist"):
        Recipe.of("demo", Schedule.parse("0:18"), [Edit.parse("20.x@0")], layers=18)
    with pytest.raises(UsageError, match="needs the model's depth"):
        Recipe.of("demo")

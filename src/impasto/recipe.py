"""The unit of work: a model, the schedule to run it in, and the edits of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from impasto.edit import Edit
from impasto.errors import UsageError
from impasto.schedule import Schedule

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to run: the model as the user names it, a schedule, and edits.

    The order of the edits does not matter and an edit given twice counts once, so both are put in normal form.

    Example:
        ```python
        recipe = Recipe.of("demo", "0:8 12:18", ["-1.mlp.down_proj@0.01"], layers=18)
        str(recipe)            # '0:8 12:18 + 17.mlp.down_proj@0.01'
        ```

    Args:
        model: hub id, folder, file or `demo`, exactly as given.
        schedule: which layers run.
        edits: changes of weight matrices.

    Attributes:
        fingerprint: sixteen hexadecimal digits for schedule and edits; the model's text is not part of it,
            because one model has many names (the weights' hash is kept by `Setting`).
    """

    model: str
    schedule: Schedule
    edits: tuple[Edit, ...] = ()
    fingerprint: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(sorted(set(self.edits), key=str)))
        text = "\n".join(("recipe 1", self.schedule.fingerprint, *map(str, self.edits)))
        object.__setattr__(self, "fingerprint", hashlib.sha256(text.encode()).hexdigest()[:16])

    @classmethod
    def of(
        cls,
        model: str,
        schedule: str | Schedule | None = None,
        edits: Iterable[str | Edit] = (),
        layers: int | None = None,
    ) -> Recipe:
        """A recipe from texts or values.

        Args:
            model: the model's name.
            schedule: text or value; None is the model's own order, which needs `layers`.
            edits: texts or values.
            layers: the model's depth; if known, every layer is checked to exist.

        Raises:
            NotationError: a text cannot be read, or names a layer that does not exist.
        """
        if schedule is None and layers is None:
            raise UsageError("a recipe without a schedule needs the model's depth")
        if schedule is None:
            schedule = Schedule.identity(layers or 0)
        elif isinstance(schedule, str):
            schedule = Schedule.parse(schedule, layers)
        read = tuple(Edit.parse(edit, layers) if isinstance(edit, str) else edit for edit in edits)
        recipe = cls(model, schedule, read)
        if layers is not None:
            recipe.check(layers)
        return recipe

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` wrote.

        Raises:
            UsageError: the data is no recipe, or one of a newer impasto.
        """
        version = data.get("schema_version")
        if type(version) is int and version > SCHEMA_VERSION:
            raise UsageError(f"this recipe has schema version {version}; this impasto reads {SCHEMA_VERSION}")
        model, schedule, edits = data.get("model"), data.get("schedule"), data.get("edits", [])
        if version != SCHEMA_VERSION or not isinstance(model, str) or not isinstance(schedule, str):
            raise UsageError(f"a recipe has schema_version {SCHEMA_VERSION}, a model and a schedule")
        if not isinstance(edits, list | tuple) or not all(isinstance(edit, str) for edit in edits):
            raise UsageError("the edits of a recipe are a list of texts")
        return cls(model, Schedule.parse(schedule), tuple(map(Edit.parse, edits)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON or YAML: schema_version, model, schedule, edits."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "schedule": str(self.schedule),
            "edits": [str(edit) for edit in self.edits],
        }

    def check(self, layers: int) -> None:
        """Make sure that schedule and edits fit a model with so many layers.

        Raises:
            NotationError: a layer does not exist.
        """
        self.schedule.check(layers)
        for edit in self.edits:
            edit.check(layers)

    def __str__(self) -> str:
        return " + ".join((str(self.schedule), *map(str, self.edits)))

    def __hash__(self) -> int:
        return hash((self.model, self.fingerprint))

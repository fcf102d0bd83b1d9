"""Surgery on the layers of frozen pretrained transformers.

    import impasto as im

    loaded = im.load("demo")
    with im.applied(loaded, "0:8 {8:12} 12:18") as model:
        model.generate(**inputs)

Names are looked up when they are first used, so that `import impasto` costs nothing. Functions that bear the name of
their module are imported from it: `from impasto.evaluate import evaluate`, likewise `anatomy`, `fast`, `race` and
`similarity`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from impasto.anatomy import Anatomy as Anatomy
    from impasto.apply import applied as applied
    from impasto.edit import Edit as Edit
    from impasto.errors import ImpastoError as ImpastoError
    from impasto.generation import generate as generate
    from impasto.models import LoadedModel as LoadedModel
    from impasto.models import adopt as adopt
    from impasto.models import load as load
    from impasto.recipe import Recipe as Recipe
    from impasto.report import write as write_report
    from impasto.result import Request as Request
    from impasto.result import Result as Result
    from impasto.schedule import Schedule as Schedule
    from impasto.scoring import Scorer as Scorer
    from impasto.store import Store as Store
    from impasto.studies.compare import compare as compare_studies
    from impasto.studies.laser.run import run_laser as run_laser
    from impasto.studies.run import run_painters as run_painters
    from impasto.tasks import available as available_tasks
    from impasto.tasks import build as build_tasks

_PLACES = {
    "Anatomy": "anatomy:Anatomy",
    "Edit": "edit:Edit",
    "ImpastoError": "errors:ImpastoError",
    "LoadedModel": "models:LoadedModel",
    "Recipe": "recipe:Recipe",
    "Request": "result:Request",
    "Result": "result:Result",
    "Schedule": "schedule:Schedule",
    "Scorer": "scoring:Scorer",
    "Store": "store:Store",
    "adopt": "models:adopt",
    "applied": "apply:applied",
    "available_tasks": "tasks:available",
    "build_tasks": "tasks:build",
    "compare_studies": "studies.compare:compare",
    "generate": "generation:generate",
    "load": "models:load",
    "run_laser": "studies.laser.run:run_laser",
    "run_painters": "studies.run:run_painters",
    "write_report": "report:write",
}

__all__ = [
    "Anatomy",
    "Edit",
    "ImpastoError",
    "LoadedModel",
    "Recipe",
    "Request",
    "Result",
    "Schedule",
    "Scorer",
    "Store",
    "__version__",
    "adopt",
    "applied",
    "available_tasks",
    "build_tasks",
    "compare_studies",
    "generate",
    "load",
    "run_laser",
    "run_painters",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'impasto' has no attribute {name!r}")
    place, _, attribute = _PLACES[name].partition(":")
    return getattr(importlib.import_module(f"impasto.{place}"), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)

"""The public surface, listed once: a name that comes or goes is a decision."""

from __future__ import annotations

import importlib

import impasto

PUBLIC = [
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


def test_the_surface_is_this_list_and_sorted():
    assert impasto.__all__ == PUBLIC == sorted(PUBLIC)
    assert dir(impasto) == PUBLIC


def test_every_name_leads_somewhere_and_is_not_hidden_by_a_module():
    for name in PUBLIC:
        assert getattr(impasto, name) is not None
    for module in ("anatomy", "evaluate", "similarity", "generation", "report"):
        importlib.import_module(f"impasto.{module}")
    for name in PUBLIC:
        assert type(getattr(impasto, name)).__name__ != "module", name


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(impasto, "unheard_of")

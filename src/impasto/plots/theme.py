"""Colours and the look that every drawing shares.

Charts are drawn once, in the light colours. On a page each of them stands for a role (`ink`, `paper`,
`series1`...) and is replaced by a CSS variable of that name, so one drawing serves light and dark. That works
because no two roles have the same light colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

LIGHT: Mapping[str, str] = MappingProxyType(
    {
        "paper": "#fdfdfb",
        "ink": "#1d1f21",
        "muted": "#5b5f64",
        "grid": "#e7e5df",
        "rule": "#85888d",
        "shade": "#efeee9",
        "accent": "#e3202c",
        "series1": "#006ed8",
        "series2": "#892c00",
        "series3": "#2a8877",
        "series4": "#73075d",
        "series5": "#489ad3",
        "series6": "#a5921b",
        "series7": "#4425a4",
    }
)
DARK: Mapping[str, str] = MappingProxyType(
    {
        "paper": "#16181b",
        "ink": "#e9e7e2",
        "muted": "#a6aab0",
        "grid": "#2c3035",
        "rule": "#7d8288",
        "shade": "#25282c",
        "accent": "#ff4d57",
        "series1": "#74a3e2",
        "series2": "#e5924b",
        "series3": "#5dfebb",
        "series4": "#c2558a",
        "series5": "#82d6fa",
        "series6": "#f5ce1d",
        "series7": "#726fe6",
    }
)
SERIES = tuple(colour for role, colour in LIGHT.items() if role.startswith("series"))
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
FULL_MODEL = "full model"
"""The series of this name is always drawn in ink: it is what the others are compared with."""

SCHEME = "viridis"
FONT = "Arial, Liberation Sans, Helvetica, DejaVu Sans, sans-serif"


def looks(series: Sequence[str]) -> tuple[list[str], list[str]]:
    """Colours and point shapes of series, by their place in the list.

    Every figure that is given the same list shows a method in the same colour and shape. The full model takes
    ink and no place. Beyond seven series the colours start again with other shapes.

    Example:
        >>> looks(["full model", "skip"])
        (['#1d1f21', '#006ed8'], ['circle', 'circle'])
    """
    colours, shapes = [], []
    place = 0
    for name in series:
        if name == FULL_MODEL:
            colours.append(LIGHT["ink"])
            shapes.append("circle")
            continue
        colours.append(SERIES[place % len(SERIES)])
        shapes.append(SHAPES[(place + place // len(SERIES)) % len(SHAPES)])
        place += 1
    return colours, shapes


def config() -> dict[str, Any]:
    """The Vega-Lite configuration of all charts: quiet axes, light grid, text no smaller than 11 px."""
    ink, muted, grid = LIGHT["ink"], LIGHT["muted"], LIGHT["grid"]
    return {
        "background": LIGHT["paper"],
        "font": FONT,
        "padding": 4,
        "aria": False,
        "view": {"stroke": None},
        "axis": {
            "domainColor": LIGHT["rule"],
            "gridColor": grid,
            "labelColor": muted,
            "labelFontSize": 11,
            "labelLimit": 220,
            "tickColor": LIGHT["rule"],
            "tickSize": 4,
            "titleColor": muted,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "titlePadding": 8,
        },
        "axisX": {"grid": False},
        "axisY": {"domain": False, "ticks": False, "labelPadding": 6},
        "legend": {
            "labelColor": ink,
            "labelFontSize": 12,
            "labelLimit": 240,
            "titleColor": muted,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "columnPadding": 16,
            "symbolSize": 70,
        },
        "title": {
            "anchor": "start",
            "color": ink,
            "fontSize": 12,
            "fontWeight": "bold",
            "frame": "group",
            "offset": 8,
        },
        "concat": {"spacing": 18},
    }

"""Words inside of a plot keep clear of what is drawn."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impasto import plots
from impasto.plots.labels import Box, Name, Plane, cost, ended, ruled
from impasto.result import Figure

PLANE = Plane((0.0, 10.0), (0.0, 1.0), 400, 200)
place = st.tuples(st.floats(-20, 420), st.floats(-20, 220))


def flat(rows: list[float], series: str = "a") -> list[dict[str, Any]]:
    return [{"x": x, "y": y, "series": series} for x, y in enumerate(rows)]


@given(place, place)
def test_what_lies_in_a_box_of_a_line_is_what_many_points_of_it_say(
    start: tuple[float, float], end: tuple[float, float]
) -> None:
    box, bits = Box(100, 50, 300, 120), 2000
    points = [tuple(a + (b - a) * (i + 0.5) / bits for a, b in zip(start, end, strict=True)) for i in range(bits)]
    inside = sum(box.left <= x <= box.right and box.top <= y <= box.bottom for x, y in points)
    assert box.crossed([start, end]) == pytest.approx(math.dist(start, end) * inside / bits, abs=1.0)


def test_a_plane_has_its_origin_below_and_may_be_logarithmic() -> None:
    assert PLANE.place(5, 0.25) == (200, 150)
    assert Plane((0, 1), (1, 100), 10, 200, log=True).place(1, 10) == (10, pytest.approx(100))
    assert PLANE.paths([*flat([0.5, 1.0]), {"x": 3, "y": None, "series": "a"}, {"x": 4, "y": 0.0, "series": "a"}]) == [
        [(0, 100), (40, 0)],
        [(160, 200)],
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.05, 0.95), min_size=11, max_size=11), st.floats(0.2, 0.8))
def test_the_name_of_a_line_stands_where_it_covers_least(rows: list[float], value: float) -> None:
    curve, rule = flat(rows), {"value": value, "name": "the model itself"}
    (name,) = ruled([rule], curve, PLANE)
    assert abs(name.y - (1 - value) * 200) < 10
    curves = PLANE.paths(curve)
    for x, align in ((2.0, "left"), (400.0, "right")):
        for side in (-1, 1):
            other = Name(name.text, x, (1 - value) * 200 + side * 7.5, align)
            assert cost(name, curves, [], [], PLANE, 15) <= cost(other, curves, [], [], PLANE, 15) + 1e-6


def test_a_name_leaves_a_curve_that_follows_its_line() -> None:
    rows = flat([0.9, 0.52, 0.5, 0.55, 0.51, 0.5, 0.53, 0.5, 0.51, 0.52, 0.53])
    (name,) = ruled([{"value": 0.5, "name": "the model itself"}], rows, PLANE)
    assert name.y > 100 and not any(name.box.crossed(path) for path in PLANE.paths(rows))


def test_names_of_two_lines_do_not_cover_each_other() -> None:
    names = ruled([{"value": 0.5, "name": "the model itself"}, {"value": 0.53, "name": "guessing"}], [], PLANE)
    assert names[0].box.overlap(names[1].box) == 0


def test_a_curve_that_ends_early_is_named_beside_its_end_without_a_leader() -> None:
    rows = flat([1.0, 0.6, 0.3, 0.2, 0.0, 0.1], "short") + flat([1.0, *[0.5] * 9, 0.4], "long")
    (name,) = ended([("short", 5, 0.1)], (), rows, PLANE)
    x, y = PLANE.place(5, 0.1)
    assert math.dist((name.x, name.y), (x, y)) < 30
    assert not any(name.box.crossed(path) for path in PLANE.paths(rows))
    figure = Figure("f", "", "", "summary_curves", tuple(rows), {"rules": [{"value": 0.0, "name": "guessing"}]})
    chart = plots.draw(figure).to_dict()
    leaders = [
        json.loads(layer["data"]["values"]) for layer in chart["layer"] if layer["mark"].get("strokeDash") == [1, 3]
    ]
    assert [[mark["series"] for mark in marks] for marks in leaders] == [["long"]]

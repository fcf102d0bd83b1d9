from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impasto import plots
from impasto.errors import StoreError, UsageError
from impasto.plots import frame, grids, labels, render, theme
from impasto.result import Figure

EVIL = "<script>alert('&\"x')</script>\x00\x0b\ud800"
SVG = "{http://www.w3.org/2000/svg}"

MINIMAL: dict[str, list[dict[str, Any]]] = {
    "layer_curve": [{"x": 0, "y": 0.5}],
    "affected_curves": [{"x": 1, "y": 0.5, "series": "skip", "panel": "a"}],
    "summary_curves": [{"x": 1, "y": 0.5, "series": "skip"}],
    "states": [{"x": 0, "y": 2.0}],
    "trace": [{"x": 0, "y": 0.5, "accepted": True}],
    "matrix": [{"row": 0, "column": 0, "value": 1.0}],
    "heatmap": [{"x": 5, "y": 1, "value": 0.5}],
    "bars": [{"label": "a", "value": 0.5}],
    "frontier": [{"x": 0.9, "y": 0.5}],
    "scatter": [{"x": 10.0, "y": 0.5}],
}


def full(kind: str) -> list[dict[str, Any]]:
    """Rows with every field of a drawing, two panels and two series, some values missing, some not finite."""
    drawing = plots.DRAWINGS[kind]
    holes = itertools.cycle([0.1, 0.7, None, 0.4, math.nan, 0.9, math.inf])
    rows = []
    for panel, series, step in itertools.product("AB", ("skip", "reverse"), range(4)):
        row: dict[str, Any] = {"panel": panel, "series": series, "label": f"{series} {step}", "note": "kept for CSV"}
        for field in drawing.numbers:
            row[field] = float(step) if field in ("x", "row", "column") else next(holes)
        row.update(dict.fromkeys(drawing.flags, step % 2 == 0))
        if kind in ("matrix", "heatmap"):
            row["column" if kind == "matrix" else "y"] = float(2 * ("skip", "reverse").index(series))
        rows.append(row)
    return rows


def figure(kind: str, rows: list[dict[str, Any]], key: str = "one", **options: Any) -> Figure:
    return Figure(key, "title", "caption", kind, tuple(rows), options)


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def marks(figure: Figure) -> list[dict[str, Any]]:
    """All layers of a chart that have data, flat, with their parsed rows."""
    found = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "mark" in node and isinstance(node.get("data", {}).get("values"), str):
                found.append({**node, "rows": json.loads(node["data"]["values"])})
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(plots.draw(figure).to_dict())
    return found


@pytest.mark.parametrize("kind", plots.DRAWINGS)
def test_every_kind_has_a_minimal_example(kind: str) -> None:
    assert kind in MINIMAL
    assert set(plots.DRAWINGS[kind].required) <= {field for row in MINIMAL[kind] for field in row}


@pytest.mark.parametrize("canvas", [plots.WIDE, plots.NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("kind", plots.DRAWINGS)
def test_every_drawing_is_valid_and_renders(kind: str, canvas: plots.Canvas) -> None:
    for rows in (MINIMAL[kind], full(kind), [dict.fromkeys(MINIMAL[kind][0])], []):
        chart = plots.draw(figure(kind, rows), canvas)
        chart.to_dict()  # altair checks it against the schema of Vega-Lite
        root = ElementTree.fromstring(render.svg(chart))
        assert root.tag == f"{SVG}svg"
        assert float(root.get("width") or 0) <= canvas.width * 1.06


def test_nothing_measured_is_said() -> None:
    assert "nothing was measured for this figure" in texts(plots.picture(figure("bars", [])).wide)


def test_missing_value_is_a_gap_not_zero() -> None:
    rows = [{"x": x, "y": None if x == 2 else 0.5, "low": 0.4, "high": 0.6, "series": "skip"} for x in range(5)]
    layers = marks(figure("affected_curves", rows))
    line = next(layer for layer in layers if layer["mark"]["type"] == "line")
    assert [row["y"] for row in line["rows"]] == [0.5, 0.5, None, 0.5, 0.5]
    assert line["mark"]["invalid"] == "break-paths-show-domains"
    band = next(layer for layer in layers if layer["mark"]["type"] == "area")
    assert [row["run"] for row in band["rows"]] == ["0", "0", "1", "1"]
    dots = next(layer for layer in layers if layer["mark"]["type"] == "point")
    assert [row["x"] for row in dots["rows"]] == [0, 1, 3, 4]


def test_a_lone_point_keeps_its_interval() -> None:
    rows = [{"x": x, "y": 0.5 if x == 1 else None, "low": 0.4, "high": 0.6, "series": "skip"} for x in range(3)]
    stem = next(
        layer
        for layer in marks(figure("affected_curves", rows))
        if "x" in layer["rows"][0] and layer["mark"]["type"] == "rule"
    )
    assert [(row["x"], row["low"], row["high"]) for row in stem["rows"]] == [(1, 0.4, 0.6)]


def test_label_without_value_is_called_undefined() -> None:
    rows = [{"label": "a", "value": 1.0}, {"label": "b", "value": None}]
    assert "undefined" in texts(plots.picture(figure("bars", rows)).wide)


def test_not_positive_has_no_place_on_a_log_axis() -> None:
    rows = [{"x": 0, "y": 0.0}, {"x": 1, "y": 10.0}, {"x": 2, "y": -1.0}]
    line = next(layer for layer in marks(figure("states", rows, log=True)) if layer["mark"]["type"] == "line")
    assert [row["y"] for row in line["rows"]] == [None, 10.0, None]


def test_best_of_each_column_is_outlined() -> None:
    values = {(5, 1): 0.2, (5, 2): 0.6, (5, 3): 0.6, (7, 1): None, (7, 2): 0.1, (7, 3): -0.2}
    rows = [{"x": x, "y": y, "value": value} for (x, y), value in values.items()]
    best = next(
        layer for layer in marks(figure("heatmap", rows)) if layer["mark"].get("stroke") == theme.LIGHT["accent"]
    )
    assert sorted((row["x"], row["y"]) for row in best["rows"]) == [(5, 2), (7, 2)]
    rows = [{**row, "best": row["y"] == 3} for row in rows]
    best = next(
        layer for layer in marks(figure("heatmap", rows)) if layer["mark"].get("stroke") == theme.LIGHT["accent"]
    )
    assert {row["y"] for row in best["rows"]} == {3}


def test_fitted_line_stays_in_the_frame() -> None:
    rows = [{"x": x, "y": y, "value": 0.1} for x in (5, 7, 9) for y in (1, 2, 3)]
    layers = marks(figure("heatmap", rows, fit=(1.0, -5.0)))
    line = next(layer for layer in layers if layer["mark"]["type"] == "line")
    assert [(row["x"], row["y"]) for row in line["rows"]] == [(5.5, 0.5), (8.5, 3.5)]
    assert not any(layer["mark"]["type"] == "line" for layer in marks(figure("heatmap", rows, fit=(0.0, 99.0))))


def test_matrix_groups_are_half_open_and_may_differ_by_panel() -> None:
    rows = [{"row": i, "column": j, "value": 0.5, "panel": p} for i in range(4) for j in range(4) for p in "AB"]
    one = plots.picture(figure("matrix", rows, groups=[[0, 1, "first"], [1, 4, "rest"]])).wide
    assert texts(one).count("rest") == 2
    each = plots.picture(figure("matrix", rows, groups={"A": [[0, 4, "all"]]})).wide
    assert texts(each).count("all") == 1
    box = next(layer for layer in marks(figure("matrix", rows, groups=[[1, 4, "rest"]])) if "name" in layer["rows"][0])
    assert (box["rows"][0]["x0"], box["rows"][0]["x1"]) == (0.5, 3.5)


def test_a_method_has_one_colour_in_all_figures() -> None:
    order = ["skip", "reverse", "parallel"]
    for kind, extra in (
        ("affected_curves", {"panel": "a"}),
        ("bars", {"label": "a", "value": 1.0}),
        ("summary_curves", {}),
    ):
        rows = [{"x": x, "y": 0.5, "series": name, **extra} for name in ("parallel", "reverse") for x in (1, 3)]
        svg = plots.picture(figure(kind, rows, series=order)).wide
        assert theme.SERIES[2] in svg
        assert theme.SERIES[1] in svg
        assert theme.SERIES[0] not in svg


def test_the_full_model_is_ink_and_takes_no_place() -> None:
    colours, _ = theme.looks(["skip", "full model", "reverse"])
    assert colours == [theme.SERIES[0], theme.LIGHT["ink"], theme.SERIES[1]]
    many, shapes = theme.looks([str(place) for place in range(20)])
    assert len(set(zip(many, shapes, strict=True))) == 20


@pytest.mark.parametrize("kind", plots.DRAWINGS)
def test_texts_are_escaped(kind: str) -> None:
    rows = [{**row, "panel": EVIL, "series": EVIL, "label": EVIL + "\x00\x0b"} for row in full(kind)]
    rows += [{**row, "series": "other"} for row in rows]
    picture = plots.picture(figure(kind, rows))
    for svg in (picture.wide, picture.narrow, *picture.inline(Figure("k", EVIL + "\x08", "", kind, ()))):
        root = ElementTree.fromstring(svg)
        assert "<script" not in svg
        assert not {node.tag for node in root.iter()} & {f"{SVG}script", f"{SVG}foreignObject", f"{SVG}image"}
        assert not any(name.lower().startswith("on") for node in root.iter() for name in node.attrib)


def test_titles_and_rule_names_are_escaped() -> None:
    rows = [{"x": x, "y": 0.5} for x in (0, 1)]
    options = {"x_title": EVIL, "y_title": EVIL, "rules": [{"value": 0.4, "name": EVIL}]}
    svg = plots.picture(figure("layer_curve", rows, **options)).wide
    assert "<script" not in svg
    assert "&lt;script&gt;" in svg


def test_inline_follows_the_theme_and_has_its_own_ids() -> None:
    shown = figure("heatmap", full("heatmap"))
    wide, narrow = plots.picture(shown).inline(shown)
    assert "var(--ink)" in wide
    assert not any(f'"{colour}"' in wide for colour in theme.LIGHT.values())
    ids = [re.findall(r'id="([^"]+)"', svg) for svg in (wide, narrow)]
    assert ids[0]
    assert not set(ids[0]) & set(ids[1])
    for svg, own in zip((wide, narrow), ids, strict=True):
        assert set(re.findall(r"url\(#([^)]+)\)", svg)) <= set(own)
        assert 'role="img" aria-label="title"' in svg


def test_every_light_colour_is_one_role_and_every_role_has_a_dark_one() -> None:
    assert len(set(theme.LIGHT.values())) == len(theme.LIGHT)
    assert list(theme.LIGHT) == list(theme.DARK)


@pytest.mark.parametrize("palette", [theme.LIGHT, theme.DARK], ids=["light", "dark"])
def test_text_has_contrast_and_series_differ_for_the_colour_blind(palette: dict[str, str]) -> None:
    def linear(colour: str) -> list[float]:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]

    def contrast(one: str, two: str) -> float:
        weights = (0.2126, 0.7152, 0.0722)
        shades = sorted(sum(w * c for w, c in zip(weights, linear(each), strict=True)) for each in (one, two))
        return (shades[1] + 0.05) / (shades[0] + 0.05)

    def times(matrix: list[list[float]], vector: list[float]) -> list[float]:
        return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]

    to_lms = [[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]]
    to_lab = [[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]]
    sights = {  # Machado et al. 2009, severity 1
        "normal": [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]],
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    }
    for ground in ("paper", "shade"):
        for role in ("ink", "muted"):
            assert contrast(palette[role], palette[ground]) >= 4.5, (role, ground)
    assert contrast(palette["series1"], palette["paper"]) >= 4.5  # links
    series = [colour for role, colour in palette.items() if role.startswith("series")]
    assert all(contrast(colour, palette["paper"]) >= 3 for colour in series)
    for sight, matrix in sights.items():
        labs = []
        for colour in series:
            seen = [min(max(part, 0.0), 1.0) for part in times(matrix, linear(colour))]
            labs.append(times(to_lab, [part ** (1 / 3) for part in times(to_lms, seen)]))
        nearest = min(math.dist(one, two) for one, two in itertools.combinations(labs, 2))
        assert nearest > 0.11, (sight, nearest)


@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["x", "y", "series", "note"]),
            st.none()
            | st.integers()
            | st.floats()
            | st.text(st.characters(codec="utf-8", exclude_characters="\r\x00")),
        ).filter(bool),
        min_size=1,
    )
)
@settings(max_examples=60, deadline=None)
def test_csv_holds_the_rows(rows: list[dict[str, Any]]) -> None:
    shown = figure("layer_curve", rows)
    back = list(csv.DictReader(io.StringIO(plots.to_csv(shown), newline="")))
    names = plots.columns(shown.rows)
    expected = [{name: "" if row.get(name) is None else str(row[name]) for name in names} for row in rows]
    if len(names) > 1:  # csv skips lines that are wholly empty
        assert back == expected


def test_save_writes_three_files(tmp_path: Path) -> None:
    shown = figure("bars", MINIMAL["bars"], key="order-1")
    paths = plots.save(shown, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["order-1.csv", "order-1.png", "order-1.svg"]
    assert paths["csv"].read_text() == "label,value\na,0.5\n"
    svg = paths["svg"].read_text()
    assert "var(" not in svg
    width, height = (int.from_bytes(paths["png"].read_bytes()[place : place + 4], "big") for place in (16, 20))
    root = ElementTree.fromstring(svg)
    assert (width, height) == (2 * int(root.get("width") or 0), 2 * int(root.get("height") or 0))


def test_save_to_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write figure 'one' to "):
        plots.save(figure("bars", MINIMAL["bars"]), tmp_path / "file")


@pytest.mark.parametrize("key", ["", "../up", "a/b", "a b", '"', "-x"])
def test_key_must_be_a_name(key: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be letters, digits"):
        plots.save(figure("bars", MINIMAL["bars"], key=key), tmp_path)


def test_unknown_kind() -> None:
    with pytest.raises(UsageError) as error:
        plots.draw(figure("heat_map", []))
    assert str(error.value) == (
        "figure 'one': no drawing is called 'heat_map'; did you mean 'heatmap'? (there are affected_curves, bars, "
        "frontier, heatmap, layer_curve, matrix, scatter, states, summary_curves, trace)"
    )


def test_unknown_option() -> None:
    with pytest.raises(UsageError, match=r"'bars' has no option 'colour'; it has panel_order, rules, section, series"):
        plots.draw(figure("bars", MINIMAL["bars"], colour="red", section="allowed"))


def test_missing_field() -> None:
    with pytest.raises(UsageError) as error:
        plots.draw(figure("bars", [{"label": "a", "score": 1}]))
    assert str(error.value) == "figure 'one': no row has the field 'value'; the drawing 'bars' needs label, value"


def test_text_where_a_number_belongs() -> None:
    with pytest.raises(UsageError, match="'value' must be a number or None, not 'high'"):
        plots.draw(figure("bars", [{"label": "a", "value": "high"}]))


def test_drawing_leaves_the_figure_alone() -> None:
    for kind in plots.DRAWINGS:
        shown = figure(kind, full(kind))
        before = repr(dataclasses.asdict(shown))
        plots.draw(shown)
        assert repr(dataclasses.asdict(shown)) == before


@given(st.lists(st.floats(0, 100), min_size=1, max_size=7))
def test_labels_are_moved_apart_in_order(places: list[float]) -> None:
    moved = labels.apart(places, 12.0, 0.0, 100.0)
    ordered = [moved[place] for place in sorted(range(len(places)), key=lambda place: places[place])]
    assert all(b - a >= 12 - 1e-6 for a, b in itertools.pairwise(ordered))
    assert min(moved) >= -1e-6
    assert max(moved) <= 100 + 1e-6


@given(st.integers(0, 50), st.integers(1, 400), st.integers(2, 12))
def test_ticks_are_whole_and_few(first: int, length: int, most: int) -> None:
    ticks = frame.whole_ticks(first, first + length, most)
    assert 1 <= len(ticks) <= most + 1
    assert all(first <= tick <= first + length for tick in ticks)


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.integers(2, 12))
def test_ticks_of_broken_numbers_are_round_and_few(low: float, length: float, most: int) -> None:
    ticks = frame.round_ticks(low, low + length, most)
    assert len(ticks) <= most + 1
    assert all(low - 1e-6 * length <= tick <= low + length * (1 + 1e-6) for tick in ticks)
    steps = {f"{b - a:.6e}".split("e")[0] for a, b in itertools.pairwise(ticks)}
    assert steps <= {"1.000000", "2.000000", "5.000000"} and len(steps) <= 1


@settings(max_examples=200, deadline=None)
@given(st.floats(-10, 10), st.floats(1e-6, 20))
def test_labels_of_a_colour_bar_keep_apart(low: float, length: float) -> None:
    high = low + length
    ticks = grids.bar_ticks(low, high)
    slack = 1e-9 * max(1.0, length)  # a billionth of a step, which is at most the length
    assert ticks and all(low - slack <= tick <= high + slack for tick in ticks)
    widest = max(len(f"{tick:.12f}".rstrip("0").rstrip(".")) for tick in ticks)
    for one, two in itertools.pairwise(ticks):
        assert (two - one) / length * grids.BAR >= 6.2 * widest + 8


@pytest.mark.parametrize(("low", "high"), [(-0.016, 0.016), (-0.64, 0.64), (0.02, 0.73), (-1e-6, 1e-6), (0.99, 1.0)])
def test_a_colour_bar_has_labels_on_both_sides(low: float, high: float) -> None:
    assert len(grids.bar_ticks(low, high)) >= 2


@pytest.mark.parametrize("value", [0.616, -3.0, 1e-4, 0.0])
def test_the_axis_of_a_flat_line_is_no_wider_than_what_is_known(value: float) -> None:
    rows = [{"x": x, "y": value + x * 1e-17, "low": None, "high": None} for x in range(5)]
    low, high = frame.fit(rows, ())
    assert low < value < high and high - low <= (0.25 * abs(value) or 1.1)
    rows.append({"x": 0, "y": value, "low": value - 0.002, "high": value})
    low, high = frame.fit(rows, ())
    assert low < value - 0.002 and value < high < value + 0.001 and low > value - 0.003


def test_an_axis_of_shares_has_round_labels() -> None:
    rows = [{"x": 100 * m / 18, "y": 1 - m / 18, "series": s} for m in (0, 1, 3, 9, 17) for s in ("a", "b")]
    shown = texts(plots.picture(figure("summary_curves", rows, x_title="share")).wide)
    assert {"0", "20", "40", "60", "80"} <= set(shown)
    depths = [{"x": layer / 17, "y": 0.5} for layer in range(18)]
    line = next(each for each in marks(figure("layer_curve", depths)) if each["mark"]["type"] == "line")
    low, high = line["encoding"]["x"]["scale"]["domain"]
    assert -0.05 < low < 0 and 1 < high < 1.05
    layers = [{"x": layer, "y": 0.5} for layer in range(18)]
    line = next(each for each in marks(figure("layer_curve", layers)) if each["mark"]["type"] == "line")
    assert line["encoding"]["x"]["scale"]["domain"] == [-0.5, 17.5]


def test_imports_no_model_code() -> None:
    heavy = ("torch", "transformers", "lm_eval", "datasets")
    code = f"import sys, impasto.report; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["bars", "frontier"])
def test_nothing_is_drawn_millions_of_pixels_away(kind: str) -> None:
    """Programs that make pictures of drawings leave out whatever lies together with such a thing."""
    field = {"bars": "value", "frontier": "x"}[kind]
    rows: list[dict[str, Any]] = [
        {"label": str(i), "y": i / 3, field: 1 + i / 10, "low": 0.5, "high": 1.5, "x_low": 0.5, "x_high": 1.5}
        for i in range(3)
    ]
    rows[1] |= {"low": 1e-9, "high": 4.6e7, "x_low": 1e-9, "x_high": 4.6e7}
    drawn = render.svg(plots.draw(figure(kind, rows, **({"x_domain": [0, 2]} if kind == "bars" else {}))))
    assert drawn.count("<line") >= 3
    places = re.findall(r'(?:transform|d|x[12]|y[12])="([^"]*)"', drawn)
    assert (
        max(abs(float(one)) for text in places for one in re.findall(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", text)) < 10_000
    )


@given(st.lists(st.text("abcdefgh ", min_size=1, max_size=18), min_size=1, max_size=12, unique=True))
def test_a_legend_takes_no_more_lines_than_it_must_and_fills_them_evenly(series: list[str]) -> None:
    rows = [{"series": name} for name in series]
    for canvas in (frame.WIDE, frame.NARROW):
        columns = frame.Key.of(rows, canvas, None).columns
        widths = {n: frame._legend_width(series, n) for n in range(1, len(series) + 1)}
        fits = {n: math.ceil(len(series) / n) for n, width in widths.items() if width <= canvas.width - 60}
        assert columns == min((n for n, lines in fits.items() if lines == min(fits.values())), default=1)

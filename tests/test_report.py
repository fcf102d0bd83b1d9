from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from impasto import plots, report
from impasto.errors import StoreError, UsageError
from impasto.result import Answer, Estimate, Figure, Page
from impasto.studies.reading import said

EVIL = "<script>alert('&\"x')</script><img src=x onerror=y>\x00\x0b"
VOID = {"meta", "input", "br", "img", "link"}


class Outline(HTMLParser):
    """Tags, attributes and texts of a page; fails on tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def every(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def prose(self) -> str:
        return " ".join(" ".join(self.text).split())


def answer(verdict: str = "yes", **more: object) -> Answer:
    fields = {
        "key": "order",
        "question": "Does order matter?",
        "effect": "It costs 0.4.",
        "estimate": Estimate(-0.4, -0.5, -0.3),
        "unit": "normalised score",
        "paper": "it does.",
        "rule": "Yes below zero.",
        "figure": "curve",
        **more,
    }
    return Answer(verdict=verdict, **fields)  # type: ignore[arg-type]


def figure(key: str = "curve", **options: object) -> Figure:
    rows = tuple({"x": x, "y": None if x == 1 else 0.25 * x, "series": "skip"} for x in range(4))
    return Figure(key, "A curve", "What it shows.", "layer_curve", rows, options)


def page(**changes: object) -> Page:
    fields: dict[str, object] = {
        "title": "A study",
        "subtitle": "one model",
        "answers": (answer("yes"), answer("no"), answer("unclear", estimate=None)),
        "figures": (
            figure(section="One"),
            Figure(
                "grid",
                "A grid",
                "",
                "heatmap",
                ({"x": 5, "y": 1, "value": 0.5}, {"x": 7, "y": 1, "value": None}),
                {"section": "Two"},
            ),
        ),
        "notes": ("Be careful.",),
        "facts": {"model": "m", "command": "impasto study painters m"},
        "tables": (
            ("Tasks", ({"task": "a", "chance": 0.25, "usable": True}, {"task": "b", "chance": None, "usable": False})),
        ),
    }
    return Page(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def html() -> str:
    return report.render(page())


def test_page_says_everything(html: str) -> None:
    prose = Outline(html).prose
    for text in (
        "A study",
        "one model",
        "Does order matter?",
        "It costs 0.4.",
        "it does.",
        "Yes below zero.",
        "Be careful.",
        "A curve",
        "What it shows.",
        "Tasks",
        "impasto study painters m",
        "\u22120.400 [\u22120.500, \u22120.300]",
    ):
        assert text in prose


def test_answers_come_first(html: str) -> None:
    prose = Outline(html).prose
    assert prose.index("Does order matter?") < prose.index("Be careful.") < prose.index("What it shows.")
    assert prose.index("What it shows.") < prose.index("To run it again:")


def test_verdicts_have_a_word_and_a_sign(html: str) -> None:
    for word, sign in report.VERDICTS.values():
        assert f'<span aria-hidden="true">{sign}</span>{word}</span>' in html


def test_headings_are_in_order(html: str) -> None:
    levels = [int(tag[1]) for tag, _ in Outline(html).tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_ids_are_unique_and_links_lead_somewhere(html: str) -> None:
    outline = Outline(html)
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for link in outline.every("a"):
        assert link["href"][0] == "#"
        assert link["href"][1:] in ids
    for _, attributes in outline.tags:
        for name in ("for", "aria-labelledby"):
            assert attributes.get(name, ids[0]) in ids


def test_drawings_are_labelled(html: str) -> None:
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in Outline(html).every("svg"))


def test_nothing_is_requested(html: str) -> None:
    outline = Outline(html)
    assert not {tag for tag, _ in outline.tags} & {"script", "link", "img", "iframe", "object", "embed", "image", "use"}
    assert not any(set(attributes) & {"src", "srcset", "action", "xlink:href"} for _, attributes in outline.tags)
    assert not any(name.startswith("on") for _, attributes in outline.tags for name in attributes)
    assert set(re.findall(r"https?://[^\s\"<]+", html)) <= {"http://www.w3.org/2000/svg"}
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert "default-src 'none'" in html


def test_every_text_is_escaped() -> None:
    shown = Figure(
        "curve",
        EVIL,
        EVIL,
        "affected_curves",
        tuple({"x": x, "y": 0.5, "series": EVIL + str(x % 2), "panel": EVIL, EVIL: EVIL} for x in range(4)),
        {"section": EVIL, "x_title": EVIL, "y_title": EVIL, "rules": [{"value": 0, "name": EVIL}]},
    )
    grid = Figure(
        "grid",
        EVIL,
        EVIL,
        "matrix",
        ({"row": 0, "column": 0, "value": 1.0, "panel": EVIL},),
        {"groups": [[0, 1, EVIL]]},
    )
    fields = dict.fromkeys(("key", "question", "effect", "unit", "paper", "rule"), EVIL)
    html = report.render(
        Page(
            EVIL,
            EVIL,
            (answer(**fields),),
            (shown, grid),
            (EVIL,),
            {EVIL: EVIL, "command": EVIL},
            ((EVIL, ({EVIL: EVIL},)),),
        )
    )
    outline = Outline(html)
    assert not outline.every("script")
    assert not outline.every("img")
    assert "\x00" not in html
    assert "\x0b" not in html
    assert outline.prose.count("<script>alert('&\"x')</script>") > 20


def test_theme_has_both_palettes_and_a_switch(html: str) -> None:
    assert "prefers-color-scheme: dark" in html
    assert f"--ink:{plots.LIGHT['ink']};" in html
    assert f"--ink:{plots.DARK['ink']};" in html
    assert [each["id"] for each in Outline(html).every("input")] == ["theme-auto", "theme-light", "theme-dark"]


def test_figures_are_numbered_and_grouped_by_section() -> None:
    shown = (figure("a", section="One"), figure("b", section="Two"), figure("c", section="One"), figure("d"))
    prose = Outline(report.render(page(figures=shown, answers=(answer(figure="c"), answer(figure="gone"))))).prose
    assert "Yes below zero. Figure 3" in prose
    main = prose[prose.index("Be careful.") :]
    order = [main.index(text) for text in ("One", "Figure 1", "Figure 3", "Two", "Figure 2", "Figures", "Figure 4")]
    assert order == sorted(order)


def test_numbers_stand_under_each_figure(html: str) -> None:
    prose = Outline(html).prose
    assert "x y series 0 0.000 skip 1 \u2013 skip 2 0.500 skip" in prose
    assert "y \\ x 5 7 1 0.500 \u2013" in prose
    assert "task chance usable a 0.250 yes b \u2013 no" in prose


def test_empty_page_is_a_page() -> None:
    outline = Outline(report.render(Page("t", "", (), (), (), {})))
    assert "no question that can be answered" in outline.prose


@pytest.mark.parametrize(
    ("estimate", "places"),
    [
        (Estimate(0.5, 0.25, 1.0), (50.0, 28.0, 94.0, 6.0)),
        (Estimate(-1.0), (6.0, 6.0, 6.0, 94.0)),
        (Estimate(0.0, -1.0, 1.0), (50.0, 6.0, 94.0, 50.0)),
        (Estimate(0.0), (6.0, 6.0, 6.0, 6.0)),
    ],
)
def test_interval_bar(estimate: Estimate, places: tuple[float, ...]) -> None:
    bar = report._bar(estimate)
    assert bar is not None
    assert (bar.value, bar.low, bar.high, bar.zero) == places


def test_no_bar_for_what_is_not_finite() -> None:
    assert report._bar(Estimate(float("nan"))) is None
    assert (
        "not finite"
        in Outline(report.render(page(answers=(answer(estimate=Estimate(float("nan")), effect="not finite"),)))).prose
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (-0.5, "\u22120.500"),
        (12.34, "12.3"),
        (1234.5, "1,234"),
        (3, "3"),
        (0.00012, "1.20e\u221204"),
        (-0.0004, "\u22124.00e\u221204"),
        (0.0, "0.000"),
        (float("inf"), "inf"),
        (2e9, "2.00e+09"),
        (1234567, "1,234,567"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert report.short(value) == text


@pytest.mark.parametrize(
    ("value", "scale", "text"),
    [
        (-0.000304, 0.107, "\u22120.0003"),
        (-0.0001, 0.01, "\u22120.0001"),
        (0.00004, 0.03, "0.00004"),
        (-3e-9, 0.03, "\u22123e\u221209"),
        (-1e-17, 0.03, "0.000"),
        (-1e-17, 1e-17, "0.000"),
        (-0.0005001, 0.107, "\u22120.001"),
        (0.0007, 1.0, "0.001"),
        (0.00012, 0.0009, "1.20e\u221204"),
        (0.5, 1e9, "0.500"),
        (2e9, 2e9, "2.00e+09"),
        (-0.0, 1.0, "0.000"),
    ],
)
def test_small_numbers_beside_others_are_fixed_decimals(value: float, scale: float, text: str) -> None:
    assert report.short(value, scale) == text


@given(st.floats(-1e9, 1e9), st.none() | st.floats(0, 1e9), st.integers(0, 4))
def test_what_is_printed_lies_on_the_side_of_zero_on_which_the_number_lies(
    value: float, scale: float | None, digits: int
) -> None:
    """But for what floating-point sums leave of nothing: a drawing and the number under it never contradict."""
    zero = abs(value) < 1e-12
    for text in (report.short(value, scale), said(value, digits), str(Estimate(value))):
        plain = text.replace("\u2212", "-").replace(",", "")
        assert (0 if zero else math.copysign(1, value)) == (float(plain) and math.copysign(1, float(plain)))
        assert not zero or "-" not in plain


def test_an_interval_beside_zero_is_seen_to_be_beside_it() -> None:
    assert report._estimate(Estimate(0.015, 0.0001, 0.03)) == "0.015 [0.0001, 0.030]"
    assert report._estimate(Estimate(-0.0001, -0.0004, 0.01)) == "\u22120.0001 [\u22120.0004, 0.010]"
    assert str(Estimate(-0.0001, 0.0, 0.01)) == "-0.0001 [0.000, 0.010]"


def test_numbers_of_an_interval_and_of_a_column_share_a_scale() -> None:
    assert report._estimate(Estimate(0.063, -0.000304, 0.107)) == "0.063 [\u22120.0003, 0.107]"
    assert report._estimate(Estimate(2e-4, 1e-4, 3e-4)) == "2.00e\u221204 [1.00e\u221204, 3.00e\u221204]"
    shown = page(tables=(("T", ({"small": 2e-4, "all": 2e-4, "n": 1}, {"small": 0.5, "all": 4e-5, "n": None})),))
    assert "small all n 0.0002 2.00e\u221204 1 0.500 4.00e\u221205 \u2013" in Outline(report.render(shown)).prose


def test_a_table_with_the_title_of_a_section_stands_in_it() -> None:
    rows = ({"question": "Why " + "so " * 20 + "long?", "a <b>": answer("no"), "c": None},)
    html = report.render(page(tables=(("Two", rows), ("Else", ({"x": 1},)))))
    prose = Outline(html).prose
    assert prose.index("What it shows.") < prose.index("a <b>") < prose.rindex("A grid") < prose.rindex("Tables")
    assert prose.rindex("Tables") < prose.rindex("Else")
    assert '<td class="t" data-name="question">' in html and '<td class="a" data-name="a &lt;b&gt;">' in html
    assert "\u2715 No \u22120.400 [\u22120.500, \u22120.300] \u2013" in prose.replace("\u2715No", "\u2715 No")


def test_write_puts_files_beside_the_page(tmp_path: Path) -> None:
    target = report.write(page(), tmp_path / "run")
    assert target == tmp_path / "run" / "report.html"
    names = {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    assert names == {f"{key}.{suffix}" for key in ("curve", "grid") for suffix in ("svg", "png", "csv")}
    links = [link["href"] for link in Outline(target.read_text(encoding="utf-8")).every("a") if link["href"][0] != "#"]
    assert {link.split("/")[-1] for link in links} == names
    assert all((target.parent / link).is_file() for link in links)
    assert [path.name for path in target.parent.iterdir() if path.name.startswith(".")] == []


def test_write_to_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write the report to "):
        report.write(page(figures=()), tmp_path / "file")


def test_two_figures_with_one_key() -> None:
    with pytest.raises(UsageError, match="two figures of the page have the key 'curve'"):
        report.render(page(figures=(figure(), figure())))

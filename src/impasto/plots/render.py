"""From a chart to SVG text and PNG bytes, and from light colours to CSS variables."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import altair as alt
import vl_convert

from impasto.plots.frame import Chart
from impasto.plots.theme import LIGHT

SVG = "http://www.w3.org/2000/svg"
_ROLES = {colour: f"var(--{role})" for role, colour in LIGHT.items()}
_NOISE = ("aria-hidden", "aria-roledescription", "aria-label", "role", "pointer-events", "class", "style")
_LONG = re.compile(r"-?\d+\.\d{3,}(?:e-?\d+)?")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


def svg(chart: Chart) -> str:
    """The chart as SVG text in the light colours, slimmed: no invisible marks, coordinates to 0.01 px."""
    source = vl_convert.vegalite_to_svg(chart.to_dict(validate=False), vl_version=_version())
    root = ElementTree.fromstring(source)
    _slim(root)
    return _text(root)


def png(source: str, scale: float = 2.0) -> bytes:
    """SVG text as a PNG image."""
    return bytes(vl_convert.svg_to_png(source, scale=scale))


def inline(source: str, name: str, label: str) -> str:
    """SVG text made ready to stand inside a page.

    Colours become CSS variables of the page's theme, fonts are the page's, ids are made unique by `name` (two
    drawings on one page would share their gradients otherwise), and `label` tells a screen reader what it is.
    """
    root = ElementTree.fromstring(source)
    ids = {node.get("id"): f"{name}-{node.get('id')}" for node in root.iter() if node.get("id")}
    for node in root.iter():
        node.attrib.pop("font-family", None)
        for attribute, value in list(node.attrib.items()):
            if attribute in ("fill", "stroke", "stop-color") and value in _ROLES:
                node.set(attribute, _ROLES[value])
            elif attribute == "id":
                node.set(attribute, ids[value])
            elif "url(#" in value:
                node.set(attribute, _REFERENCE.sub(lambda found: f"url(#{ids[found[1]]})", value))
    root.set("role", "img")
    root.set("aria-label", label)
    return _text(root)


def _text(root: ElementTree.Element) -> str:
    ElementTree.register_namespace("", SVG)
    return ElementTree.tostring(root, encoding="unicode")


def _version() -> str:
    """The Vega-Lite release to draw with: altair's own, or the newest of the same major that is at hand."""
    major, minor = (int(part) for part in alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    known = [tuple(int(part) for part in text.split(".")[:2]) for text in vl_convert.get_vegalite_versions()]
    if (major, minor) in known:
        return f"{major}.{minor}"
    return "{}.{}".format(*max(version for version in known if version[0] == major))


def _slim(node: ElementTree.Element) -> None:
    """Remove what nobody sees or reads, in place; the picture stays the same."""
    for child in list(node):
        shape = child.get("d")
        unseen = child.get("display") == "none" or (
            child.tag == f"{{{SVG}}}path" and not (_painted(child, "fill") or _painted(child, "stroke"))
        )
        if unseen or shape == "":
            node.remove(child)
            continue
        _slim(child)
        if child.tag == f"{{{SVG}}}g" and len(child) == 0:
            node.remove(child)
    if any((child.get("fill") or "").startswith("rgb(") for child in node):  # cells of a colour scale
        node.set("shape-rendering", "crispEdges")  # no seams between them
    for attribute in _NOISE:
        node.attrib.pop(attribute, None)
    for attribute in ("opacity", "fill-opacity", "stroke-opacity"):
        if node.get(attribute) == "1":
            del node.attrib[attribute]
    for attribute, value in list(node.attrib.items()):
        if "." in value:
            node.set(attribute, _LONG.sub(_short, value))


def _painted(node: Any, attribute: str) -> bool:
    return node.get(attribute) not in (None, "none", "transparent")


def _short(found: re.Match[str]) -> str:
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")

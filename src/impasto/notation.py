"""The text form of a schedule: `read` makes steps of a text, `write` the one normal text of the steps.

    series  = item { space item }
    item    = ( layer | slice | "(" series ")" | [merge] "{" series { "," series } "}" ) { ".half" | "xN" }

`docs/notation.md` explains the forms to users. Reading checks every size before it builds anything, so a
short text cannot ask for a huge schedule.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from itertools import islice
from typing import NamedTuple

from impasto.errors import UsageError
from impasto.spelling import Scanner, SpellingError, brief, explained
from impasto.steps import (
    HALVES,
    MAX_CALLS,
    MAX_GROUPS,
    MERGES,
    Call,
    Group,
    Half,
    Merge,
    Step,
    calls,
    count,
    halved,
    side_by_side,
)

MAX_BRACKETS = 64
MAX_BLOCK = 256  # the longest repeated block that the printer looks for, in steps

_STARTS = "0123456789-:({"
_WORD = re.compile(r"[A-Za-z_]+")
_HALF = re.compile(r"(attn|mlp)(?=x[0-9]|[^A-Za-z0-9_]|$)")
_TIMES = re.compile(r"\s*[xX*×✕⨯]\s*(?=[0-9])")
_RANGE_CALL = re.compile(r"range\(\s*([0-9]{1,6})\s*,\s*([0-9]{1,6})\s*\)")

_SPACE_RULE = "items stand one after the other with spaces between them, as in 0:8 12:28"
_REPEAT_RULE = "a repeat is written without spaces, as in 16x4, (8:12)x3 or {8:12}x3"
_HALF_RULE = "the halves of a layer are .attn and .mlp, as in 8.attn or (8:12).mlp"
_GROUP_RULE = "a parallel group stands in braces, as in {8:12} or {8 9, 10 11}"
_MERGE_RULE = "braces average the branches, {8:12}, or add their changes, sum{8:12}"
_BRACKET_RULE = "every bracket has its partner: ( ) for a series, { } for a parallel group"
_ALIASES: dict[str, Half] = {
    "a": "attn",
    "attention": "attn",
    "self_attn": "attn",
    "self_attention": "attn",
    "m": "mlp",
    "ffn": "mlp",
    "ff": "mlp",
    "feed_forward": "mlp",
}
_PARTNER = {"(": ")", "{": "}", "[": "]"}


def read(text: str, layers: int | None = None) -> tuple[Step, ...]:
    """The steps that a text names, every loop written out.

    Args:
        text: the whole text.
        layers: the model's depth, if it is known.

    Raises:
        NotationError: says where and why the text cannot be read, and the nearest text that can.
    """
    try:
        return _read(text, layers)
    except SpellingError as fault:
        failure = explained(text, fault, lambda other: _read(other, layers))
    raise failure


def write(steps: tuple[Step, ...]) -> str:
    """The normal text of steps: repeated blocks folded first, then runs of three or more layers.

    `read(write(steps)) == steps` for all steps.
    """
    numbers: dict[Step, int] = {}
    names = [numbers.setdefault(step, len(numbers)) for step in steps]
    following = _next_equal(names)
    parts: list[str] = []
    start = at = 0
    while at < len(steps):
        period, times = _repeat(names, following, at)
        if times == 1:
            at += 1
            continue
        parts += _runs(steps[start:at])
        parts.append(f"{_enclosed(steps[at : at + period])}x{times}")
        start = at = at + period * times
    return " ".join(parts + _runs(steps[start:]))


class _Item(NamedTuple):
    """What one item stands for; `spreads` says that a group takes each step as a branch of its own."""

    steps: tuple[Step, ...]
    spreads: bool


def _read(text: str, layers: int | None) -> tuple[Step, ...]:
    return _Reader(text, layers).whole()


class _Reader:
    """Reads one text from left to right; every method starts and ends at the scanner's place."""

    def __init__(self, text: str, layers: int | None) -> None:
        self.scan = Scanner(text, layers)
        self.brackets = 0
        self.groups = 0

    def whole(self) -> tuple[Step, ...]:
        scan = self.scan
        steps = _joined(self.series())
        if closer := scan.peek():
            if closer == ",":
                fix = scan.mended(scan.at, scan.at + 1, " ")
                fixes = (fix,) if "{" in scan.text else (scan.text.replace(",", " "), fix)
                raise self.fault("a comma separates the branches of a group only", _SPACE_RULE, *fixes)
            raise self.fault(f"{closer} closes nothing", _BRACKET_RULE, scan.mended(scan.at, scan.at + 1, ""))
        if not steps:
            fix = f"0:{scan.layers or 8}"
            raise SpellingError("the schedule is empty", 0, 1, rule="a schedule names at least one layer", fixes=(fix,))
        return steps

    def series(self) -> list[_Item]:
        scan = self.scan
        items: list[_Item] = []
        total = 0
        start = scan.at
        while True:
            gap = scan.skip()
            if scan.peek() in ("", ",", ")", "}"):
                return items
            if items and not gap and scan.peek() in _STARTS:
                raise self.fault("a space is missing", _SPACE_RULE, scan.mended(scan.at, scan.at, " "))
            if items and (match := _TIMES.match(scan.text, scan.at)):
                self.refuse_times(start, scan.at, match.end(), slices=items[-1].spreads)
            start = scan.at
            items.append(self.item())
            total += count(items[-1].steps)
            self.refuse_too_many(total, start)

    def item(self) -> _Item:
        scan = self.scan
        start = scan.at
        character = scan.peek()
        spreads = False  # whether a group takes each step as a branch of its own
        if character == "(":
            steps = self.bracketed()
        elif character == "{":
            steps = self.group("mean")
        elif match := _WORD.match(scan.text, start):
            steps = self.named_group(match[0])
        elif character in _STARTS:
            named, spreads = scan.selection()
            steps = calls(named)
        else:
            raise self.unknown(start, character)
        while True:
            if scan.peek() == ".":
                steps = self.half(steps)
            elif match := _TIMES.match(scan.text, scan.at):
                if match[0] != "x" or spreads:
                    self.refuse_times(start, scan.at, match.end(), slices=spreads)
                steps = self.repeat(steps, start)
            elif scan.peek() in ("x", "X", "*", "×"):
                raise self.fault("a repeat needs a number", _REPEAT_RULE)
            else:
                return _Item(steps, spreads)

    def bracketed(self) -> tuple[Step, ...]:
        opening = self.enter()
        steps = _joined(self.series())
        if not steps and self.scan.peek() == ")":
            raise SpellingError("the brackets hold no layer", opening, self.scan.at + 1, rule=_BRACKET_RULE)
        if self.scan.peek() == ",":
            fix = self.respelled(opening, "{")
            raise self.fault("a comma separates the branches of a group only", _GROUP_RULE, fix)
        self.leave(opening, ")")
        return steps

    def group(self, merge: Merge) -> tuple[Step, ...]:
        scan = self.scan
        self.groups += 1
        opening = self.enter()
        if self.groups > MAX_GROUPS:
            raise SpellingError(f"groups can be nested {MAX_GROUPS} deep, not deeper", opening, opening + 1)
        parts = [self.series()]
        while scan.peek() == ",":
            comma = scan.at
            scan.at += 1
            parts.append(self.series())
            if not (parts[-1] and parts[-2]):
                fix = scan.mended(comma, comma + 1, "")
                raise SpellingError("a branch is empty", comma, comma + 1, rule=_GROUP_RULE, fixes=(fix,))
        if not parts[0] and scan.peek() == "}":
            fixes = (scan.mended(opening, scan.at + 1, f"{{0:{scan.layers or 8}}}"),)
            raise SpellingError("the group holds no layer", opening, scan.at + 1, rule=_GROUP_RULE, fixes=fixes)
        self.leave(opening, "}")
        self.groups -= 1
        branches = list(map(_joined, parts)) if len(parts) > 1 else _branches(parts[0])
        return side_by_side(branches, merge)

    def named_group(self, word: str) -> tuple[Step, ...]:
        scan = self.scan
        end = scan.at + len(word)
        if word in MERGES and scan.text[end : end + 1] == "{":
            scan.at = end
            return self.group("mean" if word == "mean" else "sum")
        fixes: list[str] = []
        if match := _RANGE_CALL.match(scan.text, scan.at):
            fixes.append(scan.mended(match.start(), match.end(), f"{match[1]}:{match[2]}"))
        if scan.text[end : end + 1] in ("(", "[", "{"):
            near = get_close_matches(word.lower(), (*MERGES, "average", "parallel", "add"), 1, 0.5)
            merge = "sum" if near and near[0] in ("sum", "add") else ""
            inside = self.respelled(end, "{")
            fixes.append(inside[: scan.at] + ("mean" if word == "mean" else merge) + inside[end:])
        problem = f"{brief(word)} is not part of the notation"
        if word in MERGES:
            fixes.append(scan.mended(end, len(scan.text), scan.text[end:].lstrip()))
            problem = f"{word} stands directly before braces"
        raise SpellingError(problem, scan.at, end, rule=_MERGE_RULE, fixes=tuple(fixes))

    def half(self, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        scan = self.scan
        dot = scan.at
        match = _HALF.match(scan.text, dot + 1)
        if match is None:
            word = re.compile(r"[A-Za-z0-9_]*").match(scan.text, dot + 1)
            found = word[0] if word else ""
            rest = dot + 1 + len(found)
            near = get_close_matches(found.lower(), (*HALVES[1:], *_ALIASES), 1, 0.5) if found else []
            fixes = tuple(scan.mended(dot + 1, rest, _ALIASES.get(name, name)) for name in near)
            fixes += (scan.mended(dot, rest, ""),)
            problem = f"a layer has no half called {brief(found)}" if found else "the name of a half is missing"
            raise SpellingError(problem, dot, rest, rule=_HALF_RULE, fixes=fixes)
        scan.at = match.end()
        try:
            return halved(steps, "attn" if match[1] == "attn" else "mlp")
        except UsageError as error:
            fix = scan.mended(dot, scan.at, "")
            raise SpellingError(str(error), dot, scan.at, rule=_HALF_RULE, fixes=(fix,)) from None

    def repeat(self, steps: tuple[Step, ...], start: int) -> tuple[Step, ...]:
        scan = self.scan
        cross = scan.at
        scan.at += 1
        times = scan.number("this repeat") or 0
        if times < 1:
            fix = scan.mended(cross, scan.at, "")
            raise SpellingError("a repeat is at least 1", cross, scan.at, rule=_REPEAT_RULE, fixes=(fix,))
        self.refuse_too_many(count(steps) * times, start)
        return steps * times

    def enter(self) -> int:
        """Step over an opening bracket and return its index."""
        opening = self.scan.at
        self.brackets += 1
        if self.brackets > MAX_BRACKETS:
            raise SpellingError(f"brackets can be nested {MAX_BRACKETS} deep, not deeper", opening, opening + 1)
        self.scan.at += 1
        return opening

    def leave(self, opening: int, closer: str) -> None:
        """Step over the closing bracket that belongs to the one at `opening`."""
        scan = self.scan
        self.brackets -= 1
        if scan.take(closer):
            return
        bracket = scan.text[opening]
        if found := scan.peek():
            fixes = (scan.mended(scan.at, scan.at + 1, closer), scan.mended(scan.at, scan.at, closer))
            problem = f"{bracket} is closed by {found}"
            raise SpellingError(problem, scan.at, scan.at + 1, rule=_BRACKET_RULE, fixes=fixes)
        fix = scan.text.rstrip() + closer
        raise SpellingError(f"{bracket} is never closed", opening, opening + 1, rule=_BRACKET_RULE, fixes=(fix,))

    def refuse_too_many(self, total: int, start: int) -> None:
        if total > MAX_CALLS:
            raise SpellingError(
                f"a schedule holds at most {MAX_CALLS:,} layer calls, and this makes {total:,}",
                start,
                self.scan.at,
            )

    def refuse_times(self, start: int, cross: int, end: int, *, slices: bool) -> None:
        """Say how a repeat is spelled: no spaces, the letter x, brackets round a slice."""
        text = self.scan.text
        body = text[start:cross].rstrip()
        plain = f"{text[:start]}{body}x{text[end:]}"
        in_brackets = f"{text[:start]}({body})x{text[end:]}"
        problem = "a repeat of a slice needs brackets" if slices else "a repeat is spelled otherwise"
        fixes = (in_brackets,) if slices else (plain, in_brackets)
        raise SpellingError(problem, start, end, rule=_REPEAT_RULE, fixes=fixes)

    def respelled(self, opening: int, bracket: str) -> str:
        """The text with the bracket at `opening`, and its partner if any, replaced by another kind."""
        text = self.scan.text
        opener = text[opening]
        level = 0
        for at in range(opening, len(text)):
            level += (text[at] == opener) - (text[at] == _PARTNER[opener])
            if not level:
                inside = text[opening + 1 : at]
                return text[:opening] + bracket + inside + _PARTNER[bracket] + text[at + 1 :]
        return text[:opening] + bracket + text[opening + 1 :] + _PARTNER[bracket]

    def unknown(self, start: int, character: str) -> SpellingError:
        scan = self.scan
        if character == "[":
            return self.fault("square brackets are not used", _BRACKET_RULE, self.respelled(start, "("))
        if character == ".":
            joined = scan.text[:start].rstrip() + scan.text[start:]
            return self.fault("a half stands directly behind its layer", _HALF_RULE, joined)
        shown = character if character.isprintable() else repr(character)
        return self.fault(f"{shown} is not part of the notation", _SPACE_RULE)

    def fault(self, problem: str, rule: str, *fixes: str) -> SpellingError:
        return SpellingError(problem, self.scan.at, self.scan.at + 1, rule=rule, fixes=fixes)


def _joined(items: list[_Item]) -> tuple[Step, ...]:
    return tuple(step for item in items for step in item.steps)


def _branches(items: list[_Item]) -> list[tuple[Step, ...]]:
    branches: list[tuple[Step, ...]] = []
    for item in items:
        branches += [(step,) for step in item.steps] if item.spreads else [item.steps]
    return branches


def _next_equal(names: list[int]) -> list[int]:
    """For every place the next place with the same name, or the end."""
    following = [len(names)] * len(names)
    last: dict[int, int] = {}
    for at in range(len(names) - 1, -1, -1):
        following[at] = last.get(names[at], len(names))
        last[names[at]] = at
    return following


def _repeat(names: list[int], following: list[int], at: int) -> tuple[int, int]:
    """Period and number of times of the repeat that covers most from here on; (1, 1) if there is none.

    A pair at a turning point is no repeat: `8:12 12:8` reads better than one that cuts both slices for it.
    """
    best, covered = (1, 1), 1
    if names[at + 1 : at + 2] == names[at : at + 1] and names[at - 1 : at] == names[at + 2 : at + 3] != []:
        covered = 2
    other = following[at]
    while (period := other - at) <= MAX_BLOCK and other + period <= len(names):
        if names[other + period - 1] == names[other - 1]:
            block = names[at:other]
            times = 1
            while names[at + times * period : at + (times + 1) * period] == block:
                times += 1
            if times > 1 and times * period > covered:
                best, covered = (period, times), times * period
        other = following[other]
    return best


def _runs(steps: tuple[Step, ...]) -> list[str]:
    """The items of a series without repeated blocks: slices where three or more layers count up or down."""
    items: list[str] = []
    at = 0
    while at < len(steps):
        if run := _run(steps, at):
            items.append(_slice(run))
            at += len(run)
        else:
            items.append(_single(steps[at]))
            at += 1
    return items


def _run(steps: tuple[Step, ...], at: int) -> tuple[Call, ...]:
    """The calls from here on that count up, or down, layer by layer in one half; empty if under three."""
    run: list[Call] = []
    stride = 0
    for step in islice(steps, at, None):
        if not isinstance(step, Call) or (run and step.half != run[0].half):
            break
        if len(run) == 1:
            stride = step.layer - run[0].layer
        if run and (abs(stride) != 1 or step.layer != run[-1].layer + stride):
            break
        run.append(step)
    return tuple(run) if len(run) > 2 else ()


def _slice(run: tuple[Call, ...]) -> str:
    first, last = run[0].layer, run[-1].layer
    ends = f"{first}:{last + 1}" if first < last else f"{first + 1}:{last}"
    return ends + _suffix(run[0])


def _single(step: Step) -> str:
    if isinstance(step, Call):
        return f"{step.layer}{_suffix(step)}"
    merge = "" if step.merge == "mean" else step.merge
    if all(len(branch) == 1 for branch in step.branches):
        inside = " ".join(_runs(tuple(branch[0] for branch in step.branches)))
    else:
        inside = ", ".join(map(write, step.branches))
    return f"{merge}{{{inside}}}"


def _enclosed(block: tuple[Step, ...]) -> str:
    """A block ready to be followed by `xN`."""
    if len(block) == 1 and (isinstance(block[0], Group) or block[0].half == "whole"):
        return _single(block[0])
    return f"({write(block)})"


def _suffix(call: Call) -> str:
    return "" if call.half == "whole" else f".{call.half}"

"""What the notations of schedules and edits share: reading layer numbers and slices, and errors that teach.

A reader raises a `SpellingError` where it stumbles, with ways to mend the text. At the public edge
`explained` turns it into a `NotationError` whose suggestion is the first mended text that really parses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from impasto.errors import NotationError, UsageError
from impasto.steps import MAX_CALLS, MAX_LAYER

SLICE_RULE = "a slice is half-open as in Python: 8:12 is layers 8 9 10 11, and 12:8 is 11 10 9 8"
LAYER_RULE = "layers count from 0; negative numbers count from the end, so -1 is the last layer"
DEPTH_RULE = "negative numbers and open slices count from the model's depth, which is not known here"

_NUMBER = re.compile(r"-?[0-9]+")
# In "8 -1" the hyphen is a sign: a range has a space on both sides of it, or none before it.
_INCLUSIVE = re.compile(r"([0-9]{1,6})(?:\s*(?:\.\.\.?|–|—|…)\s*|-\s*|\s+-\s+)([0-9]{1,6})")
_GAP = re.compile(r"\s+(?=[0-9-])")
_STEPPED = re.compile(r":(-?[0-9]{1,6})")
_ROUNDS = 24
_LONGEST_MENDED = 4_000
_LONGEST_SHOWN = 160


class SpellingError(Exception):
    """Where a reader stumbled: what is wrong between two indices, the rule, and texts that may mend it.

    Args:
        problem: one sentence, what is wrong.
        start: index of the first wrong character.
        end: index one past the last wrong character.
        rule: the rule of the notation that is broken.
        fixes: whole texts to try instead, the likeliest first.
        mendable: False where any guess would be arbitrary.
    """

    def __init__(
        self,
        problem: str,
        start: int,
        end: int,
        *,
        rule: str = "",
        fixes: tuple[str, ...] = (),
        mendable: bool = True,
    ) -> None:
        super().__init__(problem)
        self.problem, self.start, self.end = problem, start, end
        self.rule, self.fixes, self.mendable = rule, fixes, mendable


class Scanner:
    """A text and how far it has been read.

    Args:
        text: the whole text.
        layers: the model's depth, or None where it is not known.
    """

    def __init__(self, text: str, layers: int | None) -> None:
        if layers is not None and (type(layers) is not int or layers < 1):
            raise UsageError(f"a model has at least one layer, not {layers!r}")
        self.text, self.layers, self.at = text, layers, 0

    def peek(self) -> str:
        """The next character, or an empty text at the end."""
        return self.text[self.at : self.at + 1]

    def take(self, character: str) -> bool:
        """Step over the character if it comes next, and say whether it did."""
        found = self.peek() == character
        self.at += found
        return found

    def skip(self) -> bool:
        """Step over white space, and say whether there was any."""
        start = self.at
        while self.peek().isspace():
            self.at += 1
        return self.at > start

    def mended(self, start: int, end: int, replacement: str) -> str:
        """The whole text with the part between two indices replaced."""
        return self.text[:start] + replacement + self.text[end:]

    def number(self, problem: str) -> int | None:
        """The whole number that comes next, or None; `problem` is what to say of one that is too large."""
        match = _NUMBER.match(self.text, self.at)
        if match is None:
            return None
        digits = match[0].lstrip("-").lstrip("0") or "0"
        if len(digits) > len(str(MAX_LAYER)):
            rule = f"no number is larger than {MAX_LAYER}"
            raise SpellingError(f"{problem} is too large", match.start(), match.end(), rule=rule)
        self.at = match.end()
        return -int(digits) if match[0].startswith("-") else int(digits)

    def selection(self) -> tuple[range, bool]:
        """The layers named by the number or slice that comes next, and whether it was a slice."""
        start = self.at
        self._refuse_inclusive()
        first = self.number("this layer number")
        first_end = self.at
        if not self.take(":"):
            if first is None:
                raise SpellingError("a layer number is missing", self.at, self.at + 1, rule=SLICE_RULE)
            return self._single(first, start), False
        colon = self.at - 1
        before = self.text[:start].rstrip()
        after = _GAP.match(self.text, self.at)
        if after or (first is None and len(before) < start and before[-1:].isdigit()):
            left = colon if first is not None else len(before)
            fix = self.mended(left, after.end() if after else self.at, ":")
            problem = "a slice is written without spaces"
            raise SpellingError(problem, colon, self.at, rule=SLICE_RULE, fixes=(fix,))
        self._refuse_inclusive()
        second_start = self.at
        second = self.number("this layer number")
        self._refuse_step(start, first, second)
        low = 0 if first is None else self._bound(first, start, first_end)
        if second is None:
            high = self._needs_depth("an open end", start, self.at)
        else:
            high = self._bound(second, second_start, self.at)
        if first is None and self.layers is None:
            self._needs_depth("an open start", start, self.at, self.mended(start, start, "0"))
        return self._sliced(low, high, start), True

    def _single(self, layer: int, start: int) -> range:
        index = self._bound(layer, start, self.at)
        if self.layers is not None and index >= self.layers:
            raise self._missing(layer, start, str(self.layers - 1))
        return range(index, index + 1)

    def _sliced(self, low: int, high: int, start: int) -> range:
        named = range(low, high) if low <= high else range(low - 1, high - 1, -1)
        if not named:
            fixes = tuple(self.mended(start, self.at, spelling) for spelling in (str(low), str(max(low - 1, 0))))
            text = self.text[start : self.at]
            raise SpellingError(f"the slice {text} names no layer", start, self.at, rule=SLICE_RULE, fixes=fixes)
        if len(named) > MAX_CALLS:
            raise SpellingError(f"a schedule holds at most {MAX_CALLS:,} layer calls", start, self.at)
        if self.layers is not None and max(named) >= self.layers:
            bottom, top = min(low, self.layers), min(high, self.layers)
            clipped = f"{bottom}:{top}" if bottom != top else str(self.layers - 1)
            raise self._missing(max(named), start, clipped)
        return named

    def _bound(self, value: int, start: int, end: int) -> int:
        if value >= 0:
            return value
        if self.layers is None:
            self._needs_depth(f"the negative number {value}", start, end)
        elif value + self.layers < 0:
            raise self._missing(value, start, "0")
        return value + (self.layers or 0)

    def _missing(self, layer: int, start: int, spelling: str) -> SpellingError:
        return SpellingError(
            f"layer {layer} does not exist: this model has layers 0..{(self.layers or 0) - 1}",
            start,
            self.at,
            rule=LAYER_RULE,
            fixes=(self.mended(start, self.at, spelling),),
        )

    def _needs_depth(self, what: str, start: int, end: int, fix: str | None = None) -> int:
        if self.layers is not None:
            return self.layers
        fixes = () if fix is None else (fix,)
        raise SpellingError(
            f"{what} needs the model's depth",
            start,
            end,
            rule=DEPTH_RULE,
            fixes=fixes,
            mendable=fix is not None,
        )

    def _refuse_inclusive(self) -> None:
        match = _INCLUSIVE.match(self.text, self.at)
        if match:
            first, last = int(match[1]), int(match[2])
            spelling = f"{first}:{last + 1}" if first <= last else f"{first + 1}:{last}"
            fix = self.mended(match.start(), match.end(), spelling)
            raise SpellingError(f"{match[0]} is not a slice", match.start(), match.end(), rule=SLICE_RULE, fixes=(fix,))

    def _refuse_step(self, start: int, first: int | None, second: int | None) -> None:
        match = _STEPPED.match(self.text, self.at)
        if match is None:
            return
        stride = int(match[1])
        fix = self.mended(self.at, match.end(), "")
        if first is not None and second is not None and stride and 0 < len(range(first, second, stride)) <= 16:
            spelled = " ".join(map(str, range(first, second, stride)))
            fix = self.mended(start, match.end(), spelled)
        raise SpellingError("a slice has no step", self.at, match.end(), rule=SLICE_RULE, fixes=(fix,))


def brief(text: str) -> str:
    """The text in quotes for a message, cut where it is long."""
    return repr(text if len(text) <= 40 else f"{text[:39]}…")


def explained(text: str, fault: SpellingError, read: Callable[[str], object]) -> NotationError:
    """The error for people: the text with a caret, the rule, and the nearest spelling that `read` accepts."""
    start, end = min(fault.start, len(text)), min(fault.end, len(text) + 1)
    shown = "".join(character if character.isprintable() else " " for character in text)
    if len(shown) > _LONGEST_SHOWN:
        left = max(0, start - _LONGEST_SHOWN // 2)
        right = left + _LONGEST_SHOWN
        shown = ("…" if left else "") + shown[left:right] + ("…" if right < len(shown) else "")
        start, end = start - left + bool(left), min(end, right) - left + bool(left)
    suggestion = _nearest(text, read) if fault.mendable else None
    return NotationError(fault.problem, shown, start, end, rule=fault.rule, suggestion=suggestion)


def _nearest(text: str, read: Callable[[str], object]) -> str | None:
    """Mend one fault after another, from left to right, until the text can be read."""
    if len(text) > _LONGEST_MENDED:
        return None
    for _ in range(_ROUNDS):
        fault = _fault(text, read)
        if fault is None:
            return " ".join(text.split())
        mended = _better(fault.fixes, text, fault, read) or _better(_edits(text, fault), text, fault, read)
        if mended is None:
            return None
        text = mended
    return None


def _better(candidates: Iterable[str], text: str, fault: SpellingError, read: Callable[[str], object]) -> str | None:
    """The first candidate that can be read, or else the one with least left to mend, if less than now."""
    best, left_to_read = None, len(text) - fault.start
    for candidate in candidates:
        following = _fault(candidate, read)
        if following is None:
            return candidate
        if following.mendable and len(candidate) - following.start < left_to_read:
            best, left_to_read = candidate, len(candidate) - following.start
    return best


def _fault(text: str, read: Callable[[str], object]) -> SpellingError | None:
    try:
        read(text)
    except SpellingError as fault:
        return fault
    return None


def _edits(text: str, fault: SpellingError) -> Iterator[str]:
    """Small edits where the reader stumbled: leave it out, close a bracket, keep only one side."""
    before, after = text[: fault.start], text[fault.end :]
    for edited in (f"{before} {after}", before + after, f"{text})", f"{text}}}", before, after):
        if edited.strip():
            yield edited.strip()

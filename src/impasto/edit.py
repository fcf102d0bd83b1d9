"""Changes of a model's weights as descriptions: which matrices of which layers, and what to keep of them.

The text form is `LAYERS.MATRIX@RULE`, as in `27.mlp.down_proj@0.01`. It is described in `docs/notation.md`.
Nothing here touches a tensor; an edit is only a value that says what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import floor
from typing import Literal, get_args

from impasto.errors import UsageError
from impasto.spelling import DEPTH_RULE, Scanner, SpellingError, brief, explained
from impasto.steps import MAX_LAYER

Kind = Literal["prune", "tail", "mp", "mpl", "keep", "rank", "whitened", "whitened_rank", "zero"]

_SITE_RULE = "an edit is LAYERS.MATRIX@RULE, as in 27.mlp.down_proj@0.01 or 20:28.mlp.*@r40"
_RULE_RULE = "a rule is a kept fraction 0.1 or 0.1w, a rank r40 or r40w, tail0.1, prune0.9, mp, mpl, or 0 for zero"
_FRACTION_RULE = "a fraction is larger than 0 and at most 1, with at most 12 digits behind the point"
_MATRIX_RULE = "a matrix is named as the model itself names it inside its block; * ? and [ ] are wildcards"

_FRACTION = re.compile(r"-?(?:[0-9]{1,3}(?:\.[0-9]{1,12})?|\.[0-9]{1,12})")
_RANK = re.compile(r"r([0-9]{1,9})(w?)")
_MATRIX = re.compile(r"[A-Za-z0-9_*?!\[\]-]+(?:\.[A-Za-z0-9_*?!\[\]-]+)*")
_PERCENT = re.compile(r"([0-9]{1,3})(?:\.([0-9]{1,6}))?\s*%")
_WORDY_RANK = re.compile(r"(?:rank|k|r)?\s*[=:]?\s*([0-9]{1,9})")
_PREFIXES: dict[str, Kind] = {"tail": "tail", "prune": "prune"}


@dataclass(frozen=True, slots=True)
class Rule:
    """What is kept of a matrix.

    | kind | text | meaning, for a matrix of m x n |
    |---|---|---|
    | keep | `0.1` | the best approximation of rank floor(0.1 * min(m, n)); 1 is full rank |
    | rank | `r40` | the best approximation of rank 40 |
    | whitened | `0.1w` | rank floor(0.1 * min(m, n)), best for the inputs seen in calibration |
    | whitened_rank | `r40w` | rank 40, best for the inputs seen in calibration |
    | tail | `tail0.1` | only the smallest floor(0.1 * min(m, n)) components |
    | zero | `0` | nothing |
    | mp | `mp` | components above the Marchenko-Pastur edge, noise estimated from the entries |
    | mpl | `mpl` | laserRMT's edge, noise estimated from the singular values |
    | prune | `prune0.9` | all but the 0.9 of the entries that are smallest in magnitude |

    Args:
        kind: see the table.
        value: the fraction for keep, whitened, tail and prune; the rank for rank and whitened_rank; else None.
    """

    kind: Kind
    value: Decimal | int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UsageError(f"a rule is one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        if self.kind in ("zero", "mp", "mpl"):
            if self.value is not None:
                raise UsageError(f"the rule {self.kind} takes no number")
        elif self.kind in ("rank", "whitened_rank"):
            if type(self.value) is not int or not 1 <= self.value <= 999_999_999:
                raise UsageError(f"a rank is a whole number of at least 1, not {self.value!r}")
        else:
            if not isinstance(self.value, Decimal) or self.value.is_nan() or not 0 < self.value <= 1:
                raise UsageError(f"a fraction is a Decimal larger than 0 and at most 1, not {self.value!r}")
            value = self.value.normalize()
            exponent = value.as_tuple().exponent
            if not isinstance(exponent, int) or exponent < -12:
                raise UsageError(f"a fraction has at most 12 digits behind the point, not {self.value}")
            object.__setattr__(self, "value", value)

    def rank(self, rows: int, columns: int) -> int | None:
        """How many components of a rows x columns matrix are kept; None where the weights must be seen first.

        Computed from the decimal digits as written, so 0.01 of 4096 is 40 and never 39 by rounding noise.
        A fraction that is too small for the matrix gives 0: nothing is kept.
        """
        full = min(rows, columns)
        if self.kind == "zero":
            return 0
        if self.kind in ("rank", "whitened_rank") and self.value is not None:
            return min(int(self.value), full)
        if self.kind in ("keep", "whitened", "tail") and self.value is not None:
            return floor(self.value * full)
        return None

    def __str__(self) -> str:
        number = "" if self.value is None else f"{Decimal(self.value):f}"
        forms: dict[Kind, str] = {
            "keep": number,
            "rank": f"r{number}",
            "whitened": f"{number}w",
            "whitened_rank": f"r{number}w",
            "zero": "0",
            "mp": "mp",
            "mpl": "mpl",
        }
        return forms.get(self.kind, f"{self.kind}{number}")


@dataclass(frozen=True, slots=True)
class Edit:
    """One rule for some matrices of some layers.

    Example:
        ```python
        edit = Edit.parse("20:28.mlp.*@0.1")
        edit.layers                                   # (20, 21, 22, 23, 24, 25, 26, 27)
        edit.matches("mlp.up_proj"), edit.rule.rank(4096, 11008)      # (True, 409)
        ```

    Args:
        layers: the layers, kept in ascending order, each once.
        matrix: the matrix's name inside its block; `*`, `?` and `[...]` are wildcards, and `*` spans dots too.
        rule: what to keep.
    """

    layers: tuple[int, ...]
    matrix: str
    rule: Rule

    def __post_init__(self) -> None:
        layers = tuple(sorted(set(self.layers)))
        if not layers:
            raise UsageError("an edit names at least one layer")
        if not all(type(layer) is int and 0 <= layer <= MAX_LAYER for layer in layers):
            raise UsageError(f"a layer is a whole number from 0 to {MAX_LAYER}")
        if not _MATRIX.fullmatch(self.matrix):
            raise UsageError(f"{self.matrix!r} is no name of a matrix")
        object.__setattr__(self, "layers", layers)

    @classmethod
    def parse(cls, text: str, layers: int | None = None) -> Edit:
        """Read the text form.

        Args:
            text: such as `"27.mlp.down_proj@0.01"`; spaces around it do not matter.
            layers: the model's depth. Needed for negative layers, open slices and `*`, and then every layer is
                checked to exist.

        Raises:
            NotationError: the text is no edit, or not one of a model this deep.
        """
        try:
            return _read(text, layers)
        except SpellingError as error:
            failure = explained(text, error, lambda other: _read(other, layers))
        raise failure

    def matches(self, matrix: str) -> bool:
        """Whether a matrix of this name, inside its block, is meant."""
        return fnmatchcase(matrix, self.matrix)

    def check(self, layers: int) -> None:
        """Make sure that a model with so many layers has all layers of the edit.

        Raises:
            NotationError: a layer does not exist; points at it in the text form.
        """
        if self.layers[-1] >= layers:
            Edit.parse(str(self), layers)

    def __str__(self) -> str:
        return f"{','.join(_spelled(self.layers))}.{self.matrix}@{self.rule}"


def in_order(edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """The edits in the order in which those of one matrix are carried out, whatever order they were given in.

    Pruning first, then what is cut off at the top (tail), then what is cut off at the bottom (mp, mpl, fractions,
    ranks), then the same by the inputs, then zero. So what a truncation promises of the rank holds at the end, and
    `tail0.9` with `0.5` leaves a band: the half of the components that comes after the largest tenth.
    """
    return tuple(sorted(edits, key=lambda edit: (get_args(Kind).index(edit.rule.kind), str(edit))))


def _read(text: str, layers: int | None) -> Edit:
    scan = Scanner(text, layers)
    scan.skip()
    if scan.at == len(text):
        raise SpellingError("the edit is empty", 0, 1, rule=_SITE_RULE, fixes=("0.mlp.*@0.1",))
    named = _layers(scan)
    matrix = _matrix(scan)
    rule = _rule(scan)
    return Edit(named, matrix, rule)


def _layers(scan: Scanner) -> tuple[int, ...]:
    """The layers before the first dot: numbers and slices with commas between them, or `*` for all."""
    start = scan.at
    if scan.take("*"):
        if scan.layers is None:
            problem = "* for all layers needs the model's depth"
            raise SpellingError(problem, start, scan.at, rule=DEPTH_RULE, mendable=False)
        named = set(range(scan.layers))
    elif scan.peek() not in ("-", ":") and not scan.peek().isdecimal():
        fix = scan.mended(start, start, "0.")
        raise SpellingError("the layers are missing", start, start + 1, rule=_SITE_RULE, fixes=(fix,))
    else:
        named = set(scan.selection()[0])
        while scan.take(","):
            if not re.compile(r"[0-9:-]").match(scan.text, scan.at):
                fix = scan.mended(scan.at - 1, scan.at, "")
                raise SpellingError("a layer is missing", scan.at - 1, scan.at, rule=_SITE_RULE, fixes=(fix,))
            named.update(scan.selection()[0])
    if not scan.take("."):
        at = scan.at
        spaced = re.compile(r"\s*\.?\s*").match(scan.text, at)
        end = spaced.end() if spaced else at
        fixes = (scan.mended(at, end, "."), scan.mended(at, end, ".*"))
        problem = f"a dot and the name of a matrix follow layer {scan.text[start:at]}"
        raise SpellingError(problem, at, at + 1, rule=_SITE_RULE, fixes=fixes)
    return tuple(named)


def _matrix(scan: Scanner) -> str:
    match = _MATRIX.match(scan.text, scan.at)
    if match is None:
        fix = scan.mended(scan.at, scan.at, "*")
        problem = "the name of the matrix is missing"
        raise SpellingError(problem, scan.at, scan.at + 1, rule=_MATRIX_RULE, fixes=(fix,))
    scan.at = match.end()
    if not scan.take("@"):
        at = scan.at
        spaced = re.compile(r"\s*[@=: ]\s*").match(scan.text, at)
        fixes = (scan.mended(at, spaced.end() if spaced else at, "@"), f"{scan.text[:at]}@0.1")
        if at == len(scan.text.rstrip()):
            raise SpellingError("the rule is missing", at, at + 1, rule=_SITE_RULE, fixes=fixes)
        problem = f"{scan.peek()!r} cannot stand in the name of a matrix"
        raise SpellingError(problem, at, at + 1, rule=_MATRIX_RULE, fixes=fixes)
    return match[0]


def _rule(scan: Scanner) -> Rule:
    """The rule, which is all that is left of the text."""
    start = scan.at
    text = scan.text[start:].rstrip()
    end = start + len(text)
    if text in ("mp", "mpl"):
        return Rule("mp" if text == "mp" else "mpl")
    if match := _RANK.fullmatch(text):
        if int(match[1]):
            return Rule("whitened_rank" if match[2] else "rank", int(match[1]))
        raise SpellingError("rank 0 is spelled @0", start, end, rule=_RULE_RULE, fixes=(scan.mended(start, end, "0"),))
    kind, number, number_start = _split(text, start)
    if not _FRACTION.fullmatch(number):
        fixes = tuple(scan.mended(start, end, guess) for guess in _guesses(text))
        problem = f"{brief(text)} is no rule" if text else "the rule is missing"
        raise SpellingError(problem, start, end, rule=_RULE_RULE, fixes=fixes)
    value = Decimal(number)
    if not value and kind == "keep":
        return Rule("zero")
    if not 0 < value <= 1:
        rank = (f"r{int(value)}",) if kind in ("keep", "whitened") and number.isdigit() else ()
        spellings = (number[1:], "0.1") if value < 0 else (*rank, "1") if value else ("0.1",)
        fixes = tuple(scan.mended(number_start, number_start + len(number), spelling) for spelling in spellings)
        problem = f"the fraction {number} is not between 0 and 1"
        raise SpellingError(problem, number_start, number_start + len(number), rule=_FRACTION_RULE, fixes=fixes)
    return Rule(kind, value)


def _split(text: str, start: int) -> tuple[Kind, str, int]:
    """The kind of a rule with a fraction, the fraction's text, and where in the whole text that stands."""
    for prefix, kind in _PREFIXES.items():
        if text.startswith(prefix):
            return kind, text[len(prefix) :], start + len(prefix)
    if text.endswith("w"):
        return "whitened", text[:-1], start
    return "keep", text, start


def _guesses(text: str) -> Iterator[str]:
    """Spellings that may have been meant by a rule that is none."""
    if match := _PERCENT.fullmatch(text.lstrip("-")):
        yield f"{Decimal(f'{match[1]}.{match[2] or 0}') / 100:f}"
    yield text.lower().replace(" ", "").replace(",", ".")
    yield text.lower().replace(" ", "").lstrip("-+@=")
    yield text.lower().replace("-", "")
    if match := _WORDY_RANK.fullmatch(text.lower()):
        yield f"r{int(match[1])}"
    if re.compile(r"[0-9]{0,6}\.?[0-9]{1,6}e-?[0-9]{1,2}").fullmatch(text.lower()):
        yield f"{float(text):.12f}".rstrip("0")
    word = re.compile(r"[a-z]*").match(text.lower())
    if word and word[0]:
        rest = text[word.end() :].strip(" =:(),")
        for near in get_close_matches(word[0], ("tail", "prune", "mp", "mpl"), 1, 0.5):
            yield near + rest
            yield f"{near}0.1"
    if text in ("full", "all"):
        yield "1"
    if text in ("zero", "none"):
        yield "0"
    yield "0.1"


def _spelled(layers: tuple[int, ...]) -> Iterator[str]:
    """Ascending layers as numbers, and as slices where three or more follow one another."""
    at = 0
    while at < len(layers):
        end = at + 1
        while end < len(layers) and layers[end] == layers[end - 1] + 1:
            end += 1
        if end - at > 2:
            yield f"{layers[at]}:{layers[end - 1] + 1}"
        else:
            yield from map(str, layers[at:end])
        at = end

"""Which subjects and answers a text mentions together: many thousand pairs looked for in one pass (Aho-Corasick).

What counts as a mention:

- Texts are compared byte by byte in UTF-8, as they are written. With `ignore_case` the letters A to Z are
  compared without case; other letters are not.
- A line break, a tab or a no-break space is a space. Several of them in a row are not one space: a phrase does not
  reach over the end of a paragraph.
- A mention is of whole words: "art" is not in "party". What stands on both sides must be no letter, digit, underscore
  or combining mark. An end of a pattern that is none of these itself ("Re!") needs no such neighbour.
- `phrase`: the subject as it stands. `all_words`: each of its words somewhere in the document, in any order, so that
  "Danielle Darrieux" is in "Danielle Yvonne Marie Antoinette Darrieux". Words are what stands between spaces,
  without the punctuation around them.
- The answer is always looked for as a phrase.
- How often something stands in a document does not matter, nor how far apart the two are.

The paper says neither which rule it used nor what a document was; its example fits `all_words`.
"""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from impasto.errors import MissingExtra, UsageError

Match = Literal["phrase", "all_words"]

LARGEST_TABLE = 500_000  # bytes of all patterns up to which the faster, larger automaton is built (about 300 MB)

_WORD = [chr(code).isalnum() or chr(code) == "_" for code in range(128)]
_SPACES = bytes.maketrans(b"\t\n\r\v\f", b"     ")
_AROUND = string.punctuation + "“”‘’«»–—…¡¿"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts that are looked for in the same document."""

    subject: str
    answer: str

    def __post_init__(self) -> None:
        if not self.subject.strip() or not self.answer.strip():
            raise UsageError(f"a pair needs a subject and an answer, not {self.subject!r} and {self.answer!r}")


class Mentions:
    """Finds in a text which pairs it mentions.

    Args:
        pairs: what to look for.
        match: how a subject is mentioned, see the module's text.
        ignore_case: compare A to Z without case.
        sample: some texts of the corpus, by which it is decided what to look for first. They change the speed only.

    Raises:
        MissingExtra: the package with the automaton is not installed.
        UsageError: there are no pairs.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        match: Match = "phrase",
        *,
        ignore_case: bool = False,
        sample: Sequence[bytes] = (),
    ) -> None:
        if not pairs:
            raise UsageError("there are no pairs to look for: give at least one subject with its answer")
        self._ignore_case = ignore_case
        patterns: dict[bytes, int] = {}

        def number(pattern: bytes) -> int:
            return patterns.setdefault(pattern, len(patterns))

        subjects = {pair.subject: self._words(pair.subject, match) for pair in pairs}
        anchors = self._anchors(subjects, sample)
        spread = Counter(word for words in subjects.values() for word in words)
        self._asked: dict[int, list[tuple[int, tuple[bytes, ...], int]]] = {}  # anchor: (answer, other words, pair)
        for place, pair in enumerate(pairs):
            anchor = anchors[pair.subject]
            answer = number(self._canonical(" ".join(pair.answer.split())))
            others = tuple(sorted(subjects[pair.subject].keys() - {anchor}, key=lambda word: (spread[word], word)))
            self._asked.setdefault(number(anchor), []).append((answer, others, place))
        self._edges = [_edges(pattern) for pattern in patterns]
        self._automaton = _automaton(list(patterns))

    def of(self, text: bytes) -> list[int]:
        """The places of all pairs whose subject and answer both stand in a text in UTF-8, each once."""
        text = self._spaced(text)
        found: set[int] = set()
        for pattern, start, end in self._automaton.find_matches_as_indexes(text, overlapping=True):
            if pattern not in found and _stands_alone(text, start, end, self._edges[pattern]):
                found.add(pattern)
        known: dict[bytes, bool] = {}
        return [
            place
            for anchor in found & self._asked.keys()
            for answer, words, place in self._asked[anchor]
            if answer in found and all(_has(text, word, known) for word in words)
        ]

    def _anchors(self, subjects: Mapping[str, Mapping[bytes, bool]], sample: Sequence[bytes]) -> dict[str, bytes]:
        """One word of each subject, which is looked for; the others only where it stands.

        Best is what a text has seldom, also inside other words: what the sample has least often; then names rather
        than words in small letters; then words that few subjects share, and long ones.
        """
        spread = Counter(word for words in subjects.values() for word in words)
        often: Counter[bytes] = Counter()
        if sample and len(spread) > len(subjects):
            every = list(spread)
            automaton = _automaton(every)
            for text in sample:
                found = automaton.find_matches_as_indexes(self._spaced(text), overlapping=True)
                often.update(every[place] for place, _, _ in found)

        def cost(word: bytes, small: bool) -> tuple[int, bool, float, bytes]:
            return often[word], small, spread[word] / 2.0 ** min(len(word), 8), word

        return {text: min(words, key=lambda word: cost(word, words[word])) for text, words in subjects.items()}

    def _words(self, subject: str, match: Match) -> dict[bytes, bool]:
        """What must all stand in a document, each as a phrase, and whether it is written in small letters."""
        words = subject.split()
        found = [" ".join(words)] if match == "phrase" else [word.strip(_AROUND) or word for word in words]
        return {self._canonical(word): word.islower() for word in found}

    def _canonical(self, text: str) -> bytes:
        data = unicodedata.normalize("NFC", text).encode("utf-8", "replace")
        return data.lower() if self._ignore_case else data

    def _spaced(self, text: bytes) -> bytes:
        if b"\r\n" in text:
            text = text.replace(b"\r\n", b"\n")
        if b"\xc2\xa0" in text:
            text = text.replace(b"\xc2\xa0", b" ")
        text = text.translate(_SPACES)
        return text.lower() if self._ignore_case else text


def _automaton(patterns: list[bytes]) -> Any:
    """What finds all patterns in one pass over a text."""
    try:
        from ahocorasick_rs import BytesAhoCorasick, Implementation
    except ImportError as problem:
        raise MissingExtra("ahocorasick_rs", "corpus", "counting in a corpus") from problem
    small = sum(map(len, patterns)) <= LARGEST_TABLE
    kind = Implementation.DFA if small else Implementation.ContiguousNFA
    return BytesAhoCorasick(patterns, implementation=kind)


def distinct(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """The pairs, each once, in the order in which they first come."""
    return tuple(dict.fromkeys(pairs))


def _has(text: bytes, word: bytes, known: dict[bytes, bool]) -> bool:
    """Whether a word stands in a text; what was asked once is remembered in `known`."""
    if word not in known:
        edges, at = _edges(word), text.find(word)
        while at >= 0 and not _stands_alone(text, at, at + len(word), edges):
            at = text.find(word, at + 1)
        known[word] = at >= 0
    return known[word]


def _edges(pattern: bytes) -> tuple[bool, bool]:
    """Whether a pattern begins and ends inside a word, if another letter stands there."""
    text = pattern.decode()
    return _in_word(text[0]), _in_word(text[-1])


def _stands_alone(text: bytes, start: int, end: int, edges: tuple[bool, bool]) -> bool:
    """Whether what stands from `start` to `end` is no part of a longer word."""
    if edges[0] and start > 0:
        before = text[start - 1]
        if _WORD[before] if before < 128 else _in_word(text[max(0, start - 4) : start].decode("utf-8", "replace")[-1]):
            return False
    if edges[1] and end < len(text):
        after = text[end]
        if _WORD[after] if after < 128 else _in_word(text[end : end + 4].decode("utf-8", "replace")[0]):
            return False
    return True


def _in_word(sign: str) -> bool:
    return sign.isalnum() or sign == "_" or unicodedata.category(sign).startswith("M")

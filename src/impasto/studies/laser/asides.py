"""What a LASER study measures beside accuracy: how often facts are mentioned, what tails say, how plain text reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from impasto.errors import UsageError
from impasto.models import LoadedModel
from impasto.studies.facts import relations
from impasto.studies.laser.evidence import BASE, CHOSEN, Mentions, Sheet, Spoken, Tail
from impasto.studies.laser.kept import Book
from impasto.studies.laser.parts import Pair, items
from impasto.studies.laser.protocol import Report, rho_of, spaced
from impasto.tasks import TaskSet

if TYPE_CHECKING:
    from impasto.corpus import Counted

WINDOW = 2048
"""Tokens that are read together at most, as in the paper."""


def counted(counts: Sequence[Path | str]) -> tuple[tuple[str, Counted], ...]:
    """Finished counts with what to call them: how mentions were matched, and in how much.

    Raises:
        UsageError: a file that is no count, or two that could not be told apart.
    """
    from impasto.corpus import read

    found = []
    for path in map(Path, counts):
        one = read(path)
        name = path.stem if one.rules is None else one.rules.match.replace("_", " ")
        name += ", any case" if one.rules is not None and one.rules.ignore_case else ""
        found.append((name, one))
    names = [(name, one.documents) for name, one in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two counts are both of {twice[0]!r} in one number of documents: give each corpus once")
    return tuple(found)


def mentions(task: TaskSet, counts: Sequence[tuple[str, Counted]]) -> tuple[Mentions, ...]:
    """How often the fact of each document stands in the corpora of some counts; those that know none are left out.

    A fact is what a document is about, with its right answer.
    """
    from impasto.corpus import Pair as Fact

    asked = [
        Fact(str(doc["about"]), str(doc["answer"]))
        if isinstance(doc, Mapping) and {"about", "answer"} <= set(doc)
        else None
        for doc in task.documents.values()
    ]
    found = []
    for name, one in counts:
        known = {Fact(pair.subject, pair.answer.strip()): number for pair, number in one.frequencies.items()}
        numbers = tuple(None if fact is None else known.get(fact) for fact in asked)
        if any(number is not None for number in numbers):
            corpus = "" if one.documents is None else f"{one.documents:,} documents"
            found.append(Mentions(name, corpus, numbers))
    return tuple(found)


def spoken(
    loaded: LoadedModel,
    book: Book,
    pair: Pair,
    report: Report,
    *,
    batch_tokens: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Spoken | None:
    """What the components of the chosen matrix say, from the smallest; None for tasks with choices.

    Those documents are asked first that the chosen edit corrects, as in the paper, then others, evenly, up to the
    number that the protocol names.
    """
    from impasto.studies.laser_tail import SHARES, tail_answers

    most = book.asked.protocol.tail
    if pair.part.labels or not pair.part.groups or most == 0:
        return None
    shown = items(pair.test)
    both = book.sheets(pair.test.protocol, [report.uses[BASE], report.uses[CHOSEN]])
    corrected, others = _sides(*(both[report.uses[use].fingerprint] for use in (BASE, CHOSEN)))
    first = spaced(corrected, most)
    places = [*first, *spaced(others, None if most is None else most - len(first))]
    known = {request.fingerprint: request for request in pair.test.requests}
    documents = list(pair.test.documents.values())
    kinds = relations(documents) if "record" in documents[0] else ("",) * len(documents)
    layer, matrix = report.chosen.layers[0], report.chosen.matrix
    shares = sorted({*SHARES, 1 - Decimal(str(rho_of(report.chosen)))})
    found = tail_answers(
        loaded,
        layer,
        matrix,
        [known[shown[place].options[0]] for place in places],
        shares=shares,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    return Spoken(
        layer=layer,
        matrix=matrix,
        corrected=len(first),
        golds=found[0].golds,
        relations=tuple(kinds[place] for place in places),
        units=tuple(pair.part.units[place] for place in places),
        tails=tuple(Tail(float(one.share), one.texts, one.right, one.likeness) for one in found),
    )


def _sides(base: Sheet, chosen: Sheet) -> tuple[list[int], list[int]]:
    """Documents that the edit corrects, and all others."""
    corrected = [
        place
        for place, (before, after) in enumerate(zip(base.scores, chosen.scores, strict=True))
        if before is not None and after is not None and after > before
    ]
    return corrected, sorted(set(range(len(base.scores))) - set(corrected))


def text_tasks(loaded: LoadedModel, files: Sequence[Path | str]) -> list[TaskSet]:
    """Plain texts as tasks.

    Raises:
        UsageError: a file that is not there, is no UTF-8, holds nothing to score, or is called as another one is.
    """
    from impasto.perplexity import text_task

    made: list[TaskSet] = []
    for path in map(Path, files):
        if path.stem in {task.name for task in made}:
            raise UsageError(f"two texts are called {path.stem}: give each another name")
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as problem:
            raise UsageError(f"no text in {path}: {problem.strerror}") from problem
        except UnicodeDecodeError as problem:
            raise UsageError(f"{path} is not in UTF-8, so it cannot be read as text") from problem
        made.append(text_task(loaded, [text], window=WINDOW, name=path.stem, source=path.name))
    return made

"""How often facts are mentioned in a corpus: subjects and their answers, document by document.

    from impasto import corpus

    pairs = corpus.read_pairs("facts.jsonl")
    counts = corpus.count(corpus.files(["pile/*.jsonl.zst"]), pairs, workers=8)
    corpus.write(counts, "counts.json")

What counts as a mention stands in `mentions`, what as a document in `reading`. Nothing here needs a model.
"""

from impasto.corpus.counting import Counts, Plan, Rules, count, plan
from impasto.corpus.mentions import Match, Mentions, Pair, distinct
from impasto.corpus.reading import Unit, files
from impasto.corpus.tables import Counted, frequencies, read, read_pairs, write

__all__ = [
    "Counted",
    "Counts",
    "Match",
    "Mentions",
    "Pair",
    "Plan",
    "Rules",
    "Unit",
    "count",
    "distinct",
    "files",
    "frequencies",
    "plan",
    "read",
    "read_pairs",
    "write",
]

"""The questions of the painters paper: how each is decided, and the answer for this model."""

from __future__ import annotations

from collections.abc import Iterable

from impasto.result import Answer
from impasto.studies import findings, loops, states
from impasto.studies.evidence import Evidence
from impasto.studies.loops import PROPORTIONAL
from impasto.studies.paper import FOUND
from impasto.studies.question import Question
from impasto.studies.reading import KEPT, SLIGHT, Reading
from impasto.studies.states import DISTINCT

SCORE = "normalised score"
MODERATE = "Averaged over widths from 3 layers to 5, or to a third of a deep model."
INCOMPARABLE = "No answer: on no task that was asked is the full model clearly above guessing."

QUESTIONS: tuple[Question[Reading], ...] = (
    Question(
        key="skip-one",
        text="Can one middle layer be left out at little cost?",
        find=findings.single("skip_one"),
        needs="runs with one layer left out",
        unit=SCORE,
        rule=f"Yes if the interval of the mean over the middle half of the layers lies above {KEPT}, no if below.",
        figure="layers",
    ),
    Question(
        key="swap",
        text="Can two neighbouring middle layers trade places at little cost?",
        find=findings.single("swap"),
        needs="runs with two neighbours swapped",
        unit=SCORE,
        rule=f"Yes if the interval of the mean over the middle half of the layers lies above {KEPT}, no if below.",
        figure="layers",
    ),
    Question(
        key="edges",
        text="Do the first and the last layer matter more than those in the middle?",
        find=findings.edges,
        needs="runs with one layer left out",
        unit=f"difference of {SCORE}",
        rule=(
            "The score without one layer of the middle half minus that without the first or the last layer: yes if the "
            "interval lies above zero, no if below."
        ),
        figure="layers",
    ),
    Question(
        key="three-groups",
        text="Do the hidden states fall into a beginning, a middle and an end?",
        find=states.groups,
        needs="the similarity of the full model's states",
        unit="difference of cosine",
        rule=(
            "No if one of the three groups is empty. Else, similarity inside the middle minus that to the other "
            f"states: yes if the interval lies above {DISTINCT}, no if below. The matrix is the paper's."
        ),
        figure="similarity",
        scores=False,
    ),
    Question(
        key="without-artefacts",
        text="Does the middle stay a group without the artefacts of the paper's measure?",
        find=states.artefacts,
        needs="the similarity of the full model's states",
        unit="difference of cosine",
        rule=(
            "The least of the differences by the other measures (similarity inside the paper's middle minus that to "
            f"the other states): yes if its interval lies above {DISTINCT}, no if below."
        ),
        figure="similarity",
        scores=False,
    ),
    Question(
        key="all-necessary",
        text="Are all middle layers necessary?",
        find=findings.needed,
        needs="runs without the middle",
        unit=SCORE,
        rule=(
            f"No if leaving out at least one layer clearly keeps {KEPT}, yes if every number of left-out layers "
            "clearly keeps less; the intervals hold for all of them at once. The estimate is for the fewest layers."
        ),
        figure="summary",
    ),
    Question(
        key="same-function",
        text="Do the middle layers all do the same?",
        find=findings.keeps("middle_repeat"),
        needs="runs with the centre layer repeated",
        unit=SCORE,
        rule=(
            f"Yes if the centre layer in every place of the middle clearly keeps {KEPT}, no if clearly less. {MODERATE}"
        ),
        figure="summary",
    ),
    Question(
        key="repeat-worse-than-skip",
        text="Is repeating the centre layer worse than leaving the middle out?",
        find=findings.above("skip", "middle_repeat"),
        needs="runs with the middle left out and with the centre layer repeated",
        unit=f"difference of {SCORE}",
        rule=f"Skip minus middle repeat: yes if the interval lies above zero, no if below. {MODERATE}",
        figure="summary",
    ),
    Question(
        key="repeat-drifts",
        text="Does the repeated layer drive the states away from where they were?",
        find=states.repeat_drifts,
        needs="the similarity of states under middle repeat",
        unit="difference of cosine",
        rule=(
            "Cosine of the states before and behind the middle, full model minus middle repeat: yes if the interval "
            "lies above zero, no if below."
        ),
        figure="states",
        scores=False,
    ),
    Question(
        key="order-matters",
        text="Does the order of the middle layers matter?",
        find=findings.order,
        needs="runs with the middle reversed or in random order",
        unit=f"loss of {SCORE}",
        rule=(
            f"The loss, mean of reverse and random order: yes if the interval lies above {SLIGHT}, no if below. "
            f"{MODERATE}"
        ),
        figure="summary",
    ),
    Question(
        key="random-beats-reverse",
        text="Is a random order better than the reversed one?",
        find=findings.above("random_order", "reverse"),
        needs="runs with the middle reversed and in random order",
        unit=f"difference of {SCORE}",
        rule=(
            "Random minus reverse, seeds and examples resampled: yes if the interval lies above zero, no if below. "
            f"{MODERATE}"
        ),
        figure="seeds",
    ),
    Question(
        key="order-by-task",
        text="Does the order matter more for arithmetic and reasoning than for other tasks?",
        find=findings.order_by_task,
        needs="runs in another order, on usable tasks of both kinds",
        unit=f"difference of {SCORE}",
        rule=(
            "Mean score of the other tasks minus that of arithmetic and reasoning, over reverse and random order: yes "
            f"if the interval lies above zero, no if below. Tasks at chance are left out. {MODERATE}"
        ),
        figure="order",
    ),
    Question(
        key="order-itself",
        text="Is it the order that these tasks need, rather than the layers?",
        find=findings.order_itself,
        needs="runs in another order and without the middle, on usable tasks of both kinds",
        unit=f"difference of {SCORE}",
        rule=(
            "The gap between the kinds of tasks in another order minus the gap when the same layers are left out: yes "
            f"if the interval lies above zero, no if below. {MODERATE}"
        ),
        figure="order",
    ),
    Question(
        key="parallel",
        text="Can the middle layers run in parallel?",
        find=findings.keeps("parallel"),
        needs="runs with the middle in parallel",
        unit=SCORE,
        rule=f"Yes if all middle layers on the same input clearly keep {KEPT}, no if clearly less. {MODERATE}",
        figure="summary",
    ),
    Question(
        key="loops-help",
        text="Does it help to run the parallel layers several times?",
        find=findings.above("looped_parallel", "parallel"),
        needs="runs with the middle in parallel, once and looped",
        unit=f"difference of {SCORE}",
        rule=f"Looped minus single parallel: yes if the interval lies above zero, no if below. {MODERATE}",
        figure="summary",
    ),
    Question(
        key="iterations-by-width",
        text="Does the best number of iterations grow with the number of parallel layers?",
        find=loops.iterations_by_width,
        needs="the map of iterations by width",
        unit="iterations per layer",
        rule=(
            "Slope of the line through the best number of iterations of every width that is clearly above guessing, "
            f"the best chosen anew in every resample: yes if the interval lies above {PROPORTIONAL}, no if below."
        ),
        figure="loops",
    ),
    Question(
        key="looped-best",
        text="Is looped parallel the least harmful method?",
        find=findings.least_harm,
        needs="runs of looped parallel and of at least three other methods",
        unit=f"difference of {SCORE}",
        rule=(
            "Looped parallel minus the best of the others, chosen anew in every resample: yes if the interval lies "
            f"above zero, no if below. {MODERATE}"
        ),
        figure="summary",
    ),
    Question(
        key="ranking",
        text="Do the methods rank as in the paper?",
        find=findings.ranking,
        needs="runs of at least four methods",
        unit="Kendall's tau",
        rule=(
            "Rank correlation with the paper's order, from -1 to 1: yes if the interval lies above zero (more pairs "
            f"agree than not), no if below. {MODERATE}"
        ),
        figure="summary",
    ),
    Question(
        key="repeats-help",
        text="Does running the middle two or three times ever beat the full model?",
        find=findings.repeats,
        needs="runs with a repeated middle",
        unit=f"difference of {SCORE}",
        rule=(
            "Yes if one of them is clearly above the full model, no if none can be better by more than "
            f"{SLIGHT}; the intervals hold for all of them at once. The estimate is for the best."
        ),
        figure="repeats",
    ),
    Question(
        key="averaged-cache",
        text="Does the averaged KV cache of the paper's code change what parallel layers write?",
        find=states.averaged_cache,
        needs="texts written with exact and averaged caches",
        unit="share of texts",
        rule=(
            "Share of prompts whose text is that of a full pass with exact caches but not with averaged ones: yes if "
            f"the interval lies above {SLIGHT}, no if below."
        ),
        figure="kv",
        scores=False,
    ),
)


def answers(reading: Reading, figures: Iterable[str]) -> tuple[Answer, ...]:
    """Every question answered for this model; what was not measured is unclear, and says what it needs."""
    shown, incomparable = set(figures), "" if _comparable(reading.evidence) else INCOMPARABLE
    return tuple(
        question.answer(reading, FOUND[question.key], shown, incomparable=incomparable) for question in QUESTIONS
    )


def _comparable(evidence: Evidence) -> bool:
    """Whether scores can be compared, or none was measured yet."""
    return bool(evidence.usable) or all(evidence.scores(evidence.full, task) is None for task in evidence.tasks)

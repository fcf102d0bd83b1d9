"""The questions of the LASER study: how each is decided, and the answer for this model."""

from __future__ import annotations

from collections.abc import Iterable

from impasto.result import Answer
from impasto.studies.laser import deeper, findings, paper
from impasto.studies.laser.evidence import Evidence, Trial, benchmark_of
from impasto.studies.laser.findings import FAR, KEPT, MOSTLY, SAME, WORTH
from impasto.studies.question import Question
from impasto.studies.reading import said

ACCURACY = "difference of accuracy"
_CLEAR = f"yes if the interval lies above zero, no if below {WORTH}"


QUESTIONS: tuple[Question[Evidence], ...] = (
    Question(
        key="constant",
        text="Is the gain more than a move towards the more frequent answer?",
        find=findings.balanced,
        needs="a task whose right answers have words, such as laser_fever or laser_counterfact",
        unit="difference of balanced accuracy",
        rule=f"Mean over tasks of the change of the accuracy with all right answers weighed alike: {_CLEAR}.",
        figure="gains",
        arises=lambda evidence: any(len(set(trial.groups)) > 1 for trial in evidence.trials),
    ),
    Question(
        key="loss",
        text="Does the chosen edit make the right answers likelier?",
        find=findings.loss,
        needs="log-likelihoods of right answers",
        unit="nats per token",
        rule="Mean over tasks of the loss without minus that with the edit: yes if the interval lies above zero.",
        figure="losses",
    ),
    Question(
        key="flattered",
        text="Does choosing the best of many flatter it?",
        find=findings.flattered,
        needs="the chosen edit on both parts of a task",
        unit=ACCURACY,
        rule=f"Mean over tasks of the gain where the edit was chosen minus that on held-out documents: {_CLEAR}.",
        figure="gains",
    ),
    Question(
        key="strong",
        text="Can more than nine tenths of the matrix's components go without harm?",
        find=findings.strong,
        needs=f"the chosen matrix cut to {FAR} of its rank or less",
        unit=ACCURACY,
        rule=(
            f"Mean over tasks of the accuracy at the largest share up to {FAR}, minus the model's: yes if the interval "
            f"lies above {said(-WORTH)}, no if below."
        ),
        figure="much",
    ),
    Question(
        key="zero",
        text="Is a low rank better than taking the matrix away?",
        find=findings.zero,
        needs="a chosen edit of some rank, and the model without its matrix",
        unit=ACCURACY,
        rule=f"Mean over tasks of the chosen edit minus a matrix of zeros: {_CLEAR}.",
        figure="much",
    ),
    Question(
        key="pruning",
        text="Does zeroing the smallest entries do the same as cutting the rank?",
        find=findings.pruning,
        needs="the chosen matrix pruned",
        unit=ACCURACY,
        rule=(
            "Mean over tasks of the chosen edit minus pruning that keeps the same share of the entries: yes if the "
            f"interval lies within {SAME} of zero, no if outside."
        ),
        figure="much",
    ),
    Question(
        key="composed",
        text="Do several edits together beat the best one?",
        find=findings.composed,
        needs="a composition (--compose greedy) that accepted something",
        unit=ACCURACY,
        rule=f"Mean over tasks of the composition's end minus the chosen single edit: {_CLEAR}.",
        figure="composition",
    ),
    Question(
        key="late",
        text="Do the later layers bear cuts better than the earlier ones?",
        find=findings.late,
        needs="the same cuts measured in both halves of the layers (--screen 0 measures them all)",
        unit=ACCURACY,
        rule="Mean over kinds of cuts of the accuracy in the later half minus the earlier: above zero or below.",
        figure="layers",
    ),
    Question(
        key="halves",
        text="Do cuts of the MLP move the accuracy more than cuts of attention?",
        find=findings.halves,
        needs="cuts of both halves measured (--types all)",
        unit=ACCURACY,
        rule="Mean over layers and shares of the size of the change, MLP minus attention: above zero or below.",
        figure="layers",
        arises=lambda evidence: {"mlp", "attention"} <= set(evidence.halves.values()),
    ),
    Question(
        key="nested",
        text="Does what one cut corrects stay right under stronger cuts?",
        find=findings.nested,
        needs="the chosen matrix at several ranks that correct something",
        unit="share of corrected documents",
        rule=f"Mean over tasks of the share that stays right: yes if the interval lies above {KEPT}, no if below.",
        figure="much",
    ),
    Question(
        key="robust",
        text="Are more facts right in all their wordings?",
        find=findings.robust,
        needs="the chosen edit on facts in several wordings",
        unit="difference of the share of facts",
        rule=f"Share of facts right in all wordings, with the chosen edit minus without: {_CLEAR}.",
        figure="gains",
        arises=lambda evidence: any(map(findings.worded, evidence.trials)),
    ),
    Question(
        key="rare",
        text="Do rare facts gain more than frequent ones?",
        find=deeper.rare,
        needs="counts of the facts in a corpus (`impasto corpus count`, then --frequencies)",
        unit=ACCURACY,
        rule=(
            "Mean over tasks of the chosen edit's gain on rare facts minus that on frequent ones (in fewer than 50 and "
            f"more than 1,000 documents, or the thirds of a smaller corpus): {_CLEAR}."
        ),
        figure="boosts",
        arises=lambda evidence: any(map(_asks_facts, evidence.trials)),
    ),
    Question(
        key="discarded",
        text="Do the discarded components answer with things of the right kind?",
        find=deeper.discarded,
        needs="facts whose relations are known, asked of the discarded components alone",
        unit="share of wrong answers, above chance",
        rule=(
            "With only what the chosen edit throws away: mean over tasks of the share of wrong answers that are right "
            f"for another fact of the same relation, minus what shuffled answers would have: {_CLEAR}."
        ),
        figure="tails",
        arises=lambda evidence: any(map(_asks_facts, evidence.trials)),
    ),
    Question(
        key="reads",
        text="Does the model still read plain text as well?",
        find=deeper.reads,
        needs="a text (--text FILE)",
        unit="nats per token",
        rule=(
            "Mean over tasks and texts of the loss with the chosen edit minus that without, window by window: yes if "
            f"the interval lies below {deeper.LOSS}, no if above."
        ),
        figure="texts",
        arises=lambda evidence: not evidence.masked,
    ),
    Question(
        key="moved",
        text="Does the edit do the same in a layer that is moved?",
        find=findings.moved,
        needs="the chosen edit under other schedules, in a model of at least three layers",
        unit=ACCURACY,
        rule=(
            "Mean over tasks and schedules of the edit's effect there minus its effect as it is, document by document: "
            f"yes if the interval lies within {SAME} of zero, no if outside."
        ),
        figure="moved",
    ),
    Question(
        key="screening",
        text="Does one backward pass tell which cuts cost least?",
        find=findings.screening,
        needs="at least five candidates that were screened and measured",
        unit="rank correlation",
        rule="Foretold and measured change of the loss, over candidates: yes if the interval lies above zero.",
        figure="screening",
    ),
)


def answers(evidence: Evidence, figures: Iterable[str]) -> tuple[Answer, ...]:
    """One answer for each task, then every question about all of them; what was not measured is unclear."""
    shown = set(figures)
    arising = (question for question in QUESTIONS if question.arises(evidence))
    return (
        *(_gain(trial).answer(trial, paper.found(benchmark_of(trial.name)), shown) for trial in evidence.trials),
        *(question.answer(evidence, paper.FOUND[question.key], shown) for question in arising),
    )


def _asks_facts(trial: Trial) -> bool:
    """Whether a task asks for facts about a subject."""
    return benchmark_of(trial.name) == "counterfact"


def _gain(trial: Trial) -> Question[Trial]:
    """The question of one task."""
    several = len(set(trial.groups)) > 1
    fair = ", and so does that with all right answers weighed alike" if several else ""
    one = f"lies below {WORTH}, or the edit moves {MOSTLY:.0%} of the answers to a class that is not right so often"
    return Question(
        key=f"gain-{trial.name}",
        text=f"Does a low-rank edit raise the accuracy on {trial.title}?",
        find=findings.gain,
        needs="the chosen edit and the model itself on the held-out documents",
        unit=ACCURACY,
        rule=(
            f"The edit chosen on other documents minus the model itself: yes if the interval lies above zero{fair}, "
            f"no if {'one of them' if several else 'it'} {one if trial.classes else f'lies below {WORTH}'}."
        ),
        figure="gains",
    )

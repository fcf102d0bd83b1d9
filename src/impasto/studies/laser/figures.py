"""The figures of the LASER study: their numbers, and captions that say what one sees and how it was computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from impasto.edit import Edit
from impasto.result import Figure, Row
from impasto.studies.figures import bar, point
from impasto.studies.laser import deeper
from impasto.studies.laser.evidence import BASE, CHOSEN, Evidence, Trial
from impasto.studies.laser.findings import foretold, last_composed, under
from impasto.studies.laser.protocol import AS_IT_IS, SCHEDULES, Use, rho_of
from impasto.studies.reading import listed

HELD_OUT, GRID, CHOOSING = "Held-out documents", "Every matrix, layer and rank", "How the edits were chosen"
MATRIX, SEVERAL = "The chosen matrix", "Several edits, and other schedules"

SERIES = ("the model itself", "chosen edit", "several edits", "lowest loss")
LOW_RANK, PRUNED = "low rank", "pruned entries"
_INTERVALS = "Intervals: 95 %, paired bootstrap over what the documents are about."
_ROLES: Mapping[str, Use] = {"the model itself": BASE, "chosen edit": CHOSEN, "lowest loss": Use("by_loss")}


def figures(evidence: Evidence) -> tuple[Figure, ...]:
    """All figures for which something was measured, in the order of the page."""
    drawn = [draw(evidence) for draw in (gains, levels, classes, losses)]
    grids = [figure for trial in evidence.trials for figure in grid(evidence, trial)]
    rest = [draw(evidence) for draw in (layers, effective, screening, much, composition, composing, moved)]
    found = (*drawn, *grids, *rest, *deeper.figures(evidence))
    return tuple(figure for figure in found if figure is not None and figure.rows)


# ── held-out documents ───────────────────────────────────────────────────────────────────────────────────────


def gains(evidence: Evidence) -> Figure:
    """What the chosen edit changes on each task, beside what it seemed to change where it was chosen."""
    rows: list[Row] = []
    for trial in evidence.trials:
        found = {
            "held-out documents": trial.difference(CHOSEN),
            "held-out, answers weighed alike": trial.difference(CHOSEN, measure="balanced"),
            "where it was chosen": trial.selected,
        }
        rows += [{"label": trial.title, "series": name, **bar(one)} for name, one in found.items() if one is not None]
    caption = (
        "Accuracy with the chosen edit minus that of the model itself. The edit was chosen for its accuracy on the "
        "documents of the last series, so that series flatters it; only the others count. Answers weighed alike is the "
        "mean over all different right answers (of classes the balanced accuracy), which no constant answer can "
        f"raise. {_INTERVALS} {_sizes(evidence)}"
    )
    options = {
        "series": ["held-out documents", "held-out, answers weighed alike", "where it was chosen"],
        "rules": [{"value": 0.0, "name": "no change"}],
        "sort": "given",
        "x_title": "difference of accuracy",
        "section": HELD_OUT,
    }
    return Figure("gains", "What the chosen edit changes", caption, "bars", tuple(rows), options)


def levels(evidence: Evidence) -> Figure:
    """Accuracies, beside guessing and always giving the most frequent right answer."""
    rows: list[Row] = []
    for trial in evidence.trials:
        for series in SERIES:
            use = last_composed(trial) if series == "several edits" else _ROLES[series]
            level = trial.level(use) if use is not None else None
            if level is not None:
                rows.append({"label": trial.title, "series": series, **bar(level)})
        if trial.level(BASE) is not None:
            rows.append({"label": trial.title, "series": "guessing", "value": trial.chance})
            rows.append({"label": trial.title, "series": "most frequent answer", "value": trial.majority})
    caption = (
        "Accuracy on held-out documents. Most frequent answer is what always giving the one that is right most often "
        "gets. Several edits is the end of the composition; lowest loss is the single edit with the lowest loss where "
        f"edits were chosen, where that is another. Intervals of each level by itself: 95 %. {_sizes(evidence)}"
    )
    options = {
        "series": [*SERIES, "guessing", "most frequent answer"],
        "sort": "given",
        "x_title": "accuracy",
        "section": HELD_OUT,
    }
    return Figure("levels", "Accuracy", caption, "bars", tuple(rows), options)


def classes(evidence: Evidence) -> Figure:
    """How often each class is answered, and how often it is right."""
    rows: list[Row] = []
    for trial in evidence.trials:
        before, after = trial.predictions(BASE), trial.predictions(CHOSEN)
        if not before or not after:
            continue
        right = [trial.golds.count(i) / len(trial.golds) for i in range(len(trial.labels))]
        for series, shares in (("right answers", right), (SERIES[0], before), (SERIES[1], after)):
            rows += [
                {"panel": trial.title, "label": label, "series": series, "value": share}
                for label, share in zip(trial.labels, shares, strict=True)
            ]
    caption = (
        "Share of held-out documents for which each class is right, and for which the model and the model with the "
        "chosen edit say it. Where an edit moves the answers to one class, a gain of accuracy says nothing."
    )
    options = {
        "series": ["right answers", *SERIES[:2]],
        "sort": "given",
        "x_title": "share of documents",
        "x_domain": [-0.02, 1.02],
        "section": HELD_OUT,
    }
    return Figure("classes", "Which class is answered", caption, "bars", tuple(rows), options)


def losses(evidence: Evidence) -> Figure:
    """What the edits change of the right answers' loss."""
    rows: list[Row] = []
    for trial in evidence.trials:
        for series, use in ((SERIES[1], CHOSEN), (SERIES[2], last_composed(trial)), (SERIES[3], _ROLES[SERIES[3]])):
            change = trial.difference(use, measure="loss") if use is not None else None
            if change is not None:
                rows.append({"label": trial.title, "series": series, **bar(change)})
    caption = (
        "Negative log-likelihood of the right answer per token, minus that of the model itself, on held-out "
        f"documents: below zero the right answer has become likelier. {_INTERVALS} {_sizes(evidence)}"
    )
    options = {
        "series": list(SERIES[1:]),
        "rules": [{"value": 0.0, "name": "no change"}],
        "sort": "given",
        "x_title": "difference of the loss (nats per token)",
        "section": HELD_OUT,
    }
    return Figure("losses", "Loss of the right answers", caption, "bars", tuple(rows), options)


# ── the grid ─────────────────────────────────────────────────────────────────────────────────────────────────


def grid(evidence: Evidence, trial: Trial) -> Iterator[Figure]:
    """Heat maps of one task: measured accuracy and loss, and the loss that was foretold."""
    base = trial.base
    if base is not None and trial.points:
        where = f"on the {trial.validation:,} documents to choose on, minus the model itself"
        gaps = " Cells with a dash were not measured whole: screening or the race left them out."
        yield _map(
            evidence,
            f"accuracy-{trial.name}",
            f"{trial.title}: accuracy",
            f"Accuracy with one matrix of one layer cut to a share of its rank, {where} ({base.accuracy:.3f}). "
            f"Light is good.{gaps}",
            "difference of accuracy",
            {edit: found.accuracy - base.accuracy for edit, found in trial.points.items()},
            1,
            trial.chosen,
        )
        loss = {
            edit: found.loss - base.loss
            for edit, found in trial.points.items()
            if found.loss is not None and base.loss is not None
        }
        if loss and _dense(trial):  # else a map of gaps; the table of candidates has the numbers
            yield _map(
                evidence,
                f"loss-{trial.name}",
                f"{trial.title}: loss",
                f"Loss of the right answers per token, {where} ({base.loss:.3f} nats). Dark is good.{gaps}",
                "difference of the loss",
                loss,
                -1,
            )
    if trial.screened:
        yield _map(
            evidence,
            f"foretold-{trial.name}",
            f"{trial.title}: loss foretold",
            "Change of the loss that one backward pass foretells for every matrix and rank (the straight line through "
            "the model as it is, followed to the edit). Dark is good. It orders candidates; it measures nothing.",
            "foretold change of the loss",
            trial.screened,
            -1,
        )


def _map(
    evidence: Evidence,
    key: str,
    title: str,
    caption: str,
    value_title: str,
    values: Mapping[Edit, float],
    good: Literal[1, -1],
    chosen: Edit | None = None,
) -> Figure:
    """One panel for each matrix: shares of the rank over layers; `good` is the sign of a change for the better."""
    shares = sorted({rho_of(edit) for edit in values} | {float(rho) for rho in evidence.protocol.rhos if rho < 1})
    known = {(edit.matrix, edit.layers[0], rho_of(edit)): value for edit, value in values.items()}
    best = max(values, key=lambda edit: (good * values[edit], str(edit)))
    shown = chosen or best
    rows = tuple(
        {
            "panel": one.name,
            "x": one.layer,
            "y": rho,
            "value": known.get((one.name, one.layer, rho)),
            "best": (one.name, one.layer, rho) == (shown.matrix, shown.layers[0], rho_of(shown)),
        }
        for one in evidence.matrices
        for rho in shares
    )
    # Harm has no bounds; colours tell changes apart that are no larger than the best, or than half of all.
    reach = float(max(good * values[best], np.median(np.abs(list(values.values()))), 1e-6))
    options = {
        "x_title": "layer",
        "y_title": "share of the rank kept",
        "value_title": value_title,
        "domain": (-reach, reach),
        "even": True,
        "columns": min(len({one.name for one in evidence.matrices}), 3),
        "section": GRID,
    }
    bounds = f"Outlined is the {'chosen edit' if chosen else 'best'}; colours do not change beyond {reach:.2g}."
    return Figure(key, title, f"{caption} {bounds}", "heatmap", rows, options)


def _dense(trial: Trial) -> bool:
    """Whether most of the grid was measured whole."""
    return len(trial.points) > trial.grid / 2


def layers(evidence: Evidence) -> Figure | None:
    """The mean change of accuracy by cuts of each layer, over the ranks that were measured."""
    rows: list[Row] = []
    for trial in evidence.trials:
        if trial.base is None or not _dense(trial):
            continue
        found: dict[tuple[str, int], list[float]] = {}
        for edit, measured in trial.points.items():
            found.setdefault((edit.matrix, edit.layers[0]), []).append(measured.accuracy - trial.base.accuracy)
        rows += [
            {"panel": trial.title, "series": name, "x": layer, "y": float(np.mean(changes))}
            for (name, layer), changes in sorted(found.items())
        ]
    if not rows:
        return None
    caption = (
        "Change of accuracy by cutting one matrix of a layer, on average over the shares of the rank that were "
        "measured whole there, on the documents to choose on. No intervals: here edits are looked for, not judged."
    )
    options = {
        "rules": [{"value": 0.0, "name": "no change"}],
        "series": list(dict.fromkeys(one.name for one in evidence.matrices)),
        "y_title": "difference of accuracy",
        "section": GRID,
    }
    return Figure("layers", "Layer by layer", caption, "layer_curve", tuple(rows), options)


def effective(evidence: Evidence) -> Figure | None:
    """The effective rank of every matrix, as a share of its full rank."""
    rows = tuple(
        {
            "series": one.name,
            "x": one.layer,
            "y": one.effective / one.full,
            "effective": one.effective,
            "full": one.full,
        }
        for one in evidence.matrices
        if one.effective is not None
    )
    caption = (
        "How many components matter in each matrix: exp of the entropy of its singular values (Roy and Vetterli 2007), "
        "as a share of the full rank. Random numbers have 0.80 in a square matrix, 0.97 where one side is "
        "four times the other. Read off the weights; no text is run."
    )
    options = {
        "series": list(dict.fromkeys(one.name for one in evidence.matrices)),
        "y_title": "effective rank / full rank",
        "section": GRID,
    }
    return Figure("effective", "Effective rank", caption, "layer_curve", rows, options) if rows else None


# ── choosing ─────────────────────────────────────────────────────────────────────────────────────────────────


def screening(evidence: Evidence) -> Figure | None:
    """The foretold change of the loss against the measured one."""
    rows = tuple(
        {"series": trial.title, "x": x, "y": y, "label": ""} for trial in evidence.trials for x, y in foretold(trial)
    )
    if not rows:
        return None
    caption = (
        "Each point is one candidate that was measured whole: the change of the loss foretold by one backward pass, "
        "and the measured one, on the documents to choose on. Screening needs the order only."
    )
    options = {
        "x_title": "foretold change (nats per token)",
        "y_title": "measured change (nats per token)",
        "series": [trial.title for trial in evidence.trials],
        "section": CHOOSING,
    }
    return Figure("screening", "Foretold and measured", caption, "scatter", rows, options)


# ── the chosen matrix ────────────────────────────────────────────────────────────────────────────────────────


def much(evidence: Evidence) -> Figure | None:
    """How much of the chosen matrix can go, as components and as entries."""
    rows: list[Row] = []
    rules: list[Mapping[str, Any]] = []
    for trial in evidence.trials:
        base = trial.mean(BASE)
        if base is None or trial.report is None:
            continue
        for series, role in ((LOW_RANK, "kept"), (PRUNED, "pruned")):
            ends = [(0.0, Use("zero"))] + [(float(u.parameter), u) for u in trial.report.uses if u.role == role]
            known = [
                (x, change) for x, use in sorted(ends, key=lambda end: end[0]) if (change := trial.difference(use))
            ]
            rows += [{"panel": _panel(trial), "series": series, "x": x, **point(change, base)} for x, change in known]
            if known:
                rows.append({"panel": _panel(trial), "series": series, "x": 1.0, "y": base, "low": base, "high": base})
        rules.append({"panel": _panel(trial), "value": base, "name": "the model itself"})
        if trial.majority is not None:
            rules.append({"panel": _panel(trial), "value": trial.majority, "name": "most frequent answer"})
    if not rows:
        return None
    caption = (
        "Accuracy on held-out documents when the chosen matrix keeps a share of its rank, or a share of its entries "
        "(the smallest are set to zero); at 0 it is taken away. Bands are 95 % intervals of the difference to the "
        f"model itself, each by itself. {_sizes(evidence)}"
    )
    options = {
        "rules": rules,
        "series": [LOW_RANK, PRUNED],
        "x_title": "share kept",
        "y_title": "accuracy",
        "section": MATRIX,
    }
    return Figure("much", "How much is too much", caption, "layer_curve", tuple(rows), options)


def _panel(trial: Trial) -> str:
    edit = trial.chosen
    return trial.title if edit is None else f"{trial.title}: {edit.matrix} of layer {edit.layers[0]}"


# ── several edits, other schedules ───────────────────────────────────────────────────────────────────────────


def composition(evidence: Evidence) -> Figure | None:
    """Accuracy on both parts after every accepted edit."""
    rows: list[Row] = []
    for trial in evidence.trials:
        accepted = [step for step in trial.trace if step.accepted]
        if not accepted or trial.base is None:
            continue
        where, held = "where edits were chosen", "held-out documents"
        path = [trial.base.accuracy, *(step.after for step in accepted)]
        rows += [{"panel": trial.title, "series": where, "x": i, "y": value} for i, value in enumerate(path)]
        uses = [(0, BASE)] + [
            (int(use.parameter), use) for use in (trial.report.uses if trial.report else ()) if use.role == "composed"
        ]
        base = trial.mean(BASE) or 0.0
        for x, use in uses:
            if (change := trial.difference(use)) is not None:
                ends = point(change, base) if use is not BASE else {"y": base, "low": base, "high": base}
                rows.append({"panel": trial.title, "series": held, "x": x, **ends})
    if not rows:
        return None
    caption = (
        "Accuracy with more and more edits, from the last layer to the first, each accepted because it raised the "
        "accuracy where edits were chosen, or lowered the loss at the same accuracy. The paper's figure 4 has both "
        f"lines rise together. Bands: 95 % intervals of the paired difference to the model itself.{_skipped(evidence)} "
        f"{_sizes(evidence)}"
    )
    options = {
        "series": ["held-out documents", "where edits were chosen"],
        "x_title": "accepted edits",
        "y_title": "accuracy",
        "section": SEVERAL,
    }
    return Figure("composition", "Several edits together", caption, "layer_curve", tuple(rows), options)


def _skipped(evidence: Evidence) -> str:
    """Which states of compositions were not measured on held-out documents, as a sentence; empty for none."""
    parts = []
    for trial in evidence.trials:
        accepted = sum(step.accepted for step in trial.trace)
        known = {int(use.parameter) for use in (trial.report.uses if trial.report else ()) if use.role == "composed"}
        gaps = [str(count) for count in range(1, accepted + 1) if count not in known]
        if known and gaps:
            parts.append(f"{trial.title} at {listed(gaps, 20)} edit{'s' if gaps != ['1'] else ''}")
    if not parts:
        return ""
    return (
        " Of a long composition some states only are measured on held-out documents, the last among them; the line "
        f"runs straight past the others: {'; '.join(parts)}."
    )


def composing(evidence: Evidence) -> Figure | None:
    """Every step of the compositions, accepted or rejected."""
    rows = tuple(
        {
            "panel": trial.title,
            "x": place,
            "y": step.after,
            "low": min(step.before, step.after),
            "high": max(step.before, step.after),
            "accepted": step.accepted,
            "edit": str(step.edit or ""),
            "tried": step.tried,
        }
        for trial in evidence.trials
        for place, step in enumerate(trial.trace, 1)
    )
    how = {"greedy": "the corrected greedy search", "authors": "the authors' procedure as written"}
    caption = (
        f"One point for each matrix that {how.get(evidence.protocol.compose, 'composition')} came to, from the last "
        "layer to the first: the best accuracy among the ranks tried there, on the documents to choose on."
    )
    options = {"y_title": "accuracy", "section": SEVERAL}
    return Figure("composing", "The search for several edits", caption, "trace", rows, options) if rows else None


def moved(evidence: Evidence) -> Figure | None:
    """What the chosen edit does under other schedules."""
    rows: list[Row] = []
    for trial in evidence.trials:
        if trial.report is None or (here := trial.difference(CHOSEN)) is None:
            continue
        found = [{"label": AS_IT_IS, **bar(here)}]
        for use in trial.report.uses:
            effect = under(trial, use) if use.role == "moved" and use.edited else None
            change = trial.contrast(effect) if effect is not None else None
            if change is not None:
                plain = trial.mean(Use("moved", use.parameter, edited=False))
                found.append({"label": SCHEDULES[use.parameter], **bar(change), "accuracy without the edit": plain})
        rows += [{"panel": trial.title, **row} for row in found if len(found) > 1]
    if not rows:
        return None
    caption = (
        "The chosen edit's effect on accuracy (with the edit minus without, under the same schedule, held-out "
        f"documents) when its layer stays as it is and when it or its neighbours are rearranged. {_INTERVALS}"
    )
    options = {
        "rules": [{"value": 0.0, "name": "no effect"}],
        "sort": "given",
        "x_title": "difference of accuracy",
        "section": SEVERAL,
    }
    return Figure("moved", "The edit in a layer that is moved", caption, "bars", tuple(rows), options)


def _sizes(evidence: Evidence) -> str:
    sizes: Sequence[str] = [f"{trial.title} {trial.test:,}" for trial in evidence.trials]
    return f"Documents: {listed(sizes, 20)}."

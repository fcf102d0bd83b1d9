"""The LASER study: its parts share nothing, its choices see one part only, its verdicts follow a known truth."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from impasto import cli, models, report
from impasto.benchmarks.laser.metrics import balanced_accuracy
from impasto.edit import Edit
from impasto.errors import FetchError, StoreError, UsageError
from impasto.recipe import Recipe
from impasto.result import Estimate
from impasto.schedule import Schedule
from impasto.store import Store
from impasto.studies.laser import figures, findings, paper
from impasto.studies.laser.claims import QUESTIONS, answers
from impasto.studies.laser.evidence import (
    BASE,
    CHOSEN,
    Evidence,
    Point,
    Sheet,
    Step,
    Trial,
    balanced,
    benchmark_of,
    grouped,
    pooled,
    title_of,
)
from impasto.studies.laser.kept import Asked, Part, is_laser, study_of
from impasto.studies.laser.page import page
from impasto.studies.laser.parts import items, matrices, pairs, rights
from impasto.studies.laser.protocol import (
    EACH,
    ELSEWHERE,
    PROTOCOLS,
    SCHEDULES,
    TASKS,
    Matrix,
    Report,
    Use,
    adapted,
    candidates,
    composed_of,
    edit,
    layers_of,
    promising,
    rho_of,
    schedules,
    share,
    spaced,
)
from impasto.studies.laser.run import best, dry_run_laser, page_of, run_laser
from impasto.studies.pages import page_of as any_page_of
from tiny import claims, facts, laser_data, tiny_model, tiny_tokenizer, write_rows

TASK_NAMES = ["laser_fever", "laser_counterfact"]
ASKED = {"task_names": TASK_NAMES, "limit": 6, "rhos": ["0.5", "0.1"], "screen": 6}


@pytest.fixture(scope="module")
def loaded():
    return models.adopt(tiny_model(layers=4), tiny_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a few rows of two benchmarks, named in the environment."""
    with laser_data(folder := tmp_path_factory.mktemp("data"), fever=claims(), counterfact=facts("abc")):
        yield folder


@pytest.fixture(scope="module")
def study(loaded, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    phases: list[str] = []
    with Store(folder) as store:
        shown = run_laser(loaded, store=store, progress=lambda phase, part: phases.append(phase), **ASKED)
    return folder, shown, list(dict.fromkeys(phases))


# ── a whole study ────────────────────────────────────────────────────────────────────────────────────────────


def test_every_phase_is_told_and_every_question_answered(study):
    _, shown, phases = study
    assert phases[:4] == ["reading tasks", "singular values", "FEVER: screening", "FEVER: round 1: 6 recipes"]
    assert phases[-3:] == ["CounterFact: composing", "CounterFact: reporting", "CounterFact: what is discarded"]
    assert [answer.key for answer in shown.answers] == [
        *(f"gain-{name}" for name in TASK_NAMES),
        *(question.key for question in QUESTIONS if question.key != "halves"),  # attention was not cut
    ]
    assert {answer.verdict for answer in shown.answers} <= {"yes", "no", "unclear"}
    assert any("6 of them to be measured" in note for note in shown.notes)


def test_what_chooses_and_what_reports_share_no_document(study, data):
    for pair in pairs(adapted(PROTOCOLS["quick"], limit=6), TASK_NAMES, (), None, None):
        first, second = ({one.options for one in items(task)} for task in (pair.validation, pair.test))
        assert first and second and not first & second
        about = [{doc["about"] for doc in task.documents.values()} for task in (pair.validation, pair.test)]
        assert not about[0] & about[1]


def test_a_document_that_stands_in_both_parts_is_not_chosen_on(tmp_path, data):
    rows = [{"q": f"{n if n < 60 else 'the same'} is", "n": n} for n in range(80)]
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "twice.yaml").write_text(
        textwrap.dedent(f"""
        task: twice
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
        test_split: test
        output_type: loglikelihood
        doc_to_text: q
        doc_to_target: " 2"
        metric_list: [{{metric: acc}}]
        """)
    )
    notes: list[str] = []
    (pair,) = pairs(PROTOCOLS["paper"], ["twice"], [tmp_path], None, notes.append)
    asked = [{request.context for request in task.requests} for task in (pair.validation, pair.test)]
    assert "the same is" in asked[1] and not asked[0] & asked[1]
    assert len(notes) == 1 and "documents to choose on are asked on the test part too, and are left out" in notes[0]
    assert pair.part.n_validation == pair.validation.n == len(asked[0])


def test_the_chosen_edit_is_the_best_of_the_validation_part_alone(study):
    folder, _, _ = study
    with Store(folder, readonly=True) as store:
        for trial in study_of(store).trials:
            top = max(point.accuracy for point in trial.points.values())
            assert trial.points[trial.chosen].accuracy == top
            assert trial.validation == 6 and trial.test > 12
            assert len(trial.screened) == trial.grid == 24 and len(trial.points) <= 6


def test_points_and_sheets_are_what_the_harness_itself_says(study, data):
    folder, _, _ = study
    with Store(folder, readonly=True) as store:
        kept = study_of(store)
        (setting,) = store.settings()
        for trial, pair in zip(
            kept.trials, pairs(adapted(PROTOCOLS["quick"], limit=6), TASK_NAMES, (), None, None), strict=True
        ):
            for use in (BASE, CHOSEN, Use("zero")):
                recipe = trial.report.uses[use]
                (result,) = store.results(setting, recipes=[recipe.fingerprint], tasks=[trial.name])
                assert trial.mean(use) == pytest.approx(result.metrics["acc,none"])
                assert trial.mean(use, "loss") == pytest.approx(result.metrics["log_loss,none"])
                if trial.classes:
                    assert trial.mean(use, "balanced") == pytest.approx(result.metrics["balanced_acc,none"])
                    shares = [result.metrics[f"predicted_{label},none"] for label in trial.labels]
                    assert trial.predictions(use) == pytest.approx(shares)
                else:
                    assert trial.top(use, 5) == pytest.approx(result.metrics["top5,none"])
            found = store.results(setting, tasks=[pair.validation.name])
            point = trial.points[trial.chosen]
            recipe = Recipe("", Schedule.identity(4), (trial.chosen,))
            (mine,) = [one for one in found if one.recipe == recipe.fingerprint]
            assert point.accuracy == pytest.approx(mine.metrics["acc,none"])
            assert point.loss == pytest.approx(mine.metrics["log_loss,none"])


def test_a_finished_study_is_a_page_again_without_running_anything(study, loaded, data, monkeypatch):
    import impasto.scoring as scoring
    import impasto.screening as screening

    folder, shown, _ = study
    monkeypatch.setattr(scoring, "call_layer", lambda *_: pytest.fail("a layer was run again"))
    monkeypatch.setattr(screening, "call_layer", lambda *_: pytest.fail("a layer was run again"))
    with Store(folder) as store:
        again = run_laser(loaded, store=store, **ASKED)
    assert again.answers == shown.answers
    assert page_of(folder).answers == any_page_of(folder).answers == shown.answers


def test_a_page_is_made_without_torch(study):
    folder, shown, _ = study
    program = f"""
        import sys
        from impasto.studies.pages import page_of
        page = page_of({str(folder)!r})
        assert not {{"torch", "transformers", "lm_eval", "datasets"}} & set(sys.modules)
        print(len(page.answers))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.stdout.strip() == str(len(shown.answers)), done.stderr


def test_the_page_can_be_drawn(study, tmp_path):
    _, shown, _ = study
    drawn = {figure.key for figure in shown.figures}
    assert drawn >= {"gains", "levels", "classes", "losses", "foretold-laser_fever", "much", "moved", "effective"}
    kinds = {figure.kind: figure for figure in shown.figures}
    few = replace(shown, figures=tuple(kinds.values()))
    assert report.write(few, tmp_path).read_text().startswith("<!doctype html>")
    assert all((tmp_path / "figures" / f"{figure.key}.csv").exists() for figure in few.figures)


@pytest.mark.parametrize("stopped", ["_screened", "_composed", "_reported"])
def test_an_interrupted_study_goes_on_and_shows_what_is_there(loaded, data, study, tmp_path, monkeypatch, stopped):
    import impasto.studies.laser.run as run

    _, shown, _ = study

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, stopped, stop)
        with Store(tmp_path) as store, pytest.raises(KeyboardInterrupt):
            run_laser(loaded, store=store, **ASKED)
    early = page_of(tmp_path)
    assert len(early.answers) == len(shown.answers)
    assert early.notes[0] == "The study is not complete: nothing is reported yet on FEVER and CounterFact."
    with Store(tmp_path) as store:
        assert run_laser(loaded, store=store, **ASKED).answers == shown.answers


def test_a_dry_run_counts_and_keeps_nothing(loaded, data, tmp_path):
    with Store(tmp_path) as store:
        plan = dry_run_laser(loaded, store=store, **ASKED)
        assert store.recipes() == {}
    assert (plan.matrices, plan.candidates, plan.measured) == (12, 24, 6)
    assert plan.scoring.shared_calls < plan.scoring.layer_calls
    assert plan.scoring.seconds > 0
    assert [name for name, _ in plan.scoring.rows][:2] == ["laser_fever_validation", "laser_fever"]


def test_other_choices_are_other_studies_of_one_folder(loaded, data, study, tmp_path):
    more = {**ASKED, "task_names": ["impasto_tiny_choice"], "layers": "1:4", "types": ["*.down_proj"], "screen": 0}
    with Store(tmp_path) as store:
        run_laser(loaded, store=store, **{**ASKED, "task_names": ["laser_fever"]}, compose="none")
        shown = run_laser(loaded, store=store, **more, select="full", compose="authors")
        kept = study_of(store)
    (trial,) = kept.trials
    assert [one.layer for one in kept.matrices] == [1, 2, 3]
    assert len(trial.points) == trial.grid == 6 and not trial.screened and trial.raced is None
    assert [(step.layer, step.accepted, step.tried) for step in trial.trace] == [(2, True, 5), (1, True, 5)]
    ends = trial.report.uses[Use("composed", "2")].edits
    assert list(map(str, ends)) == ["1.mlp.down_proj@0.02", "2.mlp.down_proj@0.02"]
    assert page_of(tmp_path).answers == shown.answers


def test_a_folder_without_a_study_is_said_to_have_none(tmp_path):
    with Store(tmp_path) as store:
        store.put_recipes([Recipe("tiny", Schedule.identity(4))])
        assert not is_laser(store)
    with pytest.raises(StoreError, match="holds results, but not of a study that was begun with `impasto study laser`"):
        page_of(tmp_path)
    with pytest.raises(StoreError, match="holds results, but not of a study"):
        any_page_of(tmp_path)


@pytest.fixture
def no_hub(monkeypatch):
    from impasto.benchmarks.laser import data

    def nothing(source):
        raise OSError("no hub")

    monkeypatch.setattr(data, "_from_hub", nothing)


def test_what_cannot_be_is_said(loaded, data, no_hub, tmp_path):
    with Store(tmp_path) as store:
        with pytest.raises(UsageError, match=r"^no protocol 'fast'; there are quick, standard, paper$"):
            run_laser(loaded, store=store, protocol="fast")
        with pytest.raises(TypeError, match="limits"):
            run_laser(loaded, store=store, limits=3)
        with pytest.raises(UsageError, match=r"^rho 1.5 is not a number from 0 to 1: it is the share"):
            run_laser(loaded, store=store, **{**ASKED, "rhos": [1.5]})
        with pytest.raises(UsageError, match=r"nearest: mlp\.down_proj"):
            run_laser(loaded, store=store, **ASKED, types=["mlp.down"])
        with pytest.raises(UsageError, match=r"^laser_fever_validation is a part to choose on: name laser_fever"):
            run_laser(loaded, store=store, **{**ASKED, "task_names": ["laser_fever_validation"]})
        with pytest.raises(UsageError, match=r"^layers '9': layer 9 does not exist: this model has layers 0\.\.3"):
            run_laser(loaded, store=store, **ASKED, layers="9")
        with pytest.raises(UsageError, match="^a share of 1 changes nothing"):
            run_laser(loaded, store=store, **{**ASKED, "rhos": [1]})
        with pytest.raises(UsageError, match="needs at least two"):
            run_laser(loaded, store=store, **ASKED, layers="1", compose="authors")
        with pytest.raises(FetchError, match="the data of truthfulqa is not here"):
            run_laser(loaded, store=store, **{**ASKED, "task_names": ["laser_truthfulqa"]})
        assert store.recipes() == {}


def test_tasks_without_data_give_way_to_those_that_have_some(data, no_hub, monkeypatch):
    from impasto.studies.laser import parts

    notes: list[str] = []
    wanted = replace(PROTOCOLS["quick"], tasks=("laser_fever", "laser_truthfulqa"))
    assert [pair.name for pair in pairs(wanted, None, (), None, notes.append)] == ["laser_fever"]
    assert notes[-1] == "no data here for laser_truthfulqa (a folder in IMPASTO_DATA, or the hub, has them)"
    monkeypatch.setattr(parts, "ELSEWHERE", ("impasto_tiny_choice",))
    nothing = replace(wanted, tasks=("laser_truthfulqa",))
    assert [pair.name for pair in pairs(nothing, None, (), None, notes.append)] == ["impasto_tiny_choice"]
    assert notes[-1].endswith("has them); asking impasto_tiny_choice instead")


def test_the_command_line_refuses_before_it_loads(data):
    runner = CliRunner()
    done = runner.invoke(cli.app, ["study", "laser", "--rhos", "2"])
    assert isinstance(done.exception, UsageError)
    assert "laser" in runner.invoke(cli.app, ["study", "--help"]).output


def test_right_answers_are_what_screening_is_made_of(data):
    for pair in pairs(adapted(PROTOCOLS["quick"], limit=6), [*TASK_NAMES, "impasto_tiny_choice"], (), None, None):
        found = rights(pair.validation)
        assert len(found) == pair.validation.n
        if pair.part.labels:
            assert {one.continuation.strip() for one in found} <= set(pair.part.labels)
        golds = pair.validation.golds()
        if golds is not None:
            assert tuple(one.right for one in items(pair.validation)) == golds


# ── matrices and candidates ──────────────────────────────────────────────────────────────────────────────────


def test_matrices_are_found_by_the_half_they_are_in(loaded):
    layers = range(4)
    halves = {kind: matrices(loaded, [kind], layers) for kind in ("mlp", "attention", "all")}
    assert {one.name for one in halves["mlp"]} == {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert {one.half for one in halves["attention"]} == {"attention"}
    assert set(halves["all"]) == {*halves["mlp"], *halves["attention"]}
    assert matrices(loaded, ["mlp", "*.q_proj"], [2])[-1] == Matrix(2, "self_attn.q_proj", "attention", 32, 32)
    assert [one.full for one in matrices(loaded, ["mlp.up_proj"], layers)] == [32] * 4


def test_stacked_experts_and_fused_projections_are_named_as_edits_name_them():
    from families import shared

    experts = models.adopt(shared("qwen3_moe"), tiny_tokenizer(), name="experts")
    names = [one.name for one in matrices(experts, ["mlp"], [1])]
    assert len(names) == len(set(names)) < 8
    fused = models.adopt(shared("phi3"), tiny_tokenizer(), name="fused")
    (one,) = matrices(fused, ["*.qkv_proj.q"], [0])
    assert (one.name, one.half) == ("self_attn.qkv_proj.q", "attention")


MATRICES = tuple(Matrix(layer, name, "mlp", 8, 32) for layer in range(6) for name in ("up", "down"))


def test_the_grid_is_every_matrix_at_every_share():
    found = candidates(MATRICES, (Decimal("0.5"), Decimal(0), Decimal(1)))
    assert len(found) == 24
    assert str(found[0]) == "0.up@0.5" and str(found[1]) == "0.up@0"
    assert [rho_of(one) for one in found[:2]] == [0.5, 0.0]


@given(st.lists(st.floats(-1, 1), min_size=24, max_size=24), st.integers(1, 30))
def test_screening_lets_the_lowest_through_and_spares_no_matrix_too_much(changes, count):
    grid = candidates(MATRICES, tuple(map(Decimal, ("0.5", "0.1"))))
    found = promising(dict(zip(grid, changes, strict=True)), count)
    assert len(found) == len(set(found)) == min(count, 24)
    assert changes[grid.index(found[0])] == min(changes)
    if count < 12:
        taken = [(one.layers, one.matrix) for one in found]
        assert max(map(taken.count, taken)) <= EACH


@given(st.integers(1, 40), st.integers(1, 50))
def test_spaced_edits_keep_both_ends(length, count):
    edits = tuple(edit(i, "m", Decimal("0.1")) for i in range(length))
    found = spaced(edits, count)
    assert len(found) == len(set(found)) == min(length, count)
    assert found[0] == edits[0] and (count == 1 or found[-1] == edits[-1])


def test_shares_and_layers_are_read_or_refused():
    assert share(" 0.10 ") == Decimal("0.1") and share(0) == 0 and share(1) == 1
    for bad in ("-0.1", "1.1", "nan", "x", "inf"):
        with pytest.raises(UsageError, match="is not a number from 0 to 1"):
            share(bad)
    with pytest.raises(UsageError, match="at most 12 digits"):
        share("0.1234567890123")
    assert layers_of("", 3) == (0, 1, 2) and layers_of("-1", 3) == (2,) and layers_of("0,1:3", 4) == (0, 1, 2)
    with pytest.raises(UsageError, match="^layers 'x': "):
        layers_of("x", 3)


def test_protocols_are_adapted_by_what_is_asked():
    found = adapted(PROTOCOLS["quick"], limit=9, screen=0, rhos=["0", 0.5], select="full", compose="none", tasks=["a"])
    assert (found.validation_of("laser_fever"), found.screen, found.rhos) == (9, None, (Decimal("0.5"), Decimal(0)))
    assert found.sweep == (Decimal("0.5"),) and found.tasks == ("a",)
    assert adapted(PROTOCOLS["paper"]) == PROTOCOLS["paper"]
    for change, text in (({"select": "rice"}, "did you mean 'race'"), ({"compose": "x"}, "there are greedy, authors")):
        with pytest.raises(UsageError, match=text):
            adapted(PROTOCOLS["quick"], **change)


def test_the_paper_s_protocol_is_the_paper_s_grid():
    full = PROTOCOLS["paper"]
    assert [float(rho) for rho in full.rhos] == [0.9, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.01]
    assert full.screen is None and full.select == "full" and full.validation is None and full.types == ("mlp",)
    assert {benchmark_of(name) for name in TASKS} == set(paper._TABLE)
    assert not any(name.startswith("laser") for name in ELSEWHERE)


# ── what is asked of a chosen edit ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("depth", [3, 4, 12])
def test_schedules_around_a_layer_are_of_this_model_and_never_lose_it(depth):
    for layer in range(depth):
        found = schedules(depth, layer, tuple(SCHEDULES))
        assert set(found) == set(SCHEDULES)
        for name, schedule in found.items():
            schedule.check(depth)
            assert layer in schedule.layers_used, name
            assert schedule != Schedule.identity(depth)
        assert found["skip"].calls == depth - 1 and found["twice"].calls == depth + 1
        assert 0 in found["skip"].layers_used
    assert schedules(2, 0, tuple(SCHEDULES)) == {}


def test_uses_are_all_of_the_chosen_matrix():
    chosen, other = edit(3, "up", Decimal("0.1")), edit(2, "down", Decimal("0.5"))
    plan = Report(6, chosen, other, ((chosen,), (chosen, other)), PROTOCOLS["standard"])
    assert str(plan.uses[Use("pruned", "0.1")].edits[0]) == "3.up@prune0.9"
    assert plan.uses[Use("kept", "0.1")] == plan.uses[CHOSEN]
    assert plan.uses[BASE].edits == () and plan.uses[Use("by_loss")].edits == (other,)
    assert len(plan.uses[Use("composed", "2")].edits) == 2
    moved = plan.uses[Use("moved", "swap")]
    assert moved.edits == (chosen,) and moved.schedule == plan.uses[Use("moved", "swap", edited=False)].schedule


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40))
def test_the_weighed_answers_have_the_balanced_accuracy_as_their_mean(pairs_):
    golds, predicted = zip(*pairs_, strict=True)
    right = np.array(predicted) == np.array(golds)
    assert balanced(right, golds).mean() == pytest.approx(balanced_accuracy(pairs_))


@given(st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 5)), min_size=1, max_size=40))
def test_units_keep_the_mean(pairs_):
    values, units = np.array([v for v, _ in pairs_]), tuple(u for _, u in pairs_)
    assert grouped(values, units).mean() == pytest.approx(values.mean(), abs=1e-12)
    assert len(grouped(values, units)) == len(set(units))


def test_documents_about_one_thing_are_one_unit():
    values = np.repeat(np.random.default_rng(0).normal(size=50), 4)
    units = tuple(np.repeat(np.arange(50), 4).tolist())
    together = made(values, units=units)
    apart = made(values, units=tuple(range(200)))
    assert width(together.contrast(values)) == pytest.approx(2 * width(apart.contrast(values)), rel=0.1)


def test_no_difference_at_all_is_not_certain_to_be_none():
    assert made(np.zeros(60)).contrast(np.zeros(60)) == Estimate(0.0, -0.05, 0.05)


def test_pooled_intervals_are_those_of_a_mean_of_independent_numbers():
    assert pooled([Estimate(0.1, 0.0, 0.3)]) == Estimate(0.1, 0.0, pytest.approx(0.3))
    four = pooled([Estimate(0.2, 0.1, 0.4)] * 4)
    assert (four.value, four.low, four.high) == pytest.approx((0.2, 0.15, 0.3))
    assert pooled([]) is None and pooled([Estimate(1.0), Estimate(2.0, 1.0, 3.0)]) == Estimate(1.5)
    gap = findings.minus(Estimate(0.5, 0.4, 0.7), Estimate(0.3, 0.2, 0.6))
    assert (gap.low, gap.high) == pytest.approx((0.2 - np.hypot(0.1, 0.3), 0.2 + np.hypot(0.2, 0.1)))


def width(estimate):
    return estimate.high - estimate.low


def test_the_best_candidate_has_the_highest_accuracy_then_the_lower_loss():
    first, second, third = (edit(i, "m", Decimal("0.1")) for i in range(3))
    assert best({first: Point(0.5, 1.0), second: Point(0.6, 3.0), third: Point(0.6, 2.0)}) == third
    assert best({first: Point(0.5), second: Point(float("nan"), 0.1)}) == first
    with pytest.raises(Exception, match="no candidate has finite scores"):
        best({first: Point(float("nan"))})


# ── verdicts follow a known truth ────────────────────────────────────────────────────────────────────────────

CUT = edit(3, "up", Decimal("0.1"))


def made(scores, *, units=(), golds=(), labels=(), **more):
    """A trial whose base answered nothing right."""
    n = len(scores)
    return Trial(
        name="laser_fever",
        metric="acc,none",
        chance=0.5,
        majority=0.6,
        labels=labels,
        golds=golds,
        groups=golds,
        commonest=labels[0] if labels else "",
        units=units or tuple(range(n)),
        validation=50,
        test=n,
        grid=16,
        chosen=CUT,
        **more,
    )


def world(base, chosen, *, n=250, shift=0.0, kept=None, moved=None, seed=0):
    """A trial in which a recipe is right on a document if the document's difficulty is below its accuracy.

    With `shift` the chosen edit says the first class to so many more documents, right or wrong.
    """
    rng = np.random.default_rng(seed)
    difficulty, golds = rng.random(n), rng.integers(2, size=n)
    golds[: n // 10] = 0  # the first class is more frequent
    report_ = Report(6, CUT, None, ((CUT, edit(1, "down", Decimal("0.5"))),), PROTOCOLS["standard"])
    level = dict.fromkeys(report_.uses, chosen)
    level |= {use: base for use in report_.uses if not use.edited or use.role == "zero"}
    level |= {use: (kept or {}).get(use.parameter, chosen) for use in report_.uses if use.role == "kept"}
    level |= {use: moved if use.edited else base for use in report_.uses if use.role == "moved" and moved is not None}
    sheets = {}
    for use, recipe in report_.uses.items():
        right = difficulty < level[use]
        predicted = np.where(right, golds, 1 - golds)
        if recipe == report_.uses[CHOSEN]:
            predicted = np.where(rng.random(n) < shift, 0, predicted)
        sheets[recipe.fingerprint] = Sheet(
            tuple((predicted == golds).astype(float).tolist()),
            tuple((1.5 - right).tolist()),
            tuple(predicted.tolist()),
        )
    points = {CUT: Point(chosen + 0.1, 1.0), edit(1, "up", Decimal("0.1")): Point(base, 1.2)}
    return replace(
        made(
            difficulty,
            golds=tuple(golds.tolist()),
            labels=("false", "true"),
            points=points,
            base=Point(base, 1.1),
            selected=Estimate(chosen - base + 0.1, chosen - base + 0.05, chosen - base + 0.15),
            trace=(Step(3, "up", CUT, 2, base, chosen, True), Step(1, "down", CUT, 2, chosen, chosen, False)),
        ),
        report=report_,
        sheets=sheets,
    )


def asked_of(*trials):
    found = Evidence(6, PROTOCOLS["standard"], MATRICES, trials, {"model": "synthetic"})
    return found, {answer.key: answer for answer in answers(found, ())}


def test_a_model_that_gains_as_in_the_paper():
    found, told = asked_of(world(0.55, 0.75))
    assert told["gain-laser_fever"].verdict == "yes"
    assert "moves it from" in told["gain-laser_fever"].effect and "GPT-J 50.2" in told["gain-laser_fever"].paper
    for key in ("constant", "loss", "strong", "zero", "flattered", "nested"):
        assert told[key].verdict == "yes", key
    assert told["pruning"].verdict == "yes" and told["moved"].verdict == "yes"
    assert told["composed"].verdict != "yes"
    assert {figure.key for figure in page(found).figures} >= {"gains", "much", "composition", "composing"}


@pytest.mark.parametrize(("accepted", "said"), [(7, " the others: FEVER at 2 edits."), (6, None)])
def test_states_of_a_composition_that_were_not_measured_are_named(accepted, said):
    edits = [edit(i, "up", Decimal("0.1")) for i in range(accepted)]
    states = [tuple(edits[: i + 1]) for i in range(accepted)]
    report_ = Report(accepted, CUT, None, composed_of(states), PROTOCOLS["standard"])
    steps = tuple(Step(i, "up", one, 2, 0.1 * i, 0.1 * i, True) for i, one in enumerate(edits))
    figure = figures.composition(asked_of(replace(world(0.5, 0.6), report=report_, trace=steps))[0])
    assert (said in figure.caption) if said else ("straight past" not in figure.caption)


def test_the_tables_compare_with_the_model_itself_in_every_measure():
    trial = replace(world(0.5, 0.6), base=Point(0.5, 1.1, 0.48, 0.75))
    tables = dict(page(asked_of(trial)[0]).tables)
    first = tables["Best candidates: FEVER"][0]
    assert first == {
        "edit": "the model itself",
        "chosen": None,
        "accuracy": 0.5,
        "loss": 1.1,
        "balanced accuracy": 0.48,
        "most given answer": 0.75,
    }
    assert [row["chosen"] for row in tables["Best candidates: FEVER"]] == [None, True, False]
    free = dict(page(asked_of(replace(trial, labels=()))[0]).tables)["Best candidates: FEVER"]
    assert not any("balanced accuracy" in row for row in free)
    assert list(tables["Tasks"][0])[:5] == ["task", "the model itself", "chosen edit", "with it", "difference"]


def test_facts_in_several_wordings_are_right_in_all_of_them_or_not():
    trial = replace(world(0.4, 0.8, n=240), name="laser_counterfact", units=tuple(i // 3 for i in range(240)))
    _, told = asked_of(trial)
    assert told["robust"].verdict == "yes"
    assert "of 80 facts in 3 wordings; of the" in told["robust"].effect
    assert "robust" not in asked_of(world(0.4, 0.8))[1]


def test_a_gain_by_one_constant_answer_is_none_and_is_warned_of():
    trial = world(0.5, 0.5, shift=1.0)
    _, told = asked_of(trial)
    assert told["gain-laser_fever"].verdict == "no"
    assert "one answer to nine tenths" in told["gain-laser_fever"].effect
    warning = findings.constant(trial)
    assert warning.startswith("FEVER: with 3.up@0.1 the model answers next to nothing but \u201cfalse\u201d: 100.0 %")
    assert "balanced accuracy is 50.0 %" in warning and "Always giving the most frequent one gets 60.0 %." in warning
    assert warning in page(asked_of(trial)[0]).notes
    assert findings.constant(world(0.5, 0.7)) is None


def test_a_gain_on_the_most_frequent_answer_alone_is_warned_of():
    groups = tuple([0] * 60 + list(range(1, 61)))
    report_ = Report(6, CUT, None, (), PROTOCOLS["quick"])
    right = {BASE: [0.0] * 120, CHOSEN: [1.0] * 60 + [0.0] * 60}
    trial = replace(
        made(np.zeros(120)),
        name="laser_wikidataqa_likelihood",
        groups=groups,
        commonest="english",
        report=report_,
        sheets={report_.uses[use].fingerprint: Sheet(tuple(scores)) for use, scores in right.items()},
    )
    assert trial.mean(CHOSEN) == 0.5 and trial.mean(CHOSEN, "balanced") == pytest.approx(1 / 61)
    assert findings.constant(trial).startswith(
        "WikidataQA: of the 60 documents that only 3.up@0.1 gets right, 60 have the most frequent right answer, "
        "\u201cenglish\u201d."
    )
    several = replace(trial, groups=tuple(i // 4 for i in range(120)))
    assert findings.constant(several) is None and findings.gain(several).verdict == "yes"


def test_harm_is_a_clear_no():
    _, told = asked_of(world(0.8, 0.5))
    assert {key: told[key].verdict for key in ("gain-laser_fever", "constant", "loss", "strong")} == {
        "gain-laser_fever": "no",
        "constant": "no",
        "loss": "no",
        "strong": "no",
    }


def test_an_edit_that_loses_its_effect_where_it_is_moved():
    _, told = asked_of(world(0.5, 0.7, moved=0.5))
    assert told["moved"].verdict == "no"
    assert told["moved"].estimate.value == pytest.approx(-0.2, abs=0.05)


def test_questions_of_the_grid_need_cuts_on_both_sides():
    base = world(0.5, 0.6)
    spread = {
        edit(i, "up", rho): Point(0.5 if i > 2 else 0.2 + 0.01 * i, 1.0 + 0.1 * (6 - i))
        for i in range(6)
        for rho in PROTOCOLS["paper"].rhos
    }
    trial = replace(base, points=spread, screened={one: 0.1 * (6 - one.layers[0]) for one in spread})
    _, told = asked_of(trial)
    assert told["late"].verdict == "yes" and told["screening"].verdict == "yes"
    assert "halves" not in told
    sides = tuple(replace(one, half="mlp" if one.name == "up" else "attention") for one in MATRICES)
    both = spread | {edit(i, "down", rho_): Point(0.5) for i in range(6) for rho_ in PROTOCOLS["paper"].rhos}
    base_level = replace(trial, points=both, base=Point(0.5, 1.1))
    found = Evidence(6, PROTOCOLS["standard"], sides, (base_level,))
    assert {answer.key: answer.verdict for answer in answers(found, ())}["halves"] == "yes"
    assert asked_of(base)[1]["late"].effect.startswith("Not measured")


def test_an_empty_study_is_a_page_that_says_so():
    bare = replace(made(np.zeros(4)), chosen=None)
    found, told = asked_of(bare)
    assert {answer.verdict for answer in told.values()} == {"unclear"}
    shown = page(found)
    assert shown.notes[0] == "The study is not complete: nothing is reported yet on FEVER."
    assert report.render(shown)


def test_every_question_has_what_the_paper_found_and_a_figure():
    assert {question.key for question in QUESTIONS} == set(paper.FOUND)
    assert paper.found("fever").startswith("RoBERTa 50.0 \u2192 52.3 % (U_in, layer 3, 0.4)")
    assert paper.found("") == "Not asked: the paper has other benchmarks."
    falls = sum(cell[3] < cell[2] for cells in paper._TABLE.values() for cell in cells)
    assert f"falls in {falls} of its 24 results" in paper.FOUND["loss"]


def test_tasks_have_the_paper_s_names():
    assert title_of("laser_wikidataqa_likelihood") == "WikidataQA"
    assert title_of("winogrande") == "WinoGrande" and title_of("my_task") == "my task"
    assert benchmark_of("laser_bios_gender_masked") == "bios_gender" and benchmark_of("winogrande") == ""


def test_what_was_asked_comes_back_from_json():
    part = Part("a", "p", "q", 3, 4, "acc,none", 0.5, None, ("x", "y"), (0, 1), (0, 1), "x", (0, 1, 2, 3), (0, 1, 2))
    asked = Asked(6, adapted(PROTOCOLS["quick"], rhos=["0.3"]), MATRICES, 12, (part,), 1, "here")
    again = Asked.read(json.loads(json.dumps(asked.to_json())))
    assert again == asked and again.mark == asked.mark
    assert replace(asked, source="there").mark == asked.mark
    assert replace(asked, seed=2).mark != asked.mark
    assert Edit.parse(str(CUT)) == CUT

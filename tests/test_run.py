"""A whole painters study on a tiny model: measured, kept, continued, and a page again from its folder alone."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap

import pytest

import families
from impasto import models, report
from impasto.errors import StoreError, UnsupportedModel, UsageError
from impasto.recipe import Recipe
from impasto.schedule import Schedule
from impasto.store import Store
from impasto.studies.run import dry_run_painters, page_of, run_painters
from tiny import masking_tokenizer, tiny_model, tiny_tokenizer

ASKED = {"task_names": ["impasto_tiny_choice", "impasto_tiny_lastword"], "limit": 8, "seeds": 2}
METHODS = ["skip_one", "swap", "skip", "reverse", "parallel", "looped_parallel", "random_order", "middle_repeat"]


@pytest.fixture(scope="module")
def loaded():
    return models.adopt(tiny_model(layers=6), tiny_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def study(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    phases: list[str] = []
    with Store(folder) as store:
        page = run_painters(
            loaded, store=store, methods=METHODS, progress=lambda phase, share: phases.append(phase), **ASKED
        )
    return folder, page, list(dict.fromkeys(phases))


def test_every_phase_is_told_and_every_question_answered(study):
    _, page, phases = study
    assert phases == ["reading tasks", "scoring", "judging", "comparing hidden states", "comparing KV caches"]
    assert len(page.answers) >= 15
    assert {answer.verdict for answer in page.answers} <= {"yes", "no", "unclear"}
    assert page.facts["model"] == "tiny"


def test_a_finished_study_is_a_page_again_without_running_anything(study, loaded, monkeypatch):
    import impasto.scoring as scoring

    folder, page, _ = study
    monkeypatch.setattr(scoring, "call_layer", lambda *_: pytest.fail("a layer was run again"))
    with Store(folder) as store:
        again = run_painters(loaded, store=store, methods=METHODS, **ASKED)
    assert again.answers == page.answers
    assert page_of(folder).answers == page.answers


def test_the_run_is_noted_before_the_page_that_tells_its_time_is_made(loaded, tmp_path):
    @contextlib.contextmanager
    def noted(store):
        run = store.start_run(["impasto", "study", "painters", "/data/tiny"], versions={})
        yield
        store.finish_run(run, seconds=240.0)

    with Store(tmp_path) as store:
        page = run_painters(loaded, store=store, methods=["skip_one"], noted=noted(store), **ASKED)
    assert page.facts["computing time"] == "4.0 minutes in 1 run"
    assert page.facts["command"] == "impasto study painters tiny"
    assert page_of(tmp_path).facts == page.facts


def test_a_page_is_made_without_torch(study):
    folder, page, _ = study
    program = f"""
        import sys
        from impasto.studies.run import page_of
        page = page_of({str(folder)!r})
        assert "torch" not in sys.modules
        print(len(page.answers))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.stdout.strip() == str(len(page.answers)), done.stderr


def test_the_page_can_be_drawn(study, tmp_path):
    _, page, _ = study
    assert report.write(page, tmp_path).read_text().startswith("<!doctype html>")


def test_the_averaged_cache_is_compared(study):
    folder, _, _ = study
    with Store(folder, readonly=True) as store:
        (setting,) = store.settings()
        kept = {m.key: m.value for m in store.measurements(setting, "kv")}
    assert set(kept) == {"parallel", "looped_parallel"}
    assert all(all(value["exact"]) for value in kept.values())  # float32: exact caches write what no cache writes


def test_an_interrupted_study_goes_on_and_shows_what_is_there(loaded, study, tmp_path, monkeypatch):
    import impasto.studies.run as run

    _, page, _ = study

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "_compare_states", stop)
        with Store(tmp_path) as store, pytest.raises(KeyboardInterrupt):
            run_painters(loaded, store=store, methods=METHODS, **ASKED)
    assert len(page_of(tmp_path).answers) == len(page.answers)
    with Store(tmp_path) as store:
        assert run_painters(loaded, store=store, methods=METHODS, **ASKED).answers == page.answers


@pytest.mark.parametrize("headless", [False, True])
def test_models_that_predict_no_next_tokens_are_refused_before_anything_is_kept(tmp_path, headless):
    model = families.build("bert", vocab_size=len(masking_tokenizer()))
    loaded = models.adopt(model.bert if headless else model, masking_tokenizer(), name="tiny")
    text = (
        "has no head that predicts tokens" if headless else "^tiny does not predict next tokens, and the painters study"
    )
    with Store(tmp_path) as store:
        for run in (run_painters, dry_run_painters):
            with pytest.raises(UnsupportedModel, match=text):
                run(loaded, store=store, **ASKED)
        assert store.settings() == []
    with pytest.raises(StoreError):
        page_of(tmp_path)


def test_a_dry_run_counts_and_keeps_nothing(loaded, study, tmp_path):
    folder, _, _ = study
    with Store(tmp_path) as store:
        plan = dry_run_painters(loaded, store=store, methods=METHODS, **ASKED)
        assert store.recipes() == {}
    assert plan.shared_calls < plan.layer_calls
    assert plan.seconds > 0 and plan.bytes > 0
    assert plan.rows == (("impasto_tiny_choice", 8), ("impasto_tiny_lastword", 8))
    with Store(folder) as store:
        assert dry_run_painters(loaded, store=store, methods=METHODS, **ASKED).tokens == 0


def test_what_cannot_be_is_said(loaded, tmp_path):
    with Store(tmp_path) as store:
        with pytest.raises(UsageError, match=r"^no protocol 'fast'; there are quick, standard, paper$"):
            run_painters(loaded, store=store, protocol="fast")
        with pytest.raises(UsageError, match="no method 'revers'; did you mean 'reverse'"):
            run_painters(loaded, store=store, methods=["revers"], **ASKED)
        store.put_recipes([Recipe("tiny", Schedule.identity(6))])
    with pytest.raises(StoreError, match="holds results, but not of a study"):
        page_of(tmp_path)

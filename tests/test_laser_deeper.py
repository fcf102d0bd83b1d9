"""What a LASER study says beside accuracy: facts by how often they are read, discarded components, plain text."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from impasto import cli, corpus, models, plots
from impasto.errors import UsageError
from impasto.evaluate import scorer_of
from impasto.perplexity import METRIC, perplexity
from impasto.recipe import Recipe
from impasto.schedule import Schedule
from impasto.store import Store
from impasto.studies.laser import deeper
from impasto.studies.laser.asides import counted, mentions, text_tasks
from impasto.studies.laser.claims import answers
from impasto.studies.laser.evidence import (
    BASE,
    CHOSEN,
    Evidence,
    Mentions,
    Sheet,
    Spoken,
    Tail,
    Text,
    Trial,
)
from impasto.studies.laser.kept import study_of
from impasto.studies.laser.page import page
from impasto.studies.laser.parts import items, pairs
from impasto.studies.laser.protocol import PROTOCOLS, Matrix, Report, adapted, edit
from impasto.studies.laser.run import page_of, run_laser
from tiny import facts, laser_data, tiny_model, tiny_tokenizer, write_rows

ASKED = {"task_names": ["laser_counterfact"], "limit": 6, "rhos": ["0.3"], "screen": 3, "compose": "none"}
COLOURS = ("red", "blue", "green")


@pytest.fixture(scope="module")
def loaded():
    return models.adopt(tiny_model(layers=4), tiny_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Facts of two relations, how often each is mentioned, and a text."""
    folder = tmp_path_factory.mktemp("data")
    counts = [{"subject": f"Thing {i}", "answer": COLOURS[i % 3], "documents": i * i} for i in range(39)]
    write_rows(folder / "counts.jsonl", counts)
    (folder / "story.txt").write_text("The sun is in the sky. The sky is not the sun. " * 12)
    with laser_data(folder, counterfact=facts(COLOURS, ("kind 0", "kind 1"))):
        yield folder


@pytest.fixture(scope="module")
def study(loaded, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    with Store(folder) as store:
        shown = run_laser(loaded, store=store, counts=[data / "counts.jsonl"], texts=[data / "story.txt"], **ASKED)
    return folder, shown


@pytest.fixture
def evidence(study):
    with Store(study[0], readonly=True) as store:
        return study_of(store)


# ── a whole study ────────────────────────────────────────────────────────────────────────────────────────────


def test_all_three_are_asked_and_drawn(study):
    _, shown = study
    told = {answer.key: answer for answer in shown.answers}
    for key in ("rare", "discarded", "reads"):
        assert not told[key].effect.startswith("Not measured"), told[key].effect
    drawn = {figure.key: figure for figure in shown.figures}
    for key in ("frequency", "tails", "texts"):
        assert plots.draw(drawn[key]), key
    assert "boosts" not in drawn  # too few facts in each range
    assert told["reads"].figure == "texts" and told["rare"].figure is None and told["discarded"].figure == "tails"


def test_each_document_has_its_own_fact_s_count(evidence, data):
    [trial] = evidence.trials
    [found] = trial.mentions
    [pair] = pairs(adapted(PROTOCOLS["quick"], limit=6), ["laser_counterfact"], (), None, None)
    for document, count in zip(pair.test.documents.values(), found.counts, strict=True):
        number = int(document["about"].split()[1])
        assert count == (None if number == 39 else number * number)
    assert (found.name, found.corpus) == ("counts", "")


def test_perplexities_are_those_of_the_texts_alone(evidence, loaded, data):
    [trial], [text] = evidence.trials, evidence.texts
    recipes = [trial.report.uses[use] for use in (BASE, CHOSEN)]
    alone = perplexity(loaded, recipes, [(data / "story.txt").read_text()])
    for use, expected in zip((BASE, CHOSEN), alone, strict=True):
        assert deeper.perplexity(trial, text, use) == pytest.approx(expected.metrics[METRIC], rel=1e-6)
        assert text.reads[trial.report.uses[use].fingerprint] == expected.scores[METRIC]
    assert text.tokens == alone[0].info["tokens"]


def test_the_whole_matrix_says_what_the_model_says(evidence, loaded):
    [trial] = evidence.trials
    [pair] = pairs(adapted(PROTOCOLS["quick"], limit=6), ["laser_counterfact"], (), None, None)
    known = {request.fingerprint: request for request in pair.test.requests}
    asked = {known[item.options[0]].context: n for n, item in enumerate(items(pair.test))}
    assert trial.spoken is not None and trial.spoken.tails[-1].share == 1
    expected = []
    for context in asked:
        ids = torch.tensor([loaded.tokenizer(context).input_ids])
        with torch.no_grad():
            expected.append(loaded.tokenizer.decode([int(loaded.model(ids).logits[0, -1].argmax())]))
    assert sorted(trial.spoken.tails[-1].said) == sorted(expected)
    assert len(trial.spoken.relations) == len(asked) and set(trial.spoken.relations) == {"kind 0", "kind 1"}


def test_counts_and_texts_that_come_later_run_nothing_else(study, loaded, data, tmp_path, monkeypatch):
    import impasto.scoring as scoring

    bare = tmp_path / "bare"
    with Store(bare) as store:
        first = run_laser(loaded, store=store, **ASKED)
        told = {answer.key: answer.effect for answer in first.answers}
        assert "(--text FILE)" in told["reads"] and "--frequencies" in told["rare"]
        monkeypatch.setattr(scoring, "call_layer", lambda *_: pytest.fail("a layer was run again"))
        monkeypatch.setattr("impasto.screening.screen", lambda *_, **__: pytest.fail("screened again"))
        monkeypatch.setattr("impasto.studies.laser_tail.tail_answers", lambda *_, **__: pytest.fail("asked again"))
        later = run_laser(loaded, store=store, counts=[data / "counts.jsonl"], **ASKED)
        monkeypatch.undo()
        monkeypatch.setenv("IMPASTO_DATA", str(data))
        again = run_laser(loaded, store=store, texts=[data / "story.txt"], **ASKED)
    [rare] = [answer for answer in later.answers if answer.key == "rare"]
    assert not rare.effect.startswith("Not measured")
    assert again.answers == study[1].answers == page_of(bare).answers


def test_what_cannot_be_read_is_said(data, loaded, tmp_path):
    (tmp_path / "odd.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"odd\.txt is not in UTF-8, so it cannot be read as text"):
        text_tasks(loaded, [tmp_path / "odd.txt"])
    with pytest.raises(UsageError, match="no text in"):
        text_tasks(loaded, [tmp_path / "none.txt"])
    [pair] = pairs(adapted(PROTOCOLS["quick"], limit=6), ["laser_counterfact"], (), None, None)
    with pytest.raises(UsageError, match="holds no counts"):
        counted([data / "story.txt"])
    with pytest.raises(UsageError, match="two counts are both of 'counts' in one number of documents"):
        counted([data / "counts.jsonl", data / "counts.jsonl"])
    with pytest.raises(UsageError, match="two texts are called story"):
        text_tasks(loaded, [data / "story.txt", data / "story.txt"])
    (tmp_path / "other.jsonl").write_text('{"subject": "a", "answer": "b", "documents": 3}\n')
    assert mentions(pair.test, counted([tmp_path / "other.jsonl"])) == ()
    for option in ("--text", "--frequencies"):
        result = CliRunner().invoke(cli.app, ["study", "laser", "demo", option, str(tmp_path / "none")])
        assert result.exit_code != 0 and isinstance(result.exception, UsageError)


def test_a_count_says_its_rule_and_its_corpus(tmp_path, data):
    (tmp_path / "texts.txt").write_text("Thing 1 is blue.\n\nThing 2, a thing, is green.\n")
    asked = [corpus.Pair(f"Thing {i}", COLOURS[i % 3]) for i in range(39)]
    rules = corpus.Rules(match="all_words", ignore_case=True)
    counts = corpus.count(corpus.files([str(tmp_path / "texts.txt")]), asked, rules=rules)
    corpus.write(counts, tmp_path / "counts.json")
    [pair] = pairs(adapted(PROTOCOLS["quick"], limit=6), ["laser_counterfact"], (), None, None)
    [found] = mentions(pair.test, counted([tmp_path / "counts.json"]))
    assert (found.name, found.corpus) == ("all words, any case", "2 documents")


# ── verdicts follow a known truth ────────────────────────────────────────────────────────────────────────────

CUT = edit(3, "up", Decimal("0.1"))


def trial_of(base, chosen, **more) -> Trial:
    """A trial of facts, right or wrong."""
    found = Report(6, CUT, None, (), PROTOCOLS["standard"])
    sheets = {
        found.uses[use].fingerprint: Sheet(tuple(map(float, scores)))
        for use, scores in ((BASE, base), (CHOSEN, chosen))
    }
    n = len(base)
    return Trial(
        name="laser_counterfact",
        metric="acc,none",
        chance=None,
        majority=None,
        labels=(),
        golds=(),
        groups=tuple(i % 5 for i in range(n)),
        commonest="a",
        units=tuple(range(n)),
        validation=50,
        test=n,
        grid=16,
        chosen=CUT,
        report=found,
        sheets=sheets,
        **more,
    )


def told_of(trial: Trial, *texts: Text):
    found = Evidence(6, PROTOCOLS["standard"], (Matrix(3, "up", "mlp", 4, 8),), (trial,), {}, texts)
    assert page(found).figures
    return {answer.key: answer for answer in answers(found, ())}


@pytest.mark.parametrize("gains", ["rare", "frequent", "both"])
def test_facts_that_gain_by_their_frequency(gains):
    often = np.arange(400) * 5
    base = np.zeros(400)
    edited = {"rare": often < 50, "frequent": often > 1000, "both": np.arange(400) % 2 == 0}[gains]
    edited = np.where(np.arange(400) % 7 == 0, 0, edited) if gains != "both" else edited
    often = np.where(often < 500, often % 40, often)  # a hundred facts below 50
    edited = often < 50 if gains == "rare" else edited
    counted = Mentions("phrase", "9 documents", tuple(int(one) for one in often))
    trial = trial_of(base, edited, mentions=(counted,))
    told = told_of(trial)["rare"]
    drawn = deeper.boosts(Evidence(6, PROTOCOLS["standard"], (), (trial,)))
    assert plots.draw(drawn)
    assert {row["label"] for row in drawn.rows} == {"fewer than 50", "50 to 1,000", "more than 1,000"}
    assert told.verdict == {"rare": "yes", "frequent": "no", "both": "unclear"}[gains], told.effect
    assert "fewer than 50" in told.effect and "more than 1,000" in told.effect


def test_a_handful_of_frequent_facts_decides_nothing():
    often = np.where(np.arange(200) < 3, 9, 0)
    counted = Mentions("phrase", "a small corpus", tuple(int(one) for one in often))
    told = told_of(trial_of(np.zeros(200), often == 0, mentions=(counted,)))["rare"]
    assert told.verdict == "unclear" and told.estimate.low is None
    assert "on 3 facts in more than 2" in told.effect and "a larger corpus would" in told.effect


@given(st.lists(st.one_of(st.none(), st.integers(0, 5000)), max_size=60), st.integers(1, 4))
def test_bounds_are_the_paper_s_or_thirds_of_facts(counts, wordings):
    asked = tuple(count for count in counts for _ in range(wordings))
    found = deeper.bounds(Mentions("phrase", "", asked), tuple(i // wordings for i in range(len(asked))))
    known = [count for count in counts if count is not None]
    sides = sum(count < 50 for count in known), sum(count > 1000 for count in known)
    if not known or min(sides) >= deeper.ENOUGH:
        assert found == (50, 1000)
    else:
        low, high = found
        assert 1 <= low < high
        assert sum(count < low for count in known) <= max(len(known) / 3 + 1, known.count(0))
        assert sum(count > high for count in known) <= 2 * len(known) / 3


def spoken_of(said, golds, kinds, share=0.9) -> Spoken:
    tails = tuple(
        Tail(one, tuple(said), tuple(a == b for a, b in zip(said, golds, strict=True)), (0.5,) * len(said))
        for one in (share, 1.0)
    )
    return Spoken(3, "up", 0, tuple(golds), tuple(kinds), tuple(range(len(said))), tails)


def test_discarded_components_of_the_right_kind_are_told_from_others():
    n = 600
    kinds = ["city", "tongue"] * (n // 2)
    golds = [
        ("Rome", "Bonn", "Lima")[i % 3] if kinds[i] == "city" else ("Latin", "Welsh", "Urdu")[i % 3] for i in range(n)
    ]
    other = {"Rome": "Bonn", "Bonn": "Lima", "Lima": "Rome", "Latin": "Welsh", "Welsh": "Urdu", "Urdu": "Latin"}
    trial = trial_of(np.zeros(n), np.ones(n))
    related = replace(trial, spoken=spoken_of([other[gold] for gold in golds], golds, kinds))
    told = told_of(related)["discarded"]
    assert told.verdict == "yes" and "100.0 % are right for another fact" in told.effect
    words = replace(trial, spoken=spoken_of(["the", "of", "a"] * (n // 3), golds, kinds))
    told = told_of(words)["discarded"]
    assert told.verdict == "no" and "100.0 % with a function word" in told.effect
    assert told_of(replace(trial, spoken=spoken_of(golds, golds, [""] * n)))["discarded"].verdict == "unclear"
    elsewhere = replace(trial, spoken=spoken_of(golds, golds, kinds, share=0.5))  # not what this edit throws away
    assert told_of(elsewhere)["discarded"].verdict == "unclear"


@pytest.mark.parametrize(("worse", "verdict"), [(0.0, "yes"), (0.005, "yes"), (0.2, "no"), (-0.2, "yes")])
def test_text_that_is_read_as_well_or_worse(worse, verdict):
    trial = trial_of(np.zeros(30), np.ones(30))
    losses = np.random.default_rng(0).normal(3, 1, 50)
    noise = np.random.default_rng(1).normal(0, 0.01, 50)
    reads = {
        trial.report.uses[BASE].fingerprint: tuple(losses),
        trial.report.uses[CHOSEN].fingerprint: tuple(losses + worse + noise),
    }
    told = told_of(trial, Text("novel", 5000, reads))["reads"]
    assert told.verdict == verdict
    assert f"novel: the model itself {np.exp(losses.mean()):.2f}" in told.effect


def test_a_text_with_a_gap_is_not_judged():
    trial = trial_of(np.zeros(30), np.ones(30))
    reads = {trial.report.uses[use].fingerprint: (3.0, None) for use in (BASE, CHOSEN)}
    assert told_of(trial, Text("novel", 5000, reads))["reads"].verdict == "unclear"


def test_recipes_of_a_text_are_the_plain_schedule(evidence):
    [text] = evidence.texts
    plain = Recipe("", Schedule.identity(4)).fingerprint
    assert plain in text.reads and len(text.reads) == 2


def test_the_edits_of_several_tasks_read_one_text():
    """Two tasks with the same edit say no more about a text than one."""
    trial = trial_of(np.zeros(30), np.ones(30))
    losses, gap = np.random.default_rng(0).normal(3, 1, 50), np.random.default_rng(1).normal(0.05, 0.3, 50)
    reads = {
        trial.report.uses[BASE].fingerprint: tuple(losses),
        trial.report.uses[CHOSEN].fingerprint: tuple(losses + gap),
    }
    text = Text("novel", 5000, reads)
    both = Evidence(6, PROTOCOLS["standard"], (), (trial, replace(trial, name="laser_other")), {}, (text,))
    one = Evidence(6, PROTOCOLS["standard"], (), (trial,), {}, (text,))
    assert deeper.reads(both).estimate == deeper.reads(one).estimate


def test_windows_of_a_text_are_never_read_as_another_request(loaded, data):
    """A worker has no encoder for windows: it must not answer them at all, rather than answer something else."""
    [task] = text_tasks(loaded, [data / "story.txt"])
    with pytest.raises(UsageError, match="a window of a text needs `impasto.perplexity.sliding_scorer`"):
        scorer_of(loaded).score([Recipe.of("tiny", "0:4", layers=4)], list(task.requests))


def test_the_last_study_of_a_folder_is_its_page(loaded, data, tmp_path):
    """Also where it is run as an earlier one was, after a third that was run otherwise."""
    other = replace(loaded, setting=replace(loaded.setting, dtype="float16"))
    with Store(tmp_path) as store:
        for one, rho in ((loaded, "0.3"), (other, "0.3"), (loaded, "0.5")):
            run_laser(one, store=store, **{**ASKED, "rhos": [rho]})
    with Store(tmp_path, readonly=True) as store:
        assert [str(rho) for rho in study_of(store).protocol.rhos] == ["0.5"]

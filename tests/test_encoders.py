"""Encoders from end to end: found by structure, scored with masks by every way in, and a whole LASER study of one."""

from __future__ import annotations

import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import families
from impasto import models, tasks
from impasto.anatomy import anatomy
from impasto.apply import applied
from impasto.cli import main
from impasto.cluster import Reference, Worker, planned
from impasto.dispatch import Ready, Scored, Wrote
from impasto.errors import UnsupportedModel, UsageError
from impasto.evaluate import evaluate, next_scorer, plan, scorer_of, setting_of, unanswered
from impasto.masked import MASKS, MaskedScorer, respond
from impasto.pace import pace
from impasto.perplexity import perplexity
from impasto.race import race
from impasto.recipe import Recipe
from impasto.result import MASKINGS, Request
from impasto.scoring import Scorer, Sharing
from impasto.store import Store
from impasto.studies.laser.kept import study_of
from impasto.studies.laser.parts import matrices, pairs
from impasto.studies.laser.protocol import PROTOCOLS
from impasto.studies.laser.run import dry_run_laser, page_of, run_laser
from impasto.studies.laser_tail import tail_answers
from tiny import claims, facts, laser_data, masking_tokenizer, tiny_model, tiny_tokenizer

torch.set_num_threads(1)
TOKENIZER = masking_tokenizer()
ASKED = {"limit": 8, "rhos": ["0.5", "0.1"], "screen": 4}
TASKS = ["laser_counterfact_masked", "laser_fever"]


def encoder(family: str = "roberta") -> Any:
    return families.build(family, vocab_size=len(TOKENIZER), num_hidden_layers=4)


def loaded_of(family: str = "roberta") -> models.LoadedModel:
    return models.adopt(encoder(family), TOKENIZER, name="tiny")


@pytest.fixture(scope="module")
def loaded() -> models.LoadedModel:
    return loaded_of()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder and its tokenizer."""
    place = tmp_path_factory.mktemp("models") / "encoder"
    encoder().save_pretrained(place)
    TOKENIZER.save_pretrained(place)
    return place


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A few rows of two benchmarks, and a cache, named in the environment."""
    folder = tmp_path_factory.mktemp("data")
    with laser_data(folder, counterfact=facts(("a", "bc")), fever=claims()) as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def identity(*edits: str) -> Recipe:
    return Recipe.of("tiny", None, edits, layers=4)


def oracle(model: Any, request: Request, masking: str) -> float:
    """One forward pass per mask pattern, without padding, batches or sharing; the special tokens are 1 and 2."""
    left, targets, right = (
        TOKENIZER.encode(text, add_special_tokens=False)
        for text in (request.context, request.continuation, request.after)
    )
    patterns = [[k] for k in range(len(targets))] if masking == "each" else [list(range(len(targets)))]
    total = 0.0
    for hidden in patterns:
        shown = [TOKENIZER.mask_token_id if k in hidden else token for k, token in enumerate(targets)]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[1, *left, *shown, *right, 2]])).logits[0, 1 + len(left) :]
        total += sum(float(logits[k].log_softmax(-1)[targets[k]]) for k in hidden)
    return total


# ── how a model is known to be masked ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", families.ENCODERS)
def test_encoders_with_a_head_are_masked_however_they_come(family: str, tmp_path: Path) -> None:
    model = families.build(family)
    assert models.adopt(model).masked
    model.save_pretrained(tmp_path)
    found = models.load(tmp_path, device="cpu")
    assert found.masked and found.setting.masking == "together" and type(found.model) is type(model)
    unnamed = json.loads((tmp_path / "config.json").read_text())
    del unnamed["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(unnamed))
    assert type(models.load(tmp_path, device="cpu").model) is type(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "gemma3_text", "vit"])
def test_other_models_are_not_and_their_settings_are_what_they_were(family: str) -> None:
    found = models.adopt(families.build(family))
    assert not found.masked and found.setting.masking == ""
    with pytest.raises(UsageError, match="is no masked language model, so there is nothing to mask: leave --masking"):
        found.scored("each")


def test_a_decoder_of_an_encoders_kind_is_no_masked_model() -> None:
    sizes = {"is_decoder": True, "num_hidden_layers": 2}
    config = families.config("bert", **sizes)
    assert not models.adopt(transformers.BertLMHeadModel(config)).masked
    assert isinstance(scorer_of(models.adopt(transformers.BertLMHeadModel(config), tiny_tokenizer())), Scorer)


def test_an_encoder_without_a_head_is_refused_before_anything_runs(tmp_path: Path) -> None:
    bare = models.adopt(encoder("bert").bert, TOKENIZER, name="bare")
    text = "^bare was loaded as BertModel, which has no head that predicts tokens, so texts cannot be scored with it"
    assert not bare.masked
    with Store(tmp_path) as store:
        with pytest.raises(UnsupportedModel, match=text):
            scorer_of(bare)
        with pytest.raises(UnsupportedModel, match=text):
            run_laser(bare, store=store, task_names=TASKS, **ASKED)
        (task,) = tasks.build(["impasto_tiny_choice"], limit=2)
        with pytest.raises(UnsupportedModel, match=text):
            evaluate(bare, [identity()], [task], store)
        assert store.measurements(setting_of(bare)) == []


def test_what_reads_from_left_to_right_is_not_asked_of_encoders(loaded: models.LoadedModel) -> None:
    with pytest.raises(UnsupportedModel, match="does not predict next tokens"):
        next_scorer(loaded)
    with pytest.raises(UnsupportedModel, match="^tiny predicts masked tokens, and perplexity is that of next tokens$"):
        perplexity(loaded, [identity()], ["a text of some length"])
    with pytest.raises(UsageError, match="^no way to mask 'some': one of together, each, authors$"):
        loaded.scored("some")
    with pytest.raises(UsageError, match="^scoring with masks needs a tokenizer with a mask token"):
        scorer_of(models.adopt(encoder(), tiny_tokenizer()))


# ── every way in gives the scorer's numbers ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
@pytest.mark.parametrize("masking", MASKINGS)
def test_evaluate_answers_as_the_scorer_and_the_oracle(family: str, masking: str, tmp_path: Path) -> None:
    loaded = loaded_of(family).scored(masking)
    name = anatomy(loaded.model).matrices(2)[-1].name
    recipes = [identity(), identity(f"2.{name}@0.1"), Recipe.of("tiny", "0:2 3", layers=4)]
    (task,) = tasks.build(["laser_counterfact_masked"], limit=6)
    with Store(tmp_path) as store:
        work = plan(loaded, recipes, [task], store)
        results = evaluate(loaded, recipes, [task], store, batch_tokens=100)
        left = plan(loaded, recipes, [task], store)
        kept = [store.responses(setting_of(loaded), recipe, task.requests) for recipe in recipes]
        others = [store.responses(setting_of(loaded_of(family)), recipes[0], task.requests)]
    assert (work.requests, left.requests, len(results)) == (len(task.requests), 0, 3)
    assert (not others[0]) == (masking != "together")
    scorer = scorer_of(loaded)
    assert isinstance(scorer, MaskedScorer)
    scores = scorer.score(recipes, task.requests)
    for row, recipe in enumerate(recipes):
        found = [kept[row][request.fingerprint] for request in task.requests]
        with applied(loaded, recipe.schedule, recipe.edits):
            slow = [oracle(loaded.model, request, masking) for request in task.requests]
        np.testing.assert_allclose([one.loglikelihood for one in found], scores.loglikelihood[row], atol=1e-4)
        np.testing.assert_allclose([one.loglikelihood for one in found], slow, atol=3e-4)
        more = masking == "authors"
        assert [one.tokens for one in found] == [len(r.continuation) + more for r in task.requests]
        assert all(one.rank is not None for one in found)


def test_what_is_written_are_the_likeliest_tokens_at_five_masks(loaded: models.LoadedModel, tmp_path: Path) -> None:
    (task,) = tasks.build(["impasto_tiny_generate"], limit=3)
    recipe = Recipe.of("tiny", "0:3", ["1.*@0.5"], layers=4)
    with Store(tmp_path) as store:
        evaluate(loaded, [recipe], [task], store)
        kept = store.responses(setting_of(loaded), recipe, task.requests)
    with applied(loaded, recipe.schedule, recipe.edits):
        expected = respond(loaded.model, TOKENIZER, task.requests)
    assert [kept[request.fingerprint] for request in task.requests] == expected
    assert {one.tokens for one in expected} == {MASKS}


def test_a_race_of_edits_of_an_encoder(loaded: models.LoadedModel, tmp_path: Path) -> None:
    (task,) = tasks.build(["laser_fever"], limit=20)
    recipes = [identity(f"{layer}.intermediate.dense@{rho}") for layer in (0, 2) for rho in ("0.5", "0.1")]
    with Store(tmp_path) as store:
        found = race(loaded, recipes, [task], keep=1, first=8, store=store)
        kept = store.responses(setting_of(loaded), found.best[0].recipe, task.requests)
    assert len(kept) == len(task.requests) and found.documents == 20


def test_a_worker_of_a_cluster_masks_as_the_driver_does(folder: Path, tmp_path: Path) -> None:
    loaded = models.load(folder, dtype="float32", device="cpu").scored("each")
    (task,), (written,) = tasks.build(["laser_counterfact_masked"], limit=4), tasks.build(["impasto_tiny_generate"])
    recipes = [identity(), identity("1.output.dense@r2")]
    with Store(tmp_path) as store:
        asked = [*task.requests, *written.requests[:2]]
        questions = unanswered(setting_of(loaded), recipes, asked, store, scorer=lambda: scorer_of(loaded))
        units = planned(questions, 2)
    worker = Worker(Reference(str(folder), loaded.setting), 64, Sharing())
    assert [type(event) for event in worker.load()] == [Ready]
    answers: dict[tuple[Recipe, Request], float] = {}
    texts = 0
    for unit in units:
        for event in worker.answer(unit):
            if isinstance(event, Scored):
                for row, recipe in enumerate(unit.recipes):
                    for place, value in zip(event.batch.requests, event.batch.loglikelihood[row], strict=True):
                        assert answers.setdefault((recipe, unit.requests[place]), value) is value
            texts += isinstance(event, Wrote)
    assert len(answers) == 2 * len(task.requests) and texts == 4
    scores = scorer_of(loaded).score(recipes, task.requests).loglikelihood
    expected = {(recipe, r): scores[i, j] for i, recipe in enumerate(recipes) for j, r in enumerate(task.requests)}
    assert answers == pytest.approx(expected, abs=1e-4)


def test_an_encoder_has_no_cache_to_average(loaded: models.LoadedModel, tmp_path: Path) -> None:
    assert setting_of(loaded).kv == "exact"
    with Store(tmp_path) as store:
        with pytest.raises(UsageError, match="^tiny predicts masked tokens and has no KV cache: leave --kv out$"):
            evaluate(loaded, [identity()], tasks.build(["laser_fever"], limit=2), store, kv="mean")
        assert store.settings() == [] and store.recipes() == {}


def test_the_pace_of_an_encoder_is_measured(loaded: models.LoadedModel) -> None:
    found = pace(scorer_of(loaded))
    assert found.layer > 0 and found.head > 0


# ── the study ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_both_matrices_of_an_encoders_mlp_are_cut(family: str) -> None:
    names = {"bert": {"intermediate.dense", "output.dense"}, "modernbert": {"mlp.Wi", "mlp.Wo"}}[family]
    found = matrices(loaded_of(family), ["mlp"], range(4))
    assert {(one.layer, one.name) for one in found} == {(layer, name) for layer in range(4) for name in names}
    assert {one.half for one in matrices(loaded_of(family), ["all"], [1])} == {"attention", "mlp"}


def test_a_whole_study_of_an_encoder_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import impasto.studies.laser.run as run

    loaded, notes, phases = loaded_of(), [], []
    own = {"protocol": "quick", "note": notes.append, **ASKED}

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with Store(tmp_path) as store:
        planned = dry_run_laser(loaded, store=store, task_names=TASKS, **own)
        assert planned.candidates == 2 * planned.matrices == 16 and planned.scoring.seconds > 0
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(run, "_reported", stop)
            run_laser(loaded, store=store, task_names=TASKS, **own)
        shown = run_laser(loaded, store=store, task_names=TASKS, progress=lambda phase, _: phases.append(phase), **own)
        assert "CounterFact: screening" not in phases and "FEVER: screening" in phases
        monkeypatch.setattr("impasto.masked.real_call", lambda *_: pytest.fail("a layer was run again"))
        assert run_laser(loaded, store=store, task_names=TASKS, **own).answers == shown.answers
        kept = study_of(store)
    assert page_of(tmp_path).answers == shown.answers
    assert [answer.key for answer in shown.answers][:2] == [f"gain-{name}" for name in TASKS]
    assert "all tokens of an answer masked at once" in shown.facts["computed in"]
    for trial in kept.trials:
        assert len(trial.screened) == trial.grid and trial.chosen is not None
        top = max(point.accuracy for point in trial.points.values())
        assert trial.points[trial.chosen].accuracy == top
    assert [trial.spoken is not None for trial in kept.trials] == [True, False]  # labels are no words of its own
    assert not [note for note in notes if "worded" in note]
    with Store(tmp_path) as store, pytest.raises(UnsupportedModel, match="perplexity is that of next tokens$"):
        run_laser(loaded, store=store, task_names=TASKS, texts=[Path(__file__)], **own)


def test_what_is_discarded_speaks_at_the_first_mask(loaded: models.LoadedModel) -> None:
    (task,) = tasks.build(["laser_counterfact_masked"], limit=6)
    shares = [Decimal("0.25"), Decimal(1)]
    found = tail_answers(loaded, 2, "output.dense", task.requests, shares=shares)
    for one, edits in zip(found, (["2.output.dense@tail0.25"], []), strict=True):
        with applied(loaded, None, edits):
            expected = [first_at_mask(loaded.model, request) for request in task.requests]
        assert list(one.tokens) == expected
        golds = [TOKENIZER.encode(request.continuation, add_special_tokens=False)[0] for request in task.requests]
        assert list(one.right) == [token == gold for token, gold in zip(expected, golds, strict=True)]


def first_at_mask(model: Any, request: Request) -> int:
    """The likeliest token at the first mask, by one forward pass."""
    texts = (request.context, request.continuation, request.after)
    left, targets, right = (TOKENIZER.encode(text, add_special_tokens=False) for text in texts)
    row = [1, *left, *[TOKENIZER.mask_token_id] * len(targets), *right, 2]
    with torch.no_grad():
        return int(model(input_ids=torch.tensor([row])).logits[0, 1 + len(left)].argmax())


def test_another_masking_is_another_study(tmp_path: Path) -> None:
    losses = []
    for masking in MASKINGS:
        loaded = loaded_of().scored(masking)
        with Store(tmp_path) as store:
            run_laser(loaded, store=store, task_names=TASKS[:1], select="full", compose="none", **ASKED)
            (trial,) = study_of(store).trials
            assert len(store.settings()) == 1 + len(losses)
            losses.append(trial.base.loss if trial.base else None)
    together, each, authors = losses
    assert together != each and authors is not None and together is not None
    assert together / 2 <= authors < together  # by n / (n + 1) per document


def test_tasks_of_the_protocol_are_worded_for_encoders_and_named_ones_as_named() -> None:
    quick = replace(PROTOCOLS["quick"], tasks=("laser_counterfact", "laser_fever"), validation=6, limits=())
    notes: list[str] = []
    found = [[pair.name for pair in pairs(quick, None, (), None, notes.append, masked=way)] for way in (True, False)]
    assert found == [TASKS, ["laser_counterfact", "laser_fever"]]
    assert notes == []
    named = pairs(quick, ["laser_counterfact"], (), None, notes.append, masked=True)
    assert [pair.name for pair in named] == ["laser_counterfact"]
    assert notes == [
        "laser_counterfact is worded for models that read from left to right; laser_counterfact_masked is its form "
        "for encoders"
    ]


# ── the command line ─────────────────────────────────────────────────────────────────────────────────────────────


def test_commands_take_encoders(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("impasto.cli.laser.write", lambda page, folder: drawn.append(page.title) or folder)
    model = str(folder)
    line = ["study", "laser", model, "--tasks", "laser_fever", "--limit", "4", "--rhos", "0.5", "--screen", "2"]
    assert main([*line, "--compose", "none", "--masking", "each", "-o", "study"]) == 0
    assert len(drawn) == 1
    with Store(tmp_path / "study", readonly=True) as store:
        assert [setting.masking for setting in store.settings()] == ["each"]
    assert main([*line, "--dry-run", "-o", "other"]) == 0
    asked = ["eval", model, "-s", "0:3", "--tasks", "laser_fever", "--limit", "4", "-o", "run"]
    assert main(asked) == main([*asked, "--dry-run"]) == 0
    capsys.readouterr()
    assert main(["run", model, "The sky is", "-s", "0:3", "--max-new-tokens", "3"]) == 0
    text = capsys.readouterr().out
    assert text.count("The sky is") == 2 and text.startswith("schedule: 0:3 (3 of 4 layers")


def test_commands_refuse_averaged_caches_of_encoders_and_other_masks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["eval", str(folder), "-s", "0:3", "--tasks", "laser_fever", "--limit", "4", "-o", "run"]
    for line in (["run", str(folder), "The sky is", "-s", "0:3"], asked, [*asked, "--dry-run"]):
        assert main([*line, "--kv", "mean"]) == 2
        assert "predicts masked tokens and has no KV cache: leave --kv out" in capsys.readouterr().err
    with Store(tmp_path / "run", readonly=True) as store:
        assert store.runs() == []
    assert main([*asked, "--masking", "some"]) == 2
    assert "'some' is not one of 'together', 'each', 'authors'" in capsys.readouterr().err


def test_commands_refuse_encoders_without_a_head_and_masks_for_decoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    encoder("bert").bert.save_pretrained("bare")
    TOKENIZER.save_pretrained("bare")
    for line in (["study", "laser", "bare", "--tasks", "laser_fever"], ["eval", "bare", "--tasks", "laser_fever"]):
        assert main([*line, "-o", "run"]) != 0
        assert "error: bare was loaded as BertModel, which has no head that predicts tokens" in capsys.readouterr().err
    tiny_model(layers=1).save_pretrained("decoder")
    tiny_tokenizer().save_pretrained("decoder")
    assert main(["eval", "decoder", "--tasks", "laser_fever", "--masking", "each"]) == 2
    assert "error: decoder is no masked language model, so there is nothing to mask" in capsys.readouterr().err

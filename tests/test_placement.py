"""Models that do not fit one device: weights on the CPU, on disk, or split over processes change no number."""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import impasto.models as models
from families import DEPTH, build
from impasto.anatomy import anatomy, input_device
from impasto.cli import main
from impasto.errors import UnsupportedModel, UsageError
from impasto.generation import generate
from impasto.recipe import Recipe
from impasto.result import Request
from impasto.runtime import scheduled
from impasto.scoring import Scorer
from impasto.similarity import padded, similarity
from impasto.store import Store
from impasto.surgery import edited
from tiny import tiny_folder, tiny_model, tiny_tokenizer

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore:The following device_map keys")

FAMILIES = ("llama", "gpt2", "gemma2", "mixtral", "gptj")  # the second and third tie the head to the embeddings
WAYS = ("cpu", "disk", "mixed")
SCHEDULE = "0 2 {1 3}x2 5 2.attn"
SCHEDULES = ("0:6", "0:3", "0 {1:5}x2 5", "0 sum{1 2, 3} 4")  # they end on different layers
REQUESTS = [
    Request("loglikelihood", "the same beginning, then", " one"),
    Request("loglikelihood", "the same beginning, then", " another"),
    Request("loglikelihood", "something else", " x"),
    Request("rolling", "", "a text that is scored as a whole"),
]


def fresh(family: str) -> Any:
    """A tiny model that knows every token of the tokenizer."""
    model = build(family, vocab_size=259)
    model.tie_weights()
    return model


def send_away(model: Any, way: str, folder: Path) -> None:
    """Let accelerate keep weights elsewhere: all on the CPU, all on disk, or each odd layer and what is outside on disk."""
    if way == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif way == "disk":
        accelerate.disk_offload(model, folder, execution_device="cpu")
    else:
        path = anatomy(model).path
        outside = {n for n, m in model.named_modules() if n and not list(m.children()) and not n.startswith(path)}
        places = dict.fromkeys(sorted(outside), "disk") | {f"{path}.{i}": ("cpu", "disk")[i % 2] for i in range(DEPTH)}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


def measured(model: Any) -> dict[str, Any]:
    """Everything that is asked of a model here."""
    ids = torch.arange(3, 51).reshape(2, 24)
    with torch.no_grad():
        full = model(input_ids=ids).logits
        with scheduled(model, SCHEDULE):
            logits = model(input_ids=ids).logits
    written = generate(model, tiny_tokenizer(), SCHEDULE, ["Once", "Upon a time"], max_new_tokens=6)
    recipes = [Recipe.of("any", text, layers=DEPTH) for text in SCHEDULES]
    scores = Scorer(model, tiny_tokenizer(), budget=120).score(recipes, REQUESTS)
    alike = similarity(model, SCHEDULE, padded([list(range(3, 20)), list(range(5, 16))]))
    return {
        "full": full,
        "logits": logits,
        "written": [one.new_token_ids for one in written],
        "loglikelihood": scores.loglikelihood,
        "greedy": scores.greedy,
        "similarity": alike.matrix("tokens"),
    }


@functools.cache
def expected(family: str) -> dict[str, Any]:
    return measured(fresh(family))


@pytest.mark.parametrize(
    ("family", "way"), [*((family, "mixed") for family in FAMILIES), *(("gpt2", way) for way in ("cpu", "disk"))]
)
def test_offloaded_weights_change_no_number(family: str, way: str, tmp_path: Path) -> None:
    model = fresh(family)
    send_away(model, way, tmp_path)
    wanted, got = expected(family), measured(model)
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    assert input_device(model) == torch.device("cpu")
    torch.testing.assert_close(got["logits"], wanted["logits"], rtol=0, atol=1e-6)
    assert torch.equal(got["full"], wanted["full"])
    assert got["written"] == wanted["written"]
    np.testing.assert_allclose(got["loglikelihood"], wanted["loglikelihood"], rtol=0, atol=1e-5)
    assert (got["greedy"] == wanted["greedy"]).all()
    np.testing.assert_allclose(got["similarity"], wanted["similarity"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_an_offloaded_head_is_still_taken_in_slices(way: str, tmp_path: Path) -> None:
    for family, kind in (("llama", "plain"), ("gemma2", "pointwise")):
        model = fresh(family)
        send_away(model, way, tmp_path / family)
        assert Scorer(model, tiny_tokenizer()).head.kind == kind


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_edit_of_an_offloaded_matrix_is_refused_and_one_in_memory_is_undone_bit_for_bit(
    family: str, tmp_path: Path
) -> None:
    name = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj"}[family]
    ids = torch.arange(3, 27)[None]
    plain, model = fresh(family), fresh(family)
    send_away(model, "mixed", tmp_path)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for form in ("dense", "factored"):
            with edited(plain, [f"2.{name}@r3"], form=form), edited(model, [f"2.{name}@r3"], form=form):
                wanted, got = plain(input_ids=ids).logits, model(input_ids=ids).logits
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
            assert not torch.equal(got, before)
            assert torch.equal(model(input_ids=ids).logits, before)
        message = rf"^{name} of layer 1 is not in memory \(its weights are offloaded\): load the model on one device$"
        with pytest.raises(UnsupportedModel, match=message), edited(model, [f"1:3.{name}@r3"]):
            pass
        assert torch.equal(model(input_ids=ids).logits, before)


# ---------------------------------------------------------------------------------------------------- loading


def layers_on_disk() -> dict[str, str]:
    outside = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return outside | {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_loaded_with_a_device_map_is_the_same_model(tied: bool, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", tie_word_embeddings=tied)
    whole = models.load(folder, device="cpu")
    spread = models.load(folder, device_map=layers_on_disk(), offload_folder=tmp_path / "offload")
    assert any(parameter.device.type == "meta" for parameter in spread.model.parameters())
    assert spread.setting == whole.setting
    assert spread.device == torch.device("cpu")
    recipes = [Recipe.of("any", text, layers=4) for text in ("0:4", "0 {1 2} 3", "0 1")]
    one, other = (Scorer(m.model, m.tokenizer).score(recipes, REQUESTS) for m in (whole, spread))
    np.testing.assert_allclose(other.loglikelihood, one.loglikelihood, rtol=0, atol=1e-5)
    assert (other.greedy == one.greedy).all()


def test_everything_on_disk_still_says_where_inputs_belong(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    spread = models.load(folder, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    assert (spread.setting.device, spread.device) == ("cpu", torch.device("cpu"))
    assert spread.setting == models.load(folder, device="cpu").setting


def test_auto_is_the_plain_model_where_it_fits(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    spread = models.load(folder, device_map="auto", max_memory={"cpu": "1GiB"})
    assert spread.setting == models.load(folder).setting


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_an_adopted_model_has_its_weights_name_wherever_they_are(way: str, tmp_path: Path) -> None:
    model = tiny_model()
    setting = models.adopt(model, name="mine").setting
    send_away(model, way, tmp_path)
    assert models.adopt(model, name="mine").setting == setting


def test_what_cannot_be_placed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "one")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UsageError, match=r"^give device_map or tp_plan, not both: "):
        models.load(folder, device_map="auto", tp_plan="auto")
    with pytest.raises(UsageError, match=r"^tp_plan splits every layer over several processes, and this is one: "):
        models.load(folder, tp_plan="auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    planless = build("gptj")
    planless.save_pretrained(tmp_path / "two")
    with pytest.raises(UnsupportedModel, match=r"has no tensor parallel plan: "):
        models.load(tmp_path / "two", tp_plan="auto")


# -------------------------------------------------------------------------------------------- tensor parallel

PROCESS = """
import json, sys
import torch
import impasto.models as models
from impasto.errors import UnsupportedModel
from impasto.surgery import edited
from test_placement import asked_of_four_layers

for folder in sys.argv[1:]:
    loaded = models.load(folder, tp_plan="auto")
    got = asked_of_four_layers(loaded)
    try:
        with edited(loaded.model, ["1.mlp.down_proj@r3"]):
            refusal = ""
    except UnsupportedModel as problem:
        refusal = str(problem)
    got |= {"split": sum(hasattr(p, "device_mesh") for p in loaded.model.parameters()), "refusal": refusal}
    if torch.distributed.get_rank() == 0:
        print(json.dumps(got))
torch.distributed.destroy_process_group()
"""


def asked_of_four_layers(loaded: models.LoadedModel) -> dict[str, Any]:
    """What every process of a split model is asked, as JSON; each kind of cache, halves and ends on different layers."""
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = torch.arange(3, 51).reshape(2, 24)
    schedule = "0 2 {1 3}x2 3.mlp 1"
    with torch.no_grad(), scheduled(model, schedule):
        logits = model(input_ids=ids).logits
    written = [
        list(one.new_token_ids)
        for text, kv in ((schedule, "exact"), ("{0 2} 3", "mean"))
        for one in generate(model, tokenizer, text, ["Once", "Upon a time"], max_new_tokens=6, kv=kv)
    ]
    recipes = [Recipe.of("any", text, layers=4) for text in ("0:4", "0 {1 2}x2 3", "0 1")]
    scores = Scorer(model, tokenizer, budget=120).score(recipes, REQUESTS)
    return {
        "setting": loaded.setting.fingerprint,
        "logits": logits.tolist(),
        "written": written,
        "loglikelihood": scores.loglikelihood.tolist(),
        "greedy": scores.greedy.tolist(),
    }


def two_processes(program: str, *arguments: str) -> list[str]:
    """The lines that rank 0 of two processes prints, started as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join(path for path in sys.path if path)  # this folder and impasto among them
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ends = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(err[-2000:] for _, err in ends)
    return ends[0][0].splitlines()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="transformers then wants a GPU for each of the two processes")
def test_split_over_two_processes_the_model_gives_the_same_numbers(tmp_path: Path) -> None:
    folders = [
        tiny_folder(tmp_path / "own head"),
        tiny_folder(tmp_path / "tied head", tie_word_embeddings=True),
        tiny_folder(tmp_path / "soft cap", family="gemma2", sliding_window=8),
    ]
    lines = two_processes(PROCESS, *map(str, folders))
    for folder, line in zip(folders, lines, strict=True):
        got, wanted = json.loads(line), asked_of_four_layers(models.load(folder))
        assert got["split"] > 0
        assert got["setting"] == wanted["setting"]
        assert got["written"] == wanted["written"]
        assert got["greedy"] == wanted["greedy"]
        np.testing.assert_allclose(got["logits"], wanted["logits"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(got["loglikelihood"], wanted["loglikelihood"], rtol=0, atol=1e-4)
        assert got["refusal"] == (
            "mlp.down_proj of layer 1 is split over several processes (tensor parallel): load the model on one device, "
            "or with device_map, to edit it"
        )


def torchrun(*arguments: str) -> tuple[str, str]:
    """What a command prints and tells when torchrun starts it in two processes."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "impasto",
            *arguments,
        ],
        env={**environment, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def answers(folder: Path) -> dict[tuple[str, ...], Any]:
    """Everything that was measured in a run folder, by what was asked."""
    with Store(folder, readonly=True) as store:
        [setting] = store.settings()
        return {
            (setting.fingerprint, r.recipe, r.task, r.protocol): [*r.metrics.values(), *r.scores[r.info["metric"]]]
            for r in store.results(setting)
        }


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands are run that leave nothing else behind; holds a model."""
    tiny_folder(tmp_path / "model")
    (tmp_path / "here").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name, value in (("TMPDIR", "tmp"), ("IMPASTO_CACHE", "cache")):
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "here"


split_command = pytest.mark.skipif(
    torch.cuda.is_available() or not torch.distributed.is_available(),
    reason="splits a model over two processes on a CPU",
)


@split_command
def test_two_processes_answer_go_on_and_speak_as_one(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["eval", "../model", "-s", "0 {1 2}x2 3", "--tasks", "impasto_tiny_choice,impasto_tiny_rolling", "-o"]
    assert main([*line, "half", "--device", "cpu", "--limit", "9"]) == 0  # what only a copy of the store knows
    shutil.copytree("half", "two")
    assert main([*line, "one", "-s", "2 0", "--device", "cpu"]) == 0
    expected = capsys.readouterr().out.rpartition("schedule A")[2]
    text, told = torchrun(*line, "two", "-s", "2 0", "--tp-plan", "auto")
    assert text == f"schedule A{expected}".replace("one/", "two/")
    assert told.count("scoring: 100%") == told.count("loading ../model") == 1 and "rror" not in told
    got, wanted = answers(alone / "two"), answers(alone / "one")
    assert got.keys() >= wanted.keys() and len(wanted) == 6
    for key, values in wanted.items():
        np.testing.assert_allclose(got[key], values, rtol=1e-5, atol=1e-3)
    with Store(alone / "two", readonly=True) as store:
        assert [run.outcome for run in store.runs()] == ["finished", "finished"]
    assert {path.name for path in alone.iterdir()} == {"half", "one", "two"}
    assert list((alone.parent / "tmp").glob("**/*.sqlite*")) == []


@pytest.mark.slow
@split_command
def test_two_processes_write_one_text(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["run", "../model", "Once upon", "-s", "0 {1 2} 3", "--max-new-tokens", "8"]
    assert main([*line, "--device", "cpu"]) == 0
    expected = capsys.readouterr().out.partition("prefill")[0]
    text, _ = torchrun(*line, "--tp-plan", "auto")
    assert text.partition("prefill")[0].rstrip() == expected.rstrip() and text.count("prefill") == 1
    assert list(alone.iterdir()) == []


@pytest.mark.slow
@split_command
def test_two_processes_make_one_study(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["study", "painters", "../model", "--tasks", "impasto_tiny_choice", "--limit", "8", "--seeds", "1"]
    line += ["--methods", "skip,parallel,random_order", "-o"]
    assert main([*line, "one", "--device", "cpu"]) == 0
    expected = capsys.readouterr().out
    assert torchrun(*line, "two", "--tp-plan", "auto")[0] == expected.replace("one/", "two/")
    assert {path.name for path in (alone / "two").iterdir()} == {"results.sqlite", "report.html", "figures"}
    assert {path.name for path in alone.iterdir()} == {"one", "two"}


# ------------------------------------------------------------------------------------------- several GPUs


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_layers_on_two_gpus_and_on_the_cpu_change_no_number(family: str, tmp_path: Path) -> None:
    wanted, model = expected(family), fresh(family)
    places: dict[str, Any] = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 0}
    places |= {f"model.layers.{i}": (0, 1, "cpu", "disk", 1, 0)[i] for i in range(DEPTH)}
    accelerate.dispatch_model(model, places, main_device=0, offload_dir=tmp_path)
    got = measured(model)
    torch.testing.assert_close(got["logits"].cpu(), wanted["logits"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(got["loglikelihood"], wanted["loglikelihood"], rtol=0, atol=1e-2)
    with torch.no_grad(), scheduled(model, "0 {1 3} 5", kv="mean"):
        one = model.generate(torch.arange(3, 9, device="cuda:0")[None], max_new_tokens=4, do_sample=False)
    assert one.shape[-1] > 6

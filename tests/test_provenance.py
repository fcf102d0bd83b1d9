"""What a page says about how it was made: its command on another machine, and the time it took."""

from __future__ import annotations

import shlex
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from impasto.records import Run
from impasto.store import Store
from impasto.studies.provenance import computing_time, portable

GEMMA = (
    "impasto study laser /tmp/models/gemma3-270m.gguf --protocol standard --types mlp --text /tmp/data/wikitext2.txt "
    "--frequencies /tmp/data/counts.json --output /tmp/runs/gemma"
)


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (
            GEMMA,
            "impasto study laser gemma3-270m.gguf --protocol standard --types mlp --text wikitext2.txt "
            "--frequencies counts.json --output gemma",
        ),
        ("impasto study painters", "impasto study painters"),
        ("impasto study painters org/name --seeds 2", "impasto study painters org/name --seeds 2"),
        ("impasto study laser ./my-model -o runs/a", "impasto study laser ./my-model -o runs/a"),
        ("impasto study laser ~/m.gguf -o/runs/a", "impasto study laser m.gguf -oa"),
        ("impasto study laser ../m.gguf --text=/a/b.txt", "impasto study laser m.gguf --text=b.txt"),
        (
            "impasto study laser demo --text /a/x.txt --text /b/x.txt",
            "impasto study laser demo --text a/x.txt --text b/x.txt",
        ),
        ("impasto study laser '/my data/m.gguf' --types '*.up'", "impasto study laser m.gguf --types '*.up'"),
        ("impasto study laser 'C:\\data\\m.gguf'", "impasto study laser m.gguf"),
        ("impasto study laser /", "impasto study laser /"),
    ],
)
def test_commands_are_told_as_one_types_them_elsewhere(typed: str, told: str) -> None:
    assert portable(shlex.split(typed)) == told


folders = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))
words = st.one_of(folders, st.sampled_from(["--seeds", "7", "--types=*.up", "org/name", "0:8 {8:12}x2", "it's"]))


@given(st.lists(words, max_size=8))
def test_no_word_is_lost_and_different_files_keep_different_names(command: list[str]) -> None:
    told = shlex.split(portable(command))
    assert len(told) == len(command)
    names: dict[str, str] = {}
    for word, shown in zip(command, told, strict=True):
        if word[:1] != "/":
            assert shown == word
            continue
        assert not shown.startswith("/")
        assert PurePosixPath(word).parts[-1:] == PurePosixPath(shown).parts[-1:]
        assert names.setdefault(shown, word) == word


def run(seconds: float | None, *command: str) -> Run:
    return Run(1, command, {}, {}, None, "2026-01-01T00:00:00+00:00", None, seconds, None)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        ([240.4], "4.0 minutes in 1 run"),
        ([60.0, 30.0], "1.5 minutes in 2 runs"),
        ([60.0, None], "1.0 minutes in 2 runs, without 1 of them that has not ended, or not noted it"),
        ([None], "not known: the run has not ended, or not noted it"),
        ([None, None], "not known: the runs have not ended, or not noted it"),
    ],
)
def test_a_run_without_an_end_counts_for_no_time(seconds: list[float | None], told: str) -> None:
    assert computing_time([run(one) for one in seconds]) == told


def test_the_command_is_that_of_the_last_study_of_the_kind(tmp_path: Path) -> None:
    from impasto.result import Setting
    from impasto.studies.provenance import provenance

    with Store(tmp_path) as store:
        for command in ("study laser m --limit 3", "study laser m", "study painters m", "eval m --tasks a"):
            store.finish_run(store.start_run(["impasto", *command.split()], versions={}), seconds=1.0)
        setting = Setting("m", "w", "float32", "cpu")
        for study in ("laser", "painters"):
            found = provenance(store, setting, study, "quick", "a file", [])
            assert found["command"] == f"impasto study {study} m"
        assert (
            provenance(store, setting, "other", "quick", "a file", [])["command"] == "impasto study laser m --limit 3"
        )

"""Counting in a corpus: the fast counter against a slow one, and everything that can be wrong with files."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import threading
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impasto import corpus
from impasto.cli import main
from impasto.corpus import Counts, Mentions, Pair, Rules, counting, reading
from impasto.errors import ImpastoError, MissingExtra, UsageError

pytest.importorskip("ahocorasick_rs", reason="counting in a corpus needs the extra corpus")
zstandard = pytest.importorskip("zstandard", reason="counting in a corpus needs the extra corpus")

few = settings(max_examples=150, deadline=None)

FACTS = (
    Pair("Danielle Darrieux", "French"),
    Pair("Edwin of Northumbria", "Christianity"),
    Pair("Re!", "art"),
    Pair("art", "Re!"),
    Pair("São Tomé", "Paris"),
)


# ── a slow counter ───────────────────────────────────────────────────────────────────────────────────────────────


def stands(text: str, phrase: str) -> bool:
    """Whether a phrase stands in a text as whole words, looked for at every place."""

    def inner(sign: str) -> bool:
        return sign.isalnum() or sign == "_" or unicodedata.category(sign)[0] == "M"

    for at in range(len(text) - len(phrase) + 1):
        if text[at : at + len(phrase)] != phrase:
            continue
        before, after = text[at - 1] if at else " ", text[at + len(phrase) : at + len(phrase) + 1] or " "
        if not (inner(phrase[0]) and inner(before)) and not (inner(phrase[-1]) and inner(after)):
            return True
    return False


def lowered(text: str) -> str:
    return "".join(sign.lower() if "A" <= sign <= "Z" else sign for sign in text)


def slowly(text: str, pairs: Sequence[Pair], match: str, ignore_case: bool) -> list[int]:
    text = re.sub("[\t\n\v\f\r\u00a0]", " ", text.replace("\r\n", "\n"))
    same = lowered if ignore_case else str
    found = []
    for place, pair in enumerate(pairs):
        subject = " ".join(pair.subject.split())
        words = [subject] if match == "phrase" else [w.strip(reading_around) or w for w in subject.split()]
        texts = [*words, " ".join(pair.answer.split())]
        if all(stands(same(text), same(unicodedata.normalize("NFC", one))) for one in texts):
            found.append(place)
    return found


reading_around = corpus.mentions._AROUND

SIGNS = st.sampled_from([*'abAB é_1.!-"', "\n", "\r\n", "\t", "\u00a0", "\u0301", "“", "ß", "Ж", "😀"])
TEXTS = st.lists(SIGNS, max_size=30).map("".join)
NAMES = st.lists(st.sampled_from([*"abAB é1!. "]), min_size=1, max_size=5).map("".join).filter(lambda t: t.strip())
PAIRS = st.lists(st.builds(Pair, NAMES, NAMES), min_size=1, max_size=6)


@few
@given(TEXTS, PAIRS, st.sampled_from(["phrase", "all_words"]), st.booleans())
def test_mentions_are_those_of_the_slow_counter(text, pairs, match, ignore_case) -> None:
    found = Mentions(pairs, match, ignore_case=ignore_case).of(text.encode())
    assert sorted(found) == slowly(text, pairs, match, ignore_case)


@few
@given(st.lists(TEXTS, min_size=1, max_size=4), PAIRS, st.booleans())
def test_a_sample_of_the_corpus_changes_no_mention(texts, pairs, ignore_case) -> None:
    data = [text.encode() for text in texts]
    plain = Mentions(pairs, "all_words", ignore_case=ignore_case)
    tuned = Mentions(pairs, "all_words", ignore_case=ignore_case, sample=data)
    assert [sorted(plain.of(text)) for text in data] == [sorted(tuned.of(text)) for text in data]


@few
@given(TEXTS, PAIRS)
def test_what_a_phrase_finds_all_words_find_and_what_case_finds_ignoring_it_finds(text, pairs) -> None:
    strict = set(Mentions(pairs).of(text.encode()))
    assert strict <= set(Mentions(pairs, ignore_case=True).of(text.encode()))
    plain = [pair for pair in pairs if re.fullmatch(r"[\w ]+", pair.subject)]
    if plain:
        here = set(Mentions(plain).of(text.encode()))
        assert here <= set(Mentions(plain, "all_words").of(text.encode()))


@pytest.mark.parametrize(
    ("text", "phrase", "all_words"),
    [
        ("Danielle Darrieux spoke French.", [0], [0]),
        ("French was what Danielle\nDarrieux spoke", [0], [0]),
        ("Danielle Yvonne Marie Antoinette Darrieux, French", [], [0]),
        ("Danielle Darrieuxs French", [], []),
        ("danielle darrieux french", [], []),
        ("Northumbria: Edwin (not of Kent), Christianity", [], [1]),
        ("the party was Re! and more", [], []),
        ("art, Re!", [2, 3], [2, 3]),
        ("in Paris: São Tomé.", [4], [4]),
        ("in Paris: Sao Tome.", [], []),
        ("in Paris: São Tome\u0301.", [], []),
        ("", [], []),
    ],
)
def test_the_rules_by_example(text: str, phrase: list[int], all_words: list[int]) -> None:
    assert sorted(Mentions(FACTS).of(text.encode())) == phrase
    assert sorted(Mentions(FACTS, "all_words").of(text.encode())) == all_words


def test_bytes_that_are_no_utf8_do_no_harm() -> None:
    assert Mentions(FACTS).of(b"\xff\xfeart\xff Re!\x80") == [2, 3] or sorted(
        Mentions(FACTS).of(b"\xff\xfeart\xff Re!\x80")
    ) == [2, 3]
    assert Mentions(FACTS).of(b"xart Re!") == []


def test_the_large_and_the_small_automaton_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [b"art Re! party", "Danielle Darrieux, French São Tomé Paris".encode()]
    fast = [sorted(Mentions(FACTS).of(text)) for text in texts]
    monkeypatch.setattr(corpus.mentions, "LARGEST_TABLE", 0)
    assert [sorted(Mentions(FACTS).of(text)) for text in texts] == fast


def test_pairs_that_are_none_are_refused() -> None:
    with pytest.raises(UsageError, match="a pair needs a subject and an answer, not ' ' and 'x'"):
        Pair(" ", "x")
    with pytest.raises(UsageError, match="there are no pairs to look for"):
        Mentions([])


# ── a corpus in many forms ───────────────────────────────────────────────────────────────────────────────────────

DOCUMENTS = [
    "Danielle Darrieux spoke French.",
    "Nothing here, in two\nlines.",
    "Danielle Yvonne Darrieux: French, French",
    "art? Re!",
    "Edwin of Northumbria",
] * 7
TRUTH = {
    match: Counter(place for text in DOCUMENTS for place in slowly(text, FACTS, match, False))
    for match in ("phrase", "all_words")
}


def rows_of(documents: Sequence[str]) -> str:
    return "".join(json.dumps({"text": text, "meta": {"body": text}}) + "\n" for text in documents)


def written(folder: Path, form: str, documents: Sequence[str] = DOCUMENTS) -> Path:
    """The documents as one file of a form."""
    file = folder / f"shard.{form}"
    lines = rows_of(documents).encode()
    blocks = "\n\n".join(documents).encode()
    if form == "parquet":
        parquet.write_table(arrow.table({"text": list(documents)}), file, row_group_size=4)
    elif form.endswith(".gz"):
        half = len(lines) // 2
        file.write_bytes(gzip.compress(lines[:half]) + gzip.compress(lines[half:]))
    elif form.endswith(".zst"):
        half = len(lines) // 2
        pack = zstandard.ZstdCompressor().compress
        file.write_bytes(pack(lines[:half]) + pack(lines[half:]))
    else:
        file.write_bytes(blocks if form == "txt" else lines)
    return file


def together(counts: Counts) -> Counter:
    return Counter({place: number for place, number in enumerate(counts.together) if number})


FORMS = ["jsonl", "ndjson", "json.gz", "jsonl.zst", "txt", "parquet"]


@pytest.mark.parametrize("match", ["phrase", "all_words"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_corpus_gives_the_same_counts(tmp_path: Path, form: str, match: str) -> None:
    counts = corpus.count(corpus.files([written(tmp_path, form)]), FACTS, rules=Rules(match=match))
    assert together(counts) == TRUTH[match]
    assert (counts.documents, counts.broken, counts.damaged) == (len(DOCUMENTS), 0, ())
    assert counts.bytes == (tmp_path / f"shard.{form}").stat().st_size
    assert counts.text == sum(len(text.encode()) for text in DOCUMENTS) + (34 if form == "txt" else 0)
    assert counts.frequencies[FACTS[0]] == TRUTH[match][0]


def test_several_processes_give_what_one_gives(tmp_path: Path) -> None:
    for number, form in enumerate(FORMS):
        (tmp_path / str(number)).mkdir()
        written(tmp_path / str(number), form)
    shards = corpus.files([tmp_path])
    heard: list[tuple[int, int]] = []
    alone = corpus.count(shards, FACTS)
    shared = corpus.count(shards, FACTS, workers=3, progress=lambda done, total: heard.append((done, total)))
    assert len(shards) == len(FORMS)
    assert (alone.together, alone.documents, alone.text) == (shared.together, shared.documents, shared.text)
    assert together(alone) == Counter({place: len(FORMS) * number for place, number in TRUTH["phrase"].items()})
    assert heard[0] == (0, alone.bytes) and heard[-1] == (alone.bytes, alone.bytes)


@few
@given(st.lists(st.sampled_from(["a", "b b", "", " ", "ccc", "\r"]), max_size=20), st.integers(1, 9))
def test_parts_of_a_file_hold_every_document_once(tmp_path_factory, lines, size) -> None:
    file = tmp_path_factory.mktemp("parts") / "x.txt"
    file.write_bytes("\n".join(lines).encode())
    for unit in ("block", "line", "file"):
        whole, pieced = (
            [text for part in pieces for text in reading.documents(part, unit=unit)]
            for pieces in (reading.parts(file), reading.parts(file, size))
        )
        assert pieced == whole
        if unit == "block":
            oracle = re.split(r"(?m)(?:^[ \r]*(?:\n|\Z))+", file.read_bytes().decode())
            assert [text.decode() for text in whole] == [text for text in oracle if text.strip()]
        if unit == "line":
            assert [text.decode().strip("\n") for text in whole] == [line for line in lines if line.strip()]
    assert sum(part.bytes for part in reading.parts(file, size)) == file.stat().st_size


def test_what_a_document_of_plain_text_is(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("Danielle Darrieux\nFrench\n\nDanielle Darrieux\n \nFrench\n")
    shards = corpus.files([tmp_path / "x.txt"])
    found = {unit: corpus.count(shards, FACTS, rules=Rules(unit=unit)) for unit in ("block", "line", "file")}
    assert {unit: (counts.documents, counts.together[0]) for unit, counts in found.items()} == {
        "block": (3, 1),
        "line": (4, 0),
        "file": (1, 1),
    }


def test_fields_may_lie_inside_others(tmp_path: Path) -> None:
    shards = corpus.files([written(tmp_path, "jsonl")])
    assert together(corpus.count(shards, FACTS, rules=Rules(field="meta.body"))) == TRUTH["phrase"]
    with pytest.raises(UsageError) as caught:
        corpus.count(shards, FACTS, rules=Rules(field="content"))
    assert str(caught.value) == (
        f"not one of the first 35 rows of {shards[0]} has a text in the field 'content'; fields there: text, meta"
    )
    table = corpus.files([written(tmp_path, "parquet")])
    with pytest.raises(UsageError, match="in the field 'content'; fields there: text"):
        corpus.count(table, FACTS, rules=Rules(field="content"))


# ── what is broken ───────────────────────────────────────────────────────────────────────────────────────────────


def test_broken_lines_are_counted_and_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LONGEST", 2000)
    monkeypatch.setattr(reading, "BUFFER", 64)
    broken = [b"{", b'{"text": 3}', b'{"other": "x"}', b"[1, 2]", b'{"text": "\xff\xfe"}', b"null", b"[" * 1500]
    long = json.dumps({"text": "Danielle Darrieux French " * 100}).encode()
    good = rows_of(DOCUMENTS[:5]).encode()
    file = tmp_path / "x.jsonl"
    file.write_bytes(good + b"\n\n".join(broken) + b"\n" + long + b"\n" + good + b'{"text": "art Re!')
    counts = corpus.count(corpus.files([file]), FACTS)
    assert (counts.documents, counts.broken) == (10, len(broken) + 2)
    assert together(counts) == Counter({0: 2, 2: 2, 3: 2})
    lone = tmp_path / "y.jsonl"
    lone.write_text('{"text": "art \\ud800 Re!"}\n')
    assert corpus.count(corpus.files([lone]), FACTS).together[2] == 1


@pytest.mark.parametrize(("form", "workers"), [("json.gz", 1), ("jsonl.zst", 1), ("jsonl.zst", 2), ("parquet", 1)])
def test_files_that_break_off_are_read_up_to_there(tmp_path: Path, form: str, workers: int) -> None:
    documents = [f"Danielle Darrieux {os.urandom(40).hex()} French" for _ in range(4000)]
    whole = written(tmp_path, form, documents)
    (tmp_path / "whole").mkdir()
    good = written(tmp_path / "whole", "jsonl")
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) * 3 // 4] + b"\0" * 100)
    notes: list[str] = []
    counts = corpus.count(corpus.files([whole, good]), FACTS, note=notes.append, workers=workers)
    assert counts.together[0] >= TRUTH["phrase"][0] + (0 if form == "parquet" else 1000)
    assert len(counts.damaged) == 1 and counts.damaged[0].startswith(f"{whole}: ")
    assert len(notes) == 1 and notes[0].startswith(f"{whole} breaks off (")


def test_a_file_that_cannot_be_read_stops_no_other_and_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    good, gone = written(tmp_path, "jsonl"), written(tmp_path / "a", "jsonl.zst")
    shards = corpus.files([good, gone])
    kept = tmp_path / "kept"
    content = gone.read_bytes()
    real = reading.parts

    def lose(path: Path) -> list[reading.Part]:
        found = real(path)
        if path == gone.resolve():
            gone.unlink()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "parts", lose)
        patch.setattr(counting, "_first_documents", lambda part, rules: ())
        with pytest.raises(ImpastoError) as caught:
            corpus.count(shards, FACTS, kept=kept)
    assert str(caught.value) == (
        f"some shards cannot be read ({gone.resolve()}: No such file or directory); "
        "the others are counted and kept, and the same command tries again"
    )
    gone.write_bytes(content)
    assert corpus.count(shards, FACTS, kept=kept).together[0] == 2 * TRUTH["phrase"][0]


def test_shards_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(UsageError, match=r"no shards in .*nothing\*"):
        corpus.files([tmp_path / "nothing*"])
    with pytest.raises(UsageError, match=r"x.csv is no shard of a known kind: .jsonl .ndjson"):
        corpus.files([tmp_path / "x.csv"])
    with pytest.raises(UsageError, match="no shards in"):
        corpus.files([tmp_path])
    with pytest.raises(UsageError, match="there are no shards to count in"):
        corpus.count([], FACTS)


def test_globs_folders_and_files_are_taken_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt.gz", "d.csv"):
        (tmp_path / name).write_bytes(b"")
    found = corpus.files([tmp_path / "*.jsonl", tmp_path, tmp_path / "b.jsonl"])
    assert [file.name for file in found] == ["a.jsonl", "b.jsonl", "c.txt.gz"]


@pytest.mark.parametrize("package", ["ahocorasick_rs", "zstandard"])
def test_a_package_that_is_lacking_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    file = written(tmp_path, "jsonl.zst")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingExtra, match=rf"needs {package}, which is not installed: pip install 'impasto\[corpus\]'"
    ):
        corpus.count(corpus.files([file]), FACTS)


# ── interrupted and continued ────────────────────────────────────────────────────────────────────────────────────


class Stop(Exception):
    pass


def read_parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read from now on."""
    seen: list[str] = []
    real = counting.documents

    def documents(part, **options):
        seen.append(Path(part.path).name)
        return real(part, **options)

    monkeypatch.setattr(counting, "documents", documents)
    monkeypatch.setattr(counting, "_first_documents", lambda part, rules: ())
    return seen


def test_a_count_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        (tmp_path / f"{number}.jsonl").write_text(rows_of(DOCUMENTS))
    shards, kept = corpus.files([tmp_path]), tmp_path / "kept"
    undisturbed = corpus.count(shards, FACTS)
    size = shards[0].stat().st_size

    def stop(done: int, total: int) -> None:
        if done > 2 * size:
            raise Stop

    with pytest.raises(Stop):
        corpus.count(shards, FACTS, kept=kept, progress=stop)
    with kept.open("a") as file:
        file.write('{"part": ["cut off by a cra')
    seen = read_parts(monkeypatch)
    heard: list[int] = []
    resumed = corpus.count(shards, FACTS, kept=kept, progress=lambda done, total: heard.append(done))
    assert seen == ["2.jsonl", "3.jsonl"] and heard[0] == 2 * size
    assert (resumed.together, resumed.documents) == (undisturbed.together, undisturbed.documents)
    seen.clear()
    assert corpus.count(shards, FACTS, kept=kept).together == undisturbed.together and seen == []
    (tmp_path / "4.jsonl").write_text(rows_of(DOCUMENTS))
    os.utime(tmp_path / "1.jsonl", ns=(1, 1))
    more = corpus.count(corpus.files([tmp_path]), FACTS, kept=kept)
    assert seen == ["1.jsonl", "4.jsonl"] and more.together[0] == 5 * TRUTH["phrase"][0]
    assert corpus.count(shards[:1], FACTS, kept=kept).together[0] == TRUTH["phrase"][0]


def test_what_is_kept_belongs_to_its_pairs_and_rules(tmp_path: Path) -> None:
    shards, kept = corpus.files([written(tmp_path, "jsonl")]), tmp_path / "kept"
    corpus.count(shards, FACTS, kept=kept)
    for pairs, rules in ((FACTS[:2], Rules()), (FACTS, Rules(match="all_words")), (FACTS, Rules(ignore_case=True))):
        with pytest.raises(UsageError) as caught:
            corpus.count(shards, pairs, rules=rules, kept=kept)
        assert str(caught.value) == (
            f"{kept} belongs to a count of other pairs or by other rules: delete it, or choose another output"
        )


def test_a_worker_that_dies_is_replaced_once(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text(rows_of(DOCUMENTS * 30))
    shards, killed = corpus.files([tmp_path]), []

    def kill(done: int, total: int) -> None:
        import multiprocessing

        if not killed and done > 0:
            killed.append(multiprocessing.active_children()[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    counts = corpus.count(shards, FACTS, workers=2, progress=kill)
    assert killed and counts.together[0] == 90 * TRUTH["phrase"][0]


def test_ctrl_c_ends_the_workers_and_leaves_what_is_finished(tmp_path: Path) -> None:
    for number in range(24):
        (tmp_path / f"{number}.jsonl").write_text(rows_of(DOCUMENTS * 80))
    (tmp_path / "pairs.tsv").write_text("Danielle Darrieux\tFrench\n")
    line = ["-m", "impasto", "corpus", "count", str(tmp_path / "*.jsonl"), "--pairs", str(tmp_path / "pairs.tsv")]
    line += ["--workers", "2", "-o", str(tmp_path / "out.json")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = subprocess.Popen(
        [sys.executable, *line],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # which is ignored where tests run in background
    )
    kept = tmp_path / "out.json.kept"
    while running.poll() is None and (not kept.exists() or kept.read_text().count("\n") < 3):
        threading.Event().wait(0.02)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "stopped; everything measured is kept. To continue: impasto corpus count" in errors
    assert "Traceback" not in errors
    assert main([*line[2:]]) == 0
    assert corpus.frequencies(tmp_path / "out.json") == {FACTS[0]: 24 * 80 * TRUTH["phrase"][0]}


# ── plans, files, the command ────────────────────────────────────────────────────────────────────────────────────


def test_a_plan_knows_the_size_of_the_corpus_and_what_is_done(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number:02}.jsonl").write_text(rows_of(DOCUMENTS * 10) + "{\n" * 50)
    shards, kept = corpus.files([tmp_path]), tmp_path / "kept"
    plan = corpus.plan(shards, FACTS)
    size = sum(file.stat().st_size for file in shards)
    assert (plan.files, plan.bytes, plan.kept, plan.documents) == (12, size, 0, 12 * 350)
    assert plan.broken == pytest.approx(50 / 400)
    assert plan.speed > 0 and plan.sampled == size * 8 // 12
    assert plan.seconds(2) == pytest.approx(size / 1e6 / plan.speed / 2)
    corpus.count(shards[:3], FACTS, kept=kept)
    assert corpus.plan(shards, FACTS, kept=kept).kept == size // 4
    brief = corpus.plan(shards, FACTS, seconds=0.0)
    assert 0 < brief.sampled < plan.sampled


@pytest.mark.parametrize("name", ["counts.json", "counts.jsonl"])
def test_counts_are_written_and_read_again(tmp_path: Path, name: str) -> None:
    counts = corpus.count(corpus.files([written(tmp_path, "jsonl")]), FACTS)
    corpus.write(counts, tmp_path / "deep" / name)
    assert corpus.frequencies(tmp_path / "deep" / name) == counts.frequencies
    assert [file.name for file in (tmp_path / "deep").iterdir()] == [name]
    if name == "counts.json":
        about = json.loads((tmp_path / "deep" / name).read_text())
        assert about["rules"] == {"match": "phrase", "ignore_case": False, "field": "text", "unit": "block"}
        assert about["documents"] == 35 and about["broken"] == 0 and about["bytes"] == counts.bytes
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(UsageError, match="no.json holds no counts: make them with `impasto corpus count`"):
        corpus.frequencies(tmp_path / "no.json")
    with pytest.raises(UsageError, match="no counts in .*nowhere.json: No such file"):
        corpus.frequencies(tmp_path / "nowhere.json")


def test_pairs_come_from_json_lines_and_tables(tmp_path: Path) -> None:
    file = tmp_path / "pairs"
    file.write_text(
        '{"subject": "A", "answer": "x"}\n\n{"subject": "B", "target_true": "y", "case_id": 3}\nC c\tz\nA\tx\n'
    )
    assert corpus.read_pairs(file) == (Pair("A", "x"), Pair("B", "y"), Pair("C c", "z"))
    for text, problem in (
        ("", "is empty: give lines with a subject and its answer"),
        ("A x\n", "line 1 of .* is neither a JSON object nor subject and answer with a tab between"),
        ('A\tx\n{"subject": "A"}\n', "line 2 of .* lacks the texts subject and answer"),
        ('{"subject"\n', "line 1 of .* is no JSON"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=problem):
            corpus.read_pairs(file)
    with pytest.raises(UsageError, match="no file nowhere with pairs"):
        corpus.read_pairs("nowhere")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "jsonl")
    Path("pairs.tsv").write_text("".join(f"{pair.subject}\t{pair.answer}\n" for pair in FACTS))
    line = ["corpus", "count", "*.jsonl", "--pairs", "pairs.tsv", "--match", "all_words", "--workers", "1"]
    assert main([*line, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert re.search(r"time +about .* on 1 free core", planned)
    assert not Path("counts.json").exists() and not Path("counts.json.kept").exists()
    assert "counted by an earlier run" not in planned
    assert main(line) == 0
    said = capsys.readouterr()
    assert main([*line, "--dry-run"]) == 0
    assert "1 file, 3.0 kB, 3.0 kB counted by an earlier run" in capsys.readouterr().out
    assert re.search(r"corpus +3\.0 kB, 35 documents, 0 broken lines", said.out)
    assert re.search(r"pairs +5 *\n +never +2", said.out)
    assert said.out.endswith("counts: counts.json\n")
    assert Counter(corpus.frequencies("counts.json").values()) == Counter({14: 1, 7: 2, 0: 2})
    assert main([*line, "-o", "x.csv"]) == 2
    assert capsys.readouterr().err == "error: counts are written as .json or .jsonl, not as x.csv\n"


def test_the_output_may_lie_among_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "jsonl")
    Path("pairs").write_text("Danielle Darrieux\tFrench\n")
    for _ in range(2):
        assert main(["corpus", "count", ".", "--pairs", "pairs", "--workers", "1"]) == 0
    about = json.loads(Path("counts.json").read_text())
    assert (about["documents"], about["broken"]) == (35, 0)


def test_the_facts_of_the_task_are_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"case_id": 1, "prompt": "The mother tongue of Danielle Darrieux is", "subject": "Danielle Darrieux"}
    (tmp_path / "counterfact").mkdir()
    facts = json.dumps({**row, "target_true": "French", "paraphrase_prompt": []}) + "\n"
    (tmp_path / "counterfact" / "x.jsonl").write_text(facts * 2)
    monkeypatch.setenv("IMPASTO_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["corpus", "count", str(written(tmp_path, "txt"))]) == 0
    assert corpus.frequencies("counts.json") == {FACTS[0]: TRUTH["phrase"][0]}


def test_no_heavy_package_is_imported() -> None:
    program = (
        "import sys, impasto.corpus\n"
        "assert not {'torch', 'transformers', 'lm_eval', 'datasets', 'pyarrow', 'ahocorasick_rs'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0

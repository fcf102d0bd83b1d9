"""The command line: its surface, its words, its exit codes, and every command on a tiny model."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.main import get_command

import impasto
from impasto import __version__, console
from impasto.cli import app, loading, main, options, understood
from impasto.cli.show import ranges
from impasto.cli.study import comparison_folder
from impasto.cli.tasks import matching
from impasto.errors import MissingExtra, NotationError, UnknownTask, UsageError
from impasto.result import Answer, Estimate, Page, Result
from impasto.tasks import TaskInfo

sys.path.insert(0, str(Path(__file__).parent))

SOURCES = Path(impasto.__file__).resolve().parents[1]
LOADING = "--attn-implementation --device --device-map --dtype --revision --trust-remote-code"
SPLIT = f"{LOADING} --tp-plan"

SURFACE = {
    "": "--debug --version",
    "study": "",
    "study painters": f"[MODEL] --batch-size --dry-run --include-path --limit --methods --output --protocol --ray --seeds "
    f"--tasks --workers -o {SPLIT}",
    "study laser": f"[MODEL] --batch-size --compose --dry-run --frequencies --include-path --layers --limit --masking "
    f"--output --protocol --ray --rhos --screen --seed --select --tasks --text --types --workers -o {LOADING}",
    "show": f"MODEL --schedule -s {LOADING}",
    "run": f"MODEL PROMPT --chat --edit --kv --max-new-tokens --schedule -e -s {SPLIT}",
    "eval": f"MODEL --apply-chat-template --batch-size --dry-run --edit --include-path --kv --limit --masking "
    f"--num-fewshot --output --ray --schedule --seed --tasks --workers -e -o -s {SPLIT}",
    "bench": f"MODEL --accuracy --batch-sizes --compile --contexts --edit --mode --new-tokens "
    f"--output --peers --rounds --schedule -e -o -s {LOADING}",
    "corpus": "",
    "corpus count": "SHARDS... --documents --dry-run --field --ignore-case --match --output --pairs --workers -o",
    "report": "FOLDER --output -o",
    "tasks": "[PATTERN] --include-path",
    "fetch": "[NAMES]...",
}


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, no colours, nothing written outside the test's own folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IMPASTO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tiny import tiny_folder

    return str(tiny_folder(tmp_path_factory.mktemp("models") / "tiny"))


Spoken = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Spoken:
    """Runs a command line; gives its exit code, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(arguments)
        return code, *capsys.readouterr()

    return run


def commands(command: Any = None, path: str = "") -> Iterator[tuple[str, Any]]:
    command = command or get_command(app)
    yield path, command
    for name, member in getattr(command, "commands", {}).items():
        yield from commands(member, f"{path} {name}".strip())


# ── the surface ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_commands_and_options_are_these_and_no_others() -> None:
    found = {}
    for path, command in commands():
        names = []
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                names.append(str(parameter.metavar))
            else:
                names += [name for name in parameter.opts if name != "--help"]
        found[path] = set(names)
    assert found == {path: set(names.split()) for path, names in SURFACE.items()}


MAY_DIFFER = {"--kv", "--limit", "--output", "--protocol", "--schedule", "--seed", "--workers"}


def test_every_option_that_stands_twice_says_the_same() -> None:
    texts: dict[str, set[str]] = {}
    for path, command in commands():
        for parameter in command.params:
            if parameter.param_type_name == "option" and path:
                texts.setdefault(parameter.opts[0], set()).add(parameter.help or "")
    assert {name for name, helps in texts.items() if len(helps) > 1} <= MAY_DIFFER
    assert all(text for helps in texts.values() for text in helps)


@pytest.mark.parametrize("path", [path for path in SURFACE if path not in ("study", "corpus")])
def test_help_teaches_by_examples_that_parse(path: str, say: Spoken) -> None:
    code, text, errors = say(*path.split(), "--help")
    assert (code, errors) == (0, "")
    assert "Usage: impasto" in text
    examples = re.findall(r"^ *(impasto .*?)(?:  .*)?$", text.split("Examples:")[1].split("╭")[0], re.M)
    assert examples
    for example in examples:
        name, *arguments = shlex.split(example.partition(" | ")[0])
        assert name == "impasto"
        parsed(arguments)


@pytest.mark.parametrize("path", SURFACE)
def test_help_fits_80_columns(path: str, say: Spoken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, text, _ = say(*path.split(), "--help")
    for parameter in dict(commands())[path].params:
        for name in (*parameter.opts, *parameter.secondary_opts):
            assert not name.startswith("--") or re.search(rf"{name}(?![\w…-])", text), name  # none is cut
    assert "<bool>" not in text  # a flag takes no value
    examples = text.partition("Examples:")[2].partition("╭")[0]
    assert all(line.strip().startswith("impasto ") for line in examples.splitlines() if line.strip())  # none is broken


def test_a_wrong_method_is_told_before_a_model_is_loaded(say: Spoken) -> None:
    code, text, errors = say("study", "painters", "no/model", "--methods", "revers")
    assert (code, text) == (2, "")
    assert errors.startswith("error: no method 'revers'; did you mean 'reverse'? (there are skip_one, ")


@pytest.mark.parametrize("study", ["painters", "laser"])
def test_a_wrong_task_is_told_before_a_folder_is_made_or_a_model_loaded(study: str, say: Spoken) -> None:
    code, text, errors = say("study", study, "no/model", "--tasks", "impasto_tiny_choise", "-o", "run")
    assert (code, text) == (2, "")
    assert errors.startswith("error: no task 'impasto_tiny_choise'; the nearest: impasto_tiny_choice")
    code, _, errors = say("study", study, "no/model", "--include-path", "nowhere", "-o", "run")
    assert code == 2 and errors.startswith("error: no folder nowhere to include tasks from")
    assert not Path("run").exists()


def test_the_parser_says_what_is_wrong_without_its_own_jargon(say: Spoken) -> None:
    _, _, errors = say("bench", "demo", "--mode", "quick")
    assert "'quick' is not one of 'auto', 'plain', 'fast'" in errors and "Value error" not in errors


@pytest.mark.parametrize("given", [["--input-len", "16"], ["--input_len=16"], ["--contexts", "16"]])
def test_bench_takes_the_names_of_vllm(given: list[str]) -> None:
    tidy, _ = understood(["bench", "demo", *given])
    assert " ".join(tidy).replace("=", " ") == "bench demo --contexts 16"


def parsed(arguments: list[str]) -> None:
    """Parse a command line down to its command, without running it."""
    command, name = get_command(app), "impasto"
    while True:
        context = command.make_context(name, list(arguments))
        if not getattr(command, "commands", None):
            return
        name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])


def test_the_version(say: Spoken) -> None:
    assert say("--version") == (0, f"impasto {__version__}\n", "")


@pytest.mark.parametrize("path", ["", "study"])
def test_without_arguments_there_is_help(path: str, say: Spoken) -> None:
    code, text, errors = say(*path.split())
    assert (code, errors) == (0, "")
    assert "Commands" in text and "painters" in text


def separately(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys; from impasto.cli import main; code = main(['eval', '--help'])\n"
        "assert not {'torch', 'transformers', 'lm_eval', 'numpy', 'altair'} & set(sys.modules), 'heavy'\n"
        "sys.exit(code)"
    )
    done = separately("-c", program)
    assert done.returncode == 0, done.stderr


def test_the_module_is_the_command() -> None:
    done = separately("-m", "impasto", "--version")
    assert done.stdout == f"impasto {__version__}\n"


def test_underscores_are_dashes_and_debug_may_stand_anywhere() -> None:
    given = ["eval", "some_model", "--num_fewshot=3", "--include_path", "my_tasks", "--debug"]
    assert understood(given) == (["eval", "some_model", "--num-fewshot=3", "--include-path", "my_tasks"], True)
    assert understood(["run", "m", "--", "--debug"]) == (["run", "m", "--", "--debug"], False)


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────

HUB = (
    "error: cannot reach the hub for 'some/model', and it is not in the hub's cache here: "
    "give a local folder, a .gguf file or `demo`\n"
)
CARET = """error: there is no layer 43 in a model of 4 layers"""


@pytest.mark.parametrize(
    ("line", "code", "text"),
    [
        ("shwo x", 2, "error: No such command 'shwo'"),
        ("show", 2, "error: Missing argument 'MODEL' (`impasto show --help` says what there is)\n"),
        ("show x --depth 3", 2, "error: No such option: --depth (`impasto show --help` says what there is)\n"),
        ("eval x --limit none --tasks a", 2, "error: Invalid value for '--limit'"),
        ("eval x -s 0:2", 2, "error: no tasks: name some with --tasks lambada_openai,hellaswag "),
        ("eval x --tasks a --batch-size many", 2, "error: --batch-size is `auto` or a number of tokens, at least 1"),
        ("run x ''", 2, "error: the prompt is empty: give some text to go on from\n"),
        ("run x hello", 2, "error: nothing to compare: give a schedule (-s '0:8 12:18') or an edit "),
        ("run x hello -s ''", 2, "error: "),
        ("run x hello -s '0:8 12'; --kv both", 2, "error: "),
        ("fetch everything", 2, "error: nothing called 'everything' can be fetched; there is: demo, benchmarks\n"),
        ("show ./nothing.gguf", 2, "error: no model './nothing.gguf': no such file or folder"),
        ("show some/model", 1, HUB),
        ("show x --device tpu9", 2, "error: no device 'tpu9': one of auto, cpu, cuda, cuda:1, mps\n"),
        ("show x --dtype int3", 2, "error: unknown dtype 'int3': one of auto, float32, bfloat16, float16\n"),
        ("report nowhere", 1, "error: no results in nowhere: there is no file results.sqlite. Is it a run folder?\n"),
    ],
)
def test_errors_are_one_clear_line(line: str, code: int, text: str, say: Spoken) -> None:
    got, output, errors = say(*shlex.split(line))
    assert output == ""
    last = errors[errors.index("error: ") :]
    assert last.startswith(text)
    assert got == code
    assert last.count("\n") == 1 or "run x hello -s" in line
    assert "Traceback" not in errors


SEVERAL = "splits every layer over several processes, and this is one: start them with `torchrun --nproc-per-node N -m impasto ...`"


@pytest.mark.parametrize(
    ("line", "processes", "text"),
    [
        ("run none hello -s 0", 1, f"--tp-plan {SEVERAL}"),
        ("eval none --tasks impasto_tiny_choice", 1, f"--tp-plan {SEVERAL}"),
        (
            "study painters none --device-map auto",
            2,
            "give --device-map or --tp-plan, not both: the one spreads whole layers, the other splits each",
        ),
        (
            "eval none --tasks impasto_tiny_choice --ray local",
            2,
            "--ray gives each worker one device, and --tp-plan several: leave one of them away",
        ),
    ],
)
def test_what_does_not_go_with_several_processes_is_refused_at_once(
    line: str, processes: int, text: str, tmp_path: Path, say: Spoken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert say(*line.split(), "--tp-plan", "auto") == (2, "", f"error: {text}\n")
    assert list(tmp_path.iterdir()) == []


def test_other_processes_of_torchrun_say_nothing_but_what_went_wrong(
    model: str, say: Spoken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("impasto.cli.loading.Loading.load", lambda *_: pytest.fail("loaded"))
    line = ["eval", model, "--tasks", "impasto_none"]
    for rank, who in (("0", ""), ("1", "process 1: ")):
        monkeypatch.setenv("RANK", rank)
        code, text, errors = say(*line, "--tp_plan=auto")
        assert (code, text) == (2, "")
        assert errors.splitlines()[-1].startswith(f"error: {who}no task") and (len(errors.splitlines()) > 1) == (
            not who
        )
        assert say("run", "demo", "--tp-plan", "auto", "--help")[1] == ("" if who else say("run", "demo", "--help")[1])
    assert say(*line)[2].splitlines()[-1].startswith("error: no task")  # not asked for: whatever the environment says


def test_an_unknown_task_is_refused_before_the_model_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, say: Spoken
) -> None:
    def build(names: list[str], **_: Any) -> None:
        raise UnknownTask(f"no task {names[0]!r}; the nearest: piqa")

    monkeypatch.setattr("impasto.tasks.build", build)
    code, _, errors = say("eval", "no-such-model", "--tasks", "pica,lambada")
    assert code == 2
    assert errors == "reading the tasks\nerror: no task 'pica'; the nearest: piqa\n"


def test_a_schedule_that_is_none_is_refused_before_the_model_is_looked_for(say: Spoken) -> None:
    code, _, errors = say("run", "no-such-model", "hello", "-s", "0:8 12-14")
    assert code == 2
    assert errors.splitlines()[1] == "  0:8 12-14"
    assert errors.splitlines()[2].strip("^ ") == ""
    assert "loading" not in errors


def test_a_schedule_for_another_depth_points_at_the_layer(model: str, say: Spoken) -> None:
    code, output, errors = say("show", model, "-s", "0:2 43")
    assert (code, output) == (2, "")
    lines = errors[errors.index("error: ") :].splitlines()
    assert lines[1:3] == ["  0:2 43", "      ^^"]
    assert lines[0] == "error: layer 43 does not exist: this model has layers 0..3"


def test_an_unexpected_error_is_one_line_and_debug_shows_more(monkeypatch: pytest.MonkeyPatch, say: Spoken) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by [red]zero\nmore")

    monkeypatch.setattr(loading.Loading, "load", broken)
    code, output, errors = say("show", "x")
    assert (code, output) == (1, "")
    assert errors == "error: unexpected ZeroDivisionError: by [red]zero (--debug shows the traceback)\n"
    for arguments in (("--debug", "show", "x"), ("show", "x", "--debug")):
        code, _, errors = say(*arguments)
        assert code == 1
        assert errors.startswith("Traceback (most recent call last):\n")
        assert "in broken" in errors


@pytest.mark.parametrize(
    ("problem", "code", "text"),
    [
        (MissingExtra("ray", "cluster", "--ray"), 1, "--ray needs ray, which is not installed: pip install "),
        (MemoryError(), 1, "out of memory: try --dtype bfloat16, a smaller model or another device"),
        (OSError(28, "No space left on device", "report.html"), 1, "No space left on device: report.html"),
        (UsageError("no"), 2, "no"),
    ],
)
def test_each_failure_has_its_words(
    problem: Exception, code: int, text: str, monkeypatch: pytest.MonkeyPatch, say: Spoken
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise problem

    monkeypatch.setattr(loading.Loading, "load", broken)
    got, _, errors = say("show", "x")
    assert got == code
    assert errors.startswith(f"error: {text}")
    assert errors.count("\n") == 1


def test_a_store_of_a_newer_version(tmp_path: Path, say: Spoken) -> None:
    import sqlite3

    from impasto.store import FILENAME, Store

    Store(tmp_path / "run").close()
    with sqlite3.connect(tmp_path / "run" / FILENAME) as db:
        db.execute("PRAGMA user_version = 99")
    for line in ("report run", "eval x --tasks impasto_tiny_choice -s 0:2 -o run", "study painters x -o run"):
        code, _, errors = say(*line.split())
        assert code == 1
        assert "was written by a newer impasto (format 99" in errors
        assert errors.count("\n") <= 2


def test_an_output_that_cannot_be_made(tmp_path: Path, say: Spoken) -> None:
    (tmp_path / "file").write_text("")
    code, _, errors = say("study", "painters", "x", "--output", "file/run")
    assert code == 1
    assert errors == "error: cannot make the run folder file/run (Not a directory): choose another one with --output\n"


# ── Ctrl-C ───────────────────────────────────────────────────────────────────────────────────────────────────────


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, say: Spoken) -> None:
    monkeypatch.setattr(loading.Loading, "load", interrupt)
    code, output, errors = say("study", "painters", "my model", "--limit", "7", "--output", "run")
    assert (code, output) == (130, "")
    assert errors == (
        "stopped; everything measured is kept. To continue: impasto study painters 'my model' --limit 7 --output run\n"
    )
    code, _, errors = say("show", "x")
    assert (code, errors) == (130, "stopped\n")


def test_ctrl_c_under_torchrun_says_how_to_go_on_there(monkeypatch: pytest.MonkeyPatch, say: Spoken) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("impasto.cli.loading.Loading.load", stop)
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = ["eval", "demo", "--tasks", "impasto_tiny_choice", "--tp-plan", "auto"]
    code, _, errors = say(*line)
    assert code == 130
    assert errors.splitlines()[-1].endswith(f"To continue: torchrun --nproc-per-node 2 -m impasto {' '.join(line)}")
    monkeypatch.setenv("RANK", "1")
    assert say(*line) == (130, "", "")


def test_ctrl_c_while_scoring_keeps_the_run_and_notes_it(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Spoken
) -> None:
    from impasto.store import Store

    line = ["eval", model, "-s", "0:3", "--tasks", "impasto_tiny_choice", "--limit", "4", "-o", "run"]
    with monkeypatch.context() as patch:
        patch.setattr("impasto.evaluate.evaluate", interrupt)
        code, _, errors = say(*line)
    assert code == 130
    assert errors.endswith(f"To continue: {shlex.join(['impasto', *line])}\n")
    assert say(*line)[0] == 0
    with Store(tmp_path / "run", readonly=True) as store:
        assert [run.outcome for run in store.runs()] == ["interrupted", "finished"]


# ── words and numbers ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[red]x[/]", "[red]x[/]"),
        ("a\x1b[31mb", "a\ufffd[31mb"),
        ("a\r\nb\tc", "a\nb\tc"),
        ("\x9b1m\u202e\ud800", "\ufffd1m\ufffd\ufffd"),
    ],
)
def test_texts_cannot_steer_the_terminal(text: str, expected: str) -> None:
    screen = Console(width=60, force_terminal=True, color_system=None, record=True, markup=False)
    screen.print(console.plain(text))
    assert screen.export_text().rstrip("\n").expandtabs() == expected.expandtabs()


def test_errors_and_notes_are_not_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.fail("no [bold]model[/bold] \x1b[31m")
    console.note("a [red]note :smile:")
    assert capsys.readouterr().err == "error: no [bold]model[/bold] \ufffd[31m\nnote: a [red]note :smile:\n"


def test_numbers_as_people_read_them() -> None:
    assert [console.duration(s) for s in (0.04, 1, 99, 100, 3600, 9000)] == [
        "0.0 s", "1 s", "99 s", "2 min", "60 min", "2.5 h",
    ]  # fmt: skip
    assert [console.size(s) for s in (0, 999, 1000, 18_432, 253_113_024, 1.4e9)] == [
        "0 B", "999 B", "1.0 kB", "18 kB", "253 MB", "1.4 GB",
    ]  # fmt: skip
    assert [console.amount(n) for n in (640, 9_280, 37_120, 5_570_000, 167_772_160, 1.24e9)] == [
        "640", "9,280", "37.12 k", "5.57 M", "167.8 M", "1.24 B",
    ]  # fmt: skip


def test_ranges_are_written_as_in_schedules() -> None:
    assert ranges([0, 1, 2, 4, 6, 7]) == "0:3 4 6:8"
    assert ranges([]) == ""


def test_letters_do_not_run_out() -> None:
    assert evaluate_module().letters(28)[-3:] == ["Z", "A2", "B2"]


@pytest.mark.parametrize(
    ("low", "high", "higher", "style"),
    [
        (0.1, 0.3, True, "green"),
        (0.1, 0.3, False, "red"),
        (-0.3, -0.1, False, "green"),
        (-0.3, -0.1, True, "red"),
        (-0.1, 0.3, False, ""),
    ],
)
def test_a_difference_is_green_where_it_is_better(low: float, high: float, higher: bool, style: str) -> None:
    module = evaluate_module()
    row = module.Row(Estimate(1.0), Estimate((low + high) / 2, low, high))
    assert module._difference(row, higher=higher)[0].style == style


def evaluate_module() -> types.ModuleType:
    return sys.modules["impasto.cli.evaluate"]


def test_batch_size() -> None:
    assert options.batch_tokens("auto") is None
    assert options.batch_tokens("4096") == 4096
    for text in ("0", "-3", "1.5", ""):
        with pytest.raises(UsageError, match="--batch-size is `auto` or a number"):
            options.batch_tokens(text)


@pytest.mark.parametrize("text", ["-1", "8:", "-4:", "{-2 -1}"])
def test_texts_that_need_the_depth_wait_for_the_model(text: str) -> None:
    loading.check_texts([text])


@pytest.mark.parametrize("text", ["", "0:8 x", "{1", "1 2}", "16x0"])
def test_texts_that_no_depth_could_mend_do_not(text: str) -> None:
    with pytest.raises(NotationError):
        loading.check_texts([text])


def test_run_folders_are_named_after_the_model(tmp_path: Path) -> None:
    (tmp_path / "my model").mkdir()
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    names = ("demo", "org/name", "my model", "some.gguf", "../..")
    assert [str(loading.run_folder(None, name, "eval")) for name in names[:4]] == [
        "impasto-runs/demo-eval",
        "impasto-runs/org-name-eval",
        "impasto-runs/my-model-eval",
        "impasto-runs/some-eval",
    ]
    assert loading.run_folder(None, names[4], "eval").parent == loading.RUNS
    assert loading.run_folder(Path("here"), "demo", "eval") == Path("here")


def test_text_in_a_terminal_breaks_between_words() -> None:
    screen = Console(width=20, force_terminal=True, color_system=None, record=True, markup=False, file=io.StringIO())
    stream = console.Stream(screen)
    pieces = ["The cap", "ital of Fr", "ance is\n\x1b[31mPar", "is, of which ", "one kn", "ows", "x" * 30]
    for piece in pieces:
        stream.write(piece)
    stream.end()
    lines = screen.export_text().splitlines()
    assert lines[:3] == ["The capital of ", "France is", "\ufffd[31mParis, of which "]
    assert "".join(lines).replace(" ", "") == "".join(pieces).replace(" ", "").replace("\n", "").replace(
        "\x1b", "\ufffd"
    )


def test_text_in_a_pipe_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    stream = console.Stream(console.output())
    stream.write("word " * 100)
    stream.end()
    assert capsys.readouterr().out == "word " * 100 + "\n"


# ── progress ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Time:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_plain_progress_is_sparse_and_tells_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    time = Time()
    with console.Lines(console.messages(), time) as progress:
        progress.share("scoring", 0.2)  # what an earlier run had done
        for step in range(1, 41):
            time.now += 1
            progress.share("scoring", 0.2 + 0.02 * step)
        progress.share("scoring", 1.0)
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 20%",
        "scoring: 40%, 30 s left",
        "scoring: 60%, 20 s left",
        "scoring: 80%, 10 s left",
        "scoring: 100%, 40 s",
    ]


def test_bytes_are_told_when_something_new_begins(capsys: pytest.CaptureFixture[str]) -> None:
    time = Time()
    with console.Lines(console.messages(), time) as progress:
        for done in range(0, 30_000_000, 1_000_000):
            progress.bytes("downloading", done, 30_000_000)
            time.now += 0.5
        progress.bytes("unpacking", 0, 0)
    assert capsys.readouterr().err.splitlines() == ["downloading", "downloading, 20 MB of 30 MB", "unpacking"]


def test_bars_in_a_terminal() -> None:
    time = Time()
    screen = Console(width=80, force_terminal=True, color_system=None, markup=False, stderr=True, record=True)
    screen.file = io.StringIO()
    with console.Bars(screen, time) as progress:
        progress.bytes("loading [red]x", 1_000_000, 2_000_000)
        progress._bars.refresh()
        time.now += 5
        progress.share("scoring", 0.0)
        time.now += 30
        progress.share("scoring", 0.25)
        progress._bars.refresh()
        progress.note("batch halved [red]")
        time.now += 90
        progress.share("scoring", 1.0)
    shown = screen.export_text()
    assert "loading [red]x" in shown and "1.0 MB of 2.0 MB" in shown
    assert re.search(r"scoring ━+ +25%  2 min left", shown)
    assert "note: batch halved [red]" in shown
    assert re.search(r"scoring ━+ 2 min\s*$", shown)


# ── the commands on a tiny model ─────────────────────────────────────────────────────────────────────────────────


def test_show(model: str, say: Spoken) -> None:
    code, text, _ = say("show", model, "-s", "0 {1 2} 1")
    assert code == 0
    for words in (
        "4 layers, 53.73 k parameters",
        "float32 on cpu, sdpa attention",
        "sequential (attn = self_attn, mlp = mlp)",
        "KV cache  512 B per token, 128 B in each layer",
        "256 tokens",
        "matrices of layers 0:4",
        "schedule: 0 {1 2} 1 (3 of 4 layers, 4 layer calls, depth 3)",
        "not used   layer 3, 9,280 parameters",
        "run again  layer 1",
        "512 B per token in 4 slots (100% of the model's)",
    ):
        assert words in text
    shares = [float(share) for share in re.findall(r"^(?:embedding|layers|head|the rest) .*?([\d.]+)%", text, re.M)]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert re.search(r"mlp\.down_proj +32 × 64 +2,048 +22\.1%", text)


def test_run_asks_for_too_much_before_it_prints_anything(model: str, say: Spoken) -> None:
    code, text, errors = say("run", model, "hello", "-s", "0:4", "--max-new-tokens", "1000000")
    assert (code, text) == (2, "")
    assert re.search(r"1000000 new tokens leave no room for a prompt in the model's window of \d+: ask for", errors)


def test_run(model: str, say: Spoken) -> None:
    code, text, _ = say("run", model, "say [red]this", "-s", "0:4", "--max-new-tokens", "5")
    assert code == 0
    lines = text.splitlines()
    assert lines[0] == "schedule: 0:4 (4 of 4 layers, 4 layer calls, depth 4)"
    head, _, below = text.partition("\nchanged\n")
    assert head.split("\noriginal\n")[1].strip("\n") == below.partition("\n\n")[0].strip("\n")  # the same schedule
    assert below.startswith("say [red]this")
    assert re.search(r"^original +[\d,.]+ tokens/s +[\d,.]+ tokens/s +\d", text, re.M)
    assert re.search(r"^ratio +[\d.]+ x +[\d.]+ x", text, re.M)


def test_run_with_an_edit_and_without_a_chat_template(model: str, say: Spoken) -> None:
    code, text, _ = say("run", model, "hello", "-e", "1.mlp.down_proj@0", "--max-new-tokens", "2")
    assert code == 0
    assert "edit: 1.mlp.down_proj@0" in text
    code, _, errors = say("run", model, "hello", "-s", "0:4", "--chat")
    assert code == 2
    assert errors.endswith(f"error: {model} has no chat template: leave --chat out\n")


def test_eval(model: str, tmp_path: Path, say: Spoken) -> None:
    line = ["eval", model, "-s", "0:3", "-s", "0 {1 2} 3", "-s", "0:3", "-o", "run"]
    line += ["--tasks", "impasto_tiny_choice,impasto_tiny_rolling"]
    code, text, _ = say(*line)
    assert code == 0
    assert "schedule A  0:3 (3 of 4 layers, 3 layer calls, depth 3)" in text
    assert "schedule B  0 {1 2} 3 (4 of 4 layers, 4 layer calls, depth 3)" in text
    assert "schedule C" not in text
    choice, rolling = text.split("impasto_tiny_rolling")
    assert re.search(r"acc, 0-shot, 24 examples, chance 0\.\d+, majority 0\.\d+", choice)
    assert re.search(r"^full model +0\.\d{3} +0\.\d{3} to 0\.\d{3} *$", choice, re.M)
    number = r"[+\u2212]\d\.\d{3}"
    assert re.search(rf"^A +0\.\d{{3}} +0\.\d{{3}} to 0\.\d{{3}} +{number} +{number} to {number} +1\.000", choice, re.M)
    assert "smaller is better" in rolling
    files = sorted((tmp_path / "run" / "lm-eval").rglob("results_*.json"))
    assert len(files) == 3
    schedules = {json.loads(file.read_text())["impasto"]["schedule"] for file in files}
    assert schedules == {"0:4", "0:3", "0 {1 2} 3"}
    again = say(*line)[1]
    assert again.split("results:")[0] == text.split("results:")[0]
    code, planned, _ = say(*line, "--dry-run")
    assert code == 0
    assert "0 requests in 0 batches" in planned


def test_a_dry_run_leaves_nothing_behind(model: str, tmp_path: Path, say: Spoken) -> None:
    code, text, _ = say("eval", model, "-s", "0:3", "--tasks", "impasto_tiny_choice", "--dry-run", "-o", "run")
    assert code == 0
    assert "recipes      2 (the full model is one)" in text
    assert re.search(r"layer calls +4 shared, 7 one by one", text)
    assert re.search(r"time +about \d", text)
    assert not (tmp_path / "run").exists()


def test_results_that_are_not_finite_are_said_to_be() -> None:
    info = {"metric": "acc,none"}
    full = Result("f", "t", "p", 4, {"acc,none": 0.5}, {"acc,none": (1.0, 0.0, 1.0, 0.0)}, info=info)
    broken = Result("b", "t", "p", 4, {"acc,none": float("nan")}, {"acc,none": (None,) * 4}, nonfinite=4, info=info)
    worse = Result("w", "t", "p", 4, {"acc,none": 0.0}, {"acc,none": (0.0,) * 4}, info=info)
    first, second, third = evaluate_module().rows([full, broken, worse])
    assert first.difference is None and first.p is None
    assert second.nonfinite == 4 and second.difference is None and second.p is None
    assert third.p == 0.5  # one test only, so nothing to correct
    assert third.difference is not None and third.difference.value == -0.5


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short list of tasks, as reading the real one takes seconds."""
    infos = [
        TaskInfo("mmlu", "group", "harness", "tests of many subjects\n[red]"),
        TaskInfo("mmlu_law", "multiple_choice", "harness", "law"),
        TaskInfo("piqa", "multiple_choice", "built-in", "everyday physics"),
        TaskInfo("mine", "generate_until", "include", "my own"),
    ]
    monkeypatch.setattr("impasto.tasks.available", lambda include: infos)


def test_tasks_in_a_pipe_are_lines_with_tabs(listed: None, say: Spoken) -> None:
    code, text, _ = say("tasks")
    assert code == 0
    assert text.splitlines() == [
        "mine\tgenerate_until\tinclude\tmy own",
        "piqa\tmultiple_choice\tbuilt-in\teveryday physics",
        "mmlu\tgroup\tharness\ttests of many subjects [red]",
        "mmlu_law\tmultiple_choice\tharness\tlaw",
    ]
    code, _, errors = say("tasks", "no-such-task")
    assert code == 2
    assert "error: no task matches 'no-such-task'; `impasto tasks` lists those that need no hub\n" in errors


def test_tasks_in_a_terminal_are_tables(listed: None, monkeypatch: pytest.MonkeyPatch, say: Spoken) -> None:
    monkeypatch.setattr(console, "output", lambda: Console(width=80, force_terminal=True, color_system=None))
    code, text, _ = say("tasks")
    assert code == 0
    assert [line.rstrip() for line in text.splitlines()] == [
        "your own  kind            about",
        "mine      generate_until  my own",
        "",
        "built in, no hub needed  kind             about",
        "piqa                     multiple_choice  everyday physics",
        "",
        "and 2 of the evaluation harness, which need the hub: `impasto tasks PATTERN`",
        "searches them",
    ]
    assert "of the evaluation harness  kind" in say("tasks", "mmlu*")[1]


def test_what_needs_no_hub_comes_first() -> None:
    infos = [
        TaskInfo("arc_a", "multiple_choice", "harness", ""),
        TaskInfo("arc_z", "multiple_choice", "built-in", ""),
        TaskInfo("my_arc", "multiple_choice", "include", ""),
        TaskInfo("other", "group", "harness", ""),
    ]
    assert [info.name for info in matching(infos, "ARC")] == ["my_arc", "arc_z", "arc_a"]
    assert [info.name for info in matching(infos, "arc*")] == ["arc_z", "arc_a"]
    assert len(matching(infos, None)) == 4


def test_fetch_without_names_is_everything(monkeypatch: pytest.MonkeyPatch, say: Spoken) -> None:
    asked = []

    def ensure(name: str, **_: Any) -> Path:
        asked.append(name)
        return Path("cache") / name

    monkeypatch.setattr("impasto.fetch.ensure", ensure)
    assert say("fetch")[:2] == (0, "demo: cache/demo\nbenchmarks: cache/benchmarks\n")
    assert asked == ["demo", "benchmarks"]
    assert say("fetch", "benchmarks")[1] == "benchmarks: cache/benchmarks\n"


# ── the study, with the measuring replaced ───────────────────────────────────────────────────────────────────────

PAGE = Page(
    title="Painters",
    subtitle="tiny, 4 layers",
    answers=(
        Answer(
            key="order",
            question="Does the order [of layers] matter?",
            verdict="yes",
            effect="Reversing costs 0.31 of the normalised score.",
            estimate=Estimate(-0.31, -0.4, -0.2),
            unit="normalised score",
            paper="yes, on another model",
            rule="the interval is below zero",
        ),
    ),
    figures=(),
    notes=("The study is [not] complete.",),
    facts={},
)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A study that measures nothing; what it was asked is in the mapping."""
    asked: dict[str, Any] = {}

    def run_painters(loaded: Any, **options: Any) -> Page:
        asked.update(options, layers=loaded.layers)
        options["progress"]("skip one", 0.5)
        options["note"]("token budget halved to 8")
        with options["noted"]:
            pass
        (run,) = options["store"].runs()
        assert (run.outcome, run.seconds is None) == ("finished", False), "a page tells the time of its own run"
        return PAGE

    def dry_run_painters(loaded: Any, **options: Any) -> Any:
        asked.update(options)
        numbers = {"recipes": 12, "layer_calls": 400, "shared_calls": 90, "tokens": 5000, "shared_tokens": 4000}
        return types.SimpleNamespace(**numbers, seconds=75.0, naive_seconds=500.0, bytes=3_000_000, rows=(("a", 24),))

    monkeypatch.setattr("impasto.fetch.ensure", lambda name, **_: Path(name))
    module = types.ModuleType("impasto.studies.run")
    module.__dict__.update(run_painters=run_painters, dry_run_painters=dry_run_painters, page_of=lambda folder: PAGE)
    monkeypatch.setitem(sys.modules, "impasto.studies.run", module)
    return asked


TWO = "impasto_tiny_choice, impasto_tiny_rolling"


def test_a_study_ends_with_its_answers(model: str, tmp_path: Path, measured: dict[str, Any], say: Spoken) -> None:
    line = ["study", "painters", model, "--protocol", "standard", "--tasks", TWO, "--limit", "3", "--seeds", "2"]
    code, text, errors = say(*line, "--methods", "skip", "--batch-size", "512")
    assert code == 0
    assert "note: token budget halved to 8" in errors
    assert text.splitlines()[:2] == ["Painters", "tiny, 4 layers"]
    assert re.search(r"✓ yes +Does the order \[of layers\] matter\?", text)
    assert re.search(r"^ +Reversing costs 0.31 of the normalised score.$", text, re.M)
    assert re.search(r"^ +the paper: yes, on another model *$", text, re.M)
    assert re.search(r"^! +The study is \[not\] complete. *$", text, re.M)
    folder = Path("impasto-runs/tiny-painters-standard")
    assert text.splitlines()[-1] == f"report: {folder / 'report.html'}"
    assert (tmp_path / folder / "report.html").exists() and (tmp_path / folder / "results.sqlite").exists()
    wanted = {"protocol": "standard", "task_names": TWO.split(", "), "limit": 3, "seeds": 2, "methods": ["skip"]}
    assert {name: measured[name] for name in wanted} == wanted
    assert measured["batch_tokens"] == 512 and measured["include"] == ()
    assert say("report", str(folder))[1] == text
    assert say("report", str(folder), "-o", "elsewhere")[1].splitlines()[-1] == "report: elsewhere/report.html"


def test_reports_of_several_runs_are_one_page(tmp_path: Path, say: Spoken, monkeypatch: pytest.MonkeyPatch) -> None:
    from impasto.store import Store

    asked: list[Any] = []

    def compare(runs: Any) -> Page:
        asked.append(runs)
        return PAGE

    monkeypatch.setattr("impasto.studies.compare.compare", compare)
    runs = [Path("runs/a"), Path("runs/b")]
    for folder in runs:
        Store(folder).close()
    code, text, _ = say("report", *map(str, runs))
    assert (code, asked) == (0, [runs])
    assert text.splitlines()[-1] == "report: impasto-runs/comparison-a-b/report.html"
    assert (tmp_path / "impasto-runs/comparison-a-b/report.html").exists()
    assert say("report", *map(str, runs), "--output", "both")[1].splitlines()[-1] == "report: both/report.html"
    code, _, errors = say("report", *map(str, runs), "-o", "runs/../runs/b")
    problem = "runs/../runs/b is one of the runs, and has a page of its own: choose another --output"
    assert (code, errors.splitlines()[-1]) == (2, f"error: {problem}")
    assert say("report", "runs/a", "nowhere")[0] == 1 and len(asked) == 2
    long = comparison_folder([Path("x" * 90), Path("y" * 90)])
    assert re.fullmatch("comparison-[0-9a-f]{16}", long.name) and len(long.parts) == 2


def test_a_study_that_is_only_planned(model: str, tmp_path: Path, measured: dict[str, Any], say: Spoken) -> None:
    code, text, _ = say("study", "painters", model, "--dry-run")
    assert code == 0
    assert text.splitlines() == [line.ljust(len(line)) for line in text.splitlines()]
    assert [re.split(r" {2,}", line.strip()) for line in text.splitlines()] == [
        ["recipes", "12"],
        ["layer calls", "90 shared, 400 one by one"],
        ["tokens", "4,000 shared, 5,000 one by one"],
        ["examples", "a 24"],
        ["time", "about 75 s; one by one 8 min"],
        ["memory", "about 3.0 MB beside the weights"],
    ]
    assert measured["protocol"] == "quick" and measured["task_names"] is None
    assert not (tmp_path / "impasto-runs").exists()

"""The examples in the documents run."""

from __future__ import annotations

import re
from pathlib import Path

from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent


def blocks(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), flags=re.M | re.S)


def test_the_verbs_in_python(tmp_path, capsys):
    (program,) = blocks("docs/cli.md")
    exec(program, {"model": tiny_model(), "tokenizer": tiny_tokenizer(), "folder": tmp_path})
    assert 0 <= float(capsys.readouterr().out) <= 1


def test_the_readme_example(monkeypatch, capsys):
    import impasto as im

    (program,) = blocks("README.md")
    loaded = im.adopt(tiny_model(layers=18), tiny_tokenizer(), name="demo")
    monkeypatch.setattr(im, "load", lambda name: loaded, raising=False)
    exec(program, {})
    assert capsys.readouterr().out


def test_fast_execution(capsys):
    (program,) = blocks("docs/fast.md")
    exec(program, {"model": tiny_model()})
    assert "slots" in capsys.readouterr().out


def test_plain_checkpoints(tmp_path, capsys):
    (program,) = blocks("docs/checkpoint.md")
    exec(program, {"model": tiny_model(), "tokenizer": tiny_tokenizer(), "folder": tmp_path / "x"})
    first, second, third = capsys.readouterr().out.splitlines()
    assert (first, third) == ("4", "None") and second.startswith("it runs layers in parallel")

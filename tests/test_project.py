"""The promises of the project as a whole: names, layers, light imports, honest documents."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import impasto

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "impasto"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
READABLE = {".py", ".toml", ".json", ".yaml", ".yml", ".md", ".j2", ".css", ".js", ".html", ".txt", ".sql"}

# Families of models as whole words, also with a version or as part of a class name.
FAMILY = re.compile(
    r"""(?<![a-z0-9])(
    albert|apertus|arcee|baichuan|bert|bloom|bloomz|chatglm|codegen|cohere|command-r|dbrx|deberta|deepseek|
    distilbert|electra|ernie|exaone|falcon|gemma|glm|gpt|gptj|gpt_neo|gpt_neox|gpt_oss|granite|grok|helium|hunyuan|
    internlm|jamba|lfm|llama|mamba|minimax|ministral|mistral|mixtral|modernbert|mpt|nemotron|olmo|olmoe|openelm|opt|
    persimmon|phi|pythia|qwen|roberta|rwkv|smollm|stablelm|starcoder|t5|vit|xglm|yi|zamba
    )(?=[\d_\W]|$|For|Model|Config)""",
    re.IGNORECASE | re.VERBOSE,
)
WHERE_NAMES_ARE_DATA = {
    SOURCES / "fetch.py",  # the table of packages that can be fetched
    SOURCES / "studies" / "paper.py",  # what the paper found, and on which model
    SOURCES / "studies" / "laser" / "paper.py",  # likewise
}


def test_the_version_is_in_the_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{impasto.__version__}]" in text or "## [Unreleased]" in text
    assert impasto.__version__ in text


def test_no_model_family_is_named_in_the_sources() -> None:
    named = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted(SOURCES.rglob("*"))
        if path.suffix in READABLE and path not in WHERE_NAMES_ARE_DATA and ".mypy_cache" not in path.parts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if FAMILY.search(line)
    ]
    assert named == []


@pytest.mark.parametrize("text", ["a llama", "Qwen2Model", "gpt_neox", "phi3", "LlamaForCausalLM", "x/gemma-3"])
def test_the_search_for_families_finds_them(text: str) -> None:
    assert FAMILY.search(text)


@pytest.mark.parametrize("text", ["exllamav3", "an option", "coherent", "philosophy", "spectral", "vital"])
def test_the_search_for_families_leaves_other_words_alone(text: str) -> None:
    assert not FAMILY.search(text)


def test_the_layers_hold() -> None:
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or shutil.which("lint-imports")
    assert command is not None, "import-linter is part of the test extra: pip install -e '.[test]'"
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_light_modules_leave_the_heavy_packages_alone() -> None:
    program = """
        import importlib, sys
        light = "errors schedule edit moves foreign recipe result statistics trie forest store plots report"
        for name in ["impasto", *(f"impasto.{module}" for module in light.split())]:
            importlib.import_module(name)
            heavy = {"torch", "transformers", "lm_eval", "datasets"} & set(sys.modules)
            assert not heavy, f"{name} imports {heavy}"
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_documents_name_no_place_of_one_machine() -> None:
    place = re.compile(r"(?<![\w./:])/(tmp|home|root|work|opt|mnt|Users)/")
    found = [
        f"{path.name}: {line}" for path in DOCUMENTS for line in path.read_text().splitlines() if place.search(line)
    ]
    assert found == []


def anchors(markdown: str) -> set[str]:
    """Names of the headings as links to them spell them."""
    titles = re.findall(r"^#+ +(.*?) *$", re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_document_leads_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"""(?:src|href)=["']([^"']+)["']""", text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name) if name else document
        assert target.exists(), f"{link} leads nowhere"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text()), f"{link}: no such heading"


def test_files_end_with_one_newline_and_lines_with_no_space() -> None:
    for path in [*DOCUMENTS, *SOURCES.rglob("*.py"), *(ROOT / "tests").glob("*.py"), ROOT / "pyproject.toml"]:
        text = path.read_text()
        assert not text or (text.endswith("\n") and not text.endswith("\n\n")), path
        assert not re.search(r"[ \t]$", text, re.M), path

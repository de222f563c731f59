"""README and documentation: links lead somewhere, commands are ours, code runs as it stands."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from browser import browser, find
from cli_inputs import gemopt

from gemopt import Traces

pytestmark = pytest.mark.usefixtures("quick_bounds")

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SHELL = ("", "console", "bash")
STEPS, LAYERS = 160, 2  # of the demo's traces, so that documented commands run in about a second each


@dataclass
class Block:
    """A fenced block: language, what the comment above it says, and its lines."""

    page: Path
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text().splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        above = next((text for text in reversed(lines[:start]) if text.strip()), "")
        mark = above[4:-3].strip() if above.startswith("<!--") else ""
        yield Block(page, start + 1, lines[start][3:].strip(), mark, "\n".join(lines[start + 1 : number]))
        start = None
    assert start is None, f"{page}: a block that does not end"


def commands(block: Block) -> Iterator[list[str]]:
    """The words after `gemopt` of each command of a shell block."""
    text = re.sub(r"\\\n\s*", " ", block.text)
    shown = block.language == "console" or text.startswith("$ ")
    if text.startswith("gemopt: "):  # what a command answers
        return
    for each in text.splitlines():
        if shown and not each.startswith("$ "):
            continue
        line = re.sub(r"\s{2,}#.*|^\$ ", "", each)
        if "gemopt " not in line or re.match(r"gemopt: |.*pip install|docker |wrote |.*\.\.\.", line):
            continue
        words = shlex.split(line.replace("$(which gemopt)", "gemopt"))
        if "gemopt" in words:
            words = words[words.index("gemopt") + 1 :]
            yield words[: next((i for i, word in enumerate(words) if word in (">", "|", ";", "&&")), len(words))]


BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL_BLOCKS = [block for block in BLOCKS if block.language in SHELL and any(commands(block))]
RUN_BLOCKS = [block for block in SHELL_BLOCKS if block.mark == "run"]
PYTHON_PAGES = sorted({block.page for block in BLOCKS if block.language == "python"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in LINK.findall(text):
        if not re.match(r"https?://|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page}: {target}"


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=str)
def test_commands_and_options_are_ours(block: Block) -> None:
    from gemopt.cli import load
    from gemopt.cli.app import make

    load()
    for given in commands(block):
        command, words = make(), given
        if words[0].startswith("-"):
            continue
        while words and words[0] in getattr(command, "commands", {}):
            command, words = command.commands[words[0]], words[1:]
        assert command.name != "gemopt", f"no such command: {words}"
        command.make_context(command.name, list(words)).close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of `gemopt demo --files`, with short traces."""
    from dataclasses import replace

    from gemopt.cli.demo import write_files

    made = tmp_path_factory.mktemp("first")
    write_files(made)
    for name in ("traces", "shifting"):
        whole = Traces.load(made / f"{name}.safetensors")
        short = replace(whole, counts=whole.counts[:STEPS, :LAYERS], layer_ids=tuple(range(LAYERS)))
        short.save(made / f"{name}.safetensors")
    return made


@pytest.mark.parametrize("block", RUN_BLOCKS, ids=str)
def test_blocks_marked_run_do(
    block: Block, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(folder)
    said = ""
    for words in commands(block):
        if words[:2] == ["demo", "--files"]:
            monkeypatch.chdir(tmp_path)
        if "--time-limit" in words:
            words[words.index("--time-limit") + 1] = "1"
        code, out, err = gemopt(capsys, *words)
        assert code == 0, (words, out, err)
        said += out
    shown = [line for line in block.text.splitlines() if line.startswith(("start: ", "note: "))]
    said = said.replace(f"{folder}/", "/srv/")
    for line in shown:
        assert line in said, f"{block} shows what the command does not say: {line}"


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace; a block that needs ranks or a model is parsed, and its imports must exist."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.language != "python":
            continue
        if block.mark:
            check_imports(block)
        else:
            exec(compile(block.text, str(block), "exec"), names)


def check_imports(block: Block) -> None:
    source = "\n".join(line.removeprefix(">>> ") for line in block.text.splitlines() if line[:3] not in ("...",))
    tree = ast.parse(source if ">>>" not in block.text else source.split("\n")[0])
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gemopt"):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, alias.name) for alias in node.names), str(block)


def test_the_reference_has_every_public_name() -> None:
    shown = {path for page in DOCS.glob("reference/*.md") for path in re.findall(r"^::: (\S+)", page.read_text(), re.M)}
    packages = ("gemopt", *(f"gemopt.{name}" for name in ("advise", "jobs", "online", "predict", "replay", "report")))
    for package in map(importlib.import_module, packages):
        for name in package.__all__:
            value = getattr(package, name)
            if callable(value):
                home = value.__module__
                assert {home, f"{home}.{name}"} & shown, f"{package.__name__}.{name} is in no page of docs/reference"


def test_the_readme_tells_what_solvers_support() -> None:
    text = (ROOT / "README.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| `[a-z]", line)]
    told = {name: row for row in rows if len(row) == 5 for name in re.findall(r"`([a-z-]+)`", row[0])}
    from gemopt.solvers import get, names

    assert set(told) == set(names())
    for name, (_, _, _, unequal, proves) in told.items():
        supports = get(name).supports
        assert (unequal == "yes", proves != "no") == (supports.unequal_slots, supports.proves), name


def test_the_marks_are_known() -> None:
    marks = {block.mark for block in BLOCKS if block.mark}
    known = ("run", "needs an engine", "needs torch", "needs ranks", "needs a model", "needs surroundings")
    assert marks <= {*known}, marks - {*known}
    assert len(RUN_BLOCKS) > 10 and len(SHELL_BLOCKS) > 40


def test_the_navigation_forgets_no_page() -> None:
    pytest.importorskip("mkdocs")
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]
    listed = [path for section in nav for entry in next(iter(section.values())) for path in entry.values()]
    assert len(set(listed)) == len(listed) and all((DOCS / path).exists() for path in listed)
    sys.path.insert(0, str(DOCS))
    try:
        hooks = importlib.import_module("hooks")
    finally:
        sys.path.remove(str(DOCS))
    assert sorted(hooks._paths(nav)) == sorted(listed)
    rows = "\n".join(hooks._commands())
    for name in ("## gemopt solve", "## gemopt trace import", "## gemopt demo", "`--time-limit`"):
        assert name in rows
    for what in (
        "| `--sweep`, `--no-sweep` |",
        "| cost model: `auto`, `staircase`, `roofline` |",
        "| `--set KEY=VALUE` |",
        "each have their own: `shared`, `own` |",
        '.jsonl of &#123;"prompt": ..., "task": ...} |',
    ):
        assert what in rows


@pytest.mark.browser
@pytest.mark.skipif(find() is None, reason="no Chromium: apt-get install chromium, or set CHROMIUM")
def test_a_site_on_disk_can_be_searched(tmp_path: Path) -> None:
    """There no worker may start, the search's among them; ours answers as one would. Dashes are left out."""
    answer = "told.data.data ?? told.data + 1"
    (tmp_path / "worker.js").write_text(f"addEventListener('message', told => postMessage({answer}))")
    (tmp_path / "page.html").write_text(
        f"<body><script src='{(DOCS / 'iframe-worker.js').as_uri()}'></script>"
        "<script>var told = [], ours = new Worker('worker.js');"
        "ours.addEventListener('message', e => told.push(e.data)); ours.postMessage(1);"
        "ours.postMessage({type: 2, data: '--time-limit of -o a-b'})</script>"
    )
    with browser(tmp_path / "chromium") as opened:
        opened.open(tmp_path / "page.html", ready="window.told?.length == 2")
        assert opened.js("told") == [2, "time-limit of o a-b"] and not opened.complaints

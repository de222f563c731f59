"""What the site needs beyond MkDocs: formulas as MathML, the command reference, pages that nobody listed."""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Iterator
from enum import EnumMeta
from pathlib import Path
from typing import Any

SHORT_CODE = re.compile(r"<code>(?=[^<\n]{1,28}</code>)")
ARITHMATEX = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL)
COMMANDS = "<!-- commands -->"
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RESULT = re.compile(r"(?<!\[)`(?:benchmarks/results/)(\w+\.md)`")


def _copy_sources(root: Path) -> None:
    """One tree of the three source folders, as they are installed, for the API reference."""
    tree = root / "build" / "api"
    shutil.rmtree(tree, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "data", "tiny_moe")
    for package, folder in (("gemopt", "gemopt"), ("gemopt/models", "models"), ("gemopt/profiling", "profiling")):
        shutil.copytree(root / folder, tree / package, ignore=ignored)


def on_startup(**_: Any) -> None:
    """Before any plugin looks for the sources."""
    _copy_sources(ROOT)


def on_files(files: Any, config: Any) -> Any:
    """Results of the benchmarks are pages of the site."""
    from mkdocs.structure.files import File

    for path in sorted(RESULTS.glob("*.md")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_config(config: Any) -> Any:
    """Results of the benchmarks, then pages that nobody put into the navigation, so that none is lost."""
    docs = Path(config["docs_dir"])
    named = set(_paths(config["nav"]))
    others = sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))
    forgotten = [path for path in others if path not in named]
    config["nav"].append({"Results": [f"results/{path.name}" for path in sorted(RESULTS.glob("*.md"))]})
    if forgotten:
        config["nav"].append({"More": forgotten})
    return config


def _paths(nav: Any) -> Iterator[str]:
    for entry in nav:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from [value] if isinstance(value, str) else _paths(value)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the commands in where a page asks for them; link results where they are named."""
    if page.file.src_uri.startswith("results/"):
        page.meta["search"] = {"exclude": True}  # figures, hardly words
        markdown = markdown.replace("](../../docs/", "](../")
    up = "../" * page.file.src_uri.count("/")
    markdown = RESULT.sub(rf"[`benchmarks/results/\1`]({up}results/\1)", markdown)
    return markdown.replace(COMMANDS, "\n".join(_commands())) if COMMANDS in markdown else markdown


def on_page_content(content: str, **_: Any) -> str:
    """Formulas become MathML, which browsers draw by themselves; no line ends within an option or a name."""
    from latex2mathml.converter import convert

    def drawn(found: re.Match[str]) -> str:
        inline, block = found.group(2), found.group(3)
        return convert(html.unescape(inline or block), display="inline" if inline else "block")

    return ARITHMATEX.sub(drawn, SHORT_CODE.sub('<code class="short">', content))


def _commands() -> Iterator[str]:
    """Every command: what it does, its arguments and options, its examples."""
    from gemopt.cli import load
    from gemopt.cli.app import make

    load()
    yield from _command((), make())


def _command(words: tuple[str, ...], command: Any) -> Iterator[str]:
    inner = getattr(command, "commands", {})
    if words and (not inner or getattr(command, "invoke_without_command", False)):
        name = " ".join(("gemopt", *words))
        yield f"\n## {name}\n\n{(command.help or '').strip()}\n"
        lines = [line.strip() for line in (command.epilog or "").split("\n\n")[1:]]
        yield "\n".join(["```console", *(f"$ {line}" for line in lines), "```", "", "| option | | |", "|---|---|---|"])
        for parameter in command.params:
            if parameter.name not in ("help", "quiet", "verbose"):
                yield _row(parameter)
    for name in sorted(inner):
        yield from _command((*words, name), inner[name])


def _row(parameter: Any) -> str:
    options, takes = [*parameter.opts, *parameter.secondary_opts], parameter.metavar or ""
    named = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
    choices = [each.value for each in named] if isinstance(named, EnumMeta) else takes.split("|")
    given = f" {takes}" if takes and len(choices) == 1 else ""
    flags = [f"`{each}{given}`" for each in options] if options[0].startswith("-") else [f"`{parameter.name.upper()}`"]
    default = parameter.default
    plain = isinstance(default, (int, float, str)) and not isinstance(default, bool) and default != ""
    shown = f"default {default}" if plain else "required" if parameter.required else ""
    text = (getattr(parameter, "help", "") or "").replace("|", "\\|").replace("<", "&lt;")
    text = text.replace("{", "&#123;")  # else braces that end a cell are attributes of it
    text += f": {', '.join(f'`{each}`' for each in choices)}" if len(choices) > 1 else ""
    return f"| {', '.join(flags)} | {text} | {shown} |"

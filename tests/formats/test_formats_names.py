"""Every engine name that a hint, a note or a page gives is one that the commands take."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from gemopt.exceptions import InputError
from gemopt.formats.registry import NAMES, canonical, get

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [p for room in ("gemopt", "profiling", "models") for p in sorted((ROOT / room).rglob("*.py"))]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.md"))]
NAMED = re.compile(r"--(?:to|from)[ \n]+(?!\d)([\w.-]+(?:(?:,\s+|,? or\s+|,)(?!--)[a-z][\w.-]+)*)")


def named(text: str) -> list[str]:
    lists = NAMED.findall(text)
    return [name.rstrip(".") for found in lists for name in re.split(r",? or\s+|,\s*", found)]


@cache
def texts(path: Path) -> list[str]:
    if path.suffix != ".py":
        return [path.read_text()]
    tree = ast.parse(path.read_text())
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_names_in_hints_are_taken(path: Path) -> None:
    for text in texts(path):
        for name in named(text):
            get(name)


def test_the_search_for_names_finds_lists() -> None:
    assert named("gemopt export --to sglang, trtllm or vllm-ascend) or gemopt") == ["sglang", "trtllm", "vllm-ascend"]
    assert named("use --to csv.") == ["csv"]
    assert sum(len(named(text)) for path in SOURCES for text in texts(path)) >= 8
    with pytest.raises(InputError, match="one of sglang"):
        get(named("--to nonsense")[0])


@pytest.mark.parametrize(
    "written,name",
    [
        ("trtllm", "tensorrt-llm"),
        ("TRT-LLM", "tensorrt-llm"),
        ("TensorRT_LLM", "tensorrt-llm"),
        ("tensorrt", "tensorrt-llm"),
        ("ascend", "vllm-ascend"),
        ("vllm_ascend", "vllm-ascend"),
        ("vLLM", "vllm"),
        ("SGLang", "sglang"),
        ("LMDeploy", "lmdeploy"),
        ("EPLB", "deepseek-eplb"),
        ("llama-cpp", "llama.cpp"),
        ("Transformers", "checkpoint"),
        *((name, name) for name in NAMES),
        *((name.upper().replace("-", "_"), name) for name in NAMES),
    ],
)
def test_names_as_people_write_them(written: str, name: str) -> None:
    assert canonical(written) == name
    assert get(written).name == name


@pytest.mark.parametrize("written", ["", "-", "tensor", "vllm2", "s g l a n g s"])
def test_names_of_nothing(written: str) -> None:
    with pytest.raises(InputError, match="one of sglang"):
        canonical(written)

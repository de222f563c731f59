"""Docstrings are read as the site reads them, whose warnings are errors: without building it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

griffe = pytest.importorskip("griffe")
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("gemopt", "models", "profiling")


def read(root: Path, name: str, caplog: pytest.LogCaptureFixture) -> tuple[int, list[str]]:
    """The number of docstrings in a package, and what is wrong with their sections."""
    package = griffe.GriffeLoader(search_paths=[root], allow_inspection=False).load(name)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="griffe"):
        number = sum(bool(docstring.parse("numpy")) for docstring in docstrings(package))
    return number, caplog.messages


def docstrings(place) -> Iterator:
    if place.docstring:
        yield place.docstring
    for each in place.members.values():
        if not each.is_alias:
            yield from docstrings(each)


@pytest.mark.parametrize("name", PACKAGES)
def test_sections_name_what_is_there(name: str, caplog: pytest.LogCaptureFixture) -> None:
    number, said = read(ROOT, name, caplog)
    assert number > 20 and not said, said


WRONG = {
    "a name that is no parameter": "first\n        Fine.\n    third\n        Not there.",
    "a paragraph after the section": "first\n        Fine.\n\n    Valid for all of them.",
}


@pytest.mark.parametrize("section", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_seen(section: str, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    text = f'def f(first: int) -> None:\n    """Do.\n\n    Parameters\n    ----------\n    {section}\n    """\n'
    (tmp_path / "small.py").write_text(text)
    _, said = read(tmp_path, "small", caplog)
    assert any("does not appear in the function signature" in each for each in said)

"""Tables as people paste them: Markdown and other bars, or columns that blanks set apart as pandas prints them."""

from __future__ import annotations

import re

RULE = re.compile(r"[\s|+:=-]*(?:--|==|:-|-:)[\s|+:=-]*")
EMPHASIS = " \t*`"


def printed(text: str) -> list[tuple[int, list[str]]]:
    """Line number and cells of each line: the header, then rows; a line below the header that rules it off is left out.

    Lines before the header that end in a colon are its title. Where rows have one cell more than the header and those
    cells count up, they are pandas' index, which is left out.
    """
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    lines = [each for i, each in enumerate(lines) if not (RULE.fullmatch(each[1]) and (i < 2 or "+" in each[1]))]
    if "|" in text:
        return [(number, _between_bars(line)) for number, line in lines]
    while len(lines) > 1 and lines[0][1].rstrip().endswith(":"):
        del lines[0]
    wide = [(number, re.split(r"\s{2,}", line.strip())) for number, line in lines]
    narrow = [(number, line.split()) for number, line in lines]
    return next((found for found in map(_indexed, (wide, narrow)) if _even(found)), wide)


def _between_bars(line: str) -> list[str]:
    line = line.strip()
    inner = line[1:].removesuffix("|") if line.startswith("|") else line
    return [cell.strip(EMPHASIS) for cell in inner.split("|")]


def _even(lines: list[tuple[int, list[str]]]) -> bool:
    return len({len(cells) for _, cells in lines}) == 1 and len(lines) > 1 and len(lines[0][1]) > 1


def _indexed(lines: list[tuple[int, list[str]]]) -> list[tuple[int, list[str]]]:
    """The lines without an index that has no name."""
    header, rows = lines[:1], lines[1:]
    index = [cells[0] for _, cells in rows]
    width = len(header[0][1]) + 1 if header else 0
    counted = all(each.isdigit() for each in index) and index == [str(int(index[0]) + i) for i in range(len(index))]
    if rows and all(len(cells) == width for _, cells in rows) and counted:
        return [*header, *((number, cells[1:]) for number, cells in rows)]
    return lines

"""Tables as people paste them: Markdown and other bars, or columns that blanks set apart as pandas prints them."""

from __future__ import annotations

import re
from itertools import pairwise

RULES = ("--", "==", ":-", "-:")
BOX = str.maketrans(
    dict.fromkeys("\u2502\u2503\u2506\u2551", "|")
    | dict.fromkeys("\u2500\u2501\u254c", "-")
    | {"\u2550": "="}
    | {chr(each): "+" for each in (*range(0x250C, 0x254C), *range(0x2552, 0x256D))}
)
"""Lines that boxes are drawn with, as those of + - and |."""
EMPHASIS = re.compile(r"(\*{1,3}|`)(.*)\1")
Lines = list[tuple[int, list[str]]]


def alone(text: str) -> str:
    """The one Markdown table within a text, whose other lines become blank; a text with none or several as it is."""
    lines = text.split("\n")
    at = [i for i, line in enumerate(lines) if line.lstrip().startswith("|")]
    if len(at) <= 2 or at[-1] - at[0] + 1 > len(at) or not _is_rule(lines[at[1]]):
        return text
    others = lines[: at[0]] + lines[at[-1] + 1 :]
    if any("|" in line and _is_rule(line) for line in others) or "|" in "".join(lines[at[-1] + 1 : at[-1] + 2]):
        return text  # a table, or a row, that no bar begins
    return "\n".join(line if at[0] <= i <= at[-1] else "" for i, line in enumerate(lines))


def printed(text: str) -> Lines:
    """Line number and cells of each line: the header, then rows, without titles, rules and an index.

    A title ends in a colon and comes before the header; a rule comes below it, or has the crosses of a grid; an index
    counts up and has no name. Cells may hold blanks where all end where the words of the header do, as pandas prints
    them. Where cells do not stand below their names, as one may be missing, lines are not parted.
    """
    text = text.translate(BOX)
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    while len(lines) > 1 and lines[0][1].rstrip().endswith(":"):
        del lines[0]
    rule = lines[1][1] if len(lines) > 1 and _is_rule(lines[1][1]) else ""
    drawn = re.compile(r"[^+]*\+.*|[= ]+")
    lines = [each for i, each in enumerate(lines) if not (_is_rule(each[1]) and (i < 2 or drawn.fullmatch(each[1])))]
    if "|" in text:
        return [(number, _between_bars(line)) for number, line in lines]
    if right := _right_aligned(lines):
        return right
    for cell in (r"\S+(?: \S+)*", r"\S+"):
        found = _below(lines, re.compile(cell), rule) if lines else None
        if found is not None and len(found[0][1]) > 1:
            return found
    return [(number, [line.strip()]) for number, line in lines]


def _is_rule(line: str) -> bool:
    return not line.strip("|+:=- \t") and any(each in line for each in RULES)


def _between_bars(line: str) -> list[str]:
    line = line.strip()
    inner = line[1:].removesuffix("|") if line.startswith("|") else line
    cells = [cell.strip() for cell in inner.split("|")]
    return [found[2].strip() if (found := EMPHASIS.fullmatch(cell)) else cell for cell in cells]


def _below(lines: list[tuple[int, str]], cell: re.Pattern[str], rule: str) -> Lines | None:
    """The cells of each line, if those of all rows stand below the header's or the rule's or single blanks part all."""
    found = [(number, list(cell.finditer(line))) for number, line in lines]
    header, rows = found[0][1], [row for _, row in found[1:]]
    index = [row[0][0] for row in rows if len(row) == len(header) + 1]
    counts = all(each.isdigit() for each in index) and all(int(b) == int(a) + 1 for a, b in pairwise(index))
    skipped = int(counts and len(index) == len(rows))
    dashes = list(re.finditer(r"[-=]+", rule))
    above = dashes if len(dashes) == len(header) else header
    spread = any(re.search(r"\S\s{2,}\S", line) for _, line in lines)
    for row in rows:
        pairs = zip(above, row[skipped:], strict=False)
        aligned = all(over.start() < each.end() and each.start() < over.end() for over, each in pairs)
        if len(row) != len(header) + skipped or ((spread or skipped) and not aligned):
            return None
    return [(number, [each[0] for each in row[skipped if i else 0 :]]) for i, (number, row) in enumerate(found)]


def _right_aligned(lines: list[tuple[int, str]]) -> Lines | None:
    """The cells of each line, if those of all rows end where the words of the header do, and a blank follows.

    A word of the header where no cells end is part of the next one, a single blank away.
    """
    if len(lines) < 2:
        return None
    head, rows = lines[0][1], [line for _, line in lines[1:]]
    words = [found.end() for found in re.finditer(r"\S+", head)]
    if not words or any(len(line) != words[-1] for line in rows):
        return None
    ends = [at for at in words if not any(line[at - 1].isspace() or line[at : at + 1].strip() for line in rows)]
    merged = [at for at in words if at not in ends]
    if len(ends) < 2 or any(head[at : at + 2].isspace() for at in merged):
        return None
    index = [found[0] if (found := re.match(r"\d+ ", line)) else "" for line in rows]
    width = max(map(len, index))
    counts = all(index) and all(int(b) == int(a) + 1 for a, b in pairwise(index))
    starts = [width if counts and not head[:width].strip() else 0, *ends]
    return [(number, [line[a:b].strip() for a, b in pairwise(starts)]) for number, line in lines]

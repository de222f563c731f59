"""Lines of a table of counts, however it was saved: text, gzipped, or parquet; with a column for each expert."""

from __future__ import annotations

import csv
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from gemopt.exceptions import InputError
from gemopt.formats.counts import json_files
from gemopt.formats.counts.spread import follows
from gemopt.formats.files import JSON_LIMIT, SMALLER, size_of, text_of
from gemopt.formats.names import (
    COLUMNS,
    COUNTED,
    COUNTING,
    DRAFTS,
    HEEDED,
    MEASURED,
    SCORES,
    TABLES,
    numbered,
    refuse_derived,
    sure,
    words_of,
)  # fmt: skip
from gemopt.formats.tables import files as table_files
from gemopt.formats.tables.files import GROUPED
from gemopt.traces.arrays import NOT_IDS
from gemopt.traces.axes import FEWEST_LAYERS
from gemopt.traces.files import ALTERING, COPIES, NOT_COPIES

INDEX = "column 1"  # a first one without a name: rising, it holds pandas' numbers of the lines
WIDE = re.compile(r"(?:experts?|expert_id|exp)_?(\d{1,9})", re.ASCII)
_OF_LAYERS = re.compile(  # moe/layer_3/expert_7, as loggers of training name what they plot
    r"((?:.*_)?)(?:layers?|blk|block|l)_?(\d{1,9})_((?:.*_)?)(?:experts?|expert_id|exp|e)_?(\d{1,9})((?:_.*)?)",
    re.ASCII,
)
_PIVOT = {  # of tables that pandas pivots: what the columns count, beside columns of the others
    "layer": re.compile(r"(?:moe_)?layers?(?:_id|_idx)?_?(\d{1,9})", re.ASCII),
    "step": re.compile(r"(?:steps?|iter|iteration)(?:_id)?_?(\d{1,9})", re.ASCII),
    "rank": re.compile(r"(?:[edt]p_)?rank(?:_id)?_?(\d{1,9})", re.ASCII),
}
TAGS, VALUES = ("tag", "key", "metric", "metric_name", "name"), ("value", "metric_value", "scalar_value")
_LIST = re.compile(r"[\[(]\s*[\d.]+(?:[\s,;]+[\d.]+)+\s*[\])]", re.ASCII)
IDS = {"ids", "indices", "topk", "token"}  # words of columns that list the experts of tokens
BARE = (
    "lines of numbers alone, as MindIE's of each NPU: numpy.loadtxt(PATH, delimiter=',').reshape(steps, layers, -1), "
    "ranks side by side by numpy.concatenate(axis=2), then --from array"
)
_NEEDED = ("layer", "expert", "count")
PARTS = {"rank", "ranks", "gpu", "device", "stage", *DRAFTS}
_INDEX = re.compile(r"__index_level_\d+__")  # numbers of rows, as pandas saves them in parquet
_RULE = re.compile(r":?-+:?")
_WHOLE = re.compile(r"\d{1,15}(?:\.0*)?", re.ASCII)
Rows = list[tuple[int, list[str]]]  # number and cells
Lines = Iterator[tuple[int, list[str]]]


def by_tag(path: Path, header: list[str], lines: Lines, results: set[str]) -> tuple[list[str], Lines]:
    """The table of a logger, a line for each step and `moe/layer_3/expert_7`, with a column for what these number.

    Lines of other tags are left out, and the column's name is added to `results` where there are some.
    """
    tags, values = ([i for i, name in enumerate(header) if name in known] for known in (TAGS, VALUES))
    if len(tags) != 1 or len(values) != 1 or set(header) & {*COLUMNS["layer"], *COLUMNS["expert"]}:
        return header, lines
    rows, at = _whole_rows(path, header, lines), tags[0]
    cells = {row[at]: re.sub(r"\W+", "_", row[at].strip().casefold()) for _, row in rows}
    named = {cell: found for cell, tag in cells.items() if (found := _OF_LAYERS.fullmatch(tag))}
    if not named:
        return header, iter(rows)
    _refuse_kinds(f"{path}: {header[at]}", named)
    _refuse_lacking(path, header, rows, at, named)
    results |= {header[at]} if len(named) < len(cells) else set()
    kept = [i for i in range(len(header)) if i not in (at, values[0])]
    told = ((number, row, named[row[at]]) for number, row in rows if row[at] in named)
    longer = ((number, [*(row[i] for i in kept), found[2], found[4], row[values[0]]]) for number, row, found in told)
    return [*(header[i] for i in kept), "layer", "expert", "count"], longer


def _refuse_lacking(path: Path, header: list[str], rows: Rows, at: int, tags: Collection[str]) -> None:
    """Raise where a step has lines of some tags alone: loggers write each of them, and keep a sample of each."""
    steps: dict[str, set[str]] = {}
    step = next((i for i, name in enumerate(header) if name in COLUMNS["step"]), at)
    for _, row in rows if step != at else ():
        if row[at] in tags:
            steps.setdefault(row[step], set()).add(row[at])
    for told, found in steps.items():
        if len(found) < len(tags):
            lacking, where = next(tag for tag in tags if tag not in found), f"{path}: {header[step]} {told}"
            hint = "export all steps of each, not a sample; write zeros"
            raise InputError(where, f"no {lacking}", "a line for each tag at each step", hint)


def _whole_rows(path: Path, header: list[str], lines: Lines) -> Rows:
    """All lines but blank ones; `InputError` where one has not as many cells as the header."""
    rows = [(number, row) for number, row in lines if any(row)]
    for number, row in rows:
        if len(row) != len(header):
            limit = f"{len(header)} values: {','.join(header)[:200]}"
            raise InputError(f"{path}: line {number}", ",".join(row)[:200], limit)
    return rows


def by_expert(
    path: Path, header: list[str], lines: Lines, names: Mapping[str, Sequence[str]], results: set[str]
) -> tuple[list[str], Lines]:
    """The table with a line for every expert, where it has a column for each expert, or for each layer and expert.

    So are pivoted tables read, whose lines name the expert and whose columns the layer, the step or the rank. names: of
    the columns with the layer, with the expert, ... of a line. Columns that follow from the counts beside them
    are left out, and added to `results`.
    """
    experts = {i: [found[1]] for i, name in enumerate(header) if (found := WIDE.fullmatch(name))}
    lacking = ["expert"]
    first = next(((number, row) for number, row in lines if any(row)), None)
    lines = lines if first is None else chain([first], lines)
    if first is not None and header[0] == INDEX and (label := numbered({first[1][0]: None})) and label[0]:
        header = [label[0], *header[1:]]  # layer_0, layer_1, ... say what they are
    if not experts and first is not None and not set(header) & set(names["expert"]):
        named = {i for i, name in enumerate(header) if words_of(name) & COUNTED and name != "tokens"}
        lists = [i for i, cell in enumerate(first[1]) if i in named and _LIST.fullmatch(cell.strip())]
        if len(lists) == 1:
            return _of_lists(path, header, lines, lists[0], results)
    if not experts and not set(header) & set(names["layer"]):
        both = {i: found for i, name in enumerate(header) if (found := _OF_LAYERS.fullmatch(name))}
        if both:
            experts, lacking = {i: [found[2], found[4]] for i, found in both.items()}, ["layer", "expert"]
            _refuse_kinds(f"{path}: columns", {found[0]: found for found in both.values()})
    told = {meaning for meaning, known in names.items() if set(header) & set(known)}
    if "expert" in told and "count" not in told:
        lacking, experts = _pivoted(header, told)
    if not experts and told in ({"layer"}, {"expert"}):
        rows = [(number, row) for number, row in lines if any(row)]
        lines, across = iter(rows), "layer" if told == {"expert"} else "expert"
        experts, lacking = _crossed(header, rows, across), [across]
    cells = set(map(tuple, experts.values()))
    if len(experts) < 2 or len(cells) < len(experts) or told & {*lacking}:
        return header, lines
    rows = _whole_rows(path, header, lines)
    rows = rows if "layer" in told else [each for each in rows if any(each[1][at] for at in experts)]  # loggers' others
    kept = _telling(path, header, rows, [[row[at] for at in experts] for _, row in rows], results, experts)
    longer = (
        (number, [*(row[i] for i in kept), *which, row[at]]) for number, row in rows for at, which in experts.items()
    )
    return [*(header[i] for i in kept), *lacking, "count"], longer


def without_ranges(path: Path, header: list[str], lines: Lines) -> tuple[list[str], Lines]:
    """The table without the `__MIN` and `__MAX` of every column that Weights & Biases exports."""
    beside = {i: header.index(name[:-5]) for i, name in enumerate(header)
              if name.endswith(("__min", "__max")) and name[:-5] in header}  # fmt: skip
    if not beside:
        return header, lines

    def kept() -> Lines:
        for number, row in lines:
            for i, at in beside.items() if len(row) == len(header) else ():
                if row[i] != row[at]:
                    limit = f"{row[at]}, as {header[at]}: means of several steps or runs are no counts"
                    raise InputError(
                        f"{path}: line {number}: {header[i]}", row[i], limit, "export every step of one run"
                    )
            yield number, [cell for i, cell in enumerate(row) if i not in beside]

    return [name for i, name in enumerate(header) if i not in beside], kept()


def _crossed(header: list[str], rows: Rows, across: str) -> dict[int, list[str]]:
    """The columns of numbers alone, as pandas tabulates layers and experts, where the sums of layers bear that out."""
    columns = {i: [name] for i, name in enumerate(header) if name.isdecimal()}
    cells = [[row[i] for i in columns] for _, row in rows if len(row) == len(header)]
    if [int(name) for (name,) in columns.values()] != list(range(len(columns))) or len(cells) < len(rows):
        return {}
    if len(header) - len(columns) > 1 or not all(map(_WHOLE.fullmatch, chain.from_iterable(cells))):
        return {}
    counts = np.array(cells, np.float64).reshape(len(cells), -1)
    counts = counts if across == "expert" else counts.T  # [layers, experts]
    alike = len(counts) >= FEWEST_LAYERS and (counts.sum(axis=1) == counts[0].sum()).all()
    return columns if alike and (counts != counts[:1]).any() else {}


def _pivoted(header: list[str], told: Collection[str]) -> tuple[list[str], dict[int, list[str]]]:
    """What the columns of a table whose lines name the expert count, and the number of each of these columns."""
    for meaning, pattern in _PIVOT.items():
        found = {i: [named[1]] for i, name in enumerate(header) if (named := pattern.fullmatch(name))}
        if len(found) > 1 and meaning not in told and (meaning == "layer" or "layer" in told):
            return [meaning], found
    return ["expert"], {}


def _telling(
    path: Path, header: list[str], rows: Rows, counts: list[list[str]], results: set[str], but: Collection[int]
) -> list[int]:
    """The columns, `but` those of the counts, that say more than the counts of their rows; others go to `results`.

    `InputError` where one of more is a count by its name.
    """
    others = [i for i in range(len(header)) if i not in but]
    asked = [i for i in others if TABLES.get(header[i], "count") == "count" and not _is_told(header[i])]
    if not asked or not all(map(_WHOLE.fullmatch, chain.from_iterable(counts))):
        return others
    arrays = [np.array(row, np.float64).astype(np.int64) for row in counts]
    for i in asked:
        cells = [row[i] for _, row in rows]
        if all(map(_WHOLE.fullmatch, cells)) and follows(header[i], list(map(float, cells)), arrays):
            results.add(header[i])
            others.remove(i)
        elif header[i] in TABLES:
            limit = "the sum of the counts of each line, or one share of it in all lines"
            raise InputError(f"{path}: columns", f"{header[i]} beside counts of experts", limit, "leave it out")
    return others


def _is_told(name: str) -> bool:
    """Whether a column says something of the counts, however its cells follow from them."""
    return name in HEEDED or bool(ALTERING.search(name) or COPIES.search(name))


def _of_lists(path: Path, header: list[str], lines: Lines, at: int, results: set[str]) -> tuple[list[str], Lines]:
    """The table with a line for every expert, where a cell holds the counts of all of them."""
    _refuse_others(f"{path}: columns", header[at])
    rows = [(number, row) for number, row in lines if any(row)]
    lists = [re.findall(r"[^\s,;\[\]()]+", row[at]) if len(row) == len(header) else [] for _, row in rows]
    experts = next(filter(None, map(len, lists)), 0)
    for (number, row), found in zip(rows, lists, strict=True):
        if len(found) != experts:
            where, cell = f"{path}: line {number}", ",".join(row)[:200]
            raise InputError(where, cell, f"{len(header)} values, and {experts} counts in {header[at]}")
    kept = _telling(path, header, rows, lists, results, [at])
    longer = (
        (number, [*(row[i] for i in kept), str(expert), count])
        for (number, row), found in zip(rows, lists, strict=True)
        for expert, count in enumerate(found)
    )
    return [*(header[i] for i in kept), "expert", "count"], longer


def _refuse_kinds(where: str, named: Mapping[str, re.Match[str]]) -> None:
    """Raise where names of layers and experts are of several kinds, or say that they hold no assignments of these."""
    kinds = {found.group(1, 3, 5): name for name, found in named.items()}
    if len(kinds) > 1:
        raise InputError(where, ", ".join([*kinds.values()][:4]), "one kind", "leave out the others")
    _refuse_others(where, next(iter(named.values()))[0])


def _refuse_others(where: str, name: str) -> None:
    """Raise where what is of layers and experts is something else than their assignments, by its name."""
    words = words_of(name)
    if COPIES.search(name) or "shared" in words:
        raise InputError(where, name, "counts of logical experts", NOT_COPIES)
    if found := sorted(words & PARTS):
        limit = "counts of all ranks and decoder layers"
        hint = (
            "put the experts of all ranks side by side, or add up ranks that saw tokens of their own; leave drafts out"
        )
        raise InputError(where, f"{name}, of one {found[0]}", limit, hint)
    refuse_derived(where, name)
    if found := sorted(words & (SCORES | MEASURED)):
        raise InputError(where, name, "counts themselves", f"is {found[0]} no word for it? rename it")


def meanings(path: Path, header: list[str]) -> dict[str, int]:
    """The columns by what they mean; `InputError` where one is missing, or comes twice."""
    found: dict[str, int] = {}
    for meaning, names in COLUMNS.items():
        known = sure(name for name in header if name in names)
        here = [i for i, name in enumerate(header) if name in known]
        if len(here) > 1:
            both = " and ".join(header[i] for i in here)
            raise InputError(f"{path}: columns", both, f"one column for the {meaning}", "remove the others")
        if here:
            found[meaning] = here[0]
    lacking = [meaning for meaning in _NEEDED if meaning not in found]
    if lacking:
        ids = lacking == ["count"] or IDS & {word for name in header for word in name.split("_")}
        others = [name for name in header if name not in TABLES and name != INDEX]
        counted = [name for name in header if {*name.split("_")} & COUNTING] or (others if len(others) == 1 else [])
        wide = sum(bool(re.fullmatch(r"[a-z]?_?\d+", name)) for name in header) > 1
        hint = "one line for each layer and expert"
        hint += "; columns are named by what they number: expert_0, layer_0 or step_0, ..." if wide else ""
        hint = NOT_IDS if ids and not wide else hint
        hint = BARE if all(map(str.isdigit, header)) else hint
        hint = "which column is the layer? call it layer" if lacking == ["layer"] else hint
        hint = f"if {counted[0]} is the count, call it count" if lacking == ["count"] and counted else hint
        shown = ",".join(header)[:200]
        raise InputError(f"{path}: columns", shown, "layer_id, expert_id, count; perhaps step, rank", hint)
    return found


def _bare_cells(cells: list[str]) -> list[str]:
    """The cells of a Markdown line, which begins and ends with a bar."""
    return [cell.strip() for cell in cells[1 : -1 if len(cells) > 1 and not cells[-1].strip() else None]]


def lines_of(path: Path) -> Lines:
    """Number and cells of every line, the header first."""
    if size_of(path) > JSON_LIMIT:
        raise InputError(str(path), f"{size_of(path)} bytes", f"at most {JSON_LIMIT} bytes", SMALLER)
    if json_files.is_json(path):
        yield from json_files.lines(path)
        return
    if path.suffix == ".parquet":
        table = table_files.read(path)
        names = [name for name in table.header if not _INDEX.fullmatch(name)]
        yield from enumerate([names, *([row.cells[name] for name in names] for row in table.rows)], start=1)
        return
    try:
        with text_of(path) as stream:
            header, first, comments = "", stream.readline(), 0
            while first.startswith("#"):  # as numpy.savetxt writes its header
                header, first, comments = first.lstrip("# "), stream.readline(), comments + 1
            start = [header, first] if header and first[:1].isdigit() else [first]
            if "\0" in start[0]:
                raise InputError(str(path), "binary data", "a CSV table, perhaps gzipped", "unpack other files first")
            delimiter = max(",;\t|", key=start[0].count)
            told = ("\n" if line.startswith("#") else line for line in stream)  # quotes in comments open no cell
            lines = csv.reader(chain(start, told), delimiter=delimiter)
            before = comments - len(start) + 1
            first_line: list[str] = []
            for cells in map(_bare_cells, lines) if start[0].startswith("|") else lines:
                if cells and all(map(_RULE.fullmatch, cells)):
                    continue  # below the header of a Markdown table
                if cells == (first_line := first_line or cells) and lines.line_num > len(start):
                    continue  # the header again, of another table put below
                if delimiter == ";" and (thousands := [cell for cell in cells if GROUPED.fullmatch(cell.strip())]):
                    where, hint = f"{path}: line {lines.line_num + before}", "write whole numbers without dots"
                    raise InputError(where, thousands[0], "a fraction, or thousands?", hint)
                yield lines.line_num + before, cells
    except (UnicodeError, csv.Error, zlib.error, EOFError) as error:
        raise InputError(str(path), str(error), "a CSV table") from None

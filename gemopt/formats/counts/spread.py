"""Rows of JSON whose cells hold many counts, as a table with a column for each expert, or as an array."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gemopt.exceptions import InputError
from gemopt.formats.engine import IntArray
from gemopt.formats.names import COLUMNS, PERHAPS, SIZES, TABLES, TIMES, WEIGHTS, numbered, phase_of, sure, words_of
from gemopt.traces.files import meant, smallest

_EXPERTS = re.compile(r"(num_|n_)(logical_|routed_)?experts", re.IGNORECASE)
Rows = list[dict[str, Any]]


@dataclass
class Content:
    """What a file holds: rows of plain cells, or arrays by name as an .npz would have them; and what is left unread."""

    rows: Rows = field(default_factory=list)
    arrays: dict[str, Any] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    beside: dict[str, Any] = field(default_factory=dict)  # lists of a single row among these
    top_k: int | None = None
    steps: tuple[int, int] | None = None  # the first and the last that it numbers
    phases: list[int] = field(default_factory=list)  # of the steps of an array
    notes: list[str] = field(default_factory=list)
    named: bool = True  # whether the file itself says that it holds counts


def compact(array: Any) -> Any:
    """Lists of whole numbers as an array of the smallest type; anything else as it is."""
    try:
        found = np.asarray(array)
    except (ValueError, TypeError, OverflowError):
        return array
    return smallest(found) if found.dtype.kind in "iu" and found.dtype.itemsize <= 8 else array


def spread(path: Path, rows: Rows, name: str, told: Content) -> Content:
    """Rows whose cell `name` holds many counts as a table with a column for each expert, or as an array."""
    if by_key(rows, name):
        spread = [(row, *_each(path, name, row[name])) for row in rows]
        whole = all(is_whole(count) for *_, counts in spread for count in counts)
        arrays = [np.asarray(counts) for *_, counts in spread] if whole else []
        for key in [key for key in rows[0] if key != name and TABLES.get(key.casefold()) == "count"]:
            if whole and follows(key, [row.get(key) for row in rows], arrays):
                told.unread.append(key)
                for row in rows:
                    row.pop(key, None)
        told.rows = [
            {**{key: cell for key, cell in row.items() if key != name}, "expert": expert, "count": count}
            for row, experts, counts in spread
            for expert, count in zip(experts, counts, strict=True)
        ]
        return told
    dims = {ndim(row[name]) for row in rows}
    if len(dims) > 1 or not dims <= {1, 2, 3} or (len(rows) > 1 and dims == {3}):
        raise InputError(f"{path}: {name}", "lists of several depths", "counts of experts, or of layers and experts")
    _drop_results(path, rows, name, told)
    cells = [row.pop(name) for row in rows]
    if dims == {1}:
        told.rows = [{**row, **{f"expert_{i}": n for i, n in enumerate(each)}}
                     for row, each in zip(rows, cells, strict=True)]  # fmt: skip
        return told
    layers = _layers(rows) if dims == {2} else []
    steps = _steps(path, rows, told)
    if layers:
        told.arrays = {f"layer_{layer}": cell for layer, cell in zip(layers, cells, strict=True)}
        return told
    if len(set(steps)) < len(steps):
        raise InputError(f"{path}: step", "steps that come twice", "every step once")
    order = sorted(range(len(steps)), key=steps.__getitem__)
    cells = [cells[i] for i in order]
    if "step" in {TABLES.get(key.casefold()) for key in rows[0]}:
        told.steps = min(steps), max(steps)
    alone = len(cells) == 1 and told.steps is None  # of two dimensions: layers, or steps of one?
    for phase in _phase(rows):
        found = [phase_of(str(path), phase, rows[i].get(phase), rows[0].get(phase)) for i in order]
        found *= len(cells[0]) if dims == {3} else 1  # of all its steps
        told.phases = [] if None in found else [int(each) for each in found if each is not None]
        told.unread += [phase] if not told.phases else []
    told.arrays = {name: cells[0] if dims == {3} or alone else cells}
    return told


def by_key(rows: Rows, name: str) -> bool:
    """Whether the cell `name` of every row is an object."""
    return all(isinstance(row.get(name), dict) for row in rows)


def _each(path: Path, name: str, cell: dict[str, Any]) -> tuple[list[int], list[Any]]:
    keys = numbered(cell)
    if keys is None or keys[0] not in ("", "expert"):
        raise InputError(f"{path}: {name}", ", ".join(cell)[:200], "counts by the number of the expert")
    return keys[1], list(cell.values())


def _layers(rows: Rows) -> list[Any]:
    """The layers that rows are of, taken out, where each has all steps of another one; else none."""
    meanings = {TABLES.get(key.casefold()): key for row in rows for key in row}
    if "layer" not in meanings or meanings.keys() & {"step", "phase"}:
        return []
    layers = [row.get(meanings["layer"]) for row in rows]
    if len(rows) < 2 or len(set(map(str, layers))) < len(rows):
        return []
    return [row.pop(meanings["layer"]) for row in rows]


def _steps(path: Path, rows: Rows, told: Content) -> list[Any]:
    """What numbers the rows; their order where nothing does. What tells them apart otherwise is refused."""
    named = sure(key for key in rows[0] if TABLES.get(key.casefold()) == "step")
    if len(named) > 1:
        raise InputError(str(path), " and ".join(named), "one number of the step", "leave the others out")
    kept = [*named, *_phase(rows)]
    for key in dict.fromkeys(key for row in rows for key in row if key not in kept):
        found = {str(row.get(key)) for row in rows}
        if len(found) > 1 or (TABLES.get(key.casefold(), "") and key.casefold() not in PERHAPS):
            limit = "the same in all rows: gemopt does not know what it tells apart"
            hint = "add up ranks, and put the layers of a step in one list; or leave it out"
            raise InputError(f"{path}: {key}", ", ".join(sorted(found))[:100], limit, hint)
        told.unread.append(key)
    if not named:
        return list(range(len(rows)))
    steps = [row.get(named[0]) for row in rows]
    if not all(type(each) is int for each in steps):
        raise InputError(f"{path}: {named[0]}", str(steps)[:100], "whole numbers")
    return steps


def _phase(rows: Rows) -> list[str]:
    """The key of the phase, if there is one."""
    return sure(key for key in rows[0] if TABLES.get(key.casefold()) == "phase")[:1]


def _drop_results(path: Path, rows: Rows, name: str, told: Content) -> None:
    """Take out plain cells that follow from the counts beside them, or are times or other fractions."""
    try:
        arrays = [np.asarray(row[name]) for row in rows]
    except ValueError:
        raise InputError(f"{path}: {name}", "lists of several lengths", "as many experts in each") from None
    meant_by = {meaning: sure(key for key in rows[0] if TABLES.get(key.casefold()) == meaning) for meaning in COLUMNS}
    known = [key for meaning, keys in meant_by.items() if meaning != "count" for key in keys]
    for key in list(rows[0]):
        cells: list[Any] = [row.get(key) for row in rows]
        if key in (name, *known):
            continue
        for cell, each in zip(cells, arrays, strict=True):
            if _EXPERTS.fullmatch(key) and str(cell) not in ("None", str(each.shape[-1])):
                raise InputError(f"{path}: {name}", f"{each.shape[-1]} experts", f"{cell}, as {key} says")
            if meant(key) == "num_hidden_layers" and each.ndim > 1 and str(cell) not in ("None", str(each.shape[-2])):
                hint = "leave it out, and give --layer-ids"
                raise InputError(f"{path}: {name}", f"{each.shape[-2]} layers", f"{cell}, as {key} says", hint)
        fractions = (
            not words_of(key) & WEIGHTS
            and all(isinstance(each, float) for each in cells)
            and any(each % 1 for each in cells)
        )
        sizes = key.casefold() in SIZES and "step" in {TABLES.get(name.casefold()) for name in rows[0]}
        if fractions or sizes or words_of(key) & TIMES or follows(key, cells, arrays):
            told.unread.append(key)
            for row in rows:
                row.pop(key, None)


def follows(name: str, cells: Sequence[Any], counts: Sequence[IntArray]) -> bool:
    """Whether whole numbers, one beside the counts of each row, say no more than these.

    They are one share of the sum in all rows, as tokens are, the largest or smallest count, or how many there are in
    all or above 0; or they are counts by their `name`, and the same in all of several rows.
    """
    if words_of(name) & WEIGHTS or not all(map(is_whole, cells)) or any(each.dtype.kind not in "iu" for each in counts):
        return False
    sums = [int(each.sum(dtype=np.int64)) for each in counts]
    total, most = max(zip(sums, cells, strict=True))
    return (
        (total > 0 < most and all(s * most == cell * total for s, cell in zip(sums, cells, strict=True)))
        or any([f(each) for each in counts] == list(cells) for f in (np.max, np.min, np.count_nonzero, np.size))
        or (TABLES.get(name.casefold()) == "count" and len(cells) > 1 and len(set(cells)) == 1)
    )


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number."""
    return type(value) in (int, float) and value % 1 == 0


def ndim(value: Any) -> int:
    """How deep lists go in their first elements."""
    return 1 + ndim(value[0]) if isinstance(value, list) and value else int(isinstance(value, list))

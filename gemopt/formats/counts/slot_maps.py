"""Counts of slots beside a map of the expert in each, as vLLM's balancer and its forks keep them: counts of experts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gemopt.exceptions import InputError
from gemopt.formats.engine import IntArray
from gemopt.formats.files import whole_numbers
from gemopt.formats.names import COUNTED, words_of
from gemopt.traces.files import COPIES, NOT_COPIES

MAP = re.compile(
    r"(last_|initial_|global_)?(physical_to_logical|physical2logical|phy2?log|p2l|slots?_to_experts?)(_map)?$", re.I
)
SAY_WHICH = "counts of slots? call them physical_count; of experts? leave it out"


def map_among(names: Iterable[str]) -> str | None:
    """The one of some names that is a map of experts by slot; None for none or several."""
    found = [name for name in names if MAP.match(name)]
    return found[0] if len(found) == 1 else None


def of_experts(where: str, counts: IntArray, name: str, given: Any, *, of_slots: bool) -> IntArray:
    """[T, L, E] counts of experts from those of slots [T, L, P], those of an expert's copies added up.

    given: [P], [L, P] or [T, L, P] the expert in each slot, called `name`; of_slots: whether the name of the counts
    says that they are.

    Raises
    ------
    InputError
        Another number of slots, an expert without one, or an order of all experts, where nothing says whether the
        counts are in that order.
    """
    found, limit = f"{name} beside counts", "counts of logical experts, or the expert in each of their slots"
    table = whole_numbers(given, name=f"{where}: {name}", ndims=(1, 2, 3)).astype(np.int64)
    slots = counts.shape[2]
    if table.shape != counts.shape[3 - table.ndim :]:
        raise InputError(where, f"{name} {[*table.shape]} beside counts", f"{limit}, {[*counts.shape]}", NOT_COPIES)
    rows, inverse = np.unique(table.reshape(-1, slots), axis=0, return_inverse=True)
    experts = int(rows.max()) + 1
    if experts < 2 or rows.min() < 0 or any(len(np.unique(row)) < experts for row in rows):
        raise InputError(where, found, limit, f"every layer needs every expert; else {NOT_COPIES}")
    if experts == slots and not of_slots and (rows != np.arange(slots)).any():
        raise InputError(where, found, limit, SAY_WHICH)
    at = np.broadcast_to(inverse.reshape(table.shape[:-1]), counts.shape[:2]).ravel()
    flat = counts.reshape(-1, slots).astype(np.int64)
    made_NE = np.zeros((len(flat), experts), np.int64)
    for number, row in enumerate(rows):
        chosen = np.flatnonzero(at == number)
        made_NE[chosen] = flat[chosen] @ (row[:, None] == np.arange(experts))
    return made_NE.reshape(*counts.shape[:2], experts)


def applied(path: Path, rows: list[dict[Any, Any]], notes: list[str]) -> list[dict[Any, Any]]:
    """Rows of JSON whose counts are of slots as such of experts; any others as they are."""
    name = map_among({str(key) for row in rows for key in row})
    lists = {str(key) for row in rows for key in row if isinstance(row[key], list) and words_of(str(key)) & COUNTED}
    if name is None or len(lists) != 1 or any({name, *lists} - {*row} for row in rows):
        return rows
    of = lists.pop()
    if "logical" in words_of(of):
        return rows
    made = []
    for number, row in enumerate(rows, 1):
        each = whole_numbers(row[of], name=f"{path}: row {number}: {of}", ndims=(1, 2, 3))
        as_steps = each[(None,) * (3 - each.ndim)]
        slots = bool(COPIES.search(of)) or row.get("record_type") == "eplb_load_stats"
        found = of_experts(f"{path}: row {number}", as_steps, name, row[name], of_slots=slots)
        others = {key: cell for key, cell in row.items() if key not in (of, name)}
        made.append({**others, "counts": found.reshape(*each.shape[:-1], -1).tolist()})
    notes.append(said(path.name, of, name))
    return made


def said(file: str, counts: str, name: str) -> str:
    """The note on counts that were of slots."""
    return f"{file}: {counts} of slots became those of experts by {name}, copies added up"

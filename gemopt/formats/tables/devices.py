"""Which devices the rows of a kernel table are of, in which order, none missing, and the samples of each."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from statistics import median

from gemopt.exceptions import InputError
from gemopt.formats.tables.columns import (
    DEVICES,
    ENOUGH,
    HOSTS,
    RANKS,
    SUMMARIES,
    LoadOf,
    known,
    listed,
    plain,
    values,
    words,
)
from gemopt.formats.tables.files import Row, Table
from gemopt.profile import Sample

KINDS = {"gpu", "device", "npu", "xpu", "accelerator", "card"}  # columns that may name kinds as well as devices
MOST_INSIDE = 16  # devices of a node, whose numbers are below


def device_columns(table: Table, asked: Sequence[str], others: Sequence[str] = ()) -> list[str]:
    """Columns that tell devices apart: those asked for, else those whose names say so; hosts first.

    others: columns that were said to tell repeats.
    """
    if asked:
        return [known(table, column, "--device-column") for column in asked]
    named = [name for name in table.header if plain(name) in DEVICES and name not in others]
    ranks = [name for name in named if plain(name) in RANKS]
    for row in table.rows:
        if len({row.cells[name] for name in ranks}) > 1:
            found = " beside ".join(f"{name} {row.cells[name]}" for name in ranks)
            hint = f"say which is that of the experts: --device-column {ranks[-1]}"
            raise InputError(f"{table.path} {row.where}", found, "one number of a rank", hint)
    if ranks:
        return ranks[:1]
    for row in table.rows[:1]:
        refuse_summaries(table, row, named)
    varying = [name for name in named if len(values(table.rows, name)) > 1]
    return sorted(varying, key=lambda name: plain(name) not in HOSTS)


def by_device(table: Table, columns: Sequence[str]) -> list[Table]:
    """Rows of each device, in the order of their numbers, else of appearance."""
    told = [values(table.rows, column) for column in columns]
    doubtful = any(not each or words(each) <= SUMMARIES for found in told for each in found)
    for row in table.rows if doubtful else ():
        empty = next((name for name in columns if not row.cells[name]), None)
        if empty is not None:
            raise InputError(f"{table.path} {row.where}, {empty}", "", "the device of every row")
        refuse_summaries(table, row, columns)
    orders = list(map(_order, told))
    groups: dict[tuple[int, ...], list[Row]] = defaultdict(list)
    for row in table.rows:
        groups[tuple(order[row.cells[name]] for name, order in zip(columns, orders, strict=True))].append(row)
    return [Table(table.path, table.header, groups[key]) for key in sorted(groups)]


def told_apart(table: Table, columns: Sequence[str], asked: Sequence[str], load_of: LoadOf) -> list[Table]:
    """Rows of each device; `InputError` where a column, unless asked for, numbers rows: each has a load of its own."""
    devices = by_device(table, columns)
    loads = [{load_of(row) for row in each.rows} for each in devices]
    own = len(loads) >= ENOUGH and sum(map(len, loads)) == len(loads) == len(set.union(*loads))
    if own and columns and columns[-1] not in asked:
        name = columns[-1]
        found, limit = f"{len(devices)} devices of one load each, all others", "devices of several loads"
        hint = f"does it number rows or runs? --repeat-column '{name}'; if they are devices: --device-column '{name}'"
        raise InputError(f"{table.path}, {name}", found, limit, hint)
    return devices


def refuse_missing_ranks(devices: Sequence[Table], columns: Sequence[str]) -> None:
    """Raise where the column of ranks does not count from 0 on."""
    own = next((name for name in columns if plain(name) in RANKS), None)
    found = [] if own is None else [table.rows[0].cells[own] for table in devices]
    if not all(each.isascii() and each.isdigit() for each in found) or {*map(int, found)} == {*range(len(found))}:
        return
    missing = min({*range(max(map(int, found)))} - {*map(int, found)}, default=0)
    hint = f"rank {missing} is missing; numbered from 1? subtract 1; for these alone: --where {own}=RANK"
    raise InputError(f"{devices[0].path}, {own}", listed(found), f"ranks 0 to {len(found) - 1}", hint)


def chosen_ranks(devices: Sequence[Table], columns: Sequence[str]) -> list[str]:
    """A sentence on ranks of the table that are other ranks of the profile, as only some were chosen."""
    own = next((name for name in columns if plain(name) in RANKS), None)
    found = [] if own is None else [table.rows[0].cells[own] for table in devices]
    if found == [str(rank) for rank in range(len(found))]:
        return []
    return [f"{own} {listed(found, 12)} of the table: numbered anew from 0"]


def kinds_as_ranks(devices: Sequence[Table], columns: Sequence[str]) -> list[str]:
    """A sentence where a column names kinds of device, as it seems (H100, H200), and each became a rank."""
    name = columns[-1] if columns else ""
    found = [table.rows[0].cells[name] for table in devices] if name else []
    numbers = [int(part[1]) for each in found if (part := re.fullmatch(r"\D*(\d+)\D*", each, re.ASCII))]
    if plain(name) not in KINDS or (len(numbers) == len(found) and max(numbers) < MOST_INSIDE):
        return []
    return [f"{name} {listed(found)}: one rank each, as of one group"]


def refuse_summaries(table: Table, row: Row, columns: Sequence[str]) -> None:
    """Raise where a row is of all devices together."""
    for name in columns:
        if words(row.cells[name]) <= SUMMARIES:
            raise InputError(f"{table.path} {row.where}, {name}", row.cells[name], "one device", "leave such rows out")


def _order(found: list[str]) -> dict[str, int]:
    """By the one number in which they differ (`gpu2` before `gpu10`), else as they come."""
    parts = [re.fullmatch(r"(\D*)(\d+)(\D*)", value, re.ASCII) for value in found]
    numbered = all(parts) and len({(part[1], part[3]) for part in parts if part}) == 1
    key = {value: int(part[2]) for value, part in zip(found, parts, strict=True) if part}
    return {value: i for i, value in enumerate(sorted(found, key=key.__getitem__) if numbered else found)}


def samples_of(points: Sequence[tuple[float, int | None, float]]) -> list[Sample]:
    """One sample per load. Of loads that round to the same assignments only the nearest is kept."""
    merged: dict[tuple[int, int | None], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for load, active, latency in points:
        merged[_whole_load(load, active), active][load].append(latency)
    found = []
    for (load, active), by_load in sorted(merged.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        latencies = by_load[min(by_load, key=lambda each: abs(each - load))]
        middle = median(latencies)
        spread = median([abs(each - middle) for each in latencies]) if len(latencies) > 1 else None
        found.append(
            Sample(assignments=load, active_experts=active, latency_us=middle, spread_us=spread, repeats=len(latencies))
        )
    return found


def _whole_load(load: float, active: int | None) -> int:
    """Nearest whole number, but a rank with any work or active expert has at least that many assignments."""
    return max(round(load), active or 0, int(load > 0))

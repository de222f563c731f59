"""Times of the parts of a layer, added up: rows that a column tells apart, several tables, or columns side by side.

Several tables are read as one, with a column that names the file of every row; what that tells apart has to be said.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gemopt.exceptions import InputError
from gemopt.formats.recorded_files import names_of
from gemopt.formats.tables.beside import MIDDLE, refuse_no_measurements
from gemopt.formats.tables.columns import REPEATS, STATISTICS, known, listed, plain, unit_of, values, words
from gemopt.formats.tables.devices import by_device
from gemopt.formats.tables.files import Row, Table, number
from gemopt.formats.tables.kinds import Layout
from gemopt.formats.tables.notations import read
from gemopt.formats.tables.times import ELSEWHERE, PIECES, TOTALS, of_no_layer, refuse_other_operations, time_column

LoadOf = Callable[[Row], tuple[float, ...]]
SUMMED = "added_times_us"
ADD_UP = "kernels of one layer, to be added up: --sum-column {0}; a device each: --device-column {0}; repeats of one "
ADD_UP += "measurement, or loads of their own: --repeat-column {0}"
LARGEST_US = 1e12  # as in a profile
NO_PARTS = {  # words before a number or letter that tells names apart; what these are then; who reads them
    what: (
        re.compile(rf"(?<![a-z])({named})s?([ _-]?i(d|dx|ndex))?[ _-]?(\d+|[a-z])(?![a-z0-9])", re.IGNORECASE),
        option,
    )
    for what, named, option in (
        ("devices", "rank|[gnx]pu|device|card|host|node|worker", "--device-column"),
        ("repeats", "run|rep|repeat|repetition|trial|iter|iteration|attempt", "--repeat-column"),
        ("whole layers", "layer", "--repeat-column"),
    )
}
SUMMED_UP = TOTALS | {"overall", "all", "time", "us", "ms", "layer"}  # words of a part that is the sum of the others
ALIKE_ROWS = 3  # which no two parts have by chance
PARTS = PIECES | ELSEWHERE


def read_tables(paths: Sequence[str | os.PathLike[str]]) -> tuple[Table, str | None]:
    """The rows of all files, and the column that names the file of each; None where there is one."""
    tables = [read(path) for path in paths]
    if len(tables) == 1:
        return tables[0], None
    files = [Path(path) for path in paths]
    if len({os.path.realpath(path) for path in files}) < len(files):
        raise InputError("TABLES", ", ".join(map(str, files))[:200], "each table once")
    header = list(dict.fromkeys(name for table in tables for name in table.header))
    column = next(name for name in ("file", "table_file", "gemopt_file") if name not in header)
    names = names_of(files)
    stems = [os.path.join(os.path.dirname(name), Path(name).name.partition(".")[0]) for name in names]
    told = stems if len(set(stems)) == len(stems) else names
    rows = [
        Row(f"{name} {row.where}", {**dict.fromkeys(header, ""), **row.cells, column: label})
        for name, label, table in zip(names, told, tables, strict=True)
        for row in table.rows
    ]
    folder = os.path.commonpath([os.path.abspath(path.parent) for path in files])
    return Table(os.path.join(folder, ""), [*header, column], rows), column


def refuse_unsaid_files(groups: Sequence[Table], column: str | None) -> None:
    """Raise where the rows of one device and part are of several files, and nothing says what these are."""
    for group in groups if column is not None else ():
        found = values(group.rows, str(column))
        if len(found) > 1:
            raise InputError("TABLES", listed(found, 12), "what these are, said", ADD_UP.format(column))


def doubt_of_files(names: Sequence[str]) -> list[str]:
    """A sentence on tables whose names say that they are of a part of a layer."""
    told = [Path(name).name for name in names if words(Path(name).name.partition(".")[0]) & PARTS]
    if not told:
        return []
    shown = f"{listed(told)}: of a part of the layer, by the name?"
    return [f"{shown} then give the tables of all parts, and --sum-column file"]


def with_added_times(table: Table, asked: str | None) -> tuple[Table, str | None]:
    """The table with one column for the sum of `NAME[:ms]+NAME[:ms]`, and the name of that; else both as they are."""
    if asked is None or "+" not in asked or asked in table.header or asked.rpartition(":")[0] in table.header:
        return table, asked
    found = [time_column(table, each.strip()) for each in asked.split("+")]
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise InputError("--time-column", asked, "each time once")
    told = _told_apart(names)
    if told or len({frozenset(words(name) & (STATISTICS | TOTALS) - MIDDLE) for name in names}) > 1:
        raise InputError(
            "--time-column", asked, f"times of parts, and no {told[0] if told else 'statistics or totals'}"
        )
    if other := of_no_layer(names):
        limit, hint = "parts of a MoE layer, without the exchange of tokens", "leave it out; a topology adds exchanges"
        raise InputError("--time-column", ", ".join(other), limit, hint)
    header = [name for name in table.header if name not in names]
    rows = [Row(row.where, {**row.cells, SUMMED: repr(_summed(table, row, found))}) for row in table.rows]
    return Table(table.path, [*header, SUMMED], rows), SUMMED


def _summed(table: Table, row: Row, found: Sequence[tuple[str, float]]) -> float:
    """Microseconds of all times of a row; nothing at all where it is idle."""
    idle = not any(number(table, row, name, largest=LARGEST_US) for name, _ in found)
    return 0.0 if idle else sum(_above_0(table, row, name) * scale for name, scale in found)


def left_out_of_sum(table: Table, time: str) -> list[str]:
    """A sentence on times of parts beside those that were added up, or of exchanges beside a total.

    time: the column that is read.
    """
    others = [name for name in table.header if name != time and unit_of(name)]
    if time == SUMMED:
        left = [name for name in others if words(name) & PIECES]
        return [f"{', '.join(left)} not among the times that are added up"] if left else []
    held = of_no_layer(others) if words(time) & (TOTALS | {"e2e", "overall"}) else []
    return [f"{time} beside {', '.join(held)}: is it without them? a topology adds exchanges of tokens"] if held else []


def refuse_other_rows(
    full: Table,
    table: Table,
    layout: Layout | None,
    repeat: Sequence[str],
    said_of: Sequence[str | None],
    parts: Sequence[str],
) -> None:
    """Raise where columns say that rows are no runs of whole layers that went well, and no parts to be added up."""
    for name in parts:
        known(table, name, "--sum-column")
        if said_of[:-1].count(name) > 1:  # but the column of files, which is last
            raise InputError("--sum-column", name, "a column that is not said to tell devices or repeats apart")
        _refuse_no_parts(table, name, of_file=name == said_of[-1])
    of_file = said_of[-1] or ""
    found = values(table.rows, of_file) if of_file in repeat else []
    if (told := _told_apart(found)) and told[0] == "devices":
        raise InputError("--repeat-column", listed(found), "repeats, and no devices", f"--device-column {of_file}")
    unsaid = [] if layout else [each for each in full.header if each not in said_of]
    varying = [each for each in unsaid if len(values(full.rows, each)) > 1]
    pieces = by_device(table, parts) if parts else []
    apart = [name for name in table.header if len(values(table.rows, name)) > 1]
    named = [name for name in apart if pieces and all(len(values(each.rows, name)) == 1 for each in pieces)]
    others = Table(table.path, [each for each in table.header if each not in (*parts, *named)], table.rows)
    varying = [each for each in varying if each not in named]
    refuse_other_operations(others, varying, read_over={*repeat, *(layout.tuned if layout else ())})
    _refuse_exchanges(table, [*parts, *named])
    if layout is None:
        chosen = [name for name in full.header if len(values(full.rows, name)) > 1 == len(values(table.rows, name))]
        refuse_no_measurements(table, repeat, chosen)


def _told_apart(names: Sequence[str]) -> tuple[str, str] | None:
    """What names are, and the option that reads them, where only a number after its word tells some apart."""
    for what, (pattern, option) in NO_PARTS.items():
        if len({pattern.sub(r"\1", name) for name in names}) < len(names):
            return what, option
    return None


def _refuse_no_parts(table: Table, name: str, *, of_file: bool) -> None:
    """Raise where a column names devices, repeats or layers, or the sum of others; or two files are the same."""
    found = values(table.rows, name)
    told = _told_apart([f"{name} {each}" for each in found])
    told = ("repeats", "--repeat-column") if plain(name) in REPEATS else told
    if told and len(found) > 1:
        hint = f"{told[1]} '{name}'"
        raise InputError(f"{table.path}, {name}", listed(found), f"parts of a layer, and no {told[0]}", hint)
    total = [each for each in found if words(each) <= SUMMED_UP and words(each) & TOTALS]
    if total and len(found) > 1:
        hint = _without(name, [each for each in found if each not in total])
        raise InputError(f"{table.path}, {name}", listed(total), "parts, and not their sum", hint)
    before: dict[tuple[tuple[str, ...], ...], str] = {}
    for each in by_device(table, [name]) if of_file else ():
        cells = tuple(tuple(cell for key, cell in row.cells.items() if key != name) for row in each.rows)
        label = each.rows[0].cells[name]
        if len(cells) >= ALIKE_ROWS and (first := before.setdefault(cells, label)) != label:
            hint = "give each once; where two parts do take as long, tell them by another column"
            raise InputError(f"{table.path}, {name}", label, f"other rows than those of {first}", hint)


def _without(name: str, others: Sequence[str]) -> str:
    return "leave such rows out: " + " ".join(f"--where '{name}={each}'" for each in others)


def _refuse_exchanges(table: Table, parts: Sequence[str]) -> None:
    """Raise where one of the parts to be added up is an exchange between ranks, or outside of a MoE layer."""
    for name in parts:
        found = values(table.rows, name)
        if told := of_no_layer(found):
            hint = f"a topology adds exchanges; {_without(name, [each for each in found if each not in told])}"
            limit = "parts of a MoE layer, without the exchange of tokens"
            raise InputError(f"{table.path}, {name}", listed(told), limit, hint)


def split(devices: Sequence[Table], parts: Sequence[str]) -> list[Table]:
    """The rows of each device and part."""
    return [each for device in devices for each in by_device(device, parts)] if parts else list(devices)


def summed(
    devices: Sequence[Table], parts: Sequence[str], kept: Sequence[str], time: str, load_of: LoadOf
) -> tuple[Table, list[str]]:
    """A row for each device and load, with the sum of the medians of its parts; and what to say of them.

    Parameters
    ----------
    devices
        The rows of each device, in which only repeats and results differ beside load and part.
    parts, time
        Columns that tell the parts apart, and the column of the times, whatever its unit.
    kept
        Columns of devices and loads, which stay as they are beside those that say one thing of each part.

    Raises
    ------
    InputError
        A part was not measured at a load of another one.
    """
    table = Table(devices[0].path, devices[0].header, [row for each in devices for row in each.rows])
    pieces = by_device(table, parts)
    alone = [name for name in table.header if all(len(values(each.rows, name)) == 1 for each in pieces)]
    apart = [name for name in alone if len(values(table.rows, name)) > 1]
    header = [name for name in table.header if name in (*kept, time) or name in alone]
    rows = []
    for device in devices:
        each = [_by_load(part, load_of) for part in by_device(device, parts)]
        labels = [_label(next(iter(part.values()))[0], parts) for part in each]
        _refuse_missing(device, each, [_label(piece.rows[0], parts) for piece in pieces], labels)
        for load, first in each[0].items():
            total = sum(_median(device, part[load], time, idle=not load[0]) for part in each)
            cells = {name: first[0].cells[name] for name in header}
            cells |= {name: "+".join(values([part[load][0] for part in each], name)) for name in apart}
            rows.append(Row(first[0].where, {**cells, time: repr(float(total))}))
    told = [f"{' + '.join(_label(piece.rows[0], parts) for piece in pieces)}: their times are added up"]
    others = [name for name in apart if name not in parts]
    told += [f"the parts differ in {', '.join(others)}"] if others else []
    return Table(table.path, header, rows), told


def _by_load(part: Table, load_of: LoadOf) -> dict[tuple[float, ...], list[Row]]:
    found: dict[tuple[float, ...], list[Row]] = defaultdict(list)
    for row in part.rows:
        found[load_of(row)].append(row)
    return found


def _refuse_missing(
    device: Table, each: Sequence[dict[tuple[float, ...], list[Row]]], wanted: list[str], labels: list[str]
) -> None:
    if lacking := [label for label in wanted if label not in labels]:
        raise InputError(f"{device.path} {device.rows[0].where}", f"no {lacking[0]}", "all parts on every device")
    for label, part in zip(labels, each, strict=True):
        for other, others in zip(labels, each, strict=True):
            load = next((load for load in others if load not in part), None)
            if load is not None:
                shown = " and ".join(f"{number:g}" for number in load)
                where = f"{device.path} {others[load][0].where}"
                limit, hint = f"each load in all parts: {shown} is missing in {label}", "leave it out, or measure it"
                raise InputError(where, f"load {shown} of {other}", limit, hint)


def _median(table: Table, rows: Sequence[Row], time: str, *, idle: bool) -> float:
    read_time = number if idle else _above_0
    return float(np.median([read_time(table, row, time, largest=LARGEST_US) for row in rows]))


def _above_0(table: Table, row: Row, time: str, *, largest: float = LARGEST_US) -> float:
    found = number(table, row, time, largest=largest)
    if not found:
        raise InputError(f"{table.path} {row.where}, {time}", row.cells[time], "above 0: work takes time")
    return found


def _label(row: Row, parts: Sequence[str]) -> str:
    return " ".join(row.cells[name] for name in parts)

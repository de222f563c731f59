"""Cells as people and spreadsheets write numbers, `20,5`, `1,024`, `1 024` or `20.5 us`, as plain ones."""

from __future__ import annotations

import os
import re

from gemopt.exceptions import InputError
from gemopt.formats.tables import files
from gemopt.formats.tables.columns import (
    RESULTS,
    STATES,
    STATISTICS,
    TIME_UNITS,
    TIMES,
    plain,
    unit_of,
    values,
    words,
)
from gemopt.formats.tables.files import Row, Table
from gemopt.formats.tables.loads import LOAD_COLUMNS

BLANKS = " '\u00a0\u2009\u202f\u2019"
NOTATIONS = {  # by the sign before decimals
    point: re.compile(
        rf"[-+]?(?=[{point}]?\d)(?:\d+|[1-9]\d{{0,2}}([{BLANKS}{group}])\d{{3}}(?:\1\d{{3}})*)?(?:[{point}]\d*)?"
        rf"(?:[eE][-+]?\d+)? ?[%x\u00d7]?"
    )
    for point, group in ((".", ","), (",", "."))
}
WITH_UNIT = re.compile(r"(.*\d) ?([a-zA-Z\u00b5\u03bc][a-zA-Z\u00b5\u03bc/ ]*)")
SPREAD = re.compile(  # 20.5 ± 0.3 us; 20.5 ± 1.2 %; 20.5 us ± 300 ns per loop (mean ± std. dev. of 7 runs)
    r"([^\u00b1]*?\d)( ?[a-z\u00b5\u03bc]+)? ?(?:\u00b1|\+/?-) ?[\d.,]+(?:e[-+]?\d+)?"
    r"(?: ?%|( ?[a-z\u00b5\u03bc]+))?(?: per loop\b.*)?",
    re.IGNORECASE,
)
MEASURED = TIMES | STATES | RESULTS | STATISTICS
LIST = re.compile(r"\[[^\[\],]+(?:,[^\[\],]+)*\]")
SEVERAL = {"times", "latencies", "durations", "timings", "samples", "measurements", "repeats", "runs"}
REPEATED = SEVERAL | {*TIME_UNITS} | {"all", "raw", "latency", "time", "moe", "fused", "forward", "fwd"}
RATES = re.compile(r".*/ ?s(ec)?|[tgp]flops?(/s)?|[tg]bps", re.IGNORECASE)


def read(path: str | os.PathLike[str]) -> Table:
    """Rows of a file with plain numbers; those of times in the unit that their column names, or now does.

    Commas stand before decimals, or between thousands, where all numbers of the table can be so and not otherwise;
    where both is possible (`20,512` beside `512`) cells stay as they are. So do cells without any digit.

    Raises
    ------
    InputError
        Naming the file and the line that is wrong, as one whose cell names another unit than its column.
    """
    table = _central(_repeated(files.read(path)))
    found = {name: each for name in table.header if len(each := values(table.rows, name)) > 1}
    units = {name: told for name, each in found.items() if (told := _units(each))}
    cells = found | {name: [WITH_UNIT.sub(r"\1", cell) for cell in found[name]] for name in units}
    fitting = {name: points for name in cells if (points := _fitting(name, cells[name]))}
    plainly = [
        {name: [_plain(cell, point) for cell in cells[name]] for name in fitting}
        for point in NOTATIONS
        if all(point in points for points in fitting.values())
    ]
    for name in fitting if plainly else ():
        cells[name] = plainly[0][name] if all(each[name] == plainly[0][name] for each in plainly) else cells[name]
    names = {name: name for name in table.header}
    for name, told in units.items():
        unit = unit_of(name) or (told[0] if len({*told} - {""}) == 1 else "us")
        scales = [TIME_UNITS.get(each, 1) / TIME_UNITS.get(unit, 1) if each else 1.0 for each in told]
        other = next((cell for cell, scale in zip(found[name], scales, strict=True) if scale != 1), None)
        if unit_of(name) and other is not None:
            where = next(row.where for row in table.rows if row.cells[name] == other)
            limit, hint = f"times in {unit}, as the name of the column says", "which is right? mend the other"
            raise InputError(f"{table.path} {where}, {name}", other, limit, hint)
        cells[name] = [_scaled(cell, scale) for cell, scale in zip(cells[name], scales, strict=True)]
        names[name] = name if unit_of(name) else f"{name} ({unit})"
    changed = {name: dict(zip(found[name], cells[name], strict=True)) for name in found if found[name] != cells[name]}
    if not changed:
        return table
    rows = [
        Row(row.where, {names[n]: changed[n][cell] if n in changed else cell for n, cell in row.cells.items()})
        for row in table.rows
    ]
    return Table(table.path, list(names.values()), rows)


def _repeated(table: Table) -> Table:
    """The table with a row for each time of lists in cells, `[20.5, 21.0]`; without them where other times are.

    Lists of other names may be of ranks, layers or kernels, and stay as they are.
    """
    lists = [name for name in table.header if all(LIST.fullmatch(row.cells[name]) for row in table.rows)]
    listed = [name for name in lists if unit_of(name) and words(name) <= REPEATED and words(name) & SEVERAL]
    header = [name for name in table.header if name not in listed]
    if listed and any(unit_of(name) for name in header if name not in lists):
        return Table(table.path, header, [Row(row.where, {n: row.cells[n] for n in header}) for row in table.rows])
    if len(listed) != 1:
        return table
    rows = [
        Row(row.where, {**row.cells, listed[0]: time.strip()})
        for row in table.rows
        for time in row.cells[listed[0]].strip("[]").split(",")
    ]
    return Table(table.path, table.header, rows)


def _central(table: Table) -> Table:
    """The table without the spread behind each result, where all cells of a column have one: `20.5 ± 0.3 us`."""
    names = [name for name in table.header if unit_of(name) or words(name) & MEASURED]
    spread = [name for name in names if all(SPREAD.fullmatch(row.cells[name]) for row in table.rows)]
    rows = [Row(row.where, row.cells | {n: _middle(row.cells[n]) for n in spread}) for row in table.rows]
    return Table(table.path, table.header, rows) if spread else table


def _middle(cell: str) -> str:
    found = SPREAD.fullmatch(cell)
    return f"{found[1]}{found[2] or found[3] or ''}" if found else cell


def _fitting(name: str, cells: list[str]) -> list[str]:
    """The signs before decimals that all cells of a column can have; none where it has no numbers."""
    fitting = [point for point in NOTATIONS if _fits(cells, point)]
    return [point for point in fitting if not (point == "," and _broken(name, cells))]


def _fits(cells: list[str], point: str) -> bool:
    """Whether all cells with digits are numbers in a notation, and some are there.

    Not where thousands are set apart in some and decimals in others, and both in none: `1,5` beside `1.002`.
    """
    told = [cell for cell in cells if re.search(r"\d", cell)]
    if not told or not all(map(NOTATIONS[point].fullmatch, told)):
        return False
    signs = {(point in cell, ",.".replace(point, "") in cell) for cell in told}
    return not {(True, False), (False, True)} <= signs or (True, True) in signs


def _broken(name: str, cells: list[str]) -> bool:
    """Whether the commas of loads, which are whole numbers, stand between thousands, and not before decimals."""
    return plain(name) in LOAD_COLUMNS and any(cell.rpartition(",")[2].strip("0") for cell in cells if "," in cell)


def _plain(cell: str, point: str) -> str:
    whole, sign, decimals = cell.partition(point)
    return re.sub(rf"(?<=\d)[{BLANKS},.](?=\d{{3}})", "", whole) + "." * bool(sign) + decimals


def _scaled(cell: str, scale: float) -> str:
    """A number in another unit; what is none, as one that stayed as it is, with the factor that it lacks."""
    if scale == 1:
        return cell
    try:
        return repr(float(cell) * scale)
    except ValueError:
        return f"{cell} x {scale:g}"


def _units(cells: list[str]) -> list[str]:
    """The unit of each cell of a column, empty where there is no digit; nothing unless all are of time, or one rate."""
    found = []
    for cell in cells:
        told = WITH_UNIT.fullmatch(cell)
        if told is None or not any(_fits([told[1]], point) for point in NOTATIONS):
            if re.search(r"\d", cell):
                return []
            found.append("")
        else:
            found.append(plain(told[2]) if plain(told[2]) in TIME_UNITS else told[2])
    named = {*found} - {""}
    rate = len(named) == 1 and RATES.fullmatch(next(iter(named)))
    return found if named and (rate or named <= TIME_UNITS.keys()) else []

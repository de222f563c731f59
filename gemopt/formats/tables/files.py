"""Rows of a table, whatever file they come in: CSV, parquet, printed columns, or what benchmark_moe prints."""

from __future__ import annotations

import ast
import bz2
import csv
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gemopt.documents import read_bytes
from gemopt.exceptions import InputError, install_hint
from gemopt.formats.json_rows import JSON, beside_rows, frame_rows, is_flat, parsed, unnested
from gemopt.formats.tables.printed import alone, printed

BATCH = re.compile(r"Batch size: (\d+)(?:, config: (.*?))?(?=, kernel time:|$)", re.IGNORECASE | re.MULTILINE)
KERNEL_TIME = re.compile(r"Kernel time: (\S+) us", re.IGNORECASE)
ARGUMENTS = re.compile(r"Namespace\(.*\)\s*$")
LOG_HEADER = ["batch_size", "kernel_time_us", "config", "part"]
EXCEL = re.compile(r"\s*sep=.\r?\n")  # its way to name the separator
DOTS = {"...", "..", "\u2026"}  # as pandas prints columns that it leaves out
LEFT_OUT = re.compile(r"[\s,;|\u2502\u2506]*(?:\.{2,3}|\u2026)[\s.,;|\u2026\u2502\u2506]*")  # and rows
GROUPED = re.compile(r"[1-9]\d{0,2}\.\d{3}")
UTF16 = (b"\xff\xfe", b"\xfe\xff")
LEAST_US = 0.5  # of a layer
UNNAMED = "Unnamed: 0"  # as pandas calls a first column without a name
UNPACKED = 1 << 31
PACKED: dict[bytes, tuple[str, Callable[[io.BytesIO], Any]]] = {
    b"\x1f\x8b": (".gz", gzip.open),
    b"BZh": (".bz2", bz2.open),
    b"\xfd7zXZ\0": (".xz", lzma.open),
}
BINARY = {
    b"PK\x03\x04": ("an archive, as Excel's workbooks are", "save it as CSV"),
    b"\xd0\xcf\x11\xe0": ("a workbook of Excel", "save it as CSV"),
    b"\x28\xb5\x2f\xfd": ("a file packed by zstd", "unpack it: zstd -d"),
    b"SQLite format 3": ("a database, as nsys writes them", "nsys stats --format csv"),
    b"<": ("a page of HTML or XML", "save its table as CSV"),
    b"%PDF": ("a PDF", "save its table as CSV"),
    b"": ("binary data", "save it as CSV"),  # any other
}
NO_LOADS = "profilers tell no loads: write a row for each load, with the time of the whole layer; or gemopt profile"
RESULTS = re.compile(r"(?:Noise|Samples)\b", re.IGNORECASE)
NO_MATTER = {"batch_size", "tune", "seed", "save_dir", "trust_remote_code"}  # arguments that change no kernel


@dataclass(frozen=True)
class Row:
    """Cells by column, and where they stand: `line 7`, or `row 7` of a parquet file."""

    where: str
    cells: dict[str, str]


@dataclass(frozen=True)
class Table:
    """Rows of one file; at least one."""

    path: str
    header: list[str]
    rows: list[Row]


def read(path: str | os.PathLike[str]) -> Table:
    """Rows of a file, told apart by its content.

    Raises
    ------
    InputError
        Naming the file and the line that is wrong.
    """
    data = read_bytes(path)
    data = _unpacked(str(path), data)
    if data[:4] == b"PAR1":
        return _parquet(str(path), data)
    text = _decoded(str(path), data)
    text = alone(text.replace("\r\n", "\n").replace("\r", "\n"))
    if JSON.match(text):
        return _records(str(path), text)
    if BATCH.search(text) or KERNEL_TIME.search(text):
        return _log(str(path), text)
    return _csv(str(path), text)


def number(table: Table, row: Row, column: str, *, largest: float) -> float:
    """A cell as a number from 0 to `largest`."""
    try:
        value = float(row.cells[column])
    except ValueError:
        value = float("nan")
    if not 0 <= value <= largest:
        where, cell = f"{table.path} {row.where}, {column}", row.cells[column]
        raise InputError(where, cell, f"a number from 0 to {largest:.10g}", _mended(cell, column))
    return value


def _mended(cell: str, column: str) -> str:
    """What to do about a cell that is no number; empty when nothing is known of it."""
    if cell == column:
        return "the header again: several tables in one file? tell their rows by a column, or import one of them"
    if re.fullmatch(r"[-+]?\d[\d.]*(?:[,' \u00a0\u2009\u202f\u2019][\d.]+)+", cell):
        return "a dot before decimals, and nothing between thousands"
    if re.match(r"[-+]?[\d.]+\s*[^\d\s.]|[a-zA-Z]+[ _-]?\d+$", cell):
        return "the number alone, without its unit or a note"
    if not cell:
        return "merged cells? fill them down; a failed run? leave the row out"
    return "a failed run, or a row of units? leave it out" if not re.search(r"\d", cell) else ""


def refuse_grouped(table: Table, column: str, scale: float = 1.0) -> None:
    """Raise where dots may stand between thousands: 512, 1.024, 2.048; scale: microseconds of a unit, where it is one.

    In nanoseconds they do where the times were else none of a layer: 20.512.
    """
    dotted = [row for row in table.rows if GROUPED.fullmatch(row.cells[column])]
    short = [row for row in table.rows if row.cells[column].isdigit() and len(row.cells[column]) <= 3]
    even = all(row.cells[column].endswith("000") or float(row.cells[column]) * scale < LEAST_US for row in dotted)
    if dotted and len(dotted) + len(short) == len(table.rows) and (short or even):
        cell = dotted[0].cells[column]
        hint = f"write {cell.replace('.', '')} or {float(cell)}"
        raise InputError(f"{table.path} {dotted[0].where}, {column}", cell, "a fraction, or thousands?", hint)


def whole(table: Table, row: Row, column: str, *, largest: float) -> int:
    """A cell as a whole number from 0 to `largest`."""
    value = number(table, row, column, largest=largest)
    if value != int(value):
        raise InputError(f"{table.path} {row.where}, {column}", row.cells[column], "a whole number")
    return int(value)


def _unpacked(path: str, data: bytes) -> bytes:
    found = next((kind for start, kind in PACKED.items() if data.startswith(start)), None)
    if found is None:
        return data
    suffix, opened = found
    try:
        with opened(io.BytesIO(data)) as stream:
            unpacked = stream.read(UNPACKED + 1)
    except (OSError, EOFError, zlib.error, lzma.LZMAError):
        raise InputError(path, "a packed file that is cut", f"a complete {suffix} file") from None
    if len(unpacked) > UNPACKED:
        raise InputError(path, "a larger file", f"at most {UNPACKED} bytes when unpacked")
    return bytes(unpacked)


def _decoded(path: str, data: bytes) -> str:
    wide = data.startswith(UTF16)
    told = next(told for start, told in BINARY.items() if data.startswith(start))
    if (told[0] != "binary data" or b"\0" in data) and not wide:
        raise InputError(path, told[0], "a table as text or parquet", told[1])
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte {data[error.start]:#04x} in line {data.count(bytes([10]), 0, error.start) + 1}"
        raise InputError(
            path, found, "text in UTF-8", "save it as 'CSV UTF-8', or: iconv -f ENCODING -t UTF-8"
        ) from None


def _records(path: str, text: str) -> Table:
    """Rows that are JSON objects of plain values, in a list or one on each line, or a data frame."""
    found = parsed(path, text)
    if isinstance(found, dict) and "traceEvents" in found:
        raise InputError(path, "a trace of events", "rows of loads and times", NO_LOADS)
    if not is_flat(found) and not _is_tuned(found):
        found = beside_rows(frame_rows(unnested(_of_pytest(found))))
    found = [found] if is_flat(found) else found
    if not isinstance(found, list) or not found or not all(map(is_flat, found)):
        tuned = _is_tuned(found)
        limit = "kernel settings of --tune have no times" if tuned else "a list of rows with plain values"
        hint = "run benchmark_moe without --tune and give what it prints" if tuned else "or write the rows as CSV"
        inner = [] if tuned else _nested(found)
        raise InputError(path, f"JSON with {', '.join(inner)[:100]} in it" if inner else "JSON", limit, hint)
    found = [{str(name) or UNNAMED: cell for name, cell in row.items()} for row in found]
    header = list(dict.fromkeys(name for row in found for name in row))
    rows = [{name: "" if row.get(name) is None else str(row[name]) for name in header} for row in found]
    return Table(path, header, [Row(f"row {number}", cells) for number, cells in enumerate(rows, 1)])


def _nested(found: Any) -> list[str]:
    """The names of the innermost lists and objects in rows, which are no plain values."""
    rows = [row for row in (found if isinstance(found, list) else [found]) if isinstance(row, dict)]
    cells = {str(name): each for row in rows for name, each in row.items() if isinstance(each, list | dict)}
    return list(dict.fromkeys(name for each in cells.values() for name in _nested(each))) or list(cells)


def _is_tuned(found: Any) -> bool:
    return isinstance(found, dict) and any(isinstance(each, dict) and "BLOCK_SIZE_M" in each for each in found.values())


def _of_pytest(found: Any) -> Any:
    """Rows of pytest-benchmark's document: function, parameters and what was added, and times; else as it is."""
    if not isinstance(found, dict) or not {"machine_info", "benchmarks"} <= found.keys():
        return found
    given, kinds = found["benchmarks"], ("params", "extra_info", "stats")
    rows = []
    for each in given if isinstance(given, list) else ():
        parts = [each.get(kind) or {} for kind in kinds] if isinstance(each, dict) else [each]
        if not all(isinstance(part, dict) for part in parts):
            return found
        told, more, times = parts
        function = str(each.get("fullname", "")).partition("[")[0]
        seconds = {f"time_{name}_s": times.get(name) for name in ("median", "mean", "min", "max", "stddev")}
        rows.append({"function": function, **told, **more, **seconds})
    return rows


def _uncommented(text: str) -> str:
    """Lines that begin with # at the start are blank; the last is the header where numbers follow it."""
    lines = text.splitlines()
    count = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), 0)
    named = count > 0 and bool(re.match(r"\s*[-+.\d]", lines[count]))
    last = max((i for i in range(count) if lines[i].strip("# \t")), default=0)
    kept = [lines[last].lstrip("# ")] if named else [""]
    return "\n".join([*[""] * last, *kept, *[""] * (count - last - 1), *lines[count:]]) if count else text


def _csv(path: str, text: str) -> Table:
    text = EXCEL.sub("", text, count=1) if EXCEL.match(text) else text
    text = _uncommented(text) if text.startswith("#") else text
    first = text.lstrip().partition("\n")[0].strip()
    if DOTS & {*re.split(r"[\s,;|]+", first)} or any(map(LEFT_OUT.fullmatch, text.splitlines())):
        limit = "all rows and columns of a table"
        raise InputError(path, "dots where some were left out", limit, "save it whole: DataFrame.to_csv")
    delimiter = max("|,;\t", key=first.count)
    if delimiter not in first or delimiter == "|":
        lines = printed(text)
        if lines and len(lines[0][1]) == 1 and re.search(r"\s", lines[0][1][0]):
            limit = "columns that commas, tabs or bars set apart, or blanks with every cell below its name"
            below = text.lstrip().partition("\n")[2].lstrip().partition("\n")[0]
            title = any(each in below for each in ",;\t") and delimiter not in first
            hint = "leave out the title above the header" if title else "give the lines of the table alone"
            raise InputError(path, lines[0][1][0], limit, hint)
        return _table(path, lines)
    try:
        reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True, skipinitialspace=delimiter != "\t")
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
    except csv.Error as error:
        raise InputError(path, str(error), "a CSV file in UTF-8 is needed") from None
    return _table(path, lines)


def _table(path: str, lines: list[tuple[int, list[str]]]) -> Table:
    lines = [(line, cells) for line, cells in lines if any(cells)]
    while len(lines) > 2 and len(lines[0][1]) > 2 and not any(lines[0][1][1:]):
        del lines[0]  # a title above the header, as spreadsheets save it
    if len(lines := _filled(lines)) < 2:
        raise InputError(path, "no rows", "a header line and at least one row are needed")
    header = [name or (UNNAMED if not i else name) for i, name in enumerate(_numbered(lines[0][1]))]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InputError(path, f"columns {', '.join(twice)} twice", "each column once")
    for line, cells in lines:
        if len(cells) != len(header):
            hint = "leave out titles above the header and notes below" if 1 in (len(cells), len(header)) else ""
            limit = f"{len(header)} columns, as in the header"
            raise InputError(f"{path} line {line}", f"{len(cells)} columns", limit, hint)
    rows = [Row(f"line {line}", dict(zip(header, cells, strict=True))) for line, cells in lines[1:]]
    return Table(path, header, rows)


def _numbered(header: list[str]) -> list[str]:
    """The header with results of several measurements, which nvbench names alike, told apart as `Noise.1`."""
    return [
        f"{name}.{before}" if RESULTS.match(name) and (before := header[:i].count(name)) else name
        for i, name in enumerate(header)
    ]


def _filled(lines: list[tuple[int, list[str]]]) -> list[tuple[int, list[str]]]:
    """The lines without columns at the end that have neither a name nor any cell, as spreadsheets leave them."""
    while (
        lines and len(lines[0][1]) > 1 and all(len(cells) == len(lines[0][1]) and not cells[-1] for _, cells in lines)
    ):
        lines = [(line, cells[:-1]) for line, cells in lines]
    return lines


def _parquet(path: str, data: bytes) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            path, "a parquet file", "reading it needs pyarrow", f"{install_hint('tables')}, or save it as CSV"
        ) from None
    try:
        columns = pyarrow.parquet.read_table(io.BytesIO(data)).to_pydict()
    except pyarrow.ArrowException as error:
        raise InputError(path, str(error), "a readable parquet file") from None
    header = [str(name) for name in columns]
    texts = [["" if value is None else str(value).strip() for value in values] for values in columns.values()]
    rows = [
        Row(f"row {i}", dict(zip(header, cells, strict=True))) for i, cells in enumerate(zip(*texts, strict=True), 1)
    ]
    if not rows:
        raise InputError(path, "no rows", "at least one row is needed")
    return Table(path, header, rows)


def _log(path: str, text: str) -> Table:
    """Each `Batch size: 8, config: {...}` with the `Kernel time: 61.20 us` after it; a new run is a new part."""
    rows: list[Row] = []
    arguments: dict[str, str] = {}
    pending: dict[str, str] | None = None
    part, seen, line = 1, set[str](), 0
    for line, content in enumerate(text.splitlines(), 1):
        batch, time, started = BATCH.search(content), KERNEL_TIME.search(content), ARGUMENTS.search(content)
        if pending is not None and (batch or started):
            break
        if started:
            arguments = _arguments(started[0])
            part, seen = part + bool(seen), set()
        elif batch:
            if batch[1] in seen:
                part, seen = part + 1, set()
            seen.add(batch[1])
            config = (batch[2] or "").strip()
            pending = {**arguments, "batch_size": batch[1], "config": config, "part": str(part)}
        if time and pending is None:
            raise InputError(f"{path} line {line}", content, "a line `Batch size: N, config: ...` before each time")
        elif time and not time[1].replace(".", "", 1).isdigit():
            raise InputError(f"{path} line {line}", content, "a time in microseconds")
        elif time and pending is not None:
            rows.append(Row(f"line {line}", {**pending, "kernel_time_us": time[1]}))
            pending = None
    if pending is not None:
        found = f"no time for batch size {pending['batch_size']}"
        raise InputError(f"{path} line {line}", found, "a line `Kernel time: N us` after each batch size")
    header = list(dict.fromkeys([*LOG_HEADER, *(name for row in rows for name in row.cells)]))
    return Table(path, header, [Row(row.where, {name: row.cells.get(name, "") for name in header}) for row in rows])


def _arguments(text: str) -> dict[str, str]:
    """Command line of a run, as Python prints it: `Namespace(model='...', tp_size=2)`."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        return {"arguments": text.strip()}
    keywords = call.keywords if isinstance(call, ast.Call) else []
    named = {word.arg: ast.unparse(word.value).strip("'\"") for word in keywords if word.arg}
    return {name: value for name, value in named.items() if name not in NO_MATTER}

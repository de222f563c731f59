"""Read anyone's kernel table as a profile: plain ones, aiconfigurator's, AMD aiter's, benchmark_moe's output."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from statistics import median
from typing import Any

from gemopt.documents.foreign import telling
from gemopt.exceptions import InputError, check_number
from gemopt.formats.tables.beside import beside, refuse_other_units, refuse_skewed_groups, unread
from gemopt.formats.tables.columns import (
    HOSTS,
    RANKS,
    REPEATS,
    UUIDS,
    chosen_rows,
    known,
    named,
    plain,
    refuse_mixtures,
    values,
)
from gemopt.formats.tables.devices import (
    by_device,
    chosen_ranks,
    device_columns,
    kinds_as_ranks,
    refuse_missing_ranks,
    samples_of,
    told_apart,
)
from gemopt.formats.tables.doubts import doubts, repeats_apart
from gemopt.formats.tables.files import Row, Table, number, refuse_grouped, whole
from gemopt.formats.tables.fleet import Fleet, equal, read_fleet, slow_down, what_if
from gemopt.formats.tables.kinds import (
    AICONFIGURATOR,
    AITER,
    AITER_EP,
    BENCHMARK_MOE,
    LAYOUTS,
    Layout,
    Unit,
    kernel,
    named_unit,
    refuse_fused,
    refuse_skewed,
    settled,
    shape,
)
from gemopt.formats.tables.loads import (
    ACTIVE,
    EP,
    LARGEST_LOAD,
    TOP_K,
    doubts_of_load,
    experts_of_a_rank,
    factor,
    given,
    load_column,
    matching,
    refuse_tokens_of_a_rank,
    shared_experts,
    unit_of_load,
)
from gemopt.formats.tables.parts import (
    doubt_of_files,
    left_out_of_sum,
    read_tables,
    refuse_other_rows,
    refuse_unsaid_files,
    split,
    summed,
    with_added_times,
)
from gemopt.formats.tables.times import doubt_of_time, time_column
from gemopt.profile import Device, Profile

__all__ = ["Fleet", "Unit", "equal", "read_fleet", "read_table", "slow_down", "what_if"]

LARGEST_US = 1e12  # as in a profile
MANYFOLD = 0.5  # of the median: half of the repeats of a load lie further from it, as two that are threefold apart do


Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def read_table(
    path: Paths,
    *,
    unit: Unit | str | None = None,
    top_k: int | None = None,
    ep: int | None = None,
    where: Sequence[str] = (),
    load: str | None = None,
    time: str | None = None,
    device: Sequence[str] = (),
    repeat: Sequence[str] = (),
    parts: Sequence[str] = (),
    notes: list[str] | None = None,
) -> Profile:
    """Profile from a table of loads and times: CSV, parquet, Markdown, columns set apart by blanks, benchmark_moe's.

    Rows of one load are merged: median latency, median absolute deviation, number of rows. Rows that differ in
    something else than repeats and results are refused.

    Parameters
    ----------
    path
        One table, or several that are read as one, with a column `file` which is then to be said what it tells apart.
    unit
        What the load column counts; default: what is known of the table's kind, else assignments.
    top_k, ep
        Experts per token and ranks of the measured group, where the table does not say.
    where
        `COLUMN=VALUE`, rows to read.
    load
        Column with the load, of any name; `unit` says what it counts.
    time
        Column with the time, perhaps with its unit: `NAME:ms`; several to be added up: `NAME:ms+NAME:ms`.
    device, repeat
        Columns that tell devices apart; that only number repeats or hold results.
    parts
        Columns that name the parts of a layer, whose times at a load are added up.
    notes
        What was assumed or is hardly right is added to it, in sentences.

    Raises
    ------
    InputError
        Naming the file, the line and the column that is wrong.
    """
    unit, paths = named_unit(unit), _check_asked(path, top_k, ep)
    where, device, repeat, parts = ([e] if isinstance(e, str) else e for e in (where, device, repeat, parts))
    with telling("a table of times", *paths):
        full, of_file = read_tables(paths)
        layout = next((each for each in LAYOUTS if each.header <= set(full.header)), None)
        table, time = with_added_times(chosen_rows(full, where), time)
        refuse_other_rows(full, table, layout, repeat, (*device, *repeat, *parts, of_file), parts)
        table = settled(table, layout, load)
        counts = load_column(table, layout, unit, load)
    if (layout.unit if layout else unit) is Unit.GROUP_TOKENS:
        refuse_tokens_of_a_rank(table, counts)
    told = (name for name in matching(table, ACTIVE) if name not in repeat and any(values(table.rows, name)))
    reader = _Reader(table, counts, next(told, None))
    columns = device_columns(table, device, repeat) if device or layout is None or layout.devices else []
    tables = told_apart(table, columns, device, reader.key)
    repeats = [known(table, name, "--repeat-column") for name in repeat]
    reader.latency, reader.scale = _time(table, layout, time)
    reader.scattered = reader.latency in repeats
    if layout is None:
        refuse_other_units(table, reader.latency, reader.scale)
    own = [counts, reader.active, reader.latency, *named(table, ("assignments",))]
    kept = [*columns, *(name for name in own if name is not None)]
    refuse_unsaid_files(split(tables, parts), None if of_file in repeats else of_file)
    used, tuned = {*kept, *repeats, *parts, *([of_file] if of_file else [])}, layout.tuned if layout else ()
    for name, scale in ((reader.load, 1.0), (reader.latency, reader.scale)):
        refuse_grouped(table, name, scale)
    for each in by_device(table, parts):
        refuse_mixtures(by_device(each, columns), reader.key, used=used, tuned=tuned)
    table, said = _whole_layers(reader, tables, parts, kept)
    tables = by_device(table, columns)
    if layout is AICONFIGURATOR:
        refuse_fused(table, reader.latency, time)
    top_k = given("--top-k", top_k, table, TOP_K)
    counted = unit_of_load(table, counts, layout, unit, top_k)
    skewed = refuse_skewed(table, where) if layout is AICONFIGURATOR else []
    skewed += refuse_skewed_groups(table, where) if layout is None and counted is Unit.GROUP_TOKENS else []
    reader.factor = factor(counted, top_k, ep, table, counts)
    _check_assignments(reader)
    _check_active(reader, None if layout else experts_of_a_rank(table, counted, ep))
    columns, chosen = _ranks(tables, columns, where)
    devices = [_device(reader, each, columns, rank) for rank, each in enumerate(tables)]
    profile = Profile(devices=devices, model=shape(table, layout, top_k), kernel=kernel(table), mode="table")
    if notes is not None:
        notes += [*said, *chosen, *skewed]
        if unit is None and counted is Unit.ASSIGNMENTS and plain(counts) != "assignments":
            notes.append(
                f"{counts} counted as assignments; where it is tokens, give --top-k and --unit tokens, or "
                "group-tokens where they are those of all ranks together"
            )
        files = [] if parts else values(table.rows, of_file) if of_file else [table.path]
        notes += [] if layout else _doubts_of_names(reader, time, files)
        notes += _beside(reader, layout, counted, top_k, repeats)
        over = {*used, *repeats, *(text.partition("=")[0].strip() for text in where)}
        notes += [*([] if layout else unread(table, over, notes)), *_doubts(reader, profile, tables, repeats)]
    return profile


def _doubts(reader: _Reader, profile: Profile, devices: Sequence[Table], repeats: Sequence[str]) -> list[str]:
    numbers = [name for name in devices[0].header if name in repeats or plain(name) in REPEATS]
    apart = repeats_apart(devices, numbers, reader.key, reader.latency)
    return [*apart, *doubts(profile, numbered=bool(numbers))]


def _doubts_of_names(reader: _Reader, time: str | None, files: Sequence[str]) -> list[str]:
    """Sentences on a time, and on tables, that may be of something else by their names; time: the one asked for."""
    told = left_out_of_sum(reader.table, reader.latency) if time is not None else doubt_of_time(reader.latency)
    return told if time is not None and reader.table.path in files else [*told, *doubt_of_files(files)]


def _whole_layers(
    reader: _Reader, devices: Sequence[Table], parts: Sequence[str], kept: Sequence[str]
) -> tuple[Table, list[str]]:
    """The rows of whole layers, those of parts added up, and what to say of them."""
    if not parts:
        return reader.table, []
    for each in split(devices, parts):
        reader.refuse_scattered(each)
    reader.table, said = summed(devices, parts, kept, reader.latency, reader.key)
    return reader.table, said


def _check_asked(path: Any, top_k: object, ep: object) -> list[str | os.PathLike[str]]:
    """The paths of the tables; refuse what is none, and no whole number of experts and ranks."""
    paths = list(path) if isinstance(path, (list, tuple)) and path else [path]
    for each in paths:
        if not isinstance(each, (str, os.PathLike)):
            raise InputError("table", type(each).__name__, "the path of a table", "save a data frame: its to_csv")
    if top_k is not None:
        check_number("--top-k", top_k, "the experts per token, at least 1", least=1, whole=True)
    if ep is not None:
        check_number("--ep", ep, "the ranks of the measured group, at least 1", least=1, whole=True)
    return paths


@dataclass
class _Reader:
    """Load and time of a row. scattered: times of one load are taken together however far apart they are."""

    table: Table
    load: str
    active: str | None
    latency: str = ""
    scale: float = 1.0
    factor: float = 1.0
    scattered: bool = False

    def key(self, row: Row) -> tuple[float, ...]:
        load = number(self.table, row, self.load, largest=LARGEST_LOAD)
        return (load,) if self.active is None else (load, number(self.table, row, self.active, largest=LARGEST_LOAD))

    def point(self, row: Row) -> tuple[float, int | None, float]:
        """Assignments (perhaps a fraction), active experts, microseconds."""
        load = whole(self.table, row, self.load, largest=LARGEST_LOAD / self.factor) * self.factor
        latency = number(self.table, row, self.latency, largest=LARGEST_US / self.scale) * self.scale
        if load and not latency:
            where, text = f"{self.table.path} {row.where}, {self.latency}", row.cells[self.latency]
            raise InputError(where, text, "above 0: work takes time", "a failed run? leave the row out")
        active = None if self.active is None else whole(self.table, row, self.active, largest=LARGEST_LOAD)
        if active is not None and active > ceil(load):
            raise InputError(
                f"{self.table.path} {row.where}, {self.active}",
                active,
                f"at most the {load:g} assignments of the {row.where.split()[-2]}",
                "does the load column count tokens? then give --unit and --top-k"
                if self.factor == 1
                else f"those of all ranks? to read over them: --repeat-column '{self.active}'",
            )
        return load, active, latency

    def refuse_scattered(self, table: Table) -> None:
        """Raise where rows of one load differ manyfold: they are no repeats, and their median is nobody's time."""
        rows: dict[tuple[float, ...], list[Row]] = defaultdict(list)
        for row in table.rows:
            rows[self.key(row)].append(row)
        for alike in [] if self.scattered else rows.values():
            times = [float(row.cells[self.latency]) for row in alike]
            middle = median(times)
            if median([abs(each - middle) for each in times]) > MANYFOLD * middle:
                first, last = (alike[times.index(pick(times))] for pick in (min, max))
                raise InputError(
                    f"{table.path} {first.where} and {last.where}, {self.latency}",
                    f"{first.cells[self.latency]} and {last.cells[self.latency]} for one load",
                    "repeats that agree within threefold",
                    f"rows of several kinds? tell them by a column; for their median: --repeat-column '{self.latency}'",
                )


def _beside(reader: _Reader, layout: Layout | None, counted: Unit, top_k: int | None, over: list[str]) -> list[str]:
    """Sentences on what columns besides those read say of all rows."""
    if layout not in (None, BENCHMARK_MOE, AITER, AITER_EP):
        return []
    table, of_group = reader.table, counted is Unit.GROUP_TOKENS
    ranks = [plain(name) for name in matching(table, EP)] if counted is Unit.TOKENS else []
    found = beside(table, over, of_group, ranks)
    if reader.active is not None and of_group:
        found.append(f"{reader.active} taken for those of one rank, not of the group")
    found += shared_experts(table, top_k) if counted is not Unit.ASSIGNMENTS else []
    return found if layout else [*found, *doubts_of_load(table, reader.load, counted, (top_k or 1) / reader.factor)]


def _check_assignments(reader: _Reader) -> None:
    """Refuse tokens that make other assignments than the table says beside them."""
    for column in named(reader.table, ("assignments",)):
        for row in reader.table.rows:
            load = number(reader.table, row, reader.load, largest=LARGEST_LOAD) * reader.factor
            told = number(reader.table, row, column, largest=LARGEST_LOAD)
            if abs(load - told) > 1:
                where = f"{reader.table.path} {row.where}, {column}"
                raise InputError(
                    where, row.cells[column], f"the {load:g} that {reader.load} makes", "wrong --top-k or --ep?"
                )


def _check_active(reader: _Reader, most: int | None) -> None:
    """Refuse more active experts than there are on the device: they are those of all ranks."""
    for row in reader.table.rows if reader.active is not None and most is not None else []:
        active = whole(reader.table, row, str(reader.active), largest=LARGEST_LOAD)
        if active > (most or 0):
            where = f"{reader.table.path} {row.where}, {reader.active}"
            hint = f"those of all ranks? to read over them: --repeat-column '{reader.active}'"
            raise InputError(where, active, f"at most the {most} experts on the device", hint)


def _time(table: Table, layout: Layout | None, asked: str | None) -> tuple[str, float]:
    times = layout.times if layout is not None else ()
    known_time = next((name for name in times if name.split(":")[0] in table.header), None)
    return time_column(table, asked or known_time)


def _ranks(devices: Sequence[Table], columns: list[str], where: Sequence[str]) -> tuple[list[str], list[str]]:
    """The columns that name devices, and what to say of ranks that are numbered anew, as only some were chosen."""
    if not any(text.partition("=")[0].strip() in columns for text in where):
        refuse_missing_ranks(devices, columns)
        return columns, kinds_as_ranks(devices, columns)
    return [each for each in columns if plain(each) not in RANKS], chosen_ranks(devices, columns)


def _device(reader: _Reader, table: Table, columns: Sequence[str], rank: int) -> Device:
    cells = table.rows[0].cells
    labels = {plain(name): cells[name] for name in table.header if len(values(table.rows, name)) == 1}
    own = next((name for name in columns if plain(name) in RANKS), None)
    if own is not None:
        rank = whole(table, table.rows[0], own, largest=LARGEST_LOAD)
    told = ", ".join(f"{name} {cells[name]}" for name in columns if name != own)
    points = [reader.point(row) for row in table.rows]
    reader.refuse_scattered(table)
    name = next((labels[each] for each in ("device_name", "gpu_name", "device", "gpu") if labels.get(each)), "unknown")
    return Device(
        rank=rank,
        name=name if own or not told or (name != "unknown" and not name.isdigit()) else told,
        uuid=next((labels[each] for each in UUIDS if labels.get(each)), None),
        node=next((labels[each] for each in HOSTS if labels.get(each)), None),
        samples=samples_of(points),
    )

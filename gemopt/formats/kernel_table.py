"""Read anyone's kernel table as a profile: plain ones, aiconfigurator's, AMD aiter's, benchmark_moe's output."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from gemopt.exceptions import InputError
from gemopt.foreign import telling
from gemopt.formats.fleet import Fleet, equal, read_fleet, slow_down, what_if
from gemopt.formats.table_beside import (
    NO,
    beside,
    refuse_failed,
    refuse_other_loads,
    refuse_other_units,
    refuse_skewed_groups,
)
from gemopt.formats.table_columns import (
    HOSTS,
    RANKS,
    UUIDS,
    by_device,
    chosen_ranks,
    chosen_rows,
    device_columns,
    known,
    listed,
    named,
    plain,
    refuse_missing_ranks,
    refuse_mixtures,
    values,
)
from gemopt.formats.table_doubts import doubts
from gemopt.formats.table_files import Row, Table, number, read, refuse_grouped, whole
from gemopt.formats.table_kinds import (
    AICONFIGURATOR,
    AITER,
    BENCHMARK_MOE,
    LAYOUTS,
    Layout,
    Unit,
    kernel,
    refuse_fused,
    refuse_skewed,
    refuse_tokens_of_a_rank,
    settled,
    shape,
)
from gemopt.formats.table_samples import samples_of
from gemopt.formats.table_times import refuse_other_operations, time_column
from gemopt.profile import Device, Profile

__all__ = ["Fleet", "Unit", "equal", "read_fleet", "read_table", "slow_down", "what_if"]

LOAD_COLUMNS = ("tokens", "num_tokens", "assignments", "token", "batch_size")
ACTIVE_COLUMNS = ("active_experts", "activated_experts", "num_active_experts", "num_activated_experts")
TOP_K_COLUMNS = (
    "topk", "top_k", "num_topk", "moe_topk", "moe_top_k", "experts_per_token", "num_experts_per_tok",
    "num_experts_per_token",
)  # fmt: skip
LOCAL_COLUMNS = ("local_num_experts", "num_local_experts")
EP_COLUMNS = ("moe_ep_size", "ep_size", "ep", "moe_ep", "expert_parallel_size")
LENGTHS = (
    "seq_len", "seqlen", "sequence_length", "input_len", "isl", "prompt_len", "input_length", "q_len", "query_len",
    "tokens_per_seq", "tokens_per_sequence", "tokens_per_request", "num_spec_tokens", "num_speculative_tokens",
    "spec_tokens", "num_draft_tokens", "draft_tokens", "mtp", "next_n",
)  # fmt: skip
LARGEST_LOAD, LARGEST_US = 2.0**31 - 1, 1e12  # as in a profile
MANYFOLD = 0.5  # of the median: half of the repeats of a load lie further from it, as two that are threefold apart do


def read_table(
    path: str | os.PathLike[str],
    *,
    unit: Unit | None = None,
    top_k: int | None = None,
    ep: int | None = None,
    where: Sequence[str] = (),
    load: str | None = None,
    time: str | None = None,
    device: Sequence[str] = (),
    repeat: Sequence[str] = (),
    notes: list[str] | None = None,
) -> Profile:
    """Profile from a table of loads and times: CSV, parquet, Markdown, columns set apart by blanks, benchmark_moe's.

    Rows of one load are merged: median latency, median absolute deviation, number of rows. Rows that differ in
    something else than repeats and results are refused.

    Parameters
    ----------
    unit
        What the load column counts; default: what is known of the table's kind, else assignments.
    top_k, ep
        Experts per token and ranks of the measured group, where the table does not say.
    where
        `COLUMN=VALUE`, rows to read.
    load
        Column with the load, of any name; `unit` says what it counts.
    time
        Column with the time, perhaps with its unit: `NAME:ms`.
    device, repeat
        Columns that tell devices apart; that only number repeats or hold results.
    notes
        What was assumed or is hardly right is added to it, in sentences.

    Raises
    ------
    InputError
        Naming the file, the line and the column that is wrong.
    """
    if top_k is not None and top_k < 1:
        raise InputError("--top-k", top_k, "the experts per token, at least 1")
    with telling("a table of times", path):
        full = read(path)
    layout = next((each for each in LAYOUTS if each.header <= set(full.header)), None)
    table = chosen_rows(full, where)
    unsaid = [] if layout else [each for each in full.header if each not in (*device, *repeat)]
    varying = [each for each in unsaid if len(values(full.rows, each)) > 1]
    refuse_other_operations(table, varying, read_over={*repeat, *(layout.tuned if layout else ())})
    if layout is None:
        refuse_failed(table, repeat)
    table = settled(table, layout, load)
    load_column = _load_column(table, layout, unit, load)
    if (layout.unit if layout else unit) is Unit.GROUP_TOKENS:
        refuse_tokens_of_a_rank(table, load_column)
    active_column = next(iter(named(table, ACTIVE_COLUMNS)), None)
    reader = _Reader(table, load_column, active_column)
    columns = device_columns(table, device) if device or layout is None or layout.devices else []
    tables = by_device(table, columns)
    repeats = [known(table, name, "--repeat-column") for name in repeat]
    reader.latency, reader.scale = _time(table, layout, time)
    reader.scattered = reader.latency in repeats
    if layout is None:
        refuse_other_units(table, reader.latency, reader.scale)
    own = [load_column, active_column, reader.latency, *named(table, ("assignments",))]
    used = {*columns, *repeats, *(name for name in own if name is not None)}
    refuse_mixtures(tables, reader.key, used=used, tuned=layout.tuned if layout else ())
    for name in (reader.load, reader.latency):
        refuse_grouped(table, name)
    if layout is AICONFIGURATOR:
        refuse_skewed(table, where)
        refuse_fused(table, reader.latency, time)
    top_k = _given("--top-k", top_k, table, TOP_K_COLUMNS)
    counted = _unit(table, load_column, layout, unit, top_k)
    if layout is None and counted is Unit.GROUP_TOKENS:
        refuse_skewed_groups(table, where)
    reader.factor = _factor(counted, top_k, ep, table)
    _check_assignments(reader)
    columns, said = _ranks(tables, columns, where)
    devices = [_device(reader, each, columns, rank) for rank, each in enumerate(tables)]
    profile = Profile(devices=devices, model=shape(table, layout, top_k), kernel=kernel(table), mode="table")
    if notes is not None:
        notes += said
        if unit is None and counted is Unit.ASSIGNMENTS and plain(load_column) != "assignments":
            notes.append(
                f"{load_column} counted as assignments; where it is tokens, give --top-k and --unit tokens, or "
                "group-tokens where they are those of all ranks together"
            )
        if layout in (None, BENCHMARK_MOE, AITER) and counted is not Unit.GROUP_TOKENS:
            notes += beside(table, repeats, EP_COLUMNS if counted is Unit.TOKENS else ())
        notes += doubts(profile)
    return profile


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
        if active is not None and active > np.ceil(load):
            raise InputError(
                f"{self.table.path} {row.where}, {self.active}",
                active,
                f"at most the {load:g} assignments of the {row.where.split()[0]}",
                "does the load column count tokens? then give --unit and --top-k",
            )
        return load, active, latency

    def refuse_scattered(self, table: Table) -> None:
        """Raise where rows of one load differ manyfold: they are no repeats, and their median is nobody's time."""
        rows: dict[tuple[float, ...], list[Row]] = defaultdict(list)
        for row in table.rows:
            rows[self.key(row)].append(row)
        for alike in [] if self.scattered else rows.values():
            times = np.array([float(row.cells[self.latency]) for row in alike])
            median = float(np.median(times))
            if float(np.median(np.abs(times - median))) > MANYFOLD * median:
                first, last = alike[int(times.argmin())], alike[int(times.argmax())]
                raise InputError(
                    f"{table.path} {first.where} and {last.where}, {self.latency}",
                    f"{first.cells[self.latency]} and {last.cells[self.latency]} for one load",
                    "repeats that agree within threefold",
                    f"rows of several kinds? tell them by a column; for their median: --repeat-column '{self.latency}'",
                )


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


def _load_column(table: Table, layout: Layout | None, unit: Unit | None, asked: str | None) -> str:
    if asked is not None and unit is None:
        raise InputError("--unit", "", f"what does {asked} count?", "give --unit tokens, group-tokens or assignments")
    if asked is not None:
        refuse_other_loads(table, asked, unit is Unit.GROUP_TOKENS)
        return known(table, asked, "--load-column")
    if layout is not None:
        return layout.load
    found = named(table, LOAD_COLUMNS)
    if not found:
        limit = f"a column {' or '.join(LOAD_COLUMNS)} is needed"
        raise InputError(table.path, f"columns {', '.join(table.header)}", limit, "or give --load-column NAME")
    return min(found, key=lambda name: (plain(name) == "assignments") != (unit in (None, Unit.ASSIGNMENTS)))


def _unit(table: Table, load_column: str, layout: Layout | None, unit: Unit | None, top_k: int | None) -> Unit:
    if layout is not None:
        if unit not in (None, layout.unit):
            limit = f"{layout.name} counts {layout.unit.value} in {load_column}"
            raise InputError("--unit", unit.value if unit else "", limit, "leave --unit out")
        return layout.unit
    counts_assignments = plain(load_column) == "assignments"
    if unit not in (None, Unit.ASSIGNMENTS) and counts_assignments:
        raise InputError("--unit", unit, f"{table.path} counts assignments", "leave --unit out")
    if unit is not None:
        return unit
    if plain(load_column) == "batch_size":
        lengths = [f"{name} {value}" for name in named(table, LENGTHS) for value in values(table.rows, name)
                   if value.lower() not in {"1", "1.0", "off", *NO}]  # fmt: skip
        if lengths:
            limit = f"with {', '.join(lengths)}, does {load_column} count tokens, or sequences?"
            raise InputError("--unit", "", limit, "give --unit tokens where it counts tokens")
        return Unit.TOKENS
    grouped = named(table, EP_COLUMNS)
    if not counts_assignments and (top_k is not None or grouped):
        told = "ranks of a group" if top_k is None else f"{top_k} experts per token"
        limit = f"with {told}, does {load_column} count tokens?"
        raise InputError("--unit", "", limit, "give --unit tokens, group-tokens or assignments")
    return Unit.ASSIGNMENTS


def _time(table: Table, layout: Layout | None, asked: str | None) -> tuple[str, float]:
    times = layout.times if layout is not None else ()
    known_time = next((name for name in times if name.split(":")[0] in table.header), None)
    return time_column(table, asked or known_time)


def _factor(unit: Unit, top_k: int | None, ep: int | None, table: Table) -> float:
    """Assignments of a rank per unit of the load column."""
    if ep is not None and unit is not Unit.GROUP_TOKENS:
        raise InputError(
            "--ep", ep, f"{unit.value} are those of one rank", "leave --ep out, or give --unit group-tokens"
        )
    if unit is Unit.ASSIGNMENTS:
        return 1.0
    if top_k is None or top_k < 1:
        raise InputError("--top-k", top_k, f"unit {unit.value} needs the experts per token, at least 1", "give --top-k")
    parts = _parts(table)
    if unit is Unit.TOKENS and parts > 1:
        found = f"tokens, and one in {parts} of the experts is on the device"
        raise InputError("--unit", found, "tokens whose experts are all on it", "give --unit group-tokens")
    if unit is Unit.TOKENS:
        return float(top_k)
    ep = _given("--ep", ep, table, EP_COLUMNS) or (parts or None)
    if parts and ep != parts:
        raise InputError("--ep", ep, f"{parts}: one in {parts} of the experts is on the device, by {table.path}")
    if ep is None or ep < 1:
        raise InputError("--ep", ep, "unit group-tokens needs the ranks of the measured group, at least 1", "give --ep")
    return top_k / ep


def _parts(table: Table) -> int:
    """How many times the experts on the device all experts are, by the columns that say so; 0 where none do."""
    local, every = (_given("", None, table, names) or 0 for names in (LOCAL_COLUMNS, ("num_experts",)))
    return every // local if local and every % local == 0 else 0


def _given(option: str, value: int | None, table: Table, columns: Collection[str]) -> int | None:
    """What an option says, or a column of the table; both must agree."""
    column = next((name for name in named(table, columns) if table.rows[0].cells[name]), None)
    if column is None:
        return value
    if len(found := values(table.rows, column)) > 1:
        raise InputError(f"{table.path}, {column}", listed(found), "one number for all rows", "choose with --where")
    read_value = whole(table, table.rows[0], column, largest=LARGEST_LOAD)
    if value not in (None, read_value):
        raise InputError(option, value, f"{column} is {read_value} in {table.path}", f"leave {option} out")
    return read_value


def _ranks(devices: Sequence[Table], columns: list[str], where: Sequence[str]) -> tuple[list[str], list[str]]:
    """The columns that name devices, and what to say of ranks that are numbered anew, as only some were chosen."""
    if not any(text.partition("=")[0].strip() in columns for text in where):
        refuse_missing_ranks(devices, columns)
        return columns, []
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

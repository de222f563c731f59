"""What the columns of a kernel table are: load, time, device, repeat, result; and which others vary.

Rows that differ in something that is none of these are no repeats of one point, and their median means nothing: they
are refused, with the columns, their values, and how to choose.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from shlex import quote

from gemopt.exceptions import InputError
from gemopt.formats.tables.files import Row, Table

RANKS = ("rank", "ep_rank", "global_rank")
HOSTS = ("host", "hostname", "node", "node_id", "machine", "server", "instance")
UUIDS = ("uuid", "gpu_uuid", "device_uuid")
DEVICES = {
    *RANKS, *HOSTS, *UUIDS, "device", "device_id", "device_index", "gpu", "gpu_id", "gpu_index", "npu", "npu_id", "xpu",
    "gpu_idx", "device_idx", "cuda_device", "hip_device", "device_ordinal", "gcd", "bdf", "pci_bus", "pci_address",
    "slot", "local_rank", "serial", "gpu_serial", "serial_number", "bus_id", "pci_bus_id", "card", "accelerator",
    "worker", "worker_id",
}  # fmt: skip
OF_A_DEVICE = {"gpu", "device", "sku", "arch", "driver", "vendor", "rack", "system", "chassis"}
REPEATS = {
    "run", "run_id", "run_index", "tp_run", "repeat", "repetition", "rep", "iter", "iteration", "trial", "attempt",
    "sample", "seed",
}  # fmt: skip
STATISTICS = {
    "min", "max", "mean", "avg", "average", "median", "med", "std", "stdev", "stddev", "var", "mad", "spread", "cv",
    "ci", "best", "worst", "fastest", "slowest", "minimum", "maximum", "lower", "upper", "peak", "tail", "percentile",
    "p999", "p9999", *(f"{letter}{n}" for letter in "pq" for n in range(10, 100)),
}  # fmt: skip
RESULTS = {
    "err", "err1", "err2", "error", "errors", "tflops", "gflops", "flops", "bw", "bandwidth", "gbps", "tbps",
    "throughput", "tps", "speedup", "efficiency", "utilization", "util", "bwutil", "mfu", "temp", "temperature",
    "energy", "repeats", "latency", "time", "duration", "elapsed", "ops", "iqr", "noise", "samples", "elem",
}  # fmt: skip
FLAGS = {"0", "1"}  # a row that failed, and no result
MOMENTS = {"timestamp", "datetime", "date", "start", "begin", "end", "stop", "ts"}
MEMORY = {"memory", "mem", "vram", "allocated"}
STATES = {"power", "watts", "clock", "clocks", "mhz", "freq", "frequency", "occupancy", *MEMORY}
SET = {"limit", "cap", "target", "locked", "max", "application"}  # states that were asked for
SHAPES = {
    "hidden", "inter", "intermediate", "dim", "experts", "expert", "topk", "k", "n", "tp", "ep", "dp", "pp", "size",
    "heads", "width", "layers", "block", "id",
}  # fmt: skip
SUMMARIES = STATISTICS - {"p40"} | {"all", "total", "sum", "overall"}  # of devices, and none itself, as a Tesla P40
LOADS = {"tokens", "token", "rows", "assignments", "batch", "per", "m"}
TIMES = {"latency", "time", "duration", "elapsed"}
SHORT_UNITS = {"us": ("u", "micro", 1.0), "ms": ("m", "milli", 1e3), "ns": ("n", "nano", 1e-3), "s": ("", "", 1e6)}
SECONDS = ("sec", "secs", "second", "seconds")
TIME_UNITS = {
    name: factor
    for short, (letter, prefix, factor) in SHORT_UNITS.items()
    for name in (short, *(start + word for start in dict.fromkeys((letter, prefix)) for word in SECONDS))
}
"""Microseconds of each unit, by all its names: us, usec, microseconds, ..."""
SAVED_INDEX = {"", "unnamed_0", "index_level_0"}  # as pandas names its numbers of the rows
INDEX = {*SAVED_INDEX, "index", "row", "row_id", "no", "id", "idx", "per_family_instance_index"}
MOMENT = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d.*)?", re.ASCII)
RATE, RATED = re.compile(r"/ ?s(?:ec(?:ond)?)?\b"), {"per", "tok", "toks", "tokens", "mb", "gb", "tb"}  # tok/s, tok_s
SHARE = re.compile(r"([-+\u2212])?\d+(\.\d+)? ?[%x\u00d7]")  # -1.6 %, 1.31x
RESULT = re.compile(r"[-+*~<]?\d+\.\d.*")  # perhaps with a note: 261.1 (1.02x)
UNIT_AT_END = re.compile(rf"(?:^|_)({'|'.join(TIME_UNITS)})\d*$")
ONE_RUN = re.compile(
    r"(?:^|_)per_(?:iter|iteration|call|launch|run|rep|repeat|layer|forward)(?=_|$)|(?<=[mnu]s)_(?:iter|call|launch)$"
)
LoadOf = Callable[[Row], tuple[float, ...]]
SHOWN, ENOUGH = 4, 3  # values of a column; loads that a proportional one must go along with


@lru_cache(1 << 16)
def plain(name: str) -> str:
    """`Kernel Time (µs)` as kernel_time_us, `DurationNs` as duration_ns."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", re.sub("[\u00b5\u03bc]", "u", name))
    return re.sub(r"[^a-z0-9]+", "_", apart.lower()).strip("_")


@lru_cache(1 << 16)
def words(name: str) -> frozenset[str]:
    """Words of a column's name."""
    return frozenset(plain(name).split("_"))


def at_end(name: str) -> re.Match[str] | None:
    """The unit of time that a name ends in, perhaps before a statistic or a run: `latency_us_mean`, `us_per_call`."""
    parts = ONE_RUN.sub("", plain(name)).split("_")
    while len(parts) > 1 and parts[-1] in STATISTICS:
        parts.pop()
    return UNIT_AT_END.search("_".join(parts))


def unit_of(name: str) -> str | None:
    """The unit of time that a column's name ends in; `tokens_per_s` and `gb_s` are none."""
    found = at_end(name)
    rate = found is not None and (found[1] in ("s", "second") or ("/" in name and found[1] in SECONDS))
    if found is None or "per" in ONE_RUN.sub("", plain(name)).split("_") or (rate and not words(name) & TIMES):
        return None
    return found[1]


def values(rows: Iterable[Row], column: str) -> list[str]:
    """Distinct values in order of appearance."""
    return list(dict.fromkeys(row.cells[column] for row in rows))


def named(table: Table, names: Iterable[str]) -> list[str]:
    """The columns with one of these names, however they are written, in the order of the names."""
    return [column for name in names for column in table.header if plain(column) == name]


def known(table: Table, column: str, option: str) -> str:
    """The column, or a refusal that lists what there is."""
    if column not in table.header:
        raise InputError(option, column, f"a column of {table.path}: {', '.join(table.header)}")
    return column


def chosen_rows(table: Table, where: Sequence[str]) -> Table:
    """The rows that every `COLUMN=VALUE` allows; several for one column allow each of their values."""
    wanted: dict[str, list[str]] = defaultdict(list)
    for text in where:
        column, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise InputError("--where", text, "COLUMN=VALUE")
        _refuse_merged(table, known(table, column, "--where"))
        wanted[column].append(value)
    rows = table.rows
    for column, allowed in wanted.items():
        kept = [row for row in rows if any(_same(row.cells[column], value) for value in allowed)]
        if not kept:
            limit = f"one of {listed(values(rows, column), 12)}"
            raise InputError("--where", f"{column}={' or '.join(allowed)}", limit, "as the rows chosen before have it")
        rows = kept
    return Table(table.path, table.header, rows)


def _refuse_merged(table: Table, column: str) -> None:
    """Raise where a column names each kind once, and leaves the rows below empty: those would not be chosen."""
    cells = [row.cells[column] for row in table.rows]
    told = [cell for cell in cells if cell]
    if cells[0] and len(told) == len(set(told)) and 2 * len(told) <= len(cells):
        limit = f"a value in every row: {len(cells) - len(told)} are empty"
        raise InputError(f"{table.path}, {column}", listed(told), limit, "merged cells? fill them down")


def _same(cell: str, value: str) -> bool:
    try:
        return cell == value or float(cell) == float(value)
    except ValueError:
        return False


def listed(found: Sequence[str], limit: int = SHOWN) -> str:
    """The first values, and whether there are more."""
    named = [value or "nothing" for value in found[:limit]]
    return ", ".join(named) + (f", ... ({len(found)} in all)" if len(found) > limit else "")


def refuse_mixtures(
    devices: Sequence[Table],
    load_of: LoadOf,
    *,
    used: Collection[str],
    tuned: Collection[str] = (),
    else_say: str = "; or say what a column is: --device-column {0}, --repeat-column {0}",
) -> None:
    """Raise when rows of one device, or devices, differ in what is neither used nor a repeat, a result or a load.

    `tuned` columns name the best kernel found for each load: they may differ between loads, not within one. else_say:
    what helps besides choosing rows.
    """
    table = Table(devices[0].path, devices[0].header, [row for device in devices for row in device.rows])
    varying = [name for name in table.header if name not in used and len(values(table.rows, name)) > 1]
    mixed = [name for name in varying if not _harmless(name, devices, load_of, tuned)]
    mixed = [name for name in mixed if name not in tuned] or mixed  # a kernel follows from the rest
    if not mixed:
        return
    a, b = _clash([*devices, table], mixed, load_of)
    told = {name: values(table.rows, name) for name in mixed if "--repeat" in else_say}
    results = [name for name, each in told.items() if len(each) == len(table.rows) and _are_results(each)]
    warm = any("warmup" in words(name) and a.cells[name].lower() in {"1", "true", "yes"} for name in mixed)
    warm |= any("warmup" in words(a.cells[name]) for name in mixed)
    like = b if warm else a
    chosen = _telling(table.rows, [name for name in mixed if name not in results], like)
    choice = [f"--where {quote(f'{name}={like.cells[name]}')}" for name in chosen]
    hint = f"choose, as in {' '.join(choice)}" if choice else "choose rows with --where"
    hint += else_say.format(quote(mixed[0]) if len(mixed) == 1 else "NAME") if choice else ""
    hint += f"; of results: {' '.join(f'--repeat-column {quote(name)}' for name in results)}" if results else ""
    shown = [name for name in mixed if name in chosen or len(mixed) <= SHOWN or name in mixed[: SHOWN - len(chosen)]]
    kinds = "; ".join(f"{name}: {listed(values(table.rows, name))}" for name in shown)
    raise InputError(
        f"{table.path} {a.where} and {b.where}",
        f"rows that differ in {', '.join(mixed)}",
        f"one curve needs rows of one kind: {kinds}",
        hint,
    )


def _telling(rows: Sequence[Row], mixed: Sequence[str], like: Row) -> list[str]:
    """A few columns whose values leave rows that differ from `like` in none of them: others often follow from these."""
    chosen, left = [], list(mixed)
    while left:
        kept = {name: [row for row in rows if row.cells[name] == like.cells[name]] for name in left}
        rest = {name: [each for each in left if len(values(kept[name], each)) > 1] for name in left}
        best = min(left, key=lambda name: (len(rest[name]), -len(kept[name])))
        chosen.append(best)
        rows, left = kept[best], rest[best]
    return [name for name in mixed if name in chosen]


def _are_shares(found: Sequence[str]) -> bool:
    """Whether cells are percentages or factors that were measured, mostly signed or with fractions."""
    parts = [SHARE.fullmatch(each) for each in found]
    return all(parts) and 2 * sum(bool(part and (part[1] or part[2])) for part in parts) > len(parts)


def _are_results(found: Sequence[str]) -> bool:
    """Whether cells are numbers with fractions, perhaps with a note."""
    return any(map(RESULT.fullmatch, found)) and all(each[:1].isdigit() or each[:1] in "-+*~<" for each in found)


def _clash(groups: Sequence[Table], mixed: list[str], load_of: LoadOf) -> tuple[Row, Row]:
    """Two rows that differ: of one device and load where there are such, else of one device, else of any two."""

    def differ(a: Row, b: Row) -> bool:
        return any(a.cells[name] != b.cells[name] for name in mixed)

    for group in groups:
        for same_load in (True, False):
            first: dict[tuple[float, ...], Row] = {}
            for row in group.rows:
                before = first.setdefault(load_of(row) if same_load else (), row)
                if differ(before, row):
                    return before, row
    raise AssertionError(f"no rows differ in {mixed}")


def _harmless(name: str, devices: Sequence[Table], load_of: LoadOf, tuned: Collection[str]) -> bool:
    parts = words(name)
    rows = [row for device in devices for row in device.rows]
    told = len(devices) > 1 and all(len(values(device.rows, name)) == 1 for device in devices)
    if plain(name) in DEVICES or (parts & OF_A_DEVICE and (told or not (parts & (RESULTS | STATES) or unit_of(name)))):
        return told
    if plain(name) in REPEATS:
        return True
    if plain(name) in INDEX:
        return _numbers_rows(rows, name, load_of) or (
            is_numeric(rows, name) and not _differs_within_a_load(name, devices, load_of)
        )
    if _swept(name, rows, load_of):
        return False
    rate = RATE.search(name.lower()) and not parts & (SET | {"req", "request", "requests"})  # as they are sent
    result = rate or parts & RESULTS or (parts & RATED and parts & {"s", *SECONDS})
    if (result and is_numeric(rows, name) and not set(values(rows, name)) <= FLAGS) or parts & MOMENTS:
        return True
    if unit_of(name) or _are_shares(values(rows, name)) or all(MOMENT.fullmatch(value) for value in values(rows, name)):
        return True
    if name in tuned:
        return not _differs_within_a_load(name, devices, load_of)
    if parts & STATISTICS and (parts <= STATISTICS or 2 * _fractions(rows, name) > len(values(rows, name))):
        return True
    if parts & STATES and not parts & (SET - {"max"} if parts & MEMORY else SET) and not _measured(rows, name, load_of):
        found = values(rows, name)
        kinds = not all(each[:1].isdigit() for each in found if each) or (parts & MEMORY and len(found) < ENOUGH)
        return not (kinds or _differs_within_a_load(name, devices, load_of)) and 4 * len(found) > len(rows)
    return _measured(rows, name, load_of) or (
        _proportional(name, rows, load_of) and not _differs_within_a_load(name, devices, load_of)
    )


def _numbers_rows(rows: list[Row], name: str, load_of: LoadOf) -> bool:
    """Whether a column only numbers rows, of different loads unless its name says that it was saved as their index."""
    found, loads = values(rows, name), len({load_of(row) for row in rows})
    return len(found) == len(rows) and (loads == len(rows) or plain(name) in SAVED_INDEX) and is_numeric(rows, name)


def _swept(name: str, rows: list[Row], load_of: LoadOf) -> bool:
    """Whether each of a column's values comes with every load: it was set, not measured."""
    found = values(rows, name)
    loads = {load_of(row) for row in rows}
    pairs = {(load_of(row), row.cells[name]) for row in rows}
    return len(found) > 1 and len(loads) >= ENOUGH and len(pairs) == len(loads) * len(found)


def _differs_within_a_load(name: str, devices: Sequence[Table], load_of: LoadOf) -> bool:
    for device in devices:
        seen: dict[tuple[float, ...], str] = {}
        if any(seen.setdefault(load_of(row), row.cells[name]) != row.cells[name] for row in device.rows):
            return True
    return False


def is_numeric(rows: list[Row], name: str) -> bool:
    try:
        return all(float(value.strip("*%x\u00d7") or "nan") is not None for value in values(rows, name))
    except ValueError:
        return False


def _fractions(rows: list[Row], name: str) -> int:
    """How many distinct values are numbers with a fraction; 0 where some are no numbers."""
    try:
        return sum(float(value) != int(float(value)) for value in values(rows, name))
    except (ValueError, OverflowError):
        return 0


def _measured(rows: list[Row], name: str, load_of: LoadOf) -> bool:
    """Whether a column holds measurements: hardly any value comes twice, and they are fractions or far apart.

    Numbers of devices are neither; and a shape comes with many loads.
    """
    found = values(rows, name)
    if len(rows) < 2 * ENOUGH or 10 * len(found) < 9 * len(rows):
        return False
    if 2 * _fractions(rows, name) > len(found):
        return True
    if len(rows) < 20 or not all(value.isascii() and value.isdigit() for value in found):
        return False
    apart = max(map(int, found)) - min(map(int, found)) >= 4 * len(found)
    return apart and 4 * len({load_of(row) for row in rows}) >= len(rows)


def _proportional(name: str, rows: list[Row], load_of: LoadOf) -> bool:
    """Whether a column counts the load in another unit (rows, bytes, tokens per expert), up to rounding."""
    if words(name) & SHAPES and not words(name) & LOADS:
        return False
    cells = [row.cells[name] for row in rows]
    try:
        pairs = [(load_of(row)[0], float(cell)) for row, cell in zip(rows, cells, strict=True)]
    except ValueError:
        parts = [re.split(r"(\d+)", cell) for cell in cells]  # texts alike but for one number, as BM_MoE/8
        alike = len({tuple(part[::2]) for part in parts}) == 1
        varying = (
            [each for each in zip(*(part[1::2] for part in parts), strict=True) if len({*each}) > 1] if alike else []
        )
        if len(varying) != 1:
            return False
        pairs = [(load_of(row)[0], float(number)) for row, number in zip(rows, varying[0], strict=True)]
    most = max(pairs)
    loads, counts = {load for load, _ in pairs}, {value for _, value in pairs}
    if len(loads) < ENOUGH or len(counts) < max(ENOUGH, len(loads) / 2) or most[0] <= 0:
        return False
    per_load = most[1] / most[0]
    return per_load > 0 and all(abs(value - per_load * load) <= max(1.0, 0.01 * value) for load, value in pairs)

"""What columns beside load and time say of rows that are all alike: units, failed runs, parts, other loads.

A column with one value makes no two rows differ, and may still say that they are not what they are read as.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from gemopt.exceptions import InputError
from gemopt.formats.tables.columns import (
    DEVICES,
    HOSTS,
    INDEX,
    MOMENTS,
    OF_A_DEVICE,
    REPEATS,
    RESULTS,
    SHAPES,
    SHORT_UNITS,
    SHOWN,
    STATES,
    STATISTICS,
    TIME_UNITS,
    TIMES,
    is_numeric,
    listed,
    named,
    plain,
    unit_of,
    values,
    words,
)
from gemopt.formats.tables.files import Table
from gemopt.formats.tables.kinds import as_if_balanced

UNITS = {"unit", "units", "metric_unit", "metric_units"}
METRICS = {"metric", "metric_name", "measure", "measurement", "quantity", "counter"}
OTHER_METRICS = {
    "tflops", "gflops", "flops", "bandwidth", "bw", "gbps", "tbps", "throughput", "tps", "speedup", "efficiency",
    "utilization", "util", "mfu", "power", "watts", "clock", "temperature", "temp", "energy", "memory", "bytes",
}  # fmt: skip
FLAGS = {"valid", "success", "succeeded", "passed", "pass", "ok", "correct", "converged"}
VERDICTS = {"status", "state", "outcome", "result", "verdict"}
FAULTS = {"error", "errors", "err", "failed", "failure", "exception", "oom", "timeout", "timed_out"}
MEASURED = re.compile(r"[^\w.]*(\d*\.?\d+(e[-+]?\d+)?|inf)\W*([munµ]?s|x|sec)?", re.ASCII)
"""A number and its unit, as `<0.5 us`."""
YES = ("1", "1.0", "true", "yes")
NO = {"0", "0.0", "false", "no", "n", "none", "nan", "null", "nil", "n/a", "-", ""}
WELL = {"ok", "success", "succeeded", "passed", "cudasuccess", "hipsuccess"}
DONE = WELL | {"pass", "done", "complete", "completed", "finished"}
NO_FAULT = re.compile(r"(no|without)[ _-]*(error|fault|failure)s?")
FAILED = {"fail", "failed", "failure", "error", "oom", "timeout", "crash", "crashed", "invalid", "skip", "skipped"}
UNMEASURED = {
    "simulated", "simulation", "roofline", "estimated", "estimate", "theoretical", "predicted", "projected", "modeled",
    "interpolated", "extrapolated",
}  # fmt: skip
COMPUTED = UNMEASURED | {"normalized", "normalised"}
"""Words of flags that say so of times, alone or with these: `is_estimated`, but not `topk_normalized`."""
OF_TIMES = COMPUTED | TIMES | {"is", "was", "are", "times", "us", "ms", "value", "values", "result", "results", "row"}
FEW_WORDS = 3
ORIGINS = {
    "source", "data_source", "latency_source", "time_source", "kind", "type", "method", "mode", "origin", "provenance",
    "measurement", "timing", "estimator", "database_mode",
}  # fmt: skip
MIDDLE = {"median", "med", "p50", "q50", "mean", "avg", "average"}
SUMMARIES = {
    *METRICS, "statistic", "statistics", "stat", "stats", "aggregate", "aggregate_name", "aggregation", "agg",
    "reduction", "quantile", "percentile", "percentiles",
}  # fmt: skip
"""Columns that say what was made of repeats."""
MIDDLES = {"0.5", "50", "50.0", "50%"}
SKEWED = {"power", "zipf", "skew", "skewed", "imbalanced", "unbalanced", "hot", "hotspot"}
UNEVEN = {"imbalance": 1.0, "skew": 0.0, "skewness": 0.0, "zipf": 0.0, "law": 0.0, "gini": 0.0}  # power_law_alpha
"""Words of columns that tell by a number how unevenly, and that of even loads."""
ROUTINGS = {"distribution", "routing", "balance", "workload"}
WAYS = r"(?:_(?:size|degree|num|dim|world|(?:world|group)_size|ranks|workers|gpus|devices))?"
"""Ends of names that say over how many devices something is spread."""
SHARDED = re.compile(
    rf"(?:moe_|num_|n_)?(?:e?tp|mp|(?:expert_)?tensor_(?:model_)?parallel(?:ism)?|model_parallel(?:ism)?){WAYS}"
)
WHOLE_EXPERTS = ("enable_expert_parallel", "enable_ep", "enable_ep_moe")
LAUNCHES = ({"instances"}, {"calls", "total_duration_ns"})  # of a profiler's summary
GROUPS = re.compile(
    r"(?:num_?|n_?)(?:gpu|device|npu|xpu|card|rank|node|proc|processe)s?|(?:gpu|device|npu|xpu|card|rank|node)s?_(?:count|num)"
    rf"|(?:gpu|device|npu|card|node)s|gpus_per_node|world(?:_size)?|(?:num_|n_)?(?:dp|data_parallel(?:ism)?){WAYS}"
)
SPREAD = re.compile(r"(?:^|[^a-z])(?:ep|dp)[ =:_-]?(?:[2-9]|[1-9]\d)(?![a-z])", re.IGNORECASE)  # TP1-EP8, not dp4a
SEVERAL = re.compile(r"^(?:[2-9]|\d\d) ?[x\u00d7] ?[a-z]|[a-z]\d+ ?[x\u00d7] ?(?:[2-9]|\d\d)$", re.IGNORECASE)  # 8xH100
"""Cells that name several ranks, and several devices."""
PLACES = {*HOSTS, "serial", "uuid", "bus", "pci", "pcie", "link", "rack", "slot", "chassis", "driver"}
"""Words of columns that say where or which one device is: `gen5x16`, `dgx-h100x8`."""
EXCHANGED = {
    *("comm", "communication", "a2a", "alltoall", "all2all", "dispatch", "dispatcher", "exchange"),
    *("allreduce", "allgather", "reducescatter", "reduce"),
}
"""Words of columns that say with or by what tokens were exchanged."""
NETWORKS = {"interconnect", "nvlink", "rdma", "network"}
"""Words of columns that say how much was, at which rate."""
SETTINGS = SHAPES | OF_A_DEVICE | STATISTICS | RESULTS | MOMENTS | {
    "dtype", "quant", "quantization", "precision", "activation", "weights", "framework", "backend", "version", "model",
    "name", "config", "kernel", "source", "test", "benchmark", "warmup", "warmups", "warm", "repetitions", "iters",
    "iterations", "seq", "len", "length", "context", "node", "host", "topk", "top", "seed", "graph", "torch", "cuda",
    "commit", "note", "comment", "e", "python", "user", "timer", "timeout", "runs", "provider",
}  # fmt: skip
"""Words of columns that may say anything of all rows: what was measured on, with, and how often."""


UNUSUAL = {"per", "ratio", "imbalance", "unit", "units", "fraction", "share", "outlier", "override"}
"""Words that say more than these."""
GROUPING = TIMES | METRICS | {
    "timing", "timings", "result", "results", "stats", "metrics", "perf", "performance", "benchmark", "bench", "run",
    "gpu", "model", "moe", "parallel", "parallelism", "config", "params", "args", "settings", "shape", "problem",
    "workload",
}  # fmt: skip


def own(name: str) -> str:
    """`timing.gpu.status` as status, where the objects around it only group what rows say; else as `plain`."""
    *objects, last = name.split(".")
    return plain(last if all(words(each) <= GROUPING for each in objects) else name)


def is_unit(name: str) -> bool:
    """Whether a column says the unit of the times: `unit`, `latency_units`, `unit_of_time`."""
    return own(name) in UNITS or bool(words(name) & {"unit", "units"} and words(name) & TIMES)


def refuse_other_units(table: Table, time: str, scale: float) -> None:
    """Raise where a column names the unit, or what was measured, and the times are read as another.

    time, scale: the column with the times, and microseconds per unit as they are read.
    """
    for name in table.header:
        metric = own(name) in METRICS
        if name == time or not (metric or is_unit(name)):
            continue
        for row in table.rows:
            told = row.cells[name]
            unit = (unit_of(told) if metric else None) or plain(told)
            if TIME_UNITS.get(unit, scale) != scale:
                several = len(values(table.rows, name)) > 1
                one = "which is right? mend the other" if unit_of(time) else f"--time-column '{time}:{unit}'"
                hint = "write all times in one unit" if several else one
                raise InputError(f"{table.path} {row.where}, {name}", told, f"the unit that {time} is read in", hint)
            if unit and unit not in TIME_UNITS and words(name) & TIMES:
                raise InputError(f"{table.path} {row.where}, {name}", told, f"a unit of time: {', '.join(SHORT_UNITS)}")
            if metric and words(told) & OTHER_METRICS and not words(told) & TIMES and unit_of(told) is None:
                raise InputError(f"{table.path} {row.where}, {name}", told, "a time", "choose rows with --where")


def refuse_no_measurements(
    table: Table, read_over: Collection[str], chosen: Collection[str], way_out: str = "--repeat-column '{0}'"
) -> None:
    """Raise where a column says that a run failed, or that times were computed, or are the longest of their load.

    chosen: columns of which `--where` took one of several values; that may be the longest, too. way_out: where a column
    says something else.
    """
    _refuse_failed(table, read_over, way_out)
    _refuse_computed(table, read_over, way_out)
    _refuse_extremes(table, {*read_over, *chosen}, way_out)


def _refuse_failed(table: Table, read_over: Collection[str], way_out: str) -> None:
    for name in (each for each in table.header if each not in read_over):
        if own(name) == "pass" and set(filter(str.isdigit, values(table.rows, name))) - {"0", "1"}:
            continue  # passes that are numbered
        found = values(table.rows, name)
        failed = next((value for value in found if _failed(own(name), value)), None)
        if failed is not None:
            row = next(row for row in table.rows if row.cells[name] == failed)
            well = next((value for value in found if not _failed(own(name), value)), None)
            choice = "leave such rows out" if well is None else f"--where '{name}={well}'"
            hint = f"{choice}; if {name} says something else: {way_out.format(name)}"
            raise InputError(f"{table.path} {row.where}, {name}", row.cells[name], "rows of runs that went well", hint)


def _failed(column: str, cell: str) -> bool:
    told = cell.lower()
    if column.startswith("is_warm"):  # a setting `warmup` says that there was one before
        return told in YES
    if column.removeprefix("is_") in FLAGS:
        return bool(told) and (told in NO - {"nan", "null", "nil", "n/a", "-", "none"} or bool(words(told) & FAILED))
    if (words(told) & WELL and "not" not in words(told)) or NO_FAULT.fullmatch(told):
        return False
    if column in VERDICTS:
        return bool(words(told) & FAILED)
    return column in FAULTS and told not in NO and (told in ("1", "true", "yes") or not MEASURED.fullmatch(told))


def _refuse_computed(table: Table, read_over: Collection[str], way_out: str) -> None:
    for name in (each for each in table.header if each not in read_over):
        found = values(table.rows, name)
        if own(name) in ORIGINS:
            computed = [each for each in found if words(each) & UNMEASURED and len(words(each)) <= FEW_WORDS]
        else:
            computed = [
                each
                for each in found
                if words(own(name)) & COMPUTED and words(own(name)) <= OF_TIMES and each.lower() in YES
            ]
        if computed:
            others = [value for value in found if value not in computed]
            hint = f"--where '{name}={others[0]}'" if others else f"if they were: {way_out.format(name)}"
            raise InputError(f"{table.path}, {name}", listed(computed), "times that were measured", hint)


def _refuse_extremes(table: Table, read_over: Collection[str], way_out: str) -> None:
    for name in (each for each in table.header if own(each) in SUMMARIES and each not in read_over):
        found = values(table.rows, name)
        quantiles = own(name) not in METRICS and is_numeric(table.rows, name)
        middle = [value for value in found if value in MIDDLES or words(value) & MIDDLE or not value]
        extremes = [value for value in found if value not in middle and (quantiles or words(value) & STATISTICS)]
        if extremes:
            choice = f"--where '{name}={middle[0]}'; " if middle else ""
            hint = f"{choice}to take them all the same: {way_out.format(name)}"
            raise InputError(f"{table.path}, {name}", listed(extremes), "the median or mean of repeats", hint)


def refuse_skewed_groups(table: Table, where: Sequence[str]) -> list[str]:
    """Raise where the tokens of a group went to its ranks unevenly, and the table does not say how many to this one.

    Sentences on such rows that were asked for.
    """
    asked, notes = {text.partition("=")[0].strip() for text in where}, []
    for name in table.header:
        found = values(table.rows, name) if words(name) & ROUTINGS else []
        even = next((UNEVEN[word] for word in sorted(words(name) & UNEVEN.keys())), None)
        numbers = values(table.rows, name) if even is not None and is_numeric(table.rows, name) else []
        told = next((value for value in found if words(value) & SKEWED), None)
        told = told or next((value for value in numbers if value and float(value) != even), None)
        if told is not None and name in asked:
            notes.append(as_if_balanced(name, told))
        elif told is not None:
            limit = "balanced rows: of others the table does not tell how many assignments the rank had"
            raise InputError(
                f"{table.path}, {name}", told, limit, f"to take them as if balanced: --where {name}={told}"
            )
    return notes


def beside(table: Table, read_over: Collection[str], of_group: bool, ranks: Collection[str] = ()) -> list[str]:
    """Sentences on columns that say in how many parts a layer or its tokens were measured.

    of_group: loads are known to be those of all ranks. ranks: more columns that say how many there are.
    """
    notes = []
    whole = any(values(table.rows, name)[0].lower() in ("true", "1") for name in named(table, WHOLE_EXPERTS))
    sharded = "times are those of a part of each expert, right where it is served so"
    grouped = "are loads those of one device? of all: --unit group-tokens"
    for name in (each for each in table.header if each not in read_over):
        found = values(table.rows, name)
        spread = (SEVERAL if words(name) & (DEVICES | OF_A_DEVICE) else SPREAD).search(found[0])
        many = found[0].isdigit() and int(found[0]) > 1
        if many and not whole and SHARDED.fullmatch(own(name)):
            notes.append(f"{name} is {found[0]}: {sharded}")
        if not of_group and (
            (many and (GROUPS.fullmatch(own(name)) or plain(name) in ranks))
            or (spread and len(found) == 1 and not words(name) & PLACES)
        ):
            notes.append(f"{name} is {found[0]}: {grouped}")
    notes += _exchanged(table, read_over)
    shared = [each for each in table.header if "shared" in words(each) and words(each) & {"expert", "experts"}]
    for name in (each for each in shared if each not in read_over):
        told = values(table.rows, name)[0]
        if told.lower() not in NO and unit_of(name) is None:
            notes.append(f"{name} is {told}: are times those of routed experts alone? shared ones are in no placement")
    columns = {plain(name): name for name in table.header}
    if {"n", "k"} <= columns.keys():
        sizes = " and ".join(f"{columns[name]} {values(table.rows, columns[name])[0]}" for name in ("n", "k"))
        notes.append(f"{sizes}: are times those of the whole layer, or of one matrix product of this size?")
    for name in (columns[min(each)] for each in LAUNCHES if each <= columns.keys()):
        notes.append(f"means over {name}, it seems: of a kernel or of a whole layer, which may launch several?")
    return notes


def unread(table: Table, used: Collection[str], said: Sequence[str]) -> list[str]:
    """The sentence on columns that say the same of all rows, and may say that these are not what they are read as.

    used: columns that were read, or are known to say nothing. said: sentences so far, which may be on some of them.
    """
    found = []
    apart = {*used, *DEVICES, *REPEATS, *INDEX, *(word.strip(",:") for sentence in said for word in sentence.split())}
    for name in (each for each in table.header if not {each, plain(each)} & apart):
        told = values(table.rows, name)
        usual = (words(name) & SETTINGS and not words(name) & UNUSUAL) or (
            told[0] == "1" and words(name) & {"num", "n"}
        )
        usual = usual or (words(name) & STATES and is_numeric(table.rows, name)) or _heeded(own(name), told[0])
        if len(told) == 1 and told[0].lower() not in NO and not usual and unit_of(name) is None:
            found.append(f"{name} {told[0]}")
    return [f"columns that say the same in all rows are left unread: {listed(found, 2 * SHOWN)}"] if found else []


def _heeded(column: str, cell: str) -> bool:
    """Whether a column would have been refused, did it not say that all is well, or medians were taken."""
    if is_unit(column):
        return plain(cell) in TIME_UNITS
    if column in SUMMARIES:
        return cell in MIDDLES or bool(words(cell) & MIDDLE)
    return column.removeprefix("is_") in FLAGS or column in FAULTS or bool(column in VERDICTS and words(cell) & DONE)


def _exchanged(table: Table, read_over: Collection[str]) -> list[str]:
    """Sentences on columns that say that tokens were exchanged, whose time may be in that of the layer."""
    notes = []
    for name in (each for each in table.header if words(each) & (EXCHANGED | NETWORKS) and each not in read_over):
        found = next((value for value in reversed(values(table.rows, name)) if value.lower() not in NO), "")
        if found and (found == "1" or not is_numeric(table.rows, name) or words(name) & NETWORKS):
            notes.append(f"{name} is {found}: are times without the exchange of tokens? a topology adds that")
    return notes

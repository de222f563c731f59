"""Which column of a kernel table holds the time of a MoE layer, and which times are those of something else."""

from __future__ import annotations

import re
from collections.abc import Collection

from gemopt.exceptions import InputError
from gemopt.formats.table_columns import (
    LOADS,
    MOMENTS,
    STATISTICS,
    TIME_UNITS,
    TIMES,
    UNIT_AT_END,
    is_numeric,
    known,
    listed,
    plain,
    unit_of,
    values,
    words,
)
from gemopt.formats.table_files import Table

NO_LAYER = {
    "ttft", "tpot", "itl", "e2e", "e2el", "request", "step", "layers",  # more than a layer
    "attention", "attn", "allreduce", "reduce", "allgather", "alltoall", "a2a", "comm", "dispatch", "combine", "router",
    "routing", "gate", "gating", "topk", "sort", "align", "permute", "unpermute", "quant", "norm", "shared", "up",
    "down", "w1", "w2", "w3", "w13", "gemm1", "gemm2", "stage1", "stage2", "copy", "h2d", "d2h",  # less
}  # fmt: skip
NO_TIME = {
    "cpu", "host", "launch", "overhead", "compile", "tune", "timeout", "delta", "diff", "saved", "normalized",
    "relative", "ideal", "predicted", "roofline", "backward", "bwd", "prefill", "decode", "generation", "wait", "idle",
    "stall", "bubble", "barrier", "sync", "queue", "skew", "jitter", "log", "log2", "log10", "inverse", "throughput",
}  # fmt: skip
OPERATIONS = {"op", "op_name", "operation", "routine"}
TOTALS = {"total", "sum", "cumulative", "elapsed", "wall"}
ITERATIONS = {
    "iters", "iterations", "num_iters", "n_iters", "num_iterations", "loops", "calls", "num_calls", "of_calls",
    "instances",
}  # fmt: skip
LAYERS = {"layers", "num_layers", "n_layers", "num_hidden_layers", "moe_layers", "num_moe_layers", "layer_count"}
ONE_DEVICE = re.compile(
    r"(?:^|_)(?:(?:ep_)?rank|(?:g|n|x)pu|device|card|host|node|worker)_?\d+(?:_|$)"
)  # gpu0_us, rank_1


def time_column(table: Table, asked: str | None) -> tuple[str, float]:
    """The column with the time of the whole layer, and microseconds per unit of it."""
    if asked is not None:
        name, _, unit = asked.rpartition(":") if asked not in table.header and ":" in asked else (asked, "", "")
        known(table, name, "--time-column")
        unit = unit or unit_of(name) or ""
        if unit not in TIME_UNITS:
            raise InputError("--time-column", asked, f"a unit: {', '.join(TIME_UNITS)}", _asking(name))
        named = unit_of(name) or unit
        if TIME_UNITS[named] != TIME_UNITS[unit]:
            raise InputError("--time-column", asked, f"{named}, as its name says", _asking(name))
        return name, TIME_UNITS[unit]
    apart = [name for name in table.header if ONE_DEVICE.search(plain(name))]
    if apart:
        limit = "one line per device and load, and a column rank"
        raise InputError(
            table.path, f"columns {', '.join(apart)}", limit, f"for one alone: --time-column '{apart[0]}:us'"
        )
    durations = [name for name in table.header if not words(name) & MOMENTS]
    timed = [name for name in durations if unit_of(name) or (words(name) & TIMES and is_numeric(table.rows, name))]
    single = [name for name in timed if not words(name) & STATISTICS]
    middle = [name for name in timed if words(name) & {"median", "med", "p50"}]
    mean = [name for name in timed if words(name) & {"mean", "avg", "average"}]
    best = single or middle or mean
    if len(best) == 1:
        _refuse_other_times(table, best[0])
    known_unit = unit_of(best[0]) if best else None
    if len(best) == 1 and known_unit is not None:
        return best[0], TIME_UNITS[known_unit]
    if not best:
        limit = "a column latency_us or time_us, or another that ends in its unit (_us, _ms, _ns, _s), is needed"
        raise InputError(table.path, f"columns {', '.join(table.header)}", limit, "or give --time-column 'NAME:ms'")
    limit = "one column with the time of the whole layer, and its unit"
    likely = sorted(best, key=lambda name: bool(words(name) & (TOTALS | NO_LAYER | NO_TIME)))
    raise InputError(table.path, f"times {', '.join(best)}", limit, f"say which: {_asking(likely[0])}")


def _asking(name: str) -> str:
    """The option that takes a column, with the unit that its name ends in, if any."""
    found = UNIT_AT_END.search(plain(name))
    return f"--time-column '{name}'" if unit_of(name) else f"--time-column '{name}:{found[1] if found else 'ms'}'"


def _refuse_other_times(table: Table, name: str) -> None:
    """Raise where a time is, by its name or the columns beside it, not that of one run of one MoE layer."""
    several = LAYERS | (ITERATIONS if words(name) & TOTALS else set())
    told = [f"{each} {values(table.rows, each)[-1]}" for each in table.header
            if plain(each) in several and set(values(table.rows, each)) - {"", "1"}]  # fmt: skip
    share = "per" in words(name) and words(name) & (LOADS - {"per"} | {"expert", "experts"})
    if told or share or words(name) & (NO_LAYER | NO_TIME):
        found = " beside ".join([f"time {name}", *told])
        raise InputError(table.path, found, "the time of one whole MoE layer", f"if it is: {_asking(name)}")


def refuse_other_operations(table: Table, varying: Collection[str] = ()) -> None:
    """Raise where a column says that what was timed is no MoE layer, but an exchange or a part of one.

    varying: columns besides those named after operations that tell rows apart.
    """
    for name in (each for each in table.header if each in varying or plain(each) in OPERATIONS):
        found = values(table.rows, name)
        other = [each for each in found if words(each) & NO_LAYER or f"{plain(name)}{each}" in NO_LAYER]
        if other:
            one = f"; where one is a whole layer: --where {name}=VALUE --repeat-column {name}"
            hint = f"add up the parts of a load; gemopt topology reads exchanges{one if name in varying else ''}"
            raise InputError(f"{table.path}, {name}", listed(other), "rows of whole MoE layers", hint)

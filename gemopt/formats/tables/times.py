"""Which column of a kernel table holds the time of a MoE layer, and which times are those of something else."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from statistics import median

from gemopt.exceptions import InputError
from gemopt.formats.tables.beside import EXCHANGED, MIDDLE, is_unit, own
from gemopt.formats.tables.columns import (
    LOADS,
    MOMENTS,
    STATISTICS,
    TIME_UNITS,
    TIMES,
    at_end,
    is_numeric,
    known,
    listed,
    plain,
    unit_of,
    values,
    words,
)
from gemopt.formats.tables.files import Table

NO_LAYER = {
    "ttft", "tpot", "itl", "e2e", "e2el", "request", "step", "layers",  # more than a layer
    "attention", "attn", "allreduce", "reduce", "allgather", "alltoall", "a2a", "comm", "dispatch", "combine", "router",
    "routing", "gate", "gating", "topk", "sort", "align", "permute", "unpermute", "quant", "norm", "shared", "up",
    "shuffle", "shuffling", "scatter", "gather", "finalize",
    "mla", "mha", "rope", "sampling", "logits", "embedding",
    "down", "w1", "w2", "w3", "w13", "gemm1", "gemm2", "stage1", "stage2", "copy", "h2d", "d2h",  # less
}  # fmt: skip
PIECES = NO_LAYER - {"ttft", "tpot", "itl", "e2e", "e2el", "request", "step", "layers"}
PIECES |= {"act", "activation", "silu", "swiglu", "gelu"}
"""Words that name parts of a layer, or what is done beside it."""
NO_TIME = {
    "cpu", "host", "launch", "overhead", "compile", "tune", "timeout", "delta", "diff", "saved", "normalized",
    "relative", "ideal", "predicted", "estimated", "theoretical", "simulated", "modeled", "projected", "expected",
    "target", "sol", "cold", "warmup", "roofline", "backward", "bwd", "prefill", "decode", "generation", "wait", "idle",
    "stall", "bubble", "barrier", "sync", "queue", "skew", "jitter", "log", "log2", "log10", "inverse", "throughput",
    "cumulative", "cum", "cumsum",
}  # fmt: skip
TOTALS = {"total", "sum", "cumulative", "elapsed", "wall"}
UNDERSTOOD = TIMES | TOTALS | {*TIME_UNITS} | {
    "kernel", "kernels", "moe", "fused", "layer", "experts", "ffn", "mlp", "forward", "fwd", "run", "gpu",
    "cuda", "hip", "npu", "xpu", "device", "measured", "median", "med", "p50", "q50", "mean", "avg", "average", "dur",
    "whole", "per", "iter", "iteration", "call", "launch", "times", "latencies", "durations",
}  # fmt: skip
"""Words of the name of a time that leave no doubt, with all others known, that it is that of a layer."""
OPERATIONS = {"op", "op_name", "operation", "routine"}
ITERATIONS = {
    "iters", "iterations", "num_iters", "n_iters", "num_iterations", "loops", "calls", "num_calls", "of_calls",
    "instances",
}  # fmt: skip
COUNTS = {"count", "n", "nobs", "samples"}
"""Last words of the numbers of repeats."""
RUNS = {
    "iter", "iters", "niter", "iterations", "loops", "calls", "repeat", "repeats", "rep", "reps", "runs", "count",
    "rounds", "launches", "times",
}  # fmt: skip
"""Words of how many runs a total is of, where all rows have one number above 1; it counts the repeats elsewhere."""
PARTS = {
    "kernel", "kernel_name", "component", "stage", "part", "module", "section", "layer", "layer_type", "block",
    "block_type", "function", "func", "phase", "pass", "direction", "test", "test_name", "benchmark", "name", "case",
    "op", "gemm", "problem", "mode", "operation_mode", "kernel_operation_mode",
}  # fmt: skip
"""Columns that name what was timed, though all rows alike."""
ELSEWHERE = {
    "attention", "attn", "allreduce", "allgather", "alltoall", "reducescatter", "a2a", "dispatch", "combine", "comm",
    "nccl", "rccl", "layernorm", "rmsnorm", "permute", "unpermute", "backward", "bwd", "h2d", "d2h",
    "gemm1", "gemm2", "stage1", "stage2", "w13", "w2",
}  # fmt: skip
BESIDE = {"attention", "attn", "mla", "mha", "rope", "layernorm", "rmsnorm", "sampling", "logits", "embedding"}
"""Words of times that are in no MoE layer."""
EXCHANGES = ("alltoall", "allreduce", "allgather", "reducescatter")
LAYERS = {
    "layers", "num_layers", "n_layers", "n_layer", "num_layer", "nlayer", "nlayers", "num_hidden_layers", "moe_layers",
    "num_moe_layers", "layer_count", "n_gpu_layers",
}  # fmt: skip
LOWEST = {"min", "minimum", "best", "fastest", "lower"}
HIGHEST = {"max", "maximum", "worst", "slowest", "upper", "peak", "tail", "p90", "p95", "p99", "p999"}
SAME_TIME, ROUNDED = 1.5, 1.05  # how far a time may be from the mean of its runs, and beyond the longest
ONE_DEVICE = re.compile(
    r"(?:^|_)(?:(?:ep_)?rank|(?:g|n|x)pu|device|card|host|node|worker)_?\d+(?:_|$)"
)  # gpu0_us, rank_1


def time_column(table: Table, asked: str | None) -> tuple[str, float]:
    """The column with the time of the whole layer, and microseconds per unit of it."""
    if asked is not None:
        name, _, unit = asked.rpartition(":") if asked not in table.header and ":" in asked else (asked, "", "")
        name = next((each for each in (name, *(f"{name} ({u})" for u in TIME_UNITS)) if each in table.header), name)
        known(table, name, "--time-column")  # perhaps with the unit that its cells named
        unit = unit or unit_of(name) or ""
        if unit not in TIME_UNITS:
            raise InputError("--time-column", asked, f"a unit: {', '.join(TIME_UNITS)}", _asking(name))
        named = unit_of(name) or _unit_within(name) or unit
        if TIME_UNITS[named] != TIME_UNITS[unit]:
            raise InputError("--time-column", asked, f"{named}, as its name says", _asking(name))
        return name, TIME_UNITS[unit]
    apart = [name for name in table.header if ONE_DEVICE.search(plain(name))]
    if apart:
        limit = "one line per device and load, and a column rank"
        unit = next((each for each in plain(apart[0]).split("_") if each in TIME_UNITS), "us")
        raise InputError(
            table.path, f"columns {', '.join(apart)}", limit, f"for one alone: --time-column '{apart[0]}:{unit}'"
        )
    timed, best = _candidates(table)
    if len(best) == 1:
        _refuse_other_times(table, best[0])
    known_unit = unit_of(best[0]) or _unit_beside(table) if best else None
    if len(best) == 1 and known_unit is not None:
        return best[0], TIME_UNITS[known_unit]
    if not best and timed:
        limit = "the median or mean of repeats"
        raise InputError(
            table.path, f"times {', '.join(timed)}", limit, f"to take one all the same: {_asking(timed[0])}"
        )
    if not best:
        limit = "a column latency_us or time_us, or another that ends in its unit (_us, _ms, _ns, _s), is needed"
        raise InputError(table.path, f"columns {', '.join(table.header)}", limit, "or give --time-column 'NAME:ms'")
    limit = "one column with the time of the whole layer, and its unit"
    added = [name for name in best if name not in of_no_layer(best)]
    if len(added) < len(best):  # which a total holds too
        added = [name for name in added if not words(name) & TOTALS] or added
    likely = sorted(added or best, key=_unlikely)
    if len(added) > 1 and all(words(name) & PIECES for name in added):
        hint = f"all the parts of a layer? to add them up: --time-column '{'+'.join(map(_with_unit, added))}'"
    else:
        of_parts = any(words(name) & PIECES for name in best)  # which a total is of then
        none = words(likely[0]) & (NO_LAYER | NO_TIME | (set() if of_parts else TOTALS))
        hint = f"{'by their names none is; to take one all the same' if none else 'say which'}: {_asking(likely[0])}"
    raise InputError(table.path, f"times {', '.join(best)}", limit, hint)


def _candidates(table: Table) -> tuple[list[str], list[str]]:
    """The columns with times, and those of them that may be the layer's."""
    shares = {name for name in table.header if "%" in name or words(name) & {"percent", "pct"}}
    numbers = {name for name in table.header if plain(name).split("_")[-1] in COUNTS}  # latency_us_count
    durations = [name for name in table.header if not words(name) & MOMENTS and name not in shares | numbers]
    timed = [name for name in durations if unit_of(name) or (words(name) & TIMES and is_numeric(table.rows, name))]
    single = [name for name in timed if not words(name) & STATISTICS]
    middle = [name for name in timed if words(name) & {"median", "med", "p50"}]
    mean = [name for name in timed if words(name) & {"mean", "avg", "average"}]
    if middle or mean:  # others may be totals of several runs, or were set: timeout_s
        set_to = {name for name in single if len(table.rows) > 1 and len(values(table.rows, name)) == 1}
        totals = {name for name in single if words(name) & TOTALS and _runs(table, name)}
        single = [name for name in single if name not in set_to | totals]
    best = single or middle or mean
    if best is single and single and (others := _statistics_beside(table, single[0], timed, middle, mean)):
        check = any if words(others[0]) & MIDDLE else all
        best = single if check(fits(table, single[0], each) for each in others) else others + single
    return timed, best


def _statistics_beside(table: Table, time: str, timed: list[str], *middles: list[str]) -> list[str]:
    """The medians, means or else extremes that should be those of a time: neither set nor, by their names, others'."""
    apart = set() if words(time) & TOTALS else NO_LAYER | NO_TIME
    several = [name for name in timed if len(table.rows) == 1 or len(values(table.rows, name)) > 1]
    extremes = [name for name in several if words(name) & (LOWEST | HIGHEST)]
    kept = [[e for e in each if is_numeric(table.rows, e) and not words(e) & apart] for each in (*middles, extremes)]
    return next(filter(None, kept), [])


def fits(table: Table, time: str, statistic: str) -> bool:
    """Whether a statistic may be one of a time, by what is usual of all rows: near it, or not beyond it."""
    if not all(is_numeric(table.rows, name) for name in (time, statistic)):
        return False
    scale = TIME_UNITS.get(unit_of(time) or "", 1.0) / TIME_UNITS.get(unit_of(statistic) or "", 1.0)
    pairs = [[float(row.cells[name].strip("*%x\u00d7") or 0) for name in (time, statistic)] for row in table.rows]
    usual = median([scale * one / other for one, other in pairs if other > 0] or [1.0])
    lowest, highest = words(statistic) & LOWEST, words(statistic) & HIGHEST
    least = 0.0 if highest else 1 / ROUNDED if lowest else 1 / SAME_TIME
    return least <= usual <= (float("inf") if lowest else ROUNDED if highest else SAME_TIME)


def _unit_beside(table: Table) -> str | None:
    """The unit of time that a column says of all rows alike."""
    told = [plain(each) for name in filter(is_unit, table.header) for each in values(table.rows, name)]
    return told[0] if len(told) == 1 and told[0] in TIME_UNITS else None


def doubt_of_time(name: str) -> list[str]:
    """A sentence on a time whose name also says something that is not understood: a kernel, another language."""
    foreign = any(letter.isalpha() and not letter.isascii() and letter not in "\u00b5\u03bc" for letter in name)
    if not foreign and words(name) <= UNDERSTOOD:
        return []
    unit = f", in {unit_of(name)}" if unit_of(name) else ""
    return [f"{name} taken for the time of one whole MoE layer{unit}: is it? another: --time-column NAME"]


def _unlikely(name: str) -> tuple[bool, bool, bool]:
    """Sorts times by how hardly they are that of a layer."""
    return bool(words(name) & (NO_LAYER | NO_TIME)), not words(name) <= UNDERSTOOD, bool(words(name) & TOTALS)


def _asking(name: str) -> str:
    """The option that takes a column, with the unit that its name ends in, if any."""
    found = at_end(name)
    if unit_of(name):
        return f"--time-column '{name}'"
    unit = found[1] if found else _unit_within(name)
    return f"--time-column '{name}:{unit}'" if unit else f"--time-column '{name}:ms', or :us, :ns, :s"


def _with_unit(name: str) -> str:
    return name if unit_of(name) else f"{name}:{_unit_within(name) or 'ms'}"


def _unit_within(name: str) -> str | None:
    """The unit that a word of a name says, as `latency_us_fused`; a single letter is none, nor is the second run."""
    found = [word for word in plain(name).split("_") if len(word) > 1 and word in TIME_UNITS and word != "second"]
    return found[0] if len({TIME_UNITS[word] for word in found}) == 1 else None


def _refuse_other_times(table: Table, name: str) -> None:
    """Raise where a time is, by its name or the columns beside it, not that of one run of one MoE layer."""
    told = [f"{each} {values(table.rows, each)[-1]}" for each in table.header
            if each != name and _several(each, set(values(table.rows, each)) - {"", "1"})]  # fmt: skip
    told += _runs(table, name)
    share = "per" in words(name) and words(name) & (LOADS - {"per"} | {"expert", "experts"})
    of_token = "token" in words(name)  # inter_token_latency, time_to_first_token
    if told or share or of_token or words(name) & (NO_LAYER | NO_TIME):
        found = " beside ".join([f"time {name}", *told])
        raise InputError(table.path, found, "the time of one whole MoE layer", f"if it is: {_asking(name)}")


def _several(column: str, found: set[str]) -> bool:
    """Whether a column counts several layers; `found`: what it says but nothing and 1."""
    counts = "layers" in words(column) and unit_of(column) is None and all(each.isdigit() for each in found)
    named = own(column) in LAYERS or counts
    return named and bool(found)


def _runs(table: Table, name: str) -> list[str]:
    """Columns that say of how many runs a time is the total, with their last values; none where it is no total."""
    if not words(name) & TOTALS:
        return []
    found = {each: values(table.rows, each) for each in table.header}
    sized = "k" in map(plain, found)  # n and k are those of a matrix
    one = {each for each, seen in found.items() if len(seen) == 1 and seen[0].isdigit() and int(seen[0]) > 1}
    return [
        f"{each} {seen[-1]}"
        for each, seen in found.items()
        if (own(each) in ITERATIONS and set(seen) - {"", "1"})
        or (each in one and "warmup" not in words(each) and (words(each) & RUNS or (plain(each) == "n" and not sized)))
    ]


def refuse_other_operations(table: Table, varying: Collection[str] = (), read_over: Collection[str] = ()) -> None:
    """Raise where a column says that what was timed is no MoE layer, but an exchange or a part of one.

    varying: columns besides those named after operations that tell rows apart. read_over: those that were said to tell
    nothing, of the ones that name what was timed in all rows alike.
    """
    for name in (each for each in table.header if own(each) in PARTS and each not in (*varying, *read_over)):
        found = values(table.rows, name)
        told = [e for e in found if words(e) & ELSEWHERE or f"{own(name)}{e}" in ELSEWHERE or is_exchange(e)]
        if told:
            hint = f"gemopt topology reads exchanges; if it is a whole layer: --repeat-column '{name}'"
            hint = f"parts of a layer: --sum-column '{name}' adds them up; {hint}" if len(found) > 1 else hint
            raise InputError(f"{table.path}, {name}", listed(told), "times of whole MoE layers", hint)
    for name in (each for each in table.header if each in varying or own(each) in OPERATIONS):
        found = values(table.rows, name)
        other = [
            each for each in found if words(each) & NO_LAYER or f"{own(name)}{each}" in NO_LAYER or is_exchange(each)
        ]
        if other:
            one = f"; where one is a whole layer: --where {name}=VALUE --repeat-column {name}"
            one = one if name in varying else ""
            hint = f"parts of a layer: --sum-column {name} adds them up; gemopt topology reads exchanges{one}"
            raise InputError(f"{table.path}, {name}", listed(other), "rows of whole MoE layers", hint)


def is_exchange(told: str) -> bool:
    """`all_to_all`, `ncclAllReduce` and the like."""
    return any(each in plain(told).replace("_", "") for each in EXCHANGES)


def of_no_layer(names: Sequence[str]) -> list[str]:
    """Those that name an exchange of tokens, both ways of it, or what is computed outside of a MoE layer."""
    sent = {name for name in names if words(name) & EXCHANGED or is_exchange(name)}
    back = {"combine"} if sent else set()
    return [name for name in names if name in sent or words(name) & (BESIDE | back)]

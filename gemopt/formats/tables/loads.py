"""Which column of a kernel table is the load, what it counts, and how many assignments of a rank that makes."""

from __future__ import annotations

import re
from statistics import median

from gemopt.exceptions import InputError
from gemopt.formats.tables.beside import NO, WAYS, own
from gemopt.formats.tables.columns import known, listed, named, plain, values, words
from gemopt.formats.tables.files import NO_LOADS, Table, whole
from gemopt.formats.tables.kinds import Layout, Unit

LOAD_COLUMNS = ("tokens", "num_tokens", "n_tokens", "ntokens", "token_count", "assignments", "token", "batch_size")
EXPERTS = re.compile(r"(?:(?:num|n)_)?(?:(?:routed|total|global)_)?experts?(?:_num)?|e")
LOCAL_EXPERTS = re.compile(
    r"(?:(?:num|n)_)?(?:local_(?:num_)?experts?|experts_(?:per_(?:rank|gpu|device)|local))|local_e|e_local|e_per_(?:rank|gpu)"
)
TOP_K = re.compile(
    r"(?:(?:num|n|moe|router)_)*(?:top_?k(?:_experts)?|expert_used|(?:(?:selected|active|activated|routed)_)?experts_per_tok(?:en)?)"
)
ACTIVE = re.compile(
    r"(?:(?:num|n)_)?(?:(?:active|activated|unique|distinct|hit|used|touched)_experts|experts_(?:active|activated|hit|used))"
)
EP = re.compile(rf"(?:moe_|num_|n_)?(?:ep|expert_(?:model_)?parallel(?:ism)?){WAYS}")
UNEVEN = 0.1  # how far tokens of a rank may be from an even share
LARGEST_LOAD = 2.0**31 - 1  # as in a profile
BATCHES = {"batch", "bs", "seqs", "sequences", "requests", "concurrency", "users"}
SEQUENCES = {"seq", "sequence", "request", "prompt", "input", "query", "q"}
DRAFTS = {"draft", "spec", "speculative", "mtp"}
ONE_WORD = {"seqlen", "isl", "qlen", "mtp", "seq", "next_n", "beam_width", "num_beams", "beams", "best_of"}
NO_LENGTHS = {"max", "kv", "cache", "ctx", "context", "output", "topk", "us", "ms"}
ONES = {"1", "1.0", "off", *NO}
RATES = {
    "percent", "pct", "ratio", "fraction", "utilization", "util", "throughput", "log", "log2", "log10", "ln", "bytes",
    "kb", "mb", "gb", "kib", "mib", "gib", "sec", "second", "us", "ms", "ns",
}  # fmt: skip
THOUSANDS = {"k", "ktokens", "thousand", "thousands", "million", "millions"}
ONE_RANK = {"rank", "gpu", "device", "npu", "xpu", "card", "worker"}
WHOLES, COUNTED = {"total", "sum", "all", "overall"}, {"num", "n", "count", "of"}
GROUP = {"global", "cluster", "world"}
PROFILED = {
    "instances", "calls", "corr_id", "correlation_id", "dispatch_id", "kernel_id", "task_id", "wgr", "metric_value",
}  # fmt: skip
"""Columns of what profilers of kernels write."""


def matching(table: Table, names: re.Pattern[str]) -> list[str]:
    """The columns whose name, however it is written, is one of these."""
    return [name for name in table.header if names.fullmatch(own(name))]


def load_column(table: Table, layout: Layout | None, unit: Unit | None, asked: str | None) -> str:
    """The column with the load: the one asked for, that of a known kind of table, or one with a usual name."""
    if asked is not None and unit is None:
        raise InputError("--unit", "", f"what does {asked} count?", "give --unit tokens, group-tokens or assignments")
    if asked is not None:
        known(table, asked, "--load-column")
        _refuse_other_loads(table, asked, unit is Unit.GROUP_TOKENS)
        return asked
    if layout is not None:
        return layout.load
    found = named(table, LOAD_COLUMNS)
    if not found:
        limit = f"a column {' or '.join(LOAD_COLUMNS)} is needed"
        profiled = PROFILED & {plain(name) for name in table.header}
        hint = NO_LOADS if profiled else "or give --load-column NAME"
        raise InputError(table.path, f"columns {', '.join(table.header)}", limit, hint)
    return min(found, key=lambda name: (plain(name) == "assignments") != (unit in (None, Unit.ASSIGNMENTS)))


def _refuse_other_loads(table: Table, load: str, of_group: bool) -> None:
    """Raise where the name of the load column says that it counts per expert, in thousands, no rows, or other ranks.

    of_group: it was said to count the tokens of a group.
    """
    parts = words(load)
    group = set() if of_group else {"group", "groups", "expected"}  # expected_m: DeepGEMM's, of a group
    if ("per" in parts or "expected" in parts) and parts & ({"expert", "experts"} | group):
        raise InputError("--load-column", load, "the load of a device, over all its experts", "multiply by the experts")
    if parts & (RATES | THOUSANDS) or {"per", "s"} <= parts or "%" in load:
        raise InputError("--load-column", load, "a count of rows or tokens", f"is that in {table.path}? then rename it")
    if of_group and _of_one_rank(load):
        hint = "--unit tokens: where every rank sends as many, as many come back to each"
        raise InputError("--load-column", load, "the tokens of all ranks together", hint)
    if not of_group and parts & GROUP and "per" not in parts:
        hint = f"--unit {Unit.GROUP_TOKENS.value}; if it does count those of one device, rename it"
        raise InputError("--load-column", load, "the load of one device", hint)


def _of_one_rank(load: str) -> bool:
    parts = words(load)
    return bool(parts & ONE_RANK) and (bool(parts & {"per", "local"}) or "/" in load)  # tok/rank


def refuse_tokens_of_a_rank(table: Table, load: str) -> None:
    """Raise where a load that is to count the tokens of the group has larger ones beside it, as MegaMoE's tables."""
    for name in (each for each in table.header if each != load and {"global", "tokens"} <= words(each)):
        row = next((row for row in table.rows if row.cells[load] != row.cells[name]), None)
        if row is not None:
            found = f"{row.cells[load]} beside {name} {row.cells[name]}"
            hint = f"--load-column {name} --unit {Unit.GROUP_TOKENS.value}"
            raise InputError(f"{table.path} {row.where}, {load}", found, "the tokens of the group", hint)


def unit_of_load(table: Table, load: str, layout: Layout | None, unit: Unit | None, top_k: int | None) -> Unit:
    """What the load column counts; `unit`: what it was said to count."""
    if layout is not None:
        if unit not in (None, layout.unit):
            limit = f"{layout.name} counts {layout.unit.value} in {load}"
            raise InputError("--unit", unit.value if unit else "", limit, "leave --unit out")
        return layout.unit
    counts_assignments = plain(load) == "assignments"
    if unit not in (None, Unit.ASSIGNMENTS) and counts_assignments:
        raise InputError("--unit", unit, f"{table.path} counts assignments", "leave --unit out")
    if unit is not None:
        return unit
    if plain(load) == "batch_size":
        if beside := _factors(table, load):
            limit = f"with {', '.join(beside)}, does {load} count tokens, or sequences?"
            raise InputError("--unit", "", limit, "give --unit tokens where it counts tokens")
        return Unit.TOKENS
    if not counts_assignments and (top_k is not None or matching(table, EP)):
        told = "ranks of a group" if top_k is None else f"{top_k} experts per token"
        limit = f"with {told}, does {load} count tokens?"
        raise InputError("--unit", "", limit, "give --unit tokens, group-tokens or assignments")
    return Unit.ASSIGNMENTS


def _factors(table: Table, load: str) -> list[str]:
    """Columns, and their values, that the load is multiplied with to be tokens: lengths of batches, or the reverse."""
    counts_batches, counts_length = bool(words(load) & BATCHES), _is_length(load)
    return [
        f"{name} {value}"
        for name in table.header
        if name != load and ((counts_batches and _is_length(name)) or (counts_length and words(name) & BATCHES))
        for value in values(table.rows, name)
        if value.lower() not in ONES
    ]


def _is_length(name: str) -> bool:
    """Whether a column tells the tokens of each sequence: its length, or drafts of it."""
    parts = words(name)
    if parts & NO_LENGTHS:
        return False
    counted = parts & {"len", "length", "lens", "lengths", "seqlen", "tokens"}
    of_each = parts & SEQUENCES or (parts & DRAFTS and parts & {"tokens", "steps"})
    return plain(name) in ONE_WORD or bool(of_each and (counted or parts & DRAFTS)) or "seqlen" in parts


def doubts_of_load(table: Table, load: str, unit: Unit, ranks: float) -> list[str]:
    """Sentences on columns that say that the load counts something else, though it was said what it counts.

    ranks: how many the tokens of a group are taken to be spread over evenly.
    """
    notes = [f"beside {each}: does {load} count all tokens?" for each in _factors(table, load)[:1]]
    if unit is not Unit.GROUP_TOKENS and (shared := _ranks(table, load)):
        notes.append(f"{load} is {shared}: are they those of the whole group? then --unit group-tokens")
    for name, share in _shares(table, load, ranks) if unit is Unit.GROUP_TOKENS else ():
        notes.append(f"{name} is {share:.3g} times an even share of {load}: were ranks given more than others?")
    for name, times in _wholes(table, load):
        notes.append(f"{name} is {times} times {load}: is {load} that of one expert, or of one rank?")
    if words(load) & {"m", "rows"}:
        for name in (each for each in table.header if plain(each) in {"num_groups", "groups", "g"}):
            found = next((value for value in values(table.rows, name) if value not in ONES), "")
            if found.isdigit():
                notes.append(f"{name} is {found}: does {load} count the rows of all groups together?")
    return notes


def _ranks(table: Table, load: str) -> str:
    """`8 times num_tokens_per_rank`, where a column counts the tokens of each rank, and the load those of several."""
    own = [each for each in table.header if each != load and _of_one_rank(each) and "tokens" in words(each)]
    return next((f"{times} times {name}" for name in own if (times := _times(table, load, name))), "")


def _shares(table: Table, load: str, ranks: float) -> list[tuple[str, float]]:
    """Columns with the tokens of one rank, and how many times those of a group's load over its ranks they usually are.

    Only those that are more than a tenth off.
    """
    found = []
    for name in (each for each in table.header if words(each) & ONE_RANK and "tokens" in words(each) and each != load):
        pairs = [(row.cells[name], row.cells[load]) for row in table.rows]
        if all(own.isdecimal() and each.isdecimal() for own, each in pairs):
            share = median([int(own) * ranks / max(int(each), 1) for own, each in pairs])
            found += [(name, share)] if abs(share - 1) > UNEVEN else []
    return found


def _wholes(table: Table, load: str) -> list[tuple[str, str]]:
    """Columns that count what the load does in all, as `total_M` beside `M`, and how many times as much that is."""
    wholes = [each for each in table.header if words(each) & WHOLES and words(each) - WHOLES == words(load) - COUNTED]
    return [(name, times) for name in wholes if (times := _times(table, name, load))]


def _times(table: Table, many: str, few: str) -> str:
    """How many times a column is another, at least twice in all rows alike; empty where it is not."""
    pairs = {(row.cells[many], row.cells[few]) for row in table.rows}
    if not all(a.isdecimal() and b.isdecimal() and int(b) for a, b in pairs):
        return ""
    times = {int(a) / int(b) for a, b in pairs}
    return f"{min(times):g}" if len(times) == 1 and min(times) >= 2 else ""


def shared_experts(table: Table, top_k: int | None) -> list[str]:
    """A sentence where the number of experts says that shared ones were added to those that tokens choose."""
    experts = _told(table, EXPERTS) or 0
    extra = experts % 8 if experts > 8 else 0
    if extra not in (1, 2) or top_k is None or top_k <= extra:
        return []
    told = f"{experts} experts, {top_k} for each token: are {extra} of them shared by all tokens?"
    return [f"{told} traces do not count shared ones: write {top_k - extra} for {top_k} then"]


def factor(unit: Unit, top_k: int | None, ep: int | None, table: Table, load: str) -> float:
    """Assignments of a rank per unit of the load column."""
    if ep is not None and unit is not Unit.GROUP_TOKENS:
        raise InputError(
            "--ep", ep, f"{unit.value} are those of one rank", "leave --ep out, or give --unit group-tokens"
        )
    if unit is Unit.ASSIGNMENTS:
        return 1.0
    if top_k is None or top_k < 1:
        raise InputError("--top-k", top_k, f"unit {unit.value} needs the experts per token, at least 1", "give --top-k")
    every = _told(table, EXPERTS)
    if unit is Unit.TOKENS and every is not None and top_k > every:
        hint = "are those the experts of one rank? then --unit group-tokens"
        raise InputError("--top-k", top_k, f"at most the {every} experts of {table.path}", hint)
    parts = _parts(table)
    if unit is Unit.TOKENS and parts > 1 and not _of_one_rank(load):
        found = f"tokens, and one in {parts} of the experts is on the device"
        raise InputError("--unit", found, "tokens whose experts are all on it", "give --unit group-tokens")
    if unit is Unit.TOKENS:
        return float(top_k)
    ep = given("--ep", ep, table, EP) or (parts or None)
    if parts and ep != parts:
        raise InputError("--ep", ep, f"{parts}: one in {parts} of the experts is on the device, by {table.path}")
    if ep is None or ep < 1:
        raise InputError("--ep", ep, "unit group-tokens needs the ranks of the measured group, at least 1", "give --ep")
    return top_k / ep


def _parts(table: Table) -> int:
    """How many times the experts on the device all experts are, by the columns that say so; 0 where none do."""
    local = given("", None, table, LOCAL_EXPERTS) or 0
    every = local and (given("", None, table, EXPERTS) or 0)
    return every // local if local and every % local == 0 else 0


def experts_of_a_rank(table: Table, unit: Unit, ep: int | None) -> int | None:
    """How many experts are on the device, where the table and `ep` tell."""
    local, every = _told(table, LOCAL_EXPERTS), _told(table, EXPERTS)
    ranks = (ep or _told(table, EP)) if unit is Unit.GROUP_TOKENS else 1
    return local or (every // ranks if every and ranks and every % ranks == 0 else None)


def _told(table: Table, names: re.Pattern[str]) -> int | None:
    """The one whole number in a column of one of these names."""
    found = [values(table.rows, name) for name in matching(table, names)]
    return next((int(each[0]) for each in found if len(each) == 1 and each[0].isdecimal()), None)


def given(option: str, value: int | None, table: Table, names: re.Pattern[str]) -> int | None:
    """What an option says, or a column of the table; both must agree."""
    column = next((name for name in matching(table, names) if table.rows[0].cells[name]), None)
    if column is None:
        return value
    if len(found := values(table.rows, column)) > 1:
        raise InputError(f"{table.path}, {column}", listed(found), "one number for all rows", "choose with --where")
    read_value = whole(table, table.rows[0], column, largest=LARGEST_LOAD)
    if value not in (None, read_value):
        raise InputError(option, value, f"{column} is {read_value} in {table.path}", f"leave {option} out")
    return read_value

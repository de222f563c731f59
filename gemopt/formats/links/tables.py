"""Measured exchanges as ports of a topology: aiconfigurator's tables of NCCL, DeepEP and MoE all-to-all.

What went through a port follows from how they were measured (collectors of github.com/ai-dynamo/aiconfigurator):
messages of NCCL count elements of a rank's whole buffer; tokens are those of one rank, and chose their experts
uniformly at random. Of n tokens, top-k of E experts, G ranks on N nodes, so many left a rank through a port between
ranks (nodes):

* once per assignment (low latency): n k times the share of ranks elsewhere;
* once per rank: n times the other ranks times P, with P = 1 - C(E - E/G, k) / C(E, k) that one has a token's expert;
* once per node: likewise, with nodes for ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from statistics import median

import numpy as np

from gemopt.exceptions import InputError
from gemopt.formats.tables.beside import refuse_no_measurements
from gemopt.formats.tables.columns import chosen_rows, plain, refuse_mixtures
from gemopt.formats.tables.files import Row, Table, number, whole
from gemopt.formats.tables.notations import read
from gemopt.topology import Level, Topology, load
from gemopt.words import counted

WORD = {
    "half": 2, "float16": 2, "fp16": 2, "bfloat16": 2, "bf16": 2, "float": 4, "float32": 4, "fp32": 4, "int32": 4,
    "int8": 1, "uint8": 1, "fp8": 1, "f8e4m3": 1, "f8e5m2": 1,
}  # fmt: skip
FP8 = 1 + 4 / 128  # bytes of a number: DeepEP sends a scale of 4 bytes with 128 of them
PHASES = ("dispatch", "combine")
NODE_RANKS = 8  # of a node that DeepEP's own tables were measured on
MOST_NODES = 4  # to which DeepEP's own test routes a token
LARGEST, LARGEST_US = 2.0**40, 1e12
TOKENS = frozenset({"node_num", "hidden_size", "num_token", "num_topk", "num_experts"})
MOST_INSIDE = 8  # GPUs that certainly are of one node
MOVED, MANYFOLD = 0.2, 0.5
TOLD = ("latency_us", "bytes", "once_per")


@dataclass(frozen=True)
class Layout:
    """A known kind of table: how it is told, its load, and its rows, one per exchange, with the columns of `TOLD`.

    bytes: of a token (NCCL: of an element); once_per: as in `Exchange`. Empty where the table does not tell.
    """

    header: frozenset[str]
    load: str
    rows: Callable[[Table], list[Row]]


def _nccl(table: Table) -> list[Row]:
    return [
        _told(table, row, {}, ("latency",), 1e3, size=_word(table, row, "nccl_dtype"), once_per="")
        for row in table.rows
    ]


def _word(table: Table, row: Row, column: str) -> int:
    """Bytes of a number of the type that a column names."""
    name = row.cells[column]
    if name.lower() not in WORD:
        raise InputError(f"{table.path} {row.where}, {column}", name, f"one of {', '.join(WORD)}")
    return WORD[name.lower()]


def _a2a(table: Table) -> list[Row]:
    """Of types of 8 bits and less the table says neither scales nor how results come back."""
    found = []
    for row in table.rows:
        kind, word = row.cells["comm_backend"].rpartition("_")[2], WORD.get(row.cells["comm_dtype"].lower(), 0)
        size = word * whole(table, row, "hidden_size", largest=LARGEST) if word > 1 else ""
        once_per = {"ll": "assignment", "ht": _normally(table, row)}.get(kind, "")
        found.append(_told(table, row, {}, ("latency",), size=size, once_per=once_per))
    return found


def _low_latency(table: Table) -> list[Row]:
    """What was sent is in the bandwidth: bytes of a token for each of its experts."""
    found = []
    for row in table.rows:
        tokens, experts = (whole(table, row, name, largest=LARGEST) for name in ("num_token", "num_topk"))
        for phase in PHASES:
            us, gbps = f"{phase}_avg_t_us", f"{phase}_bandwidth_gbps"
            sent = 1e3 * number(table, row, us, largest=LARGEST_US) * number(table, row, gbps, largest=1e6)
            size = sent / max(tokens * experts, 1)
            found.append(_told(table, row, {"phase": phase}, (us,), size=size, once_per="assignment"))
    return found


def _normal(table: Table) -> list[Row]:
    """Dispatch in FP8 with its scales, combine in BF16."""
    found = []
    for row in table.rows:
        hidden = whole(table, row, "hidden_size", largest=LARGEST)
        for phase, word in zip(PHASES, (FP8, 2), strict=True):
            own = {"phase": phase, "sms": row.cells[f"{phase}_sms"]}
            times = (f"{phase}_transmit_us", f"{phase}_notify_us")
            found.append(_told(table, row, own, times, size=word * hidden, once_per=_normally(table, row)))
    return found


def _normally(table: Table, row: Row) -> str:
    """How often DeepEP's normal kernels send a token: once per rank within a node, once per node between them."""
    return "rank" if whole(table, row, "node_num", largest=LARGEST) == 1 else "node"


def _told(
    table: Table,
    row: Row,
    own: dict[str, str],
    times: Sequence[str],
    scale: float = 1.0,
    *,
    size: object,
    once_per: str,
) -> Row:
    """The row with what it tells, without the columns of phases and parts of the time."""
    time = sum(number(table, row, name, largest=LARGEST_US) for name in times) * scale
    if time <= 0:
        raise InputError(f"{table.path} {row.where}, {times[0]}", row.cells[times[0]], "above 0", "a failed run?")
    parts = (*PHASES, "transmit_us", "notify_us", "latency")
    kept = {name: cell for name, cell in row.cells.items() if not name.startswith(parts)}
    return Row(row.where, {**kept, **own, "latency_us": repr(time), "bytes": str(size), "once_per": once_per})


LAYOUTS = (
    Layout(frozenset({"nccl_dtype", "num_gpus", "message_size", "op_name", "latency"}), "message_size", _nccl),
    Layout(
        frozenset({"phase", "comm_backend", "comm_dtype", "ep_size", "node_num", "topk", "num_tokens", "latency"})
        | {"hidden_size", "num_experts"},
        "num_tokens",
        _a2a,
    ),
    Layout(
        TOKENS | {f"{phase}_{name}" for phase in PHASES for name in ("avg_t_us", "bandwidth_gbps")},
        "num_token",
        _low_latency,
    ),
    Layout(
        TOKENS | {f"{phase}_{name}" for phase in PHASES for name in ("sms", "transmit_us", "notify_us")},
        "num_token",
        _normal,
    ),
)


def from_table(
    path: Path,
    *,
    where: Sequence[str] = (),
    token_bytes: int | None = None,
    once_per: str | None = None,
    inside: str | None = None,
    nodes: int | None = None,
) -> Topology:
    """The group that a table was measured on; its times are those of ports within a node, or between nodes.

    Parameters
    ----------
    where
        `COLUMN=VALUE`, rows to read. Dispatch and combine side by side are rows of their own, told by `phase`.
    token_bytes, once_per
        Of a token as it was sent, and how often it was; where the table does not tell.
    inside
        Topology (name or file) whose speed within a node is added to what was measured between nodes.
    nodes
        On how many nodes of equally many GPUs, where the table does not tell: NCCL's.

    Raises
    ------
    InputError
        Rows of more than one kind, or it is not told what went through a port.
    """
    full = read(path)
    layout = next((each for each in LAYOUTS if each.header <= set(full.header)), None)
    if layout is None:
        limit = "aiconfigurator's nccl_perf, moe_a2a_perf, wideep_deepep_ll_perf or wideep_deepep_normal_perf"
        hint = "of nccl-tests and rccl-tests give what they print, with the lines of ranks"
        raise InputError(str(path), f"columns {', '.join(full.header)}", limit, hint)
    rows, load_column = layout.rows(full), layout.load
    table = chosen_rows(Table(full.path, list(rows[0].cells), rows), where)
    refuse_no_measurements(table, (), [text.partition("=")[0].strip() for text in where], "leave the column out")
    loads = [number(table, row, load_column, largest=LARGEST) for row in table.rows]
    refuse_mixtures(
        [table],
        lambda row: (number(table, row, load_column, largest=LARGEST),),
        used={load_column, *TOLD},
        else_say="",
    )
    if "nccl_dtype" in table.header:
        ranks, num_nodes, share, said = _buffers(table, nodes, token_bytes=token_bytes, once_per=once_per)
    elif nodes is not None:
        raise InputError("--nodes", nodes, f"{path.name} tells: node_num", "leave it out")
    else:
        ranks, num_nodes, share, said = _tokens(table, once_per)
    sizes = [_size(table, row, token_bytes) for row in table.rows]
    sent = [share * load * size for load, size in zip(loads, sizes, strict=True)]
    times = [float(row.cells["latency_us"]) for row in table.rows]
    points = list(zip(sent, times, strict=True))
    level = Level(points=rising(points, str(path)))
    within = level if num_nodes == 1 else None
    if num_nodes > 1 and ranks > num_nodes:
        if inside is None:
            raise InputError("--inside", None, "measured between nodes; say how fast one is inside", "nvlink-8")
        within = load(inside).within_node
    elif inside is not None:
        raise InputError("--inside", inside, "measured within a node", "leave it out")
    return Topology(
        name=path.stem,
        node_of_rank=np.arange(ranks) // (ranks // num_nodes),
        within_node=within,
        between_nodes=level if num_nodes > 1 else None,
        source=f"{said}; {path.name}{smoothed(points, level)}",
    )


def _size(table: Table, row: Row, token_bytes: int | None) -> float:
    """Bytes of a token, or of NCCL's element."""
    told = row.cells["bytes"]
    if told and token_bytes is not None:
        raise InputError("--token-bytes", token_bytes, f"{table.path} tells: {float(told):g}", "leave it out")
    if told or token_bytes is not None:
        return float(told or token_bytes or 0)
    found = f"type {row.cells.get('comm_dtype', '')}"
    raise InputError(f"{table.path} {row.where}", found, "it does not tell the bytes of a token", "give --token-bytes")


def _buffers(
    table: Table, asked: int | None, *, token_bytes: int | None, once_per: str | None
) -> tuple[int, int, float, str]:
    """Ranks, nodes, which share of an element of the message left a rank or its node, and what was measured."""
    cells = table.rows[0].cells
    for option, value in (("--token-bytes", token_bytes), ("--once-per", once_per)):
        if value is not None:
            raise InputError(option, value, "NCCL's tables know no tokens", "leave it out")
    if plain(cells["op_name"]).replace("_", "") != "alltoall":
        raise InputError(
            f"{table.path}, op_name", cells["op_name"], "dispatch is an alltoall", "--where op_name=alltoall"
        )
    ranks = whole(table, table.rows[0], "num_gpus", largest=1 << 16)
    if ranks < 2:
        raise InputError(f"{table.path}, num_gpus", ranks, "2 or more")
    if asked is None and ranks > MOST_INSIDE:
        limit = "the table does not tell on how many nodes"
        raise InputError(f"{table.path}, num_gpus", ranks, limit, "give --nodes 2, or --nodes 1 where NVLink joins all")
    nodes = asked or 1
    if ranks % nodes or nodes > ranks:
        raise InputError("--nodes", nodes, f"as many of the {ranks} GPUs on each node")
    away = ranks - ranks // nodes if nodes > 1 else ranks - 1
    where = counted(nodes, "node")
    return ranks, nodes, away / ranks, f"alltoall of {_kind(table) or 'NCCL'} on {where}"


def _tokens(table: Table, asked: str | None) -> tuple[int, int, float, str]:
    """Ranks, nodes, how often a token left through a port of the level that was measured, and what was."""
    row, names = table.rows[0], set(table.header)
    nodes, experts = (whole(table, row, name, largest=1 << 16) for name in ("node_num", "num_experts"))
    top_k = whole(table, row, "topk" if "topk" in names else "num_topk", largest=experts)
    ranks = whole(table, row, "ep_size", largest=1 << 16) if "ep_size" in names else nodes * NODE_RANKS
    if row.cells["phase"] not in PHASES:
        raise InputError(f"{table.path}, phase", row.cells["phase"], "dispatch or combine", "--where phase=dispatch")
    if nodes < 1 or ranks < 2 or ranks % nodes or experts % ranks or top_k < 1:
        found = f"{ranks} ranks on {nodes} nodes, top {top_k} of {experts} experts"
        raise InputError(f"{table.path} {row.where}", found, "as many ranks on each node, and experts on each rank")
    routing = row.cells.get("distribution", "uniform")
    if routing not in ("uniform", "balanced"):
        raise InputError(f"{table.path}, distribution", routing, "uniform routing, from which the bytes follow")
    told = row.cells["once_per"]
    if told and asked not in (None, told):
        raise InputError("--once-per", asked, f"{table.path} was measured once per {told}", "leave it out")
    once_per = told or asked
    if once_per is None:
        found = f"comm_backend {row.cells.get('comm_backend', '')}"
        raise InputError(
            f"{table.path} {row.where}", found, "it does not tell how often a token goes", "give --once-per"
        )
    if once_per != "assignment" and nodes > MOST_NODES:
        limit = f"up to {MOST_NODES} nodes: on more, the test routes a token to {MOST_NODES} of them"
        raise InputError(f"{table.path}, node_num", nodes, limit)
    groups = nodes if once_per == "node" and nodes > 1 else ranks
    elsewhere = (ranks - ranks // nodes if nodes > 1 else ranks - 1) * groups // ranks
    reached = 1 - comb(experts - experts // groups, top_k) / comb(experts, top_k)
    share = top_k * elsewhere / groups if once_per == "assignment" else elsewhere * reached
    return ranks, nodes, share, f"{row.cells['phase']} of {_kind(table)} once per {once_per}, uniform routing"


def _kind(table: Table) -> str:
    """What was measured, by the columns that say so."""
    cells = table.rows[0].cells
    names = ("comm_backend", "kernel_source", "framework", "version", "source", "device", "system")
    return " ".join(dict.fromkeys(cells[name] for name in names if cells.get(name)))


def rising(points: list[tuple[float, float]], source: str) -> list[tuple[float, float]]:
    """Points by size such that more bytes take no less: of each point, max over starts of min over ends of medians."""
    sizes = sorted({size for size, _ in points})
    if len(sizes) < 2:
        raise InputError(source, f"{len(sizes)} sizes", "two or more, to tell latency and bandwidth")
    for each in sizes:
        _refuse_scattered([time for size, time in points if size == each], each, source)
    times = _medians(points)
    runs = [[median(times[i : k + 1]) for k in range(i, len(times))] for i in range(len(times))]
    return [(size, max(min(runs[j][i - j :]) for j in range(i + 1))) for i, size in enumerate(sizes)]


def _refuse_scattered(times: list[float], size: float, source: str) -> None:
    """Raise where times of one size differ manyfold: they are no repeats of one exchange."""
    middle = median(times)
    if median(abs(time - middle) for time in times) > MANYFOLD * middle:
        found = f"{min(times):.6g} and {max(times):.6g} us for {size:.6g} bytes"
        raise InputError(source, found, "repeats that agree within threefold", "leave rows of another kind out")


def smoothed(points: list[tuple[float, float]], level: Level) -> str:
    """What to say of measured points that are more than `MOVED` off their median, or that `rising` moved by more."""
    pairs = [(*point, was) for point, was in zip(level.points or [], _medians(points), strict=True)]
    return _apart(points, pairs) + _moved(pairs)


def _apart(points: list[tuple[float, float]], pairs: list[tuple[float, float, float]]) -> str:
    by_size = [(size, was, [us for each, us in points if each == size]) for size, _, was in pairs]
    far = [(max(us) / min(us), size, us) for size, was, us in by_size if max(us) - was > MOVED * was > 0]
    if not far:
        return ""
    _, size, us = max(far)
    return (
        f"; repeats of {counted(len(far), 'size')} are apart, as at {size:.6g} bytes: {min(us):.4g} to {max(us):.4g} us"
    )


def _moved(pairs: list[tuple[float, float, float]]) -> str:
    moved = [(max(us, was) / min(us, was), size, was, us) for size, us, was in pairs if abs(us - was) > MOVED * was]
    if not moved:
        return ""
    _, size, was, us = max(moved)
    worst = f"{size:.6g} bytes: {was:.4g} us, taken as {us:.4g}"
    return f"; {len(moved)} of {len(pairs)} times smoothed, where more bytes took less ({worst})"


def _medians(points: list[tuple[float, float]]) -> list[float]:
    """Median time of each size, sizes in order."""
    return [median(time for size, time in points if size == each) for each in sorted({size for size, _ in points})]

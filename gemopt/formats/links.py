"""Links that others measured or declared: nccl-tests text, SGLang's `rank_cost_matrix`, tables; documents; names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.documents import read_bytes, read_json
from gemopt.exceptions import InputError, refuse_unused
from gemopt.formats.link_tables import from_table, rising, smoothed
from gemopt.named_topologies import named
from gemopt.topology import LEVELS, Level, Topology, load

RANK_LINE = re.compile(r"^#\s+Rank\s+(\d+)\s+(?:Group\s+(\d+)\s+)?Pid\s+\d+\s+on\s+(\S+)\s+device", re.MULTILINE)
AGGREGATED = re.compile(r"agg iters: (?!1\b)\d+")
TEST_LINE = re.compile(r"^# Collective test starting: (\w+?)(?:_perf)?\s*$", re.MULTILINE)
ROW = re.compile(
    r"^\s*(\d+)\s+(\d+)\s+(\w+)\s+([a-z]\w*\s+)?(?:-?\d+\s+)?([\d.]+)\s+[\d.]+\s+[\d.]+(?:[^\S\n]+(\S+))?",
    re.MULTILINE,
)
BEGUN = re.compile(r"^[^\S\n]*\d+[^\S\n]+\d+[^\S\n]+[a-z]\w*.*$", re.MULTILINE)  # also a row cut short
TAG = re.compile(
    r"^(?:\[\d+,\d+\]<std(?:out|err)>: ?|[^\S\n]*\d+: )", re.MULTILINE
)  # mpirun --tag-output, srun --label
USED = ("alltoall", "sendrecv")


def read_links(
    source: str, *, like: str | None = None, inside: str | None = None, where: Sequence[str] = (),
    token_bytes: int | None = None, once_per: str | None = None,
) -> Topology:  # fmt: skip
    """A topology from a name or a file.

    Parameters
    ----------
    like
        Named topology whose speeds a `rank_cost_matrix`, which only orders the ranks, takes on.
    inside
        Topology (name or file) whose speed within a node is added to what was measured between nodes.
    where, token_bytes, once_per
        Of tables: see `link_tables.from_table`.

    Raises
    ------
    InputError
        What was given is none of these, or not enough.
    """
    of_table = {"--where": " ".join(where) or None, "--token-bytes": token_bytes, "--once-per": once_per}
    path = Path(source)
    if path.suffix != ".json" and not path.exists():
        refuse_unused({"--like": like, "--inside": inside, **of_table}, f"does not apply to {source}")
        return named(source)
    if path.suffix != ".json":
        data = read_bytes(path)
        if path.suffix in (".yaml", ".yml"):
            raise InputError(source, "YAML", "a topology or a rank_cost_matrix is a document in .json")
        refuse_unused({"--like": like}, f"does not apply to {source}")
        text = TAG.sub("", data.decode(errors="replace"))
        if data[:4] == b"PAR1" or ("," in text.partition("\n")[0] and not RANK_LINE.search(text)):
            return from_table(path, where=where, token_bytes=token_bytes, once_per=once_per, inside=inside)
        refuse_unused(of_table, f"does not apply to {source}")
        return from_nccl_tests(text, source, inside=inside)
    content = read_json(path)
    refuse_unused({"--inside": inside, **of_table}, f"does not apply to {source}")
    if isinstance(content, list) or (isinstance(content, dict) and "rank_cost_matrix" in content):
        return from_cost_matrix(content, source, like=like)
    refuse_unused({"--like": like}, f"does not apply to {source}")
    return Topology.load(path)


def from_cost_matrix(data: Any, source: str, *, like: str | None) -> Topology:
    """Nodes and racks from SGLang's costs, of which only the order counts, with the speeds of a named topology."""
    if isinstance(data, dict) and set(data) != {"rank_cost_matrix"}:
        raise InputError(source, sorted(set(data) - {"rank_cost_matrix"}), "one key, rank_cost_matrix")
    rows = data["rank_cost_matrix"] if isinstance(data, dict) else data
    try:
        cost = np.array(rows, dtype=np.float64)
    except (ValueError, TypeError):
        raise InputError(f"{source}: rank_cost_matrix", rows, "a square of numbers") from None
    field = f"{source}: rank_cost_matrix"
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or not cost.size:
        raise InputError(field, f"shape {cost.shape}", "every rank to every other")
    if not np.isfinite(cost).all() or (cost < 0).any() or np.diag(cost).any():
        raise InputError(field, "a negative or infinite cost, or one from a rank to itself", "costs >= 0, 0 to itself")
    if (cost != cost.T).any():
        g, h = np.argwhere(cost != cost.T)[0].tolist()
        raise InputError(f"{field}[{g}][{h}]", float(cost[g, h]), f"symmetric: {cost[h, g]:g} the other way")
    levels = np.unique(cost[~np.eye(len(cost), dtype=bool)])
    if len(levels) > len(LEVELS):
        raise InputError(field, f"{len(levels)} different costs", f"at most {len(LEVELS)}: node, rack, racks")
    if like is None:
        raise InputError("--like", None, "only the order of the costs counts, so speeds must be said", "2x8-ib400")
    speeds = named(like)
    groups = [_groups(cost <= value, field) for value in levels]
    node_of_rank = groups[0] if groups else np.zeros(len(cost), np.int64)
    nodes = int(node_of_rank.max()) + 1
    racks = groups[1] if len(levels) == len(LEVELS) else None
    if racks is not None:
        racks = np.array([racks[np.flatnonzero(node_of_rank == node)[0]] for node in range(nodes)])
    between = speeds.between_nodes
    if nodes > 1 and between is None:
        raise InputError("--like", like, "the costs tell several nodes, and this is one", "2x8-ib400")
    return Topology(
        name=f"{Path(source).stem} like {like}",
        node_of_rank=node_of_rank,
        rack_of_node=racks,
        within_node=speeds.within_node,
        between_nodes=between if nodes > 1 else None,
        between_racks=between if racks is not None else None,
        source=f"groups from {source}; speeds: {speeds.source}",
    )


def _groups(near: NDArray[np.bool_], field: str) -> NDArray[np.int64]:
    """[G] group of each rank, numbered by their first; whoever is near one of a group is near them all."""
    group = np.argmax(near, axis=1)
    if (near != (group[:, None] == group[None])).any():
        g, h = np.argwhere(near != (group[:, None] == group[None]))[0].tolist()
        raise InputError(f"{field}[{g}][{h}]", "no groups of ranks", "who is near one of a node is near all of it")
    return np.asarray(np.unique(group, return_inverse=True)[1], dtype=np.int64)


def from_nccl_tests(text: str, source: str, *, inside: str | None) -> Topology:
    """Measured points of `alltoall_perf` or `sendrecv_perf`: within a node, or between nodes where it ran on several.

    Out-of-place times. Of an all-to-all of S bytes per rank each peer gets S / n, so S (n - smallest node) / n go
    between nodes, or S (n - 1) / n within one; of a send each rank's port carries S.
    """
    ranks = RANK_LINE.findall(text)
    tests = set(TEST_LINE.findall(text))
    rows = ROW.findall(text)
    if not ranks or not rows:
        limit = f"the whole output of {' or '.join(test + '_perf' for test in USED)} of nccl-tests"
        hint = "or a document or matrix in .json, or a name such as nvlink-8"
        raise InputError(source, f"{len(ranks)} ranks, {len(rows)} rows", limit, hint)
    cut = next((line for line in BEGUN.findall(text) if not ROW.match(line)), None)
    if cut is not None:
        raise InputError(source, cut.strip(), "whole rows of nccl-tests", "was the output cut?")
    if "cputime" in text:
        raise InputError(source, "cputime", "times of exchanges, not of their launch", "run it without -C 1")
    together = AGGREGATED.search(text)
    if together is not None:
        raise InputError(source, together[0], "exchanges one after the other", "run it without -m")
    if len({group for _, group, _ in ranks}) > 1:
        raise InputError(source, "ranks of several groups", "one group of ranks", "run it without NCCL_TESTS_SPLIT")
    for row in rows:
        if row[5] not in {"", "0", "0e+00", "N/A"}:
            raise InputError(source, f"#wrong {row[5]} at {row[0]} bytes", "0: what was received is not what was sent")
    test = tests.pop() if len(tests) == 1 else _told_by_name(source)
    if test not in USED:
        raise InputError(source, test or "an unnamed test", f"the output of {' or '.join(t + '_perf' for t in USED)}")
    types = sorted({row[2] for row in rows})
    if len(types) > 1:
        raise InputError(source, f"types {', '.join(types)}", "exchanges of one type", "run it with one, as -d float")
    reduced = {row[3].strip() for row in rows} - {"", "none"}
    if test == "alltoall" and reduced:
        raise InputError(source, f"a test that takes the {reduced.pop()}", "an all-to-all, which takes none")
    numbers = [int(rank) for rank, *_ in ranks]
    if numbers != list(range(len(ranks))):
        raise InputError(source, numbers, "ranks 0, 1, ... once each")
    hosts = list(dict.fromkeys(host for *_, host in ranks))
    node_of_rank = np.array([hosts.index(host) for *_, host in ranks])
    sizes, total = np.bincount(node_of_rank), len(ranks)
    size, several = int(sizes.max()), len(hosts) > 1
    most = (total - int(sizes.min()) if several else total - 1) / total  # of what a rank has, through the fullest port
    share = 1.0 if test == "sendrecv" else most
    points = sorted({(float(row[0]) * share, float(row[4])) for row in rows if int(row[0]) > 0})
    level = Level(points=rising(points, source))
    within = None if several else level
    if inside is not None and not (several and size > 1):
        refuse_unused({"--inside": inside}, f"does not apply to {source}")
    if several and size > 1:
        if inside is None:
            raise InputError("--inside", None, "the test ran between nodes; say how fast one is inside", "nvlink-8")
        within = load(inside).within_node
    return Topology(
        name=Path(source).stem,
        node_of_rank=node_of_rank,
        within_node=within,
        between_nodes=level if several else None,
        source=f"{test}_perf of nccl-tests on {total} GPUs of {len(hosts)} nodes, {source}{smoothed(points, level)}",
    )


def _told_by_name(source: str) -> str:
    """The test that a file is named after, as older outputs do not say it."""
    return next((test for test in USED if test in Path(source).name.replace("_", "").lower()), "")

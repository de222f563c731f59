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
from gemopt.formats.links.nccl_tests import RANK_LINE, is_json, printed, topology_of, written
from gemopt.formats.links.tables import from_table
from gemopt.formats.tables.files import UTF16
from gemopt.topology import LEVELS, Topology
from gemopt.topology.named import named

TAG = re.compile(
    r"^(?:\[\d+,\d+\]<std(?:out|err)>: ?|[^\S\n]*\d+: |\[[^\]\n]+\] (?=.*#|[^\S\n]*\d)|\d{4}-\d\d-\d\dT\S+ )+",
    re.MULTILINE,
)  # mpirun --tag-output, srun --label, kubectl logs --prefix --timestamps
OTHERS = {
    "nvidia-smi, rocm-smi or npu-smi topo, which tells how GPUs are linked, not how fast": re.compile(
        r"NUMA Affinity|CPU Affinity|^ ?[GN]PU0\s+X\s|(Link Type|Weight|Hops) between two GPUs|^WEIGHT TABLE:",
        re.MULTILINE,
    ),
    "HCCL's test, which does not tell the ranks": re.compile(r"data_size\(Bytes\)"),
    "a log of DeepEP's tests, of one number of tokens": re.compile(
        r"Dispatch (\+ combine )?bandwidth|Best dispatch|expanded dispatch:"
    ),
    "copies between pairs, one at a time": re.compile(
        r"nvbandwidth Version|P2P \(Peer-to-Peer\)|P2P=(En|Dis)abled|memcpy [CS][EM] |RocmBandwidthTest|TransferBench v"
    ),
    "a network card's test between two hosts": re.compile(r"(RDMA_\w+|Send) (BW|Latency) Test|BW peak\[|t_min\[usec\]"),
    "OSU's benchmark, which does not tell the ranks": re.compile(r"^# OSU ", re.MULTILINE),
}


def read_links(
    source: str, *, like: str | None = None, inside: str | None = None, where: Sequence[str] = (),
    token_bytes: int | None = None, once_per: str | None = None, nodes: int | None = None,
) -> Topology:  # fmt: skip
    """A topology from a name or a file.

    Parameters
    ----------
    like
        Named topology whose speeds a `rank_cost_matrix`, which only orders the ranks, takes on.
    inside
        Topology (name or file) whose speed within a node is added to what was measured between nodes.
    where, token_bytes, once_per, nodes
        Of tables: see `link_tables.from_table`; `nodes` of nccl-tests too, 1 where NVLink joins all hosts.

    Raises
    ------
    InputError
        What was given is none of these, or not enough.
    """
    of_rows = {"--where": " ".join(where) or None, "--token-bytes": token_bytes, "--once-per": once_per}
    of_table: dict[str, object] = {**of_rows, "--nodes": nodes}
    path = Path(source)
    document = path.suffix.lower() == ".json"
    if not document and not path.exists():
        refuse_unused({"--like": like, "--inside": inside, **of_table}, f"does not apply to {source}")
        return named(source)
    if not document:
        data = read_bytes(path)
        if path.suffix in (".yaml", ".yml"):
            raise InputError(source, "YAML", "a topology or a rank_cost_matrix is a document in .json")
        text = TAG.sub("", data.decode("utf-16" if data.startswith(UTF16) else "utf-8", errors="replace"))
        for name, told in OTHERS.items():
            if told.search(text) and not RANK_LINE.search(text):
                hint = "measure: alltoall_perf of nccl-tests, gemopt profile links; or take a name such as nvlink-8"
                raise InputError(source, name, "measured exchanges of several sizes", hint)
        refuse_unused({"--like": like}, f"does not apply to {source}")
        if data[:4] == b"PAR1" or ("," in text.partition("\n")[0] and not RANK_LINE.search(text)):
            return from_table(path, where=where, token_bytes=token_bytes, once_per=once_per, inside=inside, nodes=nodes)
        refuse_unused(of_rows, f"does not apply to {source}")
        return topology_of(printed(text, source), source, inside=inside, nodes=nodes)
    content = read_json(path)
    if is_json(content):
        refuse_unused({"--like": like, **of_rows}, f"does not apply to {source}")
        return topology_of(written(content, source), source, inside=inside, nodes=nodes)
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
    if not isinstance(rows, list):
        raise InputError(f"{source}: rank_cost_matrix", rows, "a square of numbers")
    if rows and all(isinstance(row, dict) for row in rows):
        raise InputError(source, "rows of a table", "a square of numbers", "of rccl-tests give what it prints")
    cells = [cell for row in rows or [] if isinstance(row, list) for cell in row]
    if any(isinstance(cell, (bool, str)) for cell in cells):
        raise InputError(f"{source}: rank_cost_matrix", "flags or texts", "a square of numbers")
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
        limit, hint = (
            "who is near one of a node is near all of it",
            "costs are higher between nodes; bandwidths are none",
        )
        raise InputError(f"{field}[{g}][{h}]", "no groups of ranks", limit, hint)
    return np.asarray(np.unique(group, return_inverse=True)[1], dtype=np.int64)

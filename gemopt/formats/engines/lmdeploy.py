"""LMDeploy: takes loads, not a placement, and packs by itself; so it is given loads that its packing turns into ours.

`lmdeploy/pytorch/nn/eplb.py` of LMDeploy 0.18.0 (after DeepSeek's EPLB) hands out experts in falling order of load,
each to the least loaded rank with room. Loads that differ by little make it deal one expert per rank and round, in an
order we can foresee. That needs one copy per expert and two or more slots per rank; with one slot it keeps the order.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemopt.documents import write_text
from gemopt.documents.arrays import integer_array
from gemopt.exceptions import InputError, UnsupportedError
from gemopt.formats.engine import (
    Engine,
    Export,
    Facts,
    WriteOptions,
    file_facts,
    make_placement,
    model_name,
    quoted,
    require_hidden_layers,
)
from gemopt.formats.engines import lmdeploy_traces
from gemopt.formats.files import bounded_json
from gemopt.formats.findings import filled, ranges
from gemopt.placement import Placement, Split
from gemopt.traces.arrays import is_map


def check(placement: Placement, options: WriteOptions) -> None:
    """One slot per rank cannot be steered."""
    require_hidden_layers(placement, "lmdeploy")
    order = np.arange(placement.num_experts)
    if placement.num_slots == placement.num_ranks and (placement.physical_to_logical != order).any():
        raise UnsupportedError(
            "Placement.slots_per_rank", 1, "lmdeploy puts expert i on rank i when a rank has one slot", "use --to csv"
        )


def deal(row: NDArray[np.int64], num_ranks: int) -> NDArray[np.int64]:
    """[E] loads that make LMDeploy's packing put the experts [P] of a layer where they are.

    Each round deals one expert to every rank, least loaded rank first; within a round loads fall by one, so no rank
    gets a second expert before the round ends. All sums are whole numbers below 2^24, exact in its float32.
    """
    mine = row.reshape(num_ranks, -1)
    rounds = mine.shape[1]
    total = np.zeros(num_ranks, np.int64)
    loads = np.empty(len(row), np.int64)
    load = 2 * len(row)
    for turn in range(rounds):
        # Python's min takes the first of equal ranks, and so does a stable sort.
        for rank in np.argsort(total, kind="stable"):
            loads[mine[rank, turn]] = load
            total[rank] += load
            load -= 1
    return loads


def write(placement: Placement, path: Path, options: WriteOptions) -> Export:
    """Write the statistic file [num_hidden_layers][E] whose packing is the placement."""
    rows = np.ones((require_hidden_layers(placement, "lmdeploy"), placement.num_experts), np.int64)
    for layer, row in zip(placement.layer_ids, placement.physical_to_logical, strict=True):
        rows[layer] = deal(row, placement.num_ranks)
    write_text(path, "[\n" + ",\n".join(json.dumps(row) for row in rows.tolist()) + "\n]\n")
    ranks = placement.num_ranks
    command = (
        f"LMDEPLOY_EPLB_EXPERTS_STATISTIC_FILE={quoted(path)} LMDEPLOY_EPLB_NUM_REDUNDANT_EXPERTS=0 "
        f"LMDEPLOY_EPLB_NUM_GROUPS=1 LMDEPLOY_EPLB_RANKS_PER_NODE={ranks} "
        f"lmdeploy serve api_server {model_name(placement)} --ep {ranks} --dp {ranks} --enable-eplb"
    )
    notes = (
        "The loads in the file are no measurement: they are made so that LMDeploy's packing gives this placement.",
        *filled(placement.layer_ids, len(rows)),
    )
    return Export(files=(str(path),), command=command, notes=notes)


def read(path: Path, facts: Facts) -> Placement:
    """The placement that LMDeploy makes of a statistic file (no redundant experts, one group and node)."""
    rows = integer_array(bounded_json(path), name=str(path), ndim=2)
    if facts.num_ranks is None:
        raise InputError(f"{path}: ranks", None, "the file does not say how many ranks", "give --ep N")
    if facts.num_ranks < 1 or not rows.size or rows.shape[1] % facts.num_ranks:
        raise InputError("--ep", facts.num_ranks, f"a divisor of the experts in {path}, {rows.shape[-1]}")
    if rows.max() <= rows.shape[1] and is_map(rows[None]):  # above are loads, as those that `deal` makes
        raise InputError(str(path), "a map of experts, by the numbers", "loads of the experts", "try --from vllm-map")
    ids, hidden = file_facts(path, facts, rows=len(rows))
    plain = np.flatnonzero((rows == rows[:, :1]).all(axis=1))
    if facts.layer_ids is None and 0 < len(plain) < len(rows):
        facts.notes.append(f"layers {ranges(plain)} have one load for all: if they have no experts, give --layer-ids")
    table = [pack(rows[layer], facts.num_ranks) for layer in ids]
    return make_placement(path, table, facts, layer_ids=ids, num_hidden_layers=hidden)


def pack(loads: NDArray[np.int64], num_ranks: int) -> list[int]:
    """[E] the experts of each rank in turn: every expert, heaviest first, to the least loaded rank with room."""
    room = len(loads) // num_ranks
    if room == 1:
        return list(range(len(loads)))
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    total = np.zeros(num_ranks)
    for expert in np.argsort(-loads, kind="stable").tolist():
        rank = min((r for r in range(num_ranks) if len(held[r]) < room), key=total.__getitem__)
        held[rank].append(expert)
        total[rank] += float(loads[expert])
    return [expert for experts in held for expert in experts]


ENGINES = {
    "lmdeploy": Engine(
        hidden_layers=True,
        name="lmdeploy",
        versions="LMDeploy 0.18.0",
        placement="LMDEPLOY_EPLB_EXPERTS_STATISTIC_FILE .json",
        dumps=lmdeploy_traces.SUFFIXES,
        traces=("routed_experts responses", "expert_counts dumps"),
        dense_rows=True,
        splits=(Split.EVEN,),
        suffixes=(".json",),
        note="takes loads: they are made so that its packing gives the placement",
        check=check,
        write=write,
        read=read,
        read_traces=lmdeploy_traces.read_traces,
    )
}

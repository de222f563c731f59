"""A rank fails and comes back: where its experts go meanwhile, the same for every strategy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gemopt.latency import FloatArray, IntArray
from gemopt.placement import EMPTY
from gemopt.solvers.base import Row


def slots_without(slots_G: IntArray, rank: int, num_experts: int) -> IntArray:
    """[G] slots when the others make room for those of `rank`: shared out evenly, first to ranks that have fewest."""
    slots = slots_G.copy()
    left, slots[rank] = int(slots[rank]), 0
    others = [g for g in range(len(slots)) if g != rank]
    while left:
        open_ranks = [g for g in others if slots[g] < num_experts]
        if not open_ranks:
            break
        slots[min(open_ranks, key=lambda g: (int(slots[g]), g))] += 1
        left -= 1
    return slots


def evacuate(rows: Sequence[Row], slots_G: IntArray, rank: int, load_LE: FloatArray) -> tuple[list[Row], IntArray]:
    """Rows and slots after `rank` is gone: what only it held goes, heaviest first, to the rank with least load."""
    after_G = slots_without(slots_G, rank, load_LE.shape[1])
    return [_evacuated(row, slots_G, after_G, rank, load_LE[layer]) for layer, row in enumerate(rows)], after_G


def readmit(rows: Sequence[Row], slots_G: IntArray, before: Sequence[Row], before_G: IntArray, rank: int) -> list[Row]:
    """Rows with slots `before_G` again: what others hold beyond theirs goes to `rank`, first what it held before."""
    return [_readmitted(row, slots_G, old, before_G, rank) for row, old in zip(rows, before, strict=True)]


def contents(row: Row, slots_G: IntArray) -> list[list[int]]:
    """Experts of each rank."""
    parts = np.split(row, np.cumsum(slots_G)[:-1])
    return [[int(expert) for expert in part if expert != EMPTY] for part in parts]


def _row(held: list[list[int]], slots_G: IntArray) -> Row:
    return np.concatenate(
        [[*part, *[EMPTY] * (size - len(part))] for part, size in zip(held, slots_G.tolist(), strict=True)]
    ).astype(np.int64)


def _evacuated(row: Row, slots_G: IntArray, after_G: IntArray, rank: int, load_E: FloatArray) -> Row:
    held = contents(row, slots_G)
    orphans = [expert for expert in held[rank] if not any(expert in held[g] for g in range(len(held)) if g != rank)]
    held[rank] = []
    load = [sum(float(load_E[expert]) for expert in part) for part in held]
    for expert in sorted(orphans, key=lambda e: -load_E[e]):
        target = min((g for g in range(len(held)) if len(held[g]) < after_G[g]), key=lambda g: load[g])
        held[target].append(expert)
        load[target] += float(load_E[expert])
    return _row(held, after_G)


def _readmitted(row: Row, slots_G: IntArray, old: Row, before_G: IntArray, rank: int) -> Row:
    held, own = contents(row, slots_G), set(contents(old, before_G)[rank])
    excess: list[int] = []
    for g, part in enumerate(held):
        for expert in sorted(part, key=lambda e: e not in own)[: max(0, len(part) - int(before_G[g]))]:
            part.remove(expert)
            excess.append(expert)
    for expert in excess:
        order = [rank, *(g for g in range(len(held)) if g != rank)]
        target = next((g for g in order if len(held[g]) < before_G[g] and expert not in held[g]), None)
        if target is not None:  # else a copy of it is wherever there is room
            held[target].append(expert)
    return _row(held, before_G)

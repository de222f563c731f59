"""Greedy packing of experts and copies into slots, shared by LPT, EPLB and the starts of local search."""

from __future__ import annotations

import numpy as np

from gemopt.latency import FloatArray
from gemopt.placement import EMPTY
from gemopt.problem import Problem
from gemopt.solvers.base import Row


def lpt_row(problem: Problem, *, copies_E: Row | None = None, noise_E: FloatArray | None = None) -> Row:
    """[P] speed-weighted LPT: heaviest first, each to the rank that would finish it first.

    copies_E: [E] copies of each expert (default one each); noise_E: [E] factors on the weights, for varied starts.
    """
    offset_G, weight_GE = problem.linearised
    if noise_E is not None:
        weight_GE = weight_GE * noise_E
    copies = np.ones(problem.num_experts, dtype=np.int64) if copies_E is None else copies_E
    items = np.repeat(np.arange(problem.num_experts), copies)
    return pack(items, weight_GE[:, items] / copies[items], offset_G, problem.slots_per_rank)


def replicate(weight_E: FloatArray, spare: int, num_ranks: int) -> Row:
    """[E] copies: each spare slot to the expert with the most load per copy, at most one copy per rank (EPLB)."""
    copies = np.ones(len(weight_E), dtype=np.int64)
    for _ in range(spare):
        open_experts = copies < num_ranks
        if not open_experts.any():
            break
        copies[np.where(open_experts, weight_E / copies, -1.0).argmax()] += 1
    return copies


def copies_worth_trying(problem: Problem) -> Row:
    """Experts that may deserve another copy, hottest first."""
    hottest = np.argsort(-problem.linearised[1].mean(axis=0), kind="stable")
    return hottest[: 16 + 2 * problem.spare_slots]


def pack(items: Row, weight_GI: FloatArray, offset_G: FloatArray, slots_G: Row) -> Row:
    """[P] items (experts, repeated for copies), heaviest first, each to the allowed rank that finishes it first."""
    finish = np.array(offset_G, dtype=np.float64)
    held: list[list[int]] = [[] for _ in slots_G]
    for index in np.argsort(-weight_GI.mean(axis=0), kind="stable"):
        expert = int(items[index])
        ready = finish + weight_GI[:, index]
        order = np.argsort(ready, kind="stable")
        rank = next((int(g) for g in order if len(held[g]) < slots_G[g] and expert not in held[g]), None)
        if rank is None:
            rank = _make_room(expert, held, slots_G)
        held[rank].append(expert)
        finish[rank] += weight_GI[rank, index]
    row = np.full(int(slots_G.sum()), EMPTY)
    starts = np.cumsum(slots_G) - slots_G
    for start, experts in zip(starts, held, strict=True):
        row[start : start + len(experts)] = experts
    return row


def _make_room(expert: int, held: list[list[int]], slots_G: Row) -> int:
    """A rank without `expert` that has a free slot after one of its experts moved to the rank with room."""
    roomy = next(g for g in range(len(held)) if len(held[g]) < slots_G[g])
    for g, experts in enumerate(held):
        if expert in experts or not slots_G[g]:
            continue
        for position, other in enumerate(experts):
            if other not in held[roomy]:
                held[roomy].append(experts.pop(position))
                return g
    raise AssertionError("copies never exceed the ranks with slots, so some rank lacks the expert")

"""What copies would gain under the optimal split: cuts that bind, and loads that a copy lets through them.

Where a step takes longer than all ranks together would, some ranks cannot give their load away: a cut (`splits.flow`).
A copy of one of its experts on a rank outside lets load through, a swap of experts across it changes what is inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gemopt.kernels import Array, rank_loads
from gemopt.latency import Curves, FloatArray, pack
from gemopt.migration import held
from gemopt.placement import EMPTY
from gemopt.problem import Problem
from gemopt.solvers.base import Row
from gemopt.splits import even_shares
from gemopt.splits.flow import Copies, capacity, find_copies, fluid_times, held_within, make_room, spread

NARROW = 1e-9  # of a time: a cut that costs less does not bind


@njit(cache=True, nogil=True)
def look_through(
    curves: Curves, counts_TE: Array, weights_T: Array, alone_TG: Array, home_E: Array, copies: Copies,
    parts_TC: Array, fluid_T: Array, gain_EG: Array, tilt_EG: Array, used_C: Array,
) -> float:  # fmt: skip
    """Weighted time of the best splits, to which `parts_TC` is brought; fills the arrays of `Look` by every step's cut.

    home_E: rank of an expert with one copy, else -1 less its number among those with several.
    """
    num_ranks, experts = gain_EG.shape[1], len(home_E)
    room, slack_G, total = make_room(num_ranks), np.empty(num_ranks, np.int64), 0.0
    for t in range(len(counts_TE)):
        time = spread(curves, alone_TG[t], copies, parts_TC[t], room, fluid_T[t])
        total += time * weights_T[t]
        inside, size = 0, 0
        for g in range(num_ranks):
            if room.cut[g]:
                inside += room.load[g]
                room.queue[size] = g
                size += 1
        if size == num_ranks or time <= fluid_T[t] * (1.0 + NARROW):
            continue
        excess = inside - held_within(curves, room.queue[:size], fluid_T[t], inside)
        if excess <= 0:
            continue
        slope, half = (time - fluid_T[t]) / excess * weights_T[t], 0.5 * (time + fluid_T[t])
        for g in range(num_ranks):
            slack_G[g] = 0 if room.cut[g] else max(0, capacity(curves, g, half, inside) - room.load[g])
        for c in range(len(used_C)):
            if not room.cut[copies.rank[c]]:
                used_C[c] += slope * parts_TC[t, c]
        for e in range(experts):
            r, load = home_E[e], 0
            if r >= 0:
                load = counts_TE[t, e] if room.cut[r] else 0
            else:
                for c in range(copies.first[-1 - r], copies.first[-r]):
                    load += parts_TC[t, c] if room.cut[copies.rank[c]] else 0
            for g in range(num_ranks):
                if room.cut[g]:
                    tilt_EG[e, g] += slope * counts_TE[t, e]
                elif slack_G[g] > 0:
                    gain_EG[e, g] += slope * min(load, excess, slack_G[g])
    return total


@dataclass(frozen=True, eq=False)
class Look:
    """A row under the optimal split.

    value_us: weighted time. shares_TP: the split. copies: where; used_C: [C] what each lets through where a cut binds.
    gain_EG: [E, G] what one more copy of an expert on a rank promises; tilt_EG: [E, G] what an expert costs where it is
    inside of the cuts. Both in microseconds.
    """

    row: Row
    value_us: float
    shares_TP: NDArray[np.int64]
    copies: Copies
    used_C: FloatArray
    gain_EG: FloatArray
    tilt_EG: FloatArray


class Looks:
    """Looks at rows of one problem, each from the split of one before."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.curves = pack([latency.high for latency in problem.latencies])
        self.fluid_T = fluid_times(self.curves, problem.counts_TE.sum(axis=1, dtype=np.int64))
        self.fluid_us = float((self.fluid_T * problem.weights_T).sum())

    def at(self, row: Row, near: Look | None = None) -> Look:
        """Look at a row; `near` has almost the same copies."""
        problem = self.problem
        copies = find_copies(row, problem.rank_of_slot, problem.num_experts, problem.num_ranks)
        shares_TP = self._shares(row, near)
        alone_P = row.copy()
        alone_P[copies.slot] = EMPTY
        alone_TG = rank_loads(problem.features_FTE, alone_P, problem.rank_of_slot, problem.num_ranks)[:, :, 0]
        home_E, held = np.full(problem.num_experts, -1), alone_P != EMPTY
        home_E[alone_P[held]] = problem.rank_of_slot[held]
        home_E[copies.experts] = -1 - np.arange(len(copies.experts))
        parts_TC = np.ascontiguousarray(shares_TP[:, copies.slot])
        shape = (problem.num_experts, problem.num_ranks)
        gain_EG, tilt_EG, used_C = np.zeros(shape), np.zeros(shape), np.zeros(len(copies.slot))
        value = look_through(
            self.curves, problem.counts_TE, problem.weights_T, np.ascontiguousarray(alone_TG).astype(np.int64), home_E,
            copies, parts_TC, self.fluid_T, gain_EG, tilt_EG, used_C,
        )  # fmt: skip
        shares_TP[:, copies.slot] = parts_TC
        return Look(row.copy(), value, shares_TP, copies, used_C, gain_EG, tilt_EG)

    def _shares(self, row: Row, near: Look | None) -> NDArray[np.int64]:
        """Even shares, but those of before for experts that are where they were."""
        shares_TP = even_shares(self.problem.counts_TE, row)
        if near is not None:
            changed = np.flatnonzero(row != near.row)
            touched = np.union1d(row[changed], near.row[changed])
            same = np.isin(near.copies.slot, np.flatnonzero(~np.isin(row, touched)))
            slots = near.copies.slot[same]
            shares_TP[:, slots] = near.shares_TP[:, slots]
        return shares_TP

    def barred(self, row: Row) -> NDArray[np.bool_]:
        """[E, G] whether a rank may not get an expert: it holds one, or rules forbid it."""
        problem = self.problem
        if problem.rules is not None:
            return problem.rules.barred_EG(row, problem.slots_per_rank)
        return held(row, problem.slots_per_rank, problem.num_experts).T

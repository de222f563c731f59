"""What copies would gain under the optimal split: cuts that bind, and loads that a copy lets through them.

Where a step takes longer than all ranks together would, some ranks cannot give their load away: a cut (`splits.flow`).
A copy of one of its experts on a rank outside lets load through, a swap of experts across it changes what is inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.compiling import njit
from gemopt.kernels import ZERO, Array, put, rank_loads
from gemopt.latency import Curves, FloatArray, pack
from gemopt.migration import held
from gemopt.placement import EMPTY
from gemopt.problem import Problem
from gemopt.solvers.base import Row
from gemopt.splits import even_shares
from gemopt.splits.flow import Copies, find_copies, fluid_times, make_room, spread
from gemopt.splits.levels import Levels, capacity, held_within, no_levels, table_levels

NARROW = 1e-9  # of a time: a cut that costs less does not bind
LONGEST = 3.0  # times the longest fluid time: longer times are not tabled


@njit(nogil=True)
def spread_through(
    levels: Levels, alone_TG: Array, copies: Copies, parts_TC: Array, fluid_T: Array, times_T: Array, cut_TG: Array,
    load_TG: Array,
) -> None:  # fmt: skip
    """Bring `parts_TC` to the best splits of all steps; fills in their times, cuts and loads."""
    room = make_room(alone_TG.shape[1])
    for t in range(len(times_T)):
        times_T[t] = spread(levels, alone_TG[t], copies, parts_TC[t], room, fluid_T[t])
        put(cut_TG[t], room.cut)
        put(load_TG[t], room.load)


@njit(nogil=True)
def promise_through(
    curves: Curves, counts_TE: Array, home_E: Array, copies: Copies, parts_TC: Array, fluid_T: Array, times_T: Array,
    cut_TG: Array, load_TG: Array, slope_T: Array, gain_EG: Array,
) -> None:  # fmt: skip
    """Fill `gain_EG` of `Promise`. slope_T: weights, which become microseconds per load inside the cut.

    home_E: rank of an expert with one copy, else -1 less its number among those with several.
    """
    num_ranks = gain_EG.shape[1]
    members, outside, slack_G = (
        np.empty(num_ranks, np.int64),
        np.empty(num_ranks, np.int64),
        np.empty(num_ranks, np.int64),
    )
    for t in range(len(counts_TE)):
        inside, size, cut_G, weight = ZERO, ZERO, cut_TG[t], slope_T[t]
        for g in range(num_ranks):
            if cut_G[g]:
                inside += load_TG[t, g]
                members[size] = g
                size += 1
        slope_T[t] = 0.0
        if size == num_ranks or times_T[t] <= fluid_T[t] * (1.0 + NARROW):
            continue
        excess = inside - held_within(curves, members[:size], fluid_T[t], inside)
        if excess <= 0:
            continue
        slope, half, wide = (times_T[t] - fluid_T[t]) / excess * weight, 0.5 * (times_T[t] + fluid_T[t]), 0
        slope_T[t] = slope
        for g in range(num_ranks):
            slack = 0 if cut_G[g] else min(excess, capacity(curves, g, half, inside) - load_TG[t, g])
            if slack > 0:
                outside[wide], slack_G[wide] = g, slack
                wide += 1
        for e in range(len(home_E)):
            r, load = home_E[e], 0
            if r >= 0:
                load = counts_TE[t, e] if cut_G[r] else 0
            else:
                for c in range(copies.first[-1 - r], copies.first[-r]):
                    load += parts_TC[t, c] if cut_G[copies.rank[c]] else 0
            if load > 0:
                for k in range(wide):
                    gain_EG[e, outside[k]] += slope * min(load, slack_G[k])


class Promise(NamedTuple):
    """What changes of a row promise, in microseconds.

    gain_EG: [E, G] of one more copy of an expert on a rank. slope_T: [T] of a load less inside the cut.
    """

    gain_EG: FloatArray
    slope_T: FloatArray


@dataclass(frozen=True, eq=False)
class Look:
    """A row under the optimal split.

    value_us: weighted time; times_T: of each step. shares_TP: the split.
    copies: where. cut_TG, load_TG: the ranks that prove each step's time, and what ranks have then.
    """

    looks: Looks
    row: Row
    value_us: float
    times_T: FloatArray
    shares_TP: NDArray[np.int64]
    copies: Copies
    cut_TG: NDArray[np.bool_]
    load_TG: NDArray[np.int64]

    @cached_property
    def promise(self) -> Promise:
        """What changes promise, by every step's cut; most looks are not asked."""
        problem, copies = self.looks.problem, self.copies
        alone_P = self.row.copy()
        alone_P[copies.slot] = EMPTY
        home_E, alone = np.full(problem.num_experts, -1), alone_P != EMPTY
        home_E[alone_P[alone]] = problem.rank_of_slot[alone]
        home_E[copies.experts] = -1 - np.arange(len(copies.experts))
        gain_EG = np.zeros((problem.num_experts, problem.num_ranks))
        slope_T = problem.weights_T.copy()
        promise_through(
            self.looks.curves, problem.counts_TE, home_E, copies, np.ascontiguousarray(self.shares_TP[:, copies.slot]),
            self.looks.fluid_T, self.times_T, self.cut_TG, self.load_TG, slope_T, gain_EG,
        )  # fmt: skip
        return Promise(gain_EG, slope_T)

    @cached_property
    def tilt_EG(self) -> FloatArray:
        """[E, G] microseconds that an expert costs where it is inside of the cuts."""
        tilt_GE = (self.cut_TG * self.promise.slope_T[:, None]).T @ self.looks.float_counts_TE
        return np.asarray(tilt_GE.T)


class Looks:
    """Looks at rows of one problem, each from the split of one before."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.curves = pack([latency.high for latency in problem.latencies])
        self.fluid_T = fluid_times(no_levels(self.curves), problem.counts_TE.sum(axis=1, dtype=np.int64))
        self.levels = table_levels(self.curves, 0.999 * float(self.fluid_T.min()), LONGEST * float(self.fluid_T.max()))
        self.fluid_us = float((self.fluid_T * problem.weights_T).sum())
        self.float_counts_TE = problem.counts_TE.astype(np.float64)

    def at(self, row: Row, near: Look | None = None) -> Look:
        """Look at a row; `near` has almost the same copies."""
        problem = self.problem
        copies = find_copies(row, problem.rank_of_slot, problem.num_experts, problem.num_ranks)
        shares_TP = even_shares(problem.counts_TE, row) if near is None else self._shares(row, near)
        alone_P = row.copy()
        alone_P[copies.slot] = EMPTY
        alone_TG = rank_loads(problem.features_FTE, alone_P, problem.rank_of_slot, problem.num_ranks)[:, :, 0]
        parts_TC = np.ascontiguousarray(shares_TP[:, copies.slot])
        cut_TG, load_TG = np.ones(alone_TG.shape, np.bool_), np.zeros(alone_TG.shape, np.int64)
        times_T = self.fluid_T.copy()
        spread_through(
            self.levels, np.ascontiguousarray(alone_TG).astype(np.int64), copies, parts_TC, self.fluid_T,
            times_T, cut_TG, load_TG,
        )  # fmt: skip
        shares_TP[:, copies.slot] = parts_TC
        value_us = float(times_T @ problem.weights_T)
        return Look(self, row.copy(), value_us, times_T, shares_TP, copies, cut_TG, load_TG)

    def _shares(self, row: Row, near: Look) -> NDArray[np.int64]:
        """The shares of before, but even ones for experts that are not where they were."""
        shares_TP, changed = near.shares_TP.copy(), row != near.row
        shares_TP[:, changed] = 0
        for expert in np.union1d(row[changed], near.row[changed]).tolist():
            slots = np.flatnonzero(row == expert)
            if expert != EMPTY and len(slots):
                counts_T = self.problem.counts_TE[:, expert, None].astype(np.int64)
                shares_TP[:, slots] = (counts_T + len(slots) - 1 - np.arange(len(slots))) // len(slots)
        return shares_TP

    def barred(self, row: Row) -> NDArray[np.bool_]:
        """[E, G] whether a rank may not get an expert: it holds one, or rules forbid it."""
        problem = self.problem
        if problem.rules is not None:
            return problem.rules.barred_EG(row, problem.slots_per_rank)
        return held(row, problem.slots_per_rank, problem.num_experts).T

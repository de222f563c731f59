"""The least time of a tiny layer under static weights, over all placements, for tiny_search.py: a search of its own.

Shares are whole assignments, so the time is constant between the weights where one of them changes. One boundary
between two copies is tried exactly, at every such place. With two boundaries the first one stands on a grid, finer
around the best places, all of it where there are few, the second is tried exactly at each, and in the end both in turn.
Placements are left out where no split of each step by itself is below what was found.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gemopt.evaluate import loads, objective
from gemopt.kernels import latency_value
from gemopt.latency import Curves
from gemopt.placement import EMPTY, Split
from gemopt.problem import Problem
from gemopt.splits import plain
from gemopt.splits.flow import Copies, find_copies
from gemopt.splits.optimal import feature_table
from gemopt.splits.rules import even_weights

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
GRID, BEST, ENOUGH = 200, 3, 1e-9


@njit(cache=True, nogil=True)
def breaks(counts_T: IntArray) -> tuple[FloatArray, IntArray]:
    """Cumulative weights where a share of a step goes up by one, rising, and the steps."""
    at, step, n = np.empty(counts_T.sum()), np.empty(counts_T.sum(), np.int64), 0
    for t in range(len(counts_T)):
        for k in range(counts_T[t]):
            at[n], step[n] = (k + 0.5) / counts_T[t], t
            n += 1
    order = np.argsort(at)
    return at[order], step[order]


@njit(cache=True, nogil=True)
def exact_line(
    curves: Curves, load_TGF: FloatArray, g: int, h: int, both_T: IntArray, table_FN: FloatArray, weights_T: FloatArray,
    at: FloatArray, step: IntArray, low: float, high: float,
) -> tuple[float, float]:  # fmt: skip
    """Least time and where, between `low` and `high`: of `both_T` rank g takes what is before, rank h the rest.

    load_TGF: without both. at, step: as of `breaks`.
    """
    steps, ranks, features = load_TGF.shape
    mine_T, time_T, beside_T = np.zeros(steps, np.int64), np.empty(steps), np.zeros(steps)
    room, total = np.empty(features), 0.0
    for t in range(steps):
        for r in range(ranks):
            if r not in (g, h):
                beside_T[t] = max(beside_T[t], latency_value(r, load_TGF[t, r], curves))
        time_T[t] = two(curves, load_TGF[t], g, h, 0, both_T[t], table_FN, room, beside_T[t])
        total += time_T[t] * weights_T[t]
    n, best, place, begin = np.searchsorted(at, low, side="right"), np.inf, low, low
    while True:
        end = min(high, at[n]) if n < len(at) else high
        if total < best:
            best, place = total, 0.5 * (begin + end)
        if n == len(at) or at[n] >= high:
            return best, place
        while n < len(at) and at[n] == end:
            t = step[n]
            mine_T[t] += 1
            time = two(curves, load_TGF[t], g, h, mine_T[t], both_T[t] - mine_T[t], table_FN, room, beside_T[t])
            total += (time - time_T[t]) * weights_T[t]
            time_T[t] = time
            n += 1
        begin = end


@njit(cache=True, nogil=True)
def two(
    curves: Curves, load_GF: FloatArray, g: int, h: int, mine: int, rest: int, table_FN: FloatArray, room: FloatArray,
    beside: float,
) -> float:  # fmt: skip
    """The slowest rank of a step."""
    for f in range(len(room)):
        room[f] = load_GF[g, f] + table_FN[f, mine]
    worst = max(beside, latency_value(g, room, curves))
    for f in range(len(room)):
        room[f] = load_GF[h, f] + table_FN[f, rest]
    return max(worst, latency_value(h, room, curves))


@njit(cache=True, nogil=True)
def step_by_step(
    curves: Curves, load_TGF: FloatArray, counts_TR: IntArray, first_R: IntArray, rank_C: IntArray,
    table_FN: FloatArray, weights_T: FloatArray,
) -> float:  # fmt: skip
    """Time where every step has the best split of its own: all are tried, of at most two boundaries."""
    total, features = 0.0, load_TGF.shape[2]
    for t in range(len(load_TGF)):
        best, cut = np.inf, first_R[1]
        one = counts_TR[t, 0]
        two_ = counts_TR[t, 1] if counts_TR.shape[1] > 1 else one if len(rank_C) == 3 else 0
        for a in range(one + 1):
            for b in range(a if len(rank_C) == 3 else 0, two_ + 1):
                load_GF = load_TGF[t].copy()
                for c in range(len(rank_C)):
                    if len(rank_C) == 3:
                        part = a if c == 0 else b - a if c == 1 else one - b
                    else:
                        part = (a if c == 0 else one - a) if c < cut else (b if c == cut else two_ - b)
                    for f in range(features):
                        load_GF[rank_C[c], f] += table_FN[f, part]
                worst = 0.0
                for g in range(len(load_GF)):
                    worst = max(worst, latency_value(g, load_GF[g], curves))
                    if worst >= best:
                        break
                best = min(best, worst)
        total += best * weights_T[t]
    return total


class Row:
    """One placement with copies, of at most two boundaries."""

    def __init__(self, problem: Problem, row_P: IntArray, table_FN: FloatArray) -> None:
        self.problem, self.row_P, self.table_FN = problem, row_P, table_FN
        self.copies: Copies = find_copies(row_P, problem.rank_of_slot, problem.num_experts, problem.num_ranks)
        alone_P = row_P.copy()
        alone_P[self.copies.slot] = EMPTY
        self.load_TGF = loads(problem, alone_P, even_weights(alone_P, problem.num_experts))
        self.counts_TR = np.ascontiguousarray(problem.counts_TE[:, self.copies.experts], np.int64)

    def floor(self) -> float:
        """Microseconds that no static weights of it are below."""
        problem, copies = self.problem, self.copies
        if plain(problem):
            return objective(replace(problem, split=Split.OPTIMAL), self.row_P)
        parts = (self.load_TGF, self.counts_TR, copies.first, copies.rank, self.table_FN, problem.weights_T)
        return float(step_by_step(problem.curves, *parts))

    def best(self) -> float:
        """Least microseconds that were found, with weights as they would be stored."""
        owners, ends = self.copies.owner, np.zeros(len(self.copies.slot))
        ends[self.copies.first[1:] - 1] = 1.0
        inner = [c for c in range(len(owners) - 1) if owners[c] == owners[c + 1]]
        lines = {c: breaks(np.ascontiguousarray(self.counts_TR[:, owners[c]])) for c in inner}
        if len(inner) == 1:
            _, ends[inner[0]] = self.line(ends, inner[0], *lines[inner[0]])
            return self.value(ends)
        first, second = inner
        at = np.unique(np.concatenate([[0.0, 1.0], lines[first][0]]))
        places = np.append(0.5 * (at[1:] + at[:-1]), [0.0, 1.0])
        places.sort()
        tried: dict[int, tuple[float, float]] = {}

        def attempt(which: Iterable[int]) -> None:
            for n in which:
                if n not in tried:
                    ends[first] = places[n]
                    tried[n] = self.line(ends, second, *lines[second])

        grid = np.unique(np.linspace(0, len(places) - 1, GRID).astype(int)).tolist()
        attempt(grid)
        for n in sorted(tried, key=lambda n: tried[n][0])[:BEST]:
            near = range(max(0, n - len(places) // GRID), min(len(places), n + len(places) // GRID + 1))
            attempt(near[:: max(1, len(near) // GRID)])
        n = min(tried, key=lambda n: tried[n][0])
        (value, ends[second]), ends[first], before = tried[n], places[n], np.inf
        while value < before * (1 - ENOUGH):
            before = value
            for c in (first, second):
                kept = ends[c]
                found, ends[c] = self.line(ends, c, *lines[c])
                value, ends[c] = (found, ends[c]) if found < value else (value, kept)
        return self.value(ends)

    def line(self, ends: FloatArray, c: int, at: FloatArray, step: IntArray) -> tuple[float, float]:
        """Least time with another end of one copy, and where; at, step: as of `breaks` of its expert."""
        copies, problem, load_TGF = self.copies, self.problem, self.load_TGF.copy()
        starts = np.where(np.isin(np.arange(len(ends)), copies.first), 0.0, np.append(0.0, ends[:-1]))
        for d in range(len(ends)):
            if d not in (c, c + 1):
                load_TGF[:, copies.rank[d]] += self.table_FN[:, self.between(d, starts[d], ends[d])].T
        low, high = float(starts[c]), float(ends[c + 1])
        both_T = self.between(c, low, high)
        ranks, parts = (int(copies.rank[c]), int(copies.rank[c + 1])), (self.table_FN, problem.weights_T, at, step)
        found, place = exact_line(problem.curves, load_TGF, *ranks, both_T, *parts, low, high)
        return float(found), float(place)

    def between(self, c: int, begin: float, end: float) -> IntArray:
        """[T] assignments between two cumulative weights of the expert of a copy."""
        counts_T = self.counts_TR[:, self.copies.owner[c]]
        return np.asarray(np.floor(counts_T * end + 0.5) - np.floor(counts_T * begin + 0.5), np.int64)

    def value(self, ends: FloatArray) -> float:
        """Microseconds as `gemopt.evaluate` has them."""
        starts = np.append(0.0, ends[:-1])
        starts[self.copies.first[:-1]] = 0.0
        weights_P = even_weights(self.row_P, self.problem.num_experts)
        weights_P[self.copies.slot] = ends - starts
        return objective(self.problem, self.row_P, weights_P)


def least_static(problem: Problem, rows: list[IntArray]) -> float:
    """Least microseconds over these placements, each with its best weights."""
    table_FN = feature_table(problem.features, int(problem.counts_TE.max()))
    best, copied = np.inf, []
    for row_P in rows:
        if (np.bincount(row_P[row_P != EMPTY]) > 1).any():
            copied.append(Row(problem, row_P, table_FN))
        else:
            best = min(best, objective(problem, row_P))
    floors = [each.floor() for each in copied]
    for n in np.argsort(floors, kind="stable"):
        if floors[n] >= best * (1 - ENOUGH):
            break
        best = min(best, copied[n].best())
    return float(best)

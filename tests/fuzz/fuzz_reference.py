"""An evaluator and a brute force that share no arithmetic with gemopt: only the meaning of its documents.

Copies split evenly: copy i of r, in slot order, has `(n + r - 1 - i) // r` assignments. A rank takes the largest of its
terms, each a sum of piecewise-linear curves of the feature sums of what it holds; a step takes as long as its slowest
rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gemopt.problem import Problem


@dataclass(frozen=True)
class Optimum:
    """Least objective, [T] least makespan of each step on its own, and how many placements there are."""

    objective_us: float
    makespan_T: NDArray[np.float64]
    placements: int


def optimum(problem: Problem) -> Optimum:
    """Try every placement, with copies and empty slots."""
    most = min(problem.num_ranks, problem.spare_slots + 1)
    sets = [s for r in range(1, most + 1) for s in combinations(range(problem.num_ranks), r)]
    ranks_SR = np.array([[*s, *[-1] * (most - len(s))] for s in sets])
    size_S = np.array([len(s) for s in sets])
    loads_ESRFT = _loads(problem, size_S, most)
    best, makespan_T, placements = _search(loads_ESRFT, ranks_SR, size_S, problem.slots_per_rank, *_flat(problem))
    return Optimum(float(best), makespan_T, int(placements))


def objective(problem: Problem, row_P: NDArray[np.int64]) -> float:
    """Weighted time of a row in microseconds, loop by loop."""
    loads_GFT = np.zeros((problem.num_ranks, len(problem.features), problem.num_steps), np.int64)
    owner = [g for g, slots in enumerate(problem.slots_per_rank) for _ in range(slots)]
    for e in range(problem.num_experts):
        holders = [owner[p] for p in range(len(row_P)) if row_P[p] == e]
        for i, g in enumerate(holders):
            for t in range(problem.num_steps):
                share = (int(problem.counts_TE[t, e]) + len(holders) - 1 - i) // len(holders)
                for f, feature in enumerate(problem.features):
                    loads_GFT[g, f, t] += _feature(feature.name, share)
    makespan_T = np.zeros(problem.num_steps)
    return float(_score(loads_GFT, makespan_T, *_flat(problem)))


def feasible(problem: Problem, row_P: NDArray[np.int64]) -> bool:
    """Every expert somewhere, none twice on a rank."""
    owner = [g for g, slots in enumerate(problem.slots_per_rank) for _ in range(slots)]
    if len(row_P) != len(owner) or {int(e) for e in row_P if e != -1} != set(range(problem.num_experts)):
        return False
    pairs = [(g, int(e)) for g, e in zip(owner, row_P, strict=True) if e != -1]
    return len(pairs) == len(set(pairs))


def _feature(name: str, share: int) -> int:
    if name == "assignments":
        return share
    if name == "active":
        return int(share > 0)
    tile = int(name.removeprefix("tiles@"))
    return share // tile + (share % tile > 0)


def _loads(problem: Problem, size_S: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    shape = (problem.num_experts, len(size_S), most, len(problem.features), problem.num_steps)
    loads = np.zeros(shape, np.int64)
    for e in range(problem.num_experts):
        for s, r in enumerate(size_S.tolist()):
            for i in range(r):
                for t in range(problem.num_steps):
                    share = (int(problem.counts_TE[t, e]) + r - 1 - i) // r
                    for f, feature in enumerate(problem.features):
                        loads[e, s, i, f, t] = _feature(feature.name, share)
    return loads


def _flat(problem: Problem) -> tuple[NDArray[np.float64], ...]:
    """Weights; points [G, K, F, C] of the curves, the last one repeated; slopes beyond; number of terms."""
    terms = max(len(latency.terms) for latency in problem.latencies)
    points = max(len(curve.x) for latency in problem.latencies for term in latency.terms for curve in term)
    shape = (problem.num_ranks, terms, len(problem.features))
    x, y, slope = np.zeros((*shape, points)), np.zeros((*shape, points)), np.zeros(shape)
    for g, latency in enumerate(problem.latencies):
        for k, term in enumerate(latency.terms):
            for f, curve in enumerate(term):
                x[g, k, f], y[g, k, f], slope[g, k, f] = curve.x[-1], curve.y[-1], curve.slope
                x[g, k, f, : len(curve.x)], y[g, k, f, : len(curve.y)] = curve.x, curve.y
    return problem.weights_T, x, y, slope, np.array([len(latency.terms) for latency in problem.latencies])


@njit(cache=True)
def _score(loads_GFT, makespan_T, weights_T, x, y, slope, terms_G):  # type: ignore[no-untyped-def]
    total = 0.0
    for t in range(len(makespan_T)):
        worst = -np.inf
        for g in range(len(terms_G)):
            for k in range(terms_G[g]):
                value = 0.0
                for f in range(slope.shape[2]):
                    load, xs, ys = loads_GFT[g, f, t], x[g, k, f], y[g, k, f]
                    if load >= xs[-1]:
                        value += ys[-1] + slope[g, k, f] * (load - xs[-1])
                        continue
                    i = 0
                    while xs[i + 1] <= load:
                        i += 1
                    part = (load - xs[i]) / (xs[i + 1] - xs[i])
                    value += ys[i] * (1 - part) + ys[i + 1] * part
                worst = max(worst, value)
        makespan_T[t] = worst
        total += weights_T[t] * worst
    return total


@njit(inline="always")
def _add(loads_FT, more_FT, sign):  # type: ignore[no-untyped-def]
    """`+=` of arrays would have numba compile what is said of shapes that do not fit."""
    for f in range(loads_FT.shape[0]):
        for t in range(loads_FT.shape[1]):
            loads_FT[f, t] += sign * more_FT[f, t]


@njit(cache=True)
def _search(loads_ESRFT, ranks_SR, size_S, slots_G, weights_T, x, y, slope, terms_G):  # type: ignore[no-untyped-def]
    """Odometer over the set of ranks of each expert."""
    experts, steps = loads_ESRFT.shape[0], loads_ESRFT.shape[4]
    loads_GFT = np.zeros((len(slots_G), loads_ESRFT.shape[3], steps), np.int64)
    free_G, choice_E = slots_G.copy(), np.full(experts, -1, np.int64)
    best, least_T, now_T, placements, e = np.inf, np.full(steps, np.inf), np.zeros(steps), 0, 0
    while e >= 0:
        s = choice_E[e]
        if s >= 0:  # taken back
            for i in range(size_S[s]):
                _add(loads_GFT[ranks_SR[s, i]], loads_ESRFT[e, s, i], -1)
                free_G[ranks_SR[s, i]] += 1
        s += 1
        while s < len(size_S):
            fits = True
            for i in range(size_S[s]):
                fits = fits and free_G[ranks_SR[s, i]] > 0
            if fits:
                break
            s += 1
        if s == len(size_S):
            choice_E[e] = -1
            e -= 1
            continue
        choice_E[e] = s
        for i in range(size_S[s]):
            _add(loads_GFT[ranks_SR[s, i]], loads_ESRFT[e, s, i], 1)
            free_G[ranks_SR[s, i]] -= 1
        if e + 1 < experts:
            e += 1
            continue
        placements += 1
        best = min(best, _score(loads_GFT, now_T, weights_T, x, y, slope, terms_G))
        for t in range(steps):
            least_T[t] = min(least_T[t], now_T[t])
    return best, least_T, placements

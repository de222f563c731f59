"""Compiled kernels shared by evaluate, bounds and search.

Loads that enter float32 arithmetic are whole numbers below 2**24 and so exact; sums over steps are float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.compiling import njit
from gemopt.latency import Curves

F64 = NDArray[np.float64]
Array = NDArray[Any]
# What kernels hand to kernels: of a literal, 0 or True, numba would compile the other one once more.
CONSTANTS: Any = (np.int64(-1), np.int64(0), np.int64(1), np.bool_(False), np.bool_(True))
MINUS, ZERO, PLUS, NO, YES = CONSTANTS
SLACK = 1e-10  # capacities are overstated by this much, relatively, so that float error never understates one


@njit(nogil=True, inline="always")
def put(target: Array, source: Array) -> None:
    """`target[:] = source` of as many; with that, numba compiles 10 s of text about shapes that do not fit."""
    for n in range(len(target)):
        target[n] = source[n]


@njit(nogil=True, inline="always")
def curve_value(curves: Curves, g: int, k: int, f: int, load: float) -> float:
    """Value at a load >= 0 of the curve of feature f in term k of rank g."""
    x, y, start = curves.x, curves.y, curves.start[g, k, f]
    last = start + curves.length[g, k, f] - 1
    if load >= x[last]:
        return float(y[last] + curves.slope[g, k, f] * (load - x[last]))
    low, width = start, last - start
    while width > 1:  # without a branch: loads are as good as random to a processor that guesses
        half = width >> 1
        low += half * (x[low + half] <= load)
        width -= half
    return float(y[low] + (y[low + 1] - y[low]) / (x[low + 1] - x[low]) * (load - x[low]))


@njit(nogil=True, inline="always")
def _last_within(y: Array, low: int, high: int, time: float) -> int:
    """The last of the rising corners low + 1 to high - 1 that takes at most `time`, else `low`."""
    while high - low > 1:
        middle = (low + high) // 2
        if y[middle] <= time:
            low = middle
        else:
            high = middle
    return low


@njit(nogil=True, inline="always")
def curve_capacity(curves: Curves, g: int, k: int, f: int, time: float) -> float:
    """Largest load that a non-decreasing curve allows within `time`; -1 when even 0 takes longer."""
    x, y, start, slope = curves.x, curves.y, curves.start[g, k, f], curves.slope[g, k, f]
    last = start + curves.length[g, k, f] - 1
    if y[start] > time:
        return -1.0
    if y[last] <= time:
        return float(x[last] + (time - y[last]) / slope) if slope > 0 else np.inf
    low = _last_within(y, start, last, time)
    return float(x[low] + (x[low + 1] - x[low]) * ((time - y[low]) / (y[low + 1] - y[low])))


@njit(nogil=True)
def next_corner(curves: Curves, g: int, k: int, f: int, time: float) -> float:
    """The first latency above `time` of the corners of a non-decreasing curve; infinity beyond the last."""
    y, start = curves.y, curves.start[g, k, f]
    end = start + curves.length[g, k, f]
    corner = _last_within(y, start - 1, end, time) + 1
    return float(y[corner]) if corner < end else np.inf


@njit(nogil=True, inline="always")
def latency_value(rank: int, loads: Array, curves: Curves) -> float:
    """Latency of one rank under `loads` [F]."""
    best = -np.inf
    for k in range(curves.num_terms[rank]):
        total = 0.0
        for f in range(loads.shape[0]):
            total += curve_value(curves, rank, k, f, loads[f])
        best = max(best, total)
    return best


@njit(nogil=True)
def rank_latencies(loads_TGF: Array, curves: Curves) -> Array:
    """[T, G] latency in microseconds of every rank at every step."""
    steps, ranks, features = loads_TGF.shape
    out = np.empty((steps, ranks))
    best_T, total_T = np.empty(steps), np.empty(steps)
    for g in range(ranks):  # curve by curve: a straight one is then a plain loop over the steps
        best_T[:] = -np.inf
        for k in range(curves.num_terms[g]):
            total_T[:] = 0.0
            for f in range(features):
                if curves.length[g, k, f] == 1:
                    first, steepness = curves.start[g, k, f], curves.slope[g, k, f]
                    x0, y0 = curves.x[first], curves.y[first]
                    for t in range(steps):
                        total_T[t] += y0 + steepness * (loads_TGF[t, g, f] - x0)
                else:
                    for t in range(steps):
                        total_T[t] += curve_value(curves, g, k, f, loads_TGF[t, g, f])
            for t in range(steps):
                best_T[t] = max(best_T[t], total_T[t])
        for t in range(steps):
            out[t, g] = best_T[t]
    return out


@njit(nogil=True)
def rank_loads(features_FTN: Array, column_P: Array, rank_P: Array, num_ranks: int) -> F64:
    """[T, G, F] features of every rank: each slot's column of `features_FTN` (-1: none) added to its rank.

    rank_P does not decrease.
    """
    features, steps = features_FTN.shape[:2]
    held, ends_G, size = np.empty(len(column_P), np.int64), np.zeros(num_ranks, np.int64), 0
    for slot in range(len(column_P)):
        if column_P[slot] >= 0:
            held[size] = column_P[slot]
            size += 1
        ends_G[rank_P[slot]] = size
    for g in range(1, num_ranks):  # ranks without slots
        ends_G[g] = max(ends_G[g], ends_G[g - 1])
    out_TGF = np.empty((steps, num_ranks, features))
    for f in range(features):
        for t in range(steps):
            items_N, p = features_FTN[f, t], 0
            for g in range(num_ranks):
                total = np.int64(0)
                while p < ends_G[g]:
                    total += items_N[held[p]]
                    p += 1
                out_TGF[t, g, f] = total
    return out_TGF

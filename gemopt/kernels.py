"""Compiled kernels shared by evaluate, bounds and search.

Loads that enter float32 arithmetic are whole numbers below 2**24 and so exact; sums over steps are float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Array = NDArray[Any]


@njit(cache=True, nogil=True, inline="always")
def curve_value(x: Array, y: Array, slope: float, start: int, length: int, load: float) -> float:
    """Value of one packed piecewise-linear curve at a load >= 0."""
    last = start + length - 1
    if load >= x[last]:
        return float(y[last] + slope * (load - x[last]))
    low, high = start, last
    while high - low > 1:
        middle = (low + high) // 2
        if x[middle] <= load:
            low = middle
        else:
            high = middle
    return float(y[low] + (y[high] - y[low]) / (x[high] - x[low]) * (load - x[low]))


@njit(cache=True, nogil=True, inline="always")
def latency_value(
    rank: int, loads: Array, start: Array, length: Array, slope: Array, num_terms: Array, x: Array, y: Array
) -> float:
    """Latency of one rank under `loads` [F]."""
    best = -np.inf
    for k in range(num_terms[rank]):
        total = 0.0
        for f in range(loads.shape[0]):
            total += curve_value(x, y, slope[rank, k, f], start[rank, k, f], length[rank, k, f], loads[f])
        best = max(best, total)
    return best


@njit(cache=True, nogil=True)
def rank_latencies(
    loads_TGF: Array, start: Array, length: Array, slope: Array, num_terms: Array, x: Array, y: Array
) -> Array:
    """[T, G] latency in microseconds of every rank at every step."""
    steps, ranks, features = loads_TGF.shape
    out = np.empty((steps, ranks))
    best_T, total_T = np.empty(steps), np.empty(steps)
    for g in range(ranks):  # curve by curve: a straight one is then a plain loop over the steps
        best_T[:] = -np.inf
        for k in range(num_terms[g]):
            total_T[:] = 0.0
            for f in range(features):
                first, size, steepness = start[g, k, f], length[g, k, f], slope[g, k, f]
                if size == 1:
                    x0, y0 = x[first], y[first]
                    for t in range(steps):
                        total_T[t] += y0 + steepness * (loads_TGF[t, g, f] - x0)
                else:
                    for t in range(steps):
                        total_T[t] += curve_value(x, y, steepness, first, size, loads_TGF[t, g, f])
            for t in range(steps):
                best_T[t] = max(best_T[t], total_T[t])
        for t in range(steps):
            out[t, g] = best_T[t]
    return out

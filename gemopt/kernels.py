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
    steps, ranks, _ = loads_TGF.shape
    out = np.empty((steps, ranks))
    for t in range(steps):
        for g in range(ranks):
            out[t, g] = latency_value(g, loads_TGF[t, g], start, length, slope, num_terms, x, y)
    return out

"""Compiled bounds of every step: range, pigeonhole and fluid together.

`sums[i, f]` is the feature sum of the i smallest experts of a step; `low` and `exact` are packed latencies as one tuple
of arrays, non-decreasing (`Latency.low`) and as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from gemopt.bounds.fluid import mixed_bound, single_bound
from gemopt.kernels import Array, latency_value


@njit(cache=True, nogil=True)
def pigeonhole(
    known: float,
    tops_M: Array,
    spent: int,
    slots_G: Array,
    whole_G: Array,
    sums_IF: Array,
    share_IF: Array,
    start: Array,
    length: Array,
    slope: Array,
    num_terms: Array,
    x: Array,
    y: Array,
) -> float:
    """Time in which, for every m of `tops_M`, the ranks can hold `m - spent` of the m largest experts.

    A rank with q of them has at least the q smallest of them (or of their shares, `share_IF`) and, as `whole_G`
    experts at least are on it alone, the smallest others. Its time does not fall with q and does not rise with m: from
    one m to the next (increasing) the numbers held only grow.
    """
    ranks, features = len(slots_G), sums_IF.shape[1]
    held, full_at = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    step, loads_F = np.empty(ranks), np.empty(features)
    total, g = 0, 0
    for m in tops_M:
        rest = share_IF.shape[0] - 1 - m
        full = 0
        while total < m - spent:
            if full == ranks:  # within the time known no rank takes another one: the first to be through does
                for other in range(ranks):
                    if step[other] < step[g]:
                        g = other
                if step[g] == np.inf:
                    break
                known = max(known, step[g])
                held[g] += 1
                total += 1
            else:
                g = g + 1 if g + 1 < ranks else 0
                if full_at[g] == m:
                    continue
            q = held[g] + 1
            step[g] = np.inf
            if q <= min(slots_G[g], m):
                others = min(max(whole_G[g] - q, 0), rest)
                for f in range(features):
                    loads_F[f] = share_IF[rest + q, f] - share_IF[rest, f] + sums_IF[others, f]
                step[g] = latency_value(g, loads_F, start, length, slope, num_terms, x, y)
            if full == ranks:
                continue
            if step[g] <= known:
                held[g] = q
                total += 1
            else:
                full_at[g] = m
                full += 1
    return known


@njit(cache=True, nogil=True)
def range_bound(least_GF: Array, most_GF: Array, exact: Any, low: Any) -> float:
    """Slowest rank when each has its least load; where least and most agree the load is known."""
    best = -np.inf
    for g in range(least_GF.shape[0]):
        known = (least_GF[g] == most_GF[g]).all()
        value = latency_value(g, least_GF[g], *exact) if known else latency_value(g, least_GF[g], *low)
        best = max(best, value)
    return best


@njit(cache=True, nogil=True)
def bound_steps(
    sums_RTIF: Array,
    slots_G: Array,
    whole_G: Array,
    tops_RM: Array,
    spent_R: Array,
    exact: Any,
    low: Any,
    others: Array,
    normals_DF: Array,
    slope_DGM: Array,
    shift_DGM: Array,
    wake_G: Array,
) -> Array:
    """[T] all bounds together. R: numbers of copies considered, D: directions, M: padded."""
    kinds, steps, size, features = sums_RTIF.shape
    ranks, experts, directions = len(slots_G), size - 1, len(normals_DF)
    bounds_T = np.empty(steps)
    least_GF, most_GF = np.empty((ranks, features)), np.empty((ranks, features))
    none_G = np.zeros_like(whole_G)
    for t in range(steps):
        sums_IF = sums_RTIF[0, t]
        for g in range(ranks):
            for f in range(features):
                least_GF[g, f] = sums_IF[whole_G[g], f]
                most_GF[g, f] = sums_IF[experts, f] - sums_IF[experts - slots_G[g], f]
        known = range_bound(least_GF, most_GF, exact, low)
        for r in range(kinds):
            whole = whole_G if r == 0 else none_G
            known = pigeonhole(known, tops_RM[r], spent_R[r], slots_G, whole, sums_IF, sums_RTIF[r, t], *low)
        ceiling = known
        for g in range(ranks):
            ceiling = max(ceiling, latency_value(g, sums_IF[experts], *low))
        most_DG = normals_DF @ most_GF.T
        for d in range(directions):
            target = 0.0
            for f in range(features):
                target += normals_DF[d, f] * sums_IF[experts, f]
            known = mixed_bound(d, known, most_DG, target, ceiling, slope_DGM, shift_DGM, wake_G)
        for f in range(features):
            known = single_bound(f, known, most_GF, sums_IF[experts, f], ceiling, others, *low)
        bounds_T[t] = known
    return bounds_T

"""Compiled bounds of every step: pigeonhole, then fluid.

`sums[i, f]` is the feature sum of the i smallest experts of a step; `low` the non-decreasing latencies
(`Latency.low`).
"""

from __future__ import annotations

import numpy as np

from gemopt.bounds.fluid import mixed_bound, single_bound
from gemopt.compiling import njit
from gemopt.kernels import Array, latency_value
from gemopt.latency import Curves


@njit(nogil=True, inline="always")
def pigeonhole(
    known: float,
    tops_M: Array,
    spent: int,
    slots_G: Array,
    whole_G: Array,
    sums_IF: Array,
    share_IF: Array,
    curves: Curves,
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
                step[g] = latency_value(g, loads_F, curves)
            if full == ranks:
                continue
            if step[g] <= known:
                held[g] = q
                total += 1
            else:
                full_at[g] = m
                full += 1
    return known


@njit(nogil=True)
def raise_bounds(
    known_T: Array,
    ceiling_T: Array,
    most_TGF: Array,
    sums_RTIF: Array,
    slots_G: Array,
    whole_G: Array,
    tops_RM: Array,
    spent_R: Array,
    low: Curves,
    others: Array,
    normals_DF: Array,
    slope_DGM: Array,
    shift_DGM: Array,
    wake_G: Array,
    stop: Array,
) -> int:
    """Raise `known_T` in place; returns the steps done before `stop` [1] was set. R: numbers of copies, D: directions.

    ceiling_T: a time in which any rank could hold the whole step. most_TGF: the most that slots allow a rank to hold.
    """
    kinds, steps, size, features = sums_RTIF.shape
    none_G, most_DG = np.zeros_like(whole_G), np.empty((len(normals_DF), most_TGF.shape[1]))
    for t in range(steps):
        if stop[0] != 0:
            return int(t)
        known, sums_IF, total_F = known_T[t], sums_RTIF[0, t], sums_RTIF[0, t, size - 1]
        for r in range(kinds):
            whole = whole_G if r == 0 else none_G
            known = pigeonhole(known, tops_RM[r], spent_R[r], slots_G, whole, sums_IF, sums_RTIF[r, t], low)
        for d in range(len(normals_DF)):
            target = 0.0
            for g in range(most_TGF.shape[1]):
                most_DG[d, g] = 0.0
            for f in range(features):  # numba takes 1 s to compile a product of matrices
                target += normals_DF[d, f] * total_F[f]
                for g in range(most_TGF.shape[1]):
                    most_DG[d, g] += normals_DF[d, f] * most_TGF[t, g, f]
            known = mixed_bound(d, known, most_DG, target, ceiling_T[t], slope_DGM, shift_DGM, wake_G)
        for f in range(features):
            known = single_bound(f, known, most_TGF[t], total_F[f], ceiling_T[t], others, low)
        known_T[t] = known
    return int(steps)

"""What contents with copies cost at least, by pairs of what they hold: which of them are worth a look at the steps.

Where a latency is no less than a line `a + b load`, what a content C has above the floors is no less than any parts
`alpha <= 1` of what the line has, which may be negative. So its cost is at least a sum over pairs, whatever the steps:

    sum_{x in C} alone_x + sum_{x, y in C} b sum_t alpha_tx mu_tx n_ty,   alone_x = sum_t alpha_tx mu_tx (a - floor_t)

alpha is one at the steps at which contents that hold x are above the floor in the mean, else none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gemopt.latency import FloatArray
from gemopt.solvers.exact.column_space import ULP
from gemopt.solvers.exact.tree import FAST, Tables

Array = NDArray[Any]
BISECTIONS = 60


class Lines(NamedTuple):
    """start, slope: [K] of a line for each kind of ranks which its latency does not fall below at any load."""

    start_K: FloatArray
    slope_K: FloatArray


def lines_of(tables: Tables, ranks_K: Array, most: int, near: float) -> Lines | None:
    """The lines below latencies of one feature up to a load, that are highest near another; None of several terms."""
    found = []
    for g in ranks_K:
        if tables.terms[g] != 1 or tables.offset.shape[2] != 1:
            return None
        if tables.straight[g, 0, 0]:
            found.append((tables.start[g, 0, 0], tables.slope[g, 0, 0]))
            continue
        first, loads = tables.offset[g, 0, 0], np.arange(most + 1)
        values = tables.values[first : first + most + 1]
        low, high = 0.0, float(np.ptp(values)) + 1.0
        for _ in range(BISECTIONS):
            slope = (low + high) / 2
            rising = loads[(values - slope * loads).argmin()] < near
            low, high = (slope, high) if rising else (low, slope)
        found.append(((values - low * loads - 2 * ULP * (np.abs(values) + low * loads)).min(), low))  # rounded down
    return Lines(*np.array(found).T)


def pair_prices(
    lines: Lines, features_XT: Array, floor_T: FloatArray, mu_XT: FloatArray, price_X: FloatArray, near_NS: Array,
) -> tuple[FloatArray, FloatArray]:  # fmt: skip
    """(alone [K, X], both [K, X, X]) of what contents cost at least, less their prices; see the module.

    near: [N, S] contents that are among the cheapest. Rounding is taken off what each costs alone.
    """
    pairs, held_X = len(features_XT), features_XT.astype(np.float64)
    in_NX = np.zeros((len(near_NS), pairs))
    in_NX[np.arange(len(near_NS))[:, None], near_NS] = 1.0
    in_NX[:, -1] = 0.0
    both_XX = in_NX.T @ in_NX
    number_X = both_XX.diagonal()
    load_XT = (both_XX @ held_X) / np.maximum(number_X, 1.0)[:, None]
    alone_KX, both_KXX = np.empty((len(lines.start_K), pairs)), np.empty((len(lines.start_K), pairs, pairs))
    for k, (start, slope) in enumerate(zip(*lines, strict=True)):
        above_T = start - floor_T
        counts = (load_XT * slope + above_T > 0) | (number_X == 0)[:, None]
        mass_XT = np.where(counts, mu_XT, 0.0)
        one_XX = slope * (mass_XT @ held_X.T)
        alone_X = mass_XT @ above_T - price_X + one_XX.diagonal()
        size_X = mass_XT @ np.abs(above_T) + np.abs(price_X) + np.abs(one_XX).max(axis=1) * pairs
        both_KXX[k] = one_XX + one_XX.T
        alone_KX[k] = alone_X - ULP * (len(floor_T) + 2 * pairs) * size_X.max()
    return alone_KX, both_KXX


@njit(cache=True, nogil=True, fastmath=FAST)
def price_pairs(pairs_NS: Array, live_KN: Array, alone_KX: Array, both_KXX: Array, net_KN: Array) -> None:
    """Sums of each content; infinite where it is not live. Contents begin as those before them do."""
    kinds, slots, nothing = len(live_KN), pairs_NS.shape[1], alone_KX.shape[1] - 1
    sum_KS = np.zeros((kinds, slots + 1))
    for n in range(len(pairs_NS)):
        first = 0
        while n > 0 and first < slots and pairs_NS[n, first] == pairs_NS[n - 1, first]:
            first += 1
        for k in range(kinds):
            for s in range(first, slots):
                x, total = pairs_NS[n, s], sum_KS[k, s]
                if x != nothing:
                    total += alone_KX[k, x]
                    for r in range(s):
                        total += both_KXX[k, x, pairs_NS[n, r]]
                sum_KS[k, s + 1] = total
            net_KN[k, n] = sum_KS[k, slots] if live_KN[k, n] else np.inf


@njit(cache=True, nogil=True)
def cut_copies(
    pairs_NS: Array, size_N: Array, ids: Array, more_X: Array, slots_K: Array, spare: int, live_KN: Array
) -> None:
    """Leave out contents `ids` [n] that hold a pair which may not be (more: -1), or with which too few slots are spare.

    more: copies of each pair beyond the least of its expert; slots that a content leaves empty count as those do.
    """
    for p in range(len(ids)):
        n, more = ids[p], 0
        for s in range(pairs_NS.shape[1]):
            each = more_X[pairs_NS[n, s]]
            more += each if each >= 0 else spare + slots_K.max() + 1
        for k in range(len(slots_K)):
            live_KN[k, p] &= more + slots_K[k] - size_N[n] <= spare

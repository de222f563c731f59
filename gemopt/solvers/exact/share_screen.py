"""What contents with copies cost at least, by pairs of what they hold: which of them are worth a look at the steps.

Where a latency is no less than a line `a + b load`, what a content C has above the floors is no less than any parts
`alpha <= 1` of what the line has, which may be negative. So its cost is at least a sum over pairs, whatever the steps:

    sum_{x in C} alone_x + sum_{x, y in C} b sum_t alpha_tx mu_tx n_ty,   alone_x = sum_t alpha_tx mu_tx (a - floor_t)

alpha is one at the steps at which contents that hold x are above the floor in the mean, else none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.compiling import njit
from gemopt.latency import FloatArray
from gemopt.solvers.exact.column_space import ULP
from gemopt.solvers.exact.tree import FAST, Tables

Array = NDArray[Any]
BISECTIONS = 60


class Lines(NamedTuple):
    """start, slope: [K] of a line for each kind of ranks which its latency does not fall below at any load."""

    start: FloatArray
    slope: FloatArray


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


@njit(nogil=True, fastmath=FAST)
def pair_prices(
    lines: Lines, features_XT: Array, floor_T: Array, mu_XT: Array, price_X: Array, near_NS: Array
) -> tuple[Array, Array]:
    """(alone [K, X], both [K, X, X]) of what contents cost at least, less their prices; see the module.

    near: [N, S] contents that are among the cheapest. Rounding is taken off what each costs alone. Products of matrices
    would wait for one another where several threads ask a library for them.
    """
    pairs, steps, nothing = len(features_XT), len(floor_T), len(features_XT) - 1
    number_XX, load_XT, mass_T = np.zeros((pairs, pairs)), np.zeros((pairs, steps)), np.empty(steps)
    alone_KX, both_KXX = np.empty((len(lines.start), pairs)), np.zeros((len(lines.start), pairs, pairs))
    held_XT = features_XT.astype(np.float64)
    for n in range(len(near_NS)):
        for x in near_NS[n]:
            for y in near_NS[n]:
                number_XX[x, y] += 1
    number_XX[nothing] = 0.0
    number_XX[:, nothing] = 0.0
    for x in range(pairs):
        for y in range(pairs):
            if number_XX[x, y] > 0:
                part = number_XX[x, y] / number_XX[x, x]
                for t in range(steps):
                    load_XT[x, t] += part * held_XT[y, t]
    for k in range(len(lines.start)):
        start, slope, size = lines.start[k], lines.slope[k], 0.0
        for x in range(pairs):
            total, gross, most = 0.0, abs(price_X[x]), 0.0
            for t in range(steps):
                counts = number_XX[x, x] == 0 or load_XT[x, t] * slope + start - floor_T[t] > 0
                mass_T[t] = mu_XT[x, t] if counts else 0.0
                total += mass_T[t] * (start - floor_T[t])
                gross += mass_T[t] * abs(start - floor_T[t])
            for y in range(pairs):
                both = 0.0
                for t in range(steps):
                    both += mass_T[t] * held_XT[y, t]
                both *= slope
                both_KXX[k, x, y] += both
                both_KXX[k, y, x] += both
                most = max(most, abs(both))
            alone_KX[k, x] = total - price_X[x] + both_KXX[k, x, x] / 2
            size = max(size, gross + most * pairs)
        for x in range(pairs):
            alone_KX[k, x] -= ULP * (steps + 2 * pairs) * size
    return alone_KX, both_KXX


@njit(nogil=True, fastmath=FAST)
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


@njit(nogil=True)
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

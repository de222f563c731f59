"""Compiled fluid bounds: the time in which all ranks together can hold a load.

Curves are non-decreasing (`Latency.low`). A bound only ever raises the time known before, so most of them
cost a step one look: can the ranks hold its load within the time known so far?
"""

from __future__ import annotations

import numpy as np

from gemopt.compiling import njit
from gemopt.kernels import SLACK, ZERO, Array, curve_capacity, curve_value
from gemopt.latency import Curves


@njit(nogil=True, inline="always")
def rank_capacity(g: int, f: int, time: float, others: Array, curves: Curves) -> float:
    """Largest whole load of feature f on rank g within `time`, at least 0.

    others: [G, K, F] what the term's other curves add at the smallest loads of a busy rank.
    """
    capacity = np.inf
    for k in range(curves.num_terms[g]):
        rest = time - others[g, k, f] + SLACK * (abs(time) + abs(others[g, k, f]))
        capacity = min(capacity, curve_capacity(curves, g, k, f, rest))
    return float(np.floor(max(0.0, capacity * (1 + 1e-12) + 1e-9)))


@njit(nogil=True)
def single_total(f: int, time: float, most_GF: Array, others: Array, curves: Curves) -> float:
    """Load of one feature that all ranks hold within `time`."""
    total = 0.0
    for g in range(most_GF.shape[0]):
        total += min(most_GF[g, f], rank_capacity(g, f, time, others, curves))
    return total


@njit(nogil=True)
def single_next(g: int, f: int, load: float, others: Array, curves: Curves) -> float:
    """Time of rank g with this load > 0 of feature f and, of the others, the smallest loads of a busy rank."""
    best = -np.inf
    for k in range(curves.num_terms[g]):
        value = curve_value(curves, g, k, f, load)
        best = max(best, value + others[g, k, f])
    return best


@njit(nogil=True, inline="always")
def single_start(
    f: int, known: float, most_GF: Array, target: float, ceiling: float, others: Array, curves: Curves
) -> tuple[float, bool]:
    """A time in which the ranks just cannot hold `target` of feature f, or `known` and False when they can.

    First ever wider steps up, then the secant and the middle in turn.
    """
    missing = target - single_total(f, known, most_GF, others, curves)
    below, above, surplus, width = known, known, -1.0, 0.02
    while missing > 0 and surplus < 0 and above < ceiling:
        below, above = above, min(ceiling, above + width * (abs(known) + 1e-3 * ceiling))
        surplus = single_total(f, above, most_GF, others, curves) - target
        missing, width = (-surplus, 2 * width) if surplus < 0 else (missing, width)
    if surplus < 0:
        return known, False
    level = 0  # looks in a row that met the load of one end: the ends are either side of a jump
    for i in range(60):
        if missing <= len(most_GF) or level == 3 or above - below <= 1e-6 * abs(above):
            break
        share = missing / (missing + surplus) if i % 2 == 0 else 0.5
        time = below + share * (above - below) * 0.999
        value = single_total(f, time, most_GF, others, curves) - target
        level = level + 1 if value in (surplus, -missing) else 0
        if value >= 0:
            above, surplus = time, value
        else:
            below, missing = time, -value
    return below, True


@njit(nogil=True)
def single_bound(
    f: int, known: float, most_GF: Array, target: float, ceiling: float, others: Array, curves: Curves
) -> float:
    """Smallest time in which the ranks hold `target` of feature f, exact on the staircase; at least `known`.

    From a time that is just too short, loads grow by the least, always on the rank that is through first.
    """
    time, more = single_start(f, known, most_GF, target, ceiling, others, curves)
    if not more:
        return known
    ranks, total = len(most_GF), 0.0
    held, step = np.empty(ranks), np.full(ranks, -np.inf)
    for g in range(ranks):
        held[g] = min(most_GF[g, f], rank_capacity(g, f, time, others, curves))
        total += held[g]
    g, fresh = ZERO, 0
    while total < target:
        if fresh < ranks:
            g, fresh = fresh, fresh + 1
        else:
            for other in range(ranks):
                if step[other] < step[g]:
                    g = other
            if step[g] == np.inf:
                break
            time = max(time, step[g])
            reached = rank_capacity(g, f, time, others, curves)
            reached = min(most_GF[g, f], max(held[g] + 1, reached))
            total += reached - held[g]
            held[g] = reached
        step[g] = np.inf
        if held[g] < most_GF[g, f]:
            step[g] = single_next(g, f, held[g] + 1, others, curves)
    return time


@njit(nogil=True)
def mixed_total(d: int, time: float, most_DG: Array, slope_DGM: Array, shift_DGM: Array, wake_G: Array) -> float:
    """Weighted features that all ranks hold within `time`: per rank the smallest of lines, 0 below its wake-up time."""
    total = 0.0
    for g in range(len(wake_G)):
        if time + SLACK * abs(time) < wake_G[g]:
            continue
        capacity = most_DG[d, g]
        for m in range(slope_DGM.shape[2]):
            rise, shift = slope_DGM[d, g, m] * time, shift_DGM[d, g, m]
            capacity = min(capacity, rise + shift + SLACK * (abs(rise) + abs(shift)))
        total += max(0.0, capacity)
    return total


@njit(nogil=True)
def mixed_bound(
    d: int,
    known: float,
    most_DG: Array,
    target: float,
    ceiling: float,
    slope_DGM: Array,
    shift_DGM: Array,
    wake_G: Array,
) -> float:
    """Time, from below, in which the ranks hold `target` of the weighted features; at least `known`."""
    target *= 1 - 1e-12
    missing = target - mixed_total(d, known, most_DG, slope_DGM, shift_DGM, wake_G)
    if missing <= 0:
        return known
    below, above = known, ceiling
    surplus = mixed_total(d, above, most_DG, slope_DGM, shift_DGM, wake_G) - target
    if surplus < 0:
        return known
    for i in range(100):
        if above - below <= 1e-9 * abs(above):
            break
        share = missing / (missing + surplus) if i % 3 < 2 else 0.5
        time = below + share * (above - below) * (1 - 1e-9)
        value = mixed_total(d, time, most_DG, slope_DGM, shift_DGM, wake_G) - target
        if value >= 0:
            above, surplus = time, value
        else:
            below, missing = time, -value
    return below

"""Compiled: the least time in which some ranks hold a load, of one load and latencies that do not decrease.

Where many are asked for, the times at which a rank holds more, and what each rank holds then, are tabled once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.compiling import njit
from gemopt.kernels import SLACK, Array, curve_capacity, next_corner
from gemopt.latency import Curves, FloatArray

IntArray = NDArray[np.int64]
Number = Any  # what a compiled function returns or takes, as far as a type checker can tell
TIGHT = 1e-10  # a level is known to this much of itself
RAMP = 1e-8  # of a time: a rank that begins to hold more so shortly before holds it at once
MOST_LEVELS, MOST_CELLS = 1 << 12, 1 << 20  # of a table; where there are more, it has some of them
MOST_LOAD = np.int64(1 << 40)  # no rank is asked to hold more


class Levels(NamedTuple):
    """Latencies of the ranks, and a table of what they hold, which may be empty.

    times_L: rising, in microseconds. held_LG: largest whole load of each rank then. steady_L: whether no rank holds
    more between the time before and this one.
    """

    curves: Curves
    times_L: FloatArray
    held_LG: IntArray
    steady_L: NDArray[np.bool_]


def no_levels(curves: Curves) -> Levels:
    """Latencies without a table, for a few steps."""
    return Levels(curves, np.zeros(0), np.zeros((0, len(curves.num_terms)), np.int64), np.zeros(0, np.bool_))


def table_levels(curves: Curves, low: float, high: float) -> Levels:
    """Latencies with a table of the times from `low` to `high` microseconds."""
    times_L = np.unique(curves.y[(curves.y > low) & (curves.y <= high)] / (1 + SLACK) * (1 + 1e-15))
    times_L = times_L[np.diff(times_L, prepend=0.0) > 2 * RAMP * times_L]
    most = min(MOST_LEVELS, MOST_CELLS // len(curves.num_terms))
    if len(times_L) > most:
        times_L = times_L[np.linspace(0, len(times_L) - 1, most).astype(np.int64)]
    held_LG = np.zeros((len(times_L), len(curves.num_terms)), np.int64)
    steady_L = np.zeros(len(times_L), np.bool_)
    _fill(curves, times_L, held_LG, steady_L)
    return Levels(curves, times_L, held_LG, steady_L)


@njit(nogil=True)
def _fill(curves: Curves, times_L: Array, held_LG: Array, steady_L: Array) -> None:
    for n in range(len(times_L)):
        steady_L[n] = n > 0
        for g in range(held_LG.shape[1]):
            held_LG[n, g] = capacity(curves, g, times_L[n], MOST_LOAD)
            just_before = capacity(curves, g, times_L[n] * (1 - RAMP), MOST_LOAD)
            steady_L[n] &= n > 0 and just_before == held_LG[n - 1, g]


@njit(nogil=True)
def capacity(curves: Curves, g: Number, time: float, total: Number) -> Number:
    """Largest whole load up to `total` of a rank within a time; curves do not decrease."""
    most = np.inf
    for k in range(curves.num_terms[g]):
        most = min(most, curve_capacity(curves, g, k, 0, time + SLACK * abs(time)))
    return np.int64(min(float(total), np.floor(max(0.0, most * (1 + 1e-12) + 1e-9))))


@njit(nogil=True)
def fill_capacity(levels: Levels, time: float, total: int, most_G: IntArray) -> None:
    """Fill in the largest whole load up to `total` of each rank within a time."""
    n = np.searchsorted(levels.times_L, time)
    known = n < len(levels.times_L) and levels.times_L[n] == time
    for g in range(len(most_G)):
        most_G[g] = min(levels.held_LG[n, g], total) if known else capacity(levels.curves, g, time, total)


@njit(nogil=True)
def held_within(curves: Curves, members: IntArray, time: float, total: Number) -> Number:
    """Load that some ranks hold together within a time."""
    held = 0
    for g in members:
        held += capacity(curves, g, time, total)
    return held


@njit(nogil=True)
def tabled_level(
    times_L: FloatArray, held_LG: IntArray, steady_L: Array, members: IntArray, size: int, load: Number, known: float
) -> Number:
    """What `level` says of the first of `members`, by the arrays of the table, or -1 where these do not know."""
    low, high = int(np.searchsorted(times_L, known)), len(times_L)
    if low == high or times_L[low] != known:
        return -1.0
    first = low
    while low < high:
        middle, held = (low + high) // 2 if low > first else low, 0
        for n in range(size):
            held += held_LG[middle, members[n]]
        if held >= load:
            high = middle
        else:
            low = middle + 1
    if low == first:
        return known
    return times_L[low] if low < len(times_L) and steady_L[low] else -1.0


@njit(nogil=True)
def level(levels: Levels, members: IntArray, load: Number, known: float) -> Number:
    """Least time, within `TIGHT`, in which some ranks hold a load together; never below `known`, never too short."""
    curves, times_L, held_LG = levels.curves, levels.times_L, levels.held_LG
    tabled = tabled_level(times_L, held_LG, levels.steady_L, members, len(members), load, known)
    if tabled >= 0:
        return tabled
    low, high, below = int(np.searchsorted(times_L, known)), len(times_L), known
    held, enough = held_within(curves, members, known, load), np.inf
    if held >= load:
        return known
    while low < high:
        middle, more = (low + high) // 2, 0
        for g in members:
            more += held_LG[middle, g]
        if more >= load:
            high = middle
        else:
            low, below, held = middle + 1, max(known, times_L[middle]), more
    if low < len(times_L):
        if levels.steady_L[low]:
            return times_L[low]
        enough = times_L[low]
    missing, width = load - held, 0.01
    above, surplus = below, -1
    if enough < np.inf:
        above, surplus = enough, held_within(curves, members, enough, load) - load
    while surplus < 0:
        above = below + width * (abs(below) + 1e-6)
        surplus, width = held_within(curves, members, above, load) - load, 2 * width
        if surplus < 0:
            below, missing = above, -surplus
    for i in range(200):
        if above - below <= TIGHT * abs(above):
            break
        share = missing / (missing + surplus + 1.0) if i % 2 == 0 else 0.5
        time = below + (above - below) * min(0.999, max(0.001, share))
        corner = next_time(curves, members, below)
        for tried in (corner, corner * (1 - 0.5 * TIGHT), time):
            if not below < tried < above:
                continue
            value = held_within(curves, members, tried, load) - load
            if value >= 0:
                above, surplus = tried, value
            else:
                below, missing = tried, -value
    return above


@njit(nogil=True)
def next_time(curves: Curves, members: IntArray, time: float) -> Number:
    """The next time at which a corner of some ranks' curves is reached: in between, staircases hold what they held."""
    found = np.inf
    for g in members:
        for k in range(curves.num_terms[g]):
            found = min(found, next_corner(curves, g, k, 0, time + SLACK * abs(time)))
    return found / (1 + SLACK) * (1 + 1e-15)

"""Compiled: the split of whole assignments over given copies that lets the slowest rank end first, exactly.

Latencies of one load that do not decrease. Within a time every rank holds a limited load, so what is asked is a flow
from experts to ranks. The time starts at what all ranks together need; where loads cannot be brought under it, the
ranks that an overfull one reaches through its copies are a cut: these ranks alone must hold these loads, which raises
the time to the next one that may do. This is Newton's method on cuts, as for parametric flows: T. Radzik, "Parametric
flows, weighted means of cuts, and fractional combinatorial optimization", in Complexity in Numerical Optimization
(1993). The time that is reached is a lower bound of every split and the latency of this one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gemopt.kernels import SLACK, Array, curve_capacity, latency_value, next_corner
from gemopt.latency import Curves

IntArray = NDArray[np.int64]
Number = Any  # what a compiled function returns or takes, as far as a type checker can tell
TIGHT = 1e-10  # a level is known to this much of itself


class Copies(NamedTuple):
    """Copies of the R experts that have several, C in all, those of one expert together and in slot order.

    experts: [R]; first: [R + 1] of its copies; slot, rank, owner: [C]; by_rank: [C] copies sorted by rank, those of
    rank g from `start[g]` to `start[g + 1]`.
    """

    experts: IntArray
    first: IntArray
    slot: IntArray
    rank: IntArray
    owner: IntArray
    by_rank: IntArray
    start: IntArray


def find_copies(row_P: IntArray, rank_of_slot: IntArray, num_experts: int, num_ranks: int) -> Copies:
    """The copies of a placement row."""
    return copies_of(np.array(row_P, np.int64), np.array(rank_of_slot, np.int64), num_experts, num_ranks)


@njit(cache=True, nogil=True)
def copies_of(row_P: IntArray, rank_P: IntArray, num_experts: int, num_ranks: int) -> Copies:
    """The same, of arrays that compiled code shares."""
    number_E, start = np.zeros(num_experts, np.int64), np.zeros(num_ranks + 1, np.int64)
    for e in row_P:
        if e >= 0:
            number_E[e] += 1
    experts = np.flatnonzero(number_E > 1)
    owner_E, first = np.full(num_experts, -1), np.zeros(len(experts) + 1, np.int64)
    for r in range(len(experts)):
        owner_E[experts[r]] = r
        first[r + 1] = first[r] + number_E[experts[r]]
    slot, rank, owner, by_rank = np.empty((4, first[-1]), np.int64)
    at = first[:-1].copy()
    for p in range(len(row_P)):
        r = owner_E[row_P[p]] if row_P[p] >= 0 else -1
        if r >= 0:
            slot[at[r]], rank[at[r]], owner[at[r]] = p, rank_P[p], r
            start[rank_P[p] + 1] += 1
            at[r] += 1
    start = np.cumsum(start)
    at_G = start[:-1].copy()
    for c in range(len(rank)):
        by_rank[at_G[rank[c]]] = c
        at_G[rank[c]] += 1
    return Copies(experts, first, slot, rank, owner, by_rank, start)


class Room(NamedTuple):
    """What a flow writes into, [G] each.

    load, most: load of a rank, and what the time allows. seen, queue: ranks that a search has reached, in that order;
    came, left: the copies that take and give on the way there. cut, inside: ranks that prove the time, as no others can
    take the load [1] of theirs; all ranks where it is the fluid one.
    """

    load: IntArray
    most: IntArray
    seen: NDArray[np.bool_]
    queue: IntArray
    came: IntArray
    left: IntArray
    cut: NDArray[np.bool_]
    inside: IntArray


@njit(cache=True, nogil=True)
def make_room(num_ranks: int) -> Room:
    """Room for `spread`."""
    return Room(
        np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.bool_),
        np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64),
        np.ones(num_ranks, np.bool_), np.zeros(1, np.int64),
    )  # fmt: skip


@njit(cache=True, nogil=True)
def capacity(curves: Curves, g: Number, time: float, total: int) -> Number:
    """Largest whole load up to `total` of a rank within a time; curves do not decrease."""
    most = np.inf
    for k in range(curves.num_terms[g]):
        most = min(most, curve_capacity(curves, g, k, 0, time + SLACK * abs(time)))
    return np.int64(min(float(total), np.floor(max(0.0, most * (1 + 1e-12) + 1e-9))))


@njit(cache=True, nogil=True)
def held_within(curves: Curves, members: IntArray, time: float, total: Number) -> Number:
    """Load that some ranks hold together within a time."""
    held = 0
    for g in members:
        held += capacity(curves, g, time, total)
    return held


@njit(cache=True, nogil=True)
def level(curves: Curves, members: IntArray, load: Number, known: float, enough: float = np.inf) -> Number:
    """Least time, within `TIGHT`, in which some ranks hold a load together; never below `known`, never too short.

    enough: a time in which they do, if one is known.
    """
    below, held = known, held_within(curves, members, known, load)
    if held >= load:
        return known
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


@njit(cache=True, nogil=True)
def next_time(curves: Curves, members: IntArray, time: float) -> Number:
    """The next time at which a corner of some ranks' curves is reached: in between, staircases hold what they held."""
    found = np.inf
    for g in members:
        for k in range(curves.num_terms[g]):
            found = min(found, next_corner(curves, g, k, 0, time + SLACK * abs(time)))
    return found / (1 + SLACK) * (1 + 1e-15)


@njit(cache=True, nogil=True)
def relieve(copies: Copies, room: Room, parts_C: IntArray, full: Number) -> Number:
    """Send load of an overfull rank along copies to one with room, as long as there is one; returns the ranks reached.

    0: the rank is not overfull any more.
    """
    while room.load[full] > room.most[full]:
        room.seen[:] = False
        room.seen[full], room.queue[0] = True, full
        size, at, end = 1, 0, -1
        while at < size and end < 0:
            g = room.queue[at]
            at += 1
            for n in range(copies.start[g], copies.start[g + 1]):
                c = copies.by_rank[n]
                if parts_C[c] == 0:
                    continue
                for d in range(copies.first[copies.owner[c]], copies.first[copies.owner[c] + 1]):
                    h = copies.rank[d]
                    if room.seen[h]:
                        continue
                    room.seen[h], room.came[h], room.left[h] = True, d, c
                    room.queue[size] = h
                    size += 1
                    if room.load[h] < room.most[h] and end < 0:
                        end = h
        if end < 0:
            return size
        amount, h = min(room.load[full] - room.most[full], room.most[end] - room.load[end]), end
        while h != full:
            amount = min(amount, parts_C[room.left[h]])
            h = copies.rank[room.left[h]]
        h = end
        while h != full:
            parts_C[room.left[h]] -= amount
            parts_C[room.came[h]] += amount
            h = copies.rank[room.left[h]]
        room.load[full] -= amount
        room.load[end] += amount
    return 0


@njit(cache=True, nogil=True)
def fluid_times(curves: Curves, total_T: IntArray) -> Array:
    """[T] time in which all ranks together hold a load, however it is cut into whole assignments."""
    times_T, everyone, idle, loads_F = np.empty(len(total_T)), np.arange(len(curves.num_terms)), 0.0, np.zeros(1)
    for g in range(len(everyone)):
        idle = max(idle, latency_value(g, loads_F, curves))
    for t in range(len(total_T)):
        times_T[t] = level(curves, everyone, int(total_T[t]), idle)
    return times_T


@njit(cache=True, nogil=True)
def settle(curves: Curves, copies: Copies, parts_C: IntArray, room: Room, time: float, ready: bool) -> float:
    """Bring `parts_C`, whose loads are in `room`, to the best split; returns its time, which is at least the one given.

    ready: whether `room.most` is what the given time allows. `room.cut` and `room.inside` prove that time, and then the
    one returned.
    """
    num_ranks, total = len(room.load), room.load.sum()
    while True:
        if not ready:
            for g in range(num_ranks):
                room.most[g] = capacity(curves, g, time, total)
        reached, ready = 0, False
        for g in range(num_ranks):
            reached = relieve(copies, room, parts_C, g)
            if reached > 0:
                break
        if reached == 0:
            return time
        room.inside[0] = 0
        for n in range(reached):
            room.inside[0] += room.load[room.queue[n]]
        room.cut[:] = room.seen
        time = level(curves, room.queue[:reached], room.inside[0], time)


@njit(cache=True, nogil=True)
def spread(curves: Curves, alone_G: IntArray, copies: Copies, parts_C: IntArray, room: Room, fluid: float) -> float:
    """Bring `parts_C` (any split to start from) to the best one; returns its time. `room` has what proves it.

    alone_G: load of the experts with one copy. fluid: as from `fluid_times`.
    """
    room.load[:] = alone_G
    for c in range(len(parts_C)):
        room.load[copies.rank[c]] += parts_C[c]
    room.cut[:] = True
    room.inside[0] = room.load.sum()
    return settle(curves, copies, parts_C, room, fluid, False)


@njit(cache=True, nogil=True)
def spread_steps(curves: Curves, alone_TG: IntArray, copies: Copies, parts_TC: IntArray, fluid_T: Array) -> Array:
    """[T] time of the best split of every step; `parts_TC` [T, C] is brought to it in place."""
    steps, num_ranks = alone_TG.shape
    room, times_T = make_room(num_ranks), np.empty(steps)
    for t in range(steps):
        times_T[t] = spread(curves, alone_TG[t], copies, parts_TC[t], room, fluid_T[t])
    return times_T

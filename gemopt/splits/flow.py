"""Compiled: the split of whole assignments over given copies that lets the slowest rank end first, exactly.

Latencies of one load that do not decrease. Within a time every rank holds a limited load, so what is asked is a flow
from experts to ranks. The time starts at what all ranks together need; where loads cannot be brought under it, the
ranks that an overfull one reaches through its copies are a cut: these ranks alone must hold these loads, which raises
the time to the next one that may do. This is Newton's method on cuts, as for parametric flows: T. Radzik, "Parametric
flows, weighted means of cuts, and fractional combinatorial optimization", in Complexity in Numerical Optimization
(1993). The time that is reached is a lower bound of every split and the latency of this one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.compiling import njit
from gemopt.kernels import NO, Array, latency_value, put
from gemopt.splits.levels import IntArray, Levels, Number, fill_capacity, level


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


@njit(nogil=True)
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
    slot, rank = np.empty(first[-1], np.int64), np.empty(first[-1], np.int64)
    owner, by_rank = np.empty_like(slot), np.empty_like(slot)
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


@njit(nogil=True)
def make_room(num_ranks: int) -> Room:
    """Room for `spread`."""
    return Room(
        np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.bool_),
        np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64),
        np.ones(num_ranks, np.bool_), np.zeros(1, np.int64),
    )  # fmt: skip


@njit(nogil=True)
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


@njit(nogil=True)
def fluid_times(levels: Levels, total_T: IntArray) -> Array:
    """[T] time in which all ranks together hold a load, however it is cut into whole assignments."""
    curves = levels.curves
    times_T, everyone, idle, loads_F = np.empty(len(total_T)), np.arange(len(curves.num_terms)), 0.0, np.zeros(1)
    for g in range(len(everyone)):
        idle = max(idle, latency_value(g, loads_F, curves))
    for t in range(len(total_T)):
        same = t > 0 and total_T[t] == total_T[t - 1]  # as in all steps of one batch
        times_T[t] = times_T[t - 1] if same else level(levels, everyone, int(total_T[t]), idle)
    return times_T


@njit(nogil=True)
def settle(levels: Levels, copies: Copies, parts_C: IntArray, room: Room, time: float, ready: bool) -> float:
    """Bring `parts_C`, whose loads are in `room`, to the best split; returns its time, which is at least the one given.

    ready: whether `room.most` is what the given time allows. `room.cut` and `room.inside` prove that time, and then the
    one returned.
    """
    num_ranks, total = len(room.load), room.load.sum()
    while True:
        if not ready:
            fill_capacity(levels, time, total, room.most)
        reached, ready = 0, False
        for g in range(num_ranks):
            if room.load[g] > room.most[g]:  # calls that need not be are as dear as what they do
                reached = relieve(copies, room, parts_C, g)
            if reached > 0:
                break
        if reached == 0:
            return time
        room.inside[0] = 0
        for n in range(reached):
            room.inside[0] += room.load[room.queue[n]]
        put(room.cut, room.seen)
        time = level(levels, room.queue[:reached], room.inside[0], time)


@njit(nogil=True)
def spread(levels: Levels, alone_G: IntArray, copies: Copies, parts_C: IntArray, room: Room, fluid: float) -> float:
    """Bring `parts_C` (any split to start from) to the best one; returns its time. `room` has what proves it.

    alone_G: load of the experts with one copy. fluid: as from `fluid_times`.
    """
    put(room.load, alone_G)
    for c in range(len(parts_C)):
        room.load[copies.rank[c]] += parts_C[c]
    room.cut[:] = True
    room.inside[0] = room.load.sum()
    return settle(levels, copies, parts_C, room, fluid, NO)


@njit(nogil=True)
def spread_steps(levels: Levels, alone_TG: IntArray, copies: Copies, parts_TC: IntArray, fluid_T: Array) -> Array:
    """[T] time of the best split of every step; `parts_TC` [T, C] is brought to it in place."""
    steps, num_ranks = alone_TG.shape
    room, times_T = make_room(num_ranks), np.empty(steps)
    for t in range(steps):
        times_T[t] = spread(levels, alone_TG[t], copies, parts_TC[t], room, fluid_T[t])
    return times_T

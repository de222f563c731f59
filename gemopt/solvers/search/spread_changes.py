"""Changes of one or two slots under the optimal split, each told exactly from the splits of before.

The cut that proves a step's time holds the experts that are on no rank outside. A change that moves none of them across
it cannot shorten the step, and leaves it as it is where the ranks still hold their loads. Otherwise the cut's new load
says how long the step takes at least, and the split goes on from there. What steps take at least rejects most changes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gemopt.kernels import Array
from gemopt.latency import Curves, FloatArray
from gemopt.splits.flow import Copies, IntArray, Number, Room, capacity, level, make_room, settle


class Flow(NamedTuple):
    """Best splits of a row at every step, and what proves them.

    shares_TP: of each slot. load_TG: of each rank; most_TG: what it holds within the step's time. times_T: in
    microseconds. cut_TG: ranks that prove this time; inside_T: load of the experts that are on these alone.
    """

    shares_TP: IntArray
    load_TG: IntArray
    most_TG: IntArray
    times_T: FloatArray
    cut_TG: NDArray[np.bool_]
    inside_T: IntArray


class Change(NamedTuple):
    """Another expert for a slot, or the contents of two slots exchanged.

    slot, other: the slots, -1 without another. experts: [2] what leaves the slot and what comes, -1 for none.
    before, after: ranks of either of them. siblings: [n] the slots that the one that leaves keeps, where there is no
    other: one of them takes its share. rank_P: rank of each slot.
    """

    slot: int
    other: int
    experts: IntArray
    before: tuple[IntArray, IntArray]
    after: tuple[IntArray, IntArray]
    siblings: IntArray
    rank_P: IntArray


class Work(NamedTuple):
    """What trying a change writes into.

    room, parts_P: of the split of one step. moved_T: how much more load is inside of each cut. least_T: time of each
    step, at least. anew_T: whether it was split anew.
    """

    room: Room
    parts_P: IntArray
    moved_T: IntArray
    anew_T: NDArray[np.bool_]
    least_T: FloatArray


def make_work(steps: int, slots: int, ranks: int) -> Work:
    """Room for trying changes."""
    parts_P, moved_T = np.zeros(slots, np.int64), np.zeros(steps, np.int64)
    return Work(make_room(ranks), parts_P, moved_T, np.zeros(steps, np.bool_), np.zeros(steps))


@njit(cache=True, nogil=True)
def fill_most(curves: Curves, flow: Flow) -> None:
    """Fill in what ranks hold within the times of the steps."""
    for t in range(len(flow.times_T)):
        total = flow.load_TG[t].sum()
        for g in range(flow.load_TG.shape[1]):
            flow.most_TG[t, g] = capacity(curves, g, flow.times_T[t], total)


@njit(cache=True, nogil=True)
def within(ranks: IntArray, cut_G: Array) -> bool:
    """Whether all these ranks are in a cut."""
    inside = True
    for g in ranks:
        inside = inside and cut_G[g]
    return inside


@njit(cache=True, nogil=True)
def least_times(
    curves: Curves, counts_TE: Array, fluid_T: Array, flow: Flow, change: Change, work: Work, steps: IntArray
) -> None:
    """Fill in, for some steps, by how much the load inside of the cut grows, and what the step takes at least."""
    members = work.room.queue
    for t in steps:
        cut_G, moved = flow.cut_TG[t], 0
        for n in range(2):
            if change.experts[n] >= 0:
                inside = int(within(change.after[n], cut_G)) - int(within(change.before[n], cut_G))
                moved += inside * counts_TE[t, change.experts[n]]
        work.moved_T[t], work.least_T[t] = moved, flow.times_T[t]
        if moved != 0:
            size = 0
            for g in range(len(cut_G)):
                if cut_G[g]:
                    members[size] = g
                    size += 1
            now, load = flow.times_T[t], flow.inside_T[t] + moved
            known, enough = (now, np.inf) if moved > 0 else (fluid_T[t], now)
            work.least_T[t] = level(curves, members[:size], load, known, enough)


@njit(cache=True, nogil=True)
def receiver(flow: Flow, change: Change, t: int) -> tuple[Number, Number]:
    """The slot that takes what the changed one had, and how much more it has then; -1: none.

    The other slot, or the sibling whose rank has most room.
    """
    best, most, share = change.other, -(2**62), flow.shares_TP[t, change.slot]
    if best >= 0:
        return best, share - flow.shares_TP[t, best]
    for p in change.siblings:
        room = flow.most_TG[t, change.rank_P[p]] - flow.load_TG[t, change.rank_P[p]]
        if room > most:
            best, most = p, room
    return best, share


@njit(cache=True, nogil=True)
def exchange(flow: Flow, change: Change, t: int, shares_P: Array, load_G: Array) -> None:
    """Carry a change out in the shares and loads of a step, which may be those of `flow`."""
    to, net = receiver(flow, change, t)
    if to < 0:
        return
    shares_P[change.slot] -= net
    shares_P[to] += net
    load_G[change.rank_P[change.slot]] -= net
    load_G[change.rank_P[to]] += net


@njit(cache=True, nogil=True)
def split_anew(
    curves: Curves, copies: Copies, flow: Flow, change: Change, then: Flow, work: Work, t: int, fluid: float
) -> float:
    """Write the best split of a step after the change into `then`; returns its time."""
    room, parts_C, shares_P = work.room, work.parts_P[: len(copies.slot)], then.shares_TP[t]
    shares_P[:], room.load[:] = flow.shares_TP[t], flow.load_TG[t]
    room.cut[:], room.most[:] = flow.cut_TG[t], flow.most_TG[t]
    room.inside[0] = flow.inside_T[t] + work.moved_T[t]
    exchange(flow, change, t, shares_P, room.load)
    for c in range(len(parts_C)):
        parts_C[c] = shares_P[copies.slot[c]]
    if work.least_T[t] <= fluid:
        room.cut[:], room.inside[0] = True, room.load.sum()
    time = settle(curves, copies, parts_C, room, work.least_T[t], work.least_T[t] == flow.times_T[t])
    for c in range(len(parts_C)):
        shares_P[copies.slot[c]] = parts_C[c]
    then.load_TG[t], then.most_TG[t], then.cut_TG[t] = room.load, room.most, room.cut
    then.times_T[t], then.inside_T[t] = time, room.inside[0]
    return time


@njit(cache=True, nogil=True)
def holds(flow: Flow, change: Change, t: int) -> bool:
    """Whether the ranks hold what the change brings them within the step's time."""
    to, net = receiver(flow, change, t)
    if to < 0:
        return True
    a, b = change.rank_P[change.slot], change.rank_P[to]
    return bool(flow.load_TG[t, a] - net <= flow.most_TG[t, a] and flow.load_TG[t, b] + net <= flow.most_TG[t, b])


@njit(cache=True, nogil=True)
def saved_on(
    curves: Curves, counts_TE: Array, weights_T: Array, fluid_T: Array, copies: Copies, flow: Flow, change: Change,
    then: Flow, work: Work, steps: IntArray, saved: float, least: float,
) -> float:  # fmt: skip
    """What a change saves on some steps in weighted microseconds, and `saved`; any number below `least` if it is less.

    The steps that are split anew are written into `then`.
    """
    least_times(curves, counts_TE, fluid_T, flow, change, work, steps)
    longer_N = weights_T[steps] * (work.least_T[steps] - flow.times_T[steps])
    saved -= longer_N.sum()
    for t in steps[np.argsort(longer_N)]:  # what promises most is seldom kept
        if saved < least:
            return saved
        work.anew_T[t] = work.moved_T[t] != 0 or not holds(flow, change, t)
        if work.anew_T[t]:
            time = split_anew(curves, copies, flow, change, then, work, t, fluid_T[t])
            saved -= weights_T[t] * (time - work.least_T[t])
    return saved


@njit(cache=True, nogil=True)
def try_change(
    curves: Curves, counts_TE: Array, weights_T: Array, fluid_T: Array, copies: Copies, flow: Flow, change: Change,
    then: Flow, work: Work, order: IntArray, glance: int, least: float,
) -> float:  # fmt: skip
    """Carry a change out where it saves at least so many weighted microseconds, which are returned; else 0.

    copies: those after the change. then: room for the steps that are split anew. order: all steps; a change that loses
    on the first `glance` of them is not looked at any further.
    """
    saved = saved_on(
        curves, counts_TE, weights_T, fluid_T, copies, flow, change, then, work, order[:glance], 0.0, 0.0
    )  # fmt: skip
    if saved < 0.0:
        return 0.0
    saved = saved_on(
        curves, counts_TE, weights_T, fluid_T, copies, flow, change, then, work, order[glance:], saved, least
    )  # fmt: skip
    if saved < least:
        return 0.0
    for t in order:
        if not work.anew_T[t]:
            exchange(flow, change, t, flow.shares_TP[t], flow.load_TG[t])
            continue
        flow.shares_TP[t], flow.load_TG[t], flow.most_TG[t] = then.shares_TP[t], then.load_TG[t], then.most_TG[t]
        flow.times_T[t], flow.cut_TG[t], flow.inside_T[t] = then.times_T[t], then.cut_TG[t], then.inside_T[t]
    return saved

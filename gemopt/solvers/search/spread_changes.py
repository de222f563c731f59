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
from gemopt.solvers.search.spread_moves import Change, make_change
from gemopt.splits.flow import Copies, IntArray, Number, Room, capacity, copies_of, level, make_room, settle


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


class Work(NamedTuple):
    """What trying a change writes into.

    room, parts_P: of the split of one step. moved_T: how much more load is inside of each cut. least_T: time of each
    step, at least; cut_TG, inside_T: ranks that prove it, and their load. anew_T: whether it was split anew.
    """

    room: Room
    parts_P: IntArray
    moved_T: IntArray
    anew_T: NDArray[np.bool_]
    least_T: FloatArray
    cut_TG: NDArray[np.bool_]
    inside_T: IntArray


def make_work(steps: int, slots: int, ranks: int) -> Work:
    """Room for trying changes."""
    parts_P, moved_T, inside_T = np.zeros(slots, np.int64), np.zeros(steps, np.int64), np.zeros(steps, np.int64)
    anew_T, cut_TG = np.zeros(steps, np.bool_), np.zeros((steps, ranks), np.bool_)
    return Work(make_room(ranks), parts_P, moved_T, anew_T, np.zeros(steps), cut_TG, inside_T)


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
def members_of(cut_G: Array, members: IntArray) -> int:
    """Write the ranks of a cut into `members`; returns how many there are."""
    size = 0
    for g in range(len(cut_G)):
        if cut_G[g]:
            members[size] = g
            size += 1
    return size


@njit(cache=True, nogil=True)
def prove(curves: Curves, flow: Flow, work: Work, members: IntArray, load: int, t: int) -> None:
    """Raise what a step takes at least to what some ranks need for a load that they alone must hold."""
    most = 0
    for g in members:
        most += flow.most_TG[t, g]
    if load <= most:
        return
    least = level(curves, members, load, max(flow.times_T[t], work.least_T[t]))
    if least > work.least_T[t]:
        work.least_T[t], work.inside_T[t] = least, load
        work.cut_TG[t] = False
        for g in members:
            work.cut_TG[t, g] = True


@njit(cache=True, nogil=True)
def prove_exchanged(curves: Curves, counts_TE: Array, flow: Flow, change: Change, work: Work, t: int) -> None:
    """Raise it to what the cut needs where the ranks of the two slots change parts in it."""
    a, b = change.rank_P[change.slot], change.rank_P[change.other]
    cut_G, load = flow.cut_TG[t].copy(), flow.inside_T[t] + work.moved_T[t]
    if cut_G[a] == cut_G[b]:
        return
    cut_G[a], cut_G[b] = cut_G[b], cut_G[a]
    for n in range(len(change.near)):
        ranks = change.near_ranks[change.first[n] : change.first[n + 1]]
        load += (int(within(ranks, cut_G)) - int(within(ranks, flow.cut_TG[t]))) * counts_TE[t, change.near[n]]
    size = members_of(cut_G, work.room.queue)
    prove(curves, flow, work, work.room.queue[:size], load, t)


@njit(cache=True, nogil=True)
def least_times(
    curves: Curves, counts_TE: Array, fluid_T: Array, flow: Flow, change: Change, work: Work, steps: IntArray
) -> None:
    """Fill in, for some steps, by how much the load inside of the cut grows, what the step takes at least, and why."""
    members = work.room.queue
    for t in steps:
        cut_G, moved = flow.cut_TG[t], 0
        for n in range(2):
            if change.experts[n] >= 0:
                inside = int(within(change.after[n], cut_G)) - int(within(change.before[n], cut_G))
                moved += inside * counts_TE[t, change.experts[n]]
        work.moved_T[t], work.least_T[t] = moved, flow.times_T[t]
        work.cut_TG[t], work.inside_T[t] = cut_G, flow.inside_T[t] + moved
        if moved != 0:
            size, now = members_of(cut_G, members), flow.times_T[t]
            known, enough = (now, np.inf) if moved > 0 else (fluid_T[t], now)
            work.least_T[t] = level(curves, members[:size], work.inside_T[t], known, enough)
        for n in range(len(change.walls)):
            load = 0
            for e in change.held[n]:
                load += counts_TE[t, e]
            prove(curves, flow, work, change.walls[n], load, t)
        if change.other >= 0:
            prove_exchanged(curves, counts_TE, flow, change, work, t)


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
def exchange(flow: Flow, change: Change, t: int) -> None:
    """Carry a change out in the shares and loads of a step."""
    to, net = receiver(flow, change, t)
    if to < 0:
        return
    flow.shares_TP[t, change.slot] -= net
    flow.shares_TP[t, to] += net
    flow.load_TG[t, change.rank_P[change.slot]] -= net
    flow.load_TG[t, change.rank_P[to]] += net


@njit(cache=True, nogil=True)
def split_anew(curves: Curves, copies: Copies, flow: Flow, change: Change, work: Work, t: int, fluid: float) -> float:
    """Write the best split of a step after the change into `work`; returns its time."""
    room, parts_C = work.room, work.parts_P[: len(copies.slot)]
    room.load[:], room.most[:] = flow.load_TG[t], flow.most_TG[t]
    room.cut[:], room.inside[0] = work.cut_TG[t], work.inside_T[t]
    to, net = receiver(flow, change, t)
    for c in range(len(parts_C)):
        p = copies.slot[c]
        parts_C[c] = flow.shares_TP[t, p]
        if to >= 0 and p == change.slot:
            parts_C[c] -= net
        elif p == to:
            parts_C[c] += net
    if to >= 0:
        room.load[change.rank_P[change.slot]] -= net
        room.load[change.rank_P[to]] += net
    if work.least_T[t] <= fluid:
        room.cut[:], room.inside[0] = True, room.load.sum()
    return settle(curves, copies, parts_C, room, work.least_T[t], work.least_T[t] == flow.times_T[t])


@njit(cache=True, nogil=True)
def keep(copies: Copies, flow: Flow, change: Change, work: Work, t: int, time: float) -> None:
    """Take the split that is in `work` over."""
    room = work.room
    exchange(flow, change, t)
    for c in range(len(copies.slot)):
        flow.shares_TP[t, copies.slot[c]] = work.parts_P[c]
    flow.load_TG[t], flow.most_TG[t], flow.cut_TG[t] = room.load, room.most, room.cut
    flow.times_T[t], flow.inside_T[t] = time, room.inside[0]


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
    work: Work, steps: IntArray, saved: float, least: float,
) -> float:  # fmt: skip
    """What a change saves on some steps in weighted microseconds, and `saved`; if less, any number below `least`."""
    least_times(curves, counts_TE, fluid_T, flow, change, work, steps)
    longer_N = weights_T[steps] * (work.least_T[steps] - flow.times_T[steps])
    saved -= longer_N.sum()
    for t in steps[np.argsort(longer_N)]:  # what promises most is seldom kept
        if saved < least:
            return saved
        longer = work.least_T[t] > flow.times_T[t]
        work.anew_T[t] = longer or work.moved_T[t] != 0 or not holds(flow, change, t)
        if work.anew_T[t]:
            time = split_anew(curves, copies, flow, change, work, t, fluid_T[t])
            saved -= weights_T[t] * (time - work.least_T[t])
    return saved


@njit(cache=True, nogil=True)
def try_change(
    curves: Curves, counts_TE: Array, weights_T: Array, fluid_T: Array, copies: Copies, flow: Flow, change: Change,
    work: Work, order: IntArray, glance: int, least: float,
) -> float:  # fmt: skip
    """Carry a change out where it saves at least so many weighted microseconds, which are returned; else 0.

    copies: those after the change. order: all steps; a change that loses on the first `glance` of them is not looked at
    any further.
    """
    saved = saved_on(curves, counts_TE, weights_T, fluid_T, copies, flow, change, work, order[:glance], 0.0, 0.0)
    if saved < 0.0:
        return 0.0
    saved = saved_on(curves, counts_TE, weights_T, fluid_T, copies, flow, change, work, order[glance:], saved, least)
    if saved < least:
        return 0.0
    for t in order:
        if work.anew_T[t]:
            time = split_anew(curves, copies, flow, change, work, t, fluid_T[t])
            keep(copies, flow, change, work, t, time)
        else:
            exchange(flow, change, t)
    return saved


@njit(cache=True, nogil=True)
def try_drawn(
    curves: Curves, counts_TE: Array, weights_T: Array, fluid_T: Array, row_P: IntArray, rank_P: IntArray,
    barred_EG: Array, slot_P: Array, expert_E: Array, draws_ND: Array, flow: Flow, work: Work, order: IntArray,
    glance: int, least: float,
) -> tuple[int, float]:  # fmt: skip
    """Carry out, in the row too, the first drawn change that saves so much; returns how many are tried and the saving.

    slot_P, expert_E: cumulated, up to 1: how much slots and experts are drawn. draws_ND: [N, 3] numbers below 1.
    """
    size = barred_EG.shape
    for n in range(len(draws_ND)):
        slot, other = int(np.searchsorted(slot_P, draws_ND[n, 1])), int(draws_ND[n, 2] * len(row_P))
        after_P = row_P.copy()
        if draws_ND[n, 0] < 0.5:
            if row_P[slot] < 0:
                slot, other = other, slot
            a, b, x, y = rank_P[slot], rank_P[other], row_P[slot], row_P[other]
            if a == b or x < 0 or x == y or barred_EG[x, b] or (y >= 0 and barred_EG[y, a]):
                continue
            after_P[slot], after_P[other] = y, x
        else:  # an expert where a copy was, or nothing
            slot, other = other, -1
            expert = int(np.searchsorted(expert_E, draws_ND[n, 1]))
            if barred_EG[expert, rank_P[slot]] or (row_P[slot] >= 0 and (row_P == row_P[slot]).sum() < 2):
                continue
            after_P[slot] = expert
        copies, change = copies_of(after_P, rank_P, *size), make_change(row_P, after_P, rank_P, slot, other, size)
        saved = try_change(curves, counts_TE, weights_T, fluid_T, copies, flow, change, work, order, glance, least)
        if saved > 0:
            row_P[:] = after_P
            return n + 1, saved
    return len(draws_ND), 0.0

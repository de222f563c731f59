"""Changes of one or two slots under the optimal split, each told exactly from the splits of before.

The cut that proves a step's time holds the experts that are on no rank outside. A change that moves none of them across
it cannot shorten the step, and leaves it as it is where the ranks still hold their loads. Otherwise the cut's new load
says how long the step takes at least, and the split goes on from there. What steps take at least, by this cut and
others (`spread_cuts`), rejects most changes.

Arrays that a compiled function takes are counted, each at every call: what is called for every step takes few.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.compiling import njit
from gemopt.kernels import MINUS, ZERO, Array, put
from gemopt.latency import FloatArray
from gemopt.solvers.search.sharing_draws import AT_A_GLANCE
from gemopt.solvers.search.spread_cuts import Cuts, bits_of, fill_held, ranks_in, remember, words_for
from gemopt.solvers.search.spread_moves import Change, make_change
from gemopt.splits.flow import Copies, Room, copies_of, make_room, settle
from gemopt.splits.levels import IntArray, Levels, Number, fill_capacity, level, tabled_level


class Flow(NamedTuple):
    """Best splits of a row at every step, and what proves them.

    shares_TP: of each slot. load_TG: of each rank; most_TG: what it holds within the step's time. times_T: in
    microseconds. cuts: what proves them, and others.
    """

    shares_TP: IntArray
    load_TG: IntArray
    most_TG: IntArray
    times_T: FloatArray
    cuts: Cuts


class Work(NamedTuple):
    """What trying a change writes into.

    room, parts_P: of the split of one step. members: [G]. least_T: time of each step, at least; cut_TW, inside_T: bits
    of the ranks that prove it, and their load. moved_T: whether the load inside of the first cut is another; anew_T:
    whether the step was split anew.
    """

    room: Room
    parts_P: IntArray
    members: IntArray
    least_T: FloatArray
    cut_TW: IntArray
    inside_T: IntArray
    moved_T: NDArray[np.bool_]
    anew_T: NDArray[np.bool_]


def make_work(steps: int, slots: int, ranks: int) -> Work:
    """Room for trying changes."""
    parts_P, members, inside_T = np.zeros(slots, np.int64), np.zeros(ranks, np.int64), np.zeros(steps, np.int64)
    cut_TW, moved_T = np.zeros((steps, words_for(ranks)), np.int64), np.zeros(steps, np.bool_)
    return Work(make_room(ranks), parts_P, members, np.zeros(steps), cut_TW, inside_T, moved_T, moved_T.copy())


@njit(nogil=True)
def fill_most(levels: Levels, flow: Flow) -> None:
    """Fill in what ranks and cuts hold within the times of the steps."""
    members = np.empty(flow.load_TG.shape[1], np.int64)
    for t in range(len(flow.times_T)):
        fill_capacity(levels, flow.times_T[t], flow.load_TG[t].sum(), flow.most_TG[t])
        fill_held(flow.cuts, t, flow.most_TG[t], members)


@njit(nogil=True)
def least_times(
    levels: Levels, counts_TE: Array, fluid_T: Array, flow: Flow, change: Change, work: Work, steps: IntArray
) -> None:
    """Fill in, for some steps, what they take at least after a change, and why."""
    ranks_TMW, inside_TM, most_TM, most_TG = flow.cuts.ranks_TMW, flow.cuts.inside_TM, flow.cuts.most_TM, flow.most_TG
    before_2W, after_2W, experts, first, ranks = (
        change.before_2W, change.after_2W, change.experts, change.first, change.ranks
    )  # fmt: skip
    first_held, held, members, words = change.first_held, change.held, work.members, before_2W.shape[1]
    known, walls = inside_TM.shape[1], len(change.ranks_4W)
    for t in steps:
        least, best, proof = flow.times_T[t], 0, 0
        for m in range(known + walls):
            load, most, size = ZERO, ZERO, ZERO
            if m < known:
                load, most = inside_TM[t, m], most_TM[t, m]
                for n in range(2):
                    was, now = 0, 0
                    for w in range(words):
                        was |= before_2W[n, w] & ~ranks_TMW[t, m, w]
                        now |= after_2W[n, w] & ~ranks_TMW[t, m, w]
                    if experts[n] >= 0 and (was == 0) != (now == 0):
                        load += counts_TE[t, experts[n]] if now == 0 else -counts_TE[t, experts[n]]
            else:
                for n in range(first[m - known], first[m - known + 1]):
                    members[size] = ranks[n]
                    most += most_TG[t, ranks[n]]
                    size += 1
                for n in range(first_held[m - known], first_held[m - known + 1]):
                    load += counts_TE[t, held[n]]
            if m == 0:
                proof, work.moved_T[t] = load, load != inside_TM[t, 0]
                least = fluid_T[t] if load < inside_TM[t, 0] else least
            if load <= most and least >= flow.times_T[t]:
                continue
            if m < known:
                size = ranks_in(ranks_TMW[t, m], members)
            time = tabled_level(levels.times_L, levels.held_LG, levels.steady_L, members, size, load, least)
            if time < 0:
                time = level(levels, members[:size], load, least)
            if time > least:
                least, best, proof = time, m, load
        work.least_T[t], work.inside_T[t] = least, proof
        for w in range(words):
            work.cut_TW[t, w] = ranks_TMW[t, best, w] if best < known else change.ranks_4W[best - known, w]


@njit(nogil=True)
def receiver(
    shares_TP: IntArray,
    load_TG: IntArray,
    most_TG: IntArray,
    rank_P: IntArray,
    change: tuple[int, int, IntArray],
    t: int,
) -> tuple[Number, Number]:
    """The slot that takes what the changed one had, and how much more it has then; -1: none.

    The other slot, or the sibling whose rank has most room. change: its slot, other, and siblings.
    """
    slot, best, siblings = change
    most, share = -(2**62), shares_TP[t, slot]
    if best >= 0:
        return best, share - shares_TP[t, best]
    for p in siblings:
        room = most_TG[t, rank_P[p]] - load_TG[t, rank_P[p]]
        if room > most:
            best, most = p, room
    return best, share


@njit(nogil=True)
def exchange(flow: Flow, slot: int, to: int, net: int, rank_P: IntArray, t: int) -> None:
    """Carry a change out in the shares and loads of a step."""
    if to >= 0:
        flow.shares_TP[t, slot] -= net
        flow.shares_TP[t, to] += net
        flow.load_TG[t, rank_P[slot]] -= net
        flow.load_TG[t, rank_P[to]] += net


@njit(nogil=True)
def split_anew(
    levels: Levels, copies: Copies, flow: Flow, work: Work, t: int, fluid: float, moved: tuple[int, int, int],
    rank_P: IntArray,
) -> float:  # fmt: skip
    """Write the best split of a step after the change into `work`; returns its time. moved: slot, `receiver`."""
    room, parts_C, (slot, to, net) = work.room, work.parts_P[: len(copies.slot)], moved
    put(room.load, flow.load_TG[t])
    put(room.most, flow.most_TG[t])
    for c in range(len(parts_C)):
        parts_C[c] = flow.shares_TP[t, copies.slot[c]]
        if to >= 0 and copies.slot[c] == slot:
            parts_C[c] -= net
        elif copies.slot[c] == to:
            parts_C[c] += net
    if to >= 0:
        room.load[rank_P[slot]] -= net
        room.load[rank_P[to]] += net
    room.cut[:], room.inside[0] = True, room.load.sum()
    if work.least_T[t] > fluid:
        room.cut[:], room.inside[0] = False, work.inside_T[t]
        for g in work.members[: ranks_in(work.cut_TW[t], work.members)]:
            room.cut[g] = True
    return settle(levels, copies, parts_C, room, work.least_T[t], work.least_T[t] == flow.times_T[t])


@njit(nogil=True)
def moved_over(counts_TE: Array, cut_W: IntArray, experts: IntArray, from_2W: IntArray, to_2W: IntArray, t: int) -> int:
    """How much more load is inside of a cut where two experts, -1 for none, go from some ranks to others."""
    more = 0
    for n in range(2):
        if experts[n] >= 0:
            more -= counts_TE[t, experts[n]] if ((from_2W[n] & ~cut_W) == 0).all() else 0
            more += counts_TE[t, experts[n]] if ((to_2W[n] & ~cut_W) == 0).all() else 0
    return more


@njit(nogil=True)
def keep(copies: Copies, flow: Flow, work: Work, t: int, time: float) -> None:
    """Take the split that is in `work` over; the cut of before is one of the others then."""
    room, cuts = work.room, flow.cuts
    for c in range(len(copies.slot)):
        flow.shares_TP[t, copies.slot[c]] = work.parts_P[c]
    put(flow.load_TG[t], room.load)
    put(flow.most_TG[t], room.most)
    flow.times_T[t] = time
    old_W, old = cuts.ranks_TMW[t, 0].copy(), cuts.inside_TM[t, 0]
    put(cuts.ranks_TMW[t, 0], bits_of(np.flatnonzero(room.cut), len(old_W)))
    cuts.inside_TM[t, 0] = room.inside[0]
    if old < room.load.sum():
        remember(cuts, t, old_W, old, room.most)
    fill_held(cuts, t, room.most, work.members)


@njit(nogil=True)
def lost_at_least(weights_T: Array, flow: Flow, work: Work, steps: IntArray) -> Array:
    """[N] weighted microseconds that some steps lose at least."""
    lost_N = np.empty(len(steps))
    for n in range(len(steps)):
        t = steps[n]
        lost_N[n] = weights_T[t] * (work.least_T[t] - flow.times_T[t])
    return lost_N


@njit(nogil=True)
def saved_on(
    levels: Levels, counts_TE: Array, weights_T: Array, fluid_T: Array, copies: Copies, flow: Flow, change: Change,
    rank_P: IntArray, work: Work, steps: IntArray, saved: float, least: float,
) -> float:  # fmt: skip
    """What a change saves on some steps in weighted microseconds, and `saved`; if less, any number below `least`."""
    lost_N = lost_at_least(weights_T, flow, work, steps)
    saved -= lost_N.sum()
    of, a = (change.slot, change.other, change.siblings), rank_P[change.slot]
    for t in steps[np.argsort(lost_N)]:  # what promises most is seldom kept
        if saved < least:
            return saved
        to, net = receiver(flow.shares_TP, flow.load_TG, flow.most_TG, rank_P, of, t)
        holds = to < 0 or (
            flow.load_TG[t, a] - net <= flow.most_TG[t, a]
            and flow.load_TG[t, rank_P[to]] + net <= flow.most_TG[t, rank_P[to]]
        )
        work.anew_T[t] = work.least_T[t] > flow.times_T[t] or work.moved_T[t] or not holds
        if work.anew_T[t]:
            moved = (change.slot, int(to), int(net))
            time = split_anew(levels, copies, flow, work, t, fluid_T[t], moved, rank_P)
            if time > work.least_T[t]:
                saved -= weights_T[t] * (time - work.least_T[t])
                cut_W = bits_of(np.flatnonzero(work.room.cut), work.cut_TW.shape[1])
                grown = moved_over(counts_TE, cut_W, change.experts, change.before_2W, change.after_2W, t)
                remember(flow.cuts, t, cut_W, work.room.inside[0] - grown, flow.most_TG[t])
    return saved


@njit(nogil=True)
def try_change(
    levels: Levels, counts_TE: Array, weights_T: Array, fluid_T: Array, after_P: IntArray, rank_P: IntArray, flow: Flow,
    change: Change, work: Work, order: IntArray, glance: int, least: float, size: tuple[int, int],
) -> tuple[bool, float]:  # fmt: skip
    """Carry a change out where it saves at least so many weighted microseconds; whether it does, and the saving.

    after_P: the row after it. order: all steps; a change that loses on the first `glance` of them, and more than part
    of what it may, is not looked at any further.
    """
    enough, some, rest = min(0.0, AT_A_GLANCE * least), order[:glance], order[glance:]
    least_times(levels, counts_TE, fluid_T, flow, change, work, some)
    if -lost_at_least(weights_T, flow, work, some).sum() < enough:
        return False, 0.0
    copies = copies_of(after_P, rank_P, *size)
    given = (levels, counts_TE, weights_T, fluid_T, copies, flow, change, rank_P, work)
    saved = saved_on(*given, some, 0.0, enough)
    if saved < enough:
        return False, saved
    least_times(levels, counts_TE, fluid_T, flow, change, work, rest)
    saved = saved_on(*given, rest, saved, least)
    if saved < least:
        return False, saved
    cuts, of = flow.cuts, (change.slot, change.other, change.siblings)
    for t in order:
        to, net = receiver(flow.shares_TP, flow.load_TG, flow.most_TG, rank_P, of, t)
        time = 0.0
        if work.anew_T[t]:
            moved = (change.slot, int(to), int(net))
            time = split_anew(levels, copies, flow, work, t, fluid_T[t], moved, rank_P)
        for m in range(cuts.inside_TM.shape[1]):
            cut_W = cuts.ranks_TMW[t, m]
            cuts.inside_TM[t, m] += moved_over(counts_TE, cut_W, change.experts, change.before_2W, change.after_2W, t)
        exchange(flow, change.slot, int(to), int(net), rank_P, t)
        if work.anew_T[t]:
            keep(copies, flow, work, t, time)
    return True, saved


@njit(nogil=True)
def try_drawn(
    levels: Levels, counts_TE: Array, weights_T: Array, fluid_T: Array, row_P: IntArray, rank_P: IntArray,
    barred_EG: Array, slot_P: Array, expert_E: Array, draws_ND: Array, flow: Flow, work: Work, order: IntArray,
    glance: int, least_N: Array,
) -> tuple[int, bool, float]:  # fmt: skip
    """Carry out, in the row too, the first drawn change that saves as much as it has to.

    slot_P, expert_E: cumulated, up to 1: how much slots and experts are drawn. draws_ND: [N, 3] numbers below 1.
    least_N: what each has to save, weighted microseconds. Returns how many are tried, whether the last one is carried
    out, and what it saves.
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
            slot, other = other, MINUS
            expert = int(np.searchsorted(expert_E, draws_ND[n, 1]))
            if barred_EG[expert, rank_P[slot]] or (row_P[slot] >= 0 and (row_P == row_P[slot]).sum() < 2):
                continue
            after_P[slot] = expert
        change = make_change(row_P, after_P, rank_P, slot, other, size)
        done, saved = try_change(
            levels, counts_TE, weights_T, fluid_T, after_P, rank_P, flow, change, work, order, glance, least_N[n], size
        )
        if done:
            put(row_P, after_P)
            return n + 1, True, saved
    return len(draws_ND), False, 0.0

"""Changes of copies and of what they take, where the share of a copy depends on the copies of its own expert alone.

Static weights are part of what is searched; under the nearest split who sends decides. A change concerns one or two
experts: some weight goes from one copy to another, two slots change places, an expert gets another copy. It is told
from the loads of the ranks where shares change, all else stays.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gemopt.compiling import njit
from gemopt.kernels import MINUS, PLUS, put
from gemopt.solvers.search.state import Array, Costs, Number, State, bar_clashes, rank_of, rank_times
from gemopt.solvers.search.swaps import slowest_three


class Sharing(NamedTuple):
    """What a search state does not say: how copies share, and which there are.

    counts_ET: in the state's step order. table_FN: features of n assignments. senders_EGT: assignments by sender, or
    nothing. nodes_G: of the ranks. chosen: whether weights are; full: whether no slot is emptied. slot_EG: of each
    copy, or -1; begin_P, end_P: cumulative weights that a slot's share begins and ends with.
    """

    counts_ET: Array
    table_FN: Array
    senders_EGT: Array
    nodes_G: Array
    chosen: bool
    full: bool
    slot_EG: Array
    begin_P: Array
    end_P: Array


class Change(NamedTuple):
    """Slots whose shares change, and room for what becomes of them and of their ranks.

    experts: [2] whose copies change, -1 for none; slot, weight: [2, G] their copies afterwards. size: [2] slots and
    ranks concerned. slots, expert, begin, end, ranks: of each; group: [G] number among these ranks, or -1. items: as of
    the state, of the slots; loads: [., F T] of the ranks, first those of the first steps; times: [., T]. users: [G]
    copies that senders use. slowest, who: [3, T] the three slowest ranks of each step.
    """

    experts: Array
    slot: Array
    weight: Array
    size: Array
    slots: Array
    expert: Array
    begin: Array
    end: Array
    ranks: Array
    group: Array
    items: Array
    loads: Array
    times: Array
    users: Array
    slowest: Array
    who: Array


@njit(nogil=True)
def make_change(state: State) -> Change:
    """Room for changes of a state."""
    slots, features, steps = state.items.shape
    ranks = state.times.shape[0]
    most = min(slots, 2 * ranks + 2)
    slowest, who = np.empty((3, steps), np.float32), np.empty((3, steps), np.int16)
    slowest_three(state.times, slowest, who)
    return Change(
        np.full(2, -1), np.full((2, ranks), -1), np.zeros((2, ranks)), np.zeros(2, np.int64),
        np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most), np.empty(most), np.empty(ranks, np.int64),
        np.full(ranks, -1), np.empty((most, features, steps), np.float32),
        np.empty((ranks, features * steps), np.float32), np.empty((ranks, steps), np.float32),
        np.zeros(ranks, np.int64), slowest, who,
    )  # fmt: skip


@njit(nogil=True)
def nearest_users(nodes_G: Array, slot_G: Array, users_G: Array) -> None:
    """Rank whose copy each sender uses, as `nearest_copies` has it."""
    copies = 0
    for g in range(len(slot_G)):
        copies += slot_G[g] >= 0
    for sender in range(len(slot_G)):
        near = 0
        for g in range(len(slot_G)):
            near += slot_G[g] >= 0 and nodes_G[g] == nodes_G[sender]
        left, own = sender % (near if near > 0 else copies), slot_G[sender] >= 0
        for g in range(len(slot_G)):
            if own:
                users_G[sender] = sender
                break
            if slot_G[g] >= 0 and (near == 0 or nodes_G[g] == nodes_G[sender]):
                if left == 0:
                    users_G[sender] = g
                    break
                left -= 1


@njit(nogil=True)
def concern(change: Change, slot: Number, rank: Number, expert: Number, begin: float, end: float) -> None:
    """Note what a slot holds afterwards."""
    n = change.size[0]
    change.slots[n], change.expert[n], change.begin[n], change.end[n] = slot, expert, begin, end
    change.size[0] += 1
    if change.group[rank] < 0:
        change.group[rank] = change.size[1]
        change.ranks[change.size[1]] = rank
        change.size[1] += 1


@njit(nogil=True)
def take_up(sharing: Sharing, change: Change, x: Number, expert: Number) -> None:
    """Begin with the copies of an expert as they are."""
    change.experts[x] = expert
    if expert >= 0:
        for g in range(change.slot.shape[1]):
            p = sharing.slot_EG[expert, g]
            change.slot[x, g] = p
            change.weight[x, g] = sharing.end_P[p] - sharing.begin_P[p] if p >= 0 else 0.0


@njit(nogil=True)
def list_shares(state: State, sharing: Sharing, change: Change, x: Number) -> None:
    """Note the slots where an expert's share changes, given its copies and weights."""
    expert, taken, last, ranks = change.experts[x], 0.0, MINUS, change.slot.shape[1]
    by_sender = sharing.senders_EGT.shape[2] > 0
    if expert < 0:
        return
    if not sharing.chosen:
        nearest_users(sharing.nodes_G, change.slot[x], change.users)
        change.weight[x] = 0.0
        for g in change.users:
            change.weight[x, g] += 1.0
    for g in range(ranks):
        last = g if change.slot[x, g] >= 0 else last
    for g in range(ranks):
        p = change.slot[x, g]
        if p < 0:
            continue
        weight = change.weight[x, g] if sharing.chosen else change.weight[x, g] / ranks
        begin, taken = taken, 1.0 if g == last else min(1.0, taken + weight)
        same = state.content[p] == expert and begin == sharing.begin_P[p] and taken == sharing.end_P[p]
        if by_sender or not same:
            concern(change, p, g, expert, begin, taken)


@njit(nogil=True)
def fill_item(
    state: State, sharing: Sharing, change: Change, n: Number, lo: Number, hi: Number, loads_FN: Array
) -> None:
    """What a slot holds afterwards at some steps, and the loads of its rank brought up to that."""
    slot: Number = change.slots[n]
    expert, begin, end = change.expert[n], change.begin[n], change.end[n]
    by_sender, rank = sharing.senders_EGT.shape[2] > 0, rank_of(state, slot)
    for f in range(loads_FN.shape[0]):
        old_T, new_T, table_N = state.items[slot, f, lo:hi], change.items[n, f, lo:hi], sharing.table_FN[f]
        if expert < 0:
            new_T[:] = 0.0
        elif by_sender:
            new_T[:] = 0.0
            nearest_users(sharing.nodes_G, change.slot[0 if change.experts[0] == expert else 1], change.users)
            for g in range(len(change.users)):
                if change.users[g] == rank:
                    sent_T = sharing.senders_EGT[expert, g, lo:hi]
                    for t in range(hi - lo):
                        new_T[t] += np.float32(sent_T[t])
            for t in range(hi - lo):
                new_T[t] = table_N[int(new_T[t])]
        else:
            counts_T = sharing.counts_ET[expert, lo:hi]
            for t in range(hi - lo):
                count = counts_T[t]
                new_T[t] = table_N[int(count * end + 0.5) - int(count * begin + 0.5)]
        for t in range(hi - lo):
            loads_FN[f, t] += new_T[t] - old_T[t]


@njit(nogil=True)
def loss_of(costs: Costs, state: State, sharing: Sharing, change: Change, lo: Number, hi: Number) -> float:
    """What a change costs more at some steps, in weighted microseconds."""
    features, size, lost = state.items.shape[1], hi - lo, 0.0
    for k in range(change.size[1]):
        loads_FN = change.loads[k, features * lo : features * hi].reshape((features, size))
        for f in range(features):
            put(loads_FN[f], state.loads[change.ranks[k], f, lo:hi])
    for n in range(change.size[0]):
        at = change.group[rank_of(state, change.slots[n])]
        loads_FN = change.loads[at, features * lo : features * hi].reshape((features, size))
        fill_item(state, sharing, change, n, lo, hi, loads_FN)
    for k in range(change.size[1]):
        loads_FN = change.loads[k, features * lo : features * hi].reshape((features, size))
        rank_times(costs, change.ranks[k], loads_FN, change.times[k, lo:hi])
    for t in range(lo, hi):
        worst, j = np.float32(-1e30), 0
        while j < 3 and change.who[j, t] >= 0 and change.group[change.who[j, t]] >= 0:
            j += 1
        if j < 3:
            worst = change.slowest[j, t]  # of none, where all ranks are concerned
        else:
            for g in range(state.times.shape[0]):
                if change.group[g] < 0:
                    worst = max(worst, state.times[g, t])
        for k in range(change.size[1]):
            worst = max(worst, change.times[k, t])
        lost += np.float64((worst - change.slowest[0, t]) * state.weights[t])
    return lost


@njit(nogil=True)
def carry_out(state: State, sharing: Sharing, change: Change, first: Number) -> None:
    """Carry a change out, whose loss was told on all steps, those up to `first` by themselves."""
    features, steps = state.items.shape[1:]
    for n in range(change.size[0]):
        slot, expert = change.slots[n], change.expert[n]
        old, rank = state.content[slot], rank_of(state, slot)
        if old != expert:
            if old >= 0:
                state.barred[rank, old] -= 1
                sharing.slot_EG[old, rank] = -1
            bar_clashes(state, rank, old, MINUS)
            if expert >= 0:
                state.barred[rank, expert] += 1
                sharing.slot_EG[expert, rank] = slot
            bar_clashes(state, rank, expert, PLUS)
        state.content[slot], sharing.begin_P[slot], sharing.end_P[slot] = expert, change.begin[n], change.end[n]
        for f in range(features):
            put(state.items[slot, f], change.items[n, f])
    for k in range(change.size[1]):
        g = change.ranks[k]
        put(state.times[g], change.times[k])
        for f in range(features):
            put(state.loads[g, f, :first], change.loads[k, f * first : (f + 1) * first])
            at = features * first + f * (steps - first)
            put(state.loads[g, f, first:], change.loads[k, at : at + steps - first])
    slowest_three(state.times, change.slowest, change.who)

"""Compiled search over copies: change what one slot holds (a copy more here, one fewer there) under the true objective.

For every slot the experts are ranked by what they promise to first order; the best of them are tried exactly.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from gemopt.solvers.search.gains import BLOCK
from gemopt.solvers.search.shares import (
    Change,
    Search,
    Shares,
    leaving,
    list_affected,
    list_change,
    make_search,
    refresh,
    share_of,
    time_of,
)
from gemopt.solvers.search.state import Array, Costs, Number, State, bar_clashes, freed, rank_of, rank_times
from gemopt.solvers.search.terms import Terms, moved_into, moves_of, permitted

TRIED = 8  # experts for each slot


@njit(cache=True, nogil=True)
def time_after(costs: Costs, state: State, shares: Shares, change: Change, rank: int, t: int, loads_F: Array) -> Number:
    """Latency of a rank at a step after a change."""
    for f in range(loads_F.shape[0]):
        loads_F[f] = state.loads[rank, f, t]
    for c in range(change.size[0]):
        p = change.slots[c]
        if state.starts[rank] <= p < state.starts[rank + 1]:
            for f in range(loads_F.shape[0]):
                loads_F[f] += share_of(shares, change, c, f, t) - state.items[p, f, t]
    return time_of(costs, rank, loads_F)


@njit(cache=True, nogil=True)
def least_cost(
    costs: Costs, state: State, shares: Shares, change: Change, search: Search, count: int, goal: float, loads_F: Array
) -> float:
    """What the makespans after a change cost at least, from the present `goal` on.

    Each step costs at least what its slowest rank of now takes afterwards, and only where that rank is affected is it
    not what it takes now; nor less than its second, where that one is not affected.
    """
    for n in range(count):
        rank = search.affected[n]
        for k in range(search.first[rank], search.first[rank + 1]):
            t = search.order[k]
            after = time_after(costs, state, shares, change, rank, t, loads_F)
            if search.ranks[1, t] >= 0 and search.group[search.ranks[1, t]] < 0:
                after = max(after, search.slowest[1, t])
            goal += np.float64((after - search.slowest[0, t]) * state.weights[t])
    return goal


@njit(cache=True, nogil=True)
def slowest_unaffected(state: State, search: Search, t: int) -> Number:
    """Latency of the slowest rank at a step that a change leaves alone."""
    for k in range(3):
        rank = search.ranks[k, t]
        if rank < 0:
            return np.float32(-1e30)
        if search.group[rank] < 0:
            return search.slowest[k, t]
    worst = np.float32(-1e30)
    for g in range(state.times.shape[0]):
        if search.group[g] < 0:
            worst = max(worst, state.times[g, t])
    return worst


@njit(cache=True, nogil=True)
def change_cost(
    costs: Costs, state: State, shares: Shares, change: Change, search: Search, count: int, price: float, loads_F: Array
) -> float:
    """Weighted makespan after the change, or infinity as soon as a limit is reached with the price of its moves."""
    steps, cost = state.times.shape[1], 0.0
    for block in range(search.limits.shape[0]):
        for t in range(block * BLOCK, min(steps, (block + 1) * BLOCK)):
            worst = slowest_unaffected(state, search, t)
            for n in range(count):
                worst = max(worst, time_after(costs, state, shares, change, search.affected[n], t, loads_F))
            cost += np.float64(worst * state.weights[t])
        if cost + price >= search.limits[block]:
            return np.inf
    return cost


@njit(cache=True, nogil=True)
def cost_after(
    costs: Costs, state: State, shares: Shares, change: Change, search: Search, current: float, price: float,
    loads_F: Array,
) -> float:  # fmt: skip
    """Weighted makespan after the change, or infinity where it does not pay with the price of its moves."""
    count = list_affected(state, search, change)
    cost = current
    if 2 * count < state.times.shape[0]:  # else it takes as long as the cost itself
        cost = least_cost(costs, state, shares, change, search, count, current, loads_F)
    if cost + price < search.limits[-1] or 2 * count >= state.times.shape[0]:
        cost = change_cost(costs, state, shares, change, search, count, price, loads_F)
    else:
        cost = np.inf
    for n in range(count):
        search.group[search.affected[n]] = -1
    return cost


@njit(cache=True, nogil=True)
def apply_change(costs: Costs, state: State, shares: Shares, change: Change) -> None:
    """Carry the change out."""
    slot, expert = change.slots[0], change.experts[0]
    rank, old = rank_of(state, slot), state.content[slot]
    if old >= 0:
        state.barred[rank, old] -= 1
    if expert >= 0:
        state.barred[rank, expert] += 1
    bar_clashes(state, rank, old, -1)
    bar_clashes(state, rank, expert, 1)
    state.content[slot] = expert
    for c in range(change.size[0]):
        p = change.slots[c]
        g = rank_of(state, p)
        for f in range(state.items.shape[1]):
            for t in range(state.items.shape[2]):
                new = share_of(shares, change, c, f, t)
                state.loads[g, f, t] += new - state.items[p, f, t]
                state.items[p, f, t] = new
    for c in range(change.size[0]):
        g = rank_of(state, change.slots[c])
        rank_times(costs, g, state.loads[g], state.times[g])


@njit(cache=True, nogil=True)
def promising(
    state: State, search: Search, slot: int, candidates: Array, first: int, terms: Terms, moved_G: Array, least: float,
    experts: Array, gains: Array,
) -> int:  # fmt: skip
    """Fill `experts` with those that promise most in a slot, best first; returns how many. `first` -1: none is one too.

    The promise is the change of cost to first order, with the price of the moves; it must be more than `least`.
    """
    rank, old, moved, count = rank_of(state, slot), state.content[slot], moved_G.sum(), 0
    base = leaving(state, search, slot)
    for n in range(first, candidates.shape[0]):
        expert = -1 if n < 0 else candidates[n]
        if expert == old or (expert >= 0 and state.barred[rank, expert] > 0 and not freed(state, rank, expert, old)):
            continue
        added = moves_of(terms, rank, expert) - moves_of(terms, rank, old)
        gain = -base - terms.price * added
        if expert >= 0:
            gain -= search.joins[expert] + search.tilt[expert, 2, rank]
        if gain <= least or (count == experts.shape[0] and gain <= gains[count - 1]):
            continue
        if not permitted(terms, moved, moved_G, rank, rank, added, 0):
            continue
        place = min(count, experts.shape[0] - 1)
        while place > 0 and gains[place - 1] < gain:
            gains[place], experts[place] = gains[place - 1], experts[place - 1]
            place -= 1
        gains[place], experts[place] = gain, expert
        count = min(count + 1, experts.shape[0])
    return count


@njit(cache=True, nogil=True)
def improve_copies(
    costs: Costs, state: State, shares: Shares, candidates: Array, epsilon: float, racing: bool, terms: Terms
) -> int:
    """Try for every spare slot (empty, or a copy of an expert held elsewhere) what promises most; returns changes made.

    candidates: experts worth another copy. With `racing` a change is given up once it costs more so far than now.
    """
    size = 2 * state.times.shape[0] + 2
    change = Change(
        np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64),
        np.zeros(1, np.int64),
    )  # fmt: skip
    loads_F, search = np.empty(state.items.shape[1], np.float32), make_search(state)
    experts, gains = np.empty(TRIED, np.int64), np.empty(TRIED, np.float64)
    moved_G, made, first = moved_into(state, terms), 0, 0 if shares.full else -1
    current = refresh(costs, state, shares, search, epsilon, racing)
    for p in range(state.content.shape[0]):
        old, rank = state.content[p], rank_of(state, p)
        if state.stop[0] != 0 or (old >= 0 and search.copies[old] < 2):
            continue
        count = promising(state, search, p, candidates, first, terms, moved_G, epsilon * current, experts, gains)
        for n in range(count):
            added = moves_of(terms, rank, experts[n]) - moves_of(terms, rank, old)
            list_change(state, search, p, experts[n], change)
            cost = cost_after(costs, state, shares, change, search, current, terms.price * added, loads_F)
            if cost + terms.price * added < current * (1.0 - epsilon):
                apply_change(costs, state, shares, change)
                moved_G[rank] += added
                current = refresh(costs, state, shares, search, epsilon, racing)
                made += 1
                break
    return made


@njit(cache=True, nogil=True)
def removal_costs(costs: Costs, state: State, shares: Shares, search: Search, cost_P: Array) -> None:
    """Fill `cost_P` with the weighted makespan when a slot's copy is gone; infinity where it is the only one."""
    size = 2 * state.times.shape[0] + 2
    change = Change(
        np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64),
        np.zeros(1, np.int64),
    )  # fmt: skip
    loads_F = np.empty(state.items.shape[1], np.float32)
    refresh(costs, state, shares, search, 0.0, False)
    search.limits[:] = np.inf
    for p in range(state.content.shape[0]):
        cost_P[p] = np.inf
        if state.content[p] < 0 or search.copies[state.content[p]] < 2:
            continue
        list_change(state, search, p, -1, change)
        count = list_affected(state, search, change)
        cost_P[p] = change_cost(costs, state, shares, change, search, count, 0.0, loads_F)
        for n in range(count):
            search.group[search.affected[n]] = -1

"""Compiled search over copies: change what one slot holds (a copy more here, one fewer there) under the true objective.

For every slot the experts are ranked by what they promise to first order; the best of them are tried exactly.
"""

from __future__ import annotations

import numpy as np

from gemopt.compiling import njit
from gemopt.kernels import MINUS, NO, PLUS, put
from gemopt.solvers.search.gains import BLOCK
from gemopt.solvers.search.shares import (
    Change,
    Search,
    Shares,
    leaving,
    list_affected,
    list_change,
    make_change,
    make_search,
    refresh,
    share_of,
)
from gemopt.solvers.search.state import Array, Costs, State, bar_clashes, freed, rank_of, rank_times
from gemopt.solvers.search.swaps import EPSILON
from gemopt.solvers.search.terms import Terms, moved_into, moves_of, permitted

TRIED = 8  # experts for each slot


@njit(nogil=True)
def times_after(
    costs: Costs, state: State, shares: Shares, change: Change, search: Search, n: int, steps_N: Array
) -> Array:
    """[N] latencies of the n-th rank that a change affects, after it, at some steps."""
    rank, row, size = search.affected[n], search.row[n], len(steps_N)
    features, after_N = state.items.shape[1], search.after[:size]
    loads_FN = search.loads[: features * size].reshape((features, size))
    for f in range(loads_FN.shape[0]):
        load_T = state.loads[rank, f]
        for k in range(size):
            loads_FN[f, k] = load_T[steps_N[k]]
    while row >= 0:
        for f in range(loads_FN.shape[0]):
            item_T = state.items[change.slots[row], f]
            for k in range(size):
                loads_FN[f, k] += share_of(shares, change, row, f, steps_N[k]) - item_T[steps_N[k]]
        row = change.after[row]
    rank_times(costs, rank, loads_FN, after_N)
    return after_N


@njit(nogil=True)
def least_cost(
    costs: Costs, state: State, shares: Shares, change: Change, search: Search, count: int, goal: float
) -> float:
    """What the makespans after a change cost at least, from the present `goal` on; fills `worst` with them.

    Each step takes at least what its slowest rank of now takes afterwards, and only where that rank is affected is it
    not what it takes now; nor less than its second, where that one is not affected.
    """
    put(search.worst, search.slowest[0])
    for n in range(count):
        rank = search.affected[n]
        steps_N = search.order[search.first[rank] : search.first[rank + 1]]
        if len(steps_N) == 0:
            continue
        after_N = times_after(costs, state, shares, change, search, n, steps_N)
        for k in range(len(steps_N)):
            t, after = steps_N[k], after_N[k]
            if search.ranks[1, t] >= 0 and search.group[search.ranks[1, t]] < 0:
                after = max(after, search.slowest[1, t])
            goal += np.float64((after - search.slowest[0, t]) * state.weights[t])
            search.worst[t] = after
    return goal


@njit(nogil=True)
def raise_to_unaffected(state: State, search: Search, lo: int, hi: int) -> None:
    """Raise `worst` to the slowest rank that a change leaves alone, from one step up to another."""
    for t in range(lo, hi):
        k = 0
        while k < 3 and search.ranks[k, t] >= 0 and search.group[search.ranks[k, t]] >= 0:
            k += 1
        if k < 3:
            search.worst[t] = max(search.worst[t], search.slowest[k, t])
            continue
        for g in range(state.times.shape[0]):
            if search.group[g] < 0:
                search.worst[t] = max(search.worst[t], state.times[g, t])


@njit(nogil=True)
def change_cost(
    costs: Costs, state: State, shares: Shares, change: Change, search: Search, count: int, least: float, price: float
) -> float:
    """Weighted makespan after the change, or infinity as soon as a limit is reached with the price of its moves.

    `worst` holds what every step takes at least, in all `least`: see `least_cost`.
    """
    steps, cost = state.times.shape[1], 0.0
    for block in range(search.limits.shape[0]):
        lo, hi, part = block * BLOCK, min(steps, (block + 1) * BLOCK), 0.0
        for t in range(lo, hi):
            least -= np.float64(search.worst[t] * state.weights[t])
        raise_to_unaffected(state, search, lo, hi)
        for n in range(count):  # those that get load are the first
            after_N, part = times_after(costs, state, shares, change, search, n, search.steps[lo:hi]), 0.0
            for t in range(lo, hi):
                search.worst[t] = max(search.worst[t], after_N[t - lo])
                part += np.float64(search.worst[t] * state.weights[t])
            so_far = cost + part + price
            if so_far >= search.limits[block] or so_far + least >= search.limits[-1]:
                return np.inf
        cost += part
    return cost


@njit(nogil=True)
def cost_after(
    costs: Costs, state: State, shares: Shares, change: Change, search: Search, current: float, price: float
) -> float:
    """Weighted makespan after the change, or infinity where it does not pay with the price of its moves."""
    count, cost = list_affected(state, search, change), np.inf
    least = least_cost(costs, state, shares, change, search, count, current)
    if least + price < search.limits[-1]:
        cost = change_cost(costs, state, shares, change, search, count, least, price)
    for n in range(count):
        search.group[search.affected[n]] = -1
    return cost


@njit(nogil=True)
def apply_change(costs: Costs, state: State, shares: Shares, change: Change) -> None:
    """Carry the change out."""
    slot, old, expert = change.slots[0], change.experts[0], change.experts[1]
    rank = rank_of(state, slot)
    if old >= 0:
        state.barred[rank, old] -= 1
    if expert >= 0:
        state.barred[rank, expert] += 1
    bar_clashes(state, rank, old, MINUS)
    bar_clashes(state, rank, expert, PLUS)
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


@njit(nogil=True)
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


@njit(nogil=True)
def improve_copies(costs: Costs, state: State, shares: Shares, candidates: Array, racing: bool, terms: Terms) -> int:
    """Try for every spare slot (empty, or a copy of an expert held elsewhere) what promises most; returns changes made.

    candidates: experts worth another copy. With `racing` a change is given up once it costs more so far than now.
    """
    search, change = make_search(state), make_change(state)
    experts, gains = np.empty(TRIED, np.int64), np.empty(TRIED, np.float64)
    moved_G, made, first = moved_into(state, terms), 0, 0 if shares.full else -1
    current = refresh(costs, state, shares, search, EPSILON, racing)
    for p in range(state.content.shape[0]):
        old, rank = state.content[p], rank_of(state, p)
        if state.stop[0] != 0 or (old >= 0 and search.copies[old] < 2):
            continue
        count = promising(state, search, p, candidates, first, terms, moved_G, EPSILON * current, experts, gains)
        for n in range(count):
            added = moves_of(terms, rank, experts[n]) - moves_of(terms, rank, old)
            list_change(state, shares, search, p, experts[n], change)
            cost = cost_after(costs, state, shares, change, search, current, terms.price * added)
            if cost + terms.price * added < current * (1.0 - EPSILON):
                apply_change(costs, state, shares, change)
                moved_G[rank] += added
                current = refresh(costs, state, shares, search, EPSILON, racing)
                made += 1
                break
    return made


@njit(nogil=True)
def removal_costs(costs: Costs, state: State, shares: Shares, search: Search, cost_P: Array) -> None:
    """Fill `cost_P` with the weighted makespan when a slot's copy is gone; infinity where it is the only one."""
    change = make_change(state)
    current = refresh(costs, state, shares, search, 0.0, NO)
    search.limits[:] = np.inf
    for p in range(state.content.shape[0]):
        cost_P[p] = np.inf
        if state.content[p] >= 0 and search.copies[state.content[p]] > 1:
            list_change(state, shares, search, p, MINUS, change)
            cost_P[p] = cost_after(costs, state, shares, change, search, current, 0.0)

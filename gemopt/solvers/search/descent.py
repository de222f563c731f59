"""Compiled descent and kicks as in `swaps`, under a price and limits: each swap pays for the experts that it moves."""

from __future__ import annotations

import numpy as np

from gemopt.compiling import njit
from gemopt.kernels import put
from gemopt.solvers.search.gains import Pair, allowed, make_pair, set_tangent
from gemopt.solvers.search.moves import NOISE, swap_for
from gemopt.solvers.search.scans import scan_pair
from gemopt.solvers.search.state import Array, Costs, Number, State, rank_of
from gemopt.solvers.search.swaps import EPSILON, apply_swap, fix_others, slowest_three, take_back, total_cost
from gemopt.solvers.search.terms import Terms, extra_moves, moved_into, permitted, set_fees_of


@njit(nogil=True)
def settle_pair(
    costs: Costs,
    state: State,
    a: Number,
    b: Number,
    pair: Pair,
    terms: Terms,
    moved_G: Array,
    best: Array,
    slots: Array,
    values: Array,
    ranks: Array,
) -> bool:
    """Take the best swap between two ranks until none of theirs pays; True when anything changed."""  # fmt: skip
    changed = False
    while True:
        cost = total_cost(state)
        current = cost + terms.price * moved_G.sum()
        best[0] = max(terms.least, NOISE * abs(cost))
        slots[0] = -1
        fix_others(a, b, values, ranks, pair)
        set_tangent(costs, state, a, b, pair)
        set_fees_of(state, terms, a, b, pair.fees)
        scan_pair(costs, state, a, b, pair, terms, moved_G, best, slots)
        if slots[0] < 0 or state.stop[0] != 0:
            return changed
        if swap_for(costs, state, a, b, slots[2], slots[3], terms, moved_G, current, 0.5 * best[0]) >= current:
            return changed
        slowest_three(state.times, values, ranks)
        changed = True


@njit(nogil=True)
def settle(costs: Costs, state: State, terms: Terms, moved_G: Array, dirty: Array, full: bool) -> Number:
    """Swap until no pair of ranks pays, or until stopped; returns the weighted cost with the price of the moves.

    dirty: [G] ranks whose pairs are to be tried first. With `full`, ends only after all pairs were tried in vain: moves
    that were taken back make room for others elsewhere.
    """
    num_ranks, steps = state.times.shape
    values, ranks = np.empty((3, steps), np.float32), np.empty((3, steps), np.int16)
    pair, best, slots = make_pair(state), np.zeros(1, np.float64), np.zeros(4, np.int64)
    slowest_three(state.times, values, ranks)
    clock = 1
    changed_at = dirty.astype(np.int64)
    tried_at = np.zeros((num_ranks, num_ranks), np.int64)
    everything = False
    while True:
        improved = False
        for a in range(num_ranks):
            for b in range(a + 1, num_ranks):
                if state.stop[0] != 0:
                    return total_cost(state) + terms.price * moved_G.sum()
                if not everything and tried_at[a, b] >= max(changed_at[a], changed_at[b]):
                    continue
                clock += 1
                if settle_pair(costs, state, a, b, pair, terms, moved_G, best, slots, values, ranks):
                    changed_at[a] = changed_at[b] = clock
                    improved = True
                tried_at[a, b] = clock
        if improved:
            everything = False
        elif everything or not full:
            return total_cost(state) + terms.price * moved_G.sum()
        else:
            everything = True


@njit(nogil=True)
def kick_within(costs: Costs, state: State, terms: Terms, moved_G: Array, draws: Array, dirty: Array) -> None:
    """Random swaps that keep to the limits; every second one begins with an expert that has moved, to free its move.

    draws: [n, 3] random numbers in [0, 1): the kind, the first and the second slot.
    """
    size = state.content.shape[0]
    moved = np.empty(size, np.int64)
    for n in range(draws.shape[0]):
        count = 0
        for p in range(size):
            if state.content[p] >= 0 and not terms.home_GE[rank_of(state, p), state.content[p]]:
                moved[count] = p
                count += 1
        home = count > 0 and draws[n, 0] < 0.5
        i: Number = moved[int(draws[n, 1] * count)] if home else int(draws[n, 1] * size)
        a = rank_of(state, i)
        first = int(draws[n, 2] * size)
        for k in range(size):
            j: Number = (first + k) % size
            b = rank_of(state, j)
            if a == b or (home and not terms.home_GE[b, state.content[i]]) or not allowed(state, a, b, i, j):
                continue
            into_a, into_b = extra_moves(state, terms, a, b, i, j)
            if not permitted(terms, moved_G.sum(), moved_G, a, b, into_a, into_b):
                continue
            apply_swap(costs, state, a, b, i, j)
            moved_G[a] += into_a
            moved_G[b] += into_b
            dirty[a] = dirty[b] = True
            break


@njit(nogil=True)
def iterate_within(
    costs: Costs, state: State, terms: Terms, draws: Array, best: float, patience: int, idle: int
) -> tuple[float, int]:
    """Iterated local search: kick, settle, keep what is better, else take all swaps back.

    draws: [kicks, n, 3] random numbers. Returns (best cost with the price of moves, kicks since the last improvement).
    """
    moved_G = moved_into(state, terms)
    everything = patience < 0  # never; a literal False would compile `settle` a second time
    for k in range(draws.shape[0]):
        if idle >= patience or state.stop[0] != 0:
            break
        state.logged[0] = 0
        before_G = moved_G.copy()
        dirty = np.zeros(state.times.shape[0], np.bool_)
        kick_within(costs, state, terms, moved_G, draws[k], dirty)
        cost = settle(costs, state, terms, moved_G, dirty, everything)
        overflow = state.logged[0] > state.log.shape[0]
        if cost < best - EPSILON * abs(best) or overflow:
            best, idle = cost, 0
            continue
        idle += 1
        take_back(costs, state)
        put(moved_G, before_G)
    return best, idle

"""Compiled swap search under the true per-step objective, shared by local search and GEM.

A swap exchanges the contents of two slots of two ranks; an empty slot is a content without load, so a move is a swap
with an empty slot. For a pair of ranks let M[t] be the slowest of all other ranks: a swap then costs
`sum_t w[t] max(M[t], latency_a(L_a - d), latency_b(L_b + d))`. The sum is left early once it plus the remaining M
passes the current value, which loses nothing. While racing it is also left when the steps so far (in random order)
cost more than they do now, which may lose a gain; a descent therefore ends with a sweep over all swaps without racing.
Loads are whole numbers below 2**24, exact in float32. `State.stop` is looked at before every scan of a slot: a search
that is stopped ends with a feasible state, no dearer than the one it had.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from gemopt.solvers.search.gains import BLOCK, Pair, allowed, find_gain, make_pair, set_tangent
from gemopt.solvers.search.state import Array, Costs, Number, State, bar_clashes, rank_of, rank_times

EPSILON = 2e-6


@njit(cache=True, nogil=True)
def apply_swap(costs: Costs, state: State, a: int, b: int, i: int, j: int) -> None:
    """Exchange the contents of slot i of rank a and slot j of rank b, and log it."""
    if state.logged[0] < state.log.shape[0]:
        state.log[state.logged[0], 0], state.log[state.logged[0], 1] = i, j
    state.logged[0] += 1
    expert_i, expert_j = state.content[i], state.content[j]
    if expert_i >= 0:
        state.barred[a, expert_i] -= 1
        state.barred[b, expert_i] += 1
    if expert_j >= 0:
        state.barred[b, expert_j] -= 1
        state.barred[a, expert_j] += 1
    if state.clashes.shape[1] > 0:
        for expert, old, new in ((expert_i, a, b), (expert_j, b, a)):
            bar_clashes(state, old, expert, -1)
            bar_clashes(state, new, expert, 1)
    state.content[i], state.content[j] = expert_j, expert_i
    for f in range(state.items.shape[1]):
        for t in range(state.items.shape[2]):
            d = state.items[i, f, t] - state.items[j, f, t]
            state.loads[a, f, t] -= d
            state.loads[b, f, t] += d
            state.items[i, f, t] -= d
            state.items[j, f, t] += d
    rank_times(costs, a, state.loads[a], state.times[a])
    rank_times(costs, b, state.loads[b], state.times[b])


@njit(cache=True, nogil=True)
def slowest_three(times_GT: Array, values: Array, ranks: Array) -> None:
    """[3, T] latencies and ranks of the three slowest ranks of every step (-1 where there are fewer)."""
    values[:] = np.float32(-1e30)
    ranks[:] = -1
    for g in range(times_GT.shape[0]):
        for t in range(times_GT.shape[1]):
            insert_slowest(times_GT[g, t], g, t, values, ranks)


@njit(cache=True, nogil=True, inline="always")
def insert_slowest(v: Number, g: int, t: int, values: Array, ranks: Array) -> None:
    """Take a rank's latency at a step into the three slowest."""
    if v > values[2, t]:
        if v > values[1, t]:
            values[2, t], ranks[2, t] = values[1, t], ranks[1, t]
            if v > values[0, t]:
                values[1, t], ranks[1, t] = values[0, t], ranks[0, t]
                values[0, t], ranks[0, t] = v, g
            else:
                values[1, t], ranks[1, t] = v, g
        else:
            values[2, t], ranks[2, t] = v, g


@njit(cache=True, nogil=True)
def refresh_three(times_GT: Array, values: Array, ranks: Array, a: int, b: int) -> None:
    """Bring the three slowest ranks up to date after the times of ranks a and b changed."""
    for t in range(times_GT.shape[1]):
        third = values[2, t]
        touched = times_GT[a, t] > third or times_GT[b, t] > third
        for k in range(3):
            touched = touched or ranks[k, t] == a or ranks[k, t] == b
        if touched:
            values[:, t] = np.float32(-1e30)
            ranks[:, t] = -1
            for g in range(times_GT.shape[0]):
                insert_slowest(times_GT[g, t], g, t, values, ranks)


@njit(cache=True, nogil=True)
def mark_slowest(ranks: Array, slowest_G: Array) -> None:
    """[G] whether a rank is the slowest of any step: swaps of two that never are gain nothing."""
    slowest_G[:] = False
    for t in range(ranks.shape[1]):
        slowest_G[ranks[0, t]] = True


@njit(cache=True, nogil=True)
def total_cost(state: State) -> float:
    """Weighted sum of the makespans."""
    total = 0.0
    for t in range(state.times.shape[1]):
        worst = state.times[0, t]
        for g in range(1, state.times.shape[0]):
            worst = max(worst, state.times[g, t])
        total += np.float64(worst) * state.weights[t]
    return total


@njit(cache=True, nogil=True, fastmath=True)
def fix_others(state: State, a: int, b: int, values: Array, ranks: Array, pair: Pair) -> None:
    """Fill `pair` with the slowest rank other than a and b, and with what the steps after each block cost at least."""
    steps = state.times.shape[1]
    others_T, rest = pair.others_T, pair.rest
    first_T, second_T, third_T, rank_T, next_T = values[0], values[1], values[2], ranks[0], ranks[1]
    for t in range(steps):  # all loaded beforehand, so that the choice needs no branch
        first, second, third, r0, r1 = first_T[t], second_T[t], third_T[t], rank_T[t], next_T[t]
        lower = third if (r1 == a) | (r1 == b) else second
        others_T[t] = lower if (r0 == a) | (r0 == b) else first
    rest[-1] = 0.0
    for block in range(rest.shape[0] - 2, -1, -1):
        part = 0.0
        for t in range(block * BLOCK, min(steps, (block + 1) * BLOCK)):
            part += np.float64(max(others_T[t], np.float32(0.0)) * state.weights[t])
        rest[block] = rest[block + 1] + part


@njit(cache=True, nogil=True, fastmath=True)
def set_limits(state: State, a: int, b: int, pair: Pair, racing: bool) -> float:
    """Limits for swaps that must beat the present cost of the pair, which is returned."""
    steps = state.times.shape[1]
    total = 0.0
    for block in range(pair.limits.shape[0]):
        lo, hi = block * BLOCK, min(steps, (block + 1) * BLOCK)
        others_T, weights_T = pair.others_T[lo:hi], state.weights[lo:hi]
        time_a, time_b = state.times[a, lo:hi], state.times[b, lo:hi]
        part = np.float32(0.0)
        for t in range(others_T.shape[0]):
            part += weights_T[t] * max(others_T[t], max(time_a[t], time_b[t]))
        total += np.float64(part)
        pair.limits[block] = total
    goal = total * (1.0 - EPSILON)
    for block in range(pair.limits.shape[0]):
        exact = goal - pair.rest[block + 1]
        pair.limits[block] = min(exact, pair.limits[block]) if racing else exact
    return total


@njit(cache=True, nogil=True)
def improve_pair(costs: Costs, state: State, a: int, b: int, pair: Pair, racing: bool) -> bool:
    """Swap between two ranks until no swap of theirs helps; True when anything changed."""
    current = set_limits(state, a, b, pair, racing)
    changed, improving = False, pair.rest[0] < current * (1.0 - EPSILON)
    if improving:
        set_tangent(costs, state, a, b, pair)
    while improving:
        improving = False
        if pair.rest[0] >= current * (1.0 - EPSILON):
            break
        for i in range(state.starts[a], state.starts[a + 1]):
            j = state.starts[b] - 1
            while state.stop[0] == 0:
                goal = current * (1.0 - EPSILON)
                j = find_gain(costs, state, a, b, i, j + 1, pair, goal)
                if j < 0:
                    break
                apply_swap(costs, state, a, b, i, j)
                renewed = set_limits(state, a, b, pair, racing)
                if renewed >= goal:  # float32 noise, not a gain
                    apply_swap(costs, state, a, b, i, j)
                    set_limits(state, a, b, pair, racing)
                    continue
                set_tangent(costs, state, a, b, pair)
                current = renewed
                improving = changed = True
    return changed


@njit(cache=True, nogil=True)
def descend(costs: Costs, state: State, dirty: Array, full: bool) -> float:
    """Swap until no pair of ranks improves, or until stopped; returns the weighted cost.

    dirty: [G] ranks whose pairs are to be tried first. With `full`, ends only after all pairs were tried in vain.
    """
    num_ranks, steps = state.times.shape
    values = np.empty((3, steps), np.float32)
    ranks = np.empty((3, steps), np.int16)
    pair = make_pair(state)
    if num_ranks < 2:
        return total_cost(state)
    slowest_three(state.times, values, ranks)
    slowest_G = np.empty(num_ranks, np.bool_)
    mark_slowest(ranks, slowest_G)
    clock = 1
    changed_at = np.where(dirty, 1, 0)
    tried_at = np.zeros((num_ranks, num_ranks), np.int64)
    everything = False
    while True:
        improved = False
        for a in range(num_ranks):
            for b in range(a + 1, num_ranks):
                if state.stop[0] != 0:
                    return total_cost(state)
                if not everything and tried_at[a, b] >= max(changed_at[a], changed_at[b]):
                    continue
                clock += 1
                tried_at[a, b] = clock
                if not slowest_G[a] and not slowest_G[b]:
                    continue
                fix_others(state, a, b, values, ranks, pair)
                if improve_pair(costs, state, a, b, pair, not everything):
                    refresh_three(state.times, values, ranks, a, b)
                    mark_slowest(ranks, slowest_G)
                    changed_at[a] = changed_at[b] = clock
                    improved = True
        if improved:
            everything = False
        elif everything or not full:
            return total_cost(state)
        else:
            everything = True


@njit(cache=True, nogil=True)
def kick(costs: Costs, state: State, draws: Array, dirty: Array) -> None:
    """Random swaps of slots given by `draws` [n, 2] in [0, 1)."""
    slots = state.content.shape[0]
    for n in range(draws.shape[0]):
        i, j = int(draws[n, 0] * slots), int(draws[n, 1] * slots)
        a, b = rank_of(state, i), rank_of(state, j)
        if a != b and allowed(state, a, b, i, j):
            apply_swap(costs, state, a, b, i, j)
            dirty[a] = dirty[b] = True


@njit(cache=True, nogil=True)
def iterate(costs: Costs, state: State, draws: Array, best: float, patience: int, idle: int) -> tuple[float, int, int]:
    """Iterated local search: kick, descend, keep what is better, else take all swaps back.

    draws: [kicks, n, 2] random numbers. Returns (best cost, kicks since the last improvement, kicks done).
    """
    done = 0
    everything = patience < 0  # never; a literal False would compile `descend` a second time
    for k in range(draws.shape[0]):
        if idle >= patience or state.stop[0] != 0:
            break
        done += 1
        state.logged[0] = 0
        dirty = np.zeros(state.times.shape[0], np.bool_)
        kick(costs, state, draws[k], dirty)
        cost = descend(costs, state, dirty, everything)
        overflow = state.logged[0] > state.log.shape[0]
        if cost < best * (1.0 - EPSILON) or overflow:
            best, idle = cost, 0
            continue
        idle += 1
        for n in range(min(state.logged[0], state.log.shape[0]) - 1, -1, -1):
            i: Number = np.int64(state.log[n, 0])
            j: Number = np.int64(state.log[n, 1])
            apply_swap(costs, state, rank_of(state, i), rank_of(state, j), i, j)
    return best, idle, done

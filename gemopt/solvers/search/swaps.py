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

from gemopt.compiling import njit
from gemopt.kernels import MINUS, NO, PLUS, YES, put
from gemopt.solvers.search.gains import BLOCK, Pair, allowed, find_gain, make_pair, set_tangent
from gemopt.solvers.search.state import Array, Costs, Number, State, bar_clashes, rank_of, rank_times

EPSILON = 2e-6
MEMBERS = 3  # ranks that a kick stays among
KICK_DRAWS = 1 + MEMBERS + 2 * 2  # whether it is kept, the ranks, two swaps


@njit(nogil=True)
def exchange(item_i: Array, item_j: Array, load_a: Array, load_b: Array) -> None:
    """Exchange the loads [T] of two slots, and bring those of their ranks up to date."""
    for t in range(item_i.shape[0]):
        x, y = item_i[t], item_j[t]
        item_i[t], item_j[t] = y, x
        load_a[t] += y - x
        load_b[t] += x - y


@njit(nogil=True)
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
            bar_clashes(state, old, expert, MINUS)
            bar_clashes(state, new, expert, PLUS)
    state.content[i], state.content[j] = expert_j, expert_i
    for f in range(state.items.shape[1]):
        exchange(state.items[i, f], state.items[j, f], state.loads[a, f], state.loads[b, f])
    rank_times(costs, a, state.loads[a], state.times[a])
    rank_times(costs, b, state.loads[b], state.times[b])


@njit(nogil=True)
def slowest_three(times_GT: Array, values: Array, ranks: Array) -> None:
    """[3, T] latencies and ranks of the three slowest ranks of every step (-1 where there are fewer)."""
    values[:] = np.float32(-1e30)
    ranks[:] = -1
    first_T, second_T, third_T = values[0], values[1], values[2]
    rank_T, next_T, last_T = ranks[0], ranks[1], ranks[2]
    for g in range(times_GT.shape[0]):
        time_T = times_GT[g]
        for t in range(time_T.shape[0]):  # choices without branches: SIMD
            v, first, second, third = time_T[t], first_T[t], second_T[t], third_T[t]
            r0, r1, r2 = rank_T[t], next_T[t], last_T[t]
            last_T[t] = r1 if v > second else (g if v > third else r2)
            next_T[t] = r0 if v > first else (g if v > second else r1)
            rank_T[t] = g if v > first else r0
            third_T[t] = max(third, min(v, second))
            second_T[t] = max(second, min(v, first))
            first_T[t] = max(first, v)


@njit(nogil=True)
def mark_slowest(ranks: Array, slowest_G: Array) -> None:
    """[G] whether a rank is the slowest of any step: swaps of two that never are gain nothing."""
    slowest_G[:] = False
    for t in range(ranks.shape[1]):
        slowest_G[ranks[0, t]] = True


@njit(nogil=True, fastmath=True)
def slower(worst_T: Array, time_T: Array) -> None:
    """Raise [T] latencies to those of another rank."""
    for t in range(worst_T.shape[0]):
        worst_T[t] = max(worst_T[t], time_T[t])


@njit(nogil=True)
def total_cost(state: State) -> float:
    """Weighted sum of the makespans."""
    worst_T = state.times[0].copy()
    for g in range(1, state.times.shape[0]):
        slower(worst_T, state.times[g])
    return weighted_sum(worst_T, state.weights)


@njit(nogil=True)
def weighted_sum(time_T: Array, weights_T: Array) -> float:
    """Sum of products in float64."""
    total = 0.0
    for t in range(time_T.shape[0]):
        total += np.float64(time_T[t]) * weights_T[t]
    return total


@njit(nogil=True, fastmath=True)
def fix_others(a: int, b: int, values: Array, ranks: Array, pair: Pair) -> None:
    """Fill `pair` with the slowest rank other than a and b, and with what the steps after each block cost at least."""
    others_T = pair.others_T
    first_T, second_T, third_T, rank_T, next_T = values[0], values[1], values[2], ranks[0], ranks[1]
    for t in range(others_T.shape[0]):  # all loaded beforehand, so that the choice needs no branch
        first, second, third, r0, r1 = first_T[t], second_T[t], third_T[t], rank_T[t], next_T[t]
        lower = third if (r1 == a) | (r1 == b) else second
        others_T[t] = lower if (r0 == a) | (r0 == b) else first
    set_rest(pair)


@njit(nogil=True, fastmath=True)
def set_rest(pair: Pair) -> None:
    """What the steps after each block cost at least, given the slowest other rank."""
    rest, steps = pair.rest, pair.others_T.shape[0]
    rest[-1] = 0.0
    for block in range(rest.shape[0] - 2, -1, -1):
        lo, hi = block * BLOCK, min(steps, (block + 1) * BLOCK)
        others_T, weights_T = pair.others_T[lo:hi], pair.weights_T[lo:hi]
        part = 0.0
        for t in range(others_T.shape[0]):
            part += np.float64(max(others_T[t], np.float32(0.0)) * weights_T[t])
        rest[block] = rest[block + 1] + part


@njit(nogil=True, fastmath=True)
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


@njit(nogil=True)
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


@njit(nogil=True)
def descend(costs: Costs, state: State, dirty: Array, full: bool) -> float:
    """Swap until no pair of ranks improves, or until stopped; returns the weighted cost.

    dirty: [G] ranks whose pairs are to be tried first. With `full`, ends only after all pairs were tried in vain.
    """
    num_ranks, steps = state.times.shape
    values, ranks, pair = np.empty((3, steps), np.float32), np.empty((3, steps), np.int16), make_pair(state)
    if num_ranks < 2:
        return total_cost(state)
    slowest_three(state.times, values, ranks)
    slowest_G, clock = np.empty(num_ranks, np.bool_), 1
    mark_slowest(ranks, slowest_G)
    changed_at, everything = dirty.astype(np.int64), False
    tried_at = np.zeros((num_ranks, num_ranks), np.int64)
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
                fix_others(a, b, values, ranks, pair)
                if improve_pair(costs, state, a, b, pair, not everything):
                    slowest_three(state.times, values, ranks)
                    mark_slowest(ranks, slowest_G)
                    changed_at[a] = changed_at[b] = clock
                    improved = True
        if not improved and (everything or not full):
            return total_cost(state)
        everything = not improved


def descend_all(costs: Costs, state: State, full: bool) -> float:
    """`descend` that tries the pairs of all ranks."""
    return float(descend(costs, state, np.ones(state.times.shape[0], np.bool_), full))


@njit(nogil=True, inline="always")
def slowest_outside(state: State, members: Array, rest_T: Array) -> None:
    """[T] the slowest rank that is no member."""
    rest_T[:] = np.float32(-1e30)
    for g in range(state.times.shape[0]):
        inside = False
        for member in members:
            inside |= member == g
        if not inside:
            slower(rest_T, state.times[g])


@njit(nogil=True, inline="always")
def kick(costs: Costs, state: State, members: Array, draws: Array) -> None:
    """Random swaps of slots of the members, given by `draws` [2 n] in [0, 1)."""
    size = 0
    for g in members:
        size += state.starts[g + 1] - state.starts[g]
    for n in range(0, draws.shape[0], 2):
        i = slot_of(state, members, int(draws[n] * size))
        j = slot_of(state, members, int(draws[n + 1] * size))
        a, b = rank_of(state, i), rank_of(state, j)
        if a != b and allowed(state, a, b, i, j):
            apply_swap(costs, state, a, b, i, j)


@njit(nogil=True, inline="always")
def slot_of(state: State, members: Array, number: int) -> Number:
    """Slot with this number among those of the members."""
    for g in members:
        size = state.starts[g + 1] - state.starts[g]
        if number < size:
            return np.int64(state.starts[g] + number)
        number -= size
    return np.int64(-1)


@njit(nogil=True, inline="always")
def settle_members(costs: Costs, state: State, members: Array, rest_T: Array, pair: Pair) -> None:
    """Swap between the members until no pair of them improves, or until stopped; rest_T: slowest of all other ranks."""
    clock, improved = 1, True
    changed_at = np.ones(members.shape[0], np.int64)
    tried_at = np.zeros((members.shape[0], members.shape[0]), np.int64)
    while improved:
        improved = False
        for x in range(members.shape[0]):
            for y in range(x + 1, members.shape[0]):
                if state.stop[0] != 0 or tried_at[x, y] >= max(changed_at[x], changed_at[y]):
                    continue
                clock += 1
                tried_at[x, y] = clock
                put(pair.others_T, rest_T)
                for z in range(members.shape[0]):
                    if z != x and z != y:  # noqa: PLR1714 - a tuple takes long to compile
                        slower(pair.others_T, state.times[members[z]])
                set_rest(pair)
                if improve_pair(costs, state, members[x], members[y], pair, YES):
                    changed_at[x] = changed_at[y] = clock
                    improved = True


@njit(nogil=True)
def iterate(costs: Costs, state: State, draws: Array, best: float, row: Array, losses: Array, heat: float) -> float:
    """Iterated local search: kick a few ranks, descend among them, keep what is better, else take all swaps back.

    With `heat` kicks that end worse are kept as well, with the chances of simulated annealing at a temperature of so
    many times what a kick loses in the mean. draws: [kicks, 1 + ranks + 2 n] random numbers; row: [P] set to the best
    content; losses: [2] sum over kicks, and their number, brought up to date. Returns the best cost.
    """
    num_ranks, steps = state.times.shape
    order, members = np.arange(num_ranks), np.empty(min(MEMBERS, num_ranks), np.int64)
    rest_T, worst_T = np.empty(steps, np.float32), np.empty(steps, np.float32)
    pair = make_pair(state)
    for k in range(draws.shape[0]):
        if state.stop[0] != 0:
            break
        for n in range(members.shape[0]):
            other = n + int(draws[k, 1 + n] * (num_ranks - n))
            order[n], order[other] = order[other], order[n]
            members[n] = order[n]
        slowest_outside(state, members, rest_T)
        before = cost_among(state, members, rest_T, worst_T)
        state.logged[0] = 0
        kick(costs, state, members, draws[k, 1 + MEMBERS :])
        settle_members(costs, state, members, rest_T, pair)
        cost = cost_among(state, members, rest_T, worst_T)
        losses[0] += max(0.0, cost - before)
        losses[1] += 1.0
        kept = cost < before * (1.0 - EPSILON) - heat * losses[0] / losses[1] * np.log(1.0 - draws[k, 0])
        if not kept and state.logged[0] <= state.log.shape[0]:
            take_back(costs, state)
        elif cost < best * (1.0 - EPSILON):
            if heat == 0.0:  # else the descent would end the walk
                dirty = np.zeros(num_ranks, np.bool_)
                for g in members:
                    dirty[g] = True
                cost = descend(costs, state, dirty, NO)
            best = cost
            put(row, state.content)
    return best


@njit(nogil=True, inline="always")
def cost_among(state: State, members: Array, rest_T: Array, worst_T: Array) -> float:
    """Weighted sum of the makespans, given the slowest rank outside; worst_T: room."""
    put(worst_T, rest_T)
    for g in members:
        slower(worst_T, state.times[g])
    return weighted_sum(worst_T, state.weights)


@njit(nogil=True, inline="always")
def take_back(costs: Costs, state: State) -> None:
    """Undo all swaps of the log."""
    for n in range(state.logged[0] - 1, -1, -1):
        i: Number = np.int64(state.log[n, 0])
        j: Number = np.int64(state.log[n, 1])
        apply_swap(costs, state, rank_of(state, i), rank_of(state, j), i, j)

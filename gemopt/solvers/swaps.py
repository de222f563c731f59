"""Compiled swap search under the true per-step objective, shared by local search and GEM.

A swap exchanges the contents of two slots of two ranks; an empty slot is a content without load, so a move is a swap
with an empty slot. For a pair of ranks let M[t] be the slowest of all other ranks: a swap then costs
`sum_t w[t] max(M[t], latency_a(L_a - d), latency_b(L_b + d))`. The sum is left early once it plus the remaining M
passes the current value, which loses nothing. While racing it is also left when the steps so far (in random order)
cost more than they do now, which may lose a gain; a descent therefore ends with a sweep over all swaps without racing.
Loads are whole numbers below 2**24, exact in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gemopt.exceptions import UnsupportedError
from gemopt.latency import Latency
from gemopt.placement import EMPTY
from gemopt.problem import Problem

Array = NDArray[Any]
BLOCK = 256
TABLE_LIMIT = 1 << 18
EXACT_FLOAT32 = 1 << 24
EPSILON = 2e-6
LOG_SIZE = 1 << 13
UNROLLED_PLANES = 5


class Costs(NamedTuple):
    """Latencies as the kernels read them: planes [G, K, 1 + F], or tables with one entry per `stride` of load."""

    planes: Array
    tables: Array
    offsets: Array
    strides: Array
    num_terms: Array
    use_tables: bool


class State(NamedTuple):
    """A placement under search. P slots, G ranks, F features, T steps.

    content: [P] expert or -1; items: [P, F, T] its load; starts: [G + 1] first slot of each rank; loads: [G, F, T];
    times: [G, T]; holds: [G, E] copies of an expert on a rank; weights: [T]; log: [n, 2] slots of the last swaps, and
    logged: [1] how many there were.
    """

    content: Array
    items: Array
    starts: Array
    loads: Array
    times: Array
    holds: Array
    weights: Array
    log: Array
    logged: Array


class Pair(NamedTuple):
    """What stays fixed while two ranks swap.

    others_T: slowest other rank; weights_T; limits: [blocks] give a swap up when its cost up to and including the block
    reaches this; rest: [blocks + 1] least cost of the steps from each block on.
    """

    others_T: Array
    weights_T: Array
    limits: Array
    rest: Array


def hull_costs(problem: Problem) -> Costs | None:
    """Convex hulls of the latencies as planes, where they have a shape with a SIMD kernel of its own; else None.

    Those are one line of one feature (a hull within 3 % of one around the mean load counts), and up to five planes of
    two features.
    """
    rows = [_line_about_mean(problem, latency) for latency in problem.latencies]
    if len(problem.features) == 2:
        rows = [latency.planes(limit=UNROLLED_PLANES) for latency in problem.latencies]
    if any(row is None or len(row) > UNROLLED_PLANES for row in rows):
        return None
    return _plane_costs([row for row in rows if row is not None])


def _line_about_mean(problem: Problem, latency: Latency) -> Array | None:
    """[1, 2] intercept and slope close to the hull of a latency of one feature, or None."""
    if len(problem.features) != 1:
        return None
    mean = float(problem.features_FTE[0].sum(axis=1).mean()) / problem.num_ranks
    loads = np.linspace(0.25, 2.5, 16) * max(mean, 1.0)
    planes_K2 = latency.planes(limit=64)
    values = (planes_K2[:, :1] + planes_K2[:, 1:] * loads).max(axis=0)
    slope, intercept = np.polyfit(loads, values, 1)
    close = np.abs(intercept + slope * loads - values) <= 0.03 * np.abs(values)
    return np.array([[intercept, slope]]) if close.all() else None


def _plane_costs(rows: list[Array]) -> Costs:
    features = rows[0].shape[1] - 1
    most = UNROLLED_PLANES if features == 2 else max(map(len, rows))
    planes = np.zeros((len(rows), most, 1 + features), dtype=np.float32)
    planes[:, :, 0] = -1e30
    for g, row in enumerate(rows):
        planes[g, : len(row)] = row
    none = np.zeros((1, 1, 1), np.int64)
    return Costs(planes, np.zeros(1, np.float32), none, none[0, 0], none[0, 0], False)


def make_costs(problem: Problem) -> Costs:
    """The latencies themselves: planes where they are few enough, else tables (interpolated beyond 262144 loads)."""
    features = len(problem.features)
    if all(latency.max_affine for latency in problem.latencies):
        rows = [latency.planes() for latency in problem.latencies]
        most = max(map(len, rows))
        if (features == 1 and most == 1) or (features == 2 and most <= UNROLLED_PLANES):
            return _plane_costs(rows)
    largest = problem.features_FTE.sum(axis=2).max(axis=1) if not problem.spare_slots else _largest_with_copies(problem)
    strides = np.array([1 << max(0, int(np.ceil(np.log2((n + 1) / TABLE_LIMIT)))) for n in largest], np.int64)
    grids = [np.arange(int(n) // int(s) + 3) * int(s) for n, s in zip(largest, strides, strict=True)]
    curves = [_table_terms(latency, grids) for latency in problem.latencies]
    terms = np.array([len(each) for each in curves], np.int64)
    offsets = np.zeros((problem.num_ranks, int(terms.max()), features), np.int64)
    tables: list[Array] = []
    position = 0
    for g, each in enumerate(curves):
        for k, term in enumerate(each):
            for f, table in enumerate(term):
                offsets[g, k, f] = position
                tables.append(table.astype(np.float32))
                position += len(table)
    planes = np.zeros((problem.num_ranks, 1, 1 + features), np.float32)
    return Costs(planes, np.concatenate(tables), offsets, strides, terms, True)


def _table_terms(latency: Latency, grids: list[Array]) -> list[list[Array]]:
    """Tables of every term and feature; with one feature the terms collapse into one."""
    if len(grids) == 1:
        return [[latency([grids[0]])]]
    return [[curve(grid) for curve, grid in zip(term, grids, strict=True)] for term in latency.terms]


def _largest_with_copies(problem: Problem) -> Array:
    """[F] no rank can be loaded above the sum over all experts, whatever the copies."""
    return np.asarray(problem.features_FTE.sum(axis=2).max(axis=1) + problem.num_experts)


def step_order(num_steps: int) -> Array:
    """[T] the fixed random order in which the search goes through the steps."""
    return np.random.default_rng(0).permutation(num_steps)


def make_state(problem: Problem, row: NDArray[np.int64], costs: Costs) -> State:
    """Search state of a placement row; copies carry their even share with them."""
    from gemopt.evaluate import even_shares

    if problem.features_FTE.sum(axis=2).max() >= EXACT_FLOAT32:
        raise UnsupportedError(
            "counts", int(problem.counts_TE.sum(axis=1).max()), f"the search takes steps below {EXACT_FLOAT32} loads"
        )
    order = step_order(problem.num_steps)
    shares = even_shares(problem.counts_TE[order], row)
    items = np.ascontiguousarray(
        np.stack([feature.of(shares) for feature in problem.features]).transpose(2, 0, 1), dtype=np.float32
    )
    starts = np.concatenate([[0], np.cumsum(problem.slots_per_rank)])
    holds = np.zeros((problem.num_ranks, problem.num_experts), np.int32)
    held = row != EMPTY
    np.add.at(holds, (problem.rank_of_slot[held], row[held]), 1)
    loads = np.zeros((problem.num_ranks, items.shape[1], items.shape[2]), np.float32)
    for slot, rank in enumerate(problem.rank_of_slot):
        loads[rank] += items[slot]
    times = np.zeros((problem.num_ranks, items.shape[2]), np.float32)
    weights = problem.weights_T[order].astype(np.float32)
    log, logged = np.zeros((LOG_SIZE, 2), np.int32), np.zeros(1, np.int64)
    state = State(row.copy(), items, starts, loads, times, holds, weights, log, logged)
    for rank in range(problem.num_ranks):
        rank_times(costs, rank, state.loads[rank], state.times[rank])
    return state


@njit(cache=True, nogil=True, fastmath=True)
def rank_times(costs: Costs, rank: int, loads_FT: Array, out_T: Array) -> None:
    """Latency of one rank at every step."""
    features, steps = loads_FT.shape
    if not costs.use_tables:
        out_T[:] = np.float32(-1e30)
        for k in range(costs.planes.shape[1]):
            plane = costs.planes[rank, k]
            for t in range(steps):
                value = plane[0]
                for f in range(features):
                    value += plane[1 + f] * loads_FT[f, t]
                out_T[t] = max(out_T[t], value)
        return
    for t in range(steps):
        best = np.float32(-1e30)
        for k in range(costs.num_terms[rank]):
            value = np.float32(0.0)
            for f in range(features):
                value += lookup(costs, rank, k, f, loads_FT[f, t])
            best = max(best, value)
        out_T[t] = best


@njit(cache=True, nogil=True, fastmath=True, inline="always")
def lookup(costs: Costs, rank: int, term: int, feature: int, load: float) -> float:
    """Table value at a load, interpolated when the table is coarser than one load."""
    stride = costs.strides[feature]
    offset = costs.offsets[rank, term, feature]
    index = np.int64(load)
    if stride == 1:
        return costs.tables[offset + index]
    cell = index // stride
    low = costs.tables[offset + cell]
    part = np.float32(index - cell * stride) / np.float32(stride)
    return low + part * (costs.tables[offset + cell + 1] - low)


@njit(cache=True, nogil=True, fastmath=True)
def affine_gain(costs: Costs, state: State, a: int, b: int, i: int, first: int, pair: Pair, goal: float) -> int:
    """First slot j >= `first` of rank b whose swap with i costs less than `goal`, or -1; lines of one feature."""
    a0, a1, b0, b1 = costs.planes[a, 0, 0], costs.planes[a, 0, 1], costs.planes[b, 0, 0], costs.planes[b, 0, 1]
    steps = state.items.shape[2]
    for j in range(first, state.starts[b + 1]):
        if not allowed(state, a, b, i, j):
            continue
        cost = 0.0
        for block in range(pair.limits.shape[0]):
            lo, hi = block * BLOCK, min(steps, (block + 1) * BLOCK)
            item_i, item_j = state.items[i, 0, lo:hi], state.items[j, 0, lo:hi]
            load_a, load_b = state.loads[a, 0, lo:hi], state.loads[b, 0, lo:hi]
            others_T, weights_T = pair.others_T[lo:hi], pair.weights_T[lo:hi]
            part = np.float32(0.0)
            for t in range(item_i.shape[0]):  # views from 0: the compiler then knows the bounds and emits SIMD
                d = item_i[t] - item_j[t]
                value = max(a0 + a1 * (load_a[t] - d), b0 + b1 * (load_b[t] + d))
                part += weights_T[t] * max(others_T[t], value)
            cost += np.float64(part)
            if cost >= pair.limits[block]:
                cost = np.inf
                break
        if cost < goal:
            return j
    return -1


@njit(cache=True, nogil=True, fastmath=True)
def table_gain(costs: Costs, state: State, a: int, b: int, i: int, first: int, pair: Pair, goal: float) -> int:
    """As `affine_gain`, each latency being one table of one feature."""
    table_a, table_b = costs.tables[costs.offsets[a, 0, 0] :], costs.tables[costs.offsets[b, 0, 0] :]
    steps = state.items.shape[2]
    for j in range(first, state.starts[b + 1]):
        if not allowed(state, a, b, i, j):
            continue
        cost = 0.0
        for block in range(pair.limits.shape[0]):
            lo, hi = block * BLOCK, min(steps, (block + 1) * BLOCK)
            item_i, item_j = state.items[i, 0, lo:hi], state.items[j, 0, lo:hi]
            load_a, load_b = state.loads[a, 0, lo:hi], state.loads[b, 0, lo:hi]
            others_T, weights_T = pair.others_T[lo:hi], pair.weights_T[lo:hi]
            part = np.float32(0.0)
            for t in range(item_i.shape[0]):
                d = item_i[t] - item_j[t]
                value = max(table_a[np.uint32(load_a[t] - d)], table_b[np.uint32(load_b[t] + d)])
                part += weights_T[t] * max(others_T[t], value)
            cost += np.float64(part)
            if cost >= pair.limits[block]:
                cost = np.inf
                break
        if cost < goal:
            return j
    return -1


@njit(cache=True, nogil=True, fastmath=True, inline="always")
def five_planes(p: Array, x: float, y: float) -> float:
    """Largest of five planes in two features, unrolled so that the loop around it is SIMD."""
    low = max(p[0, 0] + p[0, 1] * x + p[0, 2] * y, p[1, 0] + p[1, 1] * x + p[1, 2] * y)
    mid = max(p[2, 0] + p[2, 1] * x + p[2, 2] * y, p[3, 0] + p[3, 1] * x + p[3, 2] * y)
    return max(max(low, mid), p[4, 0] + p[4, 1] * x + p[4, 2] * y)


@njit(cache=True, nogil=True, fastmath=True)
def roofline_gain(costs: Costs, state: State, a: int, b: int, i: int, first: int, pair: Pair, goal: float) -> int:
    """As `affine_gain`, for maxima of up to five planes in two features."""
    planes_a, planes_b = costs.planes[a], costs.planes[b]
    steps = state.items.shape[2]
    for j in range(first, state.starts[b + 1]):
        if not allowed(state, a, b, i, j):
            continue
        cost = 0.0
        for block in range(pair.limits.shape[0]):
            lo, hi = block * BLOCK, min(steps, (block + 1) * BLOCK)
            item_i0, item_i1 = state.items[i, 0, lo:hi], state.items[i, 1, lo:hi]
            item_j0, item_j1 = state.items[j, 0, lo:hi], state.items[j, 1, lo:hi]
            load_a0, load_a1 = state.loads[a, 0, lo:hi], state.loads[a, 1, lo:hi]
            load_b0, load_b1 = state.loads[b, 0, lo:hi], state.loads[b, 1, lo:hi]
            others_T, weights_T = pair.others_T[lo:hi], pair.weights_T[lo:hi]
            part = np.float32(0.0)
            for t in range(others_T.shape[0]):
                d0, d1 = item_i0[t] - item_j0[t], item_i1[t] - item_j1[t]
                time_a = five_planes(planes_a, load_a0[t] - d0, load_a1[t] - d1)
                time_b = five_planes(planes_b, load_b0[t] + d0, load_b1[t] + d1)
                part += weights_T[t] * max(others_T[t], max(time_a, time_b))
            cost += np.float64(part)
            if cost >= pair.limits[block]:
                cost = np.inf
                break
        if cost < goal:
            return j
    return -1


@njit(cache=True, nogil=True, fastmath=True)
def general_gain(costs: Costs, state: State, a: int, b: int, i: int, first: int, pair: Pair, goal: float) -> int:
    """As `affine_gain`, for any latency, from tables."""
    features, steps = state.items.shape[1], state.items.shape[2]
    for j in range(first, state.starts[b + 1]):
        if not allowed(state, a, b, i, j):
            continue
        cost = 0.0
        for block in range(pair.limits.shape[0]):
            for t in range(block * BLOCK, min(steps, (block + 1) * BLOCK)):
                worst = pair.others_T[t]
                for side in range(2):
                    rank = a if side == 0 else b
                    sign = np.float32(-1.0) if side == 0 else np.float32(1.0)
                    for k in range(costs.num_terms[rank]):
                        value = np.float32(0.0)
                        for f in range(features):
                            d = state.items[i, f, t] - state.items[j, f, t]
                            value += lookup(costs, rank, k, f, state.loads[rank, f, t] + sign * d)
                        worst = max(worst, value)
                cost += np.float64(pair.weights_T[t] * worst)
            if cost >= pair.limits[block]:
                cost = np.inf
                break
        if cost < goal:
            return j
    return -1


@njit(cache=True, nogil=True)
def find_gain(costs: Costs, state: State, a: int, b: int, i: int, first: int, pair: Pair, goal: float) -> int:
    """First slot j >= `first` of rank b whose swap with slot i of rank a costs less than `goal`, or -1."""
    if costs.use_tables:
        one = state.items.shape[1] == 1 and costs.strides[0] == 1
        if one and costs.num_terms[a] == 1 and costs.num_terms[b] == 1:
            return table_gain(costs, state, a, b, i, first, pair, goal)
        return general_gain(costs, state, a, b, i, first, pair, goal)
    if state.items.shape[1] == 1:
        return affine_gain(costs, state, a, b, i, first, pair, goal)
    return roofline_gain(costs, state, a, b, i, first, pair, goal)


@njit(cache=True, nogil=True)
def apply_swap(costs: Costs, state: State, a: int, b: int, i: int, j: int) -> None:
    """Exchange the contents of slot i of rank a and slot j of rank b, and log it."""
    if state.logged[0] < state.log.shape[0]:
        state.log[state.logged[0], 0], state.log[state.logged[0], 1] = i, j
    state.logged[0] += 1
    expert_i, expert_j = state.content[i], state.content[j]
    if expert_i >= 0:
        state.holds[a, expert_i] -= 1
        state.holds[b, expert_i] += 1
    if expert_j >= 0:
        state.holds[b, expert_j] -= 1
        state.holds[a, expert_j] += 1
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
def allowed(state: State, a: int, b: int, i: int, j: int) -> bool:
    """Whether a swap changes anything and keeps at most one copy of an expert on each rank."""
    expert_i, expert_j = state.content[i], state.content[j]
    if expert_i == expert_j:
        return False
    if expert_i >= 0 and state.holds[b, expert_i] > 0:
        return False
    return not (expert_j >= 0 and state.holds[a, expert_j] > 0)


@njit(cache=True, nogil=True)
def slowest_three(times_GT: Array, values: Array, ranks: Array) -> None:
    """[3, T] latencies and ranks of the three slowest ranks of every step (-1 where there are fewer)."""
    num_ranks, steps = times_GT.shape
    values[:] = np.float32(-1e30)
    ranks[:] = -1
    for g in range(num_ranks):
        for t in range(steps):
            v = times_GT[g, t]
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
            slowest_three(times_GT[:, t : t + 1], values[:, t : t + 1], ranks[:, t : t + 1])


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
    for t in range(steps):
        out = values[0, t]
        if ranks[0, t] == a or ranks[0, t] == b:
            out = values[1, t]
            if ranks[1, t] == a or ranks[1, t] == b:
                out = values[2, t]
        others_T[t] = out
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
    changed, improving = False, True
    while improving:
        improving = False
        if pair.rest[0] >= current * (1.0 - EPSILON):
            break
        for i in range(state.starts[a], state.starts[a + 1]):
            j = state.starts[b] - 1
            while True:
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
                current = renewed
                improving = changed = True
    return changed


@njit(cache=True, nogil=True)
def descend(costs: Costs, state: State, dirty: Array, full: bool) -> float:
    """Swap until no pair of ranks improves; returns the weighted cost.

    dirty: [G] ranks whose pairs are to be tried first. With `full`, ends only after all pairs were tried in vain.
    """
    num_ranks, steps = state.times.shape
    values = np.empty((3, steps), np.float32)
    ranks = np.empty((3, steps), np.int16)
    rest = np.empty((steps + BLOCK - 1) // BLOCK + 1, np.float64)
    limits = np.empty(rest.shape[0] - 1, np.float64)
    pair = Pair(np.empty(steps, np.float32), state.weights, limits, rest)
    if num_ranks < 2:
        return total_cost(state)
    slowest_three(state.times, values, ranks)
    clock = 1
    changed_at = np.where(dirty, 1, 0)
    tried_at = np.zeros((num_ranks, num_ranks), np.int64)
    everything = False
    while True:
        improved = False
        for a in range(num_ranks):
            for b in range(a + 1, num_ranks):
                if not everything and tried_at[a, b] >= max(changed_at[a], changed_at[b]):
                    continue
                clock += 1
                fix_others(state, a, b, values, ranks, pair)
                if improve_pair(costs, state, a, b, pair, not everything):
                    refresh_three(state.times, values, ranks, a, b)
                    changed_at[a] = changed_at[b] = clock
                    improved = True
                tried_at[a, b] = clock
        if improved:
            everything = False
        elif everything or not full:
            return total_cost(state)
        else:
            everything = True


@njit(cache=True, nogil=True)
def rank_of(state: State, slot: int) -> int:
    """Rank that owns a slot."""
    return np.int64(np.searchsorted(state.starts, slot, side="right") - 1)


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
    for k in range(draws.shape[0]):
        if idle >= patience:
            break
        done += 1
        state.logged[0] = 0
        dirty = np.zeros(state.times.shape[0], np.bool_)
        kick(costs, state, draws[k], dirty)
        cost = descend(costs, state, dirty, False)
        overflow = state.logged[0] > state.log.shape[0]
        if cost < best * (1.0 - EPSILON) or overflow:
            best, idle = cost, 0
            continue
        idle += 1
        for n in range(min(state.logged[0], state.log.shape[0]) - 1, -1, -1):
            i, j = state.log[n, 0], state.log[n, 1]
            apply_swap(costs, state, rank_of(state, i), rank_of(state, j), i, j)
    return best, idle, done

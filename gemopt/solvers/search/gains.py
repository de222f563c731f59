"""Compiled scans: the first swap of a slot with any slot of another rank that costs less than a goal.

One scan, with a kernel for a block of steps per form of the latencies, which is chosen in the loop itself: in a
function of its own, inlined or not, sums are no longer SIMD and take three times as long. The sum over the steps is
left as soon as it reaches a limit (see `Pair`). Where latencies are convex the cost of a swap is convex in the loads it
moves, so it is at least its tangent: swaps that the tangent does not let gain are skipped, which loses nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gemopt.compiling import njit
from gemopt.solvers.search.state import Array, Costs, Number, State, freed, lookup

BLOCK = 256
LINE, TABLE, ROOFLINE, GENERAL = range(4)  # forms of latencies with a kernel of their own


class Pair(NamedTuple):
    """What stays fixed while two ranks swap.

    others_T: slowest other rank; weights_T; limits: [blocks] give a swap up when its cost up to and including the block
    reaches this; rest: [blocks + 1] least cost of the steps from each block on; slopes: [F, T] change of cost along its
    tangent, per load that goes from the first rank to the second; tilt: [P] the same for what a slot holds; fees: [P]
    price of bringing that to the other rank, where moves have one.
    """

    others_T: Array
    weights_T: Array
    limits: Array
    rest: Array
    slopes: Array
    tilt: Array
    fees: Array


@njit(nogil=True)
def make_pair(state: State) -> Pair:
    """Room for `Pair`, to be filled by `fix_others`, `set_limits` and `set_tangent`."""
    features, steps = state.items.shape[1:]
    blocks = (steps + BLOCK - 1) // BLOCK
    tilt, fees = np.empty(state.content.shape[0]), np.empty(state.content.shape[0])
    slopes = np.empty((features, steps), np.float32)
    return Pair(np.empty(steps, np.float32), state.weights, np.empty(blocks), np.empty(blocks + 1), slopes, tilt, fees)


@njit(nogil=True, fastmath=True)
def set_tangent(costs: Costs, state: State, a: int, b: int, pair: Pair) -> None:
    """Fill `slopes` and `tilt` for swaps between the ranks a and b; costs from tables promise everything."""
    if costs.use_tables:
        pair.tilt[state.starts[a] : state.starts[a + 1]] = -1.0
        pair.tilt[state.starts[b] : state.starts[b + 1]] = 1.0
        return
    features, steps = pair.slopes.shape
    for f in range(features):
        slope_T, others_T, weights_T = pair.slopes[f], pair.others_T, pair.weights_T
        time_a, time_b = state.times[a], state.times[b]
        if costs.planes.shape[1] == 1:
            a1, b1 = costs.planes[a, 0, 1 + f], costs.planes[b, 0, 1 + f]
            for t in range(steps):
                of_a = -a1 if time_a[t] >= others_T[t] else np.float32(0.0)
                of_b = b1 if time_b[t] >= others_T[t] else np.float32(0.0)
                slope_T[t] = weights_T[t] * (of_a if time_a[t] >= time_b[t] else of_b)
            continue
        for t in range(steps):
            slope_T[t] = np.float32(0.0)
            if max(time_a[t], time_b[t]) >= others_T[t]:
                rank = a if time_a[t] >= time_b[t] else b
                plane = steepest(costs, rank, state.loads[rank, :, t])
                slope = costs.planes[rank, plane, 1 + f] * weights_T[t]
                slope_T[t] = -slope if rank == a else slope
    for side in range(2):
        rank = a if side == 0 else b
        for p in range(state.starts[rank], state.starts[rank + 1]):
            total = 0.0
            for f in range(features):
                total += tilt_of(pair.slopes[f], state.items[p, f])
            pair.tilt[p] = total


@njit(nogil=True, inline="always")
def steepest(costs: Costs, rank: int, loads_F: Array) -> Number:
    """Plane in force under one load vector."""
    best, chosen = np.float32(-1e30), 0
    for k in range(costs.planes.shape[1]):
        value = costs.planes[rank, k, 0]
        for f in range(loads_F.shape[0]):
            value += costs.planes[rank, k, 1 + f] * loads_F[f]
        if value > best:
            best, chosen = value, k
    return chosen


@njit(nogil=True, fastmath=True)
def tilt_of(slope_T: Array, item_T: Array) -> float:
    """Sum of products, in float64 over blocks of float32."""
    total = 0.0
    for lo in range(0, slope_T.shape[0], BLOCK):
        slope, item = slope_T[lo : lo + BLOCK], item_T[lo : lo + BLOCK]
        part = np.float32(0.0)
        for t in range(slope.shape[0]):
            part += slope[t] * item[t]
        total += np.float64(part)
    return total


@njit(nogil=True, inline="always")
def allowed(state: State, a: int, b: int, i: int, j: int) -> bool:
    """Whether a swap changes anything and each rank may take what it gets."""
    expert_i, expert_j = state.content[i], state.content[j]
    if expert_i == expert_j:
        return False
    if expert_i >= 0 and state.barred[b, expert_i] > 0 and not freed(state, b, expert_i, expert_j):
        return False
    return not (expert_j >= 0 and state.barred[a, expert_j] > 0 and not freed(state, a, expert_j, expert_i))


@njit(nogil=True, fastmath=True, inline="always")
def line_block(costs: Costs, state: State, a: int, b: int, i: int, j: int, pair: Pair, lo: int, hi: int) -> Number:
    """Cost of the steps lo to hi after the swap of i and j; latencies are lines of one feature."""
    a1, b1 = costs.planes[a, 0, 1], costs.planes[b, 0, 1]
    item_i, item_j = state.items[i, 0, lo:hi], state.items[j, 0, lo:hi]
    time_a, time_b = state.times[a, lo:hi], state.times[b, lo:hi]
    others_T, weights_T = pair.others_T[lo:hi], pair.weights_T[lo:hi]
    part = np.float32(0.0)
    for t in range(item_i.shape[0]):  # views from 0: the compiler then knows the bounds and emits SIMD
        d = item_i[t] - item_j[t]
        part += weights_T[t] * max(others_T[t], max(time_a[t] - a1 * d, time_b[t] + b1 * d))
    return part


@njit(nogil=True, fastmath=True, inline="always")
def table_block(costs: Costs, state: State, a: int, b: int, i: int, j: int, pair: Pair, lo: int, hi: int) -> Number:
    """As `line_block`, each latency being one table of one feature."""
    table_a, table_b = costs.tables[costs.offsets[a, 0, 0] :], costs.tables[costs.offsets[b, 0, 0] :]
    item_i, item_j = state.items[i, 0, lo:hi], state.items[j, 0, lo:hi]
    load_a, load_b = state.loads[a, 0, lo:hi], state.loads[b, 0, lo:hi]
    others_T, weights_T = pair.others_T[lo:hi], pair.weights_T[lo:hi]
    part = np.float32(0.0)
    for t in range(item_i.shape[0]):
        d = item_i[t] - item_j[t]
        value = max(table_a[np.uint32(load_a[t] - d)], table_b[np.uint32(load_b[t] + d)])
        part += weights_T[t] * max(others_T[t], value)
    return part


@njit(nogil=True, fastmath=True, inline="always")
def five_planes(p: Array, x: float, y: float) -> Number:
    """Largest of five planes in two features, unrolled so that the loop around it is SIMD."""
    low = max(p[0, 0] + p[0, 1] * x + p[0, 2] * y, p[1, 0] + p[1, 1] * x + p[1, 2] * y)
    mid = max(p[2, 0] + p[2, 1] * x + p[2, 2] * y, p[3, 0] + p[3, 1] * x + p[3, 2] * y)
    return max(max(low, mid), p[4, 0] + p[4, 1] * x + p[4, 2] * y)


@njit(nogil=True, fastmath=True)  # inlined, it loses its SIMD
def roofline_block(costs: Costs, state: State, a: int, b: int, i: int, j: int, pair: Pair, lo: int, hi: int) -> Number:
    """As `line_block`, for maxima of up to five planes in two features."""
    planes_a, planes_b = costs.planes[a], costs.planes[b]
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
    return part


@njit(nogil=True, fastmath=True)
def general_block(costs: Costs, state: State, a: int, b: int, i: int, j: int, pair: Pair, lo: int, hi: int) -> Number:
    """As `line_block`, for any latency, from tables."""
    part = 0.0
    for t in range(lo, hi):
        worst = pair.others_T[t]
        for side in range(2):
            rank = a if side == 0 else b
            sign = np.float32(-1.0) if side == 0 else np.float32(1.0)
            for k in range(costs.num_terms[rank]):
                value = np.float32(0.0)
                for f in range(state.items.shape[1]):
                    d = state.items[i, f, t] - state.items[j, f, t]
                    value += lookup(costs, rank, k, f, state.loads[rank, f, t] + sign * d)
                worst = max(worst, value)
        part += np.float64(pair.weights_T[t] * worst)
    return part


@njit(nogil=True, inline="always")
def form_of(costs: Costs, state: State, a: int, b: int) -> int:
    """Which of the block kernels fits the latencies of the ranks a and b."""
    one = state.items.shape[1] == 1
    if not costs.use_tables:
        return LINE if one else ROOFLINE
    plain = one and costs.strides[0] == 1 and costs.num_terms[a] == 1 and costs.num_terms[b] == 1
    return TABLE if plain else GENERAL


@njit(nogil=True, fastmath=True)
def find_gain(costs: Costs, state: State, a: int, b: int, i: int, first: int, pair: Pair, goal: float) -> int:
    """First slot j >= `first` of rank b whose swap with slot i of rank a costs less than `goal`, or -1."""
    form, steps = form_of(costs, state, a, b), state.items.shape[2]
    for j in range(first, state.starts[b + 1]):
        if pair.tilt[i] >= pair.tilt[j] or state.content[i] == state.content[j]:
            continue
        cost = 0.0
        for block in range(pair.limits.shape[0]):
            lo, hi = block * BLOCK, min(steps, (block + 1) * BLOCK)
            if form == LINE:
                cost += np.float64(line_block(costs, state, a, b, i, j, pair, lo, hi))
            elif form == TABLE:
                cost += np.float64(table_block(costs, state, a, b, i, j, pair, lo, hi))
            elif form == ROOFLINE:
                cost += np.float64(roofline_block(costs, state, a, b, i, j, pair, lo, hi))
            else:
                cost += general_block(costs, state, a, b, i, j, pair, lo, hi)
            if cost >= pair.limits[block]:
                cost = np.inf
                break
        if cost < goal and allowed(state, a, b, i, j):  # last: the call takes longer than most sums
            return j
    return -1

"""What the search over copies knows: shares of experts by their copies, what a change is, what it may gain.

The copies of an expert share it evenly: copy i of r, in slot order, takes `(n + r - 1 - i) // r` assignments.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gemopt.compiling import njit
from gemopt.kernels import put
from gemopt.problem import Problem
from gemopt.solvers.search.gains import BLOCK
from gemopt.solvers.search.state import Array, Costs, Number, State, lookup, rank_of, step_order
from gemopt.solvers.search.swaps import slowest_three

TABLE_LIMIT = 1 << 22


class Shares(NamedTuple):
    """counts_ET: assignments in the state's step order; table_FN: features of n of them; full: no slot is emptied."""

    counts_ET: Array
    table_FN: Array
    full: bool


class Change(NamedTuple):
    """Slots whose load changes: the first gets another expert, so that all copies of both share anew.

    slots, sides, position: of each row in use, of which there are `size[0]`: whether it then holds the old expert (0),
    the new one (1) or none (-1), as which of the copies. after: the next row on the same rank, or -1.
    experts: [2] old and new; quotient, rest: [2, T] what each copy of theirs gets, and how many get one more.
    """

    slots: Array
    sides: Array
    position: Array
    after: Array
    size: Array
    experts: Array
    quotient: Array
    rest: Array


def make_shares(problem: Problem) -> Shares | None:
    """Arrays for `improve_copies`; None when counts are too large to tabulate."""
    largest = int(problem.counts_TE.max())
    if largest >= TABLE_LIMIT:
        return None
    grid = np.arange(largest + 2)
    table_FN = np.stack([feature.of(grid) for feature in problem.features]).astype(np.float32)
    counts_ET = np.ascontiguousarray(problem.counts_TE[step_order(problem.num_steps)].T, dtype=np.int32)
    return Shares(counts_ET, table_FN, problem.full)


@njit(nogil=True)
def make_change(state: State) -> Change:
    """Room for `Change`, to be filled by `list_change` and `list_affected`."""
    size, steps = 2 * state.times.shape[0] + 2, state.times.shape[1]
    return Change(
        np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64),
        np.zeros(1, np.int64), np.empty(2, np.int64), np.empty((2, steps), np.int32), np.empty((2, steps), np.int32),
    )  # fmt: skip


@njit(nogil=True, inline="always")
def share_of(shares: Shares, change: Change, c: int, f: int, t: int) -> Number:
    """Feature of a changed slot's share at a step."""
    side = change.sides[c]
    if side < 0:
        return np.float32(0.0)
    return shares.table_FN[f, change.quotient[side, t] + (change.position[c] < change.rest[side, t])]


@njit(nogil=True)
def time_of(costs: Costs, rank: int, loads_F: Array) -> Number:
    """Latency of one rank under one load vector."""
    best = np.float32(-1e30)
    if costs.use_tables:
        for k in range(costs.num_terms[rank]):
            value = np.float32(0.0)
            for f in range(loads_F.shape[0]):
                value += lookup(costs, rank, k, f, loads_F[f])
            best = max(best, value)
        return best
    for k in range(costs.planes.shape[1]):
        value = costs.planes[rank, k, 0]
        for f in range(loads_F.shape[0]):
            value += costs.planes[rank, k, 1 + f] * loads_F[f]
        best = max(best, value)
    return best


class Search(NamedTuple):
    """What the scans over changes know besides the state.

    copies: [E] slots that hold each expert; where: [E, G] those slots in order. limits: [blocks] see `set_limits`.
    slowest, ranks: [3, T] see `slowest_three`; steps: [T] all of them; first, order: [G + 1], [T] the same by slowest
    rank: those of rank g are `order[first[g]:first[g + 1]]`. group: [G] place of a rank among those that a change
    affects, or -1; affected: [G] those ranks; row: [G] the first row of the change on each of them. loads: [F * T];
    after, worst: [T] room for what a rank, and the slowest one, have and take after a change. tilt: [E, 3, G] what the
    slowest ranks would change by with a share of an expert more, if it had one copy less than now, as many, or one
    more; joins: [E] what they would change by if it had one copy more, for what its present copies do.
    """

    copies: Array
    where: Array
    limits: Array
    slowest: Array
    ranks: Array
    steps: Array
    first: Array
    order: Array
    group: Array
    affected: Array
    row: Array
    loads: Array
    after: Array
    worst: Array
    tilt: Array
    joins: Array


@njit(nogil=True)
def make_search(state: State) -> Search:
    """Room for `Search`, to be filled by `refresh`."""
    num_ranks, steps = state.times.shape
    experts, blocks = state.barred.shape[1], (steps + BLOCK - 1) // BLOCK
    return Search(
        np.zeros(experts, np.int64), np.zeros((experts, num_ranks), np.int64), np.empty(blocks, np.float64),
        np.empty((3, steps), np.float32), np.empty((3, steps), np.int16), np.arange(steps),
        np.zeros(num_ranks + 1, np.int64), np.zeros(steps, np.int64),
        np.full(num_ranks, -1, np.int64), np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64),
        np.empty(state.items.shape[1] * steps, np.float32), np.empty(steps, np.float32), np.empty(steps, np.float32),
        np.zeros((experts, 3, num_ranks)), np.zeros(experts),
    )  # fmt: skip


@njit(nogil=True)
def refresh(costs: Costs, state: State, shares: Shares, search: Search, epsilon: float, racing: bool) -> float:
    """Fill `search` for the present state; returns its cost."""
    num_ranks, steps = state.times.shape
    search.copies[:] = 0
    for p in range(state.content.shape[0]):
        expert = state.content[p]
        if expert >= 0:
            search.where[expert, search.copies[expert]] = p
            search.copies[expert] += 1
    slowest_three(state.times, search.slowest, search.ranks)
    search.first[:] = 0
    for t in range(steps):
        search.first[search.ranks[0, t] + 1] += 1
    for g in range(num_ranks):
        search.first[g + 1] += search.first[g]
    place = search.first[:-1].copy()
    for t in range(steps):
        rank = search.ranks[0, t]
        search.order[place[rank]] = t
        place[rank] += 1
    set_tilts(costs, state, shares, search)
    return set_limits(state, search, epsilon, racing)


@njit(nogil=True)
def set_tilts(costs: Costs, state: State, shares: Shares, search: Search) -> None:
    """Fill `tilt` and `joins`: slopes of the slowest ranks about their loads, times the shares of every expert."""
    features, steps = state.items.shape[1:]
    loads_F, slopes_FT = np.empty(features, np.float32), np.empty((features, steps), np.float32)
    for t in range(steps):
        g = search.ranks[0, t]
        held = max(1, state.starts[g + 1] - state.starts[g])
        for f in range(features):
            put(loads_F, state.loads[g, :, t])
            width = max(np.float32(1.0), np.floor(min(loads_F[f], state.loads[g, f, t] / held)))
            high, low = state.loads[g, f, t] + width, max(np.float32(0.0), state.loads[g, f, t] - width)
            loads_F[f] = high
            above = time_of(costs, g, loads_F)
            loads_F[f] = low
            slopes_FT[f, t] = (above - time_of(costs, g, loads_F)) / (high - low) * state.weights[t]
    search.tilt[:] = 0.0
    for e in range(search.copies.shape[0]):
        for k in range(3):
            r, sums_G = max(1, search.copies[e] + k - 1), search.tilt[e, k]
            for t in range(steps):
                share = (shares.counts_ET[e, t] + r - 1) // r if r > 1 else shares.counts_ET[e, t]
                for f in range(features):
                    sums_G[search.ranks[0, t]] += np.float64(slopes_FT[f, t] * shares.table_FN[f, share])
    search.joins[:] = 0.0
    for p in range(state.content.shape[0]):
        e = state.content[p]
        if e >= 0:
            g = rank_of(state, p)
            search.joins[e] += search.tilt[e, 2, g] - search.tilt[e, 1, g]


@njit(nogil=True)
def leaving(state: State, search: Search, slot: int) -> Number:
    """What the slowest ranks change by, to first order, when a slot is emptied and the other copies take its share."""
    expert, rank = state.content[slot], rank_of(state, slot)
    if expert < 0:
        return 0.0
    change = -search.tilt[expert, 1, rank]
    for k in range(search.copies[expert]):
        if search.where[expert, k] != slot:
            g = rank_of(state, search.where[expert, k])
            change += search.tilt[expert, 0, g] - search.tilt[expert, 1, g]
    return change


@njit(nogil=True)
def set_limits(state: State, search: Search, epsilon: float, racing: bool) -> float:
    """Limits a change must stay below: the present cost up to each block, or only in all."""
    limits, steps, total = search.limits, state.times.shape[1], 0.0
    for block in range(limits.shape[0]):
        for t in range(block * BLOCK, min(steps, (block + 1) * BLOCK)):
            total += np.float64(search.slowest[0, t] * state.weights[t])
        limits[block] = total
    goal = total * (1.0 - epsilon)
    for block in range(limits.shape[0]):
        limits[block] = min(goal, limits[block]) if racing else goal
    return total


@njit(nogil=True)
def list_change(state: State, shares: Shares, search: Search, slot: int, expert: int, change: Change) -> None:
    """Fill `change` for giving `slot` to `expert` (-1: emptying it): all copies of both experts change."""
    old, size = state.content[slot], 1
    change.slots[0], change.sides[0], change.position[0] = slot, -1, 0
    change.experts[0], change.experts[1] = old, expert
    for side in range(2):
        if change.experts[side] < 0:
            continue
        position = 0
        for k in range(search.copies[change.experts[side]]):
            p = search.where[change.experts[side], k]
            if side == 0 and p == slot:
                continue
            if side == 1 and p > slot and change.sides[0] < 0:
                change.sides[0], change.position[0] = 1, position
                position += 1
            change.slots[size], change.sides[size], change.position[size] = p, side, position
            size, position = size + 1, position + 1
        if side == 1 and change.sides[0] < 0:
            change.sides[0], change.position[0] = 1, position
            position += 1
        for t in range(change.rest.shape[1]):
            count = shares.counts_ET[change.experts[side], t]
            change.quotient[side, t] = count // max(1, position)
            change.rest[side, t] = count - change.quotient[side, t] * position
    change.size[0] = size


@njit(nogil=True)
def list_affected(state: State, search: Search, change: Change) -> int:
    """Fill `affected`, `group` and `row` with the ranks that a change affects; returns how many."""
    count = 0
    for c in range(change.size[0]):
        rank, change.after[c] = rank_of(state, change.slots[c]), -1
        if search.group[rank] < 0:
            search.group[rank] = count
            search.affected[count], search.row[count] = rank, c
            count += 1
        else:
            change.after[c] = search.row[search.group[rank]]
            search.row[search.group[rank]] = c
    return count

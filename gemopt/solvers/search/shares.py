"""What the search over copies knows: shares of experts by their copies, what a change is, what it may gain.

The copies of an expert share it evenly: copy i of r, in slot order, takes `(n + r - 1 - i) // r` assignments.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

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
    """Slots whose load changes: expert, copies and position among them afterwards; `size[0]` of the rows are in use."""

    slots: Array
    experts: Array
    copies: Array
    position: Array
    size: Array


def make_shares(problem: Problem) -> Shares | None:
    """Arrays for `improve_copies`; None when counts are too large to tabulate."""
    largest = int(problem.counts_TE.max())
    if largest >= TABLE_LIMIT:
        return None
    grid = np.arange(largest + 2)
    table_FN = np.stack([feature.of(grid) for feature in problem.features]).astype(np.float32)
    counts_ET = np.ascontiguousarray(problem.counts_TE[step_order(problem.num_steps)].T, dtype=np.int32)
    return Shares(counts_ET, table_FN, problem.full)


@njit(cache=True, nogil=True, inline="always")
def share_of(shares: Shares, change: Change, c: int, f: int, t: int) -> Number:
    """Feature of a changed slot's share at a step."""
    if change.experts[c] < 0:
        return np.float32(0.0)
    r = change.copies[c]
    return shares.table_FN[f, (shares.counts_ET[change.experts[c], t] + r - 1 - change.position[c]) // r]


@njit(cache=True, nogil=True)
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
    slowest, ranks: [3, T] see `slowest_three`; first, order: [G + 1], [T] steps by slowest rank: those of rank g are
    `order[first[g]:first[g + 1]]`. group: [G] place of a rank among those that a change affects, or -1; affected: [G]
    those ranks. tilt: [E, 3, G] what the slowest ranks would change by with a share of an expert more, if it had one
    copy less than now, as many, or one more; joins: [E] what they would change by if it had one copy more, for what
    its present copies do.
    """

    copies: Array
    where: Array
    limits: Array
    slowest: Array
    ranks: Array
    first: Array
    order: Array
    group: Array
    affected: Array
    tilt: Array
    joins: Array


@njit(cache=True, nogil=True)
def make_search(state: State) -> Search:
    """Room for `Search`, to be filled by `refresh`."""
    num_ranks, steps = state.times.shape
    experts, blocks = state.barred.shape[1], (steps + BLOCK - 1) // BLOCK
    return Search(
        np.zeros(experts, np.int64), np.zeros((experts, num_ranks), np.int64), np.empty(blocks, np.float64),
        np.empty((3, steps), np.float32), np.empty((3, steps), np.int16),
        np.zeros(num_ranks + 1, np.int64), np.zeros(steps, np.int64),
        np.full(num_ranks, -1, np.int64), np.zeros(num_ranks, np.int64), np.zeros((experts, 3, num_ranks)),
        np.zeros(experts),
    )  # fmt: skip


@njit(cache=True, nogil=True)
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


@njit(cache=True, nogil=True)
def set_tilts(costs: Costs, state: State, shares: Shares, search: Search) -> None:
    """Fill `tilt` and `joins`: slopes of the slowest ranks about their loads, times the shares of every expert."""
    features, steps = state.items.shape[1:]
    loads_F, slopes_FT = np.empty(features, np.float32), np.empty((features, steps), np.float32)
    for t in range(steps):
        g = search.ranks[0, t]
        held = max(1, state.starts[g + 1] - state.starts[g])
        for f in range(features):
            loads_F[:] = state.loads[g, :, t]
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


@njit(cache=True, nogil=True)
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


@njit(cache=True, nogil=True)
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


@njit(cache=True, nogil=True)
def list_change(state: State, search: Search, slot: int, expert: int, change: Change) -> None:
    """Fill `change` for giving `slot` to `expert` (-1: emptying it): all copies of both experts change."""
    old = state.content[slot]
    size = 1
    change.slots[0], change.experts[0], change.copies[0], change.position[0] = slot, expert, 1, 0
    if old >= 0:
        copies, index = search.copies[old] - 1, 0
        for k in range(search.copies[old]):
            if search.where[old, k] != slot:
                change.slots[size], change.experts[size] = search.where[old, k], old
                change.copies[size], change.position[size] = copies, index
                size, index = size + 1, index + 1
    if expert >= 0:
        copies, before = search.copies[expert] + 1, 0
        for k in range(search.copies[expert]):
            p = search.where[expert, k]
            before += p < slot
            change.slots[size], change.experts[size] = p, expert
            change.copies[size], change.position[size] = copies, k + (p > slot)
            size += 1
        change.copies[0], change.position[0] = copies, before
    change.size[0] = size


@njit(cache=True, nogil=True)
def list_affected(state: State, search: Search, change: Change) -> int:
    """Fill `affected` and `group` with the ranks that a change affects; returns how many."""
    count = 0
    for c in range(change.size[0]):
        rank = rank_of(state, change.slots[c])
        if search.group[rank] < 0:
            search.group[rank] = count
            search.affected[count] = rank
            count += 1
    return count

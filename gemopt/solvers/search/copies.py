"""Compiled search over copies: change what one slot holds (a copy more here, one fewer there) under the true objective.

The copies of an expert share it evenly: copy i of r, in slot order, takes `(n + r - 1 - i) // r` assignments.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from gemopt.problem import Problem
from gemopt.solvers.search.gains import BLOCK
from gemopt.solvers.search.state import Array, Costs, Number, State, lookup, rank_of, rank_times, step_order
from gemopt.solvers.search.terms import Terms, moved_into, moves_of, permitted

TABLE_LIMIT = 1 << 22


class Shares(NamedTuple):
    """counts_ET: assignments in the state's step order; table_FN: features of n assignments."""

    counts_ET: Array
    table_FN: Array


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
    return Shares(counts_ET, table_FN)


@njit(cache=True, nogil=True)
def list_change(state: State, slot: int, expert: int, change: Change) -> None:
    """Fill `change` for giving `slot` to `expert` (-1: emptying it): all copies of both experts change."""
    old = state.content[slot]
    size = 1
    change.slots[0], change.experts[0], change.copies[0], change.position[0] = slot, expert, 1, 0
    for side in range(2):
        subject = old if side == 0 else expert
        if subject < 0:
            continue
        copies = 0
        for p in range(state.content.shape[0]):
            if state.content[p] == subject:
                copies += 1
        copies += -1 if side == 0 else 1
        index = 0
        for p in range(state.content.shape[0]):
            if p == slot:
                if side == 1:
                    change.copies[0], change.position[0] = copies, index
                    index += 1
                continue
            if state.content[p] == subject:
                change.slots[size], change.experts[size] = p, subject
                change.copies[size], change.position[size] = copies, index
                size, index = size + 1, index + 1
    change.size[0] = size


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


@njit(cache=True, nogil=True)
def change_cost(
    costs: Costs, state: State, shares: Shares, change: Change, limits: Array, price: float, group: Array, loads: Array
) -> Number:
    """Weighted makespan after the change, or infinity as soon as a limit is reached with the price of its moves."""
    num_ranks, steps = state.times.shape
    features = state.items.shape[1]
    group[:] = -1
    affected = 0
    for c in range(change.size[0]):
        rank = rank_of(state, change.slots[c])
        if group[rank] < 0:
            group[rank] = affected
            affected += 1
    cost = 0.0
    for block in range(limits.shape[0]):
        for t in range(block * BLOCK, min(steps, (block + 1) * BLOCK)):
            worst = np.float32(-1e30)
            for g in range(num_ranks):
                if group[g] < 0:
                    worst = max(worst, state.times[g, t])
                else:
                    for f in range(features):
                        loads[group[g], f] = state.loads[g, f, t]
            for c in range(change.size[0]):
                slot = group[rank_of(state, change.slots[c])]
                for f in range(features):
                    loads[slot, f] += share_of(shares, change, c, f, t) - state.items[change.slots[c], f, t]
            for g in range(num_ranks):
                if group[g] >= 0:
                    worst = max(worst, time_of(costs, g, loads[group[g]]))
            cost += np.float64(worst * state.weights[t])
        if cost + price >= limits[block]:
            return np.inf
    return cost


@njit(cache=True, nogil=True)
def apply_change(costs: Costs, state: State, shares: Shares, change: Change) -> None:
    """Carry the change out."""
    slot, expert = change.slots[0], change.experts[0]
    rank, old = rank_of(state, slot), state.content[slot]
    if old >= 0:
        state.holds[rank, old] -= 1
    if expert >= 0:
        state.holds[rank, expert] += 1
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
def improve_copies(
    costs: Costs, state: State, shares: Shares, candidates: Array, epsilon: float, racing: bool, terms: Terms
) -> int:
    """Try every change of a spare slot (empty, or a copy of an expert held elsewhere) once; returns changes made.

    candidates: experts worth another copy. With `racing` a change is given up once it costs more so far than now.
    """
    num_ranks, steps = state.times.shape
    slots, experts = state.content.shape[0], state.holds.shape[1]
    change = Change(
        np.empty(2 * num_ranks + 2, np.int64), np.empty(2 * num_ranks + 2, np.int64),
        np.empty(2 * num_ranks + 2, np.int64), np.empty(2 * num_ranks + 2, np.int64), np.zeros(1, np.int64),
    )  # fmt: skip
    limits = np.empty((steps + BLOCK - 1) // BLOCK, np.float64)
    group, loads = np.empty(num_ranks, np.int64), np.empty((num_ranks, state.items.shape[1]), np.float32)
    copies = np.zeros(experts, np.int64)
    for p in range(slots):
        if state.content[p] >= 0:
            copies[state.content[p]] += 1
    moved_G = moved_into(state, terms)
    made = 0
    current = set_change_limits(state, limits, epsilon, racing)
    for p in range(slots):
        rank = rank_of(state, p)
        for n in range(-1, candidates.shape[0]):
            old = state.content[p]
            if state.stop[0] != 0 or (old >= 0 and copies[old] < 2):
                break
            expert = -1 if n < 0 else candidates[n]
            if expert == old or (expert >= 0 and state.holds[rank, expert] > 0):
                continue
            added = moves_of(terms, rank, expert) - moves_of(terms, rank, old)
            if not permitted(terms, moved_G.sum(), moved_G, rank, rank, added, 0):
                continue
            list_change(state, p, expert, change)
            cost = change_cost(costs, state, shares, change, limits, terms.price * added, group, loads)
            if cost + terms.price * added >= current * (1.0 - epsilon):
                continue
            apply_change(costs, state, shares, change)
            moved_G[rank] += added
            if old >= 0:
                copies[old] -= 1
            if expert >= 0:
                copies[expert] += 1
            current = set_change_limits(state, limits, epsilon, racing)
            made += 1
    return made


@njit(cache=True, nogil=True)
def set_change_limits(state: State, limits: Array, epsilon: float, racing: bool) -> Number:
    """Limits a change must stay below: the present cost up to each block, or only in all."""
    num_ranks, steps = state.times.shape
    total = 0.0
    for block in range(limits.shape[0]):
        for t in range(block * BLOCK, min(steps, (block + 1) * BLOCK)):
            worst = state.times[0, t]
            for g in range(1, num_ranks):
                worst = max(worst, state.times[g, t])
            total += np.float64(worst * state.weights[t])
        limits[block] = total
    goal = total * (1.0 - epsilon)
    for block in range(limits.shape[0]):
        limits[block] = min(goal, limits[block]) if racing else goal
    return total

"""Greedy mapping by makespan: one expert after the other, each where what is placed so far then ends soonest.

Where loads are a few assignments, ranks tie at most steps and no single swap gains: a descent from means ends far from
where one ends that begins with experts which are hot at different steps.
"""

from __future__ import annotations

import numpy as np

from gemopt.compiling import njit
from gemopt.placement import EMPTY
from gemopt.problem import Problem
from gemopt.solvers.base import Row
from gemopt.solvers.search.state import Array, Costs, rank_times, step_order
from gemopt.solvers.search.swaps import slowest_three

MOST_STEPS = 256  # that a mapping looks at


def mapped_row(problem: Problem, costs: Costs, copies_E: Row, stop: Array, order_E: Row | None = None) -> Row | None:
    """[P] so many copies of each expert [E], each on the rank that keeps the makespan of what is placed smallest.

    Copies share their expert evenly. order_E: experts, the first to be placed first; None: most load per copy first. Of
    many steps `MOST_STEPS` are looked at. None where the time ends, or a copy finds no rank with room that has none of
    its expert. Rules are not heeded.
    """
    steps = step_order(problem.num_steps)[:MOST_STEPS]
    shares_TE = -(-problem.counts_TE[steps] // copies_E)
    items = np.stack([feature.of(shares_TE) for feature in problem.features]).transpose(2, 0, 1)
    if order_E is None:
        order_E = np.argsort(-problem.linearised[1].mean(axis=0) / copies_E, kind="stable")
    expert_I, slots_G = np.repeat(order_E, copies_E[order_E]), problem.slots_per_rank.copy()
    weights = problem.weights_T[steps].astype(np.float32)
    rank_I = map_in_order(costs, np.ascontiguousarray(items, dtype=np.float32), expert_I, slots_G, weights, stop)
    if (rank_I < 0).any():
        return None
    row, used_G = np.full(problem.num_slots, EMPTY), np.cumsum(problem.slots_per_rank) - problem.slots_per_rank
    for expert, rank in zip(expert_I.tolist(), rank_I.tolist(), strict=True):
        row[used_G[rank]] = expert
        used_G[rank] += 1
    return row


@njit(nogil=True, fastmath=True)
def score(time_T: Array, values: Array, ranks: Array, rank: int, weights_T: Array) -> float:
    """Weighted makespan where one rank takes so long and the others what they take now; see `slowest_three`."""
    first_T, second_T, rank_T, total = values[0], values[1], ranks[0], 0.0
    for t in range(time_T.shape[0]):
        first, second = first_T[t], second_T[t]
        others = second if rank_T[t] == rank else first
        total += np.float64(max(time_T[t], others) * weights_T[t])
    return total


@njit(nogil=True)
def map_in_order(costs: Costs, items: Array, expert_I: Array, left_G: Array, weights_T: Array, stop: Array) -> Array:
    """[I] rank of each item: with room, and least makespan of what is placed so far, then least time of its own.

    items: [E, F, T] load of each expert's copy. left_G: [G] free slots, used up. -1: nowhere, or stopped before.
    """
    experts, features, steps = items.shape
    num_ranks = left_G.shape[0]
    loads, times = np.zeros((num_ranks, features, steps), np.float32), np.zeros((num_ranks, steps), np.float32)
    held = np.zeros((num_ranks, experts), np.bool_)
    values, ranks = np.empty((3, steps), np.float32), np.empty((3, steps), np.int16)
    load_FT, time_T = np.empty((features, steps), np.float32), np.empty(steps, np.float32)
    rank_I = np.full(expert_I.shape[0], -1, np.int64)
    for g in range(num_ranks):
        rank_times(costs, g, loads[g], times[g])
    slowest_three(times, values, ranks)
    for n in range(expert_I.shape[0]):
        if stop[0] != 0:
            break
        expert, best, best_own = expert_I[n], np.inf, np.inf
        for g in range(num_ranks):
            if left_G[g] == 0 or held[g, expert]:
                continue
            for f in range(features):
                for t in range(steps):
                    load_FT[f, t] = loads[g, f, t] + items[expert, f, t]
            rank_times(costs, g, load_FT, time_T)
            cost, own = score(time_T, values, ranks, g, weights_T), 0.0
            if cost > best:
                continue
            for t in range(steps):
                own += np.float64(time_T[t] * weights_T[t])
            if cost < best or own < best_own:
                best, best_own, rank_I[n] = cost, own, g
        g = rank_I[n]
        if g < 0:
            break
        for f in range(features):
            for t in range(steps):
                loads[g, f, t] += items[expert, f, t]
        rank_times(costs, g, loads[g], times[g])
        slowest_three(times, values, ranks)
        held[g, expert] = True
        left_G[g] -= 1
    return rank_I

"""GEM, the variability-aware heuristic: same costs, steps, time limit and restarts as local search.

Wawdhane, Kumar and Das, GEM: GPU-Variability-Aware Expert-to-GPU Mapping, arXiv:2605.19945. Published: profile each
GPU, record token loads per task, tell consistent from temporal experts, then search mappings iteratively, scored by
trace and profile, keeping experts used together apart and off slow GPUs. Static, no copies, no bound.

Where the paper is silent we chose what helps it:
* the score is the exact objective, on every step given;
* the first mapping places consistent, then temporal, then all other experts, hottest first, each where the score of
  what is placed so far is smallest: that keeps experts used together apart and off slow GPUs;
* an iteration swaps experts of the worst straggler with any other rank's, then of the next worst, until nothing helps;
* restarts shuffle the order of placement; the best mapping counts.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from gemopt.conflicts import ExpertClass, classify
from gemopt.evaluate import objective
from gemopt.latency import FloatArray
from gemopt.placement import EMPTY
from gemopt.problem import Problem
from gemopt.result import Incumbent, StoppedBy
from gemopt.solvers.base import Options, Outcome, Row, Supports, incumbent, seeded
from gemopt.solvers.search.gains import make_pair
from gemopt.solvers.search.state import Array, Costs, State, make_costs, make_state, step_order
from gemopt.solvers.search.swaps import fix_others, improve_pair, refresh_three, slowest_three

ORDER = (ExpertClass.CONSISTENT, ExpertClass.TEMPORAL, ExpertClass.ORDINARY)
NOISE = 0.3
GREEDY_STEPS = 256


class Gem:
    """Greedy mapping by class, straggler swaps, restarts."""

    name = "gem"
    supports = Supports(improves=True)

    def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
        """Place one layer; see `Solver`. A warm start is the first mapping. Spare slots stay empty."""
        costs = make_costs(problem)
        classes = classify(problem.counts_TE)
        rng = seeded(options.seed, problem.num_experts, problem.num_ranks)
        best, value, idle = None, np.inf, -1
        history: list[Incumbent] = []
        while not options.exhausted(idle):
            noise_E = np.exp(NOISE * rng.standard_normal(problem.num_experts)) if best is not None else None
            row = warm_start if warm_start is not None and best is None else _greedy(problem, classes, noise_E)
            if best is None or not options.expired():
                state = make_state(problem, row, costs)
                relieve_stragglers(costs, state)
                row = state.content
            idle += 1
            found = objective(problem, row)
            if found < value:
                best, value, idle = row.copy(), found, 0
                history.append(incumbent(found))
            if options.expired():
                stopped = StoppedBy.INTERRUPT if options.stop() else StoppedBy.TIME_LIMIT
                return Outcome(best, stopped, history=history)
        return Outcome(best, StoppedBy.ITERATIONS, history=history)


def _greedy(problem: Problem, classes: list[ExpertClass], noise_E: FloatArray | None) -> Row:
    """[P] experts by class and heat, each on the rank that keeps the makespan of what is placed so far smallest."""
    steps = step_order(problem.num_steps)[:GREEDY_STEPS]
    features_FTE, weights_T = problem.features_FTE[:, steps], problem.weights_T[steps]
    heat_E = problem.linearised[1].mean(axis=0) * (1.0 if noise_E is None else noise_E)
    order = sorted(range(problem.num_experts), key=lambda e: (ORDER.index(classes[e]), -heat_E[e]))
    loads_GFT = np.zeros((problem.num_ranks, len(problem.features), len(steps)))
    times_GT = np.stack([latency(list(loads_GFT[g])) for g, latency in enumerate(problem.latencies)])
    left_G = problem.slots_per_rank.copy()
    starts_G = np.cumsum(left_G) - left_G
    row = np.full(problem.num_slots, EMPTY)
    for expert in order:
        tried: list[tuple[float, float, int, FloatArray]] = []
        for rank in np.flatnonzero(left_G).tolist():
            time_T = problem.latencies[rank](list(loads_GFT[rank] + features_FTE[:, :, expert]))
            others_T = np.delete(times_GT, rank, axis=0).max(axis=0, initial=0.0)
            score = float(np.maximum(others_T, time_T) @ weights_T)
            tried.append((score, float(time_T @ weights_T), rank, time_T))
        _, _, rank, time_T = min(tried, key=lambda each: each[:3])
        loads_GFT[rank] += features_FTE[:, :, expert]
        times_GT[rank] = time_T
        row[starts_G[rank] + problem.slots_per_rank[rank] - left_G[rank]] = expert
        left_G[rank] -= 1
    return row


@njit(cache=True, nogil=True)
def relieve_stragglers(costs: Costs, state: State) -> None:
    """Swap experts of the worst straggler with any other rank's, then of the next worst, until nothing helps."""
    num_ranks, steps = state.times.shape
    if num_ranks < 2:
        return
    values, ranks = np.empty((3, steps), np.float32), np.empty((3, steps), np.int16)
    pair = make_pair(state)
    slowest_three(state.times, values, ranks)
    improved = True
    while improved:
        improved = False
        blame = blamed(state, values, ranks)
        for a in np.argsort(-blame):
            for b in range(num_ranks):
                if a == b:
                    continue
                fix_others(state, a, b, values, ranks, pair)
                if improve_pair(costs, state, a, b, pair, False):
                    refresh_three(state.times, values, ranks, a, b)
                    improved = True
            if improved:
                break


@njit(cache=True, nogil=True)
def blamed(state: State, values: Array, ranks: Array) -> Array:
    """[G] weighted time for which the others wait for each rank: its lead over the second slowest."""
    blame = np.zeros(state.times.shape[0], np.float64)
    for t in range(state.times.shape[1]):
        blame[ranks[0, t]] += np.float64((values[0, t] - values[1, t]) * state.weights[t])
    return blame

"""Placements that look at nothing: what engines start with."""

from __future__ import annotations

import numpy as np

from gemopt.placement import EMPTY
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers.base import Options, Outcome, Row, Supports


class Linear:
    """Contiguous: experts in order, as evenly over the ranks as their slots allow (vLLM's and SGLang's start)."""

    name = "linear"
    supports = Supports()

    def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
        """Place one layer; see `Solver`."""
        row = np.full(problem.num_slots, EMPTY)
        quota = _quotas(problem)
        starts = np.cumsum(problem.slots_per_rank) - problem.slots_per_rank
        expert = 0
        for start, count in zip(starts, quota, strict=True):
            row[start : start + count] = np.arange(expert, expert + count)
            expert += int(count)
        return Outcome(row, StoppedBy.ITERATIONS)


class RoundRobin:
    """Expert e on rank e mod G, skipping ranks without a slot left."""

    name = "round-robin"
    supports = Supports()

    def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
        """Place one layer; see `Solver`."""
        row = np.full(problem.num_slots, EMPTY)
        starts = np.cumsum(problem.slots_per_rank) - problem.slots_per_rank
        used = np.zeros(problem.num_ranks, dtype=np.int64)
        rank = 0
        for expert in range(problem.num_experts):
            while used[rank] == problem.slots_per_rank[rank]:
                rank = (rank + 1) % problem.num_ranks
            row[starts[rank] + used[rank]] = expert
            used[rank] += 1
            rank = (rank + 1) % problem.num_ranks
        return Outcome(row, StoppedBy.ITERATIONS)


def _quotas(problem: Problem) -> Row:
    """[G] experts per rank: even, except where slots run out."""
    quota = np.zeros(problem.num_ranks, dtype=np.int64)
    left = problem.num_experts
    while left:
        open_ranks = np.flatnonzero(quota < problem.slots_per_rank)
        give = min(left, len(open_ranks))
        quota[open_ranks[:give]] += 1
        left -= give
    return quota

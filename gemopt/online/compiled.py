"""Latencies in the form that the compiled search reads, made once for all layers and decisions of like loads."""

from __future__ import annotations

import numpy as np

from gemopt.problem import Problem
from gemopt.solvers.search.state import Costs, guiding_planes, make_costs

MOST = 16


class Compiled:
    """Latencies at present: lines or planes that rise as they do, else tables. They depend on the loads alone."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], Costs] = {}  # by mean and largest load

    def of(self, problem: Problem) -> Costs:
        """For one layer."""
        loads_T = problem.counts_TE.sum(axis=1)
        key = (int(loads_T.mean()), 2 << int(loads_T.max()).bit_length())  # of the key alone, whatever came before
        if key not in self._known:
            planes = guiding_planes(_alike(problem, key[0]), key[0] / problem.num_ranks)
            if len(self._known) >= MOST:
                self._known.clear()
            alike = _alike(problem, key[1])
            most_F = alike.features_FTE.sum(axis=2).max(axis=1)
            self._known[key] = make_costs(alike, most_F) if planes is None else planes
        return self._known[key]


def _alike(problem: Problem, load: int) -> Problem:
    """The same layer with one step of at least so many assignments."""
    counts_1E = np.full((1, problem.num_experts), -(-load // problem.num_experts))
    return Problem.make(counts_1E, problem.features, problem.latencies, problem.slots_per_rank)

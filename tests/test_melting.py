"""Annealed kicks of local search: a walk that is too hot for its time does not stay far above the best."""

from __future__ import annotations

import numpy as np
import pytest

from gemopt.latency import ASSIGNMENTS, Latency, line
from gemopt.problem import Problem
from gemopt.solvers.base import Options
from gemopt.solvers.search import swaps
from gemopt.solvers.search.local_search import LocalSearch
from gemopt.solvers.search.state import Array, Costs, State
from gemopt.solvers.search.swaps import total_cost


def test_a_walk_that_melts_begins_again_at_the_best_half_as_hot(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    latencies = [Latency(((line(20.0, speed),),)) for speed in rng.uniform(0.9, 1.1, 4)]
    problem = Problem.make(rng.poisson(50, (30, 16)), [ASSIGNMENTS], latencies)
    heats: list[float] = []
    begun: list[float] = []

    def melting(costs: Costs, state: State, draws: Array, best: float, row: Array, losses: Array, heat: float) -> float:
        heats.append(heat)
        begun.append(total_cost(state) / best)
        if len(heats) > 1:  # the first had no time for a kick
            losses += np.array([1e-6, 1.0])
            state.times[:] *= 2
        return best

    monkeypatch.setattr(swaps, "iterate", melting)
    with np.errstate(all="raise"):
        LocalSearch().solve(problem, Options.lasting(600, stop=lambda: len(heats) >= 5), None)
    assert len(heats) >= 5 and begun == pytest.approx([1.0] * len(begun))
    assert all(later <= 0.5 * earlier for earlier, later in zip(heats[1:-1], heats[2:], strict=True))

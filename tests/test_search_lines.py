"""The planes that searches are guided by rise as the latencies do, whatever their shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gemopt.evaluate import objective
from gemopt.latency import ASSIGNMENTS, Curve, Latency
from gemopt.online.compiled import Compiled
from gemopt.problem import Problem
from gemopt.solvers.search.moves import few_moves
from gemopt.solvers.search.state import guiding_planes, make_costs

LOADS = np.arange(2049.0)
SHAPES: dict[str, Callable[[Any], Any]] = {
    "line": lambda n: 20 + 0.3 * n,
    "fine tiles": lambda n: 20 + 2.4 * np.ceil(n / 8),
    "one tile holds most ranks": lambda n: 20 + 30 * np.ceil(n / 96),
    "saturates": lambda n: 20 + 60 * (1 - np.exp(-n / 60)) + 0.01 * n,
    "every expert once, then tokens": lambda n: 20 + 0.6 * np.minimum(n, 128) + 0.01 * n,
    "another kernel from 48 on": lambda n: 20 + 0.01 * n + 25 * (n >= 48),
    "falls at 64": lambda n: 30 + 0.4 * n - 12 * (n >= 64),
    "nothing is faster": lambda n: 50 + 0 * n,
}


def layer(shape: str, seed: int = 0) -> tuple[Problem, np.ndarray[Any, Any]]:
    """Eight experts on each of four ranks, hot ones together, 50 assignments a rank in the mean."""
    rng = np.random.default_rng(seed)
    share_E = rng.gamma(0.6, size=32)
    counts = rng.multinomial(200, share_E / share_E.sum(), size=80)
    times = SHAPES[shape](LOADS)
    slope = (times[-1] - times[-385]) / 384
    latencies = [Latency(((Curve(LOADS, f * times, f * slope),),)) for f in (1.0, 1.05, 0.95, 1.2)]
    problem = Problem.make(counts, (ASSIGNMENTS,), latencies)
    return problem, np.argsort(-share_E, kind="stable")


def best_gain(problem: Problem, row: np.ndarray[Any, Any]) -> float:
    """Microseconds that the best swap of all gains."""
    best = 0.0
    for p in range(len(row)):
        for q in range(p):
            other = row.copy()
            other[[p, q]] = row[[q, p]]
            best = max(best, objective(problem, row) - objective(problem, other))
    return best


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_controller_sees_what_swaps_gain(shape: str, seed: int) -> None:
    """A hull far below a latency that saturates made gains a tenth of what they are, and nothing moved."""
    problem, row = layer(shape, seed)
    best = best_gain(problem, row)
    least = 0.4 * best + 1e-9
    way = few_moves(problem, row, least_us=least, max_swaps=1, costs=Compiled().of(problem))
    if best > 1e-6:
        assert way[0].objective_us - way[-1].objective_us > least
    else:
        assert len(way) == 1


@pytest.mark.parametrize("times", [lambda n: 20 + 30 * np.ceil(n / 72), lambda n: 20 + 0.3 * np.maximum(n, 72)])
@pytest.mark.parametrize("flat", [0.0, 0.01])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_controller_sees_what_hot_ranks_gain(times: Callable[[Any], Any], flat: float, seed: int) -> None:
    """Lines that were flat, as the latency is up to two and a half times the mean load, moved nothing off a rank that
    holds three times as much."""
    problem, row = layer("line", seed)
    latencies = [Latency(((Curve(LOADS, times(LOADS) + flat * LOADS, 0.2),),))] * 8
    problem = Problem.make(problem.counts_TE, (ASSIGNMENTS,), latencies)
    exact, guided = (few_moves(problem, row, max_swaps=8, costs=costs) for costs in (None, Compiled().of(problem)))
    most = exact[0].objective_us - exact[-1].objective_us
    assert most > 0.03 * exact[0].objective_us
    assert guided[0].objective_us - guided[-1].objective_us > 0.7 * most


def test_the_controller_sees_an_idle_rank() -> None:
    """Three assignments a rank were taken for as many as there are experts."""
    step = Latency(((Curve(LOADS, 20.0 + 3 * (LOADS > 0), 0.0),),))
    counts = np.zeros((8, 64), np.int64)
    counts[:, :12] = 1
    few = Problem.make(counts, (ASSIGNMENTS,), [step] * 4)
    assert Compiled().of(few).use_tables
    assert not Compiled().of(replace(few, counts_TE=counts + 20)).use_tables


def test_lines_are_taken_where_latencies_are_nearly_lines() -> None:
    """They are what makes a decision short."""
    found = {shape: guiding_planes(layer(shape)[0]) for shape in SHAPES}
    lines = {shape for shape, costs in found.items() if costs is not None and not costs.use_tables}
    assert lines >= {"line", "fine tiles", "saturates", "nothing is faster"}
    assert not lines & {"one tile holds most ranks", "another kernel from 48 on"}
    assert make_costs(layer("saturates")[0]).use_tables

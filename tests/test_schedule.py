"""All layers of a call within one time: what each is asked for, in which order, and what is left out."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest
from test_limits import devices, make, traffic
from threadpoolctl import threadpool_info

import gemopt
from gemopt.bounds.together import Together
from gemopt.latency import FloatArray
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers.base import Options, Outcome, Row, Supports
from gemopt.solvers.search.packing import lpt_row
from gemopt.solving import schedule, turns
from gemopt.solving.layers import Layer
from gemopt.solving.schedule import Run


class Recorder:
    """A solver that notes when it was asked for what, and how many threads libraries had then."""

    name = "recorder"

    def __init__(self, *, improves: bool) -> None:
        self.supports = Supports(improves=improves)
        self.calls: list[tuple[int, int | None, float]] = []
        self.threads: set[int] = set()

    def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
        self.calls.append((options.seed, options.patience, options.deadline))
        self.threads |= {info["num_threads"] for info in threadpool_info()}
        return Outcome(lpt_row(problem), StoppedBy.ITERATIONS)


def test_every_layer_is_answered_before_any_is_deepened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "LEAST_S", (np.inf, np.inf))  # no bound of contents, which takes a while to end
    solver = Recorder(improves=True)
    layers = [Layer(make(steps=9), None, seed) for seed in range(5)]
    clock = time.monotonic()
    Run(solver, layers, clock, 500.0).go()  # type: ignore[arg-type]
    assert [(seed, patience) for seed, patience, _ in solver.calls] == [
        *((seed, 0) for seed in range(5)),  # without any search
        *((seed, 0) for seed in range(5)),
        *((seed, None) for seed in range(5)),
    ]
    shares = [deadline - clock for _, _, deadline in solver.calls]
    assert shares[:5] == [-np.inf] * 5
    assert shares[5:10] == sorted(shares[5:10]) and shares[5] < 100 and 300 < shares[9] < 450 < shares[14] <= 500
    assert all(layer.bounded_steps == 9 for layer in layers)


@pytest.mark.parametrize("library", ["numpy", "torch"])  # OpenBLAS is limited as a whole, OpenMP thread by thread
def test_threads_bound_the_libraries_too(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    pytest.importorskip(library)
    before = {info["num_threads"] for info in threadpool_info()}
    for threads, allowed in ((1, {1}), (8, {1, 2})):
        solver = Recorder(improves=False)
        monkeypatch.setattr(sys.modules["gemopt.solving.options"], "get", lambda _, solver=solver: solver)
        gemopt.solve(devices(), traffic(), threads=threads)
        assert solver.threads and solver.threads <= allowed
    assert {info["num_threads"] for info in threadpool_info()} == before


def test_a_bound_that_stays_at_the_floors_is_left_out_for_the_other_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the search has no end of its own: what all get then is the same however the threads run."""
    asked: list[int] = []

    def never(problem: Problem, floor_T: FloatArray, stop: object, **_: object) -> Together:
        asked.append(1)
        return Together(float(floor_T.sum()))

    monkeypatch.setattr(schedule, "together_bound", never)
    monkeypatch.setattr(turns, "LEAST_S", (np.inf, np.inf))
    for patience, count in ((None, schedule.VAIN), (1, 9)):
        asked.clear()
        layers = [Layer(make(steps=9), None, seed) for seed in range(9)]
        Run(Recorder(improves=True), layers, time.monotonic(), 500.0, patience=patience).go()  # type: ignore[arg-type]
        assert len(asked) == count

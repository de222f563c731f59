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
from gemopt.evaluate import total
from gemopt.latency import FloatArray
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers.base import Options, Outcome, Row, Supports, incumbent
from gemopt.solvers.search.packing import lpt_row
from gemopt.solving import schedule, turns
from gemopt.solving.layers import Layer
from gemopt.solving.schedule import Run
from gemopt.solving.shares import once_more


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


class Claimer:
    """A solver that proves some layers at once and is cut in others, of which it claims less when it is asked again."""

    name, supports = "claimer", Supports(proves=True, improves=True)

    def __init__(self, layers: list[Layer], open_L: list[float]) -> None:
        self.layers, self.open_L, self.calls = layers, open_L, list[int]()

    def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
        assert warm_start is not None
        number = next(n for n, layer in enumerate(self.layers) if layer.problem is problem)
        value = total(problem, warm_start)
        bound = value * (1 - self.open_L[number] * (1 + self.calls.count(number)))
        self.calls.append(number)
        stopped_by = StoppedBy.TIME_LIMIT if self.open_L[number] else StoppedBy.PROOF
        return Outcome(warm_start, stopped_by, bound, [incumbent(value, bound)], own_bound_us=bound)


def test_what_proven_layers_leave_goes_once_more_to_those_with_most_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was lost where the last layers were proven, and the call said that its time was over."""
    monkeypatch.setattr(schedule, "together_bound", lambda _, floor_T, stop, **__: Together(float(floor_T.sum())))
    monkeypatch.setattr(turns, "LEAST_S", (np.inf, np.inf))
    open_L = [0.01, 0.0, 0.03, 0.0, 0.02]
    layers = [Layer(make(steps=9), lpt_row(make(steps=9)), seed) for seed in range(5)]
    solver = Claimer(layers, open_L)
    Run(solver, layers, time.monotonic(), 500.0).go()  # type: ignore[arg-type]
    assert sorted(solver.calls[:5]) == [0, 1, 2, 3, 4] and solver.calls[5:] == [2, 4, 0]
    for layer, part in zip(layers, open_L, strict=True):
        assert layer.outcome is not None and layer.outcome.row is not None
        best = total(layer.problem, layer.outcome.row) * (1 - part)
        assert layer.outcome.bound_us == layer.outcome.own_bound_us == pytest.approx(best)


def test_what_a_placement_refutes_is_not_kept() -> None:
    layer, row = Layer(make(steps=9), None, 0), lpt_row(make(steps=9))
    for claimed, kept in ((90.0, 90.0), (110.0, 50.0), (None, 50.0)):
        layer.outcome = Outcome(row, StoppedBy.TIME_LIMIT, 50.0, [incumbent(100.0)])
        layer.keep(Outcome(row, StoppedBy.TIME_LIMIT, claimed, [incumbent(120.0)]))
        assert layer.outcome.bound_us == kept


def test_as_many_layers_search_once_more_as_can_be_given_as_long_again() -> None:
    layers = []
    for seconds, value in ((3.0, 100.0), (2.0, 103.0), (2.0, 102.0), (1.0, 101.0)):
        layers.append(Layer(make(steps=9), None, 0, seconds=seconds, bound_us=90.0))
        layers[-1].outcome = Outcome(lpt_row(make(steps=9)), StoppedBy.TIME_LIMIT, None, [incumbent(value)])
    assert once_more(layers, 0.0, 4.5, 1, False) == [layers[1], layers[2]]
    assert once_more(layers, 0.0, 0.5, 1, False) == [layers[1]]
    assert once_more(layers, 0.0, 4.5, 2, False) == [layers[n] for n in (1, 2, 3, 0)]
    assert once_more(layers, 0.11, 9.0, 1, False) == [layers[1], layers[2]]
    assert once_more(layers, 0.0, 0.01, 1, False) == once_more(layers, 0.0, 9.0, 1, True) == []

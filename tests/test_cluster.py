"""Layers solved elsewhere: the same answer as here, stopped from here, and nothing found is lost on the way."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from timed import timed

import gemopt
from gemopt.latency import ACTIVE, ASSIGNMENTS, Latency, line, tiles
from gemopt.moves import Moves
from gemopt.placement import Split
from gemopt.problem import Problem
from gemopt.profile import Profile
from gemopt.result import StoppedBy
from gemopt.solvers import get, hurried
from gemopt.solvers.base import Options
from gemopt.solving.cluster import Cluster, packed, unpacked
from gemopt.solving.layers import Layer
from gemopt.solving.schedule import Run, _on_worker
from gemopt.traces import Traces


def profile() -> Profile:
    return timed((1.0, 1.2, 0.9), lambda n, slow: (20 + n) * slow, (0, 16, 64, 256))


def traces() -> Traces:
    return Traces(counts=np.random.default_rng(4).poisson(np.linspace(1, 20, 12), size=(30, 3, 12)))


def problem(**given: Any) -> Problem:
    counts = np.random.default_rng(5).poisson(np.linspace(1, 20, 10), size=(25, 10))
    features = given.pop("features", (ASSIGNMENTS,))
    lines = [line(9, 0.5), line(0.0, 2.0)][: len(features)]
    latencies = [Latency((tuple(each for each in lines),)) for _ in range(3)]
    moves = given.pop("moves", None)
    made = Problem.make(counts, features, latencies, given.pop("slots", None), **given)
    return made if moves is None else Problem(**{**made.__getstate__(), "moves": moves})


HOME = np.arange(12).reshape(3, 4)[:, :, None] == np.arange(10)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("local-search", {"slots": 5}),
        ("local-search", {"slots": 5, "split": Split.OPTIMAL}),
        ("local-search", {"slots": 4, "moves": Moves.make(HOME.any(axis=1), 0.5, 6)}),
        ("gem", {"features": (tiles(4), ACTIVE)}),
    ],
)
def test_a_search_goes_on_elsewhere_as_it_would_have_here(name: str, given: dict[str, Any]) -> None:
    given_problem = problem(**given)
    here, there = Options(np.inf, patience=2), Options(np.inf, patience=2)
    first = get(name).solve(given_problem, here, None)
    layer = Layer(given_problem, None, 0, outcome=first)
    moved = unpacked(packed(layer, given_problem), given_problem)
    assert moved.problem is given_problem and moved.outcome.search.problem is given_problem
    here.begun, there.begun = first.search, moved.outcome.search
    on, elsewhere = (get(name).solve(given_problem, options, None) for options in (here, there))
    assert on.row is not None and elsewhere.row is not None and on.search is first.search
    np.testing.assert_array_equal(on.row, elsewhere.row)


def test_a_row_that_is_needed_takes_no_longer_elsewhere_than_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    left_s: list[float] = []
    monkeypatch.setattr(Run, "_answer", lambda run, layer, deadline: left_s.append(hurried.seconds_left()))
    given = problem()
    known = packed((Layer(given, None, 0), time.monotonic()), given)
    number, _ = _on_worker(3, given, known, (get("local-search"), 0.0, None), "_answer", (2.0, 4.0), 20.0)
    assert number == 3 and left_s[0] <= 20.0


def test_without_a_backend_threads_of_this_process_do_the_work() -> None:
    assert Cluster.in_force() is None
    joblib = pytest.importorskip("joblib")
    with joblib.parallel_config("threading", n_jobs=2):
        assert Cluster.in_force() is None


@pytest.fixture(scope="module")
def dask() -> Iterator[Any]:
    """A local Dask cluster of two processes in force."""
    joblib, distributed = pytest.importorskip("joblib"), pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config("dask"),
    ):
        yield


def test_on_a_dask_cluster_the_answer_is_the_same(dask: None) -> None:
    found = Cluster.in_force()
    assert found is not None and found.count == 2
    assert os.getpid() not in set(found.each(os.getpid, [()] * 3, threading.Event()))
    clock = time.monotonic()
    each = [gemopt.solve(profile(), traces(), slots_per_rank=5, patience=3, time_limit=300, solver="local-search")]
    import joblib

    with joblib.parallel_config("threading"):
        each.append(
            gemopt.solve(
                profile(), traces(), slots_per_rank=5, patience=3, time_limit=300, solver="local-search", threads=1
            )
        )
    there, here = each
    assert there.placement is not None and there.placement == here.placement
    assert there.objective_us == here.objective_us and there.stopped_by is here.stopped_by
    assert there.bound_us is not None and 0 < there.bound_us <= (there.objective_us or 0)
    assert there.history and all(0 <= point.seconds <= time.monotonic() - clock for point in there.history)


def test_an_interrupt_keeps_what_came_back(dask: None, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Run._bound_together

    def pressed(run: Run, *arguments: Any) -> None:
        run.interrupted.set()
        before(run, *arguments)

    monkeypatch.setattr(Run, "_bound_together", pressed)
    result = gemopt.solve(profile(), traces(), patience=10**9, time_limit=300, solver="local-search")
    assert result.stopped_by is StoppedBy.INTERRUPT and result.placement is not None
    assert result.seconds < 200


def test_what_fails_there_is_raised_here(dask: None) -> None:
    found = Cluster.in_force()
    assert found is not None
    with pytest.raises(ValueError, match="invalid literal"):
        list(found.each(int, [("1",), ("x",), ("2",)], threading.Event()))

"""`auto`: what it tries to prove, and what it does with the time that a proof leaves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gemopt.evaluate import objective
from gemopt.exceptions import UnsupportedError
from gemopt.latency import ASSIGNMENTS, Latency, line
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers import auto, get
from gemopt.solvers.base import Options, Outcome, Row
from gemopt.solvers.search.local_search import LocalSearch
from gemopt.solvers.size import provable, prover


def copied(ranks: int, spare: int, steps: int = 20) -> Problem:
    """8 experts with spare slots on the first ranks."""
    rng = np.random.default_rng(3)
    slots = np.full(ranks, -(-8 // ranks))
    slots[: spare - (slots.sum() - 8)] += 1
    latencies = [Latency(((line(20.0, speed),),)) for speed in rng.uniform(0.9, 1.1, ranks)]
    return Problem.make(rng.poisson(rng.uniform(20, 400, 8), (steps, 8)), [ASSIGNMENTS], latencies, slots)


def test_cpsat_is_tried_where_copies_leave_few_ways() -> None:
    assert provable(copied(8, 1)) and prover(copied(8, 1)) is None
    assert not provable(copied(8, 8))
    assert not provable(replace(copied(64, 56), slots_per_rank=np.full(64, 2)))  # a million literals


@pytest.mark.parametrize("patience", [None, 1])
def test_time_that_cpsat_leaves_is_searched(patience: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, deadlines = copied(8, 1), []
    given = Options.lasting(300, patience=patience)

    class NoProof:
        def solve(self, problem: Problem, options: Options, warm_start: Row) -> Outcome:
            deadlines.append(options.deadline)
            return Outcome(warm_start, StoppedBy.TIME_LIMIT)

    class Short(LocalSearch):
        def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
            return super().solve(problem, replace(options, patience=1), warm_start)

    monkeypatch.setattr(auto, "LocalSearch", Short)
    monkeypatch.setattr(auto, "get", lambda name: NoProof() if name == "cpsat" else get(name))
    found = auto.Auto().solve(problem, given, None)
    assert found.row is not None and found.history[-1].objective_us == pytest.approx(objective(problem, found.row))
    if patience is None:
        assert deadlines[0] < given.deadline - 0.05 and found.search is not None
    else:  # whoever asks for it ends by it
        assert deadlines[0] == pytest.approx(given.deadline) and found.search is None


def test_a_better_placement_refutes_the_word_of_cpsat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bound is its word: what the time after it finds below was an error of the whole run."""
    problem = copied(8, 1)
    best = get("local-search").solve(problem, Options.lasting(60, patience=2), None).row
    worst = np.where(np.arange(9) == 1, -1, np.cumsum(np.arange(9) != 1) - 1)
    value = objective(problem, worst)
    assert best is not None and objective(problem, best) < 0.999 * value

    class Wrong:
        def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
            return Outcome(worst, StoppedBy.TIME_LIMIT, 0.999 * value, own_bound_us=0.999 * value, note="cpsat")

    class Late(LocalSearch):
        def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
            return Outcome(worst if warm_start is None else best, StoppedBy.TIME_LIMIT)

    monkeypatch.setattr(auto, "get", lambda name: Wrong())
    monkeypatch.setattr(auto, "LocalSearch", Late)
    found = auto.Auto().solve(problem, Options.lasting(60), None)
    assert found.row is best and found.bound_us is None and found.own_bound_us is None and "refuted" in found.note
    ours = Outcome(worst, StoppedBy.ITERATIONS, 0.999 * value, own_bound_us=0.999 * value)
    kept = auto._searched_on(problem, Options.lasting(60), ours, claimed=False)
    assert kept.row is best and kept.bound_us == 0.999 * value  # a wrong bound of gemopt's own is an error of the run


def test_the_search_after_cpsat_ends_at_the_gap_to_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = copied(8, 1)
    asked: list[float] = []

    class Bounding:
        def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
            return Outcome(warm_start, StoppedBy.TIME_LIMIT, 12.0, own_bound_us=12.0)

    class Asked(LocalSearch):
        def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
            asked.append(options.bound_us)
            return super().solve(problem, replace(options, patience=0), warm_start)

    monkeypatch.setattr(auto, "get", lambda name: Bounding())
    monkeypatch.setattr(auto, "LocalSearch", Asked)
    assert auto.Auto().solve(problem, Options.lasting(60, bound_us=5.0), None).bound_us == 12.0
    assert asked == [5.0, 12.0]


def test_a_step_that_sums_too_many_passes_is_told_a_way_out() -> None:
    with pytest.raises(UnsupportedError, match="record each as a step of its own, or divide its counts"):
        get("local-search").solve(
            Problem.make(np.full((1, 8), 1 << 22), [ASSIGNMENTS], copied(8, 1).latencies), Options.lasting(1), None
        )

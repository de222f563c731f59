"""`auto`: what it tries to prove, and what it does with the time that a proof leaves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gemopt.evaluate import objective
from gemopt.latency import ASSIGNMENTS, Latency, line
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers import auto, get
from gemopt.solvers.base import Options, Outcome, Row
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
    get("local-search").solve(problem, Options.lasting(60, patience=1), None)  # loads what is compiled
    given = Options.lasting(2, patience=patience)

    class NoProof:
        def solve(self, problem: Problem, options: Options, warm_start: Row) -> Outcome:
            deadlines.append(options.deadline)
            return Outcome(warm_start, StoppedBy.TIME_LIMIT)

    monkeypatch.setattr(auto, "get", lambda name: NoProof() if name == "cpsat" else get(name))
    found = auto.Auto().solve(problem, given, None)
    assert found.row is not None and found.history[-1].objective_us == pytest.approx(objective(problem, found.row))
    if patience is None:
        assert deadlines[0] < given.deadline - 0.05 and found.search is not None
    else:  # whoever asks for it ends by it
        assert deadlines[0] == pytest.approx(given.deadline) and found.search is None

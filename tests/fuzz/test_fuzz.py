"""Thousands of random tiny problems against trying every placement; `make fuzz` tries 1e5."""

from __future__ import annotations

import fuzz
import numpy as np
import pytest

RUNS = [
    ("bounds", 600),
    *((name, 100) for name in fuzz.SIMPLE),
    ("auto", 150),
    ("branch", 200),
    ("columns", 200),
    ("cpsat", 150),
    ("highs", 100),
    ("cbc", 50),
]


@pytest.mark.parametrize(("name", "tries"), RUNS, ids=[name for name, _ in RUNS])
def test_no_bound_or_answer_is_wrong(name: str, tries: int) -> None:
    tally = fuzz.fuzz(name, range(tries))
    assert not tally.faults, "\n".join(tally.faults)
    assert tally.tried > tries // 4
    if name in fuzz.EXACT:
        assert tally.reached > tries // 8
        assert tally.proven > 0.9 * tally.tried


@pytest.mark.parametrize(("name", "seed"), [("highs", 1004673), ("highs", 1009009), ("cbc", 2000570), ("cbc", 2002148)])
def test_what_was_wrong_once_is_right(name: str, seed: int) -> None:
    """HiGHS with presolve called 68e9 us optimal where 22e9 are possible, and 1.9e14 where 2e10 are; CBC called its
    start, 2e10, optimal where 6.1e9 are, and after substitutions claimed a bound 3 % above an optimum."""
    tally = fuzz.fuzz(name, range(seed, seed + 1))
    assert tally.reached == 1 and not tally.faults, "\n".join(tally.faults)


def test_the_kinds_of_problems_all_occur() -> None:
    problems = [fuzz.random_problem(seed) for seed in range(400)]
    assert any(problem.num_steps == 1 for problem in problems)
    assert any(problem.num_experts == 1 for problem in problems)
    assert any((problem.slots_per_rank == 0).any() for problem in problems)
    assert any(not problem.equal_slots and problem.spare_slots for problem in problems)
    assert any((problem.weights_T == 0).any() for problem in problems)
    assert max(problem.counts_TE.max() for problem in problems) > 1e7
    curves = [curve for problem in problems for latency in problem.latencies for t in latency.terms for curve in t]
    assert any((np.diff(curve.y) < 0).any() for curve in curves)
    assert min(curve.y.max() for curve in curves if curve.y.max() > 0) < 1e-2
    assert max(curve.y.max() for curve in curves) > 1e9


def test_the_fuzz_finds_a_bound_that_is_too_high_and_an_answer_that_is_not_optimal() -> None:
    problem = fuzz.random_problem(2)
    best = fuzz.optimum(problem)
    right = fuzz.get("cpsat").solve(problem, fuzz.options_of(0), None)
    assert not list(fuzz.faults(problem, best, right, None))
    high = fuzz.Outcome(right.row, right.stopped_by, right.bound_us * 1.001)
    assert ["above the optimum" in fault for fault in fuzz.faults(problem, best, high, None)] == [True]
    rows = [fuzz.random_row(np.random.default_rng(seed), problem) for seed in range(50)]
    worse = max(rows, key=lambda row: fuzz.objective(problem, row))
    claimed = fuzz.Outcome(worse, right.stopped_by, right.bound_us)
    assert any("called optimal" in fault for fault in fuzz.faults(problem, best, claimed, None))

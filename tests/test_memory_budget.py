"""Memory budgets over all layers: what the answer is held against, what is proved, and what is told of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_split_search import measured, traces

import gemopt
from gemopt.evaluate import evaluate
from gemopt.placement import EMPTY, Split
from gemopt.result import Status, StoppedBy
from gemopt.traces import Traces

pytestmark = pytest.mark.usefixtures("quick_bounds")
BUDGET: dict[str, Any] = {"memory_budget": 90.0, "expert_bytes": 10, "threads": 1, "time_limit": 60.0}


def held(result: gemopt.Result) -> np.ndarray[Any, Any]:
    """[G] experts that each rank holds over all layers."""
    assert result.placement is not None
    kept = (result.placement.physical_to_logical != EMPTY).sum(axis=0)
    return np.bincount(result.placement.rank_of_slot, weights=kept, minlength=result.placement.num_ranks)


@pytest.mark.parametrize("solver", ["eplb", "local-search"])
def test_copies_go_where_they_gain_whether_the_solver_tells_what_it_found_or_not(solver: str) -> None:
    rng, shares = np.random.default_rng(0), [np.full(8, 1 / 8)] * 3 + [np.array([0.5, 0.2, *6 * [0.05]])]
    given = Traces(counts=np.stack([[rng.multinomial(400, p) for p in shares] for _ in range(20)]))
    profile = measured(1.0, 1.0, 1.0, 1.0)
    found = gemopt.solve(profile, given, solver=solver, patience=1, **BUDGET)
    assert found.placement is not None
    per_layer = (found.placement.physical_to_logical != EMPTY).sum(axis=1)
    assert (held(found) <= 9).all() and per_layer[3] > 9, "an even part has nine of each"
    plain = gemopt.solve(profile, given, solver=solver, patience=1, slots_per_rank=2, threads=1)
    assert found.objective_us is not None and plain.objective_us is not None
    assert found.objective_us < plain.objective_us


@pytest.mark.parametrize("seed", [3, 8, 24])
@pytest.mark.parametrize("split", [Split.EVEN, Split.STATIC])
def test_a_start_that_keeps_to_the_budget_makes_the_answer_no_worse(seed: int, split: Split) -> None:
    profile, given = measured(1.0, 1.2, 0.9), traces(layers=3, experts=8, seed=seed)
    given_to_both = {**BUDGET, "memory_budget": 100.0, "solver": "local-search", "split": split}
    start = gemopt.solve(profile, given, patience=20, seed=1, **given_to_both)
    again = gemopt.solve(profile, given, patience=0, warm_start=start.placement, **given_to_both)
    assert start.objective_us is not None and again.objective_us is not None
    assert again.objective_us <= start.objective_us * (1 + 1e-12)
    assert (held(again) <= 10).all()


def test_a_start_beyond_the_budget_is_a_hint() -> None:
    profile, given = measured(1.0, 1.2, 0.9), traces(layers=3, experts=8)
    options = {**BUDGET, "memory_budget": 100.0, "solver": "local-search", "patience": 0}
    slots = gemopt.solve(profile, given, **options).placement
    assert slots is not None
    start = gemopt.solve(profile, given, slots_per_rank=slots.slots_per_rank.tolist(), patience=0, threads=1)
    assert (held(start) > 10).any()
    found = gemopt.solve(profile, given, warm_start=start.placement, **options)
    assert (held(found) <= 10).all()
    even = gemopt.solve(profile, given, slots_per_rank=[4, 3, 3], solver="local-search", patience=0, threads=1)
    assert found.objective_us is not None and even.objective_us is not None
    assert found.objective_us <= 1.02 * even.objective_us


@pytest.mark.parametrize("solver", ["branch", "cpsat", "auto"])
def test_what_is_proved_with_all_slots_is_proved_of_the_budget(solver: str) -> None:
    profile, given = measured(1.0, 1.2, 0.9), traces(experts=4, steps=3)
    best = gemopt.solve(profile, given, slots_per_rank=4, solver="branch", threads=1, time_limit=60)
    found = gemopt.solve(profile, given, solver=solver, patience=3, **{**BUDGET, "memory_budget": 80.0})
    assert best.status is found.status is Status.OPTIMAL
    assert found.objective_us == pytest.approx(best.objective_us)


def test_branch_takes_the_copies_that_a_budget_left() -> None:
    profile, given = measured(1.0, 1.2, 0.9), traces(experts=4, steps=3)
    found = gemopt.solve(profile, given, solver="branch", patience=3, **{**BUDGET, "memory_budget": 40.0})
    assert found.placement is not None and found.placement.has_copies and (held(found) <= 4).all()
    assert found.objective_us == pytest.approx(evaluate(found.placement, profile, given).objective_us)
    assert found.status is Status.FEASIBLE and found.stopped_by is StoppedBy.ITERATIONS, "proved of its slots alone"


def test_an_answer_for_which_the_time_was_too_short_says_so() -> None:
    found = gemopt.solve(measured(1.0, 1.2, 0.9), traces(layers=3, experts=8), **{**BUDGET, "time_limit": 0.01})
    assert found.stopped_by is StoppedBy.TIME_LIMIT and (held(found) <= 9).all()

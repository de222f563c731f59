"""Memory budgets over all layers: what the answer is held against, what is proved, and what is told of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_split_search import measured, sloped, traces

import gemopt
from gemopt.evaluate import evaluate
from gemopt.exceptions import InputError
from gemopt.latency import ASSIGNMENTS
from gemopt.layer_rules import layer_rules
from gemopt.placement import EMPTY, Split
from gemopt.problem import Problem
from gemopt.result import Status, StoppedBy
from gemopt.rules import Rules
from gemopt.solvers.search import copies
from gemopt.solving.memory import even_slots, experts_within, most_slots, thinned
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


def test_a_memory_budget_holds_for_every_device_and_is_spent() -> None:
    profile, given = measured(1.0, 1.0, 1.0), traces(layers=3)
    budget = [80.0, 90.0, 70.0]
    result = gemopt.solve(
        profile, given, slots_per_rank=4, memory_budget=budget, expert_bytes=10, patience=1, threads=1, time_limit=60
    )
    assert result.placement is not None
    held = (result.placement.physical_to_logical != EMPTY).sum(axis=0)
    per_rank = np.bincount(result.placement.rank_of_slot, weights=held)
    assert (per_rank <= [8, 9, 7]).all() and per_rank.sum() > 18, "copies help here"
    assert evaluate(result.placement, profile, given).objective_us == pytest.approx(result.objective_us)
    assert result.bound_us <= result.objective_us
    tight = gemopt.solve(profile, given, memory_budget=60, expert_bytes=10, patience=1, threads=1)
    assert tight.placement is not None and not tight.placement.has_copies


def test_a_memory_budget_is_never_worse_than_its_even_part_in_every_layer() -> None:
    profile, given = measured(1.0, 1.2, 0.9), traces(layers=4)
    options = {"solver": "local-search", "patience": 0, "threads": 1, "time_limit": 60}
    even = gemopt.solve(profile, given, slots_per_rank=3, **options)
    for slots in (None, 6):
        found = gemopt.solve(profile, given, memory_budget=120.0, expert_bytes=10, slots_per_rank=slots, **options)
        assert found.placement is not None and even.objective_us is not None and found.objective_us is not None
        assert found.objective_us <= even.objective_us
        assert (found.placement.physical_to_logical != EMPTY).sum() <= 36


def test_an_even_part_of_a_budget_leaves_nothing_and_no_layer_without_slots() -> None:
    even = even_slots(np.array([10, 7, 12]), np.array([4, 4, 3]), 3)
    assert even.sum(axis=0).tolist() == [10, 7, 9], "the third has no more than three slots in a layer"
    assert np.ptp(even, axis=0).max() <= 1 and sorted(even.sum(axis=1).tolist()) == [8, 9, 9]


def test_thinning_moves_experts_where_a_rank_holds_too_much_without_copies() -> None:
    problem = Problem.make([[9, 5, 4, 1]], (ASSIGNMENTS,), sloped(1, 1, 1), 3)
    row = np.array([0, 1, 2, 3, EMPTY, EMPTY, 0, EMPTY, EMPTY])
    (kept,) = thinned([problem], [row], np.array([1, 2, 1]))
    assert np.bincount(problem.rank_of_slot[kept != EMPTY], minlength=3).tolist() == [1, 2, 1]
    assert sorted(kept[kept != EMPTY].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("looks", [0, 1, 4, 7])
def test_thinning_looks_at_the_objective_only_while_it_has_the_time(
    looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem.make([[9, 5, 4, 1]], (ASSIGNMENTS,), sloped(1, 1, 1), 3)
    row = np.array([0, 1, 2, 0, 1, 3, 0, 2, 3])
    asked, exact = [], []
    counted = copies.removal_costs
    monkeypatch.setattr(copies, "removal_costs", lambda *given: (exact.append(1), counted(*given)))
    late = lambda: asked.append(1) or len(asked) > looks  # noqa: E731
    kept = thinned([problem] * 2, [row] * 2, np.array([3, 3, 2]), late)
    assert len(exact) <= looks
    assert sum((each != EMPTY).sum() for each in kept) == 8
    assert all(set(each) - {EMPTY} == {0, 1, 2, 3} for each in kept)


def test_what_nothing_can_be_done_about_is_said() -> None:
    problem = Problem.make([[9, 5, 4, 1]], (ASSIGNMENTS,), sloped(1, 1, 1), 3)
    (pinned,) = layer_rules(Rules(pinned=[{"experts": [0, 1], "ranks": [0]}]), [0], 4, 3, [0, 0, 0])
    row = np.array([0, 1, EMPTY, 2, 3, EMPTY, EMPTY, EMPTY, EMPTY])
    with pytest.raises(InputError, match="1 experts too many on rank 0; no placement within it that keeps the rules"):
        thinned([replace(problem, rules=pinned)], [row], np.array([1, 2, 1]))
    (kept,) = thinned([replace(problem, rules=pinned)], [row], np.array([2, 1, 1]))
    assert pinned is not None and pinned.broken(kept, problem.slots_per_rank) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"memory_budget": 50.0, "expert_bytes": 10}, "need room for 12"),
        ({"memory_budget": 10.0, "expert_bytes": 10}, "need room for 12"),
        ({"memory_budget": 100.0}, "size of an expert"),
        ({"memory_budget": [100.0], "expert_bytes": 10}, "one for each of 2"),
        ({"memory_budget": -1.0, "expert_bytes": 10}, "bytes per device"),
        ({"slots_per_rank": 7}, "never holds two copies of one expert"),
    ],
)
def test_memory_that_cannot_hold_the_experts_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        gemopt.solve(measured(1, 2), traces(), **change)


def test_a_budget_counts_whole_experts() -> None:
    assert experts_within(39.0, 10, 2).tolist() == [3, 3]
    assert most_slots(np.array([12, 12]), 2, 8).tolist() == [8, 8]
    assert most_slots(np.array([9, 9]), 2, 8).tolist() == [6, 6]


def test_memory_for_every_slot_is_no_budget() -> None:
    """What is asked for by bytes and by slots is then the same, and proved as much."""
    profile, given = measured(1.0, 1.2), traces(layers=2, experts=3)
    options = {"solver": "branch", "threads": 1, "time_limit": 60.0}
    found = gemopt.solve(profile, given, memory_budget=60.0, expert_bytes=10, **options)
    plain = gemopt.solve(profile, given, slots_per_rank=3, **options)
    assert found.status is plain.status is Status.OPTIMAL
    assert found.placement == plain.placement

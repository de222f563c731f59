"""Greedy mapping by makespan: where each expert and copy goes, and that searches begin there."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from gemopt.conflicts import classify
from gemopt.evaluate import check, objective
from gemopt.latency import ACTIVE, ASSIGNMENTS, Curve, Latency, line
from gemopt.placement import EMPTY
from gemopt.problem import Problem
from gemopt.solvers import get
from gemopt.solvers.base import Options
from gemopt.solvers.baselines.gem import ORDER, in_order
from gemopt.solvers.search import mapping
from gemopt.solvers.search.mapping import MOST_STEPS, mapped_row
from gemopt.solvers.search.packing import lpt_row
from gemopt.solvers.search.state import make_costs

NEVER = np.zeros(1, np.uint8)


def make(*, steps: int = 20, slots: object = (5, 4, 3), active: bool = False) -> Problem:
    rng = np.random.default_rng(3)
    counts = rng.poisson(rng.gamma(0.7, 9.0, 11) * rng.uniform(0.3, 1.7, (steps, 1)))
    factors = rng.uniform(0.8, 1.3, 3)
    if active:
        latencies = [Latency(((line(9 * f, 0.5 * f), line(0.0, 2 * f)),)) for f in factors]
        return Problem.make(counts, (ASSIGNMENTS, ACTIVE), latencies, slots)
    stairs = [Latency(((Curve([0, 1, 16, 17, 48], [4 * f, 9 * f, 10 * f, 17 * f, 30 * f], f),),)) for f in factors]
    return Problem.make(counts, (ASSIGNMENTS,), stairs, slots)


@pytest.mark.parametrize("active", [False, True], ids=["staircase", "roofline"])
@pytest.mark.parametrize("copies", [1, 2])
def test_each_goes_where_the_makespan_so_far_is_least(active: bool, copies: int) -> None:
    problem = make(slots=[5, 4, 3] if copies == 1 else [6, 5, 4], active=active)
    copies_E = np.ones(11, np.int64)
    copies_E[[2, 7]] = copies
    order_E = np.random.default_rng(1).permutation(11)
    row = mapped_row(problem, make_costs(problem), copies_E, NEVER, order_E)
    assert row is not None
    check(problem, row)
    assert (np.bincount(row[row != EMPTY]) == copies_E).all()
    held: list[list[int]] = [[], [], []]

    def times(rank: int, experts: list[int]) -> Any:
        shares_TE = np.ceil(problem.counts_TE[:, experts] / copies_E[experts]).astype(int)
        return problem.latencies[rank]([feature.of(shares_TE).sum(axis=1) for feature in problem.features])

    def makespan(expert: int, chosen: int) -> float:
        held_now = [[*held[g], expert] if g == chosen else held[g] for g in range(3)]
        return float(np.max([times(g, held_now[g]) for g in range(3)], axis=0).sum())

    for expert in order_E.tolist():
        left = set(problem.rank_of_slot[row == expert].tolist())
        while left:  # whichever of its copies came first
            open_ = [g for g in range(3) if len(held[g]) < problem.slots_per_rank[g] and expert not in held[g]]
            costs = {g: makespan(expert, g) for g in open_}
            best = min(left, key=lambda g: costs[g])
            assert costs[best] == pytest.approx(min(costs.values()))
            held[best].append(expert)
            left.remove(best)


def test_most_load_per_copy_comes_first_where_no_order_is_given() -> None:
    problem, copies_E = make(slots=[6, 5, 4]), np.ones(11, np.int64)
    heat_E = problem.linearised[1].mean(axis=0)
    copies_E[heat_E.argmax()] = 3
    order_E = np.argsort(-heat_E / copies_E, kind="stable")
    costs = make_costs(problem)
    given, own = (mapped_row(problem, costs, copies_E, NEVER, order) for order in (order_E, None))
    assert given is not None and own is not None and (given == own).all()


def test_a_copy_without_a_rank_of_its_own_and_a_stop_give_no_row() -> None:
    problem, copies_E = make(slots=[9, 3, 2]), np.ones(11, np.int64)
    copies_E[0] = 3
    costs, last = make_costs(problem), np.roll(np.arange(11), -1)
    assert mapped_row(problem, costs, copies_E, NEVER, last) is None  # the small ranks are full by then
    assert mapped_row(problem, costs, np.ones(11, np.int64), np.ones(1, np.uint8)) is None


def test_of_many_steps_some_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    map_in_order = mapping.map_in_order
    monkeypatch.setattr(mapping, "map_in_order", lambda *given: seen.append(given) or map_in_order(*given))
    problem = make(steps=400)
    row = mapped_row(problem, make_costs(problem), np.ones(11, np.int64), NEVER)
    assert row is not None and seen[0][1].shape == (11, 1, MOST_STEPS) and len(seen[0][4]) == MOST_STEPS
    check(problem, row)


def test_gem_places_by_class_and_then_by_heat() -> None:
    problem, noise_E = make(), np.linspace(0.5, 2.0, 11)
    classes = classify(problem.counts_TE)
    order_E = in_order(problem, classes, noise_E)
    heat_E = problem.linearised[1].mean(axis=0) * noise_E
    keys = [(ORDER.index(classes[e]), -heat_E[e]) for e in order_E.tolist()]
    assert keys == sorted(keys) and sorted(order_E.tolist()) == list(range(11))
    first = get("gem").solve(problem, Options(deadline=np.inf, patience=0), None)
    row = mapped_row(
        problem, make_costs(problem), np.ones(11, np.int64), NEVER, in_order(problem, classes, np.ones(11))
    )
    assert first.row is not None and row is not None
    assert objective(problem, first.row) <= objective(problem, row)


@pytest.mark.parametrize("spare", [0, 1, 2])
def test_where_ranks_tie_at_most_steps_a_descent_begins_with_experts_hot_at_different_steps(spare: int) -> None:
    """Each expert is needed at one step of eight only, so that means say nothing: four a rank, no two of one step."""
    rng = np.random.default_rng(0)
    step_E = rng.permutation(np.repeat(np.arange(8), 8))
    counts = (np.arange(8)[:, None] == step_E).astype(int)
    problem = Problem.make(counts, (ASSIGNMENTS,), [Latency(((line(0.0, 1.0),),))] * 8, 8 + spare)
    assert objective(problem, lpt_row(problem)) > 16.0
    found = get("local-search").solve(problem, Options(deadline=np.inf, patience=0), None)
    assert found.row is not None and objective(problem, found.row) == 8.0


def test_copies_that_help_nobody_are_left_out_at_the_start() -> None:
    """One expert is hot, the others have one assignment each: copies of those cost their descents' whole time."""
    counts = np.ones((6, 16), int)
    counts[:, 3] = 40
    problem = Problem.make(counts, (ASSIGNMENTS,), [Latency(((line(0.0, 1.0),),))] * 4, 8)
    search = get("local-search")
    found = search.solve(problem, Options(deadline=np.inf, patience=0), None)
    assert found.row is not None and found.history[-1].objective_us == objective(problem, found.row) == 6 * 14.0


def test_without_time_nothing_is_mapped_and_later_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    mapped = mapping.mapped_row
    monkeypatch.setattr(mapping, "mapped_row", lambda *given: calls.append(1.0) or mapped(*given))
    problem, search = make(slots=[4, 4, 3]), get("local-search")
    first = search.solve(problem, Options(deadline=time.monotonic(), patience=0), None)
    assert not calls and first.row is not None
    rest = search.solve(problem, Options(deadline=np.inf, patience=0, begun=first.search), None)
    assert len(calls) == 1 and rest.row is not None
    assert objective(problem, rest.row) <= objective(problem, first.row)
    search.solve(problem, Options(deadline=np.inf, patience=1, begun=rest.search), None)
    assert len(calls) == 1

"""The search and the greedy starts keep rules; solvers that cannot say so."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from brute import random_problem
from cli_inputs import profile
from ruled import NODES, sets_of

from gemopt.costs import fit
from gemopt.evaluate import check, objective
from gemopt.exceptions import UnsupportedError
from gemopt.latency import ASSIGNMENTS, Latency, line
from gemopt.layer_rules import layer_rules, rules_of
from gemopt.migration import held as held_by
from gemopt.moves import Moves
from gemopt.placement import EMPTY, Placement, Split
from gemopt.problem import Problem
from gemopt.rules import Rules
from gemopt.solvers import get, hurried, names
from gemopt.solvers.base import Options, require
from gemopt.solvers.nearest import fewest, fewest_row, nearest_row
from gemopt.solvers.placing import Rows, first_row
from gemopt.solvers.search.linked_copies import _changes
from gemopt.solvers.search.local_search import LocalSearch
from gemopt.solvers.search.packing import filled
from gemopt.solvers.search.state import make_costs, make_state
from gemopt.solvers.search.swaps import KICK_DRAWS, descend, iterate, total_cost
from gemopt.solving.ruled import exemplified


def larger(seed: int = 0, *, spare: int = 4, **rules: Any) -> Problem:
    """16 experts on 4 ranks of 2 nodes; rank 1 is slower."""
    rng = np.random.default_rng(seed)
    model, _ = fit(profile(4), model="staircase")
    counts = rng.poisson(np.linspace(1, 6, 16), size=(40, 16))
    (asked,) = layer_rules(Rules(**rules), [0], 16, 4, [0, 0, 1, 1])
    slots = np.full(4, 4) + np.array([spare, 0, 0, 0])
    problem = Problem.make(counts, model.features, model.latencies, slots, node_of_rank=[0, 0, 1, 1])
    return replace(problem, rules=asked)


RULES: dict[str, Any] = {
    "apart": [{"experts": [15, 14, 13]}, {"experts": [0, 1]}],
    "pinned": [{"experts": [2, 3], "ranks": [1, 2]}],
    "together": [{"experts": [5, 6]}, {"experts": [7, 8, 9], "on": "node"}],
}


@pytest.mark.parametrize("heat", [0.0, 1.0])
def test_the_search_knows_at_every_swap_what_is_barred(heat: float) -> None:
    problem = larger(apart=RULES["apart"], pinned=RULES["pinned"])
    costs = make_costs(problem)
    state = make_state(problem, first_row(problem), costs)
    start = total_cost(state)
    descend(costs, state, np.ones(4, bool), True)
    draws = np.random.default_rng(1).random((30, KICK_DRAWS))
    iterate(costs, state, draws, total_cost(state), state.content.copy(), np.zeros(2), heat)
    check(problem, state.content)
    assert (state.barred == make_state(problem, state.content, costs).barred).all()
    assert total_cost(state) < start


def test_experts_kept_apart_may_change_places() -> None:
    (asked,) = layer_rules(Rules(apart=[{"experts": [0, 1]}]), [0], 4, 2, [0, 0])
    model, _ = fit(profile(2), model="staircase")
    problem = Problem.make([[60, 1, 5, 5]], model.features, model.latencies)
    problem = replace(problem, rules=asked)
    outcome = LocalSearch().solve(problem, Options.lasting(60, patience=0), np.array([1, 2, 0, 3]))
    assert outcome.row is not None
    assert sets_of(problem, outcome.row)[0] == (0,), "rank 1 is slower: 0 and 1 change places in one swap"


@pytest.mark.parametrize("split", list(Split))
@pytest.mark.parametrize("full", [False, True])
def test_every_policy_keeps_the_rules(split: Split, full: bool) -> None:
    problem = replace(larger(**RULES), split=split, full=full)
    start = first_row(problem)
    outcome = LocalSearch().solve(problem, Options.lasting(60, patience=2), None)
    assert outcome.row is not None
    check(problem, outcome.row)
    if not full:
        assert objective(problem, outcome.row) < objective(problem, start)


def test_sets_change_their_units() -> None:
    problem = larger(groups=[{"num_groups": 4}], spare=0)
    assert problem.rules is not None
    units = {}
    for order in ((0, 1, 2, 3), (0, 1, 3, 2)):  # the heaviest groups together on a node, at first
        row = np.concatenate([np.arange(4) + 4 * group for group in order])
        outcome = LocalSearch().solve(problem, Options.lasting(60, patience=8), row)
        assert outcome.row is not None
        check(problem, outcome.row)
        assert objective(problem, outcome.row) < objective(problem, row)
        units[order] = problem.rules.units(outcome.row, problem.slots_per_rank)
    assert all(sorted(found) == [0, 0, 1, 1] and found[2] != found[3] for found in units.values())


def test_a_warm_start_that_breaks_rules_is_changed_little() -> None:
    problem = larger(apart=[{"experts": [0, 1]}], spare=0)
    row = np.arange(16)
    found = nearest_row(problem, row)
    assert found is not None
    check(problem, found)
    before, after = sets_of(problem, row), sets_of(problem, found)
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 2


@pytest.mark.parametrize("name", names())
def test_solvers_keep_rules_or_say_that_they_cannot(name: str) -> None:
    problem = larger(apart=[{"experts": [0, 1]}], spare=0)
    if get(name).supports.rules:
        require(get(name), problem, lambda need: [])
        return
    with pytest.raises(UnsupportedError, match=r"rules: got apart\[0\]; .* cannot keep rules; use x"):
        require(get(name), problem, lambda need: ["x"])


def test_copies_under_links_keep_the_rules() -> None:
    problem = larger(apart=RULES["apart"], pinned=RULES["pinned"], reserved=[{"ranks": [0], "experts": list(range(9))}])
    row = np.array([0, 4, 6, 8, EMPTY, EMPTY, EMPTY, EMPTY, 1, 2, 9, 15, 3, 5, 10, 14, 7, 11, 12, 13])
    check(problem, row)
    changes = list(_changes(problem, row))
    assert changes
    for changed in changes:
        check(problem, changed)


def test_the_fewest_moves_are_proven_for_many_experts() -> None:
    """128 experts at random places, which groups put on two nodes: about half of them must change their node."""
    row = np.random.default_rng(0).permutation(128)
    placed = Placement(physical_to_logical=[row], slots_per_rank=np.full(8, 16), num_experts=128)
    (asked,) = rules_of(
        placed.under(Rules(groups=[{"num_groups": 8}], apart=[{"experts": [1, 2, 3]}]), [0] * 4 + [1] * 4)
    )
    problem = replace(
        Problem.make(np.ones((1, 128), int), (ASSIGNMENTS,), [Latency(((line(1, 1),),))] * 8, 16), rules=asked
    )
    moves = Moves(held_by(row, problem.slots_per_rank, 128))
    fewest, nearest = fewest_row(problem.with_moves(moves)), nearest_row(problem, row)
    assert asked is not None and fewest is not None and nearest is not None
    assert asked.broken(fewest, problem.slots_per_rank) is None
    assert 40 < moves.count(fewest, problem.slots_per_rank) == moves.count(nearest, problem.slots_per_rank) < 70


@pytest.mark.parametrize("name", ["branch", "columns"])
def test_provers_without_rules_refuse_them_also_when_called_directly(name: str) -> None:
    problem = random_problem(3, spare=False)
    rules = Rules(pinned=[{"experts": [0], "ranks": [0]}])
    (asked,) = layer_rules(rules, [0], problem.num_experts, problem.num_ranks, NODES[: problem.num_ranks])
    with pytest.raises(UnsupportedError, match="rules"):
        get(name).solve(replace(problem, rules=asked), Options(deadline=np.inf), None)


def test_a_placement_in_force_that_keeps_the_rules_is_there_before_anything_is_solved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = larger(**RULES)
    home = first_row(problem)
    monkeypatch.setattr("gemopt.solvers.nearest.solved", pytest.fail)
    moved = problem.with_moves(Moves.make(held_by(home, problem.slots_per_rank, 16), most=0))
    found = fewest_row(moved)
    assert found is not None and sets_of(problem, found) == sets_of(problem, home)


@pytest.mark.parametrize("kind", ["slack", "full", "moves"])
def test_without_time_the_known_example_of_the_rules_is_the_answer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(larger(**RULES), full=kind == "full")
    if kind == "moves":
        problem = problem.with_moves(Moves.make(held_by(np.arange(20) % 16, problem.slots_per_rank, 16), 1.0))
    (known,), note = exemplified([problem], [0], time.monotonic() + 60)
    assert not note
    monkeypatch.setattr(Rows, "solve", pytest.fail)
    if kind == "moves":
        monkeypatch.setattr("gemopt.solvers.nearest.solved", lambda *_, **__: (None, False))
    with hurried.call(-np.inf, lambda: False), hurried.better_by(-np.inf):
        row = fewest_row(known) if kind == "moves" else first_row(known)
    assert row is not None
    check(problem, filled(known, row) if kind == "full" else row)


@pytest.mark.parametrize("alike", [True, False])
def test_without_time_an_example_is_looked_for_a_second_a_layer(alike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, problem = list[float](), larger(**RULES)
    monkeypatch.setattr(Rows, "solve", lambda _, seconds: asked.append(seconds) or (None, False))
    assert problem.rules is not None
    layers = [problem if alike else replace(problem, rules=replace(problem.rules)) for _ in range(5)]
    with hurried.call(-np.inf, lambda: False):
        assert not exemplified(layers, range(5), -np.inf)[1]
    assert sum(asked) == 5 * hurried.LEAST_S


def test_experts_without_rules_are_counted_and_not_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few moves, and as many copies kept, as where every expert is told apart."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        problem = larger(seed, apart=RULES["apart"], pinned=[{"experts": [2, 3], "ranks": [int(rng.integers(4))]}])
        home_GE = np.zeros((4, 16), bool)
        for expert in range(16):
            home_GE[rng.permutation(4)[: rng.choice([0, 1, 1, 1, 2])], expert] = True
        moves = Moves.make(home_GE, most_into_G=None if seed % 2 else np.array([9, 4, 4, 4]))
        found = [_quality(problem.with_moves(moves))]
        with monkeypatch.context() as all_ruled:
            all_ruled.setattr("gemopt.layer_rules.LayerRules.ruled_E", np.ones(16, bool))
            found.append(_quality(problem.with_moves(moves)))
        assert found[0] == found[1], seed


def _quality(problem: Problem) -> tuple[int, int] | None:
    row, proven = fewest(replace(problem, rules=replace(problem.rules)))
    assert proven and problem.moves is not None and problem.rules is not None
    if row is None:
        return None
    assert problem.rules.broken(row, problem.slots_per_rank) is None
    held_GE = held_by(row, problem.slots_per_rank, 16)
    moved = problem.moves.count(row, problem.slots_per_rank)
    return moved, int(held_GE.sum()) - moved

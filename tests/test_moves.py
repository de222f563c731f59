"""Price and limits of moves in a layer's problem: what is counted, what is feasible, and what solvers make of them."""

from __future__ import annotations

import time
from itertools import product
from typing import Any

import brute
import numpy as np
import pytest

from gemopt.evaluate import check, objective, total
from gemopt.exceptions import InputError, UnsupportedError
from gemopt.latency import ASSIGNMENTS, Latency, line
from gemopt.migration import count_moves, held
from gemopt.moves import Moves
from gemopt.problem import Problem
from gemopt.solvers import get, names, that_can
from gemopt.solvers.base import Options, require
from gemopt.solvers.budget import Front, Point, divide, divide_by_rank, walk_front
from gemopt.solvers.relabel import relabelled
from gemopt.solvers.search.moves import few_moves
from gemopt.solving import walks
from gemopt.solving.walks import walk_fronts

CLOSE = 1e-6


def options(**changes: object) -> Options:
    return Options.lasting(60, **{"patience": 20, **changes})  # type: ignore[arg-type]


def layer(seed: int, *, experts: int = 16, ranks: int = 4, slots: object = None, equal: bool = False) -> Problem:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.6, 8.0, experts) * rng.uniform(0.4, 1.6, (30, 1)))
    speeds = np.ones(ranks) if equal else rng.uniform(0.8, 1.3, ranks)
    return Problem.make(counts, (ASSIGNMENTS,), [Latency(((line(10.0, s),),)) for s in speeds], slots)


def row_of(problem: Problem, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(problem.num_slots) % problem.num_experts


# What a move is


def test_a_move_is_an_expert_that_a_rank_did_not_hold() -> None:
    problem = layer(0).with_moves(Moves.make(held(np.arange(16), layer(0).slots_per_rank, 16), 3.0))
    assert problem.moves is not None
    row = np.arange(16)
    assert total(problem, row) == objective(problem, row)
    row[[0, 4]] = row[[4, 0]]  # ranks 0 and 1 change an expert
    row[[8, 9]] = row[[9, 8]]  # within rank 2
    assert problem.moves.into(row, problem.slots_per_rank).tolist() == [1, 1, 0, 0]
    assert total(problem, row) == objective(problem, row) + 6.0
    assert problem.moves.count(row, problem.slots_per_rank) == count_moves(np.arange(16), row, problem.slots_per_rank)
    assert problem.select(np.arange(3)).moves is problem.moves


def test_check_holds_the_limits() -> None:
    problem, home = layer(1), held(np.arange(16), layer(1).slots_per_rank, 16)
    row = np.arange(16)
    row[[0, 4]] = row[[4, 0]]
    check(problem.with_moves(Moves.make(home, most=2, most_into_G=[1, 1, 0, 0])), row)
    for moves in (Moves.make(home, most=1), Moves.make(home, most_into_G=[1, 0, 4, 4])):
        with pytest.raises(InputError, match=r"\d allowed"):
            check(problem.with_moves(moves), row)


@pytest.mark.parametrize(
    "wrong",
    [{"price_us": -1.0}, {"price_us": float("nan")}, {"most": -1}, {"most_into_G": [1, 1]}, {"most_into_G": [-1] * 4}],
)
def test_bad_prices_and_limits_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Moves.make(np.ones((4, 16)), **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"ranks, experts"):
        layer(0).with_moves(Moves.make(np.ones((4, 15))))


def test_fewest_moves_are_those_of_brute_force() -> None:
    seen = set()
    for seed in range(60):
        problem = brute.random_moves(seed)
        moves = problem.moves
        allowed = [
            int(into.sum())
            for _, into in brute.placements(problem)
            if (moves.most is None or into.sum() <= moves.most)
            and (moves.most_into_G is None or (into <= moves.most_into_G).all())
        ]
        row = moves.fewest(problem.slots_per_rank)
        assert (row is None) == (not allowed), seed
        seen.add(row is None)
        if row is not None:
            check(problem, row)
            assert moves.count(row, problem.slots_per_rank) == min(allowed), seed
    assert seen == {True, False}


def test_fewest_moves_leave_a_placement_in_force_as_it_is() -> None:
    problem = layer(2, slots=6)
    row = np.concatenate([np.arange(16), [3, 5, 7, -1, 0, 1, -1, 9]]).reshape(6, 4).T.ravel()
    home = held(row, problem.slots_per_rank, 16)
    kept = Moves(home).fewest(problem.slots_per_rank)
    assert kept is not None
    assert (held(kept, problem.slots_per_rank, 16) == home).all()


# Solvers


@pytest.mark.parametrize("name", ["local-search", "gem"])
def test_search_stays_within_the_limits_and_scores_as_brute_force_does(name: str) -> None:
    """On tiny problems the searches find the optimum nearly always; they are never below it."""
    found = worse = 0
    for seed in range(40):
        problem = brute.random_moves(seed)
        best = brute.optimum(problem)
        outcome = get(name).solve(problem, options(), None)
        if outcome.row is None:
            assert outcome.infeasible and best == np.inf, seed
            continue
        check(problem, outcome.row)
        found += 1
        value = total(problem, outcome.row)
        assert value >= best - CLOSE * abs(best) - 1e-9, seed
        worse += value > best + CLOSE * abs(best) + 1e-9 and (name != "gem" or not problem.spare_slots)
        assert outcome.history[-1].objective_us == pytest.approx(value)
    assert found > 20
    assert worse <= (0 if name == "local-search" else 3)


@pytest.mark.parametrize("name", ["cpsat", "milp", "auto"])
def test_exact_solvers_equal_brute_force(name: str) -> None:
    found = 0
    for seed in range(100, 100 + (40 if name != "milp" else 12)):
        problem = brute.random_moves(seed)
        best = brute.optimum(problem)
        outcome = get(name).solve(problem, options(), None)
        if outcome.row is None:
            assert outcome.infeasible and best == np.inf, seed
            continue
        check(problem, outcome.row)
        found += 1
        assert total(problem, outcome.row) == pytest.approx(best, rel=CLOSE, abs=1e-9), seed
        assert outcome.bound_us is None or outcome.bound_us <= best + CLOSE * abs(best) + 1e-9, seed
    assert found > 5


@pytest.mark.parametrize("slots", [None, 5, [6, 4, 4, 4]], ids=["just", "spare", "unequal"])
@pytest.mark.parametrize("most", [2, 6, None])
def test_local_search_is_never_worse_than_few_moves(slots: object, most: int | None) -> None:
    for seed in range(3):
        problem = layer(seed, slots=slots)
        home = held(np.append(np.arange(16), np.full(problem.spare_slots, -1)), problem.slots_per_rank, 16)
        price = 0.0 if most else 20.0
        problem = problem.with_moves(Moves.make(home, price, most))
        assert problem.moves is not None
        start = problem.moves.fewest(problem.slots_per_rank)
        assert start is not None
        way = few_moves(problem, home, start=start, price_us=price, max_moves=most)
        outcome = get("local-search").solve(problem, options(patience=3), None)
        assert outcome.row is not None
        assert total(problem, outcome.row) <= min(total(problem, point.row) for point in way)
        check(problem, outcome.row)


def test_a_high_price_keeps_everything_and_a_low_one_moves_what_pays() -> None:
    problem, home = layer(3), held(np.arange(16), layer(3).slots_per_rank, 16)
    moved = []
    for price in (1e9, 50.0, 5.0, 0.01):
        priced = problem.with_moves(Moves.make(home, price))
        row = get("local-search").solve(priced, options(patience=3), None).row
        assert row is not None and priced.moves is not None
        moved.append(priced.moves.count(row, priced.slots_per_rank))
    assert moved[0] == 0
    assert moved[-1] > 2
    assert moved == sorted(moved)


def test_solvers_that_cannot_heed_moves_say_so() -> None:
    problem = layer(0).with_moves(Moves.make(np.ones((4, 16)), 1.0))
    for name in names():
        if get(name).supports.moves:
            require(get(name), problem, that_can)
            continue
        with pytest.raises(UnsupportedError, match="local-search"):
            require(get(name), problem, that_can)
    assert {"local-search", "gem", "cpsat", "milp", "auto"} <= set(that_can("moves"))
    assert not get("lpt").supports.moves


# Relabelling


def test_relabelling_finds_a_renamed_placement_again() -> None:
    for seed in range(20):
        problem = layer(seed, equal=True)
        home, order = row_of(problem, seed), np.random.default_rng(seed).permutation(4)
        renamed = home.reshape(4, -1)[order].ravel()
        found = relabelled(problem, renamed, held(home, problem.slots_per_rank, 16))
        assert count_moves(home, found, problem.slots_per_rank) == 0
        assert objective(problem, found) == objective(problem, renamed)


@pytest.mark.parametrize("slots", [None, 6])
def test_relabelling_never_costs(slots: object) -> None:
    """Ranks that differ keep their roles; copies may forbid an exchange; moves never grow."""
    gained = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        problem = layer(seed, slots=slots)
        twins = [problem.latencies[g // 2 * 2] for g in range(4)]
        problem = Problem.make(problem.counts_TE, problem.features, twins, slots)
        home, wanted = (_random_row(rng, problem) for _ in range(2))
        before = count_moves(home, wanted, problem.slots_per_rank)
        found = relabelled(problem, wanted, held(home, problem.slots_per_rank, 16))
        check(problem, found)
        after = count_moves(home, found, problem.slots_per_rank)
        assert after <= before
        gained += before - after
        assert objective(problem, found) <= objective(problem, wanted)
        by_rank = [set(part.tolist()) - {-1} for part in np.split(found, 4)]
        wanted_by_rank = [set(part.tolist()) - {-1} for part in np.split(wanted, 4)]
        for pair in ((0, 1), (2, 3)):
            assert sorted(map(sorted, (by_rank[g] for g in pair))) == sorted(
                map(sorted, (wanted_by_rank[g] for g in pair))
            )
    assert gained > 0


def _random_row(rng: np.random.Generator, problem: Problem) -> np.ndarray:
    """Every expert once, and copies in the rest."""
    size = problem.num_slots // problem.num_ranks
    contents: list[list[int]] = [[] for _ in range(problem.num_ranks)]
    for expert in rng.permutation(problem.num_experts):
        contents[int(rng.choice([g for g in range(4) if len(contents[g]) < size]))].append(int(expert))
    for content in contents:
        others = [expert for expert in range(problem.num_experts) if expert not in content]
        content.extend(rng.permutation(others)[: size - len(content)].tolist())
    return np.array(contents).ravel()


# One budget over layers


def test_division_is_the_best_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        layers, budget = int(rng.integers(1, 4)), int(rng.integers(0, 6))
        values = [np.minimum.accumulate(rng.integers(0, 20, budget + 1).astype(float)) for _ in range(layers)]
        for each in values:
            if rng.random() < 0.4:
                each[: int(rng.integers(0, budget + 2))] = np.inf
        best = min(
            (
                sum(values[index][k] for index, k in enumerate(moves))
                for moves in product(range(budget + 1), repeat=layers)
                if sum(moves) <= budget
            ),
            default=np.inf,
        )
        found = divide(values, budget)
        if found is None:
            assert best == np.inf
            continue
        value, moves = found
        assert value == best == sum(values[index][k] for index, k in enumerate(moves))
        assert sum(moves) <= budget


def test_fronts_fall_and_bounds_hold_for_fewer_moves() -> None:
    problem, home = layer(5), held(np.arange(16), layer(5).slots_per_rank, 16)
    front = walk_front(problem.with_moves(Moves.make(home)), 8)
    best = front.best(8)
    assert len(front.points) > 2 and (np.diff(best) <= 0).all() and np.isfinite(best[0])
    assert front.at(8).total_us == best[8] and front.at(0).moves == 0
    front.bounds = [(2, 7.0), (6, 5.0)]
    assert front.bound(8).tolist() == [7, 7, 7, 5, 5, 5, 5, 0, 0]


def test_budgets_per_rank_are_divided_as_well_as_the_points_allow() -> None:
    fronts = []
    for seed in range(3):
        problem = layer(seed)
        home = held(np.arange(16), problem.slots_per_rank, 16)
        fronts.append(walk_front(problem.with_moves(Moves.make(home)), 12))
    for budget, most_G in ((None, [99] * 4), (None, [1] * 4), (None, [3, 0, 1, 2]), (4, [99] * 4), (3, [2, 1, 0, 9])):
        chosen = divide_by_rank(fronts, budget, np.array(most_G))
        fitting = [
            sum(point.total_us for point in points)
            for points in product(*(front.points for front in fronts))
            if (np.sum([point.into_G for point in points], axis=0) <= most_G).all()
            and (budget is None or sum(point.moves for point in points) <= budget)
        ]
        assert chosen is not None and len(chosen) == 3
        assert sum(point.total_us for point in chosen) <= min(fitting) * (1 + 2e-4)
        assert (np.sum([point.into_G for point in chosen], axis=0) <= most_G).all()
        assert budget is None or sum(point.moves for point in chosen) <= budget


def test_a_budget_per_rank_that_no_choice_keeps_has_none() -> None:
    ways = [Point(np.arange(4), 1.0, np.array([2, 0])), Point(np.arange(4), 2.0, np.array([0, 1]))]
    assert divide_by_rank([Front(ways[:1])], None, np.array([1, 1])) is None
    assert divide_by_rank([Front(ways), Front([])], None, np.array([9, 9])) is None
    both = divide_by_rank([Front(ways), Front(ways)], None, np.array([3, 1]))  # the fewest moves of both do not fit
    assert both is not None and sum(point.total_us for point in both) == 3.0


def test_layers_take_turns_for_their_fronts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layers took all of the time: of 36 layers seven made none of 64 moves, whatever they would gain."""
    layers = [layer(seed, experts=64, ranks=16) for seed in range(6)]
    home = held(np.arange(64), layers[0].slots_per_rank, 64)
    layers = [each.with_moves(Moves.make(home)) for each in layers]
    begins, most = [(np.arange(64), None)] * 6, [64] * 6
    whole, cut = walk_fronts(layers, begins, most, options(), 1)
    alone = [walk_front(each, 64).points for each in layers]
    assert not cut and [len(each.points) for each in whole] == [len(points) for points in alone]
    calls: list[Problem] = []

    def until_the_time_is_over(problem: Problem, most: int, stop: np.ndarray, *given: Any) -> Front:
        calls.append(problem)
        while len(calls) > 8 and not stop[0]:
            time.sleep(0.01)
        return walk_front(problem, most, stop, *given)

    monkeypatch.setattr(walks, "walk_front", until_the_time_is_over)
    part, cut = walk_fronts(layers, begins, most, options(stop=lambda: len(calls) > 8), 1)
    assert cut and [len(each.points) for each in part] == [6, 6, 2, 2, 2, 2]
    for mine, theirs in zip(part, alone, strict=True):
        totals = [point.total_us for point in theirs[: len(mine.points)]]
        assert [point.total_us for point in mine.points] == pytest.approx(totals)

"""Best swaps from a placement in force, against trying every swap."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gemopt.evaluate import objective
from gemopt.latency import ACTIVE, ASSIGNMENTS, Curve, Feature, Latency, line
from gemopt.migration import count_moves
from gemopt.problem import Problem
from gemopt.solvers.search.descent import settle_pair
from gemopt.solvers.search.gains import make_pair
from gemopt.solvers.search.moves import few_moves
from gemopt.solvers.search.state import make_costs, make_state
from gemopt.solvers.search.swaps import slowest_three, total_cost
from gemopt.solvers.search.terms import free_terms, moved_into

EXPERTS, RANKS, STEPS = 12, 3, 20


def problem(kind: str, seed: int, slots: object = None, ranks: int = RANKS) -> Problem:
    rng = np.random.default_rng(seed)
    share_E = rng.dirichlet(np.full(EXPERTS, 0.5))
    counts_TE = rng.multinomial(256, share_E, size=STEPS)
    features: tuple[Feature, ...] = (ASSIGNMENTS,)
    speeds = rng.uniform(0.8, 1.2, ranks)
    if kind == "line":
        latencies = [Latency(((line(60.0, s),),)) for s in speeds]
    elif kind == "roofline":
        features = (ASSIGNMENTS, ACTIVE)
        latencies = [Latency(((line(20.0, s), line(0.0, 0.0)), (line(30.0, 0.1), line(0.0, 9 * s)))) for s in speeds]
    else:
        x = np.arange(0.0, 300.0, 16.0)
        latencies = [Latency(((Curve(x, (50 + 20 * (np.arange(len(x)) // 3)) * s, 1.0),),)) for s in speeds]
    return Problem.make(counts_TE, features, latencies, slots, rng.uniform(0.1, 1.0, STEPS))


@pytest.mark.parametrize("kind", ["line", "roofline", "staircase"])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("price", [0.0, 3.0])
@pytest.mark.parametrize("ranks", [RANKS, 6])
def test_every_swap_is_the_best_one(kind: str, seed: int, price: float, ranks: int) -> None:
    """Also with pairs of ranks that the swaps before left alone."""
    layer = problem(kind, seed, ranks=ranks)
    home = np.random.default_rng(seed).permutation(EXPERTS)
    way = few_moves(layer, home, price_us=price)
    assert way[0].moves == 0
    for before, after in itertools.pairwise([*way, None]):
        assert before is not None
        gains = [0.0]
        for i, j in itertools.combinations(range(EXPERTS), 2):
            row = before.row.copy()
            row[[i, j]] = row[[j, i]]
            added = count_moves(home, row, layer.slots_per_rank) - before.moves
            gains.append(before.objective_us - objective(layer, row) - price * added)
        noise = 1e-5 * before.objective_us
        if after is None:
            assert max(gains) <= noise
            continue
        gain = before.objective_us - after.objective_us - price * (after.moves - before.moves)
        assert gain == pytest.approx(max(gains), abs=noise)
        assert after.moves == count_moves(home, after.row, layer.slots_per_rank)


@pytest.mark.parametrize("kind", ["line", "roofline", "staircase"])
def test_limits_hold_and_empty_slots_are_used(kind: str) -> None:
    layer = problem(kind, 3, [5, 5, 4])
    home = np.array([0, 1, 2, 3, -1, 4, 5, 6, 7, -1, 8, 9, 10, 11])
    free = few_moves(layer, home)
    assert free[-1].moves > 2
    few = few_moves(layer, home, max_moves=2)
    assert 0 < few[-1].moves <= 2
    closed = few_moves(layer, home, max_into_G=np.array([0, 9, 9]))
    moved = set(closed[-1].row[:5].tolist()) - set(home[:5].tolist()) - {-1}
    assert not moved
    assert few_moves(layer, home, least_us=1e9)[-1].moves == 0


@pytest.mark.parametrize("kind", ["line", "roofline", "staircase"])
@pytest.mark.parametrize("seed", range(3))
def test_two_ranks_settle_whatever_the_pair_before_left_behind(kind: str, seed: int) -> None:
    layer, home = problem(kind, seed, ranks=2), np.arange(EXPERTS)
    costs, terms = make_costs(layer), free_terms(layer)
    state = make_state(layer, home, costs)
    values, ranks = np.empty((3, STEPS), np.float32), np.empty((3, STEPS), np.int16)
    slowest_three(state.times, values, ranks)
    pair = make_pair(state)
    pair.tilt[:] = 0.0
    first, moved_G = total_cost(state), moved_into(state, terms)
    settle_pair(costs, state, 0, 1, pair, terms, moved_G, np.zeros(1), np.zeros(4, np.int64), values, ranks)
    assert total_cost(state) < first
    least = total_cost(state) * (1 - 1e-5)
    for i, j in itertools.product(range(6), range(6, 12)):
        row = state.content.copy()
        row[[i, j]] = row[[j, i]]
        assert objective(layer, row) >= least


def test_refunds() -> None:
    """From a placement elsewhere, a high price brings every expert home."""
    layer = problem("line", 1)
    home = np.arange(EXPERTS)
    start = np.random.default_rng(0).permutation(EXPERTS)
    way = few_moves(layer, home, start=start, price_us=1e7)
    assert way[0].moves == count_moves(home, start, layer.slots_per_rank) > 0
    assert way[-1].moves == 0


@pytest.mark.parametrize("kind", ["line", "roofline", "staircase"])
@pytest.mark.parametrize("slots", [None, [5, 5, 4], [7, 6, 5]])
def test_waypoints_are_worth_what_evaluate_says(kind: str, slots: object) -> None:
    layer = problem(kind, 5, slots)
    rng = np.random.default_rng(0)
    home = np.full(layer.num_slots, -1)
    home[rng.permutation(layer.num_slots)[:EXPERTS]] = rng.permutation(EXPERTS)
    way = few_moves(layer, home)
    assert len(way) > 3
    for each in way:
        assert each.objective_us == objective(layer, each.row)

"""Climbing under the optimal split: what it says of its row is what a look at that row from nothing says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gemopt.evaluate import objective
from gemopt.latency import ASSIGNMENTS, Curve, Latency, line
from gemopt.layer_rules import layer_rules
from gemopt.placement import EMPTY, Split
from gemopt.problem import Problem
from gemopt.rules import Rules
from gemopt.solvers.search import spread_climb
from gemopt.solvers.search.packing import lpt_row
from gemopt.solvers.search.spread_climb import Climb
from gemopt.solvers.search.spread_search import SpreadSearch
from gemopt.solvers.search.spreading import Looks


def random_problem(seed: int) -> Problem:
    """Staircases with treads and jumps or straight lines, spare slots, ranks of different sizes, one maybe without."""
    rng = np.random.default_rng(seed)
    experts, ranks = int(rng.integers(3, 10)), int(rng.integers(2, 6))
    counts_TE = rng.integers(0, 30, (24, experts)) * rng.integers(0, 2, (24, experts)) * rng.choice([1, 1, 4], experts)
    x = np.arange(0, 60, 5)
    edges = np.unique(np.concatenate([x, x[1:] + 1]))
    latencies = []
    for _ in range(ranks):
        stairs = Curve(edges, 3 + np.cumsum(rng.choice([0.0, 1.0, 4.0], len(edges))), 0.3)
        latencies.append(Latency(((stairs if seed % 2 else line(2, float(rng.uniform(0.5, 2))),),)))
    slots_G = np.full(ranks, -(-experts // ranks)) + rng.integers(0, 2, ranks)
    slots_G = np.minimum(slots_G + (rng.random() < 0.5), experts)
    weights_T = rng.uniform(0, 2, 24)
    return Problem.make(counts_TE, [ASSIGNMENTS], latencies, slots_G, weights_T, split=Split.OPTIMAL)


def never() -> bool:
    return False


@pytest.mark.parametrize("seed", range(20))
def test_what_changes_save_is_what_a_look_from_nothing_says(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether all steps are looked at together or a quarter of them first."""
    monkeypatch.setattr(spread_climb, "FEWEST", 1 if seed % 4 < 2 else 24)
    problem = random_problem(seed)
    looks, draws = Looks(problem), np.random.default_rng(seed)
    start = looks.at(lpt_row(problem))
    climb = Climb(start, draws)
    for _ in range(4):
        before = climb.value_us
        gained = climb.climb(150, never)
        assert climb.value_us < before if gained else climb.value_us == before
        look, flow = looks.at(climb.row), climb.flow
        assert climb.look.times_T == pytest.approx(look.times_T, rel=1e-8)
        assert climb.value_us == pytest.approx(objective(problem, climb.row), rel=1e-8)
        sums_TG = [flow.shares_TP[:, problem.rank_of_slot == g].sum(axis=1) for g in range(problem.num_ranks)]
        assert (sums_TG == flow.load_TG.T).all() and (flow.load_TG <= flow.most_TG).all()
        for expert in range(problem.num_experts):
            slots = np.flatnonzero(climb.row == expert)
            assert len(np.unique(problem.rank_of_slot[slots])) == len(slots) > 0
            assert (flow.shares_TP[:, slots].sum(axis=1) == problem.counts_TE[:, expert]).all()
        assert (flow.shares_TP >= 0).all() and not flow.shares_TP[:, climb.row == EMPTY].any()


def test_climbing_gains_and_ends_where_it_is_told() -> None:
    problem = random_problem(3)
    looks = Looks(problem)
    start = looks.at(lpt_row(problem))
    climb = Climb(start, np.random.default_rng(0))
    assert not climb.climb(100, lambda: True) and (climb.row == start.row).all()
    assert climb.climb(300, never) and climb.value_us < start.value_us
    assert (start.row == lpt_row(problem)).all()  # what it began with is left alone


def test_searching_keeps_rules() -> None:
    problem = random_problem(5)
    rules = Rules.model_validate({"kept_off": [{"experts": [0], "ranks": [0]}], "apart": [{"experts": [1, 2]}]})
    (asked,) = layer_rules(rules, [0], problem.num_experts, problem.num_ranks, problem.node_of_rank.tolist())
    problem = replace(problem, rules=asked)
    search = SpreadSearch(problem, lpt_row(problem), np.random.default_rng(0))
    for _ in range(5):
        search.step(never)
    row, ranks = search.best.row, problem.rank_of_slot
    assert 0 not in ranks[row == 0] and not set(ranks[row == 1]) & set(ranks[row == 2])

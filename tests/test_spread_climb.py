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
from gemopt.solvers.search.spread_cuts import WORD
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


def wide_problem(seed: int) -> Problem:
    """More ranks than a word has bits."""
    rng = np.random.default_rng(seed)
    counts_TE = rng.integers(0, 30, (24, 120)) * rng.choice([1, 1, 8], (24, 120))
    latencies = [Latency(((line(2, float(rng.uniform(0.5, 2))),),)) for _ in range(70)]
    return Problem.make(counts_TE, [ASSIGNMENTS], latencies, np.full(70, 2), np.ones(24), split=Split.OPTIMAL)


def never() -> bool:
    return False


def check_state(climb: Climb) -> None:
    """What a climb knows of its row is what the row says: splits, times, and cuts."""
    problem, flow, cuts = climb.problem, climb.flow, climb.flow.cuts
    assert climb.look.times_T == pytest.approx(climb.looks.at(climb.row).times_T, rel=1e-8)
    assert climb.value_us == pytest.approx(objective(problem, climb.row), rel=1e-8)
    sums_TG = [flow.shares_TP[:, problem.rank_of_slot == g].sum(axis=1) for g in range(problem.num_ranks)]
    assert (sums_TG == flow.load_TG.T).all() and (flow.load_TG <= flow.most_TG).all()
    for expert in range(problem.num_experts):
        slots = np.flatnonzero(climb.row == expert)
        assert len(np.unique(problem.rank_of_slot[slots])) == len(slots) > 0
        assert (flow.shares_TP[:, slots].sum(axis=1) == problem.counts_TE[:, expert]).all()
    assert (flow.shares_TP >= 0).all() and not flow.shares_TP[:, climb.row == EMPTY].any()
    words, bits = np.divmod(np.arange(problem.num_ranks), WORD)
    cut_TMG = (cuts.ranks_TMW[:, :, words] >> bits & 1).astype(bool)
    held_EG = np.zeros((problem.num_experts, problem.num_ranks), bool)
    held_EG[climb.row[climb.row != EMPTY], problem.rank_of_slot[climb.row != EMPTY]] = True
    for t in range(problem.num_steps):
        for m in range(cuts.inside_TM.shape[1]):
            cut_G = cut_TMG[t, m]
            assert cuts.inside_TM[t, m] == problem.counts_TE[t, ~held_EG[:, ~cut_G].any(axis=1)].sum()
            assert cuts.most_TM[t, m] == flow.most_TG[t, cut_G].sum()


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
        check_state(climb)


@pytest.mark.parametrize("seed", range(6))
def test_annealing_ends_in_the_best_row(seed: int) -> None:
    """On more ranks than a word has bits as well; hot, so that it ends elsewhere unless it goes back."""
    problem = wide_problem(seed) if seed % 2 else random_problem(seed)
    looks = Looks(problem)
    start = looks.at(lpt_row(problem))
    climb = Climb(start, np.random.default_rng(seed))
    seen = [start.value_us]

    def progress(done: int) -> float:
        seen.append(climb.value_us)
        return done / 1500

    climb.anneal(0.1, 0.01, progress, never)
    assert max(np.diff(seen)) > 0  # it did lose on the way
    assert climb.value_us <= min(seen) * (1 + 1e-8)
    check_state(climb)
    assert climb.flow.cuts.ranks_TMW[:, 0].any()


def test_searching_climbs_first_then_anneals_and_is_never_worse() -> None:
    problem = wide_problem(0)
    search = SpreadSearch(problem, lpt_row(problem), np.random.default_rng(0))
    values = [search.best.value_us]
    while not search.climbed:  # it ends: every climb gains a part of what is finite
        search.step(never)
    for left_s in [None, 0.2, 0.2]:
        values.append(search.best.value_us)
        better = search.step(never, left_s)
        values.append(search.best.value_us)
        assert better == (values[-1] < values[-2]) and values[-1] <= values[-2]
    assert values[-1] < values[0]
    assert search.best.value_us == pytest.approx(objective(problem, search.best.row), rel=1e-8)


def test_annealing_ends_once_it_is_good_enough() -> None:
    problem, values, looks = wide_problem(0), [], []
    for _ in range(2):
        search, asked = SpreadSearch(problem, lpt_row(problem), np.random.default_rng(0)), list[int]()
        while not search.climbed:
            search.step(never)
        enough_us = (search.best.value_us + values[0]) / 2 if values else 0.0
        search.step(lambda asked=asked: asked.append(0) is not None, enough_us=enough_us)  # type: ignore[misc]
        values.append(search.best.value_us)
        looks.append(len(asked))
    assert values[0] < values[1] <= enough_us
    assert 0 < looks[1] < looks[0]


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

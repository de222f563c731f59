"""Copies chosen by what the optimal split promises of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from timed import timed

from gemopt.evaluate import objective
from gemopt.latency import ASSIGNMENTS, Latency, line
from gemopt.layer_rules import layer_rules
from gemopt.migration import held
from gemopt.moves import Moves
from gemopt.placement import EMPTY, Placement, Split
from gemopt.problem import Problem
from gemopt.rules import Rules
from gemopt.solve import solve
from gemopt.solvers.base import within_limits
from gemopt.solvers.search.promised import promised_copies
from gemopt.splits.flow import fluid_times
from gemopt.splits.levels import no_levels
from gemopt.traces import Traces

pytestmark = pytest.mark.usefixtures("quick_bounds")

SLOTS = 3
GOING_ON = np.zeros(1, np.uint8)


def layer(seed: int) -> tuple[Problem, np.ndarray]:
    """Five experts on three ranks that differ, and a row with some copies."""
    rng = np.random.default_rng(seed)
    counts_TE = rng.poisson(rng.gamma(0.7, 9.0, 5), (6, 5))
    latencies = [Latency(((line(5.0, slope),),)) for slope in rng.uniform(0.7, 1.6, 3)]
    problem = Problem.make(counts_TE, (ASSIGNMENTS,), latencies, [SLOTS] * 3, split=Split.OPTIMAL)
    row = np.full((3, SLOTS), EMPTY)
    row[:, 0], row[:2, 1] = [0, 1, 2], [3, 4]
    for _ in range(seed % 3):
        rank, expert = rng.integers(3), rng.integers(5)
        if expert not in row[rank]:
            row[rank, 2] = expert
    return problem, row.ravel()


@pytest.mark.parametrize("seed", range(12))
def test_no_copy_makes_it_slower_or_breaks_limits(seed: int) -> None:
    """Of moves and of rules; rows that break none lead to rows that break none."""
    problem, row = layer(seed)
    rules = Rules.model_validate({"kept_off": [{"experts": [1, 4], "ranks": [0]}], "apart": [{"experts": [0, 2]}]})
    problem = replace(problem, rules=layer_rules(rules, [0], 5, 3, [0, 0, 0])[0])
    problem = problem.with_moves(Moves.make(held(row, problem.slots_per_rank, 5), most=2, most_into_G=[1, 1, 1]))
    before = objective(problem, row)
    for found in promised_copies(problem, row, GOING_ON):
        assert within_limits(problem, found)
        assert objective(problem, found) <= before * (1 + 1e-6)
        before = objective(problem, found)


@pytest.mark.parametrize("seed", range(6))
def test_full_slots_are_given_to_other_copies(seed: int) -> None:
    """Where all slots are full: the copies of experts that nobody asks for make room for one of those that all do."""
    problem, row = layer(seed)
    counts_TE = np.tile([40, 4, 4, 0, 0], (6, 1))
    problem = Problem.make(counts_TE, (ASSIGNMENTS,), problem.latencies, [SLOTS] * 3, split=Split.OPTIMAL)
    row = np.array([0, 3, 4, 1, 3, 4, 2, 3, 4])
    *_, last = promised_copies(problem, row, GOING_ON)
    assert (last == 0).sum() == 3
    assert set(last) == {0, 1, 2, 3, 4}
    assert objective(problem, last) < objective(problem, row)


def test_a_budget_is_spent_together_where_only_all_of_it_gains() -> None:
    """Of two hot experts both need a copy on the third rank before a step is faster: one copy in two layers is vain."""
    traces = Traces(counts=np.tile([12, 12, 0], (4, 4, 1)))
    current = Placement(
        physical_to_logical=[[0, EMPTY, 1, EMPTY, 2, EMPTY, EMPTY]] * 4, slots_per_rank=[2, 2, 3], num_experts=3
    )
    profile = timed(range(3), lambda n, g: 20 if n <= 8 else 50 + n, (0, 1, 8, 9, 64))
    found = solve(profile, traces, current=current, split="optimal", solver="local-search", patience=0, max_moves=2)
    assert found.moves is not None and sorted(found.moves.per_layer) == [0, 0, 0, 2]
    assert found.moves.gain_us > 0


def test_a_rank_without_slots_gets_none() -> None:
    latencies = [Latency(((line(5.0, slope),),)) for slope in (1.0, 1.2, 0.1)]
    counts_TE = np.tile([40, 30, 4, 2], (6, 1))
    problem = Problem.make(counts_TE, (ASSIGNMENTS,), latencies, [3, 3, 0], split=Split.OPTIMAL)
    rows = list(promised_copies(problem, np.array([EMPTY, 0, 1, 2, 3, EMPTY]), GOING_ON))
    assert rows
    for row in rows:
        assert set(row) - {EMPTY} == {0, 1, 2, 3}
        assert all(len(set(part[part != EMPTY])) == (part != EMPTY).sum() for part in (row[:3], row[3:]))


def test_steps_of_the_same_load_have_the_same_fluid_time() -> None:
    levels = no_levels(layer(0)[0].curves)
    alone = [float(fluid_times(levels, np.array([total]))[0]) for total in (40, 40, 70, 40)]
    assert fluid_times(levels, np.array([40, 40, 70, 40])).tolist() == alone
    assert alone[0] < alone[2]

"""Split policies against brute force over whole assignments, and against linear programming."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from unittest import mock

import numpy as np
import pytest
from brute import latency_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from gemopt.bounds import step_bounds
from gemopt.evaluate import objective, rank_times
from gemopt.exceptions import InputError, UnsupportedError
from gemopt.latency import ACTIVE, ASSIGNMENTS, Curve, Latency, line, pack, tiles
from gemopt.placement import Split
from gemopt.problem import Problem
from gemopt.splits import levels, shares, static_shares, weights
from gemopt.splits.levels import held_within, level, no_levels, table_levels
from gemopt.splits.optimal import TABLE_LIMIT
from gemopt.splits.rules import nearest_copies
from gemopt.splits.senders import check_senders, senders_of
from gemopt.splits.weights import static_weights
from gemopt.traces import Traces
from gemopt.traces.tokens import Tokens


def cut(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to cut n into so many whole parts."""
    if parts == 1:
        yield (n,)
        return
    for first in range(n + 1):
        for rest in cut(n - first, parts - 1):
            yield (first, *rest)


@pytest.mark.parametrize("seed", range(40))
def test_a_level_is_the_least_time_that_holds_a_load(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves with jumps between whole loads, ramps and plateaus; ranks that are alike and not."""
    rng = np.random.default_rng(seed)
    latencies = []
    for _ in range(rng.integers(1, 5)):
        x = np.sort(rng.choice(np.arange(1, 60), 6, replace=False))
        x = np.unique(np.concatenate([[0], x, x + 1]))
        curve = Curve(x.tolist(), (1 + np.cumsum(rng.choice([0.0, 0.5, 3.0], len(x)))).tolist(), rng.uniform(0.1, 1))
        latencies += [Latency(((curve,),))] * int(rng.integers(1, 3))
    curves, members = pack(latencies), np.arange(len(latencies))
    tables = [no_levels(curves), table_levels(curves, 0.5, 8.0), table_levels(curves, 2.0, np.inf)]
    monkeypatch.setattr(levels, "MOST_LEVELS", 3)
    for table in [*tables, table_levels(curves, 0.0, np.inf)]:  # without, of some times, of all, with gaps
        for load, known in product(range(0, 90, 7), (1.0, *table.times_L[:2])):
            time = level(table, members, load, known)
            assert held_within(curves, members, time, load) >= load
            assert time == known or held_within(curves, members, time * (1 - 1e-8), load) < load


def best_split(problem: Problem, row: np.ndarray, step: int) -> float:
    """Makespan of the best split of one step, trying all."""
    counts, ranks = problem.counts_TE[step].tolist(), problem.rank_of_slot
    slots = [np.flatnonzero(row == expert) for expert in range(problem.num_experts)]
    best = np.inf
    for parts in product(*(list(cut(n, len(where))) for n, where in zip(counts, slots, strict=True))):
        loads = np.zeros((problem.num_ranks, len(problem.features)), int)
        for where, part in zip(slots, parts, strict=True):
            for f, feature in enumerate(problem.features):
                np.add.at(loads[:, f], ranks[where], feature.of(np.array(part)))
        best = min(
            best, max(latency_of(each, load) for each, load in zip(problem.latencies, loads.tolist(), strict=True))
        )
    return best


ROWS = [[0, 1, 2, 3, 0, 4], [0, 1, 1, 2, 0, 2], [0, 1, 2, 0, 1, 2], [0, -1, 0, 1, 0, 2]]


@st.composite
def cases(draw: st.DrawFn, kind: str) -> tuple[Problem, np.ndarray]:
    row = np.array(draw(st.sampled_from(ROWS)))
    experts = int(row.max()) + 1
    counts = draw(st.lists(st.lists(st.integers(0, 5), min_size=experts, max_size=experts), min_size=1, max_size=2))
    number = st.integers(0, 8).map(float)
    if kind == "planes":
        latencies = [
            Latency(tuple((line(draw(number), draw(number)), line(0.0, draw(number))) for _ in range(2)))
            for _ in range(3)
        ]
        features = (ASSIGNMENTS, ACTIVE)
    else:
        features = (ASSIGNMENTS,)
        latencies = []
        for _ in range(3):
            values = np.array([draw(number) for _ in range(4)])
            values = np.sort(values) if kind == "rising" else values
            latencies.append(Latency(((Curve(np.array([0.0, 1, 3, 4]), values, draw(number)),),)))
    return Problem.make(counts, features, latencies, [2, 2, 2], split=Split.OPTIMAL), row


@settings(max_examples=120, deadline=None)
@given(cases("rising"))
def test_the_optimal_split_of_loads_is_the_best_of_all(case: tuple[Problem, np.ndarray]) -> None:
    problem, row = case
    found = rank_times(problem, row).max(axis=1)
    for step, value in enumerate(found):
        assert value == pytest.approx(best_split(problem, row, step), rel=1e-9, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(cases("any"))
def test_where_latency_falls_with_load_the_split_is_of_the_latency_above_that_does_not(case) -> None:
    problem, row = case
    rising = Problem.make(
        problem.counts_TE, problem.features, [each.high for each in problem.latencies], [2, 2, 2], split=Split.OPTIMAL
    )
    upper = rank_times(rising, row).max(axis=1)
    assert (rank_times(problem, row).max(axis=1) <= upper + 1e-9).all()
    for step, value in enumerate(upper):
        assert value == pytest.approx(best_split(rising, row, step), rel=1e-9, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(cases("planes"))
def test_with_activated_experts_the_split_is_close_and_never_below_the_best(case) -> None:
    """Found by descent: whole experts placed greedily are within the sum of all ranks, and bounds hold."""
    problem, row = case
    found = rank_times(problem, row).max(axis=1)
    assert (step_bounds(problem) <= found + 1e-9).all()
    even = Problem.make(problem.counts_TE, problem.features, problem.latencies, [2, 2, 2])
    for step, value in enumerate(found):
        best = best_split(problem, row, step)
        assert best <= value + 1e-9
        assert value <= 1.6 * best + 1e-9
        assert value <= rank_times(even, row).max(axis=1)[step] + 1e-9


def test_the_split_into_whole_assignments_is_within_one_of_the_linear_programme() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        offsets, slopes = rng.uniform(0, 50, 4), rng.uniform(0.5, 2, 4)
        latencies = [Latency(((line(a, b),),)) for a, b in zip(offsets, slopes, strict=True)]
        counts = rng.integers(0, 200, (1, 8))
        row = np.concatenate(
            [np.append(part, rng.choice(np.setdiff1d(np.arange(8), part))) for part in np.arange(8).reshape(4, 2)]
        )
        problem = Problem.make(counts, (ASSIGNMENTS,), latencies, 3, split=Split.OPTIMAL)
        found = float(rank_times(problem, row).max())
        ranks = problem.rank_of_slot
        upper = np.array([np.append(slopes[g] * (ranks == g), -1.0) for g in range(4)])
        equal = np.array([np.append(row == e, 0.0) for e in range(8)])
        solved = linprog(np.append(np.zeros(12), 1.0), A_ub=upper, b_ub=-offsets, A_eq=equal, b_eq=counts[0])
        assert solved.fun - 1e-6 <= found <= solved.fun + slopes.max() + 1e-6


@settings(max_examples=60, deadline=None)
@given(cases("rising"), st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_no_other_policy_beats_the_optimal_one_and_bounds_hold_for_all(case, parts) -> None:
    problem, row = case
    best = rank_times(problem, row).max(axis=1)
    assert (step_bounds(problem) <= best + 1e-9).all()
    for split in (Split.EVEN, Split.STATIC, Split.NEAREST):
        other = Problem.make(problem.counts_TE, problem.features, problem.latencies, [2, 2, 2], split=split)
        assert (rank_times(other, row).max(axis=1) >= best - 1e-9).all()


@settings(max_examples=40, deadline=None)
@given(st.one_of(cases("rising"), cases("planes")))
def test_static_weights_are_never_dearer_than_even_ones_and_shares_add_up(case) -> None:
    problem, row = case
    even = Problem.make(problem.counts_TE, problem.features, problem.latencies, [2, 2, 2])
    static = Problem.make(problem.counts_TE, problem.features, problem.latencies, [2, 2, 2], split=Split.STATIC)
    sums = np.bincount(row[row >= 0], weights=static_weights(static, row)[row >= 0])
    assert sums == pytest.approx(np.ones(problem.num_experts))
    rounded = (rank_times(even, row, (row >= 0) / np.maximum(np.bincount(row[row >= 0])[row], 1)).max(axis=1)).sum()
    assert objective(static, row) <= rounded + 1e-9
    for each in (even, static, problem):
        taken = shares(each, row)
        assert (taken >= 0).all() and (taken[:, row < 0] == 0).all()
        for expert in range(problem.num_experts):
            assert (taken[:, row == expert].sum(axis=1) == problem.counts_TE[:, expert]).all()


@settings(max_examples=40, deadline=None)
@given(cases("rising"))
def test_static_weights_are_the_same_where_latencies_are_not_looked_up(case) -> None:
    problem, row = case
    found = []
    for most in (weights.MOST_TABLED, 0):
        static = Problem.make(problem.counts_TE, problem.features, problem.latencies, [2, 2, 2], split=Split.STATIC)
        with mock.patch.object(weights, "MOST_TABLED", most):
            static_weights(static, row)[:] = 2.0  # what is kept is not what is handed out
            found.append(static_weights(static, row))
    np.testing.assert_array_equal(*found)


def test_static_weights_carry_the_speeds() -> None:
    latencies = [Latency(((line(0, 1.0),),)), Latency(((line(0, 3.0),),))]
    problem = Problem.make([[400, 0], [800, 0]], (ASSIGNMENTS,), latencies, [2, 1], split=Split.STATIC)
    assert static_weights(problem, np.array([0, 1, 0])) == pytest.approx([0.75, 1.0, 0.25], abs=0.01)


def test_nearest_takes_ones_own_copy_then_one_on_the_node_then_any() -> None:
    nodes = [0, 0, 1, 1, 2, 2]
    assert nearest_copies(np.array([0, 2]), nodes).tolist() == [0, 0, 1, 1, 0, 1]
    tokens = Tokens(
        ids=np.array([[[0, 1]], [[0, 1]], [[0, -1]]]), step_of_token=np.zeros(3, int), source_rank=np.array([0, 1, 1])
    )
    traces = Traces(counts=np.array([[[3, 2]]]), tokens=tokens)
    senders = senders_of(traces, 0, 2)
    assert senders.tolist() == [[[1, 1], [2, 1]]]
    flat = [Latency(((line(0, 1.0),),))] * 2
    problem = Problem.make([[3, 2]], (ASSIGNMENTS,), flat, [2, 1], split=Split.NEAREST, senders_TGE=senders)
    assert shares(problem, np.array([0, 1, 0])).tolist() == [[1, 2, 2]]
    alike = Problem.make([[4, 2]], (ASSIGNMENTS,), flat, [2, 1], split=Split.NEAREST)
    assert shares(alike, np.array([0, 1, 0])).tolist() == [[2, 2, 2]]


def test_counts_too_large_to_tabulate_are_refused_where_features_are_needed() -> None:
    latencies = [Latency(((line(0, 1), line(0, 1)),))] * 2
    problem = Problem.make([[TABLE_LIMIT, 1]], (ASSIGNMENTS, ACTIVE), latencies, 2, split=Split.OPTIMAL)
    with pytest.raises(UnsupportedError, match="use even"):
        objective(problem, np.array([0, 1, 1, 0]))


def test_shares_of_one_assignment_are_not_lost() -> None:
    assert static_shares(np.array([[1]]), np.array([0, 0, 0]), np.array([0.4, 0.4, 0.2])).sum() == 1


def test_a_record_that_does_not_make_the_counts_has_no_senders() -> None:
    tokens = Tokens(ids=np.array([[[0]]]), step_of_token=np.zeros(1, int), source_rank=np.zeros(1, int))
    with pytest.raises(InputError, match="exactly the counts"):
        senders_of(Traces(counts=np.array([[[2, 1]]]), tokens=tokens), 0, 1)


def test_a_record_of_one_process_does_not_say_who_sends() -> None:
    tokens = Tokens(ids=np.array([[[0, 1]], [[0, 1]]]), step_of_token=np.zeros(2, int), source_rank=np.zeros(2, int))
    traces = Traces(counts=np.array([[[2, 2]]]), tokens=tokens)
    with pytest.raises(InputError, match=r"got rank 0 alone; some token from other ranks of 2; .*--senders uniform"):
        check_senders(traces, 2)
    check_senders(traces, 1)


def test_tiles_are_shared_as_whole_assignments() -> None:
    latencies = [Latency(((line(0, 1),),))] * 2
    problem = Problem.make([[9, 1]], (tiles(4),), latencies, 2, split=Split.OPTIMAL)
    assert objective(problem, np.array([0, 1, 1, 0])) == 2

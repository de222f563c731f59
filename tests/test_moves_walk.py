"""Copies under limits of moves, whatever the split: walks of single changes, against all placements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

from gemopt.evaluate import check, total
from gemopt.latency import ASSIGNMENTS, Curve, Latency, line
from gemopt.migration import held
from gemopt.moves import Moves
from gemopt.placement import EMPTY, Split
from gemopt.problem import Problem
from gemopt.solvers import get
from gemopt.solvers.base import Options, within_limits
from gemopt.solvers.search.sharing_walk import SharingWalk

SLOTS = [2, 2, 2]
Asked = dict[str, object]
ASKED: list[Asked] = [{"most": 0}, {"most": 2}, {"most": 3, "most_into_G": [1, 2, 1]}, {"price_us": 9.0}]


def layer(split: Split, seed: int, asked: Asked) -> Problem:
    """Four experts on three ranks that differ, two spare slots; in force is a placement drawn at random."""
    rng = np.random.default_rng(seed)
    counts_TE = rng.poisson(rng.gamma(0.7, 9.0, 4), (6, 4))
    latencies = [Latency(((line(5.0, slope),),)) for slope in rng.uniform(0.7, 1.6, 3)]
    if seed % 3 == 0:
        latencies = [Latency(((Curve(np.array([0.0, 8.0]), np.array([3.0, 11.0]), 3.0 + g),),)) for g in range(3)]
    home = np.array([*rng.permutation(4), *rng.integers(0, 4, 2)])[rng.permutation(6)]
    home[1::2][home[1::2] == home[::2]] = EMPTY
    problem = Problem.make(counts_TE, (ASSIGNMENTS,), latencies, SLOTS, node_of_rank=[0, 0, 1], split=split)
    return problem.with_moves(Moves.make(held(home, problem.slots_per_rank, 4), **asked))  # type: ignore[arg-type]


def every_row(problem: Problem) -> Iterator[np.ndarray]:
    each = [
        [*some, *[EMPTY] * (2 - len(some))]
        for size in range(3)
        for some in combinations(range(problem.num_experts), size)
    ]
    for ranks in product(each, repeat=problem.num_ranks):
        row = np.concatenate(ranks)
        if len(np.unique(row[row != EMPTY])) == problem.num_experts and within_limits(problem, row):
            yield row


def cases(build: Callable[..., None]) -> Callable[..., None]:
    for name, values in {
        "split": [Split.EVEN, Split.NEAREST, Split.OPTIMAL],
        "asked": ASKED,
        "seed": range(6),
    }.items():
        build = pytest.mark.parametrize(name, values)(build)
    return build


@cases
def test_a_walk_keeps_limits_and_counts_what_moves_take(split: Split, asked: Asked, seed: int) -> None:
    problem = layer(split, seed, asked)
    start = next(every_row(problem))
    walk = SharingWalk(problem, start, np.random.default_rng(seed))
    for hot in (0.0, 0.05, 0.3):
        walk.hot = hot
        walk.walk(100, lambda: False)
        check(problem, walk.row)
        assert total(problem, walk.row) == pytest.approx(walk.value_us)
        assert total(problem, walk.best) == pytest.approx(walk.best_us)
    assert walk.best_us <= total(problem, start)


@cases
def test_search_ends_at_the_best_placement_or_just_beside_it(split: Split, asked: Asked, seed: int) -> None:
    problem = layer(split, seed, asked)
    outcome = get("local-search").solve(problem, Options(deadline=np.inf, patience=20), None)
    assert outcome.row is not None
    check(problem, outcome.row)
    assert total(problem, outcome.row) <= 1.01 * min(total(problem, row) for row in every_row(problem))


def test_full_slots_stay_full() -> None:
    problem = replace(layer(Split.EVEN, 1, {"most": 4}), full=True)
    outcome = get("local-search").solve(problem, Options(deadline=np.inf, patience=5), None)
    assert outcome.row is not None and (outcome.row != EMPTY).all()
    check(problem, outcome.row)

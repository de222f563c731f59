"""Fronts of many layers within one time: a few swaps of every layer before more of any, and price after price."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import FloatArray
from gemopt.problem import Problem
from gemopt.solvers.base import Options, Row
from gemopt.solvers.budget import Front, point_of, walk_front
from gemopt.solvers.search.blocs import settled
from gemopt.solvers.search.promised import has_promises, promised_copies
from gemopt.solvers.search.within import falling

FIRST_SWAPS = 1
MORE = 4  # times as many swaps in every round
PRICES = [0.5**n for n in range(1, 6)] + [0.02 * 0.8**n for n in range(34)]  # of a move, of the value of a layer

Begin = tuple[Row, FloatArray | None]
"""[P] a row, and the static weights of its copies."""


def walk_fronts(
    problems: Sequence[Problem],
    begins: Sequence[Begin | None],
    most_L: Sequence[int],
    options: Options,
    threads: int,
    *,
    promised: bool = False,
) -> tuple[list[Front], bool]:
    """The front of every layer up to so many moves (see `walk_front`), and whether the time ended any.

    Where it does, all layers have come about as far: who comes last may have most to gain. promised: before swaps come
    copies that promise most, where promises are known.
    """
    fronts, ends = [Front([])] * len(problems), list(begins)
    with options.alarm() as stop, ThreadPoolExecutor(threads) as pool:

        def walk(layers: Sequence[int], swaps: int) -> list[int]:
            """Go on with some layers; those where there is more to go."""
            going = [(index, pool.submit(copy_context().run, swapped, index, swaps)) for index in layers]
            return [index for index, more in going if more.result()]

        def swapped(index: int, swaps: int) -> bool:
            known, walked = fronts[index], walk_front(problems[index], most_L[index], stop, ends[index], swaps)
            fronts[index] = replace(known, points=known.points + walked.points[1:]) if known.points else walked
            ends[index] = (walked.points[-1].row, walked.points[-1].weights) if walked.points else None
            return len(walked.points) > swaps or bool(walked.points and stop[0])

        left, swaps, forced = list(range(len(problems))), FIRST_SWAPS, True
        if promised and has_promises(problems[0]):
            walk(left, 0)
            forced = not all(front.points for front in fronts)
            if not forced:
                ways = [_sparse(each, promised_copies(each, row, stop)) for each, row in _starts(problems, fronts)]
                _take_turns(pool, problems, fronts, ways, stop)
        while left and (forced or not stop[0]):
            left, swaps, forced = walk(left, swaps), MORE * swaps, False
    return fronts, bool(left)


def add_copies(
    problems: Sequence[Problem], fronts: Sequence[Front], budget: int | None, options: Options, threads: int
) -> None:
    """Add to fronts what swaps and copies lead to, at a price that falls until all layers together spend the budget."""
    with options.alarm() as stop, ThreadPoolExecutor(threads) as pool:
        ways = [falling(each, row, stop, prices=PRICES) for each, row in _starts(problems, fronts)]
        _take_turns(pool, problems, fronts, ways, stop, budget)


def _starts(problems: Sequence[Problem], fronts: Sequence[Front]) -> list[tuple[Problem, Row]]:
    """Where fronts begin, and the problems whose sets of experts stay where they are there."""
    rows = [front.points[0].row for front in fronts]
    return [(settled(problem, row), row) for problem, row in zip(problems, rows, strict=True)]


def _take_turns(
    pool: ThreadPoolExecutor,
    problems: Sequence[Problem],
    fronts: Sequence[Front],
    ways: Sequence[Iterator[Row]],
    stop: NDArray[np.uint8],
    budget: int | None = None,
) -> None:
    """Add to fronts where a way of each layer leads, one row of each after the other, until they spend the budget."""
    spent_L, left = np.zeros(len(ways), np.int64), list(range(len(ways)))

    def step(index: int) -> bool:
        row = next(ways[index], None)
        if row is not None and (row != fronts[index].points[-1].row).any():
            fronts[index].points.append(point_of(problems[index], row))
            spent_L[index] = fronts[index].points[-1].moves
        return row is not None

    while left and not stop[0] and (budget is None or spent_L.sum() <= budget):
        going = [(index, pool.submit(copy_context().run, step, index)) for index in left]
        left = [index for index, more in going if more.result()]


def _sparse(problem: Problem, rows: Iterator[Row]) -> Iterator[Row]:
    """Some of the rows, at moves that double, and the last."""
    assert problem.moves is not None
    told, row = 0, None
    for row in rows:
        moves = problem.moves.count(row, problem.slots_per_rank)
        if moves >= 2 * told:
            told = moves
            yield row
    if row is not None:
        yield row

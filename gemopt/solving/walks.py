"""Fronts of many layers within one time: a few swaps of every layer before more of any, and price after price."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace

from gemopt.latency import FloatArray
from gemopt.problem import Problem
from gemopt.solvers.base import Options, Row
from gemopt.solvers.budget import Front, point_of, walk_front
from gemopt.solvers.search.blocs import settled
from gemopt.solvers.search.within import falling

FIRST_SWAPS = 1
MORE = 4  # times as many swaps in every round
PRICES = [0.5**n for n in range(1, 6)] + [0.02 * 0.8**n for n in range(34)]  # of a move, of the value of a layer

Begin = tuple[Row, FloatArray | None]
"""[P] a row, and the static weights of its copies."""


def walk_fronts(
    problems: Sequence[Problem], begins: Sequence[Begin | None], most_L: Sequence[int], options: Options, threads: int
) -> tuple[list[Front], bool]:
    """The front of every layer up to so many moves (see `walk_front`), and whether the time ended any.

    Where it does, all layers have come about as far: who comes last may have most to gain.
    """
    fronts = [Front([])] * len(problems)
    left, swaps = list(range(len(problems))), FIRST_SWAPS
    with options.alarm() as stop, ThreadPoolExecutor(threads) as pool:

        def walk(index: int, swaps: int) -> bool:
            """Go on with one layer; whether there is more to go."""
            known, begin = fronts[index], begins[index]
            if known.points:
                begin = known.points[-1].row, known.points[-1].weights
            walked = walk_front(problems[index], most_L[index], stop, begin, swaps)
            more = len(walked.points) > swaps or bool(walked.points and stop[0])
            fronts[index] = replace(known, points=known.points + walked.points[1:]) if known.points else walked
            return more

        while left and (swaps == FIRST_SWAPS or not stop[0]):
            going = [(index, pool.submit(copy_context().run, walk, index, swaps)) for index in left]
            left, swaps = [index for index, more in going if more.result()], MORE * swaps
    return fronts, bool(left)


def add_copies(
    problems: Sequence[Problem], fronts: Sequence[Front], budget: int | None, options: Options, threads: int
) -> None:
    """Add to fronts what swaps and copies lead to, at a price that falls until all layers together spend the budget."""
    with options.alarm() as stop, ThreadPoolExecutor(threads) as pool:
        ways = [
            falling(settled(problem, front.points[0].row), front.points[0].row, stop, prices=PRICES)
            for problem, front in zip(problems, fronts, strict=True)
        ]

        def fall(index: int) -> bool:
            """Go on with one layer; whether there may be more to come."""
            row, points = next(ways[index], None), fronts[index].points
            if row is not None and (row != points[-1].row).any():
                points.append(point_of(problems[index], row))
            return row is not None

        left, spent = list(range(len(ways))), 0
        while left and not stop[0] and (budget is None or spent <= budget):
            going = [(index, pool.submit(copy_context().run, fall, index)) for index in left]
            left = [index for index, more in going if more.result()]
            spent = sum(front.points[-1].moves for front in fronts)

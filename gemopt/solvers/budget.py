"""One budget of moves for several layers: spent where it gains most.

A layer's points are placements with their moves and totals (objective and price); its bounds say what no placement
with at most so many moves falls below. Dividing the budget is a knapsack with one choice per layer, solved exactly over
the points by dynamic programming, and over the bounds for a bound on all layers together. Budgets of each rank make it
a knapsack of several rows, which HiGHS solves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import FloatArray
from gemopt.problem import Problem
from gemopt.solvers.base import Row, known_total
from gemopt.solvers.nearest import fewest
from gemopt.solvers.search.blocs import settled
from gemopt.solvers.search.moves import few_moves
from gemopt.splits.weights import known_weights


@dataclass(frozen=True, eq=False)
class Point:
    """A placement of one layer: [P] row, its total in microseconds, and the moves into each rank [G].

    weights: [P] static weights of its copies, with which it has that total; None under other splits.
    """

    row: Row
    total_us: float
    into_G: NDArray[np.int64]
    weights: FloatArray | None = None

    @property
    def moves(self) -> int:
        """Moves in all."""
        return int(self.into_G.sum())


def point_of(problem: Problem, row: Row) -> Point:
    """The point of a row; see `known_total`."""
    assert problem.moves is not None
    into_G = problem.moves.into(row, problem.slots_per_rank)
    return Point(row, known_total(problem, row), into_G, known_weights(problem, row))


@dataclass(eq=False)
class Front:
    """What is known of one layer: points, bounds as (moves allowed, microseconds), and the moves it may make anyway.

    proven: whether no placement makes fewer moves than any of the points.
    """

    points: list[Point]
    bounds: list[tuple[int, float]] = field(default_factory=list)
    own: int = 0
    proven: bool = True

    def best(self, most: int) -> FloatArray:
        """[most + 1] smallest total of a point with at most so many moves; infinity where none has so few."""
        best_K = np.full(most + 1, np.inf)
        for point in self.points:
            if point.moves <= most:
                best_K[point.moves] = min(best_K[point.moves], point.total_us)
        return np.asarray(np.minimum.accumulate(best_K))

    def bound(self, most: int) -> FloatArray:
        """[most + 1] what at most so many moves do not fall below: a bound for more moves holds for fewer."""
        bound_K = np.zeros(most + 1)
        for moves, bound_us in self.bounds:
            bound_K[: min(moves, most) + 1] = np.maximum(bound_K[: min(moves, most) + 1], bound_us)
        return bound_K

    def at(self, most: int) -> Point:
        """The best point with at most so many moves, of equal ones that with the fewest."""
        within = [point for point in self.points if point.moves <= most]
        return min(within, key=lambda point: (point.total_us, point.moves))


def walk_front(
    problem: Problem,
    most: int,
    stop: NDArray[np.uint8] | None = None,
    begin: tuple[Row, FloatArray | None] | None = None,
    max_swaps: int | None = None,
) -> Front:
    """Points that the best swaps lead through, up to `most` moves and perhaps so many swaps.

    They begin with `begin`, a row and its static weights, else with the row of the fewest moves that was found.
    """
    moves = problem.moves
    assert moves is not None
    home, weights_P = (None, None) if begin is None else begin
    proven = home is not None and moves.count(home, problem.slots_per_rank) == 0
    if home is None:
        home, proven = fewest(problem)
    if home is None:
        return Front([])
    limit = most if moves.most is None else min(most, moves.most)
    way = few_moves(
        settled(problem, home),
        moves.home_GE,
        start=home,
        price_us=moves.price_us,
        max_moves=limit,
        max_into_G=moves.most_into_G,
        max_swaps=2 * limit + problem.num_slots if max_swaps is None else max_swaps,
        stop=stop,
        weights_P=known_weights(problem, home) if weights_P is None else weights_P,
    )
    return Front(
        [
            Point(
                point.row,
                point.objective_us + moves.price_us * point.moves,
                moves.into(point.row, problem.slots_per_rank),
                point.weights,
            )
            for point in way
        ],
        proven=proven,
    )


def divide(values_LK: Sequence[FloatArray], budget: int) -> tuple[float, list[int]] | None:
    """Smallest sum of one value per layer with at most `budget` moves, and the moves of each layer; None: impossible.

    `values_LK[l][k]` is what layer l costs with at most k moves; not increasing in k. Exact dynamic programme in
    O(L * budget * K), vectorised over the budget; of equal divisions the one with the fewest moves.
    """
    best_B = np.zeros(budget + 1)
    choices: list[NDArray[np.int64]] = []
    for values_K in values_LK:
        renewed_B = np.full(budget + 1, np.inf)
        choice_B = np.zeros(budget + 1, dtype=np.int64)
        drops = np.flatnonzero(values_K < np.append(np.inf, values_K[:-1]))  # only there do more moves gain
        for k in drops[drops <= budget].tolist():
            candidate_B = best_B[: budget + 1 - k] + values_K[k]
            better = candidate_B < renewed_B[k:]
            renewed_B[k:][better] = candidate_B[better]
            choice_B[k:][better] = k
        best_B = renewed_B
        choices.append(choice_B)
    if not np.isfinite(best_B[budget]):
        return None
    left, moves = budget, []
    for choice_B in reversed(choices):
        moves.append(int(choice_B[left]))
        left -= moves[-1]
    return float(best_B[budget]), moves[::-1]


def divide_by_rank(fronts: Sequence[Front], budget: int | None, into_G: NDArray[np.int64]) -> list[Point] | None:
    """One point per layer, together the best with at most so many moves into each rank over all layers (and in all).

    A knapsack with a row for each rank and one choice per layer, solved by HiGHS to 0.01 % within 2 s; None: it knows
    no choice that fits.
    """
    from scipy.optimize import LinearConstraint, milp

    points = [point for front in fronts for point in front.points]
    layer_N = np.repeat(np.arange(len(fronts)), [len(front.points) for front in fronts])
    if len(np.unique(layer_N)) < len(fronts):
        return None
    into_GN = np.array([point.into_G for point in points]).T
    limits = [
        LinearConstraint(np.arange(len(fronts))[:, None] == layer_N, 1, 1),
        LinearConstraint(into_GN, ub=into_G),
    ]
    if budget is not None:
        limits.append(LinearConstraint(into_GN.sum(axis=0), ub=budget))
    total_N = np.array([point.total_us for point in points])
    found = milp(
        total_N / total_N.max(initial=0.0) if total_N.any() else total_N,
        integrality=np.ones(len(points)),
        bounds=(0, 1),
        constraints=limits,
        options={"time_limit": 2.0, "mip_rel_gap": 1e-4},
    )
    return None if found.x is None else [points[n] for n in np.flatnonzero(found.x > 0.5)]

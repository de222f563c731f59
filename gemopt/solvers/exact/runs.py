"""A curve cut into convex runs over the whole loads that can occur: what needs a literal, and what does not.

Only what lies between a step's floor and its cutoff is of interest: no makespan is below the floor, and none above the
cutoff belongs to a placement better than the incumbent. So values are clipped below, loads that take too long are
left out, and all that is stated lies within the range that is still open: numbers stay of one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import Curve, FloatArray

Point = tuple[int, float]
"""A load and the value there."""

COLLINEAR = 1e-12  # slopes this close, relatively, are one line: an error far below any tolerance in use
STEEPEST = 64
"""How many times the height of a curve its lines may rise or fall over the run that they are drawn on over."""


@dataclass(frozen=True)
class Run:
    """Whole loads `low` to `high`, on which the value is convex and straight between `points`."""

    points: tuple[Point, ...]

    @property
    def low(self) -> int:
        """Smallest load."""
        return self.points[0][0]

    @property
    def high(self) -> int:
        """Largest load."""
        return self.points[-1][0]

    @property
    def parts(self) -> list[tuple[int, float]]:
        """(loads, rise) of each straight part."""
        return [(x1 - x0, y1 - y0) for (x0, y0), (x1, y1) in pairwise(self.points)]

    def value(self, load: int) -> float:
        """Microseconds at a load of this run."""
        return float(np.interp(load, [x for x, _ in self.points], [y for _, y in self.points]))


def convex_runs(curve: Curve, low: int, high: int, at_least: float = -np.inf, at_most: float = np.inf) -> list[Run]:
    """Fewest convex runs, left to right, that give `max(curve, at_least)` at every whole load from low to high.

    Loads at which the curve is above `at_most` are in no run. Cutting greedily from the left gives the fewest runs, as
    any part of a convex run is convex; a run is also cut where a line would leave the range of the others by far.
    """
    loads, values = _corners(curve, low, high, at_least, at_most)
    runs: list[Run] = []
    allowed = values <= at_most
    height = float(np.ptp(values[allowed])) if allowed.any() else 0.0
    for start, stop in _stretches(allowed):
        points = list(zip(loads[start:stop].tolist(), values[start:stop].tolist(), strict=True))
        runs += _cut(points, height)
    return runs


def _cut(points: list[Point], height: float) -> list[Run]:
    """Convex runs of one stretch of loads."""
    runs, run, steepest = [], points[:1], 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        slope = (y1 - y0) / (x1 - x0)
        if len(run) > 1:
            (xa, ya), (xb, yb) = run[-2:]
            last = (yb - ya) / (xb - xa)
            if abs(slope - last) <= COLLINEAR * (abs(slope) + abs(last)):
                run[-1] = (x1, y1)
                continue
            steepest = max(steepest, abs(last))
            if slope < last or max(steepest, abs(slope)) * (x1 - run[0][0]) > STEEPEST * height:
                runs.append(Run(tuple(run)))
                run, steepest = [(x0 + 1, y0 + slope)] if x0 + 1 < x1 else [], 0.0
        run.append((x1, y1))
    return [*runs, Run(tuple(run))]


def _stretches(allowed: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """[start, stop) of each row of neighbours that are allowed."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], allowed, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _corners(
    curve: Curve, low: int, high: int, at_least: float, at_most: float
) -> tuple[NDArray[np.int64], FloatArray]:
    """Whole loads between which the clipped curve is straight on whole loads, and its values there.

    Where the curve crosses a level, the whole loads on either side are corners, with none between them.
    """
    inside = curve.x[(curve.x > low) & (curve.x < high)]
    points = np.unique(np.concatenate([[low], inside, [high]]))
    both = [points]
    for level in (at_least, at_most):
        if np.isfinite(level):
            values = curve(points) - level
            crosses = values[:-1] * values[1:] < 0
            before, after = values[:-1][crosses], values[1:][crosses]
            both.append(points[:-1][crosses] + np.diff(points)[crosses] * before / (before - after))
    around = np.concatenate(both)
    loads = np.unique(np.concatenate([np.floor(around), np.ceil(around)]).clip(low, high)).astype(np.int64)
    return loads, np.maximum(curve(loads), at_least)


@dataclass(frozen=True)
class Term:
    """Sum of curves of one rank at one step: a constant, straight parts, and curved parts as (feature, runs).

    The least value of a curved part is 0; what it has more is in the constant.
    """

    constant: float
    slopes_F: FloatArray
    curved: tuple[tuple[int, tuple[Run, ...]], ...]


def split_term(
    curves: Sequence[Curve], low_F: Sequence[int], high_F: Sequence[int], floor: float, cutoff: float
) -> Term | None:
    """Tell straight from curved parts within the loads that can occur; None when the sum never exceeds `floor`.

    A curve is of interest only above what is left of `floor` when all the others are at their largest, and up to what
    is left of `cutoff` when all the others are at their smallest.
    """
    values = [_corners(*given, -np.inf, np.inf)[1] for given in zip(curves, low_F, high_F, strict=True)]
    tops, bottoms = [float(value.max()) for value in values], [float(value.min()) for value in values]
    if sum(tops) <= floor:
        return None
    constant, slopes_F, curved = 0.0, np.zeros(len(curves)), []
    for f, curve in enumerate(curves):
        low, high = low_F[f], high_F[f]
        if low == high or curve.linear:
            slopes_F[f] = curve.slope if high > low else 0.0
            constant += float(curve(low)) - slopes_F[f] * low
            continue
        above, below = floor - sum(tops) + tops[f], cutoff - sum(bottoms) + bottoms[f]
        runs = convex_runs(curve, low, high, above, max(above, below))
        if len(runs) == 1 and len(runs[0].points) == 2 and (runs[0].low, runs[0].high) == (low, high):
            slopes_F[f] = runs[0].parts[0][1] / (high - low)
            constant += runs[0].points[0][1] - slopes_F[f] * low
            continue
        least = min(y for run in runs for _, y in run.points)
        constant += least
        curved.append((f, tuple(Run(tuple((x, y - least) for x, y in run.points)) for run in runs)))
    return Term(constant, slopes_F, tuple(curved))


def hull(runs: Sequence[Run]) -> list[Point]:
    """Corners of the convex minorant of the runs: what lies above it holds whatever run is chosen."""
    kept: list[Point] = []
    for load, value in (point for run in runs for point in run.points):
        while len(kept) > 1 and (kept[-1][1] - kept[-2][1]) * (load - kept[-1][0]) >= (value - kept[-1][1]) * (
            kept[-1][0] - kept[-2][0]
        ):
            kept.pop()
        kept.append((load, value))
    return kept

"""A curve cut into convex runs over the whole loads that can occur: what needs a literal, and what does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import Curve, FloatArray

Line = tuple[int, float, float]
"""A load, the value there, and the slope."""

COLLINEAR = 1e-12  # slopes this close, relatively, are one line: an error far below any tolerance in use


@dataclass(frozen=True)
class Run:
    """Loads `low` to `high`, on which the value is the maximum of `lines`."""

    low: int
    high: int
    lines: tuple[Line, ...]

    def value(self, load: int) -> float:
        """Microseconds at a load of this run."""
        return max(y + slope * (load - x) for x, y, slope in self.lines)


def convex_runs(curve: Curve, low: int, high: int, at_least: float = -np.inf) -> list[Run]:
    """Fewest convex runs, left to right, that give `max(curve, at_least)` at every whole load from low to high.

    A value below `at_least` is of no interest where a step takes at least that long anyway: what lies below becomes
    flat and its corners vanish. Cutting greedily from the left gives the fewest runs, as any part of a convex run
    is convex.
    """
    if low == high or curve.linear:
        value = float(curve(low))
        return [Run(low, high, ((low, value, curve.slope if high > low else 0.0),))]
    loads, values = _corners(curve, low, high, at_least)
    slopes = np.diff(values) / np.diff(loads)
    runs: list[Run] = []
    start, lines = low, [(low, float(values[0]), float(slopes[0]))]
    for x, y, slope in zip(loads[1:-1].tolist(), values[1:-1].tolist(), slopes[1:].tolist(), strict=True):
        last = lines[-1][2]
        close = COLLINEAR * (abs(slope) + abs(last))
        if slope < last - close:
            runs.append(Run(start, x, tuple(lines)))
            start, lines = x + 1, [(x, y, slope)]
        elif slope > last + close:
            lines.append((x, y, slope))
    return [*runs, Run(start, high, tuple(lines))]


def _corners(curve: Curve, low: int, high: int, at_least: float) -> tuple[NDArray[np.int64], FloatArray]:
    """Whole loads between which the clipped curve is straight on whole loads, and its values there."""
    inside = curve.x[(curve.x > low) & (curve.x < high)]
    points = np.concatenate([[low], inside, [high]])
    values = curve(points) - at_least
    with np.errstate(invalid="ignore", divide="ignore"):
        crosses = values[:-1] * values[1:] < 0
        at = points[:-1] + np.diff(points) * values[:-1] / (values[:-1] - values[1:])
    both = np.concatenate([points, at[crosses]])
    loads = np.unique(np.concatenate([np.floor(both), np.ceil(both)]).clip(low, high)).astype(np.int64)
    return loads, np.maximum(curve(loads), at_least)


@dataclass(frozen=True)
class Term:
    """Sum of curves of one rank at one step: a constant, straight parts, and curved parts as (feature, runs)."""

    constant: float
    slopes_F: FloatArray
    curved: tuple[tuple[int, tuple[Run, ...]], ...]


def split_term(curves: Sequence[Curve], low_F: Sequence[int], high_F: Sequence[int], floor: float) -> Term | None:
    """Tell straight from curved parts within the loads that can occur; None when the sum never exceeds `floor`.

    A curve is of interest only above what is left of `floor` when all the others are at their largest.
    """
    whole = [convex_runs(*given) for given in zip(curves, low_F, high_F, strict=True)]
    tops = [max(max(run.value(run.low), run.value(run.high)) for run in runs) for runs in whole]
    if sum(tops) <= floor:
        return None
    constant, slopes_F, curved = 0.0, np.zeros(len(curves)), []
    for f, curve in enumerate(curves):
        runs = convex_runs(curve, low_F[f], high_F[f], floor - sum(tops) + tops[f])
        if len(runs) > 1 or len(runs[0].lines) > 1:
            curved.append((f, tuple(runs)))
            continue
        load, value, slopes_F[f] = runs[0].lines[0]
        constant += value - slopes_F[f] * load
    return Term(constant, slopes_F, tuple(curved))


def hull(runs: Sequence[Run]) -> list[Line]:
    """Lines of the convex minorant of the runs: they hold whatever run is chosen."""
    loads = np.unique([load for run in runs for load in (run.low, *(x for x, _, _ in run.lines), run.high)])
    kept: list[tuple[int, float]] = []
    for load in loads.tolist():
        value = next(run for run in runs if load <= run.high).value(load)
        while len(kept) > 1 and (kept[-1][1] - kept[-2][1]) * (load - kept[-1][0]) >= (value - kept[-1][1]) * (
            kept[-1][0] - kept[-2][0]
        ):
            kept.pop()
        kept.append((load, value))
    pairs = zip(kept[:-1], kept[1:], strict=True)
    return [(x0, y0, (y1 - y0) / (x1 - x0)) for (x0, y0), (x1, y1) in pairs]

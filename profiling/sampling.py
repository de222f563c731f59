"""Which loads to measure: few points, placed where interpolating between the points already measured is wrong.

The latency of a MoE layer against its load is a jagged staircase: flat treads, steps up where a tile of GEMM rows is
full, steps up or down where the library changes kernels. `sample_curve` starts from a few spread loads and then always
halves the interval with the largest expected interpolation error, which is one of two things:

* the ends differ by more than slope and noise explain, so a step lies between them: the expected error is in
  proportion to its height and to the width in which it is not yet located;
* the ends agree, but steps may hide between them: what such intervals turned out to hide so far, per width, tells.

A step is located by probabilistic bisection: the next load halves the probability of where it lies. A step up is a
full tile, so it is likelier just after a multiple of 16, 32, 64, ...; which multiples is learnt from the steps found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError
from gemopt.latency import FloatArray

MIN_BUDGET = 8
START = 16  # loads measured before the search begins, at most a third of the budget
LEVELS = 8  # powers of two told apart as tile sizes: 1 to 128 rows
NEIGHBOURS = 5  # intervals on each side that tell the slope of a tread
STEP_SIGMAS = 2.0  # a difference of this many standard deviations is a step


@dataclass(frozen=True)
class Reading:
    """A measured latency and its relative standard error."""

    latency_us: float
    noise: float


@dataclass(frozen=True)
class Sampling:
    """Loads in the order of measuring, the expected mean relative interpolation error, and why the search stopped."""

    loads: list[int]
    error: float
    stopped_by: Literal["target", "budget", "exhausted"]


Measure = Callable[[int], Reading]


def sample_curve(
    measure: Measure, low: int, high: int, *, budget: int, target_error: float = 0.0, unit: int = 1
) -> Sampling:
    """Measure `measure(load)` at loads from `low` to `high` chosen one after the other.

    Parameters
    ----------
    budget
        Most loads to measure, at least 8.
    target_error
        Stop as soon as the expected mean relative error of interpolating linearly between the points is below this.
    unit
        Assignments that add one row to every active expert: tiles fill at multiples of it.

    Raises
    ------
    InputError
        When the range is empty or the budget too small.
    """
    if not 1 <= low < high:
        raise InputError("loads", f"{low} to {high}", "an increasing range from 1 assignment up")
    if budget < MIN_BUDGET:
        raise InputError("budget", budget, f"at least {MIN_BUDGET} points are needed to see a curve", "raise --points")
    search = _Search(measure, high - low, unit)
    for load in _start(low, high, min(START, max(MIN_BUDGET, budget // 3)), unit):
        search.measure(load)
    while len(search.loads) < budget:
        if search.widths.max() < 2:
            return Sampling(search.loads, 0.0, "exhausted")
        expected = search.expected_errors()
        if expected.sum() / (high - low) <= target_error:
            return Sampling(search.loads, float(expected.sum() / (high - low)), "target")
        search.split(int(expected.argmax()))
    return Sampling(search.loads, float(search.expected_errors().sum() / (high - low)), "budget")


def _start(low: int, high: int, count: int, unit: int) -> list[int]:
    """Loads spread over the logarithm and over the range, each the first row of a tile."""
    half = count // 2
    spread = np.concatenate([np.geomspace(low, high, half), np.linspace(low, high, count - half)])
    loads = {low, high}
    for before, load in zip(np.sort(spread), np.sort(spread)[1:], strict=False):
        tile = unit * 2 ** int(np.log2(max(1.0, (load - before) / 2 / unit)))
        loads.add(int(np.clip(round((load - 1) / tile) * tile + 1, low, high)))
    return sorted(loads)


@dataclass
class _Search:
    take: Measure
    span: int
    unit: int
    loads: list[int] = field(default_factory=list)
    x: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    y: FloatArray = field(default_factory=lambda: np.zeros(0))
    noises: list[float] = field(default_factory=list)
    hidden: list[tuple[float, float, int]] = field(default_factory=list)  # without a step: error, latency (us), width
    steps_up: FloatArray = field(default_factory=lambda: np.array([0.1] * 4 + [1.0] * 4))
    steps_down: FloatArray = field(default_factory=lambda: np.ones(LEVELS))

    @property
    def widths(self) -> NDArray[np.int64]:
        return np.diff(self.x)

    def measure(self, load: int) -> float:
        reading = self.take(load)
        position = int(np.searchsorted(self.x, load))
        self.x = np.insert(self.x, position, load)
        self.y = np.insert(self.y, position, max(reading.latency_us, 1e-9))
        self.loads.append(load)
        self.noises.append(reading.noise)
        return reading.latency_us

    def expected_errors(self) -> FloatArray:
        """[intervals] expected relative error of interpolation, summed over the loads inside."""
        inside = self.widths - 1
        noise = self._noise()
        _, heights = self._steps(noise)
        # A step of height 1 anywhere in an interval leaves 1/3 of error on average.
        hidden = 0.6 * self._hidden_rate(noise) * self.widths / np.minimum(self.y[:-1], self.y[1:])
        return np.asarray(inside * (heights / 3 + hidden))

    def _steps(self, noise: float) -> tuple[FloatArray, FloatArray]:
        """[intervals] signed rise beyond the slope of the neighbouring treads; relative height, 0 if within noise."""
        rises, widths = np.diff(self.y), self.widths
        slopes = rises / widths
        excess = rises - widths * self._tread_slopes(slopes)
        heights = np.abs(excess) / np.minimum(self.y[:-1], self.y[1:])
        sigma = np.sqrt(2) * noise
        clear = np.sqrt(np.maximum(0.0, heights**2 - sigma**2))
        return excess, np.where(heights > STEP_SIGMAS * sigma, clear, 0.0)

    @staticmethod
    def _tread_slopes(slopes: FloatArray) -> FloatArray:
        """[intervals] slope of the tread: the flattest of the medians to the left, to the right and over all.

        A median over neighbours holds steps too, so it is rather too steep than too flat.
        """
        overall = float(np.median(slopes))
        sides = [
            (np.median(slopes[max(0, i - NEIGHBOURS) : i + 1]), np.median(slopes[i : i + NEIGHBOURS + 1]), overall)
            for i in range(len(slopes))
        ]
        return np.array([min(medians, key=abs) for medians in sides])

    def _noise(self) -> float:
        """Relative noise of a point: at least what was reported, at most four times that, by how far points lie off.

        The first decile of the residuals is used because most points stand beside a step.
        """
        reported = max(float(np.median(self.noises)), 1e-4)
        if len(self.x) < 5:
            return reported
        x, y = self.x, self.y
        line = (y[:-2] * (x[2:] - x[1:-1]) + y[2:] * (x[1:-1] - x[:-2])) / (x[2:] - x[:-2])
        off = np.quantile(np.abs(y[1:-1] - line) / y[1:-1], 0.1) / 0.1257 / np.sqrt(1.5)
        return float(np.clip(off, reported, 4 * reported))

    def _hidden_rate(self, noise: float) -> float:
        """Microseconds that intervals without a visible step turned out to hide, per width; starts at 5 %.

        Not relative: a full tile costs the same at any load, so a step weighs more where the latency is low.
        """
        level, prior_width = float(np.median(self.y)), self.span / START
        excess = sum(error - noise * latency for error, latency, _ in self.hidden)
        widths = sum(width for _, _, width in self.hidden)
        return max(1e-6 * level, (0.05 * level + excess) / (prior_width + widths))

    def split(self, interval: int) -> None:
        """Measure one more load inside the interval and learn from it."""
        noise = self._noise()
        excess, heights = self._steps(noise)
        a, b = int(self.x[interval]), int(self.x[interval + 1])
        line = np.poly1d(np.polyfit([a, b], self.y[interval : interval + 2], 1))
        if not heights[interval]:
            load = self._middle(a, b)
            latency = self.measure(load)
            self.hidden.append((abs(latency - float(line(load))), latency, b - a))
            return
        weights = self.steps_up if excess[interval] > 0 else self.steps_down
        cumulative = np.cumsum(weights[self._levels(a, b)] * 2.0 ** self._levels(a, b))
        load = a + 1 + int(np.abs(cumulative[:-1] / cumulative[-1] - 0.5).argmin())
        self.measure(load)
        for left in (interval, interval + 1):
            rise = abs(self.y[left + 1] - self.y[left]) / min(self.y[left : left + 2])
            if self.x[left + 1] - self.x[left] == 1 and rise > max(4 * noise, heights[interval] / 2):
                weights[self._levels(int(self.x[left]), int(self.x[left + 1]))[0]] += 1

    def _levels(self, a: int, b: int) -> NDArray[np.int64]:
        """[b - a] power of two of the tile that would be full just before each load of a+1..b."""
        rows, rest = np.divmod(np.arange(a, b), self.unit)
        level = np.log2(np.maximum(rows & -rows, 1)).astype(np.int64)
        return np.where(rest > 0, 0, np.where(rows == 0, LEVELS - 1, np.minimum(level, LEVELS - 1)))

    def _middle(self, a: int, b: int) -> int:
        """First row of the largest tile in the middle half of the interval."""
        quarter = max(1, (b - a) // 4)
        levels = self._levels(a + quarter - 1, b - quarter)
        best = np.nonzero(levels == levels.max())[0]
        return int(a + quarter + best[len(best) // 2])


def sample_surface(
    measure: Callable[[tuple[int, int]], Reading], grid: Sequence[tuple[int, int]], *, budget: int
) -> list[tuple[int, int]]:
    """Choose loads (assignments, active experts) from `grid` one after the other, and measure them.

    Starts at the corners of the grid. The next load is the one that is farthest, in the logarithms of both, from
    the measured ones, weighed by how wrong a plane through the neighbours of those turned out to be.

    Raises
    ------
    InputError
        When the budget is below 5 points or the grid has fewer points than that.
    """
    points = sorted(set(grid))
    if budget < 5 or len(points) < 5:
        raise InputError("budget", min(budget, len(points)), "at least 5 points are needed to see a surface")
    where = np.log(np.array(points, dtype=np.float64))
    chosen = _corners(where)
    values = {i: float(np.log(max(measure(points[i]).latency_us, 1e-9))) for i in chosen}
    while len(values) < min(budget, len(points)):
        done = np.array(sorted(values))
        wrong = _plane_errors(where[done], np.array([values[i] for i in done]))
        distance = np.linalg.norm(where[:, None] - where[done][None], axis=2)
        nearest = distance.argsort(axis=1)[:, :3]
        score = distance.min(axis=1) * (wrong.mean() + wrong[nearest].mean(axis=1))
        score[done] = -1
        best = int(score.argmax())
        values[best] = float(np.log(max(measure(points[best]).latency_us, 1e-9)))
    return [points[i] for i in values]


def _corners(where: FloatArray) -> list[int]:
    """Extreme points of the grid along both axes and both diagonals."""
    directions = np.array([[1, 0], [-1, 0], [0, 1], [0, -1], [1, 1], [-1, -1], [1, -1], [-1, 1]]) + 0.01
    return list(dict.fromkeys(int((where @ direction).argmax()) for direction in directions))


def _plane_errors(where: FloatArray, values: FloatArray) -> FloatArray:
    """[points] how far each lies from the plane through its four nearest neighbours."""
    errors = np.zeros(len(values))
    for i in range(len(values)):
        near = np.linalg.norm(where - where[i], axis=1).argsort()[1:5]
        design = np.column_stack([np.ones(len(near)), where[near] - where[i]])
        plane = np.linalg.lstsq(design, values[near], rcond=1e-6)[0]
        errors[i] = abs(plane[0] - values[i])
    return errors

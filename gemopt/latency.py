"""Latency of a rank as solvers see it: the largest of sums of piecewise-linear curves of its loads.

    latency(x) = max over terms k of  sum over features f of  curve_kf(x_f)

Every cost model states itself in this one form, so a new cost model or feature needs no change in any solver:
a staircase is one term with one curve, a roofline is one term of straight lines per plane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Feature:
    """An additive load: `of(n)` of each expert's assignments n, summed over the experts of a rank.

    `of` maps integer arrays to integer arrays of the same shape, whose values fit in 31 bits. Bounds rely on
    `of(0) == 0`, on `of` not decreasing, and on `of(a) + of(b) >= of(a + b)` (splitting never lowers the load).
    """

    name: str
    of: Callable[[NDArray[Any]], NDArray[Any]]


def _assignments(n: NDArray[Any]) -> NDArray[Any]:
    return n


def _active(n: NDArray[Any]) -> NDArray[Any]:
    return (n > 0).astype(n.dtype)


def _tiles(size: int, n: NDArray[Any]) -> NDArray[Any]:
    return -(-n // size)


ASSIGNMENTS = Feature("assignments", _assignments)
ACTIVE = Feature("active", _active)


def tiles(tile_tokens: int) -> Feature:
    """Tiles of a grouped GEMM, which rounds each expert up by itself: `ceil(n / tile_tokens)`."""
    if tile_tokens < 1:
        raise InputError("tile_tokens", tile_tokens, "at least 1")
    size = min(tile_tokens, 2**31 - 1)  # beyond any count, so that it fits in their type
    return Feature(f"tiles@{tile_tokens}", partial(_tiles, size))


@dataclass(frozen=True, eq=False)
class Curve:
    """Piecewise-linear function of one load >= 0, through the points (x, y), then on with `slope`.

    x: [K] increasing, x[0] = 0. y: [K] microseconds. slope: microseconds per unit beyond x[-1].
    """

    x: FloatArray
    y: FloatArray
    slope: float

    def __post_init__(self) -> None:
        x, y = np.array(self.x, dtype=np.float64), np.array(self.y, dtype=np.float64)
        if x.ndim != 1 or x.shape != y.shape or not len(x) or x[0] != 0 or (np.diff(x) <= 0).any():
            raise InputError("Curve.x", x, "increasing loads from 0, one value each")
        if not (np.isfinite(x).all() and np.isfinite(y).all() and np.isfinite(self.slope)):
            raise InputError("Curve", "NaN or infinity", "finite points")
        keep = _corners(x, y, self.slope)
        object.__setattr__(self, "x", x[keep])
        object.__setattr__(self, "y", y[keep])

    def __call__(self, load: object) -> FloatArray:
        """Value in microseconds at each load."""
        load = np.asarray(load, dtype=np.float64)
        beyond = np.maximum(load - self.x[-1], 0.0)
        return np.asarray(np.interp(load, self.x, self.y) + self.slope * beyond)

    @property
    def linear(self) -> bool:
        """Whether it is one straight line."""
        return len(self.x) == 1

    @cached_property
    def low(self) -> Curve:
        """Largest non-decreasing curve that is nowhere above: `f_low(n) = min over m >= n of f(m)`.

        Raises
        ------
        InputError
            When the curve falls for ever, so that no such curve exists.
        """
        if self.slope < 0:
            raise InputError("Curve.slope", self.slope, "a latency that falls for ever has no lower bound")
        if (np.diff(self.y) >= 0).all():
            return self
        xs, ys = [self.x[-1]], [self.y[-1]]
        for i in range(len(self.x) - 2, -1, -1):
            x0, y0, low = self.x[i], self.y[i], ys[-1]
            if y0 >= low:
                if xs[-1] > x0:
                    xs.append(x0)
                    ys.append(low)
                continue
            x1, y1 = self.x[i + 1], self.y[i + 1]
            if y1 > low:  # the segment crosses the level of what comes later
                cross = x0 + (low - y0) * (x1 - x0) / (y1 - y0)
                if x0 < cross < xs[-1]:
                    xs.append(cross)
                    ys.append(low)
            xs.append(x0)
            ys.append(y0)
        return Curve(np.array(xs[::-1]), np.array(ys[::-1]), self.slope)

    @cached_property
    def high(self) -> Curve:
        """Smallest non-decreasing curve that is nowhere below: the largest value up to each load."""
        if self.slope >= 0 and (np.diff(self.y) >= 0).all():
            return self
        xs, ys = [self.x[0]], [self.y[0]]
        for x0, y0, x1, y1 in zip(self.x, self.y, self.x[1:], self.y[1:], strict=False):
            if y1 <= ys[-1]:
                continue
            cross = x0 + max(0.0, ys[-1] - y0) * (x1 - x0) / (y1 - y0)
            if xs[-1] < cross < x1:
                xs.append(cross)
                ys.append(ys[-1])
            xs.append(x1)
            ys.append(y1)
        if self.slope > 0 and (cross := self.x[-1] + (ys[-1] - self.y[-1]) / self.slope) > xs[-1]:
            xs.append(cross)
            ys.append(ys[-1])
        return Curve(np.array(xs), np.array(ys), max(self.slope, 0.0))

    @cached_property
    def hull(self) -> Curve:
        """Convex minorant: the largest convex curve that is nowhere above."""
        points: list[tuple[float, float]] = []
        for point in zip(self.x, self.y, strict=True):
            while len(points) > 1 and _turns_down(points[-2], points[-1], point):
                points.pop()
            points.append(point)
        while len(points) > 1:  # the tail must not be flatter than what precedes it
            (x0, y0), (x1, y1) = points[-2:]
            if (y1 - y0) / (x1 - x0) <= self.slope:
                break
            points.pop()
        x, y = np.array(points).T
        return Curve(x, y, self.slope)

    def pieces(self) -> list[tuple[float, float]]:
        """(intercept, slope) of each segment in order; their maximum is the curve when it is convex."""
        slopes = np.append(np.diff(self.y) / np.diff(self.x), self.slope)
        return [(float(y - s * x), float(s)) for x, y, s in zip(self.x, self.y, slopes, strict=True)]


def _corners(x: FloatArray, y: FloatArray, slope: float) -> NDArray[np.bool_]:
    keep = np.ones(len(x), dtype=bool)
    slopes = np.append(np.diff(y) / np.diff(x), slope)
    keep[1:] = np.abs(np.diff(slopes)) > 1e-9 * (1e-12 + np.abs(slopes[1:]) + np.abs(slopes[:-1]))
    return keep


def _turns_down(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def line(intercept: float, slope: float) -> Curve:
    """A straight line."""
    return Curve(np.zeros(1), np.array([intercept]), slope)


@dataclass(frozen=True, eq=False)
class Latency:
    """Latency of one rank: the largest over `terms` of the sum of the term's curves, one per feature."""

    terms: tuple[tuple[Curve, ...], ...]

    def __post_init__(self) -> None:
        if not self.terms or len({len(term) for term in self.terms}) != 1 or not self.terms[0]:
            raise InputError("Latency.terms", len(self.terms), "at least one term, each with one curve per feature")

    @property
    def num_features(self) -> int:
        """F, features."""
        return len(self.terms[0])

    def __call__(self, loads_F: Sequence[object]) -> FloatArray:
        """Microseconds for loads given feature by feature: F arrays of one shape."""
        sums = [sum(curve(load) for curve, load in zip(term, loads_F, strict=True)) for term in self.terms]
        return np.asarray(np.max(np.stack([np.asarray(value) for value in sums]), axis=0))

    @property
    def key(self) -> tuple[Any, ...]:
        """What is equal for latencies that are."""
        return tuple(tuple((c.x.tobytes(), c.y.tobytes(), c.slope) for c in term) for term in self.terms)

    @property
    def max_affine(self) -> bool:
        """Whether every curve is straight, so that the latency is a maximum of planes."""
        return all(curve.linear for term in self.terms for curve in term)

    @cached_property
    def low(self) -> Latency:
        """A latency that is nowhere above and does not decrease in any load."""
        return Latency(tuple(tuple(curve.low for curve in term) for term in self.terms))

    @cached_property
    def high(self) -> Latency:
        """A latency that is nowhere below and does not decrease in any load."""
        return Latency(tuple(tuple(curve.high for curve in term) for term in self.terms))

    def times(self, factor: float) -> Latency:
        """The same latency, `factor` times as long under every load: a device of another speed."""
        if factor == 1:
            return self
        return Latency(tuple(tuple(Curve(c.x, c.y * factor, c.slope * factor) for c in term) for term in self.terms))

    def planes(self, limit: int = 8) -> FloatArray:
        """[K, 1 + F] planes (intercept, slope per feature) whose maximum is a convex minorant.

        Exact when the latency is `max_affine`; otherwise the convex hull of each curve, each with at most `limit`
        pieces; curves with several features are combined through one tangent at equal fractions of their ranges.
        """
        rows: list[list[float]] = []
        for term in self.terms:
            pieces = [_thin(curve.hull.pieces(), limit) for curve in term]
            longest = max(map(len, pieces))
            for k in range(longest):
                chosen = [each[k * len(each) // longest] for each in pieces]
                rows.append([sum(a for a, _ in chosen), *(b for _, b in chosen)])
        return np.array(rows)


def _thin(pieces: list[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    return [pieces[i] for i in spread_evenly(len(pieces), limit)]


def spread_evenly(size: int, most: int) -> NDArray[np.int64]:
    """At most so many of the indices of `size` items, the first and the last among them."""
    return np.unique(np.linspace(0, size - 1, min(size, most)).round().astype(np.int64))


class Curves(NamedTuple):
    """The curves of all ranks as flat arrays, for the compiled kernels.

    start, length: [G, K, F] slice of `x` and `y` of each curve; slope: [G, K, F]; num_terms: [G].
    """

    start: NDArray[np.int64]
    length: NDArray[np.int64]
    slope: FloatArray
    num_terms: NDArray[np.int64]
    x: FloatArray
    y: FloatArray


def pack(latencies: Sequence[Latency]) -> Curves:
    """Flatten the latencies of all ranks."""
    terms = max(len(latency.terms) for latency in latencies)
    shape = (len(latencies), terms, latencies[0].num_features)
    start, length = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    slope = np.zeros(shape)
    xs: list[FloatArray] = []
    ys: list[FloatArray] = []
    position = 0
    for g, latency in enumerate(latencies):
        for k, term in enumerate(latency.terms):
            for f, curve in enumerate(term):
                start[g, k, f], length[g, k, f], slope[g, k, f] = position, len(curve.x), curve.slope
                xs.append(curve.x)
                ys.append(curve.y)
                position += len(curve.x)
    num_terms = np.array([len(latency.terms) for latency in latencies])
    return Curves(start, length, slope, num_terms, np.concatenate(xs), np.concatenate(ys))


pack_shared = lru_cache(maxsize=1)(pack)
"""As `pack`; those that were flattened last, which the layers of a network share, are at hand."""

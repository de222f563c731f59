"""How far a staircase is off between its points, and how well its points are known.

Dropping points cannot tell: a staircase that was sampled at its corners is exact, yet without a corner it is wrong by
half a step. What is known instead: the noise of the points (their repeats), and both ends of every interval.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gemopt.latency import FloatArray
from gemopt.profile import Sample

SIGMA_OF_MAD = 1.4826  # of normal timings
MEDIAN_LOSS = 1.2533  # standard error of a median against that of a mean
CORNER = 4  # intervals whose widths have this ratio, or more, meet at a corner
SMALL = 0.01  # relative misses that need no excuse


def is_curve(table: FloatArray) -> bool:
    """Whether load alone may tell the latency: active experts are unknown or never fall as the load grows."""
    active = table[np.lexsort((table[:, 1], table[:, 0]))]
    if np.isnan(active[:, 1]).any():
        return True
    one_each = len(np.unique(active[:, 0])) == len(active)
    return one_each and bool((np.diff(active[:, 1]) >= 0).all())


def noise(samples: Sequence[Sample]) -> float:
    """Median relative standard error of the samples; 0 where neither spread nor repeats are known."""
    errors = [
        MEDIAN_LOSS * SIGMA_OF_MAD * sample.spread_us / sample.repeats**0.5 / sample.latency_us
        for sample in samples
        if sample.spread_us is not None and sample.repeats is not None and sample.repeats > 1 and sample.latency_us
    ]
    return float(np.median(errors)) if 2 * len(errors) > len(samples) else 0.0


def left_out(table: FloatArray) -> float:
    """Mean relative error of joining the neighbours of a point that is left out; NaN where none can be.

    A point whose intervals differ fourfold in width is a corner: its neighbours were measured to locate a step, so
    leaving it out would blame the staircase for what it knows. Points weigh as much as the loads around them.
    """
    x, y = np.unique(table[:, 0]), middles(table)
    if len(x) < 4:
        return float("nan")
    left, right = np.diff(x)[:-1], np.diff(x)[1:]
    judged = np.maximum(left, right) < CORNER * np.minimum(left, right)
    judged &= y[1:-1] > 0
    if not judged.any():
        return float("nan")
    joined = y[:-2] + (y[2:] - y[:-2]) * left / (left + right)
    misses = np.abs(joined[judged] / y[1:-1][judged] - 1)
    return float(np.average(misses, weights=(left + right)[judged]))


def roughest(names: Sequence[str], tables: Sequence[FloatArray]) -> list[int]:
    """Of devices of each name the one whose points tell least of each other; the roughest of them first."""
    roughness = [float(np.nan_to_num(left_out(table), nan=-1.0)) for table in tables]
    worst: dict[str, int] = {}
    for i, name in enumerate(names):
        if roughness[i] >= roughness[worst.setdefault(name, i)]:
            worst[name] = i
    return sorted(worst.values(), key=lambda i: -roughness[i])


def middles(table: FloatArray) -> FloatArray:
    """Median latency of each distinct load, loads in order."""
    order = np.lexsort((table[:, 2], table[:, 0]))
    _, first, number = np.unique(table[order, 0], return_index=True, return_counts=True)
    sorted_us = table[order, 2]
    return np.asarray((sorted_us[first + (number - 1) // 2] + sorted_us[first + number // 2]) / 2)


def believed(misses: FloatArray, loads: FloatArray, noise: float) -> bool:
    """Whether a smooth model's relative misses at its points are small, or noise, in every doubling of the load.

    Everywhere, because the mean over a long staircase hides its first steps: relative to the latency, steps shrink.
    The mean of m normal misses scatters by 0.6 noise / sqrt(m) around 0.8 noise; a bias as large as the noise is let
    pass, for joining the points would cost about as much.
    """
    octaves = np.floor(np.log2(np.maximum(loads, 1.0)))
    for octave in np.unique(octaves):
        inside = misses[octaves == octave]
        if inside.mean() > max(SMALL, noise * (1.5 + 1.8 / len(inside) ** 0.5)):
            return False
    return True

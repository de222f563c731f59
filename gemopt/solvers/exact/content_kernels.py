"""The cheapest contents of a rank: a compiled search of all of them, cut by what pairs of experts prove.

Shapes: E experts, S of them in a content; F features, P planes of a latency; M contents kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.compiling import njit
from gemopt.kernels import put
from gemopt.solvers.exact.tree import FAST

Array = NDArray[Any]
CHECK = 4096  # contents between two looks at `stop`


class Steps(NamedTuple):
    """What contents take at every step: multipliers `mass` [E, P, T], and what experts add to the planes [E, P, T].

    A rank takes its largest plane, which are `idle` [P] without experts, and counts as no faster than `floor` [T]. No
    planes: pairs say it all.
    """

    mass: Array
    rise: Array
    idle: Array
    floor: Array


@njit(nogil=True, inline="always")
def keep_least(value: float, count: int, least_S: Array) -> None:
    """Take a value in among the `count` smallest, which rise, where it is smaller than the last of them."""
    if value < least_S[count - 1]:
        s = count - 1
        while s > 0 and least_S[s - 1] > value:
            least_S[s] = least_S[s - 1]
            s -= 1
        least_S[s] = value


@njit(nogil=True, inline="always")
def least_sum(cost_E: Array, half_E: Array, first: int, count: int, least_S: Array) -> float:
    """Sum of the `count` smallest of `cost + half` of the experts from `first` on."""
    least_S[:count] = np.inf
    for e in range(first, len(cost_E)):
        keep_least(cost_E[e] + half_E[e], count, least_S)
    return float(least_S[:count].sum())


@njit(nogil=True, fastmath=FAST)
def add_expert(steps: Steps, e: int, plane_PT: Array, mass_PT: Array, out_PT: Array, out_mass_PT: Array) -> None:
    """Planes and multipliers of a content with one more expert."""
    for p in range(len(mass_PT)):
        for t in range(mass_PT.shape[1]):
            out_PT[p, t] = plane_PT[p, t] + steps.rise[e, p, t]
            out_mass_PT[p, t] = mass_PT[p, t] + steps.mass[e, p, t]


@njit(nogil=True, fastmath=FAST)
def above_pairs(steps: Steps, e: int, plane_PT: Array, mass_PT: Array, top_T: Array) -> float:
    """What a content with expert e as well takes more than the planes that its multipliers chose."""
    planes, times = mass_PT.shape
    total = 0.0
    for t in range(times):
        top_T[t] = max(steps.floor[t], plane_PT[0, t] + steps.rise[e, 0, t])
    for p in range(1, planes):
        for t in range(times):
            top_T[t] = max(top_T[t], plane_PT[p, t] + steps.rise[e, p, t])
    for p in range(planes):
        for t in range(times):
            over = top_T[t] - (plane_PT[p, t] + steps.rise[e, p, t])
            total += (mass_PT[p, t] + steps.mass[e, p, t]) * over
    return total


@njit(nogil=True)
def cheapest(
    alone_E: Array, pair_EE: Array, size: int, most: float, steps: Steps, net_M: Array, sets_MS: Array, stop: Array
) -> bool:
    """The contents that cost least, and less than `most`: alone, in pairs, and above these; False when stopped.

    `pair_EE` is symmetric. `net_M` comes with infinity, and `sets_MS` holds the experts where less is found. Experts
    are added one by one, in their order, while the rest can still be cheap enough: each pays half of its pairs.
    """
    experts, (planes, times) = len(alone_E), steps.mass.shape[1:]
    half_SE, margin_SE, cost_S = np.zeros((size, experts)), np.empty((size, experts)), np.zeros(size)
    next_S, chosen_S, least_S = np.zeros(size, np.int64), np.zeros(size, np.int64), np.empty(size)
    plane_SPT = np.zeros((size, planes, times))
    mass_SPT = np.zeros((size, planes, times))
    top_T = np.empty(times)
    for p in range(planes):
        plane_SPT[0, p] = steps.idle[p]
    for i in range(experts):
        least_S[:] = np.inf
        for j in range(experts):
            if j != i and size > 1:
                keep_least(pair_EE[i, j], size - 1, least_S)
        for s in range(1, size):
            half_SE[s, i] = half_SE[s - 1, i] + least_S[s - 1] / 2
    put(margin_SE[0], alone_E)
    depth, ready, worst, looks = 0, 0, 0, 0
    while depth >= 0:
        looks += 1
        if looks % CHECK == 0 and stop[0] != 0:
            return False
        left = size - depth
        if left == 1:
            for e in range(next_S[depth], experts):
                net = cost_S[depth] + margin_SE[depth, e]
                if net < most and planes:
                    for s in range(ready, depth):
                        at = chosen_S[s]
                        add_expert(steps, at, plane_SPT[s], mass_SPT[s], plane_SPT[s + 1], mass_SPT[s + 1])
                    ready = depth
                    net += above_pairs(steps, e, plane_SPT[depth], mass_SPT[depth], top_T)
                if net < most:
                    chosen_S[depth], net_M[worst] = e, net
                    put(sets_MS[worst], chosen_S)
                    worst = int(net_M.argmax())
                    most = min(most, net_M[worst])
            depth -= 1
            continue
        e = next_S[depth]
        if e > experts - left:
            depth -= 1
            continue
        next_S[depth], chosen_S[depth], ready = e + 1, e, min(ready, depth)
        for j in range(e + 1, experts):
            margin_SE[depth + 1, j] = margin_SE[depth, j] + pair_EE[e, j]
        cost = cost_S[depth] + margin_SE[depth, e]
        if cost + least_sum(margin_SE[depth + 1], half_SE[left - 2], e + 1, left - 1, least_S) < most:
            depth += 1
            cost_S[depth], next_S[depth] = cost, e + 1
    return True

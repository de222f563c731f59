"""A few weighted steps that stand for all: a stated reduction for formulations too large for their time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import FloatArray
from gemopt.problem import Problem

SWEEPS = 10


def representative_steps(
    problem: Problem, limit: int, expired: Callable[[], bool] = lambda: False
) -> tuple[NDArray[np.int64], FloatArray]:
    """Indices and weights of at most `limit` steps (at least 1): all of them where they fit.

    Steps are grouped by their counts (k-means, seeded by farthest points, which makes it deterministic). Each group is
    represented by its step nearest to the mean and weighted by the sum of its weights. Once `expired`, the groups stay.
    """
    limit = max(1, limit)
    if problem.num_steps <= limit:
        return np.arange(problem.num_steps), problem.weights_T
    counts_TE = problem.counts_TE.astype(np.float64)
    centres_KE = counts_TE[_farthest(counts_TE, limit)]
    last_T = np.full(problem.num_steps, -1)
    for _ in range(SWEEPS):
        group_T = _distances(counts_TE, centres_KE).argmin(axis=1)
        if (group_T == last_T).all() or expired():
            break
        last_T = group_T
        member_KT = (group_T == np.arange(limit)[:, None]) * problem.weights_T
        mass_K = member_KT.sum(axis=1)
        used = mass_K > 0
        centres_KE[used] = (member_KT @ counts_TE)[used] / mass_K[used, None]
    distance_TK = _distances(counts_TE, centres_KE)
    group_T = distance_TK.argmin(axis=1)
    nearest = np.array([_nearest(distance_TK[:, k], group_T == k) for k in np.unique(group_T)])
    weights = np.bincount(group_T, weights=problem.weights_T)[np.unique(group_T)]
    order = nearest.argsort()
    return nearest[order], weights[order]


def _nearest(distance_T: FloatArray, member_T: NDArray[np.bool_]) -> int:
    return int(np.where(member_T, distance_T, np.inf).argmin())


def _distances(counts_TE: FloatArray, centres_KE: FloatArray) -> FloatArray:
    """[T, K] squared distances up to a constant per step."""
    return np.asarray(np.square(centres_KE).sum(axis=1) - counts_TE @ (2 * centres_KE.T))


def _farthest(counts_TE: FloatArray, limit: int) -> list[int]:
    """Steps far from each other, beginning with the largest."""
    chosen = [int(counts_TE.sum(axis=1).argmax())]
    nearest_T = np.full(len(counts_TE), np.inf)
    while len(chosen) < limit:
        nearest_T = np.minimum(nearest_T, np.square(counts_TE - counts_TE[chosen[-1]]).sum(axis=1))
        chosen.append(int(nearest_T.argmax()))
    return chosen

"""How slow each rank is against its profile, from latencies measured while serving; the shape of its curve is kept."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import FloatArray
from gemopt.online.policy import Policy
from gemopt.words import counted

WINDOW = 32  # last usable steps that a rank is judged by
FEWEST = 6  # steps from which on a rank is judged at all
CERTAIN = 5.0  # a change is believed when it exceeds so many standard errors of a median


class Speeds:
    """Time factor of every rank, relative to the fleet.

    A step's ratio of measured to predicted time, over the median of the ranks so that what all share cancels, is one
    observation. The median of the last ones replaces the factor in force when it is off by more than the tolerance and
    by more than its noise allows; smaller differences are left alone, so that noise moves nothing.

    factors_G: in force, 1 = as profiled. step_us: how long a step takes, roughly. silent_G: steps for which a rank has
    said nothing.
    """

    def __init__(self, policy: Policy, num_ranks: int) -> None:
        self.policy = policy
        self.factors_G = np.ones(num_ranks)
        self.silent_G = np.zeros(num_ranks, np.int64)
        self.step_us = np.inf  # median of the last latencies
        self.recent_NG = np.zeros((0, num_ranks))  # log ratios; NaN where a rank said nothing

    @property
    def failed_G(self) -> NDArray[np.bool_]:
        """[G] ranks that have said nothing for too long."""
        return np.asarray(self.silent_G >= self.policy.dead_after_steps)

    def take(self, latencies_NG: FloatArray, log_NG: FloatArray) -> tuple[list[str], bool]:
        """(what is worth saying, whether factors changed). log_NG: `log_factors` of steps under a known placement."""
        failed_G = self.failed_G
        self.listen(latencies_NG)
        news = [f"rank {g} reports again" for g in np.flatnonzero(failed_G & ~self.failed_G)]
        news += [
            f"rank {g} has failed (no latencies for {counted(self.silent_G[g], 'step')})"
            for g in np.flatnonzero(self.failed_G & ~failed_G)
        ]
        changed = self.learn(log_NG)
        return [*news, *(f"rank {g} takes {self.factors_G[g]:.3f} times its profile" for g in changed)], bool(changed)

    def listen(self, latencies_NG: FloatArray) -> None:
        """Count the steps for which each rank has been silent; a step in which all are says nothing."""
        heard_NG = np.isfinite(latencies_NG) & (latencies_NG > 0)
        for heard_G in heard_NG[heard_NG.any(axis=1)]:
            self.silent_G = np.where(heard_G, 0, self.silent_G + 1)
        if heard_NG.any():
            self.step_us = float(np.median(latencies_NG[heard_NG]))

    def learn(self, log_NG: FloatArray) -> list[int]:
        """Take `log_factors` of steps into account; the ranks whose factor changed."""
        if not len(log_NG):
            return []
        self.recent_NG = np.concatenate([self.recent_NG, log_NG])[-WINDOW:]
        return [rank for rank in range(len(self.factors_G)) if self._update(rank)]

    def _update(self, rank: int) -> bool:
        known = self.recent_NG[:, rank]
        known = known[np.isfinite(known)]
        if len(known) < FEWEST:
            return False
        jump = _last_level(known)
        level, error = level_and_error(jump)
        least = max(np.log1p(self.policy.speed_tolerance), CERTAIN * error)
        if abs(level - np.log(self.factors_G[rank])) <= least:
            return False
        self.factors_G = self.factors_G.copy()
        self.factors_G[rank] = np.exp(level)
        return True


def log_factors(measured_NG: FloatArray, predicted_NG: FloatArray) -> FloatArray:
    """[N, G] logarithms of measured over predicted time, over the median of the ranks, of the steps that tell.

    NaN where a rank said nothing. A step tells where more than half of the ranks that said anything did: the median of
    two would halve what sets one apart.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        log_NG = np.log(measured_NG) - np.log(predicted_NG)
    log_NG = np.where(np.isfinite(log_NG), log_NG, np.nan)
    heard_NG = np.isfinite(log_NG)
    telling_N = heard_NG.sum(axis=1) > max(1.0, 0.5 * heard_NG.any(axis=0).sum())
    log_NG, heard_N = log_NG[telling_N], heard_NG[telling_N].sum(axis=1)
    sorted_NG, at = np.sort(log_NG, axis=1), np.arange(len(log_NG))  # NaN comes last
    median_N = 0.5 * (sorted_NG[at, (heard_N - 1) // 2] + sorted_NG[at, heard_N // 2])
    return np.asarray(log_NG - median_N[:, None])


def level_and_error(values: FloatArray) -> tuple[float, float]:
    """The median, and its standard error."""
    level = _median(values)
    return level, 1.2533 * 1.4826 * _median(np.abs(values - level)) / float(np.sqrt(len(values)))


def _last_level(values: FloatArray) -> FloatArray:
    """The last values of one level: all of them, or those after a jump that splits them cleanly."""
    noise = 1.4826 * _median(np.abs(np.diff(values))) / np.sqrt(2) if len(values) > 1 else 0.0
    cuts = np.arange(FEWEST, len(values) - FEWEST + 1)
    if not len(cuts):
        return values
    gaps = np.abs(first_medians(values[::-1])[::-1][cuts] - first_medians(values)[cuts - 1])
    strengths = gaps / (max(noise, 1e-6) * np.sqrt(1 / cuts + 1 / (len(values) - cuts)))
    best = int(strengths.argmax())
    return values[cuts[best] :] if strengths[best] > 2 * CERTAIN else values


def _median(values: FloatArray) -> float:
    """As `np.median`, which takes five times as long for a few numbers."""
    ordered = np.sort(values)
    return 0.5 * float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2])


def first_medians(values: FloatArray) -> FloatArray:
    """[N] medians of the first 1, 2, ..., N values."""
    at = np.arange(len(values))
    sorted_NN = np.sort(np.where(at <= at[:, None], values, np.inf), axis=1)
    return np.asarray(0.5 * (sorted_NN[at, at // 2] + sorted_NN[at, (at + 1) // 2]))

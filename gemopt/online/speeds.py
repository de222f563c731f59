"""How slow each rank is against its profile, from latencies measured while serving; the shape of its curve is kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import FloatArray
from gemopt.online.policy import Policy
from gemopt.words import counted

WINDOW = 64  # last usable steps that a rank is judged by
FEWEST = 6  # steps from which on a rank is judged at all
RESOLUTION = 1e-12  # of logarithms
CERTAIN = 5.0  # a change is believed when it exceeds so many standard errors of a median


class Speeds:
    """Time factor of every rank, relative to the fleet.

    A step's ratio of measured to predicted time, less what all ranks share, is one observation. As soon as the last
    ones are off the factor in force by more than the tolerance and by more than their noise allows (`changed_at`),
    their median replaces it, and those of before are forgotten; smaller differences are left alone, so that noise moves
    nothing.

    factors_G: in force, up to what all ranks share: it goes on with every change of one and says nothing
    (`relative_G`). step_us: how long a step takes, roughly. silent_G: steps for which a rank has said nothing.
    recent_NG: `log_ratios` of the last steps, those of each rank since its last change.
    """

    def __init__(self, policy: Policy, num_ranks: int) -> None:
        self.policy = policy
        self.factors_G = np.ones(num_ranks)
        self.silent_G = np.zeros(num_ranks, np.int64)
        self.step_us = np.inf  # median of the last latencies
        self.recent_NG = np.zeros((0, num_ranks))
        self.told_G = np.zeros(num_ranks, np.int64)

    @property
    def relative_G(self) -> FloatArray:
        """[G] factors in force, 1 = as profiled: half of the ranks take that or less, and half that or more."""
        ordered = np.sort(self.factors_G)
        shared = np.clip(1.0, ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2])
        return np.asarray(self.factors_G / shared)

    @property
    def failed_G(self) -> NDArray[np.bool_]:
        """[G] ranks that have said nothing for too long."""
        return np.asarray(self.silent_G >= self.policy.dead_after_steps)

    def take(self, latencies_NG: FloatArray, log_NG: FloatArray) -> tuple[list[str], bool]:
        """(what is worth saying, whether factors changed). log_NG: `log_ratios` of steps under a known placement."""
        failed_G = self.failed_G
        self.listen(latencies_NG)
        news = [f"rank {g} reports again" for g in np.flatnonzero(failed_G & ~self.failed_G)]
        news += [
            f"rank {g} has failed (no latencies for {counted(self.silent_G[g], 'step')})"
            for g in np.flatnonzero(self.failed_G & ~failed_G)
        ]
        changed = self.learn(log_NG)
        return [*news, *(f"rank {g} takes {self.relative_G[g]:.3f} times its profile" for g in changed)], bool(changed)

    def listen(self, latencies_NG: FloatArray) -> None:
        """Count the steps for which each rank has been silent; a step in which all are says nothing."""
        heard_NG = np.isfinite(latencies_NG) & (latencies_NG > 0)
        for heard_G in heard_NG[heard_NG.any(axis=1)]:
            self.silent_G = np.where(heard_G, 0, self.silent_G + 1)
        if heard_NG.any():
            self.step_us = float(np.median(latencies_NG[heard_NG]))

    def learn(self, log_NG: FloatArray) -> list[int]:
        """Take `log_ratios` of steps into account; the ranks whose factor changed."""
        if not len(log_NG):
            return []
        self.recent_NG = np.concatenate([self.recent_NG, log_NG])[-WINDOW:]
        off_NG = self.levels(self.recent_NG) - np.log(self.factors_G)
        tolerated = float(np.log1p(self.policy.speed_tolerance))
        found = [(rank, changed_at(off_N, tolerated)) for rank, off_N in enumerate(off_NG.T)]
        changed = {rank: first for rank, first in found if first is not None}
        doubled_G = (self.told_G > 0) & (np.isfinite(off_NG).sum(axis=0) >= 2 * self.told_G)
        since = dict.fromkeys(np.flatnonzero(doubled_G).tolist(), 0) | changed
        for _ in range(2 if since else 0):  # again, since what all ranks share goes with the factors in force
            levels_NG = self.levels(self.recent_NG)
            self.factors_G = self.factors_G.copy()
            for rank, first in since.items():
                self.factors_G[rank] = np.exp(np.nanmedian(levels_NG[first:, rank]))
        for rank, first in since.items():
            self.recent_NG[:first, rank] = np.nan  # of another level
            self.told_G[rank] = np.isfinite(self.recent_NG[:, rank]).sum()
        return list(changed)

    def levels(self, log_NG: FloatArray) -> FloatArray:
        """[N, G] `log_ratios` less what all ranks share: how far the median rank is from its factor in force.

        Without the factors a rank that is known to be slow would shift the median, and with it the levels of all.
        """
        return np.asarray(log_NG - _medians(log_NG - np.log(self.factors_G))[:, None])


def changed_at(off_N: FloatArray, tolerated: float) -> int | None:
    """The first of N steps since which a rank is off its factor, by logarithms (NaN: nothing known); None: it is not.

    A generalised likelihood ratio test within a window (Willsky and Jones, A generalized likelihood ratio approach to
    the detection and estimation of jumps in linear systems, IEEE Trans. Automatic Control 21, 1976; Lai, Sequential
    changepoint detection in quality control and dynamical systems, J. Royal Stat. Soc. B 57, 1995): for all numbers of
    last steps, from FEWEST on, whether their median is off by more than is tolerated and by CERTAIN standard errors;
    of those that are, the one that deviations from the factor before and from the median since make likeliest. With
    independent noise, normal or with heavy tails, asked every 8 steps: 8 false alarms in 2.6 million steps of a rank.
    That is from a factor that is right; what an alarm leaves is off by its noise, and is sooner off again.
    """
    known = np.flatnonzero(np.isfinite(off_N))
    if len(known) < FEWEST:
        return None
    values, lengths = off_N[known], np.arange(FEWEST, len(known) + 1)
    medians = first_medians(values[::-1])[FEWEST - 1 :]
    apart = max(np.abs(np.diff(each)).sum() / max(len(each) - 1, 1) for each in (values, _telling(values)))
    noise = 0.5 * np.sqrt(np.pi) * apart  # a jump among the values hardly adds to it
    least = np.maximum(tolerated, CERTAIN * 1.2533 * noise / np.sqrt(lengths))
    told = np.flatnonzero(np.abs(medians) > least)
    if not len(told):
        return None
    sizes = np.abs(values)
    likely = [
        sizes[-n:].sum() - np.abs(values[-n:] - median).sum()
        for n, median in zip(lengths[told].tolist(), medians[told].tolist(), strict=True)
    ]
    best = int(told[int(np.argmax(likely))])
    last = int(lengths[best])
    return int(known[-last]) if abs(medians[best]) > CERTAIN * error_since(values, last) else None


def error_since(values: FloatArray, last: int) -> float:
    """Standard error of the median of so many last values, which may be of another level than those before.

    Neighbours that are alike tell less than others: noise is taken for autoregressive.
    """
    parts = (values[:-last], values[-last:])
    return max(_error(parts, last), _error([_telling(part) for part in parts], last))


def _error(parts: Sequence[FloatArray], last: int) -> float:
    """Of so many values, as the deviations of all parts from their medians tell."""
    if not any(map(len, parts)):
        return 0.0
    apart = np.concatenate([part - _median(part) for part in parts if len(part)])
    bound = 3 * np.abs(apart).mean()
    apart = np.clip(apart, -bound, bound)
    alike = float(np.clip((apart[1:] * apart[:-1]).sum() / max((apart**2).sum(), 1e-12), 0.0, 0.9))
    return 1.2533**2 * float(np.abs(apart).mean() * np.sqrt((1 + alike) / (1 - alike) / last))


def _telling(values: FloatArray) -> FloatArray:
    """Those that say how large noise is: the median rank of an odd number is where all are, whatever its noise.

    With three ranks that is every third step, and noise taken from them all gave seven times as many false alarms.
    Rounded latencies are where all are, too, and those left may all be alike: noise is what the larger of both says.
    """
    return values[np.abs(values) > RESOLUTION]


def log_ratios(measured_NG: FloatArray, predicted_NG: FloatArray) -> FloatArray:
    """[N, G] logarithms of measured over predicted time, of the steps that tell; NaN where a rank said nothing.

    A step tells where more than half of the ranks that said anything did: the median of two would halve what sets one
    apart.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        log_NG = np.log(measured_NG) - np.log(predicted_NG)
    log_NG = np.where(np.isfinite(log_NG), log_NG, np.nan)
    heard_NG = np.isfinite(log_NG)
    return np.asarray(log_NG[heard_NG.sum(axis=1) > max(1.0, 0.5 * heard_NG.any(axis=0).sum())])


def _medians(values_NG: FloatArray) -> FloatArray:
    """[N] medians of the numbers of each row."""
    sorted_NG, at = np.sort(values_NG, axis=1), np.arange(len(values_NG))  # NaN comes last
    known_N = np.isfinite(values_NG).sum(axis=1)
    return np.asarray(0.5 * (sorted_NG[at, (known_N - 1) // 2] + sorted_NG[at, known_N // 2]))


def level_and_error(values: FloatArray) -> tuple[float, float]:
    """The median, and its standard error."""
    level = _median(values)
    return level, 1.2533 * 1.4826 * _median(np.abs(values - level)) / float(np.sqrt(len(values)))


def _median(values: FloatArray) -> float:
    """As `np.median`, which takes five times as long for a few numbers."""
    ordered = np.sort(values)
    return 0.5 * float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2])


def first_medians(values: FloatArray) -> FloatArray:
    """[N] medians of the first 1, 2, ..., N values."""
    at = np.arange(len(values))
    sorted_NN = np.sort(np.where(at <= at[:, None], values, np.inf), axis=1)
    return np.asarray(0.5 * (sorted_NN[at, at // 2] + sorted_NN[at, (at + 1) // 2]))

"""What moves gained on measured latencies, of what they promised: while they do not pay, they rest.

Where costs are wrong (of another device, of another shape, latencies that contain the wait for others), the factor of a
rank depends on the experts that it holds: every change of the placement calls for the next one, and none gains. So each
change is looked at on steps that follow it, under the placement before it with every rank as fast as it was measured
then, and under the one after it with every rank as fast as it is measured now. Where costs are right, factors stay as
they are, and what was promised is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import FloatArray
from gemopt.online.decision import Weights, static_weights
from gemopt.online.speeds import FEWEST, level_and_error
from gemopt.placement import Placement, Split

Times = Callable[[NDArray[np.int64], Weights], FloatArray]

WINDOW = 32  # last steps that a change is judged by, before it and since
ENOUGH = 16  # steps after a change from which on it is looked at
PRIOR = 2.0  # changes that count as having kept what they promised before any was seen
FADING = 0.03  # of earlier experience, is forgotten for a change that is known to the last bit
MEMORY_STEPS = 16384.0  # time constant with which experience fades, so that what rests is tried again
LEAST = 1e-3
SOUND = 0.9  # share from which on nothing is said
BLIND = 2  # changes that may follow one another before it is known what they kept
PATIENCE = 64  # steps after which nothing is waited for any more


class Realised:
    """Measured factors of the ranks before and since the last change, and what earlier changes kept.

    pair, pair_weights: [2, L, P] placement before the last change and since, and its static weights (else 0).
    before_NG, since_NG: logarithms of the ranks' factors in the last steps under each; `before_NG` is empty once the
    change has been looked at. blind: changes since it was last known what they kept; waited: steps since the last one.
    seen, kept: fading sums over the changes, by how well each is known: 1, and the share of its promise that it kept.
    """

    def __init__(self, placement: Placement) -> None:
        self.seen = self.kept = 0.0
        self.waited = 0
        self.forget(placement)

    @property
    def share(self) -> float:
        """How much of what moves promise is to be expected, above 0 and at most 1."""
        return float(np.clip((PRIOR + self.kept) / (PRIOR + self.seen), LEAST, 1.0))

    @property
    def doubt(self) -> str:
        """In words, where less is to be expected than moves promise."""
        share = self.share
        return f"measured latencies bore out {100 * share:.0f} % of what moves promised" if share < SOUND else ""

    @property
    def waits(self) -> bool:
        """Whether nothing should move yet: until it is known what changes kept, and the longer the less it was."""
        share = self.share
        if share < SOUND and self.waited < ENOUGH / share:
            return True
        return self.blind >= BLIND and self.waited < PATIENCE

    def forget(self, placement: Placement) -> None:
        """Begin anew from a placement: another group, or other traffic, tells nothing of the last change."""
        self.pair, self.pair_weights = (np.stack([each, each]) for each in _rows_and_weights(placement))
        self.before_NG = self.since_NG = np.zeros((0, placement.num_ranks))
        self.blind = 0

    def take(self, placement: Placement, log_NG: FloatArray, steps: int, times: Times) -> None:
        """See steps under a placement.

        log_NG: of those of the last `steps` during which nothing travelled, see `Speeds`. times: [L, N, G] microseconds
        of the ranks as profiled, on the last steps, under any rows [L, P] and static weights of the layers.
        """
        self._fade(steps)
        rows, weights = _rows_and_weights(placement)
        if self._differ(rows, weights):
            known = len(self.since_NG) >= FEWEST  # else what came last says nothing, and the one before stays
            if known:
                self._look(times, placement.split is Split.STATIC)
                self.before_NG = self.since_NG
            at = int(known)
            self.pair, self.pair_weights = np.stack([self.pair[at], rows]), np.stack([self.pair_weights[at], weights])
            self.since_NG = log_NG[:0]
            self.blind, self.waited = self.blind + 1, 0
        self.waited += steps
        self.since_NG = np.concatenate([self.since_NG, log_NG])[-WINDOW:]
        if len(self.since_NG) >= ENOUGH:
            self._look(times, placement.split is Split.STATIC)

    def pass_over(self, placement: Placement, steps: int) -> None:
        """See steps without latencies: experience fades, and what rests is tried again, all the same."""
        self._fade(steps)
        self.waited = steps + (0 if self._differ(*_rows_and_weights(placement)) else self.waited)
        self.forget(placement)

    def _fade(self, steps: int) -> None:
        fade = np.exp(-steps / MEMORY_STEPS)
        self.seen, self.kept = float(fade * self.seen), float(fade * self.kept)

    def _differ(self, rows: NDArray[np.int64], weights: FloatArray) -> bool:
        return bool((rows != self.pair[1]).any() or (weights != self.pair_weights[1]).any())

    def _look(self, times: Times, static: bool) -> None:
        """Compare what the last change kept with what it promised, once."""
        self.blind = 0
        if not len(self.before_NG):
            return
        (then_G, error_then), (now_G, error_now) = map(_factors, (self.before_NG, self.since_NG))
        self.before_NG = self.before_NG[:0]
        known_G = np.isfinite(then_G) & np.isfinite(now_G)
        then_G, now_G = (np.where(known_G, each, 1.0) for each in (then_G, now_G))
        weights = self.pair_weights if static else [[None] * len(rows) for rows in self.pair]
        before, since = (times(rows, list(each)) for rows, each in zip(self.pair, weights, strict=True))
        base_us, hoped_us, found_us = _makespan(before * then_G), _makespan(since * then_G), _makespan(since * now_G)
        if hoped_us >= base_us:
            return  # on these steps nothing was to be gained
        promised, kept = 1 - hoped_us / base_us, 1 - found_us / base_us
        error = np.hypot(error_then, error_now)
        weight = promised**2 / (promised**2 + error**2)
        fade = 1 - FADING * weight
        self.seen = fade * self.seen + weight
        self.kept = fade * self.kept + weight * float(np.clip(kept / promised, -1.0, 1.0))


def _rows_and_weights(placement: Placement) -> tuple[NDArray[np.int64], FloatArray]:
    rows = placement.physical_to_logical
    weights = [np.zeros(rows.shape[1]) if each is None else each for each in static_weights(placement)]
    return rows, np.array(weights)


def _factors(log_NG: FloatArray) -> tuple[FloatArray, float]:
    """([G] factors, NaN where a rank said nothing; standard error of a logarithm, in quadratic mean)."""
    levels_G, errors = np.full(log_NG.shape[1], np.nan), []
    for rank, values in enumerate(log_NG.T):
        known = values[np.isfinite(values)]
        if len(known):
            levels_G[rank], error = level_and_error(known)
            errors.append(error)
    return np.exp(levels_G), float(np.sqrt(np.mean(np.square(errors or [0.0]))))


def _makespan(times_LNG: FloatArray) -> float:
    return float(times_LNG.max(axis=2).sum())

"""All contents that ranks can have, priced step by step with their latencies: a bound where they are too many to list.

It is that of `column_space` with one level, the floors of the steps: for multipliers `mu_ti >= 0` with
`sum_i mu_ti <= w_t` and any prices pi of experts no placement without copies is below

    sum_t w_t floor_t  +  sum_i pi_i  +  sum_k count_k min_C ( cost_k(C) - sum_{i in C} pi_i )
    cost_k(C) = sum_t (sum_{i in C} mu_ti) max(0, f_k(C, t) - floor_t)

where C runs over all sets of S_k experts. Kinds of ranks whose latencies are multiples of one another are priced
together. Few contents are all looked at between iterations; many as seldom as the bound needs it, and in between the
cheapest ones are improved by exchanges of experts, which finds nearly the cheapest of all in a hundredth of the time
(`step_kernels`).
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from gemopt.bounds.together import TOLERANCE, worthwhile
from gemopt.latency import FloatArray, IntArray
from gemopt.problem import Problem
from gemopt.solvers.base import Row
from gemopt.solvers.exact.column_master import Master
from gemopt.solvers.exact.column_space import ULP, Proven, feasible
from gemopt.solvers.exact.contents import RISING
from gemopt.solvers.exact.step_kernels import WIDTH, exchange, scan
from gemopt.solvers.exact.step_space import Stepwise

ULP32 = 2.0**-24
ITERATIONS = 25  # of the master between two rounds of exchanges
HELD = 200  # cheapest contents of all kinds in the master, beside those in use
STARTS = 40  # contents that are improved by exchanges, of all kinds
FEW = 50_000  # contents, which are all looked at every time: exchanges of experts would take as long
SOON, FEWEST = 1000, 3000  # iterations before it may stop, and without having risen above the floors
LEAST_GAIN = 0.02  # of what is open, in the last half of the iterations
SLOW = 0.1  # of what is open, in the last quarter of the iterations: time for the first look at all contents
CUT = 0.6  # of what its contents would take to the last step is what a look takes
TRIED = 5  # rounds of exchanges until it is known how long a look takes
LAST = 1.5  # times what a look takes must be left for another one after it


class Pricing:
    """The cheapest contents known with some multipliers, which are made feasible, and prices; microseconds."""

    def __init__(self, space: Stepwise, mu_ET: FloatArray, pi_E: FloatArray) -> None:
        self.space, (self.mu_ET, self.pi_E) = space, feasible(mu_ET, pi_E, space.problem.weights_T)
        self.families = [kin.family(self.mu_ET, self.pi_E) for kin in space.families]
        self.best = [kin.none(HELD // len(space.size_K) + 1) for kin in space.families]

    def improve(self, ids: IntArray, stop: NDArray[np.uint8]) -> int:
        """Improve some contents by exchanges; how many were looked at."""
        members, kind_N, looks = self.space.members(ids), self.space.kind(ids), 0
        for kin, (family, _), best in zip(self.space.families, self.families, self.best, strict=True):
            mine = np.flatnonzero(np.isin(kind_N, kin.kinds))
            looks += exchange(family, members[mine, : kin.size], np.searchsorted(kin.kinds, kind_N[mine]), best, stop)
        return looks

    def look(self, stop: NDArray[np.uint8]) -> bool:
        """Look at all contents; False when stopped."""
        return all(scan(family, best, stop) for (family, _), best in zip(self.families, self.best, strict=True))

    @property
    def ids(self) -> IntArray:
        """Numbers of the cheapest contents."""
        return np.concatenate([
            self.space.ids(k, best.sets[i][np.isfinite(best.net[i])])
            for kin, best in zip(self.space.families, self.best, strict=True)
            for i, k in enumerate(kin.kinds)
        ])  # fmt: skip

    @property
    def bound_us(self) -> float:
        """No placement is below once all contents have been looked at; before, about that."""
        space, weights_T = self.space, self.space.problem.weights_T
        paid = float(np.abs(self.pi_E).sum())
        value, error = float(weights_T @ space.floor_T) + float(self.pi_E.sum()), 0.0
        size = float(weights_T @ np.abs(space.floor_T)) + paid
        for kin, (_, family_size), best in zip(space.families, self.families, self.best, strict=True):
            for k, net in zip(kin.kinds, best.net.min(axis=1), strict=True):
                least = float(net) * kin.unit
                value += int(space.count_K[k]) * least
                error += int(space.count_K[k]) * ULP32 * (WIDTH + kin.size + 8) * (abs(least) + paid)
                size += int(space.count_K[k]) * (family_size + abs(least) + paid)
        return value - error - ULP * (len(weights_T) + 4 * space.num_experts + 64) * size


class StepwiseSearch:
    """A bound of all contents of ranks with their latencies, that rises while `run` does.

    `problem` is `paired`, `floor_T` and `target_us` as of `together_bound`. row: a placement, the better the sooner it
    rises. deadline: by `time.monotonic`, so that the last look ends before. found: what is proven. ended: nothing more
    is to be gained, or another look at all contents would take too long. look_s: seconds that one takes, or about that.
    """

    def __init__(
        self, problem: Problem, floor_T: FloatArray, target_us: float, row: Row, deadline: float = np.inf
    ) -> None:
        self.row, self.deadline = row, deadline
        self.base = float(problem.weights_T @ floor_T)
        self.target_us = target_us if np.isfinite(target_us) else 1.1 * self.base
        self.found: Proven | None = None
        self.look_s = self.waited_s = 0.0
        self.guesses, self.looks = [(0, self.base)], [(0, self.base)]
        self.space = Stepwise.of(problem, floor_T) if worthwhile(problem, self.base) else None
        self.ended = self.space is None
        self.few = self.space is not None and len(self.space) <= FEW
        if self.space is not None:
            self.master = Master(self.space, self.target_us)

    @property
    def bound_us(self) -> float:
        """What is proven in microseconds: that of the floors at least."""
        return self.base - TOLERANCE * abs(self.base) if self.found is None else self.found.bound_us

    @property
    def risen(self) -> bool:
        """Whether anything is proven above the floors, and what it gains tells what it will."""
        return self.found is not None and self.looks[-1][0] >= RISING

    def hurries(self, seconds: float) -> bool:
        """Whether so many seconds later would be too late for the last look."""
        tried = self.few or len(self.guesses) > TRIED
        return tried and LAST * self.look_s > self.deadline - time.monotonic() - seconds

    def run(self, stop: NDArray[np.uint8], seconds: float = np.inf) -> Proven | None:
        """Go on for so many seconds, or until stopped or ended."""
        begin = time.monotonic()
        while not (stop[0] or self.ended):
            assert self.space is not None
            now = time.monotonic()
            last = self.hurries(0.0)
            if last and self.look_s > self.deadline - now:
                self.ended = True
                break
            if now - begin >= seconds and not last:
                break
            pricing = self._price(stop)
            self.waited_s += time.monotonic() - now
            if (last or self._due()) and not self._look(pricing, stop):
                break
            self.ended |= last
            self.master.hold(np.concatenate([self.space.held(self.row), self.master.used, pricing.ids]))
        return self.found

    def _price(self, stop: NDArray[np.uint8]) -> Pricing:
        """Multipliers after some iterations, and contents that are cheap with them, unless all are looked at anyway."""
        assert self.space is not None
        self.master.iterate(ITERATIONS, stop)
        mu, pi_E = self.master.multipliers()
        pricing, now = Pricing(self.space, mu[0], pi_E), time.monotonic()
        if self.few:
            return pricing
        looks = pricing.improve(self._starts(), stop)
        if len(self.looks) == 1:
            self.look_s = min(self.look_s or np.inf, CUT * len(self.space) * (time.monotonic() - now) / max(looks, 1))
        self.guesses.append((self.master.iterations, pricing.bound_us))
        return pricing

    def _starts(self) -> IntArray:
        """The cheapest contents of each kind in the master; those of the placement before there are any."""
        assert self.space is not None
        if not len(self.master.ids):
            return self.space.held(self.row)
        kinds, wanted = range(len(self.space.size_K)), STARTS // len(self.space.size_K) + 1
        order = np.argsort(self.master.net())
        kind_N = self.master.columns.kind[order]
        return np.concatenate([self.master.ids[order[kind_N == k][:wanted]] for k in kinds])

    def _due(self) -> bool:
        """Whether it is time to look at all contents: as long after the last time as it took, or once little rises."""
        if self.few or len(self.looks) > 1:
            return self.few or self.waited_s >= self.look_s
        return self._gained(self.guesses, 0.75) <= SLOW * (self.target_us - self.guesses[-1][1])

    def _look(self, pricing: Pricing, stop: NDArray[np.uint8]) -> bool:
        """The bound of the multipliers now; False when stopped."""
        assert self.space is not None
        now = time.monotonic()
        if not pricing.look(stop):
            return False
        self.look_s, self.waited_s, bound_us = time.monotonic() - now, 0.0, pricing.bound_us
        if bound_us > self.bound_us:
            self.found = Proven(bound_us, self.space.floor_T[None], pricing.mu_ET[None], pricing.pi_E, np.zeros(0))
        self.looks.append((self.master.iterations, self.bound_us))
        stalled = self._gained(self.looks, 0.5) <= LEAST_GAIN * (self.target_us - self.bound_us)
        self.ended = self.bound_us >= self.target_us * (1 - TOLERANCE) or stalled
        return True

    def _gained(self, looks: list[tuple[int, float]], part: float) -> float:
        """What the bound rose by since this part of the iterations; infinite before it has risen: that takes long."""
        now, bound_us = looks[-1]
        before_us = [value for count, value in looks if count <= part * now][-1]
        risen = before_us - self.base > LEAST_GAIN * (self.target_us - self.base) or now >= FEWEST
        return bound_us - before_us if risen and now >= SOON else np.inf

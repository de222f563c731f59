"""All contents that ranks can have, priced step by step with their latencies: a bound where they are too many to list.

It is that of `column_space` with one level, the floors of the steps: for multipliers `mu_ti >= 0` with
`sum_i mu_ti <= w_t` and any prices pi of experts no placement without copies is below

    sum_t w_t floor_t  +  sum_i pi_i  +  sum_k count_k min_C ( cost_k(C) - sum_{i in C} pi_i )
    cost_k(C) = sum_t (sum_{i in C} mu_ti) max(0, f_k(C, t) - floor_t)

where C runs over all sets of S_k experts. Kinds of ranks whose latencies are multiples of one another are priced
together. All contents are looked at as seldom as the bound needs it; in between, the cheapest ones are improved by
exchanges of experts, which finds nearly the cheapest of all in a hundredth of the time (`step_kernels`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import comb
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gemopt.bounds.together import TOLERANCE, worthwhile
from gemopt.latency import FloatArray
from gemopt.problem import Problem
from gemopt.solvers.base import Row
from gemopt.solvers.exact.column_kernels import cut_rows
from gemopt.solvers.exact.column_master import Master
from gemopt.solvers.exact.column_space import ULP, Proven
from gemopt.solvers.exact.numbered import IntArray, Numbered
from gemopt.solvers.exact.step_kernels import WIDTH, Best, Family, exchange, scan
from gemopt.solvers.exact.tree import TABLE_LIMIT

ALIKE = 1e-9  # latencies this close, relatively, are multiples of one another
LEAST_US = 1e-30  # times this small are nothing
ULP32 = 2.0**-24
TINY = 1e-20  # smaller multipliers count as none, since their products are slow to compute
ITERATIONS = 40  # of the master between two rounds of exchanges
HELD = 400  # cheapest contents of all kinds in the master, beside those in use
STARTS = 40  # contents that are improved by exchanges, of all kinds
FEWEST = 3000  # iterations before it may stop without having risen above the floors
LEAST_GAIN = 0.02  # of what is open, in the last half of the iterations
SLOW = 0.1  # of what is open, in the last quarter of the iterations: time for the first look at all contents
CUT = 0.6  # of what its contents would take to the last step is what a look takes
TRIED = 5  # rounds of exchanges until it is known how long a look takes
LAST = 1.5  # times what a look takes must be left for another one after it


@dataclass(frozen=True, eq=False)
class Kin:
    """Kinds whose latencies are multiples of that of the first, or above: what does not depend on multipliers.

    kinds: [k]; factor_K of each, of the first one's latency `table_N`, in units of `unit` microseconds. line_T,
    slope_T: a line for each step, nowhere above that. Steps, the last axis, are filled up to whole blocks.
    """

    kinds: IntArray
    size: int
    unit: float
    table_N: FloatArray
    factor_K: FloatArray
    loads_ET: NDArray[np.int32]
    floor_T: FloatArray
    line_T: FloatArray
    slope_T: FloatArray

    @classmethod
    def of(
        cls, problem: Problem, floor_T: FloatArray, g: int, table_N: FloatArray, kinds: IntArray, factor_K: FloatArray
    ) -> Kin:
        """Of the kinds that rank g, which takes `table_N` microseconds, is the first of."""
        loads_TE, size = problem.features_FTE[0], int(problem.slots_per_rank[g])
        filled = -len(loads_TE) % WIDTH
        planes_P2 = problem.latencies[g].planes()
        rows_PN = planes_P2[:, :1] + planes_P2[:, 1:] * np.arange(len(table_N))
        planes_P2[:, 0] += np.minimum(0.0, (table_N - rows_PN).min(axis=1))
        loads_ET = np.pad(np.ascontiguousarray(loads_TE.T, np.int32), [(0, 0), (0, filled)])
        mean_T = loads_ET.sum(axis=0) * (size / len(loads_ET))
        line_2T = planes_P2[(planes_P2[:, :1] + planes_P2[:, 1:] * mean_T).argmax(axis=0)].T
        unit = float(np.abs(table_N).max())
        return cls(
            kinds, size, unit, table_N / unit, factor_K, loads_ET, np.pad(floor_T, (0, filled)) / unit,
            line_2T[0] / unit, line_2T[1] / unit,
        )  # fmt: skip

    def family(self, mu_ET: FloatArray, pi_E: FloatArray) -> tuple[Family, float]:
        """(what contents cost, the size of all that went into it) with multipliers, and prices in microseconds."""
        mu_ET = np.pad(mu_ET, [(0, 0), (0, len(self.line_T) - mu_ET.shape[1])])
        blocks = (-1, len(self.line_T) // WIDTH, WIDTH)
        rise_ET = self.loads_ET * self.slope_T
        product_BEE = mu_ET.reshape(blocks).transpose(1, 0, 2) @ rise_ET.reshape(blocks).transpose(1, 2, 0)
        alone_EB = (mu_ET * (self.line_T + rise_ET)).reshape(blocks).sum(axis=2)
        pair_EEB = (product_BEE + product_BEE.transpose(0, 2, 1)).transpose(1, 2, 0)
        flat_EB = (mu_ET * self.floor_T).reshape(blocks).sum(axis=2)
        factor = float(self.factor_K.max())
        sizes = (mu_ET @ np.abs(self.line_T)).sum(), 2 * np.abs(product_BEE).sum(), np.abs(flat_EB).sum() / factor
        mass_ET = np.where(mu_ET > TINY, _lower(mu_ET), np.float32(0))
        floor_KT = -_lower(-self.floor_T / self.factor_K[:, None])
        family = Family(
            loads=self.loads_ET.reshape(blocks), mass=mass_ET.reshape(blocks), table=_lower(self.table_N),
            factor=self.factor_K, floor=floor_KT.reshape(blocks), price=pi_E / self.unit,
            alone=_rest(alone_EB), pair=_rest(pair_EEB), flat=_rest(flat_EB),
        )  # fmt: skip
        return family, factor * float(sum(sizes)) * self.unit

    def none(self, wanted: int) -> Best:
        """No content of any kind yet."""
        shape = len(self.kinds), min(wanted, comb(len(self.loads_ET), self.size))
        sets = np.zeros((*shape, self.size), np.uint8)
        return Best(np.full(shape, np.inf), sets, np.full(shape, -1), np.zeros(shape[0], np.int64))


def _lower(values: FloatArray) -> NDArray[np.float32]:
    """float32 that is not above."""
    return np.nextafter(values.astype(np.float32), np.float32(-np.inf))


def _rest(values: FloatArray) -> FloatArray:
    """Sums from each block to the last one."""
    return np.ascontiguousarray(np.cumsum(values[..., ::-1], axis=-1)[..., ::-1])


@dataclass(frozen=True, eq=False)
class Stepwise(Numbered):
    """Contents of ranks of a problem with one feature and without spare slots; see `Master` and `of`.

    groups, table_KN: of each kind of ranks that have slots, which they are, and microseconds under every load.
    """

    problem: Problem
    floor_T: FloatArray
    groups: list[list[int]]
    table_KN: FloatArray
    families: list[Kin]

    planes: ClassVar[int] = 1

    @classmethod
    def of(cls, problem: Problem, floor_T: FloatArray) -> Stepwise | None:
        """The contents of a problem that is `paired`; None where they cannot be priced in float32 from a table.

        That is with several features, loads too large for a table, or ranks that take nothing beside the floors.
        """
        groups = [group for group in problem.equal_ranks if problem.slots_per_rank[group[0]]]
        most = int(problem.features_FTE[0].sum(axis=1).max())
        if len(problem.features) > 1 or most >= TABLE_LIMIT // len(groups):
            return None
        ranks = [group[0] for group in groups]
        idle = [float(problem.latencies[g]([0])) for g in np.flatnonzero(problem.slots_per_rank == 0)]
        floor_T = np.maximum(floor_T, max(idle, default=-np.inf))
        table_KN = np.array([problem.latencies[g]([np.arange(most + 1)]) for g in ranks])
        if not (table_KN.max(axis=1) > ALIKE * max(float(floor_T.max()), LEAST_US)).all():
            return None
        size_K = problem.slots_per_rank[ranks]
        families = [
            Kin.of(problem, floor_T, ranks[kinds[0]], table_KN[kinds[0]], kinds, factor_K)
            for kinds, factor_K in _kin(table_KN, size_K)
        ]
        return cls(problem.num_experts, size_K, problem, floor_T, groups, table_KN, families)

    @cached_property
    def count_K(self) -> IntArray:
        """Ranks of each kind."""
        return np.array([len(group) for group in self.groups])

    def held(self, row: Row) -> IntArray:
        """Numbers of the contents of a placement [P]."""
        owner_P = self.problem.rank_of_slot
        sets = ((k, row[owner_P == g][None]) for k, group in enumerate(self.groups) for g in group)
        return np.concatenate([self.ids(k, set_1S) for k, set_1S in sets])

    def __len__(self) -> int:
        """Contents that a look goes through: those of a family once."""
        return sum(comb(self.num_experts, kin.size) for kin in self.families)

    def parts(self, ids: IntArray, ends_LT: FloatArray, scale: float) -> NDArray[np.float32]:
        """[n, T] `scale` times what the latencies of some contents have above the floors."""
        rows_NT, members, kind_N = np.empty((len(ids), self.problem.num_steps)), self.members(ids), self.kind(ids)
        for k, table_N in enumerate(self.table_KN):
            mine = np.flatnonzero(kind_N == k)
            loads_TN = self.problem.features_FTE[0][:, members[mine, : self.size_K[k]]].sum(axis=2)
            rows_NT[mine] = table_N[loads_TN].T
        out = np.empty(rows_NT.shape, np.float32)
        cut_rows(rows_NT * scale, ends_LT * scale, out)
        return out


def _kin(table_KN: FloatArray, size_K: IntArray) -> Iterator[tuple[IntArray, FloatArray]]:
    """(kinds, factors) of ranks with equally many slots whose latencies are multiples of those of the first one."""
    left = list(range(len(table_KN)))
    while left:
        first, mine, factors = left[0], [left[0]], [1.0]
        for k in left[1:]:
            if size_K[k] == size_K[first] and table_KN[[first, k]].min() > 0:
                ratio_N = table_KN[k] / table_KN[first]
                if ratio_N.max() <= ratio_N.min() * (1 + ALIKE):
                    mine.append(k)
                    factors.append(float(ratio_N.min()) * (1 - 4 * ULP))
        left = [k for k in left if k not in mine]
        yield np.array(mine), np.array(factors)


class Pricing:
    """The cheapest contents known with some multipliers, which are made feasible, and prices; microseconds."""

    def __init__(self, space: Stepwise, mu_ET: FloatArray, pi_E: FloatArray) -> None:
        weights_T = space.problem.weights_T
        mu_ET = np.maximum(np.nan_to_num(mu_ET, nan=0.0, posinf=0.0), 0.0)
        mu_ET *= np.minimum(1.0, weights_T * (1 - 1e-12) / np.maximum(mu_ET.sum(axis=0), 1e-300))
        self.space, self.mu_ET = space, mu_ET
        self.pi_E = np.nan_to_num(pi_E, nan=0.0, posinf=0.0, neginf=0.0)
        self.families = [kin.family(mu_ET, self.pi_E) for kin in space.families]
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
        if self.space is not None:
            self.master = Master(self.space, self.target_us)

    @property
    def bound_us(self) -> float:
        """What is proven in microseconds: that of the floors at least."""
        return self.base - TOLERANCE * abs(self.base) if self.found is None else self.found.bound_us

    @property
    def risen(self) -> bool:
        """Whether anything is proven above the floors."""
        return self.found is not None

    def hurries(self, seconds: float) -> bool:
        """Whether so many seconds later would be too late for the last look."""
        tried = len(self.guesses) > TRIED
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
        """Multipliers after some iterations, and contents that are cheap with them."""
        assert self.space is not None
        self.master.iterate(ITERATIONS if len(self.master.ids) else 0, stop)
        mu, pi_E = self.master.multipliers()
        pricing, now = Pricing(self.space, mu[0], pi_E), time.monotonic()
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
        kind_N = self.master.kind[order]
        return np.concatenate([self.master.ids[order[kind_N == k][:wanted]] for k in kinds])

    def _due(self) -> bool:
        """Whether it is time to look at all contents: as long after the last time as it took, or once little rises."""
        if len(self.looks) > 1:
            return self.waited_s >= self.look_s
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
        return bound_us - before_us if risen else np.inf

"""All contents of ranks by number, and what they cost step by step: what `stepwise` searches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import comb
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import FloatArray, IntArray
from gemopt.problem import Problem
from gemopt.solvers.base import Row
from gemopt.solvers.exact.column_kernels import in_levels
from gemopt.solvers.exact.column_space import ULP
from gemopt.solvers.exact.numbered import Numbered
from gemopt.solvers.exact.step_kernels import WIDTH, Best, Family
from gemopt.solvers.exact.tree import TABLE_LIMIT, with_idle

ALIKE = 1e-9  # latencies this close, relatively, are multiples of one another
LEAST_US = 1e-30  # times this small are nothing
TINY = 1e-20  # smaller multipliers count as none, since their products are slow to compute


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
        groups = problem.kinds
        most = int(problem.features_FTE[0].sum(axis=1).max())
        if len(problem.features) > 1 or most >= TABLE_LIMIT // len(groups):
            return None
        ranks = [group[0] for group in groups]
        floor_T = with_idle(problem, floor_T)
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
        return in_levels(rows_NT, ends_LT, scale)


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

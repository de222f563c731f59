"""The optimal split of any steps over one layer's copies, as `evaluate` and the executor both use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import UnsupportedError
from gemopt.latency import ASSIGNMENTS, Feature, FloatArray, Latency, pack
from gemopt.placement import EMPTY
from gemopt.splits.flow import find_copies, fluid_times, spread_steps
from gemopt.splits.levels import no_levels
from gemopt.splits.parts import part_steps

TABLE_LIMIT = 1 << 22


class OptimalSplit:
    """Splits steps over the copies of a placement row [P] on ranks with these latencies.

    Deterministic: the same counts are split alike wherever that is asked.
    """

    def __init__(
        self,
        row_P: NDArray[np.int64],
        rank_of_slot: NDArray[np.int64],
        num_experts: int,
        features: Sequence[Feature],
        latencies: Sequence[Latency],
    ) -> None:
        num_ranks = len(latencies)
        self.copies = find_copies(row_P, rank_of_slot, num_experts, num_ranks)
        self.features = tuple(features)
        self.curves = pack([latency.high for latency in latencies])
        self.home_EG = np.zeros((num_experts, num_ranks))
        alone = (row_P != EMPTY) & ~np.isin(np.arange(len(row_P)), self.copies.slot)
        self.home_EG[row_P[alone], rank_of_slot[alone]] = 1.0
        self.expert_C = self.copies.experts[self.copies.owner]
        number_R = np.diff(self.copies.first)
        self.number_C = number_R[self.copies.owner]
        self.index_C = np.arange(len(self.expert_C)) - self.copies.first[:-1][self.copies.owner]
        self._table_FN = np.zeros((len(self.features), 0))

    def parts(self, counts_TE: NDArray[Any]) -> NDArray[np.int64]:
        """[T, C] assignments of each of `copies` at every step.

        Raises
        ------
        UnsupportedError
            Counts too large to tabulate the features of every share.
        """
        counts = counts_TE.astype(np.int64)
        given_TC = np.ascontiguousarray(counts[:, self.expert_C])  # a step after the other, as the kernels go
        parts_TC = (given_TC + self.number_C - 1 - self.index_C) // self.number_C
        if self.features == (ASSIGNMENTS,):
            alone_TG = np.rint(counts @ self.home_EG).astype(np.int64)
            levels = no_levels(self.curves)
            spread_steps(levels, alone_TG, self.copies, parts_TC, fluid_times(levels, counts.sum(axis=1)))
            return parts_TC
        alone_TGF = np.stack([feature.of(counts) @ self.home_EG for feature in self.features], axis=2)
        counts_TR = np.ascontiguousarray(counts[:, self.copies.experts])
        part_steps(self.curves, alone_TGF, self.copies, counts_TR, self._table(int(counts.max())), parts_TC)
        return parts_TC

    def _table(self, largest: int) -> FloatArray:
        if self._table_FN.shape[1] <= largest:
            self._table_FN = feature_table(self.features, largest)
        return self._table_FN


def feature_table(features: Sequence[Feature], largest: int) -> FloatArray:
    """[F, largest + 1] features of 0, 1, ... assignments; `UnsupportedError` where these are too many."""
    if largest >= TABLE_LIMIT:
        limit = f"below {TABLE_LIMIT} assignments of an expert per step, which this split tabulates"
        raise UnsupportedError("counts_TE", largest, limit, "use even")
    return np.stack([feature.of(np.arange(largest + 1)) for feature in features]).astype(np.float64)

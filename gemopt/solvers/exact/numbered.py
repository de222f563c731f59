"""Contents of ranks that are too many to list, by number: kind by kind, and in each in colexicographic order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import comb

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import IntArray


@dataclass(frozen=True, eq=False)
class Numbered:
    """num_experts: E. size_K: slots of a rank of each kind."""

    num_experts: int
    size_K: IntArray

    @cached_property
    def first_K(self) -> IntArray:
        """Where the contents of a kind begin."""
        return np.cumsum([0, *(comb(self.num_experts, int(size)) for size in self.size_K)])[:-1]

    @cached_property
    def ways_SE(self) -> IntArray:
        """[most slots + 1, E + 1] how many sets of s experts there are below the e-th."""
        experts, most = self.num_experts, int(self.size_K.max())
        return np.array([[min(comb(e, s), 2**62) for e in range(experts + 1)] for s in range(most + 1)])

    def kind(self, ids: IntArray) -> IntArray:
        """Kinds of some contents."""
        return np.searchsorted(self.first_K, ids, side="right") - 1

    def ids(self, k: int, sets_NS: NDArray[np.uint8]) -> IntArray:
        """Numbers of contents [N, S] of kind k."""
        sorted_NS = np.sort(sets_NS.astype(np.int64), axis=1)
        return np.asarray(self.first_K[k] + self.ways_SE[np.arange(1, sorted_NS.shape[1] + 1), sorted_NS].sum(axis=1))

    def members(self, ids: IntArray) -> NDArray[np.uint8]:
        """[n, most slots] experts of some contents, then zeros."""
        out, kind_N = np.zeros((len(ids), int(self.size_K.max())), np.uint8), self.kind(ids)
        left_N, size_N = ids - self.first_K[kind_N], self.size_K[kind_N]
        for s in range(out.shape[1], 0, -1):
            mine = np.flatnonzero(size_N >= s)
            out[mine, s - 1] = np.searchsorted(self.ways_SE[s], left_N[mine], side="right") - 1
            left_N[mine] -= self.ways_SE[s, out[mine, s - 1]]
        return out

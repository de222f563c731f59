"""Search every placement without spare slots again: plain depth first, one bound, no multipliers or compiled code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gemopt.verify import Case

PS = 10**6
CLOSE = 1e-9  # relative


class _SpentError(Exception):
    """The nodes are spent."""


def no_better(case: Case, bound_us: float, most_nodes: int) -> tuple[int, float | None]:
    """(nodes looked at, the objective in microseconds of a placement below the bound, or None).

    As many nodes as allowed: the search did not end. A node is cut when what its ranks hold, each with the smallest of
    the experts left that fill its slots, takes as long as the bound says at the slowest rank, summed over the steps.
    """
    search = _Search(case, bound_us, most_nodes)
    try:
        search.go(0)
    except _SpentError:
        return most_nodes, None
    return search.nodes, search.better


class _Search:
    def __init__(self, case: Case, bound_us: float, most_nodes: int) -> None:
        self.case, self.most_nodes, self.nodes = case, most_nodes, 0
        self.limit_us, self.better = bound_us * (1 - CLOSE), None
        order = np.argsort(-case.counts_TE.sum(axis=0), kind="stable")
        self.items_EFT = np.ascontiguousarray(case.loads_FTE[:, :, order].transpose(2, 0, 1))
        self.loads_GFT = np.zeros((len(case.slots_G), *self.items_EFT.shape[1:]), np.int64)
        self.free = case.slots_G.tolist()
        self.floor_T = case.floors_T / PS * (1 - CLOSE)
        widest, experts = int(case.slots_G.max()), len(self.items_EFT)
        self.rest = []  # [d][m]: the m smallest of the experts from d on, [F, T]
        for d in range(experts + 1):
            smallest = np.sort(self.items_EFT[d:], axis=0)[:widest]
            sums = np.zeros((widest + 1, *self.items_EFT.shape[1:]), np.int64)
            sums[1 : len(smallest) + 1] = np.cumsum(smallest, axis=0)
            self.rest.append(sums)
        curves = [
            [[c.x.tobytes(), c.y.tobytes(), c.slope] for t in each.terms for c in t] for each in case.cost.latencies
        ]
        kinds = [(len(e.terms), c, int(s)) for e, c, s in zip(case.cost.latencies, curves, case.slots_G, strict=True)]
        self.same = [kinds.index(kind) for kind in kinds]

    better: float | None

    def time(self, g: int, depth: int) -> NDArray[np.float64]:
        """[T] what rank g takes at least, once it is full."""
        return self.case.times_us(g, self.loads_GFT[g] + self.rest[depth][self.free[g]], low=self.free[g] > 0)

    def go(self, depth: int) -> None:
        """All ways to place the experts from `depth` on."""
        empty: set[int] = set()
        for g in range(len(self.free)):
            if not self.free[g] or self.better is not None:
                continue
            if self.free[g] == self.case.slots_G[g]:  # of equal empty ranks one will do
                if self.same[g] in empty:
                    continue
                empty.add(self.same[g])
            self.nodes += 1
            if self.nodes >= self.most_nodes:
                raise _SpentError
            self.free[g] -= 1
            self.loads_GFT[g] += self.items_EFT[depth]
            times = np.max([self.time(h, depth + 1) for h in range(len(self.free))], axis=0)
            if depth + 1 == len(self.items_EFT):
                if times.sum() < self.limit_us:
                    self.better = float(times.sum())
            elif np.maximum(times, self.floor_T).sum() < self.limit_us:
                self.go(depth + 1)
            self.loads_GFT[g] -= self.items_EFT[depth]
            self.free[g] += 1

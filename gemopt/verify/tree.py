"""Search every placement without spare slots again: plain depth first, one bound, no multipliers or compiled code."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemopt.certificate import IntArray
from gemopt.verify.case import PS, Case

CLOSE = 1e-9  # relative
PER_NODE = 20  # placements of some experts that are looked at for one of the nodes allowed: many are at once
BATCH = 1 << 19  # entries looked at together


def no_better(case: Case, bound_us: float, most_nodes: int) -> tuple[int, float | None]:
    """(nodes looked at, the objective in microseconds of a placement below the bound, or None).

    As many nodes as allowed: the search did not end. A placement of the first experts is cut when what its ranks hold,
    each with the smallest of the experts left that fill its slots, takes as long as the bound says at the slowest rank,
    summed over the steps.
    """
    search = _Search(case, bound_us)
    stack, looked = [np.zeros((1, 0), np.int64)], 0
    while stack:
        placed_ND = stack.pop()
        if len(placed_ND) > search.together:
            stack.append(placed_ND[search.together :])
        children_ND, count, better = search.go(placed_ND[: search.together])
        looked += count
        if better is not None:
            return -(-looked // PER_NODE), better
        if looked >= PER_NODE * most_nodes:
            return most_nodes, None
        if len(children_ND):
            stack.append(children_ND)
    return -(-looked // PER_NODE), None


class _Search:
    """What does not change; experts in the order of the search, heaviest first."""

    def __init__(self, case: Case, bound_us: float) -> None:
        self.case, self.limit_us = case, bound_us * (1 - CLOSE)
        order = np.argsort(-case.counts_TE.sum(axis=0), kind="stable")
        self.items_EFT = np.ascontiguousarray(case.loads_FTE[:, :, order].transpose(2, 0, 1))
        self.floor_T = case.floors_T / PS * (1 - CLOSE)
        widest, experts = int(case.slots_G.max()), len(self.items_EFT)
        self.rest = []  # [d][m]: the m smallest of the experts from d on, [F, T]
        for d in range(experts + 1):
            smallest = np.sort(self.items_EFT[d:], axis=0)[:widest]
            sums = np.zeros((widest + 1, *self.items_EFT.shape[1:]), np.int64)
            sums[1 : len(smallest) + 1] = np.cumsum(smallest, axis=0)
            self.rest.append(sums)
        self.together = max(1, BATCH // (len(case.slots_G) * max(experts, self.items_EFT[0].size)))

    def go(self, placed_ND: IntArray) -> tuple[IntArray, int, float | None]:
        """(ways to place one expert more that may be below the bound [n, D + 1], how many there are, a better one).

        placed: [N, D] ranks of the first experts.
        """
        slots_G, depth = self.case.slots_G, placed_ND.shape[1]
        on_NGD = (placed_ND[:, None] == np.arange(len(slots_G))[:, None]).astype(np.float64)  # of whole numbers: exact
        loads_NGX = (on_NGD @ self.items_EFT[:depth].reshape(depth, self.items_EFT[0].size)).astype(np.int64)
        loads_NGFT = loads_NGX.reshape(*loads_NGX.shape[:2], *self.items_EFT.shape[1:])
        free_NG = slots_G - on_NGD.sum(axis=2).astype(np.int64)
        may_NG = free_NG > 0
        for group in self.case.kinds:  # of equal empty ranks one will do
            for n, g in enumerate(group):
                before = group[:n]
                may_NG[:, g] &= (free_NG[:, g] < slots_G[g]) | (free_NG[:, before] < slots_G[before]).all(axis=1)
        now = [self._times(g, depth + 1, loads_NGFT[:, g], free_NG[:, g]) for g in range(len(slots_G))]
        children, last = [], depth + 1 == len(self.items_EFT)
        for g in range(len(slots_G)):
            mine = np.flatnonzero(may_NG[:, g])
            loads_NFT = loads_NGFT[mine, g] + self.items_EFT[depth]
            slowest_NT = self._times(g, depth + 1, loads_NFT, free_NG[mine, g] - 1)
            if not last:
                slowest_NT = np.maximum(slowest_NT, self.floor_T)
            for h, times_NT in enumerate(now):
                if h != g:
                    slowest_NT = np.maximum(slowest_NT, times_NT[mine])
            value_N = slowest_NT.sum(axis=1)
            if last and (value_N < self.limit_us).any():
                return placed_ND, int(may_NG.sum()), float(value_N.min())
            ids = mine[value_N < self.limit_us]
            children.append(np.hstack([placed_ND[ids], np.full((len(ids), 1), g)]))
        return np.concatenate(children), int(may_NG.sum()), None

    def _times(self, g: int, depth: int, loads_NFT: IntArray, free_N: IntArray) -> NDArray[np.float64]:
        """[N, T] what rank g takes at least, once it is full of the smallest of the experts from `depth` on."""
        loads_FNT = (loads_NFT + self.rest[depth][free_N]).transpose(1, 0, 2)
        times_NT, full = self.case.times_us(g, loads_FNT, low=True), np.flatnonzero(free_N == 0)
        times_NT[full] = self.case.times_us(g, loads_FNT[:, full])
        return times_NT

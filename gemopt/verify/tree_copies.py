"""Search every placement with copies again: plain depth first, one bound, no compiled code."""

from __future__ import annotations

from itertools import chain, combinations, permutations, product

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError
from gemopt.verify.case import PS, Case

IntArray = NDArray[np.int64]
CLOSE = 1e-9  # relative
MOST_HOSTS = 6  # ranks with slots: all sets and orders of them are tried


class SpentError(Exception):
    """The nodes are spent."""


def no_better_copies(case: Case, bound_us: float, most_nodes: int) -> tuple[int, float | None]:
    """As `verify.tree.no_better` where slots are spare, which may hold copies that share evenly, or nothing.

    A rank with f free slots gets at least f less the spare slots left of the experts left to itself, since each of the
    others needs a slot elsewhere. Ranks that are alike and empty are taken in order; as the order decides which copy
    has one assignment more, a copy counts as the smallest, and a whole placement is tried in all orders of such ranks.
    With more than six ranks that have slots it is not begun.

    Raises
    ------
    InputError
        Copies do not share evenly.
    """
    if case.split != "even":
        raise InputError("Certificate.layers.proof", "tree", f"no search of even shares where they are {case.split}")
    if (case.slots_G > 0).sum() > MOST_HOSTS:
        return most_nodes, None
    search = _Search(case, bound_us, most_nodes)
    try:
        search.go(0, np.zeros((len(case.slots_G), *case.loads_FTE.shape[:2]), np.int64), case.slots_G, case.spare)
    except SpentError:
        return most_nodes, None
    return search.nodes, search.better


def exact_worth(case: Case, sets: list[tuple[int, ...]]) -> float:
    """Summed makespan in microseconds of the experts on these sets of ranks, in the best order of alike ranks."""
    search = _Search(case, np.inf, 0)
    search.trail = [sets[e] for e in search.order]
    search.complete()
    assert search.better is not None
    return search.better


class _Search:
    better: float | None

    def __init__(self, case: Case, bound_us: float, most_nodes: int) -> None:
        self.case, self.most_nodes, self.nodes, self.better = case, most_nodes, 0, None
        self.limit_us = bound_us * (1 - CLOSE)
        self.floor_T = case.floors_T / PS * (1 - CLOSE)
        self.order = order = np.argsort(-case.counts_TE.sum(axis=0), kind="stable")
        self.counts_ET = case.counts_TE[:, order].T
        hosts = np.flatnonzero(case.slots_G).tolist()
        most = min(len(hosts), case.spare + 1)
        self.sets = [chosen for size in range(1, most + 1) for chosen in combinations(hosts, size)]
        self.shares = [[self.features(n_T // size) for size in range(1, most + 1)] for n_T in self.counts_ET]
        self.rest = []  # [d][m]: the m smallest of the experts from d on, [F, T]
        for d in range(len(order) + 1):
            whole = np.array([shares[0] for shares in self.shares[d:]], np.int64).reshape(-1, *case.loads_FTE.shape[:2])
            sums = np.cumsum(np.sort(whole, axis=0)[: int(case.slots_G.max())], axis=0)
            self.rest.append(np.concatenate([np.zeros((1, *whole.shape[1:]), np.int64), sums]))
        self.trail: list[tuple[int, ...]] = []

    def features(self, n_T: IntArray) -> IntArray:
        """[F, T] features of these assignments of one expert."""
        return np.stack([feature.of(n_T).astype(np.int64) for feature in self.case.cost.features])

    def go(self, depth: int, loads_GFT: IntArray, free_G: IntArray, spare: int) -> None:
        """All ways to place the experts from `depth` on."""
        for chosen in self.sets:
            left = spare - len(chosen) + 1
            if self.better is not None or left < 0 or not self.fits(chosen, free_G):
                continue
            self.nodes += 1
            if self.nodes >= self.most_nodes:
                raise SpentError
            loads, free = loads_GFT.copy(), free_G.copy()
            loads[list(chosen)] += self.shares[depth][len(chosen) - 1]
            free[list(chosen)] -= 1
            times = [
                self.case.times_us(g, loads[g] + self.rest[depth + 1][max(0, int(free[g]) - left)], low=True)
                for g in range(len(free))
            ]
            if np.maximum(np.max(times, axis=0), self.floor_T).sum() >= self.limit_us:
                continue
            self.trail.append(chosen)
            if depth + 1 == len(self.counts_ET):
                self.complete()
            else:
                self.go(depth + 1, loads, free, left)
            self.trail.pop()

    def fits(self, chosen: tuple[int, ...], free_G: IntArray) -> bool:
        """Whether the ranks have a slot each, and of those that are alike and empty are the first."""
        if (free_G[list(chosen)] == 0).any():
            return False
        for group in self.case.kinds:
            empty = [g for g in group if free_G[g] == self.case.slots_G[g]]
            taken = [g for g in empty if g in chosen]
            if taken != empty[: len(taken)]:
                return False
        return True

    def complete(self) -> None:
        """Whether the placement is better in any order of the ranks that are alike."""
        for orders in product(*(permutations(group) for group in self.case.kinds)):
            moved = dict(zip(chain(*self.case.kinds), chain(*orders), strict=True))
            loads_GFT = np.zeros((len(self.case.slots_G), *self.case.loads_FTE.shape[:2]), np.int64)
            for n_T, chosen in zip(self.counts_ET, self.trail, strict=True):
                for copy, g in enumerate(sorted(moved[g] for g in chosen)):
                    loads_GFT[g] += self.features((n_T + len(chosen) - 1 - copy) // len(chosen))
            value = float(np.max([self.case.times_us(g, x) for g, x in enumerate(loads_GFT)], axis=0).sum())
            if value < self.limit_us:
                self.better = self.limit_us = value

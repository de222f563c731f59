"""Copies as MoE-GPS chooses them (arXiv:2506.07366, Algorithm 1): by assignments alone, split as planned."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import IntArray


def greedy(expected_E: IntArray, home_E: IntArray, slots_G: IntArray) -> tuple[IntArray, NDArray[np.bool_]]:
    """([G, E] assignments, [G, E] copies used); `slots_G`: copies that each rank has room for.

    While the fullest rank has more than one assignment above the emptiest, its hottest expert that is there, or may be
    copied there, gives half the difference to it.
    """
    ranks, experts = len(slots_G), np.arange(len(expected_E))
    x_GE, used_GE = np.zeros((ranks, len(experts)), np.int64), np.zeros((ranks, len(experts)), np.bool_)
    x_GE[home_E, experts] = expected_E
    load_G = x_GE.sum(axis=1)
    for _ in range(64 * ranks):
        h, c = int(load_G.argmax()), int(load_G.argmin())
        if load_G[h] - load_G[c] <= 1:
            break
        there_E = used_GE[c] | (home_E == c)
        open_E = (x_GE[h] > 0) & (there_E | (used_GE[c].sum() < slots_G[c]))
        if not open_E.any():
            break
        chosen = int(np.where(open_E, x_GE[h], -1).argmax())
        used_GE[c, chosen] = home_E[chosen] != c
        given = min(int(x_GE[h, chosen]), (int(load_G[h] - load_G[c]) + 1) // 2)
        x_GE[[h, c], chosen] += (-given, given)
        load_G[[h, c]] += (-given, given)
    return x_GE, used_GE


def as_planned(counts_E: NDArray[Any], plan_GE: IntArray, home_E: IntArray) -> IntArray:
    """[G, E] real assignments in the proportions of a plan, rounded cumulatively; unplanned experts at home."""
    total_E = plan_GE.sum(axis=0)
    upto_GE = (2 * counts_E * plan_GE.cumsum(axis=0) + total_E) // np.maximum(2 * total_E, 1)
    x_GE = np.diff(upto_GE, axis=0, prepend=0)
    bare = np.flatnonzero(total_E == 0)
    x_GE[:, bare] = 0
    x_GE[home_E[bare], bare] = counts_E[bare]
    return np.asarray(x_GE)

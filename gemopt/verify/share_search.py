"""Search again the contents with copies that multipliers leave, in the ranges of copies where they prove too little."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.certificate import IntArray
from gemopt.compiling import njit
from gemopt.verify.case import PS, Case
from gemopt.verify.share_contents import PricedRange, shares_left
from gemopt.verify.tree_copies import MOST_HOSTS, exact_worth

Array = NDArray[Any]
CLOSE = 1e-9  # relative
MOST_LEFT = 20_000  # contents of one rank
MOST_ROWS = 1e8  # contents x steps
MOST_ROOM = 1 << 61  # 2^-bits picoseconds: sums of costs up to so much fit in 63 bits
NODES = 100  # contents looked at that count as one node of a plain search
MOST_FOUND = 1000  # placements below the bound but for how copies share


def no_better_shares(
    case: Case, kinds: list[list[int]], ranges: list[PricedRange], floor_T: IntArray, bound_us: float, most_nodes: int,
    bits: int,
) -> tuple[int, float | None]:  # fmt: skip
    """(nodes, what a placement below the bound is worth or None); `most_nodes` when the search did not end.

    kinds: ranks with slots, those together that are alike.
    """
    hosts, nodes = [g for group in kinds for g in group], 0
    if len(hosts) > MOST_HOSTS:
        return most_nodes, None
    limit_us = bound_us * (1 - CLOSE)
    limit = int(np.ceil(limit_us * (1 + CLOSE / 100) * (PS << bits)))
    same_G = np.array([g != group[0] for group in kinds for g in group])
    idle = [case.times_us(g, np.zeros((1, 1), np.int64)).max() for g in np.flatnonzero(case.slots_G == 0).tolist()]
    least_T = np.maximum(case.floors_T / PS * (1 - CLOSE), max(idle, default=-np.inf))
    for each in ranges:
        room = limit - each.total
        if room <= 0:
            continue
        if room > MOST_ROOM:
            return most_nodes, None
        copies, costs, rows, entries = [], [], [], 0
        for group, least in zip(kinds, each.least_K, strict=True):
            found = shares_left(
                case, group[0], floor_T, each.mu_ET, each.price_E, bits, each.within, least + room, MOST_LEFT
            )
            entries += 0 if found is None else len(found[1]) * len(group) * len(case.counts_TE)
            if found is None or entries > MOST_ROWS:
                return most_nodes, None
            rows_NT = _rows(case, group[0], found[0])
            for _ in group:
                copies.append(found[0])
                costs.append(found[1] - least)
                rows.append(rows_NT)
        out = np.zeros((MOST_FOUND, len(hosts)), np.int64)
        first_G = np.cumsum([0, *(len(part) for part in costs)])
        looked, number = _search(
            np.concatenate(copies), np.concatenate(costs), np.concatenate(rows), first_G, same_G,
            case.slots_G[hosts], least_T, room, limit_us, NODES * (most_nodes - nodes), out,
        )  # fmt: skip
        nodes += -(-looked // NODES)
        if nodes >= most_nodes or number > len(out):
            return most_nodes, None
        held = np.concatenate(copies)
        for chosen in out[:number]:
            sets = [tuple(sorted(np.array(hosts)[held[chosen, e] > 0].tolist())) for e in range(held.shape[1])]
            worth = exact_worth(case, sets)
            if worth < limit_us:
                return nodes, worth
    return nodes, None


def _rows(case: Case, g: int, copies_NE: IntArray) -> NDArray[np.float64]:
    """[n, T] microseconds that a rank takes at least with these contents."""
    loads_NT = np.zeros((len(copies_NE), len(case.counts_TE)), np.int64)
    for e, n_T in enumerate(case.counts_TE.T):
        for size in np.unique(copies_NE[copies_NE[:, e] > 0, e]):
            loads_NT[copies_NE[:, e] == size] += case.cost.features[0].of(n_T // size).astype(np.int64)
    return case.times_us(g, loads_NT[None], low=True)


@njit(nogil=True)
def _search(
    copies_NE: Array, cost_N: Array, rows_NT: Array, first_G: Array, same_G: Array, slots_G: Array, least_T: Array,
    room: int, limit: float, most: int, out: Array,
) -> tuple[int, int]:  # fmt: skip
    """(contents looked at, placements found below the limit), rank by rank, of those alike in rising order."""
    experts, ranks, steps = copies_NE.shape[1], len(slots_G), len(least_T)
    at, z = np.zeros(ranks, np.int64), np.zeros((ranks + 1, steps))
    all_E, need_E = np.zeros((ranks + 1, experts), np.int64), np.zeros((ranks + 1, experts), np.int64)
    spent, left = np.zeros(ranks + 1, np.int64), np.zeros(ranks + 1, np.int64)
    for t in range(steps):
        z[0, t] = least_T[t]
    for g in range(ranks - 1, -1, -1):
        left[g] = left[g + 1] + slots_G[g]
    at[0] = first_G[0]
    depth, looked, number = 0, 0, 0
    while depth >= 0:
        n = at[depth]
        if n == first_G[depth + 1]:
            depth -= 1
            continue
        at[depth] += 1
        fits = spent[depth] + cost_N[n] <= room
        wanted = 0
        for e in range(experts):
            if not fits:
                break
            c, known, need = copies_NE[n, e], all_E[depth, e], need_E[depth, e]
            if c > 0:
                fits = known == 0 or (known == c and need > 0)
                need = (need if known else c) - 1
                known = c
            fits = fits and need <= ranks - depth - 1
            wanted += need if known else 1
            all_E[depth + 1, e], need_E[depth + 1, e] = known, need
        if not fits or wanted > left[depth + 1]:
            continue
        looked += 1
        if looked >= most:
            return looked, number
        total = 0.0
        for t in range(steps):
            z[depth + 1, t] = max(z[depth, t], rows_NT[n, t])
            total += z[depth + 1, t]
        if total >= limit:
            continue
        spent[depth + 1] = spent[depth] + cost_N[n]
        if depth + 1 < ranks:
            depth += 1
            at[depth] = first_G[depth]
            if same_G[depth]:
                at[depth] += n - first_G[depth - 1]
            continue
        if number < len(out):
            out[number] = at - 1
        number += 1
        if number > len(out):
            return looked, number
    return looked, number

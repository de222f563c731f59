"""Compiled: a good split of whole assignments where features are not plain loads, such as activated experts.

Then every copy in use costs something by itself, and which to use is a choice like that of a placement. It is found by
descent: every expert whole on one copy, heaviest first, where it ends first; then, for the slowest rank, the best of
taking away all of an expert or as much as levels two ranks, until nothing helps. Copies that do not help stay unused.
Where the split to start from (the even one) was better than what that leads to, it is the start itself.
"""

from __future__ import annotations

import numpy as np

from gemopt.compiling import njit
from gemopt.kernels import MINUS, ZERO, Array, latency_value, put
from gemopt.latency import Curves
from gemopt.splits.flow import Copies
from gemopt.splits.levels import IntArray

LEAST = 1e-9  # of a time: what counts as less


@njit(nogil=True, inline="always")
def time_with(curves: Curves, g: int, load_F: Array, table_FN: Array, old: int, new: int, room_F: Array) -> float:
    """Latency of a rank whose part of an expert goes from `old` to `new`."""
    for f in range(len(load_F)):
        room_F[f] = load_F[f] + table_FN[f, new] - table_FN[f, old]
    return float(latency_value(g, room_F, curves))


@njit(nogil=True)
def best_amount(
    curves: Curves, g: int, h: int, have: int, got: int, load_GF: Array, table_FN: Array, room_F: Array
) -> tuple[int, float]:
    """How much of the `have` of rank g to give to rank h, which has `got`; and the slower one's time then.

    All of it, or what levels the two, by bisection.
    """
    low, high = 0, have
    while high - low > 1:
        middle = (low + high) // 2
        gives = time_with(curves, g, load_GF[g], table_FN, have, have - middle, room_F)
        if gives > time_with(curves, h, load_GF[h], table_FN, got, got + middle, room_F):
            low = middle
        else:
            high = middle
    best, amount = np.inf, 0
    for each in (have, high, low):
        gives = time_with(curves, g, load_GF[g], table_FN, have, have - each, room_F)
        worst = max(gives, time_with(curves, h, load_GF[h], table_FN, got, got + each, room_F))
        if each > 0 and worst < best:
            best, amount = worst, each
    return amount, best


@njit(nogil=True)
def hand_over(copies: Copies, parts_C: IntArray, c: int, d: int, amount: int, load_GF: Array, table_FN: Array) -> None:
    """Give assignments of one copy to another."""
    g, h = copies.rank[c], copies.rank[d]
    for f in range(load_GF.shape[1]):
        load_GF[g, f] += table_FN[f, parts_C[c] - amount] - table_FN[f, parts_C[c]]
        load_GF[h, f] += table_FN[f, parts_C[d] + amount] - table_FN[f, parts_C[d]]
    parts_C[c] -= amount
    parts_C[d] += amount


@njit(nogil=True)
def place_whole(
    curves: Curves,
    copies: Copies,
    counts_R: IntArray,
    parts_C: IntArray,
    load_GF: Array,
    table_FN: Array,
    room_F: Array,
) -> None:
    """Every expert on the one copy where it ends first, heaviest expert first."""
    parts_C[:] = 0
    for r in np.argsort(-counts_R, kind="mergesort"):
        best, chosen = np.inf, copies.first[r]
        for c in range(copies.first[r], copies.first[r + 1]):
            g = copies.rank[c]
            time = time_with(curves, g, load_GF[g], table_FN, 0, counts_R[r], room_F)
            if time < best:
                best, chosen = time, c
        parts_C[chosen] = counts_R[r]
        for f in range(load_GF.shape[1]):
            load_GF[copies.rank[chosen], f] += table_FN[f, counts_R[r]]


@njit(nogil=True)
def slowest_rank(curves: Curves, load_GF: Array) -> tuple[int, float]:
    """The rank that ends last, and when."""
    slowest, g = -np.inf, 0
    for each in range(len(load_GF)):
        time = float(latency_value(each, load_GF[each], curves))
        if time > slowest:
            slowest, g = time, each
    return g, slowest


@njit(nogil=True)
def level_out(
    curves: Curves, copies: Copies, parts_C: IntArray, load_GF: Array, table_FN: Array, room_F: Array
) -> None:
    """Take from the slowest rank what helps most, until nothing helps."""
    while True:
        g, slowest = slowest_rank(curves, load_GF)
        best, gives, takes, amount = slowest * (1.0 - LEAST), MINUS, MINUS, ZERO
        for n in range(copies.start[g], copies.start[g + 1]):
            c = copies.by_rank[n]
            if parts_C[c] == 0:
                continue
            for d in range(copies.first[copies.owner[c]], copies.first[copies.owner[c] + 1]):
                if d == c:
                    continue
                h = copies.rank[d]
                some, worst = best_amount(curves, g, h, parts_C[c], parts_C[d], load_GF, table_FN, room_F)
                if worst < best:
                    best, gives, takes, amount = worst, c, d, some
        if gives < 0:
            return
        hand_over(copies, parts_C, gives, takes, amount, load_GF, table_FN)


@njit(nogil=True)
def part_steps(
    curves: Curves, alone_TGF: Array, copies: Copies, counts_TR: IntArray, table_FN: Array, parts_TC: IntArray
) -> None:
    """Bring `parts_TC` [T, C] to something as good or better at every step. alone_TGF: features of single copies."""
    room_F = np.empty(alone_TGF.shape[2])
    for t in range(len(alone_TGF)):
        given_C, given_GF, load_GF = parts_TC[t].copy(), alone_TGF[t].copy(), alone_TGF[t].copy()
        for c in range(len(given_C)):
            for f in range(len(room_F)):
                given_GF[copies.rank[c], f] += table_FN[f, given_C[c]]
        place_whole(curves, copies, counts_TR[t], parts_TC[t], load_GF, table_FN, room_F)
        level_out(curves, copies, parts_TC[t], load_GF, table_FN, room_F)
        if slowest_rank(curves, given_GF)[1] < slowest_rank(curves, load_GF)[1]:
            level_out(curves, copies, given_C, given_GF, table_FN, room_F)
            put(parts_TC[t], given_C)

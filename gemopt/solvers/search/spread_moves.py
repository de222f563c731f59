"""What becomes of a row where one slot gets another expert, or two change places, and which ranks may feel it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from gemopt.kernels import Array
from gemopt.splits.flow import IntArray, Number


class Change(NamedTuple):
    """Another expert for a slot, or the contents of two slots exchanged.

    slot, other: the slots, -1 without another. experts: [2] what leaves the slot and what comes, -1 for none.
    before, after: ranks of either of them. siblings: [n] the slots that the one that leaves keeps, where there is no
    other: one of them takes its share. rank_P: rank of each slot. walls, held: some ranks that may prove a longer time,
    and the experts that are on these alone after it. near, first, near_ranks: the experts on the ranks of both slots
    then; ranks of the nth from `first[n]` to `first[n + 1]`; none without another slot.
    """

    slot: int
    other: int
    experts: IntArray
    before: tuple[IntArray, IntArray]
    after: tuple[IntArray, IntArray]
    siblings: IntArray
    rank_P: IntArray
    walls: tuple[IntArray, IntArray, IntArray, IntArray]
    held: tuple[IntArray, IntArray, IntArray, IntArray]
    near: IntArray
    first: IntArray
    near_ranks: IntArray


@njit(cache=True, nogil=True)
def ranks_of(row_P: IntArray, rank_P: IntArray, expert: Number) -> Number:
    """The ranks that have an expert; none of no expert."""
    return rank_P[(row_P == expert) & (expert >= 0)]


@njit(cache=True, nogil=True)
def held_alone(row_P: IntArray, rank_P: IntArray, members: IntArray, size: tuple[int, int]) -> Array:
    """The experts that are on some ranks and on no others. size: numbers of experts and ranks."""
    held_E, member_G = np.zeros(size[0], np.bool_), np.zeros(size[1], np.bool_)
    for g in members:
        member_G[g] = True
    for inside in (True, False):  # those that are outside as well go last
        for p in range(len(row_P)):
            if row_P[p] >= 0 and member_G[rank_P[p]] == inside:
                held_E[row_P[p]] = inside
    return np.flatnonzero(held_E)


@njit(cache=True, nogil=True)
def make_change(
    row_P: IntArray, after_P: IntArray, rank_P: IntArray, slot: int, other: int, size: tuple[int, int]
) -> Change:
    """What becomes of a row where one slot, or two, are another's. size: numbers of experts and ranks."""
    old, new = row_P[slot], after_P[slot]
    before = (ranks_of(row_P, rank_P, old), ranks_of(row_P, rank_P, new))
    after = (ranks_of(after_P, rank_P, old), ranks_of(after_P, rank_P, new))
    siblings = np.flatnonzero((after_P == old) & (old >= 0) & (other < 0))
    walls = (after[0], after[1], rank_P[slot : slot + 1].copy(), rank_P[other : other + 1].copy())
    held = (
        held_alone(after_P, rank_P, walls[0], size), held_alone(after_P, rank_P, walls[1], size),
        held_alone(after_P, rank_P, walls[2], size), held_alone(after_P, rank_P, walls[3], size),
    )  # fmt: skip
    on_E = np.zeros(size[0], np.bool_)
    for p in range(len(after_P)):
        if other >= 0 and after_P[p] >= 0 and (rank_P[p] == rank_P[slot] or rank_P[p] == rank_P[other]):
            on_E[after_P[p]] = True
    near = np.flatnonzero(on_E)
    first, near_ranks = np.zeros(len(near) + 1, np.int64), np.empty(len(row_P), np.int64)
    for n in range(len(near)):
        ranks = ranks_of(after_P, rank_P, near[n])
        first[n + 1] = first[n] + len(ranks)
        near_ranks[first[n] : first[n + 1]] = ranks
    return Change(
        slot, other, np.array([old, new]), before, after, siblings, rank_P, walls, held, near, first, near_ranks
    )  # fmt: skip

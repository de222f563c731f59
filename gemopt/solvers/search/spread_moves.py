"""What becomes of a row where one slot gets another expert, or two change places, and which ranks may feel it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gemopt.compiling import njit
from gemopt.kernels import Array, put
from gemopt.solvers.search.spread_cuts import bits_of, words_for
from gemopt.splits.levels import IntArray, Number


class Change(NamedTuple):
    """Another expert for a slot, or the contents of two slots exchanged.

    slot, other: the slots, -1 without another. experts: [2] what leaves the slot and what comes, -1 for none.
    before_2W, after_2W: bits of the ranks of either of them. siblings: [n] the slots that the one that leaves keeps,
    where there is no other: one of them takes its share. walls: [4] some ranks that may prove a longer time, the nth
    from `first[n]` to `first[n + 1]` of `ranks`, as bits in `ranks_4W`; the experts on these alone after the change,
    from `first_held[n]` of `held`.
    """

    slot: int
    other: int
    experts: IntArray
    before_2W: IntArray
    after_2W: IntArray
    siblings: IntArray
    first: IntArray
    ranks: IntArray
    ranks_4W: IntArray
    first_held: IntArray
    held: IntArray


@njit(nogil=True)
def ranks_of(row_P: IntArray, rank_P: IntArray, expert: Number) -> Number:
    """The ranks that have an expert; none of no expert."""
    return rank_P[(row_P == expert) & (expert >= 0)]


@njit(nogil=True)
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


@njit(nogil=True)
def make_change(
    row_P: IntArray, after_P: IntArray, rank_P: IntArray, slot: int, other: int, size: tuple[int, int]
) -> Change:
    """What becomes of a row where one slot, or two, are another's. size: numbers of experts and ranks."""
    words, experts = words_for(size[1]), np.array([row_P[slot], after_P[slot]])
    before_2W, after_2W = np.empty((2, words), np.int64), np.empty((2, words), np.int64)
    ranks_4W = np.empty((4, words), np.int64)
    first, first_held = np.zeros(5, np.int64), np.zeros(5, np.int64)
    ranks, held = np.empty(2 * len(row_P) + 2, np.int64), np.empty(4 * size[0], np.int64)
    for n in range(4):
        if n < 2:
            members = ranks_of(after_P, rank_P, experts[n])
            put(before_2W[n], bits_of(ranks_of(row_P, rank_P, experts[n]), words))
            put(after_2W[n], bits_of(members, words))
        else:
            at = slot if n == 2 else other
            members = rank_P[at : at + 1] if at >= 0 else rank_P[:0]
        alone = held_alone(after_P, rank_P, members, size)
        put(ranks_4W[n], bits_of(members, words))
        first[n + 1], first_held[n + 1] = first[n] + len(members), first_held[n] + len(alone)
        put(ranks[first[n] : first[n + 1]], members)
        put(held[first_held[n] : first_held[n + 1]], alone)
    siblings = np.flatnonzero((after_P == experts[0]) & (experts[0] >= 0) & (other < 0))
    return Change(
        slot, other, experts, before_2W, after_2W, siblings, first, ranks, ranks_4W, first_held, held
    )  # fmt: skip

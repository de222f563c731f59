"""Cuts that bind steps now and bound them before: ranks that alone must hold some experts' loads.

What proved a longer time of one change may prove it of the next, and how much a step can gain.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.compiling import njit
from gemopt.kernels import Array, put
from gemopt.splits.levels import IntArray

KEPT = 8  # cuts of a step
WORD = 64


class Cuts(NamedTuple):
    """Some cuts of every step, M each, the first of which proves the step's time; one without ranks is none.

    ranks_TMW: bits of their ranks, 64 to a word. inside_TM: load of the experts on these alone; most_TM: what they hold
    within the step's time. next_T: which is forgotten next.
    """

    ranks_TMW: IntArray
    inside_TM: IntArray
    most_TM: IntArray
    next_T: IntArray


def make_cuts(cut_TG: NDArray[np.bool_], inside_T: IntArray) -> Cuts:
    """The first cut of every step, and none else. inside_T: their load."""
    steps, ranks = cut_TG.shape
    ranks_TMW = np.zeros((steps, KEPT, words_for(ranks)), np.int64)
    for t in range(steps):
        put(ranks_TMW[t, 0], bits_of(np.flatnonzero(cut_TG[t]), ranks_TMW.shape[2]))
    inside_TM = np.zeros((steps, KEPT), np.int64)
    inside_TM[:, 0] = inside_T
    return Cuts(ranks_TMW, inside_TM, np.zeros((steps, KEPT), np.int64), np.ones(steps, np.int64))


def first_cuts(cuts: Cuts, num_ranks: int) -> NDArray[np.bool_]:
    """[T, G] whether ranks are in the first cut of a step."""
    words, bits = np.divmod(np.arange(num_ranks), WORD)
    return np.ascontiguousarray(cuts.ranks_TMW[:, 0][:, words] >> bits & 1, dtype=np.bool_)


@njit(nogil=True)
def words_for(num_ranks: int) -> int:
    """Words with a bit for each rank."""
    return 1 + (num_ranks - 1) // WORD


@njit(nogil=True)
def bits_of(ranks: IntArray, words: int) -> IntArray:
    """Bits of some ranks."""
    bits_W = np.zeros(words, np.int64)
    for g in ranks:
        bits_W[g // WORD] |= np.int64(1) << np.int64(g % WORD)
    return bits_W


@njit(nogil=True)
def ranks_in(bits_W: IntArray, members: IntArray) -> int:
    """Write the ranks of some bits into `members`; returns how many there are."""
    size = 0
    for w in range(len(bits_W)):
        word, n = bits_W[w], 0
        while word != 0 and n < WORD:
            if word & 1:
                members[size] = w * WORD + n
                size += 1
            word, n = word >> 1, n + 1
    return size


@njit(nogil=True)
def remember(cuts: Cuts, t: int, bits_W: IntArray, inside: int, most_G: IntArray) -> int:
    """Keep a cut of a step in place of the oldest but the first; returns where, -1 if it is known."""
    for m in range(cuts.ranks_TMW.shape[1]):
        if (cuts.ranks_TMW[t, m] == bits_W).all():
            return -1
    at = cuts.next_T[t]
    put(cuts.ranks_TMW[t, at], bits_W)
    cuts.inside_TM[t, at], cuts.most_TM[t, at] = inside, 0
    for g in range(len(most_G)):
        if bits_W[g // WORD] >> np.int64(g % WORD) & 1:
            cuts.most_TM[t, at] += most_G[g]
    cuts.next_T[t] = 1 + at % (cuts.ranks_TMW.shape[1] - 1)
    return int(at)


@njit(nogil=True)
def fill_held(cuts: Cuts, t: int, most_G: IntArray, members: Array) -> None:
    """Fill in what the cuts of a step hold, by what ranks do. members: room for these."""
    for m in range(cuts.most_TM.shape[1]):
        cuts.most_TM[t, m] = 0
        for g in members[: ranks_in(cuts.ranks_TMW[t, m], members)]:
            cuts.most_TM[t, m] += most_G[g]

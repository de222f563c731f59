"""The least that any content of a rank costs: all of them are priced by pairs of experts, in whole numbers.

Halves of contents are put together by products of matrices. These are of float64, but all their sums are whole numbers
below 2^52, so that they round nothing. Contents that pairs leave below the least are priced step by step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.certificate import UNIT, IntArray
from gemopt.exceptions import InputError
from gemopt.verify.case import Case

SAFE = 1e-12  # relative: planes are raised by more than float64 is off
EXACT_BITS = 51  # of all costs together: what they have more is rounded down
UNIT_BITS = 48  # a picosecond times a multiplier, in units of the costs, and the least unit to round to
MOST_CONTENTS = 100_000_000
MOST_STEPWISE = 3_000_000  # contents of a rank that are looked at step by step; HALVINGS find the cheapest ones
HALVINGS = 6
FIRST = 64  # cheapest contents of each block, of which the least says what others must be below
BATCH = 1 << 20  # entries looked at together
BLOCK = 16  # steps looked at together
WORD_BITS = 61  # of sums of whole numbers

Floats = NDArray[np.float64]


class Pairs(NamedTuple):
    """Costs of experts alone [E] and in pairs j < i, of which a content has `size`: whole numbers of 2^bits units."""

    alone_E: Floats
    pair_EE: Floats
    size: int
    bits: int

    def blocks(self) -> Iterator[tuple[Floats, NDArray[np.int64], NDArray[np.int64]]]:
        """(costs [A, B], experts [A, a] of the first half, [B, b] of the second), which are all contents together."""
        experts, middle = len(self.alone_E), len(self.alone_E) // 2
        for mine in range(max(0, self.size - (experts - middle)), min(middle, self.size) + 1):
            left_AS, right_BS = _sets(middle, mine), _sets(experts - middle, self.size - mine)
            left_AE, right_BE = _held(middle, left_AS), _held(experts - middle, right_BS)
            pair_LL, pair_RR = self.pair_EE[:middle, :middle], self.pair_EE[middle:, middle:]
            cost_AB = left_AE @ self.pair_EE[middle:, :middle].T @ right_BE.T
            cost_AB += (left_AE @ self.alone_E[:middle] + ((left_AE @ pair_LL) * left_AE).sum(axis=1))[:, None]
            cost_AB += right_BE @ self.alone_E[middle:] + ((right_BE @ pair_RR) * right_BE).sum(axis=1)
            yield cost_AB, left_AS, right_BS + middle

    def count(self, most: float) -> int:
        """How many contents cost less."""
        return sum(int((cost_AB < most).sum()) for cost_AB, *_ in self.blocks())

    def below(self, most: float) -> Iterator[tuple[Floats, NDArray[np.int64]]]:
        """(costs [n], experts [n, size]) of all contents that cost less."""
        for cost_AB, left_AS, right_BS in self.blocks():
            rows, columns = np.nonzero(cost_AB < most)
            yield cost_AB[rows, columns], np.hstack([left_AS[rows], right_BS[columns]])


def pairs_of(alone: list[int], together: list[list[int]], size: int, name: str) -> Pairs:
    """Costs rounded down to float64 that holds all their sums.

    Raises
    ------
    InputError
        Too many contents.
    """
    experts = len(alone)
    if comb(experts, size) > MOST_CONTENTS:
        raise InputError(f"{name}: pi", f"{comb(experts, size)} contents of a rank", f"at most {MOST_CONTENTS}")
    size_of_all = sum(map(abs, alone)) + sum(abs(cost) for i, row in enumerate(together) for cost in row[:i])
    bits = max(UNIT_BITS, size_of_all.bit_length() - EXACT_BITS)
    alone_E, pair_EE = np.array([cost >> bits for cost in alone], np.float64), np.zeros((experts, experts))
    for i, row in enumerate(together):
        pair_EE[i, :i] = [cost >> bits for cost in row[:i]]
    return Pairs(alone_E, pair_EE, size, bits)


def least_content(pairs: Pairs, above: Above) -> int:
    """The least that any content costs, by pairs and by what it takes above them; rounded down."""
    least, most = np.inf, 1 << WORD_BITS
    extra_T = np.zeros(above.steps, np.int64)
    for cost_AB, left_AS, right_BS in pairs.blocks():
        cheap = np.argpartition(cost_AB, min(FIRST, cost_AB.size) - 1, axis=None)[:FIRST]
        rows, columns = np.divmod(cheap, len(right_BS))
        extra_NT = above(np.hstack([left_AS[rows], right_BS[columns]]), np.arange(above.steps), pairs.bits)
        least = min(least, float(cost_AB[rows, columns].min()))
        most = min(most, int((cost_AB[rows, columns].astype(np.int64) + extra_NT.sum(axis=1)).min()))
        extra_T += extra_NT.sum(axis=0)
    if pairs.count(most) > MOST_STEPWISE:
        low, high = int(least), most
        for _ in range(HALVINGS):
            most = (low + high) // 2
            low, high = (low, most) if pairs.count(most) > MOST_STEPWISE else (most, high)
        most = low
    blocks = np.array_split(np.argsort(-extra_T), -(-above.steps // BLOCK))  # those first that say most
    for cost_N, all_NS in pairs.below(most):
        net_N, members_NS = cost_N.astype(np.int64), all_NS
        for steps_B in blocks:
            net_N += above(members_NS, steps_B, pairs.bits).sum(axis=1)
            members_NS, net_N = members_NS[net_N < most], net_N[net_N < most]
        most = int(net_N.min(initial=most))
    return most << pairs.bits


@dataclass(frozen=True, eq=False)
class Above:
    """What contents of rank g take at every step, or the step's floor, above the planes that their multipliers chose.

    mu_TKE: multipliers. planes, factor: of the rank, as a certificate states them.
    """

    case: Case
    g: int
    planes: list[list[int]]
    factor: int
    mu_TKE: IntArray

    @property
    def steps(self) -> int:
        """T, steps."""
        return len(self.mu_TKE)

    def __call__(self, members_NS: NDArray[np.int64], steps_B: NDArray[np.int64], bits: int) -> IntArray:
        """[N, B] of contents [N, S] at some steps, never negative, rounded down to units of 2^bits."""
        loads_FEB = self.case.loads_FTE[:, steps_B].transpose(0, 2, 1).astype(np.float64)
        mu_KEB = self.mu_TKE[steps_B].transpose(1, 2, 0).astype(np.float64)
        longest_ps = min(1 << 38, (1 << WORD_BITS + bits - UNIT_BITS) // (UNIT * self.steps))  # more counts as this
        out_NB, count = np.zeros((len(members_NS), len(steps_B)), np.int64), max(1, BATCH // max(1, len(steps_B)))
        for first in range(0, len(members_NS), count):
            held_NE = _held(mu_KEB.shape[1], members_NS[first : first + count])
            times_NB, planes_KNB = self._take((held_NE @ loads_FEB).astype(np.int64))
            times_NB = np.maximum(times_NB, self.case.floors_T[steps_B])
            for plane_NB, mu_EB in zip(planes_KNB, mu_KEB, strict=True):
                over_NB = np.clip(times_NB - plane_NB, 0, longest_ps)
                out_NB[first : first + count] += ((held_NE @ mu_EB).astype(np.int64) * over_NB) >> bits - UNIT_BITS
        return out_NB

    def _take(self, loads_FNB: IntArray) -> tuple[IntArray, list[IntArray]]:
        """Whole picoseconds that the rank takes at least, and that each plane says at most."""
        if len(loads_FNB) == 1:
            times, planes = self._tables
            return times[loads_FNB[0]], [plane[loads_FNB[0]] for plane in planes]
        return self._computed(loads_FNB)

    @cached_property
    def _tables(self) -> tuple[IntArray, list[IntArray]]:
        return self._computed(np.arange(int(self.case.most_F[0]) + 1)[None])

    def _computed(self, loads_FN: IntArray) -> tuple[IntArray, list[IntArray]]:
        times, planes = self.case.floor_ps(self.case.times_us(self.g, loads_FN)), []
        scale = self.factor / UNIT**2
        for intercept, *slopes in self.planes:
            parts = [slope * scale * loads for slope, loads in zip(slopes, loads_FN, strict=True)]
            size = sum(map(np.abs, parts)) + abs(intercept * scale)
            most_N = sum(parts) + intercept * scale + SAFE * size
            planes.append(np.ceil(np.clip(most_N, -(2.0**WORD_BITS), 2.0**WORD_BITS)).astype(np.int64))
        return times, planes


def _sets(experts: int, size: int) -> NDArray[np.int64]:
    """[N, size] all sets of so many of the first experts."""
    return np.array(list(combinations(range(experts), size)), np.int64).reshape(comb(experts, size), size)


def _held(experts: int, sets_NS: NDArray[np.int64]) -> Floats:
    """[N, experts] ones where an expert is in a set."""
    held_NE = np.zeros((len(sets_NS), experts))
    np.put_along_axis(held_NE, sets_NS, 1.0, axis=1)
    return held_NE

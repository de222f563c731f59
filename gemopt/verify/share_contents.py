"""What multipliers over the contents of ranks prove where copies share evenly, in whole numbers.

The formula is that of docs/bounds.md. Multipliers are in 2^-24, times in picoseconds, prices and costs in 2^-12
picoseconds. What an expert brings to each of its c ranks is rounded so that the bound falls: its share of the
assignments and of its multipliers down, that of its price up.
"""

from __future__ import annotations

from math import comb
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.certificate import IntArray
from gemopt.compiling import njit
from gemopt.verify.case import Case
from gemopt.verify.scan import in_blocks, least_with

Array = NDArray[Any]
MOST_ENTRIES = 1e10  # contents of one rank x steps
MOST_PAIRS = 4096  # of an expert and its copies
FITS = 4e18  # in 63 bits
LONGEST_PS = 1 << 38  # above the floors: what takes longer counts as this long


def shared(case: Case) -> bool:
    """Whether contents are few enough to look at each, and shares even."""
    if case.split != "even" or len(case.cost.features) != 1:
        return False
    most = min(int((case.slots_G > 0).sum()), case.spare + 1)
    ways = [1] + [0] * case.spare  # to give one to `most` copies to each of some experts, by the copies beyond one
    contents = 1
    for size in range(1, int(case.slots_G.max()) + 1):
        ways = [sum(ways[max(0, n - most + 1) : n + 1]) for n in range(case.spare + 1)]
        contents += sum(ways) * comb(case.counts_TE.shape[1], size)
    few = case.counts_TE.shape[1] * most <= MOST_PAIRS
    return few and contents * len(case.counts_TE) <= MOST_ENTRIES


class Range(NamedTuple):
    """What is asked of the copies of each expert: from low to high [E]."""

    low_E: IntArray
    high_E: IntArray


class PricedRange(NamedTuple):
    """What multipliers prove of a range: the total, of which each kind of ranks has the least; 2^-bits picoseconds."""

    within: Range
    mu_ET: IntArray
    price_E: IntArray
    total: int
    least_K: list[int]


def everything(case: Case) -> Range:
    """All numbers of copies."""
    low_E = np.ones(case.counts_TE.shape[1], np.int64)
    return Range(low_E, low_E * most_copies(case))


def most_copies(case: Case) -> int:
    """Of one expert."""
    return min(int((case.slots_G > 0).sum()), case.spare + 1)


def covered(case: Case, within: Range, ranges: list[Range]) -> bool:
    """Whether all numbers of copies within a range, for which there are slots, are in one of the others."""
    if (within.low_E > within.high_E).any() or (within.low_E - 1).sum() > case.spare:
        return True
    near = [r for r in ranges if (r.low_E <= within.high_E).all() and (r.high_E >= within.low_E).all()]
    if not near:
        return False
    low_E, high_E = within
    other = near[0]
    for e in range(len(low_E)):
        for last in (int(other.low_E[e]) - 1, int(other.high_E[e])):  # of the copies on one side of its edge
            if low_E[e] <= last < high_E[e]:
                below, above = high_E.copy(), low_E.copy()
                below[e], above[e] = last, last + 1
                return covered(case, Range(low_E, below), near) and covered(case, Range(above, high_E), near)
    return True


def priced_range(
    case: Case, kinds: list[list[int]], floor_T: IntArray, mu_ET: IntArray, price_E: IntArray, bits: int, within: Range
) -> PricedRange:
    """What the contents of a range cost at least, less their prices; rounded down."""
    nothing = np.zeros((0, 0), np.int64)
    least_K = [_scanned(case, g[0], floor_T, mu_ET, price_E, bits, within, None, nothing)[0] for g in kinds]
    total = (int(floor_T.sum()) << bits) + sum(int(price) for price in price_E)
    total += sum(len(group) * least for group, least in zip(kinds, least_K, strict=True))
    return PricedRange(within, mu_ET, price_E, total, least_K)


def shares_left(
    case: Case, g: int, floor_T: IntArray, mu_ET: IntArray, price_E: IntArray, bits: int, within: Range, most: int,
    number: int,
) -> tuple[IntArray, IntArray] | None:  # fmt: skip
    """(copies [n, E] of the experts in contents that cost at most so much, 0 of others; what they cost [n]).

    None where there are more than `number`.
    """
    out = np.zeros((number, len(price_E) + 1), np.int64)
    _, found = _scanned(case, g, floor_T, mu_ET, price_E, bits, within, most, out)
    return None if found > number else (out[:found, :-1], out[:found, -1])


def _scanned(
    case: Case, g: int, floor_T: IntArray, mu_ET: IntArray, price_E: IntArray, bits: int, within: Range,
    limit: int | None, out: IntArray,
) -> tuple[int, int]:  # fmt: skip
    """(the least, how many cost at most `limit`, which `out` lists)."""
    most = most_copies(case)
    copies_C = np.arange(1, most + 1)
    shares_XT = (case.counts_TE.T[:, None] // copies_C[:, None]).reshape(-1, len(floor_T))
    load_XT = case.cost.features[0].of(shares_XT).astype(np.int64)
    mass_XT = (mu_ET[:, None] // copies_C[:, None]).reshape(-1, len(floor_T))
    price_X = -(-price_E[:, None] // copies_C).reshape(-1)
    times_N = case.floor_ps(case.times_us(g, np.arange(int(case.most_F[0]) + 1)[None], low=True))
    times_N = np.minimum(times_N, int(floor_T.min()) + min(LONGEST_PS, (1 << 49) // len(floor_T)))
    load_XBW, mass_XBW, table_N, floor_BW, shift = in_blocks(load_XT, mass_XT, times_N, floor_T, bits)
    slots = int(case.slots_G[g])
    alone_X, both_XX = _by_pairs(load_XT, mass_XT, price_X, table_N, floor_BW.reshape(-1)[: len(floor_T)], slots, shift)
    found = _least(
        load_XBW, mass_XBW, price_X, table_N, floor_BW, most, slots, case.spare, shift, within.low_E, within.high_E,
        (1 << 62) if limit is None else limit, alone_X, both_XX, out,
    )  # fmt: skip
    return int(found[0]), int(found[1])


def _by_pairs(
    load_XT: IntArray, mass_XT: IntArray, price_X: IntArray, table_N: NDArray[np.float64],
    floor_T: NDArray[np.float64], slots: int, shift: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:  # fmt: skip
    """(alone [X], both [X, X]): sums of these of what a content holds are below what it costs, less its prices.

    From a line below all times, of which what is below a floor counts as well. In float64: what sums round, and a unit
    for rounding down, is taken off each alone.
    """
    loads, mass_XT = np.arange(len(table_N)), mass_XT.astype(np.float64)
    slope = (table_N[-1] - table_N[0]) / max(len(table_N) - 1, 1)
    above_T = (table_N - slope * loads).min() - floor_T
    one_XX = slope * (mass_XT @ load_XT.T.astype(np.float64)) * 2.0**-shift
    alone_X = (mass_XT @ above_T) * 2.0**-shift + one_XX.diagonal() - price_X
    size = (mass_XT @ np.abs(above_T)).max() * 2.0**-shift + slots * np.abs(one_XX).max() + np.abs(price_X).max()
    size += float(np.abs(table_N).max()) * mass_XT.sum(axis=1).max() * 2.0**-shift  # of the line's start, rounded
    return alone_X - 1 - (len(floor_T) + 1000) * 2.0**-52 * size, one_XX + one_XX.T


@njit(nogil=True, fastmath={"reassoc", "nsz"})
def _least(
    load_XBW: Array, mass_XBW: Array, price_X: Array, table_N: Array, floor_BW: Array, most: int, slots: int,
    spare: int, shift: int, low_E: Array, high_E: Array, limit: int, alone_X: Array, both_XX: Array, out: Array,
) -> tuple[np.int64, int]:  # fmt: skip
    """Pairs of an expert and its copies, number `e most + c - 1`, are added in rising order of the experts.

    A content with so many slots empty leaves that many fewer for copies, and so do experts whose least is above one.
    With room in `out` those that cost at most `limit` are listed, in place of the least. Steps are looked at only where
    pairs alone do not cost too much.
    """
    pairs, blocks, width = load_XBW.shape
    deepest = min(slots, pairs // most)
    load_SBW, mass_SBW = np.zeros((deepest + 1, blocks, width), np.int64), np.zeros((deepest + 1, blocks, width))
    price_S, extra_S = np.zeros(deepest + 1, np.int64), np.zeros(deepest + 1, np.int64)
    next_S, above_W, size, found = np.zeros(deepest + 1, np.int64), np.empty(width), 0, 0
    trail_S, listing, sum_S = np.zeros(deepest + 1, np.int64), len(out) > 0, np.zeros(deepest + 1)
    made = 0  # of the sums, so many are those of the trail
    extra_S[0] = (low_E - 1).sum()
    least = np.int64(1) << 62
    if extra_S[0] + slots <= spare:
        least = np.int64(0)
        if listing and limit >= 0:
            found = 1
    while size >= 0:
        x = next_S[size]
        if x == pairs or size == deepest:
            size -= 1
            continue
        next_S[size] += 1
        e, c = x // most, x % most + 1
        extra = extra_S[size] + c - low_E[e]
        if extra > spare or c < low_E[e] or c > high_E[e]:
            continue
        price, total = price_S[size] + price_X[x], sum_S[size] + alone_X[x]
        for s in range(size):
            total += both_XX[x, trail_S[s]]
        trail_S[size], made = x, min(made, size)
        known = np.int64(limit) + 1 if listing else least
        high = total > -FITS and total < FITS and np.int64(np.floor(total)) >= known
        if extra + slots - size - 1 <= spare and not high:
            for s in range(made, size):
                load_SBW[s + 1] = load_SBW[s] + load_XBW[trail_S[s]]
                mass_SBW[s + 1] = mass_SBW[s] + mass_XBW[trail_S[s]]
            made = size
            cost = least_with(
                load_SBW[size], load_XBW[x], mass_SBW[size], mass_XBW[x], table_N, floor_BW, above_W, shift, price,
                known,
            )  # fmt: skip
            least = min(least, cost)
            if listing and cost <= limit:
                if found < len(out):
                    for s in range(size + 1):
                        out[found, trail_S[s] // most] = trail_S[s] % most + 1
                    out[found, -1] = cost
                found += 1
        price_S[size + 1], extra_S[size + 1], sum_S[size + 1] = price, extra, total
        next_S[size + 1] = (e + 1) * most
        size += 1
    return least, found

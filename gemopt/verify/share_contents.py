"""What multipliers over the contents of ranks prove where copies share evenly, in whole numbers.

The formula is that of docs/certificates.md. Multipliers are in 2^-24, times in picoseconds, prices and costs in 2^-12
picoseconds. What an expert brings to each of its c ranks is rounded so that the bound falls: its share of the
assignments and of its multipliers down, that of its price up.
"""

from __future__ import annotations

from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gemopt.certificate import UNIT, IntArray
from gemopt.verify.scan import least_with

if TYPE_CHECKING:
    from gemopt.verify import Case

Array = NDArray[Any]
BLOCK = 64  # steps looked at together
EXACT_BITS = 53
MOST_ENTRIES = 1e10  # contents of one rank x steps
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
    return contents * len(case.counts_TE) <= MOST_ENTRIES


def least_shares(case: Case, g: int, floor_T: IntArray, mu_ET: IntArray, price_E: IntArray, bits: int) -> int:
    """The least of what contents of rank g cost, less their prices, in 2^-bits picoseconds; rounded down."""
    most = min(int((case.slots_G > 0).sum()), case.spare + 1)
    copies_C = np.arange(1, most + 1)
    shares_XT = (case.counts_TE.T[:, None] // copies_C[:, None]).reshape(-1, len(floor_T))
    load_XT = case.cost.features[0].of(shares_XT).astype(np.int64)
    mass_XT = (mu_ET[:, None] // copies_C[:, None]).reshape(-1, len(floor_T))
    price_X = -(-price_E[:, None] // copies_C).reshape(-1)
    times_N = case.floor_ps(case.times_us(g, np.arange(int(case.most_F[0]) + 1)[None], low=True))
    times_N = np.minimum(times_N, int(floor_T.min()) + min(LONGEST_PS, (1 << 49) // len(floor_T)))
    highest = int(np.maximum(times_N.max() - floor_T, 1).sum())
    mass_bits = UNIT.bit_length() - 1
    coarse = max(0, highest.bit_length() + mass_bits + 1 - EXACT_BITS)  # times are rounded down to 2^coarse
    filled = -len(floor_T) % BLOCK
    load_XBW = np.pad(load_XT, [(0, 0), (0, filled)]).reshape(len(load_XT), -1, BLOCK)
    mass_XBW = np.pad(mass_XT.astype(np.float64), [(0, 0), (0, filled)]).reshape(load_XBW.shape)
    floor_BW = np.pad((-(-floor_T >> coarse)).astype(np.float64), (0, filled)).reshape(load_XBW.shape[1:])
    table_N = (times_N >> coarse).astype(np.float64)
    slots, shift = int(case.slots_G[g]), mass_bits - bits - coarse
    return int(_least(load_XBW, mass_XBW, price_X, table_N, floor_BW, most, slots, case.spare, shift))


@njit(cache=True, nogil=True, fastmath={"reassoc", "nsz"})
def _least(
    load_XBW: Array, mass_XBW: Array, price_X: Array, table_N: Array, floor_BW: Array, most: int, slots: int,
    spare: int, shift: int,
) -> np.int64:  # fmt: skip
    """Pairs of an expert and its copies, number `e most + c - 1`, are added in rising order of the experts.

    A content with so many slots empty leaves that many fewer for copies.
    """
    pairs, blocks, width = load_XBW.shape
    deepest = min(slots, pairs // most)
    load_SBW, mass_SBW = np.zeros((deepest + 1, blocks, width), np.int64), np.zeros((deepest + 1, blocks, width))
    price_S, extra_S = np.zeros(deepest + 1, np.int64), np.zeros(deepest + 1, np.int64)
    next_S, above_W, size = np.zeros(deepest + 1, np.int64), np.empty(width), 0
    least = np.int64(0) if slots <= spare else np.int64(1) << 62
    while size >= 0:
        x = next_S[size]
        if x == pairs or size == deepest:
            size -= 1
            continue
        next_S[size] += 1
        extra = extra_S[size] + x % most
        if extra > spare:
            continue
        price = price_S[size] + price_X[x]
        if extra + slots - size - 1 <= spare:
            least = least_with(
                load_SBW[size], load_XBW[x], mass_SBW[size], mass_XBW[x], table_N, floor_BW, above_W, shift, price,
                least,
            )  # fmt: skip
        if size + 1 < deepest:
            load_SBW[size + 1] = load_SBW[size] + load_XBW[x]
            mass_SBW[size + 1] = mass_SBW[size] + mass_XBW[x]
        price_S[size + 1], extra_S[size + 1] = price, extra
        next_S[size + 1] = (x // most + 1) * most
        size += 1
    return least

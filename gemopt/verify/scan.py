"""The least that any content of a rank costs, step by step: all of them, where they are too many to list.

Costs are sums of products of whole numbers in float64, below 2^53 in all, so that no order of adding rounds anything.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.certificate import UNIT, IntArray
from gemopt.compiling import njit

Array = NDArray[Any]
BLOCK = 64  # steps looked at together
EXACT_BITS = 53
MASS_BITS = UNIT.bit_length() - 1


def least_content(
    loads_TE: IntArray, times_N: IntArray, floor_T: IntArray, mu_ET: IntArray, price_E: IntArray, size: int, bits: int
) -> int:
    """The least of what contents of `size` experts cost, less their prices, in 2^-bits picoseconds; rounded down.

    times_N: whole picoseconds under every load. floor_T: whole picoseconds that do not count. mu_ET: multipliers in
    2^-24. price_E: in 2^-bits picoseconds.
    """
    loads_ET = np.ascontiguousarray(loads_TE.T)
    loads_EBW, mass_EBW, table_N, floor_BW, shift = in_blocks(loads_ET, mu_ET, times_N, floor_T, bits)
    return int(_least(loads_EBW, mass_EBW, table_N, floor_BW, price_E, size, shift))


def in_blocks(
    load_XT: IntArray, mass_XT: IntArray, times_N: IntArray, floor_T: IntArray, bits: int
) -> tuple[Array, Array, Array, Array, int]:
    """(loads, multipliers [X, B, W], times [N], floors [B, W], shift) in blocks of W steps, whole numbers in float64.

    Times are rounded down to what float64 sums exactly; such sums, shifted right, are in 2^-bits picoseconds.
    """
    highest = int(np.maximum(times_N.max() - floor_T, 1).sum())
    coarse = max(0, highest.bit_length() + MASS_BITS + 1 - EXACT_BITS)  # times are rounded down to 2^coarse
    filled = -len(floor_T) % BLOCK
    load_XBW = np.pad(load_XT, [(0, 0), (0, filled)]).reshape(len(load_XT), -1, BLOCK)
    mass_XBW = np.pad(mass_XT.astype(np.float64), [(0, 0), (0, filled)]).reshape(load_XBW.shape)
    floor_BW = np.pad((-(-floor_T >> coarse)).astype(np.float64), (0, filled)).reshape(load_XBW.shape[1:])
    return load_XBW, mass_XBW, (times_N >> coarse).astype(np.float64), floor_BW, MASS_BITS - bits - coarse


@njit(inline="always")
def least_with(
    load_BW: Array, more_BW: Array, mass_BW: Array, with_BW: Array, table_N: Array, floor_BW: Array, above_W: Array,
    shift: int, price: np.int64, least: np.int64,
) -> np.int64:  # fmt: skip
    """`least`, or what a content with one more expert costs less its price, if that is less. above_W: for one block."""
    total, cost = 0.0, np.int64(0)
    blocks, width = floor_BW.shape
    for b in range(blocks):
        load_W, more_W, floor_W = load_BW[b], more_BW[b], floor_BW[b]
        mass_W, with_W = mass_BW[b], with_BW[b]
        for t in range(width):
            above_W[t] = table_N[load_W[t] + more_W[t]]
        part = 0.0
        for t in range(width):
            part += (mass_W[t] + with_W[t]) * max(0.0, above_W[t] - floor_W[t])
        total += part
        cost = np.int64(total) >> shift if shift >= 0 else np.int64(total) << -shift
        if cost - price >= least:
            break
    return min(least, cost - price)


@njit(nogil=True, fastmath={"reassoc", "nsz"})
def _least(
    loads_EBW: Array, mass_EBW: Array, table_N: Array, floor_BW: Array, price_E: Array, size: int, shift: int
) -> np.int64:
    """Experts are taken in rising order; the last one by itself, on top of the sums of those before it."""
    experts, blocks, width = loads_EBW.shape
    load_SBW, mass_SBW = np.zeros((size, blocks, width), np.int64), np.zeros((size, blocks, width))
    price_S, chosen_S = np.zeros(size, np.int64), np.arange(size)
    least, changed, above_W = np.int64(1) << 62, 0, np.empty(width)
    while True:
        for s in range(changed, size - 1):
            e = chosen_S[s]
            price_S[s + 1] = price_S[s] + price_E[e]
            load_SBW[s + 1] = load_SBW[s] + loads_EBW[e]
            mass_SBW[s + 1] = mass_SBW[s] + mass_EBW[e]
        first = chosen_S[size - 2] + 1 if size > 1 else 0
        for e in range(first, experts):
            price, last = price_S[size - 1] + price_E[e], size - 1
            least = least_with(
                load_SBW[last], loads_EBW[e], mass_SBW[last], mass_EBW[e], table_N, floor_BW, above_W, shift, price,
                least,
            )  # fmt: skip
        changed = size - 2
        while changed >= 0 and chosen_S[changed] == experts - size + changed:
            changed -= 1
        if changed < 0:
            return least
        chosen_S[changed] += 1
        for s in range(changed + 1, size - 1):
            chosen_S[s] = chosen_S[s - 1] + 1

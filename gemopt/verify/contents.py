"""The least that any content of a rank costs, by pairs of experts: all of them are priced, in whole numbers.

Halves of contents are put together by products of matrices. These are of float64, but all their sums are whole numbers
below 2^52, so that they round nothing.
"""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError

EXACT_BITS = 51  # of all costs together: what they have more is rounded down
MOST_CONTENTS = 100_000_000

Floats = NDArray[np.float64]


def least_content(alone: list[int], together: list[list[int]], size: int, name: str) -> int:
    """Least sum over so many experts of what each costs alone and, for j < i, `together[i][j]`; rounded down.

    Raises
    ------
    InputError
        Too many contents.
    """
    experts, middle = len(alone), len(alone) // 2
    if comb(experts, size) > MOST_CONTENTS:
        raise InputError(f"{name}: pi", f"{comb(experts, size)} contents of a rank", f"at most {MOST_CONTENTS}")
    size_of_all = sum(map(abs, alone)) + sum(abs(cost) for i, row in enumerate(together) for cost in row[:i])
    bits = max(0, size_of_all.bit_length() - EXACT_BITS)
    alone_E, pair_EE = np.array([cost >> bits for cost in alone], np.float64), np.zeros((experts, experts))
    for i, row in enumerate(together):
        pair_EE[i, :i] = [cost >> bits for cost in row[:i]]
    least = np.inf
    for mine in range(max(0, size - (experts - middle)), min(middle, size) + 1):
        left_AE, right_BE = _sets(middle, mine), _sets(experts - middle, size - mine)
        left_A = left_AE @ alone_E[:middle] + ((left_AE @ pair_EE[:middle, :middle]) * left_AE).sum(axis=1)
        right_B = right_BE @ alone_E[middle:] + ((right_BE @ pair_EE[middle:, middle:]) * right_BE).sum(axis=1)
        cost_AB = left_AE @ pair_EE[middle:, :middle].T @ right_BE.T
        cost_AB += left_A[:, None]
        cost_AB += right_B
        least = min(least, float(cost_AB.min()))
    return int(least) << bits


def _sets(experts: int, size: int) -> Floats:
    """[N, experts] ones where an expert is in a set, of all sets of so many."""
    held_NE = np.zeros((comb(experts, size), experts))
    members = np.array(list(combinations(range(experts), size)), np.int64).reshape(len(held_NE), size)
    np.put_along_axis(held_NE, members, 1.0, axis=1)
    return held_NE

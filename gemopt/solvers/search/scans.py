"""The best swap of two ranks beyond the price of its moves: a scan of all of them, most of which are ruled out."""

from __future__ import annotations

import numpy as np

from gemopt.compiling import njit
from gemopt.kernels import NO
from gemopt.solvers.search.gains import (
    BLOCK,
    LINE,
    ROOFLINE,
    TABLE,
    Pair,
    allowed,
    form_of,
    general_block,
    line_block,
    roofline_block,
    table_block,
)
from gemopt.solvers.search.state import Array, Costs, State
from gemopt.solvers.search.swaps import set_limits
from gemopt.solvers.search.terms import Terms, extra_moves, permitted

ROUNDING = 1e-9  # of the cost: far more than what the order of a few sums in float64 changes


@njit(nogil=True, inline="always")
def scan_pair(
    costs: Costs, state: State, a: int, b: int, pair: Pair, terms: Terms, moved_G: Array, best: Array, slots: Array
) -> None:
    """Raise `best[0]`, the largest net gain so far, and set `slots` to (a, b, i, j) where a swap of the pair has it.

    `pair.tilt` and `pair.fees` must be of this pair: see `set_tilt`, `set_tangent` and `set_fees`.
    """
    current = set_limits(state, a, b, pair, NO)
    refund = terms.price * min(2, moved_G[a] + moved_G[b])
    if current - pair.rest[0] + refund > best[0]:
        scan_swaps(costs, state, a, b, pair, terms, moved_G, current, best, slots)


@njit(nogil=True, fastmath=True)
def scan_swaps(
    costs: Costs,
    state: State,
    a: int,
    b: int,
    pair: Pair,
    terms: Terms,
    moved_G: Array,
    current: float,
    best: Array,
    slots: Array,
) -> None:
    """`scan_pair`, whose cost is `current`, swap by swap."""
    convex, form, steps = not costs.use_tables, form_of(costs, state, a, b), state.items.shape[2]
    first, end, tilt, fees, stop = state.starts[b], state.starts[b + 1], pair.tilt, pair.fees, state.stop
    moved, top, high = moved_G.sum(), best[0], -np.inf
    for j in range(first, end):
        high = max(high, tilt[j] - fees[j])
    high += ROUNDING * current
    for i in range(state.starts[a], state.starts[a + 1]):
        if stop[0] != 0:
            return
        if convex and high - tilt[i] - fees[i] <= top:
            continue
        for j in range(first, end):
            paid = fees[i] + fees[j]
            if convex and tilt[j] - tilt[i] - paid <= top:
                continue
            goal = current - top - paid
            cost = 0.0
            for block in range(pair.limits.shape[0]):
                lo, hi = block * BLOCK, min(steps, (block + 1) * BLOCK)
                if form == LINE:
                    cost += np.float64(line_block(costs, state, a, b, i, j, pair, lo, hi))
                elif form == TABLE:
                    cost += np.float64(table_block(costs, state, a, b, i, j, pair, lo, hi))
                elif form == ROOFLINE:
                    cost += np.float64(roofline_block(costs, state, a, b, i, j, pair, lo, hi))
                else:
                    cost += general_block(costs, state, a, b, i, j, pair, lo, hi)
                if cost + pair.rest[block + 1] >= goal:
                    break
            else:  # asked last: the calls take longer than most sums
                into_a, into_b = extra_moves(state, terms, a, b, i, j)
                if permitted(terms, moved, moved_G, a, b, into_a, into_b) and allowed(state, a, b, i, j):
                    best[0] = top = current - cost - paid
                    slots[0], slots[1], slots[2], slots[3] = a, b, i, j

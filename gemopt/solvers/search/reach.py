"""What swaps of a pair of ranks gain at most, so that most pairs need not be searched again after every swap."""

from __future__ import annotations

import numpy as np

from gemopt.compiling import njit
from gemopt.solvers.search.gains import steepest
from gemopt.solvers.search.state import Array, Costs, Number, State


@njit(nogil=True)
def by_step(items_PFT: Array) -> Array:
    """[F, T, P] the same loads of slots, those of a step beside each other."""
    items_FTP = np.empty((*items_PFT.shape[1:], items_PFT.shape[0]), items_PFT.dtype)
    for p in range(items_PFT.shape[0]):
        put_slot(items_FTP, items_PFT, p)
    return items_FTP


@njit(nogil=True)
def put_slot(items_FTP: Array, items_PFT: Array, p: Number) -> None:
    """Fill in the loads of a slot."""
    for f in range(items_FTP.shape[0]):
        for t in range(items_FTP.shape[1]):
            items_FTP[f, t, p] = items_PFT[p, f, t]


@njit(nogil=True)
def pull_of(costs: Costs, state: State, ranks: Array, items_FTP: Array) -> Array:
    """[G, P] cost that what each slot holds adds to each rank, by its slope where it is slowest; 0 where tables say it.

    A swap of i from a and j from b gains at most `pull[a, i] - pull[b, i] - pull[a, j] + pull[b, j]`: its tangent.
    """
    num_ranks, features = state.times.shape[0], state.items.shape[1]
    slots, steps = state.items.shape[0], state.items.shape[2]
    pull_GP = np.zeros((num_ranks, slots))
    if costs.use_tables:
        return pull_GP
    slopes = np.zeros((features, steps))
    for t in range(steps):
        g = ranks[0, t]
        plane = steepest(costs, g, state.loads[g, :, t])
        for f in range(features):
            slopes[f, t] = costs.planes[g, plane, 1 + f] * state.weights[t]
    for f in range(features):
        for t in range(steps):
            slope, item_P, pull_P = slopes[f, t], items_FTP[f, t], pull_GP[ranks[0, t]]
            for p in range(item_P.shape[0]):  # SIMD
                pull_P[p] += slope * item_P[p]
    return pull_GP


@njit(nogil=True)
def lower_reach(reach: Array, starts: Array, pull_GP: Array, price_GP: Array) -> None:
    """Take into `reach` the most that the tangent lets a swap of each pair of ranks gain beyond the price of its moves.

    All pairs in one call, of few arrays: to call for one takes longer than its sums.
    """
    for a in range(reach.shape[0]):
        for b in range(a + 1, reach.shape[0]):
            low, high = np.inf, -np.inf
            for i in range(starts[a], starts[a + 1]):
                low = min(low, (pull_GP[b, i] - pull_GP[a, i]) + (price_GP[b, i] - price_GP[a, i]))
            for j in range(starts[b], starts[b + 1]):
                high = max(high, (pull_GP[b, j] - pull_GP[a, j]) - (price_GP[a, j] - price_GP[b, j]))
            reach[a, b] = min(reach[a, b], high - low)


@njit(nogil=True)
def set_tilt(starts: Array, pull_GP: Array, a: Number, b: Number, tilt: Array) -> None:
    """Fill in `Pair.tilt` for swaps between two ranks."""
    for rank in (a, b):
        for p in range(starts[rank], starts[rank + 1]):
            tilt[p] = pull_GP[b, p] - pull_GP[a, p]


@njit(nogil=True)
def extend(reach: Array, before: Array, who: Array, values: Array, ranks: Array, weights_T: Array) -> None:
    """Add to what swaps of each pair of ranks gain at most, since others became faster.

    reach: [G, G], a < b. before, who; values, ranks: [3, T] the three slowest ranks of each step, then and now. A pair
    that is as it was gains at most what it stands out by, and no more than before but for what it stands out further.
    """
    num_ranks, steps = reach.shape[0], weights_T.shape[0]
    for t in range(steps):
        c = ranks[0, t]
        for d in range(num_ranks):
            if d == c:
                continue
            now = values[0, t] - (values[2, t] if ranks[1, t] == d else values[1, t])
            was = np.float32(0.0)
            if who[0, t] == c or who[0, t] == d:
                second = who[1, t] == c or who[1, t] == d
                was = before[0, t] - (before[2, t] if second else before[1, t])
            if now > was:
                reach[min(c, d), max(c, d)] += np.float64(weights_T[t] * (now - was))


@njit(nogil=True)
def promising_pairs(state: State, values: Array, ranks: Array) -> Array:
    """Pairs `a * G + b` of ranks, a < b, those first whose being slowest costs most: only they can gain."""
    num_ranks, steps = state.times.shape
    lead_G = np.zeros(num_ranks, np.float64)
    for t in range(steps):
        lead_G[ranks[0, t]] += np.float64((values[0, t] - values[1, t]) * state.weights[t])
    pairs = np.empty(num_ranks * (num_ranks - 1) // 2, np.int64)
    keys = np.empty(len(pairs), np.float64)
    n = 0
    for a in range(num_ranks):
        for b in range(a + 1, num_ranks):
            pairs[n], keys[n] = a * num_ranks + b, -(lead_G[a] + lead_G[b])
            n += 1
    return pairs[np.argsort(keys)]

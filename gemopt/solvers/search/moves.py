"""Few moves from a placement in force: the best swap at a time, each paying for the experts that it moves.

A move is an expert that a rank receives and does not hold in the placement in force (`gemopt.migration.count_moves`);
swapping two experts is two moves, swapping them back refunds both. Swaps are taken best first, which makes the results
after 1, 2, 3, ... swaps a front of latency against moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemopt.compiling import njit
from gemopt.evaluate import loads, objective
from gemopt.kernels import ZERO, latency_value, put, rank_latencies
from gemopt.latency import Curves, FloatArray
from gemopt.migration import held
from gemopt.moves import Moves
from gemopt.placement import EMPTY
from gemopt.problem import Problem
from gemopt.solvers.base import Row
from gemopt.solvers.search.gains import Pair, make_pair
from gemopt.solvers.search.reach import by_step, extend, lower_reach, promising_pairs, pull_of, put_slot, set_tilt
from gemopt.solvers.search.scans import scan_pair
from gemopt.solvers.search.state import Array, Costs, Number, State, make_costs, make_state
from gemopt.solvers.search.swaps import apply_swap, fix_others, slowest_three, total_cost
from gemopt.solvers.search.terms import Terms, extra_moves, make_terms, moved_into, set_fees, set_prices
from gemopt.splits import static_shares

NOISE = 2e-6  # of the cost: float32 cannot tell a smaller gain
KEPT = 0.5  # a pair of ranks is searched for gains down to this part of the best so far, to be left alone for longer


@dataclass(frozen=True, eq=False)
class Waypoint:
    """A placement on the way: [P] row, its exact objective in microseconds, and experts moved from the start.

    weights: [P] static weights of its copies, where the walk began with some.
    """

    row: Row
    objective_us: float
    moves: int
    weights: FloatArray | None = None


def few_moves(
    problem: Problem,
    home: Row | NDArray[np.bool_],
    *,
    start: Row | None = None,
    price_us: float = 0.0,
    least_us: float = 0.0,
    max_moves: int | None = None,
    max_into_G: NDArray[np.int64] | None = None,
    max_swaps: int | None = None,
    costs: Costs | None = None,
    stop: NDArray[np.uint8] | None = None,
    weights_P: FloatArray | None = None,
) -> list[Waypoint]:
    """Waypoints from `start`, in the order of the swaps; the first is the start itself.

    Parameters
    ----------
    home, start
        [P] placement in force, from which moves are counted, and where to begin (`home` when None). Where ranks came or
        went, `home` is [G, E] whether each rank holds each expert, and `start` must be given.
    price_us
        Microseconds of the objective that a move must pay for.
    least_us
        Gain per swap below which nothing is done.
    max_moves, max_into_G
        Limits on the experts moved, in all and into each rank.
    max_swaps
        Swaps taken at most.
    costs
        `make_costs(problem)` when it is at hand.
    stop
        [1] ends the walk when it turns 1, as `Options.alarm` gives it.
    weights_P
        [P] static weights of the copies at the start. Copies take theirs along; they are the split then.
    """
    costs = make_costs(problem) if costs is None else costs
    row = np.asarray(home if start is None else start, dtype=np.int64)
    home_GE = np.asarray(home, dtype=np.bool_)
    if home.ndim == 1:
        home_GE = held(np.asarray(home, dtype=np.int64), problem.slots_per_rank, problem.num_experts)
    terms = make_terms(problem, Moves(home_GE, price_us, max_moves, max_into_G), least_us=least_us)
    shares_TP = None if weights_P is None else static_shares(problem.counts_TE, row, weights_P)
    state = make_state(problem, row, costs, stop, shares_TP)
    swaps = 4 * problem.num_slots if max_swaps is None else max_swaps
    room_SP, moved_S = np.empty((swaps, problem.num_slots), np.int64), np.empty(swaps, np.int64)
    taken = take_best(costs, state, terms, room_SP, moved_S)
    rows = np.concatenate([row[None], room_SP[:taken]])
    moved = [int(Moves(home_GE).into(row, problem.slots_per_rank).sum()), *moved_S[:taken].tolist()]
    weights = [None] * len(rows) if weights_P is None else carried(rows, weights_P)
    values = objectives(problem, rows, weights)
    return [Waypoint(row.copy(), *each) for row, *each in zip(rows, values, moved, weights, strict=True)]


def carried(rows_NP: NDArray[np.int64], weights_P: FloatArray) -> list[FloatArray | None]:
    """Weights of every row, each of which exchanges the contents of two slots of the one before."""
    found: list[FloatArray | None] = [weights_P]
    for before, after in zip(rows_NP, rows_NP[1:], strict=False):
        weights_P = weights_P.copy()
        changed = np.flatnonzero(before != after)
        weights_P[changed] = weights_P[changed[::-1]]
        found.append(weights_P)
    return found


def objectives(
    problem: Problem, rows_NP: NDArray[np.int64], weights_NP: Sequence[FloatArray | None] | None = None
) -> list[float]:
    """`objective` of every row; of rows that differ in few slots, without copies, only what changes is looked at.

    weights_NP: static weights of each row's copies, where they are not to be chosen.
    """
    if (np.bincount(rows_NP[0][rows_NP[0] != EMPTY], minlength=problem.num_experts) > 1).any():
        weights = [None] * len(rows_NP) if weights_NP is None else weights_NP
        return [objective(problem, *each) for each in zip(rows_NP, weights, strict=True)]
    times_NT = walk_makespans(
        loads(problem, rows_NP[0]), rows_NP, problem.rank_of_slot, problem.features_FTE, problem.curves
    )
    return [float((times_T * problem.weights_T).sum()) for times_T in times_NT]


@njit(nogil=True)
def walk_makespans(loads_TGF: Array, rows_NP: Array, rank_P: Array, features_FTE: Array, curves: Curves) -> Array:
    """[N, T] slowest rank under each row, given the loads of the first, which are changed on the way."""
    steps, ranks, features = loads_TGF.shape
    times_TG = rank_latencies(loads_TGF, curves)
    out = np.empty((rows_NP.shape[0], steps))
    touched = np.zeros(ranks, np.bool_)
    for n in range(rows_NP.shape[0]):
        touched[:] = False
        for p in range(rows_NP.shape[1]):
            before, after = rows_NP[max(n - 1, 0), p], rows_NP[n, p]
            if before == after:
                continue
            touched[rank_P[p]] = True
            for f in range(features):
                for t in range(steps):
                    gone = features_FTE[f, t, before] if before >= 0 else 0
                    come = features_FTE[f, t, after] if after >= 0 else 0
                    loads_TGF[t, rank_P[p], f] += come - gone
        for g in range(ranks):
            if touched[g]:
                for t in range(steps):
                    times_TG[t, g] = latency_value(g, loads_TGF[t, g], curves)
        for t in range(steps):
            worst = times_TG[t, 0]
            for g in range(1, ranks):
                worst = max(worst, times_TG[t, g])
            out[n, t] = worst
    return out


@njit(nogil=True)
def take_best(costs: Costs, state: State, terms: Terms, rows_SP: Array, moved_S: Array) -> int:
    """Take the best swap while one pays; fills in the placement and the moves after each, and returns how many."""
    num_ranks, steps = state.times.shape
    if num_ranks < 2:
        return 0
    values, ranks = np.empty((3, steps), np.float32), np.empty((3, steps), np.int16)
    slowest_three(state.times, values, ranks)
    pair = make_pair(state)
    reach = np.full((num_ranks, num_ranks), np.inf)
    slots = np.zeros(4, np.int64)
    moved_G, price_GP = moved_into(state, terms), np.empty((num_ranks, len(state.content)))
    set_prices(state.content, terms.home_GE, terms.price, ZERO, len(state.content), price_GP)
    items_FTP = by_step(state.items)
    taken = 0
    current = total_cost(state) + terms.price * moved_G.sum()
    while taken < rows_SP.shape[0] and state.stop[0] == 0:
        floor = max(terms.least, NOISE * abs(current - terms.price * moved_G.sum()))
        if terms.most < state.content.shape[0]:
            reach[:] = np.inf  # what a pair may do depends on what all others did
        best = find_best(costs, state, terms, moved_G, price_GP, items_FTP, floor, values, ranks, reach, pair, slots)
        if slots[0] < 0:
            break
        a, b, i, j = slots[0], slots[1], slots[2], slots[3]
        renewed = swap_for(costs, state, a, b, i, j, terms, moved_G, current, 0.5 * best)
        if renewed >= current:
            break
        current = renewed
        for p in (i, j):
            set_prices(state.content, terms.home_GE, terms.price, p, p + 1, price_GP)
            put_slot(items_FTP, state.items, p)
        before, who = values.copy(), ranks.copy()
        slowest_three(state.times, values, ranks)
        extend(reach, before, who, values, ranks, state.weights)
        reach[a], reach[:, a], reach[b], reach[:, b] = np.inf, np.inf, np.inf, np.inf
        put(rows_SP[taken], state.content)
        moved_S[taken] = moved_G.sum()
        taken += 1
    return taken


@njit(nogil=True)
def find_best(
    costs: Costs,
    state: State,
    terms: Terms,
    moved_G: Array,
    price_GP: Array,
    items_FTP: Array,
    floor: float,
    values: Array,
    ranks: Array,
    reach: Array,
    pair: Pair,
    slots: Array,
) -> Number:
    """Gain of the best swap, above `floor`; sets `slots` to its (a, b, i, j), -1 where there is none.

    reach: [G, G], a < b: no swap of the pair gains more; brought up to date.
    """
    best, num_ranks = floor, state.times.shape[0]
    here, found = np.zeros(4, np.int64), np.zeros(1, np.float64)
    slots[0] = -1
    order, pull_GP, starts = (
        promising_pairs(state, values, ranks),
        pull_of(costs, state, ranks, items_FTP),
        state.starts,
    )
    if not costs.use_tables:
        lower_reach(reach, starts, pull_GP, price_GP)
    for n in range(order.shape[0]):
        a, b = order[n] // num_ranks, order[n] % num_ranks
        if reach[a, b] <= best:
            continue
        fix_others(a, b, values, ranks, pair)
        set_tilt(starts, pull_GP, a, b, pair.tilt)
        set_fees(starts, price_GP, a, b, pair.fees)
        here[0], found[0] = -1, max(floor, KEPT * best)
        scan_pair(costs, state, a, b, pair, terms, moved_G, found, here)
        reach[a, b] = found[0]
        if here[0] >= 0 and found[0] > best:
            best = found[0]
            put(slots, here)
    return best


@njit(nogil=True)
def swap_for(
    costs: Costs,
    state: State,
    a: Number,
    b: Number,
    i: Number,
    j: Number,
    terms: Terms,
    moved_G: Array,
    current: float,
    gain: float,
) -> Number:
    """Swap where that gains at least so much of the current cost and price; returns what they are then.

    Float32 noise can make a swap look better than it is: it is taken back.
    """  # fmt: skip
    into_a, into_b = extra_moves(state, terms, a, b, i, j)
    apply_swap(costs, state, a, b, i, j)
    moved_G[a] += into_a
    moved_G[b] += into_b
    renewed = total_cost(state) + terms.price * moved_G.sum()
    if renewed < current - gain:
        return renewed
    apply_swap(costs, state, a, b, i, j)
    moved_G[a] -= into_a
    moved_G[b] -= into_b
    return current

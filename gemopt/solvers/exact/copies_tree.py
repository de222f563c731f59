"""Depth-first branch and bound over the sets of ranks that hold the experts, where slots are spare; exact to 1e-9.

A node has the first d experts placed, heaviest first; a child puts the next one on a set of ranks, where its copies
share evenly. Of the experts left, a rank with f free slots has at least f less the spare slots that are left to itself:
each of the others needs a slot elsewhere. With the smallest of them the slowest rank at every step, by the least of
any larger load (`Latency.low`), or the floor of the step, is a bound; a child is cut when it reaches the incumbent.

Of equal ranks that are still empty the first are taken first. Which copies take one assignment more follows from the
order of the ranks, so where any are equal a copy counts as the last of its expert's, and a complete placement is tried
with its equal ranks in every order. The worth of a placement is exact, sums over steps are float64.
"""

from __future__ import annotations

from itertools import permutations, product
from typing import NamedTuple

import numpy as np

from gemopt.compiling import njit
from gemopt.kernels import ZERO, put
from gemopt.problem import Problem
from gemopt.solvers.exact.tree import (
    CLOSE,
    FAST,
    ROOM,
    Array,
    Tables,
    expert_order,
    fill,
    first_equal,
    smallest_left,
    tables_of,
)
from gemopt.solvers.size import COPIED_RANKS

BLOCK = 128  # steps looked at together
MOST_RANKS = 62  # a set of ranks is a signed word of bits


class CopiesTree(NamedTuple):
    """One problem, its experts in the order of branching. Copy i of r is number `r (r - 1) / 2 + i` of all V.

    shares: [E, V, F, T] features of each copy. rest: [E + 1, S + 1, F, T] sums of the smallest of the experts from d
    on, whole. held: [M] sets of ranks, as bits; size: [M] their ranks; copy: [M, G] number of the copy of each rank in
    it. size_V: [V] copies of the expert. slots: [G]; same: [G] first rank that is equal; orders: [N, G] of equal ranks.
    weights, floor: [T]. exact, low: the latencies, and what no larger load falls below.
    """

    shares: Array
    rest: Array
    held: Array
    size: Array
    copy: Array
    size_V: Array
    slots: Array
    same: Array
    orders: Array
    weights: Array
    floor: Array
    exact: Tables
    low: Tables


def make_copies_tree(problem: Problem, floor_T: Array) -> CopiesTree | None:
    """The tree of a problem whose copies share evenly; None where ranks are too many, or loads too large for tables."""
    hosts, widest = np.flatnonzero(problem.slots_per_rank), int(problem.slots_per_rank.max())
    if len(hosts) > COPIED_RANKS or problem.num_ranks > MOST_RANKS:
        return None
    most_F = problem.features_FTE.sum(axis=2).max(axis=1)
    exact = tables_of(problem.latencies, most_F)
    low = tables_of(tuple(latency.low for latency in problem.latencies), most_F)
    most = problem.most_copies
    size_V = np.repeat(np.arange(1, most + 1), np.arange(1, most + 1))
    if exact is None or low is None or problem.features_FTE.size * max(len(size_V), widest + 1) > ROOM:
        return None
    counts_ET = problem.counts_TE[:, expert_order(problem)].T.astype(np.int64)
    shares = np.empty((len(counts_ET), len(size_V), len(problem.features), problem.num_steps), np.int32)
    for v, size in enumerate(size_V.tolist()):
        number = v - size * (size - 1) // 2
        for f, feature in enumerate(problem.features):
            shares[:, v, f] = feature.of((counts_ET + size - 1 - number) // size)
    same = first_equal(problem)
    alike = len(set(same[hosts].tolist())) < len(hosts)
    bits = [sum(1 << int(g) for g in hosts[list(chosen)]) for chosen in product([False, True], repeat=len(hosts))]
    held = np.array([each for each in bits if 0 < each.bit_count() <= most])
    inside = held[:, None] >> np.arange(problem.num_ranks) & 1
    size_M = inside.sum(axis=1)
    number_MG = size_M[:, None] - 1 if alike else np.cumsum(inside, axis=1) - 1
    copy = np.where(inside > 0, (size_M * (size_M - 1) // 2)[:, None] + number_MG, 0)
    return CopiesTree(
        shares, smallest_left(np.ascontiguousarray(shares[:, 0]), widest), held, size_M, copy, size_V,
        problem.slots_per_rank.astype(np.int64), same, _orders(problem), problem.weights_T, floor_T.copy(), exact, low,
    )  # fmt: skip


def _orders(problem: Problem) -> Array:
    """[N, G] all ways to put equal ranks that have slots into another order."""
    orders = []
    for chosen in product(*map(permutations, problem.kinds)):
        order = np.arange(problem.num_ranks)
        for group, other in zip(problem.kinds, chosen, strict=True):
            order[group] = other
        orders.append(order)
    return np.stack(orders)


@njit(nogil=True)
def fits(tree: CopiesTree, m: int, free: Array, spare: int) -> bool:
    """Whether a set of ranks has the slots, and of equal empty ranks the first."""
    if tree.size[m] - 1 > spare:
        return False
    for g in range(len(free)):
        if tree.held[m] >> g & 1:
            if free[g] == 0:
                return False
            for other in range(g):
                empty = free[g] == tree.slots[g] and free[other] == tree.slots[other]
                if tree.same[other] == tree.same[g] and empty and not tree.held[m] >> other & 1:
                    return False
    return True


@njit(nogil=True, fastmath=FAST)
def expand_sets(
    tree: CopiesTree, depth: int, loads: Array, free: Array, spare: int, limit: float, suffix: Array, bounds_M: Array
) -> None:
    """Raise the bounds of all children of a node below `limit` by their steps.

    suffix: [T + 1] sums of the node's own weighted bounds of the steps from t on.
    """
    ranks, steps, sets = len(free), len(tree.weights), len(bounds_M)
    nothing, whole = tree.rest[depth, 0], tree.rest.shape[1]
    kinds = whole + len(tree.size_V)  # of what a rank may hold: so many of the rest; a copy, and what fills the others
    kind = np.empty((sets, ranks), np.int64)
    for m in range(sets):
        for g in range(ranks):
            if tree.held[m] >> g & 1:
                kind[m, g] = whole + tree.copy[m, g]
            else:
                kind[m, g] = max(0, free[g] - (spare - tree.size[m] + 1))
    rows, then, total_M = np.empty((ranks, kinds, BLOCK)), np.empty(BLOCK), np.zeros(sets)
    for first in range(0, steps, BLOCK):
        asked, going = np.zeros((ranks, kinds), np.bool_), False
        for m in range(sets):
            if bounds_M[m] < limit:
                going = True
                for g in range(ranks):
                    asked[g, kind[m, g]] = True
        if not going:
            return
        last = min(first + BLOCK, steps)
        for g in range(ranks):
            for k in range(kinds):
                if asked[g, k]:
                    full, plus = k, nothing
                    if k >= whole:
                        full = max(0, free[g] - 1 - (spare - tree.size_V[k - whole] + 1))
                        plus = tree.shares[depth, k - whole]
                    fill(tree.low, g, loads[g], tree.rest[depth + 1, full], plus, first, last, rows[g, k])
        for m in range(sets):
            if bounds_M[m] < limit:
                for n in range(last - first):
                    then[n] = tree.floor[first + n]
                for g in range(ranks):
                    row = rows[g, kind[m, g]]
                    for n in range(last - first):
                        then[n] = max(then[n], row[n])
                for n in range(last - first):
                    total_M[m] += tree.weights[first + n] * then[n]
                bounds_M[m] = max(bounds_M[m], total_M[m] + suffix[last])


@njit(nogil=True, fastmath=FAST)
def sum_from(tree: CopiesTree, depth: int, loads: Array, free: Array, spare: int, suffix: Array) -> None:
    """The weighted bounds of a node's steps, summed from each on, into `suffix` [T + 1]."""
    nothing, steps = tree.rest[depth, 0], len(tree.weights)
    z, row = tree.floor.copy(), np.empty(steps)
    for g in range(len(free)):
        fill(tree.low, g, loads[g], tree.rest[depth, max(0, free[g] - spare)], nothing, 0, steps, row)
        for t in range(steps):
            z[t] = max(z[t], row[t])
    suffix[steps] = 0.0
    for t in range(steps - 1, -1, -1):
        suffix[t] = suffix[t + 1] + tree.weights[t] * z[t]


@njit(nogil=True, inline="always")
def add(loads: Array, shares: Array) -> None:
    """`loads += shares`, [F, T] each, without the text about shapes that do not fit; see `put`."""
    for f in range(loads.shape[0]):
        for t in range(loads.shape[1]):
            loads[f, t] += shares[f, t]


@njit(nogil=True, fastmath=FAST)
def best_order(tree: CopiesTree, trail: Array, limit: float, held_E: Array) -> float:
    """Worth of a complete placement in its best order of equal ranks, its sets into held_E; infinite from `limit`."""
    experts, ranks, steps = len(tree.shares), len(tree.slots), len(tree.weights)
    nothing, row, best = tree.rest[experts, 0], np.empty(steps), limit
    sets = np.zeros(experts, np.int64)
    for order in tree.orders:
        loads, z = np.zeros((ranks, *tree.shares.shape[2:]), np.int32), np.full(steps, -np.inf)
        for e in range(experts):
            sets[e], size, copy = 0, tree.size[trail[e]], 0
            for g in range(ranks):
                if tree.held[trail[e]] >> g & 1:
                    sets[e] |= 1 << order[g]
            for g in range(ranks):
                if sets[e] >> g & 1:
                    add(loads[g], tree.shares[e, size * (size - 1) // 2 + copy])
                    copy += 1
        for g in range(ranks):
            fill(tree.exact, g, loads[g], nothing, nothing, 0, steps, row)
            for t in range(steps):
                z[t] = max(z[t], row[t])
        value = 0.0
        for t in range(steps):
            value += tree.weights[t] * z[t]
        if value < best:
            best = value
            put(held_E, sets)
    return best if best < limit else np.inf


@njit(nogil=True)
def search_copies(tree: CopiesTree, best: float, best_E: Array, stop: Array) -> tuple[float, int, bool]:
    """(objective of the best placement found, nodes looked at, whether the whole tree was searched).

    best: objective of an incumbent; best_E: [E] sets of ranks of the experts in the tree's order, when better.
    """
    experts, steps, ranks, sets = len(tree.shares), len(tree.weights), len(tree.slots), len(tree.held)
    loads = np.zeros((experts + 1, ranks, *tree.shares.shape[2:]), np.int32)
    free, spare = np.zeros((experts + 1, ranks), np.int64), np.zeros(experts + 1, np.int64)
    bounds, suffix = np.full((experts, sets), np.inf), np.zeros((experts + 1, steps + 1))
    trail = np.zeros(experts, np.int64)
    put(free[0], tree.slots)
    spare[0] = tree.slots.sum() - experts
    sum_from(tree, ZERO, loads[0], free[0], spare[0], suffix[0])
    depth, nodes, fresh = ZERO, 0, True
    while depth >= 0:
        limit = best * (1 - CLOSE)
        if fresh:
            for m in range(sets):
                bounds[depth, m] = np.inf
                if fits(tree, m, free[depth], spare[depth]):
                    nodes += 1
                    bounds[depth, m] = suffix[depth, 0]
            expand_sets(tree, depth, loads[depth], free[depth], spare[depth], limit, suffix[depth], bounds[depth])
            fresh = False
            if stop[0] != 0:
                return best, nodes, False
        chosen = bounds[depth].argmin()
        if bounds[depth, chosen] >= limit:
            depth -= 1
            continue
        bounds[depth, chosen] = np.inf
        trail[depth] = chosen
        if depth + 1 == experts:
            best = min(best, best_order(tree, trail, limit, best_E))
            continue
        for g in range(ranks):
            for f in range(loads.shape[2]):
                put(loads[depth + 1, g, f], loads[depth, g, f])
        put(free[depth + 1], free[depth])
        spare[depth + 1] = spare[depth] - tree.size[chosen] + 1
        for g in range(ranks):
            if tree.held[chosen] >> g & 1:
                add(loads[depth + 1, g], tree.shares[depth, tree.copy[chosen, g]])
                free[depth + 1, g] -= 1
        depth += 1
        sum_from(tree, depth, loads[depth], free[depth], spare[depth], suffix[depth])
        fresh = True
    return best, nodes, True

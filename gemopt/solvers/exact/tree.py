"""Depth-first branch and bound over the ranks of the experts, heaviest first; compiled, exact to 1e-9.

A node has the first d experts placed. A child is cut when one of two bounds reaches the incumbent:

* Pairs: multipliers of the co-location programme make the objective of every placement at least a constant, a cost
  `alone[g, i]` of each expert on its rank and a cost `pair[g, i, j]` of each two on one rank (`dual_bound`). What is
  placed costs what it costs; each other expert at least its cheapest rank given what is there; each other pair at least
  its negative part. This takes no look at the steps.
* Steps: at every step a rank ends with at least its load and the smallest of the experts left that fill its slots. Its
  latency is then at least the least of any load that large (`Latency.low`). The slowest rank, or the floor of the step.

Of equal ranks that are still empty only the first is tried. Sums over steps are float64; a node is only cut when it is
within 1e-9 of the incumbent, far more than what rounding takes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.compiling import njit
from gemopt.kernels import MINUS, PLUS, ZERO
from gemopt.latency import FloatArray, Latency
from gemopt.problem import Problem

Array = NDArray[Any]
Number = Any  # what a compiled function returns, as far as a type checker can tell
TABLE_LIMIT = 1 << 20
CLOSE = 1e-9  # relative: a node this close to the incumbent is cut
BLOCK = 64  # steps looked at together
ROOM = 1 << 26  # entries of the sums of the smallest experts
PAIRS_ROOM = 1 << 22  # of what pairs of experts save on each rank
FAST = {"nnan", "nsz", "reassoc", "contract", "arcp"}  # infinity stays what it is


class Tables(NamedTuple):
    """Latencies at whole loads: values at `offset[g, k, f] + load`, summed over f, the largest over k < terms[g].

    straight, start, slope: [G, K, F] curves that are `start + slope load`, which is quicker than looking them up.
    """

    values: Array
    offset: Array
    terms: Array
    straight: Array
    start: Array
    slope: Array


class Node(NamedTuple):
    """Where the search is: loads [G, F, T], whole numbers; slots free, used [G].

    near: [E + 1, G, E] cost of each expert with those on a rank, for every depth anew, so that no error adds up.
    """

    loads: Array
    near: Array
    free: Array
    used: Array


class Tree(NamedTuple):
    """One problem, its experts in the order of branching.

    features: [E, F, T]; rest: [E + 1, S + 1, F, T] sums of the smallest of the experts from d on; slots: [G]; same: [G]
    first rank that is equal; weights, floor: [T]; exact, low: the latencies, and what no larger load falls below.
    fixed, alone [G, E], pair [G, E, E], left [E + 1]: the pair bound; left is what pairs of experts from d on may save.
    """

    features: Array
    rest: Array
    slots: Array
    same: Array
    weights: Array
    floor: Array
    exact: Tables
    low: Tables
    fixed: float
    alone: Array
    pair: Array
    left: Array


def tables_of(latencies: tuple[Latency, ...], most_F: Array) -> Tables | None:
    """Tables of the latencies for loads up to `most_F` [F]; None where they would be too large."""
    shape = (len(latencies), max(len(latency.terms) for latency in latencies), len(most_F))
    size = sum(int(most) + 1 for most in most_F)
    if size * shape[0] * shape[1] > TABLE_LIMIT:
        return None
    offset, straight = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
    start, slope = np.zeros(shape), np.zeros(shape)
    values: list[Array] = []
    position = 0
    for g, latency in enumerate(latencies):
        for k, term in enumerate(latency.terms):
            for f, curve in enumerate(term):
                offset[g, k, f] = position
                values.append(curve(np.arange(int(most_F[f]) + 1)))
                position += int(most_F[f]) + 1
                straight[g, k, f], start[g, k, f], slope[g, k, f] = curve.linear, curve.y[0], curve.slope
    terms = np.array([len(latency.terms) for latency in latencies])
    return Tables(np.concatenate(values), offset, terms, straight, start, slope)


def has_room(problem: Problem) -> bool:
    """Whether arrays of a tree without copies are of a size that a search of all placements is not hopeless for."""
    widest = int(problem.slots_per_rank.max())
    pairs = problem.num_ranks * problem.num_experts**2
    return problem.features_FTE.size * (widest + 1) <= ROOM and pairs <= PAIRS_ROOM


def make_tree(problem: Problem, floor_T: Array, pairs: tuple[float, Array, Array] | None) -> Tree | None:
    """The tree of a problem without spare slots; None where it, or its loads for tables, are too large.

    pairs: (fixed, alone [G, E], pair [G, E, E]) in the problem's order, as `pair_costs` gives them; None: unknown.
    """
    experts, ranks, features_FTE = problem.num_experts, problem.num_ranks, problem.features_FTE
    if not has_room(problem):
        return None
    most_F = features_FTE.sum(axis=2).max(axis=1)
    exact = tables_of(problem.latencies, most_F)
    low = tables_of(tuple(latency.low for latency in problem.latencies), most_F)
    widest = int(problem.slots_per_rank.max())
    if exact is None or low is None:
        return None
    order = expert_order(problem)
    features_EFT = np.ascontiguousarray(features_FTE[:, :, order].transpose(2, 0, 1))
    if pairs is None:
        pairs = -np.inf, np.zeros((ranks, experts)), np.zeros((ranks, experts, experts))
    fixed, alone_GE, pair_GEE = pairs
    pair_GEE = np.ascontiguousarray(pair_GEE[:, order][:, :, order])
    saved_EE = np.triu(np.minimum(pair_GEE.min(axis=0), 0.0), 1)
    left = np.array([saved_EE[d:, d:].sum() for d in range(experts + 1)])
    return Tree(
        features_EFT, smallest_left(features_EFT, widest), problem.slots_per_rank.astype(np.int64),
        first_equal(problem), problem.weights_T, floor_T.copy(), exact, low,
        fixed, np.ascontiguousarray(alone_GE[:, order]), pair_GEE, left,
    )  # fmt: skip


def expert_order(problem: Problem) -> Array:
    """[E] the experts in the order in which the tree places them: heaviest first."""
    return np.argsort(-(problem.counts_TE.T @ problem.weights_T), kind="stable")


def smallest_left(features_EFT: Array, most: int) -> Array:
    """[E + 1, most + 1, F, T] sums of so many of the smallest of the experts from d on, or of all."""
    experts = len(features_EFT)
    rest = np.zeros((experts + 1, most + 1, *features_EFT.shape[1:]), np.int32)
    for d in range(experts):
        smallest = np.sort(features_EFT[d:], axis=0)[:most]
        np.cumsum(smallest, axis=0, out=rest[d, 1 : len(smallest) + 1])
        rest[d, len(smallest) + 1 :] = rest[d, len(smallest)]
    return rest


def first_equal(problem: Problem) -> Array:
    """[G] the first rank that is equal to each."""
    same = np.arange(problem.num_ranks)
    for group in problem.equal_ranks:
        same[group] = group[0]
    return same


def with_idle(problem: Problem, floor_T: FloatArray) -> FloatArray:
    """[T] floors of the steps in microseconds, and no less than what ranks without slots take."""
    none_F = [0] * len(problem.features)
    idle = [float(problem.latencies[g](none_F)) for g in np.flatnonzero(problem.slots_per_rank == 0)]
    return np.maximum(floor_T, max(idle, default=0.0))


@njit(nogil=True, fastmath=FAST, inline="always")
def fill(tables: Tables, g: int, loads: Array, rest: Array, plus: Array, first: int, last: int, out: Array) -> None:
    """Latency of rank g at the steps from first to last under loads + rest + plus, [F, T] each, into `out`."""
    count = last - first
    for k in range(tables.terms[g]):
        term = out if k == 0 else np.empty(count)
        for n in range(count):
            term[n] = 0.0
        for f in range(len(loads)):
            if tables.straight[g, k, f]:
                start, slope = tables.start[g, k, f], tables.slope[g, k, f]
                for n in range(count):
                    t = first + n
                    term[n] += start + slope * (loads[f, t] + rest[f, t] + plus[f, t])
            else:
                offset = tables.offset[g, k, f]
                for n in range(count):
                    t = first + n
                    term[n] += tables.values[offset + loads[f, t] + rest[f, t] + plus[f, t]]
        if k > 0:
            for n in range(count):
                out[n] = max(out[n], term[n])


@njit(nogil=True, fastmath=FAST)
def expand(tree: Tree, depth: int, node: Node, limit: float, suffix: Array, bounds_G: Array, z_GT: Array) -> None:
    """Raise the bounds of all children of a node below `limit` by their steps; z becomes what each step has.

    suffix: [T + 1] sums of the node's own weighted bounds of the steps from t on.
    """
    ranks, steps, child = len(node.free), len(tree.weights), depth + 1
    now, then = np.empty((ranks, BLOCK)), np.empty(BLOCK)
    total_G, nothing, plus = np.zeros(ranks), tree.rest[child, 0], tree.features[depth]
    leaf = child == len(tree.features)
    for first in range(0, steps, BLOCK):
        going = False
        for g in range(ranks):
            going |= bounds_G[g] < limit
        if not going:
            return
        last = min(first + BLOCK, steps)
        for g in range(ranks):
            tables = tree.exact if node.free[g] == 0 else tree.low
            fill(tables, g, node.loads[g], tree.rest[child, node.free[g]], nothing, first, last, now[g])
        for g in range(ranks):
            if bounds_G[g] >= limit:
                continue
            tables = tree.exact if node.free[g] == 1 else tree.low
            fill(tables, g, node.loads[g], tree.rest[child, node.free[g] - 1], plus, first, last, then)
            for other in range(ranks):
                if other != g:
                    for n in range(last - first):
                        then[n] = max(then[n], now[other, n])
            total = 0.0
            for n in range(last - first):
                t = first + n
                value = then[n] if leaf else max(then[n], tree.floor[t])
                z_GT[g, t] = value
                total += tree.weights[t] * value
            total_G[g] += total
            bounds_G[g] = max(bounds_G[g], total_G[g] + suffix[last])


@njit(nogil=True)
def pair_bound(tree: Tree, depth: int, g: int, placed: float, node: Node) -> Number:
    """Bound by its pairs of the child that puts the expert of this depth on rank g; placed: what the node costs."""
    total = tree.fixed + placed + tree.left[depth + 1] + tree.alone[g, depth] + node.near[depth, g, depth]
    for i in range(depth + 1, node.near.shape[2]):
        cheapest = np.inf
        for h in range(len(node.free)):
            if node.free[h] > (h == g):
                cost = tree.alone[h, i] + node.near[depth, h, i]
                if h == g:
                    cost += tree.pair[g, depth, i]
                cheapest = min(cheapest, cost)
        total += cheapest
    return total


@njit(nogil=True)
def search_tree(tree: Tree, best: float, best_rank: Array, stop: Array) -> tuple[float, int, bool]:
    """(objective of the best placement found, nodes looked at, whether the whole tree was searched).

    best: objective of an incumbent; best_rank: [E] ranks of the experts in the tree's order, replaced when better.
    """
    experts, features, steps = tree.features.shape
    ranks = len(tree.slots)
    loads, near = np.zeros((ranks, features, steps), np.int32), np.zeros((experts + 1, ranks, experts))
    node = Node(loads, near, tree.slots.copy(), np.zeros(ranks, np.int64))
    rank, placed = np.full(experts, -1, np.int64), np.zeros(experts + 1)
    bounds, z = np.full((experts, ranks), np.inf), np.empty((experts, ranks, steps))
    suffix = np.zeros((experts + 1, steps + 1))
    for t in range(steps - 1, -1, -1):
        suffix[0, t] = suffix[0, t + 1] + tree.weights[t] * tree.floor[t]
    depth, nodes, fresh = ZERO, 0, True
    while depth >= 0:
        limit = best * (1 - CLOSE)
        if fresh:
            for g in range(ranks):
                bounds[depth, g] = np.inf
                if node.free[g] > 0 and first_empty(tree.same, node, g) == g:
                    nodes += 1
                    bounds[depth, g] = pair_bound(tree, depth, g, placed[depth], node)
            expand(tree, depth, node, limit, suffix[depth], bounds[depth], z[depth])
            fresh = False
            if stop[0] != 0:
                return best, nodes, False
        chosen = ZERO
        for g in range(1, ranks):
            if bounds[depth, g] < bounds[depth, chosen]:
                chosen = g
        value = bounds[depth, chosen]
        if value >= limit:
            depth -= 1
            if depth >= 0:
                move(tree, depth, rank[depth], MINUS, node)
            continue
        bounds[depth, chosen] = np.inf
        rank[depth] = chosen
        if depth + 1 == experts:
            best = value
            for e in range(experts):
                best_rank[e] = rank[e]
            continue
        for t in range(steps - 1, -1, -1):
            suffix[depth + 1, t] = suffix[depth + 1, t + 1] + tree.weights[t] * z[depth, chosen, t]
        placed[depth + 1] = placed[depth] + tree.alone[chosen, depth] + node.near[depth, chosen, depth]
        move(tree, depth, chosen, PLUS, node)
        depth += 1
        fresh = True
    return best, nodes, True


@njit(nogil=True)
def first_empty(same: Array, node: Node, g: int) -> int:
    """First rank equal to g that holds nothing, when g holds nothing; else g."""
    if node.used[g] == 0:
        for other in range(g):
            if same[other] == same[g] and node.used[other] == 0:
                return other
    return g


@njit(nogil=True)
def move(tree: Tree, expert: int, g: int, sign: int, node: Node) -> None:
    """Put an expert on a rank (sign 1) or take it away (-1)."""
    features = tree.features[expert]
    for f in range(features.shape[0]):
        for t in range(features.shape[1]):
            node.loads[g, f, t] += sign * features[f, t]
    if sign > 0:
        for h in range(len(node.free)):
            for i in range(expert + 1, node.near.shape[2]):
                more = tree.pair[g, expert, i] if h == g else 0.0
                node.near[expert + 1, h, i] = node.near[expert, h, i] + more
    node.free[g] -= sign
    node.used[g] += sign

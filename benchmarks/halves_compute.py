"""What no halves of the experts can pass for a price of computing: as `halves.py`, depth first, proven.

Halves say what a step computes at least: each node holds its load, however its ranks share it, and experts that are on
different nodes are never on one rank. What is minimised is tokens that leave their sender's node, and `price` times the
microseconds that halves compute at least, so that with several layers, whatever the price,

    tokens that leave  >=  sum over layers of (least of a layer)  -  price * (what all layers may compute)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from halves import LOOKED, FloatArray, IntArray, Tree, decide, start, still_kept
from numba import njit
from numpy.typing import NDArray

from gemopt.bounds import step_bounds
from gemopt.latency import Latency, pack
from gemopt.problem import Problem
from gemopt.solvers import get
from gemopt.solvers.base import Options, Row
from gemopt.solvers.exact.column_space import Proven, Space
from gemopt.splits.flow import fluid_times
from gemopt.splits.levels import no_levels

DESCENTS = 12  # before the search
ROUNDED = 1 - 1e-9  # what sums of rounded times are worth


class Compute(NamedTuple):
    """What halves compute at least, in microseconds. M: sets of experts that a rank can hold; G ranks, node by node.

    counts_TE, fewest_TE: assignments, and experts of a step by them. weight_T, floor_T: of a step, and what it takes at
    least. within_2N: in which a node's ranks hold a load. all_us, extra_GM, mask_M: what any placement takes at least,
    what more it takes if a rank holds a set, and that set in bits.
    """

    counts_TE: IntArray
    fewest_TE: IntArray
    weight_T: FloatArray
    floor_T: FloatArray
    within_2N: FloatArray
    all_us: float
    extra_GM: FloatArray
    mask_M: IntArray


class Sets(NamedTuple):
    """Sets that are still open to a node's ranks, by depth of the tree and node: `lists[at]`, `size[at]` of them.

    least: what more than `Compute.all_us` the ranks of a node take at least.
    """

    lists: NDArray[np.int32]
    size: IntArray
    at: IntArray
    least: FloatArray


def compute_of(problem: Problem, row: Row, seconds: float) -> Compute:
    """What the halves of a layer's experts compute at least.

    Parameters
    ----------
    problem
        A layer without spare slots, of one load, whose ranks have equal slots: the first half of them is node 0.
    row, seconds
        A placement to begin with and seconds for the multipliers of the bound over all sets, by the solver `columns`.
    """
    floor_T = step_bounds(problem)
    space, most = Space.of(problem, floor_T), int(problem.counts_TE.sum(axis=1).max())
    assert space is not None and len(space.sets) == 1 and len(problem.features) == 1
    (sets_MS,) = space.sets.values()
    all_us, extra_KM = float(problem.weights_T @ space.floor_T) * ROUNDED, np.zeros((len(space.ranks_K), len(sets_MS)))
    found = get("columns").solve(problem, Options.lasting(seconds), row).columns
    if isinstance(found, Proven) and found.bound_us > all_us:
        all_us, extra_KM = found.bound_us, found.extra_N.reshape(extra_KM.shape)
    kind_G = np.empty(problem.num_ranks, np.int64)
    for kind, rank in enumerate(space.ranks_K):
        kind_G[list(next(group for group in problem.equal_ranks if rank in group))] = kind
    counts_TE = np.ascontiguousarray(problem.counts_TE, np.int64)
    nodes = np.split(np.array(problem.latencies, dtype=object), 2)
    return Compute(
        counts_TE, np.argsort(counts_TE, axis=1, kind="stable"), problem.weights_T.copy(), ROUNDED * space.floor_T,
        np.stack([held_within(list(latencies), most) for latencies in nodes]), all_us, extra_KM[kind_G],
        (np.int64(1) << sets_MS.astype(np.int64)).sum(axis=1),
    )  # fmt: skip


def held_within(latencies: list[Latency], most: int) -> FloatArray:
    """[most + 1] microseconds in which some ranks hold a load together, rounded down."""
    curves = pack([latency.low for latency in latencies])
    return np.asarray(ROUNDED * fluid_times(no_levels(curves), np.arange(most + 1)))


@njit(cache=True, nogil=True)
def computed(compute: Compute, load_2T: IntArray, node_E: IntArray, room: IntArray) -> float:
    """Microseconds that all steps take at least, wherever open experts go: each node gets as many as it has room for.

    load_2T: of the experts that are decided.
    """
    total = 0.0
    for t in range(len(compute.floor_T)):
        first, second, open_ = load_2T[0, t], load_2T[1, t], 0
        for e in compute.fewest_TE[t]:
            if node_E[e] >= 0:
                continue
            first += compute.counts_TE[t, e] if open_ < room[0] else 0
            second += compute.counts_TE[t, e] if open_ < room[1] else 0
            open_ += 1
        held = max(compute.within_2N[0, first], compute.within_2N[1, second])
        total += compute.weight_T[t] * max(compute.floor_T[t], held)
    return total


@njit(cache=True, nogil=True)
def leave_out(compute: Compute, sets: Sets, depth: int, e: int, node: int) -> None:
    """Ranks of the other node cannot hold an expert that was decided, one level deeper; its own node is as before."""
    other, per_node = 1 - node, len(compute.extra_GM) // 2
    before, count = sets.at[depth, other], 0
    for i in range(sets.size[before, other]):
        m = sets.lists[before, other, i]
        if compute.mask_M[m] >> e & 1 == 0:
            sets.lists[depth + 1, other, count] = m
            count += 1
    sets.at[depth + 1, other], sets.size[depth + 1, other] = depth + 1, count
    sets.at[depth + 1, node], sets.least[depth + 1, node] = sets.at[depth, node], sets.least[depth, node]
    sets.least[depth + 1, other] = 0.0
    for g in range(other * per_node, (other + 1) * per_node):
        least = np.inf
        for i in range(count):
            least = min(least, compute.extra_GM[g, sets.lists[depth + 1, other, i]])
        sets.least[depth + 1, other] += least


@njit(cache=True, nogil=True)
def lower(
    tree: Tree, compute: Compute, sets: Sets, load_2T: IntArray, price: float, best: float, decisions: int
) -> float:
    """The least value, below `best`, after so many decisions more; `tree.depth` as in `halves.keep_most`."""
    charge, depth, entered = np.empty((2, len(tree.node_E))), tree.depth[0], tree.depth[1] > 0
    tokens = tree.weight_N.sum()
    while depth >= 0 and decisions > 0:
        if entered:
            decisions -= 1
            kept, lost = still_kept(tree, depth, charge)
            open_ = np.flatnonzero(tree.node_E < 0)
            value = tokens - kept + lost + price * computed(compute, load_2T, tree.node_E, tree.room)
            if value < best and depth > 0:
                e = tree.chosen[depth - 1]
                leave_out(compute, sets, depth - 1, e, tree.node_E[e])
                value = max(value, tokens - kept + lost + price * (compute.all_us + sets.least[depth].sum()))
            if value < best and len(open_) == 0:
                best = value
                tree.best_E[:] = tree.node_E
            if value >= best or len(open_) == 0:
                entered, depth = False, depth - 1
                continue
            tree.chosen[depth] = open_[np.minimum(charge[0], charge[1])[open_].argmax()]
            tree.tried[depth] = 0
        e = tree.chosen[depth]
        before, after = tree.node_E[e], decide(tree, depth, e)
        if before >= 0:
            load_2T[before] -= compute.counts_TE[:, e]
        if after >= 0:
            load_2T[after] += compute.counts_TE[:, e]
        entered = after >= 0
        depth += 1 if entered else -1
    tree.depth[0], tree.depth[1] = depth, int(entered)
    return best


@njit(cache=True, nogil=True)
def value_of(tree: Tree, compute: Compute, price: float, node_E: IntArray, most: float) -> float:
    """What halves are worth before sets are looked at, or some number above `most` where it is as much."""
    load_2T, leaving = np.zeros((2, len(compute.floor_T)), np.int64), 0
    for e in range(len(node_E)):
        load_2T[node_E[e]] += compute.counts_TE[:, e]
    value = price * computed(compute, load_2T, node_E, tree.room)
    for h in range(2):
        for i in range(tree.size[0, h] if value <= most else 0):
            for e in tree.ids_NK[tree.lists[0, h, i]]:
                if e >= 0 and node_E[e] != h:
                    leaving += tree.weight_N[tree.lists[0, h, i]]
                    break
    return value + leaving


@njit(cache=True, nogil=True)
def descend(tree: Tree, compute: Compute, price: float, node_E: IntArray) -> float:
    """Exchange two experts of different nodes, the best at a time, while that lowers the value; returns it."""
    value, before = value_of(tree, compute, price, node_E, np.inf), np.inf
    while value < before:
        before, first, second = value, 0, 0
        for i in range(len(node_E)):
            for j in range(i):
                if node_E[i] != node_E[j]:
                    node_E[i], node_E[j] = node_E[j], node_E[i]
                    after = value_of(tree, compute, price, node_E, value)
                    if after < value:
                        value, first, second = after, i, j
                    node_E[i], node_E[j] = node_E[j], node_E[i]
        node_E[first], node_E[second] = node_E[second], node_E[first]
    return value


def begin(tree: Tree, compute: Compute, price: float) -> float:
    """Write the best halves of some descents into `tree.best_E`; returns their value."""
    draws, best, experts = np.random.default_rng(0), np.inf, len(tree.node_E)
    per_node = len(compute.extra_GM) // 2
    for _ in range(DESCENTS):
        node_E = draws.permutation(np.arange(experts) % 2)
        value = descend(tree, compute, price, node_E)
        bits_2 = [int((np.int64(1) << np.flatnonzero(node_E != node)).sum()) for node in range(2)]
        apart = [compute.extra_GM[g, compute.mask_M & bits_2[g // per_node] == 0].min() for g in range(2 * per_node)]
        leaving = value_of(tree, compute, 0.0, node_E, np.inf)
        value = max(value, leaving + price * (compute.all_us + sum(apart)))
        if value < best:
            best, tree.best_E[:] = value, node_E
    return best


def least_value(
    ids_NK: NDArray[np.integer], home_N: NDArray[np.integer], compute: Compute, price: float, over: Callable[[], bool]
) -> tuple[float, IntArray, bool]:
    """The least of tokens that leave and `price` times the microseconds of computing; of which halves, and if proven.

    Arguments as of `halves.best_halves`; each node takes half of the experts.
    """
    experts, sets_M = compute.counts_TE.shape[1], len(compute.mask_M)
    tree = start(ids_NK, home_N, experts, np.full(2, experts // 2))
    lists = np.zeros((experts + 1, 2, sets_M), np.int32)
    lists[0] = np.arange(sets_M)
    sets = Sets(
        lists, np.full((experts + 1, 2), sets_M), np.zeros((experts + 1, 2), np.int64), np.zeros((experts + 1, 2))
    )
    load_2T, best = np.zeros((2, len(compute.floor_T)), np.int64), begin(tree, compute, price)
    while tree.depth[0] >= 0 and not over():
        best = float(lower(tree, compute, sets, load_2T, price, best, LOOKED))
    return best, tree.best_E, bool(tree.depth[0] < 0)


def fewest_leaving(
    layers: Sequence[tuple[NDArray[np.integer], NDArray[np.integer]]], computes: Sequence[Compute], most_us: float,
    prices: Sequence[float], seconds: float,
) -> float:  # fmt: skip
    """No placement that computes `most_us` at most over all layers lets fewer tokens leave; 0 where nothing is proven.

    layers: experts and home of the tokens of each, as of `least_value`. seconds: of a layer at one price.
    """
    best = 0.0
    for price in prices:
        total = -price * most_us
        for layer, compute in zip(layers, computes, strict=True):
            options = Options.lasting(seconds)
            value, _, proven = least_value(*layer, compute, price, options.expired)
            total += value if proven else -np.inf
        best = max(best, total)
    return best

"""The search of contents with copies that a bound has left: which of them, one for each rank, hold every expert.

A partition (`column_kernels.search_columns`) where an expert may be in several columns: in c of them, when one of them
says that it has c copies. Of an expert that is not complete one of its columns comes next; those that came before it at
this node are left out below it, so that no placement is tried twice. Empty contents complete what has no expert left.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.compiling import njit
from gemopt.kernels import MINUS, ZERO, put
from gemopt.solvers.exact.column_kernels import LOOK, slower
from gemopt.solvers.exact.copies_tree import CopiesTree, best_order
from gemopt.solvers.exact.tree import CLOSE

Array = NDArray[Any]


class Left(NamedTuple):
    """N columns to search, by their reduced costs `extra` [N].

    rows: [N, T] latencies that they do not fall below. sets, copies: [N, S] experts in them and the copies that each
    has in all, so many as size [N]. masks: [N] experts as bits. kind: [N].
    """

    rows: Array
    sets: Array
    copies: Array
    size: Array
    masks: Array
    kind: Array
    extra: Array


class Hosts(NamedTuple):
    """group: [K, most] ranks of each kind; number: [K] of them. sets: number in the tree of each set of ranks, as bits.

    order: [E] the experts as the tree has them.
    """

    group: Array
    number: Array
    sets: Array
    order: Array


@njit(nogil=True)
def narrow_copies(
    list_N: Array, count: int, columns: Left, all_E: Array, need_E: Array, left_K: Array, room: float, pivot: int,
    first: int, share_E: Array, ways_E: Array, out_N: Array,
) -> int:  # fmt: skip
    """The columns of a list that can still complete a placement within `room` of reduced cost, or none; how many.

    all, need: [E] copies of an expert, 0 where that is open, and how many of them are not placed. Of columns that hold
    the pivot (-1: none) only those from `first` on. Every copy pays its share of its column, at least the least.
    """
    experts, kept, total, ranks = len(all_E), 0, 0.0, left_K.sum()
    complete, known, bit = np.uint64(0), np.uint64(0), np.uint64(0)
    for e in range(experts):
        share_E[e] = np.inf
        if need_E[e] > ranks:
            return 0
        if all_E[e]:
            known |= np.uint64(1) << np.uint64(e)
            if need_E[e] == 0:
                complete |= np.uint64(1) << np.uint64(e)
    if pivot >= 0:
        bit = np.uint64(1) << np.uint64(pivot)
    for p in range(count):
        n = list_N[p]
        mask = columns.masks[n]
        if mask & complete or left_K[columns.kind[n]] == 0 or not columns.extra[n] < room or (p < first and mask & bit):
            continue
        fits = True
        if mask & known:
            for s in range(columns.size[n]):
                e = columns.sets[n, s]
                fits &= all_E[e] == 0 or columns.copies[n, s] == all_E[e]
        if fits:
            out_N[kept] = n
            kept += 1
            for s in range(columns.size[n]):
                e = columns.sets[n, s]
                more = need_E[e] if all_E[e] else columns.copies[n, s]
                share_E[e] = min(share_E[e], more * columns.extra[n] / columns.size[n])
    for e in range(experts):
        if all_E[e] == 0 or need_E[e]:
            total += share_E[e]
    if not total < room:
        return 0
    ways_E[:] = 0
    last, kept = kept, 0
    for p in range(last):
        n, others = out_N[p], total
        for s in range(columns.size[n]):
            e = columns.sets[n, s]
            others -= share_E[e] / (need_E[e] if all_E[e] else columns.copies[n, s])
        if columns.extra[n] + others < room:
            out_N[kept] = n
            kept += 1
            for s in range(columns.size[n]):
                ways_E[columns.sets[n, s]] += 1
    return kept


@njit(nogil=True)
def rarest_left(ways_E: Array, all_E: Array, need_E: Array) -> int:
    """The expert with the fewest columns left, -1 when one has none, E when all are complete."""
    chosen, fewest = len(ways_E), 2**62
    for e in range(len(ways_E)):
        if (all_E[e] == 0 or need_E[e]) and ways_E[e] < fewest:
            chosen, fewest = e, ways_E[e]
    return chosen if fewest > 0 else -1


@njit(nogil=True)
def take(columns: Left, n: int, all_E: Array, need_E: Array, depth: int) -> None:
    """What is known and needed of each expert one level deeper, with column n."""
    put(all_E[depth + 1], all_E[depth])
    put(need_E[depth + 1], need_E[depth])
    for s in range(columns.size[n]):
        e = columns.sets[n, s]
        if all_E[depth, e] == 0:
            all_E[depth + 1, e] = need_E[depth + 1, e] = columns.copies[n, s]
        need_E[depth + 1, e] -= 1


@njit(nogil=True)
def placed(columns: Left, trail_G: Array, hosts: Hosts, tree: CopiesTree, limit: float, held_E: Array) -> float:
    """Worth of columns that hold every expert, in the best order of equal ranks, as `best_order` has it."""
    experts = len(hosts.order)
    sets_E, trail = np.zeros(experts, np.int64), np.zeros(experts, np.int64)
    used_K = np.zeros(len(hosts.number), np.int64)
    for n in trail_G:
        g = hosts.group[columns.kind[n], used_K[columns.kind[n]]]
        used_K[columns.kind[n]] += 1
        for s in range(columns.size[n]):
            sets_E[columns.sets[n, s]] |= 1 << g
    for d in range(experts):
        trail[d] = hosts.sets[sets_E[hosts.order[d]]]
    return float(best_order(tree, trail, limit, held_E))


@njit(nogil=True)
def search_left(
    columns: Left, hosts: Hosts, tree: CopiesTree, base: float, best: float, held_E: Array, most_work: int, stop: Array
) -> tuple[float, int, bool]:
    """(objective of the best placement, nodes, whether all were searched).

    Reduced costs add up to what a placement has above `base` at least. A node is cut by these, and by the slowest of
    its columns at every step. held_E: sets of ranks of a better placement, in the tree's order. most_work: steps and
    columns looked at.
    """
    steps, ranks, experts = len(tree.floor), hosts.number.sum(), len(hosts.order)
    lists, counts = np.empty((ranks + 1, len(columns.kind)), np.int32), np.zeros(ranks + 1, np.int64)
    z, at = np.empty((ranks + 1, steps)), np.zeros(ranks + 1, np.int64)
    pivot, spent = np.zeros(ranks + 1, np.int64), np.zeros(ranks + 1)
    all_E, need_E = np.zeros((ranks + 1, experts), np.int64), np.zeros((ranks + 1, experts), np.int64)
    trail = np.zeros(ranks, np.int64)
    share, ways, left = np.empty(experts), np.empty(experts, np.int64), hosts.number.copy()
    put(z[0], tree.floor)
    for n in range(len(columns.kind)):
        lists[0, n] = n
    limit, depth, work, nodes, first = best * (1 - CLOSE), ZERO, 0, 0, lists[0]
    counts[0] = narrow_copies(
        first, len(columns.kind), columns, all_E[0], need_E[0], left, limit - base, MINUS, ZERO, share, ways, first
    )
    pivot[0] = rarest_left(ways, all_E[0], need_E[0]) if counts[0] else -1
    while depth >= 0:
        found = MINUS
        while pivot[depth] >= 0 and at[depth] < counts[depth]:
            n = lists[depth, at[depth]]
            at[depth] += 1
            if base + spent[depth] + columns.extra[n] >= limit:
                at[depth] = counts[depth]
            elif pivot[depth] == experts or columns.masks[n] >> np.uint64(pivot[depth]) & np.uint64(1):
                found = n
                break
        if found < 0:
            depth -= 1
            if depth >= 0:
                left[columns.kind[trail[depth]]] += 1
            continue
        work += steps
        nodes += 1
        if work >= most_work or stop[0] != 0:
            return best, nodes, False
        if slower(z[depth], columns.rows[found], tree.weights, z[depth + 1]) >= limit:
            continue
        trail[depth] = found
        take(columns, found, all_E, need_E, depth)
        if depth + 1 == ranks:
            if all_E[ranks].min() > 0 and need_E[ranks].max() == 0:
                best = min(best, placed(columns, trail, hosts, tree, limit, held_E))
                limit = best * (1 - CLOSE)
            continue
        spent[depth + 1] = spent[depth] + columns.extra[found]
        left[columns.kind[found]] -= 1
        depth += 1
        at[depth] = 0
        work += LOOK * counts[depth - 1]
        counts[depth] = narrow_copies(
            lists[depth - 1], counts[depth - 1], columns, all_E[depth], need_E[depth], left,
            limit - base - spent[depth], pivot[depth - 1] if pivot[depth - 1] < experts else -1,
            at[depth - 1] - 1, share, ways, lists[depth],
        )  # fmt: skip
        pivot[depth] = rarest_left(ways, all_E[depth], need_E[depth]) if counts[depth] else -1
    return best, nodes, True

"""Which experts belong on which of two nodes so that fewest tokens leave their sender's node: depth first, proven.

A token that crosses to another node once stays at home only if all its experts are there. How experts lie within a node
changes nothing, so that what is searched are the halves of the experts, not their placements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
LOOKED = 256  # decisions between looks at the clock


class Halves(NamedTuple):
    """The best halves found: [E] node of each expert, tokens that stay at home, and whether no halves keep more."""

    node_E: IntArray
    kept: int
    proven: bool


class Tree(NamedTuple):
    """What was decided so far, so that the search can go on. N kinds of tokens of at most K experts each.

    ids_NK: experts, -1 for none; weight_N: tokens of a kind. room: [2] experts that a node still takes. depth: [2] how
    many are decided, and whether that is new. node_E, best_E: of the branch, -1 where open, and of the best. chosen,
    tried: by depth, the expert and how many of its nodes were tried. lists, size: by depth and node, the kinds that may
    still stay at home.
    """

    ids_NK: IntArray
    weight_N: IntArray
    room: IntArray
    depth: IntArray
    node_E: IntArray
    best_E: IntArray
    chosen: IntArray
    tried: IntArray
    lists: NDArray[np.int32]
    size: IntArray


@njit(cache=True, nogil=True)
def still_kept(tree: Tree, depth: int, charge: FloatArray) -> tuple[int, float]:
    """Tokens that may still stay at home, and how many of them are lost at least. charge: [2, E] room to write into.

    A token is charged in equal parts to its open experts: it is lost if any of them goes to the other node, so that
    charges are at most what is lost, wherever experts go. They go where they are charged least, as many as nodes have
    room for.
    """
    charge[:], kept = 0.0, 0
    for h in range(2):
        for i in range(tree.size[depth, h]):
            n = tree.lists[depth, h, i]
            kept += tree.weight_N[n]
            many = 0
            for e in tree.ids_NK[n]:
                many += e >= 0 and tree.node_E[e] < 0
            for e in tree.ids_NK[n]:
                if e >= 0 and tree.node_E[e] < 0:
                    charge[1 - h, e] += tree.weight_N[n] / many
    open_ = np.flatnonzero(tree.node_E < 0)
    more = np.sort(charge[0][open_] - charge[1][open_])  # on node 0 instead of 1
    fewest = max(0, len(open_) - tree.room[1])
    lost = charge[1][open_].sum() + more[:fewest].sum()
    for i in range(fewest, min(len(open_), tree.room[0])):
        lost += min(more[i], 0.0)
    return kept, lost


@njit(cache=True, nogil=True)
def list_kept(tree: Tree, depth: int, e: int) -> None:
    """The kinds that may still stay at home now that this expert's node is decided, one level deeper."""
    for h in range(2):
        count = 0
        for i in range(tree.size[depth, h]):
            n = tree.lists[depth, h, i]
            lost = False
            for member in tree.ids_NK[n]:
                lost = lost or (member == e and h != tree.node_E[e])
            if not lost:
                tree.lists[depth + 1, h, count] = n
                count += 1
        tree.size[depth + 1, h] = count


@njit(cache=True, nogil=True)
def decide(tree: Tree, depth: int, e: int) -> int:
    """Take an expert's node back, if it has one, and give it the next with room; that node, or -1 after the last."""
    if tree.node_E[e] >= 0:
        tree.room[tree.node_E[e]] += 1
        tree.node_E[e] = -1
    while tree.tried[depth] < 2:
        h = tree.tried[depth]
        tree.tried[depth] += 1
        if tree.room[h] > 0:
            tree.room[h] -= 1
            tree.node_E[e] = h
            list_kept(tree, depth, e)
            return h
    return -1


@njit(cache=True, nogil=True)
def keep_most(tree: Tree, best: int, decisions: int) -> int:
    """Most tokens that stay at home, above `best`, after so many decisions more; `tree.depth[0]` is -1 at the end."""
    charge, depth, entered = np.empty((2, len(tree.node_E))), tree.depth[0], tree.depth[1] > 0
    while depth >= 0 and decisions > 0:
        if entered:
            decisions -= 1
            kept, lost = still_kept(tree, depth, charge)
            open_ = np.flatnonzero(tree.node_E < 0)
            better = int(kept - lost + 1e-6) > best
            if better and len(open_) == 0:
                best = kept
                tree.best_E[:] = tree.node_E
            if not better or len(open_) == 0:
                entered, depth = False, depth - 1
                continue
            tree.chosen[depth] = open_[np.minimum(charge[0], charge[1])[open_].argmax()]
            tree.tried[depth] = 0
        entered = decide(tree, depth, tree.chosen[depth]) >= 0
        depth += 1 if entered else -1
    tree.depth[0], tree.depth[1] = depth, int(entered)
    return best


def start(ids_NK: NDArray[np.integer], home_N: NDArray[np.integer], num_experts: int, room: IntArray) -> Tree:
    """The tree before any decision; arguments as of `best_halves`."""
    keys = np.column_stack([home_N, np.sort(ids_NK, axis=1)]).astype(np.int64)
    kinds, weight_N = np.unique(keys, axis=0, return_counts=True)
    lists = np.zeros((num_experts + 1, 2, len(kinds)), np.int32)
    size: IntArray = np.zeros((num_experts + 1, 2), np.int64)
    for node in range(2):
        own = np.flatnonzero(kinds[:, 0] == node)
        lists[0, node, : len(own)], size[0, node] = own, len(own)
    open_E: IntArray = np.full(num_experts, -1)
    return Tree(
        np.ascontiguousarray(kinds[:, 1:]), weight_N.astype(np.int64), room.astype(np.int64), np.array([0, 1]), open_E,
        open_E.copy(), np.zeros(num_experts + 1, np.int64), np.zeros(num_experts + 1, np.int64), lists, size,
    )  # fmt: skip


def best_halves(
    ids_NK: NDArray[np.integer], home_N: NDArray[np.integer], num_experts: int, room: IntArray,
    over: Callable[[], bool], most: int = 1 << 62,
) -> Halves | None:  # fmt: skip
    """Halves of the experts that keep most tokens at home; None where none was found.

    Parameters
    ----------
    ids_NK, home_N
        [N, K] experts of each token, -1 for none, and [N] the node (0 or 1) that it is sent from.
    room
        [2] experts that each node takes at most.
    over, most
        Asked now and then whether the time is over, and how many decisions are made at most.
    """
    tree = start(ids_NK, home_N, num_experts, room)
    best, made = -1, 0
    while tree.depth[0] >= 0 and made < most and not over():
        best, made = int(keep_most(tree, best, LOOKED)), made + LOOKED
    return None if best < 0 else Halves(tree.best_E, best, bool(tree.depth[0] < 0))

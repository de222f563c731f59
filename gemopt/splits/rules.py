"""How the assignments of an expert are shared among its copies where the counts alone, or their senders, decide.

Shares are whole assignments everywhere: what is evaluated is what an engine can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import FloatArray, IntArray
from gemopt.placement import EMPTY


def even_shares(counts_TE: NDArray[Any], row_P: IntArray) -> IntArray:
    """[T, P] assignments of each slot: copy i of r, in slot order, takes `(n + r - 1 - i) // r` of its expert's n."""
    shares_TP = np.where(row_P != EMPTY, counts_TE[:, row_P], 0).astype(np.int64, copy=False)
    copies_E = np.bincount(row_P[row_P != EMPTY], minlength=counts_TE.shape[1])
    many = np.flatnonzero((row_P != EMPTY) & (copies_E[row_P] > 1))
    if len(many):
        many = many[np.argsort(row_P[many], kind="stable")]
        index, copies = np.arange(len(many)) - np.searchsorted(row_P[many], row_P[many]), copies_E[row_P[many]]
        shares_TP[:, many] = (shares_TP[:, many] + copies - 1 - index) // copies
    return shares_TP


def even_weights(row_P: IntArray, num_experts: int) -> FloatArray:
    """[P] one over the copies of each slot's expert; 0 for empty slots."""
    copies_E = np.bincount(row_P[row_P != EMPTY], minlength=num_experts)
    return np.where(row_P != EMPTY, 1.0 / np.maximum(copies_E[row_P], 1), 0.0)


def static_shares(counts_TE: NDArray[Any], row_P: IntArray, weights_P: FloatArray) -> IntArray:
    """[T, P] assignments of each slot in proportion to its weight: rounded cumulative parts, in slot order."""
    taken_E = np.zeros(counts_TE.shape[1])
    shares_TP = np.zeros((len(counts_TE), len(row_P)), dtype=np.int64)
    last = {int(expert): slot for slot, expert in enumerate(row_P) if expert != EMPTY}
    for slot, expert in enumerate(row_P):
        if expert == EMPTY:
            continue
        counts_T = counts_TE[:, expert]
        before = taken_E[expert]
        taken_E[expert] = 1.0 if slot == last[int(expert)] else min(1.0, before + weights_P[slot])
        upper, lower = np.floor(counts_T * taken_E[expert] + 0.5), np.floor(counts_T * before + 0.5)
        shares_TP[:, slot] = (upper - lower).astype(np.int64)
    return shares_TP


def nearest_copies(ranks_C: IntArray, nodes_G: NDArray[Any] | Sequence[int]) -> IntArray:
    """[G] which of the copies on these ranks each sender uses: its own, else one on its node, else any.

    Of several equally near copies, in slot order, sender g takes number `g % len`: senders spread over them.
    """
    nodes, result = np.asarray(nodes_G), np.zeros(len(nodes_G), dtype=np.int64)
    for rank, node in enumerate(nodes):
        near = np.flatnonzero(ranks_C == rank)
        if not len(near):
            near = np.flatnonzero(nodes[ranks_C] == node)
        if not len(near):
            near = np.arange(len(ranks_C))
        result[rank] = near[rank % len(near)]
    return result


def nearest_weights(row_P: IntArray, rank_of_slot: IntArray, nodes_G: NDArray[Any], num_experts: int) -> FloatArray:
    """[P] share of the ranks that use each slot's copy: what the nearest split comes to when all send alike."""
    weights_P = even_weights(row_P, num_experts)
    for expert in np.flatnonzero(np.bincount(row_P[row_P != EMPTY], minlength=num_experts) > 1):
        slots = np.flatnonzero(row_P == expert)
        used = nearest_copies(rank_of_slot[slots], nodes_G)
        weights_P[slots] = np.bincount(used, minlength=len(slots)) / len(nodes_G)
    return weights_P


def nearest_shares(
    counts_TE: NDArray[Any], senders_TGE: NDArray[Any], row_P: IntArray, rank_of_slot: IntArray, nodes_G: NDArray[Any]
) -> IntArray:
    """[T, P] assignments of each slot: what the ranks that use its copy send. senders_TGE: [T, G, E], by sender."""
    held = row_P != EMPTY
    shares_TP = np.where(held, counts_TE[:, row_P], 0).astype(np.int64)
    for expert in np.flatnonzero(np.bincount(row_P[held], minlength=counts_TE.shape[1]) > 1):
        slots = np.flatnonzero(row_P == expert)
        used = nearest_copies(rank_of_slot[slots], nodes_G)
        for copy, slot in enumerate(slots):
            shares_TP[:, slot] = senders_TGE[:, used == copy, expert].sum(axis=1)
    return shares_TP

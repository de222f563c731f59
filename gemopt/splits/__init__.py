"""Split policies: what each copy of an expert takes of its assignments, as whole numbers.

`even` and `static` follow from the counts, `nearest` from who sends them, `optimal` from the latencies as well.
Where the load of a rank is its assignments, `optimal` is exact (of a latency that falls with load somewhere: for the
smallest one above it that does not); with other features, such as activated experts, it is found by descent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import ASSIGNMENTS, FloatArray
from gemopt.placement import Split
from gemopt.splits.rules import even_shares, even_weights, nearest_shares, nearest_weights, static_shares

if TYPE_CHECKING:
    from gemopt.problem import Problem

__all__ = ["chosen_weights", "even_shares", "even_weights", "shares", "static_shares"]


def shares(problem: Problem, row_P: NDArray[np.int64], weights_P: FloatArray | None = None) -> NDArray[np.int64]:
    """[T, P] assignments of each slot under the policy of the problem; with weights given, under these.

    Raises
    ------
    UnsupportedError
        Counts too large to tabulate features of every share.
    """
    if weights_P is None and problem.split is Split.OPTIMAL:
        return optimal_shares(problem, row_P)
    if weights_P is None and problem.split is Split.NEAREST and problem.senders_TGE is not None:
        return nearest_shares(problem.counts_TE, problem.senders_TGE, row_P, problem.rank_of_slot, problem.node_of_rank)
    if weights_P is None:
        weights_P = chosen_weights(problem, row_P)
    if weights_P is None:
        return even_shares(problem.counts_TE, row_P)
    return static_shares(problem.counts_TE, row_P, weights_P)


def chosen_weights(problem: Problem, row_P: NDArray[np.int64]) -> FloatArray | None:
    """[P] weights that the policy has for a row; None where it is not one of fixed weights."""
    if problem.split is Split.STATIC:
        from gemopt.splits.weights import static_weights

        return static_weights(problem, row_P)
    if problem.split is Split.NEAREST and problem.senders_TGE is None:
        return nearest_weights(row_P, problem.rank_of_slot, problem.node_of_rank, problem.num_experts)
    return None


def plain(problem: Problem) -> bool:
    """Whether the load of a rank is its assignments, so that the optimal split is exact."""
    return problem.features == (ASSIGNMENTS,)


def optimal_shares(problem: Problem, row_P: NDArray[np.int64]) -> NDArray[np.int64]:
    """[T, P] assignments of each slot with which the slowest rank of every step ends first; see the module."""
    from gemopt.splits.optimal import OptimalSplit

    shares_TP = np.where(row_P >= 0, problem.counts_TE[:, row_P], 0).astype(np.int64)
    split = OptimalSplit(row_P, problem.rank_of_slot, problem.num_experts, problem.features, problem.latencies)
    shares_TP[:, split.copies.slot] = split.parts(problem.counts_TE)
    return shares_TP

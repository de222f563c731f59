"""Split policies: what each copy of an expert takes of its assignments, as whole numbers.

`even` and `static` follow from the counts, `nearest` from who sends them, `optimal` from the latencies as well.
Where the load of a rank is its assignments, `optimal` is exact (of a latency that falls with load somewhere: for the
smallest one above it that does not); with other features, such as activated experts, it is found by descent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import UnsupportedError
from gemopt.latency import ASSIGNMENTS, FloatArray, pack
from gemopt.placement import Split
from gemopt.splits.rules import even_shares, even_weights, nearest_shares, nearest_weights, static_shares

if TYPE_CHECKING:
    from gemopt.problem import Problem

TABLE_LIMIT = 1 << 22

__all__ = ["Split", "chosen_weights", "even_shares", "even_weights", "feature_table", "shares", "static_shares"]


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
    from gemopt.kernels import rank_loads
    from gemopt.splits.flow import find_copies, fluid_times, spread_steps
    from gemopt.splits.parts import part_steps

    shares_TP = even_shares(problem.counts_TE, row_P)
    copies = find_copies(row_P, problem.rank_of_slot, problem.num_experts, problem.num_ranks)
    if not len(copies.experts):
        return shares_TP
    curves = pack([latency.high for latency in problem.latencies])
    alone_P = np.where(np.isin(np.arange(len(row_P)), copies.slot), -1, row_P)
    alone_TGF = rank_loads(problem.features_FTE, alone_P, problem.rank_of_slot, problem.num_ranks)
    parts_TC = np.ascontiguousarray(shares_TP[:, copies.slot])
    if plain(problem):
        alone_TG = np.ascontiguousarray(alone_TGF[:, :, 0]).astype(np.int64)
        fluid_T = fluid_times(curves, problem.counts_TE.sum(axis=1, dtype=np.int64))
        spread_steps(curves, alone_TG, copies, parts_TC, fluid_T)
    else:
        counts_TR = problem.counts_TE[:, copies.experts].astype(np.int64)
        part_steps(curves, alone_TGF, copies, counts_TR, feature_table(problem), parts_TC)
    shares_TP[:, copies.slot] = parts_TC
    return shares_TP


def feature_table(problem: Problem) -> FloatArray:
    """[F, N] features of 0, 1, ... assignments, up to the most that an expert has at a step."""
    largest = int(problem.counts_TE.max())
    if largest >= TABLE_LIMIT:
        limit = f"the {problem.split.value} split takes experts below {TABLE_LIMIT} assignments per step"
        raise UnsupportedError("counts_TE", largest, limit, "use even")
    return np.stack([feature.of(np.arange(largest + 1)) for feature in problem.features]).astype(np.float64)

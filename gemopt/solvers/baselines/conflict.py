"""Conflict-aware placement: a speed-weighted max-k-cut of the conflict graph, blind to the true objective.

Experts that are hot in the same steps go to different ranks, and slow ranks get less. With `time = o_g + s_g load` on
rank g, minimising `sum_g (o_g + s_g load_g)^2 / s_g` over all steps levels the finishing times; expanded, it is a sum
over the pairs of experts on one rank, so its minimum is a maximum cut of the graph whose edges are those pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemopt.conflicts import excess_coload, shares, significant
from gemopt.latency import FloatArray
from gemopt.placement import EMPTY
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers.base import Options, Outcome, Row, Supports, seeded
from gemopt.solvers.search.packing import lpt_row

MAX_SWEEPS = 50
LEAST_GAIN = 1e-9  # relative to the whole


class Conflict:
    """Greedy cut, then exchanges of two experts while they lower the weight inside the ranks.

    Only the graph is looked at: no placement is ever evaluated. Spare slots stay empty. The seed orders the exchanges.
    """

    name = "conflict"
    supports = Supports()

    def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
        """Place one layer; see `Solver`. A warm start is not used. Without the time for a graph the answer is LPT's."""
        if options.expired():
            return Outcome(lpt_row(problem), options.cut_by, note="no time to cut: speed-weighted LPT", reached=False)
        graph = cut_graph(problem)
        rank_I = _greedy(graph, problem.slots_per_rank)
        rng = seeded(options.seed, problem.num_experts)
        stopped_by = StoppedBy.ITERATIONS
        for _ in range(MAX_SWEEPS):
            if options.expired():
                stopped_by = options.cut_by
                break
            if not _sweep(graph, rank_I, rng.permutation(problem.num_experts)):
                break
        return Outcome(_row(rank_I, problem), stopped_by)


@dataclass(frozen=True, eq=False)
class CutGraph:
    """What is cut. I items: the experts, then one weightless item per spare slot, so that every slot holds an item.

    weight_II: mean product of the loads of two items (diagonal: an item with itself). slope_G: time per load of a rank
    relative to the others. linear_IG: what an item costs on a rank besides, from the rank's time without load.
    """

    weight_II: FloatArray
    slope_G: FloatArray
    linear_IG: FloatArray

    def cost(self, rank_I: Row) -> float:
        """Weight inside the ranks: what the cut leaves."""
        same = rank_I[:, None] == rank_I[None, :]
        inside = (self.weight_II * same).sum(axis=1) @ self.slope_G[rank_I]
        return float(inside + self.linear_IG[np.arange(len(rank_I)), rank_I].sum())


def cut_graph(problem: Problem) -> CutGraph:
    """The conflict graph of a problem: significant excess co-loads, and the products of the mean loads."""
    offset_G, weight_GE = problem.linearised
    load_TE = _loads(problem, weight_GE.mean(axis=0))
    weights_T = problem.weights_T / max(problem.weights_T.sum(), 1e-300)
    excess_EE = excess_coload(load_TE, problem.weights_T)
    kept_EE = np.where(significant(excess_EE, problem.num_steps), excess_EE, np.diag(excess_EE.diagonal()))
    total_T, share_E = load_TE.sum(axis=1), shares(load_TE)
    size = problem.num_slots
    weight_II = np.zeros((size, size))
    experts = problem.num_experts
    weight_II[:experts, :experts] = kept_EE + (weights_T @ total_T**2) * np.outer(share_E, share_E)
    slope_G = weight_GE.sum(axis=1) / max(weight_GE.sum(axis=1).mean(), 1e-300)
    linear_IG = np.zeros((size, problem.num_ranks))
    linear_IG[:experts] = 2 * (weights_T @ total_T) * np.outer(share_E, offset_G - offset_G.min())
    return CutGraph(weight_II, slope_G, linear_IG)


def _loads(problem: Problem, mean_E: FloatArray) -> FloatArray:
    """[T, E] microseconds of each expert at each step: its features at the slopes that explain its mean."""
    mean_FE = np.einsum("t,fte->fe", problem.weights_T, problem.features_FTE) / max(problem.weights_T.sum(), 1e-300)
    slope_F = np.linalg.lstsq(mean_FE.T, mean_E, rcond=None)[0].clip(0.0)
    return np.asarray(np.einsum("f,fte->te", slope_F, problem.features_FTE.astype(np.float64)))


def _greedy(graph: CutGraph, slots_G: Row) -> Row:
    """[I] rank of each item: heaviest first, each to the rank with room where it adds the least."""
    size, ranks = graph.linear_IG.shape
    rank_I = np.full(size, -1)
    inside_IG = np.zeros((size, ranks))
    room_G = slots_G.copy()
    for item in np.argsort(-graph.weight_II.diagonal(), kind="stable"):
        own = graph.weight_II[item, item]
        added_G = graph.slope_G * (own + 2 * inside_IG[item]) + graph.linear_IG[item]
        rank = int(np.where(room_G > 0, added_G, np.inf).argmin())
        rank_I[item] = rank
        room_G[rank] -= 1
        inside_IG[:, rank] += graph.weight_II[:, item]
    return rank_I


def _sweep(graph: CutGraph, rank_I: Row, order: Row) -> bool:
    """Exchange each expert of `order` with its best partner where that lowers the cost; whether any did."""
    weight, slope, linear = graph.weight_II, graph.slope_G, graph.linear_IG
    items = np.arange(len(rank_I))
    inside_IG = np.stack([weight[:, rank_I == g].sum(axis=1) for g in range(len(slope))], axis=1)
    own = weight.diagonal()
    least = LEAST_GAIN * graph.cost(rank_I)
    improved = False
    for i in order:
        a = rank_I[i]
        # leaving a rank frees slope (2 inside - own), joining it costs slope (2 (inside - the partner's part) + own)
        there_J = slope[rank_I] * (2 * (inside_IG[i, rank_I] - weight[i]) + own[i]) + linear[i, rank_I]
        here_J = slope[a] * (2 * (inside_IG[:, a] - weight[i]) + own) + linear[:, a]
        leaves_J = slope[rank_I] * (2 * inside_IG[items, rank_I] - own) + linear[items, rank_I]
        leaves_i = slope[a] * (2 * inside_IG[i, a] - own[i]) + linear[i, a]
        change_J = np.where(rank_I == a, np.inf, there_J + here_J - leaves_J - leaves_i)
        j = int(change_J.argmin())
        if change_J[j] >= -least:
            continue
        b = rank_I[j]
        moved = weight[:, j] - weight[:, i]
        inside_IG[:, a] += moved
        inside_IG[:, b] -= moved
        rank_I[i], rank_I[j] = b, a
        improved = True
    return improved


def _row(rank_I: Row, problem: Problem) -> Row:
    """[P] the items of each rank in its slots, experts in increasing order, empty slots last."""
    row = np.argsort(rank_I, kind="stable")
    return np.where(row < problem.num_experts, row, EMPTY)

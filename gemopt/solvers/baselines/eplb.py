"""EPLB, the balancer of DeepSeek that SGLang and vLLM use: mean assignments only, no speeds, no steps.

https://github.com/deepseek-ai/EPLB. Copies go to the expert with the most assignments per copy; experts are then packed
heaviest first onto the lightest rank with a slot left. Hierarchical: experts to nodes, copies within a node, then
ranks. Two copies of one expert never share a rank here, since no placement of gemopt allows it.
"""

from __future__ import annotations

import numpy as np

from gemopt.latency import FloatArray
from gemopt.placement import EMPTY
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers.base import Options, Outcome, Row, Supports
from gemopt.solvers.search.packing import pack, replicate


class Eplb:
    """Global EPLB: all ranks as one node."""

    name = "eplb"
    supports = Supports(unequal_slots=False)

    def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
        """Place one layer; see `Solver`."""
        weight_E = problem.weights_T @ problem.counts_TE
        return Outcome(_balance(weight_E, np.arange(problem.num_experts), problem.slots_per_rank), StoppedBy.ITERATIONS)


class EplbHierarchical:
    """Hierarchical EPLB: experts to nodes first, copies within a node. Same as global on a single node."""

    name = "eplb-hierarchical"
    supports = Supports(unequal_slots=False)

    def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
        """Place one layer; see `Solver`."""
        weight_E = problem.weights_T @ problem.counts_TE
        nodes = np.unique(problem.node_of_rank)
        ranks = [np.flatnonzero(problem.node_of_rank == node) for node in nodes]
        alike = len({len(members) for members in ranks}) == 1
        if len(nodes) == 1 or not alike or problem.num_experts % len(nodes):
            row = _balance(weight_E, np.arange(problem.num_experts), problem.slots_per_rank)
            return Outcome(row, StoppedBy.ITERATIONS, note="one node, or nodes that differ: global EPLB")
        share = np.full(len(nodes), problem.num_experts // len(nodes))
        packed = _pack(weight_E, np.arange(problem.num_experts), share)
        row = np.full(problem.num_slots, EMPTY)
        for node, members in enumerate(ranks):
            experts = packed[node * share[0] : (node + 1) * share[0]]
            slots = np.flatnonzero(np.isin(problem.rank_of_slot, members))
            row[slots] = _balance(weight_E, experts, problem.slots_per_rank[members])
        return Outcome(row, StoppedBy.ITERATIONS)


def _balance(weight_E: FloatArray, experts: Row, slots_G: Row) -> Row:
    """Copies, then packing, of some experts onto some ranks."""
    copies = replicate(weight_E[experts], slots_G)
    return _pack(np.repeat(weight_E[experts] / copies, copies), np.repeat(experts, copies), slots_G)


def _pack(weight_I: FloatArray, items: Row, slots_G: Row) -> Row:
    return pack(items, np.tile(weight_I, (len(slots_G), 1)), np.zeros(len(slots_G)), slots_G)

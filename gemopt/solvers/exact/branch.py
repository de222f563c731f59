"""Branch and bound: proves small layers, every cost model alike; see `tree` for its bounds."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from gemopt.bounds import Together, step_bounds, together_bound
from gemopt.bounds.dual_bound import pair_costs
from gemopt.evaluate import objective
from gemopt.latency import FloatArray
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers.base import Options, Outcome, Row, Supports, incumbent
from gemopt.solvers.exact.compact import merged
from gemopt.solvers.exact.plain import begin
from gemopt.solvers.exact.tree import CLOSE, expert_order, make_tree, search_tree

BOUND_SHARE = 0.1  # of the time, for multipliers
NEVER = 2**62


class Branch:
    """Depth-first branch and bound without copies; all placements, or none, are proven."""

    name = "branch"
    supports = Supports(spare_slots=False, proves=True, improves=True)

    def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
        """Place one layer; see `Solver`. A search that is cut short proves nothing of its own.

        Raises
        ------
        UnsupportedError
            Spare slots, moves or rules: the tree knows one copy of each expert and no price but time.
        """
        begun = begin(self.name, problem, options, warm_start)
        if not begun.reached:
            return begun
        assert begun.row is not None and begun.start_us is not None
        row, value, history = begun.row, begun.start_us, begun.history
        small = merged(problem)
        floor_T = step_bounds(small)
        known = _multipliers(small, floor_T, options, value)
        pairs = None
        if known.programme is not None and known.multipliers is not None and (small.slots_per_rank > 0).all():
            pairs = pair_costs(known.programme, *known.multipliers)
        tree = make_tree(small, floor_T, pairs)
        if tree is None:
            note = "too large for a search of all placements"
            return Outcome(row, StoppedBy.ITERATIONS, known.bound_us, history, note, start_us=value, reached=False)
        ranks_E = np.zeros(problem.num_experts, np.int64)
        with options.alarm() as stop:
            best, nodes, done = search_tree(tree, value, ranks_E, NEVER, stop)
        start = value
        if best < value * (1 - CLOSE):
            row = _row(problem, expert_order(small), ranks_E)
            value = objective(problem, row)
            history.append(incumbent(value, known.bound_us))
        bound = value * (1 - 2 * CLOSE) if done else min(known.bound_us, value)
        note = "" if done else f"{nodes} nodes of the search did not prove the optimum"
        outcome = Outcome(row, StoppedBy.PROOF if done else options.cut_by, bound, history, note, start_us=start)
        outcome.stated_steps = outcome.distinct_steps = small.num_steps
        if done:
            outcome.own_bound_us, outcome.searched_nodes = bound, nodes
        return outcome


def _multipliers(problem: Problem, floor_T: FloatArray, options: Options, value: float) -> Together:
    """The co-location bound within its share of the time."""
    limited = replace(options, deadline=min(options.deadline, time.monotonic() + BOUND_SHARE * options.remaining))
    with limited.alarm() as stop:
        return together_bound(problem, floor_T, stop, target_us=value)


def _row(problem: Problem, order: Row, ranks_E: Row) -> Row:
    """[P] the row that puts the experts, in the tree's order, on these ranks."""
    row = np.full(problem.num_slots, -1)
    starts = np.cumsum(problem.slots_per_rank) - problem.slots_per_rank
    for g in range(problem.num_ranks):
        held = np.sort(order[ranks_E == g])
        row[starts[g] : starts[g] + len(held)] = held
    return row

"""Branch and bound: proves small layers, every cost model alike; see `tree` and `copies_tree` for their bounds.

Where slots are spare and contents can be listed, how many copies experts have is branched on; see `share_tree`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gemopt.bounds import Together, step_bounds, together_bound
from gemopt.bounds.dual_bound import pair_costs
from gemopt.bounds.simple import weighted
from gemopt.evaluate import objective
from gemopt.latency import FloatArray
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers.base import Options, Outcome, Row, Supports, incumbent
from gemopt.solvers.exact.compact import merged
from gemopt.solvers.exact.copies_tree import make_copies_tree, search_copies
from gemopt.solvers.exact.plain import begin
from gemopt.solvers.exact.share_tree import bound_of_copies
from gemopt.solvers.exact.tree import CLOSE, expert_order, has_room, make_tree, search_tree
from gemopt.solvers.placing import row_of
from gemopt.solvers.size import FEW_COLUMNS, num_shares

BOUND_SHARE = 0.1  # of the time, for multipliers
FEW_SHARE = 0.8  # of the time, for a search with copies where contents are few: it is likely to end


class Branch:
    """Depth-first branch and bound; all placements, or none, are proven."""

    name = "branch"
    supports = Supports(policies=False, proves=True, improves=True)

    def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
        """Place one layer; see `Solver`. A search that is cut short proves nothing of its own.

        Raises
        ------
        UnsupportedError
            Moves, rules, or copies that do not share evenly: the tree knows no price but time.
        """
        begun = begin(self.name, problem, options, warm_start, copies=True)
        if not begun.reached:
            return begun
        assert begun.row is not None and begun.start_us is not None
        row, value, history = begun.row, begun.start_us, begun.history
        small = merged(problem)
        found = (_search_copies if problem.spare_slots else _search)(small, options, value)
        if found.nodes is None:
            note = "too large for a search of all placements"
            return Outcome(row, StoppedBy.ITERATIONS, found.bound_us, history, note, start_us=value, reached=False)
        start, done, nodes = value, found.done, found.nodes
        if found.best_us < value * (1 - CLOSE):
            assert found.held_EG is not None
            row = _row(small, found.held_EG)
            value = objective(problem, row)
            history.append(incumbent(value, found.bound_us))
        bound = value * (1 - 2 * CLOSE) if done else min(found.bound_us, value)
        note = "" if done else f"{nodes} nodes of the search did not prove the optimum"
        outcome = Outcome(row, StoppedBy.PROOF if done else options.cut_by, bound, history, note, start_us=start)
        outcome.stated_steps = outcome.distinct_steps = small.num_steps
        if done:
            outcome.own_bound_us, outcome.searched_nodes = bound, nodes
        elif problem.spare_slots:
            _branch_on_copies(problem, options, outcome, value)
        return outcome


@dataclass
class _Found:
    """A bound of all placements, the best one's worth and whether each rank holds each expert [E, G] of the tree's
    order, nodes (None: too large), whether all."""

    bound_us: float
    best_us: float
    held_EG: NDArray[np.bool_] | None = None
    nodes: int | None = None
    done: bool = False


def _search(problem: Problem, options: Options, value: float) -> _Found:
    """Placements below `value` without copies."""
    floor_T = step_bounds(problem)
    known = _multipliers(problem, floor_T, options, value)
    found = _Found(known.bound_us, value)
    if not has_room(problem):
        return found
    pairs = None
    if known.programme is not None and known.multipliers is not None and (problem.slots_per_rank > 0).all():
        pairs = pair_costs(known.programme, *known.multipliers)
    tree = make_tree(problem, floor_T, pairs)
    if tree is not None:
        rank_E = np.zeros(problem.num_experts, np.int64)
        with options.alarm() as stop:
            found.best_us, found.nodes, found.done = search_tree(tree, value, rank_E, stop)
        found.held_EG = rank_E[:, None] == np.arange(problem.num_ranks)
    return found


def _search_copies(problem: Problem, options: Options, value: float) -> _Found:
    """Placements below `value` where slots are spare."""
    floor_T = step_bounds(problem)
    found = _Found(weighted(problem, floor_T), value)
    tree = make_copies_tree(problem, floor_T)
    if tree is not None:
        contents = num_shares(problem)
        share = 1.0 if contents is None else 0.0 if contents > FEW_COLUMNS else FEW_SHARE
        limited = replace(options, deadline=time.monotonic() + share * options.remaining)
        sets_E = np.zeros(problem.num_experts, np.int64)
        with limited.alarm() as stop:
            found.best_us, found.nodes, found.done = search_copies(tree, value, sets_E, stop)
        found.held_EG = _members(sets_E, problem.num_ranks)
    return found


def _branch_on_copies(problem: Problem, options: Options, outcome: Outcome, value: float) -> None:
    """Go on where a search was cut, if contents of ranks are few enough to list them."""
    assert outcome.row is not None and outcome.bound_us is not None
    with options.alarm() as stop:
        search = bound_of_copies(problem, outcome.row, value * (1 - options.gap), stop, options.threads)
    if search is None:
        return
    if search.value_us < value:
        outcome.row = _row(problem, _members(search.held_E, problem.num_ranks))
        value = objective(problem, outcome.row)
        outcome.history.append(incumbent(value, outcome.bound_us))
    if search.bound_us > outcome.bound_us:
        outcome.columns, outcome.bound_us = search.covered(), min(search.bound_us, value)
        outcome.own_bound_us = outcome.bound_us
    outcome.note = (
        "" if search.done else f"{len(search.open)} of {search.boxes} ranges of copies may have a better placement"
    )
    if search.done:
        outcome.stopped_by = StoppedBy.PROOF
    elif options.expired():
        outcome.stopped_by = options.cut_by
    else:
        near = search.bound_us >= value * (1 - options.gap)
        outcome.stopped_by = StoppedBy.GAP if near else StoppedBy.ITERATIONS


def _multipliers(problem: Problem, floor_T: FloatArray, options: Options, value: float) -> Together:
    """The co-location bound within its share of the time."""
    limited = replace(options, deadline=min(options.deadline, time.monotonic() + BOUND_SHARE * options.remaining))
    with limited.alarm() as stop:
        return together_bound(problem, floor_T, stop, target_us=value)


def _members(sets_E: Row, num_ranks: int) -> NDArray[np.bool_]:
    """[E, G] whether each rank is in each set, a word of bits."""
    return np.asarray(sets_E[:, None] >> np.arange(num_ranks) & 1 == 1)


def _row(problem: Problem, held_EG: NDArray[np.bool_]) -> Row:
    """[P] the row that puts the experts, in the tree's order, on these ranks."""
    return row_of(held_EG[np.argsort(expert_order(problem))].T, problem.slots_per_rank)

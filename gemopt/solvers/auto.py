"""The default: local search on every layer, then a proof where the layer is small enough for one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from gemopt.evaluate import total
from gemopt.exceptions import MissingPackageError
from gemopt.links import Links
from gemopt.problem import Problem
from gemopt.result import OPTIMALITY_TOLERANCE, StoppedBy, relative_gap
from gemopt.solvers import get
from gemopt.solvers.base import DEFAULT_PATIENCE, Linked, LinkedSolver, Options, Outcome, Row, Supports
from gemopt.solvers.exact.joint import stated_soon
from gemopt.solvers.exact.layer import ROUNDING
from gemopt.solvers.search.local_search import LocalSearch
from gemopt.solvers.size import FEW_COLUMNS, MANY_COLUMNS, num_columns, num_shares, provable, prover

SEARCH_SHARE = 0.4
FIRST_SHARE = 0.2  # where contents of ranks are listed, which finds better placements as well
FIRST_PATIENCE, SHARED_PATIENCE = 50, 200  # batches of kicks, and with spare slots
STATED_SHARE = 0.5  # of the rest is CP-SAT's at most, which proves early or not at all
LISTED_SHARE = 0.6  # the same of contents that are listed and many, whose bound rises for longer than it pays


class Auto:
    """Local search; on small layers the rest of the time goes to an exact solver, started from what was found."""

    name = "auto"
    supports = Supports(proves=True, improves=True, moves=True, links=True, fewest_bytes=True, rules=True)

    def solve_linked(self, problems: Sequence[Problem], links: Links, rows: list[Row], options: Options) -> Linked:
        """As local search, or as CP-SAT where there is little to state; see `LinkedSolver`."""
        search = LocalSearch()
        if options.compute_slack is not None or not stated_soon(problems, links):
            return search.solve_linked(problems, links, rows, options)
        proven = cast(LinkedSolver, get("cpsat")).solve_linked(problems, links, rows, options)
        if proven.stopped_by is not StoppedBy.ITERATIONS or options.patience is not None:
            return proven
        found = search.solve_linked(problems, links, proven.rows, options)  # what CP-SAT states is no tighter than that
        bound_us = max(proven.bound_us, found.bound_us)
        return replace(found, history=proven.history + found.history, bound_us=bound_us, note=proven.note or found.note)

    def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
        """Place one layer; see `Solver`."""
        by = prover(problem)
        if not provable(problem):
            return LocalSearch().solve(problem, options, warm_start)
        patience = DEFAULT_PATIENCE if options.patience is None or by else options.patience
        share = SEARCH_SHARE
        shared = problem.spare_slots > 0 and (num_shares(problem) or 0) > FEW_COLUMNS
        if (by == "columns" or (by == "branch" and shared)) and options.patience is None:
            patience, share = SHARED_PATIENCE if shared else FIRST_PATIENCE, FIRST_SHARE
        deadline = time.monotonic() + share * options.remaining
        found = LocalSearch().solve(problem, replace(options, deadline=deadline, patience=patience), warm_start)
        if found.row is None or found.stopped_by is StoppedBy.PROOF:
            return found
        gap = relative_gap(total(problem, found.row), options.bound_us)
        if gap is not None and gap <= max(options.gap, OPTIMALITY_TOLERANCE):
            return found
        try:
            exact = get(by or "cpsat")
        except MissingPackageError as error:
            found.note = f"no proof was tried: {error}"
            return found
        if options.expired():
            return found
        stated = by is None and options.patience is None
        many = by == "columns" and options.patience is None and (num_columns(problem) or 0) > MANY_COLUMNS
        share = STATED_SHARE if stated else LISTED_SHARE if many else 1.0
        limited = replace(options, deadline=time.monotonic() + share * options.remaining)
        proven = exact.solve(problem, limited, found.row)
        proven.history = found.history + proven.history
        proven.reached |= found.reached
        if proven.row is None:
            proven.row = found.row
        listed = by == "columns" or proven.columns is not None
        ended = listed and options.patience is None and proven.stopped_by is StoppedBy.ITERATIONS
        if ended or ((stated or many) and proven.stopped_by in (StoppedBy.ITERATIONS, StoppedBy.TIME_LIMIT)):
            return _searched_on(problem, options, proven, claimed=by is None)
        return proven


def _searched_on(problem: Problem, options: Options, proven: Outcome, *, claimed: bool) -> Outcome:
    """What was proven, and a better placement from the time that is left; it may refute what a solver only claims."""
    known_us = max(options.bound_us, proven.bound_us or 0.0)
    more = LocalSearch().solve(problem, replace(options, begun=None, bound_us=known_us), proven.row)
    own_us = proven.own_bound_us if claimed else None
    if own_us is not None and more.row is not None and total(problem, more.row) * (1 + ROUNDING) < own_us:
        proven.bound_us = proven.own_bound_us = None
        proven.note = f"{proven.note}; refuted by a better placement, so that its bound is not used"
    proven.row, proven.stopped_by, proven.search = more.row, more.stopped_by, more.search
    proven.history = proven.history + more.history
    return proven

"""Search under a price and limits of moves: best swaps from home, free placements walked home, then kicks.

Never worse than `few_moves` from the placement in force: all its waypoints are offered. Everything that is offered is
scored by `gemopt.evaluate.total` and keeps to the limits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from gemopt.evaluate import total
from gemopt.moves import Moves
from gemopt.problem import Problem
from gemopt.result import Incumbent, StoppedBy, relative_gap
from gemopt.solvers.base import DEFAULT_PATIENCE, Options, Outcome, Row, incumbent, no_placement, seeded, within_limits
from gemopt.solvers.search.moves import few_moves
from gemopt.solvers.search.packing import copies_worth_trying
from gemopt.solvers.search.state import Costs, make_costs

FREE_SHARE = 0.3  # of the time, for a placement that heeds no moves
BATCH_KICKS = 25
KICK_SWAPS = 2
ROUNDS = 20  # of copies and swaps
NEVER = 2**62

FreeSearch = Callable[[Problem, Options, Row | None], Outcome]


def search_within(problem: Problem, options: Options, warm_start: Row | None, free: FreeSearch) -> Outcome:
    """Place one layer whose moves cost or are limited. `free` places it without heeding them."""
    home = homeward_start(problem)
    if home is None:
        return no_placement()
    search = Within(problem, options)
    search.offer(home)
    search.walk(home)
    if warm_start is not None:
        search.walk_home(warm_start)
    if not options.expired() and not search.good_enough():
        search.walk_home(search.without_moves(free))
    stopped_by = search.improve()
    return Outcome(search.row, stopped_by, history=search.history)


def homeward_start(problem: Problem) -> Row | None:
    """The row with the fewest moves; None when the limits allow no row."""
    return None if problem.moves is None else problem.moves.fewest(problem.slots_per_rank)


class Within:
    """Incumbent and history of one layer's search."""

    def __init__(self, problem: Problem, options: Options, costs: Costs | None = None) -> None:
        assert problem.moves is not None
        self.problem, self.options, self.moves = problem, options, problem.moves
        self.costs = make_costs(problem) if costs is None else costs
        self.row: Row | None = None
        self.value = np.inf
        self.history: list[Incumbent] = []

    def offer(self, row: Row) -> bool:
        """Take a row over when it keeps to the limits and is the best so far."""
        if not within_limits(self.problem, row):
            return False
        value = total(self.problem, row)
        if value >= self.value:
            return False
        self.row, self.value = row.copy(), value
        self.history.append(incumbent(value))
        return True

    def good_enough(self) -> bool:
        """Whether the known bound proves the incumbent to the wanted gap."""
        gap = relative_gap(self.value, self.options.bound_us)
        return gap is not None and self.options.bound_us > 0 and gap <= self.options.gap

    def walk(self, start: Row) -> None:
        """Best swaps from a row that keeps to the limits."""
        moves = self.moves
        for point in few_moves(
            self.problem, moves.home_GE, start=start, price_us=moves.price_us, max_moves=moves.most,
            max_into_G=moves.most_into_G, costs=self.costs,
        ):  # fmt: skip
            self.offer(point.row)

    def walk_home(self, start: Row) -> None:
        """From any row, swaps and dropped copies that bring experts home, the least harmful first."""
        homeward = Moves(self.moves.home_GE, price_us=1e3 * (1.0 + total(self.problem, start)))
        row = start
        for _ in range(2):
            for point in few_moves(
                self.problem, homeward.home_GE, start=row, price_us=homeward.price_us, costs=self.costs
            ):
                self.offer(point.row)
                row = point.row
            if within_limits(self.problem, row) or not self.problem.spare_slots:
                return
            row = self.with_copies(row, homeward)
            self.offer(row)

    def without_moves(self, free: FreeSearch) -> Row:
        """A placement that heeds no moves, from a share of the time."""
        options = self.options
        deadline = time.monotonic() + FREE_SHARE * options.remaining
        patience = DEFAULT_PATIENCE if options.patience is None else options.patience
        outcome = free(self.problem.with_moves(None), replace(options, deadline=deadline, patience=patience), None)
        assert outcome.row is not None
        return outcome.row

    def with_copies(self, row: Row, moves: Moves) -> Row:
        """One round over the copies at a price of moves."""
        from gemopt.solvers.search.copies import improve_copies, make_shares
        from gemopt.solvers.search.state import make_state
        from gemopt.solvers.search.swaps import EPSILON
        from gemopt.solvers.search.terms import make_terms

        shares = make_shares(self.problem)
        if shares is None:
            return row
        state = make_state(self.problem, row, self.costs)
        at_home = np.flatnonzero(moves.home_GE.sum(axis=0) > 1)
        candidates = np.union1d(copies_worth_trying(self.problem), at_home)
        improve_copies(self.costs, state, shares, candidates, EPSILON, False, make_terms(self.problem, moves))
        return state.content

    def improve(self) -> StoppedBy:
        """Settle and change copies until nothing helps, then kick until the deadline, the patience or the gap."""
        for _ in range(ROUNDS if self.problem.spare_slots else 1):
            assert self.row is not None
            if self.options.expired():
                break
            before = self.value
            self.settle(self.row)
            if self.problem.spare_slots:
                self.offer(self.with_copies(self.row, self.moves))
            if self.value >= before:
                break
        return self.iterate()

    def settle(self, start: Row) -> None:
        """Swaps between pairs of ranks until none pays."""
        from gemopt.solvers.search.descent import settle
        from gemopt.solvers.search.state import make_state
        from gemopt.solvers.search.terms import make_terms, moved_into

        state, terms = make_state(self.problem, start, self.costs), make_terms(self.problem, self.moves)
        settle(self.costs, state, terms, moved_into(state, terms), np.ones(self.problem.num_ranks, bool), True)
        self.offer(state.content)

    def iterate(self) -> StoppedBy:
        """Kick and settle in batches until the deadline, the patience, the gap or an interrupt."""
        from gemopt.solvers.search.descent import iterate_within
        from gemopt.solvers.search.state import make_state
        from gemopt.solvers.search.swaps import total_cost
        from gemopt.solvers.search.terms import make_terms, moved_into

        problem, options, row = self.problem, self.options, self.row
        assert row is not None
        patience = NEVER if options.patience is None else options.patience
        if problem.num_ranks < 2 or patience == 0:
            return StoppedBy.GAP if self.good_enough() else StoppedBy.ITERATIONS
        rng = seeded(options.seed, problem.num_experts, problem.num_ranks)
        terms, state = make_terms(problem, self.moves), make_state(problem, row, self.costs)
        best = total_cost(state) + terms.price * moved_into(state, terms).sum()
        idle, batch = 0, 1
        while idle < patience:
            if self.good_enough():
                return StoppedBy.GAP
            if options.expired():
                return StoppedBy.INTERRUPT if options.stop() else StoppedBy.TIME_LIMIT
            draws = rng.random((batch, KICK_SWAPS, 3))
            renewed, idle = iterate_within(self.costs, state, terms, draws, best, patience, idle)
            if renewed < best:
                best = renewed
                self.offer(state.content)
            batch = BATCH_KICKS if options.remaining > 1 else 1
        return StoppedBy.ITERATIONS

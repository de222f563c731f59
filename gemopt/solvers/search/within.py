"""Search under a price and limits of moves: best swaps from home, free placements walked home, then kicks.

Where slots are spare, swaps and copies at a price that falls come first, since a copy is one move and a swap two; and
kicks take turns with walks of single changes, which know the split that is asked for.

Never worse than `few_moves` from the placement in force when there is the time for it: all its waypoints are offered.
Everything that is offered is scored by `known_total` and keeps to the limits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gemopt.evaluate import moves_us, objective
from gemopt.moves import Moves
from gemopt.placement import EMPTY, Split
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers.base import Options, Outcome, Row, known_total, within_limits
from gemopt.solvers.hurried import OutOfTimeError
from gemopt.solvers.nearest import fewest_row, no_placement
from gemopt.solvers.search.best import Best
from gemopt.solvers.search.copies import improve_copies
from gemopt.solvers.search.descent import iterate_within, settle
from gemopt.solvers.search.moves import few_moves
from gemopt.solvers.search.packing import copies_worth_trying
from gemopt.solvers.search.promised import has_promises, promised_copies
from gemopt.solvers.search.shares import make_shares
from gemopt.solvers.search.sharing_walk import SharingWalk, Walk
from gemopt.solvers.search.state import Costs, State, make_costs, make_state
from gemopt.solvers.search.swaps import total_cost
from gemopt.solvers.search.terms import make_terms, moved_into
from gemopt.splits.rules import even_weights
from gemopt.splits.weights import known_weights, static_weights

FREE_SHARE = 0.3  # of the time, for a placement that heeds no moves
BATCH_KICKS = 25
KICK_SWAPS = 2
ROUNDS = 20  # of copies and swaps
NEVER = 2**62
PRICES = [0.02 * 0.5**n for n in range(11)]  # of a move, of the value
HOME_SHARE = 0.2  # of the time, for the first walk, which begins with the placement in force
OPTIMAL_SHARE = 4.0  # times as long as kicks, which know nothing of the optimal split: walks

FreeSearch = Callable[[Problem, Options, Row | None], Outcome]


def search_within(problem: Problem, options: Options, warm_start: Row | None, free: FreeSearch) -> Outcome:
    """Place one layer whose moves cost or are limited. `free` places it without heeding them.

    With `options.patience` 0 that is left out: the search ends after the descents from home and from the warm start.
    """
    search = _Search.going_on(options, problem) or _Search(problem, warm_start, free)
    if search.row is None:
        return no_placement(problem)
    search.options, search.walk = options, None
    if problem.moves is not None and problem.moves.none and (problem.moves.home_GE.sum(axis=0) == 1).all():
        search.searched = True  # there is no other content
        return replace(search.outcome(StoppedBy.PROOF, "few moves"), bound_us=search.value)
    with options.alarm() as search.stop:
        search.descend()
        stopped_by = search.iterate()
    return search.outcome(stopped_by, "few moves")


def homeward(problem: Problem, start: Row, costs: Costs, stop: NDArray[np.uint8]) -> Row:
    """Swaps that bring experts home, the least harmful first, until the limits of moves hold; else where they end.

    Where swaps do not suffice, copies that are not at home are dropped.
    """
    assert problem.moves is not None
    moves, row = Moves(problem.moves.home_GE, price_us=1e3 * (1.0 + known_total(problem, start))), start
    for _ in range(2):
        way = few_moves(
            problem, moves.home_GE, start=row, price_us=moves.price_us, costs=costs, stop=stop,
            weights_P=known_weights(problem, row),
        )  # fmt: skip
        for point in way:
            if within_limits(problem, point.row):
                return point.row
        row = copies_within(problem, make_state(problem, way[-1].row, costs, stop), costs, moves)
    return row


def copies_within(problem: Problem, state: State, costs: Costs, moves: Moves) -> Row:
    """One round over the copies at a price and limits of moves."""
    shares = make_shares(problem)
    if shares is not None and problem.spare_slots:
        at_home = np.flatnonzero(moves.home_GE.sum(axis=0) > 1)
        candidates = np.union1d(copies_worth_trying(problem), at_home)
        improve_copies(costs, state, shares, candidates, False, make_terms(problem, moves))
    return state.content


def falling(
    problem: Problem, row: Row, stop: NDArray[np.uint8], costs: Costs | None = None, prices: Sequence[float] = PRICES
) -> Iterator[Row]:
    """Rows that swaps and copies lead to at a price that falls, so that what gains most by its moves comes first.

    Steps are judged by even shares whatever the split: copies that pay only under another one are not found here.
    prices: of a move, of the value of the row. The last ones are left out where a move costs more.
    """
    assert problem.moves is not None
    costs = make_costs(problem) if costs is None else costs
    value_us, ranks = known_total(problem, row), np.ones(problem.num_ranks, bool)
    for price in prices:
        if stop[0] or price * value_us <= problem.moves.price_us:
            return
        moves = replace(problem.moves, price_us=price * value_us)
        terms, state = make_terms(problem, moves), make_state(problem, row, costs, stop)
        settle(costs, state, terms, moved_into(state, terms), ranks, True)
        row = copies_within(problem, make_state(problem, state.content, costs, stop), costs, moves)
        yield row


class _Search(Best):
    """One layer's search, which a later call may go on with: incumbent, history, and what is still to be done.

    searched: whether anything was. stop: [1] see `Options.alarm`. even_us: least total of a row with even weights for
    which static ones were chosen. home: where the first walk begins; walked: whether it did. walk: of this call.
    """

    home: Row
    even_us = np.inf
    walked = False
    walk: Walk | None = None

    def __init__(self, problem: Problem, warm_start: Row | None, free: FreeSearch) -> None:
        assert problem.moves is not None
        super().__init__(problem)
        self.moves, self.free = problem.moves, free
        self.starts: list[Row] = []
        self.free_tried = False
        try:
            home = fewest_row(problem)
        except OutOfTimeError:
            if warm_start is None or not within_limits(problem, warm_start):
                raise
            home = warm_start
        if home is not None:
            self.home = home
            self.starts = [home] if warm_start is None or (warm_start == home).all() else [home, warm_start]
            for start in self.starts:
                self.offer(start)

    def offer(self, row: Row) -> bool:
        """Take a row over when it keeps to the limits, fills what must be full, and is the best so far.

        Static weights are chosen for rows that cost least with even ones, while there is time.
        """
        if not within_limits(self.problem, row) or (self.problem.full and (row == EMPTY).any()):
            return False
        problem = self.problem
        if problem.split is Split.STATIC and self.searched and not self.stop[0]:
            even_us = objective(problem, row, even_weights(row, problem.num_experts)) + moves_us(problem, row)
            if even_us < self.even_us:
                self.even_us = even_us
                static_weights(problem, row, self.stop)
        return self.keep(row, known_total(problem, row))

    def descend(self) -> None:
        """Everything that was not done by a call before: walks from all starts, then swaps and copies from the best."""
        begun = False
        while not self.options.expired() and not self.good_enough():
            self.searched = True
            if not self.starts and self.options.patience != 0 and not self.free_tried:
                self.free_tried = True
                with suppress(OutOfTimeError):  # there is a row already
                    self.starts.append(self._without_moves())
            if not self.starts:
                break
            if not begun and self.starts[0] is self.home and self.problem.spare_slots:
                if has_promises(self.problem):
                    for row in promised_copies(self.problem, self.home, self.stop):
                        self.offer(row)
                for row in falling(self.problem, self.home, self.stop, self.costs):
                    self.offer(row)
            begun = True
            reached = self._walk(self.starts[0])
            self.starts[:1] = [reached] if self.stop[0] else []
        if begun:
            self._improve()

    def _walk(self, start: Row) -> Row:
        """Best swaps from a row; first towards home where it does not keep to the limits. Where that ended."""
        moves, row = self.moves, start
        if not within_limits(self.problem, row):
            row = homeward(self.problem, row, self.costs, self.stop)
        if not within_limits(self.problem, row):
            return row
        way = few_moves(
            self.problem, moves.home_GE, start=row, price_us=moves.price_us, max_moves=moves.most,
            max_into_G=moves.most_into_G, costs=self.costs, stop=self.stop, weights_P=known_weights(self.problem, row),
        )  # fmt: skip
        static = self.problem.split is Split.STATIC
        for point in [min(way, key=lambda each: each.objective_us + moves.price_us * each.moves)] if static else way:
            self.offer(point.row)
        return way[-1].row

    def _without_moves(self) -> Row:
        """A placement that heeds no moves, from a share of the time."""
        options = self.options
        deadline = time.monotonic() + FREE_SHARE * options.remaining
        given = replace(options, deadline=deadline, begun=None)
        outcome = self.free(self.problem.with_moves(None), given, None)
        assert outcome.row is not None
        return outcome.row

    def _improve(self) -> None:
        """Swaps between pairs of ranks, and copies, until nothing helps."""
        terms, ranks = make_terms(self.problem, self.moves), np.ones(self.problem.num_ranks, bool)
        for _ in range(ROUNDS if self.problem.spare_slots else 1):
            if self.options.expired():
                return
            assert self.row is not None
            before, state = self.value, self.state(self.row)
            settle(self.costs, state, terms, moved_into(state, terms), ranks, True)
            self.offer(state.content)
            if self.problem.spare_slots:
                self.offer(copies_within(self.problem, self.state(self.row), self.costs, self.moves))
            if self.value >= before:
                return

    def iterate(self) -> StoppedBy:
        """Kick and settle in batches until the deadline, the patience, the gap or an interrupt."""
        if (ended := self.ended(descended=not self.starts)) is not None:
            return ended
        if self.moves.none and self.options.patience is None:  # there are no more than the copies at home
            self.options = replace(self.options, patience=BATCH_KICKS)
        problem, options = self.problem, self.options
        patience = NEVER if options.patience is None else options.patience
        assert self.draws is not None
        terms, state = make_terms(problem, self.moves), None
        best, idle, batch = np.inf, 0, 1
        while idle < patience:
            if self.good_enough():
                return StoppedBy.GAP
            if options.expired():
                return options.cut_by
            if state is None:
                assert self.row is not None
                state = self.state(self.row)
                best = total_cost(state) + terms.price * moved_into(state, terms).sum()
            draws = self.draws.random((batch, KICK_SWAPS, 3))
            begun = time.monotonic()
            renewed, idle = iterate_within(self.costs, state, terms, draws, best, patience, idle)
            if renewed < best:
                best = renewed
                self.offer(state.content)
            walks = problem.spare_slots and problem.split is not Split.STATIC
            if walks and self._walk_on(time.monotonic() - begun):
                state, idle = None, 0
            batch = BATCH_KICKS if options.remaining > 1 else 1
        return StoppedBy.ITERATIONS

    def _walk_on(self, kicked_s: float) -> bool:
        """Changes of single slots, at first from home, then from the best, in turn with kicks; whether they helped."""
        assert self.row is not None and self.draws is not None
        seconds = kicked_s * (OPTIMAL_SHARE if self.problem.split is Split.OPTIMAL else 1.0)
        value_us = self.value
        if self.walk is None and not self.walked:
            self.walk, self.walked = SharingWalk(self.problem, self.home, self.draws), True
            seconds, value_us = HOME_SHARE * self.options.remaining, np.inf
        elif self.walk is None:
            self.walk = SharingWalk(self.problem, self.row, self.draws)
        return self.walk.go_on(self.row, value_us, self.options, seconds) and self.offer(self.walk.best)

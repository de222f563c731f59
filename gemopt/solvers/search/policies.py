"""Search over copies that do not share evenly: from the even split's answer, or under the optimal split of plain loads.

Static weights, nearest copies and splits with activated experts take the placement found for the even split further:
swaps with every slot's share as it is, shares chosen anew, and in turn a walk of single changes, of weights as well.
Every row is judged by the policy's objective.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from gemopt.evaluate import objective
from gemopt.placement import EMPTY, Split
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers.base import Options, Outcome, Row, seeded
from gemopt.solvers.search.best import Best
from gemopt.solvers.search.packing import filled, lpt_row
from gemopt.solvers.search.parts_walk import PartsWalk
from gemopt.solvers.search.sharing_walk import SharingWalk, Walk
from gemopt.solvers.search.spread_search import SpreadSearch
from gemopt.solvers.search.state import State, guiding_planes
from gemopt.solvers.search.swaps import KICK_DRAWS, descend_all, iterate, total_cost
from gemopt.splits import plain, shares
from gemopt.splits.rules import even_weights
from gemopt.splits.weights import remember_weights, static_weights

EVEN_SHARE = 0.5  # of the time, for the even split
SHARING_SHARE = 0.8  # the same where what follows goes on from its answer
STATIC_SHARE = 0.9  # of the time after the descent, for the even split where weights come last: they save little
ROUNDS = 6  # of swaps and shares
BATCH_KICKS = 10
LEAST_GAIN = 5e-4  # of the value: thousands of changes that gain less in all are as good as idle
WALK_SHARE = 0.5  # of the time that is left: what a round of a walk takes at most, beside kicks

EvenSearch = Callable[[Problem, Options, Row | None], Outcome]


def search_policy(problem: Problem, options: Options, warm_start: Row | None, even: EvenSearch) -> Outcome:
    """Place one layer with spare slots whose copies share by another policy. `even` places it for the even split."""
    kind = _Spreading if problem.split is Split.OPTIMAL and plain(problem) else _Sharing
    search = kind.going_on(options, problem) or kind(problem, warm_start, even)
    search.options = options
    with options.alarm() as search.stop:
        search.descend()
        if search.row is None:  # no time for what it begins with
            search.offer(lpt_row(problem))
        stopped_by = search.iterate()
    return search.outcome(stopped_by, "speed-weighted LPT" if warm_start is None else "warm start")


class _Search(Best, ABC):
    """One layer's search, which a later call may go on with: incumbent, history, and whether anything was searched.

    warm: where the even split's search begins. given: the warm start whose static weights are still to be chosen.
    """

    def __init__(self, problem: Problem, warm_start: Row | None, even: EvenSearch) -> None:
        super().__init__(problem)
        self.even, self.warm, self.given, self.descended = even, warm_start, warm_start, False
        self.evenly = replace(problem, split=Split.EVEN, senders_TGE=None)
        self.begun: object = None
        self.stop = np.zeros(1, np.uint8)
        if problem.split is not Split.STATIC:
            self.offer(lpt_row(problem) if warm_start is None else warm_start)
        elif warm_start is not None:  # else the even split's answer is as good
            row = self.completed(warm_start)
            self.keep_evenly(row)
            if row.tobytes() in problem.weighed:
                self.keep(row, objective(problem, row))

    def keep_evenly(self, row: Row) -> None:
        """Take a row over for what it costs with even static weights, which round otherwise than the even split."""
        self.keep(row, objective(self.problem, row, even_weights(row, self.problem.num_experts)))

    def offer(self, row: Row) -> bool:
        """Take a row over, `completed`, when its exact objective is the best so far."""
        row = self.completed(row)
        return self.keep(row, objective(self.problem, row))

    def descend(self) -> None:
        """What every search begins with, unless it was done before."""
        if self.descended or not self.may_begin():
            return
        self.searched |= not self.options.expired()
        self.begin()
        self.descended = not self.stop[0]
        if not self.descended:  # what was cut goes on where it ended
            self.warm = self.row

    def may_begin(self) -> bool:
        """Whether there is time for the first descent, or for what comes before it."""
        return not self.options.expired()

    def even_row(self, share: float, patience: int | None = 0) -> Row:
        """Where the descent under the even split, or what kicks make of it, ends with a share of the time.

        With static weights it is kept for what it costs with even ones (`keep_evenly`).
        """
        deadline = time.monotonic() + share * self.options.remaining
        options = replace(self.options, deadline=deadline, patience=patience, begun=self.begun, bound_us=0.0)
        outcome = self.even(self.evenly, options, self.warm)
        self.begun = outcome.search
        assert outcome.row is not None
        if self.problem.split is Split.STATIC:
            self.keep_evenly(outcome.row)
        return outcome.row

    @abstractmethod
    def begin(self) -> None:
        """The first descent."""

    @abstractmethod
    def improve(self) -> bool:
        """One more try; whether it helped."""

    def iterate(self) -> StoppedBy:
        """Try until the deadline, the patience, the gap or an interrupt."""
        if (ended := self.ended(descended=self.descended)) is not None:
            return ended
        options, idle = self.options, 0
        while not options.exhausted(idle):
            if self.good_enough():
                return StoppedBy.GAP
            if options.expired():
                return options.cut_by
            idle = 0 if self.improve() else idle + 1
        return StoppedBy.ITERATIONS


class _Spreading(_Search):
    """The optimal split of plain loads, from copies added by promise or the even split's answer; see `SpreadSearch`."""

    def begin(self) -> None:
        start = lpt_row(self.problem) if self.warm is None else self.warm
        costs = guiding_planes(self.problem) or self.costs
        state = self.state(start, costs)
        if (np.bincount(start[start != EMPTY]) < 2).all():
            descend_all(costs, state, False)
        options = self.options
        draws = seeded(options.seed, self.problem.num_experts, self.problem.num_ranks)
        self.spread = SpreadSearch(self.problem, state.content, draws)
        self.spread.take(self.spread.fill(self.spread.best, options.expired))
        if not options.expired():
            self.spread.take(self.spread.looks.at(self.even_row(EVEN_SHARE)))
        self.offer(self.spread.best.row)

    def improve(self) -> bool:
        before, options = self.value, self.options
        planned = options.patience is None and np.isfinite(options.deadline)
        left_s, enough_us = options.remaining if planned else None, self.enough_us()
        if self.descended and self.spread.step(options.expired, left_s, enough_us):
            self.offer(self.spread.best.row)
        return self.value < before * (1 - LEAST_GAIN)


class _Sharing(_Search):
    """Any policy, from the placement that the even split has.

    Static weights are never dearer than even ones, so that the even split's search, as long as it takes, comes first:
    with weights its answer is at least as good. None are chosen before its descents have ended; until then the search
    is the even split's own. Other policies may share that placement worse, and search on sooner.
    """

    walk: Walk | None = None

    @property
    def static(self) -> bool:
        """Whether the weights are chosen for the placement."""
        return self.problem.split is Split.STATIC

    def may_begin(self) -> bool:
        """Also for the even split's greedy starts, which static weights begin with."""
        return self.options.may_start() if self.static else super().may_begin()

    def begin(self) -> None:
        if self.given is not None and self.static and not self.options.expired():
            static_weights(self.problem, self.completed(self.given), self.stop, anew=True)
            self.offer(self.given)
            self.given = None
        even_row = self.even_row(1.0 if self.static else SHARING_SHARE)
        if self.static:
            return
        self.offer(even_row)  # whatever the time: what there was before is no search's
        if not self.options.expired():
            self.offer(filled(self.problem, even_row))
        assert self.row is not None
        self.settle(self.row)

    def iterate(self) -> StoppedBy:
        """As every search does; static weights after what kicks gain under the even split."""
        if self.static and self.descended and self.options.patience != 0 and not self.options.expired():
            row = self.even_row(STATIC_SHARE, self.options.patience)
            if not self.options.expired():
                self.offer(row)
                self.settle(row)
        return super().iterate()

    def offer(self, row: Row) -> bool:
        """As every search does; where time ends, static weights are what they are then."""
        row = self.completed(row)
        if self.static:
            static_weights(self.problem, row, self.stop)
        return super().offer(row)

    def settle(self, row: Row) -> None:
        """Swaps with shares as they are, then shares anew, while that helps."""
        for _ in range(ROUNDS):
            if self.options.expired():
                return
            state = self.shared(row)
            descend_all(self.costs, state, False)
            row = state.content
            if not self.offer(row):
                return

    def shared(self, row: Row) -> State:
        """State of a row whose slots keep their present shares."""
        return self.state(row, shares_TP=shares(self.problem, row))

    def improve(self) -> bool:
        assert self.row is not None and self.draws is not None
        begin, before = time.monotonic(), self.value
        state = self.shared(self.row)
        draws, row = self.draws.random((BATCH_KICKS, KICK_DRAWS)), state.content.copy()
        iterate(self.costs, state, draws, total_cost(state), row, np.zeros(2), 0.0)
        if self.offer(row):
            self.settle(row)
        self.walk_on(time.monotonic() - begin)
        return self.value < before

    def walk_on(self, seconds: float) -> None:
        """Changes of slots as long as kicks took, or so many where the time does not count."""
        assert self.row is not None and self.draws is not None
        if self.walk is None:
            self.walk = (PartsWalk if PartsWalk.takes(self.problem) else SharingWalk)(
                self.problem, self.row, self.draws
            )
        walk, options = self.walk, self.options
        if isinstance(walk, PartsWalk) and options.patience is None:
            walk.allow(WALK_SHARE * options.remaining)
        if walk.go_on(self.row, self.value, options, seconds):
            if isinstance(walk, PartsWalk) and self.static and walk.weights_P is not None:
                remember_weights(self.problem, walk.best, walk.weights_P)
            self.offer(walk.best)

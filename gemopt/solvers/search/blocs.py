"""Search where sets of experts are on one rank or node: each stays on its unit for a while, then one goes to another.

The search below sees units as ranks that are closed to experts, which every kernel keeps to. A set goes to another unit
by the fewest changes that keep the rules, and what a descent makes of that is kept where it is better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from gemopt.evaluate import total
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers.base import DEFAULT_PATIENCE, Options, Outcome, Row, seeded, within_limits
from gemopt.solvers.nearest import fewest_row, nearest_row, no_placement
from gemopt.solvers.search.best import Best
from gemopt.solvers.search.packing import filled, lpt_row

Inner = Callable[[Problem, Options, Row | None], Outcome]


def settled(problem: Problem, row: Row) -> Problem:
    """The problem whose sets of experts stay on the units that a row has them on."""
    if problem.rules is None or not problem.rules.blocs:
        return problem
    units: list[int | None] = [*problem.rules.units(row, problem.slots_per_rank)]
    return problem.under(rules=problem.rules.settled(units))


def completed(problem: Problem, row: Row | None) -> Row | None:
    """The row, with empty slots filled where none may be."""
    return filled(problem, row) if problem.full and row is not None else row


def search_blocs(problem: Problem, options: Options, warm_start: Row | None, inner: Inner) -> Outcome:
    """Place one layer. `inner` places it while every set stays on its unit; `options.patience` 0: that alone."""
    search = _Search.going_on(options, problem)
    if search is None:
        start = completed(problem, warm_start)
        if start is None or not within_limits(problem, start):
            start = completed(problem, lpt_row(problem)) if problem.moves is None else fewest_row(problem)
        if start is None:
            return no_placement(problem)
        search = _Search(problem, start, inner)
    search.options = options
    stopped_by = search.within(0)
    if options.patience != 0:
        stopped_by = search.iterate()
    return search.outcome(stopped_by, "balanced" if warm_start is None else "warm start")


class _Search(Best):
    """One layer's search, which a later call may go on with. stay: the problem whose sets stay where they are."""

    def __init__(self, problem: Problem, start: Row, inner: Inner) -> None:
        super().__init__(problem)
        self.inner, self.stay = inner, settled(problem, start)
        self.begun: object = None
        self.keep(start, total(problem, start))

    def within(self, patience: int) -> StoppedBy:
        """Search on while all sets stay; why that ended."""
        outcome = self.inner(self.stay, replace(self.options, patience=patience, begun=self.begun), self.row)
        self.take(outcome)
        self.begun = outcome.search
        self.searched |= outcome.reached
        return outcome.stopped_by

    def take(self, outcome: Outcome) -> bool:
        """Keep what was found, where it is better."""
        return outcome.row is not None and self.keep(outcome.row, total(self.problem, outcome.row))

    def relocate(self) -> bool:
        """Send a set, drawn at random, to another unit, and descend from there; whether that was better."""
        rules, slots_G = self.problem.rules, self.problem.slots_per_rank
        assert rules is not None and self.row is not None and self.draws is not None
        bloc = int(self.draws.integers(len(rules.blocs)))
        others = np.unique(rules.blocs[bloc][1]).tolist()
        others.remove(rules.units(self.row, slots_G)[bloc])
        if not others:
            return False
        units: list[int | None] = [None] * len(rules.blocs)
        units[bloc] = int(self.draws.choice(others))
        bound = replace(self.problem, rules=rules.settled(units))
        row = nearest_row(bound, self.row, self.options.remaining)
        if row is None or self.options.expired():
            return False
        stay = settled(self.problem, row)
        outcome = self.inner(stay, replace(self.options, patience=0, begun=None), row)
        if not self.take(outcome):
            return False
        self.stay, self.begun = stay, outcome.search
        return True

    def iterate(self) -> StoppedBy:
        """Kicks and sets on other units in turn, until the deadline, the patience, the gap or an interrupt."""
        options, idle = self.options, 0
        self.draws = self.draws or seeded(options.seed, self.problem.num_experts, self.problem.num_ranks)
        while not options.exhausted(idle):
            if self.good_enough():
                return StoppedBy.GAP
            if options.expired():
                return options.cut_by
            before = self.value
            self.within(DEFAULT_PATIENCE)
            self.relocate()
            idle = 0 if self.value < before else idle + 1
        return StoppedBy.GAP if self.good_enough() else StoppedBy.ITERATIONS

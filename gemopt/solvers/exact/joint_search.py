"""What CP-SAT and MILP share when they state all layers with their links."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from gemopt.bounds import timed_step_bounds
from gemopt.evaluate import check, linked_total
from gemopt.exceptions import InputError
from gemopt.latency import FloatArray
from gemopt.links import Links
from gemopt.moves import Budget
from gemopt.problem import Problem
from gemopt.solvers.base import DEFAULT_PATIENCE, Linked, Options, Outcome, Row, incumbent, within_budget
from gemopt.solvers.exact.compact import Compact
from gemopt.solvers.exact.formulation import TOO_LATE
from gemopt.solvers.exact.joint import JointCompact, Sending, sendings, turns_of
from gemopt.solvers.exact.layer import Search, too_large
from gemopt.solvers.search.linked import search_linked

SEARCH_SHARE = 0.4  # of the time, for the search that the proof starts from


@dataclass(eq=False)
class JointSearch(Search):
    """All layers being solved; `row` [L * P] holds theirs one after the other, objectives are `linked_total`.

    floors_LT: lower bounds on the makespans. sendings: what is stated of the links.
    """

    problems: list[Problem] = field(default_factory=list)
    links: Links | None = None
    floors_LT: list[FloatArray] = field(default_factory=list)
    sendings: list[Sending] = field(default_factory=list)

    @classmethod
    def of(cls, problems: Sequence[Problem], links: Links, rows: list[Row], options: Options) -> JointSearch:
        """Start from rows; `options.bound_us` is known of the total."""
        with options.alarm() as stop:
            floors_LT = [timed_step_bounds(problem, stop)[0] for problem in problems]
        sent = sendings(links, len(problems), turns_of(problems[0]))
        row, value, base = np.concatenate(rows), linked_total(problems, rows, links), float(np.sum(floors_LT))
        compact = _stated(problems, floors_LT, sent, links, value, options.budget)
        known = max(base, options.bound_us)
        search = cls(
            problems[0], options, problems[0], compact, row, value, known, value, history=[incumbent(value, known)],
            problems=list(problems), links=links, floors_LT=floors_LT, sendings=sent,
        )  # fmt: skip
        return search

    @property
    def rows(self) -> list[Row]:
        """The best row of each layer."""
        return list(np.split(self.row, len(self.problems)))

    def offer_row(self, row: Row) -> None:
        """See `Search`."""
        assert self.links is not None
        rows = np.split(row, len(self.problems))
        try:
            for problem, each in zip(self.problems, rows, strict=True):
                check(problem, each)
        except InputError:
            return
        value = linked_total(self.problems, rows, self.links)
        if value < self.objective_us and within_budget(self.problems, rows, self.options.budget):
            self.row, self.objective_us = row, value
            self.history.append(incumbent(value, self.bound_us))

    def stated_anew(self) -> Compact:
        """See `Search`."""
        assert self.links is not None
        stated = self.floors_LT, self.sendings, self.links, self.objective_us, self.options.budget
        return _stated(self.problems, *stated)


def _stated(
    problems: Sequence[Problem], floors_LT: list[FloatArray], sent: list[Sending], links: Links, value: float,
    budget: Budget | None,
) -> Compact:  # fmt: skip
    """All layers, each with what is open between all floors and a placement; links tell equal ranks apart."""
    open_us = max(value - float(np.sum(floors_LT)), 0.0)
    layers = [Compact.of(problem, floor_T, open_us) for problem, floor_T in zip(problems, floors_LT, strict=True)]
    layers = [replace(layer, group_G=np.arange(layer.num_ranks)) for layer in layers]
    joint = JointCompact.of(layers, sent, turns_of(problems[0]), links.exchange.overlap, budget)
    return joint  # type: ignore[return-value]


def solve_joint(
    problems: Sequence[Problem],
    links: Links,
    rows: list[Row],
    options: Options,
    prove: Callable[[Search], Outcome],
) -> Linked:
    """The search over all layers, then a proof from what it found."""
    deadline = time.monotonic() + SEARCH_SHARE * options.remaining
    patience = DEFAULT_PATIENCE if options.patience is None else options.patience
    found = search_linked(problems, links, rows, replace(options, deadline=deadline, patience=patience))
    if too_large(problems, options):
        return replace(found, stopped_by=options.cut_by, note=TOO_LATE)
    search = JointSearch.of(problems, links, found.rows, options)
    outcome = search.ended() or prove(search)
    history = found.history + outcome.history
    return Linked(search.rows, search.objective_us, outcome.stopped_by, history, outcome.note, search.bound_us)

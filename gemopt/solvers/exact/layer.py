"""What CP-SAT and MILP share around their formulations: which steps to state, the best row so far, the outcome."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gemopt.bounds.simple import step_bounds
from gemopt.evaluate import objective
from gemopt.exceptions import SolverError
from gemopt.problem import Problem
from gemopt.result import OPTIMALITY_TOLERANCE, Incumbent, StoppedBy, relative_gap
from gemopt.solvers.base import Options, Outcome, Row, incumbent
from gemopt.solvers.exact.compact import Compact, merged
from gemopt.solvers.exact.reduction import representative_steps
from gemopt.solvers.search.packing import lpt_row

ROUNDING = 1e-9
SAMPLE = 5  # steps that tell how large a step's part of the formulation is


@dataclass(eq=False)
class Search:
    """One layer being solved.

    Attributes
    ----------
    problem
        All distinct steps; objectives are always those of the whole trace.
    compact
        What is stated: all distinct steps, or representatives when they are too many for the time.
    row, objective_us
        Best placement so far.
    bound_us
        Best lower bound so far, valid for the whole trace.
    own_bound_us
        Best lower bound that the solver itself has claimed for the whole trace; -inf when none.
    start_us
        Objective of the row that the search began with.
    """

    problem: Problem
    options: Options
    compact: Compact
    row: Row
    objective_us: float
    bound_us: float
    start_us: float
    own_bound_us: float = -np.inf
    history: list[Incumbent] = field(default_factory=list)

    @classmethod
    def prepare(cls, problem: Problem, options: Options, warm_start: Row | None, budget: float) -> Search:
        """Merge equal steps, start from the warm start or a greedy one, and reduce what is larger than the budget.

        `budget` is the number of non-zero coefficients that the solver can take in the time it has.
        """
        problem = merged(problem)
        floor_T = step_bounds(problem)
        row = lpt_row(problem) if warm_start is None else warm_start.copy()
        bound = max(float(problem.weights_T @ floor_T), options.bound_us)
        some = np.unique(np.linspace(0, problem.num_steps - 1, SAMPLE).round().astype(np.int64))
        per_step = Compact.of(problem.select(some), floor_T[some]).size / len(some)
        limit = int(min(budget / max(per_step, 1.0), problem.num_steps))
        if limit < problem.num_steps:  # a power of two: layers of one call say the same
            limit = 1 << max(limit, 1).bit_length() - 1
        steps, weights_T = representative_steps(problem, limit)
        compact = Compact.of(problem.select(steps, weights_T), floor_T[steps])
        start = objective(problem, row)
        search = cls(problem, options, compact, row, start, bound, start)
        search.history.append(incumbent(search.objective_us, bound))
        return search

    @property
    def reduced(self) -> bool:
        """Whether representatives stand for the steps, so that the solver's own bound does not hold."""
        return self.compact.num_steps < self.problem.num_steps

    def ended(self) -> Outcome | None:
        """The outcome when nothing is left to do before the solver has begun."""
        if self.done:
            return self.outcome(self.proof(), "bound from the simple bounds of all steps", started=False)
        if self.options.expired():
            stopped_by = StoppedBy.INTERRUPT if self.options.stop() else StoppedBy.TIME_LIMIT
            return self.outcome(stopped_by, "no time to solve", started=False)
        return None

    @property
    def done(self) -> bool:
        """Whether the gap asked for is reached."""
        gap = relative_gap(self.objective_us, self.bound_us)
        return gap is not None and gap <= max(self.options.gap, OPTIMALITY_TOLERANCE)

    def offer_bound(self, bound_us: float) -> None:
        """Take over a bound of the stated steps where it holds for all."""
        if not self.reduced:
            self.own_bound_us = max(self.own_bound_us, bound_us)
            self.bound_us = max(self.bound_us, bound_us)

    def offer_row(self, row: Row) -> None:
        """Take over a row that is better on the whole trace."""
        value = objective(self.problem, row)
        if value < self.objective_us:
            self.row, self.objective_us = row, value
            self.history.append(incumbent(value, self.bound_us))

    def outcome(self, stopped_by: StoppedBy, note: str, *, started: bool = True) -> Outcome:
        """The best that was found.

        Raises
        ------
        SolverError
            When the bound is above an objective that was reached by more than rounding.
        """
        if self.bound_us > self.objective_us + ROUNDING * abs(self.objective_us):
            raise SolverError(f"bound {self.bound_us} us above the objective {self.objective_us} us of a placement")
        if self.reduced and started:
            note += (
                f"; placement from {self.compact.num_steps} weighted representatives of "
                f"{self.problem.num_steps} distinct steps, bound from the simple bounds of all steps"
            )
        return Outcome(
            self.row,
            stopped_by,
            min(self.bound_us, self.objective_us),
            self.history,
            note,
            start_us=self.start_us,
            own_bound_us=self.own_bound_us if np.isfinite(self.own_bound_us) else None,
            stated_steps=self.compact.num_steps,
            distinct_steps=self.problem.num_steps,
            reached=started,
        )

    def proof(self) -> StoppedBy:
        """Why a search that the solver calls finished has stopped."""
        gap = relative_gap(self.objective_us, self.bound_us)
        if gap is not None and gap <= OPTIMALITY_TOLERANCE:
            return StoppedBy.PROOF
        return StoppedBy.GAP if gap is not None and gap <= self.options.gap else StoppedBy.ITERATIONS

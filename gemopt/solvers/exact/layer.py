"""What CP-SAT and MILP share around their formulations: which steps to state, the best row so far, the outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gemopt.bounds import timed_step_bounds
from gemopt.evaluate import check, total
from gemopt.exceptions import InputError
from gemopt.latency import FloatArray
from gemopt.problem import Problem
from gemopt.result import OPTIMALITY_TOLERANCE, Incumbent, StoppedBy, relative_gap
from gemopt.solvers.base import Options, Outcome, Row, incumbent, within_limits
from gemopt.solvers.exact.compact import Compact, merged, num_literals
from gemopt.solvers.exact.formulation import TOO_LATE
from gemopt.solvers.exact.reduction import representative_steps
from gemopt.solvers.nearest import fewest_row, no_placement
from gemopt.solvers.search.packing import lpt_row

ROUNDING = 1e-9
WORTH = 0.5
SAMPLE = 5  # steps that tell how large a step's part of the formulation is
LITERALS_PER_S = 1e6  # no formulation is stated faster, and arrays for more of them take gigabytes
LEAST_S = 0.1


@dataclass(eq=False)
class Search:
    """One layer being solved.

    Attributes
    ----------
    problem
        All distinct steps; objectives, with the price of moves, are always those of the whole trace.
    stated, compact
        The steps that are stated: all distinct ones, or representatives when they are too many for the time; and how.
    row, objective_us
        Best placement so far, and what is minimised (`evaluate.total`) of it, whatever the solver says it is worth.
    known_us
        Lower bound for the whole trace that was known before the solver began: the simple bounds.
    start_us
        Objective of the row that the search began with.
    own_bound_us
        Best lower bound that the solver claims for the whole trace: its word. -inf when it claims none.
    offered
        How many of the rows that a child process has written down were taken over.
    """

    problem: Problem
    options: Options
    stated: Problem
    compact: Compact
    row: Row
    objective_us: float
    known_us: float
    start_us: float
    own_bound_us: float = -np.inf
    history: list[Incumbent] = field(default_factory=list)
    offered: int = 0

    @classmethod
    def prepare(cls, problem: Problem, options: Options, warm_start: Row | None, budget: float) -> Search | None:
        """Merge equal steps, start from the warm start or a greedy one, and reduce what is larger than the budget.

        `budget` is the number of non-zero coefficients that the solver can take in the time it has. None: the limits of
        moves allow no placement.
        """
        problem = merged(problem)
        with options.alarm() as stop:
            floor_T, _ = timed_step_bounds(problem, stop)
        row = _start(problem, warm_start)
        if row is None:
            return None
        start, base = total(problem, row), float(problem.weights_T @ floor_T)
        some = np.unique(np.linspace(0, problem.num_steps - 1, SAMPLE).round().astype(np.int64))
        per_step = Compact.of(problem.select(some), floor_T[some], max(start - base, 0.0)).size / len(some)
        limit = int(min(budget / max(per_step, 1.0), problem.num_steps))
        if limit < problem.num_steps:  # a power of two: layers of one call say the same
            limit = 1 << max(limit, 1).bit_length() - 1
        steps, weights_T = representative_steps(problem, limit, options.expired)
        stated = problem.select(steps, weights_T)
        compact = _stated(stated, floor_T[steps], row)
        search = cls(problem, options, stated, compact, row, start, max(base, options.bound_us), start)
        search.history.append(incumbent(start, search.known_us))
        return search

    @property
    def reduced(self) -> bool:
        """Whether representatives stand for the steps, so that the solver's own bound does not hold."""
        return self.compact.num_steps < self.problem.num_steps

    @property
    def refuted(self) -> bool:
        """Whether a placement is known that beats the bound which the solver claims."""
        return self.own_bound_us > self.objective_us + ROUNDING * abs(self.objective_us)

    @property
    def bound_us(self) -> float:
        """Best lower bound for the whole trace; of what the solver claims, only what nothing refutes."""
        return self.known_us if self.refuted else max(self.known_us, self.own_bound_us)

    def ended(self) -> Outcome | None:
        """The outcome when nothing is left to do before the solver has begun."""
        if self.done:
            return self.outcome(self.proof(), "bound from the simple bounds of all steps", reached=False)
        if self.options.expired():
            return self.outcome(self.options.cut_by, "no time to solve", reached=False)
        return None

    @property
    def done(self) -> bool:
        """Whether the gap asked for is reached."""
        gap = relative_gap(self.objective_us, self.bound_us)
        return gap is not None and gap <= max(self.options.gap, OPTIMALITY_TOLERANCE)

    def offer_bound(self, bound_us: float) -> None:
        """Take note of a bound of the stated steps where it holds for all."""
        if not self.reduced:
            self.own_bound_us = max(self.own_bound_us, bound_us)

    def offer_row(self, row: Row) -> None:
        """Take over a row that is feasible and better on the whole trace, whatever the solver says of it."""
        try:
            check(self.problem, row)
        except InputError:
            return
        value = total(self.problem, row)
        if value < self.objective_us:
            self.row, self.objective_us = row, value
            self.history.append(incumbent(value, self.bound_us))

    def restate(self) -> bool:
        """State again the little that a much better incumbent has left open; whether there is reason to.

        Solvers are exact to a part of what is open when they begin, which after a bad start is too much for a proof.
        """
        again = self.stated_anew()
        if self.done or self.reduced or self.refuted or again.open_us > WORTH * self.compact.open_us:
            return False
        self.compact = again
        return True

    def stated_anew(self) -> Compact:
        """What is open between the floors and the best row now."""
        return _stated(self.stated, self.compact.floor_T, self.row)

    def outcome(self, stopped_by: StoppedBy, note: str, *, reached: bool = True) -> Outcome:
        """The best that was found, and what is the solver's own in it.

        A bound above the objective of a placement is wrong, and then nothing that this solver said here is believed.
        """
        own_bound_us = self.own_bound_us if np.isfinite(self.own_bound_us) and not self.refuted else None
        if self.refuted:
            note += (
                f"; it claimed a bound of {self.own_bound_us:.9g} us above a placement of {self.objective_us:.9g} us, "
                "so that its bound is not used"
            )
            self.history = [point.model_copy(update={"bound_us": self.known_us}) for point in self.history]
        elif own_bound_us is not None and own_bound_us > self.known_us:
            note += "; the bound is the solver's word"
        if self.reduced and reached:
            note += (
                f"; placement from {self.compact.num_steps} weighted "
                f"representative{'s' * (self.compact.num_steps != 1)} of "
                f"{self.problem.num_steps} distinct steps, bound from the simple bounds of all steps"
            )
        return Outcome(
            self.row,
            stopped_by,
            min(self.bound_us, self.objective_us),
            self.history,
            note,
            start_us=self.start_us,
            own_bound_us=own_bound_us,
            stated_steps=self.compact.num_steps,
            distinct_steps=self.problem.num_steps,
            reached=reached,
        )

    def proof(self) -> StoppedBy:
        """Why a search that the solver calls finished has stopped."""
        gap = relative_gap(self.objective_us, self.bound_us)
        if gap is not None and gap <= OPTIMALITY_TOLERANCE:
            return StoppedBy.PROOF
        return StoppedBy.GAP if gap is not None and gap <= self.options.gap else StoppedBy.ITERATIONS


def too_large(problems: Sequence[Problem], options: Options) -> bool:
    """Whether who holds what alone takes longer to state than there is time."""
    return sum(map(num_literals, problems)) > LITERALS_PER_S * max(LEAST_S, options.remaining)


def not_stated(problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
    """What there is to start from, where the formulation is too large for the time."""
    row = _start(problem, warm_start)
    if row is None:
        return no_placement(problem)
    start = total(problem, row)
    return Outcome(
        row, options.cut_by, history=[incumbent(start, options.bound_us)], note=TOO_LATE, start_us=start, reached=False
    )


def _start(problem: Problem, warm_start: Row | None) -> Row | None:
    if warm_start is not None and within_limits(problem, warm_start):
        return warm_start.copy()
    return lpt_row(problem) if problem.moves is None else fewest_row(problem)


def _stated(stated: Problem, floor_T: FloatArray, row: Row) -> Compact:
    """The formulation of some steps, within what is open between their floors and a placement."""
    return Compact.of(stated, floor_T, max(total(stated, row) - float(stated.weights_T @ floor_T), 0.0))

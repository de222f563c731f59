"""CP-SAT (OR-Tools): the compact formulation, from a complete hint, with bounds that survive the rounding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from ortools.sat.python import cp_model

from gemopt.result import StoppedBy
from gemopt.solvers import hurried
from gemopt.solvers.base import Options, Outcome
from gemopt.solvers.exact.cpsat_formulation import CpSatFormulation, CpSatJoint
from gemopt.solvers.exact.joint import JointCompact
from gemopt.solvers.exact.layer import Search
from gemopt.solvers.exact.runs import STEEPEST
from gemopt.solvers.exact.stated import Stated

RESOLUTION = 4e-7
"""Relative error that whole ticks may cause in the objective, all steps together."""
EXACT = 2.0**53
"""Whole numbers up to here are exact in float64, which CP-SAT's linear relaxation uses."""


class CpSat(Stated):
    """CP-SAT on the threads it is given."""

    name = "cpsat"
    coefficients_per_second = 10_000

    def run(self, search: Search) -> Outcome:
        """See `Stated`."""
        tick_us, options = resolution(search), search.options
        try:
            kind = CpSatJoint if isinstance(search.compact, JointCompact) else CpSatFormulation
            formulation = kind(search.compact, tick_us, canonical_start(search), options.expired)
        except TimeoutError as error:
            return search.outcome(options.cut_by, str(error), reached=False)
        solver = configured(options, formulation)
        status = hurried.run(solver, formulation.model, options.expired, _Incumbents(formulation, search))
        note = f"CP-SAT counts in steps of {tick_us:.0e} us"
        if status in (cp_model.MODEL_INVALID, cp_model.INFEASIBLE):  # the start is feasible, so this is not true
            return search.outcome(StoppedBy.ITERATIONS, f"cpsat calls the formulation {solver.status_name(status)}")
        if status != cp_model.UNKNOWN:
            search.offer_bound(bound_us(solver.best_objective_bound, formulation))
        if status == cp_model.OPTIMAL and not options.stop():
            return search.outcome(search.proof(), note)
        return search.outcome(options.cut_by, note)


def configured(options: Options, formulation: CpSatFormulation) -> cp_model.CpSolver:
    """A solver with seed, limits and search.

    On one thread a formulation with many literals does best by plain propagation, heaviest expert first; one without
    needs the linear relaxation, which is CP-SAT's default.
    """
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = options.threads
    solver.parameters.random_seed = options.seed % 2**31
    compact = formulation.compact
    solver.parameters.absolute_gap_limit = options.gap * max(compact.base_us, 0.0) / formulation.unit_us
    solver.parameters.max_time_in_seconds = max(0.01, options.remaining)
    solver.parameters.catch_sigint_signal = False
    if options.threads == 1 and formulation.curved:
        solver.parameters.search_branching = cp_model.FIXED_SEARCH
        solver.parameters.linearization_level = 0
    return solver


def resolution(search: Search) -> float:
    """Microseconds per tick: every column, curved part, constant and price may lose a tick or three.

    Never so fine that a line's coefficients, which grow with the ticks that are open and with the loads that it is
    drawn over, were beyond what float64 keeps exactly.
    """
    compact = search.compact
    wanted = RESOLUTION * abs(search.objective_us) / compact.roundings
    divisor = 2.0 * (1 << compact.most_load.bit_length())
    return float(max(wanted, compact.open_us * divisor * STEEPEST / EXACT, 1e-12 * compact.open_us))


def canonical_start(search: Search) -> NDArray[np.bool_]:
    """The best row so far, with equal ranks in the order of the formulation."""
    return search.compact.canonical(search.compact.held(search.row))


def bound_us(ticks: float, formulation: CpSatFormulation) -> float:
    """Microseconds that so many ticks above the floors prove."""
    return formulation.compact.base_us + max(0.0, float(np.floor(ticks + 0.5) * formulation.unit_us))


class _Incumbents(cp_model.CpSolverSolutionCallback):
    """Scores every solution on the whole trace as it comes."""

    def __init__(self, formulation: CpSatFormulation, search: Search) -> None:
        super().__init__()
        self._formulation, self._search = formulation, search

    def on_solution_callback(self) -> None:
        held = [[bool(self.value(variable)) for variable in ranks] for ranks in self._formulation.held]
        self._search.offer_bound(bound_us(self.best_objective_bound, self._formulation))
        self._search.offer_row(self._formulation.compact.row(np.array(held)))

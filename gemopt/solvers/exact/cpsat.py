"""CP-SAT (OR-Tools): the compact formulation, from a complete hint, with bounds that survive the rounding."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ortools.sat.python import cp_model

from gemopt.exceptions import SolverError
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers.base import Options, Outcome, Row, Supports
from gemopt.solvers.exact.cpsat_formulation import SAFETY, Formulation
from gemopt.solvers.exact.layer import Search

RESOLUTION = 4e-7
"""Relative error that whole ticks may cause in the objective, all steps together."""
COEFFICIENTS_PER_SECOND = 10_000
POLL_S = 0.02


class CpSat:
    """Exact for every cost model, unequal slots, empty slots and copies under the even split."""

    name = "cpsat"
    supports = Supports(spare_slots=True, unequal_slots=True, proves=True, improves=True)

    def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
        """Place one layer; never worse than the warm start."""
        search = Search.prepare(problem, options, warm_start, COEFFICIENTS_PER_SECOND * options.remaining)
        ended = search.ended()
        if ended is not None:
            return ended
        tick_us = resolution(search)
        try:
            formulation = Formulation(search.compact, tick_us, canonical_hint(search), options.expired)
        except TimeoutError as error:
            stopped_by = StoppedBy.INTERRUPT if options.stop() else StoppedBy.TIME_LIMIT
            return search.outcome(stopped_by, str(error), started=False)
        solver = configured(options, formulation)
        status = run(solver, formulation, search, tick_us)
        if status in (cp_model.MODEL_INVALID, cp_model.INFEASIBLE):
            raise SolverError(f"cpsat: the formulation is {solver.status_name(status)}")
        if status != cp_model.UNKNOWN:
            search.offer_bound(bound_us(solver.best_objective_bound, tick_us))
        note = f"resolution {tick_us:.3g} us"
        if options.stop():
            return search.outcome(StoppedBy.INTERRUPT, note)
        if status == cp_model.OPTIMAL:
            return search.outcome(search.proof(), note)
        return search.outcome(StoppedBy.TIME_LIMIT, note)


def configured(options: Options, formulation: Formulation) -> cp_model.CpSolver:
    """A solver with seed, limits and search.

    On one thread a formulation with many literals does best by plain propagation, heaviest expert first; one without
    needs the linear relaxation, which is CP-SAT's default.
    """
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = options.threads
    solver.parameters.random_seed = options.seed % 2**31
    solver.parameters.relative_gap_limit = options.gap
    solver.parameters.max_time_in_seconds = max(0.01, options.remaining)
    solver.parameters.catch_sigint_signal = False
    if options.threads == 1 and formulation.curved:
        solver.parameters.search_branching = cp_model.FIXED_SEARCH
        solver.parameters.linearization_level = 0
    return solver


def resolution(search: Search) -> float:
    """Microseconds per tick, a power of ten: every column, curved part and constant may lose a tick or three."""
    compact = search.compact
    lost = int(compact.slots_G.max()) + 1 + 3 * compact.features_FTQ.shape[0]
    tick_us: float = RESOLUTION * abs(search.objective_us) / (lost * compact.num_steps)
    return float(10.0 ** np.floor(np.log10(max(tick_us, 1e-12))))


def canonical_hint(search: Search) -> NDArray[np.bool_]:
    """The best row so far, with equal ranks in the order of the formulation."""
    return search.compact.canonical(search.compact.held(search.row))


def bound_us(ticks: float, tick_us: float) -> float:
    """Microseconds that so many ticks prove."""
    return float((ticks - SAFETY * abs(ticks)) * tick_us)


def run(solver: cp_model.CpSolver, formulation: Formulation, search: Search, tick_us: float) -> Any:
    """Solve in a thread, so that an interrupt and the deadline are seen while OR-Tools is busy."""
    with ThreadPoolExecutor(1) as pool:
        status = pool.submit(solver.solve, formulation.model, _Incumbents(formulation, search, tick_us))
        try:
            while not wait([status], POLL_S).done:
                if search.options.expired():
                    solver.stop_search()
        finally:
            solver.stop_search()
    return status.result()


class _Incumbents(cp_model.CpSolverSolutionCallback):
    """Scores every solution on the whole trace as it comes."""

    def __init__(self, formulation: Formulation, search: Search, tick_us: float) -> None:
        super().__init__()
        self._formulation, self._search, self._tick_us = formulation, search, tick_us

    def on_solution_callback(self) -> None:
        held = [[bool(self.value(variable)) for variable in ranks] for ranks in self._formulation.held]
        self._search.offer_bound(bound_us(self.best_objective_bound, self._tick_us))
        self._search.offer_row(self._formulation.compact.row(np.array(held)))

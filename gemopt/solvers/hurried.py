"""CP-SAT in a thread of its own: the clock and Ctrl-C are heard while it solves, whichever thread waits for it."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np

from gemopt.exceptions import GemoptError
from gemopt.interrupts import LEFT
from gemopt.result import StoppedBy
from gemopt.solvers.base import POLL_S

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

LIMIT_S = 60.0  # where no call says how long it may take
LEAST_S = 1.0  # for a row without which there is no answer, though the time is over

Call = tuple[float, Callable[[], bool]]
_call: ContextVar[Call] = ContextVar("gemopt_call")
_better_by: ContextVar[float] = ContextVar("gemopt_better_by", default=np.inf)


class OutOfTimeError(GemoptError):
    """Within the time of the call neither a row was found nor that there is none."""

    def __init__(self, what: str) -> None:
        self.stopped_by = StoppedBy.INTERRUPT if stopped() else StoppedBy.TIME_LIMIT
        super().__init__(f"{what}: not found in time")


@contextmanager
def call(deadline: float, stop: Callable[[], bool]) -> Iterator[None]:
    """Within, and in threads that run a copy of this context, CP-SAT ends by a deadline (of `time.monotonic`) or stop.

    Those who ask for rows know the share of their layer at most, but a row without which there is no answer may take
    what is left of the whole call.
    """
    token = _call.set((deadline, stop))
    try:
        yield
    finally:
        _call.reset(token)


def load() -> float:
    """Load CP-SAT: the seconds that took, which are not of solving; the call in force ends later by them."""
    begin, (deadline, stop) = time.monotonic(), _now()
    importlib.import_module("ortools.sat.python.cp_model")
    elapsed = time.monotonic() - begin
    if _call.get(None) is not None:
        _call.set((deadline + elapsed, stop))
    return elapsed


def seconds_left() -> float:
    """Seconds that a row without which there is no answer may take."""
    return max(LEAST_S, _now()[0] - time.monotonic())


@contextmanager
def better_by(deadline: float) -> Iterator[None]:
    """Within, a row that is better than any is looked for until this deadline (of `time.monotonic`) at most."""
    token = _better_by.set(deadline)
    try:
        yield
    finally:
        _better_by.reset(token)


def seconds_for_better() -> float:
    """Seconds that it may take to make a row better than any."""
    return max(0.0, min(_better_by.get(), _now()[0]) - time.monotonic())


def stopped() -> bool:
    """Whether the user interrupted the call."""
    return _now()[1]()


def run(
    solver: cp_model.CpSolver,
    model: cp_model.CpModel,
    over: Callable[[], bool],
    callback: cp_model.CpSolverSolutionCallback | None = None,
) -> Any:
    """Status of solving a model until `over`. An exception here, as of Ctrl-C, ends the search; a second one leaves it.

    The thread is not joined: before Python 3.13 one that is interrupted while it is joined counts as having ended.
    """
    status: Future[Any] = Future()

    def work() -> None:
        try:
            status.set_result(solver.solve(model, callback))
        except BaseException as error:
            status.set_exception(error)

    thread = threading.Thread(target=work, name=LEFT, daemon=True)
    try:
        thread.start()
        while not wait([status], POLL_S).done:
            if over():
                solver.stop_search()
    finally:
        while thread.ident is not None and not wait([status], POLL_S).done:
            solver.stop_search()
    return status.result()


def _now() -> Call:
    return _call.get((time.monotonic() + LIMIT_S, lambda: False))

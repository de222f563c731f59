"""Speed-weighted longest processing time: hot experts first, each to the rank that would finish it first."""

from __future__ import annotations

from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers.base import Options, Outcome, Row, Supports
from gemopt.solvers.search.packing import lpt_row


class Lpt:
    """Graham's LPT on mean loads, with each rank's own offset and time per load (uniform machines).

    Spare slots stay empty: splitting is the business of `eplb` and `local-search`.
    """

    name = "lpt"
    supports = Supports()

    def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
        """Place one layer; see `Solver`."""
        return Outcome(lpt_row(problem), StoppedBy.ITERATIONS)

"""What CP-SAT and MILP are alike in: they state a layer, or all of them with their links, and prove what they can."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from gemopt.links import Links
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers.base import Linked, Options, Outcome, Row, Supports
from gemopt.solvers.exact.joint_search import solve_joint
from gemopt.solvers.exact.layer import Search, not_stated, too_large
from gemopt.solvers.nearest import no_placement


class Stated(ABC):
    """Exact for every cost model, unequal slots, empty slots and copies under the even split.

    coefficients_per_second: non-zero ones that the solver can take. start_s: seconds before it can begin.
    """

    supports = Supports(proves=True, improves=True, moves=True, links=True, policies=False, rules=True)
    coefficients_per_second: int
    start_s = 0.0

    def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
        """Place one layer; never worse than the warm start."""
        if too_large([problem], options):
            return not_stated(problem, options, warm_start)
        budget = self.coefficients_per_second * (options.remaining - self.start_s)
        search = Search.prepare(problem, options, warm_start, budget)
        if search is None:
            return no_placement(problem)
        return search.ended() or self._prove(search)

    def solve_linked(self, problems: Sequence[Problem], links: Links, rows: list[Row], options: Options) -> Linked:
        """Place all layers under makespans and links; see `LinkedSolver`."""
        return solve_joint(problems, links, rows, options, self._prove)

    def _prove(self, search: Search) -> Outcome:
        outcome = self.run(search)
        while outcome.stopped_by is StoppedBy.ITERATIONS and search.restate():
            outcome = replace(self.run(search), reached=True)
        return outcome

    @abstractmethod
    def run(self, search: Search) -> Outcome:
        """Solve what `search.compact` states, from its row; rows and bounds are offered to the search."""

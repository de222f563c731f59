"""Local search: speed-weighted LPT, swaps under the true per-step objective, then iterated until the limit.

Descends on the convex hull of the latencies first, which is SIMD, then on the latencies themselves. Spare slots start
empty and, from a second start, full of copies; copies are added, moved and dropped where the true objective says so.
"""

from __future__ import annotations

import numpy as np

from gemopt.evaluate import objective
from gemopt.problem import Problem
from gemopt.result import Incumbent, StoppedBy, relative_gap
from gemopt.solvers.base import Options, Outcome, Row, Supports, incumbent, seeded
from gemopt.solvers.search.packing import copies_worth_trying, lpt_row, replicate

BATCH_KICKS = 25
NEVER = 2**62
LEAST_GAIN = 1e-4  # of a round over all copies
KICK_SWAPS = 2


class LocalSearch:
    """Descent by swaps and copies, then iterated local search."""

    name = "local-search"
    supports = Supports(improves=True, moves=True)

    def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
        """Place one layer; see `Solver`. `options.patience` 0 ends after the descent."""
        from gemopt.solvers.search.within import search_within

        if problem.moves is not None:
            return search_within(problem, options, warm_start, self.solve)
        search = _Search(problem, options)
        starts = [lpt_row(problem)] if warm_start is None else [warm_start]
        if problem.spare_slots and warm_start is None:
            weight_E = problem.linearised[1].mean(axis=0)
            copies_E = replicate(weight_E, problem.slots_per_rank)
            starts.append(lpt_row(problem, copies_E=copies_E))
        for start in starts:
            search.offer(start)
            if not options.expired():
                search.descend_from(start)
        stopped_by = search.iterate()
        return Outcome(search.row, stopped_by, history=search.history)


class _Search:
    """Incumbent and history of one layer's search."""

    def __init__(self, problem: Problem, options: Options) -> None:
        from gemopt.solvers.search.state import make_costs

        self.problem = problem
        self.options = options
        self.costs = make_costs(problem)
        self.row: Row | None = None
        self.value = np.inf
        self.history: list[Incumbent] = []

    def offer(self, row: Row) -> bool:
        """Take a row over when its exact objective is the best so far."""
        value = objective(self.problem, row)
        if value >= self.value:
            return False
        self.row, self.value = row.copy(), value
        self.history.append(incumbent(value))
        return True

    def good_enough(self) -> bool:
        """Whether the known bound proves the incumbent to the wanted gap."""
        gap = relative_gap(self.value, self.options.bound_us)
        return gap is not None and self.options.bound_us > 0 and gap <= self.options.gap

    def descend_from(self, start: Row) -> None:
        """Descend on the hulls, then on the latencies, then over copies until nothing helps."""
        from gemopt.solvers.search.state import hull_costs, make_state
        from gemopt.solvers.search.swaps import descend

        problem, ranks = self.problem, np.ones(self.problem.num_ranks, dtype=bool)
        row = start
        hulls = hull_costs(problem) if self.costs.use_tables else None
        if hulls is not None:
            state = make_state(problem, start, hulls)
            descend(hulls, state, ranks, False)
            self.offer(state.content)
            row = state.content if objective(problem, state.content) < objective(problem, start) else start
        state = make_state(problem, row, self.costs)
        descend(self.costs, state, ranks, True)
        self.offer(state.content)
        if problem.spare_slots:
            self._with_copies(state.content)

    def _with_copies(self, row: Row) -> None:
        from gemopt.solvers.search.copies import improve_copies, make_shares
        from gemopt.solvers.search.state import make_state
        from gemopt.solvers.search.swaps import EPSILON, descend
        from gemopt.solvers.search.terms import free_terms

        problem, ranks = self.problem, np.ones(self.problem.num_ranks, dtype=bool)
        shares = make_shares(problem)
        if shares is None:
            return
        candidates = copies_worth_trying(problem)
        state = make_state(problem, row, self.costs)
        for _ in range(50):
            made = improve_copies(self.costs, state, shares, candidates, EPSILON, True, free_terms(problem))
            state = make_state(problem, state.content, self.costs)  # swaps move copies, which renumbers them
            descend(self.costs, state, ranks, False)
            before = self.value
            improved = self.offer(state.content)
            if not made or not improved or self.value > before * (1 - LEAST_GAIN) or self.options.expired():
                break
            state = make_state(problem, state.content, self.costs)

    def iterate(self) -> StoppedBy:
        """Kick and descend in batches until the deadline, the patience, the gap or an interrupt."""
        from gemopt.solvers.search.state import make_state
        from gemopt.solvers.search.swaps import iterate, total_cost

        problem, options = self.problem, self.options
        patience = NEVER if options.patience is None else options.patience
        if self.row is None or problem.num_ranks < 2 or patience == 0:
            return StoppedBy.GAP if self.good_enough() else StoppedBy.ITERATIONS
        rng = seeded(options.seed, problem.num_experts, problem.num_ranks)
        state = make_state(problem, self.row, self.costs)
        best, idle, batch = total_cost(state), 0, 1
        while idle < patience:
            if self.good_enough():
                return StoppedBy.GAP
            if options.expired():
                return StoppedBy.INTERRUPT if options.stop() else StoppedBy.TIME_LIMIT
            draws = rng.random((batch, KICK_SWAPS, 2))
            renewed, idle, _ = iterate(self.costs, state, draws, best, patience, idle)
            if renewed < best:
                best = renewed
                self.offer(state.content)
            batch = BATCH_KICKS if options.remaining > 1 else 1
        return StoppedBy.ITERATIONS

"""Local search: speed-weighted LPT, swaps under the true per-step objective, then iterated until the limit.

Where latencies are looked up, descents and kicks begin on planes that rise as they do, which is SIMD, and go on on the
latencies themselves. Spare slots start empty or with copies, whichever is better, then the other way; where they are
scarce, with the copies of the copies bound, then full of copies. Each start is LPT, or mapped by makespan where that is
better, as it mostly is; where slots are scarce, where that is better than what descents from LPT found. Copies are
added, moved and dropped where the objective says so. Kicks swap slots of three ranks, and where that gains nothing
change which experts have copies; under a time limit they are annealed. Descents end with the deadline; what was cut
goes on where it ended when there is more time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemopt.bounds.copies import scarce_copies
from gemopt.evaluate import objective
from gemopt.latency import pack
from gemopt.links import Links
from gemopt.placement import EMPTY, Split
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers.base import Linked, Options, Outcome, Row, Supports
from gemopt.solvers.search.best import Best
from gemopt.solvers.search.packing import copies_worth_trying, filled, lpt_row, peak_load, placeable, replicate
from gemopt.splits import plain
from gemopt.splits.flow import fluid_times
from gemopt.splits.levels import no_levels

if TYPE_CHECKING:
    from gemopt.solvers.search.shares import Shares
    from gemopt.solvers.search.state import Costs

BATCH_KICKS = 25
COPIES_KICKS = 100  # between changes of copies
LEAST_GAIN = 1e-4  # of a round over all copies
HEAT = 2.0  # at first, see `iterate`; falls to 0 with the time that is left
MELTED = 30.0  # times what a kick loses in the mean above the best: the walk is too hot, and begins there again at half
MOST_COPIES = 3  # that a kick changes
SCARCE_SHARE = 0.25  # of the time, for the copies of the bound
GUIDED_SHARE = 0.85  # of the time for kicks on the guides, at most
GUIDED_POLISHES = 25.0  # times what a descent on the latencies takes, the same: small layers need them less
SPARE_POLISHES = 3.0  # the same with spare slots, where that descent is over copies too
SPARE_GAP = 0.04  # with spare slots: guides that say so much less than the latencies lead no kicks
HOPELESS = 1.02  # times the best so far after a descent on the guides: another start is given up


class LocalSearch:
    """Descent by swaps and copies, then iterated local search."""

    name = "local-search"
    supports = Supports(improves=True, moves=True, links=True, fewest_bytes=True, rules=True)

    def solve_linked(self, problems: Sequence[Problem], links: Links, rows: list[Row], options: Options) -> Linked:
        """All layers under makespans and links; see `LinkedSolver`."""
        if options.compute_slack is not None:
            from gemopt.solvers.search.fewest import search_fewest

            return search_fewest(problems, links, rows, options)
        from gemopt.solvers.search.linked import search_linked

        return search_linked(problems, links, rows, options)

    def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
        """Place one layer; see `Solver`. `options.patience` 0 ends after the descent; `options.begun` goes on."""
        from gemopt.solvers.search.blocs import search_blocs
        from gemopt.solvers.search.policies import search_policy
        from gemopt.solvers.search.within import search_within

        if problem.rules is not None and problem.rules.blocs:
            return search_blocs(problem, options, warm_start, self.solve)
        if problem.moves is not None:
            return search_within(problem, options, warm_start, self.solve)
        if problem.spare_slots and problem.split is not Split.EVEN:
            return search_policy(problem, options, warm_start, self.solve)
        search = _Search.going_on(options, problem) or _Search(problem, warm_start)
        search.options = options
        with options.alarm() as search.stop:
            search.descend_from_starts()
            stopped_by = search.iterate()
        return search.outcome(stopped_by, "speed-weighted LPT" if warm_start is None else "warm start")


def _with_copies(problem: Problem, row: Row) -> Row:
    """Speed-weighted LPT with spare slots full of copies; under rules, the row given with copies in its empty slots."""
    if problem.rules is not None:
        return filled(problem, row)
    return lpt_row(problem, copies_E=replicate(peak_load(problem), problem.slots_per_rank))


def _with_scarce_copies(problem: Problem, stop: NDArray[np.uint8], seconds: float) -> Row | None:
    """Speed-weighted LPT with the copies of the copies bound; None where slots suffice for the fluid time, or no time.

    seconds: for the bound's programmes.
    """
    curves = pack([latency.low for latency in problem.latencies])
    floor_T = fluid_times(no_levels(curves), problem.counts_TE.sum(axis=1, dtype=np.int64))
    copies_E = scarce_copies(problem, floor_T, stop, seconds=seconds)
    if copies_E is None or not placeable(copies_E, problem.slots_per_rank):
        return None
    return lpt_row(problem, copies_E=copies_E)


class _Search(Best):
    """One layer's search, which a later call may go on with: incumbent, history, and the starts still to descend from.

    searched: whether any descent began. stop: [1] see `Options.alarm`. copied: the start with copies, once greedy no
    longer says that it is still to be made, which takes longer. scarce: whether the one of the copies bound is.
    unmapped: whether starts are still to be mapped; later: those that are after all descents, else it is before.
    polish_s: seconds of a descent on the latencies, over copies too, from where one on the guides ended.
    """

    def __init__(self, problem: Problem, warm_start: Row | None) -> None:
        super().__init__(problem)
        self.greedy = warm_start is None and problem.spare_slots > 0
        self.starts = [self.completed(lpt_row(problem) if warm_start is None else warm_start)]
        self.copied, self.scarce = self.starts[0], False
        self.unmapped, self.later = warm_start is None and problem.rules is None, list[Row]()
        self.polish_s = 0.0
        self.offer(self.starts[0])

    @cached_property
    def guides(self) -> Costs | None:
        """Planes that rise as the latencies do, where these are looked up: a descent on planes is quicker."""
        from gemopt.solvers.search.state import guiding_planes

        return guiding_planes(self.problem) if self.costs.use_tables else None

    @cached_property
    def shares(self) -> Shares | None:
        """What copies take; None without spare slots, or where counts are too large to tabulate."""
        from gemopt.solvers.search.shares import make_shares

        return make_shares(self.problem) if self.problem.spare_slots else None

    def offer(self, row: Row) -> bool:
        """Take a row over when its exact objective is the best so far."""
        return self.keep(row, objective(self.problem, row))

    def descend_from_starts(self) -> None:
        """Descend from every start that no call before had the time for; one that was cut is gone on from."""
        if self.greedy and self.options.may_start():
            self.copied = self.completed(_with_copies(self.problem, self.starts[0]))
            self.starts.insert(0 if self.offer(self.copied) else 1, self.copied)  # the better one first
            self.greedy, self.scarce = False, self.problem.rules is None and plain(self.problem)
        if self.scarce and not self.options.expired():
            seconds = SCARCE_SHARE * self.options.remaining
            self.scarce, row = False, _with_scarce_copies(self.problem, self.stop, seconds)
            if row is not None:
                self.starts = [self.completed(row), self.copied]
                self.offer(self.starts[0])
                self.later = list(self.starts)
        if self.unmapped and not self.later and not self.options.expired():
            self.starts = self._mapped(self.starts)
            self.unmapped = bool(self.stop[0])
        self._descend_all()
        if self.unmapped and not self.starts and not self.options.expired():
            before, _ = self.value, self._mapped(self.later)
            self.starts = [self.row] if self.row is not None and self.value < before else []
            self.unmapped = bool(self.stop[0])
            self._descend_all()

    def _descend_all(self) -> None:
        while self.starts and not self.options.expired():
            self.searched = True
            reached = self._descend(self.starts[0])
            self.starts[:1] = [reached] if self.stop[0] else []

    def _mapped(self, starts: list[Row]) -> list[Row]:
        """Each start, or its experts and copies mapped by makespan where that is better; the best one first.

        Of the one with copies also with a half, a quarter and an eighth of them, where slots may stay empty.
        """
        from gemopt.solvers.search.mapping import mapped_row

        problem, best, mapped = self.problem, [], dict[bytes, Row | None]()
        for start in starts:
            copies_E = np.bincount(start[start != EMPTY])
            asked, more = [copies_E], int(copies_E.sum()) - problem.num_experts
            if more and not problem.full:
                peak_E = peak_load(problem)
                asked += [replicate(peak_E, problem.slots_per_rank, more >> halved) for halved in (1, 2, 3)]
            for each in asked:
                if each.tobytes() not in mapped:  # two starts may ask for the same fewer copies
                    mapped[each.tobytes()] = mapped_row(problem, self.costs, each, self.stop)
            found = [mapped[each.tobytes()] for each in asked]
            rows = [start, *(self.completed(row) for row in found if row is not None)]
            best.append(min(((objective(problem, row), row) for row in rows), key=lambda one: one[0]))
            self.keep(best[-1][1], best[-1][0])
        return [row for _, row in sorted(best, key=lambda one: one[0])]

    def _descend(self, start: Row) -> Row:
        """Descend on the guides, then on the latencies and over copies until nothing helps; where that ended."""
        from gemopt.solvers.search.swaps import descend_all

        problem, row = self.problem, start
        if self.guides is not None:
            state = self.state(start, self.guides)
            descend_all(self.guides, state, self.shares is None)
            value, before = objective(problem, state.content), objective(problem, start)
            self.keep(state.content, value)
            row = state.content if value < before else start
            if min(value, before) > HOPELESS * self.value:  # what another start led to
                return row
        goes_on = self.options.first or self.options.patience != 0
        begun = time.monotonic()
        row = self._polish(row, self.shares is not None or self.guides is None or not goes_on)
        self.polish_s = time.monotonic() - begun
        return row

    def _polish(self, row: Row, full: bool) -> Row:
        """Descend on the latencies, with `full` until no swap helps, then over copies; where that ended."""
        from gemopt.solvers.search.swaps import descend_all

        state = self.state(row)
        descend_all(self.costs, state, full)
        self.offer(state.content)
        return self._over_copies(state.content, self.costs, self.value)[0]

    def _over_copies(self, row: Row, costs: Costs, best: float) -> tuple[Row, float]:
        """Change copies and swap on these costs while that beats `best`; where that ended, and the least cost."""
        from gemopt.solvers.search.copies import improve_copies
        from gemopt.solvers.search.swaps import descend_all
        from gemopt.solvers.search.terms import free_terms

        problem, shares = self.problem, self.shares
        if shares is None:
            return row, best
        candidates = copies_worth_trying(problem)
        state = self.state(row, costs)
        for _ in range(50):
            made = improve_copies(costs, state, shares, candidates, True, free_terms(problem))
            state = self.state(state.content, costs)  # swaps move copies, which renumbers them
            cost = descend_all(costs, state, False)
            self.offer(state.content)
            before, best = best, min(cost, best)
            if not made or best > before * (1 - LEAST_GAIN) or self.stop[0]:
                break
            state = self.state(state.content, costs)
        return state.content, best

    def _kick_copies(self, row: Row, costs: Costs, best: float) -> Row | None:
        """Change what some slots for copies hold at random, and descend; where that ended, None if not below best."""
        from gemopt.solvers.search.swaps import descend_all

        assert self.draws is not None
        problem, draws, row = self.problem, self.draws, row.copy()
        candidates = copies_worth_trying(problem)
        choices = candidates if problem.full else np.append(candidates, EMPTY)
        for _ in range(draws.integers(1, MOST_COPIES + 1)):
            copies_E = np.bincount(row[row != EMPTY], minlength=problem.num_experts)
            spare = np.flatnonzero((row == EMPTY) | (copies_E[row] > 1))
            slot = int(draws.choice(spare))
            barred_E = self.state(row, costs).barred[problem.rank_of_slot[slot]]
            open_ = choices[(choices == EMPTY) | (barred_E[choices] == 0)]
            if len(open_):
                row[slot] = draws.choice(open_)
        state = self.state(row, costs)
        descend_all(costs, state, False)
        row, cost = self._over_copies(state.content, costs, best)
        return row if cost < best else None

    def iterate(self) -> StoppedBy:
        """Kick and descend until the deadline, the patience, the gap or an interrupt; on the guides first, if any."""
        options, given_s = self.options, self.options.remaining
        if (ended := self.ended(descended=not self.starts)) is not None:
            return ended
        assert self.row is not None
        timed = options.patience is None and 0.0 < given_s < np.inf  # else the path is the seed's alone
        if self.guides is not None and self._guided(self.row):
            most = GUIDED_POLISHES if self.shares is None else SPARE_POLISHES
            most_s = most * self.polish_s if options.patience is None else np.inf
            guided_s = min(GUIDED_SHARE * given_s, most_s, given_s - self.polish_s)
            if guided_s > 0.0:
                row, _ = self._walk(self.guides, HEAT if timed else 0.0, time.monotonic() + guided_s)
                self._polish(self._polish(row, False), True)
        heat = HEAT * options.remaining / given_s if timed else 0.0
        return self._walk(self.costs, heat, options.deadline)[1]

    def _guided(self, row: Row) -> bool:
        """Whether kicks are to run on the guides first."""
        from gemopt.solvers.search.swaps import total_cost

        return self.shares is None or total_cost(self.state(row, self.guides)) > (1 - SPARE_GAP) * self.value

    def _walk(self, costs: Costs, heat: float, end: float) -> tuple[Row, StoppedBy]:
        """Kick and descend on these costs in batches until `end` of `time.monotonic`; the best row by them.

        heat: at first, see `swaps.iterate`; falls to 0 with the time, 0 without any.
        """
        from gemopt.solvers.search.swaps import KICK_DRAWS, iterate, total_cost

        assert self.row is not None and self.draws is not None
        options, begun = self.options, time.monotonic()
        best, idle, state, gains, row = np.inf, 0, None, False, self.row
        losses, kicks = np.zeros(2), BATCH_KICKS if self.shares is None else COPIES_KICKS
        while not options.exhausted(idle):
            now = time.monotonic()
            if self.good_enough():
                return row, StoppedBy.GAP
            if options.expired() or now >= end:
                return row, options.cut_by
            if state is None:
                state = self.state(row, costs)
                best, row = total_cost(state), state.content.copy()
            if self.shares is not None and not gains:  # swaps alone cost less
                kicked = self._kick_copies(row, costs, best)
                idle = idle + 1 if kicked is None else 0
                if kicked is not None:
                    state = self.state(kicked, costs)
                    best, row = total_cost(state), state.content.copy()
            cooled = heat * (end - now) / (end - begun) if heat else 0.0
            draws = self.draws.random((kicks, KICK_DRAWS))
            renewed = iterate(costs, state, draws, best, row, losses, cooled)
            gains = renewed < best
            idle = 0 if gains else idle + 1
            if gains:
                best = renewed
                self.offer(row)
            if cooled and (total_cost(state) - best) * losses[1] > MELTED * losses[0]:
                heat, state = heat / 2, self.state(row, costs)
        return row, StoppedBy.ITERATIONS

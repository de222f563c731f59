"""GEM, the variability-aware heuristic: same costs, steps, time limit and restarts as local search.

Wawdhane, Kumar and Das, GEM: GPU-Variability-Aware Expert-to-GPU Mapping, arXiv:2605.19945. Published: profile each
GPU, record token loads per task, tell consistent from temporal experts, then search mappings iteratively, scored by
trace and profile, keeping experts used together apart and off slow GPUs. Static, no copies, no bound. Second-hand: its
trace is 16 steps, a mapping of Llama-4-Scout took 8.8 s.

Where the paper is silent, and in place of so few steps, we chose what helps it:
* the score is the exact objective, on every step given;
* the first mapping places consistent, then temporal, then all other experts, hottest first, each where the score of
  what is placed so far is smallest: that keeps experts used together apart and off slow GPUs;
* an iteration swaps experts of the worst straggler with any other rank's, then of the next worst, until nothing helps;
* restarts shuffle the order of placement; the best mapping counts.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from gemopt.compiling import njit
from gemopt.conflicts import ExpertClass, classify
from gemopt.evaluate import total
from gemopt.kernels import NO
from gemopt.latency import FloatArray
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers.base import Options, Outcome, Row, Supports, seeded, within_limits
from gemopt.solvers.nearest import no_placement
from gemopt.solvers.search.best import Best
from gemopt.solvers.search.descent import settle_pair
from gemopt.solvers.search.gains import make_pair
from gemopt.solvers.search.mapping import mapped_row
from gemopt.solvers.search.packing import lpt_row
from gemopt.solvers.search.state import Array, Costs, State
from gemopt.solvers.search.swaps import fix_others, improve_pair, slowest_three
from gemopt.solvers.search.terms import Terms, make_terms, moved_into
from gemopt.solvers.search.within import homeward

ORDER = (ExpertClass.CONSISTENT, ExpertClass.TEMPORAL, ExpertClass.ORDINARY)
NOISE = 0.3


class Gem:
    """Greedy mapping by class, straggler swaps, restarts."""

    name = "gem"
    supports = Supports(improves=True, moves=True)

    def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
        """Place one layer; see `Solver`. A warm start is the first mapping. Spare slots stay empty.

        Where moves cost or are limited the first mapping is the one with the fewest, every swap pays for its moves, and
        the mappings of restarts are brought home until the limits hold.

        Without the time for a first mapping the answer is that of LPT, and says so.
        """
        search = _Search.going_on(options, problem)
        if search is None:
            first = warm_start
            if problem.moves is not None and not within_limits(problem, warm_start):
                first = problem.moves.fewest(problem.slots_per_rank)
            if problem.moves is not None and first is None:
                return no_placement(problem)
            search = _Search(problem, options.seed, first)
        search.options = options
        with options.alarm() as search.stop:
            stopped_by = search.run()
        if search.row is None:
            row, name = (
                (lpt_row(problem), "speed-weighted LPT") if search.first is None else (search.first, "first mapping")
            )
            return Outcome(row, stopped_by, note=f"no time to search: {name}", reached=False, search=search)
        return Outcome(search.row, stopped_by, history=search.history, search=search)


class _Search(Best):
    """The mappings of one layer so far, which a later call may go on from. first: the next one, where it is known."""

    def __init__(self, problem: Problem, seed: int, first: Row | None) -> None:
        super().__init__(problem)
        self.first = first
        self.rng = seeded(seed, problem.num_experts, problem.num_ranks)

    @cached_property
    def classes(self) -> list[ExpertClass]:
        """What kind each expert is."""
        return classify(self.problem.counts_TE)

    def run(self) -> StoppedBy:
        """Map, relieve and restart until the deadline, the patience, the gap or an interrupt."""
        options, idle, moves = self.options, -1 if self.row is None else 0, self.problem.moves
        terms = None if moves is None else make_terms(self.problem, moves)
        while not options.exhausted(idle):
            if self.row is not None and self.good_enough():
                return StoppedBy.GAP
            row = self._start()
            if row is None:
                return options.cut_by
            state = self.state(row)
            relieve(self.costs, state, terms)
            idle += 1
            if within_limits(self.problem, state.content) and self.keep(
                state.content, total(self.problem, state.content)
            ):
                idle = 0
            if self.stop[0]:
                self.first = state.content  # to be gone on from
                return options.cut_by
        return StoppedBy.GAP if self.row is not None and self.good_enough() else StoppedBy.ITERATIONS

    def _start(self) -> Row | None:
        """The mapping to begin with, or None when the time is over before it is made."""
        row, self.first = self.first, None
        if row is not None:
            return row
        if self.stop[0]:
            return None
        noise_E = np.ones(self.problem.num_experts)
        if self.row is not None:
            noise_E = np.exp(NOISE * self.rng.standard_normal(self.problem.num_experts))
        order_E = in_order(self.problem, self.classes, noise_E)
        row = mapped_row(self.problem, self.costs, np.ones_like(order_E), self.stop, order_E)
        if row is not None and not within_limits(self.problem, row):
            row = homeward(self.problem, row, self.costs, self.stop)
        return None if self.stop[0] else row


def in_order(problem: Problem, classes: list[ExpertClass], noise_E: FloatArray) -> Row:
    """[E] experts by class and heat: the order in which they are placed."""
    heat_E = problem.linearised[1].mean(axis=0) * noise_E
    return np.array(sorted(range(problem.num_experts), key=lambda e: (ORDER.index(classes[e]), -heat_E[e])))


@njit(nogil=True)
def relieve(costs: Costs, state: State, terms: Terms | None) -> None:
    """Swap experts of the worst straggler with any other rank's, then of the next worst, until none helps.

    terms: of moves that cost or are limited; the best swap of two ranks is then the first, and each pays for its moves.
    """
    num_ranks, steps = state.times.shape
    if num_ranks < 2:
        return
    values, ranks = np.empty((3, steps), np.float32), np.empty((3, steps), np.int16)
    pair, best, slots = make_pair(state), np.zeros(1, np.float64), np.zeros(4, np.int64)
    slowest_three(state.times, values, ranks)
    moved_G, improved = np.zeros(num_ranks, np.int64), True
    if terms is not None:
        moved_G = moved_into(state, terms)
    while improved:
        improved = False
        blame = blamed(state, values, ranks)
        for a in np.argsort(-blame):
            for b in range(num_ranks):
                if a == b or state.stop[0] != 0:
                    continue
                if terms is None:
                    fix_others(a, b, values, ranks, pair)
                    if improve_pair(costs, state, a, b, pair, NO):
                        slowest_three(state.times, values, ranks)
                        improved = True
                elif settle_pair(costs, state, a, b, pair, terms, moved_G, best, slots, values, ranks):
                    improved = True
            if improved:
                break


@njit(nogil=True)
def blamed(state: State, values: Array, ranks: Array) -> Array:
    """[G] weighted time for which the others wait for each rank: its lead over the second slowest."""
    blame = np.zeros(state.times.shape[0], np.float64)
    for t in range(state.times.shape[1]):
        blame[ranks[0, t]] += np.float64((values[0, t] - values[1, t]) * state.weights[t])
    return blame

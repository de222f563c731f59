"""Search under the optimal split of plain loads: copies go where they let most load through, again and again.

From a placement without copies they are added by what they promise, a few at a time; then it climbs by single changes.
Where that gains little, it keeps changes that lose as well, by chance and ever fewer: S. Kirkpatrick, C. Gelatt and
M. Vecchi, "Optimization by simulated annealing", Science 220 (1983).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from gemopt.placement import EMPTY
from gemopt.problem import Problem
from gemopt.solvers.base import Row
from gemopt.solvers.search.spread_climb import Climb
from gemopt.solvers.search.spreading import Look, Looks

ROUNDS = 12  # in which spare slots are filled
TRIES, FEWEST = 8, 256  # for each slot, and at least, between looks at whether climbing still gains
SLOW = 5e-4  # of the value: where climbing gains no more between looks, annealing begins
HOT, COLD = 1e-4, 4e-6  # of the value: temperatures
HOTTER, HOTTEST = 10.0, 0.1  # times the heat of a round in vain: the next one, until it is more than this of the value
ROUND, MOST_ROUND = 4, 8  # times these tries: rounds of annealing, at first and at most
WHOLE = 64  # times as many tries as a row has changes: a round takes no longer, whatever the time
PLANNED = 0.97  # of the time left: what a round takes
LONGER = 32.0  # times what was spent before: what a round takes at most, so that it may end sooner
FADE = 0.3  # what a promise is worth when another copy of the expert was just added
LEAST_SHARE = 0.25  # of the best promise: what is added with it
Stop = Callable[[], bool]


class SpreadSearch:
    """One layer's search; `best` is the best look so far."""

    def __init__(self, problem: Problem, row: Row, draws: np.random.Generator) -> None:
        self.problem, self.draws = problem, draws
        self.looks = Looks(problem)
        self.best = self.looks.at(row)
        self.tries = max(FEWEST, TRIES * len(row))
        self.round, self.spent_s, self.climbed, self.hot = ROUND * self.tries, 0.0, False, HOT
        self.whole = WHOLE * len(row) * ((len(row) - 1) // 2 + problem.num_experts)
        self.climbing: Climb | None = None

    def take(self, look: Look) -> bool:
        """Keep a look that is better than the best."""
        if look.value_us >= self.best.value_us * (1 - 1e-9):
            return False
        self.best, self.climbing, self.climbed, self.hot = look, None, False, HOT
        return True

    def fill(self, look: Look, stop: Stop) -> Look:
        """A look with copies in empty slots, the most promising first, a share of them between looks."""
        row, empty = look.row, int((look.row == EMPTY).sum())
        batch = max(2, -(-empty // ROUNDS))
        while empty and not stop():
            row = self._added(look, batch)
            left = int((row == EMPTY).sum())
            if left in (0, empty):
                break
            look, empty = self.looks.at(row, look), left
        return self.looks.at(row, look)

    def _added(self, look: Look, batch: int) -> Row:
        row, gain_EG = look.row.copy(), np.where(self.looks.barred(look.row), -1.0, look.promise.gain_EG)
        rank_of_slot = self.problem.rank_of_slot
        room_G = np.bincount(rank_of_slot[row == EMPTY], minlength=self.problem.num_ranks)
        gain_EG[:, room_G == 0] = -1.0
        least = LEAST_SHARE * gain_EG.max()
        for _ in range(batch):
            expert, rank = np.unravel_index(gain_EG.argmax(), gain_EG.shape)
            promise = gain_EG[expert, rank]
            if promise <= 0 or promise < least:
                break
            row[np.flatnonzero((rank_of_slot == rank) & (row == EMPTY))[0]] = expert
            room_G[rank] -= 1
            gain_EG[expert] *= FADE
            gain_EG[:, rank] *= 0.5 if room_G[rank] else 0.0
            gain_EG[expert, rank] = -1.0
            if self.problem.rules is not None:
                gain_EG[self.problem.rules.clash_EE[expert], rank] = -1.0
        return row

    def step(self, stop: Stop, left_s: float | None = None, enough_us: float = 0.0) -> bool:
        """Climb from the best; where that gains little, anneal from it. Whether it is better now.

        left_s: seconds that are left, most of which one round of annealing takes; without, rounds are counted in tries.
        enough_us: weighted time that ends a round.
        """
        before, begin = self.best.value_us, time.monotonic()
        climbing = self.climbing = self.climbing or Climb(self.best, self.draws)
        least_us = max(self.looks.fluid_us * (1 + 1e-9), enough_us * (1 - 1e-7))  # values here are rounded
        over = lambda: climbing.value_us <= least_us or stop()  # noqa: E731
        if self.climbed:
            climbing.anneal(self.hot, COLD * self.hot / HOT, self._progress(left_s), over)
            self.hot *= HOTTER
            if climbing.value_us < before or self.hot > HOTTEST:
                self.hot = HOT
        else:
            climbing.climb(self.tries, over)
            self.climbed = climbing.value_us > before * (1 - SLOW)
        better = climbing.value_us < before
        if better:
            self.best = climbing.look
        self.spent_s += time.monotonic() - begin
        return better

    def _progress(self, left_s: float | None) -> Callable[[int], float]:
        """Of one round of annealing, longer than the one before where no time is given."""
        if left_s is None:
            tries = self.round
            self.round = min(2 * self.round, MOST_ROUND * self.tries)
            return lambda done: done / tries
        begin, planned_s = time.monotonic(), max(1e-3, PLANNED * min(left_s, LONGER * self.spent_s))
        return lambda done: max((time.monotonic() - begin) / planned_s, done / self.whole)

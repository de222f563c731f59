"""Search under the optimal split of plain loads: copies go where they let most load through, again and again.

From a placement without copies they are added by what they promise, a few at a time; then it climbs by single changes.
Where that is over, those that let least through are taken away and put where they promise most, experts swap across the
cuts that bind, it climbs again, and what costs less is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gemopt.placement import EMPTY
from gemopt.problem import Problem
from gemopt.solvers.base import Row
from gemopt.solvers.search.spread_climb import Climb
from gemopt.solvers.search.spreading import Look, Looks

ROUNDS = 12  # in which spare slots are filled
RUIN = 6  # one copy in so many is taken away at first
TRIES = 8  # for each slot, between looks at whether climbing still gains
FADE = 0.3  # what a promise is worth when another copy of the expert was just added
GUIDED_SHARE = 0.7  # of the swaps
LEAST_SHARE = 0.25  # of the best promise: what is added with it
Stop = Callable[[], bool]


class SpreadSearch:
    """One layer's search; `best` is the best look so far."""

    def __init__(self, problem: Problem, row: Row, draws: np.random.Generator) -> None:
        self.problem, self.draws = problem, draws
        self.looks = Looks(problem)
        self.best = self.looks.at(row)
        self.ruined = max(1, problem.spare_slots // RUIN)
        self.swaps, self.tries = 4, TRIES * len(row)

    @property
    def closed(self) -> bool:
        """Whether no placement can be better."""
        return self.best.value_us <= self.looks.fluid_us * (1 + 1e-9)

    def take(self, look: Look) -> bool:
        """Keep a look that is better than the best."""
        if look.value_us >= self.best.value_us * (1 - 1e-9):
            return False
        self.best = look
        return True

    def fill(self, look: Look, stop: Stop) -> Look:
        """A look with copies in empty slots, the most promising first, a share of them between looks."""
        return self.looks.at(self._filled(look, stop, self.looks.at), look)

    def _filled(self, look: Look, stop: Stop, look_at: Callable[[Row, Look], Look]) -> Row:
        row, empty = look.row, int((look.row == EMPTY).sum())
        batch = max(2, -(-empty // ROUNDS))
        while empty and not stop():
            row = self._added(look, batch)
            left = int((row == EMPTY).sum())
            if left in (0, empty):
                break
            look, empty = look_at(row, look), left
        return row

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

    def step(self, stop: Stop) -> bool:
        """Climb from the best; where that is over, from what is left of it after a kick. Whether it is better now."""
        climb = Climb(self.best, self.draws)
        if climb.climb(self.tries, stop):
            self.best = climb.look
            return True
        return not stop() and self._kick(stop)

    def _kick(self, stop: Stop) -> bool:
        """Take copies away, swap experts' ranks, or both, fill up again and climb; whether that was for the better."""
        ruin, swap = ((True, False), (False, True), (True, True))[int(self.draws.integers(3))]
        look = self.looks.glance(self._ruined(), self.best) if ruin else self.best
        row = look.row
        if swap:
            row = self._swapped(look, guided=self.draws.random() < GUIDED_SHARE)
        if (row == EMPTY).any():
            look = self.looks.glance(row, look) if swap else look
            row = self._filled(look, stop, self.looks.glance)
        climb = Climb(self.looks.at(row, look), self.draws)
        while climb.climb(self.tries, stop):
            pass
        better = self.take(climb.look)
        if ruin:
            self.ruined = self._next(self.ruined, better, max(1, self.problem.spare_slots // 2))
        if swap:
            self.swaps = self._next(self.swaps, better, self.problem.num_ranks)
        return better

    def _next(self, size: int, better: bool, most: int) -> int:
        """How much to change next time: as much where it helped, else less, down to one and then again a few."""
        if better:
            return min(most, size + 1)
        return size // 2 if size > 1 else int(self.draws.integers(1, 1 + max(1, most // 3)))

    def _ruined(self) -> Row:
        """The best row without the copies that let least through, by a noisy measure."""
        copies, row = self.best.copies, self.best.row.copy()
        number_R = np.diff(copies.first)
        left = self.ruined
        for c in np.argsort((self.best.promise.used_C + 1e-9) * self.draws.uniform(0.2, 1.8, len(copies.slot))):
            if left and number_R[copies.owner[c]] > 1:
                row[copies.slot[c]] = EMPTY
                number_R[copies.owner[c]] -= 1
                left -= 1
        return row

    def _swapped(self, look: Look, *, guided: bool) -> Row:
        """The row with some slots of different ranks swapped: by what that promises across the cuts, or any."""
        row, ranks = look.row.copy(), self.problem.rank_of_slot
        size = len(row), len(row)
        gain_IJ = self.draws.uniform(0.4, 1.6, size)
        if guided:
            number_E = np.maximum(np.bincount(row[row != EMPTY], minlength=self.problem.num_experts), 1)
            tilt_IG = np.where((row != EMPTY)[:, None], look.tilt_EG[row] / number_E[row][:, None], 0.0)
            here_I, there_IJ = tilt_IG[np.arange(len(row)), ranks], tilt_IG[:, ranks]
            gain_IJ *= here_I[:, None] + here_I[None] - there_IJ - there_IJ.T
        barred_IG = self.looks.barred(row)[row] & (row != EMPTY)[:, None]
        gain_IJ[barred_IG[:, ranks] | barred_IG[:, ranks].T | (ranks[:, None] >= ranks[None])] = 0.0
        touched: NDArray[np.bool_] = np.zeros(self.problem.num_ranks, dtype=bool)
        for _ in range(self.swaps if guided else 1):
            i, j = np.unravel_index(gain_IJ.argmax(), gain_IJ.shape)
            if gain_IJ[i, j] <= 0:
                break
            row[i], row[j] = row[j], row[i]
            touched[[ranks[i], ranks[j]]] = True
            gain_IJ[touched[ranks]] = 0.0
            gain_IJ[:, touched[ranks]] = 0.0
        return row

"""Climbing under the optimal split: one change of slots after the other, drawn by costs and promises, kept if it gains.

Each is told from the splits before it (`spread_changes`), which takes a small part of what looking at a row takes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gemopt.latency import FloatArray
from gemopt.placement import EMPTY
from gemopt.solvers.base import Row
from gemopt.solvers.search.spread_changes import Change, Flow, fill_most, make_work, try_change
from gemopt.solvers.search.spreading import FEWEST, GLANCE, Look
from gemopt.splits.flow import find_copies

LEAST_GAIN = 1e-9  # of the value
REFRESH = 1000  # tries after which slots and experts are weighed again, and other steps come first
ANYWHERE = 1e-3  # of what all slots cost: what each of them has at least, taken together


class Climb:
    """A row that changes, with the best splits of all steps kept up to date."""

    def __init__(self, look: Look, draws: np.random.Generator) -> None:
        self.looks, self.problem, self.draws = look.looks, look.looks.problem, draws
        self.row, self.copies, self.value_us = look.row, look.copies, look.value_us
        self.ranks = np.ascontiguousarray(self.problem.rank_of_slot, np.int64)
        self.flow = _flow(look)
        self.then = Flow._make(map(np.empty_like, self.flow))
        self.work = make_work(self.problem.num_steps, len(self.row), self.problem.num_ranks)
        self.barred_EG = self.looks.barred(self.row)

    @property
    def look(self) -> Look:
        """The row as it is."""
        flow = self.flow
        return Look(
            self.looks, self.row.copy(), self.value_us, flow.times_T.copy(), flow.shares_TP.copy(), self.copies,
            flow.cut_TG.copy(), flow.load_TG.copy(),
        )  # fmt: skip

    def climb(self, tries: int, stop: Callable[[], bool]) -> bool:
        """Try changes and keep those that gain; whether any did."""
        before = self.value_us
        for done in range(tries):
            if done % REFRESH == 0:
                slot_P, expert_E = self._weights()
                self.order = self.draws.permutation(self.problem.num_steps)
            if stop():
                break
            slot = int(np.searchsorted(slot_P, self.draws.random()))
            other = int(self.draws.integers(len(self.row)))
            if self.draws.random() < 0.5:
                self._swap(slot, other)
            else:
                self._put(int(np.searchsorted(expert_E, self.draws.random())), other)
        return self.value_us < before

    def _weights(self) -> tuple[FloatArray, FloatArray]:
        """Cumulated, up to 1: what slots cost where they are, and what copies of experts promise."""
        look, held = self.look, self.row != EMPTY
        number_E = np.bincount(self.row[held], minlength=self.problem.num_experts)
        cost_P = np.zeros(len(self.row))
        cost_P[held] = look.tilt_EG[self.row[held], self.ranks[held]] / number_E[self.row[held]]
        return _cumulated(cost_P), _cumulated(np.maximum(look.promise.gain_EG, 0.0).sum(axis=1))

    def _swap(self, slot: int, other: int) -> None:
        if self.row[slot] == EMPTY:
            slot, other = other, slot
        a, b, x, y = self.ranks[slot], self.ranks[other], self.row[slot], self.row[other]
        if a == b or x in (y, EMPTY) or self.barred_EG[x, b] or (y != EMPTY and self.barred_EG[y, a]):
            return
        row = self.row.copy()
        row[slot], row[other] = y, x
        self._try(row, slot, other)

    def _put(self, expert: int, slot: int) -> None:
        """An expert where a copy was, or nothing."""
        old = self.row[slot]
        if self.barred_EG[expert, self.ranks[slot]] or (old != EMPTY and (self.row == old).sum() < 2):
            return
        row = self.row.copy()
        row[slot] = expert
        self._try(row, slot, -1)

    def _ranks(self, row: Row, expert: int) -> Row:
        """The ranks that have an expert; none of no expert."""
        return self.ranks[row == expert] if expert != EMPTY else self.ranks[:0]

    def _try(self, row: Row, slot: int, other: int) -> None:
        problem, old, new = self.problem, int(self.row[slot]), int(row[slot])
        before, after = ((self._ranks(each, old), self._ranks(each, new)) for each in (self.row, row))
        siblings = np.flatnonzero(row == old) if other < 0 and old != EMPTY else np.zeros(0, np.int64)
        change = Change(slot, other, np.array([old, new]), before, after, siblings, self.ranks)
        alone = other >= 0 and max(map(len, after)) < 2
        copies = self.copies if alone else find_copies(row, self.ranks, problem.num_experts, problem.num_ranks)
        saved = try_change(
            self.looks.curves, problem.counts_TE, problem.weights_T, self.looks.fluid_T, copies, self.flow, change,
            self.then, self.work, self.order, max(FEWEST, len(self.order) // GLANCE), LEAST_GAIN * self.value_us,
        )  # fmt: skip
        if saved > 0:
            self.row, self.copies, self.value_us = row, copies, self.value_us - saved
            self.barred_EG = self.looks.barred(row)


def _flow(look: Look) -> Flow:
    counts_TE, row, ranks = look.looks.problem.counts_TE, look.row, look.looks.problem.rank_of_slot
    held_GE = np.zeros((look.cut_TG.shape[1], counts_TE.shape[1]))
    held_GE[ranks[row != EMPTY], row[row != EMPTY]] = 1.0
    inside_TE = ~look.cut_TG @ held_GE == 0
    flow = Flow(
        look.shares_TP.astype(np.int64, order="C"), look.load_TG.copy(), np.zeros_like(look.load_TG),
        look.times_T.copy(), look.cut_TG.copy(), (counts_TE * inside_TE).sum(axis=1, dtype=np.int64),
    )  # fmt: skip
    fill_most(look.looks.curves, flow)
    return flow


def _cumulated(weight_N: FloatArray) -> FloatArray:
    weight_N = weight_N + ANYWHERE * weight_N.sum() / len(weight_N) + 1e-300
    total_N = np.cumsum(weight_N)
    return np.asarray(total_N[:-1] / total_N[-1])

"""Climbing under the optimal split: one change of slots after the other, drawn by costs and promises, kept if it gains.

Annealing keeps some that lose as well.

Each is told from the splits before it (`spread_changes`), which takes a small part of what looking at a row takes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gemopt.latency import FloatArray
from gemopt.placement import EMPTY
from gemopt.solvers.search.spread_changes import Flow, fill_most, make_work, try_drawn
from gemopt.solvers.search.spread_cuts import first_cuts, make_cuts
from gemopt.solvers.search.spreading import Look
from gemopt.splits.flow import find_copies

LEAST_GAIN = 1e-9  # of the value
GLANCE, FEWEST = 4, 128  # one step in so many says first what a change loses, though not fewer than so many
BATCH = 64  # tries between looks at whether to stop
REFRESH = 1024  # tries after which slots and experts are weighed again, and other steps come first
ANYWHERE = 1e-3  # of what all slots cost: what each of them has at least, taken together
EVENLY = 10.0  # times the heat: the same where annealing is so hot that this is more


class Climb:
    """A row that changes, with the best splits of all steps kept up to date."""

    def __init__(self, look: Look, draws: np.random.Generator) -> None:
        self.looks, self.problem, self.draws = look.looks, look.looks.problem, draws
        self.ranks = np.ascontiguousarray(self.problem.rank_of_slot, np.int64)
        self.work = make_work(self.problem.num_steps, len(look.row), self.problem.num_ranks)
        self.anywhere = ANYWHERE
        self._begin(look)

    def _begin(self, look: Look) -> None:
        self.row, self.value_us = look.row.astype(np.int64), look.value_us
        self.flow = _flow(look)
        self.barred_EG = np.ascontiguousarray(self.looks.barred(self.row))

    @property
    def look(self) -> Look:
        """The row as it is."""
        flow, problem = self.flow, self.problem
        copies = find_copies(self.row, self.ranks, problem.num_experts, problem.num_ranks)
        return Look(
            self.looks, self.row.copy(), self.value_us, flow.times_T.copy(), flow.shares_TP.copy(), copies,
            first_cuts(flow.cuts, problem.num_ranks), flow.load_TG.copy(),
        )  # fmt: skip

    def climb(self, tries: int, stop: Callable[[], bool]) -> bool:
        """Try changes and keep those that gain; whether any did."""
        before = self.value_us

        def must_gain(done: int) -> FloatArray | None:
            return None if done >= tries or stop() else np.full(BATCH, LEAST_GAIN * self.value_us)

        self._try(must_gain)
        return self.value_us < before

    def anneal(self, hot: float, cold: float, progress: Callable[[int], float], stop: Callable[[], bool]) -> None:
        """Try changes and keep those that lose no more than chance lets them, ever less; ends in the best row.

        hot, cold: temperatures at first and at last, of the value. progress: how much is over after so many tries,
        from 0 to 1.
        """
        best, best_us, self.anywhere = self.row.copy(), self.value_us, min(1.0, max(ANYWHERE, EVENLY * hot))

        def may_lose(done: int) -> FloatArray | None:
            nonlocal best, best_us
            if self.value_us < best_us * (1 - LEAST_GAIN):
                best, best_us = self.row.copy(), self.value_us
            part = progress(done)
            if part >= 1 or stop():
                return None
            return np.asarray(self.value_us * hot * (cold / hot) ** part * np.log(1 - self.draws.random(BATCH)))

        self._try(may_lose)
        self.anywhere = ANYWHERE
        if self.value_us > best_us:
            self._begin(self.looks.at(best, self.look))

    def _try(self, least: Callable[[int], FloatArray | None]) -> None:
        """Try changes and keep those that save as much as they have to, by how many were tried; until none is told."""
        done = 0
        while (least_N := least(done)) is not None:
            if done % REFRESH == 0:
                slot_P, expert_E = self._weights()
                order = self.draws.permutation(self.problem.num_steps)
            draws_ND, at = self.draws.random((BATCH, 3)), 0
            while at < BATCH:
                tried, carried, saved = try_drawn(
                    self.looks.levels, self.problem.counts_TE, self.problem.weights_T, self.looks.fluid_T, self.row,
                    self.ranks, self.barred_EG, slot_P, expert_E, draws_ND[at:], self.flow, self.work, order,
                    max(FEWEST, len(order) // GLANCE), least_N[at:],
                )  # fmt: skip
                at += tried
                if carried:
                    self.value_us -= saved
                    self.barred_EG = np.ascontiguousarray(self.looks.barred(self.row))
            done += BATCH

    def _weights(self) -> tuple[FloatArray, FloatArray]:
        """Cumulated, up to 1: what slots cost where they are, and what copies of experts promise."""
        look, held = self.look, self.row != EMPTY
        number_E = np.bincount(self.row[held], minlength=self.problem.num_experts)
        cost_P = np.zeros(len(self.row))
        cost_P[held] = look.tilt_EG[self.row[held], self.ranks[held]] / number_E[self.row[held]]
        promise_E = np.maximum(look.promise.gain_EG, 0.0).sum(axis=1)
        return _cumulated(cost_P, self.anywhere), _cumulated(promise_E, self.anywhere)


def _flow(look: Look) -> Flow:
    counts_TE, row, ranks = look.looks.problem.counts_TE, look.row, look.looks.problem.rank_of_slot
    held_GE = np.zeros((look.cut_TG.shape[1], counts_TE.shape[1]))
    held_GE[ranks[row != EMPTY], row[row != EMPTY]] = 1.0
    inside_TE = ~look.cut_TG @ held_GE == 0
    flow = Flow(
        look.shares_TP.astype(np.int64, order="C"), look.load_TG.copy(), np.zeros_like(look.load_TG),
        look.times_T.copy(), make_cuts(look.cut_TG, (counts_TE * inside_TE).sum(axis=1, dtype=np.int64)),
    )  # fmt: skip
    fill_most(look.looks.levels, flow)
    return flow


def _cumulated(weight_N: FloatArray, anywhere: float) -> FloatArray:
    weight_N = weight_N + anywhere * weight_N.sum() / len(weight_N) + 1e-300
    total_N = np.cumsum(weight_N)
    return np.asarray(total_N[:-1] / total_N[-1])

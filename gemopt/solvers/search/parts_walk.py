"""A compiled walk under static weights, which change with the placement, or with nearest copies."""

from __future__ import annotations

import time

import numpy as np

from gemopt.latency import FloatArray
from gemopt.placement import EMPTY, Split
from gemopt.problem import Problem
from gemopt.solvers.base import Row
from gemopt.solvers.search.sharing_changes import Sharing, make_change
from gemopt.solvers.search.sharing_draws import DRAWS, walk
from gemopt.solvers.search.sharing_walk import FEWEST, GLANCE, Walk
from gemopt.solvers.search.state import make_costs, make_state, step_order
from gemopt.splits import shares
from gemopt.splits.optimal import TABLE_LIMIT, feature_table
from gemopt.splits.rules import nearest_weights
from gemopt.splits.weights import static_weights

CLIMBED, REPEATED = 4, 64  # times the changes of a row: rounds that climb, and those that anneal
LEAST_REPEATED = 8  # what is less is no annealing
MOST, FEWEST_TRIES = 1 << 14, 1 << 12  # changes of a round at most, and that are tried at least
LEAST_GAIN = 2e-7  # of the value: times are rounded


class PartsWalk(Walk):
    """A row, and weights of the best one.

    most: changes that a round may take, which follows from the time where that counts.
    """

    batch = 256

    def __init__(self, problem: Problem, row: Row, draws: np.random.Generator) -> None:
        self.costs, self.order = make_costs(problem), step_order(problem.num_steps)
        self.first = min(problem.num_steps, max(FEWEST, problem.num_steps // GLANCE))
        self.counts_ET = np.ascontiguousarray(problem.counts_TE[self.order].T, np.int32)
        self.table_FN = feature_table(problem.features, int(problem.counts_TE.max())).astype(np.float32)
        self.senders_EGT = np.zeros((problem.num_experts, problem.num_ranks, 0), np.int32)
        if problem.senders_TGE is not None:
            self.senders_EGT = np.ascontiguousarray(problem.senders_TGE[self.order].transpose(2, 1, 0), np.int32)
        self.weights_P: FloatArray | None = None
        self.most, self.done, self.spent_s = MOST, 0, 0.0
        super().__init__(problem, row, draws)

    @staticmethod
    def takes(problem: Problem) -> bool:
        """Whether the copies of an expert share by themselves, and counts are few enough to tabulate."""
        return problem.split is not Split.OPTIMAL and int(problem.counts_TE.max()) < TABLE_LIMIT

    def _begin(self, row: Row) -> float:
        problem, weights_P = self.problem, self.weights_P
        if weights_P is None or row is not self.best:
            weights_P = self._chosen(row)
        self.row = row.astype(np.int64)
        shares_TP = shares(problem, self.row, weights_P if problem.split is Split.STATIC else None)
        self.state = make_state(problem, self.row, self.costs, None, shares_TP)
        self.sharing = self._sharing(weights_P)
        self.change = make_change(self.state)
        self.begin_P, self.end_P = self.sharing.begin_P.copy(), self.sharing.end_P.copy()
        value_us = float(self.change.slowest[0].astype(np.float64) @ self.state.weights)
        if value_us < self.best_us:  # else those of the best row stay
            self.weights_P = weights_P
        self.values = np.array([value_us, min(value_us, self.best_us)])
        return value_us

    def _chosen(self, row: Row) -> FloatArray:
        problem = self.problem
        if problem.split is Split.STATIC:
            return static_weights(problem, row)
        return nearest_weights(row, problem.rank_of_slot, problem.node_of_rank, problem.num_experts)

    def _sharing(self, weights_P: FloatArray) -> Sharing:
        problem, row = self.problem, self.row
        slot_EG = np.full((problem.num_experts, problem.num_ranks), -1)
        begin_P, end_P, held = np.zeros(len(row)), np.zeros(len(row)), np.flatnonzero(row != EMPTY)
        slot_EG[row[held], problem.rank_of_slot[held]] = held
        for slots in np.split(held[np.argsort(row[held], kind="stable")], np.cumsum(np.bincount(row[held]))[:-1]):
            end_P[slots] = np.append(np.minimum(1.0, np.cumsum(weights_P[slots[:-1]])), 1.0)
            begin_P[slots] = np.append(0.0, end_P[slots[:-1]])
        return Sharing(
            self.counts_ET, self.table_FN, self.senders_EGT, problem.node_of_rank.astype(np.int64),
            problem.split is Split.STATIC, problem.full, slot_EG, begin_P, end_P,
        )  # fmt: skip

    def _try(self, number: int) -> None:
        begun, before_us = time.monotonic(), self.values[1]
        heat_N = -self.heat() * self.values[0] * np.log(1 - self.draws.random(number)) - LEAST_GAIN * self.values[0]
        walk(
            self.costs, self.state, self.sharing, self.change, self.draws.random((number, DRAWS)), heat_N, self.first,
            self.values, self.row, self.begin_P, self.end_P,
        )  # fmt: skip
        if self.values[1] < before_us:
            self.best, self.best_us = self.row.copy(), float(self.values[1])
            self.weights_P = np.where(self.best != EMPTY, self.end_P - self.begin_P, 0.0)
        self.spent_s += time.monotonic() - begun
        self.done += number

    def some(self) -> int:
        return max(FEWEST_TRIES, self.round - self.tried)

    def allow(self, seconds: float) -> None:
        """Let rounds take no longer."""
        self.most = int(seconds * self.done / self.spent_s) if self.done else MOST

    def _plan(self) -> None:
        self.hot = self.hot if self.most >= LEAST_REPEATED * self.changes else 0.0
        self.round = max(self.batch, min((REPEATED if self.hot else CLIMBED) * self.changes, self.most))

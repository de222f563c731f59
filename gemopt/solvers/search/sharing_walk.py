"""Walks over placements whose copies share by any policy: each change is judged by the policy's own objective.

One slot gets another expert or none, or two change places; most are drawn from the rank that a step waits for. A walk
climbs first; then rounds of annealing begin at the best row, each hotter than one in vain before it. `SharingWalk` asks
for the cost of every row; `parts_walk` has a quicker one where the copies of an expert share by themselves.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gemopt.compiling import njit
from gemopt.evaluate import moves_us, rank_times
from gemopt.kernels import Array, latency_value
from gemopt.latency import Curves, FloatArray, pack
from gemopt.migration import held
from gemopt.moves import Moves
from gemopt.placement import EMPTY, Split
from gemopt.problem import Problem
from gemopt.solvers.base import Options, Row, within_limits
from gemopt.solvers.search.sharing_draws import AT_A_GLANCE, FROM_SLOWEST
from gemopt.splits import plain
from gemopt.splits.flow import copies_of, fluid_times, make_room, spread
from gemopt.splits.levels import Levels, no_levels
from gemopt.splits.optimal import feature_table
from gemopt.splits.parts import part_steps

HOT, HOTTER, HOTTEST, COOLED = 1e-3, 4.0, 0.1, 0.02  # heat of the value: first round, next, at most; what is left of it
GLANCE, FEWEST = 4, 64  # one step in so many says first what a change loses, though not fewer than so many
LEAST_GAIN = 1e-9  # of the value
SAME = 1e-6  # of the value: what walks may be off
HOMEWARD = 0.25  # of the changes where moves are counted bring an expert home besides
NEVER = 2**62
TRIES, FEWEST_TRIES = 8, 256  # for each slot, and at least, where the time does not count
Cost = Callable[[Row, NDArray[np.int64]], tuple[FloatArray, NDArray[np.int64]]]
"""[N] microseconds that some steps take, before weights, and the ranks that they wait for."""


@njit(nogil=True)
def parted_times(
    table_FN: Array, counts_TE: Array, row_P: Array, rank_P: Array, high: Curves, curves: Curves, steps: Array
) -> Array:
    """[N, G] latency of every rank at some steps under the optimal split, which asks for `high` latencies."""
    features, num_ranks, number_E = table_FN.shape[0], len(curves.num_terms), np.zeros(counts_TE.shape[1], np.int64)
    copies = copies_of(row_P, rank_P, counts_TE.shape[1], num_ranks)
    loads = np.zeros((len(steps), num_ranks, features))
    parts = np.zeros((len(steps), len(copies.slot)), np.int64)
    counts = np.zeros((len(steps), len(copies.experts)), np.int64)
    for p in range(len(row_P)):
        if row_P[p] >= 0:
            number_E[row_P[p]] += 1
    for n in range(len(steps)):
        for p in range(len(row_P)):
            if row_P[p] >= 0 and number_E[row_P[p]] == 1:
                for f in range(features):
                    loads[n, rank_P[p], f] += table_FN[f, counts_TE[steps[n], row_P[p]]]
        for r in range(len(copies.experts)):
            counts[n, r] = counts_TE[steps[n], copies.experts[r]]
            size = copies.first[r + 1] - copies.first[r]
            for c in range(size):
                parts[n, copies.first[r] + c] = (counts[n, r] + size - 1 - c) // size
    part_steps(high, loads, copies, counts, table_FN, parts)
    times = np.empty((len(steps), num_ranks))
    for n in range(len(steps)):
        for c in range(len(copies.slot)):
            for f in range(features):
                loads[n, copies.rank[c], f] += table_FN[f, parts[n, c]]
        for g in range(num_ranks):
            times[n, g] = latency_value(g, loads[n, g], curves)
    return times


@njit(nogil=True)
def flow_times(
    levels: Levels, counts_TE: Array, row_P: Array, rank_P: Array, fluid_T: Array, curves: Curves, steps: Array
) -> Array:
    """[N, G] latency of every rank at some steps under the optimal split of plain loads."""
    num_ranks, copies = len(curves.num_terms), copies_of(row_P, rank_P, counts_TE.shape[1], len(curves.num_terms))
    times, room, alone = np.empty((len(steps), num_ranks)), make_room(num_ranks), np.ones(len(row_P), np.bool_)
    load_G, parts, load_F = np.empty(num_ranks, np.int64), np.empty(len(copies.slot), np.int64), np.empty(1)
    for c in copies.slot:
        alone[c] = False
    for n in range(len(steps)):
        load_G[:] = 0
        for p in range(len(row_P)):
            if row_P[p] >= 0 and alone[p]:
                load_G[rank_P[p]] += counts_TE[steps[n], row_P[p]]
        for r in range(len(copies.experts)):
            size, count = copies.first[r + 1] - copies.first[r], counts_TE[steps[n], copies.experts[r]]
            for c in range(size):
                parts[copies.first[r] + c] = (count + size - 1 - c) // size
        spread(levels, load_G, copies, parts, room, fluid_T[steps[n]])
        for g in range(num_ranks):
            load_F[0] = room.load[g]
            times[n, g] = latency_value(g, load_F, curves)
    return times


class Walk(ABC):
    """A row that changes, and the best one so far, with what they cost. round: changes of the present round."""

    batch = 1  # changes tried between looks at whether to stop

    def __init__(self, problem: Problem, row: Row, draws: np.random.Generator, hot: float = 0.0) -> None:
        """hot: heat of the first round; 0: it climbs."""
        self.problem, self.draws, self.hot = problem, draws, hot
        self.changes = len(row) * (len(row) // 2 + problem.num_experts)
        self.best, self.best_us = row, np.inf
        self._plan()
        self.restart(row)

    @abstractmethod
    def _begin(self, row: Row) -> float:
        """Stand at a row; what it costs."""

    @abstractmethod
    def _try(self, number: int) -> None:
        """Try so many changes, and keep the best row."""

    def restart(self, row: Row) -> None:
        """Begin at a row, which is the best one if nothing was better."""
        value_us = self._begin(row)
        if value_us < self.best_us:
            self.best, self.best_us = row, value_us
        self.tried, self.begun_us = 0, self.best_us

    def walk(self, tries: int, stop: Callable[[], bool]) -> bool:
        """Try changes, and whether one of them leads to a better row than any before."""
        before, left = self.best_us, tries
        while left > 0 and not stop():
            if self.tried >= self.round:
                gained = self.best_us < self.begun_us
                self.hot = 0.0 if gained and not self.hot else HOT if gained else self._hotter()
                self._plan()
                self.restart(self.best)
            number = min(left, self.batch)
            self.tried += number
            self._try(number)
            left -= number
        return self.best_us < before * (1 - LEAST_GAIN)

    def go_on(self, row: Row, value_us: float, options: Options, seconds: float) -> bool:
        """Walk for so many seconds, or a while where the time does not count, from a row that is worth `value_us` if
        that is better than the best; whether that helped."""
        if self.best_us > value_us * (1 + SAME):
            self.restart(row)
        end, timed = time.monotonic() + seconds, options.patience is None
        over = (lambda: time.monotonic() >= end or options.expired()) if timed else options.expired
        return self.walk(NEVER if timed else self.some(), over)

    def some(self) -> int:
        """Changes to try where the time does not count."""
        return max(FEWEST_TRIES, TRIES * len(self.best))

    def _plan(self) -> None:
        """How long the round that begins takes."""
        self.round = self.changes

    def _hotter(self) -> float:
        return max(HOT, self.hot * HOTTER) if self.hot < HOTTEST else HOT

    def heat(self) -> float:
        """What changes lose at present in the mean of those kept, of the value."""
        return float(self.hot * COOLED ** (self.tried / self.round))


class SharingWalk(Walk):
    """Any policy, or another cost, and what moves take: every row is looked at by itself."""

    def __init__(
        self, problem: Problem, row: Row, draws: np.random.Generator, cost: Cost | None = None, hot: float = 0.0
    ) -> None:
        """cost: in place of the policy's objective, for a search that sends experts home itself. hot: as of `Walk`."""
        self.weights_T, order = problem.weights_T, draws.permutation(problem.num_steps)
        size = max(FEWEST, problem.num_steps // GLANCE) if cost is None else problem.num_steps
        self.cost, self.homeward = cost or _by_policy(problem), cost is None and problem.moves is not None
        self.parts = [np.sort(part) for part in (order[:size], order[size:]) if len(part)]
        super().__init__(problem, row, draws, hot)

    def _begin(self, row: Row) -> float:
        self.row = row.astype(np.int64)
        self.cost_T, self.slowest_T = self.cost(self.row, np.arange(self.problem.num_steps))
        self.moves_us = moves_us(self.problem, self.row)
        self.value_us = float(self.cost_T @ self.weights_T) + self.moves_us
        return self.value_us

    def _try(self, number: int) -> None:
        for _ in range(number):
            self._try_one()

    def _try_one(self) -> None:
        row = self._drawn()
        if row is None:
            return
        heat = self.heat() * self.value_us
        may_lose = -heat * np.log(1 - self.draws.random()) - LEAST_GAIN * self.value_us
        fee_us = moves_us(self.problem, row)
        lost, found = fee_us - self.moves_us, []
        for part in self.parts:
            found.append(self.cost(row, part))
            lost += float((found[-1][0] - self.cost_T[part]) @ self.weights_T[part])
            if lost > (may_lose if len(found) == len(self.parts) else max(0.0, AT_A_GLANCE * may_lose)):
                return
        self.row, self.value_us, self.moves_us = row, self.value_us + lost, fee_us
        for part, (cost_N, slowest_N) in zip(self.parts, found, strict=True):
            self.cost_T[part], self.slowest_T[part] = cost_N, slowest_N
        if self.value_us < self.best_us * (1 - LEAST_GAIN):
            self.best, self.best_us = row, self.value_us

    def _drawn(self) -> Row | None:
        """The row after a change drawn at random; None where it may not be."""
        row, ranks, draws, problem = self.row, self.problem.rank_of_slot, self.draws, self.problem
        slot, other = draws.integers(len(row), size=2)
        if draws.random() < FROM_SLOWEST:
            mine = np.flatnonzero(ranks == self.slowest_T[draws.integers(problem.num_steps)])
            slot = draws.choice(mine) if len(mine) else slot
        row = row.copy()
        kind = draws.random()
        if kind < 0.5:
            row[slot], row[other] = row[other], row[slot]
        else:  # a copy of what is in the slot, or nothing, where nothing or a copy is
            if row[other] != EMPTY and (row == row[other]).sum() < 2:
                return None
            row[other] = EMPTY if kind > 0.9 and not problem.full else row[slot]
        if self.homeward and problem.moves is not None:
            row = self._homeward(row, problem.moves)
        return row if self._may_be(row) else None

    def _homeward(self, row: Row, moves: Moves) -> Row:
        """The row with as many experts brought home as the limits ask for, and by chance one besides."""
        if self.draws.random() < HOMEWARD:
            row = self._nearer_home(row, moves)
        for _ in range(2):  # a change moves no more
            row = self._nearer_home(row, moves) if moves.excess(row, self.problem.slots_per_rank) else row
        return row

    def _nearer_home(self, row: Row, moves: Moves) -> Row:
        """The row with one expert fewer, drawn at random, on a rank that did not hold it, where that can be."""
        problem, draws = self.problem, self.draws
        held_GE = held(row, problem.slots_per_rank, problem.num_experts)
        moved_GE, away_GE = held_GE & ~moves.home_GE, moves.home_GE & ~held_GE
        if not moved_GE.any():
            return row
        rank, expert = draws.choice(np.argwhere(moved_GE))
        back = draws.choice(np.flatnonzero(away_GE[rank])) if away_GE[rank].any() else EMPTY
        slot = np.flatnonzero((row == expert) & (problem.rank_of_slot == rank))[0]
        row = row.copy()
        if held_GE[:, expert].sum() > 1:
            row[slot] = back
        elif back != EMPTY and (strange_G := moved_GE[:, back]).any():
            other = np.flatnonzero((row == back) & strange_G[problem.rank_of_slot])[0]
            row[slot], row[other] = back, expert
        return row

    def _may_be(self, row: Row) -> bool:
        problem = self.problem
        if (row == self.row).all() or (problem.full and (row == EMPTY).any()):
            return False
        once = held(row, problem.slots_per_rank, problem.num_experts).sum() == (row != EMPTY).sum()
        return bool(once) and within_limits(problem, row)


def _by_policy(problem: Problem) -> Cost:
    """Makespans under the problem's own split."""
    if problem.split is Split.OPTIMAL and plain(problem):
        return _by_flow(problem)
    if problem.split is not Split.OPTIMAL:
        return lambda row, steps: slowest(rank_times(problem.select(steps), row))
    table_FN = feature_table(problem.features, int(problem.counts_TE.max()))
    high, curves = pack([each.high for each in problem.latencies]), problem.curves
    counts_TE, rank_P = problem.counts_TE.astype(np.int64), problem.rank_of_slot.astype(np.int64)
    return lambda row, steps: slowest(parted_times(table_FN, counts_TE, row, rank_P, high, curves, steps))


def _by_flow(problem: Problem) -> Cost:
    """Makespans under the optimal split of plain loads."""
    levels, curves = no_levels(pack([each.high for each in problem.latencies])), problem.curves
    counts_TE, rank_P = problem.counts_TE.astype(np.int64), problem.rank_of_slot.astype(np.int64)
    fluid_T = fluid_times(levels, counts_TE.sum(axis=1))
    return lambda row, steps: slowest(flow_times(levels, counts_TE, row, rank_P, fluid_T, curves, steps))


def slowest(times_NG: FloatArray) -> tuple[FloatArray, NDArray[np.int64]]:
    """[N] makespans, and whose they are."""
    return times_NG.max(axis=1), times_NG.argmax(axis=1)

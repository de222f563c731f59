"""Set partitioning over the contents of ranks: bounds and proves layers of few slots per rank, every cost model alike.

The master programme over some columns (`column_master`) gives multipliers, all columns are priced with them
(`column_space`), which is a bound, and the cheapest join the master. In between, the columns that the bound leaves are
searched (`search_columns`): first those in use, for better placements; then all, for a proof.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from gemopt.bounds import step_bounds
from gemopt.evaluate import objective
from gemopt.latency import FloatArray, IntArray
from gemopt.problem import Problem
from gemopt.result import StoppedBy, relative_gap
from gemopt.solvers import get
from gemopt.solvers.base import Options, Outcome, Row, Supports, incumbent
from gemopt.solvers.exact.column_kernels import search_columns
from gemopt.solvers.exact.column_master import Master
from gemopt.solvers.exact.column_space import LEVELS, Proven, Space
from gemopt.solvers.exact.compact import merged
from gemopt.solvers.exact.plain import begin
from gemopt.solvers.exact.tree import CLOSE
from gemopt.solvers.size import MANY_COLUMNS

ITERATIONS = 50  # of the master between two looks at all columns
COARSE = 400  # iterations with one level, then as many with three, before the most
HELD = 400  # cheapest columns in the master, beside those in use
IN_USE = 0.003  # of a column in the master: it may be part of a good placement
DIVE_WORK = 10**6  # steps and columns that a search of the columns in use may look at
FIRST_WORK = 2 * 10**8  # of a search for a proof after the first look; after the second twice as much, and so on
MOST_ROWS = 2e7  # entries of the rows of columns that are searched
FEWER = 0.6  # of the columns that the last search for a proof had, or of all: with more, none is tried
LATER = 8  # looks after which one is tried all the same, of so few columns that it may end; then after twice as many
FEW_LEFT = 2000
LEAST_GAIN = 0.02  # of what is open, in the last half of the iterations
NEVER = 2**62
NEAR, BETWEEN = 0.1, 4  # where columns are many: what part most looks are at, and how many such for one at all
LAST = 3.0  # times what a look at all takes, before the time is over: one is begun


def _least(values_N: FloatArray, count: int) -> IntArray:
    """Where the so many smallest values are."""
    return np.argpartition(values_N, min(count, len(values_N) - 1))[:count]


class Columns:
    """Column generation over all contents of a rank, reduced-cost enumeration, and a search of what is left."""

    name = "columns"
    supports = Supports(spare_slots=False, proves=True, improves=True)

    def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
        """Place one layer; see `Solver`.

        Raises
        ------
        UnsupportedError
            Spare slots, moves or rules: a column holds one copy of each of its experts and has no price but time.
        """
        begun = begin(self.name, problem, options, warm_start)
        if not begun.reached:
            return begun
        assert begun.row is not None and begun.start_us is not None
        row, value, history = begun.row, begun.start_us, begun.history
        space = Space.of(problem, step_bounds(problem))
        if space is None:
            note = "too many contents of a rank to list them"
            return Outcome(row, StoppedBy.ITERATIONS, None, history, note, start_us=value, reached=False)
        with options.alarm() as stop:
            search = _Search(space, row, value, options, stop)
            stopped_by = search.go()
        outcome = Outcome(search.row, stopped_by, search.bound_us, history + search.history, start_us=value)
        outcome.stated_steps = outcome.distinct_steps = merged(problem).num_steps
        outcome.own_bound_us, outcome.columns = search.bound_us, search.proven
        if stopped_by is not StoppedBy.PROOF:
            outcome.note = f"{len(search.left())} of {len(space)} contents of a rank may be part of a better placement"
        return outcome


class _Search:
    """What is known of a layer: the best placement, the best bound and the columns that it leaves."""

    def __init__(self, space: Space, row: Row, value: float, options: Options, stop: Any) -> None:
        self.space, self.row, self.value, self.options, self.stop = space, row, value, options, stop
        self.history: list[Any] = []
        self.proven: Proven | None = None
        self.done, self.tried, self.later = False, len(space), LATER
        self.looks: list[tuple[int, float]] = []
        self.fineness, self.cut_at = 0, 0
        self.near, self.since, self.look_s = np.zeros(0, np.int64), 0, 0.0

    @property
    def bound_us(self) -> float:
        """The best bound so far, which a search to the end has made the placement itself."""
        if self.done:
            return self.value * (1 - 2 * CLOSE)
        known = 0.0 if self.proven is None else self.proven.bound_us
        return min(self.value, max(known, float(self.space.problem.weights_T @ self.space.floor_T) * (1 - CLOSE)))

    def go(self) -> StoppedBy:
        """Until proven, within the gap, out of time, or without progress."""
        master = Master(self.space, max(self.value, 1e-300))
        master.hold(self._around())
        while not (self.stop[0] or self._within(self.options.gap)):
            master.iterate(ITERATIONS, self.stop)
            if self._between(master):
                continue
            began = time.monotonic()
            found = self.space.prove(master.levels_LT, *master.multipliers(), self.stop)
            if found is None:
                break
            self.look_s = time.monotonic() - began
            if self.proven is None or found.bound_us > self.proven.bound_us:
                self.proven = found
            self.looks.append((master.iterations, self.proven.bound_us))
            self._look_through(master.ids[master.image.x > IN_USE], DIVE_WORK)
            left = self.left()
            if len(left) <= FEWER * self.tried or (len(left) <= FEW_LEFT and len(self.looks) >= self.later):
                self.tried, self.later = len(left), max(LATER, 2 * len(self.looks))
                self._look_through(left, FIRST_WORK * len(self.looks))
            stalled = self._stalled()
            if self.fineness + 1 < len(LEVELS) and (stalled or master.iterations >= COARSE << self.fineness):
                self.fineness, self.cut_at = self.fineness + 1, master.iterations
                master.cut(self.space.levels(self.value, self.fineness))
            elif stalled:
                break
            self._hold(master, np.arange(len(self.space)), found.extra_N)
            self.near, self.since = _least(found.extra_N, int(NEAR * len(self.space))), 0
        if self.proven is not None and not self._within(self.options.gap):
            self._look_through(self.left(), NEVER)
        if self._within(self.options.gap):
            return StoppedBy.PROOF if self._within(0.0) else StoppedBy.GAP
        return self.options.cut_by if self.stop[0] else StoppedBy.ITERATIONS

    def _between(self, master: Master) -> bool:
        """Where contents are many, whether the next look is at the cheapest of the last look at all alone."""
        ends = self.options.remaining < LAST * self.look_s and self.since > 0
        if len(self.space) <= MANY_COLUMNS or not len(self.near) or self.since == BETWEEN or ends:
            return False
        self.since += 1
        found = self.space.among(self.near, master.levels_LT, *master.multipliers(), self.stop)
        if found is not None:
            self._hold(master, *found)
        return True

    def _hold(self, master: Master, ids: IntArray, extra_N: FloatArray) -> None:
        """Give the master its columns in use, the placement's, and the cheapest of some."""
        master.hold(np.concatenate([self.space.ids(self.row), master.used, ids[_least(extra_N, HELD)]]))

    def left(self) -> IntArray:
        """Columns that may be part of a better placement."""
        if self.proven is None:
            return np.arange(len(self.space))
        return np.flatnonzero(self.proven.extra_N < self.value * (1 - CLOSE) - self.proven.bound_us)

    def _within(self, limit: float) -> bool:
        """Whether the gap is at most this, or nothing but rounding."""
        gap = relative_gap(self.value, self.bound_us)
        return self.done or (gap is not None and gap <= max(limit, 3 * CLOSE))

    def _stalled(self) -> bool:
        """Whether the last half of the iterations, all since levels were made finer, gained next to nothing."""
        now, bound = self.looks[-1]
        before = [value for count, value in self.looks if self.cut_at < count <= now / 2]
        return len(before) > 3 and bound - before[-1] <= LEAST_GAIN * (self.value - bound)

    def _look_through(self, ids: IntArray, most_work: int) -> None:
        """Search partitions into some columns for better placements. All of `left` to the end: a proof."""
        assert self.proven is not None
        space, problem = self.space, self.space.problem
        if len(ids) * problem.num_steps > MOST_ROWS:
            return
        ids = ids[np.argsort(self.proven.extra_N[ids], kind="stable")]
        columns = space.found(ids, self.proven.extra_N[ids])
        chosen = np.full(int(space.count_K.sum()), -1)
        best, ended = search_columns(
            columns, space.count_K, problem.weights_T, space.floor_T, problem.num_experts, self.proven.bound_us,
            self.value, chosen, most_work, self.stop,
        )  # fmt: skip
        if best < self.value * (1 - CLOSE):
            self._take(space.row(ids[chosen]))
        self.done |= ended and most_work > DIVE_WORK

    def _take(self, row: Row) -> None:
        """Keep a placement when it is better, after a descent from it."""
        problem, options = self.space.problem, replace(self.options, patience=0, begun=None)
        descended = get("local-search").solve(problem, options, row).row
        for each in [row] if descended is None else [row, descended]:
            value = objective(problem, each)
            if value < self.value * (1 - CLOSE):
                self.row, self.value = each, value
                self.history.append(incumbent(value, self.bound_us))

    def _around(self) -> IntArray:
        """Columns of the placement, and those one swap away."""
        space, found = self.space, [space_ids := self.space.ids(self.row)]
        for k, members in zip(space.kind(space_ids), space.members(space_ids), strict=True):
            size = int(space.size_K[k])
            held_E = np.isin(np.arange(space.problem.num_experts), members[:size])
            found.append(space.first_K[k] + np.flatnonzero(held_E[space.sets[size]].sum(axis=1) == size - 1))
        return np.concatenate(found)

"""The true objective in CP-SAT: variables, constraints, objective, and a complete hint.

CP-SAT knows whole numbers only. Time is counted in ticks, and everything that pushes the makespan up is rounded
down, so that a bound in ticks times the tick is a bound in microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from ortools.sat.python import cp_model

from gemopt.solvers.exact.compact import Compact, IntArray
from gemopt.solvers.exact.runs import Line, Run, Term, hull

SAFETY = 1e-13  # relative: above what float64 can lose before a number is rounded down


def down(value: float) -> int:
    """Largest whole number that is surely not above."""
    return int(np.floor(value - SAFETY * abs(value)))


def total(variables: Sequence[cp_model.IntVar], coefficients: IntArray) -> cp_model.LinearExprT:
    """Weighted sum without its zeros."""
    used = np.flatnonzero(coefficients).tolist()
    return cp_model.LinearExpr.weighted_sum([variables[i] for i in used], coefficients[used].tolist())


class Formulation:
    """Variables, constraints and objective of one layer.

    Parameters
    ----------
    compact
        What to state.
    tick_us
        Integer resolution in microseconds (of weighted time).
    hint_QG
        A canonical placement: `Compact.canonical(Compact.held(row))`. It becomes a value of every variable.
    expired
        Asked while constraints are added.

    Raises
    ------
    TimeoutError
        When `expired` says so.
    """

    def __init__(
        self,
        compact: Compact,
        tick_us: float,
        hint_QG: NDArray[np.bool_],
        expired: Callable[[], bool] = lambda: False,
    ) -> None:
        self.compact = compact
        self.hint_QG = hint_QG
        self.expired = expired
        self.model = cp_model.CpModel()
        self.scale_T = compact.weights_T / tick_us
        self._hint_loads_FTG = compact.features_FTQ @ hint_QG
        self._loads: dict[tuple[int, int, int], cp_model.IntVar] = {}
        self._choices: dict[tuple[object, ...], list[cp_model.IntVar]] = {}
        self.add_variables()
        self.add_constraints()
        self.add_objective()
        self.add_order()

    @property
    def curved(self) -> bool:
        """Whether a latency has non-convex breaks, so that literals choose among its runs."""
        return bool(self._choices)

    def add_variables(self) -> None:
        """Columns held by ranks, and the makespan of each step in ticks."""
        shape = self.hint_QG.shape
        self.held = [[self._new(0, 1, int(self.hint_QG[q, g])) for g in range(shape[1])] for q in range(shape[0])]
        self.held_by = list(zip(*self.held, strict=True))
        self.floor_ticks = [down(f * s) for f, s in zip(self.compact.floor_T, self.scale_T, strict=True)]
        self.makespan = [self.model.new_int_var(floor, cp_model.INT32_MAX << 16, "") for floor in self.floor_ticks]
        self.makespan_hint = list(self.floor_ticks)

    def add_constraints(self) -> None:
        """All that a placement must satisfy, and what the makespan has to wait for."""
        self._every_expert_is_held()
        self._slots_are_not_exceeded()
        if self.compact.with_copies:
            self._copies_are_complete()
            self._copies_are_on_different_ranks()
            self._copies_are_in_slot_order()
        self._equal_ranks_are_ordered()
        self._makespan_waits_for_every_rank()

    def add_objective(self) -> None:
        """Weighted time of all steps, and the hint's values of the makespans."""
        for variable, value in zip(self.makespan, self.makespan_hint, strict=True):
            self.model.add_hint(variable, value)
        self.model.minimize(sum(self.makespan))

    def add_order(self) -> None:
        """What a fixed search decides first: heaviest expert first, the ranks of each."""
        columns = [q for expert in self.compact.order_E for q in self._columns(expert)]
        variables = [variable for q in columns for variable in self.held[q]]
        self.model.add_decision_strategy(variables, cp_model.CHOOSE_FIRST, cp_model.SELECT_MAX_VALUE)

    def _new(self, low: int, high: int, hint: int) -> cp_model.IntVar:
        variable = self.model.new_int_var(low, high, "")
        self.model.add_hint(variable, hint)
        return variable

    def _columns(self, expert: int) -> IntArray:
        return np.flatnonzero(self.compact.expert_Q == expert)

    def _every_expert_is_held(self) -> None:
        """First copies: every expert has exactly one, in one of the numbers of copies it may have."""
        for expert in range(self.compact.num_experts):
            first = [q for q in self._columns(expert) if self.compact.index_Q[q] == 0]
            self.model.add_exactly_one(variable for q in first for variable in self.held[q])

    def _slots_are_not_exceeded(self) -> None:
        """A rank holds as many experts as it has slots; at most as many when there are spare slots."""
        for held, slots in zip(self.held_by, self.compact.slots_G.tolist(), strict=True):
            self.model.add(sum(held) == slots if self.compact.all_slots_used else sum(held) <= slots)

    def _copies_are_complete(self) -> None:
        """Copy i > 0 of r is held exactly when copy 0 of r is."""
        for q in np.flatnonzero(self.compact.index_Q > 0):
            self.model.add(sum(self.held[q]) == sum(self.held[q - self.compact.index_Q[q]]))

    def _copies_are_on_different_ranks(self) -> None:
        """A rank holds at most one copy of an expert."""
        for expert in range(self.compact.num_experts):
            for held in self.held_by:
                self.model.add_at_most_one(held[q] for q in self._columns(expert))

    def _copies_are_in_slot_order(self) -> None:
        """Copy i of r sits on an earlier rank than copy i + 1: the even split counts copies in slot order."""
        for q in np.flatnonzero(self.compact.index_Q > 0):
            for g in range(self.compact.num_ranks):
                self.model.add(sum(self.held[q][: g + 1]) <= sum(self.held[q - 1][:g]))

    def _equal_ranks_are_ordered(self) -> None:
        """An expert is on a rank only if one that comes before it is on the equal rank before."""
        for earlier, later in self.compact.ordered_pairs:
            before: list[cp_model.IntVar] = []
            for expert in self.compact.order_E:
                self.model.add_bool_or([*before, ~self.held[expert][later]])
                before.append(self.held[expert][earlier])

    def _makespan_waits_for_every_rank(self) -> None:
        """A step ends no earlier than each term of each rank's latency."""
        for t in range(self.compact.num_steps):
            if self.expired():
                raise TimeoutError("no time left to state the formulation")
            for g in range(self.compact.num_ranks):
                for term in self.compact.terms(t, g):
                    self._wait(t, g, term)

    def _wait(self, t: int, g: int, term: Term) -> None:
        """Makespan >= constant + straight parts + curved parts, each rounded down."""
        constant = down(term.constant * self.scale_T[t])
        per_column = self.scale_T[t] * (term.slopes_F @ self.compact.features_FTQ[:, t])
        coefficients_Q = np.floor(per_column - SAFETY * np.abs(per_column)).astype(np.int64)
        parts = [self._curved(t, g, f, runs) for f, runs in term.curved]
        straight = total(self.held_by[g], coefficients_Q)
        self.model.add(self.makespan[t] >= cp_model.LinearExpr.sum([straight, *(part for part, _ in parts), constant]))
        value = int(coefficients_Q @ self.hint_QG[:, g]) + constant + sum(hint for _, hint in parts)
        self.makespan_hint[t] = max(self.makespan_hint[t], value)

    def _curved(self, t: int, g: int, f: int, runs: tuple[Run, ...]) -> tuple[cp_model.IntVar, int]:
        """A variable at least the curve's value, rounded down, and its hint."""
        load, load_hint = self._load(t, g, f)
        low, high = runs[0].low, runs[-1].high
        everywhere = hull(runs) if len(runs) > 1 else runs[0].lines
        lines = [TickLine.below(line, low, high, self.scale_T[t]) for line in everywhere]
        enforced: list[tuple[TickLine, cp_model.IntVar]] = []
        active = [lines]
        if len(runs) > 1:
            for run, chosen in zip(runs, self._choice(t, g, f, runs), strict=True):
                own = [TickLine.below(line, run.low, run.high, self.scale_T[t]) for line in run.lines]
                enforced += [(line, chosen) for line in own]
                if run.low <= load_hint <= run.high:
                    active.append(own)
        hint = max(line.value(load_hint) for some in active for line in some)
        ends = [run.value(x) for run in runs for x in (run.low, run.high)]
        smallest = min(line.value(x) for line in lines for x in (low, high))
        value = self._new(smallest, max(hint, down(max(ends) * self.scale_T[t]) + 1), hint)
        for line in lines:
            self.model.add(line.divisor * value >= line.slope * load + line.intercept)
        for line, chosen in enforced:
            self.model.add(line.divisor * value >= line.slope * load + line.intercept).only_enforce_if(chosen)
        return value, hint

    def _load(self, t: int, g: int, f: int) -> tuple[cp_model.IntVar, int]:
        """Load of a rank at a step: the sum of its columns."""
        hint = int(self._hint_loads_FTG[f, t, g])
        if (t, g, f) not in self._loads:
            low_FTG, high_FTG = self.compact.load_range
            load = self._new(int(low_FTG[f, t, g]), int(high_FTG[f, t, g]), hint)
            self.model.add(total(self.held_by[g], self.compact.features_FTQ[f, t]) == load)
            self._loads[t, g, f] = load
        return self._loads[t, g, f], hint

    def _choice(self, t: int, g: int, f: int, runs: tuple[Run, ...]) -> list[cp_model.IntVar]:
        """Literals of the runs, one of which holds the load; shared by all terms that cut the loads alike."""
        key = (t, g, f, *((run.low, run.high) for run in runs))
        if key not in self._choices:
            load, hint = self._load(t, g, f)
            literals = [self._new(0, 1, int(run.low <= hint <= run.high)) for run in runs]
            self.model.add_exactly_one(literals)
            for run, literal in zip(runs, literals, strict=True):
                self.model.add_linear_constraint(load, run.low, run.high).only_enforce_if(literal)
            self._choices[key] = literals
        return self._choices[key]


@dataclass(frozen=True)
class TickLine:
    """`divisor * value >= slope * load + intercept` in whole numbers; the value it forces is nowhere above the line."""

    divisor: int
    slope: int
    intercept: int

    @classmethod
    def below(cls, line: Line, low: int, high: int, scale: float) -> TickLine:
        """Round a line down for loads from low to high; it loses less than 3 ticks.

        The division by a power of two keeps a slope's rounding from adding up over the loads; what makes it round up
        to whole ticks is taken off before.
        """
        load, value, slope = line
        divisor = 1 << max(0, high - low).bit_length()
        at_low, steepness = down((value + slope * (low - load)) * scale * divisor), down(slope * scale * divisor)
        return cls(divisor, steepness, at_low - steepness * low - (divisor - 1))

    def value(self, load: int) -> int:
        """Smallest whole value at a load."""
        return -((-self.slope * load - self.intercept) // self.divisor)

"""The formulation in CP-SAT.

CP-SAT knows whole numbers only. Time is counted in ticks, and everything that pushes the makespan up is rounded
down, so that a bound in ticks times the tick is a bound in microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ortools.sat.python import cp_model

from gemopt.solvers.exact.formulation import SAFETY, Formulation, Terms
from gemopt.solvers.exact.joint_formulation import JointFormulation
from gemopt.solvers.exact.runs import STEEPEST, Point, Run, hull


def down(value: float) -> int:
    """Largest whole number that is surely not above."""
    return int(np.floor(value - SAFETY * abs(value)))


class CpSatFormulation(Formulation):
    """Variables, constraints and objective in ticks; `unit_us` is the tick."""

    def begin(self) -> None:
        """See `Formulation`."""
        self.model = cp_model.CpModel()

    def add_variables(self) -> None:
        """See `Formulation`."""
        self._loads: dict[tuple[int, int, int], Any] = {}
        self._choices: dict[tuple[object, ...], list[Any]] = {}
        super().add_variables()

    def new(self, low: int, high: int, start: int, *, whole: bool = True) -> Any:
        """A whole variable with a hint; what is not whole gets its hint in the end."""
        variable = self.model.new_int_var(low, high, "")
        if whole:
            self.model.add_hint(variable, start)
        return variable

    def row(self, terms: Terms, low: int | None = None, high: int | None = None) -> None:
        """See `Formulation`."""
        self.model.add_linear_constraint(
            _sum(terms), cp_model.INT_MIN if low is None else low, cp_model.INT_MAX if high is None else high
        )

    def round_down(self, units: NDArray[np.float64]) -> NDArray[np.int64]:
        """Whole ticks."""
        return np.asarray(np.floor(units - SAFETY * np.abs(units)).astype(np.int64))

    def one_of(self, variables: Any) -> None:
        """See `Formulation`."""
        self.model.add_exactly_one(variables)

    def at_most_one_of(self, variables: Any) -> None:
        """See `Formulation`."""
        self.model.add_at_most_one(variables)

    def implies_any(self, literal: Any, others: Any) -> None:
        """See `Formulation`."""
        self.model.add_bool_or([*others, ~literal])

    @property
    def curved(self) -> bool:
        """Whether a latency has non-convex breaks, so that literals choose among its runs."""
        return bool(self._choices)

    def add_objective(self) -> None:
        """Time and price, no more than the incumbent has, and what a fixed search decides first."""
        for variable, start in zip(self.excess, self.excess_start, strict=True):
            self.model.add_hint(variable, start)
        minimised = _sum(self.minimised)
        self.model.add(minimised <= self.open_units)
        self.model.minimize(minimised)
        self.model.add_decision_strategy(self.in_order(), cp_model.CHOOSE_FIRST, cp_model.SELECT_MAX_VALUE)

    def in_order(self) -> list[Any]:
        """Who holds what, heaviest expert first."""
        return [variable for e in self.compact.order_E for q in self.columns(e) for variable in self.held[q]]

    def curve(self, t: int, g: int, f: int, runs: tuple[Run, ...]) -> tuple[Terms, int]:
        """A variable at least the curve's value, rounded down: lines, enforced where a literal chooses their run."""
        load, start_load = self._load(t, g, f)
        scale = float(self.scale_T[t])
        lines = [(line, None) for line in tick_lines(hull(runs), scale)] if len(runs) > 1 else []
        active = [line for line, _ in lines]
        for run, chosen in zip(runs, self._choice(t, g, f, runs), strict=True):
            own = tick_lines(list(run.points), scale)
            lines += [(line, chosen) for line in own]
            if run.low <= start_load <= run.high:
                active += own
        start = max([0, *(line.value(start_load) for line in active)])
        top = down(max(y for run in runs for _, y in run.points) * scale) + 1
        value = self.new(0, max(top, start), start)
        for line, chosen in lines:
            row = self.model.add(line.divisor * value >= line.slope * load + line.intercept)
            if chosen is not None:
                row.only_enforce_if(chosen)
        return [(value, 1)], start

    def _load(self, t: int, g: int, f: int) -> tuple[Any, int]:
        """Load of a rank at a step: the sum of its columns."""
        start = int(self.start_loads_FTG[f, t, g])
        if (t, g, f) not in self._loads:
            low_FTG, high_FTG = self.compact.load_range
            load = self.new(int(low_FTG[f, t, g]), int(high_FTG[f, t, g]), start)
            self.row([*self.load_terms(t, g, f), (load, -1)], 0, 0)
            self._loads[t, g, f] = load
        return self._loads[t, g, f], start

    def _choice(self, t: int, g: int, f: int, runs: tuple[Run, ...]) -> list[Any]:
        """A literal per run, one of which holds the load; shared by all terms that cut the loads alike."""
        load, start = self._load(t, g, f)
        if len(runs) == 1:
            self.row([(load, 1)], runs[0].low, runs[0].high)
            return [None]
        key = (t, g, f, *((run.low, run.high) for run in runs))
        if key not in self._choices:
            literals = [self.new(0, 1, int(run.low <= start <= run.high)) for run in runs]
            self.one_of(literals)
            for run, literal in zip(runs, literals, strict=True):
                self.model.add_linear_constraint(load, run.low, run.high).only_enforce_if(literal)
            self._choices[key] = literals
        return self._choices[key]


class CpSatJoint(JointFormulation, CpSatFormulation):
    """All layers with their links."""

    curved = False  # what is linear in the links needs the relaxation, whatever the latencies are

    def in_order(self) -> list[Any]:
        """Layer after layer."""
        return [
            variable
            for part in self.parts
            for expert in part.compact.order_E
            for q in part.columns(expert)
            for variable in part.held[q]
        ]


def _sum(terms: Terms) -> Any:
    return cp_model.LinearExpr.weighted_sum([variable for variable, _ in terms], [number for _, number in terms])


def tick_lines(points: list[Point], scale: float) -> list[TickLine]:
    """Lines through neighbouring corners of a convex curve, in ticks.

    Without those that are nowhere above 0, and those that would have to be drawn on too far: of a hull, which only
    helps, a line may be missing, and runs have none of these.
    """
    low, high = points[0][0], points[-1][0]
    ends = list(pairwise(points)) or [(points[0], points[0])]
    height = max(y for _, y in points)
    near = [(a, b) for a, b in ends if abs(b[1] - a[1]) * (high - low) <= STEEPEST * height * max(1, b[0] - a[0])]
    lines = [TickLine.below(first, last, low, high, scale) for first, last in near]
    return [line for line in lines if max(line.value(low), line.value(high)) > 0]


@dataclass(frozen=True)
class TickLine:
    """`divisor * value >= slope * load + intercept` in whole numbers; the value it forces is nowhere above the line."""

    divisor: int
    slope: int
    intercept: int

    @classmethod
    def below(cls, first: Point, last: Point, low: int, high: int, scale: float) -> TickLine:
        """Round the line through two points down for loads from low to high; it loses less than 3 ticks.

        The division by a power of two keeps a slope's rounding from adding up over the loads; what makes it round up
        to whole ticks is taken off before.
        """
        (x0, y0), (x1, y1) = first, last
        slope = (y1 - y0) / (x1 - x0) if x1 > x0 else 0.0
        divisor = 1 << max(0, high - low).bit_length() if slope else 1
        at_low, steepness = down((y0 + slope * (low - x0)) * scale * divisor), down(slope * scale * divisor)
        return cls(divisor, steepness, at_low - steepness * low - (divisor - 1))

    def value(self, load: int) -> int:
        """Smallest whole value at a load."""
        return -((-self.slope * load - self.intercept) // self.divisor)

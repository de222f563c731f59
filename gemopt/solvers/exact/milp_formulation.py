"""The formulation as a mixed-integer linear program in PuLP.

Only the child process imports this: PuLP loads highspy, which cannot share a process with OR-Tools. Floating-point
solvers allow every row and every literal a small error, so that no row may turn a small error into a large one: a
curve is the sum of how far each of its straight parts is filled, whose coefficients are what the part adds, instead of
lines that start far from where they are used and cancel each other.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import pulp
from numpy.typing import NDArray

from gemopt.solvers.exact.formulation import Formulation, Terms, loads_of
from gemopt.solvers.exact.joint_formulation import JointFormulation
from gemopt.solvers.exact.runs import Run

GRID = 1e-6
"""Times are stated in whole steps of so many units, of which a thousand are what is open."""
Choice = list[tuple[Any, list[Any]]]
"""For each run its literal (None when it is the only one) and how far its straight parts are filled."""


class MilpFormulation(Formulation):
    """Variables, constraints and objective of one layer in `problem`."""

    def begin(self) -> None:
        """See `Formulation`."""
        self.problem = pulp.LpProblem("placement", pulp.LpMinimize)
        self._numbers = count(1)

    def add_variables(self) -> None:
        """See `Formulation`."""
        self._choices: dict[tuple[object, ...], Choice] = {}
        super().add_variables()

    def new(self, low: float, high: float, start: float, *, whole: bool = True) -> Any:
        """See `Formulation`."""
        variable = pulp.LpVariable(f"v{next(self._numbers)}", low, high, pulp.LpInteger if whole else pulp.LpContinuous)
        variable.setInitialValue(start, check=False)
        return variable

    def row(self, terms: Terms, low: float | None = None, high: float | None = None) -> None:
        """Given by its coefficients: sums of expressions would copy them again and again."""
        sense = pulp.LpConstraintEQ if low == high else pulp.LpConstraintLE if low is None else pulp.LpConstraintGE
        right = high if low is None else low
        self.problem += pulp.LpConstraint(pulp.LpAffineExpression(terms), sense=sense, rhs=right)

    def round_down(self, units: NDArray[np.float64]) -> NDArray[np.float64]:
        """Whole steps of `GRID`: what is far below what is open only confuses a solver's tolerances (CBC calls such
        problems infeasible, and then whatever it started from optimal)."""
        return np.asarray(np.floor(units / GRID) * GRID)

    def add_objective(self) -> None:
        """Time and price."""
        for variable, start in zip(self.excess, self.excess_start, strict=True):
            variable.setInitialValue(start, check=False)
        self.problem.setObjective(pulp.LpAffineExpression(self.minimised))

    def curve(self, t: int, g: int, f: int, runs: tuple[Run, ...]) -> tuple[Terms, float]:
        """The chosen run's value where it begins, and what each straight part adds in so far as it is filled."""
        load, scale = int(self.start_loads_FTG[f, t, g]), float(self.scale_T[t])
        terms: Terms = []
        for run, (chosen, fills) in zip(runs, self._choice(t, g, f, runs), strict=True):
            units = self.round_down(scale * np.array([run.points[0][1], *(rise for _, rise in run.parts)]))
            terms += list(zip([chosen, *fills], units.tolist(), strict=True))
        start = next(run for run in runs if run.low <= load <= run.high).value(load) * scale
        return [(variable, number) for variable, number in terms if number], start

    def _choice(self, t: int, g: int, f: int, runs: tuple[Run, ...]) -> Choice:
        """Literals and fills, which add up to the load; shared by all terms that cut the loads alike."""
        key = (t, g, f, loads_of(runs))
        if key in self._choices:
            return self._choices[key]
        load, most = int(self.start_loads_FTG[f, t, g]), max(1, runs[-1].high)
        choice: Choice = []
        terms = [(v, -n / most) for v, n in self.load_terms(t, g, f)]
        for run in runs:
            inside = run.low <= load <= run.high
            chosen = self.new(0, 1, int(inside)) if len(runs) > 1 else self.new(1, 1, 1)
            fills, left = [], load - run.low
            for length, _ in run.parts:
                fill = self.new(0, 1, min(max(left / length, 0.0), 1.0) if inside else 0.0, whole=False)
                if len(runs) > 1:
                    self.row([(fill, 1), (chosen, -1)], None, 0)
                fills.append(fill)
                left -= length
            terms += [(chosen, run.low / most)] * bool(run.low)
            terms += [(fill, length / most) for fill, (length, _) in zip(fills, run.parts, strict=True)]
            choice.append((chosen, fills))
        if len(runs) > 1:
            self.one_of([chosen for chosen, _ in choice])
        self.row(terms, 0, 0)
        self._choices[key] = choice
        return choice


class MilpJoint(JointFormulation, MilpFormulation):
    """All layers with their links."""

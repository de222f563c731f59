"""The true objective as a mixed-integer linear program in PuLP: variables, constraints, objective.

Only the child process imports this: PuLP loads highspy, which cannot share a process with OR-Tools. Loads are
fractions of their largest value and times are thousandths of a mean makespan, so that absolute tolerances of the
solvers are relative ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pulp
from numpy.typing import NDArray

from gemopt.solvers.exact.compact import Compact, IntArray
from gemopt.solvers.exact.runs import Run, Term


class Formulation:
    """Variables, constraints and objective of one layer.

    Parameters
    ----------
    compact
        What to state.
    unit_us
        Microseconds per unit of time.
    start_QG
        A canonical placement, which becomes the initial value of every variable.
    """

    def __init__(self, compact: Compact, unit_us: float, start_QG: NDArray[np.bool_]) -> None:
        self.compact = compact
        self.unit_us = unit_us
        self.start_QG = start_QG
        self.problem = pulp.LpProblem("placement", pulp.LpMinimize)
        self._number = 0
        self._start_loads_FTG = compact.features_FTQ @ start_QG
        self._choices: dict[tuple[object, ...], list[tuple[pulp.LpVariable, pulp.LpVariable]]] = {}
        self.add_variables()
        self.add_constraints()
        self.add_objective()

    def add_variables(self) -> None:
        """Columns held by ranks, and the makespan of each step."""
        num_columns, num_ranks = self.start_QG.shape
        self.held = [
            [self._new(0, 1, float(self.start_QG[q, g]), pulp.LpInteger) for g in range(num_ranks)]
            for q in range(num_columns)
        ]
        self.held_by = list(zip(*self.held, strict=True))
        floors = (self.compact.floor_T / self.unit_us).tolist()
        self.makespan = [self._new(floor, None, floor) for floor in floors]

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
        """Weighted time of all steps, by their mean weight."""
        weights = self.compact.weights_T / self.weight
        self.problem.setObjective(pulp.LpAffineExpression(list(zip(self.makespan, weights.tolist(), strict=True))))

    @property
    def weight(self) -> float:
        """Mean weight of a step: the objective times this and the unit is microseconds."""
        return float(self.compact.weights_T.mean()) or 1.0

    def _new(
        self, low: float | None, high: float | None, start: float, category: str = pulp.LpContinuous
    ) -> pulp.LpVariable:
        self._number += 1
        variable = pulp.LpVariable(f"v{self._number}", low, high, category)
        variable.setInitialValue(start, check=False)
        return variable

    def _add(self, terms: Sequence[tuple[pulp.LpVariable, float]], sense: int, right: float) -> None:
        """One row, given by its coefficients: sums of expressions would copy them again and again."""
        self.problem += pulp.LpConstraint(pulp.LpAffineExpression(list(terms)), sense=sense, rhs=right)

    def _columns(self, expert: int) -> IntArray:
        return np.flatnonzero(self.compact.expert_Q == expert)

    def _every_expert_is_held(self) -> None:
        """First copies: every expert has exactly one, in one of the numbers of copies it may have."""
        for expert in range(self.compact.num_experts):
            first = [q for q in self._columns(expert) if self.compact.index_Q[q] == 0]
            self._add([(variable, 1) for q in first for variable in self.held[q]], pulp.LpConstraintEQ, 1)

    def _slots_are_not_exceeded(self) -> None:
        """A rank holds as many experts as it has slots; at most as many when there are spare slots."""
        sense = pulp.LpConstraintEQ if self.compact.all_slots_used else pulp.LpConstraintLE
        for held, slots in zip(self.held_by, self.compact.slots_G.tolist(), strict=True):
            self._add([(variable, 1) for variable in held], sense, slots)

    def _copies_are_complete(self) -> None:
        """Copy i > 0 of r is held exactly when copy 0 of r is."""
        for q in np.flatnonzero(self.compact.index_Q > 0):
            first = self.held[q - self.compact.index_Q[q]]
            self._add([(v, 1) for v in self.held[q]] + [(v, -1) for v in first], pulp.LpConstraintEQ, 0)

    def _copies_are_on_different_ranks(self) -> None:
        """A rank holds at most one copy of an expert."""
        for expert in range(self.compact.num_experts):
            for held in self.held_by:
                self._add([(held[q], 1) for q in self._columns(expert)], pulp.LpConstraintLE, 1)

    def _copies_are_in_slot_order(self) -> None:
        """Copy i of r sits on an earlier rank than copy i + 1: the even split counts copies in slot order."""
        for q in np.flatnonzero(self.compact.index_Q > 0):
            for g in range(self.compact.num_ranks):
                later, earlier = self.held[q][: g + 1], self.held[q - 1][:g]
                self._add([(v, 1) for v in later] + [(v, -1) for v in earlier], pulp.LpConstraintLE, 0)

    def _equal_ranks_are_ordered(self) -> None:
        """An expert is on a rank only if one that comes before it is on the equal rank before."""
        for earlier, later in self.compact.ordered_pairs:
            before: list[tuple[pulp.LpVariable, float]] = []
            for expert in self.compact.order_E:
                self._add([(self.held[expert][later], 1), *before], pulp.LpConstraintLE, 0)
                before.append((self.held[expert][earlier], -1))

    def _makespan_waits_for_every_rank(self) -> None:
        """A step ends no earlier than each term of each rank's latency."""
        for t in range(self.compact.num_steps):
            for g in range(self.compact.num_ranks):
                for term in self.compact.terms(t, g):
                    self._wait(t, g, term)

    def _wait(self, t: int, g: int, term: Term) -> None:
        """Makespan >= constant + straight parts + curved parts."""
        per_column = (term.slopes_F @ self.compact.features_FTQ[:, t] / self.unit_us).tolist()
        straight = [(v, -c) for v, c in zip(self.held_by[g], per_column, strict=True) if c]
        curved = [self._curved(t, g, f, runs) for f, runs in term.curved]
        constant = term.constant / self.unit_us
        self._add([(self.makespan[t], 1), *straight, *((v, -1) for v in curved)], pulp.LpConstraintGE, constant)
        start = constant + float(np.dot(per_column, self.start_QG[:, g])) + sum(v.varValue for v in curved)
        self.makespan[t].setInitialValue(max(self.makespan[t].varValue, start), check=False)

    def _curved(self, t: int, g: int, f: int, runs: tuple[Run, ...]) -> pulp.LpVariable:
        """A variable at least the curve's value: the sharp disaggregated form, exact on whole loads."""
        load = int(self._start_loads_FTG[f, t, g])
        start = next(run for run in runs if load <= run.high).value(load) / self.unit_us
        value = self._new(None, None, start)
        choice = self._choice(t, g, f, runs)
        scale = max(1, runs[-1].high)
        parts = [value] if len(runs) == 1 else []
        for run, (chosen, part) in zip(runs, choice, strict=True):
            if len(runs) > 1:
                parts.append(self._new(None, None, start if run.low <= load <= run.high else 0.0))
            for x, y, slope in run.lines:
                at_zero = (y - slope * x) / self.unit_us
                row = [(parts[-1], 1.0), (part, -slope * scale / self.unit_us), (chosen, -at_zero)]
                self._add(row, pulp.LpConstraintGE, 0)
        if len(runs) > 1:
            self._add([(value, 1), *((part, -1) for part in parts)], pulp.LpConstraintGE, 0)
        return value

    def _choice(self, t: int, g: int, f: int, runs: tuple[Run, ...]) -> list[tuple[pulp.LpVariable, pulp.LpVariable]]:
        """For each run whether it holds the load, and the load if so; shared by all terms that cut loads alike."""
        key = (t, g, f, *((run.low, run.high) for run in runs))
        if key not in self._choices:
            load, scale = int(self._start_loads_FTG[f, t, g]), max(1, runs[-1].high)
            pairs = []
            for run in runs:
                inside = run.low <= load <= run.high
                chosen = self._new(0, 1, float(inside), pulp.LpInteger)
                part = self._new(0, run.high / scale, load / scale if inside else 0.0)
                self._add([(part, 1), (chosen, -run.high / scale)], pulp.LpConstraintLE, 0)
                self._add([(part, 1), (chosen, -run.low / scale)], pulp.LpConstraintGE, 0)
                pairs.append((chosen, part))
            self._add([(chosen, 1) for chosen, _ in pairs], pulp.LpConstraintEQ, 1)
            columns = (self.compact.features_FTQ[f, t] / scale).tolist()
            sums = [(v, -c) for v, c in zip(self.held_by[g], columns, strict=True) if c]
            self._add([*((part, 1) for _, part in pairs), *sums], pulp.LpConstraintEQ, 0)
            self._choices[key] = pairs
        return self._choices[key]

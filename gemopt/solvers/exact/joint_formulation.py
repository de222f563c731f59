"""Makespans and links of all layers in one model, as a mixin over the formulation of one layer in any solver.

Each layer is stated as without links. A destination is visited by a set of experts where it holds one of them; a port
that is used takes each of its lines at least; dispatch and combine take as long as their slowest port. Everything that
pushes the objective up is rounded down; of measured points it is their convex hull that is stated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.solvers.exact.formulation import Formulation, Terms
from gemopt.solvers.exact.joint import JointCompact, Sending

Known = tuple[Any, int]
"""A variable and its start value."""


class JointFormulation(Formulation):
    """As `Formulation`, of a `JointCompact`; `held` are the variables of all layers one after the other."""

    def __init__(
        self,
        compact: JointCompact,
        unit_us: float,
        start_QG: NDArray[np.bool_],
        expired: Callable[[], bool] = lambda: False,
    ) -> None:
        self.unit_us, self.expired = unit_us, expired
        self.begin()
        self.parts = [copy(self) for _ in compact.layers]
        for part, layer, held in zip(self.parts, compact.layers, compact.each(start_QG), strict=True):
            part.state(layer, held)
        self.joint, self.compact = compact, compact  # type: ignore[assignment]
        self.held = [ranks for part in self.parts for ranks in part.held]
        self.open_units = self.parts[0].open_units
        self.excess = [variable for part in self.parts for variable in part.excess]
        self.excess_start = [start for part in self.parts for start in part.excess_start]
        self._visits: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Known] = {}
        self._ways: dict[tuple[Any, ...], list[Known]] = {}
        exchange: dict[tuple[int, int], list[Known]] = defaultdict(list)  # by layer and step
        for sending in compact.sendings:
            for t in self.in_time(range(compact.num_steps)):
                exchange[sending.layer, t].append(self._send(sending, t))
        self._moves_are_limited_together()
        self.counted = self.excess
        if compact.overlap:
            self.counted = [self._longer(layer, t, times) for (layer, t), times in exchange.items()]
        self.add_objective()

    @property
    def minimised(self) -> Terms:
        """Excess and exchange of all steps and layers, or the longer of both, and the price of the moves."""
        prices = [(moved, part.price_units) for part in self.parts if part.price_units for moved in part.moved()]
        return [*((variable, 1) for variable in self.counted), *prices]

    def _moves_are_limited_together(self) -> None:
        """All layers receive no more experts than they share, in all and into each rank."""
        every = range(len(self.joint.most_into_G))
        for ranks, most in [(every, self.joint.most), *(([g], self.joint.most_into_G[g]) for g in every)]:
            moved = [variable for part in self.parts for variable in part.moved(ranks)]
            if len(moved) > most:
                self.row([(variable, 1) for variable in moved], None, int(most))

    def _later(self, high: Any, start: Any) -> Any:
        """A time, which begins at `start`."""
        variable = self.new(0, max(high, start), start, whole=False)
        self.excess.append(variable)
        self.excess_start.append(start)
        return variable

    def _down(self, us: float) -> Any:
        return self.round_down(np.array([us / self.unit_us])).tolist()[0]

    def _longer(self, layer: int, t: int, times: list[Known]) -> Any:
        """How far the longer of makespan and exchange lies above the makespan's floor."""
        part = self.parts[layer]
        below = self._down(-float(part.compact.floor_T[t]))
        start = max(part.excess_start[t], below + sum(start for _, start in times))
        variable = self._later(self.open_units, start)
        self.row([(variable, 1), (part.excess[t], -1)], 0, None)
        self.row([(variable, 1), *((time, -1) for time, _ in times)], below, None)
        return variable

    def _send(self, sending: Sending, t: int) -> Known:
        """The time of one exchange at one step: no less than any line of any port that carries anything."""
        carried: dict[int, list[tuple[Known, float]]] = defaultdict(list)
        for n in np.flatnonzero(sending.step_N == t).tolist():
            for cell, way in self._ways_of(sending, n):
                for k in range(int(sending.start[cell]), int(sending.start[cell + 1])):
                    size = float(sending.number_N[n] * sending.bytes[k])
                    carried[int(sending.port[k])].append((way, size))
        rows: list[tuple[Terms, Any]] = []
        start = 0
        for port, ways in carried.items():
            bytes_of: dict[int, list[Any]] = {}
            for way, size in ways:
                bytes_of.setdefault(id(way[0]), [way, 0.0])[1] += size
            used: Known | None = None
            for intercept, slope in sending.lines[sending.line_of == port].tolist():
                parts = [(way, self._down(slope * size)) for way, size in bytes_of.values()]
                if intercept > 0:
                    used = used or self._any([way for way, _ in bytes_of.values()])
                    parts.append((used, self._down(intercept)))
                constant = self._down(min(intercept, 0.0))
                rows.append(([(variable, -number) for (variable, _), number in parts if number], constant))
                start = max(start, constant + sum(number * begun for (_, begun), number in parts))
        floor = self._down(float(self.parts[sending.layer].compact.floor_T[t])) if self.joint.overlap else 0
        time = self._later(self.open_units + floor + 1, start)
        for terms, constant in rows:
            self.row([(time, 1), *terms], constant, None)
        return time, start

    def _ways_of(self, sending: Sending, n: int) -> list[tuple[int, Known]]:
        """(cell of `sending.start`, whether some token goes that way) of the tokens of one kind."""
        num_ranks, wide = sending.inside_DG.shape[1], len(sending.inside_DG)
        experts = tuple(int(e) for e in sending.sets_SK[sending.set_N[n]] if e >= 0)
        found = []
        for d in range(wide):
            inside = tuple(np.flatnonzero(sending.inside_DG[d]).tolist())
            if sending.sender_N[n] >= 0:
                cells = [int(sending.sender_N[n]) * wide + d]
                ways = [self._visit(sending.layer, experts, inside)] if _carries(sending, cells[0]) else []
            else:
                cells = [c * wide + d for c in range(num_ranks)]
                ways = self._way(sending, int(sending.follow_N[n]), experts, inside)
            found += [(cell, way) for cell, way in zip(cells, ways, strict=False) if _carries(sending, cell)]
        return found

    def _held(self, layer: int, expert: int, rank: int) -> list[Known]:
        """Columns, of which at most one is held anywhere, that take this turn of an expert, on a rank."""
        part, (owner, turn) = self.parts[layer], divmod(expert, self.joint.turns)
        compact = part.compact
        mine = [q for q in part.columns(owner) if turn % int(compact.copies_Q[q]) == compact.index_Q[q]]
        return [(part.held[q][rank], int(part.start_QG[q, rank])) for q in mine]

    def _visit(self, layer: int, experts: tuple[int, ...], ranks: tuple[int, ...]) -> Known:
        """Whether some of these ranks holds some of these experts."""
        key = (layer, experts, ranks)
        if key not in self._visits:
            held = [[known for g in ranks for known in self._held(layer, e, g)] for e in experts]
            if len(held) == len(held[0]) == 1:
                self._visits[key] = held[0][0]
            else:
                start = int(any(begun for places in held for _, begun in places))
                variable = self.new(0, 1, start)
                for places in held:
                    self.row([(variable, 1), *((place, -1) for place, _ in places)], 0, None)
                self._visits[key] = (variable, start)
        return self._visits[key]

    def _any(self, ways: list[Known]) -> Known:
        """Whether anything goes any of these ways."""
        start = max(begun for _, begun in ways)
        variable = self.new(0, 1, start)
        for way, _ in ways:
            self.row([(variable, 1), (way, -1)], 0, None)
        return variable, start

    def _way(self, sending: Sending, expert: int, experts: tuple[int, ...], ranks: tuple[int, ...]) -> list[Known]:
        """For each rank, whether the sender is there, where `expert` is, and the destination is visited."""
        key = (sending.follow_layer, expert, sending.layer, experts, ranks)
        if key not in self._ways:
            visit, visited = self._visit(sending.layer, experts, ranks)
            held = [self._held(sending.follow_layer, expert, g) for g in range(sending.inside_DG.shape[1])]
            begun = [visited * sum(start for _, start in some) for some in held]
            ways = [self.new(0, 1, start) for start in begun]
            self.row([*((way, 1) for way in ways), (visit, -1)], 0, 0)
            for way, some in zip(ways, held, strict=True):
                self.row([(way, 1), *((each, -1) for each, _ in some)], None, 0)
            self._ways[key] = list(zip(ways, begun, strict=True))
        return self._ways[key]


def _carries(sending: Sending, cell: int) -> bool:
    return bool(sending.start[cell + 1] > sending.start[cell])

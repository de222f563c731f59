"""The compact formulation, stated once for all solvers: variables, constraints, objective, and a complete start.

What is stated is how far the makespan of each step lies above its floor, and the price of the moves, in units that the
solver chooses, up to what is open between the floors and the incumbent. Solvers differ in how they round times and how
they state a curve.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.solvers.exact.compact import Compact
from gemopt.solvers.exact.runs import Run, Term

TOO_LATE = "no time left to state the formulation"

SAFETY = 1e-13
"""Relative: above what float64 can lose before a number is rounded down."""

Terms = list[tuple[Any, Any]]
"""Variables of the solver with their coefficients."""


class Formulation(ABC):
    """Variables, constraints and objective of one layer.

    Parameters
    ----------
    compact
        What to state.
    unit_us
        Microseconds (of weighted time) per unit of time.
    start_QG
        A canonical placement, `Compact.canonical(Compact.held(row))`, no worse than what the cutoffs were made from.
        It becomes a start value of every variable.
    expired
        Asked while variables and constraints are added.

    Raises
    ------
    TimeoutError
        When `expired` says so.
    """

    def __init__(
        self,
        compact: Compact,
        unit_us: float,
        start_QG: NDArray[np.bool_],
        expired: Callable[[], bool] = lambda: False,
    ) -> None:
        self.unit_us = unit_us
        self.expired = expired
        self.begin()
        self.state(compact, start_QG)
        self.add_objective()

    def state(self, compact: Compact, start_QG: NDArray[np.bool_]) -> None:
        """Variables and constraints of one layer."""
        self.compact = compact
        self.start_QG = start_QG
        self.scale_T = compact.weights_T / self.unit_us
        self.start_loads_FTG = compact.features_FTQ @ start_QG
        self.add_variables()
        self.add_constraints()

    @abstractmethod
    def begin(self) -> None:
        """An empty model."""

    @abstractmethod
    def new(self, low: Any, high: Any, start: Any, *, whole: bool = True) -> Any:
        """A variable from low to high, which begins at start."""

    @abstractmethod
    def row(self, terms: Terms, low: Any = None, high: Any = None) -> None:
        """Keep a weighted sum between low and high."""

    @abstractmethod
    def round_down(self, units: NDArray[np.float64]) -> NDArray[Any]:
        """Times as the solver states them, never above what is given."""

    @abstractmethod
    def curve(self, t: int, g: int, f: int, runs: tuple[Run, ...]) -> tuple[Terms, Any]:
        """Terms whose sum is at least the curve's value, while the load is in some run; and their start value."""

    @abstractmethod
    def add_objective(self) -> None:
        """Smallest sum of `excess`, which begins at `excess_start`, and of the price of the moves."""

    @property
    def minimised(self) -> Terms:
        """What is minimised: the excess of all steps, and the price of each column whose holding is a move."""
        excess: Terms = [(variable, 1) for variable in self.excess]
        return excess + [(variable, self.price_units) for variable in self.moved() if self.price_units]

    def one_of(self, variables: Sequence[Any]) -> None:
        """Exactly one literal holds."""
        self.row([(variable, 1) for variable in variables], 1, 1)

    def at_most_one_of(self, variables: Sequence[Any]) -> None:
        """No two literals hold."""
        self.row([(variable, 1) for variable in variables], None, 1)

    def implies_any(self, literal: Any, others: Sequence[Any]) -> None:
        """When the literal holds, so does one of the others."""
        self.row([(literal, 1), *((other, -1) for other in others)], None, 0)

    def add_variables(self) -> None:
        """Columns held by ranks, and by how many units the makespan of each step exceeds its floor."""
        columns = self.in_time(range(len(self.start_QG)))
        self.held = [[self.new(0, 1, int(held)) for held in self.start_QG[q]] for q in columns]
        self.held_by = list(zip(*self.held, strict=True))
        self.open_units = self.round_down(np.array([1.001 * self.compact.open_us / self.unit_us + 1.0])).tolist()[0]
        price = self.round_down(np.array([float(self.compact.price_us) / self.unit_us])).tolist()[0]
        self.price_units = min(price, self.open_units + 1)  # more than what is open keeps an expert at home as well
        self.excess = [self.new(0, self.open_units, 0, whole=False) for _ in range(self.compact.num_steps)]
        self.excess_start: list[Any] = [0] * self.compact.num_steps

    def add_constraints(self) -> None:
        """All that a placement must satisfy, and what the makespan has to wait for."""
        self._every_expert_is_held()
        self._slots_are_not_exceeded()
        if self.compact.with_copies:
            self._copies_are_complete()
            self._copies_are_on_different_ranks()
            self._copies_are_in_slot_order()
        self._rules_are_kept()
        self._equal_ranks_are_ordered()
        self._moves_are_limited()
        self._makespan_waits_for_every_rank()

    def in_time(self, parts: Iterable[int]) -> Iterator[int]:
        """The parts one by one, while there is time to state them."""
        for part in parts:
            if self.expired():
                raise TimeoutError(TOO_LATE)
            yield part

    def columns(self, expert: int) -> list[int]:
        """Columns of one expert."""
        return np.flatnonzero(self.compact.expert_Q == expert).tolist()

    def _every_expert_is_held(self) -> None:
        """First copies: every expert has exactly one, in one of the numbers of copies it may have."""
        for expert in range(self.compact.num_experts):
            first = [q for q in self.columns(expert) if self.compact.index_Q[q] == 0]
            self.one_of([variable for q in first for variable in self.held[q]])

    def _slots_are_not_exceeded(self) -> None:
        """A rank holds as many experts as it has slots; at most as many when there are spare slots."""
        for held, slots in zip(self.held_by, self.compact.slots_G.tolist(), strict=True):
            self.row([(v, 1) for v in held], slots if self.compact.all_slots_used else None, slots)

    def _copies_are_complete(self) -> None:
        """Copy i > 0 of r is held exactly when copy 0 of r is."""
        for q in self.in_time(np.flatnonzero(self.compact.index_Q > 0)):
            first = self.held[q - self.compact.index_Q[q]]
            self.row([*((v, 1) for v in self.held[q]), *((v, -1) for v in first)], 0, 0)

    def _copies_are_on_different_ranks(self) -> None:
        """A rank holds at most one copy of an expert."""
        for expert in self.in_time(range(self.compact.num_experts)):
            for held in self.held_by:
                self.at_most_one_of([held[q] for q in self.columns(expert)])

    def _copies_are_in_slot_order(self) -> None:
        """Copy i of r sits on an earlier rank than copy i + 1: the even split counts copies in slot order."""
        for q in self.in_time(np.flatnonzero(self.compact.index_Q > 0)):
            for g in range(self.compact.num_ranks):
                later, earlier = self.held[q][: g + 1], self.held[q - 1][:g]
                self.row([*((v, 1) for v in later), *((v, -1) for v in earlier)], None, 0)

    def _rules_are_kept(self) -> None:
        """No expert where it may not be, no two on a rank that are kept apart, every bloc on one unit."""
        compact = self.compact
        for q, expert in enumerate(compact.expert_Q):
            for g in np.flatnonzero(compact.closed_GE[:, expert]):
                self.row([(self.held[q][g], 1)], None, 0)
        for members_E in compact.apart_AE:
            for held in self.held_by:
                self.at_most_one_of([held[q] for q in np.flatnonzero(members_E[compact.expert_Q])])
        for members_E, unit_G in zip(compact.bloc_BE, compact.unit_BG, strict=True):
            columns = np.flatnonzero(members_E[compact.expert_Q])
            start = unit_G[self.start_QG[columns].any(axis=0)][0]
            chosen = [self.new(0, 1, int(unit == start)) for unit in range(int(unit_G.max()) + 1)]
            self.one_of(chosen)
            for column in columns.tolist():
                for held, unit in zip(self.held[column], unit_G.tolist(), strict=True):
                    self.implies_any(held, [chosen[unit]])

    def _equal_ranks_are_ordered(self) -> None:
        """An expert is on a rank only if one that comes before it is on the equal rank before."""
        pairs = self.compact.ordered_pairs
        for earlier, later in (pairs[n] for n in self.in_time(range(len(pairs)))):
            before: list[Any] = []
            for expert in self.compact.order_E:
                self.implies_any(self.held[expert][later], before)
                before.append(self.held[expert][earlier])

    def moved(self, ranks: Sequence[int] | None = None) -> list[Any]:
        """Literals of the columns whose holding by some of the ranks is a move."""
        chosen = range(self.compact.num_ranks) if ranks is None else ranks
        return [self.held[q][g] for g in chosen for q in np.flatnonzero(self.compact.moved_QG[:, g])]

    def _moves_are_limited(self) -> None:
        """Ranks receive no more experts that they do not hold at home than is allowed, in all and each."""
        if len(moved := self.moved()) > int(self.compact.most):
            self.row([(variable, 1) for variable in moved], None, int(self.compact.most))
        for g, most in enumerate(self.compact.most_into_G.tolist()):
            if len(moved := self.moved([g])) > most:
                self.row([(variable, 1) for variable in moved], None, most)

    def _makespan_waits_for_every_rank(self) -> None:
        """A step ends no earlier than each term of each rank's latency."""
        for t in self.in_time(range(self.compact.num_steps)):
            for g in range(self.compact.num_ranks):
                for term in self.compact.terms(t, g):
                    self._wait(t, g, term)

    def _wait(self, t: int, g: int, term: Term) -> None:
        """Excess >= constant + straight parts + curved parts, each rounded down."""
        floor = float(self.compact.floor_T[t])
        size = (
            abs(term.constant) + abs(floor) + sum(y for _, runs in term.curved for run in runs for _, y in run.points)
        )
        above = (term.constant - floor - SAFETY * size) * float(self.scale_T[t])
        constant = self.round_down(np.array([above])).tolist()[0]
        per_column = self.round_down(self.scale_T[t] * (term.slopes_F @ self.compact.features_FTQ[:, t]))
        if (per_column >= 0).all():  # more than twice what is left keeps a column off the rank as well
            per_column = np.minimum(per_column, 2 * max(self.open_units - constant, 1))
        parts = [self.curve(t, g, f, runs) for f, runs in term.curved]
        straight = [(v, -c) for v, c in zip(self.held_by[g], per_column.tolist(), strict=True) if c]
        curved = [(v, -c) for terms, _ in parts for v, c in terms]
        self.row([(self.excess[t], 1), *straight, *curved], constant, None)
        value = (per_column @ self.start_QG[:, g]).item() + constant + sum(start for _, start in parts)
        self.excess_start[t] = max(self.excess_start[t], value)

    def load_terms(self, t: int, g: int, f: int) -> Terms:
        """Load of a rank at a step: the sum of its columns."""
        return [(v, n) for v, n in zip(self.held_by[g], self.compact.features_FTQ[f, t].tolist(), strict=True) if n]


def loads_of(runs: tuple[Run, ...]) -> tuple[tuple[int, ...], ...]:
    """Corners of the runs: terms that cut the loads alike share their variables."""
    return tuple(tuple(load for load, _ in run.points) for run in runs)

"""A layer of a call: its problem and what is known of it so far, by the phases of `schedule`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from gemopt.bounds import CopiesProof, Together
from gemopt.evaluate import objective
from gemopt.latency import FloatArray
from gemopt.links import Links
from gemopt.placement import Split
from gemopt.problem import Problem
from gemopt.result import Incumbent
from gemopt.solvers.base import Outcome, Row, incumbent, known_total, within_limits
from gemopt.solvers.exact.column_space import Proven
from gemopt.solvers.nearest import fewest_row, no_placement
from gemopt.solvers.search.packing import filled
from gemopt.splits.rules import even_weights
from gemopt.splits.weights import remember_weights

ROUNDING = 1e-9
SEEDS = 1_000_003  # from one search of a layer to the next


class Standing(NamedTuple):
    """How a layer stands while it is being solved, in microseconds; no objective before it has a placement."""

    objective_us: float | None
    bound_us: float

    @property
    def open_us(self) -> float:
        """Microseconds between the two; infinite without a placement."""
        return np.inf if self.objective_us is None else max(0.0, self.objective_us - self.bound_us)


@dataclass
class Layer:
    """One layer's problem, warm start and what is known of it so far; seconds: spent on it in all phases.

    floor_T: [T] simple bounds of the steps in microseconds. spread_us: bound with any number of copies. together,
    contents, copies: the co-location bound, that of all contents with their latencies, and the copies bound, with their
    multipliers, which a certificate states. base_us: what contiguous placement takes. plain_row, plain_us: it too, with
    copies in the slots left where all must be full.
    """

    problem: Problem
    warm: Row | None
    seed: int
    outcome: Outcome | None = None
    bound_us: float = 0.0
    bounded_steps: int = -1
    floor_T: FloatArray | None = None
    spread_us: float = 0.0
    base_us: float = 0.0
    plain_row: Row | None = None
    plain_us: float = 0.0
    seconds: float = 0.0
    together: Together | None = None
    contents: Proven | None = None
    copies: CopiesProof | None = None

    @property
    def bound_cut(self) -> bool:
        """Whether some steps have no more than what is known without work."""
        return self.bounded_steps < self.problem.num_steps

    @property
    def standing(self) -> Standing:
        """What is known at present; safe to ask while the layer is being worked on."""
        outcome = self.outcome
        if outcome is None:
            return Standing(None, self.bound_us)
        return Standing(value_of(outcome), max(self.bound_us, outcome.bound_us or 0.0))

    def compare_with(self, row: Row) -> None:
        """Score contiguous placement; where all slots must be full, answers are held against it with copies too."""
        problem = self.problem
        self.plain_row, self.base_us = row, objective(problem, row)
        self.plain_us = self.base_us
        if problem.full and problem.spare_slots and problem.rules is None:
            self.plain_row = filled(problem, row)
            weights_P = even_weights(self.plain_row, problem.num_experts) if problem.split is Split.STATIC else None
            self.plain_us = objective(problem, self.plain_row, weights_P)

    def filled(self, outcome: Outcome) -> Outcome:
        """An outcome with copies in empty slots, from solvers that leave some where none may be."""
        problem = self.problem
        if problem.full and outcome.row is not None:
            before, outcome.row = outcome.row, filled(problem, outcome.row)
            if problem.moves is not None and not within_limits(problem, outcome.row):
                outcome.row = fewest_row(problem)
                if outcome.row is None:
                    return no_placement(problem)
            if (outcome.row != before).any():  # weights and history are of rows that leave some empty
                outcome.weights_P = None
                outcome.history = [incumbent(known_total(problem, outcome.row))] if outcome.history else []
        return outcome

    def no_worse(self, outcome: Outcome) -> Outcome:
        """An outcome, or contiguous placement where that is better and free to take: as where no time is left."""
        value, free = value_of(outcome), self.warm is None and self.problem.moves is None and self.problem.rules is None
        if not free or value is None or not 0 < self.plain_us < value:
            return outcome
        note = outcome.note if outcome.reached else "no time to search: experts in order"
        history = [*outcome.history, incumbent(self.plain_us)]
        return replace(outcome, row=self.plain_row, weights_P=None, note=note, history=history)

    @property
    def open_us(self) -> float:
        """Microseconds between the objective and the bound; infinite without a placement."""
        value = None if self.outcome is None else value_of(self.outcome)
        return np.inf if value is None else max(0.0, value - self.bound_us)

    def prove(self, found: Together | Proven | None) -> None:
        """Take a bound over, where it is higher."""
        if isinstance(found, Together):
            self.together = max(self.together or found, found, key=lambda each: each.bound_us)
        elif found is not None:
            self.contents = max(self.contents or found, found, key=lambda each: each.bound_us)
        self.bound_us = max(self.bound_us, 0.0 if found is None else found.bound_us)

    def keep(self, first: Outcome) -> None:
        """What an earlier call of the solver proved, where it is more and no placement refutes it; it did run."""
        now = self.outcome
        assert now is not None
        now.reached, now.start_us = now.reached or first.reached, first.start_us
        value, known = value_of(now), -np.inf if first.bound_us is None else first.bound_us
        if value is not None and (now.bound_us or 0.0) < known <= value * (1 + ROUNDING):
            for name in ("bound_us", "own_bound_us", "columns", "searched_nodes", "note"):
                setattr(now, name, getattr(first, name))

    def again(self, number: int) -> Layer:
        """The same layer with the same answer, to be searched from another seed, and that alone."""
        assert self.outcome is not None
        begun = replace(self.outcome, history=[], search=None)
        return replace(
            self, warm=self.outcome.row, seed=self.seed + SEEDS * number, outcome=begun, seconds=0.0, floor_T=None
        )

    def take(self, other: Layer) -> None:
        """What another search of this layer found, where it is better."""
        assert self.outcome is not None and other.outcome is not None
        mine, theirs = value_of(self.outcome), value_of(other.outcome)
        self.seconds += other.seconds
        self.outcome.reached |= other.outcome.reached
        if theirs is not None and (mine is None or theirs < mine):
            self.outcome.row, self.outcome.search = other.outcome.row, None
            self.outcome.weights_P = other.outcome.weights_P
            self.outcome.history = [*self.outcome.history, *other.outcome.history]


@dataclass
class Coupling:
    """What links add to a run whose layers were solved one by one; bound_L, base_L: [L] microseconds of the links.

    bound_L: at least, whatever the placement. base_L: what they add under contiguous placement. compute_slack: as in
    `gemopt.solve`. alone: the rows that the layers had before they were coupled.
    """

    links: Links
    bound_L: FloatArray
    base_L: FloatArray
    compute_slack: float | None = None
    history: list[Incumbent] = field(default_factory=list)
    alone: list[Row] = field(default_factory=list)

    def bound(self, layer: int, compute_us: float) -> float:
        """Bound of a layer with its links from one without."""
        links_us = float(self.bound_L[layer])
        return max(compute_us, links_us) if self.links.exchange.overlap else compute_us + links_us


def value_of(outcome: Outcome) -> float | None:
    """Objective of an outcome's last incumbent, in microseconds."""
    return outcome.history[-1].objective_us if outcome.history else None


def on_this_clock(layer: Layer, now: float) -> Layer:
    """A layer from another machine, whose clock showed `now` a moment ago, with incumbents by the clock of this one.

    Static weights that were found there are known here.
    """
    later, outcome = time.monotonic() - now, layer.outcome
    if outcome is not None and outcome.row is not None and outcome.weights_P is not None:
        remember_weights(layer.problem, outcome.row, outcome.weights_P)
    if layer.outcome is not None:
        for found in {id(each): each for each in _histories(layer.outcome)}.values():
            found[:] = [point.model_copy(update={"seconds": point.seconds + later}) for point in found]
    return layer


def _histories(outcome: Outcome) -> list[list[Incumbent]]:
    return [outcome.history, getattr(outcome.search, "history", outcome.history)]


def history(layers: list[Layer], clock: float) -> list[Incumbent]:
    """Total objective over time, from when every layer has an incumbent."""
    events = sorted(
        (point.seconds, index, point.objective_us)
        for index, layer in enumerate(layers)
        if layer.outcome is not None
        for point in layer.outcome.history
    )
    best: dict[int, float] = {}
    found: list[Incumbent] = []
    for seconds, index, value in events:
        best[index] = min(value, best.get(index, np.inf))
        if len(best) == len(layers):
            total = float(sum(best.values()))
            if not found or total < found[-1].objective_us:
                found.append(Incumbent(seconds=seconds - clock, objective_us=total))
    return found

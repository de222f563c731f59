"""The protocol every solver follows: one layer's problem, options and a warm start in, an outcome out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gemopt.evaluate import moves_us, objective
from gemopt.exceptions import UnsupportedError
from gemopt.links import Links
from gemopt.moves import Budget
from gemopt.placement import Split
from gemopt.problem import Problem
from gemopt.result import Incumbent, StoppedBy
from gemopt.splits.weights import known_weights

Row = NDArray[np.int64]

DEFAULT_PATIENCE = 5
"""Kicks of local search, or restarts of GEM, in a row without gain, after which a call without a time limit ends."""
POLL_S = 0.02
"""How often the clock and the user are asked while a compiled kernel runs."""


@dataclass(frozen=True)
class Supports:
    """What a solver can express or prove; a request beyond it is refused and names a solver that can."""

    spare_slots: bool = True
    unequal_slots: bool = True
    proves: bool = False
    improves: bool = False
    """Whether more time or a warm start can lead to a better answer."""
    moves: bool = False
    """Whether it heeds a price and limits of moves."""
    links: bool = False
    """Whether it heeds links between ranks: a `LinkedSolver`."""
    fewest_bytes: bool = False
    """Whether it can search for fewest bytes between nodes: `Options.compute_slack`."""
    policies: bool = True
    """Whether it takes copies that do not share evenly, and slots that may not stay empty."""
    rules: bool = False
    """Whether it keeps rules."""


@dataclass
class Options:
    """How long and how hard to search, for one layer.

    `deadline` is on the `time.monotonic` clock. `bound_us` is a valid lower bound known beforehand. `stop` is asked now
    and then and ends the search with what was found. Same seed, same iterations: same trajectory,
    where `patience` ends it and not the clock.
    """

    deadline: float
    gap: float = 0.0
    seed: int = 0
    threads: int = 1
    patience: int | None = None
    """Give up after so many tries in a row without improvement; None: only the deadline ends the search."""
    bound_us: float = 0.0
    stop: Callable[[], bool] = field(default=lambda: False)
    begun: object = None
    """`Outcome.search` of an earlier call on the same problem, for the solver to go on from."""
    compute_slack: float | None = None
    """With links: by what part makespans may grow for fewer bytes between nodes; None: the time of steps counts."""
    budget: Budget | None = None
    """With links: moves that all layers share."""
    first: bool = False
    """Whether a later call goes on from `Outcome.search`, so that this one may leave to it what takes long."""
    start_by: float = -np.inf
    """Until when a greedy start that takes longer may be made, though the deadline is over."""

    @classmethod
    def lasting(cls, seconds: float, **others: Any) -> Options:
        """Options that expire so many seconds from now."""
        return cls(deadline=time.monotonic() + seconds, **others)

    def expired(self) -> bool:
        """Whether the time is over or the user interrupted."""
        return time.monotonic() >= self.deadline or self.stop()

    def may_start(self) -> bool:
        """Whether there is time for a greedy start that takes longer than the quickest."""
        return not self.stop() and time.monotonic() < max(self.deadline, self.start_by)

    def exhausted(self, idle: int) -> bool:
        """Whether so many tries in a row without improvement are enough."""
        return self.patience is not None and idle >= self.patience

    @property
    def remaining(self) -> float:
        """Seconds left, not below 0."""
        return max(0.0, self.deadline - time.monotonic())

    @property
    def cut_by(self) -> StoppedBy:
        """What ended a search that `expired`."""
        return StoppedBy.INTERRUPT if self.stop() else StoppedBy.TIME_LIMIT

    @contextmanager
    def alarm(self) -> Iterator[NDArray[np.uint8]]:
        """An array [1] that turns 1 when the options expire: compiled kernels cannot ask a clock, but read this."""
        flag, over = np.array([self.expired()], np.uint8), threading.Event()

        def watch() -> None:
            while not (flag[0] or over.wait(min(POLL_S, self.remaining))):
                flag[0] = self.expired()

        watcher = threading.Thread(target=watch, name="gemopt-alarm", daemon=True)
        watcher.start()
        try:
            yield flag
        finally:
            over.set()
            watcher.join()


@dataclass
class Outcome:
    """What a solver found for one layer.

    row: [P] expert of each slot, -1 empty, or None. bound_us: a lower bound valid for all placements on all steps of
    the problem, or None. history: incumbents with seconds on the `time.monotonic` clock. infeasible: proven.

    Exact solvers also say what is theirs. start_us: objective of the placement they were given or began with.
    own_bound_us: the bound that the solver itself claims for all steps, its word alone; None when it claims none or
    what it claimed was refuted. stated_steps, distinct_steps: steps that were stated to it, of how many. reached:
    whether the solver ran at all.

    search: what `Options.begun` takes, from solvers that can go on. searched_nodes: nodes of a search of all placements
    that ended, so that it can be repeated; None where there was none. columns: multipliers of a bound over all contents
    of a rank (`Proven`), None without. weights_P: [P] static weights that the last incumbent was scored with, where
    some were chosen for it.
    """

    row: Row | None
    stopped_by: StoppedBy
    bound_us: float | None = None
    history: list[Incumbent] = field(default_factory=list)
    note: str = ""
    infeasible: bool = False
    start_us: float | None = None
    own_bound_us: float | None = None
    stated_steps: int | None = None
    distinct_steps: int | None = None
    reached: bool = True
    search: object = None
    searched_nodes: int | None = None
    columns: object = None
    weights_P: NDArray[np.float64] | None = None


class Solver(Protocol):
    """One method for one layer."""

    @property
    def name(self) -> str:
        """Name on the command line."""

    @property
    def supports(self) -> Supports:
        """What it can express and prove."""

    def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
        """Place one layer. A warm start is a hint: feasible, and never worsened by solvers that improve."""


@dataclass
class Linked:
    """What a search over all layers found: rows, their total in microseconds, incumbents, and why it ended.

    bound_us: of the total, where something was proved.
    """

    rows: list[Row]
    total_us: float
    stopped_by: StoppedBy
    history: list[Incumbent] = field(default_factory=list)
    note: str = ""
    bound_us: float = 0.0


class LinkedSolver(Protocol):
    """A solver that goes on from what it found layer by layer, over all layers and with what links take."""

    def solve_linked(self, problems: Sequence[Problem], links: Links, rows: list[Row], options: Options) -> Linked:
        """Place all layers under `gemopt.evaluate.linked_total`."""


def require(solver: Solver, problem: Problem, alternatives: Callable[[str], list[str]]) -> None:
    """Raise `UnsupportedError` when the problem needs what the solver cannot express."""
    slots = "/".join(map(str, sorted(set(problem.slots_per_rank.tolist()))))
    needs = (
        ("spare_slots", problem.spare_slots > 0, "slots_per_rank", slots),
        ("unequal_slots", not problem.equal_slots, "slots_per_rank", slots),
        ("moves", problem.moves is not None, "moves", "a price or a limit"),
        ("policies", problem.spare_slots > 0 and problem.split is not Split.EVEN, "split", problem.split.value),
        ("policies", problem.spare_slots > 0 and problem.full, "slots_per_rank", f"{slots}, all full"),
        ("rules", problem.rules is not None, "rules", ", ".join(problem.rules.names if problem.rules else [])),
    )
    cannot = {
        "moves": "heed a price or limits of moves",
        "policies": "do but with copies that share evenly, or none, and slots that may stay empty",
        "rules": "keep rules",
    }
    asked = {need for need, needed, _, _ in needs if needed}
    for need, _, field_name, value in filter(lambda each: each[1], needs):
        if not getattr(solver.supports, need):
            able = [name for name in alternatives(need) if all(name in alternatives(other) for other in asked)]
            can = f"cannot {cannot.get(need, 'use ' + need.replace('_', ' '))}"
            raise UnsupportedError(field_name, value, f"{solver.name} {can}", f"use {', '.join(able)}" if able else "")


def within_limits(problem: Problem, row: Row | None) -> bool:
    """Whether there is a row and it keeps to the limits of moves and the rules."""
    if row is None or (problem.rules is not None and problem.rules.broken(row, problem.slots_per_rank)):
        return False
    return problem.moves is None or not problem.moves.excess(row, problem.slots_per_rank)


def beside(problems: Sequence[Problem], rows: Sequence[Row], layer: int, budget: Budget | None) -> Problem:
    """A layer's problem with what the rows of the others leave of a budget."""
    problem = problems[layer]
    if budget is None or problem.moves is None:
        return problem
    others = [n for n in range(len(problems)) if n != layer]
    into = [each.into(rows[n], problem.slots_per_rank) for n in others if (each := problems[n].moves) is not None]
    others_G = np.sum([np.zeros(problem.num_ranks, np.int64), *into], axis=0)
    return problem.with_moves(budget.beside(problem.moves, others_G))


def within_budget(problems: Sequence[Problem], rows: Sequence[Row], budget: Budget | None) -> bool:
    """Whether the rows of all layers keep to their limits and rules, and to a budget together."""
    each = (beside(problems, rows, layer, budget) for layer in range(len(problems)))
    return all(within_limits(problem, row) for problem, row in zip(each, rows, strict=True))


def known_total(problem: Problem, row: Row) -> float:
    """The total of a row, under static splits with the weights that are known of it: to choose them takes long."""
    return objective(problem, row, known_weights(problem, row)) + moves_us(problem, row)


def incumbent(objective_us: float, bound_us: float | None = None) -> Incumbent:
    """An incumbent met now."""
    return Incumbent(seconds=time.monotonic(), objective_us=objective_us, bound_us=bound_us)


def seeded(*parts: Any) -> np.random.Generator:
    """A generator that depends only on its parts."""
    return np.random.default_rng([abs(int(part)) for part in parts])

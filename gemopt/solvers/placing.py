"""Rows that keep the rules, and rules that no row keeps, by CP-SAT.

Only experts that some rule is about are variables: the others are alike, and fit in wherever there are slots left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gemopt.layer_rules import LayerRules
from gemopt.placement import EMPTY
from gemopt.problem import Problem
from gemopt.solvers import hurried
from gemopt.solvers.base import Row
from gemopt.solvers.hurried import OutOfTimeError

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

BALANCING = 0.5  # CP-SAT's deterministic seconds for a better row than any
UNITS = 1 << 20  # that the load of all ruled experts is counted in
BoolArray = NDArray[np.bool_]


@dataclass(eq=False)
class Rows:
    """Rows of some experts that keep the rules; the other experts get what slots are left.

    held: by expert and rank, a literal where the rank may hold the expert.
    """

    model: cp_model.CpModel
    held: dict[tuple[int, int], Any]

    @classmethod
    def of(
        cls,
        rules: LayerRules,
        slots_G: Row,
        experts: Row,
        *,
        full: bool,
        single: bool,
        model: cp_model.CpModel | None = None,
    ) -> Rows:
        """`full`: every slot is used. `single`: every expert of these is held once. model: one to go on with."""
        from ortools.sat.python import cp_model

        model, ranks = cp_model.CpModel() if model is None else model, range(rules.num_ranks)
        closed_GE, others = rules.closed_GE, rules.num_experts - len(experts)
        held = {(e, g): model.new_bool_var("") for e in experts.tolist() for g in ranks if not closed_GE[g, e]}
        result = cls(model, held)
        for e in experts.tolist():
            literals = [held[e, g] for g in ranks if (e, g) in held]
            (model.add_exactly_one if single else model.add_bool_or)(literals)
        for g, slots in enumerate(slots_G.tolist()):
            mine = result.on(g, experts)
            model.add_linear_constraint(sum(mine), slots - others if full else 0, slots)
        model.add(sum(held.values()) <= int(slots_G.sum()) - others)
        for members_E in rules.apart_AE:
            for g in ranks:
                model.add_at_most_one(result.on(g, np.flatnonzero(members_E)))
        for members_E, unit_G in rules.blocs:
            chosen = [model.new_bool_var("") for _ in range(int(unit_G.max()) + 1)]
            model.add_exactly_one(chosen)
            for e in np.flatnonzero(members_E).tolist():
                for unit, literal in enumerate(chosen):
                    there = [held[e, g] for g in np.flatnonzero(unit_G == unit).tolist() if (e, g) in held]
                    model.add_bool_or([*there, ~literal])
                    for each in there:
                        model.add_implication(each, literal)
        return result

    def on(self, rank: int, experts: Row) -> list[Any]:
        """Literals of experts on a rank."""
        return [self.held[e, rank] for e in experts.tolist() if (e, rank) in self.held]

    def solve(self, seconds: float, deterministic: float = np.inf) -> tuple[list[tuple[int, int]] | None, bool]:
        """(expert, rank) pairs of the best row found, or None; and whether it is proven that there is none better."""
        value_of, proven = solved(self.model, seconds, deterministic)
        return None if value_of is None else self.chosen(value_of), proven

    def chosen(self, value_of: Callable[[Any], int]) -> list[tuple[int, int]]:
        """(expert, rank) pairs of a solution."""
        return [pair for pair, literal in self.held.items() if value_of(literal)]


def solved(
    model: cp_model.CpModel, seconds: float, deterministic: float = np.inf, level: int = 1
) -> tuple[Callable[[Any], int] | None, bool]:
    """(value of a variable in the best solution found, or None; whether it is proven that there is none better).

    level: CP-SAT's linearization level. The first solution is enough where the time for a better one is over
    (`hurried.better_by`).
    """
    from ortools.sat.python import cp_model

    class Heard(cp_model.CpSolverSolutionCallback):
        found = False

        def on_solution_callback(self) -> None:
            self.found = True

    solver, heard = cp_model.CpSolver(), Heard()
    solver.parameters.num_workers = 1
    solver.parameters.linearization_level = level
    solver.parameters.catch_sigint_signal = False
    solver.parameters.max_time_in_seconds = max(seconds, 0.01)
    solver.parameters.max_deterministic_time = deterministic

    def over() -> bool:
        return hurried.stopped() or (heard.found and hurried.seconds_for_better() == 0)

    status = hurried.run(solver, model, over, heard)
    proven = bool(status in (cp_model.OPTIMAL, cp_model.INFEASIBLE))
    return solver.value if status in (cp_model.OPTIMAL, cp_model.FEASIBLE) else None, proven


def example(rules: LayerRules, slots_G: Row, seconds: float, *, full: bool) -> tuple[BoolArray | None, bool]:
    """[G, E] who holds ruled experts where some placement keeps the rules, or None; and if there is none, proven."""
    experts = np.flatnonzero(rules.ruled_E)
    for single in (True, False):
        rows = Rows.of(rules, slots_G, experts, full=full, single=single)
        pairs, proven = rows.solve(seconds)
        if pairs is not None:
            return held_by(pairs, rules.num_ranks, rules.num_experts), False
        if not full:
            break
    return None, proven


def known_example(problem: Problem) -> BoolArray | None:
    """[G, E] the example that the rules of a problem know, if it keeps them and fits its slots."""
    rules = problem.rules
    if rules is None or rules.example_GE is None or any(each.broken(rules.example_GE) for each in rules.demands):
        return None
    free_G, others = problem.slots_per_rank - rules.example_GE.sum(axis=1), int((~rules.ruled_E).sum())
    fits = free_G.min() >= 0 and free_G.sum() >= others and (not problem.full or free_G.max() <= others)
    return rules.example_GE if fits else None


def first_row(problem: Problem) -> Row:
    """[P] a row that keeps the rules: ruled experts balanced by CP-SAT, the others where they finish first.

    Raises
    ------
    OutOfTimeError
        None was found; `conflict` tells beforehand whether there is one.
    """
    rules, slots_G = _rules(problem), problem.slots_per_rank
    experts = np.flatnonzero(rules.ruled_E)
    offset_G, weight_GE = problem.linearised
    held_GE = _balanced(problem, rules, experts)
    finish_G = offset_G + (held_GE * weight_GE).sum(axis=1)
    others = np.flatnonzero(~rules.ruled_E)
    for expert in others[np.argsort(-weight_GE[:, others].mean(axis=0), kind="stable")]:
        ready_G = np.where(held_GE.sum(axis=1) < slots_G, finish_G + weight_GE[:, expert], np.inf)
        rank = int(ready_G.argmin())
        held_GE[rank, expert] = True
        finish_G[rank] = ready_G[rank]
    return row_of(held_GE, slots_G)


def _balanced(problem: Problem, rules: LayerRules, experts: Row) -> BoolArray:
    """[G, E] who holds these experts: the fullest rank, by the linearised latencies, is about as empty as can be.

    Where the time for that is over, the example that the rules know.
    """
    known_GE = known_example(problem)
    offset_G, weight_GE = problem.linearised
    scale = UNITS / max(float(weight_GE[:, experts].max(axis=0).sum() + np.ptp(offset_G)), 1e-9)
    weight_GE = np.ceil(weight_GE * scale).astype(np.int64)
    offset_G = np.floor((offset_G - offset_G.min()) * scale).astype(np.int64)
    for single in () if known_GE is not None and hurried.seconds_for_better() == 0 else (True, False):
        rows = Rows.of(rules, problem.slots_per_rank, experts, full=problem.full, single=single)
        peak = rows.model.new_int_var(0, int(offset_G.max() + weight_GE[:, experts].max(axis=0).sum()) + 1, "")
        for g in range(problem.num_ranks):
            load = sum(weight_GE[g, e].item() * rows.held[e, g] for e in experts.tolist() if (e, g) in rows.held)
            rows.model.add(peak >= load + offset_G[g].item())
        rows.model.minimize(peak)
        pairs, _ = rows.solve(hurried.seconds_for_better(), BALANCING)
        if pairs is None and known_GE is not None:
            break
        if pairs is None:
            rows.model.minimize(0)
            pairs, _ = rows.solve(hurried.seconds_left())
        if pairs is not None:
            return held_by(pairs, problem.num_ranks, problem.num_experts)
        if not problem.full:
            break
    if known_GE is None:
        raise OutOfTimeError("a placement that keeps the rules")
    return known_GE.copy()


def held_by(pairs: list[tuple[int, int]], ranks: int, experts: int) -> BoolArray:
    """[G, E] whether a rank holds an expert, from (expert, rank)."""
    held_GE = np.zeros((ranks, experts), dtype=bool)
    for expert, rank in pairs:
        held_GE[rank, expert] = True
    return held_GE


def row_of(held_GE: BoolArray, slots_G: Row) -> Row:
    """[P] the row in which ranks hold these experts, in increasing order, then their empty slots."""
    row = np.full(int(slots_G.sum()), EMPTY)
    for start, held_E in zip(np.cumsum(slots_G) - slots_G, held_GE, strict=True):
        experts = np.flatnonzero(held_E)
        row[start : start + len(experts)] = experts
    return row


def conflict(rules: LayerRules, slots_G: Row, *, full: bool, deadline: float | None = None) -> list[str]:
    """Names of rules that no placement keeps together, while it could keep any but one of them; none: all can be kept,
    or nothing else is known.

    Once the deadline (of `time.monotonic`; what the call has left when None) has passed, what is not known counts as
    possible, so that rules may be named that could be left out. A second is always taken.
    """
    now = time.monotonic()
    end = now + hurried.seconds_left() if deadline is None else max(deadline, now + hurried.LEAST_S)

    @cache
    def possible(names: tuple[str, ...]) -> bool:
        if (left_s := end - time.monotonic()) <= 0:
            return True
        some = rules.only(names)
        rows = Rows.of(some, slots_G, np.flatnonzero(some.ruled_E), full=full, single=False)
        return rows.solve(left_s) != (None, True)

    names = tuple(rules.names)
    return [] if possible(names) else list(_explained(possible, (), (), names))


def _explained(
    possible: Callable[[tuple[str, ...]], bool], kept: tuple[str, ...], added: Sequence[str], open_: tuple[str, ...]
) -> tuple[str, ...]:
    """A smallest part of `open_` that cannot be kept beside `kept` (QuickXplain: Junker, AAAI 2004).

    added: those of `kept` that were not there when it was last known to be possible.
    """
    if added and not possible(kept):
        return ()
    if len(open_) == 1:
        return open_
    first, second = open_[: len(open_) // 2], open_[len(open_) // 2 :]
    of_second = _explained(possible, kept + first, first, second)
    of_first = _explained(possible, kept + of_second, of_second, first)
    return of_first + of_second


def _rules(problem: Problem) -> LayerRules:
    """The rules of a problem that has some."""
    assert problem.rules is not None
    return problem.rules

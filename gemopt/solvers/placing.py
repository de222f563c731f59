"""Rows that keep the rules, and rules that no row keeps, by CP-SAT.

Only experts that some rule is about are variables: the others are alike, and fit in wherever there are slots left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gemopt.layer_rules import Demand, LayerRules
from gemopt.migration import held
from gemopt.placement import EMPTY
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers import hurried
from gemopt.solvers.base import Outcome, Row
from gemopt.solvers.hurried import OutOfTimeError

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

BALANCING = 0.5  # CP-SAT's deterministic seconds for a better row than any
ASSIGNMENT = 2  # linearization level: fewest changes are nearly an assignment problem, all but solved by its relaxation
UNITS = 1 << 20  # that the load of all ruled experts is counted in
BoolArray = NDArray[np.bool_]


@dataclass(eq=False)
class _Rows:
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
    ) -> _Rows:
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

    def solve(
        self, seconds: float, deterministic: float = np.inf, level: int = 1
    ) -> tuple[list[tuple[int, int]] | None, bool]:
        """(expert, rank) pairs of the best row found, or None; and whether it is proven that there is none better.

        level: CP-SAT's linearization level.
        """
        value_of, proven = _solved(self.model, seconds, deterministic, level)
        return None if value_of is None else self.chosen(value_of), proven

    def chosen(self, value_of: Callable[[Any], bool]) -> list[tuple[int, int]]:
        """(expert, rank) pairs of a solution."""
        return [pair for pair, literal in self.held.items() if value_of(literal)]


def _solved(
    model: cp_model.CpModel, seconds: float, deterministic: float = np.inf, level: int = 1
) -> tuple[Callable[[Any], bool] | None, bool]:
    """(value of a literal in the best solution found, or None; whether it is proven that there is none better)."""
    from ortools.sat.python import cp_model

    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.linearization_level = level
    solver.parameters.catch_sigint_signal = False
    solver.parameters.max_time_in_seconds = max(seconds, 0.01)
    solver.parameters.max_deterministic_time = deterministic
    status = hurried.run(solver, model, hurried.stopped)
    proven = bool(status in (cp_model.OPTIMAL, cp_model.INFEASIBLE))
    return solver.boolean_value if status in (cp_model.OPTIMAL, cp_model.FEASIBLE) else None, proven


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
    held_GE = _held(problem, _balanced(problem, rules, experts))
    finish_G = offset_G + (held_GE * weight_GE).sum(axis=1)
    others = np.flatnonzero(~rules.ruled_E)
    for expert in others[np.argsort(-weight_GE[:, others].mean(axis=0), kind="stable")]:
        ready_G = np.where(held_GE.sum(axis=1) < slots_G, finish_G + weight_GE[:, expert], np.inf)
        rank = int(ready_G.argmin())
        held_GE[rank, expert] = True
        finish_G[rank] = ready_G[rank]
    return row_of(held_GE, slots_G)


def _balanced(problem: Problem, rules: LayerRules, experts: Row) -> list[tuple[int, int]]:
    """(expert, rank) pairs whose fullest rank, by the linearised latencies, is about as empty as can be."""
    offset_G, weight_GE = problem.linearised
    scale = UNITS / max(float(weight_GE[:, experts].max(axis=0).sum() + np.ptp(offset_G)), 1e-9)
    weight_GE = np.ceil(weight_GE * scale).astype(np.int64)
    offset_G = np.floor((offset_G - offset_G.min()) * scale).astype(np.int64)
    for single in (True, False):
        rows = _Rows.of(rules, problem.slots_per_rank, experts, full=problem.full, single=single)
        peak = rows.model.new_int_var(0, int(offset_G.max() + weight_GE[:, experts].max(axis=0).sum()) + 1, "")
        for g in range(problem.num_ranks):
            load = sum(weight_GE[g, e].item() * rows.held[e, g] for e in experts.tolist() if (e, g) in rows.held)
            rows.model.add(peak >= load + offset_G[g].item())
        rows.model.minimize(peak)
        pairs, _ = rows.solve(hurried.seconds_for_better(), BALANCING)
        if pairs is None:
            rows.model.minimize(0)
            pairs, _ = rows.solve(hurried.seconds_left())
        if pairs is not None:
            return pairs
        if not problem.full:
            break
    raise OutOfTimeError("a placement that keeps the rules")


def nearest_row(problem: Problem, row: Row, seconds: float | None = None) -> Row | None:
    """[P] the row that keeps the rules with the fewest changes to another one; None where that was not found.

    seconds: that it may take; what the call has left when None.
    """
    rules, experts = _rules(problem), np.arange(problem.num_experts)
    near_GE = held(row, problem.slots_per_rank, problem.num_experts)
    rows = _Rows.of(rules, problem.slots_per_rank, experts, full=problem.full, single=False)
    rows.model.maximize(sum((1 if near_GE[g, e] else -2) * literal for (e, g), literal in rows.held.items()))
    for pair, literal in rows.held.items():
        rows.model.add_hint(literal, bool(near_GE[pair[::-1]]))
    pairs, _ = rows.solve(hurried.seconds_left() if seconds is None else seconds, level=ASSIGNMENT)
    return None if pairs is None else row_of(_held(problem, pairs), problem.slots_per_rank)


def fewest_row(problem: Problem) -> Row | None:
    """[P] the row with the fewest moves, and most copies at home; None when limits and rules allow no row, proven.

    Where every slot must hold an expert, so do those of this row.

    Raises
    ------
    OutOfTimeError
        Neither a row nor that there is none was proven.
    """
    moves, slots_G = problem.moves, problem.slots_per_rank
    assert moves is not None
    if problem.rules is None:
        row = moves.fewest(slots_G)
        if row is None or not problem.full:
            return row
        row = _full(problem, row)
        if (moves.into(row, slots_G) == np.maximum(slots_G - moves.home_GE.sum(axis=1), 0)).all():  # none takes fewer
            return None if moves.excess(row, slots_G) else row
    rules = problem.rules or LayerRules((), problem.num_ranks, problem.num_experts)
    rows = _Rows.of(rules, slots_G, np.arange(problem.num_experts), full=problem.full, single=False)
    into_G: list[list[Any]] = [[] for _ in slots_G]
    for (expert, rank), literal in rows.held.items():
        into_G[rank] += [literal] * (not moves.home_GE[rank, expert])
    moved = sum(map(sum, into_G))
    if moves.most is not None:
        rows.model.add(moved <= moves.most)
    for rank, most in enumerate([] if moves.most_into_G is None else moves.most_into_G.tolist()):
        rows.model.add(sum(into_G[rank]) <= most)
    rows.model.minimize((problem.num_slots + 1) * moved - sum(rows.held.values()))
    pairs, proven = rows.solve(hurried.seconds_left(), level=ASSIGNMENT)
    if not proven:
        raise OutOfTimeError("the fewest moves that keep the rules")
    return None if pairs is None else row_of(_held(problem, pairs), slots_G)


def _full(problem: Problem, row: Row) -> Row:
    """The row with copies in its empty slots, the heaviest by load per copy: each is one more move."""
    held_GE, weight_E = held(row, problem.slots_per_rank, problem.num_experts), problem.linearised[1].mean(axis=0)
    for rank, slots in enumerate(problem.slots_per_rank):
        while held_GE[rank].sum() < slots:
            held_GE[rank, np.where(held_GE[rank], -1.0, weight_E / held_GE.sum(axis=0)).argmax()] = True
    return row_of(held_GE, problem.slots_per_rank)


def fewest_rows(
    problems: Sequence[Problem], most: int | None, most_into_G: Row, deadline: float
) -> tuple[list[Row] | None, bool]:
    """[P] rows of all layers together with the fewest moves, of which no rank and not all together receive too many,
    or None; and whether it is proven that none are better, or that there are none.

    most, most_into_G: moves of all layers together, and [G] into each rank; each layer's own limits hold, too.
    deadline: of `time.monotonic`.
    """
    from ortools.sat.python import cp_model

    model, found = cp_model.CpModel(), list[_Rows]()
    into_G: list[list[Any]] = [[] for _ in most_into_G]
    kept: list[Any] = []
    for problem in problems:
        moves, experts = problem.moves, np.arange(problem.num_experts)
        assert moves is not None
        rules = problem.rules or LayerRules(_stay(problem), problem.num_ranks, problem.num_experts)
        layer = _Rows.of(rules, problem.slots_per_rank, experts, full=problem.full, single=False, model=model)
        found.append(layer)
        own: list[Any] = []
        for (expert, rank), literal in layer.held.items():
            at_home = bool(moves.home_GE[rank, expert])
            (kept if at_home else into_G[rank]).append(literal)
            own += [] if at_home else [literal]
        if moves.most is not None:
            model.add(sum(own) <= moves.most)
    for literals, limit in zip(into_G, most_into_G.tolist(), strict=True):
        model.add(sum(literals) <= limit)
    moved = sum(map(sum, into_G))
    if most is not None:
        model.add(moved <= most)
    model.minimize((len(kept) + 1) * moved - sum(kept))
    value_of, proven = _solved(model, deadline - time.monotonic(), level=ASSIGNMENT)
    if value_of is None:
        return None, proven
    held_LGE = [_held(problem, each.chosen(value_of)) for problem, each in zip(problems, found, strict=True)]
    rows = [row_of(held_GE, problem.slots_per_rank) for problem, held_GE in zip(problems, held_LGE, strict=True)]
    return rows, proven


def _stay(problem: Problem) -> tuple[Demand, ...]:
    """That experts with a copy go to no other rank, where some rows with the fewest moves are so whatever the limits.

    An expert away from its home changes places with whatever moved there: no rank receives more. It takes slots for all
    that is at home, and none that must be filled.
    """
    assert problem.moves is not None
    home_GE = problem.moves.home_GE
    if problem.full or (home_GE.sum(axis=1) > problem.slots_per_rank).any():
        return ()
    return (Demand("", "", closed_GE=~home_GE & home_GE.any(axis=0)),)


def no_placement(problem: Problem) -> Outcome:
    """The outcome when the limits of moves are proven to allow no placement, and how many moves it takes."""
    moves, slots = problem.moves, problem.slots_per_rank
    assert moves is not None
    row = fewest_row(problem.with_moves(replace(moves, most=None, most_into_G=None)))
    needed = 0 if row is None else moves.count(row, slots)
    limit = "into each rank" if moves.most is None or needed <= moves.most else f"{moves.most} in all"
    who = "experts without a copy" if problem.rules is None else "rules, and experts without a copy,"
    who = f"full slots, {who}" if problem.full else who
    note = f"infeasible: {who} need {needed} moves, the limit allows fewer ({limit})"
    return Outcome(None, StoppedBy.PROOF, infeasible=True, note=note)


def _held(problem: Problem, pairs: list[tuple[int, int]]) -> BoolArray:
    """[G, E] whether a rank holds an expert, from (expert, rank)."""
    held_GE = np.zeros((problem.num_ranks, problem.num_experts), dtype=bool)
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


def conflict(rules: LayerRules, slots_G: Row, *, full: bool, deadline: float) -> list[str]:
    """Names of rules that no placement keeps together, while it could keep any but one of them; none: all can be kept.

    Once the deadline (of `time.monotonic`) has passed, what is not known counts as possible, so that rules may be named
    that could be left out.
    """

    @cache
    def possible(names: tuple[str, ...]) -> bool:
        some = rules.only(names)
        rows = _Rows.of(some, slots_G, np.flatnonzero(some.ruled_E), full=full, single=False)
        return rows.solve(deadline - time.monotonic()) != (None, True)

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

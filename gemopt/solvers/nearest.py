"""Rows as near as can be to a placement in force: the fewest moves that limits, rules and full slots allow."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gemopt.layer_rules import Demand, LayerRules
from gemopt.migration import held
from gemopt.moves import Moves
from gemopt.placement import EMPTY
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers import hurried
from gemopt.solvers.base import Outcome, Row, within_limits
from gemopt.solvers.hurried import OutOfTimeError
from gemopt.solvers.placing import Rows, first_row, held_by, known_example, row_of, solved

ASSIGNMENT = 2  # linearization level: fewest changes are nearly an assignment problem, all but solved by its relaxation
SOON_S = 0.3  # for few moves, though the time is over, where some row that makes more is known
CHANGE = 2  # experts kept that a change may cost, in a row near another one


def nearest_row(problem: Problem, row: Row, seconds: float | None = None) -> Row | None:
    """[P] the row that keeps the rules with the fewest changes to another one; None where none was found.

    seconds: that it may take; what the call has left when None.
    """
    near = Moves(held(row, problem.slots_per_rank, problem.num_experts))
    return _near(problem, near, CHANGE, hurried.seconds_left() if seconds is None else seconds)[0]


def fewest_row(problem: Problem) -> Row | None:
    """[P] a row with few moves; None when limits and rules allow no row, proven.

    Of those with the fewest one with most copies at home, unless the time ends before that is proven. Where every slot
    must hold an expert, so do those of this row.

    Raises
    ------
    OutOfTimeError
        Neither a row was found nor that there is none.
    """
    return fewest(problem)[0]


def home_row(problem: Problem, moves: Moves) -> Row | None:
    """[P] the row with the fewest moves, where it keeps to limits and rules as it is; None where it does not."""
    row = moves.fewest(problem.slots_per_rank)
    if row is None or (problem.full and (row == EMPTY).any()):
        return None
    return row if within_limits(problem, row) else None


def fewest(problem: Problem) -> tuple[Row | None, bool]:
    """What `fewest_row` finds, and whether it is proven that none has fewer moves, or that there is none."""
    moves, slots_G = problem.moves, problem.slots_per_rank
    assert moves is not None
    row = moves.fewest(slots_G)
    if row is None:
        return None, True
    row = _full(problem, row) if problem.full else row
    least_G = np.maximum(slots_G - moves.home_GE.sum(axis=1), 0)  # that full slots take, whatever the rules
    if not problem.full or (moves.into(row, slots_G) == least_G).all():
        if moves.excess(row, slots_G):
            return None, True
        if within_limits(problem, row):
            return row, True
    if moves.known_P is not None and within_limits(problem, moves.known_P):
        return moves.known_P.copy(), False
    known = not problem.full and not moves.limited and known_example(problem) is not None
    seconds = max(hurried.seconds_for_better(), SOON_S) if known else hurried.seconds_left()
    row, proven = _near(problem, moves, problem.num_slots, seconds)
    if row is None and not proven:
        if not known:
            raise OutOfTimeError("a row within the limits of moves that keeps the rules")
        row = first_row(problem)
    return row, proven


def _near(problem: Problem, moves: Moves, price: int, seconds: float) -> tuple[Row | None, bool]:
    """[P] the row within limits and rules that keeps most experts at home, less a price for every move, or None; and
    whether it is proven that none is better, or that there is none.

    Experts with one home that no rule is about are alike where they share it: it only counts how many of them leave,
    and how many enter each rank.
    """
    rules = problem.rules or LayerRules((), problem.num_ranks, problem.num_experts)
    home_GE, slots_G = moves.home_GE, problem.slots_per_rank
    alike_E = (home_GE.sum(axis=0) == 1) & ~rules.ruled_E & (not problem.full)
    alike_GE, experts = home_GE & alike_E, np.flatnonzero(~alike_E)
    rows = Rows.of(rules, slots_G, experts, full=problem.full, single=False)
    model, at_home_G = rows.model, alike_GE.sum(axis=1).tolist()
    leave = [model.new_int_var(0, count, "") for count in at_home_G]
    enter = [model.new_int_var(0, min(slots, sum(at_home_G)), "") for slots in slots_G.tolist()]
    into_G = [[literal] for literal in enter]
    for (expert, rank), literal in rows.held.items():
        into_G[rank] += [literal] * (not home_GE[rank, expert])
        model.add_hint(literal, int(home_GE[rank, expert]))
    for rank, slots in enumerate(slots_G.tolist()):
        model.add(sum(rows.on(rank, experts)) + at_home_G[rank] - leave[rank] + enter[rank] <= slots)
        if moves.most_into_G is not None:
            model.add(sum(into_G[rank]) <= int(moves.most_into_G[rank]))
    model.add(sum(leave) == sum(enter))
    moved: Any = sum(map(sum, into_G))
    if moves.most is not None:
        model.add(moved <= moves.most)
    model.minimize((price + 1) * moved - sum(rows.held.values()))
    value_of, proven = solved(model, seconds, level=ASSIGNMENT)
    if value_of is None:
        return None, proven
    held_GE = held_by(rows.chosen(value_of), problem.num_ranks, problem.num_experts) | alike_GE
    change_G = np.array([value_of(into) - value_of(out) for into, out in zip(enter, leave, strict=True)])
    weight_E = problem.linearised[1].mean(axis=0)
    gone = []
    for rank in np.flatnonzero(change_G < 0).tolist():
        mine = np.flatnonzero(alike_GE[rank])
        lightest = mine[np.argsort(weight_E[mine], kind="stable")][: -change_G[rank]]
        held_GE[rank, lightest] = False
        gone += lightest.tolist()
    held_GE[np.repeat(np.arange(problem.num_ranks), np.maximum(change_G, 0)), gone] = True
    return row_of(held_GE, slots_G), proven


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

    model, found = cp_model.CpModel(), list[Rows]()
    into_G: list[list[Any]] = [[] for _ in most_into_G]
    kept: list[Any] = []
    for problem in problems:
        moves, experts = problem.moves, np.arange(problem.num_experts)
        assert moves is not None
        rules = problem.rules or LayerRules(_stay(problem), problem.num_ranks, problem.num_experts)
        layer = Rows.of(rules, problem.slots_per_rank, experts, full=problem.full, single=False, model=model)
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
    value_of, proven = solved(model, deadline - time.monotonic(), level=ASSIGNMENT)
    if value_of is None:
        return None, proven
    rows = []
    for problem, each in zip(problems, found, strict=True):
        held_GE = held_by(each.chosen(value_of), problem.num_ranks, problem.num_experts)
        rows.append(row_of(held_GE, problem.slots_per_rank))
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
    limit = "into each rank" if moves.most is None else f"{moves.most} in all"
    try:
        row, proven = fewest(problem.with_moves(replace(moves, most=None, most_into_G=None)))
    except OutOfTimeError:
        need = "need more moves than the limit allows"
    else:
        needed = 0 if row is None else moves.count(row, slots)
        need = f"need {'' if proven else 'at most '}{needed} moves, the limit allows fewer"
        limit = limit if moves.most is None or needed > moves.most else "into each rank"
    return Outcome(None, StoppedBy.PROOF, infeasible=True, note=f"infeasible: {who_moves(problem)} {need} ({limit})")


def who_moves(problem: Problem) -> str:
    """What asks for moves, whatever they are worth."""
    who = "experts without a copy" if problem.rules is None else "rules, and experts without a copy,"
    return f"full slots, {who}" if problem.full else who

"""One budget of moves for all layers of a call: divided, solved layer by layer, and divided again while that helps.

The first division is along the fronts that best swaps lead through, and copies where slots are spare. Where a solver
proves its layers, what it proved at so many moves holds for fewer, and dividing the bounds tells which layer is to be
solved next, at how many moves: that ends with the best division, proven. Otherwise the bound is what no layer falls
below with the whole budget for itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gemopt.evaluate import total
from gemopt.placement import Split
from gemopt.problem import Problem
from gemopt.result import OPTIMALITY_TOLERANCE, StoppedBy, relative_gap
from gemopt.solvers import hurried
from gemopt.solvers.base import Options, Outcome, Row
from gemopt.solvers.budget import Front, divide, divide_by_rank, point_of
from gemopt.solvers.nearest import fewest_row, fewest_rows, no_placement, who_moves
from gemopt.solving.layers import Layer
from gemopt.solving.moving import Moving, limited
from gemopt.solving.schedule import Run
from gemopt.solving.walks import add_copies, walk_fronts
from gemopt.splits.weights import known_weights, static_weights, suggest_weights
from gemopt.words import counted

FRONT_SHARE = 0.2  # of the time, for the fronts
LEAST_SECONDS = 0.05
SECONDS_TOGETHER = 1.0  # at least, for rows that keep a budget together


def solve_shared(run: Run, moving: Moving) -> float:
    """Solve the layers of a run that share a budget of moves; returns a bound on the total of all layers together.

    On return every layer of the run has its answer, and its problem the limits that hold for it alone.
    """
    problems = [layer.problem for layer in run.layers]
    fronts = _fronts(run, moving)
    budget = None if moving.budget is None else min(moving.budget, sum(each.num_slots for each in problems))
    parts = None
    if all(front.points for front in fronts):
        if moving.into_G is not None:
            parts = _by_rank(problems, fronts, moving)
        elif budget is not None:
            parts = _by_moves(problems, fronts, budget)
    proven = True
    if parts is None and not (moving.into_G is None and all(front.proven for front in fronts)):
        fronts, parts, proven = _together(run, problems, moving, budget)
    if parts is None:
        _without(run.layers, fronts, moving, proven=proven)
        return 0.0
    for layer, (part, row) in zip(run.layers, parts, strict=True):
        layer.problem = part
        layer.warm = row if layer.warm is None else layer.warm
    run.go()
    if moving.into_G is None and budget is not None:
        return _refine(run, problems, fronts, budget)
    for layer, problem in zip(run.layers, problems, strict=True):
        tighter, layer.problem = _tighter(layer.problem, problem), problem
        if tighter:
            _disclaim(layer, StoppedBy.ITERATIONS)
    return 0.0


def _tighter(part: Problem, whole: Problem) -> bool:
    """Whether a part of the budget forbids moves that all of it allows: what is proven of the part is of it alone."""
    assert part.moves is not None and part.moves.most_into_G is not None
    assert whole.moves is not None and whole.moves.most_into_G is not None
    most_into_G = np.minimum(whole.moves.most_into_G, whole.slots_per_rank)
    return bool((part.moves.most_into_G < most_into_G).any()) or _most(part) < min(_most(whole), int(most_into_G.sum()))


def _most(problem: Problem) -> int:
    assert problem.moves is not None
    return problem.num_slots if problem.moves.most is None else problem.moves.most


def _fronts(run: Run, moving: Moving) -> list[Front]:
    """A front of each layer."""
    problems = [layer.problem for layer in run.layers]
    if moving.into_G is not None:
        problems = _rooms(problems, moving.into_G)
    return _walked(run, problems, [None] * len(problems), moving.budget)


def _walked(run: Run, problems: Sequence[Problem], begins: Sequence[Row | None], budget: int | None) -> list[Front]:
    """Fronts of the layers from the rows that they begin with, else from those with the fewest moves, within a share of
    the time."""
    left = max(0.0, run.clock + run.time_limit - time.monotonic())
    options = Options.lasting(FRONT_SHARE * left, stop=run.interrupted.is_set)
    given = [None if begin is None else (begin, None) for begin in begins]
    with hurried.better_by(options.deadline):
        most_L = [_most(problem) for problem in problems]
        fronts = walk_fronts(problems, given, most_L, options, run.threads, promised=True)[0]
    if problems[0].spare_slots and all(front.points for front in fronts):
        add_copies(problems, fronts, budget, options, run.threads)
    return fronts


def _together(
    run: Run, problems: Sequence[Problem], moving: Moving, budget: int | None
) -> tuple[list[Front], list[tuple[Problem, Row]] | None, bool]:
    """Fronts and parts of the budget around rows that together keep it, where layer after layer none were found, or
    none; and whether it is proven then that there are none."""
    deadline = max(run.clock + run.time_limit, time.monotonic() + SECONDS_TOGETHER)
    any_G = np.sum([problem.slots_per_rank for problem in problems], axis=0)
    rows, proven = fewest_rows(problems, budget, any_G if moving.into_G is None else moving.into_G, deadline)
    if rows is None:
        return [], None, proven
    if moving.into_G is None:
        assert budget is not None
        fronts = _walked(run, problems, rows, budget)
        return fronts, _by_moves(problems, fronts, budget), False
    into_LG = [_into(problem, row) for problem, row in zip(problems, rows, strict=True)]
    left_G = moving.into_G - np.sum(into_LG, axis=0)
    own = [limited(problem, most_into_G=into_G + left_G) for problem, into_G in zip(problems, into_LG, strict=True)]
    fronts = _walked(run, own, rows, budget)
    first = [Front(each.points[:1]) for each in fronts]
    return fronts, _by_rank(problems, fronts, moving) or _by_rank(problems, first, moving), False


def _into(problem: Problem, row: Row) -> NDArray[np.int64]:
    assert problem.moves is not None
    return problem.moves.into(row, problem.slots_per_rank)


def _rooms(problems: Sequence[Problem], into_G: NDArray[np.int64]) -> list[Problem]:
    """The layers, each with what the fewest moves of the ones before leave of the budget per rank."""
    left_G, result = into_G.copy(), []
    for problem in problems:
        own = limited(problem, most_into_G=left_G)
        result.append(own)
        assert own.moves is not None
        row = fewest_row(own)
        if row is not None:
            left_G = left_G - own.moves.into(row, problem.slots_per_rank)
    return result


def _by_moves(problems: Sequence[Problem], fronts: Sequence[Front], budget: int) -> list[tuple[Problem, Row]] | None:
    """The layers with their parts of the budget, and rows within them; what no front wants is shared out evenly."""
    divided = divide([front.best(budget) for front in fronts], budget)
    if divided is None:
        return None
    rest = budget - sum(divided[1])
    extra = [rest // len(problems) + (index < rest % len(problems)) for index in range(len(problems))]
    parts = [
        limited(problem, most=min(_most(problem), moves + more))
        for problem, moves, more in zip(problems, divided[1], extra, strict=True)
    ]
    return [(part, front.at(_most(part)).row) for part, front in zip(parts, fronts, strict=True)]


def _by_rank(problems: Sequence[Problem], fronts: Sequence[Front], moving: Moving) -> list[tuple[Problem, Row]] | None:
    assert moving.into_G is not None
    chosen = divide_by_rank(fronts, moving.budget, moving.into_G)
    if chosen is None:
        return None
    count = len(problems)
    left_G = moving.into_G - sum(point.into_G for point in chosen)
    left = None if moving.budget is None else moving.budget - sum(point.moves for point in chosen)
    result = []
    for index, (problem, point) in enumerate(zip(problems, chosen, strict=True)):
        into_G = point.into_G + left_G // count + (index < left_G % count)
        most = _most(problem)
        if left is not None:
            most = min(most, point.moves + left // count + (index < left % count))
        result.append((limited(problem, most=most, most_into_G=into_G), point.row))
    return result


def _refine(run: Run, problems: Sequence[Problem], fronts: Sequence[Front], budget: int) -> float:
    """Solve layers at other numbers of moves while that can make the whole better; the bound on the whole.

    Ends when placements reach what dividing the bounds gives, when a layer could not be proven, or with the time.
    """
    for problem, front in zip(problems, fronts, strict=True):
        if front.proven:
            front.bounds.append((min(point.moves for point in front.points) - 1, np.inf))
        front.own = min(budget, _most(problem))
    found, solved = dict(enumerate(run.layers)), set()
    while True:
        for index, layer in found.items():
            _learn(layer, fronts[index], budget)
            solved.add((index, _most(layer.problem)))
        values, bounds = [front.best(budget) for front in fronts], [front.bound(budget) for front in fronts]
        best, lower = divide(values, budget), divide(bounds, budget)
        assert best is not None and lower is not None
        closed = best[0] - lower[0] <= OPTIMALITY_TOLERANCE * abs(best[0])
        again = [] if closed else [index for index, most in enumerate(lower[1]) if (index, most) not in solved]
        over = run.clock + run.time_limit - time.monotonic() < LEAST_SECONDS or run.interrupted.is_set()
        proven = run.solver.supports.proves and all(_proven(layer) for layer in found.values())
        proven &= all(front.proven for front in fronts)  # else a layer may be asked for fewer moves than were found
        if not again or over or not proven:
            _take(run.layers, problems, fronts, best[1], over=over)
            for layer in run.layers:
                _disclaim(layer, StoppedBy.PROOF if closed else StoppedBy.TIME_LIMIT if over else StoppedBy.ITERATIONS)
            return lower[0]
        found = {
            index: _limited_layer(run.layers[index], problems[index], fronts[index], lower[1][index]) for index in again
        }
        replace(run, layers=list(found.values()), progress=None, on_layers=None).go()
        for index, layer in found.items():
            run.layers[index].seconds += layer.seconds


def _limited_layer(layer: Layer, problem: Problem, front: Front, most: int) -> Layer:
    return Layer(limited(problem, most=most), front.at(most).row, layer.seed, base_us=layer.base_us)


def _learn(layer: Layer, front: Front, budget: int) -> None:
    """Take over the placement of a round, and its bounds with the moves for which they hold."""
    outcome = layer.outcome
    assert outcome is not None and outcome.row is not None
    static = layer.problem.split is Split.STATIC  # weights may be known by now
    if static or not any(np.array_equal(point.row, outcome.row) for point in front.points):
        front.points.append(point_of(layer.problem, outcome.row))
    front.bounds.append((budget, layer.bound_us))  # of all placements
    if outcome.bound_us is not None:
        most = _most(layer.problem)
        front.bounds.append((budget if most >= front.own else most, outcome.bound_us))


def _disclaim(layer: Layer, stopped_by: StoppedBy) -> None:
    """What was proven of a layer with a part of the budget is not proven of the layer; the whole has its own reason."""
    outcome = layer.outcome
    assert outcome is not None
    known = stopped_by is StoppedBy.PROOF or outcome.stopped_by in (StoppedBy.PROOF, StoppedBy.GAP)
    reason = stopped_by if known else outcome.stopped_by
    layer.outcome = replace(outcome, bound_us=None, own_bound_us=None, stopped_by=reason)


def _proven(layer: Layer) -> bool:
    """Whether the layer's answer is the best within its own limits."""
    outcome = layer.outcome
    assert outcome is not None and outcome.row is not None
    gap = relative_gap(total(layer.problem, outcome.row), max(layer.bound_us, outcome.bound_us or 0.0))
    return gap is not None and gap <= OPTIMALITY_TOLERANCE


def _take(
    layers: Sequence[Layer], problems: Sequence[Problem], fronts: Sequence[Front], moves: Sequence[int], *, over: bool
) -> None:
    """Give each layer the best placement with so many moves, and the bound of the whole budget for itself alone.

    over: whether there is no time to choose static weights.
    """
    for layer, problem, front, most in zip(layers, problems, fronts, moves, strict=True):
        point, outcome = front.at(most), layer.outcome
        assert outcome is not None and outcome.row is not None
        layer.problem, weights_P = problem, outcome.weights_P
        layer.bound_us = float(front.bound(front.own)[front.own])
        if point.weights is not None and (point.row != outcome.row).any():  # those are of another row
            suggest_weights(problem, point.row, point.weights)
            weights_P = known_weights(problem, point.row) if over else static_weights(problem, point.row)
        layer.outcome = replace(outcome, row=point.row, weights_P=weights_P, bound_us=None, own_bound_us=None)


def _without(layers: Sequence[Layer], fronts: Sequence[Front], moving: Moving, *, proven: bool) -> None:
    """There is no placement: because a layer alone has none, or because the fewest moves of all are too many; or none
    was found in time."""
    alone = [layer.problem.moves is not None and fewest_row(layer.problem) is None for layer in layers]
    for layer, without in zip(layers, alone, strict=True):
        if without:
            layer.outcome = no_placement(layer.problem)
        elif not proven:
            note = "not found in time: rows of all layers within the budget of moves"
            layer.outcome = Outcome(None, StoppedBy.TIME_LIMIT, note=note)
        elif any(alone):
            layer.outcome = Outcome(None, StoppedBy.ITERATIONS, note="not searched: another layer has no placement")
        else:
            layer.outcome = Outcome(
                None, StoppedBy.PROOF, infeasible=True, note=f"infeasible: {_too_few(layer.problem, fronts, moving)}"
            )


def _too_few(problem: Problem, fronts: Sequence[Front], moving: Moving) -> str:
    """Why the budget does not suffice, where each layer alone would have a placement."""
    who = who_moves(problem)
    if moving.into_G is None:
        needed = sum(min(point.moves for point in front.points) for front in fronts)
        need = f"{needed} moves" if fronts else f"more than {counted(moving.budget or 0, 'move')}"
        return f"{who} need {need} over all layers, the budget allows {'fewer' if fronts else 'no more'}"
    both = "" if moving.budget is None else f" (max_bytes_per_rank) and {moving.budget} in all (max_moves)"
    most = counted(moving.into_G.max(), "move")
    return f"{who} need more than {most} into a rank over all layers{both}"

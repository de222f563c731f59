"""Latency against moves: what a placement in force can gain with 2, 4, 8, ... experts moved, over all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from gemopt import cores
from gemopt.costs import CostModel, cost_of
from gemopt.evaluate import check_agreement, evaluate
from gemopt.exceptions import InputError
from gemopt.layer_rules import rules_of
from gemopt.migration import count_moves, held
from gemopt.moves import Moves
from gemopt.placement import Placement, Split
from gemopt.problem import Problem, problems
from gemopt.profile import Profile
from gemopt.rules import Rules
from gemopt.solve import solve
from gemopt.solvers import get, hurried
from gemopt.solvers.base import Options
from gemopt.solvers.budget import Front, Point, divide
from gemopt.solvers.nearest import fewest_row
from gemopt.solving.first_use import ready, unlike
from gemopt.solving.ruled import exemplified
from gemopt.solving.walks import Begin, walk_fronts
from gemopt.splits import chosen_weights
from gemopt.splits.senders import Senders
from gemopt.traces import Traces
from gemopt.words import say

SWAPS = "best swaps"


class FrontPoint(BaseModel):
    """A placement on the front: who found it, moves and their bytes, and microseconds per step.

    Changes are fractions against the placement in force. `holdout_*` are of steps that were not looked at (None when
    none were kept).
    """

    model_config = ConfigDict(frozen=True)

    source: str
    moves: int
    bytes: int | None
    step_us: float
    change: float
    holdout_us: float | None
    holdout_change: float | None


def moves_front(
    profile: Profile,
    traces: Traces,
    current: Placement,
    *,
    holdout: float = 0.5,
    cost: str | CostModel = "auto",
    time_limit: float = 10.0,
    solvers: Sequence[str] = (),
    expert_bytes: int | None = None,
    notice: Callable[[str], None] | None = None,
    **options: Any,
) -> list[FrontPoint]:
    """The front of best swaps from a placement in force, budgets doubling, then what solvers find when moves are free.

    All keep the rules given in `options`, else those of `current`. Where that breaks some, the front begins with the
    fewest moves that keep them.

    Parameters
    ----------
    holdout
        Share of the steps, the last ones, kept to score on; 0 scores the given steps only.
    time_limit
        Wall seconds for the swaps of all layers, and for each solver.
    solvers
        Solvers whose free placements are relabelled to fewest moves and appended.
    expert_bytes
        Bytes of one expert of one layer; what the profile says when None.
    notice
        Called with a line before compiling, and where the time ended the swaps before nothing was left to gain (None:
        on a terminal's standard error).
    options
        Passed on to `gemopt.solve`.
    """
    fitted = cost_of(cost, profile)
    check_agreement(current, traces, profile)
    if options.get("rules") is not None:
        current = current.under(Rules.of(options["rules"]), profile.node_of_rank)
    given, kept = traces.split(holdout) if holdout else (traces, None)
    senders = Senders.of(options.get("senders"))
    layers = _layers(fitted, given, current, profile, senders)
    for layer in unlike(layers):
        ready(get("local-search"), layer, notice)
    fronts, cut = _fronts(layers, current, time_limit, options.get("threads"))
    if cut:
        (notice or say)(f"note: the swaps were cut after {time_limit:g} s: more may gain; more --time-limit would help")
    placements = [(SWAPS, current)]
    for budget in _budgets(fronts):
        divided = divide([front.best(budget) for front in fronts], budget)
        assert divided is not None  # no budget is below what every front begins with
        chosen = [front.at(most) for front, most in zip(fronts, divided[1], strict=True)]
        placements.append((SWAPS, _moved(current, chosen)))
    for name in solvers:
        result = solve(
            profile, given, solver=name, cost=fitted, current=current, time_limit=time_limit, notice=notice, **options
        )
        if result.placement is not None:
            placements.append((name, result.placement))
    size = expert_bytes or profile.model.expert_bytes

    def per_step(placement: Placement) -> list[float]:
        scored = [
            evaluate(placement, profile, some, cost=fitted, senders=senders)
            for some in (given, kept)
            if some is not None
        ]
        return [each.objective_us / len(each.step_us) for each in scored]

    base = per_step(current)
    points = [_point(source, placement, current, per_step(placement), base, size) for source, placement in placements]
    swaps = {(point.moves, point.step_us): point for point in points if point.source == SWAPS}  # each placement once
    return [*swaps.values(), *(point for point in points if point.source != SWAPS)]


def _layers(cost: CostModel, traces: Traces, current: Placement, profile: Profile, senders: Senders) -> list[Problem]:
    """The layers with their rules, and moves counted from the placement in force."""
    split = current.split if current.has_copies or current.split is Split.STATIC else Split.EVEN
    nodes, slots_G = profile.node_of_rank, current.slots_per_rank
    layers = problems(cost, traces, slots_G, node_of_rank=nodes, split=split, senders=senders)
    return [
        replace(layer, rules=asked).with_moves(Moves.make(held(row, slots_G, current.num_experts)))
        for layer, row, asked in zip(layers, current.physical_to_logical, rules_of(current), strict=True)
    ]


def _fronts(
    layers: Sequence[Problem], current: Placement, time_limit: float, threads: int | None
) -> tuple[list[Front], bool]:
    """The front of every layer, from its row in force where that keeps the rules, else from the fewest moves that do;
    whether the time ended any."""
    options = Options.lasting(time_limit)
    with hurried.call(options.deadline, options.stop):
        layers, note = exemplified(layers, current.layer_ids, options.deadline)
    if note:
        raise InputError("rules", current.rules, note)
    weights = current.split_weights if current.split is Split.STATIC else None

    begins: list[Begin | None] = []
    with hurried.call(options.deadline, options.stop):
        for index, (layer, row) in enumerate(zip(layers, current.physical_to_logical, strict=True)):
            if layer.rules is None or not layer.rules.broken(row, layer.slots_per_rank):
                begins.append((row, None if weights is None else weights[index]))
            else:
                kept = fewest_row(layer)
                begins.append(None if kept is None else (kept, chosen_weights(layer, kept)))
        most_L = [layer.num_slots for layer in layers]
        return walk_fronts(layers, begins, most_L, options, threads or cores.available())


def _moved(current: Placement, chosen: Sequence[Point]) -> Placement:
    """The placement in force with these rows; static weights travel with their copies."""
    weights = [point.weights for point in chosen] if current.split is Split.STATIC else None
    return current.changed(physical_to_logical=np.stack([point.row for point in chosen]), split_weights=weights)


def _budgets(fronts: Sequence[Front]) -> list[int]:
    """As few moves as rules let there be, 2, 4, 8, ... beyond those, and as many as any front asks for."""
    least, most = (sum(some(point.moves for point in front.points) for front in fronts) for some in (min, max))
    doubled = [1 << n for n in range(1, max(most, 1).bit_length()) if least < 1 << n < most]
    return [least, *doubled] + [most] * (most > least)


def _point(
    source: str, placement: Placement, current: Placement, us: list[float], base_us: list[float], size: int | None
) -> FrontPoint:
    """us, base_us: per step, of this placement and of the one in force, on the given and perhaps on kept steps."""
    moves = sum(
        count_moves(before, after, current.slots_per_rank, placement.slots_per_rank)
        for before, after in zip(current.physical_to_logical, placement.physical_to_logical, strict=True)
    )
    changes = [mine / theirs - 1 if theirs else 0.0 for mine, theirs in zip(us, base_us, strict=True)]
    return FrontPoint(
        source=source,
        moves=moves,
        bytes=None if size is None else moves * size,
        step_us=us[0],
        change=changes[0],
        holdout_us=us[1] if len(us) > 1 else None,
        holdout_change=changes[1] if len(us) > 1 else None,
    )


def check_request(current: object, moves: bool) -> None:
    """`--current` and `--moves` belong together."""
    if moves and current is None:
        raise InputError("--moves", "no --current", "moves are counted from the placement in force", "give --current")
    if current is not None and not moves:
        raise InputError("--current", str(current), "compare uses it for the front of --moves", "add --moves")

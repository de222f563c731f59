"""Latency against moves: what a placement in force can gain with 2, 4, 8, ... experts moved, over all layers."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from gemopt import cores
from gemopt.costs import CostModel, fit
from gemopt.evaluate import check_agreement, evaluate
from gemopt.exceptions import InputError, UnsupportedError
from gemopt.layer_rules import rules_of
from gemopt.migration import count_moves, held
from gemopt.moves import Moves
from gemopt.placement import Placement, Split
from gemopt.problem import problems
from gemopt.profile import Profile
from gemopt.rules import Rules
from gemopt.solve import solve
from gemopt.solvers.base import Options
from gemopt.solvers.budget import Front, divide, walk_front
from gemopt.solving.ruled import contradiction
from gemopt.traces import Traces

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
    options
        Passed on to `gemopt.solve`.
    """
    fitted = fit(profile, model=cost)[0] if isinstance(cost, str) else cost
    check_agreement(current, traces, profile.num_ranks)
    if options.get("rules") is not None:
        current = current.under(Rules.of(options["rules"]), profile.node_of_rank)
    if current.has_copies and current.split is not Split.EVEN:
        limit = "fronts of moves know copies that share evenly"
        raise UnsupportedError("Placement.split", current.split.value, limit, "use gemopt solve --max-moves")
    given, kept = traces.split(holdout) if holdout else (traces, None)
    fronts = _fronts(fitted, given, current, time_limit, options.get("threads"))
    placements = [(SWAPS, current)]
    for budget in _budgets(fronts):
        divided = divide([front.best(budget) for front in fronts], budget)
        assert divided is not None  # no budget is below what every front begins with
        rows = [front.at(most).row for front, most in zip(fronts, divided[1], strict=True)]
        changes = {"physical_to_logical": np.stack(rows), "split": Split.EVEN, "split_weights": None}
        placements.append((SWAPS, current.model_copy(update=changes)))
    for name in solvers:
        result = solve(profile, given, solver=name, cost=fitted, current=current, time_limit=time_limit, **options)
        if result.placement is not None:
            placements.append((name, result.placement))
    size = expert_bytes or profile.model.expert_bytes
    base = _step_us(current, fitted, given), None if kept is None else _step_us(current, fitted, kept)
    points = [_point(source, placement, current, fitted, given, kept, size, base) for source, placement in placements]
    swaps = {point.moves: point for point in points if point.source == SWAPS}  # budgets may lead to the same placement
    return [*swaps.values(), *(point for point in points if point.source != SWAPS)]


def _fronts(cost: CostModel, traces: Traces, current: Placement, time_limit: float, threads: int | None) -> list[Front]:
    layers = problems(cost, traces, current.slots_per_rank)
    layers = [
        replace(layer, rules=asked).with_moves(Moves.make(held(row, current.slots_per_rank, current.num_experts)))
        for layer, row, asked in zip(layers, current.physical_to_logical, rules_of(current), strict=True)
    ]
    options = Options.lasting(time_limit)
    if note := contradiction(layers, current.layer_ids, options.deadline):
        raise InputError("rules", current.rules, note)
    with options.alarm() as stop, ThreadPoolExecutor(threads or cores.available()) as pool:
        return list(pool.map(lambda layer: walk_front(layer, layer.num_slots, stop), layers))


def _budgets(fronts: Sequence[Front]) -> list[int]:
    """As few moves as rules let there be, 2, 4, 8, ... beyond those, and as many as any front asks for."""
    least, most = (sum(some(point.moves for point in front.points) for front in fronts) for some in (min, max))
    doubled = [1 << n for n in range(1, max(most, 1).bit_length()) if least < 1 << n < most]
    return [least] * (least > 0) + doubled + [most] * (most > least)


def _step_us(placement: Placement, cost: CostModel, traces: Traces) -> float:
    return evaluate(placement, None, traces, cost=cost).objective_us / traces.num_steps


def _point(
    source: str,
    placement: Placement,
    current: Placement,
    cost: CostModel,
    given: Traces,
    kept: Traces | None,
    expert_bytes: int | None,
    base: tuple[float, float | None],
) -> FrontPoint:
    moves = sum(
        count_moves(before, after, current.slots_per_rank, placement.slots_per_rank)
        for before, after in zip(current.physical_to_logical, placement.physical_to_logical, strict=True)
    )
    step_us = _step_us(placement, cost, given)
    held_us = None if kept is None else _step_us(placement, cost, kept)
    return FrontPoint(
        source=source,
        moves=moves,
        bytes=None if expert_bytes is None else moves * expert_bytes,
        step_us=step_us,
        change=step_us / base[0] - 1 if base[0] else 0.0,
        holdout_us=held_us,
        holdout_change=None if held_us is None or not base[1] else held_us / base[1] - 1,
    )


def check_request(current: object, moves: bool) -> None:
    """`--current` and `--moves` belong together."""
    if moves and current is None:
        raise InputError("--moves", "no --current", "moves are counted from the placement in force", "give --current")
    if current is not None and not moves:
        raise InputError("--current", str(current), "compare uses it for the front of --moves", "add --moves")

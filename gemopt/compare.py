"""Solvers side by side on one input: fitted on the first steps, scored on steps they did not see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from gemopt.costs import CostModel, fit
from gemopt.evaluate import Evaluation, evaluate
from gemopt.exceptions import SolverError, UnsupportedError
from gemopt.placement import Placement
from gemopt.profile import Profile
from gemopt.result import Result, Status, StoppedBy, relative_gap
from gemopt.solve import solve
from gemopt.traces import Traces

BASELINE = "linear"
BOUND_TOLERANCE = 1e-6
DEFAULT_SOLVERS = ("linear", "round-robin", "eplb", "lpt", "gem", "conflict", "local-search", "cpsat", "milp")


class Comparison(BaseModel):
    """One solver's row. Changes are fractions against contiguous placement; quantiles are of the scored steps.

    Scored steps are the held-out ones, or all when nothing is held out (`holdout_*` are None then).
    """

    model_config = ConfigDict(frozen=True)

    solver: str
    status: Status
    stopped_by: StoppedBy | None
    objective_us: float | None
    change: float | None
    bound_us: float | None
    gap: float | None
    seconds: float
    holdout_us: float | None
    holdout_change: float | None
    p50_us: float | None
    p90_us: float | None
    p99_us: float | None
    note: str = ""


def compare(
    profile: Profile,
    traces: Traces,
    *,
    solvers: Sequence[str] = DEFAULT_SOLVERS,
    holdout: float = 0.5,
    cost: str | CostModel = "auto",
    on_result: Callable[[Comparison, Result | None], None] | None = None,
    **options: Any,
) -> list[Comparison]:
    """Run every solver on the same input and score each placement.

    Parameters
    ----------
    holdout
        Share of the steps, the last ones, kept from the solvers and used to score; 0 scores the given steps.
    options
        Passed on to `gemopt.solve`: `time_limit`, `slots_per_rank`, `seed`, `gap`, `patience`, `threads`.

    Notes
    -----
    The contiguous baseline uses the same slots per rank. A solver that cannot express the request gives a row that
    says so. The best bound proven by any solver holds for all of them and is what every gap is taken against.
    """
    fitted = fit(profile, model=cost)[0] if isinstance(cost, str) else cost
    given, held = traces.split(holdout) if holdout else (traces, None)
    scored = held if held is not None else given
    results: list[tuple[str, Result | None, str]] = []
    for name in solvers:
        try:
            results.append((name, solve(profile, given, solver=name, cost=fitted, **options), ""))
        except UnsupportedError as error:
            results.append((name, None, error.limit))
        if on_result is not None:
            on_result(_row(*results[-1], None, None, 0.0), results[-1][1])
    bound = _best_bound([result for _, result, _ in results if result is not None])
    base_given, base_scored = _baseline(results, profile, given, scored, fitted, options)
    rows = []
    for name, result, note in results:
        evaluation = None
        if result is not None and result.placement is not None:
            evaluation = evaluate(result.placement, profile, scored, cost=fitted)
        row = _row(name, result, note, evaluation, base_given, bound)
        if held is not None and evaluation is not None:
            update = {
                "holdout_us": evaluation.objective_us,
                "holdout_change": evaluation.objective_us / base_scored - 1 if base_scored else None,
            }
            row = row.model_copy(update=update)
        rows.append(row)
    return rows


def _best_bound(results: Sequence[Result]) -> float:
    """Largest proven bound; it holds for every placement, so one above anybody's objective is a defect."""
    best = max(results, key=lambda result: result.bound_us or 0.0, default=None)
    bound = 0.0 if best is None else best.bound_us or 0.0
    for result in results:
        if result.objective_us is not None and bound > result.objective_us * (1 + BOUND_TOLERANCE):
            raise SolverError(f"the bound {bound} of {best and best.solver} is above {result.solver}'s objective")
    return bound


def _baseline(
    results: list[tuple[str, Result | None, str]],
    profile: Profile,
    given: Traces,
    scored: Traces,
    cost: CostModel,
    options: dict[str, Any],
) -> tuple[float, float]:
    """Objective of contiguous placement on the given and on the scored steps."""
    placement = next((r.placement for name, r, _ in results if name == BASELINE and r is not None), None)
    if placement is None:
        slots = {key: options[key] for key in ("slots_per_rank",) if key in options}
        placement = solve(profile, given, solver=BASELINE, cost=cost, **slots).placement
    assert isinstance(placement, Placement)
    on_given = evaluate(placement, profile, given, cost=cost).objective_us
    return on_given, evaluate(placement, profile, scored, cost=cost).objective_us


def _row(
    name: str, result: Result | None, note: str, evaluation: Evaluation | None, base: float | None, bound: float
) -> Comparison:
    if result is None:
        nothing = dict.fromkeys(("objective_us", "change", "bound_us", "gap", "holdout_us", "holdout_change"))
        quantiles = dict.fromkeys(("p50_us", "p90_us", "p99_us"))
        return Comparison(
            solver=name, status=Status.UNKNOWN, stopped_by=None, seconds=0.0, note=note, **nothing, **quantiles
        )
    value = result.objective_us
    best = None if value is None else min(max(bound, result.bound_us or 0.0), value)
    return Comparison(
        solver=name,
        status=result.status,
        stopped_by=result.stopped_by,
        objective_us=value,
        change=None if value is None or not base else value / base - 1,
        bound_us=best,
        gap=relative_gap(value, best),
        seconds=result.seconds,
        holdout_us=None,
        holdout_change=None,
        p50_us=_quantile(evaluation, 0.5),
        p90_us=_quantile(evaluation, 0.9),
        p99_us=_quantile(evaluation, 0.99),
        note="; ".join(result.notes) or note,
    )


def _quantile(evaluation: Evaluation | None, q: float) -> float | None:
    return None if evaluation is None else float(np.quantile(evaluation.step_us, q))

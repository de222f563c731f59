"""Solvers side by side on one input: fitted on the first steps, scored on steps they did not see."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from gemopt import cores, interrupts
from gemopt.bounds import spread_bound
from gemopt.costs import CostModel, cost_of
from gemopt.evaluate import Evaluation, evaluate
from gemopt.exceptions import InputError, MissingPackageError, SolverError, UnsupportedError
from gemopt.placement import Placement
from gemopt.problem import problems
from gemopt.profile import Profile
from gemopt.result import Ceiling, LayerResult, Result, Status, StoppedBy, relative_gap
from gemopt.solve import solve
from gemopt.solvers import get
from gemopt.solvers.base import Options
from gemopt.tables import frame, html_rows
from gemopt.traces import Traces
from gemopt.words import counted

BASELINE = "linear"
BOUND_TOLERANCE = 1e-6
NOT_RUN = "not run: interrupted before"
BEFORE = {  # why an exact solver did not run
    StoppedBy.TIME_LIMIT: "its time was over before it began",
    StoppedBy.GAP: "the placement that it begins with is as close to the optimum as asked",
    StoppedBy.PROOF: "the placement that it begins with is proven optimal",
}
DEFAULT_SOLVERS = ("linear", "round-robin", "eplb", "lpt", "gem", "conflict", "local-search", "cpsat", "milp")


class Comparison(BaseModel):
    """One solver's row. Changes are fractions against contiguous placement; quantiles are of the scored steps.

    `status`, `stopped_by` and `note` are the solver's own; bound and gap are by the best bound of all rows, so that one
    that proves nothing may have a gap of 0.

    Scored steps are the held-out ones, or all when nothing is held out (`holdout_*` are None then).

    Who earned it: the solver searched on `reached_layers` of `layers`; the other layers have a greedy placement or, of
    exact solvers, that of the local search they start from. Exact solvers, over the layers reached: `start_us` before
    them and `added_us` that they took off it, with `stated_steps` of `distinct_steps` stated, and `own_bound_us` where
    they claim one of every layer. `ceiling`: what is left to gain, by the best bound, and what held-out steps lost.
    """

    model_config = ConfigDict(frozen=True)

    solver: str
    status: Status
    stopped_by: StoppedBy | None
    objective_us: float | None = None
    change: float | None = None
    bound_us: float | None = None
    gap: float | None = None
    seconds: float = 0.0
    holdout_us: float | None = None
    holdout_change: float | None = None
    p50_us: float | None = None
    p90_us: float | None = None
    p99_us: float | None = None
    outside: float = 0.0
    layers: int = 0
    reached_layers: int = 0
    start_us: float | None = None
    added_us: float | None = None
    stated_steps: int | None = None
    distinct_steps: int | None = None
    own_bound_us: float | None = None
    ceiling: Ceiling | None = None
    note: str = ""

    @property
    def ran(self) -> bool:
        """Whether any of the row is the solver's own; False as well where it only handed its start on."""
        return self.objective_us is not None and (self.reached_layers > 0 or self.layers == 0)

    def earned(self) -> str:
        """What the solver did to deserve its row, where that needs saying."""
        said = ["interrupted"] if self.stopped_by is StoppedBy.INTERRUPT and self.objective_us is not None else []
        if self.start_us is None:
            if self.reached_layers < self.layers:
                said.append(
                    f"cut before it searched on {self.layers - self.reached_layers} of {counted(self.layers, 'layer')}"
                )
            return ", ".join(said)
        if not self.ran:
            why = f": {BEFORE[self.stopped_by]}" if self.stopped_by in BEFORE else ""
            return ", ".join([*said, f"did not run{why}"])
        said.append(f"ran on {self.reached_layers} of {counted(self.layers, 'layer')}")
        if self.distinct_steps:
            said.append(f"on {self.stated_steps} of {self.distinct_steps} distinct steps")
        gain = 100 * (self.added_us or 0.0) / self.start_us if self.start_us else 0.0
        said.append(f"{gain:.2f} % below its start" if gain >= 0.005 else "added nothing to its start")
        own = self.own_bound_us
        said.append("no bound of its own" if own is None else f"own bound {own / 1e3:.4g} ms")
        if own is not None and self.status is Status.OPTIMAL:
            said[-1] += ", which proves the optimum"
        return ", ".join(said)


class Comparisons(list[Comparison]):
    """The rows of `compare`, one for each solver: a list, which notebooks show as a table."""

    def _repr_html_(self) -> str:
        def cells(field: str, digits: int, scale: float = 1.0, sign: str = "") -> list[str]:
            values = [getattr(row, field) if row.ran else None for row in self]
            return ["-" if value is None else f"{scale * value:{sign}.{digits}f}" for value in values]

        held = {"held out %": cells("holdout_change", 1, 100, "+z")}
        columns = {
            "solver": [row.solver for row in self],
            "total ms": cells("objective_us", 1, 1e-3),
            "change %": cells("change", 1, 100, "+z"),
            "bound ms": cells("bound_us", 1, 1e-3),
            "gap %": cells("gap", 2, 100),
            "time s": cells("seconds", 1),
            **(held if any(row.holdout_us is not None for row in self) else {}),
            **{f"p{q} us": cells(f"p{q}_us", 0) for q in (50, 90, 99)},
            "": [(row.note or row.status.value) if row.objective_us is None else row.earned() for row in self],
        }
        return html_rows("gemopt: solvers compared", columns)

    def to_dataframe(self) -> Any:
        """A pandas data frame with a row for each solver, and a column for every number.

        Raises
        ------
        MissingPackageError
            pandas is not installed.
        """
        rows = [row.model_dump(mode="json") for row in self]
        left = [row.pop("ceiling") or {} for row in rows]
        columns = {name: [row[name] for row in rows] for name in Comparison.model_fields if name != "ceiling"}
        return frame(columns | {f"ceiling.{name}": [each.get(name) for each in left] for name in Ceiling.model_fields})


def compare(
    profile: Profile | str | os.PathLike[str],
    traces: Traces | str | os.PathLike[str],
    *,
    solvers: Sequence[str] = DEFAULT_SOLVERS,
    holdout: float = 0.5,
    cost: str | CostModel = "auto",
    on_result: Callable[[Comparison, Result | None], None] | None = None,
    **options: Any,
) -> Comparisons:
    """Run every solver on the same input and score each placement.

    Parameters
    ----------
    profile, traces
        Objects or paths.
    holdout
        Share of the steps, the last ones, kept from the solvers and used to score; 0 scores the given steps.
    options
        Passed on to `gemopt.solve`: `time_limit`, `slots_per_rank`, `split`, `senders`, `seed`, `gap`, `patience`,
        `threads`, `allow_one_rank`, `notice`, `full_slots`, `topology`, `exchange`, `rules`.

    Notes
    -----
    The contiguous baseline uses the same slots per rank. A solver that cannot express the request gives a row that
    says so. The best bound proven by any solver holds for all of them and is what every gap is taken against. Ctrl-C
    ends the solver that runs with what it has, and leaves the ones after it out; their rows say so.
    """
    profile, traces = Profile.of(profile), Traces.of(traces)
    solvers = [solvers] if isinstance(solvers, str) else solvers
    if not solvers:
        raise InputError("solvers", solvers, "at least one")
    if (threads := options.get("threads")) is not None:
        cores.check(threads)
    fitted = cost_of(cost, profile)
    given, held = traces.split(holdout) if holdout else (traces, None)
    with interrupts.held() as interrupted, cores.at_most(threads or cores.available()):
        results: list[tuple[str, Result | None, str]] = []
        for name in solvers:
            results.append(_run(name, profile, given, fitted, interrupted, options))
            if on_result is not None:
                on_result(_row(*results[-1], None, None, 0.0), results[-1][1])
        if interrupted.is_set() and all(result is None for _, result, _ in results):
            raise KeyboardInterrupt(interrupted.number)
        return _rows(results, profile, given, held, fitted, options)


def _run(
    name: str, profile: Profile, given: Traces, cost: CostModel, interrupted: threading.Event, options: dict[str, Any]
) -> tuple[str, Result | None, str]:
    """One solver's name and result, or why there is none."""
    if interrupted.is_set():
        return name, None, NOT_RUN
    try:
        return name, solve(profile, given, solver=name, cost=cost, **options), ""
    except UnsupportedError as error:
        return name, None, "; ".join(filter(None, (error.limit, error.hint)))
    except MissingPackageError as error:
        return name, None, f"not run: {error}"
    except KeyboardInterrupt:  # while it was being prepared
        interrupted.set()
        return name, None, NOT_RUN


def _rows(
    results: list[tuple[str, Result | None, str]],
    profile: Profile,
    given: Traces,
    held: Traces | None,
    fitted: CostModel,
    options: dict[str, Any],
) -> Comparisons:
    bound = _best_bound([result for _, result, _ in results if result is not None])
    scored = given if held is None else held
    placement = _contiguous(given, fitted, options.get("slots_per_rank"))
    wired = {name: options.get(name) for name in ("topology", "exchange")}
    base_given = evaluate(placement, profile, given, cost=fitted, **wired).objective_us
    base_scored = (
        base_given if held is None else evaluate(placement, profile, scored, cost=fitted, **wired).objective_us
    )
    wanted = () if held is None or wired["topology"] is not None else (given, held)
    spreads_us = [_spread(steps, fitted) for steps in wanted]  # both whole: those of a result end with its time
    rows = Comparisons()
    for name, result, note in results:
        evaluation = None
        if result is not None and result.placement is not None:
            evaluation = evaluate(
                result.placement, profile, scored, cost=fitted, senders=options.get("senders"), **wired
            )
        row = _row(name, result, note, evaluation, base_given, bound)
        if held is not None and evaluation is not None:
            update: dict[str, Any] = {
                "holdout_us": evaluation.objective_us,
                "holdout_change": evaluation.objective_us / base_scored - 1 if base_scored else None,
            }
            if row.ceiling is not None and row.bound_us is not None and spreads_us:
                left = Ceiling.of(row.ceiling.objective_us, row.bound_us, spreads_us[0])
                update["ceiling"] = left.on(evaluation.objective_us, spreads_us[1])
            row = row.model_copy(update=update)
        rows.append(row)
    return rows


def _spread(traces: Traces, cost: CostModel) -> float:
    """What any number of copies take at least on these steps, in microseconds."""
    never = np.zeros(1, np.uint8)
    return sum(spread_bound(problem, never) for problem in problems(cost, traces))


def _best_bound(results: Sequence[Result]) -> float:
    """Largest proven bound; it holds for every placement, so one above anybody's objective is a defect."""
    best = max(results, key=lambda result: result.bound_us or 0.0, default=None)
    bound = 0.0 if best is None else best.bound_us or 0.0
    for result in results:
        if result.total_us is not None and bound > result.total_us * (1 + BOUND_TOLERANCE):
            raise SolverError(f"the bound {bound} of {best and best.solver} is above {result.solver}'s objective")
    return bound


def _contiguous(traces: Traces, cost: CostModel, slots_per_rank: object) -> Placement:
    """Contiguous placement of all layers in the slots asked for; it looks at no step."""
    first = problems(cost, traces.steps(slice(0, 1)), slots_per_rank)
    rows = [get(BASELINE).solve(problem, Options(deadline=np.inf), None).row for problem in first]
    return Placement(
        physical_to_logical=np.stack([row for row in rows if row is not None]),
        slots_per_rank=first[0].slots_per_rank,
        num_experts=traces.num_experts,
        layer_ids=list(traces.layer_ids),
        num_hidden_layers=traces.num_hidden_layers,
    )


def _row(
    name: str, result: Result | None, note: str, evaluation: Evaluation | None, base: float | None, bound: float
) -> Comparison:
    if result is None:
        stopped_by = StoppedBy.INTERRUPT if note == NOT_RUN else None
        return Comparison(solver=name, status=Status.UNKNOWN, stopped_by=stopped_by, note=note)
    value, total = result.objective_us, result.total_us
    best = None if total is None else min(max(bound, result.bound_us or 0.0), total)
    ceiling = None
    if total is not None and best is not None and result.ceiling is not None:
        ceiling = Ceiling.of(total, best, result.ceiling.spread_us)
    scored: dict[str, Any] = {}
    if evaluation is not None:
        scored = {f"p{q}_us": evaluation.quantile_us(q / 100) for q in (50, 90, 99)} | {"outside": evaluation.outside}
    return Comparison(
        solver=name,
        status=result.status,
        stopped_by=result.stopped_by,
        objective_us=value,
        change=None if value is None or not base else value / base - 1,
        bound_us=best,
        gap=relative_gap(total, best),
        seconds=result.seconds,
        ceiling=ceiling,
        note="; ".join(result.notes) or note,
        **scored,
        **_earned(result.per_layer),
    )


def _earned(per_layer: Sequence[LayerResult]) -> dict[str, Any]:
    """See `Comparison`."""
    reached = [layer for layer in per_layer if layer.reached]
    fields: dict[str, Any] = {"layers": len(per_layer), "reached_layers": len(reached)}
    if all(layer.start_us is None for layer in per_layer):
        return fields | {"reached_layers": sum(not layer.cut for layer in per_layer)}
    started = [layer for layer in reached if layer.start_us is not None]
    starts = [layer.start_us or 0.0 for layer in started]
    own = [layer.own_bound_us for layer in per_layer]
    return fields | {
        "start_us": sum(starts),
        "added_us": sum(starts) - sum(layer.objective_us or 0.0 for layer in started),
        "stated_steps": sum(layer.stated_steps or 0 for layer in reached),
        "distinct_steps": sum(layer.distinct_steps or 0 for layer in reached),
        "own_bound_us": None if None in own else sum(bound for bound in own if bound is not None),
    }

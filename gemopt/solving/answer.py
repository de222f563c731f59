"""From a call's run to its `Result`: every row re-checked, every bound held against its objective."""

from __future__ import annotations

import time
from functools import partial

import numpy as np

from gemopt.costs import CostModel, FitReport
from gemopt.evaluate import Evaluation, check, moves_us, objective, score, total_objective, with_links
from gemopt.exceptions import InputError, SolverError
from gemopt.latency import FloatArray
from gemopt.links.report import BytesSaved, LinksReport
from gemopt.placement import Placement, Split
from gemopt.problem import Problem
from gemopt.profile import Profile, profile_doubts, unit_doubt
from gemopt.result import (
    OPTIMALITY_TOLERANCE,
    Ceiling,
    Incumbent,
    LayerResult,
    Origin,
    Result,
    Status,
    StoppedBy,
    relative_gap,
)
from gemopt.solvers.base import Row
from gemopt.solving.layers import history, value_of
from gemopt.solving.moving import Moving
from gemopt.solving.schedule import Run
from gemopt.splits import plain
from gemopt.splits.senders import Senders
from gemopt.splits.weights import carried_weights, known_weights, remember_weights, static_weights
from gemopt.topology.doubts import doubts
from gemopt.traces import Traces
from gemopt.words import counted, gathered

ROUNDING = 1e-9
FEW_STEPS = 32  # of 11 a search fits the chances, of 128 hardly (docs/tracing.md)


def answer(
    run: Run,
    profile: Profile,
    traces: Traces,
    cost: CostModel,
    report: FitReport | None,
    moving: Moving | None,
    bound_us: float,
    senders: Senders,
    made: Origin,
) -> Result:
    """What the run found. `bound_us` is a bound on the total of all layers together, beyond those of each.

    Raises
    ------
    SolverError
        When a solver returned an infeasible row or a bound above what it bounds.
    """
    rows, problems = _rows(run, traces), [layer.problem for layer in run.layers]
    if rows is not None and moving is not None:
        rows = moving.settled(rows, problems, run.clock + run.time_limit, linked=run.coupling is not None)
    placement, scored, value = None, None, None
    if rows is not None:
        weights_LP = _weights(run, rows)
        placement = _placement(problems[0], rows, weights_LP, profile, traces)
        scored = score(rows, problems, cost.measured, weights_LP=weights_LP)
        if run.coupling is not None:
            scored = with_links(scored, run.coupling.links, rows, problems[0].slots_per_rank)
        value = scored.objective_us
    per_layer = [
        _layer_result(run, index, traces.layer_ids[index], scored, None if rows is None else rows[index])
        for index in range(len(run.layers))
    ]
    total = None if value is None else value + sum(layer.moves_us for layer in per_layer)
    bound = _bound(run, per_layer, bound_us, total)
    notes = [*_notes(run, per_layer), *_division(run, moving), *profile_doubts(profile, traces), *_wires(run, profile)]
    notes += [] if rows is None else _few_steps(traces)
    gap, base = relative_gap(total, bound), sum(layer.base_us for layer in run.layers)
    base += 0.0 if run.coupling is None else float(run.coupling.base_L.sum())
    over_time, report_of_moves = _history(run, total), None
    if moving is not None and rows is not None and value is not None:
        links = None if run.coupling is None else run.coupling.links
        before_us = moving.before_us(traces, cost, senders, links)
        report_of_moves = moving.report(rows, problems, value, before_us)
    return Result(
        solver=run.solver.name,
        status=_status(per_layer, gap),
        stopped_by=_stopped_by(per_layer),
        objective_us=value,
        bound_us=bound,
        gap=gap,
        change=value / base - 1 if value is not None and base > 0 else None,
        seconds=time.monotonic() - run.clock,
        num_steps=traces.num_steps,
        placement=placement,
        history=over_time,
        per_layer=per_layer,
        outside=0.0 if scored is None else scored.outside,
        cost=cost.name,
        cost_error=None if report is None or np.isnan(report.error) else report.error,
        cost_summary="" if report is None else report.summary(),
        notes=notes,
        moves=report_of_moves,
        links=_links(run, scored),
        origin=made,
        ceiling=None if total is None else Ceiling.of(total, bound, _spread(run)),
    )


def _placement(
    first: Problem, rows: list[Row], weights_LP: list[FloatArray] | None, profile: Profile, traces: Traces
) -> Placement:
    """The rows of all layers as a document; `first`: any layer's problem, for what all have in common."""
    return Placement(
        physical_to_logical=np.stack(rows),
        slots_per_rank=first.slots_per_rank,
        split=first.split,
        split_weights=None if weights_LP is None else np.stack(weights_LP),
        num_experts=traces.num_experts,
        layer_ids=list(traces.layer_ids),
        num_hidden_layers=traces.num_hidden_layers,
        model=traces.model or profile.model.name,
        device_uuids=profile.device_uuids if any(profile.device_uuids) else None,
    )


def _wires(run: Run, profile: Profile) -> list[str]:
    """What is hardly right about links, and about latencies that are added to theirs."""
    if run.coupling is None:
        return []
    return [*doubts(run.coupling.links.topology, profile.devices), *([said] if (said := unit_doubt(profile)) else [])]


def _spread(run: Run) -> float:
    """What all layers take at least with any number of copies."""
    each = [layer.spread_us for layer in run.layers]
    return sum(each) if run.coupling is None else sum(run.coupling.bound(n, us) for n, us in enumerate(each))


def _weights(run: Run, rows: list[Row]) -> list[FloatArray] | None:
    """What a placement with static weights stores; None for the other policies, which need none.

    Those that are known, or even ones, where the time is over.
    """
    if run.layers[0].problem.split is not Split.STATIC:
        return None
    found = []
    for layer, row in zip(run.layers, rows, strict=True):
        problem = layer.problem
        known = None if layer.outcome is None else value_of(layer.outcome)
        if layer.outcome is not None and layer.outcome.row is not None and layer.outcome.weights_P is not None:
            carried_P = carried_weights(problem, layer.outcome.row, layer.outcome.weights_P, row)
            if carried_P is not None:
                remember_weights(problem, row, carried_P)
        known_P = known_weights(problem, row) if time.monotonic() >= run.end else None
        weights_P = static_weights(problem, row) if known_P is None else known_P
        if known is not None and objective(problem, row, weights_P) + moves_us(problem, row) > known * (1 + ROUNDING):
            problem.weighed.pop(row.tobytes(), None)  # cut by the time when it was looked at again, or found elsewhere
            weights_P = min(weights_P, static_weights(problem, row), key=partial(objective, problem, row))
        found.append(weights_P)
    return found


def _links(run: Run, scored: Evaluation | None) -> LinksReport | None:
    if run.coupling is None or scored is None or scored.communication is None or scored.exposed_TL is None:
        return None
    return run.coupling.links.report(scored.communication, float(scored.exposed_TL.sum()), _saved(run, scored))


def _saved(run: Run, scored: Evaluation) -> BytesSaved | None:
    """What fewest bytes between nodes saved; None where they were not asked for."""
    coupling, problems = run.coupling, [layer.problem for layer in run.layers]
    if coupling is None or coupling.compute_slack is None or not coupling.alone or scored.communication is None:
        return None
    before, now = coupling.links.communication(coupling.alone, problems[0].slots_per_rank), scored.communication
    return BytesSaved(
        compute_slack=coupling.compute_slack,
        compute_us=(total_objective(problems, coupling.alone), scored.compute_us),
        cross_node_bytes=(before.cross_node_bytes, now.cross_node_bytes),
        fullest=(before.fullest_between, now.fullest_between),
    )


def _history(run: Run, total: float | None) -> list[Incumbent]:
    """Totals over time; with links, of what was found since they count. It ends with the total of the answer, which
    weights chosen last may lower, and which is all there is of solvers that make one placement, or heed no links."""
    found = history(run.layers, run.clock)
    if run.coupling is not None:
        found = [point.model_copy(update={"seconds": point.seconds - run.clock}) for point in run.coupling.history]
    if total is not None and (not found or total < found[-1].objective_us * (1 - ROUNDING)):
        found.append(Incumbent(seconds=time.monotonic() - run.clock, objective_us=total))
    return found


def _bound(run: Run, per_layer: list[LayerResult], bound_us: float, total: float | None) -> float:
    """The larger of the layers' bounds together and the bound on all of them, never above the total."""
    bound = max(float(sum(layer.bound_us or 0.0 for layer in per_layer)), bound_us)
    if total is None:
        return bound if np.isfinite(bound) else 0.0
    if bound > total * (1 + 1e2 * ROUNDING) + ROUNDING:
        raise SolverError(f"{run.solver.name}: bound {bound} above the total {total} of all layers")
    return min(bound, total)


def _rows(run: Run, traces: Traces) -> list[Row] | None:
    """The rows of all layers, each of them feasible, or None when one has none."""
    rows: list[Row] = []
    for layer, layer_id in zip(run.layers, traces.layer_ids, strict=True):
        if layer.outcome is None:
            raise SolverError(f"{run.solver.name} returned nothing for layer {layer_id}")
        if layer.outcome.row is None:
            continue
        try:
            check(layer.problem, layer.outcome.row, layer=layer_id)
        except InputError as error:
            raise SolverError(f"{run.solver.name} returned an infeasible row: {error}") from error
        rows.append(layer.outcome.row)
    return rows if len(rows) == len(run.layers) else None


def _layer_result(run: Run, index: int, layer_id: int, scored: Evaluation | None, row: Row | None) -> LayerResult:
    layer = run.layers[index]
    outcome = layer.outcome
    assert outcome is not None
    row = outcome.row if row is None else row
    value, total, bound = None, None, max(layer.bound_us, outcome.bound_us or 0.0)
    if run.coupling is not None:
        bound = run.coupling.bound(index, bound)
    price_us = 0.0 if row is None else moves_us(layer.problem, row)
    if row is not None:
        value = objective(layer.problem, row) if scored is None else float(scored.per_layer_us[index])
        total = value + price_us
        if bound > total * (1 + 1e2 * ROUNDING) + ROUNDING:
            raise SolverError(f"{run.solver.name}: bound {bound} above objective {total} in layer {layer_id}")
        bound = min(bound, total)
    gap = relative_gap(total, bound)
    status = Status.INFEASIBLE if outcome.infeasible else Status.UNKNOWN if value is None else Status.FEASIBLE
    stopped_by = outcome.stopped_by
    if gap is not None and gap <= OPTIMALITY_TOLERANCE:
        status, stopped_by = Status.OPTIMAL, StoppedBy.PROOF
    return LayerResult(
        layer_id=layer_id,
        status=status,
        stopped_by=stopped_by,
        objective_us=value,
        bound_us=bound,
        gap=gap,
        seconds=layer.seconds,
        note=outcome.note,
        reached=outcome.reached,
        start_us=outcome.start_us,
        own_bound_us=outcome.own_bound_us,
        stated_steps=outcome.stated_steps,
        distinct_steps=outcome.distinct_steps,
        bounded_steps=max(0, layer.bounded_steps),
        moves_us=price_us,
    )


def _division(run: Run, moving: Moving | None) -> list[str]:
    """What is to be known about a budget that layers share, unless a search over all of them spent it."""
    together = run.coupling is not None and run.solver.supports.links
    if moving is None or not moving.shared or moving.into_G is None or together:
        return []
    along = "best swaps and copies" if run.layers[0].problem.spare_slots else "best swaps"
    return [
        f"max_bytes_per_rank is divided among the layers along the {along}: another division may be better; the "
        "bound is that of each layer with all of it"
    ]


def _notes(run: Run, per_layer: list[LayerResult]) -> list[str]:
    """What people should know, each with the number of layers it is true of unless that is all of them."""
    count, notes = len(per_layer), gathered(layer.note for layer in per_layer if layer.note)
    said = [text if number == count else f"{number} of {count} layers: {text}" for text, number in notes]
    missed = sum(layer.cut for layer in per_layer)
    if missed:
        more = "" if _stopped_by(per_layer) is StoppedBy.INTERRUPT else ": more --time-limit would help"
        said.insert(0, f"{missed} of {counted(count, 'layer')} cut before the search began{more}")
    pairs = zip(run.layers, per_layer, strict=True)
    first = run.layers[0].problem
    if first.split is Split.OPTIMAL and first.spare_slots and not plain(first):
        said.append("with activated experts the optimal split is found by descent: another one may be better")
    weak = sum(layer.bound_cut and found.status is Status.FEASIBLE for layer, found in pairs)
    if weak:
        said.append(f"the bounds of {weak} of {count} layers were cut short: the gap may be smaller than it says")
    return said


def _few_steps(traces: Traces) -> list[str]:
    """A sentence on steps so few that the placement is fitted to who happened to meet whom in them."""
    if traces.num_steps >= FEW_STEPS:
        return []
    known = traces.tokens is not None and traces.tokens.request is not None
    more = "`gemopt trace regroup` makes more of the same requests" if known else "record more"
    return [f"fitted on {counted(traces.num_steps, 'step')}, on others it may do worse: {more}"]


def _status(per_layer: list[LayerResult], gap: float | None) -> Status:
    found = {layer.status for layer in per_layer}
    for status in (Status.INFEASIBLE, Status.UNKNOWN):
        if status in found:
            return status
    return Status.OPTIMAL if gap is not None and gap <= OPTIMALITY_TOLERANCE else Status.FEASIBLE


def _stopped_by(per_layer: list[LayerResult]) -> StoppedBy:
    reasons = {layer.stopped_by for layer in per_layer}
    order = (StoppedBy.INTERRUPT, StoppedBy.TIME_LIMIT, StoppedBy.ITERATIONS, StoppedBy.GAP, StoppedBy.PROOF)
    return next(reason for reason in order if reason in reasons)


def without(
    solver: str, clock: float, traces: Traces, note: str, made: Origin, stopped_by: StoppedBy = StoppedBy.PROOF
) -> Result:
    """The answer where there can be none, which is proven, or none was found."""
    return Result(
        solver=solver,
        status=Status.INFEASIBLE if stopped_by is StoppedBy.PROOF else Status.UNKNOWN,
        stopped_by=stopped_by,
        objective_us=None,
        bound_us=None,
        gap=None,
        seconds=time.monotonic() - clock,
        num_steps=traces.num_steps,
        placement=None,
        notes=[note],
        origin=made,
    )

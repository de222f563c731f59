"""`gemopt.solve`: profile and traces in, placement out. Wiring only; the algorithms are in `gemopt.solvers`."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gemopt import cores, interrupts
from gemopt.costs import CostModel, FitReport, fit
from gemopt.evaluate import Evaluation, check, check_agreement, objective, score
from gemopt.exceptions import InputError, SolverError
from gemopt.first_use import ready
from gemopt.placement import Placement
from gemopt.problem import Problem, problems
from gemopt.profile import Profile
from gemopt.result import OPTIMALITY_TOLERANCE, LayerResult, Result, Status, StoppedBy, relative_gap
from gemopt.schedule import Layer, Progress, Run, history
from gemopt.solvers import get, that_can
from gemopt.solvers.base import DEFAULT_PATIENCE, Row, require
from gemopt.traces import Traces

DEFAULT_TIME_LIMIT = 10.0
ROUNDING = 1e-9
ONE_RANK = "gemopt profile import --ranks N makes equal devices; --allow-one-rank if one is meant"


def solve(
    profile: Profile | str | os.PathLike[str],
    traces: Traces | str | os.PathLike[str],
    *,
    slots_per_rank: int | Sequence[int] | None = None,
    solver: str = "auto",
    time_limit: float | None = None,
    gap: float = 0.0,
    seed: int = 0,
    warm_start: Placement | str | os.PathLike[str] | None = None,
    cost: str | CostModel = "auto",
    patience: int | None = None,
    threads: int | None = None,
    allow_one_rank: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> Result:
    """Place the experts of every MoE layer so that the summed makespan over all steps and layers is smallest.

    Parameters
    ----------
    profile, traces
        Objects or paths. Every step given is used; select or split beforehand.
    slots_per_rank
        One number for all ranks or one per rank; just enough for one slot per expert when None.
    solver
        `auto` or a name from `gemopt.solvers.names()`.
    time_limit
        Wall seconds for the whole call, all layers; iterated solvers use all of it. None: at most 10, ending a layer
        early after a few tries without improvement. Compiling the kernels on first use comes on top. Where it is too
        short the answer is what was found, and `Result.notes` say what was cut.
    gap
        Stop a layer once `(objective - bound) / objective` is at most this.
    seed
        Same seed and same iterations: same trajectory.
    warm_start
        A placement to start from; a hint that never makes the answer worse.
    cost
        `auto`, a name known to `gemopt.costs.fit`, or a fitted cost model.
    patience
        Tries without improvement after which iterated solvers end a layer; 0 ends after one descent.
    threads
        Cores used, by layers solved at once, numerical libraries and exact solvers together; all when None.
    allow_one_rank
        Place all experts on one rank where the profile has but one; refused otherwise, as it is seldom meant.
    progress
        Called with (layers done, layers) from the calling thread.
    notice
        Called with a line when kernels are being compiled.

    Raises
    ------
    InputError
        When something given cannot be used or does not fit together.
    SolverError
        When a solver returned an infeasible row or a bound above the objective.
    KeyboardInterrupt
        On Ctrl-C while there is no answer yet; from then on it ends the call with what was found.
    """
    clock = time.monotonic()
    if time_limit is None:
        time_limit, patience = DEFAULT_TIME_LIMIT, DEFAULT_PATIENCE if patience is None else patience
    _check_numbers(time_limit, gap, threads, patience)
    chosen, threads = get(solver), threads or cores.available()
    with interrupts.held() as interrupted, cores.at_most(threads):
        with interrupts.raising(interrupted):  # there is no answer yet that could be kept
            profile = profile if isinstance(profile, Profile) else Profile.load(profile)
            traces = traces if isinstance(traces, Traces) else Traces.load(traces)
            cost, report = fit(profile, model=cost) if isinstance(cost, str) else (cost, None)
            if profile.num_ranks == 1 and not allow_one_rank:
                raise InputError(
                    "Profile.devices", "1 device", "at least 2: on one every placement is the same", ONE_RANK
                )
            layers = _layers(cost, profile, traces, slots_per_rank, warm_start, seed)
            require(chosen, layers[0].problem, that_can)
            clock += ready(chosen, layers[0].problem, notice)
        run = Run(chosen, layers, clock, time_limit, gap, patience, threads, progress, interrupted)
        with cores.at_most(max(1, threads // len(layers))):
            run.go()
        return _result(run, profile, traces, cost, report)


def _check_numbers(time_limit: float, gap: float, threads: int | None, patience: int | None) -> None:
    if not (np.isfinite(time_limit) and 0 < time_limit <= 1e7):
        raise InputError("time_limit", time_limit, "seconds above 0, at most 1e7")
    if not 0 <= gap < 1:
        raise InputError("gap", gap, "a fraction from 0 to below 1", "0.01 is one per cent")
    if threads is not None and threads < 1:
        raise InputError("threads", threads, "at least 1")
    if patience is not None and patience < 0:
        raise InputError("patience", patience, "at least 0")


def _layers(
    cost: CostModel,
    profile: Profile,
    traces: Traces,
    slots_per_rank: int | Sequence[int] | None,
    warm_start: Placement | str | os.PathLike[str] | None,
    seed: int,
) -> list[Layer]:
    nodes = [device.node for device in profile.devices]
    node_of_rank = [sorted(map(str, nodes)).index(str(node)) for node in nodes]
    each = problems(cost, traces, slots_per_rank, node_of_rank=node_of_rank)
    rows = _warm_rows(warm_start, each, traces)
    return [Layer(problem, row, seed + i) for i, (problem, row) in enumerate(zip(each, rows, strict=True))]


def _warm_rows(
    warm_start: Placement | str | os.PathLike[str] | None, layers: list[Problem], traces: Traces
) -> list[Row | None]:
    if warm_start is None:
        return [None] * len(layers)
    if not isinstance(warm_start, Placement):
        warm_start = Placement.load(Path(warm_start))
    check_agreement(warm_start, traces, layers[0].num_ranks)
    if (warm_start.slots_per_rank != layers[0].slots_per_rank).any():
        raise InputError(
            "warm_start", warm_start.slots_per_rank, f"slots per rank {layers[0].slots_per_rank.tolist()} are asked for"
        )
    return list(warm_start.physical_to_logical)


def _result(run: Run, profile: Profile, traces: Traces, cost: CostModel, report: FitReport | None) -> Result:
    rows = _rows(run, traces)
    placement, scored, value = None, None, None
    if rows is not None:
        placement = Placement(
            physical_to_logical=np.stack(rows),
            slots_per_rank=run.layers[0].problem.slots_per_rank,
            num_experts=traces.num_experts,
            layer_ids=list(traces.layer_ids),
            num_hidden_layers=traces.num_hidden_layers,
            model=traces.model or profile.model.name,
            device_uuids=profile.device_uuids if any(profile.device_uuids) else None,
        )
        scored = score(rows, [layer.problem for layer in run.layers], cost.measured)
        value = scored.objective_us
    per_layer = [_layer_result(run, index, traces.layer_ids[index], scored) for index in range(len(run.layers))]
    bound = float(sum(layer.bound_us or 0.0 for layer in per_layer))
    bound = bound if value is None else min(bound, value)
    gap, base = relative_gap(value, bound), sum(layer.base_us for layer in run.layers)
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
        history=history(run.layers, run.clock),
        per_layer=per_layer,
        outside=0.0 if scored is None else scored.outside,
        cost=cost.name,
        cost_error=None if report is None or np.isnan(report.error) else report.error,
        cost_summary="" if report is None else report.summary(),
        notes=_notes(run, per_layer),
    )


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


def _layer_result(run: Run, index: int, layer_id: int, scored: Evaluation | None) -> LayerResult:
    layer = run.layers[index]
    outcome = layer.outcome
    assert outcome is not None
    value, bound = None, max(layer.bound_us, outcome.bound_us or 0.0)
    if outcome.row is not None:
        value = objective(layer.problem, outcome.row) if scored is None else float(scored.per_layer_us[index])
        if bound > value * (1 + 1e2 * ROUNDING) + ROUNDING:
            raise SolverError(f"{run.solver.name}: bound {bound} above objective {value} in layer {layer_id}")
        bound = min(bound, value)
    gap = relative_gap(value, bound)
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
    )


def _notes(run: Run, per_layer: list[LayerResult]) -> list[str]:
    """What people should know, each with the number of layers it is true of unless that is all of them."""
    count, notes = len(per_layer), Counter(layer.note for layer in per_layer if layer.note)
    said = [
        text if number == count else f"{number} of {count} layers: {text}" for text, number in sorted(notes.items())
    ]
    missed = sum(not layer.reached for layer in per_layer)
    if missed:
        more = "" if _stopped_by(per_layer) is StoppedBy.INTERRUPT else ": more --time-limit would help"
        said.insert(0, f"{missed} of {count} layers were cut before their search began{more}")
    pairs = zip(run.layers, per_layer, strict=True)
    weak = sum(layer.bound_cut and found.status is not Status.OPTIMAL for layer, found in pairs)
    if weak:
        said.append(f"the bounds of {weak} of {count} layers were cut short: the gap may be smaller than it says")
    return said


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

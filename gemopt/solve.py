"""`gemopt.solve`: profile and traces in, placement out. Wiring only; the algorithms are in `gemopt.solvers`."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from gemopt.bounds import lower_bound
from gemopt.costs import CostModel, FitReport, fit
from gemopt.evaluate import check, evaluate, objective
from gemopt.exceptions import InputError, SolverError
from gemopt.placement import Placement
from gemopt.problem import Problem, problems
from gemopt.profile import Profile
from gemopt.result import OPTIMALITY_TOLERANCE, Incumbent, LayerResult, Result, Status, StoppedBy, relative_gap
from gemopt.solvers import get, that_can
from gemopt.solvers.base import DEFAULT_PATIENCE, Options, Outcome, Row, Solver, require
from gemopt.traces import Traces

DEFAULT_TIME_LIMIT = 10.0
WARM_SHARE = 0.5
ROUNDING = 1e-9
FIRST_USE_SECONDS = 2.0

Progress = Callable[[int, int], None]


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
    progress: Progress | None = None,
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
        early after a few tries without improvement. Compiling the kernels on first use comes on top.
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
        Layers solved at once; all cores when None.
    progress
        Called with (layers done, layers) from the calling thread.

    Raises
    ------
    InputError
        When something given cannot be used or does not fit together.
    SolverError
        When a solver returned an infeasible row or a bound above the objective.
    """
    clock = time.monotonic()
    if time_limit is None:
        time_limit, patience = DEFAULT_TIME_LIMIT, DEFAULT_PATIENCE if patience is None else patience
    _check_numbers(time_limit, gap, threads, patience)
    profile = profile if isinstance(profile, Profile) else Profile.load(profile)
    traces = traces if isinstance(traces, Traces) else Traces.load(traces)
    report = FitReport("given", {"given": float("nan")})
    if isinstance(cost, str):
        cost, report = fit(profile, model=cost)
    nodes = [device.node for device in profile.devices]
    layers = problems(cost, traces, slots_per_rank, node_of_rank=[sorted(map(str, nodes)).index(str(n)) for n in nodes])
    chosen = get(solver)
    require(chosen, layers[0], that_can)
    run = _Run(chosen, layers, _warm_rows(warm_start, layers, traces), clock, time_limit)
    run.gap, run.seed, run.patience, run.progress = gap, seed, patience, progress
    run.threads = threads or os.cpu_count() or 1
    run.go()
    return _result(run, profile, traces, cost, report)


def _check_numbers(time_limit: float, gap: float, threads: int | None, patience: int | None) -> None:
    if not (np.isfinite(time_limit) and 0 < time_limit <= 1e7):
        raise InputError("time_limit", time_limit, "seconds above 0")
    if not 0 <= gap < 1:
        raise InputError("gap", gap, "a fraction from 0 to below 1", "0.01 is one per cent")
    if threads is not None and threads < 1:
        raise InputError("threads", threads, "at least 1")
    if patience is not None and patience < 0:
        raise InputError("patience", patience, "at least 0")


def _warm_rows(
    warm_start: Placement | str | os.PathLike[str] | None, layers: list[Problem], traces: Traces
) -> list[Row | None]:
    if warm_start is None:
        return [None] * len(layers)
    if not isinstance(warm_start, Placement):
        warm_start = Placement.load(Path(warm_start))
    from gemopt.evaluate import check_agreement

    check_agreement(warm_start, traces, layers[0].num_ranks)
    if (warm_start.slots_per_rank != layers[0].slots_per_rank).any():
        raise InputError(
            "warm_start", warm_start.slots_per_rank, f"slots per rank {layers[0].slots_per_rank.tolist()} are asked for"
        )
    return list(warm_start.physical_to_logical)


@dataclass
class _Run:
    """All layers of one call: solved `threads` at a time, each with its share of what time is left."""

    solver: Solver
    layers: list[Problem]
    warm_rows: list[Row | None]
    clock: float
    time_limit: float
    gap: float = 0.0
    seed: int = 0
    patience: int | None = None
    threads: int = 1
    progress: Progress | None = None
    interrupted: threading.Event = field(default_factory=threading.Event)
    outcomes: list[Outcome | None] = field(default_factory=list)
    bounds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    started: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def go(self) -> None:
        """Solve all layers; on an interrupt, every layer still ends with what it has."""
        self._compile()
        count = len(self.layers)
        self.outcomes, self.bounds, self.seconds = [None] * count, [0.0] * count, [0.0] * count
        with ThreadPoolExecutor(min(self.threads, count)) as pool:
            open_layers: set[Future[None]] = {pool.submit(self._layer, index) for index in range(count)}
            while open_layers:
                try:
                    done, open_layers = wait(open_layers, timeout=0.2, return_when=FIRST_COMPLETED)
                except KeyboardInterrupt:
                    self.interrupted.set()
                    continue
                for future in done:
                    future.result()
                if self.progress is not None and done:
                    self.progress(count - len(open_layers), count)

    def _compile(self) -> None:
        """Compile the kernels on two steps of the first layer; where that takes long (first use), it is not counted."""
        begin, problem = time.monotonic(), self.layers[0]
        tiny = problem.select(np.argsort(problem.counts_TE.sum(axis=1), kind="stable")[-2:])
        lower_bound(tiny)
        if self.solver.supports.improves or self.solver.supports.proves:
            kernels = self.solver if self.solver.name == "gem" else get("local-search")
            kernels.solve(tiny, Options(deadline=np.inf, patience=1), None)
        elapsed = time.monotonic() - begin
        if elapsed > FIRST_USE_SECONDS:
            self.clock += elapsed

    def _layer(self, index: int) -> None:
        begin = time.monotonic()
        problem, row = self.layers[index], self.warm_rows[index]
        self.bounds[index] = lower_bound(problem)
        options = self._options(index)
        if row is None and self.solver.supports.proves and self.solver.name != "auto":
            row = self._own_start(problem, options)
        self.outcomes[index] = self.solver.solve(problem, options, row)
        self.seconds[index] = time.monotonic() - begin

    def _own_start(self, problem: Problem, options: Options) -> Row | None:
        """Exact solvers start from a short local search, as a person would have them do."""
        deadline = time.monotonic() + WARM_SHARE * options.remaining
        short = replace(options, deadline=deadline, patience=DEFAULT_PATIENCE)
        return get("local-search").solve(problem, short, None).row

    def _options(self, index: int) -> Options:
        with self.lock:
            self.started += 1
            waves = -(-(len(self.layers) - self.started + 1) // self.threads)
        left = self.clock + self.time_limit - time.monotonic()
        return Options(
            deadline=time.monotonic() + max(0.0, left) / waves,
            gap=self.gap,
            seed=self.seed + index,
            threads=max(1, self.threads // len(self.layers)),
            patience=self.patience,
            bound_us=self.bounds[index],
            stop=self.interrupted.is_set,
        )


def _result(run: _Run, profile: Profile, traces: Traces, cost: CostModel, report: FitReport) -> Result:
    per_layer = [_layer_result(run, index, traces.layer_ids[index]) for index in range(len(run.layers))]
    rows = [outcome.row for outcome in run.outcomes if outcome is not None and outcome.row is not None]
    bound = float(sum(layer.bound_us or 0.0 for layer in per_layer))
    placement, value, outside = None, None, 0.0
    if len(rows) == len(per_layer):
        placement = Placement(
            physical_to_logical=np.stack(rows),
            slots_per_rank=run.layers[0].slots_per_rank,
            num_experts=traces.num_experts,
            layer_ids=list(traces.layer_ids),
            num_hidden_layers=traces.num_hidden_layers,
            model=traces.model or profile.model.name,
            device_uuids=profile.device_uuids if any(profile.device_uuids) else None,
        )
        scored = evaluate(placement, profile, traces, cost=cost)
        value, outside = scored.objective_us, scored.outside
        bound = min(bound, value)
    gap = relative_gap(value, bound)
    error = None if np.isnan(report.error) else report.error
    return Result(
        solver=run.solver.name,
        status=_status(per_layer, gap),
        stopped_by=_stopped_by(per_layer),
        objective_us=value,
        bound_us=bound,
        gap=gap,
        seconds=time.monotonic() - run.clock,
        num_steps=traces.num_steps,
        placement=placement,
        history=_history(run),
        per_layer=per_layer,
        outside=outside,
        cost=cost.name,
        cost_error=error,
        notes=sorted({layer.note for layer in per_layer if layer.note}),
    )


def _layer_result(run: _Run, index: int, layer_id: int) -> LayerResult:
    problem, outcome = run.layers[index], run.outcomes[index]
    if outcome is None:
        raise SolverError(f"{run.solver.name} returned nothing for layer {layer_id}")
    value, bound = None, max(run.bounds[index], outcome.bound_us or 0.0)
    if outcome.row is not None:
        try:
            check(problem, outcome.row, layer=layer_id)
        except InputError as error:
            raise SolverError(f"{run.solver.name} returned an infeasible row: {error}") from error
        value = objective(problem, outcome.row)
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
        seconds=run.seconds[index],
        note=outcome.note,
    )


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


def _history(run: _Run) -> list[Incumbent]:
    """Total objective over time, from when every layer has an incumbent."""
    events = sorted(
        (point.seconds, index, point.objective_us)
        for index, outcome in enumerate(run.outcomes)
        if outcome is not None
        for point in outcome.history
    )
    best: dict[int, float] = {}
    history: list[Incumbent] = []
    for seconds, index, value in events:
        best[index] = min(value, best.get(index, np.inf))
        if len(best) == len(run.layers):
            total = float(sum(best.values()))
            if not history or total < history[-1].objective_us:
                history.append(Incumbent(seconds=seconds - run.clock, objective_us=total))
    return history

"""`gemopt.solve`: profile and traces in, placement out. Wiring only; the algorithms are in `gemopt.solvers`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from gemopt import cores, interrupts
from gemopt.certify import certify
from gemopt.costs import CostModel, cost_of, fit
from gemopt.evaluate import check_agreement
from gemopt.exceptions import InputError
from gemopt.links import Exchange, Links
from gemopt.migration import size_doubts
from gemopt.placement import GivenPlacement, Placement, Split
from gemopt.problem import Problem, problems
from gemopt.profile import Profile
from gemopt.resize import Source
from gemopt.result import Result, StoppedBy
from gemopt.rules import Rules
from gemopt.solvers import hurried, that_can
from gemopt.solvers.base import DEFAULT_PATIENCE, Outcome, Row, Solver, require
from gemopt.solving.answer import answer, without
from gemopt.solving.cluster import Cluster
from gemopt.solving.coupled import check_slack, go_coupled, links_of, refuse_split
from gemopt.solving.first_use import ready, unlike
from gemopt.solving.layers import Layer
from gemopt.solving.memory import experts_within, slots_within, solve_within
from gemopt.solving.moving import Asked, Moving
from gemopt.solving.options import check_options, split_of
from gemopt.solving.origin import origin
from gemopt.solving.rounds import solve_shared
from gemopt.solving.ruled import Ruled, eased, keeping
from gemopt.solving.schedule import OnLayers, Progress, Run
from gemopt.splits.senders import Senders
from gemopt.splits.weights import remember_weights
from gemopt.topology import Topology
from gemopt.traces import Traces
from gemopt.words import counted

DEFAULT_TIME_LIMIT = 10.0
ONE_RANK = "gemopt profile import --ranks N makes equal devices; --allow-one-rank if one is meant"


def solve(
    profile: Profile | str | os.PathLike[str],
    traces: Traces | str | os.PathLike[str],
    *,
    slots_per_rank: int | Sequence[int] | None = None,
    split: Split | str | None = None,
    senders: Senders | str | None = None,
    full_slots: bool = False,
    memory_budget: float | Sequence[float] | None = None,
    solver: str = "auto",
    time_limit: float | None = None,
    gap: float = 0.0,
    seed: int = 0,
    warm_start: GivenPlacement | None = None,
    cost: str | CostModel = "auto",
    patience: int | None = None,
    threads: int | None = None,
    allow_one_rank: bool = False,
    current: GivenPlacement | None = None,
    move_price: float | None = None,
    expert_bytes: int | None = None,
    bandwidth: float | None = None,
    horizon_steps: float | None = None,
    max_moves: int | None = None,
    max_moves_per_layer: int | None = None,
    max_bytes_per_rank: float | None = None,
    exclude_ranks: Sequence[int] | None = (),
    add_ranks: Sequence[Source] | None = (),
    topology: Topology | str | os.PathLike[str] | None = None,
    exchange: Exchange | None = None,
    compute_slack: float | None = None,
    rules: Rules | str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    on_layers: OnLayers | None = None,
    notice: Callable[[str], None] | None = None,
    certificate: str | os.PathLike[str] | None = None,
) -> Result:
    """Place the experts of every MoE layer so that the summed makespan over all steps and layers is smallest.

    Parameters
    ----------
    profile, traces
        Objects or paths. Every step given is used; select or split beforehand.
    slots_per_rank
        One number for all ranks or one per rank; just enough for one slot per expert when None.
    split
        How copies share their expert's assignments: `even`, `static` (weights chosen here), `nearest` or `optimal`
        (anew at every step). Default: that of `current`, else even.
    senders
        Who sends the assignments, for `nearest`: `traces` (the default) or `uniform`; see `gemopt.evaluate`.
    full_slots
        Whether every slot must hold an expert, as most engines want it; slots that do not help stay empty otherwise.
    memory_budget
        Bytes of experts that each device may hold over all layers, one number or one per rank. Spent on the copies that
        gain most; `slots_per_rank` is then the most that one layer may use. Needs `expert_bytes`.
    solver
        `auto` or a name from `gemopt.solvers.names()`.
    time_limit
        Wall seconds for the whole call, all layers; iterated solvers use all of it. None: at most 10, ending a layer
        early after a few tries without improvement. Loading or compiling the kernels on first use comes on top. Where
        it is too short the answer is what was found, and `Result.notes` say what was cut.
    gap
        Stop a layer once `(objective - bound) / objective` is at most this.
    seed
        Same seed and same `patience`: same trajectory. Under a time limit alone the clock cools local search.
    warm_start
        A placement to start from; a hint that never makes the answer worse.
    cost
        `auto`, a name known to `gemopt.costs.fit`, or a fitted cost model.
    patience
        Tries without improvement after which iterated solvers end a layer; 0 ends after one descent.
    threads
        Cores used, by layers solved at once, numerical libraries and exact solvers together; all when None. Within
        `joblib.parallel_config("dask")` and the like, layers go to the workers of that backend instead.
    allow_one_rank
        Place all experts on one rank where the profile has but one; refused otherwise, as it is seldom meant.
    current
        The placement in force. Its slots are the default of `slots_per_rank`. Without a price or a limit the answer is
        found freely; then ranks of equal latency and slots change roles so that fewest experts move at no larger
        objective (not with a topology), and experts that stay on their rank keep their slot. `Result.moves` says more.
    move_price
        Microseconds that moving one expert of one layer takes, once. It must be paid within the horizon: every move
        adds this price times the given steps over `horizon_steps` to what is minimised.
    expert_bytes, bandwidth
        Bytes of one expert of one layer (default: what the profile says), and GB/s (10^9 bytes per second) at which a
        rank receives them: instead of `move_price`, bytes over bandwidth.
    horizon_steps
        Steps that the placement is expected to serve; the given steps when None.
    max_moves, max_moves_per_layer
        Experts moved at most, over all layers (spent where they gain most) and in each layer.
    max_bytes_per_rank
        Bytes that each rank may receive, over all layers.
    exclude_ranks, add_ranks
        Ranks of `current` that serve no longer, and new ones: see `gemopt.resize`. Without a price or a limit each
        layer then makes the moves that this asks for, and no more: experts without another copy, those whose slots
        `slots_per_rank` takes away, and as many as new ranks have slots.
    topology, exchange
        Links between the ranks (a document, its path, or a name such as `2x8-ib400`), and how tokens are exchanged over
        them. What is minimised then holds what dispatch and combine add; see `gemopt.links` and `Result.links`.
    compute_slack
        With a topology of several nodes: instead of time, minimise the bytes between nodes among placements whose
        summed makespans are at most by this part above those found without heeding links (0.005: half a per cent).
        `Result.links.saved` says what that saved. Objective, bound and gap stay those of the time.
    rules
        What every placement must keep (`gemopt.Rules`): experts pinned, kept off, apart or together. Default: those of
        `current`, else of `warm_start`; `Rules()` are none. The placement keeps a copy of them. Rules that cannot be
        kept make the result infeasible, and `Result.notes` name those in conflict. A warm start is changed until it
        keeps them. With `exclude_ranks` and `add_ranks` they name ranks as `current` does, new ones after those.
    progress
        Called with (layers done, layers) from the calling thread.
    on_layers
        Called now and then from the calling thread with how each layer stands: its objective so far (None before there
        is one) and its bound, in microseconds.
    notice
        Called with a line before what takes long: compiling (None: on a terminal's standard error), big certificates.
    certificate
        Where to write what was proved (`gemopt.certificate`), for `gemopt verify`; its multipliers go beside it.

    Raises
    ------
    InputError
        When something given cannot be used or does not fit together.
    SolverError
        When a solver returned an infeasible row or a bound above the objective.
    KeyboardInterrupt
        On Ctrl-C while there is no answer yet; from then on it ends the call with what was found.
    """
    given = dict(locals())
    chosen = check_options(given)  # loads the solver, which takes seconds where the disk is slow: before the clock runs
    if time_limit is None:
        time_limit, patience = DEFAULT_TIME_LIMIT, DEFAULT_PATIENCE if patience is None else patience
    asked = Asked(
        current, move_price, None if memory_budget is not None else expert_bytes, bandwidth, horizon_steps,
        max_moves, max_moves_per_layer, max_bytes_per_rank, exclude_ranks, add_ranks,
    )  # fmt: skip
    threads, cluster, clock = int(threads or cores.available()), Cluster.in_force(), time.monotonic()
    with (
        interrupts.held() as interrupted,
        cores.at_most(threads),
        hurried.call(clock + time_limit, interrupted.is_set),
    ):
        with interrupts.raising(interrupted):  # there is no answer yet that could be kept
            profile, traces = Profile.of(profile), Traces.of(traces)
            made = origin(solve, given, profile, traces)
            moving = Moving.of(asked, profile, traces)
            links = links_of(topology, traces, profile, exchange)
            check_slack(compute_slack, links)
            if moving is not None:
                profile = moving.resized.profile
                if slots_per_rank is None:
                    slots_per_rank = moving.resized.slots_per_rank.tolist()
                if (missing := moving.missing_slots(slots_per_rank)) > 0:
                    return without(solver, clock, traces, _without_slots(traces, moving, missing), made)

            cost, report = fit(profile, model=cost) if isinstance(cost, str) else (cost_of(cost, profile), None)
            _check_ranks(profile, cost, allow_one_rank=allow_one_rank)
            size, held_G = expert_bytes or profile.model.expert_bytes, None
            if memory_budget is not None:
                held_G = experts_within(memory_budget, size, profile.num_ranks)
                held_G, slots_per_rank = slots_within(held_G, slots_per_rank, traces.num_layers, traces.num_experts)
            told = memory_budget is not None or moving is not None
            doubts = size_doubts(size if told else None, bandwidth, max_bytes_per_rank)

            policy, senders = _policy(split, senders, moving)
            free = problems(
                cost, traces, slots_per_rank,
                node_of_rank=profile.node_of_rank, split=policy, senders=senders, full=full_slots,
            )  # fmt: skip

            if (asked_rules := Ruled.of(rules, moving, warm_start, profile, links)).impossible:
                return without(solver, clock, traces, asked_rules.impossible, made)
            clock += asked_rules.load()
            each = asked_rules.apply(free if moving is None else moving.apply(free), traces)
            each, note, reason = eased(each, moving, traces.layer_ids, clock + time_limit)
            if reason is not None:
                return without(solver, clock, traces, note, made, reason)

            if moving is not None:
                moving.suggest_weights(each)
            layers = _layers(chosen, each, traces, warm_start, seed)
            first = layers[0].problem
            refuse_split(topology, policy if first.spare_slots else Split.EVEN, moving, asked=split is not None)
            for problem in unlike(each):
                clock += ready(chosen, problem, notice, links, budget=held_G is not None, compute_slack=compute_slack,
                               time_limit=time_limit)  # fmt: skip
                clock += 0.0 if cluster is None else cluster.ready(chosen, problem, interrupted)
        run = Run(
            chosen, layers, clock, time_limit, gap, patience, threads, progress, interrupted,
            cluster=cluster, on_layers=on_layers, scored=1 if moving is None else 2,
        )  # fmt: skip
        with cores.at_most(threads if len(layers) == 1 else 1), hurried.call(clock + time_limit, interrupted.is_set):
            bound_us = _go(run, held_G, moving, links, compute_slack)
        result = asked_rules.stamped(
            answer(run, profile, traces, cost, report, moving, bound_us, senders, made), note, *doubts
        )
        if certificate is not None and result.placement is not None:
            if notice is not None and any(layer.together is not None for layer in layers):
                notice(f"checking in whole numbers what the certificate of {counted(len(layers), 'layer')} states")
            certify(result, layers, profile, traces, cost, interrupted.is_set).write(certificate)
        return result


def _go(
    run: Run, held_G: NDArray[np.int64] | None, moving: Moving | None, links: Links | None, compute_slack: float | None
) -> float:
    """Solve the layers by what couples them, if anything; returns a bound on their total beyond those of each."""
    try:
        if held_G is not None:
            solve_within(run, held_G)
        elif links is not None:
            return go_coupled(run, links, compute_slack, moving)
        elif moving is not None and moving.shared:
            return solve_shared(run, moving)
        else:
            run.go()
    except hurried.OutOfTimeError as late:
        if late.stopped_by is StoppedBy.INTERRUPT:
            assert isinstance(run.interrupted, interrupts.Interrupted)
            raise KeyboardInterrupt(run.interrupted.number) from None
        for layer in run.layers:
            layer.outcome = Outcome(None, late.stopped_by, note=str(late), reached=False)
    return 0.0


def _without_slots(traces: Traces, moving: Moving, missing: int) -> str:
    """That the ranks have fewer slots than there are experts."""
    return (
        f"infeasible: {traces.num_experts} experts need a slot each, the {len(moving.resized.old_rank)} ranks left "
        f"have {traces.num_experts - missing}: {missing} slots are missing; more --slots-per-rank, or --add-rank"
    )


def _check_ranks(profile: Profile, cost: CostModel, *, allow_one_rank: bool) -> None:
    if profile.num_ranks == 1 and not allow_one_rank:
        raise InputError("Profile.devices", "1 device", "at least 2: on one every placement is the same", ONE_RANK)
    if len(cost.latencies) != profile.num_ranks:
        raise InputError("cost", f"{len(cost.latencies)} ranks", f"{profile.num_ranks} ranks serve", "fit it for them")


def _policy(split: Split | str | None, senders: object, moving: Moving | None) -> tuple[Split, Senders]:
    """The split asked for, else that of the placement in force, else even; and who sends."""
    chosen = split_of(split) or Split.EVEN
    if split is None and moving is not None:
        chosen = moving.current.split
    return chosen, Senders.asked_by(senders, chosen)


def _layers(
    solver: Solver,
    each: list[Problem],
    traces: Traces,
    warm_start: GivenPlacement | None,
    seed: int,
) -> list[Layer]:
    """The layers, each with its warm start, of problems that the solver can express."""
    for problem in each:
        require(solver, problem, that_can)
    rows = _warm_rows(warm_start, each, traces)
    return [Layer(problem, row, seed + i) for i, (problem, row) in enumerate(zip(each, rows, strict=True))]


def _warm_rows(warm_start: GivenPlacement | None, layers: list[Problem], traces: Traces) -> list[Row | None]:
    if warm_start is None:
        return [None] * len(layers)
    warm_start = Placement.of(warm_start, "warm_start")
    check_agreement(warm_start, traces, layers[0].num_ranks)
    if (warm_start.slots_per_rank != layers[0].slots_per_rank).any():
        raise InputError(
            "warm_start", warm_start.slots_per_rank, f"slots per rank {layers[0].slots_per_rank.tolist()} are asked for"
        )
    if warm_start.split is Split.STATIC and warm_start.split_weights is not None and layers[0].split is Split.STATIC:
        for problem, row, weights_P in zip(
            layers, warm_start.physical_to_logical, warm_start.split_weights, strict=True
        ):
            remember_weights(problem, row, weights_P)
    return [keeping(problem, row) for problem, row in zip(layers, warm_start.physical_to_logical, strict=True)]

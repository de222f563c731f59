"""A run whose ranks are linked: layer by layer first, then all layers together, with what exchanging tokens takes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import cast

import numpy as np

from gemopt.bounds.links import links_bound
from gemopt.evaluate import linked_total, rank_times
from gemopt.exceptions import InputError, UnsupportedError
from gemopt.latency import FloatArray
from gemopt.links import Exchange, Links, check_asked
from gemopt.placement import Split
from gemopt.problem import Problem
from gemopt.profile import Profile
from gemopt.result import StoppedBy
from gemopt.solvers import get
from gemopt.solvers.base import LinkedSolver, Options, Row, within_budget
from gemopt.solvers.exact.joint import check_stated
from gemopt.solving.layers import Coupling, Layer
from gemopt.solving.moving import Moving
from gemopt.solving.rounds import solve_shared
from gemopt.solving.schedule import Run
from gemopt.solving.shares import SCORE_SHARE
from gemopt.topology import Topology
from gemopt.traces import Traces

LAYER_SHARE = 0.4  # of the time goes to the layers one by one


def go_coupled(run: Run, links: Links, compute_slack: float | None, moving: Moving | None) -> float:
    """Solve a run, and couple its layers; returns a bound on the total.

    On return every layer has its answer, and the run its `coupling`. Solvers that do not heed links are only scored
    with them. compute_slack: as in `gemopt.solve`.
    """
    shared = moving is not None and moving.shared
    limit, heeds, begin = run.time_limit, run.solver.supports.links, time.monotonic()
    problems = [layer.problem for layer in run.layers]
    if heeds and run.exact:
        check_stated(run.solver.name, problems, links)
    base_L, bound_L = _base(problems, links), links_bound(problems, links)
    now = time.monotonic()
    kept = min(SCORE_SHARE * limit, 2 * (now - begin))  # to count what is found last, and what the answer then is
    left = max(0.0, run.clock + limit - kept - now)
    run.time_limit = now - run.clock + (LAYER_SHARE if heeds else 1.0) * left
    alone_us = 0.0
    if shared:
        assert moving is not None
        alone_us = solve_shared(run, moving)
    else:
        run.go()
    run.time_limit = limit
    run.coupling = Coupling(links, bound_L, base_L, compute_slack)
    bound_us = alone_us if links.exchange.overlap else alone_us + float(bound_L.sum())
    if heeds:
        return max(bound_us, _together(run, links, run.clock + limit - kept, moving, bound_us))
    for outcome in (each.outcome for each in run.layers if each.outcome is not None and not each.outcome.infeasible):
        if outcome.stopped_by in (StoppedBy.PROOF, StoppedBy.GAP):  # of the makespans alone
            outcome.stopped_by = StoppedBy.ITERATIONS
    return bound_us


def _base(problems: Sequence[Problem], links: Links) -> FloatArray:
    """[L] microseconds that the links add to contiguous placement."""
    found = [get("linear").solve(problem, Options(deadline=np.inf), None).row for problem in problems]
    rows = [row for row in found if row is not None]
    if len(rows) < len(problems):
        return np.zeros(len(problems))
    makespan_TL = np.stack([rank_times(p, row).max(axis=1) for p, row in zip(problems, rows, strict=True)], 1)
    sent = links.communication(rows, problems[0].slots_per_rank)
    return np.asarray(sent.exposed(makespan_TL, overlap=links.exchange.overlap).sum(axis=0))


def _together(run: Run, links: Links, deadline: float, moving: Moving | None, bound_us: float) -> float:
    """The search over all layers, from what each found alone; returns what it proved of the total.

    bound_us: known of the total. Where that is better, the search begins with the placement in force.
    """
    rows = [layer.outcome.row for layer in run.layers if layer.outcome is not None and layer.outcome.row is not None]
    if len(rows) < len(run.layers) or run.coupling is None:
        return 0.0
    problems = [layer.problem for layer in run.layers]
    options = Options(
        deadline=deadline,
        gap=run.gap,
        seed=run.layers[0].seed,
        threads=run.threads,
        patience=run.patience,
        bound_us=max(bound_us, sum(run.coupling.bound(n, layer.bound_us) for n, layer in enumerate(run.layers))),
        stop=run.interrupted.is_set,
        compute_slack=run.coupling.compute_slack,
        budget=None if moving is None else moving.together,
    )
    if moving is not None:
        rows = rows if moving.heeded else moving.settled(rows, problems, deadline)
        home = moving.at_home(problems) if options.compute_slack is None else None
        if home is not None and within_budget(problems, home, options.budget):
            rows = min(rows, home, key=lambda each: linked_total(problems, each, links))
    run.coupling.alone = rows
    begin = time.monotonic()
    found = cast(LinkedSolver, run.solver).solve_linked(problems, links, rows, options)
    run.coupling.history = found.history
    for layer, row in zip(run.layers, found.rows, strict=True):
        _take(layer, row, (time.monotonic() - begin) / len(rows))
        assert layer.outcome is not None
        layer.outcome.stopped_by, layer.outcome.note = found.stopped_by, found.note
    return found.bound_us


def _take(layer: Layer, row: Row, seconds: float) -> None:
    """A layer's row from the search over all layers; what was proven of it alone still holds as a bound."""
    assert layer.outcome is not None
    layer.bound_us = max(layer.bound_us, layer.outcome.bound_us or 0.0)
    layer.outcome.row, layer.outcome.bound_us = row, None
    layer.outcome.start_us = layer.outcome.own_bound_us = None
    layer.seconds += seconds


def links_of(
    topology: Topology | str | os.PathLike[str] | None, traces: Traces, profile: Profile, exchange: Exchange | None
) -> Links | None:
    """The links that a call asks for; None without a topology."""
    check_asked(exchange, topology)
    if topology is None:
        return None
    return Links.of(topology, traces, profile.num_ranks, profile=profile, exchange=exchange)


def check_slack(compute_slack: float | None, links: Links | None) -> None:
    """Refuse a slack of compute without links between nodes to spare."""
    if compute_slack is not None and links is not None and links.topology.num_nodes == 1:
        raise InputError("compute_slack", compute_slack, "is given up for fewer bytes between nodes, and there is one")


def refuse_split(topology: object, split: Split, moving: Moving | None, *, asked: bool) -> None:
    """With a topology copies share evenly. asked: whether the caller chose the split, or the placement in force.

    What that takes must be known as well.
    """
    if topology is None:
        return
    if split is not Split.EVEN:
        chosen = f"with split {split.value}{'' if asked else ' of current'}"
        raise UnsupportedError("topology", chosen, "copies share evenly where links are weighed", "give --split even")
    live = Split.EVEN if moving is None or not moving.current.has_copies else moving.current.split
    if live not in (Split.EVEN, Split.STATIC):
        limit = "of copies that share so it is not known what they send"
        raise UnsupportedError("topology", f"with split {live.value} of current", limit, "leave one out")


def refuse_with_links(topology: object, **asked: object) -> None:
    """With a topology, what is not weighed against links is refused by its name."""
    for name, value in asked.items():
        if topology is not None and value is not None:
            raise UnsupportedError("topology", f"with {name}", f"{name} is not weighed against links", "leave one out")

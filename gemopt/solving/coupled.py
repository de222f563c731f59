"""A run whose ranks are linked: layer by layer first, then all layers together, with what exchanging tokens takes."""

from __future__ import annotations

import os
import time
from typing import cast

import numpy as np

from gemopt.bounds.links import links_bound
from gemopt.evaluate import rank_times
from gemopt.exceptions import InputError, UnsupportedError
from gemopt.links import Exchange, Links
from gemopt.profile import Profile
from gemopt.solvers import get
from gemopt.solvers.base import LinkedSolver, Options, Row
from gemopt.solvers.exact.joint import check_stated
from gemopt.solving.layers import Coupling, Layer
from gemopt.solving.schedule import Run
from gemopt.topology import Topology
from gemopt.traces import Traces

LAYER_SHARE = 0.4  # of the time goes to the layers one by one


def go_coupled(run: Run, links: Links) -> float:
    """Solve a run, and couple its layers; returns a bound on the total.

    On return every layer has its answer, and the run its `coupling`. Solvers that do not heed links are only scored
    with them.
    """
    limit, heeds = run.time_limit, run.solver.supports.links
    if heeds and run.exact:
        check_stated(run.solver.name, [layer.problem for layer in run.layers], links)
    run.time_limit = LAYER_SHARE * limit if heeds else limit
    run.go()
    run.time_limit = limit
    problems = [layer.problem for layer in run.layers]
    base = [get("linear").solve(problem, Options(deadline=np.inf), None).row for problem in problems]
    base_rows = [row for row in base if row is not None]
    base_L = np.zeros(len(problems))
    if len(base_rows) == len(problems):
        makespan_TL = np.stack([rank_times(p, row).max(axis=1) for p, row in zip(problems, base_rows, strict=True)], 1)
        sent = links.communication(base_rows, problems[0].slots_per_rank)
        base_L = sent.exposed(makespan_TL, overlap=links.exchange.overlap).sum(axis=0)
    run.coupling = Coupling(links, links_bound(problems, links), base_L)
    return _together(run, links) if heeds else 0.0


def _together(run: Run, links: Links) -> float:
    """The search over all layers, from what each found alone; returns what it proved of the total."""
    rows = [layer.outcome.row for layer in run.layers if layer.outcome is not None and layer.outcome.row is not None]
    if len(rows) < len(run.layers) or run.coupling is None:
        return 0.0
    problems = [layer.problem for layer in run.layers]
    options = Options(
        deadline=run.clock + run.time_limit,
        gap=run.gap,
        seed=run.layers[0].seed,
        threads=run.threads,
        patience=run.patience,
        bound_us=sum(run.coupling.bound(n, layer.bound_us) for n, layer in enumerate(run.layers)),
        stop=run.interrupted.is_set,
    )
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
    if topology is None:
        if exchange is not None:
            raise InputError("exchange", repr(exchange), "says how tokens go over links", "give a topology")
        return None
    return Links.of(topology, traces, profile.num_ranks, profile=profile, exchange=exchange)


def refuse_with_links(topology: object, **asked: object) -> None:
    """With a topology, what is not weighed against links is refused by its name."""
    for name, value in asked.items():
        if topology is not None and value is not None:
            raise UnsupportedError("topology", f"with {name}", f"{name} is not weighed against links", "leave one out")

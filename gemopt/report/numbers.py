"""Numbers behind the pictures, computed once with the solver-free evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemopt.bounds import spread_bounds, timed_step_bounds, weighted
from gemopt.evaluate import Evaluation, loads, rank_times
from gemopt.latency import ASSIGNMENTS, FloatArray, IntArray
from gemopt.migration import Link, moves, relabel
from gemopt.placement import Placement, Split
from gemopt.problem import Problem, each_problem
from gemopt.report.inputs import Inputs
from gemopt.solvers.base import Options
from gemopt.splits.senders import Senders

CELLS = 3000  # of a heat map: ranks times windows
MOST_WINDOWS = 120
BOUND_SECONDS = 8.0
DRAWS = 1000
NEVER = np.zeros(1, np.uint8)
LEAST_STEPS = 20  # below which a quantile has no interval
QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, eq=False)
class Side:
    """One placement on the fitted steps. Index 0 of `1+L` is all layers together, then the layers in order.

    evaluation: what it costs. busy: [1+L, W, G] mean share of the makespan that a rank works, 0 to 1. load: [1+L, W, G]
    mean assignments per step. makespan_us: [1+L, W] mean per step. straggler: [1+L, W] rank that was slowest most
    often, and straggler_share: how often. most: assignments of the fullest rank at any
    step and layer.
    """

    evaluation: Evaluation
    busy: FloatArray
    load: FloatArray
    makespan_us: FloatArray
    straggler: IntArray
    straggler_share: FloatArray
    most: float


@dataclass(frozen=True, eq=False)
class Bounds:
    """[L] lower bounds in microseconds over all fitted steps, whose they are, and what to know of them."""

    per_layer_us: FloatArray
    said: str


def windows(num_steps: int, num_ranks: int) -> IntArray:
    """[W+1] first steps of the windows that a heat map shows, and the end."""
    most = min(num_steps, MOST_WINDOWS, max(16, CELLS // num_ranks))
    length = -(-num_steps // most)
    return np.append(np.arange(0, num_steps, length), num_steps)


def layers(inputs: Inputs, placement: Placement) -> Iterator[Problem]:
    """The layers' problems on the fitted steps, copies sharing as the placement says."""
    return each_problem(
        inputs.cost,
        inputs.fitted,
        placement.slots_per_rank,
        node_of_rank=inputs.profile.node_of_rank,
        split=placement.split if placement.has_copies else Split.EVEN,
        senders=Senders.of(inputs.senders),
    )


def side(inputs: Inputs, placement: Placement, edges: IntArray) -> Side:
    """See `Side`."""
    static = placement.split is Split.STATIC and placement.has_copies
    weights_LP = placement.split_weights if static else None
    which = [feature.name for feature in inputs.cost.features].index(ASSIGNMENTS.name)
    evaluation = inputs.evaluate(placement, inputs.fitted)
    times, load, slowest, most = [], [], [], 0.0
    for layer, problem in enumerate(layers(inputs, placement)):
        row_P, weights_P = placement.physical_to_logical[layer], None if weights_LP is None else weights_LP[layer]
        times_TG = rank_times(problem, row_P, weights_P)
        load_TG = loads(problem, row_P, weights_P)[:, :, which]
        hit_TG = np.arange(problem.num_ranks) == evaluation.straggler_TL[:, layer, None]
        top_T1 = times_TG.max(axis=1, keepdims=True)
        times.append(_means(np.hstack([times_TG, top_T1]), edges))
        load.append(_means(load_TG, edges))
        most = max(most, float(load_TG.max()))
        slowest.append(_means(hit_TG, edges))
    times_LWG, load_LWG, slowest_LWG = _with_all(times), _with_all(load), _with_all(slowest, mean=True)
    top_LW1 = times_LWG[..., -1:]
    return Side(
        evaluation=evaluation,
        busy=times_LWG[..., :-1] / np.maximum(top_LW1, 1e-300),
        load=load_LWG,
        makespan_us=top_LW1[..., 0],
        straggler=slowest_LWG.argmax(axis=2),
        straggler_share=slowest_LWG.max(axis=2),
        most=most,
    )


def _with_all(layers: list[FloatArray], *, mean: bool = False) -> FloatArray:
    """[1+L, ...] the sum (or mean) over the layers, then the layers."""
    stacked = np.stack(layers)
    return np.concatenate([stacked.mean(axis=0, keepdims=True) if mean else stacked.sum(axis=0)[None], stacked])


def _means(values_TN: NDArray[np.generic], edges: IntArray) -> FloatArray:
    sums_WN = np.add.reduceat(np.asarray(values_TN, dtype=np.float64), edges[:-1])
    return np.asarray(sums_WN / np.diff(edges)[:, None])


def bounds(inputs: Inputs) -> Bounds:
    """The bounds of the result; computed anew, within seconds, where there are none or links are in them."""
    result = inputs.result
    if result is not None and result.links is None and all(layer.bound_us is not None for layer in result.per_layer):
        said = "the solver's, proven for every placement in these slots"
        if any(layer.moves_us for layer in result.per_layer):
            said += "; of the makespan and the price of the moves together"
        return Bounds(np.array([layer.bound_us for layer in result.per_layer], dtype=np.float64), said)
    found, steps = [], 0
    with Options.lasting(BOUND_SECONDS).alarm() as stop:
        for problem in layers(inputs, inputs.placement):
            bounds_T, done = timed_step_bounds(problem, stop, spread_bounds(problem, NEVER))
            found.append(weighted(problem, bounds_T))
            steps += done
    said = "fluid and pigeonhole bounds, proven for every placement in these slots"
    if steps < inputs.fitted.num_steps * inputs.fitted.num_layers:
        share = 100 * steps / (inputs.fitted.num_steps * inputs.fitted.num_layers)
        said += f"; cut after {BOUND_SECONDS:.0f} s, {share:.0f} % of the steps bounded in full: the truth lies higher"
    return Bounds(np.array(found), said)


def intervals(step_us: FloatArray) -> FloatArray | None:
    """[Q, 2] 95 % intervals of `QUANTILES` of the step latency; None for too few steps.

    Circular block bootstrap (Politis and Romano, 1992) with blocks of sqrt(T) steps, since neighbouring steps are
    alike; the last step is followed by the first, else those at both ends would hardly ever be drawn.
    """
    steps = len(step_us)
    if steps < LEAST_STEPS:
        return None
    length = round(steps**0.5)
    starts = np.random.default_rng(0).integers(0, steps, (DRAWS, -(-steps // length)))
    index = (starts[:, :, None] + np.arange(length)).reshape(DRAWS, -1)[:, :steps] % steps
    drawn_QD = np.quantile(step_us[index], QUANTILES, axis=1)
    return np.asarray(np.quantile(drawn_QD, (0.025, 0.975), axis=1).T)


def moved(before: Placement, after: Placement, nodes: IntArray | None = None) -> IntArray:
    """[L, G, G] experts that rank i (old) sends to rank j (new) in each layer, from the cheapest holders."""
    settled = relabel(before, after)
    old_P, new_P = before.rank_of_slot, settled.rank_of_slot
    result = np.zeros((before.num_layers, before.num_ranks, after.num_ranks), dtype=np.int64)
    rows = zip(before.physical_to_logical, settled.physical_to_logical, strict=True)
    for layer, (old, new) in enumerate(rows):
        for move in moves(old, new, before.slots_per_rank, settled.slots_per_rank, nodes=nodes):
            if move.link is not Link.LOCAL:
                source = (new_P if move.link is Link.RELAY else old_P)[move.src_slot]
                result[layer, source, new_P[move.dst_slot]] += 1
    return result

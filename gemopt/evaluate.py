"""Feasibility and exact objective of any placement, with no solver involved: the single truth."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.costs import CostModel, fit
from gemopt.exceptions import InputError, UnsupportedError
from gemopt.latency import FloatArray
from gemopt.links import Communication, Exchange, Links
from gemopt.placement import EMPTY, Placement, Split, check_row
from gemopt.problem import Problem, stacked
from gemopt.profile import Profile
from gemopt.topology import Topology
from gemopt.traces import Traces


def even_shares(counts_TE: NDArray[Any], row_P: NDArray[np.int64]) -> NDArray[np.int64]:
    """[T, P] assignments of each slot: copy i of r, in slot order, takes `(n + r - 1 - i) // r` of its expert's n."""
    copies_E = np.bincount(row_P[row_P != EMPTY], minlength=counts_TE.shape[1])
    if copies_E.max(initial=0) <= 1:
        return np.where(row_P != EMPTY, counts_TE[:, row_P], 0).astype(np.int64, copy=False)
    seen = np.zeros(counts_TE.shape[1], dtype=np.int64)
    shares_TP = np.zeros((len(counts_TE), len(row_P)), dtype=np.int64)
    for slot, expert in enumerate(row_P):
        if expert == EMPTY:
            continue
        copies, index = copies_E[expert], seen[expert]
        seen[expert] += 1
        counts_T = counts_TE[:, expert]
        shares_TP[:, slot] = counts_T if copies == 1 else (counts_T + copies - 1 - index) // copies
    return shares_TP


def static_shares(counts_TE: NDArray[Any], row_P: NDArray[np.int64], weights_P: FloatArray) -> NDArray[np.int64]:
    """[T, P] assignments of each slot in proportion to its weight: rounded cumulative parts, in slot order."""
    taken_E = np.zeros(counts_TE.shape[1])
    shares_TP = np.zeros((len(counts_TE), len(row_P)), dtype=np.int64)
    last = {int(expert): slot for slot, expert in enumerate(row_P) if expert != EMPTY}
    for slot, expert in enumerate(row_P):
        if expert == EMPTY:
            continue
        counts_T = counts_TE[:, expert]
        before = taken_E[expert]
        taken_E[expert] = 1.0 if slot == last[int(expert)] else min(1.0, before + weights_P[slot])
        upper, lower = np.floor(counts_T * taken_E[expert] + 0.5), np.floor(counts_T * before + 0.5)
        shares_TP[:, slot] = (upper - lower).astype(np.int64)
    return shares_TP


def loads(problem: Problem, row_P: NDArray[np.int64], weights_P: FloatArray | None = None) -> FloatArray:
    """[T, G, F] summed features of every rank, exact whole numbers."""
    from gemopt.kernels import rank_loads

    columns_P = row_P.astype(np.int64)
    copies_E = np.bincount(columns_P[columns_P != EMPTY], minlength=problem.num_experts)
    if copies_E.max() <= 1:  # the shares of single copies are known, whatever the split
        features_FTN = problem.features_FTE
    else:
        shares = even_shares if weights_P is None else partial(static_shares, weights_P=weights_P)
        shares_TP = shares(problem.counts_TE, row_P)
        features_FTN = stacked([feature.of(shares_TP) for feature in problem.features])
        columns_P = np.where(columns_P == EMPTY, EMPTY, np.arange(len(row_P)))
    return np.asarray(rank_loads(features_FTN, columns_P, problem.rank_of_slot, problem.num_ranks))


def rank_times(problem: Problem, row_P: NDArray[np.int64], weights_P: FloatArray | None = None) -> FloatArray:
    """[T, G] latency in microseconds of every rank at every step under one layer's placement row."""
    from gemopt.kernels import rank_latencies

    return np.asarray(rank_latencies(loads(problem, row_P, weights_P), problem.curves))


def objective(problem: Problem, row_P: NDArray[np.int64]) -> float:
    """Weighted sum over the steps of the makespan (slowest rank), in microseconds."""
    return float((rank_times(problem, row_P).max(axis=1) * problem.weights_T).sum())


def moves_us(problem: Problem, row_P: NDArray[np.int64]) -> float:
    """Price of the moves of a row, in microseconds; 0 when the placement in force does not matter."""
    moves = problem.moves
    return 0.0 if moves is None or not moves.price_us else moves.price_us * moves.count(row_P, problem.slots_per_rank)


def total(problem: Problem, row_P: NDArray[np.int64]) -> float:
    """What a solver minimises: the objective and the price of the moves, in microseconds."""
    return objective(problem, row_P) + moves_us(problem, row_P)


def check(problem: Problem, row_P: NDArray[np.int64], *, layer: int = 0) -> None:
    """Raise `InputError` unless the row is feasible: every expert placed, never twice on a rank, moves in limits."""
    if row_P.shape != (problem.num_slots,):
        raise InputError("physical_to_logical", f"shape {row_P.shape}", f"{problem.num_slots} slots")
    check_row(row_P, problem.slots_per_rank, problem.num_experts, layer=layer)
    excess = "" if problem.moves is None else problem.moves.excess(row_P, problem.slots_per_rank)
    if excess:
        raise InputError(f"physical_to_logical[layer {layer}]", excess, "the limits of moves hold for every layer")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a placement costs on some steps.

    makespan_TL: [T, L] microseconds of the slowest rank. straggler_TL: [T, L] that rank. outside: share of the
    evaluated rank loads that lie outside the measured range. idle_share: mean share of the makespan that ranks wait.
    communication: what dispatch and combine take, with a topology. exposed_TL: [T, L] microseconds of it that a step
    waits for: all, or what computing does not hide.
    """

    makespan_TL: FloatArray
    straggler_TL: NDArray[np.int64]
    outside: float
    idle_share: float
    communication: Communication | None = None
    exposed_TL: FloatArray | None = None

    @property
    def total_TL(self) -> FloatArray:
        """[T, L] microseconds of the slowest rank, and of the communication that a step waits for."""
        return self.makespan_TL if self.exposed_TL is None else self.makespan_TL + self.exposed_TL

    @property
    def objective_us(self) -> float:
        """Sum over all steps and layers."""
        return float(self.total_TL.sum(axis=0).sum())

    @property
    def compute_us(self) -> float:
        """The makespans' part of it."""
        return float(self.makespan_TL.sum(axis=0).sum())

    @property
    def per_layer_us(self) -> FloatArray:
        """[L] sum over the steps."""
        return np.asarray(self.total_TL.sum(axis=0))

    @property
    def step_us(self) -> FloatArray:
        """[T] latency of each step: the sum over its layers."""
        return np.asarray(self.total_TL.sum(axis=1))

    def quantile_us(self, q: float) -> float:
        """Quantile of the step latency, e.g. 0.99."""
        return float(np.quantile(self.step_us, q))


def check_agreement(placement: Placement, traces: Traces, num_ranks: int) -> None:
    """Refuse a placement, traces and a profile that are not of one network and group of ranks."""
    if placement.num_experts != traces.num_experts:
        raise InputError(
            "Placement.num_experts", placement.num_experts, f"the traces have {traces.num_experts} experts"
        )
    if tuple(placement.layer_ids) != traces.layer_ids:
        raise InputError("Placement.layer_ids", placement.layer_ids, f"the traces have layers {list(traces.layer_ids)}")
    if placement.num_ranks != num_ranks:
        raise InputError(
            "Placement.slots_per_rank", f"{placement.num_ranks} ranks", f"the profile has {num_ranks} devices"
        )


def evaluate(
    placement: Placement,
    profile: Profile | None,
    traces: Traces,
    *,
    cost: CostModel | None = None,
    topology: Topology | str | os.PathLike[str] | None = None,
    exchange: Exchange | None = None,
) -> Evaluation:
    """Score a placement on every step of the traces.

    Parameters
    ----------
    profile
        Measured devices; may be None when `cost` is given.
    cost
        A fitted cost model; fitted from the profile when absent.
    topology, exchange
        Links between the ranks (a document, its path, or a name such as `2x8-ib400`) and how tokens are exchanged over
        them: the objective then holds what dispatch and combine add.

    Raises
    ------
    InputError
        When placement, traces, devices and topology disagree.
    UnsupportedError
        For the `nearest` and `optimal` splits, whose loads depend on more than the counts.
    """
    if cost is None:
        if profile is None:
            raise InputError("profile", None, "a profile or a fitted cost model is needed")
        cost = fit(profile)[0]
    check_agreement(placement, traces, len(cost.latencies))
    if placement.split not in (Split.EVEN, Split.STATIC) and placement.has_copies:
        raise UnsupportedError(
            "Placement.split", placement.split.value, "only even and static shares follow from counts", "use even"
        )
    weights_LP = placement.split_weights if placement.split is Split.STATIC else None
    layers = (
        Problem.make(traces.counts[:, layer], cost.features, cost.latencies, placement.slots_per_rank)
        for layer in range(traces.num_layers)
    )
    scored = score(placement.physical_to_logical, layers, cost.measured, weights_LP=weights_LP)
    if topology is None:
        return scored
    links = Links.of(topology, traces, placement.num_ranks, profile=profile, exchange=exchange)
    return with_links(
        scored, links, placement.physical_to_logical, placement.slots_per_rank, placement.split, weights_LP
    )


def with_links(
    scored: Evaluation,
    links: Links,
    rows_LP: Sequence[NDArray[np.int64]],
    slots_G: NDArray[np.int64],
    split: Split = Split.EVEN,
    weights_LP: Sequence[FloatArray] | None = None,
) -> Evaluation:
    """The same with what dispatch and combine take."""
    sent = links.communication(rows_LP, slots_G, split, weights_LP)
    exposed_TL = sent.exposed(scored.makespan_TL, overlap=links.exchange.overlap)
    return replace(scored, communication=sent, exposed_TL=exposed_TL)


def score(
    rows_LP: Sequence[NDArray[np.int64]],
    layers: Iterable[Problem],
    measured: FloatArray,
    *,
    weights_LP: Sequence[FloatArray] | None = None,
) -> Evaluation:
    """What rows cost on the problems of their layers; `measured` as in `CostModel`."""
    from gemopt.kernels import rank_latencies

    makespans, stragglers, outside, idle = [], [], [], []
    for layer, (problem, row_P) in enumerate(zip(layers, rows_LP, strict=True)):
        loads_TGF = loads(problem, row_P, None if weights_LP is None else weights_LP[layer])
        times_TG = np.asarray(rank_latencies(loads_TGF, problem.curves))
        makespans.append(times_TG.max(axis=1))
        stragglers.append(times_TG.argmax(axis=1))
        outside.append(_outside(loads_TGF, measured))
        idle.append(1 - times_TG.mean() / max(times_TG.max(axis=1).mean(), 1e-300))
    return Evaluation(
        makespan_TL=np.stack(makespans, axis=1),
        straggler_TL=np.stack(stragglers, axis=1),
        outside=float(np.mean(outside)),
        idle_share=float(np.mean(idle)),
    )


def _outside(loads_TGF: FloatArray, measured: FloatArray) -> float:
    """Share of busy rank loads with any feature outside the measured range."""
    with np.errstate(invalid="ignore"):
        beyond = np.asarray((loads_TGF < measured[:, :, 0]) | (loads_TGF > measured[:, :, 1]))
    busy = loads_TGF.sum(axis=2) > 0
    return float(np.asarray(beyond.any(axis=2))[busy].mean()) if busy.any() else 0.0


def total_objective(problems: Sequence[Problem], rows_LP: Sequence[NDArray[np.int64]]) -> float:
    """Summed objective of the layers, in microseconds."""
    return float(sum(objective(problem, row) for problem, row in zip(problems, rows_LP, strict=True)))


def linked_total(problems: Sequence[Problem], rows_LP: Sequence[NDArray[np.int64]], links: Links) -> float:
    """What a search over links minimises: weighted makespans and what the links add to them, in microseconds."""
    makespan_TL = np.stack(
        [rank_times(problem, row).max(axis=1) for problem, row in zip(problems, rows_LP, strict=True)], axis=1
    )
    sent = links.communication(rows_LP, problems[0].slots_per_rank)
    added_TL = sent.exposed(makespan_TL, overlap=links.exchange.overlap)
    return float((problems[0].weights_T @ (makespan_TL + added_TL)).sum())

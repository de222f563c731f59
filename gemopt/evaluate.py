"""Feasibility and exact objective of any placement, with no solver involved: the single truth."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.costs import CostModel, cost_of
from gemopt.exceptions import InputError, check_number
from gemopt.latency import FloatArray
from gemopt.layer_rules import check_kept, layer_rules
from gemopt.links import Communication, Exchange, Links, check_asked
from gemopt.placement import EMPTY, GivenPlacement, Placement, Split, check_row
from gemopt.problem import Problem, each_problem, stacked
from gemopt.profile import Profile
from gemopt.rules import Rules
from gemopt.splits import shares
from gemopt.splits.senders import Senders
from gemopt.tables import frame, html_table
from gemopt.topology import Topology, load
from gemopt.traces import Traces
from gemopt.words import counted


def loads(problem: Problem, row_P: NDArray[np.int64], weights_P: FloatArray | None = None) -> FloatArray:
    """[T, G, F] summed features of every rank, exact whole numbers; copies share as the problem's policy says.

    weights_P: static weights of the copies, instead of that policy.
    """
    from gemopt.kernels import rank_loads

    columns_P = row_P.astype(np.int64)
    copies_E = np.bincount(columns_P[columns_P != EMPTY], minlength=problem.num_experts)
    if copies_E.max() <= 1:  # the shares of single copies are known, whatever the split
        features_FTN = problem.features_FTE
    else:
        shares_TP = shares(problem, row_P, weights_P)
        features_FTN = stacked([feature.of(shares_TP) for feature in problem.features])
        columns_P = np.where(columns_P == EMPTY, EMPTY, np.arange(len(row_P)))
    return np.asarray(rank_loads(features_FTN, columns_P, problem.rank_of_slot, problem.num_ranks))


def rank_times(problem: Problem, row_P: NDArray[np.int64], weights_P: FloatArray | None = None) -> FloatArray:
    """[T, G] latency in microseconds of every rank at every step under one layer's placement row."""
    from gemopt.kernels import rank_latencies

    return np.asarray(rank_latencies(loads(problem, row_P, weights_P), problem.curves))


def objective(problem: Problem, row_P: NDArray[np.int64], weights_P: FloatArray | None = None) -> float:
    """Weighted sum over the steps of the makespan (slowest rank), in microseconds; see `loads` for `weights_P`."""
    return float((rank_times(problem, row_P, weights_P).max(axis=1) * problem.weights_T).sum())


def moves_us(problem: Problem, row_P: NDArray[np.int64]) -> float:
    """Price of the moves of a row, in microseconds; 0 when the placement in force does not matter."""
    moves = problem.moves
    return 0.0 if moves is None or not moves.price_us else moves.price_us * moves.count(row_P, problem.slots_per_rank)


def total(problem: Problem, row_P: NDArray[np.int64]) -> float:
    """What a solver minimises: the objective and the price of the moves, in microseconds."""
    return objective(problem, row_P) + moves_us(problem, row_P)


def check(problem: Problem, row_P: NDArray[np.int64], *, layer: int = 0) -> None:
    """Raise `InputError` unless a row is feasible: all experts placed, none twice on a rank, rules and limits kept."""
    if row_P.shape != (problem.num_slots,):
        raise InputError("physical_to_logical", f"shape {row_P.shape}", f"{problem.num_slots} slots")
    check_row(row_P, problem.slots_per_rank, problem.num_experts, layer=layer)
    if problem.full and (row_P == EMPTY).any():
        raise InputError(f"physical_to_logical[layer {layer}]", "an empty slot", "every slot must hold an expert")
    excess = "" if problem.moves is None else problem.moves.excess(row_P, problem.slots_per_rank)
    if excess:
        raise InputError(f"physical_to_logical[layer {layer}]", excess, "the limits of moves hold for every layer")
    broken = None if problem.rules is None else problem.rules.broken(row_P, problem.slots_per_rank)
    if broken is not None:
        raise InputError(f"physical_to_logical[layer {layer}]", *broken)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a placement costs on some steps.

    Attributes
    ----------
    makespan_TL, straggler_TL
        [T, L] microseconds of the slowest rank, and which rank that is; equal ones take turns.
    outside
        Share of the loads of busy ranks that lie outside the measured range.
    idle_share
        Share of the time that ranks wait for the slowest one, over all steps and layers.
    communication
        What dispatch and combine take; None without a topology.
    exposed_TL
        [T, L] microseconds of it that a step waits for: all, or what computing does not hide.
    layer_ids
        [L] what the layers are called; counted from 0 when empty.
    """

    makespan_TL: FloatArray
    straggler_TL: NDArray[np.int64]
    outside: float
    idle_share: float
    communication: Communication | None = None
    exposed_TL: FloatArray | None = None
    layer_ids: tuple[int, ...] = ()

    @property
    def total_TL(self) -> FloatArray:
        """[T, L] microseconds of the slowest rank, and of the communication that a step waits for."""
        return self.makespan_TL if self.exposed_TL is None else self.makespan_TL + self.exposed_TL

    def __repr__(self) -> str:
        steps, layers = self.makespan_TL.shape
        mean, tail = self.objective_us / steps, self.quantile_us(0.99)
        said = f"{counted(steps, 'step')}, {counted(layers, 'layer')}, {mean:.1f} us per step, p99 {tail:.1f} us"
        said += f", ranks wait {100 * self.idle_share:.1f} %"
        return f"Evaluation({said}, {100 * self.outside:.1f} % outside the profile)"

    @property
    def objective_us(self) -> float:
        """Sum over all steps and layers, in microseconds."""
        return float(self.total_TL.sum(axis=0).sum())

    @property
    def compute_us(self) -> float:
        """The makespans' part of it."""
        return float(self.makespan_TL.sum(axis=0).sum())

    @property
    def per_layer_us(self) -> FloatArray:
        """[L] microseconds, summed over the steps."""
        return np.asarray(self.total_TL.sum(axis=0))

    @property
    def step_us(self) -> FloatArray:
        """[T] microseconds of each step: the sum over its layers."""
        return np.asarray(self.total_TL.sum(axis=1))

    def quantile_us(self, q: float) -> float:
        """Quantile of the step latency in microseconds, e.g. q = 0.99."""
        check_number("q", q, "from 0 to 1; 0.99 is the 99th percentile", most=1)
        return float(np.quantile(self.step_us, q))

    def _repr_html_(self) -> str:
        steps, layers = self.makespan_TL.shape
        over = f"{counted(steps, 'step')} of {counted(layers, 'layer')}"
        facts = {
            "per step": f"{self.objective_us / steps:.1f} us over {over}",
            "p50, p90, p99": ", ".join(f"{self.quantile_us(q):.0f}" for q in (0.5, 0.9, 0.99)) + " us",
            "ranks wait": f"{100 * self.idle_share:.1f} % of the time",
            "outside the profile": f"{100 * self.outside:.1f} % of the loads",
        }
        return html_table("gemopt: evaluation", facts)

    def to_dataframe(self) -> Any:
        """A pandas data frame with a row per `step` and `layer_id`: `makespan_us` and `straggler`.

        Raises
        ------
        MissingPackageError
            pandas is not installed.
        """
        index: NDArray[Any] = np.indices(self.makespan_TL.shape)
        ids_L = np.asarray(self.layer_ids or range(self.makespan_TL.shape[1]))
        columns: dict[str, NDArray[Any]] = {"step": index[0], "layer_id": ids_L[index[1]]}
        columns |= {"makespan_us": self.makespan_TL, "straggler": self.straggler_TL}
        return frame({name: values.ravel() for name, values in columns.items()})

    def plot_steps(self, *, ax: Any = None) -> Any:
        """Latency of every step with p50, p90 and p99; returns the matplotlib axes."""
        from gemopt.plotting import plot_steps

        return plot_steps(self, ax=ax)

    def plot_stragglers(self, *, num_ranks: int | None = None, ax: Any = None) -> Any:
        """How often each rank is the slowest, per layer; returns the matplotlib axes.

        `num_ranks`: ranks to show; up to the last one that ever was the slowest when None.
        """
        from gemopt.plotting import plot_stragglers

        return plot_stragglers(self, num_ranks, ax=ax)


def check_agreement(placement: Placement, traces: Traces, devices: Profile | int) -> None:
    """Refuse a placement, traces and a profile (or so many ranks) that are not of one network and group of ranks."""
    if (experts := placement.num_experts) != traces.num_experts:
        raise InputError("Placement.num_experts", experts, f"the traces have {traces.num_experts} experts")
    if tuple(placement.layer_ids) != traces.layer_ids:
        raise InputError("Placement.layer_ids", placement.layer_ids, f"the traces have layers {list(traces.layer_ids)}")
    num_ranks, uuids = (devices, []) if isinstance(devices, int) else (devices.num_ranks, devices.device_uuids)
    if placement.num_ranks != num_ranks:
        there = f"the profile has {counted(num_ranks, 'device')}"
        way_out = "after a rank left or came, give the profile that solve --save-profile writes"
        raise InputError("Placement.slots_per_rank", counted(placement.num_ranks, "rank"), there, way_out)
    placement.check_devices(uuids)


def evaluate(
    placement: GivenPlacement,
    profile: Profile | str | os.PathLike[str] | None,
    traces: Traces | str | os.PathLike[str],
    *,
    cost: str | CostModel | None = None,
    senders: Senders | str | None = None,
    topology: Topology | str | os.PathLike[str] | None = None,
    exchange: Exchange | None = None,
    rules: Rules | str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Score a placement on every step of the traces, its copies sharing as its policy says.

    Parameters
    ----------
    placement, profile, traces
        Objects or paths. The profile may be None when `cost` is a fitted one.
    cost
        A fitted cost model, or the name of one to fit to the profile, `auto` when absent; see `gemopt.costs.fit`.
    senders
        Who sends the assignments, which copies under the `nearest` split ask for: `traces` (the default, needs a
        token-level record with ranks) or `uniform`.
    topology, exchange
        Links between the ranks (a document, its path, or a name such as `2x8-ib400`) and how tokens are exchanged over
        them: the objective then holds what dispatch and combine add.
    rules
        What the placement must keep (`gemopt.Rules`, or its path).

    Raises
    ------
    InputError
        When placement, traces, devices and topology disagree, the split needs senders or nodes that are not known, the
        placement breaks a rule, or an exchange is given without a topology.
    """
    profile = None if profile is None else Profile.of(profile)
    model = cost_of("auto" if cost is None else cost, profile)
    placement, traces = Placement.of(placement), Traces.of(traces)
    check_agreement(placement, traces, len(model.latencies) if profile is None else profile)
    if rules is not None:
        check_rules(placement, rules, profile, topology)
    check_asked(exchange, topology)
    split = placement.split if placement.has_copies else Split.EVEN
    if split is Split.NEAREST and profile is None:
        raise InputError("profile", None, "the nearest split asks for the node of every rank")
    layers = each_problem(
        model,
        traces,
        placement.slots_per_rank,
        node_of_rank=None if profile is None else profile.node_of_rank,
        split=split,
        senders=Senders.of(senders),
    )
    weights_LP = placement.split_weights if split is Split.STATIC else None
    scored = score(placement.physical_to_logical, layers, model.measured, weights_LP=weights_LP)
    scored = replace(scored, layer_ids=traces.layer_ids)
    if topology is None:
        return scored
    links = Links.of(topology, traces, placement.num_ranks, profile=profile, exchange=exchange)
    return with_links(scored, links, placement.physical_to_logical, placement.slots_per_rank, split, weights_LP)


def check_rules(
    placement: Placement,
    rules: Rules | str | os.PathLike[str],
    profile: Profile | None = None,
    topology: Topology | str | os.PathLike[str] | None = None,
) -> None:
    """Raise `InputError` unless a placement keeps the rules; nodes are the topology's, without one the profile's."""
    nodes: object = np.zeros(placement.num_ranks) if profile is None else profile.node_of_rank
    if topology is not None:
        wired = load(topology)
        wired.check_ranks(placement.num_ranks)
        nodes = wired.node_of_rank
    check_kept(
        placement, layer_rules(Rules.of(rules), placement.layer_ids, placement.num_experts, placement.num_ranks, nodes)
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
    """What rows cost on the problems of their layers; `measured` as in `CostModel`; weights: of the static split."""
    from gemopt.kernels import rank_latencies

    makespans, stragglers, busy_us, beyond, busy = [], [], 0.0, 0, 0
    for layer, (problem, row_P) in enumerate(zip(layers, rows_LP, strict=True)):
        loads_TGF = loads(problem, row_P, None if weights_LP is None else weights_LP[layer])
        times_TG = np.asarray(rank_latencies(loads_TGF, problem.curves))
        makespans.append(times_TG.max(axis=1))
        stragglers.append(_slowest(times_TG, layer))
        busy_us += float(times_TG.mean(axis=1).sum())
        beyond, busy = beyond + _outside(loads_TGF, measured), busy + int(loads_TGF.any(axis=2).sum())
    makespan_TL = np.stack(makespans, axis=1)
    return Evaluation(
        makespan_TL=makespan_TL,
        straggler_TL=np.stack(stragglers, axis=1),
        outside=beyond / max(busy, 1),
        idle_share=max(0.0, 1 - busy_us / max(float(makespan_TL.sum()), 1e-300)),
    )


def _slowest(times_TG: FloatArray, turn: int) -> NDArray[np.int64]:
    """[T] the rank that ends last; equal ones, as on a step of a staircase, take turns, from `turn` on."""
    nth_GT = (times_TG == times_TG.max(axis=1, keepdims=True)).cumsum(axis=1).T
    return np.asarray(((turn - 1 + (nth_GT[-1] > 1).cumsum()) % nth_GT[-1] + 1 == nth_GT).argmax(axis=0))


def _outside(loads_TGF: FloatArray, measured: FloatArray) -> int:
    """How many loads of busy ranks have any feature outside the measured range."""
    with np.errstate(invalid="ignore"):
        beyond_TGF = np.asarray((loads_TGF < measured[:, :, 0]) | (loads_TGF > measured[:, :, 1]))
    return int((beyond_TGF.any(axis=2) & loads_TGF.any(axis=2)).sum())


def total_objective(problems: Sequence[Problem], rows_LP: Sequence[NDArray[np.int64]]) -> float:
    """Summed objective of the layers, in microseconds."""
    return float(sum(objective(problem, row) for problem, row in zip(problems, rows_LP, strict=True)))


def linked_total(problems: Sequence[Problem], rows_LP: Sequence[NDArray[np.int64]], links: Links) -> float:
    """What a search over links minimises: makespans, what links add to them and the price of moves, in microseconds."""
    makespan_TL = np.stack(
        [rank_times(problem, row).max(axis=1) for problem, row in zip(problems, rows_LP, strict=True)], axis=1
    )
    sent = links.communication(rows_LP, problems[0].slots_per_rank)
    added_TL = sent.exposed(makespan_TL, overlap=links.exchange.overlap)
    return float((problems[0].weights_T @ (makespan_TL + added_TL)).sum()) + sum(map(moves_us, problems, rows_LP))

"""One MoE layer's placement problem: frozen arrays, the only input of every solver."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.costs import CostModel
from gemopt.exceptions import InputError
from gemopt.latency import Curves, Feature, FloatArray, Latency, pack_shared
from gemopt.layer_rules import LayerRules
from gemopt.moves import Moves
from gemopt.placement import Split, check_slots, default_slots
from gemopt.splits.senders import Senders, check_senders, senders_of
from gemopt.traces import Traces

LOAD_LIMIT = 2**31 - 1
LEAST_SLOPE = 0.25  # of the latency at the mean load, per mean load


@dataclass(frozen=True, eq=False)
class Problem:
    """Place E experts into the slots of G ranks so that the summed makespan of T steps is smallest.

    Attributes
    ----------
    counts_TE
        [T, E] int32 assignments of each expert at each step; so are their sums, but not every product of them.
    features
        F additive features whose sums over a rank its latency depends on.
    latencies
        G latencies, one per rank.
    slots_per_rank
        [G] slots of each rank; a slot may stay empty; spare slots may hold copies (even split).
    weights_T
        [T] weight of each step in the objective; all 1 unless the steps represent others.
    node_of_rank
        [G] node of each rank.
    moves
        What moving experts costs and how many may move; None: the placement in force does not matter.
    split
        How copies share their expert's assignments; see `gemopt.splits`. Weights of `static` belong to the answer.
    senders_TGE
        [T, G, E] assignments by the rank that sends them, which only `nearest` asks for; None: all ranks send alike.
    full
        Whether every slot must hold an expert, as most engines want it.
    rules
        What people demand of a placement; None: nothing.
    """

    counts_TE: NDArray[np.int32]
    features: tuple[Feature, ...]
    latencies: tuple[Latency, ...]
    slots_per_rank: NDArray[np.int64]
    weights_T: FloatArray
    node_of_rank: NDArray[np.int64]
    moves: Moves | None = None
    split: Split = Split.EVEN
    senders_TGE: NDArray[np.int32] | None = None
    full: bool = False
    rules: LayerRules | None = None

    @classmethod
    def make(
        cls,
        counts_TE: object,
        features: Sequence[Feature],
        latencies: Sequence[Latency],
        slots_per_rank: object = None,
        weights_T: object = None,
        node_of_rank: object = None,
        split: Split = Split.EVEN,
        senders_TGE: NDArray[np.int32] | None = None,
        full: bool = False,
    ) -> Problem:
        """Validate and freeze.

        Raises
        ------
        InputError
            Negative or non-integral counts, a slot total below the number of experts, disagreeing shapes, or senders
            for a split that does not ask for them.
        """
        counts = np.asarray(counts_TE)
        if counts.ndim != 2 or not counts.size or counts.dtype.kind not in "iu" or counts.min() < 0:
            raise InputError("counts_TE", f"{counts.dtype} {counts.shape}", "integers >= 0 [steps, experts], not empty")
        if counts.max() > LOAD_LIMIT or counts.sum(axis=1, dtype=np.int64).max() > LOAD_LIMIT:
            raise InputError("counts_TE", int(counts.max()), f"at most {LOAD_LIMIT} assignments per step")
        counts = np.array(counts, dtype=np.int32, order="C")
        if any(latency.num_features != len(features) for latency in latencies):
            raise InputError("latencies", len(features), "one curve per feature in every term")
        slots = slot_counts(slots_per_rank, counts.shape[1], len(latencies))
        weights = np.ones(len(counts)) if weights_T is None else np.array(weights_T, dtype=np.float64)
        if weights.shape != (len(counts),) or not np.isfinite(weights).all() or (weights < 0).any():
            raise InputError("weights_T", f"shape {weights.shape}", f"one finite weight >= 0 per step, {len(counts)}")
        nodes = np.zeros(len(latencies), np.int64) if node_of_rank is None else np.array(node_of_rank, np.int64)
        if nodes.shape != (len(latencies),):
            raise InputError("node_of_rank", f"shape {nodes.shape}", f"one node per rank ({len(latencies)})")
        if senders_TGE is not None and Split(split) is not Split.NEAREST:
            raise InputError("senders_TGE", "given", f"the {Split(split).value} split does not ask who sends")
        for array in (counts, slots, weights, nodes):
            array.setflags(write=False)
        return cls(
            counts, tuple(features), tuple(latencies), slots, weights, nodes,
            split=Split(split), senders_TGE=senders_TGE, full=full,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As made: compiled kernels tell what is read-only from what is not."""
        vars(self).update(state)
        for array in (self.counts_TE, self.slots_per_rank, self.weights_T, self.node_of_rank):
            array.setflags(write=False)

    @property
    def num_steps(self) -> int:
        """T, steps."""
        return int(self.counts_TE.shape[0])

    @property
    def num_experts(self) -> int:
        """E, logical experts."""
        return int(self.counts_TE.shape[1])

    @property
    def num_ranks(self) -> int:
        """G, ranks."""
        return len(self.latencies)

    @property
    def num_slots(self) -> int:
        """P, slots over all ranks."""
        return int(self.slots_per_rank.sum())

    @property
    def spare_slots(self) -> int:
        """Slots beyond one per expert: room for copies, or left empty."""
        return self.num_slots - self.num_experts

    @property
    def most_copies(self) -> int:
        """Copies that one expert can have, at most one on a rank."""
        return min(self.spare_slots + 1, int((self.slots_per_rank > 0).sum()))

    @property
    def equal_slots(self) -> bool:
        """Whether all ranks have the same number of slots."""
        return bool((self.slots_per_rank == self.slots_per_rank[0]).all())

    @cached_property
    def rank_of_slot(self) -> NDArray[np.int64]:
        """[P] rank of each slot."""
        return np.repeat(np.arange(self.num_ranks), self.slots_per_rank)

    @cached_property
    def features_FTE(self) -> NDArray[np.int32]:
        """[F, T, E] additive features of every expert held once; of one feature, without a copy of the counts."""
        return stacked([feature.of(self.counts_TE) for feature in self.features])

    @cached_property
    def curves(self) -> Curves:
        """The latencies as flat arrays for the compiled kernels."""
        return pack_shared(self.latencies)

    @cached_property
    def weighed(self) -> dict[bytes, FloatArray]:
        """Static weights that were found for rows, by their bytes; see `splits.weights`."""
        return {}

    @cached_property
    def untried(self) -> set[bytes]:
        """Rows whose static weights were given, and are to be held against those that descent finds."""
        return set()

    @cached_property
    def equal_ranks(self) -> list[list[int]]:
        """Groups of ranks that have the same latency, slots and rules, so that swapping them changes nothing.

        To copies under the nearest split no rank is like another one.
        """
        if self.split is Split.NEAREST and self.spare_slots:
            return [[rank] for rank in range(self.num_ranks)]
        groups: dict[Any, list[int]] = {}
        role_G = np.zeros(self.num_ranks, np.int64) if self.rules is None else self.rules.role_G
        for rank, latency in enumerate(self.latencies):
            groups.setdefault((latency.key, int(self.slots_per_rank[rank]), int(role_G[rank])), []).append(rank)
        return list(groups.values())

    @property
    def kinds(self) -> list[list[int]]:
        """The groups of `equal_ranks` that have slots."""
        return [group for group in self.equal_ranks if self.slots_per_rank[group[0]]]

    @cached_property
    def linearised(self) -> tuple[FloatArray, FloatArray]:
        """([G] offset, [G, E] weight) in microseconds: latency of a rank is about its offset plus its experts' weights.

        Each rank's slope is a least-squares line over up to 2.5 times the mean load, and at least a quarter of the
        latency there: on a flat tread of a staircase the offsets alone would otherwise decide. Features share it in
        proportion to what half the mean load more or less of each changes, averaged over the ranks.
        """
        if (self.weights_T == 1).all():
            mean_FE = self.features_FTE.sum(axis=1, dtype=np.int64) / self.num_steps
        else:
            mean_FE = np.stack([self.weights_T @ feature_TE for feature_TE in self.features_FTE])
            mean_FE /= max(self.weights_T.sum(), 1e-300)
        mean_F = mean_FE.sum(axis=1) / self.num_ranks
        scales = np.linspace(0.0, 2.5, 17)
        times_GS = np.array([latency(list(np.outer(mean_F, scales))) for latency in self.latencies])
        at_mean_G = np.array([float(latency(list(mean_F))) for latency in self.latencies])
        slope_G = np.maximum((times_GS @ (scales - scales.mean())) / ((scales - scales.mean()) ** 2).sum(), 0.0)
        slope_G = np.maximum(slope_G, LEAST_SLOPE * at_mean_G + 1e-9)
        share_F = self._feature_shares(mean_F)
        per_unit_F = np.divide(share_F, mean_F, out=np.zeros_like(mean_F), where=mean_F > 0)
        return at_mean_G - slope_G, slope_G[:, None] * (per_unit_F @ mean_FE)[None]

    def _feature_shares(self, mean_F: FloatArray) -> FloatArray:
        """[F] share of each feature in what a rank's latency gains with load; sums to 1."""
        if len(mean_F) == 1:
            return np.ones(1)
        gain_F = np.zeros(len(mean_F))
        for f, mean in enumerate(mean_F):
            high, low = mean_F.copy(), mean_F.copy()
            high[f], low[f] = 1.5 * mean, 0.5 * mean
            gain_F[f] = sum(max(0.0, float(each(list(high)) - each(list(low)))) for each in self.latencies)
        return np.asarray(gain_F / gain_F.sum() if gain_F.sum() > 0 else np.eye(len(mean_F))[0])

    def with_moves(self, moves: Moves | None) -> Problem:
        """The same problem with this price and these limits of moves.

        Raises
        ------
        InputError
            The placement in force has other ranks or experts.
        """
        shape = (self.num_ranks, self.num_experts)
        if moves is not None and moves.home_GE.shape != shape:
            raise InputError("home_GE", f"shape {moves.home_GE.shape}", f"[ranks, experts] = {shape}")
        return self.under(moves=moves)

    def under(self, **demands: Any) -> Problem:
        """The same problem with other moves or rules, which knows the same static weights of rows."""
        problem = replace(self, **demands)
        vars(problem)["weighed"], vars(problem)["untried"] = self.weighed, self.untried
        return problem

    def select(self, steps: NDArray[np.int64], weights_T: FloatArray | None = None) -> Problem:
        """The same problem on some of its steps, reweighted when asked."""
        counts, weights = self.counts_TE[steps], self.weights_T[steps] if weights_T is None else weights_T.view()
        for array in (counts, weights):
            array.setflags(write=False)
        senders = None if self.senders_TGE is None else self.senders_TGE[steps]
        return replace(self, counts_TE=counts, weights_T=weights, senders_TGE=senders)


def stacked(features: Sequence[NDArray[Any]]) -> NDArray[np.int32]:
    """[F, ...] read-only int32 of arrays [...] of integers, one per feature."""
    for each in features:
        if each.dtype.itemsize > 4 and each.size and each.max() > LOAD_LIMIT:
            raise InputError("features", int(each.max()), f"at most {LOAD_LIMIT} of one expert at one step")
    arrays = [np.ascontiguousarray(each, dtype=np.int32) for each in features]
    found = arrays[0][None] if len(arrays) == 1 else np.stack(arrays)
    found.setflags(write=False)
    return found


def slot_counts(slots_per_rank: object, num_experts: int, num_ranks: int) -> NDArray[np.int64]:
    """[G] slots from None (just enough), one number for every rank, or one number per rank."""
    if slots_per_rank is None:
        return default_slots(num_experts, num_ranks)
    slots = np.array(slots_per_rank)
    if slots.dtype.kind not in "iu":
        raise InputError("slots_per_rank", slots_per_rank, "whole numbers")
    if slots.ndim == 0:
        slots = np.full(num_ranks, int(slots))
    if slots.shape != (num_ranks,):
        raise InputError("slots_per_rank", slots_per_rank, f"one number, or one per rank ({num_ranks})")
    slots = slots.astype(np.int64)
    check_slots(slots, num_experts)
    return slots


def problems(cost: CostModel, traces: Traces, slots_per_rank: object = None, **options: Any) -> list[Problem]:
    """One problem per MoE layer; see `each_problem`."""
    return list(each_problem(cost, traces, slots_per_rank, **options))


def each_problem(
    cost: CostModel,
    traces: Traces,
    slots_per_rank: object = None,
    *,
    node_of_rank: object = None,
    split: Split = Split.EVEN,
    senders: Senders = Senders.TRACES,
    full: bool = False,
) -> Iterator[Problem]:
    """The MoE layers' problems one after the other. `senders`: whose the assignments are that `nearest` shares out.

    Raises
    ------
    InputError
        As `Problem.make`; and traces that do not know the senders which the split needs.
    """
    num_ranks = len(cost.latencies)
    spare = slot_counts(slots_per_rank, traces.num_experts, num_ranks).sum() > traces.num_experts
    recorded = split is Split.NEAREST and senders is Senders.TRACES and bool(spare)
    if recorded:
        check_senders(traces, num_ranks)
    for layer in range(traces.num_layers):
        yield Problem.make(
            traces.counts[:, layer],
            cost.features,
            cost.latencies,
            slots_per_rank,
            node_of_rank=node_of_rank,
            split=split,
            senders_TGE=senders_of(traces, layer, num_ranks) if recorded else None,
            full=full,
        )

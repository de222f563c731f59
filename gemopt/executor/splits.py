"""How the assignments of an expert are shared among its copies, one rule per split, behind one seam."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gemopt.costs import CostModel
from gemopt.exceptions import InputError, missing
from gemopt.words import counted

try:
    import torch
    from torch import Tensor
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

from gemopt.executor.plan import LayerRow
from gemopt.latency import pack
from gemopt.placement import EMPTY, Split
from gemopt.splits.optimal import OptimalSplit
from gemopt.splits.rules import nearest_copies

NEVER = 2**62  # no position is as far


@dataclass(frozen=True)
class Assigned:
    """Assignments of one layer and step that this rank must route, flattened to [A].

    Attributes
    ----------
    expert, sender
        Logical expert; rank (within the expert-parallel group) that sends the row.
    position
        Index among the whole group's assignments of that expert in this step; None for rules that do not need it.
    total_E
        Assignments of each expert in this step over the whole group; None likewise.
    """

    expert: Tensor
    sender: Tensor
    position: Tensor | None
    total_E: Tensor | None


class SplitRule(Protocol):
    """Chooses a copy for every assignment. A rule that changes with the step looks at `total_E`.

    `needs_counts`: positions and totals are wanted; where ranks hold different batches that costs one small
    all-gather per layer.
    """

    needs_counts: bool

    def choose(self, assigned: Assigned) -> Tensor:
        """[A] index of the copy, in slot order."""


class Even:
    """Round robin over the positions, so that copy i of r gets exactly `(n + r - 1 - i) // r` of n."""

    needs_counts = True

    def __init__(self, copies: Copies, device: torch.device) -> None:
        self.count_E = torch.from_numpy(copies.count_E).to(device)

    def choose(self, assigned: Assigned) -> Tensor:
        assert assigned.position is not None
        return assigned.position % self.count_E[assigned.expert]


class Static:
    """Positions below `floor(n x w_0 + 1/2)` to copy 0, up to `floor(n (w_0 + w_1) + 1/2)` to copy 1, and so on."""

    needs_counts = True

    def __init__(self, copies: Copies, device: torch.device) -> None:
        self.upper_EC = torch.from_numpy(copies.cumulative_EC).to(device)

    def choose(self, assigned: Assigned) -> Tensor:
        assert assigned.position is not None and assigned.total_E is not None
        ends_EC = torch.floor(assigned.total_E[:, None] * self.upper_EC + 0.5)
        return (assigned.position[:, None] >= ends_EC[assigned.expert]).sum(dim=1)


class Nearest:
    """The copy on the sending rank, else one on its node, else any; senders spread over equally near copies."""

    needs_counts = False

    def __init__(self, copies: Copies, device: torch.device) -> None:
        self.copy_GE = torch.from_numpy(copies.nearest_GE).to(device)

    def choose(self, assigned: Assigned) -> Tensor:
        return self.copy_GE[assigned.sender, assigned.expert]


class Optimal:
    """What lets the slowest rank end first under the step's counts, as `evaluate` has it; found on the CPU."""

    needs_counts = True

    def __init__(self, copies: Copies, device: torch.device) -> None:
        assert copies.optimal is not None
        self.split, self.ends_EC = copies.optimal, np.full(copies.slot_EC.shape, NEVER)

    def choose(self, assigned: Assigned) -> Tensor:
        assert assigned.position is not None and assigned.total_E is not None
        at, first_R = self.split.index_C, self.split.copies.first[:-1]
        parts_C = self.split.parts(assigned.total_E.cpu().numpy()[None])[0]
        ends_C = np.cumsum(parts_C)
        ends_C -= (ends_C - parts_C)[first_R][self.split.copies.owner]
        inner = at < self.split.number_C - 1
        self.ends_EC[self.split.expert_C[inner], at[inner]] = ends_C[inner]
        ends_EC = torch.from_numpy(self.ends_EC).to(assigned.expert.device)
        return (assigned.position[:, None] >= ends_EC[assigned.expert]).sum(dim=1)


RULES: Mapping[Split, Callable[[Copies, torch.device], SplitRule]] = {
    Split.EVEN: Even,
    Split.STATIC: Static,
    Split.NEAREST: Nearest,
    Split.OPTIMAL: Optimal,
}


def check_split(split: Split, cost: CostModel | None) -> None:
    """Refuse a split that asks for more than is known."""
    if split is Split.OPTIMAL and cost is None:
        limit, hint = "needs the latencies of the ranks", "make the Executor with cost=fit(profile)[0] (--profile)"
        raise InputError("Placement.split", split.value, limit, hint)


def check_cost(cost: CostModel | None, num_ranks: int) -> CostModel | None:
    """Refuse a cost model of other ranks; what was given otherwise."""
    if cost is not None and len(cost.latencies) != num_ranks:
        raise InputError(
            "cost", counted(len(cost.latencies), "rank"), f"the model runs on {counted(num_ranks, 'rank')}"
        )
    return cost


def digest(cost: CostModel | None) -> str:
    """Tells cost models apart: ranks must split alike."""
    if cost is None:
        return ""
    names = ",".join(feature.name for feature in cost.features).encode()
    arrays = [np.ascontiguousarray(part).tobytes() for part in pack(cost.latencies)]
    return hashlib.sha256(b"|".join([names, *arrays])).hexdigest()


class Copies:
    """Where the copies of every expert are: tables of one layer.

    Slots are numbered rank by rank with the same stride for every rank, `stride` = most slots of any rank, so that
    the owner of slot s is rank s // stride also where ranks hold different numbers of slots.
    """

    def __init__(
        self, row: LayerRow, num_experts: int, nodes: Sequence[int] | NDArray[np.int64], cost: CostModel | None = None
    ) -> None:
        slots = row.slots_per_rank
        self.stride = max(1, int(slots.max()))
        local_P = np.arange(len(row.row_P)) - np.repeat(np.cumsum(slots) - slots, slots)
        padded_P = row.rank_of_slot * self.stride + local_P
        full_P = row.row_P != EMPTY
        self.count_E = np.bincount(row.row_P[full_P], minlength=num_experts)
        most = int(self.count_E.max())
        self.slot_EC = np.zeros((num_experts, most), dtype=np.int64)
        self.cumulative_EC = np.ones((num_experts, most))
        weights_P = np.zeros(len(row.row_P)) if row.weights_P is None else row.weights_P
        for expert in range(num_experts):
            where = np.flatnonzero(row.row_P == expert)
            self.slot_EC[expert] = padded_P[where[-1]]
            self.slot_EC[expert, : len(where)] = padded_P[where]
            taken = 0.0
            for copy, slot in enumerate(where[:-1]):
                taken = min(1.0, taken + float(weights_P[slot]))
                self.cumulative_EC[expert, copy] = taken
        self.nearest_GE = self._nearest(np.asarray(nodes))
        self.optimal: OptimalSplit | None = None
        if cost is not None and row.split is Split.OPTIMAL:
            self.optimal = OptimalSplit(row.row_P, row.rank_of_slot, num_experts, cost.features, cost.latencies)

    def _nearest(self, nodes_G: NDArray[np.int64]) -> NDArray[np.int64]:
        result_GE = np.zeros((len(nodes_G), len(self.count_E)), dtype=np.int64)
        for expert in np.flatnonzero(self.count_E > 1):
            owners = self.slot_EC[expert, : self.count_E[expert]] // self.stride
            result_GE[:, expert] = nearest_copies(owners, nodes_G)
        return result_GE


class Routing:
    """From logical experts to padded slots for one layer."""

    def __init__(
        self,
        row: LayerRow,
        num_experts: int,
        nodes: Sequence[int] | NDArray[np.int64],
        device: torch.device,
        cost: CostModel | None = None,
    ) -> None:
        check_split(row.split, cost)
        copies = Copies(row, num_experts, nodes, cost)
        self.stride = copies.stride
        self.num_experts = num_experts
        self.slot_EC = torch.from_numpy(copies.slot_EC).to(device)
        self.first_E = self.slot_EC[:, 0].contiguous()
        self.rule = RULES[row.split](copies, device) if copies.count_E.max() > 1 else None

    def counts(self, expert_A: Tensor) -> Tensor:
        """[E] assignments of each expert."""
        return torch.zeros(self.num_experts, dtype=torch.long, device=expert_A.device).scatter_add_(
            0, expert_A, torch.ones_like(expert_A)
        )

    def slots(self, assigned: Assigned, rule: SplitRule) -> Tensor:
        """[A] padded slot of every assignment."""
        return self.slot_EC[assigned.expert, rule.choose(assigned)]


def positions(expert_A: Tensor, counts_E: Tensor) -> Tensor:
    """[A] index of each assignment among those of the same expert, in order."""
    order = torch.argsort(expert_A, stable=True)
    starts_E = torch.cumsum(counts_E, 0) - counts_E
    index = torch.arange(len(expert_A), device=expert_A.device)
    result = torch.empty_like(expert_A)
    result[order] = index - starts_E[expert_A[order]]
    return result

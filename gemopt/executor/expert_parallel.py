"""The live seam: an expert-parallel implementation for transformers that serves any placement.

transformers gives each experts module to an `EPImplementation`, called with global expert ids. This one turns them into
slots before the all-to-all, and owns this rank's expert weights, one row per slot, once an `Executor` is attached.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gemopt.costs import CostModel
from gemopt.exceptions import InputError, missing

try:
    import torch
    import torch.distributed as dist
    from torch import Tensor, nn
    from torch.distributed.tensor import DTensor
    from transformers.distributed.expert_parallel import AllToAllEP, EPImplementationInterface
except ImportError as error:
    raise missing(error, __name__) from None

from gemopt.executor.plan import LayerRow
from gemopt.executor.splits import Assigned, Routing, positions
from gemopt.executor.transfer import wrong_rows
from gemopt.models.checkpoint_names import of_tower
from gemopt.placement import EMPTY

NAME = "gemopt"
FILES = "serve this model from a permuted checkpoint (gemopt export --to checkpoint)"


class Meter(Protocol):
    """Sees every dispatch: logical experts chosen, and the time in which this rank's experts compute."""

    def begin(self, dispatch: SlotDispatch, top_k_index: Tensor) -> Any:
        """Before the experts compute; what it returns goes to `end`."""

    def end(self, dispatch: SlotDispatch, clock: Any) -> None:
        """After they have (on a GPU: after they are queued)."""


class SlotDispatch(AllToAllEP):
    """Dispatch of one MoE layer by slots instead of by contiguous experts.

    Until an `Executor` takes over, weights stay as transformers sharded them and slots are experts.
    """

    num_local_experts: int  # type: ignore[assignment]

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts: Any = experts
        self.rank: int = ep_mesh.get_local_rank()
        self.num_ranks: int = ep_mesh.size()
        self.num_experts = self.num_local_experts * self.num_ranks
        self.nodes: list[int] = [0] * self.num_ranks
        slots = np.full(self.num_ranks, self.num_local_experts)
        self.row = LayerRow(np.arange(self.num_experts), slots)
        self.cost: CostModel | None = None
        self.routing: Routing | None = None
        self.canaries: Tensor | None = None
        self.meter: Meter | None = None
        experts.__dict__["gemopt_dispatch"] = self

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        base: Any = super()
        if self.routing is None:
            untouched: Tensor = base.__call__(hidden_states, top_k_index, top_k_weights)
            return untouched
        slots = self._slots(self.routing, top_k_index)
        tokens, slot_ids, weights, state = base._dispatch_tokens(hidden_states, slots, top_k_weights)
        clock = None if self.meter is None else self.meter.begin(self, top_k_index)
        # A rank without rows has nothing to compute, and possibly no slot to compute it with.
        computed = self.experts_forward(tokens, slot_ids, weights) if tokens.shape[0] else tokens
        if self.meter is not None:
            self.meter.end(self, clock)
        output: Tensor = base._combine_tokens(computed, state)
        return output

    def _slots(self, routing: Routing, top_k_index: Tensor) -> Tensor:
        """[N, K] padded slots of logical experts."""
        if routing.rule is None:
            return routing.first_E[top_k_index]
        expert_A = top_k_index.reshape(-1)
        position, total_E = None, None
        if routing.rule.needs_counts:
            counts_E = routing.counts(expert_A)
            before_E, total_E = self._group_counts(counts_E)
            position = positions(expert_A, counts_E) + before_E[expert_A]
        sender = self._senders(top_k_index)
        assigned = Assigned(expert_A, sender, position, total_E)
        return routing.slots(assigned, routing.rule).view_as(top_k_index)

    def _group_counts(self, counts_E: Tensor) -> tuple[Tensor, Tensor]:
        """[E] assignments in the batches before this rank's, and in all batches of the group."""
        if self.shares_batch:
            return torch.zeros_like(counts_E), counts_E
        gathered = counts_E.new_empty(self.num_ranks, len(counts_E))
        dist.all_gather(list(gathered), counts_E, group=self.ep_mesh.get_group())
        batches = gathered[:: self.tp_mesh.size()]
        mine = self.rank // self.tp_mesh.size()
        return batches[:mine].sum(dim=0), batches.sum(dim=0)

    def _senders(self, top_k_index: Tensor) -> Tensor:
        """[A] rank that sends each assignment: this one, or the owner of its slice of the shared batch."""
        rows, top_k = top_k_index.shape
        size = self.tp_mesh.size()
        chunk = max(1, -(-rows // size))
        first = self.rank // size * size
        return (first + torch.arange(rows, device=top_k_index.device) // chunk).repeat_interleave(top_k)

    def weights(self) -> dict[str, Tensor]:
        """This rank's expert weights by parameter name, one row per slot."""
        return {name: self.experts._parameters[name].data for name in self._names}

    def wrong(self) -> list[int]:
        """Experts that this rank should hold and whose weights are not those that the network was loaded with."""
        assert self.canaries is not None
        start = int(self.row.slots_per_rank[: self.rank].sum())
        mine = self.row.row_P[start : start + int(self.row.slots_per_rank[self.rank])]
        held = {row: int(expert) for row, expert in enumerate(mine) if expert != EMPTY}
        return wrong_rows(self.weights(), held, self.canaries)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.weights().values())).device

    @property
    def expert_bytes(self) -> int:
        """Weights of one expert."""
        return sum(w.element_size() * math.prod(w.shape[1:]) for w in self.weights().values())

    def take_over(self) -> None:
        """Own this rank's expert weights as plain tensors. Nothing is copied; no gradients from here on."""
        if self.routing is not None:
            return
        sharded = {n: p for n, p in self.experts.named_parameters(recurse=False) if isinstance(p, DTensor)}
        local = {name: parameter.to_local().detach() for name, parameter in sharded.items()}
        for name, tensor in local.items():
            if tensor.shape[0] != self.num_local_experts:
                raise InputError(
                    f"experts.{name}",
                    f"{tensor.shape[0]} of {self.num_local_experts} experts on a rank",
                    "whole experts on every rank",
                    "use ep_size = fsdp_size x tp_size in DistributedConfig",
                )
        if all(tensor.ndim < 3 for tensor in local.values()):
            limit = "expert weights sharded by ep_plan, as tensors [experts, ..., ...]"
            raise InputError("experts", type(self.experts).__name__, limit, FILES)
        self._refuse_left_behind(sharded)
        _release_from_fsdp(self.experts)
        for name, tensor in local.items():
            self.experts._parameters[name] = nn.Parameter(tensor.contiguous(), requires_grad=False)
        self._names = sorted(local)
        self.experts.register_state_dict_pre_hook(lambda *_: _refuse_rows("state_dict", "save"))
        self.experts.register_load_state_dict_pre_hook(_refuse_loading)
        self.routing = self.routing_for(self.row)

    def _refuse_left_behind(self, moved: Mapping[str, Tensor]) -> None:
        """A companion of the experts that is not sharded with them would stay when they move."""
        held = {name: value for name, value in vars(self.experts).items() if hasattr(value, "shape")}
        others = {**held, **dict(self.experts.named_parameters()), **dict(self.experts.named_buffers())}
        for name, tensor in others.items():
            if name not in moved and {self.num_experts, self.num_local_experts} & set(tensor.shape) - {1}:
                raise InputError(
                    f"experts.{name}",
                    f"shape {list(tensor.shape)}",
                    "what has an axis of experts must be sharded with their weights by the ep_plan",
                    FILES,
                )

    def routing_for(self, row: LayerRow) -> Routing:
        """Tables for a placement of this layer."""
        return Routing(row, self.num_experts, self.nodes, self.device, self.cost)

    def commit(
        self, row: LayerRow, routing: Routing, tensors: Mapping[str, Tensor], slots: Sequence[int] | None
    ) -> None:
        """Put weights and routing in force together. Running it again changes nothing.

        `tensors` replace this rank's weights, or only the rows `slots` of them.
        """
        for name, tensor in tensors.items():
            if slots is None:
                self.experts._parameters[name] = nn.Parameter(tensor, requires_grad=False)
                continue
            weight = self.experts._parameters[name].data
            for slot, received in zip(slots, tensor, strict=True):  # twice as fast as index_copy_ of 16 bits on CPU
                weight[slot].copy_(received)
        self.experts.num_experts = int(row.slots_per_rank[self.rank])
        self.num_local_experts = routing.stride
        self.routing = routing
        self.row = row


def _release_from_fsdp(experts: Any) -> None:
    """Take the experts out of FSDP2, which would gather a copy of them at every forward pass, from its own storage."""
    get_state = getattr(experts, "_get_fsdp_state", None)
    if get_state is None:
        return
    state = get_state()
    if hasattr(state, "_fsdp_param_groups"):
        state._fsdp_param_groups.clear()
    else:
        state._fsdp_param_group = None


def _refuse_rows(method: str, verb: str) -> None:
    raise InputError(
        f"model.{method}",
        "experts placed by gemopt",
        "rows are slots of this rank, not experts of the network",
        f"{verb} the model before attaching an Executor, or export a permuted checkpoint",
    )


def _refuse_loading(experts: Any, state: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Adapters and other parts of a model may be loaded, experts not."""
    if any(prefix + name in state for name in experts._parameters):
        _refuse_rows("load_state_dict", "load")


def dispatches(model: nn.Module) -> list[tuple[str, SlotDispatch]]:
    """(path of the experts module, its dispatch), in the order of the decoder's layers."""
    found = [(path, getattr(module, "gemopt_dispatch", None)) for path, module in model.named_modules()]
    return [(path, dispatch) for path, dispatch in found if dispatch is not None and not of_tower(path)]


EPImplementationInterface.register(NAME, SlotDispatch)

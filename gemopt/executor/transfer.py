"""Move expert weights between ranks, and prove that the right ones arrived."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from gemopt.exceptions import missing

try:
    import torch
    import torch.distributed as dist
    from torch import Tensor
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

from gemopt.executor.memory import zeros
from gemopt.executor.plan import LayerRow, Stage
from gemopt.migration import Link
from gemopt.placement import EMPTY

CANARY_VALUES = 64


@dataclass
class Incoming:
    """What one rank receives in a stage, aside from the weights in force.

    `tensors[name]` has one row per received expert (`slots`: the local slots they are for), or, where the number of
    slots changes, one row per new slot (`slots` None). `row_of` maps a slot of the new placement to its row.
    """

    tensors: dict[str, Tensor]
    slots: list[int] | None
    row_of: dict[int, int]
    works: list[Any] = field(default_factory=list)


class Pool:
    """Buffers that are used again from stage to stage: fresh memory costs more than the copy into it.

    Besides the receive buffers, on a CPU, the rows of a tensor that was replaced become those of the next layer's.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.Size], Tensor] = {}
        self._spare: dict[tuple[str, torch.dtype, torch.Size], Tensor] = {}
        self._lent: dict[int, Tensor] = {}  # by address

    def rows(self, name: str, count: int, like: Tensor) -> Tensor:
        """[count, ...] rows to receive a tensor's in; the next call may return the same memory."""
        key = (name, like.dtype, like.shape[1:])
        buffer = self._buffers.get(key)
        if buffer is None or len(buffer) < count:
            buffer = self._buffers[key] = zeros(count, like)
        return buffer[:count]

    def lend(self, name: str, count: int, like: Tensor) -> Tensor:
        """[count, ...] rows of any content that become the weights of a layer."""
        if like.device.type != "cpu":  # its allocator keeps what is freed
            return zeros(count, like)
        buffer = self._spare.pop((name, like.dtype, like.shape[1:]), None)
        if buffer is None or len(buffer) < count:
            buffer = zeros(count, like)
        self._lent[buffer.data_ptr()] = buffer
        return buffer[:count]

    def take_back(self, weights: Mapping[str, Tensor]) -> None:
        """Weights that are no longer in force."""
        for name, weight in weights.items():
            buffer = self._lent.pop(weight.data_ptr(), weight)  # of one the model was loaded with: its rows, no more
            key = (name, weight.dtype, weight.shape[1:])
            if weight.device.type == "cpu" and len(buffer) >= len(self._spare.get(key, ())):
                self._spare[key] = buffer

    def keep_only(self, weights: Iterable[Tensor]) -> None:
        """Forget what was lent to weights that others than the executor have replaced."""
        known = {weight.data_ptr() for weight in weights}
        self._lent = {address: buffer for address, buffer in self._lent.items() if address in known}


def allocate(stage: Stage, before: LayerRow, rank: int, weights: Mapping[str, Tensor], pool: Pool) -> Incoming:
    """Make room for what `rank` receives; rows that stay are copied where tensors are made anew."""
    after = stage.after
    mine = [m.dst_slot for m, (_, dst) in zip(stage.moves, stage.ranks(before), strict=True) if dst == rank]
    start = int(after.slots_per_rank[:rank].sum())
    if not stage.rebuild:
        tensors = {name: pool.rows(name, len(mine), weight) for name, weight in weights.items()}
        return Incoming(tensors, [slot - start for slot in mine], {slot: row for row, slot in enumerate(mine)})
    size = int(after.slots_per_rank[rank])
    tensors = {name: pool.lend(name, size, weight) for name, weight in weights.items()}
    for row in (after.row_P[start : start + size] == EMPTY).nonzero()[0].tolist():
        for tensor in tensors.values():
            tensor[row].zero_()
    old = int(before.slots_per_rank[:rank].sum())
    for row in range(min(size, int(before.slots_per_rank[rank]))):
        if after.row_P[start + row] == before.row_P[old + row] != EMPTY:
            for name, tensor in tensors.items():
                tensor[row].copy_(weights[name][row])
    return Incoming(tensors, None, {slot: slot - start for slot in range(start, start + size)})


def transfer(
    stage: Stage,
    before: LayerRow,
    weights: Mapping[str, Tensor],
    incoming: Incoming,
    *,
    group: Any,
    deadline: float,
) -> None:
    """Send and receive what a stage moves; returns when this rank's part is complete.

    Raises
    ------
    RuntimeError
        When a peer is gone or `deadline` (of `time.monotonic`) passes.
    """
    rank = dist.get_rank(group)
    local = int(before.slots_per_rank[:rank].sum())
    for relays in (False, True):
        receives: list[dist.P2POp] = []  # posted first, so that what a faster rank sends has a place to go
        sends: list[dist.P2POp] = []
        for move, (src, dst) in zip(stage.moves, stage.ranks(before), strict=True):
            if (move.link is Link.RELAY) is not relays or rank not in (src, dst):
                continue
            for name, weight in weights.items():
                source = incoming.tensors[name] if relays else weight
                if src == rank:
                    row = source[incoming.row_of[move.src_slot] if relays else move.src_slot - local]
                    if dst == rank:
                        incoming.tensors[name][incoming.row_of[move.dst_slot]].copy_(row)
                        continue
                    sends.append(dist.P2POp(dist.isend, row, dist.get_global_rank(group, dst), group))
                else:
                    row = incoming.tensors[name][incoming.row_of[move.dst_slot]]
                    receives.append(dist.P2POp(dist.irecv, row, dist.get_global_rank(group, src), group))
        if receives or sends:
            incoming.works = dist.batch_isend_irecv([*receives, *sends])
        for work in incoming.works:
            work.wait(timedelta(seconds=max(0.01, deadline - time.monotonic())))
        incoming.works = []
    synchronize(next(iter(weights.values())).device)


def synchronize(device: torch.device) -> None:
    """Wait for the current stream of a GPU: waiting on NCCL, or copying, only queues work there."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def canaries(weights: Mapping[str, Tensor]) -> Tensor:
    """[rows, bytes] fingerprint of every row: values at even distances, first and last included, of every tensor."""
    parts = []
    for name in sorted(weights):
        weight = weights[name]
        size = math.prod(weight.shape[1:])
        flat = weight.reshape(len(weight), size)
        picks = torch.linspace(0, size - 1, min(CANARY_VALUES, size), dtype=torch.float64, device=flat.device)
        parts.append(flat[:, picks.round().long()].contiguous().view(torch.uint8))
    return torch.cat(parts, dim=1)


def wrong_rows(tensors: Mapping[str, Tensor], experts: Mapping[int, int], canaries_EB: Tensor) -> list[int]:
    """Experts whose weights are not the network's, of those that rows should hold: row -> expert."""
    if not experts:
        return []
    rows, wanted = (torch.tensor(list(part), device=canaries_EB.device) for part in (experts, experts.values()))
    differ = (canaries(tensors)[rows] != canaries_EB[wanted]).any(dim=1)
    return [expert for expert, bad in zip(experts.values(), differ.tolist(), strict=True) if bad]

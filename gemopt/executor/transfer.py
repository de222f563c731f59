"""Move expert weights between ranks, and prove that the right ones arrived."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
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
    """What one rank receives in a stage, aside from the weights in force, and sends of those.

    `tensors[name]` has one row per received expert (`slots`: the local slots they are for), or, where the number of
    slots changes, one row per new slot (`slots` None). `row_of` maps a slot of the new placement to its row. `before`
    and `weights`: in force on this rank.
    """

    stage: Stage
    before: LayerRow
    weights: Mapping[str, Tensor]
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

    def rows(self, wanted: Sequence[tuple[str, int, Tensor]]) -> list[Tensor]:
        """For each (name, count, like) [count, ...] rows to receive a tensor's in, none twice; the next call may return
        the same memory."""
        keys = [(name, like.dtype, like.shape[1:]) for name, _, like in wanted]
        starts, ends = [], dict.fromkeys(keys, 0)
        for key, (_, count, _) in zip(keys, wanted, strict=True):
            starts.append(ends[key])
            ends[key] += count
        for key, (_, _, like) in zip(keys, wanted, strict=True):
            if key not in self._buffers or len(self._buffers[key]) < ends[key]:
                self._buffers[key] = zeros(ends[key], like)
        return [
            self._buffers[key][start : start + count]
            for key, start, (_, count, _) in zip(keys, starts, wanted, strict=True)
        ]

    def lend(self, name: str, count: int, like: Tensor) -> Tensor:
        """[count, ...] rows of any content that become the weights of a layer."""
        if like.device.type != "cpu" or not count:  # its allocator keeps what is freed; no rows have no address
            return zeros(count, like)
        buffer = self._spare.pop((name, like.dtype, like.shape[1:]), None)
        if buffer is None or len(buffer) < count:
            buffer = zeros(count, like)
        self._lent[buffer.data_ptr()] = buffer
        return buffer[:count]

    def take_back(self, weights: Mapping[str, Tensor]) -> None:
        """Weights that are no longer in force."""
        for name, weight in weights.items():
            if not len(weight):
                continue
            buffer = self._lent.pop(weight.data_ptr(), weight)  # of one the model was loaded with: its rows, no more
            key = (name, weight.dtype, weight.shape[1:])
            if weight.device.type == "cpu" and len(buffer) >= len(self._spare.get(key, ())):
                self._spare[key] = buffer

    def keep_only(self, weights: Iterable[Tensor]) -> None:
        """Forget what was lent to weights that others than the executor have replaced."""
        known = {weight.data_ptr() for weight in weights}
        self._lent = {address: buffer for address, buffer in self._lent.items() if address in known}


def allocate(
    stages: Sequence[Stage], layers: Sequence[tuple[LayerRow, Mapping[str, Tensor]]], rank: int, pool: Pool
) -> list[Incoming]:
    """Make room for what `rank` receives in stages that are carried out together.

    layers: for each stage, the row and this rank's weights in force.
    """
    arriving = [
        [m.dst_slot for m, (_, dst) in zip(stage.moves, stage.ranks(before), strict=True) if dst == rank]
        for stage, (before, _) in zip(stages, layers, strict=True)
    ]
    wanted = [
        (name, len(slots), weight)
        for stage, (_, weights), slots in zip(stages, layers, arriving, strict=True)
        for name, weight in weights.items()
        if not stage.rebuild
    ]
    rows = iter(pool.rows(wanted))
    result = []
    for stage, (before, weights), slots in zip(stages, layers, arriving, strict=True):
        if stage.rebuild:
            result.append(_rebuilt(stage, before, weights, rank, pool))
            continue
        start = int(stage.after.slots_per_rank[:rank].sum())
        tensors = {name: next(rows) for name in weights}
        row_of = {slot: row for row, slot in enumerate(slots)}
        result.append(Incoming(stage, before, weights, tensors, [slot - start for slot in slots], row_of))
    return result


def _rebuilt(stage: Stage, before: LayerRow, weights: Mapping[str, Tensor], rank: int, pool: Pool) -> Incoming:
    """Tensors that replace those of the layer, with copies of the rows that stay."""
    after = stage.after
    start, size = int(after.slots_per_rank[:rank].sum()), int(after.slots_per_rank[rank])
    tensors = {name: pool.lend(name, size, weight) for name, weight in weights.items()}
    for row in (after.row_P[start : start + size] == EMPTY).nonzero()[0].tolist():
        for tensor in tensors.values():
            tensor[row].zero_()
    old = int(before.slots_per_rank[:rank].sum())
    for row in range(min(size, int(before.slots_per_rank[rank]))):
        if after.row_P[start + row] == before.row_P[old + row] != EMPTY:
            for name, tensor in tensors.items():
                tensor[row].copy_(weights[name][row])
    row_of = {slot: slot - start for slot in range(start, start + size)}
    return Incoming(stage, before, weights, tensors, None, row_of)


def transfer(parts: Sequence[Incoming], *, group: Any, deadline: float) -> None:
    """Send and receive what some stages move, all at once; returns when this rank's part is complete.

    Raises
    ------
    RuntimeError
        When a peer is gone or `deadline` (of `time.monotonic`) passes.
    """
    for relays in (False, True):
        receives: list[dist.P2POp] = []  # posted first, so that what a faster rank sends has a place to go
        sends: list[dist.P2POp] = []
        for part in parts:
            _post(part, relays, group, receives, sends)
        works = dist.batch_isend_irecv([*receives, *sends]) if receives or sends else []
        for part in parts:
            part.works = works  # alive as long as the rows they write to
        for work in works:
            work.wait(timedelta(seconds=max(0.01, deadline - time.monotonic())))
        for part in parts:
            part.works = []
    synchronize(next(iter(parts[0].weights.values())).device)


def _post(part: Incoming, relays: bool, group: Any, receives: list[dist.P2POp], sends: list[dist.P2POp]) -> None:
    """Add one stage's messages of one round; what stays on this rank is copied."""
    stage, before, incoming = part.stage, part.before, part.tensors
    rank = dist.get_rank(group)
    local = int(before.slots_per_rank[:rank].sum())
    for move, (src, dst) in zip(stage.moves, stage.ranks(before), strict=True):
        if (move.link is Link.RELAY) is not relays or rank not in (src, dst):
            continue
        for name, weight in part.weights.items():
            if src == rank:
                row = incoming[name][part.row_of[move.src_slot]] if relays else weight[move.src_slot - local]
                if dst == rank:
                    incoming[name][part.row_of[move.dst_slot]].copy_(row)
                    continue
                sends.append(dist.P2POp(dist.isend, row, dist.get_global_rank(group, dst), group))
            else:
                row = incoming[name][part.row_of[move.dst_slot]]
                receives.append(dist.P2POp(dist.irecv, row, dist.get_global_rank(group, src), group))


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
    found = canaries(tensors)[rows]
    if found.shape[1] != canaries_EB.shape[1]:  # another type
        return list(experts.values())
    differ = (found != canaries_EB[wanted]).any(dim=1)
    return [expert for expert, bad in zip(experts.values(), differ.tolist(), strict=True) if bad]

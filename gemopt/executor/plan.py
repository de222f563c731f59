"""From the placement in force to the wanted one: stages that each leave a servable placement. No torch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError
from gemopt.executor.untangle import Untangle
from gemopt.migration import Link, Move, batches, keep_in_place, moves
from gemopt.placement import EMPTY, Placement, Split

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

REBUILD_SHARE = 0.75  # of a layer's slots that receive another expert


@dataclass(frozen=True, eq=False)
class LayerRow:
    """Placement of one layer: expert of each slot [P], slots of each rank [G], how copies share [P]."""

    row_P: IntArray
    slots_per_rank: IntArray
    split: Split = Split.EVEN
    weights_P: FloatArray | None = None

    @property
    def rank_of_slot(self) -> IntArray:
        """[P] rank of each slot."""
        return np.repeat(np.arange(len(self.slots_per_rank)), self.slots_per_rank)

    def canonical(self) -> LayerRow:
        """The same placement with the experts of each rank in order, whichever slots they are in."""
        order = np.lexsort((self.row_P, self.rank_of_slot))
        weights = None if self.weights_P is None else self.weights_P[order]
        return LayerRow(self.row_P[order], self.slots_per_rank, self.split, weights)

    def bytes(self) -> bytes:
        """Everything, slot by slot."""
        weights = b"" if self.weights_P is None else self.weights_P.astype("<f8").tobytes()
        arrays = self.slots_per_rank.astype("<i8").tobytes(), self.row_P.astype("<i8").tobytes()
        return b"|".join((*arrays, self.split.value.encode(), weights))

    def same_as(self, other: LayerRow) -> bool:
        """Whether nothing would change."""
        return self.bytes() == other.bytes()


def layer_rows(placement: Placement) -> list[LayerRow]:
    """One `LayerRow` per MoE layer of a placement."""
    weights = placement.split_weights if placement.split is Split.STATIC else None
    return [
        LayerRow(row, placement.slots_per_rank, placement.split, None if weights is None else weights[layer])
        for layer, row in enumerate(placement.physical_to_logical)
    ]


def checksum(rows: Sequence[LayerRow]) -> str:
    """Hex digest of the placement of all layers; the order of slots within a rank does not matter."""
    return slot_checksum([row.canonical() for row in rows])


def slot_checksum(rows: Sequence[LayerRow]) -> str:
    """Hex digest of what every single slot holds."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(hashlib.sha256(row.bytes()).digest())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Stage:
    """What one commit changes: (part of) one layer.

    `rebuild`: new tensors replace those in force. Needed where slots per rank change; spares a copy where most rows
    arrive.
    """

    layer: int
    moves: tuple[Move, ...]
    after: LayerRow
    rebuild: bool

    def ranks(self, before: LayerRow) -> list[tuple[int, int]]:
        """(source rank, destination rank) of every move."""
        src, dst = before.rank_of_slot, self.after.rank_of_slot
        return [(int((dst if m.link is Link.RELAY else src)[m.src_slot]), int(dst[m.dst_slot])) for m in self.moves]


@dataclass(frozen=True, eq=False)
class Plan:
    """Stages in order, and what they cost.

    Attributes
    ----------
    current
        Rows in force before the first stage.
    stages
        To be committed one after the other; after each, every layer has a complete placement.
    expert_bytes
        [L] weights of one expert of each layer.
    """

    current: tuple[LayerRow, ...]
    stages: tuple[Stage, ...]
    expert_bytes: tuple[int, ...]

    def count(self) -> Counter[Link]:
        """Moves by link."""
        return Counter(move.link for stage in self.stages for move in stage.moves)

    def bytes(self) -> Counter[Link]:
        """Bytes by link."""
        total: Counter[Link] = Counter()
        for stage in self.stages:
            for move in stage.moves:
                total[move.link] += self.expert_bytes[stage.layer]
        return total

    @property
    def stays(self) -> int:
        """Experts, over all layers and copies, that do not move."""
        last = list(self.current)
        for stage in self.stages:
            last[stage.layer] = stage.after
        return int(sum((row.row_P != EMPTY).sum() for row in last)) - sum(self.count().values())

    def buffer_bytes(self, batch_bytes: int = 0) -> int:
        """Extra memory on the rank that needs most: one stage at a time, or batches of up to `batch_bytes`."""
        whole = [sum(self._room(stage) for stage in batch) for batch in self.batches(batch_bytes)]
        return max((int(np.max(room_G)) for room_G in whole), default=0)

    def _room(self, stage: Stage) -> IntArray:
        """[G] bytes that each rank receives into."""
        slots_G = stage.after.slots_per_rank
        into = [stage.after.rank_of_slot[move.dst_slot] for move in stage.moves]
        rows_G = slots_G if stage.rebuild else np.bincount(into, minlength=len(slots_G))
        return np.asarray(rows_G * self.expert_bytes[stage.layer], dtype=np.int64)

    def batches(self, limit_bytes: int) -> list[tuple[Stage, ...]]:
        """Stages that are carried out together: as many as leave no rank more than so many bytes to receive at once.

        A stage that needs more is a batch of its own. No batch changes a layer twice.
        """
        rooms = [self._room(stage) for stage in self.stages]
        grouped = batches([stage.layer for stage in self.stages], rooms, limit_bytes)
        return [tuple(self.stages[index] for index in group) for group in grouped]

    def seconds(self, *, node_gbps: float, cross_gbps: float, latency_s: float = 1e-3) -> float:
        """Estimated time: per stage and round the busiest rank's bytes over its links, plus a fixed latency.

        Bandwidths are GB/s (1e9 bytes) of one rank in one direction.
        """
        total = 0.0
        for stage, before in self._with_rows():
            time = np.zeros((2, 2, len(before.slots_per_rank)))  # round, direction, rank
            for move, (src, dst) in zip(stage.moves, stage.ranks(before), strict=True):
                if move.link is Link.LOCAL:
                    continue
                rate = (cross_gbps if move.link is Link.CROSS else node_gbps) * 1e9
                second = int(move.link is Link.RELAY)
                time[second, 0, src] += self.expert_bytes[stage.layer] / rate
                time[second, 1, dst] += self.expert_bytes[stage.layer] / rate
            total += latency_s + float(time.max(axis=(1, 2)).sum())
        return total

    def _with_rows(self) -> Iterator[tuple[Stage, LayerRow]]:
        rows = list(self.current)
        for stage in self.stages:
            yield stage, rows[stage.layer]
            rows[stage.layer] = stage.after


def plan(
    current: Sequence[LayerRow],
    wanted: Sequence[LayerRow],
    expert_bytes: Sequence[int],
    *,
    nodes: Sequence[int] | IntArray | None = None,
    budget_bytes: int | None = None,
) -> Plan:
    """Plan a migration.

    Parameters
    ----------
    current, wanted
        [L] rows; slots of the wanted rows are reordered within ranks so that fewest experts move.
    nodes
        [G] node of each rank; one node when absent.
    budget_bytes
        Most memory a rank may use for what it receives. A layer that needs more is cut into stages that each leave
        every expert in place somewhere.

    Raises
    ------
    InputError
        When the budget is too small; the message says what would do.
    """
    check_shape(current, wanted)
    stages: list[Stage] = []
    for layer, (before, after) in enumerate(zip(current, wanted, strict=True)):
        target = reordered(before, after)
        if not before.same_as(target):
            stages += _stages(layer, before, target, nodes, budget_bytes, expert_bytes[layer])
    return Plan(tuple(current), tuple(stages), tuple(expert_bytes))


def check_shape(current: Sequence[LayerRow], wanted: Sequence[LayerRow]) -> None:
    """Refuse a placement of other layers, ranks or experts than what is in force."""
    if len(current) != len(wanted):
        raise InputError("Placement.physical_to_logical", f"{len(wanted)} layers", f"the model has {len(current)}")
    ranks, given = len(current[0].slots_per_rank), len(wanted[0].slots_per_rank)
    if ranks != given:
        raise InputError("Placement.slots_per_rank", f"{given} ranks", f"the model runs on {ranks} ranks")
    experts, named = (int(rows[0].row_P.max()) + 1 for rows in (current, wanted))
    if experts != named:
        raise InputError("Placement.num_experts", named, f"the model has {experts} experts per layer")


def reordered(before: LayerRow, after: LayerRow) -> LayerRow:
    """`after` with the slots of each rank in the order that moves fewest experts."""
    order = keep_in_place(before.row_P, after.row_P, before.slots_per_rank, after.slots_per_rank)
    weights = None if after.weights_P is None else after.weights_P[order]
    return LayerRow(after.row_P[order], after.slots_per_rank, after.split, weights)


def _stages(
    layer: int, before: LayerRow, after: LayerRow, nodes: object, budget_bytes: int | None, expert_bytes: int
) -> list[Stage]:
    rebuild = not np.array_equal(before.slots_per_rank, after.slots_per_rank)
    whole = _stage(layer, before, after, nodes, rebuild=rebuild)
    incoming_G = np.bincount([after.rank_of_slot[m.dst_slot] for m in whole.moves], minlength=1)
    most = int(after.slots_per_rank.max())
    if budget_bytes is None or most * expert_bytes <= budget_bytes:
        return [replace(whole, rebuild=rebuild or len(whole.moves) >= REBUILD_SHARE * len(after.row_P))]
    needed = most if rebuild else int(incoming_G.max())
    if needed * expert_bytes <= budget_bytes:
        return [whole]
    smallest = needed if rebuild else 1
    if budget_bytes < smallest * expert_bytes:
        raise InputError(
            "budget_bytes",
            budget_bytes,
            f"layer {layer} needs a buffer of {smallest * expert_bytes} bytes",
            "give a larger budget" + (", or keep the slots of each rank" if rebuild else ""),
        )
    return _small_stages(layer, before, after, nodes, budget_bytes // max(1, expert_bytes))


def _stage(layer: int, before: LayerRow, after: LayerRow, nodes: object, *, rebuild: bool) -> Stage:
    listed = moves(before.row_P, after.row_P, before.slots_per_rank, after.slots_per_rank, nodes=nodes)  # type: ignore[arg-type]
    return Stage(layer, tuple(listed), after, rebuild)


def _small_stages(layer: int, before: LayerRow, after: LayerRow, nodes: object, limit: int) -> list[Stage]:
    """Cut a layer into stages in which no rank receives more than `limit` experts."""
    ranks, stages, row = before.rank_of_slot, [], before
    target_P = before.row_P.copy()
    received = np.zeros(len(before.slots_per_rank), dtype=np.int64)

    def close() -> None:
        nonlocal row
        step = _between(target_P, after)
        stages.append(_stage(layer, row, step, nodes, rebuild=False))
        row = step
        received[:] = 0

    for component in Untangle(before.row_P, after.row_P, before.rank_of_slot).components():
        arriving = np.bincount([ranks[slot] for slot, _ in component], minlength=len(received))
        if (received + arriving > limit).any():
            close()
        received += arriving
        for slot, expert in component:
            target_P[slot] = expert
    final = reordered(LayerRow(target_P, before.slots_per_rank), after)
    target_P = final.row_P
    close()
    return [*stages[:-1], Stage(layer, stages[-1].moves, final, False)]


def _between(row_P: IntArray, after: LayerRow) -> LayerRow:
    """A row on the way: copies that are there share as wanted, by weights that sum to 1 again."""
    if after.weights_P is None:
        return LayerRow(row_P.copy(), after.slots_per_rank, after.split)
    ranks = after.rank_of_slot
    wanted = {(int(r), int(e)): w for r, e, w in zip(ranks, after.row_P, after.weights_P, strict=True)}
    raw = np.array([wanted.get((int(r), int(e)), 0.0) for r, e in zip(ranks, row_P, strict=True)])
    full = row_P != EMPTY
    sums = np.bincount(row_P[full], weights=raw[full])
    raw[full & (sums[row_P] <= 0)] = 1.0
    sums = np.bincount(row_P[full], weights=raw[full])
    weights = np.where(full, raw / np.where(full, sums[row_P], 1.0), 0.0)
    return LayerRow(row_P.copy(), after.slots_per_rank, after.split, weights)


def common_split(rows: Sequence[LayerRow], layer_ids: Sequence[int]) -> Split:
    """The split of all layers; even shares are static ones too, and layers without copies have any."""
    by_split: dict[Split, list[int]] = {}
    for row, layer in zip(rows, layer_ids, strict=True):
        full_P = row.row_P[row.row_P != EMPTY]
        if len(full_P) > len(np.unique(full_P)):
            by_split.setdefault(row.split, []).append(layer)
    if len(by_split) < 2:
        return next(iter(by_split), rows[-1].split)
    if set(by_split) == {Split.EVEN, Split.STATIC}:
        return Split.STATIC
    found = ", ".join(f"{split.value} in layers {layers}" for split, layers in by_split.items())
    raise InputError("Placement.split", found, "one for all layers", "apply a placement first: a migration stopped")

"""Fewest and cheapest moves between two placements of one layer. Numpy only.

Slots of a rank are interchangeable: an expert that a rank keeps can keep its slot, and the order of the copies of an
expert (which the even split depends on) is the order of their ranks, since a rank holds at most one copy. So the
number of experts that must travel is a property of the two placements, and `keep_in_place` reaches it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError
from gemopt.placement import EMPTY, GivenPlacement, Placement
from gemopt.topology.doubts import INSIDE_GBS, LEAST_GBS

IntArray = NDArray[np.int64]
LEAST_BYTES, MOST_BYTES = 1e4, 5e9  # of an expert of a network that anybody serves
BATCH_BYTES = 1 << 26  # that layers copied beside serving, and committed together, may take of a rank at once


class Link(StrEnum):
    """How an expert gets to its slot.

    `local`: from another slot of the same rank. `node`: from a rank of the same node. `cross`: from another node.
    `relay`: from a rank of the same node that has just received it from another node.
    """

    LOCAL = "local"
    NODE = "node"
    CROSS = "cross"
    RELAY = "relay"


@dataclass(frozen=True, slots=True)
class Move:
    """One expert's weights going from a slot to a slot.

    `dst_slot` counts in the new placement, `src_slot` in the old one; that of a relay counts in the new one.
    """

    src_slot: int
    dst_slot: int
    expert: int
    link: Link


def held(row_P: IntArray, slots_per_rank: IntArray, num_experts: int) -> NDArray[np.bool_]:
    """[G, E] whether each rank holds each expert."""
    held_GE = np.zeros((len(slots_per_rank), num_experts), dtype=bool)
    ranks_P = np.repeat(np.arange(len(slots_per_rank)), slots_per_rank)
    full_P = row_P != EMPTY
    held_GE[ranks_P[full_P], row_P[full_P]] = True
    return held_GE


def count_moves(
    before_P: IntArray, after_P: IntArray, slots_before: IntArray, slots_after: IntArray | None = None
) -> int:
    """Experts that some rank must receive: (rank, expert) pairs that are new. Order of slots does not matter."""
    slots_after = slots_before if slots_after is None else slots_after
    num_experts = int(max(before_P.max(), after_P.max())) + 1
    return int((held(after_P, slots_after, num_experts) & ~held(before_P, slots_before, num_experts)).sum())


def keep_in_place(
    before_P: IntArray, wanted_P: IntArray, slots_before: IntArray, slots_after: IntArray | None = None
) -> IntArray:
    """[P] order of the wanted slots in which every expert that its rank keeps stays in its slot.

    `wanted_P[order]` is the same placement; apply `order` to split weights too. Newcomers take slots that were empty
    or did not exist before those of experts that leave.
    """
    slots_after = slots_before if slots_after is None else slots_after
    order_P = np.empty(len(wanted_P), dtype=np.int64)
    starts_before, starts_after = _starts(slots_before), _starts(slots_after)
    for rank, size in enumerate(slots_after):
        start = int(starts_after[rank])
        old = np.full(size, EMPTY)
        common = min(int(size), int(slots_before[rank]))
        old[:common] = before_P[starts_before[rank] : starts_before[rank] + common]
        order_P[start : start + size] = start + _order_on_rank(old, wanted_P[start : start + size])
    return order_P


def _order_on_rank(old_S: IntArray, new_S: IntArray) -> IntArray:
    if (old_S == new_S).all():
        return np.arange(len(new_S))
    slot_of = {int(expert): slot for slot, expert in enumerate(old_S) if expert != EMPTY}
    order_S = np.full(len(new_S), -1)
    waiting = []
    for source, expert in enumerate(new_S):
        if expert != EMPTY and int(expert) in slot_of:
            order_S[slot_of[int(expert)]] = source
        else:
            waiting.append(source)
    free = [slot for slot in range(len(new_S)) if order_S[slot] < 0]
    free.sort(key=lambda slot: old_S[slot] != EMPTY)
    waiting.sort(key=lambda source: new_S[source] == EMPTY)
    order_S[free] = waiting
    return order_S


def relabel(current: GivenPlacement, wanted: GivenPlacement) -> Placement:
    """The wanted placement with the slots of each rank in the order that moves fewest experts.

    Raises
    ------
    InputError
        When they are of other layers or experts.
    """
    current, wanted = Placement.of(current, "current"), Placement.of(wanted, "wanted")
    for name in ("layer_ids", "num_experts"):
        if getattr(current, name) != getattr(wanted, name):
            raise InputError(
                f"wanted.{name}", getattr(wanted, name), f"{getattr(current, name)} in the current placement"
            )
    orders = [
        keep_in_place(before, after, current.slots_per_rank, wanted.slots_per_rank)
        for before, after in zip(current.physical_to_logical, wanted.physical_to_logical, strict=True)
    ]
    rows_LP = np.take_along_axis(wanted.physical_to_logical, np.stack(orders), axis=1)
    weights_LP = wanted.split_weights
    if weights_LP is not None:
        weights_LP = np.take_along_axis(weights_LP, np.stack(orders), axis=1)
    return wanted.changed(physical_to_logical=rows_LP, split_weights=weights_LP)


def moves(
    before_P: IntArray,
    after_P: IntArray,
    slots_before: IntArray,
    slots_after: IntArray | None = None,
    *,
    nodes: Sequence[int] | IntArray | None = None,
) -> list[Move]:
    """What has to travel, from the cheapest sources: same rank, same node, other node; senders share the work.

    An expert that several ranks of a node need from another node crosses once and is relayed inside the node.

    Parameters
    ----------
    before_P, after_P
        [P] experts by slot; the new row as `keep_in_place` orders it.
    nodes
        [G] node of each rank; all on one node when absent.
    """
    slots_after = slots_before if slots_after is None else slots_after
    ranks_before, ranks_after = (np.repeat(np.arange(len(s)), s) for s in (slots_before, slots_after))
    nodes_G = np.zeros(len(slots_before), dtype=np.int64) if nodes is None else np.asarray(nodes)
    same_slots = np.array_equal(slots_before, slots_after)
    if same_slots and _single(before_P) and _single(after_P):
        return _exchanged(before_P, after_P, ranks_before, nodes_G)
    holders: dict[int, list[int]] = {}
    for slot, expert in enumerate(before_P.tolist()):
        if expert != EMPTY:
            holders.setdefault(int(expert), []).append(slot)
    local_before, local_after = _local(slots_before), _local(slots_after)
    candidates = np.flatnonzero(before_P != after_P) if same_slots else np.arange(len(after_P))
    changed = [
        slot
        for slot in candidates.tolist()
        if (expert := after_P[slot]) != EMPTY
        and not any(
            ranks_before[s] == ranks_after[slot] and local_before[s] == local_after[slot] for s in holders[int(expert)]
        )
    ]
    changed.sort(key=lambda slot: len(holders[int(after_P[slot])]))
    sent_G = np.zeros(len(slots_before), dtype=np.int64)
    relays: dict[tuple[int, int], int] = {}
    result = []
    for slot in changed:
        expert, rank = int(after_P[slot]), int(ranks_after[slot])
        source, link = _source(holders[expert], rank, ranks_before, nodes_G, sent_G)
        key = (expert, int(nodes_G[rank]))
        if link is Link.CROSS and key in relays:
            result.append(Move(relays[key], slot, expert, Link.RELAY))
            continue
        if link is Link.CROSS:
            relays[key] = slot
        if link is not Link.LOCAL:
            sent_G[ranks_before[source]] += 1
        result.append(Move(source, slot, expert, link))
    return sorted(result, key=lambda move: (move.link is Link.RELAY, move.dst_slot))


def _single(row_P: IntArray) -> bool:
    """Whether no expert has copies."""
    return bool(np.bincount(row_P[row_P != EMPTY], minlength=1).max() <= 1)


def _exchanged(before_P: IntArray, after_P: IntArray, ranks_P: IntArray, nodes_G: IntArray) -> list[Move]:
    """The moves where every expert has one source and one target."""
    where_E = np.full(int(max(before_P.max(), after_P.max())) + 1, -1)
    full = np.flatnonzero(before_P != EMPTY)
    where_E[before_P[full]] = full
    targets = np.flatnonzero((before_P != after_P) & (after_P != EMPTY))
    sources, nodes_P = where_E[after_P[targets]], nodes_G[ranks_P]
    cross, local = nodes_P[sources] != nodes_P[targets], ranks_P[sources] == ranks_P[targets]
    links = [Link.CROSS if far else Link.LOCAL if near else Link.NODE for far, near in zip(cross, local, strict=True)]
    listed = zip(sources.tolist(), targets.tolist(), after_P[targets].tolist(), links, strict=True)
    return [Move(*each) for each in listed]


def _source(holders: list[int], rank: int, rank_of: IntArray, nodes_G: IntArray, sent_G: IntArray) -> tuple[int, Link]:
    def cost(slot: int) -> tuple[bool, bool, int, int]:
        owner = rank_of[slot]
        return bool(owner != rank), bool(nodes_G[owner] != nodes_G[rank]), int(sent_G[owner]), slot

    best = min(holders, key=cost)
    other_rank, other_node, _, _ = cost(best)
    return best, Link.CROSS if other_node else Link.NODE if other_rank else Link.LOCAL


def batches(layers: Iterable[int], bytes_NG: Sequence[NDArray[Any]], limit_bytes: float) -> list[list[int]]:
    """Indices of consecutive parts that are copied, agreed on and committed together.

    As many as fit: no rank receives more than `limit_bytes` in a batch of several, and none is of a layer twice.

    Parameters
    ----------
    layers
        [N] layer of each part.
    bytes_NG
        [N, G] what each rank receives.
    """
    found: list[list[int]] = []
    full_G, seen = np.zeros(0), set[int]()
    for index, (layer, bytes_G) in enumerate(zip(layers, bytes_NG, strict=True)):
        if not found or layer in seen or (full_G + bytes_G).max(initial=0) > limit_bytes:
            found.append([])
            full_G, seen = np.zeros(len(bytes_G)), set()
        found[-1].append(index)
        full_G = full_G + bytes_G
        seen.add(layer)
    return found


def size_doubts(expert_bytes: float | None, gbs: float | None = None, limit_bytes: float | None = None) -> list[str]:
    """Sentences on what is hardly in bytes of one expert, in GB/s of a rank, or in bytes that a rank may receive."""
    found = []
    if expert_bytes is not None and not LEAST_BYTES <= expert_bytes <= MOST_BYTES:
        found.append(f"an expert of {expert_bytes:g} bytes: is that in bytes, and of one layer?")
    if gbs is not None and not LEAST_GBS <= gbs <= INSIDE_GBS:
        found.append(f"experts copied at {gbs:g} GB/s, {gbs * 1e9:g} bytes per second: is the unit right?")
    if expert_bytes is not None and limit_bytes is not None and 0 < limit_bytes < expert_bytes:
        found.append(f"a rank may receive {limit_bytes:g} bytes, and an expert has {expert_bytes:g}: nothing moves")
    return found


def _starts(slots: IntArray) -> IntArray:
    return np.cumsum(slots) - slots


def _local(slots: IntArray) -> IntArray:
    return np.arange(int(slots.sum())) - np.repeat(_starts(slots), slots)

"""Tokens on their way: which slots they go to, through which ports, and how many bytes and microseconds that is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError, UnsupportedError
from gemopt.latency import Curve, FloatArray
from gemopt.placement import EMPTY, Split
from gemopt.splits import even_shares, static_shares
from gemopt.topology import NONE, Topology

IntArray = NDArray[Any]
BLOCK = 1 << 24  # numbers held at once


@dataclass(frozen=True, eq=False)
class Routes:
    """What one token from a sender to a destination puts on the ports. C senders, D destinations, R ports.

    Destinations are the ranks and, where a token goes to another node once, the nodes after them. The sparse rows
    [C * D] in `start`, `port`, `bytes` have two columns more than there are ports: bytes between nodes, and between
    ranks. curves, curve_of: as in `Ports`.
    """

    senders: int
    destinations: int
    num_ports: int
    start: NDArray[np.int64]
    port: NDArray[np.int32]
    bytes: FloatArray
    curves: list[Curve]
    curve_of: NDArray[np.int64]
    node_of_rank: NDArray[np.int64]

    @cached_property
    def matrix(self) -> Any:
        """[C * D, R + 2] the same as a scipy matrix."""
        from scipy.sparse import csr_matrix

        shape = (self.senders * self.destinations, self.num_ports + 2)
        return csr_matrix((self.bytes, self.port, self.start), shape=shape)

    def times(self, bytes_TR: FloatArray) -> FloatArray:
        """[T] microseconds of the fullest port; a port without bytes takes none."""
        time_T = np.zeros(len(bytes_TR))
        for index, curve in enumerate(self.curves):
            own = bytes_TR[:, np.flatnonzero(self.curve_of == index)]
            if own.size:
                time_T = np.maximum(time_T, np.where(own > 0, curve(own), 0.0).max(axis=1))
        return time_T


def routes(topology: Topology, *, per_node: bool, token_bytes: int, back: bool) -> Routes:
    """Routes from every rank. Per node, what is for another node goes to the gate there and from it to its ranks.

    `back`: the same ways in the other direction.
    """
    ranks, nodes = topology.num_ranks, topology.num_nodes
    source, target = np.broadcast_arrays(np.arange(ranks)[:, None], np.arange(ranks)[None])
    if per_node:
        forward = topology.gates[:, topology.node_of_rank]
        gate = topology.gates.copy()
        gate[np.arange(ranks), topology.node_of_rank] = np.arange(ranks)
        own_node = topology.node_of_rank[:, None] == topology.node_of_rank[None]
        source = np.where(own_node, source, forward)
        source = np.concatenate([source, np.broadcast_to(np.arange(ranks)[:, None], (ranks, nodes))], axis=1)
        target = np.concatenate([target, gate], axis=1)
    if back:
        source, target = target, source
    ports = topology.ports
    used = np.where((source != target)[:, :, None], ports.of_pair[source, target], NONE)
    num_ports = len(ports.names)
    crossing = topology.node_of_rank[source] != topology.node_of_rank[target]
    extra = np.stack([np.where(crossing, num_ports, NONE), np.where(source != target, num_ports + 1, NONE)], axis=2)
    used = np.concatenate([used, extra], axis=2).reshape(source.size, -1)
    start = np.concatenate([[0], np.cumsum((used != NONE).sum(axis=1))])
    port = used[used != NONE].astype(np.int32)
    return Routes(
        ranks, source.shape[1], num_ports, start, port, np.full(len(port), float(token_bytes)), ports.curves,
        ports.curve_of, topology.node_of_rank,
    )  # fmt: skip


def uniform(each: Routes) -> Routes:
    """The same with one sender, which is every rank alike."""
    from scipy.sparse import csr_matrix

    destinations = each.destinations
    row = np.tile(np.arange(destinations), each.senders)
    spread = csr_matrix(
        (np.full(len(row), 1.0 / each.senders), (row, np.arange(len(row)))), shape=(destinations, len(row))
    )
    found = (spread @ each.matrix).tocsr()
    found.sort_indices()
    return Routes(
        1, destinations, each.num_ports, found.indptr.astype(np.int64), found.indices.astype(np.int32), found.data,
        each.curves, each.curve_of, each.node_of_rank,
    )  # fmt: skip


def evenly(each: Routes, kind_R: NDArray[np.int64]) -> Routes:
    """The same as if all ports of a kind carried as much: one port for them all. kind_R: [R] 0, 1, ... without gaps."""
    kinds = int(kind_R.max()) + 1 if len(kind_R) else 0
    column = np.concatenate([kind_R, [kinds, kinds + 1]])[each.port].astype(np.int32)
    curves = []
    for kind in range(kinds):
        ports = np.flatnonzero(kind_R == kind)
        curve = each.curves[each.curve_of[ports[0]]]
        curves.append(Curve(curve.x * len(ports), curve.y, curve.slope / len(ports)))
    return replace(each, num_ports=kinds, port=column, curves=curves, curve_of=np.arange(kinds))


@dataclass(frozen=True, eq=False)
class Flow:
    """Tokens between senders and slots. N tokens, K slots each.

    slot_NK: [N, K] slot of each assignment, -1 for none. step_N, weight_N: [N] step, and how many such tokens.
    sender_N: [N] sender (0 where that is every rank alike). rank_P: [P] rank of each slot. routes: of each direction
    in which they are exchanged. follow_N: [N] slot on whose rank the sender is (dispatch: of the layer before; combine:
    of this one), None where senders stay where they are.
    """

    slot_NK: IntArray
    step_N: IntArray
    weight_N: IntArray
    sender_N: IntArray
    rank_P: IntArray
    routes: tuple[Routes, ...]
    num_steps: int
    follow_N: IntArray | None = None

    def parts(self) -> list[tuple[FloatArray, FloatArray]]:
        """For each direction ([T, R + 2] bytes, [T] microseconds)."""
        bytes_each = [np.zeros((self.num_steps, route.num_ports + 2)) for route in self.routes]
        width = self.routes[0].senders * self.routes[0].destinations
        block = max(1, BLOCK // width)
        for low in range(0, self.num_steps, block):
            high = min(self.num_steps, low + block)
            visits = self.visits(low, high)
            for found, route in zip(bytes_each, self.routes, strict=True):
                found[low:high] = visits @ route.matrix
        return [
            (found, route.times(found[:, : route.num_ports]))
            for found, route in zip(bytes_each, self.routes, strict=True)
        ]

    def visits(self, low: int, high: int) -> FloatArray:
        """[steps, C * D] tokens of each sender that reach each destination, in the steps from low to high."""
        route = self.routes[0]
        first, last = np.searchsorted(self.step_N, [low, high])
        slots = self.slot_NK[first:last]
        ranks = np.where(slots >= 0, self.rank_P[slots], NONE)
        groups = [ranks]
        if route.destinations > len(route.node_of_rank):
            nodes = np.where(slots >= 0, route.node_of_rank[ranks] + len(route.node_of_rank), NONE)
            groups.append(nodes)
        found = np.zeros((high - low) * route.senders * route.destinations)
        base = (self.step_N[first:last].astype(np.int64) - low) * route.senders + self.sender_N[first:last]
        for group in groups:
            once = np.sort(group, axis=1)
            new = once >= 0
            new[:, 1:] &= once[:, 1:] != once[:, :-1]
            token, place = np.nonzero(new)
            cell = base[token] * route.destinations + once[token, place]
            found += np.bincount(cell, weights=self.weight_N[first:last][token], minlength=len(found))
        return found.reshape(high - low, -1)


def deal(
    ids_NK: IntArray, step_N: IntArray, row_P: IntArray, num_steps: int, split: Split, weights_P: FloatArray | None
) -> NDArray[np.int32]:
    """[N, K] slot that serves each assignment, -1 for none: the copies get the shares of `evaluate`, in token order.

    Under the even split the copies of an expert take turns, under the static one each takes a stretch of its tokens.
    """
    experts = int(row_P.max()) + 1
    copies_E = np.bincount(row_P[row_P != EMPTY], minlength=experts)
    slot_E = np.full(experts + 1, NONE, np.int32)
    held = np.flatnonzero(row_P != EMPTY)
    slot_E[row_P[held][::-1]] = held[::-1]  # the first slot of each
    dealt = slot_E[ids_NK]
    if copies_E.max() <= 1:
        return np.asarray(dealt)
    if split not in (Split.EVEN, Split.STATIC):
        raise UnsupportedError("Placement.split", split.value, "links know the even and the static split", "use even")
    for expert in np.flatnonzero(copies_E > 1).tolist():
        slots = np.flatnonzero(row_P == expert)
        token, place = np.nonzero(ids_NK == expert)
        steps = step_N[token]
        counts_T = np.bincount(steps, minlength=num_steps)
        number = np.arange(len(token)) - (np.cumsum(counts_T) - counts_T)[steps]
        if split is Split.EVEN or weights_P is None:
            copy = number % len(slots)
        else:
            ends = np.cumsum(weights_P[slots])[:-1]
            copy = (number[:, None] >= np.floor(counts_T[steps][:, None] * ends + 0.5)).sum(axis=1)
        dealt[token, place] = slots[copy]
    return np.asarray(dealt)


def from_counts(
    counts_TE: IntArray, row_P: IntArray, split: Split, weights_P: FloatArray | None
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Slots [N, 1], steps [N] and numbers [N] of assignments, each of which is sent by itself."""
    if split is Split.STATIC and weights_P is not None:
        shares_TP = static_shares(counts_TE, row_P, weights_P)
    elif split is Split.EVEN or np.bincount(row_P[row_P != EMPTY]).max() <= 1:
        shares_TP = even_shares(counts_TE, row_P)
    else:
        raise UnsupportedError("Placement.split", split.value, "links know the even and the static split", "use even")
    step, slot = np.nonzero(shares_TP)
    return slot.astype(np.int32)[:, None], step.astype(np.int32), shares_TP[step, slot].astype(np.int32)


def first_slot(slot_NK: IntArray) -> NDArray[np.int32]:
    """[N] slot of the first assignment of each token.

    Raises
    ------
    InputError
        A token made no assignment, so that nobody knows where it is.
    """
    place = (slot_NK >= 0).argmax(axis=1)
    first_N = np.take_along_axis(slot_NK, place[:, None], axis=1)[:, 0]
    if len(first_N) and first_N.min() < 0:
        token = int(first_N.argmin())
        raise InputError(f"Traces.ids[token {token}]", "no expert in a layer", "previous senders: where is it then?")
    return np.asarray(first_N)

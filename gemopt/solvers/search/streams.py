"""Tokens on their way as the compiled search over links reads them, and what a swap of two slots' contents changes.

An item is what a slot held when the search began: an expert, or one copy with the tokens dealt to it. A stream counts
the bytes on every port at every step; a swap changes those of the tokens that go to either item, and of the tokens
whose sender is where an item is.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from gemopt.flows import Flow, Routes
from gemopt.latency import Curve
from gemopt.solvers.search.state import Array, Number

MOST_LINES = 6
NOWHERE: Number = np.int64(-2)  # no item; a literal would compile its callers a second time
NOBODY: Number = np.int64(-1)
Ways = tuple[Array, Array, Array, Array, Array, Array]  # `start` to `bytes_of` of a stream


class Stream(NamedTuple):
    """Tokens between senders and items, N of them. C senders, D destinations, R ports (all directions), Q items.

    items: [N, K]; step, sender: [N]; number: [N] how many such tokens. to_start, to: tokens of each item; from_start,
    from_: tokens whose sender is where an item is, follows: [N] that item or -1. itself: whether it is of this layer.
    rank: [Q] of each item. node: [G]. start, port, bytes: sparse rows [C * D];
    by_port [R + 1], row_of, bytes_of: the same by port. ends: [directions + 1] ports of each.
    lines: [lines, 2, R] microseconds of a port: the largest of intercept + slope * bytes. loads: [T, R]; times: [T].
    """

    items: Array
    step: Array
    sender: Array
    number: Array
    to_start: Array
    to: Array
    from_start: Array
    from_: Array
    follows: Array
    itself: bool
    rank: Array
    node: Array
    destinations: int
    per_node: bool
    start: Array
    port: Array
    bytes: Array
    by_port: Array
    row_of: Array
    bytes_of: Array
    ends: Array
    lines: Array
    loads: Array
    times: Array


class Scratch(NamedTuple):
    """Room for one swap of ranks a and b: what changes, and the times [T] afterwards.

    own: whether the items that are swapped are those the stream goes to, else only its senders are where they are.
    columns: [T, 4, C] tokens of each sender to a, b, and their nodes. rows: [T, 2, D] tokens of senders a and b to each
    destination. loads: [T, R]. changed: [T] steps. slopes: [T, C, D], see `linked_tangents`.
    """

    own: bool
    columns: Array
    rows: Array
    loads: Array
    changed: Array
    times: Array
    slopes: Array


def make_stream(flow: Flow, position_T: Array, rank_Q: Array, *, itself: bool) -> Stream:
    """The stream of a flow whose steps are at other positions in the search; `rank_Q` is shared with the search."""
    items = np.ascontiguousarray(flow.slot_NK, np.int32)
    route, size = flow.routes[0], len(rank_Q)
    step = position_T[flow.step_N].astype(np.int32)
    token, place = np.nonzero(items >= 0)
    to_start, to = _lists(items[token, place], token, size)
    follows = np.full(len(items), -1, np.int32) if flow.follow_N is None else flow.follow_N.astype(np.int32)
    known = np.flatnonzero(follows >= 0)
    from_start, from_ = _lists(follows[known], known, size)
    ways, ends, lines = _ways(flow.routes)
    bytes_TR = np.empty((flow.num_steps, int(ends[-1])))
    for n, (found, _) in enumerate(flow.parts()):
        bytes_TR[position_T, ends[n] : ends[n + 1]] = found[:, : flow.routes[n].num_ports]
    stream = Stream(
        items, step, flow.sender_N.astype(np.int32), flow.weight_N.astype(np.int32), to_start, to, from_start, from_,
        follows, itself, rank_Q, route.node_of_rank.astype(np.int32), route.destinations,
        route.destinations > len(route.node_of_rank), *ways, ends, lines, bytes_TR,
        np.zeros(flow.num_steps),
    )  # fmt: skip
    scratch = make_scratch(stream, own=True)
    scratch.changed[:] = 1
    set_times(stream, scratch)
    stream.times[:] = scratch.times
    return stream


def _lists(item: Array, token: Array, size: int) -> tuple[Array, Array]:
    """Tokens of every item, one after the other, in order."""
    order = np.argsort(item, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(item, minlength=size))])
    return start.astype(np.int64), token[order].astype(np.int32)


@lru_cache(maxsize=4)
def _ways(routes: tuple[Routes, ...]) -> tuple[Ways, Array, Array]:
    """One sparse row per sender and destination with the ports of all directions, the same by port; `ends`, `lines`.

    The streams of all layers share them.
    """
    from scipy.sparse import hstack

    table = hstack([each.matrix[:, : each.num_ports] for each in routes], format="csr")
    ends = np.concatenate([[0], np.cumsum([each.num_ports for each in routes])]).astype(np.int64)
    lines = _lines([each.curves[k] for each in routes for k in each.curve_of])
    return (*_arrays(table), *_arrays(table.tocsc())), ends, lines


def _arrays(table: Any) -> tuple[Array, Array, Array]:
    return table.indptr.astype(np.int64), table.indices.astype(np.int32), table.data.astype(np.float64)


def _lines(curves: list[Curve]) -> Array:
    """[lines, 2, R] convex hull of each curve; of one with many corners only some lines, which are nowhere above it."""
    found = np.full((len(curves), MOST_LINES, 2), (-1e30, 0.0))
    for r, curve in enumerate(curves):
        pieces: list[Any] = curve.hull.pieces()
        if len(pieces) > MOST_LINES:
            pieces = [pieces[i] for i in np.unique(np.linspace(0, len(pieces) - 1, MOST_LINES).round().astype(int))]
        found[r, : len(pieces)] = pieces
    used = int((found[:, :, 0] > -1e29).sum(axis=1).max()) if len(curves) else 1
    return np.ascontiguousarray(found[:, :used].transpose(1, 2, 0))


def make_scratch(stream: Stream, *, own: bool) -> Scratch:
    """Room for the changes of one stream."""
    steps, ports = stream.loads.shape
    senders = (len(stream.start) - 1) // stream.destinations
    return Scratch(
        own, np.zeros((steps, 4, senders), np.int32), np.zeros((steps, 2, stream.destinations), np.int32),
        np.zeros((steps, ports)), np.zeros(steps, np.uint8), np.zeros(steps),
        np.zeros((steps, senders, stream.destinations)),
    )  # fmt: skip


@njit(cache=True, nogil=True)
def list_item(stream: Stream, scratch: Scratch, x: int, y: int, a: int, b: int, first: int) -> None:
    """Changes of the tokens that go to item x, which goes from rank a to b, and not to y, which comes to a.

    first: column of rank a, 0 or 1; that of b is the other.
    """
    items, ranks, node, to, step = stream.items, stream.rank, stream.node, stream.to, stream.step
    sender, number, follows, columns = stream.sender, stream.number, stream.follows, scratch.columns
    node_a, node_b, changed = node[a], node[b], scratch.changed
    nodes, moving, second = stream.per_node and node_a != node_b, stream.itself, 1 - first
    for at in range(stream.to_start[x], stream.to_start[x + 1]):
        n = to[at]
        on_a, on_b, on_node_a, on_node_b, both = 0, 0, 0, 0, moving and (follows[n] == x or follows[n] == y)
        for k in range(items.shape[1]):
            item = items[n, k]
            if item >= 0:
                rank = ranks[item]
                both = both or item == y
                on_a += rank == a
                on_b += rank == b
                if nodes:
                    on_node_a += node[rank] == node_a
                    on_node_b += node[rank] == node_b
        if both:
            continue  # it goes where it went, or `list_senders` lists it
        t, c, size = step[n], sender[n], number[n]
        changed[t] = 1
        if on_a == 1:
            columns[t, first, c] -= size
        if on_b == 0:
            columns[t, second, c] += size
        if nodes and on_node_a == 1:
            columns[t, 2 + first, c] -= size
        if nodes and on_node_b == 0:
            columns[t, 2 + second, c] += size


@njit(cache=True, nogil=True, inline="always")
def goes(stream: Stream, n: int, k: int, x: Any, b: Any, y: Any, a: Any) -> tuple[Any, bool, bool]:
    """Rank of item k of token n (-1: no item), and whether no item before it is on this rank, and on this node.

    x: on b, y: on a (-2: as they are). Nodes count where `per_node`.
    """
    items, ranks, node = stream.items, stream.rank, stream.node
    item = items[n, k]
    if item < 0:
        return NOBODY, False, False
    rank: Number = b if item == x else a if item == y else np.int64(ranks[item])
    new_rank, new_node = True, stream.per_node
    for m in range(k):
        other = items[n, m]
        if other >= 0:
            place = b if other == x else a if other == y else np.int64(ranks[other])
            new_rank = new_rank and place != rank
            new_node = new_node and node[place] != node[rank]
    return rank, new_rank, new_node


@njit(cache=True, nogil=True)
def list_token(stream: Stream, scratch: Scratch, n: int, row: int, sign: int, x: Any, y: Any, a: int, b: int) -> None:
    """Add or take away all destinations of a token, from sender a (row 0) or b; x: on b, y: on a (-2: not moved)."""
    node, rows, t = stream.node, scratch.rows, stream.step[n]
    size = sign * stream.number[n]
    for k in range(stream.items.shape[1]):
        rank, new_rank, new_node = goes(stream, n, k, x, b, y, a)
        if new_rank:
            rows[t, row, rank] += size
        if new_node:
            rows[t, row, node.shape[0] + node[rank]] += size


@njit(cache=True, nogil=True)
def list_swap(stream: Stream, scratch: Scratch, x: int, y: int, a: int, b: int) -> None:
    """All that changes when item x (-1: none) of rank a and y of b change places."""
    there_x, there_y = (x, y) if scratch.own else (NOWHERE, NOWHERE)
    for side in range(2):
        item, other, here, there = (x, y, a, b) if side == 0 else (y, x, b, a)
        if item < 0:
            continue
        if scratch.own:
            list_item(stream, scratch, item, other, here, there, side)
        if scratch.own and not stream.itself:
            continue
        for at in range(stream.from_start[item], stream.from_start[item + 1]):
            n = stream.from_[at]
            for after in range(2):
                to_x, to_y = (there_x, there_y) if after == 1 else (NOWHERE, NOWHERE)
                list_token(stream, scratch, n, side if after == 0 else 1 - side, 2 * after - 1, to_x, to_y, a, b)
            scratch.changed[stream.step[n]] = 1


@njit(cache=True, nogil=True)
def to_ports(stream: Stream, scratch: Scratch, a: int, b: int) -> None:
    """Bytes on ports of what was listed for a swap between the ranks a and b."""
    columns, rows, loads, changed = scratch.columns, scratch.rows, scratch.loads, scratch.changed
    start, port, size, wide = stream.start, stream.port, stream.bytes, stream.destinations
    num_ranks, own = stream.node.shape[0], scratch.own
    for t in range(changed.shape[0]):
        if changed[t] == 0:
            continue
        if own:
            for column in range(4 if stream.per_node else 2):
                rank = a if column % 2 == 0 else b
                d = rank if column < 2 else num_ranks + stream.node[rank]
                for c in range(columns.shape[2]):
                    tokens = columns[t, column, c]
                    if tokens != 0:
                        columns[t, column, c] = 0
                        for k in range(start[c * wide + d], start[c * wide + d + 1]):
                            loads[t, port[k]] += tokens * size[k]
        if stream.itself or not own:
            for row in range(2):
                first = (a if row == 0 else b) * wide
                for d in range(wide):
                    tokens = rows[t, row, d]
                    if tokens != 0:
                        rows[t, row, d] = 0
                        for k in range(start[first + d], start[first + d + 1]):
                            loads[t, port[k]] += tokens * size[k]


@njit(cache=True, nogil=True, fastmath=True)
def fullest(base: Array, slope: Array, load: Array, more: Array) -> float:
    """Microseconds of the fullest port, each with one line; a port without bytes takes none."""
    worst = 0.0
    for r in range(load.shape[0]):
        total = load[r] + more[r]
        value = base[r] + slope[r] * total
        worst = max(worst, value if total > 0.5 else 0.0)
    return worst


@njit(cache=True, nogil=True)
def set_times(stream: Stream, scratch: Scratch) -> None:
    """Fill `scratch.times` with the steps' times after the listed changes."""
    ends, lines = stream.ends, stream.lines
    for t in range(scratch.times.shape[0]):
        if scratch.changed[t] == 0:
            scratch.times[t] = stream.times[t]
            continue
        total = 0.0
        for n in range(ends.shape[0] - 1):
            lo, hi = ends[n], ends[n + 1]
            load, more = stream.loads[t, lo:hi], scratch.loads[t, lo:hi]
            if lines.shape[0] == 1:
                total += fullest(lines[0, 0, lo:hi], lines[0, 1, lo:hi], load, more)
                continue
            worst = 0.0
            for r in range(hi - lo):
                value = -1e30
                for k in range(lines.shape[0]):
                    value = max(value, lines[k, 0, lo + r] + lines[k, 1, lo + r] * (load[r] + more[r]))
                worst = max(worst, value if load[r] + more[r] > 0.5 else 0.0)
            total += worst
        scratch.times[t] = total


@njit(cache=True, nogil=True)
def forget(scratch: Scratch) -> None:
    """Undo what was listed."""
    for t in range(scratch.times.shape[0]):
        if scratch.changed[t] != 0:
            scratch.loads[t, :] = 0.0
            scratch.changed[t] = 0


@njit(cache=True, nogil=True)
def commit(stream: Stream, scratch: Scratch, x: int, y: int, a: int, b: int) -> None:
    """Carry out what was listed. The ranks of the items are the caller's."""
    for t in range(scratch.times.shape[0]):
        if scratch.changed[t] != 0:
            for r in range(stream.loads.shape[1]):
                stream.loads[t, r] += scratch.loads[t, r]
            stream.times[t] = scratch.times[t]
    if stream.itself or not scratch.own:
        for side in range(2):
            item, rank = (x, b) if side == 0 else (y, a)
            if item >= 0:
                for at in range(stream.from_start[item], stream.from_start[item + 1]):
                    stream.sender[stream.from_[at]] = rank
    forget(scratch)

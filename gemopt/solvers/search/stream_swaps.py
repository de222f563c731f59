"""What a swap of two slots' contents changes on the ports of a stream: listed, then forgotten or carried out."""

from __future__ import annotations

from typing import Any

import numpy as np

from gemopt.compiling import njit
from gemopt.solvers.search.state import Array
from gemopt.solvers.search.streams import Scratch, Stream, beyond, mark, number

ALL, NONE = np.uint64(2**64 - 1), np.uint64(0)


@njit(nogil=True)
def list_item(stream: Stream, scratch: Scratch, side: int, x: int, y: int, a: int, b: int) -> None:
    """Changes of the tokens that go to item x, which goes from rank a to b, and not to y, which comes to a.

    side: column of rank a, and row of it as a sender, 0 or 1; those of b are the other.
    """
    once, twice, columns, rows, node = scratch.once, scratch.twice, scratch.columns, scratch.rows, stream.node
    num_ranks = node.shape[0]
    node_a, node_b = num_ranks + node[a], num_ranks + node[b]
    for at in range(stream.to_start[x], stream.to_start[x + 1]):
        word, bits = stream.to_word[at], stream.to_bits[at]
        t, group, staying = stream.step[word], stream.group[word], scratch.held[1 - side, word]
        scratch.changed[t] = 1
        for level in range(0 if stream.inner else 1, 2 if stream.per_node and node_a != node_b else 1):
            here, there = (a, b) if level == 0 else (node_a, node_b)
            lost = beyond(stream, bits, twice[word, here] | staying)
            gained = beyond(stream, bits, once[word, there])
            if stream.itself and group in (x, y):  # these senders go as well
                row = 1 - side if group == x else side
                rows[t, row, here] -= lost
                rows[t, row, there] += gained
            else:
                columns[t, 2 * level + side, stream.home[group]] -= lost
                columns[t, 2 * level + 1 - side, stream.home[group]] += gained


@njit(nogil=True)
def list_senders(stream: Stream, scratch: Scratch, side: int, x: int) -> None:
    """Changes of the tokens whose sender goes with item x: they start from the other rank."""
    for word in range(stream.from_start[x], stream.from_start[x + 1]):
        t = stream.step[word]
        scratch.changed[t] = 1
        for d in range(stream.destinations):
            tokens = number(stream, scratch.once[word, d])
            scratch.rows[t, side, d] -= tokens
            scratch.rows[t, 1 - side, d] += tokens


@njit(nogil=True)
def hold(stream: Stream, held_W: Array, x: int, mask: Any) -> None:
    """Write the tokens of an item (-1: none) into the room for them; mask 0: take them out."""
    if x >= 0:
        for at in range(stream.to_start[x], stream.to_start[x + 1]):
            held_W[stream.to_word[at]] = stream.to_bits[at] & mask


@njit(nogil=True)
def list_swap(stream: Stream, scratch: Scratch, x: int, y: int, a: int, b: int) -> None:
    """All that changes when item x (-1: none) of rank a and y of b change places."""
    if scratch.own:
        hold(stream, scratch.held[0], x, ALL)
        hold(stream, scratch.held[1], y, ALL)
    for side in range(2):
        item, other, here, there = (x, y, a, b) if side == 0 else (y, x, b, a)
        if item < 0:
            continue
        if scratch.own:
            list_item(stream, scratch, side, item, other, here, there)
        if stream.itself or not scratch.own:
            list_senders(stream, scratch, side, item)
    if scratch.own:
        hold(stream, scratch.held[0], x, NONE)
        hold(stream, scratch.held[1], y, NONE)


@njit(nogil=True)
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


@njit(nogil=True)
def forget(scratch: Scratch) -> None:
    """Undo what was listed."""
    for t in range(scratch.times.shape[0]):
        if scratch.changed[t] != 0:
            scratch.loads[t, :] = 0.0
            scratch.changed[t] = 0


@njit(nogil=True)
def commit(stream: Stream, scratch: Scratch, a: int, b: int) -> None:
    """Carry out what was listed; the ranks of the items are the new ones already."""
    for t in range(scratch.times.shape[0]):
        if scratch.changed[t] != 0:
            for r in range(stream.loads.shape[1]):
                stream.loads[t, r] += scratch.loads[t, r]
            stream.times[t] = scratch.times[t]
    forget(scratch)
    if scratch.own:
        for rank in (a, b):
            if stream.inner:
                mark(stream, scratch, rank)
            if stream.per_node:
                mark(stream, scratch, stream.node.shape[0] + stream.node[rank])

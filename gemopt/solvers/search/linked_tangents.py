"""What every swap promises on the links to first order, for all pairs of items at once.

The time of an exchange is convex in the bytes on its ports, and those are linear in the visits, so no swap costs less
than along the tangent at the port that is fullest now (ports that fall silent aside). Per item x and rank b: what
moving x there changes (`moved`); per pair: what the tokens that go to both change less (`paired`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from gemopt.solvers.search.state import Array, Number
from gemopt.solvers.search.streams import NOWHERE, Scratch, Stream, goes


@njit(cache=True, nogil=True)
def set_slopes(stream: Stream, weights_T: Array, slopes: Array) -> None:
    """Fill `slopes` [T, C, D]: microseconds more for one token more from a sender to a destination."""
    flat = slopes.reshape(slopes.shape[0], -1)
    flat[:] = 0.0
    lines, ends = stream.lines, stream.ends
    for t in range(flat.shape[0]):
        if weights_T[t] == 0.0:
            continue
        for n in range(ends.shape[0] - 1):
            worst, slope, port = 0.0, 0.0, -1
            for r in range(ends[n], ends[n + 1]):
                load = stream.loads[t, r]
                if load <= 0.5:
                    continue
                for k in range(lines.shape[0]):
                    value = lines[k, 0, r] + lines[k, 1, r] * load
                    if value > worst:
                        worst, slope, port = value, lines[k, 1, r], r
            if port >= 0:
                for at in range(stream.by_port[port], stream.by_port[port + 1]):
                    flat[t, stream.row_of[at]] += weights_T[t] * slope * stream.bytes_of[at]


@njit(cache=True, nogil=True)
def worth(stream: Stream, slopes_D: Array, n: int, x: Any, b: Any, y: Any, a: Any) -> float:
    """Slopes of the destinations of a token together, x being on rank b and y on rank a (-2: as they are)."""
    node, total = stream.node, 0.0
    for k in range(stream.items.shape[1]):
        rank, new_rank, new_node = goes(stream, n, k, x, b, y, a)
        if new_rank:
            total += slopes_D[rank]
        if new_node:
            total += slopes_D[node.shape[0] + node[rank]]
    return total


@njit(cache=True, nogil=True)
def add_items(stream: Stream, slopes: Array, moved: Array, paired: Array) -> None:
    """What the tokens promise whose sender stays where it is."""
    items, ranks, node, num_ranks = stream.items, stream.rank, stream.node, stream.node.shape[0]
    on, on_node = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64)
    for n in range(items.shape[0]):
        slopes_D, number = slopes[stream.step[n], stream.sender[n]], stream.number[n]
        on[:] = 0
        on_node[:] = 0
        for k in range(items.shape[1]):
            if items[n, k] >= 0:
                on[ranks[items[n, k]]] += 1
                on_node[node[ranks[items[n, k]]]] += 1
        for k in range(items.shape[1]):
            x = items[n, k]
            if x < 0 or (stream.itself and stream.follows[n] == x):
                continue
            a = ranks[x]
            alone = number * slopes_D[a] if on[a] == 1 else 0.0
            last = number * slopes_D[num_ranks + node[a]] if stream.per_node and on_node[node[a]] == 1 else 0.0
            for b in range(num_ranks):
                if b == a:
                    continue
                gain = -alone
                if on[b] == 0:
                    gain += number * slopes_D[b]
                if stream.per_node and node[b] != node[a]:
                    gain -= last
                    if on_node[node[b]] == 0:
                        gain += number * slopes_D[num_ranks + node[b]]
                moved[x, b] += gain
            for m in range(items.shape[1]):
                y = items[n, m]
                if y >= 0 and ranks[y] != a and not (stream.itself and stream.follows[n] == y):
                    lost = alone + (last if node[ranks[y]] != node[a] else 0.0)
                    paired[x, y] += lost  # together they change nothing
                    paired[y, x] += lost


@njit(cache=True, nogil=True)
def add_senders(stream: Stream, slopes: Array, moved: Array, paired: Array, own: bool) -> None:
    """What the tokens promise whose sender goes with an item. own: their destinations may go as well.

    For each token the places of its sender's item x and, where both go, of another of its items y: neither, x alone,
    y alone, both.
    """
    items, ranks, num_ranks = stream.items, stream.rank, stream.node.shape[0]
    value = np.zeros(4)
    for n in range(items.shape[0]):
        x: Number = np.int64(stream.follows[n])
        if x < 0:
            continue
        a: Number = np.int64(stream.sender[n])
        t, number = stream.step[n], stream.number[n]
        for k in range(-1, items.shape[1] if own else 0):
            y: Number = NOWHERE if k < 0 else np.int64(items[n, k])
            if k >= 0 and (y < 0 or y == x or ranks[y] == a):
                continue
            for there in range(num_ranks):
                b: Number = np.int64(there)
                if b == a or (k >= 0 and b != ranks[y]):
                    continue
                for case in range(4 if k >= 0 else 2):
                    of_x: Number = x if own and case % 2 == 1 else NOWHERE
                    of_y: Number = y if case >= 2 else NOWHERE
                    value[case] = worth(stream, slopes[t, b if case % 2 == 1 else a], n, of_x, b, of_y, a)
                if k < 0:
                    moved[x, b] += number * (value[1] - value[0])
                    continue
                more = number * (value[3] - value[1] - value[2] + value[0])
                paired[x, y] += more
                paired[y, x] += more


@njit(cache=True, nogil=True)
def add_promises(stream: Stream, scratch: Scratch, weights_T: Array, moved: Array, paired: Array) -> None:
    """Add what a stream promises; weights_T: of its time in the cost of each step."""
    if stream.items.shape[0] == 0:
        return
    set_slopes(stream, weights_T, scratch.slopes)
    if scratch.own:
        add_items(stream, scratch.slopes, moved, paired)
    if stream.itself or not scratch.own:
        add_senders(stream, scratch.slopes, moved, paired, scratch.own)

"""What every swap promises on the links to first order, for all pairs of items at once.

The time of an exchange is convex in the bytes on its ports, and those are linear in the visits, so no swap costs less
than along the tangent at the port that is fullest now (ports that fall silent aside). Per item x and rank b: what
moving x there changes (`moved`). A swap promises the sum of both moves, which is no more than both together: a token
that goes to either item, or from one to the other, then gains less.
"""

from __future__ import annotations

import numpy as np

from gemopt.compiling import njit
from gemopt.solvers.search.state import Array
from gemopt.solvers.search.streams import Scratch, Stream, beyond, number


@njit(nogil=True)
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


@njit(nogil=True)
def add_item(stream: Stream, scratch: Scratch, x: int, moved_G: Array, gained_D: Array) -> None:
    """What the tokens promise that go to item x, where it goes to another rank. gained_D: room."""
    once, twice, node, num_ranks = scratch.once, scratch.twice, stream.node, stream.node.shape[0]
    a = stream.rank[x]
    node_a = num_ranks + node[a]
    gained_D[:] = 0.0
    lost, lost_node = 0.0, 0.0
    for at in range(stream.to_start[x], stream.to_start[x + 1]):
        word, bits = stream.to_word[at], stream.to_bits[at]
        t, group = stream.step[word], stream.group[word]
        alone = beyond(stream, bits, twice[word, a])
        last = beyond(stream, bits, twice[word, node_a]) if stream.per_node else 0
        if stream.itself and group == x:  # their sender leaves as well, see `add_senders`
            for b in range(num_ranks):
                moved_G[b] -= alone * scratch.slopes[t, b, a]
                if stream.per_node and node[b] != node[a]:
                    moved_G[b] -= last * scratch.slopes[t, b, node_a]
            continue
        slopes_D, once_D = scratch.slopes[t, stream.home[group]], once[word]
        for d in range(gained_D.shape[0]):
            gained_D[d] += beyond(stream, bits, once_D[d]) * slopes_D[d]
        lost += alone * slopes_D[a]
        if stream.per_node:
            lost_node += last * slopes_D[node_a]
    for b in range(num_ranks):
        moved_G[b] += gained_D[b] - lost
        if stream.per_node and node[b] != node[a]:
            moved_G[b] += gained_D[num_ranks + node[b]] - lost_node


@njit(nogil=True)
def add_senders(stream: Stream, scratch: Scratch, x: int, moved_G: Array) -> None:
    """What the tokens promise whose sender goes with item x, their destinations staying."""
    a = stream.home[x]
    for word in range(stream.from_start[x], stream.from_start[x + 1]):
        slopes, once_D = scratch.slopes[stream.step[word]], scratch.once[word]
        for d in range(once_D.shape[0]):
            tokens = number(stream, once_D[d])
            if tokens > 0:
                for b in range(moved_G.shape[0]):
                    moved_G[b] += tokens * (slopes[b, d] - slopes[a, d])


@njit(nogil=True)
def add_promises(stream: Stream, scratch: Scratch, weights_T: Array, moved: Array) -> None:
    """Add what a stream promises; weights_T: of its time in the cost of each step."""
    if stream.step.shape[0] == 0:
        return
    set_slopes(stream, weights_T, scratch.slopes)
    gained_D = np.empty(stream.destinations)
    for x in range(moved.shape[0]):
        if scratch.own:
            add_item(stream, scratch, x, moved[x], gained_D)
        if stream.itself or not scratch.own:
            add_senders(stream, scratch, x, moved[x])

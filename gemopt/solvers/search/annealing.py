"""Compiled annealing of one layer: what it sends between nodes against what it computes, with a front of both kept.

Swaps are drawn at random. What a swap computes is known in a fraction of the time that its bytes take, so that one is
given up first that would not be taken if it saved a little more than any swap did so far.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gemopt.compiling import njit
from gemopt.kernels import put
from gemopt.solvers.search.gains import allowed
from gemopt.solvers.search.linked_swaps import Room, makespans_after, slowest, take_swap
from gemopt.solvers.search.state import Array, Costs, State, rank_of
from gemopt.solvers.search.stream_swaps import forget, list_swap, to_ports
from gemopt.solvers.search.streams import Scratch, Stream
from gemopt.solvers.search.swaps import total_cost

LEARNT = 30  # swaps whose bytes are counted whatever they compute
MARGIN = 1.2  # of what any swap saved so far


class Trade(NamedTuple):
    """What counts how much. byte: of any port; fullest: of the fullest port's bytes; price: a microsecond
    above free_us.

    apart: whether swaps within a node change no bytes. low_us, bin_us: of the front's bins by makespans, the first of
    which holds all that is less.
    """

    byte: float
    fullest: float
    price: float
    free_us: float
    apart: bool
    low_us: float
    bin_us: float


class Front(NamedTuple):
    """The least that was sent for about so many microseconds, by bin: [B] what that counts, and its makespans.

    loads: [B, R] bytes through every port. rows: [B, P].
    """

    sent: Array
    compute: Array
    loads: Array
    rows: Array


@njit(nogil=True)
def sent_after(trade: Trade, own_R: Array, more_R: Array, other_R: Array) -> float:
    """What the bytes count: own ones on all ports, and all on the fullest."""
    total = fullest = 0.0
    for r in range(own_R.shape[0]):
        load = own_R[r] + more_R[r]
        total += load
        fullest = max(fullest, load + other_R[r])
    return trade.byte * total + trade.fullest * fullest


@njit(nogil=True)
def keep(front: Front, trade: Trade, sent: float, compute: float, own_R: Array, row_P: Array) -> None:
    """Write down what is better than what its bin holds."""
    place = max(0, int(np.ceil((compute - trade.low_us) / trade.bin_us)))
    if place < front.sent.shape[0] and sent < front.sent[place]:
        front.sent[place], front.compute[place] = sent, compute
        put(front.loads[place], own_R)
        put(front.rows[place], row_P)


@njit(nogil=True)
def anneal(
    costs: Costs, state: State, item_P: Array, rank_Q: Array, streams: tuple[Stream, Stream, Stream],
    scratches: tuple[Scratch, Scratch, Scratch], room: Room, trade: Trade, front: Front, own_R: Array, other_R: Array,
    pairs_N2: Array, patience_N: Array,
) -> float:  # fmt: skip
    """Take every drawn swap that costs less than its patience; returns the makespans afterwards.

    Streams have one step. own_R: [R] bytes of what this layer changes on each port, kept up to date; other_R: of the
    other layers. pairs_N2: slots that change places; patience_N: what each may cost.
    """
    ports, more_R, learnt, saved = own_R.shape[0], np.zeros(own_R.shape[0]), 0, 0.0
    compute, sent = total_cost(state), sent_after(trade, own_R, more_R, other_R)
    for n in range(pairs_N2.shape[0]):
        if state.stop[0] != 0:
            break
        i, j = pairs_N2[n]
        a, b = rank_of(state, i), rank_of(state, j)
        if a == b or not allowed(state, a, b, i, j):
            continue
        slowest(state, a, b, room.others)
        makespans_after(costs, state, room, a, b, i, j)
        after = 0.0
        for t in range(room.time_a.shape[0]):
            after += np.float64(room.time_a[t]) * state.weights[t]
        crossing = not (trade.apart and streams[0].node[a] == streams[0].node[b])
        goal = sent + trade.price * (max(compute, trade.free_us) - max(after, trade.free_us)) + patience_N[n]
        if (learnt >= LEARNT or not crossing) and sent - (MARGIN * saved if crossing else 0.0) >= goal:
            continue
        x, y, sent_now = item_P[i], item_P[j], sent
        more_R[:] = 0.0
        if crossing:
            for k in range(3):
                list_swap(streams[k], scratches[k], x, y, a, b)
                to_ports(streams[k], scratches[k], a, b)
                for r in range(scratches[k].loads.shape[1]):
                    more_R[r % ports] += scratches[k].loads[0, r]
            sent_now = sent_after(trade, own_R, more_R, other_R)
            learnt, saved = learnt + 1, max(saved, sent - sent_now)
        if sent_now >= goal:
            for k in range(3 if crossing else 0):
                forget(scratches[k])
            continue
        # where none is crossing no node has other experts, and ranks count for nothing
        take_swap(costs, state, item_P, rank_Q, streams, scratches, a, b, i, j, crossing)
        own_R += more_R
        compute, sent = after, sent_now
        keep(front, trade, sent, compute, own_R, state.content)
    return compute

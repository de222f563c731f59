"""Compiled swaps of one layer under makespan and links together; the layers around it stay as they are.

What a step costs: the slowest rank, and dispatch and combine after or behind it; where senders follow experts, also
the next layer, whose dispatch changes with this one. See `streams` for how a swap changes the bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from gemopt.solvers.search.gains import allowed
from gemopt.solvers.search.linked_tangents import add_promises
from gemopt.solvers.search.state import Array, Costs, Number, State, rank_times
from gemopt.solvers.search.streams import (
    Scratch,
    Stream,
    commit,
    forget,
    list_swap,
    set_times,
    to_ports,
)
from gemopt.solvers.search.swaps import apply_swap


class Price(NamedTuple):
    """How makespans and links add up.

    compute: weight of makespans (0: links alone). overlap: whether the longer of both counts instead of the sum.
    later: whether the dispatch of the next layer changes too. later_makespan, later_combine: [T] of the next layer.
    """

    compute: float
    overlap: bool
    later: bool
    later_makespan: Array
    later_combine: Array


class Room(NamedTuple):
    """Arrays that are written anew for every swap or sweep.

    loads: [F, T]; time_a, time_b: [T] of two ranks; others: [T] slowest other rank; shares: [T] of makespans in the
    cost; slopes: [T, C, D] of each stream.
    """

    loads: Array
    time_a: Array
    time_b: Array
    others: Array
    shares: Array
    slopes_own: Array
    slopes_second: Array
    slopes_later: Array


@njit(cache=True, nogil=True, inline="always")
def together(price: Price, makespan: Number, links: Number) -> Number:
    """Microseconds of one layer at one step."""
    value = price.compute * makespan
    return max(value, links) if price.overlap else value + links


@njit(cache=True, nogil=True)
def step_costs(
    price: Price, weights_T: Array, makespan_T: Array, own_T: Array, second_T: Array, later_T: Array
) -> float:
    """Weighted sum over the steps."""
    total = 0.0
    for t in range(weights_T.shape[0]):
        value = together(price, np.float64(makespan_T[t]), own_T[t] + second_T[t])
        if price.later:
            value += together(price, np.float64(price.later_makespan[t]), later_T[t] + price.later_combine[t])
        total += value * weights_T[t]
    return total


@njit(cache=True, nogil=True)
def slowest(state: State, without_a: int, without_b: int, out_T: Array) -> None:
    """[T] latency of the slowest rank but two (-1: none)."""
    out_T[:] = np.float32(-1e30)
    for g in range(state.times.shape[0]):
        if g != without_a and g != without_b:
            for t in range(out_T.shape[0]):
                out_T[t] = max(out_T[t], state.times[g, t])


@njit(cache=True, nogil=True)
def makespans_after(costs: Costs, state: State, room: Room, a: int, b: int, i: int, j: int) -> None:
    """Fill `time_a` with the makespans after slot i of rank a and slot j of rank b change places."""
    for side in range(2):
        rank, out_T = (a, room.time_a) if side == 0 else (b, room.time_b)
        sign = np.float32(-1.0) if side == 0 else np.float32(1.0)
        for f in range(room.loads.shape[0]):
            for t in range(room.loads.shape[1]):
                room.loads[f, t] = state.loads[rank, f, t] + sign * (state.items[i, f, t] - state.items[j, f, t])
        rank_times(costs, rank, room.loads, out_T)
    for t in range(room.time_a.shape[0]):
        room.time_a[t] = max(room.others[t], max(room.time_a[t], room.time_b[t]))


@njit(cache=True, nogil=True)
def links_after(stream: Stream, scratch: Scratch, x: int, y: int, a: int, b: int, own: bool) -> None:
    """Fill `scratch.times` for a stream after items x and y change places."""
    list_swap(stream, scratch, x, y, a, b, own)
    to_ports(stream, scratch, a, b, own)
    set_times(stream, scratch)


@njit(cache=True, nogil=True)
def promises(
    price: Price, room: Room, weights_T: Array, streams: tuple[Stream, Stream, Stream], moved: Array, paired: Array
) -> float:  # fmt: skip
    """Fill `moved` and `paired`, and what of each step's cost is the makespan's; returns what is the links' now.

    `room.others` holds the makespans. Where communication hides, a step counts by the longer of both as it is now: the
    larger of two numbers is never below any mean of them.
    """
    own, second, later = streams
    moved[:] = 0.0
    paired[:] = 0.0
    base, links_T, later_T = 0.0, np.empty(weights_T.shape[0]), np.zeros(weights_T.shape[0])
    for t in range(weights_T.shape[0]):
        time = own.times[t] + second.times[t]
        hidden = price.overlap and price.compute * room.others[t] > time
        links_T[t] = 0.0 if hidden else weights_T[t]
        room.shares[t] = price.compute * weights_T[t] * (1.0 if hidden or not price.overlap else 0.0)
        base += links_T[t] * time
        if price.later:
            time = later.times[t] + price.later_combine[t]
            makespan = price.compute * np.float64(price.later_makespan[t])
            hidden = price.overlap and makespan > time
            later_T[t] = 0.0 if hidden else weights_T[t]
            base += later_T[t] * time + (weights_T[t] * makespan if hidden or not price.overlap else 0.0)
    add_promises(own, links_T, room.slopes_own, moved, paired, True)
    add_promises(second, links_T, room.slopes_second, moved, paired, True)
    add_promises(later, later_T, room.slopes_later, moved, paired, False)
    return base


@njit(cache=True, nogil=True)
def descend_linked(
    costs: Costs, state: State, item_P: Array, rank_Q: Array, streams: tuple[Stream, Stream, Stream],
    scratches: tuple[Scratch, Scratch, Scratch], price: Price, room: Room, epsilon: float, sweeps: int,
) -> int:  # fmt: skip
    """Take every swap that lowers the cost of this layer (and the next one's dispatch); returns the swaps taken.

    streams: own dispatch (with combine where senders stay), own combine, the next layer's dispatch; two may be empty.
    item_P: [P] item in each slot, -1 for none. rank_Q: [Q] rank of each item. Promises are those at the beginning of a
    sweep, so the last one, which takes nothing, leaves out no swap that would gain.
    """
    own, second, later = streams
    scratch_own, scratch_second, scratch_later = scratches
    num_ranks, taken = state.times.shape[0], 0
    moved, paired = np.empty((rank_Q.shape[0], num_ranks)), np.empty((rank_Q.shape[0], rank_Q.shape[0]))
    for _ in range(sweeps):
        before = taken
        slowest(state, -1, -1, room.others)
        current = step_costs(price, state.weights, room.others, own.times, second.times, later.times)
        base = promises(price, room, state.weights, streams, moved, paired)
        for a in range(num_ranks):
            for b in range(a + 1, num_ranks):
                slowest(state, a, b, room.others)
                for i in range(state.starts[a], state.starts[a + 1]):
                    for j in range(state.starts[b], state.starts[b + 1]):
                        if state.stop[0] != 0:
                            return taken
                        if not allowed(state, a, b, i, j):
                            continue
                        x, y = item_P[i], item_P[j]
                        least = base
                        if x >= 0:
                            least += moved[x, b]
                        if y >= 0:
                            least += moved[y, a] + (paired[x, y] if x >= 0 else 0.0)
                        if least >= current * (1.0 - epsilon):
                            continue
                        makespans_after(costs, state, room, a, b, i, j)
                        for t in range(room.shares.shape[0]):
                            least += room.shares[t] * room.time_a[t]
                        if least >= current * (1.0 - epsilon):
                            continue
                        links_after(own, scratch_own, x, y, a, b, True)
                        links_after(second, scratch_second, x, y, a, b, True)
                        links_after(later, scratch_later, x, y, a, b, False)
                        cost = step_costs(
                            price, state.weights, room.time_a, scratch_own.times, scratch_second.times,
                            scratch_later.times,
                        )  # fmt: skip
                        if cost >= current * (1.0 - epsilon):
                            forget(scratch_own)
                            forget(scratch_second)
                            forget(scratch_later)
                            continue
                        commit(own, scratch_own, x, y, a, b, True)
                        commit(second, scratch_second, x, y, a, b, True)
                        commit(later, scratch_later, x, y, a, b, False)
                        apply_swap(costs, state, a, b, i, j)
                        item_P[i], item_P[j] = y, x
                        if x >= 0:
                            rank_Q[x] = b
                        if y >= 0:
                            rank_Q[y] = a
                        current = cost
                        taken += 1
        if taken == before:
            break
    return taken

"""Compiled swaps of one layer under makespan and links together; the layers around it stay as they are.

What a step costs: the slowest rank, and dispatch and combine after or behind it; where senders follow experts, also
the next layer, whose dispatch changes with this one. See `streams` for how a swap changes the bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gemopt.compiling import njit
from gemopt.kernels import MINUS, YES
from gemopt.solvers.search.gains import allowed
from gemopt.solvers.search.linked_tangents import add_promises
from gemopt.solvers.search.state import Array, Costs, Number, State, rank_times
from gemopt.solvers.search.stream_swaps import commit, forget, list_swap, to_ports
from gemopt.solvers.search.streams import Scratch, Stream, set_times
from gemopt.solvers.search.swaps import apply_swap
from gemopt.solvers.search.terms import Terms, extra_moves, permitted


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

    loads: [F, T]; time_a, time_b: [T] of two ranks; others: [T] slowest other rank; shares: [3, T] of makespans, of the
    links of this layer and of the next layer's in the cost.
    """

    loads: Array
    time_a: Array
    time_b: Array
    others: Array
    shares: Array


@njit(nogil=True, inline="always")
def together(price: Price, makespan: Number, links: Number) -> Number:
    """Microseconds of one layer at one step."""
    value = price.compute * makespan
    return max(value, links) if price.overlap else value + links


@njit(nogil=True)
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


@njit(nogil=True)
def slowest(state: State, without_a: int, without_b: int, out_T: Array) -> None:
    """[T] latency of the slowest rank but two (-1: none)."""
    out_T[:] = np.float32(-1e30)
    for g in range(state.times.shape[0]):
        if g not in (without_a, without_b):
            for t in range(out_T.shape[0]):
                out_T[t] = max(out_T[t], state.times[g, t])


@njit(nogil=True)
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


@njit(nogil=True)
def links_after(
    streams: tuple[Stream, Stream, Stream], scratches: tuple[Scratch, Scratch, Scratch], x: int, y: int, a: int, b: int
) -> None:
    """Fill the scratches' times for items x and y having changed places."""
    for k in range(3):
        list_swap(streams[k], scratches[k], x, y, a, b)
        to_ports(streams[k], scratches[k], a, b)
        set_times(streams[k], scratches[k])


@njit(nogil=True)
def promises(
    price: Price, room: Room, weights_T: Array, streams: tuple[Stream, Stream, Stream],
    scratches: tuple[Scratch, Scratch, Scratch], moved: Array,
) -> float:  # fmt: skip
    """Fill `moved` and the shares of each step's cost; returns what is the links' in it now.

    `room.others` holds the makespans. Where communication hides, a step counts by the longer of both as it is now: the
    larger of two numbers is never below any mean of them.
    """
    own, second, later = streams
    moved[:] = 0.0
    base = 0.0
    for t in range(weights_T.shape[0]):
        weight, time = weights_T[t], own.times[t] + second.times[t]
        hidden = price.overlap and price.compute * room.others[t] > time
        room.shares[0, t] = price.compute * weight if hidden or not price.overlap else 0.0
        room.shares[1, t] = 0.0 if hidden else weight
        base += room.shares[1, t] * time
        room.shares[2, t] = 0.0
        if price.later:
            time = later.times[t] + price.later_combine[t]
            makespan = price.compute * np.float64(price.later_makespan[t])
            hidden = price.overlap and makespan > time
            room.shares[2, t] = 0.0 if hidden else weight
            base += room.shares[2, t] * time + (weight * makespan if hidden or not price.overlap else 0.0)
    for k in range(3):
        add_promises(streams[k], scratches[k], room.shares[1 if k < 2 else 2], moved)
    return base


@njit(nogil=True)
def cost_after(
    costs: Costs, state: State, streams: tuple[Stream, Stream, Stream], scratches: tuple[Scratch, Scratch, Scratch],
    price: Price, room: Room, a: int, b: int, i: int, j: int, x: int, y: int, least: float, goal: float,
) -> float:  # fmt: skip
    """Cost after a swap, or infinity where its promise shows that it is not below the goal.

    least: what the links cost at least afterwards. What was listed in the scratches is left there.
    """
    makespans_after(costs, state, room, a, b, i, j)
    for t in range(room.shares.shape[1]):
        least += room.shares[0, t] * room.time_a[t]
    if least >= goal:
        return np.inf
    links_after(streams, scratches, x, y, a, b)
    return step_costs(
        price, state.weights, room.time_a, scratches[0].times, scratches[1].times, scratches[2].times
    )  # fmt: skip


@njit(nogil=True)
def take_swap(
    costs: Costs, state: State, item_P: Array, rank_Q: Array, streams: tuple[Stream, Stream, Stream],
    scratches: tuple[Scratch, Scratch, Scratch], a: int, b: int, i: int, j: int, listed: bool,
) -> None:  # fmt: skip
    """Exchange what two slots hold, and carry out what was `listed` of it in the streams."""
    apply_swap(costs, state, a, b, i, j)
    x, y = item_P[i], item_P[j]
    item_P[i], item_P[j] = y, x
    if x >= 0:
        rank_Q[x] = b
    if y >= 0:
        rank_Q[y] = a
    for k in range(3 if listed else 0):
        commit(streams[k], scratches[k], a, b)


@njit(nogil=True)
def sweep_linked(
    costs: Costs, state: State, item_P: Array, rank_Q: Array, streams: tuple[Stream, Stream, Stream],
    scratches: tuple[Scratch, Scratch, Scratch], price: Price, room: Room, terms: Terms, moved_G: Array, epsilon: float,
) -> int:  # fmt: skip
    """Take every swap that lowers the cost of this layer (and the next one's dispatch); returns the swaps taken.

    streams: own dispatch (with combine where senders stay), own combine, the next layer's dispatch; two may be empty.
    moved_G: [G] moves into each rank, brought up to date; each swap pays for its own, and keeps to their limits.
    item_P: [P] item in each slot, -1 for none. rank_Q: [Q] rank of each item. Promises are those at the beginning, so a
    sweep that takes nothing has left out no swap that would gain.
    """
    num_ranks, taken = state.times.shape[0], 0
    moved = np.empty((rank_Q.shape[0], num_ranks))
    slowest(state, MINUS, MINUS, room.others)
    current = step_costs(price, state.weights, room.others, streams[0].times, streams[1].times, streams[2].times)
    base = promises(price, room, state.weights, streams, scratches, moved)
    for a in range(num_ranks):
        for b in range(a + 1, num_ranks):
            slowest(state, a, b, room.others)
            for i in range(state.starts[a], state.starts[a + 1]):
                for j in range(state.starts[b], state.starts[b + 1]):
                    if state.stop[0] != 0:
                        return taken
                    if not allowed(state, a, b, i, j):
                        continue
                    into_a, into_b = extra_moves(state, terms, a, b, i, j)
                    if (into_a > 0 or into_b > 0) and not permitted(
                        terms, moved_G.sum(), moved_G, a, b, into_a, into_b
                    ):
                        continue
                    goal = current * (1.0 - epsilon) - terms.price * (into_a + into_b)
                    x, y, least = item_P[i], item_P[j], base
                    least += (moved[x, b] if x >= 0 else 0.0) + (moved[y, a] if y >= 0 else 0.0)
                    if least >= goal:
                        continue
                    cost = cost_after(
                        costs, state, streams, scratches, price, room, a, b, i, j, x, y, least, goal
                    )  # fmt: skip
                    if cost >= goal:
                        for k in range(3 if cost < np.inf else 0):
                            forget(scratches[k])
                        continue
                    take_swap(costs, state, item_P, rank_Q, streams, scratches, a, b, i, j, YES)
                    current = cost
                    moved_G[a] += into_a
                    moved_G[b] += into_b
                    taken += 1
    return taken

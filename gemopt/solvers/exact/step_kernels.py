"""Contents of ranks priced step by step with their latencies: a compiled scan of all of them, and local exchanges.

Shapes: E experts, S of them in a content; K kinds of ranks whose latencies are multiples of one another; B blocks of
`WIDTH` steps; M contents kept. Prices are sums of float32, of terms that are never negative.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.compiling import njit
from gemopt.kernels import ZERO, put
from gemopt.solvers.exact.tree import FAST

Array = NDArray[Any]
WIDTH = 64  # steps looked at together
CHECK = 4096  # contents between two looks at `stop`
KEYS = np.random.default_rng(0).integers(0, 1 << 62, 256)  # of experts, by whose sums contents are told apart


class Family(NamedTuple):
    """What contents cost on ranks of one family, under multipliers and prices of experts.

    loads, mass: [E, B, WIDTH] loads (int32) and multipliers of experts. table: latency under every load. factor [K]
    times it is that of a kind, of which `floor` [K, B, WIDTH], in units of the table, does not count. price: [E].
    alone [E, B], pair [E, E, B]: a sum over experts and over pairs that is nowhere above the sum of multipliers times
    the table, from the steps of a block to the last; flat: [E, B] multipliers times floors, not divided by a factor.
    """

    loads: Array
    mass: Array
    table: Array
    factor: Array
    floor: Array
    price: Array
    alone: Array
    pair: Array
    flat: Array


class Best(NamedTuple):
    """The cheapest contents of each kind: net [K, M] of prices, infinite where none; experts [K, M, S]; keys [K, M].

    worst: [K] where the dearest is. Contents are told apart by the sum of their experts' keys.
    """

    net: Array
    sets: Array
    keys: Array
    worst: Array


@njit(nogil=True)
def keep(best: Best, k: int, net: float, key: int, chosen_S: Array) -> None:
    """Take a content of a kind in, cheaper than the dearest, unless it is there."""
    for m in range(best.keys.shape[1]):
        if best.keys[k, m] == key:
            return
    worst = best.worst[k]
    best.net[k, worst], best.keys[k, worst] = net, key
    put(best.sets[k, worst], chosen_S)
    best.worst[k] = best.net[k].argmax()


@njit(nogil=True, inline="always")
def look_up(
    table: Array, load_W: Array, more_W: Array, mass_W: Array, with_W: Array, row_W: Array, out_W: Array
) -> None:
    """Latency and multipliers of a content with one more expert, in one block of steps."""
    for t in range(WIDTH):
        row_W[t] = table[load_W[t] + more_W[t]]
    for t in range(WIDTH):
        out_W[t] = mass_W[t] + with_W[t]


@njit(nogil=True, inline="always")
def cost_of(row_W: Array, mass_W: Array, floor_W: Array) -> float:
    """What a content costs in one block of steps."""
    total = np.float32(0)
    for t in range(WIDTH):
        total += mass_W[t] * max(np.float32(0), row_W[t] - floor_W[t])
    return float(total)


@njit(nogil=True, inline="always")
def add(load_T: Array, more_T: Array, mass_T: Array, with_T: Array, out_T: Array, out_mass_T: Array) -> None:
    """Loads and multipliers of a content with one more expert."""
    for t in range(len(load_T)):
        out_T[t] = load_T[t] + more_T[t]
        out_mass_T[t] = mass_T[t] + with_T[t]


@njit(nogil=True)
def add_line(family: Family, e: int, depth: int, margin_SEB: Array, cost_SB: Array, flat_SB: Array) -> None:
    """What is below the latencies of a content with one more expert, and what each later one adds to that."""
    for j in range(e + 1, len(family.alone)):
        for b in range(cost_SB.shape[1]):
            margin_SEB[depth + 1, j, b] = margin_SEB[depth, j, b] + family.pair[e, j, b]
    for b in range(cost_SB.shape[1]):
        cost_SB[depth + 1, b] = cost_SB[depth, b] + margin_SEB[depth, e, b]
        flat_SB[depth + 1, b] = flat_SB[depth, b] + family.flat[e, b]


@njit(nogil=True, fastmath=FAST)
def scan(family: Family, best: Best, stop: Array) -> bool:
    """Look at all contents, of which the cheapest go into `best`; False when stopped.

    A content is given up where what it costs so far, and what pairs prove of the steps to come, is too much.
    """
    (experts, blocks, width), (kinds, _, size) = family.loads.shape, best.sets.shape
    load_SBW, mass_SBW = np.zeros((size, blocks, width), np.int32), np.zeros((size, blocks, width), np.float32)
    row_W, mass_W = np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32)
    margin_SEB, cost_SB, flat_SB = np.zeros((size, experts, blocks)), np.zeros((size, blocks)), np.zeros((size, blocks))
    price_S, key_S = np.zeros(size), np.zeros(size, np.int64)
    next_S, chosen_S = np.zeros(size, np.int64), np.zeros(size, np.int64)
    net_K, most_K = np.empty(kinds), np.empty(kinds)
    for k in range(kinds):
        most_K[k] = best.net[k, best.worst[k]]
    for e in range(experts):
        put(margin_SEB[0, e], family.alone[e])
    depth, ready, looks = ZERO, 0, 0
    while depth >= 0:
        looks += 1
        if looks % CHECK == 0 and stop[0] != 0:
            return False
        left = size - depth
        if left > 1:
            e = next_S[depth]
            if e > experts - left:
                depth -= 1
                continue
            next_S[depth], chosen_S[depth], ready = e + 1, e, min(ready, depth)
            add_line(family, e, depth, margin_SEB, cost_SB, flat_SB)
            price_S[depth + 1], key_S[depth + 1] = price_S[depth] + family.price[e], key_S[depth] + KEYS[e]
            depth += 1
            next_S[depth] = e + 1
            continue
        for e in range(next_S[depth], experts):
            price, alive = price_S[depth] + family.price[e], 0
            for b in range(blocks):
                alive = 0
                over, flat = cost_SB[depth, b] + margin_SEB[depth, e, b], flat_SB[depth, b] + family.flat[e, b]
                for k in range(kinds):
                    if b == 0:
                        net_K[k] = -price
                    if net_K[k] + max(0.0, family.factor[k] * over - flat) < most_K[k]:
                        alive += 1
                    else:
                        net_K[k] = np.inf
                if alive == 0:
                    break
                if b == 0:
                    for s in range(ready, depth):
                        at = chosen_S[s]
                        for c in range(blocks):
                            add(
                                load_SBW[s, c], family.loads[at, c], mass_SBW[s, c], family.mass[at, c],
                                load_SBW[s + 1, c], mass_SBW[s + 1, c],
                            )  # fmt: skip
                    ready = depth
                look_up(
                    family.table, load_SBW[depth, b], family.loads[e, b], mass_SBW[depth, b], family.mass[e, b],
                    row_W, mass_W,
                )  # fmt: skip
                for k in range(kinds):
                    if net_K[k] < np.inf:
                        net_K[k] += family.factor[k] * cost_of(row_W, mass_W, family.floor[k, b])
            if alive:
                chosen_S[depth] = e
                for k in range(kinds):
                    if net_K[k] < most_K[k]:
                        keep(best, k, net_K[k], key_S[depth] + KEYS[e], chosen_S)
                        most_K[k] = best.net[k, best.worst[k]]
        depth -= 1
    return True


@njit(nogil=True, fastmath=FAST)
def exchange(family: Family, starts_NS: Array, kind_N: Array, best: Best, stop: Array) -> int:
    """Improve contents by the best exchange of one expert, one after the other; how many contents were looked at.

    The cheapest of all that were looked at go into `best`.
    """
    (experts, blocks, width), (kinds, _, size) = family.loads.shape, best.sets.shape
    load_BW, mass_BW = np.empty((blocks, width), np.int32), np.empty((blocks, width), np.float32)
    row_W, mass_W = np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32)
    net_K, chosen_S, other_S = np.empty(kinds), np.empty(size, np.int64), np.empty(size, np.int64)
    held_E, looks = np.empty(experts, np.bool_), 0
    for n in range(len(starts_NS)):
        put(chosen_S, starts_NS[n])
        least, better = np.inf, True
        while better and stop[0] == 0:
            better, last_i, last_j = False, 0, 0
            held_E[:] = False
            for s in range(size):
                held_E[chosen_S[s]] = True
            for i in range(size):
                load_BW[:], mass_BW[:] = 0, 0
                price, key = 0.0, 0
                for s in range(size):
                    if s != i:
                        e = chosen_S[s]
                        for b in range(blocks):
                            add(load_BW[b], family.loads[e, b], mass_BW[b], family.mass[e, b], load_BW[b], mass_BW[b])
                        price += family.price[e]
                        key += KEYS[e]
                for e in range(experts):
                    if held_E[e] and (e != chosen_S[i] or i > 0):
                        continue
                    looks += 1
                    net_K[:] = -price - family.price[e]
                    for b in range(blocks):
                        look_up(
                            family.table, load_BW[b], family.loads[e, b], mass_BW[b], family.mass[e, b], row_W, mass_W
                        )
                        for k in range(kinds):
                            net_K[k] += family.factor[k] * cost_of(row_W, mass_W, family.floor[k, b])
                    for k in range(kinds):
                        if net_K[k] < best.net[k, best.worst[k]]:
                            put(other_S, chosen_S)
                            other_S[i] = e
                            keep(best, k, net_K[k], key + KEYS[e], other_S)
                    if net_K[kind_N[n]] < least:
                        least, better, last_i, last_j = net_K[kind_N[n]], e != chosen_S[i], i, e
            chosen_S[last_i] = last_j
    return looks

"""Compiled choice of copies for one batch of one layer, and the split of its assignments over them.

x_GE: assignments of each expert on each rank. A copy is an expert on a rank that is not its home.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.compiling import njit
from gemopt.kernels import latency_value
from gemopt.latency import Curves

Array = NDArray[Any]
CLOSE = 1e-3  # relative: a shift that gains less is not worth a dispatch
HOTTEST = 8  # experts of the slowest rank that are tried


class Price(NamedTuple):
    """Cost of copying: see `gemopt.replay.copying.Migration`. hidden_us: what goes on beside for free of stalls.

    life: batches over which the choice of copies, and nothing else, spreads the cost of a new one.
    """

    expert_us: float
    hidden_us: float
    slowdown: float
    commit_us: float
    life: float


@njit(nogil=True)
def copying_us(in_G: Array, out_G: Array, price: Price) -> float:
    """By how much a layer takes longer when ranks receive and send so many experts before it."""
    most = max(in_G.max(), out_G.max())
    if most == 0:
        return 0.0
    transfer_us = most * price.expert_us
    beside_us = min(transfer_us, price.hidden_us)
    return float(transfer_us - beside_us + price.slowdown * beside_us + price.commit_us)


@njit(nogil=True)
def loads_of(x_GE: Array, table_FN: Array) -> Array:
    """[G, F] summed features."""
    out = np.zeros((x_GE.shape[0], table_FN.shape[0]))
    for g in range(x_GE.shape[0]):
        for e in range(x_GE.shape[1]):
            for f in range(table_FN.shape[0]):
                out[g, f] += table_FN[f, x_GE[g, e]]
    return out


@njit(nogil=True)
def times_of(x_GE: Array, table_FN: Array, curves: Curves) -> Array:
    """[G] latencies in microseconds."""
    loads_GF = loads_of(x_GE, table_FN)
    out = np.empty(len(x_GE))
    for g in range(len(x_GE)):
        out[g] = latency_value(g, loads_GF[g], curves)
    return out


@njit(nogil=True)
def after(rank: int, old: int, new: int, loads_GF: Array, table_FN: Array, curves: Curves, scratch_F: Array) -> float:
    """Latency of a rank when one expert's assignments there change."""
    for f in range(scratch_F.shape[0]):
        scratch_F[f] = loads_GF[rank, f] + table_FN[f, new] - table_FN[f, old]
    return float(latency_value(rank, scratch_F, curves))


@njit(nogil=True)
def best_shift(
    e: int, h: int, c: int, x_GE: Array, loads_GF: Array, table_FN: Array, curves: Curves, scratch_F: Array
) -> tuple[int, float]:
    """Assignments of an expert to shift from rank h to rank c, and the later of the two afterwards."""
    low, high = 0, x_GE[h, e]  # at high c is later than h, or everything has been shifted
    there = x_GE[c, e]
    while high - low > 1:
        d = (low + high) // 2
        here_us = after(h, x_GE[h, e], x_GE[h, e] - d, loads_GF, table_FN, curves, scratch_F)
        there_us = after(c, there, there + d, loads_GF, table_FN, curves, scratch_F)
        if here_us > there_us:
            low = d
        else:
            high = d
    best, value = 0, np.inf
    for d in (low, high, x_GE[h, e]):
        if d > 0:
            here_us = after(h, x_GE[h, e], x_GE[h, e] - d, loads_GF, table_FN, curves, scratch_F)
            later = max(here_us, after(c, there, there + d, loads_GF, table_FN, curves, scratch_F))
            if later < value:
                best, value = d, later
    return best, value


@njit(nogil=True)
def shift(
    e: int, h: int, c: int, d: int, x_GE: Array, loads_GF: Array, times_G: Array, table_FN: Array, curves: Curves
) -> None:
    """Carry a shift out."""
    for f in range(loads_GF.shape[1]):
        loads_GF[h, f] += table_FN[f, x_GE[h, e] - d] - table_FN[f, x_GE[h, e]]
        loads_GF[c, f] += table_FN[f, x_GE[c, e] + d] - table_FN[f, x_GE[c, e]]
    x_GE[h, e] -= d
    x_GE[c, e] += d
    times_G[h] = latency_value(h, loads_GF[h], curves)
    times_G[c] = latency_value(c, loads_GF[c], curves)


@njit(nogil=True)
def at_home(counts_E: Array, home_E: Array, ranks: int) -> Array:
    """[G, E] every expert at home."""
    x_GE = np.zeros((ranks, len(counts_E)), np.int64)
    for e in range(len(counts_E)):
        x_GE[home_E[e], e] = counts_E[e]
    return x_GE


@njit(nogil=True)
def hottest(x_E: Array, out_N: Array) -> Array:
    """The experts with the most assignments above 0, most first, in the memory of `out_N`; as many as that holds."""
    count = 0
    for e in range(x_E.shape[0]):
        place = count if count < out_N.shape[0] else count - 1
        if x_E[e] == 0 or (count == out_N.shape[0] and x_E[e] <= x_E[out_N[place]]):
            continue
        count = place + 1
        while place > 0 and x_E[out_N[place - 1]] < x_E[e]:
            out_N[place] = out_N[place - 1]
            place -= 1
        out_N[place] = e
    return out_N[:count]


@njit(nogil=True)
def spread(
    counts_E: Array, home_E: Array, present_GE: Array, slots_G: Array, may_copy: bool, price: Price, table_FN: Array,
    curves: Curves,
) -> tuple[Array, Array]:  # fmt: skip
    """([G, E] assignments, [G, E] copies used) with small makespan plus the price of copies that are not present.

    From home, each time the slowest rank gives part of an expert to the rank where that ends soonest; of the states on
    the way the cheapest is taken. Without `may_copy` only copies that are present are used.
    """
    ranks, experts = present_GE.shape
    x_GE, used_GE = at_home(counts_E, home_E, ranks), np.zeros((ranks, experts), np.bool_)
    loads_GF, times_G = loads_of(x_GE, table_FN), np.empty(ranks)
    for g in range(ranks):
        times_G[g] = latency_value(g, loads_GF[g], curves)
    held_G, in_G, out_G = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    scratch_F, hot_N, limit = np.empty(table_FN.shape[0]), np.empty(HOTTEST, np.int64), 8 * ranks
    done, made, kept, cheapest = np.empty((limit, 5), np.int64), 0, 0, times_G.max()
    for _ in range(limit):
        h, paid = int(times_G.argmax()), copying_us(in_G, out_G, price)
        chosen = (-1, -1, 0, 0)
        score = times_G[h] * (1 - CLOSE)
        for e in hottest(x_GE[h], hot_N):
            for c in range(ranks):
                old = used_GE[c, e] or home_E[e] == c
                if c == h or times_G[c] >= times_G[h] or (not old and held_G[c] >= slots_G[c]):
                    continue
                new = not old and not present_GE[c, e]
                if new and not may_copy:
                    continue
                d, value = best_shift(e, h, c, x_GE, loads_GF, table_FN, curves, scratch_F)
                if value >= times_G[h] * (1 - CLOSE):
                    continue
                if new:
                    in_G[c] += 1
                    out_G[home_E[e]] += 1
                    value += (copying_us(in_G, out_G, price) - paid) / price.life
                    in_G[c] -= 1
                    out_G[home_E[e]] -= 1
                if value < score:
                    score, chosen = value, (int(e), c, d, 0 if old else 1 + int(new))
        e, c, d, kind = chosen
        if e < 0:
            break
        shift(e, h, c, d, x_GE, loads_GF, times_G, table_FN, curves)
        if kind:
            used_GE[c, e] = True
            held_G[c] += 1
        if kind == 2:
            in_G[c] += 1
            out_G[home_E[e]] += 1
        done[made, 0], done[made, 1], done[made, 2], done[made, 3], done[made, 4] = e, h, c, d, kind
        made += 1
        cost = times_G.max() + copying_us(in_G, out_G, price) / price.life
        if cost < cheapest:
            cheapest, kept = cost, made
    for n in range(made - 1, kept - 1, -1):  # back to the cheapest
        e, h, c, d, kind = done[n]
        x_GE[h, e] += d
        x_GE[c, e] -= d
        if kind:
            used_GE[c, e] = False
    return x_GE, used_GE


@njit(nogil=True)
def saved_us(
    counts_ME: Array, home_E: Array, present_GE: Array, other_GE: Array, slots_G: Array, price: Price, table_FN: Array,
    curves: Curves,
) -> float:  # fmt: skip
    """Microseconds that a batch is sooner, in the mean of some, with other copies than those present."""
    may_copy: Any = np.bool_(False)  # of a literal numba would compile `spread` a second time
    total = 0.0
    for m in range(counts_ME.shape[0]):
        for kind in range(2):
            held_GE = other_GE if kind else present_GE
            x_GE, _ = spread(counts_ME[m], home_E, held_GE, slots_G, may_copy, price, table_FN, curves)
            worst = times_of(x_GE, table_FN, curves).max()
            total += -worst if kind else worst
    return float(total / max(1, counts_ME.shape[0]))

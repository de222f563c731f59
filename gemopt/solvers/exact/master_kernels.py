"""Compiled loops of the master programme: the norms of its rows, and its iteration without the interpreter.

Shapes: N columns of M = L T entries, one per level and step; K kinds of ranks; S items of a column, experts or copies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.compiling import njit
from gemopt.kernels import put
from gemopt.solvers.exact.tree import FAST

Array = NDArray[Any]
F32 = np.float32
TWO, TINY = F32(2), 1e-30
SURE = FAST - {"nnan"}  # what diverges is noticed
WIDTH = 64  # steps that are projected together
STEP = 0.67  # of the norm of either kind of rows, below the root of a half
PRIMAL_WEIGHT = 12.0
SUFFICIENT, NECESSARY, LONG, SHORT = 0.2, 0.8, 0.36, 20  # of the fixed-point error, and of iterations, at a restart


class Columns(NamedTuple):
    """Columns of the programme.

    parts: [N, M] what their latencies have in every level. items: [N, S] what is in them, so many as size [N]; item i
    is a share [i] of expert owner [i]. kind: [N].
    """

    parts: Array
    items: Array
    size: Array
    kind: Array
    owner: Array
    share: Array


class Point(NamedTuple):
    """x: [N] of each column; mu: [E, M], pi: [E], y: [K] multipliers of the latencies, the experts, the ranks."""

    x: Array
    mu: Array
    pi: Array
    y: Array


class Way(NamedTuple):
    """Where an iteration is: the norm that its steps follow; all iterations, and those since the last restart.

    first, last: fixed-point errors since the restart.
    """

    norm: float
    iterations: int
    since: int
    first: float
    last: float


@njit(nogil=True, fastmath=SURE)
def apart(one_N: Array, other_N: Array) -> float:
    """Sum of the squares of the differences."""
    total = F32(0)
    for n in range(len(one_N)):
        total += (one_N[n] - other_N[n]) * (one_N[n] - other_N[n])
    return float(total)


@njit(nogil=True, fastmath=SURE)
def to_length_one(vector_N: Array, out_N: Array) -> float:
    """The length of a vector, which goes into `out` divided by it."""
    total = F32(0)
    for n in range(len(vector_N)):
        total += vector_N[n] * vector_N[n]
    length = float(np.sqrt(float(total)))
    for n in range(len(vector_N)):
        out_N[n] = vector_N[n] * F32(1 / max(length, TINY))
    return length


@njit(nogil=True, fastmath=FAST)
def norm_of_costs(columns: Columns, mu_EM: Array, rounds: int) -> float:
    """The largest eigenvalue of the rows of latencies times their transpose; `mu` goes towards its vector."""
    out_EM, length = np.empty_like(mu_EM), 0.0
    to_length_one(mu_EM.ravel(), mu_EM.ravel())
    for _ in range(rounds):
        out_EM[:] = 0
        for n in range(len(columns.parts)):
            total = F32(0)
            for s in range(columns.size[n]):
                share, e, cost = columns.share[columns.items[n, s]], columns.owner[columns.items[n, s]], F32(0)
                for j in range(columns.parts.shape[1]):
                    cost += columns.parts[n, j] * mu_EM[e, j]
                total += share * cost
            for s in range(columns.size[n]):
                held, e = total * columns.share[columns.items[n, s]], columns.owner[columns.items[n, s]]
                for j in range(columns.parts.shape[1]):
                    out_EM[e, j] += held * columns.parts[n, j]
        length = to_length_one(out_EM.ravel(), mu_EM.ravel())
    return length


@njit(nogil=True)
def norm_of_sums(columns: Columns, sums_R: Array, rounds: int) -> float:
    """The same of the rows of experts [E], then of kinds of ranks [K]."""
    out_R, experts, length = np.empty_like(sums_R), columns.owner.max() + 1, 0.0
    to_length_one(sums_R, sums_R)
    for _ in range(rounds):
        out_R[:] = 0
        for n in range(len(columns.kind)):
            total = sums_R[experts + columns.kind[n]]
            for s in range(columns.size[n]):
                total += columns.share[columns.items[n, s]] * sums_R[columns.owner[columns.items[n, s]]]
            out_R[experts + columns.kind[n]] += total
            for s in range(columns.size[n]):
                out_R[columns.owner[columns.items[n, s]]] += total * columns.share[columns.items[n, s]]
        length = to_length_one(out_R, sums_R)
    return length


@njit(nogil=True, fastmath=FAST)
def go_down(
    columns: Columns, z: Point, ratio: np.float32, size: np.float32, x_N: Array, cost_EM: Array, held_E: Array,
    used_K: Array,
) -> None:  # fmt: skip
    """Half a primal-dual step: columns go down their reduced costs; what twice the new less the old ones hold."""
    cost_EM[:] = 0
    held_E[:] = 0
    used_K[:] = 0
    for n in range(len(x_N)):
        total = -ratio * z.y[columns.kind[n]]
        for s in range(columns.size[n]):
            share, e, cost = columns.share[columns.items[n, s]], columns.owner[columns.items[n, s]], F32(0)
            for j in range(columns.parts.shape[1]):
                cost += columns.parts[n, j] * z.mu[e, j]
            total += share * (cost - ratio * z.pi[e])
        x_N[n] = max(F32(0), z.x[n] - size * total)
        over = TWO * x_N[n] - z.x[n]
        if over != 0:
            used_K[columns.kind[n]] += over
            for s in range(columns.size[n]):
                held, e = over * columns.share[columns.items[n, s]], columns.owner[columns.items[n, s]]
                held_E[e] += held
                for j in range(columns.parts.shape[1]):
                    cost_EM[e, j] += held * columns.parts[n, j]


@njit(nogil=True)
def project(mu_EM: Array, most_M: Array, out_EM: Array) -> None:
    """Nearest multipliers >= 0 whose sum over the experts is at most `most_M` (Michelot's method, many at once)."""
    level, total, count = np.empty(WIDTH, F32), np.empty(WIDTH, F32), np.empty(WIDTH, F32)
    for first in range(0, len(most_M), WIDTH):
        size = min(WIDTH, len(most_M) - first)
        level[:] = 0
        rises = True
        while rises:
            total[:] = 0
            count[:] = 0
            for e in range(len(mu_EM)):
                for j in range(size):
                    mu = mu_EM[e, first + j]
                    total[j] += mu if mu > level[j] else F32(0)
                    count[j] += F32(1) if mu > level[j] else F32(0)
            rises = False
            for j in range(size):
                if total[j] > most_M[first + j] + level[j] * count[j]:
                    higher = (total[j] - most_M[first + j]) / count[j]
                    rises |= higher > level[j]
                    level[j] = max(level[j], higher)
        for e in range(len(mu_EM)):
            for j in range(size):
                out_EM[e, first + j] = max(F32(0), mu_EM[e, first + j] - level[j])


@njit(nogil=True)
def set_to(target: Point, source: Point) -> None:
    """Every part of a point."""
    put(target.x, source.x)
    put(target.mu.ravel(), source.mu.ravel())
    put(target.pi, source.pi)
    put(target.y, source.y)


@njit(nogil=True, fastmath=SURE)
def reflect(z_N: Array, anchor_N: Array, image_N: Array, part: np.float32) -> None:
    """A Halpern step: so much of the way from where it began to beyond the image."""
    for n in range(len(z_N)):
        z_N[n] = anchor_N[n] * (F32(1) - part) + part * (TWO * image_N[n] - z_N[n])


@njit(nogil=True)
def iterate(
    columns: Columns, most_M: Array, count_K: Array, ratio: np.float32, z: Point, anchor: Point, image: Point,
    way: Way, count: int, stop: Array,
) -> Way:  # fmt: skip
    """So many steps from z, unless stopped; `image` is where the last one led."""
    norm, iterations, since, first, last = way.norm, way.iterations, way.since, way.first, way.last
    cost, held, used = np.empty_like(z.mu), np.empty_like(z.pi), np.empty_like(z.y)
    wide = (z.mu.size // len(most_M), len(most_M))  # planes of a latency share what the multipliers of a step sum to
    for _ in range(count):
        if stop[0] != 0:
            break
        down, up = F32(STEP / norm / PRIMAL_WEIGHT), F32(STEP / norm * PRIMAL_WEIGHT)
        go_down(columns, z, ratio, down, image.x, cost, held, used)
        for e in range(len(cost)):
            for j in range(cost.shape[1]):
                cost[e, j] = z.mu[e, j] + up * cost[e, j]
            image.pi[e] = z.pi[e] + up * ratio * (F32(1) - held[e])
        project(cost.reshape(wide), most_M, image.mu.reshape(wide))
        for k in range(len(used)):
            image.y[k] = z.y[k] + up * ratio * (count_K[k] - used[k])
        iterations += 1
        since += 1
        rows = apart(image.mu.ravel(), z.mu.ravel()) + apart(image.pi, z.pi) + apart(image.y, z.y)
        error = np.sqrt(apart(image.x, z.x) / down + rows / up)
        if since == 1:
            first = error
        fallen = error <= SUFFICIENT * first or (error <= NECESSARY * first and error > last)
        if not np.isfinite(error):
            norm *= 2
            set_to(image, anchor)
            fallen = True
        if fallen or since > max(SHORT, LONG * iterations):
            set_to(z, image)
            set_to(anchor, image)
            since, last = 0, np.inf
            continue
        part = F32(since / (since + 1))
        reflect(z.x, anchor.x, image.x, part)
        reflect(z.mu.ravel(), anchor.mu.ravel(), image.mu.ravel(), part)
        reflect(z.pi, anchor.pi, image.pi, part)
        reflect(z.y, anchor.y, image.y, part)
        last = error
    return Way(norm, iterations, since, first, last)

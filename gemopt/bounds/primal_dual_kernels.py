"""One iteration of `primal_dual`, compiled: gradient steps, their projections, and the Halpern step. float32."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.compiling import njit

Array = NDArray[Any]
Real = Any  # float32 in the kernels
F32 = np.float32


@njit(nogil=True, fastmath=True)
def step_together(
    u: Array, rho: Array, v: Array, bar_q: Array, pull: Array, slope: Array, most: Real, tau: Real, sigma: Real,
    new_u: Array, new_rho: Array, mix: Array, sums: Array,
) -> None:  # fmt: skip
    """Gradient step of U, then of the multipliers rho of `U <= q` (none: `U <= most`).

    u, rho: [C, E, E]; v, bar_q, sums: [C, E]; pull, mix: [N, E, E] and slope: [C, N] for N planes and features: pull is
    the symmetric gradient of the rows, mix becomes the reflected U, times the slopes; sums the row sums of that U.
    """
    groups, experts = v.shape
    kinds = slope.shape[1]
    mix[:] = 0
    for c in range(groups):
        for i in range(experts):
            total = F32(0)
            for j in range(experts):
                gradient = -v[c, i] - v[c, j]
                for n in range(kinds):
                    gradient += slope[c, n] * pull[n, i, j]
                if len(rho):
                    gradient += rho[c, i, j] + rho[c, j, i]
                new = min(max(u[c, i, j] - tau * gradient, F32(0)), most)
                if i == j:
                    new = F32(0)
                bar = 2 * new - u[c, i, j]
                new_u[c, i, j] = new
                total += bar
                for n in range(kinds):
                    mix[n, i, j] += slope[c, n] * bar
                if len(rho):
                    new_rho[c, i, j] = max(rho[c, i, j] + sigma * (bar - bar_q[c, i]), F32(0))
            sums[c, i] = total


@njit(nogil=True, fastmath=True)
def step_rows(mu: Array, rows: Array, floor: Array, weight: Array, sigma: Real, new_mu: Array) -> None:
    """Gradient step of the rows' multipliers, [T, N] at least 0 and of sum at most `weight` [T] for each step."""
    steps, size = mu.shape
    for t in range(steps):
        total = F32(0)
        shift = sigma * floor[t]
        for n in range(size):
            value = max(mu[t, n] + sigma * rows[t, n] - shift, F32(0))
            new_mu[t, n] = value
            total += value
        if total > weight[t]:
            project(new_mu[t], weight[t], total)


@njit(nogil=True, fastmath=True)
def project(values: Array, weight: Real, total: Real) -> None:
    """Projection of values >= 0 of sum `total` onto the simplex of sum `weight` (Michelot)."""
    size = len(values)
    cut, count = (total - weight) / F32(size), size
    for _ in range(100):
        total, kept = F32(0), 0
        for n in range(size):
            if values[n] > cut:
                total += values[n]
                kept += 1
        if kept in (0, count):
            break
        cut, count = (total - weight) / F32(kept), kept
    for n in range(size):
        values[n] = max(values[n] - cut, F32(0))


@njit(nogil=True, fastmath=True)
def step_ranks(x: Array, cost: Array, tau: Real, new_x: Array) -> None:
    """Gradient step of x [E, G], each row on the simplex."""
    experts, ranks = x.shape
    for i in range(experts):
        low = np.inf
        for g in range(ranks):
            new_x[i, g] = x[i, g] - tau * cost[i, g]
            low = min(low, new_x[i, g])
        total = F32(0)
        for g in range(ranks):
            new_x[i, g] -= low
            total += new_x[i, g]
        if total > F32(1):
            project(new_x[i], F32(1), total)
        else:
            for g in range(ranks):
                new_x[i, g] += (F32(1) - total) / F32(ranks)


@njit(nogil=True, fastmath=True)
def halpern(z: Array, image: Array, anchor: Array, part: Real) -> float:
    """z becomes `part (2 image - z) + (1 - part) anchor`; returns the squared distance of z and image."""
    total = F32(0)
    for n in range(len(z)):
        moved = image[n] - z[n]
        total += moved * moved
        z[n] = part * (image[n] + moved) + (F32(1) - part) * anchor[n]
    return float(total)

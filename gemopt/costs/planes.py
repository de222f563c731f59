"""Max-affine regression: a maximum of few planes `a + b N + c A`, with a, b, c >= 0, of small relative error.

Magnani and Boyd, Convex piecewise-linear fitting, Optimization and Engineering 10, 2009; grown one plane at a time.
"""

from __future__ import annotations

import numpy as np

from gemopt.latency import FloatArray

MAX_STEPS = 60  # of a refinement


def max_affine(loads: FloatArray, values: FloatArray, planes: int) -> FloatArray:
    """[K, 3] planes with a, b, c >= 0 of small relative error, grown one plane at a time.

    Each new plane starts on the most underestimated third of the points, or on the third where load or active experts
    weigh most against the latency; then all planes are refined together by bounded least squares.
    """
    design = np.column_stack([np.ones(len(values)), loads])
    scale = np.where(design.max(axis=0) > 0, design.max(axis=0), 1.0)
    weighted = design / scale / values.clip(1e-9)[:, None]
    rows = _nonnegative(weighted[None])
    for _ in range(1, planes):
        under = 1 - (weighted @ rows.T).max(axis=1)
        keys = [under, weighted[:, 1], weighted[:, 2]]
        subsets = [np.argsort(-key, kind="stable")[: max(3, len(values) // 3)] for key in keys]
        grown = [_refine(weighted, np.vstack([rows, _nonnegative(weighted[None, chosen])])) for chosen in subsets]
        rows = min(grown, key=lambda candidate: _squared_error(weighted, candidate))
    return np.asarray(rows / scale)


def _squared_error(weighted: FloatArray, rows: FloatArray) -> float:
    return float(np.square((weighted @ rows.T).max(axis=1) - 1).sum())


def _refine(weighted: FloatArray, rows: FloatArray) -> FloatArray:
    """Local minimum of the squared error: every point pulls on the plane that covers it, with damped steps."""
    error, damping = _squared_error(weighted, rows), 1e-3
    for _ in range(MAX_STEPS):
        covering = (weighted @ rows.T).argmax(axis=1) == np.arange(len(rows))[:, None]
        candidate = _nonnegative(weighted * covering[:, :, None], near=rows, damping=damping)
        renewed = _squared_error(weighted, candidate)
        if renewed < error:
            stalled = renewed > (1 - 1e-4) * error
            rows, error, damping = candidate, renewed, damping / 3
            if stalled:
                break
        elif damping > 1e3:
            break
        else:
            damping *= 4
    return rows


def _nonnegative(design: FloatArray, *, near: FloatArray | None = None, damping: float = 0.0) -> FloatArray:
    """[K, 3] non-negative x_k that minimise |design_k x_k - 1| for design [K, N, 3], rows of 0 left out.

    With `damping`, plus damping times the squared distance from `near` [K, 3] in units of each column's weight.
    3 columns have 7 sets of positive entries: all are tried at once.
    """
    gram, target = np.swapaxes(design, 1, 2) @ design, design.sum(axis=1)
    weight = np.einsum("kii->ki", gram)
    ridge = (1e-10 + damping) * weight + 1e-10 * (weight.sum(axis=1, keepdims=True) + 1e-300)
    if near is not None:
        target = target + damping * weight * near
    full = gram + ridge[:, None, :] * np.eye(3)
    matrices = np.where(_SUBSETS[:, :, None] & _SUBSETS[:, None, :], full[:, None], np.eye(3))
    solutions = np.linalg.solve(matrices, (target[:, None] * _SUBSETS)[..., None])[..., 0]
    gain = np.where((solutions >= 0).all(axis=2), np.einsum("ksi,ki->ks", solutions, target), -1.0)
    best = gain.argmax(axis=1)
    return np.asarray(solutions[np.arange(len(best)), best] * (gain.max(axis=1) >= 0)[:, None])


_SUBSETS = np.array([[bool(bits >> i & 1) for i in range(3)] for bits in range(1, 8)])

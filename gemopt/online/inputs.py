"""What callers hand to the controller, checked: `InputError` with one line for everything that cannot be used."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemopt.documents import integer_array
from gemopt.exceptions import InputError
from gemopt.latency import FloatArray
from gemopt.solvers.search.state import EXACT_FLOAT32


def counts_from(given: object, shape: tuple[int, int]) -> NDArray[np.int64]:
    """[n, L, E] assignments of at least one step of a network of `shape` (layers, experts)."""
    counts = integer_array(given, name="counts", ndim=3)
    if counts.shape[1:] != shape:
        raise InputError("counts", f"shape {counts.shape}", f"[steps, {shape[0]} layers, {shape[1]} experts]")
    if not len(counts):
        raise InputError("counts", "no steps", "at least one step")
    if counts.min() < 0:
        raise InputError("counts", int(counts.min()), "whole numbers >= 0")
    largest = float(counts.sum(axis=2, dtype=np.float64).max())
    if largest >= EXACT_FLOAT32:
        raise InputError("counts", largest, f"fewer than {EXACT_FLOAT32} assignments per step and layer")
    return counts


def latencies_from(given: object, steps: int, ranks: int) -> FloatArray | None:
    """[steps, ranks] microseconds; NaN, infinity and 0 stand for a rank that said nothing."""
    if given is None:
        return None
    try:
        latencies = np.array(given, dtype=np.float64)
    except (ValueError, TypeError):
        raise InputError("latencies", given, "numbers [steps, ranks]") from None
    if latencies.shape != (steps, ranks):
        raise InputError("latencies", f"shape {latencies.shape}", f"[{steps} steps, {ranks} ranks]")
    if (latencies < 0).any():
        raise InputError("latencies", float(np.nanmin(latencies)), "microseconds >= 0")
    return latencies

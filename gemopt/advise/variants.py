"""Traffic as it is, measured; and the same traffic with more or less skew, larger batches, or a change of regime."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import FloatArray
from gemopt.traces import Traces

IntArray = NDArray[Any]


def skewness(counts_TLE: IntArray) -> float:
    """Load of the hottest expert over the mean load of all (MoE-GPS), over all steps; mean of the layers."""
    total_LE = counts_TLE.sum(axis=0, dtype=np.float64)
    return float((total_LE.max(axis=1) / np.maximum(total_LE.mean(axis=1), 1e-300)).mean())


def distance(first_TLE: IntArray, then_TLE: IntArray) -> float:
    """Share of the assignments that go elsewhere than before; mean of the layers (total variation)."""
    a_LE, b_LE = (each.sum(axis=0, dtype=np.float64) for each in (first_TLE, then_TLE))
    a_LE, b_LE = (each / np.maximum(each.sum(axis=1, keepdims=True), 1e-300) for each in (a_LE, b_LE))
    return float(np.abs(a_LE - b_LE).sum(axis=1).mean() / 2)


def drift(counts_TLE: IntArray, cut: int, seed: int = 0) -> float:
    """How far the steps from `cut` on go elsewhere than those before, beyond what steps in random order do."""
    drawn = np.random.default_rng(seed).permutation(len(counts_TLE))
    by_chance = distance(counts_TLE[drawn[:cut]], counts_TLE[drawn[cut:]])
    return max(0.0, distance(counts_TLE[:cut], counts_TLE[cut:]) - by_chance)


def _bare(traces: Traces, counts_TLE: IntArray) -> Traces:
    """With other counts, and without what these no longer agree with."""
    return replace(traces, counts=counts_TLE, tokens=None, rank_us=None, pair_counts=None, transitions=None,
                   allow_idle=True)  # fmt: skip


def rounded(wanted_NE: FloatArray, total_N: IntArray) -> IntArray:
    """[N, E] whole numbers in the proportions wanted, that sum to the totals (largest remainders)."""
    sums_N = wanted_NE.sum(axis=1)
    exact = wanted_NE * np.divide(total_N, sums_N, out=np.zeros(len(sums_N)), where=sums_N > 0)[:, None]
    whole = np.floor(exact + 1e-9).astype(np.int64)
    missing_N = np.where(sums_N > 0, total_N - whole.sum(axis=1), 0)
    ranked = np.argsort(np.argsort(-(exact - whole), axis=1, kind="stable"), axis=1, kind="stable")
    return np.asarray(whole + (ranked < missing_N[:, None]))


def with_skew(traces: Traces, power: float) -> Traces:
    """Long-run shares of the experts to a power (0: even, 1: as they are), each step's own deviations kept."""
    counts = np.asarray(traces.counts, dtype=np.float64)
    share_LE = counts.sum(axis=0) / np.maximum(counts.sum(axis=(0, 2)), 1e-300)[:, None]
    factor_LE = np.where(share_LE > 0, np.maximum(share_LE, 1e-12) ** (power - 1), 0.0)
    wanted = (counts * factor_LE).reshape(-1, traces.num_experts)
    totals = np.asarray(traces.counts).sum(axis=2, dtype=np.int64).ravel()
    return _bare(traces, rounded(wanted, totals).reshape(counts.shape))


def with_batch(traces: Traces, factor: float) -> Traces:
    """Batches `factor` times as large, in the same proportions; larger ones are the sums of consecutive steps."""
    counts = np.asarray(traces.counts, dtype=np.int64)
    if factor > 1:
        span = round(factor)
        summed = np.stack([np.roll(counts, -i, axis=0) for i in range(span)]).sum(axis=0)
        return _bare(traces, summed)
    flat = counts.reshape(-1, traces.num_experts)
    return _bare(traces, rounded(flat.astype(np.float64), np.rint(flat.sum(axis=1) * factor).astype(np.int64))
                 .reshape(counts.shape))  # fmt: skip


def with_change(traces: Traces, share: float, start: int, seed: int = 0) -> Traces:
    """Steps in random order, and from `start` on so large a share of the experts have exchanged their traffic."""
    rng = np.random.default_rng(seed)
    counts = np.array(traces.counts)[rng.permutation(traces.num_steps)]
    chosen = rng.permutation(traces.num_experts)[: round(share * traces.num_experts)]
    names = np.arange(traces.num_experts)
    names[chosen] = np.roll(chosen, 1)
    counts[start:] = counts[start:][:, :, names]
    return _bare(traces, counts)

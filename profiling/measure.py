"""Timing one load: warm-up, blocks of calls, median and spread, outliers once more."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import numpy as np

from gemopt.exceptions import InputError
from gemopt.profile import Sample
from gemopt.profiling.device import Device
from gemopt.profiling.sampling import Reading

STEADY_SHARE = 0.02  # blocks whose median moves less than this are in the steady state
MAD_TO_SIGMA = 1.4826  # standard deviation of normal noise from its median absolute deviation
MEDIAN_TO_MEAN = 1.2533  # standard error of the median of normal noise, against that of the mean


@dataclass(frozen=True)
class Timing:
    """How long a load is measured.

    Attributes
    ----------
    block_us
        Each timing is the mean over as many calls as fill this; tens of scheduling periods under a CPU quota.
    seconds
        Least time over which a load is measured, so that ranks that measure together really overlap.
    repeats
        Least timings behind a median.
    """

    block_us: float
    seconds: float = 0.1
    repeats: int = 5

    def __post_init__(self) -> None:
        if not (0 < self.block_us < inf and 0 <= self.seconds < inf and self.repeats >= 1):
            raise InputError("timing", self, "a block above 0, seconds from 0 on, both finite, at least 1 repeat")

    @classmethod
    def suited(cls, device: Device) -> Timing:
        """Short blocks where events time the device itself, longer ones where the operating system interferes."""
        return cls(block_us=1_000 if device.is_accelerator else 10_000)


def time_load(device: Device, call: Callable[[], object], timing: Timing) -> list[float]:
    """Microseconds per call of every block, after a warm-up."""
    call()
    device.synchronize()
    blocks: list[float] = []
    end = time.monotonic() + timing.seconds
    while len(blocks) < timing.repeats or time.monotonic() < end:
        blocks.append(device.time_us(call, timing.block_us))
    return blocks


def summarise(blocks: list[float], assignments: int, active: int) -> Sample:
    """Median, median absolute deviation and number of the blocks."""
    median = float(np.median(blocks))
    spread = float(np.median(np.abs(np.array(blocks) - median)))
    return Sample(
        assignments=assignments, active_experts=active, latency_us=median, spread_us=spread, repeats=len(blocks)
    )


def reading(samples: list[Sample]) -> Reading:
    """Geometric mean over the ranks and its relative noise: what chooses the next load."""
    latencies = np.array([max(sample.latency_us, 1e-9) for sample in samples])
    spreads = np.array([sample.spread_us or 0.0 for sample in samples])
    repeats = np.array([sample.repeats or 1 for sample in samples])
    noise = MEDIAN_TO_MEAN * MAD_TO_SIGMA * spreads / latencies / np.sqrt(repeats)
    return Reading(float(np.exp(np.log(latencies).mean())), float(np.sqrt((noise**2).sum()) / len(samples)))


def relative_spread(sample: Sample) -> float:
    """Spread as a share of the latency."""
    return (sample.spread_us or 0.0) / max(sample.latency_us, 1e-9)


def settle(device: Device, call: Callable[[], object], *, block_us: float, limit_s: float) -> float:
    """Run a load until its time no longer moves (clocks and temperature settled) or `limit_s` passed; the last move.

    Compares medians of consecutive groups of five blocks.
    """
    end, before = time.monotonic() + limit_s, None
    while True:
        now = float(np.median([device.time_us(call, block_us) for _ in range(5)]))
        move = inf if before is None else abs(now / before - 1)
        if move < STEADY_SHARE or time.monotonic() > end:
            return move
        before = now

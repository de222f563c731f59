"""A device that answers from a measured table, with noise: sampling is tested and compared on it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

import numpy as np

from gemopt.exceptions import InputError
from gemopt.profiling.sampling import Reading

Load = TypeVar("Load", bound=Hashable)


class ReplayDevice(Generic[Load]):
    """Answers a load with the median of `repeats` timings around the table's latency.

    Parameters
    ----------
    table
        Load -> latency in microseconds.
    noise
        Relative standard deviation of one timing, normally distributed.
    repeats
        Timings behind one answer.
    """

    def __init__(self, table: Mapping[Load, float], *, noise: float = 0.01, repeats: int = 5, seed: int = 0) -> None:
        self.table = table
        self.noise = noise
        self.repeats = repeats
        self.answers: dict[Load, float] = {}
        self._rng = np.random.default_rng(seed)

    def __call__(self, load: Load) -> Reading:
        """Measure one load; the answer is kept in `answers`."""
        if load not in self.table:
            raise InputError("load", str(load), f"one of the {len(self.table)} loads of the table")
        timings = self.table[load] * (1 + self.noise * self._rng.standard_normal(self.repeats))
        self.answers[load] = float(np.median(timings))
        # The median of n normal timings has about 1.25 times the standard error of their mean.
        factor = 1.2533 if self.repeats > 2 else 1.0
        return Reading(self.answers[load], factor * self.noise / self.repeats**0.5)

"""What tests of replay share."""

from __future__ import annotations

from typing import Any

import numpy as np
from timed import timed

from gemopt.evaluate import evaluate
from gemopt.placement import Placement
from gemopt.profile import Profile
from gemopt.replay import Migration
from gemopt.replay.strategies import Fixed
from gemopt.traces import Traces

STEPS, LAYERS, EXPERTS, RANKS, WINDOW = 96, 2, 8, 4, 8
FREE = Migration(expert_bytes=1, slowdown=0, commit_us=0)


def profile(ranks: int = RANKS) -> Profile:
    """(10 + n) us, rank g a tenth slower than rank g - 1."""
    return timed(range(ranks), lambda n, g: (10.0 + n) * (1 + g / 10))


def shifting(steps: int = STEPS, seed: int = 0, **fields: Any) -> Traces:
    """Every third of the steps has other hot experts."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(EXPERTS, 0.4), size=(3, LAYERS))
    counts = np.stack([rng.multinomial(128, shares[3 * t // steps]) for t in range(steps)])
    return Traces(counts=counts, **fields)


class Scripted(Fixed):
    """Wants the given placements at the given steps of the replay, called at every step."""

    def __init__(self, script: dict[int, np.ndarray], *, stops: bool = False, name: str = "scripted") -> None:
        super().__init__(name)
        self.script, self.stops, self.period, self.eager = script, stops, 1, True
        self.latencies: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.told: list[Placement] = []
        self.now = 0

    def observe(self, counts_NLE: np.ndarray, latencies_NG: np.ndarray) -> Placement | None:
        assert len(counts_NLE) == len(latencies_NG)
        self.latencies.append(latencies_NG)
        self.lengths.append(len(counts_NLE))
        rows, self.now = self.script.get(self.now), self.now + 1
        return None if rows is None else self.context.placement(list(rows), self.slots)

    def confirm(self, placement: Placement) -> None:
        super().confirm(placement)
        self.told.append(placement)


def swapped(*layers: int) -> np.ndarray:
    """Contiguous with experts 0 and 2 (ranks 0 and 1) swapped in some layers."""
    rows = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    for layer in layers:
        rows[layer, [0, 2]] = 2, 0
    return rows


def layer_us(traces: Traces, rows: np.ndarray) -> np.ndarray:
    """[T, L] makespan of every step and layer under one placement."""
    placement = Placement(physical_to_logical=rows, slots_per_rank=[2] * RANKS, num_experts=EXPERTS)
    return evaluate(placement, profile(), traces).makespan_TL

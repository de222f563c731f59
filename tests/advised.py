"""A small profile and traffic that advice is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
from timed import timed

from gemopt.profile import MoeShape, Profile
from gemopt.traces import Traces

EXPERTS, RANKS = 8, 4
SHAPE = "hidden_size=64,heads=4,kv_heads=2,head_dim=16,context=128,tflops=100,memory_gbps=1000"


def profile(ranks: int = RANKS, **model: Any) -> Profile:
    return timed(range(ranks), lambda n, g: (10.0 + n) * (1 + g / 10), model=MoeShape(**model))


def skewed(steps: int = 64, layers: int = 2, seed: int = 0) -> Traces:
    rng = np.random.default_rng(seed)
    share = np.array([8, 6, 1, 1, 1, 1, 1, 1]) / 20
    return Traces(counts=np.stack([rng.multinomial(256, np.tile(share, (layers, 1))) for _ in range(steps)]), top_k=2)


def even(steps: int = 64) -> Traces:
    return Traces(counts=np.full((steps, 1, EXPERTS), 8), top_k=2)

"""What tests of traces share."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from gemopt.traces import Phase, Tokens, Traces
from gemopt.traces.batching import from_tokens


def routed(rng: np.random.Generator, tokens: int, layers: int, experts: int, top_k: int) -> np.ndarray:
    ranks = rng.random((tokens, layers, experts)).argsort(axis=2)
    return ranks[:, :, :top_k]


def recorded(seed: int = 0, *, batch_size: int = 3, phase: Phase = Phase.DECODE, **options: Any) -> Traces:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, size=8)
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    tasks = [("maths", "code")[i % 2] for i in range(8)]
    ids = routed(rng, int(lengths.sum()), 3, 6, 2)
    return from_tokens(
        ids, starts, num_experts=6, batch_size=batch_size, phase=phase, request_tasks=tasks, model="m", **options
    )


def same(a: Traces, b: Traces) -> None:
    for each in fields(Traces):
        left, right = getattr(a, each.name), getattr(b, each.name)
        if isinstance(left, np.ndarray):
            np.testing.assert_array_equal(left, right)
        elif isinstance(left, Tokens):
            for name in (part.name for part in fields(Tokens)):
                mine, other = getattr(left, name), getattr(right, name)
                assert (mine is None) == (other is None)
                if mine is not None:
                    np.testing.assert_array_equal(mine, other)
        else:
            assert left == right, each.name

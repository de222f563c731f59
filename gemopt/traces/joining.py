"""Traces of one network, recorded in parts, become one; few steps become more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gemopt.exceptions import InputError, check_number
from gemopt.traces.tokens import join

if TYPE_CHECKING:
    from gemopt.traces.document import Traces


def concatenate(parts: Sequence[Traces]) -> Traces:
    """Join traces of one network along the steps; what only some parts recorded is left out."""
    first = parts[0]
    if len(parts) == 1:
        return first
    for name in ("layer_ids", "num_experts", "top_k", "num_hidden_layers", "model"):
        values = {getattr(part, name) for part in parts}
        if len(values) > 1:
            raise InputError(f"Traces.{name}", sorted(map(str, values)), "the parts must be of one network")
    names = tuple(dict.fromkeys(name for part in parts for name in part.task_names))
    joined: dict[str, Any] = {}
    if all(part.phase is not None for part in parts):
        joined["phase"] = np.concatenate([part.phase for part in parts if part.phase is not None])
    if all(part.task is not None for part in parts):
        maps = [np.array([*(names.index(n) for n in part.task_names), -1]) for part in parts]
        joined["task"] = np.concatenate([m[p.task] for m, p in zip(maps, parts, strict=True) if p.task is not None])
    times = [part.rank_us for part in parts if part.rank_us is not None]
    if len({each.shape[1] for each in times}) == 1 and len(times) == len(parts):
        joined["rank_us"] = np.concatenate(times)
    records = [part.tokens for part in parts if part.tokens is not None]
    for name in ("pair_counts", "transitions"):
        arrays = [getattr(part, name) for part in parts]
        joined[name] = None if any(a is None for a in arrays) else np.sum(arrays, axis=0, dtype=np.int64)
    return replace(
        first,
        counts=np.concatenate([part.counts for part in parts]),
        task_names=names,
        tokens=join(records, [part.num_steps for part in parts]) if len(records) == len(parts) else None,
        allow_idle=True,
        **{"phase": None, "task": None, "rank_us": None, **joined},
    )


def redrawn(traces: Traces, times: int = 1, *, seed: int = 0) -> Traces:
    """The steps, and `times` more of each with Poisson counts about its own: to fit on where there are few steps.

    A search fits the chances of some tens of steps, above all where latencies have tiles; redrawn, less. Not to score
    on. What was measured, or recorded of tokens, is left out.
    """
    check_number("times", times, "at least 1", least=1, whole=True)
    check_number("seed", seed, "a whole number of at least 0", whole=True)
    rng = np.random.default_rng(seed)
    plain = replace(traces, rank_us=None, pair_counts=None, transitions=None, tokens=None, allow_idle=True)
    drawn = [replace(plain, counts=rng.poisson(traces.counts), allow_idle=True) for _ in range(times)]
    return concatenate([traces, *drawn])

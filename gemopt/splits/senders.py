"""Who sends the assignments: what the nearest split needs, from token-level traces or assumed uniform."""

from __future__ import annotations

from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError
from gemopt.placement import Split
from gemopt.traces import Traces


class Senders(StrEnum):
    """`traces`: the rank that held each token, as recorded. `uniform`: every rank sends an equal part of each expert's
    assignments."""

    TRACES = "traces"
    UNIFORM = "uniform"

    @classmethod
    def of(cls, name: object) -> Senders:
        """The one of that name; None: from the traces."""
        try:
            return cls.TRACES if name is None else cls(str(name))
        except ValueError:
            raise InputError("senders", name, "one of " + ", ".join(cls)) from None

    @classmethod
    def asked_by(cls, name: object, split: Split) -> Senders:
        """As `of`; refused where it is given for a split that does not ask who sends."""
        if name is not None and split is not Split.NEAREST:
            raise InputError("senders", name, f"the {split.value} split does not ask who sends", "leave it out")
        return cls.of(name)


def check_senders(traces: Traces, num_ranks: int) -> None:
    """Refuse traces that do not say which of these ranks sends each token.

    Raises
    ------
    InputError
        They have no token-level record, no sender ranks, other ranks, or rank 0 alone, as one process records.
    """
    hint = "record tokens with their ranks, or say that all ranks send alike: --senders uniform"
    if traces.tokens is None:
        raise InputError("Traces.ids", None, "the nearest split needs the token-level record", hint)
    ranks = traces.tokens.source_rank
    if ranks is None:
        raise InputError("Traces.source_rank", None, "the nearest split needs the rank that sends each token", hint)
    wrong = ranks[(ranks < 0) | (ranks >= num_ranks)]
    if len(wrong):
        raise InputError("Traces.source_rank", int(wrong[0]), f"ranks 0 to {num_ranks - 1}", hint)
    if num_ranks > 1 and len(ranks) and not ranks.any():
        raise InputError("Traces.source_rank", "rank 0 alone", f"some token from other ranks of {num_ranks}", hint)


def senders_of(traces: Traces, layer: int, num_ranks: int) -> NDArray[np.int32]:
    """[T, G, E] assignments of each expert by the rank that sends them, in one layer. See `check_senders`."""
    tokens = traces.tokens
    assert tokens is not None and tokens.source_rank is not None
    shape = (traces.num_steps, num_ranks, traces.num_experts)
    ids_NK = tokens.ids[:, layer].astype(np.int64)
    keys_N = (tokens.step_of_token * num_ranks + tokens.source_rank) * traces.num_experts
    keys = (keys_N[:, None] + ids_NK)[ids_NK >= 0]
    found = np.bincount(keys, minlength=int(np.prod(shape))).reshape(shape).astype(np.int32)
    if (found.sum(axis=1) != traces.counts[:, layer]).any():
        raise InputError(
            "Traces.ids", f"layer {traces.layer_ids[layer]}", "the token-level record must make exactly the counts"
        )
    return found

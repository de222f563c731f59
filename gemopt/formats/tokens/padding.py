"""Tokens that seem to be padding, as they choose in all layers what the one beside them did."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from gemopt.formats.engine import IntArray
from gemopt.formats.findings import MANY_ALIKE

BEYOND_CHANCE = 4  # times as many as tokens amid others make one expect


def of_sequences(name: str, sequences: Iterable[IntArray]) -> list[str]:
    """Notes where tokens at the ends of sequences [N, L, K], or where they begin, choose what those beside them did."""
    tail = head = 0
    for ids in sequences:
        tail, head = tail + _tail(ids), head + _tail(ids[::-1])
    said = [
        (tail, f"at the ends of sequences {tail} tokens choose what the one before chose"),
        (head, f"where sequences begin {head} tokens choose what the next one chose"),
    ]
    return [f"{name}: {text}: padding?" for tokens, text in said if tokens >= MANY_ALIKE]


def of_steps(name: str, steps: Iterable[IntArray]) -> list[str]:
    """The note where tokens at the ends of steps [N, L, K] choose what the one before chose, as those of graphs do."""
    padded = amid = pairs = ends = 0
    for ids in steps:
        same = _same(ids)
        tail = _length(same)
        if tail < len(same):  # else of one token, or all alike
            padded, ends = padded + tail, ends + 1
            amid, pairs = amid + int(same[: len(same) - tail].sum()), pairs + len(same) - tail
    chance = ends * amid / max(pairs - amid, 1)
    told = f"{name}: at the ends of steps {padded} tokens choose what the one before chose: padding, as of graphs?"
    return [told] if padded >= MANY_ALIKE and padded > BEYOND_CHANCE * chance else []


def _same(ids: IntArray) -> NDArray[np.bool_]:
    """[N - 1] whether tokens [N, L, K] have the experts of the one before."""
    return np.asarray((ids[1:] == ids[:-1]).all(axis=(1, 2)) & (ids[1:] >= 0).any(axis=(1, 2)))


def _length(same: NDArray[np.bool_]) -> int:
    return int(np.logical_and.accumulate(same[::-1]).sum())


def _tail(ids: IntArray) -> int:
    """Tokens at the end of a sequence [N, L, K] that have the experts of the token before, not by chance."""
    tail = _length(_same(ids) & ids[1:].any(axis=(1, 2)))
    chance = ids.shape[1] < 2 and (tail < MANY_ALIKE or ids.shape[2] < 2)
    return 0 if chance or ids.min(initial=0) < 0 else tail

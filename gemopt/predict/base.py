"""What a predictor is, and what it may know of a batch before a layer routes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError
from gemopt.latency import FloatArray
from gemopt.traces import Tokens, Traces

IntArray = NDArray[Any]
HINTS = {"task": "tag the steps with tasks", "hidden": "gemopt trace --hidden, then gemopt.traces.with_hidden"}


@dataclass(frozen=True, eq=False)
class Batch:
    """What is known of a step's tokens before one MoE layer routes them.

    Attributes
    ----------
    layer, size, task
        The layer; how many assignments it is going to make; index of the step's task, -1 when unknown.
    previous
        [N, layer, K] experts that the N tokens chose in the layers before; None without a token-level record.
    position, token_ids
        [N] place of each token in its request, and its vocabulary id; None where not recorded.
    hidden
        [N, layer, D] float16 what entered the routers of the layers before; None where not recorded.
    """

    layer: int
    size: int
    task: int = -1
    previous: IntArray | None = None
    position: IntArray | None = None
    token_ids: IntArray | None = None
    hidden: NDArray[np.float16] | None = None


class Predictor(Protocol):
    """Learns from steps that are over; says where the tokens of the next one go.

    Attributes
    ----------
    name
        As in `PREDICTORS`.
    per_token
        Whether `predict` gives experts per token rather than one distribution.
    needs
        What must be recorded: `task`, `ids`, `request`, `token_ids`, `hidden`.
    bytes_per_token, bytes_per_batch
        What the prediction of a layer reads for each token, and once for all of them, when fitted.
    """

    name: str
    per_token: bool
    needs: tuple[str, ...]

    @property
    def bytes_per_token(self) -> float: ...

    @property
    def bytes_per_batch(self) -> float: ...

    def fit(self, history: Traces) -> None:
        """Learn from steps that are over; forgets what was learnt before."""

    def observe(self, counts_LE: IntArray, task: int = -1) -> None:
        """One more step is over."""

    def predict(self, context: Batch) -> FloatArray | IntArray:
        """[E] shares of the layer's assignments, or [N, K] experts of the batch's tokens."""


def require(traces: Traces, needs: tuple[str, ...], who: str) -> None:
    """`InputError` where the traces lack what a predictor needs."""
    for need in needs:
        holder = traces if need == "task" else traces.tokens
        if holder is None or getattr(holder, need) is None:
            hint = HINTS.get(need, "trace with the token-level record")
            raise InputError(f"Traces.{need}", None, f"the predictor {who} needs it", hint)


def shares_of(predicted: FloatArray | IntArray, per_token: bool, num_experts: int) -> FloatArray:
    """[E] shares of the assignments, from whichever a predictor gives."""
    if not per_token:
        return np.asarray(predicted, dtype=np.float64)
    experts = np.asarray(predicted).ravel()
    counted = np.bincount(experts[experts >= 0], minlength=num_experts)
    return np.asarray(counted / max(1, counted.sum()))


def positions(tokens: Tokens) -> IntArray | None:
    """[N] number of earlier tokens of the same request; None without requests."""
    if tokens.request is None:
        return None
    order = np.argsort(tokens.request, kind="stable")
    ranked = np.asarray(tokens.request)[order]
    first = np.searchsorted(ranked, ranked, side="left")
    found = np.empty(len(ranked), dtype=np.int64)
    found[order] = np.arange(len(ranked)) - first
    return found


class Steps:
    """The batches of recorded steps, layer by layer, without what a layer has yet to decide."""

    def __init__(self, traces: Traces) -> None:
        self.traces, self.tokens = traces, traces.tokens
        if self.tokens is not None:
            self.starts = np.searchsorted(self.tokens.step_of_token, np.arange(traces.num_steps + 1))
            self.position = positions(self.tokens)

    def batch(self, step: int, layer: int) -> Batch:
        """What is known of a step before a layer."""
        traces, tokens = self.traces, self.tokens
        task = -1 if traces.task is None else int(traces.task[step])
        size = int(traces.counts[step, layer].sum())
        if tokens is None:
            return Batch(layer, size, task)
        of = slice(int(self.starts[step]), int(self.starts[step + 1]))
        return known(tokens, self.position, of, layer, size, task)


def known(tokens: Tokens, position: IntArray | None, of: Any, layer: int, size: int, task: int) -> Batch:
    """What is known of some of the tokens before a layer."""
    return Batch(
        layer,
        size,
        task,
        previous=tokens.ids[of, :layer],
        position=None if position is None else position[of],
        token_ids=None if tokens.token_ids is None else tokens.token_ids[of],
        hidden=None if tokens.hidden is None else tokens.hidden[of, :layer],
    )

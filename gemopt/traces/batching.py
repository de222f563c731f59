"""Replay recorded requests as the batches of a serving engine: token-level ids in, traces out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from gemopt.documents.arrays import integer_array, plain_array
from gemopt.exceptions import InputError
from gemopt.traces.arrays import COUNT_LIMIT, count_assignments
from gemopt.traces.axes import MOST_LAYERS
from gemopt.traces.document import Phase, Traces
from gemopt.traces.files import IntArray
from gemopt.traces.tokens import Tokens


def from_tokens(
    ids: IntArray,
    request_starts: Sequence[int] | IntArray,
    *,
    num_experts: int,
    batch_size: int,
    phase: Phase = Phase.DECODE,
    request_tasks: Sequence[str] | None = None,
    prefill_tokens: int = 4096,
    **fields: Any,
) -> Traces:
    """Replay recorded requests as continuous batching.

    Parameters
    ----------
    ids
        [N, L, K] logical experts of every token, requests one after the other.
    request_starts
        [R] or [R + 1] index of the first token of each request (and N).
    batch_size
        Sequences in flight. Decode: each gives one token per step, and a finished one is replaced by the next
        request at once. Prefill: whole prompts, at most `batch_size` of them and `prefill_tokens` tokens per step.
    request_tasks
        Task of each request; a step is tagged when all of its tokens are of one task.

    Returns
    -------
    Traces
        With the token-level record kept.
    """
    ids = plain_array("ids", ids, "integers [tokens, layers, K]")
    if ids.ndim != 3 or ids.dtype.kind not in "iu" or not len(ids):
        raise InputError("ids", f"{ids.dtype} {ids.shape}", "integers [tokens, layers, K], at least one token")
    if ids.shape[1] > MOST_LAYERS:
        limit = f"integers [tokens, layers, K], at most {MOST_LAYERS} layers"
        raise InputError("ids", f"{ids.shape}", limit, "of [layers, tokens, K] give ids.swapaxes(0, 1)")
    _refuse_twice(ids)
    starts = integer_array(request_starts, name="request_starts", ndim=1, by_row=True)
    bounds = np.append(starts, len(ids)) if not len(starts) or starts[-1] != len(ids) else starts
    lengths = np.diff(bounds)
    if bounds[0] != 0 or not len(lengths) or (lengths <= 0).any():
        raise InputError("request_starts", bounds, f"increasing indices from 0 below {len(ids)}")
    for name, value in (("batch_size", batch_size), ("prefill_tokens", prefill_tokens)):
        if value < 1:
            raise InputError(name, value, "at least 1")
    if phase is Phase.MIXED:
        raise InputError("phase", "mixed", "prefill or decode")
    if request_tasks is not None and len(request_tasks) != len(lengths):
        raise InputError("request_tasks", len(request_tasks), f"one per request, {len(lengths)}")
    first_step = (_decode_steps if phase is Phase.DECODE else _prefill_steps)(lengths, batch_size, prefill_tokens)
    request = np.repeat(np.arange(len(lengths)), lengths)
    step = first_step[request]
    if phase is Phase.DECODE:
        step = step + np.arange(len(ids)) - bounds[:-1][request]
    order = np.argsort(step, kind="stable")
    tokens = Tokens(ids=ids[order], step_of_token=step[order], request=request[order])
    counts = count_assignments(tokens.ids, tokens.step_of_token, int(step.max()) + 1, num_experts)
    names = tuple(dict.fromkeys(request_tasks or ()))
    task = None
    if request_tasks is not None:
        of_token = np.array([names.index(name) for name in request_tasks])[tokens.request]
        task = _uniform_tag(of_token, tokens.step_of_token, len(counts))
    return Traces(
        counts=counts,
        top_k=ids.shape[2],
        phase=np.full(len(counts), int(phase)),
        task=task,
        task_names=names,
        tokens=tokens,
        **fields,
    )


def _refuse_twice(ids: IntArray) -> None:
    """Raise where a token chose an expert twice in a layer: no router does."""
    for i, j in combinations(range(ids.shape[2]), 2):
        twice = np.argwhere((ids[:, :, i] == ids[:, :, j]) & (ids[:, :, i] >= 0))
        if len(twice):
            token, layer = map(int, twice[0])
            found = f"expert {ids[token, layer, i]} twice for token {token} in layer {layer}"
            raise InputError("ids", found, "distinct experts [tokens, layers, K]", "leave out layers without experts")


def _decode_steps(lengths: IntArray, batch_size: int, _: int) -> IntArray:
    free = np.zeros(batch_size, dtype=np.int64)
    first = np.empty(len(lengths), dtype=np.int64)
    for request, length in enumerate(lengths):
        sequence = int(free.argmin())
        first[request] = free[sequence]
        free[sequence] += length
    return first


def _prefill_steps(lengths: IntArray, batch_size: int, prefill_tokens: int) -> IntArray:
    first = np.empty(len(lengths), dtype=np.int64)
    step, requests, tokens = 0, 0, 0
    for request, length in enumerate(lengths):
        if requests and (requests == batch_size or tokens + length > prefill_tokens):
            step, requests, tokens = step + 1, 0, 0
        first[request] = step
        requests, tokens = requests + 1, tokens + int(length)
    return first


def _uniform_tag(tag: IntArray, step: IntArray, num_steps: int) -> IntArray:
    low = np.full(num_steps, COUNT_LIMIT)
    high = np.full(num_steps, -1)
    np.minimum.at(low, step, tag)
    np.maximum.at(high, step, tag)
    return np.where(low == high, low, -1)

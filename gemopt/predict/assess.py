"""How good a predictor is on requests that it has not seen, and what it takes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError
from gemopt.latency import FloatArray
from gemopt.predict.base import IntArray, Predictor, known, positions, require, shares_of
from gemopt.traces import Tokens, Traces, of_tokens


@dataclass(frozen=True, eq=False)
class Assessment:
    """A predictor on held-out requests.

    Attributes
    ----------
    accuracy_L
        [L] share of a token's experts that were among the K named; of a distribution, its K largest shares are named.
    error_L
        [L] mean over the experts of |p^ - p| E (MoE-GPS), p the shares of all held-out tokens. 0.02 is two per cent.
    us_per_token
        Microseconds for each token and layer on this machine, as it was then.
    bytes_per_token, bytes_per_batch
        What the prediction of a layer reads for each token, and once for all of them.
    """

    name: str
    accuracy_L: FloatArray
    error_L: FloatArray
    us_per_token: float
    bytes_per_token: float
    bytes_per_batch: float

    def device_us(self, tokens: int, memory_gbps: float) -> float:
        """Microseconds of a layer on a device whose memory gives so many GB/s; operations are left out."""
        return (self.bytes_per_batch + tokens * self.bytes_per_token) / (memory_gbps * 1e3)


def assess(predictor: Predictor, traces: Traces, *, holdout: float = 0.25, seed: int = 0) -> Assessment:
    """Fit on some of the requests, predict the tokens of the others.

    Raises
    ------
    InputError
        Without requests and the token-level record, or with too few requests to hold any out.
    """
    require(traces, ("ids", "request"), predictor.name)
    tokens = traces.tokens
    assert tokens is not None
    held_N = held_out(tokens, holdout, seed)
    predictor.fit(of_tokens(traces, ~held_N))
    position, task_N = positions(tokens), np.full(len(tokens.ids), -1)
    if traces.task is not None:
        task_N = np.asarray(traces.task)[tokens.step_of_token]
    accuracy_L, error_L = np.zeros(traces.num_layers), np.zeros(traces.num_layers)
    spent = 0.0
    for layer in range(traces.num_layers):
        hits, named_E, truth_E = 0, np.zeros(traces.num_experts), np.zeros(traces.num_experts)
        for task in np.unique(task_N[held_N]).tolist():
            chosen = held_N & (task_N == task)
            truth_NK = tokens.ids[chosen, layer]
            context = known(tokens, position, chosen, layer, int((truth_NK >= 0).sum()), task)
            begun = time.perf_counter()
            predicted = predictor.predict(context)
            spent += time.perf_counter() - begun
            experts_NK = _experts(predicted, predictor.per_token, truth_NK.shape)
            hits += int((truth_NK[:, :, None] == experts_NK[:, None, :]).any(axis=2).sum())
            named_E += context.size * shares_of(predicted, predictor.per_token, traces.num_experts)
            truth_E += np.bincount(truth_NK[truth_NK >= 0], minlength=traces.num_experts)
        accuracy_L[layer] = hits / truth_E.sum()
        error_L[layer] = np.abs(named_E / named_E.sum() - truth_E / truth_E.sum()).sum()
    seconds = spent / (held_N.sum() * traces.num_layers)
    read = (predictor.bytes_per_token, predictor.bytes_per_batch)
    return Assessment(predictor.name, accuracy_L, error_L, seconds * 1e6, *read)


def held_out(tokens: Tokens, share: float, seed: int) -> NDArray[np.bool_]:
    """[N] whether a token's request is held out: whole requests, drawn by the seed."""
    request_N: Any = tokens.request
    requests = np.unique(request_N)
    count = round(share * len(requests))
    if not 0 < count < len(requests):
        limit = f"a share that holds out some, but not all, of {len(requests)} requests"
        raise InputError("holdout", share, limit, "traces with more requests")
    drawn = np.random.default_rng(seed).permutation(requests)[:count]
    return np.asarray(np.isin(request_N, drawn))


def _experts(predicted: FloatArray | IntArray, per_token: bool, shape: tuple[int, ...]) -> IntArray:
    if per_token:
        return np.asarray(predicted)
    return np.tile(np.argsort(-predicted, kind="stable")[: shape[1]], (shape[0], 1))

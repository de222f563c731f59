"""Token-to-expert predictors: the experts of every token, before the layer routes it.

All score every expert and name the K best: how often it was chosen, by all tokens or by those that are alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gemopt.exceptions import InputError
from gemopt.latency import FloatArray
from gemopt.predict.base import Batch, IntArray, positions, require
from gemopt.traces import Traces
from gemopt.traces.arrays import one_hot

PRIOR = 4.0  # tokens that the overall frequencies are worth beside those of alike tokens
DEPTH = 2  # layers before that are looked at
BYTES = 4.0
BLOCK = 8192


class Frequency:
    """The K experts that tokens chose most often, for every token."""

    per_token = True
    needs: tuple[str, ...] = ("ids",)
    experts: int
    top_k: int

    def __init__(self, name: str = "frequency") -> None:
        self.name = name

    @property
    def bytes_per_token(self) -> float:
        """Nothing depends on the token."""
        return 0.0

    @property
    def bytes_per_batch(self) -> float:
        """Nothing is shared by all tokens."""
        return 0.0

    def fit(self, history: Traces) -> None:
        """Count."""
        require(history, self.needs, self.name)
        assert history.tokens is not None
        if not len(history.tokens.ids):
            raise InputError("history", "no token", f"the predictor {self.name} learns from tokens")
        self.experts, self.top_k = history.num_experts, history.tokens.ids.shape[2]
        chosen_LE = np.asarray(history.counts).sum(axis=0, dtype=np.float64) + 1e-9
        self.base_LE = chosen_LE / chosen_LE.sum(axis=1, keepdims=True)
        self.learn(history)

    def learn(self, history: Traces) -> None:
        """What else there is to count."""

    def observe(self, counts_LE: IntArray, task: int = -1) -> None:
        """Counts do not tell which token chose what."""

    def predict(self, context: Batch) -> IntArray:
        """[N, K] experts, the likeliest first."""
        return best(self.scores(context), self.top_k)

    def scores(self, context: Batch) -> FloatArray:
        """[N, E] the higher, the likelier."""
        assert context.previous is not None
        return np.broadcast_to(self.base_LE[context.layer], (len(context.previous), self.experts))


def best(scores_NE: FloatArray, top_k: int) -> IntArray:
    """[N, K] the highest scores of each row, highest first; of equal ones the lower expert."""
    return np.argsort(-scores_NE, axis=1, kind="stable")[:, :top_k]


class Alike(Frequency):
    """What tokens with the same key chose, shrunk to what all tokens chose; an unknown key is as any token."""

    def __init__(self, name: str, key: Callable[[IntArray], IntArray], field: str) -> None:
        super().__init__(name)
        self.key, self.field = key, field
        self.needs = ("ids", "request" if field == "position" else field)

    @property
    def bytes_per_token(self) -> float:
        """One row of scores."""
        return BYTES * self.experts

    def learn(self, history: Traces) -> None:
        """[L, keys, E] choices."""
        tokens = history.tokens
        assert tokens is not None
        found: Any = positions(tokens) if self.field == "position" else getattr(tokens, self.field)
        keys_N = self.key(found)
        self.keys, row_N = np.unique(keys_N, return_inverse=True)
        shape = (len(self.keys), self.experts)
        self.chosen_LKE = np.empty((history.num_layers, *shape), dtype=np.float32)
        for layer in range(history.num_layers):
            ids_NK = tokens.ids[:, layer]
            flat = (row_N[:, None] * self.experts + ids_NK)[ids_NK >= 0]
            self.chosen_LKE[layer] = np.bincount(flat, minlength=shape[0] * shape[1]).reshape(shape)

    def scores(self, context: Batch) -> FloatArray:
        """[N, E] counts of alike tokens, with the prior."""
        keys_N = self.key(np.asarray(getattr(context, self.field)))
        row_N = np.minimum(np.searchsorted(self.keys, keys_N), len(self.keys) - 1)
        seen_N = self.keys[row_N] == keys_N
        prior_E = PRIOR * self.top_k * self.base_LE[context.layer]
        return np.asarray(np.where(seen_N[:, None], self.chosen_LKE[context.layer, row_N], 0.0) + prior_E)


def octave(position_N: IntArray) -> IntArray:
    """0, 1, 2-3, 4-7, 8-15, ...: the place in a request, coarser the later."""
    return np.asarray(np.ceil(np.log2(np.asarray(position_N, dtype=np.float64) + 1)), dtype=np.int64)


class Previous(Frequency):
    """The experts of the layers just before, chosen and not chosen, taken as independent signs (naive Bayes)."""

    def __init__(self, name: str = "previous", *, depth: int = DEPTH) -> None:
        super().__init__(name)
        self.depth = depth

    @property
    def bytes_per_token(self) -> float:
        """A row of scores for each expert of the layers before."""
        return BYTES * self.experts * self.top_k * self.depth

    def learn(self, history: Traces) -> None:
        """For each pair of layers, [E, E] what having chosen an expert before adds to the log-odds of one now."""
        assert history.tokens is not None
        ids, layers, experts = history.tokens.ids, history.num_layers, self.experts
        pairs = [(before, layer) for layer in range(layers) for before in self._before(layer)]
        joint = {pair: np.zeros((experts, experts), dtype=np.float64) for pair in pairs}
        chosen_LE = np.zeros((layers, experts))
        for start in range(0, len(ids), BLOCK):
            hot = [one_hot(ids[start : start + BLOCK, layer], experts) for layer in range(layers)]
            chosen_LE += np.stack([each.sum(axis=0) for each in hot])
            for before, layer in pairs:
                joint[before, layer] += hot[before].T @ hot[layer]
        rate_LE = (chosen_LE + 0.5) / (len(ids) + 1.0)  # of the tokens
        self.log_LE = np.log(rate_LE / (1 - rate_LE))
        self.weight: dict[tuple[int, int], Any] = {}
        for before, layer in pairs:
            prior_E1 = PRIOR * rate_LE[before][:, None]
            with_EE = (joint[before, layer] + prior_E1) / (chosen_LE[layer] + PRIOR)
            without_EE = chosen_LE[before][:, None] - joint[before, layer]
            without_EE = (without_EE + prior_E1) / (len(ids) - chosen_LE[layer] + PRIOR)
            absent_EE = np.log((1 - with_EE) / (1 - without_EE))
            self.weight[before, layer] = np.log(with_EE / without_EE) - absent_EE
            self.log_LE[layer] += absent_EE.sum(axis=0) / len(self._before(layer))

    def _before(self, layer: int) -> range:
        return range(max(0, layer - self.depth), layer)

    def scores(self, context: Batch) -> FloatArray:
        """[N, E] log-odds, the layers before weighing as one."""
        assert context.previous is not None
        layer = context.layer
        total_NE = np.tile(self.log_LE[layer], (len(context.previous), 1))
        for before in self._before(layer):
            hot_NE = one_hot(context.previous[:, before], self.experts)
            total_NE += hot_NE @ self.weight[before, layer] / len(self._before(layer))
        return total_NE

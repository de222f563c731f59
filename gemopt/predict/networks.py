"""Small networks on hidden states: the experts of every token from what entered the routers of earlier layers.

To predict MoE layer l they read what entered the routers up to layer l - `ahead`, and nothing later: a prediction is
there when layer l - `ahead` routes, so that copying has until layer l does. The first `ahead` layers have nothing to
read and get the most frequent experts. Trained on one CPU thread: the same history and seed give the same network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from gemopt.exceptions import InputError, missing

try:
    import torch
    from torch import Tensor, nn
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

from gemopt.latency import FloatArray
from gemopt.predict.base import Batch
from gemopt.predict.tokens import Frequency
from gemopt.traces import Traces
from gemopt.traces.arrays import one_hot

WIDTHS = (128, 64)  # between hidden state and experts, as in MoE-GPS (arXiv:2506.07366)
STATE = 64  # of the LSTM
EPOCHS, BATCH, RATE, DECAY = 10, 128, 1e-3, 1e-2
FLOAT, HALF = 4.0, 2.0  # bytes


class _Network(Frequency, ABC):
    """What both have in common: what may be read, training, naming the K best."""

    needs = ("ids", "hidden")
    net: Any
    width: int

    def __init__(self, name: str = "", *, ahead: int = 1, seed: int = 0) -> None:
        super().__init__(name or type(self).__name__.lower())
        if ahead < 1:
            raise InputError("ahead", ahead, "at least 1 layer: what enters a router is known only when it chooses")
        self.ahead, self.seed = ahead, seed

    @property
    def bytes_per_token(self) -> float:
        """A hidden state."""
        return HALF * self.width

    def learn(self, history: Traces) -> None:
        """Train on all tokens: cross-entropy, a token's experts equally likely."""
        assert history.tokens is not None and history.tokens.hidden is not None
        hidden_NLD, ids_NLK = history.tokens.hidden, history.tokens.ids
        self.width, read = hidden_NLD.shape[2], history.num_layers - self.ahead  # layers that are read
        if read < 1:
            raise InputError("ahead", self.ahead, f"fewer than the {history.num_layers} layers of the traces")
        states = [torch.from_numpy(hidden_NLD[:, layer].astype(np.float32)) for layer in range(read)]
        self.scale = [(each.mean(dim=0), each.std(dim=0, correction=0) + 1e-6) for each in states]
        states = [self._scaled(each, layer) for layer, each in enumerate(states)]
        labels = [_labels(ids_NLK[:, layer + self.ahead], self.experts) for layer in range(read)]
        with _alone(self.seed):
            self.train(states, labels)

    @abstractmethod
    def train(self, states: list[Tensor], labels: list[Tensor]) -> None:
        """Fit `net` to states [N, D] and labels [N, E], a pair for each layer that is read."""

    @abstractmethod
    def logits(self, states: list[Tensor]) -> Tensor:
        """[N, E] from the states [N, D] of the layers that may be read."""

    def scores(self, context: Batch) -> FloatArray:
        """[N, E] logits; frequencies where there is nothing to read."""
        read = context.layer - self.ahead + 1
        if read < 1:
            return super().scores(context)
        hidden_NLD = context.hidden
        assert hidden_NLD is not None
        states = [self._scaled(torch.from_numpy(hidden_NLD[:, i].astype(np.float32)), i) for i in range(read)]
        with torch.no_grad():
            return np.asarray(self.logits(states).numpy(), dtype=np.float64)

    def _scaled(self, state_ND: Tensor, layer: int) -> Tensor:
        mean_D, std_D = self.scale[layer]
        return (state_ND - mean_D) / std_D


class Mlp(_Network):
    """A multilayer perceptron for each layer, on what entered the router `ahead` layers before."""

    @property
    def bytes_per_batch(self) -> float:
        """The weights for a layer."""
        return FLOAT * sum(map(_size, self.net[:1]))

    def train(self, states: list[Tensor], labels: list[Tensor]) -> None:
        """One layer after the other."""
        a, b = WIDTHS
        self.net = [
            nn.Sequential(nn.Linear(self.width, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, self.experts))
            for _ in states
        ]
        for net, state_ND, labels_NE in zip(self.net, states, labels, strict=True):
            _descend(net, len(state_ND), lambda at, n=net, x=state_ND, y=labels_NE: _loss(n(x[at]), y[at]))  # type: ignore[misc]

    def logits(self, states: list[Tensor]) -> Tensor:
        """Of the last state alone."""
        return self.net[len(states) - 1](states[-1])  # type: ignore[no-any-return]


class Lstm(_Network):
    """An LSTM that goes through the layers with each token; one for all layers, with their own ways in and out."""

    @property
    def bytes_per_token(self) -> float:
        """A hidden state, and what is remembered of the layers before."""
        return super().bytes_per_token + 2 * FLOAT * STATE

    @property
    def bytes_per_batch(self) -> float:
        """The weights for a layer."""
        return FLOAT * (_size(self.net["cell"]) + sum(_size(self.net[part][0]) for part in ("into", "out")))

    def train(self, states: list[Tensor], labels: list[Tensor]) -> None:
        """All layers together."""
        into = nn.ModuleList(nn.Linear(self.width, STATE) for _ in states)
        out = nn.ModuleList(nn.Linear(STATE, self.experts) for _ in states)
        self.net = nn.ModuleDict({"into": into, "cell": nn.LSTMCell(STATE, STATE), "out": out})

        def loss(at: Tensor) -> Tensor:
            found = self._steps([each[at] for each in states])
            return torch.stack([_loss(way(h), y[at]) for way, h, y in zip(out, found, labels, strict=True)]).sum()

        _descend(self.net, len(labels[0]), loss)

    def logits(self, states: list[Tensor]) -> Tensor:
        """Through all states anew; whoever keeps what is remembered takes one step a layer."""
        return self.net["out"][len(states) - 1](self._steps(states)[-1])  # type: ignore[no-any-return]

    def _steps(self, states: list[Tensor]) -> list[Tensor]:
        """[N, STATE] after each of the layers."""
        memory, found = None, []
        for way, state_ND in zip(self.net["into"], states, strict=False):
            memory = self.net["cell"](way(state_ND), memory)
            found.append(memory[0])
        return found


def _descend(net: nn.Module, tokens: int, loss: Callable[[Tensor], Tensor]) -> None:
    """Minimise the loss of batches of tokens, given by their indices."""
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY)
    for _ in range(EPOCHS):
        for at in torch.randperm(tokens).split(BATCH):  # type: ignore[no-untyped-call]
            optimiser.zero_grad()
            loss(at).backward()  # type: ignore[no-untyped-call]
            optimiser.step()


def _loss(logits_NE: Tensor, labels_NE: Tensor) -> Tensor:
    return -(labels_NE * logits_NE.log_softmax(dim=1)).sum(dim=1).mean()


def _labels(ids_NK: Any, experts: int) -> Tensor:
    """[N, E] the share of each expert in a token's choice; zeros for a token without experts."""
    hot_NE = one_hot(ids_NK, experts)
    return torch.from_numpy(hot_NE / np.maximum(hot_NE.sum(axis=1, keepdims=True), 1))


def _size(net: nn.Module) -> int:
    return sum(weight.numel() for weight in net.parameters())


@contextmanager
def _alone(seed: int) -> Iterator[None]:
    """One thread and a seed of its own; as it was afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)

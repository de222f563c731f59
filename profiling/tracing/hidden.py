"""Hidden states for the tracer: which requests to keep them of, and keeping them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemopt.exceptions import InputError, missing

try:
    import torch
    from torch import Tensor, nn
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

from gemopt.models import find_moe_layers


@dataclass(frozen=True)
class HiddenSample:
    """Requests, numbered as they come, whose hidden states are kept, and how many tokens they have at most."""

    requests: frozenset[int]
    tokens: int

    @classmethod
    def draw(cls, sizes: Sequence[int], most: int, seed: int) -> HiddenSample:
        """Whole requests of at most `sizes` tokens each, in random order while they have at most `most` together."""
        order = np.random.default_rng(seed).permutation(len(sizes))
        total = np.cumsum(np.asarray(sizes)[order])
        count = int(np.searchsorted(total, most, side="right"))
        if not count:
            raise InputError("hidden", most, f"at least {int(total[0])} tokens: a drawn request can have so many")
        return cls(frozenset(order[:count].tolist()), int(total[count - 1]))


def hidden_bytes(model: nn.Module, tokens: int) -> int:
    """Bytes of the hidden states of so many tokens, of all MoE layers."""
    layers = find_moe_layers(model)
    return tokens * len(layers) * layers[0].hidden_size * 2


@dataclass(slots=True)
class Picked:
    """Of one forward: the tokens that are kept, by their place in it, and what entered the routers, [L, n, D]."""

    at: Tensor
    states: Tensor

    def take(self, layer: int, states: Tensor) -> None:
        """Copy what entered the router of a layer, [..., D] of all tokens, to the host."""
        kept = states.reshape(-1, states.shape[-1])[self.at.to(states.device)].to("cpu", torch.float16)
        if not bool(kept.isfinite().all()):
            raise InputError(f"hidden states of MoE layer {layer}", "infinite or NaN", "within +-65504: float16")
        self.states[layer] = kept


class Hidden:
    """Hidden states of the drawn requests, in memory until the end."""

    def __init__(self, sample: HiddenSample, num_layers: int, hidden_size: int) -> None:
        self.sample, self._shape = sample, (num_layers, hidden_size)
        self._rows: list[np.ndarray] = []
        self._states: list[np.ndarray] = []
        self._tokens = self._seen = 0

    def pick(self, real_BS: Tensor, first_request: int) -> Picked | None:
        """What to keep of a forward of B requests from `first_request` on; None: nothing."""
        rows = [row for row in range(len(real_BS)) if first_request + row in self.sample.requests]
        if not rows:
            return None
        chosen_BS = torch.zeros(real_BS.shape, dtype=torch.bool)
        chosen_BS[rows] = real_BS.cpu()[rows]
        at = chosen_BS.flatten().nonzero().squeeze(1)
        if self._tokens + len(at) > self.sample.tokens:
            limit = f"at most {self.sample.tokens} tokens of the drawn requests"
            raise InputError("hidden", f"{self._tokens + len(at)} tokens", limit, "a larger HiddenSample.tokens")
        return Picked(at, torch.empty((self._shape[0], len(at), self._shape[1]), dtype=torch.float16))

    def count(self, picked: Picked | None) -> None:
        """A forward is over and will be added."""
        self._tokens += 0 if picked is None else len(picked.at)

    def add(self, parts: Sequence[tuple[int, Picked | None]], keep_N: Tensor) -> None:
        """Forwards that begin at these of N tokens, of which `keep_N` go into the token-level record."""
        keep_N = keep_N.cpu()
        row_N = keep_N.cumsum(0) - 1 + self._seen
        self._seen += int(keep_N.sum())
        for begin, picked in parts:
            if picked is None:
                continue
            kept = keep_N[begin + picked.at]
            self._rows.append(row_N[begin + picked.at][kept].numpy())
            self._states.append(picked.states[:, kept].transpose(0, 1).contiguous().numpy())

    def arrays(self) -> tuple[Any, Any]:
        """([n] rows of the token-level record, [n, L, D] float16)."""
        if not self._rows:
            return np.empty(0, np.int64), np.empty((0, *self._shape), np.float16)
        return np.concatenate(self._rows), np.concatenate(self._states)

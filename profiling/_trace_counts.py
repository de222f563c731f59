"""Counting for the tracer: what goes into its next file."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemopt.traces import Phase, Tokens, Traces


class Part:
    """What goes into the next file: counts by step, pairs and transitions summed, tokens when kept."""

    def __init__(self) -> None:
        self.num_steps = 0
        self._counts: list[np.ndarray] = []
        self._tags: list[tuple[int, int]] = []
        self._pairs: Tensor | None = None
        self._transitions: Tensor | None = None
        self._tokens: list[dict[str, np.ndarray | None]] = []

    def add(
        self, ids_LNK: Tensor, step_N: Tensor, tags: list[tuple[Phase, int]], num_experts: int, pairs: bool
    ) -> None:
        """Add steps; ids from `num_experts` on are identity experts and make no assignment."""
        ids, E = ids_LNK.long().clamp(max=num_experts), num_experts + 1  # one bin more, for those
        L, T = len(ids), len(tags)
        keys = (step_N[:, None] * E + ids).flatten(1)
        counts = torch.stack([torch.bincount(layer, minlength=T * E) for layer in keys]).view(L, T, E)
        self._counts.append(counts[..., :num_experts].transpose(0, 1).to("cpu", torch.int32).numpy())
        self._tags += [(int(phase), task) for phase, task in tags]
        self.num_steps += T
        if pairs:
            within = [_joint(layer, layer, E) for layer in ids]
            between = [_joint(ids[i], ids[i + 1], E) for i in range(L - 1)]
            self._pairs = _plus(self._pairs, within)
            self._transitions = _plus(self._transitions, between)

    def keep(
        self, ids_LNK: Tensor, step_N: Tensor, words: Tensor | None, requests: Tensor, rank: int, num_experts: int
    ) -> None:
        """Keep the token-level record of the steps just added."""
        ids = torch.where(ids_LNK < num_experts, ids_LNK, -1).transpose(0, 1)
        first = self.num_steps - self._counts[-1].shape[0]
        self._tokens.append(
            {
                "ids": ids.to("cpu", torch.int16).numpy(),
                "step_of_token": step_N.cpu().numpy() + first,
                "source_rank": np.full(len(step_N), rank, dtype=np.int32),
                "token_ids": None if words is None else words.to("cpu", torch.int32).numpy(),
                "request": requests.to("cpu", torch.int32).numpy(),
            }
        )

    def traces(self, **metadata: Any) -> Traces:
        phase, task = np.array(self._tags).T
        tokens = None
        if self._tokens:
            arrays: dict[str, Any] = {}
            for name in self._tokens[0]:
                values = [token[name] for token in self._tokens]
                known = [value for value in values if value is not None]
                arrays[name] = np.concatenate(known) if len(known) == len(values) else None
            tokens = Tokens(**arrays)
        return Traces(
            counts=np.concatenate(self._counts),
            phase=phase,
            task=task,
            pair_counts=None if self._pairs is None else self._pairs[:, :-1, :-1].cpu().numpy(),
            transitions=None if self._transitions is None else self._transitions[:, :-1, :-1].cpu().numpy(),
            tokens=tokens,
            **metadata,
        )


def _joint(a_NK: Tensor, b_NK: Tensor, size: int) -> Tensor:
    """[size, size] tokens with expert i in `a` and expert j in `b`."""
    keys = (a_NK[:, :, None] * size + b_NK[:, None, :]).flatten()
    return torch.bincount(keys, minlength=size * size).view(size, size)


def _plus(total: Tensor | None, parts: list[Tensor]) -> Tensor | None:
    if not parts:
        return total
    stacked = torch.stack(parts)
    return stacked if total is None else total.add_(stacked)

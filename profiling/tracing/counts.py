"""Counting for the tracer: what goes into its next file.

Expert ids are held as [L, K, N]: with the tokens innermost, the arithmetic on them runs over long rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gemopt.exceptions import missing

try:
    import torch
    from torch import Tensor
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

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
        self, ids_LKN: Tensor, step_N: Tensor, tags: list[tuple[Phase, int]], num_experts: int, pairs: bool
    ) -> None:
        """Add steps; ids from `num_experts` on are identity experts and make no assignment."""
        ids, E = ids_LKN.clamp(max=num_experts), num_experts + 1  # one bin more, for those
        L, T = len(ids), len(tags)
        keys = step_N.int() * E + ids
        counts = torch.stack([torch.bincount(layer.flatten(), minlength=T * E) for layer in keys]).view(L, T, E)
        self._counts.append(counts[..., :num_experts].transpose(0, 1).to("cpu", torch.int32).numpy())
        self._tags += [(int(phase), task) for phase, task in tags]
        self.num_steps += T
        if pairs:
            totals = counts.sum(dim=1)
            self._pairs = _plus(self._pairs, [_within(*layer) for layer in zip(ids, totals, strict=True)])
            self._transitions = _plus(self._transitions, [_joint(ids[i], ids[i + 1], E) for i in range(L - 1)])

    def keep(
        self,
        ids_LKN: Tensor,
        step_N: Tensor,
        *,
        sender: int | None,
        num_experts: int,
        request: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> None:
        """Keep the token-level record of the steps just added."""
        ids = torch.where(ids_LKN < num_experts, ids_LKN, -1).permute(2, 0, 1)
        first = self.num_steps - self._counts[-1].shape[0]
        self._tokens.append(
            {
                "ids": ids.to("cpu", torch.int16).contiguous().numpy(),
                "step_of_token": step_N.cpu().numpy() + first,
                "source_rank": None if sender is None else np.full(len(step_N), sender, dtype=np.int32),
                "token_ids": None if token_ids is None else token_ids.to("cpu", torch.int32).numpy(),
                "request": None if request is None else request.to("cpu", torch.int32).numpy(),
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
            allow_idle=True,  # a part of a trace
            **metadata,
        )


def _within(ids_KN: Tensor, totals_E: Tensor) -> Tensor:
    """[E, E] tokens that chose both experts; diagonal: tokens that chose the expert."""
    first, second = torch.triu_indices(len(ids_KN), len(ids_KN), 1, device=ids_KN.device)
    size = len(totals_E)
    pairs = torch.bincount((ids_KN[first] * size + ids_KN[second]).flatten(), minlength=size * size).view(size, size)
    return pairs + pairs.T + totals_E.diag()


def _joint(a_KN: Tensor, b_KN: Tensor, size: int) -> Tensor:
    """[size, size] tokens with expert i in `a` and expert j in `b`."""
    return torch.bincount((a_KN[:, None] * size + b_KN).flatten(), minlength=size * size).view(size, size)


def _plus(total: Tensor | None, parts: list[Tensor]) -> Tensor | None:
    if not parts:
        return total
    stacked = torch.stack(parts)
    return stacked if total is None else total.add_(stacked)

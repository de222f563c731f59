"""Forwards that a tracer has seen and not yet counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gemopt.exceptions import InputError, missing

try:
    import torch
    from torch import Tensor
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

from gemopt.profiling._trace_hidden import Picked
from gemopt.traces import Phase


@dataclass(slots=True)
class Step:
    """One forward: where its tokens lie in the buffers, how many each router saw, and where it writes ids_NK.

    `request`: number of its first row.
    """

    shape: tuple[int, int]
    phase: Phase
    request: int
    task: int
    begin: int
    end: int
    has_token_ids: bool
    seen: list[int | None]
    targets: tuple[Tensor, ...]
    picked: Picked | None


class Pending:
    """Tokens of the steps not yet counted: expert ids_LCK, which are real (no padding), vocabulary ids."""

    def __init__(self, num_layers: int, top_k: int, capacity: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # a tensor made under inference mode could not be written to outside of it
            self.ids_LCK = torch.empty((num_layers, capacity, top_k), dtype=torch.int32, device=device)
            self.real_C = torch.empty(capacity, dtype=torch.bool, device=device)
            self.token_ids_C = torch.empty(capacity, dtype=torch.int64, device=device)
        self.capacity = capacity
        self.steps: list[Step] = []

    @property
    def used(self) -> int:
        return self.steps[-1].end if self.steps else 0


def requests_of(step: Step, device: torch.device) -> Tensor:
    """[B * S] request of each token: every row of a batch that starts with an empty cache is a new one."""
    rows, length = step.shape
    return torch.arange(rows, device=device).repeat_interleave(length) + step.request


def mark_real(real_BS: Tensor, mask: Any) -> None:
    """Mark the real tokens of this forward; the mask also covers cached ones. None: no padding."""
    if mask is None:
        real_BS.fill_(True)
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise InputError(
            "attention_mask",
            type(mask).__name__ if not isinstance(mask, Tensor) else f"{mask.ndim} dimensions",
            "a mask [batch, tokens] is needed to leave out padding",
            "generate with the dynamic cache",
        )
    real_BS.copy_(mask[:, -real_BS.shape[1] :])

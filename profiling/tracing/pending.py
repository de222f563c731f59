"""Forwards that a tracer has seen and not yet counted."""

from __future__ import annotations

from dataclasses import dataclass

from gemopt.exceptions import missing

try:
    import torch
    from torch import Tensor
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

from gemopt.profiling.tracing.hidden import Picked
from gemopt.profiling.tracing.streams import Stream
from gemopt.traces import Phase


@dataclass(slots=True)
class Step:
    """One forward: where its tokens lie in the buffers, how many each router saw, and where it writes ids_NK."""

    shape: tuple[int, int]
    phase: Phase
    stream: Stream
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
    return torch.arange(rows, device=device).repeat_interleave(length) + step.stream.request

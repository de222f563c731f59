"""Whether the experts compute what their router chose: a block of one's own may choose anew, or drop some."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gemopt.exceptions import InputError, missing

try:
    import torch
    from torch import Tensor
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

from gemopt.models import MoeLayer
from gemopt.profiling.tracing.pending import Pending, Step


def check_heeded(layer: MoeLayer, index: int, step: Step, pending: Pending, given: Iterable[Any]) -> None:
    """Refuse a block whose experts are given other experts' numbers than its router returned, in any order.

    index: of the layer among those of the step, which keeps what routers returned. given: what the experts are called
    with; experts that get no numbers (but masks of them, or all of them compute all tokens) cannot be looked at.
    """
    chosen_NK, real_N = step.targets[index], pending.real_C[step.begin : step.end]
    tokens, top_k = chosen_NK.shape
    tensors = (plain(value) for value in given if isinstance(value, Tensor))
    ids = next((value for value in tensors if _may_be_ids(value, tokens, top_k)), None)
    if ids is None or step.seen[index] != tokens:
        return
    alike = ids.numel() == chosen_NK.numel()
    if alike:
        own, given_NK = (each[real_N].sort(dim=1).values for each in (chosen_NK, ids.reshape(chosen_NK.shape)))
        alike = torch.equal(own, given_NK.to(own.dtype))
    if not alike:
        raise InputError(
            layer.path,
            f"{type(layer.block).__name__} gives its experts other numbers than {type(layer.router).__name__} chose",
            "what is counted is what routers return",
            "choose, and drop, in the router's forward",
        )


def _may_be_ids(value: Tensor, tokens: int, top_k: int) -> bool:
    whole = not value.is_floating_point() and value.dtype is not torch.bool
    return whole and value.ndim >= 2 and value.shape[-1] <= top_k and value.numel() <= tokens * value.shape[-1]


def plain(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor

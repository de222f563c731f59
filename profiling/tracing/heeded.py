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


def check_heeded(layer: MoeLayer, chosen_NK: Tensor, given: Iterable[Any]) -> None:
    """Refuse a block whose experts are given other experts' numbers than its router returned.

    chosen_NK: what the router returned. given: what the experts are called with; experts that get no numbers (all of
    them compute all tokens) cannot be looked at.
    """
    tensors = (plain(value) for value in given if isinstance(value, Tensor))
    ids = next((value for value in tensors if value.ndim >= 2 and not value.is_floating_point()), None)
    if ids is None or torch.compiler.is_compiling():
        return
    if ids.numel() != chosen_NK.numel() or not torch.equal(ids.reshape(chosen_NK.shape).to(chosen_NK.dtype), chosen_NK):
        raise InputError(
            layer.path,
            f"{type(layer.block).__name__} gives its experts other numbers than {type(layer.router).__name__} chose",
            "what is counted is what routers return",
            "choose, and drop, in the router's forward",
        )


def plain(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor

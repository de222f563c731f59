"""Which forwards of a traced model go on from one another: those that share a cache; where they end, on which ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from gemopt.exceptions import InputError, missing

try:
    import torch
    from torch import Tensor, nn
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None


@dataclass(slots=True)
class Stream:
    """A batch of sequences, forward after forward.

    Attributes
    ----------
    request
        Number of its first row.
    rows
        B.
    alive
        [B] which rows have not ended; None: all.
    """

    request: int
    rows: int
    alive: Tensor | None = None


class Streams:
    """The batches that a model computes, in turn or not, told apart by their caches."""

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[Any, Stream] = WeakKeyDictionary()
        self._next = 0

    def find(self, cache: Any, rows: int, cached: int) -> Stream:
        """The batch that a forward of so many rows goes on with; a new one on an empty or unknown cache."""
        known = self._of.get(cache) if cached else None
        return known if known is not None and known.rows == rows else Stream(self._next, rows)

    def keep(self, stream: Stream, cache: Any) -> None:
        """A forward of this batch is over, and left its keys and values in this cache."""
        self._next = max(self._next, stream.request + stream.rows)
        if cache is not None:
            self._of[cache] = stream


CACHES = ("past_key_values", "cache", "cache_params")  # in transformers until 5.23, since 5.24, without attention


def cache_in(given: Mapping[str, Any]) -> tuple[Any, int]:
    """(the cache a decoder was called with, tokens per sequence in it), by its name or else by what it is.

    Layers of a hybrid network that keep a state only count none.

    Raises
    ------
    InputError
        For a cache that does not tell: padding and next tokens could not be told from others.
    """
    named = [name for name in CACHES if given.get(name) is not None]
    name = next(iter(named or [name for name, value in given.items() if _tells(value)]), None)
    if name is None:
        return None, 0
    layers = getattr(given[name], "layers", [given[name]])
    found = next((count for layer in layers if _tells(layer) and (count := int(layer.get_seq_length()))), 0)
    if not found and layers and not any(map(_tells, layers)):
        limit = "a cache of transformers that tells how many tokens it holds"
        raise InputError(name, type(given[name]).__name__, limit, "DynamicCache, or use_cache=False")
    return given[name], found


def cache_of(output: Any) -> Any:
    """The cache in what a decoder returned; None where it keeps none that could come again."""
    named = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    return next(filter(_tells, output if isinstance(output, tuple) else named.values()), None)


def _tells(cache: Any) -> bool:
    return hasattr(cache, "get_seq_length")


def mark_real(real_BS: Tensor, mask: Any, cached: int, *, more: bool) -> None:
    """Mark the real tokens of this forward by its mask, which also covers those cached before. None: no padding.

    more: whether there is a cache, which may have room that the mask covers as well.
    """
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
    rows, length = real_BS.shape
    if mask.shape[0] not in (1, rows) or mask.shape[1] < cached + length:
        limit = f"at least [{rows}, {cached + length}]: of {cached} cached and {length} new tokens"
        raise InputError("attention_mask", f"shape {list(mask.shape)}", limit)
    if mask.shape[1] > length and not more:
        limit = f"[{rows}, {length}]: there is no cache that could hold tokens before these"
        raise InputError("attention_mask", f"shape {list(mask.shape)}", limit, "DynamicCache, or use_cache=False")
    real_BS.copy_(mask[:, cached : cached + length])


def eos_tokens(model: nn.Module) -> list[int]:
    """Tokens that end a sequence, by the model's generation config, else its own."""
    config: Any = getattr(model, "generation_config", None) or model.config
    value = getattr(config, "eos_token_id", None)
    return [] if value is None else [int(token) for token in (value if isinstance(value, list | tuple) else [value])]


def ranks_of(model: nn.Module) -> tuple[int, int, int]:
    """(rank, how many consecutive ranks share a batch, how many ranks there are): those of a tensor-parallel group."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1, 1
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return rank, getattr(getattr(model.config, "distributed_config", None), "tp_size", None) or 1, world

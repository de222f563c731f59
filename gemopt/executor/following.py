"""Which axis of a checkpoint tensor follows a renumbering of experts, decided by its name and its shape, or refused.

A tensor beside a router or among experts either follows on a known axis, or has no axis that could be of experts. What
is neither is an error: a companion left behind would change what the network computes without a word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemopt.exceptions import InputError
from gemopt.models.checkpoint_names import PACKED, TensorRole

FLOATS = ("F", "BF", "C")  # beginnings of safetensors' names of types that cannot pack experts or hold their ids
WORDS = {"I32", "U32", "I64", "U64"}
PACKS = (2, 4, 8, 16, 32, 64, 128)  # experts in a word, or in a block with one scale
HINT = "keep the router and what goes with the experts in full precision, or apply the placement live (gemopt apply)"


@dataclass(frozen=True)
class Sizes:
    """Of a network, to tell an axis of experts from others.

    Attributes
    ----------
    experts, identity
        Experts, and identity experts that are numbered after them.
    known
        Lengths of axes that are not of experts: hidden and intermediate sizes.
    """

    experts: int
    identity: int = 0
    known: frozenset[int] = frozenset()

    @classmethod
    def of(cls, config: Mapping[str, Any], experts: int, identity: int) -> Sizes:
        """From the text part of a config."""
        plain = {v for k, v in config.items() if k.endswith("_size") and isinstance(v, int) and v > 0}
        return cls(experts, identity, frozenset(plain))

    @property
    def rows(self) -> tuple[int, int]:
        """Lengths of an axis of experts."""
        return self.experts, self.experts + self.identity


def following_axis(role: TensorRole, name: str, shape: tuple[int, ...], dtype: str, sizes: Sizes) -> int | None:
    """Axis of experts of a tensor; None for one that has nothing to do with them.

    Raises
    ------
    InputError
        Naming the tensor and its shape, when that cannot be told.
    """
    limit = f"{sizes.experts} experts" + (f" and {sizes.identity} identity experts" if sizes.identity else "")
    shown = f"shape {list(shape)} {dtype}"
    if role.kind == "outside":
        if math.prod(shape) in sizes.rows and math.prod(shape) not in sizes.known:
            raise InputError(name, shown, f"no known meaning, and as many numbers as there are experts: {limit}", HINT)
        return None
    if role.kind == "unknown":
        if may_have_experts(shape, dtype, sizes):
            raise InputError(name, shown, f"no known meaning, and it may be one for each of {limit}", HINT)
        return None
    lengths = sizes.rows if role.kind == "router" else sizes.rows[:1]
    fitting = [axis for axis in role.axes if axis < len(shape) and shape[axis] in lengths]
    if len(fitting) == 1:
        return fitting[0]
    if len(fitting) > 1:
        raise InputError(name, shown, f"axis {fitting[0]} or {fitting[1]} may be that of {limit}", HINT)
    words = role.companion in PACKED and dtype in WORDS
    elsewhere = [length for axis, length in enumerate(shape) if axis not in role.axes]
    shared = all(shape[axis] == 1 for axis in role.axes if axis < len(shape)) and not set(elsewhere) & set(lengths)
    if shared and not words and not role.is_weight:
        return None  # one scale for all experts
    axes = " or ".join(map(str, role.axes))
    raise InputError(name, shown, f"{limit} along axis {axes}, each apart from the others", HINT)


def may_have_experts(shape: tuple[int, ...], dtype: str, sizes: Sizes) -> bool:
    """Whether a tensor of unknown meaning may hold something for every expert, or the ids of experts."""
    if not dtype.startswith(FLOATS):
        return True
    if math.prod(shape) <= 1:
        return False
    packed = {-(-rows // pack) for rows in sizes.rows for pack in PACKS} - {1}
    others = [length for length in shape if length != 1 and length not in sizes.known]
    return any(length in sizes.rows for length in shape) or any(
        length % sizes.experts == 0 or length in packed for length in others
    )

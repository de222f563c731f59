"""The token-level record: which experts every token chose, and what is known of the token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError
from gemopt.traces.arrays import check_ids, widened
from gemopt.traces.files import IntArray


@dataclass(frozen=True, eq=False)
class Tokens:
    """The token-level record behind the counts. N tokens, L layers, K experts per token.

    Attributes
    ----------
    ids
        [N, L, K] logical expert of each assignment; -1 where a token made fewer than K.
    step_of_token
        [N] step in which the token was computed, not decreasing.
    source_rank, token_ids, request
        [N] rank that held the token, vocabulary id, request it belongs to; None when not recorded.
    hidden
        [N, L, D] float16 what entered the routers; kept in a file of its own (`gemopt.traces.with_hidden`), None
        without it.
    """

    ids: IntArray
    step_of_token: IntArray
    source_rank: IntArray | None = None
    token_ids: IntArray | None = None
    request: IntArray | None = None
    hidden: NDArray[np.float16] | None = None

    def __post_init__(self) -> None:
        # ids are many: int32 holds every product of two experts; the others are one number per token.
        object.__setattr__(self, "ids", widened(self.ids, np.int32))
        for name in PER_TOKEN:
            object.__setattr__(self, name, widened(getattr(self, name)))

    def check(self, *, num_steps: int, num_layers: int, num_experts: int) -> None:
        """`InputError` unless this is a record of so many steps, layers and experts."""
        ids, steps = self.ids, self.step_of_token
        if ids.ndim != 3 or ids.shape[1] != num_layers or ids.dtype.kind not in "iu":
            raise InputError("Traces.ids", f"{ids.dtype} {ids.shape}", f"integers [tokens, {num_layers}, K]")
        check_ids(ids, num_experts)
        for name in PER_TOKEN:
            array = getattr(self, name)
            if array is not None and (array.shape != (len(ids),) or array.dtype.kind not in "iu"):
                raise InputError(f"Traces.{name}", f"{array.dtype} {array.shape}", f"integers ({len(ids)},)")
        hidden = self.hidden
        if hidden is not None and (hidden.ndim != 3 or hidden.shape[:2] != ids.shape[:2] or hidden.dtype != np.float16):
            found = f"{hidden.dtype} {hidden.shape}"
            raise InputError("Traces.hidden", found, f"float16 [{len(ids)}, {num_layers}, D]")
        wrong = steps[(steps < 0) | (steps >= num_steps)]
        if len(wrong):
            raise InputError("Traces.step_of_token", int(wrong[0]), f"steps 0 to {num_steps - 1}")
        if (steps[1:] < steps[:-1]).any():
            raise InputError(
                "Traces.step_of_token", "steps out of order", "the tokens of step 0 first, then step 1, ..."
            )

    def of_steps(self, chosen: IntArray, num_steps: int) -> Tokens:
        """The tokens of some of `num_steps` steps, which become steps 0, 1, ..."""
        position = np.full(num_steps, -1)
        position[chosen] = np.arange(len(chosen))
        kept = self.where(position[self.step_of_token] >= 0)
        return replace(kept, step_of_token=position[kept.step_of_token])

    def where(self, keep_N: NDArray[np.bool_]) -> Tokens:
        """Some of the tokens, of the steps they were of."""
        kept = {name: getattr(self, name)[keep_N] for name in (*ARRAYS, "hidden") if getattr(self, name) is not None}
        return Tokens(**kept)


ARRAYS = tuple(each.name for each in fields(Tokens) if each.name != "hidden")  # of the document
PER_TOKEN = ARRAYS[1:]


def join(records: Sequence[Tokens], num_steps: Sequence[int]) -> Tokens:
    """Records of consecutive stretches of `num_steps` steps each, as one; what only some recorded is left out."""
    widths = {record.ids.shape[2] for record in records}
    if len(widths) > 1:
        raise InputError("Traces.ids", f"{sorted(widths)} experts per token", "the parts must be of one network")
    offsets = np.cumsum([0, *num_steps])
    steps = [record.step_of_token + offset for record, offset in zip(records, offsets, strict=False)]
    arrays: dict[str, Any] = {"step_of_token": np.concatenate(steps)}
    for name in ("ids", "source_rank", "token_ids", "request", "hidden"):
        values = [getattr(record, name) for record in records]
        arrays[name] = None if any(v is None for v in values) else np.concatenate(values)
    return Tokens(**arrays)

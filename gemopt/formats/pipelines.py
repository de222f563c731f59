"""Ranks that recorded the same layers: data parallel, or stages of a pipeline that each number theirs from 0?

Stages compute the same tokens one after the other, so that in every step each has as many assignments as the next, to
experts of other layers; data-parallel ranks have tokens of their own. Adding up stages would give half the layers with
twice the tokens, and nothing in the counts would show it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import pairwise

import numpy as np

from gemopt.exceptions import InputError
from gemopt.formats.engine import IntArray
from gemopt.formats.findings import ranges
from gemopt.traces.arrays import ENOUGH_SUMS

TELLING = 3  # different sums over the steps: as many for ranks with tokens of their own are no chance
NUMBERED = "number their layers through the network"
HINT = f"stages must {NUMBERED}; if they are none: --no-pipeline"
_STAGE = re.compile(
    r"(?:^|[/_.-])(?:pp|pipeline|stage)(?:[_-]?(?:rank|stage))?[_-]?(\d+)(?=[/_.-]|of|$)", re.IGNORECASE
)


def refuse_named_stages(layers_of: Sequence[tuple[str, Collection[int]]], no_pipeline: bool) -> None:
    """Raise where names of files tell stages of a pipeline, and these have layers in common. layers_of: by name."""
    stages: dict[str, set[int]] = {}
    for name, layers in layers_of:
        if found := _STAGE.search(name):
            stages.setdefault(found[1], set()).update(layers)
    common = set.intersection(*stages.values()) if len(stages) > 1 else set()
    if common and not no_pipeline:
        names = ", ".join(name for name, _ in layers_of if _STAGE.search(name))
        told = f"layers {ranges(common)} in {len(stages)} stages of a pipeline"
        raise InputError(f"PATHS {names[:120]}", told, "stages without a common layer", NUMBERED)


def refuse_stages(ranks: Sequence[int], sums_RTL: IntArray, no_pipeline: bool, own_tokens: bool | None = None) -> str:
    """Raise where ranks that are to be added up must be, or may well be, stages.

    Parameters
    ----------
    sums_RTL
        [ranks, steps, layers] assignments.
    no_pipeline
        The user says that there are no stages.
    own_tokens
        Whether every rank had tokens that no other had; None where they are not recorded.

    Returns
    -------
    str
        A note where too few steps differ to tell; else empty.
    """
    stages = _equal_parts(sums_RTL)
    if stages == 1 or no_pipeline or own_tokens:
        return ""
    parts = [ranges(part) for part in np.split(np.asarray(ranks), stages)]
    found = f"ranks {' and '.join(parts)} have as many assignments in every step"
    if own_tokens is False or _telling(sums_RTL[0]):
        limit = "data-parallel ranks with tokens of their own: are these stages of a pipeline?"
        raise InputError("PATHS: counts", found, limit, HINT)
    return f"{found}: added up as data-parallel ranks; stages of a pipeline must {NUMBERED}"


def refuse_parts_of_steps(sums_of: Sequence[tuple[str, IntArray]]) -> None:
    """Raise where files hold parts of the same steps: all layers have as many assignments only together.

    sums_of: [T, L] by name.
    """
    if len(sums_of) < 2 or len({sums_TL.shape for _, sums_TL in sums_of}) > 1:
        return
    each_FTL = np.stack([sums_TL for _, sums_TL in sums_of])
    each_FTL = each_FTL[:, :, each_FTL.any(axis=(0, 1))]
    total_TL = each_FTL.sum(axis=0)
    uneven_FT = (each_FTL != each_FTL[:, :, :1]).any(axis=2)
    if total_TL.size >= ENOUGH_SUMS and 2 * uneven_FT.sum() > uneven_FT.size and (total_TL == total_TL[:, :1]).all():
        names = ", ".join(name for name, _ in sums_of)[:120]
        found = "layers that have as many assignments only when the files are added up"
        hint = "add up ranks, put experts of shards side by side, and give one file"
        raise InputError(f"{names}: counts", found, "files of steps that follow each other", hint)


def refuse_stages_in_time(sums_of: Sequence[tuple[str, IntArray]], hint: str = HINT) -> None:
    """Raise where files that would follow each other in time have the same telling sums. sums_of: [T, L] by name."""
    for (first, sums_TL), (name, other_TL) in pairwise(sums_of):
        if np.array_equal(sums_TL, other_TL) and _telling(sums_TL):
            found = f"as many assignments in every step as in {first}, to other experts"
            limit = "later steps, which have tokens of their own: are these stages of a pipeline?"
            raise InputError(f"{name}: counts", found, limit, hint)


def _telling(sums_TL: IntArray) -> bool:
    """Whether others with the same sums must have had the same tokens."""
    return len(np.unique(sums_TL.sum(axis=1))) >= TELLING


def _equal_parts(sums_RTL: IntArray) -> int:
    """The smallest number of equally many neighbouring ranks that have the same sums in all steps; 1 for none."""
    count = len(sums_RTL)
    for parts in range(2, count + 1):
        if count % parts == 0:
            sums = sums_RTL.reshape(parts, count // parts, *sums_RTL.shape[1:]).sum(axis=1)
            if sums.any() and (sums == sums[0]).all():
                return parts
    return 1

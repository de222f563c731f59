"""What arrays beside the experts of tokens say of these: refused where they change what the experts mean."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gemopt.exceptions import InputError
from gemopt.formats.engine import IntArray, TraceOptions
from gemopt.formats.files import as_numpy
from gemopt.formats.names import NUMBERS, words_of
from gemopt.formats.tokens.beside import TOKENS, WEIGHTED
from gemopt.formats.tokens.cells import NAMES
from gemopt.traces.arrays import widened
from gemopt.traces.files import ALTERING, COPIES, meant

POSITIONS = {"position", "positions", "position_ids", "pos", "token_idx", "token_index"}  # that rise in a sequence
APART = {
    *("layer", "layers", "phase", "step", "steps", "batch", "rank", "request", "requests", "req", "rid", "sequence"),
    *(
        "doc",
        "docs",
        "document",
        "documents",
        "sequences",
        "seq",
        "seqs",
        "seqlens",
        "cu",
        "offsets",
        "starts",
        "lens",
        "length",
        "lengths",
    ),
}  # words of arrays that tell tokens or layers apart


def check_told(path: Path, name: str, value: Any, ids: IntArray, options: TraceOptions) -> None:
    """Raise where the file says another number of experts, or of those of a token, than is read."""
    said, of_token = str(as_numpy(value).tolist()), name not in NUMBERS["num_experts"]
    read = ids.shape[-1] if of_token else options.num_experts
    if said != str(read):
        limit = f"{read} experts of a token, as there are" if of_token else f"--num-experts is {read or 'not given'}"
        raise InputError(f"{path}: {name}", said, limit, "" if of_token else f"give --num-experts {said}")


def refuse_others(path: Path, names: Iterable[str]) -> None:
    for name in names:
        if COPIES.search(name) or ALTERING.search(name):
            raise InputError(f"{path}: {name}", "beside the experts", "experts of the network, every token once")


def refuse_apart(path: Path, others: dict[str, Any], options: TraceOptions, tokens: int) -> None:
    """Raise where arrays tell tokens or layers apart that are read as one sequence, and as layers from 0 on.

    tokens: of a sequence in the file.
    """
    for name, each in others.items():
        words, bare = words_of(name), name.casefold()
        if meant(name) == "layer_ids" and np.size(each) == 1 and np.any(each) and options.layer_ids is None:
            raise InputError(f"{path}: {name}", np.ravel(each)[0].item(), "layers from 0 on", "give --layer-ids")
        if TOKENS.fullmatch(bare) and np.size(each) == 1 and np.ravel(each)[0] < tokens:
            limit = f"the {tokens} whose experts are there"
            raise InputError(f"{path}: {name}", np.ravel(each)[0].item(), limit, "padded? leave the others out")
        again = bare in POSITIONS and np.ndim(each) == 1 and (np.diff(widened(each)) <= 0).any()
        numbers = bare in (*NAMES["request"], *NAMES["step"]) or again or _cuts(each, tokens)
        if not (words & APART or numbers) or np.size(each) < 2:
            continue
        if not words & {"layer", "layers"}:
            hint = "give [sequences, tokens, layers, top-k], or a file for each sequence, and leave it out"
        elif np.ravel(each).tolist() != list(options.layer_ids or range(np.size(each))):
            hint = "give --layer-ids"
        else:
            continue
        raise InputError(f"{path}: {name}", "beside the experts", "experts alone: what it says would be lost", hint)


def _cuts(array: Any, tokens: int) -> bool:
    """Whether numbers cut a row of tokens into parts: their lengths, or where they begin or end."""
    if np.ndim(array) != 1 or array.dtype.kind not in "iu" or not 1 < len(array) < tokens:
        return False
    found = widened(array)
    ends = (np.diff(found) >= 0).all() and found[0] == 0 and found[-1] == tokens
    return bool((found >= 0).all() and (ends or int(found.sum()) == tokens))


def refuse_no_weight(path: Path, name: str, weights: Any, ids: IntArray) -> None:
    """Raise where the weights of a token's experts are all 0."""
    if not words_of(name) & WEIGHTED or weights.shape != ids.shape or weights.dtype.kind not in "fiu":
        return
    nothing = ~weights.any(axis=-1) & (ids >= 0).any(axis=-1)
    if nothing.any():
        at = np.argwhere(nothing)[0].tolist()
        hint = "padding? leave them out; were they computed? leave the array out"
        raise InputError(f"{path}: {name}{at}", "a token of no weight", "tokens that were computed", hint)

"""Hidden states that entered the routers: a file beside a trace, of some of its requests.

`hidden` [N, L, D] float16 and `token` [N], the row of each token in the trace's token-level record; the digest of that
record in the metadata tells which trace they were recorded with.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemopt.documents import replacing
from gemopt.exceptions import InputError
from gemopt.traces.arrays import count_assignments
from gemopt.traces.document import Traces
from gemopt.traces.files import IntArray, read
from gemopt.traces.tokens import Tokens

SCHEMA_VERSION = 1


def hidden_path(traces: str | os.PathLike[str]) -> Path:
    """Where the hidden states of a trace are: in its folder, or beside its file."""
    path = Path(traces)
    return path.with_suffix(".hidden.safetensors") if path.suffix else path / "hidden.safetensors"


def with_hidden(traces: Traces, path: str | os.PathLike[str]) -> Traces:
    """The traces as if only the tokens whose hidden states are in a file had been there, with these.

    Select steps afterwards: the file belongs to the whole trace.

    Raises
    ------
    InputError
        No such file, one of other traces, or traces without the token-level record.
    """
    tokens = _record(traces)
    part = read(path, ("hidden", "token"))[0]
    if part.metadata.get("gemopt_hidden") != str(SCHEMA_VERSION) or len(part.arrays) < 2:
        raise InputError(str(path), ", ".join(sorted(part.names)), "hidden states of gemopt trace --hidden are needed")
    if part.metadata.get("tokens_sha256") != _digest(tokens):
        raise InputError(str(path), "hidden states of other traces", "those recorded with these, all steps of them")
    row_N, hidden_NLD = part.arrays["token"].astype(np.int64), part.arrays["hidden"]
    inside = row_N.ndim == 1 and len(row_N) and row_N[-1] < len(tokens.ids) and (np.diff(row_N, prepend=-1) > 0).all()
    if not inside:
        raise InputError(f"{path}, token", f"shape {row_N.shape}", "increasing rows of the token-level record")
    keep_N = np.zeros(len(tokens.ids), dtype=np.bool_)
    keep_N[row_N] = True
    kept = of_tokens(traces, keep_N)
    assert kept.tokens is not None
    return replace(kept, tokens=replace(kept.tokens, hidden=hidden_NLD))


def save_hidden(
    path: str | os.PathLike[str], traces: Traces, token_N: IntArray, hidden_NLD: NDArray[np.float16]
) -> None:
    """Write hidden states of rows `token_N` of the record; `InputError` where float16 does not hold them."""
    from safetensors.numpy import save

    if not np.isfinite(hidden_NLD).all():
        raise InputError("hidden states", "infinite or NaN", "values within +-65504, which float16 holds")
    metadata = {"gemopt_hidden": str(SCHEMA_VERSION), "tokens_sha256": _digest(_record(traces))}
    with replacing(path) as stream:
        stream.write(save({"token": token_N, "hidden": hidden_NLD}, metadata=metadata))


def of_tokens(traces: Traces, keep_N: NDArray[np.bool_]) -> Traces:
    """The traces as if only some of the tokens had been there; steps that only others were in are left out."""
    kept = _record(traces).where(keep_N)
    steps, step_N = np.unique(kept.step_of_token, return_inverse=True)
    return replace(
        traces.steps(steps),
        counts=count_assignments(kept.ids, step_N, len(steps), traces.num_experts),
        tokens=replace(kept, step_of_token=step_N),
        rank_us=None,
    )


def _record(traces: Traces) -> Tokens:
    if traces.tokens is None:
        raise InputError("Traces.ids", None, "hidden states are of tokens", "trace with the token-level record")
    return traces.tokens


def _digest(tokens: Tokens) -> str:
    """Of experts, steps and requests, whatever integers they are kept in."""
    digest = hashlib.sha256(json.dumps(tokens.ids.shape).encode())
    for array in (tokens.ids, tokens.step_of_token, tokens.request):
        digest.update(b"" if array is None else np.ascontiguousarray(array, dtype="<i8").tobytes())
    return digest.hexdigest()

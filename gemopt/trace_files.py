"""Traces as files: safetensors, a folder of numbered ones, or an `.npz` with `counts`; see `docs/formats.md`."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from gemopt.documents import read_bytes, replacing
from gemopt.exceptions import InputError
from gemopt.traces import SCHEMA_VERSION, IntArray, Tokens, Traces, concatenate, count_assignments

STEP_ARRAYS = ("phase", "task", "pair_counts", "transitions")
TOKEN_ARRAYS = ("ids", "step_of_token", "source_rank", "token_ids", "request")


def save(traces: Traces, path: str | os.PathLike[str]) -> None:
    """Write one safetensors file atomically, every array in the smallest integer type that holds it."""
    from safetensors.numpy import save as serialised

    arrays = {"counts": traces.counts}
    arrays |= {name: getattr(traces, name) for name in STEP_ARRAYS}
    if traces.tokens is not None:
        arrays |= {name: getattr(traces.tokens, name) for name in TOKEN_ARRAYS}
    small = {name: _smallest(array) for name, array in arrays.items() if array is not None}
    with replacing(path) as stream:
        stream.write(serialised(small, metadata=_metadata(traces)))


def _metadata(traces: Traces) -> dict[str, str]:
    known = {
        "num_hidden_layers": traces.num_hidden_layers,
        "top_k": traces.top_k,
        "model": traces.model,
        "task_names": json.dumps(traces.task_names) if traces.task_names else None,
    }
    return {
        **traces.extra,
        "gemopt_traces": str(SCHEMA_VERSION),
        "layer_ids": json.dumps(traces.layer_ids),
        **{key: str(value) for key, value in known.items() if value is not None},
    }


def _smallest(array: IntArray) -> IntArray:
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    kinds = (np.uint8, np.uint16, np.int32) if low >= 0 else (np.int8, np.int16, np.int32)
    for kind in kinds:
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return np.ascontiguousarray(array, dtype=kind)
    return np.ascontiguousarray(array, dtype=np.int64)


def load(path: str | os.PathLike[str]) -> Traces:
    """Read traces; `InputError` naming the file and the array that is wrong."""
    source = Path(path)
    if source.is_dir():
        return concatenate([load(part) for part in numbered_files(source)])
    try:
        return _load_npz(source) if source.suffix == ".npz" else _load_safetensors(source)
    except InputError as error:
        if not str(error).startswith(str(path)):
            error.args = (f"{path}: {error}",)
        raise


def numbered_files(folder: Path) -> list[Path]:
    """The complete parts of a trace folder in order; files still being written are hidden and skipped."""
    named = [part for part in folder.glob("[0-9]*.safetensors") if part.stem.isdecimal()]
    parts = sorted(named, key=lambda part: int(part.stem))
    if not parts:
        raise InputError(str(folder), "no numbered .safetensors file", "a trace folder holds 000000.safetensors, ...")
    for number, part in enumerate(parts):
        if int(part.stem) != number:
            raise InputError(str(folder), part.name, f"part {number:06d}.safetensors is missing", "restore it")
    return parts


def _load_npz(path: Path) -> Traces:
    content = read_bytes(path)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            found = arrays.files
            counts = arrays["counts"] if "counts" in found else None
    except Exception as error:  # zipfile, zlib, numpy and struct each have their own
        raise InputError(str(path), str(error), "a complete .npz file of plain arrays is needed") from None
    if counts is None:
        raise InputError(str(path), ", ".join(found), "an array named counts is needed")
    return Traces(counts=counts)


def _load_safetensors(path: Path) -> Traces:
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb"):  # for the system's own words about a file that cannot be read
            pass
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            names = set(file.keys())
            arrays = {name: file.get_tensor(name) for name in ("counts", *STEP_ARRAYS, *TOKEN_ARRAYS) if name in names}
    except OSError as error:
        raise InputError(str(path), error.strerror or str(error), "a readable safetensors file is needed") from None
    except (SafetensorError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(str(path), str(error), "a complete safetensors file of integers is needed") from None
    return _from_arrays(arrays, names, metadata)


def _from_arrays(arrays: dict[str, IntArray], names: set[str], metadata: dict[str, str]) -> Traces:
    version = metadata.pop("gemopt_traces", str(SCHEMA_VERSION))
    if version != str(SCHEMA_VERSION):
        raise InputError("gemopt_traces", version, f"this gemopt reads version {SCHEMA_VERSION}")
    if "counts" not in arrays:
        raise InputError("Traces.counts", f"arrays {', '.join(sorted(names))}", "an array named counts is needed")
    tokens = None
    if "ids" in arrays:
        if "step_of_token" not in arrays:
            raise InputError("Traces.step_of_token", None, "token-level ids need the step of each token")
        tokens = Tokens(**{name: arrays[name] for name in TOKEN_ARRAYS if name in arrays})
    traces = Traces(
        counts=arrays["counts"],
        layer_ids=tuple(_parse(metadata, "layer_ids", list) or ()),
        num_hidden_layers=_parse(metadata, "num_hidden_layers", int),
        top_k=_parse(metadata, "top_k", int),
        model=metadata.pop("model", None),
        task_names=tuple(_parse(metadata, "task_names", list) or ()),
        tokens=tokens,
        extra=metadata,
        **{name: arrays[name] for name in STEP_ARRAYS if name in arrays},
    )
    _check_consistent(traces)
    return traces


def _check_consistent(traces: Traces) -> None:
    if traces.tokens is None:
        return
    counted = count_assignments(traces.tokens.ids, traces.tokens.step_of_token, traces.num_steps, traces.num_experts)
    wrong = np.argwhere(counted != traces.counts)
    if len(wrong):
        step, layer, expert = map(int, wrong[0])
        raise InputError(
            "Traces.counts",
            int(traces.counts[step, layer, expert]),
            f"the token-level ids make {counted[step, layer, expert]} at step {step}, layer {layer}, expert {expert}",
            "leave the ids out, or count them again",
        )


def _parse(metadata: dict[str, str], key: str, kind: type) -> Any:
    text = metadata.pop(key, None)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise InputError(f"Traces.{key}", text, f"a JSON {kind.__name__} is needed")
    return value

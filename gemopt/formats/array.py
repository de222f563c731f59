"""Counts that are already an array [steps, layers, experts]: .npy, .npz, .pt, .safetensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemopt.exceptions import InputError
from gemopt.formats import count_csv
from gemopt.formats.engine import Engine, IntArray, Recording, TraceOptions, files_of
from gemopt.formats.files import as_array, load_torch, numpy_arrays, safetensors_arrays

SUFFIXES = (".npy", ".npz", ".pt", ".safetensors")
_ROWS = 64 << 20  # bytes handed on at once


def read_traces(paths: Sequence[Path], options: TraceOptions) -> Recording:
    """Read arrays one after the other; a file with several needs one called `counts`."""
    if all(path.suffix == ".csv" for path in paths):
        return count_csv.read_traces(paths, options)
    files, notes = _distinct(files_of(paths, *SUFFIXES))

    def blocks() -> Iterator[IntArray]:
        for path in files:
            counts = _counts(path)
            step = max(1, _ROWS // max(1, counts[:1].nbytes))
            for start in range(0, len(counts), step):
                block = counts[start : start + step]
                used = np.asarray(block).reshape(len(block), -1).any(axis=1)
                if used.any():
                    yield block if used.all() else block[used]

    ids = options.layer_ids if _already_chosen(files, options) else None
    return Recording(blocks=blocks, layer_ids=ids, notes=notes)


def _distinct(files: list[Path]) -> tuple[list[Path], list[str]]:
    """The files without those whose counts came before, and a note on each of these."""
    kept: dict[bytes, Path] = {}
    notes: list[str] = []
    for path in files:
        counts = _counts(path)
        digest = hashlib.sha256(str(counts.shape).encode())
        for step in counts:
            digest.update(np.ascontiguousarray(step, dtype=np.int64).data)
        first = kept.setdefault(digest.digest(), path)
        if first is not path:
            notes.append(f"{path.name} is {first.name} again: counted once")
    return list(kept.values()), notes


def _already_chosen(files: list[Path], options: TraceOptions) -> bool:
    """Whether `--layer-ids` names the rows there are, rather than picks some of them."""
    ids = options.layer_ids
    return ids is not None and len(ids) == _counts(files[0]).shape[1]


def _counts(path: Path) -> IntArray:
    data: Any
    if path.suffix in (".npy", ".npz"):
        data = numpy_arrays(path)
    else:
        data = load_torch(path) if path.suffix == ".pt" else safetensors_arrays(path)
    if isinstance(data, dict):
        if "counts" not in data and len(data) != 1:
            raise InputError(str(path), ", ".join(map(str, data)) or "no array", "one array, or one called counts")
        data = data["counts"] if "counts" in data else next(iter(data.values()))
    counts = as_array(data, name=f"{path}: counts", ndim=3)
    if not counts.size:
        raise InputError(f"{path}: counts", f"shape {counts.shape}", "at least one step, layer and expert")
    return counts


ENGINES = {
    "array": Engine(
        name="array",
        versions="any",
        traces=("[steps, layers, experts] .npy, .npz, .pt, .safetensors", "layer_id,expert_id,count .csv"),
        note="counts only; placements: --to csv",
        read_traces=read_traces,
    )
}

"""The records of SGLang's per_pass and per_token dumps, one at a time, checked; physical experts become logical."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.documents.arrays import integer_array
from gemopt.exceptions import InputError
from gemopt.formats.engine import IntArray
from gemopt.formats.files import as_array
from gemopt.traces import COUNT_LIMIT, Phase

# ForwardMode of sglang/srt/model_executor/forward_batch_info.py; all others are speculative or idle passes.
_PHASES = {1: Phase.PREFILL, 2: Phase.DECODE, 3: Phase.MIXED, 5: Phase.DECODE, 8: Phase.PREFILL}
_RECORD_LIMIT = COUNT_LIMIT // 4096


def map_of(path: Path, data: Any) -> IntArray:
    """[rows, P] the map of a dump; `InputError` for other files."""
    if not isinstance(data, dict) or "records" not in data or not isinstance(data["records"], list):
        raise InputError(f"{path}: records", None, "per_pass or per_token dumps only", "import each kind apart")
    name = f"{path}: last_physical_to_logical_map"
    map_LP = as_array(data.get("last_physical_to_logical_map"), name=name, ndim=2)
    if not map_LP.size or int(map_LP.min()) < 0 or int(map_LP.max()) >= map_LP.shape[1]:
        raise InputError(name, f"shape {map_LP.shape}", "experts >= 0, fewer than the slots")
    return map_LP


def integer(path: Path, record: Any, key: str, limit: int) -> int:
    """A number of a record."""
    value = record.get(key) if isinstance(record, dict) else None
    if type(value) is not int or not 0 <= value < limit:
        raise InputError(f"{path}: records.{key}", value, f"a whole number from 0 to {limit - 1}")
    return value


def check_map(path: Path, map_LP: IntArray, expected_LP: IntArray) -> None:
    """`InputError` unless the files have one map."""
    if map_LP.shape != expected_LP.shape or (map_LP != expected_LP).any():
        raise InputError(
            f"{path}: last_physical_to_logical_map",
            "another map than in the other files",
            "one map for all dumps",
            "the folder mixes runs, or experts moved while recording: record again without --enable-eplb",
        )


def phase_of(record: dict[str, Any]) -> int | None:
    """Phase of a pass, None when it does not say."""
    mode = record.get("forward_mode")
    return int(_PHASES[mode]) if type(mode) is int and mode in _PHASES else None


def record_counts(path: Path, record: Any, map_LP: IntArray) -> IntArray:
    """[rows, P] int32 physical counts of a record; older per_token records have none, but the ids make them."""
    if isinstance(record, dict) and record.get("global_physical_count") is None and "topk_ids_of_layer" in record:
        return counted_ids(path, record, map_LP)
    for key, limit in (("forward_pass_id", 1 << 62), ("rank", 1 << 16)):
        integer(path, record, key, limit)
    name = f"{path}: global_physical_count"
    counts = as_array(record.get("global_physical_count"), name=name, ndim=2)
    if counts.shape != map_LP.shape:
        raise InputError(name, f"shape {counts.shape}", f"shape {map_LP.shape}, that of the map")
    if int(counts.min()) < 0 or int(counts.max()) > _RECORD_LIMIT:
        raise InputError(name, int(counts.max()), f"counts from 0 to {_RECORD_LIMIT}")
    return counts.astype(np.int32, copy=False)


def counted_ids(path: Path, record: dict[str, Any], map_LP: IntArray) -> IntArray:
    """[rows, P] int32 physical counts that the ids of a per_token record make."""
    ids = _slots(path, record, map_LP)
    return np.stack([np.bincount(row[row >= 0], minlength=map_LP.shape[1]) for row in ids]).astype(np.int32)


def _slots(path: Path, record: dict[str, Any], map_LP: IntArray) -> NDArray[np.int64]:
    """[rows, N, K] slot of each assignment, -1 for none."""
    name = f"{path}: topk_ids_of_layer"
    ids = as_array(record["topk_ids_of_layer"], name=name, ndim=3).astype(np.int64)
    if len(ids) != len(map_LP) or (ids.size and int(ids.max()) >= map_LP.shape[1]):
        raise InputError(name, f"shape {ids.shape}", f"slots below {map_LP.shape[1]}")
    ordered = np.sort(ids, axis=2)
    twice = (np.diff(ordered, axis=2) == 0) & (ordered[:, :, 1:] >= 0)
    if twice.any():
        layer, token, _ = (int(i[0]) for i in np.nonzero(twice))
        raise InputError(name, f"a slot twice for token {token} in layer {layer}", "distinct slots, -1 where unused")
    return ids


def record_tokens(path: Path, record: dict[str, Any], map_LP: IntArray) -> tuple[IntArray, IntArray]:
    """[N, rows, K] logical ids (-1: none) and [N] token ids of a per_token record."""
    if "topk_ids_of_layer" not in record:
        raise InputError(f"{path}: topk_ids_of_layer", None, "--keep-tokens needs per_token dumps")
    ids = _slots(path, record, map_LP)
    logical = np.stack([np.append(row, -1)[np.maximum(layer, -1)] for row, layer in zip(map_LP, ids, strict=True)])
    words = integer_array(record.get("input_ids"), name=f"{path}: input_ids", ndim=1)
    if words.shape != (ids.shape[1],):
        raise InputError(f"{path}: input_ids", f"{words.shape}", f"one per token, {ids.shape[1]}")
    return logical.transpose(1, 0, 2), words


def to_logical(physical: list[NDArray[np.int32]], map_LP: NDArray[np.int64], divisor: int) -> NDArray[np.int32]:
    """[T, L, E] counts of logical experts: copies summed, one gather per copy number."""
    experts, (layers, slots) = int(map_LP.max()) + 1, map_LP.shape
    result = np.zeros((len(physical), layers * experts), np.int32)
    copy_LP = np.stack([_copy_number(row, experts) for row in map_LP]).reshape(-1)
    target_LP = (map_LP + experts * np.arange(layers)[:, None]).reshape(-1)
    gathers = [np.flatnonzero(copy_LP == number) for number in range(int(copy_LP.max()) + 1)]
    for row, counts in zip(result, physical, strict=True):
        flat = counts.reshape(layers * slots)
        for taken in gathers:
            row[target_LP[taken]] += flat[taken]
    if divisor > 1:
        result //= divisor
    return result.reshape(len(physical), layers, experts)


def _copy_number(row: NDArray[np.int64], experts: int) -> NDArray[np.int64]:
    """[P] how many earlier slots hold the same expert."""
    order = np.argsort(row, kind="stable")
    starts = np.cumsum(np.bincount(row, minlength=experts)) - np.bincount(row, minlength=experts)
    number = np.empty(len(row), np.int64)
    number[order] = np.arange(len(row)) - starts[row[order]]
    return number

"""SGLang's recordings: stat, stat_approx, per_pass and per_token dumps, and `routed_experts` in responses.

Formats: `sglang/srt/eplb/expert_distribution.py` of SGLang 0.5.23 (accumulators and gatherers) and
`eplb_simulator/reader.py`. stat files hold logical counts of all ranks; the detailed ones hold physical counts, one
file per rank, which are summed over the ranks of a forward pass and mapped back to logical experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.documents import integer_array
from gemopt.exceptions import InputError
from gemopt.formats import responses
from gemopt.formats.engine import IntArray, Loaded, Recording, TraceOptions, check_sizes, files_of
from gemopt.formats.files import as_array, load_torch
from gemopt.traces import COUNT_LIMIT, Phase, Tokens, Traces, count_assignments

# ForwardMode of sglang/srt/model_executor/forward_batch_info.py; all others are speculative or idle passes.
_PHASES = {1: Phase.PREFILL, 2: Phase.DECODE, 3: Phase.MIXED, 5: Phase.DECODE, 8: Phase.PREFILL}
_RESPONSES = (".json", ".jsonl")


def read_traces(paths: Sequence[Path], options: TraceOptions) -> Recording | Loaded:
    """Read dumps (.pt files or their folder) or responses (.json, .jsonl)."""
    files = files_of(paths, ".pt", *_RESPONSES, prefer="expert_distribution_recorder_")
    kinds = {path.suffix in _RESPONSES for path in files}
    if len(kinds) > 1:
        raise InputError("PATHS", "dumps and responses together", "one kind of recording at a time")
    if kinds == {True}:
        return responses.read_traces(files, options, raw_int32=True)
    files = sorted(files, key=_time)
    loaded = {files[0]: _load(files[0])}
    if "logical_count" in loaded[files[0]]:
        return _read_stat(files)
    return _read_detail(files, loaded, options)


def _load(path: Path) -> dict[str, Any]:
    data = load_torch(path)
    if not isinstance(data, dict) or not ("logical_count" in data or "records" in data):
        keys = ", ".join(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise InputError(str(path), keys, "a recorder dump with logical_count or records is needed")
    return data


def _time(path: Path) -> tuple[float, str]:
    found = re.search(r"_(\d+(?:\.\d+)?)(?:_\d+)?$", path.stem)
    return (float(found[1]) if found else 0.0, path.name)


def _read_stat(files: list[Path]) -> Recording:
    notes: list[str] = []

    def blocks() -> Iterator[IntArray]:
        notes.clear()
        for path in files:
            data = _load(path)
            if "logical_count" not in data:
                raise InputError(str(path), "records", "stat dumps only", "import each kind apart")
            counts = as_array(data["logical_count"], name=f"{path}: logical_count", ndim=3)
            if not counts.size:
                continue
            kept, full = _in_time_order(counts)
            if full:
                notes.append(f"{path.name}: the ring buffer is full; if it wrapped, its steps are rotated in time")
            if len(kept):
                yield kept

    return Recording(blocks=blocks, notes=notes)


def _in_time_order(counts: IntArray) -> tuple[IntArray, bool]:
    """Used rows of a ring buffer, oldest first when the unused rows show where it starts; whether all are used.

    The write position is not reset between dumps, so a buffer may begin in the middle.
    """
    used: NDArray[np.bool_] = np.asarray(counts.reshape(len(counts), -1).any(axis=1))
    if used.all():
        return counts, True
    if used[0] and used[-1]:
        gaps = np.flatnonzero(used[:-1] & ~used[1:])
        if len(gaps) == 1:
            start = int(np.flatnonzero(~used)[-1]) + 1
            return np.concatenate([counts[start:], counts[: int(gaps[0]) + 1]]), False
    first, last = (int(np.flatnonzero(used)[i]) for i in (0, -1)) if used.any() else (0, -1)
    inner = used[first : last + 1]
    return (counts[first : last + 1] if inner.all() else counts[used]), False


@dataclass
class _Detail:
    """Sums over the ranks' files, by forward pass: [rows, P] physical counts, and what is known of the pass."""

    map_LP: NDArray[np.int64]
    totals: dict[int, NDArray[np.int32]] = field(default_factory=dict)
    seen: dict[int, int] = field(default_factory=dict)
    phases: dict[int, int] = field(default_factory=dict)
    ranks: set[int] = field(default_factory=set)
    taken: set[tuple[int, int]] = field(default_factory=set)
    tokens: list[tuple[int, int, IntArray, IntArray]] = field(default_factory=list)
    agree: bool = True  # every rank recorded the same counts in every pass so far


def _read_detail(files: list[Path], loaded: dict[Path, Any], options: TraceOptions) -> Recording | Loaded:
    detail: _Detail | None = None
    for path in files:
        data = loaded.pop(path, None) or _load(path)
        map_LP = _map_of(path, data)
        detail = detail or _Detail(map_LP=map_LP.astype(np.int64))
        _check_map(path, map_LP, detail.map_LP)
        for record in data["records"]:
            _add(path, record, detail, keep_tokens=options.keep_tokens)
    if detail is None or not detail.totals:
        raise InputError(str(files[0]), "no records", "a recording of at least one forward pass")
    passes = _whole_passes(detail, options, files[0].parent)
    copies = len(detail.ranks)
    notes = [f"{len(passes)} forward passes of {copies} ranks"]
    if len(passes) < len(detail.totals):
        notes.append(f"{len(detail.totals) - len(passes)} passes that some ranks did not record were left out")
    divisor = copies if copies > 1 and detail.agree else 1
    if divisor > 1:
        notes.append(f"all {copies} ranks recorded the same counts (they saw the same tokens): counted once")
        detail.tokens = [t for t in detail.tokens if t[1] == min(detail.ranks)]
    logical = _to_logical([detail.totals.pop(number) for number in passes], detail.map_LP, divisor)
    used: NDArray[np.bool_] = np.asarray(logical.any(axis=(1, 2)))
    passes = [number for number, kept in zip(passes, used, strict=True) if kept]
    logical = logical if used.all() else logical[used]
    phase = np.array([detail.phases.get(number, -1) for number in passes], dtype=np.int64)
    known = None if (phase < 0).any() else phase
    if options.keep_tokens:
        return _with_tokens(detail, passes, logical, known, options)
    return Recording(blocks=lambda: iter([logical]), phase=known, notes=notes)


def _map_of(path: Path, data: dict[str, Any]) -> IntArray:
    if "records" not in data or not isinstance(data["records"], list):
        raise InputError(f"{path}: records", None, "per_pass or per_token dumps only", "import each kind apart")
    name = f"{path}: last_physical_to_logical_map"
    map_LP = as_array(data.get("last_physical_to_logical_map"), name=name, ndim=2)
    if not map_LP.size or int(map_LP.min()) < 0 or int(map_LP.max()) >= map_LP.shape[1]:
        raise InputError(name, f"shape {map_LP.shape}", "experts >= 0, fewer than the slots")
    return map_LP


def _integer(path: Path, record: Any, key: str, limit: int) -> int:
    value = record.get(key) if isinstance(record, dict) else None
    if type(value) is not int or not 0 <= value < limit:
        raise InputError(f"{path}: records.{key}", value, f"a whole number from 0 to {limit - 1}")
    return value


def _check_map(path: Path, map_LP: IntArray, expected_LP: IntArray) -> None:
    if map_LP.shape != expected_LP.shape or (map_LP != expected_LP).any():
        raise InputError(
            f"{path}: last_physical_to_logical_map",
            "another map than in the other files",
            "one map for all dumps",
            "the folder mixes runs, or experts moved while recording: record again without --enable-eplb",
        )


def _add(path: Path, record: Any, detail: _Detail, *, keep_tokens: bool) -> None:
    number, rank = _integer(path, record, "forward_pass_id", 1 << 62), _integer(path, record, "rank", 1 << 16)
    if record.get("gatherer_key", "primary") != "primary":
        return
    if (number, rank) in detail.taken:
        raise InputError(
            f"{path}: records",
            f"forward pass {number} of rank {rank} twice",
            "each pass once per rank",
            "the folder mixes runs: import them apart",
        )
    detail.taken.add((number, rank))
    detail.ranks.add(rank)
    counts = _record_counts(path, record, detail.map_LP)
    if number not in detail.totals:
        detail.totals[number] = counts.astype(np.int32)
    else:
        detail.agree = detail.agree and bool((detail.totals[number] == detail.seen[number] * counts).all())
        detail.totals[number] += counts
    detail.seen[number] = detail.seen.get(number, 0) + 1
    mode = record.get("forward_mode")
    if type(mode) is int and mode in _PHASES and counts.any():
        here = int(_PHASES[mode])
        detail.phases[number] = here if detail.phases.get(number, here) == here else int(Phase.MIXED)
    if keep_tokens:
        detail.tokens.append((number, rank, *_record_tokens(path, record, detail.map_LP)))


def _record_counts(path: Path, record: dict[str, Any], map_LP: IntArray) -> IntArray:
    name = f"{path}: global_physical_count"
    counts = as_array(record.get("global_physical_count"), name=name, ndim=2)
    if counts.shape != map_LP.shape:
        raise InputError(name, f"shape {counts.shape}", f"shape {map_LP.shape}, that of the map")
    if int(counts.min()) < 0 or int(counts.max()) > COUNT_LIMIT // 4096:
        raise InputError(name, int(counts.max()), f"counts from 0 to {COUNT_LIMIT // 4096}")
    return counts


def _record_tokens(path: Path, record: dict[str, Any], map_LP: IntArray) -> tuple[IntArray, IntArray]:
    """[N, rows, K] logical ids (-1: none) and [N] token ids of a per_token record."""
    if "topk_ids_of_layer" not in record:
        raise InputError(f"{path}: topk_ids_of_layer", None, "--keep-tokens needs per_token dumps")
    ids = as_array(record["topk_ids_of_layer"], name=f"{path}: topk_ids_of_layer", ndim=3)
    if len(ids) != len(map_LP) or (ids.size and int(ids.max()) >= map_LP.shape[1]):
        raise InputError(f"{path}: topk_ids_of_layer", f"shape {ids.shape}", f"slots below {map_LP.shape[1]}")
    logical = np.stack([np.append(row, -1)[np.maximum(layer, -1)] for row, layer in zip(map_LP, ids, strict=True)])
    words = integer_array(record.get("input_ids"), name=f"{path}: input_ids", ndim=1)
    if words.shape != (ids.shape[1],):
        raise InputError(f"{path}: input_ids", f"{words.shape}", f"one per token, {ids.shape[1]}")
    return logical.transpose(1, 0, 2), words


def _whole_passes(detail: _Detail, options: TraceOptions, folder: Path) -> list[int]:
    """Forward passes that every rank recorded, in order; `InputError` when the file of a rank is missing."""
    ranks = sorted(detail.ranks)
    expected = options.num_ranks or ranks[-1] + 1
    missing = sorted(set(range(expected)) - detail.ranks)
    if missing or len(ranks) > expected:
        raise InputError(
            f"{folder}: ranks",
            ", ".join(map(str, ranks)),
            f"a dump of each of the {expected} ranks",
            f"rank {missing[0]} is missing" if missing else "give the right --ep",
        )
    whole = sorted(number for number, seen in detail.seen.items() if seen == len(ranks))
    if not whole:
        raise InputError(
            f"{folder}: forward_pass_id",
            "no pass that all ranks recorded",
            "dumps of one run",
            "the folder mixes runs: import them apart",
        )
    return whole


def _to_logical(physical: list[NDArray[np.int32]], map_LP: NDArray[np.int64], divisor: int) -> NDArray[np.int32]:
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


def _with_tokens(
    detail: _Detail, passes: list[int], counts: IntArray, phase: IntArray | None, options: TraceOptions
) -> Loaded:
    position = {number: step for step, number in enumerate(passes)}
    kept = sorted((t for t in detail.tokens if t[0] in position and len(t[3])), key=lambda t: t[:2])
    if not kept:
        raise InputError("topk_ids_of_layer", "no tokens", "a per_token recording with tokens")
    check_sizes(options, where="topk_ids_of_layer", layers=counts.shape[1], experts=counts.shape[2])
    layers = list(options.layer_ids or np.flatnonzero(counts.any(axis=(0, 2))).tolist())
    ids = np.concatenate([t[2][:, layers] for t in kept])
    width = int((ids >= 0).any(axis=(0, 1)).sum())
    step = np.repeat([position[t[0]] for t in kept], [len(t[3]) for t in kept])
    tokens = Tokens(
        ids=ids[:, :, :width],
        step_of_token=step,
        source_rank=np.repeat([t[1] for t in kept], [len(t[3]) for t in kept]),
        token_ids=np.concatenate([t[3] for t in kept]),
    )
    if (count_assignments(tokens.ids, step, len(counts), counts.shape[2]) != counts[:, layers]).any():
        raise InputError("topk_ids_of_layer", "ids that do not give global_physical_count", "an uncorrupted recording")
    traces = Traces(
        counts=counts[:, layers],
        layer_ids=tuple(layers),
        num_hidden_layers=counts.shape[1],
        top_k=options.top_k or width,
        model=options.model,
        phase=phase,
        tokens=tokens,
    )
    return Loaded(traces=traces)

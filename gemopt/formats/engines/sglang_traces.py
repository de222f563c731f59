"""SGLang's recordings: stat and stat_approx dumps, and which reader takes the others.

Formats: `sglang/srt/eplb/expert_distribution.py` of SGLang 0.5.23 (accumulators and gatherers), and what
`--init-expert-location` takes as statistics (`expert_location.py`, `logical_count` of two or three dimensions, .pt or
.json). stat files hold logical counts of all ranks; the detailed ones are read by `sglang_detail`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError
from gemopt.formats.counts import csv_files
from gemopt.formats.engine import IntArray, Loaded, Recording, TraceOptions
from gemopt.formats.engines.sglang_detail import read_detail
from gemopt.formats.files import bounded_json, load_torch, whole_numbers
from gemopt.formats.findings import ranges, without_drafts
from gemopt.formats.pipelines import refuse_named_stages, refuse_stages_in_time
from gemopt.formats.recorded_files import files_of
from gemopt.formats.responses import replayed as responses
from gemopt.traces.arrays import refuse_narrow
from gemopt.traces.axes import IN_ORDER, other_order
from gemopt.traces.files import meant
from gemopt.words import counted

KEY = "logical_count"
OWN = {KEY, "rank", "average_utilization_rate_over_window", "last_physical_to_logical_map", "physical_to_logical_map"}
RANKS = ("ep_rank", "dp_rank", "attn_dp_rank", "tp_rank", "rank")  # SGLang's is of one, whose counts are all ranks'
SUFFIXES = (".pt", *csv_files.SUFFIXES, ".json", ".jsonl")


def read_traces(paths: Sequence[Path], options: TraceOptions) -> Recording | Loaded:
    """Read dumps (.pt files or their folder), statistics (.json), count tables (.csv) or responses (.json, .jsonl)."""
    files = files_of(paths, *SUFFIXES, prefer="expert_distribution_recorder_")
    files = sorted(files, key=_time)
    dumps = [path for path in files if path.suffix == ".pt"]  # the readers look at the others again
    kinds = {path: _kind(path) for path in files if path.suffix != ".pt" or path == dumps[0]}
    if len(set(kinds.values())) > 1:
        found = " and ".join(sorted(set(kinds.values())))
        raise InputError("PATHS", found, "one kind of recording at a time", "import each kind apart")
    match kinds[files[0]]:
        case "responses":
            return responses.read_traces(files, options, raw_int32=True)
        case "count tables":
            return csv_files.read_traces(files, options)
        case "stat dumps":
            options.refuse_unused("stat dumps, which count all ranks together")
            return _read_stat(files, options)
    return read_detail(files, options)


def _kind(path: Path) -> str:
    if path.name.endswith((".jsonl", ".jsonl.gz", ".json.gz")):
        return "responses"
    if path.suffix in csv_files.SUFFIXES:
        return "count tables"
    data = load_torch(path) if path.suffix == ".pt" else bounded_json(path)
    if isinstance(data, dict) and KEY in data:
        return "stat dumps"
    if path.suffix == ".json":
        return "responses"
    if isinstance(data, dict) and "records" in data:
        return "detailed dumps"
    keys = ", ".join(map(str, data)) if isinstance(data, dict) else type(data).__name__
    hint = "" if isinstance(data, dict) else "counts of experts: --from array; experts of tokens: --from tokens"
    raise InputError(str(path), keys, "a recorder dump with logical_count or records is needed", hint)


def _time(path: Path) -> float:
    found = re.search(r"_(\d+(?:\.\d+)?)(?:_\d+)?$", path.stem)
    return float(found[1]) if found else 0.0


@dataclass(frozen=True)
class _Stat:
    path: Path
    digest: bytes
    layers: frozenset[int]  # with assignments
    added_up: bool  # two dimensions: all steps in one
    rank: str | None  # that wrote it, if it says so
    sums_TL: IntArray
    unread: tuple[str, ...]  # what else the file says

    @classmethod
    def of(cls, path: Path, options: TraceOptions) -> _Stat:
        counts, added_up, said = _counts(path)
        if "rank" not in said:  # which SGLang's recorder writes: made of something else
            _check_made(path, counts, options)
        layers = frozenset(np.flatnonzero(counts.any(axis=(0, 2))).tolist())
        digest = hashlib.sha256(np.ascontiguousarray(counts).data).digest()
        unread = tuple(name for name in said if name not in OWN)
        rank = next((str(np.asarray(said[name])) for name in RANKS if name in said), None)
        return cls(path, digest, layers, added_up, rank, counts.sum(axis=2, dtype=np.int64), unread)


def _counts(path: Path) -> tuple[IntArray, bool, dict[str, Any]]:
    """[steps, rows, E] counts of a file, whether they are a sum over the steps, and all that the file says."""
    data = load_torch(path) if path.suffix == ".pt" else bounded_json(path)
    if not isinstance(data, dict) or KEY not in data:
        raise InputError(f"{path}: {KEY}", None, "stat dumps only", "import each kind apart")
    if known := [str(key) for key in data if meant(str(key))]:
        limit, hint = "a row for every decoder layer", "save the rows as an array: --from array takes --layer-ids"
        raise InputError(f"{path}: {known[0]}", f"beside {KEY}", limit, hint)
    counts = whole_numbers(data[KEY], name=f"{path}: {KEY}", ndims=(2, 3))
    added_up = counts.ndim == 2
    return counts[None] if added_up else counts, added_up, {str(key): value for key, value in data.items()}


def _check_made(path: Path, counts: IntArray, options: TraceOptions) -> None:
    """Raise where the numbers [T, L, E] of a statistic tell that its axes are turned, or that they wrapped."""
    refuse_narrow(f"{path}: {KEY}", counts)
    told = options.num_experts is not None and options.num_hidden_layers is not None
    if not told and (order := other_order(counts)):
        hint = f"{IN_ORDER}, or give --num-experts and --num-hidden-layers"
        raise InputError(f"{path}: {KEY}", order, "[layers, experts], or [steps, layers, experts]", hint)


def _read_stat(files: list[Path], options: TraceOptions) -> Recording:
    known: dict[bytes, _Stat] = {}
    first_notes: list[str] = []
    for stat in (_Stat.of(path, options) for path in files):
        if stat.digest in known and stat.layers:
            first_notes.append(f"{stat.path.name} is {known[stat.digest].path.name} again: counted once")
        known.setdefault(stat.digest, stat)
    refuse_named_stages([(stat.path.name, stat.layers) for stat in known.values()], options.no_pipeline)
    if not options.no_pipeline:
        refuse_stages_in_time([(stat.path.name, stat.sums_TL) for stat in known.values()])
    groups = _stages([stat for stat in known.values() if stat.layers])
    if groups and len(groups[0]) > 1:
        layers = "; ".join(ranges(stat.layers) for stat in groups[0])
        first_notes.append(f"{len(groups[0])} pipeline stages joined by layer: {layers}")
    if unread := sorted({name for stat in known.values() for name in stat.unread}):
        first_notes.append(f"{', '.join(unread)} beside {KEY} left unread")
    sums = [stat.path.name for stat in known.values() if stat.added_up]
    if sums:
        first_notes.append(f"{sums[0]} holds counts added up: a single step, so how they vary in time is not known")
    notes = list(first_notes)

    def blocks() -> Iterator[IntArray]:
        notes[:] = first_notes
        before: list[int] = []
        rings: list[str] = []
        for group in groups:
            names = " and ".join(stat.path.name for stat in group)
            kept, full = _in_time_order(_joined(group))
            if full and not group[0].added_up:
                rings.append(names)
            steps = [hash(step.tobytes()) for step in kept]
            again = _overlap(before, steps)
            if again:
                notes.append(f"{counted(again, 'first step')} of {names} from the end of the dump before: counted once")
            before = steps
            if len(kept) > again:
                yield without_drafts(kept[again:], options, notes)
        if rings:
            more = f" and {len(rings) - 1} more" if rings[1:] else ""
            notes.append(f"{rings[0]}{more}: the ring buffer is full; if it wrapped, its steps are rotated in time")

    return Recording(blocks=blocks, notes=notes)


def _stages(stats: list[_Stat]) -> list[list[_Stat]]:
    """The files in time order, those of pipeline stages (no layer in common) side by side."""
    stages: list[list[_Stat]] = []
    used: list[set[int]] = []
    for stat in stats:
        at = [i for i, layers in enumerate(used) if layers & stat.layers]
        if not at:
            stages.append([stat])
            used.append(set(stat.layers))
        else:
            first = stages[at[0]][0]
            if len({None, stat.rank, first.rank}) > 2:
                found = f"{stat.rank}, and {first.rank} in {first.path.name}"
                limit, hint = "dumps of one rank: they count all ranks together", "add up ranks that counted their own"
                raise InputError(f"{stat.path}: rank", found, limit, hint)
            stages[at[0]].append(stat)
            used[at[0]] |= stat.layers
    for i, layers in enumerate(used):
        for other in used[:i]:
            if layers & other:
                found = f"layers {ranges(layers & other)} in some of the files of two pipeline stages"
                raise InputError(KEY, found, "stages without a common layer", "import the runs apart")
    lengths = sorted({len(stage) for stage in stages})
    if len(lengths) > 1:
        found = f"{lengths[0]} and {lengths[-1]} dumps of layers that do not overlap"
        raise InputError(KEY, found, "as many dumps of every pipeline stage", "import the runs apart")
    return [list(group) for group in zip(*stages, strict=True)]


def _joined(group: list[_Stat]) -> IntArray:
    """[steps, rows, E] counts of the stages of a pipeline together."""
    total, *_ = _counts(group[0].path)
    for stat in group[1:]:
        counts, *_ = _counts(stat.path)
        steps, others = (np.asarray(c).any(axis=(1, 2)) for c in (total, counts))
        if counts.shape != total.shape or (steps != others).any():
            raise InputError(
                f"{stat.path}: {KEY}",
                f"{int(others.sum())} steps, {counts.shape}",
                f"the {int(steps.sum())} steps of {group[0].path.name}, another stage of the pipeline",
                "import the runs apart",
            )
        total = total + counts
    return total


def _overlap(before: list[int], steps: list[int]) -> int:
    """How many steps at the start (two or more) are those at the end of the dump before."""
    for count in range(min(len(before), len(steps)), 1, -1):
        if before[-count] == steps[0] and before[-count:] == steps[:count]:
            return count
    return 0


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

"""SGLang's per_pass and per_token dumps: physical counts, one file per rank, summed over the ranks of a forward pass.

Formats: `sglang/srt/eplb/expert_distribution.py` of SGLang 0.5.23 and `eplb_simulator/reader.py`. Each stage of a
pipeline writes files of its own, with counts in its layers only; the stages are put together by layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError
from gemopt.formats.engine import IntArray, Loaded, Recording, TraceOptions, check_sizes
from gemopt.formats.engines.sglang_records import (
    check_map,
    counted_ids,
    integer,
    map_of,
    phase_of,
    record_counts,
    record_tokens,
    to_logical,
)
from gemopt.formats.files import load_torch
from gemopt.formats.findings import Own, own_counts, ranges, without_drafts
from gemopt.formats.pipelines import refuse_named_stages, refuse_stages
from gemopt.traces import Phase, Tokens, Traces, count_assignments
from gemopt.words import counted

TokenRows = tuple[IntArray, IntArray]  # [N, rows, K] logical ids, [N] token ids


@dataclass
class _Stage:
    """Sums over the files of one pipeline stage, by forward pass: [rows, P] physical counts."""

    layers: set[int] = field(default_factory=set)
    totals: dict[int, NDArray[np.int32]] = field(default_factory=dict)
    seen: dict[int, int] = field(default_factory=dict)
    phases: dict[int, int] = field(default_factory=dict)
    digests: dict[tuple[int, int], int] = field(default_factory=dict)  # 0 where nothing was counted
    sums: dict[tuple[int, int], IntArray] = field(default_factory=dict)  # [rows] assignments
    words: dict[tuple[int, int], int] = field(default_factory=dict)  # what tells token ids apart, where recorded
    tokens: dict[tuple[int, int], TokenRows] = field(default_factory=dict)
    again: int = 0
    counted: bool = False  # from ids: the file has no counts
    differ: int = 0  # records whose ids make other counts

    @property
    def ranks(self) -> list[int]:
        return sorted({rank for _, rank in self.digests})

    @property
    def whole(self) -> set[int]:
        """The passes that every rank recorded."""
        return {number for number, seen in self.seen.items() if seen == len(self.ranks)}

    @cached_property
    def own(self) -> Own:
        """The ranks that saw tokens of their own, once all files are there."""
        passes = sorted(self.whole)
        recorded = {rank: tuple(self.digests[number, rank] for number in passes) for rank in self.ranks}
        return own_counts({rank: counts if any(counts) else None for rank, counts in recorded.items()})

    def doubt(self, no_pipeline: bool) -> str:
        """A note where its ranks may be stages that number their layers from 0; raises where they must be."""
        passes, ranks = sorted(self.whole), self.own.ranks
        sums_RTL = np.stack([np.stack([self.sums[number, rank] for number in passes]) for rank in ranks])
        words = [{self.words.get((number, rank)) for rank in ranks} for number in passes]
        unknown = any(None in each for each in words)
        own_tokens = None if unknown else any(len(each) == len(ranks) for each in words)
        return refuse_stages(ranks, sums_RTL, no_pipeline, own_tokens)

    def add(self, path: Path, record: Any, counts: IntArray) -> bool:
        """Add the counts of a pass of a rank; False when they were there already."""
        number, rank = _key(path, record)
        digest = (hash(counts.tobytes()) or 1) if counts.any() else 0
        if (number, rank) in self.digests:
            if self.digests[number, rank] != digest:
                raise InputError(
                    f"{path}: records",
                    f"forward pass {number} of rank {rank} twice, with other counts",
                    "each pass once per rank",
                    "the folder mixes runs, or stages of a pipeline that number their layers from 0: import them apart",
                )
            self.again += 1
            return False
        self.digests[number, rank] = digest
        self.sums[number, rank] = counts.sum(axis=1, dtype=np.int64)
        if isinstance(record.get("input_ids"), list):
            self.words[number, rank] = hash(tuple(record["input_ids"]))
        if number not in self.totals:
            self.totals[number] = counts.astype(np.int32)
        else:
            self.totals[number] += counts
        self.seen[number] = self.seen.get(number, 0) + 1
        here = phase_of(record) if counts.any() else None
        if here is not None:
            self.phases[number] = here if self.phases.get(number, here) == here else int(Phase.MIXED)
        return True


def read_detail(files: list[Path], options: TraceOptions) -> Recording | Loaded:
    """Read the dumps of all ranks and stages of one run."""
    options.refuse_unused("dumps, whose steps say their phase", "num_ranks", "keep_tokens")
    stages: list[_Stage] = []
    idle: list[tuple[Path, list[tuple[Any, IntArray]]]] = []
    map_LP: NDArray[np.int64] | None = None
    others = 0
    layers_of: list[tuple[str, set[int]]] = []
    for path in files:
        data = load_torch(path)
        found_LP = map_of(path, data)
        map_LP = found_LP.astype(np.int64) if map_LP is None else map_LP
        check_map(path, found_LP, map_LP)
        records = [r for r in data["records"] if not isinstance(r, dict) or _is_primary(r)]
        others += len(data["records"]) - len(records)
        known = [(record, record_counts(path, record, map_LP)) for record in records]
        layers = {int(i) for _, counts in known for i in np.flatnonzero(counts.any(axis=1))}
        layers_of.append((path.name, layers))
        if layers:
            _add(_stage_of(path, stages, layers), path, known, map_LP, options)
        else:
            idle.append((path, known))
    refuse_named_stages(layers_of, options.no_pipeline)
    if map_LP is None or not stages:
        raise InputError(str(files[0]), "no assignments in any record", "a recording of at least one forward pass")
    for path, known in idle:
        if len(stages) > 1 and known:
            raise InputError(str(path), "no assignments", "which pipeline stage it is of", "leave the file out")
        _add(stages[0], path, known, map_LP, options)
    unread = [f"left unread: {counted(others, 'record')} of parts of a batch (two-batch overlap)"] if others else []
    return _result(stages, map_LP, options, files[0].parent, unread)


def _is_primary(record: dict[str, Any]) -> bool:
    return bool(record.get("gatherer_key", "primary") == "primary")


def _key(path: Path, record: Any) -> tuple[int, int]:
    return integer(path, record, "forward_pass_id", 1 << 62), integer(path, record, "rank", 1 << 16)


def _stage_of(path: Path, stages: list[_Stage], layers: set[int]) -> _Stage:
    """The stage that has one of the layers, a new one if none has."""
    found = [stage for stage in stages if stage.layers & layers]
    if len(found) > 1:
        hint = "the folder mixes runs: import them apart"
        raise InputError(str(path), f"layers {ranges(layers)}", "layers of a single pipeline stage", hint)
    if not found:
        stages.append(_Stage())
        found = stages[-1:]
    found[0].layers |= layers
    return found[0]


def _add(
    stage: _Stage, path: Path, counted: list[tuple[Any, IntArray]], map_LP: NDArray[np.int64], options: TraceOptions
) -> None:
    for record, counts in counted:
        stage.counted |= record.get("global_physical_count") is None
        if "topk_ids_of_layer" in record:
            stage.differ += not np.array_equal(counted_ids(path, record, map_LP), counts)
        if stage.add(path, record, counts) and options.keep_tokens:
            stage.tokens[_key(path, record)] = record_tokens(path, record, map_LP)


def _result(
    stages: list[_Stage], map_LP: NDArray[np.int64], options: TraceOptions, folder: Path, unread: list[str]
) -> Recording | Loaded:
    _check_ranks(stages, options, folder)
    passes = _whole_passes(stages, folder)
    doubts = [note for stage in stages if (note := stage.doubt(options.no_pipeline))]
    logical = sum(
        to_logical([stage.totals.pop(number) for number in passes], map_LP, stage.own.times) for stage in stages
    )
    assert not isinstance(logical, int)
    notes = _notes(stages, len(passes)) + unread + doubts
    logical = without_drafts(logical, options, notes)
    used: NDArray[np.bool_] = np.asarray(logical.any(axis=(1, 2)))
    passes = [number for number, kept in zip(passes, used, strict=True) if kept]
    logical = logical if used.all() else logical[used]
    by_pass = [{stage.phases[number] for stage in stages if number in stage.phases} for number in passes]
    phase = np.array([found.pop() if len(found) == 1 else -1 for found in by_pass], dtype=np.int64)
    known = None if (phase < 0).any() else phase
    if options.keep_tokens:
        return Loaded(traces=_with_tokens(stages, passes, logical, known, options), notes=tuple(notes))
    return Recording(blocks=lambda: iter([logical]), phase=known, notes=notes)


def _notes(stages: list[_Stage], num_passes: int) -> list[str]:
    ranks = len({rank for stage in stages for rank in stage.ranks})
    notes = [f"{counted(num_passes, 'forward pass')} of {counted(ranks, 'rank')}"]
    every = max(len(stage.seen) for stage in stages)
    said = [
        (every > num_passes, f"left out: {counted(every - num_passes, 'pass')} that some ranks did not record"),
        (
            len(stages) > 1,
            f"{len(stages)} pipeline stages joined by layer: {'; '.join(ranges(s.layers) for s in stages)}",
        ),
        (stages[0].own.note, stages[0].own.note),
        (sum(s.again for s in stages), f"{counted(sum(s.again for s in stages), 'record')} came twice: counted once"),
        (
            sum(s.differ for s in stages),
            f"{counted(sum(s.differ for s in stages), 'record')} with ids of other counts: global_physical_count taken",
        ),
        (any(s.counted for s in stages), "no global_physical_count in the records: counted from topk_ids_of_layer"),
    ]
    return notes + [text for wanted, text in said if wanted]


def _check_ranks(stages: list[_Stage], options: TraceOptions, folder: Path) -> None:
    """Every rank of every stage must have dumped; ranks are numbered within a stage, or through the whole world."""
    ranks = [stage.ranks for stage in stages]
    union = sorted({rank for each in ranks for rank in each})
    apart = len(union) == sum(map(len, ranks))
    alike = len({len(each) for each in ranks}) == 1
    size = len(ranks[0]) if alike and apart and len(stages) > 1 else 0
    expected = options.num_ranks or union[-1] + 1
    if size and options.num_ranks == size:  # --ep names the ranks of a stage
        expected = len(union)
    missing = sorted(set(range(expected)) - set(union))
    if missing or len(union) > expected:
        hint = f"rank {missing[0]} is missing" if missing else "give the right --ep"
        found = ", ".join(map(str, union))
        raise InputError(f"{folder}: ranks", found, f"a dump of each of the {expected} ranks", hint)
    if not alike or not (apart or all(each == union for each in ranks)):
        short = min(stages, key=lambda stage: len(stage.ranks))
        raise InputError(
            f"{folder}: ranks of layers {ranges(short.layers)}",
            ", ".join(map(str, short.ranks)),
            "as many ranks in every pipeline stage",
            "a dump is missing",
        )
    if len(stages) > 1 and len({stage.own.times for stage in stages}) > 1:
        raise InputError(
            f"{folder}: counts",
            "equal on all ranks of one pipeline stage, not of another",
            "stages of one run",
            "the folder mixes runs: import them apart",
        )


def _whole_passes(stages: list[_Stage], folder: Path) -> list[int]:
    """Forward passes that every rank of every stage recorded, in order."""
    whole = set.intersection(*(stage.whole for stage in stages))
    if not whole:
        raise InputError(
            f"{folder}: forward_pass_id",
            "no pass that all ranks recorded",
            "dumps of one run",
            "the folder mixes runs: import them apart",
        )
    return sorted(whole)


def _tokens_of(stages: list[_Stage]) -> dict[tuple[int, int], TokenRows]:
    """Token rows by pass and rank; the stages of a pipeline compute the same tokens, each in its layers."""
    first = stages[0]
    joined = {key: rows for key, rows in first.tokens.items() if key[1] in first.own.ranks}
    for stage in stages[1:]:
        rank_of = dict(zip(first.ranks, stage.ranks, strict=True))
        for (number, rank), (ids, words) in joined.items():
            other = stage.tokens.get((number, rank_of[rank]))
            if other is None or other[0].shape != ids.shape or (other[1] != words).any():
                raise InputError("input_ids", f"pass {number}, rank {rank}", "the same tokens in every pipeline stage")
            joined[number, rank] = np.maximum(ids, other[0]), words
    return joined


def _with_tokens(
    stages: list[_Stage], passes: list[int], counts: IntArray, phase: IntArray | None, options: TraceOptions
) -> Traces:
    position = {number: step for step, number in enumerate(passes)}
    wanted = {key: rows for key, rows in _tokens_of(stages).items() if key[0] in position and len(rows[1])}
    if not wanted:
        raise InputError("topk_ids_of_layer", "no tokens", "a per_token recording with tokens")
    kept = sorted(wanted.items())
    check_sizes(options, where="topk_ids_of_layer", layers=counts.shape[1], experts=counts.shape[2])
    layers = list(options.layer_ids or np.flatnonzero(counts.any(axis=(0, 2))).tolist())
    ids = np.concatenate([rows[:, layers] for _, (rows, _) in kept])
    width = int((ids >= 0).any(axis=(0, 1)).sum())
    if options.top_k not in (None, width):
        raise InputError("topk_ids_of_layer", f"{width} experts per token", f"--top-k is {options.top_k}")
    sizes = [len(words) for _, (_, words) in kept]
    step = np.repeat([position[number] for (number, _), _ in kept], sizes)
    tokens = Tokens(
        ids=ids[:, :, :width],
        step_of_token=step,
        source_rank=np.repeat([rank for (_, rank), _ in kept], sizes),
        token_ids=np.concatenate([words for _, (_, words) in kept]),
    )
    if (count_assignments(tokens.ids, step, len(counts), counts.shape[2]) != counts[:, layers]).any():
        raise InputError("topk_ids_of_layer", "ids that do not give global_physical_count", "an uncorrupted recording")
    return Traces(
        counts=counts[:, layers],
        layer_ids=tuple(layers),
        num_hidden_layers=counts.shape[1],
        top_k=width,
        model=options.model,
        phase=phase,
        tokens=tokens,
    )

"""TensorRT-LLM's expert statistic: one file per rank, logical counts, key `{iteration}_{layer}`.

Format: `tensorrt_llm/_torch/expert_statistic.py`. With pipeline parallelism each rank records the layers of its stage.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError
from gemopt.formats.engine import IntArray, Recording, TraceOptions
from gemopt.formats.files import bounded_json, safetensors_rows
from gemopt.formats.findings import own_counts, ranges
from gemopt.formats.pipelines import refuse_stages
from gemopt.traces import COUNT_LIMIT
from gemopt.words import counted

META, SUFFIXES = "meta_info.json", (".json", ".safetensors")
_KEY = re.compile(r"\d{1,15}_\d{1,6}", re.ASCII)


def read_traces(paths: Sequence[Path], options: TraceOptions) -> Recording:
    """Read a folder of expert statistics: `meta_info.json` and `rank{r}.safetensors`, summed over the ranks."""
    options.refuse_unused("expert statistics", "num_ranks")
    folder = _folder(paths, options)
    meta = bounded_json(folder / META, limit_bytes=1 << 20)
    experts, top_k = (_positive(folder, meta, key) for key in ("num_experts", "num_experts_per_token"))
    stages = _stages(_rank_files(folder, options), experts)
    first = stages[0].iterations
    own = [own_counts(stage.digests) for stage in stages]
    if len({(len(stage.files), len(alike.ranks)) for stage, alike in zip(stages, own, strict=True)}) > 1:
        found = "; ".join(
            f"{counted(len(stage.files), 'rank')} ({alike.times} alike) of layers {ranges(stage.layers)}"
            for stage, alike in zip(stages, own, strict=True)
        )
        hint = "a file is missing, or the folder mixes runs: record again into an empty one"
        raise InputError(f"{folder}: rank*.safetensors", found, "as many of every pipeline stage", hint)
    added = zip(stages, own, strict=True)
    doubts = [refuse_stages(alike.ranks, stage.sums_of(alike.ranks), options.no_pipeline) for stage, alike in added]
    layers = np.concatenate([stage.layers for stage in stages])
    total = np.concatenate([s.total(experts, alike.ranks) for s, alike in zip(stages, own, strict=True)], axis=1)
    ranks = sum(len(stage.files) for stage in stages)
    notes = [f"iterations {first[0]} to {first[-1]} of {counted(ranks, 'rank')}"]
    if len(stages) > 1:
        parts = "; ".join(ranges(stage.layers) for stage in stages)
        notes.append(f"{len(stages)} pipeline stages joined by layer: {parts}")
    notes += [note for note in (own[0].note, doubts[0]) if note]
    hidden = options.num_hidden_layers
    target = layers < (layers[-1] + 1 if hidden is None else hidden)
    if not target.all():
        notes.append(f"layers from {hidden} on are draft layers: left out")
    summed = total[:, target]
    used = summed[summed.any(axis=(1, 2))]
    return Recording(
        blocks=lambda: iter([used] if len(used) else []),
        layer_ids=tuple(int(layer) for layer in layers[target]),
        top_k=top_k,
        num_hidden_layers=hidden,
        notes=notes,
    )


@dataclass
class _Stage:
    """The files of the ranks of one pipeline stage, and what tells their counts apart, by rank."""

    iterations: IntArray
    layers: IntArray
    files: dict[int, Path] = field(default_factory=dict)
    digests: dict[int, bytes | None] = field(default_factory=dict)
    sums: dict[int, IntArray] = field(default_factory=dict)  # [iterations, layers] assignments

    def add(self, rank: int, path: Path, experts: int) -> None:
        digest, sums = hashlib.sha256(), []
        for counts in self._blocks(path, experts):
            digest.update(counts.data)
            sums.append(counts.sum(axis=1, dtype=np.int64))
        self.files[rank], self.sums[rank] = path, np.concatenate(sums).reshape(-1, len(self.layers))
        self.digests[rank] = digest.digest() if self.sums[rank].any() else None

    def sums_of(self, ranks: list[int]) -> IntArray:
        """[ranks, iterations, layers] assignments."""
        return np.stack([self.sums[rank] for rank in ranks])

    def total(self, experts: int, ranks: list[int]) -> NDArray[np.int32]:
        """[iterations, layers, E] the counts of some ranks together."""
        total = np.zeros((len(self.iterations) * len(self.layers), experts), np.int32)
        for rank in ranks:
            start = 0
            for counts in self._blocks(self.files[rank], experts):
                total[start : start + len(counts)] += counts.astype(np.int32)
                start += len(counts)
        return total.reshape(len(self.iterations), len(self.layers), experts)

    def _blocks(self, path: Path, experts: int) -> Iterator[IntArray]:
        """The counts [rows, E] of a file by iteration and layer, a megabyte at a time, checked."""
        names, rows_of, rows = safetensors_rows(path, experts)
        order = rows_of[_grid_order(path, _keys(path, names), self.iterations, self.layers)]
        step = max(1, (1 << 17) // experts)
        for start in range(0, len(order), step):
            counts = rows[order[start : start + step]]
            low, high = int(counts.min()), int(counts.max())
            if low < 0 or high > COUNT_LIMIT // 4096:
                limit = f"counts from 0 to {COUNT_LIMIT // 4096}"
                raise InputError(f"{path}: counts", low if low < 0 else high, limit)
            yield counts


def _stages(files: dict[int, Path], experts: int) -> list[_Stage]:
    """The pipeline stages in the order of their layers: ranks that recorded other layers are of another stage."""
    stages: list[_Stage] = []
    for rank, path in files.items():
        iterations, layers = _steps_and_layers(path, experts)
        found = [stage for stage in stages if np.intersect1d(stage.layers, layers).size]
        if not found:
            if stages and not np.array_equal(iterations, stages[0].iterations):
                raise InputError(
                    f"{path}: iterations",
                    f"{iterations[0]} to {iterations[-1]}",
                    f"{stages[0].iterations[0]} to {stages[0].iterations[-1]}, as in {_first(stages[0].files).name}",
                    "the folder mixes runs: record again into an empty one",
                )
            stages.append(_Stage(iterations, layers))
            found = stages[-1:]
        found[0].add(rank, path, experts)
    stages.sort(key=lambda stage: int(stage.layers[0]))
    if any(np.diff(np.concatenate([stage.layers for stage in stages])) <= 0):
        parts = "; ".join(ranges(stage.layers) for stage in stages)
        raise InputError(str(_first(files).parent), f"layers {parts}", "pipeline stages one after the other")
    return stages


def _folder(paths: Sequence[Path], options: TraceOptions) -> Path:
    """The folder, or that of which all files are given."""
    if len(paths) == 1 and paths[0].is_dir():
        return paths[0]
    within = {path.parent for path in paths if path.name == META}
    if len(within) == 1 and {*_rank_files(folder := within.pop(), options).values(), folder / META} == set(paths):
        return folder
    raise InputError("PATHS", ", ".join(map(str, paths)), "one folder, that of EXPERT_STATISTIC_PATH")


def _first(files: dict[int, Path]) -> Path:
    return next(iter(files.values()))


def _positive(folder: Path, meta: Any, key: str) -> int:
    value = meta.get(key) if isinstance(meta, dict) else None
    if type(value) is not int or not 0 < value < 1 << 20:
        raise InputError(f"{folder / META}: {key}", value, "a whole number above 0")
    return value


def _rank_files(folder: Path, options: TraceOptions) -> dict[int, Path]:
    found = {int(m[1]): p for p in folder.iterdir() if (m := re.fullmatch(r"rank(\d{1,5})\.safetensors", p.name))}
    expected = options.num_ranks or max(found, default=0) + 1
    missing = sorted(set(range(expected)) - set(found))
    if missing or len(found) > expected:
        ranks = ", ".join(map(str, sorted(found))) or "none"
        hint = f"rank {missing[0]} is missing" if missing else "give the right --ep"
        raise InputError(f"{folder}: rank*.safetensors", ranks, f"a file of each of the {expected} ranks", hint)
    return dict(sorted(found.items()))


def _keys(path: Path, names: list[str]) -> IntArray:
    """[N, 2] iteration and layer of each array."""
    for name in names:
        if not _KEY.fullmatch(name):
            raise InputError(f"{path}: {name}", "a key", "keys of the form iteration_layer", "remove other files")
    if not names:
        raise InputError(str(path), "no counts", "at least one iteration")
    return np.array([name.split("_") for name in names], dtype=np.int64)


def _steps_and_layers(path: Path, experts: int) -> tuple[IntArray, IntArray]:
    names, _, _ = safetensors_rows(path, experts)
    keys = _keys(path, names)
    iterations, layers = np.unique(keys[:, 0]), np.unique(keys[:, 1])
    if iterations[-1] - iterations[0] + 1 != len(iterations):
        raise InputError(f"{path}: iterations", f"{len(iterations)} with gaps", "consecutive iterations")
    if len(keys) != len(iterations) * len(layers):
        raise InputError(f"{path}: keys", f"{len(keys)}", f"{len(iterations)} iterations x {len(layers)} layers")
    return iterations, layers


def _grid_order(path: Path, keys: IntArray, iterations: IntArray, layers: IntArray) -> IntArray:
    """Order of the keys by iteration and layer; they must be those of the first rank."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    wanted = np.stack(np.meshgrid(iterations, layers, indexing="ij"), axis=-1).reshape(-1, 2)
    if not np.array_equal(keys[order], wanted):
        raise InputError(
            f"{path}: keys",
            f"{len(keys)} of iterations {keys[:, 0].min()} to {keys[:, 0].max()}",
            f"every layer of iterations {iterations[0]} to {iterations[-1]}, as the first rank has",
            "the folder mixes runs: record again into an empty one",
        )
    return np.asarray(order)

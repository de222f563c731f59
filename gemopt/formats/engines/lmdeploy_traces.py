"""LMDeploy's recordings: responses with `routed_experts`, or what its recorder of expert loads dumps.

`_ExpertsDistributionRecorderImpl` of LMDeploy's main branch (2026) writes
`rank0_step100_expert_counts.pt`, {"counts": [MoE layers, experts] int64, "step": ..., ...}, and wrote
`rank0_step100_experts_counts.json`, the counts alone: all assignments of all ranks since the recording began. It counts
what kernels get, which are physical experts where `MoEGate` maps to them (`EPLBManager.topk_ids_logical_to_physical`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from gemopt.exceptions import InputError
from gemopt.formats.engine import IntArray, Loaded, Recording, TraceOptions
from gemopt.formats.files import bounded_json, load_torch, whole_numbers
from gemopt.formats.recorded_files import files_of
from gemopt.formats.responses import replayed as responses

DUMP = re.compile(r"rank(\d{1,6})_step(\d{1,12})_experts?_counts\.(?:pt|json)", re.ASCII)
SUFFIXES = (*responses.SUFFIXES, ".pt")


def read_traces(paths: Sequence[Path], options: TraceOptions) -> Recording | Loaded:
    """Read the dumps of a recorder (.pt, .json, or their folder), or responses (.json, .jsonl)."""
    files = files_of(paths, *SUFFIXES, both_phases=True)
    found = [DUMP.fullmatch(path.name) for path in files]
    if not any(found):
        return responses.read_traces(files, options)
    options.refuse_unused("dumps of counts, which count all ranks together")
    told = {path: (int(each[1]), int(each[2])) for path, each in zip(files, found, strict=True) if each}
    if other := [path.name for path in files if path not in told]:
        raise InputError("PATHS", other[0], "dumps of the recorder alone", "import each kind apart")
    ranks, steps = sorted({rank for rank, _ in told.values()}), sorted(step for _, step in told.values())
    if len(ranks) > 1 or len(set(steps)) < len(steps):
        shown = f"ranks {', '.join(map(str, ranks))}" if len(ranks) > 1 else f"step {steps[0]} twice"
        raise InputError("PATHS", shown, "dumps of one rank, whose counts are all ranks'", "import one of them")
    files = sorted(files, key=lambda path: told[path][1])
    notes: list[str] = []
    files, found_counts = _alike(files, notes, begun=told[files[0]][1] == 1)
    counts = np.stack([np.zeros_like(found_counts[0]), *found_counts])
    for (earlier, before), (later, after) in pairwise(zip(files, counts[1:], strict=True)):
        if (after < before).any():
            found_in = f"counts below those of {earlier.name}"
            raise InputError(str(later), found_in, "counts that add up", "recorded anew? import each recording apart")
    each = np.diff(counts, axis=0)
    passes = ", ".join(str(told[path][1]) for path in files[:4]) + (", ..." if len(files) > 4 else "")
    notes += [f"a step is all that came from one dump to the next (forward passes {passes}): of many passes together"]
    notes.append("of a server with --enable-eplb these are physical experts, which no dump says: record without it")
    if options.layer_ids is None:
        notes.append(f"rows are MoE layers, read as layers 0 to {each.shape[1] - 1}: with dense layers, --layer-ids")
    ids = options.layer_ids if options.layer_ids and len(options.layer_ids) == each.shape[1] else None
    used = each.any(axis=(1, 2))
    return Recording(blocks=lambda: iter([each[used]] if used.any() else []), layer_ids=ids, notes=notes)


def _counts(path: Path) -> IntArray:
    """[MoE layers, experts] of a dump."""
    data = load_torch(path) if path.suffix == ".pt" else bounded_json(path)
    if path.suffix == ".pt":
        if not isinstance(data, dict) or "counts" not in data:
            raise InputError(f"{path}: counts", None, "the counts [MoE layers, experts] of a dump")
        data = data["counts"]
    found = whole_numbers(data, name=f"{path}: counts", ndims=(2,)).astype(np.int64)
    if not found.size or found.min() < 0:
        raise InputError(f"{path}: counts", f"shape {found.shape}", "counts from 0 of a layer and an expert at least")
    return found


def _alike(files: Sequence[Path], notes: list[str], *, begun: bool) -> tuple[list[Path], list[IntArray]]:
    """The dumps and their counts, which are of one network.

    begun: the first is of the first forward pass. The recorder that wrote JSON dumped at once, with the layers that
    had begun by then; the next dump counts them too.
    """
    found = [_counts(path) for path in files]
    if begun and len(found) > 1 and len(found[0]) < len(found[1]) and found[0].shape[1] == found[1].shape[1]:
        layers = f"{len(found[0])} of {len(found[1])} layers"
        notes.append(f"{files[0].name} holds {layers}, within the first forward pass: left out, the next counts it too")
        files, found = files[1:], found[1:]
    for path, each in zip(files, found, strict=True):
        if each.shape != found[0].shape:
            shown = f"{each.shape[0]} layers of {each.shape[1]} experts"
            limit = f"{found[0].shape[0]} of {found[0].shape[1]}, as in {files[0].name}"
            raise InputError(str(path), shown, limit, "import networks apart")
    return list(files), found

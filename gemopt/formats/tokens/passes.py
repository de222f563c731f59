"""Experts of the tokens [tokens, K] of a layer in a forward pass, as hooks of a network keep them: counted by steps.

A file each, or lists of them: of the passes for each layer, `{3: [pass, pass, ...]}`, or of layers for each pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemopt.exceptions import InputError
from gemopt.formats.engine import IntArray, Recording, TraceOptions
from gemopt.formats.files import whole_numbers
from gemopt.formats.findings import experts_of, fewer
from gemopt.formats.names import numbered
from gemopt.formats.tokens import padding as token_padding
from gemopt.traces import Phase
from gemopt.traces.arrays import MAX_EXPERTS
from gemopt.words import counted as counting

Part = tuple[str, int, int, Any]  # where it is, layer, step, [tokens, K]


def of_lists(path: Path, data: Any) -> list[Part]:
    """The parts of lists of passes for each layer, or of a list of layers for each pass; none of anything else.

    Keys of numbers alone are layers where passes, and not these, have tokens of their own numbers.
    """
    if _is_list(data) and all(isinstance(layers, dict) for layers in data) and _layers(data[0])[1]:
        first = data[0]
        for step, layers in enumerate(data):
            if layers.keys() != first.keys():
                found, limit = (", ".join(map(str, each))[:100] or "nothing" for each in (layers, first))
                raise InputError(f"{path}: pass {step}", found, f"{limit}, as in the first", "leave the others out")
        data = {layer: [layers[layer] for layers in data] for layer in first}
    if not isinstance(data, dict) or not all(map(_is_list, data.values())):
        return []
    kind, layers = _layers(data)
    lengths = sorted({len(passes) for passes in data.values()})
    each = list(zip(layers, data.values(), strict=False))
    parts = [(layer, step, part) for layer, passes in each for step, part in enumerate(passes)]
    if any(getattr(part, "ndim", 0) != len("NK") for _, _, part in parts):
        return []
    if len({len(part) for _, _, part in parts}) < (1 if kind else 2):
        return []
    if len(lengths) > 1:
        found = f"layers of {lengths[0]} and of {lengths[-1]} passes"
        raise InputError(str(path), found, "all passes of every layer", "import apart what was recorded apart")
    return [(f"{path}: layer {layer}, pass {step}", layer, step, part) for layer, step, part in parts]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value)


def _layers(value: dict[Any, Any]) -> tuple[str, list[int]]:
    """What the keys count, by their names, and the layers; none where they count something else."""
    kind = numbered({str(key): each for key, each in value.items()})
    return kind if kind is not None and kind[0] in ("layer", "") and len({*kind[1]}) == len(value) else ("", [])


def counted(parts: Sequence[Part], options: TraceOptions, notes: list[str], kind: str = "file") -> Recording:
    """Counts of parts of one layer of one step each; kind: what a part is."""
    every = ("phase",) if kind != "file" and options.phase is Phase.MIXED else ()
    options.refuse_unused(f"{kind}s of layers and steps", *every)
    at = {(layer, step) for _, layer, step, _ in parts}
    layers, steps = (sorted({each[i] for each in at}) for i in (0, 1))
    if len(parts) != len(layers) * len(steps) or len(at) < len(parts):
        found = f"{len(parts)} {kind}s of {len(layers)} layers and {len(steps)} steps"
        by_name = ", by their names" if kind == "file" else ""
        raise InputError("PATHS", found, f"a {kind} for each layer of each step{by_name}")
    ids: dict[tuple[int, int], IntArray] = {}
    for where, layer, step, part in parts:
        each = whole_numbers(part, name=f"{where}: experts of tokens", ndims=(2,)).astype(np.int64)
        ordered = np.sort(each, axis=1)
        if not each.size or ((np.diff(ordered, axis=1) == 0) & (ordered[:, 1:] >= 0)).any():
            raise InputError(f"{where}: experts of tokens", "an expert twice, or none", "different experts of a token")
        if ordered.min() < -1 or ordered.max() >= MAX_EXPERTS:
            found_id = int(ordered.max()) if ordered.max() >= MAX_EXPERTS else int(ordered.min())
            raise InputError(f"{where}: experts of tokens", found_id, f"experts below {MAX_EXPERTS}, or -1")
        ids[layer, step] = each
    for step in steps:
        if len(shapes := sorted({ids[layer, step].shape for layer in layers})) > 1:
            found = " and ".join(f"{tokens} tokens of {top_k}" for tokens, top_k in (shapes[0], shapes[-1]))
            raise InputError("PATHS", f"step {step}: {found}", "the same tokens in all layers of a step")
    chosen = np.flatnonzero(np.bincount(np.concatenate([each[each >= 0] for each in ids.values()]))).tolist()
    if not chosen:
        raise InputError("PATHS", "no expert", "experts of tokens")
    experts = experts_of("PATHS: experts", chosen, options.num_experts, notes)
    each_size = np.concatenate([(each >= 0).sum(axis=1) for each in ids.values()])
    sizes = {*each_size.tolist()} - {0}
    if (top_k := max(sizes)) >= experts:
        raise InputError("PATHS: experts", f"all {experts} of a token", "those that it chose")
    if options.top_k not in (None, top_k):
        raise InputError("--top-k", options.top_k, f"{top_k} experts of a token, as in the files")
    counts = np.array([[np.bincount(ids[i, t][ids[i, t] >= 0], minlength=experts) for i in layers] for t in steps])
    if blank := sum(int((each < 0).all(axis=1).sum()) for each in ids.values()):
        notes.append(f"left out: {counting(blank, 'row')} without any expert (padding)")
    notes += fewer(each_size)
    widths = {each.shape[1] for each in ids.values()}
    stacked = (np.stack([ids[layer, step] for layer in layers], axis=1) for step in steps)
    notes += token_padding.of_steps("PATHS", stacked) if len(widths) == 1 else []
    used = counts.any(axis=(1, 2))
    told_k = top_k if len(sizes) == 1 else None
    return Recording(blocks=lambda: iter([counts[used]]), layer_ids=tuple(layers), top_k=told_k, notes=notes)

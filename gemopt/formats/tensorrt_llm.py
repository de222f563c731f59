"""TensorRT-LLM: the MoE load balancer's YAML, and the files of its expert statistic.

Rules: `MoeLoadBalancerConfig` in `tensorrt_llm/llmapi/llm_args.py` (unknown keys refused) and the assignment checks of
`fused_moe/interface.py`; statistic: `tensorrt_llm/_torch/expert_statistic.py`, one file per rank, logical counts, key
`{iteration}_{layer}`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemopt.documents import write_text
from gemopt.exceptions import InputError
from gemopt.formats.engine import (
    Engine,
    Export,
    Facts,
    IntArray,
    Recording,
    TraceOptions,
    WriteOptions,
    in_order,
    make_placement,
    model_name,
    require_hidden_layers,
)
from gemopt.formats.files import bounded_json, bounded_yaml, safetensors_arrays
from gemopt.placement import Placement, Split

_KEYS = {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}


def check(placement: Placement, options: WriteOptions) -> None:
    """Draft (MTP) layers are numbered from `num_hidden_layers` on."""
    if options.mtp_layers:
        require_hidden_layers(placement, "tensorrt-llm")


def write(placement: Placement, path: Path, options: WriteOptions) -> Export:
    """Write the load balancer's YAML, keyed by decoder layer, and the options file that names it."""
    rows = dict(zip(placement.layer_ids, placement.physical_to_logical, strict=True))
    for draft in range(options.mtp_layers):
        rows[require_hidden_layers(placement, "tensorrt-llm") + draft] = in_order(placement)
    lines = [f"num_slots: {placement.num_slots}", "initial_global_assignments:"]
    lines += [f"  {layer}: {json.dumps(row.tolist())}" for layer, row in rows.items()]
    write_text(path, "\n".join([*lines, "layer_updates_per_iter: 0", ""]))
    extra = path.with_name(f"{path.stem}.options.yaml")
    config = f"moe_config:\n  backend: WIDEEP\n  load_balancer: {json.dumps(str(path))}\nenable_attention_dp: true\n"
    write_text(extra, config)
    ranks = placement.num_ranks
    command = (
        f"trtllm-serve {model_name(placement)} --tp_size {ranks} --ep_size {ranks} --extra_llm_api_options {extra}"
    )
    notes = [
        "The load balancer is ignored with one rank, with moe_cluster_size above 1, and for unlisted architectures."
    ]
    if options.mtp_layers:
        notes.append("Draft (MTP) layers hold their experts in order.")
    else:
        notes.append(
            "A draft (MTP) layer without a key stops the start with KeyError: give --mtp-layers N if there is one."
        )
    return Export(files=(str(path), str(extra)), command=command, notes=tuple(notes))


def read(path: Path, facts: Facts) -> Placement:
    """Read the load balancer's YAML; layers from `num_hidden_layers` on are draft layers and left out."""
    data = bounded_yaml(path)
    if not isinstance(data, dict) or set(data) - _KEYS or not isinstance(data.get("initial_global_assignments"), dict):
        found = ", ".join(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{path}: keys", found, f"only {', '.join(sorted(_KEYS))}, with one list per layer")
    if data.get("layer_updates_per_iter", 0) != 0:
        raise InputError(f"{path}: layer_updates_per_iter", data["layer_updates_per_iter"], "0, a static placement")
    rows: dict[int, list[int]] = {}
    for layer, row in data["initial_global_assignments"].items():
        name = f"{path}: initial_global_assignments[{layer}]"
        if type(layer) is not int or layer < 0:
            raise InputError(name, layer, "layer numbers >= 0")
        if not isinstance(row, list) or not all(type(expert) is int for expert in row):
            raise InputError(name, type(row).__name__, "a list of experts")
        if len(row) != data.get("num_slots"):
            raise InputError(name, f"{len(row)} experts", f"num_slots = {data.get('num_slots')}")
        if facts.num_hidden_layers is None or layer < facts.num_hidden_layers:
            rows[layer] = row
    ids = sorted(rows)
    if not ids:
        raise InputError(f"{path}: initial_global_assignments", "no layer", "at least one MoE layer")
    table = [rows[layer] for layer in ids]
    return make_placement(path, table, facts, layer_ids=ids, num_hidden_layers=facts.num_hidden_layers)


def read_traces(paths: Sequence[Path], options: TraceOptions) -> Recording:
    """Read a folder of expert statistics: `meta_info.json` and `rank{r}.safetensors`, summed over the ranks."""
    if len(paths) != 1 or not paths[0].is_dir():
        raise InputError("PATHS", ", ".join(map(str, paths)), "one folder, that of EXPERT_STATISTIC_PATH")
    folder = paths[0]
    meta = bounded_json(folder / "meta_info.json", limit_bytes=1 << 20)
    experts, top_k = (_positive(folder, meta, key) for key in ("num_experts", "num_experts_per_token"))
    files = _rank_files(folder, options)
    total: IntArray | None = None
    iterations: IntArray = np.zeros(0, np.int64)
    layers: IntArray = iterations
    for path in files:
        keys, counts = _rank_counts(path, experts)
        numbers = [np.unique(keys[:, column]) for column in (0, 1)]
        if total is None:
            iterations, layers = numbers
            total = np.zeros((len(iterations), len(layers), experts), np.int64)
        _same_steps(path, keys, numbers, iterations, layers)
        # Keys are unique within a file, so this is a plain sum.
        total[np.searchsorted(iterations, keys[:, 0]), np.searchsorted(layers, keys[:, 1])] += counts
    assert total is not None
    notes = [f"iterations {iterations[0]} to {iterations[-1]} of {len(files)} ranks"]
    hidden = options.num_hidden_layers
    target = layers < (layers[-1] + 1 if hidden is None else hidden)
    if not target.all():
        notes.append(f"layers from {hidden} on are draft layers: left out")
    summed = total[:, target]
    kept = summed[summed.any(axis=(1, 2))]
    return Recording(
        blocks=lambda: iter([kept] if len(kept) else []),
        layer_ids=tuple(int(layer) for layer in layers[target]),
        top_k=top_k,
        num_hidden_layers=hidden,
        notes=notes,
    )


def _positive(folder: Path, meta: Any, key: str) -> int:
    value = meta.get(key) if isinstance(meta, dict) else None
    if type(value) is not int or not 0 < value < 1 << 20:
        raise InputError(f"{folder / 'meta_info.json'}: {key}", value, "a whole number above 0")
    return value


def _rank_files(folder: Path, options: TraceOptions) -> list[Path]:
    found = {int(m[1]): p for p in folder.iterdir() if (m := re.fullmatch(r"rank(\d+)\.safetensors", p.name))}
    expected = options.num_ranks or max(found, default=0) + 1
    missing = sorted(set(range(expected)) - set(found))
    if missing or len(found) > expected:
        ranks = ", ".join(map(str, sorted(found))) or "none"
        hint = f"rank {missing[0]} is missing" if missing else "give the right --ep"
        raise InputError(f"{folder}: rank*.safetensors", ranks, f"a file of each of the {expected} ranks", hint)
    return [found[rank] for rank in sorted(found)]


def _rank_counts(path: Path, experts: int) -> tuple[IntArray, IntArray]:
    """[N, 2] iteration and layer, and [N, E] counts, of one rank."""
    arrays = safetensors_arrays(path)
    keys = []
    for name, array in arrays.items():
        if not re.fullmatch(r"\d{1,15}_\d{1,6}", name):
            raise InputError(f"{path}: {name}", "a key", "keys of the form iteration_layer", "remove other files")
        if array.shape != (experts,):
            raise InputError(f"{path}: {name}", f"shape {array.shape}", f"({experts},): num_experts in meta_info.json")
        keys.append(name.split("_"))
    if not keys:
        raise InputError(str(path), "no counts", "at least one iteration")
    counts = np.stack(list(arrays.values()))
    if int(counts.min()) < 0:
        raise InputError(f"{path}: counts", int(counts.min()), "counts >= 0")
    return np.array(keys, dtype=np.int64), counts


def _same_steps(path: Path, keys: IntArray, found: list[IntArray], iterations: IntArray, layers: IntArray) -> None:
    complete = len(keys) == len(found[0]) * len(found[1])
    if not complete or not np.array_equal(found[0], iterations) or not np.array_equal(found[1], layers):
        raise InputError(
            f"{path}: keys",
            f"{len(keys)} of iterations {found[0][0]} to {found[0][-1]}",
            f"every layer of iterations {iterations[0]} to {iterations[-1]}, as the first rank has",
            "the folder mixes runs: record again into an empty one",
        )
    if iterations[-1] - iterations[0] + 1 != len(iterations):
        raise InputError(f"{path}: iterations", f"{len(iterations)} with gaps", "consecutive iterations")


ENGINES = {
    "tensorrt-llm": Engine(
        name="tensorrt-llm",
        versions="TensorRT-LLM main, 2026-08",
        placement="moe_config.load_balancer .yaml",
        traces=("expert statistic (EXPERT_STATISTIC_ITER_RANGE)",),
        replicas=True,
        splits=frozenset({Split.EVEN}),
        suffixes=(".yaml", ".yml"),
        note="draft layers need rows: --mtp-layers",
        check=check,
        write=write,
        read=read,
        read_traces=read_traces,
    )
}

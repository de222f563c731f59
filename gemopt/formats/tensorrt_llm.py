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
from numpy.typing import NDArray

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
    quoted,
    require_hidden_layers,
)
from gemopt.formats.files import bounded_json, bounded_yaml, safetensors_rows
from gemopt.placement import Placement, Split
from gemopt.traces import COUNT_LIMIT

_KEY = re.compile(r"\d{1,15}_\d{1,6}", re.ASCII)
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
    balancer = json.dumps(str(path.absolute()))
    config = f"moe_config:\n  load_balancer: {balancer}\nenable_attention_dp: true\n"
    write_text(extra, config)
    ranks = placement.num_ranks
    command = f"trtllm-serve {model_name(placement)} --tp_size {ranks} --ep_size {ranks}"
    command += f" --extra_llm_api_options {quoted(extra)}"
    notes = [
        "TensorRT-LLM ignores the file without a word unless there are two or more expert-parallel ranks, "
        "enable_attention_dp (set in the options file), moe_cluster_size 1, and a network of its moe_model_arch_list.",
        "moe_config.backend is left out (AUTO): DEEPGEMM, TRTLLM, CUTEDSL and CUTLASS can balance; TRITON, VANILLA and "
        "MARLIN cannot, and WIDEEP was removed.",
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
    updates, slots = (_whole(f"{path}: {key}", data.get(key, 0)) for key in ("layer_updates_per_iter", "num_slots"))
    if updates:
        facts.notes.append(
            f"layer_updates_per_iter is {updates}: this is the start only, TensorRT-LLM moves the experts of {updates} "
            "layers per iteration"
        )
    rows: dict[int, list[int]] = {}
    for key, row in data["initial_global_assignments"].items():
        name = f"{path}: initial_global_assignments[{key!r}]"
        layer = _whole(name, key)
        if layer < 0 or layer in rows:
            raise InputError(name, key, "layer numbers >= 0, each once")
        if not isinstance(row, list):
            raise InputError(name, type(row).__name__, "a list of experts")
        if len(row) != slots:
            raise InputError(name, f"{len(row)} experts", f"num_slots = {slots}")
        rows[layer] = [_whole(name, expert) for expert in row]
    draft = [layer for layer in rows if facts.num_hidden_layers is not None and layer >= facts.num_hidden_layers]
    for layer in draft:
        del rows[layer]
    if draft:
        facts.notes.append(f"layers {', '.join(map(str, sorted(draft)))} are draft layers: left out")
    ids = sorted(rows)
    if not ids:
        raise InputError(f"{path}: initial_global_assignments", "no layer", "at least one MoE layer")
    table = [rows[layer] for layer in ids]
    return make_placement(path, table, facts, layer_ids=ids, num_hidden_layers=facts.num_hidden_layers)


def _whole(name: str, value: Any) -> int:
    """A whole number, in quotes or not: the engine's own reader takes both."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    if type(value) is not int:
        raise InputError(name, value, "a whole number")
    return value


def read_traces(paths: Sequence[Path], options: TraceOptions) -> Recording:
    """Read a folder of expert statistics: `meta_info.json` and `rank{r}.safetensors`, summed over the ranks."""
    if len(paths) != 1 or not paths[0].is_dir():
        raise InputError("PATHS", ", ".join(map(str, paths)), "one folder, that of EXPERT_STATISTIC_PATH")
    folder = paths[0]
    meta = bounded_json(folder / "meta_info.json", limit_bytes=1 << 20)
    experts, top_k = (_positive(folder, meta, key) for key in ("num_experts", "num_experts_per_token"))
    files = _rank_files(folder, options)
    iterations, layers = _steps_and_layers(files[0], experts)
    total = np.zeros((len(iterations), len(layers), experts), np.int32)
    known: list[str] = []
    order: IntArray = np.zeros(0, np.int64)
    agree = len(files) > 1
    for seen, path in enumerate(files):
        names, rows_of, rows = safetensors_rows(path, experts)
        if names != known:
            known, order = names, _grid_order(path, _keys(path, names), iterations, layers)
        agree = _add(path, rows, rows_of[order], total, seen=seen if agree else 0) and agree
    notes = [f"iterations {iterations[0]} to {iterations[-1]} of {len(files)} ranks"]
    if agree:
        total //= len(files)
        notes.append(f"all {len(files)} ranks recorded the same counts (they saw the same tokens): counted once")
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
    found = {int(m[1]): p for p in folder.iterdir() if (m := re.fullmatch(r"rank(\d{1,5})\.safetensors", p.name))}
    expected = options.num_ranks or max(found, default=0) + 1
    missing = sorted(set(range(expected)) - set(found))
    if missing or len(found) > expected:
        ranks = ", ".join(map(str, sorted(found))) or "none"
        hint = f"rank {missing[0]} is missing" if missing else "give the right --ep"
        raise InputError(f"{folder}: rank*.safetensors", ranks, f"a file of each of the {expected} ranks", hint)
    return [found[rank] for rank in sorted(found)]


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


def _add(path: Path, rows: IntArray, order: IntArray, total: NDArray[np.int32], *, seen: int) -> bool:
    """Add the counts of a rank, a megabyte at a time; whether they equal those of the `seen` ranks before."""
    agree = True
    flat, step = total.reshape(len(order), -1), max(1, (1 << 17) // rows.shape[1])
    for start in range(0, len(order), step):
        counts = rows[order[start : start + step]]
        low, high = int(counts.min()), int(counts.max())
        if low < 0 or high > COUNT_LIMIT // 4096:
            raise InputError(f"{path}: counts", low if low < 0 else high, f"counts from 0 to {COUNT_LIMIT // 4096}")
        agree = agree and (not seen or bool((flat[start : start + step] == seen * counts).all()))
        flat[start : start + step] += counts.astype(np.int32)
    return agree


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

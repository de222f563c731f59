"""TensorRT-LLM: the MoE load balancer's YAML.

Rules: `MoeLoadBalancerConfig` in `tensorrt_llm/llmapi/llm_args.py` (unknown keys refused) and the assignment checks of
`fused_moe/interface.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemopt.documents import write_text
from gemopt.exceptions import InputError
from gemopt.formats.engine import (
    Engine,
    Export,
    Facts,
    WriteOptions,
    check_layers,
    in_order,
    make_placement,
    model_name,
    quoted,
    require_hidden_layers,
)
from gemopt.formats.engines import tensorrt_llm_traces
from gemopt.formats.files import bounded_yaml
from gemopt.formats.findings import untouched
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
    data = _balancer(path, bounded_yaml(path))
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
    check_layers(path, facts, ids)
    table = [rows[layer] for layer in ids]
    placement = make_placement(path, table, facts, layer_ids=ids, num_hidden_layers=facts.num_hidden_layers)
    if facts.num_hidden_layers is None and (plain := untouched(placement.physical_to_logical, ids)):
        facts.notes.append(f"layers {plain} hold the experts in order: draft layers? then give --num-hidden-layers")
    return placement


def _balancer(path: Path, data: Any) -> Any:
    """The balancer within options of the engine (`moe_config.load_balancer`); else as it is."""
    config = data.get("moe_config") if isinstance(data, dict) else None
    found = config.get("load_balancer") if isinstance(config, dict) else None
    if isinstance(found, str):
        raise InputError(f"{path}: moe_config.load_balancer", found, "the balancer itself", "import the file it names")
    return data if found is None else found


def _whole(name: str, value: Any) -> int:
    """A whole number, in quotes or not: the engine's own reader takes both."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    if type(value) is not int:
        raise InputError(name, value, "a whole number")
    return value


ENGINES = {
    "tensorrt-llm": Engine(
        hidden_layers=True,
        draft_layers=True,
        name="tensorrt-llm",
        versions="TensorRT-LLM main, 2026-08",
        placement="moe_config.load_balancer .yaml",
        dumps=tensorrt_llm_traces.SUFFIXES,
        traces=("expert statistic (EXPERT_STATISTIC_ITER_RANGE)",),
        replicas=True,
        splits=(Split.EVEN,),
        suffixes=(".yaml", ".yml"),
        note="draft layers need rows: --mtp-layers",
        check=check,
        write=write,
        read=read,
        rank_files=True,
        read_traces=tensorrt_llm_traces.read_traces,
    )
}

"""vllm-ascend: the static expert map of `eplb_config.expert_map_path`.

Format and traps: `vllm_ascend/eplb/core/eplb_utils.py` and `eplb/adaptor/vllm_adaptor.py` of vllm-ascend 0.23.0. Layers
and devices are positional; a second copy on a rank is not refused there but misroutes, and a `Placement` never has one.
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
    make_placement,
    model_name,
    moe_rows,
    quoted,
    split_heads,
)
from gemopt.formats.files import bounded_json
from gemopt.placement import Placement, Split


def write(placement: Placement, path: Path, options: WriteOptions) -> Export:
    """Write the map: for each MoE layer in order, the experts of every device."""
    ranks = placement.num_ranks
    layers = []
    for index, row in enumerate(placement.physical_to_logical):
        experts = row.reshape(ranks, -1).tolist()
        devices = [{"device_id": rank, "device_expert": experts[rank]} for rank in range(ranks)]
        layers.append({"layer_id": index, "device_count": ranks, "device_list": devices})
    body = ",\n".join(json.dumps(layer) for layer in layers)
    write_text(path, f'{{"moe_layer_count": {len(layers)}, "layer_list": [\n{body}\n]}}\n')
    redundant = placement.num_slots - placement.num_experts
    config = json.dumps({"eplb_config": {"expert_map_path": str(path.absolute()), "num_redundant_experts": redundant}})
    command = (
        f"vllm serve {model_name(placement)} --tensor-parallel-size {ranks} --enable-expert-parallel "
        f"--additional-config {quoted(config)}"
    )
    notes = [
        "Model runner v1 only; vllm-ascend has announced the removal of static maps in 0.25.1.",
        "MoE layers are counted in the order the network builds them; a draft layer gets its experts in order.",
        *split_heads(ranks, "--data-parallel-size instead of --tensor-parallel-size"),
    ]
    if placement.has_copies:
        notes.append("Each sending rank always uses one copy (rank modulo copies): even over balanced senders only.")
    return Export(files=(str(path),), command=command, notes=tuple(notes))


def read(path: Path, facts: Facts) -> Placement:
    """Read a map, written by hand or recorded by `expert_map_record_path`."""
    data = bounded_json(path)
    layers = data.get("layer_list") if isinstance(data, dict) else None
    if not isinstance(layers, list) or not layers or data.get("moe_layer_count") != len(layers):
        found = data.get("moe_layer_count") if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{path}: moe_layer_count", found, "as many layers as layer_list has, at least one")
    rows = [_row(f"{path}: layer_list[{i}]", layer) for i, layer in enumerate(layers)]
    shapes = {tuple(len(experts) for experts in row) for row in rows}
    widths = next(iter(shapes))
    if len(shapes) > 1 or len(set(widths)) > 1:
        found = ", ".join(map(str, sorted(shapes)))
        raise InputError(f"{path}: device_expert", found, "the same number of experts on every device and layer")
    if facts.num_ranks is not None and facts.num_ranks != len(widths):
        raise InputError("--ep", facts.num_ranks, f"{len(widths)}, the devices in {path}")
    ids = moe_rows(facts, len(rows))
    if _numbered_otherwise(layers, ids):
        facts.notes.append("layer_id, device_id or device_count do not fit: vllm-ascend goes by the order in the lists")
    table = [[expert for experts in row for expert in experts] for row in rows]
    return make_placement(
        path, table, facts, num_ranks=len(widths), layer_ids=ids, num_hidden_layers=facts.num_hidden_layers
    )


def _numbered_otherwise(layers: list[Any], ids: list[int]) -> bool:
    """Whether numbers that vllm-ascend does not read say something else than the order of the lists, or the layers."""
    for i, layer in enumerate(layers):
        devices = layer["device_list"]
        numbers = [device.get("device_id", j) == j for j, device in enumerate(devices)]
        known = layer.get("layer_id", i) in (i, *ids[i : i + 1])
        if not known or layer.get("device_count", len(devices)) != len(devices) or not all(numbers):
            return True
    return False


def _row(where: str, layer: Any) -> list[list[int]]:
    devices = layer.get("device_list") if isinstance(layer, dict) else None
    if not isinstance(devices, list) or not devices:
        raise InputError(f"{where}.device_list", devices, "a list of devices")
    row = []
    for device in devices:
        experts = device.get("device_expert") if isinstance(device, dict) else None
        if not isinstance(experts, list) or not experts or not all(type(expert) is int for expert in experts):
            raise InputError(f"{where}.device_expert", experts, "a list of experts")
        row.append(experts)
    return row


ENGINES = {
    "vllm-ascend": Engine(
        name="vllm-ascend",
        versions="vllm-ascend 0.23.0",
        placement="eplb_config.expert_map_path .json",
        replicas=True,
        splits=(Split.EVEN,),
        suffixes=(".json",),
        note="records its map (placement import), but no loads",
        write=write,
        read=read,
    )
}

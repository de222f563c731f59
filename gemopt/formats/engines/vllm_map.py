"""vLLM's proposed start placement: `eplb_config.initial_expert_map_path`, in no release yet.

Format: pull request 49572 of vllm-project/vllm (open in 2026-07), a JSON file that holds the physical-to-logical map,
[L][P], or [P] for all MoE layers alike; dimensions, the range of the ids and that each expert has a slot are checked
there. The weights are moved right after loading. Until it lands, `--to vllm` serves a placement through a plugin.
"""

from __future__ import annotations

import json
from pathlib import Path

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
from gemopt.formats.engines import vllm
from gemopt.formats.files import bounded_json
from gemopt.placement import Placement, Split

PROPOSED = "vLLM pull request 49572, in no release of vLLM yet"
# vLLM's balancer must be on for the map to be read; it would move the experts again after this many steps.
STEP_INTERVAL = 1_000_000_000


def write(placement: Placement, path: Path, options: WriteOptions) -> Export:
    """Write the map [L][P], a row for every MoE layer in order."""
    rows = ",\n".join(json.dumps(row) for row in placement.physical_to_logical.tolist())
    write_text(path, f"[\n{rows}\n]\n")
    ranks = placement.num_ranks
    config = {
        "initial_expert_map_path": str(path.absolute()),
        "num_redundant_experts": placement.num_slots - placement.num_experts,
        "step_interval": STEP_INTERVAL,
    }
    command = (
        f"vllm serve {model_name(placement)} --tensor-parallel-size {ranks} --enable-expert-parallel --enable-eplb "
        f"--eplb-config {quoted(json.dumps(config))}"
    )
    notes = (
        f"initial_expert_map_path is proposed: {PROPOSED}; until then use --to vllm.",
        "step_interval is out of reach, so that vLLM's balancer does not move the experts again.",
        "Rows are MoE layers in the order the network builds them.",
        *split_heads(ranks, "--data-parallel-size instead of --tensor-parallel-size"),
    )
    return Export(files=(str(path),), command=command, notes=notes)


def read(path: Path, facts: Facts) -> Placement:
    """Read such a map; one row for all layers needs `--layer-ids`, to know how many there are."""
    data = bounded_json(path)
    rows = data if isinstance(data, list) else None
    if rows and all(type(expert) is int for expert in rows):
        if facts.layer_ids is None:
            raise InputError(f"{path}: layers", "one row for all layers", "how many there are", "give --layer-ids")
        rows = [rows] * len(facts.layer_ids)
    if not rows or not all(isinstance(row, list) and all(type(expert) is int for expert in row) for row in rows):
        raise InputError(str(path), type(data).__name__, "lists of experts, one per MoE layer, or one list for all")
    ids = moe_rows(facts, len(rows))
    return make_placement(path, rows, facts, layer_ids=ids, num_hidden_layers=facts.num_hidden_layers)


ENGINES = {
    "vllm-map": Engine(
        name="vllm-map",
        versions="proposed: vLLM pull request 49572",
        placement="eplb_config.initial_expert_map_path .json",
        replicas=True,
        splits=(Split.EVEN,),
        suffixes=(".json",),
        note="in no release of vLLM yet; until then vllm",
        check=vllm.check,
        write=write,
        read=read,
    )
}

"""SGLang: `--init-expert-location`, a map over all decoder layers.

Format and rules: `sglang/srt/eplb/expert_location.py` of SGLang 0.5.23, `compute_initial_expert_location_metadata` and
`ExpertLocationMetadata.init_by_mapping`. The loader takes no second key, and checks neither the rows nor that each
expert has a slot; so we do.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from gemopt.documents import replacing, write_text
from gemopt.exceptions import InputError
from gemopt.formats.engine import (
    Engine,
    Export,
    Facts,
    WriteOptions,
    expert_rows,
    file_facts,
    make_placement,
    model_name,
    quoted,
    require_hidden_layers,
    split_heads,
)
from gemopt.formats.engines import sglang_traces
from gemopt.formats.files import bounded_json, load_torch, torch_module, whole_numbers
from gemopt.formats.findings import filled, untouched
from gemopt.placement import Placement, Split

KEY = "physical_to_logical_map"
GPUS = 8  # of most nodes
DISPATCH = {Split.NEAREST: "static", Split.EVEN: "dynamic", Split.OPTIMAL: "lp"}


def check(placement: Placement, options: WriteOptions) -> None:
    """SGLang wants a row for every decoder layer."""
    require_hidden_layers(placement, "sglang")


def write(placement: Placement, path: Path, options: WriteOptions) -> Export:
    """Write `{"physical_to_logical_map": [num_hidden_layers][P]}`, dense layers filled with experts in order."""
    rows = expert_rows(placement, num_rows=require_hidden_layers(placement, "sglang"))
    if path.suffix == ".pt":
        torch = torch_module("writing .pt files")
        with replacing(path) as stream:
            torch.save({KEY: torch.from_numpy(rows)}, stream)
    else:
        lines = ",\n".join(json.dumps(row) for row in rows.tolist())
        write_text(path, f'{{"{KEY}": [\n{lines}\n]}}\n')
    redundant = placement.num_slots - placement.num_experts
    ranks = placement.num_ranks
    command = [
        f"python -m sglang.launch_server --model-path {model_name(placement)} --tp {ranks} --ep {ranks}",
        f"--moe-a2a-backend deepep --ep-num-redundant-experts {redundant} --init-expert-location {quoted(path)}",
    ]
    if placement.has_copies:
        command.append(f"--ep-dispatch-algorithm {DISPATCH[placement.split]}")
    if options.role:
        command.append(f"--disaggregation-mode {options.role}")
    notes = [
        "Leave out --enable-eplb: it would move the experts again.",
        "SGLANG_LOG_EXPERT_LOCATION_METADATA=1 prints the layout that SGLang uses.",
        *split_heads(ranks, f"add --dp {ranks} --enable-dp-attention"),
    ]
    if placement.num_ranks > GPUS:
        notes.append("On several nodes it runs on each, with --nnodes, --node-rank and --dist-init-addr.")
    if placement.has_copies and placement.split is Split.EVEN:
        notes.append(
            "A rank, else a node, that holds a copy uses its own: even over balanced senders and like nodes only."
        )
    if placement.has_copies and placement.split is Split.OPTIMAL:
        notes.append("--ep-dispatch-algorithm lp works for the DeepSeek family only.")
    notes += filled(placement.layer_ids, len(rows))
    if options.mtp_layers:
        notes.append("SGLang keeps draft layers in their initial order; they need no row.")
    return Export(files=(str(path),), command=" ".join(command), notes=tuple(notes))


def read(path: Path, facts: Facts) -> Placement:
    """Read such a map (.json or .pt); `facts` say the ranks and which rows are MoE layers (default: all)."""
    data = load_torch(path) if path.suffix == ".pt" else bounded_json(path)
    if not isinstance(data, dict) or KEY not in data:
        keys = ", ".join(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{path}: {KEY}", keys, f"an object with the key {KEY}")
    if len(data) > 1:
        extra = next(key for key in data if key != KEY)
        raise InputError(f"{path}: {extra}", "an extra key", f"exactly one key, {KEY}", "SGLang refuses any other")
    rows = whole_numbers(data[KEY], name=f"{path}: {KEY}", ndims=(2,)).astype(np.int64)
    ids, hidden = file_facts(path, facts, rows=len(rows))
    if facts.layer_ids is None and (plain := untouched(rows, range(len(rows)))):
        facts.notes.append(f"layers {plain} hold the experts in order: if they have none, give --layer-ids")
    return make_placement(path, rows[ids], facts, layer_ids=ids, num_hidden_layers=hidden)


ENGINES = {
    "sglang": Engine(
        hidden_layers=True,
        draft_layers=True,
        name="sglang",
        versions="SGLang 0.5.23",
        placement="--init-expert-location .json or .pt",
        dumps=sglang_traces.SUFFIXES,
        traces=(
            "stat",
            "stat_approx",
            "per_pass",
            "per_token",
            "logical_count .json",
            "count .csv",
            "routed_experts responses",
        ),
        replicas=True,
        dense_rows=True,
        splits=(Split.EVEN, Split.NEAREST, Split.OPTIMAL),
        suffixes=(".json", ".pt"),
        note="--ep-dispatch-algorithm dynamic is even, static is nearest, lp is optimal",
        check=check,
        write=write,
        read=read,
        rank_files=True,
        read_traces=sglang_traces.read_traces,
    )
}

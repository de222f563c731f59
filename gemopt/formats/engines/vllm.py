"""vLLM: no released version reads a placement, so gemopt serves it through vLLM's own load balancer.

With `GEMOPT_PLACEMENT` set, the plugin `gemopt.formats.engines.vllm_plugin` answers vLLM's `rebalance_experts` with the
placement of that file (seam: `vllm/distributed/eplb/policy` of vLLM 0.33.0). The file is a gemopt placement itself.
"""

from __future__ import annotations

import json
from pathlib import Path

from gemopt.exceptions import InputError
from gemopt.formats.engine import Engine, Export, Facts, WriteOptions, model_name, quoted, split_heads
from gemopt.formats.responses import replayed as responses
from gemopt.placement import Placement, Split

MAX_REDUNDANT = 1023  # vllm/distributed/eplb/eplb_state.py, MAX_EXPERT_REDUNDANCY
# The first rearrangement comes after a quarter of the interval; later ones find nothing to move.
EPLB = {"window_size": 1, "step_interval": 1000}


def check(placement: Placement, options: WriteOptions) -> None:
    """vLLM's tables hold at most 1023 redundant experts."""
    redundant = placement.num_slots - placement.num_experts
    if redundant > MAX_REDUNDANT:
        raise InputError("Placement.physical_to_logical", f"{redundant} copies", f"at most {MAX_REDUNDANT} for vLLM")


def write(placement: Placement, path: Path, options: WriteOptions) -> Export:
    """Write the placement for the plugin."""
    placement.save(path)
    ranks = placement.num_ranks
    config = json.dumps({**EPLB, "num_redundant_experts": placement.num_slots - placement.num_experts})
    command = (
        f"GEMOPT_PLACEMENT={quoted(path)} vllm serve {model_name(placement)} --tensor-parallel-size {ranks} "
        f"--enable-expert-parallel --enable-eplb --eplb-config {quoted(config)}"
    )
    notes = [
        "gemopt must be installed beside vLLM on every node; if VLLM_PLUGINS is set, it must name gemopt.",
        f"vLLM starts with the experts in order and moves them after {EPLB['step_interval'] // 4} steps.",
        *split_heads(ranks, "--data-parallel-size instead of --tensor-parallel-size"),
        "On ROCm vLLM skips a move that does not even out the number of tokens.",
    ]
    if not placement.has_copies:
        notes.append(
            "Without copies, --to checkpoint needs no plugin: serve it with --expert-placement-strategy linear."
        )
    return Export(files=(str(path),), command=command, notes=tuple(notes))


def read(path: Path, facts: Facts) -> Placement:
    """Read the placement again."""
    return Placement.load(path)


ENGINES = {
    "vllm": Engine(
        name="vllm",
        versions="vLLM 0.33.0",
        placement="GEMOPT_PLACEMENT .json (plugin)",
        dumps=responses.SUFFIXES,
        traces=("routed_experts responses",),
        replicas=True,
        splits=(Split.EVEN,),
        suffixes=(".json",),
        document="placement",
        side_file=False,
        note="through the EPLB policy; without copies also --to checkpoint",
        check=check,
        write=write,
        read=read,
        read_traces=responses.read_traces,
    )
}

"""Outputs of a small network of every family on two ranks, before and after a shuffled placement is in force.

    torchrun --standalone --nproc-per-node 2 benchmarks/families.py

`sharded` is transformers' expert parallelism, served by gemopt and not yet placed, against one process; `placed` is the
same ranks under a random permutation of every layer against themselves before; `at load` is the network loaded in
other slots, in one process. Ranks share a batch (`shared`), or have their own where that fails (`own`). All are largest
differences relative to the largest logit.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from machine import stamp

from gemopt import Placement
from gemopt.executor import Executor
from gemopt.executor.load import layout, load, load_permuted
from gemopt.models import FAMILIES, find_moe_layers, tiny

TOKENS = (torch.arange(48) * 37 % 250 + 3).view(3, 16)
HEADS = {"mimo_v2_flash": 2}  # key and value heads; where not all layers have as many


def shuffled(layers: list[int], groups: int, seed: int) -> Placement:
    rng = np.random.default_rng(seed)
    blocks = np.arange(8).reshape(groups, -1)
    rows = [np.concatenate([rng.permutation(block) for block in rng.permutation(blocks)]) for _ in layers]
    return Placement(physical_to_logical=rows, slots_per_rank=[4, 4], num_experts=8, layer_ids=layers)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model(TOKENS).logits
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def difference(found: torch.Tensor, reference: torch.Tensor) -> str:
    return f"{float((found - reference).abs().max() / reference.abs().max()):.0e}"


def row(family: str, folder: Path) -> list[str]:
    """Differences of one family; every rank takes part."""
    if dist.get_rank() == 0:
        tiny(family, top_k=3, num_key_value_heads=HEADS.get(family, 4)).save_pretrained(folder)
    dist.barrier()
    whole = load(folder)
    found = find_moe_layers(whole)
    layers, reference = [layer.layer_id for layer in found], logits(whole)
    at_load = load_permuted(folder, shuffled(layers, found[0].num_groups or 8, seed=1))
    cells, reasons = [], []
    for kind in ("shared", "own"):
        try:
            sharded = load(folder, layout(kind, 2))
            before = logits(sharded)
        except Exception as error:  # transformers' own, of many kinds
            reasons.append(f"{kind}: {str(error).partition(': got ')[2][:70] or str(error).splitlines()[0][:70]}")
            continue
        executor = Executor(sharded)
        executor.apply(shuffled(layers, 8, seed=0))
        executor.verify()
        cells = [kind, difference(before, reference), difference(logits(sharded), before)]
        break
    return [*(cells or ["", "", ""]), difference(logits(at_load), reference), "; ".join(reasons)]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders)
    if dist.get_rank() == 0:
        print(f"{stamp('torch', 'transformers')}\n")
        print("| family | layout | sharded | placed | at load | what transformers said |\n|---|---|---|---|---|---|")
    for family in sorted(FAMILIES):
        cells = row(family, Path(str(folders[0])) / family)
        if dist.get_rank() == 0:
            print("|", " | ".join([family, *cells]), "|", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

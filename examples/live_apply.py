"""A running model takes a placement: torchrun --nproc-per-node 2 examples/live_apply.py

The network that comes with gemopt, sharded over the ranks: one gets fewer slots, and outputs stay what they were.
"""

from __future__ import annotations

import os

import numpy as np
import torch
import torch.distributed as dist

from gemopt import Placement
from gemopt.executor import Executor
from gemopt.executor.load import layout, load
from gemopt.models import tiny_moe_path

LAYERS, EXPERTS = 4, 64


def wanted(ranks: int) -> Placement:
    """Experts in another order, and one slot fewer on the last rank than on the first."""
    rng = np.random.default_rng(0)
    slots = np.full(ranks, EXPERTS // ranks)
    slots[0], slots[-1] = slots[0] + 4, slots[-1] - 4
    rows = [rng.permutation(EXPERTS) for _ in range(LAYERS)]
    return Placement(physical_to_logical=np.array(rows), slots_per_rank=slots, num_experts=EXPERTS)


def main() -> None:
    """Load, apply, compare outputs; rank 0 prints."""
    ranks = int(os.environ["WORLD_SIZE"])
    model = load(tiny_moe_path(), layout("shared", ranks))
    batch = {"input_ids": torch.arange(32, 96).reshape(2, 32)}
    with torch.no_grad():
        before = model(**batch).logits
        executor = Executor(model)
        plan = executor.apply(wanted(ranks))
        after = model(**batch).logits
    executor.verify()
    error = float((after - before).abs().max() / before.abs().max())
    if dist.get_rank() == 0:
        moved = sum(plan.count().values())
        print(f"moved {moved} experts in {len(plan.stages)} commits; outputs differ by {error:.1e}")
        print(f"in force: {executor.placement}, checksum {executor.checksum()[:12]}")
    else:
        executor.checksum()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

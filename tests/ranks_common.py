"""What the scenarios of the executor's tests share: networks, layouts, placements, and the register of scenarios."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from gemopt import Placement
from gemopt.models import tiny

SCRATCH = Path(tempfile.mkdtemp(prefix="gemopt-ranks-"))
SCENARIOS = {}
GROUP_TIMEOUT_S = 300  # generous: the machine may be busy with something else


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


# The model, once for a group and once for a single process.


def checkpoint(family: str, **config) -> Path:
    folder = SCRATCH / (family + "".join(f"-{k}{v}" for k, v in sorted(config.items())))
    return folder


def make_checkpoint(family: str, **config) -> None:
    folder = checkpoint(family, **config)
    if not folder.exists():
        tiny(family, **{"num_layers": 3, "num_experts": 8, "num_key_value_heads": 4, **config}).save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(folder)


def layout(name: str, world: int, implementation: str) -> DistributedConfig:
    sizes = {
        "shared": {"tp_size": world, "tp_plan": "auto"},
        "own": {"fsdp_size": world},
        "mixed": {"tp_size": 2, "tp_plan": "auto", "fsdp_size": world // 2},
    }[name]
    return DistributedConfig(**sizes, ep_size=world, ep_implementation=implementation)


def load(family: str, world: int, where: str = "shared", implementation: str = "gemopt", **config):
    path = checkpoint(family, **config)
    return AutoModelForCausalLM.from_pretrained(path, distributed_config=layout(where, world, implementation)).eval()


def batch(rank: int, where: str, rows: int = 3, length: int = 7, seed: int = 0):
    if where == "mixed":
        rank = rank // 2
    generator = torch.Generator().manual_seed(seed if where == "shared" else seed + 100 * (rank + 1))
    return torch.randint(3, 256, (rows, length), generator=generator)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def random_placement(seed: int, experts: int, layer_ids, slots, *, split: str = "even", fill: float = 1.0) -> Placement:
    """A valid placement whose spare slots hold copies (a share `fill` of them)."""
    rng = np.random.default_rng(seed)
    rows, weights = [], []
    for _ in layer_ids:
        contents = [[] for _ in slots]
        for expert in rng.permutation(experts):
            open_ranks = [g for g, s in enumerate(slots) if len(contents[g]) < s]
            contents[rng.choice(open_ranks)].append(int(expert))
        for rank, size in enumerate(slots):
            others = [e for e in rng.permutation(experts).tolist() if e not in contents[rank]]
            contents[rank] += others[: round(fill * (size - len(contents[rank])))]
            contents[rank] += [-1] * (size - len(contents[rank]))
        row = np.array([e for c in contents for e in c])
        share = rng.uniform(0.2, 1, len(row)) * (row >= 0)
        sums = np.bincount(row[row >= 0], weights=share[row >= 0], minlength=experts)
        rows.append(row)
        weights.append(np.where(row >= 0, share / sums[row], 0))
    return Placement(
        physical_to_logical=rows,
        slots_per_rank=slots,
        num_experts=experts,
        layer_ids=list(layer_ids),
        split=split,
        split_weights=weights if split == "static" else None,
    )


def slots_of(kind: str, experts: int, world: int) -> list[int]:
    each = experts // world
    return {
        "equal": [each] * world,
        "unequal": [each + 2, each, *[each] * (world - 3), each - 2][:world] if world > 2 else [each + 2, each - 2],
        "copies": [each + 2] * world,
        "ragged": [each + 3, *[each + 1] * (world - 2), each],
        "empty_rank": [0, *[-(-experts // (world - 1))] * (world - 1)],
    }[kind]


def serve_until_done(job):
    """Forward passes, as far as a migration can tell."""
    while not job.done:
        job.poll()
        time.sleep(0.005)

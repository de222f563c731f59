"""Run by torchrun for test_tracing: trace an expert-parallel model whose ranks share a batch, then one whose do not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from gemopt.models import find_moe_layers
from gemopt.profiling.tracing import Tracer

BATCHES = [[[5, 9, 11, 200, 31, 7], [40, 41, 8, 9, 10, 11]], [[77, 3, 90, 12, 6, 6], [1, 2, 3, 4, 5, 6]]]

folder = Path(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
for name, config in (
    ("shared", DistributedConfig(tp_size=2, tp_plan="auto", ep_size=2)),
    ("own", DistributedConfig(fsdp_size=2, ep_size=2)),
):
    model = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=config, dtype=torch.float32)
    layer = find_moe_layers(model)[0]
    assert (layer.num_experts, layer.num_local_experts, layer.expert_bytes) == (8, 4, 4 * 3 * 32 * 16)
    with Tracer(model, folder / name, ids=True), torch.no_grad():
        model(torch.tensor(BATCHES[rank if name == "own" else 0]))
    dist.barrier()
if rank == 0:
    (folder / "batches.json").write_text(json.dumps(BATCHES))
dist.destroy_process_group()

"""Speed of applying a placement against a plain point-to-point copy of the same bytes between the same ranks.

The plain copy sends, per ordered pair of ranks, one contiguous block of as many bytes as the migration moves between
them, with all blocks in flight at once. The migration moves experts row by row into buffers, checks canaries, agrees
and commits.

    torchrun --standalone --nproc-per-node 2 benchmarks/migration_throughput.py -o throughput.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from machine import stamp

from gemopt import Placement
from gemopt.executor import Executor
from gemopt.executor.load import layout, load
from gemopt.executor.plan import Plan
from gemopt.models import tiny

MODEL = {"num_layers": 4, "num_experts": 64, "top_k": 4, "hidden_size": 1024, "intermediate_size": 768}


def traffic(steps: Plan) -> list[Counter[tuple[int, int]]]:
    """Bytes by (source rank, destination rank) of every stage."""
    rows = list(steps.current)
    stages = []
    for stage in steps.stages:
        pairs = Counter(pair for pair in stage.ranks(rows[stage.layer]) if pair[0] != pair[1])
        stages.append(Counter({pair: n * steps.expert_bytes[stage.layer] for pair, n in pairs.items()}))
        rows[stage.layer] = stage.after
    return stages


def plain_copy(stages: list[Counter[tuple[int, int]]], group: object) -> float:
    """Seconds to send the same bytes between the same ranks, stage by stage, from and to memory that is there."""
    rank = dist.get_rank()
    blocks = [
        [(pair, torch.ones(size, dtype=torch.uint8)) for pair, size in sorted(stage.items()) if rank in pair]
        for stage in stages
    ]
    dist.barrier()
    start = time.perf_counter()
    for stage in blocks:
        operations = [
            dist.P2POp(dist.isend, block, dst, group) if src == rank else dist.P2POp(dist.irecv, block, src, group)
            for (src, dst), block in stage
        ]
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
    return slowest(start)


def slowest(start: float) -> float:
    """Seconds since `start` on the rank that took longest."""
    elapsed = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return float(elapsed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--slots", choices=["equal", "unequal"], default="equal")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared)
        if dist.get_rank() == 0:
            tiny("qwen3_moe", num_key_value_heads=4, **MODEL).save_pretrained(own)
        dist.barrier()
        model = load(shared[0], layout("shared", ranks))
        dist.barrier()
    executor = Executor(model)
    group = dist.new_group()
    rng = np.random.default_rng(0)
    each = MODEL["num_experts"] // ranks
    shapes = [[each] * ranks, [each] * ranks]
    if options.slots == "unequal":
        shapes[1] = [each + 2, *[each] * (ranks - 2), each - 2]
    rates, shares = [], []
    for number in range(options.rounds + 1):
        rows = [rng.permutation(MODEL["num_experts"]) for _ in executor.layer_ids]
        slots = shapes[number % 2]
        wanted = Placement(
            physical_to_logical=rows, slots_per_rank=slots, num_experts=MODEL["num_experts"],
            layer_ids=executor.layer_ids,
        )  # fmt: skip
        stages = traffic(executor.plan(wanted))
        moved = sum(sum(stage.values()) for stage in stages)
        plain = plain_copy(stages, group)
        dist.barrier()
        start = time.perf_counter()
        executor.apply(wanted)
        applied = slowest(start)
        executor.verify()
        if number:  # the first round opens connections
            rates.append(moved / applied)
            shares.append(plain / applied)
    report = {
        "measured": stamp("torch"),
        "ranks": ranks,
        "slots": options.slots,
        "bytes": moved,
        "expert_bytes": executor.layers[0].expert_bytes,
        "gigabytes_per_second": statistics.median(rates) / 1e9,
        "share_of_plain": statistics.median(shares),
        "share_rounds": sorted(shares),
    }
    if dist.get_rank() == 0:
        print(
            f"{ranks} ranks, {options.slots} slots: {moved / 2**20:.0f} MiB "
            f"at {report['gigabytes_per_second']:.2f} GB/s, {100 * report['share_of_plain']:.0f} % of a plain copy "
            f"(rounds {', '.join(f'{100 * share:.0f}' for share in report['share_rounds'])})"
        )
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

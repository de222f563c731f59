"""Cost of serving through gemopt's dispatch with the identity placement, against transformers' own all-to-all.

Both models hold the same weights and run the same batches in the same processes, turn by turn; what is compared is the
median over all steps of the slowest rank's time.

    torchrun --standalone --nproc-per-node 2 benchmarks/dispatch_overhead.py -o overhead.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from machine import stamp

from gemopt.executor import Executor
from gemopt.executor.load import layout, load
from gemopt.models import tiny

SHAPES = {"decode, 16 sequences": (16, 1), "prefill, 4 x 64 tokens": (4, 64)}
MODEL = {"num_layers": 4, "num_experts": 32, "top_k": 4, "hidden_size": 256, "intermediate_size": 256}


def timed(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Seconds of one forward pass on the rank that took longest."""
    dist.barrier()
    start = time.perf_counter()
    with torch.no_grad():
        model(tokens, use_cache=False)
    elapsed = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return float(elapsed)


def compare(kind: str, steps: int, rounds: int, folder: str) -> list[dict[str, object]]:
    """Overhead for one layout, by shape of the batch; every round gives one figure, its median over the steps."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    theirs = load(folder, layout(kind, ranks, "all_to_all"))
    ours = load(folder, layout(kind, ranks))
    Executor(ours)
    reports = []
    for name, (rows, length) in SHAPES.items():
        generator = torch.Generator().manual_seed(0 if kind == "shared" else rank)
        tokens = torch.randint(3, 256, (rows, length), generator=generator)
        for _ in range(5):
            timed(theirs, tokens), timed(ours, tokens)
        shares, base, cost = [], [], []
        for _ in range(rounds):
            pairs = []
            for step in range(steps):
                order = (theirs, ours) if step % 2 else (ours, theirs)
                times = {model: timed(model, tokens) for model in order}
                pairs.append((times[theirs], times[ours]))
            base.append(statistics.median(a for a, _ in pairs))
            cost.append(statistics.median(b for _, b in pairs))
            shares.append(cost[-1] / base[-1] - 1)
        reports.append(
            {
                "layout": kind,
                "batch": name,
                "ranks": ranks,
                "all_to_all_ms": 1e3 * statistics.median(base),
                "gemopt_ms": 1e3 * statistics.median(cost),
                "overhead": statistics.median(shares),
                "overhead_rounds": sorted(shares),
            }
        )
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared)
        if dist.get_rank() == 0:
            tiny("qwen3_moe", num_key_value_heads=4, **MODEL).save_pretrained(own)
        dist.barrier()
        reports = [r for kind in ("shared", "own") for r in compare(kind, options.steps, options.rounds, shared[0])]
        dist.barrier()
    if dist.get_rank() == 0:
        for report in reports:
            print(
                f"{report['layout']:7} {report['batch']:24} all_to_all {report['all_to_all_ms']:7.2f} ms  "
                f"gemopt {report['gemopt_ms']:7.2f} ms  overhead {100 * report['overhead']:+.1f} % "
                f"(rounds {', '.join(f'{100 * share:+.1f}' for share in report['overhead_rounds'])})"
            )
        if options.output:
            options.output.write_text(
                json.dumps({"measured": stamp("torch", "transformers"), "shapes": reports}, indent=1) + "\n"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

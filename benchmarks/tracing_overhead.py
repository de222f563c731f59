"""What tracing costs: the same generation with and without a tracer, in turn, as a ratio.

    python benchmarks/tracing_overhead.py -o benchmarks/results/tracing_overhead.json

A block repeats a batch of 32 prompts, prefill alone or with 63 decode steps, for about three seconds of CPU time; a traced block
opens one tracer and writes its files. Blocks come in pairs, traced first in every other one, and the median of the
pairs' ratios is reported with its quartiles. On CPU one thread is used and the ratio of CPU times stands beside that
of wall times, for it hardly notices what else runs on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from gemopt.documents import write_text
from gemopt.models import describe, tiny, tiny_moe_path
from gemopt.profiling.generating import default_device
from gemopt.profiling.tracing import Tracer

BATCH, PROMPT, NEW = 32, 128, 64
BLOCK_SECONDS = 3.0


def networks(device: str) -> dict[str, Any]:
    """The shipped model, where a step is shortest and overhead shows most, and a larger random one."""
    from transformers import AutoModelForCausalLM

    small = AutoModelForCausalLM.from_pretrained(tiny_moe_path(), dtype=torch.float32)
    sizes = {"num_layers": 6, "num_experts": 64, "top_k": 8, "hidden_size": 256, "intermediate_size": 64}
    if device != "cpu":
        sizes = {"num_layers": 32, "num_experts": 128, "top_k": 8, "hidden_size": 2048, "intermediate_size": 768}
    with torch.device(device):
        large = tiny("qwen3_moe", mlp_only_layers=[], head_dim=64, vocab_size=1024, **sizes)
    large = large.bfloat16() if device != "cpu" else large
    return {"tiny-moe": small.to(device).eval(), "random": large.to(device)}


def batch(device: str) -> dict[str, torch.Tensor]:
    """Random prompts, every other one padded by a quarter."""
    ids = torch.randint(3, 250, (BATCH, PROMPT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::2, : PROMPT // 4] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def block(model: Any, folder: Path | None, device: str, *, new_tokens: int, repeats: int) -> tuple[float, float]:
    """(wall, CPU) seconds of one block, traced if there is a folder to write to."""
    inputs = batch(device)
    synchronize = getattr(torch, device).synchronize if device != "cpu" else lambda: None
    synchronize()
    begin, cpu = time.perf_counter(), time.process_time()
    with Tracer(model, folder) if folder is not None else nullcontext():
        for _ in range(repeats):
            model.generate(**inputs, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False)
    synchronize()
    return time.perf_counter() - begin, time.process_time() - cpu


def compare(model: Any, device: str, *, new_tokens: int, pairs: int) -> dict[str, Any]:
    """Ratios of traced to untraced blocks. Each generation of n tokens is n steps, the prefill step included."""
    block(model, None, device, new_tokens=new_tokens, repeats=1)
    once = block(model, None, device, new_tokens=new_tokens, repeats=1)[1]  # CPU time, whatever else runs
    repeats = max(1, round(BLOCK_SECONDS / once))
    ratios: list[tuple[float, float]] = []
    plain: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(pairs):
            traced = Path(scratch) / str(number)
            order = [traced, None] if number % 2 else [None, traced]
            times = {f: block(model, f, device, new_tokens=new_tokens, repeats=repeats) for f in order}
            ratios.append((times[traced][0] / times[None][0], times[traced][1] / times[None][1]))
            plain.append(times[None][0])
    steps = new_tokens * repeats
    result: dict[str, Any] = {"pairs": pairs, "steps_per_block": steps}
    result["untraced_ms_per_step"] = 1e3 * statistics.median(plain) / steps
    for name, values in zip(("wall", "cpu"), zip(*ratios, strict=True), strict=True):
        low, middle, high = statistics.quantiles(values, n=4)
        result[f"{name}_ratio"] = {"median": middle, "quartiles": [low, high]}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--pairs", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU, 1 thread"
    results: dict[str, Any] = {"device": name, "torch": torch.__version__, "batch": BATCH, "prompt_tokens": PROMPT}
    for network, model in networks(arguments.device).items():
        shape = describe(model)
        rows = {
            "layers": model.config.num_hidden_layers,
            **shape.model_dump(include={"hidden_size", "num_experts", "top_k"}),
            "prefill": compare(model, arguments.device, new_tokens=1, pairs=arguments.pairs),
            "generation": compare(model, arguments.device, new_tokens=NEW, pairs=arguments.pairs),
        }
        results[network] = rows
        for kind in ("prefill", "generation"):
            wall, cpu = rows[kind]["wall_ratio"]["median"], rows[kind]["cpu_ratio"]["median"]
            step = rows[kind]["untraced_ms_per_step"]
            print(f"{network:8s} {kind:10s} {step:8.2f} ms/step   wall x {wall:.4f}   CPU x {cpu:.4f}", flush=True)
    write_text(arguments.output, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

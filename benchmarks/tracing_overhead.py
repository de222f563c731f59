"""What tracing costs: the same generation with and without a tracer, in turn, as a ratio.

    python benchmarks/tracing_overhead.py [--hidden] -o benchmarks/results/tracing_overhead.json

A block repeats a batch of 32 prompts, prefill alone or with 63 decode steps, for some seconds of CPU time; a traced
block opens one tracer and writes its files. Blocks come in pairs, traced first in every other one, and the median of
the pairs' ratios is reported with its quartiles. On CPU one thread is used, and two figures stand beside the ratio of
wall times that notice less of what else runs on the machine: the ratio of CPU times, and the share of the traced
blocks' CPU time that is spent inside the tracer (hooks, counting, writing; not torch's calling of hooks). --hidden: the
tracer also keeps every token and what entered the routers, of all requests.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import stamp

from gemopt.documents import write_text
from gemopt.models import describe, tiny, tiny_moe_path
from gemopt.profiling.generating import default_device
from gemopt.profiling.tracing import HiddenSample, Tracer

BATCH, PROMPT, NEW = 32, 128, 64


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


class Timed(Tracer):
    """A tracer that adds up the CPU time spent in it."""

    inside = 0.0

    def _timed(self, function: Any, *arguments: Any) -> Any:
        begin = time.thread_time()
        try:
            return function(*arguments)
        finally:
            self.inside += time.thread_time() - begin

    def __enter__(self) -> Timed:
        self._timed(super().__enter__)
        return self

    def __exit__(self, *error: Any) -> None:
        self._timed(super().__exit__, *error)

    def _begin(self, *arguments: Any) -> None:
        self._timed(super()._begin, *arguments)

    def _end(self, *arguments: Any) -> None:
        self._timed(super()._end, *arguments)

    def _router_hook(self, index: int) -> Any:
        hook = super()._router_hook(index)
        return lambda *arguments: self._timed(hook, *arguments)


def batch(device: str) -> dict[str, torch.Tensor]:
    """Random prompts, every other one padded by a quarter."""
    ids = torch.randint(3, 250, (BATCH, PROMPT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::2, : PROMPT // 4] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def block(
    model: Any,
    folder: Path | None,
    device: str,
    *,
    new_tokens: int,
    repeats: int,
    hidden: bool,
    kind: type[Tracer] = Tracer,
) -> tuple[float, ...]:
    """Seconds of one block: wall, CPU, and CPU inside the tracer if that is `Timed`, where there is a folder."""
    inputs, requests = batch(device), frozenset(range(BATCH * repeats))
    kept = HiddenSample(requests, len(requests) * (PROMPT + new_tokens)) if hidden else None
    synchronize = getattr(torch, device).synchronize if device != "cpu" else lambda: None
    synchronize()
    begin, cpu = time.perf_counter(), time.process_time()
    with kind(model, folder, hidden=kept) if folder is not None else nullcontext() as tracer:
        for _ in range(repeats):
            model.generate(**inputs, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False)
    synchronize()
    return time.perf_counter() - begin, time.process_time() - cpu, getattr(tracer, "inside", 0.0)


def compare(model: Any, device: str, *, new_tokens: int, pairs: int, seconds: float, hidden: bool) -> dict[str, Any]:
    """Ratios of traced to untraced blocks. Each generation of n tokens is n steps, the prefill step included."""
    play = partial(block, model, device=device, new_tokens=new_tokens, hidden=hidden)
    play(None, repeats=1)
    once = play(None, repeats=1)[1]  # CPU time, whatever else runs
    repeats = max(1, round(seconds / once))
    ratios: list[tuple[float, ...]] = []
    plain: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(pairs):
            traced = Path(scratch) / str(number)
            order = [traced, None] if number % 2 else [None, traced]
            times = {f: play(f, repeats=repeats) for f in order}
            on, off = times[traced], times[None]
            folder = Path(scratch) / f"{number}-timed"  # a block of its own: timing every hook costs several per cent
            timed = play(folder, repeats=repeats, kind=Timed)
            ratios.append((on[0] / off[0], on[1] / off[1], timed[2] / (timed[1] - timed[2])))
            plain.append(times[None][0])
    steps = new_tokens * repeats
    result: dict[str, Any] = {"pairs": pairs, "steps_per_block": steps}
    result["untraced_ms_per_step"] = 1e3 * statistics.median(plain) / steps
    for name, values in zip(("wall_ratio", "cpu_ratio", "inside_share"), zip(*ratios, strict=True), strict=True):
        low, middle, high = statistics.quantiles(values, n=4)
        result[name] = {"median": middle, "quartiles": [low, high]}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU time of a block")
    parser.add_argument("--hidden", action="store_true", help="keep hidden states of all requests, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU, 1 thread"
    results: dict[str, Any] = {"measured": stamp("torch", "transformers"), "device": name}
    results |= {"batch": BATCH, "prompt_tokens": PROMPT, "hidden": arguments.hidden}
    for network, model in networks(arguments.device).items():
        shape = describe(model)
        rows = {
            "layers": model.config.num_hidden_layers,
            **shape.model_dump(include={"hidden_size", "num_experts", "top_k"}),
        }
        for kind, new_tokens in (("prefill", 1), ("generation", NEW)):
            rows[kind] = compare(
                model,
                arguments.device,
                new_tokens=new_tokens,
                pairs=arguments.pairs,
                seconds=arguments.seconds,
                hidden=arguments.hidden,
            )
        results[network] = rows
        for kind in ("prefill", "generation"):
            wall, cpu, inside = (rows[kind][key]["median"] for key in ("wall_ratio", "cpu_ratio", "inside_share"))
            step = f"{rows[kind]['untraced_ms_per_step']:8.2f} ms/step"
            print(
                f"{network:8s} {kind:10s} {step}   wall x {wall:.4f}   CPU x {cpu:.4f}   inside {inside:.4f}",
                flush=True,
            )
    write_text(arguments.output, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Serve the shipped model on ranks of different speed: profile, trace, solve, apply, and measure what that gains.

Four ranks run under CPU quotas, so that they stand for devices of different speed. The experts are widened by zero
columns, which changes no output and no routing, until MoE layers take most of a step. The ranks are profiled together;
decoding real text is traced; placements are solved on one half of the text and measured on the other, round after
round in turn. The makespan of a layer is the time of the experts on the slowest rank, and is compared with what
`evaluate` predicts for the same steps: the mean of a profile taken before the rounds, which placements are solved on,
and one taken after them, because the speed of a shared machine drifts in the meantime.

    torchrun --standalone --nproc-per-node 4 benchmarks/live.py -o live.json
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from live_ranks import (
    PROMPT,
    QUOTAS,
    Run,
    Stopwatch,
    change,
    decode,
    from_rank_0,
    measure_profile,
    overlapping,
    quota_of,
    say,
    start,
    widen,
)
from machine import stamp
from transformers import AutoTokenizer

from gemopt import Placement, Profile, Traces, solve
from gemopt.evaluate import evaluate
from gemopt.executor import Executor
from gemopt.models import tiny_moe_path

WIDTHS = (768, 1536, 2304, 3072, 4608, 6144, 9216, 10752, 12288, 13824, 15360, 18432)
MOE_SHARE = 0.7


def text(sequences: int, steps: int, part: int) -> torch.Tensor:
    """[sequences, PROMPT + steps] tokens of Python's standard library; part 0 and 1 have no file in common."""
    files = sorted(glob.glob(os.path.join(os.path.dirname(os.__file__), "*.py")))[part::2]
    tokenizer = AutoTokenizer.from_pretrained(tiny_moe_path())
    joined = "".join(Path(name).read_text(errors="ignore")[2000:8000] for name in files)
    length = PROMPT + steps
    ids = tokenizer(joined[: 40 * sequences * length], add_special_tokens=False)["input_ids"]
    starts = np.linspace(0, len(ids) - length, sequences).astype(int)
    return torch.tensor([ids[start : start + length] for start in starts])


def find_width(
    model: Any, tokens: torch.Tensor, watch: Stopwatch, quota: contextlib.AbstractContextManager[Any]
) -> int:
    """Widen step by step until the experts of the slowest rank take MOE_SHARE of a contiguous step."""
    with quota:
        for width in WIDTHS:
            widen(watch.layers, width)
            run = decode(model, tokens[:, : PROMPT + 6], watch)
            share = float(run.experts_TLG.max(axis=2).sum() / run.step_T.sum())
            if share >= MOE_SHARE:
                break
    say(f"experts widened from 24 to {width}: MoE takes {100 * share:.0f} % of a contiguous step")
    return width


def placements(profile: Profile, traces: Traces, seconds: float) -> dict[str, Placement]:
    """Solved on rank 0: what is compared, by name. Unequal slots: the best predicted of a few shapes."""
    ranks = profile.num_ranks
    fields = {"layer_ids": list(traces.layer_ids)}
    found = {"contiguous": Placement.contiguous(traces.num_layers, traces.num_experts, ranks, **fields)}
    for name, solver in (("EPLB", "eplb"), ("GEM", "gem"), ("gemopt", "auto")):
        found[name] = solve(profile, traces, solver=solver, time_limit=seconds).placement
    speed = 1 / np.array([np.median([s.latency_us for s in device.samples]) for device in profile.devices])
    best = None
    for power in (0.5, 1.0, 1.5, 2.0):
        share = speed**power / (speed**power).sum()
        slots = np.floor(share * traces.num_experts).astype(int)
        slots[np.argsort(-share)[: traces.num_experts - slots.sum()]] += 1
        result = solve(profile, traces, slots_per_rank=slots.tolist(), time_limit=seconds)
        if result.placement is not None and (best is None or result.objective_us < best.objective_us):
            best = result
    assert best is not None
    found["gemopt, unequal slots"] = best.placement
    return found


def summarise(
    name: str, runs: list[Run], predicted_us: list[float], others_us: dict[str, list[float]]
) -> dict[str, Any]:
    """Figures of one placement over the rounds."""
    steps_ms = np.concatenate([run.step_T for run in runs]) * 1e3
    rounds_us = [float(run.makespan_TL.sum()) for run in runs]
    measured_us = statistics.median(rounds_us)
    stragglers = np.median([run.experts_TLG.sum(axis=0).argmax(axis=1) for run in runs], axis=0).astype(int)
    return {
        "placement": name,
        "step_ms": {"mean": float(steps_ms.mean())}
        | {f"p{q}": float(np.percentile(steps_ms, q)) for q in (50, 90, 99)},
        "makespan_us": measured_us,
        "makespan_rounds_us": rounds_us,
        "predicted_us": predicted_us,
        "measured_over_predicted": measured_us / statistics.mean(predicted_us),
        "against": {other: change(rounds_us, values) for other, values in others_us.items() if other != name},
        "straggler_by_layer": stragglers.tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--training-steps", type=int, default=192, help="traced to solve on; quick, experts are narrow")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--points", type=int, default=60, help="loads to profile")
    parser.add_argument("--seconds", type=float, default=10.0, help="time limit of each solver")
    options = parser.parse_args()
    rank, model, layers = start()
    train, test = text(options.sequences, options.training_steps, 0), text(options.sequences, options.steps, 1)
    watch = Stopwatch(layers)
    counts = decode(model, train, watch).counts_TLE
    width = find_width(model, train, watch, quota_of(rank))
    executor = Executor(model, timeout_s=300)
    ids = executor.layer_ids
    traces = Traces(counts=counts, layer_ids=tuple(ids), top_k=4)

    many = overlapping(ids, layers[0].num_experts, 32)

    def profiled(max_drift: float) -> Profile:
        executor.apply(many)
        with quota_of(rank):
            return measure_profile(watch, width, 2 * options.sequences * 4, options.points, max_drift)

    profile = profiled(max_drift=0.3)
    wanted = from_rank_0(placements(profile, traces, options.seconds) if rank == 0 else None)

    runs: dict[str, list[Run]] = {name: [] for name in wanted}
    with quota_of(rank):
        for number in range(options.rounds):
            names = list(wanted)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                executor.apply(wanted[name])
                runs[name].append(decode(model, test, watch))
    after = profiled(max_drift=1.0)
    if rank == 0:
        report(options, width, [profile, after], ids, wanted, runs)
    dist.destroy_process_group()


def report(
    options: argparse.Namespace,
    width: int,
    profiles: list[Profile],
    ids: list[int],
    wanted: dict[str, Placement],
    runs: dict[str, list[Run]],
) -> None:
    """Print, and write, what came out."""
    makespans_us = {name: [float(run.makespan_TL.sum()) for run in some] for name, some in runs.items()}
    rows = []
    for name, placement in wanted.items():
        steps = Traces(counts=runs[name][0].counts_TLE, layer_ids=tuple(ids), top_k=4)
        predicted_us = [evaluate(placement, profile, steps).objective_us for profile in profiles]
        rows.append(summarise(name, runs[name], predicted_us, makespans_us))
        rows[-1]["slots_per_rank"] = placement.slots_per_rank.tolist()
    for row in rows:
        low, high = min(row["makespan_rounds_us"]), max(row["makespan_rounds_us"])
        changes = [
            f"against {other} {100 * c['median']:+.1f} % "
            f"(mean {100 * c['mean']:+.1f}, standard error {100 * c['standard_error']:.1f})"
            for other, c in row["against"].items()
        ]
        step = ", ".join(f"{key} {value:.1f}" for key, value in row["step_ms"].items())
        print(
            f"{row['placement']}, slots {row['slots_per_rank']}: MoE {row['makespan_us'] / 1e3:.1f} ms "
            f"({low / 1e3:.0f} to {high / 1e3:.0f}), measured/predicted {row['measured_over_predicted']:.3f} "
            f"(predicted {', '.join(f'{us / 1e3:.0f}' for us in row['predicted_us'])} ms before, after), "
            f"step ms {step}, stragglers {row['straggler_by_layer']}"
        )
        print("    " + "; ".join(changes))
    if options.output:
        facts: dict[str, Any] = {"measured": stamp("torch", "transformers"), "quotas": QUOTAS, "width": width}
        facts |= {name: getattr(options, name) for name in ("rounds", "steps", "sequences", "training_steps")}
        options.output.write_text(json.dumps({**facts, "placements": rows}, indent=1) + "\n")
        profiles[0].save(options.output.with_suffix(".profile.json"))


if __name__ == "__main__":
    main()

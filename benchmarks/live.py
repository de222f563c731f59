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
import functools
import glob
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from machine import stamp
from torch import nn
from transformers import AutoTokenizer, logging

from gemopt import Placement, Profile, Traces, solve
from gemopt.evaluate import evaluate
from gemopt.executor import Executor
from gemopt.executor.expert_parallel import SlotDispatch, dispatches
from gemopt.executor.load import layout, load
from gemopt.models import tiny_moe_path
from gemopt.profile import MoeShape
from gemopt.profiling.device import Device
from gemopt.profiling.group import Group
from gemopt.profiling.measure import Timing
from gemopt.profiling.profiler import Options, Profiler, Rank
from gemopt.profiling.throttle import cpu_quota
from gemopt.profiling.workload import Experts

QUOTAS = (0.5, 0.475, 0.425, 0.35)
WIDTHS = (768, 1536, 2304, 3072, 4608, 6144, 9216, 10752, 12288, 13824, 15360, 18432)
MOE_SHARE = 0.7
PROMPT = 8


@dataclass
class Stopwatch:
    """Time of the experts and counts of assignments on this rank, layer by layer, step by step."""

    layers: list[SlotDispatch]
    experts_s: list[list[float]] = field(default_factory=list)
    counts: list[list[list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for index, dispatch in enumerate(self.layers):
            dispatch.experts_forward = functools.partial(self._timed, index, dispatch.experts_forward)
            dispatch._slots = functools.partial(self._counted, index, dispatch._slots)  # type: ignore[method-assign]

    def _timed(self, layer: int, inner: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = inner(*arguments)
        if self.experts_s:
            self.experts_s[-1][layer] += time.perf_counter() - start
        return result

    def _counted(self, layer: int, inner: Any, routing: Any, ids: torch.Tensor) -> Any:
        if self.counts:
            self.counts[-1][layer] = torch.bincount(ids.flatten(), minlength=routing.num_experts).tolist()
        return inner(routing, ids)

    def begin(self) -> None:
        """A step begins."""
        self.experts_s.append([0.0] * len(self.layers))
        self.counts.append([[] for _ in self.layers])


@dataclass(frozen=True)
class Run:
    """What all ranks measured over some steps: step_T seconds, experts_TLG seconds, counts_TLE assignments."""

    step_T: np.ndarray
    experts_TLG: np.ndarray
    counts_TLE: np.ndarray

    @property
    def makespan_TL(self) -> np.ndarray:
        """[T, L] microseconds of the slowest rank's experts."""
        return self.experts_TLG.max(axis=2) * 1e6


def text(sequences: int, steps: int, part: int) -> torch.Tensor:
    """[sequences, PROMPT + steps] tokens of Python's standard library; part 0 and 1 have no file in common."""
    files = sorted(glob.glob(os.path.join(os.path.dirname(os.__file__), "*.py")))[part::2]
    tokenizer = AutoTokenizer.from_pretrained(tiny_moe_path())
    joined = "".join(Path(name).read_text(errors="ignore")[2000:8000] for name in files)
    length = PROMPT + steps
    ids = tokenizer(joined[: 40 * sequences * length], add_special_tokens=False)["input_ids"]
    starts = np.linspace(0, len(ids) - length, sequences).astype(int)
    return torch.tensor([ids[start : start + length] for start in starts])


@torch.no_grad()
def decode(model: Any, tokens: torch.Tensor, watch: Stopwatch) -> Run:
    """Feed the text token by token, all sequences at once."""
    watch.experts_s, watch.counts = [], []
    cache = model(tokens[:, :PROMPT], use_cache=True).past_key_values
    steps = []
    for position in range(PROMPT, tokens.shape[1]):
        dist.barrier()
        watch.begin()
        start = time.perf_counter()
        cache = model(tokens[:, position : position + 1], past_key_values=cache, use_cache=True).past_key_values
        steps.append(time.perf_counter() - start)
    mine = (steps, watch.experts_s)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    counts = np.array(watch.counts)
    watch.experts_s, watch.counts = [], []
    return Run(
        np.max([other[0] for other in everyone], axis=0), np.stack([other[1] for other in everyone], axis=2), counts
    )


def widen(layers: list[SlotDispatch], width: int) -> None:
    """Give every expert an intermediate size of `width`, the new part zero: outputs and routing stay."""
    for dispatch in layers:
        dispatch.take_over()
        experts = dispatch.experts
        gate_up, down = experts.gate_up_proj.data, experts.down_proj.data
        gate, up = gate_up.chunk(2, dim=1)
        wide = [nn.functional.pad(part, (0, 0, 0, width - part.shape[1])) for part in (gate, up)]
        experts.gate_up_proj = nn.Parameter(torch.cat(wide, dim=1), requires_grad=False)
        wide_down = nn.functional.pad(down, (0, width - down.shape[2]))
        experts.down_proj = nn.Parameter(wide_down.contiguous(), requires_grad=False)


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


def measure_profile(watch: Stopwatch, width: int, most: int, points: int, max_drift: float) -> Profile:
    """Profile of all ranks together, run by the experts modules of the live model."""
    group, first = Group(), watch.layers[0]
    shape = MoeShape(
        name="tiny-moe", hidden_size=96, intermediate_size=width, num_experts=first.num_experts,
        num_local_experts=int(first.row.slots_per_rank[first.rank]), top_k=4, dtype="float32",
        expert_bytes=first.expert_bytes,
    )  # fmt: skip
    device = Device("cpu")
    forwards = [dispatch.experts_forward for dispatch in watch.layers]
    workload = Experts(shape, "transformers", device, forwards)
    timing = Timing(block_us=20_000, seconds=0.2)
    options = Options(points=points, max_assignments=most, timing=timing, settle_s=5, max_drift=max_drift)
    rank = Rank(workload, device, group, options)
    with group.watch():
        if group.rank:
            group.serve(rank.answer)
            profile = None
        else:
            profile = Profiler(rank).run()
            group.dismiss()
    return from_rank_0(profile)


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


def from_rank_0(value: Any) -> Any:
    """What rank 0 has, on every rank."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def say(line: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(line, flush=True)


@contextlib.contextmanager
def quota_of(rank: int) -> Iterator[None]:
    """This rank's share of a core."""
    with cpu_quota(QUOTAS[rank]) as method:
        if rank == 0:
            print(f"quotas {QUOTAS} by {method}", flush=True)
        yield


def change(rounds_us: list[float], others_us: list[float]) -> dict[str, Any]:
    """Relative change against another placement in the same round: each, their median, mean and its standard error."""
    changes = [ours / other - 1 for ours, other in zip(rounds_us, others_us, strict=True)]
    error = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else float("nan")
    return {
        "median": statistics.median(changes), "mean": statistics.mean(changes), "standard_error": error,
        "rounds": changes,
    }  # fmt: skip


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
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks != len(QUOTAS):
        parser.error(f"start it on {len(QUOTAS)} ranks")
    model = load(tiny_moe_path(), layout("shared", ranks), dtype=torch.float32)
    layers = [dispatch for _, dispatch in dispatches(model)]
    train, test = text(options.sequences, options.training_steps, 0), text(options.sequences, options.steps, 1)
    for dispatch in layers:
        dispatch.take_over()
    watch = Stopwatch(layers)
    counts = decode(model, train, watch).counts_TLE
    width = find_width(model, train, watch, quota_of(rank))
    executor = Executor(model, timeout_s=300)
    ids, experts = executor.layer_ids, layers[0].num_experts
    traces = Traces(counts=counts, layer_ids=tuple(ids), top_k=4)

    doubled = [list(range(16 * r, 16 * r + 32)) for r in range(ranks)]  # each rank holds 32 experts while measured
    rows = [[expert % experts for part in doubled for expert in part]] * len(ids)
    many = Placement(physical_to_logical=rows, slots_per_rank=[32] * ranks, num_experts=experts, layer_ids=ids)

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
        facts: dict[str, Any] = {
            "measured": stamp("torch", "transformers"),
            "quotas": QUOTAS,
            "width": width,
            "rounds": options.rounds,
            "steps": options.steps,
        }
        facts |= {"sequences": options.sequences, "training_steps": options.training_steps}
        options.output.write_text(json.dumps({**facts, "placements": rows}, indent=1) + "\n")
        profiles[0].save(options.output.with_suffix(".profile.json"))


if __name__ == "__main__":
    main()

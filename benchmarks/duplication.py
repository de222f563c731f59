"""Duplication per batch, ours beside MoE-GPS's greedy, and predictors on requests that they have not seen; tables.

python benchmarks/duplication.py [--data FOLDER] [--layers 2] [--steps 512]

Both duplicate from contiguous placement with one spare slot per rank and the same predictions. `free`: copying costs
nothing, as MoE-GPS assumes once it is hidden. `priced`: 20 GB/s, hidden behind 100 us a layer, steps 5 % slower
meanwhile, 100 us a commit. The greedy one splits as planned; ours splits what was routed by the latencies of the ranks.
Predictors need `gptoss20b_tokens.npz` in the folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from follow_cases import SHIPPED, counts, devices, fleets
from instances import affine_profile
from machine import stamp

from gemopt.formats.kernel_table import slow_down
from gemopt.predict import PREDICTORS, assess, make
from gemopt.profile import Profile
from gemopt.replay import Migration, replay
from gemopt.replay.duplication import Duplicated
from gemopt.traces import Traces, from_tokens

FREE = Migration(commit_us=0, slowdown=0, bytes_per_s=1e15, expert_bytes=1e-6)
PRICED = Migration()
PREDICTED = ("all-past", "window")


def systems(ranks: int) -> dict[str, Profile]:
    """Equal ranks, a measured fleet, and one with a slow rank."""
    fleet = fleets(["frontera_resnet"])[0]
    measured = devices(fleet, ranks)
    return {
        "equal": affine_profile(np.ones(ranks), largest=16384),
        "RTX 5000": measured,
        "one rank 1.3 x slower": slow_down(measured, ranks // 2, 1.3),
    }


def duplication(traffic: dict[str, Traces], layers: int) -> None:
    """One row per cell."""
    print("## Duplication\n\nChange of the makespan against contiguous placement in per cent, copying included.\n")
    print(
        "| trace | ranks | devices | predictor | copying | greedy | copies | ours | copies | ahead |\n"
        + "|---" * 10
        + "|"
    )
    ahead: dict[str, list[float]] = {}
    for name, traces in traffic.items():
        for ranks in (4, 8):
            slots = traces.num_experts // ranks + 1
            for devices_name, profile in systems(ranks).items():
                for predictor in PREDICTED:
                    both = [Duplicated(predictor, method=m, contiguous=True, name=m) for m in ("greedy", "latency")]
                    for price, migration in (("free", FREE), ("priced", PRICED)):
                        result = replay(profile, traces, both, slots_per_rank=slots, migration=migration,
                                        non_moe_us=100.0 * layers)  # fmt: skip
                        theirs, ours = result.rows
                        lead = 100 * ((theirs.change or 0.0) - (ours.change or 0.0))
                        ahead.setdefault(f"{devices_name}, {price}", []).append(lead)
                        print(f"| {name} | {ranks} | {devices_name} | {predictor} | {price} "
                              f"| {100 * (theirs.change or 0.0):+.1f} | {theirs.moves} "
                              f"| {100 * (ours.change or 0.0):+.1f} | {ours.moves} | {lead:+.1f} |")  # fmt: skip
    print("\n| devices, copying | cells | ahead at least | median |\n|---|---|---|---|")
    for cell, leads in ahead.items():
        print(f"| {cell} | {len(leads)} | {min(leads):+.1f} | {np.median(leads):+.1f} |")


def predictors(path: Path, layers: int, requests: int) -> None:
    """Accuracy by layer on held-out requests, error, and what a prediction takes here."""
    with np.load(path) as file:
        ends = file["req_start"][: requests + 1]
        ids, tasks = file["ids"][: ends[-1], :layers], [str(each) for each in file["domain"][:requests]]
        traces = from_tokens(ids, ends[:-1], num_experts=32, batch_size=32, request_tasks=tasks)
    print(f"\n## Predictors\n\ngpt-oss-20b token by token, {requests} requests, a quarter held out, {layers} layers. "
          "Accuracy: share of a token's 4 experts among the 4 named. Error: mean |p^ - p| E.\n")  # fmt: skip
    shown = [0, 1, *range(2, layers, max(1, layers // 6))]
    head = " | ".join(f"layer {layer}" for layer in shown)
    print(f"| predictor | mean | {head} | error % | us a token and layer | bytes |\n" + "|---" * (len(shown) + 5) + "|")
    for name in PREDICTORS:
        if name == "token":  # the record has no vocabulary ids
            continue
        found = assess(make(name), traces)
        cells = " | ".join(f"{100 * found.accuracy_L[layer]:.1f}" for layer in shown)
        print(f"| {name} | {100 * found.accuracy_L.mean():.1f} | {cells} | {100 * found.error_L.mean():.1f} "
              f"| {found.us_per_token:.3f} | {found.bytes_per_token:.0f} |", flush=True)  # fmt: skip


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with gptoss20b_tokens.npz and tinymoe_shift_open_b128.npz")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=512)
    options = parser.parse_args()
    shipped = {"gpt-oss mixed": "gptoss20b_trace_mixed_b64", "gpt-oss shift": "gptoss20b_trace_shift_b32"}
    paths = {name: SHIPPED / f"{file}.npz" for name, file in shipped.items()}
    if options.data is not None:
        paths["tiny-MoE shift"] = options.data / "tinymoe_shift_open_b128.npz"
    print(
        f"{stamp('numpy', 'numba')}; first {options.layers} layers, first {options.steps} steps, second half scored\n"
    )
    loaded = {name: counts(path, options.layers) for name, path in paths.items()}
    duplication(
        {n: each.steps(slice(0, min(options.steps, each.num_steps))) for n, each in loaded.items()}, options.layers
    )
    if options.data is not None:
        predictors(options.data / "gptoss20b_tokens.npz", 24, 120)


if __name__ == "__main__":
    main()

"""Duplication per batch, ours beside MoE-GPS's greedy; tables.

python benchmarks/duplication.py [--data FOLDER] [--layers 2] [--steps 512]

All duplicate from contiguous placement with one spare slot per rank and the same predictions. `free`: copying costs
nothing, as MoE-GPS assumes once it is hidden. `priced`: 20 GB/s, hidden behind 100 us a layer, steps 5 % slower
meanwhile, 100 us a commit. The greedy one splits in the proportions that it planned. Ours splits what was routed by the
latencies of the ranks, or, as planned, in the proportions that were best for what was expected: the difference is what
knowing the batch is worth, the rest is the choice of copies.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from follow_cases import SHIPPED, counts, devices, fleets
from instances import affine_profile
from machine import stamp

from gemopt.formats.tables.kernel import slow_down
from gemopt.profile import Profile
from gemopt.replay import Migration, replay
from gemopt.replay.duplication import Duplicated
from gemopt.traces import Traces

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
        "| trace | ranks | devices | predictor | copying | greedy | copies | ours, split as planned | copies "
        "| ours | copies | planned ahead | ours ahead |\n" + "|---" * 13 + "|"
    )
    ahead: dict[str, list[tuple[float, float]]] = {}
    for name, traces in traffic.items():
        for ranks in (4, 8):
            slots = traces.num_experts // ranks + 1
            for devices_name, profile in systems(ranks).items():
                for predictor in PREDICTED:
                    all_three = [Duplicated(predictor, method=m, contiguous=True, name=m)
                                 for m in ("greedy", "planned", "latency")]  # fmt: skip
                    for price, migration in (("free", FREE), ("priced", PRICED)):
                        result = replay(profile, traces, all_three, slots_per_rank=slots, migration=migration,
                                        non_moe_us=100.0 * layers)  # fmt: skip
                        theirs, planned, ours = [100 * (row.change or 0.0) for row in result.rows]
                        ahead.setdefault(f"{devices_name}, {price}", []).append((theirs - planned, theirs - ours))
                        cells = (f"{100 * (row.change or 0.0):+.1f} | {row.moves}" for row in result.rows)
                        print(f"| {name} | {ranks} | {devices_name} | {predictor} | {price} | " + " | ".join(cells)
                              + f" | {theirs - planned:+.1f} | {theirs - ours:+.1f} |", flush=True)  # fmt: skip
    print("\n| devices, copying | cells | planned ahead at least | median | ours ahead at least | median |")
    print("|---" * 6 + "|")
    for cell, leads in ahead.items():
        (a, b), (x, y) = np.min(leads, axis=0), np.median(leads, axis=0)
        print(f"| {cell} | {len(leads)} | {a:+.1f} | {x:+.1f} | {b:+.1f} | {y:+.1f} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with tinymoe_shift_open_b128.npz")
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


if __name__ == "__main__":
    main()

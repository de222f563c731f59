"""What so many moves gain where slots are spare, by split; a table in Markdown.

python benchmarks/moved_copies.py [--seconds 5] [--current FOLDER]

Layers of gpt-oss-20b whose domain shifts (32 experts, 8 ranks of 5 slots) and drawn ones of 256 experts (16 ranks of 18
slots), each alone and several that share a budget, are placed for earlier steps; then the placement is changed for
later ones with at most so many moves.
Limits are CPU seconds of the process, so that a busy machine changes little. `--current` keeps the placements in force,
so that another version starts from the same ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from instances import affine_profile, routing, speeds
from machine import stamp

from gemopt import Placement, Profile, Traces, solve
from gemopt.profile import Device, Sample

GPTOSS = Path(__file__).resolve().parents[1] / "examples/data/gptoss20b_trace_shift_b32.npz"
SPLITS = {"even": None, "nearest": "uniform", "optimal": None}  # and who sends
STEPS = 400
Case = tuple[str, Profile, Traces, Traces, int, tuple[int, ...]]


def light() -> Profile:
    """Eight devices that differ, fast beside what few tokens take."""
    devices = [
        Device(rank=g, samples=[Sample(assignments=n, latency_us=(40 + 1.5 * n) / speed) for n in (0, 512)])
        for g, speed in enumerate(speeds(8))
    ]
    return Profile(devices=devices)


def cases() -> Iterator[Case]:
    """Name, devices, steps before and after, slots of a rank, and limits of moves."""
    shift = Traces.load(GPTOSS).counts
    for layers, limits in (([2], (2, 4, 8)), ([11], (2, 4, 8)), ([2, 8, 11, 20], (4, 8, 16))):
        before, after = (Traces(counts=shift[first : first + STEPS, layers]) for first in (0, 900))
        yield f"gpt-oss-20b, {', '.join(map(str, layers))}", light(), before, after, 5, limits
    for layers, seed, limits in ((1, 1, (8, 32)), (6, 3, (12, 48))):
        drawn = routing(layers=layers, steps=1000, seed=seed).counts
        before, after = Traces(drawn[:STEPS]), Traces(drawn[500:900])
        yield f"256 experts, {layers}", affine_profile(speeds(16)), before, after, 18, limits


def main() -> None:
    """Print the table."""
    time.monotonic = time.process_time
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--current", type=Path, default=Path("moved_copies"))
    asked = parser.parse_args()
    asked.current.mkdir(exist_ok=True)
    print(stamp("numpy", "numba"), f"{asked.seconds:g} CPU s a call, one thread", sep="; ")
    print("\n| layers | split | in force, us | " + "moves: us a step (change) |\n|---|---|---|---|")
    for name, profile, before, after, slots, limits in cases():
        for split, senders in SPLITS.items():
            given = {"slots_per_rank": slots, "split": split, "senders": senders, "threads": 1}
            path = asked.current / f"{name} {split}.json"
            if not path.exists():
                placed = solve(profile, before, time_limit=asked.seconds, **given).placement
                assert placed is not None
                placed.save(path)
            found = []
            for most in limits:
                given |= {"time_limit": asked.seconds, "current": Placement.load(path)}
                result = solve(profile, after, max_moves=most, **given)
                moves, us = result.moves, result.objective_us
                assert moves is not None and us is not None
                found.append(f"{most}: {us / STEPS:.2f} ({100 * (us / moves.makespan_before_us - 1):+.2f} %)")
            print(f"| {name} | {split} | {moves.makespan_before_us / STEPS:.2f} | {', '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()

"""Time, memory and size of `gemopt report` on 58 layers x 256 experts, as its user runs it: a process of its own.

    python benchmarks/report_page.py [--ranks 16] [--rounds 3]

Asked: under 20 s and 8 MB. The placement is solved beforehand; kernels are compiled beforehand.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import instances
import machine

import gemopt


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=20, help="seconds of solving beforehand")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = _command(Path(folder), arguments.ranks, arguments.limit)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        taken = [_once(command) for _ in range(arguments.rounds)]
        size = (Path(folder) / "report.html").stat().st_size
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(machine.stamp("numpy", "plotly"))
    print("| case | wall s, median (all) | page MB | peak memory GB |\n|---|---|---|---|")
    times = ", ".join(f"{seconds:.1f}" for seconds in taken)
    case = f"58 x 256 x 1000, G={arguments.ranks}"
    print(f"| {case} | {statistics.median(taken):.1f} ({times}) | {size / 1e6:.1f} | {peak / 1e6:.2f} |")


def _command(folder: Path, ranks: int, limit: float) -> list[str]:
    """Write profile, traces and a solved result into `folder`; the report command that reads them."""
    profile = instances.staircase_profile(instances.speeds(ranks))
    traces = instances.routing()
    profile.save(folder / "profile.json")
    traces.save(folder / "traces.safetensors")
    gemopt.solve(profile, traces, time_limit=limit).save(folder / "result.json")
    return [
        *(str(Path(sys.executable).with_name("gemopt")), "report", str(folder / "result.json")),
        *("--profile", str(folder / "profile.json"), "--traces", str(folder / "traces.safetensors")),
        *("-o", str(folder / "report.html")),
    ]


def _once(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

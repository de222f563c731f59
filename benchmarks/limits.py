"""How far `solve` overruns its limit, and how many cores it uses on one thread.

python benchmarks/limits.py [--limits 2 15] [--solvers ...]

58 layers of 256 experts on 16 ranks, 1000 and 4000 steps of synthetic routing; every solver in a process of its own,
with `threads=1`, on compiled kernels. Wall seconds are those of the call, from profile and traces in memory to the
result. CPU seconds include children. `(over)`: more wall seconds than the limit, a tenth of it and one second; on a
busy machine, where wall seconds say little, more CPU seconds: `--busy` writes so beside the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from instances import routing, speeds, staircase_profile
from machine import stamp

import gemopt
from gemopt.profile import Profile
from gemopt.solvers import names
from gemopt.traces import Traces

STEPS = (1000, 4000)
SLACK_S = 1.0


def measure(folder: Path, steps: int, solver: str, limit: float) -> dict[str, float | str]:
    """One call, in this process."""
    profile, traces = Profile.load(folder / "profile.json"), Traces.load(folder / f"{steps}.safetensors")
    few = traces.steps(slice(0, 2))
    gemopt.solve(profile, few, solver=solver, time_limit=1.0, threads=1)  # kernels loaded, libraries imported
    begin, before = time.monotonic(), os.times()
    result = gemopt.solve(profile, traces, solver=solver, time_limit=limit, threads=1)
    wall, after = time.monotonic() - begin, os.times()
    spent = sum(after[:4]) - sum(before[:4])
    reached = sum(layer.reached for layer in result.per_layer)
    return {"wall": wall, "cpu": spent, "reached": reached, "change": result.change or 0.0, "busy": os.getloadavg()[0]}


def child(folder: Path, steps: int, solver: str, limit: float) -> dict[str, float]:
    """The same in a process of its own."""
    words = [sys.executable, __file__, "--one", str(folder), str(steps), solver, str(limit)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(steps: int, solver: str, limit: float, found: dict[str, float], *, busy: bool) -> str:
    """One line of the table."""
    allowed = 1.1 * limit + SLACK_S
    wall, cpu = found["wall"], found["cpu"]
    over = " (over)" if (cpu if busy else wall) > allowed else ""
    return (
        f"| {steps} | {limit:g} | {solver} | {wall:.1f}{over} | {wall / limit:.2f} | {cpu:.1f} | {cpu / wall:.2f} "
        f"| {found['reached']:.0f} of 58 | {100 * found['change']:+.1f} | {found['busy']:.1f} |"
    )


def main() -> None:
    """Measure all and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limits", type=float, nargs="+", default=[2.0, 15.0])
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--solvers", nargs="+", default=names())
    parser.add_argument("--busy", action="store_true", help="say that the machine was shared with other work")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "limits.md")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        folder, steps, solver, limit = arguments.one
        print(json.dumps(measure(Path(folder), int(steps), solver, float(limit))))
        return
    lines = ["# Wall and CPU time against the limit", "", stamp("numpy", "numba", "ortools")]
    if arguments.busy:
        lines.append("Other work shared the cores: wall seconds are upper bounds, CPU / wall a lower bound.")
    lines += [
        "",
        "58 layers, 256 experts, 16 ranks, `threads=1`. `reached`: layers that were searched; `load`: load average.",
        "",
    ]
    lines += ["| steps | limit s | solver | wall s | wall / limit | CPU s | CPU / wall | reached | change % | load |"]
    lines += ["|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        staircase_profile(speeds(16)).save(folder / "profile.json")
        for steps in arguments.steps:
            routing(steps=steps).save(folder / f"{steps}.safetensors")
            for limit in arguments.limits:
                for solver in arguments.solvers:
                    found = child(folder, steps, solver, limit)
                    lines.append(row(steps, solver, limit, found, busy=arguments.busy))
                    print(lines[-1], flush=True)
    arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

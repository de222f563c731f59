"""Speed and answers of two versions of gemopt in one table: each measurement of both in turn, again and again.

python benchmarks/versions.py OLD_PYTHON NEW_PYTHON [--rounds 5] [--only NAME ...]

Each argument is the interpreter of an environment in which one version is installed. Every measurement is a process of
its own, warm (its first call is not counted), on one core. Shown are CPU seconds, which other work on the machine
disturbs less than the clock: medians, and the spread of the ratio by rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable

from instances import affine_profile, routing, speeds, staircase_profile
from machine import stamp

import gemopt
from gemopt.evaluate import evaluate
from gemopt.profile import Profile
from gemopt.traces import Traces

Measured = tuple[float, float]  # CPU seconds of the process, and the figure that must stay the same


def solved(profile: Profile, traces: Traces, solver: str, cost: str, **options: int) -> Measured:
    """One call, warm; 600 s are more than any of them takes, so nothing is cut."""
    words = {"solver": solver, "cost": cost, "time_limit": 600.0, "threads": 1, **options}
    gemopt.solve(profile, traces.steps(slice(0, 20)), **words)  # type: ignore[arg-type]
    begin = time.process_time()
    found = gemopt.solve(profile, traces, **words)  # type: ignore[arg-type]
    return time.process_time() - begin, found.objective_us or 0.0


def evaluated() -> Measured:
    """A placement of 58 layers scored on 1000 steps."""
    profile, traces = staircase_profile(speeds(16)), routing()
    placement = gemopt.solve(profile, traces.steps(slice(0, 20)), solver="linear", cost="staircase").placement
    assert placement is not None
    begin = time.process_time()
    score = evaluate(placement, profile, traces).objective_us
    return time.process_time() - begin, score


SOLVES: dict[str, tuple[int, Callable[..., Profile], str, str]] = {
    "descent, affine, G = 8": (8, affine_profile, "local-search", "staircase"),
    "descent, affine, G = 64": (64, affine_profile, "local-search", "staircase"),
    "descent, staircase, G = 16": (16, staircase_profile, "local-search", "staircase"),
    "LPT, staircase, G = 16": (16, staircase_profile, "lpt", "staircase"),
    "EPLB, staircase, G = 16": (16, staircase_profile, "eplb", "staircase"),
}
OTHERS: dict[str, Callable[[], Measured]] = {
    "evaluate, 58 layers x 1000 steps": evaluated,
}


def measure(name: str) -> Measured:
    """Seconds and figure of one row, in this process with the gemopt that it imports."""
    if name in OTHERS:
        return OTHERS[name]()
    if name == "CP-SAT, 9 experts on 4 ranks":
        return solved(affine_profile(speeds(4)), routing(layers=1, experts=9, steps=12), "cpsat", "staircase")
    if name == "swap search, 2 layers to its patience":
        small = routing(layers=2, experts=64, steps=400)
        return solved(staircase_profile(speeds(8)), small, "local-search", "staircase", patience=20)
    ranks, profile, solver, cost = SOLVES[name]
    return solved(profile(speeds(ranks)), routing(), solver, cost, patience=0)


NAMES = (*SOLVES, *OTHERS, "swap search, 2 layers to its patience", "CP-SAT, 9 experts on 4 ranks")


def asked(python: str, name: str) -> Measured:
    """One measurement by another interpreter."""
    done = subprocess.run([python, __file__, "--measure", name], capture_output=True, text=True, check=True)
    seconds, figure = json.loads(done.stdout.splitlines()[-1])
    return seconds, figure


def row(name: str, old: str, new: str, rounds: int) -> str:
    """Both in turn; the ratio is of neighbours in time."""
    for python in (old, new):
        asked(python, name)  # fills the compile caches
    pairs = [(asked(old, name), asked(new, name)) for _ in range(rounds)]
    before, after = ([pair[side][0] for pair in pairs] for side in (0, 1))
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    change = 100 * (pairs[-1][1][1] / pairs[-1][0][1] - 1)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    medians = f"{statistics.median(before):.2f} | {statistics.median(after):.2f} | {statistics.median(ratios):.2f}"
    return f"| {name} | {medians} | {spread} | {change:+.3f} % |"


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?")
    parser.add_argument("new", nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=NAMES, choices=NAMES)
    parser.add_argument("--measure", choices=NAMES, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.measure:
        print(json.dumps(measure(words.measure)))
        return
    if words.new is None:
        parser.error("OLD_PYTHON and NEW_PYTHON: two interpreters, each with its version of gemopt")
    print(f"## Two versions in turn\n\n{stamp('numpy', 'numba', 'ortools')}\n")
    print("| what | before s | after s | ratio | by rounds | answer |\n|---|---|---|---|---|---|")
    for name in words.only:
        print(row(name, words.old, words.new, words.rounds), flush=True)


if __name__ == "__main__":
    main()

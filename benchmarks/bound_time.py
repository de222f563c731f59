"""The co-location bound over the layers of a model: equal shares of the time, or lent where it gains; prints a table.

python benchmarks/bound_time.py [--ranks 8] [--offset 0]

gpt-oss-20b, mixed tasks, 24 layers of 32 experts, 400 steps, `offset + 0.146 us` per assignment over U[0.9, 1.1]. The
bound of every layer is recorded by the iterations in which it cools; both ways of dividing them are then played on
these records, so that the load of the machine does not matter. Gaps are against one descent.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from instances import TILE, TILE_US, speeds
from machine import stamp

from gemopt.bounds import step_bounds, weighted
from gemopt.bounds.colocation import Programme
from gemopt.bounds.dual_bound import dual_bound
from gemopt.bounds.primal_dual import PrimalDual
from gemopt.bounds.together import CHUNK, HOPELESS, RISES, SHORTEST
from gemopt.costs import fit
from gemopt.problem import Problem, problems
from gemopt.profile import Device, Profile, Sample
from gemopt.solvers import get
from gemopt.solvers.base import Options
from gemopt.traces import Traces

GPTOSS = Path(__file__).resolve().parents[1] / "examples/data/gptoss20b_trace_mixed_b64.npz"
BUDGETS = (25, 50, 100, 150, 200, 300, 400, 600, 800, 1000)


class Record:
    """Bounds of one layer in microseconds after so many iterations, and what a descent reaches."""

    def __init__(self, problem: Problem) -> None:
        floor_T = step_bounds(problem)
        self.value = get("local-search").solve(problem, Options(np.inf, patience=0), None).history[-1].objective_us
        self.base = weighted(problem, floor_T)
        programme = Programme.of(problem, floor_T)
        self.bounds = {0: self.base} | {count: cooled(programme, count) for count in BUDGETS}

    def after(self, iterations: float) -> float:
        """The bound known by then."""
        return max(bound for count, bound in self.bounds.items() if count <= iterations)


def cooled(programme: Programme, count: int) -> float:
    """The bound of one cycle of so many iterations."""
    search = PrimalDual(programme)
    search.heat()
    while search.iterations < count:
        search.iterate(min(CHUNK, count - search.iterations))
        search.cool(search.iterations / count)
    return dual_bound(programme, *search.multipliers())


def equal(records: list[Record], budget: float) -> float:
    """Sum of the bounds when every layer has its share."""
    return sum(record.after(budget / len(records)) for record in records)


def lent(records: list[Record], budget: float) -> float:
    """Sum of the bounds when a layer takes what it needs to rise as `together_bound` does, where most is open first."""
    total, rises = 0.0, RISES * SHORTEST
    for number, record in enumerate(sorted(records, key=lambda each: each.base - each.value)):
        share = budget / (len(records) - number)
        used = rises if share < rises <= budget else share
        used = CHUNK if used < HOPELESS * rises else used
        total += record.after(used)
        budget -= min(used, budget)
    return total


def main() -> None:
    """Record, play and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--offset", type=float, default=0.0)
    given = parser.parse_args()
    devices = [
        Device(rank=rank, samples=[
            Sample(assignments=n, latency_us=float((given.offset + TILE_US / TILE * n + 1e-6) / speed))
            for n in (0, 65536)
        ])
        for rank, speed in enumerate(speeds(given.ranks))
    ]  # fmt: skip
    profile = Profile(devices=devices, source="synthetic")
    traces = Traces.load(GPTOSS).steps(np.arange(400))
    records = [Record(problem) for problem in problems(fit(profile)[0], traces)]
    value = sum(record.value for record in records)
    print(stamp())
    print("\n| iterations per layer | equal shares, gap % | lent, gap % |\n|---|---|---|")
    for each in BUDGETS:
        gaps = [100 * (1 - way(records, each * len(records)) / value) for way in (equal, lent)]
        print(f"| {each} | {gaps[0]:.2f} | {gaps[1]:.2f} |")


if __name__ == "__main__":
    main()

"""What the exact solvers prove, and what they find, in the same time from the same start; prints a table in Markdown.

One layer, affine costs, ranks that differ by U[0.9, 1.1] or are equal; gaps are (objective - bound) / objective, the
mean over three draws. The simple bound is what every heuristic's answer comes with.

python benchmarks/exact_gap.py [--seconds 10]
"""

from __future__ import annotations

import argparse

import numpy as np
from instances import affine_profile, routing, speeds
from speed import header

import gemopt

SHAPES = ((8, 8, 100), (16, 4, 100), (16, 8, 100), (32, 8, 100))
DRAWS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    header(f"Gap proven in {options.seconds:.0f} s, one layer, affine costs, mean of {DRAWS} draws")
    print("| experts | ranks | steps | ranks are | simple bound | cpsat | milp | cpsat over local search |")
    print("|---|---|---|---|---|---|---|---|")
    for experts, ranks, steps in SHAPES:
        for kind in ("different", "equal"):
            rows = [_solve(experts, ranks, steps, kind, draw, options.seconds) for draw in range(DRAWS)]
            simple, cpsat, milp, found = np.mean(rows, axis=0)
            print(
                f"| {experts} | {ranks} | {steps} | {kind} | {simple:.1f} % | {cpsat:.1f} % | {milp:.1f} % "
                f"| {found:+.2f} % |",
                flush=True,
            )


def _solve(experts: int, ranks: int, steps: int, kind: str, draw: int, seconds: float) -> list[float]:
    """Gaps in per cent of the simple bound, CP-SAT and MILP; CP-SAT's objective against local search's."""
    traces = routing(layers=1, experts=experts, steps=steps, tokens=64 * experts, top_k=4, seed=draw)
    profile = affine_profile(speeds(ranks, seed=draw) if kind == "different" else np.ones(ranks))
    gaps, values = [], []
    for solver in ("local-search", "cpsat", "milp"):
        found = gemopt.solve(profile, traces, solver=solver, time_limit=seconds, cost="staircase", seed=draw)
        assert found.objective_us is not None
        assert found.gap is not None
        gaps.append(100 * found.gap)
        values.append(found.objective_us)
    return [*gaps, 100 * (values[1] / values[0] - 1)]


if __name__ == "__main__":
    main()

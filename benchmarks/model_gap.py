"""What `solve` proves for a whole model in a time: gap by time limit, the demo's traffic; prints a table in Markdown.

python benchmarks/model_gap.py [--limits 10 30 60] [--threads 2]

24 layers of gpt-oss-20b on eight GPUs. Limits are wall seconds; on a machine that others use they say little.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from machine import stamp

import gemopt
from gemopt.cli.demo import RANKS, SLOW_RANK, cases, on_surface


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limits", type=float, nargs="*", default=[5, 15, 30, 60])
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    print(f"{stamp('numpy', 'numba', 'scipy')}; {given.threads} threads\n")
    print("| case | limit, s | gap % | layers within 9 % | us per step |")
    print("|---|---|---|---|---|", flush=True)
    *staircases, _, _ = cases()
    title = "latency by assignments and activated experts (RTX PRO 6000), one GPU 30 % slower"
    roofline = replace(staircases[0], title=title, profile=on_surface(RANKS, slow_rank=SLOW_RANK))
    for case in (*staircases, roofline):
        gemopt.solve(case.profile, case.traces, time_limit=max(given.limits), patience=1)  # compiles, where needed
        for limit in given.limits:
            found = gemopt.solve(case.profile, case.traces, time_limit=limit, threads=given.threads)
            within = sum((layer.gap or 0.0) <= 0.09 for layer in found.per_layer)
            step_us = found.objective_us / case.traces.num_steps
            print(f"| {case.title} | {limit:g} | {100 * (found.gap or 0.0):.2f} | {within} of {len(found.per_layer)} | "
                  f"{step_us:.1f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

"""What choosing copies costs the executor: microseconds per layer and forward pass on one rank, by split.

python benchmarks/split_overhead.py [--repeats 200]

256 experts in 288 slots (320 on 64 ranks), copies of the hottest; every rank routes 4096 x 8 / G assignments of a
skewed step. Positions and totals, which an all-gather of 256 counts precedes, are given. CPU tensors, splits in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from instances import routing, speeds, staircase_profile
from machine import stamp

from gemopt.costs import fit
from gemopt.executor.plan import LayerRow
from gemopt.executor.splits import Assigned, Routing, positions
from gemopt.placement import Split
from gemopt.problem import problems
from gemopt.solvers.search.packing import lpt_row, peak_load, replicate
from gemopt.splits import even_weights


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=200)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    traces = routing(layers=1, steps=repeats)
    print(f"{stamp('torch', 'numba')}; medians of {repeats} steps\n")
    print("| G | slots | " + " | ".join(Split) + " |\n|" + "---|" * (2 + len(Split)))
    for ranks in (8, 16, 64):
        cost = fit(staircase_profile(speeds(ranks)), model="staircase")[0]
        (problem,) = problems(cost, traces, 320 // ranks if ranks == 64 else 288 // ranks)
        row = lpt_row(problem, copies_E=replicate(peak_load(problem), problem.slots_per_rank))
        weights, nodes, device = even_weights(row, 256), np.zeros(ranks, int), torch.device("cpu")
        rules = {
            split: Routing(LayerRow(row, problem.slots_per_rank, split, weights), 256, nodes, device, cost)
            for split in Split
        }
        times: dict[Split, list[float]] = {split: [] for split in Split}
        for counts_E in problem.counts_TE:
            total = torch.from_numpy(counts_E.astype(np.int64))
            mine = torch.repeat_interleave(torch.arange(256), total // ranks)
            assigned = Assigned(mine, torch.zeros_like(mine), positions(mine, total // ranks), total)
            for split, routed in rules.items():
                begin = time.perf_counter()
                assert routed.rule is not None
                routed.slots(assigned, routed.rule)
                times[split].append(1e6 * (time.perf_counter() - begin))
        medians = " | ".join(f"{statistics.median(times[split][5:]):.0f}" for split in Split)
        print(f"| {ranks} | {problem.num_slots} | {medians} |", flush=True)


if __name__ == "__main__":
    main()

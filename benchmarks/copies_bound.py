"""The copies bound and the optimal split's search, layer by layer, against the fluid time.

python benchmarks/copies_bound.py [--cells 32x288,64x320,64x384] [--layers 2] [--seconds 1,4,16] [--seeds 0]

Synthetic instance of `copies.py`, one for each seed. The bound under the even and the optimal split with its CPU
seconds; then what searches reach that are given so many CPU seconds beyond the first descent (one thread, one start
each), on the fitted steps / on those held out.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from copies import case
from machine import stamp

from gemopt.bounds import copies_bound, step_bounds
from gemopt.costs import fit
from gemopt.evaluate import objective
from gemopt.placement import Split
from gemopt.problem import Problem, problems
from gemopt.solvers import get
from gemopt.solvers.base import Options
from gemopt.solvers.search.spread_search import SpreadSearch
from gemopt.solvers.search.spreading import Looks

NEVER = np.zeros(1, np.uint8)
time.monotonic = time.process_time  # limits are CPU seconds, whatever else the machine does


def above(problem: Problem, row: np.ndarray) -> float:
    """Per cent above the fluid time."""
    return 100 * (objective(problem, row) / Looks(problem).fluid_us - 1)


def searched(problem: Problem, held: Problem, row: np.ndarray, seconds: list[float], seed: int) -> list[float]:
    """Per cent above the fluid time of searches planned for so many CPU seconds each, fitted and held out in turn."""
    values = []
    for limit in seconds:
        search, begin = SpreadSearch(problem, row, np.random.default_rng(seed)), time.process_time()
        left = lambda begin=begin, limit=limit: begin + limit - time.process_time()  # noqa: E731
        while left() > 0:
            search.step(lambda left=left: left() <= 0, left())
        values += [above(problem, search.best.row), above(held, search.best.row)]
    return values


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", default="32x288,64x320,64x384")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seconds", default="1,4,16", type=lambda text: [float(each) for each in text.split(",")])
    parser.add_argument("--seeds", default="0", type=lambda text: [int(each) for each in text.split(",")])
    asked = parser.parse_args()
    after = " | ".join(f"after {each:g} CPU s" for each in asked.seconds)
    print(f"{stamp('numpy', 'numba', 'scipy')}; {asked.layers} layers, per cent above the fluid time\n")
    print(f"| G | slots | bound, even | bound, optimal | CPU s | even, descents | optimal, first | {after} |")
    print("|" + "---|" * (7 + len(asked.seconds)))
    for cell in asked.cells.split(","):
        ranks, slots = map(int, cell.split("x"))
        columns: list[list[float]] = []
        spent = 0.0
        for seed in asked.seeds:
            traces, devices = case("synthetic", asked.layers, seed)
            cost = fit(devices(ranks), model="staircase")[0]
            given, kept = traces.split(0.5)
            freely = {"slots_per_rank": slots // ranks, "split": Split.OPTIMAL}
            for even, free, held in zip(
                problems(cost, given, slots // ranks),
                problems(cost, given, **freely),
                problems(cost, kept, **freely),
                strict=True,
            ):
                fluid_us, floor_T = Looks(free).fluid_us, step_bounds(free)
                begin = time.process_time()
                bounds = [100 * (copies_bound(each, floor_T, NEVER) / fluid_us - 1) for each in (even, free)]
                spent += (time.process_time() - begin) / 2
                first = [
                    get("local-search").solve(each, Options(np.inf, patience=0), None).row for each in (even, free)
                ]
                assert first[0] is not None and first[1] is not None
                values = [above(even, first[0]), above(free, first[1])]
                columns.append(bounds + values + searched(free, held, first[1], asked.seconds, seed))
        mean = [f"{value:.2f}" for value in np.mean(columns, axis=0)]
        reached = [" / ".join(pair) for pair in zip(mean[4::2], mean[5::2], strict=True)]
        cells = [*mean[:2], f"{spent / len(columns):.2f}", *mean[2:4], *reached]
        print(f"| {ranks} | {slots} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

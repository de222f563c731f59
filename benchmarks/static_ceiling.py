"""What static weights can gain on the even split for given placements, and how much is proven to be out of reach.

python benchmarks/static_ceiling.py [--ranks 8,16,32,64] [--layers 2] [--seed 0] [--steps 500] [--lines]

Synthetic instance of `copies.py` and its slots, GPUs of speeds 0.9 to 1.1, with `--unlike` 0.8 to 1.2; `--lines`:
latencies without steps. Every layer is placed by the even split's descents; then this placement has the weights that
`static_weights` finds, and those of a linear programme over the convex minorants of the latencies, which is exact for
lines but for rounding. Its dual, with the optimal split's time of every step and what rounding to whole assignments may
save, is below whatever weights of that placement. Per cent of contiguous placement's time, mean of the layers, on the
fitted steps / on those held out.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from copies import slots
from instances import affine_profile, routing, speeds, staircase_profile
from machine import stamp
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array, hstack

from gemopt.costs import fit
from gemopt.evaluate import loads, objective, rank_times
from gemopt.placement import EMPTY, Split
from gemopt.problem import Problem, problems
from gemopt.solvers import get
from gemopt.solvers.base import Options
from gemopt.splits.flow import find_copies
from gemopt.splits.weights import static_weights

FloatArray = NDArray[np.float64]
ROUNDS = 12
ENOUGH = 1e-4  # of the value: what the relaxation may be below the programme


class Answer(NamedTuple):
    """Weights of all slots, and what no weights are below, in microseconds."""

    weights_P: FloatArray
    bound_us: float


def programme(problem: Problem, row_P: NDArray[np.int64], floor_T: FloatArray) -> Answer:
    """The linear programme of the weights; rows of ranks that are slow somewhere are added until none is missing.

    floor_T: times of the steps below which no split is.
    """
    copies = find_copies(row_P, problem.rank_of_slot, problem.num_experts, problem.num_ranks)
    counts_TC = problem.counts_TE[:, copies.experts[copies.owner]].astype(np.float64)
    steps, size = counts_TC.shape
    alone_P = row_P.copy()
    alone_P[copies.slot] = EMPTY
    alone_TG = loads(problem, alone_P, np.where(alone_P == EMPTY, 0.0, 1.0))[:, :, 0]
    alone_TG = alone_TG - np.bincount(copies.rank, minlength=problem.num_ranks)  # what rounding may take from a copy
    planes = [latency.planes() for latency in problem.latencies]  # each [K, 2]
    weights_C = 1.0 / np.diff(copies.first)[copies.owner]
    keys: NDArray[np.int64] = np.zeros((0, 3), np.int64)  # step, rank, plane
    best = Answer(np.zeros(0), float(floor_T @ problem.weights_T))
    for _ in range(ROUNDS):
        load_TG = alone_TG.copy()
        for c in range(size):
            load_TG[:, copies.rank[c]] += counts_TC[:, c] * weights_C[c]
        values = [plane[:, 0] + plane[:, 1] * load_TG[:, g, None] for g, plane in enumerate(planes)]  # each [T, K]
        time_TG = np.stack([value.max(axis=1) for value in values], axis=1)
        slowest = np.argsort(-time_TG, axis=1)[:, : 1 if len(keys) else 3]
        t = np.repeat(np.arange(steps), slowest.shape[1])
        g = slowest.ravel()
        k = np.array([values[rank][step].argmax() for step, rank in zip(t, g, strict=True)])
        keys = np.unique(np.concatenate([keys, np.stack([t, g, k], axis=1)]), axis=0)
        t, g, k = keys.T
        base_N, slope_N = np.array([planes[rank][plane] for _, rank, plane in keys]).T
        base_N = base_N + slope_N * alone_TG[t, g]
        n, c = np.nonzero(g[:, None] == copies.rank)
        rise = coo_array((slope_N[n] * counts_TC[t[n], c], (n, c)), shape=(len(keys), size)).tocsr()
        longest = coo_array((np.full(len(keys), -1.0), (np.arange(len(keys)), t)), shape=(len(keys), steps))
        whole = coo_array((np.ones(size), (copies.owner, np.arange(size))), shape=(len(copies.experts), size + steps))
        found = linprog(
            np.append(np.zeros(size), problem.weights_T), A_ub=hstack([rise, longest]).tocsr(), b_ub=-base_N,
            A_eq=whole.tocsr(), b_eq=np.ones(len(copies.experts)), method="highs",
            bounds=[(0.0, 1.0)] * size + [(floor, None) for floor in floor_T],
        )  # fmt: skip
        if found.status != 0:
            break
        bound_us = dual(problem, floor_T, t, base_N, rise, copies.first, -found.ineqlin.marginals)
        weights_P = np.where(alone_P == EMPTY, 0.0, 1.0)
        weights_C = np.maximum(found.x[:size], 0.0)
        weights_P[copies.slot] = weights_C
        best = Answer(weights_P, max(bound_us, best.bound_us))
        reached = np.maximum(time_TG.max(axis=1), floor_T)
        if reached @ problem.weights_T <= bound_us * (1 + ENOUGH):
            break
    return best


def dual(
    problem: Problem, floor_T: FloatArray, step_N: NDArray[np.int64], base_N: FloatArray, rise: coo_array,
    first: NDArray[np.int64], price_N: FloatArray,
) -> float:  # fmt: skip
    """What prices of the rows prove by themselves, whatever solver they are from, less what float64 may be off."""
    price_N = np.maximum(price_N, 0.0)
    sum_T = np.bincount(step_N, price_N, len(floor_T))
    price_N = price_N * np.minimum(1.0, problem.weights_T / np.maximum(sum_T, 1e-300))[step_N]
    left_T = np.maximum(problem.weights_T - np.bincount(step_N, price_N, len(floor_T)), 0.0)
    least_R = np.minimum.reduceat(rise.T @ price_N, first[:-1])
    return float((price_N @ base_N + left_T @ floor_T + least_R.sum()) * (1 - 1e-9))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="8,16,32,64")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500, help="fitted, and as many held out")
    parser.add_argument("--lines", action="store_true", help="latencies are lines, not staircases")
    parser.add_argument("--unlike", action="store_true", help="speeds 0.8 to 1.2")
    asked = parser.parse_args()
    given, held = routing(layers=asked.layers, steps=2 * asked.steps, seed=asked.seed).split(0.5)
    print(f"{stamp('numpy', 'numba', 'scipy')}; {asked.layers} layers, {asked.steps} steps, lines: {asked.lines}\n")
    columns = (
        "| G | slots | even | static, as found | linear programme | no weights below, fitted | optimal split | CPU s |"
    )
    print(f"{columns}\n|" + "---|" * 8)
    for ranks in map(int, asked.ranks.split(",")):
        speed_G = speeds(ranks, seed=asked.seed)
        speed_G = 2 * speed_G - 1 if asked.unlike else speed_G
        profile = affine_profile(speed_G) if asked.lines else staircase_profile(speed_G)
        cost = fit(profile, model="staircase")[0]
        table: list[list[float]] = []
        begin = time.process_time()
        for fitted, kept in zip(problems(cost, given, slots(ranks)), problems(cost, held, slots(ranks)), strict=True):
            row = get("local-search").solve(fitted, Options(np.inf, patience=0), None).row
            assert row is not None
            linear = get("linear").solve(fitted, Options(np.inf), None).row
            assert linear is not None
            free = replace(fitted, split=Split.OPTIMAL)
            floor_T = rank_times(free, row).max(axis=1)
            answer = programme(fitted, row, floor_T)
            weights = [None, static_weights(replace(fitted, split=Split.STATIC), row), answer.weights_P]
            base = objective(fitted, linear), objective(kept, linear)
            values = [objective(each, row, w) for w in weights for each in (fitted, kept)]
            values += [answer.bound_us, float(floor_T @ fitted.weights_T)]
            values += [objective(replace(kept, split=Split.OPTIMAL), row)]
            scale = [*base, *base, *base, base[0], *base]
            table.append([100 * (value / by - 1) for value, by in zip(values, scale, strict=True)])
        mean = [f"{value:+.2f}" for value in np.mean(table, axis=0)]
        pairs = [f"{mean[i]} / {mean[i + 1]}" for i in (0, 2, 4)]
        cells = [*pairs, mean[6], f"{mean[7]} / {mean[8]}", f"{time.process_time() - begin:.1f}"]
        print(f"| {ranks} | {ranks * slots(ranks)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

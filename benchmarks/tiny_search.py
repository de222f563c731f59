"""How often local search misses the best placement of tiny layers with spare slots; prints a table in Markdown.

python benchmarks/tiny_search.py [--cases 40] [--seconds 1.0] [--patience N] [--splits even,static,nearest,optimal]

Layers are drawn: 4 or 5 experts on 2 to 4 ranks, one or two spare slots, 5 to 40 steps, ranks alike or up to twice as
fast as others, latencies that are straight, staircases or of experts activated; under `nearest` ranks on one or two
nodes, and half of the layers with recorded senders. Every placement is tried, with slots left empty as well, under
`gemopt.evaluate.objective`, with static weights as `tiny_weights.py` finds them; draws with more than 4,000 placements
are left out. A case is missed when the search ends more than 1e-6 above the best. "Below": cases of static weights that
the search found better than that, which then count with what it found. Kernels are compiled before.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import combinations, product

import numpy as np
from machine import stamp
from tiny_weights import least_static

from gemopt.evaluate import objective
from gemopt.latency import ACTIVE, ASSIGNMENTS, Curve, Latency, line
from gemopt.placement import Split
from gemopt.problem import Problem
from gemopt.solvers import get
from gemopt.solvers.base import Options

COSTS = ("affine", "staircase", "roofline")
MOST_PLACEMENTS = 4000
MISSED = 1e-6


def latencies(rng: np.random.Generator, cost: str, ranks: int, tokens: int) -> list[Latency]:
    """One for each rank, in microseconds."""
    slow_G = np.ones(ranks) if rng.random() < 0.5 else rng.uniform(0.7, 1.4, ranks)
    if cost == "affine":
        offset, slope = rng.uniform(0, 20), rng.uniform(0.3, 2)
        return [Latency(((line(offset * slow, slope * slow),),)) for slow in slow_G]
    if cost == "staircase":
        tile, offset, step = int(rng.choice([4, 8, 16])), rng.uniform(1, 20), rng.uniform(3, 20)
        ends = np.arange(0, tokens + 2 * tile, tile)
        loads = np.unique(np.concatenate([ends, ends[:-1] + 1])).astype(float)
        times = offset + step * np.ceil(loads / tile)
        return [Latency(((Curve(loads, times * slow, step * slow / tile),),)) for slow in slow_G]
    memory, compute = rng.uniform((5, 2), (20, 10)), rng.uniform((1, 0.3, 0), (8, 2, 2))
    planes = ((memory[0], 0.0, memory[1]), tuple(compute))
    return [Latency(tuple((line(a * slow, b * slow), line(0.0, c * slow)) for a, b, c in planes)) for slow in slow_G]


def drawn(cost: str, split: Split, seed: int) -> Problem:
    """A layer."""
    rng = np.random.default_rng([seed, COSTS.index(cost)])
    experts, ranks, steps = int(rng.integers(4, 6)), int(rng.integers(2, 5)), int(rng.integers(5, 41))
    tokens, popular_E = (
        int(rng.choice([10, 40, 120, 400])),
        rng.dirichlet(np.full(experts, rng.choice([0.2, 0.5, 1.5]))),
    )
    counts_TE = np.stack([rng.multinomial(tokens, rng.dirichlet(popular_E * 8 + 0.02)) for _ in range(steps)])
    slots_G = np.full(ranks, experts // ranks)
    for _ in range(experts + int(rng.integers(1, 3)) - int(slots_G.sum())):
        slots_G[rng.choice(np.flatnonzero(slots_G < experts))] += 1
    features = (ASSIGNMENTS, ACTIVE) if cost == "roofline" else (ASSIGNMENTS,)
    given = (counts_TE, features, latencies(rng, cost, ranks, tokens), slots_G)
    if split is not Split.NEAREST:
        return Problem.make(*given, split=split)
    node_G, senders_TGE = np.sort(rng.integers(0, 2, ranks)), None
    if rng.random() < 0.5:
        part_G = rng.dirichlet(np.full(ranks, 5.0))
        senders_TGE = rng.multinomial(counts_TE, part_G).transpose(0, 2, 1).astype(np.int32)
    return Problem.make(*given, split=split, node_of_rank=node_G, senders_TGE=senders_TGE)


def placements(problem: Problem) -> Iterator[np.ndarray]:
    """[P] every placement there is."""
    contents = [
        [
            [*held, *[-1] * (slots - len(held))]
            for size in range(slots + 1)
            for held in combinations(range(problem.num_experts), size)
        ]
        for slots in problem.slots_per_rank.tolist()
    ]
    for held in product(*contents):
        row = np.array([e for each in held for e in each])
        if len(np.unique(row[row >= 0])) == problem.num_experts:
            yield row


def best_of(problem: Problem, rows: list[np.ndarray]) -> float:
    """Least microseconds of these placements."""
    if problem.split is Split.STATIC:
        return least_static(problem, rows)
    return min(objective(problem, row) for row in rows)


def measure(cost: str, split: Split, given: argparse.Namespace) -> str:
    """One line of the table."""
    above, below, spent, tried, seed = [], 0, 0.0, 0, 0
    search = get("local-search")
    for draw in range(3):  # whatever it compiles
        search.solve(drawn(cost, split, draw), Options.lasting(600.0, patience=20), None)
    while len(above) < given.cases:
        problem, seed = drawn(cost, split, seed), seed + 1
        every = list(placements(problem))
        if len(every) > MOST_PLACEMENTS:
            continue
        best, tried, begun = best_of(problem, every), tried + len(every), time.process_time()
        found = search.solve(problem, Options.lasting(given.seconds, patience=given.patience, seed=seed), None).row
        spent += time.process_time() - begun
        assert found is not None
        reached = objective(problem, found)
        below += reached < best * (1 - MISSED)
        above.append(max(0.0, reached / best - 1) if best else 0.0)
    missed = [each for each in above if each > MISSED]
    return (
        f"| {split.value} | {cost} | {len(above)} | {tried} | {len(missed)} | {100 * max(above):.2f} | "
        f"{100 * np.mean(above):.3f} | {below} | {spent / len(above):.2f} |"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--patience", type=int, default=None)
    parser.add_argument("--splits", default=",".join(Split))
    given = parser.parse_args()
    print(f"{stamp('numpy', 'numba')}; {given.seconds:g} s, patience {given.patience}\n")
    print("| split | latencies | cases | placements | missed | largest % | mean % | below | CPU s |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for split in map(Split, given.splits.split(",")):
        for cost in COSTS:
            print(measure(cost, split, given), flush=True)


if __name__ == "__main__":
    main()

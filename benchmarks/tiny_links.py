"""How often the search over linked layers misses the best of all placements of tiny ones; a table in Markdown.

python benchmarks/tiny_links.py [--cases 40] [--seconds 20] [--patience 5] [--solvers local-search,auto]

Two or three layers of 3 or 4 experts on 2 or 3 ranks are drawn, none to two spare slots, ranks alike or not, straight
latencies, staircases or concave ones, links of one or several nodes, messages by assignment, rank or node, tokens from
where they were recorded, from all ranks alike or from the layer before. Every placement of all layers is tried (draws
with more than 10,000 are left out). Missed: more than 1e-6 above the best.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

import numpy as np
from machine import stamp
from tiny_search import MISSED, placements

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from brute_links import random_topology, random_traces

from gemopt import Profile, Traces, solve
from gemopt.costs import fit
from gemopt.evaluate import linked_total
from gemopt.links import Exchange, Links
from gemopt.problem import Problem, problems

SENDERS = ("recorded", "uniform", "previous")
MOST_PLACEMENTS = 10_000
SHAPES = {
    "affine": lambda n: 20 + 3 * n,
    "staircase": lambda n: 20 + 12 * np.ceil(n / 4),
    "concave": lambda n: 20 + 20 * np.sqrt(n),
}


def drawn(seed: int, senders: str) -> tuple[Profile, Traces, Links, list[Problem]]:
    """Layers, and their links."""
    rng = np.random.default_rng([seed, SENDERS.index(senders)])
    ranks, layers = int(rng.integers(2, 4)), int(rng.integers(2, 4))
    experts = int(rng.integers(3, 5))
    slots_G = np.full(ranks, experts // ranks)
    for _ in range(experts + int(rng.integers(0, 3)) - int(slots_G.sum())):
        slots_G[rng.choice(np.flatnonzero(slots_G < experts))] += 1
    shape, slow_G = SHAPES[str(rng.choice(list(SHAPES)))], rng.uniform(1.0, rng.choice([1.0, 1.4]), ranks)
    profile = Profile(
        devices=[
            {"rank": g, "samples": [{"assignments": n, "latency_us": float(shape(n) * slow)} for n in range(65)]}
            for g, slow in enumerate(slow_G)
        ]
    )
    top_k, steps = int(rng.integers(1, 3)), int(rng.integers(2, 12))
    traces = random_traces(rng, ranks=ranks, experts=experts, layers=layers, top_k=top_k, steps=steps)
    exchange = Exchange(
        dispatch_bytes=int(rng.integers(1, 200)),
        combine_bytes=int(rng.integers(1, 200)),
        once_per=str(rng.choice(["assignment", "rank", "node"])),
        senders=senders,
        overlap=bool(rng.random() < 0.3),
    )
    links = Links.of(random_topology(rng, ranks), traces, ranks, profile=profile, exchange=exchange)
    return profile, traces, links, problems(fit(profile)[0], traces, slots_G.tolist())


def least(links: Links, each: list[Problem]) -> float | None:
    """Microseconds of the best of all placements; None where they are too many."""
    rows = list(placements(each[0]))
    if len(rows) ** len(each) > MOST_PLACEMENTS:
        return None
    return min(linked_total(each, all_rows, links) for all_rows in product(rows, repeat=len(each)))


def measure(senders: str, given: argparse.Namespace) -> None:
    """Lines of the table."""
    names, seed = given.solvers.split(","), 0
    above, spent, proven = ({name: [] for name in names} for _ in range(3))
    while len(above[names[0]]) < given.cases:
        try:
            profile, traces, links, each = drawn(seed, senders)
        except ValueError:  # a rank that sends nothing
            seed += 1
            continue
        seed += 1
        best = least(links, each)
        if best is None:
            continue
        for name in names:
            result = solve(
                profile, traces, solver=name, topology=links.topology, exchange=links.exchange, threads=1,
                slots_per_rank=each[0].slots_per_rank.tolist(), time_limit=given.seconds, patience=given.patience,
            )  # fmt: skip
            above[name].append(max(0.0, result.objective_us / best - 1))
            spent[name].append(result.seconds)
            proven[name].append(result.status.value == "optimal")
            assert result.bound_us is None or result.bound_us <= best * (1 + 1e-9), (seed, name)
            if given.verbose and above[name][-1] > MISSED:
                print(seed - 1, name, f"{100 * above[name][-1]:.2f}", len(each), each[0].slots_per_rank, flush=True)
    for name in names:
        missed = [a for a in above[name] if a > MISSED]
        print(
            f"| {senders} | {name} | {given.cases} | {len(missed)} | {100 * max(above[name]):.2f} | "
            f"{100 * np.mean(above[name]):.3f} | {sum(proven[name])} | {np.mean(spent[name]):.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--patience", type=int, default=5)
    parser.add_argument("--solvers", default="local-search,auto")
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    print(stamp("numba", "ortools"), "\n")
    print("| senders | solver | cases | missed | largest % | mean % | proven | s |\n|---|---|---|---|---|---|---|---|")
    for senders in SENDERS:
        measure(senders, given)


if __name__ == "__main__":
    main()

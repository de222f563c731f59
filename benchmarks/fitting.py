"""What to fit on: the steps as they are, weighed, redrawn or smoothed; scored on later steps and on other traffic.

python benchmarks/fitting.py --data FOLDER [--layers 4]

First table: a placement fitted on so many steps serves the next ones (at most 256), at two places of every trace.
`redrawn`: `gemopt.traces.redrawn`, every step once more with Poisson counts about it; `3 times`. `chosen`: redrawn
where two inner trials say so: fitted on the first half and on three quarters of the steps, it serves the rest of them
better by 0.3 % both times.
`recent`: a step weighs half as much as one that is half the fitted steps younger. `last half` of the steps alone.
`to the mean`: every step half-way to the mean shares. Second table: placements fitted on one or two kinds of traffic
serve a kind that they did not see, layer by layer; FlashLB beside them, from its wheel. All others by local search with
patience 5. Third table: what more time finds on 3 layers of 256 synthetic experts, 500 steps fitted and 500 scored.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
from balancers import Table, published
from cells import SLOWER, differing, h100, measured, roofline
from instances import routing
from machine import stamp
from methods import cpu

from gemopt.costs import fit
from gemopt.evaluate import objective
from gemopt.problem import Problem, problems
from gemopt.profile import Profile
from gemopt.replay.strategy import solve_rows
from gemopt.solvers import get
from gemopt.solvers.base import Options, Row
from gemopt.traces import Traces, redrawn

STEPS, HORIZON = (16, 64, 256), 256
PATIENCE, FLEETS, PHASE = 5, (1, 2, 3), 256
BETTER, EQUAL = 0.003, 0.001
LIMITS = (0.17, 4.0)  # CPU seconds of a layer; the first is the public benchmark's
IntArray = NDArray[np.int64]


class Ranks:
    """Ranks with so many slots, and what experts on them take."""

    def __init__(self, profile: Profile, slots: int) -> None:
        self.cost, self.slots, self.ranks = fit(profile)[0], slots, profile.num_ranks

    def layers(self, counts_TLE: IntArray) -> list[Problem]:
        """The problems of some steps."""
        return list(problems(self.cost, Traces(counts=counts_TLE), self.slots))

    def place(self, counts_TLE: IntArray, weights_T: NDArray[np.float64] | None = None) -> list[Row]:
        """Fitted on some steps."""
        each = self.layers(counts_TLE)
        return solve_rows(
            [p if weights_T is None else replace(p, weights_T=weights_T) for p in each], patience=PATIENCE
        )

    def contiguous(self, counts_TLE: IntArray) -> list[Row]:
        """Experts in order, spare slots empty."""
        return list(Table(Traces(counts=counts_TLE), self.ranks, self.slots).contiguous.physical_to_logical)

    def flashlb(self, counts_TLE: IntArray) -> list[Row]:
        """FlashLB's, called once."""
        table = Table(Traces(counts=counts_TLE), self.ranks, self.slots)
        balance = published()["FlashLB"]()
        return list(table.placement(balance(table.counts_TLE, table.spread)).physical_to_logical)

    def serve(self, rows: list[Row], counts_TLE: IntArray) -> NDArray[np.float64]:
        """[L] microseconds of steps."""
        return np.array([objective(p, row) for p, row in zip(self.layers(counts_TLE), rows, strict=True)])

    def redraws(self, counts_TLE: IntArray) -> bool:
        """Whether redrawn steps served better both times."""
        steps = len(counts_TLE)
        for cut in (steps // 2, 3 * steps // 4):
            first, rest = counts_TLE[:cut], counts_TLE[cut:]
            plain, other = (self.serve(self.place(seen), rest).sum() for seen in (first, again(first)))
            if other > plain * (1 - BETTER):
                return False
        return True


def again(counts_TLE: IntArray, times: int = 1) -> IntArray:
    """The steps, and each so many times more with Poisson counts."""
    return redrawn(Traces(counts=counts_TLE), times).counts


def to_the_mean(counts_TLE: IntArray) -> IntArray:
    """Steps half-way to the mean shares, rounded at random."""
    share_LE = counts_TLE.sum(axis=0) / np.maximum(counts_TLE.sum(axis=(0, 2))[:, None], 1)
    half = (counts_TLE + share_LE * counts_TLE.sum(axis=-1, keepdims=True)) / 2
    return np.floor(half + np.random.default_rng(0).random(half.shape)).astype(np.int64)


def recency(steps: int) -> NDArray[np.float64]:
    """[T] weights that halve with every half of the steps."""
    weights_T = 0.5 ** (np.arange(steps)[::-1] / (steps / 2))
    return weights_T / weights_T.mean()


WAYS: dict[str, Callable[[Ranks, IntArray], list[Row]]] = {
    "as given": lambda ranks, n: ranks.place(n),
    "redrawn": lambda ranks, n: ranks.place(again(n)),
    "3 times": lambda ranks, n: ranks.place(again(n, 3)),
    "recent": lambda ranks, n: ranks.place(n, recency(len(n))),
    "last half": lambda ranks, n: ranks.place(n[len(n) // 2 :]),
    "to the mean": lambda ranks, n: ranks.place(to_the_mean(n)),
}


def cells(data: Path, layers: int) -> Iterator[tuple[str, IntArray, Ranks]]:
    """Traffic and ranks."""

    def counts(name: str) -> IntArray:
        whole = Traces.load(data / f"{name}.npz").counts
        return whole[:, :: max(1, whole.shape[1] // layers)][:, :layers].astype(np.int64)

    for kind in ("shift", "mixed", "physchem", "biomed", "math"):
        trace = counts(f"gptoss20b_trace_{kind}_{'b64' if kind == 'mixed' else 'b32'}")
        for ranks in (4, 8, 16):
            yield f"gpt-oss {kind}, G={ranks}", trace, Ranks(measured(ranks)(0), 32 // ranks)
        if kind == "mixed":
            yield "gpt-oss mixed, G=8, H100 table", trace, Ranks(h100(0), 4)
            yield "gpt-oss mixed, G=8, H100 table, 40 slots", trace, Ranks(h100(0), 5)
            yield "gpt-oss mixed, G=8, roofline", trace, Ranks(roofline(8)(0), 4)
    for kind in ("prose_b128", "code_b128", "maths_b128", "gen_code_b64", "shift_open_b128"):
        for ranks in (8, 16):
            yield f"tiny-MoE {kind}, G={ranks}", counts(f"tinymoe_{kind}"), Ranks(measured(ranks)(0), 64 // ranks)
    trace = routing(layers=layers, steps=600, seed=5).counts.astype(np.int64)
    for ranks, slots in ((8, 32), (8, 36), (64, 4)):
        yield f"synthetic, G={ranks}, {slots} slots", trace, Ranks(differing(ranks)(0), slots)


def later(data: Path, layers: int) -> None:
    """The first table."""
    changes: dict[tuple[int, str], list[float]] = defaultdict(list)
    for name, trace, ranks in cells(data, layers):
        for steps in STEPS:
            for begin in (0, (len(trace) - steps) // 2):
                seen, next_ = trace[begin : begin + steps], trace[begin + steps :][:HORIZON]
                if len(next_) < 32:
                    continue
                base = ranks.serve(ranks.contiguous(seen), next_).sum()
                found = {way: ranks.serve(place(ranks, seen), next_).sum() / base for way, place in WAYS.items()}
                found["chosen"] = found["redrawn" if ranks.redraws(seen) else "as given"]
                for way, share in found.items():
                    changes[steps, way].append(100 * (share - (1 if way == "as given" else found["as given"])))
        print(name, file=sys.stderr, flush=True)
    print("| steps | cells | as given, against contiguous | way | mean | median | best | worst | better | worse |")
    print("|" + "---|" * 10)
    for (steps, way), points in changes.items():
        if way != "as given":
            print(
                f"| {steps} | {len(points)} | {np.mean(changes[steps, 'as given']):.1f} | {way} | {summary(points)} |"
            )


def summary(points: list[float]) -> str:
    """Mean, median, best, worst; how many are better and worse by more than what a table shows."""
    p = np.array(points)
    told = (p.mean(), np.median(p), p.min(), p.max())
    counts = (int((p < -100 * EQUAL).sum()), int((p > 100 * EQUAL).sum()))
    return " | ".join([f"{value:+z.2f}" for value in told] + [str(count) for count in counts])


def unseen(data: Path, layers: int) -> None:
    """The second table; a draw is a layer on GPUs of a fleet, for a kind of traffic."""
    kinds = {
        "tiny-MoE": ("tinymoe_{}_b128", ("prose", "code", "maths"), 64),
        "gpt-oss": ("gptoss20b_trace_{}_b32", ("math", "physchem", "biomed"), 32),
    }
    ways = {**{way: WAYS[way] for way in ("as given", "redrawn", "to the mean")}, "FlashLB": Ranks.flashlb}
    print("| traffic | draws | placements | against contiguous | deviation | against as given |")
    print("|" + "---|" * 6)
    for family, (file, names, experts) in kinds.items():
        trace = {}
        for name in names:
            whole = Traces.load(data / f"{file.format(name)}.npz").counts
            trace[name] = whole[:PHASE, :: max(1, whole.shape[1] // layers)][:, :layers].astype(np.int64)
        shares: dict[str, list[float]] = defaultdict(list)
        for fleet in FLEETS:
            for ranks in (4, 8, 16):
                served = Ranks(measured(ranks)(fleet), experts // ranks)
                for seen in [*combinations(names, 1), *combinations(names, 2)]:
                    given = np.concatenate([trace[name] for name in seen])
                    rows = {way: place(served, given) for way, place in ways.items()}
                    for other in set(names) - set(seen):
                        base_L = served.serve(served.contiguous(given), trace[other])
                        for way, found in rows.items():
                            shares[way] += list(100 * (served.serve(found, trace[other]) / base_L - 1))
        for way, values in shares.items():
            v, plain = np.array(values), np.array(shares["as given"])
            lead = f"{(v - plain).mean():+z.2f} ± {(v - plain).std() / len(v) ** 0.5:.2f}"
            print(f"| {family} | {len(v)} | {way} | {v.mean():+z.2f} | {v.std():.1f} | {lead} |", flush=True)


def longer() -> None:
    """The third table; seconds are CPU seconds of a layer."""
    time.monotonic = cpu
    given, held = routing(layers=3).split(0.5)
    print("| ranks | solver | seconds | fitted, against contiguous | held out |\n" + "|" + "---|" * 5)
    for name, profile in (("8", differing(8)), ("8, one slower", differing(8, SLOWER)), ("64", differing(64))):
        ranks = Ranks(profile(0), 256 // profile(0).num_ranks)
        each = ranks.layers(given.counts)
        for solver in (get("local-search"), get("gem")):
            solver.solve(each[0], Options.lasting(0.5), None)  # compiles
            for seconds in LIMITS:
                rows = [
                    solver.solve(p, replace(Options.lasting(seconds), seed=i), None).row for i, p in enumerate(each)
                ]
                shares = [
                    ranks.serve(rows, steps.counts).sum()
                    / ranks.serve(ranks.contiguous(steps.counts), steps.counts).sum()
                    for steps in (given, held)
                ]
                fitted, scored = (f"{100 * (share - 1):.2f}" for share in shares)
                print(f"| {name} | {solver.name} | {seconds} | {fitted} | {scored} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    asked = parser.parse_args()
    print(f"# What to fit on\n\n{stamp('numpy', 'numba')}\n")
    unseen(asked.data, asked.layers)
    print()
    later(asked.data, asked.layers)
    print()
    longer()


if __name__ == "__main__":
    main()

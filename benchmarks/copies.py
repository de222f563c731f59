"""Copies in spare slots: held-out change against contiguous placement with the same slots, beside the peers.

python benchmarks/copies.py [--flashlb] [--ranks 8,16,32,64] [--limit 20] [--splits even,optimal]
    [--case synthetic|gptoss|roofline] [--spare 1] [--layers 58] [--seed 0] [--share 0.75] [--patience 5]

Synthetic: 58 layers x 256 experts, 500 steps to fit and 500 to score, tiles of 128, 288 slots (320 on 64 ranks) unless
`--spare` says how many more than needed each rank has (1 in the other cases). gptoss: the shipped trace of gpt-oss-20b
(24 x 32), second half scored, tiles of 16, GPUs of a measured fleet. roofline: the same trace (64 tokens a step) on
H100s of a table under `roofline-1`, with a row without copies. `--share`: as well a memory budget of this share of all
copies.
`--flashlb`: vllm-ascend's FlashLB beside, from its published wheel (`benchmarks/peers/`; needs torch).
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from follow_cases import SHIPPED, fleets
from instances import routing, speeds, staircase_profile
from machine import stamp
from topology import profile_of

import gemopt
from gemopt.costs import CostModel, fit
from gemopt.evaluate import evaluate
from gemopt.latency import pack
from gemopt.placement import Placement
from gemopt.profile import Profile
from gemopt.splits.flow import fluid_times
from gemopt.splits.levels import no_levels
from gemopt.traces import Traces

sys.path.append(str(Path(__file__).parent / "peers"))
if TYPE_CHECKING:
    from balancers import Balance

COSTS = {"synthetic": "staircase", "gptoss": "staircase", "roofline": "roofline-1"}
Place = Callable[[], Placement]


def slots(ranks: int) -> int:
    """Slots per rank: 288 in all where that divides, else the next that leaves a spare slot on every rank."""
    return 288 // ranks if 288 % ranks == 0 else 256 // ranks + 1


def by_flashlb(balance: Balance, given: Traces, ranks: int, per_rank: int) -> Placement:
    """FlashLB's placement, from the next rank's first experts in the spare slots."""
    from balancers import Table

    table = Table(given, ranks, per_rank)
    return table.placement(balance(table.counts_TLE, table.spread))


def case(name: str, layers: int, seed: int) -> tuple[Traces, Callable[[int], Profile]]:
    """Traces, and the devices of so many ranks."""
    if name == "synthetic":
        return routing(layers=layers, seed=seed), lambda ranks: staircase_profile(speeds(ranks, seed=seed))
    fleet = fleets(["longhorn_sgemm"])[0]
    traces = Traces.load(SHIPPED / "gptoss20b_trace_mixed_b64.npz")
    traces = replace(traces, counts=traces.counts[:, :layers].copy(), layer_ids=traces.layer_ids[:layers])
    if name == "roofline":
        return traces, profile_of
    return traces, lambda ranks: staircase_profile(1 / fleet.rel_time[fleet.draw(ranks, seed)], largest=2048, tile=16)


def contenders(
    profile: Profile,
    given: Traces,
    per_rank: int,
    limit: float,
    peer: Callable[[], Balance] | None,
    splits: list[str],
    share: float,
    patience: int | None,
    cost: CostModel,
) -> dict[str, Place]:
    """What is compared, by name."""

    def ours(**options: object) -> Placement:
        options = {"slots_per_rank": per_rank, **options}
        found = gemopt.solve(profile, given, cost=cost, threads=1, **options).placement
        assert found is not None
        return found

    table: dict[str, Place] = {
        "contiguous": lambda: ours(solver="linear"),
        "eplb": lambda: ours(solver="eplb"),
        "local-search, descents alone": lambda: ours(solver="local-search", patience=0, time_limit=limit),
    }
    if cost.name != "staircase":
        alone = given.num_experts // profile.num_ranks
        table["local-search, no copies"] = partial(
            ours, solver="local-search", time_limit=limit, slots_per_rank=alone, patience=patience
        )
    for split in splits:
        senders = "uniform" if split == "nearest" else None
        search = partial(ours, solver="local-search", time_limit=limit, split=split, senders=senders, patience=patience)
        table[f"local-search, {split}"] = search
        if share:
            spare = per_rank * profile.num_ranks - given.num_experts
            held = given.num_layers * (given.num_experts + share * spare) / profile.num_ranks
            budget = {"memory_budget": held, "expert_bytes": 1, "slots_per_rank": None}
            table[f"local-search, {split}, {100 * share:.0f} % of the copies' bytes"] = partial(search, **budget)
    if peer is not None:
        table["FlashLB"] = lambda: by_flashlb(peer(), given, profile.num_ranks, per_rank)
    return table


def fluid(cost: CostModel, given: Traces) -> float:
    """What all ranks together need for the fitted steps, in microseconds; of one load alone."""
    if len(cost.features) > 1:
        return np.nan
    curves = pack([latency.low for latency in cost.latencies])
    totals_TL = given.counts.sum(axis=2, dtype=np.int64)
    return sum(float(fluid_times(no_levels(curves), totals_T).sum()) for totals_T in totals_TL.T)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flashlb", action="store_true")
    parser.add_argument("--ranks", default="8,16,32,64")
    parser.add_argument("--limit", type=float, default=20.0)
    parser.add_argument("--splits", default="even", type=lambda text: text.split(","))
    parser.add_argument("--case", choices=list(COSTS), default="synthetic")
    parser.add_argument("--spare", type=int)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.0)
    parser.add_argument("--patience", type=int, help="tries without gain that end a layer, however busy the machine")
    asked = parser.parse_args()
    peer = None
    if asked.flashlb:
        from balancers import published

        peer = published()["FlashLB"]
    traces, devices = case(asked.case, asked.layers, asked.seed)
    given, held = traces.split(0.5)
    print(f"{stamp('numpy', 'numba')}; limit {asked.limit:g} s, one thread, {given.num_layers} layers\n")
    columns = "| G | slots | solver | held-out change | fitted | above fluid | seconds | CPU s | peak memory GB |"
    print(f"{columns}\n|" + "---|" * 9)
    for ranks in map(int, asked.ranks.split(",")):
        profile = devices(ranks)
        spare = 1 if asked.spare is None else asked.spare
        per_rank = given.num_experts // ranks + spare
        if asked.case == "synthetic" and asked.spare is None:
            per_rank = slots(ranks)
        cost = fit(profile, model=COSTS[asked.case])[0]
        rest = (peer, asked.splits, asked.share, asked.patience, cost)
        for place in contenders(profile, given.steps(slice(0, 20)), per_rank, 0.1, *rest).values():
            place()  # compiles
        base: list[float] = []
        fluid_us = fluid(cost, given)
        for name, place in contenders(profile, given, per_rank, asked.limit, *rest).items():
            wall, cpu = time.monotonic(), time.process_time()
            found = place()
            wall, cpu = time.monotonic() - wall, time.process_time() - cpu
            senders = "uniform" if found.split == "nearest" else None
            score = [
                evaluate(found, profile, steps, cost=cost, senders=senders).objective_us for steps in (held, given)
            ]
            base = base or score
            change = " | ".join(f"{100 * (a / b - 1):+.1f} %" for a, b in zip(score, base, strict=True))
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            above = f"{100 * (score[1] / fluid_us - 1):.1f} %"
            took = f"{wall:.1f} | {cpu:.1f} | {memory:.2f}"
            print(f"| {ranks} | {ranks * per_rank} | {name} | {change} | {above} | {took} |", flush=True)


if __name__ == "__main__":
    main()

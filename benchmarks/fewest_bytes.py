"""Fewest bytes between two nodes: what the search for them saves by seed, and what no placement can pass.

python benchmarks/fewest_bytes.py TOKENS.npz [--layers 0:3,16:19] [--cases 0,1,2] [--seconds 10] [--seeds 0,1]
    [--spare 0] [--blind 6] [--least 120] [--priced 10] [--held]

Cases, tokens and costs of `topology.py`, fitted steps. A placement blind to links (`--blind` CPU seconds, once for all
seeds); then `search_fewest` from it with 0.5 % of slack, by seed: change of the bytes between nodes, of those through
the fullest NIC, and of the makespans. All limits are CPU seconds of this process. For another version run it there.
`--least`: where tokens have recorded senders and cross once per node, the fewest bytes of any placement without copies,
however long it computes, by a search of all halves of the experts (so many CPU seconds a layer; 0: not asked).
`--priced`: then also of those that compute within the slack (`halves_compute.py`; so many CPU seconds a layer for its
multipliers; 0: not asked). `--held`: both of the steps held out, for placements that know them.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from halves import best_halves
from halves_compute import compute_of, fewest_leaving
from machine import stamp
from numpy.typing import NDArray

time.monotonic = time.process_time  # limits are CPU seconds

from topology import CASES, SLACK, TOKEN_BYTES, Case, profile_of, traces_of  # noqa: E402

import gemopt  # noqa: E402
from gemopt.costs import fit  # noqa: E402
from gemopt.evaluate import total_objective  # noqa: E402
from gemopt.links import Communication, Exchange, Links  # noqa: E402
from gemopt.problem import Problem, problems  # noqa: E402
from gemopt.solvers.base import Options, Row  # noqa: E402
from gemopt.solvers.search.fewest import search_fewest  # noqa: E402
from gemopt.topology.named import named  # noqa: E402
from gemopt.traces import Traces  # noqa: E402

PRICES = (0.7, 1.0)  # of all compute, in parts of all tokens that leave


def least_crossings(ids_NK: NDArray[Any], home_N: NDArray[Any], experts: int, seconds: float) -> tuple[float, bool]:
    """Tokens that leave their sender's node at least, and whether that is proven."""
    end = time.process_time() + seconds
    found = best_halves(ids_NK, home_N, experts, np.full(2, experts // 2), lambda: time.process_time() >= end)
    return (len(home_N), False) if found is None else (len(home_N) - found.kept, found.proven)


def bounds(
    asked: argparse.Namespace, given: Traces, each: list[Problem], rows: list[Row], node_G: NDArray[np.int64]
) -> list[str]:
    """How few of the bytes of these rows any placement sends between nodes: at any compute, and within the slack."""
    tokens = given.tokens
    assert tokens is not None and tokens.source_rank is not None
    home_N, cells = node_G[tokens.source_rank], []
    layers = [(tokens.ids[:, n], home_N) for n in range(given.num_layers)]
    held = [node_G[problem.rank_of_slot][np.argsort(row)] for problem, row in zip(each, rows, strict=True)]
    sent = sum(
        (node_E[ids_NK] != home_N[:, None]).any(axis=1).sum() for (ids_NK, _), node_E in zip(layers, held, strict=True)
    )
    if asked.least:
        found = [least_crossings(*layer, given.num_experts, asked.least) for layer in layers]
        proven = "" if all(whole for _, whole in found) else " (found, not proven)"
        cells.append(f"{100 * (sum(crossing for crossing, _ in found) / sent - 1):+.1f}{proven}")
    if asked.priced:
        most_us = (1 + SLACK) * total_objective(each, rows)
        computes = [compute_of(problem, row, asked.priced) for problem, row in zip(each, rows, strict=True)]
        prices = [price * sent / most_us for price in PRICES]
        least = fewest_leaving(layers, computes, most_us, prices, asked.least or 120.0)
        cells.append(f"{100 * (least / sent - 1):+.1f}" if least > 0 else "not proven")
    return cells


def changes(before: Communication, after: Communication) -> str:
    """Of the bytes between nodes, and through the fullest NIC."""
    pairs = [(before.cross_node_bytes, after.cross_node_bytes), (before.fullest_between, after.fullest_between)]
    return ", ".join(f"{100 * (new / old - 1):+.1f}" for old, new in pairs)


def run(case: Case, layers: slice, asked: argparse.Namespace) -> str:
    """One row."""
    given, held = traces_of(asked.tokens, case, layers).split(0.5)
    profile, topology = profile_of(case.ranks), named(f"2x{case.ranks // 2}-ib400")
    cost = fit(profile, model="staircase")[0]
    exchange = Exchange(dispatch_bytes=TOKEN_BYTES, once_per=case.once_per, senders=case.senders)
    links, slots = Links.of(topology, given, case.ranks, exchange=exchange), 32 // case.ranks + asked.spare
    blind = gemopt.solve(
        profile, given, cost=cost, solver="local-search", patience=5, time_limit=asked.blind, threads=1,
        slots_per_rank=slots,
    ).placement  # fmt: skip
    assert blind is not None
    rows, slots_G = list(blind.physical_to_logical), blind.slots_per_rank
    each = problems(cost, given, slots)
    before, compute = links.communication(rows, slots_G), total_objective(each, rows)
    cells, told = [], ["no bound" for limit in (asked.least, asked.priced) if limit]
    if told:
        bounded = case.once_per == "node" and case.senders == "recorded" and not asked.spare
        seen = held if asked.held else given
        found = bounds(asked, seen, problems(cost, seen, slots), rows, topology.node_of_rank) if bounded else told
        cells += found
    for seed in asked.seeds:
        options = Options(time.monotonic() + asked.seconds, seed=seed, compute_slack=SLACK)
        after = search_fewest(each, links, rows, options).rows
        more = 100 * (total_objective(each, after) / compute - 1)
        cells.append(f"{changes(before, links.communication(after, slots_G))} ({more:+.2f})")
    name = f"{case.ranks}, {case.workload}, {case.once_per}, {case.senders} | {layers.start} to {layers.stop - 1}"
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens")
    parser.add_argument("--layers", default="0:3,16:19")
    parser.add_argument("--cases", default=",".join(map(str, range(len(CASES)))))
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seeds", default="0,1", type=lambda text: [int(each) for each in text.split(",") if each])
    parser.add_argument("--spare", type=int, default=0)
    parser.add_argument("--blind", type=float, default=6.0)
    parser.add_argument("--least", type=float, default=120.0)
    parser.add_argument("--priced", type=float, default=10.0)
    parser.add_argument("--held", action="store_true")
    asked = parser.parse_args()
    print(f"{stamp('numpy', 'numba')}; {asked.seconds:g} CPU s, {SLACK:.1%} of slack, per cent\n")
    heads = ["case", "layers", *["fewest of any placement"] * bool(asked.least)]
    heads += [f"of any within {SLACK:.1%} of compute"] * bool(asked.priced)
    heads += [f"seed {seed}: between nodes, fullest NIC (makespans)" for seed in asked.seeds]
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    for number in map(int, asked.cases.split(",")):
        for part in asked.layers.split(","):
            low, high = map(int, part.split(":"))
            print(run(CASES[number], slice(low, high), asked), flush=True)


if __name__ == "__main__":
    main()

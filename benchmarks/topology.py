"""Placements on two nodes: search that heeds links against search that does not, MoETuner, and contiguous placement.

python benchmarks/topology.py TOKENS.npz [--layers 8:14] [--limit 12] [--moetuner 120] [--cases 0,1,...]
    [--rows blind,most]

--rows: only placements whose name holds one of these words.

TOKENS.npz: routing of gpt-oss-20b token by token (`ids` [tokens, 24, 4], `req_start`), from github.com/AmanPriyanshu/
GPT-OSS-MoE-ExpertFingerprinting. Decode: requests cut into stretches of 128 tokens, 512 at a time, one token each.
Prefill: whole requests, up to 4096 tokens. A stretch's or request's rank is its number modulo the ranks. Costs: H100
table of vLLM on GPUs as fast as a measured fleet, links 2x4-ib400 and 2x8-ib400, 5760 bytes per token (2880 x bf16).
Everything is fitted on the first half of the steps and scored on the second.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from machine import stamp

import gemopt
from gemopt.costs import CostModel, fit
from gemopt.evaluate import Evaluation, evaluate
from gemopt.formats.tables.kernel import Unit, read_fleet, read_table, what_if
from gemopt.links import Exchange, Links
from gemopt.placement import Placement
from gemopt.problem import problems
from gemopt.profile import Profile
from gemopt.solvers.search.linked import Layers
from gemopt.topology import Topology
from gemopt.topology.named import named
from gemopt.traces import Phase, Traces, regrouped
from gemopt.traces.batching import from_tokens

DATA = Path(__file__).resolve().parents[1] / "examples" / "data"
TOKEN_BYTES, STRETCH, DECODE_BATCH = 5760, 128, 512
SLOWER = 4.0
SLACK = 0.005
TIMES = 4  # as many steps of the same requests


class Case(NamedTuple):
    """Ranks, workload, and how tokens are exchanged."""

    ranks: int
    workload: str
    once_per: str
    senders: str


CASES = [
    Case(8, "prefill", "node", "recorded"),
    Case(8, "decode", "node", "recorded"),
    Case(8, "prefill", "rank", "previous"),
    Case(16, "prefill", "node", "recorded"),
    Case(16, "decode", "node", "recorded"),
    Case(16, "prefill", "rank", "previous"),
]


def traces_of(path: str, case: Case, layers: slice) -> Traces:
    """The token-level trace of a workload."""
    with np.load(path) as data:
        ids, starts = data["ids"][:, layers].astype(np.int32), data["req_start"]
    if case.workload == "decode":
        ends = np.append(starts[1:], len(ids)) if starts[-1] != len(ids) else starts[1:]
        starts = np.concatenate([np.arange(a, b, STRETCH) for a, b in zip(starts, ends, strict=False)])
    phase = Phase.DECODE if case.workload == "decode" else Phase.PREFILL
    batch = DECODE_BATCH if phase is Phase.DECODE else 10**6
    found = from_tokens(ids, starts, num_experts=32, batch_size=batch, phase=phase)
    assert found.tokens is not None and found.tokens.request is not None
    return replace(found, tokens=replace(found.tokens, source_rank=found.tokens.request % case.ranks))


def profile_of(ranks: int) -> Profile:
    """H100s as fast as GPUs of a measured fleet."""
    table = read_table(DATA / "h100_vllm_gptoss20b_ep8.csv", unit=Unit.GROUP_TOKENS, top_k=4, ep=8)
    return what_if(table, read_fleet(DATA / "gpu_variability.csv", "longhorn_sgemm"), ranks=ranks, seed=0)


def slower(topology: Topology) -> Topology:
    """The same with a network that others use as well."""
    assert topology.between_nodes is not None and topology.between_nodes.bandwidth_gbs is not None
    level = topology.between_nodes.model_copy(update={"bandwidth_gbs": topology.between_nodes.bandwidth_gbs / SLOWER})
    return topology.model_copy(update={"between_nodes": level})


def fewest_bytes(start: Placement, cost: CostModel, given: Traces, links: Links) -> Placement:
    """What swaps make of a placement when bytes alone count, every one of them."""
    search = Layers(
        problems(cost, given),
        replace(links, even=True, _cache={}),
        list(start.physical_to_logical),
        np.zeros(1, np.uint8),
    )
    search.settle(compute=0.0)
    return start.model_copy(update={"physical_to_logical": np.stack(search.rows())})


def run(case: Case, path: str, layers: slice, limit: float, moetuner: float, rows: list[str]) -> None:
    """Print the rows of one case whose name holds one of these words."""
    given, held = traces_of(path, case, layers).split(0.5)
    profile, topology = profile_of(case.ranks), named(f"2x{case.ranks // 2}-ib400")
    cost = fit(profile, model="staircase")[0]
    exchange = Exchange(dispatch_bytes=TOKEN_BYTES, once_per=case.once_per, senders=case.senders)

    def ours(seconds: float, steps: Traces = given, **options: object) -> Callable[[], Placement]:
        def place() -> Placement:
            found = gemopt.solve(profile, steps, cost=cost, time_limit=seconds, threads=1, **options).placement
            assert found is not None
            return found

        return place

    wired: dict[str, object] = {"topology": topology, "exchange": exchange}
    links, more = Links.of(topology, given, case.ranks, exchange=exchange), regrouped(given, TIMES)
    slack: dict[str, object] = {"solver": "local-search", "patience": 5, "compute_slack": SLACK, **wired}
    table = {
        "contiguous": ours(limit, solver="linear"),
        "blind to links": ours(limit, solver="local-search", patience=5),
        "joint": ours(limit, solver="local-search", patience=5, **wired),
        "joint, one descent": ours(limit, solver="local-search", patience=0, **wired),
        f"at most {SLACK:.1%} of compute": ours(limit, **slack),
        f"joint, {TIMES} times the steps": ours(limit, more, solver="local-search", patience=5, **wired),
        f"blind to links, {TIMES} times the steps": ours(limit, more, solver="local-search", patience=5),
        f"at most {SLACK:.1%} of compute, {TIMES} times the steps": ours(limit, more, **slack),
        f"joint, network {SLOWER:g} times slower": ours(
            limit, solver="local-search", patience=5, topology=slower(topology), exchange=exchange
        ),
        "fewest bytes": lambda: fewest_bytes(ours(limit, solver="local-search", patience=5)(), cost, given, links),
        "moetuner": ours(moetuner, solver="moetuner", **wired),
        f"moetuner, {moetuner / 6:g} s": ours(moetuner / 6, solver="moetuner", **wired),
    }
    for name, place in table.items():
        if not any(word in name for word in rows):
            continue
        begin, cpu = time.monotonic(), _cpu()
        placement = place()
        seconds, cpu = time.monotonic() - begin, _cpu() - cpu
        for part, steps in (("held out", held), ("fitted", given)):
            found = evaluate(placement, profile, steps, cost=cost, topology=topology, exchange=exchange)
            print(_row(case, name, part, found, len(steps.counts), seconds, cpu), flush=True)


def _cpu() -> float:
    """CPU seconds of this process and of its children that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def _row(case: Case, name: str, part: str, found: Evaluation, steps: int, seconds: float, cpu: float) -> str:
    sent = found.communication
    assert sent is not None
    cells = (
        *(case.ranks, case.workload, f"{case.once_per}, {case.senders}", name, part),
        f"{found.objective_us / steps:.1f}",
        f"{found.compute_us / steps:.1f}",
        f"{sent.time_TL.sum() / steps:.1f}",
        f"{sent.cross_node_bytes / steps / 1e6:.2f}",
        f"{sent.fullest_bytes['between_nodes'] / steps / 1e6:.3f}",
        f"{seconds:.1f}",
        f"{cpu:.1f}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens")
    parser.add_argument("--layers", default="8:14")
    parser.add_argument("--limit", type=float, default=12.0)
    parser.add_argument("--moetuner", type=float, default=120.0)
    parser.add_argument("--cases", default=",".join(map(str, range(len(CASES)))))
    parser.add_argument("--rows", default="", type=lambda text: text.split(","))
    asked = parser.parse_args()
    low, high = map(int, asked.layers.split(":"))
    print(f"{stamp('numpy', 'numba')}; layers {low} to {high - 1}, {asked.limit:g} s, moetuner {asked.moetuner:g} s\n")
    heads = "G | workload | once per, senders | placement | steps | step us | compute us | links us | MB between nodes"
    print(f"| {heads} | MB through the fullest NIC | seconds | CPU s |\n" + "|---" * 12 + "|")
    for index in map(int, asked.cases.split(",")):
        run(CASES[index], asked.tokens, slice(low, high), asked.limit, asked.moetuner, asked.rows)


if __name__ == "__main__":
    main()

"""MoETuner's set-ups: processing, all-to-all and step against contiguous placement, by MoETuner and by us; a table.

python benchmarks/papers/moetuner.py TOKENS.npz MOE.parquet [--layers 0:24] [--limit 60] [--cases 0,1,...]

MoETuner (arXiv:2502.06643) reports Mixtral 8x7B 9.3 % faster, end to end, on one node (8 H100, 4 expert-parallel ranks
of 2 GPUs each) and 17.5 % on two (16 H200), with a tail of token processing 36 % shorter and one of the all-to-all 36
and 30 % shorter, against contiguous placement (the last three read second-hand, from notes on the paper). Its code and
its routing are not public, nor is a trace of Mixtral. What stands for it here:

* `gpt-oss, 32`: recorded routing of gpt-oss-20b, its experts as they are (TOKENS.npz: see ../topology.py);
* `gpt-oss as 8`: the same, experts in eight groups of neighbours; a token's experts are two of the groups it chose;
* `drawn`: Mixtral's sizes, 32 layers, 8 experts, top 2. Every layer has a hottest expert so many times the mean
  (MMLU 1.39, SST2 1.99: MoE-GPS, arXiv:2506.07366), and chance of others falls geometrically; the expert that follows
  an expert in the next layer has a logit that much higher. Requests of 512 tokens differ by normal logits of 0.3.

Prefill of up to 4096 tokens a step, fitted on the first half of the steps, scored on the second. Ranks are equal; one
is two H100 that share every expert, so that it takes half the time measured on one for Mixtral's experts (bf16, vLLM
0.24.0; MOE.parquet is the MoE table of the wheel aiconfigurator-core 0.12.0) and each GPU sends half of a token's 8192
bytes. Links nvlink-4 and 2x4-ib400. Senders: `previous`, as the paper counts traffic, from expert to expert of the next
layer; `recorded`, as engines send, from the rank of the token's request and back. A token goes to a rank once.

processing: sum over steps and layers of the slowest rank's experts. best: what no placement passes there, by its bound.
all-to-all: dispatch and combine. step: the change of both, times their share of a step: `paper`, the share at which
its own figures agree (1 - 1/1.093 is 36 % of 24 % of the step; 1 - 1/1.175 is 33 % of 45 %), and `sizes`, from a
roofline of Mixtral's attention. Second table: any number of experts on a rank in a layer, at least one, and an even
part over all layers, which is what the paper asks (our `moetuner` does not heed the even part).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import stamp
from moe_gps import BYTES, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS
from topology import Case as Workload
from topology import _cpu, traces_of

from gemopt import Profile, Traces, evaluate, solve
from gemopt.bounds import step_bounds
from gemopt.costs import fit
from gemopt.evaluate import Evaluation
from gemopt.formats.tables.kernel import Unit, equal, read_table
from gemopt.links import Exchange
from gemopt.problem import problems
from gemopt.traces import Phase
from gemopt.traces.batching import from_tokens

GPUS, TOKENS, REQUEST, STEPS, VARY = 2, 4096, 512, 24, 0.3
ROWS = ("hidden_size=4096", "inter_size=14336", "moe_dtype=bfloat16", "moe_ep_size=4", "distribution=balanced")
FLOPS, MEMORY = 989e12, 3350e9  # of an H100 SXM in bf16, by its data sheet
GAINED = {1: 1 - 1 / 1.093, 2: 1 - 1 / 1.175}  # of a step, by number of nodes
PUBLISHED = {1: 0.36, 2: (0.36 + 0.30) / 2}  # of the parts that a placement changes
SENDERS = ("previous", "recorded")


class Case(NamedTuple):
    """Whose routing, on how many nodes of four ranks; hottest over mean and logit of what follows, where drawn."""

    name: str
    nodes: int
    hottest: float = 0.0
    follow: float = 0.0


DRAWN = ((1.39, 0.5), (1.39, 2.0), (1.99, 2.0))
KINDS = [("gpt-oss, 32",), ("gpt-oss as 8",), *((f"drawn {hot:g}, {follow:g}", hot, follow) for hot, follow in DRAWN)]
CASES = [Case(name, nodes, *rest) for nodes in (1, 2) for name, *rest in KINDS]


def merged(traces: Traces) -> Traces:
    """Four experts that are neighbours as one, and of a token any two of those; tokens of one alone are left out."""
    assert traces.tokens is not None
    group = np.random.default_rng(0).permuted(traces.tokens.ids // 4, axis=2)
    other = np.argmax(group != group[:, :, :1], axis=2)
    keep = (other > 0).all(axis=1)
    ids = np.stack([group[:, :, 0], np.take_along_axis(group, other[:, :, None], axis=2)[:, :, 0]], axis=2)
    kept = replace(traces.tokens.where(keep), ids=ids[keep])
    return _counted(kept.ids, kept.step_of_token, kept.source_rank)


def _counted(ids: NDArray[np.int64], step_N: NDArray[np.int64], rank_N: NDArray[np.int64] | None) -> Traces:
    """Traces of tokens with two experts of eight each."""
    _, starts = np.unique(step_N, return_index=True)
    found = from_tokens(ids, starts, num_experts=8, batch_size=1, phase=Phase.PREFILL, prefill_tokens=10**6)
    assert found.tokens is not None
    return replace(found, tokens=replace(found.tokens, source_rank=rank_N))


def drawn(case: Case, ranks: int, seed: int = 0) -> Traces:
    """Routing of Mixtral's sizes."""
    rng, tokens = np.random.default_rng(seed), STEPS * TOKENS
    chance = _falling(8, case.hottest)
    ids, before = np.empty((tokens, LAYERS, 2), np.int64), None
    for layer in range(LAYERS):
        of_request = rng.normal(0, VARY, (tokens // REQUEST, 8))
        logits = np.log(rng.permutation(chance)) + np.repeat(of_request, REQUEST, axis=0)
        if before is not None:
            follower = rng.permutation(8)
            for k in range(2):
                logits[np.arange(tokens), follower[before[:, k]]] += case.follow
        before = ids[:, layer] = np.argsort(-(logits + rng.gumbel(size=logits.shape)), axis=1)[:, :2]
    number = np.arange(tokens)
    return _counted(ids, number // TOKENS, number // REQUEST % ranks)


def _falling(experts: int, hottest: float) -> NDArray[np.float64]:
    """Chances that fall geometrically, the first so many times their mean."""
    low, high = 0.0, 1.0
    for _ in range(60):
        ratio = (low + high) / 2
        chance = ratio ** np.arange(experts)
        low, high = (ratio, high) if chance[0] / chance.mean() > hottest else (low, ratio)
    return np.asarray(chance / chance.sum())


def devices(path: str, ranks: int) -> Profile:
    """Ranks of two GPUs that halve every expert."""
    profile = equal(read_table(path, unit=Unit.GROUP_TOKENS, top_k=2, ep=4, where=ROWS), ranks)
    halved = [
        device.model_copy(
            update={"samples": [s.model_copy(update={"latency_us": s.latency_us / GPUS}) for s in device.samples]}
        )
        for device in profile.devices
    ]
    return profile.model_copy(update={"devices": halved})


def skew(traces: Traces) -> float:
    """Hottest expert over the mean, the mean over layers."""
    load = traces.counts.sum(axis=0)
    return float((load.max(axis=1) / load.mean(axis=1)).mean())


def dependence(traces: Traces) -> float:
    """How far pairs of experts of two layers in a row are from independent ones: total variation, mean over layers."""
    pairs = traces.transition_counts().astype(np.float64)
    pairs /= pairs.sum(axis=(1, 2), keepdims=True)
    return float(0.5 * np.abs(pairs - pairs.sum(2, keepdims=True) * pairs.sum(1, keepdims=True)).sum((1, 2)).mean())


def attention_us(tokens: float) -> float:
    """A layer's attention on the two GPUs of a rank, without its all-reduces, for prompts as long as here."""
    weights = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) / GPUS
    scores = 4 * tokens * REQUEST * HEADS * HEAD_DIM / GPUS
    return max((2 * tokens * weights + scores) / FLOPS, BYTES * weights / MEMORY) * 1e6


def mixtral(case: Case, tokens: str, ranks: int, layers: slice) -> Traces:
    """The trace of a case."""
    if case.hottest:
        return drawn(case, ranks)
    found = traces_of(tokens, Workload(ranks, "prefill", "rank", "recorded"), layers)
    return merged(found) if case.name.endswith("8") else found


def row(case: Case, traces: Traces, profile: Profile, senders: str, limit: float) -> str:
    """One row of the table."""
    ranks, (given, held) = len(profile.devices), traces.split(0.5)
    cost = fit(profile, model="staircase")[0]
    topology = f"nvlink-{ranks}" if case.nodes == 1 else f"{case.nodes}x{ranks // case.nodes}-ib400"
    exchange = Exchange(dispatch_bytes=HIDDEN * BYTES // GPUS, senders=senders)

    def by(solver: str, steps: Traces = given, **options: int) -> tuple[Evaluation, float]:
        begin = _cpu()
        found = solve(profile, steps, cost=cost, solver=solver, time_limit=limit, threads=1,
                      topology=topology, exchange=exchange, **options).placement  # fmt: skip
        spent = _cpu() - begin
        return evaluate(found, profile, held, cost=cost, topology=topology, exchange=exchange), spent

    by("local-search", given.steps(slice(0, 1)), patience=5)  # compiles
    (base, _), *found = by("linear"), by("moetuner"), by("local-search", patience=5)
    slots_G = np.full(ranks, held.num_experts // ranks)
    least = sum(step_bounds(each).sum() for each in problems(cost, held, slots_G))
    rest = sum(attention_us(each) for each in held.counts.sum(axis=2).ravel() / held.top_k / ranks)
    shares = GAINED[case.nodes] / PUBLISHED[case.nodes], base.objective_us / (base.objective_us + rest)
    cells = [case.name, ranks, senders, f"{skew(traces):.2f}", f"{dependence(traces):.2f}"]
    cells += [f"{100 * base.compute_us / base.objective_us:.0f}", f"{100 * (least / base.compute_us - 1):+z.1f}"]
    for score, spent in found:
        links = score.communication.time_TL.sum() / base.communication.time_TL.sum()
        both = score.objective_us / base.objective_us
        changes = [score.compute_us / base.compute_us - 1, links - 1, *(share * (both - 1) for share in shares)]
        cells += [*(f"{100 * each:+z.1f}" for each in changes), f"{spent:.1f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def free(case: Case, traces: Traces, profile: Profile, limit: float) -> str:
    """One row: processing on one node where layers may hold more experts on a rank than others, as in the paper."""
    ranks, (given, held) = len(profile.devices), traces.split(0.5)
    cost, (_, layers, experts) = fit(profile, model="staircase")[0], given.counts.shape
    room = experts - ranks + 1
    asked = {"slots_per_rank": room, "time_limit": limit, "threads": 1, "cost": cost}
    within = {"memory_budget": layers * experts / ranks, "expert_bytes": 1, "patience": 5}
    found = [
        solve(profile, given, **asked, solver="linear"),
        solve(profile, given, **asked, solver="moetuner"),
        solve(profile, given, **asked, solver="local-search", **within),
    ]
    base, *scores = (evaluate(each.placement, profile, held, cost=cost).objective_us for each in found)
    most = [(each.placement.physical_to_logical >= 0).reshape(layers, ranks, room).sum((0, 2)).max() for each in found]
    cells = [case.name, ranks, f"{skew(traces):.2f}", *(f"{100 * (each / base - 1):+.1f}" for each in scores)]
    return "| " + " | ".join(map(str, [*cells, *most[1:], layers * experts // ranks])) + " |"


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens")
    parser.add_argument("experts")
    parser.add_argument("--layers", default="0:24", help="of gpt-oss-20b")
    parser.add_argument("--limit", type=float, default=60.0)
    parser.add_argument("--cases", default=",".join(map(str, range(len(CASES)))))
    asked = parser.parse_args()
    layers = slice(*map(int, asked.layers.split(":")))
    print(f"{stamp('numpy', 'numba', 'pulp', 'highspy')}; layers {asked.layers} of gpt-oss, {asked.limit:g} s\n")
    each = "processing % | all-to-all % | step, paper % | step, sizes % | CPU s"
    print("| routing | ranks | senders | skew | dependence | experts, of both % | best % | "
          + " | ".join(f"{name} {head}" for name in ("moetuner", "joint") for head in each.split(" | "))
          + " |\n" + "|---" * 17 + "|")  # fmt: skip
    unequal = []
    for case in (CASES[index] for index in map(int, asked.cases.split(","))):
        ranks = 4 * case.nodes
        traces, profile = mixtral(case, asked.tokens, ranks, layers), devices(asked.experts, ranks)
        for senders in SENDERS:
            print(row(case, traces, profile, senders, asked.limit), flush=True)
        if case.nodes == 1 and traces.num_experts == 8:
            unequal.append(free(case, traces, profile, asked.limit))
    if unequal:
        each = " | ".join(f"{name} {head}" for head in ("processing %", "experts on the fullest rank")
                          for name in ("moetuner", "local-search"))  # fmt: skip
        print(f"\n| routing | ranks | skew | {each} | an even part |\n" + "|---" * 8 + "|")
        print("\n".join(unequal))


if __name__ == "__main__":
    main()

"""A controller in charge of a live model, against the placement fitted once: text changes kind, and a rank slows down.

Four ranks under CPU quotas serve the shipped model, its experts widened as in `live.py`. Placements are fitted on the
first kind of text. Then the text goes on, changes to another kind, and to a third; halfway through, one rank gets
slower. Of two copies of the model one keeps the placement fitted once, one has `Executor.follow`. Each segment is
served by both, the one that stands still twice (how far its two servings are apart is what a segment is known to), a
few steps of each in turn, since the machine is not the same for minutes: nothing else is served while experts travel
or a decision is on its way. What is compared is the measured makespan (slowest rank's experts, summed over layers and
steps), and the logits, which must not change. What is on its way when a segment ends is waited for, and that time
counts as makespan.

    torchrun --standalone --nproc-per-node 4 benchmarks/follow_live.py -o follow_live.json
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import os
import pydoc_data.topics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from live_ranks import (
    PROMPT,
    QUOTAS,
    Decoding,
    Stopwatch,
    decode,
    from_rank_0,
    measure_profile,
    overlapping,
    quota_of,
    say,
    served,
    start,
    widen,
)
from machine import stamp
from scipy.stats import t as student
from transformers import AutoTokenizer

from gemopt import Placement, Profile, Traces, solve
from gemopt.costs import fit
from gemopt.executor import Executor
from gemopt.executor.follow import Follow
from gemopt.models import tiny_moe_path
from gemopt.online import Controller
from gemopt.online.policy import Policy
from gemopt.profiling.throttle import cpu_quota

SLOW_RANK = 1
KINDS = ("code", "maths", "maths", "prose", "prose", "maths")
SLOW_FROM = 3  # segment


def corpus(kind: str) -> str:
    """Text that every Python carries: its library, its manual, its tables of decimal arithmetic."""
    if kind == "prose":
        return "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    pattern = "test/decimaltestdata/*.decTest" if kind == "maths" else "*.py"
    files = sorted(glob.glob(os.path.join(os.path.dirname(os.__file__), pattern)))
    return "".join(Path(name).read_text(errors="ignore")[2000:8000] for name in files)


def segment(kind: str, sequences: int, steps: int, part: int, parts: int) -> torch.Tensor:
    """[sequences, PROMPT + steps] tokens of one kind of text; parts have no text in common."""
    text = corpus(kind)
    share = len(text) // parts
    length = PROMPT + steps
    tokenizer = AutoTokenizer.from_pretrained(tiny_moe_path())
    ids = tokenizer(text[part * share : (part + 1) * share], add_special_tokens=False)["input_ids"]
    starts = np.linspace(0, len(ids) - length, sequences).astype(int)
    return torch.tensor([ids[start : start + length] for start in starts])


@contextlib.contextmanager
def quota_at(rank: int, number: int, slower: float) -> Iterator[None]:
    """This rank's share of a core while a segment is served."""
    slow = rank == SLOW_RANK and number >= SLOW_FROM
    with cpu_quota(QUOTAS[rank] / (slower if slow else 1.0)):
        yield


@torch.no_grad()
def fingerprint(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a few tokens."""
    logits: torch.Tensor = model(tokens[:2, : PROMPT + 1]).logits
    return logits.float().clone()


@dataclass
class Server:
    """A copy of the model: its ranks' stopwatch, what moves its experts, and who decides on that, if anybody."""

    model: Any
    watch: Stopwatch
    executor: Executor
    follow: Follow | None = None

    def begin(self, tokens: torch.Tensor) -> Decoding:
        """A segment, its prompts read."""
        return Decoding(self.model, tokens, self.watch)

    def go_on(self, decoding: Decoding, steps: int) -> None:
        """Serve so many steps of a segment, and more until nobody else would pay for what travels or is decided."""
        decoding.advance(steps)
        while self.follow is not None and not self.follow.at_rest and decoding.left:
            decoding.advance(1)

    def finish(self, decoding: Decoding) -> float:
        """Measured makespan of a segment in microseconds, and the wait for what is on its way after it."""
        begin = time.perf_counter()
        if self.follow is not None:
            self.follow.rest()
        dist.barrier()
        waited_us = 0.0 if self.follow is None else 1e6 * (time.perf_counter() - begin)
        return float(decoding.measured().makespan_TL.sum()) + waited_us


def serve(servers: dict[str, Server], tokens: torch.Tensor, turn: int) -> dict[str, float]:
    """Makespan of a segment by everyone in microseconds, some steps of each in turn, then in the opposite order."""
    decodings = {name: server.begin(tokens) for name, server in servers.items()}
    for name, server in servers.items():  # what was decided before may have come into force with the prompts
        server.go_on(decodings[name], 0)
    order, spans = list(servers), dict[str, float]()
    while len(spans) < len(servers):
        for name in order:
            decoding = decodings[name]
            if decoding.left:
                servers[name].go_on(decoding, turn)
            if not decoding.left and name not in spans:
                spans[name] = servers[name].finish(decoding)
        order.reverse()
    return spans


def arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=96, help="of a segment; there are six")
    parser.add_argument("--training-steps", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--window", type=int, default=12, help="steps between two looks at what changed")
    parser.add_argument(
        "--plan-every",
        type=int,
        default=24,
        help="steps between plans where nothing changes; each takes the core",
    )
    parser.add_argument("--turn", type=int, default=8, help="steps that are served by one, then by the next")
    parser.add_argument("--points", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--slots", type=int, default=20, help="of every rank, for 64 experts on 4 ranks")
    parser.add_argument("--slower", type=float, default=1.5, help="times, of the rank that slows down halfway")
    parser.add_argument(
        "--speed-tolerance", type=float, default=0.1, help="of the policy; cores that ranks share are never steady"
    )
    parser.add_argument("--width", type=int, default=1536, help="of the experts; their share of a step does not matter")
    return parser.parse_args()


def main() -> None:
    """Serve, and compare."""
    options = arguments()
    rank, model, layers = start()
    parts = len(KINDS) + 1
    train = segment(KINDS[0], options.sequences, options.training_steps, 0, parts)
    texts = [segment(kind, options.sequences, options.steps, n + 1, parts) for n, kind in enumerate(KINDS)]
    watch = Stopwatch(layers)
    counts = decode(model, train, watch).counts_TLE
    widen(layers, options.width)
    fixed = Server(model, watch, Executor(model, timeout_s=300))
    model, others = served()
    widen(others, options.width)
    followed = Server(model, Stopwatch(others), Executor(model, timeout_s=300))
    servers = {"fitted once": fixed, "followed": followed, "fitted once, again": fixed}
    ids = fixed.executor.layer_ids

    for server in (fixed, followed):
        server.executor.apply(overlapping(ids, layers[0].num_experts, options.slots))
    with quota_of(rank):
        profile: Profile = measure_profile(watch, options.width, 2 * options.sequences * 4, options.points, 0.5)
    traces = Traces(counts=counts, layer_ids=tuple(ids), top_k=4)
    once = None
    if rank == 0:
        once = solve(profile, traces, slots_per_rank=options.slots, time_limit=options.seconds).placement
    once = from_rank_0(once)
    with quota_of(rank):
        policy = priced(followed.executor, once, options.speed_tolerance, options.plan_every)

    spans: dict[str, list[list[float]]] = {name: [] for name in servers}
    decisions: list[list[str]] = []  # of each round's segments
    worst = 0.0
    for number in range(options.rounds):
        for server in (fixed, followed):
            server.executor.apply(once)
        for rounds in spans.values():
            rounds.append([])
        controller = informed(profile, once, policy, counts) if rank == 0 else None
        followed.follow = followed.executor.follow(controller, window=options.window)
        for part, tokens in enumerate(texts):
            known = len(followed.follow.decisions)
            with quota_at(rank, part, options.slower):
                for name, span_us in serve(servers, tokens, options.turn).items():
                    spans[name][-1].append(span_us)
            decisions.append(followed.follow.decisions[known:])
            a, b = (fingerprint(server.model, tokens) for server in (fixed, followed))
            worst = max(worst, float((a - b).abs().max() / b.abs().max()))
            told = " / ".join(f"{rounds[-1][-1] / 1e3:.0f}" for rounds in spans.values())
            say(f"round {number + 1}, segment {part + 1}: {told} ms; {' | '.join(decisions[-1])}")
        followed.follow.close()
    if rank == 0:
        say(fit(profile)[1].summary())
        report(options, policy, spans, decisions, worst)
    dist.destroy_process_group()


def priced(executor: Executor, placement: Placement, speed_tolerance: float, plan_every: int) -> Policy:
    """Move to a placement and time it; copying and serving share a core, so that a transfer costs what it takes."""
    begin = time.perf_counter()
    received = sum(executor.apply(placement).bytes().values()) / dist.get_world_size()
    bytes_per_s = received / (time.perf_counter() - begin)
    return Policy(bytes_per_s=bytes_per_s, slowdown=1.0, speed_tolerance=speed_tolerance, plan_every_steps=plan_every)


def informed(profile: Profile, once: Placement, policy: Policy, counts: np.ndarray) -> Controller:
    """A controller that knows the steps which the placement in force was fitted on."""
    controller = Controller(profile, once, policy)
    controller.remember(counts)
    return controller


@dataclass(frozen=True)
class Known:
    """What the spans say: [R, S] of followed over the mean of the two servings that stand still, less 1, and of one of
    these over the other; the same of whole rounds; the mean of the rounds and the half width of its 95 % interval."""

    change_RS: np.ndarray
    apart_RS: np.ndarray
    change_R: np.ndarray
    apart_R: np.ndarray
    mean: float
    half_width: float

    @classmethod
    def of(cls, spans: dict[str, list[list[float]]]) -> Known:
        """A segment's change is the noise of one serving off, and of the mean of two; its two servings are apart by
        that of two. How much rounds differ counts, too, where there are several."""
        once, followed, again = (np.array(rounds) for rounds in spans.values())
        apart_RS = again / once - 1
        change_R = 2 * followed.sum(axis=1) / (once + again).sum(axis=1) - 1
        of_segment = np.sqrt(0.75 * np.mean(apart_RS**2))
        widths = [student.ppf(0.975, apart_RS.size) * of_segment / np.sqrt(apart_RS.size)]
        if len(change_R) > 1:
            widths.append(student.ppf(0.975, len(change_R) - 1) * change_R.std(ddof=1) / np.sqrt(len(change_R)))
        return cls(
            2 * followed / (once + again) - 1, apart_RS, change_R, again.sum(axis=1) / once.sum(axis=1) - 1,
            float(change_R.mean()), float(max(widths)),
        )  # fmt: skip


def report(
    options: argparse.Namespace,
    policy: Policy,
    spans: dict[str, list[list[float]]],
    decisions: list[list[str]],
    worst: float,
) -> None:
    """Print, and write, what came out."""
    known = Known.of(spans)
    print(f"\n| segment | {' | '.join(f'{n + 1} {kind}' for n, kind in enumerate(KINDS))} | all |")
    print(f"|---|{'---|' * (len(KINDS) + 1)}")
    for name, rounds in spans.items():
        means = np.mean(rounds, axis=0) / 1e3
        print(f"| {name}, ms | {' | '.join(f'{value:.0f}' for value in means)} | {means.sum():.0f} |")
    for name, by_segment, of_round in (
        ("change", known.change_RS, known.change_R),
        ("the same placement, again", known.apart_RS, known.apart_R),
    ):
        for number, (segments, whole) in enumerate(zip(by_segment, of_round, strict=True)):
            shown = " | ".join(f"{100 * value:+.1f}" for value in segments)
            print(f"| {name}, round {number + 1}, % | {shown} | {100 * whole:+.1f} |")
    noise = 100 * np.sqrt(np.mean(known.apart_RS**2))
    print(f"\n**{100 * known.mean:+.1f} % (95 % interval {100 * (known.mean - known.half_width):+.1f} to "
          f"{100 * (known.mean + known.half_width):+.1f})**; two servings of one segment under one placement are "
          f"{noise:.1f} % apart")  # fmt: skip
    slow = f"rank {SLOW_RANK} is {options.slower} times slower from segment {SLOW_FROM + 1} on"
    print(f"{slow}; largest relative difference of logits {worst:.1e}")
    if options.output:
        facts: dict[str, Any] = {
            "measured": stamp("torch", "transformers"), "quotas": QUOTAS, "width": options.width, "kinds": KINDS,
            "slow": {"rank": SLOW_RANK, "factor": options.slower, "from_segment": SLOW_FROM + 1},
            "slots": options.slots, "steps": options.steps, "window": options.window, "sequences": options.sequences,
            "makespan_us": spans, "change_by_round": known.change_R.tolist(), "mean": known.mean,
            "half_width": known.half_width, "change_by_segment": known.change_RS.tolist(),
            "same_placement_by_segment": known.apart_RS.tolist(), "decisions": decisions,
            "policy": policy.model_dump(), "largest_logit_difference": worst,
        }  # fmt: skip
        options.output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Ranks of different speed that serve the shipped model: what `live.py` and `follow_live.py` share."""

from __future__ import annotations

import contextlib
import functools
import inspect
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import Qwen3MoeForCausalLM, logging

from gemopt import Placement, Profile
from gemopt.executor.expert_parallel import SlotDispatch, dispatches
from gemopt.executor.load import layout, load
from gemopt.models import tiny_moe_path
from gemopt.profile import MoeShape
from gemopt.profiling.device import Device
from gemopt.profiling.group import Group
from gemopt.profiling.measure import Timing
from gemopt.profiling.profiler import Options, Profiler, Rank
from gemopt.profiling.throttle import cpu_quota
from gemopt.profiling.workload import Experts

QUOTAS = (0.5, 0.475, 0.425, 0.35)
PROMPT = 8
# What the installed transformers calls a cache; the older name warns in a later one.
CACHE = "cache" if "cache" in inspect.signature(Qwen3MoeForCausalLM.forward).parameters else "past_key_values"


def start() -> tuple[int, nn.Module, list[SlotDispatch]]:
    """This rank, the shipped model on it, and the dispatch of its layers."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dist.init_process_group("gloo")
    if dist.get_world_size() != len(QUOTAS):
        raise SystemExit(f"start it on {len(QUOTAS)} ranks")
    return dist.get_rank(), *served()


def served() -> tuple[nn.Module, list[SlotDispatch]]:
    """A copy of the shipped model on the ranks that have been started, and the dispatch of its layers."""
    model = load(tiny_moe_path(), layout("shared", len(QUOTAS)), dtype=torch.float32)
    layers = [dispatch for _, dispatch in dispatches(model)]
    for dispatch in layers:
        dispatch.take_over()
    return model, layers


@dataclass
class Stopwatch:
    """Time of the experts and counts of assignments on this rank, layer by layer, step by step."""

    layers: list[SlotDispatch]
    experts_s: list[list[float]] = field(default_factory=list)
    counts: list[list[list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for index, dispatch in enumerate(self.layers):
            dispatch.experts_forward = functools.partial(self._timed, index, dispatch.experts_forward)
            dispatch._slots = functools.partial(self._counted, index, dispatch._slots)  # type: ignore[method-assign]

    def _timed(self, layer: int, inner: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = inner(*arguments)
        if self.experts_s:
            self.experts_s[-1][layer] += time.perf_counter() - start
        return result

    def _counted(self, layer: int, inner: Any, routing: Any, ids: torch.Tensor) -> Any:
        if self.counts:
            self.counts[-1][layer] = torch.bincount(ids.flatten(), minlength=routing.num_experts).tolist()
        return inner(routing, ids)

    def begin(self) -> None:
        """A step begins."""
        self.experts_s.append([0.0] * len(self.layers))
        self.counts.append([[] for _ in self.layers])


@dataclass(frozen=True)
class Run:
    """What all ranks measured over some steps: step_T seconds, experts_TLG seconds, counts_TLE assignments."""

    step_T: np.ndarray
    experts_TLG: np.ndarray
    counts_TLE: np.ndarray

    @property
    def makespan_TL(self) -> np.ndarray:
        """[T, L] microseconds of the slowest rank's experts."""
        return self.experts_TLG.max(axis=2) * 1e6


class Decoding:
    """Text fed token by token, all sequences at once; may pause between any two steps, while others are served.

    Making one reads the prompts, untimed.
    """

    @torch.no_grad()
    def __init__(self, model: Any, tokens: torch.Tensor, watch: Stopwatch) -> None:
        self.model, self.tokens, self.watch = model, tokens, watch
        self.position, self.step_s = PROMPT, list[float]()
        self.experts_s: list[list[float]] = []
        self.counts: list[list[list[int]]] = []
        watch.experts_s, watch.counts = [], []
        self.cache = model(tokens[:, :PROMPT], use_cache=True)[CACHE]

    @property
    def left(self) -> int:
        """Steps until the text ends."""
        return self.tokens.shape[1] - self.position

    @torch.no_grad()
    def advance(self, steps: int) -> None:
        """Serve so many steps, or what is left."""
        self.watch.experts_s, self.watch.counts = self.experts_s, self.counts
        for _ in range(min(steps, self.left)):
            dist.barrier()
            self.watch.begin()
            start = time.perf_counter()
            token = self.tokens[:, self.position : self.position + 1]
            self.cache = self.model(token, **{CACHE: self.cache}, use_cache=True)[CACHE]
            self.step_s.append(time.perf_counter() - start)
            self.position += 1
        self.watch.experts_s, self.watch.counts = [], []

    def measured(self) -> Run:
        """What all ranks measured so far."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (self.step_s, self.experts_s))
        return Run(
            np.max([other[0] for other in everyone], axis=0),
            np.stack([other[1] for other in everyone], axis=2),
            np.array(self.counts),
        )


def decode(model: Any, tokens: torch.Tensor, watch: Stopwatch) -> Run:
    """Serve a text from its beginning to its end."""
    decoding = Decoding(model, tokens, watch)
    decoding.advance(decoding.left)
    return decoding.measured()


def widen(layers: list[SlotDispatch], width: int) -> None:
    """Give every expert an intermediate size of `width`, the new part zero: outputs and routing stay."""
    for dispatch in layers:
        dispatch.take_over()
        experts = dispatch.experts
        gate_up, down = experts.gate_up_proj.data, experts.down_proj.data
        gate, up = gate_up.chunk(2, dim=1)
        wide = [nn.functional.pad(part, (0, 0, 0, width - part.shape[1])) for part in (gate, up)]
        experts.gate_up_proj = nn.Parameter(torch.cat(wide, dim=1), requires_grad=False)
        wide_down = nn.functional.pad(down, (0, width - down.shape[2]))
        experts.down_proj = nn.Parameter(wide_down.contiguous(), requires_grad=False)


def overlapping(layer_ids: list[int], num_experts: int, slots: int) -> Placement:
    """As many experts on a rank as it will hold: each that is active has a price of its own, which is measured, too."""
    ranks = len(QUOTAS)
    row = [(num_experts // ranks * rank + slot) % num_experts for rank in range(ranks) for slot in range(slots)]
    rows = [row] * len(layer_ids)
    return Placement(
        physical_to_logical=rows, slots_per_rank=[slots] * ranks, num_experts=num_experts, layer_ids=layer_ids
    )


def measure_profile(watch: Stopwatch, width: int, most: int, points: int, max_drift: float) -> Profile:
    """Profile of all ranks together, run by the experts modules of the live model."""
    group, first = Group(), watch.layers[0]
    shape = MoeShape(
        name="tiny-moe", hidden_size=96, intermediate_size=width, num_experts=first.num_experts,
        num_local_experts=int(first.row.slots_per_rank[first.rank]), top_k=4, dtype="float32",
        expert_bytes=first.expert_bytes,
    )  # fmt: skip
    device = Device("cpu")
    forwards = [dispatch.experts_forward for dispatch in watch.layers]
    workload = Experts(shape, "transformers", device, forwards)
    timing = Timing(block_us=20_000, seconds=0.2)
    options = Options(points=points, max_assignments=most, timing=timing, settle_s=5, max_drift=max_drift)
    rank = Rank(workload, device, group, options)
    with group.watch():
        if group.rank:
            group.serve(rank.answer)
            profile = None
        else:
            profile = Profiler(rank).run()
            group.dismiss()
    return from_rank_0(profile)


@contextlib.contextmanager
def quota_of(rank: int) -> Iterator[None]:
    """This rank's share of a core."""
    with cpu_quota(QUOTAS[rank]) as method:
        if rank == 0:
            print(f"quotas {QUOTAS} by {method}", flush=True)
        yield


def from_rank_0(value: Any) -> Any:
    """What rank 0 has, on every rank."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def say(line: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def change(rounds_us: list[float], others_us: list[float]) -> dict[str, Any]:
    """Relative change against another placement in the same round: each, their median, mean and its standard error."""
    changes = [ours / other - 1 for ours, other in zip(rounds_us, others_us, strict=True)]
    error = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else float("nan")
    return {
        "median": statistics.median(changes), "mean": statistics.mean(changes), "standard_error": error,
        "rounds": changes,
    }  # fmt: skip

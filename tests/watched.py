"""A folder of traces that grows, with the profile and the placement beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gemopt import Placement, Profile, Traces
from gemopt.online import Controller, Policy
from gemopt.online.follow import Follower
from gemopt.online.metrics import Metrics
from gemopt.online.watch import Actions, Watch
from gemopt.profile import Device, Sample

EXPERTS, RANKS, LAYERS = 16, 4, 2


def profile() -> Profile:
    samples = [Sample(assignments=n, latency_us=50.0 + 2.0 * n) for n in range(0, 2001, 100)]
    return Profile(devices=[Device(rank=rank, name="synthetic", samples=samples) for rank in range(RANKS)])


def traffic(hot: int, steps: int = 64, seed: int = 0) -> Traces:
    """Four neighbours are hot together: contiguous placement puts them on one rank."""
    share_E = np.full(EXPERTS, 1.0)
    share_E[4 * hot : 4 * hot + 4] = 20.0
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(512, share_E / share_E.sum(), size=(steps, LAYERS))
    return Traces(counts=counts, num_hidden_layers=LAYERS, top_k=4)


def contiguous() -> Placement:
    return Placement.contiguous(LAYERS, EXPERTS, RANKS, num_hidden_layers=LAYERS)


def filled(folder: Path) -> Path:
    """The folder with an empty one for traces, profile.json and placement.json."""
    (folder / "traces").mkdir()
    profile().save(folder / "profile.json")
    contiguous().save(folder / "placement.json")
    return folder


def grow(folder: Path, number: int, traces: Traces) -> None:
    traces.save(folder / "traces" / f"{number:06d}.safetensors")


def watch(folder: Path, *, command: tuple[str, ...] = (), metrics: Metrics | None = None) -> tuple[Watch, list[str]]:
    log: list[str] = []
    path = folder / "placement.json"
    controller = Controller(profile(), Placement.load(path), Policy(expert_bytes=1e6))
    actions = Actions(path, [lambda placement: placement.save(path)], command)
    return Watch(controller, Follower(folder / "traces"), actions, log.append, metrics), log

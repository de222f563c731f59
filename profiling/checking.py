"""Does a profile still hold? A few of its points measured again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemopt.exceptions import InputError
from gemopt.latency import spread_evenly
from gemopt.profile import Profile, Sample
from gemopt.profiling.profiler import Load, Profiler


@dataclass(frozen=True)
class Drift:
    """One device: median of now / then over the loads that were measured again, and the largest deviation."""

    rank: int
    name: str
    ratio: float
    worst: float


def check_profile(profile: Profile, profiler: Profiler, *, points: int = 5) -> list[Drift]:
    """Measure `points` loads of the profile again, spread over its range, on the ranks as they are now.

    Raises
    ------
    InputError
        When the profile is of other ranks, other devices or another kernel.
    """
    facts = profiler.descriptions
    if len(facts) != profile.num_ranks:
        hint = f"torchrun --nproc-per-node {profile.num_ranks} gemopt profile check"
        raise InputError("ranks", len(facts), f"the profile has {profile.num_ranks}", hint)
    if profile.kernel not in (None, facts[0]["kernel"]):
        raise InputError("--kernel", facts[0]["kernel"], f"the profile is of {profile.kernel}", "give its --model")
    for device, now in zip(profile.devices, facts, strict=True):
        if device.uuid is not None and now["uuid"] != device.uuid:
            limit = f"the profile has {device.uuid} there"
            raise InputError(f"device of rank {device.rank}", now["uuid"], limit, "start the ranks in the same order")
    then = [{_load(sample, profiler.local): sample for sample in device.samples} for device in profile.devices]
    common = sorted(load for load in then[0] if load[0] > 0 and all(load in other for other in then))
    if not common:
        raise InputError("profile", "no load that all ranks measured", "a profile of gemopt profile is needed")
    picked = [common[i] for i in spread_evenly(len(common), points)]
    profiler.ask_all("settle", picked[-1])
    ratios_GP = np.zeros((len(facts), len(picked)))
    for column, load in enumerate(picked):
        profiler.measure(load)
        for rank, sample in enumerate(profiler.samples[load]):
            ratios_GP[rank, column] = sample.latency_us / max(then[rank][load].latency_us, 1e-9)
    return [
        Drift(rank, now["name"], float(np.median(row)), float(row[np.abs(row - 1).argmax()]))
        for rank, (row, now) in enumerate(zip(ratios_GP, facts, strict=True))
    ]


def _load(sample: Sample, local: int) -> Load:
    active = sample.active_experts
    return (sample.assignments, min(local, sample.assignments) if active is None else active)


def holds(drifts: list[Drift], tolerance: float) -> bool:
    """Whether no device moved by more than `tolerance` in the median."""
    return all(abs(drift.ratio - 1) <= tolerance for drift in drifts)


def relative(drifts: list[Drift]) -> list[float]:
    """Each device's ratio against the median of all: a drift common to all does not change which placement is best."""
    middle = float(np.median([drift.ratio for drift in drifts]))
    return [drift.ratio / middle for drift in drifts]

"""Measure a profile: which loads, in which order, on which ranks, and whether the devices held still meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import numpy as np

from gemopt.exceptions import GemoptError, InputError, missing

try:
    import torch
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

from gemopt.profile import Device as Measured
from gemopt.profile import Profile, Sample
from gemopt.profiling.device import Device
from gemopt.profiling.group import Group
from gemopt.profiling.measure import Timing, reading, relative_spread, settle, summarise, time_load
from gemopt.profiling.sampling import MIN_BUDGET, Reading, sample_curve, sample_surface
from gemopt.profiling.workload import Workload

Load = tuple[int, int]
OUTLIER_SPREAD = 0.05  # a point whose timings scatter more than this is measured again
RETRIES = 2
REFERENCE_EVERY = 10  # points between two looks at the reference load
MIN_POINTS = 2 * MIN_BUDGET


class ThrottledError(GemoptError, RuntimeError):
    """A device changed its speed while it was measured."""


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes
    ----------
    points
        Most loads to measure.
    target_error
        Stop a curve when its expected mean relative interpolation error is below this.
    max_assignments
        Largest load.
    sweep
        `load`: all experts of the rank active. `surface`: half of the points so, half with fewer active experts.
    in_turn
        One rank measures at a time while the others rest, instead of all at once.
    timing
        How long each load is measured.
    settle_s
        Most seconds to wait for steady clocks and temperature.
    max_drift
        Refuse the profile when the time of the reference load moved by more than this share.
    """

    points: int = 100
    target_error: float = 0.01
    max_assignments: int = 4096
    sweep: Literal["load", "surface"] = "surface"
    in_turn: bool = False
    timing: Timing = field(default_factory=lambda: Timing(block_us=10_000))
    settle_s: float = 30.0
    max_drift: float = 0.1


@dataclass
class Rank:
    """Answers the questions of rank 0 with this rank's device."""

    workload: Workload
    device: Device
    group: Group
    options: Options

    def answer(self, question: dict[str, Any]) -> dict[str, Any] | None:
        """`about`: `settle` or `load` (assignments, active experts), `who`: the rank that measures, None for all."""
        if question["about"] == "describe":
            return self._describe()
        if question["who"] not in (None, self.group.rank):
            return None
        assignments, active = question["load"]
        try:
            call = self.workload.prepare(assignments, active)
            if question["about"] == "settle":
                block_us = self.options.timing.block_us
                return {"move": settle(self.device, call, block_us=block_us, limit_s=self.options.settle_s)}
            blocks = time_load(self.device, call, self.options.timing)
        except torch.OutOfMemoryError:
            limit = f"loads that fit the memory of rank {self.group.rank} ({self.device.name})"
            raise InputError("--max-assignments", assignments, limit, "give a smaller one") from None
        return summarise(blocks, assignments, active).model_dump()

    def _describe(self) -> dict[str, Any]:
        device = self.device
        shape = self.workload.shape.model_dump()
        facts = {"name": device.name, "uuid": device.uuid, "node": device.node, "state": device.state()}
        return {**facts, "shape": shape, "kernel": self.workload.kernel}


class Profiler:
    """Rank 0's side: asks the ranks for loads until the profile is good enough."""

    def __init__(self, rank: Rank, *, progress: Callable[[int], None] | None = None) -> None:
        self.rank, self.options, self.group = rank, rank.options, rank.group
        self.progress = progress or (lambda done: None)
        self.samples: dict[Load, list[Sample]] = {}
        self.references: list[list[Sample]] = []
        self.descriptions = self._ask("describe")
        self.local = min(int(facts["shape"]["num_local_experts"] or 1) for facts in self.descriptions)
        self.reference: Load = (max(self.local, self.options.max_assignments // 4), self.local)

    def run(self) -> Profile:
        """Measure and return the profile.

        Raises
        ------
        InputError
            When the budget or the range of loads is too small.
        ThrottledError
            When a device did not hold its speed.
        """
        self._check()
        self.ask_all("settle", self.reference)
        self._look_at_reference()
        grid = _grid(self.local, self.options.max_assignments) if self.options.sweep == "surface" else []
        sample_curve(
            lambda load: self.measure((load, self.local)),
            self.local,
            self.options.max_assignments,
            budget=self.options.points // 2 if grid else self.options.points,
            target_error=self.options.target_error,
            unit=self.local,
        )
        if grid:
            sample_surface(self.measure, grid, budget=self.options.points - len(self.samples))
        self._look_at_reference()
        return self._profile()

    def _check(self) -> None:
        if self.options.points < MIN_POINTS:
            raise InputError("--points", self.options.points, f"at least {MIN_POINTS}", "give more points")
        if self.options.max_assignments < 4 * self.local:
            limit = f"at least {4 * self.local}, four rows for each of the {self.local} experts of a rank"
            raise InputError("--max-assignments", self.options.max_assignments, limit)
        kernels = {facts["kernel"] for facts in self.descriptions}
        if len(kernels) > 1:
            raise InputError("kernel", sorted(kernels), "the same kernel on all ranks", "install the same software")

    def _ask(self, about: str, load: Load | None = None, who: int | None = None) -> list[Any]:
        return self.group.ask({"about": about, "load": load, "who": who}, self.rank.answer)

    def ask_all(self, about: str, load: Load) -> list[Any]:
        """Answers of all ranks, measured together or in turn."""
        if not self.options.in_turn:
            return self._ask(about, load)
        return [self._ask(about, load, who=rank)[rank] for rank in range(self.group.size)]

    def measure(self, load: Load) -> Reading:
        """Measure one load on all ranks, scattered ones again; the least scattered answer of each rank stays."""
        if load not in self.samples:
            best = self._timed(load)
            for _ in range(RETRIES):
                if max(map(relative_spread, best)) <= OUTLIER_SPREAD:
                    break
                best = [min(pair, key=relative_spread) for pair in zip(best, self._timed(load), strict=True)]
            self.samples[load] = best
            self.progress(len(self.samples))
            if len(self.samples) % REFERENCE_EVERY == 0:
                self._look_at_reference()
        return reading(self.samples[load])

    def _timed(self, load: Load) -> list[Sample]:
        return [Sample(**answer) for answer in self.ask_all("load", load)]

    def _look_at_reference(self) -> None:
        """Look once more before the profile is refused: a disturbance passes, throttling stays."""
        self.references.append(self._timed(self.reference))
        if np.abs(self.drifts()).max() > self.options.max_drift:
            self.references[-1] = self._timed(self.reference)
        drifts = self.drifts()
        worst = int(np.abs(drifts).argmax())
        if abs(drifts[worst]) > self.options.max_drift:
            raise ThrottledError(self._throttled(worst, float(drifts[worst])))

    def _throttled(self, rank: int, drift: float) -> str:
        before, now = (looks[rank].latency_us for looks in (self.references[0], self.references[-1]))
        facts = self._ask("describe")[rank]
        seen = ", ".join(f"{key} {value}" for key, value in facts["state"].items())
        return (
            f"rank {rank} ({facts['name']}) does not hold its speed: the reference load went from {before:.1f} to "
            f"{now:.1f} us ({drift:+.0%}, limit {self.options.max_drift:.0%}{'; ' + seen if seen else ''}); "
            "let it cool, lock its clocks, end other work on it, or raise --max-drift"
        )

    def drifts(self) -> np.ndarray[Any, Any]:
        """[G] change of each rank's reference time since the first look."""
        first, last = (np.array([max(sample.latency_us, 1e-9) for sample in self.references[look]]) for look in (0, -1))
        return np.asarray(last / first - 1)

    def _profile(self) -> Profile:
        drifts = self.drifts()
        states = [facts["state"] for facts in self._ask("describe")]
        devices = []
        for rank, facts in enumerate(self.descriptions):
            samples = [answers[rank] for _, answers in sorted(self.samples.items())]
            state = {**states[rank], "drift": round(float(drifts[rank]), 4)}
            identity = {key: facts[key] for key in ("name", "uuid", "node")}
            devices.append(Measured(rank=rank, samples=samples, state=state, **identity))
        mode = "alone" if self.group.size == 1 else "in turn" if self.options.in_turn else "together"
        return Profile(
            devices=devices,
            model=self.descriptions[0]["shape"],
            kernel=self.descriptions[0]["kernel"],
            mode=mode,
            software=_software(),
        )


def _grid(local: int, high: int) -> list[Load]:
    """Loads with fewer active experts than the rank has: powers of two of both."""
    actives = [2**k for k in range(local.bit_length()) if 2**k < local]
    grid = [(active * 2**k, active) for active in actives for k in range(high.bit_length()) if active * 2**k <= high]
    return grid if len(grid) >= 5 else []


def _software() -> dict[str, str]:
    found = {}
    for package in ("gemopt", "torch", "transformers", "vllm", "sglang", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

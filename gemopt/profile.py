"""What was measured on each device: latency of its share of a MoE layer against its load; `profile.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from gemopt.documents import Document, Settings
from gemopt.exceptions import InputError
from gemopt.tables import frame
from gemopt.words import counted

OTHER_UNITS = (1e3, 1e6)
"""How many times what others of its name take a device in another unit takes, give or take `SPEEDS`."""
SPEEDS = 3.0
WHAT_IF = "slower"
"""State of a device that was made so many times slower than it was measured."""
FEWEST = 2  # loads that tell how a latency grows
QUICK_US, LATE_US = 0.5, 2e4  # no kernel takes less, and none that places are worth it for takes more for any load


def plain_uuid(uuid: str) -> str:
    """A device uuid as tools agree on it: lower case, without the `GPU-` that some put in front."""
    return uuid.strip().lower().removeprefix("gpu-")


class Sample(Settings):
    """One measured point: a MoE layer's experts on one device under one load.

    `assignments` rows over all local experts, `active_experts` of them with at least one row (None when it was not
    controlled), median latency in microseconds, its spread (median absolute deviation) and the repeats behind it.
    """

    assignments: int = Field(ge=0, le=2**31 - 1)
    active_experts: int | None = Field(default=None, ge=0)
    latency_us: float = Field(ge=0, le=1e12)
    spread_us: float | None = Field(default=None, ge=0)
    repeats: int | None = Field(default=None, ge=1)


class Device(Settings):
    """One EP rank's device and its samples. `state` holds what was seen of it: clocks, watts, degrees."""

    rank: int = Field(ge=0)
    name: str = "unknown"
    uuid: str | None = None
    node: str | None = None
    samples: list[Sample] = Field(min_length=1)
    state: dict[str, str | float | int | None] = Field(default_factory=dict)

    def table(self) -> NDArray[np.float64]:
        """[samples, 4] assignments, active experts (NaN: unknown), latency_us, spread_us (NaN: unknown)."""
        rows = [(s.assignments, s.active_experts, s.latency_us, s.spread_us) for s in self.samples]
        return np.array(rows, dtype=np.float64)


class MoeShape(Settings):
    """The measured layer: sizes, experts of the network and on a rank, experts per token, weights of one expert."""

    name: str | None = None
    hidden_size: int | None = Field(default=None, ge=1)
    intermediate_size: int | None = Field(default=None, ge=1)
    num_experts: int | None = Field(default=None, ge=1)
    num_local_experts: int | None = Field(default=None, ge=1)
    top_k: int | None = Field(default=None, ge=1)
    dtype: str | None = None
    expert_bytes: int | None = Field(default=None, ge=1)


class Profile(Document):
    """Measured latency of every device of an expert-parallel group.

    Attributes
    ----------
    devices
        One per rank, ranks 0..G-1.
    model
        Shape of the measured layer.
    kernel
        Kernel that was measured, e.g. `triton fused_moe`.
    mode
        `alone`, `together` (all ranks at once, as in production), `in turn`, `replay` or `table`.
    software
        Versions, by package.
    source
        Where the numbers come from and under which licence, when they are somebody else's.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    devices: list[Device] = Field(min_length=1)
    model: MoeShape = Field(default_factory=MoeShape)
    kernel: str | None = None
    mode: str | None = None
    software: dict[str, str] = Field(default_factory=dict)
    source: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Profile:
        ranks = [device.rank for device in self.devices]
        if sorted(ranks) != list(range(len(ranks))):
            raise InputError("Profile.devices.rank", ranks, f"each of 0 to {len(ranks) - 1} once")
        if ranks != sorted(ranks):
            object.__setattr__(self, "devices", sorted(self.devices, key=lambda device: device.rank))
        uuids = [plain_uuid(device.uuid) for device in self.devices if device.uuid is not None]
        if len(set(uuids)) < len(uuids):
            raise InputError("Profile.devices.uuid", uuids, "every device is measured as one rank only")
        for device in self.devices:
            _check_samples(device)
        _check_units(self.devices)
        return self

    @property
    def num_ranks(self) -> int:
        """G, ranks of the expert-parallel group."""
        return len(self.devices)

    def with_model(self, **sizes: str | int | None) -> Profile:
        """The same for a layer of these sizes; None leaves what is there."""
        known = {name: value for name, value in sizes.items() if value is not None}
        return self.model_copy(update={"model": self.model.model_copy(update=known)})

    def brief(self) -> str:
        """Devices and what was measured of them, in one line."""
        names = sorted({device.name for device in self.devices})
        loads = [sample.assignments for device in self.devices for sample in device.samples]
        listed = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
        measured = f"{counted(len(loads), 'sample')} of {min(loads)} to {max(loads)} assignments"
        return f"{counted(self.num_ranks, 'device')} ({listed}), {measured}"

    @property
    def device_uuids(self) -> list[str | None]:
        """Device of each rank."""
        return [device.uuid for device in self.devices]

    @property
    def node_of_rank(self) -> list[int]:
        """A number for the node of each rank."""
        nodes = [str(device.node) for device in self.devices]
        return [sorted(nodes).index(node) for node in nodes]

    def to_dataframe(self) -> Any:
        """A pandas data frame with a row per sample: `rank`, `name`, and what `Sample` holds.

        Raises
        ------
        MissingPackageError
            pandas is not installed.
        """
        rows = [(device.rank, device.name, *(value for _, value in sample))
                for device in self.devices for sample in device.samples]  # fmt: skip
        names = ("rank", "name", *Sample.model_fields)
        return frame(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))


def _check_samples(device: Device) -> None:
    field = f"Profile.devices[rank {device.rank}].samples"
    known = [sample.active_experts is not None for sample in device.samples]
    if any(known) and not all(known):
        raise InputError(field, "active_experts on some samples only", "all samples of a device or none")
    for sample in device.samples:
        active = sample.active_experts
        if sample.assignments and not sample.latency_us:
            raise InputError(field, f"0 us for {sample.assignments} assignments", "work takes time: above 0")
        if active is not None and (active > sample.assignments or (active == 0) != (sample.assignments == 0)):
            raise InputError(
                field,
                f"{active} active experts for {sample.assignments} assignments",
                "an active expert has at least one assignment",
            )
    keys = [(sample.assignments, sample.active_experts) for sample in device.samples]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputError(field, f"load {twice} measured twice", "one sample per load", "merge them by their median")


def _check_units(devices: Sequence[Device]) -> None:
    """Raise where a device takes about a thousand times what another of its name does, under every load of both.

    Those that were made slower are passed over.
    """
    first: dict[str, Device] = {}
    for device in (each for each in devices if WHAT_IF not in each.state):
        other = first.setdefault(device.name, device)
        loads, ratios = _beside(device, other)
        slow, fast = (device, other) if len(ratios) and ratios[0] > 1 else (other, device)
        each = np.maximum(ratios, 1 / ratios) if (ratios > 1).all() or (ratios < 1).all() else np.zeros(0)
        if any(len(each) and (each > unit / SPEEDS).all() and (each < unit * SPEEDS).all() for unit in OTHER_UNITS):
            raise InputError(
                f"Profile.devices[rank {slow.rank}].samples",
                f"{each[0]:.4g} times what rank {fast.rank} takes at {loads[0]:g} assignments, of the same name",
                "microseconds on every device",
                "is one in another unit? devices that do differ so need names of their own",
            )


def _beside(device: Device, other: Device) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Loads within the range of both, and how many times the other's latency the device's is there."""
    if device is other:
        return np.zeros(0), np.zeros(0)
    curves = []
    for table in (device.table(), other.table()):
        busy = table[table[:, 0] > 0]
        loads, place = np.unique(busy[:, 0], return_inverse=True)
        curves.append((loads, np.bincount(place, busy[:, 2]) / np.maximum(np.bincount(place), 1)))
    (ours, our_us), (theirs, their_us) = curves
    if not len(ours) or not len(theirs):
        return np.zeros(0), np.zeros(0)
    loads = np.union1d(ours, theirs)
    loads = loads[(loads >= max(ours[0], theirs[0])) & (loads <= min(ours[-1], theirs[-1]))]
    return loads, np.interp(loads, ours, our_us) / np.interp(loads, theirs, their_us)


class Network(Protocol):
    """What traces tell of a network."""

    @property
    def num_experts(self) -> int:
        """Experts of a layer."""

    @property
    def top_k(self) -> int | None:
        """Experts per token, where they are known."""


def profile_doubts(profile: Profile, of: Network) -> list[str]:
    """Sentences on latencies that can hardly tell how a network's traffic is served."""
    return [*_other_network(profile, of), *_flat(profile)]


def _flat(profile: Profile) -> list[str]:
    """A sentence on ranks that cost the same under any load, as they were measured under one."""
    loads = {each.rank: {sample.assignments for sample in each.samples} for each in profile.devices}
    ranks = [rank for rank, measured in loads.items() if len(measured) < FEWEST]
    if not ranks:
        return []
    few = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}"
    named = "every rank" if len(ranks) == len(loads) else few
    return [f"{named} measured under one load: taken to cost the same under any"]


def _other_network(profile: Profile, of: Network) -> list[str]:
    """A sentence where the latencies were measured for other experts than those of a network, as far as both say."""
    model = profile.model
    active = max((sample.active_experts or 0 for each in profile.devices for sample in each.samples), default=0)
    differ = [
        f"{name}: {theirs}, not {ours}"
        for name, theirs, ours in (("experts", model.num_experts, of.num_experts), ("top-k", model.top_k, of.top_k))
        if theirs and ours and theirs != ours
    ]
    if active > of.num_experts:
        differ.append(f"up to {active} active experts, of {of.num_experts}")
    return [f"the profile was measured for another network than the traces ({'; '.join(differ)})"] if differ else []


def unit_doubt(profile: Profile) -> str:
    """The quickest load in a sentence, where it takes less than any kernel, or far more; else empty."""
    busy = [sample for each in profile.devices for sample in each.samples if sample.assignments]
    quickest = min(busy, key=lambda sample: sample.latency_us, default=None)
    if quickest is None or QUICK_US <= quickest.latency_us <= LATE_US:
        return ""
    said = f"{quickest.assignments} assignments: {quickest.latency_us:.4g} us"
    return f"{said}, and no load takes less: is the unit of the times right?"

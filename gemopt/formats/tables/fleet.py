"""Clusters that were not measured: equal devices, or what-if ones as fast as GPUs drawn from a measured fleet."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from gemopt.costs import roofline
from gemopt.exceptions import ABOVE_0, InputError, check_number
from gemopt.formats.tables.beside import MIDDLE, refuse_no_measurements
from gemopt.formats.tables.columns import (
    DEVICES,
    HOSTS,
    LOADS,
    MOMENT,
    MOMENTS,
    OF_A_DEVICE,
    RESULTS,
    SHAPES,
    STATES,
    STATISTICS,
    TIMES,
    is_numeric,
    listed,
    named,
    plain,
    unit_of,
    values,
    words,
)
from gemopt.formats.tables.devices import refuse_summaries
from gemopt.formats.tables.doubts import APART, apart
from gemopt.formats.tables.files import Table, number
from gemopt.formats.tables.notations import read
from gemopt.formats.tables.times import fits
from gemopt.latency import FloatArray
from gemopt.profile import WHAT_IF, Device, Profile
from gemopt.words import counted

SPEEDS = {"tflops", "gflops", "flops", "throughput", "bandwidth", "bw", "gbps", "speed"}
FEW, MANY, AGREE, FEW_AGREE = 3, 8, 0.9, 0.999  # GPUs, and the correlation from which columns contradict each other
SLOWEST, LARGEST_US = 1e3, 1e12  # times what another device takes
KIND = {"name", "model", "type", "sku", "arch", "kind", "product"}
"""Words of columns that tell, where a GPU is one of several, its kind."""
ABOUT = OF_A_DEVICE | set(HOSTS) | {
    "datacenter", "dc", "site", "region", "zone", "cluster", "pool", "partition", "cloud", "numa", "cpu", "os", "pcie",
    "position", "cooling", "serial", "asset", "tag", "tags", "label", "user", "owner", "bios", "vbios", "firmware",
    "ecc", "bar1", "mig", "pstate", "throttle", "throttling", "health", "note", "notes", "comment", "comments",
    "remark", "remarks",
}  # fmt: skip
"""Words of columns that tell of a GPU where it is, what is on it, how it is."""
READING = re.compile(r"[-+]?\d*\.?\d+(e[-+]?\d+)? ?[%a-z\u00b0\u00b5/]{0,6}", re.ASCII | re.IGNORECASE)
"""A number, perhaps with its unit: 1980 MHz."""
FAR = 1.5  # a median that is further from 1 is not that of relative times


@dataclass(frozen=True)
class Fleet:
    """Relative times (1 = fleet median, larger is slower) of GPUs measured under one workload."""

    name: str
    gpus: list[str]
    rel_time: FloatArray

    def draw(self, ranks: int, seed: int) -> list[int]:
        """Indices of `ranks` different GPUs."""
        if ranks > len(self.gpus):
            raise InputError("ranks", ranks, f"at most the {len(self.gpus)} GPUs of fleet {self.name}")
        chosen = np.random.default_rng(seed).choice(len(self.gpus), size=ranks, replace=False)
        return [int(i) for i in chosen]


def read_fleet(path: str | os.PathLike[str], name: str | None = None) -> Fleet:
    """Fleet from a CSV with `rel_time`, or with times, and where it holds several `dataset`; `name` picks one."""
    table = read(path)
    relative = next(iter(named(table, ("rel_time",))), None)
    column = relative or _of_time(table)
    if column is None:
        limit = "a column rel_time, or one of times and the GPUs they are of, is needed"
        raise InputError(str(path), f"columns {', '.join(table.header)}", limit, "of several times keep one")
    names = sorted({row.cells["dataset"] for row in table.rows}) if "dataset" in table.header else [""]
    if name is None and len(names) > 1:
        raise InputError(str(path), f"{len(names)} fleets", f"one of {', '.join(names)}", "choose with --fleet")
    if name is not None and name not in names:
        raise InputError("--fleet", name, f"one of {', '.join(names)}")
    chosen = name if name is not None else names[0]
    kept = [row for row in table.rows if row.cells.get("dataset", "") == chosen]
    rel_time = np.array([number(table, row, column, largest=1e3 if relative else LARGEST_US) for row in kept])
    if (rel_time <= 0).any():
        row = kept[int(rel_time.argmin())]
        limit = "above 0 (1: as fast as the fleet's median)" if relative else "above 0"
        raise InputError(f"{path} {row.where}, {column}", row.cells[column], limit)
    rel_time = rel_time if relative else rel_time / np.median(rel_time)
    if not 1 / FAR < np.median(rel_time) < FAR:
        found = f"times around {np.median(rel_time):g}"
        raise InputError(f"{path}: rel_time", found, "about 1, the fleet's median", "divide them by their median")
    rows = Table(table.path, table.header, kept)
    refuse_no_measurements(rows, (), (), "leave the column out")
    _refuse_speeds(rows, column, rel_time)
    gpus = _gpus(rows)
    twice = next((gpu for gpu in gpus if gpus.count(gpu) > 1), None)
    if twice is not None:
        raise InputError(f"{path}: gpu", f"{twice} twice", "a row for each GPU", "keep one workload, or the median")
    return Fleet(chosen or os.path.basename(str(path)), gpus, rel_time)


def _of_time(table: Table) -> str | None:
    """The one column of times, or of their medians or means, beside one of GPUs."""
    if not any(plain(name) in DEVICES for name in table.header):
        return None
    timed = [
        name
        for name in table.header
        if (unit_of(name) or words(name) & TIMES) and not words(name) & MOMENTS and is_numeric(table.rows, name)
    ]
    middle = [name for name in timed if words(name) & MIDDLE]
    best = [name for name in timed if not words(name) & STATISTICS] or middle
    own = best == middle or not middle or any(fits(table, best[0], each) for each in middle)
    return best[0] if len(best) == 1 and own else None


def _refuse_speeds(table: Table, column: str, rel_time: FloatArray) -> None:
    """Raise where times beside them fall, or speeds rise, as the relative times grow: they are relative speeds."""
    for name in table.header:
        of_time = bool(unit_of(name) or words(name) & TIMES)
        if name == column or not (of_time or words(name) & SPEEDS) or not is_numeric(table.rows, name):
            continue
        beside = np.array([float(row.cells[name].strip("*%x\u00d7 ") or "nan") for row in table.rows])
        usable = len(beside) >= FEW and bool((beside > 0).all()) and min(beside.std(), rel_time.std()) > 0
        if not usable:
            continue
        together = float(np.corrcoef(np.log(rel_time), np.log(beside))[0, 1])
        if (together if of_time else -together) < -(AGREE if len(beside) >= MANY else FEW_AGREE):  # few do by chance
            found = f"numbers that {'fall' if of_time else 'rise'} as {name} rises"
            raise InputError(f"{table.path}: {column}", found, "relative times, larger is slower", "divide 1 by them")


def _gpus(table: Table) -> list[str]:
    """Name of the GPU of each row, after the host; the number of the row where no column tells it."""
    columns = sorted(
        (name for name in table.header if plain(name) in DEVICES), key=lambda name: plain(name) not in HOSTS
    )
    for name in table.header:
        told = name in columns or name == "dataset" or words(name) & MOMENTS
        if not told and (found := _kinds(table, name, told_apart=bool(columns))):
            hint = "keep one of them, or call the column dataset; if it tells nothing of the times, leave it out"
            raise InputError(f"{table.path}: {name}", listed(found), "rows of one workload", hint)
    for row in table.rows:
        refuse_summaries(table, row, columns)
    return ["/".join(row.cells[name] for name in columns) or row.where.split()[-1] for row in table.rows]


def _kinds(table: Table, name: str, *, told_apart: bool) -> list[str]:
    """The workloads, or kinds of GPU, that a column tells apart by words, or by the sizes of what was timed.

    told_apart: another column tells the GPUs apart.
    """
    found = values(table.rows, name)
    if len(found) < 2 or all(map(MOMENT.fullmatch, found)):
        return []
    parts = words(name) - {"n"} or {"n"}  # n_samples
    if all(map(READING.fullmatch, filter(None, found))):
        sizes = parts & ((SHAPES | LOADS) - {"per", "id", "width"}) and not parts & (STATES | RESULTS | ABOUT)
        return found if sizes else []
    own = told_apart and FEW < len(found) == len(table.rows)  # one more name of each
    kind = (parts & OF_A_DEVICE and parts & KIND) or (parts & set(HOSTS) and "type" in parts)
    several = kind and 2 * len(found) <= len(table.rows)
    return found if several or not (own or parts & ABOUT) else []


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_drawn(
    speeds: object, fleet: str | None, memory_fleet: str | None, seed: int, called: Callable[[str], str] = _option
) -> None:
    """Refuse what says how devices are drawn where there are no speeds to draw from; called: how options are named."""
    for name, value in (("fleet", fleet), ("memory_fleet", memory_fleet), ("seed", seed)):
        if value and speeds is None:
            what = "draws devices" if name == "seed" else "read"
            raise InputError(called(name), value, f"{what} from {called('speeds')}", f"give {called('speeds')}")


def serving(
    measured: Profile,
    *,
    notes: list[str],
    device: str | None = None,
    speeds: str | os.PathLike[str] | None = None,
    fleet: str | None = None,
    memory_fleet: str | None = None,
    ranks: int | None = None,
    seed: int = 0,
) -> Profile:
    """The devices that serve: those measured, `ranks` equal ones, or as many (8) drawn from a fleet of `speeds`.

    notes: is told what is doubtful about drawn ones. device: the name of the measured one. fleet, memory_fleet: which
    of the fleets, see `what_if`.
    """
    if device is not None:
        named = [each.model_copy(update={"name": device}) for each in measured.devices]
        measured = measured.model_copy(update={"devices": named})
    if speeds is None:
        return measured if ranks is None else equal(measured, ranks)
    memory = None if memory_fleet is None else read_fleet(speeds, memory_fleet)
    found = what_if(measured, read_fleet(speeds, fleet), ranks=8 if ranks is None else ranks, seed=seed, memory=memory)
    notes += [far] if (far := apart(found)) else []
    return found


def what_if(profile: Profile, fleet: Fleet, *, ranks: int, seed: int = 0, memory: Fleet | None = None) -> Profile:
    """Profile of `ranks` devices like the measured one, each as fast as a GPU drawn from a fleet.

    The fleet's relative time scales the part of a latency that grows with assignments and, unless `memory` gives
    another fleet, the rest (weights read, launches) too. The parts are told apart by a roofline fitted to the table.
    """
    if profile.num_ranks != 1:
        raise InputError(
            "--speeds", counted(profile.num_ranks, "device"), "a table of one device", "leave out the rank column"
        )
    check_number("--ranks", ranks, "at least 1", least=1, whole=True)
    source = profile.devices[0]
    compute_share = _compute_share(source) if memory is not None else np.ones(len(source.samples))
    drawn = fleet.draw(ranks, seed)
    slower, names = [float(fleet.rel_time[i]) for i in drawn], [fleet.gpus[i] for i in drawn]
    rest = slower if memory is None else [float(memory.rel_time[i]) for i in memory.draw(ranks, seed + 1)]
    devices = []
    for rank in range(ranks):
        factors = compute_share * slower[rank] + (1 - compute_share) * rest[rank]
        samples = [
            sample.model_copy(update={"latency_us": sample.latency_us * float(factor)})
            for sample, factor in zip(source.samples, factors, strict=True)
        ]
        state: dict[str, str | float | int | None] = {"rel_time": slower[rank], "rel_time_memory": rest[rank]}
        devices.append(
            Device(rank=rank, name=f"{source.name} as {fleet.name} {names[rank]}", samples=samples, state=state)
        )
    return profile.model_copy(update={"devices": devices, "mode": "what-if"})


def _compute_share(device: Device) -> FloatArray:
    """[samples] share of each latency that grows with assignments, after the largest plane of a fitted roofline."""
    table = device.table()
    planes_K3 = roofline(table, planes=2 if len(table) >= 6 else 1).planes()
    design = np.column_stack([np.ones(len(table)), table[:, 0], np.nan_to_num(table[:, 1])])
    values = design @ planes_K3.T
    chosen = planes_K3[values.argmax(axis=1)]
    return np.asarray(np.clip(chosen[:, 1] * table[:, 0] / np.maximum(values.max(axis=1), 1e-300), 0.0, 1.0))


def slow_down(profile: Profile, rank: int, factor: float) -> Profile:
    """The same profile with one rank `factor` times slower."""
    check_number("rank", rank, f"0 to {profile.num_ranks - 1}", most=profile.num_ranks - 1, whole=True)
    check_number("factor", factor, "above 0; 1.3 is 30 % slower", least=ABOVE_0, most=SLOWEST)
    devices = list(profile.devices)
    one = devices[rank]
    samples = [s.model_copy(update={"latency_us": s.latency_us * factor}) for s in one.samples]
    state = {**one.state, WHAT_IF: factor * float(one.state.get(WHAT_IF) or 1.0)}
    devices[rank] = one.model_copy(update={"samples": samples, "state": state})
    return profile.model_copy(update={"devices": devices})


def slowed(profile: Profile, slower: Mapping[int, float], notes: list[str], called: str = "--slower ") -> Profile:
    """The same profile with ranks so many times slower; notes: is told of factors that may be per cents.

    called: how messages name what was given, before the rank.
    """
    for rank, factor in slower.items():
        if not 0 <= rank < profile.num_ranks:
            raise InputError(called.rstrip(" ."), rank, f"ranks 0 to {profile.num_ranks - 1}")
        if not 1 <= factor <= SLOWEST:
            limit = f"1 to {SLOWEST:g}, as it multiplies the times"
            hint = f"at {factor:g} of the speed: {1 / factor:.4g}" if 1 / SLOWEST <= factor < 1 else ""
            raise InputError(f"{called}{rank}", factor, limit, hint)
        if factor >= APART:
            notes.append(f"{called}{rank} is {factor:g} times the time; {factor:g} % more is {1 + factor / 100:g}")
        profile = slow_down(profile, rank, factor)
    return profile


def equal(profile: Profile, ranks: int) -> Profile:
    """Profile of `ranks` devices that are each exactly like the one measured."""
    check_number("--ranks", ranks, "at least 1", least=1, whole=True)
    if profile.num_ranks == ranks:
        return profile
    if profile.num_ranks != 1:
        limit = f"the table has {counted(profile.num_ranks, 'device')} of its own"
        raise InputError("--ranks", ranks, limit, "leave --ranks out, or choose one device with --where")
    one = profile.devices[0].model_copy(update={"uuid": None, "node": None})
    return profile.model_copy(update={"devices": [one.model_copy(update={"rank": rank}) for rank in range(ranks)]})

"""Read anyone's kernel table (CSV) as a profile, and draw a what-if cluster from a fleet's measured speeds."""

from __future__ import annotations

import csv
import io
import os
from collections import defaultdict
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from gemopt.costs import Roofline
from gemopt.documents import read_bytes
from gemopt.exceptions import InputError
from gemopt.latency import FloatArray
from gemopt.profile import Device, MoeShape, Profile, Sample

LOAD_COLUMNS = ("tokens", "num_tokens", "assignments")
ACTIVE_COLUMNS = ("active_experts", "activated_experts")
LARGEST_LOAD, LARGEST_US = 2.0**31 - 1, 1e12  # as in a profile
LATENCY_COLUMNS = {"latency_us": 1.0, "time_us": 1.0, "latency_ms": 1e3, "time_ms": 1e3, "latency_ns": 1e-3}


class Unit(StrEnum):
    """What the load column counts.

    `assignments`: rows of the expert GEMMs on the measured device. `tokens`: tokens whose experts are all on the
    device, so assignments are tokens x top-k. `group-tokens`: tokens of the whole expert-parallel group of N ranks,
    so a rank gets tokens x top-k / N assignments.
    """

    ASSIGNMENTS = "assignments"
    TOKENS = "tokens"
    GROUP_TOKENS = "group-tokens"


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


def read_table(
    path: str | os.PathLike[str], *, unit: Unit = Unit.ASSIGNMENTS, top_k: int | None = None, ep: int | None = None
) -> Profile:
    """Profile from a CSV with columns `tokens[,active_experts],latency_us[,rank]`.

    Rows of one load are merged: median latency, median absolute deviation, number of rows.

    Raises
    ------
    InputError
        Naming the file, the row and the column that is wrong.
    """
    factor = _assignments_per_load(unit, top_k, ep)
    rows, header = _rows(path)
    load_column = _column(path, header, LOAD_COLUMNS)
    active_column = next((name for name in ACTIVE_COLUMNS if name in header), None)
    latency_column = _column(path, header, tuple(LATENCY_COLUMNS))
    merged: dict[int, dict[tuple[int, int | None], list[float]]] = defaultdict(lambda: defaultdict(list))
    scale = LATENCY_COLUMNS[latency_column]
    for line, row in rows:
        load = _number(path, line, load_column, row[load_column], largest=LARGEST_LOAD / factor) * factor
        latency = _number(path, line, latency_column, row[latency_column], largest=LARGEST_US / scale) * scale
        active = None if active_column is None else _whole(path, line, active_column, row[active_column])
        if active is not None and active > np.ceil(load):
            raise InputError(
                f"{path} line {line}, {active_column}",
                active,
                f"at most the {load:g} assignments of the line",
                "does the load column count tokens? then give --unit and --top-k",
            )
        rank = _whole(path, line, "rank", row["rank"]) if "rank" in header else 0
        merged[rank][(_whole_load(load, active), active)].append(latency)
    devices = [Device(rank=rank, samples=_samples(points)) for rank, points in sorted(merged.items())]
    return Profile(devices=devices, model=MoeShape(top_k=top_k), mode="table")


def _assignments_per_load(unit: Unit, top_k: int | None, ep: int | None) -> float:
    if unit is Unit.ASSIGNMENTS:
        return 1.0
    if top_k is None or top_k < 1:
        raise InputError("--top-k", top_k, f"unit {unit.value} needs the experts per token, at least 1", "give --top-k")
    if unit is Unit.TOKENS:
        return float(top_k)
    if ep is None or ep < 1:
        raise InputError("--ep", ep, "unit group-tokens needs the ranks of the measured group, at least 1", "give --ep")
    return top_k / ep


def _whole_load(load: float, active: int | None) -> int:
    """Nearest whole number, but a rank with any work or active expert has at least that many assignments."""
    return max(round(load), active or 0, int(load > 0))


def _samples(points: dict[tuple[int, int | None], list[float]]) -> list[Sample]:
    samples = []
    for (load, active), values in sorted(points.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        median = float(np.median(values))
        spread = float(np.median(np.abs(np.array(values) - median))) if len(values) > 1 else None
        samples.append(
            Sample(assignments=load, active_experts=active, latency_us=median, spread_us=spread, repeats=len(values))
        )
    return samples


def read_fleet(path: str | os.PathLike[str], name: str | None = None) -> Fleet:
    """Fleet from a CSV with `rel_time` and, where it holds several, `dataset`; `name` picks one."""
    rows, header = _rows(path)
    _column(path, header, ("rel_time",))
    names = sorted({row["dataset"] for _, row in rows}) if "dataset" in header else [""]
    if name is None and len(names) > 1:
        raise InputError(str(path), f"{len(names)} fleets", f"one of {', '.join(names)}", "choose with --fleet")
    if name is not None and name not in names:
        raise InputError("--fleet", name, f"one of {', '.join(names)}")
    chosen = name if name is not None else names[0]
    kept = [(line, row) for line, row in rows if row.get("dataset", "") == chosen]
    rel_time = np.array([_number(path, line, "rel_time", row["rel_time"], largest=1e3) for line, row in kept])
    if (rel_time <= 0).any():
        line, row = kept[int(rel_time.argmin())]
        raise InputError(f"{path} line {line}, rel_time", row["rel_time"], "above 0 (1: as fast as the fleet's median)")
    gpus = [row.get("gpu") or str(line) for line, row in kept]
    return Fleet(chosen or os.path.basename(str(path)), gpus, rel_time)


def what_if(profile: Profile, fleet: Fleet, *, ranks: int, seed: int = 0, memory: Fleet | None = None) -> Profile:
    """Profile of `ranks` devices like the measured one, each as fast as a GPU drawn from a fleet.

    The fleet's relative time scales the part of a latency that grows with assignments and, unless `memory` gives
    another fleet, the rest (weights read, launches) too. The parts are told apart by a roofline fitted to the table.
    """
    if profile.num_ranks != 1:
        raise InputError(
            "--speeds", f"{profile.num_ranks} devices", "a table of one device", "leave out the rank column"
        )
    if ranks < 1:
        raise InputError("--ranks", ranks, "at least 1")
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
    planes_K3 = Roofline.fit_device(table, planes=2 if len(table) >= 6 else 1).planes()
    design = np.column_stack([np.ones(len(table)), table[:, 0], np.nan_to_num(table[:, 1])])
    values = design @ planes_K3.T
    chosen = planes_K3[values.argmax(axis=1)]
    return np.asarray(np.clip(chosen[:, 1] * table[:, 0] / np.maximum(values.max(axis=1), 1e-300), 0.0, 1.0))


def slow_down(profile: Profile, rank: int, factor: float) -> Profile:
    """The same profile with one rank `factor` times slower."""
    if not 0 <= rank < profile.num_ranks:
        raise InputError("rank", rank, f"0 to {profile.num_ranks - 1}")
    if not 0 < factor <= 1e3:
        raise InputError("factor", factor, "above 0; 1.3 is 30 % slower")
    devices = list(profile.devices)
    samples = [s.model_copy(update={"latency_us": s.latency_us * factor}) for s in devices[rank].samples]
    devices[rank] = devices[rank].model_copy(update={"samples": samples})
    return profile.model_copy(update={"devices": devices})


def _rows(path: str | os.PathLike[str]) -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    """Rows with the number of their line, and the header."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text), strict=True, skipinitialspace=True)
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(str(path), str(error), "a CSV file in UTF-8 is needed") from None
    if len(lines) < 2:
        raise InputError(str(path), "no rows", "a header line and at least one row are needed")
    header = lines[0][1]
    for line, cells in lines:
        if len(cells) != len(header):
            raise InputError(f"{path} line {line}", f"{len(cells)} columns", f"{len(header)} columns, as in the header")
    return [(line, dict(zip(header, cells, strict=True))) for line, cells in lines[1:]], header


def _column(path: str | os.PathLike[str], header: list[str], accepted: tuple[str, ...]) -> str:
    for name in accepted:
        if name in header:
            return name
    raise InputError(str(path), f"columns {', '.join(header)}", f"a column {' or '.join(accepted)} is needed")


def _number(path: str | os.PathLike[str], line: int, column: str, text: str, *, largest: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= largest:
        raise InputError(f"{path} line {line}, {column}", text, f"a number from 0 to {largest:.10g}")
    return value


def _whole(path: str | os.PathLike[str], line: int, column: str, text: str) -> int:
    value = _number(path, line, column, text, largest=LARGEST_LOAD)
    if value != int(value):
        raise InputError(f"{path} line {line}, {column}", text, "a whole number")
    return int(value)

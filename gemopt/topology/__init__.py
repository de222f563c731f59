"""How ranks are wired: nodes, racks, and how long each link takes for its bytes; `topology.json`.

A message from one rank to another goes out of a port and into another; ranks of one node use the ports of
`within_node`, others those of `between_nodes` and, between racks, also those of `between_racks`. A port belongs to a
rank, or is shared by a node or a rack. Besides or instead, every ordered pair of ranks may be a link of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator

from gemopt.documents import Document, Settings
from gemopt.documents.arrays import FloatMatrix, IntVector
from gemopt.documents.foreign import not_a
from gemopt.exceptions import InputError
from gemopt.latency import Curve
from gemopt.words import counted

US_PER_BYTE = 1e-3  # at 1 GB/s
LEVELS = ("within_node", "between_nodes", "between_racks")
NONE = -1
LEAST_US, MOST_US = 0.01, 1e6  # a latency beyond is not in microseconds
MOST_GBS, MOST_SHARED_GBS = 1e4, 1e6  # a bandwidth of a rank's port, and of one that ranks share, is not in GB/s
LATENCY = f"0, or {LEAST_US:g} to {MOST_US:,.0f}", "microseconds"


class Wired(BaseModel):
    """What computes things from its fields once; a copy with other fields computes them anew."""

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, without what was computed."""
        copy = super().model_copy(update=update, deep=deep)
        for name in copy.__dict__.keys() - type(copy).model_fields.keys():
            del copy.__dict__[name]
        return copy


class Level(Wired, Settings):
    """Ports of one level: bandwidth and latency, or measured points.

    Attributes
    ----------
    bandwidth_gbs, latency_us
        10^9 bytes per second out of a port, and as many into it at the same time; microseconds of an exchange however
        little it carries.
    points
        Instead: measured (bytes through a port, microseconds), increasing in both; straight lines between them, and
        beyond the last with the slope of the upper half of their range.
    port_of
        Who owns a port: every `rank`, or all ranks of a `node` or of a `rack` together.
    """

    bandwidth_gbs: float | None = Field(default=None, strict=True)
    latency_us: float = Field(default=0.0, strict=True)
    points: list[tuple[float, float]] | None = None
    port_of: Literal["rank", "node", "rack"] = "rank"

    @model_validator(mode="after")
    def _check(self) -> Level:
        if (self.bandwidth_gbs is None) == (self.points is None):
            given = "both" if self.points is not None else "nothing"
            raise InputError("Topology.bandwidth_gbs", given, "a bandwidth or measured points, one of them")
        most = MOST_GBS if self.port_of == "rank" else MOST_SHARED_GBS
        if self.bandwidth_gbs is not None and not 0 < self.bandwidth_gbs <= most:
            raise InputError("Topology.bandwidth_gbs", self.bandwidth_gbs, f"above 0, at most {most:,.0f}", "GB/s")
        if self.latency_us != 0 and not LEAST_US <= self.latency_us <= MOST_US:
            raise InputError("Topology.latency_us", self.latency_us, *LATENCY)
        if self.points is not None:
            table = np.array(self.points, dtype=np.float64)
            rising = len(table) > 1 and (np.diff(table[:, 0]) > 0).all() and (np.diff(table[:, 1]) >= 0).all()
            if not rising or table[0].min() < 0 or table[-1, 1] <= 0:
                raise InputError("Topology.points", self.points, "two or more (bytes, us), bytes and us increasing")
            if self.latency_us != 0:
                raise InputError("Topology.latency_us", self.latency_us, "none beside points, which hold the latency")
            if table[-1, 0] * US_PER_BYTE > most * table[-1, 1]:
                given = f"{table[-1, 0]:g} bytes in {table[-1, 1]:g} us"
                raise InputError("Topology.points", given, f"at most {most:,.0f} GB/s", "bytes and microseconds")
        return self

    @cached_property
    def curve(self) -> Curve:
        """Microseconds of a port for its bytes."""
        if self.points is None:
            assert self.bandwidth_gbs is not None
            return Curve(np.zeros(1), np.array([self.latency_us]), US_PER_BYTE / self.bandwidth_gbs)
        x, y = np.array(self.points, dtype=np.float64).T
        half = int(np.searchsorted(x, x[-1] / 2, side="right")) - 1
        half = min(max(half, 0), len(x) - 2)
        slope = (y[-1] - y[half]) / (x[-1] - x[half])
        if x[0] > 0:
            x, y = np.append(0.0, x), np.append(y[0], y)
        return Curve(x, y, float(slope))


@dataclass(frozen=True, eq=False)
class Ports:
    """Everything that bytes go through. R ports, G ranks.

    of_pair: [G, G, M] ports that a message from a rank to another uses, -1 for none; empty on the diagonal.
    names: what each port is. curve_of: [R] index into `curves`. level_of: [R] index into `LEVELS`, 3 for pairs.
    into: [R] whether bytes come in there (a pair's link: yes).
    """

    of_pair: NDArray[np.int32]
    names: list[str]
    curves: list[Curve]
    curve_of: NDArray[np.int64]
    level_of: NDArray[np.int64]
    into: NDArray[np.bool_]


class Topology(Wired, Document):
    """Ranks, nodes and racks, and what their links carry.

    Attributes
    ----------
    node_of_rank
        [G] node of each rank, 0, 1, ...
    rack_of_node
        Rack of each node; all in one when absent.
    within_node, between_nodes, between_racks
        Ports between ranks of a node, between nodes, and (besides the latter) between racks.
    pair_bandwidth_gbs, pair_latency_us
        [G, G] links of their own from each rank to each other; the diagonal does not count. They need not be symmetric.
    name, source
        What it is, and where its figures come from.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    node_of_rank: IntVector
    rack_of_node: IntVector | None = None
    within_node: Level | None = None
    between_nodes: Level | None = None
    between_racks: Level | None = None
    pair_bandwidth_gbs: FloatMatrix | None = None
    pair_latency_us: FloatMatrix | None = None
    name: str | None = None
    source: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Topology:
        _check_groups("Topology.node_of_rank", self.node_of_rank)
        if self.rack_of_node is not None:
            _check_groups("Topology.rack_of_node", self.rack_of_node)
            if len(self.rack_of_node) != self.num_nodes:
                raise InputError("Topology.rack_of_node", self.rack_of_node, f"one rack per node, {self.num_nodes}")
        self._check_pairs()
        for name, groups, given in zip(
            LEVELS[1:], (self.num_nodes, self.num_racks), ("node_of_rank", "rack_of_node"), strict=True
        ):
            if getattr(self, name) is not None and groups == 1:
                raise InputError(f"Topology.{name}", "given", f"several groups of {given}, and there is one")
        for name in LEVELS[:2]:
            if (level := getattr(self, name)) is not None and level.port_of == "rack":
                raise InputError(f"Topology.{name}.port_of", "rack", "rank or node")
        if self.pair_bandwidth_gbs is None:
            largest = int(np.bincount(self.node_of_rank).max())
            needed = (largest > 1, self.num_nodes > 1, self.num_racks > 1)
            for name, need in zip(LEVELS, needed, strict=True):
                if need and getattr(self, name) is None:
                    raise InputError(f"Topology.{name}", None, "ranks are linked so, and nothing says how fast")
        return self

    def _check_pairs(self) -> None:
        shape, own = (self.num_ranks, self.num_ranks), np.eye(self.num_ranks, dtype=bool)
        for name in ("pair_bandwidth_gbs", "pair_latency_us"):
            matrix = getattr(self, name)
            if matrix is None:
                continue
            if matrix.shape != shape:
                raise InputError(f"Topology.{name}", f"shape {matrix.shape}", f"every rank to every other, {shape}")
            if name == "pair_bandwidth_gbs":
                good, limit = (matrix > 0) & (matrix <= MOST_GBS), (f"above 0, at most {MOST_GBS:,.0f}", "GB/s")
            else:
                good, limit = (matrix == 0) | ((matrix >= LEAST_US) & (matrix <= MOST_US)), LATENCY
            bad = np.argwhere(~good & ~own)
            if len(bad):
                g, h = bad[0].tolist()
                raise InputError(f"Topology.{name}[{g}][{h}]", float(matrix[g, h]), *limit)
        if self.pair_latency_us is not None and self.pair_bandwidth_gbs is None:
            raise InputError("Topology.pair_bandwidth_gbs", None, "latencies of pairs need their bandwidths")

    @property
    def num_ranks(self) -> int:
        """G, ranks."""
        return len(self.node_of_rank)

    @property
    def num_nodes(self) -> int:
        """Nodes."""
        return int(self.node_of_rank.max()) + 1

    @property
    def num_racks(self) -> int:
        """Racks."""
        return 1 if self.rack_of_node is None else int(self.rack_of_node.max()) + 1

    @cached_property
    def rack_of_rank(self) -> NDArray[np.int64]:
        """[G] rack of each rank."""
        racks = np.zeros(self.num_nodes, np.int64) if self.rack_of_node is None else self.rack_of_node
        return np.asarray(racks[self.node_of_rank])

    @cached_property
    def gates(self) -> NDArray[np.int64]:
        """[G, nodes] rank of a node through which a rank's messages to it go: the one at the same place in its node."""
        members = [np.flatnonzero(self.node_of_rank == node) for node in range(self.num_nodes)]
        place = np.zeros(self.num_ranks, np.int64)
        for ranks in members:
            place[ranks] = np.arange(len(ranks))
        return np.stack([ranks[place % len(ranks)] for ranks in members], axis=1)

    @cached_property
    def ports(self) -> Ports:
        """All ports, and which of them a message from one rank to another uses."""
        ranks = np.arange(self.num_ranks)
        same_node = self.node_of_rank[:, None] == self.node_of_rank[None]
        same_rack = self.rack_of_rank[:, None] == self.rack_of_rank[None]
        used = (same_node & ~np.eye(len(ranks), dtype=bool), ~same_node, ~same_rack)
        owners = {"rank": ranks, "node": self.node_of_rank, "rack": self.rack_of_rank}
        columns: list[NDArray[np.int64]] = []
        names: list[str] = []
        curves: list[Curve] = []
        curve_of: list[int] = []
        level_of: list[int] = []
        for index, (name, use) in enumerate(zip(LEVELS, used, strict=True)):
            level: Level | None = getattr(self, name)
            if level is None or not use.any():
                continue
            owner = owners[level.port_of]
            size = int(owner.max()) + 1
            for side, across in (("out of", owner[:, None]), ("into", owner[None])):
                columns.append(np.where(use, len(names) + across, NONE))
                names += [f"{name} {side} {level.port_of} {k}" for k in range(size)]
                curve_of += [len(curves)] * size
                level_of += [index] * size
            curves.append(level.curve)
        if self.pair_bandwidth_gbs is not None:
            numbers = np.full((len(ranks), len(ranks)), NONE)
            for g, h in np.argwhere(~np.eye(len(ranks), dtype=bool)).tolist():
                numbers[g, h] = len(names)
                names.append(f"link from rank {g} to rank {h}")
                curve_of.append(len(curves))
                level_of.append(len(LEVELS))
                latency = 0.0 if self.pair_latency_us is None else float(self.pair_latency_us[g, h])
                slope = US_PER_BYTE / float(self.pair_bandwidth_gbs[g, h])
                curves.append(Curve(np.zeros(1), np.array([latency]), slope))
            columns.append(numbers)
        shape = (len(ranks), len(ranks), len(columns))
        table = np.stack(columns, axis=2) if columns else np.full(shape, NONE)
        into = np.array([" out of " not in name for name in names], dtype=bool)
        return Ports(
            table.astype(np.int32), names, curves, np.array(curve_of, np.int64), np.array(level_of, np.int64), into
        )  # fmt: skip

    def byte_times(self) -> NDArray[np.float64]:
        """[G, G] microseconds of one byte more on the slowest port from each rank to each other; 0 on a rank itself."""
        ports = self.ports
        if not ports.names:
            return np.zeros((self.num_ranks, self.num_ranks))
        slope = np.array([curve.slope for curve in ports.curves])[ports.curve_of]
        return np.asarray(np.where(ports.of_pair >= 0, slope[ports.of_pair], 0.0).max(axis=2))

    def slowest_gbps(self, size_bytes: float) -> float:
        """GB/s at which every rank can send and receive so many bytes when all do so at once: that of the slowest port.

        A port that ranks share serves each of them.
        """
        ports, slowest_us = self.ports, 0.0
        for port, curve in enumerate(ports.curve_of):
            uses = (ports.of_pair == port).any(axis=2)
            sharers = int(np.count_nonzero(uses.any(axis=0 if ports.into[port] else 1)))
            if sharers:
                slowest_us = max(slowest_us, float(ports.curves[curve](sharers * size_bytes)))
        return size_bytes / slowest_us / 1e3 if slowest_us else 1e6

    def check_ranks(self, num_ranks: int) -> None:
        """`InputError` unless it is of so many ranks."""
        if self.num_ranks != num_ranks:
            raise InputError(
                "topology",
                counted(self.num_ranks, "rank"),
                f"the profile has {counted(num_ranks, 'device')}, and each needs its links",
                f"give one of as many, such as nvlink-{num_ranks}",
            )


def _check_groups(field: str, group_of: NDArray[np.int64]) -> None:
    if not len(group_of) or group_of.min() < 0 or (np.bincount(group_of) == 0).any():
        raise InputError(field, group_of, "numbers 0, 1, ... without gaps")


def load(topology: Topology | str | os.PathLike[str]) -> Topology:
    """A topology as it is, by its name, or from its file."""
    from gemopt.topology.named import named

    if isinstance(topology, Topology):
        return topology
    if not isinstance(topology, (str, os.PathLike)):
        raise not_a("Topology", topology, "topology")
    text = os.fspath(topology)
    if Path(text).suffix != ".json" and not Path(text).exists():
        return named(text)
    try:
        return Topology.load(text)
    except InputError as error:
        if error.field != text or Path(text).suffix == ".json" or not Path(text).is_file():
            raise
        limit = "a document in .json, or a name such as 2x8-ib400"
        way_out = f"gemopt topology {text} -o topology.json reads what was measured"
        raise InputError(text, "no topology.json", limit, way_out) from None

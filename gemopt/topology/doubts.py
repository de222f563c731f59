"""What in a topology is hardly right, in words: units that were mistaken for others. It is taken as it is, and said."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from gemopt.profile import Device
from gemopt.topology import LEVELS, Level, Topology

NIC_GBS = 100.0  # of an 800 Gb/s NIC, the fastest there is for a GPU
INSIDE_GBS = 1800.0  # of NVLink 6 in each direction; NVLink 4 has 450, NVLink 5 900
BOTH_WAYS = {600.0: "A100", 900.0: "H100", 1800.0: "B200"}  # of NVLink on data sheets: twice that of a direction
ONE_WAY = {900.0: re.compile(r"B[123]00\b")}  # of those, what GPUs named so send in each direction
LEAST_GBS, LEAST_INSIDE_GBS = 0.1, 1.0
SHORT_US, LONG_US = 0.5, 1e3  # latencies of an exchange beyond are hardly in microseconds


def doubts(topology: Topology, devices: Sequence[Device] = ()) -> list[str]:
    """One sentence each on bandwidths that may be Gb/s, TB/s or MB, and latencies that may be milliseconds.

    devices: [G] as they were measured; where their hosts are several, on ranks of one that are on two nodes here.
    """
    hosts, names = [each.node for each in devices], " ".join(each.name for each in devices)
    levels = [(name, level) for name in LEVELS if (level := getattr(topology, name)) is not None]
    found = [each for name, level in levels for each in _of_level(topology, name, level, names)]
    return [*found, *_of_pairs(topology), *_swapped(topology), *_torn(topology, hosts)]


def _of_level(topology: Topology, name: str, level: Level, gpus: str) -> Iterator[str]:
    groups = {"rank": np.arange(topology.num_ranks), "node": topology.node_of_rank, "rack": topology.rack_of_rank}
    sharers = int(np.bincount(groups[level.port_of]).max())
    most = sharers * (INSIDE_GBS if name == LEVELS[0] else NIC_GBS)
    if level.bandwidth_gbs is not None and level.bandwidth_gbs > most:
        yield _fast(f"{name}.bandwidth_gbs", level.bandwidth_gbs, most, inside=name == LEVELS[0])
    gbs = level.bandwidth_gbs or 0.0
    known = gbs in ONE_WAY and ONE_WAY[gbs].search(gpus)
    if name == LEVELS[0] and level.port_of == "rank" and (gpu := BOTH_WAYS.get(gbs)) and not known:
        yield f"{name}.bandwidth_gbs is {gbs:g} GB/s, on {gpu} that of both directions together: {gbs / 2:g} in each"
    yield from _slow(name, 1e-3 / level.curve.slope, float(level.curve(0.0)), inside=name == LEVELS[0])


def _slow(name: str, gbs: float, latency_us: float, *, inside: bool) -> Iterator[str]:
    if gbs < (LEAST_INSIDE_GBS if inside else LEAST_GBS):
        yield f"{name}: {gbs:.2g} GB/s: are the bytes bytes, and the bandwidth not in TB/s?"
    if 0 < latency_us < SHORT_US or latency_us > LONG_US:
        yield f"{name}: an exchange of next to nothing takes {latency_us:g} us: is that in microseconds?"


def _fast(field: str, gbs: float, most: float, *, inside: bool) -> str:
    best = "the fastest NVLinks carry" if inside else "NICs carry"
    more = "" if inside else "; right for NVLink between nodes"
    return f"{field} is {gbs:g} GB/s, and {best} {most:g} at most: for {gbs:g} Gb/s write {gbs / 8:g}{more}"


def _of_pairs(topology: Topology) -> Iterator[str]:
    matrix, latencies = topology.pair_bandwidth_gbs, topology.pair_latency_us
    if matrix is None:
        return
    node = topology.node_of_rank
    across = node[:, None] != node[None]
    inside = ~across & ~np.eye(len(node), dtype=bool)
    for level, chosen, most in zip(LEVELS, (inside, across), (INSIDE_GBS, NIC_GBS), strict=False):
        if not chosen.any():
            continue
        within, fastest = level == LEVELS[0], float(matrix[chosen].max())
        at_once = float(np.where(chosen, matrix, 0.0).sum(axis=1).max())
        if fastest > most:
            yield _fast("pair_bandwidth_gbs", fastest, most, inside=within)
        elif at_once > most and getattr(topology, level) is None:
            said = f"pair_bandwidth_gbs lets a rank send {at_once:g} GB/s at once {level.replace('_', ' ')}"
            yield f"{said}: were pairs measured one at a time? then say what its port carries too, {level}"
        times = np.zeros(1) if latencies is None else latencies[chosen]
        odd = times[(times > 0) & ((times < SHORT_US) | (times > LONG_US))]
        yield from _slow("pairs", float(matrix[chosen].min()), float([*odd, 0.0][0]), inside=within)


def _torn(topology: Topology, hosts: Sequence[str | None]) -> Iterator[str]:
    first: dict[str, int] = {}
    if len({*hosts} - {None}) < 2 or len(hosts) != topology.num_ranks:
        return
    for rank, host in enumerate(hosts):
        other = rank if host is None else first.setdefault(host, rank)
        if topology.node_of_rank[rank] != topology.node_of_rank[other]:
            said = f"ranks {other} and {rank} were measured on one host, {host}, and the topology has them on two nodes"
            yield f"{said}: are the ranks of one of them in another order?"
            return


def _swapped(topology: Topology) -> list[str]:
    """That ranks of one node are further apart than others, in bandwidth and in latency."""
    inside, between = topology.within_node, topology.between_nodes
    if inside is None or between is None or between.port_of != "rank":
        return []
    slower = inside.curve.slope > between.curve.slope and float(inside.curve(0.0)) > float(between.curve(0.0))
    return ["within_node takes longer than between_nodes for any bytes: are the two swapped?"] if slower else []

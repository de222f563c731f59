"""What in a topology is hardly right, in words: units that were mistaken for others. It is taken as it is, and said."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gemopt.topology import LEVELS, Level, Topology

NIC_GBS = 100.0  # of an 800 Gb/s NIC, the fastest there is for a GPU
INSIDE_GBS = 1800.0  # of NVLink 6 in each direction; NVLink 4 has 450, NVLink 5 900
LEAST_GBS = 0.1
SHORT_US, LONG_US = 0.5, 1e3  # latencies of an exchange beyond are hardly in microseconds


def doubts(topology: Topology) -> list[str]:
    """One sentence each on bandwidths that may be Gb/s, TB/s or MB, and latencies that may be milliseconds."""
    return [found for name in LEVELS if (level := getattr(topology, name)) is not None
            for found in _of_level(topology, name, level)] + _of_pairs(topology) + _swapped(topology)  # fmt: skip


def _of_level(topology: Topology, name: str, level: Level) -> Iterator[str]:
    groups = {"rank": np.arange(topology.num_ranks), "node": topology.node_of_rank, "rack": topology.rack_of_rank}
    sharers = int(np.bincount(groups[level.port_of]).max())
    most = sharers * (INSIDE_GBS if name == LEVELS[0] else NIC_GBS)
    if level.bandwidth_gbs is not None and level.bandwidth_gbs > most:
        yield _fast(f"{name}.bandwidth_gbs", level.bandwidth_gbs, most, inside=name == LEVELS[0])
    curve = level.curve
    if curve.slope > 1e-3 / LEAST_GBS:
        yield f"{name}: {1e-3 / curve.slope:.2g} GB/s: are the bytes bytes, and the bandwidth not in TB/s?"
    latency_us = float(curve(0.0))
    if 0 < latency_us < SHORT_US or latency_us > LONG_US:
        yield f"{name}: an exchange of next to nothing takes {latency_us:g} us: is that in microseconds?"


def _fast(field: str, gbs: float, most: float, *, inside: bool) -> str:
    best = "the fastest NVLinks carry" if inside else "NICs carry"
    more = "" if inside else "; right for NVLink between nodes"
    return f"{field} is {gbs:g} GB/s, and {best} {most:g} at most: for {gbs:g} Gb/s write {gbs / 8:g}{more}"


def _of_pairs(topology: Topology) -> list[str]:
    matrix = topology.pair_bandwidth_gbs
    if matrix is None:
        return []
    node = topology.node_of_rank
    across = node[:, None] != node[None]
    inside = ~across & ~np.eye(len(node), dtype=bool)
    fastest = [(matrix[chosen].max(initial=0.0), most, one) for chosen, most, one in
               ((inside, INSIDE_GBS, True), (across, NIC_GBS, False))]  # fmt: skip
    return [_fast("pair_bandwidth_gbs", float(gbs), most, inside=one) for gbs, most, one in fastest if gbs > most]


def _swapped(topology: Topology) -> list[str]:
    """That ranks of one node are further apart than others, in bandwidth and in latency."""
    inside, between = topology.within_node, topology.between_nodes
    if inside is None or between is None or between.port_of != "rank":
        return []
    slower = inside.curve.slope > between.curve.slope and float(inside.curve(0.0)) > float(between.curve(0.0))
    return ["within_node takes longer than between_nodes for any bytes: are the two swapped?"] if slower else []

"""Topologies by name: `nvlink-8` is one node of eight GPUs, `2x8-ib400` two such nodes with 400 Gb/s NICs.

`NODESxRANKS-NETWORK[-INSIDE]`, or `INSIDE-RANKS` for one node. Networks are ports of every rank (one NIC per GPU),
unless said to be shared by the node. Figures are rates reached by collectives, with their source, not what is printed
on the box; measure your own with `gemopt profile links`.
"""

from __future__ import annotations

import re

import numpy as np

from gemopt.exceptions import InputError
from gemopt.topology import Level, Topology

NCCL = "all-to-all of NCCL 2.27.3 on 8 GPUs, table of aiconfigurator-core 0.12.0 (message sizes there are elements)"
DEEPEP = "latency: DeepEP low-latency dispatch of 2 tokens on 2 nodes of 8 H100, same wheel"
NIC = "46 to 48 GB/s of a 400 Gb/s NIC, NVIDIA in github.com/NVIDIA/nccl-tests/issues/290"
SCALED = f"scaled by the line rate from: {NIC}"

INSIDE = {
    "nvlink": (Level(bandwidth_gbs=310.0, latency_us=8.0), f"H100 NVLink 4: {NCCL}"),
    "nvlink3": (Level(bandwidth_gbs=203.0, latency_us=13.0), f"A100 NVLink 3: {NCCL}"),
    "pcie4": (Level(bandwidth_gbs=24.0, latency_us=15.0), "assumed: 75 % of the 32 GB/s of PCIe 4.0 x16"),
    "pcie5": (Level(bandwidth_gbs=48.0, latency_us=15.0), "assumed: 75 % of the 64 GB/s of PCIe 5.0 x16"),
}
NETWORK = {
    "ib400": (Level(bandwidth_gbs=47.0, latency_us=22.0), f"{NIC}; {DEEPEP}"),
    "ib200": (Level(bandwidth_gbs=23.5, latency_us=22.0), f"{SCALED}; {DEEPEP}"),
    "ib100": (Level(bandwidth_gbs=11.75, latency_us=22.0), f"{SCALED}; {DEEPEP}"),
    "shared-ib400": (
        Level(bandwidth_gbs=47.0, latency_us=22.0, port_of="node"),
        f"one NIC for a node; {NIC}; {DEEPEP}",
    ),
    "shared-eth100": (Level(bandwidth_gbs=10.6, latency_us=50.0, port_of="node"), "assumed: 85 % of 100 Gb/s, TCP"),
}
EXAMPLES = "nvlink-8, pcie4-4, 2x8-ib400, 4x8-ib200-nvlink3, 2x4-shared-eth100-pcie4"


def named(name: str) -> Topology:
    """The topology of that name.

    Raises
    ------
    InputError
        No such name; says how names are made.
    """
    one = re.fullmatch(rf"({'|'.join(INSIDE)})-(\d+)", name.lower())
    many = re.fullmatch(rf"(\d+)x(\d+)-({'|'.join(NETWORK)})(?:-({'|'.join(INSIDE)}))?", name.lower())
    if one:
        nodes, size, inside, network = 1, int(one[2]), one[1], None
    elif many:
        nodes, size, inside, network = int(many[1]), int(many[2]), many[4] or "nvlink", many[3]
    elif "/" in name or "." in name:
        raise InputError("topology", name, "no such file", "nor is it a name such as 2x8-ib400")
    else:
        known = f"INSIDE of {', '.join(INSIDE)} and NETWORK of {', '.join(NETWORK)}"
        limit = f"a file ending in .json, or INSIDE-RANKS or NODESxRANKS-NETWORK[-INSIDE] with {known}"
        raise InputError("topology", name, limit, f"for example {EXAMPLES}")
    if nodes < 1 or size < 1 or nodes * size > 1 << 16:
        raise InputError("topology", name, "1 to 65536 ranks")
    within, source = INSIDE[inside]
    between = None
    if network is not None:
        between, said = NETWORK[network]
        source = f"inside: {source}; between: {said}"
    return Topology(
        name=name.lower(),
        node_of_rank=np.repeat(np.arange(nodes), size),
        within_node=within if size > 1 else None,
        between_nodes=between if nodes > 1 else None,
        source=source,
    )

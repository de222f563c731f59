"""What a rank sends and receives over the links of a topology, as one number."""

from __future__ import annotations

import os

import numpy as np

from gemopt.topology import Topology, load


def slowest_gbps(topology: Topology | str | os.PathLike[str], num_ranks: int, expert_bytes: float) -> float:
    """GB/s at which every rank can send and receive an expert when all do so at once: that of the slowest port.

    A port that ranks share serves one expert of each of them. `InputError` for a topology of other ranks.
    """
    found = load(topology)
    found.check_ranks(num_ranks)
    ports = found.ports
    slowest_us = 0.0
    for port, curve in enumerate(ports.curve_of):
        uses = (ports.of_pair == port).any(axis=2)
        sharers = int(np.count_nonzero(uses.any(axis=0 if ports.into[port] else 1)))
        if sharers:
            slowest_us = max(slowest_us, float(ports.curves[curve](sharers * expert_bytes)))
    return expert_bytes / slowest_us / 1e3 if slowest_us else 1e6

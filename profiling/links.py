"""Links between ranks, measured by what a MoE layer does: all-to-all within every node, and between nodes.

All ranks exchange at once, so ports are shared as they are in a step. Under torchrun, with NCCL where ranks have
accelerators and gloo elsewhere. Rank 0 gets the topology.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemopt.exceptions import InputError, missing
from gemopt.profiling.device import Device
from gemopt.topology import Level, Topology
from gemopt.words import counted

try:
    import torch
    import torch.distributed as dist
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

WARM_UP = 3


def measure_links(sizes: Sequence[int], *, repeats: int = 10, device: str = "auto") -> Topology | None:
    """Measure under torchrun; the topology on rank 0, None on the others.

    Parameters
    ----------
    sizes
        Bytes through a rank's port in each direction, increasing.
    repeats
        Exchanges per size; the median counts, and of each the slowest rank.

    Raises
    ------
    InputError
        Fewer than two ranks, or sizes that are not increasing.
    """
    if len(sizes) < 2 or sizes[0] < 1 or any(a >= b for a, b in zip(sizes, sizes[1:], strict=False)):
        raise InputError("sizes", list(sizes), "two or more numbers of bytes, increasing")
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise InputError("WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"), "at least 2 ranks", "start with torchrun")
    place = Device(device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if place.type == "cuda" else "gloo"
    if place.is_accelerator and backend == "gloo":
        backend = dist.get_default_backend_for_device(place.torch_device)
    dist.init_process_group(backend)
    try:
        return _measured(place, sizes, repeats, backend)
    finally:
        dist.destroy_process_group()


def _measured(place: Device, sizes: Sequence[int], repeats: int, backend: str) -> Topology | None:
    rank, size = dist.get_rank(), dist.get_world_size()
    hosts: list[Any] = [None] * size
    dist.all_gather_object(hosts, socket.gethostname())
    names = list(dict.fromkeys(hosts))
    node_of_rank = np.array([names.index(host) for host in hosts])
    own = node_of_rank == node_of_rank[rank]
    levels: dict[str, Level | None] = {"within_node": None, "between_nodes": None}
    for name, chosen in (("within_node", own), ("between_nodes", ~own)):
        peers = np.flatnonzero(chosen & (np.arange(size) != rank))
        anybody = torch.tensor([len(peers)], device=place.torch_device)
        dist.all_reduce(anybody, op=dist.ReduceOp.MAX)
        if not int(anybody):
            continue
        points = [(float(amount), _exchange(place, amount, peers, size, repeats)) for amount in sizes]
        times = np.maximum.accumulate([us for _, us in points])  # noise must not make more bytes take less
        levels[name] = Level(points=[(amount, float(us)) for (amount, _), us in zip(points, times, strict=True)])
    if rank:
        return None
    group = f"{counted(size, 'rank')} on {counted(len(names), 'node')}"
    source = f"all-to-all of {group} over {backend}, {place.name}, gemopt profile links"
    return Topology(
        name="measured",
        node_of_rank=node_of_rank,
        within_node=levels["within_node"],
        between_nodes=levels["between_nodes"],
        source=source,
    )


def _exchange(place: Device, amount: int, peers: Any, size: int, repeats: int) -> float:
    """Median microseconds in which every rank sends so many bytes to its peers together and gets as many."""
    per_peer = [0] * size
    for number, peer in enumerate(peers.tolist()):
        per_peer[peer] = amount // len(peers) + (number < amount % len(peers))
    sent = torch.zeros(sum(per_peer), dtype=torch.uint8, device=place.torch_device)
    # A peer may have other numbers of peers (nodes of unequal size), so what comes is asked for.
    wanted = torch.tensor(per_peer, device=place.torch_device)
    coming = torch.empty_like(wanted)
    dist.all_to_all_single(coming, wanted)
    back = [int(number) for number in coming.tolist()]
    got = torch.empty(sum(back), dtype=torch.uint8, device=place.torch_device)
    times = []
    for repeat in range(repeats + WARM_UP):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_to_all_single(got, sent, back, per_peer)
        if place.is_accelerator:
            torch.accelerator.synchronize()
        slowest = torch.tensor([time.perf_counter() - begin], dtype=torch.float64, device=place.torch_device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        if repeat >= WARM_UP:
            times.append(float(slowest) * 1e6)
    return float(np.median(times))

"""Profiles of devices whose latency is a formula."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from gemopt.profile import Device, Profile, Sample


def timed(
    ranks: Iterable[float], latency_us: Callable[[int, float], float], loads: Iterable[int] = (0, 500), **fields: Any
) -> Profile:
    """One device for each number in `ranks`, with the latency of each load and this number; fields: of the profile."""
    devices = [
        Device(rank=rank, samples=[Sample(assignments=n, latency_us=latency_us(n, by)) for n in loads])
        for rank, by in enumerate(ranks)
    ]
    return Profile(devices=devices, **fields)

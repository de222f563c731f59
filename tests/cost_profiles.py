"""Profiles of which it is known what they were drawn from."""

from __future__ import annotations

from typing import Any

import numpy as np

from gemopt.profile import Device, Profile, Sample


def profile(*tables: list[tuple[float, ...]], **fields: Any) -> Profile:
    """Rows (assignments, latency) or (assignments, active, latency) per device."""
    devices = []
    for rank, rows in enumerate(tables):
        points = [
            Sample(assignments=int(r[0]), active_experts=int(r[1]) if len(r) == 3 else None, latency_us=r[-1])
            for r in rows
        ]
        devices.append(Device(rank=rank, samples=points, **fields))
    return Profile(devices=devices)


PLANTED = {
    "memory and compute": [[20.0, 0.0, 6.0], [10.0, 0.08, 0.0]],
    "launch, memory, compute": [[60.0, 0.0, 0.0], [15.0, 0.01, 5.0], [5.0, 0.1, 1.0]],
    "tokens only": [[30.0, 0.0, 0.0], [2.0, 0.05, 0.0]],
    "active only": [[12.0, 0.0, 3.0]],
}


def surface(planes: list[list[float]], seed: int, *, noise: float = 0.005, size: int = 240) -> list[tuple[float, ...]]:
    rng = np.random.default_rng(seed)
    n = np.unique(np.geomspace(1, 4000, size).round().astype(int))
    size = len(n)
    active = np.minimum(n, rng.integers(1, 33, size))
    true = (np.array(planes) @ np.stack([np.ones(size), n, active])).max(axis=0)
    return list(zip(n, active, true * (1 + noise * rng.standard_normal(size)), strict=True))

"""Points of a table merged into the samples of a device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from gemopt.profile import Sample


def samples_of(points: Sequence[tuple[float, int | None, float]]) -> list[Sample]:
    """One sample per load. Of loads that round to the same assignments only the nearest is kept."""
    merged: dict[tuple[int, int | None], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for load, active, latency in points:
        merged[_whole_load(load, active), active][load].append(latency)
    found = []
    for (load, active), by_load in sorted(merged.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        latencies = by_load[min(by_load, key=lambda each: abs(each - load))]
        median = float(np.median(latencies))
        spread = float(np.median(np.abs(np.array(latencies) - median))) if len(latencies) > 1 else None
        found.append(
            Sample(assignments=load, active_experts=active, latency_us=median, spread_us=spread, repeats=len(latencies))
        )
    return found


def _whole_load(load: float, active: int | None) -> int:
    """Nearest whole number, but a rank with any work or active expert has at least that many assignments."""
    return max(round(load), active or 0, int(load > 0))

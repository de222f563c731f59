"""Spare slots: a few hot experts, copied where that lowers the time of the slowest rank."""

from __future__ import annotations

import numpy as np

import gemopt

HOT = (3, 11)


def main() -> dict[int, float]:
    """Microseconds per step by slots per rank; prints which experts got copies."""
    rng = np.random.default_rng(1)
    popularity = np.ones(16)
    popularity[list(HOT)] = 12.0
    counts = rng.multinomial(800, popularity / popularity.sum(), size=(64, 1))
    traces = gemopt.Traces(counts=counts)
    loads = [{"assignments": n, "latency_us": 20 + n / 8} for n in (0, 400, 800)]
    profile = gemopt.Profile(devices=[{"rank": rank, "samples": loads} for rank in range(4)])
    times: dict[int, float] = {}
    for slots in (4, 5):
        found = gemopt.solve(profile, traces, slots_per_rank=slots, solver="local-search", time_limit=3, patience=5)
        assert found.placement is not None and found.objective_us is not None
        times[slots] = found.objective_us / traces.num_steps
        copies = {int(e): int(n) for e, n in enumerate(found.placement.copies()[0]) if n > 1}
        print(f"{slots} slots per rank: {times[slots]:.1f} us per step, copies {copies or 'none'}")
    return times


if __name__ == "__main__":
    main()

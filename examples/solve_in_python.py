"""From arrays to a placement: a profile of four ranks and routing made here, solved, scored, looked at by layer."""

from __future__ import annotations

import numpy as np

import gemopt

LOADS = (0, 64, 128, 256, 512, 1024)
SPEEDS = (1.0, 1.0, 1.15, 1.0)  # the third rank takes 15 % longer


def profile() -> gemopt.Profile:
    """Four devices whose latency is a staircase in tiles of 64 rows."""
    return gemopt.Profile(
        devices=[
            {
                "rank": rank,
                "name": f"GPU {rank}",
                "samples": [{"assignments": n, "latency_us": slow * (25 + 9 * (n // 64))} for n in LOADS],
            }
            for rank, slow in enumerate(SPEEDS)
        ]
    )


def traces() -> gemopt.Traces:
    """96 steps of 3 layers of 16 experts, some of them hot; assignments, not tokens."""
    rng = np.random.default_rng(0)
    popularity = rng.dirichlet(np.full(16, 0.6), size=3)
    counts = np.stack([rng.multinomial(512, layer, size=96) for layer in popularity], axis=1)
    return gemopt.Traces(counts=counts, top_k=4, layer_ids=(1, 2, 3), num_hidden_layers=4, model="example")


def main() -> gemopt.Result:
    """Solve, print, return."""
    result = gemopt.solve(profile(), traces(), solver="local-search", time_limit=3, patience=5)
    print(result.summary())
    assert result.placement is not None
    score = gemopt.evaluate(result.placement, profile(), traces())
    print(
        f"p50 {score.quantile_us(0.5):.0f} us, p99 {score.quantile_us(0.99):.0f} us; ranks wait {score.idle_share:.0%}"
    )
    for layer, row in zip(result.placement.layer_ids, result.placement.physical_to_logical, strict=True):
        ranks = np.split(row, np.cumsum(result.placement.slots_per_rank)[:-1])
        print(f"layer {layer}: " + " | ".join(" ".join(map(str, sorted(rank))) for rank in ranks))
    return result


if __name__ == "__main__":
    main()

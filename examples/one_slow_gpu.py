"""One GPU throttles by 30 %: what that costs with experts in order, with EPLB, and with gemopt."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import gemopt
from gemopt.formats.tables.kernel import Unit, read_table, slow_down
from gemopt.formats.tables.kernel import equal as equal_ranks

DATA = Path(str(resources.files("gemopt"))) / "data"
SLOW, FACTOR = 3, 1.3


def main() -> dict[str, float]:
    """Microseconds per step of each placement on the devices as they are; the slow rank's share of the load."""
    h100 = read_table(DATA / "h100_vllm_gptoss20b_ep8.csv", unit=Unit.GROUP_TOKENS, top_k=4, ep=8)
    equal = equal_ranks(h100, 8)
    throttled = slow_down(equal, SLOW, FACTOR)
    whole = gemopt.Traces.load(DATA / "gptoss20b_trace_mixed_b64.npz")
    traces = gemopt.Traces(counts=whole.counts[:200, ::6])  # 200 steps, 4 of the 24 layers
    times: dict[str, float] = {}
    for solver in ("linear", "eplb", "local-search"):
        found = gemopt.solve(throttled, traces, solver=solver, time_limit=4, patience=3)
        assert found.placement is not None
        before = gemopt.evaluate(found.placement, equal, traces).step_us.mean()
        times[solver] = float(gemopt.evaluate(found.placement, throttled, traces).step_us.mean())
        print(f"{solver:<13} {times[solver]:7.1f} us per step; were all GPUs equal {before:7.1f}")
    load_E = traces.counts[:, 0].sum(axis=0)
    slots = found.placement.physical_to_logical[0].reshape(8, -1)
    share = load_E[slots].sum(axis=1) / load_E.sum()
    times["share of the slow rank"] = float(share[SLOW])
    print(f"gemopt gives the slow rank {share[SLOW]:.1%} of the first layer's load, an equal share is {1 / 8:.1%}")
    return times


if __name__ == "__main__":
    main()

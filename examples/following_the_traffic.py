"""Traffic that shifts: the controller decides step by step, then the replay judges it beside the others."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np

import gemopt
from gemopt.formats.tables.kernel import Unit, equal, read_table
from gemopt.online import Controller
from gemopt.online.policy import Policy
from gemopt.replay import replay

DATA = Path(str(resources.files("gemopt"))) / "data"
PAST, WINDOW = 256, 32
STRATEGIES = ("contiguous", "fitted-once", "controller")


def main() -> dict[str, float]:
    """Change of the makespan against contiguous placement, by strategy."""
    h100 = read_table(DATA / "h100_vllm_gptoss20b_ep8.csv", unit=Unit.GROUP_TOKENS, top_k=4, ep=8)
    profile = equal(h100, 8)
    whole = gemopt.Traces.load(DATA / "gptoss20b_trace_shift_b32.npz")
    around = np.r_[0:PAST, 1000 : 1000 + 2 * PAST]  # the domain changes at about step 1120
    traces = gemopt.Traces(counts=whole.counts[around][:, [0, 12]])

    past = traces.steps(slice(0, PAST))
    fitted = gemopt.solve(profile, past, solver="local-search", time_limit=3, patience=3).placement
    assert fitted is not None
    controller = Controller(profile, fitted, Policy(expert_bytes=9.4e6, bytes_per_s=20e9))
    controller.remember(past.counts)
    for start in range(PAST, traces.num_steps, WINDOW):
        decision = controller.step(traces.counts[start : start + WINDOW])
        if decision.num_moves:
            print(f"step {start + WINDOW}: {decision.reason}")

    result = replay(profile, traces, STRATEGIES, window=WINDOW, fit=PAST / traces.num_steps)
    changes = {row.strategy: row.change for row in result.rows}
    for row in result.rows:
        print(f"{row.strategy:<12} {100 * row.change:+5.1f} %, {row.moves} moves")
    return changes


if __name__ == "__main__":
    main()

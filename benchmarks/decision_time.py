"""How long one decision of the online controller takes; prints a table in Markdown.

python benchmarks/decision_time.py    58 layers x 256 experts, 16 ranks: required are 300 ms, 1.5 s with the plan
"""

from __future__ import annotations

import time

from instances import affine_profile, routing, speeds, staircase_profile
from machine import stamp

from gemopt.executor.plan import layer_rows, plan
from gemopt.online.controller import Controller, Decision
from gemopt.profile import Profile
from gemopt.solve import solve

LAYERS, EXPERTS, RANKS, WINDOW, WINDOWS = 58, 256, 16, 64, 6
FITTED = 256  # steps before the first decision


def decide(controller: Controller, counts: object) -> tuple[Decision, float, float]:
    """(decision, CPU seconds it took, CPU seconds with the plan of its moves); it runs on one core."""
    before, begin = controller.placement, time.process_time()
    decision = controller.step(counts)
    middle = time.process_time()
    plan(layer_rows(before), layer_rows(decision.placement), [9_400_000] * LAYERS)
    return decision, middle - begin, time.process_time() - begin


def rows(name: str, profile: Profile) -> None:
    """Windows of drifting traffic from a fitted placement, then one whose experts are others."""
    traces = routing(layers=LAYERS, experts=EXPERTS, steps=FITTED + WINDOWS * WINDOW)
    fitted = solve(profile, traces.steps(slice(0, FITTED)), solver="lpt", time_limit=600)
    assert fitted.placement is not None
    controller = Controller(profile, fitted.placement)
    controller.remember(traces.counts[:FITTED])
    for index in range(WINDOWS):
        window = traces.counts[FITTED + index * WINDOW :][:WINDOW]
        title = "drift"
        if index == WINDOWS - 1:
            window, title = window[:, :, ::-1], "all experts change places"
        decision, alone, planned = decide(controller, window)
        if index:  # the first compiles
            print(f"| {name} | {title} | {decision.num_moves} | {1e3 * alone:.0f} | {1e3 * planned:.0f} |")


if __name__ == "__main__":
    print(f"## One decision, {LAYERS} layers x {EXPERTS} experts, {RANKS} ranks, {WINDOW} new steps\n")
    print(f"{stamp('numpy', 'numba')}\n")
    print("| cost | traffic | moves | decision CPU ms | with plan CPU ms |\n|---|---|---|---|---|")
    rows("affine", affine_profile(speeds(RANKS)))
    rows("staircase", staircase_profile(speeds(RANKS)))

"""How long one decision of the online controller takes; prints a table in Markdown.

python benchmarks/decision_time.py    58 layers x 256 experts, 16 ranks: required are 300 ms, 1.5 s with the plan
"""

from __future__ import annotations

import time

from instances import affine_profile, routing, speeds, staircase_profile
from machine import stamp

from gemopt.executor.plan import layer_rows, plan
from gemopt.online import Controller, Decision, Policy
from gemopt.profile import Profile
from gemopt.solve import solve

LAYERS, EXPERTS, RANKS, WINDOW, WINDOWS = 58, 256, 16, 64, 6
FITTED = 256  # steps before the first decision
TITLES = (*["drift"] * (WINDOWS - 1), "all experts change places", *["what was before comes back"] * 4)


def decide(controller: Controller, counts: object) -> tuple[Decision, float, float, float]:
    """(decision, its CPU and wall seconds, wall seconds with the plan of its moves)."""
    before, begin, cpu = controller.placement, time.perf_counter(), time.process_time()
    decision = controller.step(counts)
    middle, cpu = time.perf_counter(), time.process_time() - cpu
    plan(layer_rows(before), layer_rows(decision.placement), [9_400_000] * LAYERS)
    return decision, cpu, middle - begin, time.perf_counter() - begin


def rows(name: str, profile: Profile, threads: int) -> None:
    """Windows of drifting traffic from a fitted placement, then one whose experts are others, then both in turn."""
    traces = routing(layers=LAYERS, experts=EXPERTS, steps=FITTED + WINDOWS * WINDOW)
    fitted = solve(profile, traces.steps(slice(0, FITTED)), solver="lpt", time_limit=600)
    assert fitted.placement is not None
    controller = Controller(profile, fitted.placement, Policy(threads=threads))
    controller.remember(traces.counts[:FITTED])
    for index, title in enumerate(TITLES):
        window = traces.counts[FITTED + index % WINDOWS * WINDOW :][:WINDOW]
        if index >= WINDOWS - 1 and (index - WINDOWS) % 2:
            window = window[:, :, ::-1]
        decision, cpu, wall, planned = decide(controller, window)
        if index:  # the first compiles
            facts = " | ".join(f"{1e3 * seconds:.0f}" for seconds in (cpu, wall, planned))
            print(f"| {name} | {threads} | {title} | {decision.num_moves} | {facts} |", flush=True)


if __name__ == "__main__":
    print(f"## One decision, {LAYERS} layers x {EXPERTS} experts, {RANKS} ranks, {WINDOW} new steps\n")
    print(f"{stamp('numpy', 'numba')}\n")
    print("| cost | threads | traffic | moves | decision, CPU ms | decision, ms | with plan, ms |")
    print("|---|---|---|---|---|---|---|")
    for threads in (1, 2):
        rows("affine", affine_profile(speeds(RANKS)), threads)
        rows("staircase", staircase_profile(speeds(RANKS)), threads)

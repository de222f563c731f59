"""How long one decision of the online controller takes; prints tables in Markdown.

python benchmarks/decision_time.py          58 layers x 256 experts, 16 ranks: required are 300 ms, 1.5 s with the plan
python benchmarks/decision_time.py --cpu    CPU time of many decisions of five sizes, for a machine that is not quiet
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from instances import affine_profile, routing, speeds, staircase_profile
from machine import stamp

from gemopt.costs import fit
from gemopt.evaluate import rank_times
from gemopt.executor.plan import layer_rows, plan
from gemopt.online import Controller, Decision, Policy
from gemopt.placement import Placement
from gemopt.problem import problems
from gemopt.profile import Device, Profile, Sample
from gemopt.solve import solve

LAYERS, EXPERTS, RANKS, WINDOW, WINDOWS = 58, 256, 16, 64, 6
FITTED = 256  # steps before the first decision
TITLES = (*["drift"] * (WINDOWS - 1), "all experts change places", *["what was before comes back"] * 4)
SIZES = (  # title, layers, experts, ranks, slots of a rank, tokens, profile, steps of a decision, decisions
    ("24 x 32, G = 4, affine", 24, 32, 4, 8, 1024, affine_profile, 8, 16),
    ("24 x 64, G = 16, affine", 24, 64, 16, 4, 2048, affine_profile, 8, 16),
    ("24 x 64, G = 16, staircase", 24, 64, 16, 4, 2048, staircase_profile, 8, 16),
    ("58 x 256, G = 16, affine", LAYERS, EXPERTS, RANKS, 16, 4096, affine_profile, WINDOW, 16),
)
LIVE = (4, 64, 4, 20, 8, 96)  # layers, experts, ranks, slots of a rank, steps of a decision, decisions


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


def sums(title: str, layers: int, experts: int, ranks: int, slots: int, tokens: int,
         make: Callable[..., Profile], steps: int, decisions: int) -> None:  # fmt: skip
    """CPU time of all decisions together: half on drift, then the same windows with the experts in reverse order."""
    half = decisions // 2
    traces = routing(layers=layers, experts=experts, steps=FITTED + half * steps, tokens=tokens)
    profile = make(speeds(ranks))
    fitted = solve(profile, traces.steps(slice(0, FITTED)), slots_per_rank=slots, solver="lpt", time_limit=600)
    assert fitted.placement is not None
    windows = [traces.counts[FITTED + n * steps :][:steps] for n in range(half)]
    windows += [window[:, :, ::-1] for window in windows]
    spent(title, profile, fitted.placement, traces.counts[:FITTED], windows)


def live() -> None:
    """The size of `follow_live.py`: curves as they are measured, copies, and latencies of a rank that gets slower."""
    layers, experts, ranks, slots, steps, decisions = LIVE
    rng = np.random.default_rng(0)
    loads = np.unique(np.geomspace(1, 4096, 40).astype(int))
    times_GN = np.outer((1.0, 1.05, 1.18, 1.43), 300 + 9 * loads + 40 * np.sqrt(loads))
    times_GN = np.sort(times_GN * rng.uniform(0.98, 1.02, times_GN.shape))
    samples = [
        [Sample(assignments=int(n), latency_us=float(us)) for n, us in zip(loads, row, strict=True)] for row in times_GN
    ]
    profile = Profile(devices=[Device(rank=rank, samples=each) for rank, each in enumerate(samples)])
    traces = routing(layers=layers, experts=experts, steps=FITTED + decisions * steps, tokens=512, top_k=4)
    fitted = solve(profile, traces.steps(slice(0, FITTED)), slots_per_rank=slots, solver="lpt", time_limit=600)
    assert fitted.placement is not None
    model, noise = fit(profile)[0], rng.uniform(0.97, 1.03, (decisions * steps, ranks))
    noise[decisions * steps // 2 :, 1] *= 1.5

    def measured(placement: Placement, number: int) -> Any:
        part = traces.steps(slice(FITTED + number * steps, FITTED + (number + 1) * steps))
        rows = zip(problems(model, part, slots), placement.physical_to_logical, strict=True)
        return sum(rank_times(*each) for each in rows) * noise[number * steps : (number + 1) * steps]

    windows = [traces.counts[FITTED + n * steps :][:steps] for n in range(decisions)]
    title = f"{layers} x {experts}, G = {ranks}, {ranks * slots} slots, measured-like curves, latencies"
    spent(title, profile, fitted.placement, traces.counts[:FITTED], windows, measured)


def spent(title: str, profile: Profile, placement: Placement, past: Any, windows: list[Any],
          measured: Callable[[Placement, int], Any] = lambda *_: None) -> None:  # fmt: skip
    """Print one row: two runs of all decisions, each by a controller of its own; a third before them compiles."""
    runs = []
    for _ in range(3):
        controller, moves, cpu_s = Controller(profile, placement, Policy()), 0, 0.0
        controller.remember(past)
        for number, counts in enumerate(windows):
            latencies = measured(controller.placement, number)
            begin = time.process_time()
            moves += controller.step(counts, latencies).num_moves
            cpu_s += time.process_time() - begin
        runs.append(1e3 * cpu_s)
    one, both = min(runs[1:]) / len(windows), ", ".join(f"{run:.0f}" for run in runs[1:])
    print(f"| {title} | {len(windows[0])} | {len(windows)} | {moves} | {both} | {one:.1f} |", flush=True)


def main() -> None:
    """Print the table asked for."""
    if "--cpu" in sys.argv[1:]:
        print(f"## CPU time of many decisions\n\n{stamp('numpy', 'numba')}\n")
        print("| instance | new steps | decisions | moves | all of them, CPU ms, twice | one, CPU ms |")
        print("|---|---|---|---|---|---|")
        for size in SIZES:
            sums(*size)
        live()
        return
    print(f"## One decision, {LAYERS} layers x {EXPERTS} experts, {RANKS} ranks, {WINDOW} new steps\n")
    print(f"{stamp('numpy', 'numba')}\n")
    print("| cost | threads | traffic | moves | decision, CPU ms | decision, ms | with plan, ms |")
    print("|---|---|---|---|---|---|---|")
    for threads in (1, 2):
        rows("affine", affine_profile(speeds(RANKS)), threads)
        rows("staircase", staircase_profile(speeds(RANKS)), threads)


if __name__ == "__main__":
    main()

"""Is the advice right? Systems x traces set up beforehand: advice from the first half, replay of the second; a table.

python benchmarks/advise.py [--data FOLDER [--regimes]] [--layers 2] [--steps 1024] [--only SYSTEM]

Each system is a number of ranks drawn from a fleet of measured GPUs (affine costs as in follow.py), memory for copies
and a bandwidth. `gemopt.advise` gets the first half of a trace. Then `gemopt.replay` plays the second half under every
strategy, fitted on the first: the recommended one must be within 1 % of the best, and its predicted change within three
points of what replay finds. `drift`: share of the traffic that goes elsewhere in the half of its traces that the advice
scores; above 5 % it plays them the other way, too. Without --data, on the two traces that the repository ships.
--regimes: other traffic, in which the kind of text changes three times: twice in the half that the advice gets.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from follow_cases import SHIPPED, counts, devices, fleets
from machine import stamp

from gemopt.advise import advise
from gemopt.advise.advisor import DISTRIBUTIONS
from gemopt.replay import Migration, replay
from gemopt.replay.workloads import from_steps, joined, parse_plan
from gemopt.traces import Traces

EXPERT_BYTES = 9.4e6
NON_MOE_US = 100.0  # a layer
FOREIGN = (
    "gptoss20b_trace_math_b32",
    "gptoss20b_trace_physchem_b32",
    "gptoss20b_trace_biomed_b32",
    "tinymoe_prose_b128",
    "tinymoe_code_b128",
    "tinymoe_maths_b128",
    "tinymoe_gen_code_b64",
    "tinymoe_shift_open_b128",
)
SEQUENCES = (  # traces, steps of a regime, kinds, orders
    ("tinymoe_{}_b128", 256, ("prose", "code", "maths"), "ABCA BCAB CABC ACAC BABA CBBA"),
    ("gptoss20b_trace_{}_b32", 130, ("math", "physchem", "biomed"), "ABCA BCAB CABC"),
)


@dataclass(frozen=True)
class System:
    """Ranks of a fleet, slots for copies on each, and GB/s that a rank sends and receives."""

    name: str
    ranks: int
    fleet: str
    spare: int
    gbps: float


SYSTEMS = (
    System("A: 4 V100, no memory", 4, "longhorn_sgemm", 0, 20.0),
    System("B: 8 RTX 5000, one slot", 8, "frontera_resnet", 1, 20.0),
    System("C: 8 V100, one slot, slow links", 8, "longhorn_bert", 1, 2.0),
)


def regimes(data: Path, layers: int) -> dict[str, Callable[[], Traces]]:
    """Sequences of kinds of text by name."""
    found = {}
    for name, steps, kinds, orders in SEQUENCES:
        parts = {kind: counts(data / f"{name.format(kind)}.npz", layers) for kind in kinds}
        for order in orders.split():
            plan = parse_plan(" ".join(f"{kind}:{steps}" for kind in order), list(kinds))
            found[f"{name.replace('_{}', '')} {order}"] = lambda parts=parts, plan=plan: from_steps(joined(parts), plan)
    return found  # type: ignore[return-value]


def traffic(data: Path | None, layers: int) -> dict[str, Callable[[], Traces]]:
    """Traces by name, loaded when their turn comes."""
    found = {name: SHIPPED / f"{name}.npz" for name in ("gptoss20b_trace_mixed_b64", "gptoss20b_trace_shift_b32")}
    if data is not None:
        found |= {name: data / f"{name}.npz" for name in FOREIGN}
    return {name: (lambda path=path: counts(path, layers)) for name, path in found.items()}  # type: ignore[misc]


def main() -> None:
    """Print one row per cell, then what holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with more traces")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1024)
    parser.add_argument("--regimes", action="store_true", help="sequences of regimes; needs --data")
    parser.add_argument("--only", help="first letter of a system")
    options = parser.parse_args()
    print(f"{stamp('numpy', 'numba')}; first {options.layers} layers, at most {options.steps} steps\n")
    print("| system | trace | recommended | predicted % | 5 to 95 % | sure | replay % | best in replay | of best "
          "| within 1 % | within 3 points | drift |\n" + "|---" * 12 + "|")  # fmt: skip
    right, close, both, inside, alone, cells = 0, 0, 0, 0, 0, 0
    given = regimes(options.data, options.layers) if options.regimes else traffic(options.data, options.layers)
    for system in SYSTEMS:
        if options.only not in (None, system.name[0]):
            continue
        profile = devices(fleets([system.fleet])[0], system.ranks)
        for name, load in given.items():
            traces = load()
            traces = traces.steps(slice(0, min(options.steps, traces.num_steps) // 2 * 2))
            half = traces.num_steps // 2
            migration = Migration(expert_bytes=EXPERT_BYTES, bytes_per_s=system.gbps * 1e9)
            shared = {"migration": migration, "non_moe_us": NON_MOE_US * options.layers,
                      "window": min(64, half // 4)}  # fmt: skip
            memory = 1.01 * system.spare * EXPERT_BYTES * options.layers
            tagged = traces.task is not None and len(np.unique(traces.task[:half])) > 1
            by = [*DISTRIBUTIONS, *["task"] * tagged] if system.spare else None
            advice = advise(profile, traces.steps(slice(0, half)), memory_bytes=memory, predictors=by, sweep=False,
                            **shared)  # fmt: skip
            found = {}
            for slots in {tuple(each.slots_per_rank) for each in advice.strategies}:
                names = [each.strategy for each in advice.strategies if tuple(each.slots_per_rank) == slots]
                result = replay(profile, traces, names, fit=0.5, slots_per_rank=slots, **shared)
                found |= {row.strategy: row for row in result.rows}
            best = min(found.values(), key=lambda row: row.makespan_us)
            ours = found[advice.recommended]
            behind = ours.makespan_us / best.makespan_us - 1
            missed = 100 * abs(advice.predicted_change - (ours.change or 0.0))
            cells, right, close = cells + 1, right + (behind <= 0.01), close + (missed <= 3)
            alone += abs(advice.option(advice.recommended).changes[0] - (ours.change or 0.0)) <= 0.03
            inside += advice.low <= (ours.change or 0.0) <= advice.high
            both += behind <= 0.01 and missed <= 3
            print(f"| {system.name} | {name} | {advice.recommended} | {100 * advice.predicted_change:+.1f} | "
                  f"{100 * advice.low:+.1f} to {100 * advice.high:+.1f} | {100 * advice.confidence:.0f} % | "
                  f"{100 * (ours.change or 0.0):+.1f} | {best.strategy} {100 * (best.change or 0.0):+.1f} | "
                  f"{100 * behind:+.2f} % | {'yes' if behind <= 0.01 else 'no'} | {'yes' if missed <= 3 else 'no'} "
                  f"| {100 * advice.drift:.1f} % |",
                  flush=True)  # fmt: skip
    print(f"\nWithin 1 % of the best in {right} of {cells}; predicted within 3 points in {close} "
          f"(in {alone} from the last steps alone); both in {both}; between 5 and 95 % in {inside}.")  # fmt: skip


if __name__ == "__main__":
    main()

"""Who follows the traffic: the controller beside those who stand still, re-solve freely, or run EPLB; prints tables.

python benchmarks/follow.py [--data FOLDER] [--ranks 4,8,16] [--fleets 3] [--layers N] [--only shift,steady,...]

Costs are affine, (60 + 18.75 N / 16) us for N assignments, times the measured relative time of GPUs drawn from a fleet;
experts of 9.4 MB at 20 GB/s, copied beside serving. Without --data, on the traces that the repository ships; with it,
also on `gptoss20b_trace_*.npz`, `tinymoe_*.npz` (counts) and `gptoss20b_tokens.npz` (token by token).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from follow_cases import FLEETS, devices, fleets, traffic
from machine import stamp

from gemopt.costs import fit
from gemopt.formats.tables.kernel import slow_down
from gemopt.online import Policy
from gemopt.placement import Placement
from gemopt.profile import Profile
from gemopt.replay import Context, Migration, ReplayResult, ReplayRow, Schedule, replay
from gemopt.replay.judge import regimes
from gemopt.replay.strategies import Controlled, FittedOnce, Free
from gemopt.replay.strategy import Strategy, solve_rows
from gemopt.traces import Traces

WINDOW = 64
MEMORIES = (64, 256, 2**30)
SETTLE = 16
AT_NO_COST = Migration(slowdown=0, commit_us=0, bytes_per_s=1e15, expert_bytes=1e-6)
Cells = Iterator[tuple[str, Traces, str, Profile]]
CONDITIONS = (
    "Affine costs, (60 + 18.75 N / 16) us for N assignments, times the measured relative time of GPUs drawn from the "
    "fleet; experts of 9.4 MB, 20 GB/s, copied beside serving (steps 5 % slower meanwhile, 100 us per commit, layers "
    "together up to 64 MiB into a rank; one layer after the other for vLLM)."
)


@dataclass
class Rows:
    """A Markdown table, printed row by row, and whether each required figure is reached."""

    head: list[str]
    begun: bool = False
    missed: list[str] = field(default_factory=list)
    checked: int = 0
    idle: dict[str, float] = field(default_factory=dict)

    def add(self, *cells: object) -> None:
        """Print one row."""
        if not self.begun:
            for row in (self.head, ["---"] * len(self.head)):
                print("| " + " | ".join(row) + " |")
        self.begun = True
        print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)

    def require(self, holds: bool, otherwise: str) -> str:
        """A mark, and a note of what was missed."""
        self.checked += 1
        if not holds:
            self.missed.append(otherwise)
        return "yes" if holds else "no"

    def beside_idle(self, result: ReplayResult, where: str) -> None:
        """Note how much worse than doing nothing (the placement fitted once) the controller is over all steps."""
        self.idle[where] = result.row("controller").makespan_us / result.row("fitted-once").makespan_us - 1

    def show(self) -> None:
        """Say what was missed, below the table."""
        print(f"\nHolds in {self.checked - len(self.missed)} of {self.checked}.", end=" ")
        print("Missed: " + "; ".join(self.missed) + "." if self.missed else "", end=" ")
        if self.idle:
            where = max(self.idle, key=lambda each: self.idle[each])
            mark = "holds" if self.idle[where] <= 0.01 else "missed"
            print(
                f"Never above 1 % worse than doing nothing: {mark}, at worst {100 * self.idle[where]:+.2f} % ({where})."
            )
        print(flush=True)


def share(part: float, whole: float) -> str:
    """A percentage; a dash where there is nothing to gain."""
    return f"{100 * part / whole:.0f} %" if whole > 0 else "-"


def change(result: ReplayResult, name: str) -> str:
    """Change of the makespan against contiguous, in per cent."""
    return percent(result.row(name).change)


def percent(fraction: float | None) -> str:
    """A signed percentage without its sign of per cent."""
    return f"{100 * (fraction or 0.0):+.1f}"


def free_ones() -> list[Strategy]:
    """Free re-solves that remember a window, four, and everything."""
    return [Free(f"free-{'all' if memory > 2**20 else memory}", memory=memory) for memory in MEMORIES]


def best_free(profile: Profile, traces: Traces, migration: Migration | None = None) -> ReplayRow:
    """The best of the free re-solves; with a migration that costs nothing, applied at once."""
    chosen = free_ones()
    for strategy in chosen:
        strategy.stops = migration is not None
    rows = replay(profile, traces, chosen, migration=migration).rows
    return min(rows, key=lambda row: row.makespan_us)


def shift(cells: Cells) -> None:
    """Gain over fitted once, against the best free re-solve, with and without the cost of copying."""
    print("## Shift traces\n\nChange against contiguous in per cent, copying included; moves of the scored half. "
          "`gain` is the controller's gain over fitted once as a share of the best free re-solve's.\n")  # fmt: skip
    print("Required: 90 % of the gain of the best free re-solve, with at most 12 % of its moves.\n")
    table = Rows(["trace", "G", "fleet", "fitted once", "best free", "moves", "controller", "moves", "copying ms",
                  "gain", "moves of free's", "holds", "free, copying at no cost", "gain of that",
                  "clairvoyant"])  # fmt: skip
    for name, traces, fleet, profile in cells:
        result = replay(profile, traces, ["contiguous", "fitted-once", "controller", "clairvoyant"])
        table.beside_idle(result, f"{name} G={profile.num_ranks} {fleet}")
        once, ours = result.row("fitted-once"), result.row("controller")
        best, ideal = best_free(profile, traces), best_free(profile, traces, AT_NO_COST)
        gains = [once.makespan_us - row.makespan_us for row in (ours, best, ideal)]
        holds = gains[0] >= 0.9 * gains[1] and ours.moves <= 0.12 * best.moves
        said = f"{name} G={profile.num_ranks} {fleet}: gain {share(*gains[:2])}, moves {share(ours.moves, best.moves)}"
        changes = [f"{percent(row.change)} ({row.strategy})" for row in (best, ideal)]
        table.add(name, profile.num_ranks, fleet, percent(once.change), changes[0], best.moves, percent(ours.change),
                  ours.moves, f"{ours.migration_us / 1e3:.1f}", share(*gains[:2]), share(ours.moves, best.moves),
                  table.require(holds, said), changes[1], share(gains[0], gains[2]),
                  change(result, "clairvoyant"))  # fmt: skip
    table.show()


def eplb(cells: Cells) -> None:
    """EPLB at the engines' own periods; a quarter to fit, so that what the engines do at 750 and 1000 is scored."""
    print("## EPLB at the engines' periods\n\nThe first quarter is fitted on; EPLB starts contiguous at step 0.\n")
    print("Required: ahead of both in makespan and in moves, by the controller as it is, or by the one that may make "
          "half as many moves as the engine that makes fewer (`Policy.moves_per_1000_steps`). `moves (times)`: in how "
          "many rearrangements within the scored steps; ms gained over contiguous per move.\n")  # fmt: skip
    table = Rows(["trace", "steps", "G", "fleet", "fitted once", "vLLM", "moves (times)", "SGLang", "moves (times)",
                  "controller", "moves (times)", "on half", "moves (times)", "ms a move: vLLM", "SGLang", "controller",
                  "on half", "ahead in both", "on half"])  # fmt: skip
    for name, traces, fleet, profile in cells:
        names = ["contiguous", "fitted-once", "eplb-vllm", "eplb-sglang", "controller"]
        result = replay(profile, traces, names, fit=0.25)
        table.beside_idle(result, f"{name} G={profile.num_ranks} {fleet}")
        ours, peers = result.row("controller"), [result.row("eplb-vllm"), result.row("eplb-sglang")]
        half = 0.5 * min(peer.moves for peer in peers) / len(result.baseline_us)
        sparing = Controlled("controller", policy=Policy(moves_per_1000_steps=1000 * half))
        limited = replay(profile, traces, ["contiguous", sparing], fit=0.25)
        runs = [(result, peers[0]), (result, peers[1]), (result, ours), (limited, limited.row("controller"))]
        base = sum(result.baseline_us)
        shown, rates, ahead = [], [], []
        for run, row in runs:
            shown += [percent(row.change), f"{row.moves} ({len(run.track(row.strategy).decisions)})"]
            rates.append(f"{(base - row.makespan_us) / 1e3 / row.moves:+.2f}" if row.moves else "-")
            ahead.append(all(row.makespan_us < peer.makespan_us and row.moves < peer.moves for peer in peers))
        where = f"{name} G={profile.num_ranks} {fleet}"
        table.add(name, traces.num_steps, profile.num_ranks, fleet, change(result, "fitted-once"), *shown, *rates,
                  table.require(ahead[2], f"{where}: {ours.moves} moves"),
                  table.require(ahead[3], f"{where}: on half"))  # fmt: skip
    table.show()


def steady(cells: Cells) -> None:
    """Never much worse than standing still, and hardly a move."""
    print("## Steady traces\n\nChange against contiguous in per cent, copying included.\n")
    print("Required: at most 0.3 % worse than fitted once, at most 1 move per layer and 64 steps.\n")
    table = Rows(["trace", "G", "fleet", "fitted once", "controller", "against fitted once", "moves",
                  "per layer and 64 steps after two windows", "holds"])  # fmt: skip
    for name, traces, fleet, profile in cells:
        result = replay(profile, traces, ["contiguous", "fitted-once", "controller"])
        table.beside_idle(result, f"{name} G={profile.num_ranks} {fleet}")
        once, ours = result.row("fitted-once"), result.row("controller")
        worse = ours.makespan_us / once.makespan_us - 1
        settled = np.array(result.track("controller").moves)[2 * WINDOW :]
        rate = settled.sum() / traces.num_layers / max(len(settled) / WINDOW, 1e-9)
        holds = worse <= 0.003 and rate <= 1 and ours.makespan_us <= 1.01 * min(row.makespan_us for row in result.rows)
        where = f"{name} G={profile.num_ranks} {fleet}: {100 * worse:+.2f} %, {rate:.2f} moves"
        table.add(name, profile.num_ranks, fleet, change(result, "fitted-once"), change(result, "controller"),
                  f"{100 * worse:+.2f} %", ours.moves, f"{rate:.2f}", table.require(holds, where))  # fmt: skip
    table.show()


def recurring(cells: Cells) -> None:
    """From the second time that a regime comes: how much of what re-fitting gains, once 16 steps have passed."""
    print("## Recurring regimes\n\nRe-fitted: solved on all earlier steps of the regime. Gains are on the "
          f"steps from {SETTLE} after the switch to the end of the regime, against contiguous placement and against "
          "the placement fitted once on the steps before the switch.\n")  # fmt: skip
    print("Required: at least 95 % of the re-fitted gain (over contiguous).\n")
    table = Rows(["trace", "G", "fleet", "switch at", "to", "re-fitted", "controller", "of the gain over contiguous",
                  "over the placement before", "holds"])  # fmt: skip
    for name, traces, fleet, profile in cells:
        first = regimes(traces)[0].stop  # all that the placement in the beginning has seen
        result = replay(profile, traces, ["contiguous", "fitted-once", "controller"], fit=first / traces.num_steps)
        table.beside_idle(result, f"{name} G={profile.num_ranks} {fleet}")
        seen: set[str] = set()
        for regime in result.regimes:
            if regime.name in seen and regime.start > 0:
                span = slice(regime.start + SETTLE - result.first_step, regime.stop - result.first_step)
                refit_us, stale_us = _refitted(profile, traces, result, regime.name, regime.start, span)
                base_us = sum(result.baseline_us[span])
                ours_us = sum(result.track("controller").step_us[span])
                gained = share(base_us - ours_us, base_us - refit_us)
                where = f"{name} G={profile.num_ranks} {fleet} at {regime.start}: {gained}"
                holds = base_us - ours_us >= 0.95 * (base_us - refit_us)
                table.add(name, profile.num_ranks, fleet, regime.start, regime.name,
                          f"{100 * (refit_us / base_us - 1):+.1f}", f"{100 * (ours_us / base_us - 1):+.1f}", gained,
                          share(stale_us - ours_us, stale_us - refit_us), table.require(holds, where))  # fmt: skip
            seen.add(regime.name)
    table.show()


def _refitted(
    profile: Profile, traces: Traces, result: ReplayResult, task: str, switch: int, span: slice
) -> tuple[float, float]:
    """Microseconds in the span under a placement of the task's earlier steps, and under one of the regime before."""
    assert traces.task is not None
    earlier = np.flatnonzero(traces.task[:switch] == traces.task_names.index(task))
    context = Context(
        profile, fit(profile)[0], traces.steps(earlier), _slots(profile, traces), WINDOW, 0, result.migration
    )
    before = replace(context, past=traces.steps(slice(max(0, switch - 256), switch)))
    scored = traces.steps(slice(span.start + result.first_step, span.stop + result.first_step))
    return _objective(context.fitted, profile, scored), _objective(before.fitted, profile, scored)


def _objective(placement: Placement, profile: Profile, traces: Traces) -> float:
    from gemopt.evaluate import evaluate

    return evaluate(placement, profile, traces).objective_us


def _slots(profile: Profile, traces: Traces) -> Any:
    return Placement.contiguous(1, traces.num_experts, profile.num_ranks).slots_per_rank


class Informed(FittedOnce):
    """Fitted once with the true speeds of a slower rank."""

    def __init__(self, profile: Profile) -> None:
        super().__init__("informed")
        self.true = fit(profile)[0]

    def first(self, context: Context) -> Placement:
        """Solved on the past, with the true speeds."""
        return context.placement(solve_rows(context.problems(context.past.counts, cost=self.true), patience=5))


def throttle(cells: Cells) -> None:
    """One rank takes 1.3 times as long in the middle half of the scored steps."""
    print("## One rank throttles by 1.3, and recovers\n\nChange against contiguous on the same devices, in per cent: "
          "from 64 steps after the throttling to the recovery, and from 64 steps after that to the end.\n")  # fmt: skip
    print("Required: at most 2 points above the placement fitted with the true speeds, and above fitted once after.\n")
    table = Rows(["trace", "G", "fleet", "fitted once", "with the true speeds", "controller", "points", "holds",
                  "recovered: fitted once", "controller", "points", "holds"])  # fmt: skip
    for name, traces, fleet, profile in cells:
        first = traces.num_steps // 2
        scored, rank = traces.num_steps - first, profile.num_ranks // 2
        start, stop = first + scored // 4, first + 3 * scored // 4
        slow = Informed(slow_down(profile, rank, 1.3))
        result = replay(profile, traces, ["contiguous", "fitted-once", slow, "controller"],
                        throttle=Schedule.parse([f"{rank}:1.3@{start}-{stop}"]))  # fmt: skip
        table.beside_idle(result, f"{name} G={profile.num_ranks} {fleet}")
        spans = slice(start + WINDOW - first, stop - first), slice(stop + WINDOW - first, scored)
        cells_, where = [], f"{name} G={profile.num_ranks} {fleet}"
        for span, goal in zip(spans, ("informed", "fitted-once"), strict=True):
            base = sum(result.baseline_us[span])
            points = {
                row.strategy: 100 * (sum(result.track(row.strategy).step_us[span]) / base - 1) for row in result.rows
            }
            off = points["controller"] - points[goal]
            cells_ += [f"{points[each]:+.1f}" for each in dict.fromkeys(("fitted-once", goal, "controller"))]
            cells_ += [f"{off:+.1f}", table.require(off <= 2, f"{where} {goal}: {off:+.1f} points")]
        table.add(name, profile.num_ranks, fleet, *cells_)
    table.show()


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--ranks", default="4,8,16")
    parser.add_argument("--fleets", default=",".join(FLEETS))
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--traces", default="", help="only those whose name contains this")
    parser.add_argument("--only", default="shift,eplb,steady,recurring,heldout,throttle")
    asked = parser.parse_args()
    print(f"# Following the traffic\n\n{stamp('numpy', 'numba')}")
    limit = "all layers" if asked.layers is None else f"first {asked.layers} layers"
    print(f"Windows of {WINDOW}; second half scored unless said otherwise; {limit}. {CONDITIONS}\n")
    sources = traffic(asked.data, asked.layers)
    ranks, chosen = [int(g) for g in asked.ranks.split(",")], fleets(asked.fleets.split(","))

    def cells(kind: str) -> Cells:
        for name, load in sources[kind].items():
            if asked.traces not in name:
                continue
            traces = load()
            yield from ((name, traces, fleet.name, devices(fleet, g)) for g in ranks for fleet in chosen)

    tables: dict[str, Callable[[Any], None]] = {
        "shift": shift, "eplb": eplb, "steady": steady, "recurring": recurring, "heldout": recurring,
        "throttle": throttle}  # fmt: skip
    for name in asked.only.split(","):
        tables[name](cells(name))


if __name__ == "__main__":
    main()

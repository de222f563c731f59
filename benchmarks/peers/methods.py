"""Every method on one cell: published balancers, methods of papers as gemopt reads them, gemopt; one row each.

Seconds are CPU seconds, the limit of whatever searches too: the clock that gemopt reads is set to the CPU time of this
process and its children, so that other work on the machine changes no answer.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date

import numpy as np
from balancers import Balance, Table, published
from cells import Cell
from numpy.typing import NDArray

import gemopt
from gemopt.costs import CostModel, fit
from gemopt.evaluate import evaluate
from gemopt.placement import Placement
from gemopt.profile import Profile
from gemopt.replay import Context, Strategy, replay
from gemopt.replay.strategies import SGLANG_INTERVAL, VLLM_INTERVAL, VLLM_WINDOW, Eplb
from gemopt.result import relative_gap
from gemopt.traces import Traces

LIMIT_S, PATIENCE = 10.0, 5
OURS = "gemopt"
GEM, GEM_STEPS = "GEM (paper)", 16
GEM_WINDOW = f"{GEM}, {GEM_STEPS} steps"
OF_PAPERS = {GEM: "gem", GEM_WINDOW: "gem", "MoETuner (paper)": "moetuner"}
BASE = "contiguous"
WINDOW = 64
ASCEND_WINDOW, ASCEND_INTERVAL = 400, 430  # vllm-ascend 0.23: steps counted, and until the next; its layers come on top
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """A method on a cell with a seed, in a release of gemopt.

    held, fitted: change against contiguous placement on the steps not seen and on those fitted. gap: proven, on the
    fitted steps. moves: from contiguous placement, or under replay. day: when it was run.
    """

    cell: str
    seed: int
    method: str
    held: float | None
    fitted: float | None
    gap: float | None
    moves: int | None
    seconds: float
    note: str = ""
    release: str = gemopt.__version__
    day: str = str(date.today())


def cpu() -> float:
    """CPU seconds of this process and of its children that ended."""
    each = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in each)


def rows(cell: Cell, seed: int) -> Iterator[dict[str, object]]:
    """The rows of a cell, as they are done."""
    time.monotonic = cpu
    traces, profile = cell.traffic(seed), cell.fleet(seed)
    found = replayed(cell, seed, traces, profile) if cell.replay else placed(cell, seed, traces, profile)
    for row in found:
        yield asdict(row)


def placed(cell: Cell, seed: int, traces: Traces, profile: Profile) -> Iterator[Row]:
    """Fitted on the first half of the steps, scored on the second."""
    given, held = traces.split(0.5)
    cost, _ = fit(profile)
    first = Table(given, profile.num_ranks, cell.slots)
    bound_us = 0.0

    def ours(solver: str, traces: Traces, limit: float) -> gemopt.Result:
        return gemopt.solve(
            profile, traces, slots_per_rank=cell.slots, solver=solver, time_limit=limit, patience=PATIENCE, seed=seed,
            threads=1,
        )  # fmt: skip

    for solver in ("auto", "gem"):
        ours(solver, given.steps(slice(0, 16)), 0.2)  # compiles
    base = [evaluate(first.contiguous, profile, steps, cost=cost).objective_us for steps in (held, given)]

    def row(method: str, placement: Placement | None, seconds: float, note: str = "") -> Row:
        if placement is None:
            return Row(cell.name, seed, method, None, None, None, None, seconds, note)
        us = [evaluate(placement, profile, steps, cost=cost).objective_us for steps in (held, given)]
        gap = relative_gap(us[1], bound_us) if bound_us else None
        change = [now / before - 1 for now, before in zip(us, base, strict=True)]
        return Row(cell.name, seed, method, *change, gap, first.moves(placement), seconds, note)

    for name, solver in {OURS: "auto", **OF_PAPERS}.items():
        begin = cpu()
        result = ours(solver, given.steps(slice(-GEM_STEPS, None)) if name == GEM_WINDOW else given, LIMIT_S)
        took = cpu() - begin
        if name == OURS:
            bound_us = result.bound_us or 0.0
        yield row(name, result.placement, took, "; ".join(result.notes))
    yield row(BASE, first.contiguous, 0.0)
    for name, make in published().items():
        balance = make()
        if name == "FlashLB":
            make()(first.counts_TLE[:16], first.spread)  # compiles
        begin = cpu()
        table_LGS = balance(first.counts_TLE, first.spread)
        took = cpu() - begin
        yield row(name, first.placement(table_LGS), took)


class Periodic(Eplb):
    """A published balancer, run as an engine runs EPLB; it starts from what is in force."""

    def __init__(self, name: str, balance: Balance, *, window: int, interval: int, first: int, stops: bool) -> None:
        super().__init__(name, window=window, interval=interval, first=first, stops=stops)
        self.call = balance

    def first(self, context: Context) -> Placement:
        """From contiguous placement on."""
        self.table = Table(context.past, context.profile.num_ranks, int(context.slots_per_rank[0]))
        self.now_LGS = self.table.spread
        return super().first(context)

    def balance(self, slots_G: IntArray) -> Placement:
        """What the balancer wants after the last `window` steps seen."""
        self.seen = self.seen[-self.window :]
        self.now_LGS = self.call(np.asarray(self.seen, np.int64), self.now_LGS)
        return self.table.placement(self.now_LGS)


def strategies(layers: int) -> dict[str, Callable[[], Strategy | str]]:
    """Each balancer at its engine's periods, and at every window, its best case where traffic shifts."""
    ascend = {"window": ASCEND_WINDOW, "interval": ASCEND_INTERVAL + layers, "first": ASCEND_INTERVAL - 1}
    own = {
        "EPLB (vLLM)": {"window": VLLM_WINDOW, "interval": VLLM_INTERVAL, "first": VLLM_INTERVAL // 4},
        "EPLB (SGLang)": {"window": SGLANG_INTERVAL, "interval": SGLANG_INTERVAL, "first": SGLANG_INTERVAL},
        "deepseek_vec": {"window": SGLANG_INTERVAL, "interval": SGLANG_INTERVAL, "first": SGLANG_INTERVAL},
        "FlashLB": ascend,
        "SwiftBalancer": ascend,
    }
    often = {"window": WINDOW, "interval": WINDOW, "first": WINDOW}
    table: dict[str, Callable[[], Strategy | str]] = {BASE: lambda: BASE, OURS: lambda: "controller"}
    for name, make in published().items():
        stops = name in ("EPLB (SGLang)", "deepseek_vec")

        def at(name: str, when: dict[str, int], make: Callable[[], Balance] = make, stops: bool = stops) -> Strategy:
            return Periodic(name, make(), stops=stops, **when)

        table[name] = lambda name=name, at=at: at(name, own[name])
        table[f"{name}, every {WINDOW}"] = lambda name=name, at=at: at(f"{name}, every {WINDOW}", often)
    return table


def replayed(cell: Cell, seed: int, traces: Traces, profile: Profile) -> Iterator[Row]:
    """Followed step by step, copying included; the second half scored. No gap: what is chosen changes."""
    cost: CostModel = fit(profile)[0]
    base_us = 0.0
    for name, make in strategies(traces.num_layers).items():
        begin = cpu()
        done = replay(profile, traces, [make()], cost=cost, seed=seed).rows[0]
        base_us = base_us or done.makespan_us
        change = done.makespan_us / base_us - 1
        yield Row(cell.name, seed, name, change, None, None, done.moves, cpu() - begin)

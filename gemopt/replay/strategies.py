"""The strategies that `gemopt replay` compares by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gemopt.costs import scaled
from gemopt.evaluate import objective
from gemopt.exceptions import InputError, UnsupportedError
from gemopt.latency import FloatArray
from gemopt.online.controller import Controller
from gemopt.online.policy import TICK, Policy
from gemopt.placement import Placement, Split
from gemopt.replay.strategy import Context, IntArray, Strategy
from gemopt.solvers import get
from gemopt.solvers.base import Options
from gemopt.splits.senders import Senders
from gemopt.words import counted

NEVER = 2**31 - 1
AS_GOOD = 1.02  # times a placement found afresh: what is in force is worth a search from there
VLLM_WINDOW, VLLM_INTERVAL = 1000, 3000  # vLLM 0.33, EPLBConfig; the first rearrangement after a quarter
SGLANG_INTERVAL = 1000  # SGLang 0.5.23, --eplb-rebalance-num-iterations; the recorder keeps as many steps


class Fixed:
    """What the strategies below have in common; by itself it keeps the placement it starts with."""

    name = "contiguous"
    eager = False
    stops = False
    layerwise = False

    def __init__(self, name: str = "") -> None:
        self.name = name or self.name
        self.period = NEVER
        self.reason = ""
        self.in_force: Placement | None = None

    def start(self, context: Context) -> Placement:
        """Remember what is known and begin with the first placement."""
        self.context = context
        self.in_force = self.first(context)
        return self.in_force

    def first(self, context: Context) -> Placement:
        """Contiguous."""
        return context.contiguous

    def observe(self, counts_NLE: IntArray, latencies_NG: FloatArray) -> Placement | None:
        """Keep it."""
        return None

    def confirm(self, placement: Placement) -> None:
        """Go on from there."""
        self.in_force = placement

    @property
    def slots(self) -> NDArray[np.int64]:
        """[G] slots of the ranks that are there."""
        assert self.in_force is not None
        return np.asarray(self.in_force.slots_per_rank)


class FittedOnce(Fixed):
    """Solved on the past and left alone."""

    name = "fitted-once"

    def first(self, context: Context) -> Placement:
        """Solved on all of the past."""
        return context.fitted


class Copies(FittedOnce):
    """As fitted once, and refuses to run where no slot is spare: what memory for copies is worth."""

    name = "copies"

    def first(self, context: Context) -> Placement:
        """Solved on all of the past, spare slots holding copies."""
        slots, experts = int(context.slots_per_rank.sum()), context.past.num_experts
        if slots == experts:
            raise InputError("slots_per_rank", slots, f"{self.name} needs more slots than {experts} experts")
        return super().first(context)


class Free(FittedOnce):
    """Solved from afresh every window on the last `memory` steps (a window when None), whatever that moves."""

    name = "free"
    eager = True

    def __init__(self, name: str = "", *, memory: int | None = None) -> None:
        super().__init__(name)
        self.memory = memory

    def start(self, context: Context) -> Placement:
        """As fitted once, until the first decision."""
        self.period = context.window
        self.seen = np.asarray(context.past.counts)
        self.fresh = True
        return super().start(context)

    def observe(self, counts_NLE: IntArray, latencies_NG: FloatArray) -> Placement | None:
        """Solve on what is remembered."""
        if not self.fresh:
            self.seen = np.concatenate([self.seen, counts_NLE])
        self.fresh = False
        self.seen = self.seen[-min(self.memory or self.context.window, len(self.seen)) :]
        problems = self.context.problems(self.seen, slots=self.slots)
        self.reason = f"solved on the last {counted(len(self.seen), 'step')}"
        self.in_force = self.context.placement(self.context.solve(problems), self.slots)
        return self.in_force


class Eplb(Fixed):
    """EPLB as an engine runs it: from contiguous placement, the sum of the last counts, every `interval` steps.

    The engine's clock starts with the traces, so that it has rearranged in the part that others are fitted on, too.
    Device speeds play no role. vLLM's asynchronous mover has a buffer for one layer, SGLang's stops everything.
    """

    layerwise = True

    def __init__(self, name: str, *, window: int, interval: int, first: int, stops: bool) -> None:
        super().__init__(name)
        self.window, self.interval, self.first_step, self.stops = window, interval, first, stops

    def first(self, context: Context) -> Placement:
        """What the engine has come to by now."""
        slots_G = context.slots_per_rank
        if (slots_G != slots_G[0]).any():
            raise UnsupportedError(
                "slots_per_rank", slots_G.tolist(), f"{self.name} needs the same for every rank", "leave it out"
            )
        past, steps = np.asarray(context.past.counts), context.past.num_steps
        self.due = self.first_step
        row = np.arange(int(slots_G.sum())) % context.past.num_experts  # spare slots: the first experts again
        placement = context.placement([row] * context.past.num_layers)
        while self.due < steps:
            self.seen = past[: self.due]
            placement = self.balance(slots_G)
            self.due += self.interval
        self.seen = past
        self.period = max(1, self.due - steps)
        self.eager = self.due == steps
        return placement

    def observe(self, counts_NLE: IntArray, latencies_NG: FloatArray) -> Placement | None:
        """Rearrange."""
        if not self.eager:
            self.seen = np.concatenate([self.seen, counts_NLE])
        self.eager, self.period = False, self.interval
        self.reason = f"EPLB on the last {counted(min(self.window, len(self.seen)), 'step')}"
        self.in_force = self.balance(self.slots)
        return self.in_force

    def balance(self, slots_G: NDArray[np.int64]) -> Placement:
        """EPLB of the last `window` steps seen."""
        self.seen = self.seen[-self.window :]
        problems = [replace(each, rules=None) for each in self.context.problems(self.seen, slots=slots_G)]
        rows = [get("eplb").solve(problem, Options(deadline=np.inf), None).row for problem in problems]
        return self.context.placement([row for row in rows if row is not None], slots_G)


class Clairvoyant(FittedOnce):
    """Solved on the very window that it serves, with the true speeds, at no cost of copying: a bound for the others."""

    name = "clairvoyant"

    def start(self, context: Context) -> Placement:
        """As fitted once."""
        self.period = context.window
        return super().start(context)

    def foresee(self, counts_NLE: IntArray, factors_NG: FloatArray, slots_per_rank: NDArray[np.int64]) -> Placement:
        """Solve on the steps to come, afresh and, where that is as good, from what is in force; the better of both."""
        assert self.in_force is not None
        cost = scaled(self.context.cost, factors_NG.mean(axis=0))
        problems = self.context.problems(counts_NLE, slots=slots_per_rank, cost=cost)
        rows = self.context.solve(problems)
        if (self.in_force.slots_per_rank == slots_per_rank).all():
            held, found = self.in_force.physical_to_logical, list(map(objective, problems, rows))
            near = [n for n, each in enumerate(problems) if objective(each, held[n]) <= AS_GOOD * found[n]]
            again = self.context.solve([problems[n] for n in near], starts=[held[n] for n in near])
            for n, row in zip(near, again, strict=True):
                rows[n] = row if objective(problems[n], row) < found[n] else rows[n]
        self.in_force = self.context.placement(rows, slots_per_rank)
        return self.in_force


class Controlled(FittedOnce):
    """`gemopt.online.Controller`, asked every `every` steps, from the placement fitted once."""

    name = "controller"
    eager = True

    def __init__(self, name: str = "", *, policy: Policy | None = None, every: int = TICK) -> None:
        super().__init__(name)
        self.policy, self.period = policy, every

    def start(self, context: Context) -> Placement:
        """Learn from the past, of which the last window comes with the first call."""
        begin, costs = super().start(context), context.migration
        shared = ("expert_bytes", "bytes_per_s", "slowdown", "commit_us", "batch_bytes")
        policy = self.policy or Policy(**{name: getattr(costs, name) for name in shared})
        senders = Senders.UNIFORM if context.split is Split.NEAREST else None
        self.controller = Controller(context.profile, begin, policy, cost=context.cost, senders=senders)
        known = max(0, context.past.num_steps - context.window)
        if known:
            self.controller.remember(context.past.counts[:known])
        return begin

    def observe(self, counts_NLE: IntArray, latencies_NG: FloatArray) -> Placement | None:
        """What the controller decides."""
        decision = self.controller.step(counts_NLE, latencies_NG)
        self.reason = decision.reason
        return decision.placement if decision.num_moves else None

    def confirm(self, placement: Placement) -> None:
        """Tell the controller."""
        super().confirm(placement)
        self.controller.confirm(placement)


def _vllm() -> Strategy:
    return Eplb("eplb-vllm", window=VLLM_WINDOW, interval=VLLM_INTERVAL, first=VLLM_INTERVAL // 4, stops=False)


def _sglang() -> Strategy:
    return Eplb("eplb-sglang", window=SGLANG_INTERVAL, interval=SGLANG_INTERVAL, first=SGLANG_INTERVAL, stops=True)


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "contiguous": Fixed,
    "fitted-once": FittedOnce,
    "eplb-vllm": _vllm,
    "eplb-sglang": _sglang,
    "free": Free,
    "controller": Controlled,
    "clairvoyant": Clairvoyant,
}


def _by_name_only() -> dict[str, Callable[[], Strategy]]:
    """Strategies for spare slots, which run only when named."""
    from gemopt.replay.duplication import strategies

    return {"copies": Copies, **strategies()}


def make(chosen: Sequence[str | Strategy]) -> list[Strategy]:
    """Strategies by name, or given as they are; `InputError` for unknown names and for one given twice."""
    found: list[Strategy] = []
    known = STRATEGIES | _by_name_only()
    for each in [chosen] if isinstance(chosen, str) else chosen:
        if isinstance(each, str):
            if each not in known:
                raise InputError("--strategies", each, f"some of {', '.join(known)}")
            found.append(known[each]())
        else:
            found.append(each)
    names = [strategy.name for strategy in found]
    if not names or len(set(names)) < len(names):
        raise InputError("--strategies", ", ".join(names), "at least one, each once")
    return found

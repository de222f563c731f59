"""All layers of one call within one time: greedy answers, one descent each, bounds, deeper searches, in fair shares.

A layer's share of a phase is what is left of it over the layers still to come, so time that one does not need goes to
the others. Nothing here knows a solver by more than its name and what it supports.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace

import numpy as np

from gemopt import cores
from gemopt.bounds import Together, timed_step_bounds, together_bound, weighted
from gemopt.evaluate import objective, total
from gemopt.latency import FloatArray
from gemopt.links import Links
from gemopt.problem import Problem
from gemopt.result import Incumbent, StoppedBy
from gemopt.solvers import get
from gemopt.solvers.base import DEFAULT_PATIENCE, Options, Outcome, Row, Solver, incumbent, within_limits
from gemopt.solvers.search.packing import filled
from gemopt.solvers.size import prover

BOUND_SHARE = 0.2  # of the time goes to bounds, and of what a first search leaves up to
BOUND_REST = 0.4
WARM_SHARE = 0.5  # of an exact solver's time goes to the search that it starts from
SCORE_SHARE = 0.25  # of the limit, at most, is kept for scoring the answer
WAIT_S = 0.2
FUTILE_LAYERS = 3

Progress = Callable[[int, int], None]


@dataclass
class Layer:
    """One layer's problem, warm start and what is known of it so far; seconds: spent on it in all phases.

    together: the co-location bound with its multipliers, which a certificate states.
    """

    problem: Problem
    warm: Row | None
    seed: int
    outcome: Outcome | None = None
    bound_us: float = 0.0
    bounded_steps: int = -1
    base_us: float = 0.0
    seconds: float = 0.0
    together: Together | None = None

    @property
    def bound_cut(self) -> bool:
        """Whether some steps have no more than what is known without work."""
        return self.bounded_steps < self.problem.num_steps


@dataclass
class Coupling:
    """What links add to a run whose layers were solved one by one; bound_L, base_L: [L] microseconds of the links.

    bound_L: at least, whatever the placement. base_L: what they add under contiguous placement.
    """

    links: Links
    bound_L: FloatArray
    base_L: FloatArray
    history: list[Incumbent] = field(default_factory=list)

    def bound(self, layer: int, compute_us: float) -> float:
        """Bound of a layer with its links from one without."""
        links_us = float(self.bound_L[layer])
        return max(compute_us, links_us) if self.links.exchange.overlap else compute_us + links_us


@dataclass
class Run:
    """One call: `threads` layers at a time until `clock + time_limit`, or until interrupted."""

    solver: Solver
    layers: list[Layer]
    clock: float
    time_limit: float
    gap: float = 0.0
    patience: int | None = None
    threads: int = 1
    progress: Progress | None = None
    interrupted: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    coupling: Coupling | None = None

    @property
    def exact(self) -> bool:
        """Whether the solver needs a placement to start from; `auto` searches by itself."""
        return self.solver.supports.proves and self.solver.name != "auto"

    def go(self) -> None:
        """Solve all layers; on an interrupt, every layer still ends with what it has."""
        end = self.clock + self.time_limit - self._scoring()
        left = max(0.0, end - time.monotonic())
        share = max(1, self.threads // len(self.layers))
        workers = min(self.threads, len(self.layers))
        with ThreadPoolExecutor(workers, initializer=cores.in_this_thread, initargs=(share,)) as pool:
            if not self.solver.supports.improves:
                self._phase(pool, self._solve, end)
            else:
                self._phase(pool, self._start, end)
                self._phase(pool, self._answer, end - left * (WARM_SHARE if self.exact else BOUND_SHARE))
                now = time.monotonic()
                rest = max(BOUND_SHARE * left, BOUND_REST * max(0.0, end - now))
                self._phase(pool, self._bound, min(end, now + rest))
                self._phase(pool, self._deepen, end)
            self._phase(pool, self._bound, end)

    def _scoring(self) -> float:
        """Seconds to keep for scoring the answer of all layers, from how long one takes."""
        first = self.layers[0]
        row = get("linear").solve(first.problem, self._options(first, np.inf), None).row
        assert row is not None
        objective(first.problem, row)  # computes features once, which the search needs as well
        begin = time.monotonic()
        objective(first.problem, row)
        return min(SCORE_SHARE * self.time_limit, 1.5 * len(self.layers) * (time.monotonic() - begin))

    def _phase(self, pool: ThreadPoolExecutor, work: Callable[[Layer, float], None], end: float) -> None:
        """Do something to every layer, each with its share of the time until `end`."""
        begun = 0

        def one(layer: Layer) -> None:
            nonlocal begun
            with self.lock:
                begun += 1
                waves = -(-(len(self.layers) - begun + 1) // self.threads)
            begin = time.monotonic()
            work(layer, begin + max(0.0, end - begin) / waves)
            layer.seconds += time.monotonic() - begin

        open_layers: set[Future[None]] = {pool.submit(one, layer) for layer in self.layers}
        try:
            while open_layers:
                try:
                    done, open_layers = wait(open_layers, timeout=WAIT_S, return_when=FIRST_COMPLETED)
                except KeyboardInterrupt:  # where somebody else handles the signal
                    self.interrupted.set()
                    continue
                for future in done:
                    future.result()
                if self.progress is not None and done and work in (self._solve, self._deepen):
                    self.progress(len(self.layers) - len(open_layers), len(self.layers))
        except BaseException:
            self.interrupted.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise

    def _options(self, layer: Layer, deadline: float) -> Options:
        return Options(
            deadline=deadline,
            gap=self.gap,
            seed=layer.seed,
            threads=max(1, self.threads // len(self.layers)),
            patience=self.patience,
            bound_us=layer.bound_us,
            stop=self.interrupted.is_set,
            begun=None if layer.outcome is None else layer.outcome.search,
        )

    def _solve(self, layer: Layer, deadline: float) -> None:
        """All there is to do for a solver that more time does not help."""
        self._base(layer)
        layer.outcome = _full(layer, self.solver.solve(layer.problem, self._options(layer, deadline), layer.warm))

    def _start(self, layer: Layer, deadline: float) -> None:
        """What there is without any search, so that every layer has something however short the time."""
        self._base(layer)
        self._answer(layer, -np.inf)

    def _answer(self, layer: Layer, deadline: float) -> None:
        """A first answer: one descent, or what an exact solver was given to start from."""
        if layer.warm is not None and self.exact and within_limits(layer.problem, layer.warm):
            value = total(layer.problem, layer.warm)
            layer.outcome = Outcome(layer.warm, StoppedBy.ITERATIONS, history=[incumbent(value)])
            return
        solver = get("local-search") if self.solver.supports.proves else self.solver
        patience = DEFAULT_PATIENCE if self.exact else 0
        options = replace(self._options(layer, deadline), patience=patience)
        layer.outcome = _full(layer, solver.solve(layer.problem, options, layer.warm))

    def _base(self, layer: Layer) -> None:
        row = get("linear").solve(layer.problem, self._options(layer, np.inf), None).row
        layer.base_us = 0.0 if row is None else objective(layer.problem, row)

    def _bound(self, layer: Layer, deadline: float) -> None:
        """The simple bounds of as many steps as there is time for, unless known; then who must share a rank.

        The second is for calls that search: it costs more than a greedy placement or a single descent is worth.
        """
        options = self._options(layer, deadline)
        if not layer.bound_cut or (options.expired() and layer.bounded_steps >= 0):
            return
        with options.alarm() as stop:
            bounds_T, steps = timed_step_bounds(layer.problem, stop)
            layer.bound_us = max(layer.bound_us, weighted(layer.problem, bounds_T))
            layer.bounded_steps = max(layer.bounded_steps, steps)
            if self._worth_together() and not layer.bound_cut:
                value = None if layer.outcome is None else _value(layer.outcome)
                target_us = np.inf if value is None else value * (1 - self.gap)
                if layer.bound_us < target_us:
                    layer.together = together_bound(layer.problem, bounds_T, stop, target_us=target_us)
                    layer.bound_us = max(layer.bound_us, layer.together.bound_us)

    def _worth_together(self) -> bool:
        """Whether the co-location bound is worth its time: not for greedy answers, nor where all contents of ranks will
        be listed, nor where the first layers, which are much like the others, gained nothing in shares that are too
        short for it."""
        if self.solver.name in ("auto", "columns") and prover(self.layers[0].problem) == "columns":
            return False
        tried = [layer.together for layer in self.layers if layer.together is not None]
        futile = len(tried) >= FUTILE_LAYERS and not any(each.multipliers is not None for each in tried)
        return self.solver.supports.improves and self.patience != 0 and not futile

    def _deepen(self, layer: Layer, deadline: float) -> None:
        """Go on from the first answer until the deadline, the patience, the gap or a proof."""
        options, first = self._options(layer, deadline), layer.outcome
        assert first is not None
        if self.patience == 0 and not self.solver.supports.proves and not _cut(first):
            return
        if options.expired():
            first.stopped_by = options.cut_by
            if self.exact:
                first.reached, first.start_us, first.note = False, _value(first), "no time left to run"
            return
        layer.outcome = _full(layer, self.solver.solve(layer.problem, options, first.row))
        if layer.outcome.search is None or layer.outcome.search is not first.search:
            layer.outcome.history = first.history + layer.outcome.history
        if self.exact and layer.outcome.start_us is None:
            layer.outcome.start_us = _value(first)
        if not self.exact:  # what it began with was its own
            layer.outcome.reached |= first.reached


def _full(layer: Layer, outcome: Outcome) -> Outcome:
    """The outcome with copies in empty slots, from solvers that leave some where none may be."""
    if layer.problem.full and outcome.row is not None:
        outcome.row = filled(layer.problem, outcome.row)
    return outcome


def _cut(outcome: Outcome) -> bool:
    return outcome.stopped_by in (StoppedBy.TIME_LIMIT, StoppedBy.INTERRUPT)


def _value(outcome: Outcome) -> float | None:
    return outcome.history[-1].objective_us if outcome.history else None


def history(layers: list[Layer], clock: float) -> list[Incumbent]:
    """Total objective over time, from when every layer has an incumbent."""
    events = sorted(
        (point.seconds, index, point.objective_us)
        for index, layer in enumerate(layers)
        if layer.outcome is not None
        for point in layer.outcome.history
    )
    best: dict[int, float] = {}
    found: list[Incumbent] = []
    for seconds, index, value in events:
        best[index] = min(value, best.get(index, np.inf))
        if len(best) == len(layers):
            total = float(sum(best.values()))
            if not found or total < found[-1].objective_us:
                found.append(Incumbent(seconds=seconds - clock, objective_us=total))
    return found

"""All layers of one call within one time: greedy answers, one descent each, bounds, deeper searches, in fair shares.

A layer's share of a phase is what is left of it over the layers still to come, so time that one does not need goes to
the others; the co-location bound takes the layers where most is open first, and lends them what others are due where it
gains faster. What layers proven early leave goes to those cut by the time where most is open. Workers beyond one per
layer search it again from other seeds. Nothing here knows a solver by more than its name and what it supports.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gemopt import cores
from gemopt.bounds import copies_proof, spread_bounds, timed_step_bounds, together_bound, weighted
from gemopt.evaluate import total
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers import get, hurried
from gemopt.solvers.base import DEFAULT_PATIENCE, Options, Outcome, Solver, incumbent, within_limits
from gemopt.solvers.size import provable, prover
from gemopt.solving.cluster import Cluster, packed, unpacked
from gemopt.solving.layers import Coupling, Layer, Standing, on_this_clock, value_of
from gemopt.solving.shares import once_more, scoring_s
from gemopt.solving.turns import bounding, in_turns, instead, lent, priced

BOUND_SHARE = 0.2  # of the time goes to bounds, and of what a first search leaves up to
BOUND_REST = 0.4
WARM_SHARE = 0.5  # of an exact solver's time goes to the search that it starts from
VAIN = 4  # layers in a row where the co-location bound stays at the floors: it is left out for the others
PAIRS_SHARE = 0.1  # of a layer's time for bounds is the co-location bound's at most, where contents are priced after it
BALANCE_SHARE = 0.2  # of a layer's time, at most, for balancing what rules are about
WAIT_S = 0.2

LENDING = ("_together", "_deepen", "_again")
ON_CLUSTER = ("_answer", "_bound", "_together", "_deepen", "_again")  # phases that a cluster does, if one is in force

Progress = Callable[[int, int], None]
OnLayers = Callable[[list[Standing]], None]
Times = Callable[[], tuple[float, float]]  # seconds that are a layer's share of a phase, and left of it


@dataclass
class Run:
    """One call: `threads` layers at a time until `clock + time_limit` (seconds by `time.monotonic`), or interrupted.

    gap, patience, progress, on_layers: as in `gemopt.solve`. end: of the search, after which answers are scored, so
    often (`scored`). vain: layers in a row whose co-location bound stayed at the floors. coupling: what links add, once
    they are known. cluster: if one is in force, as many layers at a time as it has workers.
    """

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
    vain: int = 0
    coupling: Coupling | None = None
    cluster: Cluster | None = None
    on_layers: OnLayers | None = None
    scored: int = 1
    end: float = np.inf

    @property
    def workers(self) -> int:
        """Layers worked on at once."""
        return self.threads if self.cluster is None else self.cluster.count

    @property
    def exact(self) -> bool:
        """Whether the solver needs a placement to start from; `auto` searches by itself."""
        return self.solver.supports.proves and self.solver.name != "auto"

    def go(self) -> None:
        """Solve all layers; on an interrupt, every layer still ends with what it has."""
        self.end = end = self.clock + self.time_limit - scoring_s(self.layers, self.time_limit, self.scored)
        left = max(0.0, end - time.monotonic())
        share = max(1, self.threads // len(self.layers))
        with ThreadPoolExecutor(self.threads, initializer=cores.in_this_thread, initargs=(share,)) as pool:
            if not self.solver.supports.improves:
                self._phase(pool, "_solve", end)
            else:
                self._phase(pool, "_start", end)
                self._phase(pool, "_answer", end - left * (WARM_SHARE if self.exact else BOUND_SHARE))
                now = time.monotonic()
                rest = max(BOUND_SHARE * left, BOUND_REST * max(0.0, end - now))
                self._phase(pool, "_bound", min(end, now + rest))
                self._bound_together(pool, min(end, now + rest))
                self._search(pool, end)
            self._phase(pool, "_bound", end)

    def _phase(self, pool: ThreadPoolExecutor, work: str, end: float, layers: Sequence[Layer] | None = None) -> None:
        """Do something to every layer, each with its share of the time until `end`; one work may lend more."""
        layers = self.layers if layers is None else layers
        begun = count = 0

        def times() -> tuple[float, float]:
            nonlocal begun
            with self.lock:
                begun += 1
                waves = -(-(len(layers) - begun + 1) // self.workers)
            left = max(0.0, end - time.monotonic())
            return left / waves, left

        away = self.cluster is not None and work in ON_CLUSTER
        done = self._on_cluster(layers, work, times) if away else self._in_threads(pool, layers, work, times)
        try:
            with closing(done):
                for finished in done:
                    count += finished
                    if finished and self.progress is not None and work in ("_solve", "_deepen"):
                        self.progress(min(count, len(self.layers)), len(self.layers))
                    if self.on_layers is not None:
                        self.on_layers([layer.standing for layer in self.layers])
        except BaseException:
            self.interrupted.set()
            raise

    def _in_threads(
        self, pool: ThreadPoolExecutor, layers: Sequence[Layer], work: str, times: Times
    ) -> Generator[bool, None, None]:
        """The work of a phase in threads; says when a layer is done, and now and then that none is."""
        open_layers: set[Future[None]] = {
            pool.submit(copy_context().run, self._timed, layer, work, times) for layer in layers
        }
        try:
            while open_layers:
                try:
                    done, open_layers = wait(open_layers, timeout=WAIT_S, return_when=FIRST_COMPLETED)
                except KeyboardInterrupt:  # where somebody else handles the signal
                    self.interrupted.set()
                    continue
                for future in done:
                    future.result()
                    yield True
                if not done:
                    yield False
        except BaseException:
            self.interrupted.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise

    def _timed(self, layer: Layer, work: str, times: Times) -> None:
        """Do a phase's work on one layer, and add the seconds it took to the layer's."""
        begin = time.monotonic()
        share_s, left_s = times()
        ends = (begin + share_s, begin + left_s)
        getattr(self, work)(layer, *(ends if work in LENDING else ends[:1]))
        layer.seconds += time.monotonic() - begin

    def _on_cluster(self, layers: Sequence[Layer], work: str, times: Times) -> Generator[bool, None, None]:
        """The work of a phase on the cluster. Layers that an interrupt leaves there end here with what they had."""
        assert self.cluster is not None
        settings, over = (self.solver, self.gap, self.patience), self.clock + self.time_limit
        tasks = (
            (number, layer.problem, packed((layer, now), layer.problem), settings, work, times(), over - now)
            for number, layer in enumerate(layers)
            for now in [time.monotonic()]
        )
        left = set(range(len(layers)))
        try:
            for number, data in self.cluster.each(_on_worker, tasks, self.interrupted):
                found = on_this_clock(*unpacked(data, layers[number].problem))
                vars(layers[number]).update(vars(found))
                left.remove(number)
                yield True
        except KeyboardInterrupt:  # where somebody else handles the signal
            self.interrupted.set()
        for number in left:
            self._timed(layers[number], work, lambda: (-np.inf, -np.inf))

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
        layer.outcome = layer.filled(self.solver.solve(layer.problem, self._options(layer, deadline), layer.warm))

    def _start(self, layer: Layer, deadline: float) -> None:
        """What there is without any search, so that every layer has something however short the time."""
        self._base(layer)
        now = time.monotonic()
        with hurried.better_by(now + BALANCE_SHARE * max(0.0, deadline - now)):
            self._answer(layer, -np.inf, start_by=deadline)

    def _answer(self, layer: Layer, deadline: float, *, start_by: float = -np.inf) -> None:
        """A first answer: one descent, or what an exact solver was given to start from."""
        if layer.warm is not None and self.exact and within_limits(layer.problem, layer.warm):
            value = total(layer.problem, layer.warm)
            layer.outcome = Outcome(layer.warm, StoppedBy.ITERATIONS, history=[incumbent(value)])
            return
        solver = get("local-search") if self.solver.supports.proves else self.solver
        patience = DEFAULT_PATIENCE if self.exact else 0
        first = self.patience != 0 and not self.exact
        options = replace(self._options(layer, deadline), patience=patience, start_by=start_by, first=first)
        layer.outcome = layer.no_worse(layer.filled(solver.solve(layer.problem, options, layer.warm)))

    def _base(self, layer: Layer) -> None:
        """Score contiguous placement, which answers are compared with."""
        row = get("linear").solve(layer.problem, self._options(layer, np.inf), None).row
        if row is not None:
            layer.compare_with(row)

    def _bound(self, layer: Layer, deadline: float) -> None:
        """The fluid bound of all steps, the simple ones of as many as there is time for; then what copies can carry."""
        options = self._options(layer, deadline)
        if not layer.bound_cut or (options.expired() and layer.bounded_steps >= 0):
            return
        with options.alarm() as stop:
            spread_T = spread_bounds(layer.problem, stop)
            layer.floor_T, steps = timed_step_bounds(layer.problem, stop, spread_T)
            layer.spread_us = max(layer.spread_us, weighted(layer.problem, spread_T))
            found = copies_proof(layer.problem, layer.floor_T, stop, seconds=options.remaining)
        above_us = 0.0 if found is None else found.above_us
        layer.copies = found or layer.copies
        layer.bound_us = max(layer.bound_us, weighted(layer.problem, layer.floor_T) + above_us)
        layer.bounded_steps = max(layer.bounded_steps, steps)

    def _bound_together(self, pool: ThreadPoolExecutor, end: float) -> None:
        """The co-location bound, where most is open first: a few layers for long gain more than all for short.

        Where calls search and contents of ranks are not listed: a greedy placement or one descent is not worth it.
        """
        if self.solver.name in ("auto", "columns") and prover(self.layers[0].problem) == "columns":
            return
        layers = [layer for layer in self.layers if layer.floor_T is not None and not layer.bound_cut]
        if self.patience != 0:
            self._phase(pool, "_together", end, sorted(layers, key=lambda layer: -layer.open_us))

    def _together(self, layer: Layer, deadline: float, end: float) -> None:
        options = self._options(layer, end)
        assert layer.floor_T is not None
        target_us = np.inf if layer.outcome is None else (layer.open_us + layer.bound_us) * (1 - self.gap)
        if layer.bound_us >= target_us or options.expired():
            return
        share_s, left_s = deadline - time.monotonic(), options.remaining
        both = priced(layer, share_s)
        share_s, left_s = (PAIRS_SHARE * share_s,) * 2 if both else (share_s, left_s)
        if self.vain < VAIN or self.patience is not None:  # else threads would decide what is proven
            times = {"share_s": share_s, "left_s": left_s}
            with replace(options, deadline=time.monotonic() + left_s).alarm() as stop:
                found = together_bound(layer.problem, layer.floor_T, stop, target_us=target_us, **times)
            layer.prove(found)
            self.vain = 0 if found.multipliers is not None else self.vain + 1
        if both and not self._goes_on(layer) and layer.bound_us < target_us:
            with replace(options, deadline=deadline).alarm() as stop:
                contents = bounding(layer, target_us, deadline)
                layer.prove(contents.run(stop))
                layer.prove(instead(layer, contents).run(stop))

    def _search(self, pool: ThreadPoolExecutor, end: float) -> None:
        """Deeper searches; with more workers than layers each from several seeds, of which the best counts.
        Proofs, which end at any time, begin where least is open."""
        proves = self._proves(self.layers[0])
        more = 0 if proves or self.patience == 0 else self.workers // len(self.layers) - 1
        others = [(layer, layer.again(number)) for number in range(1, 1 + more) for layer in self.layers]
        layers = sorted(self.layers, key=lambda layer: layer.open_us if proves else -layer.open_us)
        self._phase(pool, "_deepen", end, [*layers, *(other for _, other in others)])
        for layer, other in others:
            layer.take(other)
        left = layers
        while chosen := once_more(left, self.gap, end - time.monotonic(), self.workers, self.interrupted.is_set()):
            self._phase(pool, "_again", end, chosen)
            left = [layer for layer in left if all(layer is not each for each in chosen)]

    def _proves(self, layer: Layer) -> bool:
        """Whether the solver tries a proof of its own."""
        return self.solver.supports.proves and (self.exact or provable(layer.problem))

    def _goes_on(self, layer: Layer) -> bool:
        """Whether the solver searches, and can go on where it was stopped."""
        begun = layer.outcome is not None and layer.outcome.search is not None
        return begun and self.patience != 0 and not self._proves(layer)

    def _deepen(self, layer: Layer, deadline: float, end: float) -> None:
        """Go on from the first answer until the deadline, the patience, the gap or a proof."""
        deadline = lent(layer, deadline, end) if self._goes_on(layer) else deadline
        options, first = self._options(layer, deadline), layer.outcome
        assert first is not None
        cut = first.stopped_by in (StoppedBy.TIME_LIMIT, StoppedBy.INTERRUPT)
        if self.patience == 0 and not self.solver.supports.proves and not cut:
            return
        if options.expired():
            first.stopped_by = options.cut_by
            if self.exact:
                first.reached, first.start_us, first.note = False, value_of(first), "no time left to run"
            return
        if not (self._goes_on(layer) and priced(layer, options.remaining)):
            self._search_on(layer, options)
        else:
            in_turns(
                layer,
                lambda until: self._options(layer, min(deadline, until)),
                lambda turn: self._search_on(layer, turn),
                self.gap,
            )

    def _again(self, layer: Layer, deadline: float, end: float) -> None:
        """Search a layer once more, from its answer; what was proven of it before still holds."""
        first = layer.outcome
        if first is not None and not self._options(layer, deadline).expired():
            first = replace(first)
            self._deepen(layer, deadline, end)
            layer.keep(first)

    def _search_on(self, layer: Layer, options: Options) -> None:
        """The solver, from where the layer stands."""
        first = layer.outcome
        assert first is not None
        layer.outcome = layer.no_worse(layer.filled(self.solver.solve(layer.problem, options, first.row)))
        if layer.outcome.search is None or layer.outcome.search is not first.search:
            layer.outcome.history = first.history + layer.outcome.history
        if self.exact and layer.outcome.start_us is None:
            layer.outcome.start_us = value_of(first)
        if not self.exact:  # what it began with was its own
            layer.outcome.reached |= first.reached


def _on_worker(
    number: int, problem: Problem, known: bytes, settings: Any, work: str, times: tuple[float, float], left_s: float
) -> tuple[int, bytes]:
    """Work of a phase on one layer, where a worker of a cluster is: see `Run._on_cluster`. left_s: of the call."""
    layer: Layer = on_this_clock(*unpacked(known, problem))
    solver, gap, patience = settings
    with cores.at_most(1), hurried.call(time.monotonic() + left_s, lambda: False):
        Run(solver, [layer], time.monotonic(), times[1], gap, patience)._timed(layer, work, lambda: times)
    return number, packed((layer, time.monotonic()), problem)

"""Follow a growing trace folder: decide, write the placement, tell the engine and the monitoring.

Whatever goes wrong (half a file, counts of another shape, a command that fails, a full disk) is one line in the log and
a count in the metrics; the placement in force stays, and the watch goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gemopt.bounds import lower_bound
from gemopt.evaluate import Evaluation, check_agreement, evaluate
from gemopt.exceptions import InputError
from gemopt.online.command import run_command
from gemopt.online.controller import Controller
from gemopt.online.decision import Decision
from gemopt.online.follow import Follower, News, told
from gemopt.online.given import Given
from gemopt.online.metrics import Health, Metrics
from gemopt.placement import Placement
from gemopt.problem import problems
from gemopt.result import relative_gap
from gemopt.traces import Traces
from gemopt.words import counted

Log = Callable[[str], None]
Write = Callable[[Placement], object]

WINDOW = 64
BOUND_STEPS = 64  # of the last steps, on which the gap is certified


@dataclass
class Actions:
    """What a changed placement leads to, in this order; the first that fails ends it, and the old placement stays.

    writes: each replaces one file, an export or the placement itself, atomically. command: run afterwards with
    `{placement}` replaced by the path, for at most `command_timeout_s` or until `stop` is set; an exit code other than
    0 means that the placement is not in force. holds: what the file at `path` was left with; None: whatever it holds
    may be replaced.
    """

    path: Path
    writes: Sequence[Write]
    command: Sequence[str] = ()
    command_timeout_s: float = 60.0
    holds: Placement | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def carry_out(self, placement: Placement, old: Placement) -> str:
        """Why the placement did not come into force, which leaves the files as they were; nothing when it did."""
        done: list[Write] = []
        try:
            if self.replaced() is not None:
                limit = "what the watch read or wrote: somebody else has replaced it"
                raise InputError(str(self.path), "another placement", limit)
            for write in self.writes:
                write(placement)
                done.append(write)
            if self.command:
                words = [word.replace("{placement}", str(self.path)) for word in self.command]
                run_command(words, self.command_timeout_s, self.stop)
        except Exception as error:
            left = [reason for write in done if (reason := _failure(write, old))]
            return "; ".join([told(error), "the placement in force stays", *(f"not put back: {each}" for each in left)])
        self.holds = placement
        return ""

    def replaced(self) -> Placement | None:
        """What somebody else has put into the file; None where it serves as before, is gone, or is no placement."""
        if self.holds is None:
            return None
        try:
            found = Placement.load(self.path)
        except InputError:
            return None
        return None if serve_alike(found, self.holds) else found


def serve_alike(one: Placement, other: Placement) -> bool:
    """Whether two placements are the same in all that serving depends on."""
    fields = ("physical_to_logical", "slots_per_rank", "split", "split_weights")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in fields)


def _failure(write: Write, placement: Placement) -> str:
    try:
        write(placement)
    except Exception as error:
        return told(error)
    return ""


@dataclass
class Watch:
    """One folder, one controller, one placement in force."""

    controller: Controller
    follower: Follower
    actions: Actions
    log: Log
    metrics: Metrics | None = None
    health: Health = field(default_factory=lambda: Health(60.0))
    state: Path | None = None
    window: int = WINDOW
    given: Given = field(default_factory=Given)
    failed: bool = False  # whether the last look met a fault, and no decision came into force after it
    _before: Placement | None = None
    _told: set[str] = field(default_factory=set)  # faults of files at the look before and at this one
    _found: set[str] = field(default_factory=set)
    _left: int = 0  # new steps that the last look did not come to
    _models: list[str] = field(default_factory=list)  # other networks, named so far

    def run(self, interval_s: float, stop: threading.Event, *, once: bool = False) -> None:
        """Look every `interval_s` seconds until `stop` is set, or once: an engine's files then rest for one look.

        What a look has not come to when `stop` is set is left: the state is then that of the look before.
        """
        first, self.actions.stop = True, stop
        if once and self.follower.read is not None:
            self.follower.notice()
            stop.wait(interval_s)
        while not stop.is_set():
            begin = time.monotonic()
            self.look(history=first)
            first = False
            if once:
                return
            stop.wait(max(0.0, interval_s - (time.monotonic() - begin)))

    def look(self, *, history: bool = False) -> Decision | None:
        """One look at the folder; the decision on what was new, if anything was.

        With `history` all but the last window are only learnt from: they lie in the past.
        """
        decision, self.failed, self._left = None, False, 0
        self._told, self._found = self._found, set()
        news = News()
        with self._guard("file"):
            news = self.follower.look()
        for path in self.given.replaced():
            self._fault("file", f"{path}: replaced since the start; the watch goes on with what it read: start it anew")
        for fault in news.faults:
            self._fault("file", fault, lasting=True)
        self.health.looked()
        if news.traces is None:
            if history:
                self.log(f"{self.follower.folder}: no {'new steps' if self.follower.begun else 'steps yet'}")
            return None
        timed = self.controller.placement
        with self._guard("file"):
            self._adopt()
        self._name(news.traces.model)
        with self._guard("window"):
            check_agreement(self.controller.placement, news.traces, self.controller.placement.num_ranks)
            decision = self._steps(news.traces, news.unsure, timed, history=history)
        if self._left:
            self.log(f"told to end: {counted(self._left, 'new step')} left for the next start")
        elif self.state is not None:
            with self._guard("state"):
                self.controller.save(self.state, self.follower.position)
        return decision

    def _name(self, model: str | None) -> None:
        """Say, once for each, that steps are of a network of another name; it may be another's of the same shape."""
        ours = self.controller.placement.model
        if None not in (model, ours) and model not in (ours, *self._models):
            self._models.append(str(model))
            self._fault("window", f"{self.follower.folder}: steps of {model}, where the placement is of {ours}")

    def _adopt(self) -> None:
        """Go on from what somebody else has put into force; `InputError` where that cannot be followed."""
        theirs = self.actions.replaced()
        if theirs is None:
            return
        said = f"{self.actions.path}: somebody else has put another placement there"
        self.controller.latest = 0  # moves that were made before it
        try:
            self.controller.confirm(theirs)
        except InputError as error:
            raise error.about(f"{said}: {error.field}") from None
        self.actions.holds, self._before = theirs, None
        self.follower.changed()
        self._fault("file", f"{said}: the watch goes on from it")

    def _steps(self, traces: Traces, unsure: int, timed: Placement, *, history: bool) -> Decision | None:
        """timed: what was in force when the ranks were timed at these steps, but for the first `unsure` ones."""
        decision, past = None, max(0, traces.num_steps - self.window) if history else 0
        for start in range(0, past, self.window):  # a window at a time: the last one is whole, and history may be long
            if self.actions.stop.is_set():
                self._left = traces.num_steps - start
                return None
            with self._guard("window"):
                part = traces.counts[start : min(start + self.window, past)]
                self.controller.remember(part)
                if self.metrics is not None:
                    self.metrics.steps.inc(len(part))
        for start in range(past, traces.num_steps, self.window):
            if self.actions.stop.is_set():
                self._left = traces.num_steps - start
                break
            with self._guard("window"):
                known = self.controller
                blind = (unsure if known.placement == timed else traces.num_steps) - start
                known.blind_until = max(known.blind_until, known.steps + min(self.window, blind))
                decision = self._window(traces.steps(slice(start, start + self.window)))
        return decision

    def _window(self, part: Traces) -> Decision:
        in_force, before = self.controller.placement, self._before
        decision = self.controller.step(part.counts, part.rank_us)
        self._decided(decision, in_force)
        with self._guard("metrics"):
            self._measure(part, in_force, before)
        return decision

    def _decided(self, decision: Decision, in_force: Placement) -> None:
        kind = "refused" if decision.refused else "moved" if decision.num_moves else "kept"
        self.failed = False
        if decision.num_moves:
            reason = self.actions.carry_out(decision.placement, in_force)
            if reason:
                kind = "failed"
                self.controller.confirm(in_force)
                self._fault("action", reason)
            else:
                self._before = in_force
                self.follower.changed()
        if decision.refused:
            self._fault("window", decision.reason)
        else:
            self.log(f"{kind}: {decision.reason}")
        self.health.looked(decision=kind, reason=decision.reason)
        if self.metrics is None:
            return
        self.metrics.decisions.labels(kind=kind).inc()
        self.metrics.drift.set(decision.drift)
        self.metrics.kept.set(decision.trust)
        if kind == "moved":
            self.metrics.moves.inc(decision.num_moves)
            self.metrics.predicted.set(decision.gain_us)

    def _measure(self, part: Traces, in_force: Placement, before: Placement | None) -> None:
        """What the placement in force did with the steps that have just come, as far as costs tell.

        before: what was in force before that.
        """
        if self.metrics is None:
            return
        scored = self._scored(in_force, part)
        self.metrics.steps.inc(part.num_steps)
        self.metrics.last.set(time.time())
        self.metrics.makespan.set(float(scored.step_us.mean()))
        self.metrics.imbalance.set(1.0 / max(1e-9, 1.0 - scored.idle_share))
        share_G = np.bincount(scored.straggler_TL.ravel(), minlength=in_force.num_ranks) / scored.straggler_TL.size
        self.metrics.ranks(self.metrics.straggler, share_G)
        self.metrics.ranks(self.metrics.speed, self.controller.speeds.relative_G)
        self.metrics.ranks(self.metrics.silent, self.controller.speeds.silent_G)
        if before is not None:
            old = self._scored(before, part)
            self.metrics.realised.set(float(old.step_us.mean() - scored.step_us.mean()))
        last = part if part.num_steps <= BOUND_STEPS else part.steps(slice(part.num_steps - BOUND_STEPS, None))
        layers = problems(self.controller.scaled, last, in_force.slots_per_rank.tolist())
        bound_us = sum(lower_bound(layer) for layer in layers)  # under every split
        gap = relative_gap(self._scored(in_force, last).objective_us, bound_us)
        self.metrics.gap.set(gap or 0.0)

    def _scored(self, placement: Placement, part: Traces) -> Evaluation:
        """With every rank as fast as it is now."""
        known = self.controller
        return evaluate(placement, known.profile, part, cost=known.scaled, senders=known.senders)

    @contextmanager
    def _guard(self, kind: str) -> Iterator[None]:
        """Nothing that goes wrong inside ends the watch."""
        try:
            yield
        except Exception as error:
            self._fault(kind, told(error), lasting=kind == "file")

    def _fault(self, kind: str, text: str, *, lasting: bool = False) -> None:
        """lasting: met at every look until it is mended, and said at the first of them."""
        self.failed = True
        if not lasting or text not in self._told | self._found:
            self.log(f"warning: {text}")
        self._found.add(text)
        self.health.looked(last_fault=text)
        if self.metrics is not None:
            self.metrics.faults.labels(kind=kind).inc()

"""One strategy's way through recorded steps: decisions, transfers, commits and stalls."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from gemopt.evaluate import loads
from gemopt.exceptions import InputError
from gemopt.kernels import rank_latencies
from gemopt.latency import Curves, FloatArray, pack
from gemopt.migration import batches, count_moves
from gemopt.placement import Placement
from gemopt.problem import Problem
from gemopt.replay.copying import Migration, beside, traffic
from gemopt.replay.result import Decided, Track
from gemopt.replay.schedule import Schedule
from gemopt.replay.strategy import Context, Foreseeing, Strategy
from gemopt.replay.survivors import evacuate, readmit
from gemopt.solvers.base import Row
from gemopt.solvers.nearest import nearest_row
from gemopt.traces import Traces

BLOCK_STEPS = 256


@dataclass
class Transfer:
    """Experts on their way: the rows to commit together, by layer, and microseconds left."""

    rows: dict[int, Row]
    left_us: float


@dataclass(frozen=True, eq=False)
class World:
    """What happens whatever anybody decides: traffic, devices, cost of copying.

    noise_TG: on measured latencies; split_us: a batch and where its experts are -> what the ranks take, for all to use.
    """

    context: Context
    traces: Traces
    migration: Migration
    schedule: Schedule
    non_moe_us: float
    noise_TG: FloatArray
    split_us: dict[tuple[bytes, ...], FloatArray] = field(default_factory=dict)

    @property
    def first_step(self) -> int:
        """First step that is scored."""
        return self.context.past.num_steps

    def times(self, start: int, stop: int, layer: int, row: Row, slots_G: NDArray[np.int64]) -> FloatArray:
        """[steps, G] microseconds of every rank at one layer, as slow as the ranks are then."""
        cost, counts_NE = self.context.cost, self.traces.counts[start:stop, layer]
        problem = Problem(
            counts_NE, cost.features, cost.latencies, slots_G, np.ones(len(counts_NE)), self.context.nodes_G,
            split=self.context.split,
        )  # fmt: skip
        times_NG = np.asarray(rank_latencies(loads(problem, row), self.curves))
        return times_NG * self.schedule.factors(start, stop, len(slots_G))

    @cached_property
    def curves(self) -> Curves:
        """The latencies as flat arrays, packed once."""
        return pack(self.context.cost.latencies)


class Playing(Strategy, Protocol):
    """A strategy that decides batch by batch and says itself what that takes; it decides before it looks at a step."""

    def play(self, world: World) -> Track:
        """All scored steps."""


class Course:
    """One strategy in the world. `run` plays all scored steps."""

    def __init__(self, strategy: Strategy, world: World) -> None:
        self.strategy, self.world = strategy, world
        steps = world.traces.num_steps - world.first_step
        self.step_us, self.copying_us = np.zeros(steps), np.zeros(steps)
        self.moves = np.zeros(steps, dtype=np.int64)
        self.latencies_NG = np.zeros((steps, world.context.profile.num_ranks))
        self.decisions: list[Decided] = []
        self.queue: deque[tuple[int, Row]] = deque()
        self.going: Transfer | None = None
        self.stall_us = 0.0

    def run(self) -> Track:
        """All scored steps under the strategy."""
        world, strategy = self.world, self.strategy
        first, end = world.first_step, world.traces.num_steps
        begin = strategy.start(world.context)
        self._check(begin)
        self.ruled = begin.rules is not None
        self.slots_G, self.rows = np.asarray(begin.slots_per_rank), list(begin.physical_to_logical)
        changes = deque(world.schedule.changes(first, end))
        seen = now = first
        call = now if strategy.eager else now + self._period()
        while now < end:
            while changes and changes[0][0] == now:
                self._change(now, *changes.popleft()[1:])
            if hasattr(strategy, "foresee"):
                until = call if call > now else now + strategy.period
                self._foresee(now, min(until, end, *(step for step, _, _ in changes)))
            elif call == now:
                self._ask(seen, now)
                seen = now
            if call <= now:
                call = now + self._period()
            stop = min(end, call, now + BLOCK_STEPS, *(step for step, _, _ in changes))
            self._advance(now, stop)
            now = stop
        return Track(
            strategy=strategy.name,
            step_us=self.step_us.tolist(),
            copying_us=self.copying_us.tolist(),
            moves=self.moves.tolist(),
            decisions=self.decisions,
            setup_moves=world.context.setup_moves(begin),
        )

    def _period(self) -> int:
        if self.strategy.period < 1:
            raise InputError(f"{self.strategy.name}.period", self.strategy.period, "at least 1 step")
        return self.strategy.period

    def _ask(self, seen: int, now: int) -> None:
        """Let the strategy decide on the steps from `seen` to before `now`; the window before the first scored step."""
        world, first = self.world, self.world.first_step
        if now == first:
            seen = max(0, first - world.context.window)
            counts_NLE, latencies_NG = world.traces.counts[seen:now], self._past_latencies(seen, now)
        else:
            counts_NLE, latencies_NG = world.traces.counts[seen:now], self.latencies_NG[seen - first : now - first]
        latencies_NG = latencies_NG * world.noise_TG[seen:now]
        wanted = self.strategy.observe(counts_NLE, latencies_NG)
        if wanted is not None:
            self._want(wanted, now)

    def _past_latencies(self, seen: int, now: int) -> FloatArray:
        each = [self.world.times(seen, now, layer, row, self.slots_G) for layer, row in enumerate(self.rows)]
        return np.asarray(np.sum(each, axis=0))

    def _in_force(self) -> Placement:
        """What is in force, counting what is on its way: a transfer that has begun is committed."""
        rows = list(self.rows)
        if self.going is not None:
            rows = [self.going.rows.get(layer, row) for layer, row in enumerate(rows)]
        return self.world.context.placement(rows, self.slots_G)

    def _want(self, wanted: Placement, now: int) -> None:
        """Queue what differs; what an earlier decision wanted and has not begun is forgotten."""
        self._check(wanted)
        at = now - self.world.first_step
        pairs = list(zip(self._in_force().physical_to_logical, wanted.physical_to_logical, strict=True))
        moves = [count_moves(old, new, self.slots_G) for old, new in pairs]
        gone = [count_moves(new, old, self.slots_G) for old, new in pairs]  # copies given up: no move, but a change
        self.queue = deque((layer, new) for layer, (_, new) in enumerate(pairs) if moves[layer] or gone[layer])
        if self.queue:
            self.decisions.append(Decided(step=now, moves=sum(moves), reason=self.strategy.reason))
        if self.strategy.stops:
            for layer, row in self.queue:
                self.stall_us += self._transfer({layer: row}).left_us + self.world.migration.commit_us
                self.rows[layer] = row
            self.moves[at] += sum(moves)
            self.queue.clear()

    def _transfer(self, rows: dict[int, Row]) -> Transfer:
        """Rows that go together, and how long that takes."""
        both = [traffic(self.rows[layer], row, self.slots_G, self.slots_G) for layer, row in rows.items()]
        return Transfer(rows, self.world.migration.transfer_us(*np.sum(both, axis=0)))

    def _next(self) -> Transfer:
        """The layers that go next: those at the head of the queue that the executor would take together."""
        limit = 0.0 if self.strategy.layerwise else self.world.migration.batch_bytes
        layers = [layer for layer, _ in self.queue]
        into_NG = [traffic(self.rows[layer], row, self.slots_G, self.slots_G)[0] for layer, row in self.queue]
        head = batches(layers, [in_G * self.world.migration.expert_bytes for in_G in into_NG], limit)[0]
        return self._transfer(dict(self.queue.popleft() for _ in head))

    def _advance(self, start: int, stop: int) -> None:
        """Play the steps from `start` to before `stop`."""
        world, at = self.world, start - self.world.first_step
        times_NLG = np.stack(
            [world.times(start, stop, layer, row, self.slots_G) for layer, row in enumerate(self.rows)], axis=1
        )
        for n in range(stop - start):
            if self.going is None and not self.queue and not self.stall_us:
                self.step_us[at + n : at + stop - start] = times_NLG[n:].max(axis=2).sum(axis=1)
                break
            added, self.stall_us = self.stall_us, 0.0
            if self.going is not None and self.going.left_us <= 0:
                for layer, row in self.going.rows.items():
                    self.rows[layer] = row
                    times_NLG[n:, layer] = world.times(start + n, stop, layer, row, self.slots_G)
                added, self.going = added + world.migration.commit_us, None
            if self.going is None and self.queue:
                self.going = self._next()
                for layer, row in self.going.rows.items():
                    self.moves[at + n] += count_moves(self.rows[layer], row, self.slots_G)
            moe_us = float(times_NLG[n].max(axis=1).sum())
            added += self._progress(moe_us + world.non_moe_us)
            self.step_us[at + n], self.copying_us[at + n] = moe_us + added, added
        self.latencies_NG[at : at + stop - start] = times_NLG.sum(axis=1)

    def _progress(self, work_us: float) -> float:
        """Let the transfer go on while a step does `work_us`; by how much the step takes longer."""
        if self.going is None:
            return 0.0
        self.going.left_us, slower_us = beside(self.going.left_us, work_us, self.world.migration.slowdown)
        return slower_us

    def _foresee(self, now: int, stop: int) -> None:
        """Put in force, at no cost, what is best for the steps to come."""
        world, strategy = self.world, cast(Foreseeing, self.strategy)
        factors_NG = world.schedule.factors(now, stop, len(self.slots_G))
        wanted = strategy.foresee(world.traces.counts[now:stop], factors_NG, self.slots_G)
        self._check(wanted)
        moves = sum(map(lambda a, b: count_moves(a, b, self.slots_G), self.rows, wanted.physical_to_logical))
        self.moves[now - world.first_step] += moves
        if moves:
            self.decisions.append(Decided(step=now, moves=moves, reason="knows the steps to come"))
        self.rows = list(wanted.physical_to_logical)

    def _change(self, now: int, rank: int, gone: bool) -> None:
        """A rank fails or returns: everything stops until its experts are elsewhere, or back."""
        world, migration = self.world, self.world.migration
        before, before_G = self.rows, self.slots_G
        if gone:
            load_LE = world.traces.counts[max(0, now - world.context.window) : now].mean(axis=0)
            self.left, self.left_G = before, before_G
            self.rows, self.slots_G = evacuate(before, before_G, rank, load_LE)
        else:
            self.rows, self.slots_G = readmit(before, before_G, self.left, self.left_G, rank), self.left_G
        what = f"rank {rank} {'failed' if gone else 'returned'}"
        if self.ruled:
            self.rows = self._kept(what)
        moved, stall_us = 0, 0.0
        for old, new in zip(before, self.rows, strict=True):
            in_G, out_G = traffic(old, new, before_G, self.slots_G)
            moved += int(in_G.sum())
            stall_us += migration.reload_us(in_G) if gone else migration.transfer_us(in_G, out_G)
        if not hasattr(self.strategy, "foresee"):  # which pays for no copying at all
            self.stall_us += stall_us + migration.commit_us
        self.going, self.queue = None, deque()
        self.moves[now - world.first_step] += moved
        self.decisions.append(Decided(step=now, moves=moved, reason=what))
        self.strategy.confirm(self._in_force())

    def _kept(self, what: str) -> list[Row]:
        """The rows with as few changes as make them keep the rules, in the slots that there are now."""
        problems = self.world.context.problems(self.world.traces.counts[:1], slots=self.slots_G)
        rows = []
        for problem, row in zip(problems, self.rows, strict=True):
            broken = problem.rules is not None and problem.rules.broken(row, self.slots_G)
            found = nearest_row(problem, row) if broken else row
            if found is None:
                raise InputError("rules", what, "no placement that keeps them was found then")
            rows.append(found)
        return rows

    def _check(self, placement: Placement) -> None:
        known = getattr(self, "slots_G", self.world.context.slots_per_rank)
        if not np.array_equal(placement.slots_per_rank, known):
            raise InputError(
                self.strategy.name, placement.slots_per_rank, f"a placement with slots per rank {known.tolist()}"
            )

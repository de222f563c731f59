"""Experts duplicated per batch, where a predictor says that the next one goes (MoE-GPS, arXiv:2506.07366)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError, UnsupportedError
from gemopt.latency import FloatArray, pack
from gemopt.placement import EMPTY, Placement, default_slots
from gemopt.predict import PREDICTORS, shares_of
from gemopt.predict import make as make_predictor
from gemopt.predict.base import Batch, Steps, require
from gemopt.problem import Problem
from gemopt.replay.copying import beside
from gemopt.replay.moe_gps import as_planned, greedy
from gemopt.replay.result import Track
from gemopt.replay.simulate import World
from gemopt.replay.spreading import Price, copying_us, saved_us, spread, times_of
from gemopt.replay.strategies import Fixed
from gemopt.replay.strategy import Context

PREFIX = "duplication-"
LIFE = 256.0  # batches that the price of a copy is spread over where one is proposed
RECENT = 16  # batches on which new copies must have saved time
TICK = 8  # batches between plans from a distribution, which changes slowly
METHODS = ("latency", "planned", "greedy")
TABLE_LIMIT = 1 << 24


class Duplicated(Fixed):
    """Before each layer of each batch, copies for what a predictor expects; they stay until others need their slot.

    Transfers go on beside the steps. Those of `greedy` are needed at once: what a layer's share of the non-MoE time
    does not cover stalls. Ours begin when the links are free, and the copies are there once they end.

    Parameters
    ----------
    predictor
        Name in `gemopt.predict.PREDICTORS`.
    method
        `latency`: copies by the latencies of the ranks and the price of copying, and the batch, once routed, split over
        them by the same latencies. `planned`: the same copies; the batch is split in the proportions that were best for
        what was expected. `greedy`: MoE-GPS's algorithm on assignments alone; all that it wants is copied, and the
        batch is split in the proportions that were planned.
    contiguous
        Whether to begin with the experts in order and no copies, rather than with what is best on the past.
    """

    def __init__(self, predictor: str, *, method: str = "latency", contiguous: bool = False, name: str = "") -> None:
        super().__init__(name or PREFIX + predictor)
        if method not in METHODS:
            raise InputError("method", method, f"one of {', '.join(METHODS)}")
        self.predictor, self.method = make_predictor(predictor), method
        self.in_order = contiguous

    def first(self, context: Context) -> Placement:
        """With copies where they are best on the past, or in order."""
        bare_G, slots_G = default_slots(context.past.num_experts, len(context.slots_per_rank)), context.slots_per_rank
        if slots_G.sum() == bare_G.sum() or (self.in_order and (bare_G > slots_G).any()):
            limit = f"{self.name} needs more than {bare_G.tolist()}, for copies"
            raise InputError("slots_per_rank", slots_G.tolist(), limit, "more --slots-per-rank")
        if not self.in_order:
            return context.fitted
        row = np.full(int(slots_G.sum()), EMPTY)
        starts_G = np.cumsum(slots_G) - slots_G
        row[np.concatenate([start + np.arange(n) for start, n in zip(starts_G, bare_G, strict=True)])] = np.arange(
            context.past.num_experts
        )
        return context.placement([row] * context.past.num_layers)

    def play(self, world: World) -> Track:
        """All scored steps. A step is shown to the predictor once it has been timed."""
        context, first = world.context, world.first_step
        self._check(world)
        begin = self.start(context)
        self.predictor.fit(context.past)
        steps = world.traces.num_steps - first
        step_us, copying, moves = np.zeros(steps), np.zeros(steps), np.zeros(steps, np.int64)
        batches = Steps(world.traces)
        link = _Link(world.migration.slowdown)
        layers = [_Layer(self, world, begin, layer, link) for layer in range(world.traces.num_layers)]
        for t in range(first, world.traces.num_steps):
            factor_G = world.schedule.factors(t, t + 1, context.profile.num_ranks)[0]
            for layer, each in enumerate(layers):
                expected_E = self._expected(batches.batch(t, layer), each.experts) if self._plans(t - first) else None
                moe_us, added_us, copied = each.step(expected_E, world.traces.counts[t, layer], factor_G)
                step_us[t - first] += moe_us + added_us
                copying[t - first] += added_us
                moves[t - first] += copied
            slower_us = link.progress(step_us[t - first] + world.non_moe_us)
            step_us[t - first] += slower_us
            copying[t - first] += slower_us
            self.predictor.observe(
                world.traces.counts[t], -1 if world.traces.task is None else int(world.traces.task[t])
            )
        return Track(
            strategy=self.name,
            step_us=step_us.tolist(),
            copying_us=copying.tolist(),
            moves=moves.tolist(),
            setup_moves=context.setup_moves(begin),
        )

    def _plans(self, since: int) -> bool:
        return self.predictor.per_token or self.method == "greedy" or since % TICK == 0

    def _expected(self, batch: Batch, experts: int) -> NDArray[np.int64]:
        share_E = shares_of(self.predictor.predict(batch), self.predictor.per_token, experts)
        return np.rint(share_E * batch.size).astype(np.int64)

    def _check(self, world: World) -> None:
        require(world.traces, self.predictor.needs, self.predictor.name)
        if any(event.fails for event in world.schedule.events):
            raise UnsupportedError("--event", "fail", f"{self.name} does not play failures", "use controller")
        largest = int(world.traces.counts.sum(axis=2, dtype=np.int64).max())
        if largest >= TABLE_LIMIT:
            raise UnsupportedError(
                "Traces.counts", largest, f"{self.name} takes less than {TABLE_LIMIT} a layer and step", "leave it out"
            )


class _Link:
    """The transfer that goes on beside the steps: one at a time, for all layers share the links."""

    def __init__(self, slowdown: float) -> None:
        self.slowdown, self.left_us, self.free = slowdown, 0.0, True

    def begin(self, transfer_us: float) -> None:
        """Take the links."""
        self.left_us, self.free = transfer_us, False

    def progress(self, work_us: float) -> float:
        """By how much a step of `work_us` takes longer."""
        self.left_us, slower_us = beside(self.left_us, work_us, self.slowdown)
        return slower_us


class _Layer:
    """One layer from batch to batch: which copies are in memory, and what a batch takes.

    coming_GE: those there will be once what is on the links has arrived. expected_E: as last planned for.
    """

    expected_E: NDArray[np.int64]

    def __init__(self, strategy: Duplicated, world: World, start: Placement, layer: int, link: _Link) -> None:
        cost, migration = world.context.cost, world.migration
        self.method, self.experts, self.known = strategy.method, start.num_experts, world.split_us
        row_P, rank_P = start.physical_to_logical[layer], start.rank_of_slot
        held = row_P != EMPTY
        self.present_GE = np.zeros((start.num_ranks, self.experts), dtype=np.bool_)
        self.present_GE[rank_P[held], row_P[held]] = True
        past_TE = world.context.past.counts[:, layer]
        self.home_E = homes(self.present_GE, Problem.make(past_TE, cost.features, cost.latencies, start.slots_per_rank))
        self.present_GE[self.home_E, np.arange(self.experts)] = False
        self.spare_G = start.slots_per_rank - np.bincount(self.home_E, minlength=start.num_ranks)
        largest = int(world.traces.counts[:, layer].sum(axis=1).max())
        grid = np.arange(largest + 2)
        table_FN = np.stack([feature.of(grid) for feature in cost.features]).astype(np.float64)
        share_us = world.non_moe_us / world.traces.num_layers
        self.beside = strategy.method != "greedy"
        hidden_us = np.inf if self.beside else share_us
        expert_us = migration.expert_bytes / migration.bytes_per_s * 1e6
        price = Price(expert_us, hidden_us, migration.slowdown, migration.commit_us, LIFE)
        self.link, self.share_us = link, share_us
        self.coming_GE: NDArray[np.bool_] | None = None
        self.given = (price, table_FN, pack(cost.latencies))
        self.recent: deque[NDArray[np.int64]] = deque(maxlen=RECENT)
        self.missed_us, self.since = 0.0, 0

    def step(self, expected_E: Any, counts_E: NDArray[Any], factor_G: Any) -> tuple[float, float, int]:
        """(makespan, what copying adds, experts copied) of a batch of `counts_E` when `expected_E` was expected."""
        counts_E = counts_E.astype(np.int64)
        added_us, copied = self._arrived(), 0
        if self.method == "greedy":
            plan_GE, used_GE = greedy(expected_E, self.home_E, self.spare_G)
            x_GE = as_planned(counts_E, plan_GE, self.home_E)
            added_us, copied = self._copy(used_GE, expected_E)
        elif expected_E is not None and self.link.free:
            _, used_GE = spread(expected_E, self.home_E, self.present_GE, self.spare_G, True, *self.given)
            if self._pays(used_GE, expected_E):
                stall_us, copied = self._copy(used_GE, expected_E)
                added_us += stall_us
        if self.method == "planned":
            self.expected_E = self.expected_E if expected_E is None else expected_E
            x_GE = as_planned(counts_E, self._split(self.expected_E), self.home_E)
        if self.method != "greedy":
            self.recent.append(counts_E)
            self.since += 1
        times_G = self._times(counts_E) if self.method == "latency" else times_of(x_GE, *self.given[1:])
        return float((times_G * factor_G).max()), added_us, copied

    def _times(self, counts_E: NDArray[np.int64]) -> FloatArray:
        """[G] of a batch split by latency; strategies that hold the same copies ask only once."""
        asked = (counts_E.tobytes(), self.home_E.tobytes(), self.present_GE.tobytes())
        if asked not in self.known:
            self.known[asked] = times_of(self._split(counts_E), *self.given[1:])
        return self.known[asked]

    def _split(self, counts_E: NDArray[np.int64]) -> NDArray[np.int64]:
        """[G, E] over the copies that are there, by latency."""
        x_GE: NDArray[np.int64] = spread(counts_E, self.home_E, self.present_GE, self.spare_G, False, *self.given)[0]
        return x_GE

    def _pays(self, used_GE: NDArray[np.bool_], expected_E: NDArray[np.int64]) -> bool:
        """Whether to make copies: once they save what they cost, in this batch as expected and in those before.

        Nobody knows for how long copies are of use. As with renting or buying skis, they are made when so much has been
        missed without them as they cost; what the last batches would have saved stands for all since the last plan.
        """
        since, self.since = self.since, 0
        if not (used_GE & ~self.present_GE).any():
            return False
        sides = (self.home_E, self.present_GE, self._kept(used_GE, expected_E), self.spare_G, *self.given)
        cost_us, now_us = self._cost(used_GE), saved_us(expected_E[None], *sides)
        if cost_us and self.recent:
            self.missed_us = max(0.0, self.missed_us + since * saved_us(np.stack(self.recent), *sides))
        if now_us + self.missed_us <= cost_us:
            return False
        self.missed_us = 0.0
        return True

    def _copy(self, used_GE: NDArray[np.bool_], expected_E: NDArray[np.int64]) -> tuple[float, int]:
        """(microseconds that copying adds now, copies made); those that the links take longer for come later."""
        (in_G, out_G), added_us = self._traffic(used_GE), self._cost(used_GE)
        transfer_us = max(in_G.max(), out_G.max()) * self.given[0].expert_us
        kept_GE = self._kept(used_GE, expected_E)
        if self.beside and transfer_us > self.share_us:
            self.link.begin(transfer_us)
            self.coming_GE, added_us = kept_GE, 0.0
        else:
            self.present_GE = kept_GE
        return added_us, int(in_G.sum())

    def _arrived(self) -> float:
        """Commit what has arrived; microseconds of that."""
        if self.coming_GE is None or self.link.left_us > 0:
            return 0.0
        self.present_GE, self.coming_GE, self.link.free = self.coming_GE, None, True
        return float(self.given[0].commit_us)

    def _cost(self, used_GE: NDArray[np.bool_]) -> float:
        """Microseconds that making the copies that are not present adds."""
        return float(copying_us(*self._traffic(used_GE), self.given[0]))

    def _traffic(self, used_GE: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """([G] copies received, [G] copies sent)."""
        new_GE = used_GE & ~self.present_GE
        out_G = np.bincount(self.home_E, weights=new_GE.sum(axis=0), minlength=len(self.spare_G)).astype(np.int64)
        return new_GE.sum(axis=1), out_G

    def _kept(self, used_GE: NDArray[np.bool_], expected_E: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[G, E] copies in memory from now on: those used, and of the others that were there the hottest that fit."""
        kept_GE = used_GE.copy()
        for g, room in enumerate(self.spare_G - used_GE.sum(axis=1)):
            idle = np.flatnonzero(self.present_GE[g] & ~used_GE[g])
            kept_GE[g, idle[np.argsort(-expected_E[idle], kind="stable")[:room]]] = True
        return kept_GE


def homes(held_GE: NDArray[np.bool_], problem: Problem) -> NDArray[np.int64]:
    """[E] a holder of each expert, so that no rank has much at home: fewest holders first, then the hottest."""
    finish_G, weight_GE = problem.linearised
    home_E, finish_G = np.zeros(problem.num_experts, np.int64), finish_G.copy()
    for e in np.lexsort((-weight_GE.mean(axis=0), held_GE.sum(axis=0))):
        home_E[e] = np.where(held_GE[:, e], finish_G + weight_GE[:, e], np.inf).argmin()
        finish_G[home_E[e]] += weight_GE[home_E[e], e]
    return home_E


def strategies() -> dict[str, Callable[[], Duplicated]]:
    """`duplication-<predictor>` for every predictor."""
    return {PREFIX + name: (lambda name=name: Duplicated(name)) for name in PREDICTORS}  # type: ignore[misc]

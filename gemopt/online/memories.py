"""What is remembered of past steps, and which of it describes the steps to come.

Steps are kept in blocks of `TICK`. When there are too many, the two most alike of the old blocks become one, so that
rare traffic is not forgotten. Four memories weigh the blocks: two that forget at different rates, one that does not,
and one by likeness to the last steps, which brings back traffic that was seen before. Each predicts the next block's
loads; how well it did lately decides its say.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import FloatArray
from gemopt.online.policy import TICK, Policy

Array = NDArray[Any]
NAMES = ("fast", "slow", "all", "alike")
SHARPNESS = 8.0  # a memory that is x times as far off has its weight multiplied by exp(-SHARPNESS (x - 1))
FOCUS = 3.0  # a block that is x noises further off than sampling explains has exp(-FOCUS (x - ALLOWED)) of its weight
ALLOWED = 0.25  # noises that a block may be further off
RESOLUTION = 1e-6  # of distances in float32
SCORE_TICKS = 8.0  # time constant of the memories' scores
USUAL_TICKS = 16.0  # of what is usual
SUDDEN, CLEARLY = 6.0, 1.4  # a change: beyond the usual by so many mean deviations, and by this factor
QUERY_TICKS = 4  # last blocks that are compared with past ones
RECENT_TICKS = 32  # blocks that are not merged yet
FRESH_TICKS = 8  # for which a change counts as recent
AHEAD_TICKS = 8  # for how long it is looked whether a memory that forgets foretells better than the one that does not
FORGETFUL = NAMES.index("all")  # memories before this one forget
LEAST_LEFT = float(np.exp(-2.0))  # of a lead, which so is taken to last for half of AHEAD_TICKS at least
REGIMES = 1024  # last stretches of one traffic whose beginnings are known


class Memories:
    """Blocks of past steps with the weights that four memories give them.

    counts: [B, TICK, L, E]; sums: [B, L * E] total of each block and roots: of its shares; overlaps: [B, B] of roots;
    steps: [B] how many it stands for; last: [B] index of its newest tick, -1 where there is no block yet. scores: [4]
    mean distance of what each memory predicted. pending: [n, L, E] last steps, too few for a block yet. usual, spread:
    mean and mean deviation of the distance between a prediction and what came; drift: the largest of the blocks that
    came last. since: first tick after the last sudden change; changes: how many there were; starts: [R] first ticks of
    the last stretches of one traffic. foretold: [A, 3, L * E] roots that the first three memories predicted in the last
    ticks since the last change, the latest last. lead: [2, 2] by how much closer memories that forget come than the one
    that does not: at once, and after AHEAD_TICKS.
    """

    def __init__(self, policy: Policy, num_layers: int, num_experts: int) -> None:
        self.policy = policy
        self.shape = (num_layers, num_experts)
        room, size = policy.keep_steps // TICK, num_layers * num_experts
        self.counts = np.zeros((room, TICK, num_layers, num_experts), np.int32)
        self.sums, self.roots = np.zeros((room, size), np.float32), np.zeros((room, size), np.float32)
        self.overlaps = np.zeros((room, room), np.float32)
        self.steps = np.zeros(room)
        self.last = np.full(room, -1)
        self.pending = np.zeros((0, num_layers, num_experts), np.int64)
        self.ticks = self.since = self.changes = 0
        self.starts = np.zeros(1, np.int64)
        self.scores = np.zeros(len(NAMES))
        self.usual = self.spread = self.drift = 0.0
        self.foretold = np.zeros((0, FORGETFUL + 1, num_layers * num_experts), np.float32)
        self.lead = np.zeros((2, FORGETFUL))

    @property
    def size(self) -> int:
        """B, blocks so far."""
        return min(self.ticks, len(self.last))

    @property
    def say(self) -> FloatArray:
        """[4] weight of each memory; sums to 1."""
        best = self.scores.min()
        weights = np.exp(-SHARPNESS * (self.scores / best - 1)) if best > 0 else (self.scores <= best).astype(float)
        return np.asarray(weights / weights.sum())

    @property
    def lifetime_steps(self) -> float:
        """Expected steps for which what is known of the traffic holds.

        What has come back stays as long as it stayed before, so that a burst moves nothing that would come too late.
        Else the traffic ends suddenly, by the mean time between changes, begun with the policy's horizon; or by and by,
        as the lead of the memories that forget does.
        """
        last = self.last[: self.size]
        earlier = last < self.starts[-1]
        weights = self.weights()[earlier] if self.fresh else np.zeros(0)
        if weights.sum() > 0.5:
            stretch = np.maximum(np.searchsorted(self.starts, last[earlier], side="right") - 1, 0)
            stayed = float(np.average(np.diff(self.starts)[stretch], weights=weights))
            left = stayed - float(self.ticks - self.starts[-1]) - 1  # a tick passes before it is seen to have gone
            return max(left * TICK, 1.0)
        return float(1 / (1 / self.unchanged_steps + self.say[:FORGETFUL] @ self._fading()))

    @property
    def unchanged_steps(self) -> float:
        """Mean steps between sudden changes, begun with the policy's horizon."""
        return (self.ticks * TICK + self.policy.horizon_steps) / (self.changes + 1)

    @property
    def fresh(self) -> bool:
        """Whether the last change is a recent one."""
        return self.changes > 0 and self.ticks - self.since <= FRESH_TICKS

    @property
    def recalled(self) -> bool:
        """Whether traffic that was seen before has just come back: most of what counts is from before the change."""
        return self.fresh and float(self.weights()[self.last[: self.size] < self.since].sum()) > 0.5

    def take(self, counts_NLE: Array) -> bool:
        """Remember any number of steps; whether the traffic changed suddenly with one of the blocks that they fill."""
        self.pending = np.concatenate([self.pending, counts_NLE])
        changed, drifts = False, []
        while len(self.pending) >= TICK:
            changed = self.add(self.pending[:TICK]) or changed
            drifts.append(self.drift)
            self.pending = self.pending[TICK:]
        self.drift = max(drifts, default=self.drift)
        return changed

    def add(self, counts_NLE: Array) -> bool:
        """Remember TICK more steps; whether the traffic changed suddenly with them."""
        sums = counts_NLE.sum(axis=0, dtype=np.float64).ravel().astype(np.float32)
        changed = False
        if self.ticks:
            losses = self._listen(self._roots(sums))
            self.drift = float(losses @ self.say)
            changed = self._judge(losses)
        self._store(counts_NLE, sums)
        self.ticks += 1
        if changed:
            self.foretold = self.foretold[:0]
            self.since = self.ticks - 1
            self.scores = self._misses(sums)  # only what describes the new traffic counts now
            self.changes += 1
            if not self._goes_on():
                self.starts = np.append(self.starts, self.since)[-REGIMES:]
        return changed

    def weights(self) -> FloatArray:
        """[B] weight of each block in the mixture of the memories, in order of storage; sums to 1."""
        return np.asarray(self.say @ self._weights())

    def sample(self, most: int) -> tuple[NDArray[np.int64], FloatArray]:
        """([n, L, E] counts, [n] weights) of at most `most` steps that stand for all that count now."""
        steps, weights = resample(np.repeat(self.weights() / TICK, TICK), most)
        return self.counts.reshape(-1, *self.shape)[steps].astype(np.int64), weights

    def _goes_on(self) -> bool:
        """Whether new traffic surprises again, as it does until it is known: it is most like its own first ticks."""
        begun, last = int(self.starts[-1]), self.last[: self.size]
        likeness = self._likeness()
        own, earlier = likeness[(last >= begun) & (last < self.since)], likeness[last < begun]
        return self.since - begun <= QUERY_TICKS and bool(own.max(initial=0.0) >= earlier.max(initial=0.0))

    def _fading(self) -> FloatArray:
        """[2] share of the lead of each memory that forgets which is gone with every step; 0 where none is known."""
        now, after = self.lead
        left = np.clip(np.divide(after, now, out=np.ones_like(now), where=now > 0), LEAST_LEFT, 1.0)
        return np.asarray(-np.log(left) / (AHEAD_TICKS * TICK))

    def _listen(self, roots: FloatArray) -> FloatArray:
        """[4] distance of what each memory predicts from what came; see how far ahead that goes."""
        predicted = self._predicted()
        losses = self._distances(predicted, roots)
        if len(self.foretold) == AHEAD_TICKS:
            pair = np.stack([losses[: FORGETFUL + 1], self._distances(self.foretold[0], roots)])
            self.lead = self.lead + (pair[:, FORGETFUL:] - pair[:, :FORGETFUL] - self.lead) / USUAL_TICKS
        self.foretold = np.concatenate([self.foretold, predicted[None, : FORGETFUL + 1]])[-AHEAD_TICKS:]
        return losses

    def _misses(self, sums: FloatArray) -> FloatArray:
        """[4] distance of what each memory predicts from the loads [L * E]."""
        return self._distances(self._predicted(), self._roots(sums))

    def _predicted(self) -> FloatArray:
        """[4, L * E] roots of the shares that each memory predicts."""
        per_step = (self._weights() / self.steps[: self.size]).astype(np.float32)
        return np.stack([self._roots(each) for each in per_step @ self.sums[: self.size]])

    def _judge(self, losses: FloatArray) -> bool:
        """Take the new distances into the scores and into what is usual; whether they are far beyond it."""
        if self.ticks == 1:
            self.scores, self.usual, self.spread = losses, self.drift, 0.5 * self.drift
            return False
        sudden = self.drift > max(self.usual + SUDDEN * self.spread, CLEARLY * self.usual) and self.ticks > 2
        if sudden:
            return True
        pace = max(1 / SCORE_TICKS, 1 / self.ticks)
        self.scores = (1 - pace) * self.scores + pace * losses
        pace = max(1 / USUAL_TICKS, 1 / self.ticks)
        self.spread += pace * (abs(self.drift - self.usual) - self.spread)
        self.usual += pace * (self.drift - self.usual)
        return False

    def _weights(self) -> FloatArray:
        """[4, B] weights of the blocks in each memory; every row sums to 1."""
        steps, age = self.steps[: self.size], (self.ticks - 1 - self.last[: self.size]) * TICK
        rows = [steps * np.exp(-age / tau) for tau in (self.policy.fast_steps, self.policy.slow_steps)]
        rows += [steps, steps * self._likeness()]
        weights = np.stack(rows)
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))

    def _likeness(self) -> FloatArray:
        """[B] how alike each block is to the last ones since the last change; 1 for traffic that cannot be told apart.

        Two samples of the same traffic differ, too: a tick by as much as is usual, a block of several ticks by less.
        What counts is how much further off a block is, in units of that.
        """
        own = self.last[: self.size] >= max(self.since, self.ticks - QUERY_TICKS)
        asked = self._roots(self.sums[: self.size][own].sum(axis=0))
        noise = max(self.usual, RESOLUTION)
        sampled_B = 1 / own.sum() + TICK / self.steps[: self.size]
        excess_B = self._distances(self.roots[: self.size], asked) / noise - sampled_B
        excess_B[own] = 0.0  # they are part of what is asked for
        return np.asarray(np.exp(-FOCUS * np.maximum(excess_B - ALLOWED, 0.0)))

    def _roots(self, sums: Array) -> Array:
        """[L * E] square roots of the load shares within each layer; equal shares where there is no load."""
        loads_LE = sums.reshape(self.shape)
        total_L1 = loads_LE.sum(axis=1, keepdims=True)
        equal_LE = np.full_like(loads_LE, 1 / self.shape[1])
        return np.asarray(np.sqrt(np.divide(loads_LE, total_L1, out=equal_LE, where=total_L1 > 0)).ravel())

    def _distances(self, roots: Array, one: Array) -> FloatArray:
        """[N] squared Hellinger distance of shares with roots [N, L * E] from those with `one`, mean over layers."""
        return np.asarray(np.maximum(1 - (roots @ one).astype(np.float64) / self.shape[0], 0.0))

    def _store(self, counts_NLE: Array, sums: Array) -> None:
        at = self.size if self.size < len(self.last) else self._merge()
        self.counts[at], self.sums[at], self.roots[at] = counts_NLE, sums, self._roots(sums)
        self.steps[at], self.last[at] = TICK, self.ticks
        self._compare(at)

    def _compare(self, at: int) -> None:
        row = self.roots @ self.roots[at]
        self.overlaps[at], self.overlaps[:, at] = row, row
        self.overlaps[at, at] = -np.inf

    def _merge(self) -> int:
        """Make one block of the two old ones by which least is lost, with steps of both in proportion; the free index.

        What is lost is Ward's: the distance times a b / (a + b) of their steps. By distance alone large blocks, which
        are less noisy and so more alike, would swallow all others, and with them most of the steps that are kept.
        """
        old = np.flatnonzero(self.last < self.ticks - min(RECENT_TICKS, len(self.last) - 2))
        steps, far = self.steps[old], 1 - self.overlaps[np.ix_(old, old)] / self.shape[0]
        lost = far * (steps * steps[:, None] / (steps + steps[:, None]))
        first, second = divmod(int(lost.argmin()), len(old))
        a, b = sorted((int(old[first]), int(old[second])), key=lambda block: int(self.last[block]))
        both = self.steps[a] + self.steps[b]
        of_a = int(np.clip(round(TICK * self.steps[a] / both), 1, TICK - 1))
        chosen_a, chosen_b = (np.linspace(0, TICK - 1, n).round().astype(int) for n in (of_a, TICK - of_a))
        self.counts[b] = np.concatenate([self.counts[a, chosen_a], self.counts[b, chosen_b]])
        self.sums[b] += self.sums[a]
        self.roots[b] = self._roots(self.sums[b])
        self.steps[b] = both
        self._compare(b)
        return a


def resample(weights_N: FloatArray, most: int) -> tuple[NDArray[np.int64], FloatArray]:
    """(indices, weights) of at most `most` of N weighted steps that stand for all: systematic resampling."""
    chosen = np.flatnonzero(weights_N > 1e-3 * weights_N.max())
    if len(chosen) <= most:
        weights = weights_N[chosen]
        return chosen, weights / weights.sum()
    cumulative = np.cumsum(weights_N[chosen]) / weights_N[chosen].sum()
    picks = np.searchsorted(cumulative, (np.arange(most) + 0.5) / most)
    index, times = np.unique(np.minimum(picks, len(chosen) - 1), return_counts=True)
    return chosen[index], times / most

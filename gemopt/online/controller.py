"""The controller: counts and latencies of the last steps in, moves that pay for themselves out.

Pure and deterministic: no threads, no clock, no randomness. The same calls give the same decisions, in a replay, in the
executor or in an engine.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.costs import CostModel, fit, scaled
from gemopt.evaluate import rank_times
from gemopt.exceptions import InputError, check_kind, refuse_unused
from gemopt.latency import FloatArray, Latency
from gemopt.layer_rules import rules_of
from gemopt.online import state
from gemopt.online.compiled import Compiled
from gemopt.online.decision import Decision, Weights, joined, static_weights, travel_between, unmade
from gemopt.online.earlier import FRESH_STEPS, Earlier, ways_back
from gemopt.online.inputs import check_clock, check_network, check_placement, counts_from, latencies_from
from gemopt.online.memories import Memories
from gemopt.online.planner import Prices, Proposal, choose, effective_steps, propose_all, rechosen, rechosen_all, settle
from gemopt.online.policy import TICK, Policy
from gemopt.online.promises import Promises
from gemopt.online.realised import Realised, Times
from gemopt.online.speeds import Speeds, log_ratios
from gemopt.placement import GivenPlacement, Placement
from gemopt.problem import Problem
from gemopt.profile import Profile
from gemopt.solvers.search.moves import Waypoint
from gemopt.splits.senders import Senders
from gemopt.words import counted

EXPERT_BYTES = 9.4e6  # of Qwen3-30B-A3B in bf16
LONG_AGO = -(2**40)  # a step: layers that moved then may move at once
WORK = 1 << 14  # steps times experts of a layer's plan: bounds the time of a decision where experts are many


class Controller:
    """Decides now and then which experts to move.

    Parameters
    ----------
    profile
        Measured devices (or their path), or a fitted cost model.
    placement
        In force now (or its path). Its rules hold for every placement that follows, whatever they cost: where it breaks
        some itself, the first decision moves what they ask for.
    policy
        Knobs.
    cost
        A fitted cost model; fitted from the profile when absent.
    senders
        Who sends to copies of the nearest split: `uniform`, since counts do not say.

    Raises
    ------
    InputError
        When the placement is of another number of ranks than the profile, its rules are about what there is not, or it
        has copies of the nearest split whose senders, or whose ranks' nodes, are not known.
    """

    def __init__(
        self,
        profile: Profile | CostModel | str | os.PathLike[str],
        placement: GivenPlacement,
        policy: Policy | None = None,
        *,
        cost: CostModel | None = None,
        senders: Senders | str | None = None,
    ) -> None:
        self.profile: Profile | None = None
        if isinstance(profile, (Profile, str, os.PathLike)):
            self.profile = Profile.of(profile)
            self.cost = cost or fit(self.profile)[0]
        else:
            refuse_unused({"cost": cost}, "the profile is a fitted cost model")
            self.cost = profile
        placement = Placement.of(placement)
        known = None if self.profile is None else self.profile.model.expert_bytes
        self.senders = Senders.asked_by(senders, placement.split)
        self.policy = policy = policy or Policy()
        check_kind("policy", policy, Policy)
        self.expert_bytes = float(policy.expert_bytes or known or EXPERT_BYTES)
        self.nodes_G = None if self.profile is None else np.array(self.profile.node_of_rank)
        self.memories = Memories(policy, placement.num_layers, placement.num_experts)
        self.speeds = Speeds(policy, len(self.cost.latencies))
        self.promises = Promises(policy, placement.num_slots)
        self.earlier = Earlier(placement.num_layers, placement.num_slots)
        self.scaled = self.cost  # with every rank as fast as it is now
        self.moved_at = np.full(placement.num_layers, LONG_AGO)
        self.steps = self.blind_until = self.moved = self.latest = 0  # latest: moves of the last step's decision
        self.planned_at = self.speeds_at = LONG_AGO  # speeds_at: when those of ranks changed last
        self.now_s: float | None = None
        self._compiled = Compiled()
        self.check(placement)
        self.rules = rules_of(placement)
        self.placement = placement
        self.realised = Realised(placement)

    def step(self, counts_NLE: object, latencies_NG: object = None, *, now_s: float | None = None) -> Decision:
        """Take the last steps in, and decide.

        Never raises for what it is given: what cannot be used leaves everything as it was and is the decision's reason.

        Parameters
        ----------
        counts_NLE
            [n, L, E] assignments of the last n steps.
        latencies_NG
            [n, G] measured microseconds of every rank at these steps, summed over the MoE layers; NaN, None or 0 where
            a rank said nothing.
        now_s
            Seconds on the caller's clock, only to notice that it goes backwards.
        """
        self.latest = 0
        try:
            counts = counts_from(counts_NLE, self.memories.shape)
            latencies = latencies_from(latencies_NG, len(counts), len(self.scaled.latencies))
            self.now_s = check_clock(now_s, self.now_s)
        except InputError as error:
            return self._keep(f"refused: {error}", refused=True)
        window = [self._problem(counts, layer, self.scaled.latencies) for layer in range(counts.shape[1])]
        rows = self.placement.physical_to_logical

        def times(rows_LP: NDArray[np.int64], weights: Weights) -> FloatArray:
            return np.stack([rank_times(*each) for each in zip(window, rows_LP, weights, strict=True)])

        times_LNG, factors_G = times(rows, static_weights(self.placement)), self.speeds.relative_G
        news = self._listen(latencies, times_LNG.sum(axis=0), times)
        known = self.memories.ticks
        changed = self._remember(counts)
        if changed:
            news.append("the traffic changed")
            self.realised.forget(self.placement)
        else:
            self.promises.check(window)
        if news:
            self.earlier.note(rows, self.steps)
        if self.memories.ticks > known:
            self.promises.forget(self.placement.num_slots)
        times_LNG = times_LNG * (self.speeds.relative_G / factors_G)
        imbalance = float(times_LNG.max(axis=2).mean() / mean) if (mean := times_LNG.mean()) > 0 else float("nan")
        return self._decide(news, changed, imbalance, known)

    def warm(self) -> None:
        """Load or compile the kernels of decisions before serving, once per installation a minute or two; else changes
        nothing."""
        twin = copy.deepcopy(self)
        rows, first = self.placement.physical_to_logical, self.placement.rank_of_slot == 0
        counts_NLE = np.ones((2 * TICK, *self.memories.shape), np.int64)
        for layer, row in enumerate(rows):
            counts_NLE[:, layer, row[first & (row >= 0)]] = 99
        for _ in range(2):  # the second decision looks back at what the first one promised
            twin.step(counts_NLE)

    def remember(self, counts_NLE: object) -> None:
        """Learn from [n, L, E] steps of the past without deciding: what the placement in force was fitted on.

        Raises
        ------
        InputError
            When they are of another network.
        """
        self._remember(counts_from(counts_NLE, self.memories.shape))
        self.memories.changes = 0  # how fast traffic changes is learnt while serving

    def weigh(self, expert_bytes: float) -> None:
        """Take over what an expert of the live model weighs, in bytes, unless the policy says it."""
        self.expert_bytes = float(self.policy.expert_bytes or expert_bytes)

    def confirm(self, placement: GivenPlacement) -> None:
        """Go on from the placement that is really in force, under the rules of before; moves not made do not count.

        Raises
        ------
        InputError
            When it is of another network or group.
        """
        self.check(placement := Placement.of(placement))
        check_network(placement, self.placement)
        self.moved -= min(self.latest, unmade(self.placement, placement))
        if (placement.slots_per_rank != self.placement.slots_per_rank).any():
            self.promises.forget(placement.num_slots)
            self.earlier = Earlier(placement.num_layers, placement.num_slots)
            self.realised.forget(placement)
        before, self.placement = self.placement, self.ruled(placement)
        if self.placement != before:
            self.planned_at = LONG_AGO

    def check(self, placement: Placement) -> None:
        """Raise `InputError` unless this placement can be followed."""
        check_placement(placement, len(self.cost.latencies), self.profile, self.senders)

    def ruled(self, placement: Placement) -> Placement:
        """A placement of the same network with the rules in force."""
        rules = self.placement.rules
        return placement if placement.rules == rules else placement.under(rules, self.placement.node_of_rank)

    def save(self, path: str | os.PathLike[str], notes: dict[str, Any] | None = None) -> None:
        """Write what was learnt, and notes (JSON), atomically; `InputError` where it cannot be written."""
        state.save(self, path, notes or {})

    def load(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Go on as the controller that wrote the file would; its notes.

        Raises
        ------
        InputError
            When the file was changed, or is not of this network, these devices and this policy.
        """
        return state.load(self, path)

    def _listen(self, latencies: FloatArray | None, expected_NG: FloatArray, times: Times) -> list[str]:
        """Take latencies in; what is worth saying. expected_NG, times (see `Realised`): with the speeds in force."""
        factors_G, known_G = self.speeds.relative_G, self.speeds.factors_G
        predicted_NG = expected_NG / factors_G
        unsure = max(0, self.blind_until - self.steps)
        self.steps += len(predicted_NG)
        if latencies is None:
            self.realised.pass_over(self.placement, len(predicted_NG))
            return []
        told_NG = log_ratios(latencies[unsure:], predicted_NG[unsure:])
        news, changed = self.speeds.take(latencies, told_NG)
        told_NG = self.speeds.levels(told_NG)
        self.realised.take(self.placement, told_NG, len(latencies), lambda *each: times(*each) / factors_G)
        if self.speeds.factors_G is not known_G:
            self.rescale()
        if changed:
            self.moved_at[:], self.speeds_at = LONG_AGO, self.steps
        return news

    def rescale(self) -> None:
        """Take the speeds in force over into the latencies that plans are judged by."""
        self.scaled = scaled(self.cost, self.speeds.relative_G)
        self._compiled = Compiled()

    def _problem(
        self, counts: NDArray[np.int64], layer: int, latencies: Sequence[Latency], weights: FloatArray | None = None
    ) -> Problem:
        slots_G, split = self.placement.slots_per_rank, self.placement.split
        return Problem.make(counts[:, layer], self.cost.features, latencies, slots_G, weights, self.nodes_G, split)

    def _remember(self, counts: NDArray[np.int64]) -> bool:
        """Whether the traffic changed suddenly within these steps."""
        changed = self.memories.take(counts)
        if changed:
            self.moved_at[:] = LONG_AGO
        return changed

    def _keep(self, reason: str, **fields: float | bool) -> Decision:
        seen = {"drift": self.memories.drift, "trust": self.realised.share}
        return Decision(self.placement, reason=reason, **seen, **fields)  # type: ignore[arg-type]

    def _decide(self, news: list[str], changed: bool, imbalance: float, known: int) -> Decision:
        say = "; ".join(news)
        if not self.memories.ticks or (self.memories.ticks == known and not news):
            missing = counted(TICK - len(self.memories.pending), "more step")
            return self._keep(joined(say, f"waiting for {missing}"), imbalance=imbalance)
        if not news and self.steps - self.planned_at < self.policy.plan_every_steps:
            return self._keep("nothing changed since the last plan", imbalance=imbalance)
        self.planned_at = self.steps
        failed_G = self.speeds.failed_G
        begin = self.placement.physical_to_logical
        remembered, trusted = self._remembered()
        problems, rows, said = settle(remembered, begin, failed_G)
        say = joined(say, said)
        if said.startswith("infeasible"):
            return self._keep(say, imbalance=imbalance)
        weights, gain_us = rechosen_all(problems, begin, rows, static_weights(self.placement))
        proposals = {each.layer: each for each in self._proposals(problems, rows, weights, trusted)}
        for layer, waypoint in choose(list(proposals.values()), self._most_moves()).items():
            rows[layer] = waypoint.row
            weights[layer], after_us = rechosen(problems[layer], waypoint)
            gain_us += proposals[layer].way[0].objective_us - after_us
        return self._decision(rows, weights, gain_us, say, imbalance, changed)

    def _most_moves(self) -> int | None:
        policy, most = self.policy, self.policy.max_moves
        if policy.moves_per_1000_steps is None:
            return most
        saved = max(0, int(policy.moves_per_1000_steps * self.steps / 1000) - self.moved)
        return saved if most is None else min(most, saved)

    def _remembered(self) -> tuple[list[Problem], float]:
        """(one problem per layer on the steps that count now, to how many equally weighted ones they amount)."""
        most = min(self.policy.plan_steps, max(TICK * TICK, WORK // self.memories.shape[1]))
        pool_NLE, weights = self.memories.sample(most)
        problems = [
            replace(self._problem(pool_NLE, layer, self.scaled.latencies, weights), rules=rules)
            for layer, rules in enumerate(self.rules)
        ]
        return problems, effective_steps(weights)

    def _proposals(
        self, problems: list[Problem], rows: NDArray[np.int64], weights: Weights, trusted: float
    ) -> list[Proposal]:
        # What comes back was seen at length and will stay for a while: it is worth the best placement for it at once.
        least, share, exempt = self.promises.least(trusted), self.realised.share, self.memories.recalled
        # What other speeds ask for serves on while popularity comes and goes.
        slowed = self.steps - self.speeds_at <= FRESH_STEPS
        steps = self.memories.unchanged_steps if slowed else self.memories.lifetime_steps
        prices = Prices.of(self.policy, self.expert_bytes, steps, least, share, exempt)
        into_G = np.where(self.speeds.failed_G, 0, self.placement.slots_per_rank)
        free = [
            layer
            for layer, problem in enumerate(problems)
            if self.steps - self.moved_at[layer] >= self.policy.cool_down_steps
            and problem.counts_TE.any()
            and not self.realised.waits
        ]

        def back(layer: int) -> list[Waypoint]:
            served = self.earlier.of(layer, self.steps)
            return ways_back(problems[layer], rows[layer], served, into_G, self._most_moves())

        found = propose_all(problems, free, rows, weights, prices, self.policy, into_G, self._compiled, back)
        for proposal in found:
            first, last, swaps = proposal.way[0], proposal.way[-1], len(proposal.way) - 1
            gain = 1 - last.objective_us / first.objective_us
            self.promises.make(proposal.layer, first, last, gain, swaps, trusted)
        return found

    def _decision(
        self, rows: NDArray[np.int64], weights: Weights, gain_us: float, say: str, imbalance: float, changed: bool
    ) -> Decision:
        batch, weights_LP = self.policy.batch_bytes / self.expert_bytes, [each for each in weights if each is not None]
        travel = travel_between(self.placement, rows, self.nodes_G, batch, np.array(weights_LP) if weights_LP else None)
        if not travel.moves:
            return self._keep(joined(say, "no swap pays", self.realised.doubt), imbalance=imbalance, changed=changed)
        commits, size = len(travel.rounds), counted(travel.num_moves, "move")
        transfer_us = sum(travel.rounds) * self.expert_bytes / self.policy.bytes_per_s * 1e6
        cost_us = commits * self.policy.commit_us + self.policy.slowdown * transfer_us
        self.moved_at[list(travel.layers)] = self.steps
        self.latest = travel.num_moves
        self.moved += self.latest
        self.placement = travel.placement
        self.blind_until = self.steps + commits + int(np.ceil(transfer_us / max(self.speeds.step_us, 1.0)))
        text = f"{size} in {counted(len(travel.moves), 'layer')}: gain {gain_us:.1f} us a step, cost {cost_us:.0f} us"
        return Decision(
            self.placement, travel.moves, travel.num_moves, gain_us, cost_us, joined(say, text, self.realised.doubt),
            self.memories.drift, imbalance, changed, trust=self.realised.share,
        )  # fmt: skip

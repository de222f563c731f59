"""What all replays of an advice share, made from what the user gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from gemopt.advise.shape import ModelShape
from gemopt.advise.sweep import Bench, slots_that_gain
from gemopt.costs import CostModel, cost_of
from gemopt.exceptions import check_number
from gemopt.placement import Placement, default_slots
from gemopt.profile import Profile
from gemopt.replay import Migration, ReplayResult, replay
from gemopt.replay.strategy import Solved
from gemopt.rules import Rules
from gemopt.traces import Traces, concatenate
from gemopt.words import short


@dataclass(frozen=True, eq=False)
class Case:
    """What the replays share. Slots, bare_G: one per expert; full_G: with copies; room_G: all that memory allows."""

    profile: Profile
    traces: Traces
    cost: CostModel
    migration: Migration
    non_moe_us: float
    fit: float
    window: int
    seed: int
    bare_G: NDArray[np.int64]
    full_G: NDArray[np.int64]
    room_G: NDArray[np.int64]
    rules: Rules | None = None
    solved: Solved = field(default_factory=dict)

    @property
    def spare(self) -> bool:
        """Whether there are slots for copies."""
        return bool((self.full_G > self.bare_G).any())

    @property
    def contiguous(self) -> Placement:
        """Experts in order."""
        traces = self.traces
        return Placement.contiguous(
            traces.num_layers, traces.num_experts, self.profile.num_ranks, layer_ids=list(traces.layer_ids)
        )

    def turned(self) -> Case:
        """As many first steps scored, all others fitted on."""
        scored = self.traces.num_steps - round(self.traces.num_steps * self.fit)
        parts = [self.traces.steps(slice(scored, None)), self.traces.steps(slice(0, scored))]
        return replace(self, traces=concatenate(parts))

    def replay(self, names: Sequence[str], slots_G: NDArray[np.int64], advance: Callable[[], None]) -> ReplayResult:
        """Strategies on the scored steps."""
        return replay(
            self.profile,
            self.traces,
            names,
            window=self.window,
            fit=self.fit,
            slots_per_rank=slots_G.tolist(),
            migration=self.migration,
            non_moe_us=self.non_moe_us,
            seed=self.seed,
            cost=self.cost,
            rules=self.rules,
            on_track=lambda _: advance(),
            solved=self.solved,
        )


def make_case(profile: Profile, traces: Traces, horizon: int | None, memory_bytes: float, shape: ModelShape | None,
          migration: Migration | None, non_moe_us: float | None, window: int, seed: int,
          cost: str | CostModel, rules: Rules | None, scouts: Sequence[str]) -> tuple[Case, list[str]]:  # fmt: skip
    """The case, and what to tell of how it was made. scouts: of `SCOUTS`, those that tell how many slots gain."""
    notes = []
    check_number("--memory", memory_bytes, "bytes from 0 to 1e15", most=1e15)
    migration = migration or Migration.of(profile)
    if shape is not None:
        shape.check(profile, traces)
        notes += shape.doubts(profile)
        if shape.expert_bytes is not None and "expert_bytes" not in migration.model_fields_set:
            migration = migration.model_copy(update={"expert_bytes": shape.expert_bytes})
    fitted = cost_of(cost, profile)
    assignments = float(np.asarray(traces.counts).sum(axis=2).mean())
    if non_moe_us is None and shape is not None:
        tokens = assignments / (traces.top_k or shape.top_k or 1)
        non_moe_us = shape.non_moe_us(
            tokens, assignments, profile.num_ranks, traces.num_layers, migration.bytes_per_s / 1e9
        )
        notes.append(f"{non_moe_us:.0f} us a step outside the MoE layers, from --model: a roofline, not a measurement")
    elif non_moe_us is not None and 0 < non_moe_us < 1:
        notes.append(f"--non-moe-us {non_moe_us:g}: is that in microseconds?")
    if non_moe_us is None:
        non_moe_us = 0.0
        notes.append("nothing known of the time outside the MoE layers: no transfer hides there; give --non-moe-us")
    bare_G = default_slots(traces.num_experts, profile.num_ranks)
    per_slot = migration.expert_bytes * traces.num_layers
    spare = min(int(memory_bytes // per_slot), traces.num_experts - int(bare_G.max()))
    if spare <= 0:
        notes.append(f"no copies: a slot more per rank and layer takes {short(per_slot / 1e9)} GB of --memory")
    scored = traces.num_steps // 2 if horizon is None else min(horizon, traces.num_steps // 2)
    fit = (traces.num_steps - scored) / traces.num_steps
    case = Case(
        profile, traces, fitted, migration, non_moe_us, fit, window, seed, bare_G, bare_G, bare_G + max(0, spare), rules
    )
    if spare <= 0:
        return case, notes
    bench = Bench(profile, fitted, dict.fromkeys(scouts, bare_G), migration, non_moe_us, seed, rules)
    more = slots_that_gain(bench, traces.steps(slice(0, round(traces.num_steps * fit))), spare)
    if more < spare:
        notes.append(f"{more} of the {spare} slots for copies on each rank that --memory allows are used: "
                     "more gained less than 0.3 % on the fitted steps")  # fmt: skip
    return replace(case, full_G=bare_G + more), notes

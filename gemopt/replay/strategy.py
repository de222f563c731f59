"""What a strategy is, what it may know, and the re-solving that several share."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gemopt.costs import CostModel
from gemopt.exceptions import InfeasibleError
from gemopt.latency import FloatArray
from gemopt.layer_rules import LayerRules, layer_rules
from gemopt.migration import count_moves
from gemopt.placement import Placement, Split
from gemopt.problem import Problem
from gemopt.profile import Profile
from gemopt.replay.copying import Migration
from gemopt.rules import Rules
from gemopt.solvers import get
from gemopt.solvers.base import DEFAULT_PATIENCE, Options, Row
from gemopt.solvers.placing import conflict
from gemopt.traces import Traces

IntArray = NDArray[Any]
Solved = dict[Any, Row]  # what was asked -> its answer; whoever asks the same again, in whatever replay, gets it


class Strategy(Protocol):
    """Decides on placements from what has happened; the replay applies them with the cost of copying.

    Attributes
    ----------
    name
        As in tables and `--strategies`.
    period
        Steps until the next call of `observe`; read after `start` and after every call.
    eager
        Whether `observe` is also called at the first scored step, with the window of steps before it.
    stops
        Whether the group stops while experts are copied; otherwise copying overlaps with serving.
    layerwise
        Whether layers are copied and committed one after the other; otherwise together, as `gemopt.executor` does.
    reason
        One line on the last decision.
    """

    name: str
    period: int
    eager: bool
    stops: bool
    layerwise: bool
    reason: str

    def start(self, context: Context) -> Placement:
        """Placement in force at the first scored step."""

    def observe(self, counts_NLE: IntArray, latencies_NG: FloatArray) -> Placement | None:
        """The placement wanted from now on, from the steps since the last call; None: as it is."""

    def confirm(self, placement: Placement) -> None:
        """What is in force, told when it is not what was wanted: a rank failed or returned."""


@dataclass(frozen=True, eq=False)
class Context:
    """What a strategy may know when it starts: devices as profiled, and the steps before those that are scored.

    rules: what placements must keep, except those of engines and contiguous ones, which know none. split: how copies
    share, even or nearest with all ranks sending alike.
    """

    profile: Profile
    cost: CostModel
    past: Traces
    slots_per_rank: NDArray[np.int64]
    window: int
    seed: int
    migration: Migration
    rules: Rules | None = None
    split: Split = Split.EVEN
    solved: Solved = field(default_factory=dict)

    @cached_property
    def contiguous(self) -> Placement:
        """Experts in order, as engines start; spare slots stay empty."""
        problem = replace(self.problems(self.past.counts[:1])[0], rules=None)
        outcome = get("linear").solve(problem, Options(deadline=np.inf), None)
        assert outcome.row is not None
        return self.placement([outcome.row] * self.past.num_layers)

    @cached_property
    def ruled(self) -> list[LayerRules | None]:
        """What the rules ask of every layer.

        Raises
        ------
        InputError
            See `gemopt.layer_rules.layer_rules`.
        InfeasibleError
            When no placement keeps them.
        """
        found = layer_rules(
            self.rules or Rules(), self.past.layer_ids, self.past.num_experts, self.profile.num_ranks,
            self.profile.node_of_rank,
        )  # fmt: skip
        for layer_id, rules in zip(self.past.layer_ids, found, strict=True):
            names = rules and conflict(rules, self.slots_per_rank, full=False)
            if names:
                limit = f"no placement of layer {layer_id} keeps them together"
                raise InfeasibleError("rules", ", ".join(names), limit)
        return found

    @cached_property
    def fitted(self) -> Placement:
        """Solved on all of the past."""
        rows = self.solve(self.problems(self.past.counts), patience=DEFAULT_PATIENCE, seed=self.seed)
        return self.placement(rows).under(self.rules, self.profile.node_of_rank)

    def solve(
        self, problems: Sequence[Problem], *, patience: int = 0, seed: int = 0, starts: Sequence[Row] | None = None
    ) -> list[Row]:
        """One local search per layer, unless it has been made before; see `solve_rows`."""
        asked = [_key(problem, patience, seed + index, None if starts is None else starts[index])
                 for index, problem in enumerate(problems)]  # fmt: skip
        if any(key not in self.solved for key in asked):
            rows = solve_rows(problems, patience=patience, seed=seed, starts=starts)
            self.solved.update(zip(asked, rows, strict=True))
        return [self.solved[key].copy() for key in asked]

    def setup_moves(self, first: Placement) -> int:
        """Experts to move from contiguous placement before a strategy can begin."""
        rows = zip(self.contiguous.physical_to_logical, first.physical_to_logical, strict=True)
        return sum(count_moves(old, new, self.slots_per_rank) for old, new in rows)

    def problems(
        self,
        counts_NLE: IntArray,
        *,
        slots: NDArray[np.int64] | None = None,
        cost: CostModel | None = None,
        weights_N: FloatArray | None = None,
    ) -> list[Problem]:
        """One problem per layer on the given steps, with the rules."""
        cost, slots = cost or self.cost, self.slots_per_rank if slots is None else slots
        return [
            replace(
                Problem.make(
                    counts_NLE[:, layer], cost.features, cost.latencies, slots, weights_N, self.nodes_G, self.split
                ),
                rules=rules,
            )
            for layer, rules in enumerate(self.ruled)
        ]

    @cached_property
    def nodes_G(self) -> NDArray[np.int64]:
        """[G] node of each rank."""
        return np.array(self.profile.node_of_rank)

    def placement(self, rows: Sequence[Row], slots: NDArray[np.int64] | None = None) -> Placement:
        """A placement of this network from one row per layer."""
        return Placement(
            physical_to_logical=np.stack(rows),
            slots_per_rank=self.slots_per_rank if slots is None else slots,
            num_experts=self.past.num_experts,
            layer_ids=list(self.past.layer_ids),
            num_hidden_layers=self.past.num_hidden_layers,
            model=self.past.model,
            split=self.split,
        )


class Foreseeing(Strategy, Protocol):
    """A strategy that is shown the steps to come: a bound for the others, not something to run."""

    def foresee(self, counts_NLE: IntArray, factors_NG: FloatArray, slots_per_rank: NDArray[np.int64]) -> Placement:
        """Placement for the next `period` steps, given them and how slow each rank is going to be."""


def _key(problem: Problem, patience: int, seed: int, start: Row | None) -> tuple[Any, ...]:
    """What the answer of a search without limits depends on, in a replay."""
    digest = hashlib.blake2b(problem.counts_TE.data)
    digest.update(problem.weights_T.data)
    return (
        problem.counts_TE.shape, digest.digest(), problem.features, tuple(each.key for each in problem.latencies),
        problem.slots_per_rank.tobytes(), patience, seed if patience else 0, None if start is None else start.tobytes(),
        pickle.dumps(problem.rules), problem.split, problem.node_of_rank.tobytes(),
    )  # fmt: skip


def solve_rows(
    problems: Sequence[Problem], *, patience: int = 0, seed: int = 0, starts: Sequence[Row] | None = None
) -> list[Row]:
    """One local search per layer, on all cores; the same whatever the machine is doing."""
    solver = get("local-search")

    def one(index: int) -> Row:
        options = Options(deadline=np.inf, patience=patience, seed=seed + index)
        row = solver.solve(problems[index], options, None if starts is None else starts[index]).row
        assert row is not None
        return row

    with ThreadPoolExecutor(min(len(problems), os.cpu_count() or 1)) as pool:
        return list(pool.map(one, range(len(problems))))

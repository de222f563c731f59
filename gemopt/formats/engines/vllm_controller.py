"""The controller as vLLM's EPLB policy: the map in force and a window's loads in, a map with few moves out.

vLLM hands a policy the sum of a window's loads, not its steps. The controller is given as many steps of the mean load:
whole numbers whose fractions are spread over the steps, each expert's in its own phase. Every rank computes the map for
itself, so nothing here depends on time or chance.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.costs import CostModel, fit
from gemopt.evaluate import total
from gemopt.exceptions import InputError
from gemopt.layer_rules import LayerRules
from gemopt.migration import held, keep_in_place
from gemopt.moves import Moves
from gemopt.online.controller import Controller
from gemopt.online.policy import Policy
from gemopt.placement import EMPTY, Placement
from gemopt.problem import Problem
from gemopt.profile import Profile
from gemopt.rules import Rules
from gemopt.solvers.nearest import nearest_row
from gemopt.solvers.placing import conflict
from gemopt.solvers.search.blocs import settled
from gemopt.solvers.search.state import make_costs, make_state
from gemopt.solvers.search.within import copies_within
from gemopt.words import counted

PROFILE, RULES, WINDOW = "GEMOPT_PROFILE", "GEMOPT_RULES", "GEMOPT_WINDOW_STEPS"
WINDOW_STEPS = 1000  # vLLM's default `window_size`
MOST_STEPS = 10**9
STEPS = 64  # that stand for a window
GOLDEN = 0.6180339887498949

IntArray = NDArray[np.int64]
logger = logging.getLogger("vllm.gemopt")


def controlled_policy(path: str, base: type[Any], rules_path: str | None = None) -> type[Any]:
    """A policy class that lets a controller with the profile of `path` decide, under the rules of `rules_path`.

    Raises
    ------
    InputError
        The profile, the rules or the size of the window cannot be used.
    """
    import torch

    profile, rules = Profile.load(path), None if rules_path is None else Rules.load(rules_path)
    if rules is not None and any(rule.layers for _, rule in rules.named()):
        raise InputError(
            f"{RULES}={rules_path}", "layers", "vLLM does not say which layers its rows are of", "name none"
        )
    cost, window = fit(profile)[0], window_steps()
    deciders: dict[tuple[int, ...], Decider] = {}

    class ControlledPlacement(base):  # type: ignore[misc]
        @classmethod
        def rebalance_experts(
            cls,
            weight: Any,
            num_replicas: int,
            num_groups: int,
            num_nodes: int,
            num_ranks: int,
            old_global_expert_indices: Any = None,
        ) -> Any:
            if num_ranks != profile.num_ranks:
                raise InputError(
                    f"{PROFILE}={path}",
                    counted(profile.num_ranks, "device"),
                    f"vLLM runs with {counted(num_ranks, 'rank')}",
                )
            loads_LE = weight.cpu().double().numpy()
            old = None if old_global_expert_indices is None else old_global_expert_indices.cpu().numpy()
            _check(loads_LE, num_replicas, num_ranks, old)
            key = (*loads_LE.shape, num_replicas)
            if key not in deciders:
                deciders[key] = Decider(cost, profile, num_replicas, window, rules)
            return torch.from_numpy(deciders[key].decide(loads_LE, old))

    return ControlledPlacement


def _check(loads_LE: NDArray[np.float64], num_slots: int, num_ranks: int, old: IntArray | None) -> None:
    """Refuse sizes that vLLM should not have; `old` may be of another number of ranks, all with as many slots."""
    if loads_LE.ndim != 2:
        raise InputError("weight", f"shape {loads_LE.shape}", "loads [layers, experts]")
    if num_slots < num_ranks or num_slots % num_ranks:
        raise InputError("num_replicas", num_slots, f"a multiple of {num_ranks} ranks", "change num_redundant_experts")
    if old is None:
        return
    layers, experts = loads_LE.shape
    if old.ndim != 2 or len(old) != layers or old.shape[1] % (num_slots // num_ranks) or old.dtype.kind not in "iu":
        limit = f"a row for each of {layers} layers, of ranks with {num_slots // num_ranks} slots each"
        raise InputError("old_global_expert_indices", f"{old.dtype} of shape {old.shape}", limit)
    if old.max(initial=-1) >= experts:
        raise InputError("old_global_expert_indices", int(old.max()), f"experts 0 to {experts - 1}, or -1")


def window_steps() -> int:
    """Steps of vLLM's window: `window_size` of --eplb-config, which a policy is not told."""
    text = os.environ.get(WINDOW, str(WINDOW_STEPS))
    if not text.isdecimal() or not 1 <= int(text[:20]) <= MOST_STEPS:
        raise InputError(WINDOW, text, f"a whole number from 1 to {MOST_STEPS}: window_size of --eplb-config")
    return int(text)


class Decider:
    """The controller of one network, and the copies, which it leaves alone."""

    def __init__(
        self, cost: CostModel, profile: Profile, num_slots: int, window: int, rules: Rules | None = None
    ) -> None:
        size = profile.model.expert_bytes
        self.policy = Policy() if size is None else Policy(expert_bytes=float(size))
        self.cost, self.window, self.rules, self.nodes = cost, window, rules, profile.node_of_rank
        self.slots_G = np.full(profile.num_ranks, num_slots // profile.num_ranks)
        self.controller: Controller | None = None

    def decide(self, loads_LE: NDArray[np.float64], old: IntArray | None) -> IntArray:
        """[L, P] the new map; every slot holds an expert. A window without loads moves nothing."""
        layers, experts = loads_LE.shape
        rows = np.stack([self._feasible(None if old is None else old[layer], experts) for layer in range(layers)])
        placement = Placement(physical_to_logical=rows, slots_per_rank=self.slots_G, num_experts=experts)
        placement = placement.under(self.rules, self.nodes)
        if self.controller is None:
            self.controller = Controller(self.cost, placement, self.policy)
            self._check_rules(self.controller.rules[0])
            self._compile(rows[0], experts)
        else:
            self.controller.confirm(placement)
        if not np.isfinite(loads_LE).all() or loads_LE.min() < 0:
            logger.warning("EPLB: loads that are no numbers of at least 0: nothing moves")
            return rows
        counts_NLE = mean_steps(loads_LE / self.window, STEPS)
        if not counts_NLE.any():
            if loads_LE.any():
                few = "EPLB: loads of up to %g in %d steps are none a step: nothing moves; is %s window_size?"
                logger.warning(few, loads_LE.max(), self.window, WINDOW)
            return rows
        decision = self.controller.step(counts_NLE)
        if decision.refused:
            logger.warning("EPLB: %s: nothing moves", decision.reason)
            return rows
        wanted = np.array(decision.placement.physical_to_logical)
        if int(self.slots_G.sum()) > experts:
            wanted = np.stack(
                [
                    self._copies(counts_NLE[:, layer], rows[layer], wanted[layer], rules)
                    for layer, rules in enumerate(self.controller.rules)
                ]
            )
        order = [keep_in_place(before, after, self.slots_G) for before, after in zip(rows, wanted, strict=True)]
        logger.info("EPLB: %d moves: %s", decision.num_moves, decision.reason)
        return np.take_along_axis(wanted, np.stack(order), axis=1)

    def _check_rules(self, rules: LayerRules | None) -> None:
        """Refuse rules that no map keeps, since vLLM wants every slot full."""
        names = [] if rules is None else conflict(rules, self.slots_G, full=True)
        if names:
            raise InputError(RULES, ", ".join(names), "no map with every slot full keeps them together")

    def _feasible(self, old_P: IntArray | None, experts: int) -> IntArray:
        """[P] a row near the old one: every expert somewhere, none twice on a rank, no slot empty."""
        ranks, size = len(self.slots_G), int(self.slots_G[0])
        home_GE = np.zeros((ranks, experts), dtype=bool)
        if old_P is not None:
            for rank in range(min(ranks, len(old_P) // size)):
                mine = old_P[rank * size : (rank + 1) * size]
                home_GE[rank, mine[mine >= 0]] = True
        row = Moves(home_GE).fewest(self.slots_G)
        if row is None:
            raise InputError("num_replicas", ranks * size, f"at least one slot for each of {experts} experts")
        full = self._filled(row, home_GE)
        same = old_P is not None and len(old_P) == len(row) and (held(full, self.slots_G, experts) == home_GE).all()
        return np.array(old_P, dtype=np.int64) if same and old_P is not None and (old_P >= 0).all() else full

    def _filled(self, row: IntArray, home_GE: NDArray[np.bool_]) -> IntArray:
        """The row with a copy in every empty slot: one that the rank holds already, else of the least copied expert."""
        row, ranks_P = row.copy(), np.repeat(np.arange(len(self.slots_G)), self.slots_G)
        copies_E = np.bincount(row[row != EMPTY], minlength=home_GE.shape[1])
        for slot in np.flatnonzero(row == EMPTY):
            taken = np.isin(np.arange(len(copies_E)), row[ranks_P == ranks_P[slot]])
            keys = np.where(taken, np.inf, copies_E - 1e6 * home_GE[ranks_P[slot]])
            row[slot] = int(keys.argmin())
            copies_E[row[slot]] += 1
        return row

    def _copies(self, counts_TE: IntArray, home: IntArray, row: IntArray, rules: LayerRules | None = None) -> IntArray:
        """The row, full, with its copies where they gain more than their moves cost and than a swap must promise."""
        policy, experts = self.policy, counts_TE.shape[1]
        home_GE = held(home, self.slots_G, experts)
        move_us = (policy.expert_bytes or 0.0) / policy.bytes_per_s * 1e6 * policy.slowdown / policy.horizon_steps
        problem = Problem.make(
            counts_TE, self.cost.features, self.cost.latencies, self.slots_G, full=rules is not None
        )  # fmt: skip
        row = self._full(replace(problem, rules=rules), row, home)
        problem = settled(replace(problem, rules=rules), row).with_moves(Moves.make(home_GE, move_us * len(counts_TE)))
        costs = make_costs(problem)
        assert problem.moves is not None
        found = copies_within(problem, make_state(problem, row, costs), costs, problem.moves)
        found, now_us = self._full(problem, found, row), total(problem, row)
        return found if total(problem, found) < (1 - policy.least_gain) * now_us else row

    def _full(self, problem: Problem, row: IntArray, home: IntArray) -> IntArray:
        """The row with a copy in every empty slot: by the rules, or one that its rank had at home."""
        if problem.rules is None:
            return self._filled(row, held(home, self.slots_G, problem.num_experts))
        found = nearest_row(problem, row) if (row == EMPTY).any() else row
        if found is None:
            raise InputError(RULES, "rules", "no map with every slot full that keeps them was found")
        return found

    def _compile(self, row: IntArray, experts: int) -> None:
        """Kernels are compiled while vLLM starts, not at the first rearrangement."""
        assert self.controller is not None
        self.controller.warm()
        if int(self.slots_G.sum()) > experts:
            self._copies(np.ones((2, experts), dtype=np.int64), row, row)


def mean_steps(mean_LE: NDArray[np.float64], steps: int) -> IntArray:
    """[steps, L, E] whole loads whose mean over the steps is the given one, to within one over the steps."""
    phase_E = np.arange(mean_LE.shape[1]) * GOLDEN % 1.0
    upto = np.floor(mean_LE * np.arange(steps + 1)[:, None, None] + phase_E).astype(np.int64)
    return np.diff(upto, axis=0)

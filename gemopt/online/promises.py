"""What swaps promised and what they kept: the best of many swaps on past steps looks better than it is.

Routing does not depend on the placement, so what a proposed swap would have gained on the steps that followed is known
whether it was made or not. The shortfall per swap, as a fraction of the layer's makespan, is learnt while serving and
taken off every later promise. Noise goes with the root of the number of steps that a plan was judged by, and so does
the shortfall.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gemopt.online.policy import Policy
from gemopt.placement import Split
from gemopt.problem import Problem
from gemopt.solvers.search.moves import Waypoint, objectives

AT_STEPS = 64.0  # effective steps at which `Policy.least_gain` is stated
PRIOR_SWAPS = 64.0  # how many swaps of experience the policy's figure counts for
MEMORY_STEPS = 1024.0  # experience fades with this time constant
EXTREMES = (0.5, 4.0)  # of the policy's figure


class Promises:
    """Proposals of the last decision, and the shortfall of earlier ones.

    layers: [K] layer of each proposal; rows, weights: [K, 2, P] before and after, and their static weights (0 under
    another split); facts: [K, 3] promised gain as a fraction of the makespan, swaps, effective steps. short, swaps:
    fading sums.
    """

    def __init__(self, policy: Policy, num_slots: int) -> None:
        self.policy = policy
        self.short = self.swaps = 0.0
        self.forget(num_slots)

    def forget(self, num_slots: int) -> None:
        """Drop what is open: it says nothing about other traffic, another group or other speeds."""
        self.layers = np.zeros(0, np.int64)
        self.rows, self.weights = np.zeros((0, 2, num_slots), np.int64), np.zeros((0, 2, num_slots))
        self.facts = np.zeros((0, 3))

    def least(self, effective_steps: float) -> float:
        """Shortfall to expect of a swap judged by so many steps, as a fraction of the makespan."""
        usual = self.policy.least_gain
        rate = (PRIOR_SWAPS * usual + self.short) / (PRIOR_SWAPS + self.swaps)
        return float(np.clip(rate, EXTREMES[0] * usual, EXTREMES[1] * usual) * _scale(effective_steps))

    def make(
        self, layer: int, before: Waypoint, after: Waypoint, gain: float, swaps: int, effective_steps: float
    ) -> None:
        """Note a proposal."""
        self.layers = np.append(self.layers, layer)
        pair = (before, after)
        weights = [np.zeros(len(each.row)) if each.weights is None else each.weights for each in pair]
        self.rows = np.concatenate([self.rows, [[each.row for each in pair]]])
        self.weights = np.concatenate([self.weights, [weights]])
        self.facts = np.concatenate([self.facts, [[gain, float(swaps), effective_steps]]])

    def check(self, problems: Sequence[Problem]) -> None:
        """See what the proposals would have gained on the steps that followed; one problem per layer."""
        steps = problems[0].num_steps
        fade = np.exp(-steps / MEMORY_STEPS)
        self.short, self.swaps = fade * self.short, fade * self.swaps
        seen = min(1.0, steps / AT_STEPS)
        for layer, rows, weights, (promised, swaps, trusted) in zip(
            self.layers, self.rows, self.weights, self.facts, strict=True
        ):
            problem = problems[int(layer)]
            base, changed = objectives(problem, rows, list(weights) if problem.split is Split.STATIC else None)
            if base > 0:
                kept = 1 - changed / base
                self.short += seen * (promised - kept) / _scale(trusted)
                self.swaps += seen * swaps


def _scale(effective_steps: float) -> float:
    return float(np.sqrt(AT_STEPS / max(effective_steps, 8.0)))

"""Which layers are small enough for which proof."""

from __future__ import annotations

from math import factorial, log2

from gemopt.problem import Problem

BRANCHED_EXPERTS = 24  # by branch and bound, on few ranks, without copies, moves and rules
BRANCHED_WAYS = 44.0  # bits of the number of ways to place them


def branches(problem: Problem) -> bool:
    """Whether branch and bound has a chance: few experts and ranks, neither copies nor moves nor rules."""
    other = problem.moves is not None or problem.rules is not None
    if other or problem.spare_slots or problem.num_experts > BRANCHED_EXPERTS:
        return False
    ways = problem.num_experts * log2(problem.num_ranks)
    return ways - sum(log2(factorial(len(group))) for group in problem.equal_ranks) <= BRANCHED_WAYS

"""What tests of rules share."""

from __future__ import annotations

import numpy as np

from gemopt.problem import Problem

NODES = [0, 0, 1]
Sets = tuple[tuple[int, ...], ...]


def sets_of(problem: Problem, row: np.ndarray) -> Sets:
    return tuple(tuple(problem.rank_of_slot[row == e].tolist()) for e in range(problem.num_experts))


def held(problem: Problem, ranks_E: Sets) -> np.ndarray:
    held_GE = np.zeros((problem.num_ranks, problem.num_experts), dtype=bool)
    for expert, ranks in enumerate(ranks_E):
        held_GE[list(ranks), expert] = True
    return held_GE

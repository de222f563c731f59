"""The same placement with its ranks renamed so that fewest experts move: equal ranks may change their roles."""

from __future__ import annotations

import time
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from gemopt.evaluate import objective
from gemopt.migration import held
from gemopt.problem import Problem
from gemopt.solvers.base import Row


def relabelled(problem: Problem, row: Row, home_GE: NDArray[np.bool_], until: float = np.inf) -> Row:
    """[P] a row with as few moves as renaming equal ranks allows, at no larger objective.

    Ranks are equal when their latencies and slots are. Without copies renaming them changes nothing, and the fewest
    moves are an assignment problem. With copies, which copy takes the odd assignment depends on the order of the ranks,
    so the objective may change a little: then only exchanges that do not raise it are made, the best ones first, until
    a time (of `time.monotonic`).
    """
    overlap_GG = home_GE.astype(np.int64) @ held(row, problem.slots_per_rank, problem.num_experts).astype(np.int64).T
    roles_G = np.arange(problem.num_ranks)
    for group in problem.equal_ranks:
        ranks = np.array(group)
        places, roles = linear_sum_assignment(-overlap_GG[np.ix_(ranks, ranks)])
        roles_G[ranks[places]] = ranks[roles]
    wanted = renamed(problem, row, roles_G)
    if (wanted == row).all():
        return row
    value = objective(problem, row)
    if objective(problem, wanted) <= value:
        return wanted
    return _by_exchanges(problem, row, overlap_GG, value, until)


def renamed(problem: Problem, row: Row, roles_G: NDArray[np.int64]) -> Row:
    """[P] the row in which rank g plays the role of rank `roles_G[g]`; both have as many slots."""
    parts = np.split(row, np.cumsum(problem.slots_per_rank)[:-1])
    return np.concatenate([parts[role] for role in roles_G])


def _by_exchanges(problem: Problem, row: Row, overlap_GG: NDArray[np.int64], value: float, until: float) -> Row:
    roles_G = np.arange(problem.num_ranks)
    pairs = [pair for group in problem.equal_ranks for pair in combinations(group, 2)]
    refused: set[tuple[int, int]] = set()
    while True:
        gains = {}
        for a, b in pairs:
            kept = overlap_GG[a, roles_G[a]] + overlap_GG[b, roles_G[b]]
            gains[a, b] = overlap_GG[a, roles_G[b]] + overlap_GG[b, roles_G[a]] - kept
        open_pairs = [pair for pair in pairs if gains[pair] > 0 and pair not in refused]
        if not open_pairs or time.monotonic() >= until:
            return renamed(problem, row, roles_G)
        a, b = max(open_pairs, key=lambda pair: gains[pair])
        tried_G = roles_G.copy()
        tried_G[[a, b]] = roles_G[[b, a]]
        found = objective(problem, renamed(problem, row, tried_G))
        if found <= value:
            roles_G, value = tried_G, found
            refused.clear()
        else:
            refused.add((a, b))

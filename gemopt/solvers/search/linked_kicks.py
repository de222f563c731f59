"""Kicks of the search under links: slots or whole ranks of a layer change places, and what has moved comes home."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gemopt.migration import held
from gemopt.moves import Budget, Moves
from gemopt.placement import EMPTY
from gemopt.problem import Problem
from gemopt.solvers.base import Row, within_limits
from gemopt.solvers.nearest import home_row

KICK = 3  # pairs of slots that change places
DRAWN = 12  # for them at most, where limits of moves forbid most
AFRESH = 0.2  # of the kicks begin with the placement in force


def change_roles(problems: Sequence[Problem], rows: list[Row], layer: int, draws: np.random.Generator) -> set[int]:
    """Let two ranks hold what the other holds in one layer or a few in a row; returns the layers to look at."""
    end = min(len(rows), layer + int(draws.geometric(0.5)))
    a, b = draws.permutation(problems[0].num_ranks)[:2]
    for n in range(layer, end):
        slots_a, slots_b = (draws.permutation(np.flatnonzero(problems[n].rank_of_slot == rank)) for rank in (a, b))
        both = min(len(slots_a), len(slots_b))
        rows[n] = exchanged(problems[n], rows[n], np.stack([slots_a[:both], slots_b[:both]]))
    return set(range(max(0, layer - 1), min(len(rows), end + 1)))


def limited(problems: Sequence[Problem], budget: Budget | None) -> bool:
    """Whether moves are limited, of any layer or of all together."""
    return budget is not None or any(each.moves is not None and each.moves.limited for each in problems)


def kicked(problem: Problem, row: Row, draws: np.random.Generator) -> Row:
    """A row with a few pairs of slots, drawn at random, in each other's place, as far as that may be.

    Where moves count, now and then of the row in force instead.
    """
    moves, left = problem.moves, KICK
    if moves is not None and draws.random() < AFRESH:
        home = home_row(problem, moves)
        row = row if home is None else home
    for _ in range(KICK if moves is None else DRAWN):
        pair = None if moves is None else _homeward(problem, moves, row, draws)
        before, row = row, exchanged(problem, row, draws.permutation(len(row))[:2] if pair is None else pair)
        left -= row is not before
        if not left:
            break
    return row


def _homeward(problem: Problem, moves: Moves, row: Row, draws: np.random.Generator) -> NDArray[np.int64] | None:
    """[2] every second time, the slot of an expert that has moved and one of a rank where it is at home, whose content
    goes home by that where there is such a one."""
    ranks = problem.rank_of_slot
    home_P = (row == EMPTY) | moves.home_GE[ranks, row]
    away = np.flatnonzero(~home_P)
    if not len(away) or draws.random() < 0.5:
        return None
    slot = int(draws.choice(away))
    there = np.flatnonzero(moves.home_GE[ranks, row[slot]])
    both = there[(row[there] == EMPTY) | moves.home_GE[ranks[slot], row[there]]]
    there = both if len(both) else there
    return np.array([slot, draws.choice(there)]) if len(there) else None


def exchanged(problem: Problem, row: Row, pair: NDArray[np.int64]) -> Row:
    """A row with two slots, or [2, N] pairs of them, in each other's place; as it is where that may not be."""
    tried = row.copy()
    tried[pair] = row[pair[::-1]]
    once = held(tried, problem.slots_per_rank, problem.num_experts).sum() == (row != EMPTY).sum()
    return tried if once and within_limits(problem, tried) else row

"""Placements that served before: where traffic or speeds go back to what they were, so may the placement.

A swap at a time does not always lead back: what was right before is many swaps away, each of which must pay for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.evaluate import objective
from gemopt.migration import count_moves, held
from gemopt.placement import Split
from gemopt.problem import Problem
from gemopt.solvers.base import Row
from gemopt.solvers.search.moves import Waypoint, few_moves
from gemopt.splits import chosen_weights

KEPT = 4  # placements, the latest ones
FRESH_STEPS = 64  # for which they are looked at after a change


class Earlier:
    """The last placements that were in force when traffic, speeds or ranks changed.

    served: [K, L, P], the latest last, no two alike. changed_at: steps that the controller had seen by the last change.
    """

    def __init__(self, num_layers: int, num_slots: int) -> None:
        self.served = np.zeros((0, num_layers, num_slots), np.int64)
        self.changed_at = -(2**40)

    def note(self, rows_LP: NDArray[np.int64], steps: int) -> None:
        """Keep what is in force now, at a change."""
        others = self.served[(self.served != rows_LP).any(axis=(1, 2))]
        self.served, self.changed_at = np.concatenate([others, rows_LP[None]])[-KEPT:], steps

    def of(self, layer: int, steps: int) -> list[Row]:
        """Rows of a layer to look at now, the latest first."""
        if steps - self.changed_at > FRESH_STEPS:
            return []
        return list({row.tobytes(): row for row in self.served[::-1, layer]}.values())


def ways_back(
    problem: Problem, home: Row, rows: Sequence[Row], into_G: NDArray[np.int64], most_moves: int | None
) -> list[Waypoint]:
    """Those of some rows that may be in force now, `home` aside.

    into_G, most_moves: [G] experts that each rank may receive, and all together.
    """
    home_GE, found = held(home, problem.slots_per_rank, problem.num_experts), []
    for row in rows:
        moves_G = (held(row, problem.slots_per_rank, problem.num_experts) & ~home_GE).sum(axis=1)
        broken = problem.rules is not None and problem.rules.broken(row, problem.slots_per_rank)
        most = moves_G.sum() if most_moves is None else most_moves
        if broken or (moves_G > into_G).any() or moves_G.sum() > most or (row == home).all():
            continue
        weights_P = chosen_weights(problem, row) if problem.split is Split.STATIC else None
        found.append(Waypoint(row, objective(problem, row, weights_P), int(moves_G.sum()), weights_P))
    return found


def onwards(problem: Problem, home: Row, back: Waypoint, **options: Any) -> list[Waypoint]:
    """The way back and swaps from there, which pay for their moves as if that was in force; see `few_moves`.

    Moves of the waypoints are counted from `home`.
    """
    way = few_moves(problem, back.row, weights_P=back.weights, **options)
    return [replace(each, moves=count_moves(home, each.row, problem.slots_per_rank)) for each in way]

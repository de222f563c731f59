"""What moving experts costs and how many may move: what a layer's problem asks of the placement in force.

A move is an expert that a rank receives and does not hold in the placement in force (`home`). The slot of an expert on
its rank does not matter, and neither does what a rank gives up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError
from gemopt.migration import held
from gemopt.placement import EMPTY
from gemopt.words import counted

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

FORBIDDEN = 1e6  # more than any number of moves of one layer


@dataclass(frozen=True, eq=False)
class Moves:
    """Price and limits of the moves of one layer.

    Attributes
    ----------
    home_GE
        [G, E] whether each rank holds each expert in the placement in force. Experts may be missing: lost with a rank.
    price_us
        Microseconds that a move adds to the objective.
    most
        Moves allowed in all; None: any number.
    most_into_G
        [G] moves allowed into each rank; None: any number.
    known_P
        [P] a row with few moves, where one has been found: what others look for.
    """

    home_GE: BoolArray
    price_us: float = 0.0
    most: int | None = None
    most_into_G: IntArray | None = None
    known_P: IntArray | None = None

    @classmethod
    def make(cls, home_GE: object, price_us: float = 0.0, most: int | None = None, most_into_G: object = None) -> Moves:
        """Validate and freeze.

        Raises
        ------
        InputError
            A price that is negative or not a number, a negative limit, or arrays of other sizes.
        """
        home = np.array(home_GE, dtype=bool)
        if home.ndim != 2:
            raise InputError("home_GE", f"shape {home.shape}", "[ranks, experts]")
        if not (np.isfinite(price_us) and price_us >= 0):
            raise InputError("move_price", price_us, "microseconds >= 0 per move")
        if most is not None and most < 0:
            raise InputError("max_moves", most, "at least 0")
        into = None if most_into_G is None else np.array(most_into_G, dtype=np.int64)
        if into is not None and (into.shape != (len(home),) or (into < 0).any()):
            raise InputError("most_into_G", into, f"one number >= 0 per rank ({len(home)})")
        for array in (home, into):
            if array is not None:
                array.setflags(write=False)
        return cls(home, float(price_us), most, into)

    @property
    def limited(self) -> bool:
        """Whether any number of moves is forbidden."""
        return self.most is not None or self.most_into_G is not None

    @property
    def none(self) -> bool:
        """Whether no expert may move."""
        return self.most == 0 or (self.most_into_G is not None and not self.most_into_G.any())

    @property
    def lost(self) -> list[int]:
        """Experts that no rank holds in the placement in force."""
        return np.flatnonzero(~self.home_GE.any(axis=0)).tolist()

    def at_most(self, most: int | None, known_P: IntArray | None = None) -> Moves:
        """The same with another limit on all moves, within which a row may be known."""
        return replace(self, most=most, known_P=known_P)

    def into(self, row_P: IntArray, slots_per_rank: IntArray) -> IntArray:
        """[G] moves into each rank."""
        held_GE = held(row_P, slots_per_rank, self.home_GE.shape[1])
        return np.asarray((held_GE & ~self.home_GE).sum(axis=1), dtype=np.int64)

    def count(self, row_P: IntArray, slots_per_rank: IntArray) -> int:
        """Moves in all."""
        return int(self.into(row_P, slots_per_rank).sum())

    def excess(self, row_P: IntArray, slots_per_rank: IntArray) -> str:
        """What is wrong with the moves of a row, in words; empty when they keep to the limits."""
        into_G = self.into(row_P, slots_per_rank)
        if self.most is not None and into_G.sum() > self.most:
            return f"{counted(into_G.sum(), 'move')}, {self.most} allowed"
        if self.most_into_G is not None and (into_G > self.most_into_G).any():
            rank = int((into_G > self.most_into_G).argmax())
            return f"{counted(into_G[rank], 'move')} into rank {rank}, {self.most_into_G[rank]} allowed"
        return ""

    def fewest(self, slots_per_rank: IntArray) -> IntArray | None:
        """[P] the row with the fewest moves; None when the limits allow no row at all, which is then proven.

        One slot per expert is an assignment problem, in which as many slots of a rank as it may receive experts are
        open to all and the others to those at home there. Slots left over keep the copies that are at home.
        """
        from scipy.optimize import linear_sum_assignment

        ranks_P = np.repeat(np.arange(len(slots_per_rank)), slots_per_rank)
        place_P = np.arange(len(ranks_P)) - np.repeat(np.cumsum(slots_per_rank) - slots_per_rank, slots_per_rank)
        cost_EP = np.where(self.home_GE[ranks_P].T, 0.0, 1.0)
        if self.most_into_G is not None:
            closed_P = place_P >= self.most_into_G[ranks_P]
            cost_EP = np.where((cost_EP > 0) & closed_P, FORBIDDEN, cost_EP)
        experts, slots = linear_sum_assignment(cost_EP)
        needed = float(cost_EP[experts, slots].sum())
        if (
            len(experts) < self.home_GE.shape[1]
            or needed >= FORBIDDEN
            or needed > (np.inf if self.most is None else self.most)
        ):
            return None
        row_P = np.full(len(ranks_P), EMPTY)
        row_P[slots] = experts
        return self._with_copies(row_P, ranks_P)

    def _with_copies(self, row_P: IntArray, ranks_P: IntArray) -> IntArray:
        for rank in range(len(self.home_GE)):
            mine = np.flatnonzero(ranks_P == rank)
            copies = np.setdiff1d(np.flatnonzero(self.home_GE[rank]), row_P[mine])
            free = mine[row_P[mine] == EMPTY]
            size = min(len(copies), len(free))
            row_P[free[:size]] = copies[:size]
        return row_P


@dataclass(frozen=True, eq=False)
class Budget:
    """Moves that several layers share: `most` in all, and `most_into_G` [G] into each rank; None: any number."""

    most: int | None = None
    most_into_G: IntArray | None = None

    def beside(self, moves: Moves, others_G: IntArray) -> Moves:
        """The moves of one layer, limited to what the others leave, which move `others_G` [G] into each rank."""
        most, into_G = moves.most, moves.most_into_G
        if self.most is not None:
            left = max(0, self.most - int(others_G.sum()))
            most = left if most is None else min(most, left)
        if self.most_into_G is not None:
            left_G = np.maximum(0, self.most_into_G - others_G)
            into_G = left_G if into_G is None else np.minimum(into_G, left_G)
        return replace(moves, most=most, most_into_G=into_G)

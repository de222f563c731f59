"""The compact formulation as plain arrays: what CP-SAT and MILP both state, before either library is involved.

A column is one way to hold (part of) an expert: copy i of r. Without spare slots there is one column per expert.
With them the even split of the copies is exact: copies of one expert sit on ranks in increasing order, and copy i
of r takes `(n + r - 1 - i) // r` of its assignments.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import Curve, Curves, FloatArray, IntArray, Latency
from gemopt.layer_rules import LayerRules
from gemopt.moves import Moves
from gemopt.problem import Problem
from gemopt.solvers.base import Row
from gemopt.solvers.exact.runs import Term, split_term

ROUNDING = 1e-9  # relative, by which a cutoff is rounded up


@dataclass(frozen=True, eq=False)
class Compact:
    """One layer, ready to be written down as variables and constraints.

    Attributes
    ----------
    features_FTQ
        [F, T, Q] additive features of every column at every distinct step.
    expert_Q, copies_Q, index_Q
        [Q] column q is copy `index_Q[q]` of `copies_Q[q]` of expert `expert_Q[q]`.
    weights_T, floor_T, cutoff_T
        [T] weight of each distinct step, a lower bound on its makespan in microseconds, and the makespan above which
        no placement is better than the incumbent.
    slots_G
        [G] slots of each rank.
    group_G
        [G] equal numbers for ranks that can be swapped without any change.
    order_E
        Experts, heaviest first: the order in which equal ranks are told apart.
    moved_QG
        [Q, G] whether holding a column is a move, for a rank that did not hold its expert.
    price_us, most, most_into_G
        Microseconds per move, and the moves allowed in all and into each rank [G].
    closed_GE, apart_AE
        [G, E] which rank may not hold which expert, and [A, E] sets of experts of which no rank holds two.
    bloc_BE, unit_BG
        [B, E] sets of experts that one unit of ranks holds, and [B, G] unit of each rank.
    """

    features_FTQ: IntArray
    expert_Q: IntArray
    copies_Q: IntArray
    index_Q: IntArray
    weights_T: FloatArray
    floor_T: FloatArray
    cutoff_T: FloatArray
    slots_G: IntArray
    group_G: IntArray
    order_E: IntArray
    moved_QG: NDArray[np.bool_]
    price_us: NDArray[np.float64]
    most: IntArray
    most_into_G: IntArray
    closed_GE: NDArray[np.bool_]
    apart_AE: NDArray[np.bool_]
    bloc_BE: NDArray[np.bool_]
    unit_BG: IntArray
    curves: Curves

    @classmethod
    def of(cls, problem: Problem, floor_T: FloatArray, open_us: float) -> Compact:
        """State a problem whose steps are distinct (`merged`), with lower bounds on the makespan of each step.

        open_us: how much all floors together, weighted, are below the incumbent. No step of a better placement
        exceeds its own floor by more.
        """
        most = problem.most_copies
        copies = np.repeat(np.arange(1, most + 1), np.arange(1, most + 1))
        index = np.concatenate([np.arange(count) for count in range(1, most + 1)])
        expert_Q = np.repeat(np.arange(problem.num_experts), len(copies))
        copies_Q, index_Q = np.tile(copies, problem.num_experts), np.tile(index, problem.num_experts)
        shares_TQ = (problem.counts_TE[:, expert_Q] + copies_Q - 1 - index_Q) // copies_Q
        above_T = np.full(problem.num_steps, np.inf)
        np.divide(open_us * (1 + ROUNDING), problem.weights_T, out=above_T, where=problem.weights_T > 0)
        cutoff_T = floor_T + above_T + ROUNDING * np.abs(floor_T)
        group_G = np.arange(problem.num_ranks)
        moves = problem.moves or Moves(np.ones((problem.num_ranks, problem.num_experts), dtype=bool))
        rules = problem.rules or LayerRules((), problem.num_ranks, problem.num_experts)
        blocs = len(rules.blocs)
        if most == 1 and problem.moves is None:  # swapping ranks moves experts, and the odd assignment of copies
            for members in problem.equal_ranks:
                group_G[members] = members[0]
        return cls(
            features_FTQ=np.stack([feature.of(shares_TQ) for feature in problem.features]).astype(np.int64),
            expert_Q=expert_Q,
            copies_Q=copies_Q,
            index_Q=index_Q,
            weights_T=problem.weights_T,
            floor_T=floor_T,
            cutoff_T=cutoff_T,
            slots_G=problem.slots_per_rank,
            group_G=group_G,
            order_E=np.argsort(-problem.counts_TE.T @ problem.weights_T, kind="stable"),
            moved_QG=~moves.home_GE.T[expert_Q],
            price_us=np.array(moves.price_us),
            most=np.array(problem.num_slots if moves.most is None else moves.most),
            most_into_G=problem.slots_per_rank if moves.most_into_G is None else moves.most_into_G,
            closed_GE=rules.closed_GE,
            apart_AE=rules.apart_AE,
            bloc_BE=np.array([members for members, _ in rules.blocs], bool).reshape(blocs, problem.num_experts),
            unit_BG=np.array([unit_G for _, unit_G in rules.blocs], np.int64).reshape(blocs, problem.num_ranks),
            curves=problem.curves,
        )

    def save(self, path: Path) -> None:
        """Write all arrays to one npz file."""
        np.savez(path, **self.arrays())

    def arrays(self) -> dict[str, Any]:
        """All that there is, by name."""
        arrays: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        curves = arrays.pop("curves")
        return arrays | {f"curves_{name}": value for name, value in curves._asdict().items()}

    @classmethod
    def load(cls, path: Path) -> Compact:
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            return cls.of_arrays(dict(arrays))

    @classmethod
    def of_arrays(cls, arrays: dict[str, Any]) -> Compact:
        """From what `arrays` gave."""
        curves = {name: arrays[f"curves_{name}"] for name in Curves._fields}
        own = {name: value for name, value in arrays.items() if not name.startswith("curves_")}
        return cls(**own, curves=Curves(**curves))

    @property
    def num_experts(self) -> int:
        """E, logical experts."""
        return len(self.order_E)

    @property
    def num_ranks(self) -> int:
        """G, ranks."""
        return len(self.slots_G)

    @property
    def num_steps(self) -> int:
        """T, distinct steps."""
        return len(self.weights_T)

    @property
    def open_us(self) -> float:
        """Weighted microseconds between all floors together and the incumbent."""
        weighty = self.weights_T > 0
        return float((self.weights_T * (self.cutoff_T - self.floor_T))[weighty].max(initial=0.0))

    @property
    def roundings(self) -> int:
        """How many columns, curved parts, constants and prices a solution rounds to whole units."""
        a_rank = int(self.slots_G.max()) + 1 + 3 * int(self.features_FTQ.shape[0])
        return a_rank * self.num_steps + (int(self.slots_G.sum()) if self.price_us else 0)

    @property
    def most_load(self) -> int:
        """Largest load of any rank."""
        return int(self.load_range[1].max())

    def fits(self, held_QG: NDArray[np.bool_]) -> bool:
        """Whether no rank holds more than it has slots."""
        return bool((held_QG.sum(axis=0) <= self.slots_G).all())

    @property
    def base_us(self) -> float:
        """Weighted microseconds of all floors together."""
        return float(self.weights_T @ self.floor_T)

    @property
    def with_copies(self) -> bool:
        """Whether there are spare slots, which may hold copies or stay empty."""
        return len(self.expert_Q) > self.num_experts

    @property
    def all_slots_used(self) -> bool:
        """Whether every slot must hold an expert."""
        return int(self.slots_G.sum()) == self.num_experts

    @cached_property
    def latencies(self) -> list[Latency]:
        """Latency of each rank."""
        return [_unpack(self.curves, g) for g in range(self.num_ranks)]

    @cached_property
    def ordered_pairs(self) -> list[tuple[int, int]]:
        """Pairs of equal ranks (earlier, later), neighbours in their group."""
        groups = [np.flatnonzero(self.group_G == number).tolist() for number in np.unique(self.group_G)]
        return [pair for members in groups for pair in zip(members[:-1], members[1:], strict=True)]

    @cached_property
    def load_range(self) -> tuple[IntArray, IntArray]:
        """Smallest and largest load that each rank can carry, [F, T, G] each."""
        whole_FTE = np.sort(self.features_FTQ[:, :, self.copies_Q == 1], axis=2)
        zero = np.zeros((*whole_FTE.shape[:2], 1), dtype=np.int64)
        smallest = np.concatenate([zero, np.cumsum(whole_FTE, axis=2)], axis=2)
        largest = np.concatenate([zero, np.cumsum(whole_FTE[:, :, ::-1], axis=2)], axis=2)
        low = smallest if self.all_slots_used else np.zeros_like(smallest)
        return low[:, :, self.slots_G], largest[:, :, self.slots_G]

    def terms(self, step: int, rank: int) -> list[Term]:
        """What the makespan of a step waits for on a rank, within the step's floor and cutoff."""
        low_F, high_F = (loads[:, step, rank].tolist() for loads in self.load_range)
        floor, cutoff = float(self.floor_T[step]), float(self.cutoff_T[step])
        split = (split_term(term, low_F, high_F, floor, cutoff) for term in self.latencies[rank].terms)
        return [term for term in split if term is not None]

    @property
    def size(self) -> int:
        """About the number of non-zero coefficients of all steps: what building and solving take grows with it."""
        result = 0
        for step in range(self.num_steps):
            for rank in range(self.num_ranks):
                for term in self.terms(step, rank):
                    pieces = sum(len(run.points) + 4 for _, runs in term.curved for run in runs)
                    result += len(self.expert_Q) * (1 + len(term.curved)) + 3 * pieces
        return result

    @cached_property
    def rank_of_slot(self) -> IntArray:
        """[P] rank of each slot."""
        return np.repeat(np.arange(self.num_ranks), self.slots_G)

    def held(self, row_P: Row) -> NDArray[np.bool_]:
        """[Q, G] whether each rank holds each column, for a feasible row."""
        held_QG = np.zeros((len(self.expert_Q), self.num_ranks), dtype=bool)
        column = {key: q for q, key in enumerate(zip(self.expert_Q, self.copies_Q, self.index_Q, strict=True))}
        for expert in range(self.num_experts):
            ranks = self.rank_of_slot[row_P == expert]
            for index, rank in enumerate(ranks):
                held_QG[column[expert, len(ranks), index], rank] = True
        return held_QG

    def row(self, held_QG: NDArray[np.bool_]) -> Row:
        """[P] row that holds these columns: the experts of a rank in increasing order, then its empty slots."""
        row_P = np.full(int(self.slots_G.sum()), -1, dtype=np.int64)
        first_G = np.cumsum(self.slots_G) - self.slots_G
        for rank in range(self.num_ranks):
            experts = np.sort(self.expert_Q[held_QG[:, rank]])
            row_P[first_G[rank] : first_G[rank] + len(experts)] = experts
        return row_P

    def canonical(self, held_QG: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The same placement with equal ranks in the order that the formulations ask for.

        Of two equal ranks the earlier one holds the expert that comes first in `order_E`; empty ranks come last.
        """
        place_E = np.argsort(self.order_E)
        place_QG = np.where(held_QG, place_E[self.expert_Q][:, None], self.num_experts)
        first_G = place_QG.min(axis=0)
        result = held_QG.copy()
        for number in np.unique(self.group_G):
            members = np.flatnonzero(self.group_G == number)
            result[:, members] = held_QG[:, members[np.argsort(first_G[members], kind="stable")]]
        return result


def num_literals(problem: Problem) -> int:
    """Of who holds what: one for every column and rank."""
    most = problem.most_copies
    return problem.num_experts * (most * (most + 1) // 2) * problem.num_ranks


def _unpack(curves: Curves, rank: int) -> Latency:
    def curve(k: int, f: int) -> Curve:
        start = curves.start[rank, k, f]
        stop = start + curves.length[rank, k, f]
        return Curve(curves.x[start:stop], curves.y[start:stop], float(curves.slope[rank, k, f]))

    num_features = curves.start.shape[2]
    return Latency(tuple(tuple(curve(k, f) for f in range(num_features)) for k in range(curves.num_terms[rank])))


def merged(problem: Problem) -> Problem:
    """The same objective with equal steps merged into one weighted step, and steps of no weight left out."""
    _, first, group_T = np.unique(problem.counts_TE, axis=0, return_index=True, return_inverse=True)
    weights = np.asarray(np.bincount(group_T.ravel(), weights=problem.weights_T), dtype=np.float64)
    kept = np.flatnonzero(weights > 0) if (weights > 0).any() else np.zeros(1, dtype=np.int64)
    kept = kept[np.argsort(first[kept])]
    return problem.select(first[kept], weights[kept])

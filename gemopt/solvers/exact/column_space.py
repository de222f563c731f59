"""All contents that ranks can have, what they take at every step, and the bound that prices of experts prove.

A column (k, C) puts the S_k experts of C on a rank of kind k. Its latency f_k(C, t) is cut at levels `b_0t < b_1t ...`,
of which b_0 is a floor that no placement falls below. In every level the slowest rank has at least what any other has,
so for multipliers `mu_tli >= 0` with `sum_i mu_tli <= w_t` and any prices pi of experts no placement is below

    sum_t w_t b_0t  +  sum_i pi_i  +  sum_k count_k min_C ( cost_k(C) - sum_{i in C} pi_i )
    cost_k(C) = sum_tl (sum_{i in C} mu_tli) max(0, min(f_k(C, t), b_{l+1,t}) - b_lt)

since the columns of a placement share each `sum_i mu_tli`. Latencies are exact here, whatever the cost model. What a
column has above the least of its kind is its reduced cost: those of a placement add up to at most what is open.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import FloatArray, IntArray
from gemopt.problem import Problem
from gemopt.solvers.exact.column_kernels import Found, in_levels, price, rows_of
from gemopt.solvers.exact.tree import Tables, tables_of, with_idle
from gemopt.solvers.size import num_columns

LEVELS = (
    (0.0,),
    (0.0, 0.6, 1.5),
    (0.0, 0.15, 0.3, 0.45, 0.6, 0.8, 1.0, 1.25, 1.5, 1.8, 2.2, 2.7),
)  # of what is open in the mean step, above its floor: ever finer
ULP = 2.0**-52


def feasible(mu: FloatArray, pi_E: FloatArray, weights_T: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Multipliers [..., E, T] and prices as bounds take them: finite, none below 0, in sums no larger than weights."""
    mu = np.maximum(np.nan_to_num(mu.astype(np.float64), nan=0.0, posinf=0.0), 0.0)
    mu *= np.minimum(1.0, weights_T * (1 - 1e-12) / np.maximum(mu.sum(axis=-2, keepdims=True), 1e-300))
    return mu, np.nan_to_num(pi_E.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


@lru_cache(maxsize=4)
def subsets(experts: int, size: int) -> NDArray[np.uint8]:
    """[N, size] all sets of so many experts, which the layers of a network share."""
    found = np.array(list(combinations(range(experts), size)), np.uint8)
    found.setflags(write=False)
    return found


class Proven(NamedTuple):
    """A bound in microseconds, what proves it, and the reduced costs [columns] it leaves.

    levels: [L, T] microseconds, the last level has no end. mu: [L, E, T]. pi: [E] microseconds.
    """

    bound_us: float
    levels_LT: FloatArray
    mu_LET: FloatArray
    pi_E: FloatArray
    extra_N: FloatArray


@dataclass(frozen=True, eq=False)
class Space:
    """Columns of a problem without spare slots, kind by kind; see `of`.

    ranks_K, count_K, size_K: of each kind of ranks that have slots the first one, how many there are, and their slots.
    sets: [N, S] experts of the columns of ranks with S slots. first_K: where the columns of a kind begin.
    """

    problem: Problem
    floor_T: FloatArray
    features_EFT: NDArray[np.int32]
    tables: Tables
    ranks_K: IntArray
    count_K: IntArray
    size_K: IntArray
    sets: dict[int, NDArray[np.uint8]]
    first_K: IntArray

    planes: ClassVar[int] = 1

    @classmethod
    def of(cls, problem: Problem, floor_T: FloatArray) -> Space | None:
        """The columns of a problem with floors of its steps in microseconds; None where there are too many."""
        ranks_K = np.array([group[0] for group in problem.kinds], np.int64)
        size_K, features_FTE = problem.slots_per_rank[ranks_K], problem.features_FTE
        if num_columns(problem) is None:
            return None
        tables = tables_of(problem.latencies, features_FTE.sum(axis=2).max(axis=1))
        if tables is None:
            return None
        sets = {size: subsets(problem.num_experts, size) for size in np.unique(size_K).tolist()}
        first_K = np.cumsum([0, *(len(sets[int(size)]) for size in size_K)])[:-1]
        return cls(
            problem=problem,
            floor_T=with_idle(problem, floor_T),
            features_EFT=features_FTE.transpose(2, 0, 1).copy(),
            tables=tables,
            ranks_K=ranks_K,
            count_K=np.array([len(group) for group in problem.kinds]),
            size_K=size_K,
            sets=sets,
            first_K=first_K,
        )

    def __len__(self) -> int:
        return int(self.first_K[-1]) + len(self.sets[int(self.size_K[-1])])

    def kind(self, ids: IntArray) -> IntArray:
        """Kinds of some columns."""
        return np.searchsorted(self.first_K, ids, side="right") - 1

    def members(self, ids: IntArray) -> NDArray[np.uint8]:
        """[n, most slots] experts of some columns, then zeros."""
        out, kind = np.zeros((len(ids), int(self.size_K.max())), np.uint8), self.kind(ids)
        for k in np.unique(kind):
            mine, size = kind == k, int(self.size_K[k])
            out[mine, :size] = self.sets[size][ids[mine] - self.first_K[k]]
        return out

    def masks(self, ids: IntArray) -> NDArray[np.uint64]:
        """Experts of some columns as bits."""
        bits, size_N = np.uint64(1) << self.members(ids).astype(np.uint64), self.size_K[self.kind(ids)]
        bits[np.arange(bits.shape[1]) >= size_N[:, None]] = 0
        return np.asarray(np.bitwise_or.reduce(bits, axis=1))

    def found(self, ids: IntArray, extra_N: FloatArray) -> Found:
        """Some columns, by their reduced costs, for `search_columns`."""
        kind = self.kind(ids)
        return Found(self.rows(ids), self.masks(ids), self.members(ids), self.size_K[kind], kind, extra_N)

    def rows(self, ids: IntArray) -> FloatArray:
        """[n, T] latencies of some columns in microseconds."""
        out, kind, members = np.empty((len(ids), self.problem.num_steps)), self.kind(ids), self.members(ids)
        for size in self.sets:
            mine = np.flatnonzero(self.size_K[kind] == size)
            part = np.empty((len(mine), out.shape[1]))
            sets = np.ascontiguousarray(members[mine, :size])
            rows_of(self.features_EFT, sets, self.ranks_K[kind[mine]], self.tables, part)
            out[mine] = part
        return out

    def parts(self, ids: IntArray, ends_LT: FloatArray, scale: float) -> NDArray[np.float32]:
        """[n, L T] `scale` times what the latencies of some columns have between the ends of each level."""
        return in_levels(self.rows(ids), ends_LT, scale)

    def ids(self, row: IntArray) -> IntArray:
        """Columns of a placement [P]."""
        found = []
        for k, group in enumerate(self.problem.kinds):
            size = int(self.size_K[k])
            for g in group:
                held = np.sort(row[self.problem.rank_of_slot == g]).astype(np.uint8)
                found.append(int(self.first_K[k] + np.flatnonzero((self.sets[size] == held).all(axis=1))[0]))
        return np.array(found)

    def row(self, ids: IntArray) -> IntArray:
        """[P] the placement of some columns that hold every expert once."""
        row = np.full(self.problem.num_slots, -1)
        left = [list(group) for group in self.problem.kinds]
        for k, members in zip(self.kind(ids), self.members(ids), strict=True):
            g = left[k].pop()
            row[self.problem.rank_of_slot == g] = members[: int(self.size_K[k])]
        return row

    def levels(self, value_us: float, fineness: int) -> FloatArray:
        """[L, T] where latencies are cut, given a placement's objective in microseconds and which of `LEVELS`."""
        total = float(self.problem.weights_T.sum())
        open_us = max(0.0, value_us - float(self.problem.weights_T @ self.floor_T)) / max(total, 1e-300)
        cuts = LEVELS[fineness if open_us > 0 else 0]
        return np.stack([self.floor_T + cut * open_us for cut in cuts])

    def prove(self, levels_LT: FloatArray, mu_LET: FloatArray, pi_E: FloatArray, stop: Any) -> Proven | None:
        """The bound of any multipliers and prices, which are made feasible first; None when stopped."""
        weights_T = self.problem.weights_T
        mu, pi = feasible(mu_LET, pi_E, self.problem.weights_T)
        extra = np.empty(len(self))
        bound = float(weights_T @ self.floor_T) + float(pi.sum())
        size = float(weights_T @ np.abs(self.floor_T)) + float(np.abs(pi).sum())
        for width, sets in self.sets.items():
            kinds, cost_KN = self._costs(width, np.arange(len(sets)), levels_LT, mu, stop)
            if cost_KN is None:
                return None
            net_KN = cost_KN - pi[sets].sum(axis=1)
            for k, net_N, cost_N in zip(kinds, net_KN, cost_KN, strict=True):
                least = int(net_N.argmin())
                bound += self.count_K[k] * float(net_N[least])
                size += self.count_K[k] * float(cost_N[least] + np.abs(pi[sets[least]]).sum())
                extra[self.first_K[k] : self.first_K[k] + len(sets)] = net_N - net_N[least]
        return Proven(bound - ULP * (mu.size / len(pi) + len(pi) + 64) * size, levels_LT, mu, pi, extra)

    def among(
        self, ids: IntArray, levels_LT: FloatArray, mu_LET: FloatArray, pi_E: FloatArray, stop: Any
    ) -> tuple[IntArray, FloatArray] | None:
        """(columns, what they cost above the least of their kind), of those with the experts of some; as `prove`."""
        mu, pi = feasible(mu_LET, pi_E, self.problem.weights_T)
        kind, found, extra = self.kind(ids), [], []
        for width, sets in self.sets.items():
            mine = self.size_K[kind] == width
            some = np.unique(ids[mine] - self.first_K[kind[mine]])
            kinds, cost_KN = self._costs(width, some, levels_LT, mu, stop)
            if cost_KN is None:
                return None
            net_KN = cost_KN - pi[sets[some]].sum(axis=1)
            found.append((self.first_K[kinds][:, None] + some).ravel())
            extra.append((net_KN - net_KN.min(axis=1, initial=np.inf, keepdims=True)).ravel())
        return np.concatenate(found), np.concatenate(extra)

    def _costs(
        self, width: int, some_N: IntArray, levels_LT: FloatArray, mu_LET: FloatArray, stop: Any
    ) -> tuple[IntArray, FloatArray | None]:
        """(kinds that have so many slots, costs [K, N] of some of their contents or None when stopped)."""
        kinds = np.flatnonzero(self.size_K == width)
        cost_KN = np.zeros((len(kinds), len(some_N)))
        ends = np.vstack([levels_LT, np.full((1, levels_LT.shape[1]), np.inf)])
        mu_ELT, sets = np.ascontiguousarray(mu_LET.transpose(1, 0, 2)), self.sets[width][some_N]
        done = price(self.features_EFT, sets, self.ranks_K[kinds], self.tables, ends, mu_ELT, cost_KN, stop)
        return kinds, cost_KN if done else None

"""All contents that ranks can have, priced by pairs of experts: a bound where they are too many to list.

With the multipliers of the co-location programme (`gemopt.bounds.dual_bound`) what a content C costs on rank g of group
c is a sum over pairs, whatever the steps. For any prices pi of experts no placement without copies is below

    sum_t (w_t - sum mu_t) floor_t  +  sum_i pi_i  +  sum_g min_C ( s_g cost_c(C) - sum_{i in C} pi_i )
    cost_c(C) = sum_{i in C} alone_ci  +  sum_{i < j in C} sum_kf b_ckf (M_kfij + M_kfji)
    alone_ci = sum_k a_ck sum_t mu_tki + sum_kf b_ckf M_kfii

where C runs over all sets of S_g experts. They are taken in halves: one product of matrices prices every left half with
every right one. The master programme over the cheapest contents (`column_master`) gives multipliers and prices.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import comb
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.bounds import Together
from gemopt.bounds.colocation import Programme
from gemopt.bounds.dual_bound import costs, feasible, rounding
from gemopt.bounds.together import TOLERANCE, worthwhile
from gemopt.latency import FloatArray
from gemopt.problem import Problem
from gemopt.solvers.exact.column_master import Master

IntArray = NDArray[np.int64]

ITERATIONS = 40  # of the master between two looks at all contents
EXACT = 3  # looks, of which one is a bound
HELD = 800  # cheapest contents in the master, beside those in use
FEWEST = 3000  # iterations before it may stop without having risen above the floors
LEAST_GAIN = 0.02  # of what is open, in the last half of the iterations


class Half(NamedTuple):
    """Sets of some experts of one half of all: listed [N, size], and as ones [N, experts of that half]."""

    sets: NDArray[np.uint8]
    held: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Contents:
    """Contents of ranks kind by kind, and in each by how many experts of the left half they hold; see `Master`.

    Kinds are ranks of one group with one factor. group_K, factor_K, count_K, size_K: of each kind, its ranks and slots.
    """

    problem: Programme
    group_K: IntArray
    factor_K: FloatArray
    count_K: IntArray
    size_K: IntArray

    @classmethod
    def of(cls, programme: Programme) -> Contents:
        """The contents of a programme's ranks."""
        keys = np.stack([programme.group_G, programme.factor_G], axis=1)
        _, first_K, count_K = np.unique(keys, axis=0, return_index=True, return_counts=True)
        return cls(
            programme, programme.group_G[first_K], programme.factor_G[first_K], count_K, programme.slots_G[first_K]
        )

    @property
    def floor_T(self) -> FloatArray:
        """[T] floors of the steps in microseconds."""
        return self.problem.floor_T

    @property
    def planes(self) -> int:
        """K, planes of a latency."""
        return int(self.problem.planes_CKF.shape[1])

    @cached_property
    def halves(self) -> dict[int, list[tuple[Half, Half]]]:
        """For every number of slots the sets of the left half and of the right half that go together."""
        experts, middle = self.problem.num_experts, self.problem.num_experts // 2
        left, right = range(middle), range(middle, experts)
        return {
            size: [
                (_half(left, mine), _half(right, size - mine))
                for mine in range(max(0, size - len(right)), min(middle, size) + 1)
            ]
            for size in np.unique(self.size_K).tolist()
        }

    @cached_property
    def first_K(self) -> IntArray:
        """Where the contents of a kind begin."""
        return np.cumsum([0, *(comb(self.problem.num_experts, int(size)) for size in self.size_K)])[:-1]

    def kind(self, ids: IntArray) -> IntArray:
        """Kinds of some contents."""
        return np.searchsorted(self.first_K, ids, side="right") - 1

    def members(self, ids: IntArray) -> NDArray[np.uint8]:
        """[n, most slots] experts of some contents, then zeros."""
        out, kind_N = np.zeros((len(ids), int(self.size_K.max())), np.uint8), self.kind(ids)
        at_N = ids - self.first_K[kind_N]
        for size, blocks in self.halves.items():
            first = 0
            for left, right in blocks:
                last = first + len(left.sets) * len(right.sets)
                mine = np.flatnonzero((self.size_K[kind_N] == size) & (at_N >= first) & (at_N < last))
                rows, columns = np.divmod(at_N[mine] - first, len(right.sets))
                out[mine, :size] = np.hstack([left.sets[rows], right.sets[columns]])
                first = last
        return out

    def parts(self, ids: IntArray, ends_LT: FloatArray, scale: float) -> NDArray[np.float32]:
        """[n, K T] `scale` times what each plane has above the floors, or below them."""
        p, members, kind_N = self.problem, self.members(ids), self.kind(ids)
        out = np.empty((len(ids), self.planes * len(p.weights_T)), np.float32)
        for k in range(len(self.size_K)):
            mine = np.flatnonzero(kind_N == k)
            loads_FTN = p.features_FTE[:, :, members[mine, : self.size_K[k]]].sum(axis=3)
            planes_KF = p.planes_CKF[self.group_K[k]] * self.factor_K[k]
            times_KTN = planes_KF[:, 0, None, None] + np.tensordot(planes_KF[:, 1:], loads_FTN, 1)
            out[mine] = (times_KTN - ends_LT[0, :, None]).reshape(out.shape[1], len(mine)).T * scale
        return out

    def price(
        self, mu_TKE: FloatArray, pi_E: FloatArray, stop: NDArray[np.uint8], *, exact: bool = True
    ) -> tuple[float, IntArray] | None:
        """(bound of feasible multipliers and any prices, about the cheapest contents); None when stopped.

        Not exact: in float32, which is faster and no bound.
        """
        p, kind = self.problem, np.float64 if exact else np.float32
        alone_CE, pair_CEE, size_CE = costs(p, mu_TKE, np.zeros((p.num_groups, p.num_experts)))
        value = float((p.weights_T - mu_TKE.sum(axis=(1, 2))) @ p.floor_T) + float(pi_E.sum())
        size = abs(value) + 2 * float(np.abs(pi_E).sum()) * (1 + int(self.count_K.sum()))
        found = []
        for k, (c, factor) in enumerate(zip(self.group_K, self.factor_K, strict=True)):
            if stop[0]:
                return None
            alone_E, pair_EE = factor * alone_CE[c] - pi_E, factor * pair_CEE[c]
            cost_N, ids = self._cheapest(k, alone_E.astype(kind), pair_EE.astype(kind))
            least = float(cost_N.min())
            value += int(self.count_K[k]) * least
            size += int(self.count_K[k]) * (factor * float(size_CE[c].sum()) + abs(least))
            found.append(ids[np.argsort(cost_N)[: HELD // len(self.size_K) + 1]])
        return value - rounding(p, size) if exact else -np.inf, np.concatenate(found)

    def _cheapest(self, k: int, alone_E: NDArray[Any], pair_EE: NDArray[Any]) -> tuple[NDArray[Any], IntArray]:
        """(cost, number) of the cheapest content of kind k with each left half."""
        middle, first = len(alone_E) // 2, int(self.first_K[k])
        parts, ids = [], []
        for left, right in self.halves[int(self.size_K[k])]:
            left_AE, right_BE = left.held.astype(alone_E.dtype), right.held.astype(alone_E.dtype)
            left_A = _inside(left_AE, alone_E[:middle], pair_EE[:middle, :middle])
            right_B = _inside(right_BE, alone_E[middle:], pair_EE[middle:, middle:])
            across_AE = np.column_stack([left_AE @ pair_EE[:middle, middle:], left_A, np.ones_like(left_A)])
            cost_AB = across_AE @ np.column_stack([right_BE, np.ones_like(right_B), right_B]).T
            best_A = cost_AB.argmin(axis=1)
            parts.append(cost_AB[np.arange(len(best_A)), best_A])
            ids.append(first + np.arange(len(best_A)) * len(right.sets) + best_A)
            first += cost_AB.size
        return np.concatenate(parts), np.concatenate(ids)


def _half(experts: range, size: int) -> Half:
    sets = np.array(list(combinations(experts, size)), np.uint8).reshape(comb(len(experts), size), size)
    held = np.zeros((len(sets), len(experts)), np.float32)
    np.put_along_axis(held, sets.astype(np.int64) - experts.start, 1.0, axis=1)
    return Half(sets, held)


def _inside(held_NE: NDArray[Any], alone_E: NDArray[Any], pair_EE: NDArray[Any]) -> NDArray[Any]:
    """[N] cost of the experts of sets alone and with one another."""
    return np.asarray(held_NE @ alone_E + ((held_NE @ pair_EE) * held_NE).sum(axis=1) / 2)


def contents_bound(problem: Problem, floor_T: FloatArray, stop: NDArray[np.uint8], target_us: float) -> Together:
    """As `together_bound`, with all contents of ranks: higher and later. `problem` is one that `paired` says yes to."""
    begin, base = time.monotonic(), float(problem.weights_T @ floor_T)
    found = Together(base - TOLERANCE * abs(base))
    if not worthwhile(problem, base):
        return found
    found.programme = Programme.of(problem, floor_T)
    space = Contents.of(found.programme)
    unit = target_us if np.isfinite(target_us) else 1.1 * base
    master = Master(space, unit)
    while not stop[0]:
        mu, pi_E = master.multipliers()
        mu_TKE = mu[0].reshape(problem.num_experts, space.planes, -1).transpose(2, 1, 0)
        mu_TKE, v_CE = feasible(found.programme, mu_TKE, np.zeros((space.problem.num_groups, problem.num_experts)))
        pi_E = np.nan_to_num(pi_E + space.floor_T @ mu_TKE.sum(axis=1), nan=0.0, posinf=0.0, neginf=0.0)
        exact = master.iterations % (EXACT * ITERATIONS) == 0
        priced = space.price(mu_TKE, pi_E, stop, exact=exact)
        if priced is None:
            break
        bound_us, cheapest = priced
        if bound_us > found.bound_us:
            found.bound_us, found.multipliers, found.prices_E = bound_us, (mu_TKE, v_CE), pi_E
        found.iterations = master.iterations
        if exact:
            found.looks.append((master.iterations, found.bound_us))
            found.seconds.append(time.monotonic() - begin)
            if found.bound_us >= unit * (1 - TOLERANCE) or _stalled(found, unit):
                break
        master.hold(np.concatenate([master.used, cheapest]))
        master.iterate(ITERATIONS, stop)
    return found


def _stalled(found: Together, target_us: float) -> bool:
    """Whether the last half of the iterations gained next to nothing of what is open: the first ones never do."""
    now, bound = found.looks[-1]
    before = [value for count, value in found.looks if count <= now / 2]
    risen = before[-1] > found.looks[0][1] or now >= FEWEST
    return risen and bound - before[-1] <= LEAST_GAIN * (target_us - bound)

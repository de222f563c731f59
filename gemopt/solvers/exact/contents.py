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
from typing import NamedTuple

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

ITERATIONS = 30  # of the master between two looks at all contents
HELD = 800  # cheapest contents in the master, beside those in use
FEWEST = 3000  # iterations before it may stop without having risen above the floors
LEAST_GAIN = 0.02  # of what is open, in the last half of the iterations


class Half(NamedTuple):
    """Sets of some experts of one half of all: listed [N, size], and as ones [N, experts of that half]."""

    sets: NDArray[np.uint8]
    held: FloatArray


class Priced(NamedTuple):
    """A bound in microseconds and the cheapest contents, with what they cost beyond the least of their kind."""

    bound_us: float
    ids: IntArray
    extra_N: FloatArray


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

    def parts(self, ids: IntArray, ends_LT: FloatArray) -> NDArray[np.float32]:
        """[n, K T] what each plane has above the floors, or below them."""
        p, members, kind_N = self.problem, self.members(ids), self.kind(ids)
        out = np.empty((len(ids), self.planes * len(p.weights_T)), np.float32)
        for k in range(len(self.size_K)):
            mine = np.flatnonzero(kind_N == k)
            loads_FTN = p.features_FTE[:, :, members[mine, : self.size_K[k]]].sum(axis=3)
            planes_KF = p.planes_CKF[self.group_K[k]] * self.factor_K[k]
            times_KTN = planes_KF[:, 0, None, None] + np.tensordot(planes_KF[:, 1:], loads_FTN, 1)
            out[mine] = (times_KTN - ends_LT[0, :, None]).reshape(-1, len(mine)).T
        return out

    def price(self, mu_TKE: FloatArray, pi_E: FloatArray, most: int, stop: NDArray[np.uint8]) -> Priced | None:
        """The bound of feasible multipliers and any prices, and about the cheapest contents; None when stopped."""
        p, middle = self.problem, self.problem.num_experts // 2
        alone_CE, pair_CEE, size_CE = costs(p, mu_TKE, np.zeros((p.num_groups, p.num_experts)))
        fixed = float((p.weights_T - mu_TKE.sum(axis=(1, 2))) @ p.floor_T) + float(pi_E.sum())
        size = abs(fixed) + 2 * float(np.abs(pi_E).sum()) * (1 + int(self.count_K.sum()))
        ids, extras = [], []
        for k, (c, factor) in enumerate(zip(self.group_K, self.factor_K, strict=True)):
            if stop[0]:
                return None
            alone_E, pair_EE = factor * alone_CE[c] - pi_E, factor * pair_CEE[c]
            values, found, first = [], [], int(self.first_K[k])
            for left, right in self.halves[int(self.size_K[k])]:
                left_A = _inside(left, alone_E[:middle], pair_EE[:middle, :middle])
                right_B = _inside(right, alone_E[middle:], pair_EE[middle:, middle:])
                across_AE, ones_A, ones_B = (
                    left.held @ pair_EE[:middle, middle:],
                    np.ones(len(left_A)),
                    np.ones(len(right_B)),
                )
                cost_AB = (
                    np.column_stack([across_AE, left_A, ones_A]) @ np.column_stack([right.held, ones_B, right_B]).T
                )
                best_A = cost_AB.argmin(axis=1)
                values.append(cost_AB[np.arange(len(best_A)), best_A])
                found.append(first + np.arange(len(best_A)) * len(right.sets) + best_A)
                first += cost_AB.size
            value_A = np.concatenate(values)
            least = float(value_A.min())
            fixed += int(self.count_K[k]) * least
            size += int(self.count_K[k]) * (factor * float(size_CE[c].sum()) + abs(least))
            cheapest = np.argsort(value_A)[: most // len(self.size_K) + 1]
            ids.append(np.concatenate(found)[cheapest])
            extras.append(value_A[cheapest] - least)
        return Priced(fixed - rounding(p, size), np.concatenate(ids), np.concatenate(extras))


def _half(experts: range, size: int) -> Half:
    sets = np.array(list(combinations(experts, size)), np.uint8).reshape(comb(len(experts), size), size)
    held = np.zeros((len(sets), len(experts)))
    np.put_along_axis(held, sets.astype(np.int64) - experts.start, 1.0, axis=1)
    return Half(sets, held)


def _inside(half: Half, alone_E: FloatArray, pair_EE: FloatArray) -> FloatArray:
    """[N] cost of the experts of a half alone and with one another."""
    return np.asarray(half.held @ alone_E + 0.5 * ((half.held @ pair_EE) * half.held).sum(axis=1))


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
        priced = space.price(mu_TKE, pi_E, HELD, stop)
        if priced is None:
            break
        if priced.bound_us > found.bound_us:
            found.bound_us, found.multipliers, found.prices_E = priced.bound_us, (mu_TKE, v_CE), pi_E
        found.iterations = master.iterations
        found.looks.append((master.iterations, found.bound_us))
        found.seconds.append(time.monotonic() - begin)
        if found.bound_us >= unit * (1 - TOLERANCE) or _stalled(found, unit):
            break
        master.hold(np.concatenate([master.used, priced.ids]))
        master.iterate(ITERATIONS, stop)
    return found


def _stalled(found: Together, target_us: float) -> bool:
    """Whether the last half of the iterations gained next to nothing of what is open: the first ones never do."""
    now, bound = found.looks[-1]
    before = [value for count, value in found.looks if count <= now / 2]
    risen = before[-1] > found.looks[0][1] or now >= FEWEST
    return risen and bound - before[-1] <= LEAST_GAIN * (target_us - bound)

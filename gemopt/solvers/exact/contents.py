"""All contents that ranks can have, priced by pairs of experts: a bound where they are too many to list.

With the multipliers of the co-location programme (`gemopt.bounds.dual_bound`) what a content C costs on rank g of group
c is a sum over pairs, whatever the steps. For any prices pi of experts no placement without copies is below

    sum_t (w_t - sum mu_t) floor_t  +  sum_i pi_i  +  sum_g min_C ( s_g cost_c(C) + above_g(C) - sum_{i in C} pi_i )
    cost_c(C) = sum_{i in C} alone_ci  +  sum_{i < j in C} sum_kf b_ckf (M_kfij + M_kfji)
    alone_ci = sum_k a_ck sum_t mu_tki + sum_kf b_ckf M_kfii
    above_g(C) = sum_tk (sum_{i in C} mu_tki) ( max(floor_t, max_k f_gk(C, t)) - f_gk(C, t) )

where C runs over all sets of S_g experts, and f_gk are the planes of g. `above` is no sum over pairs, but it is never
negative: it is computed only for contents that would be cheapest without it (`content_kernels`). The master programme
over the cheapest contents (`column_master`) gives multipliers and prices: at first without `above`, later with it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from math import comb

import numpy as np
from numpy.typing import NDArray

from gemopt.bounds import Together
from gemopt.bounds.colocation import Programme
from gemopt.bounds.dual_bound import costs, feasible, rounding
from gemopt.bounds.together import TOLERANCE, worthwhile
from gemopt.latency import FloatArray, IntArray
from gemopt.problem import Problem
from gemopt.solvers.exact.column_master import Master
from gemopt.solvers.exact.content_kernels import Steps, cheapest
from gemopt.solvers.exact.numbered import Numbered

ITERATIONS = 40  # of the master between two looks at all contents
HELD = 800  # cheapest contents of all kinds in the master, beside those in use
RISING = 400  # iterations of which the bound gains little, and then much
FEWEST = 3000  # iterations before it may stop without having risen above the floors
LEAST_GAIN = 0.02  # of what is open, in the last half of the iterations
SLOW = 0.2  # of what is open, in the last quarter of the iterations: then latencies are cut at the floors
TINY = 1e-20  # microseconds; smaller multipliers count as none, since their products are slow to compute


@dataclass(frozen=True, eq=False)
class Contents(Numbered):
    """Contents of ranks by pairs; see `Master`.

    Kinds are ranks of one group with one factor. group_K, factor_K, count_K: of each kind, and how many ranks it has.
    part_TKE: part of a multiplier that goes to each plane, once latencies are cut at the floors; None before.
    """

    problem: Programme
    group_K: IntArray
    factor_K: FloatArray
    count_K: IntArray
    part_TKE: FloatArray | None = None

    @classmethod
    def of(cls, programme: Programme) -> Contents:
        """The contents of a programme's ranks."""
        keys = np.stack([programme.group_G, programme.factor_G], axis=1)
        _, first_K, count_K = np.unique(keys, axis=0, return_index=True, return_counts=True)
        group_K, factor_K = programme.group_G[first_K], programme.factor_G[first_K]
        return cls(programme.num_experts, programme.slots_G[first_K], programme, group_K, factor_K, count_K)

    @property
    def floor_T(self) -> FloatArray:
        """[T] floors of the steps in microseconds."""
        return self.problem.floor_T

    @property
    def planes(self) -> int:
        """Rows that a latency has in the master: its planes, or one once it is cut."""
        return 1 if self.part_TKE is not None else int(self.problem.planes_CKF.shape[1])

    def parts(self, ids: IntArray, ends_LT: FloatArray, scale: float) -> NDArray[np.float32]:
        """[n, rows T] `scale` times what each plane has above the floors, or below them; cut, what the largest has."""
        p, members, kind_N = self.problem, self.members(ids), self.kind(ids)
        out = np.empty((len(ids), self.planes * len(p.weights_T)), np.float32)
        for k in range(len(self.size_K)):
            mine = np.flatnonzero(kind_N == k)
            loads_FTN = p.features_FTE[:, :, members[mine, : self.size_K[k]]].sum(axis=3)
            planes_KF = p.planes_CKF[self.group_K[k]] * self.factor_K[k]
            times_KTN = planes_KF[:, 0, None, None] + np.tensordot(planes_KF[:, 1:], loads_FTN, 1) - ends_LT[0, :, None]
            if self.part_TKE is not None:
                times_KTN = times_KTN.max(axis=0, keepdims=True).clip(0)
            out[mine] = times_KTN.reshape(out.shape[1], len(mine)).T * scale
        return out

    def price(
        self, mu_TKE: FloatArray, pi_E: FloatArray, most_K: FloatArray, stop: NDArray[np.uint8]
    ) -> tuple[float, IntArray] | None:
        """(bound of feasible multipliers and any prices, the cheapest contents); None when stopped.

        most_K: microseconds; contents that cost as much less their prices, or more, are not asked for.
        """
        p = self.problem
        alone_CE, pair_CEE, size_CE = costs(p, mu_TKE, np.zeros((p.num_groups, p.num_experts)))
        value = float((p.weights_T - mu_TKE.sum(axis=(1, 2))) @ p.floor_T) + float(pi_E.sum())
        ranks, planes = int(self.count_K.sum()), mu_TKE.shape[1]
        size = abs(value) + ranks * float(p.weights_T @ np.abs(p.floor_T)) + 2 * float(np.abs(pi_E).sum()) * (1 + ranks)
        found = []
        for k, (c, factor) in enumerate(zip(self.group_K, self.factor_K, strict=True)):
            order = np.argsort(-alone_CE[c])  # those first that decide most
            alone_E, pair_EE = (factor * alone_CE[c] - pi_E)[order], factor * pair_CEE[c][np.ix_(order, order)]
            wanted = min(HELD // len(self.size_K) + 1, comb(p.num_experts, int(self.size_K[k])))
            net_M, sets_MS = np.full(wanted, np.inf), np.zeros((wanted, int(self.size_K[k])), np.uint8)
            steps = self._steps(k, mu_TKE, order)
            if not cheapest(alone_E, pair_EE, sets_MS.shape[1], most_K[k], steps, net_M, sets_MS, stop):
                return None
            least = min(float(net_M.min()), float(most_K[k]))
            value += int(self.count_K[k]) * least
            size += int(self.count_K[k]) * (factor * float(size_CE[c].sum()) + abs(least))
            found.append(self.ids(k, order[sets_MS[np.isfinite(net_M)]]))
        return value - (1 + planes) * rounding(p, size), np.concatenate(found)

    def _steps(self, k: int, mu_TKE: FloatArray, order: IntArray) -> Steps:
        """What contents of kind k take at every step, of experts in this order; no planes before latencies are cut."""
        p, planes = self.problem, 0 if self.part_TKE is None else mu_TKE.shape[1]
        planes_PF = p.planes_CKF[self.group_K[k], :planes] * self.factor_K[k]
        mu_EPT = np.where(mu_TKE > TINY, mu_TKE, 0.0)[:, :planes, order].transpose(2, 1, 0)
        rise_EPT = np.tensordot(planes_PF[:, 1:], p.features_FTE[:, :, order], 1).transpose(2, 0, 1)
        return Steps(*map(np.ascontiguousarray, (mu_EPT, rise_EPT, planes_PF[:, 0], p.floor_T)))


class ContentsSearch:
    """A bound of all contents of ranks that rises while `run` does; later and higher than `together_bound`.

    `problem` is one that `paired` says yes to, `floor_T` and `target_us` as there. found: what is known. ended: nothing
    more is to be gained. look_s: seconds from one look at all contents to the next.
    """

    def __init__(self, problem: Problem, floor_T: FloatArray, target_us: float) -> None:
        self.base = float(problem.weights_T @ floor_T)
        self.found = Together(self.base - TOLERANCE * abs(self.base))
        self.target_us = target_us if np.isfinite(target_us) else 1.1 * self.base
        self.ended, self.look_s = not worthwhile(problem, self.base), 0.0
        if not self.ended:
            self.found.programme = Programme.of(problem, floor_T)
            self.space = Contents.of(self.found.programme)
            self.master = Master(self.space, self.target_us)

    @property
    def risen(self) -> bool:
        """Whether anything is proven above the floors, and what it gains tells what it will."""
        return self.found.multipliers is not None and self.found.iterations >= RISING

    def hurries(self, _seconds: float) -> bool:
        """Whether it must go on before so many seconds are over: never, since its looks are short."""
        return False

    def run(self, stop: NDArray[np.uint8], seconds: float = np.inf) -> Together:
        """Go on until stopped, which may lose what one look took, or so many seconds are over, or ended."""
        begin = time.monotonic()
        while not (stop[0] or self.ended or time.monotonic() - begin >= seconds):
            now = time.monotonic()
            self.master.iterate(ITERATIONS, stop)
            cheap = self._look(stop)
            if cheap is None:
                break
            self.look_s = time.monotonic() - now
            self.found.seconds.append(sum(self.found.seconds[-1:]) + self.look_s)
            self.ended = self.found.bound_us >= self.target_us * (1 - TOLERANCE) or self._stalled()
            if self.space.part_TKE is None and self._slow():
                self._cut()
            self.master.hold(np.concatenate([self.master.used, cheap]))
        return self.found

    def _look(self, stop: NDArray[np.uint8]) -> IntArray | None:
        """The bound of the multipliers now, and contents that are cheap with them; None when stopped."""
        space, found, p = self.space, self.found, self.space.problem
        mu, pi_E = self.master.multipliers()
        mu_TKE = mu[0].reshape(p.num_experts, space.planes, -1).transpose(2, 1, 0)
        if space.part_TKE is not None:
            mu_TKE = mu_TKE * space.part_TKE
        mu_TKE, v_CE = feasible(p, mu_TKE, np.zeros((p.num_groups, p.num_experts)))
        pi_E = np.nan_to_num(pi_E + space.floor_T @ mu_TKE.sum(axis=1), nan=0.0, posinf=0.0, neginf=0.0)
        most_K = np.full(len(space.size_K), np.inf) if space.part_TKE is None else self.master.least()
        priced = space.price(mu_TKE, pi_E, most_K, stop)
        if priced is None:
            return None
        bound_us, cheap = priced
        if bound_us > found.bound_us:
            found.bound_us, found.multipliers, found.prices_E = bound_us, (mu_TKE, v_CE), pi_E
        found.iterations = self.master.iterations
        found.looks.append((found.iterations, found.bound_us))
        return cheap

    def _cut(self) -> None:
        """Latencies cut at the floors from now on, each multiplier divided among the planes as it is."""
        assert self.found.multipliers is not None
        mu_TKE, _ = self.found.multipliers
        total_TKE = np.repeat(mu_TKE.sum(axis=1, keepdims=True), mu_TKE.shape[1], axis=1)
        part_TKE = np.full_like(mu_TKE, 1 / mu_TKE.shape[1])
        np.divide(mu_TKE, total_TKE, out=part_TKE, where=total_TKE > TINY)
        self.space = replace(self.space, part_TKE=part_TKE)
        self.master.fold(self.space)

    def _slow(self) -> bool:
        """Whether the bound, above the floors, rose by little of what is open in the last quarter of the iterations."""
        now, bound = self.found.looks[-1]
        before = [value for count, value in self.found.looks if count <= 0.75 * now]
        risen = bool(before) and before[-1] > self.found.looks[0][1]
        return risen and bound - before[-1] <= SLOW * (self.target_us - bound)

    def _stalled(self) -> bool:
        """Whether the last half of the iterations gained next to nothing of what is open: the first ones never do."""
        now, bound = self.found.looks[-1]
        before = [value for count, value in self.found.looks if count <= now / 2]
        risen = bool(before) and (before[-1] > self.found.looks[0][1] or now >= FEWEST)
        return risen and bound - before[-1] <= LEAST_GAIN * (self.target_us - bound)

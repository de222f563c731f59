"""The co-location bound: a linear programme over which experts share a rank, stated once; `primal_dual` solves it.

Every rank g of a group c takes at least `s_g` times the group's convex planes `a_k + b_k . x` of its feature sums x.
For an expert i let `q_ic` be `s_g` when its rank g is of group c, else 0, and `U_cij` the same when i and j share that
rank. As the rank of every expert waits for nobody, for all steps t, experts i and planes k:

    z_t >= sum_c ( a_ck q_ic + sum_f b_ckf ( phi_fti q_ic + sum_j phi_ftj U_cij ) )

with `sum_j U_cij = (S_c - 1) q_ic`, `0 <= U_cij = U_cji <= min(q_ic, q_jc)`, and q an assignment of experts to slots.
No rank is named where ranks are alike, so nothing is lost to symmetry. A group of one rank is always valid, and the
tightest; ranks whose planes are multiples of one another may share a group.

With spare slots an expert may have r copies with a share of 1 / r each (the even split; it does not hold for others):
then q and U are made of shares y, `q_ic = sum_g s_g y_ig` and `U_cij = sum_g s_g y_ig y_jg`. A rank has a mass of at
least S - spare, so `sum_j U_cij >= (S_c - spare) q_ic` with `U_cii = q_ic / r`; and as shares are whole numbers, the
load of a rank is at most `deficit_FT` less than its shares say. `dual_bound` says what both cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import Curve, FloatArray, Latency
from gemopt.problem import Problem

MOST_PLANES = 4
ALIKE = 1e-9  # planes this close, relatively, are multiples of one another
CLOSE = (ALIKE, 1e-3, 1e-2, 0.1, np.inf)  # and this close, one after the other, where groups would be too many
MOST_GROUPS = 16
MOST_PAIRS = 1 << 21  # of all groups: what an iteration goes through
MARGIN = 1e-12  # relative; planes are lowered by it
PROBES = 64


@dataclass(frozen=True, eq=False)
class Programme:
    """The linear programme of one layer, in microseconds and in the problem's own loads.

    Attributes
    ----------
    features_FTE
        [F, T, E] features of the steps that have weight.
    weights_T, floor_T
        [T] weight and simple bound in microseconds of each of these steps.
    planes_CKF
        [C, K, 1 + F] intercept and slopes of each group's planes.
    group_G, factor_G
        [G] group and factor of each rank that has slots; `slots_G` its slots.
    slots_C
        [C] slots of each rank of a group.
    spare
        Slots beyond one per expert: so many copies there may be.
    most_copies
        Copies that one expert can have.
    deficit_FT
        [F, T] most that whole copies take from the load of a rank.
    """

    features_FTE: FloatArray
    weights_T: FloatArray
    floor_T: FloatArray
    planes_CKF: FloatArray
    group_G: NDArray[np.int64]
    factor_G: FloatArray
    slots_G: NDArray[np.int64]
    slots_C: NDArray[np.int64]
    spare: int
    most_copies: int
    deficit_FT: FloatArray

    @property
    def num_experts(self) -> int:
        """E, experts."""
        return int(self.features_FTE.shape[2])

    @property
    def num_groups(self) -> int:
        """C, groups of ranks."""
        return len(self.slots_C)

    @property
    def alike(self) -> bool:
        """Whether all ranks are one group with one factor, so that it does not matter which one an expert is on."""
        return self.num_groups == 1 and bool((self.factor_G == self.factor_G[0]).all())

    @classmethod
    def of(cls, problem: Problem, floor_T: FloatArray, *, apart: bool = False) -> Programme:
        """State it. floor_T: [T] lower bounds of the steps' makespans. apart: no group holds ranks of two factors."""
        used = np.flatnonzero(problem.weights_T > 0)
        busy = np.flatnonzero(problem.slots_per_rank > 0)
        features_FTE = problem.features_FTE[:, used].astype(np.float64)
        slots_G, spare = problem.slots_per_rank[busy], problem.spare_slots
        least_GF, most_GF = _load_ranges(features_FTE, slots_G, spare)
        probes_NF = _probes(features_FTE, len(busy))
        planes = [
            _rank_planes(problem.latencies[g], spare > 0, least_GF[i], most_GF[i], probes_NF)
            for i, g in enumerate(busy)
        ]
        most = min(MOST_GROUPS, MOST_PAIRS // problem.num_experts**2)
        group_G, factor_G, bases = _groups(planes, most_GF.max(axis=0), slots_G, apart, most)
        return cls(
            features_FTE,
            problem.weights_T[used],
            floor_T[used],
            bases,
            group_G,
            factor_G,
            slots_G,
            np.array([slots_G[group_G == c][0] for c in range(len(bases))]),
            spare,
            min(spare + 1, len(busy)),
            _deficit(problem, used, min(spare + 1, len(busy))),
        )


def _load_ranges(features_FTE: FloatArray, slots_G: NDArray[np.int64], spare: int) -> tuple[FloatArray, FloatArray]:
    """[G, F] least and most that a rank can carry of each feature at any step."""
    sums_FTI = np.zeros((*features_FTE.shape[:2], features_FTE.shape[2] + 1))
    np.cumsum(np.sort(features_FTE, axis=2), axis=2, out=sums_FTI[:, :, 1:])
    whole_G = np.maximum(slots_G - spare, 0)
    least_GF = sums_FTI[:, :, whole_G].min(axis=1).T
    most_GF = (sums_FTI[:, :, -1:] - sums_FTI[:, :, features_FTE.shape[2] - slots_G]).max(axis=1).T
    return least_GF, most_GF


def _deficit(problem: Problem, used: NDArray[np.int64], most_copies: int) -> FloatArray:
    """[F, T] sum over as many experts as can have copies on a rank of what rounding takes from one copy at most."""
    counts_TE = problem.counts_TE[used]
    worst_FTE = np.zeros((len(problem.features), *counts_TE.shape))
    for f, feature in enumerate(problem.features):
        whole_TE = feature.of(counts_TE).astype(np.float64)
        for copies in range(2, most_copies + 1):
            lost_TE = whole_TE / copies - feature.of(counts_TE // copies)
            worst_FTE[f] = np.maximum(worst_FTE[f], lost_TE)
    split = min(problem.spare_slots, int(problem.slots_per_rank.max()), problem.num_experts)
    return np.asarray(np.sort(worst_FTE, axis=2)[:, :, problem.num_experts - split :].sum(axis=2)) * (1 + MARGIN)


def _probes(features_FTE: FloatArray, ranks: int) -> FloatArray:
    """[N, F] loads around what a rank carries, where planes should be tight."""
    steps = np.unique(np.linspace(0, features_FTE.shape[1] - 1, PROBES).round().astype(np.int64))
    means_FT = features_FTE[:, steps].sum(axis=2) / ranks
    return np.concatenate([means_FT.T * factor for factor in (0.9, 1.1, 1.3)])


def _rank_planes(
    latency: Latency, low: bool, least_F: FloatArray, most_F: FloatArray, probes_NF: FloatArray
) -> FloatArray:
    """[K, 1 + F] planes nowhere above a rank's latency within its range of loads, at most `MOST_PLANES`.

    low: of the latency made non-decreasing, as where copies take load away.
    """
    rows: list[list[float]] = []
    for term in (latency.low if low else latency).terms:
        pieces = [_pieces(curve, float(a), float(b)) for curve, a, b in zip(term, least_F, most_F, strict=True)]
        longest = max(map(len, pieces))
        for k in range(longest):
            chosen = [each[k * len(each) // longest] for each in pieces]
            rows.append([sum(a for a, _ in chosen), *(b for _, b in chosen)])
    table = np.array(rows)
    table[:, 0] -= MARGIN * (np.abs(table[:, 0]) + np.abs(table[:, 1:]) @ np.abs(most_F))
    values_KN = table[:, :1] + table[:, 1:] @ probes_NF.T
    kept = [int(values_KN.sum(axis=1).argmax())]
    while len(kept) < min(MOST_PLANES, len(table)):
        gains_K = np.maximum(values_KN - values_KN[kept].max(axis=0), 0.0).sum(axis=1)
        if gains_K.max() <= 1e-6 * np.abs(values_KN[kept]).max(axis=0).sum():
            break
        kept.append(int(gains_K.argmax()))
    chosen_K = table[kept]
    return np.asarray(chosen_K[np.lexsort(chosen_K.T)])


def _pieces(curve: Curve, least: float, most: float) -> list[tuple[float, float]]:
    """(intercept, slope) of the segments of the convex minorant of a curve on the loads from least to most."""
    inside = (curve.x > least) & (curve.x < most)
    x = np.concatenate([[least], curve.x[inside], [most]]) if most > least else np.array([least])
    y = curve(x)
    if len(x) == 1:
        return [(float(y[0]), 0.0)]
    corners = [0]
    for k in range(1, len(x)):
        while len(corners) > 1:
            i, j = corners[-2:]
            if (y[j] - y[i]) * (x[k] - x[i]) < (y[k] - y[i]) * (x[j] - x[i]):
                break
            corners.pop()
        corners.append(k)
    found: list[tuple[float, float]] = []
    for i, j in zip(corners[:-1], corners[1:], strict=True):
        slope = float((y[j] - y[i]) / (x[j] - x[i]))
        found.append((float((y - slope * x).min()), slope))
    return found


def _groups(
    planes: list[FloatArray], most_F: FloatArray, slots_G: NDArray[np.int64], apart: bool, most: int
) -> tuple[NDArray[np.int64], FloatArray, FloatArray]:
    """Group and factor of each rank, and [C, K, 1 + F] the groups' planes, times the factor below those of any member.

    Ranks share a group when their planes are multiples of each other at loads up to most_F, or nearly where that makes
    too many groups.
    """
    width = max(map(len, planes))
    table_GKF = np.stack([np.concatenate([rows, np.repeat(rows[-1:], width - len(rows), axis=0)]) for rows in planes])
    for close in CLOSE:
        group_G, factor_G, count = _grouped(
            table_GKF * np.append(1.0, most_F), slots_G, 1 + ALIKE if apart else np.inf, close
        )
        if count <= max(most, len(np.unique(slots_G))):
            break
    over_GKF = table_GKF / factor_G[:, None, None]
    bases = np.stack([over_GKF[group_G == c].min(axis=0) for c in range(count)])
    return group_G, factor_G, bases - 1e-15 * np.abs(bases)


def _grouped(
    table_GKF: FloatArray, slots_G: NDArray[np.int64], widest: float, close: float
) -> tuple[NDArray[np.int64], FloatArray, int]:
    size_G = np.maximum(np.abs(table_GKF).sum(axis=(1, 2)), 1e-300)
    group_G, factor_G = np.zeros(len(size_G), np.int64), np.ones(len(size_G))
    firsts: list[int] = []
    widest = min(max(widest, 1 + close), 1e100)  # a rank that takes no time is no multiple of one that does
    for g in np.argsort(size_G, kind="stable").tolist():
        for c, first in enumerate(firsts):
            if slots_G[g] != slots_G[first] or size_G[g] > size_G[first] * widest:
                continue
            base, factor = table_GKF[first], size_G[g] / size_G[first]
            off_K, size_K = np.abs(table_GKF[g] - factor * base).sum(axis=1), np.abs(base).sum(axis=1)
            if (off_K <= close * factor * size_K).all():
                group_G[g], factor_G[g] = c, 1.0 if factor <= 1 + ALIKE else factor
                break
        else:
            group_G[g] = len(firsts)
            firsts.append(g)
    return group_G, factor_G, len(firsts)

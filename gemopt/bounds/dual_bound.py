"""A bound from any multipliers of the co-location programme, in float64 and rounded down: right whatever they are.

For multipliers mu >= 0 of the rows with `sum mu_t <= w_t`, and v of the sums of U, no placement is below

    sum_t (w_t - sum mu_t) floor_t  +  min over assignments of experts to slots of  sum_i s_g kappa_ic

where g is the rank of i, c its group, M_kf = mu_k' phi_f, and

    R_cij    = sum_kf b_ckf (M_kfij + M_kfji) - v_ci - v_cj
    kappa_ic = sum_k a_ck sum_t mu_tki + sum_kf b_ckf M_kfii + (S_c - 1) v_ci + sum_j min(0, R_cij) / 2

since experts i and j together on a rank of group c cost `s_g R_cij`, each pays half of what is negative, and v_ci is
paid for each of the S_c - 1 others on the rank. The assignment is solved exactly.

With spare slots v >= 0 and S_c - 1 - spare others are sure; `a_ck` is less by `sum_f b_ckf deficit_ft`; and r copies of
i pay of `d_ic = sum_kf b_ckf M_kfii - v_ci` only `d_ic / r`: the most that so many copies can save is taken off.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from gemopt.bounds.colocation import Programme
from gemopt.latency import FloatArray, IntArray

ULP = 2.0**-52


def dual_bound(p: Programme, mu_TKE: FloatArray, v_CE: FloatArray) -> float:
    """Lower bound in microseconds of the weighted makespan of the programme's steps, for any finite multipliers."""
    mu_TKE, v_CE = feasible(p, mu_TKE, v_CE)
    kappa_CE, pair_CEE, size_CE = costs(p, mu_TKE, v_CE)
    kappa_CE += 0.5 * np.minimum(pair_CEE, 0.0).sum(axis=2)
    saved = _saved_by_copies(p, mu_TKE, v_CE)
    left_T = p.weights_T - mu_TKE.sum(axis=(1, 2))
    fixed = float(left_T @ p.floor_T)
    cost_EG = kappa_CE[p.group_G].T * p.factor_G
    if p.alike:
        value, error = float(cost_EG[:, 0].sum()), float(size_CE[0].sum() * p.factor_G[0])
    else:
        slot_rank = np.repeat(np.arange(len(p.slots_G)), p.slots_G)
        experts, slots = linear_sum_assignment(cost_EG[:, slot_rank])
        value = float(cost_EG[experts, slot_rank[slots]].sum())
        error = float((size_CE[p.group_G].T * p.factor_G).max(axis=1).sum())
    return float(fixed + value - saved - rounding(p, error + abs(fixed)))


def rounding(p: Programme, size: float) -> float:
    """What rounding takes at most from sums of terms that are `size` in all."""
    terms = p.features_FTE.shape[1] + 4.0 * p.num_experts + 64.0
    return float(ULP * terms * (size + float(p.weights_T @ np.abs(p.floor_T))))


def feasible(p: Programme, mu_TKE: FloatArray, v_CE: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Multipliers within their ranges: what is not finite or negative becomes 0, sums that are too large shrink."""
    mu = np.maximum(np.nan_to_num(mu_TKE, nan=0.0, posinf=0.0), 0.0)
    total_T = mu.sum(axis=(1, 2))
    shrink_T = np.where(
        total_T > p.weights_T * (1 - 1e-12), p.weights_T * (1 - 1e-12) / np.maximum(total_T, 1e-300), 1.0
    )
    v = np.nan_to_num(v_CE, nan=0.0, posinf=0.0, neginf=0.0)
    return mu * shrink_T[:, None, None], np.maximum(v, 0.0) if p.spare else v


def costs(p: Programme, mu_TKE: FloatArray, v_CE: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """([C, E] kappa without the pairs, [C, E, E] R, [C, E] sums of the absolute values that went into both).

    Of multipliers that are feasible.
    """
    groups, kinds = p.planes_CKF.shape[:2]
    experts = p.num_experts
    pair_CEE = np.zeros((groups, experts, experts))
    kappa_CE, size_CE = np.zeros((groups, experts)), np.zeros((groups, experts))
    for k in range(kinds):
        mass_E = mu_TKE[:, k].sum(axis=0)
        kappa_CE += p.planes_CKF[:, k, 0, None] * mass_E
        kappa_CE -= p.planes_CKF[:, k, 1:] @ (p.deficit_FT @ mu_TKE[:, k])
        size_CE += np.abs(p.planes_CKF[:, k, 0, None]) * mass_E
        for f, features_TE in enumerate(p.features_FTE):
            product_EE = mu_TKE[:, k].T @ features_TE
            slope_C = p.planes_CKF[:, k, 1 + f]
            pair_CEE += slope_C[:, None, None] * (product_EE + product_EE.T)
            kappa_CE += slope_C[:, None] * np.diagonal(product_EE)
            size_CE += np.abs(slope_C)[:, None] * (product_EE.sum(axis=1) + product_EE.sum(axis=0))
    size_CE += (experts + p.slots_C + p.spare)[:, None] * np.abs(v_CE) + np.abs(v_CE).sum(axis=1, keepdims=True)
    pair_CEE -= v_CE[:, :, None] + v_CE[:, None, :]
    diagonal = np.arange(experts)
    pair_CEE[:, diagonal, diagonal] = 0.0
    kappa_CE += (p.slots_C - 1 - p.spare)[:, None] * v_CE
    return kappa_CE, pair_CEE, size_CE


def _saved_by_copies(p: Programme, mu_TKE: FloatArray, v_CE: FloatArray) -> float:
    """The most that `spare` copies save on the diagonal: an expert's second one half of it, the third a sixth, ..."""
    if not p.spare:
        return 0.0
    alone_CE = -v_CE
    for k in range(p.planes_CKF.shape[1]):
        for f, features_TE in enumerate(p.features_FTE):
            alone_CE = alone_CE + p.planes_CKF[:, k, 1 + f, None] * (mu_TKE[:, k] * features_TE).sum(axis=0)
    cost_E = np.maximum(alone_CE[p.group_G] * p.factor_G[:, None], 0.0).max(axis=0)
    copies_R = np.arange(1, p.most_copies)
    savings = np.sort((cost_E[:, None] / (copies_R * (copies_R + 1))).ravel())[::-1]
    return float(savings[: p.spare].sum()) * (1 + 1e-9)


def pair_costs(p: Programme, mu_TKE: FloatArray, v_CE: FloatArray) -> tuple[float, FloatArray, FloatArray]:
    """(fixed, alone [G, E], pair [G, E, E]) in microseconds: without spare slots no placement costs less than these.

    fixed and, of each expert, its cost alone on its rank, and of each two on one rank their cost. Rounded down in all
    by putting the whole error into `fixed`. Ranks are those of the programme, which have slots.
    """
    assert not p.spare
    mu_TKE, v_CE = feasible(p, mu_TKE, v_CE)
    kappa_CE, pair_CEE, size_CE = costs(p, mu_TKE, v_CE)
    alone_GE = kappa_CE[p.group_G] * p.factor_G[:, None]
    prices_G = prices(p, mu_TKE, v_CE)
    left_T = p.weights_T - mu_TKE.sum(axis=(1, 2))
    fixed = float(left_T @ p.floor_T) + float(p.slots_G @ prices_G)
    error = float((size_CE[p.group_G] * p.factor_G[:, None]).max(axis=0).sum()) + p.num_experts * np.abs(prices_G).max()
    fixed -= rounding(p, error + abs(fixed))
    return fixed, alone_GE - prices_G[:, None], pair_CEE[p.group_G] * p.factor_G[:, None, None]


def prices(p: Programme, mu_TKE: FloatArray, v_CE: FloatArray) -> FloatArray:
    """[G] prices in microseconds of a slot of each rank, at which the assignment of `dual_bound` costs what it does."""
    kappa_CE, pair_CEE, _ = costs(p, *feasible(p, mu_TKE, v_CE))
    kappa_CE += 0.5 * np.minimum(pair_CEE, 0.0).sum(axis=2)
    cost_GE = kappa_CE[p.group_G] * p.factor_G[:, None]
    slot_rank = np.repeat(np.arange(len(p.slots_G)), p.slots_G)
    experts, slots = linear_sum_assignment(cost_GE.T[:, slot_rank])
    return slot_prices(cost_GE, slot_rank[slots][np.argsort(experts)])


def slot_prices(cost_GE: FloatArray, rank_E: IntArray) -> FloatArray:
    """[G] prices y <= 0 of slots at which every expert's rank in a best assignment is its cheapest, `cost - y`."""
    ranks = len(cost_GE)
    step_GG = np.full((ranks, ranks), np.inf)
    for g in range(ranks):
        mine = np.flatnonzero(rank_E == g)
        if len(mine):
            step_GG[g] = (cost_GE[:, mine] - cost_GE[g, mine]).min(axis=1)
    prices_G = np.zeros(ranks)
    for _ in range(ranks):  # Bellman and Ford
        prices_G = np.minimum(prices_G, (prices_G[:, None] + step_GG).min(axis=0))
    return prices_G

"""What the multipliers of the copies bound prove, in whole numbers: no rounding, so no doubt.

The formula is that of docs/bounds.md, under even shares or under any. With multipliers in units of 2^-24, times
and the price of a slot in picoseconds, all costs are whole numbers of 2^-24 picoseconds.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from gemopt.certificate import UNIT, IntArray, LayerProof
from gemopt.exceptions import InputError
from gemopt.verify.case import PS, Case
from gemopt.verify.dual import array, below

MOST_TIMES = 1 << 14  # of ranks that are told apart


def check_copies(case: Case, layer: LayerProof, duals: dict[str, IntArray]) -> float:
    """Microseconds that no placement of the layer falls below, by its multipliers of copies; rounded down.

    Raises
    ------
    InputError
        Multipliers that are missing, of other shapes, of no step or expert, negative or of too large sums.
    """
    name = f"Certificate.layers[{layer.layer_id}]"
    pair_N3, slot = array(duals, f"pair.{layer.layer_id}"), array(duals, f"slot.{layer.layer_id}")
    steps, experts = case.counts_TE.shape
    if pair_N3.ndim != 2 or pair_N3.shape[1] != 3 or slot.shape != (1,):
        raise InputError(f"{name}: pair", f"{pair_N3.shape}, {slot.shape}", "step, expert, multiplier; a price")
    if (pair_N3 < 0).any() or (pair_N3 >= [steps, experts, UNIT + 1]).any() or slot[0] < 0:
        raise InputError(
            f"{name}: pair", int(pair_N3.min(initial=0)), f"steps, experts, multipliers up to {UNIT}; a price >= 0"
        )
    step_N, expert_N, share_N = pair_N3.T
    total_T = np.zeros(steps, np.int64)
    np.add.at(total_T, step_N, share_N)
    if (total_T > UNIT).any():
        raise InputError(f"{name}: pair", int(total_T.max()), f"multipliers that sum to at most {UNIT} for each step")
    times_UK, load_N = _times(case, case.counts_TE[step_N, expert_N])
    price, total = int(slot[0]) * UNIT, int(case.floors_T.sum()) * UNIT
    paid_K = [price * k for k in range(1, times_UK.shape[1] + 1)]
    for expert in range(experts):
        mine = expert_N == expert
        above_NK = np.maximum(times_UK[load_N[mine]] - case.floors_T[step_N[mine], None], 0)
        total += min(share_N[mine].astype(object) @ above_NK.astype(object) + paid_K)
    return below(Fraction(total - price * int(case.slots_G.sum()), UNIT * PS))


def _times(case: Case, count_N: IntArray) -> tuple[IntArray, IntArray]:
    """([U, K] picoseconds of the counts that differ with 1, 2, ... copies on the ranks that do it best, [N] which)."""
    count_U, load_N = np.unique(count_N, return_inverse=True)
    hosts = np.flatnonzero(case.slots_G).tolist()
    grid = np.arange(int(count_N.max(initial=0)) + 1)
    loads_FM = np.stack([feature.of(grid) for feature in case.cost.features])
    time_GM = np.array([case.floor_ps(case.times_us(g, loads_FM, low=True)) for g in hosts])
    time_GM = np.maximum(time_GM, case.floors_T.min())
    most = min(case.spare + 1, len(hosts))
    times_KU = _even_times(time_GM, count_U, most) if case.split == "even" else _free_times(time_GM, count_U, most)
    return times_KU.T, load_N


def _even_times(time_GM: IntArray, count_U: IntArray, most: int) -> IntArray:
    """[K, U] of even shares: `n % k` copies have one more than the others."""
    time_GM = np.sort(time_GM, axis=0)
    times = [
        np.maximum(time_GM[(count_U - 1) % k, -(-count_U // k)], time_GM[k - 1, count_U // k])
        for k in range(1, most + 1)
    ]
    return np.stack(times)


def _free_times(time_GM: IntArray, count_U: IntArray, most: int) -> IntArray:
    """[K, U] of any shares: the least time in which the k ranks that carry most carry a count.

    Of more than `MOST_TIMES` times that any rank takes, some are left out: what needs one of them is taken to need no
    more than the least after the last one that is in.
    """
    time_N = np.unique(time_GM[time_GM <= time_GM[:, -1].min()])
    chosen_L = np.unique(np.linspace(0, len(time_N) - 1, min(len(time_N), MOST_TIMES)).astype(np.int64))
    least_L = time_N[np.append(0, chosen_L[:-1] + 1)]
    held_GL = np.array([np.searchsorted(time_M, time_N[chosen_L], side="right") for time_M in time_GM]) - 1
    held_KL = np.cumsum(-np.sort(-np.maximum(held_GL, 0), axis=0), axis=0)[:most]
    return np.stack([least_L[np.searchsorted(held_L, count_U)] for held_L in held_KL])

"""The copies bound: what an expert's copies can carry, over all steps together, where spare slots are few.

An expert e with k copies takes in step t at least `f_te(k)`: the time in which its ranks carry n_te, with nothing else
on them and as if they were the k that do it best. Copies that share evenly have `n // k` each, `n % k` of them one
more. Every expert has a copy, and all together are no more than there are slots. So for any multipliers `p_te >= 0`
with `sum_e p_te <= w_t` and any price of a slot, by Lagrangian duality, no placement is below

    sum_t w_t floor_t + sum_e min_k ( sum_t p_te max(0, f_te(k) - floor_t) + price k ) - price slots

The multipliers are those of a linear programme in the numbers of copies (fractions, and `f_te` made convex), whose rows
are added where they are violated: J. E. Kelley, "The cutting-plane method for solving convex programs" (1960). Its word
is not taken: the formula is evaluated in float64 with whatever it says.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import block_array, csr_array

from gemopt.bounds.simple import ROUNDING, weighted
from gemopt.interrupts import LEFT
from gemopt.latency import FloatArray, IntArray
from gemopt.placement import Split
from gemopt.problem import Problem

MOST_COPIES = 64  # of an expert that are told apart
MOST_LOADS, MOST_LEVELS = 1 << 13, 1 << 12  # loads and times beyond so many are rounded down
ROUNDS = 40
TIGHT = 1e-6  # relative: a row that says no more is not new
WHOLE = 1e-6  # fractions of a copy below are rounding
PRECISE = 1e-4  # of the floors: what is still open when it ends
LOOK_S = 0.02


class CopiesProof(NamedTuple):
    """Microseconds above the floors, and the multipliers that prove it: of N steps and experts, and a slot's price.

    A step and an expert may come more than once; what they have adds up.
    """

    above_us: float
    step_N: IntArray
    expert_N: IntArray
    share_N: FloatArray
    price: float


def copies_bound(problem: Problem, floor_T: FloatArray, stop: NDArray[np.uint8], *, seconds: float = np.inf) -> float:
    """Lower bound of the objective in microseconds, under any split, at least that of the floors.

    floor_T: [T] lower bounds of the steps' makespans in microseconds, as `step_bounds` gives them. stop: [1] turns 1
    when there is no more time (`Options.alarm`); seconds: for the programmes.
    """
    found = copies_proof(problem, floor_T, stop, seconds=seconds)
    return weighted(problem, floor_T) + (0.0 if found is None else found.above_us)


def copies_proof(
    problem: Problem, floor_T: FloatArray, stop: NDArray[np.uint8], *, seconds: float = np.inf
) -> CopiesProof | None:
    """What proves the bound; None where it is that of the floors."""
    found, _ = _scarce(problem, floor_T, stop, seconds)
    return None if found is None or found.above_us <= 0 else found


def scarce_copies(
    problem: Problem, floor_T: FloatArray, stop: NDArray[np.uint8], *, seconds: float = np.inf
) -> IntArray | None:
    """[E] copies with which the bound is reached, as whole numbers, of the last programme that there was time for.

    None where there are enough slots for the floors, or no time for any programme.
    """
    _, solved_E = _scarce(problem, floor_T, stop, seconds)
    if solved_E is None:
        return None
    copies_E = np.maximum(1, np.floor(solved_E + WHOLE)).astype(np.int64)
    left = max(0, problem.num_slots - int(copies_E.sum()))
    copies_E[np.argsort(copies_E - solved_E, kind="stable")[:left]] += 1
    return np.minimum(copies_E, problem.most_copies)


def _scarce(
    problem: Problem, floor_T: FloatArray, stop: NDArray[np.uint8], seconds: float
) -> tuple[CopiesProof | None, FloatArray | None]:
    """What proves more than the floors, and [E] copies, if known and too few to bring every expert to the floors."""
    end = time.monotonic() + seconds
    if problem.most_copies < 2 or stop[0]:
        return None, None
    pairs, needed_E = _pairs(problem, floor_T, problem.most_copies)
    if needed_E.sum() <= problem.num_slots:
        return None, None
    return _raised(problem, pairs, needed_E, PRECISE * weighted(problem, floor_T), stop, end)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """N pairs of a step and an expert that one copy keeps above the floor, by step.

    floor_N: microseconds of the step. load_N: rows of `time_UK`, microseconds with 1, 2, ... copies, not rising; the
    last also with any more.
    """

    step_N: IntArray
    expert_N: IntArray
    floor_N: FloatArray
    load_N: IntArray
    time_UK: FloatArray


def _pairs(problem: Problem, floor_T: FloatArray, most: int) -> tuple[_Pairs, IntArray]:
    """The pairs, and [E] how many copies bring an expert to the floors; one above what is told apart if none do."""
    counts_U, load_TE = np.unique(problem.counts_TE, return_inverse=True)
    time_UK = _times(problem, counts_U.astype(np.int64), most, float(floor_T.min()))
    load_TE = load_TE.reshape(problem.counts_TE.shape)
    step_N, expert_N = np.nonzero((time_UK[load_TE, 0] > floor_T[:, None]) & (problem.weights_T > 0)[:, None])
    load_N, floor_N = load_TE[step_N, expert_N], floor_T[step_N]
    needed_N, needed_E = np.ones(len(step_N), np.int64), np.ones(problem.num_experts, np.int64)
    for time_U in time_UK.T:
        needed_N += time_U[load_N] > floor_N
    np.maximum.at(needed_E, expert_N, needed_N)
    return _Pairs(step_N, expert_N, floor_N, load_N, time_UK), needed_E


def _times(problem: Problem, counts_U: IntArray, most: int, least: float) -> FloatArray:
    """[U, K] time of an expert with so many assignments and 1, 2, ... copies, 0 where it is below `least`."""
    unit = 1 + int(counts_U[-1]) // MOST_LOADS
    loads = np.arange(int(counts_U[-1]) // unit + 1, dtype=np.int64) * unit
    features = [feature.of(loads) for feature in problem.features]
    hosts = np.flatnonzero(problem.slots_per_rank)
    time_GN = np.maximum.accumulate([problem.latencies[g].low(features) for g in hosts], axis=1)
    told = min(most, MOST_COPIES)
    if problem.split is Split.EVEN:
        times = _even_times(np.sort(time_GN, axis=0), counts_U, unit, told, most)
    else:
        times = _free_times(time_GN, counts_U, unit, told, most, least)
    return np.minimum.accumulate(times, axis=1)


def _even_times(time_GN: FloatArray, counts_U: IntArray, unit: int, told: int, most: int) -> FloatArray:
    """Of even shares. time_GN: of multiples of a unit, the quickest rank first at each."""
    times_KU = [
        np.maximum(time_GN[(counts_U - 1) % k, -(-counts_U // k) // unit], time_GN[k - 1, counts_U // k // unit])
        for k in range(1, told + 1)
    ]
    if told < most:
        times_KU[-1] = time_GN[0, -(-counts_U // most) // unit]
    return np.stack(times_KU, axis=1)


def _free_times(time_GN: FloatArray, counts_U: IntArray, unit: int, told: int, most: int, least: float) -> FloatArray:
    """Of any shares: the k ranks that hold most within a time hold the count."""
    known = np.unique(time_GN[(time_GN > least) & (time_GN <= time_GN[:, -1].min())])
    chosen = np.unique(np.linspace(0, len(known) - 1, min(len(known), MOST_LEVELS)).astype(np.int64))
    if not len(known):
        return np.zeros((len(counts_U), told))
    after = np.append(0.0, known[chosen[:-1] + 1])  # least time of what the level before does not hold
    held_GL = np.array([np.searchsorted(time_N, known[chosen], side="right") for time_N in time_GN]) * unit - 1
    held_GL = -np.sort(-np.maximum(held_GL, 0), axis=0).cumsum(axis=0)
    held_GL = np.concatenate([held_GL[: told - 1], held_GL[most - 1 : most]])
    return np.stack([np.append(after, 0.0)[np.searchsorted(held_L, counts_U)] for held_L in held_GL], axis=1)


class _Rows(NamedTuple):
    """Rows of the programme: a pair takes at least `start + slope copies`, microseconds above its step's floor."""

    pair_R: IntArray
    start_R: FloatArray
    slope_R: FloatArray


def _raised(
    problem: Problem, pairs: _Pairs, needed_E: IntArray, close_us: float, stop: NDArray[np.uint8], end: float
) -> tuple[CopiesProof, FloatArray | None]:
    """The best that multipliers prove after a round, and [E] copies of the last one.

    close_us: what may be left open. end: when to end, by the monotonic clock.
    """
    hull_UK = _convex(np.maximum(pairs.time_UK, pairs.floor_N.min()))
    copies_E = 1 + (needed_E - 1) * (problem.spare_slots / (needed_E - 1).sum())
    above_T, none_N, known_E = np.zeros(problem.num_steps), np.zeros(0, np.int64), None
    best, rows = CopiesProof(0.0, none_N, none_N, np.zeros(0), 0.0), _Rows(none_N, np.zeros(0), np.zeros(0))
    for _ in range(ROUNDS):
        found, reached = _tangents(problem, pairs, hull_UK, copies_E, above_T)
        if not len(found.pair_R) or reached - best.above_us <= close_us:
            return best, copies_E
        rows = _Rows(*(np.append(old, new) for old, new in zip(rows, found, strict=True)))
        left_s = end - time.monotonic()
        programme = partial(_solved, problem, pairs, rows, left_s)
        solved = None if stop[0] or left_s <= 0 else _unless(stop, programme)
        if solved is None:
            break
        above_T, copies_E, share_R, price = solved
        best = max(best, _proved(problem, pairs, rows.pair_R, share_R, price), key=lambda each: each.above_us)
        known_E = copies_E
    return best, known_E


def _unless(stop: NDArray[np.uint8], call: Callable[[], Any]) -> Any:
    """What a call returns, or None once `stop` turns 1: its thread is then left to end with its own time."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()), name=LEFT, daemon=True)
    thread.start()
    while thread.is_alive() and not stop[0]:
        thread.join(LOOK_S)
    return found[0] if found else None


def _tangents(
    problem: Problem, pairs: _Pairs, hull_UK: FloatArray, copies_E: FloatArray, above_T: FloatArray
) -> tuple[_Rows, float]:
    """Of the pair that keeps each step longest, if longer than known; and what all steps take above the floors."""
    at_N = copies_E[pairs.expert_N]
    left_N = np.clip(at_N.astype(np.int64), 1, hull_UK.shape[1] - 1)
    time_N = hull_UK[pairs.load_N, left_N - 1]
    slope_N = hull_UK[pairs.load_N, left_N] - time_N
    start_N = time_N - slope_N * left_N - pairs.floor_N
    value_N = start_N + slope_N * at_N
    first_N = np.diff(pairs.step_N, prepend=-1) != 0
    longest_S = np.maximum(np.maximum.reduceat(value_N, np.flatnonzero(first_N)), 0.0)
    least_N = np.maximum(longest_S[np.cumsum(first_N) - 1], (1 + TIGHT) * above_T[pairs.step_N])
    pair_R = np.flatnonzero((value_N >= least_N) & (value_N > 0))
    reached = problem.weights_T[pairs.step_N[first_N]] @ longest_S
    return _Rows(pair_R, start_N[pair_R], slope_N[pair_R]), float(reached)


def _solved(
    problem: Problem, pairs: _Pairs, rows: _Rows, left_s: float
) -> tuple[FloatArray, FloatArray, FloatArray, float] | None:
    """([T] time above the floors, [E] copies, [R] multipliers of the rows, price of a slot) at the optimum, if found.

    In units in which the largest weight and the longest time are 1.
    """
    steps, experts, told = problem.num_steps, problem.num_experts, pairs.time_UK.shape[1]
    heavy, long = problem.weights_T.max(), pairs.time_UK.max()
    size, slots = len(rows.pair_R), np.ones((1, experts))
    step_RT = csr_array((-np.ones(size), (np.arange(size), pairs.step_N[rows.pair_R])), (size, steps))
    copies_RE = csr_array((rows.slope_R / long, (np.arange(size), pairs.expert_N[rows.pair_R])), (size, experts))
    found = linprog(
        np.append(problem.weights_T / heavy, np.zeros(experts)),
        A_ub=block_array([[step_RT, copies_RE], [None, csr_array(slots)]], format="csr"),
        b_ub=np.append(-rows.start_R / long, problem.num_slots),
        bounds=[(0, None)] * steps + [(1, told)] * experts,
        method="highs",
        options={"time_limit": left_s},
    )
    if found.status:
        return None
    share_R = -found.ineqlin.marginals * heavy
    return found.x[:steps] * long, np.clip(found.x[steps:], 1, told), share_R[:-1], float(share_R[-1] * long)


def _proved(problem: Problem, pairs: _Pairs, pair_R: IntArray, share_R: FloatArray, price: float) -> CopiesProof:
    """The formula, rounded down, for whatever multipliers and price."""
    step_R, price = pairs.step_N[pair_R], max(0.0, price)
    share_R = np.maximum(share_R, 0.0)
    total_T = np.maximum(np.bincount(step_R, share_R, problem.num_steps), np.maximum(problem.weights_T, 1e-300))
    share_R = share_R * (problem.weights_T / total_T * (1 - 1e-12))[step_R]
    above_RK = np.maximum(pairs.time_UK[pairs.load_N[pair_R]] - pairs.floor_N[pair_R, None], 0.0)
    copies_K = np.arange(1.0, above_RK.shape[1] + 1)
    cost_EK = np.tile(price * copies_K, (problem.num_experts, 1))
    np.add.at(cost_EK, pairs.expert_N[pair_R], share_R[:, None] * above_RK)
    least, spent = cost_EK.min(axis=1).sum(), price * problem.num_slots
    above_us = float(least - spent - ROUNDING * (least + spent))
    return CopiesProof(above_us, step_R, pairs.expert_N[pair_R], share_R, price)


def _convex(time_UK: FloatArray) -> FloatArray:
    """The largest convex functions of the number of copies that are nowhere above."""
    hull_UK, told = time_UK.copy(), time_UK.shape[1]
    for k in range(told - 1):
        slope_UK = (time_UK[:, k + 1 :] - hull_UK[:, k, None]) / np.arange(1, told - k)
        hull_UK[:, k + 1] = hull_UK[:, k] + slope_UK.min(axis=1)
    return hull_UK

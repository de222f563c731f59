"""Fluid and pigeonhole lower bounds of the makespan of every step, valid for every feasible placement.

All of them hold for ranks that differ, unequal slots, non-convex and non-monotone latencies (through `Latency.low`),
and spare slots that stay empty or hold copies under any split into whole assignments, the even split included.

* Range: of S slots on a rank and `spare` spare slots in all, at least `S - spare` experts are on this rank alone, so
  it carries at least that many of the smallest; and at most the S largest.
* Fluid: within a time, each rank holds a limited load, and all together must hold the step's. For one feature the
  limit is exact on the staircase; for weighted sums of features it is the support function of the rank's convex
  minorant, through linear programming duality: any multipliers mu >= 0 with `sum_k mu_k b_k >= w` give
  `w.x <= sum_k mu_k (time - a_k)` for every x with `a_k + b_k.x <= time`.
* Pigeonhole: m experts must be somewhere. At most `spare // r` experts have more than r copies, so at least
  `m - spare // r` of the m largest have a share of `ceil(n / r)` or more on some rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import Curve, Curves, Feature, FloatArray, Latency, pack
from gemopt.problem import Problem

ROUNDING = 1e-9  # relative; far above the float64 error of any sum here
ALL_TOPS = 64  # up to so many experts, every number m of largest experts is tried
SOME_TOPS = 16
MAX_DIRECTIONS = 12
MAX_COPIES = 6
BLOCK_STEPS = 512


def lower_bound(problem: Problem) -> float:
    """Lower bound of `evaluate.objective` over all feasible rows, in microseconds, rounded down by 1e-9 of itself."""
    return weighted(problem, step_bounds(problem))


def weighted(problem: Problem, bounds_T: FloatArray) -> float:
    """Bound of the objective from bounds of its steps, rounded down by 1e-9 of itself."""
    total = float((bounds_T * problem.weights_T).sum())
    return total - ROUNDING * abs(total)


def step_bounds(problem: Problem) -> FloatArray:
    """[T] lower bound in microseconds of each step's makespan over all feasible rows, rounded down by 1e-9 of itself.

    The steps are bounded one by one: the placement behind one step's bound may differ from another's.
    """
    return timed_step_bounds(problem, np.zeros(1, np.uint8))[0]


def timed_step_bounds(
    problem: Problem, stop: NDArray[np.uint8], known_T: FloatArray | None = None
) -> tuple[FloatArray, int]:
    """As `step_bounds`, and the number of steps bounded before `stop` [1] was not 0 (`Options.alarm`).

    The others have what is known: known_T (bounds of the steps, such as `spread_bounds`), their least loads in the
    block that was cut, the idle ranks after it.
    """
    from gemopt.kernels import rank_latencies

    low = _shape(problem.latencies, problem.features).low
    idle_GF = np.zeros((1, problem.num_ranks, len(problem.features)))
    bounds_T = np.full(problem.num_steps, float(rank_latencies(idle_GF, low).max()))
    done = 0
    for first in range(0, problem.num_steps, BLOCK_STEPS):
        if stop[0]:
            break
        block = slice(first, first + BLOCK_STEPS)
        bounds_T[block], steps = _block_bounds(problem, block, stop)
        done += steps
    bounds_T -= ROUNDING * np.abs(bounds_T)
    return bounds_T if known_T is None else np.maximum(bounds_T, known_T), done


def spread_bound(problem: Problem, stop: NDArray[np.uint8]) -> float:
    """Lower bound of the objective in microseconds over all placements with any number of copies under any split."""
    return weighted(problem, spread_bounds(problem, stop))


def spread_bounds(problem: Problem, stop: NDArray[np.uint8]) -> FloatArray:
    """[T] the same of each step's makespan: the fluid bound alone, with room for every expert on every rank.

    A small part of the work of `step_bounds`; steps that `stop` [1] cuts have the idle ranks' time.
    """
    from gemopt.bounds.steps import raise_bounds
    from gemopt.kernels import rank_latencies

    shape, ranks = _shape(problem.latencies, problem.features), problem.num_ranks
    total_TF = problem.features_FTE.sum(axis=2, dtype=np.float64).T
    total_TGF = np.repeat(total_TF[:, None], ranks, axis=1)
    bounds_T = rank_latencies(np.zeros_like(total_TGF), shape.low).max(axis=1)
    ceiling_T = np.maximum(bounds_T, rank_latencies(total_TGF, shape.low).max(axis=1))
    none_G, none_M = np.zeros(ranks, np.int64), np.zeros((1, 0), np.int64)
    raise_bounds(
        bounds_T, ceiling_T, total_TGF, np.ascontiguousarray(total_TF[None, :, None]), none_G, none_G, none_M,
        np.zeros(1, np.int64), shape.low, shape.others, shape.normals_DF, shape.slope_DGM, shape.shift_DGM,
        shape.wake_G, stop,
    )  # fmt: skip
    return np.asarray(bounds_T - ROUNDING * np.abs(bounds_T))


def _block_bounds(problem: Problem, block: slice, stop: NDArray[np.uint8]) -> tuple[FloatArray, int]:
    from gemopt.bounds.steps import raise_bounds
    from gemopt.kernels import rank_latencies

    shape = _shape(problem.latencies, problem.features)
    copies, slots_G = _copies(problem), problem.slots_per_rank.copy()
    whole_G = np.maximum(slots_G - problem.spare_slots, 0)
    hosts = int((slots_G > 0).sum())
    spent_R = np.array([0 if r >= hosts else problem.spare_slots // r for r in copies])
    tops_RM = np.stack([_tops(problem.num_experts, hosts, int(spent)) for spent in spent_R])
    sums_RTIF = np.stack([_prefix_sums(problem, block, r) for r in copies])
    least_TGF = np.ascontiguousarray(sums_RTIF[0][:, whole_G])  # kernels are compiled for one memory order
    total_TGF = np.repeat(sums_RTIF[0][:, -1:], problem.num_ranks, axis=1)
    most_TGF = np.ascontiguousarray(total_TGF - sums_RTIF[0][:, problem.num_experts - slots_G])
    bounds_T = _range_bound(problem, shape, least_TGF, most_TGF)
    ceiling_T = np.maximum(bounds_T, rank_latencies(total_TGF, shape.low).max(axis=1))
    lines = (shape.normals_DF, shape.slope_DGM, shape.shift_DGM, shape.wake_G)
    sums = (sums_RTIF, slots_G, whole_G, tops_RM, spent_R)
    done = raise_bounds(bounds_T, ceiling_T, most_TGF, *sums, shape.low, shape.others, *lines, stop)
    return bounds_T, int(done)


def _range_bound(problem: Problem, shape: _Shape, least_TGF: FloatArray, most_TGF: FloatArray) -> FloatArray:
    """[T] slowest rank when each has its least load; where least and most agree the load is known."""
    from gemopt.kernels import rank_latencies

    known_TG = (least_TGF == most_TGF).all(axis=2)
    exact_TG = rank_latencies(least_TGF, problem.curves)
    return np.asarray(np.where(known_TG, exact_TG, rank_latencies(least_TGF, shape.low)).max(axis=1))


def _copies(problem: Problem) -> list[int]:
    """Numbers of copies r to consider: 1, 2, ... and the most that one expert can have."""
    most = problem.most_copies
    return [*range(1, min(most, MAX_COPIES)), most]


def _prefix_sums(problem: Problem, block: slice, copies: int) -> FloatArray:
    """[T, E + 1, F] features of the i smallest experts, each with its largest share among so many copies."""
    shares_TE = -(-np.sort(problem.counts_TE[block], axis=1) // copies)
    sums = np.zeros((len(shares_TE), problem.num_experts + 1, len(problem.features)))
    for f, feature in enumerate(problem.features):
        np.cumsum(feature.of(shares_TE), axis=1, out=sums[:, 1:, f])
    return sums


def _tops(experts: int, ranks: int, spent: int) -> NDArray[np.int64]:
    """Numbers m of largest experts to try, increasing, padded with 0.

    All of them, or those from which some rank must hold one more (`spent + q ranks + 1`) and some between, few beyond.
    """
    if experts <= ALL_TOPS:
        return np.arange(1, experts + 1)
    padded, rest = np.zeros(SOME_TOPS, np.int64), experts - spent - 1
    if rest >= 0:
        extra = np.unique([*range(0, rest + 1, ranks), *np.linspace(0, rest, SOME_TOPS // 2).astype(np.int64)])
        thinned = extra[np.unique(np.geomspace(1, len(extra), SOME_TOPS).round().astype(np.int64)) - 1]
        padded[: len(thinned)] = spent + 1 + thinned
    return padded


@dataclass(frozen=True, eq=False)
class _Shape:
    """What the bounds need of the latencies alone, shared by all layers.

    low: `Latency.low` of each rank. others: [G, K, F] value of a term's other curves on a busy rank. normals_DF:
    weights of the features. slope_DGM, shift_DGM: lines whose smallest is at least what a rank holds of them within a
    time. wake_G: least time of a busy rank.
    """

    low: Curves
    others: FloatArray
    normals_DF: FloatArray
    slope_DGM: FloatArray
    shift_DGM: FloatArray
    wake_G: FloatArray


@lru_cache(maxsize=16)
def _shape(latencies: tuple[Latency, ...], features: tuple[Feature, ...]) -> _Shape:
    lows = tuple(latency.low for latency in latencies)
    smallest_F = np.array([feature.of(np.ones(1, np.int64))[0] for feature in features], dtype=np.float64)
    terms = max(len(low.terms) for low in lows)
    others = np.zeros((len(lows), terms, len(features)))
    for g, low in enumerate(lows):
        for k, term in enumerate(low.terms):
            values = [float(curve(load)) for curve, load in zip(term, smallest_F, strict=True)]
            others[g, k] = [sum(values[:f] + values[f + 1 :]) for f in range(len(values))]
    wake_G = np.array([float(low(list(smallest_F))) for low in lows])
    planes = [_busy_planes(low, smallest_F) for low in lows]
    normals_DF = _directions(np.concatenate([rows[:, 1:] for rows in planes]))
    lines = [[_support(rows, normal, wake) for rows, wake in zip(planes, wake_G, strict=True)] for normal in normals_DF]
    width = max((len(slope) for row in lines for slope, _ in row), default=0)
    slope_DGM = np.zeros((len(normals_DF), len(lows), width))
    shift_DGM = np.full((len(normals_DF), len(lows), width), np.inf)
    for d, row in enumerate(lines):
        for g, (slope, shift) in enumerate(row):
            slope_DGM[d, g, : len(slope)], shift_DGM[d, g, : len(slope)] = slope, shift
    return _Shape(pack(lows), others, normals_DF, slope_DGM, shift_DGM, wake_G)


def _busy_planes(low: Latency, smallest_F: FloatArray) -> FloatArray:
    """[K, 1 + F] planes below the latency of a rank that has at least the smallest loads of one assignment."""
    shifted = Latency(
        tuple(tuple(_from(curve, load) for curve, load in zip(term, smallest_F, strict=True)) for term in low.terms)
    )
    rows = shifted.planes()
    rows[:, 0] -= rows[:, 1:] @ smallest_F
    return rows


def _from(curve: Curve, load: float) -> Curve:
    beyond = curve.x > load
    return Curve(np.append(0.0, curve.x[beyond] - load), np.append(curve(load), curve.y[beyond]), curve.slope)


def _directions(normals_NF: FloatArray) -> FloatArray:
    """[D, F] distinct plane normals with several features, at most `MAX_DIRECTIONS`, far from each other.

    In two dimensions the facets of a sum of polygons have the normals of its parts: no other direction can do better.
    """
    mixed = normals_NF[(normals_NF > 0).sum(axis=1) > 1]
    if not len(mixed):
        return np.zeros((0, normals_NF.shape[1]))
    scaled = mixed / np.where(mixed.mean(axis=0) > 0, mixed.mean(axis=0), 1.0)
    scaled /= np.linalg.norm(scaled, axis=1, keepdims=True)
    chosen = [int((scaled @ scaled.sum(axis=0)).argmax())]
    while len(chosen) < MAX_DIRECTIONS:
        distance = np.linalg.norm(scaled[:, None] - scaled[chosen][None], axis=2).min(axis=1)
        if distance.max() < 1e-3:
            break
        chosen.append(int(distance.argmax()))
    return np.asarray(mixed[chosen])


def _support(planes: FloatArray, normal_F: FloatArray, wake: float) -> tuple[FloatArray, FloatArray]:
    """Lines (slope, shift) in the time, each at least `max w.x` over all x >= 0 with every plane <= time.

    One line per vertex of `{mu >= 0, sum_k mu_k b_k >= w}`: r planes with mu > 0, r features with equality.
    """
    intercepts, slopes = planes[:, 0], planes[:, 1:]
    active = np.flatnonzero(normal_F > 0)
    lines: list[tuple[float, float]] = []
    for size in range(1, min(len(planes), len(active)) + 1):
        for chosen in combinations(range(len(planes)), size):
            for tight in combinations(active, size):
                matrix = slopes[list(chosen)][:, list(tight)].T
                if abs(np.linalg.det(matrix)) <= 1e-12 * np.abs(matrix).max() ** size:
                    continue
                mu = np.linalg.solve(matrix, normal_F[list(tight)])
                reached = mu @ slopes[list(chosen)]
                if (mu < 0).any() or (reached < normal_F * (1 - 1e-9)).any():
                    continue
                mu *= max(1.0, float((normal_F[active] / reached[active]).max()))
                lines.append((float(mu.sum()), -float(mu @ intercepts[list(chosen)])))
    if not lines:
        return np.zeros(0), np.zeros(0)
    table = np.array(sorted(set(lines)))
    times = abs(wake) * np.geomspace(1, 1e4, 64) + 1e-9
    best = np.unique((table[:, :1] * times + table[:, 1:]).argmin(axis=0))
    return table[best, 0], table[best, 1]

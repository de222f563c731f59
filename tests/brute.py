"""Tiny random problems and their optimum by trying every placement, independent of evaluate and of all solvers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product

import numpy as np

from gemopt.latency import ACTIVE, ASSIGNMENTS, Curve, Latency, line, tiles
from gemopt.moves import Moves
from gemopt.problem import Problem


def latency_of(latency: Latency, loads: list[int]) -> float:
    """Largest term, straight from the definition of a piecewise-linear curve."""
    return max(sum(_value(curve, load) for curve, load in zip(term, loads, strict=True)) for term in latency.terms)


def _value(curve: Curve, load: int) -> float:
    for i in range(len(curve.x) - 1):
        if load <= curve.x[i + 1]:
            part = (load - curve.x[i]) / (curve.x[i + 1] - curve.x[i])
            return float(curve.y[i] + part * (curve.y[i + 1] - curve.y[i]))
    return float(curve.y[-1] + curve.slope * (load - curve.x[-1]))


def cost(problem: Problem, ranks_E: tuple[tuple[int, ...], ...]) -> float:
    """Objective in microseconds when expert e sits on the ranks `ranks_E[e]`, in increasing order."""
    result = 0.0
    for counts_E, weight in zip(problem.counts_TE.tolist(), problem.weights_T.tolist(), strict=True):
        loads = [[0] * len(problem.features) for _ in problem.latencies]
        for n, ranks in zip(counts_E, ranks_E, strict=True):
            for index, rank in enumerate(ranks):
                share = (n + len(ranks) - 1 - index) // len(ranks)
                for f, feature in enumerate(problem.features):
                    loads[rank][f] += int(feature.of(np.array([share]))[0])
        result += weight * max(
            latency_of(latency, load) for latency, load in zip(problem.latencies, loads, strict=True)
        )
    return result


def placements(problem: Problem) -> Iterator[tuple[float, np.ndarray]]:
    """Total and moves into each rank of every placement, copies and empty slots included, whatever the limits."""
    most = min(problem.num_ranks, problem.spare_slots + 1)
    sets = [ranks for r in range(1, most + 1) for ranks in combinations(range(problem.num_ranks), r)]
    for ranks_E in product(sets, repeat=problem.num_experts):
        used = np.bincount([rank for ranks in ranks_E for rank in ranks], minlength=problem.num_ranks)
        if (used > problem.slots_per_rank).any():
            continue
        value, into = cost(problem, ranks_E), np.zeros(problem.num_ranks, dtype=np.int64)
        if problem.moves is not None:
            for expert, ranks in enumerate(ranks_E):
                for rank in ranks:
                    into[rank] += not problem.moves.home_GE[rank, expert]
            value += problem.moves.price_us * int(into.sum())
        yield value, into


def optimum(problem: Problem) -> float:
    """Smallest total over every placement within the limits of moves; infinity where there is none."""
    moves, best = problem.moves, np.inf
    for value, into in placements(problem):
        if moves is not None and moves.most is not None and into.sum() > moves.most:
            continue
        if moves is not None and moves.most_into_G is not None and (into > moves.most_into_G).any():
            continue
        best = min(best, value)
    return float(best)


def random_moves(seed: int, *, spare: bool | None = None) -> Problem:
    """As `random_problem`, with a placement in force (some experts held twice, some by nobody), a price and limits."""
    problem, rng = random_problem(seed, spare=spare), np.random.default_rng(seed + 10**6)
    home = rng.random((problem.num_ranks, problem.num_experts)) < 0.5
    price = float(rng.choice([0.0, 1.0, 10.0]))
    most = None if rng.random() < 0.4 else int(rng.integers(0, 4))
    into = None if rng.random() < 0.6 else rng.integers(0, 3, problem.num_ranks)
    return problem.with_moves(Moves.make(home, price, most, into))


def random_curve(rng: np.random.Generator, largest: int, shape: str) -> Curve:
    """A straight, convex, staircase or jagged (non-monotone) curve over loads up to about `largest`."""
    if shape == "straight":
        return line(rng.uniform(0, 20), rng.uniform(0, 3))
    inside = np.sort(rng.choice(np.arange(1, largest + 2), size=min(largest, int(rng.integers(1, 6))), replace=False))
    x = np.append(0, inside + (rng.random(len(inside)) < 0.2) * 0.5).astype(float)
    if shape == "convex":
        slopes = np.sort(rng.uniform(0, 3, len(x)))
        return Curve(x, 5 + np.append(0, np.cumsum(slopes[:-1] * np.diff(x))), float(slopes[-1]))
    y = rng.uniform(0, 40, len(x))
    return Curve(x, np.sort(y) if shape == "staircase" else y, float(rng.choice([0.0, rng.uniform(0, 2)])))


def random_problem(seed: int, *, spare: bool | None = None) -> Problem:
    """A tiny problem: any cost shape, one to three features, ranks equal or not, unequal slots, weights, zero steps."""
    rng = np.random.default_rng(seed)
    num_ranks = int(rng.integers(1, 4))
    copies = bool(rng.random() < 0.25) if spare is None else spare
    num_experts = int(rng.integers(1, 4 if copies else 6))
    num_steps = int(rng.integers(1, 5))
    scale = int(rng.choice([1, 3, 10, 40]))
    counts_TE = rng.integers(0, scale + 1, size=(num_steps, num_experts)) * (rng.random((num_steps, num_experts)) < 0.8)
    features = [(ASSIGNMENTS,), (ASSIGNMENTS, ACTIVE), (tiles(3),), (ASSIGNMENTS, ACTIVE, tiles(4))][rng.integers(4)]
    shapes = ["straight", "convex", "staircase", "jagged"]
    kinds = [_random_latency(rng, len(features), num_experts * scale, shapes) for _ in range(num_ranks)]
    latencies = [kinds[int(rng.integers(num_ranks))] for _ in range(num_ranks)]
    weights = rng.choice([1.0, 1.0, 0.0, 2.5], size=num_steps) if rng.random() < 0.3 else None
    return Problem.make(counts_TE, features, latencies, _random_slots(rng, num_experts, num_ranks, copies), weights)


def _random_latency(rng: np.random.Generator, num_features: int, largest: int, shapes: list[str]) -> Latency:
    terms = int(rng.integers(1, 4)) if num_features > 1 else int(rng.choice([1, 1, 2]))
    return Latency(
        tuple(
            tuple(random_curve(rng, largest, str(rng.choice(shapes))) for _ in range(num_features))
            for _ in range(terms)
        )
    )


def _random_slots(rng: np.random.Generator, num_experts: int, num_ranks: int, spare: bool) -> np.ndarray:
    slots = np.zeros(num_ranks, dtype=np.int64)
    while slots.sum() < num_experts:
        rank = int(rng.integers(num_ranks))
        slots[rank] += slots[rank] < num_experts
    for _ in range(int(rng.integers(1, 3)) if spare else 0):
        open_ranks = np.flatnonzero(slots < num_experts)
        if len(open_ranks):
            slots[rng.choice(open_ranks)] += 1
    return slots

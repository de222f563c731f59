"""Random tiny problems of every nasty kind, from a seed."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from gemopt.costs import roofline, staircase
from gemopt.latency import ACTIVE, ASSIGNMENTS, Curve, Feature, Latency, line, tiles
from gemopt.problem import Problem

MOST_PLACEMENTS = 3000
FEATURES: list[tuple[Feature, ...]] = [
    (ASSIGNMENTS, ACTIVE),
    (ASSIGNMENTS, tiles(16)),
    (ACTIVE,),
    (ASSIGNMENTS, ACTIVE, tiles(4)),
]


def random_problem(seed: int) -> Problem:
    """A problem small enough to try all placements of.

    Measured staircases that rise and fall, fitted rooflines, and sums of curves of several features; ranks alike,
    nearly or not at all; spare slots, unequal slots, ranks without any; giant and tiny counts and latencies; one step,
    one expert, one rank; steps without load or weight.
    """
    rng = np.random.default_rng(seed)
    experts, ranks, spare = _sizes(rng)
    slots = _slots(rng, experts, ranks, spare)
    counts = _counts(rng, int(rng.choice([1, 2, 3, 5, 6])), experts)
    top = max(3, int(counts.sum(axis=1).max() / ranks * rng.choice([0.5, 1.0, 2.0])))
    weights = rng.choice([0.0, 0.5, 1.0, 3.0], len(counts)) if rng.random() < 0.15 else None
    kind = rng.choice(["staircase", "staircase", "staircase", "roofline", "sums"])
    features: tuple[Feature, ...] = (ASSIGNMENTS,)
    if kind == "staircase":
        if rng.random() < 0.2:
            features = (tiles(16),)
        latencies = _staircases(rng, ranks, top)
    elif kind == "roofline":
        features = (ASSIGNMENTS, ACTIVE)
        latencies = _rooflines(rng, ranks, top, experts)
    else:
        features = FEATURES[rng.integers(len(FEATURES))]
        latencies = _sums(rng, ranks, top, experts, features)
    return Problem.make(counts, features, latencies, slots, weights)


def random_row(rng: np.random.Generator, problem: Problem) -> NDArray[np.int64]:
    """A feasible row with copies and empty slots."""
    owner, experts = problem.rank_of_slot, problem.num_experts
    row = np.full(len(owner), -1)
    order = rng.permutation(len(owner))
    row[order[:experts]] = rng.permutation(experts)
    for slot in order[experts:]:
        free = np.setdiff1d(np.arange(experts), row[owner == owner[slot]])
        if len(free) and rng.random() < 0.8:
            row[slot] = rng.choice(free)
    return row


def _sizes(rng: np.random.Generator) -> tuple[int, int, int]:
    while True:
        experts, ranks = int(rng.integers(1, 9)), int(rng.integers(1, 5))
        spare = min(int(rng.choice([0, 0, 1, 2, 3])), experts * ranks - experts)
        ways = {0: 1.0}  # placements by spare slots used
        for _ in range(experts):
            ways = {
                used: sum(ways.get(used - r + 1, 0.0) * math.comb(ranks, r) for r in range(1, ranks + 1))
                for used in range(spare + 1)
            }
        if sum(ways.values()) <= MOST_PLACEMENTS:
            return experts, ranks, spare


def _slots(rng: np.random.Generator, experts: int, ranks: int, spare: int) -> NDArray[np.int64]:
    total = experts + spare
    for _ in range(50):
        weight = [np.ones(ranks), rng.random(ranks), rng.random(ranks) * (rng.random(ranks) < 0.6) + 1e-9][
            rng.integers(3)
        ]
        slots = rng.multinomial(total, weight / weight.sum())
        if slots.max() <= experts:
            return slots
    slots = np.zeros(ranks, np.int64)
    while slots.sum() < total:
        slots[rng.choice(np.flatnonzero(slots < experts))] += 1
    return slots


def _counts(rng: np.random.Generator, steps: int, experts: int) -> NDArray[np.int64]:
    shape = (steps, experts)
    kinds = {
        "few": lambda: rng.integers(0, 4, shape),
        "usual": lambda: rng.integers(0, 70, shape),
        "one giant": lambda: rng.integers(0, 5, shape) + (np.arange(experts) == 0) * rng.integers(50, 3000),
        "ties": lambda: rng.integers(0, 40) + (rng.random(shape) < 0.2),
        "sparse": lambda: rng.integers(0, 200, shape) * (rng.random(shape) < 0.3),
        "giant": lambda: rng.integers(0, 10 ** rng.integers(3, 9), shape),
        "skewed": lambda: (rng.pareto(1.0, shape) * 10).clip(0, 1e6).astype(np.int64),
        "idle steps": lambda: rng.integers(0, 30, shape) * (rng.random((steps, 1)) < 0.6),
        "corners": lambda: rng.choice([0, 1, 15, 16, 17, 31, 32, 33, 48, 64], shape),
    }
    counts: NDArray[np.int64] = np.broadcast_to(kinds[str(rng.choice(list(kinds)))](), shape).astype(np.int64)
    return counts


def _table(rng: np.random.Generator, top: int) -> NDArray[np.float64]:
    """[samples, 4] measured points of one nasty curve over loads of about 0 to top."""
    top = max(2, int(top * rng.choice([0.3, 0.7, 1.0, 1.5])))
    loads = np.unique(rng.integers(0, top + 1, rng.integers(1, 12)))
    if rng.random() < 0.6:
        loads = np.unique(np.append(loads, [0, 1][: rng.integers(1, 3)]))
    size, tile = len(loads), int(rng.choice([1, 4, 16, 64]))
    kinds = {
        "flat": lambda: np.full(size, float(rng.integers(1, 50))),
        "any order": lambda: rng.integers(1, 60, size).astype(float),
        "noisy line": lambda: 5 + loads * rng.random() + rng.random(size),
        "tiles": lambda: 10 + 7.0 * -(-loads // tile),
        "waves": lambda: 20 + 15 * np.sin(loads / (top / rng.uniform(2, 9))),
        "cliff": lambda: np.where(
            loads == 0, rng.choice([0.0, 0.5, 100.0]), np.where(loads == 1, 40.0, 12 + loads * 0.1)
        ),
        "rising": lambda: np.sort(rng.integers(1, 90, size).astype(float)),
    }
    us = np.maximum(kinds[str(rng.choice(list(kinds)))](), np.where(loads > 0, 1e-3, 0.0))
    us = us * rng.choice([1.0, 1.0, 1.0, 1e-3, 1e5, 1e9])
    return np.column_stack([loads, np.full(size, np.nan), us, np.full(size, np.nan)])


def _staircases(rng: np.random.Generator, ranks: int, top: int) -> list[Latency]:
    base, alike = _table(rng, top), rng.integers(3)
    tables = [base if alike < 2 else _table(rng, top) for _ in range(ranks)]
    if alike == 1:
        tables = [table * np.array([1, 1, 1 + 0.3 * rng.random(), 1]) for table in tables]
    return [staircase(table) for table in tables]


def _rooflines(rng: np.random.Generator, ranks: int, top: int, experts: int) -> list[Latency]:
    planes = [rng.uniform(0, [50, 50 / top, 8]) for _ in range(rng.integers(1, 5))]
    same, fitted = rng.random() < 0.3, int(rng.integers(1, 5))
    latencies: list[Latency] = []
    for g in range(ranks):
        if g and same:
            latencies.append(latencies[0])
            continue
        factor, noise = rng.uniform(1, 1.3), rng.choice([0, 0.02, 0.3])
        loads = rng.integers(1, top * 2, rng.integers(12, 40))
        active = rng.integers(1, np.minimum(loads, experts) + 1)
        us = factor * np.max([a + b * loads + c * active for a, b, c in planes], axis=0) + 1e-3
        us *= 1 + noise * rng.random(len(us))
        table = np.column_stack([loads, active, us, np.full(len(us), np.nan)])
        if rng.random() < 0.5:
            table = np.vstack([table, [0, 0, rng.choice([0.0, 1.0, 30.0, 500.0]), np.nan]])
        latencies.append(roofline(table, planes=fitted))
    return latencies


def _sums(rng: np.random.Generator, ranks: int, top: int, experts: int, features: tuple[Feature, ...]) -> list[Latency]:
    latencies: list[Latency] = []
    for g in range(ranks):
        if g and rng.random() < 0.4:
            latencies.append(latencies[-1])
            continue
        terms = []
        for _ in range(rng.integers(1, 4)):
            term: list[Curve] = []
            for feature in features:
                high = experts if feature is ACTIVE else max(2, int(feature.of(np.array([top]))[0]))
                straight = line(float(rng.choice([0, 1, 7.5])), float(rng.choice([0, 0.01, 1.0, 6.0])))
                term.append(straight if rng.random() < 0.4 else staircase(_table(rng, high)).terms[0][0])
            terms.append(tuple(term))
        latencies.append(Latency(tuple(terms)))
    return latencies

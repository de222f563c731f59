"""Every bound against brute force: simple, co-location from the iteration and from multipliers drawn at random."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from fuzz_cases import random_row

from gemopt.bounds import copies_bound, lower_bound, step_bounds, together_bound
from gemopt.bounds.colocation import Programme
from gemopt.bounds.dual_bound import dual_bound, feasible, pair_costs
from gemopt.placement import Split
from gemopt.problem import Problem
from gemopt.solvers.exact.contents import Contents, ContentsSearch
from gemopt.solvers.exact.share_space import Shares
from gemopt.solvers.exact.share_tree import bound_of_copies
from gemopt.solvers.exact.step_space import Stepwise
from gemopt.solvers.exact.stepwise import Pricing, StepwiseSearch
from gemopt.solvers.size import paired

CLOSE = 1e-9


def bound_faults(problem: Problem, best_us: float, makespan_T: np.ndarray, seed: int) -> Iterator[str]:
    """Bounds of the whole and of each step above what is possible."""
    limit = best_us * (1 + CLOSE)
    if lower_bound(problem) > limit:
        yield f"simple bound {lower_bound(problem)!r} above the optimum {best_us!r}"
    floor_T = step_bounds(problem)
    over = floor_T > makespan_T * (1 + CLOSE)
    if over.any():
        yield f"bounds of steps {np.flatnonzero(over).tolist()} above their least makespan"
    for name, value in together_values(problem, floor_T, best_us, seed):
        if not value <= limit:
            yield f"{name} bound {value!r} above the optimum {best_us!r}"


def together_values(problem: Problem, floor_T: np.ndarray, best_us: float, seed: int) -> Iterator[tuple[str, float]]:
    """(name, bound in microseconds) of the iteration, and of what must be a bound as well: any multipliers."""
    rng, stop = np.random.default_rng([seed, 2]), np.zeros(1, np.uint8)
    if seed % 4 == 0:  # three quarters of the time of all bounds; what it ends with are multipliers, as drawn below
        yield "together", together_bound(problem, floor_T, stop, target_us=best_us).bound_us
    yield "copies", copies_bound(problem, floor_T, stop)
    yield "copies (no floors)", copies_bound(problem, np.zeros(problem.num_steps), stop)
    if not (problem.weights_T > 0).any():
        return
    if seed % 10 == 0 and paired(problem):  # thousands of iterations
        yield "contents", ContentsSearch(problem, floor_T, best_us).run(stop).bound_us
        search = StepwiseSearch(problem, floor_T, best_us, np.arange(problem.num_experts))
        search.run(stop)
        yield "stepwise", search.bound_us
    yield from stepwise_values(problem, floor_T, best_us, rng)
    for apart in (False, True):
        programme = Programme.of(problem, floor_T, apart=apart)
        for multipliers in (_drawn(rng, programme, best_us), _one_pair(rng, programme, best_us)):
            yield f"dual (apart: {apart})", dual_bound(programme, *multipliers)
            if paired(problem):
                mu, v = feasible(programme, *multipliers)
                for part_TKE in (None, np.ones_like(mu)):  # latencies not cut at the floors, and cut
                    space = replace(Contents.of(programme), part_TKE=part_TKE)
                    most_K = np.full(len(space.size_K), rng.choice([np.inf, rng.normal() * best_us]))
                    priced = space.price(mu, v[0] + rng.normal(size=len(v[0])) * best_us, most_K, stop)
                    assert priced is not None
                    yield f"contents (apart: {apart}, cut: {part_TKE is not None})", priced[0]
    yield from share_values(problem, floor_T, best_us, rng)


def stepwise_values(
    problem: Problem, floor_T: np.ndarray, best_us: float, rng: np.random.Generator
) -> Iterator[tuple[str, float]]:
    """Contents priced step by step with multipliers and prices drawn at random, contents known before or none."""
    space = Stepwise.of(problem, floor_T) if paired(problem) else None
    if space is None:
        return
    stop = np.zeros(1, np.uint8)
    for known in (False, True):
        mu_ET = rng.random((problem.num_experts, problem.num_steps)) ** 3 * rng.choice([0.1, 1.0, 10.0])
        scale = best_us / problem.num_experts * rng.choice([0.0, 0.01, 0.3, 3.0])
        pricing = Pricing(space, mu_ET, rng.normal(size=problem.num_experts) * scale)
        if known:
            pricing.improve(space.held(np.arange(problem.num_experts)), stop)
        assert pricing.look(stop)
        yield f"stepwise (known: {known})", pricing.bound_us


def share_values(
    problem: Problem, floor_T: np.ndarray, best_us: float, rng: np.random.Generator
) -> Iterator[tuple[str, float]]:
    """Contents with their copies, with multipliers and prices drawn at random."""
    space = Shares.of(problem, floor_T) if problem.spare_slots and problem.split is Split.EVEN else None
    if space is not None:
        mu_ET = rng.random((problem.num_experts, problem.num_steps)) ** 3 * rng.choice([0.1, 1.0, 10.0])
        scale = best_us / problem.num_experts * rng.choice([0.0, 0.01, 0.3, 3.0])
        found = space.prove(mu_ET, rng.normal(size=problem.num_experts) * scale, np.zeros(1, np.uint8))
        assert found is not None
        yield "shares", found.bound_us
        row = random_row(rng, problem)
        search = bound_of_copies(problem, row, np.inf, np.zeros(1, np.uint8))
        if search is not None:
            yield "ranges of copies", search.bound_us
            proven_us = search.value_us if search.done and problem.moves is None else best_us
            yield "ranges of copies, proven", best_us if proven_us <= best_us * (1 + CLOSE) else np.inf


def _drawn(rng: np.random.Generator, programme: Programme, best_us: float) -> tuple[np.ndarray, np.ndarray]:
    """Multipliers of all rows, and of the sums in the size of what an expert costs."""
    steps, experts = len(programme.weights_T), programme.num_experts
    mu = rng.random((steps, programme.planes_CKF.shape[1], experts)) ** 3
    mu *= (programme.weights_T * rng.random(steps) * 1.5 / mu.sum(axis=(1, 2)))[:, None, None]
    scale = best_us / experts * rng.choice([0.0, 0.01, 0.3, 3.0])
    return mu, rng.normal(size=(programme.num_groups, experts)) * scale


def _one_pair(rng: np.random.Generator, programme: Programme, best_us: float) -> tuple[np.ndarray, np.ndarray]:
    """All weight on one expert and plane of every step; the other extreme."""
    mu = np.zeros((len(programme.weights_T), programme.planes_CKF.shape[1], programme.num_experts))
    for t, weight in enumerate(programme.weights_T):
        mu[t, rng.integers(mu.shape[1]), rng.integers(mu.shape[2])] = weight
    return mu, np.full((programme.num_groups, programme.num_experts), best_us * rng.choice([-0.1, 0.0, 0.1]))


def pair_value(problem: Problem, floor_T: np.ndarray, rank_E: np.ndarray, seed: int) -> float:
    """What the pair costs that cut a branch and bound say of a placement (rank of each expert), or -inf."""
    if problem.spare_slots or (problem.slots_per_rank == 0).any() or not (problem.weights_T > 0).any():
        return -np.inf
    programme = Programme.of(problem, floor_T)
    mu, v = _drawn(np.random.default_rng([seed, 3]), programme, float(problem.weights_T @ floor_T))
    fixed, alone_GE, pair_GEE = pair_costs(programme, mu, v)
    value = fixed
    for i, g in enumerate(rank_E):
        value += alone_GE[g, i] + sum(pair_GEE[g, i, j] for j in range(i) if rank_E[j] == g)
    return float(value)

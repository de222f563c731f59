"""Lower bounds against brute force over all placements, copies included, and against cases whose optimum is known."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from numba import typeof

from gemopt.bounds import lower_bound, spread_bound, step_bounds, steps, together_bound
from gemopt.bounds.colocation import Programme
from gemopt.bounds.dual_bound import dual_bound
from gemopt.bounds.primal_dual import PrimalDual
from gemopt.evaluate import objective, rank_times
from gemopt.latency import ACTIVE, ASSIGNMENTS, Curve, Feature, Latency, line, tiles
from gemopt.placement import Split
from gemopt.problem import Problem

TOLERANCE = 1e-9


def contents(num_experts, slots):
    """All sets of at most `slots` experts."""
    return [c for size in range(slots + 1) for c in itertools.combinations(range(num_experts), size)]


def all_rows(num_experts, slots_per_rank):
    """[R, P] every feasible row up to the order of slots within a rank, copies and empty slots included."""
    rows = []
    for held in itertools.product(*(contents(num_experts, slots) for slots in slots_per_rank)):
        if len(set().union(*held)) == num_experts:
            rows.append(
                [e for c, slots in zip(held, slots_per_rank, strict=True) for e in (*c, *[-1] * (slots - len(c)))]
            )
    return np.array(rows)


def all_makespans(problem):
    """[R, T] makespan of every feasible row at every step, written without the project's kernels and splits."""
    rows_RP = all_rows(problem.num_experts, problem.slots_per_rank)
    loads_FGRT = np.zeros((len(problem.features), problem.num_ranks, len(rows_RP), problem.num_steps))
    copies_RE = np.stack([(rows_RP == e).sum(axis=1) for e in range(problem.num_experts)], axis=1)
    seen_RE = np.zeros((len(rows_RP), problem.num_experts + 1), int)  # the last column is for empty slots
    index = np.arange(len(rows_RP))
    for p, rank in enumerate(problem.rank_of_slot):
        expert = rows_RP[:, p]
        copies, i = copies_RE[index, expert], seen_RE[index, expert]
        seen_RE[index, expert] += 1
        share_RT = (problem.counts_TE.T[expert] + (copies - 1 - i)[:, None]) // copies.clip(1)[:, None]
        share_RT[expert < 0] = 0
        for f, feature in enumerate(problem.features):
            loads_FGRT[f, rank] += feature.of(share_RT)
    return np.max([latency(list(loads_FGRT[:, g])) for g, latency in enumerate(problem.latencies)], axis=0)


def jagged(rng, *, top):
    """A staircase with up and down steps, now and then with jumps between neighbouring loads."""
    points = int(rng.integers(1, 6))
    x = np.append(0, np.sort(rng.choice(np.arange(1, top + 3), size=min(points, top), replace=False)))
    y = rng.choice([rng.uniform(0, 20, len(x)), np.sort(rng.uniform(0, 20, len(x))), rng.integers(0, 4, len(x)) * 5.0])
    return Curve(x, y, float(rng.choice([0.0, 0.3, 2.0])))


def random_latencies(rng, kind, ranks, features, top):
    if kind == "staircase":
        latencies = [Latency(tuple((jagged(rng, top=top),) for _ in range(rng.integers(1, 3)))) for _ in range(ranks)]
    elif kind == "roofline":
        base = rng.uniform(0, [10, 1, 3][: 1 + features] + [2] * (features - 2), (rng.integers(1, 4), 1 + features))
        base *= rng.random(base.shape) < 0.8
        scale = rng.uniform(0.8, 1.2, (ranks, 1, 1 + features))
        latencies = [Latency(tuple((line(r[0], r[1]), *(line(0, c) for c in r[2:])) for r in base * s)) for s in scale]
    else:  # the largest of sums of jagged curves
        latencies = [
            Latency(tuple(tuple(jagged(rng, top=top) for _ in range(features)) for _ in range(rng.integers(1, 4))))
            for _ in range(ranks)
        ]
    if rng.random() < 0.3:
        latencies = [latencies[0]] * ranks
    return latencies


def random_problem(rng, kind, *, spare):
    ranks = int(rng.integers(1, 4))
    experts = int(rng.integers(1, 4 if spare and ranks == 3 else 6))
    slots = np.zeros(ranks, int)
    for _ in range(experts + (int(rng.integers(1, 4)) if spare else 0)):
        open_ranks = np.flatnonzero(slots < experts)
        if len(open_ranks):
            slots[rng.choice(open_ranks)] += 1
    steps = int(rng.integers(1, 4))
    counts = rng.choice([rng.integers(0, 12, (steps, experts)), rng.geometric(0.15, (steps, experts)) - 1])
    if rng.random() < 0.2:
        counts[rng.integers(steps)] = 0
    if kind == "staircase":
        features = (ASSIGNMENTS,)
    else:
        pool = [(ASSIGNMENTS, ACTIVE), (ASSIGNMENTS, tiles(3)), (ASSIGNMENTS, ACTIVE, tiles(4))]
        features = pool[rng.integers(len(pool))]
    top = int(counts.sum(axis=1).max())
    latencies = random_latencies(rng, kind, ranks, len(features), max(top, 2))
    return Problem.make(counts, features, latencies, slots, rng.uniform(0, 2, steps))


@pytest.mark.parametrize("spare", [False, True], ids=["exact-slots", "spare-slots"])
@pytest.mark.parametrize("kind", ["staircase", "roofline", "mixed"])
def test_no_bound_above_the_optimum(kind, spare):
    rng = np.random.default_rng([len(kind), spare])
    tight = 0
    for case in range(150):
        problem = random_problem(rng, kind, spare=spare)
        makespan_RT = all_makespans(problem)
        best_T, bounds_T = makespan_RT.min(axis=0), step_bounds(problem)
        assert (bounds_T <= best_T * (1 + TOLERANCE)).all(), (case, bounds_T, best_T)
        optimum = (makespan_RT * problem.weights_T).sum(axis=1).min()
        assert lower_bound(problem) <= optimum * (1 + TOLERANCE)
        tight += bool((bounds_T >= best_T * (1 - 1e-6)).all())
    assert tight > 45  # the bounds are of use: often exact on problems of this size


def test_the_brute_force_is_what_evaluate_says():
    rng = np.random.default_rng(5)
    for kind in ("staircase", "roofline", "mixed"):
        for _ in range(8):
            problem = random_problem(rng, kind, spare=True)
            rows, makespan_RT = all_rows(problem.num_experts, problem.slots_per_rank), all_makespans(problem)
            for i in rng.integers(len(rows), size=3):
                np.testing.assert_allclose(rank_times(problem, rows[i]).max(axis=1), makespan_RT[i], rtol=1e-12)


def affine(intercept=10.0, slope=2.0):
    return Latency(((line(intercept, slope),),))


def bumpy():
    return Latency(((Curve([0, 4, 5, 9, 10], [1, 30, 6, 40, 12], 0.5),),))


def test_one_rank_is_exact_even_where_the_latency_falls():
    counts = np.array([[3, 1], [4, 5], [0, 0], [60, 3]])
    problem = Problem.make(counts, (ASSIGNMENTS,), [bumpy()])
    np.testing.assert_allclose(step_bounds(problem), rank_times(problem, np.arange(2))[:, 0], rtol=1e-8)


def test_equal_experts_are_exact():
    counts = np.repeat([[4], [9], [1]], 8, axis=1)
    problem = Problem.make(counts, (ASSIGNMENTS,), [bumpy(), affine(), bumpy(), affine(5, 3)])
    assert lower_bound(problem) == pytest.approx(objective(problem, np.arange(8)), rel=1e-8)


def test_a_dominating_expert_is_exact():
    counts = np.array([[90, 1, 1, 2, 1, 1], [1, 1, 1, 2, 1, 70]])
    problem = Problem.make(counts, (ASSIGNMENTS,), [affine(), affine(), affine()])
    np.testing.assert_allclose(step_bounds(problem), [10 + 2 * 91, 10 + 2 * 71], rtol=1e-8)


def test_a_dominating_expert_with_copies_counts_with_its_share():
    counts = np.array([[91, 1, 1]])  # one spare slot: at best two copies, each alone on its rank
    problem = Problem.make(counts, (ASSIGNMENTS,), [affine()] * 3, [2, 1, 1])
    assert step_bounds(problem)[0] == pytest.approx(10 + 2 * 46)


def test_one_slow_rank_that_cannot_stay_empty():
    counts = np.array([[5, 5, 6, 9]])
    problem = Problem.make(counts, (ASSIGNMENTS,), [affine(0, 1), affine(0, 100)])
    assert step_bounds(problem)[0] == pytest.approx(1000)


def test_idle_latency_counts():
    problem = Problem.make(np.zeros((2, 3), int), (ASSIGNMENTS,), [affine(7), affine(11), affine(3)], [3, 3, 3])
    np.testing.assert_allclose(step_bounds(problem), 11, rtol=1e-8)


def test_fluid_is_exact_when_experts_are_small():
    """Many experts of one assignment: the bound is the balanced optimum of ranks that differ."""
    problem = Problem.make(np.ones((1, 60), int), (ASSIGNMENTS,), [affine(0, 1), affine(0, 2), affine(0, 3)], [60] * 3)
    assert step_bounds(problem)[0] == pytest.approx(33)  # 33 + 16 + 11 = 60


def test_the_roofline_mixes_directions():
    """Neither feature alone is binding: a plane through both is."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(64, np.ones(32) / 32, size=20)
    latency = Latency(((line(5, 1.0), line(0, 4.0)),))
    problem = Problem.make(counts, (ASSIGNMENTS, ACTIVE), [latency] * 4, [32] * 4)
    loads = problem.features_FTE.sum(axis=2)
    np.testing.assert_allclose(step_bounds(problem), 5 + (loads[0] + 4 * loads[1]) / 4, rtol=0.02)


def test_busy_ranks_pay_the_cost_of_waking_up():
    """Idle ranks are free, busy ones pay 50: the convex minorant would forget it."""
    term = (Curve([0, 1], [0, 51], 1.0), line(0, 2.0))
    problem = Problem.make(np.full((1, 4), 10), (ASSIGNMENTS, ACTIVE), [Latency((term,))] * 2)
    assert step_bounds(problem)[0] == pytest.approx(50 + 20 + 4)


def test_a_new_feature_needs_no_change():
    pairs = Feature("pairs", lambda n: -(-n // 2))
    latency = Latency(((line(1, 1), line(0, 1), line(0, 3)), (line(4, 0), line(0, 2), line(0, 1))))
    problem = Problem.make(np.array([[4, 2, 2, 8]]), (ASSIGNMENTS, ACTIVE, pairs), [latency] * 2)
    best = all_makespans(problem).min()
    assert 0.9 * best <= step_bounds(problem)[0] <= best * (1 + TOLERANCE)


def test_steps_are_weighted():
    counts = np.array([[4, 4], [8, 8]])
    problem = Problem.make(counts, (ASSIGNMENTS,), [affine(), affine()], weights_T=[3.0, 0.5])
    assert lower_bound(problem) == pytest.approx(3 * 18 + 0.5 * 26)


@pytest.mark.parametrize("experts", [96, 200])
@pytest.mark.parametrize("extra", [0, 5])
def test_large_layers_stay_below_a_good_placement(experts, extra):
    """Beyond `ALL_TOPS` experts only some numbers of largest experts are tried."""
    rng = np.random.default_rng(experts)
    counts = rng.multinomial(4000, rng.dirichlet(np.full(experts, 0.3)), size=30)
    ranks = 8
    slots = -(-experts // ranks) + extra
    latencies = [affine(20, s) for s in rng.uniform(0.9, 1.1, ranks)]
    problem = Problem.make(counts, (ASSIGNMENTS,), latencies, slots)
    order = np.argsort(-counts.sum(axis=0), kind="stable")
    row = np.full((ranks, slots), -1)
    load = np.zeros(ranks)
    for expert in order:
        rank = min((g for g in range(ranks) if (row[g] < 0).any()), key=lambda g: load[g])
        row[rank, (row[rank] >= 0).sum()] = expert
        load[rank] += counts[:, expert].sum()
    value = objective(problem, row.ravel())
    assert 0.5 * value < lower_bound(problem) <= value


def test_the_bound_with_any_copies_needs_no_other_kernel(monkeypatch):
    """Compiled on first use, which is not counted in the time limit."""
    types, compiled = [], steps.raise_bounds
    monkeypatch.setattr(steps, "raise_bounds", lambda *args: types.append([*map(typeof, args)]) or compiled(*args))
    problem = Problem.make([[3, 1, 2]], [ASSIGNMENTS], [Latency(((line(5, 1),),))] * 2, [2, 2])
    step_bounds(problem)
    spread_bound(problem, np.zeros(1, np.uint8))
    assert types[0] == types[1]


def test_relabelling_ranks_changes_nothing():
    rng = np.random.default_rng(3)
    for spare in (False, True):
        for _ in range(20):
            problem = random_problem(rng, "mixed", spare=spare)
            order = rng.permutation(problem.num_ranks)
            turned = Problem.make(
                problem.counts_TE,
                problem.features,
                [problem.latencies[g] for g in order],
                problem.slots_per_rank[order],
            )
            np.testing.assert_allclose(step_bounds(problem), step_bounds(turned), rtol=1e-6)


def test_the_colocation_bound_is_of_the_even_split_only() -> None:
    counts = np.random.default_rng(0).poisson(np.linspace(1, 40, 8), (20, 8))
    latencies = [Latency(((line(10.0, speed),),)) for speed in (1.0, 1.1, 1.2, 1.3)]
    even = Problem.make(counts, (ASSIGNMENTS,), latencies, slots_per_rank=3)
    floor_T = step_bounds(even)
    for split in Split:
        found = together_bound(replace(even, split=split), floor_T, np.zeros(1, np.uint8))
        assert (found.programme is not None) == (split is Split.EVEN)
        assert found.bound_us <= lower_bound(even) * (1 + 1e-9) or split is Split.EVEN


def test_ranks_alike_but_for_rounding_share_a_group() -> None:
    """An intercept of next to nothing, in which the margin of the planes shows: groups would be several, and slow."""
    counts = np.random.default_rng(0).poisson(np.linspace(500, 4000, 16), (20, 16))
    speeds = np.random.default_rng(1).uniform(0.9, 1.1, 8)
    latencies = [
        Latency(((Curve(np.array([0, 65536]), np.array([1e-6, 9600]) / s, 9600 / 65536 / s),),)) for s in speeds
    ]
    problem = Problem.make(counts, (ASSIGNMENTS,), latencies, slots_per_rank=2)
    assert Programme.of(problem, step_bounds(problem)).num_groups == 1
    latencies[3] = Latency(((line(10.0, 0.15),),))
    other = Problem.make(counts, (ASSIGNMENTS,), latencies, slots_per_rank=2)
    assert Programme.of(other, step_bounds(other)).num_groups == 2


def test_the_colocation_bound_rises_with_the_time_it_is_given() -> None:
    """Cooled in twice as many iterations it is higher, and above the floors."""
    counts = np.random.default_rng(0).poisson(np.random.default_rng(1).gamma(2.0, 20.0, (60, 32)))
    latencies = [Latency(((line(0.0, 1 / s),),)) for s in np.linspace(0.9, 1.1, 8)]
    problem = Problem.make(counts, (ASSIGNMENTS,), latencies, slots_per_rank=4)
    floor_T, found = step_bounds(problem), []
    for count in (100, 400, 1600):
        search = PrimalDual(Programme.of(problem, floor_T))
        search.heat()
        while search.iterations < count:
            search.iterate(20)
            search.cool(search.iterations / count)
        found.append(dual_bound(search.programme, *search.multipliers()))
    assert problem.weights_T @ floor_T < found[0] < found[1] < found[2]
    whole = together_bound(problem, floor_T, np.zeros(1, np.uint8))
    assert whole.bound_us > found[1]


def test_the_colocation_bound_may_be_stopped_before_its_first_iteration(monkeypatch) -> None:
    problem, stop = Problem.make([[5, 3, 2, 1]] * 3, (ASSIGNMENTS,), [Latency(((line(1, 1),),))] * 2, 2), np.zeros(1)
    monkeypatch.setattr(PrimalDual, "heat", lambda self: stop.fill(1))
    floor_T = step_bounds(problem)
    assert together_bound(problem, floor_T, stop).bound_us == pytest.approx(floor_T.sum())

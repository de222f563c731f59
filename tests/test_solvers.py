"""Every heuristic solver: feasible on whatever it claims to support, exact about its own costs, reproducible."""

from __future__ import annotations

import numpy as np
import pytest

from gemopt.evaluate import check, objective
from gemopt.exceptions import InputError, UnsupportedError
from gemopt.latency import ACTIVE, ASSIGNMENTS, Curve, Latency, line
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers import Options, get, names, that_can
from gemopt.solvers.base import require
from gemopt.solvers.search.copies import improve_copies
from gemopt.solvers.search.local_search import _with_copies
from gemopt.solvers.search.packing import lpt_row, pack, placeable, replicate
from gemopt.solvers.search.shares import make_shares
from gemopt.solvers.search.state import guiding_planes, make_costs, make_state
from gemopt.solvers.search.swaps import EPSILON, KICK_DRAWS, descend, iterate, total_cost
from gemopt.solvers.search.terms import free_terms

HEURISTICS = ["linear", "round-robin", "eplb", "eplb-hierarchical", "lpt", "gem", "conflict", "local-search"]
KINDS = ["affine", "staircase", "roofline", "kinked"]


def latency(kind: str, factor: float) -> Latency:
    if kind == "affine":
        return Latency(((line(10 * factor, 0.5 * factor),),))
    if kind == "staircase":
        loads = np.array([0, 1, 8, 9, 16, 17, 24, 25, 60])
        values = np.array([5, 9, 9, 15, 14, 22, 21, 30, 55]) * factor  # falls now and then
        return Latency(((Curve(loads, values, factor),),))
    planes = ((8.0, 0.0, 0.0), (2.0, 0.1, 3.0), (4.0, 0.6, 0.2))
    if kind == "roofline":
        return Latency(tuple((line(a * factor, b * factor), line(0.0, c * factor)) for a, b, c in planes))
    idle = [(Curve([0, 1], [1.0 * factor, (a + b) * factor], b * factor), line(0.0, c * factor)) for a, b, c in planes]
    return Latency(tuple(idle))


def make(
    kind: str, *, experts: int = 12, ranks: int = 4, steps: int = 40, slots: object = None, seed: int = 0
) -> Problem:
    rng = np.random.default_rng(seed)
    heat = rng.gamma(0.7, 6.0, experts)
    counts = rng.poisson(heat * rng.uniform(0.3, 1.7, (steps, 1)))
    counts[0] = 0
    features = (ASSIGNMENTS,) if kind in ("affine", "staircase") else (ASSIGNMENTS, ACTIVE)
    factors = rng.uniform(0.8, 1.3, ranks)
    return Problem.make(counts, features, [latency(kind, f) for f in factors], slots)


def options(**changes: object) -> Options:
    return Options.lasting(60, **{"patience": 3, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HEURISTICS)
@pytest.mark.parametrize("slots", [None, 4, [5, 4, 3, 3], [6, 6, 0, 3]], ids=["just", "spare", "unequal", "none"])
def test_feasible_or_refused(name: str, kind: str, slots: object) -> None:
    problem, solver = make(kind, slots=slots), get(name)
    try:
        require(solver, problem, that_can)
    except UnsupportedError as error:
        assert not solver.supports.unequal_slots
        assert "local-search" in str(error)
        return
    outcome = solver.solve(problem, options(), None)
    assert outcome.row is not None
    check(problem, outcome.row)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [None, 4, [5, 4, 3, 3]], ids=["just", "spare", "unequal"])
def test_local_search_beats_its_start_and_every_greedy(kind: str, slots: object) -> None:
    problem = make(kind, slots=slots)
    found = get("local-search").solve(problem, options(), None)
    assert found.row is not None
    value = objective(problem, found.row)
    assert value <= objective(problem, lpt_row(problem)) + 1e-9
    for name in ("linear", "round-robin", "conflict"):
        other = get(name).solve(problem, options(), None).row
        assert other is not None
        assert value <= objective(problem, other) * (1 + 1e-9)
        again = get("local-search").solve(problem, options(patience=0), other).row
        assert again is not None
        assert objective(problem, again) <= objective(problem, other) + 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_descent_ends_where_no_swap_helps(kind: str) -> None:
    problem = make(kind, experts=10, ranks=3, steps=300, slots=[4, 4, 3])
    costs = make_costs(problem)
    state = make_state(problem, lpt_row(problem), costs)
    reported = descend(costs, state, np.ones(3, bool), True)
    row, rank = state.content, problem.rank_of_slot
    value = objective(problem, row)
    assert reported == pytest.approx(value, rel=1e-5)
    for i in range(len(row)):
        for j in range(i + 1, len(row)):
            if rank[i] == rank[j]:
                continue
            swapped = row.copy()
            swapped[[i, j]] = swapped[[j, i]]
            assert objective(problem, swapped) >= value * (1 - 2 * EPSILON)


@pytest.mark.parametrize("kind", KINDS)
def test_iterate_takes_failed_kicks_back(kind: str) -> None:
    problem = make(kind, steps=100)
    costs = make_costs(problem)
    state = make_state(problem, lpt_row(problem), costs)
    descend(costs, state, np.ones(4, bool), True)
    best, draws = total_cost(state), np.random.default_rng(1).random((40, KICK_DRAWS))
    row, losses = state.content.copy(), np.zeros(2)
    renewed = iterate(costs, state, draws, best, row, losses, 0.0)
    assert losses[0] > 0
    assert losses[1] == 40
    assert renewed <= best
    assert (state.content == row).all()
    assert total_cost(state) == pytest.approx(renewed, rel=1e-5)
    assert objective(problem, state.content) == pytest.approx(renewed, rel=1e-5)


@pytest.mark.parametrize("slots", [3, 4, [5, 1, 6, 0]])
@pytest.mark.parametrize("kind", KINDS)
def test_iterate_walks_on_from_worse_placements_and_keeps_the_best(kind: str, slots: object) -> None:
    problem = make(kind, steps=100, slots=slots)
    costs = make_costs(problem)
    state = make_state(problem, lpt_row(problem), costs)
    descend(costs, state, np.ones(4, bool), True)
    best, draws = total_cost(state), np.random.default_rng(1).random((40, KICK_DRAWS))
    row, losses = state.content.copy(), np.zeros(2)
    renewed = iterate(costs, state, draws, best, row, losses, 1.0)
    check(problem, state.content)
    assert (state.content != row).any()
    assert objective(problem, row) == pytest.approx(renewed, rel=1e-5)
    assert total_cost(state) == pytest.approx(objective(problem, state.content), rel=1e-5)
    assert renewed <= min(best, total_cost(state)) * (1 + EPSILON)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_kernel_agrees_with_evaluate(kind: str) -> None:
    problem = make(kind, slots=5, steps=300)
    costs, shares = make_costs(problem), make_shares(problem)
    assert shares is not None
    start = lpt_row(problem)
    state = make_state(problem, start, costs)
    made = improve_copies(costs, state, shares, np.arange(12), False, free_terms(problem))
    check(problem, state.content)
    assert total_cost(state) == pytest.approx(objective(problem, state.content), rel=1e-5)
    assert (objective(problem, state.content) < objective(problem, start)) == (made > 0)


def test_copies_pay_where_one_expert_is_hot() -> None:
    counts = np.ones((30, 8), dtype=int)
    counts[:, 0] = 60
    problem = Problem.make(counts, (ASSIGNMENTS,), [latency("affine", 1.0)] * 4, 3)
    single = Problem.make(counts, (ASSIGNMENTS,), [latency("affine", 1.0)] * 4)
    with_copies = get("local-search").solve(problem, options(), None).row
    without = get("local-search").solve(single, options(), None).row
    assert with_copies is not None
    assert without is not None
    assert (with_copies == 0).sum() == 4
    assert objective(problem, with_copies) < 0.7 * objective(single, without)


def test_planes_that_guide_lie_below_kinked_latencies() -> None:
    problem = make("kinked")
    guides = guiding_planes(problem)
    assert guides is not None
    exact = make_costs(problem)
    row = lpt_row(problem)
    low, true = make_state(problem, row, guides).times, make_state(problem, row, exact).times
    assert (low <= true * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", ["gem", "conflict", "local-search"])
def test_same_seed_same_trajectory(name: str) -> None:
    problem = make("staircase", experts=16, steps=60)
    runs = [get(name).solve(problem, options(seed=7, patience=10), None) for _ in range(2)]
    assert (runs[0].row == runs[1].row).all()
    assert [p.objective_us for p in runs[0].history] == [p.objective_us for p in runs[1].history]


@pytest.mark.parametrize("name", ["gem", "local-search", "conflict"])
def test_an_interrupt_returns_the_incumbent(name: str) -> None:
    problem = make("affine", experts=32, ranks=8)
    outcome = get(name).solve(problem, options(patience=None, stop=lambda: True), None)
    assert outcome.row is not None
    assert outcome.stopped_by in (StoppedBy.INTERRUPT, StoppedBy.TIME_LIMIT)
    check(problem, outcome.row)


@pytest.mark.parametrize("name", ["gem", "local-search"])
def test_a_known_bound_stops_the_search(name: str) -> None:
    problem = make("affine")
    best = get(name).solve(problem, options(), None).row
    assert best is not None
    bound = objective(problem, best) * 0.97
    outcome = get(name).solve(problem, options(bound_us=bound, gap=0.5, patience=None), None)
    assert outcome.stopped_by is StoppedBy.GAP


def test_lpt_weighs_speed() -> None:
    """One rank twice as slow gets about half the load of the others."""
    counts = np.random.default_rng(0).poisson(20, (50, 60))
    latencies = [Latency(((line(0.0, f),),)) for f in (1.0, 1.0, 2.0)]
    problem = Problem.make(counts, (ASSIGNMENTS,), latencies, [30, 30, 30])
    row = lpt_row(problem)
    sums = [counts[:, row[(problem.rank_of_slot == g) & (row >= 0)]].sum() for g in range(3)]
    assert sums[2] / sums[0] == pytest.approx(0.5, rel=0.05)
    assert sums[1] / sums[0] == pytest.approx(1.0, rel=0.05)


def test_eplb_replicates_by_load_per_copy_and_ignores_speed() -> None:
    assert replicate(np.array([90.0, 10.0, 40.0]), np.array([1, 1, 1, 1, 1, 1, 0, 0])).tolist() == [3, 1, 2]
    assert replicate(np.array([90.0, 10.0]), np.array([2, 2, 2])).tolist() == [3, 3]
    counts = np.tile([40, 30, 20, 10], (5, 1))
    for factors in ([1.0, 1.0], [1.0, 9.0]):
        problem = Problem.make(counts, (ASSIGNMENTS,), [latency("affine", f) for f in factors])
        row = get("eplb").solve(problem, options(), None).row
        assert row is not None
        assert sorted(map(sorted, np.split(row, 2))) == [[0, 3], [1, 2]]


def test_copies_for_unequal_slots_fit_and_are_packed_whatever_is_hot() -> None:
    """Copies compete for the ranks with many slots: a rank with one slot takes a copy of one expert only."""
    assert placeable(np.array([2, 2, 1]), np.array([3, 2])) and not placeable(np.array([3, 3, 1]), np.array([5, 1, 1]))
    rng = np.random.default_rng(0)
    for _ in range(500):
        experts, ranks = int(rng.integers(1, 13)), int(rng.integers(1, 9))
        slots = rng.integers(0, experts + 1, ranks)
        if slots.sum() < experts:
            continue
        weight = rng.random(experts) * 10.0 ** rng.integers(0, 3, experts)
        copies = replicate(weight, slots)
        assert placeable(copies, slots)
        more = copies + np.eye(experts, dtype=int)
        assert copies.sum() == slots.sum() or not any(placeable(each, slots) for each in more)
        items = np.repeat(np.arange(experts), copies)
        row = pack(items, rng.random((ranks, 1)) * (weight / copies)[items], rng.random(ranks), slots)
        assert np.bincount(row[row >= 0], minlength=experts).tolist() == copies.tolist()
        held = np.split(row, np.cumsum(slots)[:-1])
        assert all(len(set(some[some >= 0])) == (some >= 0).sum() for some in held)


def test_hierarchical_eplb_keeps_copies_on_a_node() -> None:
    counts = np.random.default_rng(3).poisson(np.linspace(5, 60, 8), (20, 8))
    problem = Problem.make(counts, (ASSIGNMENTS,), [latency("affine", 1.0)] * 4, 3, node_of_rank=np.array([0, 0, 1, 1]))
    row = get("eplb-hierarchical").solve(problem, options(), None).row
    assert row is not None
    check(problem, row)
    nodes = problem.node_of_rank[problem.rank_of_slot]
    for expert in range(8):
        assert len(set(nodes[row == expert])) == 1


def test_linear_is_contiguous() -> None:
    problem = make("affine", experts=10, ranks=4, slots=[3, 3, 2, 2])
    row = get("linear").solve(problem, options(), None).row
    assert row is not None
    assert row.tolist() == list(range(10))


def test_unknown_solver_is_named() -> None:
    with pytest.raises(InputError, match=r"known solvers: .*local-search"):
        get("simplex")
    assert "cpsat" in names()


def test_search_starts_with_copies_where_they_pay_and_without_where_they_do_not() -> None:
    rng = np.random.default_rng(3)
    heavy = rng.poisson(rng.gamma(0.3, 40.0, 16), (60, 16))
    pays = Problem.make(heavy, (ASSIGNMENTS,), [latency("affine", 1.0)] * 4, 6)
    stays = Problem.make(
        rng.poisson(1.5, (60, 16)), (ASSIGNMENTS, ACTIVE), [Latency(((line(1.0, 0.001), line(0.0, 3.0)),))] * 4, 6
    )
    for problem, copies in ((pays, True), (stays, False)):
        starts = [lpt_row(problem), _with_copies(problem, lpt_row(problem))]
        assert (objective(problem, starts[1]) < objective(problem, starts[0])) == copies
        row = get("local-search").solve(problem, options(patience=0), None).row
        assert row is not None
        alone = get("local-search").solve(problem, options(patience=0), starts[0 if copies else 1]).row
        assert alone is not None
        assert objective(problem, row) <= objective(problem, alone) * (1 + 1e-9)


@pytest.mark.parametrize("slots", [[7, 5, 3, 2], [9, 8, 0, 4]], ids=["unequal", "empty rank"])
@pytest.mark.parametrize("kind", KINDS)
def test_search_over_copies_heeds_slots_and_repeats_itself(kind: str, slots: list[int]) -> None:
    problem = make(kind, slots=slots, steps=300, seed=5)
    rows = [get("local-search").solve(problem, options(seed=3), None).row for _ in range(2)]
    assert rows[0] is not None and rows[1] is not None
    assert (rows[0] == rows[1]).all()
    check(problem, rows[0])  # never two copies on a rank
    starts = (lpt_row(problem), _with_copies(problem, lpt_row(problem)))
    assert objective(problem, rows[0]) <= min(objective(problem, start) for start in starts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_over_copies_never_costs_and_finds_a_copy_of_the_one_hot_expert(kind: str) -> None:
    counts = np.ones((300, 12), dtype=int)
    counts[:, 7] = np.random.default_rng(0).integers(40, 60, 300)
    features = (ASSIGNMENTS,) if kind in ("affine", "staircase") else (ASSIGNMENTS, ACTIVE)
    problem = Problem.make(counts, features, [latency(kind, f) for f in (1.0, 1.1, 0.9, 1.0)], 4)
    costs, shares, start = make_costs(problem), make_shares(problem), lpt_row(problem)
    assert shares is not None
    state = make_state(problem, start, costs)
    assert improve_copies(costs, state, shares, np.arange(12), False, free_terms(problem)) > 0
    check(problem, state.content)
    assert (state.content == 7).sum() > 1
    assert objective(problem, state.content) < objective(problem, start)


@pytest.mark.parametrize("slots", [6, 7])
@pytest.mark.parametrize("patience", [2, None])
def test_guided_kicks_count_by_the_latencies(patience: int | None, slots: int) -> None:
    loads = np.unique(np.concatenate([np.arange(0, 400, 8), np.arange(1, 400, 8)]))
    tiles = [Latency(((Curve(loads, f * (60.0 + 9.0 * np.ceil(loads / 8)), f),),)) for f in (1.0, 1.1, 0.9, 1.0)]
    rng = np.random.default_rng(5)
    problem = Problem.make(
        rng.poisson(rng.gamma(0.7, 12.0, 24) * rng.uniform(0.3, 1.7, (300, 1))), (ASSIGNMENTS,), tiles, slots
    )
    guides = guiding_planes(problem)
    assert make_costs(problem).use_tables
    assert guides is not None
    assert not guides.use_tables
    rows = []
    for _ in range(2):
        first = get("local-search").solve(problem, options(patience=0, first=True), None)
        assert first.row is not None
        value = objective(problem, first.row)
        seconds = 60 if patience else 0.5
        went_on = Options.lasting(seconds, patience=patience, begun=first.search)
        found = get("local-search").solve(problem, went_on, None)
        assert found.row is not None
        check(problem, found.row)
        values = [each.objective_us for each in found.history]
        assert values == sorted(values, reverse=True)
        assert objective(problem, found.row) == values[-1] <= value
        rows.append(found.row)
    assert patience is None or (rows[0] == rows[1]).all()

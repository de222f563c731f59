"""Searching under a split policy: against all placements and splits, engines' limits, memory budgets, bad input."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from scipy.optimize import linprog
from timed import timed

import gemopt
from gemopt.bounds import lower_bound
from gemopt.costs import CostModel
from gemopt.evaluate import evaluate, objective
from gemopt.exceptions import InputError, UnsupportedError
from gemopt.formats.registry import get as engine
from gemopt.formats.registry import within_engine
from gemopt.latency import ACTIVE, ASSIGNMENTS, Curve, Latency, line
from gemopt.placement import EMPTY, Placement, Split
from gemopt.problem import Problem
from gemopt.profile import Profile
from gemopt.result import Status, StoppedBy
from gemopt.solvers import get
from gemopt.solvers.base import DEFAULT_PATIENCE, Options, Outcome, incumbent
from gemopt.solving import answer
from gemopt.solving.layers import Layer
from gemopt.solving.schedule import Run
from gemopt.splits import even_weights
from gemopt.splits.weights import static_weights
from gemopt.traces import Traces

pytestmark = pytest.mark.usefixtures("quick_bounds")


def sloped(*slopes: float, offset: float = 5.0) -> list[Latency]:
    return [Latency(((line(offset, slope),),)) for slope in slopes]


def measured(*slopes: float) -> Profile:
    return timed(slopes, lambda n, slope: 5 + slope * n, (0, 1000))


def traces(layers: int = 2, experts: int = 6, steps: int = 12, seed: int = 0) -> Traces:
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(experts, 0.6), size=layers)
    return Traces(counts=np.stack([[rng.multinomial(120, p) for p in shares] for _ in range(steps)]))


def by_linear_programme(problem: Problem, ranks_E: tuple[tuple[int, ...], ...]) -> float:
    """Sum over the steps of the least makespan over all splits into real numbers."""
    pairs = [(e, g) for e, ranks in enumerate(ranks_E) for g in ranks]
    slopes = [latency.terms[0][0].slope for latency in problem.latencies]
    offsets = [float(latency.terms[0][0].y[0]) for latency in problem.latencies]
    upper = np.array([[slopes[g] * (at == g) for _, at in pairs] + [-1.0] for g in range(problem.num_ranks)])
    equal = np.array([[float(of == e) for of, _ in pairs] + [0.0] for e in range(problem.num_experts)])
    goal = np.append(np.zeros(len(pairs)), 1.0)
    solved = [linprog(goal, A_ub=upper, b_ub=-np.array(offsets), A_eq=equal, b_eq=n) for n in problem.counts_TE]
    return float(sum(each.fun for each in solved))


@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_the_best_of_all_placements_and_splits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slopes = rng.uniform(0.5, 2, 3)
    counts = rng.integers(0, 60, (2, 4))
    problem = Problem.make(counts, (ASSIGNMENTS,), sloped(*slopes), [2, 2, 1], split=Split.OPTIMAL)
    sets = [ranks for size in (1, 2) for ranks in combinations(range(3), size)]
    best = np.inf
    for ranks_E in product(sets, repeat=4):
        used = np.bincount([g for ranks in ranks_E for g in ranks], minlength=3)
        if (used <= problem.slots_per_rank).all():
            best = min(best, by_linear_programme(problem, ranks_E))
    outcome = get("local-search").solve(problem, _patient(), None)
    assert outcome.row is not None
    value = objective(problem, outcome.row)
    assert lower_bound(problem) <= value + 1e-9
    assert best - 1e-6 <= value <= best + len(counts) * slopes.max() + 1e-6, "whole assignments cost at most one each"


def skewed(seed: int, *, active: bool) -> Problem:
    """Few experts, of which some are far hotter, and spare slots; ranks alike."""
    rng, experts = np.random.default_rng(seed), 5 if active else 4
    shares = rng.dirichlet(np.full(experts, 0.4))
    counts = np.stack([rng.multinomial(60, rng.dirichlet(8 * shares + 0.02)) for _ in range(8)])
    if active:
        terms = (line(12.0, 0.0), line(0.0, 6.0)), (line(4.0, 1.2), line(0.0, 1.0))
        return Problem.make(counts, (ASSIGNMENTS, ACTIVE), [Latency(terms)] * 3, [3, 3, 2], split=Split.OPTIMAL)
    return Problem.make(counts, (ASSIGNMENTS,), sloped(1.0, 1.0, 1.0, 1.0), [2, 1, 2, 1], split=Split.OPTIMAL)


def best_of_all(problem: Problem) -> float:
    """Over all placements, empty slots last on their rank."""
    experts = problem.num_experts
    held = [
        [np.array([*each, *[EMPTY] * (size - n)]) for n in range(size + 1) for each in combinations(range(experts), n)]
        for size in problem.slots_per_rank.tolist()
    ]
    rows = (np.concatenate(parts) for parts in product(*held))
    return min(objective(problem, row) for row in rows if len(np.unique(row[row != EMPTY])) == experts)


@pytest.mark.parametrize(("seed", "active"), [(0, False), (38, False), (0, True), (7, True), (17, True)])
def test_an_optimal_split_is_searched_beyond_placements_that_no_single_change_betters(seed: int, active: bool) -> None:
    problem = skewed(seed, active=active)
    outcome = get("local-search").solve(problem, Options(deadline=np.inf, patience=10), None)
    assert outcome.row is not None
    assert objective(problem, outcome.row) == pytest.approx(best_of_all(problem))
    assert pickle.loads(pickle.dumps(outcome.search)).value == outcome.search.value, "another machine may go on"


def test_patience_is_no_shorter_where_slots_are_few() -> None:
    """With the patience of a call that says nothing, nearest copies on few slots are mostly the best of all."""
    missed = 0
    for seed in range(24):
        rng = np.random.default_rng(seed)
        counts = rng.poisson(rng.gamma(1.0, 12.0, 4), (4, 4))
        slots, nodes = [[2, 2, 2], [3, 2, 1], [1, 3, 2]][seed % 3], [0, 0, 1]
        problem = Problem.make(
            counts, (ASSIGNMENTS,), sloped(1.0, 1.0, 1.3), slots, node_of_rank=nodes, split=Split.NEAREST
        )
        row = get("local-search").solve(problem, Options(deadline=np.inf, patience=DEFAULT_PATIENCE), None).row
        assert row is not None
        missed += objective(problem, row) > best_of_all(problem) * (1 + 1e-9)
    assert missed <= 7, "10 where only slots counted"


def test_static_without_time_to_search_is_where_even_is() -> None:
    """Greedy starts with copies are there at once; weights are even where none could be chosen."""
    profile, given = measured(1.0, 1.5, 0.7), traces()
    rows = []
    for split in (Split.EVEN, Split.STATIC):
        problem = Problem.make([[300, 9, 8, 7, 6, 5]] * 3, (ASSIGNMENTS,), sloped(1.0, 1.1, 0.9), 3, split=split)
        found = get("local-search").solve(problem, Options(deadline=-np.inf, start_by=np.inf), None)
        assert found.row is not None
        rows.append(found.row.tolist())
    assert rows[0] == rows[1] and len(rows[0]) - rows[0].count(EMPTY) > 6
    result = gemopt.solve(profile, given, slots_per_rank=3, split=Split.STATIC, time_limit=1e-9)
    assert result.placement is not None and result.placement.split_weights is not None
    for row, weights in zip(result.placement.physical_to_logical, result.placement.split_weights, strict=True):
        assert weights == pytest.approx(even_weights(row, 6))
    again = evaluate(result.placement, profile, given)
    assert again.objective_us == pytest.approx(result.objective_us)


def test_weights_of_a_static_warm_start_are_chosen_within_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.make([[300, 9, 8]] * 3, (ASSIGNMENTS,), sloped(1.0, 2.0, 0.9), 2, split=Split.STATIC)
    row = np.array([0, 1, 0, 2, EMPTY, EMPTY])
    with monkeypatch.context() as patch:
        patch.setattr("gemopt.solvers.search.policies.static_weights", pytest.fail)
        cut = get("local-search").solve(problem, Options(deadline=-np.inf, start_by=np.inf), row)
    assert cut.history[-1].objective_us <= objective(problem, row, even_weights(row, 3)) and not problem.weighed
    found = get("local-search").solve(problem, Options(deadline=np.inf, patience=0, begun=cut.search), row)
    assert found.history[-1].objective_us <= objective(problem, row, static_weights(problem, row))


def test_static_answers_cost_what_their_history_ends_with() -> None:
    """Even static weights round otherwise than the even split: 1 for three copies goes to the second, not the first."""
    counts = np.random.default_rng(2).poisson(np.linspace(6, 0.5, 6), (8, 1, 6))
    devices = [
        {"rank": rank, "samples": [{"assignments": n, "latency_us": (9 + n) * slow} for n in (0, 100)]}
        for rank, slow in enumerate((1.0, 1.2, 0.9))
    ]
    options = {"slots_per_rank": 4, "solver": "local-search", "patience": 1, "time_limit": 60, "threads": 1}
    found = gemopt.solve(Profile(devices=devices), Traces(counts=counts), split="static", **options)
    assert found.history[-1].objective_us == pytest.approx(found.objective_us, rel=1e-9)


def test_static_weights_are_of_full_rows_where_slots_must_be_full(monkeypatch: pytest.MonkeyPatch) -> None:
    weighed: list[np.ndarray] = []
    monkeypatch.setattr("gemopt.solvers.search.policies.static_weights", lambda _, row, *__, **___: weighed.append(row))
    problem = Problem.make([[300, 9, 8]] * 3, (ASSIGNMENTS,), sloped(1, 2, 0.9), 2, split=Split.STATIC, full=True)
    options = Options(deadline=np.inf, patience=0)
    get("local-search").solve(problem, options, np.array([0, 1, 0, 2, EMPTY, EMPTY]))
    assert weighed and all((row != EMPTY).all() for row in weighed)


@pytest.mark.parametrize("patience", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_static_begins_with_the_search_of_even(seed: int, patience: int) -> None:
    """The same search, and then weights: never dearer."""
    profile, given, found = measured(1.0, 1.6, 0.7), traces(experts=8, seed=seed), {}
    for split in (Split.EVEN, Split.STATIC):
        found[split] = gemopt.solve(
            profile, given, solver="local-search", slots_per_rank=4, split=split, patience=patience, time_limit=60,
            seed=seed, threads=1,
        ).objective_us  # fmt: skip
    assert found[Split.STATIC] is not None and found[Split.EVEN] is not None
    assert found[Split.STATIC] <= found[Split.EVEN] * (1 + 1e-12)


def test_weights_that_are_stopped_are_even_ones() -> None:
    problem = Problem.make([[300, 9, 8]] * 3, (ASSIGNMENTS,), sloped(1.0, 2.0, 0.9), 2, split=Split.STATIC)
    row = np.array([0, 1, 0, 2, EMPTY, EMPTY])
    assert static_weights(problem, row, np.ones(1, np.uint8)) == pytest.approx(even_weights(row, 3))
    again = replace(problem)
    assert static_weights(again, row)[0] > 0.6, "the faster rank takes more"


def test_weights_that_made_an_answer_are_found_again() -> None:
    """Of rows whose ranks changed roles after the search, or that another machine found, none are known here."""
    problem = Problem.make([[300, 9, 8]] * 3, (ASSIGNMENTS,), sloped(1.0, 2.0, 0.9), 2, split=Split.STATIC)
    row = np.array([0, 1, 0, 2, EMPTY, EMPTY])
    for split_P in (static_weights(problem, row), even_weights(row, 3)):
        outcome = Outcome(row, StoppedBy.TIME_LIMIT, history=[incumbent(objective(problem, row, split_P))])
        layer = Layer(replace(problem), None, 0, outcome)
        (found_P,) = answer._weights(Run(get("local-search"), [layer], 0.0, 1.0, end=-np.inf), [row]) or []
        assert found_P == pytest.approx(split_P)


def _patient() -> Options:
    return Options(deadline=np.inf, patience=40)


@pytest.mark.parametrize("split", list(Split))
def test_what_is_solved_is_what_evaluate_says(split: Split) -> None:
    profile, given = measured(1.0, 1.5, 0.7), traces()
    senders = "uniform" if split is Split.NEAREST else None
    result = gemopt.solve(
        profile, given, slots_per_rank=3, split=split, senders=senders, patience=2, time_limit=60, threads=1
    )
    placement = result.placement
    assert placement is not None and placement.split is split and placement.has_copies
    assert (placement.split_weights is not None) == (split is Split.STATIC)
    again = Placement.model_validate_json(placement.model_dump_json())
    assert evaluate(again, profile, given, senders=senders).objective_us == pytest.approx(result.objective_us)
    assert result.bound_us <= result.objective_us * (1 + 1e-9)
    plain = gemopt.solve(profile, given, solver="lpt", patience=0, threads=1)
    assert result.objective_us <= plain.objective_us, "copies are never worse than none"


def test_exact_solvers_know_copies_that_share_evenly_alone() -> None:
    with pytest.raises(UnsupportedError, match="share evenly"):
        gemopt.solve(measured(1, 2), traces(1), slots_per_rank=4, split="optimal", solver="cpsat")
    with pytest.raises(InputError, match="one of even, static, nearest, optimal"):
        gemopt.solve(measured(1, 2), traces(1), slots_per_rank=4, split="odd")
    with pytest.raises(InputError, match="--senders uniform"):
        gemopt.solve(measured(1, 2), traces(1), slots_per_rank=4, split="nearest")
    without = gemopt.solve(measured(1, 2), traces(1), split="optimal", solver="cpsat", time_limit=20)
    assert without.status is Status.OPTIMAL, "without spare slots every split is the same"


def test_with_activated_experts_a_copy_may_stay_unused() -> None:
    latencies = [Latency(((line(10.0, 0.01), line(0.0, 50.0)),))] * 2
    problem = Problem.make([[4, 3]], (ASSIGNMENTS, ACTIVE), latencies, 2, split=Split.OPTIMAL)
    even = Problem.make([[4, 3]], (ASSIGNMENTS, ACTIVE), latencies, 2)
    row = np.array([0, 1, 1, 0])
    assert objective(problem, row) == pytest.approx(60.04)
    assert objective(even, row) > 110


def test_an_engine_that_wants_every_slot_full_gets_that() -> None:
    for split in ("even", "static", "optimal"):
        result = gemopt.solve(
            measured(1.0, 1.5, 0.7), traces(), slots_per_rank=4, split=split, full_slots=True, patience=1, threads=1
        )
        assert result.placement is not None and not result.placement.has_empty_slots
    for solver in ("lpt", "linear", "gem"):
        result = gemopt.solve(measured(1, 2), traces(), slots_per_rank=5, full_slots=True, solver=solver, patience=1)
        assert result.placement is not None and not result.placement.has_empty_slots


@pytest.mark.parametrize(
    ("name", "slots", "split", "said"),
    [
        ("sglang", [4, 3], None, "as many slots on every rank"),
        ("sglang", 4, "static", "even, nearest, optimal"),
        ("vllm-ascend", 4, "optimal", "as: even"),
        ("checkpoint", 4, None, "every expert once"),
        ("llama.cpp", 3, None, "llama.cpp"),
    ],
)
def test_what_an_engine_cannot_have_is_refused(name: str, slots: object, split: str | None, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        within_engine(engine(name), slots, split, 6, 2)


def test_an_engine_says_how_copies_share() -> None:
    limits = within_engine(engine("trtllm"), 4, None, 6, 2)
    assert limits.split is Split.EVEN and limits.full
    assert within_engine(engine("sglang"), 4, "optimal", 6, 2).split is Split.OPTIMAL
    assert not within_engine(engine("csv"), [4, 3], "static", 6, 2).full
    assert not within_engine(engine("sglang"), None, "optimal", 6, 2).full, "nothing is spare"


def test_a_falling_staircase_is_split_by_the_one_above() -> None:
    curve = Curve(np.array([0.0, 10, 11, 20]), np.array([5.0, 30, 20, 40]), 2.0)
    assert curve.high(np.array([10.0, 11, 15, 20])).tolist() == pytest.approx([30, 30, 30, 40])
    cost = CostModel("staircase", (ASSIGNMENTS,), (Latency(((curve,),)),) * 2, np.full((2, 1, 2), np.nan))
    placement = Placement(physical_to_logical=[[0, 0]], slots_per_rank=[1, 1], num_experts=1, split="optimal")
    found = evaluate(placement, None, Traces(counts=np.array([[[20]]])), cost=cost)
    assert found.objective_us == pytest.approx(30.0)

"""Cost models: what they recover, what they cost idle and beyond the range, which one is chosen, and new ones."""

from __future__ import annotations

import numpy as np
import pytest
from brute import optimum
from cost_profiles import PLANTED, profile, surface

from gemopt.bounds import lower_bound
from gemopt.costs import CANDIDATES, Candidate, CostModel, fit, roofline, staircase
from gemopt.evaluate import objective
from gemopt.exceptions import InputError, UnsupportedError
from gemopt.latency import ACTIVE, ASSIGNMENTS, Curve, Feature, Latency, line, tiles
from gemopt.problem import Problem
from gemopt.solvers import get, names
from gemopt.solvers.base import Options

# --- staircase -----------------------------------------------------------------------------------------------------


def test_a_staircase_goes_through_its_points_in_any_order() -> None:
    rows = [(64, 30.0), (0, 5.0), (256, 20.0), (128, 50.0)]
    cost, _ = fit(profile(rows), model="staircase")
    (latency,) = cost.latencies
    for load, expected in [*rows, (32, 17.5), (96, 40.0), (192, 35.0)]:
        assert latency([load]) == pytest.approx(expected)


def test_beyond_the_range_it_goes_on_with_the_secant_of_the_upper_half() -> None:
    rising = [(0, 0.0), (50, 10.0), (90, 40.0), (100, 40.0)]  # upper half: from 50 to 100, 30 us
    (latency,) = fit(profile(rising), model="staircase")[0].latencies
    assert latency([200]) == pytest.approx(40 + 100 * 30 / 50)
    falling = [(0, 10.0), (50, 30.0), (100, 20.0)]
    (latency,) = fit(profile(falling), model="staircase")[0].latencies
    assert latency([1000]) == pytest.approx(20.0)  # never below 0


def test_an_idle_rank_costs_zero_load_or_else_the_smallest_measured_load() -> None:
    for model in ("staircase", "roofline-1"):
        with_idle = fit(profile([(0, 3.0), (10, 20.0), (20, 30.0), (30, 40.0)]), model=model)[0].latencies[0]
        assert with_idle([0, 0][: with_idle.num_features]) == pytest.approx(3.0)
        assert with_idle([10, 0][: with_idle.num_features]) == pytest.approx(20.0)
    staircase = fit(profile([(10, 20.0), (20, 30.0)]), model="staircase")[0].latencies[0]
    assert staircase([0]) == staircase([5]) == staircase([10]) == pytest.approx(20.0)
    flat = [(n, 1, 50.0 + 0.001 * n) for n in (10, 20, 30, 40)]
    roofline = fit(profile(flat), model="roofline-1")[0].latencies[0]
    assert roofline([0, 0]) == pytest.approx(50.0, rel=0.01)


def test_an_idle_roofline_is_never_dearer_than_one_assignment() -> None:
    rows = [(n, 1, 10.0 + n) for n in (100, 200, 300, 400)]  # smallest measured: 110 us, one assignment: about 11
    latency = fit(profile(rows), model="roofline-1")[0].latencies[0]
    assert latency([0, 0]) <= latency([1, 1]) + 1e-9 < 20


def test_a_rank_that_idles_in_no_time_is_exact() -> None:
    report = fit(profile([(0, 0.0), (16, 10.0), (64, 20.0), (256, 100.0)]))[1]
    assert report.fits["staircase"] == pytest.approx(0.0) and "exact at its 4 points" in report.summary()


def test_one_sample_is_a_constant() -> None:
    cost, report = fit(profile([(10, 7.0)]))
    assert cost.name == "staircase" and np.isnan(report.error)
    assert cost.latencies[0]([[0, 10, 1000]]).tolist() == [7.0, 7.0, 7.0]
    with pytest.raises(InputError, match="too few samples for it: rank 0 has 1, 3 are needed"):
        fit(profile([(10, 7.0)]), model="roofline")
    with pytest.raises(InputError, match="auto, roofline, staircase"):
        fit(profile([(10, 7.0)]), model="parabola")


def test_one_load_with_different_active_experts_is_their_median_in_a_staircase() -> None:
    rows = [(8, 1, 10.0), (8, 4, 30.0), (8, 8, 70.0), (16, 8, 80.0)]
    latency = fit(profile(rows), model="staircase")[0].latencies[0]
    assert latency([8]) == pytest.approx(30.0) and latency([16]) == pytest.approx(80.0)


# --- roofline ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PLANTED)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_roofline_recovers_planted_planes_of_ranks_that_differ(case: str, seed: int) -> None:
    fast = PLANTED[case]
    slow = [[a * 1.1, b * 1.4, c] for a, b, c in fast]
    cost, report = fit(profile(surface(fast, seed), surface(slow, seed + 10)), model="roofline")
    assert report.error < 0.012
    n, active = (m.ravel() for m in np.meshgrid(np.arange(40, 4000, 97.0), np.arange(1, 33.0)))
    for latency, planes in zip(cost.latencies, (fast, slow), strict=True):
        true = (np.array(planes) @ np.stack([np.ones(len(n)), n, active])).max(axis=0)
        miss = np.abs(latency([n, active]) / true - 1)
        assert miss.mean() < 0.005 and miss.max() < 0.05
        assert (latency.planes()[:, 1:] >= 0).all()


def test_rooflines_scale_with_the_latency() -> None:
    rows = surface(PLANTED["memory and compute"], 3)
    twice = [(n, a, 2 * y) for n, a, y in rows]
    one, two = fit(profile(rows, twice), model="roofline-2")[0].latencies
    loads = [np.array([1.0, 100, 3000]), np.array([1.0, 20, 32])]
    np.testing.assert_allclose(two(loads), 2 * one(loads), rtol=1e-6)


# --- choice --------------------------------------------------------------------------------------------------------


def staircase_points(size: int = 80) -> list[tuple[float, ...]]:
    rng = np.random.default_rng(5)
    n = np.arange(1, size + 1) * 8
    return [(int(a), min(int(a), int(rng.integers(1, 33))), 20.0 + 15.0 * np.ceil(a / 128)) for a in n]


def test_each_kind_of_profile_gets_its_model_and_an_honest_error() -> None:
    cost, report = fit(profile(staircase_points()))
    assert (cost.name, report.chosen) == ("staircase", "staircase")
    assert report.error == report.errors["staircase"] < min(v for k, v in report.errors.items() if k != "staircase")
    cost, report = fit(profile(surface(PLANTED["memory and compute"], 1)))
    assert cost.name.startswith("roofline") and 0.001 < report.error < 0.02 < report.errors["staircase"]


def test_the_order_of_the_samples_changes_nothing() -> None:
    rows = surface(PLANTED["memory and compute"], 1)
    (a, first), (b, second) = fit(profile(rows)), fit(profile(rows[::-1]))
    assert first == second
    loads = [np.array([1.0, 100, 3000]), np.array([1.0, 20, 32])]
    np.testing.assert_allclose(a.latencies[0](loads), b.latencies[0](loads), rtol=1e-9)


def test_the_measured_range_is_reported() -> None:
    cost, _ = fit(profile([(4, 2, 5.0), (64, 8, 9.0)]), model="staircase")
    assert cost.measured.tolist() == [[[4.0, 64.0]]]
    unknown, _ = fit(profile([(n, 5.0 + n) for n in (4, 8, 16, 64)]), model="roofline-1")
    assert unknown.measured[0, 0].tolist() == [4, 64] and np.isnan(unknown.measured[0, 1]).all()


# --- a cost model and features nobody has heard of -----------------------------------------------------------------


def additive(second: Feature, ranks: int) -> CostModel:
    """A staircase in assignments plus a line in active experts, or in tiles."""
    steps = [
        Curve(np.array([0, 3, 4, 9, 10.0]), np.array([2, 2, 8, 6, 12.0]) * (1 + 0.1 * g), 1.3) for g in range(ranks)
    ]
    latencies = tuple(Latency(((step, line(0.0, 1.5 + g)),)) for g, step in enumerate(steps))
    return CostModel("additive", (ASSIGNMENTS, second), latencies, np.full((ranks, 2, 2), np.nan))


@pytest.mark.parametrize("second", [ACTIVE, tiles(4)], ids=lambda feature: feature.name)
@pytest.mark.parametrize("seed", range(3))
def test_a_new_cost_model_and_a_new_feature_need_no_new_solver(second: Feature, seed: int) -> None:
    counts_TE = np.random.default_rng(seed).integers(0, 9, (4, 5))
    cost = additive(second, 2)
    problem = Problem.make(counts_TE, cost.features, cost.latencies, [3, 3])
    best = optimum(problem)
    assert lower_bound(problem) <= best + 1e-9
    for name in names():
        solver = get(name)
        options = Options.lasting(200, bound_us=lower_bound(problem), patience=20)
        if name == "columns":  # knows no copies, and says so rather than prove without them
            with pytest.raises(UnsupportedError, match="spare slots"):
                solver.solve(problem, options, None)
            continue
        outcome = solver.solve(problem, options, None)
        assert outcome.row is not None, name
        value = objective(problem, outcome.row)
        assert value >= best - 1e-9, name
        if outcome.bound_us is not None:
            assert outcome.bound_us <= best + 1e-6, name
        if name in ("branch", "cpsat", "milp"):
            assert value == pytest.approx(best, rel=1e-6), name
        if name == "local-search":
            assert value <= 1.02 * best


def test_a_new_candidate_is_chosen_where_it_fits_best() -> None:
    rows = [(n, 7.0 * -(-n // 4)) for n in range(1, 60)]
    tiled = Candidate(
        "tiles",
        (tiles(4),),
        lambda table: Latency(((line(0.0, float(np.median(table[:, 2] / -(-table[:, 0] // 4)))),),)),
    )
    cost, report = fit(profile(rows), model="tiles", candidates=(*CANDIDATES, tiled))
    assert report.chosen == "tiles" and cost.features[0].name == "tiles@4"
    assert cost.latencies[0]([3]) == pytest.approx(21.0)


def test_models_are_the_exported_ones() -> None:
    assert [c.name for c in CANDIDATES] == ["staircase", *(f"roofline-{planes}" for planes in (1, 2, 3, 4))]
    assert staircase(np.array([[1, 1, 5.0, 0]])).num_features == 1
    assert roofline(np.array([[0, 0, 5.0, 0]])).num_features == 2  # nothing but idle was measured

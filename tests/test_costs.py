"""Cost models: what they recover, what they cost idle and beyond the range, which one is chosen, and new ones."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from brute import optimum

from gemopt.bounds import lower_bound
from gemopt.costs import CANDIDATES, Candidate, FitReport, Roofline, Staircase, fit
from gemopt.evaluate import objective
from gemopt.exceptions import InputError, UnsupportedError
from gemopt.latency import ACTIVE, ASSIGNMENTS, Curve, Feature, FloatArray, Latency, line, tiles
from gemopt.problem import Problem
from gemopt.profile import Device, Profile, Sample
from gemopt.solvers import get, names
from gemopt.solvers.base import Options


def profile(*tables: list[tuple[float, ...]], **fields: Any) -> Profile:
    """Rows (assignments, latency) or (assignments, active, latency) per device."""
    devices = []
    for rank, rows in enumerate(tables):
        points = [
            Sample(assignments=int(r[0]), active_experts=int(r[1]) if len(r) == 3 else None, latency_us=r[-1])
            for r in rows
        ]
        devices.append(Device(rank=rank, samples=points, **fields))
    return Profile(devices=devices)


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

PLANTED = {
    "memory and compute": [[20.0, 0.0, 6.0], [10.0, 0.08, 0.0]],
    "launch, memory, compute": [[60.0, 0.0, 0.0], [15.0, 0.01, 5.0], [5.0, 0.1, 1.0]],
    "tokens only": [[30.0, 0.0, 0.0], [2.0, 0.05, 0.0]],
    "active only": [[12.0, 0.0, 3.0]],
}


def surface(planes: list[list[float]], seed: int, *, noise: float = 0.005, size: int = 240) -> list[tuple[float, ...]]:
    rng = np.random.default_rng(seed)
    n = np.unique(np.geomspace(1, 4000, size).round().astype(int))
    size = len(n)
    active = np.minimum(n, rng.integers(1, 33, size))
    true = (np.array(planes) @ np.stack([np.ones(size), n, active])).max(axis=0)
    return list(zip(n, active, true * (1 + noise * rng.standard_normal(size)), strict=True))


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


@dataclass(frozen=True, eq=False)
class Additive:
    """A staircase in assignments plus a line in active experts, or in tiles."""

    latencies: tuple[Latency, ...]
    measured: FloatArray
    features: tuple[Feature, ...] = (ASSIGNMENTS, ACTIVE)
    name: str = "additive"


def additive(second: Feature, ranks: int) -> Additive:
    steps = [
        Curve(np.array([0, 3, 4, 9, 10.0]), np.array([2, 2, 8, 6, 12.0]) * (1 + 0.1 * g), 1.3) for g in range(ranks)
    ]
    latencies = tuple(Latency(((step, line(0.0, 1.5 + g)),)) for g, step in enumerate(steps))
    return Additive(latencies, np.full((ranks, 2, 2), np.nan), (ASSIGNMENTS, second))


@dataclass
class TilesOnly:
    """Fits a line in tiles of 4; knows nothing of the other models."""

    latencies: tuple[Latency, ...]
    measured: FloatArray
    features: tuple[Feature, ...] = field(default=(tiles(4),))
    name: str = "tiles"


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
        options = Options(deadline=time.monotonic() + 20, bound_us=lower_bound(problem), patience=20)
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
        TilesOnly,
    )
    cost, report = fit(profile(rows), model="tiles", candidates=(*CANDIDATES, tiled))
    assert report.chosen == "tiles" and cost.features[0].name == "tiles@4"
    assert cost.latencies[0]([3]) == pytest.approx(21.0)


def test_models_are_the_exported_ones() -> None:
    assert [c.name for c in CANDIDATES] == ["staircase", *(f"roofline-{planes}" for planes in (1, 2, 3, 4))]
    assert Staircase.fit_device(np.array([[1, 1, 5.0, 0]])).num_features == 1
    assert Roofline.fit_device(np.array([[0, 0, 5.0, 0]])).num_features == 2  # nothing but idle was measured


# --- curves: joined, unless a smoother model explains every point -----------------------------------------------------


def curve(loads: np.ndarray, latency_us: np.ndarray, *, spread: float = 0.0, seed: int = 0) -> Profile:
    """One device; each point is the median of 25 timings that scatter by `spread`, with that spread told."""
    timings = latency_us * (1 + spread * np.random.default_rng(seed).standard_normal((25, len(loads))))
    middle = np.median(timings, axis=0)
    mad = np.median(np.abs(timings - middle), axis=0)
    rows = zip(loads.tolist(), middle.tolist(), mad.tolist(), strict=True)
    samples = [Sample(assignments=n, latency_us=y, spread_us=s, repeats=25) for n, y, s in rows]
    return Profile(devices=[Device(rank=0, samples=samples)])


def corners(tile: int, high: int) -> np.ndarray:
    edges = np.arange(0, high + 1, tile)
    return np.unique(np.concatenate([edges, edges + 1])[1:])


TILED = {
    "all corners": corners(16, 512),
    "a long staircase, steps of a thousandth at its end": corners(128, 32768),
    "every load": np.arange(1, 400),
    "evenly": np.arange(1, 2000, 21),
}


@pytest.mark.parametrize("case", TILED)
def test_a_measured_staircase_is_never_smoothed(case: str) -> None:
    loads = TILED[case]
    tile = 128 if "long" in case else 16
    truth = 60 + 18.75 * -(-loads // tile)
    cost, report = fit(curve(loads, truth, spread=0.005))
    assert report.chosen == "staircase" and report.fits["staircase"] == 0
    np.testing.assert_allclose(cost.latencies[0]([loads]), truth, rtol=0.01)


def test_corners_are_not_left_out_to_judge_a_staircase() -> None:
    loads = corners(16, 512)
    _, report = fit(curve(loads, 60.0 + 9 * -(-loads // 16)))
    assert np.isnan(report.error)  # nothing but corners: whatever is left out, a step goes with it
    assert report.summary().startswith(
        f"cost model staircase: exact at its {len(loads)} points, none could be left out ("
    )
    inside = np.unique(np.concatenate([loads, loads[::2] + 5, loads[::2] + 10]))
    _, report = fit(curve(inside, 60.0 + 9 * -(-inside // 16)))
    assert report.chosen == "staircase" and report.error < 1e-9  # a point inside a tread is foretold by its neighbours


@pytest.mark.parametrize(("spread", "least"), [(0.0, 0.0), (0.01, 0.0), (0.1, 0.01)])
@pytest.mark.parametrize("knee", [1.0, 800.0])
def test_what_a_roofline_explains_everywhere_or_within_the_noise_is_smoothed(
    spread: float, least: float, knee: float
) -> None:
    loads = np.arange(1, 4000, 50)
    truth = np.maximum(65.0, 65 + 0.08 * (loads - knee))
    cost, report = fit(curve(loads, truth, spread=spread))
    assert report.chosen.startswith("roofline") and report.fits[report.chosen] >= least
    every = np.arange(1, 4000)
    smooth = np.maximum(65.0, 65 + 0.08 * (every - knee))
    off = {
        name: np.abs(fit(curve(loads, truth, spread=spread), model=name)[0].latencies[0](
            [every, np.zeros(len(every))][: 1 if name == "staircase" else 2]) / smooth - 1).mean()
        for name in (report.chosen, "staircase")
    }  # fmt: skip
    assert off[report.chosen] <= off["staircase"] + 1e-3
    assert cost.name == report.chosen


def test_scatter_that_the_repeats_do_not_explain_is_no_noise() -> None:
    """The same 5 % of jaggedness, once with repeats that scatter as much and once with steady ones."""
    loads = np.arange(1, 4000, 50)
    jagged = (30 + 0.05 * loads) * (1 + 0.05 * np.random.default_rng(3).standard_normal(len(loads)))
    steady = curve(loads, jagged, spread=0.001)
    assert fit(steady)[1].chosen == "staircase"
    loud = [s.model_copy(update={"spread_us": 0.2 * s.latency_us}) for s in steady.devices[0].samples]
    assert fit(Profile(devices=[Device(rank=0, samples=loud)]))[1].chosen.startswith("roofline")


def test_one_device_that_no_roofline_explains_keeps_all_joined() -> None:
    loads = np.arange(1, 2000, 21)
    smooth = curve(loads, 30 + 0.05 * loads).devices[0].model_copy(update={"name": "a"})
    tiled = curve(loads, 60.0 + 9 * -(-loads // 64)).devices[0].model_copy(update={"name": "b", "rank": 1})
    assert fit(Profile(devices=[smooth]))[1].chosen.startswith("roofline")
    assert fit(Profile(devices=[smooth, tiled]))[1].chosen == "staircase"


@pytest.mark.parametrize("odd", range(4))
@pytest.mark.parametrize("named", [True, False])
def test_one_device_of_many_that_are_alike_is_not_smoothed_away(odd: int, named: bool) -> None:
    loads = np.unique(np.geomspace(1, 2000, 40).round()).astype(int)
    smooth = [(n, max(30.0, 5 + n / 4)) for n in loads]
    rows = [[(n, 30.0 + 40 * (n // 128)) for n in loads] if rank == odd else smooth for rank in range(4)]
    given = profile(*rows)
    if named:
        given = Profile(devices=[each.model_copy(update={"name": f"gpu {each.rank}"}) for each in given.devices])
    cost, report = fit(given)
    assert report.chosen == "staircase" and report.error > 0.02
    assert cost.latencies[odd]([rows[odd][-1][0]]) == pytest.approx(rows[odd][-1][1])


def test_the_worst_device_of_a_fit_is_said() -> None:
    active = [(n, a, 20.0 + n + 3 * a) for n in (16, 64, 256) for a in (1, 4, 16)]
    bent = [(n, a, us * (3 if n == 64 else 1)) for n, a, us in active]
    _, report = fit(profile(active, active, bent, active), model="roofline-1")
    assert report.worst > 0.1 and f"({100 * report.worst:.1f} % on one device)" in report.summary()


def test_few_points_are_joined() -> None:
    assert fit(profile([(n, 5.0 + n) for n in (4, 8, 16, 64)]))[1].chosen == "staircase"


def test_a_model_that_was_chosen_for_one_profile_is_taken_for_a_thinner_one() -> None:
    rows = surface(PLANTED["memory and compute"], 1)
    chosen = fit(profile(rows))[1].chosen
    assert chosen.startswith("roofline-")
    cost, report = fit(profile(rows[::48][:4]), model=chosen)
    assert cost.name == report.chosen == chosen
    with pytest.raises(InputError, match="rank 1 has 2, 3 are needed"):
        fit(profile(rows, rows[:2]), model=chosen)


def test_the_summary_is_one_line_with_the_model_and_its_errors() -> None:
    report = FitReport(
        "staircase", {"staircase": 0.009, "roofline-2": 0.041, "roofline-1": 0.2}, {"staircase": 0.0}, 27
    )
    assert report.summary() == (
        "cost model staircase: exact at its 27 points, 0.9 % on points left out (roofline-2: 4.1 %)"
    )
    smooth = FitReport("roofline-1", {"roofline-1": 0.02}, {"roofline-1": 0.015}, 12)
    assert smooth.summary() == "cost model roofline-1: 1.5 % off at its 12 points, 2.0 % on points left out"
    assert FitReport("given", {"given": float("nan")}).summary() == "cost model given: its error is not known"
    _, lone = fit(profile([(10, 7.0)]))
    assert lone.summary() == "cost model staircase: exact at its only point, none could be left out"

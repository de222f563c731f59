"""Points of a curve are joined, unless a smoother model explains every one of them."""

from __future__ import annotations

import numpy as np
import pytest
from cost_profiles import PLANTED, profile, surface

from gemopt.costs import FitReport, fit
from gemopt.exceptions import InputError
from gemopt.profile import Device, Profile, Sample


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

"""Adaptive sampling on measured and made-up curves."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from gemopt import costs
from gemopt.exceptions import InputError
from gemopt.profiling.replay import ReplayDevice
from gemopt.profiling.sampling import Reading, sample_curve, sample_surface

A6000 = Path(__file__).parent / "data" / "staircase_a6000_phi_mini_moe.csv"


@pytest.fixture(scope="module")
def staircase() -> dict[int, float]:
    with A6000.open() as stream:
        return {int(row["assignments"]): int(row["latency_ns"]) / 1e3 for row in csv.DictReader(stream)}


def errors(answers: dict[int, float], truth: dict[int, float]) -> np.ndarray:
    """Relative error at every load of the cost model that users get."""
    table = np.array([(load, np.nan, latency, np.nan) for load, latency in sorted(answers.items())])
    loads = np.array(sorted(truth))
    return np.abs(costs.staircase(table)([loads]) / np.array([truth[load] for load in loads]) - 1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_five_percent_of_the_points_rebuild_a_measured_staircase(staircase: dict[int, float], seed: int) -> None:
    device = ReplayDevice(staircase, seed=seed)
    sampling = sample_curve(device, 1, 2048, budget=102)
    assert len(device.answers) == len(sampling.loads) == 102 and sampling.stopped_by == "budget"
    median, p95 = np.percentile(errors(device.answers, staircase), [50, 95])
    assert median <= 0.012 and p95 <= 0.05
    uniform = ReplayDevice(staircase, seed=seed)
    for load in np.linspace(1, 2048, 102).round():
        uniform(int(load))
    assert p95 < 0.5 * np.percentile(errors(uniform.answers, staircase), 95)


def _steps(high: int, edges: dict[int, float]) -> dict[int, float]:
    """Latency 100 that changes to a level from each edge on."""
    level, table = 100.0, {}
    for load in range(1, high + 1):
        level = edges.get(load, level)
        table[load] = level
    return table


@pytest.mark.parametrize("edges", [{513: 160.0}, {700: 140.0}, {300: 70.0}, {257: 150.0, 641: 90.0}])
def test_steps_up_and_down_are_located_to_the_row(edges: dict[int, float]) -> None:
    table = _steps(1024, edges)
    device = ReplayDevice(table, noise=0.0, repeats=1)
    sample_curve(device, 1, 1024, budget=40)
    for edge in edges:
        assert {edge - 1, edge} <= set(device.answers)


def test_a_straight_line_needs_no_more_than_the_start() -> None:
    device = ReplayDevice({n: 20.0 + 0.5 * n for n in range(1, 2049)}, noise=0.005)
    sampling = sample_curve(device, 1, 2048, budget=200, target_error=0.01)
    assert sampling.stopped_by == "target" and len(sampling.loads) < 40
    assert np.median(errors(device.answers, device.table)) < 0.01


def test_steps_of_a_grouped_kernel_are_found_at_multiples_of_the_active_experts() -> None:
    table = {n: 50.0 + 20.0 * -(-n // (8 * 64)) for n in range(8, 2049)}  # 8 experts, tiles of 64 rows
    device = ReplayDevice(table, noise=0.002)
    sample_curve(device, 8, 2048, budget=60, unit=8)
    assert errors(device.answers, table).max() < 0.01


def test_an_exhausted_range_ends_the_search() -> None:
    device = ReplayDevice(dict.fromkeys(range(1, 11), 5.0))
    sampling = sample_curve(device, 1, 10, budget=50)
    assert sampling.stopped_by == "exhausted" and sorted(sampling.loads) == list(range(1, 11))


@pytest.mark.parametrize(
    ("low", "high", "budget", "field"), [(1, 2048, 7, "budget"), (5, 5, 20, "loads"), (0, 9, 20, "loads")]
)
def test_impossible_requests_are_refused(low: int, high: int, budget: int, field: str) -> None:
    with pytest.raises(InputError, match=f"^{field}: "):
        sample_curve(lambda load: Reading(1.0, 0.0), low, high, budget=budget)


def test_a_surface_is_sampled_where_it_bends() -> None:
    grid = [(active * 2**k, active) for active in (1, 2, 4, 8, 16) for k in range(9)]
    table = {(n, a): max(30.0, 10.0 * a, 0.5 * n) for n, a in grid}
    device = ReplayDevice(table)
    chosen = sample_surface(device, grid, budget=20)
    assert len(chosen) == len(set(chosen)) == 20 and set(chosen) == set(device.answers)
    assert {(1, 1), (16, 16), (256, 1), (4096, 16)} <= set(chosen)
    everything = ReplayDevice(table)
    assert set(sample_surface(everything, grid, budget=1000)) == set(grid)
    with pytest.raises(InputError, match=r"^budget: got 4"):
        sample_surface(device, grid, budget=4)


def test_the_replay_device_knows_only_its_table() -> None:
    device = ReplayDevice({1: 100.0}, noise=0.01, repeats=25, seed=3)
    answer = device(1)
    assert answer.noise == pytest.approx(1.2533 * 0.01 / 5)
    assert abs(answer.latency_us - 100.0) < 5 * answer.noise * 100.0
    with pytest.raises(InputError, match=r"^load: got 2"):
        device(2)

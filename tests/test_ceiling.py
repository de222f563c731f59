"""What is left to gain, and by what: never more promised to be out of reach than is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from brute import placements, random_problem
from timed import timed

import gemopt
from gemopt.bounds import lower_bound, spread_bound
from gemopt.compare import compare
from gemopt.profile import Profile
from gemopt.result import Ceiling
from gemopt.traces import Traces

NEVER = np.zeros(1, np.uint8)


@pytest.mark.parametrize("seed", range(60))
def test_no_copies_go_below_what_spreading_takes(seed: int) -> None:
    problem = random_problem(seed, spare=True)
    every = replace(problem, slots_per_rank=np.full(problem.num_ranks, problem.num_experts))
    best = min(value for value, _ in placements(every))
    assert spread_bound(problem, NEVER) <= best * (1 + 1e-12)
    assert spread_bound(problem, NEVER) <= lower_bound(problem) * (1 + 1e-9) + 1e-9
    assert spread_bound(problem, np.ones(1, np.uint8)) <= spread_bound(problem, NEVER)


def test_spreading_is_told_exactly_where_it_is_plain() -> None:
    """Equal ranks and straight lines: everything in equal parts."""
    result = gemopt.solve(profile(1.0), traces(), patience=2, time_limit=60)
    loads_TL = traces().counts.sum(axis=2)
    assert result.ceiling is not None and result.objective_us is not None
    assert result.ceiling.spread_us == pytest.approx(float((20 + np.ceil(loads_TL / 3)).sum()), rel=1e-6)
    assert result.ceiling.objective_us == pytest.approx(result.objective_us)
    assert result.bound_us == pytest.approx(result.ceiling.spread_us + result.ceiling.copies_us)
    assert "by solving on" in result.summary()


def test_parts_add_up_and_are_never_negative() -> None:
    whole = Ceiling.of(100.0, 120.0, 130.0)  # bounds above the objective by rounding
    assert (whole.unknown_us, whole.copies_us, whole.spread_us) == (0.0, 0.0, 100.0)
    some = Ceiling.of(100.0, 90.0, 60.0)
    assert (some.unknown_us, some.copies_us, some.spread_us) == (10.0, 30.0, 60.0)
    assert some.on(55.0, 30.0).lost_us == pytest.approx(5.0)  # 50 would have been the same ratio
    assert some.on(55.0, 30.0).summary(55.0).endswith("the change of traffic cost 9.1 %")
    assert some.on(45.0, 30.0).summary(45.0).endswith("cost nothing")


def test_traffic_that_turns_round_costs_and_steady_traffic_does_not() -> None:
    steady = np.random.default_rng(0).poisson(np.linspace(1, 60, 12), size=(80, 1, 12))
    turned = np.concatenate([steady[:40], steady[40:, :, ::-1].copy()])
    turned[40:] = np.roll(turned[40:], 5, axis=2)
    lost = []
    for counts in (steady, turned):
        row = compare(profile(2.0), Traces(counts=counts), solvers=["local-search"], patience=2, time_limit=60)[0]
        assert row.ceiling is not None and row.ceiling.lost_us is not None and row.holdout_us is not None
        lost.append(row.ceiling.lost_us / row.holdout_us)
    assert lost[1] > 0.02 > abs(lost[0])


def test_a_bound_that_time_cut_makes_traffic_look_no_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"solvers": ["linear"], "holdout": 0.5}
    whole = compare(profile(2.0), traces(), **options)[0].ceiling
    nothing_T = np.zeros(traces().num_steps // 2)  # as where no time is left for it
    monkeypatch.setattr("gemopt.solving.schedule.spread_bounds", lambda *_: nothing_T)
    assert compare(profile(2.0), traces(), **options)[0].ceiling == whole
    assert whole is not None and whole.spread_us > 0


def profile(slow: float) -> Profile:
    return timed((1.0, slow, 1.0), lambda n, factor: (20 + n) * factor, (0, 100, 1000))


def traces() -> Traces:
    return Traces(counts=np.random.default_rng(4).poisson(np.linspace(1, 20, 12), size=(30, 2, 12)))

"""CP-SAT: the hint by the solver's own log, rounding, reduction, limits."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import brute
import numpy as np
import pytest
from ortools.sat.python import cp_model

from gemopt.evaluate import objective
from gemopt.latency import ASSIGNMENTS, Curve, Latency, line
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers.base import Options
from gemopt.solvers.exact import cpsat, layer
from gemopt.solvers.exact.compact import Compact, num_literals
from gemopt.solvers.exact.cpsat import CpSat
from gemopt.solvers.exact.cpsat_formulation import CpSatFormulation, TickLine
from gemopt.solvers.exact.layer import Search
from gemopt.solvers.exact.milp import Milp
from gemopt.solvers.exact.reduction import representative_steps
from gemopt.solvers.exact.runs import STEEPEST, convex_runs, hull
from gemopt.solvers.search.packing import lpt_row


def staircase_problem(num_steps: int = 12, *, equal: bool = True) -> Problem:
    """8 experts on 4 ranks, tiles of 16 assignments, no two steps alike."""
    rng = np.random.default_rng(7)
    x = np.array([0, 16, 17, 32, 33, 48, 49, 64], dtype=float)
    y = np.array([20, 20, 30, 30, 41, 41, 50, 50], dtype=float)
    speeds = np.ones(4) if equal else np.array([1.0, 1.05, 0.9, 1.1])
    latencies = [Latency(((Curve(x, speed * y, 0.6),),)) for speed in speeds]
    return Problem.make(rng.multinomial(120, rng.dirichlet(np.ones(8)), size=num_steps), [ASSIGNMENTS], latencies)


@pytest.mark.parametrize("spare", [False, True])
def test_every_variable_has_a_hint_that_cpsat_calls_complete_and_feasible(spare: bool) -> None:
    accepted = 0
    for seed in range(30):
        problem = brute.random_problem(seed, spare=spare)
        search = Search.prepare(problem, Options.lasting(60), None, 1e9)
        if search.done:
            continue
        tick_us = cpsat.resolution(search)
        formulation = CpSatFormulation(search.compact, tick_us, cpsat.canonical_start(search))
        lines: list[str] = []
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.log_search_progress = True
        solver.parameters.log_to_stdout = False
        solver.log_callback = lines.append
        solver.solve(formulation.model)
        stated = [line for line in "\n".join(lines).splitlines() if line.startswith("The solution hint is ")]
        assert stated and all("is complete and is feasible." in line for line in stated), (seed, stated)
        ticks = float(stated[0].split("value is")[1].strip(" ."))
        lost = cpsat.RESOLUTION * abs(search.objective_us) + 1e-9
        said = search.compact.base_us + ticks * tick_us
        assert search.objective_us - lost <= said <= search.objective_us + 1e-9
        accepted += 1
    assert accepted >= 5


@pytest.mark.parametrize("resolution", [1e-1, 1e-3])
def test_a_coarse_resolution_never_lifts_the_bound(resolution: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpsat, "RESOLUTION", resolution)
    monkeypatch.setattr(layer, "timed_step_bounds", lambda problem, stop: (np.zeros(problem.num_steps), 0))
    for seed in range(50_000, 50_030):
        problem = brute.random_problem(seed)
        outcome = CpSat().solve(problem, Options.lasting(60), None)
        optimum = brute.optimum(problem)
        assert outcome.bound_us <= optimum + 1e-9 * max(1.0, abs(optimum)), seed
        assert objective(problem, outcome.row) >= optimum - 1e-9 * max(1.0, abs(optimum)), seed
        assert objective(problem, outcome.row) <= optimum + 1.01 * resolution * abs(optimum) + 1e-6 * abs(optimum), seed


def test_lines_in_ticks_are_never_above_and_lose_less_than_three() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        low = int(rng.integers(0, 50))
        high = low + int(rng.integers(0, 400))
        (x0, x1), (y0, y1) = sorted(rng.choice(np.arange(low, high + 2), 2, replace=False)), rng.uniform(0, 100, 2)
        scale = float(10 ** rng.uniform(-1, 5))
        ticks = TickLine.below((int(x0), y0), (int(x1), y1), low, high, scale)
        for load in range(low, high + 1):
            exact_value = (y0 + (y1 - y0) / (x1 - x0) * (load - x0)) * scale
            assert exact_value - 3 < ticks.value(load) <= exact_value


def test_runs_are_the_clipped_curve_and_convex_and_leave_out_what_takes_too_long() -> None:
    rng = np.random.default_rng(4)
    for _ in range(300):
        curve = brute.random_curve(rng, 30, str(rng.choice(["straight", "convex", "staircase", "jagged"])))
        low = int(rng.integers(0, 20))
        high = low + int(rng.integers(0, 30))
        at_least = float(rng.choice([-np.inf, rng.uniform(0, 40)]))
        at_most = float(rng.choice([np.inf, max(at_least, 0.0) + rng.uniform(0, 40)]))
        runs = convex_runs(curve, low, high, at_least, at_most)
        held = [load for run in runs for load in range(run.low, run.high + 1)]
        assert held == [load for load in range(low, high + 1) if float(curve(load)) <= at_most]
        below = hull(runs) if runs else []
        for run in runs:
            slopes = [rise / length for length, rise in run.parts]
            assert all(later > earlier - 1e-9 for earlier, later in pairwise(slopes))
            for load in range(run.low, run.high + 1):
                wanted = max(float(curve(load)), at_least)
                assert run.value(load) == pytest.approx(wanted, rel=1e-9, abs=1e-9)
                assert np.interp(load, *zip(*below, strict=True)) <= wanted + 1e-9


def test_lines_are_not_drawn_on_far_beyond_what_the_curve_reaches() -> None:
    cliff = Curve(np.array([0.0, 1.0, 1e6]), np.array([100.0, 5.0, 90.0]), 0.0)
    assert [(run.low, run.high) for run in convex_runs(cliff, 0, 10**6)] == [(0, 1), (2, 10**6)]
    powers = Curve(np.array([0.0, 1, 2, 4, 8, 1024, 4096]), np.array([10.0, 11, 12.5, 16, 24, 3000, 13000]), 4.0)
    assert len(convex_runs(powers, 0, 5000, 15.5)) == 1
    for seed in range(200):
        curve = brute.random_curve(np.random.default_rng(seed), 10**5, "jagged")
        height = np.ptp(curve(np.append(curve.x[curve.x <= 10**5], 10**5)))
        for run in convex_runs(curve, 0, 10**5):
            for length, rise in run.parts:
                assert abs(rise) / length * (run.high - run.low) <= STEEPEST * height * (1 + 1e-9)


def test_same_seed_same_answer() -> None:
    problem = staircase_problem()
    first, second = (CpSat().solve(problem, Options.lasting(60, seed=3), None) for _ in range(2))
    assert (first.row == second.row).all()
    assert [i.objective_us for i in first.history] == [i.objective_us for i in second.history]


def test_reduction_says_so_and_claims_no_bound_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = staircase_problem(equal=False)
    optimum = CpSat().solve(problem, Options.lasting(60), None)
    assert optimum.stopped_by is StoppedBy.PROOF
    monkeypatch.setattr(CpSat, "coefficients_per_second", 30)
    warm_start = lpt_row(problem)
    outcome = CpSat().solve(problem, Options.lasting(60), warm_start)
    assert "weighted representatives of 12 distinct steps" in outcome.note
    assert outcome.stopped_by is not StoppedBy.PROOF
    best = objective(problem, optimum.row)
    assert outcome.bound_us < best <= objective(problem, outcome.row) <= objective(problem, warm_start)


def test_representatives_keep_the_weight_and_are_distinct_steps() -> None:
    problem = staircase_problem(40)
    for limit in (1, 7, 39, 40, 100):
        steps, weights = representative_steps(problem, limit)
        assert 1 <= len(steps) <= min(limit, 40) and len(set(steps.tolist())) == len(steps)
        assert weights.sum() == pytest.approx(problem.weights_T.sum())
    assert (representative_steps(problem, 40)[0] == np.arange(40)).all()


def test_interrupt_and_deadline_return_the_warm_start_or_better() -> None:
    problem = staircase_problem()
    warm_start = np.arange(8)
    before = objective(problem, warm_start)
    stopped = CpSat().solve(problem, Options.lasting(60, stop=lambda: True), warm_start)
    assert stopped.stopped_by is StoppedBy.INTERRUPT
    asked: list[int] = []
    amid = CpSat().solve(
        staircase_problem(60, equal=False), Options.lasting(60, stop=lambda: asked.append(1) or len(asked) > 6), None
    )
    assert amid.stopped_by is StoppedBy.INTERRUPT and 0 < amid.bound_us < amid.history[-1].objective_us
    late = CpSat().solve(problem, Options.lasting(-1), warm_start)
    assert late.stopped_by is StoppedBy.TIME_LIMIT
    for outcome in (stopped, late):
        assert objective(problem, outcome.row) <= before
        assert 0 < outcome.bound_us <= before


def test_gap_ends_the_search() -> None:
    problem = staircase_problem(equal=False)
    outcome = CpSat().solve(problem, Options.lasting(60, gap=0.5), None)
    assert outcome.stopped_by is StoppedBy.GAP


def test_steps_without_load_or_weight() -> None:
    latency = Latency(((Curve(np.array([0.0, 4.0]), np.array([3.0, 9.0]), 1.0),),))
    idle = Problem.make(np.zeros((3, 4), dtype=int), [ASSIGNMENTS], [latency] * 2)
    outcome = CpSat().solve(idle, Options.lasting(60), None)
    assert objective(idle, outcome.row) == pytest.approx(9.0) and outcome.stopped_by is StoppedBy.PROOF
    weightless = Problem.make([[1, 2, 3, 4]], [ASSIGNMENTS], [latency] * 2, weights_T=[0.0])
    outcome = CpSat().solve(weightless, Options.lasting(60), None)
    assert objective(weightless, outcome.row) == 0.0 and outcome.stopped_by is StoppedBy.PROOF


def test_stating_ends_with_the_time_however_many_ways_there_are_to_hold_copies() -> None:
    made = []

    class Counted(CpSatFormulation):
        def new(self, low: int, high: int, start: int, *, whole: bool = True) -> object:
            made.append(start)
            return super().new(low, high, start, whole=whole)

    problem = replace(staircase_problem(), slots_per_rank=np.full(4, 8))  # 80 ways to hold an expert or a copy
    search, asked = Search.prepare(problem, Options.lasting(60), None, 1e9), iter([False] * 3)
    with pytest.raises(TimeoutError, match="no time left to state"):
        Counted(search.compact, 1.0, cpsat.canonical_start(search), lambda: next(asked, True))
    assert len(made) == 3 * problem.num_ranks


def test_stating_the_order_of_equal_ranks_ends_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 experts on 128 equal ranks took 11 s to put in order."""
    ordered: list[object] = []
    monkeypatch.setattr(CpSatFormulation, "implies_any", lambda *given: ordered.append(given))
    late: list[bool] = []
    monkeypatch.setattr(CpSatFormulation, "_slots_are_not_exceeded", lambda formulation: late.append(True))
    problem = Problem.make([[4, 3, 2, 1]] * 2, [ASSIGNMENTS], [Latency(((line(1.0, 1.0),),))] * 4)
    search = Search.prepare(problem, Options.lasting(60), None, 1e9)
    with pytest.raises(TimeoutError, match="no time left to state"):
        CpSatFormulation(search.compact, 1.0, cpsat.canonical_start(search), lambda: bool(late))
    assert not ordered


@pytest.mark.parametrize("solver", [CpSat(), Milp()], ids=["cpsat", "milp"])
def test_what_is_too_large_for_the_time_is_not_even_prepared(
    monkeypatch: pytest.MonkeyPatch, solver: CpSat | Milp
) -> None:
    """64 experts on 64 ranks with a slot to spare each: 8.5 million literals of who holds what."""
    counts = np.random.default_rng(2).poisson(20, (3, 64))
    problem = Problem.make(counts, [ASSIGNMENTS], [Latency(((line(5.0, 1.0),),))] * 64, 2)
    assert num_literals(problem) == 64 * (64 * 65 // 2) * 64
    monkeypatch.setattr(Search, "prepare", None)  # not to be called
    warm = np.roll(lpt_row(problem), 2)
    for start in (None, warm):
        found = solver.solve(problem, Options.lasting(8.0), start)
        assert found.row is not None and (found.row == (lpt_row(problem) if start is None else warm)).all()
        assert found.start_us == found.history[-1].objective_us == objective(problem, found.row)
        assert not found.reached and found.stopped_by is StoppedBy.TIME_LIMIT and "state the formulation" in found.note
        assert found.own_bound_us is None and found.bound_us is None


def test_literals_are_those_of_the_formulation() -> None:
    problem = staircase_problem(2)
    for slots in (2, 3, 4):
        each = replace(problem, slots_per_rank=np.full(4, slots))
        compact = Compact.of(each, np.zeros(2), 1.0)
        keys = list(zip(compact.expert_Q.tolist(), compact.copies_Q.tolist(), compact.index_Q.tolist(), strict=True))
        most = min(4, 4 * slots - 8 + 1)
        assert keys == [(e, r, i) for e in range(8) for r in range(1, most + 1) for i in range(r)]
        assert num_literals(each) == len(keys) * 4

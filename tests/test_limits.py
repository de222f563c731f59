"""Limits: what is cut ends at once with a feasible answer and says so; what is not cut is as it would have been."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest
from timed import timed

import gemopt
from gemopt.bounds import spread_bounds, step_bounds, timed_step_bounds
from gemopt.compare import compare
from gemopt.evaluate import check, loads, objective
from gemopt.exceptions import InputError
from gemopt.latency import ACTIVE, ASSIGNMENTS, Curve, Latency, line
from gemopt.problem import Problem
from gemopt.profile import Profile
from gemopt.result import StoppedBy
from gemopt.solvers import get
from gemopt.solvers.base import Options
from gemopt.solvers.baselines.gem import relieve
from gemopt.solvers.search.copies import improve_copies
from gemopt.solvers.search.packing import lpt_row
from gemopt.solvers.search.shares import make_shares
from gemopt.solvers.search.state import make_costs, make_state, most_loaded
from gemopt.solvers.search.swaps import KICK_DRAWS, descend, iterate, total_cost
from gemopt.solvers.search.terms import free_terms
from gemopt.solving.layers import Layer
from gemopt.solving.schedule import Run
from gemopt.splits import even_shares
from gemopt.traces import Traces

RUNG = np.array([1], np.uint8)


def make(*, experts: int = 24, ranks: int = 4, steps: int = 60, slots: object = None, active: bool = False) -> Problem:
    rng = np.random.default_rng(3)
    counts = rng.poisson(rng.gamma(0.7, 9.0, experts) * rng.uniform(0.3, 1.7, (steps, 1)))
    factors = rng.uniform(0.8, 1.3, ranks)
    if active:
        latencies = [Latency(((line(9 * f, 0.5 * f), line(0.0, 2 * f)),)) for f in factors]
        return Problem.make(counts, (ASSIGNMENTS, ACTIVE), latencies, slots)
    stairs = [Latency(((Curve([0, 1, 16, 17, 48], [4 * f, 9 * f, 10 * f, 17 * f, 30 * f], f),),)) for f in factors]
    return Problem.make(counts, (ASSIGNMENTS,), stairs, slots)


def devices(ranks: int = 3) -> Profile:
    return timed(range(ranks), lambda n, g: (9.0 + n) * (1 + g / 5), (0, 8, 40, 90))


def traffic(*, steps: int = 20, layers: int = 4, experts: int = 9) -> Traces:
    return Traces(counts=np.random.default_rng(7).integers(0, 30, (steps, layers, experts)))


def forbidden(*_: object) -> None:
    raise AssertionError("there was no time for this")


@pytest.mark.parametrize("slots", [None, 7], ids=["just", "spare"])
@pytest.mark.parametrize("name", ["gem", "conflict", "local-search"])
def test_without_time_a_search_hands_on_a_greedy_row_and_says_so(
    monkeypatch: pytest.MonkeyPatch, name: str, slots: object
) -> None:
    for module in ("policies", "swaps"):  # each imported before the other's is replaced
        monkeypatch.setattr(f"gemopt.solvers.search.{module}.descend_all", forbidden)
    monkeypatch.setattr("gemopt.solvers.baselines.gem.relieve", forbidden)
    monkeypatch.setattr("gemopt.solvers.search.mapping.map_in_order", forbidden)
    monkeypatch.setattr("gemopt.solvers.baselines.conflict.cut_graph", forbidden)
    problem = make(slots=slots)
    outcome = get(name).solve(problem, Options(deadline=time.monotonic()), None)
    assert outcome.row is not None
    check(problem, outcome.row)
    assert not outcome.reached and outcome.stopped_by is StoppedBy.TIME_LIMIT and "LPT" in outcome.note
    assert objective(problem, outcome.row) <= objective(problem, lpt_row(problem))
    stopped = get(name).solve(problem, Options(deadline=np.inf, stop=lambda: True), None)
    assert stopped.stopped_by is StoppedBy.INTERRUPT and not stopped.reached


@pytest.mark.parametrize("active", [False, True], ids=["staircase", "roofline"])
def test_compiled_searches_end_at_once_when_the_flag_is_set(active: bool) -> None:
    problem = make(slots=7, active=active)
    costs, row, rng = make_costs(problem), lpt_row(problem), np.random.default_rng(0)
    state = make_state(problem, row, costs, RUNG)
    before, shares = total_cost(state), make_shares(problem)
    assert shares is not None
    assert descend(costs, state, np.ones(4, bool), True) == pytest.approx(before)
    relieve(costs, state, None)
    assert iterate(costs, state, rng.random((5, KICK_DRAWS)), before, row.copy(), np.zeros(2), 1.0) == before
    assert improve_copies(costs, state, shares, np.arange(24), True, free_terms(problem)) == 0
    assert (state.content == row).all() and total_cost(state) == before


def test_greedy_copies_are_made_by_the_deadline_or_while_a_start_may_be_made() -> None:
    problem = make(slots=7)
    search = get("local-search").solve
    rows = [
        search(problem, Options(deadline=-np.inf, start_by=by, stop=lambda stop=stop: stop), None).row
        for by, stop in ((-np.inf, False), (np.inf, False), (np.inf, True))
    ]
    assert all(row is not None for row in rows)
    assert [int((row >= 0).sum()) for row in rows if row is not None] == [24, 28, 24]


def test_a_search_stopped_in_the_middle_keeps_what_it_has() -> None:
    """The flag rings while compiled code runs: it ends with a feasible row that costs no more than its start."""
    problem = make(experts=128, ranks=4, steps=3000)
    for name in ("local-search", "gem"):
        looks = itertools.count()
        outcome = get(name).solve(problem, Options(deadline=np.inf, stop=lambda: next(looks) > 6), None)  # noqa: B023
        assert outcome.stopped_by is StoppedBy.INTERRUPT and outcome.row is not None
        check(problem, outcome.row)
        if name == "local-search":
            assert objective(problem, outcome.row) <= objective(problem, lpt_row(problem))


@pytest.mark.parametrize("slots", [None, 7], ids=["just", "spare"])
@pytest.mark.parametrize("name", ["local-search", "gem"])
def test_a_search_gone_on_with_is_as_if_never_cut(name: str, slots: object) -> None:
    problem, solver = make(slots=slots), get(name)
    whole = solver.solve(problem, Options(deadline=np.inf, patience=6), None)
    first = solver.solve(problem, Options(deadline=np.inf, patience=0), None)
    rest = solver.solve(problem, Options(deadline=np.inf, patience=6, begun=first.search), None)
    assert whole.row is not None and rest.row is not None
    assert (whole.row == rest.row).all()
    assert [point.objective_us for point in whole.history] == [point.objective_us for point in rest.history]
    nothing = solver.solve(problem, Options(deadline=time.monotonic(), patience=6), None)
    late = solver.solve(problem, Options(deadline=np.inf, patience=6, begun=nothing.search), None)
    assert late.reached and late.row is not None and (late.row == whole.row).all()


def test_a_cut_bound_is_a_bound() -> None:
    problem = make(steps=1200, active=True)
    full_T = step_bounds(problem)
    none_T, done = timed_step_bounds(problem, RUNG)
    assert done == 0 and (none_T > 0).all() and (none_T <= full_T).all()

    class Rings:
        """A flag that turns between two blocks."""

        looks = -1

        def __getitem__(self, _: int) -> bool:
            self.looks += 1
            return self.looks > 0

    from gemopt.bounds import simple

    real = simple._block_bounds
    try:
        simple._block_bounds = lambda problem, block, _: real(problem, block, np.zeros(1, np.uint8))
        some_T, done = timed_step_bounds(problem, Rings())  # type: ignore[arg-type]
    finally:
        simple._block_bounds = real
    assert 0 < done < problem.num_steps
    assert (some_T[:done] == full_T[:done]).all() and (some_T[done:] == none_T[done:]).all()


@pytest.mark.parametrize("slots", [None, 7], ids=["just", "spare"])
def test_a_bound_that_is_cut_at_once_is_that_of_fluid(slots: object) -> None:
    problem = make(steps=40, slots=slots)
    fluid_T, full_T = spread_bounds(problem, np.zeros(1, np.uint8)), step_bounds(problem)
    cut_T, done = timed_step_bounds(problem, RUNG, fluid_T)
    assert done == 0 and (cut_T >= fluid_T).all() and (cut_T <= full_T * (1 + 1e-9)).all()
    assert cut_T.sum() > timed_step_bounds(problem, RUNG)[0].sum()


def test_without_time_the_answer_is_no_worse_than_experts_in_order() -> None:
    """Where LPT errs: it puts 3 + 2 + 2 and 3 + 2 beside each other, the order of the experts 3 + 3 and 2 + 2 + 2."""
    samples = [{"assignments": n, "latency_us": 10.0 + n} for n in (0, 100, 1000)]
    profile = gemopt.Profile(devices=[{"rank": g, "samples": samples} for g in range(2)])
    traces = Traces(counts=np.tile(100 * np.array([3, 3, 0, 2, 2, 2]), (5, 2, 1)))
    in_order, lpt = (gemopt.solve(profile, traces, solver=name) for name in ("linear", "lpt"))
    found = gemopt.solve(profile, traces, solver="local-search", time_limit=1e-6)
    assert lpt.objective_us > in_order.objective_us == found.objective_us and found.change == 0
    assert any("experts in order" in note for note in found.notes)
    longer = gemopt.solve(profile, traces, solver="local-search", patience=3)
    assert longer.change == 0 and not any("no time" in note for note in longer.notes)


def test_a_search_that_goes_on_without_time_leaves_experts_in_order() -> None:
    """The search itself still stands at the worse LPT, whatever was answered; a later turn must not bring that back."""
    latencies = [Latency(((line(0.0, 1.0),),))] * 2
    layer = Layer(Problem.make(np.array([[3, 3, 0, 2, 2, 2]] * 5), (ASSIGNMENTS,), latencies), None, 0)
    run = Run(get("local-search"), [layer], time.monotonic(), 60.0, patience=3)
    run._start(layer, -np.inf)
    for _ in range(2):
        assert layer.outcome is not None
        assert layer.outcome.row is not None
        assert layer.outcome.history[-1].objective_us == objective(layer.problem, layer.outcome.row) == layer.base_us
        run._search_on(layer, run._options(layer, -np.inf))
    run._search_on(layer, run._options(layer, np.inf))
    assert not layer.outcome.note


def test_the_alarm_rings_at_the_deadline_and_when_stopped() -> None:
    with Options(deadline=time.monotonic()).alarm() as flag:
        assert flag[0] == 1
    asked = threading.Event()
    with Options(deadline=np.inf, stop=asked.is_set).alarm() as flag:
        assert flag[0] == 0
        asked.set()
        while flag[0] == 0:
            time.sleep(0.001)
    with Options(deadline=time.monotonic() + 0.01).alarm() as flag:
        while flag[0] == 0:
            time.sleep(0.001)


@pytest.mark.parametrize("slots", [None, 7])
def test_loads_are_sums_over_the_slots(slots: object) -> None:
    problem = make(slots=slots, active=True)
    row = get("eplb").solve(problem, Options(deadline=np.inf), None).row
    assert row is not None
    shares_TP = even_shares(problem.counts_TE, row)
    for f, feature in enumerate(problem.features):
        for rank in range(4):
            expected = feature.of(shares_TP)[:, problem.rank_of_slot == rank].sum(axis=1)
            assert (loads(problem, row)[:, rank, f] == expected).all()


@pytest.mark.parametrize("name", ["linear", "eplb", "lpt", "conflict", "gem", "local-search", "auto", "cpsat", "milp"])
def test_a_limit_that_is_over_at_once_still_gives_a_placement(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for path in ("cpsat:CpSat", "milp:Milp"):
        module, solver = path.split(":")
        monkeypatch.setattr(f"gemopt.solvers.exact.{module}.{solver}.solve", forbidden)
    result = gemopt.solve(devices(), traffic(), solver=name, time_limit=1e-6)
    assert result.placement is not None and result.change is not None
    searching = name in ("conflict", "gem", "local-search", "auto", "cpsat", "milp")
    assert all(layer.reached is not searching for layer in result.per_layer)
    assert any("4 of 4 layers cut before the search began" in note for note in result.notes) is searching
    if name in ("cpsat", "milp"):
        assert all(layer.start_us == pytest.approx(layer.objective_us) for layer in result.per_layer)
        assert all("no time left to run" in layer.note for layer in result.per_layer)


def test_the_change_is_against_contiguous_placement() -> None:
    given, profile = traffic(), devices()
    linear = gemopt.solve(profile, given, solver="linear")
    found = gemopt.solve(profile, given, solver="lpt")
    assert linear.change == 0 and linear.objective_us is not None and found.objective_us is not None
    assert found.change == pytest.approx(found.objective_us / linear.objective_us - 1)
    assert f"{100 * (found.change or 0):+.1f} % against contiguous placement" in found.summary()


def test_one_rank_is_refused_unless_asked_for() -> None:
    with pytest.raises(InputError, match="at least 2"):
        gemopt.solve(devices(1), traffic(), solver="lpt")
    with pytest.raises(InputError, match="at least 2"):
        compare(devices(1), traffic(), solvers=["lpt"])
    assert gemopt.solve(devices(1), traffic(), solver="lpt", allow_one_rank=True).gap == pytest.approx(0, abs=1e-6)


def test_tables_reach_what_a_rank_may_hold_and_one_expert_more() -> None:
    """The search looks up slopes above the loads that there are; what lies beyond a table is another rank's."""
    counts = np.array([[0, 900, 0, 3], [40, 0, 70, 0]])
    curve = Curve([0, 1, 16, 17, 48], [4.0, 9, 10, 17, 30], 1.0)
    steep = [Latency(((Curve(curve.x, curve.y * factor, factor),),)) for factor in (1.0, 2.0, 1.0)]
    problem = Problem.make(counts, (ASSIGNMENTS,), steep, [1, 2, 1])
    assert most_loaded(problem) >= 1800  # 900 on a rank of one slot, and as much again
    costs = make_costs(problem)
    reach = int(most_loaded(problem)[0])
    for rank, latency in enumerate(steep):
        known = costs.tables[costs.offsets[rank, 0, 0] :][: reach + 1]
        np.testing.assert_allclose(known, latency([np.arange(reach + 1)]), rtol=1e-6)
    assert costs.offsets[0, 0, 0] == costs.offsets[2, 0, 0] != costs.offsets[1, 0, 0]  # equal ranks share theirs

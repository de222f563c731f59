"""Brute force equals CP-SAT equals MILP with HiGHS equals MILP with CBC, on tiny problems of every kind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import brute
import numpy as np
import pytest

from gemopt.evaluate import check, objective
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers.base import Options, Solver
from gemopt.solvers.exact import layer
from gemopt.solvers.exact.compact import Compact, merged
from gemopt.solvers.exact.cpsat import CpSat
from gemopt.solvers.exact.layer import Search
from gemopt.solvers.exact.milp import Milp, read_state, write_request
from gemopt.solvers.search.packing import lpt_row

CLOSE = 1e-6


def without_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the formulations prove everything by themselves."""
    monkeypatch.setattr(
        layer, "timed_step_bounds", lambda problem, stop: (np.zeros(problem.num_steps), problem.num_steps)
    )


def below(bound_us: float, optimum_us: float) -> bool:
    return bound_us <= optimum_us + 1e-9 * max(1.0, abs(optimum_us))


@pytest.mark.parametrize("alone", [False, True], ids=["with step bounds", "without"])
def test_cpsat_equals_brute_force(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if alone:
        without_bounds(monkeypatch)
    for seed in range(10_000 * alone, 10_000 * alone + 100 + 100 * alone):
        problem = brute.random_problem(seed)
        outcome = CpSat().solve(problem, Options.lasting(60), None)
        check(problem, outcome.row)
        optimum = brute.optimum(problem)
        assert objective(problem, outcome.row) == pytest.approx(optimum, rel=CLOSE, abs=1e-9), seed
        assert below(outcome.bound_us, optimum), seed
        assert outcome.stopped_by is StoppedBy.PROOF, seed


def solve_together(problems: list[Problem], backend: str, folder: Path) -> list[Search]:
    """Solve many problems in one child process."""
    searches = []
    for index, problem in enumerate(problems):
        search = Search.prepare(problem, Options.lasting(600), None, np.inf)
        searches.append(search)
        (folder / str(index)).mkdir()
        write_request(folder / str(index), search, backend=backend)
    command = [sys.executable, "-P", "-m", "gemopt.solvers.exact.milp_worker"]
    subprocess.run([*command, *(str(folder / str(i)) for i in range(len(problems)))], check=True, capture_output=True)
    for index, search in enumerate(searches):
        assert read_state(folder / str(index), search)["proven"], index
        assert read_state(folder / str(index), search)["backend"] == backend
    return searches


@pytest.mark.parametrize("alone", [False, True], ids=["with step bounds", "without"])
@pytest.mark.parametrize(("backend", "cases"), [("highs", 80), ("cbc", 30)])
def test_milp_equals_brute_force(
    backend: str, cases: int, alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if alone:
        without_bounds(monkeypatch)
    seeds = range(20_000 + 10_000 * alone, 20_000 + 10_000 * alone + cases)
    problems = [brute.random_problem(seed) for seed in seeds]
    for seed, problem, search in zip(seeds, problems, solve_together(problems, backend, tmp_path), strict=True):
        optimum = brute.optimum(problem)
        check(problem, search.row)
        assert objective(problem, search.row) == pytest.approx(optimum, rel=CLOSE, abs=1e-9), seed
        assert below(search.bound_us, optimum), seed
        assert search.proof() is StoppedBy.PROOF, seed


@pytest.mark.parametrize("spare", [True, False])
def test_brute_force_counts_as_evaluate_does(spare: bool) -> None:
    """The reference and `evaluate` are two programs; they must agree on any row."""
    for seed in range(40):
        problem = brute.random_problem(seed, spare=spare)
        row = lpt_row(problem)
        ranks_E = tuple((int(problem.rank_of_slot[row == expert][0]),) for expert in range(problem.num_experts))
        assert objective(problem, row) == pytest.approx(brute.cost(problem, ranks_E), rel=1e-12)


@pytest.mark.parametrize("solver", [CpSat(), Milp("highs"), Milp("cbc")], ids=["cpsat", "highs", "cbc"])
def test_copies_are_used_where_they_pay(solver: Solver) -> None:
    """One hot expert and a spare slot: its even split halves the makespan."""
    problem = Problem.make([[9, 1, 1]], brute.random_problem(0).features[:1], _straight(2), [2, 2])
    outcome = solver.solve(problem, Options.lasting(60), None)
    assert np.bincount(outcome.row[outcome.row >= 0]).tolist() == [2, 1, 1]
    assert objective(problem, outcome.row) == brute.optimum(problem)
    assert outcome.stopped_by is StoppedBy.PROOF


def _straight(num_ranks: int) -> list[object]:
    return [brute.Latency(((brute.line(1.0, 2.0),),)) for _ in range(num_ranks)]


def test_equal_ranks_may_be_relabelled() -> None:
    """Relabelling ranks with their slots changes neither the optimum nor what is proven."""
    for seed in range(10):
        problem = brute.random_problem(seed, spare=False)
        rng = np.random.default_rng(seed)
        order = rng.permutation(problem.num_ranks)
        other = Problem.make(
            problem.counts_TE,
            problem.features,
            [problem.latencies[g] for g in order],
            problem.slots_per_rank[order],
            problem.weights_T,
        )
        first, second = (CpSat().solve(p, Options.lasting(60), None) for p in (problem, other))
        assert objective(problem, first.row) == pytest.approx(objective(other, second.row), rel=CLOSE)
        assert first.stopped_by is second.stopped_by is StoppedBy.PROOF


def test_canonical_changes_no_objective_and_is_a_fixed_point() -> None:
    for seed in range(60):
        problem = merged(brute.random_problem(seed, spare=False))
        compact = Compact.of(problem, np.zeros(problem.num_steps), objective(problem, lpt_row(problem)))
        held = compact.held(lpt_row(problem))
        canonical = compact.canonical(held)
        assert (compact.canonical(canonical) == canonical).all()
        assert objective(problem, compact.row(canonical)) == pytest.approx(objective(problem, lpt_row(problem)))
        for earlier, later in compact.ordered_pairs:
            place = np.append(np.argsort(compact.order_E), problem.num_experts)
            first = [place[np.append(compact.expert_Q[canonical[:, g]], -1)].min() for g in (earlier, later)]
            assert first[0] <= first[1]


def open_search() -> Search:
    """A search that the simple bounds leave open, from a start that is not optimal."""
    for seed in range(400):
        problem = brute.random_problem(seed, spare=False)
        search = Search.prepare(problem, Options.lasting(60), lpt_row(problem), np.inf)
        best = brute.optimum(problem)
        if search.known_us * 1.001 < best < search.objective_us * 0.99:
            return search
    raise AssertionError("no such problem")


def test_a_bound_that_a_placement_refutes_is_not_used() -> None:
    search = open_search()
    claimed = search.objective_us * 0.999
    search.offer_bound(claimed)
    said = search.outcome(search.proof(), "solver")
    assert said.bound_us == said.own_bound_us == claimed
    assert said.note == "solver; the bound is the solver's word"
    better = CpSat().solve(search.problem, Options.lasting(60), None).row
    search.offer_row(better)
    refuted = search.outcome(search.proof(), "solver")
    assert refuted.own_bound_us is None
    assert refuted.bound_us == search.known_us < claimed
    assert "claimed a bound of" in refuted.note and "not used" in refuted.note
    assert refuted.stopped_by is not StoppedBy.PROOF
    assert all(point.bound_us == search.known_us for point in refuted.history)


def test_a_row_that_does_not_fit_is_dropped() -> None:
    search = open_search()
    before = search.row.copy()
    search.offer_row(np.full_like(before, -1))
    search.offer_row(np.zeros_like(before))
    assert (search.row == before).all()


def test_an_outcome_says_what_the_solver_added_to_its_start() -> None:
    search = open_search()
    solved = CpSat().solve(search.problem, Options.lasting(60), lpt_row(search.problem))
    assert solved.reached and solved.start_us == search.start_us > objective(search.problem, solved.row)
    assert solved.stated_steps == solved.distinct_steps == search.problem.num_steps
    assert solved.own_bound_us == pytest.approx(objective(search.problem, solved.row), rel=CLOSE)
    late = CpSat().solve(search.problem, Options.lasting(-1), lpt_row(search.problem))
    assert not late.reached and late.own_bound_us is None and late.start_us == search.start_us


def test_milp_claims_no_bound_where_its_tolerances_do_not_keep_loads_apart() -> None:
    latencies = [brute.Latency(((brute.Curve(np.array([0.0, 1e8, 2e8]), np.array([1.0, 5, 7]), 0.0),),))] * 2
    counts = [[10**8, 9 * 10**7, 3 * 10**7, 10**7]]
    problem = Problem.make(counts, brute.random_problem(0).features[:1], latencies)
    outcome = Milp("highs").solve(problem, Options.lasting(60), np.array([0, 1, 2, 3]))
    assert outcome.own_bound_us is None and "no bound of its own" in outcome.note
    assert objective(problem, outcome.row) == pytest.approx(brute.optimum(problem))


def test_arrays_survive_the_file(tmp_path: Path) -> None:
    problem = merged(brute.random_problem(5, spare=True))
    compact = Compact.of(problem, np.zeros(problem.num_steps), objective(problem, lpt_row(problem)))
    compact.save(tmp_path / "compact.npz")
    loaded = Compact.load(tmp_path / "compact.npz")
    for t in range(compact.num_steps):
        for g in range(compact.num_ranks):
            assert repr(loaded.terms(t, g)) == repr(compact.terms(t, g))
    assert (loaded.held(lpt_row(problem)) == compact.held(lpt_row(problem))).all()

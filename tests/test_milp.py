"""MILP: the child process, warm starts by the solvers' own logs, bounds read from a log, limits."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gemopt.evaluate import objective
from gemopt.exceptions import SolverError
from gemopt.latency import ACTIVE, ASSIGNMENTS, Curve, Latency, line
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers.base import Options
from gemopt.solvers.exact import milp
from gemopt.solvers.exact.cpsat import CpSat
from gemopt.solvers.exact.layer import Search
from gemopt.solvers.exact.milp import NAMES, Milp, read_state, write_request
from gemopt.solvers.exact.milp_worker import cbc_bound


def roofline_problem(num_experts: int = 8, num_steps: int = 10) -> Problem:
    """Ranks that differ, two features."""
    rng = np.random.default_rng(11)
    counts = rng.multinomial(60, rng.dirichlet(np.ones(num_experts)), size=num_steps)
    latencies = [
        Latency(((line(30 * s, 0.2 * s), line(0, 6 * s)), (line(20 * s, s), line(0, s)))) for s in (1.0, 1.1, 0.95, 1.2)
    ]
    return Problem.make(counts, [ASSIGNMENTS, ACTIVE], latencies)


def jagged_problem() -> Problem:
    rng = np.random.default_rng(12)
    curve = Curve(np.array([0.0, 10, 11, 20, 25, 40]), np.array([5.0, 9, 14, 12, 20, 22]), 0.5)
    return Problem.make(rng.multinomial(60, np.ones(6) / 6, size=3), [ASSIGNMENTS], [Latency(((curve,),))] * 3)


@pytest.mark.parametrize("backend", ["highs", "cbc"])
def test_the_warm_start_is_accepted_with_its_true_objective(backend: str, tmp_path: Path) -> None:
    problems = [roofline_problem(), jagged_problem()]
    searches = []
    for index, problem in enumerate(problems):
        searches.append(Search.prepare(problem, Options.lasting(60), np.arange(problem.num_experts), 1e9))
        (tmp_path / str(index)).mkdir()
        write_request(tmp_path / str(index), searches[-1], backend=backend)
    folders = [str(tmp_path / str(index)) for index in range(len(problems))]
    subprocess.run(
        [sys.executable, "-m", "gemopt.solvers.exact.milp_worker", *folders], check=True, capture_output=True
    )
    for folder, search, problem in zip(folders, searches, problems, strict=True):
        log = (Path(folder) / "solver.log").read_text()
        said = {
            "highs": "MIP start solution is feasible[,:] objective value is",  # a colon since 1.16
            "cbc": "MIPStart provided solution with cost",
        }
        lines = [text for text in log.splitlines() if re.search(said[backend], text)]
        value = float(lines[0].split()[-1])
        base_us, unit_us, _ = json.loads((Path(folder) / "state.json").read_text())["scale"]
        assert base_us + value * unit_us == pytest.approx(search.start_us, rel=1e-6)
        assert read_state(Path(folder), search)["proven"]
        assert search.objective_us <= objective(problem, np.arange(problem.num_experts))


@pytest.mark.parametrize("backend", ["highs", "cbc"])
def test_agrees_with_cpsat_where_brute_force_is_out_of_reach(backend: str) -> None:
    problem = roofline_problem()
    ours, theirs = (solver.solve(problem, Options.lasting(60), None) for solver in (Milp(backend), CpSat()))
    assert ours.stopped_by is theirs.stopped_by is StoppedBy.PROOF
    assert objective(problem, ours.row) == pytest.approx(objective(problem, theirs.row), rel=2e-6)
    assert ours.bound_us <= objective(problem, theirs.row)
    assert ours.note.startswith(f"solved by {NAMES[backend]}")


def test_same_seed_same_answer() -> None:
    problem = roofline_problem(num_steps=4)
    first, second = (Milp().solve(problem, Options.lasting(60, seed=5), None) for _ in range(2))
    assert (first.row == second.row).all()


@pytest.mark.parametrize("backend", ["highs", "cbc"])
def test_a_child_that_is_ended_leaves_its_incumbent_and_a_valid_bound(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline is far away for the child, which is killed as soon as it has reported anything."""
    problem = roofline_problem(16, 120)
    warm_start = np.arange(16)
    seen: list[int] = []

    def stop() -> bool:
        return len(seen) > 3

    def count(folder: Path, search: Search) -> dict[str, object]:
        state = read_state(folder, search)
        seen.extend([1] * bool(state.get("rows") or (folder / "solver.log").exists()))
        return state

    monkeypatch.setattr(milp, "read_state", count)
    monkeypatch.setattr(milp, "_changed", lambda folder: time.monotonic())
    monkeypatch.setattr(Milp, "coefficients_per_second", 1e9)
    outcome = Milp(backend).solve(problem, Options.lasting(300, stop=stop), warm_start)
    assert outcome.stopped_by is StoppedBy.INTERRUPT
    assert outcome.bound_us < objective(problem, outcome.row) <= objective(problem, warm_start)


def test_no_time_returns_the_warm_start() -> None:
    problem = roofline_problem()
    outcome = Milp().solve(problem, Options.lasting(-1), np.arange(8))
    assert outcome.stopped_by is StoppedBy.TIME_LIMIT
    assert (outcome.row == np.arange(8)).all()
    assert 0 < outcome.bound_us < objective(problem, outcome.row)


def test_a_child_that_dies_is_an_error_with_its_last_words() -> None:
    with pytest.raises(SolverError, match=r"child process ended with 1: KeyError: 'gurobi'"):
        Milp("gurobi").solve(roofline_problem(), Options.lasting(60), None)


SOLVES = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("test_milp", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.Milp.coefficients_per_second = 1e9
module.Milp(sys.argv[2]).solve(module.roofline_problem(16, 120), module.Options.lasting(600), None)
"""


@pytest.mark.parametrize(("backend", "number"), [("highs", signal.SIGTERM), ("cbc", signal.SIGKILL)])
def test_children_end_with_their_parent_whatever_ends_it_and_leave_no_folder(
    backend: str, number: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", SOLVES, __file__, backend]
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path)}) as parent:
        wait_for(lambda: bool(list(tmp_path.glob("*/solver.log"))))
        group = int(next(tmp_path.glob("*/pid")).read_text())
        os.killpg(group, 0)  # it lives
        parent.send_signal(number)
    wait_for(lambda: not list(tmp_path.iterdir()))
    wait_for(lambda: not alive(group))


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


FINISHED = "Cbc0010I After 0 nodes, 1 on tree, 284.7 best solution, best possible 278.92638 (0.03 seconds)\n"


@pytest.mark.parametrize(
    ("log", "bound"),
    [
        ("", -math.inf),
        (FINISHED, 278.926375),
        (
            FINISHED + "Cbc0010I After 9 nodes, 3 on tree, 284.7 best solution, best possible 279.5 (1 seconds)\n",
            279.45,
        ),
        ("Cbc0010I After 0 nodes, 1 on tree, 1e+50 best solution, best possible 1e+50 (0.03 seconds)\n", -math.inf),
        (FINISHED + "Result - Optimal solution found\n\nObjective value:                284.69728432\n", 284.697284315),
        (
            "Result - Optimal solution found (within gap tolerance)\n\nObjective value:    290.0\n"
            "Lower bound:                    284.697\n",
            284.6965,
        ),
        ("Result - Stopped on time limit\n\nObjective value: 290.5\nLower bound:       270.125\n", 270.1245),
    ],
)
def test_bound_from_a_log_of_cbc(log: str, bound: float) -> None:
    assert cbc_bound(log) == pytest.approx(bound, rel=1e-12)


def test_highs_and_ortools_can_both_be_used_by_one_program() -> None:
    """MILP keeps PuLP, and with it highspy, out of this process."""
    Milp("highs").solve(jagged_problem(), Options.lasting(60), None)
    assert "pulp" not in sys.modules and "highspy" not in sys.modules
    assert CpSat().solve(jagged_problem(), Options.lasting(60), None).stopped_by is StoppedBy.PROOF

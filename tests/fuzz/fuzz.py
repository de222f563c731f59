"""Bounds and solvers against trying every placement: `python tests/fuzz/fuzz.py --solver highs --n 1000 --seed 0`.

Every bound is at most the optimum, every row feasible and worth what is said, none better than the optimum, no answer
worse than its warm start, and what is called optimal is so within the tolerance. Prints one line per fault, then a
table row; exits with 1 when there was any fault.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from fuzz_bounds import bound_faults, pair_value
from fuzz_cases import random_problem, random_row
from fuzz_reference import Optimum, feasible, objective, optimum

from gemopt.bounds import step_bounds
from gemopt.exceptions import UnsupportedError
from gemopt.problem import Problem
from gemopt.result import OPTIMALITY_TOLERANCE, StoppedBy
from gemopt.solvers import get, that_can
from gemopt.solvers.base import Options, Outcome, Row, require

EXACT = ("branch", "columns", "cpsat", "highs", "cbc")
SIMPLE = ("linear", "round-robin", "lpt", "eplb", "eplb-hierarchical", "conflict", "gem", "local-search")
CLOSE = 1e-9
BATCH = 50
SECONDS = 600.0  # far more than a tiny problem takes: nothing here depends on how busy the machine is


@dataclass
class Tally:
    """What was tried, what reached a solver, what was proven, and every fault in words."""

    tried: int = 0
    reached: int = 0
    proven: int = 0
    faults: list[str] = field(default_factory=list)


def faults(problem: Problem, best: Optimum, outcome: Outcome, warm_start: Row | None) -> Iterator[str]:
    """What is wrong with an answer."""
    low = best.objective_us
    if outcome.row is None or not feasible(problem, outcome.row):
        yield f"no feasible row: {outcome.row}"
        return
    value = objective(problem, outcome.row)
    if value < low * (1 - CLOSE):
        yield f"worth {value!r}, below the optimum {low!r} of the brute force"
    if outcome.history and abs(outcome.history[-1].objective_us - value) > CLOSE * value:
        yield f"history ends at {outcome.history[-1].objective_us!r}, the row is worth {value!r}"
    if warm_start is not None and value > objective(problem, warm_start) * (1 + CLOSE):
        yield f"worth {value!r}, worse than the warm start"
    for name, bound in (("bound", outcome.bound_us), ("the solver's own bound", outcome.own_bound_us)):
        if bound is not None and bound > low * (1 + CLOSE):
            yield f"{name} {bound!r} above the optimum {low!r} ({bound / low - 1:.1e})"
    if "not used" in outcome.note or "calls the formulation" in outcome.note:
        yield outcome.note
    if proven(outcome) and value > low * (1 + 1.001 * OPTIMALITY_TOLERANCE):
        yield f"called optimal at {value!r}, the optimum is {low!r} ({value / low - 1:.1e})"


def proven(outcome: Outcome) -> bool:
    """Whether the answer counts as optimal."""
    return outcome.stopped_by is StoppedBy.PROOF


def warm_start_of(seed: int, problem: Problem) -> Row | None:
    """A random feasible row for every other seed."""
    return random_row(np.random.default_rng([seed, 1]), problem) if seed % 2 else None


def options_of(seed: int) -> Options:
    """Patient enough for a tiny problem."""
    return Options.lasting(SECONDS, seed=seed % 7, patience=3)


def fuzz_bounds(seeds: range, tally: Tally) -> None:
    """Bounds alone."""
    for seed in seeds:
        problem = random_problem(seed)
        tally.tried += 1
        best = optimum(problem)
        found = [*bound_faults(problem, best.objective_us, best.makespan_T, seed), *_pair_faults(problem, seed)]
        tally.faults += [f"seed {seed}: {fault}" for fault in found]


def _pair_faults(problem: Problem, seed: int) -> Iterator[str]:
    """What cuts a branch and bound, against the worth of a placement."""
    row = random_row(np.random.default_rng([seed, 4]), problem)
    if problem.spare_slots:
        return
    ranks_E = problem.rank_of_slot[np.argsort(row)]
    said, worth = pair_value(problem, step_bounds(problem), ranks_E, seed), objective(problem, row)
    if said > worth * (1 + CLOSE):
        yield f"pair costs of {said!r} for a placement of {worth!r}"


def fuzz_one(name: str, seeds: range, tally: Tally) -> None:
    """A solver that runs in this process."""
    solver = get(name)
    for seed in seeds:
        problem = random_problem(seed)
        warm = warm_start_of(seed, problem) if solver.supports.improves else None
        try:
            require(solver, problem, that_can)
            outcome = solver.solve(problem, options_of(seed), warm)
        except UnsupportedError:  # refused in words: slots that differ, or counts too large for the search
            continue
        _judge(seed, problem, outcome, warm, tally)


def _judge(seed: int, problem: Problem, outcome: Outcome, warm: Row | None, tally: Tally) -> None:
    tally.tried += 1
    tally.reached += outcome.reached and (outcome.stated_steps or outcome.searched_nodes) is not None
    tally.proven += proven(outcome)
    found = list(faults(problem, optimum(problem), outcome, warm))
    tally.faults += [f"seed {seed}: {fault}" for fault in found]


def fuzz_milp(backend: str, seeds: range, tally: Tally) -> None:
    """MILP: as many problems to a child as are worth its start; a second child for what a better start has changed."""
    from gemopt.solvers.exact.layer import Search

    for first in range(seeds.start, seeds.stop, BATCH):
        some = range(first, min(first + BATCH, seeds.stop))
        problems = [random_problem(seed) for seed in some]
        warms = [warm_start_of(seed, problem) for seed, problem in zip(some, problems, strict=True)]
        searches = [Search.prepare(p, options_of(s), w, np.inf) for s, p, w in zip(some, problems, warms, strict=True)]
        outcomes = [search.ended() for search in searches]
        opened = [i for i, outcome in enumerate(outcomes) if outcome is None]
        while opened:
            solved = _child(backend, [searches[i] for i in opened])
            outcomes = [solved.pop(0) if i in opened else outcome for i, outcome in enumerate(outcomes)]
            opened = [i for i in opened if not proven(outcomes[i]) and searches[i].restate()]  # type: ignore[arg-type]
        for seed, problem, outcome, warm in zip(some, problems, outcomes, warms, strict=True):
            assert outcome is not None
            _judge(seed, problem, outcome, warm, tally)


def _child(backend: str, searches: list) -> list[Outcome]:  # type: ignore[type-arg]
    """Solve some problems in one child process."""
    from gemopt.solvers.exact.milp import outcome_of, write_request

    with tempfile.TemporaryDirectory(prefix="gemopt-fuzz-") as name:
        folders = [Path(name) / str(index) for index in range(len(searches))]
        for folder, search in zip(folders, searches, strict=True):
            folder.mkdir()
            search.options.deadline = time.monotonic() + SECONDS * len(searches)
            write_request(folder, search, backend=backend)
        command = [sys.executable, "-P", "-m", "gemopt.solvers.exact.milp_worker", *map(str, folders)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return [outcome_of(folder, search, finished=True) for folder, search in zip(folders, searches, strict=True)]


def fuzz(name: str, seeds: range) -> Tally:
    """Try some seeds with the bounds or with one solver."""
    tally = Tally()
    if name == "bounds":
        fuzz_bounds(seeds, tally)
    elif name in ("highs", "cbc"):
        fuzz_milp(name, seeds, tally)
    else:
        fuzz_one(name, seeds, tally)
    return tally


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solver", default="bounds", choices=["bounds", *SIMPLE, "auto", *EXACT])
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=np.inf, help="stop after about so long")
    given = parser.parse_args()
    begin, total, seed = time.monotonic(), Tally(), given.seed
    while seed < given.seed + given.n and time.monotonic() < begin + given.seconds:
        seeds = range(seed, min(seed + BATCH, given.seed + given.n))
        tally = fuzz(given.solver, seeds)
        for fault in tally.faults:
            print(fault, flush=True)
        seed = seeds.stop
        total = Tally(
            total.tried + tally.tried,
            total.reached + tally.reached,
            total.proven + tally.proven,
            total.faults + tally.faults,
        )
    took = time.monotonic() - begin
    print(
        f"| {given.solver} | {given.seed} to {seed - 1} | {total.tried} | {total.reached} | {total.proven} | "
        f"{len(total.faults)} | {took:.0f} |"
    )
    sys.exit(bool(total.faults))


if __name__ == "__main__":
    main()

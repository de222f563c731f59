"""The lowest versions: those of .ci/lowest.txt are those of pyproject.toml, and with them every solver works.

`.ci/packages` runs this file in an environment that has them.
"""

from __future__ import annotations

import re
import tomllib
from itertools import permutations
from pathlib import Path

import pytest
from cli_inputs import profile, traces

import gemopt
from gemopt import Placement
from gemopt.result import Status
from gemopt.solvers import names

ROOT = Path(__file__).resolve().parents[1]
TESTED = ("cluster", "exact", "report", "tables", "watch", "yaml")
PROVE = {"auto", "branch", "columns", "cpsat", "milp"}


def test_the_lowest_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    runners = [line for line in extras["dev"] if re.match(r"(pytest|hypothesis)>", line)]
    asked = [line.split(">=") for line in [*project["dependencies"], *runners, *(x for e in TESTED for x in extras[e])]]
    lines = [line.split("==") for line in (ROOT / ".ci" / "lowest.txt").read_text().splitlines() if line[0] != "#"]
    pinned = dict(lines)
    for name, least in asked:
        assert re.fullmatch(rf"{re.escape(least)}(\.\d+)*", pinned[name]), f"{name}: {pinned[name]}, not {least}"


@pytest.mark.parametrize("name", names())
def test_every_solver_on_a_tiny_case(name: str) -> None:
    measured, routed = profile(), traces(8, 1, 4)
    rows = permutations(range(4))
    every = [Placement(physical_to_logical=[row], slots_per_rank=[2, 2], num_experts=4) for row in rows]
    best = min(gemopt.evaluate(each, measured, routed).objective_us for each in every)
    result = gemopt.solve(measured, routed, solver=name, time_limit=60, patience=1, threads=1)
    assert result.placement is not None
    found = gemopt.evaluate(result.placement, measured, routed).objective_us
    assert found == pytest.approx(result.objective_us)
    assert found >= best * (1 - 1e-9)
    if name in PROVE:
        assert result.status is Status.OPTIMAL
        assert found == pytest.approx(best, rel=1e-6)

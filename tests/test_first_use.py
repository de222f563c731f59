"""What is loaded or compiled on first use is there before the time runs."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemopt.latency import ASSIGNMENTS, Latency, line
from gemopt.layer_rules import Demand, LayerRules
from gemopt.links import Exchange, Links
from gemopt.problem import Problem
from gemopt.solvers import get
from gemopt.solving.first_use import LOOK_S, NOTICE, ready
from gemopt.solving.turns import least_s
from gemopt.traces import Traces
from gemopt.words import Voice

CHILD = """
import sys, gemopt
from importlib import import_module
from cli_inputs import profile, traces
from gemopt.solvers.exact import step_kernels
from gemopt.solvers.search import spread_changes

def known():
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("gemopt.")]
    kernels = [value for module in modules for value in list(vars(module).values()) if hasattr(value, "py_func")]
    return {kernel: len(kernel.signatures) for kernel in kernels}

solve, before = import_module("gemopt.solve"), {}
real = solve.ready
solve.ready = lambda *given, **named: (real(*given, **named), before.update(known()))[0]
few = {"current": gemopt.solve(profile(3), traces(12, 2, 8), solver="linear").placement, "max_moves": 3}
copies = [{"slots_per_rank": 4, "split": split} for split in ("static", "optimal")]
budget = {"memory_budget": 9.0, "expert_bytes": 1, "time_limit": 8}  # which tries to prove layers for half of it
rules = gemopt.Rules(pinned=[{"experts": [0, 1], "ranks": [0], "layers": [0]}])  # nothing is asked of the other layer
first = [{"solver": name, "rules": rules} for name in ("local-search", "auto")]
for options in (*first, {"solver": "conflict"}, budget, {"solver": "local-search"}, {"solver": "gem"}, few, *copies):
    limits = {"time_limit": 60, "patience": 2, "threads": 1}
    gemopt.solve(profile(3), traces(12, 2, 8), **limits | options)
    later = [kernel.__name__ for kernel, signatures in known().items() if signatures > before.get(kernel, 0)]
    assert not later, (options, later)
    twice = {kernel.__name__: kernel.signatures for kernel, number in known().items() if number > 1}
    assert not twice, (options, twice)
assert before[step_kernels.exchange] and before[spread_changes.try_drawn], "which small layers do without"
"""


def test_no_kernel_comes_later_nor_twice() -> None:
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    child = subprocess.run([sys.executable, "-c", CHILD], check=False, env=path, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


def layer(counts: list[list[int]]) -> Problem:
    return Problem.make(counts, (ASSIGNMENTS,), [Latency(((line(1, speed),),)) for speed in (1, 2)])


def test_first_use_says_that_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    module = sys.modules["gemopt.solving.first_use"]
    monkeypatch.setattr(module, "_known", set())
    monkeypatch.setattr(module, "_use", lambda *_: time.sleep(0.01))
    assert ready(get("lpt"), layer([[1, 2, 3, 4]]), said.append) >= 0.01 and not said, (
        "loading is not of solving either"
    )
    monkeypatch.setattr(module, "_known", set())
    counts = itertools.count()
    monkeypatch.setattr(module, "_compiled", lambda: next(counts))
    monkeypatch.setattr(module, "_use", lambda *_: _wait_for(said))
    assert ready(get("lpt"), layer([[1, 2, 3, 4]]), said.append) > 0
    assert said[0] == NOTICE and said[1].startswith("compiled in ") and len(said) == 2
    monkeypatch.setattr(module, "_use", pytest.fail)
    assert ready(get("lpt"), layer([[5, 5, 0, 9]]), said.append) == 0.0, "what was used is ready"


@pytest.mark.parametrize(
    ("terminal", "interactive", "quiet"),
    [(False, False, False), (True, False, False), (False, True, False), (True, True, True)],
)
def test_it_is_said_to_who_looks_on_though_nobody_asked(
    terminal: bool, interactive: bool, quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, counts = sys.modules["gemopt.solving.first_use"], itertools.count()
    monkeypatch.setattr(module, "_known", set())
    monkeypatch.setattr(module, "_compiled", lambda: next(counts))
    monkeypatch.setattr(module, "_use", lambda *_: time.sleep(3 * LOOK_S))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(Voice, "quiet", quiet)
    if interactive:
        monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    ready(get("lpt"), layer([[1, 2, 3, 4]]))
    shown = capsys.readouterr().err
    said = (terminal or interactive) and not quiet
    assert shown.endswith(" s\n") and "compiled in " in shown if said else shown == ""


def test_contents_of_ranks_are_prepared_where_there_is_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[bool] = []
    module = sys.modules["gemopt.solving.first_use"]
    monkeypatch.setattr(module, "_known", set())
    monkeypatch.setattr(module, "_use", lambda solver, tiny, budget, contents: used.append(contents))
    least = least_s(layer([[1, 2, 3, 4]]))
    for limit in (least / 2, least / 2, least):
        ready(get("local-search"), layer([[1, 2, 3, 4]]), time_limit=limit)
    ready(get("local-search"), layer([[1, 2, 3, 4]]))
    assert used == [False, True]


def test_solvers_of_the_same_kernels_prepare_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    module = sys.modules["gemopt.solving.first_use"]
    monkeypatch.setattr(module, "_known", set())
    monkeypatch.setattr(module, "_use", lambda solver, *_: used.append(solver.name))
    for name in ("linear", "lpt", "local-search", "cpsat", "milp", "gem", "branch", "gem"):
        ready(get(name), layer([[1, 2, 3, 4]]))
    assert used == ["linear", "local-search", "gem", "branch"]


def test_rules_and_links_of_a_kind_are_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not of a call's time limit may come on top of the first call, not of every one."""
    used: list[str] = []
    module = sys.modules["gemopt.solving.first_use"]
    monkeypatch.setattr(module, "_known", set())
    monkeypatch.setattr(module, "_use", lambda *_: used.append("rules"))
    monkeypatch.setattr(module, "_use_links", lambda *_: used.append("links"))
    plain, experts = layer([[1, 2, 3, 4]]), np.arange(4)
    apart, closed = Demand("", "", apart_E=experts < 2), Demand("", "", closed_GE=np.outer([0, 1], experts == 0) > 0)
    for demands in [(apart,), (apart, apart), (apart, closed), (closed, apart)]:
        ready(get("lpt"), replace(plain, rules=LayerRules(demands, 2, 4)))
    assert used == ["rules"] * 2
    exchange = Exchange(dispatch_bytes=2, once_per="assignment")
    for slack in (None, None, 0.1, 0.2):
        links = Links.of("nvlink-2", Traces(counts=np.ones((1, 2, 4))), 2, exchange=exchange)
        ready(get("lpt"), plain, links=links, compute_slack=slack)
    assert used[2:] == ["rules", "links"] * 2


def _wait_for(said: list[str]) -> None:
    while not said:
        time.sleep(0.01)

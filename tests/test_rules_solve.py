"""Whole calls under rules: budgets, certificates, placements in force, ranks that leave and join, links."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from cli_inputs import profile, traces
from ortools.sat.python import cp_model

from gemopt.evaluate import check_rules
from gemopt.exceptions import InputError
from gemopt.layer_rules import check_kept
from gemopt.links import Exchange
from gemopt.placement import EMPTY, Placement
from gemopt.problem import Problem
from gemopt.result import Status, StoppedBy
from gemopt.rules import Rules
from gemopt.solve import solve
from gemopt.solvers import hurried
from gemopt.solving.moving import Moving
from gemopt.traces import Tokens, Traces
from gemopt.traces.arrays import count_assignments
from gemopt.verify import verify

pytestmark = pytest.mark.usefixtures("quick_bounds")


def test_a_memory_budget_keeps_the_rules() -> None:
    rules = Rules(pinned=[{"experts": [0, 1], "ranks": [1, 3]}], apart=[{"experts": [0, 1]}])
    budget = {"memory_budget": 50.0, "expert_bytes": 10, "slots_per_rank": 3}
    result = solve(profile(4), traces(), rules=rules, time_limit=60, patience=1, **budget)
    assert result.placement is not None
    check_rules(result.placement, rules)
    held = (result.placement.physical_to_logical != EMPTY).sum(axis=0)
    assert (np.bincount(result.placement.rank_of_slot, weights=held) <= 5).all()


def test_a_certificate_under_rules_is_one_of_all_placements(tmp_path: Path) -> None:
    rules = Rules(pinned=[{"experts": [0, 1], "ranks": [1]}])
    path = tmp_path / "certificate.json"
    ruled = solve(profile(), traces(), rules=rules, solver="cpsat", time_limit=20, certificate=path)
    free = solve(profile(), traces(), solver="cpsat", time_limit=20)
    assert ruled.bound_us is not None and free.objective_us is not None and ruled.bound_us > free.objective_us
    found = verify(path, profile(), traces())
    assert found.objective_us == pytest.approx(ruled.objective_us)
    assert found.claimed_us <= free.objective_us * (1 + 1e-9)


def test_the_placement_says_which_rules_it_keeps(tmp_path: Path) -> None:
    """Those of the placement in force hold until others are given, and so do a warm start's."""
    rules, path = Rules(pinned=[{"experts": [0], "ranks": [1]}]), tmp_path / "placement.json"
    first = solve(profile(), traces(), rules=rules, time_limit=2, patience=1)
    assert first.placement is not None and first.placement.rules == rules and "1 pinned" in str(first.placement)
    first.placement.save(path)
    for given in ({"current": path, "max_moves": 2}, {"warm_start": path}, {"current": path, "solver": "cpsat"}):
        found = solve(profile(), traces(), time_limit=2, patience=1, **given)
        assert found.placement is not None and found.placement.rules == rules
        assert any(note.startswith("keeps the rules of") for note in found.notes)
        check_rules(found.placement, rules)
    free = solve(profile(), traces(), current=path, rules=Rules(), time_limit=2, patience=1)
    assert free.placement is not None and free.placement.rules is None


def test_nodes_stay_with_the_rules_that_ask_for_them() -> None:
    """Rules on the nodes of a topology hold later, where only the profile is there, which knows one node."""
    rules = Rules(groups=[{"num_groups": 2}])
    first = solve(profile(4), traces(), rules=rules, topology="2x2-ib400", time_limit=2, patience=1,
                  exchange=Exchange(dispatch_bytes=64, once_per="assignment")).placement  # fmt: skip
    assert first is not None and first.node_of_rank is not None
    assert first.node_of_rank.tolist() == [0, 0, 1, 1]
    found = solve(profile(4), traces(), current=first, time_limit=2, patience=1).placement
    assert found is not None
    check_kept(found)
    assert found.node_of_rank is not None and found.node_of_rank.tolist() == [0, 0, 1, 1]
    with pytest.raises(InputError, match=r"node_of_rank.*the profile knows others"):
        solve(profile(5), traces(), current=first, add_ranks=[4], time_limit=2)


def test_ranks_leave_and_join_under_rules() -> None:
    """Rules name ranks as the placement in force does, new ones after those; the new placement counts anew."""
    rules = Rules(
        pinned=[{"experts": [0], "ranks": [1, 3]}],
        kept_off=[{"experts": [1], "ranks": [3]}, {"experts": [2], "ranks": [1]}],
        apart=[{"experts": [2, 3]}],
    )
    current = Placement(physical_to_logical=[[2, 1, 0, -1, 3, -1, -1, -1]] * 2, slots_per_rank=[2] * 4, num_experts=4)
    found = solve(profile(4), traces(), current=current, exclude_ranks=[1], rules=rules, time_limit=2, patience=1)
    assert found.placement is not None and found.moves is not None
    asked = Rules(pinned=[{"experts": [0], "ranks": [2]}], kept_off=[{"experts": [1], "ranks": [2]}],
                  apart=[{"experts": [2, 3]}])  # fmt: skip
    assert found.placement.rules == asked and found.moves.moves == 2
    check_rules(found.placement, asked)
    without = solve(profile(4), traces(), current=current, exclude_ranks=[1, 3], rules=rules, time_limit=2)
    assert without.status is Status.INFEASIBLE and "pinned[0] asks for ranks none of which is left" in without.notes[0]
    with pytest.raises(InputError, match=r"rules.kept_off\[0\].ranks: got \[4\]; ranks 0 to 3"):
        solve(profile(4), traces(), current=current, exclude_ranks=[1],
              rules=Rules(kept_off=[{"experts": [0], "ranks": [4]}]))  # fmt: skip
    joined = solve(
        profile(5), traces(), current=current, add_ranks=[4], exclude_ranks=[0], time_limit=2, patience=1,
        rules=Rules(pinned=[{"experts": [1], "ranks": [4]}, {"experts": [3], "ranks": [0, 2]}]),
    )  # fmt: skip
    assert joined.placement is not None
    check_rules(joined.placement, Rules(pinned=[{"experts": [1], "ranks": [3]}, {"experts": [3], "ranks": [1]}]))


def test_ranks_that_leave_may_move_what_rules_ask_for() -> None:
    """Without a limit of the caller's, as many moves as it takes, and no more: here expert 1 makes room for 0 and 3."""
    rules = Rules(together=[{"experts": [0, 3]}])
    current = Placement(physical_to_logical=[[3, 1, 2, -1, 0, -1]] * 2, slots_per_rank=[2] * 3, num_experts=4)
    found = solve(profile(3), traces(), current=current, exclude_ranks=[2], rules=rules, time_limit=2, patience=1)
    assert found.placement is not None and found.moves is not None and found.moves.moves == 4
    check_rules(found.placement, rules)


@pytest.mark.parametrize(("solver", "slots"), [("local-search", 3), ("cpsat", 2)])
def test_links_and_groups_together(solver: str, slots: int) -> None:
    """The nodes are those of the topology; ranks change places along the transitions only where rules let them."""
    ids = np.random.default_rng(2).permuted(np.tile(np.arange(8), (60, 2, 1)), axis=2)[:, :, :2]
    tokens = Tokens(ids, np.arange(60) // 10, source_rank=None)
    seen = Traces(counts=count_assignments(ids, tokens.step_of_token, 6, 8), tokens=tokens)
    rules = Rules(groups=[{"num_groups": 2}], apart=[{"experts": [0, 1]}], pinned=[{"experts": [4], "ranks": [0, 1]}])
    exchange = Exchange(dispatch_bytes=2048, combine_bytes=4096, senders="previous" if slots == 3 else None)
    result = solve(
        profile(4), seen, rules=rules, topology="2x2-ib400", exchange=exchange, time_limit=3, patience=2,
        solver=solver, slots_per_rank=slots,
    )  # fmt: skip
    assert result.placement is not None and result.links is not None
    check_rules(result.placement, rules, topology="2x2-ib400")
    held_LP = result.placement.physical_to_logical[:, : 2 * slots]
    assert all(set(row) - {EMPTY} == {4, 5, 6, 7} for row in held_LP.tolist())


def test_few_moves_under_rules() -> None:
    """Two layers share moves: the rules ask for one exchange in each, which is two moves."""
    rules, seen = Rules(pinned=[{"experts": [0], "ranks": [1]}]), traces()
    current = Placement.contiguous(2, 4, 2)
    few = solve(profile(), seen, rules=rules, current=current, max_moves=3, solver="local-search", time_limit=2)
    assert few.status is Status.INFEASIBLE and "4 moves" in few.notes[0]
    for fields in ({"max_moves": 4}, {"max_moves_per_layer": 2}, {"move_price": 1e6}, {}):
        result = solve(
            profile(), seen, rules=rules, current=current, solver="local-search", time_limit=4, patience=2, **fields
        )
        assert result.placement is not None and result.moves is not None
        check_rules(result.placement, rules)
        assert result.moves.moves == 4 or not fields


@pytest.mark.parametrize("solver", ["local-search", "auto"])
def test_moves_not_proven_to_be_the_fewest_prove_nothing(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time ends with the worst rows within the limits: two layers that need two moves each still share five."""
    at_hand = import_module("gemopt.solvers.nearest").solved

    def worst(model: cp_model.CpModel, *asked: object, **options: object) -> tuple[object, bool]:
        model = model.clone()
        for index, coefficient in enumerate(model.proto.objective.coeffs):
            model.proto.objective.coeffs[index] = -coefficient
        value_of, proven = at_hand(model, *asked, **options)
        return value_of, proven and value_of is None

    monkeypatch.setattr("gemopt.solvers.nearest.solved", worst)
    asked = {"rules": Rules(apart=[{"experts": [0, 1]}]), "current": Placement.contiguous(2, 6, 3), "solver": solver}
    result = solve(profile(3), traces(experts=6), max_moves=5, patience=1, time_limit=20, **asked)
    assert result.status is Status.FEASIBLE and result.moves is not None and result.moves.moves <= 5
    few = solve(profile(3), traces(experts=6), max_moves=3, patience=1, time_limit=20, **asked)
    assert few.status is Status.INFEASIBLE and "rules" in few.notes[0]


@pytest.mark.parametrize("solver", ["local-search", "auto"])
def test_a_row_that_was_found_is_not_lost_where_no_time_is_left_for_another(
    solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank leaves, under rules: the row of the fewest moves is searched on from, in more than half the time."""
    nearest, moving = import_module("gemopt.solvers.nearest"), import_module("gemopt.solving.moving")
    may_take: list[float] = []

    def found(problem: Problem) -> tuple[object, bool]:
        may_take.append(hurried.seconds_for_better())
        return nearest.fewest(problem)[0], False

    def eased(self: Moving, layers: list[Problem], deadline: float) -> tuple[list[Problem], bool]:
        done = real(self, layers, deadline)
        monkeypatch.setattr(nearest, "_near", lambda *_: (None, False))  # from now on nothing is found in time
        monkeypatch.setattr(import_module("gemopt.solvers.placing"), "_balanced", late)
        return done

    def late(*_: object) -> object:
        raise hurried.OutOfTimeError("another row")

    real = Moving.eased
    monkeypatch.setattr(moving, "fewest", found)
    monkeypatch.setattr(Moving, "eased", eased)
    rules = Rules(together=[{"experts": [0, 1]}], apart=[{"experts": [2, 7]}])
    current = Placement(physical_to_logical=[[0, 3, 6, 1, 4, 7, 2, 5, 8]] * 2, slots_per_rank=[3, 3, 3], num_experts=9)
    asked = {"current": current, "exclude_ranks": [2], "slots_per_rank": 6, "solver": solver}
    result = solve(profile(3), traces(60, 2, 9), rules=rules, time_limit=100, patience=1, **asked)
    assert result.placement is not None and result.status in (Status.FEASIBLE, Status.OPTIMAL)
    check_rules(result.placement, rules)
    assert len(may_take) == 2 and max(may_take) < 50


@pytest.mark.parametrize("split", ["even", "static", "optimal"])
def test_what_fills_slots_leaves_experts_together(split: str) -> None:
    """The only placements: 0 and 1 on one rank, 2 and 3 on every other."""
    rules = Rules(apart=[{"experts": [1, 2]}], together=[{"experts": [0, 1]}])
    asked = {"slots_per_rank": 2, "full_slots": True, "split": split, "patience": 1, "time_limit": 20}
    found = solve(profile(3), traces(), rules=rules, **asked).placement
    assert found is not None
    for row in found.physical_to_logical:
        assert sorted(sorted(row[i : i + 2].tolist()) for i in (0, 2, 4)) == [[0, 1], [2, 3], [2, 3]]


@pytest.mark.parametrize("given", [{}, {"max_moves": 1}, {"max_moves_per_layer": 4}, {"exclude_ranks": [1]}])
def test_what_rules_ask_for_is_looked_for_no_longer_than_the_call_may_last(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, object]
) -> None:
    """A solver that finds nothing: it is given the time of the call, and no answer is not called infeasible."""
    asked: list[float] = []

    def solved(solver: cp_model.CpSolver, *_: object) -> object:
        asked.append(solver.parameters.max_time_in_seconds)
        return cp_model.UNKNOWN

    monkeypatch.setattr(import_module("gemopt.solve"), "ready", lambda *_, **__: 0.0)
    monkeypatch.setattr(cp_model.CpSolver, "solve", solved)
    current = Placement(physical_to_logical=[[0, 1, -1, 2, 3, -1, -1]] * 2, slots_per_rank=[3, 3, 1], num_experts=4)
    rules = Rules(apart=[{"experts": [0, 1]}], together=[{"experts": [1, 3]}])
    result = solve(
        profile(3), traces(), rules=rules, current=current if given else None, slots_per_rank=4 if given else None,
        time_limit=0.5, **given,
    )  # fmt: skip
    assert (result.status, result.stopped_by, result.placement) == (Status.UNKNOWN, StoppedBy.TIME_LIMIT, None)
    assert any("not found in time" in note for note in result.notes)
    assert len(asked) > 1 and max(asked) <= 2.0, "a second a layer for an example of what keeps the rules"
    assert sorted(asked)[-2] <= 1.0
    assert given or min(asked) <= 0.1, "a fifth of the time at most for balancing"


SLOW_TO_LOAD = """
import importlib.abc, sys, time
from cli_inputs import profile, traces
from gemopt import Rules, solve

hour, clock = [0.0], time.monotonic
time.monotonic = lambda: clock() + hour[0]

class Disk(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        hour[0] = 3600.0 if name == "ortools" else hour[0]

assert "ortools" not in sys.modules
sys.meta_path.insert(0, Disk())
rules = Rules(apart=[{"experts": [0, 1]}])
found = solve(profile(), traces(), rules=rules, solver="local-search", time_limit=600, patience=1)
assert hour[0] and found.placement and found.seconds < 600, found.seconds
"""


def test_loading_what_finds_rows_under_rules_is_not_solving() -> None:
    """As if it took an hour."""
    run, beside = [sys.executable, "-c", SLOW_TO_LOAD], {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=beside)
    assert done.returncode == 0, done.stderr

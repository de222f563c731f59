"""The controller goes back to placements that served before, where traffic, speeds or ranks go back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_online_controller import EXPERTS, LAYERS, RANKS, controller, cost, traffic

from gemopt.evaluate import objective, rank_times
from gemopt.online.controller import Controller
from gemopt.online.earlier import KEPT, Earlier, ways_back
from gemopt.online.memories import Memories
from gemopt.online.policy import Policy
from gemopt.placement import Placement
from gemopt.problem import Problem

Counts = np.ndarray[Any, Any]


def latencies(follower: Controller, counts: Counts, slow: float) -> Counts:
    """[n, G] what ranks take, rank 1 being slower."""
    times = [
        rank_times(Problem.make(counts[:, layer], cost(slow).features, cost(slow).latencies, 4), row)
        for layer, row in enumerate(follower.placement.physical_to_logical)
    ]
    return np.asarray(np.sum(times, axis=0))


def play(follower: Controller, regime: int, steps: int = 192, slow: float = 1.0, seed: int = 0) -> None:
    counts = traffic(regime, steps, seed)
    for start in range(0, steps, 8):
        window = counts[start : start + 8]
        follower.step(window, latencies(follower, window, slow))


def rows(follower: Controller) -> Counts:
    return np.array(follower.placement.physical_to_logical)


def total_of(rows_LP: Counts, regime: int) -> float:
    """Objective on the steps that a regime was learnt from."""
    counts, slots = traffic(regime, 192), np.full(RANKS, 4)
    problems = [Problem.make(counts[:, layer], cost().features, cost().latencies, slots) for layer in range(LAYERS)]
    return sum(map(objective, problems, rows_LP))


def test_back_to_where_it_was_when_a_rank_recovers() -> None:
    follower = controller()
    play(follower, 0)
    before = rows(follower)
    play(follower, 0, slow=1.5, seed=1)
    assert (rows(follower) != before).any()
    play(follower, 0, seed=2)
    assert total_of(rows(follower), 0) <= 1.001 * total_of(before, 0)


def test_what_speeds_ask_for_is_not_priced_by_traffic_that_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    follower = controller()
    play(follower, 0)
    before = rows(follower)
    monkeypatch.setattr(Memories, "lifetime_steps", 1.0)  # nothing pays for its moves within one step
    play(follower, 0, seed=1)
    assert (rows(follower) == before).all()
    play(follower, 0, slow=1.5, seed=2)
    assert (rows(follower) != before).any()
    play(follower, 0, seed=3)
    assert total_of(rows(follower), 0) <= 1.001 * total_of(before, 0)


def test_back_to_where_it_was_when_traffic_comes_back() -> None:
    follower = controller()
    play(follower, 0)
    before = rows(follower)
    play(follower, 1)
    assert (rows(follower) != before).any()
    counts = traffic(0, 8, seed=1)
    decision = follower.step(counts, latencies(follower, counts, 1.0))
    assert decision.changed and decision.num_moves
    assert total_of(rows(follower), 0) <= 1.001 * total_of(before, 0)


def test_the_way_back_is_one_step_where_swaps_one_by_one_do_not_pay() -> None:
    fitted, stale = controller(), controller()
    play(fitted, 0)
    play(stale, 1)
    after = []
    for knows in (False, True):
        follower = controller(Policy(least_gain=0.05), stale.placement)
        if knows:
            follower.earlier.note(rows(fitted), 0)
        follower.step(traffic(0, 64, seed=1))
        after.append(total_of(rows(follower), 0))
    assert after[1] <= 1.001 * total_of(rows(fitted), 0) < 1.01 * total_of(rows(fitted), 0) < after[0]


def test_not_where_fewer_moves_are_allowed() -> None:
    follower = controller(Policy(max_moves=1))
    follower.earlier.note(rows(controller())[:, ::-1], 0)
    assert follower.step(traffic(0, 8)).num_moves <= 1


def problem(**changes: Any) -> Problem:
    return Problem.make(traffic(0, 16)[:, 0], cost().features, cost().latencies, np.full(RANKS, 4), **changes)


def test_ways_back_leave_out_what_may_not_be_in_force() -> None:
    home, other = np.arange(EXPERTS), np.arange(EXPERTS)[::-1].copy()
    room_G = np.full(RANKS, 4)
    (way,) = ways_back(problem(), home, [home, other], room_G, None)
    assert (way.row == other).all() and way.moves == EXPERTS
    assert way.objective_us == pytest.approx(objective(problem(), other))
    assert not ways_back(problem(), home, [other], np.where(np.arange(RANKS) == 2, 0, 4), None)  # a failed rank
    assert not ways_back(problem(), home, [other], room_G, EXPERTS - 1)


def test_the_latest_placements_are_kept_once_and_looked_at_while_a_change_is_new() -> None:
    kept = Earlier(1, 3)
    for n in [*range(KEPT + 1), 2]:
        kept.note(np.full((1, 3), n), steps=100 + n)
    assert [int(row[0]) for row in kept.of(0, 110)] == [2, 4, 3, 1]
    assert not kept.of(0, 200)


def test_what_served_is_saved_with_the_rest(tmp_path: Path) -> None:
    follower = controller()
    play(follower, 0, 64)
    play(follower, 1, 64)
    follower.save(tmp_path / "state")
    again = controller()
    again.load(tmp_path / "state")
    assert len(again.earlier.served) and (again.earlier.served == follower.earlier.served).all()
    counts = traffic(0, 8, seed=3)
    assert again.step(counts).placement == follower.step(counts).placement


def test_another_group_forgets_what_served() -> None:
    follower = controller()
    follower.earlier.note(rows(follower), 0)
    follower.confirm(Placement.contiguous(LAYERS, EXPERTS, RANKS))
    assert len(follower.earlier.served) == 1
    uneven = Placement(
        physical_to_logical=np.tile(np.r_[np.arange(EXPERTS), -1], (LAYERS, 1)),
        slots_per_rank=[4, 4, 4, 5],
        num_experts=EXPERTS,
    )
    follower.confirm(uneven)
    assert not len(follower.earlier.served)

"""Promises and what measured latencies bear out: moves that do not pay rest, those that do are made as ever."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_online_controller import EXPERTS, LAYERS, RANKS, controller, cost, times, traffic

from gemopt.costs import CostModel
from gemopt.latency import ASSIGNMENTS, Latency, line
from gemopt.online.controller import Controller
from gemopt.online.policy import Policy
from gemopt.placement import Placement

STEPS = 8


def played(follower: Controller, calls: int, measured: Any, seed: int = 0) -> list[int]:
    """Moves of every decision; `measured(placement, counts)` are the latencies, or None."""
    moves = []
    for call in range(calls):
        counts = traffic(0, STEPS, seed + call)
        moves.append(follower.step(counts, measured(follower.placement, counts)).num_moves)
    return moves


def noisy(placement: Placement, counts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    noise = np.random.default_rng(int(counts.sum(axis=(0, 1))[0])).standard_normal((len(counts), RANKS))
    return times(placement, counts, 1.2) * np.exp(0.03 * noise)


def gentle() -> CostModel:
    """Costs of another device: latencies hardly depend on the load, so that speeds take the blame for what it does."""
    latencies = (Latency(((line(600.0, 0.2),),)),) * RANKS
    return CostModel("gentle", (ASSIGNMENTS,), latencies, np.full((RANKS, 1, 2), np.nan))


def test_right_costs_keep_what_they_promise() -> None:
    follower = controller()
    assert sum(played(follower, 40, times)) > 0
    assert follower.realised.seen > 0 and follower.realised.share == pytest.approx(1.0)
    loud = controller()
    played(loud, 40, noisy)
    assert loud.realised.share > 0.8


def test_moves_that_do_not_pay_come_to_rest() -> None:
    begin, policy = Placement.contiguous(LAYERS, EXPERTS, RANKS), Policy(expert_bytes=1e6)
    follower, deaf = (Controller(gentle(), begin, policy) for _ in range(2))
    deaf.realised.take = lambda *_: None  # type: ignore[method-assign]
    moves, restless = played(follower, 120, noisy), played(deaf, 120, noisy)
    assert sum(restless[90:]) > 100
    assert sum(moves) < sum(restless) / 5 and sum(moves[90:]) < 40
    decision = follower.step(traffic(0, STEPS), noisy(follower.placement, traffic(0, STEPS)))
    assert decision.trust == follower.realised.share < 0.5
    assert "measured latencies bore out" in decision.reason


def test_without_latencies_promises_count_in_full() -> None:
    follower = controller()
    moves = played(follower, 40, lambda *_: None)
    assert sum(moves) > 0 and follower.realised.share == 1.0 and not follower.realised.waits


def test_latencies_that_stop_are_not_waited_for() -> None:
    """Steps under transfers say nothing, and neither does a timer that is off: nothing rests for ever."""
    follower, silent = controller(), np.full((STEPS, RANKS), np.nan)
    follower.realised.blind = 5
    moves = [follower.step(traffic(0, STEPS, seed), silent).num_moves for seed in range(12)]
    assert sum(moves[:7]) == 0 < sum(moves[7:])


def test_a_failed_rank_is_left_whatever_moves_kept() -> None:
    rows = np.full((LAYERS, RANKS * 6), -1)
    for rank in range(RANKS):
        rows[:, rank * 6 : rank * 6 + 4] = np.arange(4) + 4 * rank
    placement = Placement(physical_to_logical=rows, slots_per_rank=np.full(RANKS, 6), num_experts=EXPERTS)
    follower = Controller(cost(), placement, Policy(dead_after_steps=8))
    follower.realised.seen, follower.realised.kept = 10.0, -10.0
    counts = traffic(0, 16)
    gone = times(follower.placement, counts)
    gone[:, 2] = np.nan
    decision = follower.step(counts, gone)
    assert decision.num_moves == LAYERS * 4
    assert (decision.placement.physical_to_logical[:, 12:18] == -1).all()


def test_a_bad_hour_is_forgotten_without_latencies_too() -> None:
    follower = controller()
    follower.realised.seen, follower.realised.kept = 10.0, -8.0
    assert sum(played(follower, 4, lambda *_: None)) == 0 and follower.realised.waits
    assert follower.realised.waited == 4 * STEPS
    for _ in range(5):
        follower.realised.pass_over(follower.placement, 16384)
    assert not follower.realised.waits
    assert sum(played(follower, 4, lambda *_: None)) > 0
    assert follower.realised.waited <= 4 * STEPS

"""The controller: what moves and what does not, bad input, determinism, state on disk, failed ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemopt.costs import CostModel
from gemopt.evaluate import evaluate
from gemopt.exceptions import InputError
from gemopt.latency import ASSIGNMENTS, Latency, line
from gemopt.migration import count_moves
from gemopt.online.controller import Controller
from gemopt.online.policy import Policy
from gemopt.placement import Placement
from gemopt.rules import Rules
from gemopt.traces import Traces

LAYERS, EXPERTS, RANKS = 3, 16, 4


def cost(slow: float = 1.0, rank: int = 1) -> CostModel:
    latencies = [Latency(((line(30.0 * s, 1.0 * s),),)) for s in np.where(np.arange(RANKS) == rank, slow, 1.0)]
    return CostModel("staircase", (ASSIGNMENTS,), tuple(latencies), np.full((RANKS, 1, 2), np.nan))


def traffic(regime: int, steps: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """[steps, L, E] multinomial counts; each regime has hot experts of its own."""
    shares_LE = np.random.default_rng(100 + regime).dirichlet(np.full(EXPERTS, 0.7), size=LAYERS)
    rng = np.random.default_rng(1000 * seed + regime)
    return np.stack([rng.multinomial(256, share, size=steps) for share in shares_LE], axis=1)


def controller(policy: Policy | None = None, placement: Placement | None = None) -> Controller:
    return Controller(cost(), placement or Placement.contiguous(LAYERS, EXPERTS, RANKS), policy)


def total(placement: Placement, counts: np.ndarray[Any, Any], slow: float = 1.0) -> float:
    return evaluate(placement, None, Traces(counts=counts), cost=cost(slow)).objective_us


def settled(regime: int = 0, steps: int = 256) -> Controller:
    follower = controller()
    for start in range(0, steps, 64):
        follower.step(traffic(regime, steps)[start : start + 64])
    return follower


def test_moves_gain_what_they_promise_and_are_what_the_placement_says() -> None:
    follower = controller()
    before = follower.placement
    decision = follower.step(traffic(0, 64))
    assert decision.placement is follower.placement is not before
    rows = zip(before.physical_to_logical, decision.placement.physical_to_logical, strict=True)
    assert decision.num_moves == sum(count_moves(a, b, before.slots_per_rank) for a, b in rows) > 0
    assert decision.num_moves == sum(len(each) for each in decision.moves.values())
    for layer, moved in decision.moves.items():
        for move in moved:
            assert before.physical_to_logical[layer, move.src_slot] == move.expert
            assert decision.placement.physical_to_logical[layer, move.dst_slot] == move.expert
    later = traffic(0, 64, seed=1)
    gained = (total(before, later) - total(decision.placement, later)) / 64
    assert gained > 0.5 * decision.gain_us > 0
    assert decision.cost_us > 0 and "moves" in decision.reason


def test_settled_traffic_moves_nothing() -> None:
    follower = settled()
    assert sum(follower.step(traffic(0, 64, seed=seed)).num_moves for seed in range(2, 6)) <= 4 * LAYERS


def test_warming_up_changes_nothing(tmp_path: Path) -> None:
    first, second = controller(), controller()
    first.save(tmp_path / "before.npz")
    first.warm()
    first.save(tmp_path / "after.npz")
    assert (tmp_path / "before.npz").read_bytes() == (tmp_path / "after.npz").read_bytes()
    for start in (0, 64, 128):
        window = traffic(0, 64, seed=start)
        warmed, plain = first.step(window), second.step(window)
        assert (warmed.reason, warmed.placement) == (plain.reason, plain.placement)


def test_dear_moves_are_not_made() -> None:
    assert controller(Policy(commit_us=1e9)).step(traffic(0, 64)).num_moves == 0
    assert controller(Policy(dead_zone=100)).step(traffic(0, 64)).num_moves == 0


def test_moves_are_limited_and_the_best_come_first() -> None:
    free = controller().step(traffic(0, 64))
    few = controller(Policy(max_moves=4)).step(traffic(0, 64))
    assert 0 < few.num_moves <= 4 < free.num_moves
    assert few.gain_us / few.num_moves > free.gain_us / free.num_moves


def test_the_rate_of_moves_is_kept_and_what_is_not_used_is_saved() -> None:
    rate = 100.0  # LAYERS * EXPERTS would move freely when the regime changes
    follower, moves, steps = controller(Policy(moves_per_1000_steps=rate)), 0, 0
    for regime in (0, 1):
        for start in range(0, 192, 8):
            moves += follower.step(traffic(regime, 192)[start : start + 8]).num_moves
            steps += 8
            assert moves <= rate * steps / 1000
    assert moves > 0.5 * rate * steps / 1000
    assert controller(Policy(moves_per_1000_steps=0)).step(traffic(0, 64)).num_moves == 0


def test_traffic_that_comes_back_is_served_at_once() -> None:
    follower, changes = controller(), 0
    for regime in (0, 1, 0, 1):
        for start in range(0, 192, 8):
            changes += follower.step(traffic(regime, 192)[start : start + 8]).changed
    assert changes == 3
    fresh = traffic(0, 64, seed=5)
    stale = total(follower.placement, fresh)
    follower.step(fresh[:8])
    best = total(settled(0, 512).placement, fresh)
    assert stale - total(follower.placement, fresh) > 0.9 * (stale - best) > 0


def test_a_throttled_rank_is_relieved_and_gets_its_work_back() -> None:
    follower, rng = settled(), np.random.default_rng(3)
    for slow in (1.3, 1.0):
        for seed in (7, 8):
            counts = traffic(0, 64, seed=seed)
            noise = np.exp(0.02 * rng.standard_normal((64, RANKS))) * 1.1  # all ranks 10 % slower than profiled
            follower.step(counts, times(follower.placement, counts, slow) * noise)
        assert follower.speeds.factors_G == pytest.approx(np.where(np.arange(RANKS) == 1, slow, 1.0), rel=0.03)
        fresh = traffic(0, 64, seed=9)
        fitted = Controller(cost(slow), Placement.contiguous(LAYERS, EXPERTS, RANKS))
        for seed in range(4):
            fitted.step(traffic(0, 64, seed=seed))
        assert total(follower.placement, fresh, slow) < 1.02 * total(fitted.placement, fresh, slow)


def test_imbalance_is_of_the_speeds_that_the_steps_told() -> None:
    """Those in force before knew nothing of the rank that the very decision says is slow."""
    follower, counts = settled(), traffic(0, 64, seed=7)
    before, problem = follower.placement, Traces(counts=counts)
    decision = follower.step(counts, times(before, counts, 1.3))
    assert "rank 1 takes 1.300 times its profile" in decision.reason
    idle = evaluate(before, None, problem, cost=cost(1.3)).idle_share
    assert decision.imbalance == pytest.approx(1 / (1 - idle), rel=1e-6)


def test_plans_wait_while_nothing_changes() -> None:
    follower, idle = controller(Policy(plan_every_steps=64)), "nothing changed since the last plan"
    assert follower.step(traffic(0, 64)).num_moves > 0
    told = [traffic(0, 8, seed) for seed in range(1, 15)]
    assert [follower.step(counts, times(follower.placement, counts)).reason for counts in told[:7]] == [idle] * 7
    assert idle not in follower.step(told[7], times(follower.placement, told[7])).reason
    slow = follower.step(told[8], times(follower.placement, told[8], 1.5))
    assert slow.num_moves > 0 and slow.reason.startswith("rank 1 takes 1.5")
    assert follower.step(told[9], times(follower.placement, told[9], 1.5)).reason == idle
    changed = follower.step(traffic(1, 8))
    assert changed.changed and changed.num_moves > 0


def test_what_did_not_come_into_force_is_planned_for_at_once() -> None:
    follower = controller(Policy(dead_after_steps=16, plan_every_steps=10**6), spacious())
    counts, before = traffic(0, 32), spacious()
    told = times(before, counts)
    told[:, 2] = np.nan
    assert follower.step(counts[:16], told[:16]).placement != before
    follower.confirm(before)  # the experts of the rank that has failed are still served by nobody
    again = follower.step(counts[16:24], told[16:24])
    assert again.num_moves > 0 and (again.placement.physical_to_logical[:, 12:18] == -1).all()
    follower.confirm(again.placement)
    assert follower.step(counts[24:], told[24:]).reason == "nothing changed since the last plan"


def times(placement: Placement, counts: np.ndarray[Any, Any], slow: float = 1.0) -> np.ndarray[Any, Any]:
    """[n, G] latency of every rank, summed over the layers."""
    owner_PG = np.eye(RANKS)[placement.rank_of_slot]
    factor_G = np.where(np.arange(RANKS) == 1, slow, 1.0)
    rows = placement.physical_to_logical
    loads = [np.where(row >= 0, counts[:, layer, row], 0) @ owner_PG for layer, row in enumerate(rows)]
    return np.asarray(sum(30 * factor_G + load * factor_G for load in loads))


def spacious() -> Placement:
    """Two spare slots per rank, empty: three ranks can hold all experts."""
    rows = np.full((LAYERS, RANKS * 6), -1)
    for rank in range(RANKS):
        rows[:, rank * 6 : rank * 6 + 4] = np.arange(4) + 4 * rank
    return Placement(physical_to_logical=rows, slots_per_rank=np.full(RANKS, 6), num_experts=EXPERTS)


def test_a_rank_that_falls_silent_is_left() -> None:
    follower = controller(Policy(dead_after_steps=16), spacious())
    counts = traffic(0, 16)
    silent = times(follower.placement, counts)
    silent[:, 2] = np.nan
    assert "failed" not in follower.step(counts[:8], silent[:8]).reason
    decision = follower.step(counts[8:], silent[8:])
    assert "rank 2 has failed" in decision.reason
    assert (decision.placement.physical_to_logical[:, 12:18] == -1).all()
    again = follower.step(counts, times(follower.placement, counts))
    assert "rank 2 reports again" in again.reason


@pytest.mark.parametrize("rules", [None, Rules(apart=[{"experts": [0, 1]}])])
def test_a_failed_rank_without_room_elsewhere_is_reported_and_nothing_moves(rules: Rules | None) -> None:
    """Under rules too, whose conflict with too few slots a solver may look for without end."""
    begin = Placement.contiguous(LAYERS, EXPERTS, RANKS)
    follower = controller(Policy(dead_after_steps=8), begin if rules is None else begin.under(rules, [0] * RANKS))
    counts = traffic(0, 16)
    silent = times(follower.placement, counts)
    silent[:, 2] = 0
    decision = follower.step(counts, silent)
    assert (
        "infeasible without rank 2" in decision.reason
        and "16 experts need a slot, the others have 12" in decision.reason
    )
    assert decision.num_moves == 0 and decision.placement is follower.placement


GOOD = traffic(0, 16)
BAD: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("counts", (GOOD[:, :2],), {}),
    ("counts", (GOOD[:, :, :5],), {}),
    ("counts", (GOOD[0],), {}),
    ("counts", (GOOD[:0],), {}),
    ("counts", (-GOOD,), {}),
    ("counts", (GOOD + 0.5,), {}),
    ("counts", (np.full(GOOD.shape, np.nan),), {}),
    ("counts", ("nonsense",), {}),
    ("counts", (None,), {}),
    ("latencies", (GOOD, np.ones((16, 3))), {}),
    ("latencies", (GOOD, np.ones((15, 4))), {}),
    ("latencies", (GOOD, -np.ones((16, 4))), {}),
    ("latencies", (GOOD, [["x"]]), {}),
    ("latencies", (GOOD, np.where(np.arange(4) == 1, 1e300, np.ones((16, 4)))), {}),
    ("latencies", (GOOD, np.where(np.arange(4) == 1, 1e-320, np.ones((16, 4)))), {}),
    ("counts", (GOOD * 2**20,), {}),
    ("now_s", (GOOD,), {"now_s": 1.0}),
    ("now_s", (GOOD,), {"now_s": float("nan")}),
    ("now_s", (GOOD,), {"now_s": "noon"}),
    ("now_s", (GOOD,), {"now_s": [1.0, 2.0]}),
]


@pytest.mark.parametrize(("field", "args", "kwargs"), BAD)
def test_what_cannot_be_used_is_said_and_changes_nothing(
    field: str, args: tuple[Any, ...], kwargs: dict[str, Any], tmp_path: Path
) -> None:
    follower = settled()
    follower.step(traffic(0, 8), now_s=2.0)
    follower.save(tmp_path / "before")
    decision = follower.step(*args, **kwargs)
    assert decision.refused and decision.reason.startswith(f"refused: {field}") and "\n" not in decision.reason
    assert decision.num_moves == 0 and decision.placement is follower.placement
    follower.save(tmp_path / "after")
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


def test_layers_and_windows_without_work_are_harmless() -> None:
    follower = controller()
    assert follower.step(np.zeros((64, LAYERS, EXPERTS), int)).num_moves == 0
    counts = traffic(0, 128)
    counts[:, 1] = 0
    decisions = [follower.step(counts[:64]), follower.step(counts[64:])]
    assert all(1 not in each.moves for each in decisions)
    assert sum(each.num_moves for each in decisions) > 0
    assert "waiting for 5 more steps" in controller().step(traffic(0, 3)).reason


@pytest.mark.parametrize("silent", [np.nan, None, 0])
def test_everything_silent_is_not_a_failure(silent: float | None) -> None:
    follower = controller(Policy(dead_after_steps=8))
    decision = follower.step(GOOD, [[silent] * RANKS] * 16)
    assert "failed" not in decision.reason and not decision.refused


def test_a_rank_that_is_none_beside_others_is_silent() -> None:
    follower = controller(Policy(dead_after_steps=8))
    assert "rank 1" in follower.step(GOOD, [[50.0, None, 50.0, 50.0]] * 16).reason


def test_what_cannot_be_followed_is_refused() -> None:
    with pytest.raises(InputError, match="3 ranks"):
        controller(placement=Placement.contiguous(LAYERS, EXPERTS, 3))
    follower = controller()
    with pytest.raises(InputError, match=r"layers \[0, 1\]"):
        follower.confirm(Placement.contiguous(2, EXPERTS, RANKS))
    with pytest.raises(InputError, match=r"layers \[1, 2, 3\]"):
        follower.confirm(Placement.contiguous(LAYERS, EXPERTS, RANKS, layer_ids=[1, 2, 3]))
    with pytest.raises(InputError, match="a Placement or the path of one"):
        follower.confirm(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="shape"):
        follower.remember(GOOD[:, :1])
    with pytest.raises(InputError, match=r"Policy\.max_moves: got True; a whole number"):
        Policy(max_moves=True)


def test_confirm_goes_on_from_what_is_in_force() -> None:
    follower = controller()
    first = follower.step(traffic(0, 64))
    late = Placement.contiguous(LAYERS, EXPERTS, RANKS)
    follower.confirm(late)
    assert follower.placement is late
    again = [follower.step(traffic(0, 32, seed=seed)).num_moves for seed in (1, 2)]
    assert first.num_moves > 0 and sum(again) > 0


def test_moves_that_were_not_made_do_not_count() -> None:
    follower = controller(Policy(moves_per_1000_steps=200.0))
    begin = follower.placement
    made = follower.step(traffic(0, 64)).num_moves
    assert follower.moved == made == 12  # 200 in 1000 steps, 64 of them
    follower.confirm(begin)
    follower.confirm(begin)
    assert follower.moved == 0
    decision = follower.step(traffic(0, 64, seed=1))
    assert follower.moved == decision.num_moves > made
    rows = np.concatenate([begin.physical_to_logical[:1], decision.placement.physical_to_logical[1:]])
    follower.confirm(begin.changed(physical_to_logical=rows))
    assert follower.moved == decision.num_moves - len(decision.moves.get(0, []))

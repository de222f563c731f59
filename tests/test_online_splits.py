"""Following and fronts of moves where copies share unevenly: static weights travel, optimal shares are taken anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_online_controller import EXPERTS, LAYERS, RANKS, cost, times, traffic
from test_online_state import same

from gemopt.evaluate import evaluate, objective
from gemopt.exceptions import InputError
from gemopt.online.controller import Controller
from gemopt.online.policy import Policy
from gemopt.placement import EMPTY, Placement, Split
from gemopt.problem import Problem
from gemopt.profile import Device, Profile, Sample
from gemopt.solvers.search.moves import few_moves
from gemopt.solving.fronts import moves_front
from gemopt.traces import Traces

COPIED = [Split.STATIC, Split.OPTIMAL, Split.NEAREST]


def copied(split: Split, seed: int = 0, slots: int = 6) -> Placement:
    """Experts and copies at random places, weights at random, a slot empty here and there."""
    rng = np.random.default_rng(seed)
    rows, weights = np.full((LAYERS, RANKS, slots), EMPTY), np.zeros((LAYERS, RANKS, slots))
    for row, weight in zip(rows, weights, strict=True):
        row[:, :4] = rng.permutation(EXPERTS).reshape(RANKS, 4)
        for held in row:
            held[4] = rng.choice(np.setdiff1d(np.arange(EXPERTS), held))
        weight[row != EMPTY] = rng.uniform(0.2, 1.0, (row != EMPTY).sum())
        sums = np.bincount(row[row != EMPTY], weights=weight[row != EMPTY], minlength=EXPERTS)
        weight[row != EMPTY] /= sums[row[row != EMPTY]]
    return Placement(
        physical_to_logical=rows.reshape(LAYERS, -1),
        slots_per_rank=np.full(RANKS, slots),
        num_experts=EXPERTS,
        split=split,
        split_weights=weights.reshape(LAYERS, -1) if split is Split.STATIC else None,
    )


def profile(slow: float = 1.0) -> Profile:
    """Of the same devices as `cost`, two on a node."""
    samples = [[Sample(assignments=n, latency_us=s * (30.0 + n)) for n in (0, 100, 1000)] for s in (1.0, slow)]
    return Profile(devices=[Device(rank=g, node=f"node-{g // 2}", samples=samples[g == 1]) for g in range(RANKS)])


def follow(placement: Placement, policy: Policy, slow: float = 1.0) -> Controller:
    nearest = placement.split is Split.NEAREST
    return Controller(
        profile(slow) if nearest else cost(slow), placement, policy, senders="uniform" if nearest else None
    )


def total(placement: Placement, counts: np.ndarray, slow: float = 1.0) -> float:
    senders = "uniform" if placement.split is Split.NEAREST else None
    return evaluate(placement, profile(slow), Traces(counts=counts), cost=cost(slow), senders=senders).objective_us


@pytest.mark.parametrize("split", COPIED)
@pytest.mark.parametrize("seed", range(4))
def test_decisions_gain_what_evaluate_says(split: Split, seed: int) -> None:
    """On one window, which is then all that is remembered, in force and promised are what `evaluate` makes of them."""
    before, counts = copied(split, seed), traffic(0, 64, seed)
    controller = follow(before, Policy(expert_bytes=1e4, plan_steps=1024), 1.2)
    decision = controller.step(counts)
    assert decision.num_moves > 0 and decision.placement.split is split
    gained = (total(before, counts, 1.2) - total(decision.placement, counts, 1.2)) / 64
    assert gained > 0 and decision.gain_us == pytest.approx(gained, rel=0.15)
    quiet = [layer for layer in range(LAYERS) if layer not in decision.moves]
    for layer in quiet if split is Split.STATIC else []:
        assert (decision.placement.split_weights[layer] == before.split_weights[layer]).all()


def test_static_weights_travel_with_their_copies() -> None:
    before, counts = copied(Split.STATIC), traffic(0, 64)[:, 0]
    problem = Problem.make(counts, cost().features, cost().latencies, before.slots_per_rank, split=Split.STATIC)
    way = few_moves(problem, before.physical_to_logical[0], weights_P=before.split_weights[0])
    assert len(way) > 2
    for point in way:
        assert point.weights is not None
        assert point.objective_us == pytest.approx(objective(problem, point.row, point.weights))
        pairs = sorted(zip(point.row.tolist(), point.weights.tolist(), strict=True))
        assert pairs == sorted(zip(way[0].row.tolist(), way[0].weights.tolist(), strict=True))
    assert way[-1].objective_us < way[0].objective_us


@pytest.mark.parametrize("split", COPIED)
def test_a_rank_that_fails_is_left(split: Split) -> None:
    controller = follow(copied(split, slots=8), Policy(dead_after_steps=8))
    counts = traffic(0, 16)
    silent = times(Placement.contiguous(LAYERS, EXPERTS, RANKS), counts)
    silent[:, 2] = np.nan
    decision = controller.step(counts, silent)
    assert "rank 2 has failed" in decision.reason
    assert (decision.placement.physical_to_logical[:, 16:24] == EMPTY).all()
    if split is Split.STATIC:
        assert (decision.placement.split_weights[:, 16:24] == 0).all()


def test_a_saved_controller_goes_on_with_its_weights(tmp_path: Path) -> None:
    one, two = (Controller(cost(), copied(Split.STATIC), Policy(expert_bytes=1e4)) for _ in range(2))
    one.step(traffic(0, 64))
    one.save(tmp_path / "state")
    two.load(tmp_path / "state")
    assert same(one.step(traffic(1, 64)), two.step(traffic(1, 64)))


def test_static_weights_without_copies_are_no_obstacle() -> None:
    """Experts go to empty slots, which had no weight."""
    given = copied(Split.STATIC)
    rows = np.full((LAYERS, RANKS, 6), EMPTY)
    rows[:, :, :4] = np.arange(EXPERTS).reshape(RANKS, 4)
    rows = rows.reshape(LAYERS, -1)
    given = given.changed(physical_to_logical=rows, split_weights=(rows != EMPTY).astype(float))
    assert Controller(cost(), given, Policy(expert_bytes=1e4)).step(traffic(0, 64)).num_moves > 0


def test_who_sends_to_nearest_copies_must_be_said(tmp_path: Path) -> None:
    given = copied(Split.NEAREST)
    with pytest.raises(InputError, match=r"counts do not say who sends.*--senders uniform"):
        Controller(profile(), given)
    with pytest.raises(InputError, match="node of every rank"):
        Controller(cost(), given, senders="uniform")
    with pytest.raises(InputError, match="even split does not ask"):
        Controller(profile(), copied(Split.EVEN), senders="uniform")
    with pytest.raises(InputError, match="counts do not say who sends"):
        Controller(profile(), copied(Split.EVEN)).confirm(given)
    Controller(profile(), given, senders="uniform").save(tmp_path / "state")
    with pytest.raises(InputError, match="counts do not say who sends"):
        Controller(profile(), copied(Split.EVEN)).load(tmp_path / "state")


@pytest.mark.parametrize("split", list(Split))
def test_fronts_of_moves_under_every_split(split: Split) -> None:
    """The best points are never dearer than the placement in force, which moves nothing; senders are taken as alike."""
    current, seen = copied(split), Traces(counts=traffic(0, 24))
    senders = "uniform" if split is Split.NEAREST else None
    points = moves_front(profile(), seen, current, holdout=0, time_limit=20, senders=senders)
    assert points[0].moves == 0 and len(points) > 2
    expected = evaluate(current, profile(), seen, senders=senders).objective_us / 24
    assert points[0].step_us == pytest.approx(expected)
    assert all(
        later.step_us <= earlier.step_us * (1 + 1e-9) for earlier, later in zip(points, points[1:], strict=False)
    )
    assert points[-1].step_us < points[0].step_us

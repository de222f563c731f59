"""Strategies under replay: what they see and when they decide, engines' periods, failures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from replayed import EXPERTS, FREE, LAYERS, RANKS, WINDOW, Scripted, layer_us, profile, shifting

from gemopt.costs import fit
from gemopt.evaluate import evaluate
from gemopt.exceptions import InputError
from gemopt.placement import Placement, Split
from gemopt.profile import Profile
from gemopt.replay import STRATEGIES, Context, Migration, Schedule, replay, strategy
from gemopt.replay.strategies import Eplb, make
from gemopt.rules import Rules
from gemopt.solvers import get
from gemopt.solvers.base import Options


def test_a_strategy_is_called_at_least_every_step_or_refused() -> None:
    lazy = Scripted({})
    lazy.period = 0
    with pytest.raises(InputError, match="at least 1 step"):
        replay(profile(), shifting(), [lazy], window=WINDOW)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "clairvoyant"])
def test_nobody_sees_the_future(name: str) -> None:
    """Whatever comes later, what was decided before is the same; only the clairvoyant strategy may differ."""
    cut, traces = 70, shifting()
    later = np.array(traces.counts)
    later[cut:] = later[cut:, :, ::-1]

    def steps_us(strategy: str, counts: np.ndarray) -> list[float]:
        found = replay(profile(), replace(traces, counts=counts), [strategy], window=WINDOW, migration=FREE)
        return found.timeline[0].step_us[: cut - 48]

    assert steps_us(name, later) == steps_us(name, traces.counts)
    assert steps_us("clairvoyant", later) != steps_us("clairvoyant", traces.counts)


def test_foresight_is_best_and_following_helps() -> None:
    result = replay(profile(), shifting(), window=WINDOW, migration=FREE)
    cost = {row.strategy: row.makespan_us for row in result.rows}
    assert min(cost, key=lambda name: cost[name]) == "clairvoyant"
    assert cost["free"] < cost["fitted-once"]
    assert result.row("free").moves > 0


def test_what_one_replay_solved_the_next_does_not_search_for(monkeypatch: pytest.MonkeyPatch) -> None:
    names, asked = ("contiguous", "fitted-once", "free", "clairvoyant"), []
    solve_rows = strategy.solve_rows
    monkeypatch.setattr(strategy, "solve_rows", lambda problems, **how: asked.append(0) or solve_rows(problems, **how))
    alone = {name: replay(profile(), shifting(), [name], window=WINDOW).timeline[0] for name in names}
    apart, solved = len(asked), {}
    asked.clear()
    first = replay(profile(), shifting(), names, window=WINDOW, solved=solved)
    assert 0 < len(asked) < apart - 2 and {track.strategy: track for track in first.timeline} == alone
    asked.clear()
    slower = replay(profile(), shifting(), names, window=WINDOW, solved=solved, migration=Migration(bytes_per_s=1e6))
    assert not asked and slower.row("free").makespan_us != first.row("free").makespan_us
    replay(profile(), shifting(seed=1), ["fitted-once"], window=WINDOW, solved=solved)
    replay(profile(), shifting(), ["fitted-once"], window=WINDOW, solved=solved, slots_per_rank=3)
    replay(profile(), shifting(), ["fitted-once"], window=WINDOW, solved=solved, seed=1)
    assert len(asked) == 3
    for _ in range(2):
        apart = Rules(apart=[{"experts": [0, 1]}])
        replay(profile(), shifting(), ["fitted-once"], window=WINDOW, solved=solved, rules=apart)
    assert len(asked) == 4


def test_same_seed_same_replay() -> None:
    first, again = (replay(profile(), shifting(), window=WINDOW, noise=0.05, seed=3) for _ in range(2))
    assert first == again


@pytest.mark.parametrize(("fit", "due"), [(0.5, [60, 90]), (0.25, [30, 60, 90])])
def test_eplb_rearranges_at_the_steps_of_the_engine(fit: float, due: list[int]) -> None:
    """Every 30 steps of the engine, on the last 20, whatever the part that others are fitted on."""
    traces = shifting()
    strategy = Eplb("eplb", window=20, interval=30, first=30, stops=False)
    result = replay(profile(), traces, [strategy], window=WINDOW, fit=fit, migration=FREE)
    assert [decision.step for decision in result.timeline[0].decisions] == due
    context = strategy.context
    problems = context.problems(traces.counts[70:90])
    rows = [get("eplb").solve(problem, Options(deadline=np.inf), None).row for problem in problems]
    assert result.timeline[0].step_us[-1] == pytest.approx(layer_us(traces, np.stack(rows))[-1].sum())  # type: ignore[arg-type]


def test_engines_start_with_the_first_experts_again_in_spare_slots() -> None:
    eplb = make(["eplb-vllm"])[0]
    result = replay(profile(), shifting(), [eplb], window=WINDOW, slots_per_rank=3)
    row = np.arange(3 * RANKS) % EXPERTS
    placement = Placement(physical_to_logical=[row] * LAYERS, slots_per_rank=[3] * RANKS, num_experts=EXPERTS)
    held = shifting().steps(slice(48, None))
    assert result.rows[0].makespan_us == pytest.approx(evaluate(placement, profile(), held).objective_us)


def test_engines_keep_their_published_periods() -> None:
    vllm, sglang = make(["eplb-vllm", "eplb-sglang"])
    assert isinstance(vllm, Eplb) and isinstance(sglang, Eplb)
    assert (vllm.window, vllm.first_step, vllm.interval, vllm.stops) == (1000, 750, 3000, False)
    assert (sglang.window, sglang.first_step, sglang.interval, sglang.stops) == (1000, 1000, 1000, True)


def test_first_call_is_given_the_window_before() -> None:
    strategy = Scripted({})
    replay(profile(), shifting(), [strategy], window=WINDOW)
    assert strategy.lengths[:3] == [WINDOW, 1, 1]


@pytest.mark.parametrize("slots", [None, 3])
def test_every_strategy_survives_a_failure(slots: int | None) -> None:
    schedule = Schedule.parse(["0:fail@55-70", "3:1.5@60", "1:fail@80"])
    result = replay(profile(), shifting(), window=WINDOW, slots_per_rank=slots, throttle=schedule, migration=FREE)
    assert all(np.isfinite(track.step_us).all() and min(track.step_us) > 0 for track in result.timeline)
    assert {row.strategy for row in result.rows} == set(STRATEGIES)


def test_a_strategy_that_wants_other_slots_is_refused() -> None:
    class Greedy(Scripted):
        def observe(self, counts_NLE: np.ndarray, latencies_NG: np.ndarray) -> Placement | None:
            return self.context.placement([np.arange(EXPERTS)] * LAYERS, np.array([5, 1, 1, 1]))

    with pytest.raises(InputError, match="slots per rank"):
        replay(profile(), shifting(), [Greedy({})], window=WINDOW)


def test_copies_may_share_by_who_is_nearest() -> None:
    """What is in force is scored as `evaluate` scores it, by every strategy that decides as well."""
    nodes = Profile(devices=[each.model_copy(update={"node": f"node-{each.rank // 2}"}) for each in profile().devices])
    traces, nearest = shifting(), {"split": "nearest", "senders": "uniform"}
    names = ["contiguous", "copies", "controller", "free", "clairvoyant", "eplb-sglang"]
    options = {"window": WINDOW, "fit": 0.25, "slots_per_rank": 3, "migration": FREE}
    result = replay(nodes, traces, names, throttle=Schedule.parse(["1:fail@60-70"]), **options, **nearest)
    assert all(row.makespan_us > 0 for row in result.rows)
    result = replay(nodes, traces, names, **options, **nearest)
    cost, held = fit(nodes)[0], traces.steps(slice(24, None))
    context = Context(nodes, cost, traces.steps(slice(0, 24)), np.full(RANKS, 3), WINDOW, 0, FREE, split=Split.NEAREST)
    assert context.fitted.has_copies and context.fitted.split is Split.NEAREST
    scored = evaluate(context.fitted, nodes, held, cost=cost, senders="uniform")
    assert result.row("copies").makespan_us == pytest.approx(scored.objective_us)
    assert result.row("clairvoyant").makespan_us < min(result.row(name).makespan_us for name in names[1:4])
    assert result.row("controller").moves > 0
    assert replay(nodes, traces, ["copies"], **options).rows[0].makespan_us != result.row("copies").makespan_us


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"split": "nearest"}, "senders: got nothing; strategies see counts"),
        ({"split": "nearest", "senders": "traces"}, "senders: got traces"),
        ({"senders": "uniform"}, "senders: got uniform; the even split does not ask"),
        ({"split": "optimal"}, "split: got optimal; replay shares copies even or nearest"),
        ({"split": "nearest", "senders": "uniform", "strategies": ["duplication-all-past"]}, "split of its own"),
    ],
)
def test_other_splits_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        replay(profile(), shifting(), **{"strategies": ["copies"], "slots_per_rank": 3, **options})

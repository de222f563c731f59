"""The judge: copying, lags, stalls and schedules against sums by hand; nothing sees the future."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from replayed import EXPERTS, FREE, LAYERS, RANKS, STEPS, WINDOW, Scripted, layer_us, profile, shifting, swapped
from timed import timed

from gemopt.costs import fit
from gemopt.evaluate import evaluate
from gemopt.exceptions import InputError
from gemopt.migration import count_moves
from gemopt.placement import Placement
from gemopt.profile import Device, Profile, Sample
from gemopt.replay import Context, Migration, Schedule, replay
from gemopt.replay.copying import traffic
from gemopt.replay.survivors import evacuate, readmit
from gemopt.traces import Traces


def test_without_moves_the_makespan_is_that_of_evaluate() -> None:
    traces = shifting()
    result = replay(profile(), traces, ["contiguous", "fitted-once"], window=WINDOW, fit=0.25)
    held = traces.steps(slice(24, None))
    contiguous = Placement.contiguous(LAYERS, EXPERTS, RANKS)
    scored = evaluate(contiguous, profile(), held)
    row = result.row("contiguous")
    assert row.makespan_us == pytest.approx(scored.objective_us)
    assert row.p99_us == pytest.approx(scored.quantile_us(0.99))
    assert (row.change, row.moves, row.migration_us, row.ttft_ms) == (0, 0, 0, None)
    assert row.tpot_ms == pytest.approx(scored.step_us.mean() / 1e3)
    fitted = Context(
        profile(), fit(profile())[0], traces.steps(slice(0, 24)), contiguous.slots_per_rank, WINDOW, 0, FREE
    ).fitted
    assert result.row("fitted-once").makespan_us == pytest.approx(evaluate(fitted, profile(), held).objective_us)
    assert result.row("fitted-once").change == pytest.approx(
        result.row("fitted-once").makespan_us / row.makespan_us - 1
    )


def test_contiguous_changes_nothing_against_itself() -> None:
    """However the times of its steps are rounded when they are added up."""
    odd = timed(range(RANKS), lambda n, g: (10.0 + n / 7) * (1 + g / 10))
    assert replay(odd, shifting(steps=1500), ["contiguous"]).rows[0].change == 0


def test_copying_lags_slows_and_stalls() -> None:
    """Two layers, one expert in and out of two ranks each: the first is on its way for two and a half steps."""
    traces = shifting()
    before, after = layer_us(traces, swapped()), layer_us(traces, swapped(0, 1))
    first, slower, commit_us = 48, 0.25, 7.0
    work = before[first:].sum(axis=1)
    transfer_us = 1.25 * (work[0] + work[1] + 0.5 * work[2])
    migration = Migration(
        expert_bytes=transfer_us, bytes_per_s=1e6, slowdown=slower, commit_us=commit_us, batch_bytes=0
    )
    strategy = Scripted({0: swapped(0, 1)})
    result = replay(profile(), traces, [strategy], window=WINDOW, migration=migration)
    track = result.timeline[0]
    assert track.moves[:8] == [2, 0, 0, 2, 0, 0, 0, 0]
    expected = [slower * work[0], slower * work[1], slower * 0.5 * work[2]]
    assert track.copying_us[:3] == pytest.approx(expected)
    assert track.step_us[:3] == pytest.approx((work[:3] + expected).tolist())
    mixed = after[first + 3 :, 0] + before[first + 3 :, 1]  # the first layer is in force, the second on its way
    assert track.copying_us[3] == pytest.approx(commit_us + slower * mixed[0])
    assert track.step_us[3] == pytest.approx(mixed[0] * (1 + slower) + commit_us)
    assert track.step_us[10:] == pytest.approx(after[first + 10 :].sum(axis=1).tolist())
    assert result.rows[0].moves == 4
    assert result.rows[0].migration_us == pytest.approx(sum(track.copying_us))
    assert sum(track.copying_us) == pytest.approx(2 * commit_us + 2 * transfer_us * slower / (1 + slower))
    assert [decision.step for decision in track.decisions] == [first]


def test_layers_that_fit_are_copied_together_and_committed_at_once() -> None:
    """Each rank of two receives one expert in each of two layers: two experts' time, one commit. An engine that has
    room for one layer takes as long, and commits twice."""
    traces = shifting()
    before, after = layer_us(traces, swapped())[48:], layer_us(traces, swapped(0, 1))[48:]
    migration = Migration(expert_bytes=50, bytes_per_s=1e6, slowdown=0, commit_us=7.0, batch_bytes=100)
    strategies = [Scripted({0: swapped(0, 1)}, name=name) for name in ("together", "layerwise")]
    strategies[1].layerwise = True
    result = replay(profile(), traces, strategies, window=WINDOW, migration=migration)
    track = result.track("together")
    assert before[0].sum() >= 100, "both arrive within the first step"
    assert track.moves[:3] == [4, 0, 0] and track.copying_us[:3] == pytest.approx([0, 7, 0])
    assert track.step_us[:3] == pytest.approx([before[0].sum(), after[1].sum() + 7, after[2].sum()])
    other = result.track("layerwise")
    assert other.moves[:3] == [2, 2, 0] and other.copying_us[:4] == pytest.approx([0, 7, 7, 0])
    assert other.step_us[1] == pytest.approx(after[1, 0] + before[1, 1] + 7)


def test_transfers_go_on_during_the_time_outside_the_moe_layers() -> None:
    traces = shifting()
    migration = Migration(expert_bytes=1000, bytes_per_s=1e6, slowdown=0, commit_us=0)
    strategies = [Scripted({0: swapped(1)}) for _ in range(2)]
    alone = replay(profile(), traces, strategies[:1], window=WINDOW, migration=migration).timeline[0]
    beside = replay(profile(), traces, strategies[1:], window=WINDOW, migration=migration, non_moe_us=999.0).timeline[0]
    after = layer_us(traces, swapped(1))[48:].sum(axis=1)
    assert beside.step_us[1:] == pytest.approx(after[1:].tolist())
    before = layer_us(traces, swapped())[48:].sum(axis=1)
    assert before[:4].sum() < 1000 and before[1:4].tolist() != after[1:4].tolist()
    assert alone.step_us[:4] == pytest.approx(before[:4].tolist())


def test_stop_the_world_waits_for_everything() -> None:
    traces = shifting()
    after = layer_us(traces, swapped(0, 1))[48:].sum(axis=1)
    migration = Migration(expert_bytes=500, bytes_per_s=1e6, slowdown=0.5, commit_us=7)
    track = replay(profile(), traces, [Scripted({0: swapped(0, 1)}, stops=True)], window=WINDOW, migration=migration)
    assert track.timeline[0].copying_us[:2] == pytest.approx([2 * (500 + 7), 0])
    assert track.timeline[0].step_us == pytest.approx([after[0] + 1014, *after[1:]])


def test_giving_up_a_copy_is_a_change_without_a_move() -> None:
    slots = np.full(RANKS, 3)
    held = [[0, 1, 2], [3, 4, 5], [6, 7, -1], [0, -1, -1]]
    both = np.tile(np.concatenate(held), (LAYERS, 1))
    one = both.copy()
    one[:, 9] = -1

    class Twice(Scripted):
        def first(self, context: Context) -> Placement:
            return context.placement(list(both))

    traces = shifting()
    track = replay(profile(), traces, [Twice({0: one})], window=WINDOW, slots_per_rank=3, migration=FREE).timeline[0]
    placement = Placement(physical_to_logical=one, slots_per_rank=slots, num_experts=EXPERTS)
    alone = evaluate(placement, profile(), traces.steps(slice(48, None))).step_us
    assert track.step_us[2:] == pytest.approx(alone[2:].tolist())
    assert sum(track.moves) == 0 and len(track.decisions) == 1


@pytest.mark.parametrize("seed", range(20))
def test_evacuation_and_return_keep_every_expert(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slots = rng.integers(2, 5, RANKS)
    held: list[list[int]] = [[] for _ in range(RANKS)]
    for expert in rng.permutation(EXPERTS):
        held[rng.choice([g for g in range(RANKS) if len(held[g]) < slots[g]])].append(int(expert))
    for g in range(RANKS):  # some of the spare slots hold copies
        other = [e for e in range(EXPERTS) if e not in held[g]]
        held[g] += rng.choice(other, rng.integers(0, slots[g] - len(held[g]) + 1), replace=False).tolist()
    row = np.concatenate([[*part, *[-1] * (size - len(part))] for part, size in zip(held, slots, strict=True)])
    rank = int(rng.integers(RANKS))
    rows, without = evacuate([row.astype(np.int64)], slots, rank, rng.random((1, EXPERTS)))
    Placement(physical_to_logical=rows, slots_per_rank=without, num_experts=EXPERTS)
    assert without[rank] == 0
    back = readmit(rows, without, [row], slots, rank)
    Placement(physical_to_logical=back, slots_per_rank=slots, num_experts=EXPERTS)
    mixed = rng.permutation(rows[0])  # what a strategy may have made of it meanwhile, where that is a placement
    try:
        Placement(physical_to_logical=[mixed], slots_per_rank=without, num_experts=EXPERTS)
    except InputError:
        return
    again = readmit([mixed], without, [row], slots, rank)
    Placement(physical_to_logical=again, slots_per_rank=slots, num_experts=EXPERTS)


def test_a_later_decision_replaces_what_has_not_begun() -> None:
    """Layer 0 is on its way when layer 1, still waiting, is called off."""
    traces = shifting()
    migration = Migration(expert_bytes=1e4, bytes_per_s=1e6, slowdown=0, commit_us=0, batch_bytes=0)
    result = replay(
        profile(), traces, [Scripted({0: swapped(0, 1), 1: swapped(0)})], window=WINDOW, migration=migration
    )
    assert result.rows[0].moves == 2
    assert result.timeline[0].step_us[-1] == pytest.approx(layer_us(traces, swapped(0))[-1].sum())


def test_throttling_is_in_the_makespan_and_in_what_strategies_measure() -> None:
    traces = shifting()
    strategy = Scripted({})
    schedule = Schedule.parse(["1:3@60-80"])
    result = replay(profile(), traces, [strategy, "fitted-once", "clairvoyant"], window=WINDOW, throttle=schedule)
    calm = Scripted({})
    replay(profile(), traces, [calm], window=WINDOW)
    seen, usual = np.concatenate(strategy.latencies[1:]), np.concatenate(calm.latencies[1:])
    slow = np.arange(48, 95)
    slow = (slow >= 60) & (slow < 80)
    assert seen[slow, 1] == pytest.approx(3 * usual[slow, 1])
    assert seen[~slow] == pytest.approx(usual[~slow])
    assert seen[:, [0, 2, 3]] == pytest.approx(usual[:, [0, 2, 3]])
    throttled = np.array(result.track("fitted-once").step_us)[12:32]
    assert np.array(result.track("clairvoyant").step_us)[12:32].sum() < 0.8 * throttled.sum()


def test_a_failed_rank_holds_nothing_until_it_returns() -> None:
    traces = shifting()
    strategy = Scripted({})
    migration = Migration(expert_bytes=1e6, bytes_per_s=1e9, reload_bytes_per_s=1e8, commit_us=5)
    schedule = Schedule.parse(["2:fail@60-72"])
    result = replay(profile(), traces, [strategy], window=WINDOW, throttle=schedule, migration=migration)
    without, again = strategy.told
    assert without.slots_per_rank.tolist() == [3, 3, 0, 2]
    back = zip(swapped(), again.physical_to_logical, strict=True)
    assert [count_moves(home, row, again.slots_per_rank) for home, row in back] == [0, 0]
    track = result.timeline[0]
    assert [(decision.step, decision.reason) for decision in track.decisions] == [
        (60, "rank 2 failed"),
        (72, "rank 2 returned"),
    ]
    assert result.rows[0].moves == 2 * LAYERS * 2
    assert track.copying_us[12] == pytest.approx(LAYERS * 1e4 + 5)  # one expert for each of two ranks, from storage
    assert track.copying_us[24] == pytest.approx(LAYERS * 2e3 + 5)  # two experts back, over the links
    assert np.concatenate(strategy.latencies[1:])[12:24, 2].tolist() == [0] * 12
    assert track.step_us[-1] == pytest.approx(layer_us(traces, swapped())[-1].sum())
    during = evaluate(without, profile(), traces.steps(slice(61, 72))).step_us
    assert track.step_us[13:24] == pytest.approx(during.tolist(), rel=0.2)


def test_times_to_first_and_next_token_follow_the_phase() -> None:
    phase = np.array([0, 1, 1, 2] * (STEPS // 4))
    traces = shifting(phase=phase)
    result = replay(profile(), traces, ["contiguous"], window=WINDOW, non_moe_us=100.0)
    row, whole = result.rows[0], np.array(result.timeline[0].step_us) + 100.0
    assert row.ttft_ms == pytest.approx(whole[(phase != 1)[48:]].mean() / 1e3)
    assert row.tpot_ms == pytest.approx(whole[(phase != 0)[48:]].mean() / 1e3)
    assert row.p50_us == pytest.approx(np.quantile(whole, 0.5))
    assert row.makespan_us == pytest.approx(whole.sum() - 100.0 * len(whole))
    only = replay(profile(), replace(traces, phase=np.zeros(STEPS, int)), ["contiguous"], window=WINDOW).rows[0]
    assert only.tpot_ms is None


def test_of_two_holders_the_idle_one_sends() -> None:
    slots = np.array([2, 2, 2])
    in_G, out_G = traffic(np.array([0, 1, 0, 2, 3, -1]), np.array([0, 1, 0, 2, 3, 0]), slots, slots)
    assert (in_G.tolist(), sorted(out_G.tolist())) == ([0, 0, 1], [0, 0, 1])
    before, after = np.array([0, 1, 0, 2, 3, -1]), np.array([0, 1, 0, 3, 2, 0])
    assert [each.tolist() for each in traffic(before, after, slots, slots)] == [[0, 1, 2], [1, 1, 1]]


@pytest.mark.parametrize(
    ("events", "said"),
    [
        (["9:1.3@50"], "ranks 0 to 3"),
        (["1:1.3@96"], "steps of the traces, 0 to 95"),
        (["1:1.3@60-60"], "start before stop"),
        (["1:fail@10-60"], "from step 48 on"),
        (["1:fail@50-60", "1:1.2@55"], "overlaps"),
        (["1:fail@50-60", "2:fail@55"], "one failed rank at a time"),
        (["1:0@50"], "above 0"),
        (["1:x@50"], "RANK:FACTOR@START-STOP"),
        (["1:2000@50"], "at most 1000"),
    ],
)
def test_schedules_that_cannot_be(events: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        replay(profile(), shifting(), ["contiguous"], window=WINDOW, throttle=Schedule.parse(events))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"window": 49}, "got 48 steps to score; at least the 49 of a window"),
        ({"window": 0}, "a whole number of at least 1"),
        ({"fit": 0.0}, "strictly between"),
        ({"fit": 1.0}, "strictly between"),
        ({"fit": float("nan")}, "strictly between"),
        ({"fit": 0.999}, "cannot be split"),
        ({"non_moe_us": -1.0}, "microseconds from 0"),
        ({"noise": 2.0}, "from 0 to 1"),
        ({"seed": -1}, "a whole number of at least 0"),
        ({"strategies": ["eplb-vllm"], "slots_per_rank": [3, 2, 2, 2]}, "same for every rank"),
        ({"strategies": ["free", "free"]}, "each once"),
        ({"strategies": ["fred"]}, "some of contiguous"),
        ({"strategies": []}, "at least one"),
    ],
)
def test_what_cannot_be_replayed(fields: dict[str, Any], said: str) -> None:
    given = {"strategies": ["contiguous"], "window": WINDOW, **fields}
    with pytest.raises(InputError, match=said):
        replay(profile(), shifting(), **given)


@pytest.mark.parametrize("event", ["1:fail@65-67", "1:fail@71", "1:2@64-90"])
def test_the_clairvoyant_pays_for_nothing_and_nobody_beats_it(event: str) -> None:
    """Not even where a rank fails within one of its windows: what it lost is there again at no cost."""
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(8, 0.5), size=2)
    traces = Traces(counts=np.stack([rng.multinomial(200, each, size=128) for each in share], axis=1))
    samples = [Sample(assignments=n, latency_us=20.0 + n) for n in (0, 8, 512)]
    made = Profile(devices=[Device(rank=rank, samples=samples) for rank in range(4)])
    names = ["contiguous", "fitted-once", "free", "clairvoyant"]
    result = replay(made, traces, names, window=16, throttle=Schedule.parse([event]))
    assert result.row("clairvoyant").migration_us == 0
    assert result.row("clairvoyant").makespan_us == min(row.makespan_us for row in result.rows)

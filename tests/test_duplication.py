"""Copies per batch: sums by hand, prices, MoE-GPS's algorithm, and nobody sees the future."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from timed import timed

from gemopt.exceptions import InputError
from gemopt.latency import ASSIGNMENTS, Latency, line, pack
from gemopt.problem import Problem
from gemopt.profile import Profile
from gemopt.replay import Migration, Schedule, replay
from gemopt.replay.duplication import Duplicated, homes
from gemopt.replay.moe_gps import as_planned, greedy
from gemopt.replay.spreading import Price, copying_us, saved_us, spread, times_of
from gemopt.traces import Traces

GRATIS = Price(0.0, 0.0, 0.0, 0.0, 1.0)
FREE = Migration(expert_bytes=1e-6, slowdown=0, commit_us=0, bytes_per_s=1e15)
HOME_E = np.array([0, 0, 1, 1])


def ranks(*slopes: float) -> tuple[np.ndarray, object]:
    """Table of assignments, and latencies of 10 us plus so much for each assignment."""
    table_FN = ASSIGNMENTS.of(np.arange(2000)).astype(np.float64)[None]
    return table_FN, pack([Latency(((line(10.0, slope),),)) for slope in slopes])


def profile(*slower: float) -> Profile:
    return timed(slower, lambda n, s: (10.0 + n) * s)


def skewed(steps: int = 96, layers: int = 2, seed: int = 0) -> Traces:
    rng = np.random.default_rng(seed)
    share = np.stack([rng.permutation([8, 3, 1, 1, 1, 1, 1, 1]) / 17 for _ in range(layers)])
    return Traces(counts=np.stack([rng.multinomial(128, share) for _ in range(steps)]))


def test_greedy_moves_half_the_difference_of_the_hottest() -> None:
    x_GE, used_GE = greedy(np.array([60, 20, 10, 10]), HOME_E, np.array([1, 1]))
    assert x_GE.tolist() == [[30, 20, 0, 0], [30, 0, 10, 10]]
    assert used_GE.tolist() == [[False] * 4, [True, False, False, False]]
    nothing, none = greedy(np.array([60, 20, 10, 10]), HOME_E, np.array([1, 0]))
    assert nothing.sum(axis=1).tolist() == [80, 20] and not none.any()


def test_real_assignments_follow_the_plan_and_none_is_lost() -> None:
    plan = np.array([[30, 20, 0, 0], [30, 0, 10, 0]])
    x_GE = as_planned(np.array([7, 5, 4, 3]), plan, HOME_E)
    assert x_GE.sum(axis=0).tolist() == [7, 5, 4, 3]
    assert x_GE[:, 0].tolist() in ([4, 3], [3, 4]) and x_GE[:, 3].tolist() == [0, 3]


def test_spread_balances_latencies_rather_than_assignments() -> None:
    given = ranks(1.0, 3.0)
    counts = np.array([60, 20, 10, 10])
    none = np.zeros((2, 4), bool)
    x_GE, used_GE = spread(counts, HOME_E, none, np.array([1, 1]), True, GRATIS, *given)
    times_G = times_of(x_GE, *given)
    assert x_GE.sum(axis=0).tolist() == counts.tolist()
    by_tokens = times_of(greedy(counts, HOME_E, np.array([1, 1]))[0], *given)
    assert times_G.max() <= 90 and by_tokens.max() == 160  # 80 at home: no copy helps the fast rank
    assert not used_GE[:, [1, 2, 3]].any()
    fixed, _ = spread(counts, HOME_E, none, np.array([1, 1]), False, GRATIS, *given)
    assert fixed[0].tolist() == [60, 20, 0, 0]  # nothing may be copied, and nothing is there


def test_copies_are_dear_until_they_are_there() -> None:
    given = ranks(1.0, 1.0)
    counts, none, slots = np.array([60, 20, 10, 10]), np.zeros((2, 4), bool), np.array([1, 1])
    dear = Price(1000.0, 0.0, 0.0, 0.0, 1.0)
    _, used = spread(counts, HOME_E, none, slots, True, dear, *given)
    assert not used.any()
    there = none.copy()
    there[1, 0] = True
    x_GE, used = spread(counts, HOME_E, there, slots, True, dear, *given)
    assert used[1, 0] and used.sum() == 1
    assert abs(times_of(x_GE, *given).max() - 60) <= 1
    assert saved_us(counts[None], HOME_E, none, there, slots, dear, *given) == pytest.approx(30, abs=1)


def test_what_copying_adds() -> None:
    price = Price(100.0, 150.0, 0.05, 10.0, 1.0)
    one, two = np.array([0, 1]), np.array([2, 0])
    assert copying_us(one, np.array([1, 0]), price) == pytest.approx(0.05 * 100 + 10)  # all of it hidden
    assert copying_us(one, two, price) == pytest.approx(200 - 150 + 0.05 * 150 + 10)  # the sender is the slower
    assert copying_us(np.zeros(2, int), np.zeros(2, int), price) == 0


def test_copies_that_cost_nothing_beat_the_plain_algorithm_where_ranks_differ() -> None:
    traces, uneven = skewed(), profile(1.0, 1.0, 1.5, 1.0)
    both = [Duplicated("all-past", method=m, contiguous=True, name=m) for m in ("greedy", "latency")]
    result = replay(uneven, traces, both, window=16, slots_per_rank=3, migration=FREE)
    theirs, ours = result.rows
    assert ours.change is not None and theirs.change is not None
    assert ours.change < theirs.change - 0.02
    assert ours.migration_us < 1e-9 and ours.moves > 0


def test_knowing_the_batch_is_worth_something_and_both_split_by_latency() -> None:
    traces, uneven = skewed(), profile(1.0, 1.0, 1.5, 1.0)
    three = [Duplicated("all-past", method=m, contiguous=True, name=m) for m in ("greedy", "planned", "latency")]
    theirs, planned, ours = replay(uneven, traces, three, window=16, slots_per_rank=3, migration=FREE).rows
    assert ours.makespan_us < planned.makespan_us < theirs.makespan_us
    assert planned.moves == ours.moves
    with pytest.raises(InputError, match="method: got best; one of latency, planned, greedy"):
        Duplicated("all-past", method="best")


def test_copies_travel_beside_the_steps_and_are_there_when_they_have_arrived() -> None:
    """Links that take as long for a copy as for many steps: the old copies serve, every step a little slower."""
    traces, uneven = skewed(400, layers=1), profile(1.0, 1.0, 1.5, 1.0)
    slow = Migration(expert_bytes=1e6, bytes_per_s=1e9, slowdown=0.05, commit_us=7.0)  # 1000 us an expert
    result = replay(uneven, traces, [Duplicated("all-past", contiguous=True)], window=16, slots_per_rank=3,
                    migration=slow)  # fmt: skip
    (track,) = result.timeline
    step_us, copying_us, base_us = map(np.array, (track.step_us, track.copying_us, result.baseline_us))
    began = int(np.flatnonzero(track.moves)[0])
    arrived = began + int(np.flatnonzero(copying_us[began:] >= 7.0)[0])
    assert base_us[began:arrived].sum() > 0.9 * 1000 * track.moves[began] / 4 and arrived > began + 3
    np.testing.assert_allclose((step_us - copying_us)[:arrived], base_us[:arrived])  # nothing is gained before
    assert np.allclose(copying_us[began : arrived - 1], 0.05 * base_us[began : arrived - 1])
    assert (step_us - copying_us)[arrived:].sum() < 0.9 * base_us[arrived:].sum()
    assert result.rows[0].change is not None and result.rows[0].change < -0.05


def test_copying_is_charged_and_then_avoided() -> None:
    traces, even = skewed(), profile(1.0, 1.0, 1.0, 1.0)
    slow = Migration(bytes_per_s=1e8)
    both = [Duplicated("window", method=m, contiguous=True, name=m) for m in ("greedy", "latency")]
    result = replay(even, replace(traces, counts=np.tile(traces.counts, (2, 1, 1))), both, window=16, slots_per_rank=3,
                    migration=slow)  # fmt: skip
    theirs, ours = result.rows
    assert theirs.moves > 0 and theirs.migration_us >= theirs.moves / 6 * slow.expert_bytes / slow.bytes_per_s * 1e6 / 6
    assert ours.makespan_us <= sum(result.baseline_us)
    assert theirs.makespan_us > sum(result.baseline_us)


def test_of_several_holders_one_with_little_at_home_is_home() -> None:
    """The split starts there: with every expert everywhere, all would start on the first rank."""
    slow = [Latency(((line(10.0, s),),)) for s in (1.0, 1.0, 2.0)]
    problem = Problem.make(np.array([[60, 30, 20, 10]]), (ASSIGNMENTS,), slow, [4, 4, 4])
    assert homes(np.ones((3, 4), bool), problem).tolist() == [0, 1, 2, 1]
    only_last = np.array([[0, 1, 1, 1], [0, 1, 1, 1], [1, 0, 0, 0]], bool)
    assert homes(only_last, problem).tolist() == [2, 0, 1, 1]


@pytest.mark.parametrize("predictor", ["window", "smoothing"])
def test_the_future_does_not_change_the_past(predictor: str) -> None:
    traces = skewed(160)
    cut = 120
    other = np.array(traces.counts)
    other[cut:] = other[cut:, :, ::-1]
    options = {"window": 16, "slots_per_rank": 3, "migration": Migration(bytes_per_s=1e12), "non_moe_us": 1000.0}
    tracks = [
        replay(profile(1.0, 1.1, 1.2, 1.0), each, [f"duplication-{predictor}"], **options).timeline[0]  # type: ignore[arg-type]
        for each in (traces, Traces(counts=other))
    ]
    scored = cut - 80
    assert tracks[0].step_us[:scored] == tracks[1].step_us[:scored]
    assert tracks[0].moves[:scored] == tracks[1].moves[:scored]
    assert tracks[0].step_us[scored:] != tracks[1].step_us[scored:]


def test_copies_are_by_name_and_need_spare_slots() -> None:
    traces, even = skewed(), profile(1.0, 1.0, 1.0, 1.0)
    rows = replay(even, traces, ["copies", "fitted-once"], window=16, slots_per_rank=3).rows
    assert rows[0].makespan_us == rows[1].makespan_us
    for name in ("copies", "duplication-all-past"):
        with pytest.raises(InputError, match="slots_per_rank"):
            replay(even, traces, [name], window=16)
    with pytest.raises(InputError, match=r"Traces\.ids: got nothing"):
        replay(even, traces, ["duplication-previous"], window=16, slots_per_rank=3)
    with pytest.raises(InputError, match="does not play failures"):
        replay(
            even, traces, ["duplication-all-past"], window=16, slots_per_rank=3, throttle=Schedule.parse(["1:fail@60"])
        )


def test_a_throttled_rank_slows_duplication_too() -> None:
    traces, even = skewed(), profile(1.0, 1.0, 1.0, 1.0)
    plain, slowed = (
        replay(
            even, traces, ["duplication-all-past"], window=16, slots_per_rank=3, throttle=Schedule.parse(events)
        ).rows[0]
        for events in ([], ["1:2@48"])
    )
    assert slowed.makespan_us > 1.3 * plain.makespan_us

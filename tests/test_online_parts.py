"""Memories, speeds, promises and sampling, each by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gemopt.latency import Latency, line
from gemopt.online.memories import NAMES, Memories, resample
from gemopt.online.planner import effective_steps
from gemopt.online.policy import TICK, Policy
from gemopt.online.promises import Promises
from gemopt.online.speeds import Speeds, first_medians, log_ratios
from gemopt.problem import Problem
from gemopt.solvers.search.moves import Waypoint

LAYERS, EXPERTS = 2, 12
FAST, SLOW, ALL, ALIKE = range(len(NAMES))


def tick(regime: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    shares_LE = np.random.default_rng(regime).dirichlet(np.full(EXPERTS, 0.6), size=LAYERS)
    return np.stack([rng.multinomial(300, share, size=TICK) for share in shares_LE], axis=1)


def memories(order: str, policy: Policy | None = None) -> tuple[Memories, list[int]]:
    """Memories of 20 ticks of each regime in turn, and the ticks at which a change was seen."""
    made, rng = Memories(policy or Policy(), LAYERS, EXPERTS), np.random.default_rng(0)
    changes = [n for n in range(20 * len(order)) if made.add(tick(ord(order[n // 20]), rng))]
    return made, changes


def test_changes_are_seen_at_once_and_only_then() -> None:
    assert memories("aaaaa")[1] == []
    assert memories("abacb")[1] == [20, 40, 60, 80]


def test_medians_of_the_first_values() -> None:
    values = np.random.default_rng(0).normal(size=33)
    assert first_medians(values).tolist() == [float(np.median(values[: n + 1])) for n in range(33)]


def test_what_comes_back_is_remembered() -> None:
    made, rng = memories("abb")[0], np.random.default_rng(9)
    assert made.add(tick(ord("a"), rng)) and made.recalled
    assert made.say[ALIKE] > 0.9
    of_a = made.last[: made.size] < 20
    assert made.weights()[of_a].sum() > 0.8
    assert memories("ab")[0].recalled is False


def test_of_settled_traffic_all_memories_tell_and_the_long_ones_best() -> None:
    say = memories("aaaaaa")[0].say
    assert say.sum() == pytest.approx(1) and say[ALL] > say[FAST] > 0


def test_all_of_what_comes_back_counts() -> None:
    """Not the few blocks that happen to lie nearest, and not the one that merging made largest."""
    for policy, blocks in ((None, 30), (Policy(keep_steps=40 * TICK), 5)):
        made, rng = memories("abab", policy)[0], np.random.default_rng(9)
        assert made.add(tick(ord("a"), rng)) and made.recalled
        assert 1 / (made.weights() ** 2).sum() > blocks


def test_merged_blocks_keep_rare_traffic() -> None:
    policy = Policy(keep_steps=40 * TICK)
    made = memories("b" + 9 * "a", policy)[0]
    assert made.size == 40 and made.steps.sum() == 200 * TICK
    rng = np.random.default_rng(5)
    made.add(tick(ord("b"), rng))
    assert made.recalled
    wanted = tick(ord("b"), rng).sum(axis=0).ravel() / (300 * TICK)
    found = made.weights() @ (made.sums[: made.size] / (300 * made.steps[: made.size, None]))
    assert np.abs(found - wanted).sum() < 0.2 * LAYERS
    assert made.counts.sum(axis=(1, 3)).max() == 300 * TICK  # steps of a merged block are whole steps


def test_a_merged_block_predicts_as_its_steps_did() -> None:
    """What a block stands for is in its weight, not in its loads as well."""
    some, many = memories("ab"), memories("ab", Policy(keep_steps=64))
    assert many[0].size == 8 < some[0].size
    rng = np.random.default_rng(3)
    sums = tick(ord("a"), rng).sum(axis=0).ravel().astype(np.float32)
    assert many[0]._misses(sums)[ALL] == pytest.approx(some[0]._misses(sums)[ALL], rel=0.1)


def test_lifetime_is_learnt_from_changes() -> None:
    assert memories("aaaa")[0].lifetime_steps > 3 * memories("abab")[0].lifetime_steps


def wandering(logits_TLE: np.ndarray[Any, Any], seed: int) -> Memories:
    """Memories of traffic with these logits at every tick."""
    made, rng = Memories(Policy(), LAYERS, EXPERTS), np.random.default_rng(seed)
    for logits_LE in logits_TLE:
        share_LE = np.exp(logits_LE) / np.exp(logits_LE).sum(axis=1, keepdims=True)
        made.add(np.stack([rng.multinomial(300, share, size=TICK) for share in share_LE], axis=1))
    return made


@pytest.mark.parametrize("seed", range(4))
def test_what_comes_and_goes_is_not_expected_to_last(seed: int) -> None:
    """The fast memory leads on both, but soon that is worth nothing where popularity only swings about its mean."""
    rng, size = np.random.default_rng(seed), (120, LAYERS, EXPERTS)
    swings, keeps = 0.5 * rng.standard_normal(size), np.exp(-TICK / 32)
    for before, now in zip(swings, swings[1:], strict=False):
        now[:] = keeps * before + 0.5 * np.sqrt(1 - keeps**2) * rng.standard_normal(size[1:])
    drifts = np.linspace(0, 1, size[0])[:, None, None] * rng.standard_normal(size[1:])
    swinging, drifting = wandering(swings, seed), wandering(drifts, seed)
    assert min(swinging.say[FAST], drifting.say[FAST]) > 0.45
    assert swinging.lifetime_steps < 80
    for lasting in (drifting, wandering(np.zeros(size), seed)):
        assert lasting.lifetime_steps == pytest.approx(size[0] * TICK + Policy().horizon_steps)


def test_how_long_a_lead_lasts_is_not_told_across_a_change() -> None:
    made = memories("ab")[0]
    assert made.add(tick(ord("a"), np.random.default_rng(0))) and len(made.foretold) == 0
    assert memories("a")[0].foretold.shape == (8, 3, LAYERS * EXPERTS)


def test_what_comes_back_is_expected_to_stay_as_long_as_before() -> None:
    made, rng = Memories(Policy(), LAYERS, EXPERTS), np.random.default_rng(0)
    for regime, ticks in (("a", 20), ("b", 2), ("a", 20), ("b", 1)):
        for _ in range(ticks):
            made.add(tick(ord(regime), rng))
    assert made.recalled and made.lifetime_steps < TICK  # it will have gone before that is seen
    made.add(tick(ord("b"), rng))
    made.add(tick(ord("a"), rng))
    assert made.recalled and made.lifetime_steps == pytest.approx((20 - 2) * TICK, abs=1)
    for _ in range(9):
        made.add(tick(ord("a"), rng))
    assert not made.recalled and made.lifetime_steps == (54 * TICK + Policy().horizon_steps) / 5


def test_new_traffic_that_surprises_twice_has_not_come_back() -> None:
    """A tick of it foretells the next one badly, which is no sign that it stays for a tick."""
    made, rng = Memories(Policy(), LAYERS, EXPERTS), np.random.default_rng(24)
    seen = [made.add(tick(ord(regime), rng)) for regime in 30 * "a" + 3 * "b"]
    assert seen.count(True) == made.changes == 3 and made.recalled
    assert made.starts.tolist() == [0, 30] and made.lifetime_steps == (33 * TICK + Policy().horizon_steps) / 4


def measured(factors: object, steps: int, rng: np.random.Generator, noise: float = 0.03) -> np.ndarray[Any, Any]:
    return 100.0 * np.asarray(factors) * np.exp(noise * rng.standard_normal((steps, 4)))


def test_noise_moves_no_speed() -> None:
    speeds, rng = Speeds(Policy(), 4), np.random.default_rng(0)
    for steps in (8, 64, 3, 1, 16) * 10:
        common = rng.uniform(0.7, 1.5)  # what all ranks share says nothing about any of them
        assert speeds.learn(log_ratios(common * measured([1, 1, 1, 1], steps, rng), np.full((steps, 4), 100.0))) == []


@pytest.mark.parametrize("steps", [4, 16, 64])
def test_throttling_is_seen_soon_and_forgotten_soon(steps: int) -> None:
    speeds, rng = Speeds(Policy(), 4), np.random.default_rng(1)
    for factor in (1.0, 1.3, 1.0):
        for _ in range(-(-64 // steps)):
            speeds.learn(log_ratios(measured([1, factor, 1, 1], steps, rng), np.full((steps, 4), 100.0)))
        assert speeds.factors_G == pytest.approx([1, factor, 1, 1], rel=0.03)


def test_a_slow_rank_is_seen_through_noise_and_measured_without_bias() -> None:
    """By steps with 15 % of noise; the median of four ranks leans to the one that is slow."""
    waits, levels = [], []
    for seed in range(20):
        speeds, rng = Speeds(Policy(), 4), np.random.default_rng(seed)
        ratios = log_ratios(measured([1, 1, 1, 1], 196, rng, 0.15), np.full((196, 4), 100.0))
        ratios[100:, 1] += np.log(1.5)
        seen = [bool(speeds.learn(ratios[start : start + 4])) for start in range(0, 196, 4)]
        assert not any(seen[:25])
        waits.append(4 * (seen.index(True) - 24))
        levels.append(np.log(speeds.factors_G[1]))
    assert np.mean(waits) < 14
    assert np.exp(np.mean(levels)) == pytest.approx(1.5, rel=0.03)


def test_of_three_ranks_the_median_one_says_nothing_of_noise() -> None:
    """It is where all are, whatever its noise; where that counted as no noise, both seeds gave false alarms."""
    for seed, steps in ((1, 13864), (3, 12712)):
        speeds, rng = Speeds(Policy(), 3), np.random.default_rng(seed)
        assert not any(speeds.learn(0.1 * rng.standard_normal((8, 3))) for _ in range(0, steps, 8))
        noise = 0.1 * rng.standard_normal((32, 3))
        assert speeds.learn(noise + np.log([1, 1.5, 1])) == [1]


def test_latencies_rounded_to_two_values_are_noise_all_the_same() -> None:
    """Those that differ from the others are all alike; where nothing else was noise, a rank between two was off."""
    off_N = 0.1 * np.array([0, 1, 0, 1, 1, 1, 0, 1])
    assert not Speeds(Policy(), 4).learn(np.outer(off_N, [1, 0, 0, 0]))
    assert Speeds(Policy(), 4).learn(np.outer(0.1 * (np.arange(16) >= 8), [1, 0, 0, 0])) == [0]


def test_what_was_seen_soon_is_measured_again() -> None:
    soon, later = [], []
    for seed in range(20):
        speeds, rng = Speeds(Policy(), 4), np.random.default_rng(seed)
        ratios = log_ratios(measured([1, 1.5, 1, 1], 64, rng, 0.15), np.full((64, 4), 100.0))
        at = next(n for n in range(4, 64, 4) if speeds.learn(ratios[n - 4 : n]))
        soon.append(np.log(speeds.factors_G[1] / 1.5))
        news = [speeds.learn(ratios[n - 4 : n]) for n in range(at + 4, 65, 4)]
        assert sum(map(len, news)) <= 1
        later.append(np.log(speeds.factors_G[1] / 1.5))
    assert np.std(later) < 0.7 * np.std(soon)


def test_noise_that_lasts_is_no_change() -> None:
    """Neighbours that are alike tell less than their number says."""
    rng, steps, ranks, alike = np.random.default_rng(0), 2000, 16, 0.3
    noise = rng.standard_normal((steps, ranks))
    for before, now in zip(noise, noise[1:], strict=False):
        now[:] = alike * before + np.sqrt(1 - alike**2) * now
    speeds = Speeds(Policy(), ranks)
    assert sum(len(speeds.learn(0.1 * noise[start : start + 8])) for start in range(0, steps, 8)) <= 8


def test_a_change_leaves_nothing_of_the_level_before() -> None:
    speeds, quiet = Speeds(Policy(), 4), np.zeros((40, 4))
    speeds.learn(quiet)
    slow = np.tile([0.0, 0.4, 0.0, 0.0], (8, 1))
    assert speeds.learn(slow) == [1]
    assert [speeds.learn(slow) for _ in range(8)] == [[]] * 8
    assert speeds.factors_G == pytest.approx(np.exp([0.0, 0.4, 0.0, 0.0]))
    assert speeds.learn(quiet[:8]) == [1]
    assert speeds.factors_G == pytest.approx(1.0)


def test_ranks_that_all_slow_down_one_by_one_are_as_fast_as_each_other_again() -> None:
    """Costs are of the fleet: what all ranks share, by and by, would else stay in them, and grow with every alarm."""
    speeds, slow = Speeds(Policy(), 5), np.zeros((16, 5))
    for rank in range(5):
        slow[:, rank] = 0.4
        for _ in range(4):
            speeds.learn(slow)
        assert speeds.relative_G == pytest.approx(np.exp(slow[0] - np.median(slow[0])))
    speeds.learn(slow - 0.4)
    assert speeds.relative_G == pytest.approx(1.0)


def test_half_of_the_ranks_leave_the_others_as_they_were() -> None:
    speeds, slow = Speeds(Policy(), 4), np.zeros((16, 4))
    for rank in range(2):
        slow[:, rank] = 0.4
        speeds.learn(slow)
    assert speeds.relative_G == pytest.approx(np.exp(slow[0]))


def test_silence_counts_only_while_others_speak() -> None:
    speeds = Speeds(Policy(dead_after_steps=4), 3)
    speeds.listen(np.full((9, 3), np.nan))
    assert not speeds.failed_G.any()
    speeds.listen(np.array([[1.0, np.nan, 1.0]] * 3))
    assert not speeds.failed_G.any()
    speeds.listen(np.array([[1.0, 0.0, 1.0]]))
    assert speeds.failed_G.tolist() == [False, True, False]


def test_slower_keeps_the_shape() -> None:
    latency = Latency(((line(10.0, 0.5),), (line(20.0, 0.1),)))
    loads = [np.arange(100.0)]
    assert latency.times(1.3)(loads) == pytest.approx(1.3 * latency(loads))


def test_a_sample_stands_for_the_whole() -> None:
    weights = np.random.default_rng(0).dirichlet(np.full(500, 0.3))
    index, found = resample(weights, 64)
    assert len(index) <= 64 and found.sum() == pytest.approx(1)
    values = np.sin(np.arange(500) / 40)
    assert values[index] @ found == pytest.approx(values @ weights, abs=0.05)
    assert effective_steps(np.ones(7)) == pytest.approx(7)
    assert resample(np.ones(5), 64)[1] == pytest.approx(np.full(5, 0.2))


def test_broken_promises_raise_what_a_swap_must_promise() -> None:
    policy = Policy(least_gain=0.01)
    promises, rng = Promises(policy, 4), np.random.default_rng(0)
    problem = Problem.make(rng.integers(1, 9, (64, 4)), [_assignments()], [Latency(((line(9.0, 1.0),),))] * 2)
    assert promises.least(64) == pytest.approx(0.01)
    assert promises.least(16) == pytest.approx(0.02)
    for _ in range(40):
        promises.forget(4)
        point = Waypoint(np.arange(4), 0.0, 0)
        promises.make(0, point, point, 0.05, 2, 64.0)  # keeps nothing of 5 %
        promises.check([problem])
    assert 0.0125 < promises.least(64) < 0.025  # 2.5 % per swap, weighed against the policy's 1 %


def _assignments() -> Any:
    from gemopt.latency import ASSIGNMENTS

    return ASSIGNMENTS


def test_ranks_that_often_say_nothing_are_as_slow_as_they_are() -> None:
    """Of two ranks that report the median is the mean, which would halve what sets one apart from the other."""
    speeds, rng = Speeds(Policy(dead_after_steps=10**6), 4), np.random.default_rng(0)
    predicted = np.full((256, 4), 100.0)
    measured = predicted * [1.0, 1.3, 1.0, 1.0]
    measured[rng.random(measured.shape) < 0.6] = np.nan
    for start in range(0, 256, 16):
        part = slice(start, start + 16)
        speeds.take(measured[part], log_ratios(measured[part], predicted[part]))
    assert speeds.factors_G == pytest.approx([1.0, 1.3, 1.0, 1.0])
    pair = Speeds(Policy(), 2)
    both = predicted[:16, :2] * [1.0, 1.3]
    pair.take(both, log_ratios(both, predicted[:16, :2]))
    assert pair.factors_G[1] / pair.factors_G[0] == pytest.approx(1.3)

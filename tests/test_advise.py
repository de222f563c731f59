"""Advice: what it says, on which steps it is judged, and what it refuses."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from advised import EXPERTS, RANKS, SHAPE, even, profile, skewed

from gemopt.advise import Advice, ModelShape, advise
from gemopt.advise.advisor import _warnings
from gemopt.advise.options import _spread
from gemopt.advise.variants import drift, rounded, skewness, with_batch, with_change, with_skew
from gemopt.online import Policy
from gemopt.profile import Device, Profile
from gemopt.replay import Migration, replay
from gemopt.rules import Rules
from gemopt.topology import Level, Topology
from gemopt.traces import Tokens, Traces


def test_nothing_pays_where_nothing_is_uneven() -> None:
    same = Profile(devices=[replace_rank(profile().devices[0], g) for g in range(RANKS)])
    found = advise(same, even(), window=8, sweep=False)
    assert (found.recommended, found.predicted_change, found.confidence) == ("contiguous", 0.0, 1.0)
    assert found.ceiling == pytest.approx(0, abs=1e-8) and found.skew == 1 and found.drift == 0


def replace_rank(device: Device, rank: int) -> Device:
    return device.model_copy(update={"rank": rank})


def test_advice_is_what_replay_measures_and_what_bounds_allow() -> None:
    traces = skewed()
    found = advise(profile(), traces, window=8, sweep=False, non_moe_us=100.0)
    names = [each.strategy for each in found.strategies]
    assert names == ["contiguous", "fitted-once", "controller", "free"]
    rows = {row.strategy: row for row in replay(profile(), traces, names, window=8, non_moe_us=100.0).rows}
    for option in found.strategies:
        assert option.change == pytest.approx(rows[option.strategy].change)
        assert option.low <= option.change + 0.02 and option.high >= option.change - 0.02
        assert found.ceiling <= option.change + 1e-9
        assert abs(option.step_change) <= abs(option.change)
    best = min(option.change for option in found.strategies)
    assert found.predicted_change <= (1 + found.worth) * (1 + best) - 1
    assert found.recommended == "fitted-once" and found.confidence > 0.9
    assert found.option("fitted-once").setup_moves > 0 and found.option("contiguous").setup_moves == 0
    assert any("gemopt solve" in command for command in found.commands)


def test_strategies_see_no_step_that_is_scored() -> None:
    traces = skewed()
    later = np.array(traces.counts)
    later[32:] = later[32:][:, :, ::-1]  # another regime, in the scored half only
    stale = advise(profile(), Traces(counts=later, top_k=2), window=8, sweep=False)
    calm = advise(profile(), traces, window=8, sweep=False)
    assert stale.drift > 0.3
    assert calm.drift < 0.05
    once = {name: found.option("fitted-once") for name, found in (("stale", stale), ("calm", calm))}
    assert once["stale"].setup_moves == once["calm"].setup_moves  # the same placement, solved on the same half
    behind = [found.option("fitted-once").change - found.clairvoyant for found in (stale, calm)]
    assert behind[0] > behind[1] + 0.05


def test_other_recordings_of_the_traffic_lie_between_low_and_high() -> None:
    inside, solved = 0, {}
    for seed in range(4):
        first = skewed(seed=seed)
        found = advise(profile(), first, window=8, sweep=False)
        for other in range(100 * seed + 100, 100 * seed + 115):
            counts = np.concatenate([first.counts[:32], skewed(seed=other).counts[32:]])
            again = replay(profile(), Traces(counts=counts, top_k=2), [found.recommended], window=8, solved=solved)
            assert again.rows[0].change is not None
            inside += found.low <= again.rows[0].change <= found.high
        assert 0.005 < found.high - found.low < 0.1
    assert inside >= 50  # of 60; 40 lie between the quantiles of the resampled


def drifting() -> Traces:
    counts = np.array(skewed().counts)
    counts[32:] = counts[32:][:, :, [1, 0, 2, 3, 4, 5, 7, 6]] + np.eye(8, dtype=int)[0] * 128
    return Traces(counts=counts, top_k=2)


def test_where_traffic_drifts_both_ways_are_played() -> None:
    traces, told = drifting(), []
    found = advise(profile(), traces, window=8, sweep=False, progress=lambda *at: told.append(at))
    turned = Traces(counts=np.concatenate([traces.counts[32:], traces.counts[:32]]), top_k=2)
    names = [each.strategy for each in found.strategies]
    ways = [replay(profile(), each, [*names, "clairvoyant"], window=8).rows for each in (traces, turned)]
    assert found.drift > 0.05 and told[-1] == (2 * (len(names) + 1),) * 2
    for option, *rows in zip(found.strategies, *ways, strict=False):
        assert option.changes == pytest.approx([row.change for row in rows])
        assert option.change == pytest.approx(np.mean(option.changes))
        assert option.low <= min(option.changes) and option.high >= max(option.changes)
        assert found.ceiling <= option.change
    best = found.option(found.recommended)
    assert abs(best.changes[0] - best.changes[1]) > 0.01 and found.predicted_change == best.change
    assert best.change <= (1 + found.worth) * (1 + min(each.change for each in found.strategies)) - 1
    assert found.clairvoyant == pytest.approx(np.mean([rows[-1].change for rows in ways]))
    assert any(f"{100 * best.changes[1]:+.1f} % on the first" in note for note in found.notes)


def test_two_ways_that_disagree_are_never_certain() -> None:
    last, base = np.ones((3, 64)), np.ones((2, 64))
    last[0], last[1] = 0.8, 0.9
    first = last[[2, 1, 0]]  # who gains most on the last steps gains nothing on the first ones
    every_S = np.ones(3, bool)
    low_S, high_S, share_S = _spread(np.stack([last, first]), base, 8, 0, every_S)
    assert share_S == pytest.approx([0.5, 0, 0.5], abs=0.1)
    assert low_S == pytest.approx([-0.3, -0.1, -0.3]) and high_S == pytest.approx([0.1, -0.1, 0.1])
    *_, agreed_S = _spread(np.stack([last, last]), base, 8, 0, every_S)
    *_, one_S = _spread(last[None], base[:1], 8, 0, every_S)
    assert agreed_S.tolist() == one_S.tolist() == [1, 0, 0]
    *_, nearly_S = _spread(np.stack([last, 0.5 + last / 2]), base, 8, 0, every_S)
    assert 0.6 < nearly_S[0] < 1  # the same is best, but gains half as much there


def test_memory_buys_copies_and_duplication() -> None:
    traces = skewed()
    size = 1e6
    found = advise(profile(), traces, window=8, memory_bytes=1.5 * 2 * size, migration=Migration(expert_bytes=size),
                   non_moe_us=500.0, sweep=False)  # fmt: skip
    names = [each.strategy for each in found.strategies]
    assert names[:4] == ["contiguous", "fitted-once", "copies", "controller"]
    assert {"duplication-all-past", "duplication-dirichlet"} <= set(names) and "duplication-window" not in names
    copies = found.option("copies")
    assert copies.slots_per_rank == [3] * RANKS and copies.memory_bytes == 2 * size
    assert copies.change < found.option("fitted-once").change - 0.02
    assert all(found.ceiling <= each.change + 1e-9 for each in found.strategies)
    assert any("copies" in note or "duplication" in note for note in found.notes) or found.recommended == "copies"


def test_what_nobody_runs_is_recommended_only_when_asked_for() -> None:
    costs = Migration(expert_bytes=1e6, bytes_per_s=5e10)
    plain, asked = (
        advise(profile(), skewed(), predictors=by, window=8, memory_bytes=3e6, non_moe_us=5000.0, migration=costs)
        for by in (None, ["dirichlet"])
    )
    first = min(plain.strategies, key=lambda each: each.change)
    assert first.strategy.startswith("duplication-") and (plain.recommended, plain.confidence) == ("copies", 1.0)
    assert not any("duplication" in best for row in plain.map.best for best in row)
    assert any(f"{first.strategy} would change {100 * first.change:+.1f} %" in note for note in plain.notes)
    assert asked.recommended == "duplication-dirichlet" and "duplication-dirichlet" in asked.map.best[0]
    assert any("of what they run, copies changes" in note for note in asked.notes)


def test_duplication_that_pays_too_late_is_not_said_to_lack_an_option() -> None:
    dear = Migration(expert_bytes=1e8, bytes_per_s=1e8)
    shared = {"window": 8, "horizon": 20, "memory_bytes": 3e8, "non_moe_us": 1e8, "migration": dear, "sweep": False}
    for by in (None, ["dirichlet"]):
        found = advise(profile(), skewed(), predictors=by, **shared)
        first = min(found.strategies, key=lambda each: each.change)
        assert first.strategy.startswith("duplication-") and (first.breakeven_steps or 0) > 20
        assert found.recommended == "contiguous" and not any("--predictors" in note for note in found.notes)


def test_a_watch_prices_moves_as_the_advice_does(tmp_path: Path) -> None:
    counts = np.array(skewed(steps=256).counts)
    counts[144:] = counts[144:, :, ::-1]  # soon after the first scored step
    shared = {"window": 8, "sweep": False}
    usual = Migration(bytes_per_s=5e10, slowdown=0.1)
    found = advise(profile(), Traces(counts=counts, top_k=2), migration=usual, **shared)
    assert found.recommended == "controller"
    *_, policy, watch = found.commands
    subprocess.run(policy, shell=True, cwd=tmp_path, check=True)
    assert Policy(**json.loads((tmp_path / "prices.json").read_text())) == Policy(bytes_per_s=5e10, slowdown=0.1)
    assert watch.endswith(" --policy prices.json")
    *_, solve, watch = advise(profile(), Traces(counts=counts, top_k=2), **shared).commands
    assert "gemopt solve" in solve and "--policy" not in watch


def test_memory_is_used_as_far_as_it_gains() -> None:
    costs = {"window": 8, "migration": Migration(expert_bytes=1e6), "non_moe_us": 500.0, "sweep": False}
    little, much = (advise(profile(), skewed(), memory_bytes=2e6 * slots, **costs) for slots in (1, 6))
    assert much.option("copies").slots_per_rank[0] > little.option("copies").slots_per_rank[0] == 3
    assert much.predicted_change < little.predicted_change and much.ceiling <= little.ceiling
    same = Profile(devices=[replace_rank(profile().devices[0], g) for g in range(RANKS)])
    idle = advise(same, even(), memory_bytes=6e6, **costs)
    assert idle.option("copies").slots_per_rank == [3] * RANKS and idle.recommended == "contiguous"
    assert any(note.startswith("1 of the 6 slots") for note in idle.notes)


def test_what_does_not_pay_for_its_first_placement_in_time_is_not_recommended() -> None:
    dear = Migration(expert_bytes=1e9, bytes_per_s=1e8, slowdown=0.5)
    found = advise(profile(), skewed(), window=8, horizon=20, migration=dear, sweep=False)
    assert found.scored_steps == 20 and found.fitted_steps == 44
    assert found.recommended == "contiguous" and found.confidence == 1.0, "nothing else is a choice"
    once = found.option("fitted-once")
    assert once.change < -0.05 and (once.breakeven_steps or 0) > 20
    said = f"fitted-once would change {100 * once.change:+.1f} %, but only after {once.breakeven_steps:.0f} steps"
    assert any(note.startswith(said) for note in found.notes)


def test_a_strategy_that_no_command_follows_says_how_to_follow_it() -> None:
    free = advise(profile(), skewed(), window=8, sweep=False).option("free")
    assert any("gemopt watch" in note for note in _warnings(free, [free], 64, None, 0.0))


def test_the_map_knows_skew_and_bandwidth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    for module in ("sweep", "advisor"):
        monkeypatch.setattr(f"gemopt.advise.{module}.POWERS", (0.25, 1.0, 2.0))
    monkeypatch.setattr("gemopt.advise.sweep.GBPS", (8.0, 32.0))
    from gemopt.plotting import plot_strategy_map, save

    told: list[tuple[int, int]] = []
    found = advise(profile(), skewed(layers=1), window=8, progress=lambda *at: told.append(at))
    assert told == sorted(told) and told[-1][0] == told[-1][1]
    assert [each.what for each in found.sweeps] == ["skew", "bandwidth", "batch", "drift"]
    skew = found.sweeps[0]
    assert skew.values == sorted(skew.values) and skew.pays_from is not None
    gains = [min(changes[i] for changes in skew.changes.values()) for i in range(len(skew.values))]
    assert gains[-1] < gains[0] - 0.05
    once = found.sweeps[3].changes["fitted-once"]
    assert once[-1] > once[0]  # stale once all experts have exchanged their traffic
    assert found.map is not None and len(found.map.best) == 3
    save(plot_strategy_map(found), tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    found.save(tmp_path / "advice.json")
    assert Advice.load(tmp_path / "advice.json") == found


def test_variants_of_traffic_keep_what_they_should() -> None:
    traces = skewed()
    counts = np.asarray(traces.counts)
    flat, sharp = (with_skew(traces, power) for power in (0.0, 2.0))
    assert skewness(flat.counts) < 1.1 < skewness(counts) < skewness(sharp.counts)
    for each in (flat, sharp, with_change(traces, 1.0, 32)):
        assert (np.asarray(each.counts).sum(axis=2) == counts.sum(axis=2)).all()
    assert np.array_equal(with_skew(traces, 1.0).counts, counts)
    assert (np.asarray(with_batch(traces, 0.25).counts).sum(axis=2) == 64).all()
    assert (np.asarray(with_batch(traces, 4.0).counts).sum(axis=2) == 1024).all()
    assert drift(np.asarray(with_change(traces, 1.0, 32).counts), 32) > 0.3
    assert rounded(np.array([[1.0, 1.0, 1.0], [0, 0, 0]]), np.array([5, 3])).tolist() == [[2, 2, 1], [0, 0, 0]]


def test_a_shape_times_the_rest_of_a_step() -> None:
    shape = ModelShape.parse(SHAPE)
    us = shape.non_moe_us(tokens=64, assignments=128, ranks=4, layers=2, link_gbps=10)
    assert us == pytest.approx(2 * shape.non_moe_us(tokens=64, assignments=128, ranks=4, layers=1, link_gbps=10))
    links = shape.non_moe_us(tokens=64, assignments=128, ranks=4, layers=1, link_gbps=5) - us / 2
    assert links == pytest.approx(2 * 128 / 4 * 3 / 4 * 64 * 2 / 10e3)  # both all-to-alls again
    found = advise(profile(), even(), window=8, model=SHAPE, sweep=False)
    assert found.non_moe_us > 0 and any("roofline" in note for note in found.notes)
    sized = advise(profile(), even(), window=8, model=SHAPE + ",intermediate_size=32", sweep=False)
    assert sized.migration.expert_bytes == 3 * 64 * 32 * 2


def test_shapes_in_other_units_and_of_other_experts_are_doubted() -> None:
    measured = profile()
    assert ModelShape.parse(SHAPE).doubts(measured) == []
    other = SHAPE.replace("memory_gbps=1000", "memory_gbps=3.35").replace("tflops=100", "tflops=0.989")
    said = ModelShape.parse(other + ",dtype_bytes=8").doubts(measured)
    assert [each.partition(" is hardly in ")[0] for each in said] == [
        "--model memory_gbps: 3.35", "--model tflops: 0.989", "--model dtype_bytes: 8",
    ]  # fmt: skip
    sized = measured.with_model(expert_bytes=3 * 64 * 32 * 2)
    dense = ModelShape.parse(SHAPE + ",intermediate_size=288")  # that of the layers without experts
    assert dense.doubts(sized) == ["--model tells of experts of 110592 bytes, the profile of 12288, which are taken"]
    assert ModelShape.parse(SHAPE + ",intermediate_size=32").doubts(sized) == []


def test_the_slowest_port_of_a_topology_is_what_copies_go_through() -> None:
    inside = Level(bandwidth_gbs=100)
    flat = Topology(node_of_rank=np.zeros(4, int), within_node=inside)
    assert flat.slowest_gbps(1e7) == pytest.approx(100)
    cards = Topology(node_of_rank=np.array([0, 0, 1, 1]), within_node=inside, between_nodes=Level(bandwidth_gbs=25))
    assert cards.slowest_gbps(1e7) == pytest.approx(25)
    shared = Topology(node_of_rank=np.array([0, 0, 1, 1]), within_node=inside,
                      between_nodes=Level(bandwidth_gbs=25, port_of="node"))  # fmt: skip
    assert shared.slowest_gbps(1e7) == pytest.approx(12.5)  # two ranks at once
    pairs = np.full((4, 4), 50.0)
    pairs[1, 2] = 5.0
    assert Topology(node_of_rank=np.zeros(4, int), pair_bandwidth_gbs=pairs).slowest_gbps(1e7) == pytest.approx(5)


def test_tokens_bring_predictors_of_tokens() -> None:
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(EXPERTS)[:2] for _ in range(64 * 16 * 2)]).reshape(64 * 16, 2, 2)
    steps = np.repeat(np.arange(64), 16)
    counts = np.zeros((64, 2, EXPERTS), int)
    np.add.at(counts, (steps[:, None, None], np.arange(2)[None, :, None], ids), 1)
    tokens = Tokens(ids=ids, step_of_token=steps, request=np.arange(64 * 16) % 16)
    traces = Traces(counts=counts, top_k=2, tokens=tokens)
    found = advise(profile(), traces, window=8, memory_bytes=1e9, sweep=False, predictors=["previous"])
    assert [each.strategy for each in found.strategies][-1] == "duplication-previous"


def test_rules_are_kept_by_all_that_is_advised() -> None:
    """The two hot experts may not part, on a rank that contiguous placement does not have them on."""
    size = 1e6
    traces = Traces(counts=skewed(layers=5).counts, layer_ids=(1, 3, 5, 7, 9), top_k=2)
    rules = Rules(together=[{"experts": [0, 1]}], pinned=[{"experts": [0], "ranks": [3], "layers": [3, 5]}])
    costs = {"window": 8, "migration": Migration(expert_bytes=size), "non_moe_us": 500.0}
    free, ruled = (advise(profile(), traces, rules=each, memory_bytes=5 * size, **costs) for each in (None, rules))
    names = [each.strategy for each in ruled.strategies]
    assert names == ["contiguous", "fitted-once", "copies", "controller", "free"]
    assert ruled.recommended != "contiguous" and ruled.predicted_change > free.predicted_change + 0.05
    assert all(ruled.option(name).change > free.option(name).change + 0.05 for name in names[1:])
    assert "contiguous" not in {name for row in ruled.map.best for name in row}
    assert any("pinned[0]" in note and "no choice" in note for note in ruled.notes)
    assert any("duplication per batch knows no rules" in note for note in ruled.notes)
    assert all("--rules rules.json" in command for command in ruled.commands if "watch" not in command)

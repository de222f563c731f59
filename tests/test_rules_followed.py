"""Rules beyond `solve`: what follows the traffic, converts or judges placements keeps them, or refuses in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_inputs import gemopt, profile, traces
from test_online_controller import EXPERTS, LAYERS, RANKS, cost, times, traffic
from test_rules import random_rules

from gemopt.evaluate import check_rules, evaluate
from gemopt.exceptions import InputError, UnsupportedError
from gemopt.formats.approximate import approximate
from gemopt.formats.devices import follow
from gemopt.formats.engines import vllm_plugin
from gemopt.formats.engines.vllm_controller import Decider
from gemopt.formats.registry import export, import_placement
from gemopt.formats.registry import get as engine
from gemopt.layer_rules import check_kept, rules_of
from gemopt.online.controller import Controller
from gemopt.online.policy import Policy
from gemopt.placement import EMPTY, Placement
from gemopt.replay import Schedule, replay
from gemopt.replay.strategies import Fixed, make
from gemopt.rules import Rules
from gemopt.solvers.placing import conflict
from gemopt.solving.fronts import moves_front
from gemopt.traces import Traces

NODES = [0, 0, 1, 1]


def spare(slots: int = 6) -> Placement:
    """Four experts and empty slots on every rank."""
    rows = np.full((LAYERS, RANKS, slots), EMPTY)
    rows[:, :, :4] = np.arange(EXPERTS).reshape(RANKS, 4)
    return Placement(
        physical_to_logical=rows.reshape(LAYERS, -1), slots_per_rank=np.full(RANKS, slots), num_experts=EXPERTS
    )


def rules_that_can_be_kept(seed: int) -> Rules:
    """Random ones, changed until some placement keeps them."""
    while True:
        rules = random_rules(seed, EXPERTS, RANKS)
        asked = rules_of(spare().under(rules, NODES))[0]
        if asked is not None and not conflict(asked, spare().slots_per_rank, full=False, deadline=np.inf):
            return rules
        seed += 1000


@pytest.mark.parametrize("seed", range(12))
def test_the_controller_keeps_rules(seed: int) -> None:
    """From a placement that may break them, through traffic that changes, slow ranks, and a file of what it learnt."""
    rules = rules_that_can_be_kept(seed)
    controller = Controller(cost(), spare().under(rules, NODES), Policy(expert_bytes=1e5, cool_down_steps=0))
    moved = 0
    for regime in range(3):
        counts = traffic(regime, 64, seed)
        decision = controller.step(counts, times(controller.placement, counts, 1.0 + 0.3 * (regime == 1)))
        check_kept(decision.placement)
        assert decision.placement.rules == rules
        moved += decision.num_moves
    assert moved > 0


def test_an_expert_that_is_pinned_off_a_rank_stays_off_though_moving_it_would_pay() -> None:
    counts, policy = traffic(0, 64), Policy(expert_bytes=1e5)
    free = Controller(cost(), spare(), policy).step(counts)
    layer = next(iter(free.moves))
    move = free.moves[layer][0]
    rank = int(spare().rank_of_slot[move.dst_slot])
    rules = Rules(kept_off=[{"experts": [move.expert], "ranks": [rank]}])
    kept = Controller(cost(), spare().under(rules, NODES), policy).step(counts)
    check_kept(kept.placement)
    assert kept.num_moves > 0 and "rules ask" not in kept.reason


def test_what_breaks_rules_is_mended_with_the_fewest_moves_whatever_they_cost() -> None:
    rules = Rules(pinned=[{"experts": [0, 1], "ranks": [3]}])
    controller = Controller(cost(), spare().under(rules, NODES), Policy(commit_us=1e9))
    decision = controller.step(traffic(0, 16))
    check_kept(decision.placement)
    assert decision.num_moves == 2 * LAYERS and "rules ask for moves" in decision.reason
    assert controller.step(traffic(0, 16)).num_moves == 0


def test_rules_stay_with_the_controller(tmp_path: Path) -> None:
    rules = Rules(apart=[{"experts": [0, 1]}])
    controller = Controller(cost(), spare().under(rules, NODES))
    controller.confirm(spare())  # what an engine tells has no rules
    assert controller.placement.rules == rules
    controller.save(tmp_path / "state")
    other = Controller(cost(), spare().under(Rules(apart=[{"experts": [2, 3]}]), NODES))
    other.load(tmp_path / "state")
    assert other.placement.rules is not None and other.placement.rules.apart[0].experts == [2, 3]
    check_kept(other.step(traffic(0, 16)).placement)
    with pytest.raises(InputError, match="experts 0 to 15"):
        Controller(cost(), spare().under(Rules(apart=[{"experts": [0, 99]}]), NODES))


@pytest.mark.parametrize("pinned", [[2], [1, 2]])
def test_a_rank_that_fails_is_left_where_rules_let_it(pinned: list[int]) -> None:
    rules = Rules(pinned=[{"experts": [8, 9], "ranks": pinned}], apart=[{"experts": [4, 10]}])
    controller = Controller(cost(), spare().under(rules, NODES), Policy(dead_after_steps=8))
    counts = traffic(0, 16)
    silent = times(controller.placement, counts)
    silent[:, 2] = np.nan
    decision = controller.step(counts, silent)
    if pinned == [2]:
        assert (
            "infeasible without rank 2" in decision.reason
            and "pinned[0]: experts 8, 9 only on rank 2" in decision.reason
        )
        assert decision.num_moves == 0
        return
    check_kept(decision.placement)
    assert (decision.placement.physical_to_logical[:, 12:18] == EMPTY).all()


def test_watch_keeps_the_rules_given_and_those_of_the_placement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "traces").mkdir()
    profile().save(tmp_path / "profile.json")
    traces(64).save(tmp_path / "traces" / "000000.safetensors")
    Placement.contiguous(2, 4, 2).save(tmp_path / "placement.json")
    rules = Rules(pinned=[{"experts": [0], "ranks": [1]}])
    rules.save(tmp_path / "rules.json")
    words = ["watch", tmp_path / "traces", "--profile", tmp_path / "profile.json"]
    words += ["--placement", tmp_path / "placement.json", "--once"]
    code, out, _ = gemopt(capsys, *words, "--rules", tmp_path / "rules.json")
    assert code == 0 and "keeps rules: 1 pinned" in out and "rules ask for moves" in out
    written = Placement.load(tmp_path / "placement.json")
    assert written.rules == rules
    check_kept(written)
    code, out, _ = gemopt(capsys, *words)
    assert code == 0 and "keeps rules: 1 pinned" in out and "rules ask" not in out
    check_rules(Placement.load(tmp_path / "placement.json"), rules)


@pytest.mark.parametrize("slots", [16, 20])
def test_maps_for_vllm_keep_rules_and_are_full(slots: int) -> None:
    rules = Rules(
        pinned=[{"experts": [0, 5], "ranks": [1, 3]}], apart=[{"experts": [1, 2, 3]}], together=[{"experts": [6, 7]}]
    )
    decider = Decider(cost(), profile(RANKS), slots, 1, rules)
    old = None
    for regime in range(3):
        wanted = decider.decide(traffic(regime, 64).sum(axis=0) / 64.0, old)
        assert (wanted >= 0).all()
        sizes = np.full(RANKS, slots // RANKS)
        check_rules(Placement(physical_to_logical=wanted, slots_per_rank=sizes, num_experts=EXPERTS), rules)
        old = wanted
    crowded = Decider(cost(), profile(RANKS), 20, 1, Rules(pinned=[{"experts": list(range(15)), "ranks": [0, 1, 2]}]))
    with pytest.raises(InputError, match=r"GEMOPT_RULES.*every slot full"):
        crowded.decide(traffic(0, 64).sum(axis=0) / 64.0, None)


def test_rules_for_vllm_without_the_controller_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMOPT_PROFILE", raising=False)
    monkeypatch.setenv("GEMOPT_RULES", "rules.json")
    for placement in ("", "placement.json"):
        monkeypatch.setenv("GEMOPT_PLACEMENT", placement)
        with pytest.raises(InputError, match="GEMOPT_RULES"):
            vllm_plugin.register()


@pytest.mark.parametrize("seed", range(8))
def test_what_an_engine_can_express_keeps_rules_or_is_refused(seed: int) -> None:
    rules = rules_that_can_be_kept(seed)
    found = Controller(cost(), spare().under(rules, NODES)).step(traffic(0, 16)).placement
    check_kept(found)
    try:
        near, _ = approximate(found, engine("vllm"))
    except InputError as error:
        assert "--approximate" in str(error)
        return
    check_kept(near)
    assert near.equal_slots and not near.has_empty_slots


def test_copies_that_fill_slots_for_an_engine_go_where_rules_let_them() -> None:
    rules = Rules(
        kept_off=[{"experts": [0, 1], "ranks": [1]}], apart=[{"experts": [2, 3]}], together=[{"experts": [4]}]
    )
    given = Placement(physical_to_logical=[[0, 1, 2, 5, 3, 4, 6, EMPTY]], slots_per_rank=[4, 4], num_experts=7).under(
        rules, None
    )
    near, _ = approximate(given, engine("vllm"))
    assert near.physical_to_logical.tolist() == [[0, 1, 2, 5, 3, 4, 6, 5]]
    with pytest.raises(InputError, match=r"--approximate.*expert 0 on rank 1; kept_off\[0\]"):
        approximate(given.under(Rules(kept_off=[{"experts": [0, 1, 2, 5], "ranks": [1]}]), None), engine("vllm"))


def test_a_file_of_an_engine_comes_back_with_the_rules_beside_it(tmp_path: Path) -> None:
    rules = Rules(pinned=[{"experts": [0], "ranks": [0]}], groups=[{"num_groups": 2}])
    given = Placement.contiguous(LAYERS, EXPERTS, RANKS, num_hidden_layers=LAYERS).under(rules, NODES)
    export(given, to="sglang", path=tmp_path / "map.json")
    assert import_placement(tmp_path / "map.json", source="sglang") == given


def test_devices_in_another_order_take_their_rules_along() -> None:
    rules = Rules(pinned=[{"experts": [0], "ranks": [0]}], groups=[{"num_groups": 2}])
    given = spare().model_copy(update={"device_uuids": ["GPU-a", "GPU-b", "GPU-c", "GPU-d"]}).under(rules, NODES)
    check_kept(given)
    moved, _ = follow(given, ["GPU-c", "GPU-d", "GPU-b", "GPU-a"])
    check_kept(moved)
    assert moved.rules is not None and moved.rules.pinned[0].ranks == [3]
    assert moved.node_of_rank is not None and moved.node_of_rank.tolist() == [1, 1, 0, 0]


def test_fronts_of_moves_keep_rules() -> None:
    rules, current = (
        Rules(pinned=[{"experts": [0], "ranks": [1]}], apart=[{"experts": [0, 3]}]),
        Placement.contiguous(2, 4, 2),
    )
    given = {"holdout": 0, "time_limit": 5, "patience": 1, "solvers": ["local-search"]}
    points = moves_front(profile(), traces(), current, rules=rules, **given)
    assert points[1].moves == 4, "each layer needs two moves to keep the rules"
    assert all(point.moves >= 4 for point in points[1:]) and points[-1].source == "local-search"
    free = moves_front(profile(), traces(), current, **given)
    assert 0 < free[1].moves < 4
    with pytest.raises(InputError, match=r"no placement of layer 0 .* keeps together\[0\]"):
        moves_front(profile(), traces(), current, rules=Rules(together=[{"experts": [0, 1, 2]}]), **given)


def test_the_front_has_the_placement_that_only_drops_a_copy() -> None:
    """Rank 1 may not hold expert 0, which rank 0 has, too: that takes no move."""
    current = Placement(physical_to_logical=[[0, 1, EMPTY, 0, 2, 3]] * 2, slots_per_rank=[3, 3], num_experts=4)
    kept = current.changed(physical_to_logical=[[0, 1, EMPTY, 2, 3, EMPTY]] * 2)
    points = moves_front(profile(), traces(), current, rules=Rules(pinned=[{"experts": [0], "ranks": [0]}]), holdout=0)
    assert [point.moves for point in points[:2]] == [0, 0]
    for point, placement in zip(points, (current, kept), strict=False):
        found = evaluate(placement, profile(), traces())
        assert point.step_us == pytest.approx(found.objective_us / len(found.step_us))


def test_a_front_from_other_static_copies_has_weights_that_are_chosen_for_them() -> None:
    """The copy of expert 0 may not stay on rank 1: another one goes there, whose weights nobody has given."""
    current = Placement(
        physical_to_logical=[[0, 1, 2, 0, 3, 1]] * 2, slots_per_rank=[3, 3], num_experts=4, split="static",
        split_weights=[[0.5, 1, 1, 0.5, 1, 0]] * 2,
    )  # fmt: skip
    rules = Rules(pinned=[{"experts": [0], "ranks": [0]}])
    found = moves_front(profile(), traces(), current, rules=rules, holdout=0)
    even = Placement(
        physical_to_logical=[[0, 1, 2, EMPTY, 3, 1]] * 2, slots_per_rank=[3, 3], num_experts=4, split="static",
        split_weights=[[1, 0.5, 1, 0, 1, 0.5]] * 2,
    )  # fmt: skip
    assert found[1].moves == 0
    assert found[1].step_us < evaluate(even, profile(), traces()).objective_us / traces().num_steps * 0.999


def test_evaluate_refuses_a_placement_that_breaks_its_own_rules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile().save(tmp_path / "profile.json")
    traces().save(tmp_path / "traces.safetensors")
    rules = Rules(pinned=[{"experts": [0], "ranks": [1]}])
    Placement.contiguous(2, 4, 2).under(rules, [0, 0]).save(tmp_path / "placement.json")
    code, _, err = gemopt(
        capsys, "evaluate", *(tmp_path / name for name in ("placement.json", "profile.json", "traces.safetensors"))
    )
    assert code == 2 and "pinned[0]: expert 0 only on rank 1" in err


def noting(strategy: Fixed, kept: list[Placement]) -> Fixed:
    """A strategy whose placements are noted, those included that come into force where a rank fails or returns."""
    start, observe, confirm = strategy.start, strategy.observe, strategy.confirm
    strategy.start = lambda context: kept.append(start(context)) or kept[-1]
    strategy.observe = lambda *given: (kept.append(found) if (found := observe(*given)) else None) or found
    strategy.confirm = lambda placement: kept.append(placement) or confirm(placement)
    return strategy


def test_replay_judges_under_rules() -> None:
    """What is solved, and what the controller decides, keeps them; all slots are full, so that moving is exchanging."""
    rules = Rules(pinned=[{"experts": [0, 4], "ranks": [3]}], apart=[{"experts": [1, 2]}])
    seen = Traces(counts=np.concatenate([traffic(0, 96), traffic(1, 96)]))
    kept: list[Placement] = []
    chosen = [noting(make([name])[0], kept) for name in ("fitted-once", "free", "controller")]
    result = replay(profile(RANKS), seen, [*chosen, "clairvoyant", "contiguous"], rules=rules, window=32)
    assert len(kept) > 5 and all(row.makespan_us > 0 for row in result.rows)
    for placement in kept:
        check_rules(placement, rules)
    with pytest.raises(UnsupportedError, match="rules: got with"):
        replay(profile(RANKS), seen, ["duplication-window"], rules=rules, window=32)
    with pytest.raises(InputError, match=r"pinned\[0\].* no placement of layer 0"):
        replay(profile(RANKS), seen, rules=Rules(pinned=[{"experts": list(range(5)), "ranks": [0]}]), window=32)


def test_replay_keeps_rules_where_a_rank_fails_and_returns() -> None:
    rules = Rules(pinned=[{"experts": [0, 4], "ranks": [1, 3]}], apart=[{"experts": [1, 2]}])
    seen, kept = Traces(counts=np.concatenate([traffic(0, 96), traffic(1, 96)])), list[Placement]()
    chosen = [noting(make([name])[0], kept) for name in ("fitted-once", "free", "controller")]
    fails = {"throttle": Schedule.parse(["1:fail@120-150"]), "window": 32, "slots_per_rank": 5}
    replay(profile(RANKS), seen, [*chosen, "clairvoyant"], rules=rules, **fails)
    assert any(placement.slots_per_rank[1] == 0 for placement in kept)
    for placement in kept:
        check_rules(placement, rules)
    alone = Rules(pinned=[{"experts": [0], "ranks": [1]}])
    with pytest.raises(InputError, match="rules: got rank 1 failed; no placement that keeps them"):
        replay(profile(RANKS), seen, ["fitted-once"], rules=alone, **fails)

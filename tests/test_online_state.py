"""State of the controller: saved, loaded, refused; threads change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_online_controller import EXPERTS, LAYERS, RANKS, controller, cost, settled, times, traffic

from gemopt.exceptions import InputError
from gemopt.online import state
from gemopt.online.controller import Controller, Decision
from gemopt.online.policy import TICK, Policy
from gemopt.placement import Placement


def same(one: Decision, other: Decision) -> bool:
    return (
        one.placement == other.placement
        and one.moves == other.moves
        and (one.gain_us, one.cost_us, one.reason, one.drift)
        == (other.gain_us, other.cost_us, other.reason, other.drift)
    )


@settings(max_examples=15, deadline=None)
@given(
    calls=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40), st.booleans()), min_size=2, max_size=10),
    at=st.integers(0, 9),
    seed=st.integers(0, 5),
)
def test_a_saved_controller_goes_on_identically(
    calls: list[tuple[int, int, bool]], at: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    policy = Policy(keep_steps=64)  # small enough that blocks are merged
    one, path = controller(policy), tmp_path_factory.mktemp("state") / "state"
    two = controller(policy)
    for index, (regime, steps, measured) in enumerate(calls):
        counts = traffic(regime, steps, seed + index)
        latencies = times(one.placement, counts, 1.2) if measured else None
        if index == min(at, len(calls) - 1):
            one.save(path)
            two = controller(policy)
            two.load(path)
        assert same(one.step(counts, latencies), two.step(counts, latencies))


def test_a_state_of_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follower = settled()
    follower.save(tmp_path / "state")
    with pytest.raises(InputError, match=r"policy: got \{'horizon_steps': 256\}; that of this controller"):
        controller(Policy(horizon_steps=7)).load(tmp_path / "state")
    with pytest.raises(InputError, match="notes"):
        follower.save(tmp_path / "noted", {"not JSON": object()})
    assert not (tmp_path / "noted").exists()
    with monkeypatch.context() as patch:
        patch.setattr(state, "VERSION", 6)
        follower.save(tmp_path / "earlier")
    with pytest.raises(InputError, match=r"earlier: got version 6; .* of state version \d+ has saved.*begin anew"):
        follower.load(tmp_path / "earlier")
    other = Controller(cost(), Placement.contiguous(2, EXPERTS, RANKS))
    with pytest.raises(InputError, match="those of this controller"):
        other.load(tmp_path / "state")
    with pytest.raises(InputError, match="those of this controller"):
        controller(placement=Placement.contiguous(LAYERS, EXPERTS, RANKS, layer_ids=[1, 2, 3])).load(tmp_path / "state")
    with pytest.raises(InputError, match="another profile"):
        Controller(cost(1.5), follower.placement).load(tmp_path / "state")
    content = (tmp_path / "state").read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    renamed = content.replace(b"ticks", b"tocks")
    listed = content.replace(b"gemopt_online", b"gemopt_onlime")
    for broken in (content[:-9], content[:40], b"", b"nonsense" * 9, flipped, renamed, listed):
        (tmp_path / "broken").write_bytes(broken)
        with pytest.raises(InputError, match="begin anew with a file that is not there yet"):
            follower.load(tmp_path / "broken")
    assert follower.step(traffic(0, TICK)).reason


def test_threads_change_no_decision() -> None:
    alone, together = (controller(Policy(expert_bytes=1e5, threads=threads)) for threads in (1, 3))
    moved = 0
    for seed in range(4):
        one, other = (each.step(traffic(seed % 2, 48, seed=seed)) for each in (alone, together))
        assert same(one, other)
        moved += one.num_moves
    assert moved > 0

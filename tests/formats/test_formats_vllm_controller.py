"""The controller as vLLM's policy: maps that vLLM's own classes and its mover accept, few moves, faster steps."""

from __future__ import annotations

import importlib.util
import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from timed import timed  # noqa: E402

from gemopt.costs import fit  # noqa: E402
from gemopt.evaluate import objective  # noqa: E402
from gemopt.exceptions import InputError  # noqa: E402
from gemopt.formats.engines import vllm_plugin  # noqa: E402
from gemopt.formats.engines.vllm_controller import STEPS, controlled_policy, mean_steps  # noqa: E402
from gemopt.migration import count_moves  # noqa: E402
from gemopt.problem import Problem  # noqa: E402
from gemopt.profile import MoeShape, Profile  # noqa: E402

RANKS, EXPERTS, LAYERS, WINDOW = 4, 16, 3, 1000
SPEEDS = (1.0, 1.3, 1.0, 1.1)


@pytest.fixture
def profile(tmp_path: Path) -> str:
    path = tmp_path / "profile.json"
    timed(SPEEDS, lambda n, s: (20 + n) * s, (0, 8, 64, 512), model=MoeShape(expert_bytes=1_000_000)).save(path)
    return str(path)


def initial(redundant: int) -> Any:
    """What vLLM starts with: the experts in order, then the first ones again."""
    row = [*range(EXPERTS), *(i % EXPERTS for i in range(redundant))]
    return torch.tensor([row] * LAYERS)


def window(seed: int) -> Any:
    mean = np.random.default_rng(seed).gamma(0.6, 8.0, (LAYERS, EXPERTS))
    return torch.tensor((mean * WINDOW).astype(np.int64))


def step_us(profile: str, rows: np.ndarray, loads: Any) -> float:
    """Mean step of all layers under a map."""
    cost = fit(Profile.load(profile))[0]
    counts = mean_steps(loads.double().numpy() / WINDOW, STEPS)
    size = rows.shape[1] // RANKS
    layers = [Problem.make(counts[:, i], cost.features, cost.latencies, size) for i in range(LAYERS)]
    return sum(objective(layer, row) for layer, row in zip(layers, rows, strict=True)) / STEPS


def test_steps_have_the_mean_of_the_window() -> None:
    mean = np.random.default_rng(0).gamma(0.3, 3.0, (2, 50))
    steps = mean_steps(mean, STEPS)
    assert steps.shape == (STEPS, 2, 50) and steps.min() >= 0
    assert np.abs(steps.mean(axis=0) - mean).max() <= 1 / STEPS + 1e-9
    assert steps.max(axis=0).max() <= np.ceil(mean).max() + 1
    rare = mean_steps(np.full((1, 40), 0.25), STEPS)[:, 0]
    assert set(rare.sum(axis=0).tolist()) <= {15, 16, 17} and rare.sum(axis=1).max() < 20  # not all at once


@pytest.mark.parametrize("redundant", [0, 4])
def test_few_moves_that_heed_the_ranks_speeds(profile: str, redundant: int) -> None:
    policy, slots = controlled_policy(profile, object), EXPERTS + redundant
    old, loads = initial(redundant), window(1)
    same = policy.rebalance_experts(torch.zeros_like(loads), slots, 1, 1, RANKS, old)
    assert (same == old).all()  # vLLM's call while it profiles its memory
    new = policy.rebalance_experts(loads, slots, 1, 1, RANKS, old)
    assert (new.dtype, new.device.type, tuple(new.shape)) == (torch.int64, "cpu", (LAYERS, slots))
    sizes = np.full(RANKS, slots // RANKS)
    moved = [count_moves(a, b, sizes) for a, b in zip(old.numpy(), new.numpy(), strict=True)]
    assert 0 < sum(moved) < 0.7 * LAYERS * slots
    for before, after in zip(old.numpy(), new.numpy(), strict=True):
        assert set(after.tolist()) == set(range(EXPERTS))
        assert all(len(set(part.tolist())) == len(part) for part in np.split(after, RANKS))
        stays = before == after
        assert stays.sum() >= slots - count_moves(before, after, sizes)  # what stays on its rank keeps its slot
    assert step_us(profile, new.numpy(), loads) < 0.97 * step_us(profile, old.numpy(), loads)
    again = policy.rebalance_experts(loads, slots, 1, 1, RANKS, new)
    assert sum(count_moves(a, b, sizes) for a, b in zip(new.numpy(), again.numpy(), strict=True)) <= sum(moved) / 2
    other = controlled_policy(profile, object)
    other.rebalance_experts(torch.zeros_like(loads), slots, 1, 1, RANKS, old)
    assert (other.rebalance_experts(loads, slots, 1, 1, RANKS, old) == new).all()  # as every other rank computes it


def test_a_window_that_makes_loads_nothing_is_said(
    profile: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GEMOPT_WINDOW_STEPS", "1000000000")
    policy, old = controlled_policy(profile, object), initial(0)
    with caplog.at_level("WARNING", logger="vllm.gemopt"):
        assert (policy.rebalance_experts(window(1), EXPERTS, 1, 1, RANKS, old) == old).all()
    assert "nothing moves; is GEMOPT_WINDOW_STEPS window_size?" in caplog.text


def test_maps_that_no_placement_can_have_are_mended(profile: str) -> None:
    """A map with a copy twice on a rank, or of a smaller group, as elastic vLLM hands over."""
    policy = controlled_policy(profile, object)
    old = initial(4)
    old[0, 4] = 0  # twice on rank 0
    old[0, 19] = 4
    new = policy.rebalance_experts(torch.zeros(LAYERS, EXPERTS), 20, 1, 1, RANKS, old)
    assert all(len(set(part)) == 5 for part in np.split(new[0].numpy(), RANKS))
    assert set(new[0].tolist()) == set(range(EXPERTS))
    assert (new[1:] == old[1:]).all()
    holes = torch.full((LAYERS, 20), -1)
    holes[:, :16] = old[1, :16]
    assert (policy.rebalance_experts(torch.zeros(LAYERS, EXPERTS), 20, 1, 1, RANKS, holes) >= 0).all()
    assert (policy.rebalance_experts(torch.zeros(LAYERS, EXPERTS), 20, 1, 1, RANKS, None) >= 0).all()


def test_what_cannot_be_served_stops(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = controlled_policy(profile, object)
    with pytest.raises(InputError, match="vLLM runs with 8 ranks"):
        policy.rebalance_experts(window(0), 16, 1, 1, 8, initial(0))
    for steps in ("many", "0", "1" + "0" * 5000):
        monkeypatch.setenv("GEMOPT_WINDOW_STEPS", steps)
        with pytest.raises(InputError, match="GEMOPT_WINDOW_STEPS"):
            controlled_policy(profile, object)
    monkeypatch.setenv("GEMOPT_PLACEMENT", "p.json")
    monkeypatch.setenv("GEMOPT_PROFILE", profile)
    with pytest.raises(InputError, match="set one"):
        vllm_plugin.register()


@pytest.mark.parametrize(
    ("slots", "old", "said"),
    [
        (18, initial(2), "num_replicas: got 18; a multiple of 4 ranks"),
        (12, initial(0)[:, :12], "at least one slot for each of 16 experts"),
        (16, initial(0)[:2], r"old_global_expert_indices: got int64 of shape \(2, 16\); a row for each of 3 layers"),
        (20, initial(2), "of ranks with 5 slots each"),
        (16, initial(0) + 1, "old_global_expert_indices: got 16; experts 0 to 15"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(profile: str, slots: int, old: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        controlled_policy(profile, object).rebalance_experts(window(0), slots, 1, 1, RANKS, old)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -5000.0, 1e15])
def test_loads_that_cannot_be_move_nothing_and_are_said(
    profile: str, wrong: float, caplog: pytest.LogCaptureFixture
) -> None:
    policy, old, loads = controlled_policy(profile, object), initial(4), window(1).double()
    loads[1, 3] = wrong
    with caplog.at_level(logging.WARNING, "vllm.gemopt"):
        assert (policy.rebalance_experts(loads, EXPERTS + 4, 1, 1, RANKS, old) == old).all()
    assert "nothing moves" in caplog.text
    assert (policy.rebalance_experts(window(1), EXPERTS + 4, 1, 1, RANKS, old) != old).any()


@pytest.mark.engines
@pytest.mark.parametrize("redundant", [0, 4])
def test_vllm_takes_the_policy_and_moves_the_weights(
    engine_files: Any, profile: str, redundant: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's abstract policy is the base, and its mover leaves the right expert in every slot of every rank."""
    spec = importlib.util.spec_from_file_location("engines", Path(__file__).parent / "test_formats_engines.py")
    assert spec is not None and spec.loader is not None
    engines = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(engines)
    eplb = engine_files("vllm") / "vllm/distributed/eplb"
    engines.stub(monkeypatch, "vllm.config.parallel", EPLBPolicyOption=Literal["default"])
    for name in ("abstract", "default"):
        engines.load(monkeypatch, f"vllm.distributed.eplb.policy.{name}", eplb / f"policy/{name}.py")
    policies = engines.load(monkeypatch, "vllm.distributed.eplb.policy", eplb / "policy/__init__.py")
    engines.stub(monkeypatch, "vllm.logger", init_logger=logging.getLogger)
    engines.stub(monkeypatch, "vllm.distributed.eplb.eplb_communicator")
    engines.stub(monkeypatch, "vllm.distributed.eplb.eplb_utils", device_stream=lambda stream: nullcontext())
    engines.stub(monkeypatch, "vllm.utils.gpu_sync_debug", gpu_sync_allowed=nullcontext)
    engines.load(monkeypatch, "vllm.distributed.eplb.migration_scheduler", eplb / "migration_scheduler.py")
    mover = engines.load(monkeypatch, "vllm.distributed.eplb.rebalance_execute", eplb / "rebalance_execute.py")
    monkeypatch.setenv("GEMOPT_PROFILE", profile)
    monkeypatch.delenv("GEMOPT_PLACEMENT", raising=False)
    vllm_plugin.register()
    policy = policies.EPLB_POLICIES["default"]
    assert issubclass(policy, policies.AbstractEplbPolicy) and policy is not policies.DefaultEplbPolicy
    old, slots = initial(redundant), EXPERTS + redundant
    new = policy.rebalance_experts(window(2), slots, 1, 1, RANKS, old)
    for layer in range(LAYERS):
        sent = _move(mover, old[layer].numpy(), new[layer].numpy())
        assert sent == count_moves(old[layer].numpy(), new[layer].numpy(), np.full(RANKS, slots // RANKS))
    default = policies.DefaultEplbPolicy.rebalance_experts(window(2), slots, 1, 1, RANKS, old)
    sizes = np.full(RANKS, slots // RANKS)
    ours = sum(count_moves(a, b, sizes) for a, b in zip(old.numpy(), new.numpy(), strict=True))
    theirs = sum(count_moves(a, b, sizes) for a, b in zip(old.numpy(), default.numpy(), strict=True))
    assert 0 < ours < theirs


def _move(mover: Any, old: np.ndarray, new: np.ndarray) -> int:
    """Run vLLM's mover of one layer on all ranks at once; returns the experts that went from rank to rank."""
    size = len(old) // RANKS
    weights = [[torch.tensor(old[g * size : (g + 1) * size]).float()[:, None].clone()] for g in range(RANKS)]
    buffers = [[torch.full((size, 1), -7.0)] for _ in range(RANKS)]
    posts: dict[tuple[int, int, int], list[Any]] = {}
    waiting, plans = [], []
    for rank in range(RANKS):

        def add_send(tensors: Any, dst: int, expert_id: int, rank: int = rank) -> None:
            posts[rank, dst, expert_id] = [tensor.clone() for tensor in tensors]

        def add_recv(tensors: Any, src: int, expert_id: int, rank: int = rank) -> None:
            waiting.append(((src, rank, expert_id), tensors))

        wires = SimpleNamespace(
            add_send=add_send, add_recv=add_recv, execute=lambda: None, set_transfer_context=lambda *_: None
        )
        plans.append(
            mover.move_to_buffer(
                num_local_experts=size,
                old_indices=old,
                new_indices=new,
                expert_weights=weights[rank],
                expert_weights_buffers=buffers[rank],
                stream=None,
                ep_rank=rank,
                communicator=wires,
            )
        )
    for key, tensors in waiting:
        for tensor, found in zip(tensors, posts.pop(key), strict=True):
            tensor.copy_(found)
    assert not posts  # nothing was sent that nobody waited for
    for rank in range(RANKS):
        mover.move_from_buffer(
            expert_weights=weights[rank],
            expert_weights_buffers=buffers[rank],
            transfer_metadata=plans[rank],
            new_indices=new,
            ep_rank=rank,
        )
        assert weights[rank][0][:, 0].tolist() == new[rank * size : (rank + 1) * size].tolist()
    return len(waiting)

"""What counts tell of themselves and is said: ranks, warm-ups, shares, repeats, experts never chosen."""

from __future__ import annotations

import numpy as np
import pytest
from routed_counts import routed

from gemopt.exceptions import InputError
from gemopt.formats.findings import ranges
from gemopt.traces import Traces

UNEVEN = [40, 52, 47, 61, 44, 39, 50, 58, 41, 63, 45, 36]  # tokens of steps


def _balanced(tokens_T: list[int], layers: int, experts: int) -> np.ndarray:
    """Assignments of a router that deals them out in turn, the same in every layer."""
    rows = [np.arange(experts) < n % experts for n in tokens_T]
    return np.repeat(np.array([n // experts + row for n, row in zip(tokens_T, rows, strict=True)])[:, None], layers, 1)


@pytest.mark.parametrize(
    "counts",
    [
        _balanced([2, 2, 2], 16, 8),  # the first expert has as many as all the others
        np.concatenate([0 * _balanced(UNEVEN, 1, 32), _balanced(UNEVEN, 2, 32)], axis=1),  # dense first
        _balanced([32, 8, 8, 8, 32, 8], 5, 60),  # steps differ more than layers do
        np.random.default_rng(6).binomial(4, 0.7, (30, 2, 1)) * [1, -1] + [0, 4],  # two layers of two experts
    ],
)
def test_small_and_balanced_recordings_are_taken_as_they_are(load, tmp_path, counts):
    np.save(tmp_path / "a.npy", counts)
    load(tmp_path / "a.npy", "array")
    np.savez(tmp_path / "a.npz", counts=counts)
    assert Traces.load(tmp_path / "a.npz").num_steps == len(counts)


def test_findings(load, tmp_path):
    counts = np.random.default_rng(0).integers(1, 9, (4, 3, 8))
    counts[:, :, 4:] = 0
    np.save(tmp_path / "a.npy", counts)
    _, notes = load(tmp_path / "a.npy", "array")
    assert "4 of 8 experts were never chosen in any layer (4-7): a short recording, or only one rank's" in notes
    counts[:, 1] = counts[:, 1, ::-1]  # the block of one rank, another in each layer
    np.save(tmp_path / "a.npy", counts)
    assert "layers 0-2 use half of their 8 experts or fewer (4 at least)" in load(tmp_path / "a.npy", "array")[1]
    counts += 1
    counts[2, 1] = 0
    np.save(tmp_path / "a.npy", counts)
    _, notes = load(tmp_path / "a.npy", "array")
    assert "in 1 of 4 steps layers 1 have no assignments" in notes
    counts[:, 1] = 0
    np.save(tmp_path / "a.npy", counts)
    assert "layers 1 have no counts" in load(tmp_path / "a.npy", "array")[1]
    with pytest.raises(InputError, match=r"layer 1.*if 1 have no experts, give --layer-ids 0,2"):
        load(tmp_path / "a.npy", "array", layer_ids=(0, 1, 2))
    counts[:] = 7
    np.save(tmp_path / "a.npy", counts)
    assert (
        load(tmp_path / "a.npy", "array")[1]
        == "rows are layers 0 to 2: if dense layers were left out, give --layer-ids"
    )
    assert load(tmp_path / "a.npy", "array", layer_ids=(3, 4, 5))[1] == ""


def test_ranges():
    assert ranges([5, 0, 2, 1]) == "0-2, 5"
    assert ranges([]) == ""
    assert ranges(range(0, 40, 2)) == "0, 2, 4, 6, 8, 10, 12, 14, ..."


def test_an_expert_of_every_token_is_named(load, tmp_path):
    counts = routed(np.random.default_rng(2))
    np.save(tmp_path / "a.npy", np.concatenate([counts, np.full((12, 5, 1), 40)], axis=2))
    assert "expert 16 gets one of every 3 assignments in all layers and steps" in load(tmp_path / "a.npy", "array")[1]
    np.save(tmp_path / "a.npy", counts)
    assert "one of every" not in load(tmp_path / "a.npy", "array")[1]


def test_counts_of_several_ranks_are_named(load, tmp_path):
    counts = routed(np.random.default_rng(3))
    np.save(tmp_path / "a.npy", 8 * counts)
    assert "all counts are multiples of 8: counted by 8 ranks" in load(tmp_path / "a.npy", "array")[1]
    np.save(tmp_path / "a.npy", -(-counts // 16) * 16)
    assert "all counts are multiples of 16: padded to them" in load(tmp_path / "a.npy", "array")[1]
    counts[0, 0] *= 8
    np.save(tmp_path / "a.npy", counts)
    assert "multiples" not in load(tmp_path / "a.npy", "array")[1]


def test_steps_of_a_warm_up_are_named(load, tmp_path):
    np.save(tmp_path / "a.npy", np.concatenate([np.full((3, 5, 16), 5), routed(np.random.default_rng(3))]))
    assert "3 of 15 steps give every expert as much: warm-up?" in load(tmp_path / "a.npy", "array")[1]


def test_copies_of_a_shared_expert_are_named_together(load, tmp_path):
    rng = np.random.default_rng(6)
    counts = routed(rng)
    shared = rng.multinomial(40, [0.2, 0.5, 0.3], size=(12, 5))
    np.save(tmp_path / "a.npy", np.concatenate([counts, shared], axis=2))
    assert "experts 16 to 18 together get one of every 3 assignments" in load(tmp_path / "a.npy", "array")[1]


def test_counters_that_are_reset_now_and_then_are_named(load, tmp_path):
    counts = routed(np.random.default_rng(7))
    np.save(tmp_path / "a.npy", np.concatenate([counts[:7].cumsum(axis=0), counts[7:].cumsum(axis=0)]))
    assert "in 10 of 11 steps no count falls" in load(tmp_path / "a.npy", "array")[1]


def test_rows_of_tokens_are_named(load, tmp_path):
    ids = np.random.default_rng(8).random((50, 5, 16)).argsort(axis=2)[:, :, :2]
    np.save(tmp_path / "a.npy", (ids[..., None] == np.arange(16)).sum(axis=2))
    assert "every step is of a single token" in load(tmp_path / "a.npy", "array")[1]


def test_shares_are_named(load, tmp_path):
    counts = routed(np.random.default_rng(10), tokens=50)  # 50 tokens of two experts: 100
    np.save(tmp_path / "a.npy", counts)
    assert "all layers of all steps add up to 100: shares" in load(tmp_path / "a.npy", "array")[1]


def test_turned_axes_of_layers_that_drop_tokens_are_named(load, tmp_path):
    counts = np.minimum(routed(np.random.default_rng(15)), 15)
    np.save(tmp_path / "a.npy", counts)
    assert "are the axes" not in load(tmp_path / "a.npy", "array")[1]
    np.save(tmp_path / "a.npy", counts.transpose(1, 0, 2))
    assert "are the axes [layers, steps, experts]?" in load(tmp_path / "a.npy", "array")[1]
    np.save(tmp_path / "a.npy", counts[:, :1].transpose(1, 0, 2))
    assert "another sum than others: steps of one layer" in load(tmp_path / "a.npy", "array")[1]


def test_rounded_shares_and_marks_are_named(load, tmp_path):
    counts = np.concatenate([routed(np.random.default_rng(i), steps=1, tokens=30 + i) for i in range(12)])
    for whole in (100, 1000):
        np.save(tmp_path / "a.npy", np.round(whole * counts / counts.sum(axis=2, keepdims=True)))
        assert f"add up to about {whole}: shares that were rounded?" in load(tmp_path / "a.npy", "array")[1]
    np.save(tmp_path / "a.npy", (counts > 5).astype(int))
    assert "no count is above 1: marks" in load(tmp_path / "a.npy", "array")[1]
    np.save(tmp_path / "a.npy", counts)
    assert "shares" not in load(tmp_path / "a.npy", "array")[1]


def test_two_dumps_of_counters_are_named(load, tmp_path):
    counts = routed(np.random.default_rng(16)).cumsum(axis=0)[[3, 7]]
    for i, each in enumerate(counts):
        np.save(tmp_path / f"load_{i}.npy", each[None])
    assert "in 1 of 1 steps no count falls" in load(sorted(tmp_path.glob("load_*")), "array")[1]


def test_layers_and_steps_that_come_twice_are_named(load, tmp_path):
    counts = routed(np.random.default_rng(19))
    np.save(tmp_path / "a.npy", counts[:, [0, 1, 2, 1, 4]])
    assert "layers 3 have the totals of an earlier layer" in load(tmp_path / "a.npy", "array")[1]
    np.save(tmp_path / "a.npy", counts[[0, 1, 1, 2, 3, 3, 3, 4]])
    assert "3 of 8 steps are the step before again: a gauge" in load(tmp_path / "a.npy", "array")[1]
    np.save(tmp_path / "a.npy", counts)
    assert "again" not in load(tmp_path / "a.npy", "array")[1] and "earlier" not in load(tmp_path / "a.npy", "array")[1]


def test_small_files_that_are_the_same_are_steps_of_their_own(load, tmp_path):
    counts = np.arange(6).reshape(3, 1, 2)
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", counts)
    assert (load(tmp_path, "array")[0].counts == np.concatenate([counts, counts])).all()


def test_loads_that_were_sorted_are_named(load, tmp_path):
    counts = routed(np.random.default_rng(4))
    for each, said in (
        (counts, False),
        (_balanced(UNEVEN, 3, 16), False),
        (np.sort(counts, axis=2), True),
        (-np.sort(-counts, axis=2), True),
    ):
        np.save(tmp_path / "a.npy", each)
        assert ("in the order of their load" in load(tmp_path / "a.npy", "array")[1]) == said


def test_steps_of_few_tokens_in_files_of_their_own_may_be_the_same(load, tmp_path):
    for step, expert in enumerate([0, 1, 0]):
        np.save(tmp_path / f"step_{step}.npy", np.eye(4, dtype=int)[[[expert]]])
    traces, notes = load(sorted(tmp_path.glob("step_*.npy")), "array")
    assert traces.counts[:, 0].argmax(axis=1).tolist() == [0, 1, 0]
    assert "counted once" not in notes


def test_steps_whose_tokens_all_choose_the_same_experts_are_noted(load, tmp_path):
    """Engines run on made tokens at their start, to measure their memory or to capture graphs."""
    counts = routed(np.random.default_rng(8), steps=9)
    made = np.zeros_like(counts[:2])
    for layer in range(counts.shape[1]):
        made[:, layer, [layer, layer + 7]] = [[512], [8]]
    np.save(tmp_path / "a.npy", np.concatenate([made, counts]))
    assert "in 2 of 11 steps all tokens choose the same experts: dummy runs" in load(tmp_path / "a.npy", "array")[1]
    made[1, 0, 3] = 1  # one of them did not
    np.save(tmp_path / "a.npy", np.concatenate([made, counts, made[:1] // 512]))  # a single token has no other choice
    assert "in 1 of 12 steps all tokens choose the same" in load(tmp_path / "a.npy", "array")[1]
    np.save(tmp_path / "a.npy", counts)
    assert "dummy runs" not in load(tmp_path / "a.npy", "array")[1]
    few = np.array([[[8, 0, 0, 0]], [[7, 0, 1, 0]], [[6, 1, 0, 1]], [[8, 0, 0, 0]], [[5, 2, 1, 0]]])
    np.save(tmp_path / "a.npy", few)  # most tokens choose that one in all steps
    assert "dummy runs" not in load(tmp_path / "a.npy", "array")[1]


def test_experts_that_are_numbered_on_from_layer_to_layer(load, tmp_path):
    counts = routed(np.random.default_rng(0), 6, 4, 16)
    through = np.zeros((6, 4, 64), int)
    for layer in range(4):
        through[:, layer, 16 * layer : 16 * (layer + 1)] = counts[:, layer]
    np.save(tmp_path / "a.npy", through)
    with pytest.raises(InputError, match="none is in two layers; numbers from 0 in every layer; subtract"):
        load(tmp_path / "a.npy", "array")
    few = np.zeros((6, 4, 64), int)
    few[:, np.arange(4), np.arange(4)] = 3  # of a few tokens that is chance
    np.save(tmp_path / "a.npy", few)
    load(tmp_path / "a.npy", "array")

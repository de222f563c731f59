"""Arrays that somebody saved by hand, read as traces: what they say of themselves, and what stands beside counts."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gemopt.exceptions import InputError
from gemopt.traces import Traces


@pytest.mark.parametrize("steps", [5, 9])
def test_an_npz_with_its_axes_in_another_order_is_refused(tmp_path: Path, steps: int) -> None:
    rng = np.random.default_rng(1)
    counts = np.stack([rng.multinomial(tokens, [[0.1, 0.2, 0.3, 0.4]] * 5) for tokens in range(20, 20 + steps)])
    np.savez(tmp_path / "right.npz", counts=counts)
    assert (Traces.load(tmp_path / "right.npz").counts == counts).all()
    np.savez(tmp_path / "wrong.npz", counts=counts.transpose(1, 0, 2))
    with pytest.raises(InputError, match=r"wrong.npz: Traces.counts.*\[layers, steps, experts\]"):
        Traces.load(tmp_path / "wrong.npz")
    np.savez(tmp_path / "told.npz", counts=counts.transpose(1, 0, 2), layer_ids=np.arange(steps))
    assert Traces.load(tmp_path / "told.npz").num_layers == steps


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"layers": np.arange(3, 6)}, "Traces.layers: got no such array; layer_ids, if that is meant"),
        ({"topk": np.array([2])}, "Traces.topk: got no such array; top_k"),
        ({"physical_to_logical_map": np.zeros((3, 8), np.int64)}, "counts of logical experts; add up the copies"),
        ("transposed", r"axes that look like \[layers, steps, experts\]"),
        ("totals", "a last expert that is the sum of the others"),
        ("ids", "experts of tokens, by the numbers"),
        ({"permutation": np.array([3, 1, 0, 2, 7, 6, 5, 4])}, "permutation beside counts; experts in order"),
        ({"ep_rank": np.arange(12) % 2}, "ep_rank beside counts; every step once, of all ranks"),
        ({"gpu": np.arange(12) % 2}, "gpu beside counts; steps of one network, of all its processes"),
        ({"is_dummy": np.arange(12) < 2}, "is_dummy beside counts; steps that were served; leave out the others"),
        ({"repeats": np.arange(12) + 1}, "repeats beside counts; steps that count once"),
        ({"block_numbers": np.array([3, 4, 5])}, "block_numbers beside counts; layer_ids, if it says which layers"),
        ("counters", "counters that add up, by the numbers; assignments of each step; subtract"),
    ],
)
def test_arrays_by_hand_say_what_they_are(tmp_path: Path, kind: str, change: object, word: str) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 60, 12)
    counts = np.stack([rng.multinomial(int(n), rng.dirichlet(np.ones(8)), size=3) for n in tokens])
    arrays = {"counts": counts}
    if isinstance(change, dict):
        arrays |= change
    elif change == "transposed":
        arrays["counts"] = np.ascontiguousarray(counts.transpose(1, 0, 2))
    elif change == "counters":
        arrays["counts"] = counts.cumsum(axis=0)
    elif change == "totals":
        arrays["counts"] = np.concatenate([counts, counts.sum(axis=2, keepdims=True)], axis=2)
    else:
        arrays["counts"] = np.ascontiguousarray(np.argsort(rng.random((300, 3, 8)), axis=2)[:, :, :2])
    path = tmp_path / f"traces.{kind}"
    save = save_file if kind == "safetensors" else lambda named, where: np.savez(where, **named)
    save(arrays, path)
    with pytest.raises(InputError, match=word):
        Traces.load(path)
    more = {
        "measured_at": np.zeros(4),
        "fullest": counts.sum(axis=(0, 1)).argsort(),
        "expert_rank": counts.sum(axis=(0, 1)).argsort().argsort(),
        "batch_size": tokens,
        "num_ranks": np.arange(12) // 6 + 1,
        "weight_version": np.arange(12) // 4,
        "block_sizes": [4, 8, 9],
        "layer_rows": [4, 8, 9],
    }
    save({"counts": counts, "layer_ids": np.array([3, 4, 5])} | {k: np.array(v) for k, v in more.items()}, path)
    assert Traces.load(path).layer_ids == (3, 4, 5)


def test_steps_of_a_long_record_are_looked_at_and_anything_else_in_a_file_is_left(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).integers(0, 9, (600, 1, 8))
    np.savez(tmp_path / "t.npz", counts=counts, notes=np.array([None, {}], dtype=object))
    with zipfile.ZipFile(tmp_path / "t.npz", "a") as archive:
        archive.writestr("README.txt", "how these were recorded")
    assert Traces.load(tmp_path / "t.npz").num_steps == 600
    long = np.repeat(counts.astype(np.uint8), 300, axis=0)
    np.savez(tmp_path / "t.npz", counts=long, step=np.arange(len(long)) // 2)
    with pytest.raises(InputError, match="step beside counts; every step once"):
        Traces.load(tmp_path / "t.npz")


def test_experts_that_a_file_says_are_checked(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", counts=np.arange(32).reshape(2, 2, 8), num_experts=16)
    with pytest.raises(InputError, match="got 8 experts; 16, as num_experts says"):
        Traces.load(tmp_path / "t.npz")
    np.savez(tmp_path / "t.npz", counts=np.arange(32).reshape(2, 2, 8), num_experts=np.arange(16).reshape(2, 8))
    with pytest.raises(InputError, match=r"^[^\n]* as num_experts says$"):
        Traces.load(tmp_path / "t.npz")
    np.savez(tmp_path / "t.npz", counts=np.arange(32).reshape(2, 2, 8), num_experts=np.array([8]))
    assert Traces.load(tmp_path / "t.npz").num_experts == 8


def test_odd_recordings_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layers_idle = rng.multinomial(256, np.full(16, 1 / 16), (20, 4)) * (rng.random((20, 4, 1)) < 0.8)
    kinds = {
        "all experts alike, one layer": np.full((9, 1, 8), 5),
        "one step again and again": np.tile(rng.multinomial(64, np.full(4, 0.25), (1, 1)), (12, 1, 1)),
        "two experts, an odd batch": rng.multinomial(7, [0.5, 0.5], (64, 1)),
        "two experts, batches of all sizes": rng.integers(0, 4, (64, 1, 2)),
        "idle layers, 256 assignments": layers_idle,
        "one step of two layers": np.full((1, 2, 8), 3),
    }
    for kind, counts in kinds.items():
        np.savez(tmp_path / "t.npz", counts=counts)
        assert (Traces.load(tmp_path / "t.npz").counts == counts).all(), kind


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_arrays_by_layer_have_a_way_in(tmp_path: Path, kind: str) -> None:
    arrays, path = {f"layer_{i}": np.arange(16).reshape(2, 8) for i in range(3)}, tmp_path / f"t.{kind}"
    np.savez(path, **arrays) if kind == "npz" else save_file(arrays, path)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"named counts is needed; gemopt trace import .*--from array"):
        Traces.load(path)


@pytest.mark.parametrize("change", ["transposed", "counters"])
def test_counts_in_floats_are_looked_at_as_well(tmp_path: Path, change: str) -> None:
    rng = np.random.default_rng(0)
    popular = rng.dirichlet(np.ones(8), size=3)
    counts = np.stack([[rng.multinomial(int(n), row) for row in popular] for n in rng.integers(20, 60, 12)])
    np.savez(tmp_path / "a.npz", counts=counts.astype(np.float32))
    assert (Traces.load(tmp_path / "a.npz").counts == counts).all()
    wrong = counts.transpose(1, 0, 2) if change == "transposed" else counts.cumsum(axis=0)
    np.savez(tmp_path / "a.npz", counts=wrong.astype(np.float64))
    with pytest.raises(InputError, match=r"axes that look like \[layers|counters that add up"):
        Traces.load(tmp_path / "a.npz")


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 0, 1)])
def test_axes_in_another_order_are_refused_in_python_too(order: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    popular = rng.dirichlet(np.ones(8), size=4)
    counts = np.stack([[rng.multinomial(int(n), row) for row in popular] for n in rng.integers(20, 60, 12)])
    assert (Traces(counts=counts).counts == counts).all()
    with pytest.raises(InputError, match=r"axes that look like.*or say layer_ids beside it"):
        Traces(counts=counts.transpose(order))
    given = counts.transpose(order)
    assert (Traces(counts=given, layer_ids=range(given.shape[1])).counts == given).all()
    with pytest.raises(InputError, match="experts of tokens, by the numbers"):
        Traces(counts=rng.random((90, 4, 16)).argsort(axis=2)[..., :2])


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_steps_again_and_again_are_counts_in_order(layers: int) -> None:
    rng = np.random.default_rng(3)
    step = np.rint(rng.dirichlet(np.ones(8), layers) * 256).astype(int)  # mean loads: layers differ by what was rounded
    for steps in (2, 5, 12):
        assert (Traces(counts=np.tile(step, (steps, 1, 1))).counts == step).all()
    two = np.array([[[20, 14, 25, 28], [1, 14, 8, 0]], [[19, 4, 18, 6], [24, 26, 2, 29]]])[:, :layers]
    assert Traces(counts=np.tile(two, (32, 1, 1))).num_steps == 64  # no token chose an expert twice in any


@pytest.mark.parametrize(
    "counts",
    [
        [[[1, 1], [3, 1]], [[3, 2], [0, 2]], [[1, 2], [2, 2]]],
        [[[2, 1], [0, 3]], [[0, 1], [2, 3]]],
        [[[2, 3], [1, 0], [2, 2]], [[0, 1], [1, 2], [2, 0]]],
        [[[3, 1, 0], [1, 1, 3]], [[1, 0, 1], [2, 3, 2]], [[3, 0, 3], [0, 2, 1]], [[0, 2, 1], [2, 1, 0]]],
    ],
)
def test_few_small_sums_that_are_equal_by_chance_are_no_other_order(counts: list[list[list[int]]]) -> None:
    assert Traces(counts=np.array(counts)).counts.tolist() == counts

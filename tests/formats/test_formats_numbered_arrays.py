"""Arrays that number layers or steps in their names: .npz, .safetensors and .pt, as hooks keep them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from routed_counts import routed

from gemopt.exceptions import InputError

COUNTS = routed(np.random.default_rng(5), steps=5, layers=3, experts=16, tokens=40)
COUNTS[1:] += routed(np.random.default_rng(6), steps=4, layers=3, experts=16, tokens=9)  # steps differ
NAMES = ["layer_{}", "model.layers.{}.mlp.gate.tokens_per_expert", "blk.{}"]


def write(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **{str(name): array for name, array in arrays.items()})
    elif path.suffix == ".safetensors":
        pytest.importorskip("safetensors.numpy").save_file(
            {str(name): np.ascontiguousarray(array) for name, array in arrays.items()}, path
        )
    else:
        torch = pytest.importorskip("torch")
        torch.save({name: torch.tensor(array) for name, array in arrays.items()}, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
@pytest.mark.parametrize("name", NAMES)
def test_layers(load, tmp_path, suffix, name):
    arrays = {name.format(3 + i): COUNTS[:, i] for i in (2, 0, 1)}  # in any order
    traces, notes = load(write(tmp_path / f"a{suffix}", arrays), "array")
    assert traces.layer_ids == (3, 4, 5) and (traces.counts == COUNTS).all()
    assert "rows are layers" not in notes
    sums = {key: array.sum(axis=0) for key, array in arrays.items()}
    traces, _ = load(write(tmp_path / f"a{suffix}", sums), "array", num_hidden_layers=7)
    assert traces.layer_ids == (3, 4, 5) and (traces.counts == COUNTS.sum(axis=0)).all()


def test_steps_and_numbers_alone(load, tmp_path):
    path = tmp_path / "a.npz"
    write(path, {f"step_{10 * t}": COUNTS[t] for t in range(5)})
    assert (load(path, "array")[0].counts == COUNTS).all()
    write(path, {f"arr_{t}": COUNTS[t] for t in range(5)})  # np.savez(path, *steps): the sums tell
    assert (load(path, "array")[0].counts == COUNTS).all()
    write(path, {i: COUNTS[:, i] for i in range(3)})
    assert (load(path, "array")[0].counts == COUNTS).all()
    constant = routed(np.random.default_rng(5), steps=4, layers=3, experts=16, tokens=40)
    write(path, {i: constant[:, i] for i in range(3)})
    with pytest.raises(InputError, match=r"do not tell layers from steps; .*name them layer_0"):
        load(path, "array")
    write(path, {f"layer_{i}": constant[:, i] for i in range(3)})
    assert (load(path, "array")[0].counts == constant).all()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({f"layer_{i}": COUNTS[: 2 + i, i] for i in range(3)}, "arrays of shapes"),
        ({f"step_{t}": COUNTS[t, 0] for t in range(5)}, r"counts of a step, \[layers, experts\]"),
        ({f"layer_{i}_topk_ids": COUNTS[:, i] for i in range(3)}, "from_tokens counts"),
        ({f"layer_{i}.local_counts": COUNTS[:, i] for i in range(3)}, "counts of logical experts"),
        ({f"layer_{i}.load_ratio": COUNTS[:, i] for i in range(3)}, "counts themselves"),
        ({f"rank_{i}": COUNTS for i in range(3)}, "one array, or one called counts"),
        ({f"mtp.layers.{i}.mlp": COUNTS[:, i] for i in range(3)}, "one array, or one called counts"),
        ({f"layer_{i}": COUNTS[:, i] / 7 for i in range(3)}, "whole numbers"),
    ],
)
def test_refused(load, tmp_path, arrays, words):
    with pytest.raises(InputError, match=words):
        load(write(tmp_path / "a.npz", arrays), "array")


def test_files_with_other_layers(load, tmp_path):
    for t, first in enumerate((3, 4)):
        write(tmp_path / f"a_{t}.npz", {f"layer_{first + i}": COUNTS[t : t + 1, i] for i in range(3)})
    with pytest.raises(InputError, match=r"a_1.npz: layers: .*\(3, 4, 5\), as in a_0.npz"):
        load([tmp_path / "a_0.npz", tmp_path / "a_1.npz"], "array")


def test_the_array_that_is_called_counts_is_taken_among_others(load, tmp_path):
    counts = routed(np.random.default_rng(6), steps=3)
    np.savez(tmp_path / "a.npz", global_tokens_per_expert=counts, aux_loss=np.ones(3), iteration=np.arange(3))
    traces, notes = load(tmp_path / "a.npz", "array")
    assert (traces.counts == counts).all() and "a.npz: aux_loss, iteration left unread" in notes
    np.savez(tmp_path / "a.npz", expert_load=counts, num_tokens=counts.sum(axis=(1, 2)), max_load=counts.max(axis=2))
    assert (load(tmp_path / "a.npz", "array")[0].counts == counts).all()
    np.savez(tmp_path / "a.npz", routing=counts, num_tokens=counts.sum(axis=(1, 2)))
    with pytest.raises(InputError, match=r"a.npz: got routing, num_tokens; one array, or one called counts"):
        load(tmp_path / "a.npz", "array")
    np.savez(tmp_path / "a.npz", expert_load=counts[0], aux_loss=np.ones(3))
    with pytest.raises(InputError, match=r"2 dimensions; .* are one step, counts\[None\]"):
        load(tmp_path / "a.npz", "array")
    for names in (("expert_load", "token_counts"), ("a", "b")):
        np.savez(tmp_path / "a.npz", **dict.fromkeys(names, counts))
        with pytest.raises(InputError, match=r"one array, or one called counts; .*name them layer_0, "):
            load(tmp_path / "a.npz", "array")


def test_layers_that_hold_several_arrays(load, tmp_path):
    """As REAP's observer keeps them; in JSON as well."""
    torch = pytest.importorskip("torch")
    order = np.random.default_rng(5).random((4, 400, 8)).argsort(axis=2)[..., :2]
    counts = np.stack([np.bincount(chosen.reshape(-1), minlength=8) for chosen in order])
    more = {"total_tokens": torch.tensor(400), "pairwise_expert_frequency": torch.ones((8, 8), dtype=torch.int64)}
    more["weighted_expert_frequency_sum"] = torch.rand(8)
    state = {i: {"expert_frequency": torch.tensor(row), **more} for i, row in enumerate(counts)}
    torch.save(state, tmp_path / "a.pt")
    traces, notes = load(tmp_path / "a.pt", "array")
    assert (traces.counts == counts).all() and "pairwise_expert_frequency" in notes
    for other in ({"physical_to_logical_map": torch.arange(8)}, {"token_counts": torch.arange(8)}):
        torch.save({i: {**each, **other} for i, each in state.items()}, tmp_path / "a.pt")
        with pytest.raises(InputError, match=r"physical_to_logical_map|one array of counts"):
            load(tmp_path / "a.pt", "array")
    layers = {str(i): {"counts": row.tolist(), "total": 800, "entropy": 1.5 + i} for i, row in enumerate(counts)}
    (tmp_path / "a.json").write_text(json.dumps({"model": "m", "layers": layers}))
    assert (load(tmp_path / "a.json", "array")[0].counts == counts).all()


@pytest.mark.parametrize(
    ("name", "beside", "words"),
    [
        ("experts", np.random.default_rng(0).permutation(16), "experts in order; does it say which experts they are"),
        ("order", np.arange(16)[::-1], "experts in order"),
        ("iterations", [10, 20, 20, 30, 40], "every step once, in order"),
        ("steps", [4, 3, 2, 1, 0], "every step once, in order"),
        ("batch", np.array([4, 3, 2, 1, 0], np.uint8), "every step once, in order"),
        ("rank", [0, 1, 0, 1, 0], "every step once, of all ranks"),
        ("is_dummy", [1, 1, 0, 0, 0], "steps that were served; leave out the others"),
    ],
)
def test_arrays_beside_counts_that_tell_another_order_or_steps_apart(load, tmp_path, name, beside, words):
    np.savez(tmp_path / "a.npz", expert_counts=COUNTS, **{name: beside})
    with pytest.raises(InputError, match=f"{name} beside counts; {words}"):
        load(tmp_path / "a.npz", "array")
    if name != "experts":  # which is refused in any order
        (tmp_path / "a.json").write_text(json.dumps({"counts": COUNTS.tolist(), name: np.asarray(beside).tolist()}))
        with pytest.raises(InputError, match=f"{name} beside counts; {words}"):
            load(tmp_path / "a.json", "array")
    same = {name: np.arange(len(beside)) * (name not in ("rank", "is_dummy"))}
    np.savez(tmp_path / "a.npz", expert_counts=COUNTS, num_padding=[3, 0, 7, 1, 2], **same)
    traces, notes = load(tmp_path / "a.npz", "array")
    assert (traces.counts == COUNTS).all() and f"num_padding, {name} left unread" in notes


def test_single_values_beside_counts_that_change_nothing_are_taken(load, tmp_path):
    taken = {
        "start_layer": 0,
        "pp_rank": 0,
        "num_redundant_experts": 0,
        "is_warmup": False,
        "valid": True,
        "scale": 1.0,
    }
    np.savez(tmp_path / "a.npz", expert_counts=COUNTS, **taken)
    traces, notes = load(tmp_path / "a.npz", "array")
    assert (traces.counts == COUNTS).all() and f"{', '.join(taken)} left unread" in notes
    for name, value in {**dict.fromkeys(taken, 2), "is_warmup": True, "valid": False}.items():
        np.savez(tmp_path / "a.npz", expert_counts=COUNTS, **{name: value})
        with pytest.raises(InputError, match=f"{name} beside counts"):
            load(tmp_path / "a.npz", "array")


def test_arrays_and_lists_beside_counts_that_change_nothing(load, tmp_path):
    tokens = COUNTS[:, 0].sum(axis=1)
    beside = {
        "batch_size": [64, 64, 32, 48, 48],
        "batch": tokens // 8,
        "step_time_us": [900, 870, 880, 880, 990],
        "slowest_rank": [3, 0, 0, 1, 3],
        "num_padded": [0, 1, 0, 0, 1],
        "hot_experts": np.argsort(-COUNTS.sum(axis=(0, 1)), kind="stable"),
        "num_tokens": tokens,
        "experts": np.arange(16),
        "request_ids": [7, 9, 1, 4, 4],
    }
    for name, array in beside.items():
        np.savez(tmp_path / "a.npz", counts=COUNTS, **{name: array})
        (tmp_path / "a.json").write_text(json.dumps({"counts": COUNTS.tolist(), name: np.asarray(array).tolist()}))
        for path in (tmp_path / "a.npz", tmp_path / "a.json")[: 1 if name == "hot_experts" else 2]:
            traces, notes = load(path, "array")
            assert (traces.counts == COUNTS).all() and f"{name} left unread" in notes
    few = COUNTS[:2, :2, :2]  # as many steps, layers and experts
    np.savez(tmp_path / "a.npz", counts=few, is_prefill=[True, False], queue=[1, 0])
    assert (load(tmp_path / "a.npz", "array")[0].counts == few).all()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".json"])
@pytest.mark.parametrize("name", ["step_{}", "expert_load_iter{}", "layer_{}", "model.layers.{}.mlp"])
def test_files_that_hold_a_step_or_a_layer_each(load, tmp_path, suffix, name):
    counts, of_steps = routed(np.random.default_rng(8), steps=11, layers=4), "layer" not in name
    for number, each in enumerate(counts if of_steps else counts.transpose(1, 0, 2)):
        path = tmp_path / f"{name.format(3 + number)}{suffix}"
        if suffix == ".json":
            path.write_text(json.dumps(each.tolist()))
        else:
            (np.save if suffix == ".npy" else np.savez)(path, each)
    traces, notes = load(tmp_path, "array")
    assert (traces.counts == counts).all()
    assert traces.layer_ids == ((0, 1, 2, 3) if of_steps else (3, 4, 5, 6))
    assert ("rows are layers 0 to 3: if dense layers were left out, give --layer-ids" in notes) == of_steps
    with pytest.raises(InputError, match="2 dimensions"):
        load(path, "array")  # alone it may be either


def test_files_of_steps_whose_axes_are_turned_are_refused(load, tmp_path):
    for step, each in enumerate(routed(np.random.default_rng(9))):
        np.save(tmp_path / f"step_{step}.npy", each.T)
    with pytest.raises(InputError, match=r"axes that look like \[steps, experts, layers\]"):
        load(tmp_path, "array")


def test_files_of_steps_say_layers_phases_and_top_k_too(load, tmp_path):
    counts = routed(np.random.default_rng(8), steps=11, layers=4)
    files = [tmp_path / f"step_{step}.npz" for step in range(11)]
    for path, each in zip(files, counts, strict=True):
        np.savez(path, **{f"layer_{3 + i}": row[None] for i, row in enumerate(each)})
    traces, _ = load(files, "array")
    assert traces.layer_ids == (3, 4, 5, 6) and (traces.counts == counts).all()
    np.savez(tmp_path / "step_4.npz", **{f"layer_{4 + i}": row[None] for i, row in enumerate(counts[4])})
    with pytest.raises(InputError, match=r"step_4.npz: layers: .*4, 5, 6, 7.*; \(3, 4, 5, 6\), as in step_0.npz"):
        load(files, "array")

    paths = [tmp_path / f"step_{step}.json" for step in range(11)]
    rows = [{"step": t, "phase": ("prefill", "decode")[t % 2], "top_k": 2} for t in range(11)]
    for path, row, each in zip(paths, rows, counts, strict=True):
        path.write_text(json.dumps({**row, "counts": each.tolist()}))
    traces, _ = load(paths, "array")
    assert traces.top_k == 2 and traces.phase.tolist() == [t % 2 for t in range(11)]
    (tmp_path / "x").mkdir()
    paths[3].rename(tmp_path / "x" / "step_11.json")  # which says that it is the fourth
    with pytest.raises(InputError, match=r"PATHS: step: got 0, 1, 2, 4, .* files of rising steps"):
        load([*paths[:3], *paths[4:], tmp_path / "x" / "step_11.json"], "array")


@pytest.mark.parametrize("other", ["prefill", ""])
def test_files_of_layers_tell_one_phase_of_a_step(load, tmp_path, other):
    counts, phases = routed(np.random.default_rng(8), steps=4, layers=2), ["decode"] * 4
    for layer, each in enumerate(counts.transpose(1, 0, 2)):
        rows = [{"phase": phase, "counts": [row]} for phase, row in zip(phases, each.tolist(), strict=True)]
        (tmp_path / f"layer_{layer}.json").write_text(json.dumps(rows))
        phases = [other or "decode"] * 4
    if other:
        with pytest.raises(InputError, match="PATHS: phase: got others in some layers"):
            load(tmp_path, "array")
    else:
        assert load(tmp_path, "array")[0].phase.tolist() == [1] * 4

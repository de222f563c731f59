"""Rows of tokens as arrays, as objects that hooks appended to a list, and in a file for each layer."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gemopt.exceptions import InputError
from gemopt.traces import Phase

SIZES, LAYERS, EXPERTS = (9, 4, 1, 6), (2, 3, 5), 8
STEP = np.repeat(np.arange(len(SIZES)), SIZES)
IDS = np.random.default_rng(0).random((len(STEP), len(LAYERS), EXPERTS)).argsort(axis=2)[..., :2]
COUNTS = np.array(
    [[np.bincount(IDS[t == STEP, i].ravel(), minlength=EXPERTS) for i in range(3)] for t in range(len(SIZES))]
)
COLUMNS = {"step": np.repeat(STEP, 3), "layer": np.tile(LAYERS, len(STEP)), "topk_ids": IDS.reshape(-1, 2).copy()}


def load_all(load, path, counts=COUNTS, **options):
    traces, notes = load(path, "tokens", **options)
    assert (traces.counts == counts).all() and traces.layer_ids == LAYERS
    return notes


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_columns_as_arrays(load, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".npz":
        np.savez(path, **COLUMNS, num_experts=EXPERTS)
    elif suffix == ".safetensors":
        pytest.importorskip("safetensors.numpy").save_file(COLUMNS, path)
    else:
        torch = pytest.importorskip("torch")
        torch.save({name: torch.from_numpy(each) for name, each in COLUMNS.items()}, path)
    load_all(load, path)


def test_columns_of_requests_and_of_single_experts(load, tmp_path):
    place = np.concatenate([np.arange(n) for n in SIZES])
    requests = {"sequence_id": COLUMNS["step"], "token_idx": np.repeat(place, 3), "layer_index": COLUMNS["layer"]}
    np.savez(tmp_path / "a.npz", **requests, expert_ids=COLUMNS["topk_ids"], prompt_length=np.full(60, 3))
    in_flight = np.array([COUNTS[0] * 0 for _ in range(9)])
    for at, ids in zip(place, IDS, strict=True):
        in_flight[at] += (ids[:, :, None] == np.arange(EXPERTS)).sum(axis=1)
    assert "prompt_length left unread" in load_all(load, tmp_path / "a.npz", in_flight, phase=Phase.MIXED)
    alone = {name: np.repeat(each, 2) for name, each in COLUMNS.items() if name != "topk_ids"}
    np.savez(tmp_path / "a.npz", **alone, expert=IDS.ravel())
    load_all(load, tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"valid": np.arange(60) > 3}, "valid false, true; rows of tokens that were computed"),
        ({"physical_to_logical_map": np.arange(8)}, "logical experts"),
        ({"rank": np.arange(60) % 2}, "rank: got 1; 0, tokens of all ranks"),
        ({"topk_weights": np.zeros((60, 2))}, "a token of no weight"),
    ],
)
def test_columns_that_say_more_are_heeded(load, tmp_path, more, words):
    np.savez(tmp_path / "a.npz", **COLUMNS, **more)
    with pytest.raises(InputError, match=words):
        load(tmp_path / "a.npz", "tokens")


def test_objects_that_hooks_appended(load, tmp_path):
    torch = pytest.importorskip("torch")
    each = [
        {"layer": f"model.layers.{layer}.mlp", "expert_indices": torch.from_numpy(IDS[t == STEP, i])}
        for t in range(len(SIZES))
        for i, layer in enumerate(LAYERS)
    ]
    torch.save(each, tmp_path / "a.pt")
    assert "taken as what a forward pass computed" in load_all(load, tmp_path / "a.pt")
    torch.save([{**row, "step": i // 3} for i, row in enumerate(each)], tmp_path / "a.pt")
    load_all(load, tmp_path / "a.pt")
    torch.save(each[:-1], tmp_path / "a.pt")
    with pytest.raises(InputError, match="which tokens are computed together"):
        load(tmp_path / "a.pt", "tokens")


def write(path, ids, **more):
    lists = [{"indices": each, **{k: v[i].item() for k, v in more.items()}} for i, each in enumerate(ids.tolist())]
    if path.suffix == ".npy":
        np.save(path, ids)
    elif path.suffix == ".npz":
        np.savez(path, topk_ids=ids, topk_weights=np.full(ids.shape, 0.5))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, lists)))
    else:
        pytest.importorskip("pyarrow")
        pytest.importorskip("pandas").DataFrame(lists).to_parquet(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".jsonl", ".parquet"])
def test_a_file_for_each_layer(load, tmp_path, suffix):
    """As FLAME-MoE's traces are: `actives/iter_0540/layer_02.parquet`, with `scores` and `indices`."""
    folder = tmp_path / "dump"
    folder.mkdir()
    for layer, ids in zip(LAYERS, IDS.transpose(1, 0, 2), strict=True):
        write(folder / f"layer_{layer:02d}{suffix}", ids)
    each = (IDS[..., None] == np.arange(EXPERTS)).sum(axis=2)
    load_all(load, folder, each, phase=Phase.MIXED)
    write(folder / f"layer_03{suffix}", IDS[1:, 1])
    with pytest.raises(InputError, match=r"the same tokens in each layer|tokens without some layers"):
        load(folder, "tokens", phase=Phase.MIXED)


def test_files_of_layers_with_steps(load, tmp_path):
    for layer, ids in zip(LAYERS, IDS.transpose(1, 0, 2), strict=True):
        write(tmp_path / f"layer_{layer:02d}.jsonl", ids, step=STEP)
    load_all(load, tmp_path)


def test_files_of_layers_with_lists_of_passes(load, tmp_path):
    torch = pytest.importorskip("torch")
    for layer, ids in zip(LAYERS, IDS.transpose(1, 0, 2), strict=True):
        torch.save([torch.from_numpy(ids[t == STEP]) for t in range(len(SIZES))], tmp_path / f"layer_{layer}.pt")
    load_all(load, tmp_path)

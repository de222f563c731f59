"""What TensorRT-LLM records; counts must equal the truth."""

from __future__ import annotations

import json

import numpy as np
import pytest
from recordings import load

from gemopt.exceptions import InputError
from gemopt.formats.importing import import_traces
from gemopt.traces import Traces


def write_statistic(folder, counts_RTLE, layers, *, start=100, top_k=2):
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    experts = counts_RTLE.shape[3]
    (folder / "meta_info.json").write_text(json.dumps({"num_experts": experts, "num_experts_per_token": top_k}))
    for rank, counts in enumerate(counts_RTLE):
        arrays = {
            f"{start + step}_{layer}": np.ascontiguousarray(counts[step, index])
            for step in range(len(counts))
            for index, layer in enumerate(layers)
        }
        save_file(arrays, folder / f"rank{rank}.safetensors")


def test_tensorrt_llm_statistic(tmp_path):
    counts = np.random.default_rng(0).integers(0, 99, (4, 12, 3, 8))
    write_statistic(tmp_path / "stat", counts, [3, 4, 61])
    traces, _ = load(tmp_path / "stat", "tensorrt-llm", tmp_path, num_hidden_layers=61)
    assert (traces.counts == counts.sum(axis=0)[:, :2]).all()  # layer 61 is a draft layer
    assert traces.layer_ids == (3, 4)
    assert traces.top_k == 2
    whole, _ = load(tmp_path / "stat", "tensorrt-llm", tmp_path)
    assert (whole.counts == counts.sum(axis=0)).all()
    assert whole.layer_ids == (3, 4, 61)


def test_tensorrt_llm_files_of_the_folder(tmp_path):
    """All of them are the folder; some of them are not."""
    counts = np.random.default_rng(3).integers(0, 99, (2, 5, 3, 8))
    write_statistic(tmp_path / "stat", counts, [0, 1, 2])
    files = sorted((tmp_path / "stat").iterdir())
    target = tmp_path / "out.safetensors"
    import_traces(files, source="tensorrt-llm", destination=target)
    assert (Traces.load(target).counts == counts.sum(axis=0)).all()
    for some in (files[:-1], files[1:]):
        with pytest.raises(InputError, match="one folder"):
            import_traces(some, source="tensorrt-llm", destination=target)


def test_tensorrt_llm_ranks_that_saw_the_same_tokens(tmp_path):
    counts = np.random.default_rng(2).integers(0, 99, (1, 5, 3, 8))
    write_statistic(tmp_path / "stat", np.repeat(counts, 4, axis=0), [0, 1, 2])
    traces, notes = load(tmp_path / "stat", "tensorrt-llm", tmp_path)
    assert (traces.counts == counts[0]).all()
    assert "counted once" in notes[1]
    write_statistic(tmp_path / "stat", np.concatenate([np.repeat(counts, 3, axis=0), counts + 1]), [0, 1, 2])
    assert (load(tmp_path / "stat", "tensorrt-llm", tmp_path)[0].counts == 4 * counts[0] + 1).all()


def test_tensorrt_llm_folder_problems(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "stat"
    counts = np.random.default_rng(1).integers(1, 99, (3, 4, 2, 8))

    def refused(word, **options):
        with pytest.raises(InputError, match=word):
            load(folder, "tensorrt-llm", tmp_path, **options)

    folder.mkdir()
    refused("meta_info")
    write_statistic(folder, counts, [0, 1])
    refused("rank 3 is missing", num_ranks=4)
    (folder / "rank1.safetensors").unlink()
    refused("rank 1 is missing")
    write_statistic(folder, counts, [0, 1])
    arrays = load_file(folder / "rank2.safetensors")
    save_file({k: v for k, v in arrays.items() if k != "101_0"}, folder / "rank2.safetensors")
    refused("7; 4 iterations x 2 layers")
    save_file({k: v[:4].copy() for k, v in arrays.items()}, folder / "rank2.safetensors")
    refused("num_experts in meta_info")
    save_file({**arrays, "raw": arrays["100_0"]}, folder / "rank2.safetensors")
    refused("iteration_layer")
    data = (folder / "rank0.safetensors").read_bytes()
    (folder / "rank0.safetensors").write_bytes(data[:-8])
    refused("complete safetensors")
    write_statistic(folder, counts, [0, 1])
    (folder / "meta_info.json").write_text('{"num_experts": 99, "num_experts_per_token": 2}')
    refused("num_experts")
    (folder / "meta_info.json").write_text("{}")
    refused("num_experts")


@pytest.mark.parametrize(
    "header",
    [
        {"0_0": {"dtype": "I64", "shape": [1 << 60], "data_offsets": [0, 64]}},
        {"0_0": {"dtype": "I64", "shape": [8], "data_offsets": [0, 1 << 50]}},
        {"0_0": {"dtype": "I64", "shape": [-8], "data_offsets": [64, 0]}},
        {"0_0": {"dtype": "F64", "shape": [8], "data_offsets": [0, 64]}},
        {"0_0": {"dtype": "I64", "shape": "8", "data_offsets": [0, 64]}},
        {"0_0": 3},
        [1],
    ],
)
def test_hostile_safetensors_headers(tmp_path, header):
    folder = tmp_path / "stat"
    write_statistic(folder, np.ones((1, 1, 1, 8), np.int64), [0])
    text = json.dumps(header).encode()
    (folder / "rank0.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    with pytest.raises(InputError, match="rank0"):
        load(folder, "tensorrt-llm", tmp_path)
    (folder / "rank0.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + text)
    with pytest.raises(InputError, match="rank0"):
        load(folder, "tensorrt-llm", tmp_path)

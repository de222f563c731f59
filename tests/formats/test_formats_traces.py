"""Arrays read as traces, options that do not fit, and the memory that reading takes."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import numpy as np
import pytest
from recordings import load, write_stat
from safetensors.numpy import save_file

from gemopt.exceptions import InputError, UnsupportedError
from gemopt.formats.layers import parse_layers
from gemopt.traces import Phase, Traces

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
@pytest.mark.parametrize("high", [50, 100_000])
def test_arrays(tmp_path, suffix, high):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, high, (6, 3, 5))
    counts[2] = 0
    path = tmp_path / f"counts{suffix}"
    writers = {
        ".npy": lambda: np.save(path, counts),
        ".npz": lambda: np.savez_compressed(path, other=np.zeros(2), counts=counts),
        ".pt": lambda: torch.save(torch.from_numpy(counts), path),
        ".safetensors": lambda: save_file({"anything": counts}, path),
    }
    writers[suffix]()
    traces, _ = load(path, "array", tmp_path, top_k=2, model="m")
    assert (traces.counts == counts[[0, 1, 3, 4, 5]]).all()
    assert (traces.top_k, traces.model) == (2, "m")
    if suffix == ".npz":
        assert "counts.npz: other left unread" in load(path, "array", tmp_path)[1]
    named, _ = load(path, "array", tmp_path, layer_ids=(3, 4, 7), num_hidden_layers=9)
    assert named.layer_ids == (3, 4, 7)
    assert (named.counts == traces.counts).all()


def routed(tokens_T, layers=5, experts=8):
    """[T, L, E] counts of top-2 routing, so many tokens a step."""
    rng = np.random.default_rng(1)
    share = [np.arange(1, experts + 1) / (experts * (experts + 1) / 2)] * layers
    return np.stack([2 * rng.multinomial(tokens, share) for tokens in tokens_T])


@pytest.mark.parametrize(
    ("order", "named"),
    [
        ((1, 0, 2), "layers, steps, experts"),
        ((0, 2, 1), "steps, experts, layers"),
        ((2, 0, 1), "experts, steps, layers"),
    ],
)
@pytest.mark.parametrize("steps", [6, 9])
def test_axes_in_another_order_are_refused(tmp_path, order, named, steps):
    counts = routed(range(20, 20 + steps))
    np.save(tmp_path / "right.npy", counts)
    assert (load(tmp_path / "right.npy", "array", tmp_path)[0].counts == counts).all()
    np.save(tmp_path / "wrong.npy", counts.transpose(order))
    with pytest.raises(InputError) as error:
        load(tmp_path / "wrong.npy", "array", tmp_path)
    assert f"axes that look like [{named}]" in str(error.value)
    layers, experts = counts.transpose(order).shape[1:]
    sizes = {"num_hidden_layers": layers, "num_experts": experts}
    assert load(tmp_path / "wrong.npy", "array", tmp_path, **sizes)[0].num_layers == layers


def test_more_layers_than_networks_have_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((2, 300, 4), int))
    with pytest.raises(InputError, match="300 layers"):
        load(tmp_path / "a.npy", "array", tmp_path)


def test_counters_that_add_up_are_named(tmp_path):
    np.save(tmp_path / "a.npy", routed([9] * 6).cumsum(axis=0))
    assert "counters that add up" in " ".join(load(tmp_path / "a.npy", "array", tmp_path)[1])


def test_a_top_k_that_does_not_divide_is_named(tmp_path):
    np.save(tmp_path / "a.npy", routed([8, 9, 10]))
    assert "1 of 3 steps are no multiple of 4" in " ".join(load(tmp_path / "a.npy", "array", tmp_path, top_k=4)[1])
    assert not load(tmp_path / "a.npy", "array", tmp_path, top_k=2, num_hidden_layers=5)[1]


def test_what_an_array_file_says_beside_its_counts_is_not_lost(tmp_path):
    path, counts = tmp_path / "a.npz", routed([9] * 4)
    phase = np.array([0, 1, 1, 0])
    np.savez(path, counts=counts, layer_ids=np.arange(3, 8), phase=phase)
    with pytest.raises(InputError, match="layer_ids, phase beside counts"):
        load(path, "array", tmp_path)
    traces = Traces.load(path)
    assert traces.layer_ids == (3, 4, 5, 6, 7) and (traces.phase == phase).all()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_ranks": 4}, "--ep: got 4; does not apply to arrays"),
        ({"keep_tokens": True}, "--keep-tokens"),
        ({"phase": Phase.PREFILL}, "--phase: got prefill"),
        ({"phase": Phase.DECODE}, "--phase: got decode"),
        ({"batch_size": 64}, "--batch-size"),
        ({"prefill_tokens": 64}, "--prefill-tokens"),
        ({"top_k": 9}, "--top-k: got 9; at most the 8 experts"),
    ],
)
def test_options_that_a_recording_does_not_heed_are_refused(tmp_path, options, named):
    np.save(tmp_path / "a.npy", routed([9] * 4))
    with pytest.raises(InputError) as error:
        load(tmp_path / "a.npy", "array", tmp_path, **options)
    assert named in str(error.value)


def test_wider_counts_appear_late(tmp_path):
    counts = np.ones((400, 2, 3), np.int32)
    counts[-1, -1, -1] = 70_000
    np.save(tmp_path / "a.npy", counts)
    assert (load(tmp_path / "a.npy", "array", tmp_path)[0].counts == counts).all()


@pytest.mark.parametrize(
    "array,word",
    [
        (np.zeros((2, 3, 4, 5)), "3-dimensional"),
        (np.full((2, 3, 4), 0.5), "got 0.5; whole numbers.*logits are no counts: count the experts"),
        (np.ones((2, 3, 4), np.float16), "float16"),
        (-np.ones((2, 3, 4), np.int64), "from 0"),
        (np.full((2, 3, 4), 1 << 40), "from 0"),
        (np.zeros((2, 3, 4), np.int64), "no step"),
        (np.zeros((0, 3, 4), np.int64), "at least one"),
        (np.array([None, 1], dtype=object), "npy"),
    ],
)
def test_bad_arrays(tmp_path, array, word):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=word):
        load(tmp_path / "a.npy", "array", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy"]


def test_zip_bomb(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("counts.npy", "w", force_zip64=True) as member,
    ):
        for _ in range(70):
            member.write(bytes(1 << 20))
    with pytest.raises(InputError, match="200 times"):
        load(tmp_path / "a.npz", "array", tmp_path)


def test_option_checks(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((2, 3, 4), np.int32))
    for options, word in [
        ({"num_experts": 5}, "--num-experts"),
        ({"num_hidden_layers": 5}, "--num-hidden-layers"),
        ({"layer_ids": (0, 9)}, "--layer-ids"),
    ]:
        with pytest.raises(InputError, match=word):
            load(tmp_path / "a.npy", "array", tmp_path, **options)
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "b.npy", "array", tmp_path)
    with pytest.raises(InputError, match="one of"):
        load(tmp_path / "a.npy", "nonsense", tmp_path)
    with pytest.raises(UnsupportedError, match="placement import"):
        load(tmp_path / "a.npy", "vllm-ascend", tmp_path)


@pytest.mark.parametrize("text,layers", [("3-5", (3, 4, 5)), ("1, 3-4,9", (1, 3, 4, 9)), ("0", (0,)), (None, None)])
def test_layer_lists(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "5-3", "1,1", "a", "-1", "1-", "3,2", "0-99999", "٣"])
def test_bad_layer_lists(text):
    with pytest.raises(InputError, match="--layer-ids"):
        parse_layers(text)


_PEAKS = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from gemopt.formats.importing import import_traces
for folder in sys.argv[2:]:
    import_traces([Path(folder)], source="sglang", destination=sys.argv[1])
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


def test_memory_is_that_of_one_file(tmp_path):
    """16 times the files do not need more memory: one file at a time, counts written as they come."""
    counts = np.random.default_rng(0).integers(1, 99, (100, 20, 1024)).astype(np.int32)  # 8 MB
    for files in (1, 16):
        folder = tmp_path / str(files)
        folder.mkdir()
        for number in range(files):
            write_stat(folder / f"expert_distribution_recorder_{1000 + number}.pt", counts + number)
    target = tmp_path / "t.safetensors"
    command = [sys.executable, "-c", _PEAKS, str(target), str(tmp_path / "1"), str(tmp_path / "16")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    one, sixteen = (1024 * int(line) for line in done.stdout.split())
    assert Traces.load(target).num_steps == 1600
    assert sixteen < one + 2 * counts.nbytes


@pytest.mark.parametrize("key", ["layers", "layer_indices", "moe_layer_ids", "TopK", "n_layers"])
def test_what_says_more_of_counts_by_any_name_is_refused(tmp_path, key):
    counts, value = routed([9] * 4), list(range(3, 8))
    np.savez(tmp_path / "a.npz", counts=counts, **{key: value})
    save_file({"counts": counts}, tmp_path / "a.safetensors", metadata={key: str(value), "format": "np"})
    for path in tmp_path.glob("a.*"):
        with pytest.raises(InputError, match=f"{key} beside counts; counts alone.*npz of counts, .* is traces already"):
            load(path, "array", tmp_path)
        with pytest.raises(InputError, match=rf"Traces\.{key}: got no such array"):
            Traces.load(path)


def test_names_of_arrays_and_files_say_what_they_hold(tmp_path):
    counts = routed([9] * 4)
    np.save(tmp_path / "global_physical_count.npy", counts)
    np.savez(tmp_path / "global_physical_count.npz", counts=counts)
    for path in tmp_path.glob("global*"):
        with pytest.raises(InputError, match="global_physical_count; counts of logical experts"):
            load(path, "array", tmp_path)
    np.save(tmp_path / "physical_science.npy", counts)
    assert (load(tmp_path / "physical_science.npy", "array", tmp_path)[0].counts == counts).all()
    np.savez(tmp_path / "a.npz", routed_expert_counts=counts)
    assert (load(tmp_path / "a.npz", "array", tmp_path)[0].counts == counts).all()
    np.savez(tmp_path / "a.npz", routed_experts=counts)
    with pytest.raises(InputError, match=r"an array routed_experts.*ids of tokens"):
        load(tmp_path / "a.npz", "array", tmp_path)
    np.savez(tmp_path / "a.npz", latency_us=counts)
    with pytest.raises(InputError, match=r"an array latency_us; counts \[steps, layers, experts\]$"):
        load(tmp_path / "a.npz", "array", tmp_path)


def test_what_tensors_say_is_heeded(tmp_path):
    counts, path = routed([9] * 4), tmp_path / "a.pt"
    torch.save({"counts": torch.tensor(counts, dtype=torch.float32, requires_grad=True)}, path)
    assert (load(path, "array", tmp_path)[0].counts == counts).all()
    torch.save({"counts": torch.tensor(counts), "num_experts": torch.tensor(7)}, path)
    with pytest.raises(InputError, match="8 experts; 7, as num_experts says"):
        load(path, "array", tmp_path)
    for told in (torch.tensor(8), torch.tensor([8])):
        torch.save({"counts": torch.tensor(counts), "num_experts": told}, path)
        assert (load(path, "array", tmp_path)[0].counts == counts).all()

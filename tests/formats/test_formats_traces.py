"""Recordings read: writers here follow the engines' formats on their own; counts must equal the truth."""

from __future__ import annotations

import base64
import io
import json
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from gemopt.exceptions import InputError, UnsupportedError
from gemopt.formats.engine import TraceOptions
from gemopt.formats.importing import import_traces
from gemopt.formats.layers import parse_layers
from gemopt.traces import Phase, Traces

torch = pytest.importorskip("torch")


def load(paths, source, tmp_path, **options) -> tuple[Traces, tuple[str, ...]]:
    paths = paths if isinstance(paths, list) else [paths]
    target = tmp_path / "out.safetensors"
    found = import_traces(paths, source=source, destination=target, options=TraceOptions(**options))
    traces = Traces.load(target)
    assert traces.num_steps == found.num_steps
    assert traces.counts.sum() == found.assignments
    return traces, found.notes


def sparse_counts(rng, steps=5, layers=4, experts=8, dense=1):
    """[T, layers, E] counts, none in the first `dense` layers, some in every step."""
    counts = rng.integers(0, 50, (steps, layers, experts)).astype(np.int32)
    counts[:, :dense] = 0
    counts[:, -1, -1] += 1
    return counts


# SGLang


def write_stat(path, counts):
    data = {"rank": 0, "logical_count": torch.from_numpy(counts), "average_utilization_rate_over_window": None}
    torch.save(data, path)


def write_detail(folder, physical_RTLP, table, *, first_pass=1, extra=None):
    """One per_pass file per rank."""
    folder.mkdir(exist_ok=True)
    for rank, physical in enumerate(physical_RTLP):
        records = [
            {
                "forward_pass_id": first_pass + step,
                "rank": rank,
                "gatherer_key": "primary",
                "global_physical_count": torch.from_numpy(np.ascontiguousarray(counts)),
                **(extra(rank, step) if extra else {}),
            }
            for step, counts in enumerate(physical)
        ]
        data = {"records": records, "last_physical_to_logical_map": torch.from_numpy(table)}
        torch.save(data, folder / f"expert_distribution_recorder_{1700000000.5 + rank}_{rank}.pt")


def physical_counts(rng, ranks=3, steps=4, layers=3, experts=6, slots=8, dense=1):
    """[R, T, layers, P] counts per rank, the map [layers, P] and the true logical counts."""
    table = np.stack([rng.permutation(np.append(np.arange(experts), rng.integers(0, experts, slots - experts)))
                      for _ in range(layers)])  # fmt: skip
    counts = rng.integers(0, 30, (ranks, steps, layers, slots)).astype(np.int32)
    counts[:, :, :dense] = 0
    truth = np.zeros((steps, layers, experts), np.int64)
    for layer, row in enumerate(table):
        for slot, expert in enumerate(row):
            truth[:, layer, expert] += counts[:, :, layer, slot].sum(axis=0)
    return counts, table, truth


def test_sglang_stat(tmp_path):
    rng = np.random.default_rng(0)
    first, second = sparse_counts(rng), sparse_counts(rng, steps=3)
    ring = np.concatenate([first, np.zeros((4, *first.shape[1:]), np.int32)])
    folder = tmp_path / "dumps"
    folder.mkdir()
    write_stat(folder / "expert_distribution_recorder_1700000009.5.pt", ring)
    write_stat(folder / "expert_distribution_recorder_1700000010.25.pt", second)
    traces, notes = load(folder, "sglang", tmp_path)
    assert (traces.counts == np.concatenate([first, second])[:, 1:]).all()
    assert traces.layer_ids == (1, 2, 3)
    assert traces.num_hidden_layers == 4
    assert "1700000010.25" in notes[0]
    assert "ring buffer" in notes[0]
    assert notes[1:] == ("layers 0 have no counts: taken as layers without experts",)


def test_sglang_stat_ring_in_time_order(tmp_path):
    counts = sparse_counts(np.random.default_rng(1), steps=5)
    ring = np.concatenate([counts[3:], np.zeros((3, *counts.shape[1:]), np.int32), counts[:3]])
    write_stat(tmp_path / "a.pt", ring)
    assert (load(tmp_path / "a.pt", "sglang", tmp_path)[0].counts == counts[:, 1:]).all()
    # Two runs of zeros: idle passes, not the end of the ring. The order stays as it is.
    gaps = ring.copy()
    gaps[0] = 0
    gaps[4] = 1
    gaps[5] = 0
    write_stat(tmp_path / "a.pt", gaps)
    expected = gaps[gaps.any(axis=(1, 2))]
    got = load(tmp_path / "a.pt", "sglang", tmp_path, layer_ids=(0, 1, 2, 3))[0].counts
    assert (got == expected).all()


def test_sglang_per_pass(tmp_path):
    counts, table, truth = physical_counts(np.random.default_rng(2))
    write_detail(tmp_path / "dumps", counts, table)
    (tmp_path / "dumps" / "unrelated.json").write_text("{}")  # the recorder's default folder is /tmp
    torch.save(torch.zeros(1), tmp_path / "dumps" / "unrelated.pt")
    traces, notes = load(tmp_path / "dumps", "sglang", tmp_path)
    assert (traces.counts == truth[:, 1:]).all()
    assert traces.layer_ids == (1, 2)
    assert traces.phase is None
    assert notes == ("4 forward passes of 3 ranks", "layers 0 have no counts: taken as layers without experts")


def test_sglang_ranks_that_saw_the_same_tokens_count_once(tmp_path):
    counts, table, truth = physical_counts(np.random.default_rng(3), ranks=1)
    write_detail(tmp_path / "dumps", np.repeat(counts, 4, axis=0), table)
    traces, notes = load(tmp_path / "dumps", "sglang", tmp_path)
    assert (traces.counts == truth[:, 1:]).all()
    assert "counted once" in notes[1]


def test_sglang_passes_of_some_ranks_are_left_out(tmp_path):
    counts, table, _ = physical_counts(np.random.default_rng(4), ranks=2)
    write_detail(tmp_path / "dumps", counts, table)
    path = next(p for p in (tmp_path / "dumps").iterdir() if p.stem.endswith("_1"))
    data = torch.load(path)
    data["records"] = data["records"][1:]
    torch.save(data, path)
    traces, notes = load(tmp_path / "dumps", "sglang", tmp_path)
    assert traces.num_steps == 3
    assert "1 passes that some ranks did not record" in notes[1]


def test_sglang_per_token(tmp_path):
    rng = np.random.default_rng(5)
    layers, experts, slots, ranks, steps = 3, 6, 8, 2, 3
    table = np.stack([np.append(rng.permutation(experts), [0, 1]) for _ in range(layers)])
    chosen = {(r, t): rng.integers(1, 5) for r in range(ranks) for t in range(steps)}
    topk = {key: np.full((layers, n, 8), -1, np.int32) for key, n in chosen.items()}
    physical = np.zeros((ranks, steps, layers, slots), np.int32)
    truth = np.zeros((steps, layers, experts), np.int64)
    for (rank, step), ids in topk.items():
        for layer in range(1, layers):
            for token in range(ids.shape[1]):
                picked = rng.choice(experts, 2, replace=False)
                where = [int(rng.choice(np.flatnonzero(table[layer] == e))) for e in picked]
                ids[layer, token, :2] = where
                physical[rank, step, layer, where] += 1
                truth[step, layer, picked] += 1

    def extra(rank, step):
        ids = topk[rank, step]
        return {
            "input_ids": list(range(ids.shape[1])),
            "positions": list(range(ids.shape[1])),
            "extend_seq_lens": None,
            "forward_mode": 1 if step == 0 and rank == 0 else 2,
            "topk_ids_of_layer": torch.from_numpy(ids),
            "misc_objects": [],
        }

    write_detail(tmp_path / "dumps", physical, table, extra=extra)
    plain, _ = load(tmp_path / "dumps", "sglang", tmp_path)
    assert (plain.counts == truth[:, 1:]).all()
    assert plain.phase.tolist() == [Phase.MIXED, Phase.DECODE, Phase.DECODE]
    assert plain.tokens is None
    wrong = [({"layer_ids": (1, 9)}, "--layer-ids"), ({"num_hidden_layers": 7}, "7"), ({"num_experts": 9}, "9")]
    for options, word in wrong:
        with pytest.raises(InputError, match=word):
            load(tmp_path / "dumps", "sglang", tmp_path, keep_tokens=True, **options)
    whole, _ = load(tmp_path / "dumps", "sglang", tmp_path, keep_tokens=True)
    assert (whole.counts == truth[:, 1:]).all()
    assert whole.top_k == 2
    expected = np.concatenate(
        [
            np.stack([table[layer][topk[rank, step][layer, :, :2]] for layer in (1, 2)], axis=1)
            for step in range(steps)
            for rank in range(ranks)
        ]
    )
    assert (whole.tokens.ids == expected).all()
    order = [(r, s) for s in range(steps) for r in range(ranks)]
    assert whole.tokens.source_rank.tolist() == [r for r, s in order for _ in range(chosen[r, s])]


def test_sglang_folder_problems(tmp_path):
    counts, table, _ = physical_counts(np.random.default_rng(6), ranks=3)
    folder = tmp_path / "dumps"
    write_detail(folder, counts, table)
    files = sorted(folder.iterdir())

    def refused(word, **options):
        with pytest.raises(InputError, match=word) as caught:
            load(folder, "sglang", tmp_path, **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out.safetensors").exists()

    refused("rank 3 is missing", num_ranks=4)
    refused("right --ep", num_ranks=2)
    saved = files[1].read_bytes()
    files[1].unlink()
    refused("rank 1 is missing")
    files[1].write_bytes(saved[: len(saved) // 2])
    refused("complete .pt")
    files[1].write_bytes(saved)
    whole, _ = load(folder, "sglang", tmp_path)
    (folder / "expert_distribution_recorder_1700000099.5_1.pt").write_bytes(saved)
    again, notes = load(folder, "sglang", tmp_path)
    assert (again.counts == whole.counts).all()
    assert "4 records came twice: counted once" in notes
    (tmp_path / "out.safetensors").unlink()
    data = torch.load(folder / "expert_distribution_recorder_1700000099.5_1.pt")
    data["records"][2]["global_physical_count"] += 1
    torch.save(data, folder / "expert_distribution_recorder_1700000099.5_1.pt")
    refused("twice, with other counts")
    (folder / "expert_distribution_recorder_1700000099.5_1.pt").unlink()
    write_stat(folder / "expert_distribution_recorder_1.5.pt", np.ones((2, 3, 6), np.int32))
    refused("import each kind apart")
    (folder / "expert_distribution_recorder_1.5.pt").unlink()
    data = torch.load(files[2])
    data["last_physical_to_logical_map"] = data["last_physical_to_logical_map"].flip(1)
    torch.save(data, files[2])
    refused("experts moved while recording")
    data["last_physical_to_logical_map"] = torch.from_numpy(table)
    data["records"][0]["global_physical_count"] = torch.full((3, 8), -1, dtype=torch.int32)
    torch.save(data, files[2])
    refused("counts from 0")
    data["records"][0]["global_physical_count"] = torch.ones((3, 9), dtype=torch.int32)
    torch.save(data, files[2])
    refused("shape")
    good = {"forward_pass_id": 1, "rank": 2, "global_physical_count": torch.ones((3, 8), dtype=torch.int32)}
    for record, word in [
        ({"rank": 0}, "forward_pass_id"),
        (3, "forward_pass_id"),
        ({**good, "rank": 1 << 40}, "rank"),
        ({**good, "rank": True}, "rank"),
        ({**good, "global_physical_count": None}, "whole numbers"),
    ]:
        data["records"][0] = record
        torch.save(data, files[2])
        refused(word)
    data["records"][0] = {**good, "forward_mode": [1], "input_ids": 3}
    torch.save(data, files[2])
    assert load(folder, "sglang", tmp_path)[0].num_steps == 4


def test_stat_files_of_two_networks(tmp_path):
    folder = tmp_path / "dumps"
    folder.mkdir()
    write_stat(folder / "a_1.pt", np.ones((2, 3, 6), np.int32))
    write_stat(folder / "a_2.pt", np.ones((2, 3, 8), np.int32))
    with pytest.raises(InputError, match="different networks"):
        load(folder, "sglang", tmp_path)
    write_stat(folder / "a_1.pt", np.ones((2, 3, 8), np.int32) * np.array([0, 1, 1], np.int32)[None, :, None])
    with pytest.raises(InputError, match="layer 0"):
        load(folder, "sglang", tmp_path)
    assert load(folder, "sglang", tmp_path, layer_ids=(0, 1, 2))[0].num_layers == 3
    assert not list(tmp_path.glob(".*"))


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_hostile_pt_files(tmp_path, capsys):
    path = tmp_path / "evil.pt"

    def refused(word):
        with pytest.raises(InputError, match=word) as caught:
            load(path, "sglang", tmp_path)
        assert str(path) in str(caught.value)

    torch.save({"logical_count": Evil()}, path)
    refused("complete .pt")
    path.write_bytes(pickle.dumps({"logical_count": Evil()}))
    refused("complete .pt")
    # A view that repeats four bytes 2^50 times.
    torch.save({"logical_count": torch.zeros(1, dtype=torch.int32).expand(1 << 20, 1 << 20, 1 << 10)}, path)
    refused("at most the")
    torch.save({"logical_count": torch.full((10, 10, 10), 0.5)}, path)
    refused("whole numbers")
    torch.save(torch.zeros(3), path)
    refused("recorder dump")
    torch.save({"logical_count": torch.zeros((2, 2, 2), dtype=torch.int32)}, path)
    with pytest.raises(InputError, match="no step"):
        load(path, "sglang", tmp_path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (1 << 24))
    refused("uncompressed")
    assert "executed" not in capsys.readouterr().out


# Responses


def requests(rng, layers=3, experts=8, top_k=2, lengths=((3, 4), (5, 2), (1, 6))):
    """(prompt tokens, generated tokens, ids [prompt + generated - 1, layers, K]) of some requests."""
    return [
        (p, g, np.argsort(rng.random((p + g - 1, layers, experts)), axis=2)[:, :, :top_k].astype(np.int32))
        for p, g in lengths
    ]


def expected_steps(decoded, batch):
    """Continuous batching, simulated token by token: each free sequence takes the next request."""
    waiting, running, steps = list(decoded), [], []
    while waiting or running:
        while waiting and len(running) < batch:
            running.append(list(waiting.pop(0)))
        steps.append([request.pop(0) for request in running])
        running = [request for request in running if request]
    return steps


def counted(steps, layers, experts):
    counts = np.zeros((len(steps), layers, experts), np.int64)
    for step, tokens in enumerate(steps):
        for ids in tokens:
            for layer, chosen in enumerate(ids):
                counts[step, layer, chosen] += 1
    return counts


def npy_text(array) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def test_vllm_responses(tmp_path):
    made = requests(np.random.default_rng(0))
    path = tmp_path / "responses.jsonl"
    lines = [
        {
            "choices": [{"routed_experts": npy_text(ids.astype(np.uint8))}],
            "usage": {"prompt_tokens": p, "completion_tokens": g},
        }
        for p, g, ids in made
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    traces, _ = load(path, "vllm", tmp_path, batch_size=2, num_experts=8)
    truth = counted(expected_steps([ids[p:] for p, _, ids in made], 2), 3, 8)
    assert (traces.counts == truth).all()
    assert (traces.phase == Phase.DECODE).all()
    prefill, _ = load(path, "vllm", tmp_path, batch_size=2, num_experts=8, phase=Phase.PREFILL)
    assert (prefill.counts == counted([[*made[0][2][:3], *made[1][2][:5]], made[2][2][:1]], 3, 8)).all()


def test_sglang_responses_and_dense_layers(tmp_path):
    made = requests(np.random.default_rng(1))
    path = tmp_path / "responses.json"
    bodies = []
    for _, g, ids in made:
        ids[:, 0] = 0  # a dense layer: never captured
        meta = {"completion_tokens": g, "routed_experts": base64.b64encode(ids.tobytes()).decode()}
        bodies.append({"text": "x", "meta_info": meta})
    path.write_text(json.dumps(bodies))
    traces, _ = load(path, "sglang", tmp_path, batch_size=4, num_hidden_layers=3, top_k=2, num_experts=8)
    assert traces.layer_ids == (1, 2)
    assert traces.num_hidden_layers == 3
    assert (traces.counts == counted(expected_steps([i[p:, 1:] for p, _, i in made], 4), 2, 8)).all()
    with pytest.raises(InputError, match="--num-hidden-layers"):
        load(path, "sglang", tmp_path)
    with pytest.raises(InputError, match="multiple of 4"):
        load(path, "sglang", tmp_path, num_hidden_layers=7, top_k=3)


def test_lmdeploy_responses(tmp_path):
    made = requests(np.random.default_rng(2))
    path = tmp_path / "r.json"
    path.write_text(json.dumps([{"choices": [{"routed_experts": ids.tolist()}]} for _, _, ids in made]))
    # Without usage nothing tells the prompt from the answer: all tokens count, or none.
    traces, notes = load(path, "lmdeploy", tmp_path, batch_size=2, num_experts=8, phase=Phase.MIXED)
    assert "as if they had been generated" in notes[0]
    assert (traces.counts == counted(expected_steps([ids for _, _, ids in made], 2), 3, 8)).all()
    for phase in (Phase.PREFILL, Phase.DECODE):
        with pytest.raises(InputError, match=r"completion_tokens.*--phase all"):
            load(path, "lmdeploy", tmp_path, phase=phase)


@pytest.mark.parametrize(
    "body,word",
    [
        ([], "no token"),
        ([3], "JSON object"),
        ([{"choices": []}], "choices"),
        ([{"choices": [{"text": "x"}]}], "ask the engine"),
        ([{"choices": [{"routed_experts": "%%%"}]}], "base64"),
        ([{"choices": [{"routed_experts": "AAAA"}]}], r"\.npy"),
        ([{"choices": [{"routed_experts": base64.b64encode(b"\x93NUMPY\x01\x00").decode()}]}], r"complete \.npy"),
        ([{"choices": [{"routed_experts": [[[0, 1]], [[0]]]}]}], "whole numbers"),
        ([{"choices": [{"routed_experts": [[[0, 1]]]}, {"routed_experts": [[[0, 1], [0, 1]]]}]}], "one network"),
        ([{"choices": [{"routed_experts": [[[0, 0]]]}]}], "no token; 1 tokens of padding"),
        ([{"choices": [{"routed_experts": [[[1, 1]]]}]}], "every layer repeats"),
        ([{"choices": [{"routed_experts": [[[1, 1]], [[0, 1]]]}]}], "1 of 2 tokens"),
        ([{"choices": [{"routed_experts": [[[0, 1 << 40]]]}]}], "below 8192"),
        ([{"choices": [{"routed_experts": [[[0, 1]]]}], "usage": {"completion_tokens": 9}}], "at most the 1"),
        ([{"choices": [{"routed_experts": [[[0, 1]]]}], "usage": {"completion_tokens": "9"}}], "completion_tokens"),
    ],
)
def test_bad_responses(tmp_path, body, word):
    (tmp_path / "r.json").write_text(json.dumps(body))
    with pytest.raises(InputError, match=word):
        load(tmp_path / "r.json", "vllm", tmp_path, phase=Phase.DECODE if "usage" in str(body) else Phase.MIXED)


def test_hostile_npy_header(tmp_path):
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (1099511627776, 1024, 8), }"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    body = {"choices": [{"routed_experts": base64.b64encode(data).decode()}]}
    (tmp_path / "r.jsonl").write_text(json.dumps(body))
    with pytest.raises(InputError, match=r"complete \.npy"):
        load(tmp_path / "r.jsonl", "vllm", tmp_path)


# TensorRT-LLM


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


# Arrays, and what has no loads


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
@pytest.mark.parametrize("high", [50, 100_000])
def test_arrays(tmp_path, suffix, high):
    from safetensors.numpy import save_file

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
@pytest.mark.parametrize("steps", [5, 9])
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
    assert not load(tmp_path / "a.npy", "array", tmp_path, top_k=2)[1]


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
        (np.zeros((2, 3)), "3 dimensions"),
        (np.zeros((2, 3, 4)), "3 dimensions"),
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


# Memory

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

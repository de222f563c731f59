"""Recordings in parts: pipeline stages, equal dumps, statistics in other forms."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cli_inputs import gemopt
from recordings import write_passes, write_stat
from routed_counts import routed
from timed import timed

from gemopt.exceptions import InputError

torch = pytest.importorskip("torch")


STEPS, LAYERS, EXPERTS = 6, 5, 16


def truth(seed=0, steps=STEPS):
    counts = np.random.default_rng(seed).integers(1, 50, (steps, LAYERS, EXPERTS)).astype(np.int32)
    counts[:, 0] = 0  # a dense layer
    return counts


def only(counts, *layers):
    kept = np.zeros_like(counts)
    kept[:, list(layers)] = counts[:, list(layers)]
    return kept


@pytest.mark.parametrize("suffix", [".json", ".pt"])
@pytest.mark.parametrize("kind", [int, float])
@pytest.mark.parametrize("steps", [None, STEPS])
def test_statistics_in_every_form(load, tmp_path, suffix, kind, steps):
    counts = truth() if steps else truth().sum(axis=0)
    path = tmp_path / f"s{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps({"logical_count": counts.astype(kind).tolist()}))
    else:
        tensor = torch.from_numpy(counts.astype(np.int64 if kind is int else np.float32))
        torch.save({"logical_count": tensor}, path)
    traces, notes = load(path)
    assert (traces.counts == counts.reshape(-1, LAYERS, EXPERTS)[:, 1:]).all()
    assert traces.layer_ids == (1, 2, 3, 4)
    assert ("a single step" in notes) == (steps is None)


def test_statistics_that_are_none(load, tmp_path):
    path = tmp_path / "s.json"
    for value, word in [
        ([[0.5, 1], [1, 2]], "0.5"),
        ([[1, -1], [1, 2]], "from 0"),
        ([1, 2], "dimension"),
        ([[1, 2], [3]], "whole numbers"),
        ("x", "dimension"),
        ([[0, 0], [0, 0]], "no step"),
    ]:
        path.write_text(json.dumps({"logical_count": value}))
        with pytest.raises(InputError, match=word):
            load(path)
    path.write_text(json.dumps({"logical_count": [[1, 2], [2, 1]]}))
    write_stat(tmp_path / "s.pt", truth())
    with pytest.raises(InputError, match="different networks"):
        load([path, tmp_path / "s.pt"])


def test_equal_dumps_count_once(load, folder):
    counts = truth()
    for time in (100.5, 100.6, 101.5):
        write_stat(folder / f"expert_distribution_recorder_{time}.pt", counts)
    write_stat(folder / "expert_distribution_recorder_100.9.pt", truth(1))
    traces, notes = load(folder)
    assert (traces.counts == np.concatenate([counts, truth(1)])[:, 1:]).all()
    assert notes.count("again: counted once") == 2
    np.save(folder / "a.npy", counts)
    np.savez(folder / "b.npz", counts=counts.astype(np.int64))
    traces, notes = load([folder / "a.npy", folder / "b.npz"], "array")
    assert traces.num_steps == STEPS
    assert "b.npz is a.npy again: counted once" in notes


def test_a_dump_that_begins_with_the_last_one(load, folder):
    counts = truth(steps=9)
    write_stat(folder / "expert_distribution_recorder_1.5.pt", counts[:6])
    write_stat(folder / "expert_distribution_recorder_2.5.pt", counts[4:])
    traces, notes = load(folder)
    assert (traces.counts == counts[:, 1:]).all()
    assert "2 first steps of expert_distribution_recorder_2.5.pt" in notes


def test_stat_dumps_of_pipeline_stages(load, folder):
    counts, later = truth(), truth(2)
    for time, each in ((1, counts), (5, later)):
        write_stat(folder / f"expert_distribution_recorder_{time}.1.pt", only(each, 1, 2))
        write_stat(folder / f"expert_distribution_recorder_{time}.2.pt", only(each, 3, 4))
    traces, notes = load(folder)
    assert (traces.counts == np.concatenate([counts, later])[:, 1:]).all()
    assert "2 pipeline stages joined by layer: 1-2; 3-4" in notes
    (folder / "expert_distribution_recorder_5.2.pt").unlink()
    with pytest.raises(InputError, match="as many dumps of every pipeline stage"):
        load(folder)
    write_stat(folder / "expert_distribution_recorder_5.2.pt", only(later, 3, 4)[:-1])
    with pytest.raises(InputError, match="another stage of the pipeline"):
        load(folder)
    write_stat(folder / "expert_distribution_recorder_5.2.pt", only(later, 2, 3, 4))
    with pytest.raises(InputError, match=r"2 pipeline stages|two pipeline stages"):
        load(folder)


@pytest.mark.parametrize("numbered", ["stage", "world"])
@pytest.mark.parametrize("same", [True, False])
def test_pipeline_stages_of_forward_passes(load, folder, numbered, same):
    parts = [truth(seed) for seed in range(2)]
    parts = [parts[0], parts[0]] if same else parts
    for stage, layers in enumerate([(1, 2), (3, 4)]):
        for rank in range(2):
            name = rank if numbered == "stage" else 2 * stage + rank
            write_passes(folder, f"10{stage}.{rank}", name, only(parts[rank], *layers))
    traces, notes = load(folder)
    assert (traces.counts == (parts[0] if same else parts[0] + parts[1])[:, 1:]).all()
    assert "2 pipeline stages joined by layer: 1-2; 3-4" in notes
    assert ("counted once" in notes) == same
    ranks = 2 if numbered == "stage" else 4
    assert (load(folder, num_ranks=ranks)[0].counts == traces.counts).all()
    with pytest.raises(InputError, match="rank"):
        load(folder, num_ranks=5)
    next(folder.glob("*101.1*")).unlink()
    with pytest.raises(InputError, match="rank"):
        load(folder)


def test_stages_keep_the_steps_that_all_have(load, folder):
    counts = truth()
    write_passes(folder, "1.0", 0, only(counts, 1, 2))
    write_passes(folder, "2.0", 0, only(counts, 3, 4)[2:], first=3)
    traces, notes = load(folder)
    assert (traces.counts == counts[2:, 1:]).all()
    assert "2 passes that some ranks did not record" in notes


def test_the_same_passes_twice(load, folder):
    """Overlapping dumps of a rank: passes 1-6, then 4-9; equal ones count once, others are refused."""
    counts = truth(steps=9)
    write_passes(folder, "1.0", 0, counts[:6])
    write_passes(folder, "2.0", 0, counts[3:], first=4)
    traces, notes = load(folder)
    assert (traces.counts == counts[:, 1:]).all()
    assert "3 records came twice: counted once" in notes
    write_passes(folder, "2.0", 0, counts[3:] + 1, first=4)
    with pytest.raises(InputError, match="twice, with other counts"):
        load(folder)


def chosen(rng, tokens=5, layers=LAYERS, dense=1):
    """[layers, N, 8] slots, four used."""
    ids = np.full((layers, tokens, 8), -1, np.int32)
    ids[dense:, :, :4] = rng.random((layers - dense, tokens, EXPERTS)).argsort(axis=2)[:, :, :4]
    return ids


def count(ids):
    return np.stack([np.bincount(layer[layer >= 0], minlength=EXPERTS) for layer in ids]).astype(np.int32)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64])
def test_records_without_counts_are_counted_from_their_ids(load, folder, dtype):
    rng = np.random.default_rng(0)
    ids = [chosen(rng) for _ in range(3)]
    expected = np.stack([count(each) for each in ids])
    more = {
        "topk_ids_of_layer": lambda step: torch.from_numpy(ids[step].astype(dtype)),
        "input_ids": lambda step: list(range(5)),
        "global_physical_count": lambda step: None,
    }
    write_passes(folder, "1.0", 0, np.zeros_like(expected), **more)
    traces, notes = load(folder)
    assert (traces.counts == expected[:, 1:]).all()
    assert "counted from topk_ids_of_layer" in notes
    kept, _ = load(folder, keep_tokens=True)
    assert (kept.counts == expected[:, 1:]).all()
    assert kept.top_k == 4
    ids[1][2, 3, :] = [3, 2, 1, 0, 0, 0, 0, 0]  # padded by zeros instead of -1
    write_passes(folder, "1.0", 0, np.zeros_like(expected), **more)
    with pytest.raises(InputError, match="a slot twice for token 3 in layer 2"):
        load(folder)


def test_tokens_of_pipeline_stages_are_joined(load, folder):
    rng = np.random.default_rng(0)
    whole = [chosen(rng) for _ in range(3)]
    words = [11, 12, 13, 14, 15]
    for stage, layers in enumerate([(1, 2), (3, 4)]):
        ids = []
        for each in whole:
            part = np.full_like(each, -1)
            part[list(layers)] = each[list(layers)]
            ids.append(part)
        more = {"topk_ids_of_layer": lambda step, ids=ids: torch.from_numpy(ids[step]), "input_ids": lambda step: words}
        write_passes(folder, f"{stage}.0", 0, np.stack([count(each) for each in ids]), **more)
    traces, _ = load(folder, keep_tokens=True)
    expected = np.concatenate([each[1:, :, :4].transpose(1, 0, 2) for each in whole])
    assert (traces.tokens.ids == expected).all()
    assert traces.tokens.token_ids.tolist() == words * 3
    words = [9, 9, 9, 9, 9]
    write_passes(folder, "1.0", 0, np.stack([count(each) for each in ids]), **more)
    with pytest.raises(InputError, match="the same tokens in every pipeline stage"):
        load(folder, keep_tokens=True)


def statistic(folder, rank, counts, layers, start=100):
    from safetensors.numpy import save_file

    arrays = {
        f"{start + step}_{layer}": np.ascontiguousarray(each[i].astype(np.int64))
        for step, each in enumerate(counts)
        for i, layer in enumerate(layers)
    }
    (folder / "meta_info.json").write_text(json.dumps({"num_experts": EXPERTS, "num_experts_per_token": 4}))
    save_file(arrays, folder / f"rank{rank}.safetensors")


@pytest.mark.parametrize("same", [True, False])
def test_tensorrt_llm_stages(load, folder, same):
    parts = [truth(seed)[:, 1:] for seed in range(2)]
    parts = [parts[0], parts[0]] if same else parts
    for stage, layers in enumerate([(3, 4), (5, 61)]):
        for rank in range(2):
            statistic(folder, 2 * stage + rank, parts[rank][:, 2 * stage : 2 * stage + 2], layers)
    traces, notes = load(folder, "trtllm")
    assert (traces.counts == (parts[0] if same else parts[0] + parts[1])).all()
    assert traces.layer_ids == (3, 4, 5, 61)
    assert "2 pipeline stages joined by layer: 3-4; 5, 61" in notes
    assert ("counted once" in notes) == same
    assert load(folder, "trtllm", num_hidden_layers=61)[0].layer_ids == (3, 4, 5)
    statistic(folder, 3, parts[1][:, 2:], (5, 61), start=101)
    with pytest.raises(InputError, match="mixes runs"):
        load(folder, "trtllm")
    statistic(folder, 3, parts[1][:, 2:], (4, 5))
    with pytest.raises(InputError, match="mixes runs"):
        load(folder, "trtllm")
    (folder / "rank3.safetensors").unlink()
    with pytest.raises(InputError, match="as many of every pipeline stage"):
        load(folder, "trtllm")
    statistic(folder, 2, parts[0][:, 2:], (2, 5))
    with pytest.raises(InputError, match=r"one after the other|as many"):
        load(folder, "trtllm")


def test_nothing_recorded_is_refused_by_solve(tmp_path, capsys):
    timed(range(2), lambda n, _: 10.0 + n, (1, 100)).save(tmp_path / "p.json")
    np.savez(tmp_path / "t.npz", counts=np.zeros((4, 2, 4), np.int32))
    code, _, err = gemopt(capsys, "solve", tmp_path / "p.json", tmp_path / "t.npz", "-o", tmp_path / "out.json")
    assert code == 2 and "no assignments in 4 steps" in err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("source", ["sglang", "tensorrt-llm", "csv"])
def test_tensor_parallel_groups_count_once(load, tmp_path, source):
    """Two groups of two ranks saw tokens of their own, and a third group none."""
    rng = np.random.default_rng(9)
    groups = [routed(rng, steps=3), routed(rng, steps=3), np.zeros((3, 5, 16), np.int64)]
    folder = tmp_path / "dumps"
    folder.mkdir()
    for rank in range(6):
        counts = groups[rank // 2]
        if source == "sglang":
            write_passes(folder, "1.0", rank, counts.astype(np.int32))
        elif source == "tensorrt-llm":
            statistic(folder, rank, counts, range(5))
        else:
            lines = [f"{step},{layer},{expert},{n}\n" for (step, layer, expert), n in np.ndenumerate(counts)]
            (folder / f"c_rank{rank}.csv").write_text("step,layer,expert,count\n" + "".join(lines))
    traces, notes = load(folder, source)
    assert (traces.counts == groups[0] + groups[1]).all()
    assert "groups of 2 ranks recorded the same counts (they saw the same tokens): counted once" in notes


def test_records_that_are_not_taken_are_named(load, tmp_path):
    folder = tmp_path / "dumps"
    folder.mkdir()
    ids = np.argsort(np.random.default_rng(0).random((5, 6, 16)), axis=2)[:, :, :8]
    counts = np.stack([np.stack([np.bincount(row.ravel(), minlength=16) for row in ids])] * 3)
    more = {"topk_ids_of_layer": lambda step: torch.from_numpy(ids.astype(np.int32))}
    write_passes(folder, "1.0", 0, counts, **more)
    assert "ids of other counts" not in load(folder)[1]
    write_passes(folder, "1.0", 0, counts + (np.arange(3) == 1)[:, None, None], **more)
    assert "1 record with ids of other counts: global_physical_count taken" in load(folder)[1]
    more["gatherer_key"] = lambda step: "primary" if step else "child_a"
    write_passes(folder, "1.0", 0, counts, **more)
    assert "left unread: 1 record of parts of a batch (two-batch overlap)" in load(folder)[1]


def test_draft_layers_of_sglang_are_left_out(load, folder):
    counts = np.random.default_rng(3).integers(0, 9, (4, 5, 8))
    torch.save({"logical_count": torch.tensor(counts)}, folder / "expert_distribution_recorder_1.0.pt")
    traces, notes = load(folder, num_hidden_layers=4)
    assert (traces.counts == counts[:, :4]).all() and "layers from 4 on are draft layers: left out" in notes
    with pytest.raises(InputError, match=r"layers: got 5; --num-hidden-layers is 6"):
        load(folder, num_hidden_layers=6)


def test_statistics_that_name_their_layers_are_refused(load, folder):
    (folder / "a.json").write_text(json.dumps({"logical_count": [[1, 2], [3, 4]], "layer_ids": [3, 4]}))
    with pytest.raises(InputError, match=r"layer_ids: got beside logical_count; a row for every decoder layer.*array"):
        load(folder / "a.json")


def test_what_else_a_statistic_says_is_named(load, tmp_path):
    counts = routed(np.random.default_rng(0), steps=STEPS)
    said = {"logical_count": counts.tolist(), "rank": 0, "average_utilization_rate_over_window": None}
    (tmp_path / "s.json").write_text(json.dumps(said))
    assert "unread" not in load(tmp_path / "s.json")[1]
    (tmp_path / "s.json").write_text(json.dumps({**said, "unit": "thousands"}))
    assert "unit beside logical_count left unread" in load(tmp_path / "s.json")[1]

"""What SGLang records: statistics, passes, tokens; files that are hostile. Counts must equal the truth."""

from __future__ import annotations

import functools
import pickle
import zipfile

import numpy as np
import pytest
from recordings import load, physical_counts, sparse_counts, write_passes, write_stat

from gemopt.exceptions import InputError
from gemopt.traces import Phase

torch = pytest.importorskip("torch")


def write_detail(folder, physical_RTLP, table, **more):
    """One per_pass file per rank. more: a value for each rank and step, by the record's key."""
    folder.mkdir(exist_ok=True)
    for rank, counts in enumerate(physical_RTLP):
        of_rank = {key: functools.partial(value, rank) for key, value in more.items()}
        write_passes(folder, 1700000000.5 + rank, rank, counts, table=table, **of_rank)


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
    assert notes[1] == "layers 0 have no counts: taken as layers without experts"


def test_sglang_stat_of_several_ranks_is_refused(tmp_path):
    (tmp_path / "dumps").mkdir()
    for rank in range(2):
        path = tmp_path / "dumps" / f"expert_distribution_recorder_1700000009.{rank}.pt"
        torch.save({"rank": rank, "logical_count": torch.from_numpy(sparse_counts(np.random.default_rng(rank)))}, path)
    with pytest.raises(InputError, match=r"rank: got 1, and 0 in .*; dumps of one rank: they count all ranks together"):
        load(tmp_path / "dumps", "sglang", tmp_path)


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
    assert notes[:2] == ("4 forward passes of 3 ranks", "layers 0 have no counts: taken as layers without experts")


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
    assert "1 pass that some ranks did not record" in notes[1]


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

    def tokens(rank, step):
        return list(range(topk[rank, step].shape[1]))

    write_detail(
        tmp_path / "dumps", physical, table, input_ids=tokens, positions=tokens, extend_seq_lens=lambda *_: None,
        forward_mode=lambda rank, step: 1 if step == 0 and rank == 0 else 2,
        topk_ids_of_layer=lambda rank, step: torch.from_numpy(topk[rank, step]), misc_objects=lambda *_: [],
    )  # fmt: skip
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


def test_dumps_of_one_rank_are_steps_however_it_is_written(load, folder):
    for time, rank in enumerate((0, torch.tensor(0), torch.tensor(0))):
        counts = torch.from_numpy(sparse_counts(np.random.default_rng(time)))
        torch.save({"logical_count": counts, "rank": rank}, folder / f"expert_distribution_recorder_{time}.pt")
    assert load(folder, "sglang")[0].num_steps == 15


def test_dumps_of_ranks_that_count_their_own_are_no_steps(load, folder):
    for rank in range(2):  # as TokenSpeed writes them
        counts = torch.from_numpy(sparse_counts(np.random.default_rng(rank)))
        torch.save({"logical_count": counts, "ep_rank": rank}, folder / f"p-TP{rank}.expert-load.pt")
    with pytest.raises(InputError, match=r"rank: got 1, and 0 in p-TP0.*add up ranks that counted their own"):
        load(folder)

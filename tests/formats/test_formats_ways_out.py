"""The ways out that refusals name, taken literally, lead to the right counts and placements."""

from __future__ import annotations

import json

import numpy as np
import pytest
from routed_counts import routed

from gemopt.exceptions import InputError, UnsupportedError
from gemopt.formats.engine import Facts
from gemopt.formats.registry import export, import_placement
from gemopt.placement import Placement
from gemopt.traces import Traces

COUNTS = routed(np.random.default_rng(5))  # [steps, layers, experts]
MAP = [[0, 1, 2, 3, 0, 1, 2, 3], [3, 2, 1, 0, 3, 2, 1, 0]]


def refused(load, path, source, words):
    with pytest.raises(InputError, match=words):
        load(path, source)


def test_two_dimensions_are_layers_or_steps(load, tmp_path):
    path = tmp_path / "layer_3.npy"
    for array, given in (
        (COUNTS[:, 1], lambda counts: counts[:, None]),
        (COUNTS.sum(axis=0), lambda counts: counts[None]),
    ):
        np.save(path, array)
        refused(load, path, "array", r"\[layers, experts\].*counts\[None\]; \[steps, experts\].*counts\[:, None\]")
        np.save(path, given(array))
        np.testing.assert_array_equal(load(path, "array")[0].counts, given(array))


def test_what_tables_may_be_called(load, tmp_path):
    (tmp_path / "a.txt").write_text("layer,expert,count\n0,0,5\n0,1,3\n")
    refused(load, tmp_path / "a.txt", "csv", "a file .csv or .tsv or .gz or .parquet or .json")


@pytest.mark.parametrize("name", ["{}", "E{}", "e_{}"])
def test_a_column_for_each_expert(load, tmp_path, name):
    def table(name):
        experts = ",".join(name.format(e) for e in range(COUNTS.shape[2]))
        rows = [(t, layer, *row) for t, step in enumerate(COUNTS) for layer, row in enumerate(step.tolist())]
        (tmp_path / "t.csv").write_text(
            "\n".join([f"step,layer,{experts}", *(",".join(map(str, r)) for r in rows), ""])
        )
        return tmp_path / "t.csv"

    refused(load, table(name), "csv", "columns are named by what they number: expert_0")
    np.testing.assert_array_equal(load(table("expert_{}"), "csv")[0].counts, COUNTS)


def test_ranks_of_experts_in_turn_are_named(tmp_path):
    path = tmp_path / "m.json"
    for rows, ranks, said in ((MAP, 4, True), (MAP, 2, False), ([[*range(8)]] * 2, 8, False)):
        path.write_text(json.dumps(rows))
        notes = []
        import_placement(path, source="vllm-map", facts=Facts(num_ranks=ranks, notes=notes))
        assert any("ranks of experts" in note for note in notes) is said
    notes = []
    path.write_text(json.dumps(MAP))
    import_placement(path, source="vllm-map", facts=Facts(num_ranks=4, num_experts=4, notes=notes))
    assert not any("ranks of experts" in note for note in notes)


@pytest.mark.parametrize("name", ["num_gpus", "num_ranks", "ep_size"])
def test_tables_of_eplb_say_how_many_ranks(tmp_path, name):
    np.savez(tmp_path / "p.npz", phy2log=[[*range(8)]], **{name: 4})
    with pytest.raises(InputError, match=rf"--ep: got 2; {name} is 4"):
        import_placement(tmp_path / "p.npz", source="deepseek-eplb", facts=Facts(num_ranks=2))
    for same in (4, [4], 4.0):
        np.savez(tmp_path / "p.npz", phy2log=[[*range(8)]], **{name: same})
        found = import_placement(tmp_path / "p.npz", source="deepseek-eplb", facts=Facts(num_ranks=4))
        assert isinstance(found, Placement) and found.num_ranks == 4


def test_slots_of_a_table_are_numbered_over_all_ranks(tmp_path):
    def table(slot):
        lines = [f"0,{s // 4},{slot(s)},{e}" for s, e in enumerate([5, 0, 1, 2, 3, 4, 7, 6])]
        (tmp_path / "p.csv").write_text("\n".join(["layer,rank,slot,expert", *lines, ""]))

    table(lambda slot: slot % 4)
    with pytest.raises(InputError, match="slots are numbered over all ranks"):
        import_placement(tmp_path / "p.csv", source="csv")
    table(lambda slot: slot)
    assert import_placement(tmp_path / "p.csv", source="csv").physical_to_logical.tolist() == [[5, 0, 1, 2, 3, 4, 7, 6]]


def test_numbers_do_not_tell_axes_of_one_length(load, tmp_path):
    rng = np.random.default_rng(6)
    counts = np.concatenate([routed(rng, steps=1, layers=3, experts=16, tokens=20 + t) for t in range(16)])
    given = {"num_experts": 16, "num_hidden_layers": 3}
    np.save(tmp_path / "a.npy", counts.transpose(2, 1, 0))
    for options in ({}, given):
        with pytest.raises(InputError, match=r"\[experts, layers, steps\].*an \.npz of counts and layer_ids"):
            load(tmp_path / "a.npy", "array", **options)
    np.save(tmp_path / "a.npy", counts)
    np.testing.assert_array_equal(load(tmp_path / "a.npy", "array", **given)[0].counts, counts)
    np.save(tmp_path / "a.npy", counts.transpose(1, 0, 2))
    with pytest.raises(InputError, match="or give --num-experts and --num-hidden-layers"):
        load(tmp_path / "a.npy", "array")
    with pytest.raises(InputError, match="--num-hidden-layers is 3"):
        load(tmp_path / "a.npy", "array", **given)
    np.savez(tmp_path / "b.npz", counts=counts.transpose(2, 1, 0), layer_ids=np.arange(3))
    assert Traces.load(tmp_path / "b.npz").num_steps == 16


def test_texts_have_a_way_in(load, tmp_path):
    (tmp_path / "activation_counts_recordstep_1_rank_0.txt").write_text("5\t2\n1\t7\n")  # as omni-infer writes them
    for path, source in ((tmp_path, "csv"), (tmp_path / "activation_counts_recordstep_1_rank_0.txt", "tokens")):
        with pytest.raises(InputError, match=r"name it \.csv; lines of numbers alone: numpy\.loadtxt"):
            load(path, source)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("a.npy.zst", "unpack it: zstd -d"),
        ("a.zip", "unpack it: unzip"),
        ("a.h5", "numpy.save of its dataset, and --from array"),
        ("a.feather", "to_parquet, and --from csv or tokens"),
        ("a.pkl", "pickles may run anything, and are not read"),
        ("a.xlsx", "save it as CSV"),
    ],
)
def test_files_that_are_not_read_say_the_way_out(load, folder, name, hint):
    (folder / name).write_bytes(b"\x28\xb5\x2f\xfd")
    refused(load, folder / name, "array", f"a file .npy .*{hint}")
    refused(load, folder, "array", hint)
    (folder / "b.jsonl.xz").write_bytes(b"")
    refused(load, folder / "b.jsonl.xz", "vllm", "unpack it: xz -d")


def test_a_packed_file_of_a_folder_is_not_left_out(load, folder):
    np.save(folder / "step_0.npy", COUNTS)
    (folder / "notes.zip").write_bytes(b"PK")
    assert load(folder, "array")[0].num_steps == len(COUNTS)
    (folder / "step_1.npy.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    refused(load, folder, "array", "step_1.npy.zst: got a packed file; .*unpack it: zstd -d")
    np.save(folder / "step_1.npy", COUNTS[::-1])  # as zstd -d does, which keeps what it unpacks
    assert load(folder, "array")[0].num_steps == 2 * len(COUNTS)


def test_tables_beside_arrays_and_the_reverse(load, folder):
    (folder / "a.csv.gz").write_bytes(b"")
    refused(load, folder, "array", "a folder with recordings is needed$")  # which gunzip would not help
    (folder / "a.csv").write_text("layer,expert,count\n0,0,1\n")
    refused(load, folder, "array", "tables of counts: --from csv")
    (folder / "b.jsonl").write_text(
        '{"step": 0, "layer": 0, "topk_ids": [1, 2]}\n{"step": 0, "layer": 0, "topk_ids": [0, 2]}\n'
    )
    np.save(folder / "c.npy", COUNTS)
    (folder / "a.csv").unlink()
    (folder / "a.csv.gz").unlink()
    assert "beside arrays or tables, left unread: c.npy" in load(folder, "tokens")[1]


def test_folders_of_folders(load, folder):
    (folder / "math").mkdir()
    np.save(folder / "math" / "a.npy", COUNTS)
    refused(load, folder, "array", "a folder with recordings is needed; give its folders")
    assert load([folder / "math"], "array")[0].num_steps == len(COUNTS)


@pytest.mark.parametrize("engine", ["vllm", "vllm-map", "vllm-ascend", "sglang"])
def test_attention_over_ranks_that_seldom_divide_its_heads(make_placement, tmp_path, engine):
    """After a rank has left there are seven: vLLM and SGLang do not start then, with 64 heads."""
    told = [
        [note for note in export(make_placement(experts=28, ranks=ranks, slots=28 // ranks), to=engine,
                                 path=tmp_path / f"{ranks}.json").notes if "attention heads" in note]
        for ranks in (4, 7)
    ]  # fmt: skip
    way = "add --dp 7 --enable-dp-attention" if engine == "sglang" else "--data-parallel-size instead of"
    assert (
        not told[0] and len(told[1]) == 1 and f"over 7 ranks, which must divide their number; else {way}" in told[1][0]
    )


def test_what_an_engine_cannot_express_can_be_solved_for_it(tmp_path):
    placement = Placement(physical_to_logical=[[0, 1, 2, -1]], slots_per_rank=[2, 2], num_experts=3, layer_ids=[0])
    with pytest.raises(UnsupportedError, match="use --approximate, or solve with --engine vllm; an engine that can"):
        export(placement, to="vllm", path=tmp_path / "map.json")


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_a_table_without_its_name(tmp_path, suffix):
    path, facts = tmp_path / f"a{suffix}", Facts(num_ranks=2)
    if suffix == ".npy":
        np.save(path, MAP)
    else:
        torch = pytest.importorskip("torch")
        torch.save(torch.tensor(MAP), path)
    with pytest.raises(InputError, match=r"numpy.savez\('NAME.npz', phy2log=TABLE\)"):
        import_placement(path, source="deepseek-eplb", facts=facts)
    np.savez(tmp_path / "NAME.npz", phy2log=MAP)
    found = import_placement(tmp_path / "NAME.npz", source="deepseek-eplb", facts=facts)
    assert found.physical_to_logical.tolist() == MAP

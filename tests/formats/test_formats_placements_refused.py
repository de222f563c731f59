"""Placements that an engine cannot express, and files of engines that are wrong: one clear line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from gemopt.exceptions import InputError, UnsupportedError
from gemopt.formats.approximate import approximate
from gemopt.formats.engine import Facts, WriteOptions
from gemopt.formats.registry import engines, export, get, import_placement, obstacles, side_path
from gemopt.placement import Placement, Split


def unequal(**fields) -> Placement:
    rows = [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]
    return Placement(
        **{"physical_to_logical": rows, "slots_per_rank": [4, 2], "num_experts": 6, "num_hidden_layers": 2, **fields}
    )


@pytest.mark.parametrize("name", [e.name for e in engines() if e.write and not e.unequal_slots])
@pytest.mark.parametrize(
    "fields,word",
    [
        ({}, "4, 2"),
        ({"slots_per_rank": [3, 4], "physical_to_logical": [[0, 1, 2, 3, 4, 5, -1]] * 2}, "3, 4"),
        ({"slots_per_rank": [4, 4], "physical_to_logical": [[0, 1, 2, 3, 4, 5, -1, -1]] * 2}, "empty"),
    ],
)
def test_refused_naming_an_engine_that_can(tmp_path, name, fields, word):
    suffix = get(name).suffixes[0]
    with pytest.raises(UnsupportedError, match=word) as caught:
        export(unequal(**fields), to=name, path=tmp_path / f"p{suffix}")
    assert "csv" in str(caught.value)
    assert "--approximate" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_static_weights_are_refused(tmp_path):
    weights = [[0.5, 1, 1, 0.5]]
    placement = Placement(
        physical_to_logical=[[0, 1, 2, 0]],
        slots_per_rank=[2, 2],
        num_experts=3,
        split="static",
        split_weights=weights,
        num_hidden_layers=1,
    )
    for name in ("sglang", "tensorrt-llm", "vllm", "vllm-ascend"):
        with pytest.raises(UnsupportedError, match="static"):
            export(placement, to=name, path=tmp_path / f"p{get(name).suffixes[0]}")
        made, notes = approximate(placement, get(name))
        assert made.split is Split.EVEN
        assert (made.physical_to_logical == placement.physical_to_logical).all()
        assert notes == ["split static became even"]


@pytest.mark.parametrize("name", ["xllm", "llama.cpp", "array"])
def test_engines_without_a_placement(make_placement, tmp_path, name):
    with pytest.raises(UnsupportedError, match="sglang"):
        export(make_placement(), to=name, path=tmp_path / "p.json")


def test_missing_facts_are_named(make_placement, tmp_path):
    placement = make_placement(num_hidden_layers=None)
    for name in ("sglang", "lmdeploy"):
        with pytest.raises(InputError, match="--num-hidden-layers"):
            export(placement, to=name, path=tmp_path / "p.json")
    with pytest.raises(InputError, match="--num-hidden-layers"):
        export(placement, to="tensorrt-llm", path=tmp_path / "p.yaml", options=WriteOptions(mtp_layers=1))
    with pytest.raises(InputError, match=r"\.json or \.pt"):
        export(make_placement(), to="sglang", path=tmp_path / "p.txt")
    assert not list(tmp_path.iterdir())


def test_approximate_moves_or_copies():
    placement = unequal()
    loads = np.array([[10.0, 1, 9, 8, 7, 6], [1, 2, 3, 4, 5, 6]])
    moved, notes = approximate(placement, get("vllm"), loads=loads)
    assert moved.slots_per_rank.tolist() == [3, 3]
    assert set(moved.physical_to_logical[0, 3:].tolist()) == {4, 5, 1}  # the least loaded of rank 0 went
    assert notes == ["2 experts moved, so that every rank holds 3"]
    copied, notes = approximate(placement, get("vllm"), loads=loads, cost=lambda p: -p.num_slots)
    assert copied.slots_per_rank.tolist() == [4, 4]
    assert (copied.physical_to_logical[:, :4] == placement.physical_to_logical[:, :4]).all()
    assert "4 slots added or filled" in notes[0]
    for made in (moved, copied):
        assert not obstacles(made, get("vllm"))


def test_approximate_drops_copies_for_lmdeploy(make_placement, tmp_path):
    placement = make_placement(layers=3, experts=8, ranks=2, slots=6)
    made, notes = approximate(placement, get("lmdeploy"))
    assert made.num_slots == 8
    assert "12 copies dropped" in notes[0]
    export(made, to="lmdeploy", path=tmp_path / "p.json")


def test_approximate_says_when_it_cannot():
    placement = Placement(physical_to_logical=[[0, 1, 2, 3, 4]], slots_per_rank=[3, 2], num_experts=5)
    with pytest.raises(UnsupportedError, match="2 ranks"):
        approximate(placement, get("lmdeploy"))


EQUAL = [e.name for e in engines() if e.write and not e.unequal_slots]


@pytest.mark.parametrize("name", EQUAL)
def test_spare_slots_that_nobody_filled_are_left_out(tmp_path, name):
    row = [0, 1, 2, -1, 3, 4, 5, -1]
    placement = Placement(
        physical_to_logical=[row] * 2, slots_per_rank=[4, 4], num_experts=6, num_hidden_layers=2, split="static",
        split_weights=[[1.0] * 3 + [0.0] + [1.0] * 3 + [0.0]] * 2,
    )  # fmt: skip
    made, notes = approximate(placement, get(name))
    assert (made.physical_to_logical == np.arange(6)).all() and made.slots_per_rank.tolist() == [3, 3]
    assert "0 experts moved" in " ".join(notes) and not obstacles(made, get(name))


@pytest.mark.parametrize("name", EQUAL)
def test_without_copies_static_weights_are_not_missed(tmp_path, name):
    placement = Placement(
        physical_to_logical=[[1, 0, 3, 2]] * 2, slots_per_rank=[2, 2], num_experts=4, num_hidden_layers=2,
        split="static", split_weights=[[1.0] * 4] * 2,
    )  # fmt: skip
    path = tmp_path / f"p{(get(name).suffixes or ('.json',))[0]}"
    export(placement, to=name, path=path)
    found = import_placement(path, source=name)
    assert (np.sort(found.physical_to_logical.reshape(2, 2, 2)) == [[0, 1], [2, 3]]).all()


def test_nothing_to_approximate(make_placement):
    placement = make_placement()
    assert approximate(placement, get("sglang")) == (placement, [])


def _sglang(rows, **more):
    return json.dumps({"physical_to_logical_map": rows, **more})


def _ascend(lists, count=None):
    layers = [{"device_list": [{"device_expert": experts} for experts in layer]} for layer in lists]
    return json.dumps({"moe_layer_count": len(layers) if count is None else count, "layer_list": layers})


# Eight levels of ten anchors each stand for 10^8 values.
LAUGHS = "a0: &a0 [1]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(8))
BAD = [
    ("sglang", ".json", "{", "complete JSON"),
    ("sglang", ".json", "[]", "physical_to_logical_map"),
    ("sglang", ".json", _sglang([[0, 1, 2, 3]], model="x"), "model"),
    ("sglang", ".json", _sglang([[0, 1, 2]]), "--ep"),
    ("sglang", ".json", _sglang([[0, 1, 3, 3]]), "expert"),
    ("sglang", ".json", _sglang([[0, 0, 1, 2]]), "twice on rank 0"),
    ("sglang", ".json", _sglang([[0, 1, 2], [0]]), "rectangular"),
    ("sglang", ".json", _sglang([]), "map"),
    ("sglang", ".json", _sglang([[0, 1.5, 2, 3]]), "1.5"),
    ("sglang", ".json", _sglang([[0, -5, 2, 3]]), "-5"),
    ("sglang", ".json", "[" * 100_000, "complete JSON"),
    ("vllm-ascend", ".json", _ascend([[[0, 0, 1], [2, 3, 1]]]), "twice on rank 0"),
    ("vllm-ascend", ".json", _ascend([[[0, 1], [2]]]), "same number"),
    ("vllm-ascend", ".json", _ascend([[[0, 1], [2, 3]], [[0, 1, 2], [3, 1, 0]]]), "same number"),
    ("vllm-ascend", ".json", _ascend([[[0, 1], [2, 3]]], count=2), "moe_layer_count"),
    ("vllm-ascend", ".json", _ascend([[[0, "1"], [2, 3]]]), "experts"),
    ("vllm-ascend", ".json", '{"moe_layer_count": 1, "layer_list": [3]}', "device_list"),
    ("tensorrt-llm", ".yaml", "num_slots: 4\ninitial_global_assignments: {0: [0,1,2,3]}\nep_size: 2\n", "ep_size"),
    ("tensorrt-llm", ".yaml", "num_slots: 4\ninitial_global_assignments: {0: [0,1,2]}\n", "num_slots"),
    ("tensorrt-llm", ".yaml", "moe_config: {load_balancer: ./a.yaml}\n", "import the file it names"),
    ("tensorrt-llm", ".yaml", "num_slots: 4\ninitial_global_assignments: {0: [0,1,2,2]}\n", "expert"),
    ("tensorrt-llm", ".yaml", "num_slots: 4\ninitial_global_assignments: {a: [0,1,2,3]}\n", "a whole number"),
    ("tensorrt-llm", ".yaml", "num_slots: 4\ninitial_global_assignments: {0: [0,1,2,x]}\n", "got x; a whole number"),
    ("tensorrt-llm", ".yaml", "num_slots: 4\ninitial_global_assignments: {0: 3}\n", "list of experts"),
    ("tensorrt-llm", ".yaml", "num_slots: 4\ninitial_global_assignments: {-1: [0,1,2,3]}\n", "layer numbers"),
    ("tensorrt-llm", ".yaml", "num_slots: 4\ninitial_global_assignments: {true: [0,1,2,3]}\n", "a whole number"),
    ("tensorrt-llm", ".yaml", "num_slots: 4\nnum_slots: 8\ninitial_global_assignments: {}\n", "every key once"),
    (
        "tensorrt-llm",
        ".yaml",
        "num_slots: 4\ninitial_global_assignments: {3: [0,1,2,3], '3': [3,2,1,0]}\n",
        "every key once",
    ),
    ("tensorrt-llm", ".yaml", "num_slots: 4\ninitial_global_assignments: {0x3: [0,1,2,3], '3': [0,1,2,3]}\n", "once"),
    ("tensorrt-llm", ".yaml", "num_slots: 4\nlayer_updates_per_iter: x\ninitial_global_assignments: {}\n", "got x"),
    ("tensorrt-llm", ".yaml", "a: &a [*a]\n", "inside itself"),
    ("tensorrt-llm", ".yaml", "a: &a {b: 1}\nc: {<<: *a}\n", "merge key"),
    ("tensorrt-llm", ".yaml", LAUGHS, "at most 16777216 values"),
    ("tensorrt-llm", ".yaml", "a: [1\n", "complete YAML"),
    ("tensorrt-llm", ".yaml", "!!python/object/apply:os.system ['true']", "YAML"),
    ("csv", ".csv", "", "columns: got nothing"),
    ("csv", ".csv", "layer,rank,slot,expert,copy\n0,0,0,0,0\n0,0,1,1,1\n", "copy; layer,rank,slot,expert"),
    ("csv", ".csv", ",layer,rank,slot,expert\na,0,0,0,0\nb,0,0,1,1\n", "column 1; layer,rank,slot,expert"),
    ("csv", ".csv", "a,b\n1,2\n", "layer,rank,slot,expert"),
    ("csv", ".csv", "layer,rank,slot,expert\n0,0,0,0\n0,0,0,1\n", "one for each"),
    ("csv", ".csv", "layer,rank,slot,expert\n0,0,0,0\n0,1,1,x\n", "line 3"),
    ("csv", ".csv", "layer,rank,slot,expert\n0,1,0,0\n0,0,1,1\n", "rank order"),
    ("csv", ".csv", "layer,rank,slot,expert\n0,0,0,0\n0,0,1,5\n", "experts need at least"),
    ("csv", ".csv", "layer,rank,slot,expert,weight\n0,0,0,0,nan\n", "weight"),
    ("deepseek-eplb", ".npz", "PK", "npz"),
    ("deepseek-eplb", ".safetensors", "\0" * 4, "safetensors"),
    ("lmdeploy", ".json", "[[1, 2, 3]]", "--ep"),
    ("vllm", ".json", "{}", "Placement"),
    ("vllm-map", ".json", "{}", "one per MoE layer"),
    ("vllm-map", ".json", "[]", "one per MoE layer"),
    ("vllm-map", ".json", "[[0, 1], 2]", "one per MoE layer"),
    ("vllm-map", ".json", "[[0, 1, 2, 3], [0, 1]]", "rectangular"),
    ("vllm-map", ".json", "[[0, 1, 3, 3]]", "expert"),
]


@pytest.mark.parametrize("name,suffix,text,word", BAD)
def test_bad_file_is_one_clear_line(tmp_path, name, suffix, text, word):
    path = tmp_path / f"bad{suffix}"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        import_placement(path, source=name, facts=Facts(num_ranks=2))
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) or "--ep" in str(caught.value)


def test_a_balancer_within_the_options_of_tensorrt_llm(tmp_path):
    path, inner = tmp_path / "options.yaml", "{num_slots: 4, initial_global_assignments: {3: [2, 3, 1, 0]}}"
    path.write_text(f"enable_attention_dp: true\nmoe_config: {{backend: DEEPGEMM, load_balancer: {inner}}}\n")
    found = import_placement(path, source="tensorrt-llm", facts=Facts(num_ranks=2))
    assert found.physical_to_logical.tolist() == [[2, 3, 1, 0]] and found.layer_ids == [3]


def test_wrong_numbers_of_layers_and_experts(make_placement, tmp_path):
    path = tmp_path / "map.json"
    export(make_placement(layers=3, num_hidden_layers=4, layer_ids=[1, 2, 3]), to="sglang", path=path)
    side_path(path).unlink()
    with pytest.raises(InputError, match="61"):
        import_placement(path, source="sglang", facts=Facts(num_ranks=2, num_hidden_layers=61))
    with pytest.raises(InputError, match="--layer-ids"):
        import_placement(path, source="sglang", facts=Facts(num_ranks=2, layer_ids=(1, 7)))
    with pytest.raises(InputError, match="experts 0 to 5"):
        import_placement(path, source="sglang", facts=Facts(num_ranks=2, num_experts=6))
    with pytest.raises(InputError, match="9 experts need at least"):
        import_placement(path, source="sglang", facts=Facts(num_ranks=2, num_experts=9))


def test_eplb_tables_must_agree(make_placement, tmp_path):
    path = tmp_path / "p.npz"
    table = make_placement(experts=4, slots=3).physical_to_logical
    np.savez(path, phy2log=table, logcnt=np.ones((3, 4), np.int64))
    with pytest.raises(InputError, match="logcnt"):
        import_placement(path, source="deepseek-eplb", facts=Facts(num_ranks=2))


def test_numbers_that_an_engine_does_not_read_are_named(tmp_path):
    path = tmp_path / "map.json"
    for change, noted in (({}, False), ({"layer_id": 3}, True), ({"device_count": 4}, True), ({"device_id": 1}, True)):
        data = json.loads(_ascend([[[0, 1], [2, 3]]]))
        layer = data["layer_list"][0]
        (layer["device_list"][0] if "device_id" in change else layer).update(change)
        path.write_text(json.dumps(data))
        facts = Facts()
        import_placement(path, source="vllm-ascend", facts=facts)
        assert ("goes by the order" in " ".join(facts.notes)) is noted
    path = tmp_path / "map.csv"
    path.write_text("layer,rank,slot,expert\n0,1,0,0\n0,2,1,1\n")
    import_placement(path, source="csv", facts=facts)
    assert "numbered from 1" in facts.notes[-1]


def test_a_map_is_no_statistic(tmp_path):
    rows = np.random.default_rng(0).random((8, 16)).argsort(axis=1)
    (tmp_path / "map.json").write_text(json.dumps(rows.tolist()))
    with pytest.raises(InputError, match="a map of experts, by the numbers; loads of the experts; try --from vllm-map"):
        import_placement(tmp_path / "map.json", source="lmdeploy", facts=Facts(num_ranks=4))


@pytest.mark.parametrize(("layers", "of"), [(2, 2), (1, 40)])  # no dense layers, and nearly all
def test_the_loads_that_stand_for_a_placement_are_no_map(make_placement, tmp_path, layers, of):
    placement = make_placement(layers=layers, experts=16, ranks=4, num_hidden_layers=of)
    export(placement, to="lmdeploy", path=tmp_path / "loads.json")
    assert import_placement(tmp_path / "loads.json", source="lmdeploy") == placement


def test_layers_that_eplb_tables_name_are_heeded(tmp_path):
    rows = np.random.default_rng(0).random((2, 8)).argsort(axis=1)
    save_file({"phy2log": rows}, tmp_path / "a.safetensors", metadata={"layer_ids": "[3,4]"})
    np.savez(tmp_path / "a.npz", phy2log=rows, layers=[3, 4])
    for path in tmp_path.iterdir():
        with pytest.raises(InputError, match=r"got \[3, ?4\]; \[0, 1\], as they are read; give --layer-ids"):
            import_placement(path, source="deepseek-eplb", facts=Facts(num_ranks=2))
        facts = Facts(num_ranks=2, layer_ids=(3, 4))
        assert import_placement(path, source="deepseek-eplb", facts=facts).layer_ids == [3, 4]


@pytest.mark.parametrize("source", ["vllm-ascend", "vllm-map", "lmdeploy", "tensorrt-llm"])
def test_the_placement_of_another_engine_is_named(tmp_path, source):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"physical_to_logical_map": [[0, 1], [1, 0]]}))
    with pytest.raises(InputError, match=r"got a placement of SGLang; a placement of .* needed; .* --from sglang$"):
        import_placement(path, source=source, facts=Facts(num_ranks=2))
    with pytest.raises(InputError, match="--ep: got 3; a divisor of the 2 slots"):
        import_placement(path, source="sglang", facts=Facts(num_ranks=3))


def test_empty_slots_in_the_file_of_an_engine_without_any(tmp_path):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"physical_to_logical_map": [[3, 1, -1, 0, 2, -1]]}))
    with pytest.raises(InputError, match=r"an empty slot \(-1\); an expert in every slot, as sglang needs it"):
        import_placement(path, source="sglang", facts=Facts(num_ranks=2))


def test_experts_numbered_from_1(tmp_path):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"physical_to_logical_map": [[4, 2, 1, 3]]}))
    with pytest.raises(InputError, match=r"no expert 0; .*numbered from 1\? subtract 1"):
        import_placement(path, source="sglang", facts=Facts(num_ranks=2))


def test_loads_of_dense_layers_are_named(tmp_path, make_placement):
    path = tmp_path / "loads.json"
    placement = make_placement(layers=2, experts=8, ranks=2, layer_ids=[1, 2], num_hidden_layers=3)
    export(placement, to="lmdeploy", path=path)
    side_path(path).unlink()
    facts = Facts(num_ranks=2)
    import_placement(path, source="lmdeploy", facts=facts)
    assert facts.notes == ["layers 0 have one load for all: if they have no experts, give --layer-ids"]
    again = import_placement(path, source="lmdeploy", facts=Facts(num_ranks=2, layer_ids=(1, 2)))
    assert (again.physical_to_logical == placement.physical_to_logical).all()
    with pytest.raises(InputError, match="a row for each of the 4 decoder layers"):
        import_placement(path, source="lmdeploy", facts=Facts(num_ranks=2, num_hidden_layers=4))


def test_all_tables_of_eplb_are_checked(make_placement, tmp_path):
    path = tmp_path / "map.npz"
    export(make_placement(slots=5), to="deepseek-eplb", path=path)
    side_path(path).unlink()
    with np.load(path) as arrays:
        tables = dict(arrays)
    wide = np.concatenate([tables["log2phy"], np.full_like(tables["log2phy"], -1)], axis=2)
    np.savez(path, **{**tables, "log2phy": wide, "layers": np.arange(3)})
    facts = Facts(num_ranks=2, layer_ids=(0, 1, 2))
    import_placement(path, source="deepseek-eplb", facts=facts)
    assert facts.notes == ["layers left unread"]
    np.savez(path, **{**tables, "log2phy": np.roll(wide, 1, axis=1)})
    with pytest.raises(InputError, match=r"log2phy.*the slots that phy2log has"):
        import_placement(path, source="deepseek-eplb", facts=facts)

"""Placements written for engines and read back; what cannot be expressed is refused, or converted and said."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from gemopt.exceptions import InputError, UnsupportedError
from gemopt.formats import devices, lmdeploy
from gemopt.formats.approximate import approximate
from gemopt.formats.engine import Facts, WriteOptions
from gemopt.formats.registry import engines, export, get, import_placement, obstacles, side_path
from gemopt.placement import Placement, Split

torch = pytest.importorskip("torch")
yaml = pytest.importorskip("yaml")

FILES = [(e.name, suffix) for e in engines() if e.write and e.read for suffix in e.suffixes]
SHAPES = [(1, 0, 8, 1, 8), (3, 1, 16, 4, 4), (4, 2, 16, 4, 5), (2, 3, 60, 6, 11), (2, 1, 64, 64, 2)]


@pytest.mark.parametrize("name,suffix", FILES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(make_placement, tmp_path, name, suffix, shape):
    layers, dense, experts, ranks, slots = shape
    placement = make_placement(
        layers=layers,
        experts=experts,
        ranks=ranks,
        slots=slots,
        layer_ids=list(range(dense, dense + layers)),
        num_hidden_layers=dense + layers,
        model="m",
        device_uuids=[f"GPU-{rank}" for rank in range(ranks)],
    )
    if obstacles(placement, get(name)):
        with pytest.raises(UnsupportedError):
            export(placement, to=name, path=tmp_path / f"p{suffix}")
        assert not list(tmp_path.iterdir())
        return
    result = export(placement, to=name, path=tmp_path / f"p{suffix}")
    assert import_placement(tmp_path / f"p{suffix}", source=name) == placement
    assert "m" in result.command.split() or name in ("csv", "deepseek-eplb")


@pytest.mark.parametrize("name,suffix", FILES)
def test_round_trip_without_the_side_file(make_placement, tmp_path, name, suffix):
    placement = make_placement(layers=2, experts=8, ranks=2, layer_ids=[1, 2], num_hidden_layers=3)
    path = tmp_path / f"p{suffix}"
    export(placement, to=name, path=path)
    if name != "vllm":
        side_path(path).unlink()
        read = import_placement(path, source=name, facts=Facts(num_ranks=2, layer_ids=(1, 2), num_hidden_layers=3))
        assert read == placement
    if name in ("sglang", "lmdeploy", "tensorrt-llm", "deepseek-eplb"):
        with pytest.raises(InputError, match="--ep"):
            import_placement(path, source=name)


def test_csv_carries_everything(tmp_path):
    placement = Placement(
        physical_to_logical=[[0, 1, 2, 0, -1, 3], [3, 2, 1, 0, 3, -1]],
        slots_per_rank=[3, 0, 1, 2, 0],
        num_experts=4,
        split="static",
        split_weights=[[0.1, 1, 1, 0.9, 0, 1], [0.25, 1, 1, 1, 0.75, 0]],
        layer_ids=[1, 5],
    )
    export(placement, to="csv", path=tmp_path / "p.csv")
    assert import_placement(tmp_path / "p.csv", source="csv") == placement
    side_path(tmp_path / "p.csv").unlink()
    assert import_placement(tmp_path / "p.csv", source="csv", facts=Facts(num_ranks=5)) == placement


def test_changed_file_does_not_match_its_side_file(make_placement, tmp_path):
    path = tmp_path / "map.json"
    export(make_placement(), to="vllm-ascend", path=path)
    path.write_text(path.read_text().replace("device_id", "device_id "))
    with pytest.raises(InputError, match="another version"):
        import_placement(path, source="vllm-ascend")


class StrictLoadBalancer(BaseModel):
    """TensorRT-LLM's rules (`MoeLoadBalancerConfig` and the assignment checks), transcribed."""

    model_config = ConfigDict(extra="forbid", strict=True)

    num_slots: int
    initial_global_assignments: dict[int, list[int]]
    layer_updates_per_iter: int = 0

    def setup(self, layers: list[int], experts: int, ep_size: int) -> None:
        assert self.num_slots % ep_size == 0
        assert self.num_slots >= experts
        for layer in layers:
            assert len(self.initial_global_assignments[layer]) == self.num_slots
            assert set(self.initial_global_assignments[layer]) == set(range(experts))


@pytest.mark.parametrize("mtp", [0, 1, 3])
@pytest.mark.parametrize("experts,ranks,slots", [(8, 1, 8), (16, 4, 5), (256, 32, 9), (64, 64, 1)])
def test_tensorrt_llm_rules(make_placement, tmp_path, mtp, experts, ranks, slots):
    placement = make_placement(
        layers=2, experts=experts, ranks=ranks, slots=slots, layer_ids=[3, 4], num_hidden_layers=5
    )
    options = WriteOptions(mtp_layers=mtp)
    result = export(placement, to="tensorrt-llm", path=tmp_path / "lb.yaml", options=options)
    config = StrictLoadBalancer(**yaml.safe_load((tmp_path / "lb.yaml").read_text()))
    config.setup([3, 4, *range(5, 5 + mtp)], experts, ranks)
    assert config.layer_updates_per_iter == 0
    assert [config.initial_global_assignments[i] for i in (3, 4)] == placement.physical_to_logical.tolist()
    extra = yaml.safe_load((tmp_path / "lb.options.yaml").read_text())
    assert extra == {"moe_config": {"load_balancer": str(tmp_path / "lb.yaml")}, "enable_attention_dp": True}
    assert f"--ep_size {ranks}" in result.command
    for word in ("enable_attention_dp", "moe_cluster_size 1", "moe_model_arch_list", "WIDEEP was removed"):
        assert word in " ".join(result.notes)
    assert import_placement(tmp_path / "lb.yaml", source="tensorrt-llm") == placement


PLAIN = "num_slots: 4\ninitial_global_assignments:\n  3: [1, 2, 3, 0]\n  4: [1, 2, 3, 0]\nlayer_updates_per_iter: 0\n"


@pytest.mark.parametrize(
    "text,note",
    [
        (PLAIN, None),
        (PLAIN.replace("3:", '"3":').replace("4:", "'4':"), None),
        (PLAIN.replace("num_slots: 4", "num_slots: '4'").replace("[1, 2, 3, 0]", "['1', \"2\", 3, 0]"), None),
        (PLAIN.replace("3: [1, 2, 3, 0]", "3: &id001 [1, 2, 3, 0]").replace("4: [1, 2, 3, 0]", "4: *id001"), None),
        (PLAIN.replace("iter: 0", "iter: 2"), "this is the start only"),
        (PLAIN.replace("layer_updates", "  9: [3, 2, 1, 0]\nlayer_updates"), "layers 9 are draft layers"),
    ],
)
def test_tensorrt_llm_reads_what_the_engine_reads(tmp_path, text, note):
    (tmp_path / "lb.yaml").write_text(text)
    facts = Facts(num_ranks=4, num_hidden_layers=5)
    placement = import_placement(tmp_path / "lb.yaml", source="trtllm", facts=facts)
    assert placement.layer_ids == [3, 4]
    assert placement.physical_to_logical.tolist() == [[1, 2, 3, 0]] * 2
    assert [note in said for said in facts.notes] == ([True] if note else [])


@pytest.mark.parametrize("experts,ranks,slots", [(8, 2, 4), (16, 4, 5), (256, 32, 9)])
def test_vllm_map_is_the_physical_to_logical_map(make_placement, tmp_path, experts, ranks, slots):
    """The JSON of vLLM's pull request 49572: [L][P], and the rules that it checks."""
    placement = make_placement(
        layers=3, experts=experts, ranks=ranks, slots=slots, layer_ids=[1, 2, 4], num_hidden_layers=5
    )
    result = export(placement, to="vllm-map", path=tmp_path / "map.json")
    rows = json.loads((tmp_path / "map.json").read_text())
    assert rows == placement.physical_to_logical.tolist()
    assert all(set(row) == set(range(experts)) and len(row) == ranks * slots for row in rows)
    words = shlex.split(result.command)
    config = json.loads(words[words.index("--eplb-config") + 1])
    assert config["initial_expert_map_path"] == str(tmp_path / "map.json")
    assert config["num_redundant_experts"] == ranks * slots - experts
    assert config["step_interval"] > 10**8
    assert {"--enable-eplb", "--enable-expert-parallel"} <= set(words)
    assert words[words.index("--tensor-parallel-size") + 1] == str(ranks)
    assert "49572" in result.notes[0] and "in no release" in result.notes[0]
    assert import_placement(tmp_path / "map.json", source="vllm-map") == placement


def test_vllm_map_of_one_row_stands_for_every_layer(tmp_path):
    (tmp_path / "map.json").write_text("[0, 1, 2, 3, 0, 1]")
    with pytest.raises(InputError, match="--layer-ids"):
        import_placement(tmp_path / "map.json", source="vllm-map", facts=Facts(num_ranks=2))
    facts = Facts(num_ranks=2, layer_ids=(2, 5))
    placement = import_placement(tmp_path / "map.json", source="vllm-map", facts=facts)
    assert placement.physical_to_logical.tolist() == [[0, 1, 2, 3, 0, 1]] * 2
    assert placement.layer_ids == [2, 5]


@pytest.mark.parametrize("fields", [{"slots_per_rank": [3, 1]}, {"physical_to_logical": [[0, 1, 2, 3, -1, -1]]}])
def test_vllm_map_refuses_what_it_cannot_say(tmp_path, fields):
    given = {"physical_to_logical": [[0, 1, 2, 3]], "num_experts": 4, "layer_ids": [0], **fields}
    given.setdefault("slots_per_rank", [len(given["physical_to_logical"][0]) // 2] * 2)
    with pytest.raises(UnsupportedError, match="vllm-map needs"):
        export(Placement(**given), to="vllm-map", path=tmp_path / "map.json")
    assert not list(tmp_path.iterdir())


def test_sglang_fills_dense_layers(make_placement, tmp_path):
    placement = make_placement(layers=2, experts=8, ranks=2, slots=5, layer_ids=[1, 3], num_hidden_layers=5)
    result = export(placement, to="sglang", path=tmp_path / "map.json")
    data = json.loads((tmp_path / "map.json").read_text())
    assert list(data) == ["physical_to_logical_map"]
    rows = np.array(data["physical_to_logical_map"])
    assert rows.shape == (5, 10)
    assert (rows[[1, 3]] == placement.physical_to_logical).all()
    assert (rows[[0, 2, 4]] == np.arange(10) % 8).all()
    assert "--ep-num-redundant-experts 2" in result.command


def test_pt_and_json_agree(make_placement, tmp_path):
    placement = make_placement()
    export(placement, to="sglang", path=tmp_path / "map.pt")
    export(placement, to="sglang", path=tmp_path / "map.json")
    tensor = torch.load(tmp_path / "map.pt", weights_only=True)["physical_to_logical_map"]
    assert tensor.dtype == torch.int64
    assert tensor.tolist() == json.loads((tmp_path / "map.json").read_text())["physical_to_logical_map"]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(2, 8), st.integers(0, 2**32 - 1))
def test_lmdeploy_packing_is_inverted(ranks, width, seed):
    row = np.random.default_rng(seed).permutation(ranks * width)
    loads = lmdeploy.deal(row, ranks)
    assert lmdeploy.pack(loads, ranks) == row.tolist()
    assert loads.min() > 0
    assert loads.sum() < 1 << 24


# What an engine cannot express


def unequal(**fields) -> Placement:
    rows = [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]
    return Placement(
        **{
            "physical_to_logical": rows,
            "slots_per_rank": [4, 2],
            "num_experts": 6,
            "num_hidden_layers": 2,
            **fields,
        }
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


# Conversions


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


def test_nothing_to_approximate(make_placement):
    placement = make_placement()
    assert approximate(placement, get("sglang")) == (placement, [])


# Devices


def test_placement_follows_its_devices():
    placement = Placement(
        physical_to_logical=[[0, 1, 2, 3, 0]],
        slots_per_rank=[3, 2],
        num_experts=4,
        split="static",
        split_weights=[[0.25, 1, 1, 1, 0.75]],
        device_uuids=["GPU-Aa", "GPU-bb"],
    )
    swapped, notes = devices.follow(placement, ["bb", "gpu-aa"])
    assert swapped.physical_to_logical.tolist() == [[3, 0, 0, 1, 2]]
    assert swapped.slots_per_rank.tolist() == [2, 3]
    assert swapped.split_weights.tolist() == [[1, 0.75, 0.25, 1, 1]]
    assert swapped.device_uuids == ["GPU-bb", "GPU-Aa"]
    assert len(notes) == 2
    assert devices.follow(placement, ["GPU-Aa", "GPU-bb"]) == (placement, [])
    assert devices.follow(swapped, ["GPU-Aa", "GPU-bb"])[0] == placement


def test_other_devices_are_refused(make_placement):
    placement = make_placement(device_uuids=["a", "b"])
    with pytest.raises(InputError, match="c"):
        devices.follow(placement, ["a", "c"])
    with pytest.raises(InputError, match="device"):
        devices.follow(placement, ["a"])
    with pytest.raises(InputError, match="device_uuids"):
        devices.follow(make_placement(), ["a", "b"])


def test_devices_present_are_compared(make_placement):
    placement = make_placement(device_uuids=["a", "b"])
    assert devices.compare(placement, ["GPU-a", "b"]) == ""
    assert "--devices b,a" in devices.compare(placement, ["b", "a"])
    assert "profile and solve again" in devices.compare(placement, ["b", "c"])
    assert devices.compare(placement, []) == ""
    assert devices.compare(make_placement(), ["b", "c"]) == ""


# Known-bad files


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
    ("csv", ".csv", "", "CSV"),
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


@pytest.mark.parametrize("name", ["sglang", "tensorrt-llm", "vllm", "vllm-map", "vllm-ascend", "lmdeploy"])
def test_commands_are_safe_to_paste(make_placement, tmp_path, name):
    folder = tmp_path / "a b'; echo"
    folder.mkdir()
    path = folder / f"p{get(name).suffixes[0]}"
    command = export(make_placement(model="m; rm -rf $HOME"), to=name, path=path).command
    words = shlex.split(command)
    assert "m; rm -rf $HOME" in words
    assert any(str(folder) in word for word in words)


def test_plugin_is_cheap_without_its_variable():
    code = (
        "import sys; from gemopt.formats import vllm_plugin; vllm_plugin.register();"
        "print([m for m in ('numpy', 'torch', 'pydantic', 'vllm') if m in sys.modules])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "GEMOPT_PLACEMENT"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


# What a file says besides


def test_layers_that_a_file_names_are_not_renamed(make_placement, tmp_path):
    for name, suffix in (("tensorrt-llm", ".yaml"), ("csv", ".csv")):
        path = tmp_path / f"map{suffix}"
        export(make_placement(layers=2, num_hidden_layers=6, layer_ids=[3, 4]), to=name, path=path)
        side_path(path).unlink()
        with pytest.raises(InputError, match=r"--layer-ids: got 0, 1; layers 3, 4, as .* says; leave it out"):
            import_placement(path, source=name, facts=Facts(num_ranks=2, layer_ids=(0, 1)))
        assert import_placement(path, source=name, facts=Facts(num_ranks=2, layer_ids=(3, 4))).layer_ids == [3, 4]


def test_numbers_that_an_engine_does_not_read_are_named(tmp_path):
    path = tmp_path / "map.json"
    for change, noted in (({}, False), ({"layer_id": 3}, True), ({"device_count": 4}, True), ({"device_id": 1}, True)):
        data = json.loads(_ascend([[[0, 1], [2, 3]]]))
        layer = data["layer_list"][0]
        (layer["device_list"][0] if "device_id" in change else layer).update(change)
        path.write_text(json.dumps(data))
        facts = Facts()
        import_placement(path, source="vllm-ascend", facts=facts)
        assert bool(facts.notes) is noted
    path = tmp_path / "map.csv"
    path.write_text("layer,rank,slot,expert\n0,1,0,0\n0,2,1,1\n")
    import_placement(path, source="csv", facts=facts)
    assert "numbered from 1" in facts.notes[-1]


def test_all_tables_of_eplb_are_checked(make_placement, tmp_path):
    path = tmp_path / "map.npz"
    export(make_placement(slots=5), to="deepseek-eplb", path=path)
    side_path(path).unlink()
    with np.load(path) as arrays:
        tables = dict(arrays)
    wide = np.concatenate([tables["log2phy"], np.full_like(tables["log2phy"], -1)], axis=2)
    np.savez(path, **{**tables, "log2phy": wide, "layers": np.arange(3)})
    facts = Facts(num_ranks=2)
    import_placement(path, source="deepseek-eplb", facts=facts)
    assert facts.notes == ["layers left unread"]
    np.savez(path, **{**tables, "log2phy": np.roll(wide, 1, axis=1)})
    with pytest.raises(InputError, match=r"log2phy.*the slots that phy2log has"):
        import_placement(path, source="deepseek-eplb", facts=facts)

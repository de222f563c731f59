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
from gemopt.formats import devices
from gemopt.formats.engine import Facts, WriteOptions
from gemopt.formats.engines import lmdeploy
from gemopt.formats.registry import engines, export, get, import_placement, obstacles, side_path
from gemopt.placement import Placement

torch = pytest.importorskip("torch")
yaml = pytest.importorskip("yaml")


FILES = [(e.name, suffix) for e in engines() if e.write and e.read for suffix in e.suffixes]
SHAPES = [(1, 0, 8, 1, 8), (3, 1, 16, 4, 4), (4, 2, 16, 4, 5), (2, 3, 60, 6, 11), (2, 1, 64, 64, 2)]


@pytest.mark.parametrize("name,suffix", FILES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(shaped, tmp_path, name, suffix, shape):
    placement = shaped(shape, model="m", device_uuids=[f"GPU-{rank}" for rank in range(shape[3])])
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


def test_csv_as_programs_write_it(tmp_path):
    path, rows = tmp_path / "p.csv", [(3, 0, 0, 1), (3, 0, 1, 0), (3, 1, 2, 2)]
    lines = [",".join(map(str, row)) for row in rows]
    for text in (
        "\ufefflayer,rank,slot,expert\r\n" + "\r\n".join(lines),  # as Excel does
        "Layer; Rank; Slot; Expert\n" + "\n".join(lines).replace(",", "; "),
        "expert,slot,rank,layer\n" + "\n".join(line[::-1] for line in lines),
    ):
        path.write_text(text)
        placement = import_placement(path, source="csv")
        assert placement.physical_to_logical.tolist() == [[1, 0, 2]]
        assert placement.slots_per_rank.tolist() == [2, 1]
        assert placement.layer_ids == [3]


@pytest.mark.parametrize("name,suffix", [("vllm-ascend", ".json"), ("vllm-map", ".json"), ("deepseek-eplb", ".npz")])
def test_rows_by_position_are_said_to_be_guessed(make_placement, tmp_path, name, suffix):
    path = tmp_path / f"map{suffix}"
    export(make_placement(layers=2, num_hidden_layers=9, layer_ids=[3, 7]), to=name, path=path)
    notes = Facts(num_ranks=2).notes
    assert import_placement(path, source=name, facts=Facts(notes=notes)).layer_ids == [3, 7]
    assert notes == []
    side_path(path).unlink()
    assert import_placement(path, source=name, facts=Facts(num_ranks=2, notes=notes)).layer_ids == [0, 1]
    assert notes == ["rows are MoE layers, read as layers 0 to 1: with dense layers, give --layer-ids"]


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


def test_draft_layers_of_tensorrt_llm_are_named(tmp_path):
    (tmp_path / "lb.yaml").write_text(PLAIN.replace("layer_updates", "  9: [0, 1, 2, 3]\nlayer_updates"))
    facts = Facts(num_ranks=4)
    assert import_placement(tmp_path / "lb.yaml", source="trtllm", facts=facts).layer_ids == [3, 4, 9]
    assert facts.notes == ["layers 9 hold the experts in order: draft layers? then give --num-hidden-layers"]


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
    assert "Layers 0, 2, 4 are not in the placement: right if they have no experts." in result.notes
    side_path(tmp_path / "map.json").unlink()
    facts = Facts(num_ranks=2)
    assert import_placement(tmp_path / "map.json", source="sglang", facts=facts).num_layers == 5
    assert facts.notes == ["layers 0, 2, 4 hold the experts in order: if they have none, give --layer-ids"]


def test_notes_name_the_layers_that_there_are(make_placement, tmp_path):
    placement = make_placement(layers=3, experts=8, ranks=2, slots=4, layer_ids=[1, 2, 4], num_hidden_layers=5)
    found = export(placement, to="deepseek-eplb", path=tmp_path / "map.npz")
    assert found.notes == ("Rows are MoE layers 1-2, 4 in order, none for dense layers.",)
    placement = make_placement(layers=2, experts=8, ranks=2, slots=4, layer_ids=[1, 2], num_hidden_layers=3)
    found = export(placement, to="sglang", path=tmp_path / "map.json")
    assert "Layer 0 is not in the placement: right if it has no experts." in found.notes


def test_ascend_layers_are_those_of_the_file_or_the_ones_given(make_placement, tmp_path):
    path = tmp_path / "map.json"
    export(make_placement(layers=2, experts=8, ranks=2), to="vllm-ascend", path=path)
    side_path(path).unlink()
    path.write_text(
        path.read_text().replace('"layer_id": 1', '"layer_id": 4').replace('"layer_id": 0', '"layer_id": 3')
    )
    for layers, noted in (((3, 4), False), (None, True), ((4, 5), True)):
        facts = Facts(layer_ids=layers)
        import_placement(path, source="vllm-ascend", facts=facts)
        assert bool(facts.notes) is noted


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
        "import sys; from gemopt.formats.engines import vllm_plugin; vllm_plugin.register();"
        "print([m for m in ('numpy', 'torch', 'pydantic', 'vllm') if m in sys.modules])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "GEMOPT_PLACEMENT"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


def test_layers_that_a_file_names_are_not_renamed(make_placement, tmp_path):
    for name, suffix in (("tensorrt-llm", ".yaml"), ("csv", ".csv")):
        path = tmp_path / f"map{suffix}"
        export(make_placement(layers=2, num_hidden_layers=6, layer_ids=[3, 4]), to=name, path=path)
        side_path(path).unlink()
        with pytest.raises(InputError, match=r"--layer-ids: got 0, 1; layers 3, 4, as .* says; leave it out"):
            import_placement(path, source=name, facts=Facts(num_ranks=2, layer_ids=(0, 1)))
        assert import_placement(path, source=name, facts=Facts(num_ranks=2, layer_ids=(3, 4))).layer_ids == [3, 4]

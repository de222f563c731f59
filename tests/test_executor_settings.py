"""Settings that name experts, in config.json and other files of a checkpoint, follow them or are refused by name."""

import json

import pytest
from checkpoint_files import ORDER, PLACEMENT, E, config_of, exporter, network, router_of
from safetensors.numpy import save_file

from gemopt import InputError
from gemopt.executor import export_checkpoint
from gemopt.executor.checkpoint import read_header
from gemopt.models.families import FAMILIES


@pytest.fixture
def export(tmp_path):
    return exporter(tmp_path)


def test_names_in_settings_follow(export):
    row = FAMILIES["qwen3_moe"]
    told = {
        "ignore": ["lm_head", "model.layers.1.mlp.experts.9.down_proj", "re:.*shared_expert.*"],
        "extra_config": {"model.layers.1.mlp.experts.0.down_proj": {"bits": 8}},
        "targets": [r"re:.*experts\.\d+\.down_proj", "model.layers.*.mlp.experts.*"],
        "others": ["model.layers.0.mlp.experts.9.down_proj", "mtp.layers.1.mlp.experts.9.down_proj"],
    }
    _, config = export(row, network(row), quantization_config=told, experts_per_block=3, num_shared_experts=[1, 1])
    new = config["quantization_config"]
    assert new["ignore"] == ["lm_head", "model.layers.1.mlp.experts.2.down_proj", "re:.*shared_expert.*"]
    assert new["extra_config"] == {"model.layers.1.mlp.experts.1.down_proj": {"bits": 8}}
    assert (new["targets"], new["others"]) == (told["targets"], told["others"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quantization_config": {"ignore": [r"re:.*experts\.3\..*"]}}, r"ignore: got re:\.\*experts"),
        ({"quantization_config": {"dynamic": {r"-:.*experts\.[0-3]\.up": {}}}}, "dynamic: got -:"),
        ({"quantization_config": {"exclude_modules": ["model.layers.1.mlp.experts.3*"]}}, "exclude_modules"),
        ({"quantization_config": {"ignore": ["experts.3.down_proj"]}}, "experts.3.down_proj"),
        ({"expert_bits": [4] * E}, "expert_bits"),
        ({"bits_of_experts": [[4] * E, [4] * E]}, "bits_of_experts"),
        ({"num_bits_of_experts": [8] + [4] * (E - 1)}, "num_bits_of_experts"),
        ({"expert_map": {str(e): e for e in range(E)}}, "expert_map"),
        ({"router_bias": [0.5] * E}, "router_bias"),
    ],
)
def test_settings_of_single_experts_that_cannot_be_renumbered(export, settings, words):
    row = FAMILIES["qwen3_moe"]
    with pytest.raises(InputError, match=rf"config\.json: .*{words}"):
        export(row, network(row), **settings)
    assert not export.out.exists()


@pytest.mark.parametrize("name", ["expert_map.json", "routing_bias.npy", "experts.yaml", "eplb.json"])
@pytest.mark.parametrize("content", [list(range(E)), {"layer_0": [0.5] * E}, {"used": {str(e): 1 for e in range(E)}}])
def test_files_about_experts_are_not_copied_as_they_are(export, tmp_path, name, content):
    row = FAMILIES["qwen3_moe"]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match=name):
        export(row, network(row))
    assert not export.out.exists()


def test_settings_in_other_files(export, tmp_path):
    row = FAMILIES["qwen3_moe"]
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "hf_quant_config.json"
    path.write_text(json.dumps({"quantization": {"exclude_modules": ["model.layers.1.mlp.experts.5"]}}))
    (tmp_path / "in" / "pytorch_model.bin.index.json").write_text("{}")
    (tmp_path / "in" / "tokenizer.json").write_text('{"vocab": {"experts.3": 7}}')
    export(row, network(row))
    out = tmp_path / "out"
    assert json.loads((out / path.name).read_text()) == {
        "quantization": {"exclude_modules": ["model.layers.1.mlp.experts.0"]}
    }
    assert (out / "tokenizer.json").read_text() == '{"vocab": {"experts.3": 7}}'
    assert not (out / "pytorch_model.bin.index.json").exists(), "its weights are not copied"


def test_layers_of_a_hybrid_network_are_counted_by_their_kinds(export):
    row = FAMILIES["nemotron_h"]
    old, kinds = network(row), ["mamba", "moe"]
    new, _ = export(row, old, num_hidden_layers=None, layers_block_type=kinds)
    assert (new[f"{router_of(row)}.weight"] == old[f"{router_of(row)}.weight"][ORDER]).all()
    with pytest.raises(InputError, match="the checkpoint has 1 decoder layers"):
        export(row, old, num_hidden_layers=None, layers_block_type=kinds[:1])


@pytest.mark.parametrize(("n_group", "topk_group"), [(8, None), (None, 3), (None, None)])
def test_groups_of_a_config_that_says_half(export, n_group, topk_group):
    """transformers fills in 8 groups of which 4 are kept: half of the answer in the file does not switch them off."""
    row = FAMILIES["deepseek_v3"]
    with pytest.raises(InputError, match="mix routing groups"):
        export(row, network(row), n_group=n_group, topk_group=topk_group)


@pytest.mark.parametrize(("name", "kept"), [("minimax_m2", 3), ("glm4_moe", None), ("kimi_linear", 2)])
def test_groups_that_only_the_config_knows(export, name, kept):
    """Of a family that we know without; of one of which transformers keeps one group where the file does not say."""
    row = FAMILIES[name]
    field = "num_expert_group" if name == "kimi_linear" else "n_group"
    with pytest.raises(InputError, match="mix routing groups"):
        export(row, network(row), **{"n_group": None, field: 8, "topk_group": kept})


def test_names_in_the_metadata_of_weights_follow(tmp_path):
    """As torchao and torch.distributed.checkpoint write them: names as keys, and lists of names as JSON."""
    row = FAMILIES["qwen3_moe"]
    name = "model.layers.1.mlp.experts.{}.down_proj.weight"
    other = "model.layers.0.mlp.experts.9.down_proj.weight"
    told = {
        "format": "pt",
        "tensor_names": json.dumps([name.format(9), other, "lm_head.weight"]),
        name.format(0): json.dumps({"_type": "Int4Tensor", "offsets": [0, 0]}),
        "base": "/data/experts/128e/model",
        "deep": "[" * 9999 + "]" * 9999,
        "note": "128 experts. 64 of them are cold",
        "sharding": json.dumps({name.format(9): {"saved_offsets": [0, 0]}}),
    }
    (tmp_path / "in").mkdir()
    save_file(network(row), tmp_path / "in" / "model.safetensors", metadata=told)
    (tmp_path / "in" / "config.json").write_text(json.dumps(config_of(row)))
    result = export_checkpoint(PLACEMENT, tmp_path / "in", tmp_path / "out")
    _, found, _ = read_header(result / "model.safetensors")
    assert json.loads(found["tensor_names"]) == [name.format(2), other, "lm_head.weight"]
    assert json.loads(found[name.format(1)]) == {"_type": "Int4Tensor", "offsets": [0, 0]}
    assert json.loads(found["sharding"]) == {name.format(2): {"saved_offsets": [0, 0]}}
    assert [found[key] for key in ("format", "base", "note", "deep")] == [
        told[key] for key in ("format", "base", "note", "deep")
    ]
    assert len(found) == len(told)

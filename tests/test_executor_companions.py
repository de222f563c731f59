"""What lies beside routers and experts in the checkpoints of hubs follows on the right axis, or is refused by name."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemopt import InputError, Placement
from gemopt.executor import export_checkpoint
from gemopt.models.families import FAMILIES

# Of the families whose files have the same names, the first.
NAMES_IN_FILES = ("checkpoint_blocks", "checkpoint_tensors", "checkpoint_experts", "hash_tensors", "identity_experts")
DIFFERENT = list(
    {repr([getattr(r, n) for n in NAMES_IN_FILES]): name for name, r in reversed(FAMILIES.items())}.values()
)
IN_BLOCKS = [name for name in DIFFERENT if FAMILIES[name].checkpoint_blocks]
E, HIDDEN, INNER, LAYER, IDENTITY = 16, 40, 24, 1, 4
ORDER = [5, 0, 9, 14, 2, 7, 11, 1, 3, 15, 8, 4, 13, 6, 12, 10]
PLACEMENT = Placement(physical_to_logical=[ORDER], slots_per_rank=[8, 8], num_experts=E, layer_ids=[LAYER])
RNG = np.random.default_rng(0)


def values(shape, dtype="f4"):
    """Different ones everywhere, so that every wrong order shows."""
    return RNG.permutation(int(np.prod(shape))).reshape(shape).astype(dtype)


def block_of(row):
    return ".".join([f"model.layers.{LAYER}", *row.checkpoint_blocks[:1]])


def router_of(row):
    weight = next(name for name in row.checkpoint_tensors if name.endswith(".weight"))
    return f"{block_of(row)}.{weight.removesuffix('.weight')}"


def rows_of(row):
    return E + (IDENTITY if row.identity_experts else 0)


def network(row):
    """Tensors of a small checkpoint of a family: router, one projection of every expert, a shared expert, attention."""
    block, rows = block_of(row), rows_of(row)
    made = {
        f"{block}.{name}": values((rows, HIDDEN) if name.endswith("weight") else (1, rows) if axis else (rows,))
        for name, axis in row.checkpoint_tensors.items()
    }
    made |= {f"{block}.experts.{e}.down_proj.weight": values((HIDDEN, INNER)) for e in range(rows)}
    made |= {f"{block}.{name}": values((3, 2), "i8") % E for name in row.hash_tensors}
    made[f"{block}.shared_expert.up_proj.weight"] = values((E, HIDDEN))
    made[f"model.layers.{LAYER}.self_attn.o_proj.weight"] = values((E, E))
    return made


def config_of(row, **more):
    special = {row.identity_experts[0]: IDENTITY} if row.identity_experts else {}
    groups = {"n_group": 1, "topk_group": 1} if row.groups == "n_group" else {}
    return {
        "model_type": row.model_type,
        row.num_experts: E,
        "num_hidden_layers": 2,
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INNER,
        **special,
        **groups,
        **more,
    }


@pytest.fixture
def export(tmp_path):
    def run(row, tensors, **more):
        folder = tmp_path / "in"
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config_of(row, **more)))
        result = export_checkpoint(PLACEMENT, folder, tmp_path / "out")
        return load_file(result / "model.safetensors"), json.loads((result / "config.json").read_text())

    run.out = tmp_path / "out"
    return run


def order_of(length):
    return [*ORDER, *range(E, length)]


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_tensor_of_every_family_follows(export, name):
    row = FAMILIES[name]
    old = network(row)
    new, _ = export(row, old)
    block, slot_of = block_of(row), np.argsort(ORDER)
    for tensor, axis in row.checkpoint_tensors.items():
        key = f"{block}.{tensor}"
        assert (new[key] == old[key].take(order_of(rows_of(row)), axis=axis)).all(), key
    for slot, expert in enumerate(order_of(rows_of(row))):
        part = f"{block}.experts.{{}}.down_proj.weight"
        assert (new[part.format(slot)] == old[part.format(expert)]).all()
    for tensor in row.hash_tensors:
        assert (new[f"{block}.{tensor}"] == slot_of[old[f"{block}.{tensor}"]]).all()
    for key in (f"{block}.shared_expert.up_proj.weight", f"model.layers.{LAYER}.self_attn.o_proj.weight"):
        assert (new[key] == old[key]).all(), "has nothing to do with experts"


# Companion of a router: shape of R rows, type, the axis that follows (None: it stays).
COMPANIONS = {
    "FP8 by row": ("weight_scale", lambda r: (r, 1), "f4", 0),
    "FP8 by tensor": ("weight_scale", lambda _: (1,), "f4", None),
    "FP8 by block": ("weight_scale_inv", lambda r: (r, 2), "f4", 0),
    "one block": ("weight_scale_inv", lambda _: (1, 2), "f4", None),
    "scale of the input": ("input_scale", lambda _: (1,), "f4", None),
    "a bias the family does not have": ("bias", lambda r: (r,), "f4", 0),
    "a correction bias": ("e_score_correction_bias", lambda r: (r,), "f4", 0),
    "one in a row": ("e_score_correction_bias", lambda r: (1, r), "f4", 1),
    "NVFP4": ("weight_scale", lambda r: (r, 3), "u1", 0),
    "global scale": ("weight_scale_2", lambda _: (1,), "f4", None),
    "compressed-tensors": ("weight_packed", lambda r: (r, 5), "i4", 0),
    "its zero points by row": ("weight_zero_point", lambda r: (r, 1), "i1", 0),
    "its shape": ("weight_shape", lambda _: (2,), "i8", None),
    "GPTQ": ("qweight", lambda r: (5, r), "i4", 1),
    "GPTQ scales": ("scales", lambda r: (3, r), "f2", 1),
    "GPTQ groups": ("g_idx", lambda _: (HIDDEN,), "i4", None),
    "MLX scales": ("scales", lambda r: (r, 3), "f2", 0),
    "MLX biases": ("biases", lambda r: (r, 3), "f2", 0),
    "int8 of bitsandbytes": ("SCB", lambda r: (r,), "f4", 0),
}


@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize("case", COMPANIONS)
def test_companions_of_the_router_follow(export, name, case):
    row = FAMILIES[name]
    companion, shape, dtype, axis = COMPANIONS[case]
    old = network(row)
    key = f"{router_of(row)}.{companion}"
    if key in old:
        pytest.skip("a tensor of the family, tested with it")
    old[key] = values(shape(rows_of(row)), dtype)
    new, _ = export(row, old)
    assert (new[key] == (old[key] if axis is None else old[key].take(order_of(rows_of(row)), axis=axis))).all()


# Beside the router or among stacked experts, refused: it may be by expert, and nothing says on which axis.
REFUSED = {
    "invented, beside the router": ("{router}.temperature", (E,), "f4"),
    "invented, in the block": ("{block}.expert_gain", (E, 3), "f4"),
    "invented, on another axis": ("{block}.routing.mix", (3, E), "f4"),
    "flattened": ("{router}.absmax", (E * 7,), "f4"),
    "ids of experts": ("{block}.fallback", (5,), "i8"),
    "packed zero points": ("{router}.qzeros", (3, E // 8), "i4"),
    "AWQ": ("{router}.qweight", (HIDDEN, E // 8), "i4"),
    "packed by expert": ("{router}.weight_zero_point", (E // 8, 3), "i4"),
    "all in one word": ("{router}.weight_zero_point", (1, 3), "i4"),
    "blocks of several experts": ("{router}.weight_scale_inv", (2, 5), "f4"),
    "transposed": ("{router}.weight_scale", (1, E), "f4"),
    "either axis": ("{router}.scales", (E, E), "f4"),
    "a table of all layers": ("model.expert_bias", (2, E), "f4"),
    "beside the block": (f"model.layers.{LAYER}.router_gain", (E,), "f4"),
    "beside the block, of another name": (f"model.layers.{LAYER}.correction_bias", (E,), "f4"),
    "a gate beside the block": (f"model.layers.{LAYER}.choice.gate.bias", (1, E), "f4"),
    "shared by name, one for each by shape": ("{block}.shared_bias", (E,), "f4"),
    "outside the layers": ("model.routing_bias", (E,), "f4"),
    "of all layers together": ("model.routing_bias", (2, E), "f4"),
    "another name of the experts": ("{block}.switch_mlp.up_proj.weight", (E, 4, 3), "f4"),
    "invented, beside stacked experts": ("{block}.experts.down_proj_gain", (E, 3), "f4"),
    "flattened stacked experts": ("{block}.experts.up_proj", (E * 6, 1), "u1"),
    "stacked on another axis": ("{block}.experts.up_proj", (3, E, 4), "f4"),
    "an expert too many": ("{block}.experts.40.down_proj.weight", (3, 4), "f4"),
}


@pytest.mark.parametrize("name", IN_BLOCKS)
@pytest.mark.parametrize("case", REFUSED)
def test_what_no_rule_covers_is_refused_by_name(export, name, case):
    row = FAMILIES[name]
    pattern, shape, dtype = REFUSED[case]
    key = pattern.format(router=router_of(row), block=block_of(row))
    with pytest.raises(InputError) as error:
        export(row, network(row) | {key: values(shape, dtype)})
    told = str(error.value)
    assert told.startswith(key + ": got ") and ("expert 40" in told or str(list(shape)) in told)
    assert not export.out.exists()


def test_a_flattened_router_is_not_taken_for_rows(export):
    """4 bits of bitsandbytes: [E * hidden / 2, 1] bytes, more rows than experts."""
    row = FAMILIES["qwen3_moe"]
    tensors = network(row) | {f"{router_of(row)}.weight": values((E * HIDDEN // 2, 1), "u1")}
    with pytest.raises(InputError, match=r"gate\.weight: got shape \[320, 1\] U8"):
        export(row, tensors)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("{block}.norm.weight", (HIDDEN,)),
        ("{block}.scale", (1,)),
        ("some_moe.model.layers.1.self_attn.k_proj.weight", (E, HIDDEN)),
        ("model.layers.0.mlp.gate.temperature", (E,)),
        ("model.layers.1.self_attn.sinks", (E,)),
        ("model.layers.1.post_attention_layernorm.weight", (E,)),
        ("model.layers.1.hc_scale", (HIDDEN,)),
        ("model.layers.1.mlp.shared_experts.up_proj.bias", (E,)),
        ("model.mtp.layers.1.mlp.gate.weight", (E, HIDDEN)),
        ("mtp.layers.1.mlp.experts.3.down_proj.weight", (HIDDEN, INNER)),
        ("model.layers.2.mlp.gate.weight", (E, HIDDEN)),
    ],
)
def test_what_has_no_axis_of_experts_stays(export, key, shape):
    """Norms and scalars of the block, layers that the placement leaves out, heads that predict further tokens."""
    row = FAMILIES["qwen3_moe"]
    key = key.format(block=block_of(row))
    tensor = values(shape)
    new, _ = export(row, network(row) | {key: tensor})
    assert (new[key] == tensor).all()


@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize(
    ("part", "shape", "dtype"),
    [
        ("down_proj_blocks", (E, 5, 3, 16), "u1"),
        ("down_proj_scales", (E, 5, 3), "u1"),
        ("gate_up_proj_bias", (E, 6), "f4"),
        ("gate_up_proj_scale_inv", (E, 2, 1), "f4"),
        ("down_proj.weight_scale", (E,), "f4"),
        ("down_proj_input_scale", (1,), "f4"),
    ],
)
def test_companions_of_stacked_experts_follow(export, name, part, shape, dtype):
    row = FAMILIES[name]
    block = block_of(row)
    old = {key: tensor for key, tensor in network(row).items() if ".experts." not in key}
    old |= {f"{block}.experts.gate_up_proj": values((E, 6, 7)), f"{block}.experts.{part}": values(shape, dtype)}
    new, _ = export(row, old)
    for key in (f"{block}.experts.gate_up_proj", f"{block}.experts.{part}"):
        assert (new[key] == (old[key][ORDER] if len(old[key]) == E else old[key])).all(), key


def test_numbers_of_experts_inside_a_name(export):
    """As 4-bit files of gpt-oss have them; companions differ from expert to expert where one is not quantised."""
    row = FAMILIES["gpt_oss"]
    block = block_of(row)
    old = {key: tensor for key, tensor in network(row).items() if ".experts." not in key}
    for e in range(E):
        old[f"{block}.experts.down_projs.{e}.weight"] = values((30, 1), "u1")
        if e != 3:
            old[f"{block}.experts.down_projs.{e}.weight.absmax"] = values((4,))
    new, _ = export(row, old)
    for slot, expert in enumerate(ORDER):
        for part in ("weight", "weight.absmax"):
            before = old.get(f"{block}.experts.down_projs.{expert}.{part}")
            after = new.get(f"{block}.experts.down_projs.{slot}.{part}")
            assert (before is None and after is None) or (before == after).all()


def test_a_missing_projection_of_one_expert(export):
    row = FAMILIES["qwen3_moe"]
    tensors = network(row)
    tensors |= {f"{block_of(row)}.experts.{e}.up_proj.weight": values((3,)) for e in range(E - 1)}
    with pytest.raises(InputError, match="layer 1: got tensors of 16 experts"):
        export(row, tensors)


def test_two_networks_in_one_checkpoint(export):
    row = FAMILIES["qwen3_moe"]
    tensors = network(row)
    tensors |= {f"talker.{key}": tensor for key, tensor in tensors.items()}
    with pytest.raises(InputError, match=r"layer 1: got below model\. and talker\.model\."):
        export(row, tensors)


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

"""Every family: MoE layers found, tensors named, routing read, checkpoint names understood, permutations exact."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from installed_families import INSTALLED, MISSING  # noqa: E402

from gemopt.exceptions import InputError  # noqa: E402
from gemopt.models import (  # noqa: E402
    FAMILIES,
    auto_class,
    describe,
    family,
    find_moe_layers,
    num_hidden_layers,
    renamed,
    tensor_role,
    tiny,
)

GROUPS = {"deepseek_v3", "deepseek_v32", "axk1", "bailing_hybrid", "beam"}  # tiny ones have 4 groups and keep 2
TOKENS = (torch.arange(48) * 37 % 250 + 3).view(3, 16)


@pytest.fixture(scope="module", params=INSTALLED)
def model(request):
    torch.set_num_threads(1)
    return tiny(request.param)


def kind(model) -> str:
    return model.config.get_text_config().model_type


def test_layers_are_found(model):
    layers = find_moe_layers(model)
    paths = [re.search(r"layers\.(\d+)\.(\w+\.)?experts$", path) for path, _ in model.named_modules()]
    assert [layer.layer_id for layer in layers] == [int(path[1]) for path in paths if path is not None]
    assert num_hidden_layers(model) == 3
    for layer in layers:
        assert model.get_submodule(layer.path) is layer.block
        assert (layer.num_experts, layer.num_local_experts, layer.top_k) == (8, 8, 2)
        assert (layer.hidden_size, layer.intermediate_size) == (32, 16)
        bias_bytes = 4 * (2 * 16 + 32) if kind(model) == "gpt_oss" else 0
        matrices = 2 if kind(model) == "nemotron_h" else 3
        assert layer.expert_bytes == 4 * matrices * 32 * 16 + bias_bytes


def test_every_tensor_with_an_expert_axis_is_named(model):
    """A tensor of a block that has as many rows as experts and is not shared must be in one of the tables."""
    for layer in find_moe_layers(model):
        rows = layer.tensor(next(iter(layer.router_tensors))).shape[0]
        known = {*layer.router_tensors, *layer.hash_tensors, *(f"experts.{name}" for name in layer.expert_tensors)}
        tensors = {**dict(layer.block.named_parameters()), **dict(layer.block.named_buffers())}
        with_experts = {name for name, tensor in tensors.items() if {8, rows} & set(tensor.shape)}
        assert with_experts <= known <= set(tensors)


def test_chosen_are_the_experts_that_run(model):
    """Zeroing the weights of experts that no token chose changes nothing; of a chosen one, something."""
    layer = find_moe_layers(model)[-1]
    seen = []
    handle = layer.router.register_forward_hook(lambda *call: seen.append(layer.chosen(call[-1])))
    with torch.no_grad():
        before = model(TOKENS[:1, :2]).logits
        handle.remove()
        ids = seen[0]
        assert ids.shape == (2, 2)
        chosen = set(ids.flatten().tolist())
        unused = [e for e in range(8) if e not in chosen]
        weights = layer.experts.down_proj
        kept = weights.clone()
        weights[unused] = 0
        assert torch.equal(model(TOKENS[:1, :2]).logits, before)
        weights.copy_(kept)
        weights[[e for e in chosen if e < 8]] = 0
        changed = model(TOKENS[:1, :2]).logits
        weights.copy_(kept)
    assert not torch.allclose(changed, before) or min(chosen) >= 8


def test_permuting_the_named_tensors_keeps_the_outputs(model):
    """The tables are complete: renumbering experts through them leaves the network's function as it was."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        before = model(TOKENS).logits
        for layer in find_moe_layers(model):
            groups = 4 if kind(model) in GROUPS else 8
            inside = 8 // groups
            order = torch.randperm(groups, generator=generator)
            order = (order[:, None] * inside + torch.randperm(inside, generator=generator)).flatten()
            where = torch.argsort(order)
            for name, dim in layer.router_tensors.items():
                tensor = layer.tensor(name)
                rest = torch.arange(8, tensor.shape[dim])
                tensor.copy_(tensor.index_select(dim, torch.cat([order, rest])).clone())
            for name in layer.hash_tensors:
                layer.tensor(name).copy_(where[layer.tensor(name)])
            for name, dim in layer.expert_tensors.items():
                tensor = getattr(layer.experts, name)
                rest = torch.arange(8, tensor.shape[dim])
                tensor.copy_(tensor.index_select(dim, torch.cat([order, rest])).clone())
        after = model(TOKENS).logits
    assert (after - before).norm() / before.norm() < 1e-5


def test_checkpoint_roles_cover_the_saved_tensors(model, tmp_path):
    from safetensors import safe_open

    row = family(kind(model))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    roles = {name: tensor_role(row, name) for name in shapes}
    for layer in find_moe_layers(model):
        mine = {name: role for name, role in roles.items() if role is not None and role.layer == layer.layer_id}
        assert sum(role.kind == "router" for role in mine.values()) == len(layer.router_tensors)
        assert sum(role.kind == "hash" for role in mine.values()) == len(layer.hash_tensors)
        experts = {role.expert for role in mine.values() if role.kind == "expert"}
        if experts:  # longcat_flash also writes (unused) tensors for its four identity experts
            assert experts >= set(range(8))
        else:
            assert sum(role.kind == "stacked" for role in mine.values()) >= len(layer.expert_tensors)
        for name, role in mine.items():
            if role.kind in ("router", "stacked"):
                assert any(shapes[name][axis] >= 8 for axis in role.axes)
    for name, role in roles.items():
        if role is None:
            assert not re.search(r"\.experts\.|\.gate\.weight|\.router\.|e_score", name), name


def test_description(model):
    shape = describe(model)
    assert (shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k) == (32, 16, 8, 2)
    assert shape.dtype == "float32"


def test_companions_and_renaming():
    row = family("deepseek_v3")
    role = tensor_role(row, "model.layers.7.mlp.experts.12.up_proj.weight_scale_inv")
    assert (role.kind, role.layer, role.expert) == ("expert", 7, 12)
    assert renamed("model.layers.7.mlp.experts.12.up_proj.weight", 3) == "model.layers.7.mlp.experts.3.up_proj.weight"
    for name in ("mlp.shared_experts.up_proj.weight", "self_attn.o_proj.weight"):
        assert tensor_role(row, f"model.layers.0.{name}") is None
    assert tensor_role(row, "model.layers.0.mlp.up_proj.weight").kind == "unknown", "dense, or stacked without a word"
    assert tensor_role(family("gpt_oss"), "model.layers.3.mlp.experts.gate_up_proj_blocks").kind == "stacked"
    for tower in ("vision_tower.encoder", "model.visual", "audio_tower"):
        assert tensor_role(row, f"{tower}.layers.7.mlp.gate.weight") is None
    assert tensor_role(row, "model.layers.7.mlp.vision_gate.weight").kind == "unknown"
    assert tensor_role(family("gemma4_text"), "model.layers.2.self_attn.q_proj.weight") is None
    assert (
        tensor_role(family("kimi_k2"), "language_model.model.layers.2.mlp.experts.3.up_proj.weight_packed").expert == 3
    )
    name = "language_model.model.layers.1.feed_forward.experts.down_proj"
    assert tensor_role(family("llama4"), name).kind == "stacked"
    apart = tensor_role(family("llama4"), "language_model.model.layers.1.feed_forward.experts.5.down_proj.weight")
    assert (apart.kind, apart.expert) == ("expert", 5)
    assert tensor_role(family("qwen3_moe"), "model.layers.1.mlp.experts.down_proj").kind == "stacked"


def test_latent_experts():
    latent = tiny("nemotron_h", moe_latent_size=24)
    layer = find_moe_layers(latent)[0]
    assert (layer.hidden_size, layer.width, layer.intermediate_size) == (32, 24, 16)
    assert describe(latent).hidden_size == 24


def test_the_page_names_every_family():
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    assert [name for name in FAMILIES if f"`{name}`" not in page] == []


def test_groups_left_out_of_a_config_are_those_of_the_library():
    from transformers import AutoConfig

    for row in FAMILIES.values():
        if row.group_defaults is not None and row.model_type not in MISSING:
            config = AutoConfig.for_model(row.model_type)
            assert (config.n_group or 1, config.topk_group or 1) == row.group_defaults, row.model_type


def test_the_pinned_transformers_has_every_family(monkeypatch):
    import transformers
    from packaging.version import Version

    pins = (Path(__file__).parents[1] / "constraints.txt").read_text()
    pinned = Version(re.search(r"^transformers==(.*)$", pins, re.MULTILINE)[1])
    assert not MISSING or Version(transformers.__version__) < pinned
    monkeypatch.setitem(FAMILIES, "not_yet_moe", replace(FAMILIES["mixtral"], model_type="not_yet_moe"))
    with pytest.raises(InputError, match=r"transformers: got [\d.]+; one that has not_yet_moe is needed"):
        tiny("not_yet_moe")


def test_numbers_listed_layer_by_layer():
    assert find_moe_layers(tiny("hunyuan_v1_moe", moe_topk=[2, 2, 2]))[0].top_k == 2
    with pytest.raises(InputError, match=r"config\.moe_topk: got \[2, 1, 2\]; the same in every MoE layer"):
        tiny("hunyuan_v1_moe", moe_topk=[2, 1, 2])


@pytest.mark.parametrize("version", ["4.57.1", "5.12.0", "5.20.2.dev0"])
def test_routers_of_an_older_transformers_are_not_read(monkeypatch, version):
    model = tiny("mixtral")
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(InputError, match=f"transformers: {re.escape(version)} is older than 5.21; .* needs it; pip"):
        find_moe_layers(model)


def test_models_that_cannot_be_used():
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(InputError, match=r"llama.*has none"):
        find_moe_layers(AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=32, **sizes)))
    with pytest.raises(InputError, match="all layers of this one are dense"):
        find_moe_layers(tiny("qwen3_moe", mlp_only_layers=[0, 1, 2]))
    with pytest.raises(InputError, match="transformers model"):
        find_moe_layers(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"zaya.*known MoE families:.* deepseek_v2.*qwen3_moe"):
        tiny("zaya")
    unknown = tiny("mixtral")
    unknown.config.model_type = "somebodys_moe"
    with pytest.raises(InputError, match=r"somebodys_moe.*mixtral"):
        find_moe_layers(unknown)
    unstacked = tiny("mixtral", num_layers=1)
    unstacked.model.layers[0].mlp.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(8))
    with pytest.raises(InputError, match="stacked in one tensor"):
        find_moe_layers(unstacked)


class Wrapped(torch.nn.Module):
    """As PEFT puts an adapter around a module."""

    def __init__(self, module):
        super().__init__()
        self.base_layer = module

    def forward(self, *given):
        return self.base_layer(*given)


def test_experts_and_routers_with_adapters_are_known():
    network = tiny("qwen3_moe")
    plain = find_moe_layers(network)
    for layer in plain:
        layer.block.gate, layer.block.experts = Wrapped(layer.router), Wrapped(Wrapped(layer.experts))
    found = find_moe_layers(network)
    assert [layer.experts for layer in found] == [layer.experts for layer in plain]
    assert [(x.expert_bytes, x.router_tensors) for x in found] == [(x.expert_bytes, x.router_tensors) for x in plain]
    assert found[0].tensor("gate.weight") is plain[0].router.weight


def test_packed_experts_tell_their_own_size():
    network = tiny("gpt_oss")
    for layer in find_moe_layers(network):
        packed = torch.zeros(8, 32, 16 // 2, dtype=torch.uint8)  # two numbers of four bits in a byte
        layer.experts.down_proj = torch.nn.Parameter(packed, requires_grad=False)
        layer.experts.down_scales = torch.nn.Parameter(torch.zeros(8), requires_grad=False)
    layer = find_moe_layers(network)[0]
    assert (layer.intermediate_size, layer.expert_tensors["down_scales"]) == (16, 0)
    assert layer.expert_bytes == 4 * 32 * 32 + 32 * 8 + 4 * (2 * 16 + 32) + 4
    for name in ("gate_up_proj", "down_proj"):  # kernels that keep weights in objects of their own leave the biases
        delattr(layer.experts, name)
    with pytest.raises(InputError, match="stacked in one tensor"):
        describe(network)


def test_towers_with_experts_are_not_of_the_decoder():
    network = tiny("qwen3_moe")
    network.model.visual = torch.nn.Module()
    network.model.visual.layers = deepcopy(network.model.layers)
    assert [layer.layer_id for layer in find_moe_layers(network)] == [1, 2]


def test_a_config_that_says_other_numbers_than_the_network_has():
    network = tiny("qwen3_moe")
    for number in (4, 16):
        network.config.num_experts = number
        with pytest.raises(InputError, match=rf"\[8, 32, 32\].*\[{number}, \.\.\.\] are needed.*config\.num_experts"):
            find_moe_layers(network)


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        (lambda logits, weights, ids: (logits, weights[:, :1], ids[:, :1]), r"int64 \[4, 1\]"),
        (lambda logits, weights, ids: (ids, weights), r"float32 \[4, 2\]"),
        (lambda logits, weights, ids: (logits,), r"float32 \[4, 8\]"),
        (lambda logits, weights, ids: logits, r"float32 \[4, 8\]"),
        (lambda logits, weights, ids: ids, r"int64 \[4, 2\]"),
    ],
)
def test_routers_that_return_anything_else_are_refused(returned, shown):
    layer = find_moe_layers(tiny("qwen3_moe"))[0]
    logits, weights, ids = layer.router(torch.ones(4, 32))
    assert torch.equal(layer.chosen((logits, weights, ids)), ids)
    with pytest.raises(InputError, match=rf"mlp\.gate: got \w+ returned {shown} last; ids .* \[tokens, 2\]"):
        layer.chosen(returned(logits, weights, ids))


def test_networks_of_ones_own():
    network = tiny("qwen3_moe")
    network.config.model_type = "my_moe"
    with pytest.raises(InputError, match=r'my_moe; known MoE families.*FAMILIES\["its_type"\] = family\("mixtral"\)'):
        find_moe_layers(network)
    FAMILIES["my_moe"] = family("qwen3_moe")
    try:
        assert len(find_moe_layers(network)) == 2
        layer = network.model.layers[2]
        layer.mlp.router = layer.mlp.__dict__["_modules"].pop("gate")
        with pytest.raises(InputError, match=r"layers\.2\.mlp: got Qwen3MoeSparseMoeBlock; a router named 'gate'"):
            find_moe_layers(network)
    finally:
        del FAMILIES["my_moe"]


def test_networks_that_do_not_predict_a_next_token_have_no_class():
    from transformers import AutoConfig

    assert auto_class(AutoConfig.for_model("qwen2_audio")).__name__ == "AutoModelForMultimodalLM"
    with pytest.raises(InputError, match="model_type: got switch_transformers; a network that transformers knows"):
        auto_class(AutoConfig.for_model("switch_transformers"))

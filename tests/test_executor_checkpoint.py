"""Permuted checkpoints: the same network, in other slots, for every family; and what cannot be one is refused."""

import json
import shutil
import tracemalloc

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

# ruff: noqa: E402 (what follows needs torch)
from installed_families import INSTALLED
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig

from gemopt import InputError, Placement
from gemopt.executor import checkpoint
from gemopt.executor.checkpoint import expert_sizes, export_checkpoint, read_header
from gemopt.models import auto_class, find_moe_layers, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Sharded checkpoint of a tiny model of a family, its placement-shaped facts and its logits."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = tiny(name, num_layers=2 if name != "deepseek_v4" else 3)
            model.save_pretrained(folder, max_shard_size="40KB")
            layers = [layer.layer_id for layer in find_moe_layers(model)]
            made[name] = folder, layers, logits(folder)
        return made[name]

    return make


def loaded(folder):
    return auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder).eval()


def logits(folder):
    model = loaded(folder)
    with torch.no_grad():
        return model(torch.arange(3, 60).reshape(3, 19)).logits


def shuffled(layers, *, groups=8, ranks=2, seed=0, experts=8):
    """A random placement that keeps blocks of experts together."""
    rng = np.random.default_rng(seed)
    blocks = np.arange(experts).reshape(groups, -1)
    rows = [np.concatenate([rng.permutation(block) for block in rng.permutation(blocks)]) for _ in layers]
    return Placement(
        physical_to_logical=rows, slots_per_rank=[experts // ranks] * ranks, num_experts=experts, layer_ids=layers
    )


@pytest.mark.parametrize("name", INSTALLED)
def test_the_permuted_checkpoint_is_the_same_network(source, tmp_path, name):
    folder, layers, reference = source(name)
    original = loaded(folder)
    placement = shuffled(layers, groups=getattr(original.config.get_text_config(), "n_group", None) or 8)
    assert len(list(folder.glob("*.safetensors"))) > 1, "the case has several shards"
    result = export_checkpoint(placement, folder, tmp_path / "new")
    assert float((logits(result) - reference).abs().max() / reference.abs().max()) < 5e-6
    assert {f.name for f in result.iterdir()} == {f.name for f in folder.iterdir()} | {"gemopt_placement.json"}
    assert Placement.load(result / "gemopt_placement.json") == placement
    model = loaded(result)
    for row, new, old in zip(
        placement.physical_to_logical, find_moe_layers(model), find_moe_layers(original), strict=True
    ):
        for tensor in new.expert_tensors:  # the live model holds in slot j what held expert row[j]
            moved, kept = getattr(new.experts, tensor), getattr(old.experts, tensor)
            dim = new.expert_tensors[tensor]
            assert torch.equal(moved.index_select(dim, torch.arange(8)), kept.index_select(dim, torch.tensor(row)))
        for tensor, dim in new.router_tensors.items():
            moved, kept = new.tensor(tensor), old.tensor(tensor)
            assert torch.equal(moved.index_select(dim, torch.arange(8)), kept.index_select(dim, torch.tensor(row)))


def test_group_limited_routing_keeps_groups_together(source, tmp_path):
    folder, layers, reference = source("deepseek_v3")  # 4 groups of 2
    mixing = Placement(
        physical_to_logical=[[0, 2, 4, 6, 1, 3, 5, 7]], slots_per_rank=[4, 4], num_experts=8, layer_ids=layers
    )
    with pytest.raises(InputError, match=r"physical_to_logical\[layer 1\].*mix routing groups.*apply"):
        export_checkpoint(mixing, folder, tmp_path / "wrong")
    assert list(tmp_path.iterdir()) == []
    # whole groups on each rank, in any order of slots: the order is put right
    scattered = Placement(
        physical_to_logical=[[6, 0, 7, 1, 4, 2, 5, 3]], slots_per_rank=[4, 4], num_experts=8, layer_ids=layers
    )
    result = export_checkpoint(scattered, folder, tmp_path / "new")
    assert float((logits(result) - reference).abs().max() / reference.abs().max()) < 5e-6


def test_groups_that_span_ranks_and_blocks_that_cross_them(source, tmp_path):
    folder, layers, _ = source("deepseek_v3")
    config = json.loads((folder / "config.json").read_text()) | {"n_group": 2, "topk_group": 1}
    other = shutil.copytree(folder, tmp_path / "two groups")
    (other / "config.json").write_text(json.dumps(config))
    reference = logits(other)
    for ranks, row in ((4, [5, 7, 6, 4, 1, 0, 3, 2]), (1, [1, 4, 2, 5, 0, 6, 3, 7])):
        placement = Placement(
            physical_to_logical=[row], slots_per_rank=[8 // ranks] * ranks, num_experts=8, layer_ids=layers
        )
        result = export_checkpoint(placement, other, tmp_path / f"ranks{ranks}")
        assert float((logits(result) - reference).abs().max() / reference.abs().max()) < 5e-6


def test_only_one_piece_is_in_memory(tmp_path, monkeypatch):
    chunk = 1 << 20
    monkeypatch.setattr(checkpoint, "CHUNK", chunk)
    experts, rows = 4, chunk // 4
    names = {
        f"model.layers.0.mlp.experts.{e}.{p}_proj.weight": 0 for e in range(experts) for p in ("gate", "up", "down")
    }
    big = {name: np.full((rows,), i, dtype=np.float32) for i, name in enumerate(names)}
    big["model.layers.0.mlp.gate.weight"] = np.eye(experts, dtype=np.float32)
    (tmp_path / "in").mkdir()
    save_file(big, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text(
        json.dumps({"model_type": "qwen3_moe", "num_experts": experts, "num_hidden_layers": 1})
    )
    placement = Placement(physical_to_logical=[[2, 0, 3, 1]], slots_per_rank=[2, 2], num_experts=experts)
    rewrite, peaks = checkpoint._rewrite, []

    def watched(*args):
        tracemalloc.start()
        rewrite(*args)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    monkeypatch.setattr(checkpoint, "_rewrite", watched)
    result = export_checkpoint(placement, tmp_path / "in", tmp_path / "out")
    (peak,) = peaks
    assert peak < 3 * chunk < sum(a.nbytes for a in big.values())
    moved = load_file(result / "model.safetensors")
    for slot, expert in enumerate([2, 0, 3, 1]):
        name = "model.layers.0.mlp.experts.{}.up_proj.weight"
        assert (moved[name.format(slot)] == big[name.format(expert)]).all()
    assert (moved["model.layers.0.mlp.gate.weight"] == np.eye(4)[[2, 0, 3, 1]]).all()


def test_quantised_tensors_pass_through_with_their_companions(tmp_path):
    """Names as FP8 and MXFP4 checkpoints have them; dtypes that numpy does not know."""
    folder = tmp_path / "in"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = {"model.layers.1.mlp.gate.weight": torch.randn(4, 6, generator=generator).bfloat16()}
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"] = torch.randn(4, generator=generator)
    for expert in range(4):
        prefix = f"model.layers.1.mlp.experts.{expert}.down_proj."
        tensors[prefix + "weight"] = torch.randn(6, 8, generator=generator).to(torch.float8_e4m3fn)
        tensors[prefix + "weight_scale_inv"] = torch.randn(1, 1, generator=generator)
    tensors["model.layers.2.mlp.experts.3.down_proj.weight"] = torch.ones(1)  # a prediction layer: not in the placement
    save_torch(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ignored = ["lm_head", "model.layers.1.mlp.experts.0.down_proj", "model.layers.2.mlp.experts.0.down_proj"]
    config = {"model_type": "deepseek_v3", "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"ignore": ignored}}))
    (folder / "pytorch_model.bin").write_bytes(b"old")
    (folder / "tokenizer.json").write_text("{}")
    placement = Placement(physical_to_logical=[[3, 1, 0, 2]], slots_per_rank=[2, 2], num_experts=4, layer_ids=[1])
    result = export_checkpoint(placement, folder, tmp_path / "out")
    new = load_torch(result / "model.safetensors")
    assert torch.equal(new["model.layers.1.mlp.gate.weight"], tensors["model.layers.1.mlp.gate.weight"][[3, 1, 0, 2]])
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(new[bias], tensors[bias][[3, 1, 0, 2]])
    for slot, expert in enumerate([3, 1, 0, 2]):
        for part in ("weight", "weight_scale_inv"):
            name = f"model.layers.1.mlp.experts.{{}}.down_proj.{part}"
            assert torch.equal(new[name.format(slot)].view(torch.uint8), tensors[name.format(expert)].view(torch.uint8))
    assert "model.layers.2.mlp.experts.3.down_proj.weight" in new
    told = json.loads((result / "config.json").read_text())["quantization_config"]["ignore"]
    assert told == ["lm_head", "model.layers.1.mlp.experts.2.down_proj", "model.layers.2.mlp.experts.0.down_proj"]
    assert not (result / "pytorch_model.bin").exists() and (result / "tokenizer.json").exists()
    with safe_open(result / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def copies(layers):
    return Placement(
        physical_to_logical=[[0, 1, 2, 3, 4, 5, 6, 7, 0, 1]] * len(layers),
        slots_per_rank=[5, 5],
        num_experts=8,
        layer_ids=layers,
    )


def unequal(layers):
    return Placement(
        physical_to_logical=[list(range(8))] * len(layers), slots_per_rank=[5, 3], num_experts=8, layer_ids=layers
    )


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        (copies, "every expert once.*gemopt apply"),
        (unequal, "equally many"),
        (lambda layers: Placement.contiguous(len(layers), 6, 2, layer_ids=layers), "the checkpoint has 8 experts"),
        (lambda layers: Placement.contiguous(1, 8, 2, layer_ids=[5]), "decoder layers"),
        (lambda layers: Placement.contiguous(1, 8, 2, layer_ids=[0]), "layer 0: got no router"),
        (lambda layers: Placement.contiguous(1, 8, 2, layer_ids=[1], num_hidden_layers=48), "48 decoder layers; the"),
    ],
)
def test_what_cannot_be_a_checkpoint_is_refused(source, tmp_path, placement, words):
    folder, layers, _ = source("qwen3_moe")
    with pytest.raises(InputError, match=words):
        export_checkpoint(placement(layers), folder, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_bad_files_are_refused_and_leave_nothing(source, tmp_path):
    folder, layers, _ = source("mixtral")
    placement = shuffled(layers)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    cases = {"taken": (folder, "exists already")}
    for name, damage, words in (
        ("cut", lambda f: f.write_bytes(f.read_bytes()[:-5]), "without gaps"),
        ("empty", lambda f: f.write_bytes(b""), "complete safetensors"),
        ("garbage", lambda f: f.write_bytes(b"\\xff" * 64), "complete safetensors"),
        ("gone", lambda f: f.unlink(), "every file that the index names"),
    ):
        bad = shutil.copytree(folder, tmp_path / f"in {name}")
        damage(sorted(bad.glob("*.safetensors"))[1])
        cases[f"out {name}"] = (bad, words)
    unknown = shutil.copytree(folder, tmp_path / "in unknown")
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    cases["out unknown"] = (unknown, "known MoE families")
    cases["out nothing"] = (tmp_path / "nowhere", "config.json")
    before = {path.name for path in tmp_path.iterdir()}
    for target, (start, words) in cases.items():
        with pytest.raises(InputError, match=words):
            export_checkpoint(placement, start, tmp_path / target)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_failure_half_way_leaves_nothing(source, tmp_path, monkeypatch):
    folder, layers, _ = source("mixtral")
    rewrite, calls = checkpoint._rewrite, []

    def full(*args):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        rewrite(*args)

    monkeypatch.setattr(checkpoint, "_rewrite", full)
    with pytest.raises(InputError, match=r"No space left.*nothing was left"):
        export_checkpoint(shuffled(layers), folder, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_headers_read_as_the_library_reads_them(source):
    folder, _, _ = source("gpt_oss")
    for file in folder.glob("*.safetensors"):
        tensors, metadata, _ = read_header(file)
        with safe_open(file, framework="np") as theirs:
            assert sorted(t.name for t in tensors) == sorted(theirs.keys())
            assert metadata == theirs.metadata()


def test_layers_and_files_are_not_forgotten(source, tmp_path):
    folder, layers, _ = source("mixtral")
    with pytest.raises(InputError, match=r"got 1; every MoE layer: the checkpoint has experts in 0 too"):
        export_checkpoint(shuffled(layers[1:]), folder, tmp_path / "new")
    shutil.copytree(folder, tmp_path / "more")
    save_file({"mtp.weight": np.zeros(3)}, tmp_path / "more" / "mtp.safetensors")
    assert checkpoint.unnamed_weights(tmp_path / "more") == ["mtp.safetensors"]
    assert not (export_checkpoint(shuffled(layers), tmp_path / "more", tmp_path / "new") / "mtp.safetensors").exists()


def test_groups_of_a_config_are_kept_whatever_the_method(source, tmp_path):
    folder, layers, _ = source("deepseek_v2")
    shutil.copytree(folder, tmp_path / "more")
    config = json.loads((folder / "config.json").read_text())
    config |= {"topk_method": "noaux_tc", "n_group": 4, "topk_group": 2, "text_config": None}
    (tmp_path / "more" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="mix routing groups"):
        export_checkpoint(shuffled(layers), tmp_path / "more", tmp_path / "new")


@pytest.mark.parametrize("key", ["text_config", "llm_config", "language_config"])
def test_the_text_part_of_a_network_that_sees_is_found_by_its_publishers_word(tmp_path, key):
    model = tiny("qwen3_moe")
    model.save_pretrained(tmp_path / "text")
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    tensors = load_file(tmp_path / "text" / "model.safetensors")
    (tmp_path / "whole").mkdir()
    whole = {"model_type": "internvl_chat", key: config, "vision_config": {"num_hidden_layers": 9, "num_experts": 4}}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(whole))
    save_file({f"language_model.{k}": v for k, v in tensors.items()}, tmp_path / "whole" / "model.safetensors")
    placement = shuffled([1, 2])
    assert expert_sizes(tmp_path / "whole", placement) == [4 * 3 * 32 * 16] * 2
    apart = load_file(export_checkpoint(placement, tmp_path / "text", tmp_path / "a") / "model.safetensors")
    together = load_file(export_checkpoint(placement, tmp_path / "whole", tmp_path / "b") / "model.safetensors")
    assert {k.removeprefix("language_model."): v.tobytes() for k, v in together.items()} == {
        k: v.tobytes() for k, v in apart.items()
    }

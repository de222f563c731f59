"""Every export is loaded, and every recording written, by the engine's own published code."""

from __future__ import annotations

import ast
import base64
import importlib.metadata
import importlib.util
import io
import json
import logging
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from engine_modules import load, stub

torch = pytest.importorskip("torch")

from gemopt.exceptions import InputError  # noqa: E402
from gemopt.formats.engines import deepseek_eplb, vllm_plugin  # noqa: E402
from gemopt.formats.importing import import_traces  # noqa: E402
from gemopt.formats.registry import export  # noqa: E402
from gemopt.placement import Placement  # noqa: E402
from gemopt.traces import Traces  # noqa: E402

pytestmark = pytest.mark.engines


# vllm-ascend


@pytest.fixture
def ascend(monkeypatch, engine_files):
    stub(monkeypatch, "vllm.logger", logger=logging.getLogger("vllm"))
    stub(monkeypatch, "vllm.model_executor.layers.fused_moe.expert_map_manager", determine_expert_map=None)
    monkeypatch.setattr(torch.Tensor, "npu", lambda self: self, raising=False)
    root = engine_files("vllm-ascend")
    return load(monkeypatch, "vllm_ascend.eplb.core.eplb_utils", root / "vllm_ascend/eplb/core/eplb_utils.py")


def test_vllm_ascend_loads_the_map(ascend, placement, tmp_path):
    if placement.num_ranks == 1:
        return  # vllm-ascend reads no map for one rank
    command = export(placement, to="vllm-ascend", path=tmp_path / "map.json").command
    config = json.loads(command.split("--additional-config '")[1].rstrip("'"))["eplb_config"]
    width = placement.num_slots // placement.num_ranks
    for layer, row in enumerate(placement.physical_to_logical):
        for rank in {0, placement.num_ranks - 1}:
            eplb = SimpleNamespace(
                expert_map_path=config["expert_map_path"],
                dynamic_eplb=False,
                num_redundant_experts=config["num_redundant_experts"],
            )
            moe = SimpleNamespace(num_experts=placement.num_experts, ep_size=placement.num_ranks, ep_rank=rank)
            maps, local, log2phy, redundant = ascend.init_eplb_config(eplb, layer, moe)
            assert redundant == config["num_redundant_experts"] == placement.num_slots - placement.num_experts
            held = row[rank * width : (rank + 1) * width]
            assert local.numpy()[held].tolist() == list(range(width))
            assert (maps >= 0).sum() == placement.num_slots
            assert (row[log2phy.numpy()] == np.arange(placement.num_experts)).all()
    # One layer more is a draft layer: default placement, same number of slots. Beyond that the file is wrong.
    rows, slots = ascend.expert_file_to_tensor(config["expert_map_path"], placement.num_layers)
    assert rows is None
    assert slots == placement.num_slots
    with pytest.raises(ValueError, match="Invalid EPLB Table"):
        ascend.expert_file_to_tensor(config["expert_map_path"], placement.num_layers + 1)


@pytest.fixture
def lmdeploy(monkeypatch, engine_files):
    names = ("experts_statistic_file", "num_groups", "num_redundant_experts", "ranks_per_node")
    stub(monkeypatch, "lmdeploy.pytorch.envs", **{f"eplb_{name}": None for name in names})
    return load(monkeypatch, "lmdeploy.pytorch.nn.eplb", engine_files("lmdeploy") / "lmdeploy/pytorch/nn/eplb.py")


def test_lmdeploy_packs_our_loads_into_the_placement(lmdeploy, placement, tmp_path):
    if placement.has_copies or placement.num_slots == placement.num_ranks:
        with pytest.raises(InputError):
            export(placement, to="lmdeploy", path=tmp_path / "loads.json")
        return
    command = export(placement, to="lmdeploy", path=tmp_path / "loads.json").command
    variables = dict(word.split("=") for word in command.split() if word.startswith("LMDEPLOY_"))
    lmdeploy.eplb_experts_statistic_file = variables["LMDEPLOY_EPLB_EXPERTS_STATISTIC_FILE"]
    for name in ("NUM_GROUPS", "NUM_REDUNDANT_EXPERTS", "RANKS_PER_NODE"):
        setattr(lmdeploy, f"eplb_{name.lower()}", int(variables[f"LMDEPLOY_EPLB_{name}"]))
    made = lmdeploy.EPLBMetadata.init(placement.num_ranks, placement.num_experts, placement.num_hidden_layers)
    assert (made.physical_to_logical_map.numpy()[placement.layer_ids] == placement.physical_to_logical).all()


@pytest.mark.parametrize("experts,ranks", [(256, 8), (256, 64), (384, 32), (160, 16)])
def test_lmdeploy_at_full_size(lmdeploy, make_placement, tmp_path, experts, ranks):
    placement = make_placement(layers=2, experts=experts, ranks=ranks)
    export(placement, to="lmdeploy", path=tmp_path / "loads.json")
    loads = torch.tensor(json.loads((tmp_path / "loads.json").read_text()), dtype=torch.float32)
    phy2log, _, _ = lmdeploy.rebalance_experts(loads, experts, 1, 1, ranks)
    assert (phy2log.numpy() == placement.physical_to_logical).all()


def test_eplb_tensors_are_those_of_the_algorithm(lmdeploy):
    """LMDeploy carries DeepSeek's algorithm; its three tables for a map are ours."""
    loads = torch.tensor(np.random.default_rng(3).integers(1, 1000, (3, 16)))
    phy2log, log2phy, logcnt = lmdeploy.rebalance_experts(loads, 20, 1, 1, 4)
    placement = Placement(physical_to_logical=phy2log.numpy(), slots_per_rank=[5] * 4, num_experts=16)
    ours = deepseek_eplb.tensors(placement)
    assert (ours["logcnt"] == logcnt.numpy()).all()
    assert ours["log2phy"].shape == log2phy.shape
    assert (np.sort(ours["log2phy"]) == np.sort(log2phy.numpy())).all()


# vLLM


@pytest.fixture
def vllm(monkeypatch, engine_files):
    """Its plugin loader, policy registry and `compute_logical_maps`, and our entry point as pip would install it."""
    from typing import Literal

    root = engine_files("vllm")
    stub(monkeypatch, "vllm.envs", VLLM_PLUGINS=None)
    stub(monkeypatch, "vllm.config.parallel", EPLBPolicyOption=Literal["default"])
    policy = root / "vllm/distributed/eplb/policy"
    load(monkeypatch, "vllm.distributed.eplb.policy.abstract", policy / "abstract.py")
    load(monkeypatch, "vllm.distributed.eplb.policy.default", policy / "default.py")
    policies = load(monkeypatch, "vllm.distributed.eplb.policy", policy / "__init__.py")
    plugins = load(monkeypatch, "vllm.plugins", root / "vllm/plugins/__init__.py")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    group = plugins.DEFAULT_PLUGINS_GROUP
    points = [importlib.metadata.EntryPoint(n, v, group) for n, v in project["entry-points"][group].items()]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    maps = function(root / "vllm/distributed/eplb/eplb_state.py", "compute_logical_maps", torch=torch)
    return SimpleNamespace(policies=policies, plugins=plugins, compute_logical_maps=maps)


def function(path: Path, name: str, **scope):
    """One function of a file whose imports we do not have."""
    tree = ast.parse(path.read_text())
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    exec(compile(ast.Module([found], []), path.name, "exec"), scope)
    return scope[name]


def test_vllm_serves_the_placement(vllm, placement, tmp_path, monkeypatch):
    command = export(placement, to="vllm", path=tmp_path / "placement.json").command
    monkeypatch.setenv("GEMOPT_PLACEMENT", command.split()[0].removeprefix("GEMOPT_PLACEMENT="))
    vllm.plugins.load_general_plugins()
    policy = vllm.policies.EPLB_POLICIES["default"]
    assert issubclass(policy, vllm.policies.AbstractEplbPolicy)
    loads = torch.rand(placement.num_layers, placement.num_experts)
    old = torch.arange(placement.num_slots).repeat(placement.num_layers, 1) % placement.num_experts
    made = policy.rebalance_experts(loads, placement.num_slots, 1, 1, placement.num_ranks, old)
    assert made.device.type == "cpu"
    assert made.dtype == torch.int64
    assert (made.numpy() == placement.physical_to_logical).all()
    made[:] = 0  # vLLM owns what it is given
    again = policy.rebalance_experts(loads, placement.num_slots, 1, 1, placement.num_ranks, old)
    assert (again.numpy() == placement.physical_to_logical).all()
    log2phy, copies = vllm.compute_logical_maps(again, placement.num_experts)
    assert (copies.numpy() == placement.copies()).all()
    assert (deepseek_eplb.tensors(placement)["log2phy"] == log2phy.numpy()).all()


def test_vllm_plugin_is_inert_without_its_variable(vllm, monkeypatch):
    monkeypatch.delenv("GEMOPT_PLACEMENT", raising=False)
    vllm.plugins.load_general_plugins()
    assert vllm.policies.EPLB_POLICIES["default"] is vllm.policies.DefaultEplbPolicy


def test_vllm_with_other_sizes_stops(vllm, make_placement, tmp_path, monkeypatch):
    placement = make_placement(layers=3, experts=8, ranks=2, slots=5)
    export(placement, to="vllm", path=tmp_path / "placement.json")
    monkeypatch.setenv("GEMOPT_PLACEMENT", str(tmp_path / "placement.json"))
    vllm_plugin.register()
    policy = vllm.policies.EPLB_POLICIES["default"]
    old = torch.arange(10).repeat(3, 1) % 8
    for layers, experts, slots, ranks in [(4, 8, 10, 2), (3, 16, 10, 2), (3, 8, 12, 2), (3, 8, 10, 5)]:
        with pytest.raises(InputError, match=r"placement\.json"):
            policy.rebalance_experts(torch.ones(layers, experts), slots, 1, 1, ranks, old)
    # A draft network has fewer layers; its experts stay where they are.
    assert policy.rebalance_experts(torch.ones(1, 8), 10, 1, 1, 2, old[:1]).tolist() == old[:1].tolist()


def test_vllm_response_to_traces(engine_files, tmp_path):
    encode = function(
        engine_files("vllm") / "vllm/utils/serial_utils.py",
        "numpy2base64",
        np=np,
        io=io,
        pybase64=SimpleNamespace(b64encode=base64.b64encode),
    )
    rng = np.random.default_rng(0)
    ids = np.zeros((9, 3, 2), np.uint8)  # the first layer is dense
    ids[:, 1:] = rng.permuted(np.tile(np.arange(8, dtype=np.uint8), (9, 2, 1)), axis=2)[:, :, :2]
    response = {"choices": [{"routed_experts": encode(ids)}], "usage": {"prompt_tokens": 4, "completion_tokens": 6}}
    (tmp_path / "r.json").write_text(json.dumps(response))
    import_traces([tmp_path / "r.json"], source="vllm", destination=tmp_path / "t.safetensors")
    traces = Traces.load(tmp_path / "t.safetensors")
    assert traces.layer_ids == (1, 2)
    assert (traces.tokens.ids == ids[4:, 1:]).all()

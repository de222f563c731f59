"""Every export is loaded, and every recording written, by the engine's own published code."""

from __future__ import annotations

import ast
import base64
import importlib.metadata
import importlib.util
import io
import json
import logging
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gemopt.exceptions import InputError  # noqa: E402
from gemopt.formats import deepseek_eplb, vllm_plugin  # noqa: E402
from gemopt.formats.engine import TraceOptions  # noqa: E402
from gemopt.formats.importing import import_traces  # noqa: E402
from gemopt.formats.registry import export  # noqa: E402
from gemopt.placement import Placement, Split  # noqa: E402
from gemopt.traces import Traces  # noqa: E402

pytestmark = pytest.mark.engines

# layers, first dense layers, experts, ranks, slots per rank
SHAPES = [(2, 0, 8, 1, 8), (3, 1, 16, 4, 4), (4, 2, 16, 4, 5), (2, 3, 60, 6, 11), (2, 1, 64, 64, 2), (1, 0, 8, 8, 1)]


def stub(monkeypatch, name: str, **attributes) -> ModuleType:
    """A module that has what is given, and makes up the rest."""
    module = ModuleType(name)
    module.__path__ = []
    module.__getattr__ = lambda key: MagicMock() if not key.startswith("__") else _missing(key)
    vars(module).update(attributes)
    _register(monkeypatch, name, module)
    return module


def _register(monkeypatch, name: str, module: ModuleType) -> None:
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, last = name.rpartition(".")
    if parent and parent not in sys.modules:
        stub(monkeypatch, parent)
    if parent:
        monkeypatch.setattr(sys.modules[parent], last, module, raising=False)


def _missing(key: str):
    raise AttributeError(key)


def load(monkeypatch, name: str, path: Path) -> ModuleType:
    """The file `path` as the module `name`; its parents are empty packages."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    _register(monkeypatch, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=SHAPES, ids=str)
def placement(request, make_placement):
    layers, dense, experts, ranks, slots = request.param
    return make_placement(
        layers=layers,
        experts=experts,
        ranks=ranks,
        slots=slots,
        layer_ids=list(range(dense, dense + layers)),
        num_hidden_layers=dense + layers,
    )


# SGLang


@pytest.fixture
def sglang(monkeypatch, engine_files):
    """Its expert_location module, told what the command line would say."""
    root = engine_files("sglang")
    moe = SimpleNamespace(
        init_expert_location="trivial",
        ep_num_redundant_experts=0,
        ep_join_mode=None,
        eplb_algorithm="auto",
        ep_dispatch_algorithm="static",
        moe_a2a_backend="deepep",
    )
    parallel = SimpleNamespace(ep_size=1, nnodes=1, tp_size=1, elastic_ep_initial_size=None, ep_join_rank_offset=0)
    shape = SimpleNamespace(num_layers=0, num_logical_experts=0, num_groups=None)
    network = SimpleNamespace(get_model_config_for_expert_location=lambda config: shape)
    stub(
        monkeypatch,
        "sglang.srt.runtime_context",
        get_exec=lambda: SimpleNamespace(moe=moe, overlap=SimpleNamespace(enable_two_batch_overlap=False)),
        get_parallel=lambda: parallel,
        get_device=lambda: SimpleNamespace(device="cpu"),
        get_schedule=lambda: SimpleNamespace(chunked_prefill_size=32),
        get_platform=lambda: SimpleNamespace(is_hip=False),
        reports_expert_balancedness=lambda: False,
    )
    stub(monkeypatch, "sglang.srt.model_loader", get_model_architecture=lambda config: (network, None))
    stub(monkeypatch, "sglang.srt.elastic_ep.elastic_ep", elastic_expanded_world_enabled=lambda: False)
    module = load(monkeypatch, "sglang.srt.eplb.expert_location", root / "sglang/srt/eplb/expert_location.py")
    return SimpleNamespace(root=root, module=module, moe=moe, parallel=parallel, shape=shape)


def run_sglang(sglang, placement: Placement, path: Path, rank: int):
    words = (command := export(placement, to="sglang", path=path).command).split()

    def option(name: str) -> str:
        return words[words.index(name) + 1]

    sglang.moe.init_expert_location = option("--init-expert-location")
    sglang.moe.ep_num_redundant_experts = int(option("--ep-num-redundant-experts"))
    sglang.moe.ep_dispatch_algorithm = option("--ep-dispatch-algorithm") if "dispatch" in command else "static"
    sglang.moe.moe_a2a_backend = option("--moe-a2a-backend")
    sglang.parallel.ep_size = sglang.parallel.tp_size = int(option("--ep"))
    sglang.shape.num_layers = placement.num_hidden_layers
    sglang.shape.num_logical_experts = placement.num_experts
    config = SimpleNamespace(hf_config=None)
    return sglang.module.compute_initial_expert_location_metadata(config, rank)


@pytest.mark.parametrize("suffix", [".json", ".pt"])
@pytest.mark.parametrize("split", [Split.EVEN, Split.NEAREST])
def test_sglang_loads_the_map(sglang, placement, tmp_path, suffix, split):
    placement = Placement(**{**dict(placement), "split": split})
    rank = placement.num_ranks - 1
    metadata = run_sglang(sglang, placement, tmp_path / f"map{suffix}", rank)
    rows = metadata.physical_to_logical_map.numpy()
    assert rows.shape == (placement.num_hidden_layers, placement.num_slots)
    assert (rows[placement.layer_ids] == placement.physical_to_logical).all()
    assert metadata.ep_size == placement.num_ranks
    # A rank that holds a copy uses its own; the others know all copies.
    local = range(rank * (placement.num_slots // placement.num_ranks), placement.num_slots)
    for layer, row in zip(placement.layer_ids, placement.physical_to_logical, strict=True):
        for expert in range(placement.num_experts):
            slots = np.flatnonzero(row == expert).tolist()
            mine = [slot for slot in slots if slot in local]
            assert metadata.logical_to_all_physical(layer, expert) == (mine or slots)
    if not (split is Split.NEAREST or not placement.has_copies):
        assert metadata.logical_to_rank_dispatch_physical_map is None
        return
    # Static dispatch of a rank keeps what it holds itself.
    mine = metadata.logical_to_rank_dispatch_physical_map.numpy()
    width = placement.num_slots // placement.num_ranks
    for layer, row in zip(placement.layer_ids, placement.physical_to_logical, strict=True):
        for slot in range(rank * width, (rank + 1) * width):
            assert mine[layer, row[slot]] == slot


def test_sglang_refuses_a_second_key(sglang, make_placement, tmp_path):
    placement = make_placement()
    export(placement, to="sglang", path=tmp_path / "map.json")
    text = json.loads((tmp_path / "map.json").read_text())
    (tmp_path / "bad.json").write_text(json.dumps({**text, "model": "x"}))
    sglang.moe.init_expert_location = str(tmp_path / "bad.json")
    with pytest.raises(TypeError):
        sglang.module.compute_initial_expert_location_metadata(SimpleNamespace(hf_config=None), 0)


@pytest.fixture
def recorder(sglang, monkeypatch, tmp_path):
    """SGLang's recorder for one rank, dumping into a folder; all-reduce sums over the ranks' recorders."""
    folder = tmp_path / "dumps"
    clock = iter(range(1000, 2000))
    stub(
        monkeypatch,
        "sglang.srt.environ",
        envs=SimpleNamespace(SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR=SimpleNamespace(get=lambda: str(folder))),
    )
    stub(monkeypatch, "sglang.srt.model_executor.forward_batch_info", ForwardBatch=object, ForwardMode=object)
    stub(monkeypatch, "sglang.srt.observability.metrics_collector")
    stub(monkeypatch, "einops")
    stub(monkeypatch, "sglang.srt.utils", Withable=_withable(), get_device=lambda: "cpu")
    runtime = sys.modules["sglang.srt.runtime_context"]
    runtime.get_device = lambda: SimpleNamespace(device="cpu")
    path = sglang.root / "sglang/srt/eplb/expert_distribution.py"
    module = load(monkeypatch, "sglang.srt.eplb.expert_distribution", path)
    monkeypatch.setattr(module, "get_device_namespace", lambda: SimpleNamespace(device="cpu"))
    monkeypatch.setattr(module.time, "time", lambda: float(next(clock)))
    monkeypatch.setattr(module, "should_record_forward_pass", lambda batch: True)
    monkeypatch.setattr(module, "megamoe_prefill_only_recorder_enabled", lambda: False)
    monkeypatch.setattr(torch, "get_device_module", MagicMock)
    sglang.moe.expert_distribution_recorder_buffer_size = 6
    sglang.moe.eplb_min_rebalancing_utilization_threshold = 1.0
    sglang.moe.deepep_mode = "normal"
    sglang.moe.moe_a2a_backend = "none"
    return SimpleNamespace(module=module, folder=folder, moe=sglang.moe, monkeypatch=monkeypatch)


def _withable():
    class Withable:
        def __init__(self):
            self.value = None

        def with_value(self, value):
            outer = self

            class Scope:
                def __enter__(self):
                    outer.value = value

                def __exit__(self, *_):
                    outer.value = None

            return Scope()

    return Withable


def record(recorder, placement, mode: str, passes: int, buffer: int = 6):
    """Route random tokens through SGLang's recorder on every rank; returns the true logical counts [T, L, E]."""
    rng = np.random.default_rng(7)
    recorder.moe.expert_distribution_recorder_mode = mode
    recorder.moe.expert_distribution_recorder_buffer_size = buffer
    hidden = placement.num_hidden_layers
    table = np.tile(np.arange(placement.num_slots) % placement.num_experts, (hidden, 1))
    table[placement.layer_ids] = placement.physical_to_logical
    metadata = SimpleNamespace(
        num_layers=hidden,
        num_physical_experts=placement.num_slots,
        num_logical_experts=placement.num_experts,
        num_local_physical_experts=placement.num_slots // placement.num_ranks,
        physical_to_logical_map=torch.from_numpy(table),
    )
    ranks = [recorder.module._ExpertDistributionRecorderReal(metadata, r) for r in range(placement.num_ranks)]
    truth = np.zeros((passes, hidden, placement.num_experts), np.int64)
    for one in ranks:
        one.start_record()
    for step in range(passes):
        for rank, one in enumerate(ranks):
            tokens = int(rng.integers(1, 9))
            batch = SimpleNamespace(
                input_ids=torch.arange(tokens) + 100 * rank,
                positions=torch.arange(tokens),
                extend_seq_lens_cpu=None,
                forward_mode=SimpleNamespace(value=2 if step else 1),
            )
            with one.with_forward_pass(step + 5, batch):
                for layer, row in zip(placement.layer_ids, placement.physical_to_logical, strict=True):
                    slots = np.array([_distinct(rng, row) for _ in range(tokens)])
                    np.add.at(truth[step, layer], row[slots], 1)
                    with one.with_current_layer(layer):
                        one.on_select_experts(topk_ids=torch.from_numpy(slots).int())
    totals = []
    recorder.monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op=None: totals.append(tensor))
    for one in reversed(ranks):
        if mode == "stat" and one is ranks[0]:
            recorder.monkeypatch.setattr(
                torch.distributed, "all_reduce", lambda tensor, op=None: [tensor.add_(t) for t in totals]
            )
        one.dump_record()
    return truth[:, placement.layer_ids]


def _distinct(rng, row, top_k=2):
    """Slots of `top_k` different experts."""
    experts = rng.choice(np.unique(row), top_k, replace=False)
    return [rng.choice(np.flatnonzero(row == expert)) for expert in experts]


@pytest.mark.parametrize("mode", ["stat", "per_pass", "per_token"])
@pytest.mark.parametrize("ranks,slots", [(1, 8), (4, 3)])
def test_sglang_recorder_to_traces(recorder, make_placement, tmp_path, mode, ranks, slots):
    placement = make_placement(layers=3, experts=8, ranks=ranks, slots=slots, layer_ids=[2, 3, 4], num_hidden_layers=5)
    truth = record(recorder, placement, mode, passes=4)
    found = import_traces([recorder.folder], source="sglang", destination=tmp_path / "t.safetensors")
    traces = Traces.load(tmp_path / "t.safetensors")
    assert (traces.counts == truth).all()
    assert traces.layer_ids == (2, 3, 4)
    assert traces.num_hidden_layers == 5
    assert found.assignments == truth.sum()
    if mode == "per_token":
        assert traces.phase.tolist() == [0, 1, 1, 1]


def test_sglang_ring_buffer_after_a_second_recording(recorder, make_placement, tmp_path):
    placement = make_placement(layers=2, experts=8, ranks=1, slots=8)
    recorder.moe.expert_distribution_recorder_mode = "stat"
    original = recorder.module._CircularBuffer.__init__

    def start_at_four(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self._curr_index = 4  # where an earlier recording left it: reset clears the rows, not the position

    recorder.monkeypatch.setattr(recorder.module._CircularBuffer, "__init__", start_at_four)
    truth = record(recorder, placement, "stat", passes=4)
    import_traces([recorder.folder], source="sglang", destination=tmp_path / "t.safetensors")
    assert (Traces.load(tmp_path / "t.safetensors").counts == truth).all()


def test_sglang_tokens(recorder, make_placement, tmp_path):
    placement = make_placement(layers=2, experts=8, ranks=2, slots=5, layer_ids=[1, 2], num_hidden_layers=3)
    truth = record(recorder, placement, "per_token", passes=3)
    options = TraceOptions(keep_tokens=True)
    import_traces([recorder.folder], source="sglang", destination=tmp_path / "t.safetensors", options=options)
    traces = Traces.load(tmp_path / "t.safetensors")
    assert (traces.counts == truth).all()
    assert traces.tokens.ids.shape[1:] == (2, 2)
    assert set(traces.tokens.source_rank.tolist()) == {0, 1}
    assert (traces.tokens.token_ids // 100 == traces.tokens.source_rank).all()


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


# LMDeploy


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

"""Our files in SGLang's own code, and its recorder's in ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
from engine_modules import load, stub

torch = pytest.importorskip("torch")

from gemopt.formats.engine import TraceOptions  # noqa: E402
from gemopt.formats.importing import import_traces  # noqa: E402
from gemopt.formats.registry import export  # noqa: E402
from gemopt.placement import Placement, Split  # noqa: E402
from gemopt.traces import Traces  # noqa: E402

pytestmark = pytest.mark.engines


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
    placement = placement.changed(split=split)
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

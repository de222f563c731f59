"""Workloads, kernels, timing and the profiler, on a CPU and on devices whose answers are made up."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cli_inputs import gemopt

from gemopt.exceptions import InputError
from gemopt.models import tiny
from gemopt.profile import MoeShape, Profile, Sample
from gemopt.profiling.checking import check_profile, holds, relative
from gemopt.profiling.device import Device
from gemopt.profiling.group import Group
from gemopt.profiling.kernels import load_kernel, per_expert, sglang_fused_moe, vllm_fused_experts
from gemopt.profiling.measure import Timing, reading, summarise, time_load
from gemopt.profiling.plots import plot_profile, slowest_rank
from gemopt.profiling.profiler import Options, Profiler, Rank, ThrottledError
from gemopt.profiling.workload import (
    copies_needed,
    find_workload,
    forced_routing,
    from_model,
    local_experts,
    parse_shape,
)

SHAPE = "hidden=16,inter=8,experts=8,topk=2,dtype=float32"


@pytest.mark.parametrize(("assignments", "active", "first"), [(1, 1, 0), (10, 3, 6), (64, 8, 0), (7, 7, 1)])
def test_forced_routing_sets_load_and_active_experts_exactly(assignments: int, active: int, first: int) -> None:
    counts = torch.bincount(forced_routing(assignments, active, 8, first=first).flatten(), minlength=8)
    assert counts.sum() == assignments and (counts > 0).sum() == active
    assert counts[counts > 0].max() - counts[counts > 0].min() <= 1


@pytest.mark.parametrize(("assignments", "active"), [(3, 4), (9, 9), (4, 0)])
def test_routing_that_cannot_be_is_refused(assignments: int, active: int) -> None:
    with pytest.raises(InputError, match=r"^active experts: "):
        forced_routing(assignments, active, 8)


def test_experts_are_shared_as_engines_share_them() -> None:
    assert [local_experts(10, 4, rank) for rank in range(4)] == [3, 3, 2, 2]
    assert copies_needed(100, 1000) == 16 and copies_needed(1000, 1000) == 2 and copies_needed(10**9, 1000) == 1
    with pytest.raises(InputError, match=r"^--ep-size: got 9"):
        local_experts(8, 9, 0)


def test_the_plain_kernel_computes_a_moe_layer() -> None:
    hidden, w13, w2 = torch.randn(5, 6), torch.randn(4, 8, 6), torch.randn(4, 6, 4)
    ids, weights = torch.tensor([[0, 3], [3, 1], [2, 0], [1, 2], [3, 0]]), torch.rand(5, 2)
    expected = torch.zeros(5, 6)
    for row, slot in itertools.product(range(5), range(2)):
        gate, up = (w13[ids[row, slot]] @ hidden[row]).chunk(2)
        expected[row] += weights[row, slot] * (w2[ids[row, slot]] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(per_expert(hidden, ids, weights, w13, w2), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize(("engine", "kernel"), [("vllm", vllm_fused_experts), ("sglang", sglang_fused_moe)])
def test_engine_kernels_agree_with_the_plain_one(engine: str, kernel: Any) -> None:
    pytest.importorskip(engine)
    make = lambda *size: torch.randn(*size, device="cuda", dtype=torch.bfloat16) / 8  # noqa: E731
    hidden, w13, w2 = make(64, 256), make(8, 256, 256), make(8, 256, 128)
    ids = torch.rand(64, 8, device="cuda").topk(2).indices.int()
    weights = torch.full((64, 2), 0.5, device="cuda")
    expected = per_expert(hidden, ids, weights, w13, w2)
    torch.testing.assert_close(kernel(hidden.clone(), ids, weights, w13, w2), expected, rtol=0.05, atol=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_an_accelerator_is_timed_by_events_and_has_an_identity() -> None:
    device = Device()
    workload = find_workload(shape=SHAPE, device=device, rank=0, num_ranks=1)
    assert time_load(device, workload.prepare(32, 8), Timing(block_us=100.0, seconds=0.0))[0] > 0
    assert device.is_accelerator and device.name and device.cache_bytes > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "module:callable"),
        ("no_such_module_x:f", "importable"),
        ("math:nothing", "callable of module math"),
        ("math:pi", "pi is a float"),
    ],
)
def test_kernels_that_cannot_be_loaded_are_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"^--kernel: .*{message}"):
        load_kernel(name)


@pytest.mark.parametrize(
    "text",
    ["", "hidden=16", "hidden=16,inter=8,experts=x,topk=2", SHAPE.replace("float32", "int8"), "a=1," + SHAPE,
     "hidden=16,inter=8,experts=2,topk=3"],
)  # fmt: skip
def test_shapes_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^--shape: "):
        parse_shape(text)


def test_either_a_model_or_a_shape_is_needed() -> None:
    device = Device("cpu")
    for options in ({}, {"model": "x", "shape": SHAPE}):
        with pytest.raises(InputError, match=r"^--model, --shape: "):
            find_workload(**options, device=device, rank=0, num_ranks=1)
    with pytest.raises(InputError, match=r"^device: got abacus"):
        Device("abacus")
    with pytest.raises(InputError, match=r"^--model: got /nonexistent"):
        find_workload(model="/nonexistent", device=device, rank=0, num_ranks=1)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers, hub = pytest.importorskip("transformers"), pytest.importorskip("huggingface_hub")
    asked: list[str] = []

    def silent(url: str, **_: object) -> None:
        asked.append(url)
        raise OSError("no answer")

    monkeypatch.setattr(hub, "get_hf_file_metadata", silent)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_: pytest.fail("asked again"))
    with pytest.raises(InputError, match=r"--model: got nobody/nothing; .* no answer"):
        find_workload(model="nobody/nothing", device=Device("cpu"), rank=0, num_ranks=1)
    assert len(asked) == 1 and "nobody/nothing" in asked[0]


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_models_own_experts_run_with_the_experts_of_one_rank(model_type: str, tmp_path: Path) -> None:
    tiny(model_type).config.save_pretrained(tmp_path)
    workload = from_model(str(tmp_path), Device("cpu"), ep_size=2, rank=0)
    assert workload.shape.num_experts == 8 and workload.shape.num_local_experts == 4
    assert workload.kernel.startswith("transformers:")
    out = workload.prepare(10, 3)()
    assert out.shape == (10, 32) and torch.isfinite(out).all()


def test_a_rank_with_one_expert_of_a_network_that_would_be_dense_with_one(tmp_path: Path) -> None:
    tiny("jamba").config.save_pretrained(tmp_path)
    workload = from_model(str(tmp_path), Device("cpu"), ep_size=8, rank=3)
    assert (workload.shape.num_experts, workload.shape.num_local_experts) == (8, 1)
    assert workload.prepare(5, 1)().shape == (5, 32)


def test_a_config_that_makes_no_network_is_one_line(tmp_path: Path) -> None:
    config = tiny("mixtral").config
    config.rope_parameters = {"rope_type": "nothing known"}
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"--model: got .*; a config of a network; KeyError: 'nothing known'"):
        from_model(str(tmp_path), Device("cpu"), ep_size=2, rank=0)


def test_the_network_that_comes_with_gemopt_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda *_, **__: pytest.fail("asked the hub"))
    assert from_model("tiny-moe", Device("cpu"), ep_size=2, rank=1).shape.num_local_experts == 32


def test_blocks_are_summarised_by_median_and_spread() -> None:
    clock = iter([4.0, 4.2, 100.0, 4.1, 3.9])
    asked: list[float] = []
    device = SimpleNamespace(synchronize=lambda: None, time_us=lambda call, us: asked.append(us) or next(clock))
    blocks = time_load(device, lambda: None, Timing(block_us=50.0, seconds=0.0))
    assert asked == [50.0] * 5
    sample = summarise(blocks, 7, 2)
    assert (sample.latency_us, sample.repeats) == (4.1, 5) and sample.spread_us == pytest.approx(0.1)
    pair = reading([sample, sample.model_copy(update={"latency_us": 8.2, "spread_us": 0.2})])
    assert pair.latency_us == pytest.approx((4.1 * 8.2) ** 0.5) and pair.noise == pytest.approx(0.01434, rel=1e-2)


class MadeUp:
    """A group of ranks whose latencies are a formula; `slow` multiplies those of a rank after some questions."""

    def __init__(self, speeds: list[float], *, num_local: int = 4) -> None:
        self.speeds, self.size, self.rank, self.num_local = speeds, len(speeds), 0, num_local
        self.asked: list[dict[str, Any]] = []
        self.slow: dict[int, tuple[int, float]] = {}
        self.scatter_first = 0.0

    def ask(self, question: dict[str, Any], answer: Any) -> list[Any]:
        self.asked.append(question)
        return [self._answer(rank, question) for rank in range(self.size)]

    def _answer(self, rank: int, question: dict[str, Any]) -> Any:
        if question["about"] == "describe":
            shape = MoeShape(num_experts=16, num_local_experts=self.num_local).model_dump()
            facts = {"name": f"device {rank}", "uuid": f"u{rank}", "node": "n", "state": {"sm_mhz": 900}}
            return {**facts, "shape": shape, "kernel": "formula"}
        if question["who"] not in (None, rank):
            return None
        if question["about"] == "settle":
            return {"move": 0.0}
        assignments, active = question["load"]
        after, factor = self.slow.get(rank, (10**9, 1.0))
        scale = self.speeds[rank] * (factor if len(self.asked) > after else 1.0)
        time_us = scale * max(20.0, 5.0 * active, 10.0 + 8.0 * -(-assignments // (active * 16)))
        spread = self.scatter_first if sum(q["load"] == question["load"] for q in self.asked) == 1 else 0.001
        sample = Sample(assignments=assignments, active_experts=active, latency_us=time_us * (1 + spread),
                        spread_us=spread * time_us, repeats=5)  # fmt: skip
        return sample.model_dump()


def profiler(group: MadeUp, **options: Any) -> Profiler:
    defaults: dict[str, Any] = {"points": 60, "max_assignments": 1024}
    return Profiler(Rank(None, None, group, Options(**{**defaults, **options})))  # type: ignore[arg-type]


@pytest.mark.parametrize(("in_turn", "mode"), [(False, "together"), (True, "in turn")])
def test_all_ranks_are_measured_at_the_same_loads(in_turn: bool, mode: str) -> None:
    group = MadeUp([1.0, 1.5, 0.8])
    measured = profiler(group, in_turn=in_turn).run()
    assert measured.mode == mode and measured.kernel == "formula" and measured.num_ranks == 3
    tables = [device.table() for device in measured.devices]
    assert len(tables[0]) <= 60 and {1, 2, 4} == set(tables[0][:, 1])
    for table, speed in zip(tables, group.speeds, strict=True):
        np.testing.assert_array_equal(table[:, :2], tables[0][:, :2])
        np.testing.assert_allclose(table[:, 2], tables[0][:, 2] * speed, rtol=2e-3)
    assert {q["who"] for q in group.asked if q["about"] == "load"} == ({0, 1, 2} if in_turn else {None})
    assert slowest_rank(measured) == 1


def test_scattered_points_are_measured_again_and_the_steadier_answer_stays() -> None:
    group = MadeUp([1.0])
    group.scatter_first = 0.5
    measured = profiler(group, sweep="load", max_drift=9.0).run()
    assert all(sample.spread_us / sample.latency_us < 0.01 for sample in measured.devices[0].samples)


def test_a_device_that_throttles_is_named() -> None:
    group = MadeUp([1.0, 1.0])
    group.slow[1] = (12, 1.5)
    with pytest.raises(ThrottledError, match=r"rank 1 \(device 1\).*\+50%.*sm_mhz 900.*--max-drift"):
        profiler(group, sweep="load", target_error=0.0).run()


def test_budgets_and_ranges_that_are_too_small_are_refused() -> None:
    with pytest.raises(InputError, match=r"^--points: got 15"):
        profiler(MadeUp([1.0]), points=15).run()
    with pytest.raises(InputError, match=r"^--max-assignments: got 15"):
        profiler(MadeUp([1.0]), max_assignments=15).run()


def test_the_check_tells_common_drift_from_a_slower_rank() -> None:
    measured = profiler(MadeUp([1.0, 1.0])).run()
    same = check_profile(measured, profiler(MadeUp([1.02, 1.02])))
    assert holds(same, 0.05) and all(drift.ratio == pytest.approx(1.02) for drift in same)
    slower = check_profile(measured, profiler(MadeUp([1.0, 1.2])))
    assert not holds(slower, 0.05) and slower[1].ratio == pytest.approx(1.2)
    common = check_profile(measured, profiler(MadeUp([1.3, 1.3])))
    assert not holds(common, 0.05) and relative(common) == [1.0, 1.0]
    with pytest.raises(InputError, match=r"^ranks: got 3; the profile has 2"):
        check_profile(measured, profiler(MadeUp([1.0, 1.0, 1.0])))
    other = measured.model_copy(update={"kernel": "another"})
    with pytest.raises(InputError, match=r"^--kernel: got formula"):
        check_profile(other, profiler(MadeUp([1.0, 1.0])))


def test_the_plot_marks_the_slowest_rank() -> None:
    pytest.importorskip("matplotlib").use("agg")
    measured = profiler(MadeUp([1.0, 1.4, 0.9])).run()
    axes = plot_profile(measured)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [("slowest" in label) for label in labels] == [False, True, False] and len(axes.lines) == 6


def test_the_command_measures_and_checks(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    torch.set_num_threads(1)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    path, picture = tmp_path / "profile.json", tmp_path / "profile.png"
    fast = ("--seconds", "0", "--block-ms", "0.2")
    code, out, _ = gemopt(capsys, "profile", "--shape", SHAPE, "--points", "16", "--max-assignments", "64",
                           "--max-drift", "99", "-o", str(path), "--plot", str(picture), "--json", *fast)  # fmt: skip
    assert code == 0 and '"mode": "alone"' in out
    measured = Profile.load(path)
    assert measured.kernel == "per_expert" and measured.model.num_local_experts == 8
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert gemopt(capsys, "profile", "check", str(path), "--tolerance", "999", *fast)[0] == 0
    assert gemopt(capsys, "profile", "check", str(path), "--tolerance", "0", *fast)[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", SHAPE), "gemopt: --output: got nothing"),
        (("-o", "p.json"), "gemopt: --model, --shape: got neither"),
        (("-o", "p.json", "--shape", SHAPE, "--points", "3"), "gemopt: --points: got 3"),
        (("-o", "no/such/p.json", "--shape", SHAPE), "gemopt: --output: got no/such/p.json"),
        (("-o", "p.json", "--shape", SHAPE, "--sweep", "x"), "gemopt: --sweep: got x"),
        (("-o", "p.json", "--shape", SHAPE, "--seconds", "inf"), "gemopt: timing: got Timing("),
        (("-o", "p.json", "--shape", SHAPE, "--block-ms", "inf"), "gemopt: timing: got Timing("),
        (("-o", "p.json", "--shape", SHAPE, "--device", "x"), "gemopt: device: got x"),
        (("-o", "/dev/full/p.json", "--shape", SHAPE), "gemopt: --output: got /dev/full/p.json"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str, capsys: Any, tmp_path: Path,
                               monkeypatch: Any) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, _, err = gemopt(capsys, "profile", *arguments)
    assert code == 2 and err.startswith(message) and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_several_ranks_need_torchrun(monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="start with torchrun"):
        Group()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match=r"^WORLD_SIZE: got two"):
        Group()

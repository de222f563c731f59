"""Tables that tools write: aiconfigurator, AMD aiter, benchmark_moe, parquet."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from kernel_tables import loads, written

from gemopt.exceptions import InputError
from gemopt.formats.tables.kernel import Unit, read_table

# --- tables that people have ----------------------------------------------------------------------------------------

AIC = (
    "framework,version,device,op_name,kernel_source,moe_dtype,num_tokens,hidden_size,inter_size,topk,num_experts,"
    "moe_tp_size,moe_ep_size,distribution,latency\n"
)


def aic(*changes: dict[str, object]) -> str:
    row = {
        "framework": "VLLM", "version": "0.24", "device": "NVIDIA H100", "op_name": "moe", "kernel_source": "triton",
        "moe_dtype": "fp8", "num_tokens": 0, "hidden_size": 2048, "inter_size": 768, "topk": 8, "num_experts": 128,
        "moe_tp_size": 1, "moe_ep_size": 8, "distribution": "balanced", "latency": 0,
    }  # fmt: skip
    lines = [
        ",".join(str(value) for value in {**row, "num_tokens": n, "latency": ms, **change}.values())
        for change in (changes or ({},))
        for n, ms in ((1, 0.03), (64, 0.06), (1024, 0.18))
    ]
    return AIC + "\n".join(lines) + "\n"


def test_aiconfigurator_counts_tokens_of_the_group_and_milliseconds(tmp_path: Path) -> None:
    profile = read_table(written(tmp_path, aic(), "moe_perf.txt"))
    assert loads(profile) == [(1, None, 30.0), (64, None, 60.0), (1024, None, 180.0)]
    assert profile.devices[0].name == "NVIDIA H100" and profile.kernel == "VLLM 0.24 triton"
    assert (profile.model.num_experts, profile.model.num_local_experts, profile.model.top_k) == (128, 16, 8)
    sliced = read_table(written(tmp_path, aic({"moe_tp_size": 4})))
    assert sliced.model.intermediate_size == (profile.model.intermediate_size or 0) // 4
    mixed = written(tmp_path, aic({}, {"moe_ep_size": 32, "latency": 0.5}, {"moe_dtype": "int4_wo"}))
    with pytest.raises(InputError, match="moe_dtype: fp8, int4_wo; moe_ep_size: 8, 32;"):
        read_table(mixed)
    wide = read_table(mixed, where=["moe_ep_size=32"])
    assert [s.assignments for s in wide.devices[0].samples] == [1, 16, 256]
    for wrong, named in (({"top_k": 4}, "--top-k"), ({"unit": Unit.TOKENS}, "--unit"), ({"ep": 4}, "--ep")):
        with pytest.raises(InputError, match=named):
            read_table(mixed, where=["moe_ep_size=32"], **wrong)  # type: ignore[arg-type]


def test_two_kinds_of_gpu_in_aiconfigurators_table_are_no_two_ranks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rows that differ in device;"):
        read_table(written(tmp_path, aic({}, {"device": "NVIDIA A100"})))


def test_skewed_rows_of_aiconfigurator_are_taken_only_when_asked_for_or_on_one_rank(tmp_path: Path) -> None:
    skewed = written(tmp_path, aic({"distribution": "power_law_1.2"}))
    with pytest.raises(InputError, match=r"distribution: got power_law_1\.2.*--where distribution=balanced"):
        read_table(skewed)
    notes: list[str] = []
    assert len(loads(read_table(skewed, where=["distribution=power_law_1.2"], notes=notes))) == 3
    assert any("distribution is power_law_1.2: taken as if balanced" in note for note in notes)
    alone = written(tmp_path, aic({"distribution": "power_law_1.2", "moe_ep_size": 1}), "alone.csv")
    assert loads(read_table(alone))[0] == (8, None, 30.0)  # all assignments are on the one rank, however skewed


AITER = (
    "cu_num,token,model_dim,inter_dim,expert,topk,dtype,q_type,block_m,ksplit,us1,kernelName1,err1,us2,kernelName2,"
    "err2,us,run_1stage,tflops,bw\n"
)


def test_aiter_times_both_stages_and_its_kernels_follow_the_load(tmp_path: Path) -> None:
    text = AITER + (
        "256,1,4096,384,128,8,bf16,x,32,0,37.1,k32,0.1%,10.6,s32,15.7%,47.7,0,1.58,12676\n"
        "256,64,4096,384,128,8,bf16,x,64,0,82.4,k64,0.1%,67.4,s64,15.6%,149.8,0,32.2,4036\n"
        "256,2,4096,384,128,8,bf16,x,32,0,44.2,one,0.0%,0.0,Null,0.0%,0,1,2.85,1325\n"
    )
    profile = read_table(written(tmp_path, text))
    assert loads(profile) == [(8, None, 47.7), (16, None, 44.2), (512, None, 149.8)]  # one kernel: its time is in us1
    other = "256,1,4096,384,128,8,bf16,x,64,0,35,k64,0.1%,11,s64,1%,46,0,1.58,12676\n"
    with pytest.raises(InputError, match="rows that differ in block_m, kernelName1, kernelName2;"):
        read_table(written(tmp_path, text + other))
    shape = "256,1,2048,384,64,6,bf16,x,64,0,35,k64,0.1%,11,s64,1%,46,0,1.58,12676\n"
    with pytest.raises(InputError, match="rows that differ in model_dim, expert, topk;"):
        read_table(written(tmp_path, text + shape))
    assert loads(read_table(written(tmp_path, text + shape), where=["expert=64"])) == [(6, None, 46.0)]
    failed = "256,4,4096,384,128,8,bf16,x,64,0,0,k64,0.1%,0,s64,1%,0,0,1.58,12676\n"
    with pytest.raises(InputError, match="line 5, us: got 0"):
        read_table(written(tmp_path, text + failed))


def test_aiter_for_expert_parallelism_counts_tokens_of_the_group(tmp_path: Path) -> None:
    head = AITER.replace("expert,topk", "expert,ep,topk")
    row = "256,{n},4096,384,32,{ep},8,bf16,x,32,0,37.1,k32,0.1%,10.6,s32,15.7%,{us},0,1.58,12676\n"
    eight = "".join(row.format(n=n, ep=8, us=us) for n, us in ((8, 47.5), (512, 90.0)))
    assert loads(read_table(written(tmp_path, head + eight))) == [(8, None, 47.5), (512, None, 90.0)]
    one = "".join(row.format(n=n, ep=1, us=us) for n, us in ((8, 60.0), (512, 300.0)))
    assert loads(read_table(written(tmp_path, head + one))) == [(64, None, 60.0), (4096, None, 300.0)]
    with pytest.raises(InputError, match="rows that differ in ep;"):
        read_table(written(tmp_path, head + one + eight))
    with pytest.raises(InputError, match="ep: got 1, 8; one number for all rows"):
        read_table(written(tmp_path, head + one + eight), repeat=["ep"])


def test_stages_of_aiter_are_no_layers(tmp_path: Path) -> None:
    profile = "stage," + AITER.replace("us1,kernelName1,err1,us2,kernelName2,err2,us,run_1stage", "us,kernelName,err")
    row = "{stage},256,{n},4096,384,128,8,bf16,x,32,0,{us},k,0.1%,1.58,12676\n"
    stages = (("stage1", 30), ("stage2", 20), ("asm_1stage", 60))
    text = profile + "".join(row.format(stage=stage, n=n, us=us + n) for stage, us in stages for n in (1, 8))
    for where in ([], ["stage=stage1"]):
        with pytest.raises(InputError, match=r"stage: got stage1.*whole MoE layers"):
            read_table(written(tmp_path, text), where=where)
    assert loads(read_table(written(tmp_path, text), where=["stage=asm_1stage"])) == [(8, None, 61), (64, None, 68)]
    opus = "token,model_dim,inter_dim,expert,topk,a2_layout,kernel_name,us\n"
    text = opus + "".join(f"{n},4096,1024,64,8,token_major,bf16_gemmstyle,{20 + n}\n" for n in (8, 64))
    with pytest.raises(InputError, match="a2_layout: got the second of two stages"):
        read_table(written(tmp_path, text))


def test_tables_of_wide_expert_parallelism_must_tell_the_tokens_of_the_group(tmp_path: Path) -> None:
    head = "kernel_source,num_tokens,{},topk,num_experts,moe_ep_size,distribution,latency\n"
    text = head.format("global_num_tokens") + "".join(
        f"deepgemm_megamoe,{n},{8 * n},6,384,8,balanced,{ms}\n" for n, ms in ((4, 0.1), (16, 0.15), (64, 0.2))
    )
    path = written(tmp_path, text)
    with pytest.raises(InputError, match=r"got 4 beside global_num_tokens 32.*--load-column global_num_tokens"):
        read_table(path)
    of_group = {"load": "global_num_tokens", "unit": Unit.GROUP_TOKENS}
    with pytest.raises(InputError, match=r"megamoe; times without the exchange.*--time-column latency:ms"):
        read_table(path, **of_group)
    assert loads(read_table(path, **of_group, time="latency:ms")) == [
        (24, None, 100.0),
        (96, None, 150.0),
        (384, None, 200.0),
    ]
    mode = head.format("rank0_num_tokens,simulation_mode")
    rows = "".join(
        f"cutlass,{n},{n // 8},{{mode}},8,256,8,balanced,{ms}\n" for n, ms in ((64, 0.1), (128, 0.15), (512, 0.2))
    )
    accurate, simple = (rows.format(mode=each) for each in ("accurate", "simple"))
    with pytest.raises(InputError, match="simulation_mode: got accurate"):
        read_table(written(tmp_path, mode + simple + accurate))
    path = written(tmp_path, mode + simple + accurate)
    assert loads(read_table(path, where=["simulation_mode=simple"]))[0] == (64, None, 100.0)


def benchmark_log(tp: int = 2, *, arguments: bool = True, slower: float = 0.0) -> str:
    lines = [f"Namespace(model='mixtral', tp_size={tp}, dtype='auto', seed=0, batch_size=None, tune=False)"] * arguments
    for size, us in ((1, 61.2), (64, 171.25)):
        lines += [f"Batch size: {size}, config: {{'BLOCK_SIZE_M': {size + 15}}}", f"Kernel time: {us + slower:.2f} us"]
    return "\n".join(["INFO loading", *lines, ""])


def test_what_benchmark_moe_printed_is_read(tmp_path: Path) -> None:
    assert loads(read_table(written(tmp_path, benchmark_log(), "run.log"), top_k=2)) == [
        (2, None, 61.2),
        (128, None, 171.25),
    ]
    two = written(tmp_path, benchmark_log() + benchmark_log(4, slower=9))
    with pytest.raises(InputError, match="part: 1, 2; tp_size: 2, 4;"):
        read_table(two, top_k=2)
    assert loads(read_table(two, top_k=2, where=["tp_size=4"]))[0] == (2, None, 70.2)
    unnamed = written(tmp_path, benchmark_log(arguments=False) + benchmark_log(arguments=False, slower=2))
    with pytest.raises(InputError, match="rows that differ in part;"):  # SGLang does not say what it ran
        read_table(unnamed, top_k=2)
    assert loads(read_table(unnamed, top_k=2, repeat=["part"]))[0] == (2, None, 62.2)


def test_a_time_column_of_another_name_and_unit(tmp_path: Path) -> None:
    path = written(tmp_path, "batch_size,vllm,sglang (Time (ms))\n4,1.5,1.25\n8,1.75,2\n")
    assert loads(read_table(path, top_k=2, time="sglang (Time (ms))", repeat=["vllm"])) == [
        (8, None, 1250),
        (16, None, 2000),
    ]
    assert loads(read_table(path, top_k=2, time="vllm:ms")) == [(8, None, 1500), (16, None, 1750)]
    for wrong in ("vllm", "vllm:h", "none:ms", "sglang (Time (ms)):us"):
        with pytest.raises(InputError, match="--time-column"):
            read_table(path, top_k=2, time=wrong)


def test_flashinfer_counts_tokens_of_which_a_device_gets_its_share(tmp_path: Path) -> None:
    head = "routine,median_time,std_time,backend,num_tokens,num_experts,top_k,local_num_experts,ep_size,repro_command\n"
    rows = [
        f"trtllm_fp8_block_scale_moe,{ms},0.001,trtllm,{n},256,8,{{local}},,run {n}\n"
        for n, ms in ((8, 0.03), (64, 0.06))
    ]
    path = written(tmp_path, head + "".join(rows).format(local=32))
    assert loads(read_table(path)) == [(8, None, 30.0), (64, None, 60.0)]
    path = written(tmp_path, head + "".join(rows).format(local=256))
    assert loads(read_table(path)) == [(64, None, 30.0), (512, None, 60.0)]
    path = written(tmp_path, head + "".join(rows).format(local="").replace("trtllm_fp8_block_scale", "cutlass_fused"))
    with pytest.raises(InputError, match="--ep"):
        read_table(path)


def test_parquet_reads_like_the_csv_of_the_same_cells(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    whole = pyarrow.table(
        {"tokens": [8, 16], "gpu": pyarrow.array(["b", "b"]).dictionary_encode(), "latency_ms": [0.1, 0.2]}
    )
    parquet.write_table(whole, tmp_path / "t.parquet")
    text = written(tmp_path, "tokens,gpu,latency_ms\n8,b,0.1\n16,b,0.2\n")
    assert read_table(tmp_path / "t.parquet") == read_table(text)
    parquet.write_table(pyarrow.table({"tokens": [8, 16], "latency_us": [1.0, None]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="row 2, latency_us: got nothing"):
        read_table(tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="readable parquet"):
        read_table(tmp_path / "t.parquet")


def test_parquet_without_its_library_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"needs pyarrow; pip install 'gemopt\[tables\]'"):
        read_table(tmp_path / "t.parquet")


NVBENCH = (
    "Benchmark,Device,Device Name,num_tokens,Skipped,Samples,CPU Time (sec),Noise,GPU Time (sec),Noise,"
    "Elem/s (elem/sec),GlobalMem BW (bytes/sec),BWUtil,Samples,Batch GPU (sec)\n"
)


def test_nvbench_names_results_of_two_clocks_alike(tmp_path: Path) -> None:
    sizes = (11, 22, 33, 44, 55, 66, 77)
    rows = [
        f"moe,0,H200,{n},No,{500 + 7 * n},{9e-6 + n * 1e-7:.9e},0.0{n},{n * 1e-6:.9e},0.1{n},{1e3 / n},{3e9 / n},"
        f"0.{n},{900 + 3 * n},{n * 9e-7:.9e}"
        for n in sizes
    ]
    path = written(tmp_path, NVBENCH + "\n".join(rows))
    with pytest.raises(InputError, match=r"times CPU.*GPU.*--time-column 'GPU Time \(sec\)'"):
        read_table(path, unit=Unit.TOKENS, top_k=2)
    profile = read_table(path, unit=Unit.TOKENS, top_k=2, time="GPU Time (sec)")
    assert [n for n, *_ in loads(profile)] == [2 * n for n in sizes]
    assert [us for *_, us in loads(profile)] == pytest.approx(sizes)


PYTEST = {"group": None, "name": "test_moe[1]", "fullname": "bench.py::test_moe[1]", "options": {"warmup": False}}
FRAME = [{"num_tokens": n, "latency_us": 5.0 + n} for n in (1, 2, 3)]


@pytest.mark.parametrize(
    "found",
    [
        {"columns": [*FRAME[0]], "index": [4, 8, 9], "data": [[*row.values()] for row in FRAME]},
        {"schema": {"fields": []}, "data": [{"index": i, **row} for i, row in enumerate(FRAME)]},
        {str(7 * i): row for i, row in enumerate(FRAME)},
        {name: {str(i): row[name] for i, row in enumerate(FRAME)} for name in FRAME[0]},
        {"gpu": "H200", "config": {"top_k": 2}, "results": FRAME},
        {"gpu": {"name": "H200"}, "model": {"name": "m"}, "num_tokens": [1, 2, 3], "results": FRAME, "errors": []},
        {"gpu": "H200", **{name: [row[name] for row in FRAME] for name in FRAME[0]}},
        [{"num_tokens": n, "shape": [n, 4096], "latencies_us": [5.0 + n, 90.0, 5.0 + n]} for n in (1, 2, 3)],
        {
            "machine_info": {"cpu": {"flags": []}},
            "benchmarks": [
                PYTEST
                | {
                    "params": {"num_tokens": n},
                    "stats": {"median": (5 + n) * 1e-6, "mean": 9e-6 * n, "total": n, "ops": 9.5 * n},
                }
                for n in (1, 2, 3)
            ],
        },
    ],
)
def test_data_frames_in_json_and_what_is_said_beside_rows(tmp_path: Path, found: object) -> None:
    profile = read_table(written(tmp_path, json.dumps(found), "a.json"), unit=Unit.TOKENS, top_k=2)
    assert [(n, round(us, 9)) for n, _, us in loads(profile)] == [(2, 6.0), (4, 7.0), (6, 8.0)]


def test_lists_of_times_that_may_be_of_ranks_or_layers_are_no_repeats(tmp_path: Path) -> None:
    for name in ("gpu_us", "layer_times_us", "kernel_times_us", "per_rank_us"):
        rows = [{"num_tokens": n, name: [5.0 + n, 6.0 + n]} for n in (1, 2, 3)]
        with pytest.raises(InputError, match=r"a number from 0|a column latency_us"):
            read_table(written(tmp_path, json.dumps(rows)))


def test_rows_by_their_labels_can_be_those_of_loads(tmp_path: Path) -> None:
    found = {"gpu": "H200", "results": {f"{row['num_tokens']}": {"latency_us": row["latency_us"]} for row in FRAME}}
    for text in (json.dumps(found), ",latency_us\n1,6\n2,7\n3,8\n"):
        path = written(tmp_path, text)
        assert loads(read_table(path, load="Unnamed: 0", unit=Unit.ASSIGNMENTS))[0] == (1, None, 6.0)


def test_what_is_said_beside_rows_is_heeded(tmp_path: Path) -> None:
    for told, words in (({"top_k": 4}, "top_k is 4"), ({"phase": "backward"}, "phase: got backward")):
        path = written(tmp_path, json.dumps({**told, "results": FRAME}), "a.json")
        with pytest.raises(InputError, match=words):
            read_table(path, unit=Unit.TOKENS, top_k=2)


def test_a_hint_chooses_no_warm_up(tmp_path: Path) -> None:
    path = written(tmp_path, "tokens,warmup,latency_us\n1,True,9\n1,False,5\n2,True,9\n2,False,6\n")
    with pytest.raises(InputError, match="--where warmup=False"):
        read_table(path)


MEGA_MOE = (
    "| Batch Size | Time (us) | Compute (TFLOPS) | Global Memory (GB/s) | Interconnect (GB/s) | Speedup (vs legacy) |\n"
    "|:-----:|:------:|:----:|:----:|:---:|:-----:|\n"
    "| 1     | 56.5   | 5    | 1311 | 1   | 1.96x |\n"
    "| 512   | 146.5  | 1056 | 3192 | 266 | 1.73x |\n"
    "| 8192  | 1283.1 | 1928 | 998  | 499 | 1.56x |\n"
)


def test_rates_are_results_and_one_between_gpus_tells_an_exchange(tmp_path: Path) -> None:
    """As DeepGEMM shows its Mega MoE: tokens of each rank, and a time that holds the exchange."""
    notes: list[str] = []
    profile = read_table(written(tmp_path, MEGA_MOE), top_k=6, notes=notes)
    assert loads(profile) == [(6, None, 56.5), (3072, None, 146.5), (49152, None, 1283.1)]
    assert notes == ["Interconnect (GB/s) is 499: are times without the exchange of tokens? a topology adds that"]


def test_rates_that_were_asked_for_are_no_results(tmp_path: Path) -> None:
    path = written(tmp_path, "tokens,Requests/s,us\n8,1,50\n16,2,60\n")
    with pytest.raises(InputError, match="rows that differ in Requests/s"):
        read_table(path, unit=Unit.TOKENS, top_k=2)


def test_results_with_notes_are_offered_as_such(tmp_path: Path) -> None:
    rows = "| 8 | 260.1 | 261.1 (1.00x) |\n| 64 | 327.7 | 334.7 (0.98x) |\n"
    path = written(tmp_path, f"| tok/rank | dg | nvfp4 |\n|---|---|---|\n{rows}")
    of_rank = {"load": "tok/rank", "unit": Unit.TOKENS, "top_k": 6, "time": "dg:us"}
    with pytest.raises(InputError, match=r"choose rows with --where; of results: --repeat-column nvfp4$"):
        read_table(path, **of_rank)  # type: ignore[arg-type]
    assert loads(read_table(path, **of_rank, repeat=["nvfp4"]))[0] == (48, None, 260.1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--load-column: got tok/rank; the tokens of all ranks together"):
        read_table(path, **{**of_rank, "unit": Unit.GROUP_TOKENS, "ep": 8})  # type: ignore[arg-type]


def test_changes_in_percent_are_results(tmp_path: Path) -> None:
    """As kernels are compared where they are tuned."""
    rows = "| 1 | 25.07 | 24.68 | -1.6% |\n| 8 | 133.91 | 135.46 | **+1.2%** |\n| 16 | 242 | 241.8 | -0.1% |\n"
    path = written(tmp_path, f"| Batch | Default (us) | Tuned (us) | Delta |\n|---|---|---|---|\n{rows}")
    found = read_table(path, load="Batch", unit=Unit.TOKENS, top_k=8, time="Tuned (us)")
    assert loads(found) == [(8, None, 24.68), (64, None, 135.46), (128, None, 241.8)]
    caps = "".join(f"{n},{cap}%,{n}\n" for n in (8, 16) for cap in (50, 80))
    with pytest.raises(InputError, match="rows that differ in cap"):
        read_table(written(tmp_path, f"assignments,cap,us\n{caps}"))

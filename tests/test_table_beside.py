"""What columns with one value say of all rows of a kernel table: units, failures, parts, other loads."""

from __future__ import annotations

from pathlib import Path

import pytest
from kernel_tables import loads, written
from one_liners import one_line

from gemopt.exceptions import InputError
from gemopt.formats.tables.kernel import Unit, read_table

NS = (1, 2, 4, 8)


def table(folder: Path, header: str, more: str) -> Path:
    return written(folder, f"{header}\n" + "".join(f"{n},{50 + n}{more}\n" for n in NS))


@pytest.mark.parametrize(
    ("header", "more", "time", "said"),
    [
        ("assignments,time_us,unit", ",ms", None, "line 2, unit: got ms; the unit that time_us is read in"),
        ("assignments,latency_us,time_unit", ",ns", None, "which is right? mend the other"),
        ("assignments,time,time_unit", ",usecond", "time:ms", "--time-column 'time:usecond'"),
        ("assignments,value,metric", ",latency_ms", "value:us", "--time-column 'value:ms'"),
        ("assignments,value,metric", ",tflops", "value:us", "metric: got tflops; a time"),
        ("assignments,time_us,status", ",FAILED", None, "status: got FAILED; rows of runs that went well"),
        ("assignments,time_us,valid", ",False", None, "valid: got False"),
        ("assignments,time_us,passed", ",0", None, "if passed says something else: --repeat-column 'passed'"),
        ("assignments,time_us,error", ",CUDA OOM", None, "error: got CUDA OOM"),
        ("assignments,time_us,error", ",CUDA error: no kernel image", None, "error: got CUDA error"),
        ("assignments,time_us,error", ",700: illegal access", None, "error: got 700"),
        ("assignments,time_us,result", ",not ok: timeout", None, "result: got not ok"),
        ("assignments,time_us,kernel", ",ncclAllToAll", None, "kernel: got ncclAllToAll; times of whole MoE layers"),
        ("assignments,time_us,component", ",attention", None, "if it is a whole layer: --repeat-column 'component'"),
        ("assignments,time_us,stage", ",gemm1", None, "stage: got gemm1"),
        ("assignments,time_us,phase", ",backward", None, "phase: got backward"),
        ("assignments,total_us,repeat", ",100", None, "time total_us beside repeat 100"),
        ("assignments,total_time_us,graph_iters", ",50", None, "beside graph_iters 50"),
        ("assignments,elapsed_us,n", ",20", None, "beside n 20"),
        (
            "assignments,time_us,statistic",
            ",p99",
            None,
            "statistic: got p99; the median or mean of repeats; to take them",
        ),
        ("assignments,time_us,quantile", ",0.99", None, "all the same: --repeat-column 'quantile'"),
        ("assignments,time_us,metric", ",latency_max", None, "metric: got latency_max"),
    ],
)
def test_columns_of_one_value_that_contradict_are_refused(
    tmp_path: Path, header: str, more: str, time: str | None, said: str
) -> None:
    with pytest.raises(InputError) as error:
        read_table(table(tmp_path, header, more), time=time)
    assert said in one_line(error)


@pytest.mark.parametrize(
    ("header", "more"),
    [
        ("assignments,time_us,unit", ",us"),
        ("assignments,time_us,status", ",ok"),
        ("assignments,time_us,valid", ",True"),
        ("assignments,time_us,error", ",0.01"),
        ("assignments,time_us,error", ",<0.5 us"),
        ("assignments,time_us,error", ",No error"),
        ("assignments,time_us,error", ",cudaSuccess"),
        ("assignments,time_us,status", ",no errors"),
        ("assignments,time_us,timeout", ",30s"),
        ("assignments,total_us,n,k", ",2048,4096"),
        ("assignments,time_us,kernel", ",fused_moe_topk8_gate_up_down"),
        ("assignments,time_us,phase", ",decode"),
        ("assignments,time_us,repeat", ",100"),
        ("assignments,time_us,statistic", ",median"),
        ("assignments,time_us,percentile", ",50"),
        ("assignments,time_us,metric", ",mean_latency_us"),
        ("assignments,total_us,warmup_iters", ",10"),
        ("assignments,total_us,n", ",1"),
        ("assignments,time_us,,", ",,"),
    ],
)
def test_columns_of_one_value_that_agree_are_read_over(tmp_path: Path, header: str, more: str) -> None:
    assert loads(read_table(table(tmp_path, header, more))) == [(n, None, 50.0 + n) for n in NS]


@pytest.mark.parametrize(("wanted", "times"), [("p50", 1), ("p99", 2)])
def test_a_statistic_that_was_chosen_is_taken(tmp_path: Path, wanted: str, times: int) -> None:
    rows = "".join(f"{n},{name},{us}\n" for n in NS for name, us in (("p50", 50 + n), ("p99", 2 * (50 + n))))
    path = written(tmp_path, f"assignments,statistic,time_us\n{rows}")
    with pytest.raises(InputError, match=r"statistic: got p99; the median or mean of repeats; --where 'statistic=p50'"):
        read_table(path)
    found = read_table(path, where=[f"statistic={wanted}"])
    assert loads(found) == [(n, None, times * (50.0 + n)) for n in NS]


def test_passes_that_are_numbered_are_no_flags(tmp_path: Path) -> None:
    path = written(
        tmp_path, "assignments,time_us,pass\n" + "".join(f"{n},{50 + n},{i}\n" for n in NS for i in range(3))
    )
    with pytest.raises(InputError, match="--repeat-column pass"):
        read_table(path)
    assert loads(read_table(path, repeat=["pass"])) == [(n, None, 50.0 + n) for n in NS]


def test_tokens_per_group_are_tokens_of_a_group(tmp_path: Path) -> None:
    path = written(tmp_path, "tokens_per_group,time_us,tokens_per_second\n8,50,1.5\n16,60,2.5\n")
    found = read_table(path, load="tokens_per_group", unit=Unit.GROUP_TOKENS, top_k=2, ep=4)
    assert loads(found) == [(4, None, 50.0), (8, None, 60.0)]
    with pytest.raises(InputError, match="tokens_per_group; the load of a device"):
        read_table(path, load="tokens_per_group", unit=Unit.TOKENS, top_k=2)


def test_what_the_refusals_advise_gives_the_right_figures(tmp_path: Path) -> None:
    path = table(tmp_path, "assignments,time,time_unit", ",usecond")
    right = [(n, None, 50.0 + n) for n in NS]
    assert loads(read_table(path, time="time:usecond")) == right
    path = written(tmp_path, "assignments,metric,value\n" + "".join(f"{n},latency_ms,{0.050 + n / 1e3}\n" for n in NS))
    assert loads(read_table(path, time="value:ms")) == [(n, None, pytest.approx(50.0 + n)) for n in NS]
    path = table(tmp_path, "assignments,time_us,kernel", ",my_combine_of_all")
    assert loads(read_table(path, repeat=["kernel"])) == right
    rows = "".join(f"{n},{us},{state}\n" for n in NS for us, state in ((50 + n, "ok"), (1, "failed")))
    path = written(tmp_path, f"assignments,time_us,status\n{rows}")
    with pytest.raises(InputError, match="--where 'status=ok'"):
        read_table(path)
    assert loads(read_table(path, where=["status=ok"])) == right


@pytest.mark.parametrize(
    "load",
    ["tokens_per_expert", "m_per_group", "log2_m", "tokens (k)", "ktokens", "tokens_per_s", "load_percent", "bytes"],
)
def test_columns_that_are_no_load_are_refused(tmp_path: Path, load: str) -> None:
    with pytest.raises(InputError) as error:
        read_table(table(tmp_path, f"{load},time_us", ""), load=load, unit=Unit.ASSIGNMENTS)
    assert f"--load-column: got {load}" in one_line(error)


@pytest.mark.parametrize("name", ["routing", "workload_distribution", "expert_load_distribution"])
def test_skewed_tokens_of_a_group_are_asked_for(tmp_path: Path, name: str) -> None:
    path = table(tmp_path, f"tokens,time_us,{name}", ",zipf_1.2")
    group = {"unit": Unit.GROUP_TOKENS, "top_k": 8, "ep": 8}
    with pytest.raises(InputError, match=f"{name}: got zipf_1"):
        read_table(path, **group)
    expected = [(n, None, 50.0 + n) for n in NS]
    notes: list[str] = []
    assert loads(read_table(path, **group, where=[f"{name}=zipf_1.2"], notes=notes)) == expected
    assert any(f"{name} is zipf_1.2: taken as if balanced" in note for note in notes)
    assert loads(read_table(path, unit=Unit.ASSIGNMENTS)) == expected  # the device's own load is told


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("tp_size", "a part of each expert"),
        ("num_gpus", "--unit group-tokens"),
        ("ep_size", "--unit group-tokens"),
        ("num_nodes", "--unit group-tokens"),
        ("num_shared_experts", "routed experts alone"),
    ],
)
def test_times_of_several_gpus_are_named(tmp_path: Path, column: str, said: str) -> None:
    notes: list[str] = []
    read_table(table(tmp_path, f"tokens,time_us,{column}", ",8"), unit=Unit.TOKENS, top_k=1, notes=notes)
    assert [note for note in notes if f"{column} is 8" in note and said in note] == notes
    assert len(notes) == 1


@pytest.mark.parametrize("text", ["assignments,time_us\r1,50\r2,51\r", "assignments,time_us,,\n1,50,,\n,,,\n2,51,,\n"])
def test_what_spreadsheets_leave(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode())
    assert loads(read_table(path)) == [(1, None, 50.0), (2, None, 51.0)]


@pytest.mark.parametrize("column", ["zipf_alpha", "imbalance", "load_skew", "power_law_alpha"])
def test_groups_whose_loads_a_number_calls_uneven_are_refused(tmp_path: Path, column: str) -> None:
    group = {"unit": Unit.GROUP_TOKENS, "top_k": 8, "ep": 8}
    for value, even in (("1.2", False), ("1.0" if column == "imbalance" else "0", True)):
        path = written(tmp_path, f"num_tokens,{column},latency_us\n" + "".join(f"{n},{value},{n}\n" for n in NS))
        if even:
            assert loads(read_table(path, **group)) == [(n, None, n) for n in NS]
            continue
        with pytest.raises(InputError, match=rf"{column}: got 1\.2; balanced rows.*--where {column}=1\.2"):
            read_table(path, **group)
        assert loads(read_table(path, **group, where=[f"{column}=1.2"])) == [(n, None, n) for n in NS]


def test_alphas_of_other_things_say_nothing_of_loads(tmp_path: Path) -> None:
    path = written(tmp_path, "num_tokens,swiglu_alpha,latency_us\n" + "".join(f"{n},1.702,{n}\n" for n in NS))
    assert loads(read_table(path, unit=Unit.GROUP_TOKENS, top_k=8, ep=8)) == [(n, None, n) for n in NS]


def test_ranks_must_be_all_there_or_chosen(tmp_path: Path) -> None:
    text = "rank,assignments,latency_us\n" + "".join(f"{g},{n},{n + g}\n" for g in (1, 2, 3) for n in NS)
    path = written(tmp_path, text)
    with pytest.raises(InputError, match=r"rank: got 1, 2, 3; ranks 0 to 2; rank 0 is missing; numbered from 1\?"):
        read_table(path)
    one, two = (read_table(path, where=[f"rank={g}" for g in ranks]) for ranks in ([3], [2, 3]))
    assert loads(one) == [(n, None, n + 3) for n in NS]
    assert [loads(two, rank) for rank in (0, 1)] == [[(n, None, n + g) for n in NS] for g in (2, 3)]


def test_ranks_that_the_experts_on_the_device_contradict_are_refused(tmp_path: Path) -> None:
    text = "num_tokens,num_experts,num_local_experts,latency_us\n" + "".join(f"{n},256,32,{n}\n" for n in NS)
    with pytest.raises(InputError, match="--ep: got 4; 8: one in 8 of the experts is on the device"):
        read_table(written(tmp_path, text), unit=Unit.GROUP_TOKENS, top_k=8, ep=4)
    assert loads(read_table(written(tmp_path, text), unit=Unit.GROUP_TOKENS, top_k=8, ep=8))[0] == (NS[0], None, NS[0])


def test_times_of_layers_and_loads_of_a_group_under_other_names(tmp_path: Path) -> None:
    text = "assignments,layers_timed,latency_us\n" + "".join(f"{n},{{count}},{n}\n" for n in NS)
    with pytest.raises(InputError, match="latency_us beside layers_timed 58"):
        read_table(written(tmp_path, text.format(count=58)))
    assert loads(read_table(written(tmp_path, text.format(count=1)))) == [(n, None, n) for n in NS]
    text = "expected_m,num_groups,latency_us\n" + "".join(f"{n},8,{n}\n" for n in NS)
    with pytest.raises(InputError, match="expected_m; the load of a device, over all its experts"):
        read_table(written(tmp_path, text), load="expected_m", unit=Unit.ASSIGNMENTS)


@pytest.mark.parametrize(
    ("header", "more", "said"),
    [
        ("assignments,latency_us,moe_a2a_backend", ",deepep", "moe_a2a_backend is deepep"),
        ("assignments,latency_us,with_comm", ",True", "with_comm is True"),
        ("assignments,latency_us,include_dispatch", ",1", "include_dispatch is 1"),
        ("assignments,latency_us,with_allreduce", ",1", "with_allreduce is 1"),
        ("assignments,latency_us,moe_a2a_backend", ",none", ""),
        ("assignments,latency_us,with_comm", ",False", ""),
        ("assignments,latency_us,comm_bytes", ",4096", ""),
    ],
)
def test_an_exchange_that_may_be_in_the_times_is_named(tmp_path: Path, header: str, more: str, said: str) -> None:
    notes: list[str] = []
    read_table(table(tmp_path, header, more), notes=notes)
    named = [note for note in notes if "exchange of tokens" in note]
    assert named == ([f"{said}: are times without the exchange of tokens? a topology adds that"] if said else [])


@pytest.mark.parametrize(
    ("name", "one"), [("q_len", "1.0"), ("tokens_per_seq", "1"), ("num_spec_tokens", "0"), ("mtp", "False")]
)
def test_sequences_of_several_tokens(tmp_path: Path, name: str, one: str) -> None:
    with pytest.raises(InputError, match=f"with {name} 3, does batch_size count tokens, or sequences"):
        read_table(table(tmp_path, f"batch_size,time_us,{name}", ",3"), top_k=2)
    found = read_table(table(tmp_path, f"batch_size,time_us,{name}", f",{one}"), top_k=2)
    assert [sample.assignments for sample in found.devices[0].samples] == [2 * n for n in NS]


def test_aiters_tables_of_fused_kernels(tmp_path: Path) -> None:
    notes: list[str] = []
    header = "token,model_dim,inter_dim,expert,topk,tp,us,us_default,candidates_timed,mega"
    rows = ["8,7168,256,256,8,8,288.5,298.1,29,0", "16,7168,256,256,8,8,290.5,297.5,27,1"]
    found = read_table(written(tmp_path, "\n".join([header, *rows, ""])), notes=notes)
    assert [(s.assignments, s.latency_us) for s in found.devices[0].samples] == [(64, 288.5), (128, 290.5)]
    assert any(note.startswith("tp is 8") for note in notes)


def test_rows_are_not_chosen_by_their_results(tmp_path: Path) -> None:
    path = written(tmp_path, "assignments,triton,torch,gpu model\n64,0.05,0.5,H 100\n128,0.06,0.6,H 100\n")
    with pytest.raises(InputError, match=r"choose rows with --where; of results: --repeat-column torch$"):
        read_table(path, time="triton:ms")
    found = read_table(path, time="triton:ms", repeat=["torch"]).devices[0].samples
    assert [(s.assignments, s.latency_us) for s in found] == [(64, 50), (128, 60)]
    path.write_text(path.read_text().replace("0.06,0.6,H 100", "0.06,0.5,H 200"))
    with pytest.raises(InputError, match="choose, as in --where 'gpu model=H 100'; or say what a column is"):
        read_table(path, time="triton:ms")


def test_the_size_of_one_matrix_product_is_named(tmp_path: Path) -> None:
    """As aiter's Triton benchmark prints: a layer is two rows, and one of them alone is what the refusal offers."""
    rows = "".join(f"{m},{n},{k},{us}\n" for m in NS for n, k, us in ((14336, 4096, 2 * m), (4096, 7168, m)))
    path = written(tmp_path, f"M,N,K,Time (us)\n{rows}")
    options = {"load": "M", "unit": Unit.TOKENS, "top_k": 2}
    with pytest.raises(InputError, match="rows that differ in N, K"):
        read_table(path, **options)
    notes: list[str] = []
    read_table(path, **options, where=["N=14336"], notes=notes)
    assert notes == ["N 14336 and K 4096: are times those of the whole layer, or of one matrix product of this size?"]


@pytest.mark.parametrize(
    ("header", "more"),
    [("assignments,time_us,case", ",gemm1_w13"), ("assignments,time_us,kernel_operation_mode", ",backward")],
)
def test_parts_by_more_names_are_refused(tmp_path: Path, header: str, more: str) -> None:
    with pytest.raises(InputError, match="times of whole MoE layers"):
        read_table(table(tmp_path, header, more))


def test_what_was_exchanged_is_named_of_groups_too(tmp_path: Path) -> None:
    notes: list[str] = []
    path = table(tmp_path, "tokens,time_us,moe_a2a_backend,tp_size,ep_size", ",deepep,2,8")
    read_table(path, unit=Unit.GROUP_TOKENS, top_k=8, notes=notes)
    assert [note.partition(":")[0] for note in notes] == ["tp_size is 2", "moe_a2a_backend is deepep"]


KINDS = [(("H100", "H200"), True), (("MI300X", "B200"), True), (("gpu0", "gpu7"), False), ((0, 1), False)]


@pytest.mark.parametrize(("names", "said"), KINDS)
def test_kinds_of_device_that_became_ranks_are_named(tmp_path: Path, names: tuple[object, ...], said: bool) -> None:
    rows = "".join(f"{name},{n},{n + at}\n" for at, name in enumerate(names) for n in NS)
    notes: list[str] = []
    assert read_table(written(tmp_path, f"gpu,assignments,time_us\n{rows}"), notes=notes).num_ranks == 2
    assert notes == ([f"gpu {names[0]}, {names[1]}: one rank each, as of one group"] if said else [])


@pytest.mark.parametrize(("name", "told"), [("source", "simulation"), ("method", "Roofline"), ("mode", "estimated")])
def test_times_that_were_computed_are_refused(tmp_path: Path, name: str, told: str) -> None:
    path = table(tmp_path, f"assignments,time_us,{name}", f",{told}")
    with pytest.raises(InputError, match=f"{name}: got {told}; times that were measured; .*--repeat-column '{name}'"):
        read_table(path)
    assert loads(read_table(path, repeat=[name])) == [(n, None, 50.0 + n) for n in NS]
    rows = "".join(f"{n},{n},{told}\n{n},{2 * n},silicon\n" for n in NS)
    path = written(tmp_path, f"assignments,time_us,{name}\n{rows}")
    with pytest.raises(InputError, match=f"--where '{name}=silicon'"):
        read_table(path)
    assert loads(read_table(path, where=[f"{name}=silicon"])) == [(n, None, 2 * n) for n in NS]
    assert read_table(table(tmp_path, "assignments,time_us,routing", f",{told}")).num_ranks == 1

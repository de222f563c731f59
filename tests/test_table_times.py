"""Which column of a kernel table is the time of a layer, by its name, and which repeats are of one load."""

from __future__ import annotations

import re
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
    "column",
    ["latency_microsec", "time_usecs", "time (microsecond)", "us", "us_per_iter", "us/call", "per_layer_us"],
)
def test_more_spellings_of_microseconds(tmp_path: Path, column: str) -> None:
    assert loads(read_table(table(tmp_path, f"assignments,{column}", ""))) == [(n, None, 50.0 + n) for n in NS]


def test_times_per_token_or_per_second_are_none_of_a_run(tmp_path: Path) -> None:
    for column in ("us_per_token", "tokens_per_s", "us_per_expert", "inter_token_latency_us", "time_to_first_token_us"):
        with pytest.raises(InputError, match=r"columns assignments|the time of one whole MoE layer"):
            read_table(table(tmp_path, f"assignments,{column}", ""))


def test_numbers_of_repeats_are_no_times(tmp_path: Path) -> None:
    path = table(tmp_path, "assignments,latency_us_mean,latency_us_std,latency_us_count", ",0.5,30")
    assert loads(read_table(path)) == [(n, None, 50.0 + n) for n in NS]


def test_a_column_that_says_the_unit_of_all_times(tmp_path: Path) -> None:
    assert loads(read_table(table(tmp_path, "n_tokens,latency,unit", ",us"))) == [(n, None, 50.0 + n) for n in NS]
    assert loads(read_table(table(tmp_path, "n_tokens,latency,unit", ",ms"))) == [(n, None, 1e3 * (50 + n)) for n in NS]
    mixed = written(tmp_path, "n_tokens,latency,unit\n1,50,us\n2,0.051,ms\n")
    with pytest.raises(InputError, match="say which: --time-column 'latency:ms'"):
        read_table(mixed)


def test_tokens_are_the_load_beside_sequences(tmp_path: Path) -> None:
    longer = written(tmp_path, "batch_size,n_tokens,time_us\n" + "".join(f"{n},{4 * n},{50 + n}\n" for n in NS))
    assert loads(read_table(longer, unit="tokens", top_k=2)) == [(8 * n, None, 50.0 + n) for n in NS]


def test_nsys_summaries_give_the_median_of_a_run(tmp_path: Path) -> None:
    header = "assignments,Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Name\n"
    rows = "".join(f"{n},60.1,{(50 + n) * 1e5},100,{(51 + n) * 1e3},{(50 + n) * 1e3},1,9e9,1,moe\n" for n in NS)
    notes: list[str] = []
    path = written(tmp_path, header + rows)
    assert loads(read_table(path, notes=notes)) == [(n, None, 50.0 + n) for n in NS]
    assert notes == ["means over Instances, it seems: of a kernel or of a whole layer, which may launch several?"]


def test_times_of_all_layers_of_llama_bench_are_refused(tmp_path: Path) -> None:
    text = "n_gpu_layers,n_prompt,test_time,avg_ns\n"
    text += "".join(f"99,{n},2026-01-01T00:00:{n:02}Z,{1000 * n}\n" for n in NS)
    with pytest.raises(InputError, match="avg_ns beside n_gpu_layers 99"):
        read_table(written(tmp_path, text), load="n_prompt", unit=Unit.TOKENS, top_k=8)


def test_hints_name_the_unit_of_a_column_for_each_device(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'latency_ms_rank1:ms'"):
        read_table(written(tmp_path, "assignments,latency_ms_rank1,latency_ms_rank2\n1,5,6\n"))


@pytest.mark.parametrize("rows", ["8,50\n8,500\n", "8,50\n8,51\n8,49\n8,500\n8,510\n8,505\n", "8,50\n8,5000\n16,60\n"])
def test_times_of_one_load_that_differ_manyfold_are_refused(tmp_path: Path, rows: str) -> None:
    path = written(tmp_path, f"assignments,time_us\n{rows}")
    with pytest.raises(InputError) as error:
        read_table(path)
    assert "for one load; repeats that agree within threefold" in one_line(error)
    assert "--repeat-column 'time_us'" in one_line(error)
    times = sorted(float(line.split(",")[1]) for line in rows.splitlines() if line.startswith("8,"))
    median = (times[len(times) // 2 - 1] + times[len(times) // 2]) / 2
    assert loads(read_table(path, repeat=["time_us"]))[0] == (8, None, median)


def test_a_first_run_among_several_does_not_count(tmp_path: Path) -> None:
    path = written(tmp_path, "assignments,time_us\n8,5000\n8,51\n8,50\n8,52\n")
    assert loads(read_table(path)) == [(8, None, 51.5)]


@pytest.mark.parametrize("name", ["n_layer", "num_layer", "nlayers"])
def test_times_of_several_layers_by_more_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"beside {name} 48"):
        read_table(table(tmp_path, f"assignments,time_us,{name}", ",48"))
    assert len(read_table(table(tmp_path, f"assignments,time_us,{name}", ",1")).devices[0].samples) == len(NS)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Tuned (us)", True),
        ("grouped_gemm_us", True),
        ("\u603b\u8017\u65f6(us)", True),
        ("latencia m\u00e1xima us", True),
        ("fused_moe_kernel_us", False),
        ("avg GPU time (\u00b5s)", False),
        ("p50_latency_us", False),
    ],
)
def test_a_time_whose_name_says_more_than_is_understood_is_named(tmp_path: Path, name: str, said: bool) -> None:
    notes: list[str] = []
    path = table(tmp_path, f"assignments,{name}", "")
    assert loads(read_table(path, notes=notes)) == [(n, None, 50.0 + n) for n in NS]
    assert len(notes) == said and all(note.startswith(f"{name} taken for the time of one whole MoE") for note in notes)
    read_table(path, time=f"{name}:us", notes=notes)
    assert len(notes) == said  # it was asked for


@pytest.mark.parametrize("name", ["p75_us", "p99.9 (us)", "maximum_us", "minimum latency (us)", "tail_us", "max_us"])
def test_neither_median_nor_mean_is_asked_for(tmp_path: Path, name: str) -> None:
    path = table(tmp_path, f"assignments,{name}", "")
    with pytest.raises(InputError) as error:
        read_table(path)
    assert f"times {name}; the median or mean of repeats; to take one all the same" in one_line(error)
    assert loads(read_table(path, time=name))[0] == (1, None, 51.0)
    path = written(tmp_path, f"assignments,median_us,{name}\n" + "".join(f"{n},{n},{9 * n}\n" for n in NS))
    assert loads(read_table(path)) == [(n, None, n) for n in NS]


@pytest.mark.parametrize(
    "name", ["theoretical_us", "sol_us", "simulated (us)", "cold_us", "estimated_us", "mla_us", "cumulative_us"]
)
def test_times_that_were_not_measured_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError) as error:
        read_table(table(tmp_path, f"assignments,{name}", ""))
    assert "the time of one whole MoE layer; if it is: --time-column" in one_line(error)


def test_the_likelier_of_several_times_is_offered(tmp_path: Path) -> None:
    path = table(tmp_path, "assignments,total_us,act_us,gemm1_us", ",5,20")
    with pytest.raises(InputError, match="say which: --time-column 'total_us'"):
        read_table(path)
    path = table(tmp_path, "assignments,time_stats.moe_shuffling.median,time_stats.moe_grouped_gemm.median", ",20")
    with pytest.raises(InputError, match=r"say which: --time-column 'time_stats\.moe_grouped_gemm\.median:ms'"):
        read_table(path)


def test_a_total_may_hold_the_exchange_beside_it(tmp_path: Path) -> None:
    for column, advised in (("gemm_us", "gemm_us"), ("gate_up_us,down_us", "gate_up_us+down_us")):
        path = table(tmp_path, f"assignments,total_us,dispatch_us,{column}", ",5,20,20"[: 5 + 3 * column.count(",")])
        with pytest.raises(InputError, match=rf"--time-column '{re.escape(advised)}'"):
            read_table(path)
    notes: list[str] = []
    read_table(path, time="total_us", notes=notes)
    assert notes == ["total_us beside dispatch_us: is it without them? a topology adds exchanges of tokens"]


def test_rows_of_one_load_that_nothing_tells_apart_are_named(tmp_path: Path) -> None:
    """As of two tables, one below the other."""
    rows = "".join(f"{n},{us + n}\n" for us in (50, 58) for n in NS)
    notes: list[str] = []
    path = written(tmp_path, f"assignments,time_us\n{rows}")
    assert loads(read_table(path, notes=notes)) == [(n, None, 54.0 + n) for n in NS]
    assert notes == ["4 of 4 loads have up to 2 rows that no column tells apart: their medians are taken"]
    numbered = "".join(f"{run},{n},{50 + 3 * run + n}\n" for run in (0, 1) for n in NS)
    notes.clear()
    read_table(written(tmp_path, f"run,assignments,time_us\n{numbered}"), notes=notes)
    assert notes == []


def test_times_that_were_copied_to_other_loads_are_named(tmp_path: Path) -> None:
    """As in one of AMD's tables of tuned kernels."""
    notes: list[str] = []
    text = "assignments,time_us\n" + "".join(f"{n},{us}\n" for n, us in zip(NS, (90.5, *3 * [275.4024]), strict=True))
    assert len(loads(read_table(written(tmp_path, text), notes=notes))) == len(NS)
    assert notes[:1] == ["3 loads from 2 to 8 take exactly 275.4024 us: copied, not measured?"]
    for coarse in ("275.4", "62.464", "180.064"):  # clocks that tick in 0.1, 1.024 and 0.032 us
        notes.clear()
        read_table(written(tmp_path, text.replace("275.4024", coarse)), notes=notes)
        assert not any("exactly" in note for note in notes)


@pytest.mark.parametrize(
    ("name", "factor"),
    [("latency_us_mean", 1.0), ("latency_ms_p50", 1e3), ("moe_ns_median", 1e-3), ("time_s_avg", 1e6)],
)
def test_a_statistic_after_the_unit(tmp_path: Path, name: str, factor: float) -> None:
    """Of `latency_us_mean` a hint offered milliseconds, and they were taken."""
    rows = "".join(f"{n},{50 + n},3\n" for n in NS)
    path = written(tmp_path, f"assignments,{name},{name.rpartition('_')[0]}_std\n{rows}")
    assert loads(read_table(path)) == [(n, None, pytest.approx((50 + n) * factor)) for n in NS]


def test_a_unit_within_a_name_is_heeded(tmp_path: Path) -> None:
    rows = "".join(f"{n},{50 + n}\n" for n in NS)
    path = written(tmp_path, f"assignments,latency_us_fused\n{rows}")
    with pytest.raises(InputError, match="say which: --time-column 'latency_us_fused:us'"):
        read_table(path)
    assert loads(read_table(path, time="latency_us_fused:us"))[0] == (NS[0], None, 50.0 + NS[0])
    with pytest.raises(InputError, match="us, as its name says"):
        read_table(path, time="latency_us_fused:ms")
    path = written(tmp_path, f"assignments,time_second_run\n{rows}")
    with pytest.raises(InputError, match="say which: --time-column 'time_second_run:ms', or :us"):
        read_table(path)
    assert loads(read_table(path, time="time_second_run:us"))[0] == (NS[0], None, 50.0 + NS[0])


@pytest.mark.parametrize("statistics", ["median_us", "mean_us", "min_us,max_us", "p99_us"])
@pytest.mark.parametrize("other", ["total_us", "elapsed_us", "torch_us", "duration_us"])
def test_a_time_that_the_statistics_beside_it_are_not_of_is_asked_for(
    tmp_path: Path, statistics: str, other: str
) -> None:
    names = statistics.split(",")
    rows = "".join(f"{n},{','.join(str(40 + n + at) for at in range(len(names)))},{5000 + n}\n" for n in NS)
    with pytest.raises(InputError, match=f"times {', '.join(names)}, {other}; one column"):
        read_table(written(tmp_path, f"assignments,{statistics},{other}\n{rows}"))


@pytest.mark.parametrize("more", ["mean_us,std_us", "min_us,max_us", "min_us,p99_us", "median_us,torch_median_us"])
def test_a_time_beside_its_own_statistics_is_taken(tmp_path: Path, more: str) -> None:
    path = table(tmp_path, f"assignments,latency_us,{more}", ",45,900" if "p99" in more or "max" in more else ",60,150")
    assert loads(read_table(path)) == [(n, None, 50.0 + n) for n in NS]


@pytest.mark.parametrize("more,cells", [
    ("dispatch_mean_us", "1234"), ("cpu_time_avg_us", "1234"), ("attn_max_us", "1234"),
    ("min_run_time_s", "9999"), ("p99_us", ["60", "61", "-", "-"]), ("mean_us", ["51", "52", "nan", "nan"]),
])  # fmt: skip
def test_statistics_of_something_else_or_of_no_run_leave_a_time_alone(tmp_path: Path, more: str, cells: str) -> None:
    rows = "".join(f"{n},{50 + n},{cell}\n" for n, cell in zip(NS, cells, strict=True))
    path = written(tmp_path, f"assignments,time_us,{more}\n{rows}")
    assert loads(read_table(path)) == [(n, None, 50.0 + n) for n in NS]

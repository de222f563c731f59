"""Kernel tables become profiles: units, names of columns, and rows that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kernel_tables import loads, written

from gemopt.exceptions import InputError
from gemopt.formats.tables.kernel import Unit, read_table


@pytest.mark.parametrize(
    ("unit", "top_k", "ep", "expected"),
    [
        (Unit.ASSIGNMENTS, None, None, [1, 6, 64, 1024]),
        (Unit.TOKENS, 4, None, [4, 24, 256, 4096]),
        (Unit.GROUP_TOKENS, 4, 8, [1, 3, 32, 512]),  # one token of the group: half an assignment per rank, so one
        (Unit.GROUP_TOKENS, 8, 2, [4, 24, 256, 4096]),
    ],
)
def test_units(tmp_path: Path, unit: Unit, top_k: int | None, ep: int | None, expected: list[int]) -> None:
    path = written(tmp_path, "tokens,latency_us\n1,10\n6,11\n64,12\n1024,13\n")
    profile = read_table(path, unit=unit, top_k=top_k, ep=ep)
    assert loads(profile) == [(n, None, 10.0 + i) for i, n in enumerate(expected)]
    assert profile.model.top_k == top_k and profile.mode == "table"


@pytest.mark.parametrize("load", ["tokens", "num_tokens", "assignments"])
@pytest.mark.parametrize(
    ("latency", "factor"),
    [("latency_us", 1), ("time_us", 1), ("latency_ms", 1e3), ("time_ms", 1e3), ("latency_ns", 1e-3)],
)
@pytest.mark.parametrize("active", ["active_experts", "activated_experts"])
def test_column_names_and_units(tmp_path: Path, load: str, latency: str, factor: float, active: str) -> None:
    path = written(tmp_path, f"{latency}, {active} ,other,{load}\n2.5, 3,x,8\n\n4,4,x,16\n")
    assert loads(read_table(path)) == [(8, 3, pytest.approx(2.5 * factor)), (16, 4, pytest.approx(4 * factor))]


def test_repeated_rows_merge_to_their_median(tmp_path: Path) -> None:
    path = written(tmp_path, "\ufefftokens,latency_us\n8,1\n8,5\n4,7\n8,2\n")
    low, high = read_table(path).devices[0].samples
    assert (low.assignments, low.latency_us, low.spread_us, low.repeats) == (4, 7.0, None, 1)
    assert (high.assignments, high.latency_us, high.spread_us, high.repeats) == (8, 2.0, 1.0, 3)


def test_a_rank_column_gives_one_device_each(tmp_path: Path) -> None:
    profile = read_table(written(tmp_path, "tokens,latency_us,rank\n8,1,1\n8,2,0\n16,3,1\n"))
    assert [loads(profile, rank) for rank in range(2)] == [[(8, None, 2.0)], [(8, None, 1.0), (16, None, 3.0)]]


BAD_TABLES = {
    "empty": ("", "no rows"),
    "header only": ("tokens,latency_us\n", "no rows"),
    "no load": ("batch,latency_us\n1,2\n", "tokens or num_tokens or n_tokens"),
    "no latency": ("tokens,speed\n1,2\n", "latency_us or time_us"),
    "text": ("tokens,latency_us\n1,fast\n", "line 2, latency_us: got fast"),
    "NaN": ("tokens,latency_us\n1,2\n2,nan\n", "line 3, latency_us"),
    "infinite": ("tokens,latency_us\n1,inf\n", "line 2"),
    "negative": ("tokens,latency_us\n-1,2\n", "line 2, tokens: got -1"),
    "no time": ("tokens,latency_us\n1,5\n2,52.7\n2,0\n4,61.9\n", "line 4, latency_us: got 0; above 0: work takes time"),
    "one column twice": ("tokens,latency_us,latency_us\n1,5,6\n", "columns latency_us twice"),
    "two times": ("tokens,latency_us,kernel_time_us\n1,5,6\n", "--time-column 'latency_us'"),
    "a time without a unit": ("tokens,latency\n1,5\n", "--time-column 'latency:ms'"),
    "tokens as assignments": ("num_tokens,topk,latency_us\n1,8,5\n", "--unit tokens, group-tokens or assignments"),
    "batches without top-k": ("batch_size,kernel_time_us\n1,5\n", "--top-k"),
    "tokens beside ranks": ("num_tokens,ep_size,latency_us\n1,8,5\n", "--unit tokens, group-tokens or assignments"),
    "thousands as fractions": ("assignments,latency_us\n1,5\n1.024,6\n", "line 3, assignments: got 1.024"),
    "decimal commas": ("assignments;latency_us\n1;5,5\n", "line 2, latency_us: got 5,5"),
    "a column per device": (
        "tokens,latency_us,latency_us_rank1\n1,5,6\n",
        "columns latency_us_rank1; one line per device",
    ),
    "a second time without a unit": ("tokens,latency_us,latency_1\n1,5,6\n", "times latency_us, latency_1"),
    "a second time in micro signs": ("tokens,latency (\u00b5s),total (ms)\n1,5,6\n", "latency (\u00b5s), total (ms)"),
    "an unnamed device": ("gpu,tokens,latency_us\n0,1,5\n,2,6\n1,1,7\n,2,8\n", "line 3, gpu: got nothing"),
    "a nameless column": (
        ",tokens,latency_us\n0,1,5\n0,2,6\n1,1,7\n1,2,8\n",
        "line 2 and line 4: got rows that differ",
    ),
    "a flag": ("tokens,error,latency_us\n1,0,5\n2,0,6\n4,1,1\n", "line 4, error: got 1; rows of runs that went well"),
    "a swept statistic": (
        "tokens,cv,latency_us\n" + "".join(f"{n},{cv},{n + 9 * cv}\n" for n in (1, 2, 4, 8) for cv in (0, 0.5, 1.2)),
        "differ in cv; one curve needs rows of one kind: cv: 0, 0.5, 1.2",
    ),
    "many runs": ("assignments,iters,total_ms\n1,100,5\n", "time total_ms beside iters 100; the time of one whole"),
    "all layers": ("assignments,num_layers,latency_ms\n1,58,5\n", "time latency_ms beside num_layers 58"),
    "a request": ("batch_size,tpot_ms\n1,5\n", "time tpot_ms; the time of one whole MoE layer"),
    "a part": ("assignments,dispatch_us\n1,5\n", "if it is: --time-column 'dispatch_us'"),
    "a share": ("tokens,latency_per_token_us\n1,5\n", "if it is: --time-column 'latency_per_token_us:us'"),
    "an exchange": ("assignments,op_name,latency_us\n1,alltoall_dispatch,5\n", "op_name: got alltoall_dispatch"),
    "sequences": ("batch_size,input_len,top_k,latency_us\n1,1024,8,5\n", "does batch_size count tokens, or sequences?"),
    "JSON of other things": (
        '{"traceEvents": [{"name": "moe", "dur": 5}]}',
        "a trace of events; rows of loads and times",
    ),
    "JSON that is cut": ('[{"tokens": 1, "latency_us": 5}, {"tok', "JSON that is cut or wrong"),
    "a key twice": ('[{"tokens": 1, "tokens": 2, "latency_us": 5}]', "a key twice in one object"),
    "a pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:6a\nsize 9\n", "git lfs pull"),
    "a workbook": ("PK\x03\x04", "save it as CSV"),
    "all layers by another name": ("assignments,moe_layers,latency_us\n1,58,5\n", "beside moe_layers 58"),
    "all layers in its name": ("assignments,all_layers_us\n1,290\n", "time all_layers_us; the time of one whole"),
    "a share of the experts": (
        "tokens,num_experts,local_num_experts,top_k,latency_us\n8,256,32,8,5\n",
        "give --unit tokens, group-tokens or assignments",
    ),
    "tuned settings": ('{"1": {"BLOCK_SIZE_M": 16}}', "run benchmark_moe without --tune"),
    "a log that was cut": ("Batch size: 8, config: {}\n", "line 1: got no time for batch size 8"),
    "two batches, one time": (
        "Batch size: 8, config: {}\nBatch size: 9, config: {}\nKernel time: 5.00 us\n",
        "line 2: got no time for batch size 8",
    ),
    "a time alone": ("Kernel time: 5.00 us\n", "line 1: got Kernel time"),
    "a failed time": ("Batch size: 8, config: {}\nKernel time: inf us\n", "line 2: got Kernel time: inf us"),
    "a ratio": ("assignments,normalized_us\n1,5\n", "time normalized_us; the time of one whole MoE layer"),
    "a total beside instances": ("assignments,Total Time (ns),Instances\n1,500,100\n", "beside Instances 100"),
    "a total beside calls": ("assignments,TotalDurationNs,Calls\n1,500,100\n", "beside Calls 100"),
    "the likelier time": ("assignments,cpu_time_us,cuda_time_us\n1,500,5\n", "--time-column 'cuda_time_us'"),
    "parts": ("assignments,gemm,time_us\n1,gate_up,5\n1,down,3\n", "--sum-column gemm adds them up"),
    "numbered parts": (
        "assignments,stage,time_us\n1,1,5\n1,2,3\n",
        "where one is a whole layer: --where stage=VALUE --repeat-column stage",
    ),
    "grouped times": ("assignments;time_us\n1;10\n64;200\n128;1.240\n", "line 4, time_us: got 1.240"),
    "grouped loads": ("assignments,time_us\n1.000,10\n2.000,11\n4.000,12\n", "write 1000 or 1.0"),
    "a printed cell that is missing": (
        "assignments   us\n        1   10\n        2     \n",
        "got assignments us; columns that commas",
    ),
    "a printed cell of another column below a rule": (
        "M    n     us\n-------------\n1        10.5\n2        11.5\n",
        "got M n us; columns that commas",
    ),
    "a printed cell of another column": ("M   n    us\n1        10\n2        11\n", "got M n us; columns that commas"),
    "devices named as parts": ("dev,assignments,us\ncpu:0,1,5\ncpu:1,1,6\n", "rows that differ in dev"),
    "training": ("assignments,fwd_bwd_ms\n1,5\n", "time fwd_bwd_ms"),
    "a mean of devices": ("gpu,assignments,us\n0,1,5\navg,1,5\n1,1,5\n", "line 3, gpu: got avg; one device"),
    "a total below the bars": (
        "| tokens | us |\n|---|---|\n| 1 | 5 |\n| **Total** | 5 |\n",
        "line 4, tokens: got Total",
    ),
    "cells in another unit": (
        "assignments,latency_us\n1,5 us\n2,1.5 ms\n",
        "line 3, latency_us: got 1.5 ms; times in us",
    ),
    "overflowing load": ("tokens,latency_us\n3e9,2\n", "line 2, tokens"),
    "overflowing latency": ("tokens,latency_ms\n1,2e9\n", "line 2, latency_ms"),
    "missing cell": ("tokens,latency_us\n1,2\n\n3\n", "line 4: got 1 columns; 2 columns"),
    "extra cell": ("tokens,latency_us\n1,2,3\n", "line 2: got 3 columns"),
    "empty cell": ("tokens,latency_us\n1,\n", "line 2, latency_us: got nothing"),
    "half an expert": ("tokens,active_experts,latency_us\n8,1.5,2\n", "line 2, active_experts"),
    "more active than rows": ("tokens,active_experts,latency_us\n8,9,2\n", "--unit and --top-k"),
    "no active": ("tokens,active_experts,latency_us\n8,0,2\n", "active"),
    "rank missing": ("tokens,latency_us,rank\n1,2,1\n", "rank"),
    "rank text": ("tokens,latency_us,rank\n1,2,a\n", "line 2, rank"),
    "quotes": ('tokens,latency_us\n"1,2\n', "table.csv"),
    "binary": ("\x00\x01\x02", "table.csv"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_wrong_table_names_its_line(tmp_path: Path, case: str) -> None:
    text, named = BAD_TABLES[case]
    with pytest.raises(InputError) as error:
        read_table(written(tmp_path, text))
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (",tokens,latency_us\n0,8,2.5\n1,16,4\n", [2.5, 4]),
        ("Unnamed: 0;tokens;latency_us\n0;8;2.5\n1;16;4\n", [2.5, 4]),
        ("tokens\tlatency (\u00b5s)\n8\t2.5\n16\t4\n", [2.5, 4]),
        ("tokens,latency_s,throughput_per_s\n8,2.5e-6,3e6\n16,4e-6,4e6\n", [2.5, 4]),
    ],
)
def test_indices_separators_and_units_that_people_write(tmp_path: Path, text: str, expected: list[float]) -> None:
    assert loads(read_table(written(tmp_path, text))) == [
        (n, None, pytest.approx(us)) for n, us in zip((8, 16), expected, strict=True)
    ]


@pytest.mark.parametrize(
    ("text", "options", "named"),
    [
        ("tokens,latency_us\n1,5\n", {"top_k": 8}, "8 experts per token, does tokens count tokens?"),
        ("tokens,latency_us\n1,5\n", {"ep": 8}, "--ep: got 8; assignments are those of one rank"),
        ("tokens,latency_us\n1,5\n", {"ep": 8, "top_k": 2, "unit": Unit.TOKENS}, "--ep: got 8"),
        ("assignments,latency_us\n1,5\n", {"top_k": 8, "unit": Unit.TOKENS}, "counts assignments"),
    ],
)
def test_units_that_contradict_are_refused(tmp_path: Path, text: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as error:
        read_table(written(tmp_path, text), **options)
    assert named in str(error.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"tokens,latency_us\n\xff\xfe,1\n")
    with pytest.raises(InputError, match="UTF-8"):
        read_table(tmp_path / "t.csv")


def test_tokens_of_a_device_with_a_share_of_the_experts_are_those_of_the_group(tmp_path: Path) -> None:
    path = written(tmp_path, "tokens,num_experts,local_num_experts,top_k,latency_us\n8,256,32,8,5\n64,256,32,8,6\n")
    with pytest.raises(InputError, match="one in 8 of the experts is on the device"):
        read_table(path, unit=Unit.TOKENS)
    assert loads(read_table(path, unit=Unit.GROUP_TOKENS)) == [(8, None, 5.0), (64, None, 6.0)]


PRINTED = {
    "Markdown": "| tokens | Tuned (us) | Speedup |\n|---:|---:|:--|\n| 1 | 10.5 | 1.02x |\n| 64 | **12** | 2\u00d7 |\n",
    "Markdown without outer bars": "tokens | us\n-- | --\n1 | 10.5\n64 | 12\n",
    "a grid": "+---+---+\n| tokens | us |\n+===+===+\n| 1 | 10.5 |\n+---+---+\n| 64 | 12 |\n+---+---+\n",
    "pandas": "moe:\n   tokens  Time (us)\n7     1.0       10.5\n8    64.0       12.0\n",
    "pandas with blanks": "      gpu  tokens   us\n0  H100 A       1 10.5\n1  H100 A      64 12.0\n",
    "pandas with blanks in names": "  gpu name  tokens Time (us)\n"
    "0   H100 A       1      10.5\n1   H100 A      64      12.0\n",
    "pandas without its index": "   gpu tokens   us\nH100 A      1 10.5\nH100 A     64 12.0\n",
    "pandas with blanks in a name and single ones between": " tokens  Time (us) dtype  gpu\n"
    "      1       10.5  bf16 H100\n     64       12.0  bf16 H100\n",
    "ruled off": "  tokens    us\n--------  ----\n       1  10.5\n      64  12\n",
    "ruled off as a whole": "tokens     us\n-------------\n1        10.5\n64       12.0\n",
    "ruled off thrice": "======  ====\ntokens  us\n======  ====\n1       10.5\n64      12\n======  ====\n",
    "a drawn box": "\u250f\u2501\u2501\u2533\u2501\u2501\u2513\n\u2503 tokens \u2503 us \u2503\n"
    "\u2521\u2501\u2501\u2547\u2501\u2501\u2529\n\u2502 1 \u2502 10.5 \u2502\n\u2502 64 \u2502 12 \u2502\n"
    "\u2514\u2500\u2500\u2534\u2500\u2500\u2518\n",
    "single blanks": "tokens us\n1 10.5\n64 12\n",
    "Excel": "sep=;\ntokens;us\n1;10.5\n64;12\n",
    "comments": "# H100, mine\n#\ntokens,us\n1,10.5\n64,12\n",
    "a commented header": "# measured\n# tokens,us\n1.0,10.5\n64.0,12\n",
    "JSON": '[{"tokens": 1, "us": 10.5, "why": null}, {"tokens": 64, "us": 12}]',
    "JSON by lines": '{"tokens": 1, "us": 10.5}\n{"us": 12, "std_us": 0.1, "tokens": 64}\n',
    "JSON by columns": '{"tokens": [1, 64], "us": [10.5, 12]}',
    "JSON as pandas writes it": '{"tokens": {"0": 1, "1": 64}, "us": {"0": 10.5, "1": 12}}',
    "UTF-16": "\ufefftokens,us\n1,10.5\n64,12\n",
    "one line per batch": "Batch size: 1, Kernel time: 10.50 us\nBatch size: 64, Kernel time: 12.00 us\n",
    "settings beside the time": "Batch size: 1, config: {'M': 1}, kernel time: 10.50 us\n"
    "Batch size: 64, config: {'M': 2}, kernel time: 12.00 us\n",
}


@pytest.mark.parametrize("case", PRINTED)
def test_tables_as_people_paste_them(tmp_path: Path, case: str) -> None:
    path = tmp_path / "table.txt"
    path.write_bytes(PRINTED[case].encode("utf-16-le" if case == "UTF-16" else "utf-8"))
    assert loads(read_table(path, unit=Unit.TOKENS, top_k=2)) == [(2, None, 10.5), (128, None, 12.0)]


def test_a_load_of_any_name_with_its_unit(tmp_path: Path) -> None:
    path = written(tmp_path, "M,latency_us\n1,10\n64,12\n")
    assert loads(read_table(path, unit=Unit.TOKENS, top_k=2, load="M")) == [(2, None, 10), (128, None, 12)]
    for load, unit, said in (("M", None, "what does M count?"), ("N", Unit.TOKENS, "--load-column: got N")):
        with pytest.raises(InputError, match=said):
            read_table(path, unit=unit, top_k=2, load=load)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tokens,time_us\n1,10\n", ["tokens counted as assignments"]),
        ("assignments,time_us\n1,10\n64,9\n", []),
        ("assignments,time_us\n1,0.05\n64,0.09\n", ["1 assignments: 0.05 us, and no load takes less: is the unit"]),
        ("assignments,time_ms\n1,50\n64,90\n", ["1 assignments: 5e+04 us, and no load takes less: is the unit"]),
        ("assignments,time_us\n1,15234\n64,12\n128,10\n", ["1 assignments: 1.523e+04 us, but 128 assignments: 10 us"]),
        ("assignments,time_us\n1,10\n64,12\n256,50\n", []),
        ("assignments,time_us\n1,10\n64,12\n256,500\n", ["256 assignments: 500 us, but 64 assignments: 12 us"]),
        ("assignments,active_experts,time_us\n1,1,10\n8,8,40\n64,1,12\n", []),
        ("rank,assignments,time_us\n0,8,10\n0,64,20\n1,8,10\n", ["rank 1 was measured up to 8 assignments, rank 0 up"]),
        ("rank,assignments,time_us\n0,0,0\n1,0,9\n", []),
        ("rank,assignments,time_us\n0,8,10\n1,8,12\n2,8,900\n", ["rank 2 takes 900 us and rank 0 10"]),
    ],
)  # fmt: skip
def test_what_is_assumed_or_hardly_right_is_said(tmp_path: Path, text: str, said: list[str]) -> None:
    notes: list[str] = []
    read_table(written(tmp_path, text), notes=notes)
    assert len(notes) == len(said) and all(part in note for part, note in zip(said, notes, strict=True))


@pytest.mark.parametrize(("unit", "top_k", "ep"), [("tokens", None, None), ("tokens", 0, None), ("group-tokens", 4, 0)])
def test_units_need_their_factors(tmp_path: Path, unit: str, top_k: int | None, ep: int | None) -> None:
    with pytest.raises(InputError, match=r"--top-k|--ep"):
        read_table(written(tmp_path, "tokens,latency_us\n1,2\n"), unit=Unit(unit), top_k=top_k, ep=ep)

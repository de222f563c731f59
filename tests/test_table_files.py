"""Files that are packed, no text, or not only a table; cells that are no numbers."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from kernel_tables import loads, written
from one_liners import one_line

from gemopt.exceptions import InputError
from gemopt.formats.tables.kernel import read_table

TEXT = b"assignments,us\n1,10.5\n64,12\n"


@pytest.mark.parametrize(("pack", "suffix"), [(gzip.compress, "gz"), (bz2.compress, "bz2"), (lzma.compress, "xz")])
def test_packed_tables_are_read_and_cut_ones_named(tmp_path: Path, pack: Callable[[bytes], bytes], suffix: str) -> None:
    path = tmp_path / "table.csv"  # told by its content
    path.write_bytes(pack(TEXT))
    assert loads(read_table(path)) == [(1, None, 10.5), (64, None, 12.0)]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=rf"a packed file that is cut; a complete \.{suffix} file"):
        read_table(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a workbook of Excel"),
        (b"\x28\xb5\x2f\xfd\x04\x00", "a file packed by zstd; a table as text or parquet; unpack it: zstd -d"),
        (b"SQLite format 3\0", "nsys stats --format csv"),
        (b"\x93NUMPY\x01\0", "binary data; a table as text or parquet"),
        (b"ARROW1\0\0", "binary data"),
        (b"<html>\n<table>", "HTML"),
        (b"%PDF-1.7\n", "a PDF"),
        (
            "assignments;Latenz (\u00b5s)\n".encode("cp1252"),
            "byte 0xb5 in line 1; text in UTF-8; save it as 'CSV UTF-8'",
        ),
        ("tokens,us\n1,5\n# \u6279\n".encode("gbk"), "in line 3; text in UTF-8"),
    ],
)
def test_what_is_no_text_is_told(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(data)
    with pytest.raises(InputError) as error:
        read_table(path)
    assert said in one_line(error)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("assignments,us\n1,5\n2,OOM\n", "line 3, us: got OOM; a number from 0 to 1e+12; a failed run"),
        ("assignments,us\n1,5\n2,N/A\n", "got N/A; a number from 0 to 1e+12; a failed run"),
        (
            "assignments,latency_us\n(rows),(us)\n1,5\n",
            "got (rows); a number from 0 to 2147483647; a failed run, or a row",
        ),
        ("assignments,us\n1,33.3 (+2 %)\n", "the number alone, without its unit or a note"),
        ("assignments,us\n1,33.3 (xbf16 16x128)\n", "the number alone, without its unit or a note"),
        ("rank,assignments,us\nrank0,1,5\n", "rank: got rank0; a number from 0 to 2147483647; the number alone"),
        ("assignments,us\n1k,33.3\n", "the number alone, without its unit or a note"),
        ('assignments,us\n1,"1,024.5"\n', "a dot before decimals, and nothing between thousands"),
        (
            "assignments,us\n1,5\n2,6\nSource: lab\n",
            "line 4: got 1 columns; 2 columns, as in the header; leave out titles",
        ),
        ("MoE on B200\n\nassignments,us\n1,5\n", "got MoE on B200; columns that commas"),
        ("MoE on B200\nassignments;us\n1;5\n", "leave out the title above the header"),
        ("[---- fused_moe ----]\n      |  triton\nM=1   |  55.1\n", "got [---- fused_moe ----]; columns that commas"),
    ],
)
def test_cells_and_lines_that_are_none_of_a_table(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        read_table(written(tmp_path, text))
    assert said in one_line(error)


NUMBERS = [(8, None, 20.5), (512, None, 90.25), (16384, None, 1234.5)]


@pytest.mark.parametrize(
    "text",
    [
        "assignments;latency_us\n8;20,5\n512;90,25\n16384;1234,5\n",
        "assignments\tlatency_us\tspeedup\n8\t20,5\t1,31x\n512\t90,25\t0,98x\n16.384\t1.234,5\t1,02x\n",
        'assignments,latency_us\n8,20.5\n512,90.25\n"16,384","1,234.5"\n',
        'assignments,latency_ns\n8,"20,500"\n512,"90,250"\n"16,384","1,234,500"\n',
        "assignments;latency_us\n8;20.5\n512;90.25\n16 384;1\u202f234.5\n",
        "assignments;latency_us\n8;20.500\n512;90.250\n16 384;1 234.500\n",
        "assignments,latency\n8,20.5 us\n512,90.25us\n16384,1.2345 ms\n",
        "assignments;Zeit (ms)\n8;0,0205 ms\n512;0,09025 ms\n16384;1,2345 ms\n",
        "| assignments | Latency | Rate |\n|--|--|--|\n| 8 | 20.5 \u00b5s | 390,244 tok/s |\n"
        "| 512 | 90.25 \u00b5s | 5,673,130 tok/s |\n| 16,384 | 1,234.5 \u00b5s | 13,271,769 tok/s |\n",
    ],
)
def test_numbers_as_spreadsheets_and_people_write_them(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    found = loads(read_table(path))
    assert [(load, active, round(us, 9)) for load, active, us in found] == NUMBERS


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("assignments;us\n8;20,512\n512;90,250\n", "line 2, us: got 20,512; a number from 0 to 1e+12; a dot before"),
        ("assignments;us\n8;20,5\n512;1.002\n", "line 2, us: got 20,5; a number from 0 to 1e+12; a dot before"),
        ("assignments;us\n8;20,5\n512;OOM\n", "line 3, us: got OOM"),
        ("assignments;ns\n8;20.512\n512;90.250\n", "ns: got 20.512; a fraction, or thousands?"),
        ("assignments;time\n8;900 us\n64;1,5 ms\n512;1.002 ms\n", "line 3, time (us): got 1,5 x 1000"),
    ],
)
def test_numbers_of_two_notations_are_not_guessed(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        read_table(written(tmp_path, text))
    assert said in one_line(error)


NESTED = [
    {"config": {"num_tokens": n, "dtype": "bf16"}, "timing": {"mean_us": 20.0 + n, "std_us": 0.25}} for n in (8, 64)
]


@pytest.mark.parametrize("found", [NESTED, {"benchmarks": NESTED, "gpu": "H200"}])
def test_objects_within_rows(tmp_path: Path, found: object) -> None:
    profile = read_table(written(tmp_path, json.dumps(found), "table.json"))
    assert loads(profile) == [(8, None, 28.0), (64, None, 84.0)]


def test_objects_within_rows_keep_what_they_are_of(tmp_path: Path) -> None:
    other = [{**row, "config": {**row["config"], "dtype": "fp8"}} for row in NESTED]
    parts = [{"tokens": 8, "attention": {"latency_us": 30}}]
    alike = [{"tokens": 8, "config": {"tokens": 4}, "us": 5}]
    for rows, said in (
        (NESTED + other, "rows that differ in dtype"),
        (parts, "time attention.latency_us; the time of one whole MoE layer"),
        (alike, "a list of rows with plain values"),
    ):
        with pytest.raises(InputError) as error:
            read_table(written(tmp_path, json.dumps(rows), "table.json"))
        assert said in str(error.value)


def test_a_time_of_something_else_is_not_offered_as_that_of_a_layer(tmp_path: Path) -> None:
    table = written(tmp_path, "tokens,prefill_latency,total_latency\n8,0.1,0.3\n")
    with pytest.raises(InputError) as error:
        read_table(table)
    assert "by their names none is; to take one all the same: --time-column 'total_latency" in str(error.value)


@pytest.mark.parametrize("each", [5, None, {"params": 5}, {"extra_info": [1]}, {"stats": "fast"}])
def test_documents_of_pytest_that_hold_others_are_refused(tmp_path: Path, each: object) -> None:
    path = written(tmp_path, json.dumps({"machine_info": {}, "benchmarks": [each]}), "a.json")
    with pytest.raises(InputError, match=r"a list of rows with plain values|got columns .*is needed"):
        read_table(path)


def test_a_table_within_a_log_is_asked_for_alone(tmp_path: Path) -> None:
    path = written(
        tmp_path, "benchmark a with batch_size=1\nbenchmark a with batch_size=2\n  batch_size  a\n0  1.0  0.35\n"
    )
    with pytest.raises(InputError, match="give the lines of the table alone"):
        read_table(path)


def test_settings_that_rows_say_again(tmp_path: Path) -> None:
    rows = [{"assignments": n, "us": 50 + n, "hidden": 2048} for n in (1, 8, 64)]
    path = written(tmp_path, json.dumps({"gpu": "H100", "hidden": 2048, "results": rows}), "a.json")
    assert loads(read_table(path)) == [(n, None, 50.0 + n) for n in (1, 8, 64)]
    written(tmp_path, json.dumps({"gpu": "H100", "hidden": 4096, "results": rows}), "a.json")
    with pytest.raises(InputError, match="got JSON with results in it; a list of rows"):
        read_table(path)
    written(tmp_path, json.dumps([{**row, "times": [[1, 2], [3, 4]]} for row in rows]), "a.json")
    with pytest.raises(InputError, match="got JSON with times in it; a list of rows with plain values"):
        read_table(path)


def test_one_markdown_table_within_a_log_or_a_page(tmp_path: Path) -> None:
    table = "| assignments | us |\n|---:|:---|\n| 8 | 55 |\n| 64 | 60 |\n"
    for before, after in (
        ("[aiter] import, of 3\n[aiter] summary:\n", ""),
        ("# H100, bf16\n\nTimes:\n\n", "\nSee x.\n"),
    ):
        path = written(tmp_path, before + table + after)
        assert loads(read_table(path)) == [(8, None, 55.0), (64, None, 60.0)]
    with pytest.raises(InputError, match="several tables in one file"):
        read_table(written(tmp_path, f"Two:\n\n{table}\n{table}"))
    for more in ("512 | 90 |\n", "\nB200:\n\nassignments | us\n--- | ---\n8 | 5\n"):  # without bars at their begin
        with pytest.raises(InputError, match="columns; 2 columns, as in the header"):
            read_table(written(tmp_path, f"Times:\n\n{table}{more}"))


def test_rows_whose_settings_are_objects_of_their_own(tmp_path: Path) -> None:
    rows = [
        {"test_parameters": {"tokens": n, "num_experts_per_tok": 8, "expert_num": 64}, "us": 50 + n} for n in (1, 8)
    ]
    path = written(tmp_path, "\n".join(map(json.dumps, rows)), "a.jsonl")
    assert loads(read_table(path, unit="tokens")) == [(8, None, 51.0), (64, None, 58.0)]


def test_objects_within_objects_of_rows(tmp_path: Path) -> None:
    rows = [
        {"params": {"shape": {"assignments": n}}, "stats": {"gpu": {"time": {"median_us": 50 + n, "p99_us": 90}}}}
        for n in (8, 16)
    ]
    assert loads(read_table(written(tmp_path, json.dumps(rows)))) == [(8, None, 58), (16, None, 66)]
    kernels = [{"assignments": 8, "metrics": {"kernels": [{"us": 3}], "latency_us": 58}}]
    with pytest.raises(InputError, match=r"JSON with metrics.kernels in it"):
        read_table(written(tmp_path, json.dumps(kernels)))


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"status": "failed"}, "result.gpu.status: got failed; rows of runs that went well"),
        ({"is_estimated": True}, "result.gpu.is_estimated: got True; times that were measured"),
        ({"source": "roofline"}, "result.gpu.source: got roofline; times that were measured"),
        ({"unit": "ms"}, "result.gpu.unit: got ms; the unit that result.gpu.median_us is read in"),
        ({"statistic": "max"}, "result.gpu.statistic: got max; the median or mean of repeats"),
        ({"phase": "backward"}, "result.gpu.phase: got backward; times of whole MoE layers"),
        ({"num_layers": 4}, "num_layers"),
        ({"error": "none", "status": "ok", "phase": "decode"}, ""),
    ],
)
def test_what_objects_within_rows_say_of_them_is_heeded(tmp_path: Path, said: dict[str, object], line: str) -> None:
    rows = [{"assignments": n, "result": {"gpu": {"median_us": 50 + n, **said}}} for n in (8, 16)]
    path = written(tmp_path, json.dumps(rows))
    if not line:
        assert loads(read_table(path)) == [(8, None, 58), (16, None, 66)]
        return
    with pytest.raises(InputError, match=line):
        read_table(path)


def test_groups_and_choices_that_objects_within_rows_tell(tmp_path: Path) -> None:
    told = {"parallel": {"ep_size": 4}, "model": {"top_k": 8}, "sampling": {"top_k": 50}}
    rows = [{**told, "num_tokens": n, "latency_us": 50 + n} for n in (8, 16)]
    path = written(tmp_path, json.dumps(rows))
    assert loads(read_table(path, unit="group-tokens")) == [(16, None, 58), (32, None, 66)]
    with pytest.raises(InputError, match="with 8 experts per token, does num_tokens count tokens"):
        read_table(path)

"""Columns that nobody knows: rows that differ in them, devices that they tell apart, names that say nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from kernel_tables import loads, written

from gemopt.exceptions import InputError
from gemopt.formats.tables.kernel import Unit, read_table

# --- rows that are no repeats of one point --------------------------------------------------------------------------

MIXED = {
    "dtypes within a load": (
        "dtype",
        "num_tokens,dtype,latency_us\n64,bf16,300\n64,fp8,170\n128,bf16,420\n128,fp8,230\n",
    ),
    "dtypes that never meet": ("dtype", "tokens,dtype,latency_us\n32,bf16,1\n64,bf16,2\n128,fp8,3\n256,fp8,4\n"),
    "shapes that grow with the load": (
        "hidden_size",
        "tokens,hidden_size,latency_us\n64,2048,1\n128,4096,2\n256,8192,4\n",
    ),
    "kernels": ("backend", "tokens,backend,time_us\n8,triton,1\n8,cutlass,3\n"),
    "parallel sizes": ("tp", "tokens,tp,time_us\n8,1,4\n8,2,3\n16,1,5\n16,2,4\n"),
    "a device by another name": ("id", "tokens,id,time_us\n8,a7,4\n8,b3,3\n16,a7,5\n16,b3,4\n"),
    "cards, one load": ("card_no", "tokens,card_no,time_us\n" + "".join(f"64,{i},{9 + i}\n" for i in range(24))),
    "two lanes": (
        "lane",
        "tokens,lane,time_us\n" + "".join(f"{n},{i},{n + i}\n" for n in (8, 16, 32, 64) for i in (0, 1)),
    ),
    "clocks": ("clock_mhz", "tokens,clock_mhz,time_us\n8,1410,4\n8,1980,3\n16,1410,5\n16,1980,4\n"),
    "a setting with max in its name": ("max_tokens", "tokens,max_tokens,time_us\n8,64,4\n16,64,5\n32,128,6\n"),
    "an engine's mode": ("latency_mode", "tokens,latency_mode,time_us\n8,low,4\n8,normal,3\n"),
    "speeds of unnamed devices": (
        "speed",
        "tokens,speed,time_us\n" + "".join(f"{n},{1 + i / 8},{n + i}\n" for i in range(4) for n in (8, 16, 32)),
    ),
}


@pytest.mark.parametrize("case", MIXED)
def test_rows_that_differ_in_an_unknown_column_are_refused_with_its_values_and_a_choice(
    tmp_path: Path, case: str
) -> None:
    column, text = MIXED[case]
    path = written(tmp_path, text)
    with pytest.raises(InputError) as error:
        read_table(path)
    rows = [line.split(",") for line in text.splitlines()]
    first = rows[1][rows[0].index(column)]
    message = str(error.value)
    assert f"rows that differ in {column};" in message and f"{column}: {first}" in message
    assert f"--where {column}={first}" in message and "line 2 and line" in message
    kept = [row for row in rows[1:] if row[rows[0].index(column)] == first]
    (device,) = read_table(path, where=[f"{column}={first}"]).devices
    assert [(s.assignments, s.latency_us) for s in device.samples] == [(int(r[0]), float(r[2])) for r in kept]


def test_a_column_may_be_said_to_tell_devices_apart_or_to_number_repeats(tmp_path: Path) -> None:
    path = written(tmp_path, MIXED["a device by another name"][1])
    profile = read_table(path, device=["id"])
    assert [device.name for device in profile.devices] == ["id a7", "id b3"]
    assert [loads(profile, rank) for rank in range(2)] == [
        [(8, None, 4.0), (16, None, 5.0)],
        [(8, None, 3.0), (16, None, 4.0)],
    ]
    assert loads(read_table(path, repeat=["id"])) == [(8, None, 3.5), (16, None, 4.5)]
    for option, words in (("where", ["ID=a7"]), ("device", ["uid"]), ("repeat", ["uid"])):
        with pytest.raises(InputError, match=r"a column of .*: tokens, id, time_us"):
            read_table(path, **{option: words})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="one of a7, b3"):
        read_table(path, where=["id=c"])


HARMLESS = {
    "constants": "tokens,dtype,gpu,time_us\n8,bf16,H100,1\n16,bf16,H100,2\n32,bf16,H100,3\n",
    "the load in other units": "tokens,m,tflops,expert_tokens,time_us\n8,64,0.1,2,1\n16,128,0.2,4,2\n32,256,0.3,8,3\n",
    "statistics": "tokens,time_us,time_us_std,min_us,p99_us,err\n8,1,0.1,1,1,0.1%\n16,2,0.2,2,2,0%\n32,3,0.3,3,3,0%\n",
    "repeats and clock readings": (
        "tokens,run,sm_clock,temperature,timestamp,time_us\n"
        "8,0,1411,50,9:01,1\n16,1,1409,51,9:02,2\n32,0,1408,51,9:03,3\n"
    ),
    "medians beside means": "tokens,median_us,mean_us\n8,1,1.5\n16,2,2.5\n32,3,3.5\n",
}


@pytest.mark.parametrize("case", HARMLESS)
def test_columns_that_say_nothing_of_the_rows_kind_are_read_over(tmp_path: Path, case: str) -> None:
    assert loads(read_table(written(tmp_path, HARMLESS[case]))) == [(8, None, 1.0), (16, None, 2.0), (32, None, 3.0)]


@pytest.mark.parametrize(
    "name", ["gpu", "gpu_id", "uuid", "GPU UUID", "host", "hostname", "node", "slot", "device", "ep_rank"]
)
def test_a_column_that_tells_devices_apart_gives_one_device_each(tmp_path: Path, name: str) -> None:
    rows = [(n, g, n * (1 + g)) for n in (8, 16) for g in range(3)]
    path = written(tmp_path, f"tokens,{name},time_us\n" + "".join(f"{n},{g},{us}\n" for n, g, us in rows))
    profile = read_table(path)
    assert [loads(profile, rank) for rank in range(3)] == [
        [(n, None, n * (1.0 + g)) for n in (8, 16)] for g in range(3)
    ]
    if "uuid" in name.lower():
        assert profile.device_uuids == ["0", "1", "2"]


def test_several_columns_tell_devices_apart_together_hosts_first_and_numbers_in_order(tmp_path: Path) -> None:
    rows = [("b", 10, 1), ("b", 9, 2), ("a", 10, 3), ("a", 9, 4)]
    path = written(tmp_path, "tokens,gpu,host,time_us\n" + "".join(f"8,{g},{h},{us}\n" for h, g, us in rows))
    profile = read_table(path)
    assert [(d.node, d.samples[0].latency_us) for d in profile.devices] == [("b", 2), ("b", 1), ("a", 4), ("a", 3)]


def test_names_that_end_in_numbers_come_by_these(tmp_path: Path) -> None:
    names = ("gpu0", "gpu1", "gpu10", "gpu2")  # as a sorted list has them
    path = written(tmp_path, "tokens,gpu,time_us\n" + "".join(f"8,{name},{name[3:]}1\n" for name in names))
    assert [device.name for device in read_table(path).devices] == ["gpu0", "gpu1", "gpu2", "gpu10"]
    path = written(tmp_path, "tokens,gpu,time_us\n8,b2,1\n8,a10,2\n")
    assert [device.name for device in read_table(path).devices] == ["b2", "a10"]


def test_what_nvidia_smi_calls_its_readings_is_no_kind_of_row(tmp_path: Path) -> None:
    rows = [("GPU-a", 55, "1980 MHz", 8, 5), ("GPU-a", 57, "1965 MHz", 64, 7), ("GPU-b", 66, "1750 MHz", 8, 6)]
    head = "uuid, temperature.gpu, clocks.sm [MHz], assignments, latency_us\n"
    path = written(tmp_path, head + "".join(", ".join(map(str, row)) + "\n" for row in rows))
    assert read_table(path).device_uuids == ["GPU-a", "GPU-b"]


def test_a_rank_with_two_devices_is_refused_and_names_of_devices_are_kept(tmp_path: Path) -> None:
    text = "tokens,rank,uuid,gpu_name,time_us\n8,0,u,H100,1\n8,1,v,A100,2\n16,0,{},H100,3\n16,1,v,A100,4\n"
    profile = read_table(written(tmp_path, text.format("u")))
    assert [(d.uuid, d.name) for d in profile.devices] == [("u", "H100"), ("v", "A100")]
    with pytest.raises(InputError, match=r"line 2 and line 4: got rows that differ in uuid; .*uuid: u, w, v"):
        read_table(written(tmp_path, text.format("w")))


def test_of_loads_that_round_to_one_assignment_the_nearest_is_taken(tmp_path: Path) -> None:
    path = written(tmp_path, "tokens,latency_us\n1,10\n2,20\n4,40\n8,80\n")
    assert loads(read_table(path, unit=Unit.GROUP_TOKENS, top_k=1, ep=4)) == [(1, None, 40.0), (2, None, 80.0)]


def test_columns_are_known_however_they_are_written(tmp_path: Path) -> None:
    table = written(tmp_path, "Tokens,Num Topk,EP,Latency (us),tb_per_sec\n8,4,2,5,1\n16,4,2,6,3\n32,4,2,7,2\n")
    with pytest.raises(InputError, match="--top-k: got 8; Num Topk is 4"):
        read_table(table, unit=Unit.TOKENS, top_k=8)
    with pytest.raises(InputError, match="--ep: got 4; EP is 2"):
        read_table(table, unit=Unit.GROUP_TOKENS, ep=4)
    assert loads(read_table(table, unit=Unit.GROUP_TOKENS)) == [(16, None, 5.0), (32, None, 6.0), (64, None, 7.0)]


def test_moments_are_no_times(tmp_path: Path) -> None:
    table = written(tmp_path, "assignments,start_ns,end_ns,dur_ns\n8,1000,6000,5000\n16,9000,16000,7000\n")
    assert loads(read_table(table)) == [(8, None, 5.0), (16, None, 7.0)]
    with pytest.raises(InputError, match="a column latency_us or time_us"):
        read_table(written(tmp_path, "assignments,start_us,end_us\n8,1,6\n"))


def test_tokens_must_make_the_assignments_beside_them(tmp_path: Path) -> None:
    table = written(tmp_path, "tokens,assignments,latency_us\n8,32,5\n16,64,6\n32,128,7\n")
    with pytest.raises(InputError, match=r"line 2, assignments: got 32; the 64 that tokens makes; wrong --top-k"):
        read_table(table, unit=Unit.TOKENS, top_k=8)
    assert loads(read_table(table, unit=Unit.TOKENS, top_k=4)) == loads(read_table(table))


@pytest.mark.parametrize("name", ["", "Unnamed: 0", "__index_level_0__"])
def test_an_index_saved_with_repeats_numbers_rows(tmp_path: Path, name: str) -> None:
    rows = [(8, 10), (16, 12), (8, 11), (16, 13)]
    for number in ([0, 1, 2, 3], [0, 1, 0, 1]):  # of one table, and of two put together
        lines = [f"{i},{n},{us}\n" for i, (n, us) in zip(number, rows, strict=True)]
        path = written(tmp_path, f"{name},assignments,time_us\n" + "".join(lines))
        assert loads(read_table(path)) == [(8, None, 10.5), (16, None, 12.5)]
    path = written(tmp_path, f"{name},assignments,time_us\n" + "".join(f"{i},8,{10 + i}\n" for i in (0, 1, 0, 1)))
    with pytest.raises(InputError, match="rows that differ in"):  # two devices?
        read_table(path)


@pytest.mark.parametrize("name", ["power_w", "sm_clock_mhz", "captured"])
def test_what_was_measured_beside_repeats_is_a_result(tmp_path: Path, name: str) -> None:
    told = iter([f"2026-01-01 12:00:0{i}" if name == "captured" else f"{300 + 7.13 * i}" for i in range(6)])
    rows = "".join(f"{n},{us},{next(told)}\n" for n, us in ((8, 10), (16, 12), (32, 15)) for _ in range(2))
    path = written(tmp_path, f"assignments,time_us,{name}\n{rows}")
    assert loads(read_table(path)) == [(8, None, 10), (16, None, 12), (32, None, 15)]
    caps = "".join(f"{n},{us},{cap}\n" for n, us in ((8, 10), (16, 12), (32, 15)) for cap in (300, 400))
    with pytest.raises(InputError, match="rows that differ in power"):
        read_table(written(tmp_path, f"assignments,time_us,power\n{caps}"))


@pytest.mark.parametrize(
    ("cell", "said"),
    [("time_us", "the header again"), ("61 us", "without its unit"), ("1 024", "nothing between thousands")],
)
def test_cells_that_are_no_numbers_have_a_hint(tmp_path: Path, cell: str, said: str) -> None:
    with pytest.raises(InputError, match=rf"time_us: got {cell}; .*{said}"):
        read_table(written(tmp_path, f"assignments,time_us\n8,{cell}\n"))


@pytest.mark.parametrize(
    "text",
    [
        "assignments   b ...  time_us\n          8 1.5 ...     10.0\n         16 1.5 ...     12.0\n",
        "assignments,...,time_us\n8,...,10\n",
        " assignments  time_us\n           8     10.0\n         ...      ...\n          64     12.0\n",
        "    assignments  time_us\n0             8     10.0\n..          ...      ...\n9            64     12.0\n",
        "| assignments | time_us |\n|---|---|\n| 8 | 10 |\n| … | … |\n",
    ],
)
def test_what_was_left_out_of_a_print_is_missed(tmp_path: Path, text: str) -> None:
    """Columns that are not there may be what tells the rows apart."""
    with pytest.raises(InputError, match=r"dots where some were left out; all rows and columns.*to_csv"):
        read_table(written(tmp_path, text))


def test_ranks_that_are_numbered_anew_are_said(tmp_path: Path) -> None:
    rows = "".join(f"{rank},{n},{n + rank}\n" for rank in range(4) for n in (8, 16, 32))
    path = written(tmp_path, f"rank,assignments,time_us\n{rows}")
    notes: list[str] = []
    for where in ([], ["rank=0"], ["rank=0", "rank=1"]):
        read_table(path, where=where, notes=notes)
    assert not any("anew" in each for each in notes)
    assert len(read_table(path, where=["rank=1", "rank=3"], notes=notes).devices) == 2
    assert "rank 1, 3 of the table: numbered anew from 0" in notes


def test_merged_cells_are_to_be_filled(tmp_path: Path) -> None:
    """As spreadsheets and Markdown leave them: the row that was offered was one of three."""
    path = written(tmp_path, "dtype,tokens,us\nbf16,1,5\n,2,6\n,4,7\nfp8,1,3\n,2,4\n,4,5\n")
    with pytest.raises(InputError, match="rows that differ in dtype"):
        read_table(path)
    with pytest.raises(InputError, match="dtype: got bf16, fp8; a value in every row: 4 are empty; merged cells"):
        read_table(path, where=["dtype=bf16"])
    with pytest.raises(InputError, match=r"line 3, tokens: got nothing; .*merged cells"):
        read_table(written(tmp_path, "tokens,run,us\n1,0,5\n,1,6\n2,0,7\n,1,8\n"))
    tagged = "tag,tokens,us\n,1,5\nslow,1,9\n,2,6\nslow,2,9\n"
    assert loads(read_table(written(tmp_path, tagged), where=["tag="])) == [(1, None, 5), (2, None, 6)]
    assert loads(read_table(written(tmp_path, tagged), where=["tag=slow"])) == [(1, None, 9), (2, None, 9)]


def test_of_columns_that_follow_from_others_few_are_offered(tmp_path: Path) -> None:
    """As AMD's tables of many networks: the line was of fourteen choices, which leave the same rows."""
    shapes = ((6144, 512, 257, 9, "glm5"), (6144, 768, 129, 5, "m3"), (7168, 384, 384, 6, "dsv4"))
    rows = "".join(
        f"{n},{mode},{','.join(map(str, shape))},{n + at}\n"
        for shape in shapes
        for at, mode in enumerate("ab")
        for n in (8, 16, 32)
    )
    path = written(tmp_path, f"assignments,mode,hidden,inter,experts,topk,model,us\n{rows}")
    with pytest.raises(InputError) as error:
        read_table(path)
    told = str(error.value)
    assert "rows that differ in mode, hidden, inter, experts, topk, model;" in told
    assert told.count("--where") == 2 and "--where mode=a --where inter=512;" in told and "model: " not in told
    assert loads(read_table(path, where=["mode=a", "inter=512"])) == [(8, None, 8), (16, None, 16), (32, None, 32)]


def test_names_that_hold_the_load_are_no_kinds_of_rows(tmp_path: Path) -> None:
    """Google Benchmark, pytest-benchmark and hyperfine name every row after its load."""
    for name in ("BM_MoE/fp8/{}/4096", "test_moe[{}]", "./moe --tokens {}"):
        text = "name,tokens,time_us\n" + "".join(f"{name.format(n)},{n},{40 + n}\n" for n in (1, 2, 8, 64))
        profile = read_table(written(tmp_path, text), unit=Unit.TOKENS, top_k=4)
        assert loads(profile) == [(4 * n, None, 40 + n) for n in (1, 2, 8, 64)]
    for name in ("{}/{}", "tile{}", "{}a"):
        rows = [f"{name.format(n, 9 - n)},{m},{40 + m}\n" for m, n in ((1, 2), (2, 3), (8, 4), (64, 8))]
        with pytest.raises(InputError, match="rows that differ in name"):
            read_table(written(tmp_path, "name,tokens,time_us\n" + "".join(rows)), unit=Unit.TOKENS, top_k=4)


def test_rows_that_are_a_warm_up_are_not_the_ones_to_choose(tmp_path: Path) -> None:
    rows = [f"{n},{each},{40 + n}\n" for n in (1, 2, 8) for each in ("warmup", "timed")]
    with pytest.raises(InputError, match="as in --where stage_name=timed"):
        read_table(written(tmp_path, "tokens,stage_name,time_us\n" + "".join(rows)), unit=Unit.TOKENS, top_k=4)
    text = "assignments,is_warmup,time_us\n" + "".join(f"{n},True,{40 + n}\n" for n in (1, 2, 8))
    with pytest.raises(InputError, match="is_warmup: got True; rows of runs that went well"):
        read_table(written(tmp_path, text))
    profile = read_table(written(tmp_path, text.replace("is_warmup", "warmup")))  # there was one before
    assert loads(profile) == [(n, None, 40 + n) for n in (1, 2, 8)]


def test_a_name_of_devices_on_a_column_that_numbers_rows_makes_none(tmp_path: Path) -> None:
    path = written(tmp_path, "UUID,tokens,time_us\n" + "".join(f"{n:08x},{n},{9 + n}\n" for n in (8, 16, 32, 64)))
    with pytest.raises(InputError, match=r"UUID: got 4 devices of one load each, .*--repeat-column 'UUID'"):
        read_table(path)
    (device,) = read_table(path, repeat=["UUID"]).devices
    assert [(s.assignments, s.latency_us) for s in device.samples] == [(n, 9 + n) for n in (8, 16, 32, 64)]
    assert len(read_table(path, device=["UUID"]).devices) == 4
    alike = written(tmp_path, "UUID,tokens,time_us\n" + "".join(f"{n:08x},64,{9 + n}\n" for n in (8, 16, 32, 64)))
    assert len(read_table(alike).devices) == 4

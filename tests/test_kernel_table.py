"""Kernel tables become profiles: units, column names, what-if clusters, and rows that are wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemopt.cli import main
from gemopt.exceptions import InputError
from gemopt.formats.kernel_table import Unit, read_fleet, read_table, slow_down, what_if
from gemopt.profile import Profile

FLEET = "dataset,rel_time,gpu\n" + "".join(f"compute,{1 + i / 10:.1f},c{i}\n" for i in range(6))
MEMORY = "".join(f"memory,{1 + i / 100:.2f},m{i}\n" for i in range(6))


def written(folder: Path, text: str, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def loads(profile: Profile, rank: int = 0) -> list[tuple[int, int | None, float]]:
    return [(s.assignments, s.active_experts, s.latency_us) for s in profile.devices[rank].samples]


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
    "no load": ("batch,latency_us\n1,2\n", "tokens or num_tokens or assignments"),
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
    "a flag": ("tokens,error,latency_us\n1,0,5\n2,0,6\n4,1,1\n", "line 2 and line 4: got rows that differ in error"),
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
    "rows of JSON": ('[{"tokens": 1, "latency_us": 5}]', "write the rows as CSV"),
    "tuned settings": ('{"1": {"BLOCK_SIZE_M": 16}}', "run benchmark_moe without --tune"),
    "a log that was cut": ("Batch size: 8, config: {}\n", "line 1: got no time for batch size 8"),
    "two batches, one time": (
        "Batch size: 8, config: {}\nBatch size: 9, config: {}\nKernel time: 5.00 us\n",
        "line 2: got no time for batch size 8",
    ),
    "a time alone": ("Kernel time: 5.00 us\n", "line 1: got Kernel time"),
    "a failed time": ("Batch size: 8, config: {}\nKernel time: inf us\n", "line 2: got Kernel time: inf us"),
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


@pytest.mark.parametrize(("unit", "top_k", "ep"), [("tokens", None, None), ("tokens", 0, None), ("group-tokens", 4, 0)])
def test_units_need_their_factors(tmp_path: Path, unit: str, top_k: int | None, ep: int | None) -> None:
    with pytest.raises(InputError, match=r"--top-k|--ep"):
        read_table(written(tmp_path, "tokens,latency_us\n1,2\n"), unit=Unit(unit), top_k=top_k, ep=ep)


def test_a_fleet_scales_every_latency(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, "tokens,latency_us\n1,10\n64,20\n"))
    fleet = read_fleet(written(tmp_path, FLEET, "speeds.csv"))
    cluster = what_if(table, fleet, ranks=6, seed=3)
    drawn = [float(device.state["rel_time"]) for device in cluster.devices]
    assert sorted(drawn) == pytest.approx([1.0, 1.1, 1.2, 1.3, 1.4, 1.5])  # different GPUs, each once
    for rank, factor in enumerate(drawn):
        assert [s.latency_us for s in cluster.devices[rank].samples] == pytest.approx([10 * factor, 20 * factor])
    assert what_if(table, fleet, ranks=6, seed=3) == cluster != what_if(table, fleet, ranks=6, seed=4)


def test_compute_and_memory_speeds_act_on_their_own_part(tmp_path: Path) -> None:
    rows = [(n, a, max(20 + 5 * a, 10 + 0.5 * n)) for n in (8, 32, 512, 1024, 2048) for a in (2, 4, 8)]
    text = "tokens,active_experts,latency_us\n" + "".join(f"{n},{a},{y}\n" for n, a, y in rows)
    table = read_table(written(tmp_path, text))
    speeds = written(tmp_path, FLEET + MEMORY, "speeds.csv")
    with pytest.raises(InputError, match=r"2 fleets.*compute, memory.*--fleet"):
        read_fleet(speeds)
    cluster = what_if(table, read_fleet(speeds, "compute"), ranks=4, memory=read_fleet(speeds, "memory"))
    for device in cluster.devices:
        compute, memory = float(device.state["rel_time"]), float(device.state["rel_time_memory"])
        assert 1.0 <= memory <= 1.05
        for before, after in zip(table.devices[0].samples, device.samples, strict=True):
            factor = after.latency_us / before.latency_us
            if before.assignments <= 32:
                assert factor == pytest.approx(memory, rel=0.03)
            if before.assignments == 2048:
                assert factor == pytest.approx(compute, rel=0.02)


def test_fleets_and_clusters_that_are_none(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, "tokens,latency_us\n1,10\n"))
    fleet = read_fleet(written(tmp_path, FLEET, "speeds.csv"))
    two = read_table(written(tmp_path, "tokens,latency_us,rank\n1,10,0\n1,10,1\n"))
    for ask, named in (
        (lambda: what_if(table, fleet, ranks=7), "at most the 6 GPUs"),
        (lambda: what_if(table, fleet, ranks=0), "--ranks"),
        (lambda: what_if(two, fleet, ranks=2), "table of one device"),
        (lambda: slow_down(two, 2, 1.3), "rank: got 2"),
        (lambda: slow_down(two, 0, 0.0), "factor"),
        (lambda: read_fleet(tmp_path / "speeds.csv", "other"), "--fleet"),
        (lambda: read_fleet(written(tmp_path, "rel_time\n0\n")), "line 2, rel_time: got 0"),
        (lambda: read_fleet(written(tmp_path, "rel_time\n-1\n")), "line 2, rel_time"),
        (lambda: read_fleet(written(tmp_path, "speed\n1\n")), "rel_time"),
    ):
        with pytest.raises(InputError, match=named.replace("(", r"\(")):
            ask()


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ("0,100\n1,101\n2,107\n", "times around 101; about 1"),
        ("0,1\n1,1.1\n0,0.9\n", "gpu: got 0 twice; a row for each"),
    ],
)
def test_rows_that_are_no_fleet(tmp_path: Path, rows: str, word: str) -> None:
    with pytest.raises(InputError, match=word):
        read_fleet(written(tmp_path, "gpu,rel_time\n" + rows))


def test_one_rank_slower(tmp_path: Path) -> None:
    two = read_table(written(tmp_path, "tokens,latency_us,rank\n1,10,0\n1,10,1\n"))
    slower = slow_down(two, 1, 1.3)
    assert [d.samples[0].latency_us for d in slower.devices] == [10.0, pytest.approx(13.0)]
    assert two.devices[1].samples[0].latency_us == 10.0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = written(tmp_path, "num_tokens,latency_ms\n16,0.1\n32,0.2\n")
    speeds = written(tmp_path, FLEET, "speeds.csv")
    out = tmp_path / "profile.json"
    words = ["profile", "import", str(table), "--unit", "group-tokens", "--top-k", "8", "--ep", "4", "-o", str(out)]
    extra = ["--speeds", str(speeds), "--ranks", "3", "--seed", "1", "--device", "H100", "--source", "someone, MIT"]
    with pytest.raises(SystemExit) as stop:
        main([*words, *extra])
    assert stop.value.code == 0 and "3 devices, 6 samples" in " ".join(capsys.readouterr().out.split())
    profile = Profile.load(out)
    assert profile.num_ranks == 3 and profile.source == "someone, MIT"
    assert {s.assignments for d in profile.devices for s in d.samples} == {32, 64}
    factors = [float(d.state["rel_time"]) for d in profile.devices]
    np.testing.assert_allclose([d.samples[0].latency_us for d in profile.devices], np.multiply(100, factors))


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--unit", "miles"], "--unit"),
        (["--unit", "tokens"], "--top-k"),
        (["--fleet", "compute"], "--speeds"),
        (["--speeds", "none.csv"], "none.csv"),
        (["--ranks", "two"], "--ranks"),
    ],
)
def test_the_command_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], named: str
) -> None:
    table, out = written(tmp_path, "tokens,latency_us\n16,0.1\n"), tmp_path / "profile.json"
    with pytest.raises(SystemExit) as stop:
        main(["profile", "import", str(table), "-o", str(out), *extra])
    shown = capsys.readouterr()
    assert stop.value.code == 2 and named in shown.err and shown.err.count("\n") == 1 and not out.exists()


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


def test_a_rank_with_two_devices_is_refused_and_names_of_devices_are_kept(tmp_path: Path) -> None:
    text = "tokens,rank,uuid,gpu_name,time_us\n8,0,u,H100,1\n8,1,v,A100,2\n16,0,{},H100,3\n16,1,v,A100,4\n"
    profile = read_table(written(tmp_path, text.format("u")))
    assert [(d.uuid, d.name) for d in profile.devices] == [("u", "H100"), ("v", "A100")]
    with pytest.raises(InputError, match=r"line 2 and line 4: got rows that differ in uuid; .*uuid: u, w, v"):
        read_table(written(tmp_path, text.format("w")))


def test_of_loads_that_round_to_one_assignment_the_nearest_is_taken(tmp_path: Path) -> None:
    path = written(tmp_path, "tokens,latency_us\n1,10\n2,20\n4,40\n8,80\n")
    assert loads(read_table(path, unit=Unit.GROUP_TOKENS, top_k=1, ep=4)) == [(1, None, 40.0), (2, None, 80.0)]


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
    assert len(loads(read_table(skewed, where=["distribution=power_law_1.2"]))) == 3
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
    for wrong in ("vllm", "vllm:h", "none:ms"):
        with pytest.raises(InputError, match="--time-column"):
            read_table(path, top_k=2, time=wrong)


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


def test_repeats_that_disagree_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"{n},{us}\n" for n, us in ((8, 50), (8, 200), (16, 60), (16, 61)))
    words = ["profile", "import", written(tmp_path, "assignments,latency_us\n" + rows), "-o", tmp_path / "p.json"]
    assert "the times of 1 of 2 loads disagree (8 assignments: 125 us" in run(capsys, *words)[1]


# --- equal devices ---------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    shown = capsys.readouterr()
    return int(stop.value.code or 0), " ".join((shown.out + shown.err).split())


def test_ranks_without_speeds_are_equal_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = written(tmp_path, "tokens,dtype,uuid,latency_us\n8,a,u,1\n8,b,u,3\n16,a,u,2\n"), tmp_path / "p.json"
    words = ["profile", "import", table, "--where", "dtype=a", "-o", out]
    assert run(capsys, *words, "--ranks", 8) == (0, f"{out}: 8 equal devices, 16 samples")
    profile = Profile.load(out)
    assert [loads(profile, rank) for rank in range(8)] == [[(8, None, 1.0), (16, None, 2.0)]] * 8
    assert profile.device_uuids == [None] * 8  # no two ranks are one device
    code, shown = run(capsys, *words)
    assert code == 0 and "1 device, 2 samples; a placement needs several: --ranks N" in shown
    assert run(capsys, *words, "--ranks", 0)[0] == 2
    several = written(tmp_path, "tokens,rank,latency_us\n8,0,1\n8,1,3\n", "two.csv")
    code, shown = run(capsys, "profile", "import", several, "-o", out, "--ranks", 8)
    assert code == 2 and "the table has 2 devices of its own" in shown
    assert run(capsys, "profile", "import", several, "-o", out, "--ranks", 2)[0] == 0

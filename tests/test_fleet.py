"""What-if clusters: speeds of a measured fleet, equal devices, one that is slower; the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_inputs import gemopt
from kernel_tables import loads, written

from gemopt.exceptions import InputError
from gemopt.formats.tables.kernel import equal, read_fleet, read_table, slow_down, what_if
from gemopt.profile import Profile

FLEET = "dataset,rel_time,gpu\n" + "".join(f"compute,{1 + i / 10:.1f},c{i}\n" for i in range(6))
MEMORY = "".join(f"memory,{1 + i / 100:.2f},m{i}\n" for i in range(6))


def test_a_fleet_scales_every_latency(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, "tokens,latency_us\n1,10\n64,20\n"))
    fleet = read_fleet(written(tmp_path, FLEET, "speeds.csv"))
    cluster = what_if(table, fleet, ranks=6, seed=3)
    drawn = [float(device.state["rel_time"]) for device in cluster.devices]
    assert sorted(drawn) == pytest.approx([1.0, 1.1, 1.2, 1.3, 1.4, 1.5])  # different GPUs, each once
    for rank, factor in enumerate(drawn):
        assert [s.latency_us for s in cluster.devices[rank].samples] == pytest.approx([10 * factor, 20 * factor])
    assert what_if(table, fleet, ranks=6, seed=3) == cluster != what_if(table, fleet, ranks=6, seed=4)


def test_times_of_gpus_are_a_fleet(tmp_path: Path) -> None:
    rows = [("a", 0, 22.0, 1.2), ("a", 1, 20.0, 1.5), ("b", 0, 25.0, 9.0), ("b", 1, 21.5, 1.0), ("c", 0, 22.5, 2.0)]
    text = "host;gpu;median_ms;max_ms\n" + "".join(f"{h};{g};{ms};{ms + m}\n" for h, g, ms, m in rows)
    fleet = read_fleet(written(tmp_path, text.replace(".", ",")))
    assert fleet.gpus == ["a/0", "a/1", "b/0", "b/1", "c/0"]
    assert fleet.rel_time == pytest.approx(np.array([22.0, 20.0, 25.0, 21.5, 22.5]) / 22.0)
    for header, rows_of in (
        ("size,time_ms", "1,5\n2,6\n"),
        ("gpu,fp8_ms,bf16_ms", "0,5,6\n1,6,7\n"),
        ("gpu,median_ms,total_ms", "0,5,500\n1,6,450\n"),  # of many runs
    ):
        with pytest.raises(
            InputError,
            match="a column rel_time, or one of times and the GPUs they are of, is needed; of several times keep one",
        ):
            read_fleet(written(tmp_path, f"{header}\n{rows_of}"))


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
        ("0,1\n1,1.1\navg,1.05\n", "line 4, GPU: got avg; one device"),
        ("0,1,bert\n1,1.1,bert\n2,1,sgemm\n", "workload: got bert, sgemm; rows of one workload"),
    ],
)
def test_rows_that_are_no_fleet(tmp_path: Path, rows: str, word: str) -> None:
    header = "GPU,rel_time,workload\n" if "bert" in rows else "GPU,rel_time\n"
    with pytest.raises(InputError, match=word):
        read_fleet(written(tmp_path, header + rows))


@pytest.mark.parametrize(
    ("header", "rows", "word"),
    [
        ("gpu,rel_time,tflops", "0,1,600\n1,0.9,540\n2,1.03,620\n", "rise as tflops rises"),
        ("gpu,Rel_Time,Time (us)", "0,1,100\n1,0.91,110\n2,1.03,97\n", "fall as Time \\(us\\) rises"),
    ],
)
def test_relative_speeds_are_no_relative_times(tmp_path: Path, header: str, rows: str, word: str) -> None:
    with pytest.raises(InputError, match=f"numbers that {word}; relative times, larger is slower"):
        read_fleet(written(tmp_path, f"{header}\n{rows}"))
    times = "gpu,REL_TIME,tflops,time_us\n0,1,600,100\n1,1.1,545,110\n2,0.97,620,97\n"
    assert read_fleet(written(tmp_path, times)).rel_time.tolist() == [1.0, 1.1, 0.97]
    by_chance = "gpu,rel_time,memory_bandwidth\n0,1,3020\n1,1.1,3060\n2,0.97,3015\n"  # unlike speeds, by little
    assert read_fleet(written(tmp_path, by_chance)).rel_time.tolist() == [1.0, 1.1, 0.97]


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("m", ["64", "128"]),
        ("num_tokens", ["64", "80"]),
        ("gpu_name", ["H100", "A100"]),
        ("precision", ["bf16", "fp8"]),
        ("instance_type", ["p4d", "p5"]),
    ],
)
def test_gpus_that_were_timed_under_other_workloads_are_no_fleet(tmp_path: Path, name: str, cells: list[str]) -> None:
    path = tmp_path / "fleet.csv"
    path.write_text(f"gpu,time_ms,{name}\n" + "".join(f"{i},{10 + i},{cells[i // 3]}\n" for i in range(6)))
    with pytest.raises(InputError, match=f"{name}: got {cells[0]}, {cells[1]}; rows of one workload"):
        read_fleet(path)


@pytest.mark.parametrize(("name", "cell"), [("is_valid", "0"), ("statistic", "max"), ("estimated", "yes")])
def test_gpus_whose_times_are_none_are_no_fleet(tmp_path: Path, name: str, cell: str) -> None:
    path = tmp_path / "fleet.csv"
    path.write_text(f"gpu,time_ms,{name}\n" + "".join(f"{i},{10 + i},{cell}\n" for i in range(5)))
    with pytest.raises(InputError, match=f"{name}: got {cell}; .*leave the column out"):
        read_fleet(path)


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("clocks.current.sm [MHz]", ["1980 MHz", "1965 MHz"]),
        ("power.draw", ["301.5 W", "298.25 W"]),
        ("power_limit_w", ["700", "400"]),
        ("pcie.link.width.current", ["16", "8"]),
        ("rack", ["r1", "r2"]),
        ("driver", ["550.1", "580.2"]),
        ("n_samples", ["100", "99"]),
        ("bar1_size", ["131072", "65536"]),
        ("throttle_reasons", ["None", "SwPowerCap"]),
        ("pstate", ["P0", "P2"]),
        ("vbios_version", ["96.00.74.00.01", "96.00.74.00.02"]),
        ("zone", ["us-east1-a", "us-east1-b"]),
        ("cpu_affinity", ["0-31", "32-63"]),
        ("comment", ["", "new fan"]),
        ("measured_at", ["2026-11-01 10:00:00", "2026-11-02 10:00:00"]),
    ],
)
def test_readings_beside_the_times_of_gpus_are_read_over(tmp_path: Path, name: str, cells: list[str]) -> None:
    """As nvidia-smi writes them, with their units in the cells."""
    path = tmp_path / "fleet.csv"
    path.write_text(f"gpu,time_ms,{name}\n" + "".join(f"{i},{10 + i},{cells[i % 2]}\n" for i in range(5)))
    assert read_fleet(path).rel_time.tolist() == [10 / 12, 11 / 12, 1, 13 / 12, 14 / 12]


def test_a_name_of_each_gpu_tells_no_workloads_apart(tmp_path: Path) -> None:
    rows = "".join(f"{{}}label{i} x,{1 + i / 100}\n" for i in range(5))
    numbered = "".join(line.format(f"{i},") + "\n" for i, line in enumerate(rows.splitlines()))
    assert read_fleet(written(tmp_path, f"gpu,ticket,rel_time\n{numbered}")).gpus == list("01234")
    with pytest.raises(InputError, match=r"kernel: got label0 x, label1 x, .*leave it out"):
        read_fleet(written(tmp_path, f"kernel,rel_time\n{rows.replace('{}', '')}"))


def test_gpus_of_several_hosts_are_told_apart(tmp_path: Path) -> None:
    fleet = read_fleet(written(tmp_path, "gpu,host,rel_time\n0,a,1\n1,a,1.1\n0,b,0.9\n"))
    assert fleet.gpus == ["a/0", "a/1", "b/0"]


def test_one_rank_slower(tmp_path: Path) -> None:
    two = read_table(written(tmp_path, "tokens,latency_us,rank\n1,10,0\n1,10,1\n"))
    slower = slow_down(two, 1, 1.3)
    assert [d.samples[0].latency_us for d in slower.devices] == [10.0, pytest.approx(13.0)]
    assert two.devices[1].samples[0].latency_us == 10.0


@pytest.mark.parametrize("number", [-1, 2.5, "8", True])
def test_ranks_and_factors_are_numbers(tmp_path: Path, number: Any) -> None:
    one = read_table(written(tmp_path, "assignments,us\n1,5\n2,6\n"))
    with pytest.raises(InputError, match="--ranks: got "):
        equal(one, number)
    with pytest.raises(InputError, match="rank: got "):
        slow_down(one, number, 1.3)
    if number != 2.5:
        with pytest.raises(InputError, match="factor: got "):
            slow_down(one, 0, number)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = written(tmp_path, "num_tokens,latency_ms\n16,0.1\n32,0.2\n")
    speeds = written(tmp_path, FLEET, "speeds.csv")
    out = tmp_path / "profile.json"
    words = ["profile", "import", str(table), "--unit", "group-tokens", "--top-k", "8", "--ep", "4", "-o", str(out)]
    extra = ["--speeds", str(speeds), "--ranks", "3", "--seed", "1", "--device", "H100", "--source", "someone, MIT"]
    code, shown = run(capsys, *words, *extra)
    assert code == 0 and "3 devices, 6 samples" in shown
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
        (["--slower", "3"], "--slower"),
        (["--ranks", "2", "--slower", "2:1.3"], "ranks 0 to 1"),
        (["--ranks", "2", "--slower", "1:0.8"], "--slower 1: got 0.8"),
        (["--ranks", "2", "--slower", "1:nan"], "--slower 1: got nan; 1 to 1000"),
        (["--ranks", "2", "--slower", "1:1300"], "--slower 1: got 1300"),
        (["--ranks", "2", "--slower", "1:1.1", "--slower", "1:1.3"], "rank 1 once"),
    ],
)
def test_the_command_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], named: str
) -> None:
    table, out = written(tmp_path, "tokens,latency_us\n16,0.1\n"), tmp_path / "profile.json"
    code, _, err = gemopt(capsys, "profile", "import", table, "-o", out, *extra)
    assert code == 2 and named in err and err.count("\n") == 1 and not out.exists()


# --- equal devices ---------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code, out, err = gemopt(capsys, *words)
    return code, " ".join((out + err).split())


def test_ranks_without_speeds_are_equal_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = written(tmp_path, "tokens,dtype,uuid,latency_us\n8,a,u,1\n8,b,u,3\n16,a,u,2\n"), tmp_path / "p.json"
    words = ["profile", "import", table, "--unit", "assignments", "--where", "dtype=a", "-o", out]
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


def test_repeats_that_disagree_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"{n},{us}\n" for n, us in ((8, 50), (8, 100), (16, 60), (16, 61)))
    words = ["profile", "import", written(tmp_path, "assignments,latency_us\n" + rows), "-o", tmp_path / "p.json"]
    said = "the times of 1 of 2 loads disagree (8 assignments: 75 us"
    assert said in run(capsys, *words)[1]
    code, out, error = gemopt(capsys, *words, "--json")
    assert code == 0 and said in error and out.startswith("{")

"""Kernel tables become profiles: units, column names, what-if clusters, and rows that are wrong."""

from __future__ import annotations

from pathlib import Path

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
    path = written(tmp_path, f"{latency}, {active} ,other,{load}\n2.5, 3,x,8\n\n4,4,y,16\n")
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
    "no latency": ("tokens,seconds\n1,2\n", "latency_us or time_us"),
    "text": ("tokens,latency_us\n1,fast\n", "line 2, latency_us: got fast"),
    "NaN": ("tokens,latency_us\n1,2\n2,nan\n", "line 3, latency_us"),
    "infinite": ("tokens,latency_us\n1,inf\n", "line 2"),
    "negative": ("tokens,latency_us\n-1,2\n", "line 2, tokens: got -1"),
    "no time": ("tokens,latency_us\n1,0\n", "work takes time"),
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

"""Columns of a kernel table that were read off a run, as rates and memory, and those that were set for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from kernel_tables import loads, written

from gemopt.exceptions import InputError
from gemopt.formats.tables.kernel import read_table


def test_a_limit_that_was_set_is_no_reading(tmp_path: Path) -> None:
    path = written(tmp_path, "assignments,power_limit_w,power_w,time_us\n8,700,655.5,5\n16,500,493.1,9\n")
    with pytest.raises(InputError, match="rows that differ in power_limit_w; "):
        read_table(path)
    assert loads(read_table(path, where=["power_limit_w=700"])) == [(8, None, 5)]


@pytest.mark.parametrize(
    "name", ["tok_s", "tokens_s", "peak_memory_mb", "mem_gb", "max_memory_allocated", "max_mem_mb", "sm_occupancy"]
)
def test_rates_and_memory_that_go_with_the_load_are_results(tmp_path: Path, name: str) -> None:
    rows = "".join(f"{n},{50 + n},{900 + 7 * n}\n" for n in (1, 2, 4, 8, 16, 64))
    assert len(loads(read_table(written(tmp_path, f"assignments,time_us,{name}\n{rows}")))) == 6


def test_kinds_of_memory_are_no_results(tmp_path: Path) -> None:
    cells = zip((1, 2, 4, 1, 2, 8), (40, 40, 40, 80, 80, 80), strict=True)
    path = written(
        tmp_path, "assignments,time_us,mem_gb\n" + "".join(f"{n},{50 + n + size},{size}\n" for n, size in cells)
    )
    with pytest.raises(InputError, match="rows that differ in mem_gb"):
        read_table(path)


@pytest.mark.parametrize("name,kinds", [
    ("gpu_memory_gb", ["80", "192"]), ("memory_type", ["HBM3", "HBM3e"]), ("occupancy", ["low", "high"]),
    ("power_mode", ["low", "high"]), ("allocated_experts", ["8", "16"]),
])  # fmt: skip
def test_what_was_set_for_some_of_the_loads_is_no_reading(tmp_path: Path, name: str, kinds: list[str]) -> None:
    rows = "".join(f"{n},{50 + n},{kinds[n > 8]}\n" for n in (1, 2, 4, 8, 16, 32, 64))
    path = written(tmp_path, f"assignments,time_us,{name}\n{rows}")
    with pytest.raises(InputError, match=f"rows that differ in {name}; "):
        read_table(path)


def test_devices_may_have_memories_of_their_own(tmp_path: Path) -> None:
    rows = "".join(f"{rank},{n},{50 + n},{gb}\n" for rank, gb in enumerate((80, 192)) for n in (1, 2, 4, 8))
    path = written(tmp_path, f"rank,assignments,time_us,gpu_memory_gb\n{rows}")
    assert loads(read_table(path)) == [(n, None, 50.0 + n) for n in (1, 2, 4, 8)]


@pytest.mark.parametrize(
    "cells",
    [
        ("20.5 ± 0.3", "1024.5 ± 11"),
        ("20.5 +/- 0.3 us", "1024.5 +/- 11 us"),
        ("2.05e+01 +- 3e-01", "1.0245e+03 +- 1.1e+01"),
        ("20.5 us ± 1.2 %", "1024.5 us ± 1%"),
        ("20.5 µs ± 300 ns per loop (mean ± std. dev. of 7 runs; 100 loops each)", "1.0245 ms ± 2 µs per loop"),
    ],
)
def test_a_spread_behind_each_time_is_left_out(tmp_path: Path, cells: tuple[str, str]) -> None:
    name = "latency" if "s" in cells[0] else "latency_us"
    rows = "".join(f"{n},{cell}\n" for n, cell in zip((8, 16), cells, strict=True))
    assert loads(read_table(written(tmp_path, f"assignments,{name}\n{rows}"))) == [(8, None, 20.5), (16, None, 1024.5)]


def test_a_spread_behind_some_times_or_of_loads_is_no_number(tmp_path: Path) -> None:
    for rows in ("8,20.5 ± 0.3\n16,24.5\n", "8 ± 3,20.5\n16 ± 4,24.5\n"):
        with pytest.raises(InputError, match="a number from 0 to"):
            read_table(written(tmp_path, f"assignments,latency_us\n{rows}"))
    with pytest.raises(InputError, match="got 8 ± 3; a number from 0 to"):
        read_table(written(tmp_path, "rows,latency_us\n8 ± 3,20.5\n16 ± 4,24.5\n"), load="rows", unit="assignments")


def test_titles_above_a_table_as_spreadsheets_save_it(tmp_path: Path) -> None:
    text = "H200 sweep,,\n,,\nJanuary,,\nassignments,latency_us,power_w\n8,20.5,650\n16,24.5,655\n"
    assert loads(read_table(written(tmp_path, text))) == [(8, None, 20.5), (16, None, 24.5)]

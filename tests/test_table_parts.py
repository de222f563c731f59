"""Kernel tables of parts of a layer, and several tables at once: added up as asked, refused where nothing is said."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_inputs import gemopt
from kernel_tables import loads, written

from gemopt.exceptions import InputError
from gemopt.formats.tables.kernel import read_table
from gemopt.profile import Profile

LOADS = (1, 4, 16, 64)
PARTS: dict[str, Callable[[int], float]] = {
    "gate_up": lambda n: 20 + n / 4,
    "silu": lambda n: 3 + n / 32,
    "down": lambda n: 12 + n / 8,
}
WHOLE = [(n, None, sum(part(n) for part in PARTS.values())) for n in LOADS]


def tables(folder: Path) -> list[Path]:
    """A table of each part."""
    return [
        written(folder, "assignments,us\n" + "".join(f"{n},{part(n)}\n" for n in LOADS), f"{name}.csv")
        for name, part in PARTS.items()
    ]


def rows(*columns: str, lines: dict[str, str] | None = None) -> str:
    """A table with a row for each part and load, and cells beside for each part."""
    beside = lines or dict.fromkeys(PARTS, "")
    cells = [f"{n},{name},{part(n)}{beside[name]}" for name, part in PARTS.items() for n in LOADS]
    return "\n".join([",".join(["assignments", "kernel", "us", *columns]), *cells, ""])


def test_tables_of_parts_are_added_up_load_by_load(tmp_path: Path) -> None:
    notes: list[str] = []
    assert loads(read_table(tables(tmp_path), parts=["file"], notes=notes)) == WHOLE
    assert notes == ["gate_up + silu + down: their times are added up"]


def test_nobody_guesses_what_several_tables_are(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read_table(tables(tmp_path))
    assert str(error.value) == (
        "TABLES: got gate_up, silu, down; what these are, said; kernels of one layer, to be added up: --sum-column "
        "file; a device each: --device-column file; repeats of one measurement, or loads of their own: "
        "--repeat-column file"
    )


@pytest.mark.parametrize("other", ["device", "repeat"])
def test_files_are_parts_or_something_else(tmp_path: Path, other: str) -> None:
    with pytest.raises(InputError) as error:
        read_table(tables(tmp_path), parts=["file"], **{other: ["file"]})  # type: ignore[arg-type]
    assert "--sum-column: got file; a column that is not said to tell devices" in str(error.value)


def test_tables_may_be_a_device_each(tmp_path: Path) -> None:
    paths = [written(tmp_path, f"assignments,us\n8,{10 + r}\n", f"gpu{r}.csv") for r in (10, 2)]
    profile = read_table(paths, device=["file"])
    assert [(device.name, *loads(profile, device.rank)) for device in profile.devices] == [
        ("file gpu2", (8, None, 12.0)),
        ("file gpu10", (8, None, 20.0)),
    ]


def test_tables_may_name_their_rank_themselves(tmp_path: Path) -> None:
    paths = [written(tmp_path, f"rank,assignments,us\n{r},8,{10 + r}\n", f"t{r}.csv") for r in (0, 1)]
    assert [loads(read_table(paths), rank) for rank in (0, 1)] == [[(8, None, 10.0)], [(8, None, 11.0)]]


def test_tables_of_one_load_each_are_one_curve(tmp_path: Path) -> None:
    paths = [written(tmp_path, f"assignments,us\n{n},10\n{n},12\n", f"batch{n}.csv") for n in LOADS]
    assert loads(read_table(paths, repeat=["file"])) == [(n, None, 11.0) for n in LOADS]


@pytest.mark.parametrize(
    ("columns", "cells", "said"),
    [
        ((), {}, []),
        (("n", "k"), {"gate_up": ",1536,2048", "silu": ",768,2048", "down": ",2048,2048"}, ["the parts differ in n"]),
    ],
)
def test_rows_of_parts_are_added_up(
    tmp_path: Path, columns: tuple[str, ...], cells: dict[str, str], said: list[str]
) -> None:
    notes: list[str] = []
    table = written(tmp_path, rows(*columns, lines=cells or None))
    assert loads(read_table(table, parts=["kernel"], notes=notes)) == WHOLE
    assert (
        notes[:2]
        == ["gate_up + silu + down: their times are added up", *said][: 1 + len(said)] + notes[1 + len(said) : 2]
    )


def test_repeats_of_a_part_are_its_median_on_each_rank(tmp_path: Path) -> None:
    lines = [
        f"{rank},{kernel},{run},8,{time + rank + run}"
        for rank in (0, 1)
        for kernel, time in (("up", 20), ("down", 10))
        for run in (0, 1, 5)
    ]
    profile = read_table(written(tmp_path, "\n".join(["rank,kernel,run,assignments,us", *lines])), parts=["kernel"])
    assert [loads(profile, rank) for rank in (0, 1)] == [[(8, None, 32.0)], [(8, None, 34.0)]]


def test_an_idle_device_takes_what_its_parts_take(tmp_path: Path) -> None:
    table = written(tmp_path, "assignments,kernel,us\n0,up,0\n0,down,2\n8,up,5\n8,down,3\n")
    assert loads(read_table(table, parts=["kernel"])) == [(0, None, 2.0), (8, None, 8.0)]


REFUSED = {
    "a load that a part lacks": (
        "assignments,kernel,us\n1,up,5\n2,up,6\n1,down,3\n",
        "line 3: got load 2 of up; each load in all parts: 2 is missing in down",
    ),
    "a part that a rank lacks": (
        "rank,assignments,kernel,us\n0,1,up,5\n0,1,down,3\n1,1,up,5\n",
        "line 4: got no down; all parts on every device",
    ),
    "rows of two kinds in a part": (
        "assignments,kernel,dtype,us\n1,up,bf16,5\n1,up,fp8,3\n1,down,bf16,3\n1,down,fp8,2\n",
        "rows that differ in dtype",
    ),
    "devices": ("assignments,kernel,us\n1,gpu0,5\n1,gpu1,3\n", "no devices; --device-column 'kernel'"),
    "an exchange": ("assignments,kernel,us\n1,dispatch,5\n1,up,3\n", "leave such rows out: --where 'kernel=up'"),
    "their sum among them": (
        "assignments,kernel,us\n1,up,5\n1,down,3\n1,total,8\n",
        "got total; parts, and not their sum; leave such rows out: --where 'kernel=up' --where 'kernel=down'",
    ),
    "both ways of an exchange": (
        "assignments,kernel,us\n1,dispatch,5\n1,up,3\n1,combine,4\n",
        "got dispatch, combine; parts of a MoE layer, without the exchange of tokens; a topology adds exchanges; leave "
        "such rows out: --where 'kernel=up'",
    ),
    "what is in no MoE layer": ("assignments,kernel,us\n1,flash attention,5\n1,up,3\n", "parts of a MoE layer"),
    "runs": ("assignments,kernel,us\n1,run 1,5\n1,run 2,3\n", "no repeats; --repeat-column 'kernel'"),
    "a failed run": ("assignments,kernel,us\n1,up,5\n1,down,0\n", "line 3, us: got 0; above 0"),
    "repeats manyfold apart": (
        "assignments,kernel,us\n1,up,5\n1,up,50\n1,down,3\n1,down,3\n",
        "line 2 and line 3, us: got 5 and 50 for one load",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_parts_that_make_no_layer_are_refused(tmp_path: Path, case: str) -> None:
    text, named = REFUSED[case]
    with pytest.raises(InputError) as error:
        read_table(written(tmp_path, text), parts=["kernel"])
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("rank0_bf16.csv", "rank1_bf16.csv"), "no devices; --device-column 'file'"),
        (("gpu_0/t.csv", "gpu_1/t.csv"), "no devices; --device-column 'file'"),
        (("up_gpu0.csv", "up_gpu1.csv", "down_gpu0.csv", "down_gpu1.csv"), "no devices; --device-column 'file'"),
        (("nodeA.csv", "nodeB.csv"), "no devices; --device-column 'file'"),
        (("run1.csv", "run2.csv"), "no repeats; --repeat-column 'file'"),
        (("layer_3.csv", "layer_11.csv"), "no whole layers; --repeat-column 'file'"),
        (("up_gpu0.csv", "down_gpu0.csv"), ""),
        (("gemm1.csv", "gemm2.csv"), ""),
        (("gpu_up.csv", "gpu_down.csv"), ""),
    ],
)
def test_files_of_devices_repeats_and_layers_are_no_parts(tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    for folder in {Path(name).parent for name in names}:
        (tmp_path / folder).mkdir(exist_ok=True)
    paths = [written(tmp_path, f"assignments,us\n8,{10 + i}\n", name) for i, name in enumerate(names)]
    if not said:
        assert loads(read_table(paths, parts=["file"])) == [(8, None, 21.0)]
        return
    with pytest.raises(InputError) as error:
        read_table(paths, parts=["file"])
    assert said in str(error.value)


def test_files_of_devices_are_no_repeats(tmp_path: Path) -> None:
    paths = [written(tmp_path, f"assignments,us\n8,{10 + 9 * i}\n", f"rank{i}.csv") for i in range(2)]
    with pytest.raises(InputError) as error:
        read_table(paths, repeat=["file"])
    assert str(error.value) == ("--repeat-column: got rank0, rank1; repeats, and no devices; --device-column file")


def test_an_idle_device_may_take_nothing_in_all_columns(tmp_path: Path) -> None:
    table = written(tmp_path, "assignments,up_us,down_us\n0,0,0\n8,5,3\n")
    assert loads(read_table(table, time="up_us+down_us")) == [(0, None, 0.0), (8, None, 8.0)]
    for cells in ("8,0,3", "8,0,0"):
        with pytest.raises(InputError) as error:
            read_table(written(tmp_path, f"assignments,up_us,down_us\n{cells}\n"), time="up_us+down_us")
        assert "above 0: work takes time" in str(error.value)


@pytest.mark.parametrize(
    ("column", "said"),
    [("run", "no repeats"), ("iteration", "no repeats"), ("gpu", "no devices"), ("layer_id", "no whole layers")],
)
def test_columns_of_devices_repeats_and_layers_name_no_parts(tmp_path: Path, column: str, said: str) -> None:
    table = written(tmp_path, f"assignments,{column},us\n8,0,5\n8,1,6\n64,0,7\n64,1,8\n")
    with pytest.raises(InputError) as error:
        read_table(table, parts=[column])
    assert f"{column}: got 0, 1; parts of a layer, and {said}" in str(error.value)


def test_a_table_and_its_packed_copy_are_added_up_once_or_not_at_all(tmp_path: Path) -> None:
    paths = tables(tmp_path)
    packed = tmp_path / "down.csv.gz"
    packed.write_bytes(gzip.compress(paths[-1].read_bytes()))
    with pytest.raises(InputError) as error:
        read_table([*paths, packed], parts=["file"])
    assert "file: got down.csv.gz; other rows than those of down.csv; give each once" in str(error.value)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("up_us+total_us", "times of parts, and no statistics or totals"),
        ("up_us+up_std_us", "times of parts, and no statistics or totals"),
        ("up_us+dispatch_us", "got dispatch_us; parts of a MoE layer, without the exchange of tokens"),
        ("rank0_us+rank1_us", "times of parts, and no devices"),
    ],
)
def test_times_that_are_no_parts_are_not_added_up(tmp_path: Path, asked: str, said: str) -> None:
    names = asked.split("+")
    table = written(tmp_path, f"assignments,{','.join(names)}\n8,20,10\n")
    with pytest.raises(InputError) as error:
        read_table(table, time=asked)
    assert said in str(error.value)


def test_no_hint_adds_up_exchanges_and_attention(tmp_path: Path) -> None:
    table = written(tmp_path, "assignments,gemm1_us,gemm2_us,dispatch_us,combine_us,attention_us\n8,5,6,7,8,9\n")
    with pytest.raises(InputError) as error:
        read_table(table)
    assert str(error.value).endswith("to add them up: --time-column 'gemm1_us+gemm2_us'")


def test_columns_of_parts_are_added_up_in_microseconds(tmp_path: Path) -> None:
    table = written(tmp_path, "assignments,gate_up_us,silu_ms,down_us\n1,20,0.003,12\n8,22,0.004,13\n")
    asked = "gate_up_us+silu_ms+down_us"
    with pytest.raises(InputError) as error:
        read_table(table)
    assert f"to add them up: --time-column '{asked}'" in str(error.value)
    notes: list[str] = []
    assert loads(read_table(table, time=asked, notes=notes)) == [(1, None, 35.0), (8, None, 39.0)] and not notes
    read_table(table, time="gate_up_us+down_us", notes=notes)
    assert notes == ["silu_ms not among the times that are added up"]
    with pytest.raises(InputError) as error:
        read_table(table, time="down_us+down_us")
    assert "each time once" in str(error.value)


AITER = "token,model_dim,inter_dim,expert,topk,"


def test_stages_of_aiter_are_added_up_or_refused(tmp_path: Path) -> None:
    rows = [f"8,7168,256,64,8,{stage},{10 * stage}" for stage in (1, 2)]
    both = written(tmp_path, "\n".join([f"{AITER}stage,us", *rows]))
    apart = [written(tmp_path, f"{AITER}stage,us\n{row}\n", f"tuned{i}.csv") for i, row in enumerate(rows)]
    assert loads(read_table(both, parts=["stage"])) == [(64, None, 30.0)]
    assert loads(read_table(apart, parts=["file"])) == loads(read_table(apart, parts=["stage"])) == [(64, None, 30.0)]
    with pytest.raises(InputError) as error:
        read_table(both)
    assert "stage: got 1, 2; times of whole MoE layers; parts of a layer: --sum-column 'stage'" in str(error.value)
    for chosen in ({"path": apart[0]}, {"path": both, "where": ["stage=1"]}):
        with pytest.raises(InputError) as error:
            read_table(**chosen)  # type: ignore[arg-type]
        assert "stage: got 1; times of whole MoE layers" in str(error.value)


def test_aiter_that_left_out_the_time_of_both_stages(tmp_path: Path) -> None:
    path = written(tmp_path, f"{AITER}us1,us2,us,run_1stage\n8,7168,256,64,8,10.5,20,0,0\n")
    with pytest.raises(InputError) as error:
        read_table(path)
    assert "line 2, us: got 0 beside us1 and us2; the time of both stages; --time-column us1+us2" in str(error.value)
    assert loads(read_table(path, time="us1+us2")) == [(64, None, 30.5)]


@pytest.mark.parametrize(("name", "said"), [("down.csv", True), ("w13_gemm.csv", True), ("moe_h100.csv", False)])
def test_a_table_named_after_a_part_is_said(tmp_path: Path, name: str, said: bool) -> None:
    notes: list[str] = []
    read_table(written(tmp_path, "assignments,us\n1,20\n", name), notes=notes)
    assert any("of a part of the layer" in note for note in notes) == said


def test_a_part_that_was_chosen_is_said(tmp_path: Path) -> None:
    notes: list[str] = []
    read_table(tables(tmp_path), where=["file=down"], time="us", notes=notes)
    assert any(note.startswith("down: of a part of the layer, by the name?") for note in notes)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("stats.csv", '"Name","Calls","TotalDurationNs","AverageNs","Percentage"\n"moe",10,600000,60000,100.0\n'),
        ("kern_sum.csv", "Time (%),Total Time (ns),Instances,Avg (ns),Name\n100.0,600000,10,60000.0,moe\n"),
        ("op_summary.csv", "Device_id,Task ID,Stream ID,Op Name,Task Duration(us),Block Dim\n0,1,2,moe,120.3,24\n"),
        ("ncu.csv", '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n"0","moe","Duration","us","51"\n'),
        ("results.csv", "Index,KernelName,gpu-id,grd,wgr,BeginNs,EndNs,DurationNs\n0,moe.kd,1,512,256,5,50005,50000\n"),
        ("trace.json", '{"schemaVersion": 1, "traceEvents": [{"ph": "X", "name": "moe", "ts": 1, "dur": 30.5}]}'),
    ],
)
def test_what_profilers_write_has_no_loads(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(InputError) as error:
        read_table(written(tmp_path, text, name))
    assert "profilers tell no loads: write a row for each load" in str(error.value)


def test_the_command_takes_several_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "profile.json"
    code, said, _ = gemopt(capsys, "profile", "import", *tables(tmp_path), "--sum-column", "file", "-o", output)
    assert code == 0 and "1 device, 4 samples" in said
    profile = Profile.load(output)
    assert loads(profile) == WHOLE and profile.source == "imported from gate_up.csv, silu.csv, down.csv"

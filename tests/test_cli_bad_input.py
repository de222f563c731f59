"""Bad input gives exit code 2, one line that names field, value, limit and way out, and leaves no file behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.core
from cli_inputs import gemopt, profile, traces, write_inputs
from safetensors.numpy import save_file

from gemopt.placement import Placement
from gemopt.traces import Traces

SUGGESTS = hasattr(typer.core.TyperGroup(name="g"), "suggest_commands")  # from typer 0.20 on

pytestmark = pytest.mark.usefixtures("quick_bounds")


def profile_with(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        document = json.loads(profile().model_dump_json())
        change(document)
        path.write_text(json.dumps(document))

    return write


def first_sample(**values: Any) -> Callable[[Path], object]:
    return profile_with(lambda document: document["devices"][0]["samples"][1].update(values))


def counts(array: np.ndarray) -> Callable[[Path], object]:
    return lambda path: save_file({"counts": np.ascontiguousarray(array)}, path)


def changed(value: float, dtype: Any = np.float64) -> np.ndarray:
    array = np.ones((4, 2, 4), dtype)
    array[2, 1, 3] = value
    return array


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


PROFILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "No such file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "directory"),
    "empty": (text(""), "complete JSON"),
    "truncated": (lambda path: path.write_text(path.read_text()[:-20]), "complete JSON"),
    "binary": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "complete JSON"),
    "not an object": (text("[1, 2]"), "JSON object"),
    "no devices": (profile_with(lambda d: d.update(devices=[])), "devices"),
    "unknown version": (profile_with(lambda d: d.update(schema_version=9)), "version 1"),
    "unknown key": (profile_with(lambda d: d.update(device=[])), "device"),
    "non-numeric": (first_sample(latency_us="fast"), "latency_us"),
    "NaN": (lambda path: path.write_text(path.read_text().replace(": 20.0", ": NaN")), "NaN"),
    "negative": (first_sample(latency_us=-4), "latency_us"),
    "negative load": (first_sample(assignments=-4), "assignments"),
    "overflowing": (first_sample(assignments=2**40), "assignments"),
    "huge": (first_sample(assignments=10**4000), "assignments"),
    "duplicated": (first_sample(assignments=0), "measured twice"),
    "rank twice": (profile_with(lambda d: d["devices"][0].update(rank=1)), "rank"),
    "too few samples": (profile_with(lambda d: None), "--cost roofline"),
}
TRACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "No such file"),
    "empty": (lambda path: path.write_bytes(b""), "complete safetensors"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "complete safetensors"),
    "non-numeric": (text("counts"), "complete safetensors"),
    "an empty folder": (lambda path: (path.unlink(), path.mkdir()), "numbered"),
    "NaN": (counts(changed(np.nan)), "NaN"),
    "negative": (counts(changed(-1, np.int32)), "got -1"),
    "fractions": (counts(changed(0.5)), "fractions"),
    "overflowing": (counts(changed(2**63, np.uint64)), "at most 2147483647"),
    "wrong shape": (counts(np.ones((4, 4), np.int32)), "shape (4, 4)"),
    "no step": (counts(np.ones((0, 2, 4), np.int32)), "at least one step"),
    "wrong type": (counts(np.ones((4, 2, 4), bool)), "bool"),
    "no counts": (lambda path: save_file({"loads": np.ones((4, 2, 4))}, path), "counts"),
    "unknown version": (
        lambda path: save_file({"counts": np.ones((4, 2, 4))}, path, {"gemopt_traces": "7"}),
        "version 1",
    ),
}
OPTIONS: dict[str, tuple[tuple[object, ...], str]] = {
    "fewer slots than experts": (("--slots-per-rank", 1), "use 2 slots per rank"),
    "too many slots": (("--slots-per-rank", 5), "at most 4"),
    "negative slots": (("--slots-per-rank", -2), "slots_per_rank"),
    "slots of other ranks": (("--slots-per-rank", "2,2,2"), "one per rank (2)"),
    "slots of text": (("--slots-per-rank", "two"), "--slots-per-rank"),
    "fractional slots": (("--slots-per-rank", "2.5"), "--slots-per-rank"),
    "unknown solver": (("--solver", "magic"), "local-search"),
    "unknown cost": (("--cost", "cubic"), "staircase"),
    "no time": (("--time-limit", 0), "time_limit"),
    "negative time": (("--time-limit", -1), "time_limit"),
    "time of text": (("--time-limit", "long"), "--time-limit"),
    "no number": (("--time-limit", "nan"), "time_limit"),
    "gap above one": (("--gap", 1.5), "gap"),
    "gap below zero": (("--gap", -0.5), "gap"),
    "no threads": (("--threads", 0), "threads"),
    "patience": (("--patience", -1), "patience"),
    "unknown task": (("--task", "poetry"), "maths, code"),
    "unknown phase": (("--phase", "sleep"), "prefill, decode"),
    "absent phase": (("--phase", "mixed"), "none of the 12 steps"),
    "unknown option": (("--speed", 3), "--speed"),
    "missing warm start": (("--warm-start", "none.json"), "none.json"),
    "senders of an even split": (("--senders", "uniform"), "the even split does not ask who sends"),
    "a budget for full slots": (
        ("--engine", "sglang", "--memory-budget", 9, "--expert-bytes", 1),
        "sglang needs an expert in every slot",
    ),
    "full slots of an exact solver": (
        ("--engine", "sglang", "--solver", "branch", "--slots-per-rank", 3),
        "--engine: got sglang; sglang needs an expert in every slot, which branch cannot heed; use --solver auto",
    ),
    "unequal slots of eplb": (("--solver", "eplb", "--slots-per-rank", "3,1"), "use linear"),
}


def refused(folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[object, ...], *named: str) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*")}
    code, out, err = gemopt(capsys, *words)
    assert (code, out) == (2, ""), (code, out, err)
    assert err.startswith("gemopt: ") and err.count("\n") == 1 and len(err) < 700
    for each in named:
        assert each in err
    assert {path.name: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("case", PROFILES)
@pytest.mark.parametrize("command", ["solve", "compare"])
def test_a_wrong_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, command: str) -> None:
    inputs = write_inputs(tmp_path)
    spoil, named = PROFILES[case]
    spoil(Path(inputs[0]))
    extra: tuple[object, ...] = ("-o", tmp_path / "out.json") if command == "solve" else ("--solvers", "linear")
    if case == "too few samples":
        Path(inputs[0]).write_text('{"devices": [{"rank": 0, "samples": [{"assignments": 1, "latency_us": 2}]}]}')
        refused(
            tmp_path, capsys, (command, *inputs, *extra, "--cost", "roofline"), "cost model: got roofline", "too few"
        )
    else:
        refused(tmp_path, capsys, (command, *inputs, *extra), named)


@pytest.mark.parametrize("case", TRACES)
def test_wrong_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    inputs = write_inputs(tmp_path)
    spoil, named = TRACES[case]
    spoil(Path(inputs[1]))
    refused(tmp_path, capsys, ("solve", *inputs, "-o", tmp_path / "out.json"), named, "traces.safetensors")


@pytest.mark.parametrize("case", OPTIONS)
def test_wrong_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    inputs = write_inputs(tmp_path)
    options, named = OPTIONS[case]
    refused(tmp_path, capsys, ("solve", *inputs, "-o", tmp_path / "out.json", *options), named)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--holdout", 1), "holdout"),
        (("--holdout", -0.5), "holdout"),
        (("--holdout", "nan"), "holdout"),
        (("--holdout", 0.01), "12 steps"),
        (("--solvers", "linear,magic"), "magic"),
        (("--solvers", "linear,"), "solver"),
        (("--plot", "picture.xyz"), "png"),
        (("--plot", "nowhere/picture.png"), "nowhere"),
        (("--expert-bytes", 5), "--moves"),
        (("--moves", "--current", "p.json", "--slots-per-rank", 3), "--slots-per-rank: got 3"),
        (("--moves", "--current", "p.json", "--engine", "sglang"), "--engine: got sglang"),
        (("--engine", "sglang", "--slots-per-rank", "3,2"), "sglang needs as many slots on every rank"),
    ],
)
def test_wrong_options_of_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...], named: str
) -> None:
    refused(tmp_path, capsys, ("compare", *write_inputs(tmp_path), "--time-limit", 1, *options), named)


def test_one_step_cannot_be_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_inputs(tmp_path)
    traces(1).save(inputs[1])
    refused(tmp_path, capsys, ("compare", *inputs, "--solvers", "linear"), "hold none out")
    assert gemopt(capsys, "compare", *inputs, "--solvers", "linear", "--holdout", 0)[0] == 0


@pytest.mark.parametrize("output", ["nowhere/out.json", ".", "/dev/null"])
@pytest.mark.parametrize("option", ["-o", "--result"])
def test_outputs_are_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(tmp_path, capsys, ("solve", *write_inputs(tmp_path), option, output), output)


@pytest.mark.parametrize(
    ("placement", "named"),
    [
        (Placement.contiguous(2, 6, 2), "the traces have 4 experts"),
        (Placement.contiguous(3, 4, 2), "layer_ids"),
        (Placement.contiguous(2, 4, 4), "the profile has 2 devices"),
        (Placement.contiguous(2, 4, 2, layer_ids=[5, 7]), "[0, 1]"),
    ],
)
def test_placements_profiles_and_traces_that_disagree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], placement: Placement, named: str
) -> None:
    inputs = write_inputs(tmp_path)
    placement.save(tmp_path / "p.json")
    refused(tmp_path, capsys, ("evaluate", tmp_path / "p.json", *inputs), named)
    refused(tmp_path, capsys, ("solve", *inputs, "--warm-start", tmp_path / "p.json"), named)


def test_a_warm_start_that_the_solver_would_not_heed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_inputs(tmp_path)
    Placement.contiguous(2, 4, 2).save(tmp_path / "p.json")
    words = ("solve", *inputs, "--solver", "lpt", "--warm-start", tmp_path / "p.json")
    refused(tmp_path, capsys, words, "use gem or local-search")


def test_a_wrong_placement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_inputs(tmp_path)
    path = tmp_path / "p.json"
    good = {"physical_to_logical": [[0, 1, 2, 3]] * 2, "slots_per_rank": [2, 2], "num_experts": 4}
    for change, named in (
        ({"physical_to_logical": [[0, 1, 2, 2]] * 2}, "expert 3"),
        ({"physical_to_logical": [[0, 0, 1, 2]] * 2}, "expert 3"),
        ({"physical_to_logical": [[0, 1, 2]] * 2}, "4 slots"),
        ({"layer_ids": [0]}, "layer_ids"),
    ):
        path.write_text(json.dumps({**good, **change}))
        refused(tmp_path, capsys, ("evaluate", path, *inputs), named, "p.json")


@pytest.mark.parametrize(
    ("options", "named"),
    [(("--source", "checkpoint"), "--to checkpoint"), (("--profile", "profile.json"), "give --approximate")],
)
def test_options_of_an_export_that_it_would_not_heed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...], named: str
) -> None:
    Placement.contiguous(2, 4, 2).save(tmp_path / "p.json")
    words = ("export", tmp_path / "p.json", "--to", "csv", "-o", tmp_path / "out.csv", *options)
    refused(tmp_path, capsys, words, named)


def test_experts_that_do_not_divide_have_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_inputs(tmp_path)
    profile(3).save(inputs[0])
    code, _, err = gemopt(capsys, "solve", *inputs, "-o", tmp_path / "out.json", "--solver", "lpt")
    assert (code, err) == (0, "") and Placement.load(tmp_path / "out.json").slots_per_rank.tolist() == [2, 1, 1]


def test_more_ranks_than_experts_have_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_inputs(tmp_path)
    profile(6).save(inputs[0])
    assert gemopt(capsys, "solve", *inputs, "-o", tmp_path / "out.json", "--solver", "lpt")[0] == 0
    assert Placement.load(tmp_path / "out.json").slots_per_rank.tolist() == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("option", ["--files", "--out"])
def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    (tmp_path / "file").write_text("")
    refused(
        tmp_path, capsys, ("demo", option, tmp_path / "file" / "out"), "a file or folder that can be read and written"
    )


@pytest.mark.parametrize(
    ("words", "way_out"),
    [
        (("solve",), "see gemopt solve --help"),
        (("trace", "import"), "see gemopt trace import --help"),
        (("engines", "sglang"), "see gemopt engines --help"),
        (("solve", "p", "t", "--time-limit", "long"), "see gemopt solve --help"),
        (("slove",), "Did you mean 'solve'?" if SUGGESTS else "see gemopt --help"),
        (("watch", "nowhere", "--profile", "p", "--placement", "q", "--once"), "leave out --once"),
        (("watch", sys.executable, "--profile", "p", "--placement", "q"), "no file"),
    ],
)
def test_a_wrong_line_says_where_to_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], way_out: str
) -> None:
    refused(tmp_path, capsys, words, way_out)
    assert gemopt(capsys, *words)[2].endswith(f"{way_out}\n") or words[0] == "watch"


def test_no_traceback_from_a_shell(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path)
    Traces.load(inputs[1]).steps(slice(0, 2)).save(inputs[1])
    for words in (("solve", inputs[0]), ("solve", inputs[1], inputs[0]), ("nonsense",)):
        done = subprocess.run(
            [sys.executable, "-m", "gemopt", *words], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr

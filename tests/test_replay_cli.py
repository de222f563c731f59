"""`gemopt replay` as a user meets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_inputs import gemopt, gemopt_json, profile

from gemopt.replay import STRATEGIES, ReplayResult
from gemopt.traces import Traces

FIELDS = {
    "strategy",
    "makespan_us",
    "change",
    "moves",
    "migration_us",
    "p50_us",
    "p90_us",
    "p99_us",
    "ttft_ms",
    "tpot_ms",
}


@pytest.fixture
def inputs(tmp_path: Path) -> list[Any]:
    """The words `replay TRACES --profile P --window 8`."""
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.ones(6), size=(2, 2))
    counts = np.stack([rng.multinomial(64, share[t // 20 % 2]) for t in range(60)])
    tasks = {"task": np.arange(60) // 20 % 2, "task_names": ("maths", "code")}
    Traces(counts=counts, **tasks).save(tmp_path / "traces.safetensors")  # type: ignore[arg-type]
    profile(3).save(tmp_path / "profile.json")
    return ["replay", tmp_path / "traces.safetensors", "--profile", tmp_path / "profile.json", "--window", 8]


def test_rows_for_machines(inputs: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    rows = gemopt_json(capsys, *inputs)
    assert [row["strategy"] for row in rows] == list(STRATEGIES)
    assert all(set(row) == FIELDS for row in rows)
    assert rows[0]["change"] == 0 and rows[0]["ttft_ms"] is None
    again = gemopt_json(capsys, *inputs, "--strategies", "clairvoyant,free")
    assert again == [rows[-1], rows[4]]


def test_table_picture_and_file(inputs: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    wanted = [
        "--plot",
        tmp_path / "out.png",
        "-o",
        tmp_path / "out.json",
        "--event",
        "1:1.5@35-50",
        "--non-moe-us",
        500,
    ]
    code, out, err = gemopt(capsys, *inputs, *wanted)
    assert (code, err) == (0, "")
    assert "eplb-vllm rearranges after 750 steps, and there are 60: here it stays as it starts" in out
    assert all(name in out for name in STRATEGIES) and "1:1.5@35-50" in out and "500 us" in out
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    result = ReplayResult.load(tmp_path / "out.json")
    assert [(regime.name, regime.start, regime.stop) for regime in result.regimes] == [
        ("maths", 0, 20),
        ("code", 20, 40),
        ("maths", 40, 60),
    ]
    assert len(result.track("controller").step_us) == 30
    assert result.non_moe_us == 500


def test_a_plan_rearranges_tagged_steps(inputs: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    words = ["--plan", "A:20 code:12 A:16", "--strategies", "contiguous", "-o", out]
    gemopt_json(capsys, *inputs, *words)
    result = ReplayResult.load(out)
    assert [(r.name, r.stop - r.start) for r in result.regimes] == [("maths", 20), ("code", 12), ("maths", 16)]
    assert result.first_step == 24


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--strategies", "fred"], "--strategies: got fred"),
        (["--window", "31"], "traces: got 30 steps to score; at least the 31 of a window"),
        (["--fit", "1"], "--fit: got 1.0"),
        (["--event", "3:1.3@40"], "--event: got 3:1.3@40; ranks 0 to 2"),
        (["--event", "fast"], "--event: got fast"),
        (["--bandwidth", "0"], "--bandwidth: got 0.0"),
        (["--gbps", "-2"], "--bandwidth: got -2.0; GB/s above 0"),
        (["--expert-bytes", "nan"], "--expert-bytes: got nan"),
        (["--slowdown", "3"], "--slowdown: got 3.0"),
        (["--noise", "-1"], "--noise: got -1.0"),
        (["--plan", "physics:5"], "--plan: got physics"),
        (["--plot", "out.docx"], "--plot: got out.docx"),
        (["-o", "/no/such/folder/out.json"], "no such folder"),
        (["--slots-per-rank", "1"], "slots"),
    ],
)
def test_bad_input_is_one_line(
    inputs: list[Any], words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    code, out, err = gemopt(capsys, *inputs, *words)
    assert (code, out) == (2, "")
    assert err.startswith("gemopt: ") and err.count("\n") == 1 and said in err


def test_unequal_slots_leave_out_eplb_and_say_so(
    inputs: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six experts on four ranks: engines with EPLB cannot, and all others run."""
    profile(4).save(tmp_path / "profile.json")
    code, out, err = gemopt(capsys, *inputs)
    assert code == 0 and "eplb-vllm, eplb-sglang: left out" in out + err
    assert "controller" in out and "clairvoyant" in out
    code, out, err = gemopt(capsys, *inputs, "--strategies", "eplb-vllm")
    assert code == 2 and "needs the same for every rank" in out + err


def test_events_that_slow_no_scored_step_are_said(inputs: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = gemopt(capsys, *inputs, "--strategies", "contiguous", "--event", "1:2@3-30")
    assert code == 0 and "1:2@3-30 is over before step 30, the first that is scored" in out + err
    code, out, err = gemopt(capsys, *inputs, "--strategies", "contiguous", "--event", "1:2@3-31")
    assert code == 0 and "is over before" not in out + err and "times the time" not in out + err
    code, out, err = gemopt(capsys, *inputs, "--strategies", "contiguous", "--event", "1:0.8@40", "--event", "2:30@40")
    assert code == 0 and "1:0.8@40 is 0.8 times the time, quicker; at 0.8 of the speed: 1.25" in out + err
    assert "2:30@40 is 30 times the time; 30 % more is 1.3" in out + err


def test_sizes_and_bandwidths_that_hardly_are_in_their_unit_are_said(
    inputs: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    common = (*inputs, "--strategies", "contiguous")
    code, out, err = gemopt(capsys, *common, "--expert-bytes", "9.4", "--bandwidth", 20000)
    assert code == 0 and "an expert of 9.4 bytes: is that in bytes, and of one layer?" in out + err
    assert "copied at 20000 GB/s, 2e+13 bytes per second: is the unit right?" in out + err
    code, out, err = gemopt(capsys, *common, "--expert-bytes", "9.4e6", "--bandwidth", 400)
    assert code == 0 and "note" not in out + err


def test_moves_are_drawn_in_proportion_unless_they_are_far_apart(inputs: list[Any]) -> None:
    pytest.importorskip("matplotlib")
    from gemopt.plotting import plot_replay
    from gemopt.replay import replay

    played = replay(inputs[3], inputs[1], strategies=["contiguous", "fitted-once"], window=4)
    for most, scale in ((15, "linear"), (900, "symlog")):
        moved = [[3, *[0] * (len(track.moves) - 1)] for track in played.timeline]
        moved[0][-1] = most
        timeline = [
            track.model_copy(update={"moves": each}) for track, each in zip(played.timeline, moved, strict=True)
        ]
        _, lower = plot_replay(played.model_copy(update={"timeline": timeline}))
        assert lower.get_yscale() == scale
        assert ("log" in lower.get_ylabel()) is (scale == "symlog")
        assert max(lower.lines[0].get_ydata()) == most + 3

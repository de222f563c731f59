"""`--current` and what goes with it on the command line: what is written, printed and answered."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_inputs import gemopt, gemopt_json, profile, traces

from gemopt.migration import count_moves
from gemopt.placement import Placement
from gemopt.profile import Profile

pytestmark = pytest.mark.usefixtures("quick_bounds")

COMMON = ("--solver", "local-search", "--patience", 3, "--time-limit", 30)


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[str, str, str]:
    """Paths of a profile of 4 ranks, traces of 8 experts, and a placement in force."""
    profile(4).save(tmp_path / "profile.json")
    traces(experts=8).save(tmp_path / "traces.safetensors")
    Placement.contiguous(2, 8, 4).save(tmp_path / "current.json")
    return tuple(str(tmp_path / name) for name in ("profile.json", "traces.safetensors", "current.json"))  # type: ignore[return-value]


def moves(before: Placement, after: Placement) -> int:
    rows = zip(before.physical_to_logical, after.physical_to_logical, strict=True)
    return sum(count_moves(a, b, before.slots_per_rank, after.slots_per_rank) for a, b in rows)


def test_limits_hold_and_are_reported(
    inputs: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, current = inputs
    output = tmp_path / "next.json"
    words = ("solve", first, second, "--current", current, "--max-moves", 2, "--expert-bytes", 1000, "-o", output)
    found = gemopt_json(capsys, *words, *COMMON)
    counted = moves(Placement.load(current), Placement.load(output))
    assert found["moves"]["moves"] == counted <= 2
    assert found["moves"]["bytes"] == 1000 * counted and found["moves"]["gain_us"] >= 0
    code, out, _ = gemopt(capsys, *words, *COMMON)
    assert code == 0 and f"{counted} moves" in out
    priced = gemopt_json(
        capsys, "solve", first, second, "--current", current, "--move-price", 1e9, "--horizon-steps", 5, *COMMON
    )
    assert priced["moves"]["moves"] == 0 and priced["moves"]["price_us"] == pytest.approx(1e9 * 12 / 5)
    wired = ("--bandwidth", 2, "--expert-bytes", 4000)
    cheap = gemopt_json(capsys, "solve", first, second, "--current", current, *wired, *COMMON)
    assert cheap["moves"]["move_us"] == pytest.approx(2.0)


def test_ranks_leave_and_come(inputs: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, current = inputs
    words = ("solve", first, second, "--current", current)
    code, out, _ = gemopt(capsys, *words, "--exclude-ranks", "1,3")
    assert code == 3 and "4 slots are missing" in out
    output = tmp_path / "less.json"
    code, out, _ = gemopt(capsys, *words, "--exclude-ranks", 3, "--slots-per-rank", 3, "-o", output, *COMMON)
    assert code == 0 and "4 experts without another copy, from the checkpoint: layer 0: 6, 7" in out
    assert Placement.load(output).slots_per_rank.tolist() == [3, 3, 3] and "--save-profile" in out
    code, out, _ = gemopt(
        capsys, *words, "--exclude-ranks", 3, "--slots-per-rank", 3, "--max-moves", 3, "-o", tmp_path / "no", *COMMON
    )
    assert code == 3 and "need 4 moves" in out and not (tmp_path / "no").exists() and "--save-profile" not in out
    more = gemopt_json(capsys, *words, "--add-rank", 0, "--add-rank", first, *COMMON)
    assert more["moves"]["old_rank"] == [0, 1, 2, 3, -1, -1, -1, -1, -1]


def test_what_a_rank_left_behind_is_used_with_the_profile_that_is_saved(
    inputs: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, current = inputs
    output, rest = tmp_path / "less.json", tmp_path / "rest.json"
    words = ("solve", first, second, "--current", current, "--exclude-ranks", 1, "--slots-per-rank", 3, *COMMON)
    found = gemopt_json(capsys, *words, "-o", output, "--save-profile", rest)
    measured, left = Profile.load(first), Profile.load(rest)
    assert [device.rank for device in left.devices] == [0, 1, 2]
    assert [device.samples for device in left.devices] == [measured.devices[rank].samples for rank in (0, 2, 3)]
    scored = gemopt_json(capsys, "evaluate", output, rest, second)
    assert scored["objective_us"] == pytest.approx(found["objective_us"])
    code, _, err = gemopt(capsys, "evaluate", output, first, second)
    assert code == 2 and "3 ranks; the profile has 4 devices; after a rank left or came, give the profile" in err
    code, _, err = gemopt(capsys, *words, "-o", output, "--save-profile", first)
    assert code == 2 and "--save-profile" in err and Profile.load(first).num_ranks == 4


def test_the_front_is_printed_and_drawn(
    inputs: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, current = inputs
    words = ("compare", first, second, "--current", current, "--moves", "--holdout", 0, "--expert-bytes", 10**9)
    points = gemopt_json(capsys, *words, "--solvers", "lpt")
    assert points[0]["moves"] == 0 and points[-1]["source"] == "lpt" and len(points) > 2
    steps = [point["step_us"] for point in points[:-1]]
    assert steps == sorted(steps, reverse=True) and points[0]["holdout_us"] is None
    code, out, _ = gemopt(capsys, *words, "--plot", tmp_path / "front.png")
    assert code == 0 and "best swaps" in out and (tmp_path / "front.png").stat().st_size > 5000
    assert "GB" in out and "GB" not in gemopt(capsys, *words[:-2])[1], "no size, no column of sizes"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("solve", "--max-moves", "2"), "max_moves"),
        (("solve", "--current", "C", "--exclude-ranks", "x"), "--exclude-ranks"),
        (("solve", "--current", "C", "--exclude-ranks", "9"), "exclude_ranks"),
        (("solve", "--current", "C", "--add-rank", "9"), "add_ranks"),
        (("solve", "--current", "C", "--add-rank", "no.json"), "no.json"),
        (("solve", "--current", "C", "--bandwidth", "5"), "--expert-bytes"),
        (("solve", "--current", "C", "--max-moves", "-1"), "max_moves"),
        (("solve", "--current", "C", "--max-moves", "2", "--solver", "eplb"), "local-search"),
        (("compare", "--moves"), "--current"),
        (("compare", "--current", "C"), "--moves"),
    ],
)
def test_bad_requests_are_one_line(
    inputs: tuple[str, str, str], words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, current = inputs
    rest = [current if word == "C" else word for word in words[1:]]
    code, _, err = gemopt(capsys, words[0], first, second, *rest)
    assert code == 2 and said in err and err.count("\n") == 1


def test_rows_of_the_placement_in_force_stay_where_they_are(
    inputs: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, current = inputs
    output = tmp_path / "next.json"
    words = ("solve", first, second, "--current", current, "--max-moves", 4, "-o", output)
    assert gemopt(capsys, *words, *COMMON)[0] == 0
    before, after = Placement.load(current), Placement.load(output)
    changed = int((np.array(before.physical_to_logical) != np.array(after.physical_to_logical)).sum())
    assert changed == moves(before, after)


def test_a_front_that_the_time_cut_says_so(inputs: tuple[str, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Its one point looks as if moving experts gained nothing; kernels are loaded before the time runs."""
    first, second, current = inputs
    words = ("compare", first, second, "--current", current, "--moves", "--holdout", 0, "--json", "--time-limit")
    code, out, errors = gemopt(capsys, *words, 1e-9)
    assert code == 0 and len(json.loads(out)) == 1 and "the swaps were cut" in errors
    code, out, errors = gemopt(capsys, *words, 600)
    assert code == 0 and len(json.loads(out)) > 1 and "cut" not in errors

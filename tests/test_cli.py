"""What the commands print, write and answer; bad input is in test_cli_bad_input.py."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_inputs import NUM_STEPS, gemopt, gemopt_json, profile, traces, write_inputs
from rich.console import Console

from gemopt.cli.tables import _percent, comparison_table
from gemopt.compare import Comparison
from gemopt.evaluate import evaluate
from gemopt.placement import Placement
from gemopt.profile import Profile
from gemopt.result import Result, Status, StoppedBy
from gemopt.solvers.base import Outcome, Supports
from gemopt.traces import Phase, Traces

pytestmark = pytest.mark.usefixtures("quick_bounds")

SOLVE_FIELDS = {"solver", "status", "stopped_by", "objective_us", "bound_us", "gap", "seconds"}
ROW_FIELDS = SOLVE_FIELDS | {"change", "holdout_us", "holdout_change", "p50_us", "p90_us", "p99_us"}


def test_solve_writes_what_it_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_inputs(tmp_path)
    placement, result = tmp_path / "placement.json", tmp_path / "result.json"
    words = (
        "solve",
        *inputs,
        "-o",
        placement,
        "--result",
        result,
        "--solver",
        "local-search",
        "--time-limit",
        20,
        "--patience",
        3,
    )
    found = gemopt_json(capsys, *words)
    assert set(found) >= SOLVE_FIELDS and found["solver"] == "local-search"
    loaded, whole = Placement.load(placement), Result.load(result)
    score = evaluate(loaded, Profile.load(inputs[0]), Traces.load(inputs[1])).objective_us
    assert found["objective_us"] == pytest.approx(score, rel=1e-12) == whole.objective_us
    assert whole.placement == loaded and 0 <= found["gap"] < 1 and found["bound_us"] <= score
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "placement.json",
        "profile.json",
        "result.json",
        "traces.safetensors",
    ]
    code, out, err = gemopt(capsys, *words)
    assert (code, err) == (0, "") and f"wrote {placement}" in out and "us per step over 2 layers" in out


def test_the_same_seed_gives_the_same_placement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_inputs(tmp_path)
    for name in ("a", "b"):
        words = ("--solver", "local-search", "--patience", 5, "--time-limit", 60, "--seed", 3)
        assert gemopt(capsys, "solve", *inputs, "-o", tmp_path / name, *words)[0] == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_only_the_steps_of_a_task_or_phase_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_inputs(tmp_path)
    measured, whole = Profile.load(inputs[0]), Traces.load(inputs[1])
    contiguous = Placement.contiguous(2, 4, 2)
    contiguous.save(tmp_path / "p.json")
    for option, chosen in (
        (("--task", "code"), whole.select(task="code")),
        (("--phase", "prefill"), whole.select(phase=Phase.PREFILL)),
        ((), whole),
    ):
        expected = evaluate(contiguous, measured, chosen)
        found = gemopt_json(capsys, "evaluate", tmp_path / "p.json", *inputs, *option)
        assert found["objective_us"] == pytest.approx(expected.objective_us)
        assert found["p99_us"] == pytest.approx(expected.quantile_us(0.99))
        solved = gemopt_json(capsys, "solve", *inputs, "--solver", "linear", *option)
        assert solved["objective_us"] == pytest.approx(expected.objective_us)


def test_evaluate_scores_against_contiguous(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_inputs(tmp_path)
    rows = [[3, 1, 2, 0], [0, 2, 1, 3]]
    Placement(physical_to_logical=rows, slots_per_rank=[2, 2], num_experts=4).save(tmp_path / "p.json")
    found = gemopt_json(capsys, "evaluate", tmp_path / "p.json", *inputs)
    base = evaluate(Placement.contiguous(2, 4, 2), Profile.load(inputs[0]), Traces.load(inputs[1])).objective_us
    assert found["change"] == pytest.approx(found["objective_us"] / base - 1)
    assert sum(found["per_layer_us"]) == pytest.approx(found["objective_us"])
    assert found["p50_us"] <= found["p90_us"] <= found["p99_us"]
    code, out, _ = gemopt(capsys, "evaluate", tmp_path / "p.json", *inputs)
    assert code == 0 and f"over {NUM_STEPS} steps" in out


def test_evaluate_says_that_placement_and_traces_are_of_two_networks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile, traces = write_inputs(tmp_path)
    counts = Traces.load(traces).counts
    for name, said in (("Org/Net-A", "Net_b"), ("Org/Net-A", "/models/net_a/")):
        Traces(counts=counts, model=said).save(tmp_path / "named.safetensors")
        Placement.contiguous(2, 4, 2, model=name).save(tmp_path / "p.json")
        _, _, told = gemopt(capsys, "evaluate", tmp_path / "p.json", profile, tmp_path / "named.safetensors")
        assert ("the placement is for Org/Net-A, the traces are of Net_b" in told) == (said == "Net_b")


def test_compare_scores_on_steps_the_solvers_did_not_see(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_inputs(tmp_path)
    words = ("compare", *inputs, "--solvers", "linear,lpt,cpsat", "--time-limit", 60)
    rows = gemopt_json(capsys, *words)
    assert [row["solver"] for row in rows] == ["linear", "lpt", "cpsat"]
    measured, (given, held) = Profile.load(inputs[0]), Traces.load(inputs[1]).split(0.5)
    contiguous = Placement.contiguous(2, 4, 2)
    base = evaluate(contiguous, measured, given)
    scored = evaluate(contiguous, measured, held)
    for row in rows:
        assert set(row) >= ROW_FIELDS
        assert row["change"] == pytest.approx(row["objective_us"] / base.objective_us - 1)
        assert row["holdout_change"] == pytest.approx(row["holdout_us"] / scored.objective_us - 1)
        assert row["bound_us"] <= row["objective_us"]
        assert row["gap"] == pytest.approx(1 - row["bound_us"] / row["objective_us"])
    linear, _, exact = rows
    assert linear["change"] == linear["holdout_change"] == 0
    assert linear["p90_us"] == pytest.approx(scored.quantile_us(0.9))
    assert exact["status"] == "optimal" and exact["objective_us"] <= min(row["objective_us"] for row in rows)
    assert linear["bound_us"] == pytest.approx(exact["bound_us"])  # the best bound holds for all
    whole = gemopt_json(capsys, "compare", *inputs, "--solvers", "lpt", "--holdout", 0)
    assert whole[0]["holdout_us"] is None and whole[0]["holdout_change"] is None and whole[0]["p50_us"] > 0


def test_compare_says_what_a_solver_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_inputs(tmp_path)
    words = ("compare", *inputs, "--solvers", "linear,eplb", "--slots-per-rank", "3,1", "--time-limit", 1)
    rows = gemopt_json(capsys, *words)
    assert rows[0]["objective_us"] > 0 and rows[1]["objective_us"] is None and "unequal slots" in rows[1]["note"]
    code, out, _ = gemopt(capsys, *words)
    assert code == 0 and "eplb: cannot use unequal slots" in out


def test_compare_draws_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_inputs(tmp_path)
    words = ("compare", *inputs, "--solvers", "linear,lpt", "--time-limit", 1, "--plot")
    assert gemopt(capsys, *words, tmp_path / "p.png")[0] == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert gemopt(capsys, *words, tmp_path / "p.svg")[0] == 0
    assert b"<svg" in (tmp_path / "p.svg").read_bytes()


def test_the_comparison_fits_eighty_columns() -> None:
    numbers = {"objective_us": 98765432.1, "bound_us": 87654321.0, "gap": 0.1234, "change": -0.1234, "seconds": 123.4}
    numbers |= {"holdout_us": 9e7, "holdout_change": -0.1555, "p50_us": 98765.0, "p90_us": 98765.0, "p99_us": 98765.0}
    known = {"status": Status.FEASIBLE, "stopped_by": StoppedBy.TIME_LIMIT}
    rows = [Comparison(solver=name, **numbers, **known) for name in ("linear", "local-search", "eplb-hierarchical")]
    rows.append(Comparison(solver="milp", status=Status.UNKNOWN, stopped_by=None, note="cannot [x] " * 9))
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(comparison_table(rows))
    text = console.file.getvalue()
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines()) and "…" not in text
    for cell in ("eplb-hierarchical", "98765", "87654", "12.34", "-12.3", "-15.6 ", " 123 ", "[x]"):
        assert cell in text
    lines = [line for line in text.splitlines() if line.startswith(("linear", "local-search", "eplb"))]
    assert len(lines) == 3 and all(len(line.split()) == 10 for line in lines)


@pytest.mark.parametrize(("ranks", "experts", "steps"), [(1, 4, 3), (2, 1, 3), (2, 4, 1), (4, 4, 2), (3, 4, 2)])
@pytest.mark.parametrize("single", [False, True])
def test_the_smallest_inputs_have_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ranks: int, experts: int, steps: int, single: bool
) -> None:
    measured, routed = profile(ranks), traces(steps, 1, experts)
    if single:  # one assignment in all
        counts = np.zeros_like(routed.counts)
        counts[0, 0, 0] = 1
        routed = Traces(counts=counts)
    measured.save(tmp_path / "p.json")
    routed.save(tmp_path / "t.safetensors")
    inputs = (tmp_path / "p.json", tmp_path / "t.safetensors")
    values = {}
    for solver in ("linear", "eplb", "lpt", "local-search", "cpsat", "auto"):
        words: tuple[object, ...] = ("--solver", solver, "--time-limit", 3, "--patience", 3, "--allow-one-rank")
        words = (*words, "-o", tmp_path / "out.json")
        code, out, err = gemopt(capsys, "solve", *inputs, *words, "--json")
        if experts % ranks and solver == "eplb":  # which shares evenly or not at all
            assert code == 2 and "unequal slots" in err
            continue
        assert (code, err) == (0, ""), solver
        values[solver] = json.loads(out)["objective_us"]
        found = evaluate(Placement.load(tmp_path / "out.json"), measured, routed)
        assert values[solver] == pytest.approx(found.objective_us)
    assert min(values.values()) == pytest.approx(values["cpsat"])


def test_a_folder_of_traces_and_samples_out_of_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_inputs(tmp_path)
    expected = gemopt_json(capsys, "solve", *inputs, "--solver", "lpt")["objective_us"]
    whole = Traces.load(inputs[1])
    (tmp_path / "parts").mkdir()
    for number, part in enumerate(whole.windows(4)):
        part.save(tmp_path / "parts" / f"{number:06d}.safetensors")
    document = json.loads(Path(inputs[0]).read_text())
    for device in document["devices"]:
        device["samples"].reverse()
    (tmp_path / "reversed.json").write_text(json.dumps(document))
    found = gemopt_json(capsys, "solve", tmp_path / "reversed.json", tmp_path / "parts", "--solver", "lpt")
    assert found["objective_us"] == pytest.approx(expected)


def test_a_warm_start_is_never_made_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_inputs(tmp_path)
    best = gemopt_json(capsys, "solve", *inputs, "--solver", "cpsat", "--time-limit", 5, "-o", tmp_path / "best.json")
    words = ("--warm-start", tmp_path / "best.json", "--solver", "local-search", "--patience", 0)
    warm = gemopt_json(capsys, "solve", *inputs, *words)
    assert warm["objective_us"] == pytest.approx(best["objective_us"])


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "gemopt", *map(str, words)]


SAYS_WHEN_IT_SEARCHES = """
import os
from gemopt.cli import main
from gemopt.solving.schedule import Run
deepen = Run._deepen
def said(*arguments):
    os.write(2, b"searching\\n")  # whole, though both layers' threads say it at once
    return deepen(*arguments)
Run._deepen = said
main()
"""


def test_an_interrupt_from_outside_returns_the_incumbent(tmp_path: Path) -> None:
    profile(4).save(tmp_path / "p.json")
    traces(200, 2, 32).save(tmp_path / "t.safetensors")
    out = tmp_path / "placement.json"
    words = ("solve", tmp_path / "p.json", tmp_path / "t.safetensors", "-o", out, "--solver", "local-search")
    more = ("--time-limit", 600, "--patience", 10**9, "--json")
    line = [sys.executable, "-c", SAYS_WHEN_IT_SEARCHES, *map(str, (*words, *more))]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert any(line.endswith("searching\n") for line in process.stderr)  # after what is said of compiling
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    found = json.loads(shown)
    assert found["stopped_by"] == "interrupt" and found["objective_us"] > 0
    assert Placement.load(out).num_ranks == 4


def test_no_change_has_no_minus() -> None:
    assert [_percent(change) for change in (-1e-9, 0.0, -0.0006, None)] == ["+0.0", "+0.0", "-0.1", ""]


def test_an_interrupt_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gemopt.formats.registry.engines", stop)
    assert gemopt(capsys, "engines") == (130, "", "gemopt: interrupted\n")


def test_no_room_behind_standard_output() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(command("engines"), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("gemopt: standard output: got No space left on device; ")
    assert done.stderr.count("\n") == 1


def test_names_of_files_that_the_locale_does_not_know(tmp_path: Path) -> None:
    profile, traces = write_inputs(tmp_path)
    job = {"profile": profile, "traces": traces, "solver": {"name": "lpt"}, "output": "ü"}
    (tmp_path / "job.json").write_text(json.dumps(job))
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*words), capture_output=True, text=True, encoding="utf-8", env=plain, cwd=tmp_path, check=False
        )

    assert run("solve", profile, traces, "--solver", "lpt", "--result", "ü.json").returncode == 0
    origin = Result.load(tmp_path / "ü.json").origin
    assert origin is not None and origin.call.endswith("--result 'ü.json'")
    done = run("run", "job.json")
    assert done.returncode == 2 and done.stderr.endswith("set LC_ALL=C.UTF-8 or PYTHONUTF8=1\n")
    assert done.stderr.count("\n") == 1


def test_help_and_a_closed_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_inputs(tmp_path)
    for words in (("--help",), ("solve", "--help"), ("compare", "-h")):
        code, out, err = gemopt(capsys, *words)
        assert code == 0 and "Usage" in out and err == ""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        command("solve", *inputs, "--solver", "linear", "--json"), stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (process.returncode, process.stderr) == (1, b"")


class Answers:
    """A solver that says what it is told to."""

    name = "answers"
    supports = Supports()

    def __init__(self, *, infeasible: bool) -> None:
        self.infeasible = infeasible

    def solve(self, *_: object) -> Outcome:
        return Outcome(None, StoppedBy.TIME_LIMIT, infeasible=self.infeasible)


@pytest.mark.parametrize(("infeasible", "code", "status"), [(True, 3, "infeasible"), (False, 4, "unknown")])
def test_exit_codes_when_there_is_no_placement(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    infeasible: bool,
    code: int,
    status: str,
) -> None:
    inputs, output = write_inputs(tmp_path), tmp_path / "placement.json"
    monkeypatch.setattr(sys.modules["gemopt.solving.options"], "get", lambda _: Answers(infeasible=infeasible))
    given, out, err = gemopt(capsys, "solve", *inputs, "-o", output, "--json")
    assert (given, err) == (code, "")
    found = json.loads(out)
    assert found["status"] == status and found["objective_us"] is None and found["gap"] is None
    assert found["bound_us"] > 0  # what no placement could beat is known all the same
    assert not output.exists()
    given, out, _ = gemopt(capsys, "solve", *inputs, "-o", output)
    assert given == code and status in out.lower()

"""Ctrl-C and SIGTERM at every phase boundary: a whole file with the best so far, or one line and no file.

The signal is real; it is sent by a hook at the beginning of a phase, so that no test depends on timing.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from cli_inputs import gemopt, gemopt_json, profile, traces
from ortools.sat.python import cp_model

from gemopt import interrupts
from gemopt.placement import Placement
from gemopt.result import Result
from gemopt.rules import Rules
from gemopt.solve import solve
from gemopt.solvers import hurried
from gemopt.solving.schedule import Run
from gemopt.traces import Traces

pytestmark = pytest.mark.usefixtures("quick_bounds")


def inputs(folder: Path) -> tuple[Path, Path]:
    profile(3).save(folder / "p.json")
    traces(60, 4, 9).save(folder / "t.safetensors")
    return folder / "p.json", folder / "t.safetensors"


def press(number: int = signal.SIGINT) -> None:
    """Ctrl-C, or another signal."""
    os.kill(os.getpid(), number)


def at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, nth: int = 1, number: int = signal.SIGINT) -> None:
    """Press Ctrl-C when this function is called for the nth time, then let it do its work."""
    real: Callable[..., Any] = getattr(owner, name)
    calls: list[int] = []

    def pressed(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == nth:
            press(number)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, pressed)


SOLVE = "gemopt.solve"


@pytest.mark.parametrize(("module", "name"), [(SOLVE, "fit"), (SOLVE, "problems"), (SOLVE, "ready")])
def test_before_there_is_an_answer_one_line_and_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    given = inputs(tmp_path)
    at(monkeypatch, import_module(module), name)
    code, out, err = gemopt(capsys, "solve", *given, "-o", tmp_path / "out.json", "--result", tmp_path / "r.json")
    assert (code, out) == (130, "") and err == "gemopt: interrupted before there was an answer: nothing written\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.json", "t.safetensors"]


def test_while_loading_one_line_and_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(tmp_path)
    real = Traces.load

    def load(path: Any) -> Traces:
        press()
        return real(path)

    monkeypatch.setattr(Traces, "load", load)
    code, out, err = gemopt(capsys, "solve", *given, "-o", tmp_path / "out.json")
    assert (code, out) == (130, "") and err.startswith("gemopt: interrupted before") and err.count("\n") == 1


@pytest.mark.parametrize("solver", ["lpt", "gem", "local-search", "cpsat"])
@pytest.mark.parametrize(
    ("owner", "name", "nth"),
    [
        (Run, "go", 1),
        (Run, "_answer", 3),
        (Run, "_answer", 6),
        (Run, "_bound", 1),
        (Run, "_bound", 3),
        (Run, "_deepen", 1),
        ("gemopt.solving.answer", "score", 1),
        (Placement, "save", 1),
        (Result, "save", 1),
    ],
)
def test_from_then_on_the_best_so_far_and_whole_files(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    solver: str,
    owner: Any,
    name: str,
    nth: int,
) -> None:
    given = inputs(tmp_path)
    at(monkeypatch, import_module(owner) if isinstance(owner, str) else owner, name, nth=nth)
    files = ("-o", tmp_path / "out.json", "--result", tmp_path / "r.json")
    limits = ("--time-limit", 300, "--patience", 3 if name in ("score", "save") or solver == "lpt" else 10**9)
    code, out, err = gemopt(capsys, "solve", *given, "--solver", solver, *files, *limits, "--json", "--threads", 1)
    assert (code, err) == (0, "")
    found, whole = json.loads(out), Result.load(tmp_path / "r.json")
    assert Placement.load(tmp_path / "out.json") == whole.placement and found["objective_us"] == whole.objective_us
    if name in ("_answer", "_deepen") and solver != "lpt":
        assert found["stopped_by"] == "interrupt"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_copies_are_chosen_by_their_load_once_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, late = import_module("gemopt.solving.memory"), []
    real = memory.thinned

    def pressed(problems: Any, rows: Any, held_G: Any, is_late: Callable[[], bool]) -> Any:
        press()
        late.append(is_late())
        return real(problems, rows, held_G, is_late)

    monkeypatch.setattr(memory, "thinned", pressed)
    words = ("--memory-budget", 14, "--expert-bytes", 1, "--time-limit", 4, "--threads", 1)
    assert gemopt_json(capsys, "solve", *inputs(tmp_path), "-o", tmp_path / "out.json", *words)["objective_us"]
    assert late == [True] and Placement.load(tmp_path / "out.json")


def test_sigterm_does_what_ctrl_c_does_with_its_own_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(tmp_path)
    words = ("solve", *given, "-o", tmp_path / "out.json", "--time-limit", 300, "--patience", 10**9, "--threads", 1)
    with monkeypatch.context() as patch:
        at(patch, import_module(SOLVE), "fit", number=signal.SIGTERM)
        code, out, err = gemopt(capsys, *words)
    assert (code, out) == (143, "") and err == "gemopt: interrupted before there was an answer: nothing written\n"
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
    try:
        at(monkeypatch, Run, "_deepen", number=signal.SIGTERM)
        code, out, _ = gemopt(capsys, *words, "--json")
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert code == 0 and json.loads(out)["stopped_by"] == "interrupt" and Placement.load(tmp_path / "out.json")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_compare_stops_all_and_marks_what_was_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(tmp_path)
    words = ("compare", *given, "--solvers", "linear,local-search,lpt,milp", "--time-limit", 300, "--threads", 1)
    with monkeypatch.context() as patch:
        at(patch, Run, "_deepen")
        rows = gemopt_json(capsys, *words)
    assert [row["objective_us"] is not None for row in rows] == [True, True, False, False]
    assert rows[0]["stopped_by"] != "interrupt" and all(row["stopped_by"] == "interrupt" for row in rows[1:])
    with monkeypatch.context() as patch:
        at(patch, Run, "_deepen")
        code, out, _ = gemopt(capsys, *words)
    assert code == 0 and "local-search *" in out and "local-search: interrupted" in out and "milp: not run" in out
    with monkeypatch.context() as patch:  # while the first solver is being prepared: nothing to show
        at(patch, import_module(SOLVE), "problems")
        code, out, err = gemopt(capsys, *words)
    assert (code, out) == (130, "") and err.count("\n") == 1


def test_the_second_press_raises_and_held_is_one_event() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts.held() as outer:
        with interrupts.held() as inner:
            assert inner is outer
            press()
        assert outer.is_set()
        press()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with interrupts.held() as event, pytest.raises(KeyboardInterrupt), interrupts.raising(event):
        press()


def test_what_a_callback_drops_is_raised_in_place_of_the_error_after_it(capfd: pytest.CaptureFixture[str]) -> None:
    callback = ctypes.CFUNCTYPE(None)(press)  # as LLVM tells that a kernel is compiled
    with interrupts.held() as event, pytest.raises(KeyboardInterrupt), interrupts.raising(event):
        callback()
        raise RuntimeError("no compiled object yet")
    with interrupts.held() as event, pytest.raises(KeyboardInterrupt), interrupts.raising(event):
        callback()
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_ends_what_cp_sat_does_before_it_is_raised() -> None:
    """In Python 3.11 and 3.12 a thread that is interrupted while it is joined counts as having ended."""
    stopped, pressed = threading.Event(), threading.Event()

    def over() -> bool:
        if not pressed.is_set():
            pressed.set()
            threading.Timer(hurried.POLL_S / 2, press).start()  # while it is waited for
        return False

    slow = SimpleNamespace(solve=lambda *_: stopped.wait(300), stop_search=stopped.set)
    with pytest.raises(KeyboardInterrupt):
        hurried.run(cast(Any, slow), cp_model.CpModel(), over)
    assert stopped.is_set()


LEFT = """
import atexit, threading, time
from gemopt.cli import main
from gemopt.interrupts import LEFT
atexit.register(print, "Python ended")
threading.Thread(target=time.sleep, args=(600,), name=LEFT, daemon=True).start()
main()
"""


@pytest.mark.parametrize(("words", "code"), [(["--version"], 0), (["no-such-command"], 2)])
def test_a_programme_that_was_left_does_not_abort_the_end(words: list[str], code: int) -> None:
    """Its thread would come back to a Python that has ended; the command ends before that."""
    done = subprocess.run([sys.executable, "-c", LEFT, *words], capture_output=True, text=True, check=False)
    assert done.returncode == code and (done.stdout or done.stderr).startswith("gemopt")
    assert "Python ended" not in done.stdout


@pytest.mark.parametrize("given", [{}, {"max_moves": 3}, {"exclude_ranks": [2]}])
def test_a_row_that_keeps_rules_is_looked_for_where_ctrl_c_is_heard(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    """OR-Tools hears no signal by itself: the search is told to stop."""
    stop = threading.Event()

    def solved(*_: object) -> object:
        assert threading.current_thread() is not threading.main_thread()
        if not stop.is_set():  # other layers may still be begun
            press()
        stop.wait(30)
        return cp_model.UNKNOWN

    monkeypatch.setattr(import_module(SOLVE), "ready", lambda *_, **__: 0.0)
    monkeypatch.setattr(cp_model.CpSolver, "solve", solved)
    monkeypatch.setattr(cp_model.CpSolver, "stop_search", lambda _: stop.set())
    monkeypatch.setattr(import_module("gemopt.solving.ruled"), "conflict", lambda *_, **__: [])
    current = Placement(physical_to_logical=[range(9)] * 4, slots_per_rank=[3, 3, 3], num_experts=9) if given else None
    rules = Rules(apart=[{"experts": [0, 1]}])
    with pytest.raises(KeyboardInterrupt):
        solve(
            profile(3), traces(60, 4, 9), rules=rules, current=current, slots_per_rank=5,
            time_limit=600, threads=1, **given,
        )  # fmt: skip
    assert stop.is_set()


def test_a_job_that_was_interrupted_writes_its_folder_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(tmp_path)
    job = {"profile": str(given[0]), "traces": str(given[1]), "output": "out", "report": {"page": False}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    at(monkeypatch, Run, "_deepen", number=signal.SIGTERM)
    found = gemopt_json(capsys, "run", tmp_path / "job.json")
    assert found["stopped_by"] == "interrupt" and found["notes"][0].startswith("interrupted after ")
    assert sorted(found["files"]) == sorted(path.name for path in (tmp_path / "out").iterdir())

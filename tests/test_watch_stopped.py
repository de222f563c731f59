"""A watch that is told to end: what it runs ends too, what serves stays, and what it did not come to is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from copy import deepcopy
from pathlib import Path

import pytest
from watched import contiguous, filled, grow, traffic, watch

from gemopt import Placement
from gemopt.online.command import run_command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return filled(tmp_path)


def ends(pid: Path) -> None:
    """The process of this number has ended, or does."""
    number = int(pid.read_text())
    for _ in range(600):  # until whoever adopted it has seen its end
        if not Path(f"/proc/{number}").exists() or "Z" in Path(f"/proc/{number}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    os.kill(number, signal.SIGKILL)
    pytest.fail("what it began goes on")


def written(path: Path) -> None:
    while not (path.exists() and path.read_text().endswith("\n")):
        time.sleep(0.01)


@pytest.mark.parametrize("late", [True, False])
def test_a_command_that_is_late_or_whose_watch_ends_is_ended_with_what_it_began(folder: Path, late: bool) -> None:
    pid, heard = folder / "pid", folder / "heard"
    script = f"trap 'echo told > {heard}; exit 0' TERM; sleep 600 & echo $! > {pid}; wait"
    watched, log = watch(folder, command=("sh", "-c", script))
    watched.actions.command_timeout_s = 3.0 if late else 600.0
    watched.state = folder / "state.safetensors"
    grow(folder, 0, traffic(hot=0))
    stop = threading.Event()
    if late:
        watched.look()
    else:
        thread = threading.Thread(target=watched.run, args=(600, stop))
        thread.start()
        written(pid)
        stop.set()
        thread.join(timeout=120)
        assert not thread.is_alive()
    said = "still running after 3 s" if late else "still running when the watch was told to end"
    assert any(said in line and "the placement in force stays" in line for line in log)
    assert Placement.load(folder / "placement.json") == contiguous() == watched.controller.placement
    assert heard.read_text() == "told\n" and watched.state.exists()
    ends(pid)


def test_a_command_that_does_not_heed_it_is_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemopt.online.command.GRACE_S", 0.1)
    stop, pid = threading.Event(), folder / "pid"
    threading.Thread(target=lambda: (written(pid), stop.set())).start()
    script = f"trap '' TERM; sleep 600 & echo $! > {pid}; wait"
    with pytest.raises(Exception, match="told to end"):
        run_command(["sh", "-c", script], 600, stop)
    ends(pid)


def test_a_script_that_does_not_say_what_runs_it(folder: Path) -> None:
    (script := folder / "reload.sh").write_text("echo reloaded\n")
    script.chmod(0o755)
    with pytest.raises(Exception, match=r"a command that can be run; begin the script with #!/bin/sh"):
        run_command([str(script)], 60, threading.Event())


def test_sigterm_while_the_command_runs_ends_the_watch(folder: Path) -> None:
    """The signal is real, and so is the process: code 0, the state, the placement as it was."""
    grow(folder, 0, traffic(hot=0))
    pid, state = folder / "pid", folder / "state.safetensors"
    (script := folder / "reload.sh").write_text(f"#!/bin/sh\necho $$ > {pid}\nexec sleep 600\n")
    script.chmod(0o755)
    words = ["watch", folder / "traces", "--profile", folder / "profile.json", "--state", state]
    words += ["--placement", folder / "placement.json", "--on-change", script, "--command-timeout", "600"]
    run = subprocess.Popen([sys.executable, "-m", "gemopt", *map(str, words)], stdout=subprocess.PIPE, text=True)
    try:
        written(pid)
        run.send_signal(signal.SIGTERM)
        said = run.communicate(timeout=120)[0]
    finally:
        run.kill()
    assert run.returncode == 0 and "told to end" in said, said
    assert Placement.load(folder / "placement.json") == contiguous() and state.exists()
    ends(pid)


def test_steps_that_it_does_not_come_to_are_left_for_the_next_start(folder: Path) -> None:
    watched, log = watch(folder)
    watched.state = folder / "state.safetensors"
    grow(folder, 0, traffic(hot=0))
    watched.look()
    first, at = watched.state.read_bytes(), deepcopy(watched.follower.position)
    grow(folder, 1, traffic(hot=1, steps=200, seed=1))
    save = watched.actions.writes[0]
    watched.actions.writes = [lambda placement: (save(placement), watched.actions.stop.set())]  # while one is written
    watched.look()
    assert log[-1] == "told to end: 136 new steps left for the next start"
    assert watched.state.read_bytes() == first, "as of the look before, which has not read them"
    again, log = watch(folder)
    again.follower.resume(again.controller.load(watched.state))
    assert again.follower.position == at
    again.controller.confirm(Placement.load(folder / "placement.json"))
    again.look(history=True)
    assert again.controller.placement == Placement.load(folder / "placement.json") and not again.failed

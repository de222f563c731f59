"""`gemopt watch` on a folder that grows: what it writes, runs, serves and survives."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from watched import EXPERTS, LAYERS, RANKS, contiguous, filled, grow, traffic, watch

from gemopt import Placement, Traces
from gemopt.evaluate import rank_times
from gemopt.online.given import Given
from gemopt.online.metrics import Metrics
from gemopt.problem import problems


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return filled(tmp_path)


def test_a_move_that_pays_is_written_and_kept(folder: Path) -> None:
    watched, log = watch(folder)
    assert watched.look() is None
    grow(folder, 0, traffic(hot=0))
    decision = watched.look()
    assert decision is not None
    assert decision.num_moves > 0
    assert log[-1].startswith("moved: ")
    written = Placement.load(folder / "placement.json")
    assert written == decision.placement
    assert written != contiguous()
    grow(folder, 1, traffic(hot=0, seed=1))
    watched.look()
    assert Placement.load(folder / "placement.json") == watched.controller.placement


@pytest.mark.parametrize("steps", [256, 65, 71])
def test_history_is_learnt_from_and_its_last_window_acted_upon(folder: Path, steps: int) -> None:
    """However many steps there were: the last window is whole, so that one look (`--once`) decides."""
    metrics = Metrics()
    watched, log = watch(folder, metrics=metrics)
    grow(folder, 0, traffic(hot=0, steps=steps))
    watched.look(history=True)
    assert len(log) == 1 and log[0].startswith("moved: ")
    assert f"gemopt_steps_total {steps:.1f}" in metrics.page().decode()


def test_a_window_in_which_the_traffic_changed_shows_by_how_much(folder: Path) -> None:
    """However long it is: its last blocks are foretold by its first ones."""
    metrics = Metrics()
    watched, log = watch(folder, metrics=metrics)
    parts = [traffic(hot=0, steps=128), traffic(hot=0, seed=1), traffic(hot=2, seed=2)]
    drifts = []
    for number, part in enumerate(parts):
        grow(folder, number, part)
        watched.look()
        drifts.append(metrics.drift._value.get())
    before, after = (part.counts.sum(axis=(0, 1)) / part.counts.sum() for part in parts[1:])
    assert "the traffic changed" in log[-1]
    assert drifts[1] < 0.05 < drifts[2] == pytest.approx(1 - np.sqrt(before * after).sum(), rel=0.1)


@pytest.mark.parametrize("command", [("false",), ("no-such-command-here",)])
def test_a_command_that_fails_leaves_the_placement(folder: Path, command: tuple[str, ...]) -> None:
    metrics = Metrics()
    watched, log = watch(folder, command=command, metrics=metrics)
    grow(folder, 0, traffic(hot=0))
    watched.look()
    assert Placement.load(folder / "placement.json") == contiguous()
    assert watched.controller.placement == contiguous()
    assert any("--on-change" in line and "stays" in line for line in log)
    said = json.loads(watched.health.answer()[1])
    assert said["decision"] == "failed" and "--on-change" in said["last_fault"]
    assert watched.controller.moved == 0
    assert 'gemopt_faults_total{kind="action"} 1.0' in metrics.page().decode()


def test_what_a_command_leaves_in_the_background_is_not_waited_for(folder: Path) -> None:
    """A reload that starts a server, which goes on and has what the command had for its errors."""
    watched, log = watch(folder, command=("sh", "-c", f"sleep 600 & echo $! > {folder / 'pid'}; exit 0"))
    grow(folder, 0, traffic(hot=0))
    try:
        watched.look()
        assert log[-1].startswith("moved: ")
        assert Placement.load(folder / "placement.json") != contiguous()
    finally:
        os.kill(int((folder / "pid").read_text()), signal.SIGKILL)


def test_a_command_gets_the_file(folder: Path) -> None:
    seen = folder / "seen.json"
    copy = f"import shutil; shutil.copy(r'{{placement}}', r'{seen}')"
    watched, _ = watch(folder, command=(sys.executable, "-c", copy))
    grow(folder, 0, traffic(hot=0))
    watched.look()
    assert Placement.load(seen) == Placement.load(folder / "placement.json") != contiguous()


def test_bad_windows_are_lines_in_the_log(folder: Path) -> None:
    metrics = Metrics()
    watched, log = watch(folder, metrics=metrics)
    other = Traces(counts=np.ones((4, LAYERS, EXPERTS * 2), np.int64))
    grow(folder, 0, other)
    watched.look()
    grow(folder, 1, Traces(counts=np.ones((4, LAYERS, EXPERTS), np.int64), rank_us=np.ones((4, RANKS + 1))))
    watched.look()
    (folder / "traces" / "000002.safetensors").write_bytes(b"half")
    watched.look()
    assert Placement.load(folder / "placement.json") == contiguous()
    assert sum("counts" in line or "experts" in line for line in log) >= 1
    assert any("latencies" in line for line in log)
    assert any("000002.safetensors" in line for line in log)
    assert 'gemopt_faults_total{kind="file"} 1.0' in metrics.page().decode()


def test_files_that_are_no_parts_are_named_once(folder: Path) -> None:
    watched, log = watch(folder)
    (folder / "traces").mkdir(exist_ok=True)
    (folder / "traces" / "expert_distribution_recorder_1.pt").write_bytes(b"dump")
    (folder / "traces" / "hidden.safetensors").write_bytes(b"beside the parts")
    watched.look(history=True)
    watched.look()
    named = [line for line in log if "expert_distribution_recorder_1.pt" in line]
    assert len(named) == 1 and "--from" in named[0] and "hidden" not in named[0]
    assert any("no steps yet" in line for line in log)
    grow(folder, 0, traffic(hot=0))
    watched.look()
    assert Placement.load(folder / "placement.json") != contiguous()


def test_it_runs_until_it_is_told_to_stop(folder: Path) -> None:
    watched, _ = watch(folder)
    stop = threading.Event()
    thread = threading.Thread(target=watched.run, args=(0.01, stop))
    thread.start()
    stop.set()
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_what_was_written_before_a_failure_is_put_back(folder: Path) -> None:
    """Two exports, of which the second fails at the new placement."""
    watched, log = watch(folder)
    first, second = folder / "first.json", folder / "second.json"

    def refuses(placement: Placement) -> None:
        if placement != contiguous():
            raise KeyError("no such thing")

    watched.actions.writes = [lambda each: each.save(first), refuses, lambda each: each.save(second)]
    grow(folder, 0, traffic(hot=0))
    watched.look()
    assert watched.failed and watched.controller.placement == contiguous()
    assert Placement.load(first) == contiguous() and not second.exists()
    assert any("KeyError: 'no such thing'; the placement in force stays" in line for line in log)


def test_nothing_unforeseen_ends_the_watch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    watched, log = watch(folder, metrics=metrics)
    grow(folder, 0, traffic(hot=0))
    monkeypatch.setattr(watched.controller, "step", lambda *_: 1 / 0)
    watched.look()
    assert any("ZeroDivisionError" in line for line in log) and watched.failed
    assert 'gemopt_faults_total{kind="window"} 1.0' in metrics.page().decode()
    monkeypatch.undo()
    monkeypatch.setattr(watched, "_scored", lambda *_: 1 / 0)
    grow(folder, 1, traffic(hot=0))
    watched.look()
    assert Placement.load(folder / "placement.json") == watched.controller.placement != contiguous()
    assert 'gemopt_faults_total{kind="metrics"} 1.0' in metrics.page().decode()


def test_what_somebody_else_puts_there_is_gone_on_from(folder: Path) -> None:
    metrics = Metrics()
    watched, log = watch(folder, metrics=metrics)
    watched.actions.holds = watched.controller.placement
    theirs = contiguous().changed(physical_to_logical=np.roll(contiguous().physical_to_logical, 1, axis=1))
    theirs.save(folder / "placement.json")
    grow(folder, 0, traffic(hot=0, steps=4))  # too few for a decision
    watched.look()
    assert watched.controller.placement == theirs == Placement.load(folder / "placement.json")
    assert sum("placement.json: somebody else has put another placement there" in line for line in log) == 1
    assert 'gemopt_faults_total{kind="file"} 1.0' in metrics.page().decode()
    grow(folder, 1, traffic(hot=0, seed=1))
    watched.look()
    assert log[-1].startswith("moved: ") and not watched.failed
    assert Placement.load(folder / "placement.json") == watched.controller.placement != theirs
    assert len([line for line in log if line.startswith("warning")]) == 1


def test_what_somebody_else_puts_there_is_said_each_time(folder: Path) -> None:
    watched, log = watch(folder)
    watched.actions.holds = watched.controller.placement
    for part, shift in enumerate((1, 2)):
        rows = np.roll(contiguous().physical_to_logical, shift, axis=1)
        contiguous().changed(physical_to_logical=rows).save(folder / "placement.json")
        grow(folder, part, traffic(hot=0, steps=2))
        watched.look()
    assert sum("the watch goes on from it" in line for line in log) == 2


def test_what_cannot_be_followed_is_not_overwritten(folder: Path) -> None:
    watched, log = watch(folder)
    watched.actions.holds = watched.controller.placement
    theirs = Placement.contiguous(LAYERS + 1, EXPERTS, RANKS)
    theirs.save(folder / "placement.json")
    grow(folder, 0, traffic(hot=0))
    watched.look()
    assert Placement.load(folder / "placement.json") == theirs and watched.controller.placement == contiguous()
    assert "somebody else has put another placement there: " in log[0] and "somebody else has replaced it" in log[1]
    (folder / "placement.json").unlink()  # what is gone may be written again
    grow(folder, 1, traffic(hot=0, seed=1))
    grow(folder, 2, traffic(hot=0, seed=2))
    watched.look()
    assert Placement.load(folder / "placement.json") == watched.controller.placement != contiguous()


def test_what_it_wrote_itself_it_replaces(folder: Path) -> None:
    watched, log = watch(folder)
    watched.actions.holds = watched.controller.placement
    for number in range(4):
        grow(folder, number, traffic(hot=number % 2, seed=number))
        watched.look()
    assert sum(line.startswith("moved: ") for line in log) > 1 and not watched.failed


def test_inputs_that_are_replaced_are_said_once(folder: Path) -> None:
    watched, log = watch(folder)
    path = folder / "profile.json"
    watched.given = Given([path])
    text = path.read_text()
    path.write_text(text)
    watched.look()
    assert not any("replaced since the start" in line for line in log)
    path.write_text(text.replace("synthetic", "another"))
    watched.look()
    watched.look()
    assert (
        sum("profile.json: replaced since the start; the watch goes on with what it read" in line for line in log) == 1
    )
    path.unlink()
    watched.look()
    path.write_text(text)
    watched.look()
    assert sum("replaced since the start" in line for line in log) == 2


def test_a_fault_that_lasts_is_said_once_and_again_when_it_comes_back(folder: Path) -> None:
    watched, log = watch(folder, metrics=(metrics := Metrics()))
    away = folder / "away"
    for _ in range(2):
        (folder / "traces").rename(away)
        for _ in range(3):
            watched.look()
        away.rename(folder / "traces")
        watched.look()
    assert sum("No such file" in line for line in log) == 2
    assert 'gemopt_faults_total{kind="file"} 6.0' in metrics.page().decode()


def test_steps_of_another_network_are_named_once(folder: Path) -> None:
    contiguous().changed(model="ours").save(folder / "placement.json")
    watched, log = watch(folder)
    for number, model in enumerate(["ours", "theirs", "theirs"]):
        grow(folder, number, replace(traffic(hot=0, seed=number), model=model))
        watched.look()
    named = [line for line in log if "steps of theirs, where the placement is of ours" in line]
    assert len(named) == 1


@pytest.mark.parametrize("together", [True, False], ids=["one look", "looks"])
def test_ranks_timed_before_a_change_are_not_taken_for_slow(folder: Path, together: bool) -> None:
    """Parts that were there when a placement came into force, and the next one, say nothing of it."""
    watched, log = watch(folder)
    before, cost = contiguous(), watched.controller.cost

    def recorded(number: int, placement: Placement, slow_G: object = 1.0) -> None:
        part = traffic(hot=0, seed=number)
        layers = zip(
            problems(cost, part, placement.slots_per_rank.tolist()), placement.physical_to_logical, strict=True
        )
        grow(folder, number, replace(part, rank_us=sum(rank_times(*each) for each in layers) * slow_G))

    for number in range(3):
        recorded(number, before)
    if not together:  # the command took so long that two parts were recorded meanwhile
        for number in (1, 2):
            (folder / f"traces/{number:06d}.safetensors").rename(folder / f"{number}")
        moved = (f"mv {number} traces/{number:06d}.safetensors" for number in (1, 2))
        watched.actions.command = ("sh", "-c", f"cd {folder}; {'; '.join(moved)}")
    watched.look()
    assert watched.controller.placement != before
    recorded(3, before)
    watched.actions.command = ()
    watched.look()
    assert (watched.controller.speeds.relative_G == 1).all(), log
    slow = [1.0, 1.0, 1.0, 1.5]
    recorded(4, watched.controller.placement, slow)
    watched.look()
    assert watched.controller.speeds.relative_G == pytest.approx(slow, rel=0.02)

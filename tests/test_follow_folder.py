"""Folders that grow, break and lose files while they are followed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from gemopt.exceptions import InputError
from gemopt.online.follow import Follower
from gemopt.traces import Traces


def part(folder: Path, number: int, steps: int = 2) -> Traces:
    traces = Traces(counts=np.full((steps, 1, 4), number + 1))
    traces.save(folder / f"{number:06d}.safetensors")
    return traces


def counts(follower: Follower) -> list[int]:
    found = follower.look().traces
    return [] if found is None else found.counts[:, 0, 0].tolist()


def test_every_part_comes_once_and_in_order(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    assert follower.look().traces is None
    part(tmp_path, 0)
    part(tmp_path, 1)
    assert counts(follower) == [1, 1, 2, 2]
    assert counts(follower) == []
    part(tmp_path, 2)
    (tmp_path / ".000003.safetensors.tmp").write_bytes(b"half")
    assert counts(follower) == [3, 3]


def test_parts_that_were_read_may_vanish(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    part(tmp_path, 0)
    assert counts(follower) == [1, 1]
    (tmp_path / "000000.safetensors").unlink()
    part(tmp_path, 1)
    assert counts(follower) == [2, 2]


def test_half_a_file_is_waited_for(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    part(tmp_path, 0)
    whole = (tmp_path / "000000.safetensors").read_bytes()
    (tmp_path / "000000.safetensors").write_bytes(whole[:-5])
    news = follower.look()
    assert news.traces is None
    assert "000000.safetensors" in news.faults[0]
    (tmp_path / "000000.safetensors").write_bytes(whole)
    assert counts(follower) == [1, 1]


def test_what_stays_broken_or_missing_is_left_out(tmp_path: Path) -> None:
    follower = Follower(tmp_path, patience=3)
    (tmp_path / "000000.safetensors").write_bytes(b"nothing of use")
    part(tmp_path, 1)
    part(tmp_path, 3)
    faults: list[str] = []
    seen: list[int] = []
    for _ in range(6):
        news = follower.look()
        faults += news.faults
        seen += [] if news.traces is None else news.traces.counts[:, 0, 0].tolist()
    assert seen == [2, 2, 4, 4]
    assert any("left out after 3 tries" in fault for fault in faults)
    assert any("part 000002 is missing" in fault for fault in faults)


def test_a_folder_that_vanishes(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "gone")
    assert "No such file" in follower.look().faults[0]
    (tmp_path / "gone").mkdir()
    part(tmp_path / "gone", 0)
    assert counts(follower) == [1, 1]


def test_another_network_in_the_same_folder(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    follower.changed()  # part 0 is being recorded
    part(tmp_path, 0)
    for number in (1, 2):
        Traces(counts=np.full((1, 2, 8), 9)).save(tmp_path / f"{number:06d}.safetensors")
    news = follower.look()
    assert news.traces is not None
    assert news.traces.counts.shape == (2, 2, 8) and news.unsure == 0
    assert "one network" in news.faults[0] and "the first 2 steps left out" in news.faults[0]


def test_files_of_an_engine_are_read_together_once_they_rest(tmp_path: Path) -> None:
    groups: list[list[str]] = []

    def read(files: Sequence[Path]) -> Traces:
        groups.append([file.name for file in files])
        if any(file.read_bytes() == b"bad" for file in files):
            raise InputError("dump", "bad", "good")
        return Traces(counts=np.full((1, 1, 4), len(files)))

    follower = Follower(tmp_path, read, patience=2)
    (tmp_path / "dump_0.pt").write_bytes(b"a")
    assert counts(follower) == []  # may still be written
    (tmp_path / "dump_1.pt").write_bytes(b"b")
    assert counts(follower) == []
    assert counts(follower) == [2]
    assert groups == [["dump_0.pt", "dump_1.pt"]]
    assert counts(follower) == []
    (tmp_path / "dump_2.pt").write_bytes(b"bad")
    assert follower.look().faults == []
    assert "dump" in follower.look().faults[0]
    assert "left out after 2 tries" in follower.look().faults[1]
    (tmp_path / "dump_3.pt").write_bytes(b"c")
    follower.look()
    assert counts(follower) == [1]
    assert groups[-1] == ["dump_3.pt"]


def test_a_dump_that_is_written_again_counts_again(tmp_path: Path) -> None:
    follower = Follower(tmp_path, lambda files: Traces(counts=np.full((1, 1, 4), len(files))))
    dump = tmp_path / "stat.pt"
    dump.write_bytes(b"1")
    follower.look()
    assert counts(follower) == [1]
    dump.write_bytes(b"12")
    follower.look()
    assert counts(follower) == [1]


@pytest.mark.parametrize("name", ["notes.txt", "x1.safetensors"])
def test_other_files_are_named_once_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("hello")
    follower = Follower(tmp_path)
    news = follower.look()
    assert news.traces is None
    assert [name in line for line in news.faults] == [True]
    assert not follower.look().faults


@pytest.mark.parametrize("read", [None, lambda files: None])
def test_folders_in_the_folder_are_named_once(tmp_path: Path, read: Callable[[Sequence[Path]], Traces] | None) -> None:
    """Ranks with batches of their own record into some, which nobody reads."""
    (tmp_path / "rank-0000").mkdir()
    (tmp_path / ".hidden").mkdir()
    follower = Follower(tmp_path, read)
    (line,) = follower.look().faults
    assert "got rank-0000/;" in line and "load_ranks" in line
    assert not follower.look().faults


def test_a_recording_that_begins_anew_is_read_from_its_beginning(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    for number in range(3):
        part(tmp_path, number)
    assert counts(follower) == [1, 1, 2, 2, 3, 3]
    Traces(counts=np.full((1, 1, 4), 9)).save(tmp_path / "000000.safetensors")
    news = follower.look()
    assert news.traces is not None and news.traces.counts[:, 0, 0].tolist() == [9]
    assert "another recording has begun" in news.faults[0]
    assert counts(follower) == []  # parts 1 and 2 are left over
    Traces(counts=np.full((1, 1, 4), 8)).save(tmp_path / "000001.safetensors")
    assert counts(follower) == [8]


def test_parts_left_over_tell_nothing_of_when_a_placement_came(tmp_path: Path) -> None:
    """Else the times of ranks would not be trusted until the new recording has come as far as the one before."""
    follower = Follower(tmp_path)
    for number in range(6):
        part(tmp_path, number)
    follower.look()
    part(tmp_path, 0, 1)
    assert counts(follower) == [1]
    follower.changed()
    part(tmp_path, 1, 3)
    part(tmp_path, 2, 4)
    news = follower.look()
    assert news.traces is not None and (news.traces.num_steps, news.unsure) == (7, 3)


def test_a_recording_that_begins_under_a_clock_set_back_is_read(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    for number in range(4):
        part(tmp_path, number)
    assert counts(follower) == [1, 1, 2, 2, 3, 3, 4, 4]
    hour_ago = (tmp_path / "000000.safetensors").stat().st_mtime - 3600
    for number, steps in ((0, 1), (1, 3)):
        part(tmp_path, number, steps)
        os.utime(tmp_path / f"{number:06d}.safetensors", (hour_ago + number, hour_ago + number))
    news = follower.look()
    assert news.traces is not None and news.traces.counts[:, 0, 0].tolist() == [1, 2, 2, 2]
    assert ["another recording has begun" in fault for fault in news.faults] == [True]
    part(tmp_path, 2, 1)  # 2 and 3 were left over from the first recording
    assert counts(follower) == [3]
    part(tmp_path, 4)
    assert counts(follower) == [5, 5]
    assert counts(follower) == []


def test_a_clock_set_back_within_a_recording_loses_nothing(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    part(tmp_path, 0)
    assert counts(follower) == [1, 1]
    part(tmp_path, 0, 1)
    assert counts(follower) == [1]
    part(tmp_path, 1)
    os.utime(tmp_path / "000001.safetensors", (1e9, 1e9))
    assert counts(follower) == [2, 2]


def test_parts_left_over_before_the_first_look_do_not_hide_new_ones(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    for number in range(4):
        part(tmp_path, number)
    assert len(counts(follower)) == 8
    part(tmp_path, 2, 1)  # the recording that had come to part 1 goes on
    resumed = Follower(tmp_path)
    resumed.resume(json.loads(json.dumps(follower.position)))
    assert counts(follower) == [3]
    assert counts(resumed) == [3]
    (tmp_path / "000003.safetensors").unlink()
    part(tmp_path, 3, 1)
    part(tmp_path, 4, 1)
    assert counts(follower) == [4, 5]


def test_who_resumes_reads_what_is_new(tmp_path: Path) -> None:
    numbered, engine = (
        Follower(tmp_path),
        Follower(tmp_path, lambda files: Traces(counts=np.ones((len(files), 1, 4), int))),
    )
    part(tmp_path, 0)
    numbered.look(), engine.look(), engine.look()
    part(tmp_path, 1)
    for read in (numbered, engine):
        position = json.loads(json.dumps(read.position))
        again = Follower(tmp_path, read.read)
        again.resume(position)
        again.look() if read.read else None
        assert len(counts(again)) == (1 if read.read else 2)
        other = Follower(tmp_path, read.read)
        other.resume({**position, "folder": "/elsewhere"})
        other.look() if read.read else None
        assert len(counts(other)) == (2 if read.read else 4)


def test_whatever_a_reader_trips_over_is_a_line(tmp_path: Path) -> None:
    def read(files: Sequence[Path]) -> Traces:
        raise KeyError("layers")

    (tmp_path / "dump.pt").write_bytes(b"?")
    follower = Follower(tmp_path, read, patience=2)
    faults = [line for _ in range(5) for line in follower.look().faults]
    assert faults == ["KeyError: 'layers'", "KeyError: 'layers'", "dump.pt: left out after 2 tries"]


def test_a_dump_that_never_rests_is_named(tmp_path: Path) -> None:
    follower = Follower(tmp_path, lambda files: Traces(counts=np.ones((1, 1, 4), int)), patience=3)
    faults: list[str] = []
    for size in range(6):
        (tmp_path / "dump.pt").write_bytes(b"x" * size)
        faults += follower.look().faults
    assert len(faults) == 1 and "dump.pt changed at each of 3 looks" in faults[0]
    assert len(counts(follower)) == 1


def test_idle_parts_and_times_that_stop(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    Traces(counts=np.zeros((2, 1, 4), int), rank_us=np.ones((2, 2)), allow_idle=True).save(
        tmp_path / "000000.safetensors"
    )
    assert counts(follower) == [0, 0]
    Traces(counts=np.ones((1, 1, 4), int), rank_us=np.ones((1, 2))).save(tmp_path / "000001.safetensors")
    Traces(counts=np.ones((1, 1, 4), int), rank_us=np.ones((1, 3))).save(tmp_path / "000002.safetensors")
    news = follower.look()
    assert news.traces is not None and news.traces.num_steps == 2
    assert "differ in their ranks' times" in news.faults[0]


def test_only_dumps_of_the_engine_are_read(tmp_path: Path) -> None:
    """A log that grows beside them is named once, and no dump waits for it."""
    follower = Follower(tmp_path, lambda files: Traces(counts=np.full((1, 1, 4), len(files))), suffixes=(".pt", ".csv"))
    faults: list[str] = []
    for size in range(3):
        (tmp_path / "dump.pt").write_bytes(b"1")
        os.utime(tmp_path / "dump.pt", ns=(0, 0))
        (tmp_path / "server.log").write_bytes(b"x" * size)
        news = follower.look()
        faults += news.faults
        assert (news.traces is not None) == (size == 1)
    assert len(faults) == 1 and "server.log; dumps end in .pt or .csv: left unread" in faults[0]

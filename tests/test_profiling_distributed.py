"""`gemopt profile` under torchrun: ranks slowed down by CPU quotas, ranks that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks_world import results

from gemopt.profile import Profile

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).parent / "profiling_ranks.py"
SHAPE = "hidden=64,inter=32,experts=8,topk=2,dtype=float32"


def torchrun(ranks: int, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(WORKER)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.quiet
def test_ranks_under_quotas_show_the_speeds_that_were_set(tmp_path: Path) -> None:
    shares = np.array([0.1, 0.15, 0.2, 0.3])  # less than a core in all, which even a busy machine delivers
    path = tmp_path / "profile.json"
    with torchrun(
        4, ",".join(map(str, shares)), "-", "profile", "--shape", SHAPE, "--points=16", "--max-assignments=64",
        "--sweep=load", "--target-error=0", "--block-ms=400", "--seconds=0", "--max-drift=99", "-o", str(path),
    ) as process:  # fmt: skip
        _, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    profile = Profile.load(path)
    assert profile.mode == "together" and profile.num_ranks == 4
    times_GP = np.array([device.table()[:, 2] for device in profile.devices])
    relative = np.median(times_GP / np.exp(np.log(times_GP).mean(axis=0)), axis=1)
    expected = 1 / shares / np.exp(np.log(1 / shares).mean())
    np.testing.assert_allclose(relative, expected, rtol=0.1)


def _rank_pid(process: subprocess.Popen[str], rank: int) -> int | None:
    """Process of a rank, once its profile is being measured (it holds a connection to the store)."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"PPid:\t{process.pid}\n" not in (folder / "status").read_text():
                continue
            if f"\0RANK={rank}\0" in f"\0{(folder / 'environ').read_text()}":
                return int(folder.name)
        except OSError:
            continue
    return None


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_while_measuring_is_named_and_nothing_is_written(tmp_path: Path, victim: int) -> None:
    path, started = tmp_path / "profile.json", tmp_path / "started"
    process = torchrun(
        2, "-", str(started), "profile", "--shape", SHAPE, "--points=2000", "--max-assignments=2048",
        "--target-error=0", "--seconds=0.05", "--max-drift=99", "--timeout=15", "-o", str(path),
    )  # fmt: skip
    end = time.monotonic() + 300
    while len(list(tmp_path.glob("started*"))) < 2 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    pid = _rank_pid(process, victim)
    assert pid is not None, process.communicate()[1]
    os.kill(pid, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f"gemopt: rank {victim} (" in err and f"process {pid}) died while measuring; nothing was written" in err
    assert [found.name for found in tmp_path.iterdir() if not found.name.startswith("started")] == []


@pytest.mark.parametrize(
    ("word", "told"), [("--points=3", "--points: got 3; at least 16"), ("--sweep=no", "--sweep: got no; surface")]
)
def test_bad_input_of_all_ranks_is_said_once(world: Any, tmp_path: Path, word: str, told: str) -> None:
    reply = world("command", 2, words=["profile", "--shape", SHAPE, word, "-o", str(tmp_path / "profile.json")])
    first, second = results(reply)  # rank 1 looks at it, too, or hears that rank 0 failed
    assert first == 2 and second in (1, 2) and not list(tmp_path.iterdir())
    said = [line for log in reply["logs"] for line in log.splitlines() if line.startswith("gemopt: ")]
    assert len(said) == 1 and told in said[0]


def test_bad_input_of_one_rank_is_said_once(world: Any) -> None:
    """Rank 1 fails alone: it says so itself, rank 0 leaves it at that."""
    first, second = results(world("one_rank_fails", 2))
    assert second.startswith("tells device: got none")
    assert first.startswith("told rank 1 failed: device: got none")


def test_a_process_can_profile_twice(world: Any) -> None:
    """The second group reads no question or answer of the first."""
    heard = results(world("profiles_twice", 2))[0]
    assert heard == [[[turn, turn + "?", rank] for rank in (0, 1)] for turn in ("first", "second")]

"""Slow a process down by a CPU quota, so that ranks on one machine stand for devices of different speeds.

The quota is the kernel's own where a cpu control group can be made (cgroup v1 or v2); elsewhere a helper process
stops and continues the process so that its CPU time follows the same budget.

Run a module under quotas, one share per local rank::

    torchrun --nproc-per-node 4 --no-python python -m gemopt.profiling.throttle 0.1,0.2,0.3,0.4 gemopt profile ...
"""

from __future__ import annotations

import itertools
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from gemopt.exceptions import InputError, UnsupportedError

MIN_QUOTA_US = 1000  # the kernel refuses less, for the quota and for the period
MAX_PERIOD_US = 1_000_000
PREFIX = "gemopt-quota-"
_serial = itertools.count()


class ThrottleMethod(StrEnum):
    """What enforces the quota. The first that works is used."""

    CGROUP_V1 = "cgroup-v1"
    CGROUP_V2 = "cgroup-v2"
    DUTY_CYCLE = "duty-cycle"


@contextmanager
def cpu_quota(
    share: float, *, period_us: int = 2000, cpus: Iterable[int] | None = None, method: ThrottleMethod | None = None
) -> Iterator[ThrottleMethod]:
    """Hold the current process and its later children to `share` cores of CPU time while the block runs.

    Parameters
    ----------
    share
        CPU time per wall time, above 0; 1 is a whole core, 2 two of them.
    period_us
        Time over which the quota is counted; lengthened when the quota would fall below the kernel's 1 ms. The
        speed holds on average over many periods: time pieces of work that last tens of periods.
    cpus
        Cores to pin the process to, besides; restored afterwards.
    method
        Only this one; by default the first that works. The duty cycle holds this process only, not its children.

    Yields
    ------
    ThrottleMethod
        What enforces the quota.

    Raises
    ------
    InputError
        When the share or the period cannot be, or the method does not work here.
    """
    quota_us, period_us = _budget(share, period_us)
    with _pinned(cpus):
        for candidate in ThrottleMethod if method is None else [method]:
            if candidate is ThrottleMethod.DUTY_CYCLE:
                with _duty_cycle(quota_us / period_us, period_us):
                    yield candidate
                return
            group = _enter_group(candidate, quota_us, period_us)
            if group is not None:
                try:
                    yield candidate
                finally:
                    group.leave()
                return
        raise UnsupportedError("method", str(method), "this machine lets no such control group be made", "leave it out")


def detect_method() -> ThrottleMethod:
    """The method that `cpu_quota` would use on this machine: this process enters a group and leaves it."""
    for method in (ThrottleMethod.CGROUP_V1, ThrottleMethod.CGROUP_V2):
        group = _enter_group(method, MIN_QUOTA_US, 2 * MIN_QUOTA_US)
        if group is not None:
            group.leave()
            return method
    return ThrottleMethod.DUTY_CYCLE


def _budget(share: float, period_us: int) -> tuple[int, int]:
    if not 0.001 <= share <= (os.cpu_count() or 1):
        raise InputError("share", share, f"from 0.001 to the {os.cpu_count()} cores of this machine")
    if not MIN_QUOTA_US <= period_us <= MAX_PERIOD_US:
        raise InputError("period_us", period_us, f"from {MIN_QUOTA_US} to {MAX_PERIOD_US} microseconds")
    period_us = min(max(period_us, round(MIN_QUOTA_US / share)), MAX_PERIOD_US)
    return max(round(share * period_us), MIN_QUOTA_US), period_us


@contextmanager
def _pinned(cpus: Iterable[int] | None) -> Iterator[None]:
    if cpus is None:
        yield
        return
    before, wanted = os.sched_getaffinity(0), set(cpus)
    if not wanted or not wanted <= before:
        raise InputError("cpus", sorted(wanted), f"cores this process may use: {sorted(before)}")
    _set_affinity(wanted)
    try:
        yield
    finally:
        _set_affinity(before)


def _set_affinity(cpus: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):  # affinity belongs to threads
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cpus)


def _own_groups(method: ThrottleMethod) -> list[Path]:
    """Folders of the control groups that hold this process, own group first, then its ancestors."""
    v2 = method is ThrottleMethod.CGROUP_V2
    mount = None
    for line in _lines("/proc/self/mountinfo"):
        head, _, tail = line.partition(" - ")
        kind, _, options = tail.split(" ", 2)
        if kind == ("cgroup2" if v2 else "cgroup") and (v2 or "cpu" in options.split(",")):
            mount = Path(head.split(" ")[4])
    if mount is None:
        return []
    for line in _lines("/proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if (number == "0" and v2) or (not v2 and "cpu" in controllers.split(",")):
            own = mount / path.lstrip("/")
            # A container may see its path from the host's root; then only the mount itself is there.
            return [own, *(p for p in own.parents if p.is_relative_to(mount))] if own.is_dir() else [mount]
    return []


def _lines(path: str) -> list[str]:
    with suppress(OSError):
        return Path(path).read_text().splitlines()
    return []


@dataclass(frozen=True)
class _Group:
    """A control group made for this process, and the one it came from."""

    path: Path
    home: Path

    def leave(self) -> None:
        """Send everyone home and remove the group."""
        for pid in _lines(f"{self.path}/cgroup.procs"):
            with suppress(OSError):
                (self.home / "cgroup.procs").write_text(pid)
        with suppress(OSError):
            self.path.rmdir()


def _enter_group(method: ThrottleMethod, quota_us: int, period_us: int) -> _Group | None:
    """Make a control group with the quota set and move into it; None where that cannot be done."""
    parents = _own_groups(method)
    for parent in parents:
        # In v2 only a group that hands the cpu controller down can have children with a quota.
        if method is ThrottleMethod.CGROUP_V2:
            controllers = " ".join(_lines(f"{parent}/cgroup.subtree_control")).split()
            if "cpu" not in controllers:
                continue
        _sweep(parent)
        group = _Group(parent / f"{PREFIX}{os.getpid()}-{next(_serial)}", home=parents[0])
        try:
            group.path.mkdir()
            _set_quota(group.path, method, quota_us, period_us)
            (group.path / "cgroup.procs").write_text(str(os.getpid()))
            return group
        except OSError:
            group.leave()
    return None


def _set_quota(group: Path, method: ThrottleMethod, quota_us: int, period_us: int) -> None:
    if method is ThrottleMethod.CGROUP_V2:
        (group / "cpu.max").write_text(f"{quota_us} {period_us}")
        burst, weight, most = group / "cpu.max.burst", group / "cpu.weight", 10_000
    else:
        (group / "cpu.cfs_period_us").write_text(str(period_us))
        (group / "cpu.cfs_quota_us").write_text(str(quota_us))
        burst, weight, most = group / "cpu.cfs_burst_us", group / "cpu.shares", 262_144
    # Without a burst, quota that late wake-ups leave unused is lost: short periods then give 10 to 40 % too little.
    # With the largest weight, other work on the machine does not take from the quota.
    for file, value in ((burst, quota_us), (weight, most)):
        if file.exists():
            with suppress(OSError):
                file.write_text(str(value))


def _sweep(parent: Path) -> None:
    """Remove groups that killed processes left behind; the kernel keeps those that are in use."""
    for group in parent.glob(f"{PREFIX}*"):
        pid = group.name.removeprefix(PREFIX).partition("-")[0]
        if not Path(f"/proc/{pid}").exists():
            with suppress(OSError):
                group.rmdir()


@contextmanager
def _duty_cycle(share: float, period_us: int) -> Iterator[None]:
    hold = ["--hold", str(os.getpid()), str(share), str(period_us)]
    command = [sys.executable, "-m", "gemopt.profiling.throttle", *hold]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as helper:
        assert helper.stdout is not None
        if not helper.stdout.readline():
            raise UnsupportedError("method", "duty-cycle", "the helper process could not start on this system")
        try:
            yield
        finally:
            helper.terminate()
            helper.wait()
            os.kill(os.getpid(), signal.SIGCONT)


def _hold(pid: int, share: float, period_us: int) -> None:
    """Helper process: stop `pid` while its CPU time is ahead of its budget. Ends with its parent."""
    clock = (~pid << 3) | 2  # Linux's id of another process's CPU clock
    tick = period_us / 1e6 / 2

    def leave(*_: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        sys.exit()

    signal.signal(signal.SIGTERM, leave)
    spent, granted = time.clock_gettime(clock), time.monotonic()
    print("ready", flush=True)
    while os.getppid() == pid:
        now = time.monotonic()
        # Time left unused is saved up for a moment only, as in the kernel.
        ahead = (time.clock_gettime(clock) - spent) - (now - granted) * share
        if ahead < -share * max(period_us / 1e6, 0.01):
            spent, granted = time.clock_gettime(clock), now
        os.kill(pid, signal.SIGSTOP if ahead > 0 else signal.SIGCONT)
        time.sleep(max(ahead / share, tick))
    leave()


def main(argv: list[str]) -> None:
    """`SHARES MODULE [ARGUMENTS]`: run a module with the share of this local rank (comma-separated shares)."""
    if argv[:1] == ["--hold"]:
        _hold(int(argv[1]), float(argv[2]), int(argv[3]))
        return
    if len(argv) < 2:
        sys.exit("usage: python -m gemopt.profiling.throttle SHARE[,SHARE...] MODULE [ARGUMENT...]")
    shares, rank = argv[0].split(","), int(os.environ.get("LOCAL_RANK", "0"))
    try:
        share = float(shares[rank % len(shares)])
        with cpu_quota(share):
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    except ValueError as error:
        sys.exit(f"gemopt: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])

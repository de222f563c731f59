"""CPU quotas that make the ranks of one machine differ in speed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemopt.exceptions import InputError, UnsupportedError
from gemopt.profiling import throttle
from gemopt.profiling.throttle import ThrottleMethod, cpu_quota, detect_method

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="control groups are Linux")


def _cgroup() -> str:
    return Path("/proc/self/cgroup").read_text()


@pytest.mark.parametrize(("share", "period"), [(0.475, 2106), (0.2, 5000), (1.0, 2000), (0.9, 2000)])
def test_budget_keeps_the_share_within_the_kernels_limits(share: float, period: int, monkeypatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    quota_us, period_us = throttle._budget(share, 2000)
    assert period_us in (period - 1, period)
    assert quota_us >= 1000 and quota_us / period_us == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize(("options", "field"), [({"share": 0.0}, "share"), ({"share": 1e9}, "share")])
def test_impossible_shares_are_refused(options: dict[str, float], field: str) -> None:
    with pytest.raises(InputError, match=f"^{field}: "), cpu_quota(**options):
        pass


def test_impossible_periods_and_cores_are_refused() -> None:
    with pytest.raises(InputError, match=r"^period_us: got 10; from 1000"), cpu_quota(0.5, period_us=10):
        pass
    with pytest.raises(InputError, match=r"^cpus: got \[100000\]"), cpu_quota(0.5, cpus=[100000]):
        pass


def test_the_process_leaves_its_group_and_cores_again_even_on_error() -> None:
    before, cores = _cgroup(), os.sched_getaffinity(0)
    with pytest.raises(RuntimeError, match="inside"), cpu_quota(0.8, cpus=[min(cores)]) as method:
        assert os.sched_getaffinity(0) == {min(cores)}
        assert (_cgroup() != before) == (method is not ThrottleMethod.DUTY_CYCLE)
        raise RuntimeError("inside")
    assert (_cgroup(), os.sched_getaffinity(0)) == (before, cores)
    method = detect_method()
    assert _cgroup() == before
    for parent in throttle._own_groups(method) if method is not ThrottleMethod.DUTY_CYCLE else []:
        assert not list(parent.glob(f"{throttle.PREFIX}{os.getpid()}-*"))


def test_cgroup_v2_needs_a_parent_that_hands_the_controller_down(tmp_path: Path, monkeypatch) -> None:
    own = tmp_path / "slice" / "session"
    own.mkdir(parents=True)
    monkeypatch.setattr(throttle, "_own_groups", lambda method: [own, own.parent])
    assert throttle._enter_group(ThrottleMethod.CGROUP_V2, 1000, 2000) is None
    (own.parent / "cgroup.subtree_control").write_text("memory cpu\n")
    group = throttle._enter_group(ThrottleMethod.CGROUP_V2, 1000, 2000)
    assert group is not None and group.path.parent == own.parent and group.home == own
    assert (group.path / "cpu.max").read_text() == "1000 2000"
    assert (group.path / "cgroup.procs").read_text() == str(os.getpid())
    group.leave()
    assert (own / "cgroup.procs").read_text() == str(os.getpid())


def test_a_method_that_does_not_work_here_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(throttle, "_own_groups", lambda method: [])
    with pytest.raises(UnsupportedError, match="cgroup-v2"), cpu_quota(0.5, method=ThrottleMethod.CGROUP_V2):
        pass
    assert detect_method() is ThrottleMethod.DUTY_CYCLE


def test_groups_of_dead_processes_are_swept(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    for name in (f"{throttle.PREFIX}{dead.pid}-0", f"{throttle.PREFIX}{os.getpid()}-9", "other"):
        (tmp_path / name).mkdir()
    throttle._sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{throttle.PREFIX}{os.getpid()}-9", "other"]


def _module(tmp_path: Path, share: str, method: ThrottleMethod | None) -> str:
    """Run a module that burns 0.3 s of CPU time under a quota; its share of wall time is what it prints."""
    (tmp_path / "burn.py").write_text(
        "import time\n"
        "wall, cpu = time.perf_counter(), time.process_time()\n"
        "while time.process_time() - cpu < 0.3: pass\n"
        "print(0.3 / (time.perf_counter() - wall))\n"
    )
    code = (
        "import sys; from gemopt.profiling import throttle as t\n"
        f"only = {f't.ThrottleMethod({method.value!r})' if method else None}\n"
        "quota = t.cpu_quota\n"
        "t.cpu_quota = lambda share: quota(share, method=only)\n"
        f"t.main([{share!r}, 'burn'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "LOCAL_RANK": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout.strip() or done.stderr.strip()


@pytest.mark.parametrize("method", [None, ThrottleMethod.DUTY_CYCLE])
def test_a_module_runs_at_no_more_than_its_share(tmp_path: Path, method: ThrottleMethod | None) -> None:
    share = float(_module(tmp_path, "1.0,0.25", method))
    assert 0 < share < 0.25 * 1.25  # a busy machine may give less, the quota never more
    assert _module(tmp_path, "1.0,-3", method).startswith("gemopt: share: got -3.0; from 0.001")

"""`gemopt watch` on a folder that grows: what it writes, runs, serves and survives."""

from __future__ import annotations

import json
import signal
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gemopt import InputError, Placement, Profile, Traces
from gemopt.cli import main
from gemopt.online import Controller, Policy
from gemopt.online.follow import Follower
from gemopt.online.metrics import Health, Metrics, serve
from gemopt.online.sole import sole
from gemopt.online.watch import Actions, Watch
from gemopt.profile import Device, Sample

EXPERTS, RANKS, LAYERS = 16, 4, 2
DASHBOARD = Path(__file__).resolve().parents[1] / "examples" / "grafana_watch.json"


def profile() -> Profile:
    samples = [Sample(assignments=n, latency_us=50.0 + 2.0 * n) for n in range(0, 2001, 100)]
    return Profile(devices=[Device(rank=rank, name="synthetic", samples=samples) for rank in range(RANKS)])


def traffic(hot: int, steps: int = 64, seed: int = 0) -> Traces:
    """Four neighbours are hot together: contiguous placement puts them on one rank."""
    share_E = np.full(EXPERTS, 1.0)
    share_E[4 * hot : 4 * hot + 4] = 20.0
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(512, share_E / share_E.sum(), size=(steps, LAYERS))
    return Traces(counts=counts, num_hidden_layers=LAYERS, top_k=4)


def contiguous() -> Placement:
    return Placement.contiguous(LAYERS, EXPERTS, RANKS, num_hidden_layers=LAYERS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "traces").mkdir()
    profile().save(tmp_path / "profile.json")
    contiguous().save(tmp_path / "placement.json")
    return tmp_path


def watch(folder: Path, *, command: tuple[str, ...] = (), metrics: Metrics | None = None) -> tuple[Watch, list[str]]:
    log: list[str] = []
    path = folder / "placement.json"
    controller = Controller(profile(), Placement.load(path), Policy(expert_bytes=1e6))
    actions = Actions(path, [lambda placement: placement.save(path)], command)
    return Watch(controller, Follower(folder / "traces"), actions, log.append, metrics), log


def grow(folder: Path, number: int, traces: Traces) -> None:
    traces.save(folder / "traces" / f"{number:06d}.safetensors")


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


def test_history_is_learnt_from_and_not_acted_upon(folder: Path) -> None:
    watched, log = watch(folder)
    grow(folder, 0, traffic(hot=0, steps=256))
    watched.look(history=True)
    assert len(log) == 1


@pytest.mark.parametrize("command", [("false",), ("no-such-command-here",)])
def test_a_command_that_fails_leaves_the_placement(folder: Path, command: tuple[str, ...]) -> None:
    metrics = Metrics()
    watched, log = watch(folder, command=command, metrics=metrics)
    grow(folder, 0, traffic(hot=0))
    watched.look()
    assert Placement.load(folder / "placement.json") == contiguous()
    assert watched.controller.placement == contiguous()
    assert any("--on-change" in line and "stays" in line for line in log)
    assert 'gemopt_faults_total{kind="action"} 1.0' in metrics.page().decode()


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


def fetch(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_metrics_and_health_are_served(folder: Path) -> None:
    metrics, health = Metrics(), Health(stale_after_s=1e6)
    server = serve(metrics, health, 0)
    try:
        watched, _ = watch(folder, metrics=metrics)
        watched.health = health
        grow(folder, 0, traffic(hot=0))
        watched.look()
        status, page = fetch(server.server_port, "/metrics")
        values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
        assert status == 200
        assert float(values["gemopt_steps_total"]) == 64
        assert float(values["gemopt_moves_total"]) > 0
        assert float(values["gemopt_imbalance_ratio"]) > 1.5
        assert 0 < float(values["gemopt_certified_gap_ratio"]) < 1
        assert sum(float(values[f'gemopt_straggler_share{{rank="{g}"}}']) for g in range(RANKS)) == pytest.approx(1)
        status, body = fetch(server.server_port, "/healthz")
        assert status == 200
        assert json.loads(body)["decision"] == "moved"
        health.stale_after_s = -1.0
        assert fetch(server.server_port, "/healthz")[0] == 503
        assert fetch(server.server_port, "/")[0] == 404
        with pytest.raises(InputError, match="--port"):
            serve(Metrics(), health, server.server_port)
    finally:
        server.shutdown()
        server.server_close()


def test_the_gain_is_looked_at_afterwards(folder: Path) -> None:
    metrics = Metrics()
    watched, _ = watch(folder, metrics=metrics)
    for number in range(2):
        grow(folder, number, traffic(hot=0, seed=number))
        watched.look()
    values = dict(line.rsplit(" ", 1) for line in metrics.page().decode().splitlines() if not line.startswith("#"))
    assert float(values["gemopt_realised_gain_us"]) > 0


def test_the_dashboard_shows_every_metric() -> None:
    text = DASHBOARD.read_text()
    json.loads(text)
    for family in Metrics().registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        assert name in text, f"{name} is not on the dashboard"


def test_it_runs_until_it_is_told_to_stop(folder: Path) -> None:
    watched, _ = watch(folder)
    stop = threading.Event()
    thread = threading.Thread(target=watched.run, args=(0.01, stop))
    thread.start()
    stop.set()
    thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Exit code, and all that was said."""

    def command(*more: str) -> tuple[int, str]:
        words = ["watch", str(folder / "traces"), "--profile", str(folder / "profile.json")]
        words += ["--placement", str(folder / "placement.json"), "--once", *more]
        with pytest.raises(SystemExit) as ended:
            main(words)
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return command


def test_command_line(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    grow(folder, 0, traffic(hot=0))
    handler = signal.getsignal(signal.SIGINT)
    state = folder / "state.safetensors"
    code, output = run("--to", "sglang", "--to", "trtllm=" + str(folder / "lb.yaml"), "--state", str(state))
    assert code == 0, output
    assert "moved: " in output
    table = json.loads((folder / "placement.sglang.json").read_text())["physical_to_logical_map"]
    assert table == Placement.load(folder / "placement.json").physical_to_logical.tolist()
    assert (folder / "lb.yaml").exists()
    code, output = run("--state", str(state), "-o", str(folder / "new.json"))
    assert code == 0, output
    assert signal.getsignal(signal.SIGINT) is handler, "Ctrl-C of who called is as before"


def test_one_look_reads_an_engines_files(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    np.save(folder / "traces" / "counts.npy", traffic(hot=0).counts)
    code, output = run("--from", "array", "--interval", "0.05")
    assert code == 0 and "moved: " in output, output


def test_one_look_says_what_it_does_not_read(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    np.save(folder / "traces" / "counts.npy", traffic(hot=0).counts)
    code, output = run("--from", "csv", "--interval", "0.05")
    assert code == 1 and "counts.npy; dumps end in .csv" in output and "no steps yet" in output, output


def test_one_look_that_fails_ends_with_an_error(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    grow(folder, 0, traffic(hot=0))
    code, output = run("--on-change", "false")
    assert code == 1 and "failed: " in output, output


def test_what_an_engine_cannot_take_is_refused_at_the_start(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    Placement.contiguous(LAYERS, EXPERTS, RANKS).save(folder / "placement.json")
    grow(folder, 0, traffic(hot=0))
    code, output = run("--to", "sglang")
    assert code == 2 and "num_hidden_layers" in output, output


def test_command_line_with_bad_input(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    policy = folder / "policy.json"
    policy.write_text('{"dead_zone": 0.5}')
    for words, said in [
        (["--policy", str(policy)], "dead_zone"),
        (["--to", "nobody"], "engine"),
        (["--on-change", "'"], "--on-change"),
        (["--on-change", "''"], "a command that can be run"),
        (["--on-change", "no-such-command {placement}"], "a command that can be run"),
        (["-o", "/no/such/folder/x.json"], "no such folder"),
        (["--from", "nobody"], "engine"),
        (["--from", "vllm-ascend"], "it records no loads"),
        (["--state", str(folder / "placement.json")], "--placement"),
        (["--state", "/no/such/folder/state"], "no such folder"),
        (["-o", str(folder / "profile.json")], "--profile"),
        (["--to", "sglang=" + str(folder / "placement.json")], "--placement"),
        (["--interval", "inf"], "--interval"),
    ]:
        code, output = run(*words)
        assert code == 2, output
        assert said in output


def test_nearest_copies_are_followed_once_it_is_said_who_sends(
    folder: Path, run: Callable[..., tuple[int, str]]
) -> None:
    rows = np.tile(np.append(np.arange(EXPERTS).reshape(RANKS, -1), [[8], [12], [0], [4]], axis=1).ravel(), (LAYERS, 1))
    fields = {"slots_per_rank": [EXPERTS // RANKS + 1] * RANKS, "num_experts": EXPERTS, "split": "nearest"}
    Placement(physical_to_logical=rows, num_hidden_layers=LAYERS, **fields).save(folder / "placement.json")
    grow(folder, 0, traffic(hot=0))
    code, output = run()
    assert code == 2 and "--senders uniform" in output, output
    code, output = run("--senders", "uniform", "--port", "0")
    assert code == 0 and "moved: " in output and "warning" not in output, output
    assert Placement.load(folder / "placement.json").split == "nearest"


def test_steps_of_other_layers_are_refused(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    grow(folder, 0, Traces(counts=traffic(hot=0).counts, layer_ids=(3, 4)))
    code, output = run()
    assert code == 1 and "warning: Placement.layer_ids" in output, output
    assert Placement.load(folder / "placement.json") == contiguous()


def test_two_watches_of_one_file_are_refused(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    grow(folder, 0, traffic(hot=0))
    with sole(folder / "placement.json"):
        code, output = run()
        assert code == 2 and "another watch writes it" in output, output
        code, output = run("-o", str(folder / "other.json"))
        assert code == 0, output
    for option in ("--state", "--to"):
        with sole(folder / "held.json"):
            code, output = run(option, f"{'sglang=' if option == '--to' else ''}{folder / 'held.json'}")
            assert code == 2 and "another watch writes it" in output, output
    assert run()[0] == 0


def test_a_restart_learns_nothing_twice(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    for number in range(3):
        grow(folder, number, traffic(hot=0, seed=number))
    state = folder / "state"
    run("--state", str(state))
    saved = state.read_bytes()
    code, output = run("--state", str(state))
    assert code == 0 and "no steps yet" in output and state.read_bytes() == saved, output
    grow(folder, 3, traffic(hot=1))
    code, output = run("--state", str(state))
    assert code == 0 and "moved: " in output, output


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

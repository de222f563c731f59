"""What `gemopt watch` serves: metrics, health and the dashboard of them."""

from __future__ import annotations

import json
import socket
import struct
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from watched import RANKS, filled, grow, traffic, watch

from gemopt import InputError
from gemopt.online.metrics import Health, Metrics, serve

DASHBOARD = Path(__file__).resolve().parents[1] / "examples" / "grafana_watch.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return filled(tmp_path)


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
        for elsewhere in ("nowhere.invalid", "192.0.2.1"):
            with pytest.raises(InputError, match=rf"--host: got {elsewhere}; .*; give an address of this machine"):
                serve(Metrics(), health, 0, elsewhere)
    finally:
        server.shutdown()
        server.server_close()


def test_who_connects_and_says_nothing_keeps_nobody_waiting() -> None:
    server = serve(Metrics(), Health(stale_after_s=1e6), 0)
    with socket.create_connection(("127.0.0.1", server.server_port)):
        assert fetch(server.server_port, "/healthz")[0] == 200
        assert fetch(server.server_port, "/metrics")[0] == 200
        ending = threading.Thread(target=server.shutdown)
        ending.start()
        ending.join(timeout=60)
        assert not ending.is_alive()
        server.server_close()


def test_probes_that_say_nothing_are_no_news(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that wait until they are hung up on, and those that hang up themselves."""
    monkeypatch.setattr("gemopt.online.metrics._Quiet.timeout", 0.01)
    server = serve(Metrics(), Health(stale_after_s=1e6), 0)
    try:
        for linger in (False, True):
            with socket.create_connection(("127.0.0.1", server.server_port)) as probe:
                if linger:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
                else:
                    assert probe.recv(1) == b""
        monkeypatch.undo()
        assert fetch(server.server_port, "/healthz")[0] == 200
    finally:
        server.shutdown()
        server.server_close()
    assert capfd.readouterr().err == ""


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


def test_what_was_not_measured_yet_is_no_zero() -> None:
    """A gap of 0 would be a proof; counters are there from the start, or the first event would be no increase."""
    page = Metrics().page().decode()
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    gauges = (
        "certified_gap_ratio",
        "imbalance_ratio",
        "makespan_us",
        "drift_ratio",
        "predicted_gain_us",
        "realised_gain_us",
    )
    assert all(values[f"gemopt_{name}"] == "NaN" for name in gauges)
    assert values["gemopt_promises_kept_ratio"] == "1.0"
    assert values['gemopt_faults_total{kind="action"}'] == values['gemopt_decisions_total{kind="failed"}'] == "0.0"

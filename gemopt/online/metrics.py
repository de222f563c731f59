"""What `gemopt watch` tells monitoring: Prometheus metrics and a health page, served from a thread.

Needs the extra `watch` (prometheus-client). Names and units are in `docs/watch.md`; a dashboard that shows them is
`examples/grafana_watch.json`.
"""

from __future__ import annotations

import errno
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from gemopt.exceptions import InputError, install_hint

DECISIONS = ("moved", "kept", "failed", "refused")
FAULTS = ("file", "window", "action", "state", "metrics")
Start = Callable[[str, list[tuple[str, str]]], object]


class Metrics:
    """Gauges and counters of one watch, in a registry of their own."""

    def __init__(self) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError:
            raise InputError(
                "--port", "prometheus_client: not installed", "the extra `watch`", install_hint("watch")
            ) from None
        self.registry = prometheus.CollectorRegistry()

        def gauge(name: str, text: str, labels: Sequence[str] = ()) -> Any:
            made = prometheus.Gauge(f"gemopt_{name}", text, labels, registry=self.registry)
            if not labels:
                made.set(math.nan)  # 0 would be a reading
            return made

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Any:
            return prometheus.Counter(f"gemopt_{name}", text, labels, registry=self.registry)

        self.imbalance = gauge("imbalance_ratio", "Slowest over mean rank time, over the last steps and all layers")
        self.straggler = gauge("straggler_share", "Share of layers and steps in which the rank ended last", ["rank"])
        self.speed = gauge("rank_time_factor", "Latency of the rank over that of its profile", ["rank"])
        self.silent = gauge("rank_silent_steps", "Steps since the rank last reported, while others did", ["rank"])
        self.drift = gauge("drift_ratio", "Distance of the last loads from what was foretold, 0 to 1")
        self.predicted = gauge("predicted_gain_us", "Microseconds per step that the last decision promised")
        self.realised = gauge("realised_gain_us", "Microseconds per step that it gained on the steps since")
        self.kept = gauge("promises_kept_ratio", "Share of what moves promised that measured latencies bore out")
        self.kept.set(1.0)
        self.gap = gauge("certified_gap_ratio", "Most by which any placement could beat the one in force, last steps")
        self.makespan = gauge("makespan_us", "Modelled latency per step of all MoE layers, last steps")
        self.moves = counter("moves", "Experts moved into a rank")
        self.decisions = counter("decisions", "Decisions by what they did", ["kind"])
        self.steps = counter("steps", "Steps seen")
        self.faults = counter("faults", "What went wrong, by kind", ["kind"])
        for counts, kinds in ((self.decisions, DECISIONS), (self.faults, FAULTS)):
            for kind in kinds:
                counts.labels(kind=kind)
        self.last = gauge("last_step_timestamp_seconds", "When the last steps came in, Unix time")

    def ranks(self, gauge: Any, values_G: Iterable[float]) -> None:
        """One value per rank."""
        for rank, value in enumerate(values_G):
            gauge.labels(rank=str(rank)).set(float(value))

    def page(self) -> bytes:
        """What a scrape is answered."""
        from prometheus_client import generate_latest

        return bytes(generate_latest(self.registry))


class Health:
    """Whether the watch is alive: looks often enough, and what it last said."""

    def __init__(self, stale_after_s: float) -> None:
        self.stale_after_s = stale_after_s
        self._looked = math.inf  # not yet: kernels may have to be compiled before
        self._said: dict[str, object] = {"reason": "no steps yet"}

    def looked(self, **said: object) -> None:
        """The loop came round, with something to say about what it did or met."""
        self._looked = time.monotonic()
        self._said |= said

    def answer(self) -> tuple[str, bytes]:
        """Status line and JSON."""
        age = max(0.0, time.monotonic() - self._looked)
        well = age <= self.stale_after_s
        body = {"status": "ok" if well else "stale", "seconds_since_look": round(age, 3), **self._said}
        return "200 OK" if well else "503 Service Unavailable", json.dumps(body).encode()


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each request: who connects and says nothing keeps nobody waiting, the end of the watch neither."""

    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    timeout = 30.0  # seconds for a request to come

    def handle(self) -> None:
        """Who connects and says nothing, or goes away, as probes of a port do, is no news either."""
        with suppress(TimeoutError, ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are not news."""


def serve(metrics: Metrics, health: Health, port: int, host: str = "127.0.0.1") -> WSGIServer:
    """Answer `/metrics` and `/healthz` from a daemon thread; `shutdown()` and `server_close()` end it.

    Raises
    ------
    InputError
        When the address or the port cannot be had.
    """

    def application(environ: dict[str, Any], start: Start) -> list[bytes]:
        path = environ.get("PATH_INFO", "/")
        if path == "/metrics":
            start("200 OK", [("Content-Type", "text/plain; version=0.0.4; charset=utf-8")])
            return [metrics.page()]
        if path in ("/healthz", "/health"):
            status, body = health.answer()
            start(status, [("Content-Type", "application/json")])
            return [body]
        start("404 Not Found", [("Content-Type", "text/plain")])
        return [b"/metrics or /healthz\n"]

    try:
        server = make_server(host, port, application, _Server, _Quiet)
    except socket.gaierror as error:
        raise InputError("--host", host, error.strerror or str(error), "give an address of this machine") from None
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
            raise InputError("--host", host, reason, "give an address of this machine") from None
        raise InputError("--port", f"{host}:{port}", reason, "give another port, or 0 for any free one") from None
    threading.Thread(target=server.serve_forever, name="gemopt-metrics", daemon=True).start()
    return server

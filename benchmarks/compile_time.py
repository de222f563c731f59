"""CPU seconds that numba compiles on a machine where nothing is compiled yet, by call and by kernel, in Markdown.

    python benchmarks/compile_time.py [CALL ...] [--kernels]

Every call runs in a process and with a kernel cache of its own, on one thread; CPU seconds hold on a busy machine too.
`compiling` is what passes while numba compiles; a kernel's own is without the kernels that it calls. `all` is of the
whole process, imports and solving included. A kernel is compiled once for every signature that it is called with.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from instances import affine_profile, routing, speeds, staircase_profile
from machine import stamp

LIMIT_S = 6.0  # of a call that solves


def _inputs(experts: int, ranks: int, steps: int = 60, layers: int = 1, *, stairs: bool = False) -> tuple[Any, Any]:
    profile = (staircase_profile if stairs else affine_profile)(speeds(ranks))
    return profile, routing(layers=layers, experts=experts, steps=steps, tokens=512, top_k=2)


def _solve(experts: int, ranks: int, **options: Any) -> Any:
    from gemopt import solve

    inputs = {name: options.pop(name) for name in ("steps", "layers", "stairs") if name in options}
    return solve(*_inputs(experts, ranks, **inputs), **{"time_limit": LIMIT_S, "threads": 1, **options})


def _certify() -> None:
    from gemopt import solve
    from gemopt.verify import verify

    profile, traces = _inputs(32, 16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "certificate.json"
        solve(profile, traces, time_limit=LIMIT_S, threads=1, certificate=path)
        verify(path, profile, traces)


def _controller() -> None:
    from gemopt.online import Controller
    from gemopt.placement import Placement

    Controller(affine_profile(speeds(4)), Placement.contiguous(2, 16, 4)).warm()


def _replay() -> None:
    from gemopt.replay import replay

    replay(*_inputs(16, 4, layers=2), ["contiguous", "fitted-once", "online"], window=10)


def _report() -> None:
    from gemopt import solve
    from gemopt.report import report

    profile, traces = _inputs(16, 4, layers=2)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("result.json", "profile.json", "traces.safetensors")]
        for document, path in zip(
            (solve(profile, traces, solver="lpt", time_limit=1), profile, traces), paths, strict=True
        ):
            document.save(path)
        report(*paths)


CALLS: dict[str, Callable[[], object]] = {
    "lpt": lambda: _solve(32, 16, solver="lpt"),
    "solve, 12 experts on 3 ranks": lambda: _solve(12, 3),
    "solve, 16 on 4": lambda: _solve(16, 4),
    "solve, 32 on 16": lambda: _solve(32, 16),
    "solve, 32 on 16, limit 2 s": lambda: _solve(32, 16, time_limit=2.0),
    "solve, 256 on 16": lambda: _solve(256, 16),
    "solve, 256 on 16, staircase": lambda: _solve(256, 16, stairs=True),
    "local-search, 32 on 16": lambda: _solve(32, 16, solver="local-search", patience=5),
    "columns, 16 on 4": lambda: _solve(16, 4, solver="columns"),
    "solve, 32 on 8 with 16 copies": lambda: _solve(32, 8, slots_per_rank=6),
    "solve, 8 on 4 with 4 copies": lambda: _solve(8, 4, slots_per_rank=3),
    "solve, the same, split optimally": lambda: _solve(32, 8, slots_per_rank=6, split="optimal"),
    "certificate and verify, 32 on 16": _certify,
    "controller": _controller,
    "replay": _replay,
    "report of an answer by lpt": _report,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("calls", nargs="*", choices=[*CALLS, []])
    parser.add_argument("--kernels", action="store_true", help="a table of kernels for each call")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        return _one(given.one)
    print(stamp("numba", "llvmlite"), f"load {os.getloadavg()[1]:.0f}\n", flush=True)
    print("| call | kernels | signatures | compiling, CPU s | all, CPU s |\n|---|---|---|---|---|", flush=True)
    tables, sums = [], [0, 0, 0.0, 0.0]
    for name in given.calls or CALLS:
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "NUMBA_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, __file__, "--one", name]
            made = json.loads(subprocess.check_output(command, env=environment, text=True).splitlines()[-1])
        row = [len(made["kernels"]), sum(n for n, _ in made["kernels"].values()), made["compiling"], made["all"]]
        print(f"| {name} | {row[0]} | {row[1]} | {row[2]:.1f} | {row[3]:.1f} |", flush=True)
        sums = [a + b for a, b in zip(sums, row, strict=True)]
        tables.append((name, made["kernels"]))
    print(f"| all | {sums[0]} | {sums[1]} | {sums[2]:.1f} | {sums[3]:.1f} |")
    if given.kernels:
        for name, kernels in tables:
            print(f"\n{name}:\n\n| kernel | signatures | CPU s |\n|---|---|---|")
            for kernel, (times, seconds) in sorted(kernels.items(), key=lambda item: -item[1][1]):
                print(f"| `{kernel}` | {times} | {seconds:.2f} |")


def _one(name: str) -> None:
    """Run a call; print what numba compiled, as one line of JSON."""
    from numba.core import event

    class Listener(event.Listener):
        """Times what is compiled; a kernel that another one calls is compiled while that one is."""

        def __init__(self) -> None:
            self.open: list[list[float]] = []  # begin, seconds of callees
            self.kernels: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])

        def on_start(self, event: Any) -> None:
            self.open.append([time.process_time(), 0.0])

        def on_end(self, event: Any) -> None:
            begin, inner = self.open.pop()
            took = time.process_time() - begin
            if self.open:
                self.open[-1][1] += took
            function = event.data["dispatcher"].py_func
            kernel = self.kernels[f"{function.__module__.removeprefix('gemopt.')}.{function.__name__}"]
            kernel[0] += 1
            kernel[1] += took - inner

    listener = Listener()
    event.register("numba:compile", listener)
    np.random.seed(0)
    CALLS[name]()
    compiling = sum(seconds for _, seconds in listener.kernels.values())
    print(json.dumps({"kernels": listener.kernels, "compiling": compiling, "all": time.process_time()}))


if __name__ == "__main__":
    main()

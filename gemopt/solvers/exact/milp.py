"""MILP through PuLP, with HiGHS where highspy is installed and CBC otherwise, in a child process of its own.

OR-Tools and highspy cannot share a process, so PuLP is never imported here. The child writes down what it finds as it
finds it, and can be ended at any time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemopt.exceptions import SolverError
from gemopt.solvers.base import Outcome
from gemopt.solvers.exact.layer import Search
from gemopt.solvers.exact.milp_worker import Scale, cbc_bound, proven_us
from gemopt.solvers.exact.stated import Stated

GRACE_S = 0.25
"""How long after the deadline the child may still report."""
POLL_S = 0.02
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
"""What the child's libraries look at for how many threads to start."""
NAMES = {"highs": "HiGHS", "cbc": "CBC"}
FARTHEST = 1e7
"""Loads up to here are kept apart by a solver with tolerances of 1e-9."""


@dataclass
class Milp(Stated):
    """MILP in a child process. backend: `highs`, `cbc`, or `auto` for the first that is installed."""

    backend: str = "auto"
    name = "milp"
    coefficients_per_second = 5_000
    start_s = 1.0  # about what starting the child takes

    def run(self, search: Search) -> Outcome:
        """See `Stated`."""
        with tempfile.TemporaryDirectory(prefix="gemopt-milp-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            write_request(folder, search, backend=self.backend)
            return outcome_of(folder, search, finished=watch(folder, search))


def outcome_of(folder: Path, search: Search, *, finished: bool) -> Outcome:
    """The best that is known now, of which the child has written down its part."""
    state = read_state(folder, search)
    note = f"solved by {NAMES[state['backend']]}" if state else "the solver was not reached in time"
    if not _kept_apart(search):
        note += f"; loads beyond {FARTHEST:.0e} are not kept apart by its tolerances: no bound of its own"
    proven = finished and state.get("proven")
    return search.outcome(search.proof() if proven else search.options.cut_by, note, reached=bool(state))


def _kept_apart(search: Search) -> bool:
    return search.compact.most_load <= FARTHEST


def write_request(folder: Path, search: Search, *, backend: str = "auto") -> None:
    """Everything the child needs."""
    compact, options = search.compact, search.options
    search.offered = 0
    compact.save(folder / "compact.npz")
    np.save(folder / "start.npy", compact.canonical(compact.held(search.row)))
    request = {
        "backend": backend,
        "parent": os.getpid(),
        "objective_us": search.objective_us,
        "deadline": time.time() + options.remaining,
        "gap": options.gap,
        "threads": options.threads,
        "seed": options.seed % 2**31,
    }
    (folder / "request.json").write_text(json.dumps(request))


def watch(folder: Path, search: Search) -> bool:
    """Run the child until it ends, the deadline or an interrupt; whether it ended by itself."""
    with open(folder / "stderr", "wb") as errors:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "gemopt.solvers.exact.milp_worker", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            env={**os.environ, "TMPDIR": str(folder), **dict.fromkeys(THREADS, str(search.options.threads))},
            start_new_session=True,
        )
    read = 0.0
    try:
        while child.poll() is None:
            time.sleep(POLL_S)
            if search.options.stop() or time.monotonic() > search.options.deadline + GRACE_S:
                return False
            changed = _changed(folder)
            if changed > read:
                read = changed
                read_state(folder, search)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode:
        lines = (folder / "stderr").read_text(errors="replace").strip().splitlines()
        raise SolverError(f"milp: the child process ended with {child.returncode}: {lines[-1] if lines else ''}")
    return True


def _changed(folder: Path) -> float:
    try:
        return (folder / "state.json").stat().st_mtime
    except FileNotFoundError:
        return 0.0


def read_state(folder: Path, search: Search) -> dict[str, Any]:
    """Take over what the child has written so far."""
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    except FileNotFoundError:
        return {}
    bounds = [state["bound_us"]]
    if state["backend"] == "cbc" and not state["finished"] and (folder / "solver.log").exists():
        log = (folder / "solver.log").read_text(errors="replace")  # CBC itself reports nothing before its end
        bounds.append(proven_us(cbc_bound(log), Scale(*state["scale"])))
    for bound_us in bounds:
        if bound_us is not None and _kept_apart(search):
            search.offer_bound(bound_us)
    for row in state["rows"][search.offered :]:
        search.offer_row(np.array(row))
    search.offered = len(state["rows"])
    return state

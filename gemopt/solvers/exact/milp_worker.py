"""Child process of the MILP solver: `python -m gemopt.solvers.exact.milp_worker FOLDER ...`.

Each folder holds `compact.npz`, `start.npy` and `request.json`; the answers go to `state.json` there, which is
replaced whole whenever something better is known, so the parent may end this process at any time. OR-Tools is never
imported here, since highspy cannot share a process with it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.documents import write_text
from gemopt.solvers.exact.joint import JointCompact, load_compact

if TYPE_CHECKING:
    from gemopt.solvers.exact.milp_formulation import MilpFormulation

TOLERANCE = 1e-9
LEAST_GAP = 1e-7
MARGIN_OPEN, MARGIN = 2e-7, 2e-7
"""What is given away of a bound for the solvers' tolerances, of what is open and of the whole objective."""
UNIT_PARTS = 1000.0
"""Units of time that what is open is divided into."""
LEAST_OPEN = 1e-3
"""Of the objective: the unit is not made from less than this, since makespans are stated with the same unit."""
REPORT_S = 0.5
WATCH_S = 0.2
"""How often the child looks whether its parent still lives."""
CBC_NUMBER = r"(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)"


class Scale(NamedTuple):
    """How a bound in the formulation's units becomes one in microseconds."""

    base_us: float
    unit_us: float
    margin_us: float


class Answer:
    """What is known so far about one folder's problem, kept in its `state.json`."""

    def __init__(self, folder: Path, formulation: MilpFormulation, objective_us: float, backend: str) -> None:
        self.folder = folder
        self.formulation = formulation
        compact = formulation.compact
        margin_us = MARGIN_OPEN * compact.open_us + MARGIN * abs(objective_us)
        self.scale = Scale(compact.base_us, formulation.unit_us, margin_us)
        self.state: dict[str, Any] = {"backend": backend, "scale": self.scale, "finished": False, "proven": False}
        self.state.update(bound_us=None, rows=[])
        self._written = 0.0

    def bound(self, value: float) -> None:
        """Take over a dual bound in the formulation's units."""
        bound_us = proven_us(value, self.scale)
        if bound_us is not None and (self.state["bound_us"] is None or bound_us > self.state["bound_us"]):
            self.state["bound_us"] = bound_us
            if time.monotonic() > self._written + REPORT_S:
                self.write()

    def solution(self, held_QG: NDArray[np.bool_]) -> None:
        """Keep a placement; what is rounded to more experts than there are slots is none.

        All are kept, in order: which of equally good ones is taken must not depend on when the parent looks.
        """
        if not self.formulation.compact.fits(held_QG):
            return
        self.state["rows"].append(self.formulation.compact.row(held_QG).tolist())
        self.write()

    def finish(self, *, proven: bool) -> None:
        """The solver came back by itself."""
        self.state.update(finished=True, proven=proven)
        self.write()

    def write(self) -> None:
        """Replace the file."""
        self._written = time.monotonic()
        write_text(self.folder / "state.json", json.dumps(self.state))


def proven_us(value: float, scale: Scale) -> float | None:
    """Microseconds that a dual bound proves, less the margin for tolerances; None for a bound of no use."""
    if not math.isfinite(value) or abs(value) > 1e19:
        return None
    return scale.base_us + value * scale.unit_us - scale.margin_us


def solve_folder(folder: Path) -> None:
    """Build and solve the problem of one folder."""
    import pulp

    from gemopt.solvers.exact.milp_formulation import MilpFormulation, MilpJoint

    request = json.loads((folder / "request.json").read_text())
    compact, start_QG = load_compact(folder / "compact.npz"), np.load(folder / "start.npy")
    objective_us = request["objective_us"]
    unit_us = max(compact.open_us, LEAST_OPEN * abs(objective_us)) / UNIT_PARTS or 1.0
    formulation: MilpFormulation
    if isinstance(compact, JointCompact):
        formulation = MilpJoint(compact, unit_us, start_QG)
    else:
        formulation = MilpFormulation(compact, unit_us, start_QG)
    backend = request["backend"]
    if backend == "auto":
        backend = "highs" if pulp.HiGHS().available() else "cbc"
    answer = Answer(folder, formulation, objective_us, backend)
    answer.write()
    seconds = (request["deadline"] - time.time()) * 0.98 - 0.1  # time to write the answer
    if seconds > 0:
        {"highs": _highs, "cbc": _cbc}[backend](formulation, answer, request, seconds)


def gap_units(formulation: MilpFormulation, request: dict[str, Any]) -> float:
    """The gap asked for, a fraction of the objective, in units: the solver sees only what lies above the floors."""
    gap = max(float(request["gap"]), LEAST_GAP)
    return gap * max(formulation.compact.base_us, 0.0) / formulation.unit_us


def _highs(formulation: MilpFormulation, answer: Answer, request: dict[str, Any], seconds: float) -> None:
    import highspy
    import pulp

    class Started(pulp.HiGHS):  # type: ignore[misc]
        """PuLP's HiGHS with a MIP start, which PuLP itself cannot pass on."""

        def callSolver(self, lp: Any) -> None:
            solution = highspy.HighsSolution()
            solution.col_value = [variable.varValue for variable in lp.variables()]
            lp.solverModel.setSolution(solution)
            lp.solverModel.run()

    kinds = highspy.cb.HighsCallbackType

    def listen(kind: int, message: str, out: Any, into: Any, user: Any) -> None:
        if kind == int(kinds.kCallbackMipImprovingSolution):
            values = out.mip_solution
            answer.solution(np.array([[values[v.index] > 0.5 for v in ranks] for ranks in formulation.held]))
        answer.bound(out.mip_dual_bound)

    solver = Started(
        msg=True,
        log_to_console=False,
        timeLimit=seconds,
        gapRel=LEAST_GAP,
        gapAbs=gap_units(formulation, request),
        threads=request["threads"],
        callbackTuple=(listen, None),
        callbacksToActivate=[kinds.kCallbackMipImprovingSolution, kinds.kCallbackMipLogging],
        random_seed=request["seed"],
        primal_feasibility_tolerance=TOLERANCE,
        dual_feasibility_tolerance=TOLERANCE,
        mip_feasibility_tolerance=TOLERANCE,
        log_file=str(answer.folder / "solver.log"),
        presolve="off",  # its substitutions lose small loads beside large latencies, and with them the optimum
    )
    formulation.problem.solve(solver)
    model = formulation.problem.solverModel
    answer.bound(model.getInfo().mip_dual_bound)
    if formulation.problem.sol_status > 0:
        answer.solution(_values(formulation))
    answer.finish(proven=model.getModelStatus() == highspy.HighsModelStatus.kOptimal)


def _cbc(formulation: MilpFormulation, answer: Answer, request: dict[str, Any], seconds: float) -> None:
    import pulp

    options: dict[str, Any] = {
        "msg": False,
        "timeLimit": seconds,
        "gapRel": LEAST_GAP,
        "gapAbs": gap_units(formulation, request),
        "warmStart": True,
        "logPath": str(answer.folder / "solver.log"),
        "options": [
            *(f"{name} {TOLERANCE}" for name in ("primalT", "dualT", "integerT", "increment")),
            f"randomCbcSeed {request['seed']}",
            "preprocess off",  # as HiGHS's presolve: its substitutions lose the optimum
        ],
    }
    if request["threads"] > 1:
        options["threads"] = request["threads"]
    solver = pulp.COIN_CMD(**options)
    if not solver.available():
        with warnings.catch_warnings():  # the CBC that PuLP 3 brings along
            warnings.simplefilter("ignore", DeprecationWarning)
            solver = pulp.PULP_CBC_CMD(**options)
    formulation.problem.solve(solver)
    log = (answer.folder / "solver.log").read_text(errors="replace")
    answer.bound(cbc_bound(log))
    if formulation.problem.sol_status > 0:
        answer.solution(_values(formulation))
    answer.finish(proven="Result - Optimal solution found" in log)


def cbc_bound(log: str) -> float:
    """Lower bound that a log of CBC's proves, even a cut off one; -inf when it tells none.

    Printed numbers are rounded, so half a unit of their last digit is taken off. A search that ended as optimal within
    no gap prints the objective only.
    """
    numbers = re.findall(rf"best possible {CBC_NUMBER}", log)[-1:] + re.findall(rf"Lower bound: +{CBC_NUMBER}", log)
    if re.search(r"Result - Optimal solution found\s*$", log, re.MULTILINE):
        numbers += re.findall(rf"^Objective value: +{CBC_NUMBER}", log, re.MULTILINE)
    bounds = [float(number) - 0.5 * 10.0 ** -len(number.partition(".")[2]) for number in numbers if "e" not in number]
    return max(bounds, default=-math.inf)


def _values(formulation: MilpFormulation) -> NDArray[np.bool_]:
    return np.array([[variable.varValue > 0.5 for variable in ranks] for ranks in formulation.held])


def end_with(parent: int, folders: list[Path]) -> None:
    """Watch the parent: when it is gone, whatever killed it, so are these folders and all that was started here."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        if os.getpgrp() == os.getpid():  # CBC is a process of its own in this group
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(names: list[str]) -> None:
    """Solve the problems of all folders, one after the other."""
    folders = [Path(name) for name in names]
    (folders[0] / "pid").write_text(str(os.getpid()))
    end_with(json.loads((folders[0] / "request.json").read_text())["parent"], folders)
    for folder in folders:
        solve_folder(folder)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1:])

"""Child process of MoETuner's ILPs: `python -m gemopt.solvers.baselines.moetuner_worker FOLDER`.

Reads `request.json` and writes `answer.json` there. PuLP loads highspy, which cannot share a process with OR-Tools.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pulp

from gemopt.documents import write_text


def clusters(request: dict[str, Any]) -> tuple[Any, Any]:
    """ILP 1: the problem, and a function that reads the cluster of each expert."""
    loads, slots = np.array(request["loads"]), request["slots"]
    mean = loads.sum() / len(slots)
    scale = max(mean, 1e-9)
    problem = pulp.LpProblem("clusters", pulp.LpMinimize)
    within = [[pulp.LpVariable(f"x{e}_{c}", cat=pulp.LpBinary) for c in range(len(slots))] for e in range(len(loads))]
    away = [pulp.LpVariable(f"d{c}", lowBound=0) for c in range(len(slots))]
    problem += pulp.lpSum(away)
    for of_expert in within:
        problem += pulp.lpSum(of_expert) == 1
    for c, room in enumerate(slots):
        load = pulp.lpSum(float(n / scale) * within[e][c] for e, n in enumerate(loads))
        problem += away[c] >= load - float(mean / scale)
        problem += away[c] >= float(mean / scale) - load
        held = pulp.lpSum(of_expert[c] for of_expert in within)
        problem += held <= room
        if room and len(loads) >= sum(r > 0 for r in slots):
            problem += held >= 1
    return problem, lambda: {"cluster": [_chosen(of_expert) for of_expert in within]}


def ranks(request: dict[str, Any]) -> tuple[Any, Any]:
    """ILP 2 over some layers in a row, the first fixed or not: the problem, and a function that reads the ranks.

    The products y y are linear where the first factor is fixed. Otherwise they are stated row by row: what cluster c1
    sends to rank g2 counts in full where c1 is on g1, and is never more than the most it sends to one cluster.
    """
    cost, first, slots = np.array(request["cost"]), request["first"], request["slots"]
    flows, size = [np.array(flow) for flow in request["flows"]], len(slots)
    scale = max(max(flow.max() for flow in flows), 1e-9)
    cost = cost / max(cost.max(), 1e-300)
    problem = pulp.LpProblem("ranks", pulp.LpMinimize)
    sits = [
        [[pulp.LpVariable(f"y{n}_{c}_{g}", cat=pulp.LpBinary) for g in range(size)] for c in range(size)]
        for n in range(len(flows) + 1)
    ]
    worst = [pulp.LpVariable(f"worst{n}", lowBound=0) for n in range(len(flows))]
    problem += pulp.lpSum(worst)
    for n, layer in enumerate(sits):
        for c in range(size):
            problem += pulp.lpSum(layer[c]) == 1
            problem += pulp.lpSum(layer[other][c] for other in range(size)) == 1
            for g in range(size):
                if slots[c] != slots[g]:
                    layer[c][g].upBound = 0
                if n == 0 and first is not None:
                    layer[c][g].lowBound = layer[c][g].upBound = int(first[c] == g)
    for n, flow in enumerate(flows):
        for c1, g1, g2 in np.ndindex(size, size, size):
            if cost[g1, g2] == 0 or (n == 0 and first is not None and first[c1] != g1):
                continue
            sent_C = flow[c1] / scale * cost[g1, g2]
            sent = pulp.lpSum(float(sent_C[c2]) * sits[n + 1][c2][g2] for c2 in range(size))
            problem += worst[n] >= sent - float(sent_C.max()) * (1 - sits[n][c1][g1])
    return problem, lambda: {"ranks": [[_chosen(of_cluster) for of_cluster in layer] for layer in sits]}


def _chosen(variables: list[Any]) -> int:
    return int(np.argmax([variable.varValue or 0.0 for variable in variables]))


def main(name: str) -> None:
    """Solve the request of a folder."""
    folder = Path(name)
    request = json.loads((folder / "request.json").read_text())
    problem, read = {"clusters": clusters, "ranks": ranks}[request["kind"]](request)
    options = {"msg": False, "timeLimit": max(0.1, request["seconds"]), "gapRel": request["gap"]}
    highs = pulp.HiGHS(**options, threads=request["threads"], random_seed=request["seed"], log_to_console=False)
    backend = request["backend"]
    if backend == "auto":
        backend = "highs" if highs.available() else "cbc"
    if backend == "highs":
        solver = highs
    else:
        solver = pulp.COIN_CMD(**options)
        if not solver.available():
            solver = pulp.PULP_CBC_CMD(**options)
    problem.solve(solver)
    if problem.sol_status > 0:
        write_text(folder / "answer.json", json.dumps(read()))


if __name__ == "__main__":
    main(sys.argv[1])

"""MoETuner: balanced clusters of experts, then clusters on ranks so that the fullest link carries least, by two ILPs.

Go and Mahajan, MoETuner: Optimized Mixture of Expert Serving with Balanced Expert Placement and Token Routing,
arXiv:2502.06643 (Gurobi there, PuLP with HiGHS or CBC here). ILP 1, for every layer: `min sum_c |T_c - mean|` over
clusters c, every expert in one, at least one in each. ILP 2, over all layers: one cluster per rank and layer,
`min sum_l max_{g1, g2} C_{c1 c2} / B_{g1 g2} y_{c1 g1} y_{c2 g2}` with the tokens C that go from cluster to cluster of
the next layer; E L / G experts per rank in all. It knows mean loads only: no steps, no speeds, no copies.

Where the paper is silent we chose what helps it:
* clusters are as large as the slots of a rank allow, so that every answer fits, and ILP 1 ends within a relative gap
  of the published tolerance, .025;
* B is what a byte takes from rank to rank on the slowest port on its way, 0 on a rank itself;
* ILP 2 over all layers at once is out of reach of open solvers in minutes, so layer follows layer first, each placed
  against the one before, which makes the products linear; the time left goes to all layers at once, and the better
  under the paper's objective counts;
* where dispatch starts from the tokens' own ranks, transitions do not say what the links carry: they are used anyway.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gemopt.evaluate import linked_total
from gemopt.latency import FloatArray
from gemopt.links import Links
from gemopt.migration import held
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers.base import Linked, Options, Outcome, Row, Supports, incumbent
from gemopt.solvers.placing import row_of

TOLERANCE = 0.025
WINDOW_SHARE = 0.5  # of the time goes to layer after layer
START_S = 1.0  # what a child needs to start
GRACE_S = 3.0


class MoeTuner:
    """ILP 1 layer by layer, ILP 2 where there is a topology. backend: `highs`, `cbc`, `auto` for what is installed."""

    name = "moetuner"
    supports = Supports(links=True)

    def __init__(self, backend: str = "auto") -> None:
        self.backend = backend

    def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
        """Clusters of one layer, on the ranks in order; see `Solver`."""
        mean_E = problem.counts_TE.sum(axis=0, dtype=np.int64) / problem.num_steps
        request = {"kind": "clusters", "loads": mean_E.tolist(), "slots": problem.slots_per_rank.tolist()}
        answer = solve_child(request | {"gap": TOLERANCE}, self.backend, options)
        cluster_E = np.array(answer["cluster"]) if answer else _greedy(mean_E, problem.slots_per_rank)
        row = row_of(np.arange(problem.num_ranks)[:, None] == cluster_E, problem.slots_per_rank)
        note = "clusters alone: transitions need a topology"
        if not answer:
            note = "no time for the ILP: clusters by size"
        return Outcome(row, StoppedBy.ITERATIONS if answer else options.cut_by, note=note)

    def solve_linked(self, problems: Sequence[Problem], links: Links, rows: list[Row], options: Options) -> Linked:
        """Clusters on ranks; see `LinkedSolver`."""
        slots_G = problems[0].slots_per_rank
        cost_GG = links.topology.byte_times()
        traffic = links.traces.transition_counts().astype(np.float64)
        held_LCE = [held(row, slots_G, problems[0].num_experts).astype(np.float64) for row in rows]  # C: by rank
        between = [held_LCE[k] @ traffic[k] @ held_LCE[k + 1].T for k in range(len(traffic))]
        ranks, cut = [np.arange(len(slots_G))], False
        given = {"kind": "ranks", "cost": cost_GG.tolist(), "slots": slots_G.tolist(), "gap": TOLERANCE}
        for n, flow_CC in enumerate(between):
            share = replace(options, deadline=time.monotonic() + WINDOW_SHARE * options.remaining / (len(between) - n))
            request = given | {"flows": [flow_CC.tolist()], "first": ranks[-1].tolist()}
            answer = solve_child(request, self.backend, share)
            cut = cut or answer is None
            ranks.append(np.array(answer["ranks"][1]) if answer else np.arange(len(slots_G)))
        if between and options.remaining > START_S:
            request = given | {"flows": [flow_CC.tolist() for flow_CC in between], "first": None}
            answer = solve_child(request, self.backend, options)
            found = [np.array(each) for each in answer["ranks"]] if answer else ranks
            if fullest(between, cost_GG, found) < fullest(between, cost_GG, ranks):
                ranks = found
        placed = [_moved(row, slots_G, of_cluster) for row, of_cluster in zip(rows, ranks, strict=True)]
        value = linked_total(problems, placed, links)
        note = "no time for the second ILP on some layers" if cut else ""
        stopped = options.cut_by if options.expired() else StoppedBy.ITERATIONS
        return Linked(placed, value, stopped, [incumbent(value)], note)


def fullest(between: list[FloatArray], cost_GG: FloatArray, ranks: list[Any]) -> float:
    """The paper's second objective: the sum over layers of the fullest link between clusters' ranks."""
    pairs = zip(between, ranks[:-1], ranks[1:], strict=True)
    return float(sum((flow_CC * cost_GG[np.ix_(here, there)]).max() for flow_CC, here, there in pairs))


def _greedy(mean_E: FloatArray, slots_G: Any) -> Any:
    """[E] cluster of each expert: largest first into the smallest cluster with room."""
    cluster_E, load_G, left_G = np.empty(len(mean_E), np.int64), np.zeros(len(slots_G)), np.array(slots_G)
    for expert in np.argsort(-mean_E, kind="stable"):
        cluster = int(np.where(left_G > 0, load_G, np.inf).argmin())
        cluster_E[expert] = cluster
        load_G[cluster] += mean_E[expert]
        left_G[cluster] -= 1
    return cluster_E


def _moved(row: Row, slots_G: Any, rank_of_cluster: Any) -> Row:
    """[P] the row with every cluster on another rank, which has as many slots."""
    parts = np.split(row, np.cumsum(slots_G)[:-1])
    return np.concatenate([parts[int(np.flatnonzero(rank_of_cluster == rank)[0])] for rank in range(len(parts))])


def solve_child(request: dict[str, Any], backend: str, options: Options) -> dict[str, Any] | None:
    """Solve one ILP in a child process, as OR-Tools and highspy cannot share one; None when time did not suffice."""
    seconds = options.remaining if np.isfinite(options.remaining) else 60.0
    if seconds < START_S:
        return None
    with tempfile.TemporaryDirectory(prefix="gemopt-moetuner-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        more = {"backend": backend, "seconds": seconds - START_S / 2, "threads": options.threads, "seed": options.seed}
        (folder / "request.json").write_text(json.dumps(request | more))
        module = "gemopt.solvers.baselines.moetuner_worker"
        child = subprocess.Popen([sys.executable, "-m", module, name], stdout=subprocess.DEVNULL)
        end = time.monotonic() + seconds + GRACE_S
        while child.poll() is None and time.monotonic() < end and not options.stop():
            time.sleep(0.02)
        if child.poll() is None:
            child.kill()
        child.wait()
        path = folder / "answer.json"
        found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return found

"""Exact solvers under makespans and links of all layers together: against brute force."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from brute_links import pair_totals, placements, random_links
from cli_inputs import profile

from gemopt.evaluate import linked_total
from gemopt.exceptions import UnsupportedError
from gemopt.latency import ASSIGNMENTS, Latency, line
from gemopt.links import Links
from gemopt.problem import Problem
from gemopt.solve import solve
from gemopt.solvers.base import LinkedSolver, Options
from gemopt.solvers.exact import joint
from gemopt.solvers.exact.cpsat import CpSat
from gemopt.solvers.exact.joint_search import JointSearch
from gemopt.solvers.exact.milp import Milp

SLOTS = np.array([2, 1, 1])


def problems_of(links: Links, seed: int) -> list[Problem]:
    rng = np.random.default_rng(seed)
    latencies = [Latency(((line(rng.uniform(0, 9), rng.uniform(0, 2)),),)) for _ in SLOTS]
    return [Problem.make(counts, (ASSIGNMENTS,), latencies, SLOTS) for counts in links.traces.counts.swapaxes(0, 1)]


def best_of_all(problems: list[Problem], links: Links) -> float:
    return best_pair(problems, placements(4, SLOTS), links)[0]


def best_pair(problems: list[Problem], rows: list[np.ndarray], links: Links) -> tuple[float, list[np.ndarray]]:
    """The smallest total of all pairs of rows, and the rows."""
    pairs = np.array(list(product(range(len(rows)), repeat=2)))
    totals = pair_totals(problems, rows, links, pairs)
    return totals.min(), [rows[i] for i in pairs[totals.argmin()]]


def agrees(solver: LinkedSolver, seed: int) -> bool:
    """Checks one instance; whether all that is stated is exact there."""
    links = random_links(seed)
    problems = problems_of(links, seed)
    return proves(solver, problems, links, best_of_all(problems, links), np.arange(4))


def proves(solver: LinkedSolver, problems: list[Problem], links: Links, best: float, row: np.ndarray) -> bool:
    start = [row, row]
    found = solver.solve_linked(problems, links, start, Options.lasting(600))
    assert found.total_us == pytest.approx(linked_total(problems, found.rows, links))
    assert found.bound_us <= best * (1 + 1e-9) <= found.total_us * (1 + 2e-9)
    curves = links.topology.ports.curves
    convex = all(curve.hull.x.tolist() == curve.x.tolist() for curve in curves)
    if convex:
        assert found.total_us == pytest.approx(best) and found.bound_us == pytest.approx(best, rel=1e-5)
    return convex


def test_cpsat_proves_what_brute_force_finds() -> None:
    assert sum(agrees(CpSat(), seed) for seed in range(2000, 2014)) >= 5


@pytest.mark.parametrize("backend", ["highs", "cbc"])
def test_milp_proves_what_brute_force_finds(backend: str) -> None:
    assert sum(agrees(Milp(backend), seed) for seed in range(2004, 2006)) >= 1


def rows_with_copies(experts: int, slots_G: np.ndarray) -> list[np.ndarray]:
    """Every row, up to the order of slots on a rank."""
    ranks, found = range(len(slots_G)), []
    some = [held for size in ranks for held in combinations(ranks, size + 1)]
    for ranks_E in product(some, repeat=experts):
        held = [[e for e in range(experts) if g in ranks_E[e]] for g in ranks]
        if all(len(mine) <= size for mine, size in zip(held, slots_G, strict=True)):
            found.append(np.array([e for g in ranks for e in [*held[g], *[-1] * (slots_G[g] - len(held[g]))]]))
    return found


@pytest.mark.parametrize(("slots", "seeds"), [([2, 1, 1], [0, 5, 11]), ([2, 2, 1], [0, 11])])
def test_copies_take_turns_in_what_is_stated(slots: list[int], seeds: list[int]) -> None:
    """Three experts: one spare slot, and two, so that three copies are possible and all share six turns."""
    copied = 0
    for seed in seeds:
        links = random_links(3000 + seed, experts=3, layers=2, steps=2)
        rng, slots_G = np.random.default_rng(seed), np.array(slots)
        latencies = [Latency(((line(rng.uniform(0, 9), rng.uniform(0, 2)),),)) for _ in slots]
        layers = links.traces.counts.swapaxes(0, 1)
        problems = [Problem.make(counts, (ASSIGNMENTS,), latencies, slots_G) for counts in layers]
        best, rows = best_pair(problems, rows_with_copies(3, slots_G), links)
        copied += max((each >= 0).sum() for each in rows) > 3
        row = np.array([0, 1, *[-1] * (slots[0] - 2), 2, *[-1] * (sum(slots[1:]) - 1)])
        assert proves(CpSat(), problems, links, best, row)
    assert copied >= len(seeds) - 1


def test_milp_states_copies_too() -> None:
    links = random_links(3004, experts=3, layers=2, steps=2)
    problems = [
        Problem.make(counts, (ASSIGNMENTS,), [Latency(((line(3, 1),),))] * 3, SLOTS)
        for counts in links.traces.counts.swapaxes(0, 1)
    ]
    best, _ = best_pair(problems, rows_with_copies(3, SLOTS), links)
    proves(Milp("highs"), problems, links, best, np.array([0, 1, 2, -1]))


def test_the_statement_survives_a_file(tmp_path: Path) -> None:
    links = random_links(2001)
    problems = problems_of(links, 1)
    search = JointSearch.of(problems, links, [np.arange(4), np.arange(4)], Options.lasting(9))
    search.compact.save(tmp_path / "compact.npz")
    again = joint.load_compact(tmp_path / "compact.npz")
    assert isinstance(again, joint.JointCompact) and again.base_us == search.compact.base_us
    assert [each.terms for each in again.sendings] == [each.terms for each in search.sendings]


def test_solve_proves_small_cases_and_refuses_others(monkeypatch: pytest.MonkeyPatch) -> None:
    links = random_links(2003)
    given = {"topology": links.topology, "exchange": links.exchange, "cost": "staircase", "time_limit": 6.0}
    found = solve(profile(3), links.traces, solver="cpsat", slots_per_rank=[2, 1, 1], **given)
    other = solve(profile(3), links.traces, solver="local-search", slots_per_rank=[2, 1, 1], **given)
    assert found.objective_us is not None and other.objective_us is not None and found.bound_us is not None
    assert found.objective_us <= other.objective_us * (1 + 1e-9) and found.bound_us >= (other.bound_us or 0.0)
    auto = solve(profile(3), links.traces, slots_per_rank=[2, 1, 1], **given)
    assert (auto.objective_us, auto.status) == (pytest.approx(found.objective_us), found.status)
    spare = solve(profile(3), links.traces, solver="cpsat", slots_per_rank=2, **given)
    assert spare.objective_us is not None and spare.objective_us <= found.objective_us * (1 + 1e-9)
    monkeypatch.setattr(joint, "MOST_COPIES", 2)
    with pytest.raises(UnsupportedError, match="up to 2 copies"):
        solve(profile(3), links.traces, solver="cpsat", slots_per_rank=2, **given)
    monkeypatch.setattr(joint, "MOST_COPIES", 6)
    monkeypatch.setattr(joint, "MOST_TERMS", 10)
    with pytest.raises(UnsupportedError, match="states up to 10 with copies"):
        solve(profile(3), links.traces, solver="cpsat", slots_per_rank=2, **given)
    with pytest.raises(UnsupportedError, match="states up to 10"):
        solve(profile(3), links.traces, solver="milp", slots_per_rank=[2, 1, 1], **given)

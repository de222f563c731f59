"""The copies bound against all placements, under even shares and under any whole shares, and where it is exact."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import linprog
from test_bounds import all_makespans, all_rows, random_latencies
from timed import timed

import gemopt
from gemopt.bounds import copies, copies_bound, step_bounds
from gemopt.evaluate import objective
from gemopt.latency import ACTIVE, ASSIGNMENTS, Latency, line, tiles
from gemopt.placement import Split
from gemopt.problem import Problem
from gemopt.solvers import get
from gemopt.solvers.base import Options
from gemopt.solvers.search import local_search
from gemopt.solvers.search.packing import lpt_row
from gemopt.traces import Traces

NEVER, NOW = np.zeros(1, np.uint8), np.ones(1, np.uint8)


def random_problem(rng: np.random.Generator, kind: str) -> Problem:
    """Two or three experts and ranks, one or two spare slots; experts that are hot now and then."""
    ranks, experts, steps = rng.integers([2, 2, 1], [4, 4, 5]).tolist()
    slots_G = np.bincount(rng.permutation(np.tile(np.arange(ranks), experts))[: experts + rng.integers(1, 3)])
    slots_G = np.pad(slots_G, (0, ranks - len(slots_G)))
    counts_TE = np.where(rng.random((steps, experts)) < 0.5, rng.integers(3), rng.integers(0, 9, (steps, experts)))
    features = {"staircase": (ASSIGNMENTS,), "roofline": (ASSIGNMENTS, ACTIVE), "mixed": (ASSIGNMENTS, tiles(3))}[kind]
    top = max(2, int(counts_TE.sum(axis=1).max()))
    latencies = random_latencies(rng, kind, ranks, len(features), top)
    return Problem.make(counts_TE, features, latencies, slots_G, rng.uniform(0, 2, steps))


def cuts(n: int, parts: int) -> NDArray[np.int64]:
    """All ways to cut n into whole parts."""
    return np.array([cut for cut in product(range(n + 1), repeat=parts) if sum(cut) == n])


def freely_shared(problem: Problem) -> float:
    """Least objective over all placements and all whole shares of every step."""
    best, seen = np.inf, set()
    for row in all_rows(problem.num_experts, problem.slots_per_rank):
        held = tuple(tuple(problem.rank_of_slot[row == e].tolist()) for e in range(problem.num_experts))
        if held not in seen:
            seen.add(held)
            best = min(best, problem.weights_T @ [least(problem, counts_E, held) for counts_E in problem.counts_TE])
    return best


def least(problem: Problem, counts_E: NDArray[np.int32], held: tuple[tuple[int, ...], ...]) -> float:
    loads_NFG = np.zeros((1, len(problem.features), problem.num_ranks), np.int64)
    for n, ranks in zip(counts_E.tolist(), held, strict=True):
        parts = cuts(n, len(ranks))
        more = np.zeros((len(parts), *loads_NFG.shape[1:]), np.int64)
        for f, feature in enumerate(problem.features):
            more[:, f, ranks] = feature.of(parts)
        loads_NFG = np.unique((loads_NFG[:, None] + more).reshape(-1, *more.shape[1:]), axis=0)
    times_GN = [latency(list(loads_NFG[:, :, g].T)) for g, latency in enumerate(problem.latencies)]
    return float(np.max(times_GN, axis=0).min())


@pytest.mark.parametrize("told", [2, 64], ids=["few told apart", "all told apart"])
@pytest.mark.parametrize("split", [Split.EVEN, Split.OPTIMAL, Split.NEAREST])
def test_no_bound_above_the_optimum(split: Split, told: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any whole shares are what `optimal` may do, and no less than what `static` and `nearest` may."""
    rng, raised = np.random.default_rng([told, len(split)]), 0
    for case in range(30):
        if told == 2:
            for name in ("MOST_COPIES", "MOST_LOADS", "MOST_LEVELS"):
                monkeypatch.setattr(copies, name, int(rng.integers(2, 6)))
        problem = replace(random_problem(rng, ("staircase", "roofline", "mixed")[case % 3]), split=split)
        if split is Split.EVEN:
            best = float((all_makespans(problem) @ problem.weights_T).min())
        else:
            best = freely_shared(problem)
        for floor_T in (step_bounds(problem), np.zeros(problem.num_steps)):
            bound, base = copies_bound(problem, floor_T, NEVER), float(floor_T @ problem.weights_T)
            assert base * (1 - 1e-8) <= bound <= best * (1 + 1e-9), (case, bound, best)
            raised += bound > base * (1 + 1e-6)
    assert raised >= 15


def test_any_multipliers_prove_a_bound() -> None:
    rng, proofs = np.random.default_rng(1), 0
    for case in range(60):
        problem = random_problem(rng, ("staircase", "roofline", "mixed")[case % 3])
        floor_T, most = step_bounds(problem), min(problem.spare_slots + 1, int((problem.slots_per_rank > 0).sum()))
        best = float((all_makespans(problem) @ problem.weights_T).min())
        pairs, _ = copies._pairs(problem, floor_T, most)
        if len(pairs.step_N):
            drawn = rng.integers(len(pairs.step_N), size=6)
            price = float(rng.normal() * best / problem.num_slots)
            proof = copies._proved(problem, pairs, drawn, 2 * rng.normal(size=6), price)
            assert floor_T @ problem.weights_T + proof.above_us <= best * (1 + 1e-9)
            proofs += 1
    assert proofs >= 20


def turns(hot: int) -> tuple[Problem, float]:
    """Ranks alike, a step for each expert in which it alone has work; the spare slots are enough for `hot` of them."""
    counts_TE = 12 * np.eye(6, dtype=np.int64)
    problem = Problem.make(counts_TE, [ASSIGNMENTS], [Latency(((line(5, 1),),))] * 6, [1] * (6 - hot) + [2] * hot)
    return problem, hot * (5 + 12 / 2) + (6 - hot) * (5 + 12.0)


@pytest.mark.parametrize("split", Split)
@pytest.mark.parametrize("hot", [1, 3])
def test_exact_where_every_step_asks_for_a_copy_of_another_expert(hot: int, split: Split) -> None:
    """The floors place the copies anew at every step."""
    problem, best = turns(hot)
    problem = replace(problem, split=split)
    floor_T = step_bounds(problem)
    assert floor_T.sum() < 0.9 * best
    assert copies_bound(problem, floor_T, NEVER) == pytest.approx(best, rel=1e-6)
    assert copies_bound(problem, floor_T, NOW) == pytest.approx(float(floor_T.sum()), rel=1e-6)


def test_copies_are_worth_what_their_weight_is() -> None:
    """One spare slot goes to the expert whose step counts most, whatever the unit of weights and times."""
    problem, _ = turns(1)
    for unit in (1e-9, 1.0, 1e200):
        weighed = replace(problem, weights_T=unit * np.array([1.0, 1, 4, 1, 1, 0]))
        assert copies_bound(weighed, step_bounds(weighed), NEVER) == pytest.approx(unit * (4 * 17 + 4 * 11), rel=1e-6)


def test_no_programme_is_longer_than_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, best = turns(3)
    floor_T, limits = step_bounds(problem), []

    def recorded(*args: Any, options: dict[str, float], **more: Any) -> Any:
        limits.append(options["time_limit"])
        return linprog(*args, options=options, **more)

    monkeypatch.setattr(copies, "linprog", recorded)
    assert copies_bound(problem, floor_T, NEVER, seconds=1000) == pytest.approx(best, rel=1e-6)
    assert limits and min(limits) > 0 and max(limits) <= 1000
    for seconds in (0.0, 1e-300):  # none begins, or none ends
        assert copies_bound(problem, floor_T, NEVER, seconds=seconds) == pytest.approx(float(floor_T.sum()), rel=1e-6)
        assert copies.scarce_copies(problem, floor_T, NEVER, seconds=seconds) is None


def test_a_programme_is_left_once_the_flag_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _ = turns(3)
    stop, over = np.zeros(1, np.uint8), threading.Event()

    def endless(*_: object, **__: object) -> SimpleNamespace:
        stop[0] = 1
        over.wait()
        return SimpleNamespace(status=1)

    monkeypatch.setattr(copies, "linprog", endless)
    floor_T = step_bounds(problem)
    assert copies_bound(problem, floor_T, stop) == pytest.approx(float(floor_T.sum()))
    over.set()


@pytest.mark.parametrize("split", ["even", "optimal"])
def test_a_result_states_it(split: str) -> None:
    profile = timed(range(6), lambda n, _: 5 + n, (0, 100))
    traces = Traces(counts=np.asarray(turns(1)[0].counts_TE)[:, None])
    result = gemopt.solve(profile, traces, slots_per_rank=[1, 1, 1, 1, 1, 2], split=split, patience=2)
    assert result.bound_us == pytest.approx(5 * 17 + 11, rel=1e-6)
    assert result.objective_us == pytest.approx(5 * 17 + 11)


def test_scarce_copies_are_those_that_reach_the_bound() -> None:
    """Experts hot in turn: each spare slot to another one. Where slots suffice for the floors it says nothing."""
    problem = replace(turns(3)[0], weights_T=np.array([1.0, 5, 1, 5, 5, 1]))
    found = copies.scarce_copies(problem, step_bounds(problem), NEVER)
    assert found is not None and found.tolist() == [1, 2, 1, 2, 2, 1]
    assert copies.scarce_copies(problem, step_bounds(problem), NOW) is None
    assert copies.scarce_copies(problem, np.full(6, 17.0), NEVER) is None
    rng = np.random.default_rng(4)
    for case in range(40):
        problem = random_problem(rng, ("staircase", "roofline", "mixed")[case % 3])
        found = copies.scarce_copies(problem, np.zeros(problem.num_steps), NEVER)
        if found is not None:
            assert found.min() >= 1 and found.sum() <= problem.num_slots
            assert found.max() <= (problem.slots_per_rank > 0).sum()


def bursts(seed: int, steps: int, experts: int, ranks: int, slots: int) -> Problem:
    """Experts with bursts of their own, more than there are spare slots for."""
    rng = np.random.default_rng(seed)
    bursts_TE = rng.random((steps, experts)) < 0.03
    counts_TE = rng.poisson(np.where(bursts_TE, rng.uniform(40, 200, experts), rng.uniform(1, 20, experts)))
    return Problem.make(counts_TE, [ASSIGNMENTS], [Latency(((line(20, 1),),))] * ranks, [slots] * ranks)


def descended(problem: Problem) -> float:
    found = get("local-search").solve(problem, Options(deadline=np.inf, patience=0), None)
    assert found.row is not None
    return objective(problem, found.row)


def test_the_search_is_better_for_starting_with_scarce_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [bursts(seed, 60, 32, 16, 3) for seed in range(6)]
    total = sum(map(descended, problems))
    monkeypatch.setattr(local_search, "_with_scarce_copies", lambda *_: None)
    assert total < sum(map(descended, problems))


def test_the_search_starts_full_of_copies_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that copies of the bound that lead to nothing cost little."""
    problems = [bursts(seed, 20, 16, 8, 4) for seed in range(12)]
    monkeypatch.setattr(local_search, "_with_scarce_copies", lambda *_: None)
    usual = sum(map(descended, problems))
    monkeypatch.setattr(local_search, "_with_scarce_copies", lambda problem, *_: lpt_row(problem))
    assert sum(map(descended, problems)) == pytest.approx(usual, rel=0.005)

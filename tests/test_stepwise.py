"""Contents priced step by step: a bound whatever the multipliers, the least of all contents, and its certificate."""

from __future__ import annotations

import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from brute import optimum
from safetensors.numpy import load_file
from test_contents import NEVER, one
from test_verify import profile, traces
from test_verify_copies import LAYER, Duals, case_of

from gemopt.bounds import step_bounds
from gemopt.certificate import UNIT, Certificate, Proof, duals_path
from gemopt.certify import _with_columns
from gemopt.exceptions import InputError
from gemopt.latency import ASSIGNMENTS, Curve, Latency, line, tiles
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solve import solve
from gemopt.solvers.base import Outcome
from gemopt.solvers.exact.column_space import Proven
from gemopt.solvers.exact.contents import ContentsSearch
from gemopt.solvers.exact.step_space import Stepwise
from gemopt.solvers.exact.stepwise import Pricing, StepwiseSearch
from gemopt.solving import turns
from gemopt.solving.layers import Layer
from gemopt.verify import columns as verify_columns
from gemopt.verify import verify
from gemopt.verify.scan import least_content

FALLS = Latency(((Curve(np.array([0.0, 30.0, 31.0, 90.0]), np.array([5.0, 40.0, 20.0, 80.0]), 1.0),),))


def plain(pricing: Pricing) -> float:
    """The bound, content by content."""
    space, problem = pricing.space, pricing.space.problem
    total = float(problem.weights_T @ space.floor_T) + pricing.pi_E.sum()
    for g in np.flatnonzero(problem.slots_per_rank):
        total += min(
            float(
                pricing.mu_ET[list(some)].sum(axis=0)
                @ (problem.latencies[g]([problem.counts_TE[:, list(some)].sum(axis=1)]) - space.floor_T).clip(0)
            )
            - pricing.pi_E[list(some)].sum()
            for some in combinations(range(problem.num_experts), int(problem.slots_per_rank[g]))
        )
    return total


def unlike(experts: int, slots: list[int]) -> Problem:
    """Ranks that are no multiples of one another, one of which falls."""
    counts = np.random.default_rng(experts).poisson(12, (9, experts))
    stairs = one(4, [2, 1, 1], tile=16).latencies[0]
    return Problem.make(counts, (ASSIGNMENTS,), [stairs, FALLS, stairs.times(1.3)], slots)


@pytest.mark.parametrize("slots", [[2, 2, 2], [1, 2, 4], [0, 3, 2], [1, 1, 1]])
@pytest.mark.parametrize("alike", [False, True])
def test_the_least_of_all_contents_is_the_bound(slots: list[int], alike: bool) -> None:
    experts, rng = sum(slots), np.random.default_rng(0)
    problem = one(experts, slots, tile=16) if alike else unlike(experts, slots)
    best_us, space = optimum(problem), Stepwise.of(problem, step_bounds(problem))
    assert space is not None
    for size in (0.01, 0.3, 3.0):
        mu_ET = rng.random((experts, problem.num_steps)) ** 4 * size
        pricing = Pricing(space, mu_ET, rng.normal(size=experts) * best_us / experts * size)
        if size == 0.3:
            assert pricing.improve(space.held(np.arange(experts)), NEVER) > 0
            assert pricing.bound_us >= plain(pricing) - 1e-4 * best_us
        assert pricing.look(NEVER)
        assert pricing.bound_us <= min(plain(pricing), best_us)
        assert pricing.bound_us == pytest.approx(plain(pricing), abs=3e-4 * best_us)
        ids = pricing.ids
        assert len(set(ids.tolist())) == len(ids)
        loads_T = problem.counts_TE[:, space.members(ids[:1])[0, : space.size_K[0]]].sum(axis=1)
        rank = space.groups[0][0]
        expected_T = (problem.latencies[rank]([loads_T]) - space.floor_T).clip(0)
        assert space.parts(ids[:1], np.stack([space.floor_T, space.floor_T + 1e6]), 2.0)[0] == pytest.approx(
            2 * expected_T, rel=1e-5, abs=1e-4
        )


def test_what_cannot_be_priced_is_left_to_pairs() -> None:
    two = Problem.make([[1, 2, 3, 4]], (ASSIGNMENTS, tiles(4)), [Latency(((line(1, 1), line(0, 2)),))] * 2)
    assert Stepwise.of(two, step_bounds(two)) is None
    assert StepwiseSearch(two, step_bounds(two), np.inf, np.arange(4)).ended
    idle = Problem.make([[1, 2, 3, 4]], (ASSIGNMENTS,), [Latency(((line(1, 1),),)), Latency(((line(0, 0),),))])
    assert Stepwise.of(idle, step_bounds(idle)) is None


def test_the_search_rises_to_a_bound_and_ends_when_there_is_no_time_for_a_look() -> None:
    problem = one(8, [3, 3, 2], tile=16)
    floor_T, best_us = step_bounds(problem), optimum(problem)
    search = StepwiseSearch(problem, floor_T, best_us, np.arange(8))
    found = search.run(NEVER)
    assert found is not None and search.ended and search.risen
    assert float(problem.weights_T @ floor_T) < found.bound_us <= best_us * (1 + 1e-9)
    late = StepwiseSearch(problem, floor_T, best_us, np.arange(8), deadline=0.0)
    assert late.run(NEVER) is None and late.ended and not late.risen
    assert not StepwiseSearch(problem, floor_T, best_us, np.arange(8)).run(np.ones(1, np.uint8))


def test_it_goes_on_where_the_first_multipliers_are_above_the_floors() -> None:
    """These gain nothing at first: that is no end."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.choice([2, 20], (12, 6)))
    problem = Problem.make(counts, (ASSIGNMENTS,), [Latency(((line(0, speed),),)) for speed in (1.0, 1.1, 1.2)], 2)
    floor_T, best_us = step_bounds(problem), optimum(problem)
    search = StepwiseSearch(problem, floor_T, best_us, np.arange(6))
    assert search.space is not None
    first = Pricing(search.space, search.master.multipliers()[0][0], np.zeros(6))
    assert first.look(NEVER) and first.bound_us > search.base + 0.2 * (best_us - search.base)
    assert search.run(NEVER) is not None and search.bound_us > search.base + 0.8 * (best_us - search.base)


def test_the_verifiers_least_content_in_whole_numbers() -> None:
    rng = np.random.default_rng(0)
    for experts, size, longest in ((1, 1, 10**6), (6, 3, 10**9), (7, 2, 10**13), (5, 5, 10**3)):
        loads_TE = rng.integers(0, 20, (70, experts))
        times_N = rng.integers(0, longest, 20 * experts + 1)
        floor_T, mu_ET = rng.integers(0, longest, 70), rng.integers(0, UNIT // experts, (experts, 70))
        price_E = rng.integers(-(10**9), 10**9, experts)
        exact = min(
            (sum(int(m) * max(0, int(x)) for m, x in zip(mu_ET[list(some)].sum(axis=0), over_T, strict=True)) >> 12)
            - int(price_E[list(some)].sum())
            for some in combinations(range(experts), size)
            for over_T in [times_N[loads_TE[:, list(some)].sum(axis=1)] - floor_T]
        )
        found = least_content(loads_TE, times_N, floor_T, mu_ET, price_E, size, 12)
        assert exact - 70 * longest * 2**12 * 2e-5 - 1 <= found <= exact


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stepwise") / "cert.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "LEAST_S", (0.0, 0.0))
        patch.setattr(verify_columns, "MOST_COLUMNS", 0)
        solve(
            profile(tile=16), traces(experts=6), solver="local-search", patience=3, time_limit=60, certificate=path,
            cost="staircase",
        )  # fmt: skip
    return path


def test_its_certificate_is_checked_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, counts = profile(tile=16), traces(experts=6)
    stated, duals = Certificate.load(made), load_file(duals_path(made))
    assert {layer.proof for layer in stated.layers} == {Proof.COLUMNS} and duals["share.0"].shape[0] == 1
    monkeypatch.setattr(verify_columns, "MOST_COLUMNS", 0)
    found = verify(made, measured, counts)
    assert found.checked_us == pytest.approx(stated.bound_us, rel=1e-8)
    assert {layer.note for layer in found.layers} == {"contents of ranks priced again"}
    monkeypatch.setattr(verify_columns, "MOST_SCANNED", 0)
    with pytest.raises(InputError, match="contents of ranks"):
        verify(made, measured, counts)


def test_an_edited_price_is_found(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_columns, "MOST_COLUMNS", 0)
    stated, duals = Certificate.load(made), load_file(duals_path(made))
    moved = duals["price.0"].copy()
    moved[0] += 10**9
    edited = tmp_path / "c.json"
    stated.write(edited, duals | {"price.0": moved})
    with pytest.raises(InputError, match="from the multipliers"):
        verify(edited, profile(tile=16), traces(experts=6))


def test_prices_too_large_for_a_certificate_are_cut() -> None:
    problem = one(6, [2, 2, 2], tile=16)
    known = Proven(0.0, step_bounds(problem)[None], np.zeros((1, 6, problem.num_steps)), np.full(6, 1e9), np.zeros(0))
    duals: Duals = {}
    proof = _with_columns(case_of(problem), LAYER.model_copy(update={"objective_us": 1e9}), known, duals)
    assert proof.columns_us is not None and proof.columns_us <= optimum(problem)
    assert (duals["price.0"] == verify_columns.LARGEST_PRICE).all()


def test_where_contents_are_few_the_bound_needs_little_time_and_others_lend_it() -> None:
    few = Problem.make(np.ones((1000, 32), np.int64), (ASSIGNMENTS,), [Latency(((line(1, 1),),))] * 8, 4)
    many = Problem.make(np.ones((1000, 32), np.int64), (ASSIGNMENTS,), [Latency(((line(1, 1),),))] * 4, 8)
    assert turns.least_s(few) == turns.LEAST_S[0] < turns.least_s(many) == turns.LEAST_S[1]
    layer, now = Layer(few, None, 0, floor_T=np.ones(1000)), time.monotonic()
    layer.bounded_steps = 1000
    share, end = now + 0.5 * turns.LEAST_S[0], now + 100.0
    assert not turns.priced(layer, share - now)
    assert share < turns.lent(layer, share, end) <= now + turns.LENT * (share - now) + 1
    assert turns.lent(layer, share, share + 0.1) == share, "nobody has time to lend"
    assert turns.lent(layer, end, end) == end
    layer.problem = many
    assert turns.lent(layer, share, end) == share, "far too little for as many contents"


def test_pairs_take_over_where_a_look_takes_too_long() -> None:
    problem = one(8, [3, 3, 2], tile=16)
    layer = Layer(problem, None, 0, Outcome(np.arange(8), StoppedBy.ITERATIONS), floor_T=step_bounds(problem))
    late, search = (turns.bounding(layer, optimum(problem), deadline) for deadline in (0.0, np.inf))
    assert late.run(NEVER) is None and isinstance(turns.instead(layer, late), ContentsSearch)
    assert search.run(NEVER) is not None and turns.instead(layer, search) is search

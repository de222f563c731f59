"""The walk under static weights and nearest copies, against `evaluate` and all placements; weights kept by answers."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, permutations, product

import numpy as np
import pytest
from timed import timed

import gemopt
from gemopt.evaluate import check, evaluate, objective
from gemopt.latency import ACTIVE, ASSIGNMENTS, Curve, Latency, line
from gemopt.layer_rules import Demand, LayerRules
from gemopt.placement import EMPTY, Split
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers import get
from gemopt.solvers.base import DEFAULT_PATIENCE, Options, Outcome, incumbent
from gemopt.solvers.search.packing import filled, lpt_row
from gemopt.solvers.search.parts_walk import PartsWalk
from gemopt.solving import answer
from gemopt.solving.layers import Layer, on_this_clock
from gemopt.solving.schedule import Run
from gemopt.splits import even_weights
from gemopt.splits.weights import MOST_KNOWN, carried_weights, remember_weights, static_weights, suggest_weights
from gemopt.traces import Traces


def lines(*slopes: float) -> list[Latency]:
    return [Latency(((line(5.0, slope),),)) for slope in slopes]


def stairs(*slopes: float) -> list[Latency]:
    ends = np.arange(0.0, 400.0, 8.0)
    loads = np.unique(np.concatenate([ends, ends[:-1] + 1]))
    return [Latency(((Curve(loads, (4 + 3 * np.ceil(loads / 8)) * slope, slope),),)) for slope in slopes]


def roofs(*slopes: float) -> list[Latency]:
    return [Latency(((line(9.0 * s, 0.0), line(0.0, 3.0 * s)), (line(2.0 * s, 0.4 * s), line(0.0, s)))) for s in slopes]


KINDS = {"lines": (lines, (ASSIGNMENTS,)), "stairs": (stairs, (ASSIGNMENTS,)), "roofs": (roofs, (ASSIGNMENTS, ACTIVE))}
SLOPES, SLOTS = (1.0, 1.4, 0.8, 1.1), [2, 3, 2, 2]


def layer(kind: str, split: Split, seed: int, steps: int = 90) -> Problem:
    """Six experts on four ranks and two nodes, with three spare slots; with `seed` odd senders are recorded."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.7, 14.0, 6), (steps, 6))
    latencies, features = KINDS[kind]
    senders = None
    if split is Split.NEAREST and seed % 2:
        senders = rng.multinomial(counts, [0.4, 0.3, 0.2, 0.1]).transpose(0, 2, 1).astype(np.int32)
    return Problem.make(
        counts, features, latencies(*SLOPES), SLOTS, node_of_rank=[0, 0, 1, 1], split=split, senders_TGE=senders
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", [Split.STATIC, Split.NEAREST])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("demand", ["none", "full", "apart", "closed"])
def test_where_a_walk_stands_costs_what_evaluate_says(kind: str, split: Split, seed: int, demand: str) -> None:
    """However many changes it went through, also in the best row."""
    problem = layer(kind, split, seed)
    closed_GE = np.zeros((4, 6), bool)
    closed_GE[0, :3] = True
    demands = {
        "apart": Demand("apart", "", apart_E=np.arange(6) % 3 == 0),
        "closed": Demand("closed", "", closed_GE=closed_GE),
    }
    if demand in demands:
        problem = replace(problem, rules=LayerRules((demands[demand],), 4, 6))
    problem = replace(problem, full=demand == "full")
    row = lpt_row(problem)
    row = filled(problem, row) if problem.full else row
    walk = PartsWalk(problem, row, np.random.default_rng(seed))
    before = walk.best_us
    for hot in (0.0, 0.02, 0.3):
        walk.hot = hot
        walk.walk(1024, lambda: False)
        held, weights_P = walk.state.content, walk.sharing.end_P - walk.sharing.begin_P
        check(problem, held)
        static = split is Split.STATIC
        assert objective(problem, held, weights_P if static else None) == pytest.approx(walk.values[0], rel=1e-6)
        check(problem, walk.best)
        assert objective(problem, walk.best, walk.weights_P if static else None) == pytest.approx(
            walk.best_us, rel=1e-6
        )
    assert walk.best_us <= before


@pytest.mark.parametrize("seed", range(2))
def test_nearest_copies_take_counts_that_no_table_holds(seed: int) -> None:
    """They are searched as before there was a compiled walk, which looks counts up."""
    problem = layer("lines", Split.NEAREST, seed)
    counts, senders = problem.counts_TE.copy(), problem.senders_TGE
    counts[0, 0] += 5_000_000
    if senders is not None:
        senders = senders.copy()
        senders[0, 0, 0] += 5_000_000
    problem = replace(problem, counts_TE=counts, senders_TGE=senders)
    outcome = get("local-search").solve(problem, Options(deadline=np.inf, patience=2), None)
    assert outcome.row is not None and outcome.reached
    assert objective(problem, outcome.row) == outcome.history[-1].objective_us


def test_a_walk_that_begins_elsewhere_keeps_the_weights_of_its_best_row() -> None:
    """As where a row is better by the latencies, and no better by tables between whose entries they are guessed."""
    problem = layer("lines", Split.STATIC, 0)
    walk = PartsWalk(problem, lpt_row(problem), np.random.default_rng(0))
    walk.walk(1 << 12, lambda: False)
    best, best_us = walk.best, walk.best_us
    walk.restart(np.array([0, 1, 2, 3, 4, 5, 0, 1, 2]))
    assert walk.best is best and walk.best_us == best_us
    assert objective(problem, best, walk.weights_P) == pytest.approx(best_us, rel=1e-6)


def every_row(problem: Problem) -> Iterator[np.ndarray]:
    held = [
        [
            [*each, *[EMPTY] * (slots - n)]
            for n in range(slots + 1)
            for each in combinations(range(problem.num_experts), n)
        ]
        for slots in problem.slots_per_rank.tolist()
    ]
    for parts in product(*held):
        row = np.array([e for part in parts for e in part])
        if len(np.unique(row[row != EMPTY])) == problem.num_experts:
            yield row


def least_static(problem: Problem) -> float:
    """Over all placements with at most one copy and all weights that differ in any share."""
    best = np.inf
    for row in every_row(problem):
        weights_P = even_weights(row, problem.num_experts)
        pair = np.flatnonzero((row != EMPTY) & (weights_P < 1))
        if not len(pair):
            best = min(best, objective(problem, row, weights_P))
            continue
        counts_T = problem.counts_TE[:, row[pair[0]]]
        at = np.unique(np.concatenate([[0.0, 1.0], *((np.arange(n) + 0.5) / n for n in counts_T.tolist() if n)]))
        for place in (at[1:] + at[:-1]) / 2:
            weights_P[pair] = place, 1 - place
            best = min(best, objective(problem, row, weights_P))
    return best


def test_static_weights_are_searched_together_with_the_placement() -> None:
    missed = 0
    for seed in range(18):
        rng = np.random.default_rng(seed)
        latencies, features = list(KINDS.values())[seed % 3]
        counts = rng.poisson(rng.gamma(1.0, 9.0, 4), (4, 4))
        slots = [[2, 3], [2, 2, 1], [3, 1, 1]][seed // 3 % 3]
        slopes = rng.uniform(0.7, 1.4, len(slots))
        problem = Problem.make(counts, features, latencies(*slopes), slots, split=Split.STATIC)
        outcome = get("local-search").solve(problem, Options(deadline=np.inf, patience=DEFAULT_PATIENCE), None)
        assert outcome.row is not None
        found = objective(problem, outcome.row, outcome.weights_P)
        assert found == pytest.approx(outcome.history[-1].objective_us, rel=1e-12)
        missed += found > least_static(problem) * (1 + 1e-6)
    assert missed <= 1, "5 where weights were chosen last"


def test_weights_follow_slots_and_ranks_that_change_places() -> None:
    problem = Problem.make([[300, 9, 8, 40]] * 3, (ASSIGNMENTS,), lines(1, 1, 2), 2, split=Split.STATIC)
    row, weights_P = np.array([0, 1, 0, 2, 3, EMPTY]), np.array([0.7, 1, 0.3, 1, 1, 0])
    assert carried_weights(problem, row, weights_P, row).tolist() == weights_P.tolist()
    moved = carried_weights(problem, row, weights_P, np.array([2, 0, 1, 0, EMPTY, 3]))
    assert moved is not None and moved.tolist() == [1, 0.3, 1, 0.7, 0, 1]
    assert carried_weights(problem, row, weights_P, np.array([0, 1, 3, EMPTY, 0, 2])) is None, "not as fast"
    assert carried_weights(problem, row, weights_P, np.array([0, 1, 2, 0, 0, 3])) is None


def test_weights_are_kept_where_they_cost_less() -> None:
    problem = Problem.make([[300, 9, 8]] * 3, (ASSIGNMENTS,), lines(1.0, 2.0, 0.9), 2, split=Split.STATIC)
    row = np.array([0, 1, 0, 2, EMPTY, EMPTY])
    remember_weights(problem, row, np.array([0.01, 1, 0.99, 1, 0, 0]))
    assert static_weights(problem, row).tolist() == even_weights(row, 3).tolist()
    remember_weights(problem, row, np.array([0.66, 1, 0.34, 1, 0, 0]))
    assert static_weights(problem, row)[0] == 0.66
    remember_weights(problem, row, np.array([0.6, 1, 0.4, 1, 0, 0]))
    assert static_weights(problem, row)[0] == 0.66
    assert static_weights(problem.under(full=False), row)[0] == 0.66
    assert static_weights(replace(problem), row)[0] != 0.66


def test_weights_of_rows_that_are_asked_for_again_are_kept_longest() -> None:
    """An incumbent's were chosen anew, and worse, once 64 other rows were looked at."""
    problem = Problem.make([[300, 9, 8, 40]] * 3, (ASSIGNMENTS,), lines(1.0, 2.0, 0.9), 4, split=Split.STATIC)
    row = np.array([0, 1, EMPTY, EMPTY, 0, 2, EMPTY, EMPTY, 3, EMPTY, EMPTY, EMPTY])
    remember_weights(problem, row, np.array([0.66, 1, 0, 0, 0.34, 1, 0, 0, 1, 0, 0, 0]))
    others = [np.array(each) for each in set(permutations([0, 1, 2, 3, EMPTY, EMPTY]))]
    for other in others[: 2 * MOST_KNOWN]:
        static_weights(problem, np.concatenate([other, np.full(6, EMPTY)]))
        assert static_weights(problem, row)[0] == 0.66
    assert len(problem.weighed) == MOST_KNOWN


@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_answer_has_the_weights_that_were_found_with_its_row(elsewhere: bool) -> None:
    """Though descent from even ones would end at others, as another machine would without them."""
    for seed in range(12):
        problem = layer("stairs", Split.STATIC, seed, steps=12)
        outcome = get("local-search").solve(problem, Options(deadline=np.inf, patience=2), None)
        assert outcome.row is not None and outcome.weights_P is not None
        value = outcome.history[-1].objective_us
        if objective(replace(problem), outcome.row) > value * (1 + 1e-6):
            break
    else:
        pytest.fail("descent finds them all")
    if elsewhere:
        outcome, problem = pickle.loads(pickle.dumps((outcome, problem)))
        on_this_clock(Layer(problem, None, 0, outcome), 0.0)
    else:
        problem.weighed.clear()
    (found_P,) = answer._weights(Run(get("local-search"), [Layer(problem, None, 0, outcome)], 0.0, 1.0), [outcome.row])
    assert objective(problem, outcome.row, found_P) == pytest.approx(value, rel=1e-12)


def test_weights_go_from_one_search_of_a_layer_to_another() -> None:
    problem, row = layer("lines", Split.STATIC, 0), np.array([0, 1, 2, 3, 4, 5, 0, 1, EMPTY])
    mine, theirs = (Outcome(row, StoppedBy.ITERATIONS, history=[incumbent(us)]) for us in (9.0, 7.0))
    theirs.weights_P = even_weights(row, 6)
    one = Layer(problem, None, 0, mine)
    one.take(Layer(problem, None, 1, theirs))
    assert one.outcome is not None and one.outcome.weights_P is theirs.weights_P


def test_a_static_placement_to_start_from_keeps_its_weights() -> None:
    """Descent from even weights would end at others that cost more; where it finds better ones these are taken."""
    profile, steps = timed(SLOPES, lambda n, slope: (4 + 3 * np.ceil(n / 8)) * slope, range(0, 400, 4)), 12
    traces = Traces(counts=layer("stairs", Split.STATIC, 2, steps).counts_TE[:, None])
    options = {"slots_per_rank": SLOTS, "split": "static", "solver": "local-search", "threads": 1}
    start = gemopt.solve(profile, traces, patience=20, **options)
    for patience, limit in ((0, 60.0), (1, 60.0), (0, 1e-9)):
        again = gemopt.solve(
            profile, traces, warm_start=start.placement, patience=patience, time_limit=limit, **options
        )
        assert again.objective_us is not None and start.objective_us is not None
        assert again.objective_us <= start.objective_us * (1 + 1e-12)
    assert start.placement is not None and start.placement.split_weights is not None
    poor = start.placement.changed(split_weights=[even_weights(row, 6) for row in start.placement.physical_to_logical])
    better = gemopt.solve(profile, traces, warm_start=poor, patience=0, **options)
    assert better.objective_us is not None
    assert better.objective_us <= evaluate(poor, profile, traces).objective_us


@pytest.mark.parametrize("seed", [4, 9, 10])
def test_a_static_placement_in_force_keeps_its_weights(seed: int) -> None:
    """Descent from even ones made staying where all is dearer than what is in force, by up to 2 %."""
    profile, steps = timed(SLOPES, lambda n, slope: (4 + 3 * np.ceil(n / 8)) * slope, range(0, 400, 4)), 12
    counts = [layer("stairs", Split.STATIC, each, steps).counts_TE for each in (seed, seed + 50)]
    traces, options = Traces(counts=np.stack(counts, 1)), {"split": "static", "solver": "local-search", "threads": 1}
    start = gemopt.solve(profile, traces, patience=20, slots_per_rank=SLOTS, **options)
    limits = [{"max_moves": 0}, {"max_moves": 2}, {"move_price": 1e4}, {"max_bytes_per_rank": 0, "expert_bytes": 1}]
    for limit in [*({"patience": 0, **each} for each in limits), {"max_moves": 0, "time_limit": 1e-9}]:
        again = gemopt.solve(profile, traces, current=start.placement, **limit, **options)
        assert again.objective_us is not None and start.objective_us is not None
        assert again.objective_us <= start.objective_us * (1 + 1e-12)


def test_weights_that_are_suggested_are_held_against_those_of_descent() -> None:
    problem = Problem.make([[300, 9, 8]] * 3, (ASSIGNMENTS,), lines(1.0, 2.0, 0.9), 2, split=Split.STATIC)
    row = np.array([0, 1, 0, 2, EMPTY, EMPTY])
    best = objective(problem, row)
    problem = replace(problem)
    suggest_weights(problem, row, np.array([0.01, 1, 0.99, 1, 0, 0]))
    assert objective(problem, row) == best

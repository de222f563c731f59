"""Links and a placement in force: searches, exact solvers and `solve` against all placements within the limits."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from brute_links import pair_totals, placements, random_links
from cli_inputs import profile
from test_joint import rows_with_copies

from gemopt.evaluate import evaluate, linked_total
from gemopt.exceptions import UnsupportedError
from gemopt.latency import ASSIGNMENTS, Latency, line
from gemopt.links import Links
from gemopt.migration import count_moves, held
from gemopt.moves import Budget, Moves
from gemopt.placement import Placement, Split
from gemopt.problem import Problem
from gemopt.result import Result, Status, StoppedBy
from gemopt.solve import solve
from gemopt.solvers.base import Linked, LinkedSolver, Options, Row, within_budget
from gemopt.solvers.exact.cpsat import CpSat
from gemopt.solvers.exact.milp import Milp
from gemopt.solvers.search.linked import search_linked

pytestmark = pytest.mark.usefixtures("quick_bounds")

SLOTS = np.array([2, 1, 1])
SPARE = {False: np.array([2, 2, 1]), True: SLOTS}
"""Slots of three experts, fewer where layers are coupled: there all pairs of rows are weighed, one by one."""


def into_ranks(home: Row, row: Row, slots: np.ndarray) -> list[int]:
    """Experts that each rank did not hold before: counted from the definition."""
    parts = [np.split(each, np.cumsum(slots)[:-1]) for each in (home, row)]
    return [len(set(now.tolist()) - set(then.tolist()) - {-1}) for then, now in zip(*parts, strict=True)]


def keeps(into: np.ndarray, limits: Moves | Budget) -> np.ndarray:
    """Which of many placements move no more than is allowed; into: [..., G]."""
    most = np.inf if limits.most is None else limits.most
    return (into.sum(axis=-1) <= most) & (into <= (np.inf if limits.most_into_G is None else limits.most_into_G)).all(
        -1
    )


class Case:
    """Two layers, a placement in force, a price, limits of each layer and of both; all placements within them."""

    def __init__(self, seed: int, *, spare: bool = False) -> None:
        experts = 3 if spare else 4
        self.links = random_links(seed, experts=experts, layers=2, steps=3)
        self.rng, self.slots = np.random.default_rng(seed + 10**6), SPARE[self.links.coupled] if spare else SLOTS
        every = rows_with_copies(3, self.slots) if spare else placements(4, self.slots)
        self.home = [every[self.rng.integers(len(every))] for _ in range(2)]
        latencies = [Latency(((line(self.rng.uniform(0, 9), self.rng.uniform(0, 2)),),)) for _ in self.slots]
        most = None if self.rng.random() < 0.5 else int(self.rng.integers(0, 4))
        into = None if self.rng.random() < 0.7 else self.rng.integers(0, 3, 3)
        price = float(self.rng.choice([0.0, 0.3, 3.0]))
        self.problems = [
            Problem.make(counts, (ASSIGNMENTS,), latencies, self.slots).with_moves(
                Moves.make(held(home, self.slots, experts), price, most, into)
            )
            for counts, home in zip(self.links.traces.counts.swapaxes(0, 1), self.home, strict=True)
        ]
        self.budget = Budget(
            None if self.rng.random() < 0.4 else int(self.rng.integers(0, 6)),
            None if self.rng.random() < 0.6 else self.rng.integers(0, 4, 3),
        )
        first, second = (np.array([into_ranks(home, row, self.slots) for row in every]) for home in self.home)
        allowed = np.argwhere(self.allowed(first[:, None], second[None]))
        totals = pair_totals(self.problems, every, self.links, allowed)
        self.best, self.start = min(totals), [every[i] for i in allowed[self.rng.integers(len(allowed))]]

    def allowed(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Whether moves of the two layers keep all limits; [..., G] each."""
        mine, other = (problem.moves for problem in self.problems)
        assert mine is not None and other is not None
        return keeps(first, mine) & keeps(second, other) & keeps(first + second, self.budget)

    def checks(self, found: Linked) -> None:
        into = (np.array(into_ranks(*each, self.slots)) for each in zip(self.home, found.rows, strict=True))
        assert self.allowed(*into) and within_budget(self.problems, found.rows, self.budget)
        total = linked_total(self.problems, found.rows, self.links)
        assert found.total_us == pytest.approx(total) and found.total_us >= self.best * (1 - 1e-9)
        assert found.total_us <= linked_total(self.problems, self.home, self.links) * (1 + 1e-12)
        assert found.bound_us <= self.best * (1 + 1e-9)


@pytest.mark.parametrize("spare", [False, True])
def test_search_keeps_limits_and_finds_the_best_of_all_placements_nearly_always(spare: bool) -> None:
    cases = [Case(seed, spare=spare) for seed in range(12)]
    for patience, least in ((2 if spare else 5, 11), (0, 6)):
        met = 0
        for case in cases:
            options = Options.lasting(300, patience=patience, budget=case.budget)
            found = search_linked(case.problems, case.links, case.start, options)
            case.checks(found)
            met += found.total_us <= case.best * (1 + 1e-6)
        assert met >= least, (patience, met)


def proven(solver: LinkedSolver, case: Case) -> bool:
    """Checks one instance; whether all that is stated is exact there."""
    found = solver.solve_linked(
        case.problems, case.links, case.start, replace(Options.lasting(600), budget=case.budget)
    )
    case.checks(found)
    convex = all(curve.hull.x.tolist() == curve.x.tolist() for curve in case.links.topology.ports.curves)
    if convex:
        assert found.total_us == pytest.approx(case.best) and found.bound_us == pytest.approx(case.best, rel=1e-5)
    return convex


def test_cpsat_proves_the_best_within_the_limits() -> None:
    assert sum(proven(CpSat(), Case(seed)) for seed in (*range(100, 104), 129, 137, 138)) >= 6
    assert sum(proven(CpSat(), Case(seed, spare=True)) for seed in (100, 102)) >= 1


def test_milp_proves_the_best_within_the_limits() -> None:
    assert sum(proven(Milp("highs"), Case(seed)) for seed in (101, 104)) >= 1


ASKED: list[dict[str, Any]] = [
    {},
    {"max_moves": 0},
    {"max_moves": 3},
    {"max_moves": 4, "max_moves_per_layer": 2},
    {"max_moves_per_layer": 2},
    {"move_price": 2.0},
    {"move_price": 1.0, "horizon_steps": 12, "max_moves": 3},
    {"expert_bytes": 100, "max_bytes_per_rank": 199},
    {"expert_bytes": 100, "max_bytes_per_rank": 200, "bandwidth": 0.01, "max_moves": 4},
]


Every = list[tuple[float, np.ndarray]]
"""Of all placements the objective, as `evaluate` gives it, and the moves [L, G]."""


def every_placement(links: Links, home: list[Row], slots: np.ndarray) -> Every:
    found, held_by = [], np.cumsum(slots)[:-1]
    for pair in product(placements(4, slots), repeat=2):
        placement = Placement(physical_to_logical=pair, slots_per_rank=slots, num_experts=4)
        parts = [
            zip(np.split(row, held_by), np.split(then, held_by), strict=True)
            for row, then in zip(pair, home, strict=True)
        ]
        into = [[len(set(now.tolist()) - set(then.tolist())) for now, then in layer] for layer in parts]
        wired = {"topology": links.topology, "exchange": links.exchange}
        found.append(
            (evaluate(placement, profile(3), links.traces, cost="staircase", **wired).objective_us, np.array(into))
        )
    return found


def best_within(every: Every, steps: int, asked: dict[str, Any]) -> float:
    """Smallest objective and price of all placements within the limits."""
    price = asked.get("move_price", 1e-3 * 100 / 0.01 if "bandwidth" in asked else 0.0)
    price *= steps / asked.get("horizon_steps", steps)
    most = asked.get("max_bytes_per_rank", 1e9) // asked.get("expert_bytes", 1)
    return min(
        us + price * into_LG.sum()
        for us, into_LG in every
        if into_LG.sum() <= asked.get("max_moves", 99)
        and into_LG.sum(axis=1).max() <= asked.get("max_moves_per_layer", 99)
        and into_LG.sum(axis=0).max() <= most
    )


def agrees(result: Result, links: Links, current: Placement, asked: dict[str, Any]) -> None:
    """All that a result says of moves and links is what `evaluate` and counting give."""
    wired = {"cost": "staircase", "topology": links.topology, "exchange": links.exchange}
    assert result.placement is not None and result.moves is not None and result.links is not None
    now, before = (evaluate(each, profile(3), links.traces, **wired) for each in (result.placement, current))
    slots, rows = (
        current.slots_per_rank,
        zip(current.physical_to_logical, result.placement.physical_to_logical, strict=True),
    )
    moves, into_G = [count_moves(a, b, slots) for a, b in rows], np.array(result.moves.into_rank)
    assert result.objective_us == pytest.approx(now.objective_us)
    assert result.links.exposed_us == pytest.approx(now.objective_us - now.compute_us)
    assert result.moves.per_layer == moves and into_G.sum() == result.moves.moves == sum(moves)
    assert result.moves.makespan_before_us == pytest.approx(before.objective_us)
    assert result.moves.gain_us == pytest.approx(before.objective_us - now.objective_us)
    assert result.total_us == pytest.approx(result.objective_us + result.moves.price_us * sum(moves))
    assert result.history[-1].objective_us == pytest.approx(result.total_us)
    assert sum(moves) <= asked.get("max_moves", 99) and max(moves) <= asked.get("max_moves_per_layer", 99)
    assert (into_G * asked.get("expert_bytes", 0) <= asked.get("max_bytes_per_rank", 0)).all()


@pytest.mark.parametrize(("solver", "seeds"), [("auto", (7, 11)), ("local-search", (15,))])
def test_solve_weighs_links_against_moves(solver: str, seeds: tuple[int, ...]) -> None:
    slots, met, tried = [2, 1, 1], 0, 0
    for seed in seeds:
        links, rng = random_links(seed, layers=2), np.random.default_rng(seed)
        home = [rng.permutation(4) for _ in range(2)]
        current = Placement(physical_to_logical=home, slots_per_rank=slots, num_experts=4)
        every = every_placement(links, home, np.array(slots))
        doing_nothing = next(us for us, into_LG in every if not into_LG.any())
        for asked in ASKED:
            best = best_within(every, links.traces.num_steps, asked)
            result = solve(
                profile(3), links.traces, current=current, topology=links.topology, exchange=links.exchange,
                solver=solver, cost="staircase", patience=3, time_limit=60, **asked,
            )  # fmt: skip
            agrees(result, links, current, asked)
            assert result.total_us is not None and result.bound_us is not None
            assert result.bound_us <= best * (1 + 1e-9) <= result.total_us * (1 + 2e-9), (seed, asked)
            assert result.total_us <= doing_nothing * (1 + 1e-9)
            assert result.status is not Status.OPTIMAL or result.total_us == pytest.approx(best, rel=2e-6)
            tried, met = tried + 1, met + (result.total_us <= best * (1 + 1e-6))
    assert met >= 0.85 * tried, (met, tried)


def test_what_is_not_weighed_is_refused_in_one_line() -> None:
    links = random_links(3)
    current = Placement.contiguous(2, 4, 3)
    given = {"current": current, "topology": links.topology, "exchange": links.exchange}
    static = Placement(
        physical_to_logical=[[0, 1, 2, 3, 0, 2]] * 2, slots_per_rank=[2] * 3, num_experts=4, split="static",
        split_weights=[[0.2, 1, 0.3, 1, 0.8, 0.7]] * 2,
    )  # fmt: skip
    optimal = static.model_copy(update={"split": Split.OPTIMAL, "split_weights": None})
    for asked, said in (
        ({"current": optimal, "split": "even"}, "topology.*with split optimal of current"),
        ({"exclude_ranks": [1]}, "topology.*with exclude_ranks.*solve with exclude_ranks first"),
        ({"add_ranks": [0]}, "topology.*with add_ranks.*solve with add_ranks first"),
        ({"compute_slack": 0.1, "max_moves": 3}, "compute_slack.*max_moves 3.*leave one out"),
        ({"compute_slack": 0.1, "move_price": 3.0}, "compute_slack.*move_price 3.0.*leave one out"),
        ({"current": static}, "topology.*split static of current.*--split even"),
        ({"solver": "moetuner", "max_moves": 3}, "moetuner cannot heed"),
    ):
        with pytest.raises(UnsupportedError, match=said) as caught:
            solve(profile(3), links.traces, **{**given, **asked})  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_what_is_proven_without_links_does_not_end_a_call_with_them() -> None:
    for seed in (1, 2):
        links, results = random_links(seed), dict[str, Result]()
        for solver in ("branch", "auto"):
            results[solver] = solve(
                profile(3), links.traces, topology=links.topology, exchange=links.exchange, slots_per_rank=[2, 1, 1],
                solver=solver, cost="staircase", time_limit=60, patience=3,
            )  # fmt: skip
        found = results["branch"]
        assert (found.stopped_by is StoppedBy.PROOF) == (found.status is Status.OPTIMAL)
        assert found.bound_us <= results["auto"].objective_us * (1 + 1e-9)

"""Ranks that leave or come, with copies, rules and limits of moves, against all placements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from timed import timed

from gemopt.costs import fit
from gemopt.evaluate import evaluate, objective
from gemopt.placement import EMPTY, Placement
from gemopt.problem import Problem, problems
from gemopt.profile import MoeShape, Profile
from gemopt.resize import resize
from gemopt.result import Result, Status
from gemopt.rules import Rules
from gemopt.solve import solve
from gemopt.solvers.placing import row_of
from gemopt.traces import Traces

pytestmark = pytest.mark.usefixtures("quick_bounds")

BYTES = 100  # of an expert
LAYERS, STEPS = 2, 3
Way = tuple[float, np.ndarray]  # microseconds with the price of moves, and [G] moves into each rank


def profile(ranks: int) -> Profile:
    return timed(range(ranks), lambda n, g: 20 + n * (1 + 0.3 * g), (0, 8, 64), model=MoeShape(expert_bytes=BYTES))


@dataclass(frozen=True)
class Case:
    """A placement in force and what is asked of `solve`; ranks in `rules` as they were, a new one last."""

    current: Placement
    traces: Traces
    ranks: dict[str, Any]
    asked: dict[str, Any] = field(default_factory=dict)
    rules: Rules | None = None

    def solve(self, solver: str) -> Result:
        return solve(
            profile(self.current.num_ranks), self.traces, current=self.current, solver=solver, patience=1,
            time_limit=60, slots_per_rank=self.slots, rules=self.rules, **self.ranks, **self.asked,
        )  # fmt: skip

    @property
    def slots(self) -> int:
        return int(self.current.slots_per_rank[0])

    def best(self) -> float | None:
        """The least total of all placements within limits and rules; None when there is none."""
        one, two = self._ways()
        size, most = self.asked.get("max_bytes_per_rank", 1e9), self.asked.get("max_moves", 99)
        totals = [
            a + b
            for (a, into), (b, and_into) in product(one, two)
            if (into + and_into).max() * BYTES <= size and (into + and_into).sum() <= most
        ]
        return min(totals, default=None)

    def _ways(self) -> list[list[Way]]:
        """Of each layer: every total, and every way to share the moves among the ranks, once."""
        resized = resize(self.current, profile(self.current.num_ranks), exclude=self.ranks["exclude_ranks"],
                         add=self.ranks["add_ranks"])  # fmt: skip
        layers = problems(fit(resized.profile)[0], self.traces, self.slots)
        each, price = self.asked.get("max_moves_per_layer", 99), self.asked.get("move_price", 0.0)
        found = []
        for problem, home_GE in zip(layers, resized.home_LGE, strict=True):
            least: dict[tuple[int, ...], float] = {}
            for held_GE in placements(problem, self.slots):
                into_G = (held_GE & ~home_GE).sum(axis=1)
                if into_G.sum() > each or not self._kept(held_GE, resized.numbers):
                    continue
                total = objective(problem, row_of(held_GE, problem.slots_per_rank)) + price * int(into_G.sum())
                least[tuple(into_G)] = min(total, least.get(tuple(into_G), np.inf))
            found.append([(total, np.array(into)) for into, total in least.items()])
        return found

    def _kept(self, held_GE: np.ndarray, numbers: list[int]) -> bool:
        if self.rules is None:
            return True
        at = {number: rank for rank, number in enumerate(numbers)}
        pins = [(rule.experts, {at[g] for g in rule.ranks if g in at}) for rule in self.rules.pinned]
        shut = [(rule.experts, {at[g] for g in rule.ranks if g in at}) for rule in self.rules.kept_off]
        return (
            all(set(np.flatnonzero(held_GE[:, e])) <= ranks for experts, ranks in pins for e in experts)
            and not any(held_GE[g, e] for experts, ranks in shut for e in experts for g in ranks)
            and all(held_GE[:, rule.experts].sum(axis=1).max() <= 1 for rule in self.rules.apart)
        )


def placements(problem: Problem, slots: int) -> Iterator[np.ndarray]:
    """[G, E] every way to hold each expert at least once."""
    experts = range(problem.num_experts)
    sets = [each for size in range(slots + 1) for each in combinations(experts, size)]
    for chosen in product(sets, repeat=problem.num_ranks):
        held_GE = np.zeros((problem.num_ranks, problem.num_experts), dtype=bool)
        for rank, mine in enumerate(chosen):
            held_GE[rank, list(mine)] = True
        if held_GE.any(axis=0).all():
            yield held_GE


def random_case(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    experts, leaves = int(rng.integers(3, 5)), bool(seed % 2)
    ranks = 3 if leaves else 2
    slots = -(-experts // 2) + int(rng.integers(0, 2)) * (experts == 3)
    gone, new = ([int(rng.integers(ranks))], []) if leaves else ([], [0] * int(rng.integers(0, 2)))
    rows = []
    while len(rows) < LAYERS:
        row = np.full((ranks, slots), EMPTY)
        for mine in row:
            size = rng.integers(0, slots + 1)
            mine[:size] = rng.permutation(experts)[:size]
        if set(range(experts)) <= set(row.ravel().tolist()):
            rows.append(row.ravel())
    asked: dict[str, Any] = {"max_bytes_per_rank": BYTES * int(rng.integers(0, 3))}
    if rng.random() < 0.5:
        asked["max_moves"] = int(rng.integers(0, 4))
    if rng.random() < 0.3:
        asked["max_moves_per_layer"] = int(rng.integers(0, 3))
    if rng.random() < 0.3:
        asked["move_price"] = float(rng.integers(1, 4))
    if "max_moves" in asked and rng.random() < 0.4:
        del asked["max_bytes_per_rank"]
    expert, stays = int(rng.integers(experts)), [g for g in range(ranks + len(new)) if g not in gone]
    kind = rng.integers(0, 5)
    rule = {"experts": [expert], "ranks": [int(rng.choice(stays))]}
    rules = [
        Rules(pinned=[rule]), Rules(kept_off=[rule]), Rules(apart=[{"experts": [expert, (expert + 1) % experts]}])
    ][kind] if kind < 3 else None  # fmt: skip
    current = Placement(physical_to_logical=rows, slots_per_rank=[slots] * ranks, num_experts=experts)
    traces = Traces(counts=rng.integers(0, 9, (STEPS, LAYERS, experts)))
    return Case(current, traces, {"exclude_ranks": gone, "add_ranks": new}, asked, rules)


@pytest.mark.parametrize("solver", ["local-search", "cpsat"])
def test_what_is_found_is_what_all_placements_say(solver: str) -> None:
    """Feasible where some placement keeps everything, infeasible, proven, where none does; never below the best."""
    seen = {True: 0, False: 0}
    for seed in range(30 if solver == "local-search" else 20):
        case = random_case(seed)
        best, result = case.best(), case.solve(solver)
        seen[best is not None] += 1
        if best is None:
            assert (result.status, result.placement) == (Status.INFEASIBLE, None), (seed, case.asked)
            assert result.notes and not any("--time-limit" in note for note in result.notes), (seed, result.notes)
            continue
        assert result.placement is not None and result.moves is not None, (seed, result.status, result.notes)
        assert result.total_us is not None and result.bound_us is not None
        assert result.total_us >= best * (1 - 1e-9) and result.bound_us <= best * (1 + 1e-9), seed
        if solver == "cpsat" and "max_bytes_per_rank" not in case.asked:
            assert result.total_us == pytest.approx(best, rel=1e-6), (seed, case.asked)
        assert result.moves.moves <= case.asked.get("max_moves", 99)
        assert max(result.moves.into_rank) * BYTES <= case.asked.get("max_bytes_per_rank", 1e9)
        if not case.ranks["exclude_ranks"] and not case.ranks["add_ranks"]:
            assert result.objective_us == evaluate(result.placement, profile(2), case.traces).objective_us
    assert min(seen.values()) >= 3


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("solver", ["local-search", "cpsat"])
def test_a_rank_takes_one_expert_of_two_layers_where_only_one_layer_may_go_elsewhere(rank: int, solver: str) -> None:
    """Whatever the order of the layers: the first may take either rank, the second is pinned."""
    current = Placement(
        physical_to_logical=[[0, 1, EMPTY, 2, EMPTY, EMPTY, 3, EMPTY, EMPTY], [0, 1, EMPTY, 2, 0, EMPTY, 3, 1, EMPTY]],
        slots_per_rank=[3] * 3, num_experts=4,
    )  # fmt: skip
    traces = Traces(counts=np.random.default_rng(0).integers(1, 9, (STEPS, LAYERS, 4)))
    pinned = Rules(pinned=[{"experts": [3], "ranks": [rank], "layers": [1]}])
    asked = {"max_bytes_per_rank": BYTES}
    case = Case(current, traces, {"exclude_ranks": [2], "add_ranks": []}, asked, pinned)
    result = case.solve(solver)
    assert result.moves is not None and result.moves.into_rank == [1, 1]
    for limits, said in (
        ({"max_moves": 1}, "need 2 moves over all layers"),
        ({"max_moves": 4, "max_bytes_per_rank": 0}, "the limit allows fewer (into each rank)"),
    ):
        none = Case(current, traces, case.ranks, {**asked, **limits}, pinned).solve(solver)
        assert none.status is Status.INFEASIBLE and said in " ".join(none.notes), none.notes


def test_moves_that_fit_into_each_layer_but_not_into_a_rank_are_infeasible() -> None:
    current = Placement(
        physical_to_logical=[[0, 1, EMPTY, 2, 0, EMPTY, 3, EMPTY, EMPTY]] * 2, slots_per_rank=[3] * 3, num_experts=4
    )
    traces = Traces(counts=np.random.default_rng(0).integers(1, 9, (STEPS, LAYERS, 4)))
    pinned = Rules(pinned=[{"experts": [3], "ranks": [1]}])
    ranks = {"exclude_ranks": [2], "add_ranks": []}
    for limits, more in (({}, ""), ({"max_moves": 5}, " and 5 in all (max_moves)")):
        result = Case(current, traces, ranks, {"max_bytes_per_rank": BYTES, **limits}, pinned).solve("local-search")
        assert result.status is Status.INFEASIBLE
        assert (
            f"need more than 1 move into a rank over all layers{more and ' (max_bytes_per_rank)' + more}"
            in result.notes[0]
        )


def test_rows_of_all_layers_that_are_not_found_in_time_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    current = Placement(
        physical_to_logical=[[0, 1, EMPTY, 2, EMPTY, EMPTY, 3, EMPTY, EMPTY]] * 2, slots_per_rank=[3] * 3, num_experts=4
    )
    traces = Traces(counts=np.random.default_rng(0).integers(1, 9, (STEPS, LAYERS, 4)))
    pinned = Rules(pinned=[{"experts": [3], "ranks": [1]}])
    case = Case(current, traces, {"exclude_ranks": [2], "add_ranks": []}, {"max_bytes_per_rank": BYTES}, pinned)
    assert case.solve("local-search").status is Status.INFEASIBLE
    monkeypatch.setattr("gemopt.solving.rounds.fewest_rows", lambda *_: (None, False))
    result = case.solve("local-search")
    assert result.status is Status.UNKNOWN and "not found in time" in " ".join(result.notes), result.notes

"""`solve` with a placement in force: optima over all layers, what is reported, ranks that leave and come."""

from __future__ import annotations

from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
from timed import timed

from gemopt.costs import fit
from gemopt.evaluate import evaluate
from gemopt.exceptions import InputError, UnsupportedError
from gemopt.migration import count_moves
from gemopt.placement import EMPTY, Placement
from gemopt.profile import MoeShape, Profile
from gemopt.result import Result, Status, StoppedBy
from gemopt.solve import solve
from gemopt.solving.fronts import SWAPS, moves_front
from gemopt.traces import Traces

pytestmark = pytest.mark.usefixtures("quick_bounds")

SLOTS = [3, 2]
EXPERTS, STEPS = 5, 4


def profile(ranks: int = 2, step: float = 0.3, **shape: int) -> Profile:
    return timed(range(ranks), lambda n, g: 20 + n * (1 + step * g), (0, 8, 64), model=MoeShape(**shape))


def inputs(seed: int, layers: int = 2) -> tuple[Profile, Traces, Placement]:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 9, (STEPS, layers, EXPERTS)) * rng.integers(0, 2, (STEPS, layers, EXPERTS))
    rows = [rng.permutation(EXPERTS) for _ in range(layers)]
    return (
        profile(),
        Traces(counts=counts),
        Placement(physical_to_logical=rows, slots_per_rank=SLOTS, num_experts=EXPERTS),
    )


def every(given: tuple[Profile, Traces, Placement]) -> list[list[tuple[float, int]]]:
    """For each layer, objective and moves of every placement."""
    measured, traces, current = given
    cost, found = fit(measured)[0], []
    for layer in range(traces.num_layers):
        own = Traces(counts=traces.counts[:, layer : layer + 1])
        values = []
        for first in combinations(range(EXPERTS), SLOTS[0]):
            row = np.array([*first, *(e for e in range(EXPERTS) if e not in first)])
            placement = Placement(physical_to_logical=[row], slots_per_rank=SLOTS, num_experts=EXPERTS)
            moves = count_moves(current.physical_to_logical[layer], row, np.array(SLOTS))
            values.append((evaluate(placement, measured, own, cost=cost).objective_us, moves))
        found.append(values)
    return found


def best(found: list[list[tuple[float, int]]], price: float = 0.0, budget: int = 99, each: int = 99) -> float:
    one, two = found
    return min(a + b + price * (m + n) for a, m in one for b, n in two if m + n <= budget and max(m, n) <= each)


ASKED = [
    ({}, {}),
    ({"max_moves": 0}, {"budget": 0}),
    ({"max_moves": 2}, {"budget": 2}),
    ({"max_moves": 4}, {"budget": 4}),
    ({"max_moves": 6, "max_moves_per_layer": 2}, {"budget": 6, "each": 2}),
    ({"max_moves_per_layer": 2}, {"each": 2}),
    ({"move_price": 3.0}, {"price": 3.0}),
    ({"move_price": 3.0, "horizon_steps": 8, "max_moves": 2}, {"price": 1.5, "budget": 2}),
    ({"expert_bytes": 3000, "bandwidth": 2.0, "horizon_steps": 12}, {"price": 0.5}),
]


@pytest.mark.parametrize("solver", ["auto", "cpsat", "local-search"])
def test_one_budget_for_all_layers_is_spent_best(solver: str) -> None:
    for seed in range(3):
        given = inputs(seed)
        found = every(given)
        for asked, means in ASKED:
            result = solve(*given[:2], current=given[2], solver=solver, time_limit=60, patience=5, **asked)
            optimum = best(found, **means)  # type: ignore[arg-type]
            near = 1e-6 if solver != "local-search" else 0.01
            assert result.total_us == pytest.approx(optimum, rel=near), (seed, asked)
            assert result.total_us >= optimum * (1 - 1e-9)
            assert result.bound_us is not None and result.bound_us <= optimum * (1 + 1e-9) + 1e-9
            if solver != "local-search":
                assert (result.status, result.stopped_by) == (Status.OPTIMAL, StoppedBy.PROOF), (seed, asked)
            _agrees(result, given)


def _agrees(result: Result, given: tuple[Profile, Traces, Placement]) -> None:
    measured, traces, current = given
    placement, moves = result.placement, result.moves
    assert placement is not None and moves is not None and result.total_us is not None
    assert result.objective_us == evaluate(placement, measured, traces).objective_us
    before = evaluate(current, measured, traces).objective_us
    counted = [
        count_moves(a, b, np.array(SLOTS))
        for a, b in zip(current.physical_to_logical, placement.physical_to_logical, strict=True)
    ]
    assert moves.per_layer == counted and moves.moves == sum(counted) == sum(moves.into_rank)
    assert moves.makespan_before_us == pytest.approx(before) and moves.gain_us == pytest.approx(
        before - result.objective_us
    )
    assert result.total_us == pytest.approx(result.objective_us + moves.price_us * moves.moves)
    if moves.move_us is not None and moves.gain_us > 0:
        assert moves.paid_after_steps == pytest.approx(moves.moves * moves.move_us * STEPS / moves.gain_us)
        assert moves.paid_after_steps <= moves.move_us * STEPS / moves.price_us * (1 + 1e-9)  # within the horizon
    else:
        assert moves.paid_after_steps is None
    assert Result.model_validate_json(result.model_dump_json()) == result


def test_milp_states_moves_too() -> None:
    given = inputs(4)
    optimum = best(every(given), price=2.0, each=2)
    result = solve(*given[:2], current=given[2], solver="milp", time_limit=60, move_price=2.0, max_moves_per_layer=2)
    assert result.total_us == pytest.approx(optimum, rel=1e-6) and result.status is Status.OPTIMAL


def best_by_rank(given: tuple[Profile, Traces, Placement], limit: int) -> float:
    """Over all placements of both layers of which no rank receives more than so many experts in all."""
    found = []
    for values, home in zip(every(given), given[2].physical_to_logical, strict=True):
        firsts = [set(first) for first in combinations(range(EXPERTS), SLOTS[0])]
        held = set(home[: SLOTS[0]].tolist())
        found.append(
            [(us, len(first - held), len(held - first)) for (us, _), first in zip(values, firsts, strict=True)]
        )
    one, two = found
    return min(a + b for a, g, h in one for b, i, j in two if max(g + i, h + j) <= limit)


@pytest.mark.parametrize("solver", ["cpsat", "local-search"])
def test_a_budget_per_rank_is_divided_along_the_fronts_and_the_result_says_so(solver: str) -> None:
    """Nothing is called optimal that is not, even where every layer is proven with its part of the budget."""
    proven = 0
    for seed in range(4):
        given = inputs(seed)
        for limit in (1, 2):
            result = solve(*given[:2], current=given[2], solver=solver, time_limit=60, patience=5, expert_bytes=100,
                           max_bytes_per_rank=100 * limit)  # fmt: skip
            optimum = best_by_rank(given, limit)
            assert any("divided among the layers along the best swaps" in note for note in result.notes)
            assert result.objective_us is not None and result.bound_us is not None
            assert result.bound_us <= optimum * (1 + 1e-9) and result.objective_us >= optimum * (1 - 1e-9)
            if result.status is Status.OPTIMAL:
                proven += 1
                assert result.objective_us == pytest.approx(optimum)
    assert proven < 8


def test_bytes_per_rank_hold_over_all_layers() -> None:
    given = inputs(5)
    for limit in (0, 1, 2):
        result = solve(
            *given[:2], current=given[2], solver="local-search", patience=5, expert_bytes=100,
            max_bytes_per_rank=100 * limit + 99,
        )  # fmt: skip
        assert result.moves is not None and max(result.moves.into_rank) <= limit
        assert result.moves.bytes == 100 * result.moves.moves
        assert result.bound_us is not None and result.objective_us is not None
        assert result.bound_us <= result.objective_us


@pytest.mark.parametrize(
    ("limit", "moves"),
    [
        ({"max_moves": 10**12}, None),
        ({"max_moves_per_layer": 10**30}, None),
        ({"max_bytes_per_rank": 1e300}, None),
        ({"max_bytes_per_rank": 10**20}, None),
        ({"max_bytes_per_rank": 0}, 0),
        ({"max_bytes_per_rank": 999}, 0),
    ],
)
def test_limits_beyond_all_moves_are_none_and_no_moves_are_proven(limit: dict[str, float], moves: int | None) -> None:
    given = inputs(3)
    measured, traces, current = given
    result = solve(
        measured,
        traces,
        slots_per_rank=SLOTS,
        solver="cpsat",
        current=current,
        expert_bytes=1000,
        time_limit=60,
        **limit,
    )  # type: ignore[arg-type]
    assert result.status is Status.OPTIMAL and result.moves is not None
    assert result.objective_us == pytest.approx(best(every(given), budget=99 if moves is None else moves))
    assert moves is None or result.moves.moves == moves


def test_equal_ranks_change_roles_after_a_free_solve() -> None:
    """On equal ranks the order in which a solver fills them means nothing: contiguous placement is found again."""
    rng = np.random.default_rng(0)
    measured, traces = profile(4, 0.0), Traces(counts=rng.integers(0, 9, (6, 2, 8)))
    order = rng.permutation(4)
    rows = np.arange(8).reshape(4, 2)[order].ravel()
    current = Placement(physical_to_logical=[rows, rows[::-1]], slots_per_rank=[2] * 4, num_experts=8)
    result = solve(measured, traces, solver="linear", current=current)
    assert result.moves is not None and result.moves.moves == 0
    assert result.placement is not None
    assert (result.placement.physical_to_logical == current.physical_to_logical).all()  # slots are kept as well
    apart = solve(profile(4, 0.1), traces, solver="linear", current=current)
    assert apart.moves is not None and apart.moves.moves > 0


def test_excluded_ranks_lose_their_experts_and_the_rest_stay() -> None:
    rng = np.random.default_rng(1)
    measured, traces = profile(4, 0.1), Traces(counts=rng.integers(0, 9, (6, 2, 8)), layer_ids=[3, 7])
    rows = [[0, 1, -1, 2, 3, -1, 4, 5, 0, 6, 7, -1], [0, 1, 6, 2, 3, -1, 4, 5, -1, 6, 7, -1]]
    current = Placement(physical_to_logical=rows, slots_per_rank=[3] * 4, num_experts=8, layer_ids=[3, 7])
    result = solve(measured, traces, current=current, exclude_ranks=[3], solver="local-search", patience=3)
    assert result.moves is not None and result.placement is not None
    assert result.moves.from_checkpoint == {3: [6, 7], 7: [7]}
    assert result.moves.per_layer == [2, 1] and result.moves.old_rank == [0, 1, 2]
    assert result.placement.num_ranks == 3
    for row, layer in zip(result.placement.physical_to_logical, rows, strict=True):
        held = [set(part.tolist()) for part in np.split(row, 3)]
        gone = [set(layer[3 * g : 3 * g + 3]) - held[g] - {-1} for g in range(3)]
        assert all(expert in {0, 6} for part in gone for expert in part)  # only copies give way
    free = solve(
        measured, traces, current=current, exclude_ranks=[3], solver="local-search", patience=3, move_price=0.0
    )
    assert free.objective_us is not None and result.objective_us is not None
    assert free.objective_us <= result.objective_us * (1 + 1e-9)


def test_without_slots_or_moves_enough_there_is_no_placement() -> None:
    rng = np.random.default_rng(2)
    measured, traces = profile(4, 0.1), Traces(counts=rng.integers(0, 9, (6, 2, 8)))
    current = Placement.contiguous(2, 8, 4)
    short = solve(measured, traces, current=current, exclude_ranks=[1, 3])
    assert (short.status, short.placement) == (Status.INFEASIBLE, None)
    assert "4 slots are missing" in short.notes[0]
    for asked in ({"max_moves": 3}, {"max_moves_per_layer": 1}):
        few = solve(measured, traces, current=current, exclude_ranks=[3], slots_per_rank=3, patience=1, **asked)
        assert few.status is Status.INFEASIBLE and few.placement is None
        assert "experts without a copy need" in " ".join(few.notes)
    enough = solve(measured, traces, current=current, exclude_ranks=[3], slots_per_rank=3, patience=1, max_moves=4)
    assert enough.moves is not None and enough.moves.moves == 4


@pytest.mark.parametrize("solver", ["local-search", "cpsat"])
def test_what_fewer_slots_push_out_may_move(solver: str) -> None:
    """Nobody set a limit: rank 0 keeps one of two experts, and the other has no copy elsewhere."""
    traces = Traces(counts=np.random.default_rng(0).integers(1, 9, (3, 1, 4)))
    current = Placement(physical_to_logical=[[0, 1, 2, 3, 0, 2]], slots_per_rank=[2] * 3, num_experts=4)
    asked = {"exclude_ranks": [2], "slots_per_rank": [1, 3], "solver": solver, "patience": 0, "time_limit": 20}
    found = solve(profile(3, 0.1), traces, current=current, **asked)
    assert found.placement is not None and found.moves is not None
    assert found.moves.moves == 1 and found.moves.from_checkpoint == {}


@pytest.mark.parametrize("changed", [{"exclude_ranks": [2]}, {"add_ranks": [0]}])
@pytest.mark.parametrize("slots", [None, 3])
def test_slots_that_must_be_full_are_filled(changed: dict[str, Any], slots: int | None) -> None:
    """Nobody set a limit: empty slots of the placement in force, and further ones, get copies."""
    traces = Traces(counts=np.random.default_rng(0).integers(1, 9, (3, 1, 4)))
    current = Placement(physical_to_logical=[[0, 1, 2, EMPTY, 3, EMPTY]], slots_per_rank=[2] * 3, num_experts=4)
    asked = {**changed, "slots_per_rank": slots, "full_slots": True, "patience": 0, "time_limit": 20}
    found = solve(profile(3, 0.1), traces, current=current, solver="local-search", **asked)
    assert found.placement is not None and not found.placement.has_empty_slots


@pytest.mark.parametrize("limit", ["max_moves", "max_moves_per_layer", "max_bytes_per_rank"])
@pytest.mark.parametrize("solver", ["local-search", "gem"])
def test_filling_slots_takes_moves_that_limits_hold(limit: str, solver: str) -> None:
    """One slot of each layer is empty, both on rank 1: two moves into it fill them, fewer are infeasible."""
    current = Placement(physical_to_logical=[[0, 1, 2, 3, 4, EMPTY]] * 2, slots_per_rank=[3, 3], num_experts=EXPERTS)
    asked = {"current": current, "full_slots": True, "solver": solver, "expert_bytes": 1, "patience": 1}
    least = 1 if limit == "max_moves_per_layer" else 2
    found = solve(profile(), inputs(0)[1], **{limit: least}, **asked)
    assert found.placement is not None and found.moves is not None
    assert not found.placement.has_empty_slots and found.moves.into_rank[1] == 2
    assert solve(profile(), inputs(0)[1], **{limit: least - 1}, **asked).status is Status.INFEASIBLE


def test_none_for_ranks_is_as_if_nothing_was_said() -> None:
    measured, traces, current = inputs(0)
    asked = {"current": current, "solver": "local-search", "patience": 1}
    both = [solve(measured, traces, exclude_ranks=none, add_ranks=none, **asked) for none in (None, ())]
    assert both[0].objective_us == both[1].objective_us is not None


def test_an_added_rank_is_filled() -> None:
    rng = np.random.default_rng(3)
    measured, traces = profile(3, 0.1), Traces(counts=rng.integers(1, 9, (6, 2, 12)))
    current = Placement.contiguous(2, 12, 3)
    result = solve(measured, traces, current=current, add_ranks=[0], solver="local-search", patience=3)
    assert result.moves is not None and result.placement is not None
    assert result.placement.slots_per_rank.tolist() == [4] * 4 and result.moves.old_rank == [0, 1, 2, -1]
    assert max(result.moves.per_layer) <= 4 and result.moves.gain_us > 0
    assert result.moves.into_rank[3] > 0


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"max_moves": 2}, "max_moves"),
        ({"exclude_ranks": [1]}, "exclude_ranks"),
        ({"current": 1, "move_price": -1.0}, "move_price"),
        ({"current": 1, "bandwidth": 0.0}, "bandwidth"),
        ({"current": 1, "bandwidth": 50e9, "expert_bytes": 10**7}, "bandwidth"),
        ({"current": 1, "bandwidth": 5.0}, "bandwidth"),  # of which size?
        ({"current": 1, "move_price": 1.0, "bandwidth": 5.0}, "bandwidth"),
        ({"current": 1, "horizon_steps": 5}, "horizon_steps"),
        ({"current": 1, "max_bytes_per_rank": 5}, "max_bytes_per_rank"),
        ({"current": 1, "exclude_ranks": [2]}, "exclude_ranks"),
    ],
)
def test_what_cannot_be_asked_is_refused(asked: dict[str, object], field: str) -> None:
    measured, traces, current = inputs(0)
    if "current" in asked:
        asked = asked | {"current": current}
    with pytest.raises(InputError) as error:
        solve(measured, traces, **asked)  # type: ignore[arg-type]
    assert error.value.field == field


def test_solvers_that_heed_no_moves_are_refused() -> None:
    measured, traces, current = inputs(0)
    with pytest.raises(UnsupportedError, match="local-search"):
        solve(measured, traces, current=current, solver="lpt", max_moves=2)


def test_fronts_fall_with_the_moves() -> None:
    rng = np.random.default_rng(4)
    measured = profile(4, 0.1, expert_bytes=1000)
    traces = Traces(counts=rng.poisson(rng.gamma(0.6, 8, (1, 2, 16)) * rng.uniform(0.5, 1.5, (20, 1, 1))))
    current = Placement.contiguous(2, 16, 4)
    points = moves_front(measured, traces, current, holdout=0.5, solvers=["local-search"], patience=2, time_limit=60)
    swaps = [point for point in points if point.source == SWAPS]
    assert [point.source for point in points[len(swaps) :]] == ["local-search"]
    assert len(swaps) > 3 and swaps[0].moves == 0 and swaps[0].change == 0
    assert all(a.moves < b.moves and a.step_us >= b.step_us for a, b in zip(swaps, swaps[1:], strict=False))
    assert all(point.bytes == 1000 * point.moves and point.holdout_us is not None for point in points)
    assert swaps[0].step_us == pytest.approx(evaluate(current, measured, traces.split(0.5)[0]).objective_us / 10)


def test_permutations_cover_the_placements() -> None:
    """The reference above leaves no placement out: every split of the experts over the ranks is one of its rows."""
    splits = {frozenset(p[: SLOTS[0]]) for p in permutations(range(EXPERTS))}
    assert len(splits) == len(every(inputs(0))[0])

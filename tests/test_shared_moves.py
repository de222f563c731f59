"""One budget of moves for several layers whose slots are spare."""

from __future__ import annotations

import numpy as np
import pytest
from timed import timed

from gemopt.placement import EMPTY, Placement
from gemopt.profile import Profile
from gemopt.result import StoppedBy
from gemopt.solve import solve
from gemopt.solvers.search import within
from gemopt.traces import Traces

pytestmark = pytest.mark.usefixtures("quick_bounds")

STEPS = 4


def profile(step: float) -> Profile:
    """Three ranks, each slower than the one before by so much."""
    return timed(range(3), lambda n, g: 20 + n * (1 + step * g), (0, 8, 64))


@pytest.mark.parametrize("split", ["even", "optimal", "static"])
def test_a_budget_over_layers_is_spent_on_copies_that_gain_most(split: str) -> None:
    """Another copy of the hot expert of a layer is one move, and gains more than any swap, which is two."""
    traces = Traces(counts=np.tile([40, 2, 2, 2], (STEPS, 4, 1)) - np.arange(4)[:, None] * np.array([9, 0, 0, 0]))
    current = Placement(physical_to_logical=[[0, 1, 2, EMPTY, 3, EMPTY]] * 4, slots_per_rank=[2] * 3, num_experts=4)
    given = {"current": current, "split": split, "solver": "local-search", "patience": 2, "max_moves": 2}
    found = solve(profile(0.0), traces, **given)
    assert found.moves is not None and found.moves.per_layer == [1, 1, 0, 0]
    assert found.placement is not None
    assert all((row == 0).sum() == 2 for row in found.placement.physical_to_logical[:2])
    assert found.history[-1].objective_us == pytest.approx(found.total_us)


def test_history_is_of_placements_whose_slots_are_full() -> None:
    """As of a solver that leaves some empty, which are filled afterwards."""
    traces = Traces(counts=np.random.default_rng(60).integers(0, 9, (4, 2, 4)))
    current = Placement(physical_to_logical=[[0, 1, 2, 3, 0, 1]] * 2, slots_per_rank=[2] * 3, num_experts=4)
    given = {"current": current, "full_slots": True, "solver": "gem", "patience": 2, "max_moves_per_layer": 2}
    found = solve(profile(0.3), traces, **given)
    assert found.history[-1].objective_us == pytest.approx(found.total_us)


@pytest.mark.parametrize("seed", [2, 13])
def test_static_weights_are_those_of_the_placement_that_the_budget_bought(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a search finds nothing, as without time, the answer is a row of the front: not its own to weigh."""
    monkeypatch.setattr(within._Search, "descend", lambda self: None)
    rng = np.random.default_rng(seed)
    traces, weights = Traces(counts=rng.integers(0, 20, (6, 2, 4))), rng.uniform(0, 1, 3)
    current = Placement(
        physical_to_logical=[[0, 1, 0, 2, 1, 3]] * 2, slots_per_rank=[2] * 3, num_experts=4, split="static",
        split_weights=[[weights[0], weights[1], 1 - weights[0], 1, 1 - weights[1], 1]] * 2,
    )  # fmt: skip
    found = solve(profile(0.5), traces, current=current, solver="local-search", patience=0, max_moves=4)
    assert found.moves is not None and found.total_us is not None and found.moves.moves <= 4
    assert found.total_us < 0.95 * found.moves.makespan_before_us


def test_without_a_placement_nothing_is_said_of_what_it_was_fitted_on() -> None:
    traces = Traces(counts=np.full((STEPS, 2, 4), 3))
    current = Placement(physical_to_logical=[[0, 1, 2, 3, EMPTY, EMPTY]] * 2, slots_per_rank=[2] * 3, num_experts=4)
    found = solve(profile(0.0), traces, current=current, exclude_ranks=[0], max_moves=1)
    assert found.placement is None and found.notes and "fitted" not in " ".join(found.notes)


@pytest.mark.parametrize("solver", ["auto", "local-search"])
@pytest.mark.parametrize("asked", [{"max_moves": 0}, {"max_moves_per_layer": 0}])
def test_what_is_in_force_is_the_best_where_nothing_may_move(asked: dict[str, int], solver: str) -> None:
    """With one home for every expert there is no other content: nothing is searched, and that is the proof."""
    traces = Traces(counts=np.random.default_rng(5).integers(0, 9, (6, 2, 4)))
    current = Placement(physical_to_logical=[[0, 1, 2, EMPTY, 3, EMPTY]] * 2, slots_per_rank=[2] * 3, num_experts=4)
    found = solve(profile(0.3), traces, current=current, solver=solver, time_limit=600, **asked)
    assert found.stopped_by is StoppedBy.PROOF and found.gap == 0
    assert found.moves is not None and found.moves.moves == 0


def test_where_nothing_may_move_copies_may_still_be_dropped() -> None:
    """A copy at home that makes it slower is none of the moves; that ends without kicks."""
    traces = Traces(counts=np.tile([8, 8, 4, 4], (STEPS, 1, 1)))
    current = Placement(physical_to_logical=[[0, 1, 2, 0, 3, 0]], slots_per_rank=[2] * 3, num_experts=4)
    slow = timed(range(3), lambda n, g: 20 + n * (1 + 9 * (g == 2)), (0, 8, 64))
    found = solve(slow, traces, current=current, solver="local-search", time_limit=600, max_moves_per_layer=0)
    assert found.stopped_by is not StoppedBy.TIME_LIMIT and found.placement is not None
    assert 0 not in found.placement.physical_to_logical[0][4:]

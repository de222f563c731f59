"""One budget of moves for several layers whose slots are spare."""

from __future__ import annotations

import numpy as np
import pytest
from timed import timed

from gemopt.placement import EMPTY, Placement
from gemopt.profile import Profile
from gemopt.solve import solve
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

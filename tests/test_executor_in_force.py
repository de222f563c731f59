"""What an executor says is in force when layers differ, as after a migration that stopped half way."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("transformers")

from gemopt.exceptions import InputError
from gemopt.executor import Executor
from gemopt.executor.plan import LayerRow
from gemopt.placement import Split

SLOTS = np.array([3, 2])
PLAIN, COPIES = np.array([0, 1, -1, 2, 3]), np.array([0, 1, 2, 3, 0])
PARTS = np.array([0.25, 1.0, 1.0, 1.0, 0.75])


def in_force(*layers):
    """Placement of an executor whose layers have these (experts of slots, split)."""
    executor = object.__new__(Executor)
    rows = [LayerRow(row, SLOTS, split, PARTS if split is Split.STATIC else None) for row, split in layers]
    executor.layers = [SimpleNamespace(row=row, num_experts=4) for row in rows]
    executor.layer_ids, executor._template = list(range(len(rows))), {}
    return executor.placement


@pytest.mark.parametrize("split", [Split.EVEN, Split.NEAREST, Split.OPTIMAL])
def test_layers_without_copies_have_any_split(split):
    placement = in_force((PLAIN, Split.EVEN), (COPIES, split), (PLAIN, Split.NEAREST))
    assert placement.split is split and placement.split_weights is None
    np.testing.assert_array_equal(placement.physical_to_logical, [PLAIN, COPIES, PLAIN])


def test_even_shares_beside_static_ones_are_static():
    placement = in_force((COPIES, Split.EVEN), (COPIES, Split.STATIC))
    assert placement.split is Split.STATIC
    np.testing.assert_array_equal(placement.split_weights, [[0.5, 1, 1, 1, 0.5], PARTS])


@pytest.mark.parametrize("other", [Split.EVEN, Split.STATIC, Split.OPTIMAL])
def test_rules_that_no_split_can_say_together_are_named(other):
    with pytest.raises(InputError, match=rf"Placement.split: got nearest in layers \[0, 2\], {other} in layers \[1\]"):
        in_force((COPIES, Split.NEAREST), (COPIES, other), (COPIES, Split.NEAREST))

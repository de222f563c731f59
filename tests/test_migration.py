"""Moves between placements: as few as possible, complete, and from the cheapest holders."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_rows import random_row
from timed import timed

from gemopt.migration import Link, count_moves, held, keep_in_place, moves, relabel
from gemopt.placement import EMPTY, Placement
from gemopt.solve import solve
from gemopt.traces import Traces


@st.composite
def rows(draw, *, same_slots=False):
    """Two random valid rows of one layer: copies, empty and unequal slots included."""
    ranks = draw(st.integers(1, 5))
    experts = draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def slots():
        while True:
            counts = rng.integers(0, experts + 1, ranks)
            if counts.sum() >= experts:
                return counts

    first = slots()
    second = first if same_slots else slots()
    return random_row(rng, first, experts), random_row(rng, second, experts), first, second, experts


def by_rank(row, slots):
    return [sorted(part.tolist()) for part in np.split(row, np.cumsum(slots)[:-1])]


@settings(max_examples=200, deadline=None)
@given(rows())
def test_moves_are_as_few_as_the_placements_allow(case):
    before, wanted, old_slots, new_slots, experts = case
    order = keep_in_place(before, wanted, old_slots, new_slots)
    after = wanted[order]
    assert by_rank(after, new_slots) == by_rank(wanted, new_slots)
    listed = moves(before, after, old_slots, new_slots)
    crossing = [m for m in listed if m.link is not Link.LOCAL]
    fresh = held(after, new_slots, experts) & ~held(before, old_slots, experts)
    assert len(crossing) == fresh.sum() == count_moves(before, after, old_slots, new_slots)


@settings(max_examples=200, deadline=None)
@given(rows(), st.integers(1, 3))
def test_moves_deliver_the_wanted_row(case, ranks_per_node):
    before, wanted, old_slots, new_slots, _ = case
    after = wanted[keep_in_place(before, wanted, old_slots, new_slots)]
    nodes = np.arange(len(old_slots)) // ranks_per_node
    rank_before, rank_after = (np.repeat(np.arange(len(s)), s) for s in (old_slots, new_slots))
    result = np.full(len(after), EMPTY)
    for rank in range(len(old_slots)):  # what stays
        size = min(old_slots[rank], new_slots[rank])
        a, b = (int(s[:rank].sum()) for s in (old_slots, new_slots))
        kept = before[a : a + size] == after[b : b + size]
        result[b : b + size][kept] = after[b : b + size][kept]
    crossed = set()
    for move in moves(before, after, old_slots, new_slots, nodes=nodes):
        target = rank_after[move.dst_slot]
        if move.link is Link.RELAY:
            assert result[move.src_slot] == move.expert, "a relay comes after what it relays"
            assert nodes[rank_after[move.src_slot]] == nodes[target]
        else:
            assert before[move.src_slot] == move.expert
            source = rank_before[move.src_slot]
            same = Link.LOCAL if source == target else Link.NODE if nodes[source] == nodes[target] else Link.CROSS
            assert move.link is same
        if move.link is Link.CROSS:
            assert (move.expert, nodes[target]) not in crossed, "an expert crosses to a node once"
            crossed.add((move.expert, nodes[target]))
        assert result[move.dst_slot] == EMPTY
        result[move.dst_slot] = move.expert
    assert (result == after).all()


def test_senders_share_the_work():
    before = np.array([0, 1, 2, 3, 0, 1, 2, 3, EMPTY, EMPTY, EMPTY, EMPTY])
    after = np.array([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3])
    slots = np.array([4, 4, 4])
    sources = [move.src_slot // 4 for move in moves(before, after, slots)]
    assert sorted(sources) == [0, 0, 1, 1]


def test_relabel_keeps_weights_with_their_copies():
    current = Placement(physical_to_logical=[[0, 1, 1, 2]], slots_per_rank=[2, 2], num_experts=3)
    wanted = Placement(
        physical_to_logical=[[1, 0, 2, 1]],
        slots_per_rank=[2, 2],
        num_experts=3,
        split="static",
        split_weights=[[0.25, 1, 1, 0.75]],
    )
    result = relabel(current, wanted)
    assert result.physical_to_logical.tolist() == [[0, 1, 1, 2]]
    assert result.split_weights.tolist() == [[1, 0.25, 0.75, 1]]


@pytest.mark.parametrize("seed", range(3))
def test_nothing_moves_when_only_the_order_differs(seed):
    rng = np.random.default_rng(seed)
    before = rng.permutation(12)
    wanted = np.concatenate([rng.permutation(part) for part in np.split(before, 3)])
    slots = np.array([4, 4, 4])
    assert count_moves(before, wanted, slots) == 0
    assert moves(before, wanted[keep_in_place(before, wanted, slots)], slots) == []


def test_sizes_that_are_hardly_in_bytes_are_said() -> None:
    measured = timed(range(2), lambda n, g: 20 + n * (1 + 0.3 * g), (0, 8, 64))
    traces = Traces(counts=np.random.default_rng(0).integers(0, 9, (4, 2, 5)))
    current = Placement(physical_to_logical=[[0, 1, 2, 3, 4]] * 2, slots_per_rank=[3, 2], num_experts=5)

    def moved(**asked: Any) -> list[str]:
        found = solve(measured, traces, current=current, solver="local-search", patience=0, **asked)
        return [note for note in found.notes if " bytes" in note]

    assert moved(expert_bytes=9) == ["an expert of 9 bytes: is that in bytes, and of one layer?"]
    assert moved(expert_bytes=10**7, bandwidth=0.05) == [
        "experts copied at 0.05 GB/s, 5e+07 bytes per second: is the unit right?"
    ]
    assert moved(expert_bytes=10**7, max_bytes_per_rank=2) == [
        "a rank may receive 2 bytes, and an expert has 1e+07: nothing moves"
    ]
    assert moved(expert_bytes=10**7, bandwidth=50, max_bytes_per_rank=10**8) == []
    within = solve(measured, traces, solver="local-search", patience=0, memory_budget=80.0, expert_bytes=9)
    assert any("an expert of 9 bytes" in each for each in within.notes)

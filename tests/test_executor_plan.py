"""The plan: every stage leaves a servable placement, within the memory budget, with the bytes it claims."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_rows import random_row

from gemopt import InputError, Placement
from gemopt.executor.plan import LayerRow, checksum, layer_rows, plan
from gemopt.migration import Link
from gemopt.placement import EMPTY


def random_placement(rng, slots, experts, layers=2):
    rows = [random_row(rng, slots, experts) for _ in range(layers)]
    return Placement(physical_to_logical=rows, slots_per_rank=slots, num_experts=experts)


def sets(row: LayerRow):
    return [set(part.tolist()) - {EMPTY} for part in np.split(row.row_P, np.cumsum(row.slots_per_rank)[:-1])]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(2, 16), st.integers(1, 3), st.booleans())
def test_every_stage_is_servable_and_within_budget(seed, ranks, experts, limit, spare):
    rng = np.random.default_rng(seed)
    size = min(experts, -(-experts // ranks) + int(spare))
    slots = np.full(ranks, size)
    current, wanted = (layer_rows(random_placement(rng, slots, experts)) for _ in range(2))
    result = plan(current, wanted, [100, 100], budget_bytes=limit * 100)
    rows = list(current)
    for stage in result.stages:
        before, after = rows[stage.layer], stage.after
        arriving = np.bincount([after.rank_of_slot[m.dst_slot] for m in stage.moves], minlength=ranks)
        assert arriving.max() <= limit
        for move, (source, _) in zip(stage.moves, stage.ranks(before), strict=True):
            assert before.row_P[move.src_slot] == move.expert and before.rank_of_slot[move.src_slot] == source
        changed = set(np.flatnonzero(before.row_P != after.row_P)) - set(np.flatnonzero(after.row_P == EMPTY))
        assert changed == {m.dst_slot for m in stage.moves}, "what is not moved did not change"
        contents = sets(after)
        assert set().union(*contents) == set(range(experts)), "every expert is held somewhere"
        assert sum(map(len, contents)) == (after.row_P != EMPTY).sum(), "never twice on a rank"
        rows[stage.layer] = after
    assert [sets(row) for row in rows] == [sets(row) for row in wanted]
    assert result.buffer_bytes() <= limit * 100
    unlimited = plan(current, wanted, [100, 100])
    assert sum(result.bytes().values()) == sum(unlimited.bytes().values()), "cutting costs no extra bytes"


def test_a_cycle_over_all_ranks_moves_one_expert_per_rank_at_a_time():
    current = Placement.contiguous(1, 16, 4)
    wanted = Placement(
        physical_to_logical=np.roll(current.physical_to_logical, 4, axis=1), slots_per_rank=[4] * 4, num_experts=16
    )
    result = plan(layer_rows(current), layer_rows(wanted), [10], budget_bytes=10)
    assert len(result.stages) == 4 and all(len(stage.moves) == 4 for stage in result.stages)


def test_slots_that_change_are_one_stage_and_refused_when_the_buffer_is_too_small():
    current = Placement.contiguous(1, 4, 2)
    wanted = Placement(physical_to_logical=[[0, 1, 2, 3]], slots_per_rank=[3, 1], num_experts=4)
    result = plan(layer_rows(current), layer_rows(wanted), [8], budget_bytes=24)
    assert [stage.rebuild for stage in result.stages] == [True] and result.buffer_bytes() == 24
    with pytest.raises(InputError, match=r"budget_bytes: got 23;.*24 bytes"):
        plan(layer_rows(current), layer_rows(wanted), [8], budget_bytes=23)


def test_a_layer_that_mostly_moves_is_received_into_new_tensors_where_the_budget_allows():
    current = Placement.contiguous(1, 16, 4)
    turned = Placement(
        physical_to_logical=np.roll(current.physical_to_logical, 4, axis=1), slots_per_rank=[4] * 4, num_experts=16
    )
    swapped = [[15, *range(1, 15), 0]]
    pair = Placement(physical_to_logical=swapped, slots_per_rank=[4] * 4, num_experts=16)
    before = layer_rows(current)
    assert [s.rebuild for s in plan(before, layer_rows(turned), [10], budget_bytes=40).stages] == [True]
    assert not any(s.rebuild for s in plan(before, layer_rows(turned), [10], budget_bytes=39).stages)
    in_place = plan(before, layer_rows(pair), [10])
    assert [s.rebuild for s in in_place.stages] == [False] and in_place.buffer_bytes() == 10


def test_relay_crosses_nodes_once():
    current = Placement(physical_to_logical=[[0, 1, 2, EMPTY, 3, EMPTY]], slots_per_rank=[2, 2, 2], num_experts=4)
    wanted = Placement(physical_to_logical=[[0, 1, 2, 0, 3, 0]], slots_per_rank=[2, 2, 2], num_experts=4)
    result = plan(layer_rows(current), layer_rows(wanted), [10**9], nodes=[0, 1, 1])
    assert result.count() == {Link.CROSS: 1, Link.RELAY: 1} and result.stays == 4
    assert result.seconds(node_gbps=10, cross_gbps=1, latency_s=0) == pytest.approx(1.0 + 0.1)


def test_equal_placements_need_no_stage_and_another_split_needs_no_bytes():
    rows = [[0, 1, 1, 2]]
    even = Placement(physical_to_logical=rows, slots_per_rank=[2, 2], num_experts=3)
    near = Placement(physical_to_logical=rows, slots_per_rank=[2, 2], num_experts=3, split="nearest")
    assert plan(layer_rows(even), layer_rows(even), [1]).stages == ()
    (stage,) = plan(layer_rows(even), layer_rows(near), [1]).stages
    assert stage.moves == () and stage.after.split == "nearest"
    assert checksum(layer_rows(even)) != checksum(layer_rows(near))


def test_static_weights_sum_to_one_after_every_stage():
    rng = np.random.default_rng(3)
    slots = [4, 4, 4]
    current = layer_rows(random_placement(rng, slots, 8))
    table = random_placement(rng, slots, 8)
    copies = table.copies()
    weights = [
        [0 if e == EMPTY else 1 / copies[layer, e] for e in row] for layer, row in enumerate(table.physical_to_logical)
    ]
    wanted = layer_rows(table.changed(split="static", split_weights=weights))
    result = plan(current, wanted, [1, 1], budget_bytes=1)
    assert len(result.stages) > 2
    for stage in result.stages:
        full = stage.after.row_P != EMPTY
        sums = np.bincount(stage.after.row_P[full], weights=stage.after.weights_P[full])
        assert np.allclose(sums, 1) and (stage.after.weights_P[~full] == 0).all()


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        (Placement.contiguous(2, 8, 2), "physical_to_logical"),
        (Placement.contiguous(1, 8, 4), "slots_per_rank"),
        (Placement.contiguous(1, 6, 2), "num_experts"),
    ],
)
def test_another_shape_is_refused(wanted, field):
    current = layer_rows(Placement.contiguous(1, 8, 2))
    with pytest.raises(InputError, match=field):
        plan(current, layer_rows(wanted), [1] * len(layer_rows(wanted)))

"""Memory that the executor uses again: only once, no row beyond those replaced, and empty slots stay empty."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gemopt.executor.plan import LayerRow, Stage  # noqa: E402
from gemopt.executor.transfer import Pool, allocate  # noqa: E402
from gemopt.migration import moves  # noqa: E402
from gemopt.placement import EMPTY, Split  # noqa: E402


def test_rows_of_a_layer_become_those_of_the_next():
    pool, like = Pool(), torch.zeros(1, 3)
    first = pool.lend("up", 4, like)
    second = pool.lend("up", 4, like)
    assert first.data_ptr() != second.data_ptr()  # both in force
    pool.take_back({"up": first})
    third = pool.lend("up", 3, like)
    assert third.data_ptr() == first.data_ptr()
    assert third.shape == (3, 3)
    assert pool.lend("up", 3, like).data_ptr() not in {first.data_ptr(), second.data_ptr()}  # given once, not twice
    pool.take_back({"up": third})
    assert pool.lend("up", 4, like).data_ptr() == first.data_ptr()  # the row that was not used is still there


def test_too_few_rows_and_forgotten_rows_are_not_used():
    pool, like = Pool(), torch.zeros(1, 3)
    small = pool.lend("up", 2, like)
    pool.take_back({"up": small})
    assert pool.lend("up", 3, like).shape == (3, 3)
    replaced = pool.lend("up", 5, like)
    pool.keep_only([like])
    pool.take_back({"up": replaced[:4]})
    assert pool.lend("up", 5, like).data_ptr() != replaced.data_ptr()


def test_a_rank_without_rows_keeps_the_shape_of_every_tensor():
    """All tensors without rows have the same address: one must not be taken for another."""
    pool, layer = Pool(), {"down": torch.zeros(1, 3), "up": torch.zeros(1, 5)}
    for count in (0, 0, 0, 3, 2, 0, 4):
        lent = {name: pool.lend(name, count, weight) for name, weight in layer.items()}
        assert {name: weight.shape for name, weight in lent.items()} == {"down": (count, 3), "up": (count, 5)}
        pool.take_back(layer)
        layer = lent


def test_of_a_loaded_tensor_only_its_own_rows_are_used():
    pool, storage = Pool(), torch.zeros(8, 3)
    loaded = storage[:4]
    pool.take_back({"up": loaded})
    assert pool.lend("up", 5, loaded).data_ptr() != loaded.data_ptr()
    pool.take_back({"up": loaded})
    pool.lend("up", 4, loaded).fill_(1)
    assert storage.sum(dim=1).tolist() == [3, 3, 3, 3, 0, 0, 0, 0]


def test_empty_slots_hold_zeros_in_used_memory():
    pool = Pool()
    weights = {"up": torch.arange(6.0).view(2, 3) + 1}
    used = pool.lend("up", 3, weights["up"])
    used.fill_(7)
    pool.take_back({"up": used})
    before = LayerRow(np.array([0, 1]), np.array([2]), Split.EVEN)
    after = LayerRow(np.array([0, EMPTY, 1]), np.array([3]), Split.EVEN)
    (incoming,) = allocate([Stage(0, (), after, True)], [(before, weights)], 0, pool)
    assert incoming.tensors["up"].data_ptr() == used.data_ptr()
    assert incoming.tensors["up"][:2].tolist() == [[1, 2, 3], [0, 0, 0]]


def test_layers_that_travel_together_have_rows_of_their_own():
    """Two layers, of which this rank receives two rows and one; a third alone then has the same memory."""
    pool = Pool()
    layers = [{"up": torch.zeros(2, 3), "down": torch.zeros(2, 2)} for _ in range(2)]
    before = LayerRow(np.array([0, 1, 2, 3]), np.array([2, 2]), Split.EVEN)
    stages = []
    for layer, row in enumerate(([2, 3, 0, 1], [2, 1, 0, 3])):
        after = LayerRow(np.array(row), before.slots_per_rank, Split.EVEN)
        listed = moves(before.row_P, after.row_P, before.slots_per_rank)
        stages.append(Stage(layer, tuple(listed), after, False))
    together = allocate(stages, [(before, weights) for weights in layers], 0, pool)
    assert [part.slots for part in together] == [[0, 1], [0]]
    for number, part in enumerate(together):
        for tensor in part.tensors.values():
            tensor.fill_(number + 1)
    assert [part.tensors[name].unique().tolist() for part in together for name in part.tensors] == [[1], [1], [2], [2]]
    (alone,) = allocate(stages[1:], [(before, layers[1])], 0, pool)
    assert alone.tensors["up"].data_ptr() == together[0].tensors["up"].data_ptr()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("shape", "refused"), [((8, 3), True), ((5, 4), True), ((1,), False), ((3,), False)])
def test_companions_of_experts_that_are_not_sharded_with_them_are_refused(shape, refused, packed):
    """They would stay behind when experts move, on a rank with 4 of 8; also what a kernel keeps in an object."""
    pytest.importorskip("transformers")
    from gemopt import InputError
    from gemopt.executor.expert_parallel import SlotDispatch

    dispatch = object.__new__(SlotDispatch)
    dispatch.num_experts, dispatch.num_local_experts = 8, 4
    dispatch.experts = torch.nn.Module()
    dispatch.experts.register_parameter("down_proj", torch.nn.Parameter(torch.zeros(4, 2)))
    if packed:
        dispatch.experts.gain = SimpleNamespace(shape=torch.Size(shape))
    else:
        dispatch.experts.register_buffer("gain", torch.zeros(shape))
    if refused:
        with pytest.raises(InputError, match=r"experts\.gain: got shape"):
            dispatch._refuse_left_behind({"down_proj": dispatch.experts.down_proj})
    else:
        dispatch._refuse_left_behind({"down_proj": dispatch.experts.down_proj})


@pytest.mark.parametrize("depth", [1, 2])
def test_experts_with_adapters_do_not_move(depth):
    from gemopt import InputError
    from gemopt.executor.checks import check_unwrapped

    model = torch.nn.Module()
    model.experts = torch.nn.Module()
    model.experts.gemopt_dispatch = None
    check_unwrapped(model)
    for _ in range(depth):
        wrapper = torch.nn.Module()
        wrapper.base_layer, model.experts = model.experts, wrapper
    with pytest.raises(InputError, match=r"experts(\.base_layer)+: got experts with an adapter of PEFT"):
        check_unwrapped(model)

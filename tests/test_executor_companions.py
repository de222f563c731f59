"""What lies beside routers and experts in the checkpoints of hubs follows on the right axis, or is refused by name."""

import numpy as np
import pytest
from checkpoint_files import (
    DIFFERENT,
    HIDDEN,
    IN_BLOCKS,
    INNER,
    LAYER,
    ORDER,
    E,
    block_of,
    exporter,
    network,
    router_of,
    rows_of,
    values,
)

from gemopt import InputError
from gemopt.models.families import FAMILIES


@pytest.fixture
def export(tmp_path):
    return exporter(tmp_path)


def order_of(length):
    return [*ORDER, *range(E, length)]


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_tensor_of_every_family_follows(export, name):
    row = FAMILIES[name]
    old = network(row)
    new, _ = export(row, old)
    block, slot_of = block_of(row), np.argsort(ORDER)
    for tensor, axis in row.checkpoint_tensors.items():
        key = f"{block}.{tensor}"
        assert (new[key] == old[key].take(order_of(rows_of(row)), axis=axis)).all(), key
    for slot, expert in enumerate(order_of(rows_of(row))):
        part = f"{block}.experts.{{}}.down_proj.weight"
        assert (new[part.format(slot)] == old[part.format(expert)]).all()
    for tensor in row.hash_tensors:
        assert (new[f"{block}.{tensor}"] == slot_of[old[f"{block}.{tensor}"]]).all()
    for key in (f"{block}.shared_expert.up_proj.weight", f"model.layers.{LAYER}.self_attn.o_proj.weight"):
        assert (new[key] == old[key]).all(), "has nothing to do with experts"


# Companion of a router: shape of R rows, type, the axis that follows (None: it stays).
COMPANIONS = {
    "FP8 by row": ("weight_scale", lambda r: (r, 1), "f4", 0),
    "FP8 by tensor": ("weight_scale", lambda _: (1,), "f4", None),
    "FP8 by block": ("weight_scale_inv", lambda r: (r, 2), "f4", 0),
    "one block": ("weight_scale_inv", lambda _: (1, 2), "f4", None),
    "scale of the input": ("input_scale", lambda _: (1,), "f4", None),
    "a bias the family does not have": ("bias", lambda r: (r,), "f4", 0),
    "a correction bias": ("e_score_correction_bias", lambda r: (r,), "f4", 0),
    "one in a row": ("e_score_correction_bias", lambda r: (1, r), "f4", 1),
    "NVFP4": ("weight_scale", lambda r: (r, 3), "u1", 0),
    "global scale": ("weight_scale_2", lambda _: (1,), "f4", None),
    "compressed-tensors": ("weight_packed", lambda r: (r, 5), "i4", 0),
    "its zero points by row": ("weight_zero_point", lambda r: (r, 1), "i1", 0),
    "its shape": ("weight_shape", lambda _: (2,), "i8", None),
    "GPTQ": ("qweight", lambda r: (5, r), "i4", 1),
    "GPTQ scales": ("scales", lambda r: (3, r), "f2", 1),
    "GPTQ groups": ("g_idx", lambda _: (HIDDEN,), "i4", None),
    "MLX scales": ("scales", lambda r: (r, 3), "f2", 0),
    "MLX biases": ("biases", lambda r: (r, 3), "f2", 0),
    "int8 of bitsandbytes": ("SCB", lambda r: (r,), "f4", 0),
}


@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize("case", COMPANIONS)
def test_companions_of_the_router_follow(export, name, case):
    row = FAMILIES[name]
    companion, shape, dtype, axis = COMPANIONS[case]
    old = network(row)
    key = f"{router_of(row)}.{companion}"
    if key in old:
        pytest.skip("a tensor of the family, tested with it")
    old[key] = values(shape(rows_of(row)), dtype)
    new, _ = export(row, old)
    assert (new[key] == (old[key] if axis is None else old[key].take(order_of(rows_of(row)), axis=axis))).all()


# Beside the router or among stacked experts, refused: it may be by expert, and nothing says on which axis.
REFUSED = {
    "invented, beside the router": ("{router}.temperature", (E,), "f4"),
    "invented, in the block": ("{block}.expert_gain", (E, 3), "f4"),
    "invented, on another axis": ("{block}.routing.mix", (3, E), "f4"),
    "flattened": ("{router}.absmax", (E * 7,), "f4"),
    "ids of experts": ("{block}.fallback", (5,), "i8"),
    "packed zero points": ("{router}.qzeros", (3, E // 8), "i4"),
    "AWQ": ("{router}.qweight", (HIDDEN, E // 8), "i4"),
    "packed by expert": ("{router}.weight_zero_point", (E // 8, 3), "i4"),
    "all in one word": ("{router}.weight_zero_point", (1, 3), "i4"),
    "blocks of several experts": ("{router}.weight_scale_inv", (2, 5), "f4"),
    "transposed": ("{router}.weight_scale", (1, E), "f4"),
    "either axis": ("{router}.scales", (E, E), "f4"),
    "a table of all layers": ("model.expert_bias", (2, E), "f4"),
    "beside the block": (f"model.layers.{LAYER}.router_gain", (E,), "f4"),
    "beside the block, of another name": (f"model.layers.{LAYER}.correction_bias", (E,), "f4"),
    "a gate beside the block": (f"model.layers.{LAYER}.choice.gate.bias", (1, E), "f4"),
    "shared by name, one for each by shape": ("{block}.shared_bias", (E,), "f4"),
    "outside the layers": ("model.routing_bias", (E,), "f4"),
    "of all layers together": ("model.routing_bias", (2, E), "f4"),
    "another name of the experts": ("{block}.switch_mlp.up_proj.weight", (E, 4, 3), "f4"),
    "invented, beside stacked experts": ("{block}.experts.down_proj_gain", (E, 3), "f4"),
    "flattened stacked experts": ("{block}.experts.up_proj", (E * 6, 1), "u1"),
    "stacked on another axis": ("{block}.experts.up_proj", (3, E, 4), "f4"),
    "an expert too many": ("{block}.experts.40.down_proj.weight", (3, 4), "f4"),
}


@pytest.mark.parametrize("name", IN_BLOCKS)
@pytest.mark.parametrize("case", REFUSED)
def test_what_no_rule_covers_is_refused_by_name(export, name, case):
    row = FAMILIES[name]
    pattern, shape, dtype = REFUSED[case]
    key = pattern.format(router=router_of(row), block=block_of(row))
    with pytest.raises(InputError) as error:
        export(row, network(row) | {key: values(shape, dtype)})
    told = str(error.value)
    assert told.startswith(key + ": got ") and ("expert 40" in told or str(list(shape)) in told)
    assert not export.out.exists()


def test_a_flattened_router_is_not_taken_for_rows(export):
    """4 bits of bitsandbytes: [E * hidden / 2, 1] bytes, more rows than experts."""
    row = FAMILIES["qwen3_moe"]
    tensors = network(row) | {f"{router_of(row)}.weight": values((E * HIDDEN // 2, 1), "u1")}
    with pytest.raises(InputError, match=r"gate\.weight: got shape \[320, 1\] U8"):
        export(row, tensors)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("{block}.norm.weight", (HIDDEN,)),
        ("{block}.scale", (1,)),
        ("some_moe.model.layers.1.self_attn.k_proj.weight", (E, HIDDEN)),
        ("model.layers.0.mlp.gate.temperature", (E,)),
        ("model.layers.1.self_attn.sinks", (E,)),
        ("model.layers.1.post_attention_layernorm.weight", (E,)),
        ("model.layers.1.hc_scale", (HIDDEN,)),
        ("model.layers.1.mlp.shared_experts.up_proj.bias", (E,)),
        ("model.mtp.layers.1.mlp.gate.weight", (E, HIDDEN)),
        ("mtp.layers.1.mlp.experts.3.down_proj.weight", (HIDDEN, INNER)),
        ("model.layers.2.mlp.gate.weight", (E, HIDDEN)),
    ],
)
def test_what_has_no_axis_of_experts_stays(export, key, shape):
    """Norms and scalars of the block, layers that the placement leaves out, heads that predict further tokens."""
    row = FAMILIES["qwen3_moe"]
    key = key.format(block=block_of(row))
    tensor = values(shape)
    new, _ = export(row, network(row) | {key: tensor})
    assert (new[key] == tensor).all()


@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize(
    ("part", "shape", "dtype"),
    [
        ("down_proj_blocks", (E, 5, 3, 16), "u1"),
        ("down_proj_scales", (E, 5, 3), "u1"),
        ("gate_up_proj_bias", (E, 6), "f4"),
        ("gate_up_proj_scale_inv", (E, 2, 1), "f4"),
        ("down_proj.weight_scale", (E,), "f4"),
        ("down_proj_input_scale", (1,), "f4"),
    ],
)
def test_companions_of_stacked_experts_follow(export, name, part, shape, dtype):
    row = FAMILIES[name]
    block = block_of(row)
    old = {key: tensor for key, tensor in network(row).items() if ".experts." not in key}
    old |= {f"{block}.experts.gate_up_proj": values((E, 6, 7)), f"{block}.experts.{part}": values(shape, dtype)}
    new, _ = export(row, old)
    for key in (f"{block}.experts.gate_up_proj", f"{block}.experts.{part}"):
        assert (new[key] == (old[key][ORDER] if len(old[key]) == E else old[key])).all(), key


def test_numbers_of_experts_inside_a_name(export):
    """As 4-bit files of gpt-oss have them; companions differ from expert to expert where one is not quantised."""
    row = FAMILIES["gpt_oss"]
    block = block_of(row)
    old = {key: tensor for key, tensor in network(row).items() if ".experts." not in key}
    for e in range(E):
        old[f"{block}.experts.down_projs.{e}.weight"] = values((30, 1), "u1")
        if e != 3:
            old[f"{block}.experts.down_projs.{e}.weight.absmax"] = values((4,))
    new, _ = export(row, old)
    for slot, expert in enumerate(ORDER):
        for part in ("weight", "weight.absmax"):
            before = old.get(f"{block}.experts.down_projs.{expert}.{part}")
            after = new.get(f"{block}.experts.down_projs.{slot}.{part}")
            assert (before is None and after is None) or (before == after).all()


def test_a_missing_projection_of_one_expert(export):
    row = FAMILIES["qwen3_moe"]
    tensors = network(row)
    tensors |= {f"{block_of(row)}.experts.{e}.up_proj.weight": values((3,)) for e in range(E - 1)}
    with pytest.raises(InputError, match="layer 1: got tensors of 16 experts"):
        export(row, tensors)


def test_two_networks_in_one_checkpoint(export):
    row = FAMILIES["qwen3_moe"]
    tensors = network(row)
    tensors |= {f"talker.{key}": tensor for key, tensor in tensors.items()}
    with pytest.raises(InputError, match=r"layer 1: got below model\. and talker\.model\."):
        export(row, tensors)

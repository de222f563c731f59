"""Small checkpoints as hubs have them, one for each way to name tensors, and their export in another order."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

from gemopt import Placement
from gemopt.executor import export_checkpoint
from gemopt.models.families import FAMILIES

# Of the families whose files have the same names, the first.
NAMES_IN_FILES = ("checkpoint_blocks", "checkpoint_tensors", "checkpoint_experts", "hash_tensors", "identity_experts")
DIFFERENT = list(
    {repr([getattr(r, n) for n in NAMES_IN_FILES]): name for name, r in reversed(FAMILIES.items())}.values()
)
IN_BLOCKS = [name for name in DIFFERENT if FAMILIES[name].checkpoint_blocks]
E, HIDDEN, INNER, LAYER, IDENTITY = 16, 40, 24, 1, 4
ORDER = [5, 0, 9, 14, 2, 7, 11, 1, 3, 15, 8, 4, 13, 6, 12, 10]
PLACEMENT = Placement(physical_to_logical=[ORDER], slots_per_rank=[8, 8], num_experts=E, layer_ids=[LAYER])
RNG = np.random.default_rng(0)


def values(shape, dtype="f4"):
    """Different ones everywhere, so that every wrong order shows."""
    return RNG.permutation(int(np.prod(shape))).reshape(shape).astype(dtype)


def block_of(row):
    return ".".join([f"model.layers.{LAYER}", *row.checkpoint_blocks[:1]])


def router_of(row):
    weight = next(name for name in row.checkpoint_tensors if name.endswith(".weight"))
    return f"{block_of(row)}.{weight.removesuffix('.weight')}"


def rows_of(row):
    return E + (IDENTITY if row.identity_experts else 0)


def network(row):
    """Tensors of a small checkpoint of a family: router, one projection of every expert, a shared expert, attention."""
    block, rows = block_of(row), rows_of(row)
    made = {
        f"{block}.{name}": values((rows, HIDDEN) if name.endswith("weight") else (1, rows) if axis else (rows,))
        for name, axis in row.checkpoint_tensors.items()
    }
    made |= {f"{block}.experts.{e}.down_proj.weight": values((HIDDEN, INNER)) for e in range(rows)}
    made |= {f"{block}.{name}": values((3, 2), "i8") % E for name in row.hash_tensors}
    made[f"{block}.shared_expert.up_proj.weight"] = values((E, HIDDEN))
    made[f"model.layers.{LAYER}.self_attn.o_proj.weight"] = values((E, E))
    return made


def config_of(row, **more):
    special = {row.identity_experts[0]: IDENTITY} if row.identity_experts else {}
    groups = {"n_group": 1, "topk_group": 1} if row.group_defaults else {}
    return {
        "model_type": row.model_type,
        row.num_experts: E,
        "num_hidden_layers": 2,
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INNER,
        **special,
        **groups,
        **more,
    }


def exporter(folder):
    """Exports a network's tensors, with fields of its config, from `in` to `out`; returns both as they then are."""

    def run(row, tensors, **more):
        (folder / "in").mkdir(exist_ok=True)
        save_file(tensors, folder / "in" / "model.safetensors")
        (folder / "in" / "config.json").write_text(json.dumps(config_of(row, **more)))
        result = export_checkpoint(PLACEMENT, folder / "in", run.out)
        return load_file(result / "model.safetensors"), json.loads((result / "config.json").read_text())

    run.out = folder / "out"
    return run

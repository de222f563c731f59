"""What renumbering the experts of a network means for the tensors of its checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError, UnsupportedError
from gemopt.models.families import Family, TensorRole, family, renamed, tensor_role
from gemopt.placement import Placement

IntArray = NDArray[np.int64]
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # transformers writes one name or another
GROUP_DEFAULTS = {"deepseek_v3": (8, 4)}  # where config.json leaves them out


@dataclass(frozen=True)
class Permutation:
    """Of the experts of every MoE layer, by layer id: new slot -> expert [E]."""

    family: Family
    expert_of: Mapping[int, IntArray]

    def role(self, name: str) -> TensorRole | None:
        """Role of a tensor whose layer is permuted."""
        role = tensor_role(self.family, name)
        if role is None or role.layer not in self.expert_of or role.expert >= len(self.expert_of[role.layer]):
            return None  # identity experts, numbered after the real ones, stay
        return role

    def slot_of(self, layer: int) -> IntArray:
        """[E] new slot of every expert."""
        return np.argsort(self.expert_of[layer])

    def new_name(self, name: str) -> str:
        """What the tensor is called in the new checkpoint."""
        role = self.role(name)
        if role is None or role.kind != "expert":
            return name
        return renamed(name, int(self.slot_of(role.layer)[role.expert]))


def permutation_of(placement: Placement, config: Mapping[str, Any]) -> Permutation:
    """New slot -> expert of every layer, with the slots of a rank ordered to keep routing groups together."""
    text = config.get("text_config", config)
    row = family(str(text.get("model_type", "")))
    if placement.has_copies or placement.has_empty_slots or not placement.equal_slots:
        raise UnsupportedError(
            "Placement.slots_per_rank",
            placement.slots_per_rank.tolist(),
            "a checkpoint holds every expert once and contiguous expert parallelism gives every rank equally many",
            "solve without spare slots, or apply this placement to a live model (gemopt apply)",
        )
    experts = next((text[key] for key in (row.num_experts, *EXPERT_COUNTS) if key in text), None)
    if experts != placement.num_experts:
        raise InputError("Placement.num_experts", placement.num_experts, f"the checkpoint has {experts} experts")
    layers = text.get("num_hidden_layers")
    if isinstance(layers, int) and placement.layer_ids[-1] >= layers:
        raise InputError("Placement.layer_ids", placement.layer_ids[-1], f"the checkpoint has {layers} decoder layers")
    groups = _groups(text, row)
    rows = zip(placement.layer_ids, placement.physical_to_logical, strict=True)
    slots = int(placement.slots_per_rank[0])
    return Permutation(row, {i: p if groups is None else _grouped(p, slots, groups, i) for i, p in rows})


def _groups(config: Mapping[str, Any], row: Family) -> int | None:
    """Blocks of consecutive experts that routing chooses between; None where any expert can be chosen."""
    groups, kept = (config.get(key) for key in ("n_group", "topk_group"))
    if groups is None and row.groups == "n_group":
        groups, kept = GROUP_DEFAULTS.get(row.model_type, (None, None))
    limited = row.groups == "n_group" or (
        row.groups == "topk_method" and config.get("topk_method") == "group_limited_greedy"
    )
    return int(groups) if limited and groups and kept and groups > 1 and kept < groups else None


def _grouped(row_E: IntArray, slots: int, groups: int, layer: int) -> IntArray:
    """Order the slots of each rank so that every block of E / groups slots holds one routing group, or refuse."""
    size = len(row_E) // groups
    if not _mixed(row_E, size):
        return row_E
    blocks: list[int] = []
    for rank in range(len(row_E) // slots):
        mine = row_E[rank * slots : (rank + 1) * slots].tolist()
        held = Counter(expert // size for expert in mine)
        begun = blocks[-1] // size if len(blocks) % size else -1

        def key(
            expert: int, held: Counter[int] = held, begun: int = begun
        ) -> tuple[int, int]:  # begun block, whole groups, beginning
            group = expert // size
            return (0 if group == begun else 1 if held[group] == size else 2), group

        blocks += sorted(mine, key=key)
    result = np.array(blocks)
    if mixed := _mixed(result, size):
        block, found = mixed[0]
        raise UnsupportedError(
            f"physical_to_logical[layer {layer}]",
            f"slots {block * size} to {(block + 1) * size - 1} mix routing groups {found}",
            f"routing is limited to the best of {groups} groups of {size} consecutive experts, "
            "so a checkpoint must keep each group together",
            "place whole groups on ranks, or use an engine that maps slots itself (gemopt export --to sglang, "
            "tensorrt-llm or vllm-ascend) or gemopt apply",
        )
    return result


def _mixed(row_E: IntArray, size: int) -> list[tuple[int, list[int]]]:
    """Blocks of slots that hold experts of several groups, and those groups."""
    blocks = [np.unique(block // size).tolist() for block in row_E.reshape(-1, size)]
    return [(index, groups) for index, groups in enumerate(blocks) if len(groups) > 1]


def check_coverage(permutation: Permutation, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    """Refuse a checkpoint in which a layer's router or experts are not where the family has them."""
    experts = {layer: len(order) for layer, order in permutation.expert_of.items()}
    routers: set[int] = set()
    stacked: set[int] = set()
    single = {layer: Counter[int]() for layer in experts}
    for name, shape in shapes:
        role = permutation.role(name)
        if role is None:
            continue
        if role.kind == "expert":
            single[role.layer][role.expert] += 1
        elif role.kind in ("router", "stacked"):
            size = shape[role.dim] if role.dim < len(shape) else 0
            if size < experts[role.layer] or (role.kind == "stacked" and size > experts[role.layer]):
                raise InputError(name, f"shape {shape}", f"{experts[role.layer]} along axis {role.dim}")
            (routers if role.kind == "router" else stacked).add(role.layer)
    for layer, count in experts.items():
        whole = len(single[layer]) == count and len(set(single[layer].values())) == 1
        if layer not in routers or not (whole or layer in stacked):
            what = "no router" if layer not in routers else f"tensors of {len(single[layer])} experts"
            model_type = permutation.family.model_type
            raise InputError(f"layer {layer}", what, f"a router and {count} experts, named as {model_type} names them")

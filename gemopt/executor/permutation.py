"""What renumbering the experts of a network means for the tensors of its checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError, UnsupportedError
from gemopt.executor.following import Sizes, following_axis
from gemopt.models.checkpoint_names import TensorRole, renamed, tensor_role
from gemopt.models.families import Family, family
from gemopt.placement import Placement

IntArray = NDArray[np.int64]
# transformers writes one name or another, and so do publishers
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TEXTS = (
    "text_config",
    "llm_config",
    "language_config",
)  # of networks that also see or hear
GROUPS = (("n_group", "num_expert_group"), ("topk_group",))  # names of how many there are, of how many are kept


class TensorInfo(Protocol):
    """What the header of a file says of a tensor; `dtype` as safetensors names types."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Permutation:
    """Of the experts of every MoE layer, by layer id: new slot -> expert [E]; `layers`: how many the decoder has."""

    family: Family
    expert_of: Mapping[int, IntArray]
    sizes: Sizes
    layers: int

    def role(self, name: str) -> TensorRole | None:
        """Role of a tensor whose layer is permuted."""
        role = tensor_role(self.family, name)
        if role is None or role.layer not in (-1, *self.expert_of):
            return None
        if self.sizes.experts <= role.expert < self.sizes.rows[1]:
            return None  # identity experts, numbered after the real ones, stay
        if role.expert >= self.sizes.experts:
            raise InputError(name, f"expert {role.expert}", f"the checkpoint has {self.sizes.experts} experts")
        return role

    def axis(self, role: TensorRole, tensor: TensorInfo) -> int | None:
        """Axis of a tensor on which `order` applies; None where its values stay as they are."""
        if role.kind in ("expert", "hash"):
            return None
        return following_axis(role, tensor.name, tensor.shape, tensor.dtype, self.sizes)

    def order(self, layer: int, rows: int) -> IntArray:
        """[rows] old position of every new one along an axis of experts; identity experts stay."""
        order = self.expert_of[layer]
        return np.concatenate([order, np.arange(len(order), rows)])

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
    text = text_part(config)
    row = family(str(text.get("model_type", "")))
    if placement.has_copies or placement.has_empty_slots or not placement.equal_slots:
        raise UnsupportedError(
            "Placement.slots_per_rank",
            placement.slots_per_rank.tolist(),
            "a checkpoint holds every expert once and contiguous expert parallelism gives every rank equally many",
            "solve without spare slots, or apply this placement to a live model (gemopt apply)",
        )
    check_experts(placement, text, row)
    layers, known = decoder_layers(text), placement.num_hidden_layers
    if layers is not None and (placement.layer_ids[-1] >= layers or known not in (None, layers)):
        found = f"{known} decoder layers" if known else f"layer {placement.layer_ids[-1]}"
        raise InputError("Placement.num_hidden_layers", found, f"the checkpoint has {layers} decoder layers")
    groups = _groups(text, row)
    rows = zip(placement.layer_ids, placement.physical_to_logical, strict=True)
    slots = int(placement.slots_per_rank[0])
    order = {i: p if groups is None else _grouped(p, slots, groups, i) for i, p in rows}
    field, missing = row.identity_experts or ("", 0)
    sizes = Sizes.of(text, placement.num_experts, int(text.get(field, missing)))
    return Permutation(row, order, sizes, placement.layer_ids[-1] + 1 if layers is None else layers)


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config says of the network of language in it."""
    return next((config[key] for key in TEXTS if isinstance(config.get(key), Mapping) and config[key]), config)


def check_experts(placement: Placement, config: Mapping[str, Any], row: Family) -> None:
    """Refuse a placement of another number of experts than the text part of a config has."""
    experts = next((config[key] for key in (row.num_experts, *EXPERT_COUNTS) if key in config), None)
    if experts != placement.num_experts:
        raise InputError("Placement.num_experts", placement.num_experts, f"the checkpoint has {experts} experts")


def decoder_layers(config: Mapping[str, Any]) -> int | None:
    """How many the text part of a config has; None where it does not say."""
    layers = config.get("num_hidden_layers")
    if layers is None and isinstance(kinds := config.get("layers_block_type"), list):
        return len(kinds)  # of hybrid networks
    return layers if isinstance(layers, int) else None


def _groups(config: Mapping[str, Any], row: Family) -> int | None:
    """Blocks of consecutive experts that routing chooses between; None where any expert can be chosen."""
    defaults = row.group_defaults or (None, None)
    groups, kept = (
        next((config[name] for name in names if config.get(name) is not None), default)
        for names, default in zip(GROUPS, defaults, strict=True)
    )
    # Whatever the family and its topk_method: engines differ in when they heed the groups of a config.
    return int(groups) if groups and kept and groups > 1 and kept < groups else None


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


def check_coverage(permutation: Permutation, tensors: Iterable[TensorInfo]) -> None:
    """Refuse a checkpoint in which a layer's router or experts are not where the family has them, all of them."""
    routers: set[int] = set()
    left: set[int] = set()
    stacked: set[int] = set()
    stacks: dict[int, set[str]] = {layer: set() for layer in permutation.expert_of}
    modules: dict[int, dict[str, set[int]]] = {layer: {} for layer in permutation.expert_of}
    for tensor in tensors:
        role = permutation.role(tensor.name)
        if role is None:
            other = tensor_role(permutation.family, tensor.name)
            if other is not None and other.kind == "router" and 0 <= other.layer < permutation.layers:
                left.add(other.layer)
            continue
        permutation.axis(role, tensor)
        if role.layer in stacks and role.kind not in ("unknown", "outside"):
            stacks[role.layer].add(role.stack)
        if role.kind == "expert":
            modules[role.layer].setdefault(role.module, set()).add(role.expert)
        elif role.kind in ("router", "stacked") and role.is_weight:
            (routers if role.kind == "router" else stacked).add(role.layer)
    experts = permutation.sizes.experts
    for layer, found in modules.items():
        model_type = permutation.family.model_type
        needed = f"a router and {experts} experts, named as {model_type} names them"
        single = set().union(*found.values())
        if layer not in routers:
            raise InputError(f"layer {layer}", "no router", needed)
        if any(len(held) != experts for held in found.values()) or not (found or layer in stacked):
            raise InputError(f"layer {layer}", f"tensors of {len(single)} experts", needed)
        if len(stacks[layer]) > 1:
            where = f"below {' and '.join(sorted(stacks[layer]))}"
            raise InputError(f"layer {layer}", where, "one stack of layers", "take the networks of a checkpoint apart")
    if left:
        limit = f"every MoE layer: the checkpoint has experts in {', '.join(map(str, sorted(left)))} too"
        hint = "solve with traces of all layers"
        raise InputError("Placement.layer_ids", ", ".join(map(str, permutation.expert_of)), limit, hint)

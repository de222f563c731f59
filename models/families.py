"""What differs between families of MoE networks, in one table: module names, checkpoint names, routing rules.

The modules are those of transformers 5, where a MoE block holds a router and one module with all experts stacked
along the first axis. Checkpoint files keep older names, with one tensor per expert in most families and all of a
layer's experts in one tensor in the others. Nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gemopt.exceptions import InputError

GATE: Mapping[str, int] = {"gate.weight": 0}
GATE_WITH_BIAS: Mapping[str, int] = {"gate.weight": 0, "gate.e_score_correction_bias": 0}


@dataclass(frozen=True)
class Family:
    """One family of MoE networks.

    Attributes
    ----------
    model_type
        transformers' `config.model_type` (of the text part, for models that also see or hear).
    router
        Attribute of the MoE block that holds the router; the experts are always in `experts`.
    router_tensors
        Tensors with an expert axis outside `experts`: name relative to the MoE block -> that axis.
    num_experts, top_k
        Names of the fields of the text config.
    groups
        When group-limited routing is on: `never`, `n_group` (more than one group, not all of them kept) or
        `topk_method` (the same, and `topk_method == "group_limited_greedy"`).
    scores
        The router returns (scores [N, E], logits [N, E]) instead of (logits, weights [N, K], ids [N, K]).
    hash_tensors
        Tensors, relative to the MoE block, whose *values* are expert ids (a fixed table token id -> experts).
    checkpoint_blocks
        Names of the MoE block in checkpoint files, between `layers.N.` and the tensor's own name.
    checkpoint_tensors
        As `router_tensors`, as checkpoint files name them.
    """

    model_type: str
    router: str = "gate"
    router_tensors: Mapping[str, int] = field(default_factory=lambda: GATE)
    num_experts: str = "num_experts"
    top_k: str = "num_experts_per_tok"
    groups: Literal["never", "n_group", "topk_method"] = "never"
    scores: bool = False
    hash_tensors: tuple[str, ...] = ()
    checkpoint_blocks: tuple[str, ...] = ("mlp",)
    checkpoint_tensors: Mapping[str, int] = field(default_factory=lambda: GATE)


_TABLE = (
    Family("mixtral", num_experts="num_local_experts", checkpoint_blocks=("block_sparse_moe",)),
    Family(
        "minimax_m2",
        num_experts="num_local_experts",
        router_tensors={"gate.weight": 0, "e_score_correction_bias": 0},
        checkpoint_blocks=("block_sparse_moe",),
        checkpoint_tensors={"gate.weight": 0, "e_score_correction_bias": 0},
    ),
    Family("qwen2_moe"),
    Family("qwen3_moe"),
    Family("qwen3_next"),
    Family("olmoe"),
    Family("deepseek_v2", num_experts="n_routed_experts", groups="topk_method"),
    Family(
        "deepseek_v3",
        num_experts="n_routed_experts",
        groups="n_group",
        router_tensors=GATE_WITH_BIAS,
        checkpoint_tensors=GATE_WITH_BIAS,
    ),
    Family(
        "deepseek_v4",
        num_experts="n_routed_experts",
        router_tensors=GATE_WITH_BIAS,
        hash_tensors=("gate.tid2eid",),
        checkpoint_blocks=("mlp", "ffn"),
        checkpoint_tensors={**GATE_WITH_BIAS, "gate.bias": 0},
    ),
    Family(
        "glm4_moe",
        num_experts="n_routed_experts",
        groups="n_group",
        router_tensors=GATE_WITH_BIAS,
        checkpoint_tensors=GATE_WITH_BIAS,
    ),
    Family(
        "ernie4_5_moe",
        num_experts="moe_num_experts",
        top_k="moe_k",
        router_tensors={"gate.weight": 0, "gate.moe_statics.e_score_correction_bias": 1},
        checkpoint_tensors={"gate.weight": 0, "moe_statics.e_score_correction_bias": 1},
    ),
    Family(
        "gpt_oss",
        router="router",
        num_experts="num_local_experts",
        router_tensors={"router.weight": 0, "router.bias": 0},
        checkpoint_tensors={"router.weight": 0, "router.bias": 0},
    ),
    Family(
        "llama4_text",
        router="router",
        num_experts="num_local_experts",
        scores=True,
        router_tensors={"router.weight": 0},
        checkpoint_blocks=("feed_forward",),
        checkpoint_tensors={"router.weight": 0},
    ),
    # The router has rows for `zero_expert_num` identity experts after those of the real ones.
    Family(
        "longcat_flash",
        router="router",
        num_experts="n_routed_experts",
        top_k="moe_topk",
        router_tensors={"router.classifier.weight": 0, "router.e_score_correction_bias": 0},
        checkpoint_tensors={
            "router.classifier.weight": 0,
            "router.classifier.bias": 0,
            "router.e_score_correction_bias": 0,
        },
    ),
)
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _TABLE}
_ALIASES = {"llama4": "llama4_text"}


def family(model_type: str) -> Family:
    """The row of `FAMILIES` for a `config.model_type`; `InputError` naming the known ones."""
    found = FAMILIES.get(_ALIASES.get(model_type, model_type))
    if found is None:
        raise InputError(
            "model_type",
            model_type,
            f"known MoE families: {', '.join(sorted(FAMILIES))}",
            "add a row to gemopt.models.families",
        )
    return found


@dataclass(frozen=True)
class TensorRole:
    """What renumbering the experts of a layer means for one checkpoint tensor.

    `router` and `stacked`: index the axis `dim` (a router may have more rows than experts: the rest stays).
    `expert`: all of this tensor belongs to `expert`, so it gets a new name (`renamed`).
    `hash`: the values are expert ids.
    """

    kind: Literal["router", "stacked", "expert", "hash"]
    layer: int
    dim: int = 0
    expert: int = -1


def tensor_role(family: Family, name: str) -> TensorRole | None:
    """Role of a checkpoint tensor, None where experts have no part (attention, dense and shared layers, ...).

    Quantisation companions (`..._scale_inv`, `..._blocks`, `..._scales`) have the role of the tensor they belong to.
    `layer` counts as the file does; a multi-token-prediction layer comes after the last decoder layer.
    """
    place = re.fullmatch(rf"(?:.+\.)?layers\.(\d+)\.(?:{'|'.join(family.checkpoint_blocks)})\.(.+)", name)
    if place is None:
        return None
    layer, rest = int(place[1]), place[2]
    if rest in family.checkpoint_tensors:
        return TensorRole("router", layer, dim=family.checkpoint_tensors[rest])
    if rest in family.hash_tensors:
        return TensorRole("hash", layer)
    expert = re.match(r"experts\.(?:(\d+)\.)?", rest)
    if expert is None:
        return None
    # Either form occurs in every family: files of some publishers stack the experts or take them apart.
    return TensorRole("expert", layer, expert=int(expert[1])) if expert[1] else TensorRole("stacked", layer)


def renamed(name: str, expert: int) -> str:
    """Name of a per-expert checkpoint tensor when it becomes that of `expert`."""
    head, tail = re.fullmatch(r"(.*\.experts\.)\d+(\..*)", name).groups()  # type: ignore[union-attr]
    return f"{head}{expert}{tail}"

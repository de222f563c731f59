"""What differs between families of MoE networks, in one table: module names, checkpoint names, routing rules.

The modules are those of transformers 5, where a MoE block holds a router and one module with all experts stacked
along the first axis. Checkpoint files keep older names, with one tensor per expert in most families and all of a
layer's experts in one tensor in the others. Nothing here needs torch.
"""

from __future__ import annotations

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
    identity_experts
        Name of the field with the number of experts that do nothing, numbered after the real ones; the number where
        config.json leaves it out.
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
    identity_experts: tuple[str, int] | None = None


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
        identity_experts=("zero_expert_num", 256),
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

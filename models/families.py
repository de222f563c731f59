"""What differs between families of MoE networks, in one table: module names, checkpoint names, routing rules.

The modules are those of transformers 5, where a MoE block holds a router and one module with all experts stacked
along the first axis. Checkpoint files keep older names, with one tensor per expert in most families and all of a
layer's experts in one tensor in the others. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gemopt.exceptions import InputError

GATE: Mapping[str, int] = {"gate.weight": 0}
GATE_WITH_BIAS: Mapping[str, int] = {"gate.weight": 0, "gate.e_score_correction_bias": 0}
GATE_AND_BIAS: Mapping[str, int] = {"gate.weight": 0, "e_score_correction_bias": 0}
ROUTER: Mapping[str, int] = {"router.weight": 0}


@dataclass(frozen=True)
class Family:
    """One family of MoE networks.

    Attributes
    ----------
    model_type
        transformers' `config.model_type` (of the text part, for models that also see or hear).
    router
        Attribute of the MoE block (or of the layer) that holds the router; the experts are always in `experts`.
    router_tensors
        Tensors with an expert axis outside `experts`: name relative to the MoE block -> that axis.
    num_experts, top_k
        Names of the fields of the text config.
    group_defaults
        Of group-limited routing: groups of experts, and how many are kept, where config.json leaves them out.
    scores
        The router returns (scores [N, E], logits [N, E]) instead of (logits, weights [N, K], ids [N, K]).
    hash_tensors
        Tensors, relative to the MoE block, whose *values* are expert ids (a fixed table token id -> experts).
    checkpoint_blocks
        Names of the MoE block in checkpoint files, between `layers.N.` and the tensor's own name; none where router
        and experts are parts of the layer itself.
    checkpoint_tensors
        As `router_tensors`, as checkpoint files name them.
    checkpoint_experts
        Modules of stacked experts that checkpoint files have beside `experts`, relative to the MoE block.
    identity_experts
        Name of the field with the number of experts that do nothing, numbered after the real ones; the number where
        config.json leaves it out.
    """

    model_type: str
    router: str = "gate"
    router_tensors: Mapping[str, int] = field(default_factory=lambda: GATE)
    num_experts: str = "num_experts"
    top_k: str = "num_experts_per_tok"
    group_defaults: tuple[int, int] | None = None
    scores: bool = False
    hash_tensors: tuple[str, ...] = ()
    checkpoint_blocks: tuple[str, ...] = ("mlp",)
    checkpoint_tensors: Mapping[str, int] = field(default_factory=lambda: GATE)
    checkpoint_experts: tuple[str, ...] = ()
    identity_experts: tuple[str, int] | None = None


def _rows(*model_types: str, like: Family = Family(""), **fields: Any) -> dict[str, Family]:
    return {model_type: replace(like, model_type=model_type, **fields) for model_type in model_types}


_LOCAL = Family("", num_experts="num_local_experts")
_DEEPSEEK = Family(
    "",
    num_experts="n_routed_experts",
    group_defaults=(1, 1),
    router_tensors=GATE_WITH_BIAS,
    checkpoint_tensors=GATE_WITH_BIAS,
)
_MINIMAX_M2 = replace(_LOCAL, router_tensors=GATE_AND_BIAS, checkpoint_tensors=GATE_AND_BIAS)
_ROUTER = Family("", router="router", router_tensors=ROUTER, checkpoint_tensors=ROUTER)
FAMILIES: dict[str, Family] = {
    **_rows("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "qwen4_exp_text", "lara_mini"),
    **_rows("olmoe", "flex_olmo", "cohere2_moe", "flint"),
    **_rows("qwen3_vl_moe_text", "mellum", like=_LOCAL),
    **_rows("mixtral", "minimax", like=_LOCAL, checkpoint_blocks=("block_sparse_moe",)),
    **_rows("minimax_m2", like=_MINIMAX_M2, checkpoint_blocks=("block_sparse_moe",)),
    **_rows(
        "minimax_m3_vl_text",
        like=_LOCAL,
        router_tensors=GATE_WITH_BIAS,
        checkpoint_blocks=("block_sparse_moe", "mlp"),
        checkpoint_tensors={**GATE_WITH_BIAS, "e_score_correction_bias": 0},
    ),
    **_rows("deepseek_v2", num_experts="n_routed_experts"),
    **_rows("deepseek_v3", "deepseek_v32", "axk1", like=_DEEPSEEK, group_defaults=(8, 4)),
    **_rows("glm4_moe", "glm4_moe_lite", "glm4v_moe_text", "glm_moe_dsa", "glm5_next_text", like=_DEEPSEEK),
    **_rows("dots1", "dots3_note_text", "solar_open", "mimo_v2_flash", "axk2", like=_DEEPSEEK),
    **_rows("hy_v4", "hy_v4_vl_text", "sarvam_mla", like=_DEEPSEEK),
    **_rows("sarvam_moe", like=_DEEPSEEK, checkpoint_tensors={**GATE_WITH_BIAS, "gate.expert_bias": 0}),
    **_rows("nemotron_h", like=_DEEPSEEK, checkpoint_blocks=("mixer",)),
    **_rows(
        "deepseek_v4",
        num_experts="n_routed_experts",
        router_tensors=GATE_WITH_BIAS,
        hash_tensors=("gate.tid2eid",),
        checkpoint_blocks=("mlp", "ffn"),
        checkpoint_tensors={**GATE_WITH_BIAS, "gate.bias": 0},
    ),
    **_rows(
        "exaone_moe",
        like=_DEEPSEEK,
        num_experts="num_experts",
        checkpoint_tensors={**GATE_WITH_BIAS, "e_score_correction_bias": 0},
    ),
    **_rows("kimi_linear", like=_DEEPSEEK, num_experts="num_experts", checkpoint_blocks=("block_sparse_moe",)),
    **_rows(
        "bailing_hybrid",
        like=_DEEPSEEK,
        num_experts="num_experts",
        group_defaults=(8, 4),
        checkpoint_tensors={**GATE_WITH_BIAS, "gate.expert_bias": 0},
    ),
    **_rows("beam", like=_DEEPSEEK, num_experts="num_experts", group_defaults=(8, 4)),
    **_rows("mistral4", num_experts="n_routed_experts", group_defaults=(1, 1)),
    **_rows("mistral_large4_text", num_experts="n_routed_experts", group_defaults=(1, 1), checkpoint_blocks=()),
    **_rows(
        "ernie4_5_moe",
        num_experts="moe_num_experts",
        top_k="moe_k",
        router_tensors={"gate.weight": 0, "gate.moe_statics.e_score_correction_bias": 1},
        checkpoint_tensors={"gate.weight": 0, "moe_statics.e_score_correction_bias": 1},
    ),
    **_rows(
        "hunyuan_v1_moe",
        top_k="moe_topk",
        router_tensors={"gate.wg.weight": 0},
        checkpoint_tensors={"gate.wg.weight": 0},
    ),
    **_rows("hy_v3", router_tensors=GATE_AND_BIAS, checkpoint_tensors={"router.gate.weight": 0, "expert_bias": 0}),
    **_rows(
        "laguna",
        router_tensors=GATE_WITH_BIAS,
        checkpoint_tensors={**GATE_WITH_BIAS, "experts.e_score_correction_bias": 0},
    ),
    **_rows(
        "lfm2_moe",
        router_tensors={"gate.weight": 0, "expert_bias": 0},
        checkpoint_blocks=("feed_forward",),
        checkpoint_tensors={"gate.weight": 0, "expert_bias": 0},
    ),
    **_rows(
        "afmoe",
        router="router",
        router_tensors={"router.gate.weight": 0, "expert_bias": 0},
        checkpoint_tensors={"router.gate.weight": 0, "expert_bias": 0},
    ),
    **_rows(
        "kolibri1",
        like=_LOCAL,
        router_tensors=GATE_WITH_BIAS,
        checkpoint_blocks=("mlp", "moe"),
        checkpoint_tensors={**GATE_WITH_BIAS, "router.expert_bias": 0},
    ),
    **_rows(
        "step3p5",
        num_experts="n_routed_experts",
        router_tensors=GATE_WITH_BIAS,
        checkpoint_blocks=("moe",),
        checkpoint_tensors={"gate.weight": 0, "router_bias": 0},
        checkpoint_experts=("gate_proj", "up_proj", "down_proj"),
    ),
    **_rows(
        "inkling2_text",
        num_experts="n_routed_experts",
        router_tensors=GATE_WITH_BIAS,
        checkpoint_tensors={**GATE_WITH_BIAS, "gate.bias": 0},
    ),
    **_rows(
        "gpt_oss",
        router="router",
        num_experts="num_local_experts",
        router_tensors={"router.weight": 0, "router.bias": 0},
        checkpoint_tensors={"router.weight": 0, "router.bias": 0},
    ),
    **_rows(
        "phimoe",
        like=_ROUTER,
        num_experts="num_local_experts",
        checkpoint_blocks=("block_sparse_moe",),
        checkpoint_tensors=GATE,
    ),
    **_rows("jamba", like=_ROUTER, checkpoint_blocks=("feed_forward",)),
    **_rows(
        *("granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa"),
        like=_ROUTER,
        num_experts="num_local_experts",
        checkpoint_blocks=("block_sparse_moe",),
        checkpoint_tensors={"router.weight": 0, "router.layer.weight": 0},
        checkpoint_experts=("input_linear", "output_linear"),
    ),
    **_rows(
        "gemma4_text",
        router="router",
        top_k="top_k_experts",
        router_tensors={"router.proj.weight": 0, "router.per_expert_scale": 0},
        checkpoint_blocks=(),
        checkpoint_tensors={"router.proj.weight": 0, "router.per_expert_scale": 0},
    ),
    **_rows(
        "aria_text",
        like=_ROUTER,
        num_experts="moe_num_experts",
        top_k="moe_topk",
        checkpoint_experts=("experts.fc1", "experts.fc2"),
    ),
    **_rows(
        "llama4_text", like=_ROUTER, num_experts="num_local_experts", scores=True, checkpoint_blocks=("feed_forward",)
    ),
    # The router has rows for `zero_expert_num` identity experts after those of the real ones.
    **_rows(
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
}
# Names of code that comes with the weights, and of a whole network where transformers names its text part otherwise.
_ALIASES = {
    "llama4": "llama4_text",
    "kimi_k2": "deepseek_v3",
    "bailing_moe": "bailing_hybrid",
    "bailing_moe_v2": "bailing_hybrid",
}


def family(model_type: str) -> Family:
    """The row of `FAMILIES` for a `config.model_type`; `InputError` naming the known ones."""
    found = FAMILIES.get(_ALIASES.get(model_type, model_type))
    if found is None:
        raise InputError(
            "model_type",
            model_type,
            f"known MoE families: {', '.join(sorted(FAMILIES))}",
            'where its modules are named as those of one of them, say so: gemopt.models.FAMILIES["its_type"] = '
            'family("mixtral")',
        )
    return found

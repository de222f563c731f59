"""Small random models of every family, for tests and for trying things out."""

from __future__ import annotations

from typing import Any

from gemopt.exceptions import InputError, missing

try:
    import torch
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

from gemopt.models.families import family
from gemopt.models.layers import auto_class, find_moe_layers

_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
# Text parts without a class of their own -> the network they are part of.
_WITH_EYES = {
    "qwen3_vl_moe_text": "qwen3_vl_moe",
    "glm4v_moe_text": "glm4v_moe",
    "glm5_next_text": "glm5_next",
    "mistral4": "mistral3",
    "step3p5": "step3p7",
    "mistral_large4_text": "mistral_large4",
    "hy_v4_vl_text": "hy_v4_vl",
}


def _vision(hidden_size: int) -> dict[str, Any]:
    layers, heads = {"depth": 1, "num_hidden_layers": 1}, {"num_heads": 2, "num_attention_heads": 2}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": hidden_size, "image_size": 8}
    return {**layers, **heads, **sizes, "patch_size": 4, "deepstack_visual_indexes": [0]}


def tiny(
    model_type: str,
    *,
    num_layers: int = 3,
    num_experts: int = 8,
    top_k: int = 2,
    hidden_size: int = 32,
    intermediate_size: int = 16,
    vocab_size: int = 256,
    seed: int = 0,
    **config: Any,
) -> Any:
    """A small causal language model of a family with random weights, in evaluation mode.

    Families that can have dense layers get one, the first. Routing biases are random too, not the zeros a new
    model starts with. `config` overrides fields of the transformers config.

    Raises
    ------
    InputError
        For an unknown family, and for one that the installed transformers does not have.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    row = family(model_type)
    if row.model_type not in CONFIG_MAPPING:
        raise InputError("transformers", __version__, f"one that has {row.model_type} is needed", "install a newer one")
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "moe_intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        row.num_experts: num_experts,
        row.top_k: top_k,
        **_special(row.model_type, hidden_size, intermediate_size, num_layers),
        **config,
    }
    made: Any = AutoConfig.for_model(row.model_type, **fields)
    if row.model_type in _WITH_EYES:
        eyes = _vision(hidden_size)
        made = AutoConfig.for_model(_WITH_EYES[row.model_type], text_config=made.to_dict(), vision_config=eyes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class(made).from_config(made)
        _spread_routing(model)
    return model.eval()


def _special(model_type: str, hidden: int, intermediate: int, layers: int) -> dict[str, Any]:
    head_dim = hidden // 4
    head = {"head_dim": head_dim}
    latent = {**_MLA, "num_key_value_heads": 4}
    index = {"index_head_dim": 8, "index_n_heads": 2, "index_topk": 64}
    dense_first = {"mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1)}
    shared = {"shared_expert_intermediate_size": intermediate}
    delta_net = {
        "linear_key_head_dim": head_dim,
        "linear_value_head_dim": head_dim,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    delta_attention = {"linear_head_dim": head_dim, "linear_num_heads": 4}
    full_last = ["linear_attention"] * (layers - 1) + ["full_attention"]
    mamba = {"mamba_n_heads": 8, "mamba_d_head": hidden // 4, "mamba_d_state": 8, "mamba_n_groups": 1}
    table: dict[str, dict[str, Any]] = {
        "qwen2_moe": {"mlp_only_layers": [0], **shared},
        "qwen3_moe": {"mlp_only_layers": [0], **head},
        "qwen3_next": {**head, **shared, **delta_net, "full_attention_interval": 2},
        "qwen3_5_moe_text": {**head, **shared, **delta_net, "layer_types": full_last},
        "qwen4_exp_text": {
            **head,
            **shared,
            **delta_net,
            "layer_types": full_last,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 64,
            "indexer_compress_ratio": 1,
            "ngram_vocab_size_base": 64,
            "hc_lowrank": 8,
        },
        "qwen3_vl_moe_text": {**head, "mlp_only_layers": [0]},
        "cohere2_moe": {**head, "num_shared_experts": 1, **dense_first},
        "minimax": {**head, "layer_types": full_last},
        "minimax_m2": head,
        "minimax_m3_vl_text": {
            **head,
            **dense_first,
            "layer_types": ["full_attention"] * layers,
            "dense_intermediate_size": intermediate,
            "shared_intermediate_size": intermediate,
            "rotary_dim": head_dim,
        },
        "deepseek_v2": {**latent, "first_k_dense_replace": 1, "n_shared_experts": 1},
        "deepseek_v3": {**latent, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2},
        "deepseek_v32": {**latent, **index, **dense_first, "n_group": 4, "topk_group": 2},
        "deepseek_v4": {"mlp_layer_types": ["hash_moe"] + ["moe"] * (layers - 1)},
        "axk1": {**latent, **dense_first, "n_group": 4, "topk_group": 2},
        "kimi_linear": {**latent, **delta_attention, **dense_first, "layer_types": full_last},
        "bailing_hybrid": {
            **latent,
            **head,
            **dense_first,
            "q_lora_rank": None,
            "n_group": 4,
            "topk_group": 2,
            "layer_types": full_last,
        },
        "glm4_moe": {**head, "first_k_dense_replace": 1},
        "glm4_moe_lite": {**latent, **dense_first},
        "glm4v_moe_text": {
            "first_k_dense_replace": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]},
        },
        "glm_moe_dsa": {**latent, **index, **dense_first},
        "glm5_next_text": {
            **latent,
            **index,
            **dense_first,
            **delta_attention,
            "qk_rope_head_dim": 0,
            "layer_types": full_last,
        },
        "hy_v4": {**latent, **index, **dense_first, **head, "hc_mult": 3},
        "hy_v4_vl_text": {
            **latent,
            **index,
            **dense_first,
            **head,
            "hc_mult": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        "sarvam_mla": {**latent, "first_k_dense_replace": 1},
        "sarvam_moe": {**head, "first_k_dense_replace": 1},
        "lara_mini": {**head, **shared, **delta_net, "layer_types": full_last},
        "flint": {**head, **shared, "mlp_only_layers": [0]},
        "step3p5": {**head, **dense_first, "share_expert_dim": intermediate, "sliding_window": 128},
        "dots1": {**head, "first_k_dense_replace": 1, "n_shared_experts": 1},
        "solar_open": head,
        "axk2": {**latent, **index, **dense_first},
        "dots3_note_text": {**latent, **index, **dense_first, "layer_types": ["full_attention"] * layers},
        "beam": {**head, **dense_first, "n_group": 4, "topk_group": 2},
        "kolibri1": {**head, **shared},
        "inkling2_text": {
            **head,
            "unpadded_vocab_size": 256,
            "swa_head_dim": head_dim,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "d_rel": 4,
            "rel_extent": 16,
            "n_layers_per_attn_res_block": 1,
        },
        "mistral_large4_text": {**latent, **index, **dense_first},
        "granitemoe_swa": {"shared_intermediate_size": intermediate},
        "mimo_v2_flash": {**head, "v_head_dim": head_dim, **dense_first},
        "mistral4": {**latent, "first_k_dense_replace": 1},
        "exaone_moe": {**head, "first_k_dense_replace": 1, **dense_first},
        "nemotron_h": {
            **head,
            **mamba,
            "layers_block_type": ["full_attention"] + ["moe"] * (layers - 1),
            "moe_shared_expert_intermediate_size": intermediate,
            "mamba_num_heads": 8,
            "mamba_head_dim": hidden // 4,
            "ssm_state_size": 8,
            "n_groups": 1,
        },
        "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_num_shared_experts": 1},
        "hunyuan_v1_moe": head,
        "hy_v3": {**head, **dense_first},
        "laguna": {**head, **shared, **dense_first},
        "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv"] * (layers - 1) + ["full_attention"]},
        "afmoe": {**head, "num_dense_layers": 1, "num_shared_experts": 1},
        "gemma4_text": {
            "head_dim": 16,
            "global_head_dim": 16,
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 0,
        },
        "gpt_oss": {**head, "sliding_window": 128},
        "granitemoeshared": {"shared_intermediate_size": intermediate},
        "granitemoehybrid": {
            **mamba,
            "shared_intermediate_size": intermediate,
            "layer_types": ["mamba"] * (layers - 1) + ["attention"],
        },
        "jamba": {
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "use_mamba_kernels": False,
        },
        "llama4_text": {**head, "intermediate_size_mlp": intermediate, "moe_layers": list(range(1, layers))},
        "longcat_flash": {
            **latent,
            **head,
            "num_hidden_layers": 2 * layers,  # this family counts its two attentions per layer
            "ffn_hidden_size": 2 * intermediate,
            "expert_ffn_hidden_size": intermediate,
            "zero_expert_num": 4,
        },
    }
    return table.get(model_type, {})


@torch.no_grad()
def _spread_routing(model: Any) -> None:
    """New routers are all but uniform and their biases zero: spread both, so that experts differ."""
    for layer in find_moe_layers(model):
        for name in layer.router_tensors:
            tensor = layer.tensor(name)
            tensor.normal_(std=layer.hidden_size**-0.5 if name.endswith("weight") else 0.05)
        for name in layer.hash_tensors:
            table = layer.tensor(name)
            table.copy_(torch.rand(len(table), layer.num_experts).topk(layer.top_k).indices)

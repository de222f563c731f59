"""Small random models of every family, for tests and for trying things out."""

from __future__ import annotations

from typing import Any

from gemopt.exceptions import missing

try:
    import torch
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

from gemopt.models.families import family
from gemopt.models.layers import find_moe_layers

_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}


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
        For an unknown family.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    row = family(model_type)
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(AutoConfig.for_model(row.model_type, **fields))
        _spread_routing(model)
    return model.eval()


def _special(model_type: str, hidden: int, intermediate: int, layers: int) -> dict[str, Any]:
    head_dim = hidden // 4
    table: dict[str, dict[str, Any]] = {
        "qwen2_moe": {"mlp_only_layers": [0], "shared_expert_intermediate_size": intermediate},
        "qwen3_moe": {"mlp_only_layers": [0], "head_dim": head_dim},
        "qwen3_next": {
            "head_dim": head_dim,
            "shared_expert_intermediate_size": intermediate,
            "linear_key_head_dim": head_dim,
            "linear_value_head_dim": head_dim,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "full_attention_interval": 2,
        },
        "deepseek_v2": {**_MLA, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_shared_experts": 1},
        "deepseek_v3": {
            **_MLA,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
        },
        "deepseek_v4": {"mlp_layer_types": ["hash_moe"] + ["moe"] * (layers - 1)},
        "glm4_moe": {"head_dim": head_dim, "first_k_dense_replace": 1},
        "minimax_m2": {"head_dim": head_dim},
        "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_num_shared_experts": 1},
        "gpt_oss": {"head_dim": head_dim, "sliding_window": 128},
        "llama4_text": {
            "head_dim": head_dim,
            "intermediate_size_mlp": intermediate,
            "moe_layers": list(range(1, layers)),
        },
        "longcat_flash": {
            **_MLA,
            "num_key_value_heads": 4,
            "head_dim": head_dim,
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

"""What `profile --model` takes from a `config.json`, and what it says that it does not measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemopt.models import tiny
from gemopt.profiling.device import Device
from gemopt.profiling.workload import from_model


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "bfloat16"}, []),
        ({}, ["config.json tells no dtype: measured in float32"]),
        (
            {"dtype": "bfloat16", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
            ["quantization_config tells of weights in fp8: measured in bfloat16, experts of 3072 bytes"],
        ),
        (
            {"dtype": "bfloat16", "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
            ["tells of weights in NVFP4"],
        ),
    ],
)
def test_what_a_config_says_of_its_weights_and_is_not_measured(
    tmp_path: Path, change: dict[str, object], said: list[str]
) -> None:
    told = {key: value for key, value in tiny("mixtral").config.to_diff_dict().items() if key != "dtype"}
    (tmp_path / "config.json").write_text(json.dumps({**told, **change}))
    notes = from_model(str(tmp_path), Device("cpu"), ep_size=2, rank=0).notes
    assert len(notes) == len(said) and all(part in note for part, note in zip(said, notes, strict=True))


def test_the_type_that_only_the_text_part_of_a_config_tells_is_measured(tmp_path: Path) -> None:
    """As in the files of Qwen3-VL: without it, weights in float32."""
    text = {
        "model_type": "qwen3_vl_moe_text", "dtype": "bfloat16", "hidden_size": 32, "intermediate_size": 64,
        "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 128,
        "rope_scaling": {"mrope_section": [2, 1, 1], "rope_type": "default"},
    }  # fmt: skip
    sight = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
    config = {
        "model_type": "qwen3_vl_moe",
        "text_config": text,
        "vision_config": {**sight, "deepstack_visual_indexes": [0]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = from_model(str(tmp_path), Device("cpu"), ep_size=2, rank=0)
    assert (found.shape.dtype, found.shape.expert_bytes, found.notes) == ("bfloat16", 3 * 32 * 16 * 2, ())

"""Engines without a placement file. A checkpoint whose experts are permuted serves those that split experts evenly."""

from __future__ import annotations

from gemopt.formats.engine import Engine

ENGINES = {
    "checkpoint": Engine(
        name="checkpoint",
        versions="transformers 5.24, Megatron-core 0.16, DeepSpeed 0.19, vLLM 0.33",
        placement="permuted weights (--source CHECKPOINT)",
        group_limits=True,
        note="for engines that give rank r the r-th part of the experts",
    ),
    "xllm": Engine(name="xllm", versions="xLLM 2026-08", note="it balances by itself and takes no placement"),
}

"""Time of a step outside the MoE layers, from the shape of the network and a stated roofline of a device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import Field

from gemopt.documents import Settings, foreign, read_json
from gemopt.exceptions import InputError, check_kind
from gemopt.profile import Profile
from gemopt.traces import Traces

USUAL = {
    "memory_gbps": (20.0, 5e4, "10^9 bytes per second"),
    "tflops": (1.0, 5e4, "10^12 operations per second"),
    "dtype_bytes": (0.5, 4.0, "bytes"),
}
APART = 1.5  # times the size of an expert; scales and zero points add less


class ModelShape(Settings):
    """A network, and what a device of its group computes and reads.

    Attributes
    ----------
    layers, num_experts, top_k, intermediate_size
        Checked against profile and traces where these know them; experts are sized by `intermediate_size` (three
        matrices of `hidden_size` x `intermediate_size`).
    hidden_size, heads, kv_heads, head_dim, context
        Attention; `context`: tokens that each token attends to.
    dtype_bytes
        Of weights, activations and the KV cache.
    tflops, memory_gbps
        What a device reaches: 1e12 operations and 1e9 bytes per second.
    """

    hidden_size: int = Field(ge=1, le=10**6)
    heads: int = Field(ge=1, le=10**5)
    kv_heads: int = Field(ge=1, le=10**5)
    head_dim: int = Field(ge=1, le=10**5)
    context: int = Field(ge=1, le=10**8)
    tflops: float = Field(gt=0, le=1e7)
    memory_gbps: float = Field(gt=0, le=1e7)
    dtype_bytes: float = Field(default=2.0, gt=0, le=8)
    layers: int | None = Field(default=None, ge=1)
    num_experts: int | None = Field(default=None, ge=1)
    top_k: int | None = Field(default=None, ge=1)
    intermediate_size: int | None = Field(default=None, ge=1)

    @classmethod
    def parse(cls, text: str) -> ModelShape:
        """A JSON file, or `hidden_size=2880,heads=64,...`."""
        fields: dict[str, Any]
        if "=" in text:
            parts = [part.partition("=") for part in text.split(",")]
            fields = {key.strip(): _read(value.strip()) for key, _, value in parts}
            if len(fields) < len(parts):
                raise InputError("--model", text, "every key once")
        else:
            found = read_json(Path(text))
            if not isinstance(found, dict):
                raise InputError("--model", text, "a JSON object")
            fields = found
        if (other := foreign.of_object(fields)[0]) or "text_config" in fields:
            limit = "hidden_size, heads (there num_attention_heads), kv_heads, head_dim, context, tflops, memory_gbps"
            raise InputError(
                "--model", other or "the config.json of a network", limit, "write those of it and the device"
            )
        try:
            return cls(**fields)
        except InputError as error:
            raise error.about(f"--model {error.field.partition('.')[2]}") from None

    def check(self, profile: Profile, traces: Traces) -> None:
        """`InputError` where the profile or the traces are of another network."""
        measured = profile.model
        if self.kv_heads > self.heads:
            raise InputError("--model kv_heads", self.kv_heads, f"at most {self.heads}, as heads", "are they swapped?")
        known = [(name, getattr(measured, name), "the profile") for name in
                 ("hidden_size", "intermediate_size", "num_experts", "top_k")]  # fmt: skip
        known += [("num_experts", traces.num_experts, "the traces"), ("top_k", traces.top_k, "the traces")]
        known += [("layers", traces.num_layers, "the traces")]
        for name, other, who in known:
            ours = getattr(self, name)
            if ours is not None and other is not None and ours != other:
                raise InputError(f"--model {name}", ours, f"{other} in {who}", "the shape of the measured network")

    def doubts(self, profile: Profile) -> list[str]:
        """Sentences on figures that are hardly in their unit, and on experts of another size than the profile's."""
        found = [
            f"--model {name}: {getattr(self, name):g} is hardly in {unit}"
            for name, (least, most, unit) in USUAL.items()
            if not least <= getattr(self, name) <= most
        ]
        ours, theirs = self.expert_bytes, profile.model.expert_bytes
        if ours and theirs and not theirs / APART <= ours <= theirs * APART:
            found.append(f"--model tells of experts of {ours:g} bytes, the profile of {theirs:g}, which are taken")
        return found

    @property
    def expert_bytes(self) -> float | None:
        """Weights of one expert: gate, up and down projections; None where its size is not stated."""
        if self.intermediate_size is None:
            return None
        return 3 * self.hidden_size * self.intermediate_size * self.dtype_bytes

    def non_moe_us(self, tokens: float, assignments: float, ranks: int, layers: int, link_gbps: float) -> float:
        """Microseconds of a step outside the experts: attention, norms and the two all-to-alls of every layer.

        Tokens are shared evenly by the ranks (data-parallel attention); each time is the larger of operations and
        bytes over what the device reaches, and an all-to-all sends what leaves a rank over its link.
        """
        mine, width = tokens / ranks, self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        weights = self.hidden_size * width
        pairs = mine * self.context * self.head_dim
        operations = 2 * mine * weights + 4 * pairs * self.heads
        moved = self.dtype_bytes * (weights + 2 * pairs * self.kv_heads + 4 * mine * self.hidden_size)  # two norms
        attention_us = max(operations / (self.tflops * 1e6), moved / (self.memory_gbps * 1e3))
        leaving = assignments / ranks * (ranks - 1) / ranks * self.hidden_size * self.dtype_bytes
        return layers * (attention_us + 2 * leaving / (link_gbps * 1e3))


def shape_from(given: ModelShape | str | os.PathLike[str] | None) -> ModelShape | None:
    """A shape, or where to read it."""
    if given is None or isinstance(given, ModelShape):
        return given
    check_kind("--model", given, ModelShape, str, os.PathLike)
    return ModelShape.parse(os.fspath(given))


def _read(text: str) -> float | str:
    """A number where the text is one."""
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        return text

"""The measured work: a MoE layer's experts of one rank under a load that is forced exactly."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from gemopt.exceptions import InputError, UnsupportedError, missing

try:
    import torch
    from torch import Tensor, nn
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

from gemopt.profile import MoeShape
from gemopt.profiling.device import Device
from gemopt.profiling.kernels import Kernel, load_kernel

MAX_COPIES = 16
Forward = Callable[[Tensor, Tensor, Tensor], object]


class Workload(Protocol):
    """What is measured: the layer's shape, the kernel's name, and calls under a load."""

    shape: MoeShape
    kernel: str

    def prepare(self, assignments: int, active: int) -> Callable[[], object]:
        """A call that runs the layer once with `assignments` rows over `active` experts."""


def forced_routing(assignments: int, active: int, num_experts: int, *, first: int = 0) -> Tensor:
    """[assignments, 1] expert of each row: `active` experts from `first` on, as evenly as can be.

    One row per assignment is what the experts of a rank get after the dispatch of expert parallelism.

    Raises
    ------
    InputError
        When fewer than one row per active expert, or more active experts than there are, are asked for.
    """
    if not 1 <= active <= min(num_experts, assignments):
        raise InputError("active experts", active, f"from 1 to {min(num_experts, assignments)}")
    return ((first + torch.arange(assignments) % active) % num_experts).unsqueeze(1)


@dataclass
class Experts:
    """Experts of one rank, with enough copies of the weights that calls in turn do not find them in the cache.

    notes: what a config says of the weights and these have not.
    """

    shape: MoeShape
    kernel: str
    device: Device
    forwards: list[Forward]
    id_dtype: torch.dtype = torch.int64
    notes: tuple[str, ...] = ()

    def prepare(self, assignments: int, active: int) -> Callable[[], object]:
        """See `Workload`. Calls go through the copies and through the experts of each."""
        local, hidden_size = self.shape.num_local_experts or 1, self.shape.hidden_size
        dtype, where = getattr(torch, self.shape.dtype or "float32"), self.device.torch_device
        hidden = torch.randn(assignments, hidden_size or 1, device=where).to(dtype)
        weights = torch.ones(assignments, 1, device=where, dtype=torch.float32)
        groups = max(1, min(8, local // active))
        routings = [
            forced_routing(assignments, active, local, first=group * active).to(where, self.id_dtype)
            for group in range(groups)
        ]
        turns = count()

        def call() -> object:
            turn = next(turns)
            forward = self.forwards[turn % len(self.forwards)]
            with torch.no_grad():
                return forward(hidden, routings[turn // len(self.forwards) % groups], weights)

        return call


def copies_needed(layer_bytes: int, cache_bytes: int) -> int:
    """Copies of a layer's weights that together are twice the cache, at most 16."""
    return min(MAX_COPIES, max(1, -(-2 * cache_bytes // max(1, layer_bytes))))


def local_experts(num_experts: int, ep_size: int, rank: int) -> int:
    """Experts of a rank when the first `num_experts % ep_size` ranks hold one more."""
    if not 1 <= ep_size <= num_experts:
        raise InputError("--ep-size", ep_size, f"from 1 to the {num_experts} experts of the model")
    return num_experts // ep_size + (rank % ep_size < num_experts % ep_size)


def from_kernel(shape: MoeShape, kernel: Kernel, name: str, device: Device) -> Experts:
    """Experts of random weights in the layout of `gemopt.profiling.kernels`, run by any callable."""
    hidden, inter, local = shape.hidden_size, shape.intermediate_size, shape.num_local_experts
    if hidden is None or inter is None or local is None:
        needed = "hidden size, intermediate size and experts are needed"
        raise InputError("shape", "incomplete", needed, "give --model, which knows them")
    dtype = getattr(torch, shape.dtype or "float32")
    expert_bytes = 3 * hidden * inter * dtype.itemsize
    forwards: list[Forward] = []
    for _ in range(copies_needed(local * expert_bytes, device.cache_bytes)):
        w13 = _weights((local, 2 * inter, hidden), dtype, device)
        w2 = _weights((local, hidden, inter), dtype, device)
        forwards.append(lambda h, ids, w, w13=w13, w2=w2: kernel(h, ids, w, w13, w2))  # type: ignore[misc]
    shape = shape.model_copy(update={"expert_bytes": expert_bytes})
    return Experts(shape, name, device, forwards, id_dtype=torch.int32)


def _weights(size: tuple[int, ...], dtype: torch.dtype, device: Device) -> Tensor:
    return torch.empty(size, dtype=dtype, device=device.torch_device).normal_(std=size[-1] ** -0.5)


def _ask_once(path: str) -> None:
    """Raise what the hub says of a name that is not here; transformers asks for half a minute where none answers."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if not Path(path).exists() and not isinstance(try_to_load_from_cache(path, "config.json"), str):
        get_hf_file_metadata(hf_hub_url(path, "config.json"), timeout=10)


def from_model(path: str, device: Device, *, ep_size: int, rank: int) -> Experts:
    """The experts module of a transformers model's first MoE layer, with this rank's experts and random weights.

    Only the config is read and only this layer is built, so a network of any size can be profiled.

    Raises
    ------
    InputError
        When the path holds no config of a known MoE family, or none that makes a network.
    """
    from transformers import AutoConfig

    from gemopt.models import auto_class, describe, find_moe_layers, model_path

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one line at the end, not one for each retry
    path = model_path(path)
    try:
        _ask_once(path)
        config: Any = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds here
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError("--model", path, "a folder or hub name with a transformers config", first) from None
    auto, text = auto_class(config), config.get_text_config()
    told, packed = (getattr(config, key, None) or getattr(text, key, None) for key in ("dtype", "quantization_config"))
    try:
        with torch.device("meta"):
            network = auto.from_config(config, dtype=told)  # of networks that also see, the text part says it
    except Exception as error:
        raise InputError("--model", path, "a config of a network", f"{type(error).__name__}: {error}") from None
    whole, layer = describe(network), find_moe_layers(network)[0]
    local = local_experts(whole.num_experts or 1, ep_size, rank)
    experts: Any = layer.experts
    for name in layer.expert_tensors:  # as transformers' expert parallelism shards them
        experts._parameters[name] = nn.Parameter(getattr(experts, name)[:local], requires_grad=False)
    experts.num_experts = local
    layer_bytes = local * (whole.expert_bytes or 1)
    forwards: list[Forward] = [_filled(experts, device) for _ in range(copies_needed(layer_bytes, device.cache_bytes))]
    implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None) or "eager"
    shape = whole.model_copy(update={"num_local_experts": local, "name": whole.name or path})
    notes = _unlike(shape, told, packed)
    built = Experts(shape, f"transformers:{implementation}", device, forwards, notes=notes)
    try:
        built.prepare(1, 1)()
    except (TypeError, ValueError, IndexError) as error:
        limit = f"experts that run one row per assignment ({error})"
        raise UnsupportedError("--model", shape.name, limit, "measure its sizes with --shape") from None
    return built


def _unlike(shape: MoeShape, told: object, packed: object) -> tuple[str, ...]:
    """What is measured otherwise than a config says; packed: its `quantization_config`."""
    said = [] if told else [f"config.json tells no dtype: measured in {shape.dtype}; write the weights' into it"]
    if isinstance(packed, dict) and packed:
        kind = packed.get("quant_algo") or packed.get("quant_method") or "another type"
        measured = f"measured in {shape.dtype}, experts of {shape.expert_bytes} bytes"
        way_out = "a table of the engine's kernel (gemopt profile import) tells what that takes"
        said.append(f"quantization_config tells of weights in {kind}: {measured}; {way_out}")
    return tuple(said)


def _filled(meta: nn.Module, device: Device) -> nn.Module:
    """A copy of a module without memory, with random weights on the device."""
    from copy import deepcopy

    module = deepcopy(meta).to_empty(device=device.torch_device).eval()
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data.normal_(std=tensor.shape[-1] ** -0.5 if tensor.ndim else 1.0)
    return module


def find_workload(
    *,
    device: Device,
    rank: int,
    num_ranks: int,
    model: str | None = None,
    shape: str | MoeShape | None = None,
    kernel: str | None = None,
    ep_size: int | None = None,
) -> Experts:
    """What the command line describes: a transformers model, or a shape with a kernel.

    Raises
    ------
    InputError
        When neither or both are given, or the shape cannot be read.
    """
    if (model is None) == (shape is None):
        raise InputError("--model, --shape", model or "neither", "exactly one of the two", "give --model PATH")
    if model is not None:
        if kernel is not None:
            raise InputError("--kernel", kernel, "a kernel needs --shape; --model runs the model's own")
        return from_model(model, device, ep_size=ep_size or num_ranks, rank=rank)
    moe = parse_shape(shape) if isinstance(shape, str) else shape
    assert moe is not None
    if isinstance(shape, str) or moe.num_local_experts is None:
        local = local_experts(moe.num_experts or 1, ep_size or num_ranks, rank)
        moe = moe.model_copy(update={"num_local_experts": local})
    name = kernel or "per_expert"
    return from_kernel(moe, load_kernel(name), name, device)


def parse_shape(text: str) -> MoeShape:
    """`hidden=2048,inter=768,experts=128,topk=8[,dtype=bfloat16]` as a `MoeShape`; `InputError` otherwise."""
    keys = {"hidden": "hidden_size", "inter": "intermediate_size", "experts": "num_experts", "topk": "top_k"}
    limit = "hidden=2048,inter=768,experts=128,topk=8[,dtype=bfloat16]"
    given = dict(part.partition("=")[::2] for part in text.replace(" ", "").split(","))
    dtype = given.pop("dtype", "bfloat16")
    if set(given) != set(keys) or not all(value.isdigit() and 0 < int(value) < 2**31 for value in given.values()):
        raise InputError("--shape", text, limit)
    if not isinstance(getattr(torch, dtype, None), torch.dtype) or not getattr(torch, dtype).is_floating_point:
        raise InputError("--shape", f"dtype={dtype}", "a floating-point type of torch", limit)
    sizes: dict[str, Any] = {keys[key]: int(value) for key, value in given.items()}
    if sizes["top_k"] > sizes["num_experts"]:
        raise InputError("--shape", text, "topk at most the number of experts")
    return MoeShape(**sizes, dtype=dtype)

"""Find the MoE layers of a live transformers model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from gemopt.exceptions import InputError, MissingPackageError, missing

try:
    import torch
    from torch import Tensor, nn
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

from gemopt.models.checkpoint_names import of_tower
from gemopt.models.families import FAMILIES, Family, family
from gemopt.profile import MoeShape

OLDEST = (5, 21)
"""Version of transformers from which on the routers of all families return what `MoeLayer.chosen` reads."""


@dataclass(frozen=True, eq=False)
class MoeLayer:
    """One MoE layer of a live model. E experts, top-k K, N tokens, D hidden size.

    Attributes
    ----------
    layer_id, path
        Index among the decoder layers; dotted name of the MoE block in the model.
    block, router, experts
        The MoE block, the router in it and the module with the stacked expert weights.
    num_experts, num_local_experts
        E of the network; those of them whose weights this process holds (fewer under expert parallelism).
    top_k
        K, experts per token.
    router_tensors
        Tensors outside `experts` with an expert axis: name relative to `block` -> axis. Longer than E where
        identity experts follow the real ones.
    hash_tensors
        Tensors, relative to `block`, whose values are expert ids.
    expert_tensors
        Parameters and buffers of `experts` with an expert axis: name -> axis. DTensors under expert parallelism.
    expert_bytes
        Bytes of one expert's weights.
    hidden_size
        Of what enters the router.
    width, intermediate_size, dtype
        Sizes and type of an expert: of what enters it (the hidden size, or that of a latent space), and inside.
    """

    layer_id: int
    path: str
    block: nn.Module
    router: nn.Module
    experts: nn.Module
    family: Family
    num_experts: int
    num_local_experts: int
    top_k: int
    router_tensors: Mapping[str, int] = field(default_factory=dict)
    hash_tensors: tuple[str, ...] = ()
    expert_tensors: Mapping[str, int] = field(default_factory=dict)
    expert_bytes: int = 0
    hidden_size: int = 0
    width: int = 0
    intermediate_size: int = 0
    dtype: torch.dtype = torch.float32

    def chosen(self, router_output: Any) -> Tensor:
        """[N, K] logical expert of each assignment, from what the router's forward returned.

        Values from E on mean an identity expert, which makes no assignment.

        Raises
        ------
        InputError
            When the router returned anything else: it is not the family's own, or has another top-k than the config.
        """
        last = router_output[-1] if isinstance(router_output, tuple) else router_output
        ids = last.topk(self.top_k, dim=-1).indices if self.family.scores else last
        if ids.ndim != 2 or ids.shape[1] != self.top_k or ids.is_floating_point() or last is router_output:
            kind = type(self.router).__name__
            raise InputError(
                f"{self.path}.{self.family.router}",
                f"{kind} returned {str(ids.dtype).removeprefix('torch.')} {list(ids.shape)} last",
                f"ids of experts must come last, whole numbers [tokens, {self.top_k}]",
                f"let config.{self.family.top_k} say what routers do, and routers return what transformers' own do",
            )
        return ids  # type: ignore[no-any-return]

    def tensor(self, name: str) -> Tensor:
        """A tensor of `router_tensors` or `hash_tensors` by its name relative to the block."""
        value = self.block
        for part in name.split("."):
            value = getattr(bare(value), part)
        return value  # type: ignore[return-value]


def find_moe_layers(model: nn.Module) -> list[MoeLayer]:
    """The MoE layers of a transformers model, in the order of its decoder layers.

    Works on a model whose experts are sharded by expert parallelism: counts are those of the whole network.

    Raises
    ------
    InputError
        When the model has no MoE layer, is of an unknown family, or keeps its experts in another way than the
        family does in transformers 5.
    MissingPackageError
        When transformers is older than `OLDEST`: its routers would be misread, some without an error.
    """
    config = _text_config(model)
    version = import_module("transformers").__version__
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        state = f"{version} is older than {OLDEST[0]}.{OLDEST[1]}"
        raise MissingPackageError("transformers", "reading a network's routers", state)
    model_type = str(getattr(config, "model_type", type(model).__name__))
    if model_type not in FAMILIES and not any(path.endswith(".experts") for path, _ in model.named_modules()):
        raise InputError("model", model_type, "a network with MoE layers is needed, this one has none")
    row = family(model_type)
    blocks = [
        (path, module)
        for path, module in model.named_modules()
        if re.search(r"(^|\.)layers\.\d+(\.\w+)?$", path) and hasattr(module, "experts") and not of_tower(path)
    ]
    if not blocks:
        raise InputError("model", model_type, "a network with MoE layers is needed, all layers of this one are dense")
    for path, block in blocks:
        if not hasattr(block, row.router):
            limit = f"a router named {row.router!r} beside its experts, as {model_type} has it"
            raise InputError(path, type(block).__name__, limit, "name it so, or add a row to gemopt.models.FAMILIES")
    return [_layer(config, row, path, block) for path, block in blocks]


def auto_class(config: Any) -> Any:
    """transformers' class that makes the network of a config: of language, or of images and sound too."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    autos: list[Any] = [AutoModelForCausalLM, AutoModelForMultimodalLM]
    found = next((auto for auto in autos if type(config) in auto._model_mapping), None)
    if found is None:
        raise InputError("model_type", config.model_type, "a network that transformers knows to predict the next token")
    return found


def from_files(auto: Any, source: Any, **options: Any) -> Any:
    """`auto.from_pretrained(source, ...)` in evaluation mode; `InputError` where the files lack weights."""
    model, told = auto.from_pretrained(source, output_loading_info=True, **options)
    if lacking := sorted(told["missing_keys"]):
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        limit = "all weights of the network: what is missing would be random"
        raise InputError("weights", f"no {lacking[0]}{more}", limit, "is config.json that of these files?")
    return model.eval()


def num_hidden_layers(model: nn.Module) -> int:
    """Decoder layers of a MoE model, dense ones included."""
    path = find_moe_layers(model)[0].path
    return len(model.get_submodule(path[: path.rindex("layers.") + len("layers")]))  # type: ignore[arg-type]


def describe(model: nn.Module) -> MoeShape:
    """Shape of the MoE layers of a model, as a profile records it."""
    layer = find_moe_layers(model)[0]
    config: Any = model.config
    return MoeShape(
        name=Path(getattr(config, "_name_or_path", "")).name or str(config.model_type),
        hidden_size=layer.width,
        intermediate_size=layer.intermediate_size,
        num_experts=layer.num_experts,
        num_local_experts=layer.num_local_experts or None,
        top_k=layer.top_k,
        dtype=str(layer.dtype).removeprefix("torch."),
        expert_bytes=layer.expert_bytes,
    )


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise InputError("model", type(model).__name__, "a transformers model is needed")
    return config.get_text_config()


def _layer(config: Any, row: Family, path: str, block: nn.Module) -> MoeLayer:
    num_experts = _of_every_layer(config, row.num_experts)
    experts: Any = bare(block.experts)
    router = getattr(block, row.router)
    stacked = _stacked(experts, _rows(experts, config, row, num_experts))
    weights = [tensor for tensor in stacked.values() if tensor.ndim > 2]
    if not weights or isinstance(experts, nn.ModuleList):
        shapes = [list(tensor.shape) for tensor in experts.parameters() if tensor.ndim > 2]
        raise InputError(
            f"{path}.experts",
            f"{type(experts).__name__} {shapes or ''}",
            f"experts stacked in one tensor [{num_experts}, ...] are needed",
            f"load it with transformers 5, without remote code; config.{row.num_experts} says how many there are",
        )
    down = stacked.get("down_proj", weights[0])
    hidden = int(config.hidden_size)
    width = int(getattr(config, "moe_latent_size", None) or hidden)
    return MoeLayer(
        layer_id=int(re.findall(r"(?:^|\.)layers\.(\d+)", path)[-1]),
        path=path,
        block=block,
        router=router,
        experts=experts,
        family=row,
        num_experts=num_experts,
        num_local_experts=min(num_experts, _local_rows(down)),
        top_k=_of_every_layer(config, row.top_k),
        router_tensors={name: dim for name, dim in row.router_tensors.items() if _has(block, name)},
        hash_tensors=tuple(name for name in row.hash_tensors if _has(block, name)),
        expert_tensors=dict.fromkeys(stacked, 0),
        expert_bytes=sum(math.prod(t.shape[1:]) * t.element_size() for t in stacked.values()),
        hidden_size=hidden,
        width=width,
        intermediate_size=_inner(experts) or math.prod(down.shape[1:]) // width,
        dtype=down.dtype,
    )


def _of_every_layer(config: Any, field: str) -> int:
    """A number of the config, which some families may list layer by layer."""
    value = getattr(config, field)
    values = set(value) if isinstance(value, list | tuple) else {value}
    if len(values) != 1:
        raise InputError(f"config.{field}", value, "the same in every MoE layer")
    return int(values.pop())


def bare(module: Any) -> Any:
    """A module without the adapters that PEFT puts around it."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def _rows(experts: Any, config: Any, row: Family, num_experts: int) -> set[int]:
    """How many rows a tensor with an expert axis may have.

    Experts that `gemopt.executor` placed have one per slot of this rank, possibly fewer than experts, or none.
    """
    field, default = row.identity_experts or ("", 0)
    placed = {int(experts.num_experts)} if hasattr(experts, "gemopt_dispatch") else set()
    return {num_experts, num_experts + int(getattr(config, field, default)), *placed}


def _stacked(experts: nn.Module, rows: set[int]) -> dict[str, Tensor]:
    """Tensors with an expert axis; a DTensor's shape is that of the whole, so sharding does not show here."""
    tensors = {**dict(experts.named_parameters(recurse=False)), **dict(experts.named_buffers(recurse=False))}
    return {name: tensor for name, tensor in tensors.items() if tensor.ndim and tensor.shape[0] in rows}


def _inner(experts: Any) -> int | None:
    """Intermediate size by the experts' own word, which weights that are packed do not show."""
    return getattr(experts, "intermediate_dim", None) or getattr(experts, "intermediate_size", None)


def _local_rows(tensor: Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local.shape[0])


def _has(block: nn.Module, name: str) -> bool:
    value: Any = block
    for part in name.split("."):
        value = getattr(bare(value), part, None)
    return isinstance(value, Tensor)

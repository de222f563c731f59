"""Load models: experts permuted in memory for any contiguous expert parallelism, or served by gemopt."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from gemopt.exceptions import InputError, missing

try:
    import torch
    from torch import Tensor
    from transformers import AutoConfig
    from transformers.distributed.configuration_utils import DistributedConfig
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

from gemopt.executor.checkpoint import read_config, read_header, weight_files
from gemopt.executor.configs import other_files, renamed_modules
from gemopt.executor.expert_parallel import NAME
from gemopt.executor.permutation import Permutation, TensorInfo, check_coverage, permutation_of
from gemopt.models import auto_class, from_files
from gemopt.placement import GivenPlacement, Placement

Layout = Literal["shared", "own"]


def layout(kind: Layout, num_ranks: int, implementation: str = NAME) -> DistributedConfig:
    """`shared`: the ranks hold the same batch (tensor parallel outside the experts); `own`: each has its own (FSDP)."""
    sizes: dict[str, Any] = {"tp_size": num_ranks, "tp_plan": "auto"} if kind == "shared" else {"fsdp_size": num_ranks}
    return DistributedConfig(**sizes, ep_size=num_ranks, ep_implementation=implementation)


def load(source: str | os.PathLike[str], distributed_config: DistributedConfig | None = None, **options: Any) -> Any:
    """A causal language model from a checkpoint folder, in evaluation mode, sharded as told."""
    read_config(Path(source))
    try:
        auto = auto_class(AutoConfig.from_pretrained(source, trust_remote_code=False))
        return from_files(auto, source, distributed_config=distributed_config, **options)
    except InputError:
        raise
    except (ValueError, RuntimeError) as error:  # transformers' word for a layout that does not suit the model
        raise InputError(str(source), str(error), "a checkpoint and a layout that transformers can load") from None


def load_permuted(
    source: str | os.PathLike[str],
    placement: GivenPlacement,
    distributed_config: DistributedConfig | None = None,
    **options: Any,
) -> Any:
    """As `export_checkpoint` and then `load`, without the files: slot j of every layer is expert j of the model.

    Single-expert tensors are only renamed and stay on disk until needed; stacked ones are copied.

    Raises
    ------
    InputError
        As `export_checkpoint`.
    """
    placement, folder = Placement.of(placement), Path(source)
    permutation = permutation_of(placement, read_config(folder))
    other_files(folder, permutation)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if isinstance(told := getattr(config, "quantization_config", None), dict):
        config.quantization_config = renamed_modules(told, "config.json", permutation)
    mapping: Any = auto_class(config)._model_mapping
    model_class: Any = mapping[type(config)]
    options = {"dtype": getattr(config, "dtype", None) or "auto", **options}
    state = permuted_state(folder, permutation)
    return from_files(
        model_class, None, config=config, state_dict=state, distributed_config=distributed_config, **options
    )


def permuted_state(folder: Path, permutation: Permutation) -> dict[str, Tensor]:
    """Tensors of a checkpoint by their new names, mapped from the files where nothing in them changes."""
    from safetensors import safe_open

    files = weight_files(folder)
    headers = {tensor.name: tensor for file in files for tensor in read_header(file)[0]}
    check_coverage(permutation, headers.values())
    state: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                state[permutation.new_name(name)] = _permuted(tensors.get_tensor(name), headers[name], permutation)
    return state


def _permuted(tensor: Tensor, header: TensorInfo, permutation: Permutation) -> Tensor:
    role = permutation.role(header.name)
    if role is None:
        return tensor
    if role.kind == "hash":
        slot_of = torch.from_numpy(permutation.slot_of(role.layer))
        known = (tensor >= 0) & (tensor < len(slot_of))
        return torch.where(known, slot_of[tensor.clamp(0, len(slot_of) - 1).long()].to(tensor.dtype), tensor)
    axis = permutation.axis(role, header)
    if axis is None:
        return tensor
    return tensor.index_select(axis, torch.from_numpy(permutation.order(role.layer, tensor.shape[axis])))

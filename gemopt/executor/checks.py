"""Whether a placement is for this live model, these ranks and their devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemopt.exceptions import InputError, missing
from gemopt.placement import Placement, bare
from gemopt.words import counted

try:
    import torch
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None


def check_network(placement: Placement, layer_ids: Sequence[int], num_experts: int, config: Any) -> None:
    """Raise `InputError` unless the placement is for MoE layers as these of a model with this config."""
    if list(placement.layer_ids) != list(layer_ids):
        raise InputError("Placement.layer_ids", placement.layer_ids, f"the model's MoE layers are {layer_ids}")
    if placement.num_experts != num_experts:
        raise InputError("Placement.num_experts", placement.num_experts, f"the model has {num_experts}")
    path = str(getattr(config, "_name_or_path", "") or "")
    names = {bare(path), bare(str(config.model_type))} - {""}
    if placement.model is not None and bare(placement.model) not in names:
        hint = "use a placement made for this network; its field `model` is compared without folders"
        raise InputError("Placement.model", placement.model, f"the model is {path or config.model_type}", hint)


def check_unwrapped(model: Any) -> None:
    """Raise `InputError` where hooks of the whole model would be left out, or experts have parts that do not move."""
    if getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod"):
        raise InputError(
            "model",
            "compiled as a whole",
            "moves are put in force between its forward passes, by hooks that compiling leaves out",
            "compile its layers instead: for layer in model.model.layers: layer.compile()",
        )
    for path, module in model.named_modules():
        if hasattr(module, "gemopt_dispatch") and path.endswith(".base_layer"):
            limit = "what an adapter adds to single experts would stay behind when they move"
            raise InputError(path, "experts with an adapter of PEFT", limit, "merge it first (merge_and_unload)")


def check_ranks(placement: Placement, num_ranks: int, rank: int) -> None:
    """Raise `InputError` unless it is for so many ranks, and this rank's device is the one it was made for."""
    if placement.num_ranks != num_ranks:
        raise InputError(
            "Placement.slots_per_rank",
            counted(placement.num_ranks, "rank"),
            f"the model runs on {counted(num_ranks, 'rank')}",
        )
    if placement.device_uuids is None or not torch.cuda.is_available():
        return
    wanted = placement.device_uuids[rank]
    here = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    if wanted is not None and wanted.removeprefix("GPU-") != here.removeprefix("GPU-"):
        raise InputError("Placement.device_uuids", here, f"rank {rank} should be {wanted}", "start ranks in that order")

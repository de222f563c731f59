"""vLLM plugin (`vllm.general_plugins`): serves a placement, or lets the controller decide, as vLLM's EPLB policy.

vLLM loads it in every process. `GEMOPT_PLACEMENT` names a placement that is served as it is; `GEMOPT_PROFILE` names a
profile with which the controller moves few experts at each rearrangement, and `GEMOPT_RULES` rules that it keeps.
Without either it does nothing and imports nothing.
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import Any

VARIABLE, PROFILE, RULES = "GEMOPT_PLACEMENT", "GEMOPT_PROFILE", "GEMOPT_RULES"
logger = logging.getLogger("vllm.gemopt")


def register() -> None:
    """Replace vLLM's default EPLB policy when `GEMOPT_PLACEMENT` or `GEMOPT_PROFILE` is set.

    Raises
    ------
    InputError
        Both are set, rules without a profile are, or a file cannot be read or served; vLLM then stops at once instead
        of serving otherwise.
    """
    path, profile, rules = (os.environ.get(name) or None for name in (VARIABLE, PROFILE, RULES))
    if rules and not profile:
        from gemopt.exceptions import InputError

        raise InputError(RULES, rules, f"only the controller keeps rules: {PROFILE} is not set", "set it too")
    if not path and not profile:
        return
    if path and profile:
        from gemopt.exceptions import InputError

        raise InputError(PROFILE, profile, f"{VARIABLE} is set too", "set one: a fixed placement, or the controller")
    policies = import_module("vllm.distributed.eplb.policy").EPLB_POLICIES
    if path:
        policies["default"] = fixed_policy(path, policies["default"])
        logger.info("EPLB serves the placement %s", path)
    elif profile:
        from gemopt.formats.engines.vllm_controller import controlled_policy

        policies["default"] = controlled_policy(profile, policies["default"], rules)
        logger.info("EPLB moves few experts at a time, by the profile %s", profile)


def fixed_policy(path: str, base: type[Any]) -> type[Any]:
    """A policy class that answers every request with the placement of `path`.

    vLLM calls it while profiling its memory at start, so a placement of other sizes stops the start.
    """
    import torch

    from gemopt.exceptions import InputError
    from gemopt.formats.engine import WriteOptions
    from gemopt.formats.registry import get, refuse
    from gemopt.placement import Placement

    placement = Placement.load(path)
    refuse(placement, get("vllm"), WriteOptions())
    table = torch.tensor(placement.physical_to_logical)
    warned: list[int] = []

    class FixedPlacement(base):  # type: ignore[misc]
        @classmethod
        def rebalance_experts(
            cls,
            weight: Any,
            num_replicas: int,
            num_groups: int,
            num_nodes: int,
            num_ranks: int,
            old_global_expert_indices: Any = None,
        ) -> Any:
            layers, experts = weight.shape
            if layers < placement.num_layers and old_global_expert_indices is not None:
                if layers not in warned:
                    warned.append(layers)
                    logger.warning("%s has no rows for a network of %d MoE layers: its experts stay", path, layers)
                return old_global_expert_indices.cpu()
            found = (layers, experts, num_replicas, num_ranks)
            wanted = (placement.num_layers, placement.num_experts, placement.num_slots, placement.num_ranks)
            for name, got, need in zip(("layers", "experts", "slots", "ranks"), found, wanted, strict=True):
                if got != need:
                    raise InputError(f"{VARIABLE}={path}: {name}", need, f"vLLM runs with {got}", "solve for it")
            return table.clone()

    return FixedPlacement

"""What a controller has learnt, as one file."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from gemopt.documents import read_bytes, replacing
from gemopt.exceptions import InputError
from gemopt.placement import Placement

if TYPE_CHECKING:
    from gemopt.online.controller import Controller

VERSION = 1
MEMORY_ARRAYS = ("counts", "sums", "roots", "overlaps", "steps", "last", "scores")
MEMORY_NUMBERS = ("ticks", "since", "changes", "usual", "spread", "drift")
SPEED_ARRAYS = ("factors_G", "silent_G", "recent_NG")
OWN_ARRAYS = ("pending", "moved_at")
OWN_NUMBERS = ("steps", "blind_until", "now_s")


def save(controller: Controller, path: str | os.PathLike[str]) -> None:
    """Write the state of a controller atomically (safetensors)."""
    from safetensors.numpy import save as to_bytes

    arrays = {
        name: np.ascontiguousarray(getattr(owner, name)) for owner, names in _arrays(controller) for name in names
    }
    numbers = {name: getattr(owner, name) for owner, names in _numbers(controller) for name in names}
    metadata = {
        "gemopt_online": str(VERSION),
        "numbers": json.dumps(numbers),
        "step_us": repr(controller.speeds.step_us),
        "policy": controller.policy.model_dump_json(),
        "placement": controller.placement.model_dump_json(),
    }
    with replacing(path) as stream:
        stream.write(to_bytes(arrays, metadata=metadata))


def load(controller: Controller, path: str | os.PathLike[str]) -> None:
    """Put a state into a controller of the same network, group and policy, or leave it as it was."""
    arrays, metadata = _read(path)
    if metadata.get("gemopt_online") != str(VERSION):
        raise InputError(
            str(path), metadata.get("gemopt_online", "no version"), f"the state of a controller, version {VERSION}"
        )
    if metadata["policy"] != controller.policy.model_dump_json():
        raise InputError(
            str(path), metadata["policy"], "the policy of this controller", "construct it with that policy"
        )
    placement = Placement(**json.loads(metadata["placement"]))
    now = controller.placement
    wanted, found = ((p.num_layers, p.num_experts, p.num_ranks) for p in (now, placement))
    if wanted != found:
        raise InputError(str(path), f"{found} layers, experts, ranks", f"those of this controller, {wanted}")
    for owner, names in _arrays(controller):
        for name in names:
            setattr(owner, name, arrays[name])
    numbers = json.loads(metadata["numbers"])
    for owner, names in _numbers(controller):
        for name in names:
            setattr(owner, name, numbers[name])
    controller.speeds.step_us = float(metadata["step_us"])
    controller.placement = placement
    controller.rescale()


def _arrays(controller: Controller) -> list[tuple[Any, tuple[str, ...]]]:
    return [(controller.memories, MEMORY_ARRAYS), (controller.speeds, SPEED_ARRAYS), (controller, OWN_ARRAYS)]


def _numbers(controller: Controller) -> list[tuple[Any, tuple[str, ...]]]:
    return [(controller.memories, MEMORY_NUMBERS), (controller, OWN_NUMBERS)]


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors.numpy import load as from_bytes

    content = read_bytes(path)
    try:
        arrays = {name: np.array(array) for name, array in from_bytes(content).items()}
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    except Exception as error:  # safetensors has errors of its own, without a common base
        raise InputError(str(path), str(error), "a file that a controller has saved") from None
    needed = {*MEMORY_ARRAYS, *SPEED_ARRAYS, *OWN_ARRAYS}
    if not needed <= set(arrays):
        raise InputError(str(path), f"no {sorted(needed - set(arrays))[0]}", "a file that a controller has saved")
    return arrays, metadata

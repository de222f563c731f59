"""What a controller has learnt, as one file."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from gemopt.documents import read_bytes, replacing
from gemopt.exceptions import InputError
from gemopt.placement import Placement

if TYPE_CHECKING:
    from gemopt.online.controller import Controller

VERSION = 9
KEY = "gemopt_online"
ANEW = "begin anew with a file that is not there yet"
MEMORY_ARRAYS = (
    "counts", "sums", "roots", "overlaps", "steps", "last", "scores", "starts", "pending", "foretold", "lead",
)  # fmt: skip
MEMORY_NUMBERS = ("ticks", "since", "changes", "usual", "spread", "drift")
SPEED_ARRAYS = ("factors_G", "silent_G", "recent_NG", "told_G")
PROMISE_ARRAYS = ("layers", "rows", "weights", "facts")
EARLIER_ARRAYS = ("served",)
REALISED_ARRAYS = ("pair", "pair_weights", "before_NG", "since_NG")
OWN_ARRAYS = ("moved_at",)
SPEED_NUMBERS = ("step_us",)
PROMISE_NUMBERS = ("short", "swaps")
EARLIER_NUMBERS = ("changed_at",)
REALISED_NUMBERS = ("seen", "kept", "blind", "waited")
OWN_NUMBERS = ("steps", "blind_until", "moved", "planned_at", "speeds_at", "now_s")


def save(controller: Controller, path: str | os.PathLike[str], notes: dict[str, Any]) -> None:
    """Write the state of a controller, and what its caller notes beside it, atomically (safetensors)."""
    from safetensors.numpy import save as to_bytes

    arrays = {
        name: np.ascontiguousarray(getattr(owner, name)) for owner, names in _arrays(controller) for name in names
    }
    numbers = {name: getattr(owner, name) for owner, names in _numbers(controller) for name in names}
    header: dict[str, Any] = {
        "version": VERSION,
        "numbers": numbers,
        "policy": controller.policy.model_dump(),
        "placement": controller.placement.model_dump(),
        "devices": _devices(controller),
        "notes": notes,
    }
    try:
        header["sha256"] = _digest(arrays, header)
    except (TypeError, ValueError) as error:
        raise InputError("notes", str(error), "what JSON can say") from None
    with replacing(path) as stream:
        stream.write(to_bytes(arrays, metadata={KEY: json.dumps(header)}))  # one key: their order would be arbitrary


def load(controller: Controller, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Put a state into a controller of the same network, devices and policy, or leave it as it was; the notes."""
    arrays, header = _read(path)
    known, policy = header["policy"], controller.policy.model_dump()
    if known != policy:
        other = {name: known.get(name) for name in known | policy if known.get(name) != policy.get(name)}
        raise InputError(f"{path}: policy", other, "that of this controller", f"keep to that policy, or {ANEW}")
    placement = Placement(**header["placement"])
    now = controller.placement
    wanted, found = ((p.layer_ids, p.num_experts, p.num_ranks) for p in (now, placement))
    if wanted != found:
        raise InputError(str(path), f"layer ids, experts, ranks {found}", f"those of this controller, {wanted}", ANEW)
    if header["devices"] != _devices(controller):
        raise InputError(str(path), "learnt with another profile", "the profile of this controller", ANEW)
    controller.check(placement)
    for owner, names in _arrays(controller):
        for name in names:
            setattr(owner, name, arrays[name])
    for owner, names in _numbers(controller):
        for name in names:
            setattr(owner, name, header["numbers"][name])
    controller.placement = controller.ruled(placement)
    controller.rescale()
    return dict(header["notes"])


def _owners(controller: Controller) -> tuple[Any, ...]:
    return (
        controller.memories,
        controller.speeds,
        controller.promises,
        controller.earlier,
        controller.realised,
        controller,
    )


def _arrays(controller: Controller) -> list[tuple[Any, tuple[str, ...]]]:
    names = (MEMORY_ARRAYS, SPEED_ARRAYS, PROMISE_ARRAYS, EARLIER_ARRAYS, REALISED_ARRAYS, OWN_ARRAYS)
    return list(zip(_owners(controller), names, strict=True))


def _numbers(controller: Controller) -> list[tuple[Any, tuple[str, ...]]]:
    names = (MEMORY_NUMBERS, SPEED_NUMBERS, PROMISE_NUMBERS, EARLIER_NUMBERS, REALISED_NUMBERS, OWN_NUMBERS)
    return list(zip(_owners(controller), names, strict=True))


def _devices(controller: Controller) -> str:
    """What speeds that were learnt are relative to."""
    if controller.profile is not None:
        return controller.profile.digest()
    return hashlib.sha256(repr([latency.key for latency in controller.cost.latencies]).encode()).hexdigest()


def _digest(arrays: dict[str, Any], header: dict[str, Any]) -> str:
    """Of all that is saved."""
    digest = hashlib.sha256(json.dumps(header).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array)
    return digest.hexdigest()


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    from safetensors.numpy import load as from_bytes

    content = read_bytes(path)
    limit = f"a file that a controller of state version {VERSION} has saved"
    try:
        arrays = {name: np.array(array) for name, array in from_bytes(content).items()}
        length = int.from_bytes(content[:8], "little")
        header = dict(json.loads(json.loads(content[8 : 8 + length])["__metadata__"][KEY]))
    except Exception as error:  # safetensors has errors of its own, without a common base
        raise InputError(str(path), f"{type(error).__name__}: {error}", limit, ANEW) from None
    if header.get("version") != VERSION:
        raise InputError(str(path), f"version {header.get('version')}", limit, ANEW)
    if header.pop("sha256", None) != _digest(arrays, header):
        raise InputError(str(path), "a file that was changed", limit, ANEW)
    return arrays, header

"""Which device is which rank: a placement is right only for the device order it was made for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gemopt.exceptions import InputError
from gemopt.placement import Placement
from gemopt.profile import plain_uuid as plain


def follow(placement: Placement, devices: Sequence[str]) -> tuple[Placement, list[str]]:
    """The placement for ranks that now drive `devices`: what a device held stays with the device.

    Returns
    -------
    Placement, list of str
        The placement, and one sentence per rank that drives another device than before.

    Raises
    ------
    InputError
        The placement does not know its devices, or they are not these.
    """
    known = placement.device_uuids
    if known is None or any(uuid is None for uuid in known):
        raise InputError(
            "Placement.device_uuids", known, "the uuid of every rank", "solve with a profile that has them"
        )
    before = [plain(str(uuid)) for uuid in known]
    now = [plain(uuid) for uuid in devices]
    if sorted(before) != sorted(now):
        strange = [uuid for uuid in devices if plain(uuid) not in before] or list(devices)
        limit = f"the {len(before)} devices of the placement, each once"
        raise InputError("--devices", ", ".join(strange), limit, "profile and solve again for other devices")
    old_rank = [before.index(uuid) for uuid in now]
    notes = [
        f"rank {rank} drives {devices[rank]}, which was rank {old}" for rank, old in enumerate(old_rank) if old != rank
    ]
    if not notes:
        return placement, []
    starts = np.cumsum(placement.slots_per_rank) - placement.slots_per_rank
    order = np.concatenate([starts[old] + np.arange(placement.slots_per_rank[old]) for old in old_rank])
    fields = dict(placement)
    if placement.split_weights is not None:
        fields["split_weights"] = placement.split_weights[:, order]
    fields |= {
        "physical_to_logical": placement.physical_to_logical[:, order],
        "slots_per_rank": placement.slots_per_rank[old_rank],
        "device_uuids": [known[old] for old in old_rank],
        "rules": placement.rules and placement.rules.renumbered(old_rank),
        "node_of_rank": None if placement.node_of_rank is None else placement.node_of_rank[old_rank],
    }
    return Placement(**fields), notes


def present() -> list[str]:
    """Uuids of the devices that PyTorch sees here, in its order; empty without PyTorch or devices."""
    try:
        import torch

        if not torch.cuda.is_available():
            return []
        return [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    except (ImportError, AttributeError, RuntimeError):
        return []


def compare(placement: Placement, here: Sequence[str]) -> str:
    """One sentence when the devices `here` are not those of the placement in their order; empty when all is well."""
    known = placement.device_uuids
    if not here or known is None or any(uuid is None for uuid in known):
        return ""
    before, now = [plain(str(uuid)) for uuid in known], [plain(uuid) for uuid in here]
    if before == now:
        return ""
    if sorted(before) == sorted(now):
        return "the devices here are in another order; to follow them: --devices " + ",".join(here)
    if set(now) < set(before):
        return ""  # one node of several
    return "the devices here are not those the placement was made for; profile and solve again on these"

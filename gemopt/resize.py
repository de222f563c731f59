"""A rank less or a rank more: the placement in force and the profile, seen from the ranks that are to serve.

Ranks keep their order; new ones come last. On the way in they are numbered as in the placement in force, new ones after
those; on the way out anew from 0 (`Resized.old_rank`).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError, check_number
from gemopt.migration import held
from gemopt.placement import GivenPlacement, Placement
from gemopt.profile import Device, Profile
from gemopt.words import counted

NEW = -1

Source = int | str | os.PathLike[str] | Profile


@dataclass(frozen=True, eq=False)
class Resized:
    """What is left of a placement in force, and who is there to serve.

    Attributes
    ----------
    profile
        One device per rank that serves.
    slots_per_rank
        [G] slots: those that the ranks had; a new rank has as many as the largest.
    home_LGE
        [L, G, E] whether each rank holds each expert already.
    old_rank
        [G] rank in the placement in force, -1 for a new one.
    ranks_before
        Ranks of the placement in force.
    """

    profile: Profile
    slots_per_rank: NDArray[np.int64]
    home_LGE: NDArray[np.bool_]
    old_rank: NDArray[np.int64]
    ranks_before: int

    @property
    def changed(self) -> bool:
        """Whether any rank left or came."""
        return bool(self.old_rank.tolist() != list(range(self.ranks_before)))

    @property
    def numbers(self) -> list[int]:
        """Number of each rank on the way in: as in the placement in force, new ones after those."""
        new = itertools.count(self.ranks_before)
        return [next(new) if rank == NEW else rank for rank in self.old_rank.tolist()]

    @property
    def missing_slots(self) -> int:
        """Slots that the experts lack."""
        return max(0, int(self.home_LGE.shape[2]) - int(self.slots_per_rank.sum()))

    def lost(self, layer_ids: Sequence[int]) -> dict[int, list[int]]:
        """By layer id, the experts that no rank holds any more: they come from the checkpoint."""
        gone_LE = np.asarray(~self.home_LGE.any(axis=1))
        return {
            layer: np.flatnonzero(gone_E).tolist()
            for layer, gone_E in zip(layer_ids, gone_LE, strict=True)
            if gone_E.any()
        }


def resize(
    current: GivenPlacement, profile: Profile, *, exclude: Sequence[int] = (), add: Sequence[Source] = ()
) -> Resized:
    """The placement in force without some ranks and with some more.

    Parameters
    ----------
    current, profile
        The placement in force, and the measured devices of its ranks; devices beyond them are those of `add`.
    exclude
        Ranks that serve no longer.
    add
        One entry per new rank: the rank of a device in the profile, which joins itself when it is beyond the ranks of
        the placement and is copied otherwise, or a profile (or its path) all of whose devices join.

    Raises
    ------
    InputError
        A rank that does not exist or is named twice, no rank left, or devices that the placement does not know.
    """
    current = Placement.of(current, "current")
    ranks = current.num_ranks
    gone = _excluded(exclude, ranks)
    if profile.num_ranks < ranks:
        raise InputError("current", counted(ranks, "rank"), f"the profile has {counted(profile.num_ranks, 'device')}")
    kept = [rank for rank in range(ranks) if rank not in gone]
    joining, used = _joining(add, profile, ranks)
    unused = [rank for rank in range(ranks, profile.num_ranks) if rank not in used]
    if unused:
        raise InputError(
            "current",
            f"{ranks} ranks",
            f"the profile has {counted(profile.num_ranks, 'device')}",
            f"--add-rank {unused[0]} lets device {unused[0]} of the profile join",
        )
    current.check_devices(profile.device_uuids, in_force=True)
    devices = [profile.devices[rank] for rank in kept] + joining
    if not devices:
        raise InputError("exclude_ranks", sorted(gone), "at least one rank must be left")
    uuids = [device.uuid for device in devices if device.uuid is not None]
    twice = [uuid for uuid in uuids if uuids.count(uuid) > 1]
    if twice:
        raise InputError("add_ranks", twice[0], "that device is a rank already")
    slots = np.append(current.slots_per_rank[kept], np.full(len(joining), int(current.slots_per_rank.max())))
    home_LGE = np.stack(
        [held(row, current.slots_per_rank, current.num_experts) for row in current.physical_to_logical]
    )[:, kept]
    fresh = np.zeros((current.num_layers, len(joining), current.num_experts), dtype=bool)
    renumbered = [device.model_copy(update={"rank": rank}) for rank, device in enumerate(devices)]
    return Resized(
        profile=profile.model_copy(update={"devices": renumbered}),
        slots_per_rank=slots.astype(np.int64),
        home_LGE=np.concatenate([home_LGE, fresh], axis=1),
        old_rank=np.array(kept + [NEW] * len(joining), dtype=np.int64),
        ranks_before=ranks,
    )


def profile_after(
    current: GivenPlacement | None,
    profile: Profile,
    *,
    exclude: Sequence[int] = (),
    add: Sequence[Source] = (),
) -> Profile:
    """The profile of the ranks that `solve(current=current, exclude_ranks=exclude, add_ranks=add)` answers for.

    What is done with its placement (`evaluate`, `report`) needs this profile. Without a placement in force: as
    given.

    Raises
    ------
    InputError
        As `resize`.
    """
    return profile if current is None else resize(current, profile, exclude=exclude, add=add).profile


def _excluded(exclude: Sequence[int], ranks: int) -> set[int]:
    if isinstance(exclude, str) or not np.iterable(exclude):
        raise InputError("exclude_ranks", exclude, "a list of ranks", "as in [3]")
    exclude = list(exclude)
    for rank in exclude:
        check_number(
            "exclude_ranks", rank, f"ranks 0 to {ranks - 1} of the placement in force", most=ranks - 1, whole=True
        )
    if len(set(exclude)) < len(exclude):
        raise InputError("exclude_ranks", exclude, "every rank once")
    return set(exclude)


def _joining(add: Sequence[Source], profile: Profile, ranks: int) -> tuple[list[Device], set[int]]:
    """Devices of the new ranks, and which of the profile's own are among them."""
    joining: list[Device] = []
    used: set[int] = set()
    if isinstance(add, (str, os.PathLike, Profile)) or not np.iterable(add):
        raise InputError("add_ranks", type(add).__name__ if isinstance(add, Profile) else add, "a list", "as in [3]")
    for source in add:
        if isinstance(source, (int, np.integer)):
            if isinstance(source, bool) or not 0 <= source < profile.num_ranks:
                raise InputError("add_ranks", int(source), f"devices 0 to {profile.num_ranks - 1} of the profile")
            if source in used:
                raise InputError("add_ranks", int(source), "a device joins once")
            device = profile.devices[source]
            if source >= ranks:
                used.add(int(source))
                joining.append(device)
            else:  # a device like it: the same latency, but another one
                joining.append(device.model_copy(update={"uuid": None}))
            continue
        other = Profile.of(source, "add_ranks")
        joining += other.devices
    return joining, used

"""What callers hand to the controller, checked: `InputError` with one line for everything that cannot be used."""

from __future__ import annotations

from numbers import Real

import numpy as np
from numpy.typing import NDArray

from gemopt.documents.arrays import integer_array, plain_array
from gemopt.exceptions import InputError
from gemopt.latency import FloatArray
from gemopt.placement import Placement, Split
from gemopt.profile import Profile
from gemopt.solvers.search.state import EXACT_FLOAT32, SUMMED
from gemopt.splits.senders import Senders

LEAST_US, MOST_US = 1e-3, 1e12  # of a rank in a step


def counts_from(given: object, shape: tuple[int, int]) -> NDArray[np.int64]:
    """[n, L, E] assignments of at least one step of a network of `shape` (layers, experts)."""
    counts = integer_array(given, name="counts", ndim=3)
    if counts.shape[1:] != shape:
        raise InputError("counts", f"shape {counts.shape}", f"[steps, {shape[0]} layers, {shape[1]} experts]")
    if not len(counts):
        raise InputError("counts", "no steps", "at least one step")
    if counts.min() < 0:
        raise InputError("counts", int(counts.min()), "whole numbers >= 0")
    largest = float(counts.sum(axis=2, dtype=np.float64).max())
    if largest >= EXACT_FLOAT32:
        raise InputError("counts", largest, f"fewer than {EXACT_FLOAT32} assignments per step and layer", SUMMED)
    return counts


def latencies_from(given: object, steps: int, ranks: int) -> FloatArray | None:
    """[steps, ranks] microseconds; NaN, infinity, 0 and None (null in JSON) stand for a rank that said nothing."""
    if given is None:
        return None
    found = plain_array("latencies", given, "numbers [steps, ranks]", by_row=True)
    if found.dtype.kind == "O" and all(each is None or isinstance(each, Real) for each in found.flat):
        found = found.astype(np.float64)
    if found.dtype.kind not in "iuf":
        raise InputError("latencies", given, "numbers [steps, ranks]")
    latencies = found.astype(np.float64)
    if latencies.shape != (steps, ranks):
        raise InputError("latencies", f"shape {latencies.shape}", f"[{steps} steps, {ranks} ranks]")
    said = latencies[np.isfinite(latencies) & (latencies != 0)]
    wrong = said[(said < LEAST_US) | (said > MOST_US)]
    if len(wrong):
        raise InputError("latencies", float(wrong[0]), f"microseconds from {LEAST_US:g} to {MOST_US:g}, or 0")
    return latencies


def check_clock(now_s: float | None, before_s: float | None) -> float | None:
    """The seconds now, which are not before the last ones; the last ones where nothing is said."""
    if now_s is None:
        return before_s
    known = isinstance(now_s, (int, float, np.number)) and np.isfinite(now_s)
    if not known or (before_s is not None and now_s < before_s):
        raise InputError("now_s", now_s, f"seconds that do not go back behind {before_s}")
    return float(now_s)


def check_network(placement: Placement, now: Placement) -> None:
    """Refuse a placement of other layers or experts than the one in force."""
    if (placement.layer_ids, placement.num_experts) != (now.layer_ids, now.num_experts):
        found, limit = (f"layers {each.layer_ids}, {each.num_experts} experts" for each in (placement, now))
        raise InputError("placement", found, limit)


def check_placement(placement: Placement, num_ranks: int, profile: Profile | None, senders: Senders) -> None:
    """Refuse a placement of other ranks or their devices in another order, and copies of the nearest split of which
    nobody knows who sends to them.
    """
    if placement.num_ranks != num_ranks:
        limit = f"{num_ranks}, as the profile has devices"
        raise InputError("Placement.slots_per_rank", f"{placement.num_ranks} ranks", limit)
    placement.check_devices([] if profile is None else profile.device_uuids)
    if not placement.has_copies or placement.split is not Split.NEAREST:
        return
    if senders is not Senders.UNIFORM:
        limit = "counts do not say who sends to copies of the nearest split"
        raise InputError("senders", senders.value, limit, "say that all ranks send alike: --senders uniform")
    if profile is None:
        raise InputError("profile", None, "the nearest split asks for the node of every rank")

"""Checks for the tests of those who use gemopt: is this placement allowed, and does this bound hold?

    from gemopt.testing import assert_bound_holds, assert_feasible

Both raise `AssertionError` with one line that says what is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from gemopt.costs import CostModel, fit
from gemopt.evaluate import check_agreement, evaluate
from gemopt.exceptions import InputError
from gemopt.placement import GivenPlacement, Placement, default_slots
from gemopt.profile import Profile
from gemopt.result import Result
from gemopt.traces import Traces
from gemopt.words import counted

TOLERANCE = 1e-6  # relative
TRIED = 20

Source = str | os.PathLike[str]


def assert_feasible(
    placement: GivenPlacement, profile: Profile | Source | None = None, traces: Traces | Source | None = None
) -> None:
    """Fail unless every expert of every layer has a slot, no rank holds one twice, and the documents fit together.

    Parameters
    ----------
    profile, traces
        When given, the placement must be of their ranks, layers and experts.
    """
    try:
        placement = Placement.of(placement)
        placement.changed()  # validates anew
        measured = None if profile is None else Profile.of(profile)
        routed = None if traces is None else Traces.of(traces)
        ranks = placement.num_ranks if measured is None else measured.num_ranks
        if routed is not None:
            check_agreement(placement, routed, ranks)
        elif ranks != placement.num_ranks:
            raise InputError(
                "Placement.slots_per_rank", counted(placement.num_ranks, "rank"), f"the profile has {ranks}"
            )
    except InputError as error:
        raise AssertionError(f"not feasible: {error}") from None


def assert_bound_holds(
    result: Result | Source, profile: Profile | Source, traces: Traces | Source, *, seed: int = 0
) -> None:
    """Fail unless the result says of its placement what `evaluate` finds, and no placement tried is below its bound.

    Tried are the result's own placement, contiguous placement and 20 random ones in the same slots, on the steps the
    result was made on. Where moves had limits or a price the bound is of other placements, and only the own one is
    tried.
    """
    result, profile, traces = Result.of(result), Profile.of(profile), Traces.of(traces)
    assert result.num_steps == traces.num_steps, (
        f"the result is of {result.num_steps} steps, the traces have {traces.num_steps}"
    )
    cost = fit(profile, model=result.cost or "auto")[0]
    if result.placement is not None:
        assert_feasible(result.placement, profile, traces)
        found, said = evaluate(result.placement, profile, traces, cost=cost).objective_us, result.objective_us
        assert said is not None and abs(found - said) <= TOLERANCE * found, f"objective {said} us, evaluate: {found} us"
    if result.bound_us is None:
        return
    total = result.total_us
    assert total is None or result.bound_us <= total * (1 + TOLERANCE), f"bound {result.bound_us} above {total} us"
    if result.moves is None:
        _no_placement_below(result, profile, traces, cost, seed)


def _no_placement_below(result: Result, profile: Profile, traces: Traces, cost: CostModel, seed: int) -> None:
    layers = {layer.layer_id: layer.bound_us or 0.0 for layer in result.per_layer}
    for placement in _others(result, traces, profile.num_ranks, seed):
        per_layer_us = evaluate(placement, profile, traces, cost=cost).per_layer_us
        value = float(per_layer_us.sum())
        assert (result.bound_us or 0.0) <= value * (1 + TOLERANCE), (
            f"bound {result.bound_us} us; {value} us is possible"
        )
        for layer_id, us in zip(traces.layer_ids, per_layer_us, strict=True):
            bound = layers.get(layer_id, 0.0)
            assert bound <= us * (1 + TOLERANCE), f"layer {layer_id}: bound {bound} us; {us} us is possible"


def _others(result: Result, traces: Traces, num_ranks: int, seed: int) -> Iterator[Placement]:
    """Contiguous and random placements in the slots of the result's, spare ones left empty."""
    experts = traces.num_experts
    slots_G = default_slots(experts, num_ranks) if result.placement is None else result.placement.slots_per_rank
    rng, spare = np.random.default_rng(seed), int(slots_G.sum()) - experts
    plain = np.append(np.arange(experts), np.full(spare, -1))
    for number in range(TRIED + 1):
        rows = [plain if number == 0 else rng.permutation(plain) for _ in traces.layer_ids]
        yield Placement(physical_to_logical=np.stack(rows), slots_per_rank=slots_G, num_experts=experts,
                        layer_ids=list(traces.layer_ids))  # fmt: skip

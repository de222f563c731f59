"""The co-location bound within a time: the iteration, looked at now and then, until it stops paying."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gemopt.bounds.colocation import Programme
from gemopt.bounds.dual_bound import dual_bound
from gemopt.latency import FloatArray
from gemopt.placement import Split
from gemopt.problem import Problem

FIRST_LOOK = 40  # iterations
FEWEST = 500  # iterations before it may stop for gaining nothing: the first ones are below the floors
GROWTH = 1.25  # from one look to the next
LEAST_GAIN = 0.01  # of what is open between bound and incumbent, in the last half of the iterations
TOLERANCE = 1e-9  # relative: nothing is open
RISEN = 1000  # iterations after which a layer has gained what it gains fast: 250 to 600 go by before it gains at all


@dataclass(eq=False)
class Together:
    """What is known: the bound in microseconds, and multipliers (mu [T, K, E], v [C, E]) that prove it.

    prices_E: [E] microseconds, where all contents of ranks were priced with them (`gemopt.solvers.exact.contents`).
    """

    bound_us: float
    programme: Programme | None = None
    multipliers: tuple[FloatArray, FloatArray] | None = None
    prices_E: FloatArray | None = None
    iterations: int = 0
    looks: list[tuple[int, float]] = field(default_factory=list)
    """(iterations, bound) now and then."""
    seconds: list[float] = field(default_factory=list)
    """Of each look, since the beginning."""


def together_bound(
    problem: Problem,
    floor_T: FloatArray,
    stop: NDArray[np.uint8],
    *,
    target_us: float = np.inf,
    share_s: float = np.inf,
    left_s: float = np.inf,
) -> Together:
    """Lower bound of the objective in microseconds, at least that of the floors, better the longer it runs.

    Parameters
    ----------
    floor_T
        [T] lower bounds of the steps' makespans in microseconds, as `step_bounds` gives them.
    stop
        [1] turns 1 when there is no more time (`Options.alarm`); without it the iteration ends when it stops paying.
    target_us
        Objective of a placement: at a bound that reaches it there is nothing left to prove.
    share_s, left_s
        Seconds that are this layer's own, and seconds until `stop` where more is lent it: the bound rises late, then
        fast, then slowly, so that a few layers for long gain more than all for short. Once its share is over it goes on
        as long as it gains faster than on average, and gives up what cannot rise in time.

    Valid for every placement with one copy of each expert, and for copies under the even split; where copies share
    otherwise it is the bound of the floors.
    """
    from gemopt.bounds.primal_dual import PrimalDual

    begin, base = time.monotonic(), float(problem.weights_T @ floor_T)
    found = Together(base - TOLERANCE * abs(base))
    if not worthwhile(problem, base) or stop[0]:
        return found
    found.programme = Programme.of(problem, floor_T)
    search = PrimalDual(found.programme, stop)
    look = FIRST_LOOK
    while not stop[0]:
        search.iterate(look - search.iterations)
        multipliers = search.multipliers()
        value = dual_bound(found.programme, *multipliers)
        if value > found.bound_us:
            found.bound_us, found.multipliers = value, multipliers
        found.iterations = search.iterations
        found.looks.append((search.iterations, found.bound_us))
        found.seconds.append(time.monotonic() - begin)
        if found.bound_us >= target_us * (1 - TOLERANCE) or _stalled(found, target_us):
            break
        if found.seconds[-1] >= share_s and not _pays(found, base, left_s):
            break
        look = int(GROWTH * look) + 1
    return found


def worthwhile(problem: Problem, base: float) -> bool:
    """Whether experts can share ranks at all, there is something to bound, and copies (if any) share evenly."""
    if problem.spare_slots and problem.split is not Split.EVEN:
        return False
    sharing = (problem.slots_per_rank > 1).any() and (problem.slots_per_rank > 0).sum() > 1
    return bool(sharing and base > 0 and problem.counts_TE.any())


def _pays(found: Together, base: float, left_s: float) -> bool:
    """Whether a layer that has had its share gains faster than it did on average, or may still begin to."""
    seconds, (iterations, bound) = found.seconds[-1], found.looks[-1]
    if found.multipliers is None:
        return seconds * RISEN <= left_s * iterations
    if len(found.looks) < 2:
        return True
    rate = (bound - found.looks[-2][1]) / max(seconds - found.seconds[-2], 1e-9)
    return rate > (bound - base) / max(seconds, 1e-9)


def _stalled(found: Together, target_us: float) -> bool:
    """Whether the last half of the iterations gained next to nothing of what is open."""
    now, bound = found.looks[-1]
    before = [value for count, value in found.looks if count <= now / 2]
    if not before or now < FEWEST:
        return False
    open_us = (target_us if np.isfinite(target_us) else 1.1 * bound) - bound
    return bound - before[-1] <= LEAST_GAIN * max(open_us, 0.0)

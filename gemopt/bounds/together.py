"""The co-location bound within a time: the iteration cools, once or in longer and longer cycles, while that pays."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemopt.bounds.colocation import Programme
from gemopt.bounds.dual_bound import dual_bound
from gemopt.latency import FloatArray
from gemopt.placement import Split
from gemopt.problem import Problem

if TYPE_CHECKING:
    from gemopt.bounds.primal_dual import PrimalDual

CHUNK = 20  # iterations between two looks at the clock
GROWTH = 1.25  # of a cycle's iterations, from one look at the bound to the next
CYCLE, SHORTEST = 6, 300  # iterations of the first cycle for each expert, and at least, where there is the time
LONGER = 3  # times the one before is each later cycle
RISES = 0.4  # of the first cycle's iterations are enough to rise above the floors
HOPELESS = 0.5  # of these: for fewer a layer leaves its time to others
LEAST_GAIN = 0.05  # of what is open between bound and incumbent, in a cycle after the first
TOLERANCE = 1e-9  # relative: nothing is open


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

    Valid for every placement with one copy of each expert, and for copies under the even split; where copies share
    otherwise it is the bound of the floors.

    Parameters
    ----------
    floor_T
        [T] lower bounds of the steps' makespans in microseconds, as `step_bounds` gives them.
    stop
        [1] turns 1 when there is no more time (`Options.alarm`); without it the iteration ends when it stops paying.
    target_us
        Objective of a placement: at a bound that reaches it there is nothing left to prove.
    share_s, left_s
        Seconds that are this layer's own, and seconds until `stop`, of which it takes what the bound needs to rise. The
        iteration cools in cycles, each longer than the last; the last one ends with the share, if not before.
    """
    from gemopt.bounds.primal_dual import PrimalDual

    begin, base = time.monotonic(), float(problem.weights_T @ floor_T)
    found = Together(base - TOLERANCE * abs(base))
    if not worthwhile(problem, base) or stop[0]:
        return found
    found.programme = Programme.of(problem, floor_T)
    search, length = PrimalDual(found.programme, stop), max(SHORTEST, CYCLE * problem.num_experts)
    while not stop[0]:
        first, before = search.iterations == 0, found.bound_us
        _cycle(found, search, begin, length, (share_s, left_s if first else share_s), target_us)
        open_us = (target_us if np.isfinite(target_us) else 1.1 * found.bound_us) - found.bound_us
        stalled = not first and found.bound_us - before <= LEAST_GAIN * max(open_us, 0.0)
        if stop[0] or stalled or found.seconds[-1] >= share_s or _reached(found, target_us):
            break
        length *= LONGER
    return found


def worthwhile(problem: Problem, base: float) -> bool:
    """Whether experts can share ranks at all, there is something to bound, and copies (if any) share evenly."""
    if problem.spare_slots and problem.split is not Split.EVEN:
        return False
    sharing = (problem.slots_per_rank > 1).any() and (problem.slots_per_rank > 0).sum() > 1
    return bool(sharing and base > 0 and problem.counts_TE.any())


def _cycle(
    found: Together, search: PrimalDual, begin: float, length: int, times: tuple[float, float], target_us: float
) -> None:
    """Cool once, in at most so many iterations, until the share is over, or longer where it only then can rise."""
    (share_s, left_s), start_s = times, time.monotonic() - begin
    first = search.iterations
    look, part = first + CHUNK, 0.0
    search.heat()
    while part < 1.0 and not search.stop[0]:
        search.iterate(CHUNK)
        done, now_s = search.iterations - first, time.monotonic() - begin
        rises_s = start_s + RISES * length * (now_s - start_s) / done if done else np.inf
        end_s = rises_s if share_s < rises_s <= left_s else share_s
        part = max(done / length, (now_s - start_s) / max(end_s - start_s, 1e-9))
        if first == 0 and end_s - start_s < HOPELESS * (rises_s - start_s):
            part = 1.0
        search.cool(part)
        if search.iterations < look and part < 1.0 and not search.stop[0]:
            continue
        look = first + int(GROWTH * done)
        multipliers = search.multipliers()
        value = dual_bound(search.programme, *multipliers)
        if value > found.bound_us:
            found.bound_us, found.multipliers = value, multipliers
        found.iterations = search.iterations
        found.looks.append((search.iterations, found.bound_us))
        found.seconds.append(time.monotonic() - begin)
        if _reached(found, target_us):
            break


def _reached(found: Together, target_us: float) -> bool:
    """Whether nothing is open."""
    return found.bound_us >= target_us * (1 - TOLERANCE)

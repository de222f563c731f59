"""A layer's search and the bound of all contents of its ranks, in turns: who closes more of the gap goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers.base import Options
from gemopt.solvers.exact.contents import ContentsSearch
from gemopt.solvers.exact.stepwise import StepwiseSearch
from gemopt.solvers.size import num_contents, paired
from gemopt.solving.layers import Layer

LEAST_S = 0.3, 3.0  # seconds, from few contents to many, below which the bound would not rise above the floors
LEAST_NS = 2.0  # the same for each content and step
LENT = 3.0  # times its share is what a layer may take for it, and half of what is left
TURNS = 20
SEARCH_LEAST = 0.6, 0.4  # of the time is the search's, before and after the bound has risen above the floors
PROMISE = 0.1  # of what is open: where a search that goes on like this closes less, it waits for the bound
WAITING = 0.1  # of the time is the search's meanwhile
BOUND_MOST = 0.4  # of the time is the bound's, once the search has ended by itself


@dataclass
class _Side:
    """What one of the two has had: seconds of its turns, and microseconds of the gap that they closed."""

    seconds: list[float] = field(default_factory=list)
    closed_us: list[float] = field(default_factory=list)

    @property
    def spent(self) -> float:
        return sum(self.seconds)

    @property
    def rate(self) -> float:
        """Microseconds a second over the last half of its turns."""
        late = -(-len(self.seconds) // 2)
        return sum(self.closed_us[-late:]) / max(sum(self.seconds[-late:]), 1e-9) if late else np.inf


def least_s(problem: Problem) -> float:
    """Seconds in which a bound of all contents may rise above the floors."""
    return float(np.clip(1e-9 * LEAST_NS * num_contents(problem) * problem.num_steps, *LEAST_S))


def priced(layer: Layer, seconds: float) -> bool:
    """Whether the contents of a layer's ranks can be priced, and there is the time."""
    known = layer.floor_T is not None and not layer.bound_cut
    return known and paired(layer.problem) and seconds >= least_s(layer.problem)


def lent(layer: Layer, deadline: float, end: float) -> float:
    """The deadline, or a later one where the bound needs it: few layers with it close more than all without."""
    now = time.monotonic()
    most_s = min((deadline + end) / 2 - now, LENT * (deadline - now))
    return now + most_s if priced(layer, most_s) and not priced(layer, deadline - now) else deadline


def bounding(layer: Layer, target_us: float, deadline: float) -> ContentsSearch | StepwiseSearch:
    """The search for a bound of all contents: by pairs where latencies are straight, else step by step."""
    assert layer.floor_T is not None
    problem, row = layer.problem, None if layer.outcome is None else layer.outcome.row
    if row is not None and not all(latency.max_affine for latency in problem.latencies):
        stepwise = StepwiseSearch(problem, layer.floor_T, target_us, row, deadline)
        if not stepwise.ended:
            return stepwise
    return ContentsSearch(problem, layer.floor_T, target_us)


def instead(layer: Layer, contents: ContentsSearch | StepwiseSearch) -> ContentsSearch | StepwiseSearch:
    """By pairs, where there is no time to look at all contents step by step; the same one otherwise."""
    assert layer.floor_T is not None
    if isinstance(contents, ContentsSearch) or contents.found is not None or not contents.ended:
        return contents
    return ContentsSearch(layer.problem, layer.floor_T, contents.target_us)


def in_turns(layer: Layer, options: Callable[[float], Options], search: Callable[[Options], None], gap: float) -> None:
    """Raise the bound and let `search` go on until the deadline or both have ended. options: until a deadline."""
    assert layer.floor_T is not None
    whole = options(np.inf)
    begin, deadline = time.monotonic(), whole.deadline
    turn_s = (deadline - begin) / TURNS
    most = 1.0 if whole.patience is None else BOUND_MOST
    contents = bounding(layer, (layer.open_us + layer.bound_us) * (1 - gap), begin + most * (deadline - begin))
    searching, proving, searches = _Side(), _Side(), True
    while not whole.expired():
        contents = instead(layer, contents)
        ended = contents.ended or contents.look_s >= whole.remaining
        enough = ended or time.monotonic() - begin >= BOUND_MOST * (deadline - begin)
        if not searches and enough:
            break
        if whole.patience is None:
            promising = contents.risen or searching.rate * whole.remaining >= PROMISE * layer.open_us
            least = SEARCH_LEAST[contents.risen] if promising else WAITING
            owed = searching.spent <= least * (searching.spent + proving.spent)
            mine = searches and (ended or owed or (contents.risen and searching.rate > proving.rate))
            mine &= ended or not contents.hurries(turn_s)
        else:  # which counts tries in a row
            mine = enough
        now, before = time.monotonic(), layer.open_us
        if mine:
            search(options(deadline) if ended or whole.patience is not None else options(now + turn_s))
            assert layer.outcome is not None
            searches = layer.outcome.stopped_by in (StoppedBy.TIME_LIMIT, StoppedBy.INTERRUPT)
        else:
            contents.target_us = (layer.open_us + layer.bound_us) * (1 - gap)
            if isinstance(contents, StepwiseSearch) and layer.outcome is not None and layer.outcome.row is not None:
                contents.row = layer.outcome.row
            with whole.alarm() as stop:
                layer.prove(contents.run(stop, turn_s))
        side = searching if mine else proving
        side.seconds.append(time.monotonic() - now)
        side.closed_us.append(before - layer.open_us)
    if searches and layer.outcome is not None:
        layer.outcome.stopped_by = whole.cut_by

"""Devices that throttle, fail and come back at known steps."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from gemopt.documents import Settings
from gemopt.exceptions import InputError
from gemopt.latency import FloatArray

_EVENT = re.compile(r"(\d+):(fail|\d+(?:\.\d+)?)@(\d+)(?:-(\d+))?")
LARGEST_FACTOR, APART = 1e3, 4.0  # APART: times the time from which a factor may be per cents


class Event(Settings):
    """Rank `rank` takes `factor` times as long (0: it is gone) from step `start` until before step `stop`.

    Steps are those of the traces; None: until the end.
    """

    rank: int = Field(ge=0)
    factor: float = Field(ge=0, le=LARGEST_FACTOR)
    start: int = Field(ge=0)
    stop: int | None = None

    @property
    def fails(self) -> bool:
        """Whether the rank is gone rather than slow."""
        return self.factor == 0

    @property
    def doubt(self) -> str:
        """What a factor says that may be meant as a share of the speed, or as per cents; else empty."""
        said, factor = f"{self} is {self.factor:g} times the time", self.factor
        if 0 < factor < 1:
            return f"{said}, quicker; at {factor:g} of the speed: {1 / factor:.4g}"
        return f"{said}; {factor:g} % more is {1 + factor / 100:g}" if factor >= APART else ""

    def __str__(self) -> str:
        what = "fail" if self.fails else f"{self.factor:g}"
        return f"{self.rank}:{what}@{self.start}{'' if self.stop is None else f'-{self.stop}'}"


class Schedule(Settings):
    """What happens to which device and when."""

    events: tuple[Event, ...] = ()

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Schedule:
        """From `RANK:FACTOR@START-STOP` or `RANK:fail@START-STOP`; without `-STOP`, until the end."""
        return cls(events=tuple(_event(text) for text in texts))

    def check(self, num_ranks: int, num_steps: int, *, first_failure: int) -> None:
        """Refuse ranks and steps that do not exist, overlaps on one rank, and failures that leave nobody."""
        for event in self.events:
            if event.rank >= num_ranks:
                raise InputError("--event", str(event), f"ranks 0 to {num_ranks - 1}")
            if event.start >= num_steps or (event.stop is not None and event.stop <= event.start):
                raise InputError("--event", str(event), f"steps of the traces, 0 to {num_steps - 1}, start before stop")
            if event.fails and event.start < first_failure:
                limit = f"failures from step {first_failure} on, the first step that is scored"
                raise InputError("--event", str(event), limit)
        for i, one in enumerate(self.events):
            for other in self.events[:i]:
                ends = [num_steps if e.stop is None else e.stop for e in (one, other)]
                if max(one.start, other.start) < min(ends):
                    if one.rank == other.rank:
                        raise InputError("--event", str(one), f"one thing at a time on a rank; {other} overlaps")
                    if one.fails and other.fails:
                        raise InputError("--event", str(one), f"one failed rank at a time; {other} overlaps")
        if num_ranks < 2 and any(event.fails for event in self.events):
            raise InputError("--event", str(self.events[0]), "a failure needs at least two ranks")

    def before(self, first: int) -> list[Event]:
        """Events that are over before step `first`."""
        return [event for event in self.events if event.stop is not None and event.stop <= first]

    def factors(self, start: int, stop: int, num_ranks: int) -> FloatArray:
        """[stop - start, G] by what each rank's latency is multiplied; 0 while it is gone."""
        factors_NG = np.ones((stop - start, num_ranks))
        for event in self.events:
            end = stop if event.stop is None else event.stop
            factors_NG[max(0, event.start - start) : max(0, end - start), event.rank] = event.factor
        return factors_NG

    def changes(self, start: int, stop: int) -> list[tuple[int, int, bool]]:
        """(step, rank, gone) in order: ranks that fail (gone) or return at a step after `start` and before `stop`."""
        found = []
        for event in self.events:
            if event.fails:
                found.append((event.start, event.rank, True))
                if event.stop is not None:
                    found.append((event.stop, event.rank, False))
        return sorted((each for each in found if start <= each[0] < stop), key=lambda each: (each[0], each[2]))


def _event(text: str) -> Event:
    match = _EVENT.fullmatch(text.strip())
    if match is None:
        raise InputError("--event", text, "RANK:FACTOR@START-STOP or RANK:fail@START-STOP", "for example 3:1.3@400-800")
    rank, what, start, stop = match.groups()
    if max(len(rank), len(start), len(stop or "")) > 9:
        raise InputError("--event", text, "ranks and steps below a thousand million")
    factor = 0.0 if what == "fail" else float(what)
    if what != "fail" and not 0 < factor <= LARGEST_FACTOR:
        raise InputError("--event", text, f"a factor above 0, at most {LARGEST_FACTOR:g}; 1.3 is 30 % slower")
    return Event(rank=int(rank), factor=factor, start=int(start), stop=None if stop is None else int(stop))

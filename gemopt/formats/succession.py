"""What each step of a recording says of the steps before it: counters, repeats, sums over several steps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemopt.formats.engine import IntArray

MANY_COUNTS = 64  # that never fall, or come again, by chance
LOOKED_AT = 64  # steps whose differences are compared
APART = -0.2  # correlation of one difference with the next: -0.5 for steps of their own, about 0 for sums over several
FEWEST_STEPS = 10


class Succession:
    """Steps as they follow each other.

    Attributes
    ----------
    rising
        Steps in which, against the one before, some counts rise and none falls.
    again, earlier
        Steps of many assignments that are the one before, and two or more in turn that are earlier ones.
    """

    def __init__(self) -> None:
        self.steps = self.rising = self.again = self.earlier = self.cells = 0
        self._last: IntArray | None = None
        self._seen: dict[int, int] = {}
        self._match: int | None = None  # which of the different steps so far the last one was again
        self._run = False
        self._turns: list[float] = []
        self._difference: NDArray[np.float64] | None = None

    def add(self, counts: IntArray, total_TL: IntArray) -> None:
        """Look at [T, L, E] counts, which follow those before, and their sums."""
        known = counts if self._last is None else np.concatenate([self._last, counts])
        falls, rises = known[1:] < known[:-1], known[1:] > known[:-1]
        fell, rose = falls.any(axis=(1, 2)), rises.any(axis=(1, 2))
        self.rising += int((rose & ~fell).sum())
        busy = total_TL.sum(axis=1) >= MANY_COUNTS
        self.again += int((~rose & ~fell & busy[len(counts) - len(known) + 1 :]).sum())
        for step, is_busy in zip(counts, busy, strict=True):
            digest, before = hash(step.tobytes()), self._match
            self._match = self._seen.get(digest) if is_busy else None
            if self._match is not None and before is not None and self._match == before + 1:
                self.earlier += 1 if self._run else 2
                self._run = True
            else:
                self._run = False
            self._seen.setdefault(digest, len(self._seen))
        if self.steps < LOOKED_AT:
            self._compare(known[: LOOKED_AT + 1].astype(np.float64))
        self.steps += len(counts)
        self.cells = counts[0].size
        self._last = counts[-1:].copy()

    def _compare(self, counts: NDArray[np.float64]) -> None:
        """How each difference of the shares of two steps goes with the next one.

        Chance in a step raises its difference to the one before by what it takes from the next one; where a step holds
        most of the one before, as sums over a window, averages and counters do, it does not.
        """
        share = counts / np.maximum(counts.sum(axis=2, keepdims=True), 1)
        for difference in share[1:] - share[:-1]:
            before, self._difference = self._difference, difference
            size = 0.0 if before is None else float(np.sqrt((before**2).sum() * (difference**2).sum()))
            if before is not None and size > 0:
                self._turns.append(float((before * difference).sum()) / size)

    def adds_up(self) -> bool:
        """Whether the steps are counters beyond doubt: no count ever falls, and chance in a step stays in the next."""
        pairs, told = self.steps - 1, len(self._turns) > FEWEST_STEPS - 3
        smooth = told and sum(self._turns) > APART * len(self._turns)
        return smooth and self.rising == pairs and pairs * self.cells >= MANY_COUNTS

    def notes(self) -> list[str]:
        """What may be wrong with such steps."""
        pairs = self.steps - 1
        rising = pairs > 0 and 4 * self.rising >= 3 * pairs and pairs * self.cells >= MANY_COUNTS
        told = len(self._turns) > FEWEST_STEPS - 3 and pairs * self.cells >= MANY_COUNTS and not self.again
        smooth = told and not rising and sum(self._turns) > APART * len(self._turns)
        said = [
            (
                rising,
                f"in {self.rising} of {pairs} steps no count falls against the step before: counters that add up? "
                "then import their differences",
            ),
            (
                smooth,
                "steps follow each other as sums or means over several steps do: a window, an average, counters? then "
                "import what each step adds",
            ),
            (
                0 < self.again < pairs,
                f"{self.again} of {self.steps} steps are the step before again: a gauge that was read too often? then "
                "leave them out",
            ),
            (
                0 < self.earlier < pairs,
                f"{self.earlier} of {self.steps} steps are earlier ones again: dumps that overlap, or one twice? then "
                "leave them out",
            ),
        ]
        return [text for wanted, text in said if wanted]

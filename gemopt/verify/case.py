"""One layer of the question that a certificate answers: what ranks take at least, and what a placement takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from gemopt.costs import CostModel
from gemopt.latency import Curve

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
Values = Callable[[IntArray], FloatArray]
PS, MOST_PS = 10**6, 1 << 61  # picoseconds in a microsecond; of all steps together: what is longer counts as this
SAFE = 1e-12  # relative: latencies are lowered by more than float64 is off
SAME = 1e-9  # relative: two computations of one number
TABLED = 1 << 16  # loads, up to which curves are looked up


@dataclass(frozen=True, eq=False)
class Case:
    """One layer of the question: counts [T, E], the cost model, slots [G], and how copies share.

    nodes_G: node of each rank. sent_TGE: assignments by the rank that sends them; None where all send alike.
    """

    counts_TE: IntArray
    cost: CostModel
    slots_G: IntArray
    split: str = "even"
    nodes_G: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    sent_TGE: IntArray | None = None

    @cached_property
    def loads_FTE(self) -> IntArray:
        """[F, T, E] features of every expert."""
        return np.stack([feature.of(self.counts_TE).astype(np.int64) for feature in self.cost.features])

    @cached_property
    def spare(self) -> int:
        """Slots beyond one per expert."""
        return int(self.slots_G.sum()) - int(self.counts_TE.shape[1])

    @cached_property
    def most_F(self) -> IntArray:
        """[F] no rank can carry more at any step."""
        return np.asarray(self.loads_FTE.sum(axis=2).max(axis=1) + self.spare)

    @cached_property
    def like_G(self) -> list[int]:
        """[G] the first rank with the same latency: those share their tables."""
        first: dict[object, int] = {}
        return [first.setdefault(latency.key, g) for g, latency in enumerate(self.cost.latencies)]

    @cached_property
    def kinds(self) -> list[list[int]]:
        """Ranks with slots, those together that have the same latency and slots."""
        found: dict[tuple[int, int], list[int]] = {}
        for g in np.flatnonzero(self.slots_G).tolist():
            found.setdefault((self.like_G[g], int(self.slots_G[g])), []).append(g)
        return list(found.values())

    def terms(self, g: int, *, low: bool) -> list[list[Values]]:
        """Every curve of rank g, in microseconds by whole loads; low: the least of any larger load."""
        return self._low_terms[g] if low else self._exact_terms[g]

    @cached_property
    def _exact_terms(self) -> list[list[list[Values]]]:
        return self._of_kinds(lambda curve, _: partial(value, curve))

    @cached_property
    def _low_terms(self) -> list[list[list[Values]]]:
        return self._of_kinds(least_from)

    def _of_kinds(self, make: Callable[[Curve, int], Values]) -> list[list[list[Values]]]:
        """Of each rank's curves; looked up where few loads are possible, and worked out where they are many."""
        found: list[list[list[Values]]] = []
        for g, latency in enumerate(self.cost.latencies):
            terms = latency.terms if self.like_G[g] == g else ()
            made = [
                [
                    values if most >= TABLED else values(np.arange(most + 1)).__getitem__
                    for most, values in ((most, make(curve, most)) for curve, most in self._ranged(term))
                ]
                for term in terms
            ]
            found.append(made or found[self.like_G[g]])
        return found

    def _ranged(self, term: Sequence[Curve]) -> Iterable[tuple[Curve, int]]:
        return zip(term, self.most_F.tolist(), strict=True)

    def times_us(self, g: int, loads_F: IntArray, *, low: bool = False) -> FloatArray:
        """Latency of rank g under loads [F, ...] of whole numbers."""
        sums = [
            sum(values(loads) for values, loads in zip(term, loads_F, strict=True)) for term in self.terms(g, low=low)
        ]
        return np.asarray(np.max(np.stack([np.asarray(each) for each in sums]), axis=0))

    def floor_ps(self, times_us: FloatArray) -> IntArray:
        """Whole picoseconds that are surely not above, of which 64 bits hold the sum over the steps."""
        most = MOST_PS // max(1, len(self.counts_TE))
        return np.floor(np.minimum((times_us - SAFE * np.abs(times_us)) * PS, most)).astype(np.int64)

    @cached_property
    def floors_T(self) -> IntArray:
        """[T] picoseconds that no placement's slowest rank stays below: what all ranks hold, and who must share one."""
        ranks = np.flatnonzero(self.slots_G).tolist()
        floors_T = self.carried_T(ranks, self.loads_FTE[0].sum(axis=1))
        if self.spare == 0 and len({int(self.slots_G[g]) for g in ranks}) == 1:
            floors_T = np.maximum(floors_T, self._shared_T(ranks))
        return np.asarray(floors_T)

    def alone_ps(self, g: int, loads: IntArray) -> IntArray:
        """Picoseconds that rank g takes at least under these loads of the first feature, or any larger ones."""
        rest = [np.zeros_like(loads)] * (len(self.most_F) - 1)
        return self.floor_ps(self.times_us(g, np.stack([loads, *rest]), low=True))

    def carried_T(self, ranks: list[int], loads_T: IntArray) -> IntArray:
        """Picoseconds before which ranks do not carry these loads of the first feature together.

        That is the n-th of the times that one unit more takes on any of them; alike ranks are looked at once. It is
        looked for between times before which they surely carry less and after which they carry as much.
        """
        kinds, number_K = np.unique([self.like_G[g] for g in ranks], return_counts=True)
        need_U, place_T = np.unique(loads_T, return_inverse=True)
        one_U = np.minimum(1, need_U)
        before_U = np.min([self.alone_ps(g, one_U) for g in kinds], axis=0) - 1
        after_U = np.min([self.alone_ps(g, need_U) for g in kinds], axis=0)
        least_KU, most_KU = np.zeros((len(kinds), len(need_U)), np.int64), np.tile(need_U, (len(kinds), 1))
        while (open_U := before_U + 1 < after_U).any():
            middle_U = before_U + (after_U - before_U) // 2
            held_KU = np.stack(
                [self._held(g, middle_U, *each) for g, *each in zip(kinds, least_KU, most_KU, strict=True)]
            )
            enough_U = number_K @ held_KU >= need_U
            after_U, most_KU = np.where(open_U & enough_U, middle_U, after_U), np.where(enough_U, held_KU, most_KU)
            before_U, least_KU = np.where(open_U & ~enough_U, middle_U, before_U), np.where(enough_U, least_KU, held_KU)
        idle = max(int(self.alone_ps(g, np.zeros(1, np.int64))[0]) for g in kinds)
        return np.asarray(np.where(need_U > 0, np.maximum(after_U, idle), idle)[place_T])

    def _held(self, g: int, time_U: IntArray, least_U: IntArray, most_U: IntArray) -> IntArray:
        """What rank g can carry within these times, where that is known to lie between these loads."""
        while (least_U < most_U).any():
            middle_U = (least_U + most_U + 1) // 2
            within_U = self.alone_ps(g, middle_U) <= time_U
            least_U, most_U = np.where(within_U, middle_U, least_U), np.where(within_U, most_U, middle_U - 1)
        return least_U

    def _shared_T(self, ranks: list[int]) -> IntArray:
        """Of the (q - 1) G + 1 largest experts, q share a rank, which is full of the smallest of the others."""
        size, sorted_TE = int(self.slots_G.max()), np.sort(self.loads_FTE[0], axis=1)
        kinds = sorted({self.like_G[g] for g in ranks})
        best_T = np.zeros(len(sorted_TE), np.int64)
        for q in range(1, size + 1):
            top_TM = sorted_TE[:, sorted_TE.shape[1] - ((q - 1) * len(ranks) + 1) :]
            load_T = top_TM[:, :q].sum(axis=1) + sorted_TE[:, : size - q].sum(axis=1)
            best_T = np.maximum(best_T, np.minimum.reduce([self.alone_ps(g, load_T) for g in kinds]))
        return best_T


def value(curve: Curve, loads: IntArray) -> FloatArray:
    """A piecewise-linear curve at whole loads, and beyond its last point along its slope."""
    inside = np.interp(loads, curve.x, curve.y)
    return np.asarray(np.where(loads > curve.x[-1], curve.y[-1] + curve.slope * (loads - curve.x[-1]), inside))


def least_from(curve: Curve, most: int) -> Values:
    """The least of a curve at a whole load or any larger one up to the most, by load.

    Between two bends that is at an end. Beyond the last whole load the curve may still fall to its last point.
    """
    near = np.append(np.concatenate([np.floor(curve.x), np.ceil(curve.x)]), most)
    ends = np.unique(near[(near >= 0) & (near <= most)].astype(np.int64))
    beyond = curve.y[curve.x >= most]
    last = np.append(value(curve, ends), beyond.min() if len(beyond) else np.inf)
    least_N = np.minimum.accumulate(last[::-1])[::-1]

    def values(loads: IntArray) -> FloatArray:
        return np.minimum(value(curve, loads), least_N[np.searchsorted(ends, loads)])

    return values


def floor_bound_us(case: Case) -> float:
    """What the floors of the steps prove, in microseconds; rounded down."""
    return float(case.floors_T.sum()) / PS * (1 - SAME)


def objective_us(case: Case, row_P: IntArray, shares_TP: IntArray) -> float:
    """Summed makespan in microseconds of a row whose slots take these shares."""
    owner_P = np.repeat(np.arange(len(case.slots_G)), case.slots_G)
    loads_GFT = np.zeros((len(case.slots_G), *case.loads_FTE.shape[:2]), np.int64)
    for slot in np.flatnonzero(row_P >= 0):
        for f, feature in enumerate(case.cost.features):
            loads_GFT[owner_P[slot], f] += feature.of(shares_TP[:, slot]).astype(np.int64)
    return float(np.max([case.times_us(g, loads_GFT[g]) for g in range(len(case.slots_G))], axis=0).sum())

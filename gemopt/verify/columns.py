"""What multipliers over all contents of a rank prove, in whole numbers, and a plain search of the contents they leave.

The formula is that of docs/bounds.md. Multipliers are in 2^-24, levels in picoseconds, prices and costs in 2^-12
picoseconds; every product is rounded down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from gemopt.certificate import UNIT, IntArray, LayerProof
from gemopt.exceptions import InputError
from gemopt.verify.case import PS, Case
from gemopt.verify.dual import below
from gemopt.verify.scan import least_content
from gemopt.verify.share_contents import PricedRange, Range, covered, everything, priced_range, shared
from gemopt.verify.share_search import no_better_shares
from gemopt.verify.tree_copies import SpentError

PART_BITS = 12
LONGEST_PS = 1 << 38  # of a level: what is longer counts as this long, so that products and sums fit in 63 bits
LARGEST_PRICE = 1 << 52
MOST_COLUMNS = 400_000
MOST_ENTRIES = 2e8  # columns x steps
MOST_SCANNED = 3e10  # the same, where one level is cut, and contents are not kept
BATCH = 1 << 20  # entries looked at together
MOST_ROWS = 3e7
CLOSE = 1e-9  # relative


@dataclass(frozen=True)
class Contents:
    """What is proven in microseconds, and of every kind of ranks the contents [N, S] and reduced costs [N].

    Of these there are none where they are too many to list. Where slots are spare, what is proven range by range.
    """

    bound_us: float
    ranks: list[list[int]]
    sets: list[NDArray[np.int64]]
    extra_us: list[NDArray[np.float64]]
    ranges: list[PricedRange] = field(default_factory=list)
    floor_T: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))


def check_columns(case: Case, layer: LayerProof, duals: dict[str, IntArray]) -> Contents:
    """The bound by the multipliers of all contents of a rank, each of which is priced here.

    Raises
    ------
    InputError
        Multipliers missing, of other shapes, negative or of too large sums; levels that fall or begin above the floor
        of a step; too many contents.
    """
    name = f"Certificate.layers[{layer.layer_id}]"
    levels_LT, mu_LET, price_E = _arrays(case, layer, duals, name)
    ranks = case.kinds
    if case.spare:
        return _check_ranges(case, ranks, levels_LT[0], mu_LET, price_E, duals.get(f"copies.{layer.layer_id}"), name)
    total = (int(levels_LT[0].sum()) << PART_BITS) + sum(int(price) for price in price_E)
    sets: list[NDArray[np.int64]] = []
    extras: list[NDArray[np.float64]] = []
    for group in ranks:
        size = int(case.slots_G[group[0]])
        if not listed(case):
            total += len(group) * _least_of_all(case, group[0], levels_LT[0], mu_LET[0], price_E)
            continue
        members = np.array(list(combinations(range(len(price_E)), size)), np.int64)
        net_N = np.concatenate([_costs(case, group[0], part, levels_LT, mu_LET) for part in _batches(case, members)])
        net_N -= price_E[members].sum(axis=1)
        least = int(net_N.min())
        total += len(group) * least
        sets.append(members)
        extras.append((net_N - least) / float(PS << PART_BITS))
    return Contents(below(Fraction(total, PS << PART_BITS)), ranks, sets, extras)


def _check_ranges(
    case: Case, kinds: list[list[int]], floor_T: IntArray, mu_NET: IntArray, price_NE: IntArray,
    ends: IntArray | None, name: str,
) -> Contents:  # fmt: skip
    """The least that is proven of any of the ranges of copies [N, 2, E], which leave no number of copies out."""
    if ends is None or ends.shape != (len(mu_NET), 2, mu_NET.shape[1]):
        raise InputError(
            f"{name}: copies", "missing or of another shape", "a range of copies for each expert [N, 2, E]"
        )
    ranges = [Range(low_E, high_E) for low_E, high_E in ends]
    if (ends[:, 0] < 1).any() or not covered(case, everything(case), ranges):
        raise InputError(f"{name}: copies", f"{len(ends)} ranges", "ranges that hold all numbers of copies")
    found = [
        priced_range(case, kinds, floor_T, mu_ET, price_E, PART_BITS, within)
        for within, mu_ET, price_E in zip(ranges, mu_NET, price_NE, strict=True)
    ]
    return Contents(below(Fraction(min(each.total for each in found), PS << PART_BITS)), kinds, [], [], found, floor_T)


def _arrays(
    case: Case, layer: LayerProof, duals: dict[str, IntArray], name: str
) -> tuple[IntArray, IntArray, IntArray]:
    """(levels [L, T], multipliers [L, E, T], prices [E]) when they are what the bound needs."""
    steps, experts = case.counts_TE.shape
    try:
        levels_LT, mu_LET, price_E = (duals[f"{part}.{layer.layer_id}"] for part in ("level", "share", "price"))
    except KeyError as error:
        raise InputError(f"multipliers {error}", "nothing", "the file beside the certificate must have them") from None
    shapes = levels_LT.shape, mu_LET.shape, price_E.shape
    levels = len(levels_LT) if levels_LT.ndim else 0
    number = len(mu_LET) if case.spare and mu_LET.ndim else levels
    prices = (number, experts) if case.spare else (experts,)
    if not levels or not number or shapes != ((levels, steps), (number, experts, steps), prices):
        raise InputError(f"{name}: multipliers", str(shapes), "levels and one for every level, expert and step; prices")
    if case.spare and (levels > 1 or not shared(case)):
        raise InputError(
            f"{name}.proof",
            f"columns, {levels} levels",
            "where slots are spare, one level, even shares of one feature, contents of a rank x steps up to 1e10",
        )
    if not case.spare and not listed(case) and (levels > 1 or not scanned(case)):
        raise InputError(
            f"{name}.proof",
            f"{_columns(case)} contents of ranks",
            f"at most {MOST_COLUMNS}, for all steps 2e8, or with one level 3e10",
        )
    if (mu_LET < 0).any() or (mu_LET > UNIT).any() or (mu_LET.sum(axis=1) > UNIT).any():
        raise InputError(
            f"{name}: share", int(mu_LET.max()), f"multipliers >= 0 that sum to at most {UNIT} for each step"
        )
    if (levels_LT[0] > case.floors_T).any() or (np.diff(levels_LT, axis=0) < 0).any() or levels_LT.min() < -LONGEST_PS:
        raise InputError(f"{name}: level", int(levels_LT.max()), "levels that rise from at most the floor of each step")
    if price_E.max() > LARGEST_PRICE or price_E.min() < -LARGEST_PRICE:
        ends = f"{price_E.min()} to {price_E.max()}"
        raise InputError(f"{name}: price", ends, f"from -{LARGEST_PRICE} to {LARGEST_PRICE}")
    return levels_LT, mu_LET, price_E


def _columns(case: Case) -> int:
    """Contents of all kinds of ranks."""
    return sum(comb(case.counts_TE.shape[1], int(case.slots_G[group[0]])) for group in case.kinds)


def listed(case: Case) -> bool:
    """Whether contents are few enough to list them."""
    return _columns(case) <= MOST_COLUMNS and _columns(case) * len(case.counts_TE) <= MOST_ENTRIES


def scanned(case: Case) -> bool:
    """Whether contents are few enough to look at each, and their latencies fit in a table."""
    return len(case.cost.features) == 1 and _columns(case) * len(case.counts_TE) <= MOST_SCANNED


def _least_of_all(case: Case, g: int, floor_T: IntArray, mu_ET: IntArray, price_E: IntArray) -> int:
    """The least of what contents cost less their prices, in 2^-12 picoseconds, rounded down."""
    longest = min(LONGEST_PS, (1 << 49) // len(floor_T))
    size = int(case.slots_G[g])
    most = int(np.sort(case.loads_FTE[0], axis=1)[:, -size:].sum(axis=1).max())
    times_N = case.floor_ps(case.times_us(g, np.arange(most + 1)[None]))
    times_N = np.minimum(times_N, int(floor_T.min()) + longest)
    return least_content(case.loads_FTE[0], times_N, floor_T, mu_ET, price_E, size, PART_BITS)


def _batches(case: Case, members: IntArray) -> Iterator[IntArray]:
    count = max(1, BATCH // len(case.counts_TE))
    for first in range(0, len(members), count):
        yield members[first : first + count]


def _held(experts: int, members: IntArray) -> NDArray[np.float64]:
    """[E, n] ones where an expert is in a content: products with it are sums of whole numbers, exact in float64."""
    held_EN = np.zeros((experts, len(members)))
    held_EN[members.T, np.arange(len(members))] = 1.0
    return held_EN


def _rows(case: Case, g: int, members: IntArray) -> NDArray[np.float64]:
    """[T, n] microseconds that rank g takes with these contents."""
    held_EN = _held(case.counts_TE.shape[1], members)
    return case.times_us(g, np.stack([loads_TE @ held_EN for loads_TE in case.loads_FTE]).astype(np.int64))


def _costs(case: Case, g: int, members: IntArray, levels_LT: IntArray, mu_LET: IntArray) -> IntArray:
    """[n] what the multipliers make of each content, in 2^-12 picoseconds, rounded down."""
    rows_TN = case.floor_ps(_rows(case, g, members))
    held_EN, total_N = _held(mu_LET.shape[1], members), np.zeros(len(members), np.int64)
    longest = min(LONGEST_PS, (1 << 49) // levels_LT.size)
    for index, low_T in enumerate(levels_LT):
        most_T = np.full(len(low_T), longest)
        if index + 1 < len(levels_LT):
            most_T = np.minimum(most_T, levels_LT[index + 1] - low_T)
        part_TN = np.clip(rows_TN - low_T[:, None], 0, most_T[:, None])
        mass_TN = (mu_LET[index].T @ held_EN).astype(np.int64)
        total_N += ((mass_TN * part_TN) >> (UNIT.bit_length() - 1 - PART_BITS)).sum(axis=0)
    return total_N


def no_better_contents(case: Case, contents: Contents, bound_us: float, most_nodes: int) -> tuple[int, float | None]:
    """As `verify_tree.no_better`, over the contents that the multipliers leave for a placement below the bound."""
    if contents.ranges:
        floor_T = contents.floor_T
        return no_better_shares(case, contents.ranks, contents.ranges, floor_T, bound_us, most_nodes, PART_BITS)
    if not contents.sets:
        return most_nodes, None
    search = _Search(case, contents, bound_us, most_nodes)
    if len(search.extra_N) * len(case.counts_TE) > MOST_ROWS:
        return most_nodes, None
    try:
        search.begin()
    except SpentError:
        return most_nodes, None
    return search.nodes, search.better


class _Search:
    """Expert by expert, the one with the fewest contents left first; a node looks at all that hold it at once."""

    better: float | None

    def __init__(self, case: Case, contents: Contents, bound_us: float, most_nodes: int) -> None:
        self.case, self.most_nodes, self.nodes, self.better = case, most_nodes, 0, None
        self.limit_us = bound_us * (1 - CLOSE)
        self.room_us = self.limit_us - contents.bound_us + CLOSE * abs(bound_us)
        self.contents = contents
        self.left = [np.flatnonzero(extra_N <= self.room_us) for extra_N in contents.extra_us]
        self.kind_N = np.repeat(np.arange(len(self.left)), [len(ids) for ids in self.left])
        self.extra_N = np.concatenate([extra[ids] for extra, ids in zip(contents.extra_us, self.left, strict=True)])

    def begin(self) -> None:
        """Search all placements of the contents that are left."""
        case, contents = self.case, self.contents
        experts = case.counts_TE.shape[1]
        self.held_NE = np.zeros((len(self.extra_N), experts), bool)
        self.rows_NT = np.empty((len(self.extra_N), len(case.counts_TE)))
        for k, (sets, ids) in enumerate(zip(contents.sets, self.left, strict=True)):
            mine, first = np.flatnonzero(self.kind_N == k), 0
            for part in _batches(case, sets[ids]):
                some = mine[first : first + len(part)]
                self.held_NE[some] = _held(experts, part).T > 0
                self.rows_NT[some] = _rows(case, contents.ranks[k][0], part).T
                first += len(part)
        self.share_N = self.extra_N / np.maximum(self.held_NE.sum(axis=1), 1)
        idle = [
            case.times_us(g, np.zeros((len(case.loads_FTE), 1), np.int64))
            for g in np.flatnonzero(case.slots_G == 0).tolist()
        ]
        z_T = np.full(len(case.counts_TE), max((float(each.max()) for each in idle), default=-np.inf))
        counts = np.array([len(group) for group in contents.ranks])
        floor_T = np.maximum(z_T, case.floors_T / PS * (1 - CLOSE))
        self.go(np.arange(len(self.extra_N)), np.zeros(experts, bool), counts, floor_T, self.room_us)

    def go(
        self, ids: IntArray, used_E: NDArray[np.bool_], left_K: IntArray, z_T: NDArray[np.float64], room_us: float
    ) -> None:
        """All ways to complete what is used by contents `ids`, whose reduced costs may add up to `room_us`."""
        fits = (left_K[self.kind_N[ids]] > 0) & (self.extra_N[ids] <= room_us)
        ids = ids[fits & ~self.held_NE[ids][:, used_E].any(axis=1)]
        open_E = np.flatnonzero(~used_E)
        held = self.held_NE[np.ix_(ids, open_E)]
        if not len(ids) or not held.any(axis=0).all():
            return
        least_E = np.where(held, self.share_N[ids][:, None], np.inf).min(axis=0)
        keeps = self.extra_N[ids] + held @ -least_E + least_E.sum() <= room_us
        ids, held = ids[keeps], held[keeps]
        children = ids[held[:, held.sum(axis=0).argmin()]] if len(ids) else ids
        self.nodes += 1
        if self.nodes >= self.most_nodes:
            raise SpentError
        values = np.maximum(self.rows_NT[children], z_T).sum(axis=1)
        for n in children[values < self.limit_us]:
            used, left = used_E | self.held_NE[n], left_K.copy()
            left[self.kind_N[n]] -= 1
            slowest_T = np.maximum(z_T, self.rows_NT[n])
            if used.all():
                self.better = float(slowest_T.sum())
            else:
                self.go(ids, used, left, slowest_T, room_us - float(self.extra_N[n]))
            if self.better is not None:
                return

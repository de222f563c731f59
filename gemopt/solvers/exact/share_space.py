"""All contents that ranks can have where slots are spare and copies share evenly; what they cost, and what that proves.

A content C of rank g is a set of pairs (i, c): a copy of expert i, which has c copies in all. Its latency is at least
`f_g(C, t)`, the least of any load as large as that of `n_i // c` each. The ranks that hold an expert are c, and the
slowest rank takes no less than they do on average. So for multipliers `mu_ti >= 0` with `sum_i mu_ti <= w_t` and any
prices pi of experts no placement is below

    sum_t w_t floor_t  +  sum_i pi_i  +  sum_g min_C ( cost_g(C) - sum_{(i, c) in C} pi_i / c )
    cost_g(C) = sum_t ( sum_{(i, c) in C} mu_ti / c ) max(0, f_g(C, t) - floor_t)

where C holds no more pairs than g has slots, and asks for no more copies than leave a slot to every expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.compiling import njit
from gemopt.latency import FloatArray, IntArray
from gemopt.problem import Problem
from gemopt.solvers.exact.column_kernels import in_levels, rows_of
from gemopt.solvers.exact.column_space import ULP, feasible
from gemopt.solvers.exact.share_screen import Lines, lines_of, pair_prices, price_pairs
from gemopt.solvers.exact.tree import FAST, Tables, fill, tables_of, with_idle
from gemopt.solvers.size import num_shares

Array = NDArray[Any]
MOST_LOOKED = 20_000  # contents of all kinds, whose nets are made exact though they are not the least


class Contents(NamedTuple):
    """N contents, sorted by their pairs.

    pairs: [N, S] numbers `i C + c - 1`, then `E C`. size, copies: [N] pairs, and copies beyond one for each of their
    experts. part: [E C + 1] `1 / c`, then 0.
    """

    pairs: Array
    size: Array
    copies: Array
    part: Array


@lru_cache(maxsize=2)
def make_contents(experts: int, most: int, slots: int, spare: int) -> Contents:
    """All contents of at most `slots` pairs with at most `spare` copies more than experts.

    most: copies of one expert.
    """
    nothing = experts * most
    last, copies, pairs = np.full(1, -1), np.zeros(1, np.int64), np.full((1, slots), nothing, np.uint8)
    levels = [(np.zeros(1, np.int64), copies, pairs)]
    for size in range(slots):
        width = np.minimum(most, spare - copies + 1)
        number = width * (experts - 1 - last)
        parent = np.repeat(np.arange(len(last)), number)
        nth = np.arange(len(parent)) - np.repeat(np.cumsum(number) - number, number)
        last, copy = last[parent] + 1 + nth // width[parent], nth % width[parent]
        copies, pairs = copies[parent] + copy, pairs[parent]
        pairs[:, size] = last * most + copy
        levels.append((np.full_like(last, size + 1), copies, pairs))
    size_N, copies, pairs = (np.concatenate(each) for each in zip(*levels, strict=True))
    order = np.lexsort(pairs.T[::-1])
    part = np.append(np.tile(1 / np.arange(1, most + 1), experts), 0.0)
    return Contents(pairs[order], size_N[order].astype(np.uint8), copies[order].astype(np.uint8), part)


@njit(nogil=True, fastmath=FAST)
def price_contents(
    pairs_NS: Array, most_K: Array, features_XFT: Array, tables: Tables, ranks_K: Array, floor_T: Array, mu_XT: Array,
    price_X: Array, net_KN: Array, stop: Array,
) -> bool:  # fmt: skip
    """Sum over the steps of each content's multipliers times what it has above the floors, less its prices.

    Of those whose `net` is below `most` [K] already, which it replaces. Contents begin as the ones before them do, so
    that few sums are made anew. False when stopped.
    """
    slots, steps = pairs_NS.shape[1], len(floor_T)
    loads = np.zeros((slots + 1, *features_XFT.shape[1:]), np.int32)
    mass, row, price, nothing = np.zeros((slots + 1, steps)), np.empty(steps), np.zeros(slots + 1), features_XFT[-1]
    last, looked = -1, 0
    for n in range(len(pairs_NS)):
        below = False
        for k in range(len(ranks_K)):
            below |= net_KN[k, n] < most_K[k]
        if not below:
            continue
        looked += 1
        if looked % 256 == 0 and stop[0] != 0:
            return False
        first = 0
        while last >= 0 and first < slots and pairs_NS[n, first] == pairs_NS[last, first]:
            first += 1
        last = n
        for s in range(first, slots):
            pair = pairs_NS[n, s]
            for f in range(loads.shape[1]):
                for t in range(steps):
                    loads[s + 1, f, t] = loads[s, f, t] + features_XFT[pair, f, t]
            for t in range(steps):
                mass[s + 1, t] = mass[s, t] + mu_XT[pair, t]
            price[s + 1] = price[s] + price_X[pair]
        for k in range(len(ranks_K)):
            if not net_KN[k, n] < most_K[k]:
                continue
            g, total = ranks_K[k], 0.0
            if loads.shape[1] == 1 and tables.terms[g] == 1 and tables.straight[g, 0, 0]:
                start, slope = tables.start[g, 0, 0], tables.slope[g, 0, 0]
                for t in range(steps):
                    total += mass[slots, t] * max(0.0, start + slope * loads[slots, 0, t] - floor_T[t])
            else:
                fill(tables, g, loads[slots], nothing, nothing, 0, steps, row)
                for t in range(steps):
                    total += mass[slots, t] * max(0.0, row[t] - floor_T[t])
            net_KN[k, n] = total - price[slots]
    return True


class Priced(NamedTuple):
    """A bound in microseconds, what proves it, and what it leaves of each content.

    mu: [E, T], pi: [E] microseconds. net: [K, n] microseconds that contents cost on a kind of ranks less their prices,
    infinite where the kind cannot hold them.
    """

    bound_us: float
    mu_ET: FloatArray
    pi_E: FloatArray
    net_KN: FloatArray


@dataclass(frozen=True, eq=False)
class Shares:
    """Contents of the ranks of a problem whose copies share evenly, kind by kind; see `of` and `Master`.

    features: [E C + 1, F, T] of each pair, then of none. tables: what no larger load falls below. ranks_K, count_K,
    slots_K: of each kind of ranks that have slots the first one, how many there are, and their slots. live: which
    contents a kind can hold. kind_G: [G] kind of each rank, -1 without slots. lines: below the latencies, if there are.
    """

    problem: Problem
    floor_T: FloatArray
    contents: Contents
    live_KN: NDArray[np.bool_]
    features_XFT: NDArray[np.int32]
    tables: Tables
    ranks_K: IntArray
    count_K: IntArray
    slots_K: IntArray
    kind_G: IntArray
    lines: Lines | None

    planes: ClassVar[int] = 1

    @classmethod
    def of(cls, problem: Problem, floor_T: FloatArray) -> Shares | None:
        """The contents of a problem with floors of its steps in microseconds; None where they are too many."""
        if num_shares(problem) is None:
            return None
        kinds, most, widest = problem.kinds, problem.most_copies, int(problem.slots_per_rank.max())
        ranks_K = np.array([group[0] for group in kinds], np.int64)
        most_F = problem.features_FTE.sum(axis=2).max(axis=1)
        tables = tables_of(tuple(latency.low for latency in problem.latencies), most_F)
        if tables is None:
            return None
        contents = make_contents(problem.num_experts, most, widest, problem.spare_slots)
        empty_KN = problem.slots_per_rank[ranks_K][:, None] - contents.size.astype(np.int64)
        counts_ET = problem.counts_TE.T.astype(np.int64)
        parts = counts_ET[:, None] // np.arange(1, most + 1)[:, None]
        held = [feature.of(parts).reshape(-1, problem.num_steps) for feature in problem.features]
        features_XFT = np.zeros((problem.num_experts * most + 1, len(held), problem.num_steps), np.int32)
        features_XFT[:-1] = np.stack(held, axis=1)
        kind_G = np.full(problem.num_ranks, -1)
        for k, group in enumerate(kinds):
            kind_G[group] = k
        return cls(
            problem=problem,
            floor_T=with_idle(problem, floor_T),
            contents=contents,
            live_KN=(empty_KN >= 0) & (contents.copies + empty_KN <= problem.spare_slots),
            features_XFT=features_XFT,
            tables=tables,
            ranks_K=ranks_K,
            count_K=np.array([len(group) for group in kinds]),
            slots_K=problem.slots_per_rank[ranks_K],
            kind_G=kind_G,
            lines=lines_of(tables, ranks_K, int(most_F[0]), most_F[0] / (kind_G >= 0).sum()),
        )

    def __len__(self) -> int:
        return len(self.contents.pairs) * len(self.ranks_K)

    @property
    def straight(self) -> bool:
        """Whether all latencies are lines of one feature, so that a look is quick."""
        terms, lines = self.tables.terms[self.ranks_K], self.tables.straight[self.ranks_K]
        return self.features_XFT.shape[1] == 1 and bool((terms == 1).all() and lines[:, 0, 0].all())

    @property
    def most(self) -> int:
        """The most copies of one expert."""
        return (len(self.contents.part) - 1) // self.problem.num_experts

    @property
    def size_K(self) -> IntArray:
        """[K] entries of `members`."""
        return np.full(len(self.ranks_K), self.contents.pairs.shape[1])

    @cached_property
    def owner_X(self) -> IntArray:
        """[X] expert of each pair, of none the first."""
        return np.append(np.repeat(np.arange(self.problem.num_experts), self.most), 0)

    def kind(self, ids: IntArray) -> IntArray:
        """Kinds of some columns."""
        return ids // len(self.contents.pairs)

    def members(self, ids: IntArray) -> NDArray[np.uint8]:
        """[n, S] pairs of some columns."""
        return np.asarray(self.contents.pairs[ids % len(self.contents.pairs)])

    def parts(self, ids: IntArray, ends_LT: FloatArray, scale: float) -> NDArray[np.float32]:
        """[n, T] `scale` times what the latencies of some columns have above the floors."""
        rows_NT = np.empty((len(ids), self.problem.num_steps))
        rows_of(self.features_XFT, self.members(ids), self.ranks_K[self.kind(ids)], self.tables, rows_NT)
        return in_levels(rows_NT, ends_LT, scale)

    def ids(self, row: IntArray) -> IntArray:
        """Columns of a placement [P]."""
        pairs, copies_E = self.contents.pairs, np.bincount(row[row >= 0])
        found = []
        for g in np.flatnonzero(self.kind_G >= 0):
            held = np.sort(row[(self.problem.rank_of_slot == g) & (row >= 0)])
            mine = np.full(pairs.shape[1], len(self.contents.part) - 1)
            mine[: len(held)] = held * self.most + copies_E[held] - 1
            (n,) = np.flatnonzero((pairs == mine).all(axis=1))
            found.append(int(self.kind_G[g]) * len(pairs) + int(n))
        return np.array(found)

    def prove(
        self, mu_ET: FloatArray, pi_E: FloatArray, stop: Any, ids: IntArray | slice = slice(None),
        live_KN: NDArray[np.bool_] | None = None, near: IntArray | None = None, limit_us: float = np.inf,
    ) -> Priced | None:  # fmt: skip
        """The bound of any multipliers and prices, which are made feasible first; None when stopped.

        ids: [n] contents that ranks may have; live: [K, n] on which kinds. near: columns of these that are likely to be
        among the cheapest, by which others are left at what pairs say; limit: of the bound that would be enough.
        """
        contents, weights_T, owner_X = self.contents, self.problem.weights_T, self.owner_X
        mu, pi = feasible(mu_ET, pi_E, weights_T)
        mu_XT, price_X = mu[owner_X] * contents.part[:, None], pi[owner_X] * contents.part
        pairs_NS = np.ascontiguousarray(contents.pairs[ids])
        live_KN = np.ascontiguousarray(self.live_KN if live_KN is None else live_KN)
        net_KN, given = np.where(live_KN, -np.inf, np.inf), (mu_XT, price_X, stop)
        most_K = np.full(len(net_KN), np.inf)
        if near is not None and self.lines is not None and pairs_NS.size > 0:
            parts = pair_prices(self.lines, self.features_XFT[:, 0], self.floor_T, mu_XT, price_X, self.members(near))
            price_pairs(pairs_NS, live_KN, *parts, net_KN)
            most_K = self._worth_a_look(near, given, pi, net_KN, limit_us)
        if not self._look(pairs_NS, most_K, given, net_KN):
            return None
        return Priced(self.bound_of(pi, net_KN), mu, pi, net_KN)

    def _look(
        self, pairs_NS: NDArray[np.uint8], most_K: FloatArray, given: tuple[FloatArray, FloatArray, Any],
        net_KN: FloatArray,
    ) -> bool:  # fmt: skip
        """The nets of contents below `most` [K], step by step; see `price_contents`."""
        mu_XT, price_X, stop = given
        return bool(price_contents(
            pairs_NS, most_K, self.features_XFT, self.tables, self.ranks_K, self.floor_T, mu_XT, price_X, net_KN, stop
        ))  # fmt: skip

    def _worth_a_look(
        self, near: IntArray, given: tuple[FloatArray, FloatArray, Any], pi_E: FloatArray, net_KN: FloatArray,
        limit_us: float,
    ) -> FloatArray:  # fmt: skip
        """[K] below which nets by pairs [K, n] must be made exact: all that are open, or as many as near columns.

        If these are too many only those that may be the cheapest.
        """
        kind_N, least_K = self.kind(near), np.full(len(net_KN), np.inf)
        last_K = least_K.copy()
        for k in range(len(net_KN)):
            exact_KN = np.full((len(net_KN), int((kind_N == k).sum())), np.inf)
            exact_KN[k] = -np.inf
            self._look(self.members(near[kind_N == k]), np.full(len(net_KN), np.inf), given, exact_KN)
            least_K[k], last_K[k] = exact_KN[k].min(initial=np.inf), exact_KN[k].max(initial=-np.inf)
        if np.isfinite(least_K).all():
            room_us = limit_us - self.bound_of(pi_E, least_K[:, None])
            for most_K in (np.maximum(least_K + room_us, last_K), last_K):
                if np.isfinite(most_K).all() and (net_KN < most_K[:, None]).sum() <= MOST_LOOKED:
                    return most_K
        return np.asarray(np.nextafter(least_K, np.inf))

    def bound_of(self, pi_E: FloatArray, net_KN: FloatArray) -> float:
        """The bound in microseconds that prices and net costs of all contents prove; rounded down."""
        least_K, weights_T = net_KN.min(axis=1, initial=np.inf), self.problem.weights_T
        price = float(np.abs(pi_E).sum())
        if (least_K == np.inf).any():
            return np.inf
        bound_us = float(weights_T @ self.floor_T) + float(pi_E.sum()) + float(self.count_K @ least_K)
        size = float(weights_T @ np.abs(self.floor_T)) + price + float(self.count_K @ (np.abs(least_K) + 2 * price))
        return bound_us - ULP * (len(weights_T) + len(pi_E) + 64) * size

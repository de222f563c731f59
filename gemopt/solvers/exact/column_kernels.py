"""Compiled loops over columns, the contents of a rank: latencies, prices, and the search.

Shapes: N columns of M = L T entries, one per level and step; K kinds of ranks; S experts of a column.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.compiling import njit
from gemopt.kernels import put
from gemopt.solvers.exact.tree import CLOSE, FAST, Tables

Array = NDArray[Any]
LOOK = 8  # the work of looking at a column once more, in steps


class Found(NamedTuple):
    """Columns to search, by their reduced costs `extra` [N].

    rows: [N, T] latencies. masks, sets, sizes: experts as bits [N], listed [N, S], and how many [N]. kind: [N].
    """

    rows: Array
    masks: Array
    sets: Array
    sizes: Array
    kind: Array
    extra: Array


@njit(nogil=True, fastmath=FAST)
def latency_row(tables: Tables, g: int, loads_FT: Array, term_T: Array, out_T: Array) -> None:
    """Latency of rank g under whole loads; `term_T` is room. An unsigned index is looked up several at a time."""
    for k in range(tables.terms[g]):
        row = out_T if k == 0 else term_T
        for f in range(len(loads_FT)):
            loads, start, slope = loads_FT[f], tables.start[g, k, f], tables.slope[g, k, f]
            if tables.straight[g, k, f]:
                for t in range(len(loads)):
                    value = start + slope * loads[t]
                    row[t] = value if f == 0 else row[t] + value
            else:
                values = tables.values[tables.offset[g, k, f] :]
                for t in range(len(loads)):
                    value = values[np.uint32(loads[t])]
                    row[t] = value if f == 0 else row[t] + value
        if k > 0:
            for t in range(len(out_T)):
                out_T[t] = max(out_T[t], row[t])


@njit(nogil=True)
def rows_of(features_EFT: Array, sets_NS: Array, ranks_N: Array, tables: Tables, out_NT: Array) -> None:
    """Latencies of columns at every step."""
    loads, term = np.empty(features_EFT.shape[1:], np.int32), np.empty(features_EFT.shape[2])
    for n in range(len(sets_NS)):
        loads[:] = 0
        for e in sets_NS[n]:
            loads += features_EFT[e]
        latency_row(tables, ranks_N[n], loads, term, out_NT[n])


@njit(nogil=True, fastmath=FAST)
def cut_rows(rows_NT: Array, levels_LT: Array, out_NM: Array) -> None:
    """What of each latency lies in each level."""
    levels, steps = levels_LT.shape[0] - 1, rows_NT.shape[1]
    for n in range(len(rows_NT)):
        for i in range(levels):
            for t in range(steps):
                part = min(rows_NT[n, t], levels_LT[i + 1, t]) - levels_LT[i, t]
                out_NM[n, i * steps + t] = max(0.0, part)


def in_levels(rows_NT: Array, ends_LT: Array, scale: float) -> NDArray[np.float32]:
    """[N, L T] `scale` times what of each latency lies between the ends of each level."""
    out = np.empty((len(rows_NT), (len(ends_LT) - 1) * rows_NT.shape[1]), np.float32)
    cut_rows(rows_NT * scale, ends_LT * scale, out)
    return out


@njit(nogil=True, fastmath=FAST)
def price(
    features_EFT: Array, sets_NS: Array, ranks_K: Array, tables: Tables, levels_LT: Array, mu_ELT: Array,
    out_KN: Array, stop: Array,
) -> bool:  # fmt: skip
    """Sum over steps and levels of each column's multipliers times what it has there; False when stopped."""
    levels, steps = mu_ELT.shape[1:]
    loads, row, term = np.empty(features_EFT.shape[1:], np.int32), np.empty(steps), np.empty(steps)
    mass = np.empty((levels, steps))
    for n in range(len(sets_NS)):
        if n % 256 == 0 and stop[0] != 0:
            return False
        loads[:] = 0
        mass[:] = 0.0
        for e in sets_NS[n]:
            loads += features_EFT[e]
            for i in range(levels):
                for t in range(steps):
                    mass[i, t] += mu_ELT[e, i, t]
        for k in range(len(ranks_K)):
            latency_row(tables, ranks_K[k], loads, term, row)
            total = 0.0
            for i in range(levels):
                for t in range(steps):
                    total += mass[i, t] * max(0.0, min(row[t], levels_LT[i + 1, t]) - levels_LT[i, t])
            out_KN[k, n] = total
    return True


@njit(nogil=True, fastmath=FAST)
def slower(z_T: Array, row_T: Array, weights_T: Array, out_T: Array) -> float:
    """Weighted sum of the larger of two latencies, which goes into `out_T`."""
    total = 0.0
    for t in range(len(z_T)):
        out_T[t] = max(z_T[t], row_T[t])
        total += weights_T[t] * out_T[t]
    return total


@njit(nogil=True)
def narrow(
    list_N: Array, count: int, columns: Found, used: int, left_K: Array, room: float, share_E: Array, ways_E: Array,
    out_N: Array,
) -> int:  # fmt: skip
    """The columns of a list that can still complete a partition within `room` of reduced cost, or none; how many.

    Every expert pays its share of the reduced cost of its column, at least `share_E` of those in the list.
    """
    kept, total = 0, 0.0
    share_E[:] = np.inf
    for p in range(count):
        n = list_N[p]
        if columns.masks[n] & used == 0 and left_K[columns.kind[n]] > 0 and columns.extra[n] < room:
            out_N[kept] = n
            kept += 1
            for s in range(columns.sizes[n]):
                e = columns.sets[n, s]
                share_E[e] = min(share_E[e], columns.extra[n] / columns.sizes[n])
    for e in range(len(share_E)):
        if not used >> np.uint64(e) & np.uint64(1):
            total += share_E[e]
    if not total < room:
        return 0
    ways_E[:] = 0
    last, kept = kept, 0
    for p in range(last):
        n = out_N[p]
        others = total
        for s in range(columns.sizes[n]):
            others -= share_E[columns.sets[n, s]]
        if columns.extra[n] + others < room:
            out_N[kept] = n
            kept += 1
            for s in range(columns.sizes[n]):
                ways_E[columns.sets[n, s]] += 1
    return kept


@njit(nogil=True)
def rarest(ways_E: Array, used: int) -> int:
    """The expert with the fewest columns left; -1 when one has none."""
    chosen, fewest = -1, 2**62
    for e in range(len(ways_E)):
        if not used >> np.uint64(e) & np.uint64(1) and ways_E[e] < fewest:
            chosen, fewest = e, ways_E[e]
    return chosen if fewest > 0 else -1


@njit(nogil=True)
def search_columns(
    columns: Found, left_K: Array, weights_T: Array, floor_T: Array, experts: int, base: float, best: float,
    chosen_G: Array, most_work: int, stop: Array,
) -> tuple[float, bool]:  # fmt: skip
    """(objective of the best partition into columns, whether all were searched).

    Reduced costs add up to what a partition has above `base` at least. A node is cut by these, and by the slowest of
    its columns at every step. chosen_G: columns of a better partition. most_work: steps and columns looked at.
    """
    steps, ranks = len(floor_T), len(chosen_G)
    every = ~np.uint64(0) >> np.uint64(64 - experts)
    lists, counts = np.empty((ranks + 1, len(columns.masks)), np.int32), np.zeros(ranks + 1, np.int64)
    z, at = np.empty((ranks + 1, steps)), np.zeros(ranks + 1, np.int64)
    pivot, spent = np.zeros(ranks + 1, np.int64), np.zeros(ranks + 1)
    used, trail = np.zeros(ranks + 1, np.uint64), np.zeros(ranks + 1, np.int64)
    share, ways, left = np.empty(experts), np.empty(experts, np.int64), left_K.copy()
    put(z[0], floor_T)
    for n in range(len(columns.masks)):
        lists[0, n] = n
    limit = best * (1 - CLOSE)
    counts[0] = narrow(lists[0], len(columns.masks), columns, used[0], left, limit - base, share, ways, lists[0])
    pivot[0] = rarest(ways, used[0]) if counts[0] else -1
    depth, work = 0, 0
    while depth >= 0:
        found = -1
        while pivot[depth] >= 0 and at[depth] < counts[depth]:
            n = lists[depth, at[depth]]
            at[depth] += 1
            if base + spent[depth] + columns.extra[n] >= limit:
                at[depth] = counts[depth]
            elif columns.masks[n] >> np.uint64(pivot[depth]) & np.uint64(1):
                found = n
                break
        if found < 0:
            depth -= 1
            if depth >= 0:
                left[columns.kind[trail[depth]]] += 1
            continue
        work += steps
        if work >= most_work or stop[0] != 0:
            return best, False
        value = slower(z[depth], columns.rows[found], weights_T, z[depth + 1])
        if value >= limit:
            continue
        trail[depth] = found
        used[depth + 1] = used[depth] | columns.masks[found]
        spent[depth + 1] = spent[depth] + columns.extra[found]
        if used[depth + 1] == every:
            best, limit = value, value * (1 - CLOSE)
            put(chosen_G, trail)
            continue
        left[columns.kind[found]] -= 1
        depth += 1
        at[depth] = 0
        work += LOOK * counts[depth - 1]
        counts[depth] = narrow(
            lists[depth - 1], counts[depth - 1], columns, used[depth], left, limit - base - spent[depth], share, ways,
            lists[depth],
        )  # fmt: skip
        pivot[depth] = rarest(ways, used[depth]) if counts[depth] else -1
    return best, True

"""Static weights: the shares of copies that cost least over all steps of a problem, one expert after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gemopt.compiling import njit
from gemopt.kernels import Array, latency_value, rank_loads
from gemopt.latency import Curves, FloatArray
from gemopt.placement import Split
from gemopt.splits.flow import Copies, find_copies
from gemopt.splits.levels import IntArray, Number
from gemopt.splits.optimal import feature_table
from gemopt.splits.rules import even_weights

if TYPE_CHECKING:
    from gemopt.problem import Problem

ROUNDS = 4
LEAST_GAIN = 5e-4  # of a round over all experts
GRID = 8  # shares of two copies that are tried first; then twice as fine around the best, so often:
FINER = 4
MOST_TABLED = 1 << 22  # latencies that are looked up
MOST_KNOWN = 64  # rows of a problem whose weights are kept


@njit(nogil=True, inline="always")
def latency_of(curves: Curves, table_GN: Array, g: Number, load_F: Array) -> Number:
    """Latency of a rank, out of the table if there is one."""
    return table_GN[g, int(load_F[0])] if table_GN.shape[1] > 0 else latency_value(g, load_F, curves)


@njit(nogil=True)
def cost_with(
    curves: Curves, table_GN: Array, counts_T: IntArray, ranks_C: IntArray, ends_C: Array, alone_TCF: Array,
    table_FN: Array, beside_T: Array, weights_T: Array, first: int, most: float,
) -> float:  # fmt: skip
    """What two neighbouring copies of one expert, from the first, add to the other ranks' makespans and copies.

    Their shares end at these cumulative weights. Weighted, see `static_shares`; some number above `most` where it is
    that much.
    """
    room_F, total = np.empty(alone_TCF.shape[2]), 0.0
    for t in range(len(counts_T)):
        worst, before = beside_T[t], int(counts_T[t] * ends_C[first - 1] + 0.5) if first > 0 else 0
        for c in range(first, first + 2):
            end = int(counts_T[t] * ends_C[c] + 0.5)
            for f in range(len(room_F)):
                room_F[f] = alone_TCF[t, c, f] + table_FN[f, end - before]
            worst = max(worst, latency_of(curves, table_GN, ranks_C[c], room_F))
            before = end
        total += (worst - beside_T[t]) * weights_T[t]
        if total > most:
            break
    return total


@njit(nogil=True)
def best_ends(
    curves: Curves, table_GN: Array, counts_T: IntArray, ranks_C: IntArray, ends_C: Array, alone_TCF: Array,
    table_FN: Array, others_T: Array, weights_T: Array,
) -> None:  # fmt: skip
    """Move the ends of the copies' shares, one at a time, to where they cost least."""
    beside_T, room_F = np.empty(len(counts_T)), np.empty(alone_TCF.shape[2])
    for c in range(len(ends_C) - 1):
        for t in range(len(counts_T)):
            beside_T[t], before = others_T[t], 0
            for d in range(len(ranks_C)):
                end = int(counts_T[t] * ends_C[d] + 0.5)
                if d not in (c, c + 1):
                    for f in range(len(room_F)):
                        room_F[f] = alone_TCF[t, d, f] + table_FN[f, end - before]
                    beside_T[t] = max(beside_T[t], latency_of(curves, table_GN, ranks_C[d], room_F))
                before = end
        part = (curves, table_GN, counts_T, ranks_C, ends_C, alone_TCF, table_FN, beside_T, weights_T)
        best = cost_with(*part, c, np.inf)
        low = ends_C[c - 1] if c > 0 else 0.0
        high, kept = ends_C[c + 1], ends_C[c]
        width = (high - low) / GRID
        for level in range(1 + FINER):
            middle, size = (low, GRID) if level == 0 else (kept - width, 2)
            for n in range(size + 1):
                ends_C[c] = min(high, max(low, middle + n * width))
                cost = cost_with(*part, c, best)
                if cost < best:
                    best, kept = cost, ends_C[c]
            width *= 0.5
        ends_C[c] = kept


@njit(nogil=True)
def improve_weights(
    curves: Curves,
    table_GN: Array,
    counts_TE: NDArray[Any],
    copies: Copies,
    ends_C: Array,
    load_TGF: Array,
    table_FN: Array,
    weights_T: Array,
    stop: NDArray[np.uint8],
) -> float:
    """One round over the experts with several copies; brings `ends_C` and `load_TGF` up to date, returns the cost.

    stop: [1] ends it with what it has when it turns 1.
    """
    steps, num_ranks, features = load_TGF.shape
    others_T, time_TG, total = np.empty(steps), np.empty((steps, num_ranks)), 0.0
    for t in range(steps):
        for g in range(num_ranks):
            time_TG[t, g] = latency_of(curves, table_GN, g, load_TGF[t, g])
    for r in range(len(copies.experts)):
        if stop[0] != 0:
            break
        first, last = copies.first[r], copies.first[r + 1]
        ranks_C, mine_C, counts_T = copies.rank[first:last], ends_C[first:last], counts_TE[:, copies.experts[r]].copy()
        alone_TCF, hosts = np.empty((steps, last - first, features)), np.zeros(num_ranks, np.bool_)
        hosts[ranks_C] = True
        for t in range(steps):
            others_T[t], before = 0.0, 0
            for g in range(num_ranks):
                if not hosts[g]:
                    others_T[t] = max(others_T[t], time_TG[t, g])
            for c in range(last - first):
                end = int(counts_T[t] * mine_C[c] + 0.5)
                for f in range(features):
                    alone_TCF[t, c, f] = load_TGF[t, ranks_C[c], f] - table_FN[f, end - before]
                before = end
        best_ends(curves, table_GN, counts_T, ranks_C, mine_C, alone_TCF, table_FN, others_T, weights_T)
        for t in range(steps):
            before = 0
            for c in range(last - first):
                end, g = int(counts_T[t] * mine_C[c] + 0.5), ranks_C[c]
                for f in range(features):
                    load_TGF[t, g, f] = alone_TCF[t, c, f] + table_FN[f, end - before]
                time_TG[t, g] = latency_of(curves, table_GN, g, load_TGF[t, g])
                before = end
    for t in range(steps):
        total += time_TG[t].max() * weights_T[t]
    return total


def static_weights(
    problem: Problem, row_P: NDArray[np.int64], stop: NDArray[np.uint8] | None = None, *, anew: bool = False
) -> FloatArray:
    """[P] weights of the copies of a row that cost least on the steps of the problem, 0 for empty slots.

    Found by descent from even ones: one boundary between two copies at a time, under the true objective. They carry
    the speeds of the ranks. Never dearer than even weights. stop: [1] ends the descent with what it has when it turns
    1, as `Options.alarm` gives it. Of a row that was asked for before, or whose weights are remembered, these; anew:
    those that cost least of them and what descent finds.
    """
    key = row_P.tobytes()
    known_P = problem.weighed.get(key)
    if known_P is not None and not anew and key not in problem.untried:
        _keep(problem, row_P, known_P)
        return known_P.copy()
    chosen_P = _found_weights(problem, row_P, np.zeros(1, np.uint8) if stop is None else stop)
    problem.untried.discard(key)
    if known_P is not None:
        chosen_P = _cheaper(problem, row_P, chosen_P, known_P)
    _keep(problem, row_P, chosen_P)
    return chosen_P.copy()


def known_weights(problem: Problem, row_P: NDArray[np.int64]) -> FloatArray | None:
    """[P] what is known of a row's static weights without any search, else even ones; None under other splits."""
    if problem.split is not Split.STATIC:
        return None
    known_P = problem.weighed.get(row_P.tobytes())
    return even_weights(row_P, problem.num_experts) if known_P is None else known_P


def remember_weights(problem: Problem, row_P: NDArray[np.int64], weights_P: FloatArray) -> None:
    """Let these be the static weights of a row from now on, unless those that are known, or even ones, cost no more."""
    known_P = problem.weighed.get(row_P.tobytes())
    if known_P is not None and np.array_equal(known_P, weights_P):
        return
    before_P = even_weights(row_P, problem.num_experts) if known_P is None else known_P
    _keep(problem, row_P, _cheaper(problem, row_P, weights_P, before_P).copy())


def suggest_weights(problem: Problem, row_P: NDArray[np.int64], weights_P: FloatArray) -> None:
    """Let the static weights of a row be no dearer than these, whatever descent finds once they are asked for."""
    remember_weights(problem, row_P, weights_P)
    problem.untried.add(row_P.tobytes())


def _cheaper(problem: Problem, row_P: NDArray[np.int64], weights_P: FloatArray, before_P: FloatArray) -> FloatArray:
    """The weights, or those before them where these cost no more."""
    from gemopt.evaluate import objective

    return weights_P if objective(problem, row_P, weights_P) < objective(problem, row_P, before_P) else before_P


def carried_weights(
    problem: Problem, before_P: NDArray[np.int64], weights_P: FloatArray, row_P: NDArray[np.int64]
) -> FloatArray | None:
    """[P] static weights of a row after slots, or ranks that are alike, changed places; None of another row."""
    slots_G = np.split(np.arange(len(row_P)), np.cumsum(problem.slots_per_rank)[:-1])
    held = [{int(before_P[p]): weights_P[p] for p in slots} for slots in slots_G]
    carried_P, keys = np.zeros(len(row_P)), [latency.key for latency in problem.latencies]
    left = list(range(problem.num_ranks))
    for g, slots in enumerate(slots_G):
        experts = {int(row_P[p]) for p in slots}
        alike = [h for h in left if held[h].keys() == experts and keys[h] == keys[g]]
        if not alike:
            return None
        h = g if g in alike else alike[0]
        left.remove(h)
        carried_P[slots] = [held[h][int(row_P[p])] for p in slots]
    return carried_P


def _keep(problem: Problem, row_P: NDArray[np.int64], weights_P: FloatArray) -> None:
    """Know the weights of a row, and those of the rows that were asked for last."""
    known, key = problem.weighed, row_P.tobytes()
    known.pop(key, None)
    known[key] = weights_P
    for oldest in list(known)[:-MOST_KNOWN]:
        known.pop(oldest, None)


def _found_weights(problem: Problem, row_P: NDArray[np.int64], stop: NDArray[np.uint8]) -> FloatArray:
    from gemopt.evaluate import loads

    weights_P = even_weights(row_P, problem.num_experts)
    copies = find_copies(row_P, problem.rank_of_slot, problem.num_experts, problem.num_ranks)
    if not len(copies.experts):
        return weights_P
    load_TGF = loads(problem, row_P, weights_P)
    table_FN = feature_table(problem.features, int(problem.counts_TE.max()))
    ends_C = np.concatenate(
        [np.cumsum(weights_P[copies.slot[a:b]]) for a, b in zip(copies.first, copies.first[1:], strict=False)]
    )
    ends_C[copies.first[1:] - 1] = 1.0
    most_TGF = rank_loads(problem.features_FTE, row_P.astype(np.int64), problem.rank_of_slot, problem.num_ranks)
    size = int(most_TGF.max()) + 1  # if ranks took all of every expert that they hold
    tabled = len(table_FN) == 1 and size * problem.num_ranks <= MOST_TABLED
    loads_N = np.arange(size if tabled else 0, dtype=np.float64)
    table_GN = np.stack([latency([loads_N] * len(table_FN)) for latency in problem.latencies])
    before = np.inf
    for _ in range(ROUNDS):
        cost = improve_weights(
            problem.curves, table_GN, problem.counts_TE, copies, ends_C, load_TGF, table_FN, problem.weights_T, stop
        )
        if stop[0] != 0 or cost > before * (1 - LEAST_GAIN):
            break
        before = cost
    starts_C = np.append(0.0, ends_C[:-1])
    starts_C[copies.first[:-1]] = 0.0
    weights_P[copies.slot] = ends_C - starts_C
    return weights_P

"""State of the swap search, and latencies in the two forms its kernels read: planes and tables."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.compiling import njit
from gemopt.exceptions import UnsupportedError
from gemopt.latency import Latency
from gemopt.migration import held
from gemopt.placement import EMPTY
from gemopt.problem import Problem

Array = NDArray[Any]
Number = Any  # what a compiled function returns, as far as a type checker can tell
TABLE_LIMIT = 1 << 18
EXACT_FLOAT32 = 1 << 24
SUMMED = "where a step sums many passes, record each as a step of its own, or divide its counts by their number"
LOG_SIZE = 1 << 13
UNROLLED_PLANES = 5
STRAIGHT = 0.03  # of its values is what a hull may be off a line
ROUNDING = 1e-9
ALIKE = 0.4  # of what a latency varies about the mean load is what a line may be off it, from the lowest to the highest
FAR, STEEPER = 8.0, 2.0  # times the mean load; up to there one of line and latency may rise so many times the other


class Costs(NamedTuple):
    """Latencies as the kernels read them: planes [G, K, 1 + F], or tables with one entry per `stride` of load."""

    planes: Array
    tables: Array
    offsets: Array
    strides: Array
    num_terms: Array
    use_tables: bool


class State(NamedTuple):
    """A placement under search. P slots, G ranks, F features, T steps.

    content: [P] expert or -1; items: [P, F, T] its load; starts: [G + 1] first slot of each rank; loads: [G, F, T];
    times: [G, T]; barred: [G, E] what keeps an expert off a rank: its copy there, rules, those it is kept apart from;
    clashes: [E, n] the experts that each is kept apart from, then -1; weights: [T]; log: [n, 2] slots of the last
    swaps, and logged: [1] how many there were; stop: [1] not 0 as soon as the search is to end with what it has.
    """

    content: Array
    items: Array
    starts: Array
    loads: Array
    times: Array
    barred: Array
    clashes: Array
    weights: Array
    log: Array
    logged: Array
    stop: Array


def guiding_planes(problem: Problem, mean: float | None = None) -> Costs | None:
    """Latencies as planes that a swap gains about as much by, where they have a shape with a SIMD kernel of its own.

    Those are one line of one feature, about the mean load of a rank (that of the problem, unless given), and up to five
    planes of two features; else None.
    """
    mean = float(problem.features_FTE[0].sum(axis=1).mean()) / problem.num_ranks if mean is None else mean
    rows = [_line_about(mean, latency) for latency in problem.latencies]
    if len(problem.features) == 2:
        rows = [latency.planes(limit=UNROLLED_PLANES) for latency in problem.latencies]
    found = [row for row in rows if row is not None and len(row) <= UNROLLED_PLANES]
    return _plane_costs(found) if len(found) == len(rows) else None


@lru_cache(maxsize=1024)  # layers share latencies, and most have the same mean load
def _line_about(mean: float, latency: Latency) -> Array | None:
    """[1, 2] intercept and slope of a line that rises as a latency of one feature does, or None.

    That is one close to its convex hull, or else to the latency itself: what saturates, as where every expert is
    activated once, rises by far more than its hull. Nor does the latency rise by far more at loads that hot experts
    bring; where it is flat about the mean load, as on a wide step of a staircase, these say what its hull may rise.
    """
    if latency.num_features != 1:
        return None
    mean = max(mean, 1.0)
    loads = np.unique(np.linspace(0.25, 2.5, 64) * mean // 1)
    planes_K2 = latency.planes(limit=64)
    values = latency([loads])
    hull = (planes_K2[:, :1] + planes_K2[:, 1:] * loads).max(axis=0)
    none, varied = ROUNDING * np.abs(values).max(), np.ptp(values)
    far_us = float(np.diff(latency([np.array([mean, FAR * mean]) // 1]))[0])
    for each, tolerance in ((hull, STRAIGHT * np.abs(hull)), (values, np.inf)):
        slope, intercept = np.polyfit(loads, each, 1)
        line, rise = intercept + slope * loads, slope * (FAR - 1) * mean
        alike = np.ptp(values - line) <= ALIKE * varied + none if varied > none else rise <= STEEPER * far_us + none
        if alike and far_us <= STEEPER * rise + none and (np.abs(line - each) <= tolerance).all():
            return np.array([[intercept, slope]])
    return None


def _plane_costs(rows: list[Array]) -> Costs:
    features = rows[0].shape[1] - 1
    most = UNROLLED_PLANES if features == 2 else max(map(len, rows))
    planes = np.zeros((len(rows), most, 1 + features), dtype=np.float32)
    planes[:, :, 0] = -1e30
    for g, row in enumerate(rows):
        planes[g, : len(row)] = row
    none = np.zeros((1, 1, 1), np.int64)
    return Costs(planes, np.zeros(1, np.float32), none, none[0, 0], none[0, 0], False)


def make_costs(problem: Problem, largest_F: Array | None = None) -> Costs:
    """The latencies themselves: planes where they are few enough, else tables (interpolated beyond 262144 loads).

    largest_F: [F] loads that the tables reach, where they are for more than this problem.
    """
    features = len(problem.features)
    if all(latency.max_affine for latency in problem.latencies):
        rows = [latency.planes() for latency in problem.latencies]
        most = max(map(len, rows))
        if (features == 1 and most == 1) or (features == 2 and most <= UNROLLED_PLANES):
            return _plane_costs(rows)
    largest_F = most_loaded(problem) if largest_F is None else largest_F
    return _tables(problem.latencies, tuple((1 << int(n).bit_length()) - 1 for n in largest_F))  # layers share them


def most_loaded(problem: Problem) -> Array:
    """[F] no rank is loaded more, whatever it holds, even with one more of the experts that it holds."""
    held = problem.slots_per_rank[problem.slots_per_rank > 0]
    total_FT = problem.features_FTE.sum(axis=2, dtype=np.int64)
    most_FT = problem.features_FTE.max(axis=2).astype(np.int64)
    once_more_FT = np.minimum((held.max() + 1) * most_FT, total_FT + total_FT // held.min())
    return np.asarray(once_more_FT.max(axis=1) + problem.num_experts)


@lru_cache(maxsize=4)
def _tables(latencies: tuple[Latency, ...], largest: tuple[int, ...]) -> Costs:
    """Costs from tables up to these loads."""
    strides = np.array([1 << max(0, int(np.ceil(np.log2((n + 1) / TABLE_LIMIT)))) for n in largest], np.int64)
    grids = [np.arange(int(n) // int(s) + 3) * int(s) for n, s in zip(largest, strides, strict=True)]
    terms = np.array([len(latency.terms) if len(largest) > 1 else 1 for latency in latencies], np.int64)
    offsets = np.zeros((len(latencies), int(terms.max()), len(largest)), np.int64)
    tables: list[Array] = []
    known: dict[Any, int] = {}
    position = 0
    for g, latency in enumerate(latencies):
        same = known.setdefault(latency.key, g)  # ranks that are alike share their tables
        if same != g:
            offsets[g] = offsets[same]
            continue
        for k, term in enumerate(_table_terms(latency, grids)):
            for f, table in enumerate(term):
                offsets[g, k, f] = position
                tables.append(table.astype(np.float32))
                position += len(table)
    planes = np.zeros((len(latencies), 1, 1 + len(largest)), np.float32)
    return Costs(planes, np.concatenate(tables), offsets, strides, terms, True)


def _table_terms(latency: Latency, grids: list[Array]) -> list[list[Array]]:
    """Tables of every term and feature; with one feature the terms collapse into one."""
    if len(grids) == 1:
        return [[latency([grids[0]])]]
    return [[curve(grid) for curve, grid in zip(term, grids, strict=True)] for term in latency.terms]


@lru_cache(maxsize=64)
def step_order(num_steps: int) -> Array:
    """[T] the fixed random order in which the search goes through the steps; not to be written to."""
    order = np.random.default_rng(0).permutation(num_steps)
    order.setflags(write=False)
    return order


def _items(problem: Problem, row: NDArray[np.int64], order: Array, shares_TP: Array | None) -> Array:
    """[P, F, T] load of each slot at the steps in order."""
    from gemopt.splits import even_shares

    full = row != EMPTY
    if np.bincount(row[full], minlength=1).max() <= 1:  # what an expert held once brings is known, whatever the split
        items = np.ascontiguousarray(problem.features_FTE[:, order].transpose(2, 0, 1)[row], dtype=np.float32)
        items[~full] = 0
        return items
    shares = even_shares(problem.counts_TE[order], row) if shares_TP is None else shares_TP[order]
    stacked = np.stack([feature.of(shares) for feature in problem.features])
    return np.ascontiguousarray(stacked.transpose(2, 0, 1), dtype=np.float32)


def make_state(
    problem: Problem, row: NDArray[np.int64], costs: Costs, stop: Array | None = None, shares_TP: Array | None = None
) -> State:
    """Search state of a placement row; copies carry their share with them, the even one unless given [T, P].

    `stop`: as `Options.alarm` gives it.
    """
    if problem.features_FTE.sum(axis=2).max() >= EXACT_FLOAT32:
        most, limit = int(problem.counts_TE.sum(axis=1).max()), f"the search takes steps below {EXACT_FLOAT32} loads"
        raise UnsupportedError("counts", most, limit, SUMMED)
    order = step_order(problem.num_steps)
    items = _items(problem, row, order, shares_TP)
    starts = np.concatenate([[0], np.cumsum(problem.slots_per_rank)])
    barred, clashes = _barred(problem, row)
    loads = np.zeros((problem.num_ranks, items.shape[1], items.shape[2]), np.float32)
    busy = problem.slots_per_rank > 0
    loads[busy] = np.add.reduceat(items, starts[:-1][busy], axis=0)
    times = np.zeros((problem.num_ranks, items.shape[2]), np.float32)
    weights = problem.weights_T[order].astype(np.float32)
    log, logged = np.zeros((LOG_SIZE, 2), np.int32), np.zeros(1, np.int64)
    stop = np.zeros(1, np.uint8) if stop is None else stop
    state = State(
        row.copy(), items, starts, loads, times, barred, clashes, weights, log, logged, stop
    )  # fmt: skip
    for rank in range(problem.num_ranks):
        rank_times(costs, rank, state.loads[rank], state.times[rank])
    return state


def _barred(problem: Problem, row: NDArray[np.int64]) -> tuple[Array, Array]:
    """`State.barred` and `State.clashes`. Blocs are not known here: see `blocs`."""
    barred = held(row, problem.slots_per_rank, problem.num_experts).astype(np.int32)
    if problem.rules is None:
        return barred, np.zeros((problem.num_experts, 0), np.int64)
    clash_EE = problem.rules.clash_EE
    clashes = np.full((problem.num_experts, int(clash_EE.sum(axis=1).max())), -1)
    for expert, clash_E in enumerate(clash_EE):
        clashes[expert, : clash_E.sum()] = np.flatnonzero(clash_E)
    barred += problem.rules.closed_GE + barred @ clash_EE.astype(np.int32)
    return barred, clashes


@njit(nogil=True)
def bar_clashes(state: State, rank: int, expert: int, change: int) -> None:
    """Bring `barred` up to date for the clashes of an expert (-1: none) that a rank got (1) or lost (-1)."""
    if expert >= 0:
        for n in range(state.clashes.shape[1]):
            if state.clashes[expert, n] >= 0:
                state.barred[rank, state.clashes[expert, n]] += change


@njit(nogil=True)
def freed(state: State, rank: int, expert: int, leaving: int) -> bool:
    """Whether nothing keeps an expert off a rank but one that leaves it (-1: none does)."""
    reasons = 0
    for n in range(state.clashes.shape[1]):
        reasons += leaving >= 0 and state.clashes[expert, n] == leaving
    return bool(state.barred[rank, expert] == reasons)


@njit(nogil=True, fastmath=True)
def rank_times(costs: Costs, rank: int, loads_FT: Array, out_T: Array) -> None:
    """Latency of one rank at every step."""
    features, steps = loads_FT.shape
    if not costs.use_tables:
        out_T[:] = np.float32(-1e30)
        for k in range(costs.planes.shape[1]):
            at_none, slope, other = costs.planes[rank, k, 0], costs.planes[rank, k, 1], costs.planes[rank, k, features]
            first_T, last_T = loads_FT[0], loads_FT[features - 1]  # at most two features, see `make_costs`
            if features == 1:
                for t in range(steps):
                    out_T[t] = max(out_T[t], at_none + slope * first_T[t])
                continue
            for t in range(steps):
                out_T[t] = max(out_T[t], at_none + slope * first_T[t] + other * last_T[t])
        return
    for t in range(steps):
        best = np.float32(-1e30)
        for k in range(costs.num_terms[rank]):
            value = np.float32(0.0)
            for f in range(features):
                value += lookup(costs, rank, k, f, loads_FT[f, t])
            best = max(best, value)
        out_T[t] = best


@njit(nogil=True, fastmath=True, inline="always")
def lookup(costs: Costs, rank: int, term: int, feature: int, load: float) -> Number:
    """Table value at a load, interpolated when the table is coarser than one load."""
    stride = costs.strides[feature]
    offset = costs.offsets[rank, term, feature]
    index = np.int64(load)
    if stride == 1:
        return costs.tables[offset + index]
    cell = index // stride
    low = costs.tables[offset + cell]
    part = np.float32(index - cell * stride) / np.float32(stride)
    return low + part * (costs.tables[offset + cell + 1] - low)


@njit(nogil=True)
def rank_of(state: State, slot: int) -> Number:
    """Rank that owns a slot."""
    low, high = 0, state.starts.shape[0]
    while low < high:
        middle = (low + high) // 2
        if state.starts[middle] <= slot:
            low = middle + 1
        else:
            high = middle
    return np.int64(low - 1)
